"""Exercises of lesson 02: what a class-conditional diffusion model needs, from the embedding of t to bits of class."""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from condiff_ref.mixture import archipelago
from condiff_ref.schedules import discrete
from condiff_ref.shapes import pad

from .compare import close
from .draws import integer, pictures, randn
from .exercise import Answer, Exercise, Fact, Mistake, Wrong, need
from .guard import Failed, OutOfTime
from .oracle import exact_eps
from .testing import test_exercise
from .xray import random_abar

# --- the reference answers, as the solutions show them ----------------------------------------------------------------


def time_embedding(t: Tensor, d: int) -> Tensor:
    """Sines, then cosines, of 1000 t at d / 2 frequencies: t (B,) in [0, 1] -> (B, d).

    Frequency i is 10000^(-i / (d / 2)), for i = 0 .. d / 2 - 1. Raises ValueError for an odd d.
    """
    if d % 2:
        raise ValueError(f"sines and cosines come in pairs: d must be even, got {d}")
    i = torch.arange(d // 2, dtype=t.dtype, device=t.device)
    angles = 1000 * t[:, None] * 10_000 ** (-i / (d // 2))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def film(h: Tensor, e: Tensor) -> Tensor:
    """Scale each channel of h by 1 + scale and shift it; e holds the scales, then the shifts.

    h (B, C, H, W), e (B, 2C) -> (B, C, H, W).
    """
    scale, shift = e[:, :, None, None].chunk(2, dim=1)
    return h * (1 + scale) + shift


def drop_labels(y: Tensor, p: float, null: int, gen: Generator) -> Tensor:
    """Replace each label by `null` with probability p, each on its own: integer y (B,) -> (B,).

    gen lives on the CPU: draw there, then go where y is.
    """
    dropped = (torch.rand(y.shape, generator=gen) < p).to(y.device)
    return torch.where(dropped, null, y)


def train_step(
    model: nn.Module, opt: torch.optim.Optimizer, x0: Tensor, y: Tensor, p: float, abar: Tensor, gen: Generator
) -> float:
    """One step of the optimiser on the class-conditional loss mean |model(x_t, t, y) - eps|^2; returns this loss.

    x0 (B, ...), integer y (B,), abar (T + 1,), so T is len(abar) - 1. abar may be float64 where x0 is float32: the
    model sees the dtype of x0. Each example has its own t, uniform over 1 .. T, its own standard normal
    eps, and its label becomes model.null with probability p. All is drawn with gen, on the CPU, and then goes where x0
    is.
    """
    abar = abar.to(x0)
    t = torch.randint(1, len(abar), (len(x0),), generator=gen).to(x0.device)
    eps = torch.randn(x0.shape, generator=gen, dtype=x0.dtype).to(x0.device)
    xt = pad(abar[t].sqrt(), x0) * x0 + pad((1 - abar[t]).sqrt(), x0) * eps
    dropped = (torch.rand(y.shape, generator=gen) < p).to(y.device)
    y = torch.where(dropped, model.null, y)
    loss = F.mse_loss(model(xt, t, y), eps)
    opt.zero_grad()
    loss.backward()
    opt.step()
    return loss.item()


class EMA:
    """`model` is a copy of a model whose parameters are running means of the model's, for sampling only.

    It is in eval mode and needs no gradients.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Each parameter becomes decay * mean + (1 - decay) * value; buffers are copied."""
        for mean, value in zip(self.model.parameters(), model.parameters(), strict=True):
            mean.copy_(self.decay * mean + (1 - self.decay) * value)
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)


@torch.no_grad()
def sample(model: nn.Module, y: Tensor, steps: int, shape: tuple[int, ...], abar: Tensor, gen: Generator) -> Tensor:
    """Images of the classes y (B,): deterministic DDIM in `steps` steps from noise drawn with gen -> (B, *shape).

    The times are torch.linspace(T, 0, steps + 1), rounded, with T = len(abar) - 1; model(x, t, y) predicts eps, with
    integer t (B,) as in training. The model samples in eval mode and gets its own mode back. gen lives on the CPU, the
    result where y is.
    """
    times = torch.linspace(len(abar) - 1, 0, steps + 1).round().long().tolist()
    x = torch.randn(len(y), *shape, generator=gen).to(y.device)
    training = model.training
    model.eval()
    for t, s in zip(times[:-1], times[1:], strict=True):  # noqa: RUF007
        eps = model(x, torch.full_like(y, t), y)
        x0 = (x - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()
        x = abar[s].sqrt() * x0 + (1 - abar[s]).sqrt() * eps
    model.train(training)
    return x


@torch.no_grad()
def class_accuracy(judge: nn.Module, images: Tensor, y: Tensor) -> tuple[float, float, float]:
    """The share of images (N, 1, h, w) that the judge gives their class y (N,), with its 95 % Wilson interval.

    judge(images) are logits (N, k); it judges in eval mode and gets its own mode back. Returns (acc, lo, hi).
    """
    training = judge.training
    judge.eval()
    acc = (judge(images).argmax(dim=1) == y).double().mean().item()
    judge.train(training)
    n, z = len(y), 1.959964
    centre = (acc + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(acc * (1 - acc) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return acc, centre - half, centre + half


def conditioning_bits(eps_c: Tensor, eps_u: Tensor, logsnr: Tensor) -> float:
    """1/2 times the integral of E|eps_c - eps_u|^2 over log-SNR, in bits: what the class tells about the image.

    eps_c, eps_u (M, B, ...) are predictions with and without the class at M noise levels logsnr (M,), in any order.
    """
    gap = ((eps_c - eps_u) ** 2).flatten(2).sum(dim=2).mean(dim=1)
    order = logsnr.argsort()
    nats = torch.trapezoid(gap[order], logsnr[order]) / 2
    return nats.item() / math.log(2)


def my_drop_test(drop_labels: Callable) -> None:
    """Raise an AssertionError if drop_labels(y, p, null, gen) does not do what it should; else return None."""
    y = torch.arange(10).repeat(500)
    before = y.clone()
    out = drop_labels(y, 0.2, 10, torch.Generator().manual_seed(1))
    dropped = out == 10
    assert torch.equal(y, before), "it must not change y"
    assert out.dtype == y.dtype, "labels are integers"
    assert torch.equal(out[~dropped], before[~dropped]), "a label stays or becomes null"
    assert 0.15 < dropped.double().mean() < 0.25, "about p of the labels are dropped"
    again = drop_labels(y, 0.2, 10, torch.Generator().manual_seed(2))
    assert not torch.equal(out, again), "other labels are dropped each time"


# --- what several exercises share -------------------------------------------------------------------------------------


def _gen(g: Generator) -> Generator:
    return Generator().manual_seed(integer(g, 0, 10**6))


def _nearest(value: float, **named: float) -> str:
    """Which of these numbers a measured one is, but for chance."""
    name = min(named, key=lambda name: abs(named[name] - value))
    return name if abs(named[name] - value) < 0.06 else "other"


def _few(values: Tensor, most: int = 5) -> str:
    kinds = values.unique().tolist()
    return ", ".join(f"{v:g}" for v in kinds[:most]) + (", ..." if len(kinds) > most else "")


@dataclass(frozen=True)
class Asked:
    """One call of a model: its arguments, and the state it was in."""

    xt: Tensor
    t: Tensor
    y: Tensor
    training: bool
    graph: bool


class Recorder(nn.Module):
    """A noise-predicting network that records in `asked` what it was asked; subclasses say what it answers."""

    def __init__(self):
        super().__init__()
        self.asked: list[Asked] = []

    def forward(self, xt: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if not isinstance(t, Tensor) or t.shape != (len(xt),):
            given = f"of shape {tuple(t.shape)}" if isinstance(t, Tensor) else f"as {type(t).__name__}"
            raise TypeError(f"the model was given t {given}: it needs a tensor ({len(xt)},), one t per example")
        kept = [torch.as_tensor(v).detach().clone() for v in (xt, t, y)]
        self.asked.append(Asked(*kept, training=self.training, graph=torch.is_grad_enabled()))
        return self.answer(xt, t, y)


# --- 02.1 time_embedding ----------------------------------------------------------------------------------------------


def _embedding_inputs(g: Generator) -> dict:
    t = 0.003 * torch.rand(5, generator=g, dtype=torch.float64)  # small: float32 rounds 1000 t and so moves the sines
    return {"time_embedding": dict(t=t, d=2 * integer(g, 5, 16))}


def _embedding_zero(answer: Answer, g: Generator) -> None:
    d = 2 * integer(g, 5, 16)
    got = answer(torch.zeros(3, dtype=torch.float64), d)[0]
    due = torch.cat([torch.zeros(d // 2), torch.ones(d // 2)]).double()
    need(got, due, "at t = 0 the first half, the sines, is 0 and the second half, the cosines, is 1")


def _embedding_norm(answer: Answer, g: Generator) -> None:
    d, t = 2 * integer(g, 5, 16), torch.rand(6, generator=g, dtype=torch.float64)
    norms = answer(t, d).double().norm(dim=1)
    if not close(norms, torch.full_like(norms, math.sqrt(d / 2)), rtol=1e-5):
        raise Wrong(
            f"d = {d}: a row has norm {float(norms[0]):.4g}; sin^2 + cos^2 = 1 in each of d/2 pairs gives sqrt(d/2)",
            expected=f"{math.sqrt(d / 2):.4g}",
        )


def _embedding_apart(answer: Answer, g: Generator) -> None:
    d, (t, s) = 2 * integer(g, 8, 16), (0.05 + 0.9 * torch.rand(2, generator=g, dtype=torch.float64)).tolist()
    one, two, early, late = answer(torch.tensor([t, s, 0.1, 0.9], dtype=torch.float64), d)
    got = float(F.cosine_similarity(early, late, dim=0))
    if got > 0.9:
        raise Wrong(f"the embeddings of t = 0.1 and t = 0.9 have cosine {got:.2f}: a network can hardly tell time")
    due = math.fsum(math.cos(1000 * (t - s) * 10_000 ** (-2 * i / d)) for i in range(d // 2)) / (d / 2)
    got = float(F.cosine_similarity(one, two, dim=0))
    if abs(got - due) > 1e-3:
        raise Wrong(
            f"d = {d}: the embeddings of t = {t:.3f} and t = {s:.3f} have cosine {got:.4f}", expected=f"{due:.4f}"
        )


def _embedding_ladder(answer: Answer, g: Generator) -> None:
    """Near t = 0 the sine of 1000 t f is 1000 t f, which shows every frequency."""
    d = 2 * integer(g, 5, 16)
    seen = (answer(torch.tensor([1e-7, 0.0]).double(), d)[0, : d // 2].double() / 1e-4).tolist()
    for i, got in enumerate(seen):
        due = math.exp(-math.log(10_000) * i / (d // 2))
        if not math.isclose(got, due, rel_tol=1e-4):
            raise Wrong(
                f"d = {d}: near t = 0 the sine at place {i} is {got:.4g} times 1000 t; the {d // 2} frequencies fall "
                "from 1 by one constant factor from place to place, which would reach 1/10000 at place d/2",
                expected=f"{due:.4g}",
            )


def _embedding_odd(answer: Answer, g: Generator) -> None:
    d = 2 * integer(g, 3, 9) + 1
    try:
        got = answer(torch.rand(3, generator=g, dtype=torch.float64), d)
    except Failed as error:
        if isinstance(error.__cause__, ValueError):
            return
        raise Wrong(f"d = {d} raises {type(error.__cause__).__name__}; the docstring promises a ValueError") from None
    raise Wrong(f"d = {d} is odd: it gives a result of width {got.shape[-1]} instead of a ValueError")


def _embedding_by(
    ladder: Callable[[Tensor, int], Tensor] = lambda i, n: 10_000 ** (-i / n),
    scale: float = 1000,
    join: Callable[[Tensor, Tensor], Tensor] = lambda sin, cos: torch.cat([sin, cos], dim=1),
    odd: bool = True,
) -> Callable:
    def time_embedding(t: Tensor, d: int) -> Tensor:
        if d % 2 and odd:
            raise ValueError("d must be even")
        angles = scale * t[:, None] * ladder(torch.arange(d // 2, dtype=t.dtype), d // 2)
        return join(angles.sin(), angles.cos())

    return time_embedding


def _embedding_loop(t: Tensor, d: int) -> Tensor:
    if d % 2 == 1:
        raise ValueError("odd")
    columns = [torch.sin(t * (1000 / 10_000 ** (2 * i / d))) for i in range(d // 2)]
    columns += [torch.cos(t * (1000 / 10_000 ** (2 * i / d))) for i in range(d // 2)]
    return torch.stack(columns, dim=1)


def _embedding_complex(t: Tensor, d: int) -> Tensor:
    half, rest = divmod(d, 2)
    if rest:
        raise ValueError(d)
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half) / half)  # in float32, as libraries do
    turned = torch.exp(1j * torch.outer(1000 * t.double(), frequencies.double()))
    return torch.cat([turned.imag, turned.real], dim=-1).to(t.dtype)


TIME_EMBEDDING = Exercise(
    id="02.1",
    names=("time_embedding",),
    references=(time_embedding,),
    inputs=_embedding_inputs,
    batch=("t",),
    facts=(
        Fact("t = 0 gives sines of 0, then cosines of 1", _embedding_zero, "which half comes first?"),
        Fact("each row has norm sqrt(d / 2)", _embedding_norm, "sines and cosines of the same angles"),
        Fact(
            "the frequencies fall from 1, all by one factor", _embedding_ladder, "a power of 10000, not a straight line"
        ),
        Fact(
            "near and far times look as different as they should", _embedding_apart, "t is in [0, 1]: what scales it?"
        ),
        Fact("refuses an odd d", _embedding_odd, "pairs need an even width: raise ValueError"),
    ),
    mistakes=(
        Mistake(
            "t not scaled",
            "t in [0, 1] goes in without the factor 1000: the embeddings of t = 0.1 and 0.9 have cosine 0.98 "
            "at width 64 (0.15 with it), and the network can hardly tell time.",
            (_embedding_by(scale=1),),
        ),
        Mistake(
            "sign of the exponent",
            "The frequencies rise from 1 towards 10000 instead of falling: the exponent has the wrong sign, and nearly "
            "all sines turn too fast to be of use.",
            (_embedding_by(lambda i, n: 10_000 ** (i / n)),),
        ),
        Mistake(
            "integer division",
            "All frequencies are 1, as i // (d / 2) is 0 for each i: the row holds one sine and one cosine, again and "
            "again.",
            (_embedding_by(lambda i, n: 10_000 ** -(i // n)),),
        ),
        Mistake(
            "odd d accepted",
            "An odd d passes silently and comes out one narrower than asked for; somebody will meet this later as a "
            "shape error far away.",
            (_embedding_by(odd=False),),
        ),
        Mistake(
            "linear frequencies",
            "Your frequencies fall in equal steps, so nearly all of them are fast. They should fall by equal factors: "
            "equally spaced logarithms.",
            (_embedding_by(lambda i, n: torch.linspace(1, 1e-4, n, dtype=i.dtype)),),
        ),
        Mistake(
            "linear frequencies without the end",
            "Your frequencies fall by the equal steps 1 - i / (d/2). They should fall by equal factors.",
            (_embedding_by(lambda i, n: 1 - i / n),),
        ),
        Mistake(
            "last frequency 1/10000",
            "Your last frequency is exactly 1/10000, as you divide i by d/2 - 1. Here i is divided by d/2 (with the "
            "other "
            "habit d = 2 divides by zero).",
            (_embedding_by(lambda i, n: 10_000 ** (-i / (n - 1))),),
        ),
        Mistake(
            "i / d",
            "Your frequencies stop near 1/100: i runs to d/2, so it is d/2 that it must be compared with.",
            (_embedding_by(lambda i, n: 10_000 ** (-i / (2 * n))),),
        ),
        Mistake(
            "cosines first",
            "The halves are exchanged: cosines come first. A network would not mind, weights trained the other way "
            "would.",
            (_embedding_by(join=lambda sin, cos: torch.cat([cos, sin], dim=1)),),
        ),
        Mistake(
            "interleaved",
            "Sines and cosines alternate from place to place; here all sines come first, then all cosines.",
            (_embedding_by(join=lambda sin, cos: torch.stack([sin, cos], dim=2).flatten(1)),),
        ),
        Mistake(
            "2 pi",
            "You multiply by 2 pi as well: the angle is 1000 t times the frequency, in radians.",
            (_embedding_by(scale=2000 * math.pi),),
        ),
    ),
    alternatives=((_embedding_loop,), (_embedding_complex,)),
    hints=(
        "Make the d/2 frequencies first, from torch.arange; then all angles at once, (B, 1) times (d/2,).",
        "cat([sin(angles), cos(angles)], dim=1) with angles = 1000 t 10000^(-i / (d/2)), after a check of d.",
    ),
    hides=("layers.time_embedding",),
    probe=lambda answer, g: answer(torch.tensor([0.002, 0.0005]).double(), 7),
)

# --- 02.2 film --------------------------------------------------------------------------------------------------------


def _film_inputs(g: Generator) -> dict:
    (h,) = pictures(g, 1)
    return {"film": dict(h=h, e=randn(g, len(h), 2 * h.shape[1]))}


def _film_rest(answer: Answer, g: Generator) -> None:
    (h,) = pictures(g, 1)
    need(answer(h, torch.zeros(len(h), 2 * h.shape[1]).double()), h, "e = 0 must leave h unchanged")


def _film_shift(answer: Answer, g: Generator) -> None:
    (h,) = pictures(g, 1)
    e = randn(g, len(h), 2 * h.shape[1])
    got = answer(torch.zeros_like(h), e)
    flat = got.flatten(2)
    if not close(flat, flat[:, :, :1].expand_as(flat)):
        raise Wrong("for h = 0 the pixels of a channel differ: a channel has one shift, whatever the pixel")
    need(got[:, :, 0, 0], e[:, h.shape[1] :], "h = 0 must give the shift, which is the second half of e")


def _film_scale(answer: Answer, g: Generator) -> None:
    """How the result moves with h does not depend on the shift, and each channel has its own slope."""
    one, two = pictures(g, 2)
    e = randn(g, len(one), 2 * one.shape[1])
    slope = (answer(one, e) - answer(two, e)) / (one - two)
    for b in range(len(one)):
        for c in range(one.shape[1]):
            if (slope[b, c] - slope[b, c, 0, 0]).abs().max() > 1e-6:
                raise Wrong("the factor on h differs between the pixels of one channel, or depends on h itself")
            if abs(float(slope[b, c, 0, 0]) - 1 - float(e[b, c])) > 1e-6:
                raise Wrong(
                    f"example {b}, channel {c}: h is multiplied by {float(slope[b, c, 0, 0]):.5g}, its scale is "
                    f"{float(e[b, c]):.5g}",
                    expected="1 + scale",
                )


def _film_gradient(answer: Answer, g: Generator) -> None:
    (h,) = pictures(g, 1)
    e = randn(g, len(h), 2 * h.shape[1]).requires_grad_()
    out = answer(h.clone(), e)
    if not out.requires_grad:
        raise Wrong("no gradient reaches e: the embedding could never be trained")
    (got,) = torch.autograd.grad(out.sum(), e)
    pixels = h.shape[2] * h.shape[3]
    due = torch.cat([h.sum(dim=(2, 3)), torch.full((len(h), h.shape[1]), pixels).double()], dim=1)
    need(got, due, "the gradient of the sum of all outputs is sum(h) for a scale and the number of pixels for a shift")


def _film_by(
    halves: Callable[[Tensor], tuple[Tensor, Tensor]] = lambda e: e.chunk(2, dim=1),
    apply: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda h, scale, shift: h * (1 + scale) + shift,
    axes: bool = True,
) -> Callable:
    def film(h: Tensor, e: Tensor) -> Tensor:
        scale, shift = halves(e)
        return apply(h, scale[:, :, None, None], shift[:, :, None, None]) if axes else apply(h, scale, shift)

    return film


def _film_in_place(h: Tensor, e: Tensor) -> Tensor:
    scale, shift = e[:, :, None, None].chunk(2, dim=1)
    h *= 1 + scale
    h += shift
    return h


def _film_norm(h: Tensor) -> Tensor:
    return F.group_norm(h, 1)


def _film_einsum(h: Tensor, e: Tensor) -> Tensor:
    c = h.shape[1]
    extended = torch.stack([h, torch.ones_like(h)])
    factors = torch.stack([1 + e[:, :c], e[:, c:]])
    return torch.einsum("kbchw,kbc->bchw", extended, factors)


def _film_last(h: Tensor, e: Tensor) -> Tensor:
    scale, shift = torch.tensor_split(e.view(len(e), 1, 1, -1), 2, dim=-1)
    last = h.permute(0, 2, 3, 1)
    return (last + last * scale + shift).permute(0, 3, 1, 2)


def _film_loop(h: Tensor, e: Tensor) -> Tensor:
    c = h.shape[1]
    rows = [[x[j] + x[j] * row[j] + row[c + j] for j in range(c)] for x, row in zip(h, e, strict=True)]
    return torch.stack([torch.stack(row) for row in rows])


def _film_see(answer: Answer, g: Generator) -> object:
    """Where batch and height, channels and width have one length, a missing axis goes unnoticed."""
    h, e = randn(g, 3, 4, 3, 4), randn(g, 3, 8)
    leaf = e.clone().requires_grad_()
    return [answer(h.clone(), e), answer(h.clone(), leaf).requires_grad]


FILM = Exercise(
    id="02.2",
    names=("film",),
    references=(film,),
    inputs=_film_inputs,
    batch=("h", "e"),
    graph=True,
    facts=(
        Fact("e = 0 leaves h unchanged", _film_rest, "the network should be able to leave a channel as it is"),
        Fact("h = 0 gives the shift, the second half of e", _film_shift, "e holds all scales, then all shifts"),
        Fact(
            "each channel of each example has its own factor",
            _film_scale,
            "(B, C) times (B, C, H, W): which axes meet?",
        ),
        Fact("gradients reach e", _film_gradient, "e comes from a layer that is trained"),
    ),
    mistakes=(
        Mistake(
            "axes missing",
            "Scale and shift (B, C) meet the last two axes of h, its pixels, not batch and channels. Where B = H and "
            "C = W this even runs, and is wrong.",
            (_film_by(axes=False),),
        ),
        Mistake(
            "scale without 1 +",
            "h is multiplied by the scale itself, so that e = 0 wipes out the channel. A fresh layer gives e near 0: "
            "it "
            "should change nothing.",
            (_film_by(apply=lambda h, scale, shift: h * scale + shift),),
        ),
        Mistake(
            "halves exchanged",
            "The halves of e are exchanged: its first C entries are the scales, the last C the shifts.",
            (_film_by(lambda e: e.chunk(2, dim=1)[::-1]),),
        ),
        Mistake(
            "interleaved",
            "You take scales and shifts from every second entry of e; they are two blocks of C entries.",
            (_film_by(lambda e: (e[:, 0::2], e[:, 1::2])),),
        ),
        Mistake(
            "along the batch",
            "e was cut across the batch axis: reshaped to (2, B, C), its first half holds the rows of the first "
            "examples, so that examples get one another's scales.",
            (_film_by(lambda e: tuple(e.reshape(2, len(e), -1))),),
        ),
        Mistake(
            "normalises h first",
            "h is normalised inside. The block does that before it calls film, and where it does not, film must not "
            "either.",
            (_film_by(apply=lambda h, scale, shift: _film_norm(h) * (1 + scale) + shift),),
        ),
        Mistake(
            "before the norm",
            "You normalise after scaling and shifting, which takes out again whatever the channels of a group have in "
            "common: part of the condition is lost.",
            (_film_by(apply=lambda h, scale, shift: _film_norm(h * (1 + scale) + shift)),),
        ),
        Mistake(
            "shift before scale",
            "The shift is added before the scaling and so is scaled itself.",
            (_film_by(apply=lambda h, scale, shift: (h + shift) * (1 + scale)),),
        ),
        Mistake(
            "shift subtracted",
            "The shift is subtracted. A network would learn it with the other sign, weights from elsewhere would not "
            "fit.",
            (_film_by(apply=lambda h, scale, shift: h * (1 + scale) - shift),),
        ),
        Mistake("in place", "You changed h in place: the skip connection still needs it.", (_film_in_place,)),
        Mistake(
            "detached",
            "The values are right, but e is cut off from the graph: no gradient would reach the embedding.",
            (_film_by(lambda e: e.detach().chunk(2, dim=1)),),
        ),
    ),
    alternatives=((_film_einsum,), (_film_last,), (_film_loop,)),
    hints=(
        "Cut e into two halves along its second axis; then give each half the two axes that h has and it has not.",
        "h * (1 + scale[:, :, None, None]) + shift[:, :, None, None], scale the first half of e.",
    ),
    probe=_film_see,
    hides=("dit_blocks.modulate",),
)

# --- 02.3 drop_labels -------------------------------------------------------------------------------------------------


def _digits(g: Generator, n: int) -> Tensor:
    return torch.randint(0, 10, (n,), generator=g)


def _drop_inputs(g: Generator) -> dict:
    return {"drop_labels": dict(y=_digits(g, 12), p=0.5, null=integer(g, 10, 13), gen=_gen(g))}


def _drop_ends(answer: Answer, g: Generator) -> None:
    y, null = _digits(g, 60), integer(g, 10, 13)
    kept = answer(y.clone(), 0.0, null, _gen(g))
    if not torch.equal(kept, y):
        raise Wrong(f"at p = 0 every label must stay, and {int((kept != y).sum())} of 60 changed")
    gone = answer(y.clone(), 1.0, null, _gen(g))
    if not (gone == null).all():
        raise Wrong(f"at p = 1 every label must become null = {null}; yours became {_few(gone)}")


def _drop_null(answer: Answer, g: Generator) -> None:
    y, null = _digits(g, 500), integer(g, 10, 13)
    out = answer(y.clone(), 0.3, null, _gen(g))
    odd = ((out != y) & (out != null)).nonzero()
    if len(odd):
        i = int(odd[0])
        raise Wrong(
            f"{len(odd)} of 500 labels became something that is neither themselves nor null = {null}: "
            f"{int(y[i])} became {out[i].item():g}, which a network reads as another class"
        )


def _drop_share(answer: Answer, g: Generator) -> None:
    n, p, null = 20_000, (0.1, 0.2, 0.3)[integer(g, 0, 2)], integer(g, 10, 13)
    got = float((answer(_digits(g, n), p, null, _gen(g)) == null).double().mean())
    if abs(got - p) > 7 * math.sqrt(p * (1 - p) / n):
        raise Wrong(f"with p = {p}, the share {got:.3f} of {n} labels became null")


def _drop_coins(answer: Answer, g: Generator) -> None:
    """Over 300 batches, each place is dropped p of the time, and the number per batch varies as a binomial does."""
    n, p, null, batches, gen = 40, 0.2, 10, 300, _gen(g)
    y = _digits(g, n)
    dropped = torch.stack([answer(y.clone(), p, null, gen) == null for _ in range(batches)])
    places, counts = dropped.sum(0), dropped.sum(1).double()
    if not dropped.any() or dropped.all():
        return  # for the share to say
    if ((places == 0) | (places == batches)).all():
        raise Wrong(
            f"in {batches} batches it is always the same places that are dropped: each batch needs new random numbers "
            "from gen"
        )
    share = float(dropped.double().mean())
    ratio = float(counts.var()) / (n * share * (1 - share))
    if not 0.45 < ratio < 1.7:
        why = "labels share their coins" if ratio > 1 else "the number is fixed, not left to chance"
        raise Wrong(
            f"of {n} labels {counts.min():.0f} to {counts.max():.0f} are dropped, with p = {p}, a standard deviation "
            "of "
            f"{float(counts.std()):.1f}; coins of their own would give {math.sqrt(n * share * (1 - share)):.1f}: {why}"
        )
    odd = ((places - share * batches).abs() > 7 * math.sqrt(batches * share * (1 - share))).nonzero()
    if len(odd):
        i = int(odd[0])
        raise Wrong(
            f"the label at place {i} was dropped in {int(places[i])} of {batches} batches, labels on average in "
            f"{share * batches:.0f}: all places should be alike"
        )


def _drop_by(
    mask: Callable[[Tensor, float, Generator], Tensor],
    put: Callable[[Tensor, Tensor, int], Tensor] = lambda y, m, null: torch.where(m, null, y),
) -> Callable:
    def drop_labels(y: Tensor, p: float, null: int, gen: Generator) -> Tensor:
        return put(y, mask(y, p, gen), null)

    return drop_labels


def _coins(y: Tensor, p: float, gen: Generator) -> Tensor:
    return torch.rand(y.shape, generator=gen) < p


def _drop_in_place(y: Tensor, p: float, null: int, gen: Generator) -> Tensor:
    y[_coins(y, p, gen)] = null
    return y


def _exactly(y: Tensor, p: float, gen: Generator) -> Tensor:
    return torch.randperm(len(y), generator=gen) < round(p * len(y))


def _drop_bernoulli(y: Tensor, p: float, null: int, gen: Generator) -> Tensor:
    out = y.clone()
    out[torch.bernoulli(torch.full(y.shape, p), generator=gen).bool()] = null
    return out


def _drop_one_by_one(y: Tensor, p: float, null: int, gen: Generator) -> Tensor:
    kept = [torch.rand((), generator=gen).item() >= p for _ in y]
    return torch.tensor([label if keep else null for label, keep in zip(y.tolist(), kept, strict=True)], dtype=y.dtype)


def _drop_arithmetic(y: Tensor, p: float, null: int, gen: Generator) -> Tensor:
    gone = (1 - torch.rand(len(y), generator=gen, dtype=torch.float64) <= p).long()
    return y * (1 - gone) + null * gone


def _drop_see(answer: Answer, g: Generator) -> object:
    """Categories, the same for all answers with one mistake, in whatever order they draw."""
    y, p, null, n, gen = 1 + torch.arange(20) % 9, 0.2, 10, 250, _gen(g)
    rows = []
    changed = False
    for _ in range(n):
        given = y.clone()
        rows.append(answer(given, p, null, gen))
        changed |= not torch.equal(given, y)
    out = torch.stack(rows)
    off = out != y
    counts = off.sum(1)
    values = out[off].unique().tolist()
    alike = bool((off == off[0]).all())
    seed = integer(g, 0, 999)
    twins = []
    for noise in (1, 2):
        answer.reseed(noise)
        twins.append(answer(torch.ones(200).long(), 0.5, null, Generator().manual_seed(seed)))
    return dict(
        dtype=str(out.dtype),
        changed=changed,
        values=values if len(values) < 3 else "many",
        share="one coin"
        if off.any() and not off.all() and ((counts == 0) | (counts == 20)).all()
        else _nearest(float(off.double().mean()), none=0, p=p, rest=1 - p, all=1),
        exactly=bool((counts == counts[0]).all()),
        everywhere_alike=alike,
        at_the_start=bool((off.long().diff(dim=1) <= 0).all()),
        from_gen=torch.equal(*twins),
    )


DROP_LABELS = Exercise(
    by_probe=True,
    id="02.3",
    names=("drop_labels",),
    references=(drop_labels,),
    inputs=_drop_inputs,
    facts=(
        Fact("p = 0 keeps every label, p = 1 drops every label", _drop_ends, "a number in [0, 1) is below p ..."),
        Fact("a label stays or becomes null", _drop_null, "null has a row of its own in the embedding"),
        Fact("each label has its own coin, new each time", _drop_coins, "how many random numbers do B labels need?"),
        Fact("the share p is dropped", _drop_share, "which side of the comparison is dropped?"),
    ),
    mistakes=(
        Mistake(
            "one coin per batch",
            "You toss one coin for the whole batch: all labels are dropped or none. Each label needs its own.",
            (_drop_by(lambda y, p, gen: (torch.rand((), generator=gen) < p).expand(y.shape)),),
        ),
        Mistake(
            "inverted",
            "Labels are dropped with probability 1 - p: the comparison is the wrong way round.",
            (_drop_by(lambda y, p, gen: ~_coins(y, p, gen)),),
        ),
        Mistake(
            "0 for null",
            "Dropped labels become 0, as they do when labels are multiplied by a mask. 0 is the digit zero: the "
            "model "
            "would learn a blend of all digits under that name.",
            (_drop_by(_coins, lambda y, m, null: y * (~m).long()),),
        ),
        Mistake(
            "null - 1",
            "Dropped labels become null - 1, a real class: with digits 0 .. 9 null is 10, not 9.",
            (_drop_by(_coins, lambda y, m, null: torch.where(m, null - 1, y)),),
        ),
        Mistake(
            "times the wrong mask",
            "You multiply by the mask of what is dropped: the labels to drop stay, and all others become 0.",
            (_drop_by(_coins, lambda y, m, null: y * m.long()),),
        ),
        Mistake(
            "null added",
            "null is added to the dropped labels instead of taking their place.",
            (_drop_by(_coins, lambda y, m, null: y + null * m.long()),),
        ),
        Mistake(
            "in place",
            "The labels are overwritten in place: the next epoch finds them dropped already, and in the end there "
            "are "
            "none left.",
            (_drop_in_place,),
        ),
        Mistake(
            "float",
            "The labels come back as floating-point numbers: an embedding looks up integers.",
            (_drop_by(_coins, lambda y, m, null: torch.where(m, float(null), y.float())),),
        ),
        Mistake(
            "fixed places",
            "It is always the first p B labels that are dropped, not random ones.",
            (_drop_by(lambda y, p, gen: torch.arange(len(y)) < round(p * len(y))),),
        ),
        Mistake(
            "mask unused",
            "Nothing is ever dropped: the mask is drawn and then not used. (DALLE2-pytorch had this bug, issue 235.)",
            (_drop_by(_coins, lambda y, m, null: y.clone()),),
        ),
        Mistake(
            "always exactly p B",
            "Exactly p B labels of each batch are dropped. Each label should be dropped with probability p "
            "whatever "
            "its batch mates do; with small batches the difference shows.",
            (_drop_by(_exactly),),
        ),
        Mistake(
            "gen not used",
            "The random numbers do not come from gen, so that a run cannot be repeated.",
            (_drop_by(lambda y, p, gen: torch.rand(y.shape) < p),),
        ),
    ),
    alternatives=((_drop_bernoulli,), (_drop_one_by_one,), (_drop_arithmetic,)),
    hints=(
        "torch.rand takes a shape and generator=gen; what is the probability that such a number is below p?",
        "torch.where(torch.rand(y.shape, generator=gen) < p, null, y).",
    ),
    hides=("train.drop",),
    probe=_drop_see,
)

# --- 02.4 train_step --------------------------------------------------------------------------------------------------


class Spy(Recorder):
    """Predicts gain * x_t + table[y]: so small that the right loss and gradient are closed forms."""

    def __init__(self, g: Generator, null: int = 10):
        super().__init__()
        self.null = null
        self.gain = nn.Parameter(randn(g, 1).sum())
        self.table = nn.Parameter(randn(g, null + 1))

    def answer(self, xt: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.gain * xt + pad(self.table[y], xt)


@dataclass(frozen=True)
class Step:
    """One training step on a Spy: what it was asked, what came back, and its parameters before and after."""

    calls: int
    asked: Asked
    loss: object
    before: tuple[Tensor, Tensor]
    after: tuple[Tensor, Tensor]

    def eps(self, x0: Tensor, abar: Tensor) -> Tensor:
        """The noise that makes x_t of x0."""
        a = abar[self.asked.t]
        return (self.asked.xt - pad(a.sqrt(), x0) * x0) / pad((1 - a).sqrt(), x0)

    def out(self) -> Tensor:
        return self.before[0] * self.asked.xt + pad(self.before[1][self.asked.y], self.asked.xt)

    def gradient(self, x0: Tensor, abar: Tensor) -> Tensor:
        """Of the right loss, with respect to all parameters."""
        slope = 2 * (self.out() - self.eps(x0, abar)) / x0.numel()
        on_table = torch.zeros_like(self.before[1]).index_add(0, self.asked.y, slope.flatten(1).sum(1))
        return torch.cat([(slope * self.asked.xt).sum()[None], on_table])

    def move(self) -> Tensor:
        return torch.cat([(a - b).reshape(-1) for a, b in zip(self.after, self.before, strict=True)])


RATE = 0.1


def _run(
    answer: Answer, x0: Tensor, y: Tensor, p: float, abar: Tensor, gen: Generator, steps: int, model: Spy
) -> list[Step]:
    """Steps of plain gradient descent with the learner's train_step. Raises Wrong where the model is not asked."""
    opt = torch.optim.SGD(model.parameters(), lr=RATE)
    found = []
    for _ in range(steps):
        model.asked.clear()
        before = tuple(q.detach().clone() for q in (model.gain, model.table))
        loss = answer(model, opt, x0, y, p, abar, gen)
        if not model.asked:
            raise Wrong("the model was not called")
        after = tuple(q.detach().clone() for q in (model.gain, model.table))
        found.append(Step(len(model.asked), model.asked[-1], loss, before, after))
    return found


def _short_abar(T: int = 8) -> Tensor:
    return torch.linspace(1, 0.1, T + 1, dtype=torch.float64)


def _train_inputs(g: Generator) -> dict:
    model, (x0,) = Spy(g), pictures(g, 1)
    opt = torch.optim.SGD(model.parameters(), lr=RATE)
    return {
        "train_step": dict(model=model, opt=opt, x0=x0, y=_digits(g, len(x0)), p=0.5, abar=random_abar(g), gen=_gen(g))
    }


def _train_times(answer: Answer, g: Generator) -> None:
    T, b, n = 8, 32, 40
    steps = _run(answer, randn(g, b, 3), _digits(g, b), 0.2, _short_abar(T), _gen(g), n, Spy(g))
    t = steps[0].asked.t
    if steps[0].calls != 1:
        raise Wrong(f"the model was called {steps[0].calls} times in one step")
    if t.shape != (b,):
        raise Wrong(f"the model was given t of shape {tuple(t.shape)}; with {b} examples it is ({b},)")
    if t.is_floating_point():
        raise Wrong(f"t came as {t.dtype}: times are integers here, which index abar")
    seen = torch.stack([step.asked.t for step in steps])
    if (seen == seen[:, :1]).all():
        raise Wrong("all examples of a batch have the same t: each needs its own")
    if (seen == 0).any():
        raise Wrong("t = 0 was drawn: there x_t is clean, and there is no noise to predict")
    counts = torch.bincount(seen.flatten(), minlength=T + 1)[1:]
    if len(counts) > T:
        raise Wrong(f"t = {int(seen.max())} was drawn with T = {T}")
    spread = 7 * math.sqrt(b * n / T)
    if ((counts - b * n / T).abs() > spread).any():
        raise Wrong(
            f"in {b * n} draws t = 1 .. {T} came up {', '.join(map(str, counts.tolist()))} times: each should be as "
            "likely as any other, t = T included"
        )


def _train_noised(answer: Answer, g: Generator) -> None:
    """The share of x0 by moving it by 1 under the same random numbers; noise by its moments, given x0 = 0."""
    abar, y, gen, b = _short_abar(), _digits(g, 64), integer(g, 0, 10**6), 64
    zero, model = torch.zeros(b, 6, dtype=torch.float64), Spy(g)
    twin = deepcopy(model)
    steps = _run(answer, zero, y, 0.2, abar, Generator().manual_seed(gen), 20, model)
    (other,) = _run(answer, zero + 1, y, 0.2, abar, Generator().manual_seed(gen), 1, twin)
    first, moved = steps[0].asked, other.asked
    if first.xt.shape != zero.shape:
        raise Wrong(f"for x0 of shape {tuple(zero.shape)} the model was given x_t of shape {tuple(first.xt.shape)}")
    share = (moved.xt - first.xt) / pad(abar[first.t].sqrt(), zero)
    if not close(share, torch.ones_like(share), rtol=1e-4):
        raise Wrong(
            f"x0 + 1 moves x_t at t = {int(first.t[0])} by {float(share[0, 0]):.4g} sqrt(abar_t): x0 must enter as it "
            "comes, times sqrt(abar_t)"
        )
    noise = torch.stack([step.eps(zero, abar) for step in steps])
    count = noise.numel()
    mean, var = float(noise.mean()), float(noise.var())
    if abs(mean) > 7 / math.sqrt(count):
        raise Wrong(f"for x0 = 0 the mean of x_t is not 0 but {mean:.3g} sqrt(1 - abar_t)")
    if close(noise[:, 1:], noise[:, :1].expand_as(noise[:, 1:]), rtol=1e-4):
        raise Wrong("all examples of a batch share one noise: each needs its own")
    if close(noise[1], noise[0], rtol=1e-4):
        raise Wrong("the noise is the same at every step: draw it anew, with gen")
    if abs(var - 1) > 7 * math.sqrt(2 / count):
        raise Wrong(f"for x0 = 0 the variance of x_t is {var:.3f} (1 - abar_t)", expected="1 - abar_t")


def _train_labels(answer: Answer, g: Generator) -> None:
    abar, b, p, n = _short_abar(), 40, (0.1, 0.2)[integer(g, 0, 1)], 50
    y, x0, model = _digits(g, b), randn(g, b, 3), Spy(g)
    seen = torch.stack([step.asked.y for step in _run(answer, x0, y, p, abar, _gen(g), n, model)])
    null = seen == model.null
    if not (null | (seen == y)).all():
        strange = seen[~(null | (seen == y))][0].item()
        raise Wrong(f"a label became {strange}, which is neither the batch's nor model.null = {model.null}")
    share = float(null.double().mean())
    if not null.any():
        raise Wrong(f"with p = {p} the model never saw model.null: it cannot learn to predict without a label")
    if abs(share - p) > 7 * math.sqrt(p * (1 - p) / (b * n)):
        raise Wrong(f"with p = {p} the model saw model.null in {share:.3f} of {b * n} labels")
    if (null == null[:, :1]).all():
        raise Wrong("all labels of a batch are dropped or none: each needs its own coin")
    if (null == null[:1]).all():
        raise Wrong("the same labels are dropped at every step: draw anew, with gen")


def _train_loss(answer: Answer, g: Generator) -> None:
    abar, x0, y = random_abar(g), randn(g, 8, 3, 2), _digits(g, 8)
    for step in _run(answer, x0, y, 0.3, abar, _gen(g), 3, Spy(g)):
        due = float(((step.out() - step.eps(x0, abar)) ** 2).mean())
        got = float(torch.as_tensor(step.loss).detach())
        if not math.isclose(got, due, rel_tol=1e-4):
            raise Wrong(
                f"the loss returned is {got:.6g}, {got / due:.4g} times the mean squared error between what the model "
                "predicted and the noise in x_t",
                expected=f"{due:.6g}",
            )


def _train_moves(answer: Answer, g: Generator) -> None:
    abar, x0, y = random_abar(g), randn(g, 8, 3, 2), _digits(g, 8)
    steps = _run(answer, x0, y, 0.3, abar, _gen(g), 3, Spy(g))
    grads = [step.gradient(x0, abar) for step in steps]
    if all(not step.move().any() for step in steps):
        raise Wrong("the parameters did not move in three steps: opt.step() needs the gradients of this step's loss")
    for i, step in enumerate(steps):
        if close(step.move(), -RATE * grads[i], rtol=1e-4):
            continue
        if i and close(step.move(), -RATE * sum(grads[: i + 1]), rtol=1e-4):
            raise Wrong("the second step moves by the first step's gradient as well: gradients pile up")
        worth = float((step.move() @ grads[i]) / (grads[i] @ grads[i]) / -RATE)
        raise Wrong(f"step {i + 1} does not go down this step's gradient: along it, it goes {worth:.3g} times as far")


def _train_mode(answer: Answer, g: Generator) -> None:
    model = Spy(g).train()
    (step,) = _run(answer, randn(g, 8, 3), _digits(g, 8), 0.3, random_abar(g), _gen(g), 1, model)
    if not step.asked.training or not model.training:
        raise Wrong("the model came in train mode and was put into eval mode: dropout would never act")


def _train_single(answer: Answer, g: Generator) -> None:
    """Images are float32 and make_abar's table float64."""
    model, x0 = Spy(g).float(), randn(g, 8, 3, 2, 2).float()
    (step,) = _run(answer, x0, _digits(g, 8), 0.3, random_abar(g), _gen(g), 1, model)
    if step.asked.xt.dtype != torch.float32:
        raise Wrong(
            f"from float32 images and the float64 table of make_abar x_t became {step.asked.xt.dtype}: a network of "
            "float32 weights refuses it"
        )


def _steps_by(order: str) -> Callable:
    def learn(opt: torch.optim.Optimizer, loss: Tensor) -> float:
        for word in order.split():
            {"zero": opt.zero_grad, "back": loss.backward, "step": opt.step}[word]()
        return loss.item()

    return learn


def _with_item(opt: torch.optim.Optimizer, loss: Tensor) -> float:
    return _with_graph(opt, loss).item()


def _with_graph(opt: torch.optim.Optimizer, loss: Tensor) -> Tensor:
    opt.zero_grad()
    loss.backward()
    opt.step()
    return loss


def _train_by(
    learn: Callable = _with_item,
    time: Callable[[int, int, Generator], Tensor] = lambda n, T, gen: torch.randint(1, T + 1, (n,), generator=gen),
    noise: Callable[[Tensor, Generator], Tensor] = lambda x0, gen: torch.randn(x0.shape, generator=gen, dtype=x0.dtype),
    drop: Callable[..., Tensor] = lambda y, p, null, gen: drop_labels(y, p, null, gen),
    loss: Callable[..., Tensor] = lambda out, eps, x0: F.mse_loss(out, eps),
    see: Callable[[Tensor], Tensor] = lambda x0: x0,
    ready: Callable[[nn.Module], object] = lambda model: None,
    sigma: Callable[[Tensor], Tensor] = lambda a: (1 - a).sqrt(),
    axes: Callable[[Tensor, Tensor], Tensor] = pad,
    root: Callable[[Tensor], Tensor] = torch.sqrt,
) -> Callable:
    def train_step(model, opt, x0, y, p, abar, gen):
        abar = abar.to(x0.dtype)
        ready(model)
        t, eps, y = time(len(x0), len(abar) - 1, gen), noise(x0, gen), drop(y, p, model.null, gen)
        xt = axes(root(abar[t]), x0) * see(x0) + axes(sigma(abar[t]), x0) * eps
        return learn(opt, loss(model(xt, t, y), eps, x0))

    return train_step


def _train_one_by_one(model, opt, x0, y, p, abar, gen):
    opt.zero_grad(set_to_none=False)
    abar = abar.to(x0.dtype)
    labels = torch.tensor([model.null if torch.rand((), generator=gen) < p else int(label) for label in y])
    eps = torch.stack([torch.randn(x.shape, generator=gen, dtype=x.dtype) for x in x0])
    t = 1 + (torch.rand(len(x0), generator=gen) * (len(abar) - 1)).long()
    xt = torch.stack([abar[n] ** 0.5 * x + (1 - abar[n]) ** 0.5 * e for n, x, e in zip(t, x0, eps, strict=True)])
    total = (model(xt, t, labels) - eps).square().sum() / eps.numel()
    total.backward()
    opt.step()
    return float(total.detach())


def _train_zero_last(model, opt, x0, y, p, abar, gen):
    noise = torch.empty_like(x0).normal_(generator=gen)
    kept = torch.bernoulli(torch.full(y.shape, 1 - p), generator=gen).bool()
    angle = torch.acos(abar.sqrt()).to(x0)
    t = torch.randint(len(abar) - 1, y.shape, generator=gen) + 1
    xt = torch.einsum("b,b...->b...", angle[t].cos(), x0) + torch.einsum("b,b...->b...", angle[t].sin(), noise)
    model.train()
    loss = torch.mean((noise - model(xt, t, y.masked_fill(~kept, model.null))) ** 2)
    loss.backward()
    opt.step()
    opt.zero_grad()
    return loss.item()


def _train_see(answer: Answer, g: Generator) -> object:
    """Categories, the same for all answers with one mistake, in whatever order they draw."""
    T, b, p, seed = 8, 64, 0.2, integer(g, 0, 10**6)
    abar, x0, y, model = _short_abar(T), randn(g, b, 4), _digits(g, b), Spy(g)
    twins = [deepcopy(model) for _ in range(3)]
    steps = _run(answer, x0, y, p, abar, Generator().manual_seed(seed), 30, model)
    t, labels = (torch.stack([getattr(step.asked, name) for step in steps]) for name in ("t", "y"))
    null = labels == model.null
    seen = dict(
        calls=steps[0].calls,
        shape=list(t.shape),
        low=int(t.min()),
        high=int(t.max()),
        one_time=bool((t == t[:, :1]).all()),
        share="one coin"
        if null.any() and (null == null[:, :1]).all() and not null.all()
        else _nearest(float(null.double().mean()), none=0, p=p, rest=1 - p, all=1),
        labels=bool((null | (labels == y)).all()),
        training=[steps[0].asked.training, model.training],
        returned=isinstance(steps[0].loss, Tensor) and steps[0].loss.requires_grad,
    )

    def again(twin: Spy, shift: float, noise: int = 0) -> Step:
        answer.reseed(noise)
        return _run(answer, x0 + shift, y, p, abar, Generator().manual_seed(seed), 1, twin)[0]

    here, there, other = again(twins[0], 0), again(twins[1], 1), again(twins[2], 0, noise=1)
    signal = (there.asked.xt - here.asked.xt) / pad(abar[here.asked.t].sqrt(), x0)
    seen["signal"] = round(float(signal.mean()), 2) if signal.std() < 1e-4 else "varies"
    seen["from_gen"] = [close(getattr(here.asked, name), getattr(other.asked, name)) for name in ("t", "y")]
    seen["noise_from_gen"] = close(here.asked.xt, other.asked.xt) or not seen["from_gen"][0]
    offset = torch.stack([step.asked.xt - pad(abar[step.asked.t].sqrt(), x0) * x0 for step in steps])
    seen["offset"] = bool(offset.mean().abs() > 0.1)
    eps = torch.stack([step.eps(x0, abar) for step in steps])
    seen["one_noise"] = close(eps[0][1:], eps[0][:1].expand(b - 1, -1))
    ok = abs(float(eps.var()) - 1) < 0.08
    variance = torch.stack([step.eps(x0, abar) / pad((1 - abar[step.asked.t]).sqrt(), x0) for step in steps])
    seen["noise"] = "right" if ok else "variance" if abs(float(variance.var()) - 1) < 0.08 else "other"
    out, e, got = steps[0].out(), eps[0], float(torch.as_tensor(steps[0].loss).detach())
    losses = dict(mean=(out - e).square().mean(), sum=(out - e).square().sum(), x0=(out - x0).square().mean())
    losses |= dict(
        per_example=losses["sum"] / b, l1=(out - e).abs().mean(), xt=(out - steps[0].asked.xt).square().mean()
    )
    seen["loss"] = [name for name, value in losses.items() if math.isclose(got, float(value), rel_tol=1e-4)]
    grads, moves = [step.gradient(x0, abar) for step in steps[:2]], [step.move() / -RATE for step in steps[:2]]
    sums = dict(zero=0 * grads[0], first=grads[0], second=grads[1], both=grads[0] + grads[1], up=-grads[0])
    seen["moves"] = [[name for name, value in sums.items() if close(m, value, rtol=1e-4)] for m in moves]
    seen["left"] = not moves[0].any() and any(q.grad is not None and q.grad.any() for q in model.parameters())
    return seen


TRAIN_STEP = Exercise(
    by_probe=True,
    id="02.4",
    names=("train_step",),
    references=(train_step,),
    inputs=_train_inputs,
    changes=("model", "opt", "gen"),
    kind="training",
    points=2,
    facts=(
        Fact(
            "each example has its own t, uniform over 1 .. T",
            _train_times,
            "integers from 1 to T, as they index abar; randint leaves out its upper end",
        ),
        Fact("the model sees x0 noised to t", _train_noised, "x0 as it comes, standard normal noise of its shape"),
        Fact("a share p of the labels that the model sees is null", _train_labels, "what does the model look at?"),
        Fact("the loss is the mean squared error of the noise", _train_loss, "mean over batch and all entries"),
        Fact("each step goes down the gradient of its own loss", _train_moves, "three calls, in which order?"),
        Fact("the model trains in train mode", _train_mode, "eval() is for sampling"),
        Fact("works with float32 images and a float64 table", _train_single, "which dtype has float32 times float64?"),
    ),
    mistakes=(
        Mistake(
            "no zero_grad",
            "Gradients are never set to zero: each step moves by the sum of all gradients so far (on a repeated "
            "batch "
            "the second step is twice as long).",
            (_train_by(_steps_by("back step")),),
        ),
        Mistake(
            "step before backward",
            "The parameters never move, though gradients are there: opt.step() comes before loss.backward(), or is "
            "missing.",
            (_train_by(_steps_by("zero step back")),),
        ),
        Mistake(
            "step before backward, gradients kept",
            "opt.step() comes before loss.backward(): the first step does nothing, and each later one uses "
            "gradients "
            "of the steps before it.",
            (_train_by(_steps_by("step back")),),
        ),
        Mistake(
            "zero_grad after backward",
            "The gradients are set to zero between backward() and step(): the model never learns anything.",
            (_train_by(_steps_by("back zero step")),),
        ),
        Mistake(
            "t from 0",
            "t runs over 0 .. T - 1. At t = 0 there is no noise to predict, and at t = T, where sampling starts, "
            "the "
            "model is never trained.",
            (_train_by(time=lambda n, T, gen: torch.randint(0, T, (n,), generator=gen)),),
        ),
        Mistake(
            "t = T missing",
            "t = T is never drawn, as randint leaves out its upper end: sampling starts there, with a model that "
            "has "
            "never seen it.",
            (_train_by(time=lambda n, T, gen: torch.randint(1, T, (n,), generator=gen)),),
        ),
        Mistake(
            "t from 0 to T",
            "t = 0 is among your times: there x_t is x0 itself, and the noise to predict is not in it.",
            (_train_by(time=lambda n, T, gen: torch.randint(0, T + 1, (n,), generator=gen)),),
        ),
        Mistake(
            "one t per batch",
            "The whole batch has one t. Right on average, but the gradient is far noisier than with one t per example.",
            (_train_by(time=lambda n, T, gen: torch.randint(1, T + 1, (1,), generator=gen).expand(n)),),
        ),
        Mistake(
            "x0 in [0, 1]",
            "You map x0 to [0, 1]: the smallest pixel the network ever saw is 0, not -1, and samples come out grey.",
            (_train_by(see=lambda x0: (x0 + 1) / 2),),
        ),
        Mistake(
            "2 x0 - 1",
            "You map x0 by 2 x0 - 1, though the images are in [-1, 1] already: the network sees them in [-3, 1].",
            (_train_by(see=lambda x0: 2 * x0 - 1),),
        ),
        Mistake(
            "labels dropped after the forward",
            "The model never sees the null label: labels are dropped after model(x_t, t, y), or not at all, and "
            "without it there is no unconditional prediction to guide with.",
            (_train_by(drop=lambda y, p, null, gen: y),),
        ),
        Mistake(
            "keeps with probability p",
            "Labels are kept with probability p and dropped otherwise: the comparison is the wrong way round.",
            (_train_by(drop=lambda y, p, null, gen: drop_labels(y, 1 - p, null, gen)),),
        ),
        Mistake(
            "one coin per batch",
            "One coin drops all labels of the batch or none; each label needs its own.",
            (_train_by(drop=lambda y, p, null, gen: drop_labels(y[:1] * 0, p, 1, gen) * (null - y) + y),),
        ),
        Mistake(
            "eval mode",
            "The model is put into eval mode while it trains: dropout never acts, running statistics stand still.",
            (_train_by(ready=lambda model: model.eval()),),
        ),
        Mistake(
            "noise not from gen",
            "The noise does not come from gen (torch.randn_like cannot take one): the run cannot be repeated.",
            (_train_by(noise=lambda x0, gen: torch.randn_like(x0)),),
        ),
        Mistake(
            "one noise for all",
            "All examples of the batch share one noise; each needs its own.",
            (_train_by(noise=lambda x0, gen: torch.randn(x0[:1].shape, generator=gen).to(x0).expand_as(x0)),),
        ),
        Mistake(
            "variance for standard deviation",
            "The noise is multiplied by its variance 1 - abar instead of the standard deviation.",
            (_train_by(sigma=lambda a: 1 - a),),
        ),
        Mistake(
            "predicts x0",
            "The prediction is compared with x0, so that the model learns to denoise; the sampler will take its "
            "answer "
            "for the noise.",
            (_train_by(loss=lambda out, eps, x0: F.mse_loss(out, x0)),),
        ),
        Mistake(
            "T of the notebook",
            "You use the notebook's T = 1000. The table that you are given may have another length.",
            (_train_by(time=lambda n, T, gen: torch.randint(1, 1001, (n,), generator=gen)),),
        ),
        Mistake(
            "four axes taken for granted",
            "You take images (B, C, H, W) for granted: x0 is (B, ...), with any number of axes.",
            (_train_by(axes=lambda a, like: a[:, None, None, None]),),
        ),
        Mistake(
            "no square roots",
            "Both square roots are missing: abar and 1 - abar are variances.",
            (_train_by(root=lambda a: a, sigma=lambda a: 1 - a),),
        ),
        Mistake(
            "sum of squares",
            "The squared errors are summed, not averaged: the step grows with batch and image size.",
            (_train_by(loss=lambda out, eps, x0: F.mse_loss(out, eps, reduction="sum")),),
        ),
        Mistake(
            "absolute errors",
            "You average absolute errors: their minimum is the median of the noise, and the score needs its mean.",
            (_train_by(loss=lambda out, eps, x0: F.l1_loss(out, eps)),),
        ),
        Mistake(
            "graph returned",
            "What you return is a tensor with its graph: a list of losses then keeps every step's graph in memory.",
            (_train_by(_with_graph),),
        ),
    ),
    alternatives=((_train_one_by_one,), (_train_zero_last,)),
    hints=(
        "Draw t, eps and the labels to drop; make x_t; ask the model; compare. Then three lines with opt and loss.",
        "Draw t from 1 to T (randint leaves out its upper end) and eps like x0; x_t by formula (1) of lesson 01; "
        "labels as in 02.3, with model.null; mse_loss of model(x_t, t, y) and eps; zero_grad, backward, step; "
        "loss.item().",
    ),
    hides=("train.diffusion_loss", "train.drop", "schedules.add_noise"),
    probe=_train_see,
)

# --- 02.5 EMA ---------------------------------------------------------------------------------------------------------


def _net(g: Generator) -> nn.Module:
    """Parameters, and buffers of both kinds: running statistics and a count."""
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    nn.init.zeros_(net[0].weight)  # what it starts from is not drawn with g
    nn.init.zeros_(net[0].bias)
    _walk(net, g)
    return net


def _walk(net: nn.Module, g: Generator) -> None:
    """What a training step does to a model, more or less."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += randn(g, *parameter.shape)
        for buffer in net.buffers():
            buffer += integer(g, 1, 5)


def _mean(ema: object) -> nn.Module:
    mean = getattr(ema, "model", None)
    if not isinstance(mean, nn.Module):
        raise Wrong(f"the averaged copy belongs in self.model: a module is due there, and it is {type(mean).__name__}")
    return mean


def _values(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def _ema_copy(answer: Answer, g: Generator) -> None:
    net = _net(g)
    before = deepcopy(net.state_dict())
    mean = _mean(answer(net, 0.9))
    if not all(close(mean.state_dict()[name], value) for name, value in before.items()):
        raise Wrong("right after EMA(model, decay) the average must be the model itself, and it is not")
    _walk(net, g)
    now = mean.state_dict()
    if any(not close(now[name], before[name]) for name in before):
        raise Wrong(
            "the average moves when the model trains: it shares memory with the model, so they are always equal"
        )


def _ema_one(answer: Answer, g: Generator) -> None:
    net, decay = _net(g), (0.9, 0.99, 0.75)[integer(g, 0, 2)]
    ema = answer(net, decay)
    start = _values(net)
    _walk(net, g)
    answer.ask(ema, "update", net)
    for mean, old, new in zip(_mean(ema).parameters(), start, net.parameters(), strict=True):
        share = (mean.detach() - old) / (new.detach() - old)
        if not close(share, torch.full_like(share, 1 - decay), rtol=1e-4):
            jumps = f"{100 * float(share.flatten()[0]):.4g} %" if share.std() < 1e-4 else "no fixed share"
            raise Wrong(
                f"decay = {decay}: one update must move the average by {100 * (1 - decay):.3g} % of the way to the "
                f"model; yours moved {jumps} of it"
            )


def _ema_many(answer: Answer, g: Generator) -> None:
    net, decay, n = _net(g), 0.8, 7
    ema = answer(net, decay)
    start = _values(net)
    _walk(net, g)
    for _ in range(n):
        answer.ask(ema, "update", net)
    for mean, old, new in zip(_mean(ema).parameters(), start, net.parameters(), strict=True):
        due = new.detach() + decay**n * (old - new.detach())
        need(mean, due, f"after {n} updates with a model that stands still, decay^{n} of the gap must be left")


def _ema_buffers(answer: Answer, g: Generator) -> None:
    net = _net(g)
    ema = answer(net, 0.9)
    _walk(net, g)
    answer.ask(ema, "update", net)
    mine = dict(_mean(ema).named_buffers())
    for name, theirs in net.named_buffers():
        if name not in mine or not close(mine[name].double(), theirs.double()):
            got = "missing" if name not in mine else f"{float(mine[name].flatten()[0]):.4g}"
            raise Wrong(
                f"the buffer {name} of the model is {float(theirs.flatten()[0]):.4g}, that of the average is {got}: "
                "buffers are copied, or the copy samples with old statistics"
            )


def _ema_still(answer: Answer, g: Generator) -> None:
    """Neither making the average nor updating it touches the model."""
    net = _net(g).train()
    before = deepcopy(net.state_dict())
    ema = answer(net, 0.9)
    for when in ("EMA(model, decay)", "update(model)"):
        if not all(close(value, before[name]) for name, value in net.state_dict().items()):
            raise Wrong(f"{when} changed the model that is being trained")
        if not net.training:
            raise Wrong(f"{when} put the model that is being trained into eval mode")
        if not all(p.requires_grad for p in net.parameters()):
            raise Wrong(f"{when} switched off the gradients of the model that is being trained")
        if when.startswith("EMA"):
            _walk(net, g)
            before = deepcopy(net.state_dict())
            answer.ask(ema, "update", net)


def _ema_for_sampling(answer: Answer, g: Generator) -> None:
    net = _net(g).train()
    ema = answer(net, 0.9)
    for when in ("at the start", "after an update"):
        mean = _mean(ema)
        if any(m.training for m in mean.modules()):
            raise Wrong(f"{when} the average is in train mode: it is for sampling, so eval()")
        if any(p.grad_fn is not None for p in mean.parameters()):
            raise Wrong(f"{when} the average carries autograd's graph, which grows with each update")
        if any(p.requires_grad for p in mean.parameters()):
            raise Wrong(f"{when} parameters of the average require gradients: nothing should ever train them")
        answer.ask(ema, "update", net)


def _ema_by(
    copied: Callable[[nn.Module], nn.Module] = lambda model: deepcopy(model).eval().requires_grad_(False),
    mix: Callable[[Tensor, Tensor, float], Tensor] = lambda mean, value, decay: decay * mean + (1 - decay) * value,
    buffers: Callable[[Tensor, Tensor, float], object] = lambda mine, theirs, decay: mine.copy_(theirs),
    no_grad: bool = True,
    exchanged: bool = False,
) -> type:
    class EMA:
        def __init__(self, model: nn.Module, decay: float):
            self.model, self.decay = copied(model), decay

        def update(self, model: nn.Module) -> None:
            one, two = (model, self.model) if exchanged else (self.model, model)
            with torch.set_grad_enabled(not no_grad):
                for mean, value in zip(one.parameters(), two.parameters(), strict=True):
                    mean.copy_(mix(mean, value, self.decay))
                for mine, theirs in zip(one.buffers(), two.buffers(), strict=True):
                    buffers(mine, theirs, self.decay)

    return EMA


def _zeroed(model: nn.Module) -> nn.Module:
    mean = deepcopy(model).eval().requires_grad_(False)
    for parameter in mean.parameters():
        parameter.zero_()
    return mean


def _averaged(mine: Tensor, theirs: Tensor, decay: float) -> None:
    if mine.is_floating_point():
        mine.copy_(decay * mine + (1 - decay) * theirs)
    else:
        mine.copy_(theirs)


class _EMAState:
    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.model = decay, deepcopy(model)
        self.model.eval()
        for parameter in self.model.parameters():
            parameter.requires_grad = False

    def update(self, model: nn.Module) -> None:
        learnt = dict(model.named_parameters())
        state, new = self.model.state_dict(), model.state_dict()
        for name in new:
            new[name] = torch.lerp(new[name], state[name], self.decay) if name in learnt else new[name]
        self.model.load_state_dict(new)


class _EMAForeach:
    def __init__(self, model: nn.Module, decay: float):
        self._rate = 1 - decay
        with torch.no_grad():
            self.model = deepcopy(model).train(False)
        self.model.requires_grad_(False)

    def update(self, model: nn.Module) -> None:
        with torch.no_grad():
            torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), self._rate)
            for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
                mine.data = theirs.detach().clone()


class _EMAData:
    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = deepcopy(model).eval(), decay
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)

    def update(self, model: nn.Module) -> None:
        theirs = dict(model.named_parameters())
        for name, mean in self.model.named_parameters():
            mean.data.mul_(self.decay).add_(theirs[name].data, alpha=1 - self.decay)
        theirs = dict(model.named_buffers())
        for name, buffer in self.model.named_buffers():
            buffer.data.copy_(theirs[name].data)


def _ema_see(answer: Answer, g: Generator) -> object:
    net = _net(g).train()
    ema = answer(net, 0.9)
    mean = ema.model
    if any(a is b or a.data_ptr() == b.data_ptr() for a, b in zip(mean.parameters(), net.parameters(), strict=True)):
        return "one memory"
    seen = [_flags(mean), _flags(net)]
    for _ in range(2):
        _walk(net, g)
        answer.ask(ema, "update", net)
        seen += [_flags(ema.model), _flags(net), _values(ema.model), _values(net)]
        seen += [[b.clone() for b in ema.model.buffers()], [b.clone() for b in net.buffers()]]
    return seen


def _flags(net: nn.Module) -> list:
    return [net.training, all(p.requires_grad for p in net.parameters()), any(p.grad_fn for p in net.parameters())]


EMA_CLASS = Exercise(
    id="02.5",
    names=("EMA",),
    references=(EMA,),
    inputs=lambda g: {},
    universal=False,
    kind="module",
    facts=(
        Fact("starts as a copy that the model cannot move", _ema_copy, "assignment does not copy; copy.deepcopy does"),
        Fact(
            "one update moves the parameters by 1 - decay",
            _ema_one,
            "decay is what stays of the old; write into the parameters (lerp_, copy_) under no_grad",
        ),
        Fact("many updates: decay^n of the gap is left", _ema_many, "a weighted mean: the weights add up to 1"),
        Fact("copies the buffers", _ema_buffers, "model.buffers(): running statistics are not parameters"),
        Fact("leaves the model alone", _ema_still, "which of the two is written to?"),
        Fact(
            "is ready for sampling: eval mode, no gradients",
            _ema_for_sampling,
            "eval(), requires_grad_(False), no_grad",
        ),
    ),
    mistakes=(
        Mistake(
            "alias",
            "The average is the model itself, under another name: it shares the model's memory, so it equals it at "
            "every "
            "moment and averages nothing.",
            (_ema_by(lambda model: model),),
        ),
        Mistake(
            "decay inverted",
            "decay is on the wrong side: with 0.9 the average jumps 90 % of the way at each update instead of 10 %.",
            (_ema_by(mix=lambda mean, value, decay: (1 - decay) * mean + decay * value),),
        ),
        Mistake(
            "adds without decay",
            "The new value is added and the old one not shrunk: the weights add up to more than 1, and the average "
            "grows "
            "without end.",
            (_ema_by(mix=lambda mean, value, decay: mean + (1 - decay) * value),),
        ),
        Mistake(
            "adds the new value in full",
            "The old value is shrunk and the new one added in full: the weights add up to 1 + decay.",
            (_ema_by(mix=lambda mean, value, decay: decay * mean + value),),
        ),
        Mistake(
            "plain copy",
            "Each update copies the model: there is no average, whatever the decay.",
            (_ema_by(mix=lambda mean, value, decay: value),),
        ),
        Mistake(
            "never moves",
            "The parameters of the average never change: what you compute is not written into self.model.",
            (_ema_by(mix=lambda mean, value, decay: mean),),
        ),
        Mistake(
            "buffers skipped",
            "Parameters are averaged and buffers forgotten: the average samples with the running statistics of an "
            "untrained model.",
            (_ema_by(buffers=lambda mine, theirs, decay: None),),
        ),
        Mistake(
            "buffers averaged",
            "Buffers are averaged with the parameters. They are running averages already, and lag twice now: copy "
            "them.",
            (_ema_by(buffers=_averaged),),
        ),
        Mistake(
            "requires gradients",
            "The parameters of the average still require gradients: an optimiser that is given them would train them, "
            "and "
            "sampling builds a graph.",
            (_ema_by(lambda model: deepcopy(model).eval()),),
        ),
        Mistake(
            "graph kept",
            "update runs with autograd on: the average drags along the graph of all updates, and memory grows.",
            (_ema_by(no_grad=False),),
        ),
        Mistake(
            "updates the model",
            "It is the live model that is pulled towards its average: the arguments of the update are exchanged.",
            (_ema_by(exchanged=True),),
        ),
        Mistake(
            "train mode",
            "The average stays in train mode: dropout and batch statistics would act while you sample.",
            (_ema_by(lambda model: deepcopy(model).requires_grad_(False)),),
        ),
        Mistake(
            "starts at zero",
            "The average starts at zero instead of at the model: for the first 1 / (1 - decay) updates it is far too "
            "small.",
            (_ema_by(_zeroed),),
        ),
    ),
    alternatives=((_EMAState,), (_EMAForeach,), (_EMAData,)),
    hints=(
        "copy.deepcopy for the start; then walk through both models' parameters() side by side, and both buffers().",
        "mean.copy_(decay * mean + (1 - decay) * value) under no_grad; mine.copy_(theirs) for buffers; the copy in "
        "eval() "
        "with requires_grad_(False).",
    ),
    probe=_ema_see,
)

# --- 02.6 sample ------------------------------------------------------------------------------------------------------


class KnowsX0(Recorder):
    """Predicts the eps that makes x_t of x0: every right step stays on the line between x0 and one noise."""

    def __init__(self, x0: Tensor, abar: Tensor):
        super().__init__()
        self.x0, self.abar = x0, abar
        self.gain = nn.Parameter(torch.ones(()))

    def answer(self, xt: Tensor, t: Tensor, y: Tensor) -> Tensor:
        a = pad(self.abar[t.round().long().expand(len(xt)).clamp(0, len(self.abar) - 1)], xt)
        eps = (xt.double() - a.sqrt() * self.x0) / (1 - a).sqrt().clamp(min=1e-6)
        return (self.gain * eps).to(xt.dtype)


class Classes(Recorder):
    """The exact E[eps | x_t, y] of the archipelago: what a perfect class-conditional network would say."""

    def __init__(self, abar: Tensor):
        super().__init__()
        self.abar = abar
        self.gain = nn.Parameter(torch.ones(()))

    def answer(self, xt: Tensor, t: Tensor, y: Tensor) -> Tensor:
        out = torch.zeros_like(xt)
        for label in y.unique().tolist():
            member = y == label
            eps = exact_eps(archipelago().given(label), xt[member], t.round().long().expand(len(y))[member], self.abar)
            out[member] = eps.to(xt.dtype)
        return self.gain * out


def _sampling_abar(T: int) -> Tensor:
    """DDPM's betas, stretched to T steps: next to nothing is left of x0 at T."""
    betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * (1000 / T)
    return torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0)])


def _sample_inputs(g: Generator) -> dict:
    y, abar = torch.randint(0, 3, (5,), generator=g), _sampling_abar(61)
    return {"sample": dict(model=Classes(abar), y=y, steps=7, shape=(2,), abar=abar, gen=_gen(g))}


def _known(
    answer: Answer, g: Generator, steps: int = 7, b: int = 6, training: bool = True
) -> tuple[KnowsX0, Tensor, Tensor]:
    """The model after sampling from it, the labels, and the result."""
    abar = _sampling_abar(61 + integer(g, 0, 1))
    model = KnowsX0(2 * randn(g, b, 2, 3), abar).train(training)
    y = torch.randperm(10, generator=g)[:b]
    return model, y, answer(model, y, steps, (2, 3), abar, _gen(g))


def _sample_asks(answer: Answer, g: Generator) -> None:
    steps = (7, 11)[integer(g, 0, 1)]
    model, y, _ = _known(answer, g, steps)
    T, b = len(model.abar) - 1, len(y)
    if len(model.asked) != steps:
        raise Wrong(f"{steps} steps need {steps} evaluations of the model; yours asked {len(model.asked)} times")
    first = model.asked[0].t
    if first.shape != (b,):
        raise Wrong(f"the model was given t of shape {tuple(first.shape)}; with {b} labels it is ({b},)")
    if first.is_floating_point():
        raise Wrong(f"the model was given t as {first.dtype}: in training t was an integer")
    seen = [int(asked.t[0]) for asked in model.asked]
    due = [round(T * (steps - i) / steps) for i in range(steps)]
    if any((asked.t != asked.t[0]).any() for asked in model.asked):
        raise Wrong("within one evaluation the examples have different t: they all go down together")
    if seen != due:
        text = f"T = {T}, {steps} steps: the model was asked at t = {', '.join(map(str, seen))}"
        if seen[0] < seen[-1]:
            raise Wrong(f"{text}: the noise level rises; sampling goes from noise, t = T, down to data")
        raise Wrong(text, expected=", ".join(map(str, due)))


def _sample_state(answer: Answer, g: Generator) -> None:
    model, y, _ = _known(answer, g)
    for asked in model.asked:
        if asked.y.shape != y.shape or not torch.equal(asked.y, y):
            raise Wrong(f"the model was asked for the classes {asked.y.tolist()} where {y.tolist()} are wanted")
        if asked.training:
            raise Wrong("the model samples in train mode: dropout and batch statistics act on your images")
        if asked.graph:
            raise Wrong("the model is evaluated with autograd on: memory grows with every step")


def _sample_mode(answer: Answer, g: Generator) -> None:
    for training in (True, False):
        model, _, _ = _known(answer, g, training=training)
        if model.training != training:
            was, now = ("train", "eval") if training else ("eval", "train")
            raise Wrong(f"a model that came in {was} mode is left in {now} mode")


def _sample_noise(answer: Answer, g: Generator) -> None:
    model, _, _ = _known(answer, g, steps=1, b=10)
    more = [_known(answer, g, steps=1, b=10)[0] for _ in range(40)]
    x = torch.stack([m.asked[0].xt.double() for m in (model, *more)])
    if x.shape[1:] != (10, 2, 3):
        raise Wrong(f"the first x has shape {tuple(x.shape[1:])}; 10 labels and shape (2, 3) make (10, 2, 3)")
    if (x[:, 1:] == x[:, :1]).all():
        raise Wrong("all images of the batch start from one noise: each needs its own")
    if (x[1:] == x[:1]).all():
        raise Wrong("the noise is the same whatever the state of gen: draw it with generator=gen")
    n, mean, var = x.numel(), float(x.mean()), float(x.var())
    if abs(mean) > 7 / math.sqrt(n) or abs(var - 1) > 7 * math.sqrt(2 / n):
        raise Wrong(f"x at t = T has mean {mean:.3f} and variance {var:.3f}: it should be standard normal")


def _sample_line(answer: Answer, g: Generator) -> None:
    model, _, out = _known(answer, g)
    xs = [asked.xt.double() for asked in model.asked] + [out.double()]
    ts = [int(asked.t.reshape(-1)[0].clamp(0, len(model.abar) - 1)) for asked in model.asked] + [0]
    a, sigma = model.abar.sqrt(), (1 - model.abar).sqrt()
    noise = (xs[0] - a[ts[0]] * model.x0) / sigma[ts[0]]
    for k in range(1, len(xs)):
        t, s = ts[k - 1], ts[k]
        if close(xs[k], a[s] * model.x0 + sigma[s] * noise, rtol=1e-3, atol=2e-4):
            continue
        design = torch.stack([model.x0.flatten(), noise.flatten()], dim=1)
        fit = torch.linalg.lstsq(design, xs[k].flatten()[:, None]).solution[:, 0]
        exact = (design @ fit - xs[k].flatten()).abs().max() < 1e-3
        found = f"{float(fit[0]):.4f} x0 + {float(fit[1]):.4f} eps" if exact else "something else than x0 and eps"
        place = "the last step, to t = 0, must give x0 itself; it" if s == 0 else f"the step from t = {t} to t = {s}"
        due = f"{float(a[s]):.4f} x0 + {float(sigma[s]):.4f} eps"
        raise Wrong(f"for a model that knows x0 and eps {place} gave {found}", expected=due)


def _sample_classes(answer: Answer, g: Generator) -> None:
    """Mean log p(x | y) and the mean of each class, against the world's own."""
    abar, world, n = _sampling_abar(200), archipelago(), 200
    y = torch.arange(3).repeat_interleave(n)[torch.randperm(3 * n, generator=g)]
    x = answer(Classes(abar), y, 40, (2,), abar, _gen(g)).detach().double()
    zero = torch.zeros(n, dtype=torch.float64)
    for label in range(3):
        mine, own = x[y == label], world.given(label)
        real, _ = own.sample(20_000, g)
        scale = real.std(dim=0) / math.sqrt(n)
        got, due = (float(own.log_prob(p, zero[:1].expand(len(p)), discrete(abar)).mean()) for p in (mine, real))
        if not abs(got - due) < 0.6:
            raise Wrong(f"images asked for as class {label} have log p(x | y) = {got:.2f} on average, data {due:.2f}")
        if ((mine.mean(0) - real.mean(0)).abs() > 7 * scale).any():
            raise Wrong(f"images of class {label} have their mean at {mine.mean(0).tolist()}, data elsewhere")


def _sample_single(answer: Answer, g: Generator) -> None:
    model, _, out = _known(answer, g)
    odd = {asked.xt.dtype for asked in model.asked} - {torch.float32}
    if odd:
        raise Wrong(f"the model has float32 weights and was given x as {odd.pop()}: a network refuses that")
    if out.shape != model.x0.shape:
        raise Wrong(f"the result has shape {tuple(out.shape)} where {tuple(model.x0.shape)} is due")


def _sample_by(
    grid: Callable[[int, int], Tensor] = lambda T, steps: torch.linspace(T, 0, steps + 1),
    noise: Callable[..., Tensor] = lambda n, shape, gen: torch.randn(n, *shape, generator=gen),
    label: Callable[[Tensor], Tensor] = lambda y: y,
    last: Callable[[int, int], int] = lambda s, t: s,
    fresh: float = 0.0,
    renoise: float = 1.0,
    clip: float = math.inf,
    no_grad: bool = True,
    ready: Callable[[nn.Module], object] = lambda model: model.eval(),
    done: Callable[[nn.Module, bool], object] = lambda model, training: model.train(training),
    time: Callable[[Tensor, int], Tensor] = lambda t, T: t,
    asks_at_0: bool = False,
    length: Callable[[Tensor], int] = lambda abar: len(abar) - 1,
) -> Callable:
    def sample(model, y, steps, shape, abar, gen):
        with torch.set_grad_enabled(not no_grad):
            T, training = length(abar), model.training
            times = grid(T, steps).round().long().tolist()
            x = noise(len(y), shape, gen)
            ready(model)
            for t, s in pairwise(times):
                s = last(s, t)
                eps = model(x, time(torch.full_like(y, t), T), label(y))
                x0 = ((x - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()).clamp(-clip, clip)
                eps = fresh * torch.randn(x.shape, generator=gen) + (1 - fresh) * eps
                x = abar[s].sqrt() * x0 + renoise * (1 - abar[s]).sqrt() * eps
            if asks_at_0:
                x = x - (1 - abar[0]).sqrt() * model(x, torch.zeros_like(y), label(y))
            done(model, training)
            return x

    return sample


def _sample_ratios(model, y, steps, shape, abar, gen):
    """As an exponential integrator: x_s / a_s = x_t / a_t + (sigma_s / a_s - sigma_t / a_t) eps, in float64 inside."""
    start, T = [(m, m.training) for m in model.modules()], len(abar) - 1
    model.eval()
    slope = ((1 - abar.double()) / abar.double()).sqrt()
    x = torch.empty(len(y), *shape).normal_(generator=gen).double()
    t = T
    for i in range(steps):
        s = round(T * (steps - 1 - i) / steps)
        with torch.inference_mode():
            eps = model(x.float(), torch.tensor([t]).expand(len(y)), y).double()
        x = (x / abar[t].sqrt() + (slope[s] - slope[t]) * eps.clone()) * abar[s].sqrt()
        t = s
    for m, mode in start:
        m.training = mode
    return x.float()


def _sample_angles(model, y, steps, shape, abar, gen):
    """As a rotation by the angle between signal and noise."""
    training = model.training
    model.train(False)
    phi = torch.acos(abar.sqrt()).float()
    x = torch.stack([torch.randn(shape, generator=gen) for _ in y])
    times = torch.linspace(len(abar) - 1, 0, steps + 1).round().long()
    try:
        for t, s in pairwise(times):
            with torch.no_grad():
                eps = model(x, t.repeat(len(y)), y)
            x = x * phi[s].cos() / phi[t].cos() + eps * (phi[s] - phi[t]).sin() / phi[t].cos()
    finally:
        model.train(training)
    return x


def _sample_see(answer: Answer, g: Generator) -> object:
    abar, x0, y = _sampling_abar(61), 2 * randn(g, 6, 2, 3), torch.randperm(10, generator=g)[:6]
    seed, left, models, outs = integer(g, 0, 10**6), [], [], []
    for noise, training, gen in ((1, True, seed), (2, False, seed), (1, True, seed + 1)):
        answer.reseed(noise)
        model = KnowsX0(x0, abar).train(training)
        outs.append(answer(model, y, 7, (2, 3), abar, Generator().manual_seed(gen)))
        left.append(model.training)
        models.append(model)
    asked = models[0].asked
    first = [m.asked[0].xt.double() for m in models]
    seen = dict(
        left=left,
        times=[asked_.t.tolist() for asked_ in asked],
        integer=not asked[0].t.is_floating_point(),
        training=[asked_.training for asked_ in asked],
        graph=[any(asked_.graph for asked_ in asked), outs[0].requires_grad],
        labels=[asked_.y.tolist() for asked_ in asked],
        from_gen=close(first[0], first[1], rtol=1e-5),
        gen_matters=not close(first[0], first[2], rtol=1e-5),
        one_noise=bool((first[0][1:] == first[0][:1]).all()),
        dtype=[str(asked[-1].xt.dtype), str(outs[0].dtype)],
    )
    a, t = models[0].abar, int(asked[0].t.reshape(-1)[0].round().clamp(0, 61))
    noise = (first[0] - a[t].sqrt() * x0) / (1 - a[t]).sqrt().clamp(min=1e-6)
    design = torch.stack([x0.flatten(), noise.flatten()], dim=1)
    ends = []
    for x in (asked[min(1, len(asked) - 1)].xt, asked[-1].xt, outs[0]):
        flat = x.detach().double().flatten()
        fit = torch.linalg.lstsq(design, flat[:, None]).solution[:, 0]
        exact = (design @ fit - flat).abs().max() < 1e-3 * (1 + flat.abs().max())
        ends.append([round(float(v), 2) for v in fit] if exact else "off the line")
    return seen | dict(ends=ends)


def _stay(model: nn.Module, training: bool = False) -> None:
    pass


SAMPLE = Exercise(
    by_probe=True,
    without=("keeps the dtype of its inputs",),
    id="02.6",
    names=("sample",),
    references=(sample,),
    inputs=_sample_inputs,
    changes=("gen",),
    kind="sampler",
    points=2,
    facts=(
        Fact(
            "asks the model once per step, from t = T down",
            _sample_asks,
            "steps + 1 integer times make `steps` intervals",
        ),
        Fact("passes y on, in eval mode and without a graph", _sample_state, "y, model.eval(), torch.no_grad()"),
        Fact("starts from noise of its own for each image", _sample_noise, "torch.randn(len(y), *shape, ...)"),
        Fact(
            "each step keeps x0 and eps; the last gives x0",
            _sample_line,
            "estimate x0, then noise it to the next t",
        ),
        Fact("gives the model its mode back", _sample_mode, "remember model.training before eval()"),
        Fact("x stays float32, as the weights are", _sample_single, "abar[t] without axes does not change the dtype"),
        Fact("images land where their class is", _sample_classes, "the exact world in place of a network"),
    ),
    mistakes=(
        Mistake(
            "T of the notebook",
            "You use the notebook's T = 1000. The table that you are given may have another length.",
            (_sample_by(length=lambda abar: 1000),),
        ),
        Mistake(
            "times ascend",
            "The times rise from 0 to T: each step adds noise. Sampling starts at t = T and goes down.",
            (_sample_by(lambda T, steps: torch.linspace(0, T, steps + 1)),),
        ),
        Mistake(
            "eval forgotten",
            "The model samples in the mode it comes in, train mode here: dropout and batch statistics act on your "
            "images.",
            (_sample_by(ready=_stay),),
        ),
        Mistake(
            "mode not restored",
            "The model is left in eval mode: if it was being trained, it goes on without dropout, and nobody notices.",
            (_sample_by(done=_stay),),
        ),
        Mistake(
            "always back to train",
            "You put the model into train mode at the end, though it may have come in eval mode: give it back the "
            "mode "
            "it had.",
            (_sample_by(done=lambda model, training: model.train()),),
        ),
        Mistake(
            "graph kept",
            "The graph of all steps is kept: memory grows with each step, and the images carry gradients.",
            (_sample_by(no_grad=False),),
        ),
        Mistake(
            "last step ends at 1",
            "The last step ends at t = 1, not at t = 0: the images keep a little noise, which many a published "
            "sampler did, too.",
            (_sample_by(last=lambda s, t: max(s, 1)),),
        ),
        Mistake(
            "one noise for all",
            "All images start from one noise: they come out as one drawing in different classes, or as copies.",
            (_sample_by(noise=lambda n, shape, gen: torch.randn(shape, generator=gen).expand(n, *shape)),),
        ),
        Mistake(
            "noise not from gen",
            "The first noise does not come from gen: the same seed gives other images each time.",
            (_sample_by(noise=lambda n, shape, gen: torch.randn(n, *shape)),),
        ),
        Mistake(
            "steps + 1 evaluations",
            "The model is asked steps + 1 times, as t = 0 is among the times you ask at: x is clean there.",
            (_sample_by(asks_at_0=True),),
        ),
        Mistake(
            "steps - 1 evaluations",
            "The model is asked steps - 1 times: `steps` times have steps - 1 intervals between them.",
            (_sample_by(lambda T, steps: torch.linspace(T, 0, steps)),),
        ),
        Mistake(
            "starts at T - 1",
            "You start at t = T - 1: with abar[0] = 1 the table ends at index T = len(abar) - 1.",
            (_sample_by(lambda T, steps: torch.linspace(T - 1, 0, steps + 1)),),
        ),
        Mistake(
            "neighbouring t",
            "Each step goes to t - 1, while the next starts further down: the noise left in x is not what the "
            "model is "
            "told.",
            (_sample_by(last=lambda s, t: t - 1),),
        ),
        Mistake(
            "not noised again",
            "After each estimate of x0 no noise is put back: the model is told t and gets a picture that is too clean.",
            (_sample_by(renoise=0.0),),
        ),
        Mistake(
            "clipped",
            "The estimate of x0 is cut to [-1, 1]. That is a choice for pixels; here x0 may be larger, and after "
            "the "
            "cut eps and x0 no longer make x_t.",
            (_sample_by(clip=1.0),),
        ),
        Mistake(
            "fresh noise",
            "You put back fresh noise instead of the predicted eps, so that nothing is deterministic after the start.",
            (_sample_by(fresh=1.0),),
        ),
        Mistake(
            "t in [0, 1]",
            "The model is given t / T, a number in [0, 1]; it was trained on the integers t.",
            (_sample_by(time=lambda t, T: t / T),),
        ),
        Mistake(
            "one label for all",
            "Every image is asked for as the class of the first.",
            (_sample_by(label=lambda y: y[:1].expand(len(y))),),
        ),
    ),
    alternatives=((_sample_ratios,), (_sample_angles,)),
    hints=(
        "A loop over pairs of neighbouring times: predict eps, estimate x0, noise it again to the next time. And "
        "three "
        "things around it: no graph, eval mode, the mode back.",
        "times = linspace(T, 0, steps + 1).round().long(); x0 = (x - sqrt(1 - abar[t]) eps) / sqrt(abar[t]); x = "
        "sqrt(abar[s]) x0 + sqrt(1 - abar[s]) eps; under torch.no_grad(), between model.eval() and "
        "model.train(training).",
    ),
    hides=("samplers.ddim_step", "samplers.sample", "samplers.trajectory"),
    probe=_sample_see,
)

# --- 02.7 class_accuracy ----------------------------------------------------------------------------------------------

Z = 1.959964


class Lamp(nn.Module):
    """A judge that reads the class off the brightness, from -0.9 for class 0 to 0.9 for the last. In train mode it is
    wrong by one class. It records the mode, and whether autograd was on."""

    def __init__(self, classes: int):
        super().__init__()
        self.levels = nn.Parameter(torch.linspace(-0.9, 0.9, classes, dtype=torch.float64))
        self.asked: list[tuple[bool, bool]] = []

    def forward(self, images: Tensor) -> Tensor:
        """(n, 1, h, w) -> logits (n, classes), not normalised."""
        self.asked.append((self.training, torch.is_grad_enabled()))
        light = images.mean(dim=(1, 2, 3))
        logits = -50 * (light[:, None] - self.levels) ** 2 + 30 * light[:, None] ** 3
        return logits.roll(1, dims=1) if self.training else logits

    def pictures(self, classes: Tensor, g: Generator) -> Tensor:
        """Images in [-1, 1] that it takes for these classes."""
        speckle = 0.05 * randn(g, len(classes), 1, 4, 5)
        speckle = speckle - speckle.mean(dim=(1, 2, 3), keepdim=True)
        return self.levels.detach()[classes][:, None, None, None] + speckle


def _judged(g: Generator, n: int, hits: int, k: int = 10) -> tuple[Lamp, Tensor, Tensor]:
    """A judge, images and labels, of which so many agree; those that do not come last."""
    judge, y = Lamp(k), torch.randint(0, k, (n,), generator=g)
    off = 1 + torch.randint(0, k - 1, (n,), generator=g)
    images = judge.pictures(torch.where(torch.arange(n) < hits, y, (y + off) % k), g)
    return judge, images, y


def _accuracy_inputs(g: Generator) -> dict:
    judge, images, y = _judged(g, 23, integer(g, 8, 18), k=7)
    return {"class_accuracy": dict(judge=judge, images=images, y=y)}


def _accuracy_count(answer: Answer, g: Generator) -> None:
    for n, hits, k in ((131, integer(g, 60, 120), 10), (10, 7, 10), (1, 1, 4), (257, 200, 3)):
        got = float(answer(*_judged(g, n, hits, k))[0])
        if abs(got - hits / n) > 1e-6:
            raise Wrong(
                f"{n} images in [-1, 1], {k} classes: the judge is right on {hits}, which is {hits / n:.4f}; yours "
                "says "
                f"{got:.4f}"
            )


def _accuracy_ends(answer: Answer, g: Generator) -> None:
    """At an end p of Wilson's interval the share is exactly z standard errors away, by the standard error at p."""
    for n in (30, 131):
        hits = integer(g, n // 4, n - 2)
        _, lo, hi = (float(v) for v in answer(*_judged(g, n, hits)))
        if not lo < hits / n < hi:
            raise Wrong(f"{hits} of {n}: the ends {lo:.4f} and {hi:.4f} should lie on both sides of {hits / n:.4f}")
        for p, name in ((lo, "lower"), (hi, "upper")):
            error = math.sqrt(max(p * (1 - p), 0) / n)
            if abs(abs(hits / n - p) - Z * error) > 1e-5:
                away = f"{abs(hits / n - p) / error:.3f}" if error else "infinitely many"
                raise Wrong(
                    f"{hits} of {n}: the {name} end {p:.5f} is {away} of its own standard errors sqrt(p (1 - p) / n) "
                    f"away from {hits / n:.4f}; Wilson's ends are 1.960 away"
                )


def _accuracy_extremes(answer: Answer, g: Generator) -> None:
    for n, hits, due in ((40, 40, (40 / (40 + Z**2), 1.0)), (25, 0, (0.0, Z**2 / (25 + Z**2)))):
        _, lo, hi = (float(v) for v in answer(*_judged(g, n, hits)))
        if abs(lo - due[0]) > 1e-4 or abs(hi - due[1]) > 1e-4:  # 1.96 is near enough to 1.959964
            raise Wrong(
                f"{hits} of {n} right: yours is [{lo:.4f}, {hi:.4f}]; even then the interval has a width, and it ends "
                f"at {hits // n}",
                expected=f"[{due[0]:.5f}, {due[1]:.5f}]",
            )


def _accuracy_state(answer: Answer, g: Generator) -> None:
    for training in (True, False):
        judge, images, y = _judged(g, 30, 20)
        answer(judge.train(training), images, y)
        if any(mode for mode, _ in judge.asked):
            raise Wrong("the judge was asked in train mode: dropout and batch statistics would change its verdicts")
        if any(graph for _, graph in judge.asked):
            raise Wrong("the judge runs with autograd on: on ten thousand images the graph fills the memory")
        if judge.training != training:
            was, now = ("train", "eval") if training else ("eval", "train")
            raise Wrong(f"a judge that came in {was} mode is left in {now} mode")


def _wilson(acc: float, n: int, z: float = Z) -> tuple[float, float]:
    centre, half = acc + z**2 / (2 * n), z * math.sqrt(acc * (1 - acc) / n + z**2 / (4 * n**2))
    return (centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)


def _wald(acc: float, n: int, z: float = Z) -> tuple[float, float]:
    half = z * math.sqrt(acc * (1 - acc) / n)
    return acc - half, acc + half


def _accuracy_by(
    score: Callable[[nn.Module, Tensor, Tensor], float] = lambda judge, images, y: (
        (judge(images).argmax(1) == y).double().mean().item()
    ),
    ends: Callable[[float, int], tuple[float, float]] = _wilson,
    see: Callable[[Tensor], Tensor] = lambda images: images,
    ready: Callable[[nn.Module], object] = lambda judge: judge.eval(),
    done: Callable[[nn.Module, bool], object] = lambda judge, training: judge.train(training),
    no_grad: bool = True,
) -> Callable:
    def class_accuracy(judge: nn.Module, images: Tensor, y: Tensor) -> tuple[float, float, float]:
        training = judge.training
        ready(judge)
        with torch.set_grad_enabled(not no_grad):
            acc = score(judge, see(images), y)
        done(judge, training)
        return acc, *ends(acc, len(y))

    return class_accuracy


def _batch_means(judge: nn.Module, images: Tensor, y: Tensor, size: int = 100) -> float:
    pairs = zip(images.split(size), y.split(size), strict=True)
    means = [(judge(x).argmax(1) == label).double().mean().item() for x, label in pairs]
    return sum(means) / len(means)


def _accuracy_batches(judge, images, y):
    """Batch by batch, with the interval as the two roots of the quadratic equation that defines it."""
    mode, right, n = judge.training, 0, len(y)
    judge.train(False)
    for i in range(0, n, 16):
        with torch.inference_mode():
            logits = judge(images[i : i + 16]).log_softmax(dim=-1)
        right += sum(int(row.max(0).indices) == int(label) for row, label in zip(logits, y[i : i + 16], strict=True))
    judge.train(mode)
    share, z2 = right / n, 1.959964**2
    a, b, c = 1 + z2 / n, -(2 * share + z2 / n), share**2
    root = math.sqrt(b * b - 4 * a * c)
    return share, max(0.0, (-b - root) / (2 * a)), min(1.0, (-b + root) / (2 * a))


def _accuracy_interval(judge, images, y):
    from condiff_ref.intervals import share

    mode = judge.training
    judge.eval()
    with torch.no_grad():
        best = judge(images).topk(1, dim=1).indices.squeeze(1)
    judge.train(mode)
    found = share(int(torch.eq(best, y).sum()), len(y))
    return found.value, found.low, found.high


def _accuracy_see(answer: Answer, g: Generator) -> object:
    seen = []
    for n, hits, k, training in (
        (131, 100, 10, True),
        (40, 40, 10, False),
        (40, 39, 10, False),
        (30, 0, 5, True),
        (10, 6, 10, False),
    ):
        judge, images, y = _judged(g, n, hits, k)
        try:
            out = [round(float(v), 3) for v in answer(judge.train(training), images, y)]
        except (Failed, OutOfTime) as error:
            out = type(error.__cause__ or error).__name__
        seen.append([out, judge.training, any(mode for mode, _ in judge.asked), any(graph for _, graph in judge.asked)])
    return seen


@torch.no_grad()
def _accuracy_textbook(judge, images, y):
    """With the z = 1.96 of textbooks."""
    mode, n = judge.training, len(images)
    right = (judge.eval()(images).argmax(-1) == y).sum().item()
    judge.train(mode)
    z2 = 1.96**2
    middle, root = right + z2 / 2, 1.96 * math.sqrt(right * (n - right) / n + z2 / 4)
    return right / n, (middle - root) / (n + z2), (middle + root) / (n + z2)


CLASS_ACCURACY = Exercise(
    by_probe=True,
    id="02.7",
    names=("class_accuracy",),
    references=(class_accuracy,),
    inputs=_accuracy_inputs,
    facts=(
        Fact("the judge judges in eval mode, without graph", _accuracy_state, "eval(), no_grad(), the mode back"),
        Fact("counts the images that the judge gives their class", _accuracy_count, "logits (N, k): which axis?"),
        Fact("both ends are 1.96 of their own standard errors away", _accuracy_ends, "Wilson: the error at the end"),
        Fact("all right or all wrong still leaves an interval", _accuracy_extremes, "40 of 40 is not certainty"),
    ),
    mistakes=(
        Mistake(
            "range [0, 1]",
            "You map the images to [0, 1]. The judge learnt on [-1, 1], and so are these: real test digits through "
            "your function would not reach the judge's own 99 %.",
            (_accuracy_by(see=lambda images: (images + 1) / 2),),
        ),
        Mistake(
            "2 images - 1",
            "You map the images by 2 x - 1, as if they were in [0, 1]: they are in [-1, 1] already.",
            (_accuracy_by(see=lambda images: 2 * images - 1),),
        ),
        Mistake(
            "argmax over the images",
            "argmax runs over the images (dim 0): it finds for each class the image that is most of it. Each image "
            "needs its best class.",
            (_accuracy_by(lambda judge, images, y: (judge(images).argmax(0) == y).double().mean().item()),),
        ),
        Mistake(
            "judge in train mode",
            "The judge is not put into eval mode: with dropout or batch statistics on, its verdicts are not its own.",
            (_accuracy_by(ready=lambda judge: None),),
        ),
        Mistake(
            "mode not restored",
            "The judge is left in eval mode, whatever mode it came in.",
            (_accuracy_by(done=lambda judge, training: None),),
        ),
        Mistake(
            "always back to train",
            "The judge is left in train mode even if it came in eval mode: the next to ask it gets wrong verdicts.",
            (_accuracy_by(done=lambda judge, training: judge.train()),),
        ),
        Mistake(
            "mean of batch means",
            "You average the means of batches: the images of a last, smaller batch count for more than the others.",
            (_accuracy_by(_batch_means),),
        ),
        Mistake(
            "Wald's interval",
            "This is acc +- z sqrt(acc (1 - acc) / n), Wald's interval: with all images right it has no width at "
            "all, "
            "and claims certainty.",
            (_accuracy_by(ends=_wald),),
        ),
        Mistake(
            "Wald's interval, cut to [0, 1]",
            "This is Wald's interval cut to [0, 1]: with all images right it still has no width, and claims certainty.",
            (_accuracy_by(ends=lambda acc, n: (max(0.0, _wald(acc, n)[0]), min(1.0, _wald(acc, n)[1]))),),
        ),
        Mistake(
            "90 %",
            "Your z is 1.645, that of a 90 % interval: 95 % in the middle leave 2.5 % on each side, z = 1.96.",
            (_accuracy_by(ends=lambda acc, n: _wilson(acc, n, 1.644854)),),
        ),
        Mistake(
            "around acc",
            "You put Wilson's half-width around acc. His interval is around a centre that is pulled towards 1/2.",
            (
                _accuracy_by(
                    ends=lambda acc, n: (
                        acc - (_wilson(acc, n)[1] - _wilson(acc, n)[0]) / 2,
                        acc + (_wilson(acc, n)[1] - _wilson(acc, n)[0]) / 2,
                    )
                ),
            ),
        ),
        Mistake(
            "not divided",
            "The division by 1 + z^2 / n is missing: the interval reaches above 1 when all images are right.",
            (_accuracy_by(ends=lambda acc, n: tuple(v * (1 + Z**2 / n) for v in _wilson(acc, n))),),
        ),
        Mistake(
            "graph",
            "The numbers are right, but the judge runs with autograd on: on ten thousand images its graph fills "
            "the "
            "memory.",
            (_accuracy_by(no_grad=False),),
        ),
        Mistake(
            "share of errors",
            "You count the images that the judge gets wrong.",
            (_accuracy_by(lambda judge, images, y: (judge(images).argmax(1) != y).double().mean().item()),),
        ),
        Mistake(
            "percent",
            "You return percent; shares are in [0, 1], and an interval for 97 of 100 ends below 1.",
            (lambda judge, images, y: tuple(100 * v for v in _accuracy_by()(judge, images, y)),),
        ),
    ),
    alternatives=((_accuracy_textbook,), (_accuracy_batches,), (_accuracy_interval,)),
    hints=(
        "Eval mode, no graph, argmax over the classes, the mean of hits; then the formula for centre and half-width.",
        "centre = (acc + z^2 / 2n) / (1 + z^2 / n), half = z sqrt(acc (1 - acc) / n + z^2 / 4n^2) / (1 + z^2 / n).",
    ),
    hides=("metrics.class_accuracy", "intervals.share"),
    probe=_accuracy_see,
)

# --- 02.8 conditioning_bits -------------------------------------------------------------------------------------------


def _bits_inputs(g: Generator) -> dict:
    eps_c, eps_u = randn(g, 7, 4, 3, 2), randn(g, 7, 4, 3, 2)
    return {"conditioning_bits": dict(eps_c=eps_c, eps_u=eps_u, logsnr=_levels(g, 7)[torch.randperm(7, generator=g)])}


def _levels(g: Generator, m: int) -> Tensor:
    """Increasing, unevenly spaced."""
    return (0.3 + 2 * torch.rand(m, generator=g, dtype=torch.float64)).cumsum(0) - 5


def _gaps(size: Tensor, g: Generator, b: int, *shape: int) -> tuple[Tensor, Tensor]:
    """Predictions whose difference has the squared norm size[m] in every example."""
    eps_u, turn = randn(g, len(size), b, *shape), randn(g, len(size), b, *shape)
    turn = turn / turn.flatten(2).norm(dim=2).reshape(len(size), b, *[1] * len(shape))
    return eps_u + size.sqrt().reshape(-1, 1, *[1] * len(shape)) * turn, eps_u


def _bits_flat(answer: Answer, g: Generator) -> None:
    """A constant gap c over a range L holds c L / 2 nats, whatever the batch and the shape of an example."""
    c, m = 0.5 + float(torch.rand((), generator=g)), 6
    levels = _levels(g, m)
    due = c * float(levels[-1] - levels[0]) / (2 * math.log(2))
    for shape in ((3,), (1, 4, 4), (5, 2, 3)):
        got = float(answer(*_gaps(torch.full((m,), c).double(), g, 4, *shape), levels))
        if not math.isclose(got, due, rel_tol=1e-5):
            raise Wrong(
                f"examples of shape {shape} with |eps_c - eps_u|^2 = {c:.4f} at each of {m} levels, log-SNR from "
                f"{float(levels[0]):.3f} to {float(levels[-1]):.3f}: yours is {got:.6g}",
                expected=f"{due:.6g} bits",
            )


def _bits_slope(answer: Answer, g: Generator) -> None:
    """The trapezoid rule is exact for a straight line, however uneven the levels."""
    levels = _levels(g, 8)
    low, high = float(levels[0]), float(levels[-1])
    got = float(answer(*_gaps(0.3 * (levels - low), g, 3, 2, 2), levels))
    due = 0.3 * (high - low) ** 2 / 2 / (2 * math.log(2))
    if not math.isclose(got, due, rel_tol=1e-5):
        raise Wrong(
            f"a gap that rises in a straight line over unevenly spaced log-SNR: yours is {got:.6g}, {got / due:.4g} of "
            "the area of the triangle",
            expected=f"{due:.6g} bits",
        )


def _bits_order(answer: Answer, g: Generator) -> None:
    args = _bits_inputs(g)["conditioning_bits"]
    order = args["logsnr"].argsort()
    up = float(answer(*(v[order].clone() for v in args.values())))
    for name, by in (("falling", order.flip(0)), ("mixed", torch.randperm(len(order), generator=g))):
        got = float(answer(*(v[by].clone() for v in args.values())))
        if not math.isclose(got, up, rel_tol=1e-6):
            raise Wrong(f"log-SNR in rising order gives {up:.5g} bits, in {name} order {got:.5g}: the same data")


def _bits_mean(answer: Answer, g: Generator) -> None:
    """Half of the examples with a gap, half without."""
    levels = _levels(g, 5)
    eps_c, eps_u = _gaps(torch.ones(5).double(), g, 6, 3)
    eps_c[:, ::2] = eps_u[:, ::2]
    opposite = torch.cat([eps_c, 2 * eps_u - eps_c], dim=1), torch.cat([eps_u, eps_u], dim=1)
    due = float(levels[-1] - levels[0]) / (4 * math.log(2))
    for pair in ((eps_c, eps_u), opposite):
        got = float(answer(*pair, levels))
        if not math.isclose(got, due, rel_tol=1e-5):
            raise Wrong(
                f"half of {pair[0].shape[1]} examples have a squared gap of 1 and half of 0: yours is {got:.6g} bits; "
                "square each example's gap first, then take the mean of the examples",
                expected=f"{due:.6g}",
            )


@cache
def _class_bits() -> float:
    """I(x0; y) of the archipelago by quadrature: H(y) - E H(y | x0), with p(y | x0) on a grid."""
    world, abar = archipelago(), torch.ones(1, dtype=torch.float64)
    axis = torch.linspace(-4.5, 4.5, 181, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    zero = torch.zeros(len(grid), dtype=torch.float64)
    p = world.log_prob(grid, zero, discrete(abar)).exp() * (axis[1] - axis[0]) ** 2
    log_py = torch.stack([world.class_log_prob(grid, zero, discrete(abar), k) for k in range(3)])
    rest = -(p * (log_py.exp() * log_py).sum(0)).sum()
    prior = torch.stack([world.weights[world.labels == k].sum() for k in range(3)])
    return float(-(prior * prior.log()).sum() - rest) / math.log(2)


@cache
def _world_predictions() -> tuple[Tensor, Tensor, Tensor]:
    """Exact predictions with and without the class, at 40 levels in the order of rising noise."""
    g, world, m, b = Generator().manual_seed(0), archipelago(), 40, 2500
    logsnr = torch.linspace(11, -9, m, dtype=torch.float64)
    abar, t = logsnr.sigmoid(), torch.arange(m).repeat_interleave(b)
    x0, y = world.sample(m * b, g)
    xt = abar[t].sqrt()[:, None] * x0 + (1 - abar[t]).sqrt()[:, None] * randn(g, m * b, 2)
    eps_c = torch.zeros_like(xt)
    for k in range(3):
        eps_c[y == k] = exact_eps(world.given(k), xt[y == k], t[y == k], abar)
    return eps_c.view(m, b, 2), exact_eps(world, xt, t, abar).view(m, b, 2), logsnr


def _bits_world(answer: Answer, g: Generator) -> None:
    got, due = float(answer(*(v.clone() for v in _world_predictions()))), _class_bits()
    if abs(got - due) > 0.03:
        raise Wrong(
            f"for the exact predictions of the archipelago yours is {got:.4f} bits; the class shares H(y) - H(y | x0) "
            "= "
            f"{due:.3f} bits with the data"
        )


def _bits_by(
    gap: Callable[[Tensor], Tensor] = lambda d: (d**2).flatten(2).sum(2).mean(1),
    axis: Callable[[Tensor], Tensor] = lambda logsnr: logsnr,
    sort: bool = True,
    scale: float = 1 / (2 * math.log(2)),
    rule: Callable[[Tensor, Tensor], Tensor] = torch.trapezoid,
) -> Callable:
    def conditioning_bits(eps_c: Tensor, eps_u: Tensor, logsnr: Tensor) -> float:
        order = logsnr.argsort() if sort else torch.arange(len(logsnr))
        return scale * rule(gap(eps_c - eps_u)[order], axis(logsnr[order])).item()

    return conditioning_bits


def _bits_loop(eps_c: Tensor, eps_u: Tensor, logsnr: Tensor) -> float:
    points = []
    for c, u, level in zip(eps_c, eps_u, logsnr.tolist(), strict=True):
        points.append((level, float(((c - u) ** 2).sum()) / len(c)))
    points.sort()
    area = sum((right - left) * (f + g) / 2 for (left, f), (right, g) in pairwise(points))
    return 0.5 * area / math.log(2)


def _bits_einsum(eps_c: Tensor, eps_u: Tensor, logsnr: Tensor) -> float:
    d = (eps_c - eps_u).double().reshape(*eps_c.shape[:2], -1)
    levels, order = torch.sort(logsnr.double(), descending=True)
    gap = torch.einsum("mbd,mbd->m", d, d)[order] / d.shape[1]
    return float(-torch.dot(levels.diff(), gap[1:] + gap[:-1])) / math.log(16)


def _left_sum(gap: Tensor, levels: Tensor) -> Tensor:
    return (levels.diff() * gap[:-1]).sum()


CONDITIONING_BITS = Exercise(
    id="02.8",
    names=("conditioning_bits",),
    references=(conditioning_bits,),
    inputs=_bits_inputs,
    points=2,
    facts=(
        Fact("a constant gap over a range of log-SNR", _bits_flat, "sum over an example's entries; 1/2; nats to bits"),
        Fact(
            "a straight line over uneven levels", _bits_slope, "torch.trapezoid takes the levels as its second argument"
        ),
        Fact("does not depend on the order of the levels", _bits_order, "sort both, by log-SNR"),
        Fact("averages the squared gaps of the examples", _bits_mean, "E|..|^2: first the square, then the mean"),
        Fact("the archipelago: I(x0; y), known by quadrature", _bits_world, "what do image and class share?"),
    ),
    mistakes=(
        Mistake(
            "mean over pixels",
            "You average over the entries of an example; the squared length is their sum. On MNIST the result is 784 "
            "times "
            "too small.",
            (_bits_by(lambda d: (d**2).flatten(1).mean(1)),),
        ),
        Mistake(
            "sum over the batch",
            "You sum over the examples, too: with twice the batch you would find twice the bits. Over examples it is "
            "the "
            "mean.",
            (_bits_by(lambda d: (d**2).flatten(1).sum(1)),),
        ),
        Mistake(
            "dt for dlogsnr",
            "You integrate over the place in the list, spaced evenly over [0, 1], as if over t: the integral is over "
            "log-SNR, "
            "with its own uneven steps.",
            (_bits_by(axis=lambda logsnr: torch.linspace(0, 1, len(logsnr)).to(logsnr)),),
        ),
        Mistake(
            "unit steps",
            "The levels are not passed to the trapezoid rule: it takes them to be one apart.",
            (_bits_by(axis=lambda logsnr: torch.arange(len(logsnr)).to(logsnr)),),
        ),
        Mistake(
            "without 1/2",
            "The factor 1/2 is missing: your result is twice the bits.",
            (_bits_by(scale=1 / math.log(2)),),
        ),
        Mistake(
            "nats",
            "Your result is in nats: divide by ln 2 for bits.",
            (_bits_by(scale=0.5),),
        ),
        Mistake(
            "multiplied by ln 2",
            "You multiply by ln 2 where nats become bits by dividing: a bit is less than a nat, so there are more of "
            "them.",
            (_bits_by(scale=math.log(2) / 2),),
        ),
        Mistake(
            "unsorted",
            "You integrate in the order in which the levels come: where log-SNR falls, as it does with rising t, the "
            "area "
            "counts as negative.",
            (_bits_by(sort=False),),
        ),
        Mistake(
            "unsorted, absolute value",
            "You take the absolute value of an integral over unsorted levels: right for falling log-SNR, wrong for "
            "levels "
            "in mixed order.",
            (lambda eps_c, eps_u, logsnr: abs(_bits_by(sort=False)(eps_c, eps_u, logsnr)),),
        ),
        Mistake(
            "only the levels sorted",
            "The levels are sorted and the gaps left in their old order: each gap now stands at another level.",
            (lambda eps_c, eps_u, logsnr: _bits_by(sort=False)(eps_c, eps_u, logsnr.sort().values),),
        ),
        Mistake(
            "d SNR",
            "You integrate over the SNR itself; with predictions of eps the integral is over its logarithm.",
            (_bits_by(axis=torch.exp),),
        ),
        Mistake(
            "not squared",
            "You take the length of the difference, not its square.",
            (_bits_by(lambda d: d.flatten(2).norm(dim=2).mean(1)),),
        ),
        Mistake(
            "mean before the square",
            "You average the difference over the batch before squaring: opposite differences cancel.",
            (_bits_by(lambda d: (d.mean(1) ** 2).flatten(1).sum(1)),),
        ),
        Mistake(
            "left sum",
            "Each interval is weighted with the gap at its lower end only; the trapezoid rule takes the mean of both "
            "ends.",
            (_bits_by(rule=_left_sum),),
        ),
    ),
    alternatives=((_bits_loop,), (_bits_einsum,)),
    hints=(
        "One number per noise level first: sum over the entries of an example, mean over the batch. Then sort, "
        "integrate, "
        "change the unit.",
        "gap = ((eps_c - eps_u)**2).flatten(2).sum(2).mean(1); torch.trapezoid(gap[order], logsnr[order]) / 2 / ln 2.",
    ),
    probe=lambda answer, g: [
        float(answer(*(v[order].clone() for v in _bits_inputs(g)["conditioning_bits"].values())))
        for order in (torch.arange(7), torch.arange(6, -1, -1))
    ],
)

# --- 02.9 my_drop_test ------------------------------------------------------------------------------------------------


def _first_places(y: Tensor, p: float, gen: Generator) -> Tensor:
    return torch.arange(len(y)) < round(p * len(y))


_DROP_WRONG = (
    ("one coin for the whole batch", _drop_by(lambda y, p, gen: (torch.rand((), generator=gen) < p).expand(y.shape))),
    ("drops with probability 1 - p", _drop_by(lambda y, p, gen: ~_coins(y, p, gen))),
    ("dropped labels become 0", _drop_by(_coins, lambda y, m, null: torch.where(m, 0, y))),
    ("dropped labels become null - 1", _drop_by(_coins, lambda y, m, null: torch.where(m, null - 1, y))),
    ("changes y in place", _drop_in_place),
    ("always drops the first p B labels", _drop_by(_first_places)),
)


def _drop_test_by(*looks: str) -> Callable:
    """A test that looks at some things only."""

    def my_drop_test(drop_labels: Callable) -> None:
        y = torch.arange(10).repeat(400)
        out = drop_labels(y.clone(), 0.2, 10, Generator().manual_seed(3))
        if "shape" in looks:
            assert out.shape == y.shape and out.dtype == y.dtype
        if "share" in looks:
            assert abs(float((out == 10).double().mean()) - 0.2) < 0.05
        if "changed" in looks:
            assert abs(float((out != y).double().mean()) - 0.2) < 0.05
        if "exact" in looks:
            assert int((out == 10).sum()) == 800
        if "equal" in looks:
            assert torch.equal(out, y)
        if "null" in looks:
            assert ((out == y) | (out == 10)).all()
        if "ends" in looks:
            assert torch.equal(drop_labels(y.clone(), 0.0, 10, Generator().manual_seed(4)), y)
            assert (drop_labels(y.clone(), 1.0, 10, Generator().manual_seed(4)) == 10).all()
        if "untouched" in looks:
            given = y.clone()
            drop_labels(given, 0.2, 10, Generator().manual_seed(3))
            assert torch.equal(given, y)

    return my_drop_test


def _same_draw(drop_labels: Callable) -> None:
    y = torch.arange(10).repeat(40)
    mine = torch.where(_coins(y, 0.2, Generator().manual_seed(0)), 10, y)
    assert torch.equal(drop_labels(y, 0.2, 10, Generator().manual_seed(0)), mine)


def _drop_test_small(drop_labels: Callable) -> None:
    """Many small batches, counted place by place."""
    gen, hits, mixed = Generator().manual_seed(5), torch.zeros(6), False
    for _ in range(400):
        y = torch.tensor([3, 1, 4, 1, 5, 9])
        out = drop_labels(y, 0.25, 12, gen)
        assert y.tolist() == [3, 1, 4, 1, 5, 9]
        for i, label in enumerate([3, 1, 4, 1, 5, 9]):
            assert int(out[i]) in (label, 12)
        hits += out == 12
        mixed |= 0 < int((out == 12).sum()) < 6
    assert mixed and ((hits > 40) & (hits < 160)).all()


def _drop_test_table(drop_labels: Callable) -> None:
    """By sorting: after p = 0.9 the labels that are left keep their order, and are about a tenth."""
    y = torch.randint(0, 10, (5000,), generator=Generator().manual_seed(0))
    kept = y.clone()
    outs = [drop_labels(y, 0.9, 10, Generator().manual_seed(s)) for s in (0, 1)]
    if not (y == kept).all():
        raise AssertionError("y changed")
    rows = [(o == 10).tolist() for o in outs]
    if rows[0] == rows[1] or not all(4250 < sum(row) < 4750 for row in rows):
        raise AssertionError("share or places")
    if any(
        int(o[i]) != int(kept[i]) for o, row in zip(outs, rows, strict=True) for i, gone in enumerate(row) if not gone
    ):
        raise AssertionError("kept labels changed")


MY_DROP_TEST = test_exercise(
    "02.9",
    "my_drop_test",
    my_drop_test,
    right=(drop_labels, _drop_bernoulli, _drop_arithmetic),
    wrong=_DROP_WRONG,
    needed=5,
    mistakes=(
        Mistake(
            "looks at shape and dtype only",
            "Your test never raises. All the wrong functions return labels of the right shape and dtype: look at what "
            "the labels are.",
            (_drop_test_by("shape"),),
        ),
        Mistake(
            "p = 0 and p = 1 only",
            "At p = 0 and p = 1 nothing is left to chance: a coin for the whole batch and fixed places look right "
            "there. "
            "Try a p in between, too.",
            (_drop_test_by("ends"),),
        ),
        Mistake(
            "only the share of null",
            "Your test counts null and nothing else: it does not see that y was changed, or that the same places are "
            "dropped each time.",
            (_drop_test_by("share"),),
        ),
        Mistake(
            "only the share of changes",
            "You count labels that changed, not what they became: zeros and nines pass as well as null.",
            (_drop_test_by("changed"),),
        ),
        Mistake(
            "only that labels stay or become null",
            "You check what labels become, and not how many: dropping all, or the wrong share, passes.",
            (_drop_test_by("null"),),
        ),
        Mistake(
            "the share must be exact",
            "You ask for exactly p B dropped labels, or nearly: chance rarely hits it, so correct functions fail. "
            "Leave a margin "
            "of "
            "several standard deviations.",
            (_drop_test_by("exact"),),
        ),
        Mistake(
            "compares with one's own draw",
            "You compare with your own labels from the same seed: a correct function may use its random numbers in "
            "another "
            "way. Test what holds for all of them.",
            (_same_draw,),
        ),
        Mistake(
            "only that y is left alone",
            "You check that y is left alone, and nothing about the result.",
            (_drop_test_by("untouched"),),
        ),
    ),
    alternatives=(_drop_test_small, _drop_test_table),
    hides=("train.drop",),
    hints=(
        "Call it with some thousand labels and p = 0.2: how many become null, what do the others become, what happens "
        "to y, "
        "and what does another generator give?",
        "Assert: y is unchanged; out is y or null everywhere; the share of null is within 0.05 of p; two generators "
        "give "
        "different results.",
    ),
)

EXERCISES = (
    TIME_EMBEDDING,
    FILM,
    DROP_LABELS,
    TRAIN_STEP,
    EMA_CLASS,
    SAMPLE,
    CLASS_ACCURACY,
    CONDITIONING_BITS,
    MY_DROP_TEST,
)
