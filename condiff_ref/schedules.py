"""Paths from data to noise: xt = alpha(t) x0 + sigma(t) eps, with t = 0 the data and t = 1 the noise."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from .shapes import Betas, Data, PerExample, Time, Times, pad

Curve = Callable[[Tensor], Tensor]  # (b,) -> (b,)


@dataclass(frozen=True)
class Schedule:
    """Signal and noise scale at t with their derivatives, each a closed form."""

    alpha: Curve
    sigma: Curve
    d_alpha: Curve
    d_sigma: Curve

    def at(self, t: Time, like: Data) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at t, padded to multiply `like`."""
        return pad(self.alpha(t), like).to(like), pad(self.sigma(t), like).to(like)

    def rates(self, t: Time, like: Data) -> tuple[Tensor, Tensor]:
        """(d alpha/dt, d sigma/dt) at t, padded to multiply `like`."""
        return pad(self.d_alpha(t), like).to(like), pad(self.d_sigma(t), like).to(like)

    def log_snr(self, t: Time) -> PerExample:
        """log(alpha^2 / sigma^2): decreasing, +inf at t = 0."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())


def cosine() -> Schedule:
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2): variance preserving (Nichol & Dhariwal 2021, eq. 17, offset 0)."""
    quarter = math.pi / 2
    return Schedule(
        alpha=lambda t: torch.sin(quarter * (1 - t)),  # = cos(quarter t), which rounds to below 0 at t = 1
        sigma=lambda t: torch.sin(quarter * t),
        d_alpha=lambda t: -quarter * torch.sin(quarter * t),
        d_sigma=lambda t: quarter * torch.sin(quarter * (1 - t)),
    )


def linear_beta(beta_min: float = 0.1, beta_max: float = 20.0) -> Schedule:
    """The VP SDE with beta(t) = beta_min + t (beta_max - beta_min) (Song et al. 2021, eq. 33).

    d sigma/dt is infinite at t = 0: sigma grows like sqrt(beta_min t) there.
    """

    def log_alpha(t: Tensor) -> Tensor:
        return -0.25 * t**2 * (beta_max - beta_min) - 0.5 * t * beta_min

    def alpha(t: Tensor) -> Tensor:
        return log_alpha(t).exp()

    def sigma(t: Tensor) -> Tensor:
        return (-torch.expm1(2 * log_alpha(t))).sqrt()  # expm1: 1 - alpha^2 loses all digits near t = 0

    def d_alpha(t: Tensor) -> Tensor:
        return -0.5 * (beta_min + t * (beta_max - beta_min)) * alpha(t)

    return Schedule(alpha, sigma, d_alpha, d_sigma=lambda t: -alpha(t) * d_alpha(t) / sigma(t))


def flow() -> Schedule:
    """The straight path alpha = 1 - t, sigma = t (Lipman et al. 2023, optimal-transport path
    with sigma_min = 0, time reversed)."""
    return Schedule(
        alpha=lambda t: 1 - t,
        sigma=lambda t: t,
        d_alpha=lambda t: -torch.ones_like(t),
        d_sigma=lambda t: torch.ones_like(t),
    )


def ddpm_alpha_bar(betas: Betas) -> Betas:
    """alpha_bar_t = prod_{s <= t} (1 - beta_s), t = 1 .. T (Ho et al. 2020, section 2), multiplied in float64.

    Entry i holds alpha_bar_{i+1}: the paper counts from 1. Raises ValueError unless every beta lies in (0, 1).
    """
    if not ((betas > 0) & (betas < 1)).all():
        raise ValueError("every beta must lie strictly between 0 and 1")
    return (1 - betas.double()).cumprod(0).to(betas)


def discrete(alpha_bar: Tensor) -> Schedule:
    """A table (T + 1,) with alpha_bar[0] = 1 as a Schedule whose times are its indices 0 .. T, as DDPM counts.

    alpha = sqrt(alpha_bar[t]), sigma = sqrt(1 - alpha_bar[t]) (Ho et al. 2020, eq. 4). Raises ValueError for its rates,
    which a table does not have.
    """

    def at(t: Tensor) -> Tensor:
        return alpha_bar.to(t.device)[t.round().long()]

    def no_rate(t: Tensor) -> Tensor:
        raise ValueError("a table of alpha_bar has no time derivative: use cosine(), linear_beta() or flow()")

    return Schedule(lambda t: at(t).sqrt(), lambda t: (1 - at(t)).sqrt(), no_rate, no_rate)


def add_noise(x0: Data, eps: Data, t: Time, schedule: Schedule) -> Data:
    """xt = alpha x0 + sigma eps."""
    alpha, sigma = schedule.at(t, like=x0)
    return alpha * x0 + sigma * eps


def draw_noise(like: Data, generator: Generator | None = None) -> Data:
    """Standard normal noise shaped as `like`, drawn where the generator lives: a CPU generator gives every device
    the same numbers."""
    device = like.device if generator is None else generator.device
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=device).to(like.device)


def time_grid(steps: int, start: float = 0.999, end: float = 0.0) -> Times:
    """steps + 1 equally spaced times from `start` down to `end`.

    It starts just below 1 because eps and score outputs divide by alpha, which is 0 there on most schedules.
    Raises ValueError unless steps >= 1 and 0 <= end < start <= 1.
    """
    if steps < 1 or not 0 <= end < start <= 1:
        raise ValueError(f"need steps >= 1 and 0 <= end < start <= 1, got {steps=}, {start=}, {end=}")
    return torch.linspace(start, end, steps + 1)
