"""Handwritten digits, in two sizes, and the batches to train on.

`digits` needs no file and no network. `mnist` reads files on disk by itself and asks torchvision to download them.
Pixels are in [-1, 1]; `Affine` takes them to what a diffusion model sees (mean 0, variance 1) and back.
"""

import gzip
import hashlib
import os
import socket
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from http.client import HTTPException
from itertools import count
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from condiff_ref.shapes import Data, Images, Labels

# MD5 of the unpacked files: one check serves `name` and `name.gz`. (torchvision checks its downloads by the MD5 of the
# .gz; a test holds that these are the contents of those.)
CHECKSUMS = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
PREFIX = {"train": "train", "test": "t10k"}
DIGITS_TEST = 400  # of 1797: 40 of each class, which has about 180
SILENCE = 30.0  # seconds without an answer after which a download gives up


class DataError(RuntimeError):
    """A data set cannot be had; the message names the file, what is wrong with it, and a way out."""


def digits(split: str) -> tuple[Images, Labels]:
    """scikit-learn's handwritten digits: images (n, 1, 8, 8) in [-1, 1] and labels (n,), 1397 "train" or 400 "test".

    The order is fixed, shuffled, and takes one of each class in turn, so that every beginning is a balanced sample; the
    test split is its first 400. Raises ValueError for another split.
    """
    _require_split(split)
    from sklearn.datasets import load_digits  # here, because it takes a second that few callers need

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().div(8).sub(1).unsqueeze(1)  # grey levels 0 .. 16
    labels = torch.from_numpy(bunch.target).long()
    # Shuffled by a hash: the same on every platform and version, which no library promises of its own shuffle.
    order = torch.tensor(sorted(range(len(labels)), key=lambda i: hashlib.sha256(str(i).encode()).digest()))
    in_turn = pad_sequence([order[labels[order] == label] for label in range(10)], padding_value=-1).flatten()
    in_turn = in_turn[in_turn >= 0]  # classes differ in size
    chosen = in_turn[:DIGITS_TEST] if split == "test" else in_turn[DIGITS_TEST:]
    return images[chosen], labels[chosen]


def mnist(split: str, root: str | Path | None = None, download: bool = True) -> tuple[Images, Labels]:
    """MNIST: images (n, 1, 28, 28) in [-1, 1] and labels (n,), 60,000 for "train" or 10,000 for "test".

    Reads root/MNIST/raw, packed or not; `root` is by default $CONDIFF_MNIST, else "data". Missing and damaged files are
    downloaded if `download`. Raises ValueError for another split, DataError where the files cannot be had.
    """
    _require_split(split)
    if root is None:
        root = os.environ.get("CONDIFF_MNIST") or "data"
    raw = Path(root).expanduser() / "MNIST" / "raw"
    try:
        images, labels = _read(raw, split)
    except DataError as problem:
        if not download:
            hint = "mnist(..., download=True) downloads it, or point root, --data-root or CONDIFF_MNIST at its folder."
            raise DataError(f"{problem} {hint}") from None
        _download(raw, str(problem))
        images, labels = _read(raw, split)
    return images.float().div(127.5).sub(1).unsqueeze(1), labels.long()


def batches(images: Tensor, labels: Tensor, size: int, seed: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches (size, *d) and (size,), from step `start` on: batch k depends on (seed, k) alone, so that resumed
    training sees what an uninterrupted one would have seen.

    Each epoch is a fresh permutation, cut short to whole batches: all steps cost the same, and since it is other
    examples each time that are left out, none is favoured. Raises ValueError where no whole batch fits.
    """
    n = len(images)
    if not 1 <= size <= n:
        raise ValueError(f"batch size must be from 1 to the number of examples, {n}; got {size}")
    if len(labels) != n:
        raise ValueError(f"{n} images but {len(labels)} labels: do they belong together?")
    order = lru_cache(maxsize=1)(lambda epoch: _permutation(n, seed, epoch))

    def batch(step: int) -> tuple[Tensor, Tensor]:
        epoch, i = divmod(step, n // size)
        chosen = order(epoch)[i * size : (i + 1) * size]
        return images[chosen], labels[chosen]

    return map(batch, count(start))


@dataclass(frozen=True)
class Affine:
    """Pixels to what a diffusion model sees, and back. An autoencoder's encode and decode can stand in its place."""

    center: float
    scale: float

    def encode(self, x: Data) -> Data:
        return (x - self.center) * self.scale

    def decode(self, z: Data) -> Data:
        return z / self.scale + self.center


def measure_affine(images: Data) -> Affine:
    """The Affine that gives `images` (the training split) mean 0 and variance 1 over all pixels together.

    Raises ValueError for images of one grey, which no scale brings to variance 1.
    """
    std, mean = torch.std_mean(images, correction=0)
    if std == 0:
        raise ValueError("all pixels are equal: there is no scale that gives them unit variance")
    return Affine(mean.item(), 1 / std.item())


def _require_split(split: str) -> None:
    if split not in PREFIX:
        raise ValueError(f'split must be "train" or "test", not {split!r}')


def _permutation(n: int, seed: int, epoch: int) -> Tensor:
    """0 .. n - 1 in the order of this epoch, (n,)."""
    # A hash: torch looks at a seed's low 32 bits only, and seed + epoch would give neighbouring seeds the same epochs.
    mixed = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    return torch.randperm(n, generator=torch.Generator().manual_seed(int.from_bytes(mixed[:4], "big")))


def _read(raw: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images (n, 28, 28) and labels (n,), uint8, from files; raises DataError unless both are intact."""
    images = _intact(raw, f"{PREFIX[split]}-images-idx3-ubyte")
    labels = _intact(raw, f"{PREFIX[split]}-labels-idx1-ubyte")
    return _idx(images), _idx(labels)


def _intact(raw: Path, name: str) -> bytes:
    """The contents of `name` or else `name.gz`, unpacked in memory (the folder may be read-only); checked by MD5."""
    problems = []
    for path, unpack in (raw / name, bytes), (raw / f"{name}.gz", gzip.decompress):
        try:
            content = unpack(path.read_bytes())
            if hashlib.md5(content, usedforsecurity=False).hexdigest() == CHECKSUMS[name]:
                return content
            problems.append(f"{path} is damaged (its MD5 is not the published one).")
        except FileNotFoundError:
            continue
        except (EOFError, zlib.error, gzip.BadGzipFile):  # before OSError: BadGzipFile is one
            problems.append(f"{path} is damaged (incomplete or not a gzip file).")
        except OSError as error:
            problems.append(f"{path} cannot be read ({error.strerror}).")
    raise DataError("MNIST: " + (" ".join(problems) or f"there is no {name} or {name}.gz in {raw}."))


def _idx(content: bytes) -> Tensor:
    """IDX: 0, 0, 8 for unsigned bytes, the number of axes, each length as a big-endian uint32, then the bytes."""
    start = 4 + 4 * content[3]
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).reshape(shape)


def _download(raw: Path, problem: str) -> None:
    """All four files into `raw`, with torchvision's mirrors and checksums; raises DataError that begins with `problem`.

    They arrive in a folder of their own and are moved when all are there: nobody ever reads half a file, two processes
    do not disturb each other, and a damaged file stays until there is a better one.
    """
    mnist_class = _torchvision_mnist(problem, raw)
    try:
        raw.mkdir(parents=True, exist_ok=True)
        with _impatience(SILENCE), tempfile.TemporaryDirectory(prefix="download-", dir=raw) as scratch:
            mnist_class(scratch, download=True)
            for path in Path(scratch, "MNIST", "raw").iterdir():
                path.replace(raw / path.name)
    except (OSError, RuntimeError, HTTPException) as error:
        raise DataError(
            f"{problem} Downloading it failed ({_brief(error)}). It takes the network, 70 MB on disk and a folder you "
            f"may write to. Run it again, or put MNIST's four .gz files into {raw}, or point root, --data-root or "
            "CONDIFF_MNIST at a folder with MNIST/raw. Everything on the embedded digits works without it."
        ) from None  # urllib's chain of causes is long, and its end stands in the message


def _torchvision_mnist(problem: str, raw: Path) -> type:
    """torchvision.datasets.MNIST; where that cannot be imported, raises DataError that says what to install."""
    try:
        from torchvision.datasets import MNIST
    except Exception as error:  # beside a torch of another build: RuntimeError, OSError or AttributeError
        raise DataError(
            f"{problem} Downloading it needs torchvision, which cannot be imported here ({_brief(error)}). Install a "
            "pair that fits: torch 2.13.0 + torchvision 0.28.0 (`make setup` does), or torch 2.11.0 + torchvision "
            f"0.26.0; or put MNIST's four .gz files into {raw}, which are read without torchvision. Everything on the "
            "embedded digits works without it."
        ) from None
    return MNIST


@contextmanager
def _impatience(seconds: float) -> Iterator[None]:
    """Connections opened meanwhile fail after `seconds` of silence; torchvision sets no limit and could wait on."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: " + " ".join(str(error).split())
