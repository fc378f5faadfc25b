"""The networks: what each condition does, and that examples never see one another."""

import math

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import nn
from torch.testing import assert_close

from awake import awake
from condiff_ref.classifier import NoisyClassifier, classifier_loss, clean_loss, log_prob_of
from condiff_ref.controlnet import ControlNet, controlled
from condiff_ref.dit import DiT
from condiff_ref.layers import Attention, GroupNorm, LabelEmbedding, ResBlock, time_embedding
from condiff_ref.schedules import flow
from condiff_ref.unet import CrossAttention2d, UNet

SIZES = {"channels": 2, "widths": (8, 12, 16), "classes": 5, "emb_dim": 16}


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def batch(n: int = 3, side: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(n, 2, side, side).double(), torch.rand(n).double(), torch.randint(0, 5, (n,))


def test_time_embedding_is_diffusers_at_a_thousand_t():
    t = torch.rand(7)
    theirs = get_timestep_embedding(1000 * t, 32, downscale_freq_shift=0)
    assert_close(time_embedding(t, 32), theirs, atol=1e-4, rtol=0)  # float32 sines of angles up to 1000


def test_time_embedding_has_norm_sqrt_half_its_width_and_tells_times_apart():
    embedding = time_embedding(torch.tensor([0.1, 0.9], dtype=torch.float64), 64)
    assert_close(embedding.norm(dim=1), torch.full((2,), math.sqrt(32), dtype=torch.float64))
    assert nn.functional.cosine_similarity(embedding[:1], embedding[1:]) < 0.5


def test_time_embedding_refuses_an_odd_width():
    with pytest.raises(ValueError, match="even, got 7"):
        time_embedding(torch.rand(2), 7)


def test_attention_is_torchs_own():
    ours, theirs = awake(Attention(12, 3, context_dim=5)), nn.MultiheadAttention(12, 3, batch_first=True).double()
    theirs = nn.MultiheadAttention(12, 3, kdim=5, vdim=5, batch_first=True).double()
    with torch.no_grad():
        key, value = ours.to_kv.weight.chunk(2)
        theirs.q_proj_weight.copy_(ours.to_q.weight)
        theirs.k_proj_weight.copy_(key)
        theirs.v_proj_weight.copy_(value)
        theirs.in_proj_bias.zero_()
        theirs.out_proj.load_state_dict(ours.to_out.state_dict())
    x, context = torch.randn(2, 7, 12).double(), torch.randn(2, 4, 5).double()
    mask = torch.tensor([[True, True, False, True], [True, False, False, True]])
    expected, weights = theirs(x, context, context, key_padding_mask=~mask, average_attn_weights=False)
    out, ours_weights = ours(x, context, mask, return_weights=True)
    assert_close(out, expected)
    assert_close(ours_weights, weights)
    assert_close(ours(x, context, mask), expected)


def test_attention_refuses_another_context_and_heads_that_do_not_divide():
    with pytest.raises(ValueError, match=r"width 5, got shape \(2, 4, 6\)"):
        Attention(12, 3, context_dim=5)(torch.randn(2, 7, 12), torch.randn(2, 4, 6))
    with pytest.raises(ValueError, match="width 5, got none"):
        Attention(12, 3, context_dim=5)(torch.randn(2, 7, 12))
    with pytest.raises(ValueError, match="5 heads do not divide width 12"):
        Attention(12, 5)


def test_a_fresh_residual_block_is_the_identity():
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(ResBlock(8, 8, 16)(x, torch.randn(2, 16)), x)


@pytest.mark.parametrize("double", [False, True])
def test_group_norm_is_torchs_and_keeps_the_precision_of_its_weights_under_autocast(double):
    norm, x = GroupNorm(2, 6), torch.randn(3, 6, 4, 4).bfloat16()
    norm = norm.double() if double else norm
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = norm(x)
    assert out.dtype == norm.weight.dtype
    groups = x.to(out.dtype).reshape(3, 2, 3, 4, 4)
    var, mean = torch.var_mean(groups, dim=(2, 3, 4), keepdim=True, correction=0)
    assert_close(out, ((groups - mean) / (var + norm.eps).sqrt()).reshape(x.shape), atol=1e-6, rtol=1e-6)


def test_the_null_label_is_one_beyond_the_classes():
    embedding = LabelEmbedding(5, 4)
    assert embedding.null == 5
    assert embedding(torch.tensor([0, 4, 5])).shape == (3, 4)


def test_a_fresh_unet_outputs_zero():
    xt, t, label = batch()
    assert not UNet(**SIZES).double()(xt, t, label=label).any()


@pytest.mark.parametrize("patch", [1, 2])
def test_unet_examples_do_not_see_one_another(patch):
    unet, (xt, t, label) = awake(UNet(**SIZES, patch=patch)), batch()
    together = unet(xt, t, label=label)
    alone = torch.cat([unet(xt[i : i + 1], t[i : i + 1], label=label[i : i + 1]) for i in range(3)])
    assert_close(together, alone)


def test_no_label_is_the_null_label_and_other_labels_are_not():
    unet, (xt, t, label) = awake(UNet(**SIZES)), batch()
    nothing = unet(xt, t)
    assert torch.equal(nothing, unet(xt, t, label=torch.full_like(label, unet.null)))
    assert all((unet(xt, t, label=torch.full_like(label, k)) - nothing).abs().amax() > 1e-3 for k in range(5))


def test_time_reaches_every_output():
    unet, (xt, t, label) = awake(UNet(**SIZES)), batch()
    assert (unet(xt, t, label=label) - unet(xt, t / 2, label=label)).abs().amin(dim=(0, 2, 3)).gt(0).all()


def test_every_pixel_reaches_every_pixel():
    # three resolutions of 3x3 convolutions and the norms: the middle of an 8x8 picture depends on all of it
    unet, (xt, t, label) = awake(UNet(**SIZES)), batch(1)
    gradient = torch.autograd.functional.jacobian(lambda x: unet(x, t, label=label)[0, 0, 4, 4], xt)
    assert gradient.abs().gt(0).all()


def test_residuals_of_zero_change_nothing_and_each_one_matters():
    unet, (xt, t, label) = awake(UNet(**SIZES)), batch()
    shapes = [(3, 8, 8, 8), (3, 12, 4, 4), (3, 16, 2, 2), (3, 16, 2, 2)]
    plain = unet(xt, t, label=label)
    zeros = [torch.zeros(shape).double() for shape in shapes]
    assert torch.equal(unet(xt, t, label=label, residuals=zeros), plain)
    for i in range(len(shapes)):
        one = [zero + (i == j) * torch.randn_like(zero) for j, zero in enumerate(zeros)]
        assert (unet(xt, t, label=label, residuals=one) - plain).abs().amax() > 1e-3


def test_tokens_behind_the_mask_change_nothing():
    xt, t, label = batch()
    context, noise = torch.randn(3, 4, 6).double(), torch.randn(3, 2, 6).double()
    padded, mask = torch.cat([context, noise], dim=1), torch.tensor([[True] * 4 + [False] * 2]).expand(3, -1)
    unet, dit = awake(UNet(**SIZES, context_dim=6)), awake(DiT(2, 8, 2, 8, 2, 2, classes=5, context_dim=6))
    guided = controlled(unet, awake(ControlNet(unet, 1)), torch.rand(3, 1, 8, 8).double())
    for network in (unet, dit, guided):
        expected = network(xt, t, label=label, context=context)
        assert_close(network(xt, t, label=label, context=padded, mask=mask), expected)
        assert not torch.allclose(network(xt, t, label=label, context=padded), expected)


def test_in_cross_attention_a_pixel_knows_its_place_and_nothing_of_other_pixels():
    layer, context = awake(CrossAttention2d(8, 6)), torch.randn(1, 4, 6).double()
    x = torch.ones(1, 8, 3, 5).double()
    read = (layer(x, context) - x)[0].flatten(1)
    assert torch.pdist(read.T).min() > 1e-4  # equal pixels read the words differently, each in its own way
    layer.norm = nn.Identity()  # which sees the whole picture
    x = torch.randn(1, 8, 3, 5).double()
    moved = x.clone()
    moved[0, :, 1, 2] += 1
    changed = (layer(moved, context) - layer(x, context)).abs().amax(dim=1)[0] > 0
    assert changed.nonzero().tolist() == [[1, 2]]


def test_context_is_read_and_starts_silent():
    unet, (xt, t, label) = UNet(**SIZES, context_dim=6), batch()
    context = torch.randn(3, 4, 6).double()
    assert not unet.attention.attention.to_out.weight.any()
    unet = awake(unet)
    assert (unet(xt, t, label=label, context=context) - unet(xt, t, label=label, context=-context)).abs().amax() > 1e-3
    with pytest.raises(ValueError, match="width 6, got none"):
        unet(xt, t, label=label)


@pytest.mark.parametrize(
    ("shape", "label", "message"),
    [
        ((1, 2, 9, 8), None, r"multiples of 4, got \(1, 2, 9, 8\)"),
        ((1, 2, 8, 6), None, r"multiples of 4, got \(1, 2, 8, 6\)"),
        ((1, 2, 6, 6), None, r"multiples of 4, got \(1, 2, 6, 6\)"),
        ((1, 1, 8, 8), None, r"takes \(b, 2, h, w\)"),
        ((1, 2, 8, 8), 6, "labels are 0 to 4, and 5 for none"),
        ((1, 2, 8, 8), -1, "labels are 0 to 4"),
    ],
)
def test_unet_names_what_it_cannot_take(shape, label, message):
    label = None if label is None else torch.tensor([label])
    with pytest.raises(ValueError, match=message):
        UNet(**SIZES)(torch.randn(shape), torch.rand(1), label=label)


def test_padding_widens_what_halves_and_is_cut_off_again():
    unet = awake(UNet(1, (8, 8, 8), padding=2, patch=2))
    assert unet(torch.randn(1, 1, 28, 28).double(), torch.rand(1).double()).shape == (1, 1, 28, 28)
    with pytest.raises(ValueError, match=r"multiples of 8 less 4, got \(1, 1, 32, 32\)"):
        UNet(1, (8, 8), padding=2, patch=4)(torch.randn(1, 1, 32, 32), torch.rand(1))


def test_a_unet_without_classes_refuses_labels():
    unet = UNet(2, (8,))
    assert unet(torch.randn(1, 2, 8, 8), torch.rand(1)).shape == (1, 2, 8, 8)
    with pytest.raises(ValueError, match="no classes"):
        unet(torch.randn(1, 2, 8, 8), torch.rand(1), label=torch.tensor([0]))
    with pytest.raises(ValueError, match="no null label"):
        _ = unet.null


def test_classifier_examples_do_not_see_one_another():
    classifier, (xt, t, _) = awake(NoisyClassifier(2, 5, widths=(8, 12), emb_dim=16)), batch()
    alone = torch.cat([classifier(xt[i : i + 1], t[i : i + 1]) for i in range(3)])
    assert_close(classifier(xt, t), alone)


def test_log_prob_is_normalised_over_the_classes():
    classifier, (xt, t, _) = awake(NoisyClassifier(2, 5, widths=(8, 12), emb_dim=16)), batch()
    total = sum(log_prob_of(classifier, k)(xt, t).exp() for k in range(5))
    assert_close(total, torch.ones(3).double())


def test_log_prob_takes_one_label_or_one_per_example():
    classifier, (xt, t, label) = awake(NoisyClassifier(2, 5, widths=(8, 12), emb_dim=16)), batch()
    each = torch.stack([log_prob_of(classifier, int(label[i]))(xt, t)[i] for i in range(3)])
    assert_close(log_prob_of(classifier, label)(xt, t), each)


def test_a_classifier_that_knows_nothing_loses_log_of_the_number_of_classes():
    classifier, (x0, _, label) = NoisyClassifier(2, 5, widths=(8, 12), emb_dim=16).double(), batch()
    nn.init.zeros_(classifier.head.weight)
    nn.init.zeros_(classifier.head.bias)
    generator = torch.Generator().manual_seed(0)
    assert_close(classifier_loss(classifier, x0, label, flow(), generator), torch.tensor(math.log(5)).double())


def test_the_classifier_is_trained_on_the_time_it_is_given():
    # on the straight path from x0 = 0 the noise has standard deviation t
    seen = []

    def spy(xt, t):
        seen.append((xt.flatten(1).std(dim=1), t))
        return torch.zeros(len(xt), 5, requires_grad=True)

    classifier_loss(spy, torch.zeros(50, 1, 40, 40), torch.zeros(50).long(), flow(), torch.Generator().manual_seed(0))
    std, t = seen[0]
    assert (std / t - 1).abs().max() < 5 / math.sqrt(2 * 1600)  # five standard errors of a standard deviation


def test_a_blind_classifier_does_not_see_the_time():
    classifier, (xt, t, _) = awake(NoisyClassifier(2, 5, widths=(8, 12), emb_dim=16, blind=True)), batch()
    assert_close(classifier(xt, t), classifier(xt, 1 - t), rtol=0, atol=0)
    sees = awake(NoisyClassifier(2, 5, widths=(8, 12), emb_dim=16))
    assert not torch.allclose(sees(xt, t), sees(xt, 1 - t))


def test_the_clean_loss_is_of_the_pictures_as_they_are():
    logits = torch.randn(3, 5)
    x0, label = torch.randn(3, 2, 8, 8), torch.tensor([4, 0, 2])

    def spy(xt, t):
        assert xt is x0
        assert (t == 0).all()
        return logits

    by_hand = -sum(math.log(logits[i].exp()[label[i]] / logits[i].exp().sum()) for i in range(3)) / 3
    assert clean_loss(spy, x0, label).item() == pytest.approx(by_hand, rel=1e-5)


def test_classifier_refuses_another_number_of_channels():
    with pytest.raises(ValueError, match=r"takes \(b, 2, h, w\), got \(1, 1, 8, 8\)"):
        NoisyClassifier(2, 5)(torch.randn(1, 1, 8, 8), torch.rand(1))
