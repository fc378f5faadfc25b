"""Wrong answers to lesson 08 that are not on file, as people in a hurry write them."""

import torch
import torch.nn.functional as F
from torch import nn

from condiff_check.lesson08 import count_params, dit_cfg, init_dit, patchify, pos_embed_2d, unpatchify, wakeup_order
from condiff_ref.layers import Attention

# --- 08.1 patchify, unpatchify ----------------------------------------------------------------------------------------


def patch_both_transposed(x, patch):
    return patchify(x.transpose(2, 3), patch)


def patch_unfold_order(x, patch):
    """F.unfold gives channels first, and forgets nothing else."""
    if x.shape[2] % patch or x.shape[3] % patch:
        raise ValueError("no")
    return F.unfold(x, patch, stride=patch)


def patch_asserts(x, patch):
    assert x.shape[2] % patch == 0 and x.shape[3] % patch == 0
    return patchify(x, patch)


def patch_checks_height(x, patch):
    if x.shape[2] % patch:
        raise ValueError("no")
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // patch, patch, w // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, patch * patch * c)


def patch_channels_first_row_major_outside(x, patch):
    """Channels before the patches."""
    b, c, h, w = x.shape
    if h % patch or w % patch:
        raise ValueError("no")
    x = x.reshape(b, c, h // patch, patch, w // patch, patch)
    return x.permute(0, 1, 2, 4, 3, 5).reshape(b, -1, patch * patch * c)


def unpatch_rgb(tokens, patch, height, width):
    b = len(tokens)
    x = tokens.reshape(b, height // patch, width // patch, patch, patch, 3)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, 3, height, width)


def unpatch_channels_last(tokens, patch, height, width):
    return unpatchify(tokens, patch, height, width).permute(0, 2, 3, 1)


# --- 08.2 pos_embed_2d ------------------------------------------------------------------------------------------------


def pos_counted_from_one(rows, columns, dim):
    if dim % 4:
        raise ValueError("no")
    f = 10_000 ** (-torch.arange(dim // 4) / (dim // 4))
    row = (1 + torch.arange(rows)).repeat_interleave(columns)[:, None] * f
    column = (1 + torch.arange(columns)).repeat(rows)[:, None] * f
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1)


def pos_base_1000(rows, columns, dim):
    if dim % 4:
        raise ValueError("no")
    f = 1000 ** (-torch.arange(dim // 4) / (dim // 4))
    row = torch.arange(rows).repeat_interleave(columns)[:, None] * f
    column = torch.arange(columns).repeat(rows)[:, None] * f
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1)


def pos_grid_shape(rows, columns, dim):
    return pos_embed_2d(rows, columns, dim).view(rows, columns, dim)


def pos_column_twice(rows, columns, dim):
    table = pos_embed_2d(rows, columns, dim)
    return torch.cat([table[:, : dim // 2], table[:, : dim // 2]], dim=1)


def pos_batch_axis(rows, columns, dim):
    return pos_embed_2d(rows, columns, dim)[None]


def pos_dim_for_frequencies(rows, columns, dim):
    """The ladder of the time embedding, on half of the places only."""
    if dim % 4:
        raise ValueError("no")
    f = 10_000 ** (-torch.arange(dim // 4) / dim)
    row = torch.arange(rows).repeat_interleave(columns)[:, None] * f
    column = torch.arange(columns).repeat(rows)[:, None] * f
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1)


def pos_assert(rows, columns, dim):
    assert dim % 4 == 0
    return pos_embed_2d(rows, columns, dim)


# --- 08.3 DiTBlock ----------------------------------------------------------------------------------------------------


def norm(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


class Base(nn.Module):
    """Right, but for what subclasses change."""

    def __init__(self, dim, heads):
        super().__init__()
        self.attention = Attention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim))
        self.modulation = nn.Linear(dim, 6 * dim)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def six(self, c):
        return self.modulation(F.silu(c))[:, None].chunk(6, dim=-1)

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.six(c)
        x = x + gate1 * self.attention(norm(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(norm(x) * (1 + scale2) + shift2)


class ChunkAlongTokens(Base):
    def six(self, c):
        return self.modulation(F.silu(c))[:, None].chunk(6, dim=1)


class SecondGateForgotten(Base):
    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, _ = self.six(c)
        x = x + gate1 * self.attention(norm(x) * (1 + scale1) + shift1)
        return x + self.mlp(norm(x) * (1 + scale2) + shift2)


class FirstScaleTwice(Base):
    def forward(self, x, c):
        shift1, scale1, gate1, _, _, gate2 = self.six(c)
        x = x + gate1 * self.attention(norm(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(norm(x) * (1 + scale1) + shift1)


class GateByTanh(Base):
    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.six(c)
        x = x + gate1.tanh() * self.attention(norm(x) * (1 + scale1) + shift1)
        return x + gate2.tanh() * self.mlp(norm(x) * (1 + scale2) + shift2)


class SiluAfter(Base):
    def six(self, c):
        return F.silu(self.modulation(c))[:, None].chunk(6, dim=-1)


class Gelu(Base):
    def six(self, c):
        return self.modulation(F.gelu(c))[:, None].chunk(6, dim=-1)


class ModulationInSequential(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.attention = Attention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        nn.init.zeros_(self.modulation[1].weight)
        nn.init.zeros_(self.modulation[1].bias)

    forward = Base.forward

    def six(self, c):
        return self.modulation(c)[:, None].chunk(6, dim=-1)


class DeadMLP(Base):
    def __init__(self, dim, heads):
        super().__init__(dim, heads)
        nn.init.zeros_(self.mlp[2].weight)
        nn.init.zeros_(self.mlp[2].bias)


class OneHead(Base):
    def __init__(self, dim, heads):
        super().__init__(dim, 1)


class InPlace(Base):
    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.six(c)
        x += gate1 * self.attention(norm(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(norm(x) * (1 + scale2) + shift2)


# --- 08.4 init_dit, wakeup_order --------------------------------------------------------------------------------------


def init_attention_zero(dit):
    init_dit(dit)
    for block in dit.blocks:
        nn.init.zeros_(block.attention.to_out.weight)


def init_table_zero(dit):
    init_dit(dit)
    nn.init.zeros_(dit.label_embedding.table.weight)


def init_seeded(dit):
    torch.manual_seed(0)
    init_dit(dit)


def init_small_uniform(dit):
    init_dit(dit)
    for layer in (dit.time_mlp[0], dit.time_mlp[2], dit.label_embedding.table):
        nn.init.uniform_(layer.weight, -0.02, 0.02)


def init_second_time_map_forgotten(dit):
    init_dit(dit)
    nn.init.xavier_uniform_(dit.time_mlp[2].weight)


def init_bias_of_every_linear(dit):
    """to_q and to_kv have none."""
    for module in dit.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)


def init_head_bias_one(dit):
    init_dit(dit)
    nn.init.ones_(dit.head.bias)


def init_time_zero(dit):
    init_dit(dit)
    nn.init.zeros_(dit.time_mlp[2].weight)


def init_xavier_gain(dit):
    init_dit(dit)
    for block in dit.blocks:
        nn.init.xavier_uniform_(block.mlp[0].weight, gain=2**0.5)


def order_as_list():
    return list(wakeup_order())


def order_gates_last():
    return wakeup_order() | {"gates": 2}


def order_final_with_embeddings():
    return wakeup_order() | {"final modulation": 2}


def order_attention_first():
    return wakeup_order() | {"attention and MLP": 0, "stem": 0}


# --- 08.5 count_params ------------------------------------------------------------------------------------------------


def count_float(dim, depth, patch, channels, classes):
    return 1.0 * count_params(dim, depth, patch, channels, classes)


def count_two_table_rows(dim, depth, patch, channels, classes):
    return count_params(dim, depth, patch, channels, classes) + dim


def count_modulation_once(dim, depth, patch, channels, classes):
    """One modulation, shared by all blocks."""
    return count_params(dim, depth, patch, channels, classes) - (depth - 1) * (dim + 1) * 6 * dim


def count_no_mlp_bias(dim, depth, patch, channels, classes):
    return count_params(dim, depth, patch, channels, classes) - depth * 5 * dim


def count_no_stem(dim, depth, patch, channels, classes):
    return count_params(dim, depth, patch, channels, classes) - (patch**2 * channels + 1) * dim


def count_final_six(dim, depth, patch, channels, classes):
    return count_params(dim, depth, patch, channels, classes) + (dim + 1) * 4 * dim


# --- 08.6 LabelEmbedder -----------------------------------------------------------------------------------------------


class Labels(nn.Module):
    """Right, but for what subclasses change."""

    def __init__(self, classes, dim, p):
        super().__init__()
        self.classes, self.p = classes, p
        self.table = nn.Embedding(classes + 1, dim)

    def mask(self, y, gen, force):
        if force is not None:
            return force
        if self.training:
            return torch.rand(y.shape, generator=gen) < self.p
        return torch.zeros_like(y, dtype=torch.bool)

    def forward(self, y, gen=None, force=None):
        return self.table(torch.where(self.mask(y, gen, force), self.classes, y))


class FirstShare(Labels):
    def mask(self, y, gen, force):
        drop = super().mask(y, gen, force)
        if force is None and self.training:
            drop = torch.arange(len(y)) < self.p * len(y)
        return drop


class Detached(Labels):
    def forward(self, y, gen=None, force=None):
        return super().forward(y, gen, force).detach()


class NotOperator(Labels):
    """`if force:` instead of `if force is not None:`"""

    def mask(self, y, gen, force):
        if force:
            return force
        return super().mask(y, gen, None)


class NullAtTheFront(Labels):
    """Labels moved by one, no label at 0."""

    def forward(self, y, gen=None, force=None):
        return self.table(torch.where(self.mask(y, gen, force), 0, y + 1))


class PaddingRow(Labels):
    def __init__(self, classes, dim, p):
        super().__init__(classes, dim, p)
        self.table = nn.Embedding(classes + 1, dim, padding_idx=classes)


class NullPlusOne(Labels):
    def forward(self, y, gen=None, force=None):
        return self.table(torch.where(self.mask(y, gen, force), self.classes + 1, y))


class SeedInside(Labels):
    def mask(self, y, gen, force):
        return super().mask(y, torch.Generator().manual_seed(0), force)


class EvalDropsTraining(Labels):
    """The mode the wrong way round."""

    def mask(self, y, gen, force):
        if force is not None:
            return force
        if not self.training:
            return torch.rand(y.shape, generator=gen) < self.p
        return torch.zeros_like(y, dtype=torch.bool)


class DroppedVectors(Labels):
    """nn.Dropout's idea: zeros single numbers of the vectors."""

    def forward(self, y, gen=None, force=None):
        if force is not None:
            return super().forward(y, gen, force)
        return F.dropout(self.table(y), self.p, self.training)


# --- 08.7 dit_cfg -----------------------------------------------------------------------------------------------------


def cfg_mean_of_variances(out, channels, scale):
    guided = dit_cfg(out, channels, scale)
    mean = out[:, channels:].unflatten(0, (2, -1)).mean(0)
    return torch.cat([guided[:, :channels], torch.cat([mean, mean])], dim=1)


def cfg_variance_first(out, channels, scale):
    guided = dit_cfg(out, channels, scale)
    return torch.cat([guided[:, channels:], guided[:, :channels]], dim=1)


def cfg_all_but_last(out, channels, scale):
    n = channels - 1
    eps_c, eps_u = out[:, :n].chunk(2)
    guided = eps_u + scale * (eps_c - eps_u)
    return torch.cat([torch.cat([guided, guided]), out[:, n:]], dim=1)


def cfg_repeat_interleave(out, channels, scale):
    eps_c, eps_u = out[:, :channels].chunk(2)
    guided = eps_u + scale * (eps_c - eps_u)
    return torch.cat([guided.repeat_interleave(2, dim=0), out[:, channels:]], dim=1)


def cfg_mean(out, channels, scale):
    eps_c, eps_u = out[:, :channels].chunk(2)
    guided = (eps_u + scale * eps_c) / (1 + scale)
    return torch.cat([torch.cat([guided, guided]), out[:, channels:]], dim=1)


# --- 08.8 my_block_test -----------------------------------------------------------------------------------------------


def test_prints(block_class):
    print(block_class(8, 2))


def test_fresh_and_names(block_class):
    block = block_class(8, 2)
    x, c = torch.randn(3, 5, 8), torch.randn(3, 8)
    assert torch.equal(block(x, c), x)
    assert {name.partition(".")[0] for name, _ in block.named_parameters()} == {"attention", "mlp", "modulation"}


def test_returns_bool(block_class):
    block = block_class(8, 2)
    x, c = torch.randn(3, 5, 8), torch.randn(3, 8)
    return bool(torch.equal(block(x, c), x))


def test_not_the_identity(block_class):
    """Believes that a fresh block does something."""
    block = block_class(8, 2)
    x, c = torch.randn(3, 5, 8), torch.randn(3, 8)
    assert not torch.allclose(block(x, c), x)


def test_attention_only(block_class):
    block = block_class(8, 2)
    x, c = torch.randn(3, 5, 8), torch.randn(3, 8)
    assert torch.equal(block(x, c), x)
    nn.init.normal_(block.modulation.weight[:24])
    shift, scale, gate = block.modulation(F.silu(c))[:, None, :24].chunk(3, dim=-1)
    assert torch.allclose(block(x, c), x + gate * block.attention(norm(x) * (1 + scale) + shift), atol=1e-4)


# Read by a person: these are told that something is wrong, and too little of what.
WEAK = set()

SLOPPY = (
    ("08.1", "the picture transposed", (patch_both_transposed, unpatchify)),
    ("08.1", "unfold as it comes", (patch_unfold_order, unpatchify)),
    ("08.1", "assert for ValueError", (patch_asserts, unpatchify)),
    ("08.1", "width not checked", (patch_checks_height, unpatchify)),
    ("08.1", "channels before patches", (patch_channels_first_row_major_outside, unpatchify)),
    ("08.1", "three channels", (patchify, unpatch_rgb)),
    ("08.1", "channels last", (patchify, unpatch_channels_last)),
    ("08.2", "counted from one", (pos_counted_from_one,)),
    ("08.2", "base 1000", (pos_base_1000,)),
    ("08.2", "shape of the grid", (pos_grid_shape,)),
    ("08.2", "column twice", (pos_column_twice,)),
    ("08.2", "batch axis", (pos_batch_axis,)),
    ("08.2", "dim in the exponent", (pos_dim_for_frequencies,)),
    ("08.2", "assert on dim", (pos_assert,)),
    ("08.3", "chunks along tokens", (ChunkAlongTokens,)),
    ("08.3", "second gate forgotten", (SecondGateForgotten,)),
    ("08.3", "first shift and scale twice", (FirstScaleTwice,)),
    ("08.3", "gate by tanh", (GateByTanh,)),
    ("08.3", "silu after the map", (SiluAfter,)),
    ("08.3", "gelu of c", (Gelu,)),
    ("08.3", "modulation in a Sequential", (ModulationInSequential,)),
    ("08.3", "dead MLP", (DeadMLP,)),
    ("08.3", "one head", (OneHead,)),
    ("08.3", "x in place", (InPlace,)),
    ("08.4", "attention's output zero", (init_attention_zero, wakeup_order)),
    ("08.4", "label table zero", (init_table_zero, wakeup_order)),
    ("08.4", "seed inside", (init_seeded, wakeup_order)),
    ("08.4", "embeddings uniform", (init_small_uniform, wakeup_order)),
    ("08.4", "second time map forgotten", (init_second_time_map_forgotten, wakeup_order)),
    ("08.4", "bias that is not there", (init_bias_of_every_linear, wakeup_order)),
    ("08.4", "bias of the head 1", (init_head_bias_one, wakeup_order)),
    ("08.4", "time embedding zero", (init_time_zero, wakeup_order)),
    ("08.4", "gain", (init_xavier_gain, wakeup_order)),
    ("08.4", "order as a list", (init_dit, order_as_list)),
    ("08.4", "gates late", (init_dit, order_gates_last)),
    ("08.4", "final modulation late", (init_dit, order_final_with_embeddings)),
    ("08.4", "what is not 0 learns at once", (init_dit, order_attention_first)),
    ("08.5", "a float", (count_float,)),
    ("08.5", "two extra rows", (count_two_table_rows,)),
    ("08.5", "one modulation for all", (count_modulation_once,)),
    ("08.5", "biases of the MLP", (count_no_mlp_bias,)),
    ("08.5", "no stem", (count_no_stem,)),
    ("08.5", "six vectors at the end", (count_final_six,)),
    ("08.6", "always the first", (FirstShare,)),
    ("08.6", "detached", (Detached,)),
    ("08.6", "if force", (NotOperator,)),
    ("08.6", "no label in front", (NullAtTheFront,)),
    ("08.6", "padding index", (PaddingRow,)),
    ("08.6", "classes + 1", (NullPlusOne,)),
    ("08.6", "generator made inside", (SeedInside,)),
    ("08.6", "modes exchanged", (EvalDropsTraining,)),
    ("08.6", "dropout of numbers", (DroppedVectors,)),
    ("08.7", "mean of the variances", (cfg_mean_of_variances,)),
    ("08.7", "variance first", (cfg_variance_first,)),
    ("08.7", "all but the last channel", (cfg_all_but_last,)),
    ("08.7", "repeat_interleave", (cfg_repeat_interleave,)),
    ("08.7", "weighted mean", (cfg_mean,)),
    ("08.8", "prints", (test_prints,)),
    ("08.8", "fresh, and names", (test_fresh_and_names,)),
    ("08.8", "returns a bool", (test_returns_bool,)),
    ("08.8", "fresh is not the identity", (test_not_the_identity,)),
    ("08.8", "attention's branch only", (test_attention_only,)),
)
