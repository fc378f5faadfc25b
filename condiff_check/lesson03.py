"""Exercises of lesson 03: guidance by a classifier, and why the classifier has to know noise."""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from condiff_ref.mixture import GaussianMixture, archipelago, line2
from condiff_ref.schedules import discrete
from condiff_ref.shapes import pad

from .compare import close, plain
from .draws import integer, pictures, randn, times
from .exercise import Answer, Exercise, Fact, Mistake, Wrong, need
from .guard import Failed
from .oracle import exact_eps
from .testing import test_exercise
from .xray import Formula, ddpm_probes, random_abar

# --- the reference answers, as the solutions show them ----------------------------------------------------------------


def bayes_by_hand(
    x: Tensor, y: int, s: float, a: float, sigma: float, weights: Tensor, means: Tensor, covs: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Three things about the point x (D,), a noisy x_t = a x0 + sigma eps, where x0 comes from a Gaussian mixture:
    p(y | x_t) (), the gradient of log p(y | x_t) (D,), and the guided noise prediction at scale s (D,).

    weights (K,), means (K, D), covs (K, D, D); component k belongs to class labels[k]. Noised, it is
    N(a means[k], a^2 covs[k] + sigma^2 I). At s = 0 the prediction is E[eps | x_t], at s = 1 it is E[eps | x_t, y].
    """
    noisy_covs = a**2 * covs + sigma**2 * torch.eye(len(x)).to(x)
    offsets = a * means - x
    scores = torch.linalg.solve(noisy_covs, offsets)  # of each component, (K, D)
    log_joint = weights.log() - (offsets * scores).sum(1) / 2 - torch.logdet(noisy_covs) / 2
    of_class = labels == y
    posterior = log_joint.softmax(0)[of_class].sum()
    score = log_joint.softmax(0) @ scores
    score_of_class = log_joint[of_class].softmax(0) @ scores[of_class]
    grad = score_of_class - score
    return posterior, grad, -sigma * (score + s * grad)


def noisy_ce_loss(clf: nn.Module, x0: Tensor, y: Tensor, abar: Tensor, gen: Generator) -> Tensor:
    """The loss () of a noise-aware classifier on one batch: each example noised to a t of its own, drawn uniformly from
    1..T; clf(x_t, t) returns logits (B, classes). Mean cross-entropy.

    x0 (B, ...), y (B,), abar (T + 1,), which may be float64 where x0 is float32: clf sees the dtype of x0. Each example
    has its own standard normal noise. All is drawn with gen, on the CPU, and then goes where x0 is.
    """
    abar = abar.to(x0)
    t = torch.randint(1, len(abar), (len(x0),), generator=gen).to(x0.device)
    eps = torch.randn(x0.shape, generator=gen, dtype=x0.dtype).to(x0.device)
    xt = pad(abar[t].sqrt(), x0) * x0 + pad((1 - abar[t]).sqrt(), x0) * eps
    return F.cross_entropy(clf(xt, t), y)


def classifier_grad(clf: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The gradient of log p(y | x_t) with respect to x, each example for itself: (B, ...).

    clf(x, t) returns logits (B, classes), t (B,), y (B,). Works under torch.no_grad, and leaves no graph behind.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        log_p = F.log_softmax(clf(x, t), dim=1)
        chosen = log_p.gather(1, y[:, None]).sum()
        return torch.autograd.grad(chosen, x)[0]


def guided_eps(eps: Tensor, grad: Tensor, t: Tensor, s: float, abar: Tensor) -> Tensor:
    """The noise prediction after guidance: the one whose score is the old score + s grad. (B, ...) -> (B, ...).

    eps the prediction without guidance, grad the gradient of log p(y | x_t), integer t (B,), abar (T + 1,).
    """
    return eps - s * pad((1 - abar[t]).sqrt(), eps) * grad


def guided_mean(mean: Tensor, var: Tensor, grad: Callable, xt: Tensor, s: float, at: str = "xt") -> Tensor:
    """The mean of a guided step of DDPM: that of N(mean, var) times exp(s g.x), normalised, where g = grad(...) is the
    classifier's gradient.

    at "xt": g at x_t, as published code and Algorithm 1 have it. at "mean": g at the mean of the step, where the
    derivation expands log p(y | x_{t-1}). mean, xt (B, ...), var (B,), grad a function (B, ...) -> (B, ...).
    """
    return mean + s * pad(var, mean) * grad(xt if at == "xt" else mean)


def compare_classifiers(
    aware: Callable, clean: Callable, x: Tensor, t: Tensor, y: Tensor, a: float
) -> tuple[float, float, float, float]:
    """How well a clean classifier replaces a noise-aware one at the noisy points x (N, D), all with signal scale a:
    (cosine, length, accuracy of aware, accuracy of clean).

    aware(x, t) and clean(x) return logits (N, classes); the clean one is asked at x / a, so that the signal has its
    usual size. Both gradients of log p(y | .) are with respect to x. cosine: of the two gradients at each point, then
    averaged over the points where neither gradient is 0, however short. length: |clean| / |aware|, the median over the
    same points.
    """

    def gradient(log_p):
        return torch.autograd.grad(log_p.gather(1, y[:, None]).sum(), x)[0]

    with torch.enable_grad():
        x = x.detach().requires_grad_()
        p_aware, p_clean = aware(x, t).log_softmax(1), clean(x / a).log_softmax(1)
        true, other = gradient(p_aware), gradient(p_clean)
    sizes = true.norm(dim=1), other.norm(dim=1)
    valid = (sizes[0] > 0) & (sizes[1] > 0)
    cosine = ((true * other).sum(1) / (sizes[0] * sizes[1]))[valid].mean()
    length = (sizes[1] / sizes[0])[valid].median()
    right = [(p.argmax(1) == y).double().mean() for p in (p_aware, p_clean)]
    return cosine.item(), length.item(), right[0].item(), right[1].item()


def grad_through_x0hat(clean: Callable, eps_net: Callable, x: Tensor, t: Tensor, y: Tensor, abar: Tensor) -> Tensor:
    """The gradient, with respect to x = x_t, of log p(y | x0_hat(x_t)): a clean classifier behind the denoiser.

    clean(x0) returns logits (B, classes); eps_net(x, t) predicts the noise; x0_hat is the x0 that these imply, as it
    is, without clipping. (B, ...) -> (B, ...). Works under torch.no_grad, and leaves no graph behind. abar may be
    float64 where x is float32: both networks see the dtype of x.
    """
    abar = abar.to(x)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        a, sigma = pad(abar[t].sqrt(), x), pad((1 - abar[t]).sqrt(), x)
        x0_hat = (x - sigma * eps_net(x, t)) / a
        log_p = F.log_softmax(clean(x0_hat), dim=1)
        return torch.autograd.grad(log_p.gather(1, y[:, None]).sum(), x)[0]


def my_guidance_test(guide: Callable) -> None:
    """Raise an AssertionError if guide(eps, grad, t, s, abar) is not the guided noise prediction; else return None."""
    abar = torch.linspace(1, 0.1, 10, dtype=torch.float64)
    t = torch.tensor([2, 9, 5])
    sigma = (1 - abar[t]).sqrt()[:, None]
    score, grad = torch.randn(2, 3, 4, dtype=torch.float64)
    for s in (0.0, 1.0, 2.5):
        guided_score = score + s * grad
        assert torch.allclose(guide(-sigma * score, grad, t, s, abar), -sigma * guided_score), "scores must add up"


# --- what several exercises share -------------------------------------------------------------------------------------


def _gen(g: Generator) -> Generator:
    return Generator().manual_seed(integer(g, 0, 10**6))


def _uniform(g: Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=g, dtype=torch.float64))


def _a_sigma(abar: Tensor, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """By way of exp and log, so that nothing here shares its arithmetic with an answer."""
    log = abar[t].log().view(-1, *[1] * (like.ndim - 1))
    return (log / 2).exp(), (-torch.expm1(log)).sqrt()


def _score_gap(world: GaussianMixture, x: Tensor, t: Tensor, y: Tensor, abar: Tensor) -> Tensor:
    """The gradient of log p(y | x_t) without a derivative: the score of each point's class less that of all."""
    of_class = torch.stack([world.score(x, t.double(), discrete(abar), c) for c in range(world.classes)])
    return of_class[y, torch.arange(len(x))] - world.score(x, t.double(), discrete(abar))


class Posterior(nn.Module):
    """A perfect classifier of noisy points: the logarithms of p(y | x_t), and, as softmax does not mind, all logits of
    a point moved by a number that depends on the point.

    Where x[:, 0] is beyond `blind`, on its side of 0, the logits are constant. In train mode dropout spoils them.
    `asked` records the (x, t) of every call.
    """

    def __init__(self, world: GaussianMixture, abar: Tensor, blind: float = math.inf):
        super().__init__()
        self.world, self.abar, self.blind = world, abar, blind
        self.gain = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.dropout = nn.Dropout(0.3)
        self.asked: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """(b, d), t (b,) -> (b, classes)."""
        if not isinstance(t, Tensor) or t.shape != (len(x),):
            given = f"of shape {tuple(t.shape)}" if isinstance(t, Tensor) else f"as {type(t).__name__}"
            raise TypeError(f"the classifier was given t {given}: it needs a tensor ({len(x)},), one t per example")
        self.asked.append((x.detach().clone(), t.detach().clone()))
        n, k = len(x), self.world.classes
        labels = torch.arange(k, device=x.device).repeat_interleave(n)
        log_p = (
            self.world.class_log_prob(x.repeat(k, 1), t.double().repeat(k), discrete(self.abar), labels).view(k, n).T
        )
        logits = self.gain * (self.dropout(log_p) + 2 * x.sin().sum(1, keepdim=True))
        seeing = x[:, :1] * math.copysign(1, self.blind) < abs(self.blind)
        return torch.where(seeing, logits, torch.arange(k).to(logits))


class CleanPosterior(Posterior):
    """The perfect classifier of clean points."""

    def forward(self, x0: Tensor) -> Tensor:
        """(b, d) -> (b, classes)."""
        return super().forward(x0, torch.zeros(len(x0), dtype=torch.long, device=x0.device))


class Straight(nn.Module):
    """A classifier whose logits are linear in x (b, ...); it takes a t and does not look at it."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.asked: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """-> (b, classes)."""
        self.asked.append(x.detach().clone())
        return x.flatten(1) @ self.weight.T

    def gradient(self, x: Tensor, y: Tensor) -> Tensor:
        """Of log p(y | x), by hand: the row of y less the average row."""
        scores = x.flatten(1) @ self.weight.detach().T
        p = torch.exp(scores - scores.logsumexp(1, keepdim=True))
        return (self.weight.detach()[y] - p @ self.weight.detach()).view_as(x)


# --- 03.1 bayes_by_hand -----------------------------------------------------------------------------------------------


def _bayes_inputs(g: Generator) -> dict:
    """Five components in three dimensions, of three classes; a point between them."""
    a, sigma = _uniform(g, 0.5, 0.95), _uniform(g, 0.4, 0.9)
    means = 1.2 * randn(g, 5, 3)
    roots = 0.5 * randn(g, 5, 3, 3)
    weights = 0.1 + torch.rand(5, generator=g, dtype=torch.float64)
    x = a * means[integer(g, 0, 4)] / 2 + randn(g, 3) / 2
    return {
        "bayes_by_hand": dict(
            x=x,
            y=integer(g, 0, 2),
            s=_uniform(g, 1.5, 4),
            a=a,
            sigma=sigma,
            weights=weights / weights.sum(),
            means=means,
            covs=roots @ roots.mT + 0.1 * torch.eye(3, dtype=torch.float64),
            labels=torch.tensor([0, 1, 2, 0, 1]),
        )
    }


def _parts(world: GaussianMixture) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return world.weights.clone(), world.means.clone(), world.covs.clone(), world.labels.clone()


X, HALF = (0.3, 0.7), math.sqrt(0.5)
P_OF_X = (0.5670351475, 0.3950432747, 0.0379215779)  # p(y | x_t) at X with a = sigma = HALF, archipelago


def _bayes_posterior(answer: Answer, g: Generator) -> None:
    x = torch.tensor(X, dtype=torch.float64)
    p = torch.stack([torch.as_tensor(answer(x, y, 1.0, HALF, HALF, *_parts(archipelago()))[0]) for y in range(3)])
    if not close(p.sum().detach(), torch.ones(()).double(), rtol=1e-6):
        raise Wrong(f"p(0 | x_t), p(1 | x_t) and p(2 | x_t) must add up to 1; yours add up to {float(p.sum()):.6g}")
    need(p, torch.tensor(P_OF_X).double(), f"p(y | x_t) for y = 0, 1, 2 at x_t = {X} of the archipelago is off")


def _bayes_slope(answer: Answer, g: Generator) -> None:
    """The gradient is the slope of the posterior, measured on the answer itself; its value is another fact."""
    args = _bayes_inputs(g)["bayes_by_hand"]
    x, rest = args["x"], list(args.values())[1:]
    slope, h = torch.zeros_like(x), 1e-5
    for i in range(len(x)):
        step = h * F.one_hot(torch.tensor(i), len(x)).to(x)
        up, down = (torch.as_tensor(answer(z, *rest)[0]).detach().log() for z in (x + step, x - step))
        slope[i] = (up - down) / (2 * h)
    need(
        answer(x, *rest)[1],
        slope,
        "the gradient is not the slope of log p(y | x_t), as measured on your own",
        atol=1e-5,
    )


def _bayes_gradient(answer: Answer, g: Generator) -> None:
    x = torch.tensor(X, dtype=torch.float64)
    right = torch.tensor([-0.3077204852, 0.0485524224]).double()
    got = answer(x, 0, 1.0, HALF, HALF, *_parts(archipelago()))[1]
    score = torch.tensor([0.8524692193, -0.0117253760], dtype=torch.float64)
    if close(plain(got), -HALF * (score + right), rtol=1e-5):
        raise Wrong("the second result is the noise prediction; the order is posterior, gradient, prediction")
    need(got, right, f"the gradient of log p(0 | x_t) at x_t = {X} of the archipelago is off")


def _bayes_ends(answer: Answer, g: Generator) -> None:
    """At s = 0 and s = 1 the prediction is (x_t - a E[x0 | ...]) / sigma, by way of the posterior mean of x0."""
    world, abar = archipelago(), random_abar(g)
    t, x = integer(g, 5, 30), randn(g, 2)
    a, sigma = math.sqrt(float(abar[t])), math.sqrt(1 - float(abar[t]))
    y = integer(g, 0, 2)
    for s, label in ((0.0, None), (1.0, y)):
        x0_hat = world.posterior_mean(x[None], torch.tensor([t]).double(), discrete(abar), label)[0]
        got = answer(x, y, s, a, sigma, *_parts(world))[2]
        what = "E[eps | x_t], whatever the class" if s == 0 else "E[eps | x_t, y]"
        need(got, (x - a * x0_hat) / sigma, f"at s = {s:g} the prediction must be {what}")


def _bayes_printed(answer: Answer, g: Generator) -> None:
    """Two classes at -1 and 1, variance 1/4, abar = 1/2, x_t = 0.3, s = 3: numbers on paper."""
    x = torch.tensor([0.3], dtype=torch.float64)
    p, grad, eps = answer(x, 1, 3.0, HALF, HALF, *_parts(line2()))
    if float(torch.as_tensor(eps).detach()) > 0:
        raise Wrong("two classes at -1 and 1, s = 3: to reach the class at +1 from 0.3 the predicted noise must be < 0")
    need(p, torch.tensor(0.6634758432).double(), "two classes at -1 and 1, x_t = 0.3: p(1 | x_t) is off")
    need(grad, torch.tensor([0.7614672426]).double(), "two classes at -1 and 1, x_t = 0.3: the gradient is off")
    need(eps, torch.tensor([-1.537466047]).double(), "two classes at -1 and 1, x_t = 0.3, s = 3: the prediction is off")


def _bayes_far(answer: Answer, g: Generator) -> None:
    """Between the classes at +-1, far up a direction in which nothing differs: nothing changes but the underflow."""
    covs = 0.25 * torch.eye(2, dtype=torch.float64).repeat(2, 1, 1)
    means = torch.tensor([[-1.0, 0.0], [1.0, 0.0]]).double()
    weights, labels = torch.tensor([0.5, 0.5]).double(), torch.tensor([0, 1])
    x = torch.tensor([0.3, 60.0]).double()
    p, grad, _ = answer(x, 1, 3.0, HALF, HALF, weights, means, covs, labels)
    if not torch.isfinite(torch.as_tensor(p)).all():
        raise Wrong("60 away from the data p(y | x_t) is not finite: all densities are 0 there, and 0 / 0 is NaN")
    need(
        p, torch.tensor(0.6634758432).double(), "60 away from the data, half-way between the classes, p(y | x_t) is off"
    )
    need(grad, torch.tensor([0.7614672426, 0]).double(), "60 away from the data the gradient is off")


def _bayes_by(**how: object) -> tuple[Callable]:
    """noisy(a, sigma, covs, eye), centre(a, means), log(weights), det: their parts; out(parts): what is returned."""

    def bayes_by_hand(
        x: Tensor,
        y: int,
        s: float,
        a: float,
        sigma: float,
        weights: Tensor,
        means: Tensor,
        covs: Tensor,
        labels: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        eye = torch.eye(len(x)).to(x)
        noisy = how.get("noisy", lambda a, sigma, covs, eye: a**2 * covs + sigma**2 * eye)(a, sigma, covs, eye)
        offsets = how.get("centre", lambda a, means: a * means)(a, means) - x
        scores = torch.linalg.solve(noisy, offsets)
        of_class = labels == y
        log_joint = how.get("log", lambda weights, labels: weights.log())(weights, labels)
        log_joint = log_joint - (offsets * scores).sum(1) / 2 - how.get("det", 0.5) * torch.logdet(noisy)
        log_joint = log_joint - len(x) * math.log(2 * math.pi) / 2
        r = log_joint.exp() / log_joint.exp().sum() if how.get("plain") else log_joint.softmax(0)
        within = r[of_class] if how.get("share") else r[of_class] / r[of_class].sum()
        score, score_of_class = r @ scores, within @ scores[of_class]
        parts = dict(p=r[of_class].sum(), grad=score_of_class - score, score=score, score_of_class=score_of_class)
        parts |= dict(joint=log_joint[of_class].exp().sum(), weight=weights[of_class].sum(), s=s, sigma=sigma)
        parts["eps"] = -sigma * (score + s * parts["grad"])
        parts |= how.get("out", lambda v: {})(SimpleNamespace(**parts))
        return parts["p"], parts["grad"], parts["eps"]

    return (bayes_by_hand,)


def _class_weights(weights: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([weights[labels == label].sum() for label in labels])


def _bayes_autograd(x, y, s, a, sigma, weights, means, covs, labels):
    """By torch.distributions and autograd."""
    with torch.enable_grad():
        z = x.detach().clone().requires_grad_()
        noisy = a * a * covs + sigma * sigma * torch.eye(len(x)).to(x)
        log = torch.distributions.MultivariateNormal(a * means, noisy).log_prob(z) + weights.log()
        log_p = log.logsumexp(0)
        log_py = log[labels == y].logsumexp(0) - log_p
        score = torch.autograd.grad(log_p, z, retain_graph=True)[0]
        grad = torch.autograd.grad(log_py, z)[0]
    return log_py.detach().exp(), grad, -sigma * ((1 - s) * score + s * (score + grad))


def _bayes_loop(x, y, s, a, sigma, weights, means, covs, labels):
    """Component by component, by inverse matrices."""
    logs, scores = [], []
    for w, m, c in zip(weights, means, covs, strict=True):
        noisy = a**2 * c + sigma**2 * torch.diag(torch.ones_like(x))
        d = x - a * m
        inverse = torch.linalg.inv(noisy)
        logs.append(math.log(float(w)) - float(d @ inverse @ d) / 2 - math.log(float(torch.linalg.det(noisy))) / 2)
        scores.append(-inverse @ d)
    top = max(logs)
    likely = [math.exp(log - top) for log in logs]
    mine = [p if int(label) == y else 0.0 for p, label in zip(likely, labels, strict=True)]
    score = sum(p * v for p, v in zip(likely, scores, strict=True)) / sum(likely)
    of_class = sum(p * v for p, v in zip(mine, scores, strict=True)) / sum(mine)
    return x.new_tensor(sum(mine) / sum(likely)), of_class - score, sigma * ((s - 1) * score - s * of_class)


BAYES = Exercise(
    id="03.1",
    names=("bayes_by_hand",),
    references=(bayes_by_hand,),
    inputs=_bayes_inputs,
    facts=(
        Fact("p(y | x_t) at a point of the archipelago", _bayes_posterior, "Bayes: p(y) p(x_t | y) / p(x_t)"),
        Fact("the gradient at the same point", _bayes_gradient, "log p(y | x_t) = log p(x_t | y) - log p(x_t) + ..."),
        Fact(
            "the gradient is the slope of log p(y | x_t)", _bayes_slope, "which density is differentiated, and where?"
        ),
        Fact("s = 0 is E[eps | x_t], s = 1 is E[eps | x_t, y]", _bayes_ends, "eps = -sigma score, for each density"),
        Fact(
            "two classes on a line, s = 3: numbers on paper", _bayes_printed, "scores add up; eps is -sigma times one"
        ),
        Fact("stays finite far from the data", _bayes_far, "what is exp(-2000)? form the ratio from logarithms"),
    ),
    mistakes=(
        Mistake(
            "likelihood for posterior",
            "You return p(x_t | y), the density of x_t within the class; p(y | x_t) compares the classes at x_t.",
            _bayes_by(out=lambda v: dict(p=v.joint / v.weight)),
        ),
        Mistake(
            "joint for posterior",
            "You return p(y) p(x_t | y), which is not divided by p(x_t): the classes do not add up to 1.",
            _bayes_by(out=lambda v: dict(p=v.joint)),
        ),
        Mistake(
            "weights forgotten",
            "The weights of the components have no effect: one that is twice as common must count twice.",
            _bayes_by(log=lambda weights, labels: 0 * weights),
        ),
        Mistake(
            "prior forgotten",
            "The prior is forgotten: you compare p(x_t | y) as if all classes were equally common.",
            _bayes_by(log=lambda weights, labels: (weights / _class_weights(weights, labels)).log()),
        ),
        Mistake(
            "clean density",
            "You use the density of clean data. x_t is noisy: its components are centred at a means and have the "
            "covariance a^2 covs + sigma^2 I.",
            _bayes_by(noisy=lambda a, sigma, covs, eye: covs, centre=lambda a, means: means),
        ),
        Mistake(
            "means not scaled",
            "The means are not multiplied by a: noising shrinks the data towards 0 as it adds noise.",
            _bayes_by(centre=lambda a, means: means),
        ),
        Mistake(
            "covariances not scaled",
            "The covariances are not multiplied by a^2: noising shrinks the data before it adds sigma^2 I.",
            _bayes_by(noisy=lambda a, sigma, covs, eye: covs + sigma**2 * eye),
        ),
        Mistake(
            "covariances times a",
            "The covariances are multiplied by a; a covariance is a square, so a^2 belongs there.",
            _bayes_by(noisy=lambda a, sigma, covs, eye: a * covs + sigma**2 * eye),
        ),
        Mistake(
            "sigma for its square",
            "You add sigma I to the covariances; the noise has the standard deviation sigma and the covariance sigma^2 "
            "I.",
            _bayes_by(noisy=lambda a, sigma, covs, eye: a**2 * covs + sigma * eye),
        ),
        Mistake(
            "determinant forgotten",
            "The densities lack 1 / sqrt(det C): wide components count for too much, for their peak is low.",
            _bayes_by(det=0.0),
        ),
        Mistake(
            "determinant without its root",
            "The densities are divided by det C instead of its square root.",
            _bayes_by(det=1.0),
        ),
        Mistake(
            "score of the class alone",
            "Your gradient is the score of p(x_t | y). By Bayes that of p(x_t) is subtracted, for log p(y | x_t) is "
            "their difference and a constant.",
            _bayes_by(
                out=lambda v: dict(grad=v.score_of_class, eps=-v.sigma * (v.score + v.s * v.score_of_class)),
            ),
        ),
        Mistake(
            "difference turned",
            "The difference of the scores is turned: your gradient leads away from the class.",
            _bayes_by(out=lambda v: dict(grad=-v.grad, eps=-v.sigma * (v.score - v.s * v.grad))),
        ),
        Mistake(
            "shares of all",
            "Within the class the components' shares do not add up to 1: its score is p(y | x_t) times what is due.",
            _bayes_by(share=True),
        ),
        Mistake(
            "score for eps",
            "The third result is the guided score; the noise prediction is -sigma times it.",
            _bayes_by(out=lambda v: dict(eps=v.score + v.s * v.grad)),
        ),
        Mistake(
            "eps plus gradient",
            "You add s grad to the noise prediction, as some slides do: sign and factor are those of a score. A score "
            "s grad longer is a noise sigma s grad smaller.",
            _bayes_by(out=lambda v: dict(eps=-v.sigma * v.score + v.s * v.grad)),
        ),
        Mistake(
            "no sigma on the gradient",
            "The gradient enters the noise prediction without sigma: score and noise are mixed.",
            _bayes_by(out=lambda v: dict(eps=-v.sigma * v.score - v.s * v.grad)),
        ),
        Mistake(
            "variance on the gradient",
            "In the noise prediction the gradient is multiplied by the variance sigma^2; eps is -sigma times a score.",
            _bayes_by(out=lambda v: dict(eps=-v.sigma * v.score - v.sigma**2 * v.s * v.grad)),
        ),
        Mistake(
            "gradient of p",
            "Your gradient is that of p(y | x_t); that of its logarithm is 1 / p(y | x_t) times as long.",
            _bayes_by(out=lambda v: dict(grad=v.p * v.grad, eps=-v.sigma * (v.score + v.s * v.p * v.grad))),
        ),
        Mistake(
            "sign of the gradient",
            "In the noise prediction the gradient has the wrong sign: it leads away from the class.",
            _bayes_by(out=lambda v: dict(eps=-v.sigma * v.score + v.sigma * v.s * v.grad)),
        ),
        Mistake(
            "s counts from the class",
            "You start from the conditional score, so that s = 0 is conditional already; here that is s = 1.",
            _bayes_by(out=lambda v: dict(eps=-v.sigma * (v.score_of_class + v.s * v.grad))),
        ),
        Mistake(
            "s ignored",
            "s has no effect: your prediction is the conditional one at every scale.",
            _bayes_by(out=lambda v: dict(eps=-v.sigma * v.score_of_class)),
        ),
        Mistake(
            "not from logarithms",
            "You form densities with exp(...) first: far from the data all of them underflow to 0, and 0 / 0 is NaN.",
            _bayes_by(plain=True),
        ),
    ),
    alternatives=((_bayes_autograd,), (_bayes_loop,)),
    hints=(
        "Three steps: how likely is each component to have made x_t? Where does each one's score point? Then average "
        "the scores, once over all components and once over those of the class.",
        "r = softmax(log w + log N(x; a m, a^2 S + sigma^2 I)); p = the sum of r over the class; grad = score_of_class "
        "- score; eps = -sigma (score + s grad).",
    ),
    probe=lambda answer, g: answer(torch.tensor([0.3, 60.0]).double(), 1, 3.0, HALF, HALF, *_parts(archipelago())),
    hides=("guidance.classifier_guidance", "mixture.GaussianMixture.posterior_mean"),
    points=2,
)

# --- 03.2 noisy_ce_loss -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Read:
    """One call of a classifier: its arguments, and the state it was in."""

    x: Tensor
    t: Tensor
    training: bool


class Reader(nn.Module):
    """A classifier into ten classes, linear in x; `read` records its calls. With `sure` labels it knows the answer."""

    def __init__(self, g: Generator, d: int, sure: Tensor | None = None):
        super().__init__()
        self.weight, self.bias = nn.Parameter(randn(g, 10, d)), nn.Parameter(randn(g, 10))
        self.sure = sure
        self.read: list[Read] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x (b, ...), t (b,) -> logits (b, 10)."""
        if not isinstance(t, Tensor) or t.shape != (len(x),):
            given = f"of shape {tuple(t.shape)}" if isinstance(t, Tensor) else f"as {type(t).__name__}"
            raise TypeError(f"the classifier was given t {given}: it needs a tensor ({len(x)},), one t per example")
        self.read.append(Read(x.detach().clone(), t.detach().clone(), self.training))
        if self.sure is not None:
            return 50.0 * F.one_hot(self.sure, 10).to(x) + 0 * self.bias
        return x.flatten(1) @ self.weight.T + self.bias

    def log_p(self, x: Tensor) -> Tensor:
        """What a right loss makes of it, without softmax's own code."""
        logits = x.flatten(1) @ self.weight.detach().T + self.bias.detach()
        return logits - logits.exp().sum(1, keepdim=True).log()


def _digits(g: Generator, n: int) -> Tensor:
    return torch.randint(0, 10, (n,), generator=g)


def _eight() -> Tensor:
    return torch.linspace(1, 0.1, 9, dtype=torch.float64)


def _read(answer: Answer, clf: Reader, *args: object) -> tuple[Read, Tensor]:
    """Call the answer; what the classifier was asked, and the loss. Raises Wrong unless it was asked once."""
    clf.read.clear()
    loss = answer(clf, *args)
    if len(clf.read) != 1:
        raise Wrong(f"the classifier was called {len(clf.read)} times; once is enough, with the whole batch")
    return clf.read[0], torch.as_tensor(loss)


def _ce_inputs(g: Generator) -> dict:
    (x0,) = pictures(g, 1)
    args = dict(clf=Reader(g, x0[0].numel()), x0=x0, y=_digits(g, len(x0)), abar=random_abar(g), gen=_gen(g))
    return {"noisy_ce_loss": args}


def _ce_times(answer: Answer, g: Generator) -> None:
    b, n, gen, clf = 32, 40, _gen(g), Reader(g, 3)
    seen = []
    for _ in range(n):
        t = _read(answer, clf, randn(g, b, 3), _digits(g, b), _eight(), gen)[0].t
        if t.is_floating_point():
            raise Wrong(f"t came as {t.dtype}: times are integers here, the same that index abar")
        seen.append(t)
    seen = torch.stack(seen)
    if (seen == seen[:, :1]).all():
        raise Wrong("all examples of a batch have the same t: each needs its own")
    if (seen == 0).any():
        raise Wrong("the classifier was called with t = 0; t is drawn from 1 .. T")
    if (seen == seen[:1]).all():
        raise Wrong("the same times at every call: draw anew, with gen")
    counts = torch.bincount(seen.flatten(), minlength=9)[1:]
    if len(counts) > 8 or ((counts - b * n / 8).abs() > 7 * math.sqrt(b * n / 8)).any():
        shown = ", ".join(map(str, counts.tolist()))
        raise Wrong(f"in {b * n} draws t = 1 .. 8 (T = 8) came up {shown} times: each should be as likely as any other")


def _ce_noised(answer: Answer, g: Generator) -> None:
    """The share of x0 by moving it by 1 under the same random numbers; the noise by its moments, given x0 = 0."""
    abar, b, seed, clf = _eight(), 64, integer(g, 0, 10**6), Reader(g, 12)
    y, zero = _digits(g, b), torch.zeros(b, 3, 4, dtype=torch.float64)
    first = _read(answer, clf, zero, y, abar, Generator().manual_seed(seed))[0]
    moved = _read(answer, clf, zero + 1, y, abar, Generator().manual_seed(seed))[0]
    if not first.x.any():
        raise Wrong("the classifier was shown the clean x0: it must see x_t, or it never learns what noise looks like")
    if first.x.shape != zero.shape:
        raise Wrong(f"for x0 of shape {tuple(zero.shape)} the classifier was shown shape {tuple(first.x.shape)}")
    a, sigma = _a_sigma(abar, first.t.clamp(1, 8), zero)
    share = (moved.x - first.x) / a
    if not close(share, torch.ones_like(share), rtol=1e-4):
        worst = int((share - 1).abs().flatten(1).amax(1).argmax())
        raise Wrong(
            f"x0 + 1 moves what the classifier saw with t = {int(first.t[worst])} by {float(share[worst, 0, 0]):.4g} "
            "sqrt(abar_t): is it noised to the t it is told?"
        )
    noise = first.x / sigma
    if abs(float(noise.mean())) > 7 / math.sqrt(noise.numel()):
        raise Wrong(f"for x0 = 0 the mean of x_t is not 0 but {float(noise.mean()):.3g} sqrt(1 - abar_t)")
    if close(noise[1:], noise[:1].expand_as(noise[1:]), rtol=1e-4):
        raise Wrong("all examples of a batch share one noise: each needs its own")
    if abs(float(noise.var()) - 1) > 7 * math.sqrt(2 / noise.numel()):
        raise Wrong(
            f"for x0 = 0 the variance of x_t is {float(noise.var()):.3f} (1 - abar_t): eps is standard normal, times a "
            "standard deviation"
        )


def _ce_sure(answer: Answer, g: Generator) -> None:
    y = _digits(g, 7)
    loss = _read(answer, Reader(g, 6, sure=y), randn(g, 7, 6), y, _eight(), _gen(g))[1]
    if abs(float(loss.detach())) > 1e-6:
        raise Wrong(
            f"for a classifier that is sure of the right class (its logit is 50, the others are 0) the loss is "
            f"{float(loss.detach()):.4f}: it must be 0"
        )


def _ce_value(answer: Answer, g: Generator) -> None:
    args = _ce_inputs(g)["noisy_ce_loss"]
    read, loss = _read(answer, *args.values())
    log_p = args["clf"].log_p(read.x)
    due = -math.fsum(float(row[label]) for row, label in zip(log_p, args["y"].tolist(), strict=True)) / len(log_p)
    got = float(loss.detach())
    if not math.isclose(got, due, rel_tol=1e-5):
        raise Wrong(
            f"the loss is {got:.6g}, {got / due:.4g} times the mean over the batch of -log p(y | x_t), as the "
            "classifier answered",
            expected=f"{due:.6g}",
        )


def _ce_learns(answer: Answer, g: Generator) -> None:
    args = _ce_inputs(g)["noisy_ce_loss"]
    read, loss = _read(answer, *args.values())
    slope = torch.autograd.grad(loss, args["clf"].bias, allow_unused=True)[0] if loss.requires_grad else None
    if slope is None:
        raise Wrong("no gradient reaches the classifier: the loss must stay connected with its logits")
    due = (args["clf"].log_p(read.x).exp() - F.one_hot(args["y"], 10)).mean(0)
    need(slope, due, "the gradient that reaches the logits is not p - onehot(y), averaged over the batch")


def _ce_mode(answer: Answer, g: Generator) -> None:
    args = _ce_inputs(g)["noisy_ce_loss"]
    read, _ = _read(answer, *args.values())
    if not read.training or not args["clf"].training:
        raise Wrong("the classifier came in train mode and was put into eval mode: this is its training loss")


def _ce_single(answer: Answer, g: Generator) -> None:
    clf, x0 = Reader(g, 12).float(), randn(g, 5, 3, 4).float()
    read, _ = _read(answer, clf, x0, _digits(g, 5), random_abar(g), _gen(g))
    if read.x.dtype != torch.float32:
        raise Wrong(f"x0 is float32 and the classifier was shown {read.x.dtype}: abar is float64, cast it")


def _ce_by(
    time: Callable = lambda abar, b, gen: torch.randint(1, len(abar), (b,), generator=gen),
    noise: Callable = lambda x0, gen: torch.randn(x0.shape, generator=gen, dtype=x0.dtype),
    a: Callable = lambda v: v.sqrt(),
    sigma: Callable = lambda v: (1 - v).sqrt(),
    show: Callable = lambda clf, x0, xt, t, abar: clf(xt, t),
    loss: Callable = F.cross_entropy,
) -> tuple[Callable]:
    def noisy_ce_loss(clf: nn.Module, x0: Tensor, y: Tensor, abar: Tensor, gen: Generator) -> Tensor:
        abar = abar.to(x0)
        t = time(abar, len(x0), gen)
        eps = noise(x0, gen)
        xt = pad(a(abar[t]), x0) * x0 + pad(sigma(abar[t]), x0) * eps
        return loss(show(clf, x0, xt, t, abar), y)

    return (noisy_ce_loss,)


def _ce_eval(clf: nn.Module, x0: Tensor, xt: Tensor, t: Tensor, abar: Tensor) -> Tensor:
    clf.eval()
    return clf(xt, t)


def _ce_no_grad(clf: nn.Module, x0: Tensor, xt: Tensor, t: Tensor, abar: Tensor) -> Tensor:
    with torch.no_grad():
        return clf(xt, t)


def _ce_by_hand(clf, x0, y, abar, gen):
    """The noise first, then the times; the cross-entropy from log_softmax."""
    eps = torch.randn(x0.shape, generator=gen, dtype=x0.dtype)
    t = 1 + torch.randint(len(abar) - 1, (len(x0),), generator=gen)
    angle = torch.acos(abar.sqrt())[t].to(x0)
    xt = torch.einsum("b,b...->b...", angle.cos(), x0) + torch.einsum("b,b...->b...", angle.sin(), eps)
    log_p = clf(xt, t).log_softmax(1)
    return -log_p[torch.arange(len(y)), y].mean()


def _ce_one_by_one(clf, x0, y, abar, gen):
    rows, times = [], []
    for x in x0:
        n = int(torch.randint(1, len(abar), (), generator=gen))
        v = float(abar[n])
        rows.append(v**0.5 * x + (1 - v) ** 0.5 * torch.randn(x.shape, generator=gen, dtype=x.dtype))
        times.append(n)
    logits = clf(torch.stack(rows), torch.tensor(times))
    return (logits.logsumexp(1) - logits.gather(1, y[:, None])[:, 0]).sum() / len(y)


def _ce_see(answer: Answer, g: Generator) -> object:
    """Categories, the same for all answers with one mistake, in whatever order they draw."""
    abar, b, seed, clf = _eight(), 64, integer(g, 0, 10**6), Reader(g, 4)
    y, x0, gen = _digits(g, b), randn(g, b, 4), Generator().manual_seed(seed)
    found = [_read(answer, clf, x0, y, abar, gen) for _ in range(30)]
    t = torch.stack([read.t for read, _ in found])
    x = torch.stack([read.x for read, _ in found])
    seen: dict[str, object] = dict(
        kind=str(t.dtype),
        low=float(t.min()),
        high=float(t.max()),
        one_time=bool((t == t[:, :1]).all()),
        training=[found[0][0].training, clf.training],
        graph=found[0][1].requires_grad,
        returned=type(answer(clf, x0, y, abar, gen)).__name__,
    )
    if t.is_floating_point():
        return seen

    def again(x0: Tensor, noise: int = 0) -> Read:
        answer.reseed(noise)
        return _read(answer, clf, x0, y, abar, Generator().manual_seed(seed))[0]

    here, there, other = again(0 * x0), again(0 * x0 + 1), again(0 * x0, noise=1)
    share = {"a": _a_sigma(abar, here.t, x0)[0], "a of t + 1": abar[(here.t + 1).clamp(max=8)].sqrt()[:, None]}
    share |= {"a^2": abar[here.t][:, None], "1": torch.ones(b, 1).double(), "0": 0 * x0}
    share |= {"sigma": (1 - abar[here.t]).sqrt()[:, None]}
    seen["share"] = [k for k, v in share.items() if close(there.x - here.x, v.expand(b, 4), rtol=1e-5)]
    seen["from_gen"] = [close(here.t, other.t), close(here.x, other.x)]
    seen["clean"] = not here.x.any()
    if seen["clean"] or not seen["share"] or seen["share"] == ["0"]:
        return seen
    sigma = torch.stack([_a_sigma(abar, n, x0)[1] for n in t.clamp(min=1)])
    left = x - abar[t][..., None].sqrt() * x0 if seen["share"] == ["a"] else sigma
    noise, doubled = left / sigma, left / sigma**2
    seen["one_noise"] = close(noise[0][1:], noise[0][:1].expand(b - 1, 4), rtol=1e-4)
    seen["offset"] = bool(noise.mean().abs() > 0.1)
    unit = [name for name, v in (("std", noise), ("var", doubled)) if abs(float(v.var()) - 1) < 0.08]
    seen["noise"] = unit
    read, loss = found[0]
    log_p = clf.log_p(read.x)
    chosen = log_p[torch.arange(b), y]
    twice = log_p.exp().log_softmax(1)[torch.arange(b), y]
    due = dict(mean=-chosen.mean(), sum=-chosen.sum(), classes=-chosen.mean() / 10, up=chosen.mean())
    due |= dict(twice=-twice.mean(), p=-chosen.exp().mean(), right=(log_p.argmax(1) == y).double().mean())
    due |= dict(square=(log_p.exp() - F.one_hot(y, 10)).square().mean())
    got = float(loss.detach())
    seen["loss"] = [name for name, value in due.items() if math.isclose(got, float(value), rel_tol=1e-5)]
    return seen


NOISY_CE = Exercise(
    by_probe=True,
    id="03.2",
    names=("noisy_ce_loss",),
    references=(noisy_ce_loss,),
    inputs=_ce_inputs,
    graph=True,
    kind="training",
    facts=(
        Fact("every example has a t of its own, uniform over 1 .. T", _ce_times, "randint leaves out its upper end"),
        Fact(
            "the classifier sees x_t, noised to the t it is told", _ce_noised, "one t: for abar and for the classifier"
        ),
        Fact("a classifier that is sure and right has the loss 0", _ce_sure, "cross_entropy takes logits"),
        Fact("the loss is the mean of -log p(y | x_t)", _ce_value, "a mean over the batch, and over nothing else"),
        Fact("the gradient reaches the classifier", _ce_learns, "no detach, no .item(), no no_grad"),
        Fact("the classifier stays in train mode", _ce_mode, "who calls this loss is training"),
        Fact("float32 images go with a float64 table", _ce_single, "abar.to(x0)"),
    ),
    mistakes=(
        Mistake(
            "clean x shown",
            "The classifier sees the clean x0, told a t as if it were noisy: at the noise where guidance needs it, it "
            "has never been.",
            _ce_by(show=lambda clf, x0, xt, t, abar: clf(x0, t)),
        ),
        Mistake(
            "t always 0",
            "The classifier is told t = 0 whatever the noise: it must guess how noisy x_t is.",
            _ce_by(show=lambda clf, x0, xt, t, abar: clf(xt, 0 * t)),
        ),
        Mistake(
            "told t - 1",
            "The classifier is told t - 1 where x_t was noised to t: index and t are the same number here.",
            _ce_by(show=lambda clf, x0, xt, t, abar: clf(xt, t - 1)),
        ),
        Mistake(
            "told t / T",
            "The classifier is told t / T; here it takes the integer t that indexes abar.",
            _ce_by(show=lambda clf, x0, xt, t, abar: clf(xt, t.to(x0) / (len(abar) - 1))),
        ),
        Mistake(
            "told another t",
            "The classifier is told a t drawn anew, which has nothing to do with the noise in x_t.",
            _ce_by(
                lambda abar, b, gen: torch.randint(1, len(abar), (2, b), generator=gen),
                a=lambda v: v[0].sqrt(),
                sigma=lambda v: (1 - v[0]).sqrt(),
                show=lambda clf, x0, xt, t, abar: clf(xt, t[1]),
            ),
        ),
        Mistake(
            "one noise level",
            "One t is drawn for the whole batch: each step then teaches a single noise level.",
            _ce_by(lambda abar, b, gen: torch.randint(1, len(abar), (1,), generator=gen).expand(b)),
        ),
        Mistake(
            "t from 0",
            "t runs from 0 to T - 1: t = 0 is clean, and the noisiest t is never seen.",
            _ce_by(lambda abar, b, gen: torch.randint(0, len(abar) - 1, (b,), generator=gen)),
        ),
        Mistake(
            "t = 0 included",
            "t runs from 0 to T: t = 0 is clean, and no step of a sampler asks there.",
            _ce_by(lambda abar, b, gen: torch.randint(0, len(abar), (b,), generator=gen)),
        ),
        Mistake(
            "T left out",
            "t = T is never drawn: randint leaves out its upper end, and abar has T + 1 entries.",
            _ce_by(lambda abar, b, gen: torch.randint(1, len(abar) - 1, (b,), generator=gen)),
        ),
        Mistake(
            "t not from gen",
            "The times come from torch's global state, not from gen: the run cannot be repeated.",
            _ce_by(lambda abar, b, gen: torch.randint(1, len(abar), (b,))),
        ),
        Mistake(
            "noise not from gen",
            "The noise comes from torch's global state, not from gen: the run cannot be repeated.",
            _ce_by(noise=lambda x0, gen: torch.randn_like(x0)),
        ),
        Mistake(
            "one noise for all",
            "All examples of a batch get the same noise.",
            _ce_by(noise=lambda x0, gen: torch.randn(x0[:1].shape, generator=gen, dtype=x0.dtype).expand_as(x0)),
        ),
        Mistake(
            "uniform noise",
            "The noise is uniform in [0, 1) (rand), not standard normal (randn): it brightens every picture.",
            _ce_by(noise=lambda x0, gen: torch.rand(x0.shape, generator=gen, dtype=x0.dtype)),
        ),
        Mistake(
            "variance for std",
            "The noise is multiplied by the variance 1 - abar_t: the classifier learns on less noise than samplers "
            "show.",
            _ce_by(sigma=lambda v: 1 - v),
        ),
        Mistake(
            "no root on abar",
            "The signal is multiplied by abar_t instead of its square root.",
            _ce_by(a=lambda v: v),
        ),
        Mistake(
            "coefficients exchanged",
            "The coefficients of x0 and noise are exchanged: what is told to be nearly clean is nearly all noise.",
            _ce_by(a=lambda v: (1 - v).sqrt(), sigma=lambda v: v.sqrt()),
        ),
        Mistake(
            "softmax twice",
            "You take softmax before cross_entropy, which takes its own: among ten classes the loss cannot fall below "
            "1.46, and gradients are faint.",
            _ce_by(loss=lambda logits, y: F.cross_entropy(logits.softmax(1), y)),
        ),
        Mistake(
            "sum over the batch",
            "You sum over the batch: the step grows with the number of examples.",
            _ce_by(loss=lambda logits, y: F.cross_entropy(logits, y, reduction="sum")),
        ),
        Mistake(
            "mean over classes",
            "You average over the classes as well: onehot(y) has one entry that counts, so the loss is 10 times too "
            "small for ten classes.",
            _ce_by(loss=lambda logits, y: -(F.one_hot(y, logits.shape[1]) * logits.log_softmax(1)).mean()),
        ),
        Mistake(
            "minus forgotten",
            "The minus is forgotten: training would make the right class less and less likely.",
            _ce_by(loss=lambda logits, y: -F.cross_entropy(logits, y)),
        ),
        Mistake(
            "probability for its logarithm",
            "The loss is -p(y | x_t) without the logarithm: nearly flat where the classifier is wrong and sure of it. "
            "F.nll_loss expects log-probabilities.",
            _ce_by(loss=lambda logits, y: F.nll_loss(logits.softmax(1), y)),
        ),
        Mistake(
            "squared error",
            "This is the squared error of the probabilities; it hardly learns where the classifier is wrong and sure "
            "of it. Take the cross-entropy.",
            _ce_by(loss=lambda logits, y: F.mse_loss(logits.softmax(1), F.one_hot(y, logits.shape[1]).to(logits))),
        ),
        Mistake(
            "no gradient",
            "The classifier runs under no_grad: nothing can be learned from this loss.",
            _ce_by(show=_ce_no_grad),
        ),
        Mistake(
            "a number",
            "The loss is returned as a number (.item()), which has lost its way back to the classifier.",
            _ce_by(loss=lambda logits, y: F.cross_entropy(logits, y).item()),
        ),
        Mistake(
            "eval mode",
            "You put the classifier into eval mode: in training dropout and batch norm must act, and the mode is the "
            "caller's.",
            _ce_by(show=_ce_eval),
        ),
    ),
    alternatives=((_ce_by_hand,), (_ce_one_by_one,)),
    hints=(
        "As for a denoiser: draw t and noise, make x_t. What the network answers is then compared with y, not with "
        "eps.",
        "t = randint(1, T + 1, (B,)), x_t = q_sample(x0, t, eps, abar), F.cross_entropy(clf(x_t, t), y).",
    ),
    probe=_ce_see,
    hides=("classifier.classifier_loss", "schedules.add_noise"),
)

# --- 03.3 classifier_grad ---------------------------------------------------------------------------------------------


def _grad_inputs(g: Generator) -> dict:
    abar = random_abar(g)
    clf = Posterior(archipelago(), abar).eval()
    return {"classifier_grad": dict(clf=clf, x=1.2 * randn(g, 6, 2), t=times(g, 6), y=_labels(g, 6))}


def _labels(g: Generator, n: int, classes: int = 3) -> Tensor:
    return torch.randint(0, classes, (n,), generator=g)


def _uphill(log_p: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor, what: str) -> None:
    """Raise Wrong if log p falls along the gradient for most points."""
    step = 1e-4 * grad / pad(grad.flatten(1).norm(dim=1).clamp(min=1e-12), grad)
    if float((log_p(x + step) > log_p(x)).double().mean()) < 0.3:
        raise Wrong(f"{what} falls along your gradient: it leads AWAY from the class")


def _grad_world(answer: Answer, g: Generator) -> None:
    clf, x, t, y = _grad_inputs(g)["classifier_grad"].values()
    world, abar = clf.world, clf.abar
    got = answer(clf, x.clone(), t.clone(), y.clone()).detach()
    right = _score_gap(world, x, t, y, abar)
    if got.shape == x.shape:
        _uphill(lambda z: world.class_log_prob(z, t.double(), discrete(abar), y), x, got, "log p(y | x_t)")
    message = "it is not the score of the class less the score of all (the classifier here is perfect)"
    need(got, right, message + _lengths(got, right, t))


def _grad_pictures(answer: Answer, g: Generator) -> None:
    (x,) = pictures(g, 1)
    clf, y = Straight(0.3 * randn(g, 7, x[0].numel())).eval(), _labels(g, 4, 7)
    got = answer(clf, x.clone(), times(g), y)
    need(got, clf.gradient(x, y), "for logits W x the gradient of picture i is W[y] - sum_c p(c) W[c]; yours is not")


def _grad_shift(answer: Answer, g: Generator) -> None:
    """One class alone: its probability is 1 whatever its logit."""
    x, clf = randn(g, 5, 4), Straight(randn(g, 1, 4)).eval()
    got = answer(clf, x.clone(), times(g, 5), torch.zeros(5, dtype=torch.long))
    need(got, 0 * x, "with a single class p(y | x) is 1 everywhere, so the gradient of its logarithm is 0")


def _grad_asks(answer: Answer, g: Generator) -> None:
    clf, x, t, y = _grad_inputs(g)["classifier_grad"].values()
    answer(clf, x.clone(), t.clone(), y)
    if not clf.asked:
        raise Wrong("the classifier was not called")
    _same_points(clf.asked, x, t, "x")


def _lengths(got: Tensor, right: Tensor, t: Tensor) -> str:
    """Whether only the lengths are wrong, as the end of a message."""
    if got.shape != right.shape or F.cosine_similarity(got.flatten(1), right.flatten(1), dim=1).min() < 1 - 1e-9:
        return ""
    ratio = (got.flatten(1).norm(dim=1) / right.flatten(1).norm(dim=1)).tolist()
    at = ", ".join(f"{r:.4g} (t = {n})" for r, n in zip(ratio[:3], t.tolist(), strict=False))
    return f"; directions are right, lengths are not: yours over the right ones {at}, ..."


def _same_points(asked: list[tuple[Tensor, Tensor]], x: Tensor, t: Tensor, name: str) -> None:
    """Raise Wrong unless the network was asked about these points, each at its t, in whatever batches."""
    points, at = torch.cat([p for p, _ in asked]), torch.cat([n for _, n in asked])
    for point, time in zip(points, at.tolist(), strict=True):
        match = torch.isclose(x, point).flatten(1).all(1).nonzero()
        if not len(match):
            raise Wrong(f"the network was asked about another point than {name}: {_shown(point)}")
        if time != int(t[match[0]]):
            due = int(t[match[0]])
            raise Wrong(f"the network was called with t = {time:g} for an example whose {name} has t = {due}")


def _shown(point: Tensor) -> str:
    return "(" + ", ".join(f"{v:.3g}" for v in point.flatten()[:4].tolist()) + ")"


def _grad_no_grad(answer: Answer, g: Generator) -> None:
    args = _grad_inputs(g)["classifier_grad"]
    due = answer(*args.values()).detach()
    with torch.no_grad():
        need(answer(*args.values()), due, "under torch.no_grad, where samplers run, the result is another")


def _grad_by(**how: object) -> tuple[Callable]:
    """of(logits, y): what is differentiated; x, t, before(clf): what the classifier is given; take: how."""

    def classifier_grad(clf: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        how.get("before", lambda clf: None)(clf)
        with torch.enable_grad() if not how.get("bare") else contextlib.nullcontext():
            x = x.requires_grad_() if how.get("callers") else x.detach().clone().requires_grad_()
            value = how.get("of", _log_p)(clf(x, how.get("t", lambda t: t)(t)), y)
            if how.get("backward"):
                value.backward()
                return x.grad.detach()
            return torch.autograd.grad(value, x, create_graph=bool(how.get("graph")))[0]

    return (classifier_grad,)


def _log_p(logits: Tensor, y: Tensor) -> Tensor:
    return logits.log_softmax(1).gather(1, y[:, None]).sum()


def _grad_rows(clf, x, t, y):
    """Example by example, through the cross-entropy."""
    rows = []
    with torch.enable_grad():
        for i in range(len(x)):
            z = x[i : i + 1].detach().clone().requires_grad_()
            loss = F.cross_entropy(clf(z, t[i : i + 1]), y[i : i + 1])
            rows.append(-torch.autograd.grad(loss, z)[0])
    return torch.cat(rows)


def _grad_logsumexp(clf, x, t, y):
    with torch.enable_grad():
        z = x.detach().clone()
        z.requires_grad = True
        logits = clf(z, t)
        value = logits[torch.arange(len(y)), y] - logits.logsumexp(dim=1)
        value.backward(torch.ones_like(value), inputs=[z])
    return z.grad.detach()


def _grad_weighted(clf, x, t, y):
    """The summed cross-entropy, its sign turned."""
    with torch.enable_grad():
        z = x.clone().detach().requires_grad_(True)
        loss = F.cross_entropy(clf(z, t), y, reduction="sum")
        (slope,) = torch.autograd.grad(loss, [z])
    return -slope.detach()


def _grad_see(answer: Answer, g: Generator) -> object:
    """Whether it works under no_grad, and what it leaves in the parameters."""
    args = _grad_inputs(g)["classifier_grad"]
    answer(*args.values())
    left = args["clf"].gain.grad is not None
    try:
        with torch.no_grad():
            answer(*args.values())
    except Failed as error:
        return [left, type(error.__cause__).__name__]
    return [left, ""]


CLASSIFIER_GRAD = Exercise(
    id="03.3",
    names=("classifier_grad",),
    references=(classifier_grad,),
    inputs=_grad_inputs,
    batch=("x", "t", "y"),
    facts=(
        Fact(
            "a perfect classifier: the score of the class less that of all",
            _grad_world,
            "log p(y | x_t) of the label y, with respect to x",
        ),
        Fact("asks about x at its own t", _grad_asks, "x and t go into the classifier as they came"),
        Fact(
            "one class alone: the gradient is 0", _grad_shift, "a logit is not log p(y | x): softmax has a denominator"
        ),
        Fact("pictures and seven classes, by hand", _grad_pictures, "classes are along axis 1 of the logits"),
        Fact("works under torch.no_grad", _grad_no_grad, "samplers run under no_grad: switch it on inside"),
    ),
    mistakes=(
        Mistake(
            "raw logit",
            "You differentiate the raw logit of y. Moving all logits of a point together changes no probability, but "
            "it changes your gradient: log_softmax is missing.",
            _grad_by(of=lambda logits, y: logits.gather(1, y[:, None]).sum()),
        ),
        Mistake(
            "gradient of p",
            "You differentiate p(y | x), not its logarithm: off by the factor p(y | x_t), faintest where the class is "
            "farthest.",
            _grad_by(of=lambda logits, y: logits.softmax(1).gather(1, y[:, None]).sum()),
        ),
        Mistake(
            "softmax over the batch",
            "log_softmax runs over axis 0: example i then depends on example j. Classes are along axis 1.",
            _grad_by(of=lambda logits, y: logits.log_softmax(0).gather(1, y[:, None]).sum()),
        ),
        Mistake(
            "mean over the batch",
            "You take the mean over the batch: each gradient comes out B times too small. The sum keeps examples "
            "apart.",
            _grad_by(of=lambda logits, y: logits.log_softmax(1).gather(1, y[:, None]).mean()),
        ),
        Mistake(
            "all classes",
            "You sum log p over all classes: y has no effect.",
            _grad_by(of=lambda logits, y: logits.log_softmax(1).sum()),
        ),
        Mistake(
            "the likeliest class",
            "You differentiate the log-probability of the likeliest class, not of y: it guides to where x is already.",
            _grad_by(of=lambda logits, y: logits.log_softmax(1).amax(1).sum()),
        ),
        Mistake(
            "sign",
            "This is the gradient of the cross-entropy, which is -log p(y | x_t): it leads away from the class.",
            _grad_by(of=lambda logits, y: F.cross_entropy(logits, y, reduction="sum")),
        ),
        Mistake(
            "mean cross-entropy",
            "This is the gradient of the mean cross-entropy: its sign is turned, and it is B times too small.",
            _grad_by(of=F.cross_entropy),
        ),
        Mistake(
            "softmax before log_softmax",
            "You take softmax and then log_softmax of its result: log p(y | x) is log_softmax of the logits "
            "themselves, or the logarithm of their softmax.",
            _grad_by(of=lambda logits, y: logits.softmax(1).log_softmax(1).gather(1, y[:, None]).sum()),
        ),
        Mistake(
            "train mode",
            "You put the classifier into train mode: its dropout now spoils the gradient at random, and it stays so.",
            _grad_by(before=lambda clf: clf.train()),
        ),
        Mistake(
            "no enable_grad",
            "Under torch.no_grad there is no graph to differentiate: wrap your lines in torch.enable_grad().",
            _grad_by(bare=True),
        ),
        Mistake(
            "detached",
            "The graph is cut before the gradient is taken: detach, .data and argmax leave no way from log p back to "
            "x.",
            _grad_by(of=lambda logits, y: _log_p(logits.detach(), y)),
        ),
        Mistake(
            "t - 1",
            "The classifier is called with t - 1 for an x_t of noise t: index and t are the same number here.",
            _grad_by(t=lambda t: t - 1),
        ),
        Mistake(
            "the caller's x",
            "You set requires_grad on the caller's own x: from then on the sampler records a graph that grows with "
            "every step. Work on x.detach().",
            _grad_by(callers=True),
        ),
        Mistake(
            "graph kept",
            "The gradient is returned with its own graph (create_graph=True): memory grows with every step.",
            _grad_by(graph=True),
        ),
        Mistake(
            "backward",
            "loss.backward() also fills the .grad of the classifier's parameters, and they pile up; "
            "torch.autograd.grad takes the gradient with respect to x alone.",
            _grad_by(backward=True),
        ),
    ),
    alternatives=((_grad_rows,), (_grad_logsumexp,), (_grad_weighted,)),
    hints=(
        "Which number of each example do you differentiate: a logit, a probability or its logarithm? And how do B "
        "numbers become one, so that autograd returns B separate gradients?",
        "With enable_grad: x = x.detach().requires_grad_(); sum log_softmax(clf(x, t), 1) at y; torch.autograd.grad of "
        "that sum with respect to x.",
    ),
    probe=_grad_see,
    hides=("classifier.log_prob_of", "guidance.classifier_guidance"),
)

# --- 03.4 guided_eps --------------------------------------------------------------------------------------------------


def _guided_inputs(g: Generator) -> dict:
    eps, grad = pictures(g, 2)
    return {"guided_eps": dict(eps=eps, grad=grad, t=times(g), s=_uniform(g, 1.5, 4), abar=random_abar(g))}


def _guided_probes(g: Generator) -> tuple:
    s = _uniform(g, 1.5, 4)
    probes, atoms = ddpm_probes(g, {"s": s})
    return probes, atoms | {"s": torch.full((len(probes),), s, dtype=torch.float64)}


def _world_at(g: Generator, n: int = 6) -> tuple:
    """The archipelago, a table, points, times and labels; the exact eps and the exact gradient there."""
    world, abar, x, t, y = archipelago(), random_abar(g), 1.2 * randn(g, n, 2), times(g, n), _labels(g, n)
    return world, abar, x, t, y, exact_eps(world, x, t, abar), _score_gap(world, x, t, y, abar)


def _guided_toward(answer: Answer, g: Generator) -> None:
    """The x0 that the guided eps implies lies further along the gradient."""
    _, abar, _, t, _, eps, grad = _world_at(g)
    got = answer(eps.clone(), grad.clone(), t, 2.0, abar)
    along = ((eps - got) * grad).sum(1)  # x0 moves against eps
    if (along < 0).all():
        raise Wrong(
            "your guided eps moves AWAY from the class: sign of the classifier gradient. What is predicted as noise is "
            "taken away from x_t"
        )
    if not (along > 0).all():
        raise Wrong("the x0 that the guided eps implies does not lie further along the gradient than without guidance")


def _guided_ends(answer: Answer, g: Generator) -> None:
    world, abar, x, t, y, eps, grad = _world_at(g)
    need(answer(eps.clone(), grad.clone(), t, 0.0, abar), eps, "at s = 0 nothing may change")
    due = torch.cat([exact_eps(world.given(int(c)), x[i, None], t[i, None], abar) for i, c in enumerate(y)])
    got = answer(eps.clone(), grad.clone(), t, 1.0, abar)
    message = "with the exact gradient and s = 1 it must be E[eps | x_t, y]"
    sizes = (got - eps).norm(dim=1) / (due - eps).norm(dim=1)
    if (sizes - 1).abs().max() > 1e-4:
        message += f"; your correction of example 0 (t = {int(t[0])}) is {float(sizes[0]):.4g} times as long as is due"
    need(got, due, message)


def _guided_printed(answer: Answer, g: Generator) -> None:
    """Two classes at -1 and 1, variance 1/4, abar = 1/2, x_t = 0.3, s = 3: by hand, and as some slides have it."""
    eps, grad = torch.tensor([[0.0778499059]]).double(), torch.tensor([[0.7614672426]]).double()
    got = answer(eps, grad, torch.tensor([1]), 3.0, torch.tensor([1, 0.5]).double())
    due = torch.tensor([[-1.537466047]]).double()
    if close(got.detach(), torch.tensor([[2.362251634]]).double(), rtol=1e-6):
        raise Wrong("eps + s grad, as some slides have it: 2.362251634 here, and x0 lands at -1.94, in the other class")
    need(got, due, "for eps = 0.0778, grad = 0.7615, abar_t = 1/2 and s = 3 it is off")


def _guided_scores(answer: Answer, g: Generator) -> None:
    """Every example at its own t, any axes, by -eps / sigma."""
    abar, s = random_abar(g), _uniform(g, 1.5, 4)
    for shape in ((5,), (3, 4), (2, 3, 2, 2, 3)):
        eps, grad, t = randn(g, *shape), randn(g, *shape), times(g, shape[0])
        _, sigma = _a_sigma(abar, t, eps)
        got = answer(eps.clone(), grad.clone(), t, s, abar)
        if got.shape != eps.shape:
            raise Wrong(f"for eps of shape {shape} the result has shape {tuple(got.shape)}")
        need(-got / sigma, -eps / sigma + s * grad, f"eps of shape {shape}: -eps / sigma is not the old score + s grad")


def _guided_by(f: Callable) -> tuple[Callable]:
    """f(eps, grad, abar_t, s), abar_t with the axes of eps."""
    return (lambda eps, grad, t, s, abar: f(eps, grad, pad(abar[t], eps), s),)


def _guided_in_place(eps: Tensor, grad: Tensor, t: Tensor, s: float, abar: Tensor) -> Tensor:
    eps -= s * pad((1 - abar[t]).sqrt(), eps) * grad
    return eps


def _guided_via_score(eps: Tensor, grad: Tensor, t: Tensor, s: float, abar: Tensor) -> Tensor:
    sigma = pad((1 - abar[t]) ** 0.5, eps)
    score = -eps / sigma
    return -sigma * (score + s * grad)


def _guided_loop(eps: Tensor, grad: Tensor, t: Tensor, s: float, abar: Tensor) -> Tensor:
    return torch.stack(
        [e - s * math.sqrt(1 - float(abar[n])) * v for e, v, n in zip(eps, grad, t.tolist(), strict=True)]
    )


def _guided_einsum(eps: Tensor, grad: Tensor, t: Tensor, s: float, abar: Tensor) -> Tensor:
    return eps + torch.einsum("b,b...->b...", -s * torch.sin(torch.acos(abar[t].sqrt())), grad)


GUIDED_EPS = Exercise(
    id="03.4",
    names=("guided_eps",),
    references=(guided_eps,),
    inputs=_guided_inputs,
    batch=("eps", "grad", "t"),
    formulas=(
        Formula(
            "guided_eps", "guided_eps", ("eps", "grad"), "guided_eps = eps - s*sqrt(1 - abar[t])*grad", _guided_probes
        ),
    ),
    facts=(
        Fact(
            "moves x0 towards the class", _guided_toward, "score = -eps / sigma: what is added there is taken off here"
        ),
        Fact(
            "s = 0 changes nothing, s = 1 is E[eps | x_t, y]",
            _guided_ends,
            "grad has the scale of a score; which factor makes a score a noise?",
        ),
        Fact("two classes on a line, s = 3: numbers on paper", _guided_printed, "sigma is the root of 1/2 here"),
        Fact(
            "its score is the old score + s grad, for any number of axes",
            _guided_scores,
            "write both predictions as -sigma score, and compare",
        ),
    ),
    mistakes=(
        Mistake(
            "sign",
            "Your guided eps moves AWAY from the class: sign of the classifier gradient. Adding to the score is "
            "subtracting from eps.",
            _guided_by(lambda eps, grad, ab, s: eps + s * (1 - ab).sqrt() * grad),
        ),
        Mistake(
            "no sigma",
            "The factor sqrt(1 - abar_t) is missing. Samples still look fine, and guidance is 1 / sigma times too "
            "strong: most of all at low noise.",
            _guided_by(lambda eps, grad, ab, s: eps - s * grad),
        ),
        Mistake(
            "eps + s grad",
            "You add s grad, as some slides do: both its sign and its factor sqrt(1 - abar_t) are wrong.",
            _guided_by(lambda eps, grad, ab, s: eps + s * grad),
        ),
        Mistake(
            "variance for std",
            "The gradient is multiplied by the variance 1 - abar_t; eps is -sigma times a score, sigma its root.",
            _guided_by(lambda eps, grad, ab, s: eps - s * (1 - ab) * grad),
        ),
        Mistake(
            "signal for noise",
            "The factor is the signal's, sqrt(abar_t): guidance would fade where there is most noise. That of the "
            "noise is sqrt(1 - abar_t).",
            _guided_by(lambda eps, grad, ab, s: eps - s * ab.sqrt() * grad),
        ),
        Mistake(
            "divided by sigma",
            "You divide by sigma where you should multiply: a score is a noise divided by it, and you go the other "
            "way.",
            _guided_by(lambda eps, grad, ab, s: eps - s * grad / (1 - ab).sqrt()),
        ),
        Mistake(
            "shift of x0",
            "s sigma^2 / sqrt(abar_t) grad is by how much the estimate of x0 moves; eps moves by -s sigma grad.",
            _guided_by(lambda eps, grad, ab, s: eps + s * (1 - ab) / ab.sqrt() * grad),
        ),
        Mistake(
            "sigma over a",
            "You divide by sqrt(abar_t): between score and eps there is sigma alone.",
            _guided_by(lambda eps, grad, ab, s: eps - s * ((1 - ab) / ab).sqrt() * grad),
        ),
        Mistake(
            "s ignored",
            "s has no effect: you guide at scale 1 whatever the caller asks.",
            _guided_by(lambda eps, grad, ab, s: eps - (1 - ab).sqrt() * grad),
        ),
        Mistake(
            "1 + s",
            "You use 1 + s: s = 0 must be without guidance. (A weight w that counts from the conditional prediction "
            "is s - 1.)",
            _guided_by(lambda eps, grad, ab, s: eps - (1 + s) * (1 - ab).sqrt() * grad),
        ),
        Mistake(
            "s on everything",
            "s multiplies the whole prediction: at s = 0 there is none left.",
            _guided_by(lambda eps, grad, ab, s: s * (eps - (1 - ab).sqrt() * grad)),
        ),
        Mistake(
            "interpolated",
            "eps is weighted with 1 - s: that is due between two noise predictions. The gradient is their difference "
            "already.",
            _guided_by(lambda eps, grad, ab, s: (1 - s) * eps - s * (1 - ab).sqrt() * grad),
        ),
        Mistake(
            "the score",
            "You return the guided score; the noise prediction is -sqrt(1 - abar_t) times it.",
            _guided_by(lambda eps, grad, ab, s: -eps / (1 - ab).sqrt() + s * grad),
        ),
        Mistake(
            "t - 1",
            "You read the table one step early (t - 1): here index and t are the same number, because abar[0] = 1.",
            (lambda eps, grad, t, s, abar: guided_eps(eps, grad, t - 1, s, abar),),
        ),
        Mistake(
            "t of the first example",
            "The whole batch uses the time of its first example.",
            (lambda eps, grad, t, s, abar: guided_eps(eps, grad, t[:1].expand(len(t)), s, abar),),
        ),
        Mistake(
            "in place",
            "You changed eps in place (-=): a sampler may still need the prediction without guidance.",
            (_guided_in_place,),
        ),
    ),
    alternatives=((_guided_via_score,), (_guided_loop,), (_guided_einsum,)),
    hints=(
        "eps = -sigma score, with and without guidance. Put score + s grad into it: what happens to sign and factor?",
        "eps - s sqrt(1 - abar_t) grad, the factor reshaped to (B, 1, ..., 1).",
    ),
    hides=("guidance.classifier_guidance",),
)

# --- 03.5 guided_mean -------------------------------------------------------------------------------------------------


class Slope:
    """A gradient as guided_mean takes it: `of` applied to the points, which are recorded in `asked`."""

    def __init__(self, of: Callable[[Tensor], Tensor] = lambda x: x.cos() + x**2 / 2):
        self.of = of
        self.asked: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.asked.append(x.detach().clone())
        return self.of(x)


def _mean_inputs(g: Generator) -> dict:
    mean, xt = pictures(g, 2)
    var = 0.05 + 0.9 * torch.rand(4, generator=g, dtype=torch.float64)
    at = "xt" if integer(g, 0, 1) else "mean"
    return {"guided_mean": dict(mean=mean, var=var, grad=Slope(), xt=xt, s=_uniform(g, 1.5, 4), at=at)}


def _mean_scale(answer: Answer, g: Generator) -> None:
    """With a gradient of 1 everywhere the shift is the variance times the scale: measure it."""
    mean, xt, s = randn(g, 4, 3), randn(g, 4, 3), _uniform(g, 1.5, 4)
    var = 0.05 + 0.9 * torch.rand(4, generator=g, dtype=torch.float64)
    need(answer(mean.clone(), var, Slope(), xt, 0.0), mean, "at s = 0 the mean must stay where it is")
    got = answer(mean.clone(), var, Slope(torch.ones_like), xt, s)
    scale = ((got - mean) / var[:, None]).detach()
    if not close(scale, torch.full_like(scale, s), rtol=1e-6):
        same = close(scale, scale[:1, :1].expand_as(scale), rtol=1e-6)
        shown = f"{float(scale[0, 0]):.2f}" if same else f"{float(scale[0, 0]):.2f}, {float(scale[1, 0]):.2f}, ..."
        raise Wrong(
            f"for a gradient of 1 everywhere, (result - mean) / var is the scale at work: measured {shown}, and s is "
            f"{s:.2f}"
        )


def _mean_product(answer: Answer, g: Generator) -> None:
    """The mean of N(mean, var) exp(s g x), normalised, summed up on a grid."""
    m, v, s, slope = (_uniform(g, *ends) for ends in ((-1, 1), (0.1, 0.8), (1.5, 3), (0.5, 1.5)))
    x = torch.linspace(-15, 15, 6001, dtype=torch.float64)
    weights = torch.softmax(-((x - m) ** 2) / (2 * v) + s * slope * x, dim=0)
    point = torch.tensor([[m]], dtype=torch.float64)
    got = answer(point.clone(), torch.tensor([v]).double(), Slope(lambda z: 0 * z + slope), point + 1, s)
    need(got, (weights @ x).view(1, 1), "it is not the mean of N(mean, var) exp(s g x), as summed up on a grid")


def _mean_point(answer: Answer, g: Generator) -> None:
    mean, xt = pictures(g, 2)
    var = 0.05 + 0.9 * torch.rand(4, generator=g, dtype=torch.float64)
    for at, due, other in (("xt", xt, mean), ("mean", mean, xt), (None, xt, mean)):
        grad = Slope()
        answer(mean.clone(), var, grad, xt.clone(), 2.0, *([at] if at else []))
        said = f'at = "{at}"' if at else "without at"
        where = "x_t" if due is xt else "the mean"
        if not grad.asked:
            raise Wrong(f"{said}: grad was not called")
        if len(grad.asked) > 1:
            raise Wrong(
                f"{said}: grad was called {len(grad.asked)} times; each call is a backward pass, and one is due"
            )
        for x in grad.asked:
            if x.shape == other.shape and torch.equal(x, other):
                wrong = "the mean" if due is xt else "x_t"
                raise Wrong(
                    f"{said}: grad was asked at {wrong}, and {where} is due. Published code differs in this too"
                )
            if x.shape != due.shape or not close(x, due):
                raise Wrong(f"{said}: grad was asked at another point than {where}")


def _mean_probit(answer: Answer, g: Generator) -> None:
    """N(0.5, 0.04) with p(y | x) = Phi(2 x): the expansion gives 0.523007998, the exact mean is 0.523385887."""
    normal = torch.distributions.Normal(torch.zeros(()).double(), torch.ones(()).double())
    grad = Slope(lambda x: 2 * normal.log_prob(2 * x).exp() / normal.cdf(2 * x))
    half, var = torch.tensor([[0.5]]).double(), torch.tensor([0.04]).double()
    got = answer(half.clone(), var, grad, half + 0.3, 1.0, "mean")
    need(
        got,
        torch.tensor([[0.523007998]]).double(),
        "N(0.5, 0.04) and p(y | x) = Phi(2 x), expanded at the mean: it is off",
    )


def _mean_small(answer: Answer, g: Generator) -> None:
    """Small steps: putting the guided eps into DDPM's mean shifts it by beta / sqrt(alpha) s g."""
    abar, beta = 0.4, 1e-5
    xt, eps, slope = randn(g, 3, 4), randn(g, 3, 4), randn(g, 3, 4)
    sigma = math.sqrt(1 - abar)
    mean, guided = ((xt - beta / sigma * e) / math.sqrt(1 - beta) for e in (eps, eps - 2.0 * sigma * slope))
    got = answer(mean.clone(), torch.full((3,), beta).double(), Slope(lambda x: slope.clone()), xt, 2.0)
    need(
        (got - mean) / beta, (guided - mean) / beta, "small steps must agree with guidance of eps", rtol=1e-4, atol=1e-4
    )


def _mean_by(f: Callable) -> tuple[Callable]:
    """f(mean, var, grad, xt, s, at), var with the axes of mean, and the right point x."""

    def guided_mean(mean: Tensor, var: Tensor, grad: Callable, xt: Tensor, s: float, at: str = "xt") -> Tensor:
        return f(mean, pad(var, mean), grad, xt, s, xt if at == "xt" else mean)

    return (guided_mean,)


def _mean_twice(mean: Tensor, var: Tensor, grad: Callable, xt: Tensor, s: float, x: Tensor) -> Tensor:
    slope = grad(x)
    mean = mean + s * var * slope
    return mean + s * var * slope


def _mean_in_place(mean: Tensor, var: Tensor, grad: Callable, xt: Tensor, s: float, x: Tensor) -> Tensor:
    mean += s * var * grad(x)
    return mean


def _mean_square(mean: Tensor, var: Tensor, grad: Callable, xt: Tensor, s: float, at: str = "xt") -> Tensor:
    """Completing the square: precisions and what pulls at them."""
    points = {"xt": xt, "mean": mean}
    precision = 1 / pad(var, mean)
    return (precision * mean + s * grad(points[at])) / precision


def _mean_loop(mean: Tensor, var: Tensor, grad: Callable, xt: Tensor, s: float, at: str = "xt") -> Tensor:
    g = grad(mean) if at == "mean" else grad(xt)
    return torch.stack([m + float(v) * s * row for m, v, row in zip(mean, var.tolist(), g, strict=True)])


def _mean_see(answer: Answer, g: Generator) -> object:
    """Both points, and what happens when the call does not say which."""
    args = _mean_inputs(g)["guided_mean"]
    mean, var, _, xt, s, _ = args.values()
    return [answer(mean.clone(), var, Slope(), xt, s, *at) for at in (("xt",), ("mean",), ())]


def _identity(x: Tensor) -> Tensor:
    return x


def _mean_probes(g: Generator) -> tuple:
    """grad is the identity, so that the result is linear in mean and x_t."""
    s, var = _uniform(g, 1.5, 4), 0.05 + 0.9 * torch.rand(9, generator=g, dtype=torch.float64)
    probes = [dict(var=v.expand(3).clone(), grad=_identity, s=s, at="xt") for v in var]
    return probes, {"var": var, "s": torch.full((9,), s, dtype=torch.float64)}


_mean_formula = 'with grad(x) = x and at = "xt": guided_mean'

GUIDED_MEAN = Exercise(
    id="03.5",
    names=("guided_mean",),
    references=(guided_mean,),
    inputs=_mean_inputs,
    batch=("mean", "var", "xt"),
    formulas=(
        Formula("guided_mean", _mean_formula, ("mean", "xt"), f"{_mean_formula} = mean + s*var*xt", _mean_probes),
    ),
    facts=(
        Fact("the scale at work is s", _mean_scale, "how far does exp(s g x) move a Gaussian of variance var?"),
        Fact("is the mean of N(mean, var) exp(s g x)", _mean_product, "complete the square in x"),
        Fact(
            'asks grad once: at x_t for "xt", at the mean for "mean"', _mean_point, "at is an argument, for both exist"
        ),
        Fact("expanded at the mean: a number on paper", _mean_probit, "the variance multiplies, not its root"),
        Fact("small steps agree with guidance of eps", _mean_small, "var is beta_t or less: no root of it"),
    ),
    mistakes=(
        Mistake(
            "std for variance",
            "The gradient is multiplied by the standard deviation sqrt(var); the shift is var times the gradient. var "
            "is a variance already.",
            _mean_by(lambda mean, var, grad, xt, s, x: mean + s * var.sqrt() * grad(x)),
        ),
        Mistake(
            "variance squared",
            "var is squared, but it is a variance already.",
            _mean_by(lambda mean, var, grad, xt, s, x: mean + s * var**2 * grad(x)),
        ),
        Mistake(
            "variance forgotten",
            "The variance is missing: a narrow Gaussian must move less than a wide one.",
            _mean_by(lambda mean, var, grad, xt, s, x: mean + s * grad(x)),
        ),
        Mistake(
            "divided by the variance",
            "You divide by the variance: a narrow Gaussian would move the farthest.",
            _mean_by(lambda mean, var, grad, xt, s, x: mean + s * grad(x) / var),
        ),
        Mistake(
            "added to x_t",
            "The shift is added to x_t, not to the mean: the step of the sampler itself is lost.",
            _mean_by(lambda mean, var, grad, xt, s, x: xt + s * var * grad(x)),
        ),
        Mistake(
            "points exchanged",
            'The points are exchanged: at = "xt" must take the gradient at x_t, at = "mean" at the mean of the step.',
            _mean_by(lambda mean, var, grad, xt, s, x: mean + s * var * grad(mean if x is xt else xt)),
        ),
        Mistake(
            "always at x_t",
            'The gradient is always taken at x_t, as in Algorithm 1 and in published code; at = "mean" asks for the '
            "mean.",
            _mean_by(lambda mean, var, grad, xt, s, x: mean + s * var * grad(xt)),
        ),
        Mistake(
            "always at the mean",
            'The gradient is always taken at the mean, as the derivation has it; at = "xt" asks for x_t.',
            _mean_by(lambda mean, var, grad, xt, s, x: mean + s * var * grad(mean)),
        ),
        Mistake(
            "guided twice",
            "The shift is added twice: the scale at work is 2 s. (It happens where a model that is guided already is "
            "guided once more.)",
            _mean_by(_mean_twice),
        ),
        Mistake(
            "s on the mean",
            "s multiplies the mean too: at s = 0 nothing is left of the step, and at s = 3 it lands far outside.",
            _mean_by(lambda mean, var, grad, xt, s, x: s * (mean + var * grad(x))),
        ),
        Mistake(
            "s ignored",
            "s has no effect: the scale at work is 1 whatever the caller asks.",
            _mean_by(lambda mean, var, grad, xt, s, x: mean + var * grad(x)),
        ),
        Mistake(
            "1 + s",
            "The scale at work is 1 + s: at s = 0 the mean must stay where it is.",
            _mean_by(lambda mean, var, grad, xt, s, x: mean + (1 + s) * var * grad(x)),
        ),
        Mistake(
            "sign",
            "The shift has the wrong sign: it leads away from the class. A mean moves with the gradient; eps, against "
            "it.",
            _mean_by(lambda mean, var, grad, xt, s, x: mean - s * var * grad(x)),
        ),
        Mistake(
            "in place",
            "You changed mean in place (+=): the caller still needs the mean without guidance.",
            _mean_by(_mean_in_place),
        ),
    ),
    alternatives=((_mean_square,), (_mean_loop,)),
    hints=(
        "exp(-(x - mean)^2 / (2 var)) times exp(s g x) is a Gaussian again. Where is its peak?",
        "mean + s var g, var reshaped to (B, 1, ..., 1), with g = grad(xt) or grad(mean), as `at` says.",
    ),
    probe=_mean_see,
)

# --- 03.6 compare_classifiers -----------------------------------------------------------------------------------------


def _compare_inputs(g: Generator) -> dict:
    """Noised points of the archipelago where neither classifier is so sure that its gradient drowns in rounding, an odd
    number; then 2 points where the clean one is blind and 2 where the other is."""
    world, abar, t = archipelago(), random_abar(g), integer(g, 8, 25)
    a, sigma = math.sqrt(float(abar[t])), math.sqrt(1 - float(abar[t]))
    x0, y = world.sample(1000, g)
    x, time = a * x0 + sigma * randn(g, 1000, 2), torch.full((1000,), t)
    gaps = [_score_gap(world, x, time, y, abar), _score_gap(world, x / a, 0 * time, y, abar)]
    plain_to_see = torch.stack(gaps).norm(dim=2).amin(0) > 1e-3
    x, y = x[plain_to_see][:21], y[plain_to_see][:21]
    far = torch.tensor([[90.0, 1.0], [95.0, -1.0], [-90.0, 0.5], [-95.0, 2.0]], dtype=torch.float64)
    x, y = torch.cat([x, far]), torch.cat([y, torch.zeros(4, dtype=torch.long)])
    order = torch.randperm(len(x), generator=g)
    clean, aware = CleanPosterior(world, abar, blind=80.0).eval(), Posterior(world, abar, blind=-80.0).eval()
    args = dict(aware=aware, clean=clean, x=x[order], t=torch.full((len(x),), t), y=y[order], a=a)
    return {"compare_classifiers": args}


def _straight_pair(g: Generator, size: float = 1.0) -> tuple:
    """Two classes on either side of a line, the two lines at an angle; nine points, their labels and a. All gradients
    are about as long as `size`."""
    angle, turn = _uniform(g, 0.3, 1.2), _uniform(g, 0, 2 * math.pi)
    one, two = ([math.cos(v), math.sin(v)] for v in (turn, turn + angle))
    aware, clean = (
        Straight(size * torch.tensor([[-r * u for u in axis], [r * u for u in axis]]).double())
        for axis, r in ((one, 0.7), (two, 1.1))
    )
    # where each point lies, along and across the middle of the two axes: between them, or on one side of both
    middle = torch.tensor([[math.cos(turn + angle / 2), math.sin(turn + angle / 2)]] * 9).double()
    across = middle.flip(1) * torch.tensor([-1, 1])
    side = torch.tensor([1, 1, 1, -1, -1, 0, 0, 0, 0])[:, None]
    x = (middle * side + across * (1 - side.abs())) * (0.5 + torch.rand(9, 1, generator=g, dtype=torch.float64))
    # on one side of both: both are right, but for the second; between the axes: they disagree, aware wins 3 of 4
    return aware, clean, x, torch.tensor([1, 0, 1, 0, 0, 0, 0, 0, 1]), angle, _uniform(g, 0.4, 0.9)


def _compare_straight(answer: Answer, g: Generator) -> None:
    aware, clean, x, y, angle, a = _straight_pair(g)
    # log p(y | x) = -log(1 + exp(-m)), m = +-2 r u.x: the gradient has the length 2 r / (1 + exp(m))
    sign = 2.0 * y - 1
    margins = [sign * 2 * (z @ net.weight.detach()[1]) for net, z in ((aware, x), (clean, x / a))]
    lengths = [2 * r / (1 + m.exp()) * chain for m, r, chain in zip(margins, (0.7, 1.1), (1, 1 / a), strict=True)]
    ratio = sorted((lengths[1] / lengths[0]).tolist())[4]
    right = [sum(m > 0 for m in margin.tolist()) / 9 for margin in margins]
    got = answer(aware, clean, x.clone(), torch.full((9,), 5), y, a)
    due = (math.cos(angle), ratio, *right)
    titles = ("cosine", "length", "accuracy of aware", "accuracy of clean")
    for title, mine, value in zip(titles, got, due, strict=True):
        mine = float(torch.as_tensor(mine).detach())
        if not math.isclose(mine, value, rel_tol=1e-5):
            raise Wrong(
                f"for two classifiers with straight borders, {angle:.3f} radians apart, {title} is off: yours is "
                f"{mine:.6g}, {mine / value:.4g} times what is due; a = {a:.4g}, 1 / a = {1 / a:.4g}",
                expected=f"{value:.6g}",
            )


def _compare_short(answer: Answer, g: Generator) -> None:
    """Gradients of 1e-16 have a direction like any other, which F.cosine_similarity cannot see."""
    aware, clean, x, y, angle, a = _straight_pair(g, 1e-16)
    got = float(torch.as_tensor(answer(aware, clean, x.clone(), torch.full((9,), 5), y, a)[0]).detach())
    if not math.isclose(got, math.cos(angle), rel_tol=1e-5):
        raise Wrong(
            f"for two gradients of length 1e-16, {angle:.3f} radians apart, the cosine is {got:.6g}: only gradients of "
            "0 are left out, and no length may be clamped",
            expected=f"{math.cos(angle):.6g}",
        )


def _compare_world(answer: Answer, g: Generator) -> None:
    """By scores instead of derivatives, point by point. Twice, lest two medians fall on one point by accident."""
    for _ in range(2):
        _compare_once(answer, _compare_inputs(g)["compare_classifiers"])


def _compare_once(answer: Answer, args: dict) -> None:
    aware, _, x, t, y, a = args.values()
    world, abar = aware.world, aware.abar
    seen = x[:, 0].abs() < 70
    true = _score_gap(world, x, t, y, abar)[seen]
    other = _score_gap(world, x / a, 0 * t, y, abar)[seen] / a
    pairs = list(zip(true.tolist(), other.tolist(), strict=True))
    cosines = [(p * r + q * s) / (math.hypot(p, q) * math.hypot(r, s)) for (p, q), (r, s) in pairs]
    ratios = sorted(math.hypot(r, s) / math.hypot(p, q) for (p, q), (r, s) in pairs)
    got = answer(*args.values())
    cosine, length = (torch.as_tensor(v, dtype=torch.float64).detach() for v in got[:2])
    due = [torch.tensor(v).double() for v in (math.fsum(cosines) / len(cosines), ratios[len(ratios) // 2])]
    need(
        cosine, due[0], f"cosine is off: it averages the cosines of the {len(pairs)} points where both have a gradient"
    )
    need(length, due[1], f"length is off: it is the median of |clean| / |aware| over the same {len(pairs)} points")


def _compare_counts(answer: Answer, g: Generator) -> None:
    """Accuracy counts every point, also where a gradient is 0."""
    args = _compare_inputs(g)["compare_classifiers"]
    aware, clean, x, t, y, a = args.values()
    with torch.no_grad():
        logits = aware(x, t), clean(x / a)
    got = answer(*args.values())
    for title, mine, score in zip(("aware", "clean"), got[2:], logits, strict=True):
        hits = sum(int(row.argmax()) == label for row, label in zip(score, y.tolist(), strict=True))
        if not math.isclose(float(torch.as_tensor(mine).detach()), hits / len(x), rel_tol=1e-6):
            raise Wrong(
                f"accuracy of {title}: it gives {hits} of all {len(x)} points their label, and you say "
                f"{float(torch.as_tensor(mine).detach()):.4g}",
                expected=f"{hits / len(x):.6g}",
            )


def _compare_asks(answer: Answer, g: Generator) -> None:
    args = _compare_inputs(g)["compare_classifiers"]
    aware, clean, x, t, _, a = args.values()
    answer(*args.values())
    for name, net in (("aware", aware), ("clean", clean)):
        if not net.asked:
            raise Wrong(f"{name} was not called")
    _same_points(aware.asked, x, t, "x")
    for points, _ in clean.asked:
        if points.shape == x.shape and close(points, x):
            raise Wrong("clean was asked at x itself: it knows clean data, whose signal is not shrunk by a")
    _same_points(clean.asked, x / a, 0 * t, "x / a")


def _compare_no_grad(answer: Answer, g: Generator) -> None:
    args = _compare_inputs(g)["compare_classifiers"]
    due = [float(torch.as_tensor(v).detach()) for v in answer(*args.values())]
    with torch.no_grad():
        got = [float(torch.as_tensor(v)) for v in answer(*args.values())]
    need(torch.tensor(got), torch.tensor(due), "under torch.no_grad the result is another")


def _compare_by(**how: object) -> tuple[Callable]:
    """of(log_p): differentiated; scaled(x, a): where clean is asked; cosine, length(true, other, valid), ..."""

    def compare_classifiers(
        aware: Callable, clean: Callable, x: Tensor, t: Tensor, y: Tensor, a: float
    ) -> tuple[float, float, float, float]:
        of = how.get("of", lambda logits: logits.log_softmax(1))
        with torch.enable_grad():
            x = x.detach().clone().requires_grad_()
            z = how.get("scaled", lambda x, a: x / a)(x, a)
            scores = aware(x, t), clean(z)
            where = (x, z if how.get("inner") else x)
            grads = [
                torch.autograd.grad(of(s).gather(1, y[:, None]).sum(), v, retain_graph=True)[0]
                for s, v in zip(scores, where, strict=True)
            ]
        true, other = grads
        valid = (true.norm(dim=1) > 0) & (other.norm(dim=1) > 0)
        if how.get("all"):
            valid = torch.ones_like(valid)
        cosine = how.get("cosine", _mean_of_cosines)(true, other, valid)
        length = how.get("length", _median_ratio)(true, other, valid)
        right = [(s.argmax(1) == y).double() for s in scores]
        counted = valid if how.get("count_valid") else torch.ones_like(valid)
        shares = [float(r[counted].mean()) for r in right]
        return float(cosine), float(length), *(shares[::-1] if how.get("turned") else shares)

    return (compare_classifiers,)


def _mean_of_cosines(true: Tensor, other: Tensor, valid: Tensor) -> Tensor:
    return _cosines(true[valid], other[valid]).mean()


def _cosines(one: Tensor, two: Tensor) -> Tensor:
    return (one * two).sum(-1) / (one.norm(dim=-1) * two.norm(dim=-1))


def _median_ratio(true: Tensor, other: Tensor, valid: Tensor) -> Tensor:
    return (other[valid].norm(dim=1) / true[valid].norm(dim=1)).median()


def _compare_loop(aware, clean, x, t, y, a):
    """Point by point, with lists."""
    cosines, ratios, right = [], [], [0, 0]
    for i in range(len(x)):
        label, slopes = int(y[i]), []
        for j, net in enumerate((lambda z, i=i: aware(z, t[i : i + 1]), lambda z: clean(z / a))):
            with torch.enable_grad():
                z = x[i : i + 1].detach().clone().requires_grad_()
                logits = net(z)[0]
                slopes.append(torch.autograd.grad(logits[label] - logits.logsumexp(0), z)[0][0])
            right[j] += int(logits.argmax()) == label
        if all(slope.any() for slope in slopes):
            lengths = [float(slope.pow(2).sum()) ** 0.5 for slope in slopes]
            cosines.append(float(slopes[0] @ slopes[1]) / (lengths[0] * lengths[1]))
            ratios.append(lengths[1] / lengths[0])
    return sum(cosines) / len(cosines), median(ratios), right[0] / len(x), right[1] / len(x)


def _compare_chain(aware, clean, x, t, y, a):
    """The clean gradient at x / a, and the chain rule by hand."""
    with torch.enable_grad():
        z, u = (v.detach().clone().requires_grad_() for v in (x, x / a))
        one, two = aware(z, t), clean(u)
        true = torch.autograd.grad(-F.cross_entropy(one, y, reduction="sum"), z)[0]
        other = torch.autograd.grad(-F.cross_entropy(two, y, reduction="sum"), u)[0] / a
    lengths = torch.stack([true, other]).pow(2).sum(2).sqrt()
    valid = (lengths > 0).all(0)
    cosines = (true * other).sum(1)[valid] / lengths[:, valid].prod(0)
    ratio = (lengths[1] / lengths[0])[valid].quantile(0.5)
    accuracy = [float((logits.argmax(1) == y).double().mean()) for logits in (one, two)]
    return float(cosines.mean()), float(ratio), *accuracy


def _compare_see(answer: Answer, g: Generator) -> object:
    """The exact world, and straight borders, where the two accuracies differ for sure. Short gradients only where all
    else is right, so that any other mistake is recognised with clamped lengths and without."""
    aware, clean, x, y, _, a = _straight_pair(g)
    found = [answer(*_compare_inputs(g)["compare_classifiers"].values()) for _ in range(2)]
    found.append(answer(aware, clean, x.clone(), torch.full((9,), 5), y, a))
    args = _compare_inputs(g)["compare_classifiers"]
    try:
        with torch.no_grad():
            answer(*args.values())
    except Failed as error:
        return [*found, type(error.__cause__).__name__]
    seen = [torch.tensor([float(torch.as_tensor(v)) for v in one]).double() for one in found]
    if not close(seen[2], torch.tensor(compare_classifiers(aware, clean, x, torch.full((9,), 5), y, a)).double()):
        return seen
    aware, clean, x, y, _, a = _straight_pair(g, 1e-16)
    return [*seen, torch.as_tensor(answer(aware, clean, x, torch.full((9,), 5), y, a)[0], dtype=torch.float64)]


COMPARE = Exercise(
    by_probe=True,
    id="03.6",
    names=("compare_classifiers",),
    references=(compare_classifiers,),
    inputs=_compare_inputs,
    facts=(
        Fact("asks aware at x, clean at x / a", _compare_asks, "a clean classifier expects data of the usual size"),
        Fact("straight borders: all four by hand", _compare_straight, "d/dx of f(x / a) is f'(x / a) / a"),
        Fact("the exact world: as the scores say", _compare_world, "one cosine and one ratio per point, then average"),
        Fact("short gradients have a direction too", _compare_short, "which lengths are clamped, and why?"),
        Fact("accuracy counts all points", _compare_counts, "argmax over the classes; no point is left out"),
        Fact("works under torch.no_grad", _compare_no_grad, "gradients are yours to switch on"),
    ),
    mistakes=(
        Mistake(
            "cosine of means",
            "You average the gradients first and take one cosine: points with long gradients decide, and opposite ones "
            "cancel. Average the cosines of the points.",
            _compare_by(cosine=lambda true, other, valid: _cosines(true[valid].mean(0), other[valid].mean(0))),
        ),
        Mistake(
            "one long vector",
            "You take one cosine over all points at once: points with long gradients decide. Average the cosines of "
            "the points.",
            _compare_by(cosine=lambda true, other, valid: _cosines(true[valid].flatten(), other[valid].flatten())),
        ),
        Mistake(
            "1 / a forgotten",
            "The clean gradient is taken with respect to x / a: with respect to x it is longer by 1 / a (chain rule).",
            _compare_by(inner=True),
        ),
        Mistake(
            "zero rows not masked",
            "Points where a gradient is 0 count: their cosine reads as 0, and their ratio as 0 or infinite, though "
            "there is nothing to compare.",
            _compare_by(all=True, cosine=lambda true, other, valid: F.cosine_similarity(true, other, dim=1).mean()),
        ),
        Mistake(
            "lengths clamped",
            "Short gradients lose their direction: F.cosine_similarity takes lengths for at least 1e-8, F.normalize "
            "for at least 1e-12. Divide by the lengths yourself, at the points where neither is 0.",
            _compare_by(cosine=lambda true, other, valid: F.cosine_similarity(true[valid], other[valid], dim=1).mean()),
        ),
        Mistake(
            "ratio turned",
            "The ratio is turned: |aware| / |clean| says how many times too short the clean gradient is.",
            _compare_by(length=lambda true, other, valid: _median_ratio(other, true, valid)),
        ),
        Mistake(
            "mean ratio",
            "You average the ratios: a few points with hardly any gradient decide. The median is asked for.",
            _compare_by(length=lambda true, other, valid: (other[valid].norm(dim=1) / true[valid].norm(dim=1)).mean()),
        ),
        Mistake(
            "ratio of means",
            "You divide the average lengths: points with long gradients decide. One ratio per point, then the median.",
            _compare_by(
                length=lambda true, other, valid: other[valid].norm(dim=1).mean() / true[valid].norm(dim=1).mean()
            ),
        ),
        Mistake(
            "ratio of medians",
            "You divide the median lengths, which may belong to two different points. One ratio per point, then the "
            "median.",
            _compare_by(
                length=lambda true, other, valid: other[valid].norm(dim=1).median() / true[valid].norm(dim=1).median()
            ),
        ),
        Mistake(
            "squared lengths",
            "Your ratio is that of squared lengths: the root is missing.",
            _compare_by(length=lambda true, other, valid: _median_ratio(true, other, valid) ** 2),
        ),
        Mistake(
            "clean asked at x",
            "The clean classifier is asked at x, where the signal is shrunk by a: it expects data of the usual size, x "
            "/ a.",
            _compare_by(scaled=lambda x, a: x),
        ),
        Mistake(
            "clean asked at a x",
            "You multiply by a where you should divide: the signal in x is a times x0 already.",
            _compare_by(scaled=lambda x, a: a * x),
        ),
        Mistake(
            "raw logits",
            "You differentiate raw logits: what moves all logits of a point together says nothing about the class.",
            _compare_by(of=lambda logits: logits),
        ),
        Mistake(
            "gradient of p",
            "You differentiate p(y | .), not its logarithm: directions stay, but lengths are off by the probabilities.",
            _compare_by(of=lambda logits: logits.softmax(1)),
        ),
        Mistake(
            "accuracy of the masked points",
            "The accuracies leave out the points without gradient: a classifier must answer there as well.",
            _compare_by(count_valid=True),
        ),
        Mistake(
            "accuracies exchanged",
            "The two accuracies are exchanged: that of aware comes first.",
            _compare_by(turned=True),
        ),
    ),
    alternatives=((_compare_loop,), (_compare_chain,)),
    hints=(
        "Two gradients (N, D) of log p(y | .), both with respect to x. Which points have both? Per point one cosine "
        "and one ratio of lengths; accuracy needs the logits only.",
        "grads of log_softmax(aware(x, t)) and log_softmax(clean(x / a)) at y, summed; valid = both norms > 0; "
        "(aware . clean / (|aware| |clean|))[valid].mean(), (|clean| / |aware|)[valid].median(); argmax == y over all.",
    ),
    probe=_compare_see,
    hides=("classifier.log_prob_of",),
    points=2,
)

# --- 03.7 grad_through_x0hat ------------------------------------------------------------------------------------------


class Denoising(nn.Module):
    """A network that predicts the noise: exactly, or, with a `slope`, as slope x. `asked` records the (x, t)."""

    def __init__(self, world: GaussianMixture | None, abar: Tensor, slope: float = 0.0):
        super().__init__()
        self.world, self.abar = world, abar
        self.gain = nn.Parameter(torch.full((), slope if world is None else 1.0, dtype=torch.float64))
        self.asked: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x (b, ...), t (b,) -> (b, ...)."""
        self.asked.append((x.detach().clone(), t.detach().clone()))
        if self.world is None:
            return self.gain * x
        return self.gain * exact_eps(self.world, x, t, self.abar).to(x.dtype)


def _through_inputs(g: Generator) -> dict:
    world, abar = archipelago(), random_abar(g)
    clean, net = CleanPosterior(world, abar).eval(), Denoising(world, abar).eval()
    args = dict(clean=clean, eps_net=net, x=1.3 * randn(g, 5, 2), t=times(g, 5, 8), y=_labels(g, 5), abar=abar)
    return {"grad_through_x0hat": args}


def _through_exact(answer: Answer, g: Generator) -> None:
    """Without derivatives: the Jacobian of x0_hat is a / sigma^2 Cov(x0 | x_t), and the rest is a score."""
    clean, _, x, t, y, abar = (args := _through_inputs(g)["grad_through_x0hat"]).values()
    world = clean.world
    a, sigma = _a_sigma(abar, t, x)
    x0_hat = world.posterior_mean(x, t.double(), discrete(abar))
    inner = _score_gap(world, x0_hat, 0 * t, y, abar)
    cov = world.posterior_cov(x, t.double(), discrete(abar))
    right = a / sigma**2 * torch.einsum("nij,nj->ni", cov, inner)
    got = answer(*args.values())
    if close(got.detach(), inner, rtol=1e-5):
        raise Wrong("your gradient is with respect to x0_hat: how x0_hat moves with x_t is missing")
    if close(got.detach(), inner / a, rtol=1e-5):
        raise Wrong("1/a times the gradient at x0_hat: the network's Jacobian is missing")
    if close(got.detach(), right - inner / a, rtol=1e-5):
        raise Wrong("only the way through the network counts: x_t also enters x0_hat as it is, divided by a")
    message = "with the exact network it is not a / sigma^2 Cov(x0 | x_t) times the gradient at x0_hat"
    need(got, right, message + _lengths(got.detach(), right, t))


def _through_asks(answer: Answer, g: Generator) -> None:
    clean, net, x, t, _, abar = (args := _through_inputs(g)["grad_through_x0hat"]).values()
    answer(*args.values())
    if not net.asked or not clean.asked:
        raise Wrong(f"{'clean' if net.asked else 'eps_net'} was not called")
    _same_points(net.asked, x, t, "x_t")
    seen = torch.cat([points for points, _ in clean.asked])
    if seen.shape != x.shape:
        raise Wrong(f"clean was asked about {len(seen)} points; there are {len(x)}, and once each is enough")
    if close(seen, x):
        raise Wrong("clean was asked about the noisy x_t: it must see the estimate of x0")
    due = clean.world.posterior_mean(x, t.double(), discrete(abar))
    need(seen, due, "clean was not asked about the x0 that x_t and the predicted noise imply")


def _through_straight(answer: Answer, g: Generator) -> None:
    """eps = k x and logits W x0: pictures, by hand; their x0_hat is far outside [-1, 1]."""
    (x,), abar, t, y = pictures(g, 1), random_abar(g), times(g), _labels(g, 4, 7)
    slope, weight = _uniform(g, 0.2, 0.6), 0.3 * randn(g, 7, x[0].numel())
    clean, net = Straight(weight).eval(), Denoising(None, abar, slope).eval()
    a, sigma = _a_sigma(abar, t, x)
    factor = (1 - sigma * slope) / a
    got = answer(clean, net, 3 * x, t, y, abar)
    if not got.detach().any(dim=1).all():
        raise Wrong("parts of the gradient are exactly 0, where x0_hat is outside [-1, 1]: x0_hat is to stay as it is")
    need(
        got,
        factor * clean.gradient(factor * 3 * x, y),
        "for eps_net(x, t) = k x and logits W x0, on pictures, it is off",
    )


def _through_slope(answer: Answer, g: Generator) -> None:
    """A derivative by differences, along a random direction."""
    clean, net, x, t, y, abar = (args := _through_inputs(g)["grad_through_x0hat"]).values()
    a, sigma = _a_sigma(abar, t, x)

    def log_p(z: Tensor) -> Tensor:
        x0_hat = (z - sigma * exact_eps(net.world, z, t, abar)) / a
        return clean.world.class_log_prob(x0_hat, 0.0 * t, discrete(abar), y)

    direction, h = randn(g, 5, 2), 1e-5
    due = (log_p(x + h * direction) - log_p(x - h * direction)) / (2 * h)
    got = (answer(*args.values()).detach() * direction).sum(1)
    need(got, due, "along a random direction it is not how fast log p(y | x0_hat) changes", rtol=1e-4, atol=1e-5)


def _through_no_grad(answer: Answer, g: Generator) -> None:
    args = _through_inputs(g)["grad_through_x0hat"]
    due = answer(*args.values()).detach()
    with torch.no_grad():
        need(answer(*args.values()), due, "under torch.no_grad, where samplers run, the result is another")


def _through_single(answer: Answer, g: Generator) -> None:
    args = _through_inputs(g)["grad_through_x0hat"]
    args |= dict(clean=args["clean"].float(), eps_net=args["eps_net"].float(), x=args["x"].float())
    got = answer(*args.values())
    shown = {points.dtype for net in (args["clean"], args["eps_net"]) for points, _ in net.asked}
    if shown != {torch.float32} or got.dtype != torch.float32:
        raise Wrong("x and both networks are float32, abar is float64: float64 was shown to a network, or returned")


def _through_by(**how: object) -> tuple[Callable]:
    """x0(x, eps, a, sigma), eps(net, x, t), of(logits, y), wrt "x0": what goes otherwise."""

    def grad_through_x0hat(clean: Callable, eps_net: Callable, x: Tensor, t: Tensor, y: Tensor, abar: Tensor) -> Tensor:
        abar = abar.to(x)
        with torch.enable_grad() if not how.get("bare") else contextlib.nullcontext():
            x = x.requires_grad_() if how.get("callers") else x.detach().clone().requires_grad_()
            at = how.get("table", lambda t: t)(t)
            a, sigma = pad(abar[at].sqrt(), x), pad((1 - abar[at]).sqrt(), x)
            eps = how.get("eps", lambda net, x, t: net(x, t))(eps_net, x, t)
            x0_hat = how.get("x0", lambda x, eps, a, sigma: (x - sigma * eps) / a)(x, eps, a, sigma)
            value = how.get("of", _log_p)(clean(x0_hat), y)
            if how.get("backward"):
                value.backward()
                return x.grad.detach()
            return torch.autograd.grad(value, how.get("wrt", lambda x, x0_hat: x)(x, x0_hat))[0]

    return (grad_through_x0hat,)


def _frozen(net: Callable, x: Tensor, t: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x, t)


def _through_products(clean, eps_net, x, t, y, abar):
    """The chain rule by hand: a vector-Jacobian product of the network."""
    abar = abar.to(x)
    a, sigma = pad(abar[t].sqrt(), x), pad((1 - abar[t]).sqrt(), x)
    with torch.enable_grad():
        z = x.detach().clone().requires_grad_()
        eps = eps_net(z, t)
        x0_hat = ((z - sigma * eps) / a).detach().requires_grad_()
        loss = F.cross_entropy(clean(x0_hat), y, reduction="sum")
        inner = -torch.autograd.grad(loss, x0_hat)[0]
        back = torch.autograd.grad(eps, z, inner)[0]
    return (inner - sigma * back) / a


def _through_rows(clean, eps_net, x, t, y, abar):
    rows = []
    for i in range(len(x)):
        with torch.enable_grad():
            z = x[i : i + 1].detach().clone().requires_grad_()
            v = float(abar[t[i]])
            x0_hat = (z - math.sqrt(1 - v) * eps_net(z, t[i : i + 1])) * v**-0.5
            logits = clean(x0_hat)[0]
            value = logits[y[i]] - logits.logsumexp(0)
            rows.append(torch.autograd.grad(value, z)[0].detach())
    return torch.cat(rows)


def _through_see(answer: Answer, g: Generator) -> object:
    """Whether it works under no_grad, what it leaves in the parameters; and pictures whose x0_hat is large."""
    args = _through_inputs(g)["grad_through_x0hat"]
    answer(*args.values())
    left = args["clean"].gain.grad is not None
    try:
        with torch.no_grad():
            answer(*args.values())
        failed = ""
    except Failed as error:
        failed = type(error.__cause__).__name__
    (x,), abar = pictures(g, 1), random_abar(g)
    nets = Straight(0.3 * randn(g, 7, x[0].numel())).eval(), Denoising(None, abar, 0.4).eval()
    try:
        pictured = answer(*nets, 3 * x, times(g), _labels(g, 4, 7), abar)
    except Failed as error:
        pictured = type(error.__cause__).__name__
    return [left, failed, pictured]


THROUGH = Exercise(
    id="03.7",
    names=("grad_through_x0hat",),
    references=(grad_through_x0hat,),
    inputs=_through_inputs,
    batch=("x", "t", "y"),
    facts=(
        Fact("the network sees x_t at t, the classifier x0_hat", _through_asks, "which x0 do x_t and eps imply?"),
        Fact(
            "the exact network: Cov(x0 | x_t) times the gradient at x0_hat",
            _through_exact,
            "x_t enters x0_hat twice: as it is, and through the network",
        ),
        Fact("is the slope of log p(y | x0_hat(x_t))", _through_slope, "log p of y, differentiated by x_t"),
        Fact("straight networks on pictures, by hand", _through_straight, "no clipping, and examples apart"),
        Fact("works under torch.no_grad", _through_no_grad, "samplers run under no_grad: switch it on inside"),
        Fact("float32 networks go with a float64 table", _through_single, "abar.to(x)"),
    ),
    mistakes=(
        Mistake(
            "with respect to x0_hat",
            "You differentiate with respect to x0_hat: how x0_hat moves with x_t is missing, the network's Jacobian "
            "and the 1/a alike.",
            _through_by(wrt=lambda x, x0_hat: x0_hat),
        ),
        Mistake(
            "network under no_grad",
            "1/a times the clean gradient: the network's Jacobian is missing, for it ran under no_grad or its result "
            "was detached.",
            _through_by(eps=_frozen),
        ),
        Mistake(
            "x0_hat detached",
            "x0_hat is cut off from x_t (detach): nothing leads from log p back to x_t.",
            _through_by(x0=lambda x, eps, a, sigma: ((x - sigma * eps) / a).detach()),
        ),
        Mistake(
            "not divided by a",
            "x0_hat is not divided by sqrt(abar_t): the classifier sees its signal shrunken.",
            _through_by(x0=lambda x, eps, a, sigma: x - sigma * eps),
        ),
        Mistake(
            "divided by abar",
            "x0_hat is divided by abar_t; its root is what x0 was multiplied by.",
            _through_by(x0=lambda x, eps, a, sigma: (x - sigma * eps) / a**2),
        ),
        Mistake(
            "clipped",
            "x0_hat is clipped before the classifier: where it was outside [-1, 1] the gradient is exactly 0.",
            _through_by(x0=lambda x, eps, a, sigma: ((x - sigma * eps) / a).clamp(-1, 1)),
        ),
        Mistake(
            "x0_hat with a plus",
            "The noise is added once more instead of being removed.",
            _through_by(x0=lambda x, eps, a, sigma: (x + sigma * eps) / a),
        ),
        Mistake(
            "variance for std",
            "x0_hat removes (1 - abar_t) eps: what was added is a standard deviation times eps.",
            _through_by(x0=lambda x, eps, a, sigma: (x - sigma**2 * eps) / a),
        ),
        Mistake(
            "no x0_hat",
            "The clean classifier is asked about x_t itself: it has never seen noise. The estimate of x0 belongs "
            "there.",
            _through_by(x0=lambda x, eps, a, sigma: x + 0 * eps),
        ),
        Mistake(
            "x / a only",
            "The predicted noise is not removed: x_t / a is as noisy as x_t.",
            _through_by(x0=lambda x, eps, a, sigma: x / a + 0 * eps),
        ),
        Mistake(
            "network asked at t - 1",
            "The network is asked at t - 1 for an x_t of noise t: index and t are the same number here.",
            _through_by(eps=lambda net, x, t: net(x, t - 1)),
        ),
        Mistake(
            "table read at t - 1",
            "abar is read one step early (t - 1): here index and t are the same number, because abar[0] = 1.",
            _through_by(table=lambda t: t - 1),
        ),
        Mistake(
            "raw logit",
            "You differentiate the raw logit of y: log_softmax is missing.",
            _through_by(of=lambda logits, y: logits.gather(1, y[:, None]).sum()),
        ),
        Mistake(
            "gradient of p",
            "You differentiate p(y | x0_hat), not its logarithm: faintest where the class is farthest.",
            _through_by(of=lambda logits, y: logits.softmax(1).gather(1, y[:, None]).sum()),
        ),
        Mistake(
            "sign",
            "This is the gradient of the cross-entropy, -log p(y | x0_hat): it leads away from the class.",
            _through_by(of=lambda logits, y: -_log_p(logits, y)),
        ),
        Mistake(
            "mean over the batch",
            "You take the mean over the batch: each gradient comes out B times too small.",
            _through_by(of=lambda logits, y: _log_p(logits, y) / len(y)),
        ),
        Mistake(
            "no enable_grad",
            "Under torch.no_grad there is no graph to differentiate: wrap your lines in torch.enable_grad().",
            _through_by(bare=True),
        ),
        Mistake(
            "the caller's x",
            "You set requires_grad on the caller's own x: the sampler then records a graph that grows with every step.",
            _through_by(callers=True),
        ),
        Mistake(
            "backward",
            "backward() also fills the .grad of both networks' parameters, and they pile up; torch.autograd.grad takes "
            "the gradient with respect to x alone.",
            _through_by(backward=True),
        ),
    ),
    alternatives=((_through_products,), (_through_rows,)),
    hints=(
        "x_t -> eps -> x0_hat -> logits -> log p(y): one chain, and autograd follows all of it if nothing cuts it.",
        "With enable_grad: x = x.detach().requires_grad_(); x0_hat = (x - sigma eps_net(x, t)) / a; sum "
        "log_softmax(clean(x0_hat), 1) at y; torch.autograd.grad of that sum with respect to x.",
    ),
    probe=_through_see,
    points=2,
)

# --- 03.8 my_guidance_test --------------------------------------------------------------------------------------------


def _draw_guided(shape: tuple[int, ...] = (3, 4)) -> tuple[Tensor, ...]:
    """eps, grad, t and abar for the learner's tests below, from torch's global state."""
    eps, grad = torch.randn(2, *shape, dtype=torch.float64)
    return eps, grad, torch.tensor([2, 9, 5]), torch.linspace(1, 0.1, 10, dtype=torch.float64)


def _tests_shape(guide: Callable) -> None:
    eps, grad, t, abar = _draw_guided()
    assert guide(eps, grad, t, 2.0, abar).shape == eps.shape


def _tests_zero(guide: Callable) -> None:
    eps, grad, t, abar = _draw_guided()
    assert torch.allclose(guide(eps, grad, t, 0.0, abar), eps)


def _tests_direction(guide: Callable) -> None:
    eps, grad, t, abar = _draw_guided()
    assert (((guide(eps, grad, t, 2.0, abar) - eps) * grad).sum(1) < 0).all()


def _tests_one_time(guide: Callable) -> None:
    eps, grad, t, abar = _draw_guided()
    sigma = (1 - abar[5]).sqrt()
    assert torch.allclose(guide(eps, grad, torch.full_like(t, 5), 1.0, abar), eps - sigma * grad)


def _tests_slides(guide: Callable) -> None:
    eps, grad, t, abar = _draw_guided()
    assert torch.allclose(guide(eps, grad, t, 2.0, abar), eps + 2.0 * grad)


def _tests_table(guide: Callable) -> None:
    """Numbers from a pocket calculator, for single examples."""
    table = torch.tensor([1, 0.96, 0.64, 0.36], dtype=torch.float64)
    eps, grad = torch.tensor([[0.7], [-0.4]], dtype=torch.float64)[:, None]
    for t, sigma in ((1, 0.2), (2, 0.6), (3, 0.8)):
        for s in (0.0, 0.5, 3.0):
            got = guide(eps, grad, torch.tensor([t]), s, table)
            assert abs(got.item() - (0.7 + 0.4 * s * sigma)) < 1e-9
    eps, grad, t, abar = _draw_guided()
    rows = [guide(eps[i : i + 1], grad[i : i + 1], t[i : i + 1], 2.0, abar) for i in range(3)]
    assert torch.allclose(torch.cat(rows), guide(eps, grad, t, 2.0, abar))


def _tests_world(guide: Callable) -> None:
    """Gaussian classes N(m, 1) and N(-m, 1): s = 1 is the conditional prediction, in closed form; and s is linear."""
    m, t, abar = torch.randn(4, dtype=torch.float64), torch.tensor([2, 9, 5]), torch.linspace(1, 0.1, 10).double()
    x, a, sigma = torch.randn(3, 4).double(), abar[t].sqrt()[:, None], (1 - abar[t]).sqrt()[:, None]
    p = torch.sigmoid(2 * a * (x @ m)[:, None])
    eps = sigma * (x - a * (2 * p - 1) * m)
    grad = 2 * (1 - p) * a * m
    if not torch.allclose(guide(eps, grad, t, 1.0, abar), sigma * (x - a * m)):
        raise ValueError("not the conditional prediction at s = 1")
    if not torch.allclose(guide(eps, grad, t, 3.0, abar) - eps, 3 * sigma * (x - a * m) - 3 * eps):
        raise ValueError("not three times as far at s = 3")


_planted = {mistake.name: mistake.answers[0] for mistake in GUIDED_EPS.mistakes}

TEST = test_exercise(
    "03.8",
    "my_guidance_test",
    my_guidance_test,
    right=(guided_eps, _guided_via_score, _guided_loop),
    wrong=tuple(
        (hint, _planted[name])
        for name, hint in (
            ("sign", "one that moves away from the class"),
            ("no sigma", "one without the factor sqrt(1 - abar_t)"),
            ("eps + s grad", "the slides' eps + s grad"),
            ("variance for std", "one that has the variance for the standard deviation"),
            ("s ignored", "one that ignores s"),
            ("t of the first example", "one that uses the first example's t for all"),
        )
    ),
    needed=5,
    mistakes=(
        Mistake(
            "catches none",
            "Your test catches not one of the wrong functions: they all have the right shape, and agree where the "
            "gradient is 0. Look at the values, for a gradient that is not.",
            (_tests_shape,),
        ),
        Mistake(
            "s = 0 only",
            "Your test looks at s = 0 alone: there the gradient has no effect, so any factor and any sign pass.",
            (_tests_zero,),
        ),
        Mistake(
            "direction only",
            "Your test looks at the direction alone: how far eps moves is what sqrt(1 - abar_t) and s decide.",
            (_tests_direction,),
        ),
        Mistake(
            "one t and s = 1",
            "Your test uses one t for all examples, at s = 1: whoever ignores s, or reads the first t only, passes it.",
            (_tests_one_time,),
        ),
        Mistake(
            "the slides' formula",
            "Your test refuses correct functions: the formula it compares with is wrong, or it is too strict, with == "
            "where allclose is due.",
            (_tests_slides,),
        ),
    ),
    alternatives=(_tests_table, _tests_world),
    hides=("guidance.classifier_guidance",),
    hints=(
        "You may choose a score yourself and make eps = -sigma score from it. What must come out for a given s, at "
        "several t in one batch?",
        "guide(-sigma score, grad, t, s, abar) must be -sigma (score + s grad), for s = 0, 1 and another, each example "
        "at a t of its own.",
    ),
)

EXERCISES = (BAYES, NOISY_CE, CLASSIFIER_GRAD, GUIDED_EPS, GUIDED_MEAN, COMPARE, THROUGH, TEST)
