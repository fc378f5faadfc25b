"""Wrong answers to lesson 01 that are not on file, as people in a hurry write them."""

import math

import torch
import torch.nn.functional as F

from condiff_check.lesson01 import (
    cond_score,
    ddpm_mean,
    ddpm_step,
    eps_from_x0,
    score_from_eps,
    v_from,
    x0_from_eps,
)
from condiff_ref.shapes import pad


def abar_one_beta(T, kind):
    if kind == "linear":
        return torch.cat(
            [torch.ones(1).double(), (1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64)) ** torch.arange(1, T + 1)]
        )
    f = torch.cos((torch.arange(T + 1).double() / T + 0.008) / 1.008 * math.pi / 2) ** 2
    return f / f[0]


def abar_same_kind(T, kind):
    return torch.cat([torch.ones(1).double(), (1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64)).cumprod(0)])


def q_root_of_everything(x0, t, eps, abar):
    return (pad(abar[t], x0) * x0 + pad(1 - abar[t], x0) * eps).sqrt()


def q_both_wrong(x0, t, eps, abar):
    return pad(abar[t], x0) * x0 + pad(1 - abar[t], x0) * eps


def q_abar_t_plus_one(x0, t, eps, abar):
    t = (t + 1).clamp(max=len(abar) - 1)
    return pad(abar[t].sqrt(), x0) * x0 + pad((1 - abar[t]).sqrt(), x0) * eps


def q_image_only(x0, t, eps, abar):
    a = abar[t].view(-1, 1, 1, 1)
    return a.sqrt() * x0 + (1 - a).sqrt() * eps


def q_eps_twice(x0, t, eps, abar):
    return pad(abar[t].sqrt(), x0) * x0 + 2 * pad((1 - abar[t]).sqrt(), x0) * eps


def score_halved(xt, x0, t, abar):
    return -(xt - pad(abar[t].sqrt(), xt) * x0) / (2 * pad(1 - abar[t], xt))


def score_abar_for_root(xt, x0, t, abar):
    return -(xt - pad(abar[t], xt) * x0) / pad(1 - abar[t], xt)


def score_normalised(eps, t, abar):
    return -eps / eps.norm()


def x0_clamped(xt, eps, t, abar):
    return x0_from_eps(xt, eps, t, abar).clamp(-1, 1)


def v_without_root(x0, eps, t, abar):
    return pad(abar[t], x0) * eps - pad(1 - abar[t], x0) * x0


def posterior_of_mean(x, x0s, t, abar):
    return (x - abar[t].sqrt() * x0s.mean(0)) / (1 - abar[t]).sqrt()


def posterior_transposed(x, x0s, t, abar):
    eps = (x - abar[t].sqrt() * x0s) / (1 - abar[t]).sqrt()
    return (torch.softmax(-(eps**2).sum(1) / 2, 0)[:, None] * eps).sum(1)


def dsm_l1(model, x0, t, eps, abar):
    xt = pad(abar[t].sqrt(), x0) * x0 + pad((1 - abar[t]).sqrt(), x0) * eps
    return F.l1_loss(model(xt, t), eps)


def dsm_no_roots(model, x0, t, eps, abar):
    xt = pad(abar[t], x0) * x0 + pad(1 - abar[t], x0) * eps
    return F.mse_loss(model(xt, t), eps)


def dsm_item(model, x0, t, eps, abar):
    xt = pad(abar[t].sqrt(), x0) * x0 + pad((1 - abar[t]).sqrt(), x0) * eps
    return F.mse_loss(model(xt, t), eps).item()


def dsm_scaled_time(model, x0, t, eps, abar):
    xt = pad(abar[t].sqrt(), x0) * x0 + pad((1 - abar[t]).sqrt(), x0) * eps
    return F.mse_loss(model(xt, t // 2), eps)


def mean_of_t_plus_one(xt, eps, t, abar):
    return ddpm_mean(xt, eps, t + 1, torch.cat([abar, abar[-1:] * 0.9]))


def step_for_batch(xt, eps, t, z, abar, variance="posterior"):
    return ddpm_step(xt, eps, t, z, abar, variance) if (t > 1).all() else ddpm_mean(xt, eps, t, abar)


def step_with_own_noise(xt, eps, t, z, abar, variance="posterior"):
    return ddpm_step(xt, eps, t, torch.randn_like(xt), abar, variance)


def ddim_half(xt, eps, t, s, abar):
    x0 = x0_from_eps(xt, eps, t, abar)
    return pad(abar[s].sqrt(), xt) * x0 + pad((1 - abar[t]).sqrt(), xt) * eps


def ddim_no_division(xt, eps, t, s, abar):
    x0 = xt - pad((1 - abar[t]).sqrt(), xt) * eps
    return pad(abar[s].sqrt(), xt) * x0 + pad((1 - abar[s]).sqrt(), xt) * eps


def ddim_minus(xt, eps, t, s, abar):
    x0 = x0_from_eps(xt, eps, t, abar)
    return pad(abar[s].sqrt(), xt) * x0 - pad((1 - abar[s]).sqrt(), xt) * eps


def test_prints_only(step):
    print(step)


def test_too_strict(step):
    abar = torch.linspace(1, 0.1, 10).double()
    x0, eps = torch.ones(1, 1).double() / 3, torch.ones(1, 1).double() / 7
    t = torch.tensor([7])
    xt = abar[t].sqrt()[:, None] * x0 + (1 - abar[t]).sqrt()[:, None] * eps
    assert (step(xt, eps, t, 0 * t, abar) == x0).all()


# Read by a person: these are told that something is wrong, and too little of what.
WEAK = {"powers of one beta"}

SLOPPY = (
    ("01.1", "powers of one beta", (abar_one_beta,)),
    ("01.1", "kind ignored", (abar_same_kind,)),
    ("01.2", "root of the whole sum", (q_root_of_everything,)),
    ("01.2", "no roots at all", (q_both_wrong,)),
    ("01.2", "t + 1", (q_abar_t_plus_one,)),
    ("01.2", "pictures only", (q_image_only,)),
    ("01.2", "noise twice as strong", (q_eps_twice,)),
    ("01.3", "half the score", (score_halved, score_from_eps)),
    ("01.3", "abar for its root", (score_abar_for_root, score_from_eps)),
    ("01.3", "normalised", (cond_score, score_normalised)),
    ("01.4", "clamped", (x0_clamped, eps_from_x0, v_from)),
    ("01.4", "v without roots", (x0_from_eps, eps_from_x0, v_without_root)),
    (
        "01.4",
        "x0 and eps exchanged in the signature",
        (lambda eps, xt, t, abar: x0_from_eps(xt, eps, t, abar), eps_from_x0, v_from),
    ),
    ("01.5", "noise to the mean of the data", (posterior_of_mean,)),
    ("01.5", "summed over the wrong axis", (posterior_transposed,)),
    ("01.6", "absolute error", (dsm_l1,)),
    ("01.6", "no roots in x_t", (dsm_no_roots,)),
    ("01.6", "a float", (dsm_item,)),
    ("01.6", "half of t", (dsm_scaled_time,)),
    ("01.7", "t + 1", (mean_of_t_plus_one, ddpm_step)),
    ("01.7", "last step of one example silences all", (ddpm_mean, step_for_batch)),
    ("01.7", "own noise", (ddpm_mean, step_with_own_noise)),
    ("01.8", "noise of t put back", (ddim_half,)),
    ("01.8", "x0 not divided", (ddim_no_division,)),
    ("01.8", "noise put back with a minus", (ddim_minus,)),
    ("01.9", "prints", (test_prints_only,)),
    ("01.9", "== for allclose", (test_too_strict,)),
)
