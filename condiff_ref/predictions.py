"""What a network may predict, and how to turn one prediction into another.

Every kind is a line in (x0, eps):  out = a x0 + b eps.  Together with  xt = alpha x0 + sigma eps  that makes two
equations in two unknowns, and their determinant  alpha b - sigma a  says where a kind loses information.
"""

import torch
from torch import Tensor

from .schedules import Schedule
from .shapes import Data, PerExample, Time

KINDS = ("eps", "x0", "v", "flow", "score")


def basis(kind: str, t: Time, like: Data, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """The (a, b) of out = a x0 + b eps, padded to multiply `like`.

    eps, x0: themselves (Ho et al. 2020). v = alpha eps - sigma x0 (Salimans & Ho 2022). flow = d xt/dt, the velocity
    (Lipman et al. 2023). score = -eps / sigma (Song et al. 2021). Raises ValueError for any other kind.
    """
    alpha, sigma = schedule.at(t, like)
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    if kind == "eps":
        return zero, one
    if kind == "x0":
        return one, zero
    if kind == "v":
        return -sigma, alpha
    if kind == "flow":
        return schedule.rates(t, like)
    if kind == "score":
        return zero, -1 / sigma
    raise ValueError(f"unknown kind {kind!r}: choose one of {', '.join(KINDS)}")


def target(kind: str, x0: Data, eps: Data, t: Time, schedule: Schedule) -> Data:
    """What a network of this kind is trained to output: a x0 + b eps."""
    a, b = basis(kind, t, x0, schedule)
    return a * x0 + b * eps


def solve(kind: str, out: Data, xt: Data, t: Time, schedule: Schedule) -> tuple[Data, Data]:
    """The (x0, eps) behind a network's output, by Cramer's rule.

    Not finite where the kind says nothing about x0 or eps: eps at alpha = 0 (t = 1), x0 at sigma = 0 (t = 0), score at
    both.
    """
    alpha, sigma = schedule.at(t, xt)
    a, b = basis(kind, t, xt, schedule)
    det = alpha * b - sigma * a
    return (b * xt - sigma * out) / det, (alpha * out - a * xt) / det


def convert(kind_in: str, kind_out: str, out: Data, xt: Data, t: Time, schedule: Schedule) -> Data:
    """The same prediction in another kind."""
    return target(kind_out, *solve(kind_in, out, xt, t, schedule), t, schedule)


def implied_weight(kind: str, t: Time, schedule: Schedule) -> PerExample:
    """w(t) with |out - target|^2 = w |x0_hat - x0|^2, which is (det / sigma)^2. Not finite at sigma = 0.

    For eps this is the signal-to-noise ratio, for x0 it is 1, for v on a variance-preserving path SNR + 1.
    """
    alpha, sigma = schedule.at(t, like=t)
    a, b = basis(kind, t, t, schedule)
    return ((alpha * b - sigma * a) / sigma) ** 2
