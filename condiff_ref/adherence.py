"""Whether a scene shows what its caption says: a reader of quadrants, and what it finds, in numbers."""

from collections.abc import Sequence
from functools import cache

import torch
from jaxtyping import Int
from torch import Generator, Tensor

from . import data
from .intervals import Interval, share
from .scenes import EMPTY, SceneObject, by_quadrant, scenes
from .shapes import Images

Objects = Sequence[Sequence[SceneObject]]
SIDE = 8  # pixels of a quadrant
LEARNT = 10_000  # scenes of the digits' test split, which no generator here has seen


def read(images: Images) -> tuple[Int[Tensor, "n 4"], Int[Tensor, "n 4"]]:
    """The digit in each quadrant of canvases (n, 1, 16, 16), EMPTY where there is none, and its size, -1 there.

    Raises ValueError for pictures of another size.
    """
    if images.shape[1:] != (1, 2 * SIDE, 2 * SIDE):
        raise ValueError(f"scenes are (n, 1, {2 * SIDE}, {2 * SIDE}), got {tuple(images.shape)}")
    kind = torch.from_numpy(_reader().predict(_quadrants(images).numpy())).view(-1, 4)
    digit = kind // 2
    return digit, torch.where(digit == EMPTY, -1, kind % 2)


def adherence(images: Images, objects: Objects) -> dict[str, Interval]:
    """Shares, with Wilson's intervals, of what the captions of these objects ask for and the pictures show.

    "place": the digit in the quadrant of each object. "empty": nothing where nothing was asked for. "size": among
    digits in place. "whole 1", "whole 2": scenes of one or two objects with all four quadrants right. "binding error":
    scenes of two objects whose digits stand in each other's place. The reader errs too: `reader_accuracy`.
    Raises ValueError unless there is one list of objects for each picture.
    """
    if len(images) != len(objects):
        raise ValueError(f"{len(images)} pictures but {len(objects)} lists of objects")
    (digit, size), (asked, asked_size) = read(images), by_quadrant(objects)
    exchanged, _ = by_quadrant(swap(objects))
    number = torch.tensor([len(some) for some in objects])
    right, occupied = digit == asked, asked != EMPTY
    whole, two = right.all(dim=1), (number == 2) & (exchanged != asked).any(dim=1)
    shares = {
        "place": right[occupied],
        "empty": right[~occupied],
        "size": (size == asked_size)[occupied & right],
        "whole 1": whole[number == 1],
        "whole 2": whole[number == 2],
        "binding error": (digit == exchanged).all(dim=1)[two],
    }
    return {name: share(int(hits.sum()), len(hits)) for name, hits in shares.items() if len(hits)}


def confusion(images: Images, objects: Objects) -> Int[Tensor, "11 11"]:
    """How often a quadrant that should show digit i (EMPTY: nothing) shows j."""
    digit, asked = read(images)[0], by_quadrant(objects)[0]
    return torch.bincount((11 * asked + digit).flatten(), minlength=121).view(11, 11)


def swap(objects: Objects) -> list[tuple[SceneObject, ...]]:
    """The same scenes with the digits of two objects exchanged; a single object stays."""
    swapped = []
    for some in objects:
        digits = [o.digit for o in some][::-1]
        swapped.append(tuple(o._replace(digit=digit) for o, digit in zip(some, digits, strict=True)))
    return swapped


@cache
def reader_accuracy() -> dict[str, Interval]:
    """The ceiling: `adherence` of real scenes, of the training split, which the reader has not seen."""
    real = scenes(1000, Generator().manual_seed(1))
    return adherence(real.images, real.objects)


@cache
def _reader() -> object:
    from sklearn.svm import SVC  # here, because it takes a second that few callers need

    known = scenes(LEARNT, Generator().manual_seed(0), source=data.digits("test"))
    digit, size = (quadrants.flatten() for quadrants in by_quadrant(known.objects))
    taken = digit != EMPTY
    taken[(~taken).nonzero()[:1000]] = True  # more than half of all quadrants are empty, and all empty ones alike
    kind = 2 * digit + size.clamp(min=0)
    return SVC(C=10, gamma=0.1).fit(_quadrants(known.images)[taken].numpy(), kind[taken].numpy())


def _quadrants(images: Images) -> Tensor:
    """(n, 1, 16, 16) -> (4 n, 64): each picture's quadrants row by row."""
    tiles = images.float().cpu().unfold(2, SIDE, SIDE).unfold(3, SIDE, SIDE)
    return tiles.reshape(-1, SIDE * SIDE)
