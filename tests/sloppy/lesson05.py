"""Wrong answers to lesson 05 that are not on file, as people in a hurry write them."""

from itertools import pairwise

import torch

from condiff_check.lesson05 import b_t, convert, euler, guided_velocity, heun
from condiff_ref.shapes import pad

# --- 05.1 fm_pair -----------------------------------------------------------------------------------------------------


def squares(x0, eps, t):
    t = pad(t, x0)
    return (1 - t**2).sqrt() * x0 + t * eps, eps - x0


def velocity_over_time(x0, eps, t):
    t = pad(t, x0)
    return (1 - t) * x0 + t * eps, (eps - x0) / t


def sum_of_both(x0, eps, t):
    t = pad(t, x0)
    return (1 - t) * x0 + t * eps, eps + x0


def no_padding(x0, eps, t):
    return (1 - t) * x0 + t * eps, eps - x0


def images_only(x0, eps, t):
    t = t[:, None, None, None]
    return (1 - t) * x0 + t * eps, eps - x0


def noise_added(x0, eps, t):
    return x0 + pad(t, x0) * eps, eps


def from_x0_to_xt_over_one_minus_t(x0, eps, t):
    t = pad(t, x0)
    xt = (1 - t) * x0 + t * eps
    return xt, (eps - xt) / t


# --- 05.2 convert -----------------------------------------------------------------------------------------------------


def convert_with(**changes):
    """The reference, but for these pairs: src_dst = function of (pred, x, a, sigma, da, dsigma)."""

    def wrong(pred, src, dst, x, a, sigma, da, dsigma):
        change = changes.get(f"{src}_{dst}") or changes.get(f"to_{dst}") or changes.get(f"from_{src}")
        if change is None:
            return convert(pred, src, dst, x, a, sigma, da, dsigma)
        if f"{src}_{dst}" in changes:
            return change(pred, x, *(pad(value, x) for value in (a, sigma, da, dsigma)))
        if f"to_{dst}" in changes:
            x0, eps = (
                pred if src == kind else convert(pred, src, kind, x, a, sigma, da, dsigma) for kind in ("x0", "eps")
            )
            return change(x0, eps, *(pad(value, x) for value in (a, sigma, da, dsigma)))
        eps = change(pred, x, *(pad(value, x) for value in (a, sigma, da, dsigma)))
        return eps if dst == "eps" else convert(eps, "eps", dst, x, a, sigma, da, dsigma)

    return wrong


score_is_minus_eps = convert_with(to_score=lambda x0, eps, a, s, da, ds: -eps, from_score=lambda p, x, a, s, da, ds: -p)
rates_exchanged = convert_with(
    to_u=lambda x0, eps, a, s, da, ds: ds * x0 + da * eps,
    from_u=lambda p, x, a, s, da, ds: (a * p - ds * x) / (a * da - ds * s),
)
determinant_sign = convert_with(from_u=lambda p, x, a, s, da, ds: (a * p - da * x) / (a * ds + da * s))
no_determinant = convert_with(from_u=lambda p, x, a, s, da, ds: a * p - da * x)
v_with_plus = convert_with(to_v=lambda x0, eps, a, s, da, ds: a * eps + s * x0)
eps_from_u_alone = convert_with(from_u=lambda p, x, a, s, da, ds: p / ds)


def no_padding_in_convert(pred, src, dst, x, a, sigma, da, dsigma):
    eps = -sigma * pred if src == "score" else pred
    return -eps / sigma if dst == "score" else eps


def x0_forgotten(pred, src, dst, x, a, sigma, da, dsigma):
    if src == "x0":
        return pred
    return convert(pred, src, dst, x, a, sigma, da, dsigma)


# --- 05.3 b_t, guided_velocity ----------------------------------------------------------------------------------------


def b_squared(a, sigma, da, dsigma):
    return sigma**2 * (da * sigma - dsigma * a) / a


def b_twice(a, sigma, da, dsigma):
    return 2 * b_t(a, sigma, da, dsigma)


def b_log_snr(a, sigma, da, dsigma):
    return da / a - dsigma / sigma


def b_a_squared(a, sigma, da, dsigma):
    return sigma * (da * sigma - dsigma * a) / a**2


def guided_normed(u_u, u_c, w):
    return (u_u + w * u_c) / (1 + w)


def guided_with_b(u_u, u_c, w):
    return u_u + w * (1 - w) * (u_c - u_u)


def guided_clipped(u_u, u_c, w):
    return torch.lerp(u_u, u_c, min(w, 1.0))


# --- 05.4 euler, heun -------------------------------------------------------------------------------------------------


def heun_without_exception(f, x, ts):
    for i in range(len(ts) - 1):
        h = ts[i + 1] - ts[i]
        one = f(x, ts[i].expand(len(x)))
        two = f(x + one, ts[min(i + 1, len(ts) - 2)].expand(len(x)))
        x = x + h * (one + two) / 2
    return x


def heun_euler_first(f, x, ts):
    """The Euler step at the start instead of the end."""
    for i in range(len(ts) - 1):
        t, s = ts[i].expand(len(x)), ts[i + 1].expand(len(x))
        one = f(x, t)
        guess = x + (ts[i + 1] - ts[i]) * one
        x = guess if i == 0 else x + (ts[i + 1] - ts[i]) * (one + f(guess, s)) / 2
    return x


def heun_half_guess(f, x, ts):
    for i in range(len(ts) - 1):
        h, t, s = ts[i + 1] - ts[i], ts[i].expand(len(x)), ts[i + 1].expand(len(x))
        one = f(x, t)
        x = x + h * one if i == len(ts) - 2 else x + h * (one + f(x + h / 2 * one, s)) / 2
    return x


def euler_backwards(f, x, ts):
    return euler(f, x, ts.flip(0))


def euler_no_step(f, x, ts):
    for t in ts[:-1]:
        x = x + f(x, t.expand(len(x)))
    return x


def euler_minus_one_over_n(f, x, ts):
    for t in ts[:-1]:
        x = x - f(x, t.expand(len(x))) / (len(ts) - 1)
    return x


def euler_all(f, x, ts):
    """All states, not the last one."""
    xs = [x]
    for t, s in pairwise(ts):
        xs.append(xs[-1] + (s - t) * f(xs[-1], t.expand(len(x))))
    return torch.stack(xs)


# --- 05.5 cfg_zero_star -----------------------------------------------------------------------------------------------


def star(fit, guide=lambda c, u, k, scale: k * u + scale * (c - k * u), zero=lambda c: torch.zeros_like(c)):
    def cfg_zero_star(v_c, v_u, scale, step, zero_steps=1):
        if step < zero_steps:
            return zero(v_c)
        return guide(v_c, v_u, pad(fit(v_c.flatten(1), v_u.flatten(1)), v_u), scale)

    return cfg_zero_star


def right_fit(c, u):
    return torch.where((u * u).sum(1) > 0, (c * u).sum(1) / (u * u).sum(1), 1)


fit_of_lengths = star(lambda c, u: c.norm(dim=1) / u.norm(dim=1).clamp(min=1e-12))
fit_by_mean = star(lambda c, u: (c * u).mean(1) / (u * u).sum(1).clamp(min=1e-12))
fit_clamped = star(lambda c, u: right_fit(c, u).clamp(0, 1))
scale_twice = star(right_fit, lambda c, u, k, scale: scale * k * u + scale * (c - k * u))
weights_exchanged = star(right_fit, lambda c, u, k, scale: scale * k * u + (1 - scale) * c)
noise_at_first = star(right_fit, zero=torch.randn_like)


def zero_number(v_c, v_u, scale, step, zero_steps=1):
    return 0.0 if step < zero_steps else star(right_fit)(v_c, v_u, scale, step, zero_steps)


def fit_zeroed(v_c, v_u, scale, step, zero_steps=1):
    """Zero-init of the fit instead of the velocity."""
    fit = pad(right_fit(v_c.flatten(1), v_u.flatten(1)), v_u) * float(step >= zero_steps)
    return fit * v_u + scale * (v_c - fit * v_u)


# --- 05.6 sample_flow -------------------------------------------------------------------------------------------------


def sampler(
    step=lambda x, u, t, s: x + (s - t) * u,
    first=lambda n, shape, gen: torch.randn(n, *shape, generator=gen),
    mix=lambda u, c, w: (1 - w) * u + w * c,
    times=lambda steps: torch.linspace(1, 0, steps + 1),
    both=lambda x: torch.cat([x, x]),
    expand=lambda t, n: t.expand(n),
):
    def sample_flow(model, y, w, steps, shape, gen):
        training = model.training
        model.eval()
        x, ts = first(len(y), shape, gen), times(steps)
        labels = torch.cat([torch.full_like(y, model.null), y])
        with torch.no_grad():
            for t, s in pairwise(ts):
                u, c = model(both(x), expand(t, 2 * len(y)), labels).chunk(2)
                x = step(x, mix(u, c, w), t, s)
        model.train(training)
        return x

    return sample_flow


ddim_like = sampler(lambda x, u, t, s: x - t * u + s * torch.randn_like(x))
full_step = sampler(lambda x, u, t, s: x - t * u)
clipped = sampler(lambda x, u, t, s: (x + (s - t) * u).clamp(-1, 1))
two_noises = sampler(both=lambda x: torch.cat([torch.randn_like(x), x]))
doubles = sampler(times=lambda steps: torch.linspace(1, 0, steps + 1, dtype=torch.float64))
quadratic = sampler(times=lambda steps: torch.linspace(1, 0, steps + 1) ** 2)
starts_late = sampler(times=lambda steps: torch.linspace(0.999, 0, steps + 1))
small_noise = sampler(first=lambda n, shape, gen: 0.5 * torch.randn(n, *shape, generator=gen))
scalar_time = sampler(expand=lambda t, n: t)
normed_mix = sampler(mix=lambda u, c, w: (u + w * c) / (1 + w))
seeded = sampler(first=lambda n, shape, gen: torch.randn(n, *shape, generator=torch.Generator().manual_seed(0)))

# --- 05.7 my_flow_test ------------------------------------------------------------------------------------------------


def no_assertion(pair):
    pair(torch.randn(3, 2), torch.randn(3, 2), torch.rand(3))


def exact_equality(pair):
    x0, eps, t = torch.randn(4, 3), torch.randn(4, 3), torch.rand(4)
    xt, u = pair(x0, eps, t)
    assert (xt == x0 + t[:, None] * (eps - x0)).all() and (u == (xt - x0) / t[:, None]).all()


def middle_only(pair):
    x0, eps = torch.randn(4, 3), torch.randn(4, 3)
    xt, u = pair(x0, eps, torch.full((4,), 0.5))
    assert torch.allclose(xt, (x0 + eps) / 2) and u.abs().sum() > 0


def scalar_t(pair):
    x0, eps = torch.randn(4, 3), torch.randn(4, 3)
    assert torch.allclose(pair(x0, eps, 0.3)[0], 0.7 * x0 + 0.3 * eps)


def derivative_of_its_own_path(pair):
    x0, eps, t = torch.randn(4, 3).double(), torch.randn(4, 3).double(), (0.2 + 0.5 * torch.rand(4)).double()
    slope = (pair(x0, eps, t + 1e-4)[0] - pair(x0, eps, t - 1e-4)[0]) / 2e-4
    assert torch.allclose(pair(x0, eps, t)[1], slope, atol=1e-5)


# Read by a person: these are told that something is wrong, and too little of what.
WEAK = {"u / dsigma taken for eps", "rates exchanged"}

SLOPPY = (
    ("05.1", "1 - t^2 under the root", (squares,)),
    ("05.1", "velocity divided by t", (velocity_over_time,)),
    ("05.1", "eps + x0", (sum_of_both,)),
    ("05.1", "t without padding", (no_padding,)),
    ("05.1", "four axes only", (images_only,)),
    ("05.1", "signal not scaled", (noise_added,)),
    ("05.1", "rest of the way over the wrong time", (from_x0_to_xt_over_one_minus_t,)),
    ("05.2", "score is -eps", (score_is_minus_eps,)),
    ("05.2", "rates exchanged", (rates_exchanged,)),
    ("05.2", "sign within the determinant", (determinant_sign,)),
    ("05.2", "not divided by the determinant", (no_determinant,)),
    ("05.2", "v with a plus", (v_with_plus,)),
    ("05.2", "u / dsigma taken for eps", (eps_from_u_alone,)),
    ("05.2", "no padding", (no_padding_in_convert,)),
    ("05.2", "x0 returned as it is", (x0_forgotten,)),
    ("05.3", "one sigma too many", (b_squared, guided_velocity)),
    ("05.3", "factor 2", (b_twice, guided_velocity)),
    ("05.3", "rate of log(a / sigma)", (b_log_snr, guided_velocity)),
    ("05.3", "a squared", (b_a_squared, guided_velocity)),
    ("05.3", "weights divided by their sum", (b_t, guided_normed)),
    ("05.3", "w (1 - w)", (b_t, guided_with_b)),
    ("05.3", "w cut at 1", (b_t, guided_clipped)),
    ("05.4", "guess without the step", (euler, heun_without_exception)),
    ("05.4", "Euler step first instead of last", (euler, heun_euler_first)),
    ("05.4", "guess after half a step", (euler, heun_half_guess)),
    ("05.4", "times turned round", (euler_backwards, heun)),
    ("05.4", "no step size", (euler_no_step, heun)),
    ("05.4", "-1 / n for the step", (euler_minus_one_over_n, heun)),
    ("05.4", "returns all states", (euler_all, heun)),
    ("05.5", "ratio of lengths", (fit_of_lengths,)),
    ("05.5", "mean above, sum below", (fit_by_mean,)),
    ("05.5", "fit cut to [0, 1]", (fit_clamped,)),
    ("05.5", "scale on both", (scale_twice,)),
    ("05.5", "weights of v_c and v_u exchanged", (weights_exchanged,)),
    ("05.5", "noise in the first steps", (noise_at_first,)),
    ("05.5", "the number 0", (zero_number,)),
    ("05.5", "fit 0 in the first steps", (fit_zeroed,)),
    ("05.6", "noise added after each step", (ddim_like,)),
    ("05.6", "each step goes all the way", (full_step,)),
    ("05.6", "clipped", (clipped,)),
    ("05.6", "null half with noise of its own", (two_noises,)),
    ("05.6", "times in float64", (doubles,)),
    ("05.6", "times squared", (quadratic,)),
    ("05.6", "starts at 0.999", (starts_late,)),
    ("05.6", "noise halved", (small_noise,)),
    ("05.6", "t without axes", (scalar_time,)),
    ("05.6", "weights divided by their sum", (normed_mix,)),
    ("05.6", "a generator of one's own", (seeded,)),
    ("05.7", "no assertion", (no_assertion,)),
    ("05.7", "equality to the last bit", (exact_equality,)),
    ("05.7", "the middle only", (middle_only,)),
    ("05.7", "t a number", (scalar_t,)),
    ("05.7", "velocity against its own path only", (derivative_of_its_own_path,)),
)
