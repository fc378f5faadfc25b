"""Costs in closed form against torch's own counters."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from condiff_ref.cost import Cost, sampling_cost, unet_cost
from condiff_ref.denoisers import CallCounter
from condiff_ref.guidance import cfg
from condiff_ref.samplers import euler_step, heun_step, sample
from condiff_ref.schedules import flow, time_grid
from condiff_ref.unet import UNet

NETWORKS = [
    (dict(channels=1, widths=(32, 64), classes=10, patch=2), 28, 28),
    (dict(channels=3, widths=(16, 24, 40)), 16, 24),
    (dict(channels=1, widths=(8,), classes=3, emb_dim=32), 8, 8),
    (dict(channels=1, widths=(8, 12, 16), padding=2, patch=2), 28, 20),
]


@pytest.mark.parametrize(("arguments", "height", "width"), NETWORKS)
def test_unet_flops_and_weights_are_torchs_own_count(arguments, height, width):
    unet = UNet(**arguments)
    cost = unet_cost(unet, height, width)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(torch.randn(1, arguments["channels"], height, width), torch.rand(1))
    assert cost.flops == counter.get_total_flops()
    assert cost.weights == sum(parameter.numel() for parameter in unet.parameters())


@pytest.mark.parametrize(("make_step", "order"), [(euler_step, 1), (heun_step, 2)])
def test_sampling_evaluates_the_network_as_often_as_the_formula_says(make_step, order):
    network = CallCounter(lambda xt, t: 0 * xt)
    sample(make_step(flow()), cfg(network, network, 2.0), torch.randn(1, 2), time_grid(7))
    assert sampling_cost(Cost(1), steps=7, passes=2, order=order).macs == network.calls


def test_a_multiply_add_is_two_flops_and_costs_add_up():
    total = Cost(3, weights=5, score_bytes=8) + Cost(4, weights=1, score_bytes=2)
    assert (total.flops, total.weights, total.score_bytes) == (14, 6, 8)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="without context_dim"):
        unet_cost(UNet(1, (8,), context_dim=4), 8, 8)
    with pytest.raises(ValueError, match="multiples of 4, got 28 x 30"):
        unet_cost(UNet(1, (8, 8), patch=2), 28, 30)
    with pytest.raises(ValueError, match="order=3"):
        sampling_cost(Cost(1), steps=4, order=3)
