"""Fresh inputs for the exercises, in float64: axes of different lengths, so that no broadcast works by accident."""

import torch
from torch import Generator, Tensor

PICTURES = (4, 3, 2, 5)  # (b, c, h, w)


def randn(generator: Generator, *shape: int) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def integer(generator: Generator, low: int, high: int) -> int:
    """From low to high, both included."""
    return int(torch.randint(low, high + 1, (), generator=generator))


def pictures(generator: Generator, n: int) -> list[Tensor]:
    """n batches of one shape, PICTURES."""
    return [randn(generator, *PICTURES) for _ in range(n)]


def times(generator: Generator, n: int = PICTURES[0], low: int = 2, high: int = 39) -> Tensor:
    """n different integer times, (n,)."""
    return low + torch.randperm(high - low + 1, generator=generator)[:n]
