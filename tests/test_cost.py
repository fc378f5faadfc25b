"""Costs in closed form against torch's own counters."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from condiff_ref.cost import Cost, attention_cost, attention_layer_cost, dit_cost, sampling_cost, unet_cost
from condiff_ref.denoisers import CallCounter
from condiff_ref.dit import CONFIGS, DiT
from condiff_ref.guidance import cfg
from condiff_ref.layers import Attention
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


# Queries, keys and width of one head on 64 x 64 latents, with 77 words and with itself.
SELF, CROSS = (4096, 4096, 64), (4096, 77, 64)


def test_the_core_of_attention_in_multiply_adds_and_in_flops():
    cross, self_attention = attention_cost(*CROSS), attention_cost(*SELF)
    assert (cross.macs, cross.flops) == (40_370_176, 80_740_352)
    assert (self_attention.macs, self_attention.flops) == (2_147_483_648, 4_294_967_296)
    assert self_attention.macs / cross.macs == pytest.approx(53.19, abs=0.005)


def test_attention_matrices_in_bytes_megabytes_and_mebibytes():
    cross, self_attention = attention_cost(*CROSS), attention_cost(*SELF)
    assert cross.score_bytes == 1_261_568
    assert cross.score_mb == pytest.approx(1.26, abs=0.005)
    assert (self_attention.score_mb, self_attention.score_mib) == (67.108864, 64)
    assert self_attention.score_mib / cross.score_mb == pytest.approx(50.7, abs=0.05)  # where "50 times" comes from
    assert self_attention.score_bytes / cross.score_bytes == pytest.approx(53.19, abs=0.005)
    # at 256 x 256: 16 GiB, which is 17.18 GB
    assert attention_cost(256**2, 256**2, 64).score_bytes == 16 * 2**30


def test_heads_multiply_the_matrices_and_not_the_arithmetic():
    # eight heads of 40, two bytes per entry, a batch of two for guidance
    assert 2 * attention_cost(4096, 4096, 320, heads=8, bytes_per=2).score_bytes == 536_870_912
    assert 2 * attention_cost(4096, 77, 320, heads=8, bytes_per=2).score_bytes == 10_092_544
    assert attention_cost(4096, 77, 320, heads=8).macs == attention_cost(4096, 77, 320).macs


def test_with_its_projections_self_attention_costs_11_and_a_half_times_as_much_as_to_77_words():
    layer = (
        attention_layer_cost(4096, 4096, 320, heads=8),
        attention_layer_cost(4096, 77, 320, heads=8, context_dim=768),
    )
    assert layer[0].macs / layer[1].macs == pytest.approx(11.51, abs=0.005)
    assert attention_cost(4096, 77, 320).macs / layer[1].macs == pytest.approx(0.19, abs=0.005)


@pytest.mark.parametrize(("heads", "context_dim"), [(1, None), (4, None), (4, 10)])
def test_attention_is_what_torch_counts_and_allocates(heads, context_dim):
    attention, x = Attention(24, heads, context_dim), torch.randn(1, 9, 24)
    context = None if context_dim is None else torch.randn(1, 5, context_dim)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        _, weights = attention(x, context, return_weights=True)
    n = 9 if context is None else 5
    cost = attention_layer_cost(9, n, 24, heads, context_dim=context_dim)
    assert cost.flops == counter.get_total_flops()
    assert cost.weights == sum(parameter.numel() for parameter in attention.parameters())
    assert cost.score_bytes == weights.nbytes


DITS = [
    dict(channels=1, size=28, patch=4, dim=32, depth=2, heads=4, classes=10),
    dict(channels=3, size=8, patch=2, dim=24, depth=3, heads=2),
    dict(channels=2, size=8, patch=1, dim=16, depth=1, heads=1, classes=3, context_dim=6),
]


@pytest.mark.parametrize("arguments", DITS)
def test_dit_flops_and_weights_are_torchs_own_count(arguments):
    dit = DiT(**arguments)
    tokens = 5 if dit.context_dim else 0
    context = torch.randn(1, tokens, dit.context_dim) if tokens else None
    cost = dit_cost(dit, tokens)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        dit(torch.randn(1, dit.channels, dit.size, dit.size), torch.rand(1), context=context)
    assert cost.flops == counter.get_total_flops()
    assert cost.weights == sum(parameter.numel() for parameter in dit.parameters())


# Peebles & Xie 2023, table 4: patch 2 on 32 x 32 x 4 latents. What it calls Gflops are multiply-adds.
@pytest.mark.parametrize(("size", "published"), [("S", 6.06), ("B", 23.01), ("L", 80.71), ("XL", 118.64)])
def test_the_published_gflops_of_dit_are_multiply_adds(size, published):
    with torch.device("meta"):
        dit = DiT(4, 32, 2, **CONFIGS[size], classes=1000)
    cost = dit_cost(dit)
    assert cost.macs / 1e9 == pytest.approx(published, rel=1e-3)
    # the largest attention matrices are those of one block, not of all together
    assert cost.score_bytes == CONFIGS[size]["heads"] * 256**2 * 4


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
    with pytest.raises(ValueError, match="5 heads do not divide width 64"):
        attention_cost(4, 4, 64, heads=5)
    with pytest.raises(ValueError, match="width None, got 5 tokens"):
        dit_cost(DiT(**DITS[0]), tokens=5)
    with pytest.raises(ValueError, match="width 6, got 0 tokens"):
        dit_cost(DiT(**DITS[2]))
    with pytest.raises(ValueError, match="order=3"):
        sampling_cost(Cost(1), steps=4, order=3)
