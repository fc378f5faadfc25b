"""Exercises of lesson 00: densities, scores by autograd, samples, a distance between distributions, tests."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Generator, Tensor

from .compare import close, plain
from .draws import integer, randn
from .exercise import Answer, Exercise, Fact, Mistake, Wrong, need
from .guard import Failed
from .lesson01 import Q_SAMPLE
from .testing import test_exercise

# --- the reference answers, as the solutions show them ----------------------------------------------------------------


def gmm_logp(x: Tensor, w: Tensor, mu: Tensor, S: Tensor) -> Tensor:
    """log p(x) of the Gaussian mixture p = sum_k w_k N(mu_k, S_k), one number per point, differentiable in x.

    x (N, D), weights w (K,) that add up to 1, means mu (K, D), covariances S (K, D, D) -> (N,).
    """
    offset = x[:, None] - mu  # (N, K, D): every point against every component
    distance = torch.einsum("nki,kij,nkj->nk", offset, torch.linalg.inv(S), offset)
    log_norm = x.shape[1] * math.log(2 * math.pi) + torch.logdet(S)
    return torch.logsumexp(w.log() - (distance + log_norm) / 2, dim=1)


def autograd_score(logp: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The score, grad log p, at each of the points: logp maps points (N, D) to (N,). x (N, D) -> (N, D).

    x stays as it was, and the result is a plain value without a graph.
    """
    x = x.detach().requires_grad_()
    return torch.autograd.grad(logp(x).sum(), x)[0]


def sample_gmm(w: Tensor, mu: Tensor, S: Tensor, n: int, gen: Generator) -> tuple[Tensor, Tensor]:
    """n points x (n, D) of the mixture sum_k w_k N(mu_k, S_k), and the component k (n,) that each comes from.

    w (K,), mu (K, D), S (K, D, D). The points are independent, x has the dtype of mu, and gen draws all that is random.
    """
    k = torch.multinomial(w, n, replacement=True, generator=gen)
    z = torch.randn(n, mu.shape[1], generator=gen, dtype=mu.dtype)
    factor = torch.linalg.cholesky(S)  # S = factor @ factor.T
    return mu[k] + torch.einsum("nij,nj->ni", factor[k], z), k


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'|, with Euclidean distances, from samples x (N, D) and y (M, D).

    Each mean runs over all pairs of rows, a row paired with itself too. The result is a Python float.
    """

    def mean_distance(a: Tensor, b: Tensor) -> Tensor:
        return torch.linalg.vector_norm(a[:, None] - b, dim=2).mean()

    return float(2 * mean_distance(x, y) - mean_distance(x, x) - mean_distance(y, y))


def my_test(q_sample: Callable) -> None:
    """Raise an AssertionError if q_sample(x0, t, eps, abar) is not the one of formula 01.2; else return None.

    A right one gives sqrt(abar_t) x0 + sqrt(1 - abar_t) eps, for x0, eps (B, ...), integer t (B,), abar (T + 1,).
    """
    abar = torch.linspace(1, 0.1, 10, dtype=torch.float64)
    t, one = torch.tensor([9, 1, 4, 7]), torch.ones(4, 1, dtype=torch.float64)
    signal, noise = q_sample(one, t, 0 * one, abar), q_sample(0 * one, t, one, abar)
    assert (one == 1).all(), "it must not change x0"
    assert torch.allclose(signal[:, 0] ** 2, abar[t]), "of variance 1, abar[t] must be left, with each example's own t"
    assert torch.allclose(signal**2 + noise**2, one), "the noise must fill up the variance to 1"


# --- what several exercises need --------------------------------------------------------------------------------------


def _tried(answer: Answer, *args: object) -> object:
    """A result as plain data, or the name of the error."""
    try:
        return plain(answer(*args))
    except Failed as error:
        return type(error.__cause__ or error).__name__


def _mixture(g: Generator, K: int, D: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, means and covariances that nothing about is special."""
    w = 0.3 + torch.rand(K, generator=g, dtype=torch.float64)
    factor = randn(g, K, D, D)
    return w / w.sum(), 2 * randn(g, K, D), factor @ factor.mT + 0.3 * torch.eye(D, dtype=torch.float64)


def _double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _turned(angle: float) -> Tensor:
    return _double(math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle)).view(2, 2)


def _numbers(values: Tensor) -> str:
    return "[" + ", ".join(_numbers(v) if v.ndim else f"{float(v):.3g}" for v in values) + "]"


# --- 00.1 gmm_logp ----------------------------------------------------------------------------------------------------


def _logp_inputs(g: Generator) -> dict:
    w, mu, S = _mixture(g, 3, 2)
    return {"gmm_logp": dict(x=2 * randn(g, 5, 2), w=w, mu=mu, S=S)}


def _one() -> Tensor:
    return torch.ones(1, dtype=torch.float64)


def _logp_normal(answer: Answer, g: Generator) -> None:
    for D in (1, 2, 3):
        x = randn(g, 4, D)
        got = answer(x, _one(), torch.zeros(1, D).double(), torch.eye(D).double()[None])
        right = _double(*(-sum(v * v / 2 + 0.9189385332046727 for v in row) for row in x.tolist()))
        _density(got, right, f"one component N(0, I) in D = {D}: its log-density is known, and is not this")


def _density(got: Tensor, right: Tensor, message: str) -> None:
    """need(), which also says so where all points are off by one number."""
    shift = got - right if got.shape == right.shape else None
    if shift is not None and not close(got.detach(), right) and close(shift.detach(), shift.mean().expand_as(shift)):
        raise Wrong(f"{message}: all points are off by {float(shift.mean()):+.5g}, so a constant is wrong")
    need(got, right, message)


def _logp_width(answer: Answer, g: Generator) -> None:
    """At its mean a component of standard deviations s has the density 1 / prod(s sqrt(2 pi))."""
    spread = 0.3 + 3 * torch.rand(3, generator=g, dtype=torch.float64)
    mu = randn(g, 1, 3)
    got = answer(mu.clone(), _one(), mu, (spread**2).diag()[None])
    right = _double(-math.fsum(math.log(s * 2.5066282746310002) for s in spread.tolist()))
    what = f"at the mean of one component with standard deviations {_numbers(spread)}"
    need(got, right, f"{what}: the wider a component, the lower its peak, by the product of the three; not so here")


def _logp_ellipse(answer: Answer, g: Generator) -> None:
    """One standard deviation along an axis of an ellipse costs 1/2, along each axis the same."""
    spread, angle = _double(0.4, 2.5), 0.3 + torch.rand((), generator=g).item()
    axes = _turned(angle)
    S, mu = axes @ (spread**2).diag() @ axes.T, randn(g, 1, 2)
    for n in (1, 2):
        got = answer(torch.cat([mu, mu + n * spread[:, None] * axes.T]), _one(), mu, S[None])
        cost = got[0] - got[1:]
        if not close(plain(cost), _double(n * n / 2, n * n / 2)):
            raise Wrong(
                f"{n} standard deviation{'s' * (n > 1)} away from the mean, along the short and the long axis of an "
                f"ellipse, log p must have fallen equally; yours has fallen by {_numbers(cost.detach())}",
                expected=f"{n * n / 2} along both",
            )


def _logp_weights(answer: Answer, g: Generator) -> None:
    """A component cut into two equal ones, of weights v and 1 - v, is the same density."""
    _, mu, S = _mixture(g, 1, 2)
    x, v = randn(g, 4, 2), 0.1 + 0.3 * torch.rand((), generator=g).item()
    whole = answer(x, _one(), mu, S)
    parts = answer(x, _double(v, 1 - v), mu.expand(2, 2).clone(), S.expand(2, 2, 2).clone())
    message = f"one component counted as two equal ones, of weights {v:.2f} and {1 - v:.2f}, must stay the same density"
    need(parts, whole.detach(), message)
    far = torch.cat([mu, mu + 200])
    got = answer(far, _double(v, 1 - v), far, S.expand(2, 2, 2).clone())
    ratio = float(got[1] - got[0])
    if not math.isclose(ratio, math.log((1 - v) / v), rel_tol=1e-6):
        raise Wrong(
            f"two far islands of one shape, of weights {v:.2f} and {1 - v:.2f}: the density at their means must be as "
            f"the weights, 1 to {(1 - v) / v:.3g}; yours is as 1 to {math.exp(min(ratio, 50)):.3g}"
        )


def _logp_normalised(answer: Answer, g: Generator) -> None:
    w, mu, _ = _mixture(g, 3, 1)
    S = (0.3 + torch.rand(3, generator=g, dtype=torch.float64)).view(3, 1, 1)
    grid = torch.linspace(-25, 25, 4001, dtype=torch.float64)
    total = float(answer(grid[:, None], w, mu, S).exp().sum() * (grid[1] - grid[0]))
    if not math.isclose(total, 1, rel_tol=1e-6):
        raise Wrong(f"three components in one dimension: your density has the area {total:.6g}, and not 1")


def _logp_far(answer: Answer, g: Generator) -> None:
    """Far out the nearest component alone counts: its logarithm is a parabola."""
    v = 0.2 + 0.6 * torch.rand((), generator=g).item()
    x, mu = torch.tensor([[1000.0], [-1000.0]]).double(), torch.tensor([[-2.0], [2.0]]).double()
    got = answer(x, _double(v, 1 - v), mu, torch.ones(2, 1, 1).double())
    if not got.isfinite().all():
        raise Wrong(f"at |x| = 1000 log p is {_numbers(got.detach())}: exp() of about -500000 is 0 in a computer")
    right = _double(math.log(1 - v), math.log(v)) - 998**2 / 2 - math.log(2 * math.pi) / 2
    need(got, right, "at |x| = 1000 log p must have fallen as the nearer of two components has", rtol=1e-9)


def _logp_library(answer: Answer, g: Generator) -> None:
    """torch.distributions, with as many points as components (as many as dimensions, too)."""
    for N, K, D in ((4, 4, 2), (3, 3, 3), (6, 2, 3), (1, 4, 1)):
        w, mu, S = _mixture(g, K, D)
        x = randn(g, N, D)
        parts = torch.distributions.MultivariateNormal(mu, S)
        known = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(w), parts)
        message = f"N = {N} points, K = {K} components, D = {D}: torch.distributions has other values"
        _density(answer(x, w, mu, S), known.log_prob(x), message)


def _logp_gradient(answer: Answer, g: Generator) -> None:
    """Round, in one dimension each: (mu - x) / s^2."""
    mu, x = randn(g, 1, 2), randn(g, 3, 2).requires_grad_()
    got = answer(x, _one(), mu, 4 * torch.eye(2).double()[None])
    if not got.requires_grad:
        raise Wrong("autograd finds no way from the result to x (no_grad, detach, item, numpy?): 00.2 needs one")
    (slope,) = torch.autograd.grad(got.sum(), x)
    need(slope, (mu - x.detach()) / 4, "the slope of log N(mu, 4 I) is not that of a Gaussian")


def _logp_by(
    total: Callable[[Tensor], Tensor] = lambda joint: joint.logsumexp(1),
    *,
    weigh: Callable[[Tensor], Tensor] = torch.log,
    spread: Callable[[Tensor], Tensor] = lambda S: S,
    inverse: Callable[[Tensor], Tensor] = torch.linalg.inv,
    exponent: Callable[[Tensor], Tensor] = lambda distance: distance / 2,
    half_log_det: float = 0.5,
    dims: Callable[[int], float] = float,
) -> Callable:
    def gmm_logp(x: Tensor, w: Tensor, mu: Tensor, S: Tensor) -> Tensor:
        S = spread(S)
        offset = x[:, None] - mu
        distance = torch.einsum("nki,kij,nkj->nk", offset, inverse(S), offset)
        constant = dims(x.shape[1]) / 2 * math.log(2 * math.pi) + half_log_det * torch.logdet(S)
        return total(weigh(w) - exponent(distance) - constant)

    return gmm_logp


def _logp_paired(x: Tensor, w: Tensor, mu: Tensor, S: Tensor) -> Tensor:
    offset = x - mu
    distance = torch.einsum("ki,kij,kj->k", offset, torch.linalg.inv(S), offset)
    return w.log() - (distance + x.shape[1] * math.log(2 * math.pi) + torch.logdet(S)) / 2


def _logp_loop(x: Tensor, w: Tensor, mu: Tensor, S: Tensor) -> Tensor:
    joint = []
    for weight, mean, cov in zip(w, mu, S, strict=True):
        L = torch.linalg.cholesky(cov)
        z = torch.linalg.solve_triangular(L, (x - mean).T, upper=False)
        joint.append(weight.log() - (z**2).sum(0) / 2 - (L.diagonal() * math.sqrt(2 * math.pi)).log().sum())
    return torch.logsumexp(torch.stack(joint), dim=0)


def _logp_eigen(x: Tensor, w: Tensor, mu: Tensor, S: Tensor) -> Tensor:
    """In double precision, with the largest term taken out by hand."""
    values, axes = torch.linalg.eigh(S.double())
    along = ((x.double()[:, None, :] - mu)[:, :, None, :] @ axes)[:, :, 0]
    joint = w.double().log() - ((along**2 / values) + (2 * math.pi * values).log()).sum(-1) / 2
    top = joint.max(1, keepdim=True).values
    return (top[:, 0] + (joint - top).exp().sum(1).log()).to(x.dtype)


def _logp_torch(x: Tensor, w: Tensor, mu: Tensor, S: Tensor) -> Tensor:
    return (torch.distributions.MultivariateNormal(mu, S).log_prob(x[:, None]) + w.log()).logsumexp(-1)


def _logp_probe(answer: Answer, g: Generator) -> object:
    w, mu, S = _mixture(g, 4, 2)
    far = torch.full((2, 2), 1e3).double()
    return [_tried(answer, randn(g, 4, 2), w, mu, S), _tried(answer, far, w, mu, S)]


GMM_LOGP = Exercise(
    id="00.1",
    names=("gmm_logp",),
    references=(gmm_logp,),
    inputs=_logp_inputs,
    batch=("x",),
    facts=(
        Fact(
            "one standard normal is right, in 1 to 3 dimensions",
            _logp_normal,
            ("a constant or a sign: look at each of the three terms in turn"),
        ),
        Fact("a wide component has a low peak", _logp_width, "the determinant of S: of which sign, and which power?"),
        Fact("equal steps in standard deviations cost equally", _logp_ellipse, "how does S enter the exponent?"),
        Fact(
            "the weights count",
            _logp_weights,
            ("a weight multiplies the density: what does that make of its logarithm?"),
        ),
        Fact("the density has the area 1", _logp_normalised, "a sum of densities, each with its weight"),
        Fact("stays finite far away", _logp_far, "take the largest term out before exp: a torch function does"),
        Fact(
            "agrees with torch.distributions, N = K too",
            _logp_library,
            "points and components need an axis each: (N, 1, D) and (K, D)",
        ),
        Fact("autograd can differentiate it", _logp_gradient, "torch functions from x to the result, and nothing else"),
    ),
    mistakes=(
        Mistake(
            "log of a sum of exp",
            "You take log(sum(exp)): at |x| = 1000 every exp() is 0, and log p becomes -inf.",
            (_logp_by(lambda joint: joint.exp().sum(1).log()),),
        ),
        Mistake(
            "no weights",
            "The weights are missing: one component alone is right, because log 1 = 0, and a mixture is off.",
            (_logp_by(weigh=torch.zeros_like),),
        ),
        Mistake(
            "w for log w",
            "You add the weights w as they are, beside logarithms: there a weight enters as its logarithm.",
            (_logp_by(weigh=lambda w: w),),
        ),
        Mistake(
            "no log-determinant",
            "The log-determinant of S is missing: each component is off by a constant of its own, so that wide ones "
            "are as high as narrow ones.",
            (_logp_by(half_log_det=0),),
        ),
        Mistake(
            "log-determinant not halved",
            "The log-determinant counts in full: the density has the square root of det S below the line.",
            (_logp_by(half_log_det=1),),
        ),
        Mistake(
            "log-determinant added",
            "The log-determinant has the wrong sign: wide components come out high, where they must be low.",
            (_logp_by(half_log_det=-0.5),),
        ),
        Mistake(
            "one log 2 pi",
            "The constant log(2 pi) / 2 is there once: each of the D dimensions brings one.",
            (_logp_by(dims=lambda D: 1.0),),
        ),
        Mistake(
            "no log 2 pi",
            "The constant with 2 pi is missing: the shape is right, but the density does not have the area 1.",
            (_logp_by(dims=lambda D: 0.0),),
        ),
        Mistake(
            "S for its inverse",
            "S stands in the exponent where its inverse belongs: with S = I nobody sees it, and an ellipse is long "
            "where it should be short.",
            (_logp_by(inverse=lambda S: S),),
        ),
        Mistake(
            "exponent not halved",
            "The squared distance is not halved: your islands are narrower than S says.",
            (_logp_by(exponent=lambda distance: distance),),
        ),
        Mistake(
            "distance not squared",
            "You take the distance where its square is due: your tails fall like exp(-|x|), not like a Gaussian's.",
            (_logp_by(exponent=lambda distance: distance.sqrt() / 2),),
        ),
        Mistake(
            "diagonal only",
            "You use only the diagonal of S: the ellipses lose their tilt.",
            (_logp_by(spread=lambda S: torch.diag_embed(S.diagonal(dim1=-2, dim2=-1))),),
        ),
        Mistake(
            "mean of the logarithms",
            "You average the components' logarithms with the weights: a mixture adds up densities, and takes the "
            "logarithm after that.",
            (
                lambda x, w, mu, S: _logp_by(weigh=torch.zeros_like, total=lambda joint: (w * joint).sum(1))(
                    x, w, mu, S
                ),
            ),
        ),
        Mistake(
            "sum over the points",
            "You sum over the points and not over the components: one number per component came back.",
            (_logp_by(lambda joint: joint.logsumexp(0)),),
        ),
        Mistake(
            "point n with component n",
            "x - mu pairs point n with component n: an error for most shapes, and one for N = K that nobody sees.",
            (_logp_paired,),
        ),
    ),
    alternatives=((_logp_loop,), (_logp_eigen,), (_logp_torch,)),
    hints=(
        "Write log(w_k N(x; mu_k, S_k)) as one table (N, K) with four terms, then join the K columns. Which torch "
        "function adds up in the space of logarithms?",
        "log w_k - (x - mu_k)^T S_k^-1 (x - mu_k) / 2 - D log(2 pi) / 2 - log det S_k / 2, then logsumexp over k.",
    ),
    hides=("mixture.GaussianMixture.log_prob",),
    probe=_logp_probe,
)

# --- 00.2 autograd_score ----------------------------------------------------------------------------------------------

LogP = Callable[[Tensor], Tensor]


def _mixture_logp(g: Generator, K: int, D: int) -> LogP:
    w, mu, S = _mixture(g, K, D)
    return lambda x: gmm_logp(x, w.to(x), mu.to(x), S.to(x))


def _score_inputs(g: Generator) -> dict:
    return {"autograd_score": dict(logp=_mixture_logp(g, 4, 3), x=2 * randn(g, 5, 3))}


def _score_gaussian(answer: Answer, g: Generator) -> None:
    """N(m, v I): the score is (m - x) / v."""
    m, v = randn(g, 3), 0.5 + torch.rand((), generator=g).item()
    x = randn(g, 5, 3)
    got = answer(lambda x: -((x - m) ** 2).sum(1) / (2 * v) - 1.5 * math.log(2 * math.pi * v), x.clone())
    message = f"one round Gaussian of variance {v:.3g}, 5 points in 3 dimensions: its score is known, and is not this"
    need(got, (m - x) / v, message + _ratio(got, (m - x) / v))


def _ratio(got: object, right: Tensor) -> str:
    """ ", ..." where all entries share one factor."""
    if not isinstance(got, Tensor) or got.shape != right.shape or not got.any():
        return ""
    got = got.detach()
    ratio = (got * right).sum(1) / (right * right).sum(1)
    if close(got, right):
        return ""
    if not close(got, ratio[:, None] * right):
        return " (nearly right, but autograd gives all digits)" if close(got, right, 0.05, 0.02) else ""
    if close(ratio, ratio[:1].expand_as(ratio)):
        return f" (it is {float(ratio[0]):.4g} times that)"
    return " (its direction is right, its length is not, and differently so at each point)"


def _score_differences(answer: Answer, g: Generator) -> None:
    logp, x, h = _mixture_logp(g, 3, 2), 2 * randn(g, 4, 2), 1e-4
    steps = h * torch.eye(2).double()
    right = torch.stack([(logp(x + step) - logp(x - step)) / (2 * h) for step in steps], dim=1)
    got = answer(logp, x.clone())
    need(got, right, "a mixture: a tiny step changes log p otherwise" + _ratio(got, right), rtol=1e-5, atol=1e-6)


def _score_constant(answer: Answer, g: Generator) -> None:
    """The reason why scores are used: the normaliser of p drops out."""
    logp, x, c = _mixture_logp(g, 3, 2), randn(g, 4, 2), 1 + 3 * torch.rand((), generator=g).item()
    one, two = answer(logp, x.clone()), answer(lambda x: logp(x) + c, x.clone())
    if not close(plain(one), plain(two)):
        raise Wrong(
            f"with p multiplied by {math.exp(c):.3g} everywhere your result changes: the score of a density must not "
            "depend on its normaliser"
        )


def _score_uphill(answer: Answer, g: Generator) -> None:
    logp, x = _mixture_logp(g, 3, 2), 2 * randn(g, 6, 2)
    got = plain(answer(logp, x.clone()))
    step = 1e-5 * got / (1 + got.norm(dim=-1, keepdim=True))
    down = logp(x + step) < logp(x)
    if down.any():
        raise Wrong(f"a small step along your score makes {int(down.sum())} of 6 points less likely: it must be uphill")


def _score_copies(answer: Answer, g: Generator) -> None:
    logp, x = _mixture_logp(g, 3, 2), randn(g, 1, 2)
    one, many = plain(answer(logp, x.clone())), plain(answer(logp, x.repeat(7, 1)))
    if many.shape != (7, 2):
        raise Wrong(f"for 7 points in 2 dimensions the result has shape {tuple(many.shape)}: each point has a score")
    ratio = float(many[0].norm() / one[0].norm())
    if not close(many, one.expand(7, 2)):
        raise Wrong(
            f"the same point 7 times in a batch: its score is then {ratio:.4g} times what it is alone (1/7 is "
            f"{1 / 7:.4g}); points must not share it out"
        )


def _score_by(
    of: Callable[[Tensor], Tensor] = torch.sum, after: Callable = lambda s, x: s, graph: bool = False
) -> Callable:
    def autograd_score(logp: LogP, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (score,) = torch.autograd.grad(of(logp(x)), x, create_graph=graph)
        return after(score, x)

    return autograd_score


def _score_flag(logp: LogP, x: Tensor) -> Tensor:
    x.requires_grad_()
    return torch.autograd.grad(logp(x).sum(), x)[0]


def _score_no_flag(logp: LogP, x: Tensor) -> Tensor:
    return torch.autograd.grad(logp(x).sum(), x)[0]


def _score_backward(logp: LogP, x: Tensor) -> Tensor:
    leaf = x.clone().detach().requires_grad_(True)
    logp(leaf).backward(torch.ones(len(x), dtype=x.dtype))
    return leaf.grad


def _score_points(logp: LogP, x: Tensor) -> Tensor:
    scores = []
    for point in x:
        point = point[None].detach().requires_grad_()
        scores.append(torch.autograd.grad(logp(point)[0], point)[0][0])
    return torch.stack(scores)


def _score_jacobian(logp: LogP, x: Tensor) -> Tensor:
    return torch.autograd.functional.jacobian(logp, x.detach()).diagonal(dim1=0, dim2=1).mT.contiguous()


def _score_probe(answer: Answer, g: Generator) -> object:
    logp, x = _mixture_logp(g, 3, 2), randn(g, 3, 2)
    return [_tried(answer, logp, x.clone().requires_grad_()), _tried(answer, logp, x[:1])]


AUTOGRAD_SCORE = Exercise(
    id="00.2",
    names=("autograd_score",),
    references=(autograd_score,),
    inputs=_score_inputs,
    batch=("x",),
    facts=(
        Fact("one Gaussian is right", _score_gaussian, "autograd.grad gives the gradient of one number: of which?"),
        Fact("agrees with finite differences", _score_differences, "the gradient of logp itself, with respect to x"),
        Fact("does not depend on the normaliser", _score_constant, "grad log(c p) = grad log p: is a logarithm lost?"),
        Fact("points uphill", _score_uphill, "the gradient of log p, not of a loss"),
        Fact("is the same for a point alone and for its copies", _score_copies, "sum and mean differ by N"),
    ),
    mistakes=(
        Mistake(
            "mean for sum",
            "You differentiate the mean over the batch: every score is exactly N times too small.",
            (_score_by(torch.mean),),
        ),
        Mistake(
            "gradient of p",
            "You differentiate p and not log p: each score is p(x) times its right length, next to nothing far out.",
            (_score_by(lambda logp: logp.exp().sum()),),
        ),
        Mistake(
            "flag left on x",
            "You switched requires_grad on in the caller's own x: whatever is computed from it later drags a graph "
            "along.",
            (_score_flag,),
        ),
        Mistake(
            "result carries a graph",
            "The result still carries the graph that it was computed with (create_graph): kept over many steps, this "
            "fills the memory.",
            (_score_by(graph=True),),
        ),
        Mistake(
            "summed over D",
            "The gradient is summed over the dimensions: a score is a vector for each point, not a number.",
            (_score_by(after=lambda score, x: score.sum(1)),),
        ),
        Mistake(
            "summed over the points",
            "The gradient is summed over the points: each of them has a score of its own.",
            (_score_by(after=lambda score, x: score.sum(0)),),
        ),
        Mistake(
            "downhill",
            "The sign is that of a loss: your score is the gradient of -log p, and points away from the data.",
            (_score_by(lambda logp: -logp.sum()),),
        ),
        Mistake(
            "no sum",
            "You ask autograd for the gradient of N numbers at once: it wants one number, or N = 1.",
            (_score_by(lambda logp: logp),),
        ),
        Mistake(
            "x not watched",
            "autograd is asked about an x that it does not watch: its requires_grad is still off when logp is called.",
            (_score_no_flag,),
        ),
        Mistake(
            "unit length",
            "You scale each gradient to length 1: how steep log p is belongs to the score.",
            (_score_by(after=lambda score, x: score / score.norm(dim=1, keepdim=True)),),
        ),
        Mistake(
            "the first point only",
            "You differentiate the first point's log p only: all other points get zeros.",
            (_score_by(lambda logp: logp[0]),),
        ),
    ),
    alternatives=((_score_backward,), (_score_points,), (_score_jacobian,)),
    hints=(
        "autograd differentiates one number. Which number, made of the N values, has each point's own gradient in "
        "row n? And on which tensor may you switch requires_grad on?",
        "x = x.detach().requires_grad_(), then torch.autograd.grad(logp(x).sum(), x)[0]: no point enters another "
        "point's term, so the sum keeps them apart.",
    ),
    probe=_score_probe,
)

# --- 00.3 sample_gmm --------------------------------------------------------------------------------------------------

MANY = 6000
SIGMAS = 6  # by chance alone one of 500 million numbers is so far off


def _sample_inputs(g: Generator) -> dict:
    w, mu, S = _mixture(g, 3, 2)
    return {"sample_gmm": dict(w=w, mu=mu, S=S, n=7, gen=_fork(g))}


def _fork(g: Generator) -> Generator:
    return Generator().manual_seed(integer(g, 0, 2**31))


def _islands(g: Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """w, mu, S and the Cholesky factor, D = 3: islands far apart, long and turned, of unequal weights and sizes.

    In three dimensions, because in two the eigenvectors of eigh may form a symmetric matrix.
    """
    w = _double(0.5, 0.2, 0.3)[torch.randperm(3, generator=g)]
    mu = _double(-400, 200, 300, 400, 200, -100, 100, -600, 200).view(3, 3) + randn(g, 3, 3)
    size = _double(1, 2, 0.5)[torch.randperm(3, generator=g)][:, None, None]
    shape = _double(2.2, 0, 0, 1.7, 0.6, 0, -1.2, 0.9, 0.8).view(3, 3)
    L = size * shape * (0.9 + 0.2 * torch.rand(3, 3, 3, generator=g, dtype=torch.float64))
    return w, mu, L @ L.mT, L


def _drawn(answer: Answer, g: Generator) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    world = _islands(g)
    w, mu, S, _ = world
    x, k = answer(w.clone(), mu.clone(), S.clone(), MANY, _fork(g))
    return x.double(), k, world


def _off(got: Tensor, right: Tensor, error: Tensor) -> bool:
    return not bool(((got - right).abs() <= SIGMAS * error + 1e-9).all())


def _named(got: Tensor, candidates: Mapping[str, tuple[Tensor, Tensor]]) -> str | None:
    """The first candidate (value, standard error) that is near enough."""
    return next((name for name, (value, error) in candidates.items() if not _off(got, value, error)), None)


def _shares(k: Tensor, w: Tensor) -> tuple[Tensor, str | None]:
    share = torch.stack([(k == i).double().mean() for i in range(len(w))])
    equal = torch.full_like(w, 1 / len(w))
    return share, _named(share, {n: (v, (v * (1 - v) / len(k)).sqrt()) for n, v in (("w", w), ("equal", equal))})


def _means(x: Tensor, world: Sequence[Tensor], i: int) -> dict[str, tuple[Tensor, Tensor]]:
    w, mu, _, L = world
    error = x.std(0, correction=0) / math.sqrt(len(x))
    average = w @ mu
    wide = (w @ (mu - average) ** 2 / len(x)).sqrt() * 1.2
    return {
        "mu": (mu[i], error),
        "zero": (torch.zeros(3).double(), error),
        "the mean of all components": (average, wide),
        "mu plus half the sum of the factor's columns": (mu[i] + L[i].sum(1) / 2, error),
    }


def _covs(x: Tensor, world: Sequence[Tensor], i: int) -> dict[str, tuple[Tensor, Tensor]]:
    w, mu, S, L = world
    first = L[i][:, :1]
    eye, spread = torch.eye(3).double(), mu - w @ mu
    known = {
        "S": S[i],
        "S @ S: S is no factor of itself": S[i] @ S[i],
        "factor.T @ factor: the factor is transposed": L[i].T @ L[i],
        "the identity: S is not used": eye,
        "the diagonal of S alone": S[i].diagonal().diag(),
        "S / 12: the numbers that you draw are uniform": S[i] / 12,
        "zero: the points of a component are all the same": 0 * eye,
        "that of one number for all coordinates": L[i].sum(1)[:, None] * L[i].sum(1),
        "that of one coordinate alone": first @ first.T,
        "2 S: the noise is added twice": 2 * S[i],
        "the inverse of S": torch.linalg.inv(S[i]),
        "that of all components together": (w[:, None, None] * (S + spread[:, :, None] * spread[:, None])).sum(0),
    }
    values, axes = torch.linalg.eigh(S[i])
    known["what comes of transposed eigenvectors"] = axes.T @ values.diag() @ axes
    known |= {f"the S of component {j}": S[j] for j in range(3) if j != i}
    return {name: (value, _cov_error(value, len(x))) for name, value in known.items()}


def _cov_error(C: Tensor, n: int) -> Tensor:
    return ((C.diagonal()[:, None] * C.diagonal() + C**2) / n).sqrt()


def _sample_shares(answer: Answer, g: Generator) -> None:
    _, k, (w, *_) = _drawn(answer, g)
    share, name = _shares(k, w)
    if name != "w":
        said = ": every component comes equally often, whatever w says" if name == "equal" else ""
        said = ": all points of one call come from one component" if share.amax() == 1 else said
        raise Wrong(f"of {MANY} points the components have the shares {_numbers(share)} beside w = {_numbers(w)}{said}")


def _sample_labels(answer: Answer, g: Generator) -> None:
    x, k, (_, mu, *_) = _drawn(answer, g)
    distance = torch.cdist(x, mu)
    lost, wrong = int((distance.amin(1) > 200).sum()), int((distance.argmin(1) != k).sum())
    if lost:
        raise Wrong(
            f"islands 800 apart, and {lost} of {MANY} points lie on none of them: each point comes from one component, "
            "around its own mean"
        )
    if wrong:
        raise Wrong(
            f"islands 800 apart, and {wrong} of {MANY} points do not lie on the island that k says: x and k must "
            "belong together"
        )


def _sample_means(answer: Answer, g: Generator) -> None:
    x, k, world = _drawn(answer, g)
    for i in range(3):
        own = x[k == i]
        if len(own) < 2:
            continue
        means = _means(own, world, i)
        if _off(own.mean(0), *means["mu"]):
            name = _named(own.mean(0), means)
            raise Wrong(
                f"component {i}: the mean of {len(own)} points is {_numbers(own.mean(0))} beside mu = "
                f"{_numbers(world[1][i])}" + (f"; it is {name}" if name else "")
            )


def _sample_covs(answer: Answer, g: Generator) -> None:
    x, k, world = _drawn(answer, g)
    for i in range(3):
        own = x[k == i]
        covs = _covs(own, world, i)
        got = own.T.cov(correction=0) if len(own) > 1 else None
        if got is not None and _off(got, *covs["S"]):
            name = _named(got, covs)
            raise Wrong(
                f"component {i}: the covariance of {len(own)} points is {_numbers(got)} beside S = "
                f"{_numbers(world[2][i])}" + (f"; it is {name}" if name else "")
            )


def _sample_free(answer: Answer, g: Generator) -> None:
    """Points are drawn one by one: no order, no fixed counts, and as many as are asked for."""
    _, k, (w, mu, S, _) = _drawn(answer, g)
    half = MANY // 2
    for i in range(3):
        early, late = ((part == i).double().mean().item() for part in (k[:half], k[half:]))
        if abs(early - late) > SIGMAS * math.sqrt(2 * 0.25 / half):
            raise Wrong(
                f"component {i} makes up {early:.0%} of the first {half} points and {late:.0%} of the others: points "
                "must be independent, and not sorted by component"
            )
    gen = _fork(g)
    single = {int(answer(w, mu, S, 1, gen)[1]) for _ in range(150)}
    if len(single) == 1:
        raise Wrong(
            f"150 draws of n = 1 with one generator, and each is from component {single.pop()}: the counts must be "
            "random, and the generator must move on"
        )


def _sample_generator(answer: Answer, g: Generator) -> None:
    w, mu, S, _ = _islands(g)
    gen = _fork(g)
    state = gen.get_state()
    one, two = answer(w, mu, S, 40, gen), answer(w, mu, S, 40, gen)
    for name, a, b in zip(("x", "k"), one, two, strict=True):
        if torch.equal(a, b):
            raise Wrong(f"{name} does not follow gen: two calls in a row with one generator gave the same")
    answer.reseed(12345)
    again = answer(w, mu, S, 40, Generator().set_state(state))
    for name, a, b in zip(("k", "x"), reversed(one), reversed(again), strict=True):
        if not torch.equal(a, b):
            raise Wrong(f"two generators in the same state gave another {name}: some of it is not drawn from gen")


def _sample_sizes(answer: Answer, g: Generator) -> None:
    for K, D, n in ((1, 1, 5), (2, 3, 9), (4, 1, 1), (3, 3, 3)):
        w, mu, S = _mixture(g, K, D)
        x, k = answer(w, mu, S, n, _fork(g))
        if x.dtype != mu.dtype:
            raise Wrong(
                f"x has dtype {x.dtype} where mu has {mu.dtype}: noise is drawn in float32 unless you say dtype="
            )
        if x.shape != (n, D) or k.shape != (n,):
            raise Wrong(
                f"n = {n}, K = {K}, D = {D}: x has shape {tuple(x.shape)} and k {tuple(k.shape)} where {(n, D)} and "
                f"{(n,)} are due"
            )


def _two_tensors(run: object, n: int) -> bool:
    """Whether this is x (n, 3) and k (n,)."""
    if not isinstance(run, list) or len(run) != 2 or not all(isinstance(part, Tensor) for part in run):
        return False
    return run[0].shape == (n, 3) and run[1].shape == (n,)


def _sample_probe(answer: Answer, g: Generator) -> object:
    """By its statistics, each as the name of what it is: the order of the draws is free."""
    world = _islands(g)
    w, mu, S, _ = world
    seeds = [integer(g, 0, 2**31) for _ in range(2)]
    runs = []
    for noise, seed in ((1, seeds[0]), (2, seeds[0]), (1, seeds[1])):
        answer.reseed(noise)
        runs.append(_tried(answer, w, mu, S, 2, Generator().manual_seed(seed)))
    few = [[part.dtype for part in run] if _two_tensors(run, 2) else str(run)[:40] for run in runs]
    found: list[object] = [str(few)]
    answer.reseed(1)
    sample = _tried(answer, w, mu, S, MANY, Generator().manual_seed(seeds[0]))
    other = _tried(answer, w, mu, S, MANY, Generator().manual_seed(seeds[1]))
    answer.reseed(2)
    again = _tried(answer, w, mu, S, MANY, Generator().manual_seed(seeds[0]))
    if not all(_two_tensors(run, MANY) for run in (sample, other, again)):
        return [*found, sample if isinstance(sample, str) else "odd"]
    x, k = sample
    found += [close(a, b, rtol=0, atol=0) for run in (other, again) for a, b in zip(sample, run, strict=True)]
    found.append(_shares(k, w)[1])
    for i in range(3):
        own = x[k == i]
        if len(own) > 1:
            mean, cov = own.mean(0), own.T.cov(correction=0)
            found += [_named(mean, _means(own, world, i)), _named(cov, _covs(own, world, i))]
    found.append(bool((k.diff() >= 0).all()))
    return found


def _sample_by(
    factor: Callable[[Tensor], Tensor] = torch.linalg.cholesky,
    *,
    component: Callable = lambda w, n, gen: torch.multinomial(w, n, replacement=True, generator=gen),
    noise: Callable = lambda n, D, gen: torch.randn(n, D, generator=gen, dtype=torch.float64),
    centre: float = 1.0,
    label: Callable = lambda k, w, n, gen: k,
) -> Callable:
    def sample_gmm(w: Tensor, mu: Tensor, S: Tensor, n: int, gen: Generator) -> tuple[Tensor, Tensor]:
        k = component(w, n, gen)
        z = noise(n, mu.shape[1], gen).to(mu.dtype)
        x = centre * mu[k] + (factor(S)[k] @ z[:, :, None])[:, :, 0]
        return x, label(k, w, n, gen)

    return sample_gmm


def _eigen_factor(S: Tensor) -> Tensor:
    values, axes = torch.linalg.eigh(S)
    return axes * values.sqrt()[:, None, :]


def _sample_loop(w: Tensor, mu: Tensor, S: Tensor, n: int, gen: Generator) -> tuple[Tensor, Tensor]:
    """Component by component, from uniform numbers against the cumulative weights."""
    k = torch.bucketize(torch.rand(n, generator=gen, dtype=w.dtype), w.cumsum(0)).clamp(max=len(w) - 1)
    x = torch.empty(n, mu.shape[1], dtype=mu.dtype)
    for i in range(len(w)):
        z = torch.randn(int((k == i).sum()), mu.shape[1], generator=gen, dtype=mu.dtype)
        x[k == i] = mu[i] + z @ torch.linalg.cholesky(S[i]).T
    return x, k


def _sample_root(w: Tensor, mu: Tensor, S: Tensor, n: int, gen: Generator) -> tuple[Tensor, Tensor]:
    """With the symmetric square root, in double precision, the noise drawn first."""
    z = torch.randn(n, mu.shape[1], generator=gen, dtype=torch.float64)
    k = torch.multinomial(w, n, replacement=True, generator=gen)
    values, axes = torch.linalg.eigh(S.double())
    root = (axes * values.sqrt()[:, None]) @ axes.mT
    return (mu[k] + torch.einsum("nij,nj->ni", root[k], z)).to(mu.dtype), k


def _any_k(w: Tensor, n: int, gen: Generator | None) -> Tensor:
    return torch.multinomial(w, n, replacement=True, generator=gen)


SAMPLE_GMM = Exercise(
    by_probe=True,
    id="00.3",
    names=("sample_gmm",),
    references=(sample_gmm,),
    inputs=_sample_inputs,
    facts=(
        Fact("gives n points of D numbers, for any n, K and D", _sample_sizes, "n may well be larger than K"),
        Fact("components come as often as w says", _sample_shares, "torch.multinomial draws with given weights"),
        Fact("k says where x comes from", _sample_labels, "the k that is returned is the k that chose mu"),
        Fact(
            "each component has its covariance S",
            _sample_covs,
            "if z has covariance I, A z has covariance A A^T: for which A is that S?",
        ),
        Fact("each component has its mean", _sample_means, "shift by mu[k]; noise has the mean 0"),
        Fact("all randomness comes from gen", _sample_generator, "every random function takes generator=gen"),
        Fact("points are independent draws", _sample_free, "draw one k for each point"),
    ),
    mistakes=(
        Mistake(
            "S as its own factor",
            "Your covariance is S squared: S, or its eigenvalues without a root, stretch the noise, as if a "
            "variance were a standard deviation.",
            (_sample_by(lambda S: S),),
        ),
        Mistake(
            "factor transposed",
            "The factor is transposed: the noise has covariance L^T L and not L L^T, an ellipse of the same size "
            "turned elsewhere.",
            (_sample_by(lambda S: torch.linalg.cholesky(S).mT),),
        ),
        Mistake(
            "without replacement",
            "You draw the components without replacement: each can come only once, so that n > K fails.",
            (_sample_by(component=lambda w, n, gen: torch.multinomial(w, n, generator=gen)),),
        ),
        Mistake(
            "generator ignored",
            "Nothing is drawn from gen: the same generator gives other points each time, and nobody can repeat "
            "your figure.",
            (
                _sample_by(
                    component=lambda w, n, gen: _any_k(w, n, None),
                    noise=lambda n, D, gen: torch.randn(n, D, dtype=torch.float64),
                ),
            ),
        ),
        Mistake(
            "components without the generator",
            "The noise is drawn from gen, but the components are not: they do not follow it.",
            (_sample_by(component=lambda w, n, gen: _any_k(w, n, None)),),
        ),
        Mistake(
            "noise without the generator",
            "The components are drawn from gen, but the noise is not: it does not follow it.",
            (_sample_by(noise=lambda n, D, gen: torch.randn(n, D, dtype=torch.float64)),),
        ),
        Mistake(
            "weights ignored",
            "The weights are ignored: every component comes equally often.",
            (_sample_by(component=lambda w, n, gen: torch.randint(len(w), (n,), generator=gen)),),
        ),
        Mistake(
            "k drawn again",
            "The k that you return is drawn anew, and says nothing about where x comes from.",
            (_sample_by(label=lambda k, w, n, gen: _any_k(w, n, gen)),),
        ),
        Mistake(
            "no mean",
            "The means are missing: all components sit on top of one another at 0.",
            (_sample_by(centre=0.0),),
        ),
        Mistake(
            "no covariance",
            "S is not used: every component is a round N(mu_k, I).",
            (_sample_by(lambda S: torch.eye(S.shape[-1]).to(S).expand_as(S)),),
        ),
        Mistake(
            "diagonal only",
            "You use only the roots of the diagonal of S: the ellipses lose their tilt.",
            (_sample_by(lambda S: torch.diag_embed(S.diagonal(dim1=-2, dim2=-1).sqrt())),),
        ),
        Mistake(
            "rand for randn",
            "The noise is uniform in [0, 1) (rand): a Gaussian needs randn, with mean 0 and variance 1.",
            (_sample_by(noise=lambda n, D, gen: torch.rand(n, D, generator=gen, dtype=torch.float64)),),
        ),
        Mistake(
            "one number for all coordinates",
            "One random number serves all coordinates of a point: every island becomes a line.",
            (_sample_by(noise=lambda n, D, gen: torch.randn(n, 1, generator=gen, dtype=torch.float64).expand(n, D)),),
        ),
        Mistake(
            "one noise for all points",
            "One draw of noise serves all points: those of a component are copies of each other.",
            (_sample_by(noise=lambda n, D, gen: torch.randn(1, D, generator=gen, dtype=torch.float64).expand(n, D)),),
        ),
    ),
    alternatives=((_sample_by(_eigen_factor),), (_sample_loop,), (_sample_root,)),
    hints=(
        "Two steps: a component for each point, then a Gaussian of that component. If z has covariance I, which "
        "matrix A gives A z the covariance S?",
        "k from torch.multinomial(w, n, replacement=True, generator=gen); x = mu[k] + L[k] z with z from randn and "
        "L the Cholesky factor of S.",
    ),
    hides=("mixture.GaussianMixture.sample",),
    probe=_sample_probe,
)

# --- 00.4 energy_distance ---------------------------------------------------------------------------------------------


def _energy_inputs(g: Generator) -> dict:
    return {"energy_distance": dict(x=randn(g, 6, 3), y=1 + randn(g, 4, 3))}


def _number(answer: Answer, x: Tensor, y: Tensor) -> float:
    got = answer(x, y)
    if isinstance(got, Tensor) and got.numel() != 1:
        raise Wrong(f"the distance of two samples is one number, and a tensor of shape {tuple(got.shape)} came back")
    return float(got)


def _same_number(got: float, right: float, message: str, atol: float = 1e-6) -> None:
    if not math.isclose(got, right, rel_tol=1e-6, abs_tol=atol):
        raise Wrong(f"{message}; yours is {got:.6g}", expected=f"{right:.6g}")


def _energy_points(answer: Answer, g: Generator) -> None:
    x, y = torch.zeros(1, 1).double(), torch.ones(1, 1).double()
    _same_number(_number(answer, x, y), 2, "all mass at 0 against all mass at 1 must give 2")
    many = _number(answer, x.expand(5, 1).clone(), y.expand(3, 1).clone())
    _same_number(many, 2, "5 points at 0 against 3 points at 1 must give 2 as well")


def _energy_zero(answer: Answer, g: Generator) -> None:
    x = randn(g, 30, 3)
    _same_number(_number(answer, x, x.clone()), 0, "a sample against itself must give 0: every row meets itself, too")
    twice = _number(answer, x, torch.cat([x, x])[torch.randperm(60, generator=g)])
    _same_number(twice, 0, "a sample against all its points twice is the same distribution, and must give 0")


def _energy_symmetric(answer: Answer, g: Generator) -> None:
    x, y = randn(g, 7, 2), 2 * randn(g, 4, 2) + 1
    one, two = _number(answer, x, y), _number(answer, y, x)
    if not math.isclose(one, two, rel_tol=1e-6, abs_tol=1e-6):
        raise Wrong(f"x and y exchanged give {two:.5g} for {one:.5g}: a distance must be symmetric")


def _energy_pairs(answer: Answer, g: Generator) -> None:
    """{0, a} against {b}, 0 < b < a: 2 a / 2 - (0 + a + a + 0) / 4 - 0 = a / 2."""
    a = 1 + 3 * torch.rand((), generator=g).item()
    b = a * (0.2 + 0.6 * torch.rand((), generator=g).item())
    got = _number(answer, _double(0, a)[:, None], _double(b)[:, None])
    message = (
        f"the points 0 and {a:.3g} against the point {b:.3g}: E|x - y| is {a / 2:.3g}, and E|x - x'| over all four "
        f"pairs (two of them 0) is {a / 2:.3g} too"
    )
    _same_number(got, a / 2, message)


def _energy_line(answer: Answer, g: Generator) -> None:
    """On a line it is 2 int (F - G)^2, F and G the distribution functions: steps, so a finite sum."""
    _on_a_line(answer, randn(g, 9), 2 * randn(g, 5))
    _on_a_line(answer, torch.linspace(-2, 2, 9).double() + 0.1 * randn(g, 9), 0.1 * randn(g, 5))  # one around the other


def _on_a_line(answer: Answer, x: Tensor, y: Tensor) -> None:
    ends = torch.cat([x, y]).sort().values
    F, G = ((some[None] <= ends[:-1, None]).double().mean(1) for some in (x, y))
    right = float((2 * (F - G) ** 2 * ends.diff()).sum())
    message = (
        "9 points against 5 on a line: twice the integral of (F_x - F_y)^2, of the shares below each "
        f"place, is {right:.6g}"
    )
    _same_number(_number(answer, x[:, None], y[:, None]), right, message)


def _energy_euclid(answer: Answer, g: Generator) -> None:
    """Euclidean: a rotation changes nothing, and a scale of c multiplies by c."""
    x, y = torch.zeros(1, 2).double(), torch.tensor([[3.0, 4.0]]).double()
    _same_number(_number(answer, x, y), 10, "a point at (0, 0) against one at (3, 4), 5 apart, must give 10")
    x, y, c = randn(g, 6, 2), 1 + randn(g, 4, 2), 2 + torch.rand((), generator=g).item()
    one, scaled = _number(answer, x, y), _number(answer, c * x, c * y)
    message = f"all points {c:.3g} times as far out: the distance must be {c:.3g} times as large, {c * one:.5g}"
    _same_number(scaled, c * one, message)
    angle = 1 + torch.rand((), generator=g).item()
    turn = _turned(angle)
    _same_number(_number(answer, x @ turn, y @ turn), one, f"turned and otherwise the same, {one:.5g} must stay")


def _energy_shared(answer: Answer, g: Generator) -> None:
    x = 3 * randn(g, 60, 5)
    y = torch.cat([x[:20], randn(g, 20, 5)])
    got = _number(answer, x, y)
    if not math.isfinite(got):
        raise Wrong(f"samples of 60 and 40 points that share 20 give {got}: is a root taken of a number just below 0?")
    if got < 0:
        raise Wrong(f"samples of 60 and 40 points give {got:.4g}: it is never negative")


def _pairs(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vector_norm(a[:, None] - b, dim=2)


def _energy_by(
    cross: float = 2.0,
    own: tuple[float, float] = (1.0, 1.0),
    mean: Callable[[Tensor, Tensor], Tensor] = lambda a, b: _pairs(a, b).mean(),
    across: Callable[[Tensor, Tensor], Tensor] | None = None,
    after: Callable[[Tensor], Tensor] = lambda e: e,
) -> Callable:
    def energy_distance(x: Tensor, y: Tensor) -> float:
        between = (across or mean)(x, y)
        return float(after(cross * between - own[0] * mean(x, x) - own[1] * mean(y, y)))

    return energy_distance


def _unpaired(a: Tensor, b: Tensor) -> Tensor:
    distances = _pairs(a, b)
    return distances.sum() / (len(a) * (len(a) - 1)) if a is b and len(a) > 1 else distances.mean()


def _by_products(a: Tensor, b: Tensor) -> Tensor:
    return ((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T).sqrt().mean()


def _energy_loop(x: Tensor, y: Tensor) -> float:
    def mean_distance(a: Tensor, b: Tensor) -> float:
        return sum(math.dist(p, q) for p in a.tolist() for q in b.tolist()) / (len(a) * len(b))

    return 2 * mean_distance(x, y) - mean_distance(x, x) - mean_distance(y, y)


def _energy_weights(x: Tensor, y: Tensor) -> Tensor:
    """As one quadratic form over both samples; a tensor without axes is a number too."""
    both = torch.cat([x, y]).double()
    sign = torch.cat([torch.full((len(x),), 1 / len(x)), torch.full((len(y),), -1 / len(y))]).to(both)
    return -sign @ torch.cdist(both, both, compute_mode="donot_use_mm_for_euclid_dist") @ sign


def _energy_pdist(x: Tensor, y: Tensor) -> float:
    """Each unordered pair once, by torch.pdist."""

    def within(a: Tensor) -> Tensor:
        return 2 * torch.pdist(a).sum() / len(a) ** 2

    return (2 * torch.cdist(x, y).mean() - within(x) - within(y)).item()


def _energy_probe(answer: Answer, g: Generator) -> object:
    """Numbers, however they are packed: of unequal and equal sizes, on a line, with shared points."""
    x, y = randn(g, 6, 3), 1 + randn(g, 4, 3)
    shared = torch.cat([2 * x, y])
    cases = ((x, y), (y, x), (x[:4], y), (x[:2, :1], y[:, :1]), (shared, x))
    found = []
    for case in cases:
        got = _tried(answer, *(part.clone() for part in case))
        found.append(float(got) if isinstance(got, Tensor) and got.numel() == 1 else got)
    far = 100 + randn(g, 60, 3)
    got = _tried(answer, far, far[:40].clone())
    return [*found, math.isfinite(got) if isinstance(got, Tensor | float | int) else got]


ENERGY = Exercise(
    by_probe=True,
    id="00.4",
    names=("energy_distance",),
    references=(energy_distance,),
    inputs=_energy_inputs,
    facts=(
        Fact(
            "a point at 0 against a point at 1 gives 2",
            _energy_points,
            ("how often does each of the three terms count, and over which pairs does its mean run?"),
        ),
        Fact("two equal samples give 0", _energy_zero, "all pairs, a row with itself too: V-statistic"),
        Fact("is symmetric", _energy_symmetric, "each sample has a term of its own, with the same weight"),
        Fact("averages over all pairs", _energy_pairs, "a mean over the whole (N, M) or (N, N) table"),
        Fact("is the area between distribution functions", _energy_line, "N and M need not be equal"),
        Fact("measures with Euclid's distance", _energy_euclid, "a root over D, and none after that"),
        Fact("survives points that coincide", _energy_shared, "differences first, then squares: no cancellation"),
    ),
    mistakes=(
        Mistake(
            "cross term once",
            "The cross term counts once: it needs the factor 2, as there are two terms to balance.",
            (_energy_by(1.0),),
        ),
        Mistake(
            "half",
            "Your result is half of the energy distance: E|x - y| minus half of each own term.",
            (_energy_by(1.0, (0.5, 0.5)),),
        ),
        Mistake(
            "not symmetric: x twice",
            "You subtract the term of x twice and that of y never: the result depends on which sample comes first.",
            (_energy_by(2.0, (2.0, 0.0)),),
        ),
        Mistake(
            "not symmetric: y twice",
            "You subtract the term of y twice and that of x never: the result depends on which sample comes first.",
            (_energy_by(2.0, (0.0, 2.0)),),
        ),
        Mistake(
            "one own term",
            "The term of y is missing: two equal samples are then not at the distance 0.",
            (_energy_by(2.0, (1.0, 0.0)),),
        ),
        Mistake(
            "square root",
            "You take a square root at the end. Some books do; here the distance is meant without it, so that it "
            "grows in proportion to the scale.",
            (_energy_by(after=lambda e: e.clamp(min=0).sqrt()),),
        ),
        Mistake(
            "a row not paired with itself",
            "You leave out the pairs of a row with itself: unbiased, but a sample against itself is then not 0.",
            (_energy_by(mean=_unpaired),),
        ),
        Mistake(
            "row with row",
            "You pair row i of x with row i of y: that fails for N other than M, and misses most pairs.",
            (_energy_by(across=lambda a, b: (a - b).norm(dim=1).mean()),),
        ),
        Mistake(
            "NaN where points coincide",
            "You get |a - b|^2 from products: where points coincide rounding leaves it just below 0, and the root "
            "is NaN.",
            (_energy_by(mean=_by_products),),
        ),
        Mistake(
            "squared distances",
            "You average squared distances: all that is left then is twice the squared distance of the means, and "
            "samples of equal mean look the same.",
            (_energy_by(mean=lambda a, b: (_pairs(a, b) ** 2).mean()),),
        ),
        Mistake(
            "absolute values",
            "You add absolute differences over the dimensions: turned samples then get another distance.",
            (_energy_by(mean=lambda a, b: (a[:, None] - b).abs().sum(2).mean()),),
        ),
        Mistake(
            "own terms halved",
            "The own terms count half, as if each pair of rows were there once: the mean over all pairs has each "
            "twice, and equal samples give 0 only so.",
            (_energy_by(2.0, (0.5, 0.5)),),
        ),
        Mistake(
            "own terms added",
            "The own terms are added where they must be subtracted: equal samples come out far apart.",
            (_energy_by(2.0, (-1.0, -1.0)),),
        ),
        Mistake(
            "cross term alone",
            "Only the cross term is there: spread-out samples are then far from themselves.",
            (_energy_by(2.0, (0.0, 0.0)),),
        ),
        Mistake(
            "distance of the means",
            "You compare the means of the samples: samples of equal mean and unequal spread look the same.",
            (lambda x, y: 2 * float((x.mean(0) - y.mean(0)).norm()),),
        ),
    ),
    alternatives=((_energy_loop,), (_energy_weights,), (_energy_pdist,)),
    hints=(
        "Three tables of distances, (N, M), (N, N) and (M, M), and the mean of each. With which signs and factors "
        "do equal samples give 0?",
        "2 mean|x_i - y_j| - mean|x_i - x_j| - mean|y_i - y_j|, each over the whole table, zeros included.",
    ),
    hides=("metrics.energy_distance",),
    probe=_energy_probe,
)

# --- 00.5 my_test -----------------------------------------------------------------------------------------------------


def _promoted(function: Callable) -> Callable:
    """All correct functions treat dtypes alike, so that a learner's test need not care which it was given."""

    def q_sample(x0: Tensor, t: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
        dtype = torch.promote_types(x0.dtype, abar.dtype)
        return function(x0.to(dtype), t, eps.to(dtype), abar)

    q_sample.__qualname__ = "q_sample"
    return q_sample


RIGHT = tuple(_promoted(functions[0]) for functions in (Q_SAMPLE.references, *Q_SAMPLE.alternatives))


def _coefficient(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _formula(signal: Callable = torch.sqrt, noise: Callable = torch.sqrt, time: Callable = lambda t: t) -> Callable:
    def q_sample(x0: Tensor, t: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
        abar = abar[time(t)]
        return _coefficient(signal(abar), x0) * x0 + _coefficient(noise(1 - abar), x0) * eps

    return q_sample


def _in_place(x0: Tensor, t: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    x0 *= _coefficient(abar[t].sqrt(), x0)
    x0 += _coefficient((1 - abar[t]).sqrt(), x0) * eps
    return x0


WRONG = (
    ("no root on abar", _formula(signal=lambda a: a)),
    ("the variance 1 - abar in place of the standard deviation", _formula(noise=lambda v: v)),
    ("abar read at t - 1", _formula(time=lambda t: t - 1)),
    ("the time of the first example for the whole batch", _formula(time=lambda t: t[:1].expand(len(t)))),
    ("x0 changed in place", _in_place),
)


def _table() -> Tensor:
    return torch.linspace(1, 0.1, 10, dtype=torch.float64)


def _some(B: int) -> tuple[Tensor, Tensor]:
    angle = torch.arange(B * 3, dtype=torch.float64).reshape(B, 3)
    return 1 + angle.sin(), 1 + angle.cos()


def _with_copy(
    t: Sequence[int],
    copy: Callable = RIGHT[0],
    x0: float = 1.0,
    eps: float = 1.0,
    keeps: bool = False,
) -> Callable:
    """A test that compares with a formula of its own at these times, with x0 and eps multiplied by the numbers."""

    def my_test(q_sample: Callable) -> None:
        times = torch.tensor(t)
        clean, noise = _some(len(t))
        clean, noise = x0 * clean, eps * noise
        right, before = copy(clean, times, noise, _table()), clean.clone()
        assert torch.allclose(q_sample(clean, times, noise, _table()), right)
        if keeps:
            assert torch.equal(clean, before)

    return my_test


def _test_shape(q_sample: Callable) -> None:
    x0, eps = _some(4)
    assert q_sample(x0, torch.tensor([9, 1, 4, 7]), eps, _table()).shape == x0.shape


def _test_variance(q_sample: Callable) -> None:
    x0, eps = torch.randn(2, 4, 10000, dtype=torch.float64)
    xt = q_sample(x0, torch.tensor([5, 5, 5, 5]), eps, _table())
    assert abs(xt.var() - 1) < 0.1


def _test_clean(q_sample: Callable) -> None:
    x0, eps = _some(4)
    assert torch.allclose(q_sample(x0, torch.zeros(4, dtype=torch.long), eps, _table()), x0)


def _test_alarm(q_sample: Callable) -> None:
    raise AssertionError("no")


def _test_numbers(q_sample: Callable) -> None:
    """By hand, one entry after the other."""
    x0, eps = _some(3)
    xt = q_sample(x0.clone(), torch.tensor([2, 9, 5]), eps, _table())
    for b, t in enumerate((2, 9, 5)):
        abar = 1 - 0.1 * t
        for i in range(3):
            assert math.isclose(xt[b, i], abar**0.5 * x0[b, i] + (1 - abar) ** 0.5 * eps[b, i], rel_tol=1e-9)


def _test_inverse(q_sample: Callable) -> None:
    """x0 and eps are recovered from what the function does to them."""
    x0, eps = _some(4)
    t = torch.tensor([8, 3, 1, 6])
    kept = x0.clone()
    angle = torch.acos(_table()[t].sqrt())[:, None]
    one, two = q_sample(x0, t, eps, _table()), q_sample(-eps, t, x0, _table())
    assert torch.equal(x0, kept)
    assert torch.allclose(angle.cos() * one + angle.sin() * two, x0)
    assert torch.allclose(angle.sin() * one - angle.cos() * two, eps)


MY_TEST = test_exercise(
    "00.5",
    "my_test",
    my_test,
    right=RIGHT,
    wrong=WRONG,
    needed=4,
    mistakes=(
        Mistake(
            "shape only",
            "Your test raises for none of the five, just like one that looks at the shape only: every formula gives a "
            "result of the right shape. Say something about its values, with a tolerance that means something.",
            (_test_shape,),
        ),
        Mistake(
            "own copy without the root on abar",
            "Your test refuses every right function and lets the one without a root on abar pass: the formula that it "
            "compares with lacks that root itself.",
            (_with_copy((9, 1, 4, 7), _formula(signal=lambda a: a)),),
        ),
        Mistake(
            "own copy with the variance",
            "Your test refuses every right function and lets the one pass that multiplies eps by the variance: so does "
            "the formula that it compares with.",
            (_with_copy((9, 1, 4, 7), _formula(noise=lambda v: v)),),
        ),
        Mistake(
            "own copy at t - 1",
            "Your test refuses every right function and lets the one pass that reads abar at t - 1: so does the "
            "formula that it compares with. Here index and t are the same number.",
            (_with_copy((9, 1, 4, 7), _formula(time=lambda t: t - 1)),),
        ),
        Mistake(
            "one fixed t, one property",
            "Your test notices a missing root, but no wrong time: what it asks for holds at every t, as a variance of "
            "1 does, so a shifted t or one t for the whole batch passes.",
            (_test_variance,),
        ),
        Mistake(
            "t = 0 only",
            "Your test notices a shifted index and nothing else, as a test at t = 0 only would: there abar is 1, and "
            "roots change nothing. Look at other times, and at several in one batch.",
            (_test_clean,),
        ),
        Mistake(
            "N = 1",
            "All examples of a call share one time in your test (N = 1, or the same t throughout), so that nobody sees "
            "whose time is used; and it does not look whether x0 is still what it was.",
            (_with_copy((5,)),),
        ),
        Mistake(
            "x0 is zero",
            "What becomes of x0 does not show in your test, as if x0 were 0: its coefficient may then be anything.",
            (_with_copy((9, 1, 4, 7), x0=0.0),),
        ),
        Mistake(
            "eps is zero",
            "What becomes of eps does not show in your test, as if eps were 0: its coefficient may then be anything.",
            (_with_copy((9, 1, 4, 7), eps=0.0),),
        ),
        Mistake(
            "always an alarm",
            "Your test raises for every function, right or wrong: either it "
            "has an error itself, or it asks for what does not hold.",
            (_test_alarm,),
        ),
    ),
    alternatives=(_with_copy((9, 1, 4, 7), keeps=True), _test_numbers, _test_inverse),
    hides=("schedules.add_noise",),
    hints=(
        "Choose numbers for which the right answer is plain: x0 = 1 and eps = 0, say. Which times must be in one batch "
        "so that a confusion of times shows? What must be the same after the call as before?",
        "With x0 = 1, eps = 0 and a different t per example the squared result is abar[t]; add the squared result for "
        "x0 = 0, eps = 1 and it is 1; and x0 is unchanged.",
    ),
)
EXERCISES = (GMM_LOGP, AUTOGRAD_SCORE, SAMPLE_GMM, ENERGY, MY_TEST)
