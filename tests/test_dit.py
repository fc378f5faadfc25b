"""The diffusion transformer: patches and positions by hand, the published network as oracle, and who learns when."""

import math

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch import nn
from torch.testing import assert_close

from awake import awake
from condiff_ref.cost import dit_cost
from condiff_ref.dit import CONFIGS, AdaLNZeroBlock, DiT, init_weights, patchify, unpatchify
from condiff_ref.layers import position_embedding

SIZES = dict(channels=3, size=8, patch=2, dim=24, depth=2, heads=4, classes=5)


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def batch(n: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(n, 3, 8, 8).double(), torch.rand(n).double(), torch.arange(n)


# --- patches and positions -------------------------------------------------------------------------------------------


def test_a_token_is_one_patch_and_tokens_go_row_by_row():
    x = torch.randn(2, 3, 4, 6)  # 2 x 3 patches of 2
    tokens = patchify(x, 2)
    for row in range(2):
        for column in range(3):
            block = x[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            expected = torch.stack([block[:, c, i, j] for i in range(2) for j in range(2) for c in range(3)], dim=1)
            assert torch.equal(tokens[:, 3 * row + column], expected)


@pytest.mark.parametrize(("patch", "height", "width"), [(1, 3, 5), (2, 4, 6), (4, 8, 4)])
def test_unpatchify_undoes_patchify(patch, height, width):
    x = torch.randn(2, 3, height, width)
    assert torch.equal(unpatchify(patchify(x, patch), patch, height, width), x)


def test_patches_that_do_not_tile_are_refused():
    with pytest.raises(ValueError, match=r"patches of 4 do not tile a picture of shape \(1, 1, 8, 6\)"):
        patchify(torch.randn(1, 1, 8, 6), 4)
    with pytest.raises(ValueError, match=r"8 x 4 in patches of 2 is \(b, 8, 4 c\), got \(1, 9, 4\)"):
        unpatchify(torch.randn(1, 9, 4), 2, 8, 4)
    with pytest.raises(ValueError, match=r"is \(b, 8, 4 c\), got \(1, 8, 6\)"):
        unpatchify(torch.randn(1, 8, 6), 2, 8, 4)


def test_positions_are_waves_of_the_column_then_of_the_row():
    table = position_embedding(3, 5, 8)
    for row in range(3):
        for column in range(5):
            waves = [
                wave(position / 10_000 ** (i / 2))
                for position in (column, row)
                for wave in (math.sin, math.cos)
                for i in range(2)
            ]
            assert_close(table[5 * row + column], torch.tensor(waves))


def test_positions_are_those_of_the_published_network():
    theirs = get_2d_sincos_pos_embed(48, 16, base_size=16)
    assert_close(position_embedding(16, 16, 48), theirs.float(), atol=1e-6, rtol=0)


def test_no_two_positions_are_alike():
    table = position_embedding(6, 9, 16)
    assert torch.cdist(table, table).add(torch.eye(54)).min() > 0.1
    with pytest.raises(ValueError, match="4 divides, got 6"):
        position_embedding(2, 2, 6)


def test_positions_are_neither_trained_nor_saved():
    dit = DiT(**SIZES)
    assert "positions" not in dit.state_dict() | dict(dit.named_parameters())
    assert not dit.positions.requires_grad


def test_positions_tell_patches_apart():
    # without them the network would treat a mirrored row of patches as the mirrored picture
    dit, (xt, t, label) = awake(DiT(**SIZES)), batch()
    swapped = patchify(xt, 2).flip(1)
    out = patchify(dit(unpatchify(swapped, 2, 8, 8), t, label=label), 2).flip(1)
    plain = patchify(dit(xt, t, label=label), 2)
    assert (out - plain).abs().amax() > 1e-3
    dit.positions.zero_()
    assert_close(
        patchify(dit(unpatchify(swapped, 2, 8, 8), t, label=label), 2).flip(1), patchify(dit(xt, t, label=label), 2)
    )


# --- the block -------------------------------------------------------------------------------------------------------


def rows(block: AdaLNZeroBlock, *names: str) -> list[slice]:
    order = ["shift1", "scale1", "gate1", "shift2", "scale2", "gate2"]
    dim = block.modulation.in_features
    return [slice(order.index(name) * dim, (order.index(name) + 1) * dim) for name in names]


def silence(block: AdaLNZeroBlock, *names: str) -> AdaLNZeroBlock:
    with torch.no_grad():
        for part in rows(block, *names):
            block.modulation.weight[part] = 0
            block.modulation.bias[part] = 0
    return block


@pytest.mark.parametrize("context_dim", [None, 6])
def test_a_fresh_block_is_the_identity(context_dim):
    x, c, context = torch.randn(2, 7, 24), torch.randn(2, 24), torch.randn(2, 5, 6)
    assert torch.equal(AdaLNZeroBlock(24, 4, context_dim)(x, c, context if context_dim else None), x)


def test_it_is_the_gates_and_only_they_that_make_it_the_identity():
    x, c = torch.randn(2, 7, 24).double(), torch.randn(2, 24).double()
    assert torch.equal(silence(awake(AdaLNZeroBlock(24, 4)), "gate1", "gate2")(x, c), x)
    shifts_and_scales = silence(awake(AdaLNZeroBlock(24, 4)), "shift1", "scale1", "shift2", "scale2")
    assert (shifts_and_scales(x, c) - x).abs().amax() > 0.1
    for gate in ("gate1", "gate2"):  # each closes its own branch, not the other
        assert (silence(awake(AdaLNZeroBlock(24, 4)), gate)(x, c) - x).abs().amax() > 0.1


def test_normalisation_with_zero_shift_and_scale_is_not_the_identity():
    block, x = AdaLNZeroBlock(4, 1), torch.tensor([[[1.0, 2, 3, 4]]])
    normed = block.norm(x)
    assert_close(normed, torch.tensor([[[-1.341641, -0.447214, 0.447214, 1.341641]]]), atol=2e-6, rtol=0)
    assert (normed - x).abs().max().item() == pytest.approx(2.658359, abs=2e-6)
    assert torch.equal(block(x, torch.randn(1, 4)), x)


def test_examples_do_not_see_one_another_in_a_block():
    block, x, c = awake(AdaLNZeroBlock(24, 4)), torch.randn(3, 7, 24).double(), torch.randn(3, 24).double()
    alone = torch.cat([block(x[i : i + 1], c[i : i + 1]) for i in range(3)])
    assert_close(block(x, c), alone)


class Given(nn.Module):
    """Stands in for an embedding: whatever it is asked, it answers c."""

    def __init__(self, c: torch.Tensor):
        super().__init__()
        self.c = c

    def forward(self, *_, **__):
        return self.c


def copy_block(ours: AdaLNZeroBlock, theirs: BasicTransformerBlock) -> None:
    pairs = [(ours.attention, theirs.attn1)]
    if ours.cross_attention is not None:
        pairs.append((ours.cross_attention, theirs.attn2))
    for attention, attn in pairs:
        key, value = attention.to_kv.weight.chunk(2)
        attn.to_q.weight.copy_(attention.to_q.weight)
        attn.to_k.weight.copy_(key)
        attn.to_v.weight.copy_(value)
        attn.to_out[0].load_state_dict(attention.to_out.state_dict())
    theirs.norm1.linear.load_state_dict(ours.modulation.state_dict())
    theirs.ff.net[0].proj.load_state_dict(ours.mlp[0].state_dict())
    theirs.ff.net[2].load_state_dict(ours.mlp[2].state_dict())


@pytest.mark.parametrize("context_dim", [None, 6])
@torch.no_grad()
def test_the_block_is_diffusers_own(context_dim):
    ours = awake(AdaLNZeroBlock(24, 4, context_dim))
    x, c, context = torch.randn(2, 7, 24).double(), torch.randn(2, 24).double(), torch.randn(2, 5, 6).double()
    theirs = BasicTransformerBlock(
        *(24, 4, 6),
        cross_attention_dim=context_dim,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=5,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    ).double()
    theirs.norm1.emb = Given(c)
    copy_block(ours, theirs)
    expected = theirs(x, encoder_hidden_states=context if context_dim else None)
    assert_close(ours(x, c, context if context_dim else None), expected)


# --- the network -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_network_is_diffusers_own():
    ours = awake(DiT(**SIZES))
    theirs = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=6,
        in_channels=3,
        num_layers=2,
        attention_bias=False,
        sample_size=8,
        num_embeds_ada_norm=5,
        norm_eps=1e-6,
    )
    theirs = theirs.double().eval()
    patch_weight = ours.stem.weight.reshape(24, 2, 2, 3).permute(0, 3, 1, 2)
    theirs.pos_embed.proj.weight.copy_(patch_weight)
    theirs.pos_embed.proj.bias.copy_(ours.stem.bias)
    for block, their_block in zip(ours.blocks, theirs.transformer_blocks, strict=True):
        copy_block(block, their_block)
        emb = their_block.norm1.emb
        # the authors' code has no shift; diffusers' sines and cosines are the other way round
        emb.time_proj.downscale_freq_shift, emb.time_proj.flip_sin_to_cos = 0, False
        emb.timestep_embedder.linear_1.load_state_dict(ours.time_mlp[0].state_dict())
        emb.timestep_embedder.linear_2.load_state_dict(ours.time_mlp[2].state_dict())
        emb.class_embedder.embedding_table.weight.copy_(ours.label_embedding.table.weight)
    # diffusers has the final shift before the final scale, as we do
    theirs.proj_out_1.load_state_dict(ours.modulation.state_dict())
    theirs.proj_out_2.load_state_dict(ours.head.state_dict())
    xt, _, label = batch()
    steps = torch.tensor([1.0, 4.0, 7.0])  # small, as their sines are of float32 angles
    expected = theirs(xt, steps, label).sample
    assert expected.abs().mean() > 0.1
    assert_close(ours(xt, steps.double() / 1000, label=label), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("size", "millions"), [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_weights_are_as_many_as_published(size, millions):
    config = CONFIGS[size]
    d, depth = config["dim"], config["depth"]
    with torch.device("meta"):
        dit = DiT(4, 32, 2, **config, classes=1000)
    block = (6 * d * d + 6 * d) + (4 * d * d + d) + (8 * d * d + 5 * d)  # adaLN, attention, MLP
    ends = (256 * d + d) + (d * d + d) + 1001 * d + (16 * d + d) + (2 * d * d + 2 * d) + (16 * d + 16)
    weights = sum(parameter.numel() for parameter in dit.parameters())
    assert weights == depth * block + ends
    # the published network has biases of q, k and v, a variance beside the mean, and its fixed positions among the rest
    published = weights + 3 * d * depth + 16 * (d + 1) + 256 * d
    assert published / 1e6 == pytest.approx(millions, abs=0.6)
    assert size != "XL" or published == 675_129_632


def test_a_fresh_dit_outputs_zero():
    xt, t, label = batch()
    assert not DiT(**SIZES).double()(xt, t, label=label).any()


def test_examples_do_not_see_one_another():
    dit, (xt, t, label) = awake(DiT(**SIZES)), batch()
    alone = torch.cat([dit(xt[i : i + 1], t[i : i + 1], label=label[i : i + 1]) for i in range(3)])
    assert_close(dit(xt, t, label=label), alone)


def test_every_pixel_reaches_every_pixel():
    dit, (xt, t, label) = awake(DiT(**SIZES)), batch(1)
    gradient = torch.autograd.functional.jacobian(lambda x: dit(x, t, label=label)[0, 0, 7, 7], xt)
    assert gradient.abs().gt(0).all()


def test_time_and_every_label_reach_every_channel_and_no_label_is_the_null_label():
    dit, (xt, t, label) = awake(DiT(**SIZES)), batch()
    nothing = dit(xt, t)
    assert dit.null == 5
    assert torch.equal(nothing, dit(xt, t, label=torch.full_like(label, dit.null)))
    for other in [dit(xt, t / 2), *(dit(xt, t, label=torch.full_like(label, k)) for k in range(5))]:
        assert (other - nothing).abs().amax(dim=(0, 2, 3)).gt(1e-3).all()


def test_context_is_read_and_starts_silent():
    xt, t, label = batch()
    dit, context = DiT(**SIZES, context_dim=6), torch.randn(3, 4, 6).double()
    assert not any(block.cross_attention.to_out.weight.any() for block in dit.blocks)
    dit = awake(dit)
    out = dit(xt, t, label=label, context=context)
    assert (out - dit(xt, t, label=label, context=-context)).abs().amax() > 1e-3
    with pytest.raises(ValueError, match="width 6, got none"):
        dit(xt, t, label=label)


@pytest.mark.parametrize(
    ("shape", "label", "message"),
    [
        ((1, 3, 8, 6), None, r"takes \(b, 3, 8, 8\), got \(1, 3, 8, 6\)"),
        ((1, 3, 4, 4), None, r"takes \(b, 3, 8, 8\), got \(1, 3, 4, 4\)"),
        ((1, 1, 8, 8), None, r"takes \(b, 3, 8, 8\), got \(1, 1, 8, 8\)"),
        ((1, 3, 8, 8), 6, "labels are 0 to 4, and 5 for none"),
        ((1, 3, 8, 8), -1, "labels are 0 to 4"),
    ],
)
def test_dit_names_what_it_cannot_take(shape, label, message):
    label = None if label is None else torch.tensor([label])
    with pytest.raises(ValueError, match=message):
        DiT(**SIZES)(torch.randn(shape), torch.rand(1), label=label)


def test_what_cannot_be_built_is_refused():
    with pytest.raises(ValueError, match="patches of 3 do not tile a side of 8"):
        DiT(**SIZES | dict(patch=3))
    with pytest.raises(ValueError, match="5 heads do not divide width 24"):
        DiT(**SIZES | dict(heads=5))


def test_a_dit_without_classes_refuses_labels():
    dit = DiT(**SIZES | dict(classes=None))
    assert dit(torch.randn(1, 3, 8, 8), torch.rand(1)).shape == (1, 3, 8, 8)
    with pytest.raises(ValueError, match="build it with `classes`"):
        dit(torch.randn(1, 3, 8, 8), torch.rand(1), label=torch.tensor([0]))
    with pytest.raises(ValueError, match="no null label"):
        _ = dit.null


# --- how it starts, and who learns when ------------------------------------------------------------------------------


def test_weights_start_as_published():
    dit = awake(DiT(**SIZES | dict(dim=96, classes=200), context_dim=6))
    init_weights(dit)
    assert not any(value.any() for name, value in dit.named_parameters() if name.endswith("bias"))
    silent = [dit.head, dit.modulation]
    silent += [layer for block in dit.blocks for layer in (block.modulation, block.cross_attention.to_out)]
    assert not any(layer.weight.any() for layer in silent)
    for weight in (dit.time_mlp[0].weight, dit.time_mlp[2].weight, dit.label_embedding.table.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=5 / math.sqrt(2 * weight.numel()))  # 5 standard errors
    for layer in (dit.stem, dit.blocks[0].attention.to_q, dit.blocks[1].mlp[0], dit.blocks[1].mlp[2]):
        bound = math.sqrt(6 / (layer.in_features + layer.out_features))  # Glorot & Bengio 2010, eq. 16
        assert 0.98 * bound < layer.weight.abs().max() <= bound


def test_the_same_generator_starts_the_same_network():
    first, second = DiT(**SIZES), DiT(**SIZES)
    assert not torch.equal(first.stem.weight, second.stem.weight)
    for dit in (first, second):
        init_weights(dit, torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def pieces(dit: DiT) -> dict[str, torch.Tensor]:
    """The gradient of every weight and bias, with the modulation of the blocks split into its six."""
    found = {}
    for name, parameter in dit.named_parameters():
        if name.startswith("blocks") and "modulation" in name:
            parts = parameter.grad.chunk(6)
            order = ["shift1", "scale1", "gate1", "shift2", "scale2", "gate2"]
            found |= {f"{name}.{part}": gradient for part, gradient in zip(order, parts, strict=True)}
        else:
            found[name] = parameter.grad
    return found


def first_backward(piece: str) -> int:
    """At which backward pass a piece first learns."""
    if piece.startswith("head"):
        return 0
    at_one = piece.startswith(("modulation", "stem")) or "gate" in piece or "cross_attention.to_out" in piece
    return 1 if at_one else 2


@pytest.mark.parametrize("context_dim", [None, 6])
def test_the_head_learns_first_then_gates_and_patches_then_all_the_rest(context_dim):
    dit, (xt, t, label) = DiT(**SIZES, context_dim=context_dim).double(), batch()
    context = torch.randn(3, 4, 6).double() if context_dim else None
    target, sgd = torch.randn_like(xt), torch.optim.SGD(dit.parameters(), lr=0.1)
    for backward in range(3):
        out, other = (dit(xt, t, label=y, context=context) for y in (label, (label + 1) % 5))
        assert (out != other).any() == (backward == 2)  # the label is first seen in forward 2
        sgd.zero_grad()
        (out - target).square().mean().backward()
        learns = {piece: bool(gradient.any()) for piece, gradient in pieces(dit).items()}
        assert learns == {piece: backward >= first_backward(piece) for piece in learns}
        sgd.step()


# --- four ways to condition -------------------------------------------------------------------------------------------

SQUARES = {"in-context": 12, "cross-attention": 16, "adaLN": 16, "adaLN-Zero": 18}  # weights of a block over dim^2


@pytest.mark.parametrize(("conditioning", "squares"), SQUARES.items())
def test_each_design_has_the_weights_that_its_description_needs(conditioning, squares):
    """Attention 4, MLP 8, cross-attention 4, six vectors 6, four 4: matrices of a block, in units of dim^2."""
    dit = DiT(1, 8, 2, 24, 1, 4, classes=5, conditioning=conditioning)
    matrices = sum(p.numel() for p in dit.blocks[0].parameters() if p.ndim == 2)
    assert matrices == squares * 24**2


@pytest.mark.parametrize("conditioning", SQUARES)
def test_each_design_hears_time_and_label_and_keeps_examples_apart(conditioning):
    dit = awake(DiT(1, 8, 2, 24, 2, 4, classes=5, conditioning=conditioning))
    xt, t, label = torch.randn(3, 1, 8, 8).double(), torch.rand(3).double(), torch.tensor([0, 4, 5])
    out = dit(xt, t, label=label)
    assert out.shape == xt.shape
    for other in (dit(xt, t / 2, label=label), dit(xt, t, label=(label + 1) % 6), dit(-xt, t, label=label)):
        assert ((other - out).flatten(1).abs().amax(1) > 1e-3).all()
    alone = torch.cat([dit(xt[i : i + 1], t[i : i + 1], label=label[i : i + 1]) for i in range(3)])
    assert_close(out, alone)


@pytest.mark.parametrize("conditioning", SQUARES)
def test_only_the_zeros_make_a_fresh_block_the_identity(conditioning):
    dit = DiT(1, 8, 2, 24, 1, 4, classes=5, conditioning=conditioning)
    seen = []
    dit.blocks[0].register_forward_hook(lambda block, args, out: seen.append((out - args[0]).abs().amax()))
    assert not dit(torch.randn(3, 1, 8, 8), torch.rand(3)).any()  # all start silent at the head
    assert (seen[0] == 0) == (conditioning == "adaLN-Zero")


def test_in_context_the_patches_keep_their_order():
    """Without blocks in between, the two tokens come and go and nothing else happens."""
    dit = awake(DiT(1, 8, 2, 24, 0, 4, classes=5, conditioning="in-context"))
    xt, t = torch.randn(2, 1, 8, 8).double(), torch.rand(2).double()
    tokens = dit.head(dit.norm(dit.stem(patchify(xt, 2)) + dit.positions))
    assert_close(dit(xt, t), unpatchify(tokens, 2, 8, 8))


def test_designs_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="no conditioning 'film': choose one of adaLN-Zero, adaLN, cross-attention"):
        DiT(1, 8, 2, 24, 1, 4, conditioning="film")
    with pytest.raises(ValueError, match="no conditioning 'adaLN' that takes a context"):
        DiT(1, 8, 2, 24, 1, 4, context_dim=3, conditioning="adaLN")
    with pytest.raises(ValueError, match="only adaLN-Zero is counted here, not 'adaLN'"):
        dit_cost(DiT(1, 8, 2, 24, 1, 4, conditioning="adaLN"))
