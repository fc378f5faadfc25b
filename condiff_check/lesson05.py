"""Exercises of lesson 05: flow matching, conversions between kinds, and guidance of a velocity."""

import math
from collections.abc import Callable
from itertools import pairwise, permutations

import torch
from torch import Generator, Tensor, nn

from condiff_ref.mixture import archipelago
from condiff_ref.schedules import Schedule, flow
from condiff_ref.shapes import pad

from .compare import close, gap, oddity, plain
from .draws import PICTURES, integer, pictures, randn
from .exercise import Answer, Exercise, Fact, Mistake, Wrong, need
from .guard import Failed
from .lesson02 import Recorder
from .testing import test_exercise
from .xray import Formula

# --- the reference answers, as the solutions show them ----------------------------------------------------------------


def fm_pair(x0: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """A training pair of flow matching on the straight path from data (t = 0) to noise (t = 1): the point x_t and the
    velocity d x_t / dt, both (B, ...). x0, eps (B, ...), t (B,) in [0, 1], one per example."""
    t = pad(t, x0)
    return (1 - t) * x0 + t * eps, eps - x0


def convert(
    pred: Tensor, src: str, dst: str, x: Tensor, a: Tensor, sigma: Tensor, da: Tensor, dsigma: Tensor
) -> Tensor:
    """What a network of one kind predicts, as another kind: (B, ...) -> (B, ...).

    Kinds: "eps", "x0", "score", "u" (the velocity da x0 + dsigma eps) and "v" (a eps - sigma x0). The path is
    x = a x0 + sigma eps; a, sigma and their rates da, dsigma in time are (B,). It need not preserve variance, and time
    may run either way. At an end of the path, where a kind says nothing, the result may be inf or nan.
    """
    a, sigma, da, dsigma = (pad(rate, x) for rate in (a, sigma, da, dsigma))
    match src:
        case "eps":
            eps = pred
        case "x0":
            eps = (x - a * pred) / sigma
        case "score":
            eps = -sigma * pred
        case "u":  # two equations, x = a x0 + sigma eps and u = da x0 + dsigma eps, solved for eps
            eps = (a * pred - da * x) / (a * dsigma - da * sigma)
        case "v":
            eps = (sigma * x + a * pred) / (a**2 + sigma**2)
    x0 = (x - sigma * eps) / a
    match dst:
        case "eps":
            return eps
        case "x0":
            return x0
        case "score":
            return -eps / sigma
        case "u":
            return da * x0 + dsigma * eps
        case "v":
            return a * eps - sigma * x0


def b_t(a: Tensor, sigma: Tensor, da: Tensor, dsigma: Tensor) -> Tensor:
    """The factor with which a score enters the velocity: u(x | y) = u(x) + b_t grad log p_t(y | x). All (B,).

    Signal a and noise sigma at time t, and their rates in the same time.
    """
    return sigma * (da * sigma - dsigma * a) / a


def guided_velocity(u_u: Tensor, u_c: Tensor, w: float) -> Tensor:
    """The guided velocity u_u + w b_t grad log p_t(y | x), from the unconditional and the conditional one alone.

    w = 0 gives the unconditional, w = 1 the conditional velocity. (B, ...) -> (B, ...).
    """
    return (1 - w) * u_u + w * u_c


def euler(f: Callable, x: Tensor, ts: Tensor) -> Tensor:
    """Solve dx/dt = f(x, t) along the times ts (n + 1,), rising or falling, by Euler's method: x at ts[-1].

    f(x, t) takes t as (B,). n evaluations, none at ts[-1].
    """
    for t, s in zip(ts[:-1], ts[1:], strict=True):  # noqa: RUF007
        x = x + (s - t) * f(x, t.expand(len(x)))
    return x


def heun(f: Callable, x: Tensor, ts: Tensor) -> Tensor:
    """The same by Heun's method: each step averages the slopes at its two ends, the second one at Euler's guess.

    The last step is an Euler step, because a velocity may not exist at the end of the path. 2 n - 1 evaluations, none
    at ts[-1].
    """
    last = len(ts) - 2
    for i, (t, s) in enumerate(zip(ts[:-1], ts[1:], strict=True)):  # noqa: RUF007
        slope = f(x, t.expand(len(x)))
        guess = x + (s - t) * slope
        x = guess if i == last else x + (s - t) * (slope + f(guess, s.expand(len(x)))) / 2
    return x


def cfg_zero_star(v_c: Tensor, v_u: Tensor, scale: float, step: int, zero_steps: int = 1) -> Tensor:
    """CFG-Zero*: guidance whose unconditional velocity is scaled to fit; in the first steps the velocity is 0.

    fit v_u + scale (v_c - fit v_u), with fit = <v_c, v_u> / |v_u|^2 example by example (1 where v_u is 0); but 0 in the
    first zero_steps steps. step counts from 0, at the noise. (B, ...) -> (B, ...).
    """
    if step < zero_steps:
        return torch.zeros_like(v_c)
    c, u = v_c.flatten(1), v_u.flatten(1)
    length2 = (u * u).sum(1)
    fit = torch.where(length2 > 0, (c * u).sum(1) / length2, 1)
    v_u = pad(fit, v_u) * v_u
    return v_u + scale * (v_c - v_u)


def sample_flow(model: nn.Module, y: Tensor, w: float, steps: int, shape: tuple, gen: Generator) -> Tensor:
    """One sample per label of y (B,), guided with scale w: (B, *shape), by Euler from t = 1 (noise) to t = 0 (data).

    model(x, t (B,), y (B,)) predicts the velocity d x / dt; its null label is model.null. Times are equally spaced.
    Each step asks the model once, about both labels in one batch of 2 B; in eval mode, without a graph, and the model's
    mode is what it was afterwards.
    """
    training = model.training
    model.eval()
    x = torch.randn(len(y), *shape, generator=gen).to(y.device)
    ts = torch.linspace(1, 0, steps + 1).to(y.device)
    both = torch.cat([torch.full_like(y, model.null), y])
    with torch.no_grad():
        for t, s in zip(ts[:-1], ts[1:], strict=True):  # noqa: RUF007
            u_u, u_c = model(torch.cat([x, x]), t.expand(2 * len(x)), both).chunk(2)
            x = x + (s - t) * ((1 - w) * u_u + w * u_c)
    model.train(training)
    return x


def my_flow_test(pair: Callable) -> None:
    """Raise an AssertionError if pair(x0, eps, t) is not (x_t, velocity) of the straight path; else return None."""
    x0, eps = torch.randn(2, 4, 3, dtype=torch.float64)
    t = torch.tensor([0.0, 1.0, 0.3, 0.8], dtype=torch.float64)
    xt, u = pair(x0, eps, t)
    assert torch.allclose(xt[0], x0[0]) and torch.allclose(xt[1], eps[1]), "t = 0 is data, t = 1 is noise"
    left = t[:, None]
    assert torch.allclose(xt - left * u, x0), "going back along the velocity must lead to the data"
    assert torch.allclose(xt + (1 - left) * u, eps), "and going on must lead to the noise"


# --- what several exercises share -------------------------------------------------------------------------------------


def _paths(t: Tensor) -> dict[str, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Signal, noise and their rates at the times t (B,), on three paths from data (t = 0) to noise."""
    one, quarter = torch.ones_like(t), math.pi / 2
    round_ = ((quarter * t).cos(), (quarter * t).sin(), -quarter * (quarter * t).sin(), quarter * (quarter * t).cos())
    return {
        "variance-preserving": round_,
        "straight": (1 - t, t, -one, one),
        "neither": (1.3 - t**2, 0.2 + 1.7 * t, -2 * t, 1.7 * one),  # a + sigma and a^2 + sigma^2 both vary
    }


def _rates(g: Generator, n: int = PICTURES[0], low: float = 0.1, high: float = 0.9) -> Tensor:
    """Random times (n,), between 0 and 1."""
    return low + (high - low) * torch.rand(n, generator=g, dtype=torch.float64)


def _path(g: Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One of the three paths at random times."""
    return list(_paths(_rates(g)).values())[integer(g, 0, 2)]


def _schedule(a: Tensor, sigma: Tensor, da: Tensor, dsigma: Tensor) -> Schedule:
    """These values, whatever the time: the exact world asks a schedule."""
    return Schedule(*(lambda t, value=value: value for value in (a, sigma, da, dsigma)))


def _sum_of(out: Tensor, **parts: Tensor) -> str:
    """What `out` is made of: "0.30 x0 + 0.70 eps", or "something else than x0 and eps"."""
    design = torch.stack([part.flatten() for part in parts.values()], dim=1).double()
    wanted = out.detach().double().flatten()
    fit = torch.linalg.lstsq(design, wanted[:, None]).solution[:, 0]
    if (design @ fit - wanted).abs().max() > 1e-3 * (1 + wanted.abs().max()):
        return f"something else than a sum of {' and '.join(parts)}"
    terms = [_term(float(share), name) for share, name in zip(fit, parts, strict=True) if abs(share) > 1e-4]
    return " + ".join(terms).replace("+ -", "- ") or "0"


def _term(share: float, name: str) -> str:
    size = "" if math.isclose(abs(share), 1, rel_tol=1e-4) else f"{abs(share):.3g} "
    return f"{'-' if share < 0 else ''}{size}{name}"


def _factor(got: Tensor, right: Tensor, a: Tensor, sigma: Tensor, da: Tensor, dsigma: Tensor) -> str:
    """Which expression in the path the result has as a factor too many, in words; "" if it is none of these."""
    a, sigma, da, dsigma = (pad(value, right) for value in (a, sigma, da, dsigma))
    one = torch.ones_like(a)
    named = {"": one, "a": a, "sigma": sigma, "a^2": a**2, "sigma^2": sigma**2, "a sigma": a * sigma}
    named |= {"a / sigma": a / sigma, "da": da, "dsigma": dsigma, "(a^2 + sigma^2)": a**2 + sigma**2, "2": 2 * one}
    named |= {"(a dsigma - da sigma)": a * dsigma - da * sigma}
    for name, factor in named.items():
        for sign, word in ((1, ""), (-1, ", with the opposite sign")):
            if close(got, sign * factor * right, rtol=1e-6, atol=1e-9):
                return f"it is {name} times what it should be{word}" if name else "it has the opposite sign"
            if name and close(got, sign * right / factor, rtol=1e-6, atol=1e-9):
                return f"it is what it should be, divided by {name}{word}"
    return ""


# --- 05.1 fm_pair -----------------------------------------------------------------------------------------------------


def _pair_inputs(g: Generator) -> dict:
    x0, eps = pictures(g, 2)
    return {"fm_pair": dict(x0=x0, eps=eps, t=_rates(g))}


def _pair_ends(answer: Answer, g: Generator) -> None:
    for end, name in ((0.0, "x0"), (1.0, "eps")):
        x0, eps = pictures(g, 2)
        xt, _ = answer(x0, eps, torch.full((4,), end, dtype=torch.float64))
        if not close(plain(xt), x0 if name == "x0" else eps, rtol=1e-6, atol=1e-8):
            raise Wrong(f"at t = {end:g} your x_t is {_sum_of(xt, x0=x0, eps=eps)}; it must be {name}")


def _pair_by_hand(answer: Answer, g: Generator) -> None:
    one, t = torch.ones(1, 1, dtype=torch.float64), torch.tensor([0.25], dtype=torch.float64)
    xt, u = (float(v) for v in answer(2 * one, -one, t))
    if not math.isclose(xt, 1.25, rel_tol=1e-6) or not math.isclose(u, -3, rel_tol=1e-6):
        raise Wrong(
            f"for x0 = 2, eps = -1, t = 0.25 you return x_t = {xt:.4g} and the velocity {u:.4g}; x_t is a quarter of "
            "the way from 2 to -1, and the velocity covers the whole way in time 1",
            expected="x_t = 1.25 and the velocity -3",
        )


def _pair_straight(answer: Answer, g: Generator) -> None:
    x0, eps = pictures(g, 2)
    t = 0.3 + 0.4 * _rates(g)
    before, now, after = (answer(x0, eps, t + shift)[0] for shift in (-0.25, 0.0, 0.25))
    need(now, (before + after) / 2, "x_t is not half-way between x_{t-0.25} and x_{t+0.25}: the path is not straight")


def _pair_derivative(answer: Answer, g: Generator) -> None:
    """A difference quotient of the learner's own x_t."""
    x0, eps = pictures(g, 2)
    t, h = _rates(g), 1e-4
    after, before = (answer(x0, eps, t + shift)[0] for shift in (h, -h))
    u = answer(x0, eps, t)[1]
    slope = (after - before) / (2 * h)
    if close(plain(u), -slope, rtol=1e-4, atol=1e-5) and u.abs().max() > 1e-3:
        raise Wrong("the velocity is minus the derivative of your x_t: it points back to where x_t came from")
    if u.shape != slope.shape or not close(plain(u), plain(slope), rtol=1e-4, atol=1e-5):
        first = {name: part[0] for name, part in (("x0", x0), ("eps", eps))}
        raise Wrong(
            f"at t = {float(t[0]):.2f} your x_t changes at the rate {_sum_of(slope[0], **first)}; "
            f"your velocity there is {_sum_of(u[0], **first)}"
        )


def _pair_alone(answer: Answer, g: Generator) -> None:
    """Each example as it comes out alone, whatever the axes."""
    for shape in ((5,), (4, 4), (4, 3, 2, 5), (2, 3, 2, 2, 3)):
        x0, eps, t = randn(g, *shape), randn(g, *shape), _rates(g, shape[0])
        xt, u = answer(x0, eps, t)
        for i in range(len(t)):
            alone = answer(x0[i].view(1, -1), eps[i].view(1, -1), t[i : i + 1])
            for name, got, right in (("x_t", xt, alone[0]), ("the velocity", u, alone[1])):
                if got.shape != shape:
                    raise Wrong(f"for x0 of shape {shape}, {name} has shape {tuple(got.shape)}")
                where = f"for x0 of shape {shape}, {name} of example {i} comes out otherwise than alone"
                need(got[i].flatten(), right[0], where)


def _pair_by(
    a: Callable = lambda t: 1 - t,
    sigma: Callable = lambda t: t,
    u: Callable = lambda x0, eps, t, xt: eps - x0,
    prepare: Callable = lambda x0, eps, t: (x0, eps, t),
    swapped: bool = False,
) -> tuple[Callable]:
    def fm_pair(x0: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        x0, eps, t = prepare(x0, eps, t)
        t = pad(t, x0)
        xt = a(t) * x0 + sigma(t) * eps
        out = xt, u(x0, eps, t, xt)
        return out[::-1] if swapped else out

    return (fm_pair,)


def _pair_in_place(x0: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    u = eps - x0
    x0 += pad(t, x0) * u
    return x0, u


def _pair_lerp(x0: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    return torch.lerp(x0, eps, pad(t, x0).expand_as(x0)), torch.sub(eps, x0)


def _pair_loop(x0: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    u = torch.stack([e - x for x, e in zip(x0, eps, strict=True)])
    return torch.stack([x + float(time) * step for x, time, step in zip(x0, t, u, strict=True)]), u


FM_PAIR = Exercise(
    id="05.1",
    names=("fm_pair",),
    references=(fm_pair,),
    inputs=_pair_inputs,
    facts=(
        Fact("t = 0 is data, t = 1 is noise", _pair_ends, "which share of x0 is left at t, and which share of eps?"),
        Fact("the path is straight", _pair_straight, "the shares change evenly with t: no roots, no sines"),
        Fact("the velocity is the derivative of x_t in t", _pair_derivative, "differentiate your x_t by t, by hand"),
        Fact("x0 = 2, eps = -1, t = 0.25", _pair_by_hand, "work it out on paper first"),
        Fact("each example has its own t, whatever the axes", _pair_alone, "t is (B,): pad(t, x0) is (B, 1, ..., 1)"),
    ),
    mistakes=(
        Mistake(
            "time reversed",
            "Time runs the other way: yours has noise at t = 0 and data at t = 1, as many papers do. In this course "
            "t = 1 is the noise, so that x_t = x0 at t = 0 and the velocity is eps - x0.",
            _pair_by(lambda t: t, lambda t: 1 - t, lambda x0, eps, t, xt: x0 - eps),
        ),
        Mistake(
            "x_t alone reversed",
            "In x_t the shares of x0 and eps are exchanged (there t = 1 is data), while the velocity is that of t = 1 "
            "for noise: the two do not belong together.",
            _pair_by(lambda t: t, lambda t: 1 - t),
        ),
        Mistake(
            "sign of the velocity",
            "The velocity points from noise to data. It is d x_t / dt, and t grows towards the noise: eps - x0.",
            _pair_by(u=lambda x0, eps, t, xt: x0 - eps),
        ),
        Mistake(
            "velocity from x_t to eps",
            "The velocity is taken from x_t to eps: that is what is left of the way, and it shrinks with 1 - t. "
            "The whole way, from x0 to eps, takes time 1.",
            _pair_by(u=lambda x0, eps, t, xt: eps - xt),
        ),
        Mistake(
            "velocity from x0 to x_t",
            "The velocity is taken from x0 to x_t: that is the way so far, t times the velocity.",
            _pair_by(u=lambda x0, eps, t, xt: xt - x0),
        ),
        Mistake(
            "roots",
            "The shares are sqrt(1 - t) and sqrt(t): the path is not straight, and eps - x0 is not its velocity.",
            _pair_by(lambda t: (1 - t).sqrt(), lambda t: t.sqrt()),
        ),
        Mistake(
            "sine and cosine",
            "This is the variance-preserving path, cosine and sine, with its own right velocity; it is a curve. "
            "Asked for is the straight path.",
            _pair_by(
                lambda t: (math.pi / 2 * t).cos(),
                lambda t: (math.pi / 2 * t).sin(),
                lambda x0, eps, t, xt: math.pi / 2 * ((math.pi / 2 * t).cos() * eps - (math.pi / 2 * t).sin() * x0),
            ),
        ),
        Mistake(
            "eps as the target",
            "You return eps, the target of a noise-predicting network. The target of flow matching is d x_t / dt.",
            _pair_by(u=lambda x0, eps, t, xt: eps),
        ),
        Mistake(
            "t of the first example",
            "The whole batch uses the time of its first example.",
            _pair_by(prepare=lambda x0, eps, t: (x0, eps, t[:1].expand(len(t)))),
        ),
        Mistake(
            "fresh noise",
            "You draw new noise inside. Use the eps that was passed in, for x_t and for the velocity.",
            _pair_by(prepare=lambda x0, eps, t: (x0, torch.randn_like(eps), t)),
        ),
        Mistake(
            "outputs exchanged",
            "The two results are in the other order: first x_t, then the velocity.",
            _pair_by(swapped=True),
        ),
        Mistake("in place", "You changed x0 in place (+=): the caller still needs the clean data.", (_pair_in_place,)),
    ),
    alternatives=((_pair_lerp,), (_pair_loop,)),
    hints=(
        "Write x_t as a share of x0 plus a share of eps, so that t = 0 gives x0 and t = 1 gives eps, with nothing but "
        "straight lines in t. Then differentiate.",
        "x_t = (1 - t) x0 + t eps, with t padded to (B, 1, ..., 1); the velocity is eps - x0.",
    ),
    hides=("schedules.add_noise", "predictions.target"),
    probe=lambda answer, g: [
        answer(*(randn(g, 4, 3) for _ in range(2)), torch.tensor([0.0, 1.0, 0.5, 0.2], dtype=torch.float64))
    ],
)

# --- 05.2 convert -----------------------------------------------------------------------------------------------------

KINDS = ("eps", "x0", "score", "u", "v")
PAIRS = tuple(permutations(KINDS, 2))


def _all_kinds(x0: Tensor, eps: Tensor, a: Tensor, sigma: Tensor, da: Tensor, dsigma: Tensor) -> dict[str, Tensor]:
    a, sigma, da, dsigma = (pad(value, x0) for value in (a, sigma, da, dsigma))
    return dict(
        eps=eps, x0=x0, score=-eps / sigma, u=da * x0 + dsigma * eps, v=a * eps - sigma * x0, x=a * x0 + sigma * eps
    )


def _convert_inputs(g: Generator) -> dict:
    src, dst = PAIRS[integer(g, 0, len(PAIRS) - 1)]
    pred, x = pictures(g, 2)
    a, sigma, da, dsigma = _path(g)
    return {"convert": dict(pred=pred, src=src, dst=dst, x=x, a=a, sigma=sigma, da=da, dsigma=dsigma)}


def _convert_by_hand(answer: Answer, g: Generator) -> None:
    """x0 = 2 and eps = -1 on a = 0.8, sigma = 0.6, with rates -1 and 1: every kind is one number."""
    numbers = dict(eps=-1.0, x0=2.0, score=1 / 0.6, u=-3.0, v=-2.0)
    at = [torch.tensor([value], dtype=torch.float64) for value in (0.8, 0.6, -1.0, 1.0)]
    wrong = []
    for src, dst in PAIRS:
        pred, x = torch.tensor([[numbers[src]]], dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
        got = answer(pred, src, dst, x, *at)
        if not isinstance(got, Tensor) or got.shape != (1, 1):
            raise Wrong(f'from "{src}" to "{dst}": {oddity(got, x)}')
        if not math.isclose(float(got), numbers[dst], rel_tol=1e-6):
            wrong.append((src, dst, float(got)))
    if wrong:
        src, dst, got = wrong[0]
        raise Wrong(
            f"take x0 = 2, eps = -1, a = 0.8, sigma = 0.6, da = -1, dsigma = 1, so that x = 1; "
            f'from "{src}" = {numbers[src]:.4g} your "{dst}" is {got:.4g}\n{_which([pair[:2] for pair in wrong])}',
            expected=f'"{dst}" = {numbers[dst]:.4g} there',
        )


def _which(wrong: list[tuple[str, str]]) -> str:
    """Which of the 20 pairs are wrong, in few words."""
    if len(wrong) == len(PAIRS):
        return "all 20 pairs are wrong"
    left, words = set(wrong), []
    for place, word in ((0, "from"), (1, "to")):
        for kind in KINDS:
            of = {pair for pair in PAIRS if pair[place] == kind}
            if of <= set(wrong) and of & left:
                words.append(f'everything {word} "{kind}"')
                left -= of
    words += [f'"{src}" to "{dst}"' for src, dst in wrong if (src, dst) in left][:4]
    return f"wrong are {len(wrong)} of the 20 pairs: {', '.join(words)}{', ...' if len(left) > 4 else ''}"


def _convert_world(name: str, sign: float = 1.0) -> Callable[[Answer, Generator], None]:
    """The exact world's own kinds, converted into one another."""

    def test(answer: Answer, g: Generator) -> None:
        n, world = 5, archipelago()
        a, sigma, da, dsigma = _paths(_rates(g, n))[name]
        da, dsigma = sign * da, sign * dsigma
        x0, _ = world.sample(n, g)
        x = a[:, None] * x0 + sigma[:, None] * randn(g, n, 2)
        label, at = integer(g, 0, 2), _schedule(a, sigma, da, dsigma)
        mean, score = (f(x, torch.zeros(n), at, label) for f in (world.posterior_mean, world.score))
        kinds = _all_kinds(mean, -sigma[:, None] * score, a, sigma, da, dsigma) | dict(score=score)
        wrong = []
        for src, dst in PAIRS:
            got = answer(kinds[src].clone(), src, dst, x.clone(), a, sigma, da, dsigma)
            if not close(plain(got), kinds[dst], rtol=1e-6, atol=1e-8):
                wrong.append((src, dst, got))
        if not wrong:
            return
        src, dst, got = wrong[0]
        text, due = oddity(got, kinds[dst]), None
        if not text:
            text, due = gap(got.detach(), kinds[dst])
            text = _factor(plain(got), kinds[dst], a, sigma, da, dsigma) or text
        what = f'{_which([w[:2] for w in wrong])}\n"{src}" to "{dst}": {text}'
        raise Wrong(what, expected=due and f"{due}, where the difference is largest")

    return test


def _convert_point(answer: Answer, g: Generator) -> None:
    """x0 and eps, both got from one prediction, must make x."""
    a, sigma, da, dsigma = _path(g)
    for src in ("score", "u", "v"):
        pred, x = pictures(g, 2)
        x0, eps = (answer(pred, src, dst, x, a, sigma, da, dsigma) for dst in ("x0", "eps"))
        made = pad(a, x) * x0 + pad(sigma, x) * eps
        need(made, x, f'from "{src}" you get x0 and eps for which a x0 + sigma eps is not x')


def _convert_back(answer: Answer, g: Generator) -> None:
    a, sigma, da, dsigma = _path(g)
    for src, dst in PAIRS:
        pred, x = pictures(g, 2)
        there = answer(pred, src, dst, x, a, sigma, da, dsigma)
        back = answer(there, dst, src, x, a, sigma, da, dsigma)
        need(back, pred, f'from "{src}" to "{dst}" and back does not return the prediction')


# how each kind gives eps, and how x0 and eps give each kind; s stands for sigma, p for the prediction
_TO_EPS = dict(
    eps=lambda p, x, a, s, da, ds: p,
    x0=lambda p, x, a, s, da, ds: (x - a * p) / s,
    score=lambda p, x, a, s, da, ds: -s * p,
    u=lambda p, x, a, s, da, ds: (a * p - da * x) / (a * ds - da * s),
    v=lambda p, x, a, s, da, ds: (s * x + a * p) / (a**2 + s**2),
)
_FROM_BOTH = dict(
    eps=lambda x0, eps, a, s, da, ds: eps,
    x0=lambda x0, eps, a, s, da, ds: x0,
    score=lambda x0, eps, a, s, da, ds: -eps / s,
    u=lambda x0, eps, a, s, da, ds: da * x0 + ds * eps,
    v=lambda x0, eps, a, s, da, ds: a * eps - s * x0,
)


def _convert_by(
    to_eps: dict[str, Callable] | None = None,
    out: dict[str, Callable] | None = None,
    x0: Callable = lambda x, eps, a, s: (x - s * eps) / a,
    prepare: Callable = lambda a, s, da, ds: (a, s, da, ds),
) -> tuple[Callable]:
    into, outof = _TO_EPS | (to_eps or {}), _FROM_BOTH | (out or {})

    def convert(
        pred: Tensor, src: str, dst: str, x: Tensor, a: Tensor, sigma: Tensor, da: Tensor, dsigma: Tensor
    ) -> Tensor:
        a, s, da, ds = (pad(rate, x) for rate in prepare(a, sigma, da, dsigma))
        eps = into[src](pred, x, a, s, da, ds)
        clean = pred if src == "x0" else x0(x, eps, a, s)
        return outof[dst](clean, eps, a, s, da, ds)

    return (convert,)


def _convert_cramer(
    pred: Tensor, src: str, dst: str, x: Tensor, a: Tensor, sigma: Tensor, da: Tensor, dsigma: Tensor
) -> Tensor:
    """Every kind is p x0 + q eps, and so is x: two equations in two unknowns, by Cramer's rule."""
    one, zero = torch.ones_like(a), torch.zeros_like(a)
    lines = dict(eps=(zero, one), x0=(one, zero), score=(zero, -1 / sigma), u=(da, dsigma), v=(-sigma, a))
    (p, q), (r, s) = ([pad(value, x) for value in lines[kind]] for kind in (src, dst))
    a, sigma = pad(a, x), pad(sigma, x)
    det = a * q - sigma * p
    return (r * (q * x - sigma * pred) + s * (a * pred - p * x)) / det


def _convert_determinant(
    pred: Tensor, src: str, dst: str, x: Tensor, a: Tensor, sigma: Tensor, da: Tensor, dsigma: Tensor
) -> Tensor:
    """Cramer's rule with a q + sigma p below the line."""
    one, zero = torch.ones_like(a), torch.zeros_like(a)
    lines = dict(eps=(zero, one), x0=(one, zero), score=(zero, -1 / sigma), u=(da, dsigma), v=(-sigma, a))
    p, q = lines[src]
    right = _convert_cramer(pred, src, dst, x, a, sigma, da, dsigma)
    return right * pad((a * q - sigma * p) / (a * q + sigma * p), x)


def _convert_solve(
    pred: Tensor, src: str, dst: str, x: Tensor, a: Tensor, sigma: Tensor, da: Tensor, dsigma: Tensor
) -> Tensor:
    """The same with a solver, example by example."""
    rows = []
    for i in range(len(x)):
        A, S, dA, dS = (float(value[i]) for value in (a, sigma, da, dsigma))
        lines = dict(eps=(0.0, 1.0), x0=(1.0, 0.0), score=(0.0, -1 / S), u=(dA, dS), v=(-S, A))
        both = torch.tensor([(A, S), lines[src]], dtype=torch.float64)
        known = torch.stack([x[i].flatten(), pred[i].flatten()]).double()
        rows.append((torch.tensor(lines[dst], dtype=torch.float64) @ torch.linalg.solve(both, known)).view_as(x[i]))
    return torch.stack(rows).to(x.dtype)


def _convert_see(answer: Answer, g: Generator) -> object:
    """All pairs on all paths."""
    seen = []
    for values in _paths(_rates(g, 3)).values():
        for src, dst in PAIRS:
            try:
                seen.append(plain(answer(randn(g, 3, 2), src, dst, randn(g, 3, 2), *values)))
            except Failed as error:
                seen.append(str(error).partition(":")[0])
    return seen


_BACKWARD = dict(
    u=lambda p, x, a, s, da, ds: (a * p + da * x) / (da * s - a * ds),
)

CONVERT = Exercise(
    id="05.2",
    names=("convert",),
    references=(convert,),
    inputs=_convert_inputs,
    batch=("pred", "x", "a", "sigma", "da", "dsigma"),
    facts=(
        Fact(
            "x0 = 2 and eps = -1: all 20 pairs by hand",
            _convert_by_hand,
            "find eps and x0 first, from whatever kind; then every other kind is one line",
        ),
        Fact(
            "x0 and eps from one prediction make x",
            _convert_point,
            "two equations: x = a x0 + sigma eps, and what the prediction says",
        ),
        Fact("there and back is the prediction again", _convert_back, "each direction undoes the other"),
        Fact(
            "variance-preserving path: as in the exact world",
            _convert_world("variance-preserving"),
            "on this path a^2 + sigma^2 = 1",
        ),
        Fact("straight path: as in the exact world", _convert_world("straight"), "on this path a + sigma = 1"),
        Fact(
            "a path that is neither: as in the exact world",
            _convert_world("neither"),
            "neither a + sigma nor a^2 + sigma^2 is 1 here: which of your formulas assume it?",
        ),
        Fact(
            "time reversed: as in the exact world",
            _convert_world("neither", -1.0),
            "then da > 0 and dsigma < 0; the formulas stay the same",
        ),
    ),
    mistakes=(
        Mistake(
            "time reversed",
            "The velocity has the wrong sign, both ways: yours is -(da x0 + dsigma eps), for a time that runs from "
            "noise to data. The rates that are passed in know which way time runs.",
            _convert_by(_BACKWARD, dict(u=lambda x0, eps, a, s, da, ds: -da * x0 - ds * eps)),
        ),
        Mistake(
            "sign of dsigma",
            "In the velocity dsigma has the wrong sign: u = da x0 + dsigma eps, and the sign is in dsigma itself.",
            _convert_by(
                dict(u=lambda p, x, a, s, da, ds: (a * p - da * x) / (-a * ds - da * s)),
                dict(u=lambda x0, eps, a, s, da, ds: da * x0 - ds * eps),
            ),
        ),
        Mistake(
            "times a",
            "x0 is found by multiplying with a, where x = a x0 + sigma eps asks for a division by a.",
            _convert_by(x0=lambda x, eps, a, s: (x - s * eps) * a),
        ),
        Mistake(
            "a left out",
            "x0 is found without the division by a: what you have is a x0.",
            _convert_by(x0=lambda x, eps, a, s: x - s * eps),
        ),
        Mistake(
            "v on the variance-preserving path only",
            "From v you use eps = sigma x + a v. That holds where a^2 + sigma^2 = 1; elsewhere it must be divided by "
            "a^2 + sigma^2.",
            _convert_by(dict(v=lambda p, x, a, s, da, ds: s * x + a * p)),
        ),
        Mistake(
            "sigma from a",
            "You compute sigma as sqrt(1 - a^2), which holds on a variance-preserving path only: use the sigma that "
            "is passed in.",
            _convert_by(prepare=lambda a, s, da, ds: (a, (1 - a**2).abs().sqrt(), da, ds)),
        ),
        Mistake(
            "u on the straight path only",
            "You take u for eps - x0, and eps for x + a u. That holds on the straight path only, where da = -1 and "
            "dsigma = 1.",
            _convert_by(dict(u=lambda p, x, a, s, da, ds: x + a * p), dict(u=lambda x0, eps, a, s, da, ds: eps - x0)),
        ),
        Mistake(
            "u with the rates of the straight path",
            "You take u for eps - x0 and leave da and dsigma aside. That is the velocity of the straight path only; in "
            "general u = da x0 + dsigma eps.",
            _convert_by(
                dict(u=lambda p, x, a, s, da, ds: (a * p + x) / (a + s)),
                dict(u=lambda x0, eps, a, s, da, ds: eps - x0),
            ),
        ),
        Mistake(
            "sign of v",
            "v has the wrong sign, both ways: v = a eps - sigma x0.",
            _convert_by(
                dict(v=lambda p, x, a, s, da, ds: (s * x - a * p) / (a**2 + s**2)),
                dict(v=lambda x0, eps, a, s, da, ds: s * x0 - a * eps),
            ),
        ),
        Mistake(
            "sign in the determinant",
            "You divide by a q + sigma p. The determinant of the two equations is a q - sigma p.",
            (_convert_determinant,),
        ),
        Mistake(
            "order of subtraction",
            "The subtraction for x0 is in the wrong order: x - sigma eps is a x0, not sigma eps - x.",
            _convert_by(x0=lambda x, eps, a, s: (s * eps - x) / a),
        ),
        Mistake(
            "order of subtraction in eps",
            "From x0 the subtraction is in the wrong order: x - a x0 is sigma eps, not a x0 - x.",
            _convert_by(dict(x0=lambda p, x, a, s, da, ds: (a * p - x) / s)),
        ),
        Mistake(
            "sign of the score",
            "The score has the wrong sign: it points away from the noise, score = -eps / sigma.",
            _convert_by(
                dict(score=lambda p, x, a, s, da, ds: s * p), dict(score=lambda x0, eps, a, s, da, ds: eps / s)
            ),
        ),
        Mistake(
            "score by the variance",
            "You divide eps by sigma^2. The score is -(x - a x0) / sigma^2, where x - a x0 is sigma eps: one sigma "
            "stays.",
            _convert_by(
                dict(score=lambda p, x, a, s, da, ds: -(s**2) * p),
                dict(score=lambda x0, eps, a, s, da, ds: -eps / s**2),
            ),
        ),
        Mistake(
            "a and sigma exchanged in v",
            "In v the factors are exchanged: v = a eps - sigma x0.",
            _convert_by(
                dict(v=lambda p, x, a, s, da, ds: (p + x) / (2 * s)),
                dict(v=lambda x0, eps, a, s, da, ds: s * eps - a * x0),
            ),
        ),
        Mistake(
            "v for u",
            "u and v are treated as one kind. u is the rate of change of x, da x0 + dsigma eps; v is a eps - sigma x0.",
            _convert_by(dict(u=_TO_EPS["v"]), dict(u=_FROM_BOTH["v"])),
        ),
        Mistake(
            "path of the first example",
            "The whole batch uses a, sigma and the rates of its first example.",
            _convert_by(prepare=lambda a, s, da, ds: tuple(value[:1].expand(len(value)) for value in (a, s, da, ds))),
        ),
    ),
    alternatives=(_convert_by(), (_convert_cramer,), (_convert_solve,)),
    hints=(
        "Do not write 20 formulas. Write five that find eps (from x and the prediction), one that finds x0 from x and "
        "eps, and five that make each kind of x0 and eps.",
        "eps is (x - a x0) / sigma, -sigma score, (a u - da x) / (a dsigma - da sigma) or (sigma x + a v) / (a^2 + "
        "sigma^2); x0 = (x - sigma eps) / a; then score = -eps / sigma, u = da x0 + dsigma eps, v = a eps - sigma x0.",
    ),
    hides=("predictions.convert", "predictions.solve", "predictions.target", "predictions.basis"),
    probe=_convert_see,
    points=2,
)

# --- 05.3 b_t, guided_velocity ----------------------------------------------------------------------------------------


def _b_inputs(g: Generator) -> dict:
    a, sigma, da, dsigma = _path(g)
    u_u, u_c = pictures(g, 2)
    return {
        "b_t": dict(a=a, sigma=sigma, da=da, dsigma=dsigma),
        "guided_velocity": dict(u_u=u_u, u_c=u_c, w=integer(g, 2, 9) / 2),
    }


def _b_probes(g: Generator) -> tuple[list[dict[str, object]], dict[str, Tensor]]:
    a, sigma = 0.3 + torch.rand(2, 9, generator=g, dtype=torch.float64)
    return [dict(a=p, sigma=q) for p, q in zip(a, sigma, strict=True)], {
        "a": a,
        "sigma": sigma,
        "a**2 + sigma**2": a**2 + sigma**2,
    }


def _w_probes(g: Generator) -> tuple[list[dict[str, object]], dict[str, Tensor]]:
    w = 0.05 + 0.9 * torch.rand(9, generator=g, dtype=torch.float64)
    return [dict(w=float(value)) for value in w], {"w": w, "1 - w": 1 - w, "1 + w": 1 + w}


def _b_closed(answer: Answer, g: Generator) -> None:
    """Closed forms on two paths, in this course's time and in one that runs from noise to data."""
    t = _rates(g)
    one, quarter = torch.ones_like(t), math.pi / 2
    cases = (
        ("the straight path a = 1 - t, sigma = t", _paths(t)["straight"], -t / (1 - t), "-t / (1 - t)"),
        (
            "the path a = cos(pi t / 2), sigma = sin(pi t / 2)",
            _paths(t)["variance-preserving"],
            -quarter * torch.tan(quarter * t),
            "-(pi / 2) tan(pi t / 2)",
        ),
        ("the reversed straight path a = t, sigma = 1 - t", (t, 1 - t, one, -one), (1 - t) / t, "(1 - t) / t"),
    )
    for name, values, right, formula in cases:
        got = answer.call("b_t", *values)
        if not isinstance(got, Tensor) or got.shape != right.shape:
            raise Wrong(f"on {name}: {oddity(got, right)}")
        if not close(plain(got), right, rtol=1e-6):
            text = f"on {name} b_t at t = {float(t[0]):.3f} is {float(got[0]):.5g}"
            factor = _factor(plain(got), right, *values)
            text += f": {factor}" if factor else ""
            raise Wrong(text, expected=f"{float(right[0]):.5g}, from {formula}")


def _two_worlds(
    g: Generator, n: int, values: tuple[Tensor, Tensor, Tensor, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Every kind at n points of the exact world: of the whole world, and of one of its classes."""
    world, (a, sigma, _, _) = archipelago(), values
    points, _ = world.sample(n, g)
    x = a[:, None] * points + sigma[:, None] * randn(g, n, 2)
    at, label, both = _schedule(*values), integer(g, 0, 2), []
    for condition in (None, label):
        x0, score = (f(x, torch.zeros(n), at, condition) for f in (world.posterior_mean, world.score))
        both.append(_all_kinds(x0, (x - a[:, None] * x0) / sigma[:, None], *values) | dict(score=score))
    return both[0], both[1]


def _b_world(answer: Answer, g: Generator) -> None:
    for name, values in _paths(_rates(g, 6)).items():
        free, given = _two_worlds(g, 6, values)
        due, classifier = given["u"] - free["u"], given["score"] - free["score"]
        got = answer.call("b_t", *values)[:, None] * classifier
        if close(plain(got), -due, rtol=1e-6, atol=1e-8):
            raise Wrong(f"path {name}: b_t grad log p_t(y | x) is minus (u(x | y) - u(x)): your b_t has the wrong sign")
        need(got, due, f"path {name}: b_t grad log p_t(y | x) is not u(x | y) - u(x)", atol=1e-7)


def _b_limits(answer: Answer, g: Generator) -> None:
    """At the data b_t vanishes; at the noise it grows without bound, and its product with the gradient does not."""
    t = torch.tensor([1e-5, 1 - 1e-5], dtype=torch.float64)
    data, noise = answer.call("b_t", *_paths(t)["straight"])
    if not abs(float(data)) < 1e-4:
        raise Wrong(
            f"at the data (t = 0.00001, straight path) b_t is {float(data):.3g}; with no noise left it vanishes"
        )
    if not abs(float(noise)) > 1e4:
        raise Wrong(f"at the noise (t = 0.99999, straight path) b_t is {float(noise):.3g}; it grows like 1 / a there")
    world, x, label = archipelago(), randn(g, 1, 2), integer(g, 0, 2)
    at = _schedule(*(value[1:] for value in _paths(t)["straight"]))
    gradient = world.score(x, t[1:], at, label) - world.score(x, t[1:], at)
    got = (noise * gradient)[0]
    means = [m.weights @ m.means for m in (world.given(None), world.given(label))]
    message = "close to the noise b_t grad log p(y | x) must tend to E[x0] - E[x0 | y], a finite vector"
    need(got, means[0] - means[1], message, rtol=1e-3, atol=1e-3)


def _guided_ends(answer: Answer, g: Generator) -> None:
    u_u, u_c = pictures(g, 2)
    for w, right, name in (
        (0.0, u_u, "u_u, the unconditional one"),
        (1.0, u_c, "u_c, the conditional one"),
        (0.5, (u_u + u_c) / 2, "the mean of both"),
    ):
        got = answer.call("guided_velocity", u_u, u_c, w)
        if not close(plain(got), right, rtol=1e-6, atol=1e-8):
            raise Wrong(f"at w = {w:g} you return {_sum_of(got, u_u=u_u, u_c=u_c)}; it must be {name}")


def _guided_formula(answer: Answer, g: Generator) -> None:
    """u_u + w b_t grad log p(y | x), with b_t from its closed form on the straight path."""
    t, w = _rates(g, 6), 1.5 + 3 * float(torch.rand((), generator=g))
    free, given = _two_worlds(g, 6, _paths(t)["straight"])
    got = answer.call("guided_velocity", free["u"], given["u"], w)
    right = free["u"] - w * (t / (1 - t))[:, None] * (given["score"] - free["score"])
    need(got, right, f"in the exact world, w = {w:.2f}: not u(x) + w b_t grad log p_t(y | x)", atol=1e-7)


def _guided_same(answer: Answer, g: Generator) -> None:
    """Guide eps, or the velocity, with one scale: the same thing, to 1e-12."""
    w = 1.5 + 3 * float(torch.rand((), generator=g))
    for name, values in _paths(_rates(g, 6)).items():
        free, given = _two_worlds(g, 6, values)
        a, sigma, da, dsigma = (value[:, None] for value in values)
        eps = free["eps"] + w * (given["eps"] - free["eps"])
        right = da * (free["x"] - sigma * eps) / a + dsigma * eps
        got = answer.call("guided_velocity", free["u"], given["u"], w)
        if close(plain(got), right, rtol=1e-5, atol=1e-5) and not close(plain(got), right, rtol=1e-9, atol=1e-11):
            raise Wrong(f"path {name}: right to six digits only: part of it was computed in float32")
        message = f"path {name}, w = {w:.2f}: not the velocity of the guided eps, eps_u + w (eps_c - eps_u)"
        need(got, right, message, rtol=1e-9, atol=1e-10)


def _b_by(b: Callable) -> tuple[Callable, Callable]:
    return (lambda a, sigma, da, dsigma: b(a, sigma, da, dsigma), guided_velocity)


def _guided_by(weights: Callable) -> tuple[Callable, Callable]:
    def guided(u_u: Tensor, u_c: Tensor, w: float) -> Tensor:
        on_u, on_c = weights(w)
        return on_u * u_u + on_c * u_c

    return b_t, guided


def _guided_shift(u_u: Tensor, u_c: Tensor, w: float) -> Tensor:
    return u_u + w * (u_c - u_u)


def _guided_weights(u_u: Tensor, u_c: Tensor, w: float) -> Tensor:
    return torch.tensordot(torch.tensor([1 - w, w], dtype=u_u.dtype), torch.stack([u_u, u_c]), dims=1)


GUIDED = Exercise(
    id="05.3",
    names=("b_t", "guided_velocity"),
    references=(b_t, guided_velocity),
    inputs=_b_inputs,
    batch=("a", "sigma", "da", "dsigma", "u_u", "u_c"),
    formulas=(
        Formula("b_t", "b_t", ("da", "dsigma"), "b_t = (sigma**2/a)*da - sigma*dsigma", _b_probes),
        Formula("guided_velocity", "u", ("u_u", "u_c"), "u = (1 - w)*u_u + w*u_c", _w_probes),
    ),
    facts=(
        Fact(
            "b_t has its closed form on three paths",
            _b_closed,
            "write u with x and the score instead of x0 and eps; b_t is what the score is multiplied by",
        ),
        Fact("b_t vanishes at the data, and grows like 1/a at the noise", _b_limits, "sigma = 0 there, and a = 0 here"),
        Fact(
            "b_t grad log p_t(y | x) is u(x | y) - u(x) in the exact world",
            _b_world,
            "x is the same in both velocities: only the scores differ, by grad log p_t(y | x)",
        ),
        Fact("guided_velocity at w = 0, 1 and 1/2", _guided_ends, "w is on the way from u_u to u_c"),
        Fact(
            "guided_velocity is u_u + w b_t grad log p_t(y | x)",
            _guided_formula,
            "b_t grad log p_t(y | x) is u_c - u_u",
        ),
        Fact(
            "guiding eps with the same w gives the same velocity",
            _guided_same,
            "both are linear in the score, and the weights add up to 1",
        ),
    ),
    mistakes=(
        Mistake(
            "time reversed",
            "b_t has the wrong sign, as if time ran the other way. It comes out positive where a grows (time from "
            "noise to data) and negative where a falls, as here; the rates see to that.",
            _b_by(lambda a, s, da, ds: s * (ds * a - da * s) / a),
        ),
        Mistake(
            "a and sigma exchanged",
            "In b_t the roles of a and sigma are exchanged: yours is -(a / sigma)^2 times what it should be.",
            _b_by(lambda a, s, da, ds: a * (ds * a - da * s) / s),
        ),
        Mistake(
            "divided by sigma",
            "You divide by sigma where a is due: b_t is wrong by a / sigma, and does not grow at the noise.",
            _b_by(lambda a, s, da, ds: da * s - ds * a),
        ),
        Mistake(
            "not divided by a",
            "The division by a is missing: x0 is (x + sigma^2 score) / a.",
            _b_by(lambda a, s, da, ds: s * (da * s - ds * a)),
        ),
        Mistake(
            "da forgotten",
            "The rate of a is missing: the score also moves x0, and x0 enters the velocity with da.",
            _b_by(lambda a, s, da, ds: -s * ds),
        ),
        Mistake(
            "dsigma forgotten",
            "The rate of sigma is missing: the score also moves eps, and eps enters the velocity with dsigma.",
            _b_by(lambda a, s, da, ds: s**2 * da / a),
        ),
        Mistake(
            "sign of dsigma",
            "dsigma has the wrong sign: eps is -sigma score, so that it enters with a minus.",
            _b_by(lambda a, s, da, ds: s * (da * s + ds * a) / a),
        ),
        Mistake(
            "factor of eps",
            "One sigma is missing: this is what -eps is multiplied by in the velocity. The score is -eps / sigma.",
            _b_by(lambda a, s, da, ds: (da * s - ds * a) / a),
        ),
        Mistake(
            "straight path only",
            "You use -sigma / a, whatever the rates: that is b_t on the straight path, da = -1 and dsigma = 1, alone.",
            _b_by(lambda a, s, da, ds: -s / a),
        ),
        Mistake(
            "sign of 1 - w",
            "The weight of u_u has the wrong sign: 1 - w, not w - 1. The two weights must add up to 1.",
            _guided_by(lambda w: (w - 1, w)),
        ),
        Mistake(
            "1 + w",
            "w is counted from the conditional velocity: (1 + w) u_c - w u_u. Here w = 0 is unconditional and w = 1 "
            "conditional; the two scales differ by 1.",
            _guided_by(lambda w: (-w, 1 + w)),
        ),
        Mistake(
            "w on the wrong one",
            "The two weights are exchanged: w belongs to the conditional velocity.",
            _guided_by(lambda w: (w, 1 - w)),
        ),
        Mistake(
            "no difference",
            "You add w u_c to u_u. What is added is w times the difference u_c - u_u.",
            _guided_by(lambda w: (1, w)),
        ),
        Mistake(
            "away from the class",
            "The difference is taken the other way round: your guidance leads away from the class.",
            _guided_by(lambda w: (1 + w, -w)),
        ),
    ),
    alternatives=(
        (lambda a, sigma, da, dsigma: sigma**2 * (da / a - dsigma / sigma), _guided_shift),
        (lambda a, sigma, da, dsigma: da / a * sigma**2 - dsigma * sigma, _guided_weights),
    ),
    hints=(
        "E[x0 | x] = (x + sigma^2 score) / a and E[eps | x] = -sigma score. Put both into u = da x0 + dsigma eps and "
        "collect what stands before the score. For guided_velocity you need no b_t at all: what is u_c - u_u?",
        "b_t = (da sigma^2 - dsigma sigma a) / a; the guided velocity is (1 - w) u_u + w u_c.",
    ),
    hides=(
        "guidance.cfg",
        "predictions.convert",
        "samplers.velocity",
        "guidance.negative",
        "guidance.perp_neg",
        "guidance.apg",
    ),
    probe=lambda answer, g: [
        answer.call("guided_velocity", *pictures(g, 2), 0.0),
        *(answer.call("b_t", *values) for values in _paths(_rates(g)).values()),
    ],
)

# --- 05.4 euler, heun -------------------------------------------------------------------------------------------------


class Field:
    """dx/dt = f(x, t), given as a function of x and of t with the axes of x; records the times that it is asked at,
    and the first number in x."""

    def __init__(self, f: Callable[[Tensor, Tensor], Tensor]):
        self.f, self.asked, self.at = f, [], []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        if not isinstance(t, Tensor) or t.shape != (len(x),):
            given = f"of shape {tuple(t.shape)}" if isinstance(t, Tensor) else f"as {type(t).__name__}"
            raise TypeError(f"f was given t {given}: it needs a tensor ({len(x)},), one t per example")
        if not isinstance(x, Tensor) or x.ndim < 2:
            raise TypeError("f was given an x without its batch axis")
        self.asked.append(float(t[0]))
        self.at.append(float(x.flatten()[0]))
        return self.f(x, pad(t, x).to(x))


def _wavy(x: Tensor, t: Tensor) -> Tensor:
    return (3 * t).cos() * x - 0.5 * x.sin() + t


def _grid(g: Generator, n: int, rising: bool) -> Tensor:
    """n unequal steps between 1 and 0, or the other way."""
    steps = 0.3 + torch.rand(n, generator=g, dtype=torch.float64)
    ts = torch.cat([torch.zeros(1, dtype=torch.float64), (steps / steps.sum()).cumsum(0)])
    return ts if rising else 1 - ts


def _ode_inputs(g: Generator) -> dict:
    rising = bool(integer(g, 0, 1))
    return {
        name: dict(f=Field(_wavy), x=randn(g, 4, 3), ts=_grid(g, integer(g, 3, 6), rising))
        for name in ("euler", "heun")
    }


def _ode_by_hand(answer: Answer, g: Generator) -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    for name, ts, right in (
        ("euler", (1.0, 0.5), 0.5),
        ("euler", (1.0, 0.5, 0.2), 0.425),
        ("heun", (1.0, 0.5), 0.5),
        ("heun", (1.0, 0.5, 0.2), 0.584375),
        ("euler", (0.0, 0.5, 1.0), 1.25),
        ("heun", (0.0, 0.5, 1.0), 1.40625),
    ):
        field = Field(lambda x, t: t * x)
        got = answer.call(name, field, one.clone(), torch.tensor(ts, dtype=torch.float64))
        if not isinstance(got, Tensor) or got.shape != one.shape:
            raise Wrong(f"{name}: {oddity(got, one)}")
        got = float(got)
        if not math.isclose(got, right, rel_tol=1e-6):
            asked = ", ".join(f"({x:.4g}, {t:.4g})" for x, t in zip(field.at, field.asked, strict=True))
            raise Wrong(
                f"{name}: dx/dt = t x from x = 1 along the times {ts} gave {got:.6g}; f was asked at (x, t) = {asked}",
                expected=f"{right:.6g}",
            )


def _ode_asks(answer: Answer, g: Generator) -> None:
    for rising in (False, True):
        n = integer(g, 3, 6)
        ts = _grid(g, n, rising)
        inner = ts.tolist()[:-1]
        due = dict(euler=inner, heun=[inner[0]] + [t for t in inner[1:] for _ in range(2)])
        for name, right in due.items():
            field = Field(_wavy)
            answer.call(name, field, randn(g, 4, 3), ts.clone())
            where = f"{name}, {n} steps from t = {inner[0]:g} to {float(ts[-1]):g}"
            if any(math.isclose(t, float(ts[-1]), abs_tol=1e-6) for t in field.asked):
                raise Wrong(f"{where}: f was asked at ts[-1], where it may not exist")
            if len(field.asked) != len(right):
                raise Wrong(f"{where}: f was asked {len(field.asked)} times; {len(right)} evaluations are enough")
            wrong = next(
                (i for i, (t, d) in enumerate(zip(field.asked, right, strict=True)) if abs(t - d) > 1e-6), None
            )
            if wrong is not None:
                times = ", ".join(f"{t:.3f}" for t in ts)
                raise Wrong(
                    f"{where}: evaluation {wrong + 1} was at t = {field.asked[wrong]:.3f} (ts is {times})",
                    expected=f"t = {right[wrong]:.3f}",
                )


def _ode_end(answer: Answer, g: Generator) -> None:
    """A field that does not exist at the end, from either side."""
    for rising in (False, True):
        ts = _grid(g, 5, rising)
        end = float(ts[-1])
        for name in ("euler", "heun"):
            out = answer.call(name, Field(lambda x, t, end=end: x / (t - end)), randn(g, 3, 2), ts.clone())
            if not out.isfinite().all():
                raise Wrong(f"{name}: a field that has no value at the end, t = {end:g}, makes your x NaN or infinite")


def _ode_constant(answer: Answer, g: Generator) -> None:
    """A velocity that does not depend on x: a sum, with Euler's or the trapezoidal rule."""
    for rising in (False, True):
        ts, x, slope = _grid(g, 5, rising), randn(g, 4, 3), randn(g, 4, 3)
        way = "rising" if rising else "falling"
        for name in ("euler", "heun"):
            got = answer.call(name, Field(lambda x, t, slope=slope: slope), x.clone(), ts.clone())
            right = x + (ts[-1] - ts[0]) * slope
            if close(plain(got), x - (ts[-1] - ts[0]) * slope, rtol=1e-6):
                raise Wrong(f"{name}, {way} times: with a constant velocity x goes the wrong way: what sign has s - t?")
            need(got, right, f"{name}, {way} times: with a constant velocity v, x must become x + (end - start) v")


def _ode_uneven(answer: Answer, g: Generator) -> None:
    """dx/dt = t: Euler's sum, and the trapezoidal rule with one Euler step at its end."""
    for rising in (False, True):
        ts, x = _grid(g, 5, rising), randn(g, 4, 3)
        gaps = ts.diff()
        left = gaps * ts[:-1]
        middle = (gaps * (ts[:-1] + ts[1:]) / 2)[:-1].sum() + left[-1]
        for name, right in (("euler", left.sum()), ("heun", middle)):
            got = answer.call(name, Field(lambda x, t: t.expand_as(x)), x.clone(), ts.clone())
            times = ", ".join(f"{t:.2f}" for t in ts)
            need(got, x + right, f"{name}: for dx/dt = t along the unequal times {times} the result is off")


def _ode_order(answer: Answer, g: Generator) -> None:
    """The slope of log error against log step, for dx/dt = -(1 + t) x, whose solution is known."""
    counts, x = (16, 32, 64, 128), 1 + torch.rand(3, 2, generator=g, dtype=torch.float64)
    for name, due in (("euler", 1.0), ("heun", 2.0)):
        for rising in (False, True):
            start, end = (0.0, 1.0) if rising else (1.0, 0.0)
            right = x * math.exp((start + start**2 / 2) - (end + end**2 / 2))
            errors = []
            for n in counts:
                even = torch.linspace(start, end, n + 1, dtype=torch.float64)
                ts = even + 0.1 * (2 * math.pi * even).sin() / math.pi  # unequal, and refined evenly
                got = answer.call(name, Field(lambda x, t: -(1 + t) * x), x.clone(), ts)
                errors.append(float((got - right).abs().mean()))
            logs = torch.tensor(
                [[math.log(1 / n), math.log(max(e, 1e-300))] for n, e in zip(counts, errors, strict=True)]
            )
            h, e = (logs - logs.mean(0)).T
            slope = float((h * e).sum() / (h * h).sum())
            if not abs(slope - due) < 0.2:
                kind = "not at all" if slope < 0.3 else f"like (step size)^{slope:.2f}"
                raise Wrong(
                    f"{name}: with smaller steps the error falls {kind}; order {due:.0f} is due "
                    f"({counts[0]} steps: {errors[0]:.2g}, {counts[-1]} steps: {errors[-1]:.2g})"
                )


def _euler_by(
    gap: Callable = lambda t, s, ts: s - t, at: Callable = lambda t, s: t, skip: int = 0, batched: bool = True
) -> Callable:
    def euler(f: Callable, x: Tensor, ts: Tensor) -> Tensor:
        for t, s in list(pairwise(ts))[: len(ts) - 1 - skip]:
            time = at(t, s)
            x = x + gap(t, s, ts) * f(x, time.expand(len(x)) if batched else time)
        return x

    return euler


def _heun_by(
    gap: Callable = lambda t, s, ts: s - t,
    second: Callable = lambda f, x, guess, t, s: f(guess, s),
    mean: Callable = lambda one, two: (one + two) / 2,
    whole: bool = False,
    start: Callable = lambda x, guess: x,
    again: bool = False,
    skip: int = 0,
    batched: bool = True,
) -> Callable:
    def heun(f: Callable, x: Tensor, ts: Tensor) -> Tensor:
        def ask(x: Tensor, t: Tensor) -> Tensor:
            return f(x, t.expand(len(x)) if batched else t)

        steps = list(pairwise(ts))[: len(ts) - 1 - skip]
        for i, (t, s) in enumerate(steps):
            h, slope = gap(t, s, ts), ask(x, t)
            guess = x + h * slope
            if i == len(steps) - 1 and not whole:
                x = guess
            else:
                slope = ask(x, t) if again else slope
                x = start(x, guess) + h * mean(slope, second(ask, x, guess, t, s))
        return x

    return heun


def _euler_indices(f: Callable, x: Tensor, ts: Tensor) -> Tensor:
    gaps = torch.diff(ts)
    for i in range(len(gaps)):
        x = torch.add(x, gaps[i] * f(x, torch.full((x.shape[0],), float(ts[i]), dtype=x.dtype)))
    return x


def _heun_indices(f: Callable, x: Tensor, ts: Tensor) -> Tensor:
    """The last step apart; the mean of the two ends as a correction of Euler's guess."""
    here = ts[:, None].expand(-1, len(x))
    for i in range(len(ts) - 2):
        h = ts[i + 1] - ts[i]
        slope = f(x, here[i])
        x = x + h * slope
        x = x + h / 2 * (f(x, here[i + 1]) - slope)
    return x + (ts[-1] - ts[-2]) * f(x, here[-2])


def _euler_recursive(f: Callable, x: Tensor, ts: Tensor) -> Tensor:
    if len(ts) == 1:
        return x
    return _euler_recursive(f, x + (ts[1] - ts[0]) * f(x, ts[0].repeat(len(x))), ts[1:])


def _heun_recursive(f: Callable, x: Tensor, ts: Tensor) -> Tensor:
    if len(ts) == 2:
        return _euler_recursive(f, x, ts)
    t, s = (time.repeat(len(x)) for time in ts[:2])
    k = (ts[1] - ts[0]) * f(x, t)
    return _heun_recursive(f, x + 0.5 * k + 0.5 * (ts[1] - ts[0]) * f(x + k, s), ts[1:])


def _ode_in_place(f: Callable, x: Tensor, ts: Tensor) -> Tensor:
    for t, s in pairwise(ts):
        x += (s - t) * f(x, t.expand(len(x)))
    return x


def _ode_see(answer: Answer, g: Generator) -> object:
    """Results and the times asked at, rising and falling."""
    seen = []
    for rising in (False, True):
        ts, x = _grid(g, 4, rising), randn(g, 3, 2)
        for name in ("euler", "heun"):
            field = Field(_wavy)
            try:
                out = plain(answer.call(name, field, x.clone(), ts.clone()))
            except Failed as error:
                out = str(error).partition(":")[0]
            seen.append([out, field.asked])
    return seen


SOLVERS = Exercise(
    id="05.4",
    names=("euler", "heun"),
    references=(euler, heun),
    inputs=_ode_inputs,
    batch=("x",),
    facts=(
        Fact("a constant velocity, rising and falling times", _ode_constant, "the step is s - t, with its sign"),
        Fact("dx/dt = t x by hand", _ode_by_hand, "Heun: slope at t, Euler's guess, slope there at s, mean of both"),
        Fact("unequal steps", _ode_uneven, "each step has its own s - t"),
        Fact(
            "the error falls with the order of the method",
            _ode_order,
            "the second slope belongs to (guess, s), and the mean of both slopes to the whole step",
        ),
        Fact(
            "asks f as often as is needed, and at the right times",
            _ode_asks,
            "keep a slope that you need twice; the last Heun step is an Euler step",
        ),
        Fact("f need not exist at the end", _ode_end, "the last evaluation belongs to ts[-2]"),
    ),
    mistakes=(
        Mistake(
            "sign of the step",
            "The step is t - s: x goes against its velocity. It is s - t, negative where the times fall.",
            (_euler_by(lambda t, s, ts: t - s), _heun_by(lambda t, s, ts: t - s)),
        ),
        Mistake(
            "time reversed",
            "You step by |s - t|, as if time always rose from noise to data. Here sampling falls from t = 1 to t = 0: "
            "use s - t with its sign.",
            (_euler_by(lambda t, s, ts: (s - t).abs()), _heun_by(lambda t, s, ts: (s - t).abs())),
        ),
        Mistake(
            "equal steps assumed",
            "You use one step size for all. The times in ts need not be equally spaced: each step has its own s - t.",
            (
                _euler_by(lambda t, s, ts: (ts[-1] - ts[0]) / (len(ts) - 1)),
                _heun_by(lambda t, s, ts: (ts[-1] - ts[0]) / (len(ts) - 1)),
            ),
        ),
        Mistake(
            "first step size for all",
            "You use the first step size, ts[1] - ts[0], for all steps: each has its own s - t.",
            (_euler_by(lambda t, s, ts: ts[1] - ts[0]), _heun_by(lambda t, s, ts: ts[1] - ts[0])),
        ),
        Mistake(
            "time of arrival",
            "euler takes the slope at the time of arrival, s. It belongs to t, where x is; at ts[-1] there may be "
            "none.",
            (_euler_by(at=lambda t, s: s), heun),
        ),
        Mistake(
            "second slope at old t",
            "heun asks for the second slope at the old t: it belongs to s, where the guess is. As it is, the order "
            "falls to 1.",
            (euler, _heun_by(second=lambda f, x, guess, t, s: f(guess, t))),
        ),
        Mistake(
            "second slope at old x",
            "heun asks for the second slope at the old x: it belongs to Euler's guess. As it is, the order falls to 1.",
            (euler, _heun_by(second=lambda f, x, guess, t, s: f(x, s))),
        ),
        Mistake(
            "sum for mean",
            "heun adds the two slopes without halving: each step goes twice as far.",
            (euler, _heun_by(mean=lambda one, two: one + two)),
        ),
        Mistake(
            "second slope alone",
            "heun uses the second slope alone, without the mean of both: the order falls to 1.",
            (euler, _heun_by(mean=lambda one, two: two)),
        ),
        Mistake(
            "starts from the guess",
            "heun adds the mean slope to Euler's guess instead of x: the step is made twice.",
            (euler, _heun_by(start=lambda x, guess: guess)),
        ),
        Mistake(
            "evaluation at the end",
            "heun asks f at ts[-1], 2 n evaluations in all. A velocity may not exist there: let the last step be an "
            "Euler step.",
            (euler, _heun_by(whole=True)),
        ),
        Mistake(
            "slope asked twice",
            "heun gets the right numbers with a third evaluation per step: it asks f(x, t) again. With a network each "
            "costs the whole price, so keep the first slope.",
            (euler, _heun_by(again=True)),
        ),
        Mistake(
            "midpoint method",
            "This is the midpoint method: also of order 2, but its second slope is half-way. Heun's averages the two "
            "ends.",
            (
                euler,
                _heun_by(second=lambda f, x, guess, t, s: f((x + guess) / 2, (t + s) / 2), mean=lambda one, two: two),
            ),
        ),
        Mistake(
            "one step short",
            "The last step is missing: n + 1 times have n steps between them, and x must arrive at ts[-1].",
            (_euler_by(skip=1), _heun_by(skip=1)),
        ),
        Mistake(
            "Euler for Heun",
            "heun does what euler does: the second slope is missing.",
            (euler, euler),
        ),
        Mistake(
            "in place",
            "x is changed in place (+=): the caller's noise is lost, and with it the comparison of two solvers.",
            (_ode_in_place, heun),
        ),
        Mistake(
            "t without axes",
            "f gets t as a number without axes. It takes one t per example, (B,), as a network does.",
            (_euler_by(batched=False), _heun_by(batched=False)),
        ),
    ),
    alternatives=((_euler_indices, _heun_indices), (_euler_recursive, _heun_recursive)),
    hints=(
        "A loop over pairs of neighbouring times (t, s). Euler: one slope, at (x, t). Heun: that slope leads to a "
        "guess; what is the slope there? In which step may you not ask?",
        "euler: x = x + (s - t) f(x, t). heun: slope = f(x, t); guess = x + (s - t) slope; x = x + (s - t) (slope + "
        "f(guess, s)) / 2, and x = guess in the last step. t.expand(len(x)) makes t (B,).",
    ),
    hides=("samplers.euler_step", "samplers.heun_step", "samplers.ddim_step"),
    probe=_ode_see,
    points=2,
)

# --- 05.5 cfg_zero_star -----------------------------------------------------------------------------------------------


def _star_inputs(g: Generator) -> dict:
    v_c, v_u = pictures(g, 2)
    zero_steps = integer(g, 0, 2)
    step = zero_steps + integer(g, 0, 3)
    return {"cfg_zero_star": dict(v_c=v_c, v_u=v_u, scale=integer(g, 4, 12) / 2, step=step, zero_steps=zero_steps)}


def _alike(g: Generator) -> list[Tensor]:
    """Two velocities that point in similar directions, as a network's do, each example more or less so."""
    v_c, other = pictures(g, 2)
    return [v_c, pad(torch.tensor([0.5, 1.0, 2.0, -1.0], dtype=torch.float64), v_c) * v_c + 0.7 * other]


def _dots(v: Tensor, w: Tensor) -> list[float]:
    """<v, w> of each example, entry by entry."""
    return [math.fsum((a * b).flatten().tolist()) for a, b in zip(v.double(), w.double(), strict=True)]


def _star_first(answer: Answer, g: Generator) -> None:
    for zero_steps, last in ((1, 3), (3, 5), (0, 2)):
        for step in range(last):
            v_c, v_u = pictures(g, 2)
            got = answer(v_c, v_u, 2.5, step, zero_steps)
            due = step < zero_steps
            odd = oddity(got, v_c)
            if odd:
                raise Wrong(f"zero_steps = {zero_steps}, step = {step}: {odd}")
            if due != bool((got == 0).all()):
                what = "must be 0" if due else "is 0, and should be guided"
                raise Wrong(f"zero_steps = {zero_steps}, step = {step}: the velocity {what}; step counts from 0")


def _star_default(answer: Answer, g: Generator) -> None:
    v_c, v_u = pictures(g, 2)
    if answer(v_c, v_u, 2.5, 0).any() or not answer(v_c, v_u, 2.5, 1).any():
        raise Wrong("without zero_steps the velocity must be 0 in the first step, step = 0, and in no other")


def _star_one(answer: Answer, g: Generator) -> None:
    v_c, v_u = pictures(g, 2)
    got = answer(v_c, v_u, 1.0, 4, 1)
    if not close(plain(got), v_c, rtol=1e-6, atol=1e-7):
        raise Wrong(
            f"at scale 1 you return {_sum_of(got[0], v_c=v_c[0], v_u=v_u[0])} for the first example; due is v_c"
        )


def _star_by_hand(answer: Answer, g: Generator) -> None:
    """v_u = (2, 0) fits v_c = (3, 1) best at one and a half times its length: (3, 0)."""
    v_c, v_u = (torch.tensor([row], dtype=torch.float64) for row in ([3.0, 1.0], [2.0, 0.0]))
    got = answer(v_c, v_u, 3.0, 1, 1)[0]
    if not close(plain(got), torch.tensor([3.0, 3.0], dtype=torch.float64), rtol=1e-6):
        shown = ", ".join(f"{float(v):.4g}" for v in got.flatten())
        x, y = (float(v) for v in got.flatten())
        like = f", as if fit were {(9 - x) / 4:.4g}" if math.isclose(y, 3, rel_tol=1e-6) else ""
        raise Wrong(f"v_c = (3, 1), v_u = (2, 0), scale 3: you return ({shown}){like}", expected="(3, 3): fit is 3/2")


def _star_right_angle(answer: Answer, g: Generator) -> None:
    """Beyond v_c, guidance leads at a right angle to v_u: that is what the best fit leaves."""
    v_c, v_u = _alike(g)
    extra = answer(v_c, v_u, 2.0, 3, 1) - v_c
    for i, (dot, size, length) in enumerate(zip(_dots(extra, v_u), _dots(extra, extra), _dots(v_u, v_u), strict=True)):
        if not abs(dot) < 1e-5 * math.sqrt(size * length) + 1e-9:
            cosine = dot / math.sqrt(size * length)
            raise Wrong(
                f"example {i}: at scale 2 the result is v_c + (v_c - fit v_u), and the best fit leaves v_c - fit v_u "
                f"at a right angle to v_u; the cosine of yours is {cosine:.3f}"
            )


def _star_shares(answer: Answer, g: Generator) -> None:
    """The coefficients of v_c and v_u in each example."""
    v_c, v_u = _alike(g)
    scale = integer(g, 5, 12) / 2
    got = answer(v_c, v_u, scale, 5, 2)
    for i, (dot, length) in enumerate(zip(_dots(v_c, v_u), _dots(v_u, v_u), strict=True)):
        fit = dot / length
        right = scale * v_c[i] + fit * (1 - scale) * v_u[i]
        if close(plain(got[i]), right, rtol=1e-6, atol=1e-7):
            continue
        rest = (got[i] - scale * v_c[i]) / (1 - scale)
        mine = float((rest * v_u[i]).sum()) / length
        like = f", as if fit were {mine:.4g}" if close(plain(rest), mine * v_u[i], rtol=1e-5, atol=1e-6) else ""
        due = f"scale v_c + fit (1 - scale) v_u = {_sum_of(right, v_c=v_c[i], v_u=v_u[i])}"
        raise Wrong(
            f"scale = {scale:g}, example {i}, whose best fit is {fit:.4g}: you return "
            f"{_sum_of(got[i], v_c=v_c[i], v_u=v_u[i])}{like}",
            expected=due,
        )


def _star_parallel(answer: Answer, g: Generator) -> None:
    """A v_u that is v_c but for its length carries no other direction: nothing is left to guide with."""
    v_c, factors = (
        pictures(g, 1)[0],
        pad(torch.tensor([0.2, -3.0, 1.0, 7.0], dtype=torch.float64), torch.ones(4, 1, 1, 1)),
    )
    got = answer(v_c, factors * v_c, 4.0, 2, 1)
    need(got, v_c, "where v_u is a multiple of v_c the fit is perfect, so that the result is v_c at every scale")


def _star_nothing(answer: Answer, g: Generator) -> None:
    v_c, v_u = pictures(g, 2)
    v_u[1] = 0
    got = answer(v_c, v_u, 3.0, 2, 1)
    if not got.isfinite().all():
        raise Wrong("where v_u is 0 your result is not finite: 0 / 0")
    need(got[1], 3 * v_c[1], "where v_u is 0 only scale v_c is left")


def _star_fit(c: Tensor, u: Tensor) -> Tensor:
    """(B, n), (B, n) -> (B,)."""
    length2 = (u * u).sum(1)
    return torch.where(length2 > 0, (c * u).sum(1) / length2, 1)


def _star_by(
    fit: Callable = _star_fit,
    guide: Callable = lambda v_c, v_u, fit, scale: fit * v_u + scale * (v_c - fit * v_u),
    first: Callable = lambda v_c, v_u: torch.zeros_like(v_c),
    early: Callable = lambda step, zero_steps: step < zero_steps,
) -> tuple[Callable]:
    def cfg_zero_star(v_c: Tensor, v_u: Tensor, scale: float, step: int, zero_steps: int = 1) -> Tensor:
        if early(step, zero_steps):
            return first(v_c, v_u)
        return guide(v_c, v_u, pad(fit(v_c.flatten(1), v_u.flatten(1)), v_u), scale)

    return (cfg_zero_star,)


def _star_rows(v_c: Tensor, v_u: Tensor, scale: float, step: int, zero_steps: int = 1) -> Tensor:
    """One fit per row of the image."""
    if step < zero_steps:
        return torch.zeros_like(v_c)
    fit = (v_c * v_u).sum(-1, keepdim=True) / (v_u * v_u).sum(-1, keepdim=True).clamp(min=1e-30)
    return fit * v_u + scale * (v_c - fit * v_u)


def _star_pixels(v_c: Tensor, v_u: Tensor, scale: float, step: int, zero_steps: int = 1) -> Tensor:
    """One fit per pixel: the sums run over the channels."""
    if step < zero_steps:
        return torch.zeros_like(v_c)
    fit = (v_c * v_u).sum(1, keepdim=True) / (v_u * v_u).sum(1, keepdim=True).clamp(min=1e-30)
    return fit * v_u + scale * (v_c - fit * v_u)


def _star_stable(v_c: Tensor, v_u: Tensor, scale: float, step: int, zero_steps: int = 1) -> Tensor:
    """With a small number below the fraction, as implementations have it."""
    axes = tuple(range(1, v_c.ndim))
    fit = (v_c * v_u).sum(axes, keepdim=True) / ((v_u**2).sum(axes, keepdim=True) + 1e-8)
    guided = scale * v_c + fit * (1 - scale) * v_u
    return guided * float(step >= zero_steps)


def _star_loop(v_c: Tensor, v_u: Tensor, scale: float, step: int, zero_steps: int = 1) -> Tensor:
    """Example by example: v_c plus scale - 1 times what is at a right angle to v_u."""
    rows = []
    for c, u in zip(v_c, v_u, strict=True):
        along = u / u.norm() if u.any() else u
        rows.append(c + (scale - 1) * (c - (c * along).sum() * along) if step >= zero_steps else 0 * c)
    return torch.stack(rows)


def _star_see(answer: Answer, g: Generator) -> object:
    seen = []
    for step, zero_steps in ((0, 1), (1, 1), (2, 1), (0, 3), (2, 3), (3, 3), (4, 3), (0, 0)):
        try:
            seen.append(plain(answer(randn(g, 3, 4), randn(g, 3, 4), 2.5, step, zero_steps)))
        except Failed as error:
            seen.append(str(error).partition(":")[0])
    v_u = randn(g, 3, 4)
    v_u[0] = 0
    return [*seen, plain(answer(randn(g, 3, 4), v_u, 2.5, 4, 1)), plain(answer(v_u + 1, v_u, 1.0, 4, 1))]


ZERO_STAR = Exercise(
    id="05.5",
    names=("cfg_zero_star",),
    references=(cfg_zero_star,),
    inputs=_star_inputs,
    batch=("v_c", "v_u"),
    facts=(
        Fact("0 in the first zero_steps steps, and in no other", _star_first, "step 0 is the first one, at the noise"),
        Fact("zero_steps is 1 unless it is passed", _star_default, "keep the default value of the signature"),
        Fact("scale 1 gives v_c", _star_one, "which of the two velocities gets the factor fit, and where?"),
        Fact("v_c = (3, 1), v_u = (2, 0), scale 3", _star_by_hand, "which multiple of (2, 0) is closest to (3, 1)?"),
        Fact(
            "what guidance adds is at a right angle to v_u",
            _star_right_angle,
            "the best fit minimises |v_c - fit v_u|: set the derivative in fit to 0",
        ),
        Fact("a v_u parallel to v_c changes nothing", _star_parallel, "then fit v_u is v_c"),
        Fact(
            "the coefficients are scale, and fit (1 - scale)",
            _star_shares,
            "replace v_u by fit v_u in both of its places",
        ),
        Fact("v_u = 0 does no harm", _star_nothing, "what if |v_u|^2 is 0?"),
    ),
    mistakes=(
        Mistake(
            "one fit for the batch",
            "One fit is computed for the whole batch: each example has its own, so sum over its own entries only.",
            _star_by(lambda c, u: ((c * u).sum() / (u * u).sum()).expand(len(c))),
        ),
        Mistake(
            "divided by |v_c|^2",
            "The fit is divided by |v_c|^2. It is v_u that is scaled: <v_c, v_u> / |v_u|^2.",
            _star_by(lambda c, u: (c * u).sum(1) / (c * c).sum(1)),
        ),
        Mistake(
            "shift formed before scaling",
            "The shift v_c - v_u is formed before v_u is scaled: the coefficient of v_u is fit - scale, and must be "
            "fit (1 - scale). Put fit v_u in both places.",
            _star_by(guide=lambda v_c, v_u, fit, scale: fit * v_u + scale * (v_c - v_u)),
        ),
        Mistake(
            "scaled in the shift alone",
            "fit v_u stands in the difference, but the v_u that it is added to is unscaled: at scale 1 you do not get "
            "v_c.",
            _star_by(guide=lambda v_c, v_u, fit, scale: v_u + scale * (v_c - fit * v_u)),
        ),
        Mistake(
            "v_c scaled",
            "fit multiplies v_c, and it is there for v_u: at scale 1 you do not get v_c.",
            _star_by(guide=lambda v_c, v_u, fit, scale: v_u + scale * (fit * v_c - v_u)),
        ),
        Mistake(
            "counted from v_c",
            "You start from v_c: v_c + scale (v_c - fit v_u). Start from fit v_u, so that scale 1 gives v_c.",
            _star_by(guide=lambda v_c, v_u, fit, scale: v_c + scale * (v_c - fit * v_u)),
        ),
        Mistake(
            "time reversed",
            "The zeros come at the wrong end: the velocity is 0 from step zero_steps on, near the data, and guided "
            "before. Step 0 is at the noise, and there it must be 0.",
            _star_by(early=lambda step, zero_steps: step >= zero_steps),
        ),
        Mistake(
            "one step too many",
            "The zeros last one step too long (<= for <): step counts from 0.",
            _star_by(early=lambda step, zero_steps: step <= zero_steps),
        ),
        Mistake(
            "zero_steps ignored",
            "Only step 0 gives 0, whatever zero_steps is.",
            _star_by(early=lambda step, zero_steps: step == 0),
        ),
        Mistake(
            "no zeros",
            "The first steps are guided like the others: zero-init, the second half of the method, is missing.",
            _star_by(early=lambda step, zero_steps: False),
        ),
        Mistake(
            "v_c at first",
            "In the first steps you return v_c, without guidance. Zero-init means the velocity 0: x stays where it is.",
            _star_by(first=lambda v_c, v_u: v_c.clone()),
        ),
        Mistake(
            "length not squared",
            "You divide by |v_u| instead of |v_u|^2: fit v_u then grows with the length of v_u.",
            _star_by(lambda c, u: (c * u).sum(1) / u.norm(dim=1).clamp(min=1e-30)),
        ),
        Mistake(
            "cosine for fit",
            "fit is the cosine between v_c and v_u here. It must also carry the ratio of their lengths.",
            _star_by(lambda c, u: (c * u).sum(1) / (c.norm(dim=1) * u.norm(dim=1)).clamp(min=1e-30)),
        ),
        Mistake(
            "no fit",
            "This is plain guidance, v_u + scale (v_c - v_u): v_u is not scaled to fit.",
            _star_by(lambda c, u: torch.ones_like(c[:, 0])),
        ),
        Mistake(
            "fit per row",
            "The sums run over the last axis alone, so that each row of an image gets a fit of its own: flatten(1) "
            "first.",
            (_star_rows,),
        ),
        Mistake(
            "fit over axis 1",
            "The sums run over axis 1 alone, so that each pixel gets a fit of its own: flatten(1) first.",
            (_star_pixels,),
        ),
        Mistake(
            "0 / 0",
            "Where v_u is 0 the fit is 0 / 0, and the whole example NaN. Any number will do there, say 1.",
            _star_by(lambda c, u: (c * u).sum(1) / (u * u).sum(1)),
        ),
    ),
    alternatives=((_star_stable,), (_star_loop,)),
    hints=(
        "Project v_c onto v_u, each example flattened to one vector. Then guidance as ever, with fit v_u in every "
        "place where v_u stood.",
        "fit = (v_c * v_u).flatten(1).sum(1) / (v_u * v_u).flatten(1).sum(1), padded; fit v_u + scale (v_c - fit v_u), "
        "or zeros where step < zero_steps.",
    ),
    hides=("guidance.project",),
    probe=_star_see,
)

# --- 05.6 sample_flow -------------------------------------------------------------------------------------------------

_NULL = 13  # neither the largest label plus one, nor MNIST's 10


class KnowsPoints(Recorder):
    """The velocity on the straight path to one known point per label: points (labels, *shape), one of them null's."""

    def __init__(self, points: Tensor, null: int = _NULL):
        super().__init__()
        self.points, self.null = points, null
        self.gain = nn.Parameter(torch.ones(()))

    def answer(self, xt: Tensor, t: Tensor, y: Tensor) -> Tensor:
        u = (xt.double() - self.points[y]) / pad(t.double().clamp(min=1e-3), xt)
        return (self.gain * u).to(xt.dtype)


class WorldVelocity(Recorder):
    """The exact velocity of the archipelago on the straight path, of one class or, for null, of the whole world."""

    def __init__(self):
        super().__init__()
        self.null = _NULL
        self.gain = nn.Parameter(torch.ones(()))
        self.worlds = [archipelago().given(label) for label in (0, 1, 2, None)]

    def answer(self, xt: Tensor, t: Tensor, y: Tensor) -> Tensor:
        out, x, t = torch.zeros_like(xt), xt.double(), t.double().clamp(min=1e-3)
        for label in y.unique().tolist():
            member = y == label
            world = self.worlds[label if 0 <= label < 3 else 3]
            x0 = world.posterior_mean(x[member], t[member], flow())
            out[member] = ((x[member] - x0) / t[member, None]).to(xt.dtype)
        return self.gain * out


def _flow_inputs(g: Generator) -> dict:
    y = torch.randint(0, 3, (5,), generator=g)
    return {"sample_flow": dict(model=WorldVelocity(), y=y, w=integer(g, 0, 5) / 2, steps=5, shape=(2,), gen=_gen(g))}


def _gen(g: Generator) -> Generator:
    return Generator().manual_seed(integer(g, 0, 10**6))


def _flowed(
    answer: Answer, g: Generator, steps: int = 5, w: float = 2.5, training: bool = True
) -> tuple[KnowsPoints, Tensor, Tensor]:
    """The model after sampling from it, the labels, and the result."""
    model = KnowsPoints(2 * randn(g, 16, 2, 3)).train(training)
    y = torch.randperm(9, generator=g)[:6]
    return model, y, answer(model, y, w, steps, (2, 3), _gen(g))


def _flow_asks(answer: Answer, g: Generator) -> None:
    steps = (5, 8)[integer(g, 0, 1)]
    model, y, _ = _flowed(answer, g, steps)
    asked = model.asked
    if any(a.t.is_floating_point() is False for a in asked):
        raise Wrong(f"the model was given t as {asked[0].t.dtype}: it was trained on real numbers between 0 and 1")
    if any(len(a.y) != 2 * len(y) for a in asked):
        raise Wrong(
            f"the model was asked about batches of {len(asked[0].y)}; with {len(y)} labels one batch holds both "
            f"halves, {2 * len(y)}"
        )
    if any((a.t != a.t[0]).any() for a in asked):
        raise Wrong("within one evaluation the examples have different t: they all go together")
    seen = [float(a.t[0]) for a in asked]
    text = f"{steps} steps: the model was asked {len(seen)} times, at t = {', '.join(f'{t:.3g}' for t in seen)}"
    if len(seen) > 1 and seen[0] < seen[-1]:
        raise Wrong(f"{text}: time rises; here the noise is at t = 1, so that sampling falls from 1 to 0")
    if any(t < 1e-6 for t in seen):
        raise Wrong(f"{text}: at t = 0 there is nothing to ask, x has arrived")
    due = [1 - i / steps for i in range(steps)]
    if len(seen) != steps or any(abs(a - b) > 1e-4 for a, b in zip(seen, due, strict=True)):
        wanted = f"{text}; wanted are {steps} equal steps, the first from t = 1 and the last to t = 0"
        raise Wrong(wanted, expected=f"t = {', '.join(f'{t:.3g}' for t in due)}")


def _halves(values: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
    """The two ways to put two halves into one batch: one after the other, or in turns."""
    n = len(values) // 2
    return (values[:n], values[n:]), (values[::2], values[1::2])


def _half(x: Tensor) -> Tensor:
    """The x of one half of a batch, in whichever order the halves are; all of it where there are none."""
    return next((one for one, two in _halves(x) if torch.equal(one, two)), x)


def _flow_labels(answer: Answer, g: Generator) -> None:
    model, y, _ = _flowed(answer, g)
    null = torch.full_like(y, model.null)
    for a in model.asked:
        found = [
            i
            for i, (one, two) in enumerate(_halves(a.y))
            for p, q in ((one, two), (two, one))
            if p.shape == y.shape and q.shape == y.shape and torch.equal(p, null) and torch.equal(q, y)
        ]
        if not found:
            raise Wrong(
                f"the model was asked for the labels {a.y.tolist()}; wanted are the labels {y.tolist()}, and for each "
                f"the null label, which is model.null = {model.null} here"
            )
        one, two = _halves(a.xt)[found[0]]
        if not torch.equal(one, two):
            raise Wrong("the unconditional half sees another x than the conditional one: both velocities are of one x")
        if a.training:
            raise Wrong("the model samples in train mode: dropout and batch statistics act on your images")
        if a.graph:
            raise Wrong("the model is evaluated with autograd on: memory grows with every step")


def _flow_mode(answer: Answer, g: Generator) -> None:
    for training in (True, False):
        model, _, _ = _flowed(answer, g, training=training)
        if model.training != training:
            was, now = ("train", "eval") if training else ("eval", "train")
            raise Wrong(f"a model that came in {was} mode is left in {now} mode")


def _flow_noise(answer: Answer, g: Generator) -> None:
    models = [_flowed(answer, g, steps=1)[0] for _ in range(60)]
    if not all(model.asked for model in models):
        raise Wrong("with steps = 1 the model was not asked at all")
    x = torch.stack([_half(model.asked[0].xt).double()[:6] for model in models])
    if x.shape[1:] != (6, 2, 3):
        raise Wrong(f"the first x has shape {tuple(x.shape[1:])}; 6 labels and shape (2, 3) make (6, 2, 3)")
    if (x[:, 1:] == x[:, :1]).all():
        raise Wrong("all examples start from one noise: each needs its own")
    if (x[1:] == x[:1]).all():
        raise Wrong("the noise is the same whatever the state of gen: draw it with generator=gen")
    n, mean, var = x.numel(), float(x.mean()), float(x.var())
    if abs(mean) > 7 / math.sqrt(n) or abs(var - 1) > 7 * math.sqrt(2 / n):
        raise Wrong(f"x at t = 1 has mean {mean:.3f} and variance {var:.3f}: it should be standard normal")


def _flow_line(answer: Answer, g: Generator) -> None:
    """Where each label has one point, Euler on the straight path is exact, guided or not, at every step."""
    for w in (0.0, 1.0, 2.5):
        model, y, out = _flowed(answer, g, w=w)
        on_c, on_u = model.points[y], model.points[model.null].expand(len(y), 2, 3)
        if out.shape != on_c.shape:
            raise Wrong(f"the result has shape {tuple(out.shape)} where {tuple(on_c.shape)} is due")
        knows = f"w = {w:g}: the model knows a point x_label for each label, and x_null for null"
        due = f"(1 - w) x_null + w x_label = {_term(1 - w, 'x_null')} + {_term(w, 'x_label')}"
        goal = (1 - w) * on_u + w * on_c
        noise = _half(model.asked[0].xt).double() if model.asked else on_c
        noise = noise if noise.shape == on_c.shape else torch.zeros_like(on_c)
        if not close(plain(out).double(), goal, rtol=1e-3, atol=1e-3):
            made = _sum_of(out, x_label=on_c, x_null=on_u, noise=noise)
            cut = "; nothing is beyond [-1, 1]: did you clip x?" if out.abs().max() <= 1.001 else ""
            raise Wrong(f"{knows}; you arrive at {made}{cut}", expected=due)
        for a in model.asked:
            t, x = float(a.t[0]), _half(a.xt)
            if x.shape == goal.shape and not close(x.double(), (1 - t) * goal + t * noise, rtol=1e-3, atol=1e-3):
                made = _sum_of(x, x_label=on_c, x_null=on_u, noise=noise)
                raise Wrong(
                    f"{knows}; at t = {t:.2g} you have got to {made}: the end is right, the steps are not",
                    expected=f"{1 - t:.2g} of the end, which is {due}, + {t:.2g} noise",
                )


def _flow_classes(answer: Answer, g: Generator) -> None:
    """At w = 1 every class lies where it should; at w = 0 the labels do not matter."""
    world, n = archipelago(), 150
    y = torch.arange(3).repeat_interleave(n)[torch.randperm(3 * n, generator=g)]
    x = answer(WorldVelocity(), y, 1.0, 40, (2,), _gen(g)).detach().double()
    for label in range(3):
        real, _ = world.given(label).sample(20_000, g)
        off = ((x[y == label].mean(0) - real.mean(0)).abs() / (real.std(dim=0) / math.sqrt(n))).max()
        if not off < 7:
            mean = ", ".join(f"{v:.2f}" for v in x[y == label].mean(0))
            raise Wrong(f"w = 1: the samples of class {label} have their mean at ({mean}), the data elsewhere")
    x = answer(WorldVelocity(), torch.zeros_like(y), 0.0, 40, (2,), _gen(g)).detach().double()
    real, _ = world.sample(20_000, g)
    if not ((x.mean(0) - real.mean(0)).abs() / (real.std(dim=0) / math.sqrt(len(x)))).max() < 7:
        raise Wrong("w = 0: the samples are not spread over all classes, as without a condition")


def _flow_single(answer: Answer, g: Generator) -> None:
    model, _, out = _flowed(answer, g)
    odd = ({a.xt.dtype for a in model.asked} | {a.t.dtype for a in model.asked} | {out.dtype}) - {torch.float32}
    if any(dtype.is_floating_point for dtype in odd):
        raise Wrong(f"x, t or the result is {odd.pop()}; the model has float32 weights, and a network refuses others")


def _flow_by(
    grid: Callable[[int], Tensor] = lambda steps: torch.linspace(1, 0, steps + 1),
    noise: Callable[..., Tensor] = lambda n, shape, gen: torch.randn(n, *shape, generator=gen),
    label: Callable[[Tensor], Tensor] = lambda y: y,
    null: Callable[[nn.Module, Tensor], int] = lambda model, y: model.null,
    weights: Callable[[float], tuple[float, float]] = lambda w: (1 - w, w),
    gap: Callable[[Tensor, Tensor], Tensor] = lambda t, s: s - t,
    time: Callable[[Tensor, int, int], Tensor] = lambda t, i, steps: t,
    at: Callable[[Tensor, Tensor], Tensor] = lambda t, s: t,
    no_grad: bool = True,
    ready: Callable[[nn.Module], object] = lambda model: model.eval(),
    done: Callable[[nn.Module, bool], object] = lambda model, training: model.train(training),
    twice: bool = False,
    last: bool = False,
    scaled: float = 1.0,
) -> tuple[Callable]:
    def sample_flow(model, y, w, steps, shape, gen):
        with torch.set_grad_enabled(not no_grad):
            training = model.training
            ready(model)
            x = scaled * noise(len(y), shape, gen)
            ts = grid(steps)
            pairs = [*pairwise(ts), *([(ts[-1], ts[-1] - 1 / steps)] if last else [])]
            labels, nulls = label(y), torch.full_like(y, null(model, y))
            for i, (t, s) in enumerate(pairs):
                now = time(at(t, s), i, steps).expand(len(y))
                if twice:
                    u_u, u_c = model(x, now, nulls), model(x, now, labels)
                else:
                    u_u, u_c = model(torch.cat([x, x]), now.repeat(2), torch.cat([nulls, labels])).chunk(2)
                on_u, on_c = weights(w)
                x = x + gap(t, s) * (on_u * u_u + on_c * u_c)
            done(model, training)
            return x

    return (sample_flow,)


def _flow_interleaved(model, y, w, steps, shape, gen):
    """The two halves in turns, in inference mode, with an integer loop."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    x = torch.empty(len(y), *shape).normal_(generator=gen)
    labels = torch.stack([y, torch.full_like(y, model.null)], dim=1).flatten()
    for i in range(steps):
        with torch.inference_mode():
            t = torch.full((2 * len(y),), 1 - i / steps)
            u = model(x.repeat_interleave(2, dim=0), t, labels)
        u_c, u_u = u.clone()[::2], u.clone()[1::2]
        x = x - (u_u + w * (u_c - u_u)) / steps
    for m, mode in modes:
        m.training = mode
    return x.clone()


def _flow_conditional_first(model, y, w, steps, shape, gen):
    """The label's half first, with a time that is counted down."""
    before, n = model.training, y.shape[0]
    model.train(False)
    try:
        x = torch.stack([torch.randn(shape, generator=gen) for _ in range(n)])
        labels = torch.cat([y, y * 0 + model.null])
        for k in range(steps, 0, -1):
            with torch.no_grad():
                u = model(x.repeat(2, *[1] * len(shape)), torch.tensor(k / steps).repeat(2 * n), labels)
            x = torch.sub(x, w * u[:n] + (1 - w) * u[n:], alpha=1 / steps)
    finally:
        model.train(before)
    return x


def _flow_stay(model: nn.Module, training: bool = False) -> None:
    pass


def _flow_see(answer: Answer, g: Generator) -> object:
    points, y = 2 * randn(g, 16, 2, 3), torch.randperm(9, generator=g)[:6]
    seed, left, models, outs = integer(g, 0, 10**6), [], [], []
    for noise, training, gen in ((1, True, seed), (2, False, seed), (1, True, seed + 1)):
        answer.reseed(noise)
        model = KnowsPoints(points).train(training)
        outs.append(answer(model, y, 2.5, 4, (2, 3), Generator().manual_seed(gen)))
        left.append(model.training)
        models.append(model)
    asked = models[0].asked
    first = [m.asked[0].xt.double()[:6] for m in models]
    seen = dict(
        left=left,
        times=[[round(float(t), 4) for t in a.t] for a in asked],
        whole=[not a.t.is_floating_point() for a in asked],
        training=[a.training for a in asked],
        graph=[any(a.graph for a in asked), outs[0].requires_grad],
        labels=[sorted(a.y.tolist()) for a in asked],
        from_gen=close(first[0], first[1], rtol=1e-5),
        gen_matters=not close(first[0], first[2], rtol=1e-5),
        one_noise=bool((first[0][1:] == first[0][:1]).all()),
        positive=bool((first[0] >= 0).all()),
        dtype=[str(asked[-1].xt.dtype), str(outs[0].dtype)],
    )
    on_c, on_u = points[y], points[_NULL].expand(6, 2, 3)
    design = torch.stack([on_c.flatten(), on_u.flatten(), first[0].flatten()], dim=1)
    ends = []
    for x in (asked[min(1, len(asked) - 1)].xt[:6], outs[0]):
        flat = x.detach().double().flatten()
        fit = torch.linalg.lstsq(design, flat[:, None]).solution[:, 0]
        exact = (design @ fit - flat).abs().max() < 1e-3 * (1 + flat.abs().max())
        ends.append([round(float(v), 2) + 0.0 for v in fit] if exact else "no sum of these")
    return seen | dict(ends=ends)


SAMPLE_FLOW = Exercise(
    by_probe=True,
    without=("keeps the dtype of its inputs",),
    id="05.6",
    names=("sample_flow",),
    references=(sample_flow,),
    inputs=_flow_inputs,
    changes=("gen",),
    kind="sampler",
    points=2,
    facts=(
        Fact(
            "asks the model once per step, about both labels, from t = 1 down",
            _flow_asks,
            "steps + 1 times make `steps` intervals; torch.cat([x, x]) makes one batch of two halves",
        ),
        Fact(
            "asks for y and for model.null, in eval mode and without a graph", _flow_labels, "full_like(y, model.null)"
        ),
        Fact(
            "starts from noise of its own for each example", _flow_noise, "torch.randn(len(y), *shape, generator=gen)"
        ),
        Fact(
            "with one point per label it arrives at (1 - w) null's + w the label's",
            _flow_line,
            "x + (s - t) times the guided velocity; s - t is negative",
        ),
        Fact("gives the model its mode back", _flow_mode, "remember model.training before eval()"),
        Fact("x stays float32, as the weights are", _flow_single, "times made by torch.linspace are float32"),
        Fact("samples land where their class is in the exact world", _flow_classes, "the exact velocity for a network"),
    ),
    mistakes=(
        Mistake(
            "time reversed",
            "You integrate from t = 0 to t = 1, as where t = 1 is data. Here t = 1 is the noise: start there and let "
            "t fall to 0. As it is, the network is told that pure noise is clean.",
            _flow_by(lambda steps: torch.linspace(0, 1, steps + 1)),
        ),
        Mistake(
            "sign of the step",
            "The times fall, but x moves by +u / steps: away from the data. The velocity points to the noise, so "
            "multiply it with s - t, which is negative.",
            _flow_by(gap=lambda t, s: t - s),
        ),
        Mistake(
            "t as integer",
            "The model is given t as an integer, the number of the step; it was trained on real numbers between 0 "
            "and 1.",
            _flow_by(time=lambda t, i, steps: torch.tensor(steps - i)),
        ),
        Mistake(
            "t up to 1000",
            "The model is given 1000 t; it was trained on t between 0 and 1.",
            _flow_by(time=lambda t, i, steps: 1000 * t),
        ),
        Mistake(
            "null label 10",
            "You write 10 for the null label. That fits MNIST only: ask model.null.",
            _flow_by(null=lambda model, y: 10),
        ),
        Mistake(
            "null label 0",
            "You use class 0 as the null label: guidance then leads away from class 0, not from the average.",
            _flow_by(null=lambda model, y: 0),
        ),
        Mistake(
            "null label guessed from y",
            "You take the largest label plus one for null. Which classes happen to be in y says nothing: ask "
            "model.null.",
            _flow_by(null=lambda model, y: int(y.max()) + 1),
        ),
        Mistake(
            "evaluation at t = 0",
            "You ask the model at t = 0, too, and make steps + 1 steps: x has arrived there, and in other forms of the "
            "velocity, such as that from a score, t = 0 divides by 0.",
            _flow_by(last=True),
        ),
        Mistake(
            "time of arrival",
            "The model is asked at the time of arrival, s, about an x that is still at t: each step is told too little "
            "noise, and the last asks at 0.",
            _flow_by(at=lambda t, s: s),
        ),
        Mistake(
            "one step short",
            "The model is asked steps - 1 times: `steps` times have steps - 1 intervals between them.",
            _flow_by(lambda steps: torch.linspace(1, 0, steps)),
        ),
        Mistake(
            "stops before t = 0",
            "You stop at t = 1 / steps: noise is left in every sample. The last time is 0.",
            _flow_by(lambda steps: torch.linspace(1, 0, steps + 1)[:-1]),
        ),
        Mistake(
            "one noise for all",
            "All examples start from one noise: they come out as copies, or as one drawing in different classes.",
            _flow_by(noise=lambda n, shape, gen: torch.randn(shape, generator=gen).expand(n, *shape)),
        ),
        Mistake(
            "noise not from gen",
            "The first noise does not come from gen: the same seed gives other samples each time.",
            _flow_by(noise=lambda n, shape, gen: torch.randn(n, *shape)),
        ),
        Mistake(
            "uniform noise",
            "You start from torch.rand, uniform numbers: noise at t = 1 is normal, torch.randn.",
            _flow_by(noise=lambda n, shape, gen: torch.rand(n, *shape, generator=gen)),
        ),
        Mistake(
            "two calls per step",
            "You call the model twice per step. The numbers are right; one batch of 2 B does it in one call, which is "
            "what is asked for and is faster.",
            _flow_by(twice=True),
        ),
        Mistake(
            "halves exchanged",
            "The two halves of the result are exchanged: w multiplies the unconditional velocity. chunk(2) returns "
            "them in the order in which you put the labels together.",
            _flow_by(weights=lambda w: (w, 1 - w)),
        ),
        Mistake(
            "1 + w",
            "w is counted from the conditional velocity, u_c + w (u_c - u_u): w = 0 should be unconditional, w = 1 "
            "conditional.",
            _flow_by(weights=lambda w: (-w, 1 + w)),
        ),
        Mistake(
            "w ignored",
            "w has no effect: the samples are conditional, without guidance.",
            _flow_by(weights=lambda w: (0, 1)),
        ),
        Mistake(
            "eval forgotten",
            "The model samples in the mode it comes in, train mode here: dropout and batch statistics act on your "
            "images.",
            _flow_by(ready=_flow_stay),
        ),
        Mistake(
            "mode not restored",
            "The model is left in eval mode: if it was being trained, it goes on without dropout, and nobody notices.",
            _flow_by(done=_flow_stay),
        ),
        Mistake(
            "always back to train",
            "You put the model into train mode at the end, though it may have come in eval mode: give it back the mode "
            "it had.",
            _flow_by(done=lambda model, training: model.train()),
        ),
        Mistake(
            "graph kept",
            "The graph of all steps is kept: memory grows with each step, and the samples carry gradients.",
            _flow_by(no_grad=False),
        ),
        Mistake(
            "one label for all",
            "Every example is asked for as the class of the first.",
            _flow_by(label=lambda y: y[:1].expand(len(y))),
        ),
    ),
    alternatives=((_flow_interleaved,), (_flow_conditional_first,)),
    hints=(
        "Your euler from 05.4, with a velocity that asks the model once: x twice, t for all 2 B, the labels null and y."
        " And three things around it: no graph, eval mode, the mode back.",
        "ts = linspace(1, 0, steps + 1); u_u, u_c = model(cat([x, x]), t.expand(2 * len(x)), cat([full_like(y, "
        "model.null), y])).chunk(2); x = x + (s - t) ((1 - w) u_u + w u_c); under torch.no_grad(), between "
        "model.eval() and model.train(training).",
    ),
    hides=(
        "samplers.euler_step",
        "samplers.sample",
        "samplers.trajectory",
        "guidance.cfg",
        "samplers.ddim_step",
        "guidance.negative",
        "guidance.perp_neg",
        "guidance.apg",
    ),
    probe=_flow_see,
)

# --- 05.7 my_flow_test ------------------------------------------------------------------------------------------------


def _flow_case(t: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    x0, eps = torch.randn(2, len(t), 3, dtype=torch.float64)
    return x0, eps, torch.tensor(t, dtype=torch.float64)


def _only_shapes(pair: Callable) -> None:
    x0, eps, t = _flow_case([0.2, 0.7, 0.4])
    xt, u = pair(x0, eps, t)
    assert xt.shape == x0.shape and u.shape == x0.shape


def _only_ends(pair: Callable) -> None:
    x0, eps, t = _flow_case([0.0, 0.0, 0.0])
    assert torch.allclose(pair(x0, eps, t)[0], x0)
    assert torch.allclose(pair(x0, eps, t + 1)[0], eps)


def _only_velocity(pair: Callable) -> None:
    x0, eps, t = _flow_case([0.2, 0.7, 0.4])
    assert torch.allclose(pair(x0, eps, t)[1], eps - x0)


def _one_example(pair: Callable) -> None:
    for time in (0.0, 1.0):
        x0, eps, t = _flow_case([time])
        xt, u = pair(x0, eps, t)
        assert torch.allclose(xt, (1 - time) * x0 + time * eps)
        assert torch.allclose(u.norm(), (eps - x0).norm())


def _other_clock(pair: Callable) -> None:
    x0, eps, t = _flow_case([0.2, 0.7, 0.4])
    xt, u = pair(x0, eps, t)
    assert torch.allclose(xt, t[:, None] * x0 + (1 - t)[:, None] * eps)
    assert torch.allclose(u, x0 - eps)


def _says(pair: Callable) -> bool:
    x0, eps, t = _flow_case([0.2, 0.7, 0.4])
    xt, u = pair(x0, eps, t)
    return torch.allclose(xt, x0 + t[:, None] * (eps - x0)) and torch.allclose(u, eps - x0)


def _flow_numbers(pair: Callable) -> None:
    """By numbers: a table of t, and x_t with its velocity, one example after the other and all at once."""
    ts = [0.0, 0.25, 0.5, 1.0]
    x0, eps = torch.tensor([[2.0], [-1.0], [0.5], [4.0]]), torch.tensor([[1.0], [3.0], [-2.0], [0.0]])
    right = [[2.0], [0.0], [-0.75], [0.0]], [[-1.0], [4.0], [-2.5], [-4.0]]
    for got, due in zip(pair(x0.clone(), eps.clone(), torch.tensor(ts)), right, strict=True):
        if (got - torch.tensor(due)).abs().max() > 1e-5:
            raise ValueError("not the numbers that I worked out")


def _flow_properties(pair: Callable) -> None:
    """By properties: the ends, the derivative, the straightness."""
    x0, eps = torch.randn(2, 5, 2, 4, dtype=torch.float64)
    t = torch.rand(5, dtype=torch.float64)
    zero = torch.zeros(5, dtype=torch.float64)
    start, end = pair(x0, eps, zero)[0], pair(x0, eps, zero + 1)[0]
    torch.testing.assert_close(start, x0)
    torch.testing.assert_close(end, eps)
    xt, u = pair(x0, eps, t)
    torch.testing.assert_close(xt - t.view(5, 1, 1) * u, start)
    torch.testing.assert_close(xt + (1 - t).view(5, 1, 1) * u, end)


_wrong_pairs = {mistake.name: mistake.answers[0] for mistake in FM_PAIR.mistakes}

FLOW_TEST = test_exercise(
    "05.7",
    "my_flow_test",
    my_flow_test,
    right=(fm_pair, _pair_lerp, _pair_loop),
    wrong=tuple(
        (hint, _wrong_pairs[name])
        for name, hint in (
            ("time reversed", "one with the noise at t = 0 and the data at t = 1"),
            ("sign of the velocity", "one whose velocity points from noise to data"),
            ("velocity from x_t to eps", "one whose velocity goes from x_t to eps"),
            ("roots", "one with the shares sqrt(1 - t) and sqrt(t)"),
            ("t of the first example", "one that uses the first t for all examples"),
            ("fresh noise", "one that draws noise of its own"),
        )
    ),
    needed=5,
    mistakes=(
        Mistake(
            "shape only",
            "Your test looks at shapes alone: every wrong formula has the right shape.",
            (_only_shapes,),
        ),
        Mistake(
            "the ends only",
            "Your test looks at x_t for t = 0 and t = 1 only: a curved path has the same ends, and the velocity is not "
            "looked at.",
            (_only_ends,),
        ),
        Mistake(
            "the velocity only",
            "Your test never looks at x_t between the ends, 0 < t < 1, with a t of its own for each example: there x_t "
            "may be anything.",
            (_only_velocity,),
        ),
        Mistake(
            "ends, and the velocity's length",
            "Your test looks at single examples at t = 0 and t = 1, and at the length of the velocity: it sees neither "
            "what lies between, nor the sign, nor a mix-up of t within a batch.",
            (_one_example,),
        ),
        Mistake(
            "time reversed",
            "Your test expects time to run the other way, noise at t = 0 and data at t = 1, and refuses functions that "
            "are right here: in this course t = 1 is the noise, and the velocity is eps - x0.",
            (_other_clock,),
        ),
        Mistake(
            "returns its verdict",
            "Your test returns True or False. A test says no by raising (assert ...), and says yes by returning "
            "nothing.",
            (_says,),
        ),
    ),
    alternatives=(_flow_numbers, _flow_properties),
    hides=("schedules.add_noise", "predictions.target"),
    hints=(
        "You choose x0, eps and t, so you know what must come out. Which t shows that a path is not straight? Which "
        "shows that the velocity has the wrong sign? How many examples show that t[0] was used for all?",
        "With several examples and different t, among them 0 and 1: x_t - t u must be x0, and x_t + (1 - t) u must be "
        "eps.",
    ),
)

EXERCISES = (FM_PAIR, CONVERT, GUIDED, SOLVERS, ZERO_STAR, SAMPLE_FLOW, FLOW_TEST)
