"""The shapes of the course's vocabulary, as types.

b batch, *d any data shape, k classes or components, n points or tokens, e width, f features.
The tests check them with beartype (`--jaxtyping-packages`); learners pay nothing for them.
"""

from collections.abc import Callable

from jaxtyping import Float, Int
from torch import Tensor

Data = Float[Tensor, "b *d"]  # x0, eps, xt or an estimate of one of them
Time = Float[Tensor, " b"]  # 0 = data, 1 = noise; one entry per example, always
Labels = Int[Tensor, " b"]  # class ids
Images = Float[Tensor, "b c h w"]  # pixels in [-1, 1]
Points = Float[Tensor, "b d"]  # points of the exact world
PerExample = Float[Tensor, " b"]  # one number per example, such as a log-probability
PerClass = Float[Tensor, "b k"]
Features = Float[Tensor, "b f"]
Times = Float[Tensor, " n"]  # a decreasing time grid
Betas = Float[Tensor, " t"]  # DDPM's integer table

Denoiser = Callable[[Tensor, Tensor], Tensor]  # (xt, t) -> estimate of x0
Network = Callable[[Tensor, Tensor], Tensor]  # (xt, t) -> raw output of its own kind
LogProb = Callable[[Tensor, Tensor], Tensor]  # (xt, t) -> log p(y | xt), one number per example
Step = Callable[[Denoiser, Tensor, Tensor, Tensor], Tensor]  # (denoiser, xt, t, s) -> xs


def pad(per_example: Tensor, like: Tensor) -> Tensor:
    """(b,) -> (b, 1, ..., 1) with as many axes as `like`, so that it multiplies a batch of any shape."""
    return per_example.reshape(-1, *[1] * (like.ndim - 1))
