"""Exercises of lesson 01: the forward process, scores, what a network learns, and single steps back."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from condiff_ref.mixture import GaussianMixture, archipelago
from condiff_ref.shapes import pad

from .compare import close
from .draws import integer, pictures, randn, times
from .exercise import Answer, Exercise, Fact, Mistake, Wrong, need
from .oracle import OracleEps, exact_eps, table
from .testing import test_exercise
from .xray import Formula, ddpm_probes, random_abar

# --- the reference answers, as the solutions show them ----------------------------------------------------------------


def make_abar(T: int, kind: str) -> Tensor:
    """The table of abar_t = prod_{i <= t} (1 - beta_i) for t = 0 .. T, in float64: (T + 1,), with abar[0] = 1.

    kind "linear": T betas, equally spaced from 1e-4 to 0.02. kind "cosine": abar_t = f(t) / f(0) with
    f(t) = cos((t / T + 0.008) / 1.008 * pi / 2)^2.
    """
    if kind == "linear":
        betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
        return torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0)])
    t = torch.arange(T + 1, dtype=torch.float64)
    f = torch.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2
    return f / f[0]


def q_sample(x0: Tensor, t: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    """Noise x0 to time t with the noise eps: x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps.

    x0, eps (B, ...), integer t (B,), abar (T + 1,) -> (B, ...). Works for any number of axes after the first.
    """
    a = pad(abar[t].sqrt(), x0)
    sigma = pad((1 - abar[t]).sqrt(), x0)
    return a * x0 + sigma * eps


def cond_score(xt: Tensor, x0: Tensor, t: Tensor, abar: Tensor) -> Tensor:
    """The score of q(x_t | x0): the gradient of its logarithm with respect to x_t. (B, ...) -> (B, ...)."""
    a, variance = pad(abar[t].sqrt(), xt), pad(1 - abar[t], xt)
    return -(xt - a * x0) / variance


def score_from_eps(eps: Tensor, t: Tensor, abar: Tensor) -> Tensor:
    """The same score, written with the noise eps that made x_t. (B, ...) -> (B, ...)."""
    return -eps / pad((1 - abar[t]).sqrt(), eps)


def x0_from_eps(xt: Tensor, eps: Tensor, t: Tensor, abar: Tensor) -> Tensor:
    """The x0 for which q_sample(x0, t, eps) is x_t. (B, ...) -> (B, ...)."""
    a, sigma = pad(abar[t].sqrt(), xt), pad((1 - abar[t]).sqrt(), xt)
    return (xt - sigma * eps) / a


def eps_from_x0(xt: Tensor, x0: Tensor, t: Tensor, abar: Tensor) -> Tensor:
    """The eps for which q_sample(x0, t, eps) is x_t. (B, ...) -> (B, ...)."""
    a, sigma = pad(abar[t].sqrt(), xt), pad((1 - abar[t]).sqrt(), xt)
    return (xt - a * x0) / sigma


def v_from(x0: Tensor, eps: Tensor, t: Tensor, abar: Tensor) -> Tensor:
    """The velocity target v = a eps - sigma x0, with a = sqrt(abar_t) and sigma = sqrt(1 - abar_t)."""
    a, sigma = pad(abar[t].sqrt(), x0), pad((1 - abar[t]).sqrt(), x0)
    return a * eps - sigma * x0


def posterior_mean_eps(x: Tensor, x0s: Tensor, t: int, abar: Tensor) -> Tensor:
    """E[eps | x_t = x] if the data are the M points x0s, each equally likely.

    x (D,), x0s (M, D), an integer t >= 1 -> (D,). Each point could have become x by its own eps; average these,
    weighted by how likely q(x | x0) makes them.
    """
    a, sigma = abar[t].sqrt(), (1 - abar[t]).sqrt()
    eps = (x - a * x0s) / sigma
    weights = torch.softmax(-(eps**2).sum(1) / 2, dim=0)
    return weights @ eps


def dsm_loss(model: nn.Module, x0: Tensor, t: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    """The mean squared error, over the batch and all entries, of the noise that model(x_t, t) predicts: ()."""
    a, sigma = pad(abar[t].sqrt(), x0), pad((1 - abar[t]).sqrt(), x0)
    xt = a * x0 + sigma * eps
    return F.mse_loss(model(xt, t), eps)


def ddpm_mean(xt: Tensor, eps: Tensor, t: Tensor, abar: Tensor) -> Tensor:
    """The mean of q(x_{t-1} | x_t, x0), where x0 is the one that x_t and eps imply. t >= 1. (B, ...) -> (B, ...).

    With alpha_t = abar_t / abar_{t-1} and beta_t = 1 - alpha_t.
    """
    alpha = abar[t] / abar[t - 1]
    on_eps = pad((1 - alpha) / (1 - abar[t]).sqrt(), xt)
    return (xt - on_eps * eps) / pad(alpha.sqrt(), xt)


def ddpm_step(xt: Tensor, eps: Tensor, t: Tensor, z: Tensor, abar: Tensor, variance: str = "posterior") -> Tensor:
    """One step of DDPM from t to t - 1: the mean above, plus the noise z (B, ...) at the right strength.

    variance "posterior": (1 - abar_{t-1}) / (1 - abar_t) beta_t. variance "beta": beta_t. The step from t = 1 to 0 adds
    no noise. (B, ...) -> (B, ...).
    """
    alpha = abar[t] / abar[t - 1]
    beta = 1 - alpha
    mean = (xt - pad(beta / (1 - abar[t]).sqrt(), xt) * eps) / pad(alpha.sqrt(), xt)
    if variance == "posterior":
        beta = (1 - abar[t - 1]) / (1 - abar[t]) * beta
    std = torch.where(t > 1, beta.sqrt(), 0)
    return mean + pad(std, xt) * z


def ddim_step(xt: Tensor, eps: Tensor, t: Tensor, s: Tensor, abar: Tensor) -> Tensor:
    """Deterministic DDIM from t to any s < t: estimate x0, then noise it to s with the same eps. (B, ...) -> (B, ...)."""
    x0 = (xt - pad((1 - abar[t]).sqrt(), xt) * eps) / pad(abar[t].sqrt(), xt)
    return pad(abar[s].sqrt(), xt) * x0 + pad((1 - abar[s]).sqrt(), xt) * eps


def my_ddim_test(step: Callable) -> None:
    """Raise an AssertionError if step(xt, eps, t, s, abar) is not the deterministic DDIM step; else return None."""
    abar = torch.linspace(1, 0.1, 10, dtype=torch.float64)
    x0, eps = torch.randn(2, 4, 3, dtype=torch.float64)
    t, s, zero = torch.tensor([9, 5, 7, 3]), torch.tensor([2, 3, 6, 1]), torch.zeros(4, dtype=torch.long)

    def at(time):
        return abar[time].sqrt()[:, None] * x0 + (1 - abar[time]).sqrt()[:, None] * eps

    xt = at(t)
    assert torch.allclose(step(xt, eps, t, s, abar), at(s)), "it must stay on the line through x0 and eps"
    assert torch.allclose(step(xt, eps, t, zero, abar), x0), "the step to s = 0 must give x0"


# --- what every answer is tried on ------------------------------------------------------------------------------------


def _a_sigma(abar: Tensor, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """By way of exp and log, so that nothing here shares its arithmetic with an answer."""
    a = [math.exp(0.5 * math.log(float(v))) for v in abar[t]]
    sigma = [math.sqrt(-math.expm1(math.log(float(v)))) for v in abar[t]]
    ones = [1] * (like.ndim - 1)
    return torch.tensor(a, dtype=torch.float64).view(-1, *ones), torch.tensor(sigma, dtype=torch.float64).view(
        -1, *ones
    )


# --- 01.1 make_abar ---------------------------------------------------------------------------------------------------


def _abar_inputs(g: Generator) -> dict:
    return {"make_abar": dict(T=integer(g, 20, 60), kind="linear" if integer(g, 0, 1) else "cosine")}


def _abar_table(answer: Answer, g: Generator) -> None:
    T = integer(g, 20, 60)
    for kind in ("linear", "cosine"):
        table = answer(T, kind)
        if len(table) != T + 1:
            raise Wrong(f"{kind}: the table has {len(table)} entries; t = 0 .. T are T + 1")
        if float(table[0]) != 1:
            raise Wrong(f"{kind}: abar[0] is {float(table[0]):.6g}: t = 0 is clean data, so it must be 1")


def _abar_range(answer: Answer, g: Generator) -> None:
    T = integer(g, 20, 60)
    for kind in ("linear", "cosine"):
        table = answer(T, kind)
        if not ((table > -1e-12) & (table <= 1 + 1e-12)).all() or not (table.diff() < 0).all():
            raise Wrong(
                f"{kind}: abar must fall from 1 and stay positive; yours runs from {float(table[0]):.4g} to {float(table[-1]):.4g}"
            )


def _abar_linear(answer: Answer, g: Generator) -> None:
    T = integer(g, 20, 1000)
    betas = [1e-4 + (0.02 - 1e-4) * i / (T - 1) for i in range(T)]
    right = math.exp(math.fsum(math.log1p(-beta) for beta in betas))
    got = float(answer(T, "linear")[-1])
    if not math.isclose(got, right, rel_tol=1e-9):
        raise Wrong(
            f"linear, T = {T}: abar[T] is {got:.10g}; relative error {abs(got / right - 1):.1e}",
            expected=f"{right:.10g}",
        )


def _abar_cosine(answer: Answer, g: Generator) -> None:
    T = 2 * integer(g, 20, 500)
    got = float(answer(T, "cosine")[T // 2])
    half = math.pi / 2 / 1.008
    right = (1 + math.cos(2 * half * 0.508)) / (1 + math.cos(2 * half * 0.008))
    if not math.isclose(got, right, rel_tol=1e-9):
        raise Wrong(f"cosine, T = {T}: abar[T/2] is {got:.10g}", expected=f"{right:.10g}")


def _abar_by(
    product: Callable[[Tensor], Tensor] = lambda betas: (1 - betas).cumprod(0), f0: bool = True, **how: bool
) -> Callable:
    def make_abar(T: int, kind: str) -> Tensor:
        one = torch.ones(1, dtype=torch.float64)
        dtype = torch.float32 if how.get("single") else torch.float64
        if kind == "linear":
            rest = product(torch.linspace(1e-4, 0.02, T, dtype=dtype)).double()
            return rest if how.get("short") else torch.cat([rest[:1] if how.get("no_one") else one, rest])
        f = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * math.pi / 2) ** 2
        f = f / f[0] if f0 else f
        return f[1:] if how.get("short") else torch.cat([f[1:2], f[1:]]) if how.get("no_one") else f

    return make_abar


def _abar_loop(T: int, kind: str) -> Tensor:
    values = [1.0]
    for i in range(T):
        if kind == "linear":
            values.append(values[-1] * (1 - (1e-4 + i * (0.02 - 1e-4) / (T - 1))))
        else:
            values.append(
                math.cos(((i + 1) / T + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
            )
    return torch.tensor(values, dtype=torch.float64)


def _abar_logs(T: int, kind: str) -> Tensor:
    if kind == "cosine":
        return (1 + torch.cos(math.pi * (torch.linspace(0, 1, T + 1).double() + 0.008) / 1.008)) / (
            1 + math.cos(math.pi * 0.008 / 1.008)
        )
    betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    return F.pad(torch.log1p(-betas).cumsum(0), (1, 0)).exp()


MAKE_ABAR = Exercise(
    id="01.1",
    names=("make_abar",),
    references=(make_abar,),
    inputs=_abar_inputs,
    facts=(
        Fact(
            "has T + 1 entries and starts at abar[0] = 1",
            _abar_table,
            "code index and the text's t are the same number",
        ),
        Fact("falls from 1 and stays in (0, 1]", _abar_range, "what is left of the signal after t steps?"),
        Fact("linear: abar[T] to nine digits", _abar_linear, "multiply, in float64"),
        Fact("cosine: abar[T/2] to nine digits", _abar_cosine, "the value at t = 0 is not 1 by itself"),
    ),
    mistakes=(
        Mistake(
            "sum for product",
            "You add where the signal that is left must be multiplied: a cumulative sum leaves (0, 1].",
            (_abar_by(lambda b: (1 - b).cumsum(0)),),
        ),
        Mistake(
            "first entry is abar_1",
            "abar[0] is not 1: t = 0 must be clean data, so that abar[t] needs no shift anywhere.",
            (_abar_by(no_one=True),),
        ),
        Mistake(
            "length T",
            "The table has T entries: without abar[0] = 1 every later index is off by one.",
            (_abar_by(short=True),),
        ),
        Mistake(
            "cosine not normalised",
            "The cosine curve is not divided by f(0), so that t = 0 already carries noise.",
            (_abar_by(f0=False),),
        ),
        Mistake(
            "float32 product",
            "The product is taken in float32: each of T factors rounds, and the last entries lose their digits.",
            (_abar_by(single=True),),
        ),
        Mistake(
            "beta for alpha",
            "You multiply the betas themselves: what is left after a step is 1 - beta.",
            (_abar_by(lambda b: b.cumprod(0)),),
        ),
        Mistake(
            "squares",
            "The product runs over (1 - beta)^2; abar is already about variances.",
            (_abar_by(lambda b: ((1 - b) ** 2).cumprod(0)),),
        ),
        Mistake(
            "no product",
            "The table holds 1 - beta_t of each single step; abar_t is what is left after all steps up to t.",
            (_abar_by(lambda b: 1 - b),),
        ),
    ),
    alternatives=((_abar_loop,), (_abar_logs,)),
    hints=(
        "linear: which torch function multiplies all entries up to each place? And what stands before the first product?",
        "cat([1, cumprod(1 - betas)]), and f / f[0] for the cosine.",
    ),
    hides=("schedules.ddpm_alpha_bar",),
    probe=lambda answer, g: [answer(50, "linear"), answer(50, "cosine"), answer(21, "linear")],
)

# --- 01.2 q_sample ----------------------------------------------------------------------------------------------------


def _q_inputs(g: Generator) -> dict:
    x0, eps = pictures(g, 2)
    return {"q_sample": dict(x0=x0, t=times(g), eps=eps, abar=random_abar(g))}


def _q_by(a: Callable, sigma: Callable, sign: float = 1.0) -> Callable:
    def q_sample(x0: Tensor, t: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
        return pad(a(abar, t), x0) * x0 + sign * pad(sigma(abar, t), x0) * eps

    return q_sample


def _root(abar: Tensor, t: Tensor) -> Tensor:
    return abar[t].sqrt()


def _rest(abar: Tensor, t: Tensor) -> Tensor:
    return (1 - abar[t]).sqrt()


def _alpha(abar: Tensor, t: Tensor) -> Tensor:
    return abar[t] / abar[t - 1]


def _q_in_place(x0: Tensor, t: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    x0 *= pad(abar[t].sqrt(), x0)
    x0 += pad((1 - abar[t]).sqrt(), x0) * eps
    return x0


def _q_last_axis(x0: Tensor, t: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    a, sigma = abar[t].sqrt().to(x0.dtype), (1 - abar[t]).sqrt()
    return (
        (a * x0.movedim(0, -1) + sigma * eps.movedim(0, -1)).contiguous()
        if len(t) == x0.shape[-1]
        else a * x0 + sigma * eps
    )


def _q_loop(x0: Tensor, t: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    out = []
    for x, n, e in zip(x0, t.tolist(), eps, strict=True):
        out.append(float(abar[n]) ** 0.5 * x + (1 - float(abar[n])) ** 0.5 * e)
    return torch.stack(out)


def _q_einsum(x0: Tensor, t: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    both = torch.stack([x0, eps]).double()
    angle = torch.acos(abar.double().sqrt())[t]
    return torch.einsum("kb,kb...->b...", torch.stack([angle.cos(), angle.sin()]), both).to(x0)


def _q_steps(answer: Answer, g: Generator) -> None:
    """Signal and noise after t single steps x <- sqrt(1 - beta) x + sqrt(beta) z, counted one by one."""
    abar = random_abar(g)
    t = times(g, 3)
    one = torch.ones(3, 1, dtype=torch.float64)
    signal, variance = [], []
    for time in t.tolist():
        a, v = 1.0, 0.0
        for i in range(1, time + 1):
            keep = float(abar[i] / abar[i - 1])
            a, v = a * math.sqrt(keep), keep * v + (1 - keep)
        signal.append(a)
        variance.append(v)
    need(
        answer(one, t, 0 * one, abar)[:, 0],
        torch.tensor(signal).double(),
        "the share of x0 is not that of t single steps",
    )
    need(
        answer(0 * one, t, one, abar)[:, 0] ** 2,
        torch.tensor(variance).double(),
        "the variance of the noise is not that of t single steps",
    )


def _q_clean(answer: Answer, g: Generator) -> None:
    x0, eps = pictures(g, 2)
    got = answer(x0, torch.zeros(4, dtype=torch.long), eps, random_abar(g))
    need(got, x0, "at t = 0 there is no noise yet, so x_t must be x0")


def _q_unit(answer: Answer, g: Generator) -> None:
    abar, t, one = random_abar(g), times(g, 3), torch.ones(3, 1, dtype=torch.float64)
    share, noise = answer(one, t, 0 * one, abar)[:, 0], answer(0 * one, t, one, abar)[:, 0]
    total = share**2 + noise**2
    if not close(total, torch.ones(3).double()):
        raise Wrong(
            f"for data of variance 1, x_t at t = {t.tolist()} has variance {', '.join(f'{v:.3f}' for v in total)}: it must stay 1"
        )
    if not (noise > 0).all():
        raise Wrong("the noise is subtracted: harmless for a sampler, but eps is then not what was added")


def _q_shapes(answer: Answer, g: Generator) -> None:
    """One axis and three: whatever the axes, each example has its own t."""
    abar = random_abar(g)
    for shape in ((5,), (4, 4), (2, 3, 2, 2, 3)):
        x0, eps, t = randn(g, *shape), randn(g, *shape), times(g, shape[0])
        a, sigma = _a_sigma(abar, t, x0)
        need(
            answer(x0, t, eps, abar), a * x0 + sigma * eps, f"for x0 of shape {shape}, each example must use its own t"
        )


_q_formula = Formula("q_sample", "xt", ("x0", "eps"), "xt = sqrt(abar[t])*x0 + sqrt(1 - abar[t])*eps", ddpm_probes)

Q_SAMPLE = Exercise(
    id="01.2",
    names=("q_sample",),
    references=(q_sample,),
    inputs=_q_inputs,
    batch=("x0", "t", "eps"),
    formulas=(_q_formula,),
    facts=(
        Fact("t = 0 gives back the clean x0", _q_clean, "abar[0] is 1"),
        Fact("data of variance 1 keep variance 1", _q_unit, "the squares of the two coefficients add up to 1"),
        Fact("is t small steps at once", _q_steps, "a standard deviation multiplies eps, not a variance"),
        Fact("works for any number of axes", _q_shapes, "a coefficient per example: (B,) -> (B, 1, ..., 1)"),
    ),
    mistakes=(
        Mistake(
            "no root on abar",
            "The signal is multiplied by abar instead of its square root: it fades too early.",
            (_q_by(lambda ab, t: ab[t], _rest),),
        ),
        Mistake(
            "no root on 1 - abar",
            "The noise is multiplied by the variance 1 - abar instead of the standard deviation.",
            (_q_by(_root, lambda ab, t: 1 - ab[t]),),
        ),
        Mistake(
            "1 - root",
            "You take 1 - sqrt(abar) where sqrt(1 - abar) is due: the variances no longer add up to 1.",
            (_q_by(_root, lambda ab, t: 1 - ab[t].sqrt()),),
        ),
        Mistake(
            "alpha for abar",
            "You use alpha_t of the single step; abar_t is the product of all steps so far.",
            (_q_by(lambda ab, t: _alpha(ab, t).sqrt(), lambda ab, t: (1 - _alpha(ab, t)).sqrt()),),
        ),
        Mistake(
            "swapped",
            "The two coefficients are exchanged: early times would be nearly all noise.",
            (_q_by(_rest, _root),),
        ),
        Mistake(
            "t - 1",
            "You read the table one step early (t - 1): here index and t are the same number, because abar[0] = 1.",
            (_q_by(lambda ab, t: _root(ab, t - 1), lambda ab, t: _rest(ab, t - 1)),),
        ),
        Mistake(
            "minus",
            "The noise is subtracted. As eps is symmetric nobody sees it in x_t, but a network would learn -eps.",
            (_q_by(_root, _rest, -1.0),),
        ),
        Mistake(
            "fresh noise",
            "You draw new noise inside. Use the eps that was passed in: it is the network's target.",
            (lambda x0, t, eps, abar: q_sample(x0, t, torch.randn_like(eps), abar),),
        ),
        Mistake(
            "t of the first example",
            "The whole batch uses the time of its first example.",
            (lambda x0, t, eps, abar: q_sample(x0, t[:1].expand(len(t)), eps, abar),),
        ),
        Mistake(
            "broadcast over the last axis",
            "The coefficients (B,) were broadcast along the last axis instead of the batch axis.",
            (_q_last_axis,),
        ),
        Mistake(
            "in place", "You changed x0 in place (*= or +=): the caller still needs the clean image.", (_q_in_place,)
        ),
    ),
    alternatives=((_q_loop,), (_q_einsum,)),
    hints=(
        "Two coefficients, both read from abar[t]; one belongs to x0 and one to eps. Which function of abar makes variances add up to 1?",
        "sqrt(abar[t]) times x0 plus sqrt(1 - abar[t]) times eps, both coefficients reshaped to (B, 1, ..., 1).",
    ),
    hides=("schedules.add_noise",),
)

EXERCISES = (MAKE_ABAR, Q_SAMPLE)
