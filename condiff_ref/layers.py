"""What the networks share: time and label embeddings, attention, and the residual block that they modulate."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .shapes import Labels, Time


def time_embedding(t: Time, dim: int, max_period: float = 10_000.0) -> Tensor:
    """(b,) in [0, 1] -> (b, dim): sines and cosines of 1000 t at dim / 2 frequencies from 1 down to 1 / max_period
    (Vaswani et al. 2017, section 3.5; the integer times of Ho et al. 2020 are 1000 t here). Norm sqrt(dim / 2).

    Without the factor 1000 all times look alike. Raises ValueError for an odd `dim`.
    """
    if dim % 2:
        raise ValueError(f"the embedding pairs sines with cosines, so its width must be even, got {dim}")
    frequencies = torch.exp(-math.log(max_period) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = 1000 * t[:, None] * frequencies.to(t.dtype)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def position_embedding(rows: int, columns: int, dim: int) -> Tensor:
    """(rows columns, dim): sines and cosines of the column in the first half, of the row in the second, at dim / 4
    frequencies from 1 down towards 1 / 10,000 (fixed, and in this order, as published with Peebles & Xie 2023).

    Raises ValueError where 4 does not divide dim.
    """
    if dim % 4:
        raise ValueError(f"two axes, each in sines and cosines, need a width that 4 divides, got {dim}")
    frequencies = torch.exp(-math.log(10_000) * torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [position.reshape(-1, 1) * frequencies for position in (column, row)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1).float()


class LabelEmbedding(nn.Module):
    """A vector per class and one more, at index `null`, that stands for "no class given"."""

    def __init__(self, classes: int, dim: int):
        super().__init__()
        self.null = classes
        self.table = nn.Embedding(classes + 1, dim)

    def forward(self, label: Labels) -> Tensor:
        """(b,) -> (b, dim)."""
        return self.table(label)


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(d)) V over `heads` heads (Vaswani et al. 2017, eq. 1).

    Self-attention, or cross-attention to a context of width `context_dim`. Raises ValueError where heads do not divide
    dim, or where a context is missing or has another width.
    """

    def __init__(self, dim: int, heads: int, context_dim: int | None = None):
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} heads do not divide width {dim}")
        self.heads, self.context_dim = heads, context_dim
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(context_dim or dim, 2 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, return_weights: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x (b, m, dim), context (b, n, context_dim), mask (b, n) true where a token counts -> (b, m, dim), with the
        weights (b, heads, m, n) if asked for."""
        if self.context_dim is not None and (context is None or context.shape[-1] != self.context_dim):
            got = "none" if context is None else f"shape {tuple(context.shape)}"
            raise ValueError(f"this layer attends to a context of width {self.context_dim}, got {got}")
        q = self._split(self.to_q(x))
        k, v = (self._split(part) for part in self.to_kv(x if context is None else context).chunk(2, dim=-1))
        blocked = None if mask is None else mask[:, None, None, :]
        if x.is_cuda and not return_weights:
            return self.to_out(self._merge(F.scaled_dot_product_attention(q, k, v, attn_mask=blocked)))
        # plain softmax: at these lengths the backward pass of the fused kernel is several times slower on a CPU
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if blocked is not None:
            scores = scores.masked_fill(~blocked, -math.inf)
        weights = scores.softmax(dim=-1)
        out = self.to_out(self._merge(weights @ v))
        return (out, weights) if return_weights else out

    def _split(self, x: Tensor) -> Tensor:
        b, m, dim = x.shape
        return x.reshape(b, m, self.heads, dim // self.heads).transpose(1, 2)

    def _merge(self, x: Tensor) -> Tensor:
        b, _, m, _ = x.shape
        return x.transpose(1, 2).reshape(b, m, -1)


class ResBlock(nn.Module):
    """Norm, activation, convolution, twice, added to the input; the embedding scales and shifts the second norm
    (adaptive group normalisation, Dhariwal & Nichol 2021, section 3.1). Starts as the identity on its skip path.
    """

    def __init__(self, channels: int, out_channels: int, emb_dim: int):
        super().__init__()
        self.norm1 = group_norm(channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.modulation = nn.Linear(emb_dim, 2 * out_channels)
        self.norm2 = group_norm(out_channels)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (b, c, h, w), emb (b, emb_dim) -> (b, out_channels, h, w)."""
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.modulation(emb).chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(h))


class GroupNorm(nn.GroupNorm):
    """In the precision of its weights under autocast too, as autocast itself does on a GPU.

    torch's bfloat16 kernel for channels_last is the slower one on a CPU: with it a step of mnist-classifier took 35 ms
    on one thread with AMX, without 25.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, ...) -> (b, c, ...)."""
        return super().forward(x.to(self.weight.dtype))


def group_norm(channels: int) -> GroupNorm:
    """Normalise within each example: batch normalisation would let examples see one another."""
    return GroupNorm(math.gcd(8, channels), channels)


def zero_init(module: nn.Module) -> nn.Module:
    """Set weight and bias to zero, so that the branch starts silent."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
