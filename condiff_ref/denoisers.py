"""A denoiser is a pure function (xt, t) -> estimate of x0. Guidance and samplers speak only to denoisers."""

from .predictions import solve
from .schedules import Schedule
from .shapes import Data, Denoiser, Network, Time


def as_denoiser(network: Network, kind: str, schedule: Schedule) -> Denoiser:
    """Read a network's raw output as an estimate of x0. Conditions are bound before: `partial(unet, label=label)`."""

    def denoiser(xt: Data, t: Time) -> Data:
        x0, _ = solve(kind, network(xt, t), xt, t, schedule)
        return x0

    return denoiser


def clip_x0(denoiser: Denoiser, low: float = -1.0, high: float = 1.0) -> Denoiser:
    """Clamp the estimate of x0 to the range of the data. After guidance, not before: the two differ."""

    def clipped(xt: Data, t: Time) -> Data:
        return denoiser(xt, t).clamp(low, high)

    return clipped


class CallCounter:
    """Counts evaluations: `calls` of the denoiser, and `examples` over all of them."""

    def __init__(self, denoiser: Denoiser):
        self.denoiser = denoiser
        self.calls = 0
        self.examples = 0

    def __call__(self, xt: Data, t: Time) -> Data:
        self.calls += 1
        self.examples += len(xt)
        return self.denoiser(xt, t)
