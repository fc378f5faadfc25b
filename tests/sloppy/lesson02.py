"""Wrong answers to lesson 02 that are not on file, as they come from somebody in a hurry: all must be refused."""

import copy
import math
from itertools import pairwise

import torch
import torch.nn.functional as F

from condiff_ref.shapes import pad

# --- 02.1 time_embedding ----------------------------------------------------------------------------------------------


def short_period(t, d):
    if d % 2:
        raise ValueError("even, please")
    angles = 1000 * t[:, None] * 1000 ** (-torch.arange(d // 2, dtype=t.dtype) / (d // 2))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def natural_exponential(t, d):
    if d % 2:
        raise ValueError("even, please")
    angles = 1000 * t[:, None] * torch.exp(-torch.arange(d // 2, dtype=t.dtype) / (d // 2))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def assertion(t, d):
    assert d % 2 == 0
    angles = 1000 * t[:, None] * 10_000 ** (-torch.arange(d // 2, dtype=t.dtype) / (d // 2))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sines_twice(t, d):
    if d % 2:
        raise ValueError("even, please")
    angles = 1000 * t[:, None] * 10_000 ** (-torch.arange(d // 2, dtype=t.dtype) / (d // 2))
    return torch.cat([angles.sin(), angles.sin()], dim=1)


# --- 02.2 film --------------------------------------------------------------------------------------------------------


def squashed(h, e):
    scale, shift = e[:, :, None, None].chunk(2, dim=1)
    return h * (1 + scale.tanh()) + shift


def channel_mean(h, e):
    scale, shift = e.chunk(2, dim=1)
    return h * (1 + scale.mean(1).view(-1, 1, 1, 1)) + shift[:, :, None, None]


def plus_one_twice(h, e):
    scale, shift = e[:, :, None, None].chunk(2, dim=1)
    return h * (1 + scale) + 1 + shift


# --- 02.3 drop_labels -------------------------------------------------------------------------------------------------


def coin_per_class(y, p, null, gen):
    return torch.where((torch.rand(10, generator=gen) < p)[y], null, y)


def normal_coins(y, p, null, gen):
    return torch.where(torch.randn(y.shape, generator=gen) < p, null, y)


def minus_one(y, p, null, gen):
    return torch.where(torch.rand(y.shape, generator=gen) < p, -1, y)


def reseeded(y, p, null, gen):
    gen.manual_seed(0)
    return torch.where(torch.rand(y.shape, generator=gen) < p, null, y)


# --- 02.4 train_step --------------------------------------------------------------------------------------------------


def _noised(x0, t, eps, abar):
    abar = abar.to(x0.dtype)
    return pad(abar[t].sqrt(), x0) * x0 + pad((1 - abar[t]).sqrt(), x0) * eps


def _draw(x0, y, p, null, abar, gen):
    y = torch.where(torch.rand(len(y), generator=gen) < p, null, y)
    t = torch.randint(1, len(abar), (len(x0),), generator=gen)
    return torch.randn(x0.shape, generator=gen).to(x0), t, y


def _learn(opt, loss):
    opt.zero_grad()
    loss.backward()
    opt.step()
    return loss.item()


def fresh_target(model, opt, x0, y, p, abar, gen):
    eps, t, y = _draw(x0, y, p, model.null, abar, gen)
    out = model(_noised(x0, t, eps, abar), t, y)
    return _learn(opt, F.mse_loss(out, torch.randn(x0.shape, generator=gen).to(x0)))


def two_steps(model, opt, x0, y, p, abar, gen):
    eps, t, y = _draw(x0, y, p, model.null, abar, gen)
    loss = F.mse_loss(model(_noised(x0, t, eps, abar), t, y), eps)
    opt.zero_grad()
    loss.backward()
    opt.step()
    opt.step()
    return loss.item()


def scalar_t(model, opt, x0, y, p, abar, gen):
    eps, _, y = _draw(x0, y, p, model.null, abar, gen)
    t = torch.randint(1, len(abar), (), generator=gen)
    abar = abar.to(x0.dtype)
    xt = abar[t].sqrt() * x0 + (1 - abar[t]).sqrt() * eps
    return _learn(opt, F.mse_loss(model(xt, t, y), eps))


def no_cast(model, opt, x0, y, p, abar, gen):
    eps, t, y = _draw(x0, y, p, model.null, abar, gen)
    xt = pad(abar[t].sqrt(), x0) * x0 + pad((1 - abar[t]).sqrt(), x0) * eps
    return _learn(opt, F.mse_loss(model(xt, t, y), eps))


def detached(model, opt, x0, y, p, abar, gen):
    eps, t, y = _draw(x0, y, p, model.null, abar, gen)
    loss = F.mse_loss(model(_noised(x0, t, eps, abar), t, y).detach(), eps)
    return _learn(opt, loss)


def null_is_zero(model, opt, x0, y, p, abar, gen):
    eps, t, y = _draw(x0, y, p, 0, abar, gen)
    return _learn(opt, F.mse_loss(model(_noised(x0, t, eps, abar), t, y), eps))


# --- 02.5 EMA ---------------------------------------------------------------------------------------------------------


class Shallow:
    def __init__(self, model, decay):
        self.model, self.decay = copy.copy(model), decay

    @torch.no_grad()
    def update(self, model):
        for mean, value in zip(self.model.parameters(), model.parameters(), strict=True):
            mean.copy_(self.decay * mean + (1 - self.decay) * value)


class Rebound:
    """Assigns to the loop's name, which changes nothing."""

    def __init__(self, model, decay):
        self.model, self.decay = copy.deepcopy(model).eval().requires_grad_(False), decay

    @torch.no_grad()
    def update(self, model):
        for mean, value in zip(self.model.parameters(), model.parameters(), strict=True):
            mean = self.decay * mean + (1 - self.decay) * value
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)


class Plain:
    """The update forgets buffers and eval mode both."""

    def __init__(self, model, decay):
        self.model, self.decay = copy.deepcopy(model), decay

    @torch.no_grad()
    def update(self, model):
        for mean, value in zip(self.model.parameters(), model.parameters(), strict=True):
            mean.mul_(self.decay).add_(value, alpha=1 - self.decay)


class OtherName:
    def __init__(self, model, decay):
        self.shadow, self.decay = copy.deepcopy(model).eval().requires_grad_(False), decay

    def update(self, model):
        for mean, value in zip(self.shadow.parameters(), model.parameters(), strict=True):
            mean.data.lerp_(value.data, 1 - self.decay)


# --- 02.6 sample ------------------------------------------------------------------------------------------------------


def _ddim(x, eps, t, s, abar):
    x0 = (x - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()
    return abar[s].sqrt() * x0 + (1 - abar[s]).sqrt() * eps


def every_t(model, y, steps, shape, abar, gen):
    x, was = torch.randn(len(y), *shape, generator=gen), model.training
    model.eval()
    with torch.no_grad():
        for t in range(len(abar) - 1, 0, -1):
            x = _ddim(x, model(x, torch.full_like(y, t), y), t, t - 1, abar)
    model.train(was)
    return x


def truncated(model, y, steps, shape, abar, gen):
    x, was = torch.randn(len(y), *shape, generator=gen), model.training
    model.eval()
    times = torch.linspace(len(abar) - 1, 0, steps + 1).long()
    with torch.no_grad():
        for t, s in pairwise(times):
            x = _ddim(x, model(x, torch.full_like(y, int(t)), y), t, s, abar)
    model.train(was)
    return x


def scalar_time(model, y, steps, shape, abar, gen):
    x, was = torch.randn(len(y), *shape, generator=gen), model.training
    model.eval()
    times = torch.linspace(len(abar) - 1, 0, steps + 1).round().long()
    with torch.no_grad():
        for t, s in pairwise(times):
            x = _ddim(x, model(x, t, y), t, s, abar)
    model.train(was)
    return x


def promoted(model, y, steps, shape, abar, gen):
    x, was = torch.randn(len(y), *shape, generator=gen), model.training
    model.eval()
    times = torch.linspace(len(abar) - 1, 0, steps + 1).round().long()
    with torch.no_grad():
        for t, s in pairwise(times):
            t, s = t.repeat(len(y)), s.repeat(len(y))
            eps = model(x, t, y)
            x0 = (x - pad((1 - abar[t]).sqrt(), x) * eps) / pad(abar[t].sqrt(), x)
            x = pad(abar[s].sqrt(), x) * x0 + pad((1 - abar[s]).sqrt(), x) * eps
    model.train(was)
    return x


def clipped(model, y, steps, shape, abar, gen):
    x, was = torch.randn(len(y), *shape, generator=gen), model.training
    model.eval()
    times = torch.linspace(len(abar) - 1, 0, steps + 1).round().long()
    with torch.no_grad():
        for t, s in pairwise(times):
            eps = model(x, torch.full_like(y, int(t)), y)
            x0 = ((x - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()).clamp(-1, 1)
            x = abar[s].sqrt() * x0 + (1 - abar[s]).sqrt() * eps
    model.train(was)
    return x


def no_root(model, y, steps, shape, abar, gen):
    x, was = torch.randn(len(y), *shape, generator=gen), model.training
    model.eval()
    times = torch.linspace(len(abar) - 1, 0, steps + 1).round().long()
    with torch.no_grad():
        for t, s in pairwise(times):
            eps = model(x, torch.full_like(y, int(t)), y)
            x0 = (x - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()
            x = abar[s].sqrt() * x0 + (1 - abar[s]) * eps
    model.train(was)
    return x


# --- 02.7 class_accuracy ----------------------------------------------------------------------------------------------


def _ends(acc, n, z):
    centre, half = acc + z**2 / (2 * n), z * math.sqrt(acc * (1 - acc) / n + z**2 / (4 * n**2))
    return (centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)


@torch.no_grad()
def _right(judge, images, y):
    was = judge.training
    judge.eval()
    hits = (judge(images).argmax(1) == y).double()
    judge.train(was)
    return hits


def rounded_z(judge, images, y):
    hits = _right(judge, images, y)
    return hits.mean().item(), *_ends(hits.mean().item(), len(y), 2.0)


def normal_99(judge, images, y):
    hits = _right(judge, images, y)
    return hits.mean().item(), *_ends(hits.mean().item(), len(y), 2.575829)


def first_of_the_pair(judge, images, y):
    hits = _right(judge, images, y)
    lo, hi = _ends(hits.mean().item(), len(y), 1.959964)
    return hits.mean().item(), hi, lo


def agresti(judge, images, y):
    hits, n = _right(judge, images, y), len(y) + 4
    p = (hits.sum().item() + 2) / n
    half = 1.959964 * math.sqrt(p * (1 - p) / n)
    return hits.mean().item(), p - half, p + half


def mean_of_classes(judge, images, y):
    hits = _right(judge, images, y)
    acc = torch.stack([hits[y == k].mean() for k in y.unique()]).mean().item()
    return acc, *_ends(acc, len(y), 1.959964)


# --- 02.8 conditioning_bits -------------------------------------------------------------------------------------------


def base_ten(eps_c, eps_u, logsnr):
    gap, order = ((eps_c - eps_u) ** 2).flatten(2).sum(2).mean(1), logsnr.argsort()
    return (torch.trapezoid(gap[order], logsnr[order]) / 2).item() / math.log(10)


def mean_times_range(eps_c, eps_u, logsnr):
    gap = ((eps_c - eps_u) ** 2).flatten(2).sum(2).mean()
    return (gap * (logsnr.max() - logsnr.min()) / 2).item() / math.log(2)


def difference_of_squares(eps_c, eps_u, logsnr):
    gap, order = (eps_u**2 - eps_c**2).flatten(2).sum(2).mean(1), logsnr.argsort()
    return (torch.trapezoid(gap[order], logsnr[order]) / 2).item() / math.log(2)


def first_axis_only(eps_c, eps_u, logsnr):
    gap, order = ((eps_c - eps_u) ** 2).sum(2).flatten(1).mean(1), logsnr.argsort()
    return (torch.trapezoid(gap[order], logsnr[order]) / 2).item() / math.log(2)


# --- 02.9 my_drop_test ------------------------------------------------------------------------------------------------


def one_label(drop_labels):
    y = torch.tensor([3])
    assert drop_labels(y, 1.0, 10, torch.Generator().manual_seed(0)).item() == 10


def never_raises(drop_labels):
    drop_labels(torch.arange(10), 0.2, 10, torch.Generator().manual_seed(0))


def tight_margin(drop_labels):
    y = torch.arange(10).repeat(20)
    out = drop_labels(y, 0.2, 10, torch.Generator().manual_seed(0))
    assert abs((out == 10).float().mean() - 0.2) < 0.0001


def same_as_mine(drop_labels):
    y = torch.arange(10).repeat(20)
    mine = torch.where(torch.rand(y.shape, generator=torch.Generator().manual_seed(0)) < 0.2, 10, y)
    assert torch.equal(drop_labels(y, 0.2, 10, torch.Generator().manual_seed(0)), mine)


# Read by a person: these are told that something is wrong, and too little of what.
WEAK = {"difference of squares", "powers of e for powers of 10000", "1000 for 10000"}

SLOPPY = (
    ("02.1", "1000 for 10000", (short_period,)),
    ("02.1", "powers of e for powers of 10000", (natural_exponential,)),
    ("02.1", "assert for ValueError", (assertion,)),
    ("02.1", "sines in both halves", (sines_twice,)),
    ("02.2", "tanh on the scale", (squashed,)),
    ("02.2", "one scale for all channels", (channel_mean,)),
    ("02.2", "1 added to the result, too", (plus_one_twice,)),
    ("02.3", "one coin per class", (coin_per_class,)),
    ("02.3", "normal numbers for uniform ones", (normal_coins,)),
    ("02.3", "-1 for null", (minus_one,)),
    ("02.3", "gen seeded anew in each call", (reseeded,)),
    ("02.4", "other noise as the target", (fresh_target,)),
    ("02.4", "opt.step() twice", (two_steps,)),
    ("02.4", "t without axes", (scalar_t,)),
    ("02.4", "float64 table not cast", (no_cast,)),
    ("02.4", "prediction detached", (detached,)),
    ("02.4", "null is 0", (null_is_zero,)),
    ("02.5", "copy.copy", (Shallow,)),
    ("02.5", "assigns to the loop's name", (Rebound,)),
    ("02.5", "buffers, eval and requires_grad forgotten", (Plain,)),
    ("02.5", "shadow for model", (OtherName,)),
    ("02.6", "every t, whatever the steps", (every_t,)),
    ("02.6", "times cut, not rounded", (truncated,)),
    ("02.6", "t without axes", (scalar_time,)),
    ("02.6", "float64 table promotes x", (promoted,)),
    ("02.6", "x0 clipped to [-1, 1]", (clipped,)),
    ("02.6", "no root on the new noise", (no_root,)),
    ("02.7", "z = 2", (rounded_z,)),
    ("02.7", "z of 99 %", (normal_99,)),
    ("02.7", "ends exchanged", (first_of_the_pair,)),
    ("02.7", "Agresti and Coull's interval", (agresti,)),
    ("02.7", "mean over classes", (mean_of_classes,)),
    ("02.8", "decimal digits for bits", (base_ten,)),
    ("02.8", "mean times range", (mean_times_range,)),
    ("02.8", "difference of squares", (difference_of_squares,)),
    ("02.8", "sum over one axis only", (first_axis_only,)),
    ("02.9", "one label at p = 1", (one_label,)),
    ("02.9", "no assertion", (never_raises,)),
    ("02.9", "margin too tight", (tight_margin,)),
    ("02.9", "compares with one's own draw", (same_as_mine,)),
)
