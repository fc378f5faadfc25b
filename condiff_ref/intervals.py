"""How sure a measured number is: an interval for a share, and one for any statistic of samples."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Generator, Tensor


@dataclass(frozen=True)
class Interval:
    """A measured value, and the ends between which the number that it estimates lies with 95 % confidence."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def share(hits: float, n: float, level: float = 0.95) -> Interval:
    """hits / n with Wilson's score interval (Wilson 1927), which 0 of n and n of n do not shrink to a point.

    Raises ValueError for n = 0 and for hits outside 0 .. n.
    """
    if not 0 <= hits <= n or n == 0:
        raise ValueError(f"a share needs 0 <= hits <= n and n > 0, got {hits} of {n}")
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    center = (hits + z2 / 2) / (n + z2)
    half = (z2 * (hits * (n - hits) / n + z2 / 4)) ** 0.5 / (n + z2)
    # min and max: at 0 of n and n of n an end is the value itself, but for rounding
    return Interval(hits / n, min(center - half, hits / n), max(center + half, hits / n))


def bootstrap(
    statistic: Callable[..., float],
    *samples: Tensor,
    draws: int = 200,
    level: float = 0.95,
    generator: Generator | None = None,
) -> Interval:
    """statistic(*samples) with a bootstrap interval. Each sample (n_i, ...) is resampled by rows, independently of the
    others: what belongs together, such as images and their labels, must be columns of one sample.

    The interval is for the statistic's mean over samples of these sizes. A distance between samples grows when rows
    repeat, so that its plain percentile interval lies too high, often wholly above its value: here the draws are moved
    until their mean is the value. The statistic's own bias at this n stays, so compare at equal n.
    """
    value = statistic(*samples)
    draw = [statistic(*(_resample(s, generator) for s in samples)) for _ in range(draws)]
    deviation = torch.tensor(draw, dtype=torch.float64).sub_(sum(draw) / draws)
    low, high = (deviation.quantile(tail).item() for tail in ((1 - level) / 2, (1 + level) / 2))
    return Interval(value, value + low, value + high)


def _resample(sample: Tensor, generator: Generator | None) -> Tensor:
    device = sample.device if generator is None else generator.device
    rows = torch.randint(len(sample), (len(sample),), generator=generator, device=device)
    return sample[rows.to(sample.device)]
