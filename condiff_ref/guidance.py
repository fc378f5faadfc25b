"""Guidance: denoisers in, denoiser out. Nothing here has state, and each function is exactly what its name says.

All of it acts on estimates of x0. Plain classifier-free guidance is the same in every kind, because its weights sum to
one; clipping, rescaling, norm caps and projection onto an estimate are not. `scale`: 0 unconditional, 1 conditional,
above 1 guided.
"""

import math

import torch

from .schedules import Schedule
from .shapes import Data, Denoiser, LogProb, PerExample, Time, pad


def cfg(cond: Denoiser, uncond: Denoiser, scale: float) -> Denoiser:
    """x_u + scale (x_c - x_u) (Ho & Salimans 2022, eq. 6, with w = scale - 1).

    A negative prompt, or a worse model for autoguidance (Karras et al. 2024), is another `uncond`.
    """

    def guided(xt: Data, t: Time) -> Data:
        x_u = uncond(xt, t)
        return x_u + scale * (cond(xt, t) - x_u)

    return guided


def classifier_guidance(denoiser: Denoiser, log_prob: LogProb, scale: float, schedule: Schedule) -> Denoiser:
    """x0 + scale sigma^2 / alpha grad log p(y | xt); in eps: eps - scale sigma grad (Dhariwal & Nichol 2021, eq. 14).

    `log_prob` must be of a classifier that knows noise. Infinite at alpha = 0.
    """

    def guided(xt: Data, t: Time) -> Data:
        alpha, sigma = schedule.at(t, xt)
        return denoiser(xt, t) + scale * sigma**2 / alpha * _gradient(log_prob, xt, t)

    return guided


def project(v: Data, onto: Data) -> Data:
    """The part of v parallel to `onto`, example by example; 0 where `onto` is 0."""
    length2 = _dot(onto, onto)
    return pad(torch.where(length2 > 0, _dot(v, onto) / length2, 0), v) * onto


def apg(cond: Denoiser, uncond: Denoiser, scale: float, parallel: float = 0.0, max_norm: float = math.inf) -> Denoiser:
    """x_c + (scale - 1) (d_perp + parallel d_par), d = x_c - x_u capped at max_norm and split along x_c
    (Sadat et al. 2024, adaptive projected guidance, without its momentum). parallel = 1 without a cap is cfg."""

    def guided(xt: Data, t: Time) -> Data:
        x_c = cond(xt, t)
        d = x_c - uncond(xt, t)
        length = pad(_dot(d, d).sqrt(), d)
        d = d * (max_norm / length).clamp(max=1)  # max_norm / 0 is inf: a zero update stays zero
        d_par = project(d, onto=x_c)
        return x_c + (scale - 1) * (d - d_par + parallel * d_par)

    return guided


def perp_neg(positive: Denoiser, negative: Denoiser, uncond: Denoiser, scale: float, negative_scale: float) -> Denoiser:
    """x_u + scale (d_p - negative_scale d_n_perp), where d = x - x_u and d_n_perp is the part of d_n perpendicular to
    d_p (Armandpour et al. 2023, Perp-Neg)."""

    def guided(xt: Data, t: Time) -> Data:
        x_u = uncond(xt, t)
        d_p, d_n = positive(xt, t) - x_u, negative(xt, t) - x_u
        return x_u + scale * (d_p - negative_scale * (d_n - project(d_n, onto=d_p)))

    return guided


def negative(positive: Denoiser, negative: Denoiser, uncond: Denoiser, scale: float) -> Denoiser:
    """x_u + scale (x_p - x_n): the three-pass composition (Liu et al. 2022). The two-pass form that pipelines deploy is
    `cfg(positive, negative, scale)`; they differ by x_u - x_n at every scale."""

    def guided(xt: Data, t: Time) -> Data:
        return uncond(xt, t) + scale * (positive(xt, t) - negative(xt, t))

    return guided


def interval(inside: Denoiser, outside: Denoiser, low: float, high: float) -> Denoiser:
    """`inside` where low < t <= high, `outside` elsewhere (Kynkaanniemi et al. 2024, here in t).

    Only the denoiser that is needed is evaluated, unless the batch mixes both sides.
    """

    def switched(xt: Data, t: Time) -> Data:
        chosen = (low < t) & (t <= high)
        if chosen.all():
            return inside(xt, t)
        if not chosen.any():
            return outside(xt, t)
        return torch.where(pad(chosen, xt), inside(xt, t), outside(xt, t))

    return switched


def rescale(guided: Denoiser, cond: Denoiser, phi: float) -> Denoiser:
    """phi std(x_c) / std(x_g) x_g + (1 - phi) x_g, the std taken within each example (Lin et al. 2023, eq. 15-16)."""

    def rescaled(xt: Data, t: Time) -> Data:
        x_g = guided(xt, t)
        ratio = cond(xt, t).flatten(1).std(dim=1) / x_g.flatten(1).std(dim=1)
        return (phi * pad(ratio, x_g) + (1 - phi)) * x_g

    return rescaled


def _dot(v: Data, w: Data) -> PerExample:
    """The inner product of each pair of examples."""
    return torch.linalg.vecdot(v.reshape(len(v), -1), w.reshape(len(w), -1))


def _gradient(log_prob: LogProb, xt: Data, t: Time) -> Data:
    """grad of log p(y | xt). The sum over the batch is differentiated, so each example gets its own gradient."""
    with torch.enable_grad():
        xt = xt.detach().requires_grad_()
        return torch.autograd.grad(log_prob(xt, t).sum(), xt)[0]
