"""Four ways to tell a transformer block of time and label (Peebles & Xie 2023, section 3.2 and figure 3)."""

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Attention, zero_init


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
        self.mlp = mlp(dim)
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


class AdaLNBlock(nn.Module):
    """adaLN without gates and without zeros: its branches speak from the start."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm, self.attention, self.mlp = layer_norm(dim), Attention(dim, heads), mlp(dim)
        self.modulation = nn.Linear(dim, 4 * dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (b, m, dim), c (b, dim) -> (b, m, dim)."""
        shift1, scale1, shift2, scale2 = self.modulation(F.silu(c))[:, None].chunk(4, dim=-1)
        x = x + self.attention(modulate(self.norm(x), shift1, scale1))
        return x + self.mlp(modulate(self.norm(x), shift2, scale2))


class CrossAttentionBlock(nn.Module):
    """Patches attend to time and label, between self-attention and MLP."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm, self.attention, self.mlp = layer_norm(dim), Attention(dim, heads), mlp(dim)
        self.cross_attention = Attention(dim, heads, dim)

    def forward(self, x: Tensor, conditions: Tensor) -> Tensor:
        """x (b, m, dim), conditions (b, 2, dim) -> (b, m, dim)."""
        x = x + self.attention(self.norm(x))
        x = x + self.cross_attention(self.norm(x), conditions)
        return x + self.mlp(self.norm(x))


class InContextBlock(nn.Module):
    """The block of any transformer: time and label are two more tokens among x."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm, self.attention, self.mlp = layer_norm(dim), Attention(dim, heads), mlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(b, m, dim) -> (b, m, dim)."""
        x = x + self.attention(self.norm(x))
        return x + self.mlp(self.norm(x))


def mlp(dim: int) -> nn.Sequential:
    """Two layers, four times as wide in between."""
    return nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim))


def layer_norm(dim: int) -> nn.LayerNorm:
    """Over the width of each token, without weights of its own: shift and scale come from the condition."""
    return nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
