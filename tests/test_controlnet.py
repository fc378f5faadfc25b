"""ControlNet: it starts as the base, learns from both ends inwards, and never moves the base."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from awake import awake
from condiff_ref.controlnet import ControlNet, ZeroConv, controlled
from condiff_ref.unet import UNet

# Widths of which each norm takes two channels or more together: alone, a bias before it would have no gradient.
SIZES = dict(channels=2, widths=(16, 24), classes=5, emb_dim=16)


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def batch(n: int = 3, side: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    label = torch.arange(n)
    return torch.randn(n, 2, side, side).double(), torch.rand(n).double(), torch.randn(n, 1, side, side).double(), label


def frozen_base(**options) -> UNet:
    return awake(UNet(**SIZES | options)).requires_grad_(False)


# --- the zero convolution --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [1, 3])
def test_a_zero_convolution_is_silent_and_keeps_the_size(side):
    out = ZeroConv(3, 4, side)(torch.randn(2, 3, 6, 7))
    assert out.shape == (2, 4, 6, 7)
    assert not out.any()


@pytest.mark.parametrize("at_zero", [True, False])
def test_its_gradients_are_those_derived(at_zero):
    # summed over batch and pixels: dW = g h^T, db = g; at each pixel dh = W^T g
    conv, h = ZeroConv(3, 4).double(), torch.randn(2, 3, 5, 6).double().requires_grad_()
    if not at_zero:
        awake(conv)
    g = torch.randn(2, 4, 5, 6).double()
    conv(h).backward(g)
    per_pixel = [(g[i, :, r, c], h[i, :, r, c]) for i in range(2) for r in range(5) for c in range(6)]
    assert_close(conv.weight.grad[..., 0, 0], sum(torch.outer(out, into) for out, into in per_pixel).detach())
    assert_close(conv.bias.grad, sum(out for out, _ in per_pixel))
    weight = conv.weight[..., 0, 0].detach()
    dh = torch.stack([weight.T @ out for out, _ in per_pixel]).reshape(2, 5, 6, 3).movedim(-1, 1)
    assert_close(h.grad, dh)
    assert h.grad.any().item() is not at_zero


def test_one_step_of_gradient_descent_wakes_what_stands_before_it():
    # h = (1, 2), g = (3, -1), rate 0.1: after the step dh = -0.1 |g|^2 h = (-1, -2)
    conv, h = ZeroConv(2, 2), torch.tensor([1.0, 2]).reshape(1, 2, 1, 1).requires_grad_()
    g = torch.tensor([3.0, -1]).reshape(1, 2, 1, 1)
    conv(h).backward(g)
    assert_close(conv.weight.grad[..., 0, 0], torch.tensor([[3.0, 6], [-1, -2]]))
    assert_close(conv.bias.grad, torch.tensor([3.0, -1]))
    assert not h.grad.any()
    torch.optim.SGD(conv.parameters(), lr=0.1).step()
    conv(h).backward(g)
    assert_close(h.grad.flatten(), torch.tensor([-1.0, -2]))


def test_from_an_input_of_zero_the_bias_learns_and_the_weight_does_not():
    conv = ZeroConv(3, 4)
    conv(torch.zeros(2, 3, 5, 5)).sum().backward()
    assert not conv.weight.grad.any()
    assert_close(conv.bias.grad, torch.full((4,), 50.0))


# --- the copy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context_dim", [None, 6])
def test_the_copy_is_the_encoder_and_nothing_else(context_dim):
    base = frozen_base(context_dim=context_dim)
    copied, of_base = ControlNet(base, 1).copy.state_dict(), base.state_dict()
    decoder = ("up_blocks.", "ups.", "norm.", "head.")
    assert set(copied) == {name for name in of_base if not name.startswith(decoder)}
    assert all(torch.equal(copied[name], of_base[name]) for name in copied)


def test_the_copy_of_a_frozen_base_can_learn_and_shares_nothing_with_it():
    base = frozen_base()
    controlnet = ControlNet(base, 1)
    assert all(parameter.requires_grad for parameter in controlnet.parameters())
    assert not any(parameter.requires_grad for parameter in base.parameters())
    storage = {parameter.data_ptr() for parameter in base.parameters()}
    assert not storage & {parameter.data_ptr() for parameter in controlnet.parameters()}


def test_the_copy_starts_without_gradients_of_the_base():
    base, (xt, t, _, label) = awake(UNet(**SIZES)), batch()
    base(xt, t, label=label).sum().backward()
    assert all(parameter.grad is None for parameter in ControlNet(base, 1).parameters())


@pytest.mark.parametrize("at", ["in", "out"])
def test_there_are_zero_convolutions_at_both_ends(at):
    base, (xt, t, hint, label) = frozen_base(), batch()
    controlnet = ControlNet(base, 1).double()
    ends = [controlnet.zero_in] if at == "in" else list(controlnet.zero_out)
    assert len(ends) == (1 if at == "in" else 3)  # two widths and the middle
    zeros = [layer.weight.any() or layer.bias.any() for layer in ends]
    assert not any(zeros)
    awake(controlnet)
    residuals = controlnet(xt, t, hint, label=label)
    assert all(residual.abs().amax() > 1e-3 for residual in residuals)
    for layer in ends:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    if at == "out":
        assert not any(residual.any() for residual in controlnet(xt, t, hint, label=label))
    else:  # the hint does not come in: any other does the same
        assert all(map(torch.equal, controlnet(xt, t, hint, label=label), controlnet(xt, t, -hint, label=label)))


def test_with_an_open_output_the_residuals_are_the_bases_own_features():
    # zero_out the identity and zero_in still zero: the copy says what the base's encoder says
    base, (xt, t, hint, label) = frozen_base(), batch()
    controlnet = ControlNet(base, 1).double()
    for layer in controlnet.zero_out:
        nn.init.dirac_(layer.weight)
    seen = []
    hooks = [layer.register_forward_hook(lambda *call: seen.append(call[2])) for layer in base.down_blocks]
    hooks.append(base.middle.register_forward_hook(lambda *call: seen.append(call[2])))
    base(xt, t, label=label)
    assert all(map(torch.equal, controlnet(xt, t, hint, label=label), seen))


def test_the_hint_is_added_to_the_output_of_the_stem():
    # a stem that answers zero for xt and zero_in that answers the stem's old output give the same features
    base, (xt, t, hint, label) = frozen_base(), batch()
    controlnet, moved = awake(ControlNet(base, 1)), awake(ControlNet(base, 1))
    moved.load_state_dict(controlnet.state_dict())
    added = controlnet.zero_in(controlnet.hint_encoder(hint))
    moved.copy.stem.register_forward_hook(lambda module, inputs, out: out + added)
    moved.zero_in.register_forward_hook(lambda module, inputs, out: 0 * out)
    for ours, expected in zip(controlnet(xt, t, hint, label=label), moved(xt, t, hint, label=label), strict=True):
        assert_close(ours, expected)


def test_time_label_hint_and_xt_each_reach_every_residual():
    controlnet, (xt, t, hint, label) = awake(ControlNet(frozen_base(), 1)), batch()
    residuals = controlnet(xt, t, hint, label=label)
    others = [
        controlnet(xt / 2, t, hint, label=label),
        controlnet(xt, t / 2, hint, label=label),
        controlnet(xt, t, hint / 2, label=label),
        controlnet(xt, t, hint, label=label + 1),
        controlnet(xt, t, hint),
    ]
    for other in others:
        assert all((a - b).abs().amax() > 1e-3 for a, b in zip(residuals, other, strict=True))


def test_context_reaches_the_middle():
    controlnet, (xt, t, hint, _) = awake(ControlNet(frozen_base(context_dim=6), 1)), batch()
    context = torch.randn(3, 4, 6).double()
    *skips, middle = controlnet(xt, t, hint, context=context)
    *other_skips, other_middle = controlnet(xt, t, hint, context=-context)
    assert (middle - other_middle).abs().amax() > 1e-3
    assert all(map(torch.equal, skips, other_skips))  # the context enters at the lowest resolution alone


def test_examples_do_not_see_one_another():
    base, (xt, t, hint, label) = frozen_base(), batch()
    controlnet = awake(ControlNet(base, 1))
    together = controlled(base, controlnet, hint)(xt, t, label=label)
    each = [slice(i, i + 1) for i in range(3)]
    alone = [controlled(base, controlnet, hint[i])(xt[i], t[i], label=label[i]) for i in each]
    assert_close(together, torch.cat(alone))


# --- controlled ------------------------------------------------------------------------------------------------------

BASES = [dict(), dict(context_dim=6), dict(padding=2, patch=2), dict(classes=None)]


@pytest.mark.parametrize("options", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_fresh_control_and_strength_0_are_the_base_bit_for_bit(options, dtype):
    base = frozen_base(**options).to(dtype)
    xt, t, hint, label = batch()
    xt, t, hint = xt.to(dtype), t.to(dtype), hint.to(dtype)
    conditions = dict(label=label) if base.label_embedding is not None else {}
    if base.attention is not None:
        conditions["context"] = torch.randn(3, 4, 6).to(dtype)
    plain = base(xt, t, **conditions)
    fresh = ControlNet(base, 1).to(dtype)
    assert torch.equal(controlled(base, fresh, hint)(xt, t, **conditions), plain)
    trained = awake(ControlNet(base, 1)).to(dtype)
    assert torch.equal(controlled(base, trained, hint, strength=0.0)(xt, t, **conditions), plain)
    assert (controlled(base, trained, hint)(xt, t, **conditions) - plain).abs().amax() > 1e-3


def test_strength_multiplies_what_the_base_is_given():
    base, (xt, t, hint, label) = frozen_base(), batch()
    controlnet = awake(ControlNet(base, 1))
    residuals = [0.3 * residual for residual in controlnet(xt, t, hint, label=label)]
    expected = base(xt, t, label=label, residuals=residuals)
    assert_close(controlled(base, controlnet, hint, strength=0.3)(xt, t, label=label), expected)
    assert (controlled(base, controlnet, hint)(xt, t, label=label) - expected).abs().amax() > 1e-3


def test_the_hint_is_folded_and_padded_as_the_picture_is():
    # moving picture and hint by one patch moves the residuals by one pixel, away from the border
    base = awake(UNet(2, (16,), padding=2, patch=2, emb_dim=16))
    controlnet = awake(ControlNet(base, 1))
    for module in controlnet.modules():
        if isinstance(module, nn.GroupNorm):  # it sees the whole picture, border included
            module.forward = lambda x: x
    xt, t, hint, _ = batch(1, 28)
    features = controlnet(xt, t, hint)[0]
    moved = controlnet(xt.roll(2, dims=3), t, hint.roll(2, dims=3))[0]
    assert features.shape == (1, 16, 16, 16)
    assert_close(moved[..., 8:-7], features[..., 7:-8])
    assert (controlnet(xt, t, hint.roll(2, dims=3))[0] - features)[..., 8:-7].abs().amax() > 1e-3


@pytest.mark.parametrize("shape", [(3, 1, 8, 4), (3, 1, 4, 4), (3, 2, 8, 8), (1, 1, 8, 8)])
def test_a_hint_of_another_shape_is_named(shape):
    base, (xt, t, _, label) = frozen_base(), batch()
    network = controlled(base, ControlNet(base, 1).double(), torch.randn(shape).double())
    sizes = ", ".join(map(str, shape))
    message = rf"with xt \(3, 2, 8, 8\) the hint must be \(3, 1, 8, 8\), got \({sizes}\)"
    with pytest.raises(ValueError, match=message):
        network(xt, t, label=label)


def test_what_the_base_refuses_the_control_refuses():
    base, (xt, t, hint, label) = frozen_base(), batch()
    controlnet = ControlNet(base, 1).double()
    with pytest.raises(ValueError, match="labels are 0 to 4"):
        controlnet(xt, t, hint, label=label + 4)
    with pytest.raises(ValueError, match=r"takes \(b, 2, h, w\) .* got \(3, 1, 8, 8\)"):
        controlnet(hint, t, hint, label=label)
    with pytest.raises(ValueError, match=r"multiples of 2, got \(3, 2, 7, 8\)"):
        controlnet(xt[:, :, 1:], t, hint[:, :, 1:], label=label)


# --- who learns when -------------------------------------------------------------------------------------------------

FIRST_BACKWARD = {"zero_out": 0, "copy": 1, "zero_in": 1, "hint_encoder": 2}


@pytest.mark.parametrize("context_dim", [None, 6])
def test_outputs_learn_first_then_the_copy_then_the_hint_encoder(context_dim):
    base, (xt, t, hint, label) = frozen_base(context_dim=context_dim), batch()
    context = torch.randn(3, 4, 6).double() if context_dim else None
    controlnet = ControlNet(base, 1).double()
    sgd, target = torch.optim.SGD(controlnet.parameters(), lr=0.1), torch.randn_like(xt)
    network, mirrored = controlled(base, controlnet, hint), controlled(base, controlnet, -hint)
    plain = base(xt, t, label=label, context=context)
    for backward in range(3):
        out = network(xt, t, label=label, context=context)
        assert (out != plain).any() == (backward > 0)
        # the hint is first seen in forward 2
        assert (out != mirrored(xt, t, label=label, context=context)).any() == (backward == 2)
        sgd.zero_grad()
        (out - target).square().mean().backward()
        learns = {name: bool(parameter.grad.any()) for name, parameter in controlnet.named_parameters()}
        assert learns == {name: backward >= FIRST_BACKWARD[name.split(".")[0]] for name in learns}
        sgd.step()


def test_the_first_step_does_not_depend_on_the_hint():
    base, (xt, t, hint, label) = frozen_base(), batch()
    controlnet = ControlNet(base, 1).double()
    gradients = []
    for picture in (hint, -3 * hint):
        controlnet.zero_grad()
        controlled(base, controlnet, picture)(xt, t, label=label).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in controlnet.zero_out.parameters()])
    assert all(map(torch.equal, *gradients))


def test_training_the_control_moves_the_output_and_never_the_base():
    base, (xt, t, hint, label) = frozen_base(), batch()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    plain = base(xt, t, label=label)
    controlnet = ControlNet(base, 1).double()
    adamw = torch.optim.AdamW(controlnet.parameters(), lr=1e-2, weight_decay=0.1)
    target, losses = torch.randn_like(xt), []
    for _ in range(40):
        adamw.zero_grad()
        loss = (controlled(base, controlnet, hint)(xt, t, label=label) - target).square().mean()
        loss.backward()
        adamw.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert all(parameter.grad is None for parameter in base.parameters())
    assert torch.equal(base(xt, t, label=label), plain)
