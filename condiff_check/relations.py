"""How a wrong result relates to the right one: a factor, an offset, a transposition, a forgotten logarithm, ...

For mistakes that nobody foresaw. Each relation must hold on all draws, so that it is never a guess.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from .compare import close, sizes

Draw = tuple[Mapping[str, object], Tensor, Tensor]  # arguments, what the learner's function gave, what is right


def relation(draws: Sequence[Draw]) -> str | None:
    """A sentence that holds on every draw, or None."""
    draws = [(args, got.detach().double(), right.detach().double()) for args, got, right in draws]
    if any(got.shape != right.shape for _, got, right in draws):
        return _shapes(draws)
    for find in (_factor, _offset, _argument, _pointwise, _order, _part):
        sentence = find(draws)
        if sentence:
            return sentence
    return None


def _all(draws: Sequence[Draw], holds: Callable[[Mapping, Tensor, Tensor], bool]) -> bool:
    return all(holds(*draw) for draw in draws)


def _shapes(draws: Sequence[Draw]) -> str | None:
    """The right result summed or averaged over axes, or transposed."""
    for name, change in _reductions(draws[0][2].ndim):
        if _all(
            draws,
            lambda _, got, right, change=change: close(change(got, right), right) or close(got, change(right, right)),
        ):
            return f"your result is the right one {name}"
    return None


def _reductions(axes: int) -> Iterator[tuple[str, Callable[[Tensor, Tensor], Tensor]]]:
    for axis in range(axes):
        yield f"summed over axis {axis}", lambda x, _, axis=axis: x.sum(axis) if x.ndim > axis else x
        yield f"averaged over axis {axis}", lambda x, _, axis=axis: x.mean(axis) if x.ndim > axis else x
    yield "summed over all axes", lambda x, _: x.sum()
    yield "averaged over all axes", lambda x, _: x.mean()
    if axes >= 2:
        yield "with its axes exchanged", lambda x, _: x.mT if x.ndim >= 2 else x
    yield "with other axes", lambda x, right: x.reshape(right.shape) if x.numel() == right.numel() else x


def _factor(draws: Sequence[Draw]) -> str | None:
    """got = c right, with one c per draw that has a name."""
    factors = []
    for _, got, right in draws:
        scale = float((got * right).sum() / (right * right).sum().clamp(min=1e-300))
        if not close(got, scale * right, rtol=1e-5, atol=1e-9) or scale == 0:
            return "your result is zero everywhere" if all(not g.any() for _, g, _ in draws) else None
        factors.append(scale)
    if all(math.isclose(f, -1, rel_tol=1e-6) for f in factors):
        return "your result is the right one with the opposite sign"
    named = dict(_numbers())
    for name, value in named.items():
        if all(math.isclose(f, value, rel_tol=1e-5) for f in factors):
            return f"your result is {name} times the right one"
    for name in sizes(draws[0][0]):
        lengths = [sizes(args).get(name, 0) for args, _, _ in draws]
        for sign, word in ((1, ""), (-1, ", and of the opposite sign")):
            if all(math.isclose(f * n, sign, rel_tol=1e-5) for f, n in zip(factors, lengths, strict=True)):
                return f"your result is {lengths[0]} times too small, which is {name}{word}"
            if all(n and math.isclose(f, sign * n, rel_tol=1e-5) for f, n in zip(factors, lengths, strict=True)):
                return f"your result is {lengths[0]} times too large, which is {name}{word}"
    if draws[0][2].numel() == 1:
        return None  # a single number is always some multiple of another
    if all(math.isclose(f, 1, rel_tol=1e-4) for f in factors):
        return None  # right but for its last digits: a factor of 1 tells nobody anything
    if max(factors) - min(factors) < 1e-6 * abs(factors[0]):
        return f"your result is {factors[0]:.4g} times the right one, always"
    return f"your result is the right one times a number that depends on the inputs ({factors[0]:.4g} here)"


def _numbers() -> Iterator[tuple[str, float]]:
    for name, value in (("2", 2), ("1/2", 0.5), ("sqrt(2)", 2**0.5)):
        yield name, value
        yield f"-{name}", -value
    yield "log 2 (bits taken for nats)", math.log(2)
    yield "1/log 2 (nats taken for bits)", 1 / math.log(2)
    yield "2 pi", 2 * math.pi


def _offset(draws: Sequence[Draw]) -> str | None:
    """got = right + c, with one c per draw."""
    offsets = []
    for _, got, right in draws:
        shift = got - right
        if shift.numel() < 2 or not torch.allclose(shift, shift.mean().expand_as(shift), rtol=1e-5, atol=1e-7):
            return None
        offsets.append(float(shift.mean()))
    if max(offsets) - min(offsets) < 1e-5:
        return f"your result is off by the same number everywhere: {offsets[0]:+.6g}{_known(offsets[0])}"
    return f"within one call your result is off by one number ({offsets[0]:+.4g} here), which depends on the inputs"


def _known(value: float) -> str:
    """A name for an offset: multiples of log 2 pi and log 2 are what forgotten constants look like."""
    for name, unit in (("log(2 pi)", math.log(2 * math.pi)), ("log 2", math.log(2)), ("1", 1.0)):
        for n in (0.5, 1, 1.5, 2, 3):
            if math.isclose(abs(value), n * unit, rel_tol=1e-5):
                return f", which is {'-' if value < 0 else ''}{'' if n == 1 else f'{n:g} '}{name}"
    return ""


def _argument(draws: Sequence[Draw]) -> str | None:
    for name, value in draws[0][0].items():
        if isinstance(value, Tensor):
            if _all(draws, lambda args, got, _, name=name: close(got, args[name].double())):
                return f"your result is simply the argument {name}"
            if _all(
                draws,
                lambda args, got, right, name=name: (
                    got.shape == args[name].shape and close(got, right + args[name].double())
                ),
            ):
                return f"your result is the right one plus {name}"
            if _all(
                draws,
                lambda args, got, right, name=name: (
                    got.shape == args[name].shape and close(got, right - args[name].double())
                ),
            ):
                return f"your result is the right one minus {name}"
    return None


_CHANGES: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = (
    ("the exponential of the right one: is a logarithm missing?", torch.exp),
    ("the logarithm of the right one: one logarithm too many?", torch.log),
    ("the square of the right one: is a square root missing?", torch.square),
    ("the square root of the right one: one square root too many?", torch.sqrt),
    ("one over the right one: multiplied where it should be divided?", torch.reciprocal),
    ("one minus the right one", lambda x: 1 - x),
    ("the absolute value of the right one", torch.abs),
    ("the right one rounded to integers", torch.round),
    ("the right one cut to [-1, 1]", lambda x: x.clamp(-1, 1)),
    ("the right one cut to [0, 1]", lambda x: x.clamp(0, 1)),
    ("the right one without its mean", lambda x: x - x.mean()),
)


def _pointwise(draws: Sequence[Draw]) -> str | None:
    for name, change in _CHANGES:
        if _all(draws, lambda _, got, right, change=change: close(got, change(right), rtol=1e-5)):
            return f"your result is {name}"
    return None


def _order(draws: Sequence[Draw]) -> str | None:
    for axis in range(draws[0][2].ndim):
        length = draws[0][2].shape[axis]
        if length > 1 and _all(draws, lambda _, got, right, axis=axis: close(got, right.flip(axis))):
            return f"your result is the right one in reverse order along axis {axis}"
        for shift, word in ((1, "late"), (-1, "early")):
            if length > 2 and _all(draws, lambda _, got, right, a=axis, s=shift: close(got, right.roll(s, a))):
                return f"your result is the right one, one place too {word} along axis {axis}"
        half = length // 2
        if length == 2 * half and _all(draws, lambda _, got, right, a=axis, s=half: close(got, right.roll(s, a))):
            return f"the two halves of axis {axis} are exchanged"
    if draws[0][2].ndim >= 2 and _all(
        draws, lambda _, got, right: got.shape[-1] == got.shape[-2] and close(got, right.mT)
    ):
        return "your result is the right one transposed"
    return None


def _part(draws: Sequence[Draw]) -> str | None:
    """Right for some indices of an axis and wrong for others, the same on all draws."""
    for axis in range(draws[0][2].ndim):
        wrong = []
        for _, got, right in draws:
            off = ~torch.isclose(got, right, rtol=1e-6, atol=1e-8)
            wrong.append(off.movedim(axis, 0).flatten(1).any(1) if off.ndim > 1 else off)
        if len({tuple(w.shape) for w in wrong}) == 1 and all(torch.equal(w, wrong[0]) for w in wrong):
            bad = wrong[0].nonzero().flatten().tolist()
            if 0 < len(bad) < len(wrong[0]):
                verb = "is" if len(bad) == 1 else "are"
                rest = len(wrong[0]) - len(bad)
                return f"along axis {axis} only {_these(bad)} {verb} wrong; the other {rest} are right"
    return None


def _these(indices: list[int]) -> str:
    if len(indices) == 1:
        return f"index {indices[0]}"
    return f"indices {', '.join(map(str, indices[:6]))}{', ...' if len(indices) > 6 else ''}"
