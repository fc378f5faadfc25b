"""Captions are checked by reading the canvas again, by rules that know nothing of how it was drawn."""

import math
import re
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import ndimage
from sklearn.datasets import load_digits

from condiff_ref import scenes as module
from condiff_ref.data import digits, mnist
from condiff_ref.scenes import EMPTY, LENGTH, WORDS, SceneObject, by_quadrant, outlines, quadrants, scenes, skeletons
from condiff_ref.text import Vocabulary

N = 1000
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
PART = re.compile(rf"a (small|large) ({'|'.join(NAMES)}) at the (top|bottom) (left|right)")
EIGHT = np.ones((3, 3))  # pixels that touch at a corner belong together


@pytest.fixture(scope="module")
def made():
    return scenes(N, torch.Generator().manual_seed(0))


def read_caption(caption: str) -> dict[tuple[str, str], tuple[int, str]]:
    """(top or bottom, left or right): (digit, size)."""
    matches = [PART.fullmatch(part) for part in caption.split(", ")]
    assert all(matches), caption
    found = {(m[3], m[4]): (NAMES.index(m[2]), m[1]) for m in matches}
    assert len(found) == len(matches), f"two digits in one place: {caption}"
    return found


def shrink(image: np.ndarray) -> np.ndarray:
    """8x8 to 5x5: each new pixel is the mean of the old ones that it touches."""
    spans = [slice(i * 8 // 5, -(-(i + 1) * 8 // 5)) for i in range(5)]
    return np.array([[image[rows, columns].mean() for columns in spans] for rows in spans])


@pytest.fixture(scope="module")
def catalogue():
    """Ink of an 8x8 digit, or of one shrunk to 5x5, by its bytes: its classes."""
    bunch, table = load_digits(), {}
    for image, label in zip(bunch.images / 8 - 1, bunch.target, strict=True):
        for some in (image, shrink(image)):
            table.setdefault(np.round(trim(some), 4).tobytes(), set()).add(int(label))
    return table


def trim(part: np.ndarray) -> np.ndarray:
    """The rows and columns from the first to the last that are not all background."""
    ink = part > -1
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    return np.ascontiguousarray(part[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]).astype(np.float64) + 0.0


def read_canvas(canvas: np.ndarray, catalogue: dict) -> dict[tuple[str, str], tuple[set[int], str]]:
    """Every digit of the set reaches from the first row to the last, so that its height tells its size."""
    found = {}
    for i, vertical in enumerate(("top", "bottom")):
        for j, horizontal in enumerate(("left", "right")):
            part = canvas[8 * i : 8 * i + 8, 8 * j : 8 * j + 8]
            if (part > -1).any():
                ink = trim(part)
                assert len(ink) in (5, 8)
                size = "large" if len(ink) == 8 else "small"
                found[vertical, horizontal] = (catalogue[np.round(ink, 4).tobytes()], size)
    return found


# --- scenes ----------------------------------------------------------------------------------------------------------


def test_every_caption_says_what_the_canvas_shows(made, catalogue):
    for image, caption in zip(made.images[:, 0].double().numpy(), made.captions, strict=True):
        said, seen = read_caption(caption), read_canvas(image, catalogue)
        assert said.keys() == seen.keys(), caption
        for place in said:
            assert said[place][0] in seen[place][0] and said[place][1] == seen[place][1], caption


def test_the_truth_is_what_the_caption_says_in_its_order(made):
    corners = [("top", "left"), ("top", "right"), ("bottom", "left"), ("bottom", "right")]
    for caption, objects in zip(made.captions, made.objects, strict=True):
        truth = [(corners[o.quadrant], (o.digit, ("small", "large")[o.size])) for o in objects]
        assert truth == list(read_caption(caption).items())


def test_every_choice_is_uniform(made):
    objects = [o for some in made.objects for o in some]
    counts = {
        "objects": (Counter(map(len, made.objects)), 2),
        "size": (Counter(o.size for o in objects), 2),
        "quadrant": (Counter(o.quadrant for o in objects), 4),
        "first": (Counter(some[0].quadrant for some in made.objects), 4),
        "digit": (Counter(o.digit for o in objects), 10),
        "pair": (Counter((a[0].quadrant, a[1].quadrant) for a in made.objects if len(a) == 2), 12),
    }
    for name, (count, options) in counts.items():
        n, p = count.total(), 1 / options
        assert len(count) == options, name
        assert all(abs(hits - n * p) < 5 * math.sqrt(n * p * (1 - p)) for hits in count.values()), name  # 5 sigma


def test_small_digits_lie_everywhere_in_their_quadrant_and_nothing_leaves_it():
    full = torch.ones(3, 1, 8, 8), torch.tensor([1, 2, 3])  # all ink
    images, _, objects = scenes(400, torch.Generator().manual_seed(1), source=full)
    places = Counter()
    for parts, some in zip(quadrants(images).reshape(400, 4, 8, 8) > -1, objects, strict=True):
        assert parts.flatten(1).any(dim=1).nonzero().flatten().tolist() == sorted(o.quadrant for o in some)
        for o in some:
            rows, columns = parts[o.quadrant].nonzero().T
            assert parts[o.quadrant].sum() == (64 if o.size else 25)
            places[(rows.min().item(), columns.min().item(), o.size)] += 1
    assert places.keys() == {(i, j, 0) for i in range(4) for j in range(4)} | {(0, 0, 1)}


def test_the_digits_are_of_the_training_split(made):
    known = {image.numpy().tobytes() for image in digits("train")[0]}
    parts = quadrants(made.images).reshape(N, 4, 8, 8)
    large = [parts[i, o.quadrant] for i, some in enumerate(made.objects) for o in some if o.size]
    assert large and all(part.numpy().tobytes() in known for part in large)


def test_pixels_are_the_data_sets_own(made):
    assert made.images.shape == (N, 1, 16, 16) and made.images.dtype == torch.float32
    assert made.images.min() == -1 and made.images.max() == 1


def test_the_same_seed_draws_the_same_and_the_global_generator_is_left_alone(made):
    before = torch.get_rng_state()
    again, other = (scenes(N, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert torch.equal(again.images, made.images) and again[1:] == made[1:]
    assert other.captions != made.captions
    assert torch.equal(torch.get_rng_state(), before)


def test_the_words_and_the_length_are_those_of_the_captions(made):
    _, mask = Vocabulary(WORDS).encode(made.captions, LENGTH)
    assert mask.sum(dim=1).unique().tolist() == [7, 15] and mask.shape[1] == 15
    assert set(re.findall(r"\w+|,", " ".join(made.captions))) == set(WORDS)


def test_other_digits_make_other_canvases():
    images, labels = torch.rand(5, 1, 28, 28), torch.full((5,), 7)
    big, captions, _ = scenes(20, torch.Generator().manual_seed(0), source=(images, labels))
    assert big.shape == (20, 1, 56, 56)
    assert all("seven" in caption for caption in captions)
    assert (big > -1).flatten(1).sum(dim=1).unique().tolist() == [289, 578, 784, 1073, 1568]  # 17^2, 28^2 and sums


def test_one_object_is_described_by_hand():
    both = [SceneObject(3, 1, 0), SceneObject(7, 0, 3)]
    assert module.caption(both) == "a large three at the top left, a small seven at the bottom right"


def test_a_judge_is_asked_about_all_four_quadrants():
    digit, size = by_quadrant([(SceneObject(3, 1, 0), SceneObject(0, 0, 3)), (SceneObject(9, 0, 2),)])
    assert digit.tolist() == [[3, EMPTY, EMPTY, 0], [EMPTY, EMPTY, 9, EMPTY]]
    assert size.tolist() == [[1, -1, -1, 0], [-1, -1, 0, -1]]


def test_quadrants_are_cut_out_in_reading_order():
    x = torch.randn(2, 3, 4, 6)
    expected = [part for one in x for part in (one[:, :2, :3], one[:, :2, 3:], one[:, 2:, :3], one[:, 2:, 3:])]
    assert torch.equal(quadrants(x), torch.stack(expected))


@pytest.mark.parametrize(
    ("n", "shape", "labels", "message"),
    [
        (0, (3, 1, 8, 8), 3, "at least one scene, got 0"),
        (2, (3, 1, 8, 6), 3, r"\(m, 1, side, side\), got \(3, 1, 8, 6\)"),
        (2, (3, 2, 8, 8), 3, r"\(m, 1, side, side\), got \(3, 2, 8, 8\)"),
        (2, (3, 1, 8, 8), 4, "3 images but 4 labels"),
    ],
)
def test_what_makes_no_scene_is_refused(n, shape, labels, message):
    with pytest.raises(ValueError, match=message):
        scenes(n, source=(torch.zeros(shape), torch.zeros(labels).long()))


# --- hints -----------------------------------------------------------------------------------------------------------


def random_ink(n: int = 40, side: int = 12) -> torch.Tensor:
    """Blots of all forms, which reach the border too, in [-1, 1]."""
    noise = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(n, side, side)), (0, 1, 1))
    return torch.from_numpy(np.sign(noise)).float()[:, None]


def test_outlines_are_scipys_dilation_less_erosion():
    images = random_ink()
    for image, found in zip(images[:, 0].numpy() > 0, outlines(images)[:, 0].numpy(), strict=True):
        expected = ndimage.binary_dilation(image, EIGHT) & ~ndimage.binary_erosion(image, EIGHT)
        np.testing.assert_array_equal(found, expected)


def lines_by_hand(ink: np.ndarray) -> np.ndarray:
    """Zhang & Suen's thinning, one pixel at a time, with the paper's P2 .. P9."""
    ink, changed = np.pad(ink.astype(int), 1), True
    while changed:
        changed = False
        for rule in (1, 2):
            gone = []
            for i, j in zip(*np.nonzero(ink), strict=True):
                p2, p3, p4 = ink[i - 1, j], ink[i - 1, j + 1], ink[i, j + 1]
                p5, p6, p7 = ink[i + 1, j + 1], ink[i + 1, j], ink[i + 1, j - 1]
                p8, p9 = ink[i, j - 1], ink[i - 1, j - 1]
                ring = [p2, p3, p4, p5, p6, p7, p8, p9]
                starts = sum(a == 0 and b == 1 for a, b in zip(ring, [*ring[1:], p2], strict=True))
                products = (p2 * p4 * p6, p4 * p6 * p8) if rule == 1 else (p2 * p4 * p8, p2 * p6 * p8)
                if 2 <= sum(ring) <= 6 and starts == 1 and products == (0, 0):
                    gone.append((i, j))
            for place in gone:
                ink[place] = 0
            changed = changed or bool(gone)
    return ink[1:-1, 1:-1]


def test_skeletons_are_zhang_and_suens():
    images = torch.cat([random_ink(), torch.nn.functional.pad(digits("train")[0][:20], [2] * 4, value=-1)])
    for image, found in zip(images[:, 0].numpy() > 0, skeletons(images)[:, 0].numpy(), strict=True):
        np.testing.assert_array_equal(found, lines_by_hand(image))


def test_a_thick_bar_becomes_a_thin_one():
    image = torch.full((1, 1, 9, 15), -1.0)
    image[:, :, 3:6, 2:13] = 1
    found = skeletons(image)[0, 0]
    assert found.sum(dim=1).nonzero().flatten().tolist() == [4] and found[4, 4:11].all()


@pytest.mark.parametrize("hint", [outlines, skeletons])
def test_hints_are_binary_images_of_the_same_kind_and_not_the_picture(hint):
    images = digits("test")[0][:50].double()
    found = hint(images)
    assert found.shape == images.shape and found.dtype == torch.float64
    assert found.unique().tolist() == [0, 1]
    assert (hint(images / 2) == found).all()  # the grey levels within are gone


@pytest.mark.parametrize("hint", [outlines, skeletons])
def test_around_the_picture_lies_background(hint):
    images = random_ink()
    framed = hint(torch.nn.functional.pad(images, [3] * 4, value=-1.0))
    assert torch.equal(framed[:, :, 3:-3, 3:-3], hint(images))


@pytest.mark.parametrize("hint", [outlines, skeletons])
def test_hints_of_one_picture_do_not_depend_on_the_others_and_blank_stays_blank(hint):
    images = torch.cat([random_ink(), -torch.ones(1, 1, 12, 12)])
    assert torch.equal(hint(images), torch.cat([hint(image[None]) for image in images]))
    assert not hint(images)[-1].any()


@pytest.mark.parametrize("hint", [outlines, skeletons])
def test_the_threshold_says_what_is_ink(hint):
    images = digits("test")[0][:20]
    assert torch.equal(hint(images, -0.5), hint(images + 0.5))
    assert not torch.equal(hint(images, -0.5), hint(images))


def test_skeletons_lie_in_the_ink_are_thin_and_thin_no_further():
    images = digits("test")[0]
    found = skeletons(images)
    assert (found <= (images > 0)).all()
    assert torch.equal(skeletons(2 * found - 1), found)
    assert found.mean() < 0.7 * (images > 0).float().mean()


def test_skeletons_keep_the_pieces_and_the_holes_of_handwritten_digits():
    try:
        images = mnist("test", download=False)[0][:300]
    except RuntimeError:
        images = torch.nn.functional.interpolate(digits("test")[0][:300], scale_factor=4)
    for image, found in zip(images[:, 0].numpy() > 0, skeletons(images)[:, 0].numpy() > 0, strict=True):
        assert ndimage.label(found, EIGHT)[1] == ndimage.label(image, EIGHT)[1]
        assert ndimage.label(~np.pad(found, 1))[1] == ndimage.label(~np.pad(image, 1))[1]
