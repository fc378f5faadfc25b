"""The exact world where a learner's code expects a network: perfect answers, and a record of what it was asked."""

import torch
from torch import Tensor, nn

from condiff_ref.mixture import GaussianMixture
from condiff_ref.schedules import discrete


class OracleEps(nn.Module):
    """E[eps | xt], what a perfect noise-predicting network would say, times a parameter `gain` that is 1.

    `seen` records the (xt, t) of every call.
    """

    def __init__(self, world: GaussianMixture, abar: Tensor):
        super().__init__()
        self.world, self.abar = world, abar
        self.gain = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, xt: Tensor, t: Tensor) -> Tensor:
        """xt (b, d), integer t (b,) -> (b, d)."""
        self.seen.append((xt.detach().clone(), t.detach().clone()))
        return (self.gain * exact_eps(self.world, xt, t, self.abar)).to(xt.dtype)


def exact_eps(world: GaussianMixture, xt: Tensor, t: Tensor, abar: Tensor) -> Tensor:
    """E[eps | xt] = -sigma score, from the world's closed form."""
    sigma = (1 - abar[t]).sqrt()[:, None]
    return -sigma * world.score(xt.double(), t.double(), discrete(abar))
