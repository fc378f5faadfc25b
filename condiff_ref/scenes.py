"""Pictures with more to say than a label: captioned canvases of one or two digits, and hints taken from a picture."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from . import data
from .shapes import Images

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIZES = ("small", "large")
QUADRANTS = ("top left", "top right", "bottom left", "bottom right")
WORDS = ("a", "at", "the", ",", *SIZES, "top", "bottom", "left", "right", *DIGITS)  # all that a caption may say
LENGTH = 15  # tokens in the longest caption
Digits = tuple[Images, Int[Tensor, " m"]]
EMPTY = 10  # stands for the digit of a quadrant without one


class SceneObject(NamedTuple):
    """One digit on a canvas; `size` and `quadrant` are indices into SIZES and QUADRANTS."""

    digit: int
    size: int
    quadrant: int


class Scenes(NamedTuple):
    """Images (n, 1, h, w) in [-1, 1], a caption each, and what it speaks of, in the caption's order."""

    images: Images
    captions: list[str]
    objects: list[tuple[SceneObject, ...]]


def scenes(n: int, generator: Generator | None = None, *, source: Digits | None = None) -> Scenes:
    """Canvases of one or two digits in different quadrants; every choice is uniform, and all are independent.

    `source`: images (m, 1, side, side) and labels, by default the 8x8 training digits, so that canvases are 16x16. A
    large digit fills its quadrant, a small one is 5/8 of that and lies anywhere in it. Raises ValueError for n < 1 and
    for a source that is not square or whose labels do not match.
    """
    images, labels = data.digits("train") if source is None else source
    _require(n, images, labels)
    side = images.shape[-1]
    drawn = [F.interpolate(images, size=side * 5 // 8, mode="area"), images]  # small, large
    device = images.device if generator is None else generator.device

    def choose(options: int, *shape: int) -> list:
        return torch.randint(options, shape, generator=generator, device=device).tolist()

    counts, rows, sizes = choose(2, n), choose(len(images), n, 2), choose(2, n, 2)
    places = torch.rand(n, 4, generator=generator, device=device).argsort(dim=1).tolist()
    slack = choose(side - drawn[0].shape[-1] + 1, n, 2, 2)  # how far down and right a small digit lies
    canvases = torch.full((n, 1, 2 * side, 2 * side), -1.0).to(images)
    objects = []
    for i in range(n):
        found = []
        for j in range(1 + counts[i]):
            size, quadrant = sizes[i][j], places[i][j]
            picture = drawn[size][rows[i][j]]
            down, right = (0, 0) if size else slack[i][j]
            top, left = side * (quadrant // 2) + down, side * (quadrant % 2) + right
            canvases[i, :, top : top + picture.shape[1], left : left + picture.shape[2]] = picture
            found.append(SceneObject(int(labels[rows[i][j]]), size, quadrant))
        objects.append(tuple(found))
    return Scenes(canvases, [caption(some) for some in objects], objects)


def caption(objects: Sequence[SceneObject]) -> str:
    """Such as "a large three at the top left, a small seven at the bottom right"."""
    return ", ".join(f"a {SIZES[o.size]} {DIGITS[o.digit]} at the {QUADRANTS[o.quadrant]}" for o in objects)


def by_quadrant(objects: Sequence[Sequence[SceneObject]]) -> tuple[Int[Tensor, "n 4"], Int[Tensor, "n 4"]]:
    """What a judge is asked for: the digit in each quadrant, EMPTY where there is none, and its size, -1 there."""
    digit, size = torch.full((len(objects), 4), EMPTY), torch.full((len(objects), 4), -1)
    for i, some in enumerate(objects):
        for o in some:
            digit[i, o.quadrant], size[i, o.quadrant] = o.digit, o.size
    return digit, size


def quadrants(images: Images) -> Float[Tensor, "4*b c h//2 w//2"]:
    """(n, c, 2h, 2w) -> (4n, c, h, w): the four quadrants of each canvas, in the order of QUADRANTS."""
    n, c, height, width = images.shape
    parts = images.reshape(n, c, 2, height // 2, 2, width // 2)
    return parts.permute(0, 2, 4, 1, 3, 5).reshape(4 * n, c, height // 2, width // 2)


def outlines(images: Images, threshold: float = 0.0) -> Images:
    """(n, 1, h, w) in [-1, 1] -> edges (n, 1, h, w) in {0, 1}: the ink above `threshold` dilated, less the ink eroded,
    by 3x3 (the morphological gradient of Rivest, Soille & Beucher 1993). Around the picture lies background.

    Edges are two pixels wide: on 8x8 digits they cover 70 % of the picture, and `skeletons` say more.
    """
    ink = _ink(images, threshold)
    dilated, eroded = F.max_pool2d(ink, 3, stride=1), -F.max_pool2d(-ink, 3, stride=1)
    return dilated - eroded


def skeletons(images: Images, threshold: float = 0.0) -> Images:
    """(n, 1, h, w) in [-1, 1] -> lines (n, 1, h, w) in {0, 1}, about a pixel wide: the ink above `threshold`, thinned
    (Zhang & Suen 1984). Around the picture lies background. A blot of 2x2 pixels vanishes, as the authors' rule has it.
    """
    powers = torch.tensor([[128, 1, 2], [64, 0, 4], [32, 16, 8]]).to(images)[None, None]  # clockwise from the north
    ink, before = _ink(images, threshold), None
    while before is None or not torch.equal(ink, before):
        before = ink
        for erasable in _erasable().to(images):
            around = F.conv2d(ink, powers).round().long()  # the eight neighbours as bits of a number
            ink = F.pad(ink[:, :, 1:-1, 1:-1] * (1 - erasable[around]), [1] * 4)
    return ink[:, :, 1:-1, 1:-1]


def _require(n: int, images: Tensor, labels: Tensor) -> None:
    if n < 1:
        raise ValueError(f"need at least one scene, got {n}")
    if images.shape[2] != images.shape[3] or images.shape[1] != 1:
        raise ValueError(f"digits must be (m, 1, side, side), got {tuple(images.shape)}")
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images but {len(labels)} labels: do they belong together?")


def _ink(images: Images, threshold: float) -> Float[Tensor, "b c h+2 w+2"]:
    """1 where a picture is above the threshold, else 0, with a frame of background, one pixel wide."""
    return F.pad((images > threshold).to(images), [1] * 4)


def _erasable() -> Bool[Tensor, "2 256"]:
    """Zhang & Suen's two rules, for each neighbourhood, whose bits are the neighbours clockwise from the north: a pixel
    goes if 2 to 6 of its neighbours are ink, in a single run, and it lies on a south-east, then a north-west border."""
    bits = (torch.arange(256)[:, None] >> torch.arange(8) & 1).bool()
    count, runs = bits.sum(dim=1), (~bits & bits.roll(-1, dims=1)).sum(dim=1)
    n, e, s, w = bits[:, ::2].T
    thinnable = (count >= 2) & (count <= 6) & (runs == 1)
    return torch.stack([thinnable & ~(e & s & (n | w)), thinnable & ~(n & w & (e | s))])
