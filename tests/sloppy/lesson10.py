"""Wrong answers to lesson 10 that are not on file, as people in a hurry write them."""

import math

import torch

from condiff_check.lesson10 import (
    cfgpp_scale,
    cfgpp_step,
    classify,
    dps_vs_exact,
    ess,
    gft_target,
    measurement_grad,
    mg_scale,
    mg_target,
    museum,
    resample,
)
from condiff_ref.shapes import pad

# --- 10.1


def fk_of_guided_score(sc, su, s, beta, dt):
    return 0.5 * beta * dt * (s * sc + (1 - s) * su).flatten(1).square().sum(1)


def fk_first_axis_only(sc, su, s, beta, dt):
    return 0.5 * beta * s * (s - 1) * ((sc - su) ** 2).sum(-1) * dt if sc.ndim == 2 else (sc - su).square().sum(-1)


def fk_half_twice(sc, su, s, beta, dt):
    return 0.25 * beta * s * (s - 1) * (sc - su).square().flatten(1).sum(1) * dt


def fk_abs(sc, su, s, beta, dt):
    return 0.5 * beta * abs(s * (s - 1)) * (sc - su).square().flatten(1).sum(1) * dt


def fk_normalised(sc, su, s, beta, dt):
    logw = 0.5 * beta * s * (s - 1) * (sc - su).square().flatten(1).sum(1) * dt
    return logw - logw.logsumexp(0)


# --- 10.2


def ess_int(logw):
    return (1 / logw.softmax(0).square().sum()).round()


def ess_of_largest(logw):
    return 1 / logw.softmax(0).max()


def resample_one_based(logw, gen):
    return (resample(logw, gen) + 1).clamp(max=len(logw) - 1)


def resample_shuffled(logw, gen):
    index = resample(logw, gen)
    return index[torch.randperm(len(index), generator=gen)]


def resample_rounds(logw, gen):
    torch.rand((), generator=gen)
    counts = (len(logw) * logw.softmax(0)).round().long()
    return torch.repeat_interleave(torch.arange(len(logw)), counts)


def resample_best(logw, gen):
    return logw.argmax().repeat(len(logw))


def resample_list(logw, gen):
    return resample(logw, gen).tolist()


# --- 10.3


def pc_langevin_first_guided(sc, su, x, s, beta, h, z):
    predicted = x + h * beta / 2 * (x + sc)
    return predicted, predicted + h * beta / 2 * (s - 1) * (sc - su) + math.sqrt(beta * h) * z


def pc_noise_sqrt_two(sc, su, x, s, beta, h, z):
    g = 2 * s - 1
    predicted = x + h * beta / 2 * (x + sc)
    return predicted, predicted + h * beta / 2 * (g * sc + (1 - g) * su) + math.sqrt(2 * beta * h) * z


def pc_swapped_scores(sc, su, x, s, beta, h, z):
    g = 2 * s - 1
    predicted = x + h * beta / 2 * (x + su)
    return predicted, predicted + h * beta / 2 * (g * sc + (1 - g) * su) + math.sqrt(beta * h) * z


def pc_only_end(sc, su, x, s, beta, h, z):
    return x + (beta * x / 2 + beta * (s * sc + (1 - s) * su)) * h + math.sqrt(beta * h) * z


# --- 10.4


def auto_average(main, bad, xt, t, y, w):
    return (main(xt, t, y) + w * bad(xt, t, y)) / (1 + w)


def auto_other_time(main, bad, xt, t, y, w):
    b = bad(xt, t + 0.1, y)
    return b + w * (main(xt, t, y) - b)


def auto_bad_twice(main, bad, xt, t, y, w):
    return bad(xt, t, y) + w * (main(xt, t, y) - bad(xt, t, y))


# --- 10.5


def mg_scale_inverse(w):
    if w >= 1:
        raise ValueError("no")
    return 1 - w


def mg_scale_asserts(w):
    assert w < 1
    return 1 / (1 - w)


def mg_target_half(eps, eps_c, eps_u, w):
    return eps + w * eps_c.detach()


def gft_from_one(eps, eps_null, beta):
    if not 0 < beta <= 1:
        raise ValueError("beta")
    return eps / beta - (1 - beta) * eps_null.detach()


# --- 10.6


def pp_ddim_from_next(eps_c, eps_u, xt, t, t_next, abar, lam):
    a, b = pad(abar[t], xt), pad(abar[t_next], xt)
    eps = eps_u + lam * (eps_c - eps_u)
    return b.sqrt() * (xt - (1 - b).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps_u


def pp_renoised_with_old_sigma(eps_c, eps_u, xt, t, t_next, abar, lam):
    a, b = pad(abar[t], xt), pad(abar[t_next], xt)
    eps = eps_u + lam * (eps_c - eps_u)
    return b.sqrt() * (xt - (1 - a).sqrt() * eps) / a.sqrt() + (1 - a).sqrt() * eps_u


def scale_of_logs(lam, t, t_next, abar):
    snr = lambda i: abar[i] / (1 - abar[i])  # noqa: E731
    return lam / (snr(t_next).log() - snr(t).log())


def scale_of_first(lam, t, t_next, abar):
    noise, after = (((1 - abar[i]) / abar[i]).sqrt() for i in (t[0], t_next[0]))
    return (lam * noise / (noise - after)).expand(len(t))


# --- 10.7


def grad_detached(denoise, x, a, A, R, y, method):
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        x0 = denoise(x)
        off = y - x0.detach() @ A.T
        return torch.autograd.grad((off @ A * x0).sum(), x)[0]


def grad_diagonal_only(denoise, x, a, A, R, y, method):
    R = R if method == "dps" else R + (1 - a**2) * A @ A.T
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        off = y - denoise(x) @ A.T
        return torch.autograd.grad(-(off**2 / R.diagonal()).sum() / 2, x)[0]


def grad_with_log_det(denoise, x, a, A, R, y, method):
    grad = measurement_grad(denoise, x, a, A, R, y, method)
    return grad / grad.norm(dim=1, keepdim=True)


def compare_lists(denoise, exact, x, a, A, R, y):
    got = dps_vs_exact(denoise, exact, x, a, A, R, y)
    return [got["dps"], got["pigdm"]]


def compare_swapped(denoise, exact, x, a, A, R, y):
    got = dps_vs_exact(denoise, exact, x, a, A, R, y)
    return {key: (length, cosine) for key, (cosine, length) in got.items()}


# --- 10.8


def classify_last_draw(net, x0, t, eps, weight, log_prior, abar):
    a = abar[t[-1]]
    xt = a.sqrt() * x0 + (1 - a).sqrt() * eps[-1]
    off = [net(xt, t[-1].expand(len(x0)), torch.full((len(x0),), k)) - eps[-1] for k in range(len(log_prior))]
    return (log_prior - torch.stack([o.flatten(1).square().sum(1) for o in off], 1) / 2).log_softmax(1)


def classify_last_weighted(net, x0, t, eps, weight, log_prior, abar):
    return classify(net, x0, t[-1:], eps[-1:], weight[-1:], log_prior, abar)


def classify_mean_of_draws(net, x0, t, eps, weight, log_prior, abar):
    total = torch.zeros(len(x0), len(log_prior)).to(x0)
    for m in range(len(t)):
        a = abar[t[m]]
        xt = a.sqrt() * x0 + (1 - a).sqrt() * eps[m]
        for k in range(len(log_prior)):
            off = net(xt, t[m].expand(len(x0)), torch.full((len(x0),), k)) - eps[m]
            total[:, k] += weight[m] * off.flatten(1).square().sum(1)
    return (log_prior - total / (2 * len(t))).log_softmax(1)


def classify_argmin(net, x0, t, eps, weight, log_prior, abar):
    return torch.zeros(len(x0), len(log_prior)).to(x0)


# --- 10.9


def museum_first_guess():
    return dict.fromkeys(museum(), "nothing")


def museum_lower_case():
    return {key.lower(): word for key, word in museum().items()}


def museum_own_words():
    return museum() | {"A": "weights do not add up to 1"}


def museum_partly():
    return {key: museum()[key] for key in "ABC"}


# --- 10.10


def guide_in_place(eps_c, eps_u, x, sigma, state):
    noise = sigma / (1 - sigma**2) ** 0.5
    eps_c -= eps_u
    return eps_u + (state["s"] if noise <= 1 else 1.0) * eps_c


def guide_weak(eps_c, eps_u, x, sigma, state):
    return eps_u + min(state["s"], 1.3) * (eps_c - eps_u)


def guide_sigma_as_level(eps_c, eps_u, x, sigma, state):
    return eps_u + (state["s"] if sigma <= 1 else 1.0) * (eps_c - eps_u)


def guide_zero_star(eps_c, eps_u, x, sigma, state):
    k = (eps_c * eps_u).sum(1, keepdim=True) / eps_u.square().sum(1, keepdim=True)
    return k * eps_u + state["s"] * (eps_c - k * eps_u)


def guide_rescaled(eps_c, eps_u, x, sigma, state):
    out = eps_u + state["s"] * (eps_c - eps_u)
    return out * eps_c.std() / out.std()


def guide_by_fraction(eps_c, eps_u, x, sigma, state):
    late = state["step"] > 0.9 * state["steps"]
    return eps_u + (state["s"] if late else 1.0) * (eps_c - eps_u)


def guide_ramp_by_sigma_next(eps_c, eps_u, x, sigma, state):
    return eps_u + (1 + (state["s"] - 1) * (1 - state["sigma_next"]) ** 0.2) * (eps_c - eps_u)


SLOPPY = [
    ("10.1", "square of the guided score", (fk_of_guided_score,)),
    ("10.1", "right for two axes only", (fk_first_axis_only,)),
    ("10.1", "half twice", (fk_half_twice,)),
    ("10.1", "absolute value", (fk_abs,)),
    ("10.1", "normalised over the particles", (fk_normalised,)),
    ("10.2", "ess rounded", (ess_int, resample)),
    ("10.2", "ess of the largest alone", (ess_of_largest, resample)),
    ("10.2", "counts from one", (ess, resample_one_based)),
    ("10.2", "shuffled", (ess, resample_shuffled)),
    ("10.2", "rounded counts", (ess, resample_rounds)),
    ("10.2", "the best only", (ess, resample_best)),
    ("10.2", "a list", (ess, resample_list)),
    ("10.3", "corrector as extra guidance", (pc_langevin_first_guided,)),
    ("10.3", "noise of textbook Langevin", (pc_noise_sqrt_two,)),
    ("10.3", "predictor of p(x)", (pc_swapped_scores,)),
    ("10.3", "only the end", (pc_only_end,)),
    ("10.4", "weighted average", (auto_average,)),
    ("10.4", "bad at another time", (auto_other_time,)),
    ("10.4", "bad asked twice", (auto_bad_twice,)),
    ("10.5", "scale 1 - w", (mg_target, mg_scale_inverse, gft_target)),
    ("10.5", "assert for ValueError", (mg_target, mg_scale_asserts, gft_target)),
    ("10.5", "no eps_u", (mg_target_half, mg_scale, gft_target)),
    ("10.5", "half divided", (mg_target, mg_scale, gft_from_one)),
    ("10.6", "sigma of the wrong time", (pp_ddim_from_next, cfgpp_scale)),
    ("10.6", "old sigma put back", (pp_renoised_with_old_sigma, cfgpp_scale)),
    ("10.6", "log SNR", (cfgpp_step, scale_of_logs)),
    ("10.6", "the first for all", (cfgpp_step, scale_of_first)),
    ("10.7", "no R in the pull", (grad_detached, dps_vs_exact)),
    ("10.7", "diagonal of R", (grad_diagonal_only, dps_vs_exact)),
    ("10.7", "unit length", (grad_with_log_det, dps_vs_exact)),
    ("10.7", "a list for a dict", (measurement_grad, compare_lists)),
    ("10.7", "length first", (measurement_grad, compare_swapped)),
    ("10.8", "last draw only", (classify_last_draw,)),
    ("10.8", "last draw only, with its weight", (classify_last_weighted,)),
    ("10.8", "mean of the draws", (classify_mean_of_draws,)),
    ("10.8", "all zero", (classify_argmin,)),
    ("10.9", "one word for all", (museum_first_guess,)),
    ("10.9", "small letters", (museum_lower_case,)),
    ("10.9", "own words", (museum_own_words,)),
    ("10.9", "some exhibits", (museum_partly,)),
    ("10.10", "in place", (guide_in_place,)),
    ("10.10", "a little everywhere", (guide_weak,)),
    ("10.10", "sigma for sigma / alpha", (guide_sigma_as_level,)),
    ("10.10", "CFG-Zero*", (guide_zero_star,)),
    ("10.10", "rescaled over the batch", (guide_rescaled,)),
    ("10.10", "last tenth of the steps", (guide_by_fraction,)),
    ("10.10", "root ramp", (guide_ramp_by_sigma_next,)),
]

WEAK = {"noise of textbook Langevin", "counts from one", "length first"}
