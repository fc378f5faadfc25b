"""More exercises of lesson 04: what people do about guidance that is too strong, and negative prompts."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import pstdev

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from condiff_ref.shapes import pad

from .compare import close
from .draws import integer, pictures, randn, times
from .exercise import Answer, Exercise, Fact, Mistake, Wrong, need
from .lesson02 import Recorder
from .testing import test_exercise
from .xray import Formula

# --- the reference answers, as the solutions show them ----------------------------------------------------------------


def interval_scale(noise: Tensor, s: float, low: float, high: float) -> Tensor:
    """The guidance scale at noise levels sigma / alpha (B,): s where low < noise <= high, and 1 elsewhere. (B,)."""
    return torch.ones_like(noise).masked_fill((noise > low) & (noise <= high), s)


def interval_eps(
    model: Callable, x: Tensor, t: Tensor, y: Tensor, null: int, noise: float, s: float, low: float, high: float
) -> Tensor:
    """The prediction guided within the interval, for a batch at one noise level: outside of it model(x, t, y) is asked
    once, with the labels alone; inside also with the label `null`. (B, ...)."""
    eps_c = model(x, t, y)
    if not low < noise <= high:
        return eps_c
    eps_u = model(x, t, torch.full_like(y, null))
    return eps_u + s * (eps_c - eps_u)


def rescale_cfg(guided: Tensor, cond: Tensor, phi: float) -> Tensor:
    """The guided prediction, brought back by the share phi to the standard deviation of the conditional one.

    Standard deviations are taken over all entries of an example. phi = 0 leaves the guided prediction as it is, phi = 1
    brings it back all the way; in between stands the average of these two, (1 - phi) and phi. (B, ...) -> (B, ...).
    """
    ratio = cond.flatten(1).std(1) / guided.flatten(1).std(1)
    return pad(phi * ratio + 1 - phi, guided) * guided


def dynamic_threshold(x0: Tensor, p: float) -> Tensor:
    """Imagen's threshold for estimates of x0 whose pixels belong in [-1, 1]: (B, ...) -> (B, ...).

    c is the p-quantile of |x0| within each example, as torch.quantile has it, but at least 1; clip to [-c, c] and
    divide by c.
    """
    c = pad(x0.abs().flatten(1).quantile(p, dim=1).clamp(min=1), x0)
    return x0.clamp(-c, c) / c


def apg(x_c: Tensor, x_u: Tensor, s: float, eta: float = 0.0, r: float = math.inf) -> Tensor:
    """Adaptive projected guidance of estimates of x0, without its momentum: (B, ...) -> (B, ...).

    d = x_c - x_u, shortened to length r > 0 where it is longer; split into the part parallel to x_c and the rest. Add
    (s - 1) (rest + eta parallel) to x_c. Lengths and parts are taken over all entries of an example.
    """
    d = (x_c - x_u).flatten(1)
    d = d * (r / d.norm(dim=1, keepdim=True)).clamp(max=1)
    c = F.normalize(x_c.flatten(1), dim=1)
    parallel = (d * c).sum(1, keepdim=True) * c
    return x_c + (s - 1) * (d - parallel + eta * parallel).view_as(x_c)


def negative(eps_pos: Tensor, eps_neg: Tensor, eps_u: Tensor, s: float, form: str) -> Tensor:
    """Towards a positive, away from a negative prompt: (B, ...) -> (B, ...).

    "two-pass": the negative prompt takes the place of the unconditional one, as pipelines do it. "three-pass":
    the guidance of the negative prompt is subtracted at the same scale. "perp": only that part of it is subtracted
    which is perpendicular to the guidance of the positive prompt, example by example (Perp-Neg); all of it where the
    positive prompt has no guidance.
    """
    if form == "two-pass":
        return eps_neg + s * (eps_pos - eps_neg)
    d_pos, d_neg = eps_pos - eps_u, eps_neg - eps_u
    if form == "perp":
        along = F.normalize(d_pos.flatten(1), dim=1)
        d_neg = d_neg - ((d_neg.flatten(1) * along).sum(1, keepdim=True) * along).view_as(d_neg)
    return eps_u + s * (d_pos - d_neg)


def my_cfg_test(guide: Callable) -> None:
    """Raise an AssertionError if guide(eps_c, eps_u, s) is not classifier-free guidance; else return None."""
    eps_c, eps_u = torch.randn(2, 3, 4, dtype=torch.float64)
    before = eps_c.clone(), eps_u.clone()
    assert torch.allclose(guide(eps_c, eps_u, 0.0), eps_u), "s = 0 must give the unconditional prediction"
    assert torch.allclose(guide(eps_c, eps_u, 1.0), eps_c), "s = 1 must give the conditional one"
    assert torch.allclose(guide(eps_c, eps_u, 3.0), 3 * eps_c - 2 * eps_u), "s = 3 must extrapolate"
    assert torch.equal(eps_c, before[0]) and torch.equal(eps_u, before[1]), "inputs must not change"


# --- what every answer is tried on ------------------------------------------------------------------------------------


def _row(*values: float) -> Tensor:
    """One example with these entries, (1, n)."""
    return torch.tensor([values], dtype=torch.float64)


def _real(g: Generator, low: float, high: float) -> float:
    """A number between low and high."""
    return low + (high - low) * float(torch.rand((), generator=g, dtype=torch.float64))


def _shown(values: Sequence[float]) -> str:
    return ", ".join(f"{round(value, 9):.4g}" for value in values)


def _ask(answer: Answer, name: str, *args: object) -> object:
    """The learner's function on copies: that it works in place is told once, by the fact that is about it."""
    return answer.call(name, *(arg.clone() if isinstance(arg, Tensor) else arg for arg in args))


def _dots(one: Tensor, two: Tensor) -> list[float]:
    """The inner product of each pair of examples, entry by entry in Python."""
    pairs = zip(one.flatten(1).tolist(), two.flatten(1).tolist(), strict=True)
    return [math.fsum(a * b for a, b in zip(*pair, strict=True)) for pair in pairs]


def _lengths(x: Tensor) -> list[float]:
    return [math.sqrt(value) for value in _dots(x, x)]


def _same_shape(got: Tensor, like: Tensor) -> Tensor:
    if got.shape != like.shape:
        raise Wrong(f"for inputs of shape {tuple(like.shape)} the result has shape {tuple(got.shape)}")
    return got


# --- 04.6 interval_scale, interval_eps --------------------------------------------------------------------------------


class Table(Recorder):
    """Predicts t x + table[y], and records what it was asked."""

    def __init__(self, g: Generator, null: int):
        super().__init__()
        self.register_buffer("table", randn(g, null + 1))

    def forward(self, xt: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if not isinstance(y, Tensor) or y.shape != (len(xt),):
            given = f"of shape {tuple(y.shape)}" if isinstance(y, Tensor) else f"as {type(y).__name__}"
            raise TypeError(
                f"the model was given labels {given}: it needs a tensor ({len(xt)},), one label per example"
            )
        if y.is_floating_point():
            raise TypeError(f"the model was given labels of dtype {y.dtype}: labels are integers")
        return super().forward(xt, t, y)

    def answer(self, xt: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return pad(t, xt) * xt + pad(self.table[y], xt)

    def labels(self) -> list[int]:
        """All labels that it was asked about since the last call."""
        return [label for asked in self.asked for label in asked.y.tolist()]


def _labelled(g: Generator) -> tuple[Table, Tensor, Tensor, Tensor, int]:
    """A model and a batch to ask it about: model, x, t, y, null."""
    null = integer(g, 4, 9)
    (x,) = pictures(g, 1)
    return Table(g, null), x, times(g), torch.randint(0, null, (len(x),), generator=g), null


def _ends(g: Generator) -> tuple[float, float]:
    """An interval whose ends float32 has exactly."""
    low = integer(g, 1, 8) / 4
    return low, low + integer(g, 4, 12) / 4


def _interval_inputs(g: Generator) -> dict:
    low, high = _ends(g)
    s = _real(g, 2, 8)
    noise = torch.tensor([low, low / 2, (low + high) / 2, high, 2 * high, low + 0.1], dtype=torch.float64)
    noise = noise[torch.randperm(len(noise), generator=g)]
    model, x, t, y, null = _labelled(g)
    between = _real(g, low + 0.1, high - 0.1)
    return {
        "interval_scale": dict(noise=noise, s=s, low=low, high=high),
        "interval_eps": dict(model=model, x=x, t=t, y=y, null=null, noise=between, s=s, low=low, high=high),
    }


def _scale_at(answer: Answer, noise: Sequence[float], s: float, low: float, high: float) -> list[float]:
    levels = torch.tensor(noise, dtype=torch.float64)
    return _same_shape(answer.call("interval_scale", levels, s, low, high), levels).tolist()


def _interval_values(answer: Answer, g: Generator) -> None:
    low, high = _ends(g)
    s = _real(g, 2, 8)
    places = (
        (low + 0.25, s, "inside"),
        (high - 0.25, s, "inside"),
        (low / 2, 1.0, "below the interval"),
        (2 * high, 1.0, "above the interval"),
    )
    got = _scale_at(answer, [place for place, _, _ in places], s, low, high)
    for value, (place, due, where) in zip(got, places, strict=True):
        if not math.isclose(value, due, rel_tol=1e-6):
            meaning = ": 0 is the unconditional prediction" if value == 0 else ""
            raise Wrong(
                f"interval ({low:g}, {high:g}], s = {s:.4g}: at noise {place:g}, {where}, your scale is "
                f"{value:.4g}{meaning}",
                expected=f"{due:.4g} there",
            )


def _interval_ends(answer: Answer, g: Generator) -> None:
    low, high = _ends(g)
    s = _real(g, 2, 8)
    for name, place, due in (("low", low, 1.0), ("high", high, s)):
        value = _scale_at(answer, [place], s, low, high)[0]
        if not math.isclose(value, due, rel_tol=1e-6):
            raise Wrong(
                f"interval_scale: at noise = {name} exactly, your scale is {value:.4g} (s = {s:.4g})",
                expected=f"{due:.4g}: low < noise <= high",
            )
        model, x, t, y, null = _labelled(g)
        _ask(answer, "interval_eps", model, x, t, y, null, place, s, low, high)
        if (null in model.labels()) != (name == "high"):
            did = "is not" if name == "high" else "is"
            raise Wrong(f"interval_eps: at noise = {name} exactly, the label null {did} asked about")


def _interval_inside(answer: Answer, g: Generator) -> None:
    low, high = _ends(g)
    s = _real(g, 2, 8)
    model, x, t, y, null = _labelled(g)
    got = _ask(answer, "interval_eps", model, x, t, y, null, _real(g, low + 0.1, high - 0.1), s, low, high)
    if set(model.labels()) <= set(y.tolist()) and len(model.labels()) == len(y):
        raise Wrong("inside the interval the model was asked about y alone: is it noise that low and high are held to?")
    if sorted(model.labels()) != sorted([*y.tolist(), *[null] * len(y)]):
        raise Wrong(
            f"inside, with y = {y.tolist()} and null = {null}, the model was asked about the labels {model.labels()}"
        )
    if any(not set(asked.t.tolist()) <= set(t.tolist()) for asked in model.asked):
        raise Wrong(f"the model was given other times than t = {t.tolist()}")
    table = model.table.tolist()
    mixed = torch.tensor([s * table[label] - (s - 1) * table[null] for label in y.tolist()], dtype=torch.float64)
    right = pad(t, x) * x + pad(mixed, x)
    step = pad(torch.tensor([table[label] - table[null] for label in y.tolist()], dtype=torch.float64), x)
    scale = 1 + (_same_shape(got, x) - model(x, t, y)) / step
    if not close(got, right) and close(scale, scale.mean().expand_as(scale), rtol=1e-4):
        raise Wrong(f"inside the interval, with s = {s:.4g}, it is guided at scale {float(scale.mean()):.4g}")
    need(got, right, f"inside the interval, it must be guided at scale s = {s:.4g}")


def _interval_outside(answer: Answer, g: Generator) -> None:
    low, high = _ends(g)
    s = _real(g, 2, 8)
    for noise, where in ((low / 2, "below"), (1.5 * high, "above")):
        model, x, t, y, null = _labelled(g)
        got = _ask(answer, "interval_eps", model, x, t, y, null, noise, s, low, high)
        table = model.table.tolist()
        due = torch.tensor([table[label] for label in y.tolist()], dtype=torch.float64)
        none = torch.full_like(due, table[null])
        if isinstance(got, Tensor) and close(got, pad(t, x) * x + pad(none, x)):
            raise Wrong(f"{where} the interval it is the unconditional prediction: scale 1, not 0, is no guidance")
        need(got, pad(t, x) * x + pad(due, x), f"{where} the interval it must be the conditional prediction")
        if len(model.labels()) != len(y) or null in model.labels():
            raise Wrong(
                f"{where} the interval, for {len(y)} examples the model was asked about {len(model.labels())}, "
                f"{model.labels().count(null)} of them with the label null: {len(y)} and 0 would do"
            )


def _inside(noise, low, high):
    return (noise > low) & (noise <= high)


def _guided(model: Callable, x: Tensor, t: Tensor, y: Tensor, null: int, s: float) -> Tensor:
    eps_c, eps_u = model(x, t, y), model(x, t, torch.full_like(y, null))
    return eps_u + s * (eps_c - eps_u)


def _interval_by(inside: Callable = _inside, outside: float | None = 1.0, shift: float = 0.0) -> tuple[Callable, ...]:
    """Both functions, guided at scale s + shift where `inside` says so and at `outside` elsewhere; None means s."""

    def interval_scale(noise: Tensor, s: float, low: float, high: float) -> Tensor:
        chosen = inside(noise, low, high)
        elsewhere = torch.full_like(noise, s if outside is None else outside)
        return elsewhere.masked_fill(chosen, 1.0 if outside is None else s + shift)

    def interval_eps(model, x, t, y, null, noise, s, low, high):
        scale = 1.0 if outside is None else s + shift
        if not inside(noise, low, high):
            scale = s if outside is None else outside
        if scale == 1:
            return model(x, t, y)
        return _guided(model, x, t, y, null, scale) if scale else model(x, t, torch.full_like(y, null))

    return interval_scale, interval_eps


def _asks_twice(model, x, t, y, null, noise, s, low, high):
    return _guided(model, x, t, y, null, s if low < noise <= high else 1.0)


def _twice(model: Callable, x: Tensor, t: Tensor, y: Tensor, s: float) -> Tensor:
    one, two = model(x, t, y), model(x, t, y)
    return two + s * (one - two)


def _first_decides(noise: Tensor, s: float, low: float, high: float) -> Tensor:
    return torch.full_like(noise, s if low < float(noise[0]) <= high else 1.0)


def _interval_loop(noise: Tensor, s: float, low: float, high: float) -> Tensor:
    return noise.new_tensor([s if low < level <= high else 1 for level in noise.tolist()])


def _interval_one_batch(model, x, t, y, null, noise, s, low, high):
    if noise <= low or noise > high:
        return model(x, t, y)
    labels = torch.cat([torch.full_like(y, null), y])
    eps_u, eps_c = model(torch.cat([x, x]), torch.cat([t, t]), labels).chunk(2)
    return (1 - s) * eps_u + s * eps_c


def _interval_steps(noise: Tensor, s: float, low: float, high: float) -> Tensor:
    """s - 1 is added behind low and taken away behind high."""
    return 1 + (s - 1) * ((noise > low).to(noise.dtype) - (noise > high).to(noise.dtype))


def _interval_asks_scale(model, x, t, y, null, noise, s, low, high):
    scale = float(interval_scale(torch.tensor([noise], dtype=torch.float64), s, low, high))
    eps_c = model(x, t, y)
    return eps_c if scale == 1 else eps_c + (scale - 1) * (eps_c - model(x, t, 0 * y + null))


def _interval_probe(answer: Answer, g: Generator) -> object:
    low, high = _ends(g)
    seen: list[object] = [_scale_at(answer, [low / 2, low, high - 0.25, high, 2 * high], 3.0, low, high)]
    for noise in (low / 2, low, high - 0.25, high, 2 * high):
        model, x, t, y, null = _labelled(g)
        seen.append(_ask(answer, "interval_eps", model, x, t, y, null, noise, 3.0, low, high))
        seen.append([len(model.labels()), model.labels().count(null)])
    return seen


INTERVAL = Exercise(
    id="04.6",
    names=("interval_scale", "interval_eps"),
    references=(interval_scale, interval_eps),
    inputs=_interval_inputs,
    batch=("x", "t", "y"),
    facts=(
        Fact(
            "the scale is s inside, and 1 on both sides",
            _interval_values,
            "two conditions must hold at once; and which scale means no guidance at all?",
        ),
        Fact(
            "inside, interval_eps is guided at scale s",
            _interval_inside,
            "ask with the labels y, and with null in place of each",
        ),
        Fact(
            "outside, interval_eps is conditional and costs one question",
            _interval_outside,
            "decide before you ask the model a second time",
        ),
        Fact("low itself is outside, high itself inside", _interval_ends, "low < noise <= high, in both functions"),
    ),
    mistakes=(
        Mistake(
            "0 outside",
            "Outside the interval your scale is 0: there you sample unconditionally, and forget the label. No guidance "
            "is scale 1.",
            _interval_by(outside=0.0),
        ),
        Mistake(
            "asks twice everywhere",
            "Outside the interval you still ask the model about null, though at scale 1 the answer cancels: the result "
            "is right, and the time that the interval saves is lost.",
            (interval_scale, _asks_twice),
        ),
        Mistake(
            "ends exchanged",
            "low and high are exchanged: no noise level is above the one and below the other, so nothing is guided.",
            _interval_by(lambda noise, low, high: (noise > high) & (noise <= low)),
        ),
        Mistake(
            "both ends inside",
            "low itself counts as inside: with low <= noise <= high two intervals that meet would both claim it.",
            _interval_by(lambda noise, low, high: (noise >= low) & (noise <= high)),
        ),
        Mistake(
            "closed below, open above",
            "The ends are the other way round: you have low <= noise < high, due is low < noise <= high.",
            _interval_by(lambda noise, low, high: (noise >= low) & (noise < high)),
        ),
        Mistake(
            "both ends outside",
            "high itself counts as outside: the interval is low < noise <= high.",
            _interval_by(lambda noise, low, high: (noise > low) & (noise < high)),
        ),
        Mistake(
            "guided outside",
            "Inside and outside are exchanged: you guide outside of the interval, and not in it.",
            _interval_by(outside=None),
        ),
        Mistake(
            "low ignored",
            "low has no effect: you guide at small noise as well, down to 0.",
            _interval_by(lambda noise, low, high: noise <= high),
        ),
        Mistake(
            "high ignored",
            "high has no effect: you guide at large noise as well, where guidance throws whole modes away.",
            _interval_by(lambda noise, low, high: noise > low),
        ),
        Mistake(
            "or for and",
            "The two conditions are joined by or: every noise level fulfils one of them, so all are guided.",
            _interval_by(lambda noise, low, high: (noise > low) | (noise <= high)),
        ),
        Mistake(
            "w for s",
            "Inside you guide at 1 + s, as if s were the w of Ho & Salimans: here s itself is the scale, and 1 is no "
            "guidance.",
            _interval_by(shift=1.0),
        ),
        Mistake(
            "the labels twice",
            "Both questions to the model carry the labels y, so their difference is 0 and s has no effect: the second "
            "one is about null.",
            (
                interval_scale,
                lambda model, x, t, y, null, noise, s, low, high: (
                    _twice(model, x, t, y, s) if low < noise <= high else model(x, t, y)
                ),
            ),
        ),
        Mistake(
            "the first decides for all",
            "The first noise level decides for the whole batch: each entry has a scale of its own.",
            (_first_decides, interval_eps),
        ),
    ),
    alternatives=((_interval_loop, _interval_one_batch), (_interval_steps, _interval_asks_scale)),
    hints=(
        "interval_scale: a mask (B,), then torch.where or masked_fill. interval_eps: ask with the labels first; is the "
        "second question needed?",
        "s where (noise > low) & (noise <= high), else 1. Outside return model(x, t, y); inside eps_u + s (eps_c - "
        "eps_u), eps_u with full_like(y, null).",
    ),
    probe=_interval_probe,
    hides=("guidance.interval", "guidance.cfg"),
)

# --- 04.7 rescale_cfg, dynamic_threshold ------------------------------------------------------------------------------


def _predictions(g: Generator) -> tuple[Tensor, Tensor]:
    """A guided and a conditional prediction, with means and spreads of their own in each example."""
    guided, cond = pictures(g, 2)
    size, off = 1.5 + 3 * torch.rand(4, generator=g, dtype=torch.float64), randn(g, 2, 4)
    return pad(size, guided) * guided + 2 * pad(off[0], guided), cond + pad(off[1], cond)


def _loud(g: Generator) -> Tensor:
    """Estimates of x0, of which some leave [-1, 1] a little, some a lot and some not at all."""
    (x0,) = pictures(g, 1)
    size = torch.tensor([0.15, 1, 2, 4], dtype=torch.float64)[torch.randperm(4, generator=g)]
    return pad(size, x0) * x0


def _remedy_inputs(g: Generator) -> dict:
    guided, cond = _predictions(g)
    return {
        "rescale_cfg": dict(guided=guided, cond=cond, phi=_real(g, 0.55, 0.9)),
        "dynamic_threshold": dict(x0=_loud(g), p=_real(g, 0.7, 0.95)),
    }


def _spreads(x: Tensor) -> list[float]:
    """The standard deviation of each example, by Python's own statistics."""
    return [pstdev(row) for row in x.flatten(1).tolist()]


def _rescale_none(answer: Answer, g: Generator) -> None:
    guided, cond = _predictions(g)
    got = _same_shape(_ask(answer, "rescale_cfg", guided, cond, 0.0), guided)
    if close(_spreads(got), _spreads(cond), rtol=1e-6):
        raise Wrong(
            "phi = 0 must return guided as it is; yours has the standard deviations of cond: are the shares exchanged, "
            "or is cond where guided should stand?"
        )
    need(got, guided, "phi = 0 must return the guided prediction as it is")


def _rescale_full(answer: Answer, g: Generator) -> None:
    guided, cond = _predictions(g)
    got, due = _spreads(_same_shape(_ask(answer, "rescale_cfg", guided, cond, 1.0), guided)), _spreads(cond)
    if not close(got, due, rtol=1e-6):
        raise Wrong(
            f"phi = 1: the examples' standard deviations are {_shown(got)}; those of cond are {_shown(due)}, those of "
            f"guided {_shown(_spreads(guided))}"
        )


def _rescale_between(answer: Answer, g: Generator) -> None:
    guided, cond = _predictions(g)
    phi = _real(g, 0.2, 0.8)
    got = _same_shape(_ask(answer, "rescale_cfg", guided, cond, phi), guided)
    for i, (mine, theirs) in enumerate(zip(got.flatten(1), guided.flatten(1), strict=True)):
        factors = (mine / theirs).tolist()
        if max(factors) - min(factors) > 1e-6 * max(map(abs, factors)):
            raise Wrong(
                f"example {i} of the result is no multiple of example {i} of guided: the ratio of their entries runs "
                f"from {min(factors):.4g} to {max(factors):.4g}; one factor per example is due"
            )
    due = [phi * c + (1 - phi) * u for c, u in zip(_spreads(cond), _spreads(guided), strict=True)]
    if not close(_spreads(got), due, rtol=1e-6):
        raise Wrong(
            f"phi = {phi:.3g}: the standard deviations are {_shown(_spreads(got))}; guided has "
            f"{_shown(_spreads(guided))}, cond {_shown(_spreads(cond))}",
            expected=f"{_shown(due)}, phi of the way from guided to cond",
        )


def _rescale_by_hand(answer: Answer, g: Generator) -> None:
    """Standard deviations 4 and 1, means 5 and -1: the factor at phi = 1/2 is (1/4 + 1) / 2 = 5/8."""
    got = _ask(answer, "rescale_cfg", _row(1, 9, 1, 9), _row(0, -2, -2, 0), 0.5)
    need(
        got, _row(0.625, 5.625, 0.625, 5.625), "for guided (1, 9, 1, 9), cond (0, -2, -2, 0) and phi = 1/2 it is wrong"
    )


def _threshold_quiet(answer: Answer, g: Generator) -> None:
    (x0,) = pictures(g, 1)
    x0 = 0.2 * x0.clamp(-4, 4)
    got = _ask(answer, "dynamic_threshold", x0, 0.9)
    need(got, x0, "an estimate that stays within [-1, 1] must come back unchanged")


def _threshold_by_hand(answer: Answer, g: Generator) -> None:
    """|x0| = 0, 0.4, .., 4: nine tenths of the way up stands 3.6."""
    x0 = _row(0, -0.4, 0.8, -1.2, 1.6, -2, 2.4, -2.8, 3.2, -3.6, 4)
    got = _ask(answer, "dynamic_threshold", x0, 0.9)
    due = _row(0, -1 / 9, 2 / 9, -3 / 9, 4 / 9, -5 / 9, 6 / 9, -7 / 9, 8 / 9, -1, 1)
    text = "for x0 = (0, -0.4, 0.8, -1.2, ..., -3.6, 4) and p = 0.9 it is wrong"
    if isinstance(got, Tensor) and got.shape == x0.shape and got[0, 1] != 0:
        text += f": you divide -0.4 by {-0.4 / float(got[0, 1]):.4g}, and make {float(got[0, -1]):.4g} of 4"
    need(got, due, text)


def _threshold_range(answer: Answer, g: Generator) -> None:
    x0 = _loud(g)
    for p in (0.8, 1.0):
        got = _same_shape(_ask(answer, "dynamic_threshold", x0, p), x0)
        if float(got.abs().max()) > 1 + 1e-9:
            raise Wrong(f"p = {p}: an entry of the result is {float(got.abs().max()):.4g} in size: pixels end at 1")
    top = [max(1.0, max(map(abs, row))) for row in x0.flatten(1).tolist()]
    need(got, x0 / pad(torch.tensor(top, dtype=torch.float64), x0), "p = 1 clips nothing: each example is only divided")


def _rescale_by(factor: Callable[[Tensor, Tensor, float], Tensor]) -> tuple[Callable, Callable]:
    """factor(guided, cond, phi) multiplies guided."""
    return (lambda guided, cond, phi: factor(guided, cond, phi) * guided), dynamic_threshold


def _share(ratio: Callable[[Tensor, Tensor], Tensor]) -> tuple[Callable, Callable]:
    return _rescale_by(lambda guided, cond, phi: phi * ratio(guided, cond) + 1 - phi)


def _std(x: Tensor) -> Tensor:
    return pad(x.flatten(1).std(1), x)


def _per_channel(x: Tensor) -> Tensor:
    return x.flatten(2).std(2).view(*x.shape[:2], *[1] * (x.ndim - 2)) if x.ndim > 2 else x.std(1, keepdim=True)


def _threshold_by(
    c: Callable[[Tensor, float], Tensor] = lambda x0, p: _quantile(x0.abs(), p).clamp(min=1),
    clip: bool = True,
    **how: bool,
) -> tuple[Callable, Callable]:
    def dynamic_threshold(x0: Tensor, p: float) -> Tensor:
        bound = c(x0, p)
        cut = x0.clamp(-bound, bound) if clip else x0
        return cut if how.get("undivided") else cut / bound

    return rescale_cfg, dynamic_threshold


def _quantile(x: Tensor, p: float) -> Tensor:
    return pad(x.flatten(1).quantile(p, dim=1), x)


def _rescale_centred(guided: Tensor, cond: Tensor, phi: float) -> Tensor:
    """Brings the mean back as well."""
    mean_g, mean_c = (pad(x.flatten(1).mean(1), x) for x in (guided, cond))
    return phi * ((guided - mean_g) * _std(cond) / _std(guided) + mean_c) + (1 - phi) * guided


def _rescale_loop(guided: Tensor, cond: Tensor, phi: float) -> Tensor:
    rows = []
    for g, c in zip(guided, cond, strict=True):
        back = g * (c.var(correction=0) / g.var(correction=0)) ** 0.5
        rows.append(torch.lerp(g, back, phi))
    return torch.stack(rows)


def _threshold_loop(x0: Tensor, p: float) -> Tensor:
    rows = []
    for x in x0:
        c = max(1.0, float(torch.quantile(x.abs().reshape(-1), p)))
        rows.append((x / c).clamp(-1, 1))
    return torch.stack(rows)


def _rescale_moments(guided: Tensor, cond: Tensor, phi: float) -> Tensor:
    axes = tuple(range(1, guided.ndim))
    sizes = [(x - x.mean(axes, keepdim=True)).square().sum(axes, keepdim=True).sqrt() for x in (cond, guided)]
    return guided * (1 + phi * (sizes[0] / sizes[1] - 1))


def _threshold_sorted(x0: Tensor, p: float) -> Tensor:
    """The quantile by sorting, between two neighbours."""
    ordered = x0.abs().flatten(1).sort(1).values
    place = p * (ordered.shape[1] - 1)
    below, above = ordered[:, math.floor(place)], ordered[:, math.ceil(place)]
    c = torch.maximum(torch.ones_like(below), below + (place - math.floor(place)) * (above - below))
    c = pad(c, x0)
    return torch.where(x0.abs() > c, x0.sign(), x0 / c)


REMEDIES = Exercise(
    id="04.7",
    names=("rescale_cfg", "dynamic_threshold"),
    references=(rescale_cfg, dynamic_threshold),
    inputs=_remedy_inputs,
    batch=("guided", "cond", "x0"),
    facts=(
        Fact("rescale_cfg: phi = 0 changes nothing", _rescale_none, "phi is the share of the rescaled prediction"),
        Fact(
            "rescale_cfg: phi = 1 restores each example's standard deviation",
            _rescale_full,
            "the standard deviation over all entries of one example: flatten(1), then std(1)",
        ),
        Fact(
            "rescale_cfg: in between it is one factor per example, phi of the way",
            _rescale_between,
            "guided is multiplied by a number; nothing is added to it",
        ),
        Fact("rescale_cfg: an example by hand", _rescale_by_hand, "the standard deviations are 4 and 1"),
        Fact(
            "dynamic_threshold: leaves alone what fits into [-1, 1]",
            _threshold_quiet,
            "c is at least 1, so that nothing is ever made brighter",
        ),
        Fact(
            "dynamic_threshold: eleven pixels by hand",
            _threshold_by_hand,
            "0.9 of the way through 0, 0.4, ..., 4 stands 3.6",
        ),
        Fact(
            "dynamic_threshold: no pixel leaves [-1, 1], and p = 1 only divides",
            _threshold_range,
            "first clip to [-c, c], then divide by c; with p = 1, c is the largest |x0| of the example",
        ),
    ),
    mistakes=(
        Mistake(
            "ratio upside down",
            "The ratio of standard deviations is upside down: a prediction that is too strong becomes stronger still.",
            _share(lambda guided, cond: _std(guided) / _std(cond)),
        ),
        Mistake(
            "shares exchanged",
            "phi and 1 - phi are exchanged: phi = 0 rescales all the way and phi = 1 not at all.",
            _rescale_by(lambda guided, cond, phi: (1 - phi) * _std(cond) / _std(guided) + phi),
        ),
        Mistake(
            "variance for std",
            "You take variances where standard deviations are due: the factor is squared, and corrects too much.",
            _share(lambda guided, cond: (_std(cond) / _std(guided)) ** 2),
        ),
        Mistake(
            "one std for the batch",
            "The standard deviations run over the whole batch: how one example is rescaled depends on the others.",
            _share(lambda guided, cond: cond.std() / guided.std()),
        ),
        Mistake(
            "std per channel",
            "The standard deviations are taken channel by channel, so that colours shift: one factor per example, over "
            "all its entries, is due.",
            _share(lambda guided, cond: _per_channel(cond) / _per_channel(guided)),
        ),
        Mistake(
            "phi ignored",
            "phi has no effect: you always rescale all the way.",
            _rescale_by(lambda guided, cond, phi: _std(cond) / _std(guided)),
        ),
        Mistake(
            "guided added whole",
            "You add the rescaled prediction to all of the guided one: their shares are phi and 1 - phi.",
            _rescale_by(lambda guided, cond, phi: phi * _std(cond) / _std(guided) + 1),
        ),
        Mistake(
            "ratio to the power phi",
            "Your factor is the ratio to the power phi. It has the right ends; due in between is the average of the "
            "prediction before and after, with the shares 1 - phi and phi.",
            _rescale_by(lambda guided, cond, phi: (_std(cond) / _std(guided)) ** phi),
        ),
        Mistake(
            "mixed with cond",
            "You mix the conditional prediction itself into the guided one: that is a smaller guidance scale. What is "
            "mixed is the guided prediction before and after it was rescaled.",
            ((lambda guided, cond, phi: phi * cond + (1 - phi) * guided), dynamic_threshold),
        ),
        Mistake(
            "mean brought back too",
            "You move the mean of each example as well: only its standard deviation is to come back, by one factor.",
            (_rescale_centred, dynamic_threshold),
        ),
        Mistake(
            "length for std",
            "You compare lengths (norms, root mean squares) where standard deviations are due: these leave out the "
            "mean.",
            _share(lambda guided, cond: pad(cond.flatten(1).norm(dim=1) / guided.flatten(1).norm(dim=1), guided)),
        ),
        Mistake(
            "normalised to 1",
            "You divide by the standard deviation of guided and stop there, at 1: it has to be that of cond.",
            _share(lambda guided, cond: 1 / _std(guided)),
        ),
        Mistake(
            "no max with 1",
            "c is not kept at 1 or above: an estimate that fits into [-1, 1] is stretched until it does not, and grey "
            "pictures become black and white.",
            _threshold_by(lambda x0, p: _quantile(x0.abs(), p)),
        ),
        Mistake(
            "quantile of the batch",
            "One quantile is taken over the whole batch: a single loud example dims all the others.",
            _threshold_by(lambda x0, p: x0.abs().quantile(p).clamp(min=1)),
        ),
        Mistake(
            "not divided",
            "You clip to [-c, c] and do not divide by c: pixels still leave [-1, 1].",
            _threshold_by(undivided=True),
        ),
        Mistake(
            "abs forgotten",
            "The quantile is that of x0, not of |x0|: dark pixels do not count, and c is too small.",
            _threshold_by(lambda x0, p: _quantile(x0, p).clamp(min=1)),
        ),
        Mistake(
            "not clipped",
            "You divide by c without clipping: whatever lies above the quantile still leaves [-1, 1].",
            _threshold_by(clip=False),
        ),
        Mistake(
            "static",
            "You clip to [-1, 1] whatever x0 is, which is the static threshold: everything beyond becomes pure black "
            "or white, and p has no effect.",
            _threshold_by(lambda x0, p: torch.ones_like(_quantile(x0, 0.5))),
        ),
        Mistake(
            "largest for quantile",
            "You divide by the largest |x0|: p has no effect, and one stray pixel dims the whole example.",
            _threshold_by(lambda x0, p: _quantile(x0.abs(), 1.0).clamp(min=1)),
        ),
        Mistake(
            "at most 1",
            "c is kept at 1 or below instead of 1 or above: clamp(min=1), not clamp(max=1).",
            _threshold_by(lambda x0, p: _quantile(x0.abs(), p).clamp(max=1)),
        ),
        Mistake(
            "1 - p",
            "You take the quantile at 1 - p: c is a small value of |x0|, and nearly all pixels are cut.",
            _threshold_by(lambda x0, p: _quantile(x0.abs(), 1 - p).clamp(min=1)),
        ),
    ),
    alternatives=((_rescale_loop, _threshold_loop), (_rescale_moments, _threshold_sorted)),
    hints=(
        "rescale_cfg: which number, times guided, gives it the standard deviation of cond? Average it with 1. "
        "dynamic_threshold: c is (B,); what does it take for clamp and / to treat each example by its own?",
        "(phi std(cond) / std(guided) + 1 - phi) guided; c = quantile(|x0|, p) per example, at least 1, then "
        "clamp(x0, -c, c) / c.",
    ),
    probe=lambda answer, g: _ask(answer, "dynamic_threshold", 1000 * randn(g, 3, 40), 0.3),
    hides=("guidance.rescale",),
)

# --- 04.8 apg ---------------------------------------------------------------------------------------------------------


def _estimates(g: Generator) -> tuple[Tensor, Tensor]:
    """Estimates of x0 whose differences have lengths of about 1, 3, 6 and 12."""
    x_c, away = pictures(g, 2)
    lengths = torch.tensor([1.0, 3, 6, 12], dtype=torch.float64)[torch.randperm(4, generator=g)]
    return x_c, x_c - pad(lengths / torch.tensor(_lengths(away), dtype=torch.float64), away) * away


def _apg_inputs(g: Generator) -> dict:
    x_c, x_u = _estimates(g)
    return {"apg": dict(x_c=x_c, x_u=x_u, s=_real(g, 2, 6), eta=_real(g, 0.2, 0.4), r=_real(g, 4, 5))}


def _apg_one(answer: Answer, g: Generator) -> None:
    x_c, x_u = _estimates(g)
    need(_ask(answer, "apg", x_c, x_u, 1.0, 0.3, 4.0), x_c, "s = 1 is no guidance: it must return x_c")


def _apg_cfg(answer: Answer, g: Generator) -> None:
    x_c, x_u = _estimates(g)
    s = _real(g, 2, 6)
    got = _ask(answer, "apg", x_c, x_u, s, 1.0, math.inf)
    need(got, s * x_c - (s - 1) * x_u, f"with eta = 1 and r = inf it must be plain guidance; at s = {s:.4g} it is not")


def _apg_by_hand(answer: Answer, g: Generator) -> None:
    """d = (1, 1) is 3/5 of x_c and (-1/5, 2/5)."""
    for eta, due in ((0.0, (1.2, 2.6)), (0.5, (3.6, 3.8))):
        got = _ask(answer, "apg", _row(2, 1), _row(1, 0), 5.0, eta, math.inf)
        text = f"for x_c = (2, 1), x_u = (1, 0), s = 5, eta = {eta:g} and r = inf it is wrong"
        if isinstance(got, Tensor) and got.shape == (1, 2):
            text += f": yours is ({_shown(got[0].tolist())})"
        need(got, _row(*due), text)


def _apg_perpendicular(answer: Answer, g: Generator) -> None:
    x_c, x_u = _estimates(g)
    s, eta, d = _real(g, 2, 6), _real(g, 0.2, 0.7), x_c - x_u
    for share in (0.0, eta):
        added = _same_shape(_ask(answer, "apg", x_c, x_u, s, share, math.inf), x_c) - x_c
        if not added.any():
            raise Wrong(f"with eta = {share:.3g} nothing is added to x_c")
        got, full = _dots(added, x_c), [(s - 1) * value for value in _dots(d, x_c)]
        if not close(got, [share * value for value in full], rtol=1e-6, atol=1e-7):
            i = max(range(len(got)), key=lambda i: abs(got[i] - share * full[i]))
            raise Wrong(
                f"eta = {share:.3g}: what you add to example {i} of x_c lies {round(got[i] / full[i], 6):.4g} times as "
                "far along x_c as plain guidance would"
            )
    if not close(_lengths(added - share * (s - 1) * d), _lengths((1 - share) * (s - 1) * _rest(d, x_c)), rtol=1e-6):
        raise Wrong(f"eta = {share:.3g}: the part perpendicular to x_c is not (s - 1) times that of d")


def _rest(d: Tensor, x_c: Tensor) -> Tensor:
    """The part of d perpendicular to x_c, by least squares."""
    rows = []
    for one, along in zip(d.flatten(1), x_c.flatten(1), strict=True):
        rows.append(one - along * torch.linalg.lstsq(along[:, None], one[:, None]).solution[0, 0])
    return torch.stack(rows).view_as(d)


def _apg_cap(answer: Answer, g: Generator) -> None:
    x_c, x_u = _estimates(g)
    s, r = _real(g, 2, 6), _real(g, 4, 5)
    added = _same_shape(_ask(answer, "apg", x_c, x_u, s, 1.0, r), x_c) - x_c
    before, got = _lengths(x_c - x_u), [length / (s - 1) for length in _lengths(added)]
    if not close(got, [min(length, r) for length in before], rtol=1e-6):
        raise Wrong(
            f"eta = 1, r = {r:.3g}: updates d of length {_shown(before)} count as if they had length {_shown(got)}",
            expected=_shown([min(length, r) for length in before]),
        )


def _apg_cap_first(answer: Answer, g: Generator) -> None:
    """d is shortened whole, before it is split."""
    x_c, x_u = _estimates(g)
    s, r = _real(g, 2, 6), _real(g, 4, 5)
    d = x_c - x_u
    shares = torch.tensor([min(1.0, r / length) for length in _lengths(d)], dtype=torch.float64)
    got, due = _ask(answer, "apg", x_c, x_u, s, 0.0, r), _ask(answer, "apg", x_c, x_u, s, 0.0, math.inf)
    need(
        got, x_c + pad(shares, d) * (due - x_c), f"eta = 0, r = {r:.3g}: d must be shortened whole, before it is split"
    )


def _apg_zero(answer: Answer, g: Generator) -> None:
    x_c, _ = _estimates(g)
    got = _ask(answer, "apg", x_c, x_c.clone(), 4.0, 0.3, 4.0)
    if isinstance(got, Tensor) and not got.isfinite().all():
        raise Wrong("where x_c = x_u there are NaN: d has length 0, and r / 0 is to be met with a clamp")
    need(got, x_c, "where x_c = x_u there is nothing to add")


def _apg_by(
    cap: Callable[[Tensor, float], Tensor] = lambda d, r: d * (r / _norm(d)).clamp(max=1),
    onto: Callable[[Tensor, Tensor], Tensor] = lambda x_c, x_u: x_c,
    parallel: Callable[[Tensor, Tensor], Tensor] | None = None,
    add: Callable = lambda x_c, x_u, s, eta, par, rest: x_c + (s - 1) * (rest + eta * par),
) -> tuple[Callable]:
    split = parallel or _parallel

    def apg(x_c: Tensor, x_u: Tensor, s: float, eta: float = 0.0, r: float = math.inf) -> Tensor:
        d = cap(x_c - x_u, r)
        par = split(d, onto(x_c, x_u))
        return add(x_c, x_u, s, eta, par, d - par)

    return (apg,)


def _norm(d: Tensor) -> Tensor:
    return pad(d.flatten(1).norm(dim=1), d)


def _dot(v: Tensor, w: Tensor) -> Tensor:
    return pad((v * w).flatten(1).sum(1), v)


def _parallel(v: Tensor, onto: Tensor) -> Tensor:
    return _dot(v, onto) / _dot(onto, onto) * onto


def _by_rows(v: Tensor, onto: Tensor) -> Tensor:
    return (v * onto).sum(-1, keepdim=True) / (onto * onto).sum(-1, keepdim=True).clamp(min=1e-30) * onto


def _cap_afterwards(x_c: Tensor, x_u: Tensor, s: float, eta: float = 0.0, r: float = math.inf) -> Tensor:
    par = _parallel(x_c - x_u, x_c)
    update = x_c - x_u - par + eta * par
    return x_c + (s - 1) * update * (r / _norm(update)).clamp(max=1)


def _apg_loop(x_c: Tensor, x_u: Tensor, s: float, eta: float = 0.0, r: float = math.inf) -> Tensor:
    rows = []
    for c, u in zip(x_c, x_u, strict=True):
        d = c - u
        length = float(d.square().sum()) ** 0.5
        if length > r:
            d = d * (r / length)
        par = (d * c).sum() / (c * c).sum() * c
        rows.append(c + (s - 1) * (d - par) + (s - 1) * eta * par)
    return torch.stack(rows)


def _apg_einsum(x_c: Tensor, x_u: Tensor, s: float, eta: float = 0.0, r: float = math.inf) -> Tensor:
    """Two weights per example: one for d, one for x_c."""
    c, d = x_c.flatten(1), (x_c - x_u).flatten(1)
    lengths = torch.einsum("bn,bn->b", d, d).sqrt()
    kept = torch.where(lengths > r, r / lengths, 1.0)
    along = kept * torch.einsum("bn,bn->b", d, c) / torch.einsum("bn,bn->b", c, c)
    out = (1 - (s - 1) * (1 - eta) * along)[:, None] * c + ((s - 1) * kept)[:, None] * d
    return out.reshape(x_c.shape)


def _apg_probes(g: Generator) -> tuple[list[dict[str, object]], dict[str, Tensor]]:
    """At eta = 1 without a cap it is linear, and so has a formula."""
    s = 1.1 + 0.8 * torch.rand(9, generator=g, dtype=torch.float64)
    return [dict(s=float(v), eta=1.0, r=math.inf) for v in s], {"s": s, "s - 1": s - 1, "2 - s": 2 - s}


APG = Exercise(
    id="04.8",
    names=("apg",),
    references=(apg,),
    inputs=_apg_inputs,
    batch=("x_c", "x_u"),
    formulas=(
        Formula(
            "apg",
            "with eta = 1 and r = inf, apg",
            ("x_c", "x_u"),
            "with eta = 1 and r = inf, apg = s*x_c - (s - 1)*x_u",
            _apg_probes,
        ),
    ),
    facts=(
        Fact("s = 1 returns x_c", _apg_one, "what is added carries the factor s - 1"),
        Fact("eta = 1 and r = inf are plain guidance", _apg_cfg, "then the two parts are d again: x_c + (s - 1) d"),
        Fact(
            "two numbers by hand",
            _apg_by_hand,
            "d = (1, 1) has the inner product 3 with x_c = (2, 1), and |x_c|^2 is 5: the parallel part is 3/5 x_c",
        ),
        Fact(
            "along x_c it adds eta times what plain guidance adds",
            _apg_perpendicular,
            "the parallel part is (d . x_c / |x_c|^2) x_c, with sums over all entries of one example",
        ),
        Fact(
            "updates longer than r count as r, shorter ones as they are",
            _apg_cap,
            "min(1, r / |d|) times d, |d| over all entries of an example",
        ),
        Fact("d is shortened before it is split", _apg_cap_first, "the length that counts is that of the whole d"),
        Fact("where x_c = x_u nothing is added", _apg_zero, "r / 0 is infinite: which function cuts that to 1?"),
    ),
    mistakes=(
        Mistake(
            "projected onto x_u",
            "d is split along x_u; APG splits it along the conditional estimate x_c.",
            _apg_by(onto=lambda x_c, x_u: x_u),
        ),
        Mistake(
            "one product for the batch",
            "The inner products run over the whole batch: how one example is split depends on the others.",
            _apg_by(parallel=lambda d, c: (d * c).sum() / (c * c).sum() * c),
        ),
        Mistake(
            "row by row",
            "The inner products run over the last axis only: d is split row by row, where one product over all entries "
            "of an example is due.",
            _apg_by(parallel=_by_rows),
        ),
        Mistake(
            "one length for the batch",
            "The length of d is taken over the whole batch: one strong update shortens all the others.",
            _apg_by(cap=lambda d, r: d * (r / d.norm()).clamp(max=1)),
        ),
        Mistake(
            "always brought to length r",
            "Every update is given length r: short updates are stretched, even where guidance has nothing to say. r is "
            "only the most that is allowed.",
            _apg_by(cap=lambda d, r: d if r == math.inf else d * r / _norm(d)),
        ),
        Mistake(
            "r as a factor",
            "You multiply d by r: r is the length that it must not exceed.",
            _apg_by(cap=lambda d, r: d if r == math.inf else d * r),
        ),
        Mistake(
            "r ignored",
            "r has no effect: long updates are not shortened.",
            _apg_by(cap=lambda d, r: d),
        ),
        Mistake(
            "entries clipped to r",
            "Each entry of d is clipped to [-r, r]: it is the length of the whole d that must not exceed r.",
            _apg_by(cap=lambda d, r: d.clamp(-r, r)),
        ),
        Mistake(
            "shortened too late",
            "You shorten after the parts have been weighed: d is shortened whole, before it is split.",
            (_cap_afterwards,),
        ),
        Mistake(
            "s for s - 1",
            "The update is multiplied by s, and added to x_c, which contains it once already: that is guidance at "
            "s + 1.",
            _apg_by(add=lambda x_c, x_u, s, eta, par, rest: x_c + s * (rest + eta * par)),
        ),
        Mistake(
            "eta on the rest",
            "eta weighs the perpendicular part: you keep what APG wants to remove, and remove what it wants to keep.",
            _apg_by(add=lambda x_c, x_u, s, eta, par, rest: x_c + (s - 1) * (eta * rest + par)),
        ),
        Mistake(
            "eta ignored",
            "eta has no effect: the parallel part is always left out.",
            _apg_by(add=lambda x_c, x_u, s, eta, par, rest: x_c + (s - 1) * rest),
        ),
        Mistake(
            "1 - eta",
            "eta and 1 - eta are exchanged: eta = 1 must be plain guidance, and eta = 0 leave the parallel part out.",
            _apg_by(add=lambda x_c, x_u, s, eta, par, rest: x_c + (s - 1) * (rest + (1 - eta) * par)),
        ),
        Mistake(
            "starts from x_u",
            "The update is added to x_u with the factor s. For eta = 1 and r = inf that is the same; otherwise it does "
            "not return x_c at s = 1.",
            _apg_by(add=lambda x_c, x_u, s, eta, par, rest: x_u + s * (rest + eta * par)),
        ),
        Mistake(
            "not divided by the squared length",
            "The parallel part is d . x_c times x_c, not divided by |x_c|^2, so its length is wrong by that factor.",
            _apg_by(parallel=lambda d, c: _dot(d, c) * c),
        ),
        Mistake(
            "divided by the length once",
            "The parallel part is divided by |x_c| once: both x_c in (d . x_c) x_c need it, so by |x_c|^2.",
            _apg_by(parallel=lambda d, c: _dot(d, c) / _norm(c) * c),
        ),
        Mistake(
            "d turned round",
            "d is x_u - x_c: guidance leads away from the condition.",
            _apg_by(add=lambda x_c, x_u, s, eta, par, rest: x_c - (s - 1) * (rest + eta * par)),
        ),
    ),
    alternatives=((_apg_loop,), (_apg_einsum,)),
    hints=(
        "Four steps: d; shorten it; its part along x_c; add. In which of them does each of s, eta and r stand, and "
        "over which axes do the sums run?",
        "d = x_c - x_u, times min(1, r / |d|); par = (d . x_c / |x_c|^2) x_c; x_c + (s - 1) (d - par + eta par).",
    ),
    hides=("guidance.apg", "guidance.project", "guidance.cfg"),
    points=2,
)

# --- 04.9 negative ----------------------------------------------------------------------------------------------------

FORMS = ("two-pass", "three-pass", "perp")


def _negative_inputs(g: Generator) -> dict:
    eps_pos, eps_neg, eps_u = pictures(g, 3)
    form = FORMS[integer(g, 0, 2)]
    return {"negative": dict(eps_pos=eps_pos, eps_neg=eps_neg, eps_u=eps_u, s=_real(g, 2, 8), form=form)}


def _weights(answer: Answer, form: str, s: float) -> tuple[list[float], str]:
    """The weights of eps_pos, eps_neg and eps_u: what comes of 1 in one of them and 0 in the others."""
    got = _ask(answer, "negative", _row(1, 0, 0), _row(0, 1, 0), _row(0, 0, 1), s, form)
    weights = _same_shape(got, _row(1, 0, 0))[0].tolist()
    return weights, f"at s = {s:g} yours is {_combined(weights)}"


def _combined(weights: Sequence[float]) -> str:
    """3 eps_pos - 2 eps_neg for (3, -2, 0)."""
    terms = zip(weights, ("eps_pos", "eps_neg", "eps_u"), strict=True)
    text = " + ".join(f"{weight:.4g} {name}" for weight, name in terms if weight) or "0"
    return text.replace("+ -", "- ")


def _negative_two(answer: Answer, g: Generator) -> None:
    for s in (float(integer(g, 2, 9)), 1.0):
        weights, text = _weights(answer, "two-pass", s)
        if not close(weights, [s, 1 - s, 0.0]):
            raise Wrong(f'"two-pass": {text}', expected=_combined([s, 1 - s, 0.0]))


def _negative_three(answer: Answer, g: Generator) -> None:
    for s in (float(integer(g, 2, 9)), 1.0):
        weights, text = _weights(answer, "three-pass", s)
        if not close(weights, [s, -s, 1.0]):
            raise Wrong(f'"three-pass": {text}', expected=_combined([s, -s, 1.0]))


def _negative_densities(answer: Answer, g: Generator) -> None:
    """Predictions that belong to three Gaussians; what is guided belongs to a product of their powers."""
    x = randn(g, 1, 5).requires_grad_()
    densities = [torch.distributions.Normal(_real(g, -2, 2), _real(g, 0.5, 2)) for _ in range(3)]
    eps = [-torch.autograd.grad(p.log_prob(x).sum(), x)[0] for p in densities]  # at sigma = 1
    s = _real(g, 2, 8)
    pos, neg, none = (p.log_prob(x) for p in densities)
    tilts = {
        "two-pass": ("p_pos^s p_neg^(1-s)", s * pos + (1 - s) * neg),
        "three-pass": ("p_u (p_pos / p_neg)^s", none + s * (pos - neg)),
    }
    for form, (tilt, log) in tilts.items():
        right = -torch.autograd.grad(log.sum(), x, retain_graph=True)[0]
        need(_ask(answer, "negative", *eps, s, form), right, f'"{form}" does not go up the density {tilt}')


def _perp_by_hand(answer: Answer, g: Generator) -> None:
    """d_pos = (2, 0), d_neg = (1, 1): what is perpendicular is (0, 1)."""
    for u, due in (((0.0, 0.0), (15, -7.5)), ((1.0, 2.0), (16, -5.5))):
        got = _ask(answer, "negative", _row(2 + u[0], u[1]), _row(1 + u[0], 1 + u[1]), _row(*u), 7.5, "perp")
        text = f"for eps_u = ({_shown(u)}), d_pos = (2, 0), d_neg = (1, 1) and s = 7.5 it is wrong"
        if isinstance(got, Tensor) and got.shape == (1, 2):
            text += f": yours is ({_shown(got[0].tolist())})"
        need(got, _row(*due), text)


def _perp_along(answer: Answer, g: Generator) -> None:
    eps_pos, eps_neg, eps_u = pictures(g, 3)
    s = _real(g, 2, 8)
    d = eps_pos - eps_u
    moved = _same_shape(_ask(answer, "negative", eps_pos, eps_neg, eps_u, s, "perp"), d) - eps_u
    shares = [got / full for got, full in zip(_dots(moved, d), _dots(d, d), strict=True)]
    if not close(shares, [s] * len(shares)):
        i = max(range(len(shares)), key=lambda i: abs(shares[i] - s))
        raise Wrong(
            f"s = {s:.4g}: along the positive guidance, example {i} moves {shares[i]:.4g} times as far as at s = 1 "
            "without a negative prompt: that prompt must not touch it"
        )
    right = s * (d - _rest(eps_neg - eps_u, d))
    need(moved, right, "what is subtracted is not the part of d_neg perpendicular to d_pos, all entries taken together")
    share = _real(g, -2, 2)
    got = _ask(answer, "negative", eps_pos, eps_u + share * d, eps_u, s, "perp")
    need(got, eps_u + s * d, "a negative guidance parallel to the positive one must have no effect")


def _perp_none(answer: Answer, g: Generator) -> None:
    """In one example of the batch the positive prompt has no guidance."""
    eps_pos, eps_neg, eps_u = pictures(g, 3)
    eps_pos[1] = eps_u[1]
    s = _real(g, 2, 8)
    got = _same_shape(_ask(answer, "negative", eps_pos, eps_neg, eps_u, s, "perp"), eps_u)
    if not got.isfinite().all():
        raise Wrong("where the positive prompt has no guidance, eps_pos = eps_u, there are NaN: 0 is divided by 0")
    need(
        got[1], (1 + s) * eps_u[1] - s * eps_neg[1], "where eps_pos = eps_u, all of the negative guidance is subtracted"
    )


def _negative_by(
    two: Callable | None = None, three: Callable | None = None, perp: Callable | None = None
) -> tuple[Callable]:
    """two(pos, neg, u, s), three(d_pos, d_neg, u, s), perp(d_pos, d_neg, u, s, pos); what is not given is right."""

    def negative(eps_pos: Tensor, eps_neg: Tensor, eps_u: Tensor, s: float, form: str) -> Tensor:
        d_pos, d_neg = eps_pos - eps_u, eps_neg - eps_u
        if form == "two-pass" and two:
            return two(eps_pos, eps_neg, eps_u, s)
        if form == "three-pass" and three:
            return three(d_pos, d_neg, eps_u, s)
        if form == "perp" and perp:
            return perp(d_pos, d_neg, eps_u, s, eps_pos)
        return _negative(eps_pos, eps_neg, eps_u, s, form)

    return (negative,)


_negative = negative  # the reference, under a name that no mistake takes


def _onto(v: Tensor, onto: Tensor) -> Tensor:
    """The part of v parallel to `onto`, 0 where that is 0."""
    length = _dot(onto, onto)
    return torch.where(length > 0, _dot(v, onto) / length.clamp(min=1e-30), 0) * onto


def _negative_torch(eps_pos: Tensor, eps_neg: Tensor, eps_u: Tensor, s: float, form: str) -> Tensor:
    if form == "two-pass":
        return torch.lerp(eps_neg, eps_pos, s)
    base, plus, minus = eps_u.flatten(1), (eps_pos - eps_u).flatten(1), (eps_neg - eps_u).flatten(1)
    if form == "perp":
        length = torch.einsum("bn,bn->b", plus, plus)
        share = torch.einsum("bn,bn->b", plus, minus) / torch.where(length == 0, torch.ones_like(length), length)
        minus = minus - share[:, None] * plus
    return torch.unflatten(base + s * plus - s * minus, 1, eps_u.shape[1:])


def _negative_loop(eps_pos: Tensor, eps_neg: Tensor, eps_u: Tensor, s: float, form: str) -> Tensor:
    rows = []
    for pos, neg, none in zip(eps_pos, eps_neg, eps_u, strict=True):
        if form == "two-pass":
            rows.append(s * pos - (s - 1) * neg)
        elif form == "three-pass":
            rows.append(none + s * pos - s * neg)
        else:
            plus, minus = pos - none, neg - none
            if plus.any():
                minus = minus - (minus * plus).sum() / (plus * plus).sum() * plus
            rows.append(none + s * (plus - minus))
    return torch.stack(rows)


def _negative_probes(g: Generator) -> tuple[list[dict[str, object]], dict[str, Tensor]]:
    s = 1.1 + 0.8 * torch.rand(9, generator=g, dtype=torch.float64)
    return [dict(s=float(v), form="three-pass") for v in s], {"s": s, "s - 1": s - 1, "2 - s": 2 - s}


def _negative_probe(answer: Answer, g: Generator) -> object:
    eps_pos, eps_neg, eps_u = pictures(g, 3)
    seen = [answer(eps_pos.clone(), eps_neg.clone(), eps_u.clone(), 3.0, form) for form in FORMS]
    return [*seen, answer(eps_u.clone(), eps_neg, eps_u, 3.0, "perp")]


NEGATIVE = Exercise(
    id="04.9",
    names=("negative",),
    references=(negative,),
    inputs=_negative_inputs,
    batch=("eps_pos", "eps_neg", "eps_u"),
    formulas=(
        Formula(
            "negative",
            '"three-pass"',
            ("eps_pos", "eps_neg", "eps_u"),
            '"three-pass" = s*eps_pos - s*eps_neg + eps_u',
            _negative_probes,
        ),
    ),
    facts=(
        Fact(
            '"two-pass" has the right weights',
            _negative_two,
            "plain guidance, with the negative prediction where the unconditional one stood",
        ),
        Fact(
            '"three-pass" has the right weights',
            _negative_three,
            "eps_u, plus s times the guidance of the positive prompt, minus s times that of the negative one",
        ),
        Fact(
            "both go up the density that they stand for",
            _negative_densities,
            "two passes: p_pos^s p_neg^(1-s); three passes: p_u (p_pos / p_neg)^s",
        ),
        Fact(
            '"perp" by hand',
            _perp_by_hand,
            "d_pos is eps_pos - eps_u, d_neg is eps_neg - eps_u; (1, 1) has the part (1, 0) along (2, 0), and (0, 1) "
            "is left of it",
        ),
        Fact(
            '"perp" subtracts what is perpendicular to d_pos, and only that',
            _perp_along,
            "subtract from d_neg its part along d_pos, (d_neg . d_pos / |d_pos|^2) d_pos, example by example",
        ),
        Fact(
            '"perp" where the positive prompt has no guidance',
            _perp_none,
            "what is 0 / 0 there? The part along nothing is 0",
        ),
    ),
    mistakes=(
        Mistake(
            "always two passes",
            '"three-pass" gives the two-pass form: eps_u is not in it, and at s = 1 it ignores the negative prompt.',
            _negative_by(three=lambda p, n, u, s: n + u + s * (p - n)),
        ),
        Mistake(
            "always three passes",
            '"two-pass" gives the three-pass form: it takes eps_u, which a pipeline with a negative prompt never asks '
            "for.",
            _negative_by(two=lambda pos, neg, u, s: u + s * (pos - neg)),
        ),
        Mistake(
            "forms exchanged",
            '"two-pass" and "three-pass" are exchanged: the one that pipelines use has no eps_u.',
            _negative_by(two=lambda pos, neg, u, s: u + s * (pos - neg), three=lambda p, n, u, s: n + u + s * (p - n)),
        ),
        Mistake(
            "prompts exchanged",
            "The positive and the negative prompt are exchanged: you are led to what was to be avoided.",
            (lambda eps_pos, eps_neg, eps_u, s, form: _negative(eps_neg, eps_pos, eps_u, s, form),),
        ),
        Mistake(
            "drawn to the negative prompt",
            'In "three-pass" and "perp" the guidance of the negative prompt is added: you are drawn to what was to '
            "be avoided.",
            _negative_by(
                three=lambda p, n, u, s: u + s * (p + n), perp=lambda p, n, u, s, pos: u + s * (p + n - _onto(n, p))
            ),
        ),
        Mistake(
            "negative prompt not scaled",
            'In "three-pass" the guidance of the negative prompt is subtracted once, whatever s is: the same scale '
            "belongs to both.",
            _negative_by(three=lambda p, n, u, s: u + s * p - n),
        ),
        Mistake(
            "whole predictions",
            'In "three-pass" and "perp" eps_u is left out: guidance alone has no prediction to change.',
            _negative_by(three=lambda p, n, u, s: s * (p - n), perp=lambda p, n, u, s, pos: s * (p - n + _onto(n, p))),
        ),
        Mistake(
            "w for s",
            'In "two-pass" the scale is off by one: you have eps_pos + s (eps_pos - eps_neg), which is scale s + 1.',
            _negative_by(two=lambda pos, neg, u, s: pos + s * (pos - neg)),
        ),
        Mistake(
            "perpendicular to the prediction",
            'In "perp" you project onto eps_pos; perpendicular to the guidance eps_pos - eps_u is due. Otherwise the '
            "result depends on where the origin lies.",
            _negative_by(perp=lambda p, n, u, s, pos: u + s * (p - n + _onto(n, pos))),
        ),
        Mistake(
            "the parallel part",
            'In "perp" you subtract the part of the negative guidance that is parallel to the positive one, and leave '
            "the perpendicular part: it is the other way round.",
            _negative_by(perp=lambda p, n, u, s, pos: u + s * (p - _onto(n, p))),
        ),
        Mistake(
            "the positive one projected",
            'In "perp" you take from the positive guidance its part along the negative one: it is the negative one '
            "that is cut, so that the positive prompt keeps its strength.",
            _negative_by(perp=lambda p, n, u, s, pos: u + s * (p - _onto(p, n) - n)),
        ),
        Mistake(
            "perp as three passes",
            '"perp" is the three-pass form: nothing is projected.',
            _negative_by(perp=lambda p, n, u, s, pos: u + s * (p - n)),
        ),
        Mistake(
            "one product for the batch",
            'In "perp" the inner products run over the whole batch: how one example is split depends on the others.',
            _negative_by(perp=lambda p, n, u, s, pos: u + s * (p - n + (n * p).sum() / (p * p).sum() * p)),
        ),
        Mistake(
            "row by row",
            'In "perp" the inner products run over the last axis only: d_neg is split row by row, where one product '
            "over all entries of an example is due.",
            _negative_by(perp=lambda p, n, u, s, pos: u + s * (p - n + _by_rows(n, p))),
        ),
        Mistake(
            "three passes projected",
            '"three-pass" gives the form "perp": there, nothing is projected.',
            _negative_by(three=lambda p, n, u, s: u + s * (p - n + _onto(n, p))),
        ),
        Mistake(
            "not divided by the squared length",
            'In "perp" the parallel part is d_neg . d_pos times d_pos, not divided by |d_pos|^2.',
            _negative_by(perp=lambda p, n, u, s, pos: u + s * (p - n + _dot(n, p) * p)),
        ),
        Mistake(
            "0 / 0",
            'In "perp" you divide by |d_pos|^2, which is 0 where the positive prompt has no guidance: NaN, and a '
            "sampler never recovers from one.",
            _negative_by(perp=lambda p, n, u, s, pos: u + s * (p - n + _parallel(n, p))),
        ),
    ),
    alternatives=((_negative_torch,), (_negative_loop,)),
    hints=(
        "Write d_pos = eps_pos - eps_u and d_neg = eps_neg - eps_u. Which forms need them, and which needs no eps_u?",
        "two-pass: eps_neg + s (eps_pos - eps_neg). three-pass: eps_u + s (d_pos - d_neg). perp: the same with d_neg - "
        "(d_neg . d_pos / |d_pos|^2) d_pos for d_neg, and 0 for that part where d_pos = 0.",
    ),
    probe=_negative_probe,
    hides=("guidance.negative", "guidance.perp_neg", "guidance.project", "guidance.cfg"),
    points=2,
)

# --- 04.10 my_cfg_test ------------------------------------------------------------------------------------------------


def _cfg(eps_c: Tensor, eps_u: Tensor, s: float) -> Tensor:
    return eps_u + s * (eps_c - eps_u)


def _cfg_weights(eps_c: Tensor, eps_u: Tensor, s: float) -> Tensor:
    return s * eps_c + (1 - s) * eps_u


def _cfg_from_cond(eps_c: Tensor, eps_u: Tensor, s: float) -> Tensor:
    return eps_c + (s - 1) * (eps_c - eps_u)


def _cfg_in_place(eps_c: Tensor, eps_u: Tensor, s: float) -> Tensor:
    eps_c -= eps_u
    eps_c *= s
    eps_c += eps_u
    return eps_c


def _cfg_half(eps_c: Tensor, eps_u: Tensor, s: float) -> Tensor:
    """The second half of the last axis is not guided."""
    half = (eps_c.shape[-1] + 1) // 2
    return torch.cat([_cfg(eps_c, eps_u, s)[..., :half], eps_c[..., half:]], dim=-1)


_CFG_WRONG = (
    ("one that has eps_c and eps_u exchanged", lambda eps_c, eps_u, s: _cfg(eps_u, eps_c, s)),
    ("one that takes s for w, eps_c + s (eps_c - eps_u)", lambda eps_c, eps_u, s: eps_c + s * (eps_c - eps_u)),
    ("one that adds s eps_c to eps_u", lambda eps_c, eps_u, s: eps_u + s * eps_c),
    ("one that asked about the same label twice, and ignores s", lambda eps_c, eps_u, s: _cfg(eps_c, eps_c, s)),
    ("one that only interpolates, as if s were at most 1", lambda eps_c, eps_u, s: _cfg(eps_c, eps_u, min(s, 1))),
    ("one that squares s", lambda eps_c, eps_u, s: _cfg(eps_c, eps_u, s**2)),
    ("one that is conditional for s = 0, too", lambda eps_c, eps_u, s: _cfg(eps_c, eps_u, s) if s else 1 * eps_c),
    ("one that works in place, on eps_c", _cfg_in_place),
    ("one that guides only half of the entries", _cfg_half),
)


def _cfg_test_by(*looks: str) -> Callable:
    """A test that looks at some things only."""

    def my_cfg_test(guide: Callable) -> None:
        eps_c, eps_u = torch.randn(2, 4, 6, dtype=torch.float64)
        if "shape" in looks:
            assert guide(eps_c.clone(), eps_u.clone(), 2.0).shape == eps_c.shape
        for look, s, due in (("0", 0.0, eps_u), ("1", 1.0, eps_c), ("3", 3.0, 3 * eps_c - 2 * eps_u)):
            if look in looks:
                assert torch.allclose(guide(eps_c.clone(), eps_u.clone(), s), due)
        if "equal" in looks:
            assert torch.allclose(guide(eps_c.clone(), eps_c.clone(), 3.0), eps_c)
        if "w" in looks:
            assert torch.allclose(guide(eps_c.clone(), eps_u.clone(), 2.0), 3 * eps_c - 2 * eps_u)
        if "longer" in looks:
            assert guide(eps_c, eps_u, 3.0).norm() > guide(eps_c, eps_u, 1.0).norm()
        if "exact" in looks:
            for s in (0.0, 1.0, 3.3):
                assert (guide(eps_c.clone(), eps_u.clone(), s) == eps_u + s * (eps_c - eps_u)).all()
        if "untouched" in looks:
            kept = eps_c.clone(), eps_u.clone()
            guide(eps_c, eps_u, 2.0)
            assert torch.equal(eps_c, kept[0]) and torch.equal(eps_u, kept[1])

    return my_cfg_test


def _cfg_line(guide: Callable) -> None:
    """On the line through eps_u and eps_c, equally spaced in s; the inputs are looked at last."""
    eps_c, eps_u = torch.rand(2, 3, 4, 4, dtype=torch.float64).unbind(0)
    kept = eps_c.tolist(), eps_u.tolist()
    places = [guide(eps_c, eps_u, s).clone() for s in (0.0, 1.0, 2.0, 3.0)]
    if (eps_c.tolist(), eps_u.tolist()) != kept:
        raise RuntimeError("the inputs were changed")
    steps = [b - a for a, b in pairwise(places)]
    if not all(torch.allclose(step, eps_c - eps_u) for step in steps):
        raise RuntimeError("not a straight line from eps_u through eps_c")
    if (places[0] - eps_u).abs().max() > 1e-9:
        raise RuntimeError("it does not start at eps_u")


def _cfg_numbers(guide: Callable) -> None:
    """By hand: from 10 to 30, scale by scale."""
    for s, due in ((0.0, 10.0), (0.5, 20.0), (1.0, 30.0), (2.5, 60.0), (7.5, 160.0)):
        eps_c, eps_u = torch.full((2, 4), 30.0), torch.full((2, 4), 10.0)
        got = guide(eps_c, eps_u, s)
        assert all(abs(value - due) < 1e-3 for value in got.flatten().tolist()), (s, due)
        assert eps_c.eq(30).all() and eps_u.eq(10).all(), "changed"


MY_CFG_TEST = test_exercise(
    "04.10",
    "my_cfg_test",
    my_cfg_test,
    right=(_cfg, _cfg_weights, _cfg_from_cond),
    wrong=_CFG_WRONG,
    needed=8,
    mistakes=(
        Mistake(
            "never objects",
            "Your test objects to no wrong function: it looks at the shape at most, which they all get right, or at "
            "inputs for which they all agree, such as zeros.",
            (_cfg_test_by("shape"),),
        ),
        Mistake(
            "s = 1 only",
            "Your test looks at s = 1 only, where guidance is switched off: what s does, and what eps_u is for, does "
            "not show there.",
            (_cfg_test_by("1"),),
        ),
        Mistake(
            "s = 0 and s = 1 only",
            "Your test looks at s = 0 and s = 1 only. Guidance begins beyond: a function that stops at s = 1, or "
            "squares s, agrees at both ends.",
            (_cfg_test_by("0", "1"),),
        ),
        Mistake(
            "one large scale only",
            "Your test looks at one scale and at the result alone: what happens at s = 0, and to the inputs, it does "
            "not see.",
            (_cfg_test_by("3"),),
        ),
        Mistake(
            "equal predictions",
            "Your test passes the same tensor twice: where eps_c = eps_u there is nothing to guide, and any weights "
            "that sum to 1 give the right result.",
            (_cfg_test_by("equal"),),
        ),
        Mistake(
            "inputs only",
            "Your test looks at the inputs, whether they stay, and not at the result.",
            (_cfg_test_by("untouched"),),
        ),
        Mistake(
            "a wrong formula of its own",
            "Your test compares with (1 + s) eps_c - s eps_u, the convention of w: it refuses correct functions and "
            "lets that mistake pass.",
            (_cfg_test_by("w"),),
        ),
        Mistake(
            "too strict",
            "Your test refuses correct functions that add in another order: compare with allclose, not with ==.",
            (_cfg_test_by("exact"),),
        ),
    ),
    alternatives=(_cfg_line, _cfg_numbers),
    hides=("guidance.cfg",),
    hints=(
        "Which result do you know without a formula at s = 0, and at s = 1? What must happen beyond, at s = 3 say? And "
        "to the tensors that you passed?",
        "Assert, with allclose: s = 0 gives eps_u; s = 1 gives eps_c; s = 3 gives 3 eps_c - 2 eps_u; afterwards eps_c "
        "and eps_u are what they were.",
    ),
)

EXERCISES = (INTERVAL, REMEDIES, APG, NEGATIVE, MY_CFG_TEST)
