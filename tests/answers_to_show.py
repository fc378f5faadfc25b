"""Reference answers of made-up exercises, for test_build.py: everything that a stub has to keep or to leave out."""

from functools import wraps

import torch
from torch import Tensor, nn


def registered(function):
    @wraps(function)
    def inner(*args, **kwargs):
        return function(*args, **kwargs)

    return inner


@torch.no_grad()
def blend(x0: Tensor, eps: Tensor, *, weights: dict[str, float] | None = None, pick=lambda x: x) -> Tensor:  # a secret
    """Mix data and noise.

    weights: of both, `{"x0": 1.0}`.
    """
    # the square root keeps the variance
    root = weights["x0"] ** 0.5
    return root * x0 + (1 - root**2) ** 0.5 * eps


def halve(
    x: Tensor,  # (b, *d)
    times: int = 1,
) -> Tensor:
    return x / 2**times  # powers of two are exact


class Scale(nn.Module):
    """Multiply by a learned number."""

    shared_secret = 3.0

    def __init__(self, start: float = 1.0):
        super().__init__()
        self.factor = nn.Parameter(Tensor([start]))

    @property
    def size(self) -> float:
        """Its absolute value."""
        return float(self.factor.abs())

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x
