"""Exercises of lesson 07: ControlNet's zero convolutions, their gradients, and control that is measured."""

import math
from collections.abc import Callable, Sequence
from copy import copy as shallow_copy
from copy import deepcopy
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from condiff_ref.shapes import pad

from .compare import close, oddity, plain
from .draws import integer, pictures, randn, times
from .exercise import Answer, Exercise, Fact, Mistake, Wrong, need
from .guard import Guard
from .lesson02 import (
    Spy,
    _digits,
    _gen,
    _steps_by,
    _train_labels,
    _train_loss,
    _train_moves,
    _train_noised,
    _train_see,
    _train_single,
    _train_times,
    _with_graph,
    _with_item,
)
from .testing import test_exercise
from .xray import random_abar

# --- the reference answers, as the solutions show them ----------------------------------------------------------------


def zero_conv_grads(h: Tensor, W: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of a 1x1 convolution z = W h + b, given the gradient g of the loss at its output: dW, db, dh.

    h (B, C, H, W), W (O, C), g (B, O, H, W) -> dW (O, C), db (O,), dh (B, C, H, W). By hand, without autograd.
    """
    dW = torch.einsum("bohw,bchw->oc", g, h)
    return dW, g.sum(dim=(0, 2, 3)), torch.einsum("oc,bohw->bchw", W, g)


def build_control(base: nn.Module, channels: int, hint_channels: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The three parts of a control branch on `base`, a block from (B, channels, H, W) to the same shape: copy, z_in,
    z_out, for the output base(x) + z_out(copy(x + z_in(hint))).

    copy: the block again, with weights of its own that start equal and can be trained, even if `base` is frozen
    already. z_in: 1x1 convolution from hint_channels to channels; z_out: 1x1 convolution from channels to channels;
    both with weight and bias 0. Freezes `base`.
    """
    copy = deepcopy(base).requires_grad_(True)
    base.requires_grad_(False)
    like = next(base.parameters())  # for device and dtype
    z_in, z_out = (nn.Conv2d(n, channels, 1).to(like) for n in (hint_channels, channels))
    for conv in (z_in, z_out):
        nn.init.zeros_(conv.weight)
        nn.init.zeros_(conv.bias)
    return copy, z_in, z_out


def wakeup_table(loss: Callable[[], Tensor], parts: list[nn.Module], opt: torch.optim.Optimizer, steps: int) -> Tensor:
    """Which parts get a gradient at which step of training: bool (steps, len(parts)).

    Each step: loss() computes the loss anew; its backward pass is looked at; then the optimiser moves the weights. True
    where any parameter of a part has a gradient that is not exactly 0, from that step's backward pass alone. `opt`
    holds all that may learn; a parameter that is frozen has grad None.
    """
    table = torch.zeros(steps, len(parts), dtype=torch.bool)
    for step in range(steps):
        opt.zero_grad()
        loss().backward()
        for i, part in enumerate(parts):
            table[step, i] = any(p.grad is not None and bool((p.grad != 0).any()) for p in part.parameters())
        opt.step()
    return table


def edge(x: Tensor) -> Tensor:
    """The outline of what is drawn: 1 where the 3x3 neighbourhood of a pixel holds both ink and background, else 0.

    x (B, 1, H, W) in [-1, 1], ink above 0. Around the picture lies background. -> (B, 1, H, W), of x's dtype.
    """
    ink = F.pad((x > 0).to(x), [1] * 4)
    return F.max_pool2d(ink, 3, stride=1) + F.max_pool2d(-ink, 3, stride=1)


def occupancy(x: Tensor, cell: int) -> Tensor:
    """A coarse map of where there is anything: 1 all over each cell x cell block that holds any ink, else 0.

    x (B, 1, H, W) in [-1, 1], ink above 0, H and W multiples of cell. -> (B, 1, H, W), of x's dtype.
    """
    coarse = F.max_pool2d((x > 0).to(x), cell)
    return F.interpolate(coarse, scale_factor=cell, mode="nearest")


def control_optimizer(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW, with weight decay 0.01, over the parameters of the control alone. model.base is the frozen network,
    model.control all that is to be trained."""
    return torch.optim.AdamW(model.control.parameters(), lr=lr, weight_decay=0.01)


def control_step(
    model: nn.Module,
    opt: torch.optim.Optimizer,
    x0: Tensor,
    hint: Tensor,
    y: Tensor,
    p: float,
    abar: Tensor,
    gen: Generator,
) -> float:
    """One step of the optimiser on the loss mean |model(x_t, t, y, hint) - eps|^2; returns this loss.

    x0 (B, ...), hint (B, ...) made from x0, integer y (B,), abar (T + 1,). Each example has its own t, uniform over
    1 .. T, its own standard normal eps, and its label becomes model.null with probability p; the hint always stays. All
    is drawn with gen, on the CPU, and then goes where x0 is. model.base gets no gradients and stays in eval mode,
    model.control is in training mode.
    """
    model.base.eval()
    model.control.train()
    abar = abar.to(x0)
    t = torch.randint(1, len(abar), (len(x0),), generator=gen).to(x0.device)
    eps = torch.randn(x0.shape, generator=gen, dtype=x0.dtype).to(x0.device)
    xt = pad(abar[t].sqrt(), x0) * x0 + pad((1 - abar[t]).sqrt(), x0) * eps
    dropped = (torch.rand(y.shape, generator=gen) < p).to(y.device)
    loss = F.mse_loss(model(xt, t, torch.where(dropped, model.null, y), hint), eps)
    opt.zero_grad()
    loss.backward()
    opt.step()
    return loss.item()


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union, picture by picture: the pixels set in both over those set in either; 1 where both
    pictures are empty.

    a, b (B, 1, H, W) of zeros and ones -> (B,) in [0, 1].
    """
    both, either = (a * b).flatten(1).sum(1), torch.maximum(a, b).flatten(1).sum(1)
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def fidelity(drawn: Tensor, hints: Tensor) -> tuple[float, float]:
    """How well pictures keep to their hints, and what that is worth: (mean IoU with the own hint, mean IoU with the
    hints of all others, which is chance).

    drawn: the hints taken from the drawn pictures, and hints: those asked for, both (B, 1, H, W) of zeros and ones,
    B >= 2.
    """
    shifted = [iou(drawn, hints.roll(k, dims=0)).mean() for k in range(len(hints))]
    return shifted[0].item(), torch.stack(shifted[1:]).mean().item()


def with_strength(base: Callable, control: Callable, strength: float) -> Callable:
    """The controlled network f(xt, t, y, hint), with the control's voice made louder or softer.

    control(xt, t, y, hint) is a list of residuals, which base(xt, t, y, residuals) adds where they belong. Strength 1
    is as trained, 0 the base, whatever the hint.
    """

    def network(xt: Tensor, t: Tensor, y: Tensor, hint: Tensor) -> Tensor:
        return base(xt, t, y, [strength * residual for residual in control(xt, t, y, hint)])

    return network


def my_control_test(build_control: Callable) -> None:
    """Raise an AssertionError if build_control(base, channels, hint_channels) does not do what it should; else return
    None."""
    base = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.SiLU()).requires_grad_(False)
    before = deepcopy(base.state_dict())
    copy, z_in, z_out = build_control(base, 3, 2)
    gen = torch.Generator().manual_seed(0)
    x, hint = torch.randn(2, 3, 4, 4, generator=gen), torch.randn(2, 2, 4, 4, generator=gen)
    out = base(x) + z_out(copy(x + z_in(hint)))
    assert torch.equal(out, base(x)), "at first the control says nothing"
    assert torch.equal(copy(x), base(x)), "the copy starts as the base"
    assert not z_in(hint).any(), "at first the copy does not hear the hint"
    assert all(p.requires_grad for part in (copy, z_in, z_out) for p in part.parameters()), "all of it can learn"
    assert not any(p.requires_grad for p in base.parameters()), "the base is frozen"
    with torch.no_grad():
        for part in (copy, z_in, z_out):
            for p in part.parameters():
                p.add_(1.0)
    assert all(torch.equal(before[name], value) for name, value in base.state_dict().items()), "weights are not shared"
    assert z_in(hint).shape == x.shape
    other = base(x) + z_out(copy(x + z_in(-hint)))
    assert not torch.allclose(base(x) + z_out(copy(x + z_in(hint))), other), "awake, it hears the hint"


# --- what several exercises share -------------------------------------------------------------------------------------

RATE = 0.1


def _tried(look: Callable[[], object], whole: bool = False) -> object:
    """What comes of it, as plain data, or the type of the error, or all of its first line."""
    try:
        return plain(look())
    except Exception as error:  # the learner's, or ours at a result that cannot be used
        first = str(error).partition("\n")[0]
        kind = first.partition(":")[0]
        return first if whole else kind if kind.endswith("Error") else type(error).__name__


def _filled(module: nn.Module, g: Generator, size: float = 0.5) -> nn.Module:
    """The module in float64, with weights drawn from g."""
    module = module.double()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(size * randn(g, *p.shape))
    return module


def _first_wrong(
    answer: Answer, references: dict[str, Callable], looks: Sequence[tuple[str, Callable[[Answer], object]]]
) -> object:
    """What the first look shows in which the answer differs from the references."""
    for name, look in looks:
        mine = _tried(lambda look=look: look(answer))
        due = _tried(lambda look=look: look(Answer(references, Guard(20.0))))
        if not close(mine, due, rtol=1e-5, atol=1e-8):
            return [name, mine]
    return "right"


# --- 07.1 zero_conv_grads ---------------------------------------------------------------------------------------------


def _grads_inputs(g: Generator) -> dict:
    return {"zero_conv_grads": dict(h=randn(g, 4, 3, 2, 5), W=randn(g, 6, 3), g=randn(g, 4, 6, 2, 5))}


def _pixel(*values: float) -> Tensor:
    """One example of one pixel."""
    return torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1)


def _rows(value: Tensor) -> str:
    return str([[round(v, 4) + 0.0 for v in row] for row in value.tolist()])


def _row(value: Tensor) -> str:
    return ", ".join(f"{v + 0.0:.4g}" for v in value.flatten().tolist())


def _grads_by_hand(answer: Answer, g: Generator) -> None:
    h, delta = _pixel(1, 2), _pixel(3, -1)
    dW, db, dh = answer(h, torch.zeros(2, 2, dtype=torch.float64), delta)
    due = torch.tensor([[3.0, 6.0], [-1.0, -2.0]], dtype=torch.float64)
    if not close(plain(dW), due) or not close(plain(db), delta.flatten()) or dh.any():
        raise Wrong(
            f"for one pixel, h = (1, 2), g = (3, -1), W = 0 you return dW = {_rows(dW)}, db = ({_row(db)}), "
            f"dh = ({_row(dh)})",
            expected="dW = [[3, 6], [-1, -2]], db = (3, -1), dh = 0",
        )


def _grads_awake(answer: Answer, g: Generator) -> None:
    h, delta = randn(g, 1, 3, 1, 1), randn(g, 1, 3, 1, 1)
    moved = -RATE * delta.flatten()[:, None] * h.flatten()[None]  # W after one step of gradient descent from 0
    dh = answer(h, moved, delta)[2]
    need(dh, -RATE * delta.square().sum() * h, "one step after W = 0, with the same g, dh must be -0.1 |g|^2 h")


def _grads_silent(answer: Answer, g: Generator) -> None:
    dW, db, _ = answer(torch.zeros(4, 3, 2, 5, dtype=torch.float64), randn(g, 6, 3), torch.ones(4, 6, 2, 5).double())
    if dW.any():
        raise Wrong(f"with h = 0 the loss does not depend on W, yet your dW is up to {float(dW.abs().max()):.3g}")
    if not db.all():
        raise Wrong("with h = 0 and g = 1 your db is 0: b is added whatever h is, and does learn")


def _grads_count(answer: Answer, g: Generator) -> None:
    ones = torch.ones(4, 3, 2, 5, dtype=torch.float64), torch.ones(6, 3).double(), torch.ones(4, 6, 2, 5).double()
    dW, db, dh = answer(*ones)
    for name, got, due, why in (
        ("dW", dW, 40, "W acts at each of the 40 places"),
        ("db", db, 40, "b acts at each of the 40 places"),
        ("dh", dh, 6, "an entry of h reaches 6 output channels, at its own place"),
    ):
        if not close(plain(got), torch.full_like(got, due)):
            raise Wrong(
                f"where all of h, W and g are 1, in 4 examples of 2 x 5 pixels with 6 output channels, the entries of "
                f"{name} are {float(got.flatten()[0]):.4g}; {why}",
                expected=str(due),
            )


def _grads_slopes(answer: Answer, g: Generator) -> None:
    """The loss sum(g z) is linear in each of h, W and b: moving one entry by 1 shows its slope."""
    h, W, g_out = _grads_inputs(g)["zero_conv_grads"].values()
    b = randn(g, 6)

    def loss(h: Tensor, W: Tensor, b: Tensor) -> Tensor:
        return (g_out * F.conv2d(h, W[:, :, None, None], b)).sum()

    grads = dict(zip(("W", "b", "h"), answer(h, W, g_out), strict=True))
    for name, at in (("W", (4, 1)), ("W", (0, 2)), ("b", (5,)), ("b", (2,)), ("h", (3, 2, 1, 4)), ("h", (1, 0, 0, 3))):
        values = {"h": h.clone(), "W": W.clone(), "b": b.clone()}
        values[name][at] += 1
        slope = float(loss(**values) - loss(h, W, b))
        got = float(grads[name][at])
        if abs(got - slope) > 1e-6 * (1 + abs(slope)):
            raise Wrong(
                f"{name}{list(at)} + 1 changes sum(g z) by {slope:.5g}; your d{name}{list(at)} is {got:.5g}",
                expected=f"{slope:.5g}",
            )


def _grads_by(
    w: str | Callable = "bohw,bchw->oc",
    b: Callable[[Tensor, Tensor], Tensor] = lambda g, h: g.sum((0, 2, 3)),
    x: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda W, g, h: torch.einsum("oc,bohw->bchw", W, g),
    scale: Callable[[Tensor], float] = lambda g: 1.0,
) -> tuple[Callable]:
    def zero_conv_grads(h: Tensor, W: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dW = torch.einsum(w, g, h) if isinstance(w, str) else w(h, W, g)
        return scale(g) * dW, scale(g) * b(g, h), x(W, g, h)

    return (zero_conv_grads,)


def _grads_minus(h: Tensor, W: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    return tuple(-grad for grad in zero_conv_grads(h, W, g))


def _grads_matrices(h: Tensor, W: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    columns, slopes = (v.movedim(1, -1).reshape(-1, v.shape[1]) for v in (h, g))  # places x channels
    dh = (slopes @ W).view(len(h), *h.shape[2:], -1).movedim(-1, 1)
    return slopes.T @ columns, slopes.sum(0), dh


def _grads_loop(h: Tensor, W: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    dW, db, dh = torch.zeros_like(W), torch.zeros_like(W[:, 0]), torch.zeros_like(h)
    for i in range(len(h)):
        for row in range(h.shape[2]):
            for column in range(h.shape[3]):
                one, slope = h[i, :, row, column], g[i, :, row, column]
                dW += torch.outer(slope, one)
                db += slope
                dh[i, :, row, column] = W.T @ slope
    return dW, db, dh


def _grads_see(answer: Answer, g: Generator) -> object:
    cases = [
        (randn(g, 4, 3, 2, 5), randn(g, 3, 3), randn(g, 4, 3, 2, 5)),  # where W and its transpose both fit
        tuple(_grads_inputs(g)["zero_conv_grads"].values()),
        (randn(g, 2, 3, 2, 2), torch.zeros(6, 3, dtype=torch.float64), randn(g, 2, 6, 2, 2)),
    ]
    return [_tried(lambda case=case: answer(*case)) for case in cases]


ZERO_CONV_GRADS = Exercise(
    id="07.1",
    names=("zero_conv_grads",),
    references=(zero_conv_grads,),
    inputs=_grads_inputs,
    facts=(
        Fact("h = (1, 2), g = (3, -1), W = 0", _grads_by_hand, "z = W h + b for two numbers: work it out on paper"),
        Fact(
            "after one step the layer passes gradients on",
            _grads_awake,
            "how much of z_o is h_c? So how much of g_o comes back to h_c?",
        ),
        Fact("with h = 0, W stands still and b learns", _grads_silent, "which of W and b is multiplied by h?"),
        Fact(
            "one weight, many places: their gradients add up",
            _grads_count,
            "the same W and b act at every pixel of every example",
        ),
        Fact("the slopes of a loss", _grads_slopes, "what happens to sum(g z) if one entry grows by 1?"),
    ),
    mistakes=(
        Mistake(
            "dW transposed",
            "dW is transposed: its rows belong to the outputs and its columns to the inputs, as in W. It is g times h "
            "transposed, not h times g transposed.",
            _grads_by("bohw,bchw->co"),
        ),
        Mistake(
            "mean over the places",
            "dW and db are averaged over the pixels. The same weight acts at every pixel, and what it does at each "
            "adds up: sums. (A mean, if there is one, is in g already.)",
            _grads_by(scale=lambda g: 1 / g[0, 0].numel()),
        ),
        Mistake(
            "mean over the batch",
            "dW and db are averaged over the batch. Gradients add up over the examples; where the loss is a mean, g "
            "holds the 1/B already.",
            _grads_by(scale=lambda g: 1 / len(g)),
        ),
        Mistake(
            "mean over batch and places",
            "dW and db are averaged over the batch and the pixels. Gradients add up over all places where a weight is "
            "used; where the loss is a mean, g holds that factor already.",
            _grads_by(scale=lambda g: g.shape[1] / g.numel()),
        ),
        Mistake(
            "batch not summed",
            "dW and db still have the batch axis: there is one W and one b for all examples, and their gradients add "
            "up.",
            _grads_by("bohw,bchw->boc", lambda g, h: g.sum((2, 3))),
        ),
        Mistake(
            "first example only",
            "dW and db come from the first example alone.",
            _grads_by(lambda h, W, g: torch.einsum("bohw,bchw->oc", g[:1], h[:1]), lambda g, h: g[:1].sum((0, 2, 3))),
        ),
        Mistake(
            "db through h",
            "db is multiplied by h. In z = W h + b nothing multiplies b: db is g, summed over batch and pixels, even "
            "where h = 0.",
            _grads_by(b=lambda g, h: torch.einsum("bohw,bchw->o", g, h)),
        ),
        Mistake(
            "db averaged",
            "db is a mean over batch and pixels; b is added at every place, so its gradient is the sum of g.",
            _grads_by(b=lambda g, h: g.mean((0, 2, 3))),
        ),
        Mistake(
            "db not summed over the pixels",
            "db is summed over the batch only: one b per channel serves all pixels, so sum over these, too.",
            _grads_by(b=lambda g, h: g.sum(0)),
        ),
        Mistake(
            "dW times W",
            "dW is multiplied by W, so a layer of zeros could never learn. The derivative of W h with respect to W "
            "does not contain W: it is h.",
            _grads_by(lambda h, W, g: W * torch.einsum("bohw,bchw->oc", g, h)),
        ),
        Mistake(
            "dh always 0",
            "dh is 0 always. That holds only as long as W = 0: dh is W transposed times g, so the layers below wake up "
            "as soon as W has moved.",
            _grads_by(x=lambda W, g, h: torch.zeros_like(h)),
        ),
        Mistake(
            "dh without W",
            "dh is g summed over its channels, as if all entries of W were 1. With W = 0 nothing may come through: "
            "multiply by W transposed.",
            _grads_by(x=lambda W, g, h: g.sum(1, keepdim=True).expand_as(h)),
        ),
        Mistake(
            "W not transposed",
            "In dh you use W where its transpose is due: g has the output's channels, and dh needs the input's. "
            "(With as many outputs as inputs this raises no error.)",
            _grads_by(x=lambda W, g, h: torch.einsum("co,bohw->bchw", W, g)),
        ),
        Mistake(
            "minus",
            "All three have the opposite sign: asked for are the gradients, not the step down.",
            (_grads_minus,),
        ),
    ),
    alternatives=((_grads_matrices,), (_grads_loop,)),
    hints=(
        "At one pixel of one example z_o = sum_c W_oc h_c + b_o. Differentiate by W_oc, by b_o and by h_c, multiply by "
        "g_o, and sum over all that is not among the indices of the result.",
        'dW = einsum("bohw,bchw->oc", g, h); db = g.sum((0, 2, 3)); dh = einsum("oc,bohw->bchw", W, g).',
    ),
    probe=_grads_see,
    by_probe=True,
)

# --- 07.2 build_control -----------------------------------------------------------------------------------------------

_PARTS = ("copy", "z_in", "z_out")


def _block(g: Generator, channels: int) -> nn.Module:
    """A block to be controlled, with random weights."""
    layers = nn.Conv2d(channels, channels, 3, padding=1), nn.SiLU(), nn.Conv2d(channels, channels, 1)
    return _filled(nn.Sequential(*layers), g).float()


@dataclass(frozen=True)
class _Built:
    """What build_control returned, and a case to try it on."""

    base: nn.Module
    before: dict[str, Tensor]
    parts: tuple[nn.Module, nn.Module, nn.Module]
    x: Tensor
    hint: Tensor

    def out(self) -> Tensor:
        copy, z_in, z_out = self.parts
        return self.base(self.x) + z_out(copy(self.x + z_in(self.hint)))

    def named(self) -> list[tuple[str, nn.Module]]:
        return list(zip(_PARTS, self.parts, strict=True))


def _fitting(answer: Answer, g: Generator, frozen: bool) -> _Built:
    """Raises Wrong where the parts are not of the right kind and size."""
    channels, hint_channels = 4, integer(g, 1, 3)
    base = _block(g, channels).requires_grad_(not frozen)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    x, hint = randn(g, 2, channels, 5, 3).float(), randn(g, 2, hint_channels, 5, 3).float()
    parts = answer(base, channels, hint_channels)
    if not isinstance(parts, tuple | list) or len(parts) != 3 or not all(isinstance(p, nn.Module) for p in parts):
        raise Wrong("build_control must return three modules: copy, z_in, z_out")
    for name, conv, due in (
        ("z_in", parts[1], (channels, hint_channels, 1, 1)),
        ("z_out", parts[2], (channels, channels, 1, 1)),
    ):
        if not isinstance(conv, nn.Conv2d):
            raise Wrong(f"{name} is of type {type(conv).__name__}: it must be a convolution, nn.Conv2d")
        if conv.weight.shape != due:
            raise Wrong(
                f"with channels = {channels} and hint_channels = {hint_channels} the weight of {name} has shape "
                f"{tuple(conv.weight.shape)}",
                expected=str(due),
            )
        if conv.bias is None:
            raise Wrong(f"{name} has no bias: it needs one, which learns even where its input is 0")
    if parts[0](x).shape != x.shape:
        raise Wrong(f"for x of shape {tuple(x.shape)} copy(x) has shape {tuple(parts[0](x).shape)}")
    return _Built(base, before, tuple(parts), x, hint)


def _built(answer: Answer, g: Generator, frozen: bool) -> _Built:
    try:
        return _fitting(answer, g, frozen)
    except Wrong:
        raise Wrong("see above: the three parts do not fit together yet") from None


def _control_kind(answer: Answer, g: Generator) -> None:
    for frozen in (False, True):
        _fitting(answer, g, frozen)


def _control_zero(answer: Answer, g: Generator) -> None:
    built = _built(answer, g, frozen=False)
    for name, conv in built.named()[1:]:
        for what, value in (("weight", conv.weight), ("bias", conv.bias)):
            if value.any():
                raise Wrong(
                    f"the {what} of {name} is not 0: its largest entry is {float(value.detach().abs().max()):.3g}"
                )


def _control_silent(answer: Answer, g: Generator) -> None:
    built = _built(answer, g, frozen=False)
    drift = float((built.out() - built.base(built.x)).detach().abs().max())
    if drift:
        raise Wrong(
            f"before any training the controlled block differs from base(x) by up to {drift:.3g}: it must be equal to "
            "the last bit"
        )


def _control_copy(answer: Answer, g: Generator) -> None:
    built = _built(answer, g, frozen=False)
    copy = built.parts[0]
    if not torch.equal(copy(built.x), built.base(built.x)):
        raise Wrong("copy(x) is not base(x) at the start: the copy takes over what base has learnt")
    if not all(torch.equal(value, built.before[name]) for name, value in built.base.state_dict().items()):
        raise Wrong("build_control changed the weights of base")
    with torch.no_grad():
        for p in copy.parameters():
            p.add_(1.0)
    if not all(torch.equal(value, built.before[name]) for name, value in built.base.state_dict().items()):
        raise Wrong("training the copy changes base: the two share their weights")


def _control_base(answer: Answer, g: Generator) -> None:
    built = _built(answer, g, frozen=False)
    left = [name for name, p in built.base.named_parameters() if p.requires_grad]
    if left:
        raise Wrong(f"base can still be trained: {', '.join(left)} require gradients")


def _control_learns(answer: Answer, g: Generator) -> None:
    for frozen in (False, True):
        built = _built(answer, g, frozen)
        for name, part in built.named():
            stuck = [p for p, value in part.named_parameters() if not value.requires_grad]
            if stuck:
                when = "where base came frozen, " if frozen else ""
                raise Wrong(f"{when}{name} cannot be trained: {', '.join(stuck)} do not require gradients")


def _control_wakes(answer: Answer, g: Generator) -> None:
    built = _built(answer, g, frozen=True)
    target = built.base(built.x).detach() + randn(g, *built.x.shape).float()
    learning = [p for _, part in built.named() for p in part.parameters() if p.requires_grad]
    if not learning:
        raise Wrong("nothing can be trained")
    opt = torch.optim.SGD(learning, lr=RATE)
    for number, due in ((1, {"z_out"}), (2, set(_PARTS))):
        opt.zero_grad()
        F.mse_loss(built.out(), target).backward()
        awake = {name for name, part in built.named() if _any_gradient(part)}
        if awake != due:
            raise Wrong(
                f"in backward pass {number} of training {_list(awake)} get a gradient",
                expected=f"{_list(due)} get one",
            )
        opt.step()


def _any_gradient(part: nn.Module) -> bool:
    return any(p.grad is not None and bool(p.grad.any()) for p in part.parameters())


def _list(names: set[str]) -> str:
    return ", ".join(name for name in _PARTS if name in names) or "no parts"


def _zeroed(*convs: nn.Module) -> None:
    for conv in convs:
        for p in conv.parameters():
            nn.init.zeros_(p)


def _control_by(
    copy: Callable[[nn.Module], nn.Module] = lambda base: deepcopy(base).requires_grad_(True),
    freeze: Callable[..., object] = lambda base, copy, z_in, z_out: base.requires_grad_(False),
    zero: Callable[[nn.Module, nn.Module], object] = _zeroed,
    conv: Callable[[int, int], nn.Module] = lambda n, m: nn.Conv2d(n, m, 1),
    first: Callable[[int, int], int] = lambda channels, hint_channels: hint_channels,
    order: tuple[int, int, int] = (0, 1, 2),
) -> tuple[Callable]:
    def build_control(base: nn.Module, channels: int, hint_channels: int) -> tuple[nn.Module, ...]:
        parts = [copy(base), conv(first(channels, hint_channels), channels), conv(channels, channels)]
        zero(*parts[1:])
        freeze(base, *parts)
        return tuple(parts[i] for i in order)

    return (build_control,)


def _anew(base: nn.Module) -> nn.Module:
    copy = deepcopy(base)
    for module in copy.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return copy.requires_grad_(True)


def _all_zero(base: nn.Module) -> nn.Module:
    copy = deepcopy(base).requires_grad_(True)
    _zeroed(copy)
    return copy


def _shallow(base: nn.Module) -> nn.Module:
    return shallow_copy(base)


def _weights_only(*convs: nn.Module) -> None:
    for conv in convs:
        nn.init.zeros_(conv.weight)


def _biases_only(*convs: nn.Module) -> None:
    for conv in convs:
        nn.init.zeros_(conv.bias)


def _freeze_all_zeros(base: nn.Module, copy: nn.Module, z_in: nn.Module, z_out: nn.Module) -> None:
    for part in (base, z_in, z_out):
        part.requires_grad_(False)


def _control_state(base: nn.Module, channels: int, hint_channels: int) -> tuple[nn.Module, ...]:
    for p in base.parameters():
        p.requires_grad = False
    copy = deepcopy(base)
    copy.load_state_dict(base.state_dict())
    for p in copy.parameters():
        p.requires_grad = True
    made = []
    for n in (hint_channels, channels):
        conv = nn.Conv2d(n, channels, kernel_size=1)
        with torch.no_grad():
            conv.weight *= 0
            conv.bias *= 0
        made.append(conv)
    return copy, *made


class _Zero(nn.Conv2d):
    """A convolution that resets itself to 0."""

    def __init__(self, n: int, m: int):
        super().__init__(n, m, (1, 1))

    def reset_parameters(self) -> None:
        self.weight.data.zero_()
        self.bias.data.fill_(0)


def _control_classes(base: nn.Module, channels: int, hint_channels: int) -> list[nn.Module]:
    twin = deepcopy(base)
    for mine, theirs in zip(twin.parameters(), base.parameters(), strict=True):
        mine.requires_grad_(True)
        theirs.requires_grad_(False)
    return [twin, _Zero(hint_channels, channels), _Zero(channels, channels)]


def _control_see(answer: Answer, g: Generator) -> object:
    """Categories: weights that are drawn at random count as such."""
    seen: list[object] = []
    for frozen in (False, True):
        base = _block(g, 4).requires_grad_(not frozen)
        before, x, hint = deepcopy(base.state_dict()), randn(g, 2, 4, 5, 3).float(), randn(g, 2, 2, 5, 3).float()

        def look(base: nn.Module = base, before: dict = before, x: Tensor = x, hint: Tensor = hint) -> object:
            parts = list(answer(base, 4, 2))
            copy = parts[0]
            found = dict(
                shapes=[[list(p.shape) for p in part.parameters()] for part in parts],
                zeros=[[bool(p.any()) for p in part.parameters()] for part in parts],
                trained=[[p.requires_grad for p in part.parameters()] for part in (base, *parts)],
                shared=[
                    [a is b, a.data_ptr() == b.data_ptr()]
                    for a, b in zip(copy.parameters(), base.parameters(), strict=False)
                ],
                same=_tried(lambda: torch.equal(copy(x), base(x))),
                base=[torch.equal(value, before[name]) for name, value in base.state_dict().items()],
            )
            out = _tried(lambda: torch.equal(base(x) + parts[2](copy(x + parts[1](hint))), base(x)))
            return found | dict(is_base=copy is base, one=parts[1] is parts[2], out=out)

        seen.append(_tried(look))
    return seen


BUILD_CONTROL = Exercise(
    id="07.2",
    names=("build_control",),
    references=(build_control,),
    inputs=lambda g: {},
    universal=False,
    kind="module",
    points=2,
    facts=(
        Fact(
            "returns a block and two 1x1 convolutions that fit it",
            _control_kind,
            "z_in goes from hint_channels to channels, z_out from channels to channels; each has a bias",
        ),
        Fact("z_in and z_out are all zeros", _control_zero, "PyTorch draws weight and bias at random: zero both"),
        Fact("before training the output is base's, to the last bit", _control_silent, "what must z_out say at first?"),
        Fact("the copy starts as base, with weights of its own", _control_copy, "what does b = a do with an object?"),
        Fact("base is frozen", _control_base, "requires_grad_ of a module sets all of its parameters"),
        Fact(
            "copy, z_in and z_out can be trained, even if base came frozen",
            _control_learns,
            "deepcopy copies requires_grad along with everything else",
        ),
        Fact(
            "z_out learns first, copy and z_in one step later",
            _control_wakes,
            "07.1: what comes through z_out while its weight is 0, and what after one step?",
        ),
    ),
    mistakes=(
        Mistake(
            "copied after freezing",
            "The copy was made after base was frozen, and deepcopy copies requires_grad=False as well: the copy never "
            "gets a gradient, and nothing tells you so. Switch it on again for the copy.",
            _control_by(copy=lambda base: deepcopy(base.requires_grad_(False))),
        ),
        Mistake(
            "a frozen base copied as it is",
            "Where base comes frozen already, as trained networks do, your copy is frozen with it and never learns: "
            "deepcopy copies requires_grad=False. Switch it on for the copy.",
            _control_by(copy=deepcopy),
        ),
        Mistake(
            "the copy is base",
            "copy is base itself under a second name (an assignment copies nothing): freezing the one freezes the "
            "other, and nothing but the zero convolutions can learn.",
            _control_by(copy=lambda base: base),
        ),
        Mistake(
            "shallow copy",
            "copy.copy makes a new module around the same weights: training the copy would train base. It takes "
            "deepcopy.",
            _control_by(copy=_shallow),
        ),
        Mistake(
            "base not frozen",
            "base is not frozen: training the control would change the network it is meant to leave alone.",
            _control_by(freeze=lambda *parts: None),
        ),
        Mistake(
            "the copy frozen, not base",
            "The wrong one is frozen: it is the copy that learns, and base that stays as it is.",
            _control_by(freeze=lambda base, copy, z_in, z_out: [base.requires_grad_(), copy.requires_grad_(False)]),
        ),
        Mistake(
            "zero convolutions frozen",
            "z_in and z_out are frozen at 0: they must start at 0 and learn, or the control stays silent for ever.",
            _control_by(freeze=_freeze_all_zeros),
        ),
        Mistake(
            "neither is zero",
            "Neither z_in nor z_out is set to 0: the control disturbs base from the first moment, with random weights.",
            _control_by(zero=lambda z_in, z_out: None),
        ),
        Mistake(
            "z_out not zero",
            "z_out is not zero: the output moves away from base before anything is learnt. z_in = 0 keeps out only "
            "the hint; copy(x) still comes through.",
            _control_by(zero=lambda z_in, z_out: _zeroed(z_in)),
        ),
        Mistake(
            "z_in not zero",
            "z_in is not zero. The output is base's all the same, thanks to z_out, but the copy no longer starts as "
            "base: it sees x plus a random picture.",
            _control_by(zero=lambda z_in, z_out: _zeroed(z_out)),
        ),
        Mistake(
            "biases left random",
            "The weights are zero, but the biases are not: PyTorch draws these at random, too, and they are added to "
            "every pixel.",
            _control_by(zero=_weights_only),
        ),
        Mistake(
            "weights left random",
            "The biases are zero, but the weights are not.",
            _control_by(zero=_biases_only),
        ),
        Mistake(
            "no bias",
            "The zero convolutions have no bias. They should: where h = 0, the bias is all that can learn (07.1).",
            _control_by(conv=lambda n, m: nn.Conv2d(n, m, 1, bias=False), zero=lambda *convs: _weights_only(*convs)),
        ),
        Mistake(
            "3x3",
            "The convolutions have a kernel of 3 x 3; asked for is 1 x 1, one matrix at every pixel.",
            _control_by(conv=lambda n, m: nn.Conv2d(n, m, 3, padding=1)),
        ),
        Mistake(
            "hint channels forgotten",
            "z_in expects an input with `channels` channels; the hint has hint_channels.",
            _control_by(first=lambda channels, hint_channels: channels),
        ),
        Mistake(
            "the copy drawn anew",
            "The copy has base's layers with fresh random weights: it should start with what base has learnt.",
            _control_by(copy=_anew),
        ),
        Mistake(
            "the copy zeroed",
            "The copy's weights are set to 0 as well. Two layers of zeros in a row never wake up (only the bias of "
            "the last one learns); the zero convolutions go around a live copy.",
            _control_by(copy=_all_zero),
        ),
        Mistake(
            "z_in and z_out exchanged",
            "The last two are returned in the other order: copy, z_in, z_out.",
            _control_by(order=(0, 2, 1)),
        ),
    ),
    alternatives=((_control_state,), (_control_classes,)),
    hints=(
        "Which comes first, the copy or the freezing, and what if base was frozen before you got it? Which "
        "parameters does a convolution have?",
        "copy = deepcopy(base).requires_grad_(True); base.requires_grad_(False); z_in = nn.Conv2d(hint_channels, "
        "channels, 1) and z_out = nn.Conv2d(channels, channels, 1); nn.init.zeros_ on weight and bias of both.",
    ),
    probe=_control_see,
    hides=("controlnet.ControlNet", "controlnet.ZeroConv"),
)

# --- 07.3 wakeup_table ------------------------------------------------------------------------------------------------

_BRANCH = ("z_out", "the copy", "z_in", "the hint's encoder")


@dataclass(frozen=True)
class _Rig:
    """A training problem with the table that is due. `why` is told where a cell of it is missed."""

    what: str
    loss: Callable[[], Tensor]
    parts: list[nn.Module]
    opt: torch.optim.Optimizer
    names: tuple[str, ...]
    due: list[str]  # a row each, "1" for a gradient
    why: str = ""
    calls: list[int] = field(default_factory=list)
    when: bool | None = None  # `why` is about this value in the wrong place


def _branch(
    g: Generator,
    due: list[str],
    what: str,
    why: str = "",
    zero: tuple[int, ...] = (0, 2),
    frozen: bool = False,
    factor: float = 1.0,
    decay: bool = False,
) -> _Rig:
    """base(x) + z_out(copy(x + z_in(encoder(hint)))) on random data."""
    base = _filled(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.SiLU()), g)
    copy = deepcopy(base).requires_grad_(not frozen)
    base.requires_grad_(False)
    encoder = _filled(nn.Sequential(nn.Conv2d(2, 3, 1), nn.SiLU()), g)
    z_in, z_out = (_filled(nn.Conv2d(3, 3, 1), g) for _ in range(2))
    parts = [z_out, copy, z_in, encoder]
    for i in zero:
        _zeroed(parts[i])
    x, hint, target = randn(g, 2, 3, 4, 3), randn(g, 2, 2, 4, 3), randn(g, 2, 3, 4, 3)
    calls: list[int] = []

    def loss() -> Tensor:
        calls.append(1)
        return factor * F.mse_loss(base(x) + z_out(copy(x + z_in(encoder(hint)))), target)

    learning = [p for part in parts for p in part.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(learning, lr=1e-2, weight_decay=0.5) if decay else torch.optim.SGD(learning, lr=RATE)
    return _Rig(what, loss, parts, opt, _BRANCH, due, why, calls)


def _rig_two_zeros(g: Generator) -> _Rig:
    why = "while W = 0, dh = W^T g = 0, so what lies below a zero layer waits until that layer has moved"
    return _branch(g, ["1000", "1110", "1111", "1111"], "with z_in and z_out zero", why)


def _rig_one_zero(g: Generator) -> _Rig:
    why = "one zero layer delays what is below it by one step"
    return _branch(g, ["1000", "1111", "1111"], "with z_out alone zero", why, zero=(0,))


def _rig_no_zero(g: Generator) -> _Rig:
    return _branch(g, ["1111", "1111"], "with no zero layer", "nothing holds the gradient back", zero=())


def _rig_frozen(g: Generator) -> _Rig:
    why = "parameters that do not require gradients have grad None, for ever, and gradients pass through to z_in"
    return _branch(g, ["1000", "1010", "1011"], "with a copy that was made after freezing", why, frozen=True)


def _rig_series(g: Generator) -> _Rig:
    why = "of two zero layers in a row only the bias of the last one ever gets a gradient; that is part of z_out"
    return _branch(g, ["1000"] * 3, "with a copy that is zero as well", why, zero=(0, 1, 2))


def _rig_small(g: Generator) -> _Rig:
    why = "the loss is multiplied by 1e-9, so gradients are small; a small gradient is not 0"
    return replace(_branch(g, ["1000", "1110", "1111"], "with a tiny loss", why, factor=1e-9), when=False)


def _rig_decay(g: Generator) -> _Rig:
    why = "AdamW's weight decay moves weights whose gradient is 0; asked for are gradients"
    return replace(_branch(g, ["1000", "1110", "1111"], "with AdamW", why, decay=True), when=True)


def _rig_turns(g: Generator) -> _Rig:
    """Two parts that the loss needs in turn, with gradients left over from before."""
    parts = [_filled(nn.Linear(2, 1), g) for _ in range(2)]
    x, calls = randn(g, 3, 2), []
    for p in (p for part in parts for p in part.parameters()):
        p.grad = torch.ones_like(p)

    def loss() -> Tensor:
        calls.append(1)
        return (parts[(len(calls) - 1) % 2](x) ** 2).mean()

    opt = torch.optim.SGD([p for part in parts for p in part.parameters()], lr=RATE)
    why = "each row is about one backward pass: gradients of earlier ones must be gone"
    what = "with two parts that the loss needs in turn"
    return _Rig(what, loss, parts, opt, ("the first part", "the second part"), ["10", "01", "10", "01"], why, calls)


def _rig_cancel(g: Generator) -> _Rig:
    """Gradients of sum 0, of zeros, and of negative entries; the biases have none."""
    parts = [_filled(nn.Linear(2, 1), g) for _ in range(3)]
    difference = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)

    def loss() -> Tensor:
        return (parts[0].weight @ difference).sum() + parts[1].weight.sum() * 0 - parts[2].weight.sum()

    opt = torch.optim.SGD([p for part in parts for p in part.parameters()], lr=RATE)
    why = "the gradients of the three weights are (1, -1), (0, 0) and (-1, -1), and the biases have none"
    names = ("the first part", "the second part", "the third part")
    return _Rig("with three parts of one layer each", loss, parts, opt, names, ["101", "101"], why)


_RIGS = (
    _rig_two_zeros,
    _rig_one_zero,
    _rig_no_zero,
    _rig_frozen,
    _rig_series,
    _rig_turns,
    _rig_decay,
    _rig_small,
    _rig_cancel,
)


def _cells(rows: Sequence[str]) -> Tensor:
    return torch.tensor([[cell == "1" for cell in row] for row in rows])


def _table_of(*makers: Callable[[Generator], _Rig]) -> Callable[[Answer, Generator], None]:
    def test(answer: Answer, g: Generator) -> None:
        for make in makers:
            rig = make(g)
            got, due = answer(rig.loss, rig.parts, rig.opt, len(rig.due)), _cells(rig.due)
            _of_the_right_kind(got, due)
            if torch.equal(got, due):
                continue
            row, part = (int(i) for i in (got != due).nonzero()[0])
            says = bool(got[row, part])
            why = f"; {rig.why}" if rig.when in (None, says) else ""
            raise Wrong(
                f"{rig.what}, your table says {says} for {rig.names[part]} in row {row}{why}",
                expected=f"rows {', '.join(rig.due)} for {', '.join(rig.names)}",
            )

    return test


def _of_the_right_kind(got: object, due: Tensor) -> None:
    odd = oddity(got, due)
    if odd:
        raise Wrong(f"for {len(due)} steps and {due.shape[1]} parts: {odd}")
    if got.dtype != torch.bool:
        raise Wrong(f"the table has dtype {got.dtype} where torch.bool is due")


def _table_steps(answer: Answer, g: Generator) -> None:
    rig = _rig_two_zeros(g)
    moves: list[int] = []
    step = rig.opt.step
    rig.opt.step = lambda *args: (moves.append(len(rig.calls)), step(*args))[1]  # type: ignore[method-assign]
    answer(rig.loss, rig.parts, rig.opt, 4)
    if len(rig.calls) != 4:
        raise Wrong(f"for 4 steps loss() was called {len(rig.calls)} times: once a step, as the weights have moved")
    if len(moves) != 4:
        raise Wrong(f"for 4 steps opt.step() was called {len(moves)} times")


def _table_by(
    reads: Callable[[nn.Module], object] = lambda part: any(
        p.grad is not None and bool((p.grad != 0).any()) for p in part.parameters()
    ),
    order: str = "zero back read step",
    done: Callable[[Tensor], Tensor] = lambda table: table,
    dtype: torch.dtype = torch.bool,
) -> tuple[Callable]:
    def wakeup_table(loss: Callable, parts: list, opt: torch.optim.Optimizer, steps: int) -> Tensor:
        table = torch.zeros(steps, len(parts), dtype=dtype)

        def read(row: int) -> None:
            for i, part in enumerate(parts):
                table[row, i] = reads(part)

        for row in range(steps):
            for word in order.split():
                if word == "read":
                    read(row)
                else:
                    {"zero": opt.zero_grad, "back": lambda: loss().backward(), "step": opt.step}[word]()
        return done(table)

    return (wakeup_table,)


def _table_moved(loss: Callable, parts: list, opt: torch.optim.Optimizer, steps: int) -> Tensor:
    """Whether weights moved, which is not whether they had a gradient."""
    rows = []
    for _ in range(steps):
        before = [[p.detach().clone() for p in part.parameters()] for part in parts]
        opt.zero_grad()
        loss().backward()
        opt.step()
        rows.append(
            [
                any(not torch.equal(a, b) for a, b in zip(part.parameters(), old, strict=True))
                for part, old in zip(parts, before, strict=True)
            ]
        )
    return torch.tensor(rows)


def _table_one_loss(loss: Callable, parts: list, opt: torch.optim.Optimizer, steps: int) -> Tensor:
    value, rows = loss(), []
    for _ in range(steps):
        opt.zero_grad()
        value.backward()
        rows.append([_any_gradient(part) for part in parts])
        opt.step()
    return torch.tensor(rows)


def _table_lists(loss: Callable, parts: list, opt: torch.optim.Optimizer, steps: int) -> Tensor:
    rows = []
    for _ in range(steps):
        for part in parts:
            part.zero_grad(set_to_none=False)
        loss().backward()
        grads = [[p.grad for p in part.parameters() if p.grad is not None] for part in parts]
        rows.append([max([float(grad.abs().max()) for grad in some], default=0.0) > 0 for some in grads])
        opt.step()
    return torch.tensor(rows, dtype=torch.bool)


def _table_autograd(loss: Callable, parts: list, opt: torch.optim.Optimizer, steps: int) -> Tensor:
    columns = []
    for _ in range(steps):
        opt.zero_grad(set_to_none=True)
        loss().backward()
        columns.append(
            torch.stack(
                [
                    torch.tensor(
                        sum(
                            p.grad.count_nonzero().item()
                            for p in part.parameters()
                            if p.requires_grad and p.grad is not None
                        )
                        > 0
                    )
                    for part in parts
                ]
            )
        )
        opt.step()
        opt.zero_grad()
    return torch.stack(columns)


def _table_see(answer: Answer, g: Generator) -> object:
    seen: list[object] = []
    for make in _RIGS:
        rig = make(g)
        table = _tried(lambda rig=rig: answer(rig.loss, rig.parts, rig.opt, len(rig.due)))
        seen += [table, str(table.dtype) if isinstance(table, Tensor) else "", len(rig.calls)]
    return seen


WAKEUP_TABLE = Exercise(
    id="07.3",
    names=("wakeup_table",),
    references=(wakeup_table,),
    inputs=lambda g: {},
    universal=False,
    facts=(
        Fact(
            "two zero layers around a live copy",
            _table_of(_rig_two_zeros),
            "each step: clear, backward pass of a fresh loss(), look, move the weights",
        ),
        Fact("one zero layer, or none", _table_of(_rig_one_zero, _rig_no_zero), "does each row see new weights?"),
        Fact("a copy that was made after freezing", _table_of(_rig_frozen), "what is p.grad of a frozen parameter?"),
        Fact(
            "two zero layers in a row: only the last bias learns",
            _table_of(_rig_series),
            "a part counts as soon as any of its parameters has a gradient",
        ),
        Fact(
            "each row is about its own backward pass", _table_of(_rig_turns), "what does backward() do with old grads?"
        ),
        Fact("gradients count, not movement", _table_of(_rig_decay), "what does AdamW do with a gradient of 0?"),
        Fact(
            "a gradient counts whatever its size and sign",
            _table_of(_rig_small, _rig_cancel),
            "not exactly 0, in any entry",
        ),
        Fact("one loss and one step of the optimiser per row", _table_steps, "steps rows: steps calls of each"),
    ),
    mistakes=(
        Mistake(
            "no zero_grad",
            "Gradients are never cleared, so backward() adds to those of earlier steps: what once had a gradient keeps "
            "one for ever.",
            _table_by(order="back read step"),
        ),
        Mistake(
            "no step",
            "The optimiser never moves the weights (opt.step() is missing): every row is row 0 over again, and what "
            "lies below a zero layer never wakes up.",
            _table_by(order="zero back read"),
        ),
        Mistake(
            "read after clearing",
            "You look after zero_grad(): nothing is left to see. Look between backward() and zero_grad().",
            _table_by(order="back step zero read"),
        ),
        Mistake(
            "read before the backward pass",
            "You look before the backward pass: each row shows the gradients of the step before it, and row 0 whatever "
            "was left over from earlier.",
            _table_by(order="read zero back step"),
        ),
        Mistake(
            "zeros count",
            "You ask whether there is a gradient tensor (p.grad is not None). The copy has one from the first backward "
            "pass, and all of it is 0, since dh = W^T g with W = 0.",
            _table_by(lambda part: any(p.grad is not None for p in part.parameters())),
        ),
        Mistake(
            "requires_grad",
            "You ask which parameters may learn (requires_grad), not which have a gradient now.",
            _table_by(lambda part: any(p.requires_grad for p in part.parameters())),
        ),
        Mistake(
            "frozen parameters forgotten",
            "Your code fails where a parameter is frozen: its grad is None, not a tensor of zeros.",
            _table_by(lambda part: any(bool((p.grad != 0).any()) for p in part.parameters())),
        ),
        Mistake(
            "all parameters",
            "You ask whether all parameters of a part have a gradient; one is enough. (Of two zero layers in a row "
            "only a bias learns.)",
            _table_by(lambda part: all(p.grad is not None and bool((p.grad != 0).any()) for p in part.parameters())),
        ),
        Mistake(
            "the first parameter only",
            "You look at the first parameter of a part, its weight, and miss that the bias has a gradient.",
            _table_by(lambda part: (p := next(part.parameters())).grad is not None and bool((p.grad != 0).any())),
        ),
        Mistake(
            "tolerance",
            "You count gradients above a threshold only. Through two layers that have just left 0 they are tiny and "
            "yet not 0; a layer that waits has a gradient of exactly 0.",
            _table_by(
                lambda part: any(p.grad is not None and bool((p.grad.abs() > 1e-8).any()) for p in part.parameters())
            ),
        ),
        Mistake(
            "sum of the entries",
            "You add up the entries of a gradient and ask whether that is 0: entries of opposite signs cancel.",
            _table_by(lambda part: any(p.grad is not None and bool(p.grad.sum() != 0) for p in part.parameters())),
        ),
        Mistake(
            "positive entries",
            "You look for positive entries (grad > 0): a gradient may be negative. Ask for entries other than 0.",
            _table_by(lambda part: any(p.grad is not None and bool((p.grad > 0).any()) for p in part.parameters())),
        ),
        Mistake(
            "movement",
            "You look at which weights moved. AdamW's weight decay moves weights whose gradient is exactly 0, and "
            "momentum goes on without one.",
            (_table_moved,),
        ),
        Mistake(
            "one loss for all steps",
            "loss() is called once, before the loop: its graph is used up after one backward pass, and knows the old "
            "weights only. Call it in every step.",
            (_table_one_loss,),
        ),
        Mistake(
            "transposed",
            "The table is transposed: a row per step, a column per part.",
            _table_by(done=lambda table: table.T),
        ),
        Mistake(
            "not bool",
            "The table holds numbers; asked for are truth values (dtype=torch.bool).",
            _table_by(dtype=torch.float32),
        ),
    ),
    alternatives=((_table_lists,), (_table_autograd,)),
    hints=(
        "Four things in each step, in this order: clear the old gradients, backward pass of a fresh loss, look, "
        "opt.step(). For a parameter p: is p.grad there at all, and is any entry of it other than 0?",
        "opt.zero_grad(); loss().backward(); table[step, i] = any(p.grad is not None and (p.grad != 0).any() for p in "
        "part.parameters()); opt.step().",
    ),
    probe=_table_see,
)

# --- 07.4 edge, occupancy ---------------------------------------------------------------------------------------------

_GREYS = (-1.0, -1.0, -1.0, -0.6, -0.2, 0.0, 0.15, 0.3, 0.45, 0.8, 1.0)


def _drawings(g: Generator, n: int = 4, height: int = 6, width: int = 8) -> Tensor:
    """Pictures (n, 1, height, width) in all greys, 0 among them; with a blot or nearly empty."""
    greys = torch.tensor(_GREYS, dtype=torch.float64)
    x = greys[torch.randint(len(greys), (n, 1, height, width), generator=g)]
    x[::3, :, 1:4, 2:6] = x[1::3, :, :3, :5] = 0.3  # some at the border
    x[2::3] = torch.where(torch.rand(x[2::3].shape, generator=g) < 0.8, -1.0, x[2::3])
    return x


def _hints_inputs(g: Generator) -> dict:
    return {"edge": dict(x=_drawings(g)), "occupancy": dict(x=_drawings(g) - 0.3, cell=2)}


def _dots(height: int, width: int, *places: tuple[int, int]) -> Tensor:
    x = torch.full((1, 1, height, width), -1.0, dtype=torch.float64)
    for row, column in places:
        x[0, 0, row, column] = 1
    return x


def _picture(x: Tensor) -> str:
    """# for 1, . for 0, + for what lies between."""
    return "\n".join("".join("." if v <= 0 else "#" if v > 0.999 else "+" for v in row) for row in x[0, 0].tolist())


def _hints_binary(answer: Answer, g: Generator) -> None:
    for name, rest in (("edge", ()), ("occupancy", (2,))):
        out = answer.call(name, _drawings(g), *rest)
        strange = [v for v in out.unique().tolist() if v not in (0.0, 1.0)]
        if strange:
            raise Wrong(f"{name}: the result holds {strange[0]:.4g}; only 0 and 1 are due")


def _hints_ink(answer: Answer, g: Generator) -> None:
    for name, rest in (("edge", ()), ("occupancy", (3,))):
        for value, ink in ((0.1, True), (0.4, True), (0.0, False), (-0.3, False)):
            empty = _dots(6, 9)
            x = empty.clone()
            x[0, 0, 3:6, 3:6] = value
            seen = not torch.equal(answer.call(name, x, *rest), answer.call(name, empty, *rest))
            if seen != ink:
                word = "is ink: it lies above 0" if ink else "is background: it does not lie above 0"
                raise Wrong(f"{name}: a square of {value:g} on a background of -1 {word}")


def _edge_dot(answer: Answer, g: Generator) -> None:
    due = _dots(5, 6, *((row, column) for row in (1, 2, 3) for column in (2, 3, 4))).clamp(min=0)
    _same_picture(answer.call("edge", _dots(5, 6, (2, 3))), due, "for a single pixel of ink your outline is")


def _same_picture(got: Tensor, due: Tensor, what: str) -> None:
    if not close(plain(got), due):
        raise Wrong(f"{what}\n{_picture(got)}", expected=f"\n{_picture(due)}")


def _edge_square(answer: Answer, g: Generator) -> None:
    square = [(row, column) for row in range(2, 6) for column in range(2, 6)]
    due = _dots(8, 8, *((r, c) for r in range(1, 7) for c in range(1, 7) if not (2 < r < 5 and 2 < c < 5))).clamp(min=0)
    what = "for a square of 4 x 4 pixels your outline is"
    _same_picture(answer.call("edge", _dots(8, 8, *square)), due, what)


def _edge_border(answer: Answer, g: Generator) -> None:
    """All ink: the outline is the frame, as around the picture lies background. All background: there is none."""
    full = torch.ones(1, 1, 5, 6, dtype=torch.float64)
    due = full.clone()
    due[:, :, 1:-1, 1:-1] = 0
    _same_picture(answer.call("edge", full), due, "for a picture full of ink your outline is")
    if answer.call("edge", -full).any():
        raise Wrong("an empty picture has an outline")


def _edge_loop(x: Tensor) -> Tensor:
    """Pixel by pixel."""
    out = torch.zeros_like(x)
    n, _, height, width = x.shape
    for i in range(n):
        for row in range(height):
            for column in range(width):
                seen = {
                    bool(0 <= r < height and 0 <= c < width and x[i, 0, r, c] > 0)
                    for r in (row - 1, row, row + 1)
                    for c in (column - 1, column, column + 1)
                }
                out[i, 0, row, column] = len(seen) == 2
    return out


def _edge_everywhere(answer: Answer, g: Generator) -> None:
    x = _drawings(g, n=2)
    got, due = answer.call("edge", x), _edge_loop(x)
    if close(plain(got), due):
        return
    i, _, row, column = (int(v) for v in (got != due).nonzero()[0])
    area = F.pad(x[i : i + 1], [1] * 4, value=-1.0)[:, :, row : row + 3, column : column + 3]
    raise Wrong(
        f"in a drawing in greys your outline is {float(got[i, 0, row, column]):g} at row {row}, column {column}; "
        f"the ink around it is\n{_picture((area > 0).to(area))}",
        expected=f"{float(due[i, 0, row, column]):g}",
    )


def _occupancy_dot(answer: Answer, g: Generator) -> None:
    for cell, height, width, at, block in (
        (2, 4, 6, (1, 2), ((0, 2), (2, 4))),
        (3, 6, 9, (4, 8), ((3, 6), (6, 9))),
        (4, 4, 8, (3, 0), ((0, 4), (0, 4))),
    ):
        due = torch.zeros(1, 1, height, width, dtype=torch.float64)
        due[:, :, slice(*block[0]), slice(*block[1])] = 1
        got = answer.call("occupancy", _dots(height, width, at), cell)
        if got.shape != due.shape:
            raise Wrong(f"for x of shape {tuple(due.shape)} and cell = {cell} the map has shape {tuple(got.shape)}")
        what = f"with cell = {cell} and a single pixel of ink at row {at[0]}, column {at[1]} your map is"
        _same_picture(got, due, what)


def _occupancy_one(answer: Answer, g: Generator) -> None:
    x = _drawings(g)
    need(answer.call("occupancy", x, 1), (x > 0).double(), "with cell = 1 the map is the ink, pixel by pixel")


def _occupancy_blocks(answer: Answer, g: Generator) -> None:
    x, cell = _drawings(g, height=6, width=12) - 0.7, (2, 3, 6)[integer(g, 0, 2)]
    got = answer.call("occupancy", x, cell)
    for row in range(0, 6, cell):
        for column in range(0, 12, cell):
            block, mine = (v[:, 0, row : row + cell, column : column + cell].flatten(1) for v in (x, got))
            due = (block > 0).any(1).double()[:, None].expand_as(mine)
            if not close(plain(mine), due):
                raise Wrong(
                    f"with cell = {cell} the block from row {row}, column {column} on must be all 1 where it holds any "
                    "ink, else all 0"
                )


def _edge_by(
    ink: Callable[[Tensor], Tensor] = lambda x: (x > 0).to(x),
    mark: Callable[[Tensor], Tensor] = lambda ink: F.max_pool2d(ink, 3, 1) + F.max_pool2d(-ink, 3, 1),
    frame: Callable[[Tensor], Tensor] = lambda ink: F.pad(ink, [1] * 4),
    done: Callable[[Tensor], Tensor] = lambda out: out,
) -> tuple[Callable, Callable]:
    return (lambda x: done(mark(frame(ink(x)))), occupancy)


def _occupancy_by(
    ink: Callable[[Tensor], Tensor] = lambda x: (x > 0).to(x),
    pool: Callable[[Tensor, int], Tensor] = F.max_pool2d,
    spread: Callable[[Tensor, int, Tensor], Tensor] = lambda coarse, cell, x: F.interpolate(coarse, scale_factor=cell),
) -> tuple[Callable, Callable]:
    return edge, lambda x, cell: spread(pool(ink(x), cell), cell, x)


def _inner(ink: Tensor) -> Tensor:
    return ink[:, :, 1:-1, 1:-1]


def _cross(ink: Tensor) -> Tensor:
    height, width = ink.shape[2] - 2, ink.shape[3] - 2
    around = [ink[:, :, r : r + height, c : c + width] for r, c in ((0, 1), (1, 0), (1, 1), (1, 2), (2, 1))]
    return torch.stack(around).amax(0) - torch.stack(around).amin(0)


def _sobel(ink: Tensor) -> Tensor:
    kernel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]).to(ink)
    both = F.conv2d(ink, torch.stack([kernel, kernel.T])[:, None])
    return (both.abs().sum(1, keepdim=True) > 0).to(ink)


def _edge_counts(x: Tensor) -> Tensor:
    ones = torch.ones(1, 1, 3, 3, dtype=x.dtype, device=x.device)
    count = F.conv2d((x > 0).to(x.dtype), ones, padding=1)
    return ((count > 0.5) & (count < 8.5)).to(x.dtype)


def _occupancy_folded(x: Tensor, cell: int) -> Tensor:
    b, c, height, width = x.shape
    blocks = x.reshape(b, c, height // cell, cell, width // cell, cell)
    full = (blocks.amax(dim=(3, 5), keepdim=True) > 0).expand_as(blocks)
    return full.reshape(x.shape).to(x.dtype)


def _occupancy_loop(x: Tensor, cell: int) -> Tensor:
    out = torch.zeros_like(x)
    for row in range(0, x.shape[2], cell):
        for column in range(0, x.shape[3], cell):
            at = (slice(None), slice(None), slice(row, row + cell), slice(column, column + cell))
            out[at] = (x[at] > 0).flatten(1).any(1).to(x)[:, None, None, None]
    return out


def _hints_see(answer: Answer, g: Generator) -> object:
    x = _drawings(g, n=9, height=6, width=12)

    def edges(answer: Answer) -> object:
        kept = x.clone()
        out = answer.call("edge", kept)
        return [out, str(out.dtype), kept]

    def maps(answer: Answer) -> object:
        outs = [answer.call("occupancy", x - 0.3, cell) for cell in (2, 3)]
        return [*outs, str(outs[0].dtype)]

    return _first_wrong(answer, dict(edge=edge, occupancy=occupancy), [("edge", edges), ("occupancy", maps)])


HINTS = Exercise(
    id="07.4",
    names=("edge", "occupancy"),
    references=(edge, occupancy),
    inputs=_hints_inputs,
    batch=("x",),
    facts=(
        Fact("edge, occupancy: zeros and ones only", _hints_binary, "first decide what is ink, then look around"),
        Fact("edge, occupancy: ink is what lies above 0", _hints_ink, "pixels run from -1 to 1: where is the middle?"),
        Fact("edge of a single pixel", _edge_dot, "which 3x3 neighbourhoods hold the pixel and background as well?"),
        Fact("edge of a square", _edge_square, "pixels within the ink and pixels outside can both be part of it"),
        Fact("edge where the ink touches the border", _edge_border, "background lies around the picture"),
        Fact("edge at every pixel of a drawing", _edge_everywhere, "all nine pixels count, also the corners"),
        Fact("occupancy of a single pixel", _occupancy_dot, "the map is as large as x: each block of one value"),
        Fact("occupancy with cell = 1", _occupancy_one, "blocks of one pixel"),
        Fact("occupancy of every block", _occupancy_blocks, "one pixel of ink in a block is enough"),
    ),
    mistakes=(
        Mistake(
            "edge: threshold 0.5",
            "edge: you count as ink what lies above 0.5. That is the middle of [0, 1]; these pictures run from -1 to "
            "1, and their middle is 0.",
            _edge_by(lambda x: (x > 0.5).to(x)),
        ),
        Mistake(
            "edge: 0 is ink",
            "edge: you count pixels of exactly 0 as ink (>=); ink lies above 0.",
            _edge_by(lambda x: (x >= 0).to(x)),
        ),
        Mistake(
            "edge: all but -1 is ink",
            "edge: you count as ink all that is not -1, down to the darkest grey; ink lies above 0.",
            _edge_by(lambda x: (x > -1).to(x)),
        ),
        Mistake(
            "edge: nothing around the picture",
            "edge: beyond the border you see nothing instead of background (max_pool2d pads with -infinity), so ink "
            "that touches the border has no outline there. Put a frame of background around the picture first.",
            _edge_by(frame=lambda ink: ink, mark=lambda i: F.max_pool2d(i, 3, 1, 1) + F.max_pool2d(-i, 3, 1, 1)),
        ),
        Mistake(
            "edge: border lost",
            "edge: the outermost pixels are always 0: your result was made smaller by the window and then filled up "
            "with zeros. Put the frame around the picture before looking, not after.",
            _edge_by(frame=lambda ink: ink, done=lambda out: F.pad(out, [1] * 4)),
        ),
        Mistake(
            "edge: grey",
            "edge: you never decide what is ink, so the result is a contrast in greys. As a hint it gives away more of "
            "the picture than its outline.",
            _edge_by(lambda x: x, frame=lambda x: F.pad(x, [1] * 4, value=-1.0)),
        ),
        Mistake(
            "edge: the ink itself",
            "edge: you return the ink itself, not its outline. The hint then gives away the whole drawing, and "
            "following it says nothing.",
            _edge_by(mark=_inner),
        ),
        Mistake(
            "edge: x itself",
            "edge: you return x itself. The hint then gives away the picture, and following it says nothing.",
            _edge_by(lambda x: x, mark=_inner),
        ),
        Mistake(
            "edge: inner rim",
            "edge: you keep only the ink that touches background; background that touches ink belongs to the outline, "
            "too.",
            _edge_by(mark=lambda ink: _inner(ink) + F.max_pool2d(-ink, 3, 1)),
        ),
        Mistake(
            "edge: outer rim",
            "edge: you keep only the background that touches ink; ink that touches background belongs to the outline, "
            "too.",
            _edge_by(mark=lambda ink: F.max_pool2d(ink, 3, 1) - _inner(ink)),
        ),
        Mistake(
            "edge: dilated ink",
            "edge: you return the ink made one pixel thicker: its inside is not part of the outline.",
            _edge_by(mark=lambda ink: F.max_pool2d(ink, 3, 1)),
        ),
        Mistake(
            "edge: four neighbours",
            "edge: you look at the pixels above, below, left and right only; a 3x3 neighbourhood has its corners, too.",
            _edge_by(mark=_cross),
        ),
        Mistake(
            "edge: slopes",
            "edge: you look for slopes (Sobel). In a line one pixel wide the slopes of both sides cancel, and a single "
            "pixel is missed in its middle.",
            _edge_by(mark=_sobel),
        ),
        Mistake(
            "edge: truth values",
            "edge: you return truth values; networks take numbers: 0 and 1 of x's dtype.",
            _edge_by(done=lambda out: out > 0),
        ),
        Mistake(
            "edge: -1 and 1",
            "edge: you return -1 and 1; asked for are 0 and 1.",
            _edge_by(done=lambda out: 2 * out - 1),
        ),
        Mistake(
            "occupancy: threshold 0.5",
            "occupancy: you count as ink what lies above 0.5. That is the middle of [0, 1]; these pictures run from -1 "
            "to 1, and their middle is 0.",
            _occupancy_by(lambda x: (x > 0.5).to(x)),
        ),
        Mistake(
            "occupancy: share of ink",
            "occupancy: you return the share of ink in each block. Asked for is whether there is any: 0 or 1.",
            _occupancy_by(pool=F.avg_pool2d),
        ),
        Mistake(
            "occupancy: majority",
            "occupancy: you ask whether most of a block is ink; a single pixel is enough.",
            _occupancy_by(pool=lambda ink, cell: (F.avg_pool2d(ink, cell) > 0.5).to(ink)),
        ),
        Mistake(
            "occupancy: not blown up",
            "occupancy: your map has one pixel per block. Blow it up to the size of x, so that the network can lay it "
            "over the picture.",
            _occupancy_by(spread=lambda coarse, cell, x: coarse),
        ),
        Mistake(
            "occupancy: blurred",
            "occupancy: blowing up with mode='bilinear' blurs the blocks into greys: mode='nearest' repeats them.",
            _occupancy_by(spread=lambda coarse, cell, x: F.interpolate(coarse, scale_factor=cell, mode="bilinear")),
        ),
        Mistake(
            "occupancy: tiled",
            "occupancy: you lay copies of the small map side by side (repeat); each of its pixels must become a block "
            "(repeat_interleave along both axes, or interpolate).",
            _occupancy_by(spread=lambda coarse, cell, x: coarse.repeat(1, 1, cell, cell)),
        ),
        Mistake(
            "occupancy: one pixel per block",
            "occupancy: you look at the first pixel of each block only (every cell-th row and column), and miss ink "
            "anywhere else in it.",
            _occupancy_by(pool=lambda ink, cell: ink[:, :, ::cell, ::cell]),
        ),
        Mistake(
            "occupancy: number of blocks",
            "occupancy: you take cell for the number of blocks along each side; it is the size of a block in pixels.",
            _occupancy_by(
                pool=F.adaptive_max_pool2d, spread=lambda coarse, cell, x: F.interpolate(coarse, x.shape[2:])
            ),
        ),
        Mistake(
            "occupancy: the ink itself",
            "occupancy: you return the ink itself, pixel by pixel, and not the blocks that hold any.",
            _occupancy_by(pool=lambda ink, cell: ink, spread=lambda coarse, cell, x: coarse),
        ),
    ),
    alternatives=((_edge_loop, _occupancy_loop), (_edge_counts, _occupancy_folded)),
    hints=(
        "First make the ink, zeros and ones. The largest and the smallest value in each 3x3 window tell whether it "
        "holds both; for the map, the largest value of each block is enough.",
        "edge: ink = F.pad((x > 0).to(x), [1] * 4); max_pool2d(ink, 3, stride=1) minus the minimum, which is "
        "-max_pool2d(-ink, 3, stride=1). occupancy: max_pool2d(ink, cell), then interpolate(..., scale_factor=cell, "
        "mode='nearest').",
    ),
    hides=("scenes.outlines",),
    probe=_hints_see,
    by_probe=True,
)

# --- 07.5 control_optimizer, control_step -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seen:
    """One call of a controlled network: the hint that came, and whether the base was in training mode."""

    hint: Tensor
    base_training: bool


class ControlSpy(nn.Module):
    """A frozen base, whose running statistics move in training mode, and a control that predicts as Spy does."""

    def __init__(self, control: Spy, dtype: torch.dtype = torch.float64):
        super().__init__()
        self.null = control.null
        self.base = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1)).to(dtype).requires_grad_(False).eval()
        self.control = control
        self.seen: list[_Seen] = []

    def forward(self, xt: Tensor, t: Tensor, y: Tensor, hint: Tensor) -> Tensor:
        training = any(module.training for module in self.base.modules())
        self.seen.append(_Seen(torch.as_tensor(hint).detach().clone(), training))
        out = self.control(xt, t, y)
        self.base(xt.detach().flatten(1)[:, :1].to(self.base[0].weight))
        return out


class _AsTrainStep:
    """The learner's control_step, asked as 02.4 asks train_step: its model is the control, its hint 0 and 1."""

    def __init__(self, answer: Answer):
        self._answer, self._wholes = answer, {}
        self.reseed = answer.reseed

    def __call__(self, model: Spy, opt, x0: Tensor, y: Tensor, p: float, abar: Tensor, gen: Generator) -> object:
        if model not in self._wholes:  # one base for all steps of a model
            self._wholes[model] = ControlSpy(model, x0.dtype)
        whole = self._wholes[model]
        return self._answer.call("control_step", whole, opt, x0, _ink(x0), y, p, abar, gen)


def _ink(x0: Tensor) -> Tensor:
    return (x0 > 0).to(x0)


def _step_as(fact: Callable) -> Callable[[Answer, Generator], None]:
    """A fact of 02.4 about this step."""
    return lambda answer, g: fact(_AsTrainStep(answer), g)


def _step_inputs(g: Generator) -> dict:
    model, (x0,) = ControlSpy(Spy(g)), pictures(g, 1)
    return {
        "control_optimizer": dict(model=model, lr=0.003),
        "control_step": dict(
            model=model,
            opt=torch.optim.SGD(model.control.parameters(), lr=RATE),
            x0=x0,
            hint=_ink(x0),
            y=_digits(g, len(x0)),
            p=0.5,
            abar=random_abar(g),
            gen=_gen(g),
        ),
    }


def _optimizer_holds(answer: Answer, g: Generator) -> None:
    model = ControlSpy(Spy(g))
    opt = answer.call("control_optimizer", model, 0.003)
    if not isinstance(opt, torch.optim.Optimizer):
        raise Wrong(f"control_optimizer must return an optimiser, and returned {type(opt).__name__}")
    held = [p for group in opt.param_groups for p in group["params"]]
    for name, p in model.named_parameters():
        inside = any(p is other for other in held)
        if name.startswith("base.") and inside:
            raise Wrong(f"the optimiser holds {name}, which belongs to the frozen base")
        if name.startswith("control.") and not inside:
            raise Wrong(f"the optimiser does not hold {name}")


def _optimizer_kind(answer: Answer, g: Generator) -> None:
    lr = 10 ** -(2 + integer(g, 0, 20) / 10)
    opt = answer.call("control_optimizer", ControlSpy(Spy(g)), lr)
    if not isinstance(opt, torch.optim.AdamW):
        raise Wrong(f"the optimiser is {type(opt).__name__}, not AdamW")
    for group in opt.param_groups:
        for name, due in (("lr", lr), ("weight_decay", 0.01)):
            if not math.isclose(float(group[name]), due, rel_tol=1e-9):
                raise Wrong(
                    f"with lr = {lr:.4g} the optimiser has {name} = {float(group[name]):.4g}", expected=f"{due:.4g}"
                )


def _several_steps(
    answer: Answer, g: Generator, steps: int = 6, b: int = 16, p: float = 0.5, ready: Callable = lambda model: None
) -> tuple[ControlSpy, Tensor, list[tuple[_Seen, Tensor, object]]]:
    """The model, x0, whose ink is the hint, and for each step what it saw of hint and labels, and what came back."""
    model, x0, y, gen = ControlSpy(Spy(g)), randn(g, b, 3, 2), _digits(g, b), _gen(g)
    x0[:, 0, 0] = x0[:, 0, 0].abs() + 0.1  # no hint is empty
    hint, seen = _ink(x0), []
    ready(model)
    opt = torch.optim.SGD(model.control.parameters(), lr=1e-3)
    for _ in range(steps):
        model.seen.clear()
        model.control.asked.clear()
        loss = answer.call("control_step", model, opt, x0.clone(), hint.clone(), y, p, random_abar(g), gen)
        if not model.seen:
            raise Wrong("the model was not called")
        seen.append((model.seen[-1], model.control.asked[-1].y, loss))
    return model, x0, seen


def _step_hint(answer: Answer, g: Generator) -> None:
    _, x0, found = _several_steps(answer, g)
    hint = _ink(x0)
    for seen, y, _ in found:
        if seen.hint.shape != hint.shape:
            raise Wrong(f"the model was given a hint of shape {tuple(seen.hint.shape)}, not {tuple(hint.shape)}")
        wrong = (seen.hint != hint).flatten(1).any(1)
        if not wrong.any():
            continue
        if torch.equal(seen.hint, x0):
            raise Wrong("the hint that the model sees is x0 itself: it must be the hint that you were given")
        dropped = y == 10
        if close(wrong, dropped):
            raise Wrong("where the label is dropped the hint is changed with it: the hint always stays")
        if torch.equal(seen.hint.flatten(1).sum(1).sort().values, hint.flatten(1).sum(1).sort().values):
            raise Wrong("the hints come in another order: examples are trained with the hints of others")
        strange = seen.hint[wrong].flatten()
        at = float(strange[~((strange == 0) | (strange == 1))][:1].sum()) if len(strange) else 0.0
        what = f", with values such as {at:.3g}" if at else ""
        raise Wrong(f"{int(wrong.sum())} of {len(hint)} hints came changed{what}; each must come as it is")


def _step_base(answer: Answer, g: Generator) -> None:
    for ready, came in (
        (lambda model: model.train(), "all of the model came in training mode"),
        (lambda model: model.eval(), "all of the model came in eval mode"),
    ):
        model, _, found = _several_steps(answer, g, steps=2, ready=ready)
        if any(seen.base_training for seen, _, _ in found):
            drift = float(model.base[1].running_mean.abs().max())
            raise Wrong(
                f"{came}, and the base was in training mode in your step: its running statistics moved by {drift:.2g}, "
                "though its weights are frozen"
            )
        if any(m.training for m in model.base.modules()):
            raise Wrong(f"{came}, and after your step the base is in training mode: it stays in eval mode")
        if not all(asked.training for asked in model.control.asked) or not model.control.training:
            raise Wrong(f"{came}, and the control was not in training mode in your step")


def _step_frozen(answer: Answer, g: Generator) -> None:
    model, _, _ = _several_steps(answer, g, steps=2)
    for name, p in model.base.named_parameters():
        if p.requires_grad:
            raise Wrong(f"your step makes the base trainable: {name} requires gradients after it")
    for name, p in model.control.named_parameters():
        if not p.requires_grad:
            raise Wrong(f"your step freezes the control: {name} requires no gradients after it")


def _optimizer_by(make: Callable[[nn.Module, float], torch.optim.Optimizer]) -> tuple[Callable, Callable]:
    return make, control_step


def _modes(model: nn.Module) -> None:
    model.base.eval()
    model.control.train()


def _step_by(
    learn: Callable = _with_item,
    time: Callable[[int, int, Generator], Tensor] = lambda n, T, gen: torch.randint(1, T + 1, (n,), generator=gen),
    noise: Callable[[Tensor, Generator], Tensor] = lambda x0, gen: torch.randn(x0.shape, generator=gen, dtype=x0.dtype),
    drop: Callable[..., Tensor] = lambda y, p, gen: torch.rand(y.shape, generator=gen) < p,
    null: Callable[[nn.Module], int] = lambda model: model.null,
    loss: Callable[..., Tensor] = lambda out, eps, x0: F.mse_loss(out, eps),
    ready: Callable[[nn.Module], object] = _modes,
    sigma: Callable[[Tensor], Tensor] = lambda a: (1 - a).sqrt(),
    axes: Callable[[Tensor, Tensor], Tensor] = pad,
    hints: Callable[..., Tensor] = lambda hint, dropped, a, sigma, eps: hint,
) -> tuple[Callable, Callable]:
    def control_step(model, opt, x0, hint, y, p, abar, gen):
        abar = abar.to(x0.dtype)
        ready(model)
        t, eps, dropped = time(len(x0), len(abar) - 1, gen), noise(x0, gen), drop(y, p, gen)
        a, s = axes(abar[t].sqrt(), x0), axes(sigma(abar[t]), x0)
        hint = hints(hint, dropped, a, s, eps)
        return learn(opt, loss(model(a * x0 + s * eps, t, torch.where(dropped, null(model), y), hint), eps, x0))

    return control_optimizer, control_step


def _step_one_by_one(model, opt, x0, hint, y, p, abar, gen):
    model.train()
    model.base.train(False)
    opt.zero_grad()
    labels = torch.tensor([model.null if torch.rand((), generator=gen) < p else int(label) for label in y])
    t = 1 + (torch.rand(len(x0), generator=gen) * (len(abar) - 1)).long()
    eps = torch.stack([torch.randn(x.shape, generator=gen, dtype=x.dtype) for x in x0])
    a = abar.to(x0.dtype)[t]
    xt = torch.stack([r**0.5 * x + (1 - r) ** 0.5 * e for r, x, e in zip(a, x0, eps, strict=True)])
    total = (model(xt, t, labels, hint) - eps).square().sum() / eps.numel()
    total.backward()
    opt.step()
    return float(total.detach())


def _step_angles(model, opt, x0, hint, y, p, abar, gen):
    model.base.eval(), model.control.train()
    t = torch.randint(len(abar) - 1, y.shape, generator=gen) + 1
    noise = torch.empty_like(x0).normal_(generator=gen)
    angle = torch.acos(abar.sqrt()).to(x0)[t]
    xt = torch.einsum("b,b...->b...", angle.cos(), x0) + torch.einsum("b,b...->b...", angle.sin(), noise)
    y = y.masked_fill(torch.bernoulli(torch.full(y.shape, float(p)), generator=gen).bool(), model.null)
    loss = ((noise - model(xt, t=t, y=y, hint=hint)) ** 2).mean()
    loss.backward()
    opt.step()
    opt.zero_grad()
    return loss.item()


def _optimizer_trainable(model: nn.Module, lr: float) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr)


def _optimizer_groups(model: nn.Module, lr: float) -> torch.optim.AdamW:
    named = [dict(params=[p], weight_decay=1e-2) for p in model.control.parameters()]
    return torch.optim.AdamW(named, lr=lr)


def _step_see(answer: Answer, g: Generator) -> object:
    seed = integer(g, 0, 10**6)

    def optimizer(answer: Answer) -> object:
        model = ControlSpy(Spy(Generator().manual_seed(seed)))
        opt = answer.call("control_optimizer", model, 0.003)
        held = {id(p) for group in opt.param_groups for p in group["params"]}
        kind = "AdamW" if isinstance(opt, torch.optim.AdamW) else type(opt).__name__
        inside = {name.partition(".")[0]: id(p) in held for name, p in model.named_parameters()}
        return [kind, inside, [float(opt.param_groups[0].get(key, -1)) for key in ("lr", "weight_decay")]]

    def step(answer: Answer) -> object:
        return _train_see(_AsTrainStep(answer), Generator().manual_seed(seed))

    def around(answer: Answer) -> object:
        found: list[object] = []
        for ready in (lambda model: model.train(), lambda model: model.eval()):
            model, x0, several = _several_steps(answer, Generator().manual_seed(seed), steps=3, ready=ready)
            hint = _ink(x0)
            rows = [(seen.hint != hint).flatten(1).any(1) for seen, _, _ in several]
            dropped = [y == model.null for _, y, _ in several]
            hints = "right" if not any(r.any() for r in rows) else "with the label" if close(rows, dropped) else "other"
            binary = all(bool(((seen.hint == 0) | (seen.hint == 1)).all()) for seen, _, _ in several)
            again = close(several[0][0].hint, several[1][0].hint)
            wrong = [p.requires_grad for p in model.base.parameters()] + [
                p.requires_grad for p in model.control.parameters()
            ]
            modes = [several[0][0].base_training, model.control.asked[-1].training]
            back = type(several[0][2]).__name__
            found.append([hints, binary, again, back, wrong, modes, model.base.training, model.control.training])
        return found

    references = dict(control_optimizer=control_optimizer, control_step=control_step)
    if (found := _first_wrong(answer, references, [("optimizer", optimizer)])) != "right":
        return found
    return [_tried(lambda: step(answer)), _tried(lambda: around(answer))]  # categories, however it draws


CONTROL_STEP = Exercise(
    id="07.5",
    names=("control_optimizer", "control_step"),
    references=(control_optimizer, control_step),
    inputs=_step_inputs,
    changes=("model", "opt", "gen"),
    kind="training",
    points=2,
    facts=(
        Fact(
            "the optimiser holds the control's parameters and no other",
            _optimizer_holds,
            "what is frozen should not be in an optimiser at all",
        ),
        Fact("the optimiser is AdamW, with lr and decay as asked", _optimizer_kind, "torch.optim has Adam and AdamW"),
        Fact("each example has its own t, uniform over 1 .. T", _step_as(_train_times), "as in 02.4"),
        Fact(
            "the model sees x0 noised to t", _step_as(_train_noised), "as in 02.4: x0 as it comes, standard normal eps"
        ),
        Fact(
            "a share p of the labels that the model sees is null",
            _step_as(_train_labels),
            "so that the control does not lean on the label, each label has a coin of its own",
        ),
        Fact("every hint comes as it is, with its own picture", _step_hint, "noise and coins are not for the hint"),
        Fact(
            "the base in eval mode, the control in training mode",
            _step_base,
            "model.train() reaches everything inside; so does model.eval()",
        ),
        Fact("the base stays frozen, and the control does not", _step_frozen, "requires_grad was set right already"),
        Fact("the loss is the mean squared error of the noise", _step_as(_train_loss), "mean over batch and entries"),
        Fact(
            "each step goes down the gradient of its own loss", _step_as(_train_moves), "three calls, in which order?"
        ),
        Fact(
            "works with float32 images and a float64 table",
            _step_as(_train_single),
            "which dtype has float32 times float64?",
        ),
    ),
    mistakes=(
        Mistake(
            "optimiser: all parameters",
            "The optimiser holds base's parameters as well. Nothing happens as long as their gradients are None; with "
            "a gradient of 0, AdamW's weight decay shrinks the weights of a network that should stand still.",
            _optimizer_by(lambda model, lr: torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)),
        ),
        Mistake(
            "optimiser: the base",
            "The optimiser holds the parameters of base, the frozen network; it is the control that learns.",
            _optimizer_by(lambda model, lr: torch.optim.AdamW(model.base.parameters(), lr=lr, weight_decay=0.01)),
        ),
        Mistake(
            "optimiser: Adam",
            "This is Adam: its weight_decay is added to the gradient and then divided by its size. AdamW shrinks the "
            "weights directly.",
            _optimizer_by(lambda model, lr: torch.optim.Adam(model.control.parameters(), lr=lr, weight_decay=0.01)),
        ),
        Mistake(
            "optimiser: no decay",
            "The weight decay is 0; asked for is 0.01 (which is AdamW's own default).",
            _optimizer_by(lambda model, lr: torch.optim.AdamW(model.control.parameters(), lr=lr, weight_decay=0)),
        ),
        Mistake(
            "optimiser: lr left out",
            "The optimiser does not get lr, and takes AdamW's default, 0.001.",
            _optimizer_by(lambda model, lr: torch.optim.AdamW(model.control.parameters(), weight_decay=0.01)),
        ),
        Mistake(
            "base in training mode",
            "model.train() puts the base into training mode, too: dropout acts in it and running statistics drift, "
            "though its weights are frozen. model.base.eval() comes after it.",
            _step_by(ready=lambda model: model.train()),
        ),
        Mistake(
            "control in eval mode",
            "The control is in eval mode while it trains: eval() is for the base alone.",
            _step_by(ready=lambda model: model.eval()),
        ),
        Mistake(
            "modes left as they were",
            "You leave the modes as they come. After sampling all of the model is in eval mode, after "
            "model.train() none of it: set both parts, in every step.",
            _step_by(ready=lambda model: None),
        ),
        Mistake(
            "base unfrozen",
            "Your step makes the base trainable again: it gets gradients, and what the control learns no longer "
            "belongs to the network you started from.",
            _step_by(ready=lambda model: (_modes(model), model.requires_grad_(True))),
        ),
        Mistake(
            "label never dropped",
            "The label is never dropped. The control then leans on it: without a label, the hint alone tells it less "
            "and less which digit to draw.",
            _step_by(drop=lambda y, p, gen: torch.zeros(y.shape, dtype=torch.bool)),
        ),
        Mistake(
            "keeps with probability p",
            "Labels are kept with probability p and dropped otherwise: the comparison is the wrong way round.",
            _step_by(drop=lambda y, p, gen: torch.rand(y.shape, generator=gen) > p),
        ),
        Mistake(
            "one coin per batch",
            "One coin drops all labels of the batch or none; each label needs its own.",
            _step_by(drop=lambda y, p, gen: (torch.rand((), generator=gen) < p).expand(y.shape)),
        ),
        Mistake(
            "dropped labels become 0",
            "Dropped labels become 0, which is a class; no label is model.null.",
            _step_by(null=lambda model: 0),
        ),
        Mistake(
            "hint dropped with the label",
            "Where the label is dropped, the hint goes too. The hint always stays: with the label gone, it is what the "
            "control has to learn from.",
            _step_by(hints=lambda hint, dropped, a, s, eps: hint * pad((~dropped).to(hint), hint)),
        ),
        Mistake(
            "hints in another order",
            "The hints come in another order than their pictures: the control learns that hints mean nothing, and "
            "pictures keep to them no better than by chance.",
            _step_by(hints=lambda hint, dropped, a, s, eps: hint.roll(1, dims=0)),
        ),
        Mistake(
            "noisy hint",
            "The hint is noised like x0. It must stay clean at every t: it is what is known about the picture.",
            _step_by(hints=lambda hint, dropped, a, s, eps: a * hint + s * eps),
        ),
        Mistake(
            "t from 0",
            "t runs over 0 .. T - 1. At t = 0 there is no noise to predict, and at t = T, where sampling starts, the "
            "control is never trained.",
            _step_by(time=lambda n, T, gen: torch.randint(0, T, (n,), generator=gen)),
        ),
        Mistake(
            "t = T missing",
            "t = T is never drawn, as randint leaves out its upper end: sampling starts there.",
            _step_by(time=lambda n, T, gen: torch.randint(1, T, (n,), generator=gen)),
        ),
        Mistake(
            "t from 0 to T",
            "t = 0 is among your times: there x_t is x0 itself, and the noise to predict is not in it.",
            _step_by(time=lambda n, T, gen: torch.randint(0, T + 1, (n,), generator=gen)),
        ),
        Mistake(
            "one t per batch",
            "The whole batch has one t. Right on average, but the gradient is far noisier than with one t per example.",
            _step_by(time=lambda n, T, gen: torch.randint(1, T + 1, (1,), generator=gen).expand(n)),
        ),
        Mistake(
            "noise not from gen",
            "The noise does not come from gen (torch.randn_like cannot take one): the run cannot be repeated.",
            _step_by(noise=lambda x0, gen: torch.randn_like(x0)),
        ),
        Mistake(
            "variance for standard deviation",
            "The noise is multiplied by its variance 1 - abar instead of the standard deviation.",
            _step_by(sigma=lambda a: 1 - a),
        ),
        Mistake(
            "predicts x0",
            "The prediction is compared with x0; base and sampler take the output for the noise.",
            _step_by(loss=lambda out, eps, x0: F.mse_loss(out, x0)),
        ),
        Mistake(
            "sum of squares",
            "The squared errors are summed, not averaged: the step grows with batch and image size.",
            _step_by(loss=lambda out, eps, x0: F.mse_loss(out, eps, reduction="sum")),
        ),
        Mistake(
            "four axes taken for granted",
            "You take images (B, C, H, W) for granted: x0 is (B, ...), with any number of axes.",
            _step_by(axes=lambda a, like: a[:, None, None, None]),
        ),
        Mistake(
            "no zero_grad",
            "Gradients are never set to zero: each step moves by the sum of all gradients so far.",
            _step_by(_steps_by("back step")),
        ),
        Mistake(
            "zero_grad after backward",
            "The gradients are set to zero between backward() and step(): the control never learns anything.",
            _step_by(_steps_by("back zero step")),
        ),
        Mistake(
            "step before backward",
            "The parameters never move, though gradients are there: opt.step() comes before loss.backward(), or is "
            "missing.",
            _step_by(_steps_by("zero step back")),
        ),
        Mistake(
            "graph returned",
            "What you return is a tensor with its graph: a list of losses then keeps every step's graph in memory.",
            _step_by(_with_graph),
        ),
    ),
    alternatives=((_optimizer_trainable, _step_one_by_one), (_optimizer_groups, _step_angles)),
    hints=(
        "It is the training step of 02.4 with one more argument for the network. What differs is what may learn: look "
        "at the two halves of the model, their modes, and which parameters the optimiser gets.",
        "torch.optim.AdamW(model.control.parameters(), lr=lr, weight_decay=0.01). In the step: model.base.eval(), "
        "model.control.train(); t from 1 to T, eps, x_t; where rand(B) < p the label becomes model.null; mse_loss of "
        "model(x_t, t, y, hint) and eps; zero_grad, backward, step; loss.item().",
    ),
    hides=("train.diffusion_loss", "train.drop", "schedules.add_noise"),
    probe=_step_see,
    by_probe=True,
)

# --- 07.6 iou, fidelity, with_strength --------------------------------------------------------------------------------


def _masks(g: Generator, n: int = 4, share: float = 0.4) -> Tensor:
    """Pictures of zeros and ones, (n, 1, 3, 5); none of them empty."""
    mask = (torch.rand(n, 1, 3, 5, generator=g, dtype=torch.float64) < share).double()
    mask[:, 0, 1, 2] = 1
    return mask


def _pixels(mask: Tensor) -> list[set[int]]:
    """The pixels set, picture by picture."""
    return [set(row.nonzero().flatten().tolist()) for row in mask.flatten(1)]


def _overlap(a: set[int], b: set[int]) -> float:
    return len(a & b) / len(a | b) if a | b else 1.0


def _own_and_chance(drawn: Tensor, hints: Tensor) -> tuple[float, float]:
    """By counting sets of pixels."""
    mine, asked = _pixels(drawn), _pixels(hints)
    own = [_overlap(a, b) for a, b in zip(mine, asked, strict=True)]
    others = [_overlap(a, b) for i, a in enumerate(mine) for j, b in enumerate(asked) if i != j]
    return sum(own) / len(own), sum(others) / len(others)


def _shift_residuals(xt: Tensor, t: Tensor, y: Tensor, hint: Tensor) -> list[Tensor]:
    """Residuals of two sizes; neither is 0 where the hint is, nor proportional to it."""
    where = pad((t + y).to(hint), hint) / 50
    return [hint.square() + where + 0.5 + xt / 9, hint.mean(dim=(2, 3), keepdim=True) - where - 0.3]


def _curved_base(xt: Tensor, t: Tensor, y: Tensor, residuals: Sequence[Tensor]) -> Tensor:
    high, low = residuals
    return torch.tanh(xt + high) * (1 + low) + pad((2 * t - y).to(xt), xt) / 50


def _control_case(g: Generator, n: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return randn(g, n, 1, 3, 5), times(g, n), _digits(g, n), _masks(g, n)


def _iou_inputs(g: Generator) -> dict:
    return {
        "iou": dict(a=_masks(g), b=_masks(g)),
        "fidelity": dict(drawn=_masks(g), hints=_masks(g)),
        "with_strength": dict(base=_curved_base, control=_shift_residuals, strength=0.5),
    }


def _mask_of(*places: tuple[int, int]) -> Tensor:
    mask = torch.zeros(1, 1, 3, 5, dtype=torch.float64)
    for row, column in places:
        mask[0, 0, row, column] = 1
    return mask


def _iou_by_hand(answer: Answer, g: Generator) -> None:
    three, two = _mask_of((0, 1), (1, 1), (2, 1)), _mask_of((1, 1), (1, 2))
    far = _mask_of((0, 4))
    for what, a, b, due in (
        ("three pixels, two pixels, one of them in both", three, two, 0.25),
        ("two pixels, three pixels, one of them in both", two, three, 0.25),
        ("the same three pixels", three, three, 1.0),
        ("nothing in common", three, far, 0.0),
    ):
        got = float(answer.call("iou", a, b))
        if not math.isclose(got, due, abs_tol=1e-6):
            raise Wrong(f"{what}: you return {got:.4g}", expected=f"{due:g}")


def _iou_empty(answer: Answer, g: Generator) -> None:
    nothing, some = _mask_of(), _mask_of((1, 3), (2, 3))
    for what, a, b, due in (
        ("both pictures are empty", nothing, nothing, 1.0),
        ("the first picture is empty, the second is not", nothing, some, 0.0),
        ("the second picture is empty, the first is not", some, nothing, 0.0),
    ):
        got = float(answer.call("iou", a, b))
        if not math.isclose(got, due, abs_tol=1e-6):
            raise Wrong(f"{what}: you return {got:.4g}", expected=f"{due:g}")


def _iou_sets(answer: Answer, g: Generator) -> None:
    a, b = _masks(g, 5), _masks(g, 5)
    due = torch.tensor([_overlap(one, two) for one, two in zip(_pixels(a), _pixels(b), strict=True)]).double()
    need(answer.call("iou", a, b), due, "counting the pixels of each pair gives another number")


def _fidelity_same(answer: Answer, g: Generator) -> None:
    hints = torch.cat([_mask_of((0, 0), (0, 1)), _mask_of((0, 1), (0, 2)), _mask_of((2, 4))])
    own, chance = (float(v) for v in answer.call("fidelity", hints.clone(), hints))
    if not math.isclose(own, 1, abs_tol=1e-6):
        raise Wrong(f"where each picture is its own hint you return {own:.4g} for the own hints", expected="1")
    if not math.isclose(chance, 1 / 9, abs_tol=1e-6):
        raise Wrong(
            f"of three hints two share one pixel of three, and the third is far away: with pictures like the hints you "
            f"return a chance of {chance:.4g}",
            expected="1/9, the mean of 1/3, 1/3, 0, 0, 0, 0",
        )


def _fidelity_exchanged(answer: Answer, g: Generator) -> None:
    hints = torch.cat([_mask_of((0, 0), (0, 1)), _mask_of((2, 3))])
    own, chance = (float(v) for v in answer.call("fidelity", hints.flip(0), hints))
    if not math.isclose(own, 0, abs_tol=1e-6) or not math.isclose(chance, 1, abs_tol=1e-6):
        raise Wrong(
            f"two pictures follow each other's hints, and not their own: you return {own:.4g} for the own hints and "
            f"{chance:.4g} for chance",
            expected="0 and 1",
        )


def _fidelity_pairs(answer: Answer, g: Generator) -> None:
    drawn, hints = _masks(g, 5, 0.3), _masks(g, 5, 0.3)
    hints = torch.maximum(hints, drawn * (torch.rand(hints.shape, generator=g) < 0.5))  # they follow to some degree
    own, chance = (float(v) for v in answer.call("fidelity", drawn, hints))
    due = _own_and_chance(drawn, hints)
    for what, got, right in (("with the own hint", own, due[0]), ("with the hints of all others", chance, due[1])):
        if not math.isclose(got, right, rel_tol=1e-5, abs_tol=1e-7):
            raise Wrong(f"among five pictures the mean IoU {what} is not {got:.5g}", expected=f"{right:.5g}")


def _with(
    answer: Answer, control: Callable, strength: float, case: tuple[Tensor, ...], asked: list | None = None
) -> Tensor:
    """The output of the learner's network; `asked` collects the residuals that base got."""

    def base(xt: Tensor, t: Tensor, y: Tensor, residuals: Sequence[Tensor]) -> Tensor:
        if asked is not None:
            asked.append(list(residuals))
        return _curved_base(xt, t, y, residuals)

    network = answer.call("with_strength", base, control, strength)
    if not callable(network):
        raise Wrong(f"with_strength must return a function (xt, t, y, hint), and returned {type(network).__name__}")
    out = answer.ask(network, "__call__", *case)
    odd = oddity(out, case[0])
    if odd:
        raise Wrong(f"with strength {strength:g}: {odd}")
    return out


def _strength_ends(answer: Answer, g: Generator) -> None:
    case = xt, t, y, hint = _control_case(g)
    silent = _curved_base(xt, t, y, [0 * r for r in _shift_residuals(*case)])
    full = _curved_base(xt, t, y, _shift_residuals(*case))
    for hints in (hint, 1 - hint):
        asked: list[list[Tensor]] = []
        got = _with(answer, _shift_residuals, 0.0, (xt, t, y, hints), asked)
        if len(asked) == 1 and any(r.any() for r in asked[0]):
            largest = max(float(r.abs().max()) for r in asked[0])
            raise Wrong(f"with strength 0 base still gets residuals, of up to {largest:.3g}: it must get zeros")
        need(got, silent, "strength 0 is not the base without residuals")
    need(_with(answer, _shift_residuals, 1.0, case), full, "strength 1 is not the network as trained")


def _strength_between(answer: Answer, g: Generator) -> None:
    case = xt, t, y, _ = _control_case(g)
    high, low = _shift_residuals(*case)
    for strength in (0.5, 1.7, -1.0):
        due = _curved_base(xt, t, y, [strength * high, strength * low])
        asked: list[list[Tensor]] = []
        got = _with(answer, _shift_residuals, strength, case, asked)
        if close(plain(got), due, rtol=1e-5):
            continue
        if len(asked) != 1:
            raise Wrong(f"base is called {len(asked)} times: once, with the residuals times the strength")
        shares = [_share(mine, whole) for mine, whole in zip(asked[0], (high, low), strict=True)]
        if shares == [strength, strength]:
            raise Wrong(f"with strength {strength:g} the residuals are right, and xt, t, y or the output is not")
        raise Wrong(
            f"with strength {strength:g} base gets {_times(shares[0])} the first residual and {_times(shares[1])} the "
            "second"
        )


def _share(mine: Tensor, whole: Tensor) -> float | None:
    """Which multiple it is, or None."""
    ratio = mine / whole if mine.shape == whole.shape else torch.arange(2.0)
    return round(float(ratio.mean()), 4) if close(ratio, ratio.mean().expand_as(ratio), rtol=1e-5) else None


def _times(share: float | None) -> str:
    return "no multiple of" if share is None else f"{share:g} times"


def _strength_again(answer: Answer, g: Generator) -> None:
    """The control hands out the same list each time, as a cache would, or one tensor twice."""
    case = _control_case(g)
    kept = _shift_residuals(*case)
    before = [r.clone() for r in kept]
    apart, shared = [kept[1].clone(), kept[1].clone()], [kept[1].clone()] * 2
    by_two, by_one = (plain(_with(answer, lambda xt, t, y, hint, r=r: r, 0.5, case)) for r in (apart, shared))
    first, second = (_with(answer, lambda xt, t, y, hint: kept, 0.5, case) for _ in range(2))
    if not close(plain(kept), plain(before)) or not close(by_one, by_two):
        raise Wrong("the residuals that control returned are changed in place: they belong to it, make new ones")
    need(second, first, "the second call with equal arguments differs from the first")


def _iou_by(
    one: Callable[[Tensor, Tensor], Tensor] | None = None,
    both: Callable[[Tensor, Tensor], Tensor] = lambda a, b: (a * b).flatten(1).sum(1),
    either: Callable[[Tensor, Tensor], Tensor] = lambda a, b: torch.maximum(a, b).flatten(1).sum(1),
    empty: float | None = 1.0,
) -> tuple[Callable, Callable, Callable]:
    """An IoU, and the fidelity measured with it."""

    def own(a: Tensor, b: Tensor) -> Tensor:
        if one is not None:
            return one(a, b)
        ratio = both(a, b) / either(a, b)
        return ratio if empty is None else torch.where(either(a, b) > 0, ratio, empty)

    return own, _fidelity_with(own), with_strength


def _fidelity_with(iou: Callable[[Tensor, Tensor], Tensor]) -> Callable:
    def measured(drawn: Tensor, hints: Tensor) -> tuple[float, float]:
        shifted = [iou(drawn, hints.roll(k, dims=0)).mean() for k in range(len(hints))]
        return shifted[0].item(), torch.stack(shifted[1:]).mean().item()

    return measured


def _fidelity_by(measure: Callable) -> tuple[Callable, Callable, Callable]:
    return iou, measure, with_strength


def _strength_by(network: Callable) -> tuple[Callable, Callable, Callable]:
    """network(base, control, strength, xt, t, y, hint) -> output."""
    return iou, fidelity, lambda base, control, strength: lambda *case: network(base, control, strength, *case)


def _pairs(drawn: Tensor, hints: Tensor) -> Tensor:
    """IoU of each picture with each hint, (B, B)."""
    return torch.stack([iou(drawn, hint.expand_as(drawn)) for hint in hints], dim=1)


def _off(table: Tensor) -> Tensor:
    return table[~torch.eye(len(table), dtype=torch.bool, device=table.device)]


def _pooled(drawn: Tensor, hints: Tensor) -> tuple[float, float]:
    def whole(a: Tensor, b: Tensor) -> float:
        return float((a * b).sum() / torch.maximum(a, b).sum())

    return whole(drawn, hints), sum(whole(drawn, hints.roll(k, 0)) for k in range(1, len(hints))) / (len(hints) - 1)


def _outputs_mixed(base, control, strength, xt, t, y, hint):
    residuals = control(xt, t, y, hint)
    without = base(xt, t, y, [0 * r for r in residuals])
    return without + strength * (base(xt, t, y, residuals) - without)


def _residuals_in_place(base, control, strength, xt, t, y, hint):
    residuals = control(xt, t, y, hint)
    for residual in residuals:
        residual *= strength
    return base(xt, t, y, residuals)


def _residuals_but(one: Callable[[int, int], bool]) -> Callable:
    """Scale some residuals only."""

    def network(base, control, strength, xt, t, y, hint):
        rs = control(xt, t, y, hint)
        return base(xt, t, y, [strength * r if one(i, len(rs)) else r for i, r in enumerate(rs)])

    return network


def _iou_logical(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.bool(), b.bool()
    both, either = (a & b).sum(dim=(1, 2, 3)), (a | b).sum(dim=(1, 2, 3))
    ratio = torch.ones(len(a), dtype=torch.float64, device=a.device)
    ratio[either > 0] = both[either > 0].double() / either[either > 0]
    return ratio


def _iou_like(a: Tensor, b: Tensor) -> Tensor:
    return _iou_logical(a, b).to(a.dtype)


def _iou_loop(a: Tensor, b: Tensor) -> Tensor:
    pairs = zip(_pixels(a), _pixels(b), strict=True)
    return torch.tensor([_overlap(one, two) for one, two in pairs], dtype=a.dtype, device=a.device)


def _fidelity_table(drawn: Tensor, hints: Tensor) -> tuple[float, float]:
    table = _pairs(drawn, hints)
    total, n = float(table.sum()), len(table)
    own = float(table.diagonal().sum())
    return own / n, (total - own) / (n * (n - 1))


class _Louder:
    """The controlled network as an object."""

    def __init__(self, base: Callable, control: Callable, strength: float):
        self.parts = base, control, strength

    def __call__(self, xt: Tensor, t: Tensor, y: Tensor, hint: Tensor) -> Tensor:
        base, control, strength = self.parts
        return base(xt, t, y, [torch.mul(residual, strength) for residual in control(xt, t, y, hint)])


def _strength_tuple(base: Callable, control: Callable, strength: float) -> Callable:
    return lambda xt, t, y, hint: base(xt, t, y, tuple(r * strength for r in control(xt, t, y, hint)))


def _iou_see(answer: Answer, g: Generator) -> object:
    (a, c, d), b = (_masks(g, 8) for _ in range(3)), _masks(g, 8, 0.8)  # |a| and |b| differ
    a[0], b[0], a[1] = 0, 0, 0
    case = _control_case(g)

    def overlap(answer: Answer) -> object:
        kept = a.clone()
        return [answer.call("iou", kept, b), kept]

    def kept_to(answer: Answer) -> object:
        out = answer.call("fidelity", c, d)
        return [float(v) for v in out] if isinstance(out, tuple | list) else ["one", float(out)]

    def louder(answer: Answer) -> object:
        outs = [_tried(lambda s=s: _with(answer, _shift_residuals, s, case), whole=True) for s in (0.0, 0.5, 1.0, 1.7)]
        kept = _shift_residuals(*case)
        return [*outs, _tried(lambda: _with(answer, lambda *_: kept, 0.5, case)), kept]

    references = dict(iou=iou, fidelity=fidelity, with_strength=with_strength)
    looks = [("iou", overlap), ("fidelity", kept_to), ("with_strength", louder)]
    return _first_wrong(answer, references, looks)


MEASURES = Exercise(
    id="07.6",
    names=("iou", "fidelity", "with_strength"),
    references=(iou, fidelity, with_strength),
    inputs=_iou_inputs,
    batch=("a", "b"),
    points=2,
    facts=(
        Fact("iou of a few pixels", _iou_by_hand, "how many pixels are set in both, and how many in either?"),
        Fact("iou where there is nothing", _iou_empty, "0/0 is NaN: decide before you divide, or after"),
        Fact("iou of every pair by itself", _iou_sets, "one number per picture: sum over the pixels alone"),
        Fact("fidelity where each picture is its hint", _fidelity_same, "the own hint has no part in chance"),
        Fact("fidelity where two hints are exchanged", _fidelity_exchanged, "own first, then chance"),
        Fact("fidelity counts all pairs", _fidelity_pairs, "each picture has B - 1 hints of others"),
        Fact("with_strength: 0 is the base, 1 is as trained", _strength_ends, "what must be 0 for the base alone?"),
        Fact("with_strength: every residual is multiplied", _strength_between, "control returns a list of tensors"),
        Fact("with_strength: the residuals are left alone", _strength_again, "*= changes what control handed out"),
    ),
    mistakes=(
        Mistake(
            "iou: empty pictures",
            "iou: two empty pictures give 0/0, which is NaN, and one NaN makes any mean NaN. They agree: 1.",
            _iou_by(empty=None),
        ),
        Mistake(
            "iou: empty pictures count 0",
            "iou: two empty pictures get 0, as if they had nothing in common. They agree in every pixel: 1.",
            _iou_by(empty=0.0),
        ),
        Mistake(
            "iou: sum for the union",
            "iou: you divide by the pixels of a plus those of b, which counts what they share twice: two equal "
            "pictures reach 1/2 only.",
            _iou_by(either=lambda a, b: (a + b).flatten(1).sum(1)),
        ),
        Mistake(
            "iou: Dice",
            "iou: this is the Dice score, 2 |both| / (|a| + |b|). It is never below the IoU, and asked for is the IoU.",
            _iou_by(both=lambda a, b: 2 * (a * b).flatten(1).sum(1), either=lambda a, b: (a + b).flatten(1).sum(1)),
        ),
        Mistake(
            "iou: share of equal pixels",
            "iou: you count pixels in which the pictures agree, background included. Most of a picture is "
            "background, so that even pictures with nothing in common score high.",
            _iou_by(lambda a, b: (a == b).to(a).flatten(1).mean(1)),
        ),
        Mistake(
            "iou: over a alone",
            "iou: you divide by the pixels of a alone: a single pixel anywhere within b would then reach 1.",
            _iou_by(either=lambda a, b: a.flatten(1).sum(1)),
        ),
        Mistake(
            "iou: over b alone",
            "iou: you divide by the pixels of b alone: where a is all ink it would then reach 1 with any b.",
            _iou_by(either=lambda a, b: b.flatten(1).sum(1)),
        ),
        Mistake(
            "iou: union over all pixels",
            "iou: you average over all pixels of the picture, which are far more than those set in either.",
            _iou_by(lambda a, b: (a * b).flatten(1).mean(1)),
        ),
        Mistake(
            "iou: the whole batch",
            "iou: all pictures are counted together, so that those with much ink weigh more. One number per picture.",
            _iou_by(lambda a, b: (a * b).sum() / torch.maximum(a, b).sum()),
        ),
        Mistake(
            "iou: mean of the batch",
            "iou: you average over the batch already; asked for is one number per picture, (B,).",
            _iou_by(lambda a, b: iou(a, b).mean()),
        ),
        Mistake(
            "fidelity: own hint within chance",
            "fidelity: your chance level contains each picture with its own hint. Chance is the hints of others alone.",
            _fidelity_by(lambda d, h: (float(iou(d, h).mean()), float(_pairs(d, h).mean()))),
        ),
        Mistake(
            "fidelity: one neighbour",
            "fidelity: chance is measured with one other hint for each picture (the hints rolled by one); asked for "
            "are all others, which is far less noisy.",
            _fidelity_by(lambda d, h: (float(iou(d, h).mean()), float(iou(d, h.roll(1, 0)).mean()))),
        ),
        Mistake(
            "fidelity: chance of the hints among themselves",
            "fidelity: chance compares hints with hints. Compare drawn pictures with the hints of others: a network "
            "that draws too much ink meets other hints more often, too.",
            _fidelity_by(lambda d, h: (float(iou(d, h).mean()), float(_off(_pairs(h, h)).mean()))),
        ),
        Mistake(
            "fidelity: chance of the pictures among themselves",
            "fidelity: chance compares drawn pictures with each other; it is about drawn pictures and the hints of "
            "others.",
            _fidelity_by(lambda d, h: (float(iou(d, h).mean()), float(_off(_pairs(d, d)).mean()))),
        ),
        Mistake(
            "fidelity: no chance",
            "fidelity: you return one number. An IoU says little without its chance level: unrelated digits share a "
            "good part of their pixels.",
            _fidelity_by(lambda d, h: float(iou(d, h).mean())),
        ),
        Mistake(
            "fidelity: exchanged",
            "fidelity: the two numbers are exchanged: own hints first, then chance.",
            _fidelity_by(lambda d, h: fidelity(d, h)[::-1]),
        ),
        Mistake(
            "fidelity: difference",
            "fidelity: you return what is gained over chance in the second place; asked for is chance itself.",
            _fidelity_by(lambda d, h: (fidelity(d, h)[0], fidelity(d, h)[0] - fidelity(d, h)[1])),
        ),
        Mistake(
            "fidelity: pixels of all pictures together",
            "fidelity: you count the pixels of all pictures together, so that those with much ink weigh more. Take "
            "the mean of the IoUs.",
            _fidelity_by(_pooled),
        ),
        Mistake(
            "fidelity: share above one half",
            "fidelity: you ask whether each IoU exceeds 0.5 and average the answers. Average the IoUs themselves: a "
            "threshold hides how close they come.",
            _fidelity_by(_fidelity_with(lambda a, b: (iou(a, b) > 0.5).to(a))),
        ),
        Mistake(
            "with_strength: on the hint",
            "with_strength: the strength multiplies the hint. A hint of zeros is still a hint (an empty picture), and "
            "the residuals for it are not 0: strength 0 is not the base. It belongs on the residuals.",
            _strength_by(lambda base, control, s, xt, t, y, hint: base(xt, t, y, control(xt, t, y, s * hint))),
        ),
        Mistake(
            "with_strength: on the outputs",
            "with_strength: you mix the outputs with and without control, as guidance does. The strength multiplies "
            "the residuals, before the base works on with them, and needs one pass, not two.",
            _strength_by(_outputs_mixed),
        ),
        Mistake(
            "with_strength: on the output",
            "with_strength: the strength multiplies the whole output: 0 gives zeros, not the base.",
            _strength_by(lambda base, control, s, *case: s * base(*case[:3], control(*case))),
        ),
        Mistake(
            "with_strength: ignored",
            "with_strength: the strength is not used: every strength gives the network as trained.",
            _strength_by(lambda base, control, s, *case: base(*case[:3], control(*case))),
        ),
        Mistake(
            "with_strength: first residual only",
            "with_strength: only the first residual is multiplied; the strength belongs to all of them.",
            _strength_by(_residuals_but(lambda i, n: i == 0)),
        ),
        Mistake(
            "with_strength: last residual only",
            "with_strength: only the last residual is multiplied; the strength belongs to all of them.",
            _strength_by(_residuals_but(lambda i, n: i == n - 1)),
        ),
        Mistake(
            "with_strength: times the list",
            "with_strength: you multiply the list, and Python repeats lists (or refuses): multiply each tensor in it.",
            _strength_by(lambda base, control, s, *case: base(*case[:3], s * control(*case))),
        ),
        Mistake(
            "with_strength: in place",
            "with_strength: the residuals are changed in place (*=). They belong to control; if it hands out the same "
            "tensors again, the strength acts twice.",
            _strength_by(_residuals_in_place),
        ),
    ),
    alternatives=((_iou_like, _fidelity_table, _strength_tuple), (_iou_loop, _own_and_chance, _Louder)),
    hints=(
        "Sums over the pixels of a * b and of the larger of a and b. For chance: which pairs (i, j) are there besides "
        "i = j? And which tensors does control hand to base?",
        "both / either with flatten(1).sum(1), and 1 where either is 0. hints.roll(k, dims=0) pairs each picture with "
        "another's hint, for k = 1 .. B - 1. base(xt, t, y, [strength * r for r in control(xt, t, y, hint)]).",
    ),
    probe=_iou_see,
    by_probe=True,
    hides=("controlnet.controlled",),
)

# --- 07.7 my_control_test ---------------------------------------------------------------------------------------------

_control_mistakes = {mistake.name: mistake.answers[0] for mistake in BUILD_CONTROL.mistakes}


def _tries(build_control: Callable, frozen: bool = True) -> tuple:
    base = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Tanh()).requires_grad_(not frozen)
    x, hint = torch.randn(2, 3, 4, 6), torch.randn(2, 2, 4, 6)
    copy, z_in, z_out = build_control(base, 3, 2)
    return base, copy, z_in, z_out, x, hint, lambda: base(x) + z_out(copy(x + z_in(hint)))


def _tests_output(build_control: Callable) -> None:
    base, _, _, _, x, _, out = _tries(build_control)
    assert torch.equal(out(), base(x))


def _tests_flags(build_control: Callable) -> None:
    base, copy, z_in, z_out, *_ = _tries(build_control)
    assert not any(p.requires_grad for p in base.parameters())
    assert all(p.requires_grad for part in (copy, z_in, z_out) for p in part.parameters())


def _tests_zeros(build_control: Callable) -> None:
    _, _, z_in, z_out, *_ = _tries(build_control)
    assert not any(p.any() for part in (z_in, z_out) for p in part.parameters())


def _tests_shapes(build_control: Callable) -> None:
    *_, x, _, out = _tries(build_control)
    assert out().shape == x.shape


def _tests_equal_copy(build_control: Callable) -> None:
    base, copy, *_, x, _, _ = _tries(build_control)
    assert torch.equal(copy(x), base(x)) and copy is not base


def _tests_copy_differs(build_control: Callable) -> None:
    """A misunderstanding: a weight of its own need not have a value of its own."""
    base, copy, *_ = _tries(build_control)
    assert not torch.equal(copy[0].weight, base[0].weight)


def _tests_hears_at_once(build_control: Callable) -> None:
    _, copy, z_in, z_out, x, hint, _ = _tries(build_control)
    assert not torch.equal(z_out(copy(x + z_in(hint))), z_out(copy(x + z_in(-hint))))


def _tests_all_gradients(build_control: Callable) -> None:
    _, copy, z_in, z_out, _, _, out = _tries(build_control)
    out().square().mean().backward()
    for part in (copy, z_in, z_out):
        assert all(p.grad is not None and p.grad.any() for p in part.parameters())


def _tests_says(build_control: Callable) -> bool:
    base, _, _, _, x, _, out = _tries(build_control)
    return torch.equal(out(), base(x))


def _tests_training(build_control: Callable) -> None:
    """By training: the base must stand still, the rest must wake up in order."""
    torch.manual_seed(3)
    base = nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False)
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    copy, z_in, z_out = build_control(base, 4, 1)
    x, hint = torch.randn(3, 4, 5, 5), torch.randn(3, 1, 5, 5)
    target, parts = torch.randn(3, 4, 5, 5), dict(copy=copy, z_in=z_in, z_out=z_out)
    opt = torch.optim.SGD([p for part in (base, *parts.values()) for p in part.parameters()], lr=0.1)
    first = base(x).clone()
    if not torch.equal(copy(x), first) or z_in(hint).any():
        raise AssertionError("another start")
    awake = []
    for _ in range(2):
        opt.zero_grad()
        out = base(x) + z_out(copy(x + z_in(hint)))
        if not awake and not torch.equal(out, first):
            raise AssertionError("not silent")
        (out - target).square().mean().backward()
        rows = {
            name: [p.grad is not None and bool(p.grad.any()) for p in part.parameters()] for name, part in parts.items()
        }
        awake.append(rows)
        opt.step()
    if any(awake[0]["copy"]) or any(awake[0]["z_in"]) or not all(awake[0]["z_out"]):
        raise AssertionError("first step")
    if not all(all(row) for row in awake[1].values()):
        raise AssertionError("second step")
    if any(not torch.equal(value, weights[name]) for name, value in base.state_dict().items()):
        raise AssertionError("the base moved")


def _tests_list(build_control: Callable) -> None:
    """Point by point, with a base that can be trained and one that cannot."""
    for frozen in (True, False):
        base, copy, z_in, z_out, x, _, out = _tries(build_control, frozen)
        assert z_in.weight.shape == (3, 2, 1, 1) and z_out.weight.shape == (3, 3, 1, 1)
        assert float(z_in.weight.abs().sum() + z_in.bias.abs().sum()) == 0
        assert float(z_out.weight.abs().sum() + z_out.bias.abs().sum()) == 0
        assert torch.allclose(out(), base(x))
        theirs = {p.data_ptr() for p in base.parameters()}
        assert not theirs & {p.data_ptr() for p in copy.parameters()}
        for mine, other in zip(copy.parameters(), base.parameters(), strict=True):
            assert torch.allclose(mine, other) and mine.requires_grad and not other.requires_grad
        assert z_in.weight.requires_grad and z_out.weight.requires_grad


CONTROL_TEST = test_exercise(
    "07.7",
    "my_control_test",
    my_control_test,
    right=(build_control, _control_state, _control_classes),
    wrong=tuple(
        (hint, _control_mistakes[name])
        for name, hint in (
            ("copied after freezing", "one that copies base after freezing it"),
            ("a frozen base copied as it is", "one whose copy is frozen where base came frozen"),
            ("the copy is base", "one whose copy is base itself"),
            ("base not frozen", "one that leaves base trainable"),
            ("zero convolutions frozen", "one that freezes the zero convolutions"),
            ("neither is zero", "one whose z_in and z_out are both random"),
            ("z_out not zero", "one whose z_out is random"),
            ("z_in not zero", "one whose z_in is random"),
            ("biases left random", "one that sets the weights to 0 and forgets the biases"),
            ("the copy drawn anew", "one whose copy starts from random weights"),
            ("hint channels forgotten", "one whose z_in does not fit the hint"),
        )
    ),
    needed=10,
    mistakes=(
        Mistake(
            "the output only",
            "Your test only looks at whether the output is base's at first. That says nothing about what can learn, "
            "nor about z_in: z_out = 0 hides all that comes before it.",
            (_tests_output,),
        ),
        Mistake(
            "requires_grad only",
            "Your test only looks at what can be trained. It never asks what the control says: random zero "
            "convolutions and a copy of random weights pass.",
            (_tests_flags,),
        ),
        Mistake(
            "zeros only",
            "Your test only looks at whether z_in and z_out are zero: it does not see the copy, nor what is frozen.",
            (_tests_zeros,),
        ),
        Mistake(
            "shapes only",
            "Your test only looks at shapes: random weights have the right shape, too, and so has a frozen copy.",
            (_tests_shapes,),
        ),
        Mistake(
            "the copy only",
            "Your test only looks at whether the copy starts as base and is another object: not at the zero "
            "convolutions, nor at what is frozen.",
            (_tests_equal_copy,),
        ),
        Mistake(
            "weights must differ",
            "Your test wants the copy's weights to differ from base's, and refuses right functions: at the start they "
            "are equal, in memory of their own. Change the copy and see whether base changes with it.",
            (_tests_copy_differs,),
        ),
        Mistake(
            "hint heard at once",
            "Your test wants the hint to change the output at once, and refuses right functions: while the zero "
            "convolutions are zero, nothing of the hint comes through. Move the weights first.",
            (_tests_hears_at_once,),
        ),
        Mistake(
            "gradients everywhere at once",
            "Your test wants every part to have a gradient in the first backward pass, and refuses right functions: "
            "while z_out is zero, only z_out has one (07.3). Ask for requires_grad, or look after a step.",
            (_tests_all_gradients,),
        ),
        Mistake(
            "returns its verdict",
            "Your test returns True or False. A test says no by raising (assert ...), and says yes by returning "
            "nothing.",
            (_tests_says,),
        ),
    ),
    alternatives=(_tests_training, _tests_list),
    hides=(),
    hints=(
        "Make a small frozen base, a hint with another number of channels, and call build_control. What must hold at "
        "once: about the output, the copy, z_in, and requires_grad? What, once you have changed the copy's weights?",
        "Assert: base(x) + z_out(copy(x + z_in(hint))) equals base(x); copy(x) equals base(x); z_in(hint) is 0; all of "
        "copy, z_in, z_out requires gradients, also with a base that came frozen, and nothing of base does; after "
        "adding 1 to the copy's weights base is unchanged.",
    ),
)

EXERCISES = (ZERO_CONV_GRADS, BUILD_CONTROL, WAKEUP_TABLE, HINTS, CONTROL_STEP, MEASURES, CONTROL_TEST)
