"""The guidance league: rules of guidance side by side in a world where every answer is known."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Generator, Tensor

from .metrics import energy_distance
from .mixture import GaussianMixture
from .schedules import cosine, time_grid

Rule = Callable[[Tensor, Tensor, Tensor, float, dict], Tensor]  # (eps_c, eps_u, x, sigma, state) -> eps
Sampler = Callable[[GaussianMixture, int, float, Tensor, int, Generator], Tensor]
Row = dict[str, float]

SCHEDULE = cosine()
START = 0.98  # where sampling begins: at t = 1 a prediction of the noise says nothing about x0


def hidden_world(gen: Generator, dim: int | None = None) -> GaussianMixture:
    """A new mixture in 2 to 4 dimensions, or `dim`. Class 0 has two components of equal weight: one lonely, one crowded
    by class 1. Class 2 lies aside. The layout is the archipelago's in all of them, each mean moved a little; shapes are
    drawn, and the whole is turned at random."""
    d = int(torch.randint(2, 5, (), generator=gen)) if dim is None else dim

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    means = torch.zeros(6, d, dtype=torch.float64)
    means[:, :2] = torch.tensor([[-2.0, 1.0], [1.1, 1.0], [2.0, 0.2], [0.9, 2.2], [-0.4, -1.8], [1.6, -1.6]])
    means += 0.06 * normal(6, d)
    turn = torch.linalg.qr(normal(d, d))[0]
    axes = torch.linalg.qr(normal(6, d, d))[0]
    stds = 0.25 + 0.1 * torch.rand(6, d, generator=gen, dtype=torch.float64)
    covs = axes @ torch.diag_embed(stds**2) @ axes.mT
    covs = turn @ covs @ turn.T
    weights = torch.tensor([0.15, 0.15, 0.2, 0.1, 0.25, 0.15], dtype=torch.float64)
    return GaussianMixture(weights, means @ turn.T, (covs + covs.mT) / 2, torch.tensor([0, 0, 1, 1, 2, 2]))


def shifted(world: GaussianMixture, by: Tensor) -> GaussianMixture:
    """The same world about another origin, by (d,)."""
    return GaussianMixture(world.weights, world.means + by, world.covs, world.labels)


def start(world: GaussianMixture, n: int, gen: Generator) -> Tensor:
    """Noise to begin with, (n, d): normal points of a scrambled Sobol sequence, spread so evenly that what is averaged
    over them is off by far less than 1 / sqrt(n)."""
    return torch.special.ndtri(_even(world.means.shape[1], n, gen))


def _even(d: int, n: int, gen: Generator) -> Tensor:
    """n points (n, d) of a scrambled Sobol sequence in the open unit cube."""
    seed = int(torch.randint(2**31, (), generator=gen))
    points = torch.quasirandom.SobolEngine(d, scramble=True, seed=seed).draw(n, dtype=torch.float64)
    return points.clamp(1e-9, 1 - 1e-9)


def travel(rule: Rule, world: GaussianMixture, label: int, s: float, x: Tensor, steps: int) -> Tensor:
    """Samples by DDIM from the noise x (n, d), where the rule mixes the exact predictions of the world."""
    return mixed(rule, world.given(label), world, s, x, steps)


def mixed(rule: Rule, one: GaussianMixture, other: GaussianMixture, s: float, x: Tensor, steps: int) -> Tensor:
    """As `travel`, with eps_c the exact prediction for `one` and eps_u that for `other`."""
    t = time_grid(steps, START).to(x)
    alphas, sigmas = SCHEDULE.alpha(t), SCHEDULE.sigma(t)
    for i in range(steps):
        now, sigma = t[i].expand(len(x)), float(sigmas[i])
        eps_c, eps_u = (-sigma * world.score(x, now, SCHEDULE) for world in (one, other))
        state = dict(s=float(s), sigma_next=float(sigmas[i + 1]), step=i, steps=steps)
        eps = rule(eps_c, eps_u, x.clone(), sigma, state)
        x = alphas[i + 1] * (x - sigma * eps) / alphas[i] + sigmas[i + 1] * eps
    return x


# --- the rules that a new one is compared with ------------------------------------------------------------------------


def noise_level(sigma: float) -> float:
    """sigma / alpha."""
    return sigma / math.sqrt(1 - sigma**2)


def conditional(eps_c: Tensor, eps_u: Tensor, x: Tensor, sigma: float, state: dict) -> Tensor:
    """No guidance."""
    return eps_c


def plain_cfg(eps_c: Tensor, eps_u: Tensor, x: Tensor, sigma: float, state: dict) -> Tensor:
    """One scale at all noise levels (Ho & Salimans 2022)."""
    return eps_u + state["s"] * (eps_c - eps_u)


def in_interval(high: float = 1.0) -> Rule:
    """The scale where sigma / alpha <= high, and 1 above (Kynkäänniemi et al. 2024)."""

    def rule(eps_c: Tensor, eps_u: Tensor, x: Tensor, sigma: float, state: dict) -> Tensor:
        return eps_u + (state["s"] if noise_level(sigma) <= high else 1.0) * (eps_c - eps_u)

    return rule


def projected(max_norm: float = 0.5) -> Rule:
    """APG (Sadat et al. 2024), without its momentum: of the difference in x0, capped at max_norm, only the part that is
    perpendicular to the conditional estimate of x0 counts."""

    def rule(eps_c: Tensor, eps_u: Tensor, x: Tensor, sigma: float, state: dict) -> Tensor:
        alpha = math.sqrt(1 - sigma**2)
        x0, d = (x - sigma * eps_c) / alpha, -sigma / alpha * (eps_c - eps_u)
        d = d * (max_norm / d.norm(dim=1, keepdim=True)).clamp(max=1)
        d = d - (d * x0).sum(1, keepdim=True) / x0.square().sum(1, keepdim=True) * x0
        return eps_c - alpha / sigma * (state["s"] - 1) * d

    return rule


def plus_plus(cfgpp_scale: Callable, lam: float = 0.6) -> Rule:
    """CFG++ (Chung et al. 2024), as classifier-free guidance at the scale that makes the same DDIM step, which
    cfgpp_scale(lam, t, t_next, abar) of exercise 10.6 knows."""

    def rule(eps_c: Tensor, eps_u: Tensor, x: Tensor, sigma: float, state: dict) -> Tensor:
        abar = 1 - torch.tensor([state["sigma_next"], sigma], dtype=torch.float64) ** 2
        now, after = torch.tensor([1]), torch.tensor([0])
        return eps_u + cfgpp_scale(lam, now, after, abar).to(x) * (eps_c - eps_u)

    return rule


def zero_star(eps_c: Tensor, eps_u: Tensor, x: Tensor, sigma: float, state: dict) -> Tensor:
    """CFG-Zero* (Fan et al. 2025), on eps: eps_u is first scaled to fit eps_c best. Without its idle first steps."""
    eps_u = (eps_c * eps_u).sum(1, keepdim=True) / eps_u.square().sum(1, keepdim=True) * eps_u
    return eps_u + state["s"] * (eps_c - eps_u)


def oracle(world: GaussianMixture, label: int, draws: int = 32, points: int = 64, seed: int = 0) -> Rule:
    """The scale that the tilt p(x) p(y | x)^s asks for at each noise level: the one number s_eff that fits the true
    score of the noised tilt best, over up to `points` of the samples. It knows the world, as no other rule does."""

    parts = components(world, label)

    def rule(eps_c: Tensor, eps_u: Tensor, x: Tensor, sigma: float, state: dict) -> Tensor:
        gen = Generator().manual_seed(seed)
        c, u, some = eps_c[:points], eps_u[:points], x[:points]
        d = c - u
        needed = noised_tilt_eps(world, label, state["s"], some, sigma, draws, gen, parts) - u
        return eps_u + float((needed * d).sum() / d.square().sum()) * (eps_c - eps_u)

    return rule


def components(world: GaussianMixture, label: int) -> GaussianMixture:
    """p(x0 | y = label), where each component is a class of its own."""
    one = world.given(label)
    return GaussianMixture(one.weights, one.means, one.covs, torch.arange(len(one.weights)))


def noised_tilt_eps(
    world: GaussianMixture,
    label: int,
    s: float,
    x: Tensor,
    sigma: float,
    draws: int,
    gen: Generator,
    parts: GaussianMixture | None = None,
) -> Tensor:
    """E[eps | xt] (n, d) where x0 follows p(x) p(y | x)^s, by drawing x0 from p(x0 | xt, y), which is a mixture again,
    and weighting with p(y | x0)^(s - 1). The same random numbers for all points. `parts`: its `components`,
    if at hand."""
    alpha = math.sqrt(1 - sigma**2)
    parts = parts or components(world, label)
    shares = torch.stack([_class_log_prob(parts, x, alpha, sigma, k) for k in range(parts.classes)], dim=1).exp()
    precision = torch.linalg.inv(parts.covs)
    cov = torch.linalg.inv(precision + alpha**2 / sigma**2 * torch.eye(x.shape[1]).to(x))
    toward = torch.einsum("kij,kj->ki", precision, parts.means) + alpha / sigma**2 * x[:, None]
    mean = torch.einsum("kij,nkj->nki", cov, toward)
    even = _even(x.shape[1] + 1, draws, gen).to(x)  # over components and places: what is uneven tilts all points alike
    u, z = even[:, 0].contiguous(), torch.special.ndtri(even[:, 1:])
    k = torch.searchsorted(shares.cumsum(1).contiguous(), u.expand(len(x), -1).contiguous()).clamp(
        max=shares.shape[1] - 1
    )
    spread = torch.einsum("kij,mj->kmi", torch.linalg.cholesky(cov), z)
    x0 = mean.gather(1, k[:, :, None].expand(-1, -1, x.shape[1])) + spread[k, torch.arange(draws)]
    log_weight = (s - 1) * _class_log_prob(world, x0.flatten(0, 1), 1.0, 0.0, label).reshape(len(x), draws)
    x0 = torch.einsum("nm,nmi->ni", log_weight.softmax(1), x0)
    return (x - alpha * x0) / sigma


def _class_log_prob(world: GaussianMixture, x: Tensor, alpha: float, sigma: float, label: int) -> Tensor:
    """log p(label | x) at one noise level."""
    t = torch.full((len(x),), 2 / math.pi * math.atan2(sigma, alpha)).to(x)  # where SCHEDULE has this level
    return world.class_log_prob(x, t, SCHEDULE, label)


# --- samplers that are more than a rule -------------------------------------------------------------------------------


def ruled(rule: Rule) -> Sampler:
    """A rule as a sampler."""
    return lambda world, label, s, x, steps, gen: travel(rule, world, label, s, x, steps)


def oracled(world: GaussianMixture, label: int, s: float, x: Tensor, steps: int, gen: Generator) -> Tensor:
    """Guidance by `oracle`."""
    return travel(oracle(world, label), world, label, s, x, steps)


def autoguided(w: float = 2.0, blur: float = 0.3) -> Sampler:
    """Autoguidance (Karras et al. 2024) from a model of the same label that sees the data blurred: all its covariances
    are larger by blur^2 I. It knows no scale but w."""

    def sampler(world: GaussianMixture, label: int, s: float, x: Tensor, steps: int, gen: Generator) -> Tensor:
        return mixed(plain_cfg, world.given(label), blurred(world, blur).given(label), w, x, steps)

    return sampler


def blurred(world: GaussianMixture, by: float) -> GaussianMixture:
    """The world as a model would have it that smooths the data by noise of standard deviation `by`."""
    return GaussianMixture(
        world.weights, world.means, world.covs + by**2 * torch.eye(world.means.shape[1]).to(world.covs), world.labels
    )


def corrected(fk_log_weight: Callable, ess: Callable, resample: Callable, below: float = 0.5) -> Sampler:
    """Feynman-Kac corrected guidance (Skreta et al. 2025) by the functions of exercises 10.1 and 10.2: the guided SDE,
    its particles weighted, and resampled where their effective number falls below that share, and at the end."""

    def sampler(world: GaussianMixture, label: int, s: float, x: Tensor, steps: int, gen: Generator) -> Tensor:
        return particles(world, label, s, x, steps, gen, fk_log_weight, ess, resample, below)[0]

    return sampler


def particles(
    world: GaussianMixture,
    label: int,
    s: float,
    x: Tensor,
    steps: int,
    gen: Generator,
    fk_log_weight: Callable,
    ess: Callable,
    resample: Callable,
    below: float = 0.5,
) -> tuple[Tensor, list[float]]:
    """The particles (n, d) of `corrected`, and the share of them that counts, ess / n, after each step.

    A step is as long as its integral of beta, h = 2 log(alpha_next / alpha), so that beta dt = 1 h on any schedule.
    `below` = 0 leaves the weights out altogether: the guided SDE as it is.
    """
    t = time_grid(steps, START).to(x)
    alphas, of_class = SCHEDULE.alpha(t), world.given(label)
    logw, shares = torch.zeros(len(x)).to(x), []
    for i in range(steps):
        now, h = t[i].expand(len(x)), 2 * float((alphas[i + 1] / alphas[i]).log())
        sc, su = of_class.score(x, now, SCHEDULE), world.score(x, now, SCHEDULE)
        logw = logw + fk_log_weight(sc, su, s, 1.0, h)
        z = torch.randn(x.shape, generator=gen, dtype=x.dtype)
        x = x + h * (x / 2 + su + s * (sc - su)) + math.sqrt(h) * z
        shares.append(float(ess(logw)) / len(x))
        if shares[-1] < below or (below and i == steps - 1):
            chosen = resample(logw, gen)
            x, logw = x[chosen], torch.zeros_like(logw)
    return x, shares


# --- what is measured -------------------------------------------------------------------------------------------------


def tilt_sample(world: GaussianMixture, label: int, s: float, n: int, gen: Generator) -> Tensor:
    """n points (n, d) of p(x) p(y = label | x)^s, normalised, for s >= 1: samples of the class, kept with probability
    p(y | x)^(s - 1)."""
    kept: list[Tensor] = []
    while sum(map(len, kept)) < n:
        x = world.given(label).sample(n, gen)[0]
        u = torch.rand(n, generator=gen, dtype=x.dtype)
        kept.append(x[u.log() < (s - 1) * _class_log_prob(world, x, 1.0, 0.0, label)])
    return torch.cat(kept)[:n]


def coverage(world: GaussianMixture, label: int, x: Tensor) -> float:
    """Of the components of the class, the one that the samples x (n, d) neglect most: its share of the samples over its
    share of the class. 1 where none is neglected, 0 where one is lost."""
    parts = components(world, label)
    shares = [float(_class_log_prob(parts, x, 1.0, 0.0, i).exp().mean()) for i in range(parts.classes)]
    return min(share / float(weight) for share, weight in zip(shares, parts.weights, strict=True))


def log_densities(world: GaussianMixture, label: int, x: Tensor) -> tuple[float, float]:
    """The means of log p(x | y) and log p(y | x) over samples."""
    t = torch.zeros(len(x)).to(x)
    return (
        float(world.log_prob(x, t, SCHEDULE, label).mean()),
        float(world.class_log_prob(x, t, SCHEDULE, label).mean()),
    )


class Counted:
    """A rule, and how many evaluations of the network it needs: in each step one for each of eps_c and eps_u that its
    result depends on."""

    def __init__(self, rule: Rule):
        self.rule, self.evaluations = rule, 0

    def __call__(self, eps_c: Tensor, eps_u: Tensor, x: Tensor, sigma: float, state: dict) -> Tensor:
        eps = self.rule(eps_c, eps_u, x, sigma, state)
        for one, two in ((eps_c + 1, eps_u), (eps_c, eps_u + 1)):
            self.evaluations += not torch.allclose(self.rule(one, two, x, sigma, state), eps, rtol=0, atol=1e-9)
        return eps


def league(
    guides: Mapping[str, Rule],
    world: GaussianMixture,
    label: int = 0,
    s: float = 5.0,
    *,
    n: int = 1000,
    steps: Sequence[int] = (30, 120, 480),
    seed: int = 0,
    samplers: Mapping[str, Sampler] | None = None,
) -> dict[str, Row]:
    """A row of numbers for each rule, and for each of `samplers`, which do more than mix two predictions.

    At the middle entry of `steps`: "ED class", the energy distance to p(x | y); "ED tilt", that to p(x) p(y | x)^s;
    "coverage", "log p(x|y)" and "log p(y|x)", means over n samples; "NFE", evaluations per sample. Over all of `steps`:
    "steps", the largest minus the smallest mean of log p(x | y). At the first entry: "shift", how far samples move,
    root mean square, when the origin does; of rules only. All from the same noise; all numbers nan where samples are
    not finite.
    """
    gen = Generator().manual_seed(seed)
    of_class, of_tilt = world.given(label).sample(n, gen)[0], tilt_sample(world, label, s, n, gen)
    noise, by = start(world, n, gen), torch.full(world.means.shape[1:], 3.0, dtype=torch.float64)
    runs = {name: ruled(rule) for name, rule in guides.items()} | dict(samplers or {})

    def row(name: str) -> Row:
        def run(count: int, where: GaussianMixture = world, x: Tensor = noise) -> Tensor:
            return runs[name](where, label, s, x, count, Generator().manual_seed(seed + 1))

        middle = steps[len(steps) // 2]
        ends = {count: run(count) for count in steps}
        x, short = ends[middle], ends[steps[0]]
        if not all(end.isfinite().all() for end in ends.values()):
            return dict.fromkeys(COLUMNS, math.nan)
        alpha = float(SCHEDULE.alpha(time_grid(1, START)[:1].to(noise)))
        moved = run(steps[0], shifted(world, by), noise + alpha * by) - by if name in guides else math.nan * short
        log_p = {count: log_densities(world, label, end)[0] for count, end in ends.items()}
        counted = Counted(guides[name]) if name in guides else None
        if counted:
            travel(counted, world, label, s, noise[:50], middle)
        values = (
            energy_distance(x, of_class),
            energy_distance(x, of_tilt),
            coverage(world, label, x),
            *log_densities(world, label, x),
            counted.evaluations if counted else 2 * middle,
            max(log_p.values()) - min(log_p.values()),
            float((moved - short).square().sum(1).mean().sqrt()),
        )
        return dict(zip(COLUMNS, map(float, values), strict=True))

    return {name: row(name) for name in runs}


COLUMNS = ("ED class", "ED tilt", "coverage", "log p(x|y)", "log p(y|x)", "NFE", "steps", "shift")
