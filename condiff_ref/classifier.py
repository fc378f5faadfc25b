"""A classifier that knows noise: p(y | xt, t), for classifier guidance (Dhariwal & Nichol 2021, section 4)."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from .layers import ResBlock, group_norm, time_embedding
from .schedules import Schedule, add_noise, draw_noise
from .shapes import Images, Labels, LogProb, Network, PerClass, PerExample, Time


class NoisyClassifier(nn.Module):
    """The downward half of a U-Net, averaged over pixels. No batch normalisation: the guidance gradient of one example
    must not depend on another. `blind` to t, it goes with `clean_loss`; lesson 03 shows what becomes of guidance then.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        *,
        widths: Sequence[int] = (32, 64),
        patch: int = 1,
        emb_dim: int = 128,
        blind: bool = False,
    ):
        super().__init__()
        self.blind = blind
        self.channels, self.classes, self.patch, self.emb_dim = channels, classes, patch, emb_dim
        self.time_mlp = nn.Sequential(nn.Linear(emb_dim, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        self.stem = nn.Conv2d(channels * patch**2, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList(ResBlock(width, width, emb_dim) for width in widths)
        pairs = pairwise(widths)
        self.downs = nn.ModuleList(nn.Conv2d(high, low, 2, stride=2) for high, low in pairs)
        self.norm = group_norm(widths[-1])
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, xt: Images, t: Time) -> PerClass:
        """Logits (b, classes). Raises ValueError for another number of channels."""
        if xt.shape[1] != self.channels:
            raise ValueError(f"this classifier takes (b, {self.channels}, h, w), got {tuple(xt.shape)}")
        t = torch.zeros_like(t) if self.blind else t
        emb = F.silu(self.time_mlp(time_embedding(t, self.emb_dim)))
        h = self.stem(F.pixel_unshuffle(xt, self.patch))
        for i, block in enumerate(self.blocks):
            h = block(h, emb)
            if i < len(self.downs):
                h = self.downs[i](h)
        return self.head(F.silu(self.norm(h)).mean(dim=(2, 3)))


def log_prob_of(classifier: Network, label: Labels | int) -> LogProb:
    """(xt, t) -> log p(label | xt) (b,): normalised over the classes, for one label or one per example."""

    def log_prob(xt: Images, t: Time) -> PerExample:
        chosen = torch.as_tensor(label, device=xt.device).expand(len(xt))
        return classifier(xt, t).log_softmax(dim=1).gather(1, chosen[:, None])[:, 0]

    return log_prob


def classifier_loss(
    classifier: Network, x0: Images, label: Labels, schedule: Schedule, generator: Generator | None = None
) -> Tensor:
    """Cross-entropy on noised pictures, t uniform in (0, 1), the same t given to the classifier."""
    device = x0.device if generator is None else generator.device
    t = torch.rand(len(x0), generator=generator, device=device).to(x0)
    xt = add_noise(x0, draw_noise(x0, generator), t, schedule)
    return F.cross_entropy(classifier(xt, t), label)


def clean_loss(classifier: Network, x0: Images, label: Labels) -> Tensor:
    """Cross-entropy on the pictures as they are, at t = 0."""
    return F.cross_entropy(classifier(x0, torch.zeros(len(x0)).to(x0)), label)
