"""Exercises of lesson 01: the forward process, scores, what a network learns, and single steps back."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from condiff_ref.mixture import GaussianMixture, archipelago
from condiff_ref.schedules import discrete
from condiff_ref.shapes import pad

from .compare import close
from .draws import integer, pictures, randn, times
from .exercise import Answer, Exercise, Fact, Mistake, Wrong, need
from .oracle import OracleEps, exact_eps
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
    """The mean squared error, over the batch and all entries, of the noise that model(x_t, t) predicts: ().

    Unweighted: the "simple" loss. Denoising score matching proper divides by 1 - abar_t.
    """
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
    """Deterministic DDIM from t to any s < t: estimate x0, then noise it to s with the same eps. Shapes stay."""
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
                f"{kind}: abar must fall from 1 and stay positive; yours runs from {float(table[0]):.4g} to "
                f"{float(table[-1]):.4g}"
            )


def _abar_linear(answer: Answer, g: Generator) -> None:
    T = integer(g, 900, 1000)  # large, so that float32 shows
    betas = [1e-4 + (0.02 - 1e-4) * i / (T - 1) for i in range(T)]
    right = math.exp(math.fsum(math.log1p(-beta) for beta in betas))
    got = float(answer(T, "linear")[-1])
    if math.isclose(got, right, rel_tol=1e-5) and not math.isclose(got, right, rel_tol=1e-9):
        error = f"{abs(got / right - 1):.1e}"
        raise Wrong(f"linear, T = {T}: abar[T] has a relative error of {error}: part of it was computed in float32")
    if not math.isclose(got, right, rel_tol=1e-9):
        raise Wrong(
            f"linear, T = {T}: your abar[T] is {got:.10g}; relative error {abs(got / right - 1):.1e}",
            expected=f"{right:.10g}",
        )


def _abar_cosine(answer: Answer, g: Generator) -> None:
    T = 2 * integer(g, 20, 500)
    got = float(answer(T, "cosine")[T // 2])
    half = math.pi / 2 / 1.008
    right = (1 + math.cos(2 * half * 0.508)) / (1 + math.cos(2 * half * 0.008))
    if math.isclose(got, right, rel_tol=1e-5) and not math.isclose(got, right, rel_tol=1e-9):
        error = f"{abs(got / right - 1):.1e}"
        raise Wrong(f"linear, T = {T}: abar[T] has a relative error of {error}: part of it was computed in float32")
    if not math.isclose(got, right, rel_tol=1e-9):
        raise Wrong(f"cosine, T = {T}: your abar[T/2] is {got:.10g}", expected=f"{right:.10g}")


def _abar_digits(answer: Answer, g: Generator) -> object:
    tables = [answer(50, "linear"), answer(50, "cosine"), answer(21, "linear")]
    exact = math.exp(math.fsum(math.log1p(-(1e-4 + 0.0199 * i / 999)) for i in range(1000)))
    return [*tables, math.isclose(float(answer(1000, "linear")[-1]), exact, rel_tol=1e-9)]


def _abar_by(
    product: Callable[[Tensor], Tensor] = lambda betas: (1 - betas).cumprod(0), f0: bool = True, **how: bool
) -> Callable:
    def make_abar(T: int, kind: str) -> Tensor:
        one = torch.ones(1, dtype=torch.float64)
        dtype = torch.float32 if how.get("single") else torch.float64
        if kind == "linear":
            rest = product(torch.linspace(1e-4, 0.02, T, dtype=dtype)).double()
            return rest if how.get("short") else torch.cat([rest[:1] if how.get("no_one") else one, rest])
        offset, power = 0.0 if how.get("no_offset") else 0.008, 1 if how.get("no_square") else 2
        f = torch.arange(T + 1, dtype=torch.float64) / T
        f = torch.cos((f + offset) / (1 + offset) * math.pi / 2) ** power
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
        return (1 + torch.cos(math.pi * (torch.linspace(0, 1, T + 1, dtype=torch.float64) + 0.008) / 1.008)) / (
            1 + math.cos(math.pi * 0.008 / 1.008)
        )
    betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    return F.pad(torch.log1p(-betas).cumsum(0), (1, 0)).exp()


MAKE_ABAR = Exercise(
    without=("keeps the dtype of its inputs",),  # it has none; the digits are looked at
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
        Fact("never rises and stays in (0, 1]", _abar_range, "what is left of the signal after t steps?"),
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
            "no offset",
            "The cosine has no offset 0.008: the first steps are so small that they change nothing.",
            (_abar_by(no_offset=True),),
        ),
        Mistake(
            "cosine not squared",
            "The cosine is not squared: it is the scale of the signal, and abar is its variance.",
            (_abar_by(no_square=True),),
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
        (
            "linear: which torch function multiplies all entries up to each place? And what stands "
            "before the first product?"
        ),
        "cat([1, cumprod(1 - betas)]), and f / f[0] for the cosine.",
    ),
    hides=("schedules.ddpm_alpha_bar",),
    probe=_abar_digits,
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
    share, noise = answer(one, t, 0 * one, abar), answer(0 * one, t, one, abar)
    if share.shape != one.shape:
        raise Wrong(f"for x0 of shape (3, 1) the result has shape {tuple(share.shape)}")
    share, noise = share[:, 0], noise[:, 0]
    total = share**2 + noise**2
    if not close(total, torch.ones(3).double()):
        shown = ", ".join(f"{v:.3f}" for v in total)
        raise Wrong(f"for data of variance 1, x_t at t = {t.tolist()} has variance {shown}: it must stay 1")
    if not (noise > 0).all():
        raise Wrong("the noise is subtracted: harmless for a sampler, but eps is then not what was added")


def _q_shapes(answer: Answer, g: Generator) -> None:
    """Whatever the axes, each example comes out as it does alone and flattened."""
    abar = random_abar(g)
    for shape in ((5,), (4, 4), (2, 3, 2, 2, 3)):
        x0, eps, t = randn(g, *shape), randn(g, *shape), times(g, shape[0])
        got = answer(x0, t, eps, abar)
        rows = [answer(x0[i].view(1, -1), t[i : i + 1], eps[i].view(1, -1), abar) for i in range(len(t))]
        need(got, torch.cat(rows).view(shape), f"for x0 of shape {shape}, examples do not come out as they do alone")


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
        (
            "Two coefficients, both read from abar[t]; one belongs to x0 and one to eps. Which function "
            "of abar makes variances add up to 1?"
        ),
        "sqrt(abar[t]) times x0 plus sqrt(1 - abar[t]) times eps, both coefficients reshaped to (B, 1, ..., 1).",
    ),
    hides=("schedules.add_noise",),
)

# --- 01.3 cond_score, score_from_eps ----------------------------------------------------------------------------------


def _score_inputs(g: Generator) -> dict:
    xt, x0, eps = pictures(g, 3)
    t, abar = times(g), random_abar(g)
    return {
        "cond_score": dict(xt=xt, x0=x0, t=t, abar=abar),
        "score_from_eps": dict(eps=eps, t=t.clone(), abar=abar.clone()),
    }


def _score_autograd(answer: Answer, g: Generator) -> None:
    """torch.distributions knows the density; autograd differentiates it."""
    xt, x0 = pictures(g, 2)
    t, abar = times(g), random_abar(g)
    a, sigma = _a_sigma(abar, t, x0)
    x = xt.clone().requires_grad_()
    right = torch.autograd.grad(torch.distributions.Normal(a * x0, sigma).log_prob(x).sum(), x)[0]
    need(answer.call("cond_score", xt, x0, t, abar), right, "cond_score is not the gradient of log q(xt | x0)")


def _score_same(answer: Answer, g: Generator) -> None:
    x0, eps = pictures(g, 2)
    t, abar = times(g), random_abar(g)
    a, sigma = _a_sigma(abar, t, x0)
    x = (a * x0 + sigma * eps).requires_grad_()
    right = torch.autograd.grad(torch.distributions.Normal(a * x0, sigma).log_prob(x).sum(), x)[0]
    need(answer.call("score_from_eps", eps, t, abar), right, "score_from_eps is not the gradient of log q(xt | x0)")


def _score_home(answer: Answer, g: Generator) -> None:
    """The Gaussian's peak lies where xt + variance * score points: at a x0."""
    xt, x0 = pictures(g, 2)
    t, abar = times(g), random_abar(g)
    a, sigma = _a_sigma(abar, t, x0)
    score = answer.call("cond_score", xt, x0, t, abar)
    along = ((a * x0 - xt) * score).flatten(1).sum(1)
    if (along < 0).all():
        raise Wrong("the score points away from the data: from xt it must point back towards sqrt(abar) x0")
    need(xt + sigma**2 * score, a * x0, "xt + (1 - abar) score must be the peak of q(xt | x0), sqrt(abar) x0")


def _score_by(on_eps: Callable[[Tensor, Tensor], Tensor]) -> tuple[Callable, Callable]:
    """Both functions with -on_eps(abar, t) as the factor of the noise."""

    def cond_score(xt: Tensor, x0: Tensor, t: Tensor, abar: Tensor) -> Tensor:
        return -pad(on_eps(abar, t), xt) * (xt - pad(abar[t].sqrt(), xt) * x0) / pad((1 - abar[t]).sqrt(), xt)

    def score_from_eps(eps: Tensor, t: Tensor, abar: Tensor) -> Tensor:
        return -pad(on_eps(abar, t), eps) * eps

    return cond_score, score_from_eps


def _score_autodiff(xt: Tensor, x0: Tensor, t: Tensor, abar: Tensor) -> Tensor:
    with torch.enable_grad():
        x = xt.detach().clone().requires_grad_()
        mean, std = pad(abar[t].sqrt(), xt) * x0, pad((1 - abar[t]).sqrt(), xt)
        return torch.autograd.grad(torch.distributions.Normal(mean, std).log_prob(x).sum(), x)[0].detach()


def _score_loop(eps: Tensor, t: Tensor, abar: Tensor) -> Tensor:
    return torch.stack([-e * (1 - float(abar[n])) ** -0.5 for e, n in zip(eps, t.tolist(), strict=True)])


SCORE = Exercise(
    id="01.3",
    names=("cond_score", "score_from_eps"),
    references=(cond_score, score_from_eps),
    inputs=_score_inputs,
    batch=("xt", "x0", "eps", "t"),
    formulas=(
        Formula(
            "cond_score",
            "cond_score",
            ("xt", "x0"),
            "cond_score = -1/(1 - abar[t])*xt + (sqrt(abar[t])/(1 - abar[t]))*x0",
            ddpm_probes,
        ),
        Formula("score_from_eps", "score_from_eps", ("eps",), "score_from_eps = -1/sqrt(1 - abar[t])*eps", ddpm_probes),
    ),
    facts=(
        Fact(
            "points back: xt + (1 - abar) score is sqrt(abar) x0",
            _score_home,
            (
                "a Gaussian of variance v has its peak at x + v times its score: mind the sign, and what the "
                "score is divided by"
            ),
        ),
        Fact(
            "cond_score is what autograd gets from the normal density",
            _score_autograd,
            "differentiate -|xt - sqrt(abar) x0|^2 / (2 (1 - abar)) by xt",
        ),
        Fact(
            "score_from_eps is the same, for xt made with eps",
            _score_same,
            "put xt - sqrt(abar) x0 = sqrt(1 - abar) eps into cond_score",
        ),
    ),
    mistakes=(
        Mistake(
            "sign",
            "The sign is turned: this score points away from the data, along the noise instead of against it.",
            _score_by(lambda ab, t: -1 / (1 - ab[t]).sqrt()),
        ),
        Mistake(
            "no root",
            "In terms of eps you divide by the variance 1 - abar; one factor sigma has cancelled already. This is "
            "also what line (2) of the derivation in one of the course's sources does wrong.",
            _score_by(lambda ab, t: 1 / (1 - ab[t])),
        ),
        Mistake(
            "times for divided",
            "You multiply by sigma where you should divide: the score grows as the noise shrinks.",
            _score_by(lambda ab, t: (1 - ab[t]).sqrt()),
        ),
        Mistake(
            "signal for noise",
            "The scale is that of the signal, sqrt(abar); the width of q(xt | x0) is that of the noise.",
            _score_by(lambda ab, t: 1 / ab[t].sqrt()),
        ),
        Mistake(
            "plain -eps",
            "Minus eps alone has the direction of the score and not its length: how steep a Gaussian is depends on "
            "its width.",
            _score_by(lambda ab, t: torch.ones_like(ab[t])),
        ),
        Mistake(
            "mean forgotten",
            "cond_score pulls towards 0: the centre of q(xt | x0) is sqrt(abar) x0.",
            (lambda xt, x0, t, abar: -xt / pad(1 - abar[t], xt), score_from_eps),
        ),
        Mistake(
            "mean is x0",
            "cond_score pulls towards x0 itself: q(xt | x0) is centred on the shrunken sqrt(abar) x0.",
            (lambda xt, x0, t, abar: -(xt - x0) / pad(1 - abar[t], xt), score_from_eps),
        ),
    ),
    alternatives=(
        (_score_autodiff, _score_loop),
        (
            lambda xt, x0, t, abar: torch.einsum("b...,b->b...", pad(abar[t].sqrt(), xt) * x0 - xt, 1 / (1 - abar[t])),
            lambda eps, t, abar: torch.einsum("b...,b->b...", -eps, (1 - abar[t]).rsqrt()),
        ),
    ),
    hints=(
        "q(xt | x0) is a Gaussian. Which is its centre, which its variance, and what is d/dx of -(x - m)^2 / (2 v)?",
        "-(xt - sqrt(abar) x0) / (1 - abar), and -eps / sqrt(1 - abar).",
    ),
    hides=("predictions.target", "predictions.convert", "predictions.basis"),
)

# --- 01.4 x0_from_eps, eps_from_x0, v_from ----------------------------------------------------------------------------


def _pair_inputs(g: Generator) -> dict:
    xt, x0, eps = pictures(g, 3)
    t, abar = times(g), random_abar(g)
    return {
        "x0_from_eps": dict(xt=xt, eps=eps, t=t, abar=abar),
        "eps_from_x0": dict(xt=xt.clone(), x0=x0, t=t.clone(), abar=abar.clone()),
        "v_from": dict(x0=x0.clone(), eps=eps.clone(), t=t.clone(), abar=abar.clone()),
    }


def _noised(g: Generator) -> tuple[Tensor, ...]:
    """x0, eps, t, abar and the xt that they make."""
    x0, eps = pictures(g, 2)
    t, abar = times(g), random_abar(g)
    a, sigma = _a_sigma(abar, t, x0)
    return x0, eps, t, abar, a * x0 + sigma * eps


def _x0_back(answer: Answer, g: Generator) -> None:
    x0, eps, t, abar, xt = _noised(g)
    need(answer.call("x0_from_eps", xt, eps, t, abar), x0, "x0_from_eps does not undo the noising")


def _eps_back(answer: Answer, g: Generator) -> None:
    x0, eps, t, abar, xt = _noised(g)
    need(answer.call("eps_from_x0", xt, x0, t, abar), eps, "eps_from_x0 does not find the noise again")


def _v_turn(answer: Answer, g: Generator) -> None:
    """(xt, v) is (x0, eps) turned by an angle: lengths add up, and the turn back gives x0 and eps."""
    x0, eps, t, abar, xt = _noised(g)
    a, sigma = _a_sigma(abar, t, x0)
    v = answer.call("v_from", x0, eps, t, abar)
    if close((v + a * eps - sigma * x0).detach(), 0 * v, atol=1e-8):
        raise Wrong("v_from has the opposite sign: at t = 0 it must be +eps, at t = T -x0")
    need(a * xt - sigma * v, x0, "sqrt(abar) xt - sqrt(1 - abar) v must be x0")
    need(sigma * xt + a * v, eps, "sqrt(1 - abar) xt + sqrt(abar) v must be eps")


def _x0_by(f: Callable) -> tuple[Callable, Callable, Callable]:
    return (lambda xt, eps, t, abar: f(xt, eps, pad(abar[t], xt)), eps_from_x0, v_from)


def _v_by(f: Callable) -> tuple[Callable, Callable, Callable]:
    return (x0_from_eps, eps_from_x0, lambda x0, eps, t, abar: f(x0, eps, pad(abar[t], x0)))


def _eps_by(f: Callable) -> tuple[Callable, Callable, Callable]:
    return (x0_from_eps, lambda xt, x0, t, abar: f(xt, x0, pad(abar[t], xt)), v_from)


def _solve(xt: Tensor, eps: Tensor, t: Tensor, abar: Tensor) -> Tensor:
    """By the angle whose cosine is sqrt(abar)."""
    angle = pad(torch.acos(abar[t].sqrt()), xt)
    return xt / angle.cos() - angle.tan() * eps


def _v_loop(x0: Tensor, eps: Tensor, t: Tensor, abar: Tensor) -> Tensor:
    values = [float(abar[n]) for n in t]
    return torch.stack([v**0.5 * e - (1 - v) ** 0.5 * x for x, e, v in zip(x0, eps, values, strict=True)])


PAIR = Exercise(
    id="01.4",
    names=("x0_from_eps", "eps_from_x0", "v_from"),
    references=(x0_from_eps, eps_from_x0, v_from),
    inputs=_pair_inputs,
    batch=("xt", "x0", "eps", "t"),
    formulas=(
        Formula(
            "x0_from_eps",
            "x0_from_eps",
            ("xt", "eps"),
            "x0_from_eps = (1/sqrt(abar[t]))*xt - (sqrt(1 - abar[t])/sqrt(abar[t]))*eps",
            ddpm_probes,
        ),
        Formula(
            "eps_from_x0",
            "eps_from_x0",
            ("xt", "x0"),
            "eps_from_x0 = (1/sqrt(1 - abar[t]))*xt - (sqrt(abar[t])/sqrt(1 - abar[t]))*x0",
            ddpm_probes,
        ),
        Formula("v_from", "v_from", ("x0", "eps"), "v_from = -sqrt(1 - abar[t])*x0 + sqrt(abar[t])*eps", ddpm_probes),
    ),
    facts=(
        Fact("x0_from_eps undoes the noising", _x0_back, "solve xt = a x0 + sigma eps for x0, term by term"),
        Fact("eps_from_x0 finds the noise again", _eps_back, "solve the same equation for eps"),
        Fact(
            "(xt, v) is (x0, eps), turned by an angle",
            _v_turn,
            "against xt, the two coefficients change places, and one changes its sign",
        ),
    ),
    mistakes=(
        Mistake(
            "plus",
            "x0_from_eps adds the noise a second time: moved to the other side it changes its sign.",
            _x0_by(lambda xt, eps, ab: (xt + (1 - ab).sqrt() * eps) / ab.sqrt()),
        ),
        Mistake(
            "divides one term",
            "x0_from_eps divides only the noise term: the whole difference is divided.",
            _x0_by(lambda xt, eps, ab: xt - ((1 - ab) / ab).sqrt() * eps),
        ),
        Mistake(
            "divides by abar",
            (
                "x0_from_eps divides by abar; the factor on x0 was its root, so estimates come out too large "
                "at high noise."
            ),
            _x0_by(lambda xt, eps, ab: (xt - (1 - ab).sqrt() * eps) / ab),
        ),
        Mistake(
            "multiplies by the root",
            "x0_from_eps multiplies by sqrt(abar) where it should divide: the estimate fades towards 0 at high noise.",
            _x0_by(lambda xt, eps, ab: (xt - (1 - ab).sqrt() * eps) * ab.sqrt()),
        ),
        Mistake(
            "variance for std",
            "x0_from_eps removes (1 - abar) eps: what was added is a standard deviation times eps. A published code "
            "base had this bug, and samples still looked like something.",
            _x0_by(lambda xt, eps, ab: (xt - (1 - ab) * eps) / ab.sqrt()),
        ),
        Mistake(
            "eps not divided",
            "eps_from_x0 returns the noise at the scale it has within xt; eps itself has variance 1.",
            _eps_by(lambda xt, x0, ab: xt - ab.sqrt() * x0),
        ),
        Mistake(
            "eps by variance",
            "eps_from_x0 divides by the variance 1 - abar instead of the standard deviation.",
            _eps_by(lambda xt, x0, ab: (xt - ab.sqrt() * x0) / (1 - ab)),
        ),
        Mistake(
            "v sign",
            "v_from has the opposite sign: it should point the way xt moves as the noise grows, at t = 0 along +eps.",
            _v_by(lambda x0, eps, ab: (1 - ab).sqrt() * x0 - ab.sqrt() * eps),
        ),
        Mistake(
            "v plus",
            "v_from adds the two terms: what comes out is not perpendicular to xt, and at half noise it is xt itself.",
            _v_by(lambda x0, eps, ab: ab.sqrt() * eps + (1 - ab).sqrt() * x0),
        ),
        Mistake(
            "v is xt turned",
            "v_from has its two coefficients exchanged.",
            _v_by(lambda x0, eps, ab: (1 - ab).sqrt() * eps - ab.sqrt() * x0),
        ),
        Mistake(
            "v with x0 and eps exchanged",
            "v_from has x0 and eps exchanged: at t = 0 it must be +eps, and yours is x0.",
            _v_by(lambda x0, eps, ab: ab.sqrt() * x0 - (1 - ab).sqrt() * eps),
        ),
        Mistake(
            "v is eps - x0",
            "eps - x0 is the target of straight paths (flow matching); on this curved path the two terms turn with t.",
            _v_by(lambda x0, eps, ab: eps - x0),
        ),
    ),
    alternatives=(
        (_solve, eps_from_x0, _v_loop),
        (
            x0_from_eps,
            lambda xt, x0, t, abar: (
                torch.einsum("b...,b->b...", xt, (1 - abar[t]).rsqrt())
                - torch.einsum("b...,b->b...", x0, (abar[t] / (1 - abar[t])).sqrt())
            ),
            lambda x0, eps, t, abar: (
                (
                    eps
                    - pad((1 - abar[t]).sqrt(), x0)
                    * (pad(abar[t].sqrt(), x0) * x0 + pad((1 - abar[t]).sqrt(), x0) * eps)
                )
                / pad(abar[t].sqrt(), x0)
            ),
        ),
    ),
    hints=(
        (
            "One equation, xt = a x0 + sigma eps, solved for x0 and for eps. For v: turn (x0, eps) by 90 "
            "degrees more than xt."
        ),
        "(xt - sigma eps) / a, (xt - a x0) / sigma, and a eps - sigma x0, with a = sqrt(abar), sigma = sqrt(1 - abar).",
    ),
    hides=("predictions.solve", "predictions.convert", "predictions.target", "predictions.basis"),
)

# --- 01.5 posterior_mean_eps ------------------------------------------------------------------------------------------


def _posterior_inputs(g: Generator) -> dict:
    abar = random_abar(g)
    x0s = randn(g, 6, 3)
    return {"posterior_mean_eps": dict(x=randn(g, 3), x0s=x0s, t=integer(g, 8, 25), abar=abar)}


def _posterior_one(answer: Answer, g: Generator) -> None:
    abar, x, x0s, t = random_abar(g), randn(g, 3), randn(g, 1, 3), integer(g, 8, 25)
    a, sigma = math.sqrt(float(abar[t])), math.sqrt(1 - float(abar[t]))
    need(answer(x, x0s, t, abar), (x - a * x0s[0]) / sigma, "with a single data point, eps is known exactly")


def _posterior_middle(answer: Answer, g: Generator) -> None:
    """Half-way between two points the directions along the line cancel."""
    abar, m, t = random_abar(g), randn(g, 3), integer(g, 8, 25)
    got = answer(0 * m, torch.stack([m, -m]), t, abar)
    need(got, 0 * m, "exactly between two data points neither wins: the average is 0")


def _posterior_exact(answer: Answer, g: Generator) -> None:
    """Points are a mixture of Gaussians without width, whose score is known."""
    abar, x, x0s, t = random_abar(g), randn(g, 3), randn(g, 6, 3), integer(g, 8, 25)
    world = GaussianMixture(torch.ones(6).double(), x0s, torch.zeros(6, 3, 3).double(), torch.zeros(6).long())
    right = exact_eps(world, x[None], torch.tensor([t]), abar)[0]
    need(answer(x, x0s, t, abar), right, "it is not -sigma times the score of the noised points")


def _posterior_far(answer: Answer, g: Generator) -> None:
    """At low noise all weights underflow, unless they are formed from logarithms."""
    abar = torch.linspace(1, 0.5, 1001, dtype=torch.float64)
    x0s = torch.tensor([[0, 0], [4, 0], [0, 4], [-5, 1], [1, -6]]) + 0.1 * randn(g, 5, 2)
    x = x0s[0] + torch.tensor([1.0, 0.7], dtype=torch.float64)
    got = answer(x, x0s, 1, abar)
    if not got.isfinite().all():
        raise Wrong(
            "at low noise (abar = 0.9995) the result is not finite: the weights are all zero before normalising"
        )
    a, sigma = math.sqrt(0.9995), math.sqrt(0.0005)
    eps = (x - a * x0s) / sigma
    best = (eps**2).sum(1).argmin()
    need(got, eps[best], "at low noise only the nearest point counts", rtol=1e-4, atol=1e-4)


def _posterior_low(answer: Answer, g: Generator) -> object:
    far = torch.tensor([[0, 0], [4, 0], [0, 4], [-5, 1]]) + 0.1 * randn(g, 4, 2)
    return answer(torch.tensor([1.0, 1.0]).double(), far, 1, 1 - torch.arange(9).double() / 2000)


def _posterior_by(weights: Callable, take: Callable = lambda eps, x0s: eps, shrink: bool = True) -> Callable:
    def posterior_mean_eps(x: Tensor, x0s: Tensor, t: int, abar: Tensor) -> Tensor:
        a, sigma = (abar[t].sqrt() if shrink else 1), (1 - abar[t]).sqrt()
        eps = (x - a * x0s) / sigma
        return weights(eps, sigma) @ take(eps, x0s)

    return posterior_mean_eps


def _plain_weights(eps: Tensor, _: Tensor) -> Tensor:
    weights = torch.exp(-(eps**2).sum(1) / 2)
    return weights / weights.sum()


def _posterior_loop(x: Tensor, x0s: Tensor, t: int, abar: Tensor) -> Tensor:
    a, sigma = float(abar[t]) ** 0.5, (1 - float(abar[t])) ** 0.5
    logs = [-float(((x - a * p) ** 2).sum()) / (2 * sigma**2) for p in x0s]
    top = max(logs)
    weights = [math.exp(value - top) for value in logs]
    return sum(w * (x - a * p) / sigma for w, p in zip(weights, x0s, strict=True)) / sum(weights)


def _posterior_via_x0(x: Tensor, x0s: Tensor, t: int, abar: Tensor) -> Tensor:
    normal = torch.distributions.Normal(abar[t].sqrt() * x0s, (1 - abar[t]).sqrt())
    logs = normal.log_prob(x).sum(1)
    x0 = torch.einsum("m,md->d", (logs - logs.logsumexp(0)).exp(), x0s)
    return (x - abar[t].sqrt() * x0) / (1 - abar[t]).sqrt()


POSTERIOR = Exercise(
    id="01.5",
    names=("posterior_mean_eps",),
    references=(posterior_mean_eps,),
    inputs=_posterior_inputs,
    facts=(
        Fact("one data point: its own noise", _posterior_one, "by how much must this point be moved to become x?"),
        Fact("half-way between two points: zero", _posterior_middle, "which of the two was it? both are as likely"),
        Fact(
            "equals -sigma times the score of the noised points",
            _posterior_exact,
            "each point counts as q(x | x0) says",
        ),
        Fact("low noise: finite, and the nearest point's", _posterior_far, "what is exp(-2000)?"),
    ),
    mistakes=(
        Mistake(
            "weights not from logarithms",
            "The weights are formed as exp(...) first: at low noise all of them underflow to 0, and 0 / 0 is NaN.",
            (_posterior_by(_plain_weights),),
        ),
        Mistake(
            "factor 2",
            "The exponent lacks its 1/2: the weights are too peaked, as if the noise had half its variance.",
            (_posterior_by(lambda eps, _: torch.softmax(-(eps**2).sum(1), 0)),),
        ),
        Mistake(
            "sigma twice",
            "eps is divided by sigma already: its square is not to be divided by the variance once more.",
            (_posterior_by(lambda eps, sigma: torch.softmax(-(eps**2).sum(1) / (2 * sigma**2), 0)),),
        ),
        Mistake(
            "variance forgotten",
            "The squared distances are not divided by the variance 1 - abar: the weights do not know how noisy x is.",
            (_posterior_by(lambda eps, sigma: torch.softmax(-((sigma * eps) ** 2).sum(1) / 2, 0)),),
        ),
        Mistake(
            "distance for its square",
            "The weights use the distance, not its square: that is not a Gaussian.",
            (_posterior_by(lambda eps, _: torch.softmax(-eps.norm(dim=1) / 2, 0)),),
        ),
        Mistake(
            "farther is likelier",
            "The sign in the exponent is turned: far points get the large weights.",
            (_posterior_by(lambda eps, _: torch.softmax((eps**2).sum(1) / 2, 0)),),
        ),
        Mistake(
            "softmax over the wrong axis",
            "The softmax runs over the coordinates; the weights of the M points must add up to 1.",
            (lambda x, x0s, t, abar: _per_coordinate(x, x0s, t, abar),),
        ),
        Mistake(
            "average of x0",
            (
                "This is E[x0 | x], the average of the points; asked for is the average of the noise that "
                "led from each to x."
            ),
            (_posterior_by(lambda eps, _: torch.softmax(-(eps**2).sum(1) / 2, 0), lambda eps, x0s: x0s),),
        ),
        Mistake(
            "a forgotten",
            "The points are not shrunk by sqrt(abar) before they are compared with x.",
            (_posterior_by(lambda eps, _: torch.softmax(-(eps**2).sum(1) / 2, 0), shrink=False),),
        ),
        Mistake(
            "equal weights",
            "Every point gets the same weight: a point far from x is as good as one beside it.",
            (_posterior_by(lambda eps, _: torch.full_like(eps[:, 0], 1 / len(eps))),),
        ),
        Mistake(
            "not divided by sigma",
            "You average x - sqrt(abar) x0: that is sigma times the noise, which itself has variance 1.",
            (_posterior_by(lambda eps, sigma: sigma * torch.softmax(-(eps**2).sum(1) / 2, 0)),),
        ),
        Mistake(
            "not normalised",
            "The weights do not add up to 1: a sum weighted with exp(...) alone grows with the number of points.",
            (_posterior_by(lambda eps, _: torch.exp(-(eps**2).sum(1) / 2)),),
        ),
        Mistake(
            "nearest point only",
            "You take the most likely point alone. A network trained with squares learns the average over all.",
            (_posterior_by(lambda eps, _: F.one_hot((eps**2).sum(1).argmin(), len(eps)).to(eps)),),
        ),
    ),
    alternatives=((_posterior_loop,), (_posterior_via_x0,)),
    hints=(
        (
            "Two things per data point: the eps that leads from it to x, and its weight. Which function "
            "of |eps|^2 is the weight?"
        ),
        (
            "eps_m = (x - sqrt(abar) x0_m) / sqrt(1 - abar), weights softmax(-|eps_m|^2 / 2) over m, "
            "then the weighted sum."
        ),
    ),
    probe=_posterior_low,
    hides=("mixture.GridDensity.score", "mixture.GaussianMixture.posterior_mean"),
)


def _per_coordinate(x: Tensor, x0s: Tensor, t: int, abar: Tensor) -> Tensor:
    eps = (x - abar[t].sqrt() * x0s) / (1 - abar[t]).sqrt()
    return (torch.softmax(-(eps**2) / 2, dim=1) * eps).sum(0)


# --- 01.6 dsm_loss ----------------------------------------------------------------------------------------------------


def _dsm_inputs(g: Generator) -> dict:
    abar = random_abar(g)
    model = OracleEps(archipelago(), abar)
    x0 = archipelago().sample(7, g)[0]
    return {"dsm_loss": dict(model=model, x0=x0, t=times(g, 7), eps=randn(g, 7, 2), abar=abar)}


def _dsm_asked(answer: Answer, g: Generator) -> None:
    args = _dsm_inputs(g)["dsm_loss"]
    answer(*args.values())
    model, x0, t, eps, abar = args.values()
    if len(model.seen) != 1:
        raise Wrong(f"the model was called {len(model.seen)} times; once is enough")
    xt, time = model.seen[0]
    if not torch.equal(time, t):
        raise Wrong(f"the model was asked at t = {time.tolist()[:3]}..., but xt has t = {t.tolist()[:3]}...")
    a, sigma = _a_sigma(abar, t, x0)
    if close(xt, x0):
        raise Wrong("the model was shown the clean x0: it must see the noised x_t")
    need(xt, a * x0 + sigma * eps, "the model was not shown x_t = sqrt(abar) x0 + sqrt(1 - abar) eps")


def _dsm_zero(answer: Answer, g: Generator) -> None:
    """A network that always says 0 has the loss E eps^2."""
    args = _dsm_inputs(g)["dsm_loss"]
    args["model"].gain.data.zero_()
    right = torch.tensor(math.fsum(float(e) ** 2 for e in args["eps"].flatten()) / args["eps"].numel()).double()
    need(answer(*args.values()), right, "for a model that answers 0, the loss is the mean of eps^2 over all entries")


def _dsm_value(answer: Answer, g: Generator) -> None:
    args = _dsm_inputs(g)["dsm_loss"]
    model, x0, t, eps, abar = args.values()
    a, sigma = _a_sigma(abar, t, x0)
    predicted = exact_eps(model.world, a * x0 + sigma * eps, t, abar)
    right = ((predicted - eps) ** 2).sum() / eps.numel()
    if close(answer(*args.values()).detach(), ((predicted + eps) ** 2).sum() / eps.numel()):
        raise Wrong("the loss compares with -eps: that would teach the network the opposite noise")
    need(answer(*args.values()), right, "for the exact network, the loss is not the mean of |eps* - eps|^2")


def _dsm_floor(answer: Answer, g: Generator) -> None:
    """The least loss possible is (a / sigma)^2 tr Cov(x0 | xt) / d, averaged: not zero."""
    n = 4000
    world, abar = archipelago(), random_abar(g)
    t = torch.full((n,), integer(g, 10, 25))
    x0, eps = world.sample(n, g)[0], randn(g, n, 2)
    got = float(answer(OracleEps(world, abar), x0, t, eps, abar).detach())
    a, sigma = _a_sigma(abar, t, x0)
    cov = world.posterior_cov(a * x0 + sigma * eps, t.double(), discrete(abar))
    per_example = (a / sigma)[:, 0] ** 2 * cov.diagonal(dim1=1, dim2=2).sum(1) / 2
    floor, spread = float(per_example.mean()), 6 * 1.5 / math.sqrt(n)
    if abs(got - floor) > spread:
        raise Wrong(
            f"a perfect network has the loss {floor:.3f} at t = {int(t[0])} (the variance of eps given "
            f"xt); yours says {got:.3f}"
        )


def _dsm_learns(answer: Answer, g: Generator) -> None:
    args = _dsm_inputs(g)["dsm_loss"]
    loss = answer(*args.values())
    gradient = torch.autograd.grad(loss, args["model"].gain, allow_unused=True)[0] if loss.requires_grad else None
    if gradient is None:
        raise Wrong("no gradient reaches the model: the loss must stay connected with what the model returned")


def _dsm_by(**how: object) -> Callable:
    def dsm_loss(model: nn.Module, x0: Tensor, t: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
        a, sigma = pad(abar[t].sqrt(), x0), pad((1 - abar[t]).sqrt(), x0)
        xt = x0 if how.get("clean") else a * x0 + sigma * (torch.randn_like(eps) if how.get("fresh") else eps)
        predicted = model(xt, t - 1 if how.get("shifted") else t)
        error = (predicted + eps if how.get("sign") else predicted - eps) ** 2
        error = error / sigma**2 if how.get("weighted") else error
        error = (predicted - x0) ** 2 if how.get("x0") else error
        loss = error.sum() if how.get("total") else error.sum(1).mean() if how.get("dims") else error.mean()
        loss = loss.sqrt() if how.get("root") else loss
        return loss.detach() if how.get("detach") else loss

    return dsm_loss


def _dsm_loop(model: nn.Module, x0: Tensor, t: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    rows = [abar[n] ** 0.5 * x + (1 - abar[n]) ** 0.5 * e for x, n, e in zip(x0, t.tolist(), eps, strict=True)]
    predicted = model(torch.stack(rows), t)
    return sum(((p - e) ** 2).mean() for p, e in zip(predicted, eps, strict=True)) / len(eps)


def _dsm_einsum(model: nn.Module, x0: Tensor, t: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    xt = torch.einsum("b,b...->b...", abar[t].sqrt(), x0) + torch.einsum("b,b...->b...", (1 - abar[t]).sqrt(), eps)
    difference = (eps - model(xt, t)).flatten()
    return torch.dot(difference, difference) / eps.numel()


DSM = Exercise(
    id="01.6",
    names=("dsm_loss",),
    references=(dsm_loss,),
    inputs=_dsm_inputs,
    changes=("model",),
    graph=True,
    facts=(
        Fact("asks the model once, about x_t at its own t", _dsm_asked, "what does the network get to see, and when?"),
        Fact("a model that says 0 has the loss of eps itself", _dsm_zero, "a mean over the batch and over all entries"),
        Fact("the exact network's loss, term by term", _dsm_value, "the target is eps, with its sign"),
        Fact("its floor is the variance of eps given x_t, not 0", _dsm_floor, "x_t does not tell which eps it was"),
        Fact("the gradient reaches the model", _dsm_learns, "no detach, no .item(), no no_grad"),
    ),
    mistakes=(
        Mistake(
            "target -eps",
            "The target has the wrong sign: a network trained so predicts -eps, and samplers walk outward.",
            (_dsm_by(sign=True),),
        ),
        Mistake(
            "clean x0 shown",
            "The model sees the clean x0, which says nothing about eps: the best it can learn is to answer 0.",
            (_dsm_by(clean=True),),
        ),
        Mistake(
            "sum for mean",
            "You sum over all entries: the loss, and so a gradient-descent step, grows with batch and picture.",
            (_dsm_by(total=True),),
        ),
        Mistake(
            "sum over entries",
            (
                "You sum over the entries of an example and average over the batch only: 2 times too large "
                "here, 784 times for MNIST."
            ),
            (_dsm_by(dims=True),),
        ),
        Mistake("other t", "The model is asked about another t than the noise belongs to.", (_dsm_by(shifted=True),)),
        Mistake(
            "fresh noise",
            (
                "x_t is made with new noise, but compared with the eps passed in: the two have nothing to do "
                "with one another."
            ),
            (_dsm_by(fresh=True),),
        ),
        Mistake(
            "root",
            "This is the root of the mean square: another function, with another gradient scale.",
            (_dsm_by(root=True),),
        ),
        Mistake(
            "detached",
            "The loss is cut off from the model: it shows a number, and nothing is learned.",
            (_dsm_by(detach=True),),
        ),
        Mistake(
            "score weight",
            "You divide by 1 - abar: that is the score-matching weight, which the simple loss drops.",
            (_dsm_by(weighted=True),),
        ),
        Mistake(
            "target x0", "You compare the prediction with x0; this network predicts the noise.", (_dsm_by(x0=True),)
        ),
    ),
    alternatives=((_dsm_loop,), (_dsm_einsum,)),
    hints=(
        "Three steps: make x_t from x0 and eps, ask model(x_t, t), compare with what the network should have said.",
        "((model(x_t, t) - eps) ** 2).mean() with x_t = sqrt(abar) x0 + sqrt(1 - abar) eps.",
    ),
    hides=("train.diffusion_loss",),
)

# --- 01.7 ddpm_mean, ddpm_step ----------------------------------------------------------------------------------------


def _ddpm_inputs(g: Generator) -> dict:
    xt, eps, z = pictures(g, 3)
    t, abar = times(g), random_abar(g)
    t[integer(g, 0, 3)] = 1
    return {
        "ddpm_mean": dict(xt=xt, eps=eps, t=t, abar=abar),
        "ddpm_step": dict(
            xt=xt.clone(),
            eps=eps.clone(),
            t=t.clone(),
            z=z,
            abar=abar.clone(),
            variance=("posterior", "beta")[integer(g, 0, 1)],
        ),
    }


def _ddpm_bayes(answer: Answer, g: Generator) -> None:
    """q(x_{t-1} | x_t, x0) by multiplying two Gaussians: precisions add."""
    x0, eps, t, abar, xt = _noised(g)
    a, _ = _a_sigma(abar, t, x0)
    ahead, noise = _a_sigma(abar, t - 1, x0)
    keep = (a / ahead) ** 2
    precision = keep / (1 - keep) + 1 / noise**2
    mean = (keep.sqrt() / (1 - keep) * xt + ahead / noise**2 * x0) / precision
    need(answer.call("ddpm_mean", xt, eps, t, abar), mean, "it is not the mean of q(x_{t-1} | x_t, x0)")


def _ddpm_one(answer: Answer, g: Generator) -> None:
    """From t = 1 the mean is x0 itself."""
    x0, eps = pictures(g, 2)
    abar, t = random_abar(g), torch.ones(4, dtype=torch.long)
    a, sigma = _a_sigma(abar, t, x0)
    need(answer.call("ddpm_mean", a * x0 + sigma * eps, eps, t, abar), x0, "the last mean (t = 1) must be x0")


def _ddpm_noise(answer: Answer, g: Generator) -> None:
    xt, eps, z = pictures(g, 3)
    t, abar = times(g), random_abar(g)
    for variance in ("posterior", "beta"):
        added = answer.call("ddpm_step", xt, eps, t, z, abar, variance) - answer.call(
            "ddpm_step", xt, eps, t, 0 * z, abar, variance
        )
        beta = 1 - abar[t] / abar[t - 1]
        # by precisions: 1 / var = alpha / beta + 1 / (1 - abar[t-1])
        right = beta if variance == "beta" else 1 / ((1 - beta) / beta + 1 / (1 - abar[t - 1]))
        got = (added**2).flatten(1).sum(1) / (z**2).flatten(1).sum(1)
        if close(got, right**2):
            raise Wrong(f'variance="{variance}": z is multiplied by the variance; a standard deviation is due')
        need(got, right, f'variance="{variance}": the noise that is added has another variance')


def _ddpm_default(answer: Answer, g: Generator) -> None:
    xt, eps, z = pictures(g, 3)
    t, abar = times(g), random_abar(g)
    need(
        answer.call("ddpm_step", xt, eps, t, z, abar),
        answer.call("ddpm_step", xt, eps, t, z, abar, "posterior"),
        'variance must default to "posterior"',
    )
    need(
        answer.call("ddpm_step", xt, eps, t, 0 * z, abar),
        answer.call("ddpm_mean", xt, eps, t, abar),
        "without z, ddpm_step must be ddpm_mean",
    )


def _ddpm_last(answer: Answer, g: Generator) -> None:
    xt, eps, z = pictures(g, 3)
    abar, t = random_abar(g), torch.tensor([1, 5, 1, 9])
    for variance in ("posterior", "beta"):
        added = answer.call("ddpm_step", xt, eps, t, z, abar, variance) - answer.call(
            "ddpm_step", xt, eps, t, 0 * z, abar, variance
        )
        size = added.flatten(1).abs().sum(1)
        if (size[[0, 2]] > 1e-9).any():
            raise Wrong(f'variance="{variance}": the last step (t = 1) adds noise: x_0 would come out grainy')
        if (size[[1, 3]] < 1e-9).any():
            raise Wrong(f'variance="{variance}": one example at t = 1 silences the noise of the whole batch')


def _ddpm_ends(answer: Answer, g: Generator) -> object:
    xt, eps, z = pictures(g, 3)
    t, abar = torch.tensor([1, 5, 1, 9]), random_abar(g)
    return [answer.call("ddpm_step", xt, eps, t, z, abar, variance) for variance in ("posterior", "beta")]


def _ddpm_by(
    on_eps: Callable, over: Callable = lambda ab, t: _alpha(ab, t).sqrt(), sign: float = -1.0
) -> tuple[Callable, Callable]:
    def ddpm_mean(xt: Tensor, eps: Tensor, t: Tensor, abar: Tensor) -> Tensor:
        return (xt + sign * pad(on_eps(abar, t), xt) * eps) / pad(over(abar, t), xt)

    def step(xt: Tensor, eps: Tensor, t: Tensor, z: Tensor, abar: Tensor, variance: str = "posterior") -> Tensor:
        return ddpm_mean(xt, eps, t, abar) + ddpm_step(0 * xt, 0 * eps, t, z, abar, variance)

    return ddpm_mean, step


def _step_by(std: Callable) -> tuple[Callable, Callable]:
    def step(xt: Tensor, eps: Tensor, t: Tensor, z: Tensor, abar: Tensor, variance: str = "posterior") -> Tensor:
        beta = 1 - _alpha(abar, t)
        tilde = (1 - abar[t - 1]) / (1 - abar[t]) * beta
        return ddpm_mean(xt, eps, t, abar) + pad(std(beta, tilde, t, variance), xt) * z

    return ddpm_mean, step


def _beta_over_sigma(ab: Tensor, t: Tensor) -> Tensor:
    return (1 - _alpha(ab, t)) / (1 - ab[t]).sqrt()


def _mean_via_x0(xt: Tensor, eps: Tensor, t: Tensor, abar: Tensor) -> Tensor:
    x0 = x0_from_eps(xt, eps, t, abar)
    on_x0 = abar[t - 1].sqrt() * (1 - abar[t] / abar[t - 1]) / (1 - abar[t])
    on_xt = (abar[t] / abar[t - 1]).sqrt() * (1 - abar[t - 1]) / (1 - abar[t])
    return torch.einsum("b,b...->b...", on_x0, x0) + torch.einsum("b,b...->b...", on_xt, xt)


def _step_via_x0(xt: Tensor, eps: Tensor, t: Tensor, z: Tensor, abar: Tensor, variance: str = "posterior") -> Tensor:
    beta = 1 - abar[t] / abar[t - 1]
    var = torch.where(t == 1, 0, beta) if variance == "beta" else beta * (1 - abar[t - 1]) / (1 - abar[t])
    return _mean_via_x0(xt, eps, t, abar) + pad(var**0.5, xt) * z


def _step_loop(xt: Tensor, eps: Tensor, t: Tensor, z: Tensor, abar: Tensor, variance: str = "posterior") -> Tensor:
    rows = []
    for x, e, n, noise in zip(xt, eps, t.tolist(), z, strict=True):
        alpha = float(abar[n] / abar[n - 1])
        std = {"beta": 1 - alpha, "posterior": (1 - float(abar[n - 1])) / (1 - float(abar[n])) * (1 - alpha)}[
            variance
        ] ** 0.5
        row = (x - (1 - alpha) / (1 - float(abar[n])) ** 0.5 * e) / alpha**0.5
        rows.append(row + std * noise if n > 1 else row)
    return torch.stack(rows)


DDPM = Exercise(
    id="01.7",
    names=("ddpm_mean", "ddpm_step"),
    references=(ddpm_mean, ddpm_step),
    inputs=_ddpm_inputs,
    batch=("xt", "eps", "t", "z"),
    formulas=(
        Formula(
            "ddpm_mean",
            "ddpm_mean",
            ("xt", "eps"),
            "ddpm_mean = (1/sqrt(alpha[t]))*xt - (beta[t]/(sqrt(1 - abar[t])*sqrt(alpha[t])))*eps",
            ddpm_probes,
        ),
    ),
    facts=(
        Fact(
            "the mean is that of q(x_{t-1} | x_t, x0), from Bayes",
            _ddpm_bayes,
            "alpha_t belongs to one step, abar_t to all of them",
        ),
        Fact("the mean of the last step is x0", _ddpm_one, "at t = 1, alpha and abar are the same"),
        Fact("the noise has the variance asked for", _ddpm_noise, "z is multiplied by a standard deviation"),
        Fact("ddpm_step is ddpm_mean plus noise", _ddpm_default, "reuse your own ddpm_mean"),
        Fact("the last step adds no noise, the others do", _ddpm_last, "t differs between the examples of a batch"),
    ),
    mistakes=(
        Mistake(
            "abar for alpha",
            "You use abar where the single step's alpha belongs, everywhere: that is the estimate of x0, not one step.",
            _ddpm_by(lambda ab, t: (1 - ab[t]).sqrt(), lambda ab, t: ab[t].sqrt()),
        ),
        Mistake(
            "bar missing under the root",
            (
                "Under the root stands 1 - alpha_t: the noise in x_t has been gathered over all steps, so "
                "its bar is missing."
            ),
            _ddpm_by(lambda ab, t: (1 - _alpha(ab, t)).sqrt()),
        ),
        Mistake(
            "no root on 1 - abar",
            "You divide by the variance 1 - abar; eps has the scale of a standard deviation.",
            _ddpm_by(lambda ab, t: (1 - _alpha(ab, t)) / (1 - ab[t])),
        ),
        Mistake(
            "not rescaled",
            "The division by sqrt(alpha_t) is missing: the signal shrinks from step to step.",
            _ddpm_by(_beta_over_sigma, lambda ab, t: torch.ones_like(ab[t])),
        ),
        Mistake("plus", "The noise is added once more instead of being removed.", _ddpm_by(_beta_over_sigma, sign=1.0)),
        Mistake(
            "divided by alpha",
            "You divide by alpha_t instead of its root: the signal grows from step to step.",
            _ddpm_by(_beta_over_sigma, _alpha),
        ),
        Mistake(
            "noise at t = 1",
            'With variance="beta" the last step still adds noise: x_0 would come out grainy.',
            _step_by(lambda beta, tilde, t, v: beta.sqrt() if v == "beta" else tilde.sqrt()),
        ),
        Mistake(
            "variance for std",
            "z is multiplied by the variance instead of the standard deviation: far too little noise.",
            _step_by(lambda beta, tilde, t, v: torch.where(t > 1, beta if v == "beta" else tilde, 0)),
        ),
        Mistake(
            "variance ignored",
            "The argument variance has no effect: both choices are right, but the caller chooses.",
            _step_by(lambda beta, tilde, t, v: torch.where(t > 1, beta, 0).sqrt()),
        ),
        Mistake(
            "no noise",
            "No noise is added: the mean alone draws all samples together, until they are nearly one and the same.",
            _step_by(lambda beta, tilde, t, v: 0 * beta),
        ),
    ),
    alternatives=((_mean_via_x0, _step_via_x0), (ddpm_mean, _step_loop)),
    hints=(
        (
            "For the mean: 1 / sqrt(alpha_t) times (x_t minus something times eps). Three letters meet "
            "there: alpha, beta, abar."
        ),
        "(xt - beta / sqrt(1 - abar) eps) / sqrt(alpha); plus sqrt(variance) z where t > 1.",
    ),
    probe=_ddpm_ends,
    hides=("samplers.ddpm_step", "samplers.posterior"),
    points=2,
)

# --- 01.8 ddim_step ---------------------------------------------------------------------------------------------------


def _earlier(t: Tensor, g: Generator) -> Tensor:
    """For each t >= 4 an s between 1 and t - 2."""
    return (1 + torch.rand(t.shape, generator=g) * (t - 2)).long()


def _ddim_inputs(g: Generator) -> dict:
    xt, eps = pictures(g, 2)
    t = times(g, low=4)
    return {"ddim_step": dict(xt=xt, eps=eps, t=t, s=_earlier(t, g), abar=random_abar(g))}


def _ddim_line(answer: Answer, g: Generator) -> None:
    x0, eps, _, abar, _ = _noised(g)
    t = times(g, low=4)
    s = _earlier(t, g)
    a, sigma = _a_sigma(abar, t, x0)
    a_s, sigma_s = _a_sigma(abar, s, x0)
    got = answer(a * x0 + sigma * eps, eps, t, s, abar)
    if (got - a_s * x0).norm() > 1.05 * (a * x0 + sigma * eps - a * x0).norm():
        raise Wrong("after the step there is more noise than before: are s and t exchanged?")
    need(
        got,
        a_s * x0 + sigma_s * eps,
        "from sqrt(abar_t) x0 + sqrt(1 - abar_t) eps it must arrive at the same x0 and eps, at s",
    )


def _ddim_jump(answer: Answer, g: Generator) -> None:
    xt, eps = pictures(g, 2)
    abar = random_abar(g)
    t, m, s = (torch.full((4,), n) for n in (30, 18, 7))
    twice = answer(answer(xt, eps, t, m, abar), eps, m, s, abar)
    need(twice, answer(xt, eps, t, s, abar), "with the same eps, 30 -> 18 -> 7 must be the step 30 -> 7")


def _ddim_end(answer: Answer, g: Generator) -> None:
    x0, eps, t, abar, xt = _noised(g)
    need(answer(xt, eps, t, 0 * t, abar), x0, "the step to s = 0 must return x0")


def _ddim_by(f: Callable) -> tuple[Callable]:
    return (lambda xt, eps, t, s, abar: f(xt, eps, pad(abar[t], xt), pad(abar[s], xt), t, s, abar),)


def _to_x0(xt: Tensor, eps: Tensor, at: Tensor) -> Tensor:
    return (xt - (1 - at).sqrt() * eps) / at.sqrt()


def _ddim_sigma_form(xt: Tensor, eps: Tensor, t: Tensor, s: Tensor, abar: Tensor) -> Tensor:
    """In x / a and sigma / a a step is a shift."""
    ratio = ((1 - abar) / abar).sqrt()
    moved = xt / pad(abar[t].sqrt(), xt) + pad(ratio[s] - ratio[t], xt) * eps
    return pad(abar[s].sqrt(), xt) * moved


def _ddim_loop(xt: Tensor, eps: Tensor, t: Tensor, s: Tensor, abar: Tensor) -> Tensor:
    table = abar.tolist()
    rows = []
    for x, e, n, m in zip(xt, eps, t.tolist(), s.tolist(), strict=True):
        x0 = (x - math.sqrt(1 - table[n]) * e) / math.sqrt(table[n])
        rows.append(math.sqrt(table[m]) * x0 + math.sqrt(1 - table[m]) * e)
    return torch.stack(rows)


def _ddim_probes(g: Generator) -> tuple:
    return ddpm_probes(g, earlier=True)


DDIM = Exercise(
    id="01.8",
    names=("ddim_step",),
    references=(ddim_step,),
    inputs=_ddim_inputs,
    batch=("xt", "eps", "t", "s"),
    formulas=(
        Formula(
            "ddim_step",
            "xs",
            ("xt", "eps"),
            (
                "xs = (sqrt(abar[s])/sqrt(abar[t]))*xt + (sqrt(1 - abar[s]) - sqrt(1 - "
                "abar[t])*sqrt(abar[s])/sqrt(abar[t]))*eps"
            ),
            _ddim_probes,
        ),
    ),
    facts=(
        Fact("stays on the line through x0 and eps", _ddim_line, "estimate x0, then noise it again, to s"),
        Fact(
            "two steps with one eps are one long step",
            _ddim_jump,
            "everything about the goal is read at s, not at t - 1",
        ),
        Fact("the step to s = 0 is x0", _ddim_end, "abar[0] = 1: what is left of the noise?"),
    ),
    mistakes=(
        Mistake(
            "t - 1 for s",
            "The goal is read at t - 1: the step does not go where it was sent, so long steps are wrong.",
            _ddim_by(
                lambda xt, eps, at, as_, t, s, ab: (
                    pad(ab[t - 1].sqrt(), xt) * _to_x0(xt, eps, at) + pad((1 - ab[t - 1]).sqrt(), xt) * eps
                )
            ),
        ),
        Mistake(
            "noised again to t",
            "x0 is noised again to t, not to s: you stand where you started.",
            _ddim_by(lambda xt, eps, at, as_, t, s, ab: at.sqrt() * _to_x0(xt, eps, at) + (1 - at).sqrt() * eps),
        ),
        Mistake(
            "no noise put back",
            "x0 is scaled to s without its noise: the result is too clean for time s.",
            _ddim_by(lambda xt, eps, at, as_, t, s, ab: as_.sqrt() * _to_x0(xt, eps, at)),
        ),
        Mistake(
            "stops at x0",
            "You return the estimate of x0 whatever s is.",
            _ddim_by(lambda xt, eps, at, as_, t, s, ab: _to_x0(xt, eps, at)),
        ),
        Mistake(
            "clipped",
            "The estimate of x0 is cut to [-1, 1]. Some samplers do that for pictures; a step on the line must not.",
            _ddim_by(
                lambda xt, eps, at, as_, t, s, ab: (
                    as_.sqrt() * _to_x0(xt, eps, at).clamp(-1, 1) + (1 - as_).sqrt() * eps
                )
            ),
        ),
        Mistake(
            "new noise",
            "New noise is drawn where the predicted eps belongs: that is not deterministic.",
            _ddim_by(
                lambda xt, eps, at, as_, t, s, ab: (
                    as_.sqrt() * _to_x0(xt, eps, at) + (1 - as_).sqrt() * torch.randn_like(eps)
                )
            ),
        ),
        Mistake(
            "s and t exchanged",
            "s and t are exchanged: each step makes the picture noisier.",
            _ddim_by(lambda xt, eps, at, as_, t, s, ab: at.sqrt() * _to_x0(xt, eps, as_) + (1 - at).sqrt() * eps),
        ),
        Mistake(
            "last step one short",
            "s = 0 is treated as s = 1: a grain of noise stays in the last picture.",
            _ddim_by(lambda xt, eps, at, as_, t, s, ab: ddim_step(xt, eps, t, s.clamp(min=1), ab)),
        ),
        Mistake(
            "variance for std",
            "The noise is put back with the variance 1 - abar_s instead of the standard deviation.",
            _ddim_by(lambda xt, eps, at, as_, t, s, ab: as_.sqrt() * _to_x0(xt, eps, at) + (1 - as_) * eps),
        ),
    ),
    alternatives=((_ddim_sigma_form,), (_ddim_loop,)),
    hints=(
        "Two lines: what x0 do xt and eps imply? And what is that x0 with the same eps at time s?",
        "x0 = (xt - sqrt(1 - abar_t) eps) / sqrt(abar_t); then sqrt(abar_s) x0 + sqrt(1 - abar_s) eps.",
    ),
    hides=("samplers.ddim_step",),
    probe=lambda answer, g: answer(
        randn(g, 3, 2), randn(g, 3, 2), torch.tensor([9, 5, 7]), torch.zeros(3, dtype=torch.long), random_abar(g)
    ),
)

# --- 01.9 my_ddim_test ------------------------------------------------------------------------------------------------


def _only_shape(step: Callable) -> None:
    x = torch.randn(3, 2).double()
    assert (
        step(x, x, torch.tensor([5, 6, 7]), torch.tensor([1, 2, 3]), torch.linspace(1, 0.1, 10).double()).shape
        == x.shape
    )


def _only_end(step: Callable) -> None:
    x0, eps, abar = torch.randn(3, 2).double(), torch.randn(3, 2).double(), torch.linspace(1, 0.1, 10).double()
    t = torch.tensor([5, 6, 7])
    xt = abar[t].sqrt()[:, None] * x0 + (1 - abar[t]).sqrt()[:, None] * eps
    assert torch.allclose(step(xt, eps, t, 0 * t, abar), x0)


def _only_neighbours(step: Callable) -> None:
    x0, eps, abar = torch.randn(3, 2).double(), torch.randn(3, 2).double(), torch.linspace(1, 0.1, 10).double()
    t = torch.tensor([5, 6, 7])
    xt, xs = (abar[n].sqrt()[:, None] * x0 + (1 - abar[n]).sqrt()[:, None] * eps for n in (t, t - 1))
    assert torch.allclose(step(xt, eps, t, t - 1, abar), xs)


def _own_wrong_formula(step: Callable) -> None:
    x, abar = torch.randn(3, 2).double(), torch.linspace(1, 0.1, 10).double()
    t, s = torch.tensor([5, 6, 7]), torch.tensor([1, 2, 3])
    x0 = (x - (1 - abar[t])[:, None] * x) / abar[t].sqrt()[:, None]
    assert torch.allclose(step(x, x, t, s, abar), abar[s].sqrt()[:, None] * x0 + (1 - abar[s]).sqrt()[:, None] * x)


def _composes(step: Callable) -> None:
    xt, eps, abar = torch.randn(3, 2).double(), torch.randn(3, 2).double(), torch.linspace(1, 0.1, 10).double()
    t, m, s = torch.tensor([9, 8, 7]), torch.tensor([6, 5, 4]), torch.tensor([2, 3, 1])
    assert torch.allclose(step(step(xt, eps, t, m, abar), eps, m, s, abar), step(xt, eps, t, s, abar))


_planted = {mistake.name: mistake.answers[0] for mistake in DDIM.mistakes}


def _ddim_from_scratch(step: Callable) -> None:
    for _ in range(5):
        abar = random_abar(Generator().manual_seed(int(torch.randint(1000, ()))))
        x0, eps = 2 * torch.randn(6, 4, 2, dtype=torch.float64), torch.randn(6, 4, 2, dtype=torch.float64)
        t = torch.randint(5, 40, (6,))
        s = torch.tensor([0, 1, 2, 3, 0, 4])
        angle = torch.acos(abar.sqrt())
        points = [angle[n].cos()[:, None, None] * x0 + angle[n].sin()[:, None, None] * eps for n in (t, s)]
        if not torch.allclose(step(points[0], eps, t, s, abar), points[1]):
            raise ValueError("off the path")


def _ddim_loops(step: Callable) -> None:
    abar = torch.tensor([1.0, 0.9, 0.7, 0.4, 0.2], dtype=torch.float64)
    for t in range(1, 5):
        for s in range(t):
            x0, eps = torch.tensor([[1.7, -0.3]]).double(), torch.tensor([[-0.4, 1.1]]).double()
            xt = float(abar[t]) ** 0.5 * x0 + (1 - float(abar[t])) ** 0.5 * eps
            xs = float(abar[s]) ** 0.5 * x0 + (1 - float(abar[s])) ** 0.5 * eps
            difference = step(xt, eps, torch.tensor([t]), torch.tensor([s]), abar) - xs
            assert difference.abs().max() < 1e-9


TEST = test_exercise(
    "01.9",
    "my_ddim_test",
    my_ddim_test,
    right=(ddim_step, _ddim_sigma_form, _ddim_loop),
    wrong=tuple(
        (hint, _planted[name])
        for name, hint in (
            ("t - 1 for s", "one that goes to t - 1, wherever it is sent"),
            ("no noise put back", "one that puts no noise back"),
            ("new noise", "one that puts new noise back"),
            ("last step one short", "one that goes to s = 1 when sent to s = 0"),
            ("s and t exchanged", "one that has s and t exchanged"),
            ("variance for std", "one that puts the variance for the standard deviation"),
        )
    ),
    needed=5,
    mistakes=(
        Mistake(
            "shape only", "Your test looks at the shape alone: every wrong formula has the right shape.", (_only_shape,)
        ),
        Mistake("the end only", "Your test looks at s = 0 only: whoever returns x0 always passes it.", (_only_end,)),
        Mistake(
            "neighbours only",
            "Your test steps from t to t - 1 only: DDIM is there for long steps, and for the last one.",
            (_only_neighbours,),
        ),
        Mistake(
            "a wrong formula of its own",
            "Your test refuses correct functions: the formula it compares with is wrong, or it is too strict, with == "
            "where allclose is due.",
            (_own_wrong_formula,),
        ),
    ),
    alternatives=(_ddim_from_scratch, _ddim_loops),
    hides=("samplers.ddim_step",),
    hints=(
        "You may choose x0 and eps yourself and make x_t from them. What must come out then at s, and at s = 0?",
        (
            "From a_t x0 + sigma_t eps the step must arrive at a_s x0 + sigma_s eps, for several s that "
            "are not t - 1, and at x0 for s = 0."
        ),
    ),
)

EXERCISES = (MAKE_ABAR, Q_SAMPLE, SCORE, PAIR, POSTERIOR, DSM, DDPM, DDIM, TEST)
