"""A U-Net in the style of a public lab, for peers.py to train by that lab's recipe.

Written from a reading of lab three of eje24/iap-diffusion-labs (MIT 6.S184, "A Conditional Generative Model for
Images", at commit 9d9dbe6), in our own words: the same layers in the same order with as many weights, no line of its
code. It differs from the U-Net of this course in what makes it slow on a processor: it works on all 32 x 32 pixels with
batch normalisation, and each of its ten residual blocks reads time and label through two small networks of its own.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn


class LabUNet(nn.Module):
    """The velocity at (x, t, label), for t from noise at 0 to data at 1, as the lab counts. Label 10 is none."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128), blocks: int = 2, emb_dim: int = 40, classes: int = 10):
        super().__init__()
        self.frequencies = nn.Parameter(torch.randn(emb_dim // 2))
        self.labels = nn.Embedding(classes + 1, emb_dim)
        self.first = nn.Sequential(_conv(1, widths[0]), nn.BatchNorm2d(widths[0]), nn.SiLU())
        pairs = list(pairwise(widths))
        self.down = nn.ModuleList(_Stage(a, blocks, emb_dim, after=_conv(a, b, stride=2)) for a, b in pairs)
        self.middle = _Stage(widths[-1], blocks, emb_dim)
        self.up = nn.ModuleList(_Stage(a, blocks, emb_dim, before=_doubled(b, a)) for a, b in reversed(pairs))
        self.last = _conv(widths[0], 1)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """x (b, 1, h, w) with h and w divisible by 4, t (b,), label (b,) -> like x."""
        angle = 2 * math.pi * t[:, None] * self.frequencies
        time, label = math.sqrt(2) * torch.cat([angle.sin(), angle.cos()], dim=1), self.labels(label)
        x = self.first(x)
        skips = []
        for stage in self.down:
            x = stage(x, time, label)
            skips.append(x)
        x = self.middle(x, time, label)
        for stage in self.up:
            x = stage(x + skips.pop(), time, label)  # added, where most U-Nets concatenate
        return self.last(x)


class _Stage(nn.Module):
    """Residual blocks at one resolution, with a way in or out of it."""

    def __init__(
        self, width: int, blocks: int, emb_dim: int, before: nn.Module | None = None, after: nn.Module | None = None
    ):
        super().__init__()
        self.before, self.after = before or nn.Identity(), after or nn.Identity()
        self.blocks = nn.ModuleList(_Residual(width, emb_dim) for _ in range(blocks))

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        x = self.before(x)
        for block in self.blocks:
            x = block(x, time, label)
        return self.after(x)


class _Residual(nn.Module):
    """Two convolutions, with time and label added in between, beside the input itself."""

    def __init__(self, width: int, emb_dim: int):
        super().__init__()
        self.one, self.two = (nn.Sequential(nn.SiLU(), nn.BatchNorm2d(width), _conv(width, width)) for _ in range(2))
        self.of_time, self.of_label = (
            nn.Sequential(nn.Linear(emb_dim, emb_dim), nn.SiLU(), nn.Linear(emb_dim, width)) for _ in range(2)
        )

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        shift = self.of_time(time) + self.of_label(label)
        return x + self.two(self.one(x) + shift[:, :, None, None])


def _conv(width: int, out: int, stride: int = 1) -> nn.Module:
    return nn.Conv2d(width, out, 3, stride, padding=1)


def _doubled(width: int, out: int) -> nn.Module:
    return nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), _conv(width, out))
