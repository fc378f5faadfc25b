"""Exercises of lesson 04: classifier-free guidance, what it samples, and what people do about it."""

import math
from collections.abc import Callable
from functools import cache
from itertools import permutations

import torch
from torch import Generator, Tensor, nn

from condiff_ref.mixture import archipelago
from condiff_ref.schedules import discrete
from condiff_ref.shapes import pad

from . import lesson04_remedies
from .compare import close
from .draws import PICTURES, integer, randn, times
from .exercise import Answer, Exercise, Fact, Mistake, Wrong, need
from .guard import Failed
from .lesson02 import Recorder
from .oracle import exact_eps
from .xray import Atoms, Formula, random_abar

# --- the reference answers, as the solutions show them ----------------------------------------------------------------


def cfg(eps_c: Tensor, eps_u: Tensor, s: float) -> Tensor:
    """The guided prediction at scale s, from one with the label, eps_c, and one without it, eps_u.

    s = 0 gives the unconditional, s = 1 the conditional one; other s lie on the same straight line. Shapes stay.
    """
    return eps_u + s * (eps_c - eps_u)


def convert_scale(
    value: float, src: str, dst: str, noise: float | None = None, next_noise: float | None = None
) -> float:
    """A guidance strength in another convention.

    "s": eps_u + s (eps_c - eps_u), this course, diffusers, Imagen. "w": (1 + w) eps_c - w eps_u, Ho & Salimans.
    "omega": eps_u - omega sigma grad log p(y | x_t), a classifier on an unconditional model. "beta": 1 / s,
    guidance-free training; infinite for s = 0. "lambda": CFG++, a strength per step: s = lambda noise / (noise -
    next_noise), where the step goes from one sigma / alpha, `noise`, to the next, smaller one. Only "lambda" needs the
    two noise levels.
    """

    def factor():
        return noise / (noise - next_noise)

    match src:
        case "s" | "omega":
            s = value
        case "w":
            s = 1 + value
        case "beta":
            s = math.inf if value == 0 else 1 / value
        case "lambda":
            s = value * factor()
    match dst:
        case "s" | "omega":
            return s
        case "w":
            return s - 1
        case "beta":
            return math.inf if s == 0 else 1 / s
        case "lambda":
            return s / factor()


def cfg_forward(model: nn.Module, x: Tensor, t: Tensor, y: Tensor, null: int, s: float | Tensor) -> Tensor:
    """The guided prediction of model(x, t, y), asked once, about a batch of 2 B. s: one scale, or one per example (B,).

    x (B, ...), t (B,), y (B,); the label `null` means none. The model stays in its mode, train or eval. (B, ...).
    """
    labels = torch.cat([y, torch.full_like(y, null)])
    eps_c, eps_u = model(torch.cat([x, x]), torch.cat([t, t]), labels).chunk(2)
    if isinstance(s, Tensor):
        s = pad(s, x)
    return eps_u + s * (eps_c - eps_u)


def cfg_gaussian_var(vc: float, vu: float, s: float, kind: str) -> float:
    """The variance that guidance at scale s ends at, where p(x | y) = N(0, vc) and p(x) = N(0, vu), with exact scores.

    "tilt": of the density proportional to p(x | y)^s p(x)^(1-s). "ode": of samples by DDIM or any other solver of the
    probability-flow ODE, in the limit of small steps. "sde": of samples by DDPM, in the same limit. Raises ValueError
    where the tilt has no finite variance.
    """
    if kind == "tilt":
        precision = s / vc + (1 - s) / vu
        if precision <= 0:
            raise ValueError(f"at scale {s} the tilt cannot be normalised: its precision is {precision:.3g}")
        return 1 / precision
    if kind == "ode":
        return vc**s * vu ** (1 - s)
    r = vu / vc  # "sde"
    if r == 1:
        return vc
    k = 2 * s - 1
    growth = math.log(r) if k == 0 else (r**k - 1) / k
    return vc ** (2 * s) * vu ** (2 - 2 * s) * growth / (vu - vc)


def tilt_by_rejection(x: Tensor, p: Tensor, s: float, gen: Generator) -> Tensor:
    """From samples x (N, D) of p(x | y), keep some, so that those kept are distributed as p(x | y) p(y | x)^(s - 1).

    p (N,) is p(y | x) at each of them, s >= 1. Each is kept or not by a coin of its own, drawn from gen, whose chance
    depends on its own p and s alone, and is 1 where p = 1. (number kept, D).
    """
    u = torch.rand(len(x), generator=gen, dtype=p.dtype).to(p.device)
    return x[u < p ** (s - 1)]


# --- what every answer is tried on ------------------------------------------------------------------------------------

NO_TENSORS = ("keeps the dtype of its inputs", "leaves its arguments as they were", "leaves no graph behind")


def _uniform(g: Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=g, dtype=torch.float64))


def _gen(g: Generator) -> Generator:
    return Generator().manual_seed(integer(g, 0, 10**6))


def _outcome(answer: Answer, *args: object) -> object:
    """The result, or the name of the error."""
    try:
        return answer(*args)
    except Failed as error:
        return type(error.__cause__).__name__


def _same(got: object, right: float, what: str, rtol: float = 1e-6) -> None:
    """Raise Wrong unless a number is right."""
    if not isinstance(got, int | float | Tensor):
        raise Wrong(f"{what}; yours is of type {type(got).__name__}", expected=f"{right:.6g}")
    if not math.isclose(float(got), right, rel_tol=rtol, abs_tol=1e-9):
        raise Wrong(f"{what}; yours is {float(got):.6g}", expected=f"{right:.6g}")


# --- 04.1 cfg ---------------------------------------------------------------------------------------------------------


def _cfg_inputs(g: Generator) -> dict:
    shape = (4, 5, 2, 3)  # more than three channels
    return {"cfg": dict(eps_c=randn(g, *shape), eps_u=randn(g, *shape), s=_uniform(g, 1.5, 8))}


def _cfg_scales(g: Generator) -> tuple[list[dict[str, object]], Atoms]:
    s = 1.2 + 7 * torch.rand(9, generator=g, dtype=torch.float64)
    return [dict(s=float(v)) for v in s], {"s": s, "s - 1": s - 1, "1 + s": 1 + s}


def _cfg_ends(answer: Answer, g: Generator) -> None:
    eps_c, eps_u = randn(g, 3, 5, 4), randn(g, 3, 5, 4)  # more than three channels
    need(answer(eps_c.clone(), eps_u.clone(), 0.0), eps_u, "s = 0 must give the unconditional prediction, eps_u")
    need(answer(eps_c.clone(), eps_u.clone(), 1.0), eps_c, "s = 1 must give the conditional prediction, eps_c")


def _cfg_by_hand(answer: Answer, g: Generator) -> None:
    for s, right in ((3.0, -1.75), (0.5, 0.125), (5.0, -3.25)):
        eps_c, eps_u = (torch.full((1, 1), v, dtype=torch.float64) for v in (-0.25, 0.5))
        got = answer(eps_c, eps_u, s)
        if (got > 0.5).all():
            raise Wrong(f"eps_c = -0.25, eps_u = 0.5, s = {s:g} gave {float(got):g}: that leads away from eps_c")
        _same(got, right, f"eps_c = -0.25, eps_u = 0.5, s = {s:g}")


def _cfg_agree(answer: Answer, g: Generator) -> None:
    eps, s = randn(g, 3, 2, 4), _uniform(g, 2, 8)
    got = answer(eps.clone(), eps.clone(), s)
    total = float((got * eps).sum() / (eps * eps).sum())
    if close(got, total * eps) and not math.isclose(total, 1, rel_tol=1e-6):
        raise Wrong(f"s = {s:.3g}: the weights of eps_c and eps_u add up to {total:.4g}", expected="1")
    need(got, eps, f"where eps_c and eps_u are equal, the result is the same (s = {s:.3g})")


def _cfg_linear(answer: Answer, g: Generator) -> None:
    eps_c, eps_u, s = randn(g, 3, 2, 4), randn(g, 3, 2, 4), _uniform(g, 2, 8)
    if not close(answer(100 * eps_c, 100 * eps_u, s), 100 * answer(eps_c.clone(), eps_u.clone(), s), rtol=1e-5):
        raise Wrong("100 times the predictions do not give 100 times the result: is something clipped or normalised?")
    one, two, three = (answer(eps_c.clone(), eps_u.clone(), v) for v in (s, s + 1, s + 2))
    need(three - two, two - one, f"from s = {s:.3g} on, two steps of 1 in s change the result differently")


def _cfg_classifier(answer: Answer, g: Generator) -> None:
    """Bayes: score_c - score_u is the gradient of log p(y | xt), here by autograd."""
    world, abar, label = archipelago(), random_abar(g), integer(g, 0, 2)
    t, xt, s = times(g, 6), 1.5 * randn(g, 6, 2), _uniform(g, 1.5, 6)
    x = xt.clone().requires_grad_()
    with torch.enable_grad():
        log_p = world.class_log_prob(x, t.double(), discrete(abar), label).sum()
    gradient = torch.autograd.grad(log_p, x)[0]
    eps_u = exact_eps(world, xt, t, abar)
    right = eps_u - s * (1 - abar[t]).sqrt()[:, None] * gradient
    got = answer(exact_eps(world.given(label), xt, t, abar), eps_u, s)
    need(got, right, f"s = {s:.3g}: it must be what the exact classifier p(y | x_t) gives at the same scale")


def _cfg_in_place(eps_c: Tensor, eps_u: Tensor, s: float) -> Tensor:
    eps_c -= eps_u
    eps_c *= s
    eps_c += eps_u
    return eps_c


def _cfg_perpendicular(eps_c: Tensor, eps_u: Tensor, s: float) -> Tensor:
    d, u = (eps_c - eps_u).flatten(1), eps_u.flatten(1)
    d = d - (d * u).sum(1, keepdim=True) / (u * u).sum(1, keepdim=True) * u
    return eps_u + s * d.view_as(eps_u)


def _cfg_three_channels(eps_c: Tensor, eps_u: Tensor, s: float) -> Tensor:
    return torch.cat([eps_u[:, :3] + s * (eps_c[:, :3] - eps_u[:, :3]), eps_c[:, 3:]], dim=1)


def _weights(like: Tensor, s: float) -> Tensor:
    return torch.tensor([s, 1 - s], dtype=like.dtype, device=like.device)


CFG = Exercise(
    id="04.1",
    names=("cfg",),
    references=(cfg,),
    inputs=_cfg_inputs,
    batch=("eps_c", "eps_u"),
    formulas=(Formula("cfg", "eps", ("eps_c", "eps_u"), "eps = s*eps_c - (s - 1)*eps_u", _cfg_scales),),
    facts=(
        Fact("s = 0 gives eps_u and s = 1 gives eps_c", _cfg_ends, "start at eps_u and walk the way to eps_c s times"),
        Fact("one entry, by hand", _cfg_by_hand, "a straight line through eps_u (s = 0) and eps_c (s = 1), and on"),
        Fact("changes nothing where both predictions agree", _cfg_agree, "what do the two weights add up to?"),
        Fact("is linear in the predictions, and in s", _cfg_linear, "sums, and products with s: nothing else"),
        Fact(
            "is classifier guidance, in the exact world",
            _cfg_classifier,
            "eps_c - eps_u is -sigma times the gradient of log p(y | x_t)",
        ),
    ),
    mistakes=(
        Mistake(
            "swapped",
            "eps_c and eps_u are exchanged: s = 0 is conditional, and every larger s leads away from the class.",
            (lambda eps_c, eps_u, s: eps_c + s * (eps_u - eps_c),),
        ),
        Mistake(
            "1 + w",
            "This is (1 + w) eps_c - w eps_u, the convention of Ho & Salimans. In this course s = 1 + w: your 3 guides "
            "as strongly as 4 should.",
            (lambda eps_c, eps_u, s: (1 + s) * eps_c - s * eps_u,),
        ),
        Mistake(
            "lost sign",
            "You wrote (s - 1) eps_u where (1 - s) eps_u is due, as the pages of a known library did: the weights "
            "add up to 2 s - 1 instead of 1.",
            (lambda eps_c, eps_u, s: s * eps_c + (s - 1) * eps_u,),
        ),
        Mistake(
            "sum",
            "eps_u is not subtracted from eps_c: the weights add up to 1 + s, and so the predicted noise is about that "
            "many times too large. They must add up to 1.",
            (lambda eps_c, eps_u, s: eps_u + s * eps_c,),
        ),
        Mistake(
            "difference alone",
            "You return s (eps_c - eps_u) alone, without the eps_u that it is added to: no prediction of noise.",
            (lambda eps_c, eps_u, s: s * (eps_c - eps_u),),
        ),
        Mistake(
            "subtracted",
            "The difference is subtracted: guidance pushes away from the class. In eps as in x0 it is added.",
            (lambda eps_c, eps_u, s: eps_u - s * (eps_c - eps_u),),
        ),
        Mistake(
            "perpendicular part",
            "Only that part of the difference is added that is perpendicular to eps_u. So s = 1 does not return eps_c, "
            "which is what tells a projection from classifier-free guidance.",
            (_cfg_perpendicular,),
        ),
        Mistake(
            "no s",
            "The result does not depend on s: it is eps_c always, as where both passes were given the same label.",
            (lambda eps_c, eps_u, s: eps_c + s * (eps_c - eps_c),),
        ),
        Mistake(
            "off below 1",
            "For s up to 1 you return eps_c, as pipelines do that save the second pass there. But s = 0 is "
            "unconditional, and s between 0 and 1 mixes the two.",
            (lambda eps_c, eps_u, s: eps_u + s * (eps_c - eps_u) if s > 1 else eps_c,),
        ),
        Mistake(
            "clamped",
            "s is cut to [0, 1]: you interpolate between the two predictions. Guidance extrapolates beyond eps_c.",
            (lambda eps_c, eps_u, s: eps_u + min(max(s, 0.0), 1.0) * (eps_c - eps_u),),
        ),
        Mistake(
            "three channels",
            "Only the first three channels are guided, the others stay conditional. Slicing [:, :3] is for colours; "
            "latents have four channels or more, and all of them are noise.",
            (_cfg_three_channels,),
        ),
        Mistake(
            "in place",
            "You changed eps_c in place (-= or +=): the caller still needs the conditional prediction.",
            (_cfg_in_place,),
        ),
    ),
    alternatives=(
        (lambda eps_c, eps_u, s: s * eps_c + (1 - s) * eps_u,),
        (lambda eps_c, eps_u, s: torch.lerp(eps_u, eps_c, s),),
        (lambda eps_c, eps_u, s: torch.einsum("k...,k->...", torch.stack([eps_c, eps_u]), _weights(eps_c, s)),),
    ),
    hints=(
        "Walk from eps_u to eps_c: s says how often you walk that way. What is the way, as a difference of the two?",
        "eps_u + s (eps_c - eps_u).",
    ),
    hides=("guidance.cfg",),
    probe=lambda answer, g: [answer(randn(g, 3, 4), randn(g, 3, 4), s) for s in (0.0, 0.3, 1.0, 1.5)],
)

# --- 04.2 convert_scale -----------------------------------------------------------------------------------------------

CONVENTIONS = ("s", "w", "omega", "beta", "lambda")


def _levels(*conventions: str) -> tuple[float, float] | tuple[()]:
    return (3.0, 2.0) if "lambda" in conventions else ()


def _scale_inputs(g: Generator) -> dict:
    src, dst = (CONVENTIONS[i] for i in torch.randperm(5, generator=g)[:2].tolist())
    noise = _uniform(g, 1, 4)
    step = dict(noise=noise, next_noise=_uniform(g, 0.1, 0.9) * noise)
    return {"convert_scale": dict(value=_uniform(g, 1.2, 4), src=src, dst=dst) | step}


def _guided(value: float, convention: str, eps_c: float, eps_u: float, noise: float, next_noise: float) -> float:
    """The guided prediction, by the definition of each convention."""
    if convention == "w":
        return (1 + value) * eps_c - value * eps_u
    if convention == "omega":
        sigma = 0.6
        gradient = (eps_c - eps_u) / -sigma  # of log p(y | xt): the difference of two scores, and score = -eps / sigma
        return eps_u - value * sigma * gradient
    if convention == "beta":  # the network g is trained so that beta g + (1 - beta) eps_u predicts the noise
        return (eps_c - (1 - value) * eps_u) / value
    if convention == "lambda":  # in units of alpha: x0 with the guided eps, noise put back with eps_u
        moved = -noise * (eps_u + value * (eps_c - eps_u)) + next_noise * eps_u
        return moved / (next_noise - noise)
    return eps_u + value * (eps_c - eps_u)


def _scale_known(answer: Answer, g: Generator) -> None:
    for value, src, dst, right, why in (
        (7.5, "s", "w", 6.5, "a pipeline's guidance_scale = 7.5 in the convention of Ho & Salimans"),
        (3.0, "w", "s", 4.0, "w = 3 of Ho & Salimans"),
        (0.0, "w", "s", 1.0, "w = 0 is the plain conditional model"),
        (2.0, "omega", "s", 2.0, "twice the classifier's gradient on an unconditional model"),
        (2.0, "omega", "w", 1.0, "the same on a conditional model, which has one gradient built in"),
        (0.5, "beta", "s", 2.0, "half of the network's output and half of eps_u make up the noise"),
        (2.4, "s", "s", 2.4, "from a convention to itself"),
    ):
        _same(answer(value, src, dst), right, f"{src} = {value:g} as {dst} ({why})")


def _scale_alike(answer: Answer, g: Generator) -> None:
    eps_c, eps_u, noise, next_noise = -0.25, 0.5, 3.0, 2.0
    for src, dst in permutations(CONVENTIONS, 2):
        value = _uniform(g, 1.2, 4)
        got = float(answer(value, src, dst, *_levels(src, dst)))
        said = f"{src} = {value:.4g} became {dst} = {got:.6g}"
        if "lambda" in (src, dst):
            said += f" (noise {noise:g}, next_noise {next_noise:g})"
        if not math.isfinite(got) or (dst == "beta" and got == 0):
            raise Wrong(f"{said}, which guides nothing")
        one, two = (_guided(v, c, eps_c, eps_u, noise, next_noise) for v, c in ((value, src), (got, dst)))
        if not math.isclose(one, two, rel_tol=1e-6):
            raise Wrong(
                f"{said}: these do not guide alike. For eps_c = {eps_c}, eps_u = {eps_u} the guided prediction is "
                f"{one:.6g} by the definition of {src} and {two:.6g} by that of {dst}"
            )


def _scale_round(answer: Answer, g: Generator) -> None:
    for src, dst in permutations(CONVENTIONS, 2):
        value = _uniform(g, 1.2, 4)
        there = answer(value, src, dst, *_levels(src, dst))
        back = answer(there, dst, src, *_levels(src, dst))
        if not math.isclose(float(back), value, rel_tol=1e-6):
            raise Wrong(f"{src} = {value:.4g} becomes {dst} = {float(there):.4g} and back {src} = {float(back):.4g}")


def _scale_zero(answer: Answer, g: Generator) -> None:
    for value, src in ((0.0, "s"), (-1.0, "w"), (0.0, "omega"), (0.0, "lambda")):
        got = _outcome(answer, value, src, "beta", *_levels(src))
        if isinstance(got, str):
            raise Wrong(f"{src} = {value:g} is unconditional; as beta it raises {got}", expected="math.inf")
        if not (float(got) == math.inf):
            raise Wrong(f"{src} = {value:g} is unconditional; as beta yours is {got}")
    _same(answer(math.inf, "beta", "s"), 0.0, "beta = inf as s")


def _scale_steps(answer: Answer, g: Generator) -> None:
    for noise, next_noise, right in ((2.0, 1.5, 2.4), (2.0, 1.0, 1.2), (0.5, 0.0, 0.6)):
        what = f"lambda = 0.6 in a step from noise {noise:g} to {next_noise:g}, as s"
        _same(answer(0.6, "lambda", "s", noise, next_noise), right, what)


_INTO_S: dict[str, Callable[[float, float, float], float]] = {
    "s": lambda v, n, m: v,
    "w": lambda v, n, m: 1 + v,
    "omega": lambda v, n, m: v,
    "beta": lambda v, n, m: math.inf if v == 0 else 1 / v,
    "lambda": lambda v, n, m: v * n / (n - m),
}
_OUT_OF_S = _INTO_S | {
    "w": lambda s, n, m: s - 1,
    "lambda": lambda s, n, m: s * (n - m) / n,
}


def _scale_by(into: dict[str, Callable] | None = None, out: dict[str, Callable] | None = None) -> tuple[Callable]:
    def convert_scale(value, src, dst, noise=None, next_noise=None):
        s = (_INTO_S | (into or {}))[src](value, noise, next_noise)
        return (_OUT_OF_S | (out or into or {}))[dst](s, noise, next_noise)

    return (convert_scale,)


def _eager(value, src, dst, noise, step):
    return convert_scale(value, src, dst, noise, noise - step)


def _scale_through_w(value, src, dst, noise=None, next_noise=None):
    """By way of w instead of s."""
    share = 1 - next_noise / noise if "lambda" in (src, dst) else 1.0
    with_no_class = math.inf
    if src == "beta":
        w = 1 / value - 1 if value else with_no_class
    else:
        w = {"s": value - 1, "omega": value - 1, "w": value, "lambda": value / share - 1}[src]
    if dst == "beta":
        return 1 / (w + 1) if w != -1 else math.inf
    return {"s": w + 1, "omega": w + 1, "w": w, "lambda": (w + 1) * share}[dst]


def _scale_see(answer: Answer, g: Generator) -> object:
    seen = [_outcome(answer, 2.5, src, dst, *_levels(src, dst)) for src in CONVENTIONS for dst in CONVENTIONS]
    seen += [_outcome(answer, v, src, "beta", *_levels(src)) for v, src in ((0.0, "s"), (-1.0, "w"), (0.0, "lambda"))]
    return [v if isinstance(v, str) else float(v) for v in seen]


CONVERT_SCALE = Exercise(
    id="04.2",
    names=("convert_scale",),
    references=(convert_scale,),
    inputs=_scale_inputs,
    without=NO_TENSORS,
    by_probe=True,
    facts=(
        Fact("known pairs", _scale_known, "at which value does each convention leave the conditional model as it is?"),
        Fact(
            "both strengths guide alike, for all pairs",
            _scale_alike,
            "set the two guided predictions equal, and compare what stands before eps_c",
        ),
        Fact(
            "CFG++ depends on the step",
            _scale_steps,
            "in one step: noise lambda (eps_c - eps_u) = (noise - next_noise) s (eps_c - eps_u)",
        ),
        Fact("there and back again", _scale_round, "each convention needs its way into s, and its way out of it"),
        Fact("no guidance at all is an infinite beta", _scale_zero, "what is 1 / s for s = 0?"),
    ),
    mistakes=(
        Mistake(
            "w one off the other way",
            "w = s + 1 is one off, the other way round: the conditional model is w = 0 and s = 1, so that s = 1 + w.",
            _scale_by({"w": lambda v, n, m: v - 1}, {"w": lambda s, n, m: s + 1}),
        ),
        Mistake(
            "w is s",
            "You take w for s. They differ by one: guidance_scale = 7.5 in a pipeline is w = 6.5 in the paper.",
            _scale_by({"w": lambda v, n, m: v}),
        ),
        Mistake(
            "omega is s - 1",
            "You take omega for w. It is the weight of a classifier on an unconditional model: omega = 1 is exact "
            "there, as s = 1 is.",
            _scale_by({"omega": lambda v, n, m: v + 1}, {"omega": lambda s, n, m: s - 1}),
        ),
        Mistake(
            "lambda without steps",
            "You take CFG++'s lambda for s, without the step sizes. It is a strength per step: with more steps the "
            "same lambda guides more.",
            _scale_by({"lambda": lambda v, n, m: v}),
        ),
        Mistake(
            "lambda upside down",
            "The factor of CFG++ is upside down: noise / (noise - next_noise) is at least 1, so s is larger than "
            "lambda.",
            _scale_by({"lambda": _OUT_OF_S["lambda"]}, {"lambda": _INTO_S["lambda"]}),
        ),
        Mistake(
            "noise levels exchanged",
            "noise and next_noise are exchanged: the strength comes out negative. Steps go from more noise to less.",
            _scale_by({"lambda": lambda v, n, m: v * m / (m - n)}, {"lambda": lambda s, n, m: s * (m - n) / m}),
        ),
        Mistake(
            "lambda by the next noise",
            "Above the fraction bar stands the noise level that the step ends at; x0 is estimated where it starts.",
            _scale_by({"lambda": lambda v, n, m: v * m / (n - m)}, {"lambda": lambda s, n, m: s * (n - m) / m}),
        ),
        Mistake(
            "noise levels always needed",
            "You compute with noise and next_noise before asking whether lambda is involved: for the other pairs they "
            "are None.",
            (lambda value, src, dst, noise=None, next_noise=None: _eager(value, src, dst, noise, noise - next_noise),),
        ),
        Mistake(
            "beta is s",
            "You take beta for s. It is one over it: the smaller beta, the stronger the guidance.",
            _scale_by({"beta": lambda v, n, m: v}),
        ),
        Mistake(
            "beta is 1 / w",
            "You take 1 / w for beta. Plain conditional training is beta = 1, where s = 1 and w = 0: it is 1 / s.",
            _scale_by(
                {"beta": lambda v, n, m: 1 + 1 / v},
                {"beta": lambda s, n, m: math.inf if s in (0, 1) else 1 / (s - 1)},
            ),
        ),
        Mistake(
            "division by zero",
            "s = 0, no guidance, divides by zero on the way to beta. Its beta is infinite: math.inf.",
            _scale_by({"beta": lambda v, n, m: 1 / v}),
        ),
        Mistake(
            "beta 0 for s = 0",
            "For s = 0 you return beta = 0, which is the other end: infinite guidance. The unconditional end is "
            "math.inf.",
            _scale_by({"beta": lambda v, n, m: 1 / v if v else 0.0}),
        ),
        Mistake(
            "direction inverted",
            "src and dst are exchanged: you convert back instead of there.",
            (lambda value, src, dst, noise=None, next_noise=None: convert_scale(value, dst, src, noise, next_noise),),
        ),
    ),
    alternatives=(_scale_by(), (_scale_through_w,)),
    hints=(
        "Write each convention as eps_u + (something) (eps_c - eps_u): the something is s. Go from src to s, then on.",
        "s = omega = 1 + w = 1 / beta = lambda noise / (noise - next_noise), and math.inf for beta where s = 0.",
    ),
    probe=_scale_see,
)

# --- 04.3 cfg_forward -------------------------------------------------------------------------------------------------


class Normed(Recorder):
    """table[y] dropout(norm(x)) + cos(t): in train mode BatchNorm mixes the examples of a batch and Dropout acts."""

    def __init__(self, g: Generator, features: int, labels: int = 12):
        super().__init__()
        self.norm = nn.BatchNorm1d(features, dtype=torch.float64)
        self.norm.running_mean.copy_(randn(g, features))
        self.norm.running_var.copy_(0.5 + torch.rand(features, generator=g, dtype=torch.float64))
        self.drop = nn.Dropout(0.5)
        self.table = nn.Parameter(1 + torch.rand(labels, generator=g, dtype=torch.float64).cumsum(0))
        self.requires_grad_(False).eval()

    def forward(self, xt: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if not isinstance(y, Tensor) or y.shape != (len(xt),):
            given = f"of shape {tuple(y.shape)}" if isinstance(y, Tensor) else f"as {type(y).__name__}"
            raise TypeError(f"the model was given y {given}: it needs a tensor ({len(xt)},), one label per example")
        return super().forward(xt, t, y)

    def answer(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h = self.drop(self.norm(x.flatten(1))).view_as(x)
        return pad(self.table[y], x) * h + pad(t.to(x.dtype).cos(), x)


class Said(Recorder):
    """-0.25 for a class, 0.5 for none."""

    def __init__(self, null: int):
        super().__init__()
        self.null = null
        self.eval()

    def answer(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.zeros_like(x) + pad(torch.where(y == self.null, 0.5, -0.25), x)


def _forward_inputs(g: Generator, *shape: int) -> dict:
    shape = shape or PICTURES
    null = integer(g, 4, 8)  # neither the first label nor the last, nor 10
    others = torch.tensor([i for i in range(1, 10) if i != null])
    y = others[torch.randperm(len(others), generator=g)[: shape[0]]]
    model, x = Normed(g, math.prod(shape[1:])), randn(g, *shape)
    args = dict(model=model, x=x, t=times(g, shape[0]), y=y, null=null, s=_uniform(g, 1.5, 6))
    return {"cfg_forward": args}


def _forward_asks(answer: Answer, g: Generator) -> None:
    model, x, t, y, null, s = _forward_inputs(g)["cfg_forward"].values()
    answer(model, x, t, y.clone(), null, s)
    if len(model.asked) != 1:
        raise Wrong(f"the model was asked {len(model.asked)} times: ask once, about a batch of {2 * len(x)}")
    one = model.asked[0]
    if len(one.xt) != 2 * len(x):
        raise Wrong(f"the model was asked about {len(one.xt)} examples; a batch of {len(x)}, twice, is {2 * len(x)}")
    for i in range(len(x)):
        rows = (one.xt == x[i]).flatten(1).all(1)
        found, labels = one.t[rows].tolist(), one.y[rows].tolist()
        if len(found) != 2:
            raise Wrong(f"the batch that the model was given has x[{i}] {len(found)} times; it should be there 2 times")
        if found != 2 * [int(t[i])]:
            raise Wrong(f"the model was given x[{i}] with the times {found[0]} and {found[1]}: its own is {int(t[i])}")
        if sorted(labels) != sorted([int(y[i]), null]):
            raise Wrong(
                f"the model was given x[{i}] with the labels {labels[0]} and {labels[1]}: ask about y[{i}] = "
                f"{int(y[i])}, and about null = {null}"
            )


def _forward_mode(answer: Answer, g: Generator) -> None:
    model, *rest = _forward_inputs(g)["cfg_forward"].values()
    answer(model, *rest)
    if any(asked.training for asked in model.asked):
        raise Wrong("the model came in eval mode and was asked in train mode: its BatchNorm mixes both halves")
    model = Said(rest[3]).train()
    answer(model, *rest)
    if not (model.training and all(asked.training for asked in model.asked)):
        raise Wrong("the model came in train mode and was put into eval mode: the caller chooses the mode")


def _forward_by_hand(answer: Answer, g: Generator) -> None:
    null = integer(g, 4, 9)
    y = torch.tensor([1, 0, 3])
    for s, right in ((3.0, -1.75), (0.0, 0.5), (1.0, -0.25)):
        got = answer(Said(null), randn(g, 3, 2, 2), times(g, 3), y, null, s)
        if s == 3 and (got > 0.5).all():
            raise Wrong(f"s = {s:g}: the prediction moves away from that for the class")
        due = torch.full((3, 2, 2), right, dtype=torch.float64)
        need(got, due, f"a model that says -0.25 for a class and 0.5 for none, at s = {s:g}")


def _forward_passes(answer: Answer, g: Generator) -> None:
    model, x, t, y, null, s = _forward_inputs(g)["cfg_forward"].values()
    right = [
        s * model(x[i : i + 1], t[i : i + 1], y[i : i + 1])
        - (s - 1) * model(x[i : i + 1], t[i : i + 1], torch.tensor([null]))
        for i in range(len(x))
    ]
    got = answer(model, x, t, y, null, s)
    need(got, torch.cat(right), f"s = {s:.3g}: two separate passes, example by example, give something else")


def _forward_scales(answer: Answer, g: Generator) -> None:
    for shape in ((4, 3, 2, 5), (4, 4)):
        model, x, t, y, null, _ = _forward_inputs(g, *shape)["cfg_forward"].values()
        s = 1.5 + randn(g, 4).abs()
        try:
            got = answer(model, x, t, y, null, s)
        except Failed as error:
            raise Wrong(f"x of shape {shape}, one scale per example, s of shape (4,): {error}") from None
        due = [answer(model, x, t, y, null, float(s[i]))[i] for i in range(4)]
        shown = ", ".join(f"{v:.2f}" for v in s)
        need(got, torch.stack(due), f"x of shape {shape}, s = ({shown}): each example must be guided at its own scale")


def _forward_by(
    batch: Callable = lambda v: torch.cat([v, v]),
    time: Callable = lambda v: torch.cat([v, v]),
    labels: Callable = lambda y, null: torch.cat([y, torch.full_like(y, null)]),
    halves: Callable = lambda out: out.chunk(2),
    scale: Callable = lambda s, x: pad(s, x) if isinstance(s, Tensor) else s,
    ready: Callable = lambda model: None,
    combine: Callable = lambda c, u, s: u + s * (c - u),
) -> tuple[Callable]:
    def cfg_forward(model, x, t, y, null, s):
        ready(model)
        eps_c, eps_u = halves(model(batch(x), time(t), labels(y, null)))
        return combine(eps_c, eps_u, scale(s, x))

    return (cfg_forward,)


def _forward_two_passes(model, x, t, y, null, s):
    eps_c, eps_u = model(x, t, y), model(x, t, torch.full_like(y, null))
    return eps_u + (pad(s, x) if isinstance(s, Tensor) else s) * (eps_c - eps_u)


def _forward_unconditional_first(model, x, t, y, null, s):
    b = len(x)
    with torch.no_grad():
        out = model(x.repeat(2, *[1] * (x.ndim - 1)), t.repeat(2), torch.cat([y.new_full((b,), null), y]))
    s = torch.as_tensor(s, dtype=x.dtype, device=x.device).reshape(-1, *[1] * (x.ndim - 1))
    return s * out[b:] + (1 - s) * out[:b]


def _forward_interleaved(model, x, t, y, null, s):
    labels = torch.stack([y, torch.full_like(y, null)], dim=1).flatten()
    out = model(x.repeat_interleave(2, dim=0), t.repeat_interleave(2), labels).unflatten(0, (len(x), 2))
    s = torch.as_tensor(s, dtype=x.dtype, device=x.device).expand(len(x))
    return torch.stack([u + a * (c - u) for a, (c, u) in zip(s, out, strict=True)])


def _forward_see(answer: Answer, g: Generator) -> object:
    seen = []
    for shape in ((4, 3, 2, 5), (4, 4)):
        for per_example in (False, True):
            model, x, t, y, null, s = _forward_inputs(g, *shape)["cfg_forward"].values()
            out = _outcome(answer, model, x, t, y, null, 1.5 + randn(g, 4).abs() if per_example else s)
            out = out.clone() if isinstance(out, Tensor) else out
            sizes = sorted(len(asked.xt) for asked in model.asked)
            seen.append([out, sizes, [asked.training for asked in model.asked], y])
    busy = Said(null).train()
    _outcome(answer, busy, x, t, y, null, s)
    return [*seen, busy.training]


CFG_FORWARD = Exercise(
    id="04.3",
    names=("cfg_forward",),
    references=(cfg_forward,),
    inputs=_forward_inputs,
    batch=("x", "t", "y"),
    without=("leaves no graph behind",),  # whether there is one is the caller's choice
    points=2,
    facts=(
        Fact(
            "asks the model once, about each x with y and with null",
            _forward_asks,
            "one call with 2 B rows; row i of x, t and y must be about the same example: repeat all in one order",
        ),
        Fact("leaves the model in the mode it came in", _forward_mode, "neither train() nor eval() is needed here"),
        Fact(
            "a model of two answers, by hand",
            _forward_by_hand,
            "which half belongs to which labels? Combine as in 04.1",
        ),
        Fact("is what two separate passes give", _forward_passes, "which half of the result belongs to which labels?"),
        Fact("takes one scale per example", _forward_scales, "s (B,) -> (B, 1, ..., 1), as for every coefficient"),
    ),
    mistakes=(
        Mistake(
            "halves exchanged",
            "eps_c and eps_u are exchanged, so guidance moves AWAY from the class. The first half of the result "
            "belongs to the first half of the labels; or are the two exchanged where you combine them?",
            _forward_by(halves=lambda out: out.chunk(2)[::-1]),
        ),
        Mistake(
            "null 0",
            "The second half asks about class 0, not about `null`: guidance pushes away from class 0, which looks "
            "plausible and is wrong.",
            _forward_by(labels=lambda y, null: torch.cat([y, torch.zeros_like(y)])),
        ),
        Mistake(
            "null 10",
            "The label that means none is an argument, `null`; yours is 10, which fits the digits alone.",
            _forward_by(labels=lambda y, null: torch.cat([y, torch.full_like(y, 10)])),
        ),
        Mistake(
            "null at both",
            "Both halves ask about `null`: s has no effect, and nobody has asked about y.",
            _forward_by(labels=lambda y, null: torch.full_like(y, null).repeat(2)),
        ),
        Mistake(
            "fill_ on y",
            "fill_ changes y itself, before the labels are put together: both halves ask about `null`, and the caller "
            "has lost the labels. torch.full_like makes new ones.",
            _forward_by(labels=lambda y, null: torch.cat([y, y.fill_(null)])),
        ),
        Mistake(
            "same labels twice",
            "Both halves ask about y: eps_c and eps_u are equal, and s has no effect.",
            _forward_by(labels=lambda y, null: torch.cat([y, y])),
        ),
        Mistake(
            "times interleaved",
            "t is repeated as t0, t0, t1, t1, ... (repeat_interleave), x as x0, x1, ..., x0, x1, ... (cat): the times "
            "no longer match the samples.",
            _forward_by(time=lambda t: t.repeat_interleave(2)),
        ),
        Mistake(
            "samples interleaved",
            "x is repeated as x0, x0, x1, x1, ... (repeat_interleave), t and the labels as cat does it: the samples no "
            "longer match their times and labels.",
            _forward_by(batch=lambda x: x.repeat_interleave(2, dim=0)),
        ),
        Mistake(
            "samples and times interleaved",
            "x and t are repeated as 0, 0, 1, 1, ... (repeat_interleave), but the labels and the halves of the result "
            "as 0, 1, ..., 0, 1, ...: examples are guided by one another's labels.",
            _forward_by(batch=lambda x: x.repeat_interleave(2, dim=0), time=lambda t: t.repeat_interleave(2)),
        ),
        Mistake(
            "train mode",
            "The model is put into train mode: BatchNorm mixes both halves, so that the prediction of each depends on "
            "the other, and dropout acts.",
            _forward_by(ready=lambda model: model.train()),
        ),
        Mistake(
            "eval mode",
            "The model is put into eval mode and left there: if this was called during training, the training goes on "
            "without dropout, and nobody notices.",
            _forward_by(ready=lambda model: model.eval()),
        ),
        Mistake(
            "two passes",
            "The values are right, but the model is asked twice. One batch of 2 B does it in one call, which is faster "
            "on a GPU.",
            (_forward_two_passes,),
        ),
        Mistake(
            "scales averaged",
            "With one scale per example you use their mean for all.",
            _forward_by(scale=lambda s, x: s.mean() if isinstance(s, Tensor) else s),
        ),
        Mistake(
            "scale of the first",
            "With one scale per example the whole batch is guided at the first one.",
            _forward_by(scale=lambda s, x: s[0] if isinstance(s, Tensor) else s),
        ),
        Mistake(
            "scales along the last axis",
            "s (B,) is multiplied as it is: it lies along the last axis instead of the batch axis, which fails for "
            "most shapes and is silently wrong where the last axis has length B, too.",
            _forward_by(scale=lambda s, x: s),
        ),
        Mistake(
            "scales must be a tensor",
            "It works for one scale per example only: s may be a plain number, too.",
            _forward_by(scale=lambda s, x: pad(s, x)),
        ),
        Mistake(
            "1 + w",
            "The two passes are right, but combined as (1 + s) eps_c - s eps_u: here s = 1 must be the conditional "
            "prediction.",
            _forward_by(combine=lambda c, u, s: (1 + s) * c - s * u),
        ),
    ),
    alternatives=((_forward_unconditional_first,), (_forward_interleaved,)),
    hints=(
        "torch.cat([x, x]), the same for t, and for the labels y followed by as many times null; then chunk(2).",
        "eps_c, eps_u = model(cat([x, x]), cat([t, t]), cat([y, full_like(y, null)])).chunk(2), combined as in 04.1.",
    ),
    hides=("guidance.cfg",),
    probe=_forward_see,
)

# --- 04.4 cfg_gaussian_var --------------------------------------------------------------------------------------------

ENDS = ("tilt", "ode", "sde")


def _var_inputs(g: Generator) -> dict:
    vc, vu = _uniform(g, 0.3, 1), _uniform(g, 1.2, 2.5)
    return {"cfg_gaussian_var": dict(vc=vc, vu=vu, s=_uniform(g, 1.5, 4), kind=ENDS[integer(g, 0, 2)])}


def _slope(u: Tensor, vc: float, vu: float, s: float) -> Tensor:
    """The guided score is -slope x at alpha = exp(-u) of a variance-preserving path."""
    a2 = torch.exp(-2 * u)
    return s / (a2 * vc + 1 - a2) + (1 - s) / (a2 * vu + 1 - a2)


def _ode_var(vc: float, vu: float, s: float, steps: int = 4000) -> float:
    """Along the ODE dx = (slope - 1) x du from noise, u = 12, down to data, u = 0, by Simpson's rule."""
    rate = _slope(torch.linspace(0, 12, steps + 1, dtype=torch.float64), vc, vu, s) - 1
    total = rate[0] + 4 * rate[1::2].sum() + 2 * rate[2:-1:2].sum() + rate[-1]
    return math.exp(-2 * float(total) * 12 / steps / 3)


def _sde_var(vc: float, vu: float, s: float, steps: int = 4000) -> float:
    """The reverse SDE's variance, dV/d(-u) = 2 (1 - 2 slope) V + 2 from V = 1 at u = 12, by Runge and Kutta's rule.

    One step takes V to `grown` V + `added`; all of them are computed at once.
    """
    h = 12 / steps
    rate = 2 * (1 - 2 * _slope(torch.linspace(12, 0, 2 * steps + 1, dtype=torch.float64), vc, vu, s))
    start, middle, end = rate[:-1:2], rate[1::2], rate[2::2]

    def step(v: float, fresh: float) -> Tensor:
        one = start * v + fresh
        two = middle * (v + h / 2 * one) + fresh
        three = middle * (v + h / 2 * two) + fresh
        return v + h / 6 * (one + 2 * two + 2 * three + end * (v + h * three) + fresh)

    grown, added = step(1.0, 0.0), step(0.0, 2.0)
    later = torch.cat([grown, grown.new_ones(1)]).flip(0).cumprod(0).flip(0)  # how all steps from the i-th on grow
    return float(later[0] + added @ later[1:])


def _tilt_var(vc: float, vu: float, s: float) -> float:
    """The second moment of p(x | y)^s p(x)^(1 - s) by quadrature."""
    x = torch.linspace(-40, 40, 40_001, dtype=torch.float64)
    log_p = -s * x**2 / (2 * vc) - (1 - s) * x**2 / (2 * vu)
    return float((log_p.softmax(0) * x**2).sum())


def _var_ends(answer: Answer, g: Generator) -> None:
    vc, vu = _uniform(g, 0.3, 1), _uniform(g, 1.2, 2.5)
    for kind in ENDS:
        _same(answer(vc, vu, 1.0, kind), vc, f"{kind}: s = 1 is conditional sampling, of variance vc = {vc:.4g}")
        _same(answer(vc, vu, 0.0, kind), vu, f"{kind}: s = 0 is unconditional sampling, of variance vu = {vu:.4g}")


def _var_known(answer: Answer, g: Generator) -> None:
    for vc, vu, s, *rights in ((0.5, 1.0, 2.0, 1 / 3, 1 / 4, 7 / 24), (1.0, 2.0, 3.0, 1 / 2, 1 / 4, 0.3875)):
        for kind, right in zip(ENDS, rights, strict=True):
            _same(answer(vc, vu, s, kind), right, f"{kind}: vc = {vc:g}, vu = {vu:g}, s = {s:g}")


def _var_by_route(kind: str, route: Callable[[float, float, float], float], what: str) -> Callable:
    def test(answer: Answer, g: Generator) -> None:
        small, large = _uniform(g, 0.4, 1), _uniform(g, 1.2, 2.5)
        for vc, vu, s in ((small, large, _uniform(g, 1.5, 3.5)), (small, large, 0.3), (large, small, 1.1)):
            said = f"{kind}: vc = {vc:.4g}, vu = {vu:.4g}, s = {s:.4g} is not what {what} gives"
            _same(answer(vc, vu, s, kind), route(vc, vu, s), said)

    return test


def _var_equal(answer: Answer, g: Generator) -> None:
    v = _uniform(g, 0.3, 2)
    for kind in ENDS:
        for s in (0.5, 3.0):
            got = _outcome(answer, v, v, s, kind)
            if isinstance(got, str):
                raise Wrong(f"{kind}: vc = vu = {v:.4g}, s = {s:g} raises {got}")
            _same(got, v, f"{kind}: vc = vu = {v:.4g}: the class tells nothing, and s = {s:g} changes nothing")


def _var_half(answer: Answer, g: Generator) -> None:
    vc, vu = _uniform(g, 0.4, 1), _uniform(g, 1.2, 2.5)
    got = _outcome(answer, vc, vu, 0.5, "sde")
    if isinstance(got, str):
        raise Wrong(f"sde: vc = {vc:.4g}, vu = {vu:.4g}, s = 1/2 raises {got}")
    _same(got, _sde_var(vc, vu, 0.5), f"sde: vc = {vc:.4g}, vu = {vu:.4g}, s = 1/2 is not what its own equation gives")


def _var_refuses(answer: Answer, g: Generator) -> None:
    for vc, vu, s, precision in ((2.0, 1.0, 3.0, -0.5), (2.0, 1.0, 2.0, 0.0)):
        said = (
            f"vc = {vc:g}, vu = {vu:g}, s = {s:g}: p(x | y)^s p(x)^(1 - s) does not fall off (precision {precision:g})"
        )
        got = _outcome(answer, vc, vu, s, "tilt")
        if not isinstance(got, str):
            raise Wrong(f"{said}, and has no variance; yours returned {got}", expected="ValueError")
        if got != "ValueError":
            raise Wrong(f"{said}: yours raised {got} where ValueError is due")
    for kind, right in (("ode", 8.0), ("sde", _sde_var(2.0, 1.0, 3.0, 8000))):
        got = _outcome(answer, 2.0, 1.0, 3.0, kind)
        if isinstance(got, str):
            raise Wrong(f"{kind}: vc = 2, vu = 1, s = 3 raises {got}; only the tilt breaks down there, samplers go on")
        _same(got, right, f"{kind}: vc = 2, vu = 1, s = 3")


def _harmonic(vc: float, vu: float, s: float) -> float:
    precision = s / vc + (1 - s) / vu
    if precision <= 0:
        raise ValueError("no density")
    return 1 / precision


def _geometric(vc: float, vu: float, s: float) -> float:
    return vc**s * vu ** (1 - s)


def _between(vc: float, vu: float, s: float) -> float:
    return cfg_gaussian_var(vc, vu, s, "sde")


def _sde_formula(vc: float, vu: float, s: float) -> float:
    r, k = vu / vc, 2 * s - 1
    return vc ** (2 * s) * vu ** (2 - 2 * s) * (r**k - 1) / (k * (vu - vc))


def _var_by(
    tilt: Callable = _harmonic, ode: Callable = _geometric, sde: Callable = _between, after: Callable = lambda v: v
) -> tuple[Callable]:
    def cfg_gaussian_var(vc, vu, s, kind):
        return after(dict(tilt=tilt, ode=ode, sde=sde)[kind](vc, vu, s))

    return (cfg_gaussian_var,)


def _no_check(vc: float, vu: float, s: float) -> float:
    return 1 / (s / vc + (1 - s) / vu)


def _all_at(scale: Callable[[float], float]) -> tuple[Callable]:
    return (lambda vc, vu, s, kind: cfg_gaussian_var(vc, vu, scale(s), kind),)


def _var_logs(vc, vu, s, kind):
    """Everything by way of logarithms, and expm1 for what is nearly 0 / 0."""
    c, u = math.log(vc), math.log(vu)
    if kind == "ode":
        return math.exp(u + s * (c - u))
    if kind == "tilt":
        if s * vu + (1 - s) * vc <= 0:
            raise ValueError("the tilt has no finite variance")
        return vc * vu / (s * vu + (1 - s) * vc)
    exponent = (2 * s - 1) * (u - c)
    mean_slope = 1.0 if exponent == 0 else math.expm1(exponent) / exponent
    spread = 1.0 if u == c else math.expm1(u - c) / (u - c)
    return math.exp(2 * s * c + (2 - 2 * s) * u - c) * mean_slope / spread


def _var_numbers(vc, vu, s, kind):
    """Samplers by their equations, no closed form at all."""
    if kind == "tilt":
        inverse = (vu * s - vc * (s - 1)) / (vc * vu)
        if not inverse > 0:
            raise ValueError("cannot be normalised")
        return inverse**-1
    return (_ode_var if kind == "ode" else _sde_var)(vc, vu, s, 2000)


def _var_see(answer: Answer, g: Generator) -> object:
    asked = [(0.5, 1.0, s) for s in (0.0, 0.3, 0.5, 1.0, 2.0)] + [(2.0, 1.0, 2.0), (2.0, 1.0, 3.0), (0.7, 0.7, 3.0)]
    seen = [_outcome(answer, *numbers, kind) for numbers in asked for kind in ENDS]
    return [v if isinstance(v, str) or v is None else _number(v) for v in seen]


def _number(value: object) -> object:
    return float(value) if isinstance(value, int | float | Tensor) else type(value).__name__


CFG_GAUSSIAN_VAR = Exercise(
    id="04.4",
    names=("cfg_gaussian_var",),
    references=(cfg_gaussian_var,),
    inputs=_var_inputs,
    without=NO_TENSORS,
    by_probe=True,
    points=2,
    facts=(
        Fact("s = 1 gives vc and s = 0 gives vu, for all kinds", _var_ends, "there is nothing to combine at these two"),
        Fact("numbers worked out by hand", _var_known, "which mean of vc and vu is it: harmonic or geometric?"),
        Fact(
            "tilt: the product of two powers, by quadrature",
            _var_by_route("tilt", _tilt_var, "the integral of x^2 p(x | y)^s p(x)^(1 - s)"),
            "add the exponents -x^2 / (2 v): precisions add up",
        ),
        Fact(
            "ode: the sampler's own equation, step by step",
            _var_by_route("ode", _ode_var, "following the ODE in small steps"),
            "the ODE stretches x; the factors of two scores multiply, each to its weight",
        ),
        Fact(
            "sde: the sampler's own equation, step by step",
            _var_by_route("sde", _sde_var, "following the variance along the SDE in small steps"),
            "the fresh noise of each step is shrunk by all steps after it; add up what is left",
        ),
        Fact("sde: s = 1/2", _var_half, "(r^k - 1) / k for k = 0 is 0 / 0: what is its limit?"),
        Fact("equal variances stay, whatever s is", _var_equal, "vu - vc = 0 is no reason to divide by it"),
        Fact(
            "refuses a tilt that cannot be normalised, and only that",
            _var_refuses,
            "a Gaussian needs a precision above 0: raise ValueError otherwise",
        ),
    ),
    mistakes=(
        Mistake(
            "geometric and harmonic exchanged",
            "The means are exchanged: tilting adds precisions (harmonic), and the ODE multiplies powers of the "
            "variances (geometric).",
            _var_by(tilt=_geometric, ode=_harmonic),
        ),
        Mistake(
            "the tilt for all",
            "You return the variance of the tilt for all three: guided samplers do not sample the tilt, which is what "
            "this exercise is about.",
            _var_by(ode=_harmonic, sde=_harmonic),
        ),
        Mistake(
            "geometric for all",
            "You return the geometric mean for all three; it belongs to the ODE alone.",
            _var_by(tilt=_geometric, sde=_geometric),
        ),
        Mistake(
            "sde is ode",
            "You take DDPM to end where DDIM does. Without guidance both sample p(x); with it, the noise that DDPM "
            "adds makes a difference.",
            _var_by(sde=_geometric),
        ),
        Mistake(
            "sde is the tilt",
            "You take DDPM to sample the tilt. For s > 1 and vc < vu it ends between the ODE and the tilt.",
            _var_by(sde=_harmonic),
        ),
        Mistake(
            "s and 1 - s exchanged",
            "s and 1 - s are exchanged: s = 1 must give vc, the conditional variance.",
            _all_at(lambda s: 1 - s),
        ),
        Mistake(
            "1 + w",
            "You take s for w: s = 1 is conditional here, and s = 0 unconditional.",
            _all_at(lambda s: 1 + s),
        ),
        Mistake(
            "precision not checked",
            "A tilt of negative or zero precision is not refused: that is no density and has no variance, so raise "
            "ValueError.",
            _var_by(tilt=_no_check),
        ),
        Mistake(
            "zero precision not refused",
            "A tilt of precision exactly 0 is not refused, a flat line that has no variance, either: <= 0, not < 0.",
            _var_by(
                tilt=lambda vc, vu, s: _no_check(vc, vu, s) if s / vc + (1 - s) / vu == 0 else _harmonic(vc, vu, s)
            ),
        ),
        Mistake(
            "inf for no density",
            "You return infinity where the tilt cannot be normalised. There is no density, so no variance either: "
            "raise ValueError.",
            _var_by(tilt=lambda vc, vu, s: _harmonic(vc, vu, s) if s / vc + (1 - s) / vu > 0 else math.inf),
        ),
        Mistake(
            "refuses all kinds",
            "You refuse all three kinds where the tilt cannot be normalised: the samplers do not know, and end at a "
            "finite variance.",
            (lambda vc, vu, s, kind: _harmonic(vc, vu, s) and cfg_gaussian_var(vc, vu, s, kind),),
        ),
        Mistake(
            "sde 0 / 0 twice",
            "The formula of the SDE is 0 / 0 at vc = vu, and again at s = 1/2. Both have limits: vc, and log r for "
            "(r^k - 1) / k.",
            _var_by(sde=_sde_formula),
        ),
        Mistake(
            "sde 0 / 0 at vc = vu",
            "The formula of the SDE is 0 / 0 at vc = vu, where guidance has nothing to do: the limit is vc.",
            _var_by(
                sde=lambda vc, vu, s: _sde_formula(vc, vu, s) if s != 0.5 or vc == vu else _between(vc, vu, s),
            ),
        ),
        Mistake(
            "sde 0 / 0 at s = 1/2",
            "The formula of the SDE is 0 / 0 at s = 1/2: (r^k - 1) / k tends to log r there.",
            _var_by(sde=lambda vc, vu, s: vc if vc == vu else _sde_formula(vc, vu, s)),
        ),
        Mistake(
            "arithmetic mean",
            "For the ODE you mix the variances themselves, s vc + (1 - s) vu: that can turn negative. It "
            "mixes their logarithms.",
            _var_by(ode=lambda vc, vu, s: s * vc + (1 - s) * vu),
        ),
        Mistake(
            "arithmetic tilt",
            "For the tilt you mix the variances themselves, s vc + (1 - s) vu. In a product of Gaussians precisions "
            "add up, 1 / v.",
            _var_by(tilt=lambda vc, vu, s: s * vc + (1 - s) * vu),
        ),
        Mistake(
            "s - 1 for 1 - s",
            "In the tilt's precision stands (s - 1) / vu where (1 - s) / vu is due: p(x) is divided by.",
            _var_by(tilt=lambda vc, vu, s: 1 / (s / vc + (s - 1) / vu)),
        ),
        Mistake(
            "precision returned",
            "For the tilt you return the precision; the variance is one over it.",
            _var_by(tilt=lambda vc, vu, s: 1 / _harmonic(vc, vu, s)),
        ),
        Mistake(
            "standard deviation",
            "You return standard deviations, the roots of the variances.",
            _var_by(after=math.sqrt),
        ),
    ),
    alternatives=((_var_logs,), (_var_numbers,)),
    hints=(
        "tilt: add precisions. ode: d log x is a weighted sum of two, so powers multiply. sde: solve the linear "
        "equation that its variance follows.",
        "1 / (s / vc + (1 - s) / vu); vc^s vu^(1-s); vc^(2s) vu^(2-2s) (r^k - 1) / (k (vu - vc)) with r = vu / vc and "
        "k = 2s - 1, in the limit log r for (r^k - 1) / k at k = 0, and vc at r = 1.",
    ),
    hides=("mixture.tilted_gaussian",),
    probe=_var_see,
)

# --- 04.5 tilt_by_rejection -------------------------------------------------------------------------------------------


def _reject_inputs(g: Generator) -> dict:
    p = torch.rand(12, generator=g, dtype=torch.float64)
    return {"tilt_by_rejection": dict(x=randn(g, 12, 3), p=p, s=_uniform(g, 1.5, 5), gen=_gen(g))}


def _of(kept: object, x: Tensor) -> Tensor:
    """Which rows of x were kept, read off the last column, where they are numbered from 1 on."""
    if kept is None:
        raise Wrong("it returned None: is there a return statement?")
    if not isinstance(kept, Tensor) or kept.ndim != 2 or kept.shape[1] != x.shape[1]:
        shape = tuple(kept.shape) if isinstance(kept, Tensor) else type(kept).__name__
        raise Wrong(f"of x {tuple(x.shape)} came {shape}: return the rows of x that are kept, (number kept, D)")
    index = kept[:, -1].round().long() - 1
    if ((index < 0) | (index >= len(x))).any() or not torch.equal(x[index], kept):
        raise Wrong("what came back are not rows of x: those kept must be as they were")
    return index


def _numbered(n: int) -> Tensor:
    return _rows(n).clone()


@cache
def _rows(n: int) -> Tensor:
    i = torch.arange(1, n + 1, dtype=torch.float64)
    return torch.stack([(7 * i).sin(), i], dim=1)


def _rates(answer: Answer, g: Generator, groups: tuple[float, ...], s: float, n: int = 20_000) -> list[float]:
    """The share that is kept of each group of samples, where all of a group have one p; the groups are mixed."""
    x, group = _numbered(n * len(groups)), torch.arange(n * len(groups)) % len(groups)
    index = _of(answer(x, torch.tensor(groups, dtype=torch.float64)[group], s, _gen(g)), x)
    return (torch.bincount(group[index], minlength=len(groups)) / n).tolist()


def _reject_rows(answer: Answer, g: Generator) -> None:
    x = _numbered(2000)
    index = _of(answer(x, torch.rand(2000, generator=g, dtype=torch.float64), 2.0, _gen(g)), x)
    if len(index.unique()) < len(index):
        raise Wrong("some samples come back more than once: a sample is kept or not, never copied")


def _reject_leaves(answer: Answer, g: Generator) -> None:
    for dtype in (torch.float32, torch.float64):
        x, p = _numbered(50).to(dtype), torch.rand(50, generator=g, dtype=dtype)
        given = x.clone(), p.clone()
        kept = answer(*given, 2.0, _gen(g))
        if not torch.equal(x, given[0]) or not torch.equal(p, given[1]):
            raise Wrong("x or p was changed in place: the caller still needs them")
        _of(kept, x)
        if kept.dtype != dtype:
            raise Wrong(f"from {dtype} samples came {kept.dtype}")


def _reject_one(answer: Answer, g: Generator) -> None:
    x = _numbered(500)
    p = 0.01 + 0.9 * torch.rand(500, generator=g, dtype=torch.float64)
    kept = len(_of(answer(x, p, 1.0, _gen(g)), x))
    if kept != 500:
        raise Wrong(f"s = 1 is p(x | y) itself: all 500 must be kept, yours keeps {kept}", expected="500")


def _reject_coins(answer: Answer, g: Generator) -> None:
    x, p = _numbered(400), torch.full((400,), 0.5, dtype=torch.float64)
    kept = [len(_of(answer(x, p, 2.0, _gen(g)), x)) for _ in range(3)]
    if set(kept) <= {0, 400}:
        shown = ", ".join(map(str, kept))
        raise Wrong(f"p = 0.5 for all 400, s = 2: three calls keep {shown}; one coin each would keep some of them")


def _reject_gen(answer: Answer, g: Generator) -> None:
    x, p = _numbered(300), 0.2 + 0.6 * torch.rand(300, generator=g, dtype=torch.float64)
    seed, seen = integer(g, 0, 10**6), []
    for noise, state in ((1, seed), (2, seed), (1, seed + 1)):
        answer.reseed(noise)
        seen.append(_of(answer(x, p, 2.0, Generator().manual_seed(state)), x).tolist())
    if seen[0] != seen[1]:
        raise Wrong("gen in the same state keeps other samples: the coins do not come from gen")
    if seen[0] == seen[2]:
        raise Wrong("gen in another state keeps the same samples: the coins do not come from gen")


def _reject_rate(answer: Answer, g: Generator) -> None:
    groups, s, n = (0.2, 0.6, 0.9), 3.0, 20_000
    for p, rate in zip(groups, _rates(answer, g, groups, s, n), strict=True):
        right = p * p
        if abs(rate - right) > 7 * math.sqrt(right * (1 - right) / n):
            text = f"s = {s:g}: of the samples with p = {p:g} you keep {rate:.3f}"
            raise Wrong(text, expected=f"{right:.3f}")


def _reject_rare(answer: Answer, g: Generator) -> None:
    rate = _rates(answer, g, (0.1,), 2.0)[0]
    if abs(rate - 0.1) > 7 * math.sqrt(0.09 / 20_000):
        text = f"s = 2, p = 0.1 for every sample: you keep {rate:.3f} of them"
        more = ": which p the others have must not matter" if rate > 0.9 else ""
        raise Wrong(text + more, expected="0.100")


def _reject_atoms(answer: Answer, g: Generator) -> None:
    """Three values of x with prior (.5, .3, .2) and p(y | x) = (.9, .5, .1): everything is a sum of three terms."""
    prior, p = (0.5, 0.3, 0.2), (0.9, 0.5, 0.1)
    joint = [a * b for a, b in zip(prior, p, strict=True)]
    group = torch.repeat_interleave(torch.tensor([round(62_000 * j / math.fsum(joint)) for j in joint]))
    x = _numbered(len(group))
    index = _of(answer(x, torch.tensor(p, dtype=torch.float64)[group], 2.0, _gen(g)), x)
    if not len(index):
        raise Wrong("three values of x, s = 2: nothing is kept")
    got = torch.bincount(group[index], minlength=3) / len(index)
    right = torch.tensor([0.840248963, 0.155601660, 0.004149378])
    if ((got - right).abs() > 7 * (right * (1 - right) / len(index)).sqrt()).any():
        got, right = (", ".join(f"{v:.4f}" for v in shares) for shares in (got, right))
        raise Wrong(
            f"three values of x, s = 2: they make up {got} of those kept; p(x) p(y | x)^s has others", expected=right
        )


def _reject_gaussian(answer: Answer, g: Generator) -> None:
    vc, width, s = _uniform(g, 0.6, 1.5), _uniform(g, 0.8, 1.5), _uniform(g, 2, 4)
    x = math.sqrt(vc) * randn(g, 60_000, 1)
    kept = answer(x, torch.exp(-(x[:, 0] ** 2) / (2 * width)), s, _gen(g))
    if kept.ndim != 2 or len(kept) < 100:
        raise Wrong(
            f"x is normal of variance {vc:.3g}, p = exp(-x^2 / {2 * width:.3g}), s = {s:.3g}: you keep {len(kept)}"
        )
    right = 1 / (1 / vc + (s - 1) / width)
    got, off = float(kept.var()), 7 * right * math.sqrt(2 / len(kept))
    if abs(got - right) > off:
        more = 1 / (1 / vc + s / width)
        text = (
            f"x is normal of variance {vc:.3g}, p = exp(-x^2 / {2 * width:.3g}), s = {s:.3g}: those kept have {got:.4f}"
        )
        raise Wrong(
            text + (": the tilt at s + 1 has this variance" if abs(got - more) < off else ""), expected=f"{right:.4f}"
        )


def _reject_by(
    rate: Callable[[Tensor, float], Tensor] = lambda p, s: p ** (s - 1),
    coin: Callable[..., Tensor] = lambda p, gen: torch.rand(len(p), generator=gen, dtype=p.dtype),
    keep: Callable[[Tensor, Tensor], Tensor] = torch.lt,
) -> tuple[Callable]:
    return (lambda x, p, s, gen: x[keep(coin(p, gen).to(p.device), rate(p, s))],)


def _reject_bernoulli(x: Tensor, p: Tensor, s: float, gen: Generator) -> Tensor:
    return x[torch.bernoulli(p.cpu() ** (s - 1), generator=gen).bool().to(x.device)]


def _reject_logs(x: Tensor, p: Tensor, s: float, gen: Generator) -> Tensor:
    waiting = torch.empty(len(x), dtype=torch.float64).exponential_(generator=gen)
    kept = (s - 1) * -p.double().cpu().log() <= waiting if s > 1 else torch.ones(len(x), dtype=torch.bool)
    return x[kept.nonzero().flatten().to(x.device)]


def _reject_loop(x: Tensor, p: Tensor, s: float, gen: Generator) -> Tensor:
    coins = torch.rand(len(x), generator=gen, dtype=torch.float64).tolist()
    kept = [i for i, (u, one) in enumerate(zip(coins, p.tolist(), strict=True)) if u < one ** (s - 1)]
    return x[torch.tensor(kept, dtype=torch.long, device=x.device)]


def _resampled(x: Tensor, p: Tensor, s: float, gen: Generator) -> Tensor:
    return x[torch.multinomial(p ** (s - 1), len(x), replacement=True, generator=gen)]


def _reject_see(answer: Answer, g: Generator) -> object:
    """Which share is kept, by name; whether the coins are each one's own, and from gen; whether there are copies."""
    groups = (0.4, 0.9)
    by_name = (
        dict(right=0.16, power=0.064, plain=0.4, times=0.8, above=0.84, most=0.4**2 / 0.81, full=1.0, none=0.0),
        dict(right=0.81, power=0.729, plain=0.9, above=0.19, full=1.0, none=0.0),
    )
    x, seed, seen = _numbered(300), integer(g, 0, 10**6), {}
    half = torch.full((300,), 0.5, dtype=torch.float64)

    def kept(noise: int, state: int) -> list[int]:
        answer.reseed(noise)
        return _of(answer(x, half, 2.0, Generator().manual_seed(seed + state)), x).tolist()

    try:
        one, again, *others = kept(1, 0), kept(2, 0), *(kept(1, state) for state in range(1, 12))
        counts = sorted({len(index) for index in (one, *others)})
        seen |= dict(repeats=one == again, copies=len(set(one)) < len(one), in_order=one == sorted(one))
        if counts == [0, 300]:
            return seen | dict(coins="one for all")
        seen |= dict(coins=counts if len(counts) == 1 else "own", from_gen=any(one != other for other in others))
        for of, rate in zip(by_name, _rates(answer, g, groups, 3.0), strict=True):
            name = min(of, key=lambda name, of=of, rate=rate: abs(of[name] - rate))
            seen |= {f"rate {len(of)}": name if abs(of[name] - rate) < 0.02 else round(rate, 1)}
    except Wrong as wrong:
        seen["wrong"] = str(wrong)
    return seen


TILT_BY_REJECTION = Exercise(
    id="04.5",
    names=("tilt_by_rejection",),
    references=(tilt_by_rejection,),
    inputs=_reject_inputs,
    changes=("gen",),
    universal=False,  # how many are kept is chance
    facts=(
        Fact("returns rows of x, none twice", _reject_rows, "x[mask], with a mask (N,) of booleans"),
        Fact("s = 1 keeps all", _reject_one, "which power of p is 1 everywhere?"),
        Fact("each sample has a coin of its own", _reject_coins, "draw (N,) numbers, one per sample"),
        Fact("the coins come from gen", _reject_gen, "torch.rand(..., generator=gen)"),
        Fact(
            "keeps the share that p and s say",
            _reject_rate,
            "p(x | y) has one factor p(y | x) already: how many are missing?",
        ),
        Fact(
            "does not look at the other samples",
            _reject_rare,
            "the rate must not depend on which samples happen to be in x",
        ),
        Fact(
            "three values of x, by hand", _reject_atoms, "those kept are distributed as p(x | y) times the share kept"
        ),
        Fact("Gaussians: the tilt by precisions", _reject_gaussian, "1 / variance grows by (s - 1) times that of p"),
        Fact("leaves its arguments and the dtype as they are", _reject_leaves, "x[mask] makes a copy of its own"),
    ),
    mistakes=(
        Mistake(
            "p^s",
            "You keep with probability p^s: too few, and what they follow is the tilt at s + 1. Samples of p(x | y) "
            "have one factor p(y | x) already.",
            _reject_by(lambda p, s: p**s),
        ),
        Mistake(
            "p whatever s is",
            "You keep with probability p: s has no effect, and the result is the tilt at s = 2.",
            _reject_by(lambda p, s: p),
        ),
        Mistake(
            "times for power",
            "You multiply p by s - 1; it is taken to that power. On logarithms you would multiply: log u < (s - 1) "
            "log p.",
            _reject_by(lambda p, s: (s - 1) * p),
        ),
        Mistake(
            "all kept",
            "Everything is kept: the number that u is compared with is never below 1. Is a logarithm missing on one "
            "side, or has the power 1 - s for s - 1?",
            _reject_by(lambda p, s: torch.ones_like(p)),
        ),
        Mistake(
            "keeps what should go",
            "You keep those with u > p^(s-1), which are the ones to be thrown away: the unlikely ones stay.",
            _reject_by(keep=torch.gt),
        ),
        Mistake(
            "divided by the maximum",
            "The probabilities are divided by their maximum, so that the best sample is always kept. It keeps more, "
            "but looks at the other samples: coins are then no longer one's own affair.",
            _reject_by(lambda p, s: (p / p.max()) ** (s - 1)),
        ),
        Mistake(
            "one u for all",
            "One number u decides for all samples: all with p above a threshold stay. Each needs a coin of its own.",
            _reject_by(coin=lambda p, gen: torch.rand((), generator=gen, dtype=p.dtype).expand(len(p))),
        ),
        Mistake(
            "coins of the global generator",
            "The coins come from torch's global random state; draw them from gen, so that the caller can repeat them.",
            _reject_by(coin=lambda p, gen: torch.rand_like(p)),
        ),
        Mistake(
            "threshold",
            "No coin at all: a sample stays if its probability is above 1/2. That cuts the distribution off instead of "
            "weighing it.",
            _reject_by(coin=lambda p, gen: torch.full_like(p, 0.5)),
        ),
        Mistake(
            "resampled",
            "You draw N samples in proportion to the weights: the distribution is right, but the result has copies. "
            "Rejection keeps each sample once or not at all.",
            (_resampled,),
        ),
    ),
    alternatives=((_reject_bernoulli,), (_reject_logs,), (_reject_loop,)),
    hints=(
        "A sample of p(x | y) that is kept with probability q(x) follows p(x | y) q(x), normalised. What is q here? "
        "And how does a uniform u in [0, 1) decide it?",
        "u = torch.rand(len(x), generator=gen); keep x where u < p ** (s - 1).",
    ),
    probe=_reject_see,
)

EXERCISES = (CFG, CONVERT_SCALE, CFG_FORWARD, CFG_GAUSSIAN_VAR, TILT_BY_REJECTION, *lesson04_remedies.EXERCISES)
