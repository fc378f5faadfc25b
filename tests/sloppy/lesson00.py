"""Wrong answers to lesson 00 that are not on file, as they come from somebody in a hurry: all must be refused."""

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

# --- 00.1 gmm_logp ----------------------------------------------------------------------------------------------------


def _pieces(x: Tensor, mu: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    offset = x[:, None] - mu
    return torch.einsum("nki,kij,nkj->nk", offset, torch.linalg.inv(S), offset), torch.logdet(S)


def density(x: Tensor, w: Tensor, mu: Tensor, S: Tensor) -> Tensor:
    distance, logdet = _pieces(x, mu, S)
    norm = torch.exp(-(distance + logdet + x.shape[1] * math.log(2 * math.pi)) / 2)
    return (w * norm).sum(1)


def base_two(x: Tensor, w: Tensor, mu: Tensor, S: Tensor) -> Tensor:
    distance, logdet = _pieces(x, mu, S)
    return torch.logsumexp(w.log() - (distance + logdet + x.shape[1] * math.log(2 * math.pi)) / 2, 1) / math.log(2)


def pi_alone(x: Tensor, w: Tensor, mu: Tensor, S: Tensor) -> Tensor:
    distance, logdet = _pieces(x, mu, S)
    return torch.logsumexp(w.log() - (distance + logdet + x.shape[1] * math.log(math.pi)) / 2, 1)


def nearest_only(x: Tensor, w: Tensor, mu: Tensor, S: Tensor) -> Tensor:
    distance, logdet = _pieces(x, mu, S)
    return (w.log() - (distance + logdet + x.shape[1] * math.log(2 * math.pi)) / 2).amax(1)


def dims_of_k(x: Tensor, w: Tensor, mu: Tensor, S: Tensor) -> Tensor:
    distance, logdet = _pieces(x, mu, S)
    return torch.logsumexp(w.log() - (distance + logdet + len(w) * math.log(2 * math.pi)) / 2, 1)


def clamped(x: Tensor, w: Tensor, mu: Tensor, S: Tensor) -> Tensor:
    return density(x, w, mu, S).clamp(min=1e-30).log()


def softmaxed_weights(x: Tensor, w: Tensor, mu: Tensor, S: Tensor) -> Tensor:
    distance, logdet = _pieces(x, mu, S)
    return torch.logsumexp(w.log_softmax(0) - (distance + logdet + x.shape[1] * math.log(2 * math.pi)) / 2, 1)


def detached(x: Tensor, w: Tensor, mu: Tensor, S: Tensor) -> Tensor:
    distance, logdet = _pieces(x.detach(), mu, S)
    return torch.logsumexp(w.log() - (distance + logdet + x.shape[1] * math.log(2 * math.pi)) / 2, 1)


# --- 00.2 autograd_score ----------------------------------------------------------------------------------------------


def averaged_twice(logp: Callable, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(logp(x).sum(), x)[0] / x.shape[1]


def times_logp(logp: Callable, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad((logp(x) ** 2).sum() / 2, x)[0]


def backward_on_x(logp: Callable, x: Tensor) -> Tensor:
    x.requires_grad = True
    logp(x).sum().backward()
    return x.grad


def detached_logp(logp: Callable, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    logp(x).detach().sum().backward()
    return x.grad


def tuple_returned(logp: Callable, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(logp(x).sum(), x)


def nothing_returned(logp: Callable, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    logp(x).sum().backward()


def forward_difference(logp: Callable, x: Tensor) -> Tensor:
    return torch.stack([(logp(x + 0.01 * e) - logp(x)) / 0.01 for e in torch.eye(x.shape[1]).to(x)], dim=1)


# --- 00.3 sample_gmm --------------------------------------------------------------------------------------------------


def _draw(w: Tensor, mu: Tensor, n: int, gen: Generator) -> tuple[Tensor, Tensor]:
    k = torch.multinomial(w, n, replacement=True, generator=gen)
    return k, torch.randn(n, mu.shape[1], generator=gen, dtype=mu.dtype)


def eigen_transposed(w: Tensor, mu: Tensor, S: Tensor, n: int, gen: Generator) -> tuple[Tensor, Tensor]:
    k, z = _draw(w, mu, n, gen)
    values, axes = torch.linalg.eigh(S)
    return mu[k] + torch.einsum("nji,nj->ni", axes[k], values[k].sqrt() * z), k


def eigen_no_root(w: Tensor, mu: Tensor, S: Tensor, n: int, gen: Generator) -> tuple[Tensor, Tensor]:
    k, z = _draw(w, mu, n, gen)
    values, axes = torch.linalg.eigh(S)
    return mu[k] + torch.einsum("nij,nj->ni", axes[k], values[k] * z), k


def k_first(w: Tensor, mu: Tensor, S: Tensor, n: int, gen: Generator) -> tuple[Tensor, Tensor]:
    k, z = _draw(w, mu, n, gen)
    return k, mu[k] + torch.einsum("nij,nj->ni", torch.linalg.cholesky(S)[k], z)


def fixed_counts(w: Tensor, mu: Tensor, S: Tensor, n: int, gen: Generator) -> tuple[Tensor, Tensor]:
    ends = (w.cumsum(0) * n).round().long()
    k = torch.searchsorted(ends, torch.arange(n), right=True).clamp(max=len(w) - 1)
    z = torch.randn(n, mu.shape[1], generator=gen, dtype=mu.dtype)
    return mu[k] + torch.einsum("nij,nj->ni", torch.linalg.cholesky(S)[k], z), k


def blended(w: Tensor, mu: Tensor, S: Tensor, n: int, gen: Generator) -> tuple[Tensor, Tensor]:
    """The weighted average of one draw from each component: a sum of random variables, not a mixture."""
    k, z = _draw(w, mu, n, gen)
    x = torch.einsum("k,kij,nj->ni", w, torch.linalg.cholesky(S), z)
    return x + w @ mu, k


def own_seed(w: Tensor, mu: Tensor, S: Tensor, n: int, gen: Generator) -> tuple[Tensor, Tensor]:
    k, z = _draw(w, mu, n, torch.Generator().manual_seed(0))
    return mu[k] + torch.einsum("nij,nj->ni", torch.linalg.cholesky(S)[k], z), k


def one_component(w: Tensor, mu: Tensor, S: Tensor, n: int, gen: Generator) -> tuple[Tensor, Tensor]:
    k = torch.multinomial(w, 1, generator=gen).expand(n)
    z = torch.randn(n, mu.shape[1], generator=gen, dtype=mu.dtype)
    return mu[k] + torch.einsum("nij,nj->ni", torch.linalg.cholesky(S)[k], z), k


def first_covariance(w: Tensor, mu: Tensor, S: Tensor, n: int, gen: Generator) -> tuple[Tensor, Tensor]:
    k, z = _draw(w, mu, n, gen)
    return mu[k] + z @ torch.linalg.cholesky(S[0]).T, k


def always_single(w: Tensor, mu: Tensor, S: Tensor, n: int, gen: Generator) -> tuple[Tensor, Tensor]:
    k, _ = _draw(w, mu, n, gen)
    z = torch.randn(n, mu.shape[1], generator=gen, dtype=torch.float32)
    return (mu[k] + torch.einsum("nij,nj->ni", torch.linalg.cholesky(S)[k], z.to(mu))).float(), k


# --- 00.4 energy_distance ---------------------------------------------------------------------------------------------


def _mean(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vector_norm(a[:, None] - b, dim=2).mean()


def rows_as_features(x: Tensor, y: Tensor) -> float:
    return float(2 * _mean(x, y) - _mean(x.T, x.T) - _mean(y.T, y.T))


def summed(x: Tensor, y: Tensor) -> float:
    def total(a: Tensor, b: Tensor) -> Tensor:
        return torch.linalg.vector_norm(a[:, None] - b, dim=2).sum()

    return float(2 * total(x, y) - total(x, x) - total(y, y))


def divided_by_n(x: Tensor, y: Tensor) -> float:
    """Every table is divided by N^2."""

    def mean(a: Tensor, b: Tensor) -> Tensor:
        return torch.linalg.vector_norm(a[:, None] - b, dim=2).sum() / len(x) ** 2

    return float(2 * mean(x, y) - mean(x, x) - mean(y, y))


def averaged_over_dims(x: Tensor, y: Tensor) -> float:
    def mean(a: Tensor, b: Tensor) -> Tensor:
        return (a[:, None] - b).square().mean(2).sqrt().mean()

    return float(2 * mean(x, y) - mean(x, x) - mean(y, y))


def upper_half(x: Tensor, y: Tensor) -> float:
    return float(2 * torch.cdist(x, y).mean() - torch.pdist(x).mean() - torch.pdist(y).mean())


def pdist_half(x: Tensor, y: Tensor) -> float:
    """Each pair once, but divided as if twice."""
    own = torch.pdist(x).sum() / len(x) ** 2 + torch.pdist(y).sum() / len(y) ** 2
    return float(2 * torch.cdist(x, y).mean() - own)


def absolute(x: Tensor, y: Tensor) -> float:
    return float((_mean(x, y) - _mean(x, x)).abs() + (_mean(x, y) - _mean(y, y)).abs())


def table(x: Tensor, y: Tensor) -> Tensor:
    return 2 * torch.cdist(x, y) - torch.cdist(x, x).mean() - torch.cdist(y, y).mean()


def negated(x: Tensor, y: Tensor) -> float:
    return float(_mean(x, x) + _mean(y, y) - 2 * _mean(x, y))


# --- 00.5 my_test -----------------------------------------------------------------------------------------------------


def returns_a_bool(q_sample: Callable) -> bool:
    abar, t = torch.linspace(1, 0.1, 10).double(), torch.tensor([9, 1, 4])
    x0, eps = torch.randn(2, 3, 2, dtype=torch.float64)
    right = abar[t].sqrt()[:, None] * x0 + (1 - abar[t]).sqrt()[:, None] * eps
    return torch.allclose(q_sample(x0, t, eps, abar), right)


def prints_only(q_sample: Callable) -> None:
    abar, t = torch.linspace(1, 0.1, 10).double(), torch.tensor([9, 1, 4])
    print(q_sample(torch.ones(3, 2).double(), t, torch.zeros(3, 2).double(), abar))


def no_axis(q_sample: Callable) -> None:
    abar, t = torch.linspace(1, 0.1, 10).double(), torch.tensor([9, 1, 4])
    x0, eps = torch.randn(2, 3, 2, dtype=torch.float64)
    assert torch.allclose(q_sample(x0, t, eps, abar), abar[t].sqrt() * x0 + (1 - abar[t]).sqrt() * eps)


def argument_forgotten(q_sample: Callable) -> None:
    t = torch.tensor([9, 1, 4])
    x0, eps = torch.randn(2, 3, 2)
    assert q_sample(x0, t, eps).shape == x0.shape


def exact_equality(q_sample: Callable) -> None:
    abar, t = torch.linspace(1, 0.1, 10).double(), torch.tensor([9, 1, 4])
    x0, eps = torch.randn(2, 3, 2, dtype=torch.float64)
    right = (1 - abar[t]).sqrt()[:, None] * eps + abar[t].sqrt()[:, None] * x0
    assert (q_sample(x0, t, eps, abar) == right).all()


def tight_statistics(q_sample: Callable) -> None:
    abar = torch.linspace(1, 0.1, 10).double()
    xt = q_sample(torch.randn(50, 2).double(), torch.full((50,), 5), torch.randn(50, 2).double(), abar)
    assert abs(xt.std() - 1) < 1e-3


def wide_tolerance(q_sample: Callable) -> None:
    abar, t = torch.linspace(1, 0.1, 10).double(), torch.tensor([9, 1, 4])
    x0, eps = torch.randn(2, 3, 2, dtype=torch.float64)
    right = abar[t].sqrt()[:, None] * x0 + (1 - abar[t]).sqrt()[:, None] * eps
    assert torch.allclose(q_sample(x0, t, eps, abar), right, atol=10)


def one_minus_root(q_sample: Callable) -> None:
    abar, t = torch.linspace(1, 0.1, 10).double(), torch.tensor([9, 1, 4])
    x0, eps = torch.randn(2, 3, 2, dtype=torch.float64)
    right = abar[t].sqrt()[:, None] * x0 + (1 - abar[t].sqrt())[:, None] * eps
    assert torch.allclose(q_sample(x0, t, eps, abar), right)


def swallowed(q_sample: Callable) -> None:
    try:
        abar = torch.linspace(1, 0.1, 10).double()
        assert (q_sample(torch.ones(3).double(), torch.tensor([9, 1, 4]), torch.zeros(3).double(), abar) == 0).all()
    except AssertionError:
        print("the test failed")


# Read by a person: these are told that something is wrong, and too little of what.
WEAK = {
    "own terms over columns",
    "every table over N^2",
    "the square of logp differentiated",
    "the largest component for the sum",
    "own copy with 1 - root",
}

SLOPPY = (
    ("00.1", "the density itself", (density,)),
    ("00.1", "logarithm to the base 2", (base_two,)),
    ("00.1", "pi for 2 pi", (pi_alone,)),
    ("00.1", "the largest component for the sum", (nearest_only,)),
    ("00.1", "K log(2 pi) for D log(2 pi)", (dims_of_k,)),
    ("00.1", "clamp before the log", (clamped,)),
    ("00.1", "weights through a softmax", (softmaxed_weights,)),
    ("00.1", "x detached", (detached,)),
    ("00.2", "divided by D", (averaged_twice,)),
    ("00.2", "the square of logp differentiated", (times_logp,)),
    ("00.2", "backward on the caller's x", (backward_on_x,)),
    ("00.2", "logp detached", (detached_logp,)),
    ("00.2", "the tuple of autograd.grad", (tuple_returned,)),
    ("00.2", "no return", (nothing_returned,)),
    ("00.2", "coarse differences", (forward_difference,)),
    ("00.3", "eigenvectors transposed", (eigen_transposed,)),
    ("00.3", "eigenvalues without a root", (eigen_no_root,)),
    ("00.3", "k and x exchanged", (k_first,)),
    ("00.3", "fixed counts, sorted", (fixed_counts,)),
    ("00.3", "a weighted average of the components", (blended,)),
    ("00.3", "a generator of its own", (own_seed,)),
    ("00.3", "one component for all points", (one_component,)),
    ("00.3", "the first component's covariance for all", (first_covariance,)),
    ("00.3", "always float32", (always_single,)),
    ("00.4", "own terms over columns", (rows_as_features,)),
    ("00.4", "sums for means", (summed,)),
    ("00.4", "every table over N^2", (divided_by_n,)),
    ("00.4", "distances averaged over D", (averaged_over_dims,)),
    ("00.4", "pdist, averaged", (upper_half,)),
    ("00.4", "pdist, each pair once over N^2", (pdist_half,)),
    ("00.4", "absolute values of the two halves", (absolute,)),
    ("00.4", "a table of numbers", (table,)),
    ("00.4", "the opposite sign", (negated,)),
    ("00.5", "returns a bool", (returns_a_bool,)),
    ("00.5", "prints and asserts nothing", (prints_only,)),
    ("00.5", "no axis for the coefficients", (no_axis,)),
    ("00.5", "abar not passed", (argument_forgotten,)),
    ("00.5", "== of floating-point numbers", (exact_equality,)),
    ("00.5", "statistics with a tight tolerance", (tight_statistics,)),
    ("00.5", "tolerance of 10", (wide_tolerance,)),
    ("00.5", "own copy with 1 - root", (one_minus_root,)),
    ("00.5", "its own assertion swallowed", (swallowed,)),
)
