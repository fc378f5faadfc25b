"""The exact world: a Gaussian mixture whose noised score, denoiser and class posterior are closed forms.

Component k is of class labels[k]. Noised to (alpha, sigma), it is N(alpha m_k, C_k), C_k = alpha^2 S_k + sigma^2 I, so
everything a network would have to learn is known here, at every t and on every schedule.
"""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from .schedules import Schedule
from .shapes import Denoiser, Labels, LogProb, PerExample, Points, Time


class GaussianMixture:
    """sum_k w_k N(m_k, S_k) over points (b, d); weights (k,), means (k, d), covs (k, d, d), labels (k,).

    Raises ValueError for shapes that disagree, weights that are not positive, or covariances that are not symmetric and
    positive semi-definite. Computation follows the dtype and device of the points it is given.
    """

    def __init__(self, weights: Tensor, means: Tensor, covs: Tensor, labels: Tensor):
        if means.ndim != 2:
            raise ValueError(f"means must be (k, d), got {tuple(means.shape)}")
        k, d = means.shape
        if weights.shape != (k,) or covs.shape != (k, d, d) or labels.shape != (k,):
            raise ValueError(
                f"{k} components in {d} dimensions need weights ({k},), covs ({k}, {d}, {d}) and labels ({k},), "
                f"got {tuple(weights.shape)}, {tuple(covs.shape)}, {tuple(labels.shape)}"
            )
        if not (weights > 0).all():
            raise ValueError("every weight must be positive")
        self.weights = weights / weights.sum()
        self.means, self.covs, self.labels = means, covs, labels
        self.classes = int(labels.max()) + 1
        self._eigenvalues, self._axes = torch.linalg.eigh(covs)  # S_k = axes diag(eigenvalues) axes^T
        rounding = 10 * d * torch.finfo(covs.dtype).eps * self._eigenvalues.abs().max()
        if not torch.allclose(covs, covs.mT) or (self._eigenvalues < -rounding).any():
            raise ValueError("every covariance must be symmetric and positive semi-definite")

    def given(self, label: int | None) -> "GaussianMixture":
        """p(x0 | y = label); the whole mixture for None. Raises ValueError for a class that has no component."""
        if label is None:
            return self
        members = self.labels == label
        if not members.any():
            raise ValueError(f"no component has label {label}: the labels are {self.labels.unique().tolist()}")
        return GaussianMixture(self.weights[members], self.means[members], self.covs[members], self.labels[members])

    def sample(self, n: int, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """n points (n, d) and the class of each (n,)."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        z = z * self._eigenvalues[k].clamp(min=0).sqrt()
        return self.means[k] + torch.einsum("nij,nj->ni", self._axes[k], z), self.labels[k]

    def log_prob(self, xt: Points, t: Time, schedule: Schedule, label: int | None = None) -> PerExample:
        """log p_t(xt), or log p_t(xt | label). At t = 0 the density of the data."""
        return self.given(label)._noised(xt, t, schedule).log_joint.logsumexp(1)

    def score(self, xt: Points, t: Time, schedule: Schedule, label: int | None = None) -> Points:
        """grad log p_t = sum_k r_k C_k^-1 (alpha m_k - xt), r_k the responsibilities."""
        noised = self.given(label)._noised(xt, t, schedule)
        return torch.einsum("nk,nki->ni", noised.log_joint.softmax(1), noised.component_score)

    def class_log_prob(self, xt: Points, t: Time, schedule: Schedule, label: Labels | int) -> PerExample:
        """log p(y = label | xt): what a perfect noise-aware classifier says. One label, or one per point.

        -inf for a label that no component has.
        """
        log_joint = self._noised(xt, t, schedule).log_joint
        label = torch.as_tensor(label, device=xt.device).expand(len(xt))
        member = self.labels.to(xt.device) == label[:, None]
        return log_joint.where(member, -math.inf).logsumexp(1) - log_joint.logsumexp(1)

    def posterior_mean(self, xt: Points, t: Time, schedule: Schedule, label: int | None = None) -> Points:
        """E[x0 | xt] = sum_k r_k (m_k + alpha S_k C_k^-1 (xt - alpha m_k)). Finite at t = 1, unlike Tweedie's form."""
        world = self.given(label)
        noised = world._noised(xt, t, schedule)
        return torch.einsum("nk,nki->ni", noised.log_joint.softmax(1), noised.component_mean)

    def posterior_cov(self, xt: Points, t: Time, schedule: Schedule, label: int | None = None) -> Tensor:
        """Cov[x0 | xt] (b, d, d): the part of x0 that no denoiser can know."""
        world = self.given(label)
        noised = world._noised(xt, t, schedule)
        axes, sigma = world._axes.to(xt), schedule.sigma(t).to(xt)[:, None, None]
        r = noised.log_joint.softmax(1)
        shrunk = world._eigenvalues.to(xt) * sigma**2 / noised.variances
        within = torch.einsum("nk,kij,nkj,klj->nil", r, axes, shrunk, axes)
        m = noised.component_mean
        m = m - torch.einsum("nk,nki->ni", r, m)[:, None]
        return within + torch.einsum("nk,nki,nkj->nij", r, m, m)

    def denoiser(self, schedule: Schedule, label: int | None = None) -> Denoiser:
        """The best possible denoiser, E[x0 | xt]: plugs in wherever a trained network does."""
        world = self.given(label)
        return lambda xt, t: world.posterior_mean(xt, t, schedule)

    def classifier(self, schedule: Schedule, label: Labels | int) -> LogProb:
        """The best possible noise-aware classifier, (xt, t) -> log p(label | xt)."""
        return lambda xt, t: self.class_log_prob(xt, t, schedule, label)

    def tilted(self, label: int, scale: float, points: int = 441, margin: float = 6.0) -> "GridDensity":
        """p(x) p(y = label | x)^scale, normalised by quadrature: what guidance is often said to sample, and does not.

        The grid has `points` per axis and reaches `margin` standard deviations beyond the means. Raises ValueError
        above two dimensions and for a class that has no component.
        """
        self.given(label)  # for its error
        d = self.means.shape[1]
        if d > 2:
            raise ValueError(f"a grid needs one or two dimensions, this world has {d}")
        reach = margin * self._eigenvalues.max().sqrt()
        ends = [(float(m.min() - reach), float(m.max() + reach)) for m in self.means.T]
        axes = [torch.linspace(*end, points, dtype=self.means.dtype, device=self.means.device) for end in ends]
        grid = torch.cartesian_prod(*axes).reshape(-1, d)
        log_joint = self._log_joint(grid, torch.ones(len(grid)).to(grid), torch.zeros(len(grid)).to(grid))
        log_p = log_joint.logsumexp(1)
        log_py = log_joint.where(self.labels == label, -math.inf).logsumexp(1) - log_p
        # at scale 0 a class that is impossible somewhere would give 0 * -inf
        log_tilt = log_p + (scale * log_py if scale else 0)
        return GridDensity(grid, log_tilt.softmax(0), torch.stack([axis[1] - axis[0] for axis in axes]))

    def _log_joint(self, xt: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return _Noised(self, xt, alpha, sigma).log_joint

    def _noised(self, xt: Points, t: Time, schedule: Schedule) -> "_Noised":
        return _Noised(self, xt, schedule.alpha(t).to(xt), schedule.sigma(t).to(xt))


class _Noised:
    """Per point and component: the eigenvalues of C_k (b, k, d), log w_k N(xt; alpha m_k, C_k) (b, k), the component's
    score C_k^-1 (alpha m_k - xt) and its posterior mean m_k - alpha S_k score (b, k, d)."""

    def __init__(self, world: GaussianMixture, xt: Tensor, alpha: Tensor, sigma: Tensor):
        axes, d = world._axes.to(xt), xt.shape[1]
        offset = xt[:, None] - alpha[:, None, None] * world.means.to(xt)
        rotated = torch.einsum("kij,nki->nkj", axes, offset)
        self.variances = alpha[:, None, None] ** 2 * world._eigenvalues.to(xt) + sigma[:, None, None] ** 2
        mahalanobis = (rotated**2 / self.variances).sum(-1)
        log_norm = self.variances.log().sum(-1) + d * math.log(2 * math.pi)
        self.log_joint = world.weights.to(xt).log() - (mahalanobis + log_norm) / 2
        self.component_score = -torch.einsum("kij,nkj->nki", axes, rotated / self.variances)
        toward = torch.einsum("kij,nkj->nki", world.covs.to(xt), self.component_score)
        self.component_mean = world.means.to(xt) - alpha[:, None, None] * toward


@dataclass(frozen=True)
class GridDensity:
    """A density by quadrature: points (n, d), their probabilities (n,) and the spacing of each axis (d,).

    The trapezoid rule is spectrally accurate for smooth densities that vanish at the border.
    """

    points: Tensor
    probs: Tensor
    spacing: Tensor

    def mean(self) -> Tensor:
        """(d,)"""
        return self.probs @ self.points

    def cov(self) -> Tensor:
        """(d, d)"""
        centred = self.points - self.mean()
        return (self.probs[:, None] * centred).T @ centred

    def log_density(self) -> Tensor:
        """(n,), at the grid points."""
        return self.probs.log() - self.spacing.log().sum()

    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        """n points (n, d), spread evenly within their cells."""
        index = torch.multinomial(self.probs, n, replacement=True, generator=generator)
        jitter = torch.rand(n, len(self.spacing), generator=generator, dtype=self.points.dtype) - 0.5
        return self.points[index] + jitter * self.spacing

    def score(self, xt: Points, t: Time, schedule: Schedule) -> Points:
        """grad log of the noised density, sum over the grid; needs sigma well above the grid spacing."""
        alpha, sigma = schedule.at(t, like=xt)
        gap = alpha[:, :, None] * self.points.to(xt).T - xt[:, :, None]
        log_weight = self.probs.to(xt).log() - (gap**2).sum(1) / (2 * sigma**2)
        return torch.einsum("bn,bdn->bd", log_weight.softmax(1), gap) / sigma**2


def tilted_gaussian(cond: GaussianMixture, uncond: GaussianMixture, scale: float) -> GaussianMixture:
    """p(x | y)^scale p(x)^(1 - scale) of two single Gaussians: the precisions add, scale and 1 - scale times.

    Raises ValueError where either world has more than one component, or where no density results.
    """
    if len(cond.weights) > 1 or len(uncond.weights) > 1:
        raise ValueError("only single Gaussians have a tilt in closed form: use GaussianMixture.tilted")
    precision_c, precision_u = torch.linalg.inv(cond.covs[0]), torch.linalg.inv(uncond.covs[0])
    precision = scale * precision_c + (1 - scale) * precision_u
    if (torch.linalg.eigvalsh(precision) <= 0).any():
        raise ValueError(f"at scale {scale} the tilt cannot be normalised: its precision is not positive")
    cov = torch.linalg.inv(precision)
    mean = cov @ (scale * precision_c @ cond.means[0] + (1 - scale) * precision_u @ uncond.means[0])
    return GaussianMixture(cond.weights, mean[None], cov[None], cond.labels)


def archipelago() -> GaussianMixture:
    """2-D, three classes. Class 0 has a lonely island at (-2, 1) and a crowded one at (1.1, 1) beside class 1."""
    means = [[-2.0, 1.0], [1.1, 1.0], [2.0, 0.2], [0.9, 2.2], [-0.4, -1.8], [1.6, -1.6]]
    shapes = [(0.35, 0.25, 20.0), (0.35, 0.25, -30.0), (0.35, 0.25, 60.0)]
    shapes += [(0.3, 0.3, 0.0), (0.45, 0.25, 10.0), (0.25, 0.35, 0.0)]
    return GaussianMixture(
        weights=torch.tensor([0.15, 0.15, 0.2, 0.1, 0.25, 0.15], dtype=torch.float64),
        means=torch.tensor(means, dtype=torch.float64),
        covs=torch.stack([_ellipse(*shape) for shape in shapes]),
        labels=torch.tensor([0, 0, 1, 1, 2, 2]),
    )


def line2(m: float = 1.0, v: float = 0.25) -> GaussianMixture:
    """1-D, two classes: N(-m, v) and N(m, v), equally likely."""
    return GaussianMixture(
        weights=torch.full((2,), 0.5, dtype=torch.float64),
        means=torch.tensor([[-m], [m]], dtype=torch.float64),
        covs=torch.full((2, 1, 1), v, dtype=torch.float64),
        labels=torch.tensor([0, 1]),
    )


def ring(classes: int = 8) -> GaussianMixture:
    """2-D, one round island per class, evenly spaced on a circle of radius 2."""
    angle = 2 * math.pi * torch.arange(classes, dtype=torch.float64) / classes
    return GaussianMixture(
        weights=torch.full((classes,), 1 / classes, dtype=torch.float64),
        means=2 * torch.stack([angle.cos(), angle.sin()], dim=1),
        covs=(0.2**2 * torch.eye(2, dtype=torch.float64)).expand(classes, 2, 2),
        labels=torch.arange(classes),
    )


def _ellipse(std_x: float, std_y: float, degrees: float) -> Tensor:
    """Covariance (2, 2) with these standard deviations, turned anticlockwise."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    rotation = torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)
    variances = torch.tensor([std_x**2, std_y**2], dtype=torch.float64)
    return rotation @ torch.diag(variances) @ rotation.T
