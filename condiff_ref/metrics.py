"""What generated images are worth: of the right class, distributed like the data, neither copied nor all alike.

All of these numbers but the accuracy depend on how many samples they are computed from, and none is perfect for real
images against other real images. So `report` puts that value, at the same n, beside each.
"""

from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from . import data
from .intervals import Interval, bootstrap, share
from .judge import Judge
from .shapes import Features, Images, Labels

__all__ = [
    "Interval",
    "Judge",
    "bootstrap",
    "class_accuracy",
    "copies",
    "diversity",
    "energy_distance",
    "evaluate",
    "frechet_distance",
    "precision_recall",
    "report",
    "share",
]

Sample = Float[Tensor, "_ _"]  # rows of features; two samples of different widths get a message, not a type error
CHUNK = 256  # rows of a distance matrix in memory at once


def class_accuracy(judge: Judge, images: Images, labels: Tensor) -> Interval:
    """The share of images that the judge reads as their label, with Wilson's interval. The judge errs too:
    `judge.test_accuracy` is the share of real images that it reads right."""
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images but {len(labels)} labels: do they belong together?")
    return share((judge.classify(images) == labels.cpu()).sum().item(), len(labels))


def frechet_distance(a: Sample, b: Sample) -> float:
    """|mean_a - mean_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of samples (n, f) and (m, f): the squared Wasserstein
    distance of two Gaussians with their means and covariances S (Dowson & Landau 1982; Heusel et al. 2017, eq. 6).

    Biased upwards, by about 1/n. Raises ValueError for under two rows, unequal widths, or entries that are not finite.
    """
    _require_comparable(a, b, rows=2)
    a, b = a.double(), b.double()
    root_a, root_b = _root_cov(a), _root_cov(b)
    # The eigenvalues of S_a S_b are those of root_a S_b root_a, and their roots the singular values of root_b root_a:
    # real and not negative at any rank, with no digits lost in the square root of almost nothing.
    cross = torch.linalg.svdvals(root_b @ root_a).sum()
    traces = root_a.square().sum() + root_b.square().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + traces - 2 * cross).clamp(min=0).item()


def energy_distance(a: Sample, b: Sample) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| over all pairs of rows of (n, d) and (m, d), a row paired with itself too
    (Székely & Rizzo 2013, the V-statistic, no root): 0 only for equal distributions, 2 for a point at 0 against one
    at 1. Raises ValueError for an empty sample, unequal widths, or entries that are not finite."""
    _require_comparable(a, b)
    a, b = a.double(), b.double()
    return 2 * _mean_distance(a, b) - _mean_distance(a, a) - _mean_distance(b, b)


def precision_recall(real: Sample, fake: Sample, k: int = 3) -> tuple[Interval, Interval]:
    """The share of fake rows (m, f) within the support of the real ones (n, f), and the reverse; a support is the
    union of balls around a sample's rows that reach their k-th neighbours (Kynkäänniemi et al. 2019, section 3).

    Biased, by an amount that depends on n, m and f. Raises ValueError for k rows or fewer, unequal widths, or entries
    that are not finite.
    """
    _require_comparable(real, fake, rows=k + 1)
    real, fake = real.double(), fake.double()
    return _covered(fake, by=real, k=k), _covered(real, by=fake, k=k)


def copies(images: Tensor, train: Tensor, held_out: Tensor, quantile: float = 0.01) -> Interval:
    """The share of images as near to a training image, in pixels, as only the nearest `quantile` of held-out images
    are. Images as new as those have about that share; more is copying. Raises ValueError for images of unequal size,
    none of a kind, or pixels that are not finite.

    The ends are Wilson's for the ends of the threshold, which is uncertain itself: 1 % of 400 images are four.
    """
    images, train, held_out = (some.flatten(1) for some in (images, train, held_out))
    _require_comparable(images, train)
    _require_comparable(held_out, train)
    distance, reference = _nearest(images, train), _nearest(held_out, train)
    below = share(quantile * len(reference), len(reference))
    low, value, high = (
        share((distance <= reference.quantile(level)).sum().item(), len(distance))
        for level in (below.low, quantile, below.high)
    )
    return Interval(value.value, low.low, high.high)


def diversity(
    fake: Features,
    fake_labels: Labels,
    real: Float[Tensor, "n f"],
    real_labels: Int[Tensor, " n"],
    *,
    draws: int = 200,
    generator: Generator | None = None,
) -> Interval:
    """Mean distance between two fakes of a class over that between two real images of it, averaged over the fakes'
    classes, by a bootstrap within classes. 1 is as diverse as the data. Raises ValueError for a class of under two."""
    classes = fake_labels.unique().tolist()
    groups = [fake[fake_labels == c] for c in classes] + [real[real_labels == c] for c in classes]
    if min(map(len, groups)) < 2:
        raise ValueError("diversity needs two fakes and two real images of each class that the fakes have")

    def ratio(*groups: Tensor) -> float:
        spread = torch.stack([torch.pdist(group).mean() for group in groups])
        return (spread[: len(classes)] / spread[len(classes) :]).mean().item()

    return bootstrap(ratio, *groups, draws=draws, generator=generator)


def report(
    judge: Judge,
    images: Images,
    labels: Labels,
    train: tuple[Tensor, Tensor],
    held_out: Tensor,
    *,
    draws: int = 200,
    generator: Generator | None = None,
) -> dict[str, int | Interval]:
    """All numbers at once. `train`: the images and labels that the generator learnt from; `held_out`: images like them
    that it did not. Names that end in _real are of other real images in the generated ones' place.

    Distances compare n_compared images with as many real ones of the same classes: a difference in class frequencies,
    which whoever asked for the labels chose, is no fault of the generator.
    """
    labels, train_images, train_labels = labels.cpu(), train[0].cpu(), train[1].cpu()  # where the judge's features are
    images, held_out = images.cpu(), held_out.cpu()
    chosen, reals, others = _matched(labels, train_labels, generator)
    fake, real, other = (judge.features(x) for x in (images[chosen], train_images[reals], train_images[others]))
    precision, recall = precision_recall(real, fake)
    precision_real, recall_real = precision_recall(real, other)
    options = {"draws": draws, "generator": generator}
    return {
        "n": len(images),
        "n_compared": len(fake),
        "accuracy": class_accuracy(judge, images, labels),
        "accuracy_real": judge.test_accuracy,
        "fd": bootstrap(frechet_distance, fake, real, **options),
        "fd_real": bootstrap(frechet_distance, other, real, **options),
        "precision": precision,
        "precision_real": precision_real,
        "recall": recall,
        "recall_real": recall_real,
        "diversity": diversity(fake, labels[chosen], real, train_labels[reals], **options),
        "copies": copies(images, train_images, held_out),
    }


def evaluate(
    data_set: str, images: Images, labels: Labels, *, seed: int = 0, root: str | Path | None = None
) -> dict[str, int | Interval]:
    """The `report` on samples of "digits" or "mnist" by the judge of that data set.

    Raises ValueError for labels that are not classes and images that the judge cannot read, DataError without data.
    """
    if not ((labels >= 0) & (labels < 10)).all():
        raise ValueError(f"labels must be 0 to 9, these go from {labels.min()} to {labels.max()}")
    judge = Judge.digits() if data_set == "digits" else Judge.mnist()
    where = {} if data_set == "digits" else {"root": root}
    load = data.digits if data_set == "digits" else data.mnist
    held_out, _ = load("test", **where)
    held_out = held_out[:2000]  # enough for a threshold at 1 %, and five times quicker than all of MNIST
    return report(judge, images, labels, load("train", **where), held_out, generator=Generator().manual_seed(seed))


def _require_comparable(a: Tensor, b: Tensor, rows: int = 1) -> None:
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"samples of different widths: {tuple(a.shape)} and {tuple(b.shape)}")
    if min(len(a), len(b)) < rows:
        raise ValueError(f"each sample needs {rows} rows or more, got {len(a)} and {len(b)}")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("the samples hold NaN or infinite numbers")


def _root_cov(sample: Tensor) -> Tensor:
    """The symmetric square root (f, f) of a sample's covariance."""
    centered = sample - sample.mean(0)
    values, vectors = torch.linalg.eigh(centered.T @ centered / (len(sample) - 1))
    return vectors * values.clamp(min=0).sqrt() @ vectors.T  # rounding leaves some zeros a little below 0


def _mean_distance(a: Tensor, b: Tensor) -> float:
    return sum(_distances(part, b).sum().item() for part in a.split(CHUNK)) / (len(a) * len(b))


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # Not by matrix products, which are faster, but leave equal points about 1e-8 apart.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _covered(points: Tensor, by: Tensor, k: int) -> Interval:
    """The share of `points` in the support of `by`."""
    parts = (_distances(part, by) for part in by.split(CHUNK))
    radius = torch.cat([part.kthvalue(k + 1).values for part in parts])  # the first neighbour is the row itself
    hits = sum((_distances(part, by) <= radius).any(1).sum().item() for part in points.split(CHUNK))
    # At half the count, because the support is as random as the points: so this covered the mean over both samples in
    # 94 to 99 % of simulations (Gaussians in 4 and 16 dimensions, n = 300 and 1000), at the full count in 82 to 95 %.
    return share(hits / 2, len(points) / 2)


def _nearest(points: Tensor, among: Tensor) -> Tensor:
    """The distance (n,) of each point to the nearest `among` others."""
    return torch.cat([torch.cdist(part, among).amin(1) for part in points.split(CHUNK)])


def _matched(labels: Tensor, real_labels: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of fakes, of real images and of other real images: of each class as many of each, as many as there are."""
    parts = []
    for label in labels.unique():
        fakes, reals = ((some == label).nonzero()[:, 0] for some in (labels, real_labels))
        reals = reals[torch.randperm(len(reals), generator=generator)]
        n = min(len(fakes), len(reals) // 2)
        parts.append((fakes[:n], reals[:n], reals[n : 2 * n]))
    return tuple(torch.cat(rows) for rows in zip(*parts, strict=True))
