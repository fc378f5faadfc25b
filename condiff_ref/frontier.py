"""What lesson 10 compares estimates with: the exact world once a linear measurement of it is known."""

import torch
from torch import Tensor

from .mixture import GaussianMixture


def measured(world: GaussianMixture, A: Tensor, R: Tensor, y: Tensor) -> GaussianMixture:
    """p(x0 | y) for y = A x0 + n, n ~ N(0, R): a mixture again, by Bayes' rule for each component (Kalman's update).

    A (m, d), R (m, m), y (m,). Component k of N(mu, S) becomes N(mu + K (y - A mu), S - K A S), with the gain
    K = S A^T (A S A^T + R)^-1, and its weight is multiplied by N(y; A mu, A S A^T + R). So grad log p(y | xt) is the
    score of this world less that of the old one, at every t. Raises ValueError for shapes that disagree.
    """
    m, d = A.shape
    if world.means.shape[1] != d or R.shape != (m, m) or y.shape != (m,):
        raise ValueError(
            f"a world in {world.means.shape[1]} dimensions and A {tuple(A.shape)} need R {(m, m)} and y {(m,)}, "
            f"got {tuple(R.shape)} and {tuple(y.shape)}"
        )
    of_y = A @ world.covs @ A.T + R
    gain = torch.linalg.solve(of_y, A @ world.covs).mT
    off = y - world.means @ A.T
    log_weight = torch.distributions.MultivariateNormal(torch.zeros_like(y), of_y).log_prob(off)
    covs = world.covs - gain @ A @ world.covs
    return GaussianMixture(
        (world.weights.log() + log_weight).softmax(0),
        world.means + torch.einsum("kdm,km->kd", gain, off),
        (covs + covs.mT) / 2,
        world.labels,
    )
