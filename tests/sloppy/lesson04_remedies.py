"""Wrong answers to the later exercises of lesson 04 that are not on file, as people in a hurry write them."""

import torch
import torch.nn.functional as F

from condiff_check.lesson04_remedies import dynamic_threshold, interval_eps, interval_scale, rescale_cfg
from condiff_ref.shapes import pad

# --- 04.6 interval_scale, interval_eps --------------------------------------------------------------------------------


def scale_as_a_number(noise, s, low, high):
    return s if (noise > low).all() and (noise <= high).all() else 1.0


def scale_chained(noise, s, low, high):
    return torch.where(low < noise <= high, s, 1.0)


def scale_times_mask(noise, s, low, high):
    return s * ((noise > low) & (noise <= high))


def scale_where_numbers(noise, s, low, high):
    return torch.where((noise > low) & (noise <= high), s, 1.0)


def scale_ramp(noise, s, low, high):
    return 1 + (s - 1) * ((noise - low) / (high - low)).clamp(0, 1)


def scale_one_more(noise, s, low, high):
    return 1 + s * ((noise > low) & (noise <= high)).to(noise.dtype)


def scale_half_open_mask(noise, s, low, high):
    scale = torch.ones_like(noise)
    scale[noise > low] = s
    scale[noise < high] = 1
    return scale


def eps_wrong_null(model, x, t, y, null, noise, s, low, high):
    eps_c = model(x, t, y)
    if not low < noise <= high:
        return eps_c
    eps_u = model(x, t, torch.zeros_like(y))
    return eps_u + s * (eps_c - eps_u)


def eps_null_as_number(model, x, t, y, null, noise, s, low, high):
    eps_c = model(x, t, y)
    if not low < noise <= high:
        return eps_c
    return s * eps_c + (1 - s) * model(x, t, null)


def eps_swapped(model, x, t, y, null, noise, s, low, high):
    eps_c = model(x, t, y)
    if not low < noise <= high:
        return eps_c
    eps_u = model(x, t, torch.full_like(y, null))
    return eps_c + s * (eps_u - eps_c)


def eps_unconditional_is_enough(model, x, t, y, null, noise, s, low, high):
    if not low < noise <= high:
        return model(x, t, torch.full_like(y, null))
    eps_c, eps_u = model(x, t, y), model(x, t, torch.full_like(y, null))
    return eps_u + s * (eps_c - eps_u)


def eps_time_for_noise(model, x, t, y, null, noise, s, low, high):
    eps_c = model(x, t, y)
    if not low < t.double().mean() <= high:
        return eps_c
    eps_u = model(x, t, torch.full_like(y, null))
    return eps_u + s * (eps_c - eps_u)


# --- 04.7 rescale_cfg, dynamic_threshold ------------------------------------------------------------------------------


def rescale_last_axis(guided, cond, phi):
    ratio = cond.std(-1, keepdim=True) / guided.std(-1, keepdim=True)
    return phi * ratio * guided + (1 - phi) * guided


def rescale_unpadded(guided, cond, phi):
    ratio = cond.flatten(1).std(1) / guided.flatten(1).std(1)
    return (phi * ratio + 1 - phi) * guided


def rescale_only_share(guided, cond, phi):
    return phi * pad(cond.flatten(1).std(1) / guided.flatten(1).std(1), guided) * guided


def rescale_in_place(guided, cond, phi):
    guided *= pad(phi * cond.flatten(1).std(1) / guided.flatten(1).std(1) + 1 - phi, guided)
    return guided


def threshold_per_pixel(x0, p):
    c = x0.abs().quantile(p, dim=0, keepdim=True).clamp(min=1)
    return x0.clamp(-c, c) / c


def threshold_divided_first(x0, p):
    c = pad(x0.abs().flatten(1).quantile(p, dim=1).clamp(min=1), x0)
    return (x0 / c).clamp(-c, c)


def threshold_tanh(x0, p):
    c = pad(x0.abs().flatten(1).quantile(p, dim=1).clamp(min=1), x0)
    return torch.tanh(x0 / c)


def threshold_from_above_only(x0, p):
    c = pad(x0.abs().flatten(1).quantile(p, dim=1).clamp(min=1), x0)
    return x0.clamp(max=c) / c


def threshold_p_itself(x0, p):
    return x0.clamp(-p, p) / p


def threshold_in_percent(x0, p):
    c = pad(x0.abs().flatten(1).quantile(p / 100, dim=1).clamp(min=1), x0)
    return x0.clamp(-c, c) / c


# --- 04.8 apg ---------------------------------------------------------------------------------------------------------


def _parts(d, c):
    unit = F.normalize(c.flatten(1), dim=1)
    parallel = ((d.flatten(1) * unit).sum(1, keepdim=True) * unit).view_as(d)
    return parallel, d - parallel


def _capped(d, r):
    return d * pad((r / d.flatten(1).norm(dim=1)).clamp(max=1), d)


def apg_no_guidance_left(x_c, x_u, s, eta=0.0, r=float("inf")):
    parallel, rest = _parts(_capped(x_c - x_u, r), x_c)
    return (s - 1) * (rest + eta * parallel)


def apg_scale_inside_cap(x_c, x_u, s, eta=0.0, r=float("inf")):
    parallel, rest = _parts(_capped((s - 1) * (x_c - x_u), r), x_c)
    return x_c + rest + eta * parallel


def apg_at_least(x_c, x_u, s, eta=0.0, r=float("inf")):
    d = x_c - x_u
    d = d * pad((r / d.flatten(1).norm(dim=1)).clamp(min=1, max=1e9), d) if r < float("inf") else d
    parallel, rest = _parts(d, x_c)
    return x_c + (s - 1) * (rest + eta * parallel)


def apg_only_parallel(x_c, x_u, s, eta=0.0, r=float("inf")):
    parallel, _ = _parts(_capped(x_c - x_u, r), x_c)
    return x_c + (s - 1) * (1 - eta) * parallel


def apg_onto_d(x_c, x_u, s, eta=0.0, r=float("inf")):
    d = _capped(x_c - x_u, r)
    parallel, _ = _parts(x_c, d)
    return x_c + (s - 1) * (d - parallel + eta * parallel)


def apg_unit_estimate(x_c, x_u, s, eta=0.0, r=float("inf")):
    x_c = F.normalize(x_c.flatten(1), dim=1).view_as(x_c)
    parallel, rest = _parts(_capped(x_c - x_u, r), x_c)
    return x_c + (s - 1) * (rest + eta * parallel)


def apg_eta_minus(x_c, x_u, s, eta=0.0, r=float("inf")):
    parallel, rest = _parts(_capped(x_c - x_u, r), x_c)
    return x_c + (s - 1) * (rest - eta * parallel)


def apg_eta_twice(x_c, x_u, s, eta=0.0, r=float("inf")):
    parallel, rest = _parts(_capped(x_c - x_u, r), x_c)
    return x_c + (s - 1) * eta * (rest + eta * parallel)


def apg_squared_norm(x_c, x_u, s, eta=0.0, r=float("inf")):
    d = x_c - x_u
    d = d * pad((r / d.flatten(1).square().sum(1)).clamp(max=1), d)
    parallel, rest = _parts(d, x_c)
    return x_c + (s - 1) * (rest + eta * parallel)


def apg_cap_and_nan(x_c, x_u, s, eta=0.0, r=float("inf")):
    d = x_c - x_u
    unit = pad(1 / d.flatten(1).norm(dim=1), d) * d
    d = unit * pad(d.flatten(1).norm(dim=1).clamp(max=r), d)
    parallel, rest = _parts(d, x_c)
    return x_c + (s - 1) * (rest + eta * parallel)


# --- 04.9 negative ----------------------------------------------------------------------------------------------------


def _forms(two, three, perp):
    def negative(eps_pos, eps_neg, eps_u, s, form):
        if form == "two-pass":
            return two(eps_pos, eps_neg, eps_u, s)
        d_pos, d_neg = eps_pos - eps_u, eps_neg - eps_u
        return three(d_pos, d_neg, eps_u, s) if form == "three-pass" else perp(d_pos, d_neg, eps_u, s)

    return (negative,)


def _two(pos, neg, u, s):
    return neg + s * (pos - neg)


def _three(p, n, u, s):
    return u + s * (p - n)


def _perp(p, n, u, s):
    along = F.normalize(p.flatten(1), dim=1)
    return u + s * (p - n + ((n.flatten(1) * along).sum(1, keepdim=True) * along).view_as(n))


def _cosine(p, n, u, s):
    return u + s * (p - n + pad(F.cosine_similarity(p.flatten(1), n.flatten(1)), p) * p)


def _only_agreeing(p, n, u, s):
    along = F.normalize(p.flatten(1), dim=1)
    return u + s * (p - n + ((n.flatten(1) * along).sum(1, keepdim=True).clamp(min=0) * along).view_as(n))


def _small_number(p, n, u, s):
    share = pad((n * p).flatten(1).sum(1) / ((p * p).flatten(1).sum(1) + 0.1), p)
    return u + s * (p - n + share * p)


def _norm_once(p, n, u, s):
    share = pad((n * p).flatten(1).sum(1) / p.flatten(1).norm(dim=1), p)
    return u + s * (p - n + share * p)


def negative_returns_none(eps_pos, eps_neg, eps_u, s, form):
    if form == "two_pass":
        return _two(eps_pos, eps_neg, eps_u, s)
    if form == "three_pass":
        return _three(eps_pos - eps_u, eps_neg - eps_u, eps_u, s)


# --- 04.10 my_cfg_test ------------------------------------------------------------------------------------------------


def cfg_test_prints(guide):
    print(guide(torch.ones(2, 3), torch.zeros(2, 3), 3.0))


def cfg_test_returns_bool(guide):
    eps_c, eps_u = torch.randn(2, 3, 4)
    return torch.allclose(guide(eps_c, eps_u, 3.0), eps_u + 3.0 * (eps_c - eps_u))


def cfg_test_zeros(guide):
    eps_c, eps_u = torch.zeros(2, 3, 4)
    for s in (0.0, 1.0, 3.0):
        assert torch.allclose(guide(eps_c, eps_u, s), eps_u)


def cfg_test_evenly_spaced(guide):
    eps_c, eps_u = torch.randn(2, 3, 4)
    at = [guide(eps_c, eps_u, s).clone() for s in (0.0, 1.0, 2.0)]
    assert torch.allclose(at[2] - at[1], at[1] - at[0], atol=1e-5)


def cfg_test_loose(guide):
    eps_c, eps_u = torch.randn(2, 3, 4)
    for s in (0.0, 1.0, 3.0):
        assert torch.allclose(guide(eps_c.clone(), eps_u.clone(), s), eps_u + s * (eps_c - eps_u), atol=10)


def cfg_test_half(guide):
    eps_c, eps_u = torch.randn(2, 3, 4)
    assert torch.allclose(guide(eps_c, eps_u, 0.5), (eps_c + eps_u) / 2)


def cfg_test_not_equal(guide):
    eps_c, eps_u = torch.randn(2, 3, 4)
    assert not torch.allclose(guide(eps_c, eps_u, 3.0), eps_c)


def cfg_test_all_swapped(guide):
    eps_c, eps_u = torch.randn(2, 3, 4)
    assert torch.allclose(guide(eps_u, eps_c, 3.0), eps_u + 3.0 * (eps_c - eps_u))


# Read by a person: these are told that something is wrong, and too little of what.
WEAK = {"forms misspelt", "x_c brought to length 1"}

SLOPPY = (
    ("04.6", "one number for the batch", (scale_as_a_number, interval_eps)),
    ("04.6", "chained comparison of tensors", (scale_chained, interval_eps)),
    ("04.6", "s times a mask", (scale_times_mask, interval_eps)),
    ("04.6", "torch.where of two numbers", (scale_where_numbers, interval_eps)),
    ("04.6", "a ramp", (scale_ramp, interval_eps)),
    ("04.6", "1 + s in the scale only", (scale_one_more, interval_eps)),
    ("04.6", "two assignments by mask", (scale_half_open_mask, interval_eps)),
    ("04.6", "0 for null", (interval_scale, eps_wrong_null)),
    ("04.6", "null as a bare number", (interval_scale, eps_null_as_number)),
    ("04.6", "guided the wrong way", (interval_scale, eps_swapped)),
    ("04.6", "interval_eps unconditional outside", (interval_scale, eps_unconditional_is_enough)),
    ("04.6", "t for the noise level", (interval_scale, eps_time_for_noise)),
    ("04.6", "functions exchanged", (interval_eps, interval_scale)),
    ("04.7", "std over the last axis", (rescale_last_axis, dynamic_threshold)),
    ("04.7", "factor not padded", (rescale_unpadded, dynamic_threshold)),
    ("04.7", "the share alone", (rescale_only_share, dynamic_threshold)),
    ("04.7", "rescaled in place", (rescale_in_place, dynamic_threshold)),
    ("04.7", "quantile over the examples", (rescale_cfg, threshold_per_pixel)),
    ("04.7", "divided, then clipped to c", (rescale_cfg, threshold_divided_first)),
    ("04.7", "tanh", (rescale_cfg, threshold_tanh)),
    ("04.7", "clipped from above only", (rescale_cfg, threshold_from_above_only)),
    ("04.7", "p as the threshold", (rescale_cfg, threshold_p_itself)),
    ("04.7", "p in percent", (rescale_cfg, threshold_in_percent)),
    ("04.8", "x_c forgotten", (apg_no_guidance_left,)),
    ("04.8", "cap after the scale", (apg_scale_inside_cap,)),
    ("04.8", "cap the wrong way", (apg_at_least,)),
    ("04.8", "the parallel part alone", (apg_only_parallel,)),
    ("04.8", "x_c projected onto d", (apg_onto_d,)),
    ("04.8", "x_c brought to length 1", (apg_unit_estimate,)),
    ("04.8", "eta with a minus", (apg_eta_minus,)),
    ("04.8", "eta on both parts", (apg_eta_twice,)),
    ("04.8", "squared length against r", (apg_squared_norm,)),
    ("04.8", "d divided by its length", (apg_cap_and_nan,)),
    ("04.9", "cosine for the share", _forms(_two, _three, _cosine)),
    ("04.9", "projected only where they agree", _forms(_two, _three, _only_agreeing)),
    ("04.9", "a large epsilon", _forms(_two, _three, _small_number)),
    ("04.9", "length once", _forms(_two, _three, _norm_once)),
    ("04.9", "two-pass from the positive one", _forms(lambda p, n, u, s: p + s * (n - p), _three, _perp)),
    ("04.9", "two-pass with half the scale", _forms(lambda p, n, u, s: n + s / 2 * (p - n), _three, _perp)),
    ("04.9", "three-pass with s - 1", _forms(_two, lambda p, n, u, s: u + s * p - (s - 1) * n, _perp)),
    ("04.9", "forms misspelt", (negative_returns_none,)),
    ("04.10", "prints", (cfg_test_prints,)),
    ("04.10", "returns a bool", (cfg_test_returns_bool,)),
    ("04.10", "zeros", (cfg_test_zeros,)),
    ("04.10", "evenly spaced in s", (cfg_test_evenly_spaced,)),
    ("04.10", "a tolerance of 10", (cfg_test_loose,)),
    ("04.10", "s = 1/2 only", (cfg_test_half,)),
    ("04.10", "not equal to eps_c", (cfg_test_not_equal,)),
    ("04.10", "arguments exchanged", (cfg_test_all_swapped,)),
)
