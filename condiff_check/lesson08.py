"""Exercises of lesson 08: patches as tokens, adaLN-Zero and how a diffusion transformer wakes up."""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cache

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from condiff_ref.dit import DiT
from condiff_ref.layers import Attention

from .compare import close, oddity, plain
from .draws import integer, randn
from .exercise import Answer, Exercise, Fact, Mistake, Wrong, need
from .guard import Failed
from .testing import test_exercise

# --- the reference answers, as the solutions show them ----------------------------------------------------------------


def patchify(x: Tensor, patch: int) -> Tensor:
    """Cut pictures into tokens: (B, C, H, W) -> (B, H W / patch^2, patch^2 C).

    Patches row by row; within a token the numbers are ordered by row, then column, then channel. H and W need not be
    equal. Raises ValueError where patches do not tile the picture.
    """
    b, c, h, w = x.shape
    if h % patch or w % patch:
        raise ValueError(f"patches of {patch} do not tile {h} x {w} pixels")
    x = x.reshape(b, c, h // patch, patch, w // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, patch * patch * c)


def unpatchify(tokens: Tensor, patch: int, height: int, width: int) -> Tensor:
    """The way back: (B, H W / patch^2, patch^2 C) -> (B, C, height, width)."""
    b, _, features = tokens.shape
    x = tokens.reshape(b, height // patch, width // patch, patch, patch, features // patch**2)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, height, width)


def pos_embed_2d(rows: int, columns: int, dim: int) -> Tensor:
    """A fixed vector for each place of a grid: (rows * columns, dim), places row by row.

    The first dim / 2 numbers tell the column, the others the row, each by dim / 4 sines, then as many cosines, of the
    place times the frequencies 10000^(-i / (dim / 4)), i = 0 .. dim / 4 - 1. Raises ValueError where 4 does not divide
    dim.
    """
    if dim % 4:
        raise ValueError(f"dim must be a multiple of 4, got {dim}")
    frequencies = 10_000 ** (-torch.arange(dim // 4) / (dim // 4))
    row = torch.arange(rows).repeat_interleave(columns)[:, None] * frequencies
    column = torch.arange(columns).repeat(rows)[:, None] * frequencies
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1)


class DiTBlock(nn.Module):
    """One block of a diffusion transformer with adaLN-Zero.

    It has three parts, with these names: attention, an Attention(dim, heads); mlp, an nn.Sequential of a linear map to
    4 dim, nn.GELU(approximate="tanh") and a linear map back; modulation, a linear map from dim to 6 dim, whose weight
    and bias start at 0. Layer norms have eps 1e-6 and no weights.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.attention = Attention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim))
        self.modulation = nn.Linear(dim, 6 * dim)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, T, dim), c (B, dim) -> (B, T, dim).

        modulation(silu(c)) holds, in this order, shift, scale and gate of the attention, then those of the MLP. Each
        branch reads norm(x) (1 + scale) + shift, and what it says is multiplied by its gate and added to x; the
        attention's branch comes first.
        """
        vectors = self.modulation(F.silu(c))[:, None].chunk(6, dim=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = vectors
        norm = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        x = x + gate1 * self.attention(norm * (1 + scale1) + shift1)
        norm = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        return x + gate2 * self.mlp(norm * (1 + scale2) + shift2)


def init_dit(dit: nn.Module) -> None:
    """Start a diffusion transformer as published: every nn.Linear Xavier-uniform with bias 0; then the embeddings of
    time (the weights of dit.time_mlp[0] and dit.time_mlp[2]) and label (dit.label_embedding.table.weight) normal with
    std 0.02; then weight and bias 0 for the modulation of each block in dit.blocks, for dit.modulation and for
    dit.head. In place.
    """
    for module in dit.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for layer in (dit.time_mlp[0], dit.time_mlp[2], dit.label_embedding.table):
        nn.init.normal_(layer.weight, std=0.02)
    for layer in (*(block.modulation for block in dit.blocks), dit.modulation, dit.head):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def wakeup_order() -> dict[str, int]:
    """In which backward pass, counted from 0, does each part of a fresh DiT first get a gradient that is not 0?

    Parts: "head" (the last linear map), "final modulation" (shift and scale before it), "stem" (the linear map of the
    patches), "gates" (the rows of a block's modulation that make the gates), "shifts and scales" (its other rows),
    "attention and MLP", "time and label embeddings".
    """
    first = {"head": 0}
    first |= dict.fromkeys(("final modulation", "stem", "gates"), 1)
    first |= dict.fromkeys(("shifts and scales", "attention and MLP", "time and label embeddings"), 2)
    return first


def count_params(dim: int, depth: int, patch: int, channels: int, classes: int) -> int:
    """The number of trained parameters of a DiT as published, in closed form.

    Patches of `channels` channels to dim; fixed position embeddings; time: 256 features to dim to dim; a table of
    classes + 1 labels; `depth` blocks, each with queries, keys, values and output dim to dim, an MLP dim to 4 dim to
    dim, and six vectors of width dim from one of width dim; in the end two vectors of width dim from one, and a linear
    map to the patches of 2 * channels (noise and variance). All linear maps have biases, all layer norms no weights.
    """
    embeddings = (patch**2 * channels + 1) * dim + (256 + 1) * dim + (dim + 1) * dim + (classes + 1) * dim
    block = 4 * (dim + 1) * dim + (dim + 1) * 4 * dim + (4 * dim + 1) * dim + (dim + 1) * 6 * dim
    end = (dim + 1) * 2 * dim + (dim + 1) * 2 * patch**2 * channels
    return embeddings + depth * block + end


class LabelEmbedder(nn.Module):
    """A vector for each label and one more for no label, with label dropout inside. Its part `table` is the
    nn.Embedding; no label has the index `classes`. p: the probability of dropping a label in training. There is a
    vector for no label even if p is 0.
    """

    def __init__(self, classes: int, dim: int, p: float):
        super().__init__()
        self.null, self.p = classes, p
        self.table = nn.Embedding(classes + 1, dim)

    def forward(self, y: Tensor, gen: Generator | None = None, force: Tensor | None = None) -> Tensor:
        """Integer y (B,) -> (B, dim). In training mode each label is dropped on its own, drawn with gen on the CPU; in
        eval mode none is. force (B,), True where a label must be dropped, decides alone in either mode."""
        if force is None:
            draws = torch.rand(y.shape, generator=gen) if self.training else torch.ones(y.shape)
            force = draws < self.p if self.training else torch.zeros(y.shape, dtype=torch.bool)
        return self.table(torch.where(force.to(y.device), self.null, y))


def dit_cfg(out: Tensor, channels: int, scale: float) -> Tensor:
    """Classifier-free guidance of a DiT that also predicts a variance.

    out (2B, 2 * channels, H, W): the first half of the batch with labels, the second half, of the same x_t, without;
    the first `channels` channels are the noise, the others the variance. -> (2B, 2 * channels, H, W): both halves hold
    the guided noise; the variances stay as they are. scale 0: unconditional, 1: conditional.
    """
    eps, variance = out[:, :channels], out[:, channels:]
    eps_c, eps_u = eps.chunk(2)
    guided = eps_u + scale * (eps_c - eps_u)
    return torch.cat([torch.cat([guided, guided]), variance], dim=1)


def my_block_test(DiTBlock: Callable) -> None:
    """Raise an AssertionError if DiTBlock(dim, heads), as described in 08.3, is wrong; return None if it is right."""
    torch.manual_seed(0)
    block = DiTBlock(8, 2)
    x, c = torch.randn(3, 5, 8), torch.randn(3, 8)
    assert torch.equal(block(x, c), x), "a fresh block is the identity"
    nn.init.normal_(block.modulation.weight)
    nn.init.normal_(block.modulation.bias)
    shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(F.silu(c))[:, None].chunk(6, dim=-1)
    h = x + gate1 * block.attention(F.layer_norm(x, (8,), eps=1e-6) * (1 + scale1) + shift1)
    right = h + gate2 * block.mlp(F.layer_norm(h, (8,), eps=1e-6) * (1 + scale2) + shift2)
    assert torch.allclose(block(x, c), right, atol=1e-4), "awake, it does what the formula says"
    names = {name for name, _ in block.named_parameters() if "norm" in name}
    assert not names, "layer norms have no weights"


# --- what several exercises share -------------------------------------------------------------------------------------


def _raised(answer: Answer, name: str, *args: object) -> str:
    """The type of the error that a call ends with; "" where it returns."""
    try:
        answer.call(name, *args)
    except Failed as error:
        return type(error.__cause__).__name__
    return ""


def _numbers(values: Tensor, digits: int = 4) -> str:
    return "(" + ", ".join(f"{v:.{digits}g}" for v in values.flatten().tolist()) + ")"


# --- 08.1 patchify, unpatchify ----------------------------------------------------------------------------------------


def _grid(g: Generator) -> tuple[int, int, int]:
    """patch, height, width: more columns of patches than rows."""
    patch, rows = integer(g, 2, 3), integer(g, 2, 3)
    return patch, patch * rows, patch * (rows + integer(g, 1, 2))


def _patch_inputs(g: Generator) -> dict:
    patch, height, width = _grid(g)
    tokens = randn(g, 3, height * width // patch**2, patch**2 * 5)
    return {
        "patchify": dict(x=randn(g, 3, 5, height, width), patch=patch),
        "unpatchify": dict(tokens=tokens, patch=patch, height=height, width=width),
    }


def _patch_whole(answer: Answer, g: Generator) -> None:
    """A picture in which every number is the number of its patch."""
    patch, height, width = _grid(g)
    rows, columns = height // patch, width // patch
    numbers = torch.arange(rows * columns).double().view(rows, columns)
    x = numbers.repeat_interleave(patch, 0).repeat_interleave(patch, 1).expand(1, 2, -1, -1).clone()
    tokens = answer.call("patchify", x, patch)[0]
    at = f"{height} x {width} pixels in patches of {patch}"
    for k, token in enumerate(tokens):
        inside = token.unique().long().tolist()
        if len(inside) > 1:
            raise Wrong(
                f"{at}: token {k} holds numbers from patches {inside}, so that one patch lies in several tokens"
            )
    seen = tokens[:, 0].long().tolist()
    if seen != list(range(rows * columns)):
        raise Wrong(f"{at}: counted row by row, your tokens are the patches {seen}")


def _patch_inside(answer: Answer, g: Generator) -> None:
    """Numbers that say where they stand: 100 row + 10 column + channel."""
    patch, _, _ = _grid(g)
    places = [(i, j, c) for i in range(patch) for j in range(patch) for c in range(5)]
    x = torch.zeros(1, 5, patch, 2 * patch).double()
    for i, j, c in places:
        x[0, c, i, j] = 100 * i + 10 * j + c
    seen = answer.call("patchify", x, patch)[0, 0].long().tolist()
    for k, (got, due) in enumerate(zip(seen, places, strict=True)):
        held = (got // 100, got // 10 % 10, got % 10)
        if held != due:
            raise Wrong(
                f"patches of {patch} with 5 channels: place {k} of a token holds row {held[0]}, column {held[1]}, "
                f"channel {held[2]} of its patch",
                expected=f"row {due[0]}, column {due[1]}, channel {due[2]}",
            )


def _unfolded(x: Tensor, patch: int) -> Tensor:
    """The tokens of a picture by F.unfold, whose numbers go channel, row, column."""
    b, c, _, _ = x.shape
    columns = F.unfold(x, patch, stride=patch).mT
    return columns.reshape(b, -1, c, patch, patch).permute(0, 1, 3, 4, 2).flatten(2)


def _unpatch_places(answer: Answer, g: Generator) -> None:
    patch, height, width = _grid(g)
    x = torch.arange(height * width).double().view(1, 1, height, width)
    got = answer.call("unpatchify", _unfolded(x, patch), patch, height, width)
    if got.shape != x.shape:
        raise Wrong(f"{height} x {width} pixels: a picture of shape {tuple(got.shape)} comes back")
    if not close(plain(got), x):
        wrong = (got - x).abs()[0, 0] > 1e-9
        i, j = wrong.nonzero()[0].tolist()
        from_i, from_j = divmod(round(float(got[0, 0, i, j])), width)
        raise Wrong(
            f"{height} x {width} pixels in patches of {patch}: the pixel of row {from_i}, column {from_j} comes back "
            f"in row {i}, column {j}; {int(wrong.sum())} of {wrong.numel()} pixels are in wrong places"
        )


def _unpatch_channels(answer: Answer, g: Generator) -> None:
    patch, height, width = _grid(g)
    x = randn(g, 2, integer(g, 6, 8), height, width)
    got = answer.call("unpatchify", _unfolded(x, patch), patch, height, width)
    need(got, x, f"{x.shape[1]} channels, {height} x {width} pixels in patches of {patch}: not the picture that it was")


def _unpatch_undoes(answer: Answer, g: Generator) -> None:
    for patch, height, width in ((1, 2, 3), _grid(g)):
        x = randn(g, 2, 3, height, width)
        got = answer.call("unpatchify", answer.call("patchify", x, patch), patch, height, width)
        need(got, x, f"unpatchify(patchify(x)) is not x, for {height} x {width} pixels in patches of {patch}")


def _patch_refuses(answer: Answer, g: Generator) -> None:
    for height, width, patch in ((4, 5, 2), (5, 4, 2), (6, 8, 4)):
        error = _raised(answer, "patchify", randn(g, 2, 3, height, width), patch)
        if error != "ValueError":
            got = f"{error} is raised" if error else "they are cut up without a word"
            raise Wrong(f"{height} x {width} pixels in patches of {patch}: {got}; the docstring promises a ValueError")


def _patch_by(
    order: tuple[int, ...] = (0, 2, 4, 3, 5, 1), tiles: str = "check", square: bool = False
) -> tuple[Callable, Callable]:
    def wrong(x: Tensor, patch: int) -> Tensor:
        b, c, h, w = x.shape
        if tiles == "check" and (h % patch or w % patch):
            raise ValueError("patches do not tile")
        if tiles == "crop":
            x = x[:, :, : h // patch * patch, : w // patch * patch]
        cut = x.reshape(b, c, h // patch, patch, (h if square else w) // patch, patch)
        return cut.permute(*order).reshape(b, -1, patch * patch * c)

    return wrong, unpatchify


def _patch_reshape(x: Tensor, patch: int) -> Tensor:
    b, c, h, w = x.shape
    if h % patch or w % patch:
        raise ValueError("patches do not tile")
    return x.reshape(b, h * w // patch**2, patch**2 * c)


def _unpatch_by(cut: Callable, order: tuple[int, ...]) -> tuple[Callable, Callable]:
    """`cut` gives the axes of the reshaped tokens; `order` is how they are permuted."""

    def wrong(tokens: Tensor, patch: int, height: int, width: int) -> Tensor:
        b, m, features = tokens.shape
        x = tokens.reshape(b, *cut(patch, height // patch, width // patch, features // patch**2, m))
        return x.permute(*order).reshape(b, -1, height, width)

    return patchify, wrong


def _as_due(p: int, rows: int, columns: int, c: int, m: int) -> tuple[int, ...]:
    return rows, columns, p, p, c


def _unfold(x: Tensor, patch: int) -> Tensor:
    if x.shape[2] % patch or x.shape[3] % patch:
        raise ValueError("no")
    pieces = x.unfold(2, patch, patch).unfold(3, patch, patch)  # b c rows columns p p
    return torch.einsum("bcrqij->brqijc", pieces).flatten(3).flatten(1, 2)


def _fold(tokens: Tensor, patch: int, height: int, width: int) -> Tensor:
    b, m, n = tokens.shape
    columns = tokens.view(b, m, patch**2, n // patch**2).transpose(2, 3).reshape(b, m, n)
    return F.fold(columns.mT, (height, width), patch, stride=patch)


def _patch_loop(x: Tensor, patch: int) -> Tensor:
    h, w = x.shape[-2:]
    if (h // patch) * patch != h or (w // patch) * patch != w:
        raise ValueError(f"{patch}")
    out = []
    for top in range(0, h, patch):
        for left in range(0, w, patch):
            out.append(x[:, :, top : top + patch, left : left + patch].movedim(1, -1).flatten(1))
    return torch.stack(out, dim=1)


def _unpatch_loop(tokens: Tensor, patch: int, height: int, width: int) -> Tensor:
    channels = tokens.shape[2] // patch**2
    out = tokens.new_empty(len(tokens), channels, height, width)
    for k in range(tokens.shape[1]):
        top, left = patch * (k // (width // patch)), patch * (k % (width // patch))
        piece = tokens[:, k].reshape(-1, patch, patch, channels).movedim(-1, 1)
        out[:, :, top : top + patch, left : left + patch] = piece
    return out


PATCHIFY = Exercise(
    id="08.1",
    names=("patchify", "unpatchify"),
    references=(patchify, unpatchify),
    inputs=_patch_inputs,
    batch=("x", "tokens"),
    facts=(
        Fact(
            "a token is one whole patch, and tokens go row by row",
            _patch_whole,
            "give rows of patches, rows within a patch, columns of patches and columns within a patch an axis each",
        ),
        Fact(
            "within a token: rows, then columns, then channels",
            _patch_inside,
            "the last axis before the final reshape is the one that runs fastest",
        ),
        Fact(
            "patchify refuses patches that do not tile the picture",
            _patch_refuses,
            "two remainders to look at: raise ValueError yourself, before anything is reshaped",
        ),
        Fact(
            "unpatchify puts every pixel back in its place",
            _unpatch_places,
            "rows of patches and rows within a patch must be neighbours before they become one axis",
        ),
        Fact("unpatchify puts every channel back", _unpatch_channels, "the channels are the last axis within a token"),
        Fact("unpatchify undoes patchify", _unpatch_undoes, "the same axes, permuted the other way round"),
    ),
    mistakes=(
        Mistake(
            "reshape only",
            "You reshape the picture as it lies in memory. A reshape never moves a number: one token then holds strips "
            "of several patches, and one patch lies in several tokens. A permute is missing.",
            (_patch_reshape, unpatchify),
        ),
        Mistake(
            "column by column",
            "Your tokens go through the patches column by column. They come row by row: the axis of the patches' rows "
            "stands before that of their columns.",
            _patch_by((0, 4, 2, 3, 5, 1)),
        ),
        Mistake(
            "inner transpose",
            "Within a token columns come before rows: every patch is transposed in itself.",
            _patch_by((0, 2, 4, 5, 3, 1)),
        ),
        Mistake(
            "channels first",
            "Within a token channels come before rows and columns. That is the order of a convolution's weights; here "
            "the channel runs fastest, and weights trained with the one order do not fit the other.",
            _patch_by((0, 2, 4, 1, 3, 5)),
        ),
        Mistake(
            "square pictures only",
            "You use the height for both sides: only square pictures can be cut.",
            _patch_by(square=True),
        ),
        Mistake(
            "the rest is cropped",
            "Where patches do not tile the picture you drop what is left over at its right and lower edge, without a "
            "word. That is to be a ValueError.",
            _patch_by(tiles="crop"),
        ),
        Mistake(
            "torch's own error",
            "Where patches do not tile the picture you leave the error to reshape: it comes as a RuntimeError that "
            "speaks of shapes. Look at the two remainders first and raise a ValueError.",
            _patch_by(tiles="torch"),
        ),
        Mistake(
            "unpatchify: reshape only",
            "unpatchify reshapes and permutes nothing: each token becomes a strip of the picture instead of a patch.",
            (patchify, lambda tokens, patch, height, width: tokens.reshape(len(tokens), -1, height, width)),
        ),
        Mistake(
            "unpatchify: patches side by side",
            "unpatchify puts rows of patches next to columns of patches before it reshapes. Rows of patches must stand "
            "directly before the rows within a patch, columns of patches before the columns within.",
            _unpatch_by(_as_due, (0, 5, 1, 2, 3, 4)),
        ),
        Mistake(
            "unpatchify: height and width exchanged",
            "unpatchify takes height / patch for the number of columns and width / patch for that of rows: only square "
            "pictures come back whole.",
            _unpatch_by(lambda p, rows, columns, c, m: (columns, rows, p, p, c), (0, 5, 1, 3, 2, 4)),
        ),
        Mistake(
            "unpatchify: square only",
            "unpatchify takes the root of the number of tokens for the side of the grid: that holds for squares only, "
            "and height and width were given.",
            _unpatch_by(lambda p, rows, columns, c, m: (math.isqrt(m), math.isqrt(m), p, p, c), (0, 5, 1, 3, 2, 4)),
        ),
        Mistake(
            "unpatchify: inner transpose",
            "unpatchify exchanges rows and columns within each patch: every patch comes back transposed in its place.",
            _unpatch_by(_as_due, (0, 5, 1, 4, 2, 3)),
        ),
        Mistake(
            "unpatchify: column by column",
            "unpatchify fills the grid column by column. The tokens go row by row.",
            _unpatch_by(lambda p, rows, columns, c, m: (columns, rows, p, p, c), (0, 5, 2, 3, 1, 4)),
        ),
        Mistake(
            "unpatchify: channels first",
            "unpatchify reads a token as channel, row, column; patchify wrote it as row, column, channel.",
            _unpatch_by(lambda p, rows, columns, c, m: (rows, columns, c, p, p), (0, 3, 1, 4, 2, 5)),
        ),
    ),
    alternatives=((_unfold, _fold), (_patch_loop, _unpatch_loop), (_unfold, _unpatch_loop)),
    hints=(
        "Reshape so that each of these has an axis: channels, rows of patches, rows within a patch, columns of "
        "patches, columns within a patch. Then permute, then reshape again.",
        "x.reshape(b, c, h/p, p, w/p, p).permute(0, 2, 4, 3, 5, 1).reshape(b, -1, p p c); back: tokens.reshape(b, h/p, "
        "w/p, p, p, c).permute(0, 5, 1, 3, 2, 4).reshape(b, c, h, w).",
    ),
    probe=lambda answer, g: [_raised(answer, "patchify", randn(g, 1, 2, *size), 2) for size in ((4, 5), (5, 4))],
    hides=("dit.patchify", "dit.unpatchify"),
)

# --- 08.2 pos_embed_2d ------------------------------------------------------------------------------------------------


def _places(g: Generator) -> tuple[int, int, int]:
    """rows, columns, dim; all different."""
    rows = integer(g, 2, 4)
    return rows, rows + integer(g, 1, 3), 4 * integer(g, 3, 6)


def _pos_inputs(g: Generator) -> dict:
    rows, columns, dim = _places(g)
    return {"pos_embed_2d": dict(rows=rows, columns=columns, dim=dim)}


def _pos_halves(answer: Answer, g: Generator) -> None:
    rows, columns, dim = _places(g)
    table = answer(rows, columns, dim).double().view(rows, columns, dim)
    one, two = table[..., : dim // 2], table[..., dim // 2 :]
    at = f"{rows} rows of {columns}"

    def moves(half: Tensor, axis: int) -> bool:
        return not close(plain(half), plain(half.select(axis, 0).unsqueeze(axis).expand_as(half)), atol=1e-6)

    if moves(one, 0) and not moves(one, 1) and moves(two, 1) and not moves(two, 0):
        raise Wrong(
            f"{at}: the first half of a vector tells the row and the second the column: the halves are exchanged"
        )
    for half, name, quiet, other in ((one, "first", 0, "row"), (two, "second", 1, "column")):
        if moves(half, quiet):
            raise Wrong(
                f"{at}: the {name} half of the vector changes with the {other} too, where it should tell the "
                f"{'column' if other == 'row' else 'row'} alone (place k is row k // {columns}, column k % {columns})"
            )


def _pos_zero(answer: Answer, g: Generator) -> None:
    rows, columns, dim = _places(g)
    got = answer(rows, columns, dim)[0].double()
    due = torch.tensor([0.0, 1, 0, 1]).double().repeat_interleave(dim // 4)
    need(got, due, f"dim {dim}, place 0 (row 0, column 0): not sines of 0, cosines of 0, sines of 0, cosines of 0")


def _pos_ladder(answer: Answer, g: Generator) -> None:
    rows, columns, dim = _places(g)
    n = dim // 4
    table = answer(rows, columns, dim).double()
    for name, place, start in (("column", 1, 0), ("row", columns, 2 * n)):
        angles = torch.atan2(table[place, start : start + n], table[place, start + n : start + 2 * n]).tolist()
        for i, got in enumerate(angles):
            due = math.exp(-math.log(10_000) * i / n)
            if not math.isclose(got, due, rel_tol=1e-3):
                raise Wrong(
                    f"dim {dim}: frequency {i} of the {n} that tell the {name} is {got:.4g}; they fall from 1 by one "
                    f"constant factor from each to the next, which after {n} would reach 1/10000",
                    expected=f"{due:.4g}",
                )


def _pos_apart(answer: Answer, g: Generator) -> None:
    rows, columns, dim = _places(g)
    table = answer(rows, columns, dim).double()
    gaps = torch.cdist(table, table).add(10 * torch.eye(len(table)))
    k, m = sorted(divmod(int(gaps.argmin()), len(table)))
    if gaps.min() < 0.1:
        raise Wrong(
            f"{rows} rows of {columns}: (row {k // columns}, column {k % columns}) and (row {m // columns}, column "
            f"{m % columns}) have the same vector, nearly or exactly: the network cannot tell these two patches apart"
        )


def _pos_one(answer: Answer, g: Generator) -> None:
    rows, columns, dim = _places(g)
    k = integer(g, columns + 1, rows * columns - 1)
    row, column, n = k // columns, k % columns, dim // 4
    due = [f(at / 10_000 ** (i / n)) for at in (column, row) for f in (math.sin, math.cos) for i in range(n)]
    got = answer(rows, columns, dim)[k].double()
    message = f"{rows} rows of {columns}, dim {dim}: place {k} is row {row}, column {column}, and its vector is another"
    need(got, torch.tensor(due).double(), message, atol=1e-5)


def _pos_refuses(answer: Answer, g: Generator) -> None:
    for dim in (4 * integer(g, 1, 4) + 2, 4 * integer(g, 1, 4) + 1):
        error = _raised(answer, "pos_embed_2d", 2, 3, dim)
        if error != "ValueError":
            got = f"{error} is raised" if error else f"vectors of {answer(2, 3, dim).shape[-1]} numbers come back"
            raise Wrong(
                f"dim {dim}: {got}; two axes, each in sines and cosines, need a multiple of 4: raise ValueError"
            )


def _pos_fixed(answer: Answer, g: Generator) -> None:
    if answer(*_places(g)).requires_grad:
        raise Wrong("the table asks for gradients: it would be trained, and it is to stay as computed")


def _pos_by(
    ladder: Callable[[Tensor, int], Tensor] = lambda i, n: 10_000 ** (-i / n),
    join: Callable[[Tensor, Tensor], Tensor] = lambda row, column: torch.cat(
        [column.sin(), column.cos(), row.sin(), row.cos()], dim=1
    ),
    places: Callable[[int, int], tuple[Tensor, Tensor]] = lambda rows, columns: (
        torch.arange(rows).repeat_interleave(columns),
        torch.arange(columns).repeat(rows),
    ),
    share: int = 4,
    refuses: Callable[[int], object] = lambda dim: dim % 4,
    finish: Callable[[Tensor], Tensor] = lambda table: table,
) -> tuple[Callable]:
    def wrong(rows: int, columns: int, dim: int) -> Tensor:
        if refuses(dim):
            raise ValueError("a multiple of 4")
        n = dim // share
        frequencies = ladder(torch.arange(n), n)
        row, column = (place[:, None] * frequencies for place in places(rows, columns))
        return finish(join(row, column))

    return (wrong,)


def _pos_flat(rows: int, columns: int, dim: int) -> Tensor:
    if dim % 4:
        raise ValueError("a multiple of 4")
    angles = torch.arange(rows * columns)[:, None] * 10_000 ** (-torch.arange(dim // 2) / (dim // 2))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _pos_complex(rows: int, columns: int, dim: int) -> Tensor:
    if dim % 4:
        raise ValueError(dim)
    f = torch.exp(-math.log(10_000) * torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    waves = [torch.polar(torch.ones_like(f).expand(rows * columns, -1), p.reshape(-1, 1) * f) for p in (x, y)]
    return torch.cat([part for wave in waves for part in (wave.imag, wave.real)], dim=1).float()


def _pos_loop(rows: int, columns: int, dim: int) -> Tensor:
    if dim % 4 != 0:
        raise ValueError("no")
    n, table = dim // 4, []
    for r in range(rows):
        for c in range(columns):
            f = [10_000 ** (-i / n) for i in range(n)]
            vector = [math.sin(c * v) for v in f] + [math.cos(c * v) for v in f]
            table.append(vector + [math.sin(r * v) for v in f] + [math.cos(r * v) for v in f])
    return torch.tensor(table)


def _pos_see(answer: Answer, g: Generator) -> object:
    """The tables, whatever their precision, and what becomes of other widths."""
    seen = []
    for _ in range(3):
        try:
            out = answer(*_places(g))
            seen.append([plain(out.float()), out.requires_grad] if isinstance(out, Tensor) else plain(out))
        except Failed as error:
            seen.append(type(error.__cause__).__name__)
    return [*seen, *(_raised(answer, "pos_embed_2d", 2, 3, dim) for dim in (10, 9))]


POS_EMBED = Exercise(
    id="08.2",
    names=("pos_embed_2d",),
    references=(pos_embed_2d,),
    inputs=_pos_inputs,
    without=("keeps the dtype of its inputs", "leaves no graph behind"),  # it has none; a fact of its own looks
    facts=(
        Fact("every place has a vector of its own", _pos_apart, "row and column must both show, and separately"),
        Fact(
            "the first half tells the column, the second the row",
            _pos_halves,
            "tokens go row by row: with k the token, what is k // columns, and what k % columns?",
        ),
        Fact("place 0 is sines of 0 and cosines of 0", _pos_zero, "all sines of an axis, then all its cosines"),
        Fact(
            "the frequencies fall from 1, all by one factor",
            _pos_ladder,
            "how many frequencies share one axis, if each has a sine and a cosine, and there are two axes?",
        ),
        Fact("one place, number by number", _pos_one, "what times which frequency goes into each sine?"),
        Fact("refuses a dim that 4 does not divide", _pos_refuses, "two axes, and a sine and a cosine for each"),
        Fact("is fixed, not trained", _pos_fixed, "a plain tensor, no nn.Parameter"),
    ),
    mistakes=(
        Mistake(
            "row first",
            "Row and column are exchanged: the first half is to tell the column. The network would read every picture "
            "with x and y exchanged, and published weights would not fit.",
            _pos_by(join=lambda row, column: torch.cat([row.sin(), row.cos(), column.sin(), column.cos()], dim=1)),
        ),
        Mistake(
            "column by column",
            "The places go column by column, and tokens row by row: vectors land on the wrong patches (on a square "
            "grid, on those mirrored at the diagonal).",
            _pos_by(
                places=lambda rows, columns: (
                    torch.arange(rows).repeat(columns),
                    torch.arange(columns).repeat_interleave(rows),
                )
            ),
        ),
        Mistake(
            "dim / 2 in the exponent",
            "The exponent divides i by dim / 2 instead of dim / 4: there are dim / 4 frequencies, so they stop at "
            "1/100 instead of falling towards 1/10000.",
            _pos_by(lambda i, n: 10_000 ** (-i / (2 * n))),
        ),
        Mistake(
            "twice as wide",
            "Each axis gets dim / 2 frequencies, each with a sine and a cosine: with two axes that is 2 dim numbers.",
            _pos_by(share=2),
        ),
        Mistake(
            "rows and columns added",
            "You add the vectors of row and column instead of putting them side by side: row 1, column 2 and row 2, "
            "column 1 get the same vector.",
            _pos_by(
                share=2, join=lambda row, column: torch.cat([row.sin() + column.sin(), row.cos() + column.cos()], dim=1)
            ),
        ),
        Mistake(
            "one line",
            "You number the places in one line, 0 .. rows * columns - 1: a patch is then further from the one below it "
            "than the two ends of a row are from each other. Tell row and column apart.",
            (_pos_flat,),
        ),
        Mistake(
            "square only",
            "You use the number of rows for both sides: only square grids get the right number of vectors.",
            _pos_by(
                places=lambda rows, columns: (
                    torch.arange(rows).repeat_interleave(rows),
                    torch.arange(rows).repeat(rows),
                )
            ),
        ),
        Mistake(
            "sines and cosines interleaved",
            "Sines and cosines alternate. Here all sines of an axis come first, then all its cosines: weights trained "
            "with one order do not fit the other.",
            _pos_by(
                join=lambda row, column: torch.cat(
                    [torch.stack([a.sin(), a.cos()], dim=2).flatten(1) for a in (column, row)], dim=1
                )
            ),
        ),
        Mistake(
            "cosines first",
            "Cosines come before sines. Place 0 must begin with zeros.",
            _pos_by(join=lambda row, column: torch.cat([column.cos(), column.sin(), row.cos(), row.sin()], dim=1)),
        ),
        Mistake(
            "sines of both, then cosines of both",
            "You put the sines of both axes first and the cosines of both behind: column and row each keep a half for "
            "themselves.",
            _pos_by(join=lambda row, column: torch.cat([column.sin(), row.sin(), column.cos(), row.cos()], dim=1)),
        ),
        Mistake(
            "sign of the exponent",
            "The frequencies rise from 1 towards 10000: the exponent has the wrong sign, and neighbours look as "
            "different as patches far apart.",
            _pos_by(lambda i, n: 10_000 ** (i / n)),
        ),
        Mistake(
            "last frequency included",
            "Your last frequency is 1/10000 itself: you divide by dim / 4 - 1, where dim / 4 is due.",
            _pos_by(lambda i, n: 10_000 ** (-i / (n - 1))),
        ),
        Mistake(
            "places in [0, 1]",
            "You divide the places by the length of the grid. Neighbouring patches then look nearly alike, and the "
            "same place has another vector on another grid.",
            _pos_by(
                places=lambda rows, columns: (
                    (torch.arange(rows) / rows).repeat_interleave(columns),
                    (torch.arange(columns) / columns).repeat(rows),
                )
            ),
        ),
        Mistake(
            "other widths accepted",
            "A dim that 4 does not divide passes without a word and gives fewer numbers than asked for; somebody will "
            "meet this later as a shape error far away.",
            _pos_by(refuses=lambda dim: False),
        ),
        Mistake(
            "only odd widths refused",
            "You refuse odd widths only. With two axes, each in pairs of sine and cosine, dim must be a multiple of 4: "
            "10 comes out as 8.",
            _pos_by(refuses=lambda dim: dim % 2),
        ),
        Mistake(
            "trainable",
            "The table is a parameter: it would be trained. These positions are fixed: a plain tensor, which a module "
            "keeps as a buffer.",
            _pos_by(finish=nn.Parameter),
        ),
    ),
    alternatives=((_pos_complex,), (_pos_loop,)),
    hints=(
        "Write it for one axis first: positions (n, 1) times dim / 4 frequencies, then sines and cosines. What is the "
        "column, and what the row, of each place in order?",
        "f = 10000^(-arange(n) / n), n = dim / 4; cat([sin(column f), cos(column f), sin(row f), cos(row f)]) with "
        "row = arange(rows).repeat_interleave(columns), column = arange(columns).repeat(rows).",
    ),
    probe=_pos_see,
    by_probe=True,  # float64 tables are as right as float32 ones
    hides=("layers.position_embedding",),
)

# --- 08.3 DiTBlock ----------------------------------------------------------------------------------------------------

_PARTS = {  # every parameter of a block of width d, as shapes in units of d
    "attention.to_q.weight": (1, 1),
    "attention.to_kv.weight": (2, 1),
    "attention.to_out.weight": (1, 1),
    "attention.to_out.bias": (1,),
    "mlp.0.weight": (4, 1),
    "mlp.0.bias": (4,),
    "mlp.2.weight": (1, 4),
    "mlp.2.bias": (1,),
    "modulation.weight": (6, 1),
    "modulation.bias": (6,),
}
_SIX = ("shift1", "scale1", "gate1", "shift2", "scale2", "gate2")
_ONE_TO_FOUR = (1.0, 2.0, 3.0, 4.0)


def _run(answer: Answer, block: nn.Module, x: Tensor, c: Tensor) -> Tensor:
    """The block's answer; refused where it is no tensor of x's shape."""
    out = answer.ask(block, "__call__", x.clone(), c.clone())
    odd = oddity(out, x)
    if odd:
        raise Wrong(f"x {tuple(x.shape)}, c {tuple(c.shape)}: {odd}")
    return out


def _block(answer: Answer, dim: int, heads: int) -> nn.Module:
    block = answer(dim, heads)
    if not isinstance(block, nn.Module):
        raise Wrong(f"DiTBlock(dim, heads) must be an nn.Module, and is of type {type(block).__name__}")
    have = {name: tuple(p.shape) for name, p in block.named_parameters()}
    for name, shape in _PARTS.items():
        due = tuple(n * dim for n in shape)
        if have.get(name) != due:
            got = f"has shape {have[name]}" if name in have else "is missing"
            raise Wrong(f"dim {dim}: the parameter {name} {got}; by the docstring there is one of shape {due}")
    return block.double()


def _parts(answer: Answer, g: Generator) -> None:
    heads = (2, 4)[integer(g, 0, 1)]
    block = _block(answer, 4 * integer(g, 1, 3), heads)
    if getattr(block.attention, "heads", heads) != heads:
        raise Wrong(f"the attention has {block.attention.heads} head(s) where {heads} were asked for")
    extra = [name for name, _ in block.named_parameters() if name not in _PARTS]
    if extra:
        raise Wrong(f"there are parameters besides those of attention, mlp and modulation: {', '.join(extra)}")


def _awake(block: nn.Module, g: Generator) -> nn.Module:
    """Every parameter random, in an order of our own; what is no part of a block stays as it is."""
    named = dict(block.named_parameters())
    with torch.no_grad():
        for name in _PARTS:
            named[name].copy_(0.4 * randn(g, *named[name].shape))
    return block


def _passing(answer: Answer, **vectors: object) -> nn.Module:
    """A block of width 4 whose attention, for one token, returns what it reads, and whose MLP returns gelu of what it
    reads; the six vectors of the modulation are these numbers, the others 0, whatever c is."""
    block = _block(answer, 4, 1)
    named, eye, zero = dict(block.named_parameters()), torch.eye(4).double(), torch.zeros(4, 4).double()
    with torch.no_grad():
        for name in _PARTS:
            named[name].zero_()
        named["attention.to_kv.weight"].copy_(torch.cat([zero, eye]))
        named["attention.to_out.weight"].copy_(eye)
        named["mlp.0.weight"].copy_(torch.cat([eye, zero, zero, zero]))
        named["mlp.2.weight"].copy_(torch.cat([eye, zero, zero, zero], dim=1))
        for k, name in enumerate(_SIX):
            if name in vectors:
                named["modulation.bias"][4 * k : 4 * k + 4] = torch.as_tensor(vectors[name]).double()
    return block


def _added(answer: Answer, block: nn.Module, x: tuple[float, ...], c: tuple[float, ...] = (0, 0, 0, 0)) -> Tensor:
    """What the block adds to one token."""
    x, c = (torch.tensor(v).double() for v in (x, c))
    return _run(answer, block, x.view(1, 1, 4), c.view(1, 4)).detach().view(4) - x


def _normed(x: tuple[float, ...]) -> list[float]:
    mean = math.fsum(x) / 4
    return [(v - mean) / math.sqrt(math.fsum((w - mean) ** 2 for w in x) / 4 + 1e-6) for v in x]


def _gelu(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _told(said: str, got: Tensor, also: str = "") -> str:
    return f"{said}: to x = (1, 2, 3, 4) the block adds {_numbers(got)}{also}"


def _fresh(answer: Answer, g: Generator) -> None:
    dim = 4 * integer(g, 2, 4)
    for _ in range(2):
        block = _block(answer, dim, 2)
        x, c = randn(g, 3, 5, dim), randn(g, 3, dim)
        change = float((_run(answer, block, x, c) - x).detach().abs().max())
        if change != 0:
            off = [n for n in ("weight", "bias") if getattr(block.modulation, n).any()]
            why = f": modulation.{' and '.join(off)} {'do' if len(off) > 1 else 'does'} not start at 0" if off else ""
            raise Wrong(f"a fresh block must return x as it is; yours changes it by up to {change:.3g}{why}")
    for name in ("weight", "bias"):
        if getattr(block.modulation, name).any():
            raise Wrong(f"modulation.{name} does not start at 0")


def _closed(answer: Answer, g: Generator) -> None:
    """E4: the gate makes the identity, not the shift and the scale."""
    six = {name: randn(g, 4).tolist() for name in _SIX if "gate" not in name}
    got = _added(answer, _passing(answer, **six), _ONE_TO_FOUR)
    if got.abs().max() > 1e-12:
        raise Wrong(
            "with both gates 0, and shifts and scales that are not, both branches are closed: nothing is added to x, "
            f"whatever they say; to (1, 2, 3, 4) you add {_numbers(got)}"
        )


def _open(answer: Answer, g: Generator) -> None:
    """E4's numbers: what the branch reads at shift = scale = 0 is norm(x), which is not x."""
    normed = torch.tensor(_normed(_ONE_TO_FOUR)).double()
    assert close(normed, torch.tensor([-1.341641, -0.447214, 0.447214, 1.341641]).double(), rtol=0, atol=2e-6)
    gate = [round(float(v), 2) for v in 1 + randn(g, 4)]
    for gates, name in (([1.0] * 4, "1"), (gate, f"{tuple(gate)}")):
        got = _added(answer, _passing(answer, gate1=gates), _ONE_TO_FOUR)
        due = torch.tensor(gates).double() * normed
        if not close(got, due, rtol=1e-6, atol=1e-7):
            share = float(got @ due / (due @ due))
            times = f", {share:.4g} times what is due" if share and close(got, share * due, rtol=1e-5) else ""
            said = f"attention's gate {name}, the other five vectors 0, and an attention that returns what it reads"
            raise Wrong(_told(said, got, times), expected=_numbers(due))


def _modulated(answer: Answer, g: Generator) -> None:
    for branch, number, f in (("attention", 1, float), ("MLP", 2, _gelu)):
        shift, scale, gate = ([round(float(v), 2) for v in randn(g, 4)] for _ in range(3))
        for given in (
            dict(shift=shift, scale=[0] * 4, gate=[1] * 4),
            dict(shift=[0] * 4, scale=scale, gate=[1] * 4),
            dict(shift=shift, scale=scale, gate=gate),
        ):
            got = _added(answer, _passing(answer, **{f"{k}{number}": v for k, v in given.items()}), _ONE_TO_FOUR)
            due = _branch(f, **given)
            if close(got, due, rtol=1e-6, atol=1e-7):
                continue
            without = [k for k in given if close(got, _branch(f, **given | {k: [int(k == "gate")] * 4}), rtol=1e-5)]
            also = f", as if the {without[0]} had no effect" if without else ""
            six = ", ".join(f"{k} {tuple(v) if len(set(v)) > 1 else v[0]}" for k, v in given.items())
            reads = "what it reads" if number == 1 else "gelu of what it reads"
            said = f"{branch} with {six}, returning {reads}, and the other three vectors 0"
            raise Wrong(_told(said, got, also), expected=_numbers(due))


def _branch(f: Callable, shift: Sequence[float], scale: Sequence[float], gate: Sequence[float]) -> Tensor:
    rows = zip(gate, _normed(_ONE_TO_FOUR), scale, shift, strict=True)
    return torch.tensor([w * f(v * (1 + a) + b) for w, v, a, b in rows]).double()


def _branches_in_turn(answer: Answer, g: Generator) -> None:
    """The MLP reads what the attention has left, after a norm of its own."""
    x, gate = _ONE_TO_FOUR, (3, -1, 2, 0)
    middle = tuple(v + w * n for v, w, n in zip(x, gate, _normed(x), strict=True))
    due = torch.tensor([m - v + _gelu(n) for m, v, n in zip(middle, x, _normed(middle), strict=True)]).double()
    got = _added(answer, _passing(answer, gate1=gate, gate2=(1, 1, 1, 1)), x)
    if not close(got, due, rtol=1e-6, atol=1e-7):
        side = [w * n + _gelu(n) for w, n in zip(gate, _normed(x), strict=True)]
        also = ", as if the MLP read the block's input" if close(got, torch.tensor(side).double(), rtol=1e-5) else ""
        said = "both gates open, attention's (3, -1, 2, 0) and MLP's 1, shifts and scales 0"
        raise Wrong(_told(said, got, also), expected=_numbers(due))


def _silu_of_c(answer: Answer, g: Generator) -> None:
    """Where the gate's rows are the identity, the gate is silu(c): silu(2) = 2 / (1 + exp(-2)) = 1.761594."""
    block = _passing(answer)
    with torch.no_grad():
        block.modulation.weight[8:12] = torch.eye(4)
    c = (2.0, -1.0, 1.0, -3.0)
    gate = _added(answer, block, _ONE_TO_FOUR, c) / torch.tensor(_normed(_ONE_TO_FOUR)).double()
    due = torch.tensor([v / (1 + math.exp(-v)) for v in c]).double()
    if not close(gate, due, rtol=1e-6):
        raise Wrong(
            f"modulation reads silu(c): c = (2, -1, 1, -3), where the gate's rows of the modulation are the identity, "
            f"acts as a gate of {_numbers(gate)}",
            expected=_numbers(due),
        )


def _eps_of_norm(answer: Answer, g: Generator) -> None:
    """At x = 0.001 (1, 2, 3, 4) the variance is 1.25e-6, and with eps = 1e-6 the root of the sum is 0.0015."""
    x = tuple(v / 1000 for v in _ONE_TO_FOUR)
    for gate, f in (("gate1", float), ("gate2", _gelu)):
        got = _added(answer, _passing(answer, **{gate: (1, 1, 1, 1)}), x)
        due = torch.tensor([f(v) for v in (-1, -1 / 3, 1 / 3, 1)]).double()
        if not close(got, due, rtol=1e-5):
            name = "attention's" if gate == "gate1" else "MLP's"
            raise Wrong(
                f"eps of the {name} layer norm: for x = 0.001 (1, 2, 3, 4), whose variance is 1.25e-6, the branch adds "
                f"{_numbers(got)}",
                expected=f"{_numbers(due)}, from a root of 2.25e-6",
            )


def _gelu_by_tanh(answer: Answer, g: Generator) -> None:
    """With scale2 = -1 the MLP reads shift2 alone."""
    v = (1.0, -1.0, 2.0, -2.0)
    got = _added(answer, _passing(answer, shift2=v, scale2=(-1,) * 4, gate2=(1,) * 4), _ONE_TO_FOUR)
    due = torch.tensor([_gelu(w) for w in v]).double()
    if not close(got, due, rtol=1e-6):
        exact = torch.tensor([w * (1 + math.erf(w / math.sqrt(2))) / 2 for w in v]).double()
        which = ": that is the exact GELU" if close(got, exact, rtol=1e-6) else ""
        raise Wrong(f"the MLP's GELU of (1, -1, 2, -2) is {_numbers(got, 7)}{which}", expected=_numbers(due, 7))


def _by_hand(state: dict[str, Tensor], x: Tensor, c: Tensor, heads: int) -> Tensor:
    """The block once more, token by token and head by head."""
    out = torch.empty_like(x)
    dim = x.shape[-1]
    width = dim // heads
    for b in range(len(x)):
        e = c[b] / (1 + torch.exp(-c[b]))
        six = dict(zip(_SIX, (state["modulation.weight"] @ e + state["modulation.bias"]).split(dim), strict=True))

        def read(token: Tensor, number: int, six: dict[str, Tensor] = six) -> Tensor:
            normed = (token - token.mean()) / (token.var(correction=0) + 1e-6).sqrt()
            return normed * (1 + six[f"scale{number}"]) + six[f"shift{number}"]

        reads = [read(token, 1) for token in x[b]]
        q = [state["attention.to_q.weight"] @ h for h in reads]
        k, v = zip(*[(state["attention.to_kv.weight"] @ h).split(dim) for h in reads], strict=True)
        for i in range(len(reads)):
            said = []
            for h in range(heads):
                part = slice(h * width, (h + 1) * width)
                weights = torch.stack([q[i][part] @ key[part] for key in k]).div(math.sqrt(width)).exp()
                said.append(sum(w * value[part] for w, value in zip(weights / weights.sum(), v, strict=True)))
            said = state["attention.to_out.weight"] @ torch.cat(said) + state["attention.to_out.bias"]
            token = x[b, i] + six["gate1"] * said
            hidden = state["mlp.0.weight"] @ read(token, 2) + state["mlp.0.bias"]
            hidden = torch.tensor([_gelu(float(value)) for value in hidden]).double()
            out[b, i] = token + six["gate2"] * (state["mlp.2.weight"] @ hidden + state["mlp.2.bias"])
    return out


def _whole_block(answer: Answer, g: Generator) -> None:
    for heads in (1, 2):
        block = _awake(_block(answer, 4, heads), g)
        x, c = randn(g, 2, 3, 4), randn(g, 2, 4)
        state = {name: p.detach() for name, p in block.named_parameters()}
        due = _by_hand(state, x, c, heads)
        need(
            _run(answer, block, x, c), due, f"with random weights, heads = {heads}: not what the formula gives by hand"
        )


def _block_apart(answer: Answer, g: Generator) -> None:
    block, x, c = _awake(_block(answer, 8, 2), g), randn(g, 3, 5, 8), randn(g, 3, 8)
    whole = _run(answer, block, x, c)
    for i in range(3):
        alone = _run(answer, block, x[i : i + 1], c[i : i + 1])
        need(whole[i : i + 1], alone, f"example {i} comes out otherwise in a batch of 3 than alone")


def _block_learns(answer: Answer, g: Generator) -> None:
    dim = 8
    block, x, c = _block(answer, dim, 2), randn(g, 3, 5, dim), randn(g, 3, dim)
    _backward(_run(answer, block, x, c), g)
    grad = block.modulation.weight.grad
    for name, start in (("attention", 2 * dim), ("MLP", 5 * dim)):
        if grad is None or not grad[start : start + dim].any():
            raise Wrong(
                f"in a fresh block the gate of the {name} gets a gradient of exactly 0: it would stay 0 for ever, and "
                "nothing in its branch would learn"
            )
    block = _awake(_block(answer, dim, 2), g)
    _backward(_run(answer, block, x, c), g)
    still = [name for name, p in block.named_parameters() if p.grad is None or not p.grad.any()]
    if still:
        raise Wrong(f"once all weights are random, all must learn: no gradient reaches {', '.join(still)}")


def _backward(out: Tensor, g: Generator) -> None:
    if not out.requires_grad:
        raise Wrong("no gradient can go through the block: is there a no_grad or a detach?")
    (out * randn(g, *out.shape)).sum().backward()


def _block_dtype(answer: Answer, g: Generator) -> None:
    block = _awake(_block(answer, 8, 2), g).float()
    x, c = randn(g, 2, 3, 8).float(), randn(g, 2, 8).float()
    kept = x.clone(), c.clone()
    got = answer.ask(block, "__call__", x, c)
    if got.dtype != torch.float32:
        raise Wrong(f"a float32 block and float32 inputs give {got.dtype}")
    if not (torch.equal(x, kept[0]) and torch.equal(c, kept[1])):
        raise Wrong("the block changes its inputs in place: the caller still needs them")


def _block_see(answer: Answer, g: Generator) -> object:
    block = answer(8, 2)
    named = dict(block.named_parameters())
    missing = sorted(name for name in _PARTS if name not in named)
    if missing:
        return missing
    fresh = {name: bool(named[name].any()) for name in ("modulation.weight", "modulation.bias", "mlp.2.weight")}
    fresh["attention"] = bool(named["attention.to_out.weight"].any())
    extra = sum(p.numel() for name, p in named.items() if name not in _PARTS)
    block = _awake(block.double(), g)
    x, c, seen = randn(g, 3, 5, 8), randn(g, 3, 8), []
    for size in (1.0, 1e-3):
        try:
            seen.append(plain(answer.ask(block, "__call__", size * x, c)))
        except Failed as error:
            seen.append(str(error).partition("\n")[0])
    return dict(fresh=fresh, extra=extra, seen=seen)


def _block_by(
    scaled: Callable = lambda h, shift, scale: h * (1 + scale) + shift,
    add: Callable = lambda x, gate, said: x + gate * said,
    split: Callable[[Sequence[Tensor]], Sequence[Tensor]] = lambda six: six,
    start: Callable[[nn.Module], object] = lambda block: None,
    act: Callable = F.silu,
    norm: Callable = lambda h: F.layer_norm(h, h.shape[-1:], eps=1e-6),
    gelu: str = "tanh",
    flow: str = "in turn",
    affine: bool = False,
) -> type:
    class Wrong(nn.Module):
        def __init__(self, dim: int, heads: int):
            super().__init__()
            self.attention = Attention(dim, heads)
            self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(approximate=gelu), nn.Linear(4 * dim, dim))
            self.modulation = nn.Linear(dim, 6 * dim)
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)
            if affine:
                self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
            start(self)

        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            shift1, scale1, gate1, shift2, scale2, gate2 = split(self.modulation(act(c))[:, None].chunk(6, dim=-1))
            norm1, norm2 = (self.norm1, self.norm2) if affine else (norm, norm)
            if flow == "norm after":
                x = add(x, gate1, scaled(norm1(self.attention(x)), shift1, scale1))
                return add(x, gate2, scaled(norm2(self.mlp(x)), shift2, scale2))
            if flow == "MLP first":
                x = add(x, gate2, self.mlp(scaled(norm2(x), shift2, scale2)))
                return add(x, gate1, self.attention(scaled(norm1(x), shift1, scale1)))
            middle = add(x, gate1, self.attention(scaled(norm1(x), shift1, scale1)))
            gate2 = gate1 if flow == "one gate" else gate2
            reads = x if flow == "parallel" else middle
            second = reads if flow == "one norm" else norm2(reads)
            return add(middle, gate2, self.mlp(scaled(second, shift2, scale2)))

    return Wrong


def _default_modulation(block: nn.Module) -> None:
    block.modulation.reset_parameters()


def _random_bias(block: nn.Module) -> None:
    nn.init.uniform_(block.modulation.bias, -0.3, 0.3)


def _silent_branches(block: nn.Module) -> None:
    for layer in (block.attention.to_out, block.mlp[2]):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


class _BlockWithNorms(nn.Module):
    """Layer norms as modules, the six vectors by unflatten."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(dim, 6 * dim)
        for parameter in self.modulation.parameters():
            parameter.data.zero_()
        self.mlp = nn.Sequential(nn.Linear(dim, dim * 4), nn.GELU("tanh"), nn.Linear(dim * 4, dim))
        self.attention = Attention(dim=dim, heads=heads)
        self.act = nn.SiLU()

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        m = self.modulation(self.act(c)).unflatten(1, (6, -1))
        x = x + m[:, 2:3] * self.attention(torch.addcmul(m[:, 0:1], self.norm1(x), 1 + m[:, 1:2]))
        return x + m[:, 5:6] * self.mlp(torch.addcmul(m[:, 3:4], self.norm2(x), 1 + m[:, 4:5]))


class _BlockByHand(nn.Module):
    """Norms written out, one linear map cut into rows."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.attention, self.modulation = Attention(dim, heads), nn.Linear(dim, 6 * dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim))
        torch.nn.init.constant_(self.modulation.weight, 0.0)
        torch.nn.init.constant_(self.modulation.bias, 0.0)
        self.dim = dim

    def _six(self, c: Tensor, k: int) -> Tensor:
        rows = slice(k * self.dim, (k + 1) * self.dim)
        c = c * c.sigmoid()
        return torch.einsum("bd,ed->be", c, self.modulation.weight[rows]).add(self.modulation.bias[rows]).unsqueeze(1)

    def _norm(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        for k, branch in ((0, self.attention), (3, self.mlp)):
            normed = self._norm(x)
            x = x + self._six(c, k + 2) * branch(normed + normed * self._six(c, k + 1) + self._six(c, k))
        return x


BLOCK = Exercise(
    id="08.3",
    names=("DiTBlock",),
    references=(DiTBlock,),
    inputs=lambda g: {},
    universal=False,
    kind="module",
    facts=(
        Fact("has the parts asked for, and no other weights", _parts, "attention, mlp, modulation: by these names"),
        Fact(
            "a fresh block is the identity",
            _fresh,
            "which of the six vectors must be 0 for that, and what makes all of them 0 for every c?",
        ),
        Fact(
            "with both gates 0 it is the identity, whatever shifts and scales are",
            _closed,
            "a gate multiplies what its branch says; in which places of the six do the gates stand?",
        ),
        Fact(
            "with gate 1, shift 0 and scale 0 the attention's branch adds attention(norm(x))",
            _open,
            "the branch reads the normed x, and what it says is added to x itself",
        ),
        Fact(
            "each branch reads norm(x) (1 + scale) + shift, times its gate",
            _modulated,
            "shift, scale, gate of the attention, then shift, scale, gate of the MLP",
        ),
        Fact("the MLP's branch reads what the attention left", _branches_in_turn, "two steps, each with its own norm"),
        Fact("the six vectors come from silu(c)", _silu_of_c, "an activation stands between c and the linear map"),
        Fact("layer norms have eps 1e-6", _eps_of_norm, "the default of torch is another"),
        Fact("the MLP's GELU is that by tanh", _gelu_by_tanh, 'nn.GELU(approximate="tanh")'),
        Fact("random weights: the same as by hand", _whole_block, "everything is awake now: term by term"),
        Fact("treats every example on its own", _block_apart, "c (B, dim) needs an axis for the tokens"),
        Fact(
            "gates learn at once, all else as soon as they are open",
            _block_learns,
            "the gradient of a gate is what its branch says: may that be 0, too?",
        ),
        Fact("keeps dtype and inputs", _block_dtype, "no += on x, nothing made in float64"),
    ),
    mistakes=(
        Mistake(
            "modulation not zeroed",
            "The modulation starts at random: a fresh block already changes x, and the deeper the network the more. "
            "Its weight and bias must start at 0.",
            (_block_by(start=_default_modulation),),
        ),
        Mistake(
            "bias not zeroed",
            "The modulation's weight starts at 0 and its bias does not: the gates are its bias, so a fresh block "
            "already changes x.",
            (_block_by(start=_random_bias),),
        ),
        Mistake(
            "gate 1 + gate",
            "You multiply by 1 + gate. The 1 belongs to the scale alone: a gate of 0 must close its branch, and with a "
            "1 a fresh block is no identity.",
            (_block_by(add=lambda x, gate, said: x + (1 + gate) * said),),
        ),
        Mistake(
            "no gate",
            "The gates are not used. A scale and shift of 0 do not make the block the identity: norm(x) goes through "
            "attention and MLP all the same ((1, 2, 3, 4) is read as (-1.34, -0.45, 0.45, 1.34)). Only a gate of 0 "
            "closes a branch.",
            (_block_by(add=lambda x, gate, said: x + said),),
        ),
        Mistake(
            "scale without 1 +",
            "You multiply by scale, not by 1 + scale: at scale 0 the branch reads nothing of x, only the shift. While "
            "the gates are 0 nobody notices.",
            (_block_by(lambda h, shift, scale: h * scale + shift),),
        ),
        Mistake(
            "layer norms with weights",
            "The layer norms have a weight and a bias of their own. Scale and shift come from c here: pass "
            "elementwise_affine=False, or use F.layer_norm.",
            (_block_by(affine=True),),
        ),
        Mistake(
            "shift and scale exchanged",
            "You read the scale before the shift. The order is shift, scale, gate: with published weights, each would "
            "do the other's work.",
            (_block_by(split=lambda six: [six[i] for i in (1, 0, 2, 4, 3, 5)]),),
        ),
        Mistake(
            "gates last",
            "You take the six as shift, scale, shift, scale, gate, gate. Each branch has its three together: shift, "
            "scale, gate of the attention, then those of the MLP.",
            (_block_by(split=lambda six: [six[i] for i in (0, 1, 4, 2, 3, 5)]),),
        ),
        Mistake(
            "gates first",
            "You read the gate before shift and scale: the order within each branch is shift, scale, gate.",
            (_block_by(split=lambda six: [six[i] for i in (1, 2, 0, 4, 5, 3)]),),
        ),
        Mistake(
            "branches exchanged",
            "The first three vectors go to the MLP and the last three to the attention; it is the other way round.",
            (_block_by(split=lambda six: [*six[3:], *six[:3]]),),
        ),
        Mistake(
            "one gate for both",
            "The attention's gate is used for the MLP's branch too; that has one of its own, the last of the six.",
            (_block_by(flow="one gate"),),
        ),
        Mistake(
            "shift before scale",
            "You shift first and scale then, (norm(x) + shift) (1 + scale): the shift gets scaled, too.",
            (_block_by(lambda h, shift, scale: (h + shift) * (1 + scale)),),
        ),
        Mistake(
            "norm over all tokens",
            "Your layer norm runs over tokens and width together, so that patches see one another's size. It runs over "
            "the width, the last axis, of each token alone.",
            (_block_by(norm=lambda h: F.layer_norm(h, h.shape[1:], eps=1e-6)),),
        ),
        Mistake(
            "no axis for the tokens",
            "The six vectors are (B, dim) and x is (B, T, dim): they need an axis of length 1 between, [:, None], so "
            "that all tokens of an example get the same. Where B happens to equal T this passes without an error, and "
            "is wrong.",
            (_block_by(split=lambda six: [vector[:, 0] for vector in six]),),
        ),
        Mistake(
            "no residual",
            "x itself is missing from the sum: with gates of 0 the block returns 0 instead of x.",
            (_block_by(add=lambda x, gate, said: gate * said),),
        ),
        Mistake(
            "gate on the sum",
            "The gate multiplies x as well: a gate of 0 then wipes out x. It belongs to what the branch says alone.",
            (_block_by(add=lambda x, gate, said: gate * (x + said)),),
        ),
        Mistake(
            "blend",
            "You blend x and the branch, (1 - gate) x + gate branch. x stays whole here: x + gate branch.",
            (_block_by(add=lambda x, gate, said: (1 - gate) * x + gate * said),),
        ),
        Mistake(
            "no silu",
            "c goes into the modulation as it is; silu(c) is due.",
            (_block_by(act=lambda c: c),),
        ),
        Mistake(
            "side by side",
            "The MLP's branch reads the block's input x instead of what the attention left: the two run side by side.",
            (_block_by(flow="parallel"),),
        ),
        Mistake(
            "MLP first", "The MLP's branch comes first; the attention's is due first.", (_block_by(flow="MLP first"),)
        ),
        Mistake(
            "second norm missing",
            "The MLP's branch reads x without a layer norm of its own.",
            (_block_by(flow="one norm"),),
        ),
        Mistake(
            "norm after the branch",
            "You norm and modulate what the branch says. Norm and modulation come before it: they make what it reads.",
            (_block_by(flow="norm after"),),
        ),
        Mistake(
            "no norm",
            "There is no layer norm: the branches read x itself, whose size grows from block to block.",
            (_block_by(norm=lambda h: h),),
        ),
        Mistake(
            "eps 1e-5",
            "Your layer norms have torch's default eps, 1e-5. It shows where x is small; published weights were "
            "trained with 1e-6.",
            (_block_by(norm=lambda h: F.layer_norm(h, h.shape[-1:])),),
        ),
        Mistake(
            "exact GELU",
            "Your GELU is the exact one, where that by tanh is due. They differ by less than 0.001, but in each of 28 "
            "blocks.",
            (_block_by(gelu="none"),),
        ),
        Mistake(
            "dead branch",
            "The last layers of both branches start at 0, too. Then the branch says 0, so that the gradient of its "
            "gate is 0; the gate stays 0, so that the gradient of the branch is 0: neither will ever learn.",
            (_block_by(start=_silent_branches),),
        ),
    ),
    alternatives=((_BlockWithNorms,), (_BlockByHand,)),
    hints=(
        "modulation(silu(c)) is (B, 6 dim): give it an axis for the tokens and chunk it into six. Then two lines, one "
        "per branch: x = x + gate * branch(norm(x) * (1 + scale) + shift).",
        "shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(c))[:, None].chunk(6, dim=-1); "
        "x = x + gate1 * self.attention(norm(x) * (1 + scale1) + shift1), then the same with 2 and self.mlp; "
        "norm(x) = F.layer_norm(x, x.shape[-1:], eps=1e-6).",
    ),
    probe=_block_see,
    hides=("dit_blocks.AdaLNZeroBlock", "dit.AdaLNZeroBlock"),
    points=2,
)

# --- 08.4 init_dit, wakeup_order --------------------------------------------------------------------------------------

_MODULATION = "blocks.{}.modulation"
_ZERO = (_MODULATION.format(0), _MODULATION.format(1), "modulation", "head")
_SMALL = ("time_mlp.0", "time_mlp.2", "label_embedding.table")


@cache
def _plain_dit() -> DiT:
    with torch.random.fork_rng([]):
        return DiT(channels=3, size=8, patch=4, dim=64, depth=2, heads=4, classes=100)


def _random_dit(g: Generator) -> DiT:
    """Small, and with every weight random, so that nothing is right by accident."""
    dit = deepcopy(_plain_dit())
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.normal_(std=3, generator=g)
    return dit


def _started(answer: Answer, g: Generator) -> dict[str, nn.Module]:
    """The linear maps and the label table of a network after init_dit, by name."""
    dit = _random_dit(g)
    answer.call("init_dit", dit)
    return {name: m for name, m in dit.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}


def _spread(weight: Tensor) -> tuple[float, float]:
    weight = weight.detach().double()
    return float(weight.std(correction=0)), float(weight.abs().max())


def _xavier(layer: nn.Module) -> float:
    """The standard deviation (Glorot & Bengio 2010, eq. 16)."""
    return math.sqrt(2 / sum(layer.weight.shape))


def _init_biases(answer: Answer, g: Generator) -> None:
    layers = _started(answer, g)
    off = [name for name, layer in layers.items() if getattr(layer, "bias", None) is not None and layer.bias.any()]
    if off:
        rest = f", and {len(off) - 1} more" if len(off) > 1 else ""
        raise Wrong(f"{off[0]}.bias is not 0{rest}")


def _init_xavier(answer: Answer, g: Generator) -> None:
    for name, layer in _started(answer, g).items():
        if name in (*_ZERO, *_SMALL):
            continue
        std, top = _spread(layer.weight)
        due = _xavier(layer)
        sides = " -> ".join(str(n) for n in reversed(layer.weight.shape))
        if std == 0:
            raise Wrong(f"{name}.weight is 0, or one number, everywhere")
        if abs(std / due - 1) > 0.07 or top > 1.0001 * math.sqrt(3) * due:
            raise Wrong(
                f"{name}.weight ({sides}) has standard deviation {std:.3g} and a largest entry of {top:.3g}; "
                f"Xavier-uniform has {due:.3g} and at most {math.sqrt(3) * due:.3g}"
            )


def _init_small(answer: Answer, g: Generator) -> None:
    layers = _started(answer, g)
    for name in _SMALL:
        std, top = _spread(layers[name].weight)
        if abs(std / 0.02 - 1) > 0.07:
            raise Wrong(f"{name}.weight has standard deviation {std:.3g}; 0.02 is due")
        if top < 0.05:
            raise Wrong(f"{name}.weight has standard deviation 0.02 and no entry above {top:.3g}: is it normal?")
    rows = layers[_SMALL[-1]].weight.detach()
    if len(rows.unique(dim=0)) < len(rows):
        raise Wrong("rows of label_embedding.table are equal: those labels could not be told apart")


def _init_zeros(answer: Answer, g: Generator) -> None:
    layers = _started(answer, g)
    for name in _ZERO:
        if layers[name].weight.any():
            zero = (~layers[name].weight.detach().any(dim=1)).sum().item()
            part = f"; {zero} of its {len(layers[name].weight)} rows are" if zero else ""
            raise Wrong(f"{name}.weight is not 0{part}")


def _init_fresh(answer: Answer, g: Generator) -> None:
    """What the zeros are for: no block changes its tokens, and the network says 0."""
    dit = _random_dit(g)
    positions = dit.positions.clone()
    answer.call("init_dit", dit)
    x, c = randn(g, 2, 4, 64).float(), randn(g, 2, 64).float()
    for k, block in enumerate(dit.blocks):
        if not torch.equal(block(x, c), x):
            raise Wrong(f"block {k} of the fresh network changes its tokens: it is to be the identity")
    xt, t = randn(g, 2, 3, 8, 8).float(), torch.rand(2, generator=g)
    if dit(xt, t, label=torch.tensor([3, 9])).any():
        raise Wrong("the fresh network does not say 0 everywhere")
    if not torch.equal(dit.positions, positions):
        raise Wrong("the fixed position embeddings were changed")


def _init_anew(answer: Answer, g: Generator) -> None:
    seen = []
    for noise in (1, 2):
        answer.reseed(noise)
        seen.append(_started(answer, g)["stem"].weight.detach().clone())
    if torch.equal(*seen):
        raise Wrong("two networks start with the same weights: the random numbers must not come from a fixed seed")


_WAKING = (
    "head",
    "final modulation",
    "stem",
    "gates",
    "shifts and scales",
    "attention and MLP",
    "time and label embeddings",
)


def _part_of(name: str) -> str:
    """Which part of a DiT a parameter belongs to; the blocks' modulation is split elsewhere."""
    starts = {"head": "head", "modulation": "final modulation", "stem": "stem", "blocks": "attention and MLP"}
    return starts.get(name.partition(".")[0], "time and label embeddings")


@cache
def _waking() -> dict[str, int]:
    """Train a small fresh DiT for three steps and look when each part first gets a gradient."""
    first: dict[str, int] = {}
    with torch.random.fork_rng([]), torch.enable_grad():
        torch.default_generator.manual_seed(0)
        dit = DiT(channels=2, size=4, patch=2, dim=8, depth=2, heads=2, classes=5).double()
        sgd = torch.optim.SGD(dit.parameters(), lr=0.1)
        xt, t, label = torch.randn(4, 2, 4, 4).double(), torch.rand(4).double(), torch.arange(4)
        for backward in range(4):
            sgd.zero_grad()
            (dit(xt, t, label=label) - torch.randn_like(xt)).square().mean().backward()
            for name, parameter in dit.named_parameters():
                parts = {_part_of(name): parameter.grad}
                if name.startswith("blocks") and "modulation" in name:
                    shift1, scale1, gate1, shift2, scale2, gate2 = parameter.grad.chunk(6)
                    parts = {"gates": torch.cat([gate1, gate2])}
                    parts |= {"shifts and scales": torch.cat([shift1, scale1, shift2, scale2])}
                for part, gradient in parts.items():
                    if gradient.any():
                        first.setdefault(part, backward)
            sgd.step()
    return first


def _order_named(answer: Answer, g: Generator) -> None:
    order = answer.call("wakeup_order")
    if not isinstance(order, dict):
        raise Wrong(f"wakeup_order() returns a dict of names and numbers, yours a {type(order).__name__}")
    missing, extra = [p for p in _WAKING if p not in order], [p for p in order if p not in _WAKING]
    if missing or extra:
        told = f"no {missing[0]!r} in it" if missing else f"{extra[0]!r} is none of the parts"
        raise Wrong(f"the parts are {', '.join(map(repr, _WAKING))}: {told}")
    odd = [part for part, n in order.items() if isinstance(n, bool) or not isinstance(n, int) or n < 0]
    if odd:
        raise Wrong(f"{odd[0]}: {order[odd[0]]!r} is no number of a backward pass, counted 0, 1, 2, ...")


def _order_at(pass_: int) -> Callable[[Answer, Generator], None]:
    """What is said to learn first in this pass, beside what does in a run."""

    def test(answer: Answer, g: Generator) -> None:
        order = answer.call("wakeup_order")
        early = [part for part in _WAKING if order[part] == pass_ and _waking()[part] > pass_]
        late = [part for part in _WAKING if order[part] > pass_ and _waking()[part] == pass_]
        if early:
            raise Wrong(f"in a run the gradient of {_listed(early)} is exactly 0 in backward {pass_}")
        if late:
            raise Wrong(
                f"in a run there is a gradient before the pass that you say for {_listed(late)}",
                expected=f"in backward {pass_}",
            )

    return test


def _listed(words: list[str]) -> str:
    words = [f'"{word}"' for word in words]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _layers(dit: nn.Module, names: tuple[str, ...]) -> list[nn.Module]:
    return [dit.get_submodule(name) for name in names]


def _init_by(
    zero: tuple[str, ...] = _ZERO,
    small: Callable[[Tensor], object] = lambda weight: nn.init.normal_(weight, std=0.02),
    tables: tuple[str, ...] = _SMALL,
    linear: Callable[[Tensor], object] = nn.init.xavier_uniform_,
    biases: bool = True,
    order: str = "linear small zero",
    rows: slice = slice(None),
) -> tuple[Callable, Callable]:
    def init_dit(dit: nn.Module) -> None:
        for step in order.split():
            if step == "linear":
                for module in dit.modules():
                    if isinstance(module, nn.Linear):
                        linear(module.weight)
                        if biases and module.bias is not None:
                            nn.init.zeros_(module.bias)
            elif step == "small":
                for layer in _layers(dit, tables):
                    small(layer.weight)
            else:
                for layer in _layers(dit, zero):
                    nn.init.zeros_(layer.weight.data[rows])
                    nn.init.zeros_(layer.bias)

    return init_dit, wakeup_order


def _equal_rows(weight: Tensor) -> None:
    nn.init.normal_(weight, std=0.02)
    if len(weight) == 101:  # the label table
        weight.data.copy_(weight.data[:1].expand_as(weight))


def _gates_zeroed(dit: nn.Module) -> None:
    init_dit(dit)
    for block in dit.blocks:
        dim = block.modulation.in_features
        for k in (0, 1, 3, 4):
            nn.init.xavier_uniform_(block.modulation.weight.data[k * dim : (k + 1) * dim])


def _order_by(**changed: int) -> tuple[Callable, Callable]:
    names = {name.replace(" ", "_"): name for name in _WAKING}
    return init_dit, lambda: wakeup_order() | {names[key]: n for key, n in changed.items()}


def _init_apply(dit: nn.Module) -> None:
    zero = {id(m) for m in _layers(dit, _ZERO)}

    def start(module: nn.Module) -> None:
        if not isinstance(module, nn.Linear):
            return
        bound = 0.0 if id(module) in zero else (6 / (module.in_features + module.out_features)) ** 0.5
        module.weight.data.uniform_(-bound, bound)
        if module.bias is not None:
            module.bias.data.fill_(0.0)

    dit.apply(start)
    for layer in _layers(dit, _SMALL):
        layer.weight.data.normal_(0, 0.02)


def _init_by_name(dit: nn.Module) -> None:
    for name, p in dit.named_parameters():
        layer = name.rpartition(".")[0]
        with torch.no_grad():
            if name.endswith("bias") or layer == "head" or layer.endswith("modulation"):
                p.zero_()
            elif layer in _SMALL:
                p.copy_(0.02 * torch.randn(p.shape))
            else:
                p.copy_((2 * torch.rand(p.shape) - 1) * math.sqrt(6 / (p.shape[0] + p.shape[1])))


def _order_written() -> dict[str, int]:
    order = {"attention and MLP": 2, "time and label embeddings": 2, "shifts and scales": 2}
    return {"stem": 1, "head": 0, "gates": 1, "final modulation": 1, **order}


def _law(weight: Tensor, before: Tensor) -> str:
    """How a weight was drawn, by its spread."""
    if torch.equal(weight, before):
        return "left alone"
    std, top = _spread(weight)
    if std == 0:
        return "zero" if top == 0 else "constant"
    out, fan = weight.shape
    xavier = math.sqrt(2 / (out + fan))
    laws = {"Xavier-uniform": (xavier, True), "Xavier-normal": (xavier, False), "small": (0.02, False)}
    laws |= {"standard normal": (1.0, False), "torch's default": (1 / math.sqrt(3 * fan), True)}
    for name, (due, uniform) in laws.items():
        if abs(std / due - 1) < 0.07 and (top < 1.8 * due) == uniform:
            return name
    return "other"


def _init_see(answer: Answer, g: Generator) -> object:
    dit = _random_dit(g)
    before = {name: p.detach().clone() for name, p in dit.named_parameters()}
    answer.call("init_dit", dit)
    seen: list[object] = []
    for name, p in dit.named_parameters():
        if p.ndim == 1:
            seen.append(bool(p.any()))
        elif name.startswith("blocks") and "modulation" in name:
            seen += [_law(a, b) for a, b in zip(p.detach().chunk(6), before[name].chunk(6), strict=True)]
        else:
            seen.append(_law(p.detach(), before[name]))
    order = answer.call("wakeup_order")
    different = len(dit.label_embedding.table.weight.detach().unique(dim=0))
    return [seen, different, plain(order) if isinstance(order, dict) else type(order).__name__]


INIT = Exercise(
    id="08.4",
    names=("init_dit", "wakeup_order"),
    references=(init_dit, wakeup_order),
    inputs=lambda g: {},
    universal=False,
    facts=(
        Fact("all biases start at 0", _init_biases, "every nn.Linear that has one: dit.modules() goes through them"),
        Fact(
            "linear maps start Xavier-uniform",
            _init_xavier,
            "nn.init.xavier_uniform_; what should not have it is set afterwards",
        ),
        Fact("embeddings of time and label start small", _init_small, "nn.init.normal_ has a standard deviation"),
        Fact(
            "the modulations and the head start at 0",
            _init_zeros,
            "in which order do you go? What comes last overwrites what came before",
        ),
        Fact(
            "a fresh network is the identity in each block, and says 0", _init_fresh, "that is what the zeros are for"
        ),
        Fact("every network starts with its own random weights", _init_anew, "no seed inside"),
        Fact("wakeup_order names every part and a pass", _order_named, "the docstring has the names"),
        Fact(
            "who learns in backward 0",
            _order_at(0),
            "a gradient is a product along the way back from the loss: whoever stands behind a weight of 0 gets 0",
        ),
        Fact(
            "who learns first in backward 1",
            _order_at(1),
            "the head is no longer 0, and the gates still are: how far does the gradient come?",
        ),
        Fact(
            "who learns first in backward 2",
            _order_at(2),
            "gates and final modulation have moved in step 1: which ways have opened?",
        ),
    ),
    mistakes=(
        Mistake(
            "biases left",
            "You set the weights and leave the biases: all of them are to start at 0.",
            _init_by(biases=False),
        ),
        Mistake(
            "Xavier after the zeros",
            "The zeros come before Xavier, which overwrites them: no block is the identity and the network does not "
            "say 0. First all linear maps, then the exceptions.",
            _init_by(order="zero linear small"),
        ),
        Mistake(
            "Xavier last of all",
            "Xavier comes last and overwrites zeros and the small weights of the time embedding. First all linear "
            "maps, then the exceptions.",
            _init_by(order="small zero linear"),
        ),
        Mistake(
            "head random",
            "The head does not start at 0, so that a fresh network says something random instead of 0.",
            _init_by(zero=_ZERO[:3]),
        ),
        Mistake(
            "final modulation random",
            "You zero the modulation in the blocks; the last one, dit.modulation, before the head, is to start at 0 "
            "too.",
            _init_by(zero=(*_ZERO[:2], "head")),
        ),
        Mistake(
            "blocks random",
            "The modulations of the blocks are not zeroed: their gates are open from the start, so no block is the "
            "identity.",
            _init_by(zero=_ZERO[2:]),
        ),
        Mistake(
            "first block only",
            "Only the first block's modulation is zeroed: go through all of dit.blocks.",
            _init_by(zero=(_ZERO[0], *_ZERO[2:])),
        ),
        Mistake(
            "gates only",
            "In the blocks you zero the rows of the gates alone. That makes the identity, but as published shifts and "
            "scales start at 0 too, so that the branches first read the plain normed tokens.",
            (_gates_zeroed, wakeup_order),
        ),
        Mistake(
            "stem zeroed",
            "The stem starts at 0 too: at first each token then holds its position and nothing of the picture.",
            _init_by(zero=(*_ZERO, "stem")),
        ),
        Mistake(
            "label rows equal",
            "All labels start with the same vector: they get different gradients later, but the network cannot tell "
            "them apart at the start.",
            _init_by(_ZERO, _equal_rows),
        ),
        Mistake(
            "standard normal",
            "The embeddings are normal with standard deviation 1: 0.02 is due, 50 times less.",
            _init_by(_ZERO, nn.init.normal_),
        ),
        Mistake(
            "time forgotten",
            "The label table starts with std 0.02, and the time embedding keeps Xavier: its two linear maps are to be "
            "normal with std 0.02 as well.",
            _init_by(tables=_SMALL[2:]),
        ),
        Mistake(
            "labels forgotten",
            "The label table is left as it came: an nn.Embedding is no nn.Linear, so the loop passes it by.",
            _init_by(tables=_SMALL[:2]),
        ),
        Mistake(
            "Xavier-normal",
            "You draw from a normal distribution (xavier_normal_). The spread is the same; published is "
            "xavier_uniform_.",
            _init_by(linear=nn.init.xavier_normal_),
        ),
        Mistake(
            "torch's default",
            "The linear maps keep the distribution that nn.Linear starts with, uniform up to 1 / sqrt(inputs); Xavier "
            "looks at inputs and outputs.",
            _init_by(linear=lambda weight: nn.init.kaiming_uniform_(weight, a=math.sqrt(5))),
        ),
        Mistake(
            "everything small",
            "All linear maps are normal with std 0.02: that is for the embeddings of time and label alone.",
            _init_by(linear=lambda weight: nn.init.normal_(weight, std=0.02)),
        ),
        Mistake(
            "order: all at once",
            "You say that everything learns from backward 0 on. The head is 0, and what stands before it gets its "
            "gradient multiplied by the head: exactly 0.",
            _order_by(
                final_modulation=0,
                stem=0,
                gates=0,
                shifts_and_scales=0,
                attention_and_MLP=0,
                time_and_label_embeddings=0,
            ),
        ),
        Mistake(
            "order: gates first",
            "You have the gates learn in backward 0. So they would, if the head were not 0 as well: their gradient "
            "comes through it.",
            _order_by(gates=0),
        ),
        Mistake(
            "order: final modulation with the head",
            "The final modulation stands before the head: its gradient is multiplied by the head's weights, which are "
            "0 in backward 0.",
            _order_by(final_modulation=0),
        ),
        Mistake(
            "order: stem first",
            "The stem is not 0 itself, and that does not help it: its gradient comes through the head, which is.",
            _order_by(stem=0),
        ),
        Mistake(
            "order: stem last",
            "The stem need not wait for the blocks: closed blocks are the identity, so the gradient goes past their "
            "branches to the stem as soon as the head is not 0.",
            _order_by(stem=2),
        ),
        Mistake(
            "order: whole modulation with the gates",
            "Shifts and scales act inside the branches: their gradient is multiplied by the gates, which are still 0 "
            "in backward 1.",
            _order_by(shifts_and_scales=1),
        ),
        Mistake(
            "order: attention and MLP with the gates",
            "Attention and MLP get their gradient multiplied by the gates. In backward 1 these learn, and are still 0.",
            _order_by(attention_and_MLP=1),
        ),
        Mistake(
            "order: embeddings in backward 1",
            "Time and label act through the modulations alone, whose weights are all still 0 in backward 1: no "
            "gradient comes through them.",
            _order_by(time_and_label_embeddings=1),
        ),
        Mistake(
            "order: embeddings in backward 3",
            "Time and label embeddings need not wait for shifts and scales: in step 1 the final modulation and the "
            "gates have moved, and in backward 2 the gradient comes through them.",
            _order_by(time_and_label_embeddings=3),
        ),
        Mistake(
            "order: counted from 1",
            "You count backward passes from 1; here the first is backward 0.",
            (init_dit, lambda: {part: n + 1 for part, n in wakeup_order().items()}),
        ),
    ),
    alternatives=((_init_apply, _order_written), (_init_by_name, wakeup_order)),
    hints=(
        "Three loops, from the general to the special: all linear maps, the three small embeddings, the zeros. For the "
        "order: go back from the loss and stop at every weight that is 0.",
        "for m in dit.modules(): xavier_uniform_ and zeros_ for the bias; normal_(std=0.02) for time_mlp[0], "
        "time_mlp[2], label_embedding.table; zeros_ for block.modulation, dit.modulation, dit.head. Order: head 0; "
        "final modulation, stem, gates 1; the others 2.",
    ),
    probe=_init_see,
    hides=("dit.init_weights",),
    points=2,
)

# --- 08.5 count_params ------------------------------------------------------------------------------------------------

_PUBLISHED = {"S": (384, 12, 33), "B": (768, 12, 130), "L": (1024, 24, 458), "XL": (1152, 28, 675)}


def _size(g: Generator) -> dict[str, int]:
    sides = dict(dim=8 * integer(g, 1, 6), depth=integer(g, 1, 5), patch=integer(g, 2, 4))
    return sides | dict(channels=integer(g, 1, 5), classes=integer(g, 2, 30))


def _counted(dim: int, depth: int, patch: int, channels: int, classes: int) -> dict[str, int]:
    """The same network built of torch's own layers, and its weights counted part by part."""
    with torch.device("meta"):
        built = {
            "patches": [nn.Conv2d(channels, dim, patch, patch)],
            "time": [nn.Linear(256, dim), nn.Linear(dim, dim)],
            "labels": [nn.Embedding(classes + 1, dim)],
            "attention": [nn.MultiheadAttention(dim, 1) for _ in range(depth)],
            "MLP": [nn.Sequential(nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)) for _ in range(depth)],
            "modulation": [nn.Linear(dim, 6 * dim) for _ in range(depth)],
            "end": [nn.Linear(dim, 2 * dim), nn.Linear(dim, patch * patch * channels * 2)],
        }
    return {name: sum(p.numel() for layer in layers for p in layer.parameters()) for name, layers in built.items()}


def _whole(got: object) -> int:
    if not isinstance(got, int) or isinstance(got, bool):
        raise Wrong(f"the number is an int; yours is {got!r}, of type {type(got).__name__}")
    return got


def _count_small(answer: Answer, g: Generator) -> None:
    """The parts tell themselves apart by how they grow."""
    for _ in range(2):
        args = _size(g)
        got, due = _whole(answer(*args.values())), _counted(**args)
        if got != sum(due.values()):
            size = ", ".join(f"{name} {n}" for name, n in args.items())
            raise Wrong(
                f"{size}: you count {got:,}, {abs(got - sum(due.values())):,} too {_more(got, sum(due.values()))}",
                expected=f"{sum(due.values()):,} = " + " + ".join(f"{n:,} ({name})" for name, n in due.items()),
            )


def _more(got: int, due: int) -> str:
    return "many" if got > due else "few"


def _count_growth(answer: Answer, g: Generator) -> None:
    """What one more block, one more class and one more channel cost, one at a time."""
    args = _size(g)
    base, built = _whole(answer(*args.values())), sum(_counted(**args).values())
    for name, what in (("depth", "block"), ("classes", "class"), ("channels", "channel")):
        more = args | {name: args[name] + 1}
        got, due = _whole(answer(*more.values())) - base, sum(_counted(**more).values()) - built
        if got != due:
            raise Wrong(
                f"dim {args['dim']}, patch {args['patch']}: one more {what} costs {got:,} in your count, "
                f"{abs(got - due):,} too {_more(got, due)}",
                expected=f"{due:,}",
            )


def _count_none(answer: Answer, g: Generator) -> None:
    """No block at all: what is left stands before and behind them."""
    args = _size(g) | dict(depth=0)
    got, due = _whole(answer(*args.values())), sum(_counted(**args).values())
    if got != due:
        size = ", ".join(f"{name} {n}" for name, n in args.items())
        raise Wrong(
            f"without any block ({size}) you count {got:,}, {abs(got - due):,} too {_more(got, due)}: look at what "
            "stands before the blocks and behind them",
            expected=f"{due:,}",
        )


def _count_published(answer: Answer, g: Generator) -> None:
    for name, (dim, depth, millions) in _PUBLISHED.items():
        got = _whole(answer(dim, depth, 2, 4, 1000))
        if abs((got + 256 * dim) / 1e6 - millions) > 0.6:
            raise Wrong(
                f"DiT-{name}/2 (dim {dim}, depth {depth}) is published with {millions} million parameters, among them "
                f"256 fixed vectors of positions; yours with these are {(got + 256 * dim) / 1e6:.1f} million"
            )
    got = answer(1152, 28, 2, 4, 1000)
    if got != 675_129_632 - 256 * 1152:
        raise Wrong(
            f"the published weights of DiT-XL/2 are 675,129,632 numbers; without the 256 x 1152 of fixed positions "
            f"that is 674,834,720, and yours is off by {got - 674_834_720:+,}"
        )


def _count_see(answer: Answer, g: Generator) -> list[float]:
    return [float(answer(*_size(g).values())) for _ in range(4)]


def _count_by(
    attention: int = 4,
    mlp: int = 8,
    six: int = 6,
    biases: bool = True,
    extra: Callable[[int, int, int, int, int], int] = lambda dim, depth, patch, channels, classes: 0,
) -> tuple[Callable]:
    def wrong(dim: int, depth: int, patch: int, channels: int, classes: int) -> int:
        rest = (patch**2 * channels + 256 + dim + classes + 1) * dim + 2 * dim * dim + 2 * patch**2 * channels * dim
        block = (attention + mlp + six) * dim**2
        if biases:
            rest += dim + 2 * dim + 2 * dim + 2 * patch**2 * channels
            block += (attention + (5 if mlp == 8 else 4) + six) * dim
        return rest + depth * block + extra(dim, depth, patch, channels, classes)

    return (wrong,)


def _count_layers(dim: int, depth: int, patch: int, channels: int, classes: int) -> int:
    def linear(i: int, o: int) -> int:
        return i * o + o

    total = linear(patch * patch * channels, dim) + linear(256, dim) + linear(dim, dim) + dim * (classes + 1)
    for _ in range(depth):
        total += linear(dim, 3 * dim) + linear(dim, dim)
        total += linear(dim, 4 * dim) + linear(4 * dim, dim)
        total += linear(dim, 6 * dim)
    return total + linear(dim, 2 * dim) + linear(dim, patch * patch * channels * 2)


def _count_polynomial(dim: int, depth: int, patch: int, channels: int, classes: int) -> int:
    d, folded = dim, patch**2 * channels
    return depth * (18 * d * d + 15 * d) + 3 * d * d + (3 * folded + 262 + classes) * d + 2 * folded


def _count_built(dim: int, depth: int, patch: int, channels: int, classes: int) -> int:
    return sum(_counted(dim, depth, patch, channels, classes).values())


COUNT = Exercise(
    id="08.5",
    names=("count_params",),
    references=(count_params,),
    inputs=lambda g: {},
    universal=False,
    probe=_count_see,
    facts=(
        Fact("without blocks", _count_none, "patches, time, labels; then two vectors from one, and the head"),
        Fact(
            "one more block, class, channel",
            _count_growth,
            "in a block: four maps dim to dim, two between dim and 4 dim, one from dim to 6 dim, all with biases",
        ),
        Fact(
            "as many as torch counts in small networks", _count_small, "a linear map from i to o has (i + 1) o numbers"
        ),
        Fact(
            "the four published sizes, and DiT-XL/2 exactly",
            _count_published,
            "patch 2, 4 channels, 1000 classes; fixed positions are not trained",
        ),
    ),
    mistakes=(
        Mistake(
            "modulation forgotten",
            "The six vectors of each block are missing: 6 dim^2 of a block's 18 dim^2, one third of the network.",
            _count_by(six=0),
        ),
        Mistake(
            "no gates",
            "Each block lacks two vectors of its modulation, 2 (dim + 1) dim numbers: with the gates it makes six.",
            _count_by(six=4),
        ),
        Mistake("biases forgotten", "The biases are missing: every linear map has one.", _count_by(biases=False)),
        Mistake(
            "no biases of queries, keys, values",
            "Queries, keys and values have biases here, 3 dim per block; they are missing. (condiff_ref leaves them "
            "out, the published network has them.)",
            _count_by(extra=lambda dim, depth, patch, channels, classes: -3 * dim * depth),
        ),
        Mistake(
            "fixed positions counted",
            "The position embeddings are counted. They are computed once and never trained.",
            _count_by(extra=lambda dim, depth, patch, channels, classes: 256 * dim),
        ),
        Mistake(
            "row of no label forgotten",
            "dim numbers are missing, once: the table of labels has a row for no label too, classes + 1 in all (or you "
            "have left out the bias of one map, which is as many).",
            _count_by(extra=lambda dim, depth, patch, channels, classes: -dim),
        ),
        Mistake(
            "final modulation forgotten",
            "The last shift and scale, before the head, are missing: a linear map from dim to 2 dim.",
            _count_by(extra=lambda dim, depth, patch, channels, classes: -(dim + 1) * 2 * dim),
        ),
        Mistake(
            "head without variance",
            "The head makes `channels` channels in your count. It makes twice as many: noise and variance.",
            _count_by(extra=lambda dim, depth, patch, channels, classes: -(dim + 1) * patch**2 * channels),
        ),
        Mistake(
            "time: one map",
            "The time embedding is two linear maps, 256 to dim and dim to dim; the second is missing.",
            _count_by(extra=lambda dim, depth, patch, channels, classes: -(dim + 1) * dim),
        ),
        Mistake(
            "time features of width dim",
            "The sines and cosines of the time are 256 numbers whatever dim is; you count dim of them.",
            _count_by(extra=lambda dim, depth, patch, channels, classes: (dim - 256) * dim),
        ),
        Mistake(
            "time features of width dim, and one map",
            "The time embedding is 256 to dim, then dim to dim: you count one map, and none from 256.",
            _count_by(extra=lambda dim, depth, patch, channels, classes: -257 * dim),
        ),
        Mistake(
            "layer norms counted",
            "You count a weight and a bias for each layer norm. They have none: scale and shift come from the "
            "modulation.",
            _count_by(extra=lambda dim, depth, patch, channels, classes: (4 * depth + 2) * dim),
        ),
        Mistake(
            "MLP one way",
            "The MLP is counted one way: dim to 4 dim and back to dim are two maps.",
            _count_by(mlp=4),
        ),
        Mistake(
            "one map per block missing",
            "Each block lacks (dim + 1) dim numbers, one map from dim to dim: attention has four, for queries, keys, "
            "values and output, and the modulation makes six vectors.",
            _count_by(attention=3),
        ),
        Mistake(
            "patch for patch^2",
            "A patch has patch^2 pixels; you count patch of them, in the stem and in the head.",
            _count_by(
                extra=lambda dim, depth, patch, channels, classes: (
                    (patch - patch**2) * channels * dim + (dim + 1) * 2 * (patch - patch**2) * channels
                )
            ),
        ),
    ),
    alternatives=((_count_layers,), (_count_polynomial,), (_count_built,)),
    hints=(
        "A linear map from i to o has (i + 1) o numbers. Write one line for what stands before the blocks, one for a "
        "block, one for what stands behind.",
        "(patch^2 channels + 1) dim + 257 dim + (dim + 1) dim + (classes + 1) dim + depth (18 dim^2 + 15 dim) + (dim "
        "+ 1) 2 dim + (dim + 1) 2 patch^2 channels.",
    ),
    hides=("cost.dit_cost",),
)

# --- 08.6 LabelEmbedder -----------------------------------------------------------------------------------------------


def _embedder(answer: Answer, classes: int, dim: int, p: float, training: bool) -> nn.Module:
    """A LabelEmbedder whose row k is k + 1 everywhere, so that rows are told apart, from one another and from 0."""
    embedder = answer(classes, dim, p)
    table = getattr(embedder, "table", None)
    if not isinstance(embedder, nn.Module) or not isinstance(table, nn.Embedding):
        raise Wrong("LabelEmbedder(classes, dim, p) is an nn.Module with an nn.Embedding `table`; yours has none")
    with torch.no_grad():
        table.weight.copy_(torch.arange(1, len(table.weight) + 1)[:, None].expand_as(table.weight))
    return embedder.train(training)


def _looked_up(
    answer: Answer, embedder: nn.Module, y: Tensor, gen: Generator | None, force: Tensor | None = None
) -> Tensor:
    """Which row each label got."""
    try:
        out = answer.ask(embedder, "__call__", y.clone(), gen, None if force is None else force.clone())
    except Failed as error:
        if isinstance(error.__cause__, IndexError):
            rows = len(embedder.table.weight)
            raise Wrong(
                f"{error}\n  the table has {rows} rows, 0 to {rows - 1}, the last of them for no label"
            ) from None
        raise
    dim = embedder.table.embedding_dim
    odd = oddity(out, torch.zeros(len(y), dim))
    if odd:
        raise Wrong(f"{len(y)} labels, dim {dim}: {odd}")
    if not close(plain(out), plain(out[:, :1].expand_as(out))) or not close(plain(out), plain(out.round())):
        raise Wrong("what comes out is not a row of the table for each label")
    return out[:, 0].detach().round().long() - 1


def _sizes(g: Generator) -> tuple[int, int]:
    return integer(g, 6, 12), integer(g, 2, 5)


def _rows(answer: Answer, g: Generator) -> None:
    classes, dim = _sizes(g)
    for p in (0.1, 0.0):
        table = getattr(answer(classes, dim, p), "table", None)
        if not isinstance(table, nn.Embedding):
            raise Wrong(f"the part `table` must be an nn.Embedding, and is {type(table).__name__}")
        if tuple(table.weight.shape) != (classes + 1, dim):
            raise Wrong(
                f"{classes} classes, dim {dim}, p = {p:g}: the table has shape {tuple(table.weight.shape)}; "
                f"no label has the index {classes}"
            )


def _eval_mode(answer: Answer, g: Generator) -> None:
    classes, dim = _sizes(g)
    for p, most in ((0.3, classes), (1.0, classes), (0.3, classes + 1)):
        y = torch.randint(0, most, (200,), generator=g)
        got = _looked_up(answer, _embedder(answer, classes, dim, p, False), y, _seeded(g))
        changed = (got != y).nonzero().flatten().tolist()
        if changed:
            first = f"label {int(y[changed[0]])} got row {int(got[changed[0]])}"
            raise Wrong(
                f"in eval mode, p = {p:g}: {len(changed)} of 200 labels got another row of the table ({first}); there "
                f"none is dropped, and label k has row k, no label the last, {classes}"
            )


def _seeded(g: Generator) -> Generator:
    return Generator().manual_seed(integer(g, 0, 10**6))


def _training_mode(answer: Answer, g: Generator) -> None:
    classes, dim = _sizes(g)
    n = 4000
    y = torch.randint(0, classes, (n,), generator=g)
    for p in (0.0, 0.2, 1.0):
        got = _looked_up(answer, _embedder(answer, classes, dim, p, True), y, _seeded(g))
        other = ((got != y) & (got != classes)).nonzero().flatten().tolist()
        if other:
            raise Wrong(
                f"{classes} classes, in training: label {int(y[other[0]])} became {int(got[other[0]])}; a label stays, "
                f"or becomes {classes}, which stands for none"
            )
        share = float((got == classes).double().mean())
        if abs(share - p) > (0.04 if 0 < p < 1 else 0):
            raise Wrong(f"in training, p = {p:g}: of {n} labels {100 * share:.1f} % were dropped")


def _each_alone(answer: Answer, g: Generator) -> None:
    """Over many batches each place is dropped now and then, and a batch is neither dropped nor kept as a whole."""
    classes, dim = _sizes(g)
    embedder, gen, y = _embedder(answer, classes, dim, 0.5, True), _seeded(g), torch.arange(6) % classes
    dropped = torch.stack([_looked_up(answer, embedder, y, gen) == classes for _ in range(60)])
    whole = int((dropped.all(1) | ~dropped.any(1)).sum())
    if whole > 30:
        raise Wrong(f"p = 0.5, 60 batches of 6: {whole} batches were dropped or kept as a whole")
    fixed = [k for k in range(6) if dropped[:, k].all() or not dropped[:, k].any()]
    if fixed:
        what = "dropped" if dropped[0, fixed[0]] else "kept"
        raise Wrong(f"p = 0.5, 60 batches of 6 with one generator: label {fixed[0]} of the batch was {what} in all 60")


def _from_gen(answer: Answer, g: Generator) -> None:
    classes, dim = _sizes(g)
    embedder, y, seed = _embedder(answer, classes, dim, 0.5, True), torch.arange(60) % classes, integer(g, 0, 10**6)
    seen = []
    for noise in (1, 2):
        answer.reseed(noise)
        seen.append(_looked_up(answer, embedder, y, Generator().manual_seed(seed)))
    if not torch.equal(*seen):
        raise Wrong("two calls with generators in the same state drop other labels: draw with gen")
    answer.reseed(1)
    if torch.equal(seen[0], _looked_up(answer, embedder, y, Generator().manual_seed(seed + 1))):
        raise Wrong("generators in two states drop the same labels: draw with gen")
    for noise in (3, 4):
        answer.reseed(noise)
        seen.append(_looked_up(answer, embedder, y, None))
    if torch.equal(seen[2], seen[3]):
        raise Wrong("without a generator the draw must come from torch's own random state; yours is always the same")


def _forced(answer: Answer, g: Generator) -> None:
    classes, dim = _sizes(g)
    y = torch.randint(0, classes, (40,), generator=g)
    force = torch.rand(40, generator=g) < 0.5
    due = torch.where(force, classes, y)
    for training in (False, True):
        for p in (0.0, 0.5, 1.0):
            got = _looked_up(answer, _embedder(answer, classes, dim, p, training), y, _seeded(g), force)
            wrong = got != due
            if wrong.any():
                kept, lost = int((wrong & force).sum()), int((wrong & ~force).sum())
                mode = "training" if training else "eval"
                raise Wrong(
                    f"in {mode} mode, p = {p:g}: of {int(force.sum())} labels that force tells to drop, {kept} were "
                    f"not dropped; of the {int((~force).sum())} others, {lost} were: force decides alone"
                )


def _labels_kept(answer: Answer, g: Generator) -> None:
    classes, dim = _sizes(g)
    y, force = torch.arange(20) % classes, torch.arange(20) < 10
    for training, forced in ((True, None), (False, force)):
        given, told = y.clone(), None if forced is None else forced.clone()
        answer.ask(_embedder(answer, classes, dim, 1.0, training), "__call__", given, _seeded(g), told)
        if not torch.equal(given, y) or (forced is not None and not torch.equal(told, forced)):
            raise Wrong("you changed y (or force) in place: the caller still needs it")


def _rows_learn(answer: Answer, g: Generator) -> None:
    classes, dim = _sizes(g)
    embedder, y = _embedder(answer, classes, dim, 0.5, True), torch.tensor([0, 1, 2, 3])
    out = answer.ask(embedder, "__call__", y, None, torch.tensor([True, False, False, True]))
    if not out.requires_grad:
        raise Wrong("no gradient reaches the table: is there a detach or a no_grad?")
    out.sum().backward()
    got = embedder.table.weight.grad[:, 0].tolist()
    due = [0.0, 1.0, 1.0, 0.0] + [0.0] * (classes - 4) + [2.0]
    if got != due:
        raise Wrong(
            f"labels 0, 1, 2, 3, of which 0 and 3 are dropped: rows {[k for k, v in enumerate(got) if v]} of the table "
            f"get a gradient; that of no label is row {classes}",
            expected=f"rows 1 and 2, and {classes} twice",
        )


def _embedder_see(answer: Answer, g: Generator) -> object:
    seen: list[object] = [list(answer(7, 3, p).table.weight.shape) for p in (0.0, 0.25)]
    y = torch.randint(0, 7, (2000,), generator=g)
    force = torch.rand(2000, generator=g) < 0.35
    for training in (True, False):
        for p in (0.25, 0.0):
            for given in (None, force):
                try:
                    seen.append(_fate(answer, _embedder(answer, 7, 3, p, training), y, given))
                except Failed as error:
                    seen.append(type(error.__cause__).__name__)
                except Wrong as error:
                    seen.append(str(error)[:20])
    try:
        seen += _draws(answer, y, force)
    except (Failed, Wrong) as error:
        seen.append(type(error).__name__)
    return seen


def _draws(answer: Answer, y: Tensor, force: Tensor) -> list[object]:
    """How many of 20 small batches lose a label, whether the generator decides, whether y is left alone."""
    embedder, small = _embedder(answer, 7, 3, 0.5, True), torch.arange(7)
    drops = [(_looked_up(answer, embedder, small, Generator().manual_seed(k)) != small).any().item() for k in range(20)]
    seen = []
    for noise in (1, 2):
        answer.reseed(noise)
        seen.append(_looked_up(answer, embedder, y, Generator().manual_seed(0)))
    given = y.clone()
    answer.ask(embedder, "__call__", given, None, force)
    return [round(sum(drops) / 10), torch.equal(*seen), torch.equal(given, y)]


def _fate(answer: Answer, embedder: nn.Module, y: Tensor, force: Tensor | None) -> list[str]:
    """What became of the labels, without regard to which random numbers were drawn."""
    out = answer.ask(embedder, "__call__", y.clone(), Generator().manual_seed(5), force)
    got = out[:, 0].detach().round().long() - 1
    changed = got != y
    groups = (torch.ones_like(changed),) if force is None else (force, ~force)
    shares = [round(20 * float(changed[group].double().mean())) / 20 for group in groups]
    became = sorted(got[changed].unique().tolist())
    return [f"{share:g}" for share in shares] + [str(became[:2])]


def _embedder_by(
    rows: Callable[[int, float], int] = lambda classes, p: classes + 1,
    null: Callable[[int], int] = lambda classes: classes,
    draw: Callable[[Tensor, float, Generator | None], Tensor] = lambda y, p, gen: (
        torch.rand(y.shape, generator=gen) < p
    ),
    decide: Callable[[bool, Callable[[], Tensor], Tensor | None, Tensor], Tensor] = lambda training, drop, force, y: (
        (drop() if training else torch.zeros_like(y, dtype=torch.bool)) if force is None else force
    ),
    put: Callable[[nn.Embedding, Tensor, Tensor, int], Tensor] = lambda table, y, dropped, null: table(
        torch.where(dropped, null, y)
    ),
) -> tuple[type]:
    class Wrong(nn.Module):
        def __init__(self, classes: int, dim: int, p: float):
            super().__init__()
            self.table, self.null, self.p = nn.Embedding(rows(classes, p), dim), null(classes), p

        def forward(self, y: Tensor, gen: Generator | None = None, force: Tensor | None = None) -> Tensor:
            dropped = decide(self.training, lambda: draw(y, self.p, gen), force, y)
            return put(self.table, y, dropped, self.null)

    return (Wrong,)


def _none(y: Tensor) -> Tensor:
    return torch.zeros_like(y, dtype=torch.bool)


def _into_y(table: nn.Embedding, y: Tensor, dropped: Tensor, null: int) -> Tensor:
    y[dropped] = null
    return table(y)


class _LabelsBernoulli(nn.Module):
    """Draws floats only where they are needed, writes into a copy."""

    def __init__(self, classes: int, dim: int, p: float):
        super().__init__()
        self.table = nn.Embedding(num_embeddings=1 + classes, embedding_dim=dim)
        self.classes, self.rate = classes, float(p)

    def forward(self, y: Tensor, gen: Generator | None = None, force: Tensor | None = None) -> Tensor:
        labels = y.clone()
        if force is not None:
            labels[force.bool()] = self.classes
        elif self.training and self.rate > 0:
            coins = torch.full((len(y),), self.rate).bernoulli(generator=gen).bool()
            labels[coins.to(y.device)] = self.classes
        return F.embedding(labels, self.table.weight)


class _LabelsMixed(nn.Module):
    """Looks up both vectors and takes one of them."""

    def __init__(self, classes: int, dim: int, p: float):
        super().__init__()
        self.table, self.p = nn.Embedding(classes + 1, dim), p

    def forward(self, y: Tensor, gen: Generator | None = None, force: Tensor | None = None) -> Tensor:
        drop = force
        if drop is None:
            keep = torch.rand(len(y), generator=gen) >= self.p
            drop = ~keep & torch.tensor(self.training)
        nothing = self.table.weight[-1]
        return torch.where(drop.to(y.device)[:, None], nothing, self.table.weight[y])


EMBEDDER = Exercise(
    id="08.6",
    names=("LabelEmbedder",),
    references=(LabelEmbedder,),
    inputs=lambda g: {},
    universal=False,
    kind="module",
    facts=(
        Fact(
            "the table has a row for no label, whatever p is", _rows, "who samples with guidance needs it even if p = 0"
        ),
        Fact("in eval mode no label is dropped", _eval_mode, "self.training tells the mode"),
        Fact("in training a share p of the labels becomes the null label", _training_mode, "torch.rand(...) < p"),
        Fact("each label is dropped on its own", _each_alone, "as many random numbers as labels"),
        Fact("force decides alone, in both modes", _forced, "where force is given, p and the mode do not matter"),
        Fact("draws with the generator", _from_gen, "torch.rand(..., generator=gen); None is fine there"),
        Fact("leaves its arguments as they were", _labels_kept, "torch.where makes a new tensor; y[...] = does not"),
        Fact("the rows that are used learn, that of no label too", _rows_learn, "look up in the table, after dropping"),
    ),
    mistakes=(
        Mistake(
            "no row of no label at p = 0",
            "With p = 0 the table has no row for no label. A published implementation does that, and whoever turns "
            "guidance on later meets an IndexError: the row costs dim numbers, keep it.",
            _embedder_by(rows=lambda classes, p: classes + (p > 0)),
        ),
        Mistake(
            "no row of no label",
            "The table has `classes` rows: the index of no label, `classes`, is out of range.",
            _embedder_by(rows=lambda classes, p: classes),
        ),
        Mistake(
            "drops in eval mode",
            "Labels are dropped in eval mode too: a share p of your samples would be of any class.",
            _embedder_by(decide=lambda training, drop, force, y: drop() if force is None else force),
        ),
        Mistake(
            "force ignored",
            "force has no effect: guidance would ask for predictions without a label and get predictions with one.",
            _embedder_by(decide=lambda training, drop, force, y: drop() if training else _none(y)),
        ),
        Mistake(
            "force in training only",
            "force is looked at in training mode only: it is needed when sampling, in eval mode.",
            _embedder_by(
                decide=lambda training, drop, force, y: (drop() if force is None else force) if training else _none(y)
            ),
        ),
        Mistake(
            "force in eval mode only",
            "In training mode force is ignored and labels are dropped by chance: where it is given it decides alone.",
            _embedder_by(
                decide=lambda training, drop, force, y: drop() if training else _none(y) if force is None else force
            ),
        ),
        Mistake(
            "force and chance",
            "In training mode labels are dropped by chance as well as by force: where force is given it decides alone.",
            _embedder_by(
                decide=lambda training, drop, force, y: (
                    (drop() if training else _none(y)) | (_none(y) if force is None else force)
                )
            ),
        ),
        Mistake(
            "force the wrong way round",
            "force is True where a label must be dropped; you keep these and drop the others.",
            _embedder_by(
                decide=lambda training, drop, force, y: (drop() if training else _none(y)) if force is None else ~force
            ),
        ),
        Mistake(
            "dropped to 0",
            "Dropped labels become 0, which is a class of its own: the network learns class 0 from pictures of all "
            "classes, and never what no label means.",
            _embedder_by(null=lambda classes: 0),
        ),
        Mistake(
            "dropped to the last class",
            "Dropped labels become classes - 1, the last class. No label has the index `classes`.",
            _embedder_by(null=lambda classes: classes - 1),
        ),
        Mistake(
            "zeros for no label",
            "Dropped labels get a vector of zeros. No label has a row of its own in the table, which is learned.",
            _embedder_by(put=lambda table, y, dropped, null: table(y) * ~dropped[:, None]),
        ),
        Mistake(
            "in place",
            "You write into y: the caller's labels are lost, and the next epoch finds more and more of them dropped.",
            _embedder_by(put=_into_y),
        ),
        Mistake(
            "one coin for all",
            "One random number decides for the whole batch: draw one per label.",
            _embedder_by(draw=lambda y, p, gen: (torch.rand((), generator=gen) < p).expand(y.shape)),
        ),
        Mistake(
            "p the wrong way round",
            "Labels are kept with probability p and dropped with 1 - p: the comparison is reversed.",
            _embedder_by(draw=lambda y, p, gen: torch.rand(y.shape, generator=gen) >= p),
        ),
        Mistake(
            "never drops",
            "No label is ever dropped in training, whatever p is: the row of no label would never learn.",
            _embedder_by(draw=lambda y, p, gen: _none(y)),
        ),
        Mistake(
            "randn for rand",
            "You compare a normal number with p: randn, where rand, uniform in [0, 1), is due. More than half of the "
            "labels are dropped whatever p is.",
            _embedder_by(draw=lambda y, p, gen: torch.randn(y.shape, generator=gen) < p),
        ),
        Mistake(
            "generator unused",
            "gen is not used: the draw comes from torch's global state, and nobody can repeat a training run.",
            _embedder_by(draw=lambda y, p, gen: torch.rand(y.shape) < p),
        ),
    ),
    alternatives=((_LabelsBernoulli,), (_LabelsMixed,)),
    hints=(
        "First find the mask of labels to drop: force if it is given, else chance in training, else nothing. Then "
        "replace, then look up.",
        "dropped = force, or torch.rand(y.shape, generator=gen) < p in training, or all False; "
        "table(torch.where(dropped, classes, y)), with nn.Embedding(classes + 1, dim).",
    ),
    probe=_embedder_see,
    hides=("train.drop", "layers.LabelEmbedding"),
)

# --- 08.7 dit_cfg -----------------------------------------------------------------------------------------------------


def _cfg_inputs(g: Generator) -> dict:
    channels = 5  # more than 3: the published code guides 3 of them
    scale = 1.5 + 3 * float(torch.rand((), generator=g))
    return {"dit_cfg": dict(out=randn(g, 6, 2 * channels, 2, 5), channels=channels, scale=scale)}


def _noise(got: Tensor, out: Tensor, channels: int) -> Tensor:
    """The noise in a result of the right shape."""
    odd = oddity(got, out)
    if odd:
        raise Wrong(f"out has shape {tuple(out.shape)}: {odd}")
    return got[:, :channels]


def _shares(got: Tensor, eps_c: Tensor, eps_u: Tensor) -> str:
    """What `got` is made of: "2.5 eps_c - 1.5 eps_u"; "something else" where it is no sum of the two."""
    design = torch.stack([eps_c.flatten(), eps_u.flatten()], dim=1)
    c, u = torch.linalg.lstsq(design, got.detach().double().flatten()[:, None]).solution[:, 0].tolist()
    if not close(plain(got.double()), plain(c * eps_c + u * eps_u), rtol=1e-4, atol=1e-5):
        return "something else than a sum of eps_c and eps_u"
    terms = [f"{share:.3g} {name}" for share, name in ((c, "eps_c"), (u, "eps_u")) if abs(share) > 1e-6]
    terms = [term.removeprefix("1 ") for term in terms]
    return " + ".join(terms).replace("+ -", "- ") or "0"


def _cfg_ends(answer: Answer, g: Generator) -> None:
    args = _cfg_inputs(g)["dit_cfg"]
    out, channels = args["out"], args["channels"]
    eps_c, eps_u = out[:3, :channels], out[3:, :channels]
    for scale, due, name in ((1.0, eps_c, "eps_c, the conditional noise"), (0.0, eps_u, "eps_u, the unconditional")):
        got = _noise(answer(out.clone(), channels, scale), out, channels)[:3]
        off = [k for k in range(channels) if not close(plain(got[:, k]), due[:, k], rtol=1e-5, atol=1e-8)]
        if off:
            k = off[0]
            where = f"channel {k} of " if len(off) < channels else ""
            made = _shares(got[:, k], eps_c[:, k], eps_u[:, k])
            raise Wrong(
                f"scale {scale:g}, {channels} channels: {where}the first half's noise is {made}; it must be {name}"
            )


def _cfg_by_hand(answer: Answer, g: Generator) -> None:
    """eps_c = 3, eps_u = 1: a scale of 2.5 goes 2.5 times the way from 1 to 3, to 6."""
    channels = integer(g, 4, 6)
    out = torch.zeros(2, 2 * channels, 1, 1).double()
    out[0, :channels], out[1, :channels], out[0, channels:], out[1, channels:] = 3, 1, 10, 20
    for scale, due in ((2.5, 6.0), (0.5, 2.0), (4.0, 9.0)):
        got = _noise(answer(out.clone(), channels, scale), out, channels)
        off = [k for k in range(channels) if not math.isclose(float(got[0, k]), due, rel_tol=1e-6)]
        if off:
            where = "" if len(off) == channels else f" in channel {off[0]} of {channels}"
            raise Wrong(
                f"eps_c = 3 and eps_u = 1 everywhere, scale {scale:g}: the guided noise is "
                f"{float(got[0, off[0]]):.4g}{where}",
                expected=f"{due:g}",
            )


def _cfg_both(answer: Answer, g: Generator) -> None:
    args = _cfg_inputs(g)["dit_cfg"]
    got = _noise(answer(args["out"].clone(), args["channels"], args["scale"]), args["out"], args["channels"])
    need(got[3:], got[:3], "both halves must hold the same guided noise, as both are steps of the same x_t")


def _cfg_variance(answer: Answer, g: Generator) -> None:
    args = _cfg_inputs(g)["dit_cfg"]
    out, channels = args["out"], args["channels"]
    got = answer(out.clone(), channels, args["scale"])
    _noise(got, out, channels)
    for half, rows in (("first", slice(0, 3)), ("second", slice(3, 6))):
        message = f"the variances of the {half} half must stay as they were"
        need(got[rows, channels:], out[rows, channels:], message)


def _cfg_pairs(answer: Answer, g: Generator) -> None:
    """Example i of the first half is guided against example i of the second, and nothing else."""
    args = _cfg_inputs(g)["dit_cfg"]
    out, channels, scale = args.values()
    before = _noise(answer(out.clone(), channels, scale), out, channels)
    i = integer(g, 0, 2)
    for row, half in ((i, "first"), (3 + i, "second")):
        other = out.clone()
        other[row, :channels] += 1
        moved = (_noise(answer(other, channels, scale), out, channels) - before).detach().abs().flatten(1).amax(
            1
        ) > 1e-9
        if moved.nonzero().flatten().tolist() != [i, 3 + i]:
            raise Wrong(
                f"with 3 + 3 examples, the noise of example {i} of the {half} half changes results "
                f"{moved.nonzero().flatten().tolist()}; it is to change {[i, 3 + i]}"
            )


def _cfg_by(
    mix: Callable[[Tensor, Tensor, float], Tensor] = lambda c, u, scale: u + scale * (c - u),
    join: Callable[[Tensor, Tensor], Tensor] = lambda guided, c: torch.cat([guided, guided]),
    count: Callable[[int], int] = lambda channels: channels,
    variance: Callable[[Tensor], Tensor] = lambda variance: variance,
    halves: Callable[[Tensor], Sequence[Tensor]] = lambda eps: eps.chunk(2),
) -> tuple[Callable]:
    def wrong(out: Tensor, channels: int, scale: float) -> Tensor:
        n = count(channels)
        eps, rest = out[:, :n], out[:, n:]
        c, u = halves(eps)
        return torch.cat([join(mix(c, u, scale), c), variance(rest)], dim=1)

    return (wrong,)


def _cfg_everything(out: Tensor, channels: int, scale: float) -> Tensor:
    c, u = out.chunk(2)
    guided = u + scale * (c - u)
    return torch.cat([guided, guided])


def _cfg_channels(out: Tensor, channels: int, scale: float) -> Tensor:
    c, u = out.chunk(2, dim=1)
    return torch.cat([u + scale * (c - u), u], dim=1)


def _cfg_in_place(out: Tensor, channels: int, scale: float) -> Tensor:
    c, u = out[:, :channels].chunk(2)
    guided = u + scale * (c - u)
    out[:, :channels] = torch.cat([guided, guided])
    return out


def _cfg_lerp(out: Tensor, channels: int, scale: float) -> Tensor:
    n = len(out) // 2
    guided = torch.lerp(out[n:, :channels], out[:n, :channels], scale)
    new = out.clone()
    new[:n, :channels] = guided
    new[n:, :channels] = guided
    return new


def _cfg_weights(out: Tensor, channels: int, scale: float) -> Tensor:
    pairs = out.unflatten(0, (2, -1))
    mix = torch.tensor([scale, 1 - scale], dtype=out.dtype, device=out.device)
    guided = torch.einsum("k,kb...->b...", mix, pairs).expand_as(pairs)
    noise = torch.arange(out.shape[1], device=out.device)[:, None, None] < channels
    return torch.where(noise, guided, pairs).flatten(0, 1)


DIT_CFG = Exercise(
    id="08.7",
    names=("dit_cfg",),
    references=(dit_cfg,),
    inputs=_cfg_inputs,
    facts=(
        Fact("scale 1 is conditional, scale 0 unconditional", _cfg_ends, "which half has labels? And which channels?"),
        Fact("numbers by hand", _cfg_by_hand, "go scale times the way from eps_u to eps_c, in every noise channel"),
        Fact("the variances stay as they are", _cfg_variance, "guide the first `channels` channels alone"),
        Fact("both halves hold the guided noise", _cfg_both, "twice the same, one after the other"),
        Fact("each example is guided by its own pair", _cfg_pairs, "example i and example B + i are of the same x_t"),
    ),
    mistakes=(
        Mistake(
            "3 channels",
            "You guide 3 channels whatever `channels` says. Latents have 4: channel 3 stays unguided. (The published "
            "code does so by mistake, and keeps it to repeat its own numbers exactly; here all are guided.)",
            _cfg_by(count=lambda channels: 3),
        ),
        Mistake(
            "variance guided",
            "The variances are guided too. A scale above 1 leads beyond what either prediction says, and for a "
            "variance nothing justifies that: only the noise is to be guided.",
            (_cfg_everything,),
        ),
        Mistake(
            "chunks along channels",
            "You split along the channels for the two predictions: noise is then guided against the variance. The two "
            "halves of the batch are the conditional and the unconditional one.",
            (_cfg_channels,),
        ),
        Mistake(
            "halves exchanged",
            "You take the first half for the unconditional one: it is the one with labels, so that guidance leads away "
            "from them.",
            _cfg_by(lambda c, u, scale: c + scale * (u - c)),
        ),
        Mistake(
            "1 + scale",
            "You count the scale from the conditional prediction, eps_c + scale (eps_c - eps_u): here scale 1 is "
            "conditional, and the two differ by 1.",
            _cfg_by(lambda c, u, scale: c + scale * (c - u)),
        ),
        Mistake(
            "no difference",
            "You add scale times eps_c to eps_u, not scale times the difference: the weights do not add up to 1, so "
            "that the noise is too large.",
            _cfg_by(lambda c, u, scale: u + scale * c),
        ),
        Mistake(
            "difference alone",
            "You return scale times the difference: eps_u, from which it leads, is missing.",
            _cfg_by(lambda c, u, scale: scale * (c - u)),
        ),
        Mistake(
            "first half only",
            "Only the first half holds the guided noise and the second its own: in the next step the two halves would "
            "no longer be of the same x_t.",
            (
                lambda out, channels, scale: torch.cat(
                    [dit_cfg(out, channels, scale)[: len(out) // 2], out[len(out) // 2 :]]
                ),
            ),
        ),
        Mistake(
            "half the batch",
            "You return one half: the sampler goes on with both, so it needs the guided noise twice.",
            (lambda out, channels, scale: dit_cfg(out, channels, scale)[: len(out) // 2],),
        ),
        Mistake(
            "variance lost",
            "You return the noise without the variances: they go on as they are, behind it.",
            (lambda out, channels, scale: dit_cfg(out, channels, scale)[:, :channels],),
        ),
        Mistake(
            "variance of the first half",
            "Both halves get the first half's variances; each keeps its own.",
            _cfg_by(variance=lambda v: torch.cat([v[: len(v) // 2]] * 2)),
        ),
        Mistake(
            "neighbours paired",
            "You pair neighbours in the batch, 0 with 1, 2 with 3. Example i has its pair in the second half, B places "
            "further.",
            _cfg_by(halves=lambda eps: (eps[0::2], eps[1::2])),
        ),
        Mistake(
            "in place",
            "You write into out: the network's prediction is lost for whoever still needs it.",
            (_cfg_in_place,),
        ),
    ),
    alternatives=((_cfg_lerp,), (_cfg_weights,)),
    hints=(
        "Cut twice: the channels into noise and variance, then the noise, along the batch, into the half with labels "
        "and the half without. Put together the other way round.",
        "eps_c, eps_u = out[:, :channels].chunk(2); guided = eps_u + scale (eps_c - eps_u); cat([cat([guided, "
        "guided]), out[:, channels:]], dim=1).",
    ),
    hides=("guidance.cfg", "guidance.negative", "guidance.perp_neg", "guidance.apg"),
)

# --- 08.8 my_block_test -----------------------------------------------------------------------------------------------


def _first_c(block: type) -> type:
    """All examples get the modulation of the first."""

    class FirstC(block):
        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            return super().forward(x, c[:1].expand_as(c))

    return FirstC


_BLOCK_WRONG = (
    ("one without gates", _block_by(add=lambda x, gate, said: x + said)),
    ("one whose modulation starts at random", _block_by(start=_default_modulation)),
    ("one that multiplies by scale, not by 1 + scale", _block_by(lambda h, shift, scale: h * scale + shift)),
    (
        "one with shift and scale exchanged",
        _block_by(split=lambda six: [six[i] for i in (1, 0, 2, 4, 3, 5)]),
    ),
    (
        "one in which each branch has the other's gate",
        _block_by(split=lambda six: [six[i] for i in (0, 1, 5, 3, 4, 2)]),
    ),
    ("one that modulates with c, not with silu(c)", _block_by(act=lambda c: c)),
    ("one whose MLP does not see what the attention did", _block_by(flow="parallel")),
    ("one that gives every example the c of the first", _first_c(DiTBlock)),
    ("one whose layer norms have weights", _block_by(affine=True)),
)


def _nearly(mine: Tensor, theirs: Tensor) -> bool:
    return torch.allclose(mine, theirs, atol=1e-4)


def _block_test_by(
    *looks: str, examples: int = 3, act: Callable = F.silu, same: Callable[[Tensor, Tensor], bool] = _nearly
) -> Callable:
    """A test that looks at some things only."""

    def my_block_test(DiTBlock: Callable) -> None:
        block, x, c = DiTBlock(8, 2), torch.randn(examples, 5, 8), torch.randn(examples, 8)
        if "shape" in looks:
            assert block(x, c).shape == x.shape
        if "fresh" in looks:
            assert torch.equal(block(x, c), x)
        if "zeros" in looks:
            assert not block.modulation.weight.any() and not block.modulation.bias.any()
        if "parameters" in looks:
            assert len(list(block.parameters())) == 10
        nn.init.normal_(block.modulation.weight)
        nn.init.normal_(block.modulation.bias)
        if "moves" in looks:
            assert not torch.allclose(block(x, c), x)
        if "apart" in looks:
            assert torch.allclose(block(x, c)[1:2], block(x[1:2], c[1:2]), atol=1e-4)
        if "formula" in looks:
            shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(act(c))[:, None].chunk(6, dim=-1)
            h = x + gate1 * block.attention(F.layer_norm(x, (8,), eps=1e-6) * (1 + scale1) + shift1)
            right = h + gate2 * block.mlp(F.layer_norm(h, (8,), eps=1e-6) * (1 + scale2) + shift2)
            assert same(block(x, c), right)
        if "gates" in looks:
            for parameter in (block.modulation.weight, block.modulation.bias):
                parameter.data[16:24] = parameter.data[40:48] = 0
            assert torch.equal(block(x, c), x)

    return my_block_test


def _block_test_state(DiTBlock: Callable) -> None:
    """Compares with a class of one's own that takes over the weights; strict loading finds extra ones."""

    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.modulation = Attention(12, 3), nn.Linear(12, 72)
            self.mlp = nn.Sequential(nn.Linear(12, 48), nn.GELU(approximate="tanh"), nn.Linear(48, 12))

        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            m = self.modulation(F.silu(c)).reshape(-1, 1, 6, 12)
            for k, branch in enumerate((self.attention, self.mlp)):
                shift, scale, gate = m[:, :, 3 * k : 3 * k + 3].unbind(2)
                x = x + gate * branch(F.layer_norm(x, (12,), eps=1e-6) * (1 + scale) + shift)
            return x

    theirs, mine = DiTBlock(12, 3).double(), Mine().double()
    x, c = torch.randn(2, 4, 12).double(), torch.randn(2, 12).double()
    if (theirs(x, c) - x).any():
        raise AssertionError("fresh")
    mine.load_state_dict(theirs.state_dict())
    for parameter in mine.parameters():
        nn.init.normal_(parameter, std=0.5)
    theirs.load_state_dict(mine.state_dict())
    assert (mine(x, c) - theirs(x, c)).abs().max() < 1e-9


def _block_test_parts(DiTBlock: Callable) -> None:
    """One thing after the other, with modulations set by hand."""
    torch.manual_seed(1)
    block = DiTBlock(4, 1).double()
    x, c = torch.randn(3, 2, 4).double(), 2 * torch.randn(3, 4).double()
    assert len(list(block.parameters())) == 10
    assert torch.equal(block(x, c), x)

    def norm(h: Tensor) -> Tensor:
        return (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()

    for k in range(6):  # both gates open, and one vector at a time made of c
        with torch.no_grad():
            block.modulation.weight.zero_()
            block.modulation.bias.zero_()
            block.modulation.bias[8:12] = block.modulation.bias[20:24] = 0.7
            block.modulation.weight[4 * k : 4 * k + 4] = torch.eye(4)
        six = [torch.zeros(3, 1, 4).double() for _ in range(6)]
        six[2], six[5] = six[2] + 0.7, six[5] + 0.7
        six[k] = six[k] + (c * torch.sigmoid(c))[:, None]
        h = x + six[2] * block.attention(norm(x) * (1 + six[1]) + six[0])
        due = h + six[5] * block.mlp(norm(h) * (1 + six[4]) + six[3])
        assert torch.allclose(block(x, c), due)


MY_BLOCK_TEST = test_exercise(
    "08.8",
    "my_block_test",
    my_block_test,
    right=(DiTBlock, _BlockWithNorms, _BlockByHand),
    wrong=_BLOCK_WRONG,
    needed=8,
    mistakes=(
        Mistake(
            "never raises",
            "Your test objects to none of the wrong blocks. All of them return the right shape, and once awake all of "
            "them change x: look at the numbers.",
            (_block_test_by("shape", "moves"),),
        ),
        Mistake(
            "a fresh block only",
            "Your test looks at a fresh block alone. Its gates are 0, so that nothing in its branches shows: most "
            "wrong blocks are the identity as well. Give the modulation random weights first, then look again.",
            (_block_test_by("fresh"),),
        ),
        Mistake(
            "the zeros only",
            "You look whether the modulation starts at 0, and never call the block: what it makes of the six vectors "
            "goes unseen.",
            (_block_test_by("zeros"),),
        ),
        Mistake(
            "awake only",
            "Your test wakes the block and never looks at a fresh one: a modulation that does not start at 0 passes, "
            "and so do weights in the layer norms.",
            (_block_test_by("formula"),),
        ),
        Mistake(
            "the gates only",
            "You check that gates of 0 close both branches, and nothing about what the branches read.",
            (_block_test_by("gates"),),
        ),
        Mistake(
            "examples apart only",
            "You check that examples do not see one another, and nothing else: only one of the wrong blocks mixes "
            "them.",
            (_block_test_by("apart"),),
        ),
        Mistake(
            "one example",
            "Your test has a batch of one: a block that gives all examples the first one's c passes, and so do "
            "weights in the layer norms. Take several examples, and look at the parameters.",
            (_block_test_by("fresh", "formula", examples=1),),
        ),
        Mistake(
            "a wrong formula of its own",
            "Your test refuses correct blocks: the formula it compares with is wrong, or it is too strict, with == "
            "where allclose is due.",
            (_block_test_by("fresh", "formula", act=lambda c: c),),
        ),
        Mistake(
            "equal to the last bit",
            "Your test refuses a correct block that sums in another order: its numbers differ by rounding alone. "
            "Compare with torch.allclose, not with torch.equal; equal to the last bit is due for a fresh block only.",
            (_block_test_by("fresh", "parameters", "formula", same=torch.equal),),
        ),
        Mistake(
            "the number of parameters only",
            "You count parameters. That finds layer norms with weights; all the other wrong blocks have the right ones "
            "and use them in a wrong way.",
            (_block_test_by("parameters"),),
        ),
    ),
    alternatives=(_block_test_state, _block_test_parts),
    hides=("dit_blocks.AdaLNZeroBlock", "dit.AdaLNZeroBlock"),
    hints=(
        "A fresh block tells you about its gates alone. What must you do to a block before the rest of it shows? And "
        "what do you compare with then?",
        "Assert that a fresh block returns x; give block.modulation random weights and compare with the formula, "
        "written with block.attention, block.mlp and block.modulation, for several examples; assert that no parameter "
        "has a name with norm.",
    ),
)

EXERCISES = (PATCHIFY, POS_EMBED, BLOCK, INIT, COUNT, EMBEDDER, DIT_CFG, MY_BLOCK_TEST)
