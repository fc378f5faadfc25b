"""From noise to data. A step is a pure function (denoiser, xt, t, s) -> xs with s < t."""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Generator, Tensor

from .schedules import Schedule, draw_noise
from .shapes import Data, Denoiser, Step, Time, Times, pad


def posterior(schedule: Schedule, t: Time, s: Time, like: Data) -> tuple[Tensor, Tensor, Tensor]:
    """q(xs | xt, x0) = N(on_xt xt + on_x0 x0, std^2), for any Gaussian path (Kingma et al. 2021, appendix A).

    Returns (on_xt, on_x0, std), padded to multiply `like`.
    """
    alpha_t, sigma_t = schedule.at(t, like)
    alpha_s, sigma_s = schedule.at(s, like)
    ratio = alpha_t / alpha_s
    var_ts = sigma_t**2 - ratio**2 * sigma_s**2
    on_xt = ratio * sigma_s**2 / sigma_t**2
    on_x0 = alpha_s * var_ts / sigma_t**2
    return on_xt, on_x0, var_ts.clamp(min=0).sqrt() * sigma_s / sigma_t


def ddpm_step(schedule: Schedule, *, generator: Generator | None = None) -> Step:
    """Ancestral sampling: xs ~ q(xs | xt, x0_hat) (Ho et al. 2020, eq. 7, with the posterior variance)."""

    def step(denoiser: Denoiser, xt: Data, t: Time, s: Time) -> Data:
        on_xt, on_x0, std = posterior(schedule, t, s, xt)
        return on_xt * xt + on_x0 * denoiser(xt, t) + std * draw_noise(xt, generator)

    return step


def ddim_step(schedule: Schedule, *, eta: float = 0.0, generator: Generator | None = None) -> Step:
    """xs = alpha_s x0_hat + sqrt(sigma_s^2 - std^2) eps_hat + std z, std = eta times the posterior's (Song, Meng &
    Ermon 2021, eq. 12 and 16). eta = 0 is deterministic, eta = 1 is DDPM."""

    def step(denoiser: Denoiser, xt: Data, t: Time, s: Time) -> Data:
        alpha_t, sigma_t = schedule.at(t, xt)
        alpha_s, sigma_s = schedule.at(s, xt)
        x0 = denoiser(xt, t)
        eps = (xt - alpha_t * x0) / sigma_t
        if eta == 0:
            return alpha_s * x0 + sigma_s * eps
        std = eta * posterior(schedule, t, s, xt)[2]
        return alpha_s * x0 + (sigma_s**2 - std**2).clamp(min=0).sqrt() * eps + std * draw_noise(xt, generator)

    return step


def velocity(denoiser: Denoiser, xt: Data, t: Time, schedule: Schedule) -> Data:
    """d xt/dt = d_alpha x0_hat + d_sigma eps_hat, the probability-flow ODE (Song et al. 2021, eq. 13).

    Not finite at t = 0, where eps_hat = (xt - alpha x0_hat) / sigma divides by zero.
    """
    alpha, sigma = schedule.at(t, xt)
    d_alpha, d_sigma = schedule.rates(t, xt)
    x0 = denoiser(xt, t)
    return d_alpha * x0 + d_sigma * (xt - alpha * x0) / sigma


def euler_step(schedule: Schedule) -> Step:
    """xs = xt + (s - t) velocity: order 1, one evaluation."""

    def step(denoiser: Denoiser, xt: Data, t: Time, s: Time) -> Data:
        return xt + pad(s - t, xt) * velocity(denoiser, xt, t, schedule)

    return step


def heun_step(schedule: Schedule) -> Step:
    """Average the slopes at both ends: order 2, two evaluations (Karras et al. 2022, algorithm 1).

    A step that ends at s = 0 is an Euler step, because the second slope is not defined there.
    """

    def step(denoiser: Denoiser, xt: Data, t: Time, s: Time) -> Data:
        gap = pad(s - t, xt)
        slope = velocity(denoiser, xt, t, schedule)
        xs = xt + gap * slope
        if (s == 0).all():
            return xs
        second = velocity(denoiser, xs, s, schedule)
        return torch.where(pad(s == 0, xt), xs, xt + gap * (slope + second) / 2)

    return step


def trajectory(step: Step, denoiser: Denoiser, x: Data, times: Times) -> Iterator[Data]:
    """Yield xs after each step along the decreasing `times`; the caller may stop at any point.

    Raises ValueError, at the first step, unless the times decrease within [0, 1].
    """
    if len(times) < 2 or not (times.diff() < 0).all() or times[0] > 1 or times[-1] < 0:
        raise ValueError("times must decrease, from noise (near 1) to data (0), and hold at least two entries")
    for t, s in pairwise(times.to(x)):
        with torch.no_grad():  # here: as a decorator it would not reach into a wrapped generator
            x = step(denoiser, x, t.expand(len(x)), s.expand(len(x)))
        yield x


def sample(step: Step, denoiser: Denoiser, x: Data, times: Times) -> Data:
    """The last point of the trajectory that starts at the noise `x`."""
    for xs in trajectory(step, denoiser, x, times):  # noqa: B007
        pass
    return xs
