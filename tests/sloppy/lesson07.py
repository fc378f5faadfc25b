"""Wrong answers to lesson 07 that are not on file, as people in a hurry write them."""

from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import nn

from condiff_check.lesson07 import build_control as right_build
from condiff_check.lesson07 import control_optimizer, control_step, edge, fidelity, iou, occupancy, with_strength
from condiff_ref.shapes import pad

# --- 07.1 zero_conv_grads ---------------------------------------------------------------------------------------------


def grads_of_squares(h, W, g):
    return 2 * torch.einsum("bohw,bchw->oc", g, h), 2 * g.sum((0, 2, 3)), 2 * torch.einsum("oc,bohw->bchw", W, g)


def grads_first_pixel(h, W, g):
    return torch.einsum("bo,bc->oc", g[..., 0, 0], h[..., 0, 0]), g.sum((0, 2, 3)), torch.einsum("oc,bohw->bchw", W, g)


def grads_output_for_g(h, W, g):
    z = torch.einsum("oc,bchw->bohw", W, h)
    return torch.einsum("bohw,bchw->oc", z, h), g.sum((0, 2, 3)), torch.einsum("oc,bohw->bchw", W, g)


def grads_db_per_example(h, W, g):
    return torch.einsum("bohw,bchw->oc", g, h), g.sum((2, 3)), torch.einsum("oc,bohw->bchw", W, g)


def grads_dh_mean(h, W, g):
    return torch.einsum("bohw,bchw->oc", g, h), g.sum((0, 2, 3)), torch.einsum("oc,bohw->bchw", W, g) / len(h)


def grads_kernel_axes(h, W, g):
    return torch.einsum("bohw,bchw->oc", g, h)[:, :, None, None], g.sum((0, 2, 3)), torch.einsum("oc,bohw->bchw", W, g)


def grads_zero_bias(h, W, g):
    dW = torch.einsum("bohw,bchw->oc", g, h)
    return dW, torch.zeros_like(dW[:, 0]), torch.einsum("oc,bohw->bchw", W, g)


# --- 07.2 build_control -----------------------------------------------------------------------------------------------


def small_weights(base, channels, hint_channels):
    copy, z_in, z_out = right_build(base, channels, hint_channels)
    for conv in (z_in, z_out):
        nn.init.normal_(conv.weight, std=1e-3)
    return copy, z_in, z_out


def state_dict_for_a_copy(base, channels, hint_channels):
    _, z_in, z_out = right_build(base, channels, hint_channels)
    return base.state_dict(), z_in, z_out


def base_in_no_grad(base, channels, hint_channels):
    """Thinks that no_grad while copying freezes something."""
    with torch.no_grad():
        copy = deepcopy(base)
        z_in, z_out = nn.Conv2d(hint_channels, channels, 1), nn.Conv2d(channels, channels, 1)
        for conv in (z_in, z_out):
            conv.weight.zero_()
            conv.bias.zero_()
    return copy, z_in, z_out


def first_layer_frozen(base, channels, hint_channels):
    copy, z_in, z_out = right_build(base, channels, hint_channels)
    next(base.parameters()).requires_grad_(True)
    return copy, z_in, z_out


def one_zero_conv_twice(base, channels, hint_channels):
    copy, _, z_out = right_build(base, channels, hint_channels)
    return copy, z_out, z_out


def only_two(base, channels, hint_channels):
    copy, z_in, _ = right_build(base, channels, hint_channels)
    return copy, z_in


def linear_layers(base, channels, hint_channels):
    copy, _, _ = right_build(base, channels, hint_channels)
    return copy, nn.Linear(hint_channels, channels), nn.Linear(channels, channels)


def ones_for_z_in(base, channels, hint_channels):
    copy, z_in, z_out = right_build(base, channels, hint_channels)
    nn.init.ones_(z_in.weight)
    return copy, z_in, z_out


# --- 07.3 wakeup_table ------------------------------------------------------------------------------------------------


def _any(part):
    return any(p.grad is not None and bool((p.grad != 0).any()) for p in part.parameters())


def trains_first(loss, parts, opt, steps):
    """A step before the first look."""
    rows = []
    for _ in range(steps):
        opt.zero_grad()
        loss().backward()
        opt.step()
        opt.zero_grad()
        loss().backward()
        rows.append([_any(part) for part in parts])
    return torch.tensor(rows)


def once_awake_always_awake(loss, parts, opt, steps):
    table = torch.zeros(steps, len(parts), dtype=torch.bool)
    for step in range(steps):
        opt.zero_grad()
        loss().backward()
        for i, part in enumerate(parts):
            table[step:, i] |= _any(part)
        opt.step()
    return table


def last_row_only(loss, parts, opt, steps):
    for _ in range(steps):
        opt.zero_grad()
        loss().backward()
        row = torch.tensor([_any(part) for part in parts])
        opt.step()
    return row


def norms(loss, parts, opt, steps):
    rows = []
    for _ in range(steps):
        opt.zero_grad()
        loss().backward()
        rows.append([sum(float(p.grad.norm()) for p in part.parameters() if p.grad is not None) for part in parts])
        opt.step()
    return torch.tensor(rows)


def one_step_too_many(loss, parts, opt, steps):
    table = torch.zeros(steps, len(parts), dtype=torch.bool)
    for step in range(steps + 1):
        opt.zero_grad()
        loss().backward()
        for i, part in enumerate(parts):
            table[step, i] = _any(part)
        opt.step()
    return table


def weight_by_name(loss, parts, opt, steps):
    table = torch.zeros(steps, len(parts), dtype=torch.bool)
    for step in range(steps):
        opt.zero_grad()
        loss().backward()
        for i, part in enumerate(parts):
            table[step, i] = bool(part.weight.grad.any())
        opt.step()
    return table


# --- 07.4 edge, occupancy ---------------------------------------------------------------------------------------------


def edge_sign(x):
    """Multiplies neighbours."""
    ink = F.pad((x > 0).to(x), [1] * 4)
    return (F.avg_pool2d(ink, 3, 1) > 0).to(x) - (F.avg_pool2d(ink, 3, 1) == 1).to(x) * 0.5


def edge_right_and_down(x):
    ink = F.pad((x > 0).to(x), [0, 1, 0, 1])
    here = ink[:, :, :-1, :-1]
    return ((here != ink[:, :, 1:, :-1]) | (here != ink[:, :, :-1, 1:])).to(x)


def edge_ink_frame(x):
    """Pads with ink."""
    ink = F.pad((x > 0).to(x), [1] * 4, value=1.0)
    return F.max_pool2d(ink, 3, 1) + F.max_pool2d(-ink, 3, 1)


def edge_replicated(x):
    ink = F.pad((x > 0).to(x), [1] * 4, mode="replicate")
    return F.max_pool2d(ink, 3, 1) + F.max_pool2d(-ink, 3, 1)


def edge_unpadded(x):
    ink = (x > 0).to(x)
    return F.max_pool2d(ink, 3, 1) + F.max_pool2d(-ink, 3, 1)


def edge_wide(x):
    ink = F.pad((x > 0).to(x), [2] * 4)
    return F.max_pool2d(ink, 5, 1) + F.max_pool2d(-ink, 5, 1)


def edge_below_zero(x):
    return edge(-x)


def occupancy_ceiled(x, cell):
    return (x > 0).to(x).cumsum(-1).clamp(max=1)


def occupancy_minus_one(x, cell):
    return 2 * occupancy(x, cell) - 1


def occupancy_sliding(x, cell):
    ink = F.pad((x > 0).to(x), [0, cell - 1, 0, cell - 1])
    return F.max_pool2d(ink, cell, stride=1)


def occupancy_full(x, cell):
    coarse = -F.max_pool2d(-(x > 0).to(x), cell)
    return F.interpolate(coarse, scale_factor=cell)


def occupancy_rows_only(x, cell):
    coarse = F.max_pool2d((x > 0).to(x), (cell, 1))
    return coarse.repeat_interleave(cell, dim=2)


# --- 07.5 control_optimizer, control_step -----------------------------------------------------------------------------


def sgd(model, lr):
    return torch.optim.SGD(model.control.parameters(), lr=lr)


def hidden_lr(model, lr):
    return torch.optim.AdamW(model.control.parameters(), lr=lr / 10, weight_decay=0.01)


def decay_of_one_percent(model, lr):
    return torch.optim.AdamW(model.control.parameters(), lr=lr, weight_decay=0.1)


def step_with(change):
    """The reference step, but for what `change` does to its arguments and its parts."""

    def wrong(model, opt, x0, hint, y, p, abar, gen):
        model.base.eval()
        model.control.train()
        abar = abar.to(x0)
        t = torch.randint(1, len(abar), (len(x0),), generator=gen)
        eps = torch.randn(x0.shape, generator=gen, dtype=x0.dtype)
        xt = pad(abar[t].sqrt(), x0) * x0 + pad((1 - abar[t]).sqrt(), x0) * eps
        y = torch.where(torch.rand(y.shape, generator=gen) < p, model.null, y)
        out, target = change(model, xt, t, y, hint, eps, x0)
        loss = F.mse_loss(out, target)
        opt.zero_grad()
        loss.backward()
        opt.step()
        return loss.item()

    return wrong


hint_of_noise = step_with(lambda model, xt, t, y, hint, eps, x0: (model(xt, t, y, (xt > 0).to(xt)), eps))
hint_is_x0 = step_with(lambda model, xt, t, y, hint, eps, x0: (model(xt, t, y, x0), eps))
hint_centred = step_with(lambda model, xt, t, y, hint, eps, x0: (model(xt, t, y, 2 * hint - 1), eps))
clean_input = step_with(lambda model, xt, t, y, hint, eps, x0: (model(x0, t, y, hint), eps))
velocity_target = step_with(lambda model, xt, t, y, hint, eps, x0: (model(xt, t, y, hint), eps - x0))
hint_half_the_time = step_with(
    lambda model, xt, t, y, hint, eps, x0: (model(xt, t, y, hint * pad((t % 2).to(hint), hint)), eps)
)
two_passes = step_with(
    lambda model, xt, t, y, hint, eps, x0: ((model(xt, t, y, hint) + model(xt, t, y, 0 * hint)) / 2, eps)
)


def base_thawed_after(model, opt, x0, hint, y, p, abar, gen):
    loss = control_step(model, opt, x0, hint, y, p, abar, gen)
    model.requires_grad_(True)
    return loss


def train_after(model, opt, x0, hint, y, p, abar, gen):
    loss = control_step(model, opt, x0, hint, y, p, abar, gen)
    model.train()
    return loss


def loss_without_number(model, opt, x0, hint, y, p, abar, gen):
    control_step(model, opt, x0, hint, y, p, abar, gen)


# --- 07.6 iou, fidelity, with_strength --------------------------------------------------------------------------------


def iou_epsilon(a, b):
    return (a * b).flatten(1).sum(1) / (torch.maximum(a, b).flatten(1).sum(1) + 1e-8)


def iou_smoothed(a, b):
    return ((a * b).flatten(1).sum(1) + 1) / (torch.maximum(a, b).flatten(1).sum(1) + 1)


def iou_summed_rows(a, b):
    return (a * b).sum((2, 3)) / torch.maximum(a, b).sum((2, 3))


def iou_xor(a, b):
    return 1 - (a - b).abs().flatten(1).mean(1)


def fidelity_tensors(drawn, hints):
    own = iou(drawn, hints)
    return own, torch.stack([iou(drawn, hints.roll(k, 0)) for k in range(1, len(hints))]).mean(0)


def fidelity_best(drawn, hints):
    others = torch.stack([iou(drawn, hints.roll(k, 0)) for k in range(1, len(hints))])
    return iou(drawn, hints).mean().item(), others.amax(0).mean().item()


def fidelity_last_only(drawn, hints):
    others = [iou(drawn, hints.roll(k, 0)).mean() for k in range(1, len(hints) - 1)]
    return iou(drawn, hints).mean().item(), torch.stack(others).mean().item()


def fidelity_of_the_mean(drawn, hints):
    mean = hints.mean(0, keepdim=True).round().expand_as(hints)
    return iou(drawn, hints).mean().item(), iou(drawn, mean).mean().item()


def strength_squared(base, control, strength):
    return lambda xt, t, y, hint: base(xt, t, y, [strength**2 * r for r in control(xt, t, y, hint)])


def strength_added(base, control, strength):
    return lambda xt, t, y, hint: base(xt, t, y, [strength + r for r in control(xt, t, y, hint)])


def strength_clipped(base, control, strength):
    s = min(max(strength, 0.0), 1.0)
    return lambda xt, t, y, hint: base(xt, t, y, [s * r for r in control(xt, t, y, hint)])


def strength_called(base, control, strength):
    return base(control(strength))


def strength_on_xt(base, control, strength):
    return lambda xt, t, y, hint: base(xt, t, y, control(strength * xt, t, y, hint))


# --- 07.7 my_control_test ---------------------------------------------------------------------------------------------


def no_assertion(build_control):
    base = nn.Conv2d(3, 3, 1)
    copy, _, z_out = build_control(base, 3, 1)
    x = torch.randn(1, 3, 4, 4)
    torch.equal(z_out(copy(x)), torch.zeros(1, 3, 4, 4))


def trainable_base_only(build_control):
    base = nn.Conv2d(3, 3, 3, padding=1)
    x, hint = torch.randn(1, 3, 4, 4), torch.randn(1, 1, 4, 4)
    copy, z_in, z_out = build_control(base, 3, 1)
    assert torch.equal(base(x) + z_out(copy(x + z_in(hint))), base(x))
    assert not base.weight.requires_grad


def same_weights(build_control):
    base = nn.Conv2d(3, 3, 3, padding=1)
    copy, _, _ = build_control(base, 3, 2)
    assert copy.weight is base.weight


def compares_with_ones_own(build_control):
    base = nn.Conv2d(3, 3, 3, padding=1)
    mine, theirs = right_build(deepcopy(base), 3, 2), build_control(base, 3, 2)
    assert mine == theirs


def counts_parameters(build_control):
    base = nn.Conv2d(3, 3, 3, padding=1)
    parts = build_control(base, 3, 2)
    assert sum(p.numel() for part in parts for p in part.parameters()) == 84 + 9 + 12


_step, _optimizer = control_step, control_optimizer

SLOPPY = (
    ("07.1", "factor 2", (grads_of_squares,)),
    ("07.1", "first pixel", (grads_first_pixel,)),
    ("07.1", "z for g", (grads_output_for_g,)),
    ("07.1", "db per example", (grads_db_per_example,)),
    ("07.1", "dh divided by the batch", (grads_dh_mean,)),
    ("07.1", "dW with kernel axes", (grads_kernel_axes,)),
    ("07.1", "db zero", (grads_zero_bias,)),
    ("07.2", "small random weights", (small_weights,)),
    ("07.2", "a state dict for a copy", (state_dict_for_a_copy,)),
    ("07.2", "no_grad for freezing", (base_in_no_grad,)),
    ("07.2", "one layer of base not frozen", (first_layer_frozen,)),
    ("07.2", "one convolution for both", (one_zero_conv_twice,)),
    ("07.2", "two parts", (only_two,)),
    ("07.2", "linear layers", (linear_layers,)),
    ("07.2", "z_in of ones", (ones_for_z_in,)),
    ("07.3", "a step before the look", (trains_first,)),
    ("07.3", "once awake, always awake", (once_awake_always_awake,)),
    ("07.3", "last row only", (last_row_only,)),
    ("07.3", "norms", (norms,)),
    ("07.3", "one step too many", (one_step_too_many,)),
    ("07.3", "part.weight", (weight_by_name,)),
    ("07.4", "half inside", (edge_sign, occupancy)),
    ("07.4", "right and down only", (edge_right_and_down, occupancy)),
    ("07.4", "ink around the picture", (edge_ink_frame, occupancy)),
    ("07.4", "border repeated", (edge_replicated, occupancy)),
    ("07.4", "smaller picture", (edge_unpadded, occupancy)),
    ("07.4", "5x5", (edge_wide, occupancy)),
    ("07.4", "ink below 0", (edge_below_zero, occupancy)),
    ("07.4", "everything after the first ink", (edge, occupancy_ceiled)),
    ("07.4", "map of -1 and 1", (edge, occupancy_minus_one)),
    ("07.4", "sliding window", (edge, occupancy_sliding)),
    ("07.4", "full blocks only", (edge, occupancy_full)),
    ("07.4", "rows only", (edge, occupancy_rows_only)),
    ("07.5", "SGD", (sgd, _step)),
    ("07.5", "lr divided by 10", (hidden_lr, _step)),
    ("07.5", "ten times the decay", (decay_of_one_percent, _step)),
    ("07.5", "hint made from x_t", (_optimizer, hint_of_noise)),
    ("07.5", "x0 for a hint", (_optimizer, hint_is_x0)),
    ("07.5", "hint in [-1, 1]", (_optimizer, hint_centred)),
    ("07.5", "clean x0 for x_t", (_optimizer, clean_input)),
    ("07.5", "velocity for a target", (_optimizer, velocity_target)),
    ("07.5", "hint every other time", (_optimizer, hint_half_the_time)),
    ("07.5", "mean of two passes", (_optimizer, two_passes)),
    ("07.5", "everything thawed at the end", (_optimizer, base_thawed_after)),
    ("07.5", "train() at the end", (_optimizer, train_after)),
    ("07.5", "no loss returned", (_optimizer, loss_without_number)),
    ("07.6", "epsilon in the denominator", (iou_epsilon, fidelity, with_strength)),
    ("07.6", "plus one", (iou_smoothed, fidelity, with_strength)),
    ("07.6", "channel axis kept", (iou_summed_rows, fidelity, with_strength)),
    ("07.6", "one minus the error", (iou_xor, fidelity, with_strength)),
    ("07.6", "one value per picture", (iou, fidelity_tensors, with_strength)),
    ("07.6", "best other hint", (iou, fidelity_best, with_strength)),
    ("07.6", "last shift left out", (iou, fidelity_last_only, with_strength)),
    ("07.6", "mean hint for chance", (iou, fidelity_of_the_mean, with_strength)),
    ("07.6", "strength squared", (iou, fidelity, strength_squared)),
    ("07.6", "strength added", (iou, fidelity, strength_added)),
    ("07.6", "strength cut to [0, 1]", (iou, fidelity, strength_clipped)),
    ("07.6", "no function returned", (iou, fidelity, strength_called)),
    ("07.6", "strength on x_t", (iou, fidelity, strength_on_xt)),
    ("07.7", "no assertion", (no_assertion,)),
    ("07.7", "a trainable base only", (trainable_base_only,)),
    ("07.7", "weights must be the same object", (same_weights,)),
    ("07.7", "compares modules with ==", (compares_with_ones_own,)),
    ("07.7", "counts parameters", (counts_parameters,)),
)

WEAK = {"weights must be the same object", "compares modules with =="}
