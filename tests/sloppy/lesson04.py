"""Wrong answers to lesson 04 that are not on file, as people in a hurry write them."""

import math

import torch

from condiff_check.lesson04 import cfg_gaussian_var, convert_scale
from condiff_ref.shapes import pad

# --- 04.1 cfg ---------------------------------------------------------------------------------------------------------


def both_weighted(eps_c, eps_u, s):
    return s * eps_c + (1 + s) * eps_u


def normalised(eps_c, eps_u, s):
    return ((1 + s) * eps_c - s * eps_u) / (1 + 2 * s)


def from_the_other_end(eps_c, eps_u, s):
    return eps_c + (s + 1) * (eps_c - eps_u)


def unit_difference(eps_c, eps_u, s):
    d = eps_c - eps_u
    return eps_u + s * d / d.norm()


def squared_scale(eps_c, eps_u, s):
    return eps_u + s**2 * (eps_c - eps_u)


def clipped_difference(eps_c, eps_u, s):
    return eps_u + s * (eps_c - eps_u).clamp(-1, 1)


# --- 04.2 convert_scale -----------------------------------------------------------------------------------------------


def only_from_s(value, src, dst, noise=None, next_noise=None):
    return convert_scale(value, "s", dst, noise, next_noise)


def squares_of_noise(value, src, dst, noise=None, next_noise=None):
    factor = noise**2 / (noise**2 - next_noise**2) if noise else 1.0
    s = {"s": value, "omega": value, "w": value + 1, "beta": 1 / value if value else math.inf}.get(src, value * factor)
    return {"s": s, "omega": s, "w": s - 1, "beta": 1 / s if s else math.inf}.get(dst, s / factor)


def noise_always_needed(value, src, dst, noise=None, next_noise=None):
    factor = noise / (noise - next_noise)
    s = {"s": value, "omega": value, "w": value + 1, "beta": 1 / value, "lambda": value * factor}[src]
    return {"s": s, "omega": s, "w": s - 1, "beta": 1 / s, "lambda": s / factor}[dst]


def no_way_to_itself(value, src, dst, noise=None, next_noise=None):
    if src != dst:
        return convert_scale(value, src, dst, noise, next_noise)


def negative_omega(value, src, dst, noise=None, next_noise=None):
    s = convert_scale(-value if src == "omega" else value, src, "s", noise, next_noise)
    return -s if dst == "omega" else convert_scale(s, "s", dst, noise, next_noise)


def one_minus_beta(value, src, dst, noise=None, next_noise=None):
    s = 1 - value if src == "beta" else convert_scale(value, src, "s", noise, next_noise)
    return 1 - s if dst == "beta" else convert_scale(s, "s", dst, noise, next_noise)


# --- 04.3 cfg_forward -------------------------------------------------------------------------------------------------


def chunk_of_channels(model, x, t, y, null, s):
    out = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, null)]))
    eps_c, eps_u = out.chunk(2, dim=1)
    return eps_u + s * (eps_c - eps_u)


def halves_not_split(model, x, t, y, null, s):
    out = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, null)]))
    return out + s * (out - out)


def one_time(model, x, t, y, null, s):
    eps_c, eps_u = model(torch.cat([x, x]), t, torch.cat([y, torch.full_like(y, null)])).chunk(2)
    return eps_u + s * (eps_c - eps_u)


def one_null(model, x, t, y, null, s):
    eps_c, eps_u = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.tensor([null])])).chunk(2)
    return eps_u + s * (eps_c - eps_u)


def null_minus_one(model, x, t, y, null, s):
    eps_c, eps_u = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, -1)])).chunk(2)
    return eps_u + s * (eps_c - eps_u)


def zeros_for_no_label(model, x, t, y, null, s):
    eps_c, eps_u = model(torch.cat([x, torch.zeros_like(x)]), torch.cat([t, t]), torch.cat([y, y])).chunk(2)
    return eps_u + s * (eps_c - eps_u)


def images_only(model, x, t, y, null, s):
    eps_c, eps_u = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, null)])).chunk(2)
    return eps_u + torch.as_tensor(s, dtype=x.dtype).view(-1, 1, 1, 1) * (eps_c - eps_u)


def left_in_train(model, x, t, y, null, s):
    model.eval()
    eps_c, eps_u = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, null)])).chunk(2)
    model.train()
    return eps_u + (pad(s, x) if isinstance(s, torch.Tensor) else s) * (eps_c - eps_u)


# --- 04.4 cfg_gaussian_var --------------------------------------------------------------------------------------------


def one_power(vc, vu, s, kind):
    if kind == "sde":
        r = vu / vc
        k = 2 * s - 1
        growth = math.log(r) if k == 0 else (r**k - 1) / k
        return vc if r == 1 else vc**s * vu ** (1 - s) * growth / (vu - vc)
    return cfg_gaussian_var(vc, vu, s, kind)


def powers_of_deviations(vc, vu, s, kind):
    return math.sqrt(vc) ** s * math.sqrt(vu) ** (1 - s) if kind == "ode" else cfg_gaussian_var(vc, vu, s, kind)


def absolute_precision(vc, vu, s, kind):
    return 1 / abs(s / vc + (1 - s) / vu) if kind == "tilt" else cfg_gaussian_var(vc, vu, s, kind)


def none_for_no_density(vc, vu, s, kind):
    if kind == "tilt" and s / vc + (1 - s) / vu <= 0:
        return None
    return cfg_gaussian_var(vc, vu, s, kind)


def asserted(vc, vu, s, kind):
    assert kind != "tilt" or s / vc + (1 - s) / vu > 0
    return cfg_gaussian_var(vc, vu, s, kind)


def ratio_upside_down(vc, vu, s, kind):
    if kind != "sde" or vc == vu or s == 0.5:
        return cfg_gaussian_var(vc, vu, s, kind)
    r, k = vc / vu, 2 * s - 1
    return vc ** (2 * s) * vu ** (2 - 2 * s) * (r**k - 1) / (k * (vu - vc))


def halfway(vc, vu, s, kind):
    if kind != "sde":
        return cfg_gaussian_var(vc, vu, s, kind)
    return (cfg_gaussian_var(vc, vu, s, "ode") + 1 / (s / vc + (1 - s) / vu)) / 2


# --- 04.5 tilt_by_rejection -------------------------------------------------------------------------------------------


def mask_returned(x, p, s, gen):
    return torch.rand(len(x), generator=gen, dtype=p.dtype) < p ** (s - 1)


def coin_per_entry(x, p, s, gen):
    return x[torch.rand(x.shape, generator=gen, dtype=p.dtype) < p[:, None] ** (s - 1)]


def zeroed(x, p, s, gen):
    return x * (torch.rand(len(x), generator=gen, dtype=p.dtype) < p ** (s - 1))[:, None]


def normalised_weights(x, p, s, gen):
    weights = p ** (s - 1)
    return x[torch.rand(len(x), generator=gen, dtype=p.dtype) < weights / weights.sum()]


def normal_coins(x, p, s, gen):
    return x[torch.randn(len(x), generator=gen, dtype=p.dtype) < p ** (s - 1)]


def weighted(x, p, s, gen):
    return x * p[:, None] ** (s - 1)


def best_share(x, p, s, gen):
    weights = p ** (s - 1)
    return x[weights.argsort(descending=True)[: int(weights.sum())]]


def ratio_to_one(x, p, s, gen):
    return x[torch.rand(len(x), generator=gen, dtype=p.dtype) < p ** (1 / s)]


# Read by a person: these are told that something is wrong, and too little of what.
WEAK = {"normal numbers for uniform ones", "power 1 / s", "r upside down", "sde halfway"}

SLOPPY = (
    ("04.1", "weights s and 1 + s", (both_weighted,)),
    ("04.1", "weights brought to 1 in absolute value", (normalised,)),
    ("04.1", "s + 1 from eps_c on", (from_the_other_end,)),
    ("04.1", "difference of length 1", (unit_difference,)),
    ("04.1", "s squared", (squared_scale,)),
    ("04.1", "difference clipped", (clipped_difference,)),
    ("04.2", "src ignored", (only_from_s,)),
    ("04.2", "squares of the noise levels", (squares_of_noise,)),
    ("04.2", "noise always needed", (noise_always_needed,)),
    ("04.2", "nothing for src = dst", (no_way_to_itself,)),
    ("04.2", "omega negative", (negative_omega,)),
    ("04.2", "1 - beta", (one_minus_beta,)),
    ("04.3", "halves along the channels", (chunk_of_channels,)),
    ("04.3", "halves not split", (halves_not_split,)),
    ("04.3", "t not repeated", (one_time,)),
    ("04.3", "one null for all", (one_null,)),
    ("04.3", "null is -1", (null_minus_one,)),
    ("04.3", "x = 0 for no label", (zeros_for_no_label,)),
    ("04.3", "scale for images only", (images_only,)),
    ("04.3", "left in train mode", (left_in_train,)),
    ("04.4", "sde with single powers", (one_power,)),
    ("04.4", "ode on standard deviations", (powers_of_deviations,)),
    ("04.4", "absolute value of the precision", (absolute_precision,)),
    ("04.4", "None for no density", (none_for_no_density,)),
    ("04.4", "assert for ValueError", (asserted,)),
    ("04.4", "r upside down", (ratio_upside_down,)),
    ("04.4", "sde halfway", (halfway,)),
    ("04.5", "mask returned", (mask_returned,)),
    ("04.5", "coin per entry", (coin_per_entry,)),
    ("04.5", "rows zeroed", (zeroed,)),
    ("04.5", "weights divided by their sum", (normalised_weights,)),
    ("04.5", "normal numbers for uniform ones", (normal_coins,)),
    ("04.5", "multiplied instead of chosen", (weighted,)),
    ("04.5", "the best ones, as many as expected", (best_share,)),
    ("04.5", "power 1 / s", (ratio_to_one,)),
)
