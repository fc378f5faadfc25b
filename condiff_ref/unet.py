"""A small U-Net (Ronneberger et al. 2015; Ho et al. 2020, appendix B) for digits and other small pictures."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Attention, LabelEmbedding, ResBlock, group_norm, position_embedding, time_embedding, zero_init
from .shapes import Images, Labels, Time


class UNet(nn.Module):
    """Resolution halves from each width to the next; conditions enter in four places, by name.

    label: an embedding added to that of time, and from there a scale and shift in every block.
    context, mask: cross-attention at the lowest resolution, to the tokens that the mask lets through.
    residuals: added to the skip connections and the middle (ControlNet), ordered as `forward` makes them.
    padding: pixels put around the picture and cut off again, so that 28 becomes 32, which halves more often.
    patch: pixels per side that are folded into channels first, so that the costly full resolution is never convolved.
    """

    def __init__(
        self,
        channels: int,
        widths: Sequence[int],
        classes: int | None = None,
        context_dim: int | None = None,
        *,
        padding: int = 0,
        patch: int = 1,
        emb_dim: int = 128,
    ):
        super().__init__()
        self.channels, self.widths, self.emb_dim = channels, tuple(widths), emb_dim
        self.padding, self.patch = padding, patch
        self.divisor = patch * 2 ** (len(widths) - 1)
        self.label_embedding = LabelEmbedding(classes, emb_dim) if classes else None
        self.time_mlp = nn.Sequential(nn.Linear(emb_dim, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))

        self.stem = nn.Conv2d(channels * patch**2, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(ResBlock(width, width, emb_dim) for width in widths)
        pairs = list(pairwise(widths))
        self.downs = nn.ModuleList(nn.Conv2d(high, low, 2, stride=2) for high, low in pairs)
        self.middle = ResBlock(widths[-1], widths[-1], emb_dim)
        self.attention = CrossAttention2d(widths[-1], context_dim) if context_dim else None
        self.up_blocks = nn.ModuleList(ResBlock(2 * width, width, emb_dim) for width in reversed(widths))
        self.ups = nn.ModuleList(nn.ConvTranspose2d(low, high, 2, stride=2) for high, low in reversed(pairs))
        self.norm = group_norm(widths[0])
        self.head = zero_init(nn.Conv2d(widths[0], channels * patch**2, 3, padding=1))

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
        residuals: Sequence[Tensor] | None = None,
    ) -> Images:
        """Raw output of the network's kind, shaped as xt. No label means the null label, for every example.

        Raises ValueError, naming the shapes, for pictures that the widths cannot halve and labels out of range.
        """
        skips, h, emb = self.encode(xt, t, label=label, context=context, mask=mask)
        if residuals is not None:
            *to_skips, to_middle = residuals
            skips = [skip + residual for skip, residual in zip(skips, to_skips, strict=True)]
            h = h + to_middle
        for i, block in enumerate(self.up_blocks):
            h = block(torch.cat([h, skips.pop()], dim=1), emb)
            if i < len(self.ups):
                h = self.ups[i](h)
        out = F.pixel_shuffle(self.head(F.silu(self.norm(h))), self.patch)
        return F.pad(out, [-self.padding] * 4)

    def encode(
        self,
        xt: Images,
        t: Time,
        *,
        label: Labels | None = None,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        added: Tensor | None = None,
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """The downward half: one skip connection per width, the middle, and the embedding (b, emb_dim) that modulates.

        `added` joins the output of the stem (b, widths[0], h, w): ControlNet's hint comes in there.
        """
        self._check(xt, label)
        emb = F.silu(self.embed(t, label))
        h = self.stem(self.fold(xt))
        h = h if added is None else h + added
        skips = []
        for i, block in enumerate(self.down_blocks):
            h = block(h, emb)
            skips.append(h)
            if i < len(self.downs):
                h = self.downs[i](h)
        h = self.middle(h, emb)
        if self.attention is not None:
            h = self.attention(h, context, mask)
        return skips, h, emb

    def fold(self, images: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, patch^2 c, ., .): padding put around, then each patch folded into channels."""
        return F.pixel_unshuffle(F.pad(images, [self.padding] * 4), self.patch)

    def embed(self, t: Time, label: Labels | None = None) -> Tensor:
        """(b,), (b,) -> (b, emb_dim)."""
        emb = self.time_mlp(time_embedding(t, self.emb_dim))
        if self.label_embedding is None:
            return emb
        label = torch.full(t.shape, self.null, device=t.device) if label is None else label
        return emb + self.label_embedding(label)

    def _check(self, xt: Tensor, label: Tensor | None) -> None:
        height, width = (side + 2 * self.padding for side in xt.shape[2:])
        if xt.shape[1] != self.channels or height % self.divisor or width % self.divisor:
            padded = f" less {2 * self.padding}" if self.padding else ""
            raise ValueError(
                f"this network takes (b, {self.channels}, h, w) with h and w multiples of {self.divisor}{padded}, "
                f"got {tuple(xt.shape)}"
            )
        if label is not None and self.label_embedding is None:
            raise ValueError("this network has no classes: build it with `classes` to use labels")
        if label is not None and not xt.is_cuda and ((label < 0) | (label > self.null)).any():
            raise ValueError(f"labels are 0 to {self.null - 1}, and {self.null} for none; got {label.tolist()}")


class CrossAttention2d(nn.Module):
    """Every pixel attends to the context; the result is added. Starts silent. Pixels know where they are, or "top left"
    would have nothing to bind to."""

    def __init__(self, channels: int, context_dim: int, heads: int = 4):
        super().__init__()
        self.norm = group_norm(channels)
        self.attention = Attention(channels, heads, context_dim)
        zero_init(self.attention.to_out)

    def forward(self, x: Tensor, context: Tensor | None, mask: Tensor | None = None) -> Tensor:
        """x (b, c, h, w), context (b, n, e), mask (b, n) true where a token counts -> (b, c, h, w)."""
        return x + self.attention(self._queries(x), context, mask).transpose(1, 2).reshape(x.shape)

    def weights(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """What each pixel attends to: (b, heads, h w, n)."""
        return self.attention(self._queries(x), context, mask, return_weights=True)[1]

    def _queries(self, x: Tensor) -> Tensor:
        pixels = self.norm(x).flatten(2).transpose(1, 2)
        return pixels + position_embedding(*x.shape[2:], x.shape[1]).to(pixels)
