"""Facts about the data sets, and each way in which MNIST's files can fail.

The downloads here are torchvision's own code against a server on this machine, mostly with a small made-up MNIST whose
checksums stand in for the published ones; a few tests need the real files and are skipped where CONDIFF_MNIST is unset.
"""

import gzip
import hashlib
import itertools
import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from condiff_ref import data
from condiff_ref.data import Affine, DataError

TRAIN_IMAGES = "train-images-idx3-ubyte"


# --- the embedded digits ---------------------------------------------------------------------------------------------


def test_digits_have_the_class_counts_of_the_uci_set():
    train, test = (data.digits(split)[1].bincount() for split in ("train", "test"))
    assert (train + test).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert test.tolist() == [40] * 10


def test_digits_splits_are_disjoint_and_together_the_whole_set_with_its_labels():
    bunch = load_digits()  # its 1797 images are all different, so that an image tells which one it is
    expected = {
        (image / 8 - 1).astype(np.float32).tobytes(): y for image, y in zip(bunch.images, bunch.target, strict=True)
    }
    (train, train_labels), (test, test_labels) = data.digits("train"), data.digits("test")
    assert train.shape == (1397, 1, 8, 8) and test.shape == (400, 1, 8, 8)
    both = zip([*train, *test], [*train_labels, *test_labels], strict=True)
    seen = {image.numpy().tobytes(): y.item() for image, y in both}
    assert len(seen) == 1797 and seen == expected
    assert train.min() == -1 and train.max() == 1  # the blank and the full stroke both occur


def test_digits_order_is_the_documented_one_on_every_platform():
    # Of each class the index whose decimal digits have the least SHA-256: found with coreutils' sha256sum, not with us.
    first = [1039, 1631, 860, 561, 886, 1064, 1391, 1467, 1047, 1392]
    images, _ = data.digits("test")
    np.testing.assert_array_equal(images[:10, 0].numpy(), load_digits().images[first] / 8 - 1)


def test_digits_begin_with_a_balanced_sample_in_both_splits():
    for split in ("train", "test"):
        assert data.digits(split)[1][:100].tolist() == list(range(10)) * 10


@pytest.mark.parametrize("read", [data.digits, data.mnist])
def test_an_unknown_split_is_refused_with_the_choices(read):
    with pytest.raises(ValueError, match='"train" or "test", not \'valid\''):
        read("valid")


def test_importing_the_module_imports_neither_scikit_learn_nor_torchvision():
    code = "import sys, condiff_ref.data; print([m for m in ('sklearn', 'torchvision') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- batches ---------------------------------------------------------------------------------------------------------


def numbered(n):
    """Images that are their own index, with the same number as label."""
    return torch.arange(n, dtype=torch.float32).reshape(n, 1, 1, 1), torch.arange(n)


def ids(n, size, seed, steps, start=0):
    """The labels of `steps` batches; checks on the way that each image came with its own label."""
    taken = list(itertools.islice(data.batches(*numbered(n), size, seed, start), steps))
    assert all(torch.equal(images.flatten().long(), labels) for images, labels in taken)
    return [labels.tolist() for _, labels in taken]


@settings(deadline=None, max_examples=50)
@given(st.data(), st.integers(1, 30), st.integers(0, 2**40), st.integers(0, 60))
def test_training_resumed_at_step_k_sees_the_batches_of_an_uninterrupted_run(draw, n, seed, start):
    size = draw.draw(st.integers(1, n))
    assert ids(n, size, seed, 5, start) == ids(n, size, seed, start + 5)[start:]


@settings(deadline=None, max_examples=50)
@given(st.data(), st.integers(1, 30), st.integers(0, 2**40))
def test_an_epoch_has_equal_batches_and_no_example_twice(draw, n, seed):
    size = draw.draw(st.integers(1, n))
    per_epoch = n // size
    steps = ids(n, size, seed, 3 * per_epoch)
    assert {len(step) for step in steps} == {size}
    for epoch in range(3):
        seen = list(itertools.chain(*steps[epoch * per_epoch : (epoch + 1) * per_epoch]))
        assert len(set(seen)) == len(seen) == per_epoch * size > n - size


def test_no_example_is_favoured_by_the_dropped_tail():
    epochs, n, size = 2000, 7, 3  # each epoch drops 1 of 7
    counts = np.bincount(np.ravel(ids(n, size, 0, 2 * epochs)), minlength=n)
    error = (epochs * 6 / 7 * 1 / 7) ** 0.5
    assert np.abs(counts - epochs * 6 / 7).max() < 5 * error, counts


def test_epochs_and_seeds_have_orders_of_their_own():
    epoch = {(seed, e): tuple(ids(50, 50, seed, 1, e)[0]) for seed in (0, 1, 2**32, 2**32 + 1) for e in range(4)}
    assert len(set(epoch.values())) == 16  # seed + epoch would repeat, and torch itself ignores a seed's upper 32 bits


def test_batches_leave_the_global_random_state_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    ids(20, 5, 3, 10)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("size", [0, -1, 11])
def test_a_batch_that_does_not_fit_is_refused_at_the_call(size):
    with pytest.raises(ValueError, match=f"from 1 to the number of examples, 10; got {size}"):
        data.batches(*numbered(10), size, 0)


def test_labels_of_another_split_are_refused():
    with pytest.raises(ValueError, match="10 images but 9 labels"):
        data.batches(numbered(10)[0], numbered(9)[1], 2, 0)


# --- Affine ----------------------------------------------------------------------------------------------------------


def test_affine_gives_the_training_split_zero_mean_and_unit_variance():
    images, _ = data.digits("train")
    z = data.measure_affine(images).encode(images)
    assert z.dtype == torch.float32
    # 90,000 float32 numbers of order 1, each rounded to 6e-8
    np.testing.assert_allclose(z.double().mean(), 0, atol=1e-6)
    np.testing.assert_allclose(z.double().pow(2).mean(), 1, atol=1e-6)


@settings(deadline=None, max_examples=50)
@given(st.floats(-2, 2), st.floats(0.1, 10))
def test_affine_decode_undoes_encode(center, scale):
    affine, x = Affine(center, scale), torch.linspace(-1, 1, 9, dtype=torch.float64).reshape(1, 1, 3, 3)
    assert (affine.decode(affine.encode(x)) - x).abs().max() < 1e-12
    assert (affine.encode(x) - (scale * x - scale * center)).abs().max() < 1e-12


def test_images_of_one_grey_have_no_unit_variance():
    with pytest.raises(ValueError, match="all pixels are equal"):
        data.measure_affine(torch.ones(3, 1, 4, 4))


# --- MNIST itself (needs CONDIFF_MNIST) ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_root():
    if not os.environ.get("CONDIFF_MNIST"):
        pytest.skip("CONDIFF_MNIST is unset: no MNIST files to test with")
    return Path(os.environ["CONDIFF_MNIST"])


@pytest.fixture(scope="module")
def real(real_root):
    """Both splits; an error here, not a skip, where the folder is named but does not hold them."""
    return {split: data.mnist(split, real_root, download=False) for split in ("train", "test")}


@pytest.fixture
def mnist_class():
    try:
        from torchvision.datasets import MNIST
    except Exception as error:
        pytest.skip(f"torchvision cannot be imported here: {error!r}")
    return MNIST


def grey_levels(images):
    """[-1, 1] -> 0 .. 255, (n, 28, 28); fails where a pixel is off a level by more than float32's rounding."""
    chunks = []
    for part in images[:, 0].split(1000):  # in parts, which stay in the cache: several times quicker
        levels = part.add(1).mul(127.5).round()
        assert levels.div(127.5).sub(1).sub(part).abs().max() < 2e-7
        chunks.append(levels.to(torch.uint8))
    return torch.cat(chunks)


def test_mnist_has_the_published_sizes_and_class_counts(real):
    assert real["train"][0].shape == (60000, 1, 28, 28) and real["test"][0].shape == (10000, 1, 28, 28)
    train = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert real["train"][1].bincount().tolist() == train
    assert real["test"][1].bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def test_mnist_has_the_published_mean_and_std(real):
    images = real["train"][0]
    assert images.min() == -1 and images.max() == 1
    affine = data.measure_affine(images)
    assert round((affine.center + 1) / 2, 4) == 0.1307
    assert round(1 / affine.scale / 2, 4) == 0.3081


@pytest.fixture(scope="module")
def published(real_root):
    """The .gz files as they are published, {name: bytes}."""
    packed = {path.name: path.read_bytes() for path in (real_root / "MNIST" / "raw").glob("*.gz")}
    return packed if len(packed) == 4 else pytest.skip("CONDIFF_MNIST has unpacked files only")


def test_our_reader_and_torchvisions_agree_exactly(real, published, mnist_class, monkeypatch, tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    fill(raw, published)
    monkeypatch.setattr(mnist_class, "mirrors", [unreachable()])  # it only has to unpack what is there
    for split, (images, labels) in real.items():
        theirs = mnist_class(tmp_path, train=split == "train", download=True)
        assert torch.equal(grey_levels(images), theirs.data)
        assert torch.equal(labels, theirs.targets) and labels.dtype == theirs.targets.dtype


def test_our_checksums_are_those_of_the_contents_of_the_published_files(published, mnist_class):
    resources = {name: hashlib.md5(content).hexdigest() for name, content in published.items()}
    assert resources == dict(mnist_class.resources)
    contents = {name.removesuffix(".gz"): gzip.decompress(content) for name, content in published.items()}
    assert {name: hashlib.md5(content).hexdigest() for name, content in contents.items()} == data.CHECKSUMS


def test_a_real_file_cut_short_is_fetched_again_and_checked(
    real, published, mnist_class, mirror, monkeypatch, tmp_path
):
    raw, cut = tmp_path / "MNIST" / "raw", f"{TRAIN_IMAGES}.gz"
    raw.mkdir(parents=True)
    fill(raw, published | {cut: published[cut][:5_000_000]})
    monkeypatch.setattr(mnist_class, "mirrors", [mirror(published)])
    images, labels = data.mnist("train", tmp_path)
    assert torch.equal(images, real["train"][0]) and torch.equal(labels, real["train"][1])
    assert (raw / cut).read_bytes() == published[cut]


# --- a small MNIST, to break -----------------------------------------------------------------------------------------


def idx(array):
    """The IDX format, as its definition says: magic number, lengths, bytes."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def make_arrays():
    """2,100 images of which 200 are noise: packed they fill several network reads, unpacked over a megabyte."""
    noise = np.random.RandomState(0).randint(0, 256, (2100, 28, 28)).astype(np.uint8)
    noise[200:] = 0
    labels = (np.arange(2100) % 10).astype(np.uint8)
    return {"train": (noise[:2000], labels[:2000]), "test": (noise[100:200], labels[100:200])}


ARRAYS = make_arrays()
CONTENTS = {
    TRAIN_IMAGES: idx(ARRAYS["train"][0]),
    "train-labels-idx1-ubyte": idx(ARRAYS["train"][1]),
    "t10k-images-idx3-ubyte": idx(ARRAYS["test"][0]),
    "t10k-labels-idx1-ubyte": idx(ARRAYS["test"][1]),
}
PACKED = {f"{name}.gz": gzip.compress(content, 1, mtime=0) for name, content in CONTENTS.items()}
SMALL_CHECKSUMS = {name: hashlib.md5(content).hexdigest() for name, content in CONTENTS.items()}
SMALL_RESOURCES = [(name, hashlib.md5(content).hexdigest()) for name, content in PACKED.items()]


def is_small(pair, split="train"):
    """Whether (images, labels) are the small MNIST's."""
    pixels, labels = ARRAYS[split]
    return np.array_equal(grey_levels(pair[0]), pixels) and np.array_equal(pair[1], labels)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """-> an empty MNIST/raw, with the small MNIST's checksums in force for our reader."""
    monkeypatch.setattr(data, "CHECKSUMS", SMALL_CHECKSUMS)
    raw = tmp_path / "root" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    return raw


@pytest.fixture
def torchvision_small(small, mnist_class, monkeypatch):
    """torchvision's MNIST with the small one's checksums, and no mirror but those a test gives it."""
    monkeypatch.setattr(mnist_class, "resources", SMALL_RESOURCES)
    monkeypatch.setattr(mnist_class, "mirrors", [])
    return mnist_class


def fill(raw, files):
    for name, content in files.items():
        (raw / name).write_bytes(content)


def is_one_message(error):
    """A single line, and no chain of causes above it."""
    return "\n" not in str(error) and error.__suppress_context__ and error.__cause__ is None


def root_of(raw):
    return raw.parent.parent


def left_behind(raw):
    return sorted(path.name for path in raw.rglob("*"))


@pytest.mark.parametrize("files", [PACKED, CONTENTS, PACKED | CONTENTS], ids=["packed", "unpacked", "both"])
def test_files_on_disk_are_read_without_torchvision(small, files, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)  # any import of it fails
    fill(small, files)
    for split in ("train", "test"):
        pair = data.mnist(split, root_of(small))
        assert is_small(pair, split) and pair[0].dtype == torch.float32 and pair[1].dtype == torch.int64
    assert left_behind(small) == sorted(files)


def test_root_is_the_argument_then_the_environment_then_data(small, monkeypatch, tmp_path):
    fill(small, PACKED)
    monkeypatch.setenv("CONDIFF_MNIST", str(root_of(small)))
    assert is_small(data.mnist("train"))
    with pytest.raises(DataError, match="elsewhere"):
        data.mnist("train", "elsewhere", download=False)
    monkeypatch.setenv("CONDIFF_MNIST", "")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"no {TRAIN_IMAGES} or {TRAIN_IMAGES}.gz in data/MNIST/raw"):
        data.mnist("train", download=False)
    root_of(small).rename(tmp_path / "data")
    assert is_small(data.mnist("train", download=False))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert is_small(data.mnist("train", "~/data", download=False))


# --- damage ----------------------------------------------------------------------------------------------------------

GZ = PACKED[f"{TRAIN_IMAGES}.gz"]
DAMAGE = {
    "partial gz": (".gz", GZ[: len(GZ) // 2]),
    "partial gz, header only": (".gz", GZ[:5]),
    "empty gz": (".gz", b""),
    "gz with a flipped byte": (".gz", GZ[:5000] + bytes([GZ[5000] ^ 255]) + GZ[5001:]),
    "gz with a broken block": (".gz", GZ[:10] + b"\xff" + GZ[11:]),
    "a web page for a gz": (".gz", b"<html>Please log in to this network</html>"),
    "a whole gz of something else": (".gz", PACKED["t10k-images-idx3-ubyte.gz"]),
    "unpacked, cut short": ("", CONTENTS[TRAIN_IMAGES][:100_000]),
    "unpacked, empty": ("", b""),
    "unpacked, of the right size but zeros": ("", bytes(len(CONTENTS[TRAIN_IMAGES]))),
}


@pytest.fixture(params=DAMAGE.values(), ids=DAMAGE.keys())
def damaged(small, request):
    """-> the path of the one file of the small MNIST that is not as it should be; there is no other copy of it."""
    suffix, content = request.param
    fill(small, {name: packed for name, packed in PACKED.items() if not name.startswith(TRAIN_IMAGES)})
    path = small / f"{TRAIN_IMAGES}{suffix}"
    path.write_bytes(content)
    return path


def test_a_damaged_file_is_named_with_a_way_out(damaged, small):
    with pytest.raises(DataError) as caught:
        data.mnist("train", root_of(small), download=False)
    message = str(caught.value)
    assert f"{damaged} is damaged" in message and "download=True" in message
    assert is_one_message(caught.value)
    assert is_small(data.mnist("test", root_of(small), download=False), "test")  # the other split needs none of it


def test_a_damaged_file_is_downloaded_again(damaged, small, torchvision_small, mirror, monkeypatch):
    monkeypatch.setattr(torchvision_small, "mirrors", [mirror(PACKED)])
    assert is_small(data.mnist("train", root_of(small)))
    assert is_small(data.mnist("train", root_of(small), download=False))  # for good
    assert left_behind(small) == sorted(PACKED | CONTENTS)
    assert torch.equal(torchvision_small(root_of(small)).data, torch.from_numpy(ARRAYS["train"][0]))  # its own layout


def test_a_damaged_unpacked_file_does_no_harm_beside_its_gz(small):
    fill(small, PACKED | {TRAIN_IMAGES: CONTENTS[TRAIN_IMAGES][:100]})
    assert is_small(data.mnist("train", root_of(small), download=False))


# --- the network -----------------------------------------------------------------------------------------------------


def right(handler, content):
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)


def cut_off(handler, content):
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content[: len(content) // 2])


def wrong_bytes(handler, content):
    right(handler, content[::-1])


def not_there(handler, content):
    handler.send_error(404)


def log_in_page(handler, content):
    right(handler, b"<html>Please log in to this network</html>")


def silent(handler, content):
    handler.server.closing.wait(20)


def stalled(handler, content):
    cut_off(handler, content)
    handler.wfile.flush()
    handler.server.closing.wait(20)


def not_http(handler, content):
    handler.wfile.write(b"220 mail.example ready\r\n")


@pytest.fixture
def mirror(monkeypatch):
    """-> serve(files, answer): starts a server on this machine, returns its address."""
    monkeypatch.setenv("no_proxy", "*")
    servers = []

    def serve(files, answer=right):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.requests.append(self.path)
                answer(self, files[self.path[1:]])

            def log_message(self, *args):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.requests, server.closing = [], threading.Event()
        server.handle_error = lambda *args: None  # torchvision hangs up on its first, probing request
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/"

    serve.servers = servers
    yield serve
    for server in servers:
        server.closing.set()
        server.shutdown()
        server.server_close()


def unreachable():
    """An address of this machine where nobody listens."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{closed.getsockname()[1]}/"


def fails_to_download(raw, *reasons):
    """One DataError that says what happened, where, and what can be done."""
    with pytest.raises(DataError) as caught:
        data.mnist("train", root_of(raw))
    message = str(caught.value)
    for part in (
        *reasons,
        TRAIN_IMAGES,
        f".gz files into {raw}",
        "Downloading it failed",
        "Run it again",
        "CONDIFF_MNIST",
        "digits",
    ):
        assert part in message, message
    assert is_one_message(caught.value)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (cut_off, "corrupted"),
        (wrong_bytes, "corrupted"),
        (log_in_page, "corrupted"),
        (not_there, "404"),
        (not_http, "BadStatusLine"),
        (silent, "timed out"),
        (stalled, "timed out"),
    ],
)
def test_a_download_that_fails_says_so_and_leaves_nothing_behind(
    small, torchvision_small, mirror, answer, reason, monkeypatch
):
    monkeypatch.setattr(data, "SILENCE", 0.3)
    monkeypatch.setattr(torchvision_small, "mirrors", [mirror(PACKED, answer)])
    fails_to_download(small, "there is no", reason)
    assert left_behind(small) == []
    assert socket.getdefaulttimeout() is None


def test_without_a_network_the_message_says_so(small, torchvision_small, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(torchvision_small, "mirrors", [unreachable(), unreachable()])
    fails_to_download(small, "there is no", "Connection refused")


def test_a_damaged_file_is_kept_until_there_is_a_better_one(small, torchvision_small, mirror, monkeypatch):
    fill(small, {f"{TRAIN_IMAGES}.gz": GZ[:1000]})
    monkeypatch.setattr(torchvision_small, "mirrors", [mirror(PACKED, cut_off)])
    fails_to_download(small, "is damaged", "corrupted")
    assert (small / f"{TRAIN_IMAGES}.gz").read_bytes() == GZ[:1000] and len(left_behind(small)) == 1


def test_a_second_mirror_helps_out(small, torchvision_small, mirror, monkeypatch):
    monkeypatch.setattr(torchvision_small, "mirrors", [unreachable(), mirror(PACKED, wrong_bytes), mirror(PACKED)])
    assert is_small(data.mnist("train", root_of(small)))


def test_a_folder_that_does_not_exist_yet_is_made(small, torchvision_small, mirror, monkeypatch, tmp_path):
    monkeypatch.setattr(torchvision_small, "mirrors", [mirror(PACKED)])
    assert is_small(data.mnist("test", tmp_path / "new" / "folder"), "test")


def test_a_killed_download_is_no_half_file_and_the_next_call_completes(
    small, torchvision_small, mirror, monkeypatch, tmp_path
):
    code = """if True:
        import json, sys
        from torchvision.datasets import MNIST
        from condiff_ref import data
        data.CHECKSUMS, MNIST.resources, MNIST.mirrors, root = json.loads(sys.argv[1])
        data.mnist("train", root)"""
    settings = json.dumps([SMALL_CHECKSUMS, SMALL_RESOURCES, [mirror(PACKED, stalled)], str(root_of(small))])
    child = subprocess.Popen([sys.executable, "-c", code, settings], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not any(path.stat().st_size for path in small.rglob("*.gz")):
            assert time.monotonic() < deadline and child.poll() is None
            time.sleep(0.02)
    finally:
        child.kill()  # in the middle of the first file
        child.wait()
    with pytest.raises(DataError, match="there is no"):
        data.mnist("train", root_of(small), download=False)
    monkeypatch.setattr(torchvision_small, "mirrors", [mirror(PACKED)])
    assert is_small(data.mnist("train", root_of(small)))


# --- the disk --------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_named_and_leaves_nothing_behind(small, torchvision_small, mirror, monkeypatch):
    monkeypatch.setattr(torchvision_small, "mirrors", [mirror(PACKED)])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))  # enough for each .gz, too little to unpack one
    try:
        fails_to_download(small, "there is no", "OSError", "File too large", "on disk")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert left_behind(small) == []
    assert is_small(data.mnist("train", root_of(small)))


@contextmanager
def without_rights(folder):
    """As a user who owns nothing, since no permission stops root; in `folder`, the folders above which are private."""
    before = Path.cwd()
    folder.chmod(0o755)
    os.chdir(folder)
    if os.geteuid() == 0:
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)
            os.chdir(before)
    else:
        try:
            yield
        finally:
            os.chdir(before)


@contextmanager
def mode(path, bits):
    before = path.stat().st_mode
    path.chmod(bits)
    try:
        yield
    finally:
        path.chmod(before)


def test_a_read_only_folder_with_packed_files_is_read(small):
    fill(small, PACKED)
    with mode(small, 0o555), without_rights(root_of(small)):
        with pytest.raises(PermissionError):
            Path("MNIST/raw/new").touch()  # it is read-only indeed
        assert is_small(data.mnist("train", "."))


@pytest.mark.parametrize("target", ["folder", "file"])
@pytest.mark.parametrize("download", [False, True])
def test_what_may_not_be_read_is_named(small, torchvision_small, mirror, monkeypatch, target, download):
    monkeypatch.setattr(torchvision_small, "mirrors", [mirror(PACKED)])
    fill(small, PACKED)
    small.chmod(0o555)
    locked = small if target == "folder" else small / f"{TRAIN_IMAGES}.gz"
    named = pytest.raises(DataError, match=f"{TRAIN_IMAGES}.gz cannot be read .Permission denied.*CONDIFF_MNIST")
    with mode(locked, 0o000), without_rights(root_of(small)), named:
        data.mnist("train", ".", download=download)
    small.chmod(0o755)
    assert mirror.servers[0].requests == []  # nothing is fetched that could not be put down
    assert is_small(data.mnist("train", root_of(small), download=False))  # it was the permissions and nothing else


def test_a_damaged_file_in_a_read_only_folder_is_named_before_anything_is_fetched(
    small, torchvision_small, mirror, monkeypatch
):
    monkeypatch.setattr(torchvision_small, "mirrors", [mirror(PACKED)])
    fill(small, PACKED | {f"{TRAIN_IMAGES}.gz": GZ[:1000]})
    named = pytest.raises(DataError, match="gz is damaged.*Permission denied.*a folder you may write to")
    with mode(small, 0o555), without_rights(root_of(small)), named:
        data.mnist("train", ".")
    assert mirror.servers[0].requests == []


@pytest.mark.parametrize("download", [False, True])
def test_a_file_in_the_place_of_the_folder_is_named(small, mnist_class, download):
    small.rmdir()
    small.write_text("not a folder")
    with pytest.raises(DataError, match=f"{small}/{TRAIN_IMAGES} cannot be read .Not a directory.*CONDIFF_MNIST"):
        data.mnist("train", root_of(small), download=download)


# --- torchvision that does not fit -----------------------------------------------------------------------------------

BROKEN = {
    "missing": "raise ModuleNotFoundError(\"No module named 'torchvision'\")",
    "another build of torch": "raise RuntimeError('operator torchvision::nms does not exist')",
    "a library is missing": "raise OSError('libcudart.so.13: cannot open shared object file')",
    "half imported before": "import torchvision; torchvision.extension",
}


@pytest.fixture(params=BROKEN.values(), ids=BROKEN.keys())
def broken_torchvision(request, monkeypatch, tmp_path):
    """A torchvision earlier on the path whose import raises, as real ones do beside a torch of another build."""
    (tmp_path / "broken" / "torchvision").mkdir(parents=True)
    (tmp_path / "broken" / "torchvision" / "__init__.py").write_text(request.param)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path / "broken")


def test_a_torchvision_that_does_not_import_is_explained_with_the_pairs_that_fit(small, broken_torchvision):
    with pytest.raises(DataError) as caught:
        data.mnist("train", root_of(small))
    message = str(caught.value)
    for part in (
        "torchvision, which cannot be imported here",
        "torch 2.13.0 + torchvision 0.28.0",
        str(small),
        "digits",
    ):
        assert part in message, message
    assert "torch 2.11.0 + torchvision 0.26.0" in message and is_one_message(caught.value)
    fill(small, PACKED)  # the way out that it names
    assert is_small(data.mnist("train", root_of(small)))
