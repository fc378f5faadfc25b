"""The diffusion transformer (Peebles & Xie 2023): patches are tokens; time and label scale, shift and gate them."""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from .layers import Attention, LabelEmbedding, position_embedding, time_embedding, zero_init
from .shapes import Images, Labels, Time

# Peebles & Xie 2023, table 1. DiT-XL/2 on 32 x 32 latents: DiT(4, 32, 2, **CONFIGS["XL"], classes=1000).
CONFIGS = {
    "S": dict(dim=384, depth=12, heads=6),
    "B": dict(dim=768, depth=12, heads=12),
    "L": dict(dim=1024, depth=24, heads=16),
    "XL": dict(dim=1152, depth=28, heads=16),
}
TIME_FEATURES = 256


def patchify(x: Images, patch: int) -> Tensor:
    """(b, c, h, w) -> (b, h w / patch^2, patch^2 c): patches row by row; within a patch rows, columns, channels.

    Raises ValueError where the patches do not tile the picture.
    """
    b, channels, height, width = x.shape
    if height % patch or width % patch:
        raise ValueError(f"patches of {patch} do not tile a picture of shape {tuple(x.shape)}")
    x = x.reshape(b, channels, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, patch**2 * channels)


def unpatchify(tokens: Tensor, patch: int, height: int, width: int) -> Images:
    """(b, h w / patch^2, patch^2 c) -> (b, c, h, w), the inverse of `patchify`. Raises ValueError for other tokens."""
    b, m, features = tokens.shape
    rows, columns = height // patch, width // patch
    if m != rows * columns or features % patch**2:
        raise ValueError(
            f"{height} x {width} in patches of {patch} is (b, {rows * columns}, {patch**2} c), "
            f"got {tuple(tokens.shape)}"
        )
    x = tokens.reshape(b, rows, columns, patch, patch, features // patch**2)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, rows * patch, columns * patch)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift: zeros change nothing. x (b, m, dim), shift and scale (b, 1, dim) -> (b, m, dim)."""
    return x * (1 + scale) + shift


class AdaLNZeroBlock(nn.Module):
    """x + gate attention(modulate(norm(x))), then the same with an MLP (Peebles & Xie 2023, section 3.2, adaLN-Zero).

    Both shifts, scales and gates are one linear map of c that starts at zero. The gate makes the fresh block the
    identity; zero shift and scale alone would leave attention and MLP of norm(x) in it. With `context_dim`,
    cross-attention to the context in between, silent at first (Chen et al. 2023, PixArt-alpha, section 2.3).
    """

    def __init__(self, dim: int, heads: int, context_dim: int | None = None):
        super().__init__()
        self.norm = layer_norm(dim)
        self.attention = Attention(dim, heads)
        self.cross_attention = Attention(dim, heads, context_dim) if context_dim else None
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim))
        self.modulation = zero_init(nn.Linear(dim, 6 * dim))
        if self.cross_attention is not None:
            zero_init(self.cross_attention.to_out)

    def forward(self, x: Tensor, c: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """x (b, m, dim), c (b, dim), context (b, n, e), mask (b, n) true where a token counts -> (b, m, dim)."""
        vectors = self.modulation(F.silu(c))[:, None].chunk(6, dim=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = vectors
        x = x + gate1 * self.attention(modulate(self.norm(x), shift1, scale1))
        if self.cross_attention is not None:
            x = x + self.cross_attention(self.norm(x), context, mask)
        return x + gate2 * self.mlp(modulate(self.norm(x), shift2, scale2))


class DiT(nn.Module):
    """Patches of (channels, size, size) pictures through `depth` blocks, all modulated by time plus label.

    As published, but for two things: queries, keys and values have no bias, and no variance is predicted, so the output
    has as many channels as the input.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        patch: int,
        dim: int,
        depth: int,
        heads: int,
        classes: int | None = None,
        context_dim: int | None = None,
    ):
        super().__init__()
        if size % patch:
            raise ValueError(f"patches of {patch} do not tile a side of {size}")
        self.channels, self.size, self.patch = channels, size, patch
        self.dim, self.heads, self.context_dim = dim, heads, context_dim
        self.time_mlp = nn.Sequential(nn.Linear(TIME_FEATURES, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label_embedding = LabelEmbedding(classes, dim) if classes else None
        self.stem = nn.Linear(patch**2 * channels, dim)
        positions = position_embedding(size // patch, size // patch, dim)
        self.register_buffer("positions", positions, persistent=False)  # fixed: neither trained nor saved
        self.blocks = nn.ModuleList(AdaLNZeroBlock(dim, heads, context_dim) for _ in range(depth))
        self.norm = layer_norm(dim)
        self.modulation = nn.Linear(dim, 2 * dim)
        self.head = nn.Linear(dim, patch**2 * channels)
        init_weights(self)

    @property
    def null(self) -> int:
        """The label that stands for no class. Raises ValueError for a network without classes."""
        if self.label_embedding is None:
            raise ValueError("this network has no classes, hence no null label")
        return self.label_embedding.null

    def forward(
        self,
        xt: Images,
        t: Time,
        *,
        label: Labels | None = None,
        context: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Images:
        """Raw output of the network's kind, shaped as xt. No label means the null label, for every example.

        Raises ValueError, naming the shapes, for pictures of another size and labels out of range.
        """
        self._check(xt, label)
        c = self.embed(t, label)
        x = self.stem(patchify(xt, self.patch)) + self.positions
        for block in self.blocks:
            x = block(x, c, context, mask)
        shift, scale = self.modulation(F.silu(c))[:, None].chunk(2, dim=-1)
        return unpatchify(self.head(modulate(self.norm(x), shift, scale)), self.patch, self.size, self.size)

    def embed(self, t: Time, label: Labels | None = None) -> Tensor:
        """(b,), (b,) -> (b, dim)."""
        c = self.time_mlp(time_embedding(t, TIME_FEATURES))
        if self.label_embedding is None:
            return c
        label = torch.full(t.shape, self.null, device=t.device) if label is None else label
        return c + self.label_embedding(label)

    def _check(self, xt: Tensor, label: Tensor | None) -> None:
        if xt.shape[1:] != (self.channels, self.size, self.size):
            expected = f"(b, {self.channels}, {self.size}, {self.size})"
            raise ValueError(f"this network takes {expected}, got {tuple(xt.shape)}")
        if label is not None and self.label_embedding is None:
            raise ValueError("this network has no classes: build it with `classes` to use labels")
        if label is not None and not xt.is_cuda and ((label < 0) | (label > self.null)).any():
            raise ValueError(f"labels are 0 to {self.null - 1}, and {self.null} for none; got {label.tolist()}")


def init_weights(dit: DiT, generator: Generator | None = None) -> None:
    """Xavier for linear layers with biases 0, N(0, 0.02^2) for the embeddings of time and label; then zeros, last: what
    modulates, what the context adds, and the head (Peebles & Xie 2023, section 3.2 and the authors' code)."""
    for module in dit.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    tables = [] if dit.label_embedding is None else [dit.label_embedding.table]
    for layer in (dit.time_mlp[0], dit.time_mlp[2], *tables):
        nn.init.normal_(layer.weight, std=0.02, generator=generator)
    crossings = [block.cross_attention.to_out for block in dit.blocks if block.cross_attention is not None]
    for layer in (*(block.modulation for block in dit.blocks), *crossings, dit.modulation, dit.head):
        zero_init(layer)


def layer_norm(dim: int) -> nn.LayerNorm:
    """Over the width of each token, without weights of its own: shift and scale come from the condition."""
    return nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
