"""Exercises of lesson 10: exact guidance by weights, what else guides, bugs of others, and a rule of one's own."""

import math
from collections.abc import Callable
from functools import cache

import torch
from numpy.polynomial import hermite_e
from torch import Generator, Tensor

from condiff_ref.league import coverage, hidden_world, log_densities, start, travel
from condiff_ref.mixture import GaussianMixture, line2
from condiff_ref.museum import EXHIBITS, MUSEUM_WORDS
from condiff_ref.schedules import discrete
from condiff_ref.shapes import pad

from .compare import close, oddity, plain
from .draws import integer, pictures, randn, times
from .exercise import Answer, Exercise, Fact, Mistake, Wrong, need
from .guard import Failed
from .oracle import exact_eps
from .xray import Atoms, Formula, random_abar

# --- the reference answers, as the solutions show them ----------------------------------------------------------------


def fk_log_weight(sc: Tensor, su: Tensor, s: float, beta: float, dt: float) -> Tensor:
    """By how much the log-weight of each particle grows in one step of guided sampling backwards in time, (N,).

    sc, su (N, ...): grad log p_t(x | y) and grad log p_t(x) at the particles. The step follows the SDE
    dx = (beta x / 2 + beta (s sc + (1 - s) su)) dt + sqrt(beta) dW for a time dt > 0 from noise towards data. Weighted
    so, the particles stay distributed as p_t(x | y)^s p_t(x)^(1-s), normalised, at every t.
    """
    return beta * s * (s - 1) * (sc - su).flatten(1).square().sum(1) * dt / 2


def ess(logw: Tensor) -> Tensor:
    """The effective sample size (): one over the sum of the squared weights, where logw (N,) are the logarithms of
    weights known up to a common factor. N where all are equal, 1 where one particle has everything. A log-weight may be
    -inf (weight 0), or so large that exp of it overflows.
    """
    return 1 / logw.softmax(0).square().sum()


def resample(logw: Tensor, gen: Generator) -> Tensor:
    """Systematic resampling: which particles go on, N indices (N,) in rising order, int64.

    logw (N,) as in `ess`. The weights, laid end to end, fill [0, 1); N teeth of a comb, 1/N apart, fall on them, and
    each picks the particle that it hits. One number u in [0, 1) is drawn from gen, on the CPU, and places the comb: its
    first tooth is at u / N. So a particle with weight w comes back floor(N w) or ceil(N w) times.
    """
    n = len(logw)
    u = torch.rand((), generator=gen, dtype=torch.float64).to(logw.device)
    ends = logw.double().softmax(0).cumsum(0)
    teeth = (torch.arange(n, device=logw.device) + u) / n
    return torch.searchsorted(ends / ends[-1], teeth, right=True).clamp(max=n - 1)


def pc_step(sc: Tensor, su: Tensor, x: Tensor, s: float, beta: float, h: float, z: Tensor) -> tuple[Tensor, Tensor]:
    """One step of the guided SDE of `fk_log_weight`, h > 0 in time, as two moves: (predicted, corrected), as x each.

    `predicted`: x after an Euler step of the probability-flow ODE of p(x | y) alone, no guidance and no noise (DDIM, in
    the limit of small steps). `corrected`: from there, a step of Langevin dynamics with the noise z (N, ...) on
    p_t(x | y)^g p_t(x)^(1-g), where g is such that both moves together make exactly one Euler-Maruyama step of the
    guided SDE at scale s. sc and su are the scores at x, for both moves.
    """
    g = 2 * s - 1
    predicted = x + h * beta / 2 * (x + sc)
    corrected = predicted + h * beta / 2 * (g * sc + (1 - g) * su) + (beta * h) ** 0.5 * z
    return predicted, corrected


def autoguide(main: Callable, bad: Callable, xt: Tensor, t: Tensor, y: Tensor, w: float) -> Tensor:
    """Autoguidance (Karras et al. 2024): the estimate of x0 at strength w, from a good model and a bad one, (B, ...).

    main(xt, t, y) and bad(xt, t, y) return estimates of x0 (B, ...); y (B,) are labels, and None in their place asks
    for the estimate without a label. `bad` is a worse version of `main`: smaller, or trained less. w = 1 gives main
    alone, w = 0 gives bad alone, w > 1 leads away from the errors that both make, the bad one more so. Each model is
    asked once.
    """
    of_bad = bad(xt, t, y)
    return of_bad + w * (main(xt, t, y) - of_bad)


def mg_target(eps: Tensor, eps_c: Tensor, eps_u: Tensor, w: float) -> Tensor:
    """What model guidance (Tang et al. 2025) trains a network towards, in place of the noise eps: (B, ...).

    eps_c and eps_u are the network's own predictions, with the label and without; w times their difference is added to
    eps. The target is a constant of the optimisation: no gradient flows through it.
    """
    return eps + w * (eps_c - eps_u).detach()


def mg_scale(w: float) -> float:
    """The guidance scale s that is built into a network trained to its end with `mg_target`: its prediction with the
    label is then eps_u + s (eps_c - eps_u), in terms of the predictions of plain training.

    Raises ValueError for w >= 1, where this training has no end to reach.
    """
    if w >= 1:
        raise ValueError(f"at w = {w:g} the target runs ahead of the network: w must be below 1")
    return 1 / (1 - w)


def gft_target(eps: Tensor, eps_null: Tensor, beta: float) -> Tensor:
    """What guidance-free training (Chen et al. 2025) asks of the prediction with label, given the noise eps: (B, ...).

    It trains beta eps_label + (1 - beta) eps_null towards eps, where eps_label is the network's prediction with the
    label, told beta, and eps_null is the one without, taken as a constant. Returned is the eps_label at which that is
    met, without a graph. Raises ValueError unless 0 < beta <= 1: beta is one over a guidance scale of at least 1.
    """
    if not 0 < beta <= 1:
        raise ValueError(f"beta is above 0 and at most 1, not {beta:g}")
    return (eps - (1 - beta) * eps_null.detach()) / beta


def cfgpp_step(eps_c: Tensor, eps_u: Tensor, xt: Tensor, t: Tensor, t_next: Tensor, abar: Tensor, lam: float) -> Tensor:
    """One deterministic step of CFG++ (Chung et al. 2024) from t to t_next < t, (B, ...).

    It is a DDIM step with two predictions of noise: x0 is estimated with the mixed eps_u + lam (eps_c - eps_u), but the
    noise that is put back is the unconditional eps_u. Integer t, t_next (B,), abar (T + 1,).
    """
    a, a_next = (pad(abar.to(t.device)[i].to(xt), xt) for i in (t, t_next))
    x0 = (xt - (1 - a).sqrt() * (eps_u + lam * (eps_c - eps_u))) / a.sqrt()
    return a_next.sqrt() * x0 + (1 - a_next).sqrt() * eps_u


def cfgpp_scale(lam: float, t: Tensor, t_next: Tensor, abar: Tensor) -> Tensor:
    """The scale s (B,) at which classifier-free guidance with DDIM makes the step from t to t_next that CFG++ makes.

    Integer t, t_next (B,) with t_next < t, abar (T + 1,) with abar[0] = 1; eps = eps_u + s (eps_c - eps_u).
    """
    abar = abar.to(t.device)
    noise, noise_next = ((1 - abar[i]).sqrt() / abar[i].sqrt() for i in (t, t_next))  # sigma / alpha
    return lam * noise / (noise - noise_next)


def measurement_grad(denoise: Callable, x: Tensor, a: float, A: Tensor, R: Tensor, y: Tensor, method: str) -> Tensor:
    """An estimate of grad log p(y | x_t), with respect to x_t = x (N, D), for a measurement y = A x0 + noise: (N, D).

    denoise(x) is E[x0 | x_t] (N, D), which autograd can differentiate; x_t = a x0 + sqrt(1 - a^2) eps. A (M, D), y (M,)
    and R (M, M), the covariance of the measurement's noise. method "dps" (Chung et al. 2023): as if x0 were
    denoise(x) exactly. "pigdm" (Song et al. 2023): as if x0, given x_t, were Gaussian around denoise(x), with the
    covariance r^2 I that it has for standard normal data. There r^2 does not depend on x.
    """
    r2 = {"dps": 0.0, "pigdm": 1 - a**2}[method]
    precision = torch.linalg.inv(R + r2 * A @ A.T)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        off = y - denoise(x) @ A.T
        log_p = -torch.einsum("ni,ij,nj->", off, precision, off) / 2
        return torch.autograd.grad(log_p, x)[0]


def dps_vs_exact(
    denoise: Callable, exact: Callable, x: Tensor, a: float, A: Tensor, R: Tensor, y: Tensor
) -> dict[str, tuple[float, float]]:
    """How far off both estimates of `measurement_grad` are: {"dps": (cosine, length), "pigdm": (cosine, length)}.

    Medians over the points x (N, D): of the cosine between the estimate and exact(x) (N, D), the true gradient of
    log p(y | x_t), and of the length of the estimate over that of the true one.
    """
    right = exact(x)
    found = {}
    for method in ("dps", "pigdm"):
        guess = measurement_grad(denoise, x, a, A, R, y, method)
        cosine = torch.cosine_similarity(guess, right, dim=1)
        length = guess.norm(dim=1) / right.norm(dim=1)
        found[method] = (float(cosine.median()), float(length.median()))
    return found


def classify(
    net: Callable, x0: Tensor, t: Tensor, eps: Tensor, weight: Tensor, log_prior: Tensor, abar: Tensor
) -> Tensor:
    """log p(y | x0) of all K labels, (B, K), from how well a diffusion model denoises under each (Li et al. 2023).

    net(xt (B, ...), t (B,), y (B,)) predicts the noise for the labels y. x0 (B, ...). Draw m noises all examples to the
    time t[m] with eps[m]: integer t (M,), eps (M, ...), shaped as one example, the same for all examples and labels.
    log p(x0 | y) is, up to what all labels share, minus half the sum over m of weight[m] times the squared error of the
    prediction, summed over the entries of an example. weight (M,), log_prior (K,) = log p(y), abar (T + 1,).
    """
    log_joint = log_prior.to(x0).expand(len(x0), -1).clone()
    for time, noise, each in zip(t, eps, weight, strict=True):
        a = abar.to(t.device)[time].to(x0)
        xt = a.sqrt() * x0 + (1 - a).sqrt() * noise
        for label in range(len(log_prior)):
            y = torch.full((len(x0),), label, device=x0.device)
            with torch.no_grad():
                off = net(xt, time.expand(len(x0)), y) - noise
            log_joint[:, label] -= each / 2 * off.flatten(1).square().sum(1)
    return log_joint.log_softmax(1)


def museum() -> dict[str, str]:
    """What is broken in each exhibit of the museum of bugs: {exhibit: word}, a word of MUSEUM_WORDS for each."""
    return {
        "A": "agreement",
        "B": "nothing",
        "C": "scale counts",
        "D": "round trip",
        "E": "scale one",
        "F": "nothing",
        "G": "null label",
        "H": "all channels",
        "I": "last step",
        "J": "examples apart",
        "K": "scale one",
        "L": "derivative",
        "M": "can learn",
    }


def guide(eps_c: Tensor, eps_u: Tensor, x: Tensor, sigma: float, state: dict) -> Tensor:
    """A rule of guidance: the prediction of the noise that the sampler goes on with, (N, D).

    eps_c and eps_u (N, D) are the predictions with the label and without at x (N, D), which has the noise sigma in
    (0, 1): x = sqrt(1 - sigma^2) x0 + sigma eps. `state` says the rest, to be read only: "s", the scale asked for, at
    least 1; "sigma_next", the noise after this step, 0 after the last; "step", from 0 on; "steps", how many there are.

    s = 1 gives eps_c; another origin changes nothing, another number of steps little. At s = 5, in worlds that you have
    not seen, the mode that is neglected most keeps at least 80 % of its share, and samples are as sure of their class
    (mean log p(y | x)) as those of plain guidance at 1.7.
    """
    noise = sigma / (1 - sigma**2) ** 0.5  # sigma / alpha
    s = state["s"] if noise <= 1 else 1.0
    return eps_u + s * (eps_c - eps_u)


# --- what every answer is tried on ------------------------------------------------------------------------------------


def _uniform(g: Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=g, dtype=torch.float64))


def _gen(g: Generator) -> Generator:
    return Generator().manual_seed(integer(g, 0, 10**6))


def _row(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _number(got: object, right: float, what: str, rtol: float = 1e-6, atol: float = 1e-9) -> None:
    """Raise Wrong unless a number is right."""
    if not isinstance(got, int | float) and not (isinstance(got, Tensor) and got.numel() == 1):
        kind = f"a tensor of shape {tuple(got.shape)}" if isinstance(got, Tensor) else f"of type {type(got).__name__}"
        raise Wrong(f"{what}: yours is {kind}, not a number", expected=f"{right:.6g}")
    if not math.isclose(float(got), right, rel_tol=rtol, abs_tol=atol):
        raise Wrong(f"{what}: yours is {float(got):.6g}", expected=f"{right:.6g}")


def _must_raise(answer: Answer, name: str, args: tuple, what: str) -> None:
    """Raise Wrong unless the answer raises ValueError."""
    try:
        got = answer.call(name, *args)
    except Failed as error:
        if isinstance(error.__cause__, ValueError) or str(error).startswith("ValueError"):
            return
        raise
    shown = f"{got:.4g}" if isinstance(got, int | float) else "a result"
    raise Wrong(f"{what} must raise ValueError; yours returns {shown}")


def _error(answer: Answer, name: str, *args: object) -> object:
    """What comes back, or "ValueError", or the name of another error."""
    try:
        return answer.call(name, *args)
    except Failed as error:
        return str(error).partition(":")[0]


# --- 10.1 fk_log_weight -----------------------------------------------------------------------------------------------


def _fk_inputs(g: Generator) -> dict:
    numbers = dict(s=_uniform(g, 1.5, 6), beta=_uniform(g, 0.5, 3), dt=_uniform(g, 0.01, 0.2))
    return {"fk_log_weight": dict(sc=randn(g, 5, 3), su=randn(g, 5, 3)) | numbers}


def _fk_by_hand(answer: Answer, g: Generator) -> None:
    sc, su = _row(1, 2)[None], _row(-1, 1)[None]
    for s, beta, dt, right in ((3.0, 0.4, 0.01, 0.06), (2.0, 2.0, 0.1, 1.0), (0.5, 2.0, 0.1, -0.125)):
        what = f"sc = (1, 2), su = (-1, 1), s = {s:g}, beta = {beta:g}, dt = {dt:g}"
        got = answer(sc.clone(), su.clone(), s, beta, dt)
        need(got, _row(right), what)


def _fk_ends(answer: Answer, g: Generator) -> None:
    sc, su = randn(g, 4, 2), randn(g, 4, 2)
    for s, law in ((1.0, "p(x | y)"), (0.0, "p(x)")):
        got = answer(sc.clone(), su.clone(), s, 1.3, 0.1)
        need(got, torch.zeros(4).double(), f"s = {s:g} samples {law} exactly, so every log-weight stays at 0")


def _fk_back(answer: Answer, g: Generator) -> None:
    got = answer(randn(g, 6, 3), randn(g, 6, 3), _uniform(g, 1.5, 6), 1.3, 0.1)
    if not (got > 0).all():
        raise Wrong(
            "for s above 1 guidance leaves where p(x | y) and p(x) disagree, so weights must grow there; yours shrink"
        )


def _fk_axes(answer: Answer, g: Generator) -> None:
    sc, su, s = randn(g, 3, 2, 2), randn(g, 3, 2, 2), _uniform(g, 1.5, 4)
    whole = answer(sc.clone(), su.clone(), s, 1.0, 0.1)
    parts = [answer(sc[:, i].clone(), su[:, i].clone(), s, 1.0, 0.1) for i in range(2)]
    need(whole, parts[0] + parts[1], "scores (3, 2, 2): the log-weights of the two halves of each particle must add up")


def _fk_residual(answer: Answer, g: Generator) -> None:
    """1-D Gaussians: what the Fokker-Planck equation of the guided SDE lacks to carry the noised tilt along."""
    vc, vu, beta, s = _uniform(g, 0.3, 0.8), _uniform(g, 1.2, 2.0), _uniform(g, 0.5, 2), _uniform(g, 1.5, 4)
    abar, step = _uniform(g, 0.3, 0.8), 1e-5

    def variances(tau: float) -> tuple[float, float, float]:  # tau: time towards data
        a = abar * math.exp(beta * tau)
        c, u = a * vc + 1 - a, a * vu + 1 - a
        return c, u, 1 / (s / c + (1 - s) / u)

    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    (_, _, before), (c, u, v), (_, _, after) = (variances(tau) for tau in (-step, 0.0, step))

    def log_q(variance: float) -> Tensor:
        return -(x**2) / (2 * variance) - math.log(variance) / 2

    grows = (log_q(after) - log_q(before)) / (2 * step)
    k = beta / 2 - beta / v  # the drift is k x
    flows = -k + k * x**2 / v + beta / 2 * (x**2 / v**2 - 1 / v)
    right = (grows - flows) - (grows - flows)[4]  # at x = 0 both scores vanish
    got = answer(-x[:, None] / c, -x[:, None] / u, s, beta, 1e-3) / 1e-3
    need(
        got - got[4],
        right,
        f"Gaussians, s = {s:.3g}: the growth must be what the Fokker-Planck equation of the guided SDE leaves over",
        rtol=1e-4,
        atol=1e-5,
    )


def _fk_by(
    scale: Callable[[float], float] = lambda s: s * (s - 1),
    size: Callable[[Tensor, Tensor], Tensor] = lambda sc, su: (sc - su).flatten(1).square().sum(1),
    half: float = 0.5,
    time: Callable[[float, float], float] = lambda beta, dt: beta * dt,
    after: Callable[[Tensor], Tensor] = lambda out: out,
) -> tuple[Callable]:
    return (lambda sc, su, s, beta, dt: after(half * time(beta, dt) * scale(s) * size(sc, su)),)


def _fk_three_terms(sc: Tensor, su: Tensor, s: float, beta: float, dt: float) -> Tensor:
    guided = (s * sc + (1 - s) * su).flatten(1)
    squares = (guided**2).sum(1) - s * (sc.flatten(1) ** 2).sum(1) - (1 - s) * (su.flatten(1) ** 2).sum(1)
    return squares * beta * dt / 2


def _fk_loop(sc: Tensor, su: Tensor, s: float, beta: float, dt: float) -> Tensor:
    d = [torch.linalg.vector_norm(c - u) for c, u in zip(sc, su, strict=True)]
    return torch.stack(d) ** 2 * (0.5 * beta * dt * (s**2 - s))


FK = Exercise(
    id="10.1",
    names=("fk_log_weight",),
    references=(fk_log_weight,),
    inputs=_fk_inputs,
    batch=("sc", "su"),
    facts=(
        Fact("one particle, by hand", _fk_by_hand, "beta / 2 times a quadratic in s times a squared length, times dt"),
        Fact("s = 0 and s = 1 need no weights", _fk_ends, "which quadratic in s vanishes at 0 and at 1?"),
        Fact("gives back what guidance removed", _fk_back, "the sign for s above 1"),
        Fact("sums over all entries of a particle", _fk_axes, "(N, ...) -> (N,): flatten(1), square, sum(1)"),
        Fact(
            "is the remainder of the Fokker-Planck equation",
            _fk_residual,
            "d log q / dt minus what the guided SDE does to log q, for q = p(x | y)^s p(x)^(1-s)",
        ),
    ),
    mistakes=(
        Mistake(
            "sign",
            "The sign is turned: s (1 - s) in place of s (s - 1). For s above 1 the weights must grow where p(x | y) "
            "and p(x) disagree: they give back the mass that guidance removed.",
            _fk_by(lambda s: s * (1 - s)),
        ),
        Mistake(
            "s squared",
            "s^2 in place of s (s - 1): at s = 1 the SDE samples p(x | y) exactly, and all weights must stay 1.",
            _fk_by(lambda s: s * s),
        ),
        Mistake(
            "(s - 1) squared",
            "(s - 1)^2 in place of s (s - 1): at s = 0 the SDE samples p(x) exactly, and all weights must stay 1.",
            _fk_by(lambda s: (s - 1) ** 2),
        ),
        Mistake("s - 1 alone", "The factor s is lost: s - 1 in place of s (s - 1).", _fk_by(lambda s: s - 1)),
        Mistake(
            "no half",
            "The 1/2 is missing. It comes from the diffusion term of the Fokker-Planck equation, beta / 2 times the "
            "Laplacian; the weights are squared by that.",
            _fk_by(half=1.0),
        ),
        Mistake(
            "length, not squared",
            "The length of sc - su stands where its square is due.",
            _fk_by(size=lambda sc, su: (sc - su).flatten(1).norm(dim=1)),
        ),
        Mistake(
            "difference of squares",
            "You subtract the squared lengths, |sc|^2 - |su|^2. What is due is the square of the difference, "
            "|sc - su|^2.",
            _fk_by(size=lambda sc, su: (sc**2 - su**2).flatten(1).sum(1)),
        ),
        Mistake(
            "mean over entries",
            "The squares are averaged over the entries of a particle. A log-density is a sum over them.",
            _fk_by(size=lambda sc, su: (sc - su).flatten(1).square().mean(1)),
        ),
        Mistake(
            "sum over particles",
            "The squares of all particles are added up: each gets the same weight, and weights that are equal do "
            "nothing.",
            _fk_by(size=lambda sc, su: (sc - su).square().sum().expand(len(sc))),
        ),
        Mistake(
            "weight, not its logarithm",
            "You return exp of it, the factor by which the weight grows. Asked for is its logarithm: over hundreds of "
            "steps products overflow, sums do not.",
            _fk_by(after=torch.exp),
        ),
        Mistake(
            "root of the step",
            "You scale with the root of beta dt, as noise does. A weight grows with the time itself.",
            _fk_by(time=lambda beta, dt: math.sqrt(beta * dt)),
        ),
        Mistake(
            "no beta",
            "beta is missing: a step twice as noisy changes the weights twice as much.",
            _fk_by(time=lambda beta, dt: dt),
        ),
    ),
    alternatives=((_fk_three_terms,), (_fk_loop,)),
    hints=(
        "Write the Fokker-Planck equation for log q with q = p(x | y)^s p(x)^(1-s) / Z. Each of the two densities "
        "solves it for its own SDE; put those in, and see which squares of scores do not cancel.",
        "beta / 2 s (s - 1) |sc - su|^2 dt.",
    ),
    points=2,
)

# --- 10.2 ess, resample -----------------------------------------------------------------------------------------------

# seeds whose first draw is above 0.9998, in float32 and in float64: there a sum that ends below 1 shows
LATE = {torch.float32: (7977, 10642, 11845, 14713), torch.float64: (7315, 19498, 23808, 32081)}


def _resample_inputs(g: Generator) -> dict:
    return {"ess": dict(logw=2 * randn(g, 9)), "resample": dict(logw=2 * randn(g, 9), gen=_gen(g))}


def _ess_by_hand(answer: Answer, g: Generator) -> None:
    for weights, right in (((2.0, 1.0, 1.0), 8 / 3), ((1.0, 1.0, 1.0, 1.0, 1.0), 5.0), ((9.0, 1.0), 1 / 0.82)):
        got = answer.call("ess", _row(*weights).log())
        _number(got, right, f"ess of weights in proportion {', '.join(f'{w:g}' for w in weights)}")


def _ess_huge(answer: Answer, g: Generator) -> None:
    logw = _row(0, 0, 0, -math.inf)
    for shift in (0, 5000, -5000):
        got = answer.call("ess", logw + shift)
        _number(got, 3.0, f"ess of four log-weights, three equal to {shift}, one -inf")


def _counts(answer: Answer, logw: Tensor, gen: Generator) -> Tensor:
    """How often each particle goes on (N,), once the indices are such at all."""
    n, index = len(logw), answer.call("resample", logw.clone(), gen)
    if index is None:
        raise Wrong("resample returned None: is there a return statement?")
    if not isinstance(index, Tensor) or index.shape != (n,) or index.dtype != torch.int64:
        got = f"{tuple(index.shape)}, {index.dtype}" if isinstance(index, Tensor) else type(index).__name__
        raise Wrong(f"resample returns the indices of {n} particles, ({n},) int64; yours is {got}")
    if ((index < 0) | (index >= n)).any():
        raise Wrong(f"resample: of {n} particles, numbered from 0, came index {int(index.max())}")
    return torch.bincount(index, minlength=n)


def _resample_rising(answer: Answer, g: Generator) -> None:
    logw = 2 * randn(g, 50)
    _counts(answer, logw, _gen(g))
    index = answer.call("resample", logw, _gen(g))
    if (index.diff() < 0).any():
        raise Wrong("resample: the indices do not rise; the teeth of the comb fall from left to right")


def _resample_equal(answer: Answer, g: Generator) -> None:
    for shift in (0.0, -3.0, 700.0):
        counts = _counts(answer, torch.full((40,), shift, dtype=torch.float64), _gen(g))
        if (counts != 1).any():
            lost = int((counts == 0).sum())
            raise Wrong(f"resample: 40 particles of log-weight {shift:g} each: all go on once; yours loses {lost}")


def _resample_floor(answer: Answer, g: Generator) -> None:
    for _ in range(6):
        logw = 1.5 * randn(g, 60)
        due = 60 * logw.softmax(0)
        counts = _counts(answer, logw, _gen(g))
        off = (counts < (due - 1e-6).floor()) | (counts > (due + 1e-6).ceil())
        if off.any():
            i = int(off.nonzero()[0])
            raise Wrong(
                f"resample: 60 particles, one has N w = {float(due[i]):.3g} and comes back {int(counts[i])} times",
                expected=f"{math.floor(due[i])} or {math.ceil(due[i])} times",
            )


def _resample_fair(answer: Answer, g: Generator) -> None:
    logw = _row(0.5, 0.3, 0.12, 0.05, 0.03).log() + 2.0
    total = sum(_counts(answer, logw, _gen(g)) for _ in range(300)) / 300
    due = 5 * logw.softmax(0)
    off = (total - due).abs()
    if (off > 0.18).any():  # six standard errors, as a count varies by 1/2 at most
        i = int(off.argmax())
        raise Wrong(
            f"resample: five particles, N w = {float(due[i]):.3g} for one of them; over 300 calls it comes back "
            f"{float(total[i]):.3g} times on average"
        )


def _resample_one_u(answer: Answer, g: Generator) -> None:
    """As u goes from 0 to 1, each of the five ends passes a tooth once: at most five outcomes."""
    seen = set()
    for _ in range(60):
        seen.add(tuple(_counts(answer, _row(0.125, 0.25, 0.125, 0.25, 0.25).log(), _gen(g)).tolist()))
    if len(seen) > 5:
        raise Wrong(
            f"resample: five particles: one u decides all, which leaves at most 5 outcomes; yours has {len(seen)}"
        )


def _resample_gen(answer: Answer, g: Generator) -> None:
    logw = 1.5 * randn(g, 30)
    seed, seen = integer(g, 0, 10**6), []
    for noise, states in ((1, range(8)), (2, range(8)), (1, range(100, 108))):
        answer.reseed(noise)
        seen.append([_counts(answer, logw, Generator().manual_seed(seed + i)).tolist() for i in states])
    if seen[0] != seen[1]:
        raise Wrong("resample: gen in the same state picks other particles: u does not come from gen")
    if seen[0] == seen[2]:
        raise Wrong("resample: gen in other states picks the same particles: u does not come from gen")


def _resample_end(answer: Answer, g: Generator) -> None:
    for seeds in LATE.values():
        for seed in seeds:
            logw = 0.1 * randn(g, 3000).float()
            _counts(answer, logw, Generator().manual_seed(seed))
    counts = _counts(answer, _row(0, -math.inf, 0, -math.inf), _gen(g))
    if counts[[1, 3]].any():
        raise Wrong("resample: a particle with log-weight -inf, that is weight 0, goes on")


def _ess_by(ess_of: Callable[[Tensor], Tensor]) -> tuple[Callable, Callable]:
    return ess_of, resample


def _resample_by(
    weights: Callable[[Tensor], Tensor] = lambda logw: logw.double().softmax(0),
    teeth: Callable[[int, Generator], Tensor] = lambda n, gen: (torch.arange(n) + _u(gen)) / n,
    pick: Callable[[Tensor, Tensor], Tensor] = lambda w, teeth: torch.searchsorted(w.cumsum(0), teeth, right=True),
    last: bool = False,
) -> tuple[Callable, Callable]:
    def resample_(logw, gen):
        index = pick(weights(logw), teeth(len(logw), gen).to(logw.device))
        return index if last else index.clamp(max=len(logw) - 1)

    return ess, resample_


def _u(gen: Generator | None, *shape: int) -> Tensor:
    return torch.rand(shape, generator=gen, dtype=torch.float64)


def _sorted_pick(w: Tensor, teeth: Tensor) -> Tensor:
    return torch.searchsorted(w.sort(descending=True).values.cumsum(0), teeth, right=True)


def _multinomial(logw: Tensor, gen: Generator) -> Tensor:
    return torch.multinomial(logw.softmax(0), len(logw), replacement=True, generator=gen).sort().values


def _ess_ratio(logw: Tensor) -> Tensor:
    w = (logw - logw.max()).exp()
    return w.sum() ** 2 / (w * w).sum()


def _ess_logs(logw: Tensor) -> Tensor:
    return (2 * logw.logsumexp(0) - (2 * logw).logsumexp(0)).exp()


def _resample_loop(logw: Tensor, gen: Generator) -> Tensor:
    weights = (logw.double() - logw.double().max()).exp().tolist()
    n, total = len(weights), math.fsum(weights)
    tooth = float(torch.rand((), generator=gen)) / n
    index, reached = [], 0.0
    for i, w in enumerate(weights):
        reached += w / total
        while len(index) < n and (tooth < reached or i == n - 1):
            index.append(i)
            tooth += 1 / n
    return torch.tensor(index, device=logw.device)


def _resample_counts(logw: Tensor, gen: Generator) -> Tensor:
    n = len(logw)
    u = torch.rand(1, generator=gen, dtype=torch.float64).to(logw.device)
    ends = n * logw.double().softmax(0).cumsum(0)
    ends[-1] = n
    reached = (ends - u).ceil().clamp(0, n).long()  # teeth at u, u + 1, ... below each end
    reached[-1] = n
    return torch.repeat_interleave(torch.arange(n, device=logw.device), reached.diff(prepend=reached.new_zeros(1)))


def _resample_see(answer: Answer, g: Generator) -> object:
    """Both functions by what tells one mistake from another; not which particles a state of gen picks."""
    seen: dict[str, object] = {}
    seen["ess"] = [
        _error(answer, "ess", logw)
        for logw in (_row(0.3, -1, 0.5), _row(0.3, -1, 0.5) + 2, _row(900, 901, 0), randn(g, 6))
    ]
    logw = _row(0.5, 0.3, 0.12, 0.05, 0.03).log() + 2.0
    due = 5 * logw.softmax(0)
    try:
        seed = integer(g, 0, 10**6)
        runs = []
        for noise in (1, 2):
            answer.reseed(noise)
            runs.append([_counts(answer, logw, Generator().manual_seed(seed + i)) for i in range(40)])
        counts = torch.stack(runs[0])
        mean = counts.double().mean(0)
        seen["repeats"] = torch.equal(counts, torch.stack(runs[1]))
        seen["within one"] = bool(((counts >= (due - 1e-6).floor()) & (counts <= (due + 1e-6).ceil())).all())
        seen["mean"] = "due" if (mean - due).abs().max() < 0.4 else [round(float(m)) for m in mean]
        seen["changes"] = bool((counts != counts[0]).any())
        seen["outcomes"] = len({tuple(c.tolist()) for c in counts}) > 5
        index = answer.call("resample", logw.flip(0), _gen(g))
        seen["rises"] = bool((index.diff() >= 0).all())
        for by in (-52, -4, -2, 50):
            shifted = _counts(answer, logw + by, _gen(g))
            seen[f"shifted by {by}"] = bool((shifted.double() - due).abs().max() < 1.5)
        other = randn(g, 9)
        seen["nine"] = bool((_counts(answer, other, _gen(g)).double() - 9 * other.softmax(0)).abs().max() < 1.01)
        _resample_end(answer, g)
    except (Wrong, Failed) as wrong:
        seen["wrong"] = str(wrong).partition("\n")[0][:40]
    return seen


RESAMPLE = Exercise(
    id="10.2",
    names=("ess", "resample"),
    references=(ess, resample),
    inputs=_resample_inputs,
    changes=("gen",),
    facts=(
        Fact("ess, by hand", _ess_by_hand, "first make the weights add up to 1"),
        Fact("ess stands huge log-weights, and -inf", _ess_huge, "softmax takes the maximum off before exp"),
        Fact("equal weights: each particle goes on once", _resample_equal, "N teeth, 1/N apart, on N pieces of 1/N"),
        Fact("the indices rise", _resample_rising, "the teeth go from left to right"),
        Fact(
            "a particle comes back floor(N w) or ceil(N w) times",
            _resample_floor,
            "how many teeth, 1/N apart, can hit a piece of length w?",
        ),
        Fact(
            "on average it comes back N w times", _resample_fair, "u is uniform in [0, 1), and the first tooth at u / N"
        ),
        Fact("one number u places all teeth", _resample_one_u, "draw a single number"),
        Fact("u comes from gen", _resample_gen, "torch.rand((), generator=gen)"),
        Fact(
            "3,000 particles in float32, and weight 0",
            _resample_end,
            "sums in float32 may end at 0.9999: what does the last tooth hit then?",
        ),
    ),
    mistakes=(
        Mistake(
            "ess of the logarithms",
            "ess is computed from the log-weights as if they were weights. Take exp, or softmax, first.",
            _ess_by(lambda logw: logw.sum() ** 2 / (logw**2).sum()),
        ),
        Mistake(
            "ess not normalised",
            "ess: the weights do not add up to 1 before they are squared, so a common factor changes the result.",
            _ess_by(lambda logw: 1 / (logw.exp() ** 2).sum()),
        ),
        Mistake(
            "ess without the square",
            "ess: the weights are summed without squaring them: that is 1, whatever they are.",
            _ess_by(lambda logw: 1 / logw.softmax(0).sum()),
        ),
        Mistake(
            "ess overflows",
            "ess: right for small log-weights, but exp of a large one is infinite, and infinity over infinity nan. "
            "Take the maximum off first, as softmax does.",
            _ess_by(lambda logw: logw.exp().sum() ** 2 / (logw.exp() ** 2).sum()),
        ),
        Mistake(
            "ess by entropy",
            "ess: you return exp of the entropy, another effective number. Ours is one over the sum of the squares, "
            "which says by how much the variance of a mean grows.",
            _ess_by(lambda logw: torch.special.entr(logw.softmax(0)).sum().exp()),
        ),
        Mistake(
            "ess by the largest",
            "ess: you return one over the largest weight.",
            _ess_by(lambda logw: 1 / logw.softmax(0).max()),
        ),
        Mistake(
            "ess as a share",
            "ess: you return the share, between 0 and 1; asked for is a number of particles, up to N.",
            _ess_by(lambda logw: 1 / (logw.softmax(0) ** 2).sum() / len(logw)),
        ),
        Mistake(
            "multinomial",
            "resample: each particle is drawn by itself, as torch.multinomial does. Right on average, but even equal "
            "weights lose more than a third of the particles. The comb keeps each floor(N w) or ceil(N w) times.",
            (ess, _multinomial),
        ),
        Mistake(
            "one u each",
            "resample: every tooth has a random number of its own (stratified resampling). Systematic: one u moves the "
            "whole comb.",
            _resample_by(teeth=lambda n, gen: (torch.arange(n) + _u(gen, n)) / n),
        ),
        Mistake(
            "no u",
            "resample: the teeth stand still, so the same particles are always favoured, and the result is biased.",
            _resample_by(teeth=lambda n, gen: (torch.arange(n) + 0.5) / n),
        ),
        Mistake(
            "u not divided",
            "resample: the comb is moved by u instead of u / N: its last teeth fall beyond 1.",
            _resample_by(teeth=lambda n, gen: torch.arange(n) / n + _u(gen)),
        ),
        Mistake(
            "u from the global generator",
            "resample: u comes from torch's global random state; draw it from gen.",
            _resample_by(teeth=lambda n, gen: (torch.arange(n) + _u(None)) / n),
        ),
        Mistake(
            "no cumulated weights",
            "resample: the teeth are looked up among the weights themselves; they fall on the cumulated ones.",
            _resample_by(pick=lambda w, teeth: torch.searchsorted(w.sort().values, teeth, right=True)),
        ),
        Mistake(
            "sorted",
            "resample: the weights are sorted first, and the indices count in the sorted order: other particles go on "
            "than those that were hit.",
            _resample_by(pick=_sorted_pick),
        ),
        Mistake(
            "exp for softmax",
            "resample: exp(logw) does not add up to 1, so the comb covers too little or too much of it.",
            _resample_by(weights=lambda logw: logw.double().exp()),
        ),
        Mistake(
            "index N",
            "resample: in float32 the sum of the weights may end at 0.9999, a tooth beyond it finds index N, and x[N] "
            "does not exist. Sum in float64 and cut the index to N - 1.",
            _resample_by(weights=lambda logw: logw.float().softmax(0) * (1 - 1e-4), last=True),
        ),
    ),
    alternatives=((_ess_ratio, resample), (_ess_logs, _resample_loop), (ess, _resample_counts)),
    hints=(
        "ess: normalise with softmax, then square. resample: N places (i + u) / N with one u; torch.searchsorted finds "
        "the piece of the cumulated weights that each falls on.",
        "1 / softmax(logw).square().sum(). u = torch.rand((), generator=gen); torch.searchsorted(w.cumsum(0), "
        "(torch.arange(N) + u) / N, right=True).clamp(max=N - 1), in float64.",
    ),
    probe=_resample_see,
    by_probe=True,
    points=2,
)

# --- 10.3 pc_step -----------------------------------------------------------------------------------------------------


def _pc_inputs(g: Generator) -> dict:
    sc, su, x, z = (randn(g, 4, 3) for _ in range(4))
    return {
        "pc_step": dict(
            sc=sc, su=su, x=x, s=_uniform(g, 1.5, 5), beta=_uniform(g, 0.5, 3), h=_uniform(g, 0.01, 0.2), z=z
        )
    }


def _pc_moves(answer: Answer, *args: object) -> tuple[Tensor, Tensor]:
    got = answer(*(v.clone() if isinstance(v, Tensor) else v for v in args))
    if not isinstance(got, tuple | list) or len(got) != 2:
        raise Wrong(f"return two tensors, (predicted, corrected); yours is {type(got).__name__}")
    return got[0], got[1]


def _pc_still(answer: Answer, g: Generator) -> None:
    x, su, z = randn(g, 4, 3), randn(g, 4, 3), randn(g, 4, 3)
    predicted, _ = _pc_moves(answer, -x, su, x, 3.0, 1.3, 0.1, z)
    need(predicted, x, "where p(x | y) is standard normal, sc = -x, the ODE of p(x | y) does not move anything")


def _pc_ode(answer: Answer, g: Generator) -> None:
    """N(0, vc): the ODE keeps x over its standard deviation."""
    vc, beta, abar, h = _uniform(g, 0.2, 3), _uniform(g, 0.5, 2), _uniform(g, 0.2, 0.8), 1e-4
    x, z = randn(g, 5, 1), torch.zeros(5, 1).double()
    before, after = (a * vc + 1 - a for a in (abar, abar * math.exp(beta * h)))
    predicted, _ = _pc_moves(answer, -x / before, randn(g, 5, 1), x, _uniform(g, 1.5, 4), beta, h, z)
    right = math.sqrt(after / before) * x
    need(
        (predicted - x) / h,
        (right - x) / h,
        f"p(x | y) = N(0, {vc:.3g}), h = {h:g}: x must stay the same number of standard deviations from 0",
        rtol=2e-3,
        atol=2e-3,
    )


def _pc_total(answer: Answer, g: Generator) -> None:
    sc, su, x, z = (randn(g, 4, 3) for _ in range(4))
    s, beta, h = _uniform(g, 1.5, 5), _uniform(g, 0.5, 3), _uniform(g, 0.01, 0.2)
    _, corrected = _pc_moves(answer, sc, su, x, s, beta, h, z)
    right = x + (beta * x / 2 + beta * (s * sc + (1 - s) * su)) * h + math.sqrt(beta * h) * z
    need(corrected, right, f"s = {s:.3g}: both moves together must be the Euler-Maruyama step of the guided SDE")


def _pc_langevin(answer: Answer, g: Generator) -> None:
    sc, su, x, z = (randn(g, 4, 3) for _ in range(4))
    beta, h = _uniform(g, 0.5, 3), _uniform(g, 0.01, 0.2)
    for s, score, law in ((1.0, sc, "p(x | y)"), (0.5, su, "p(x)")):
        predicted, corrected = _pc_moves(answer, sc, su, x, s, beta, h, z)
        right = beta * h / 2 * score + math.sqrt(beta * h) * z
        need(
            corrected - predicted,
            right,
            f"at s = {s:g} the second move is a Langevin step on {law} alone: half a step of its score, and noise",
        )


def _pc_by(
    predict: Callable[..., Tensor] = lambda sc, su, x, s: x + sc,
    g: Callable[[float], float] = lambda s: 2 * s - 1,
    half: float = 0.5,
    noise: Callable[[float, float], float] = lambda beta, h: math.sqrt(beta * h),
    early: float = 0.0,
    lead: float = 0.5,
    base: bool = True,
) -> tuple[Callable]:
    def pc_step_(sc, su, x, s, beta, h, z):
        predicted = x + lead * beta * h * predict(sc, su, x, s) + early * noise(beta, h) * z
        start_at = predicted if base else x
        return predicted, start_at + half * beta * h * (g(s) * sc + (1 - g(s)) * su) + noise(beta, h) * z

    return (pc_step_,)


def _pc_difference(sc: Tensor, su: Tensor, x: Tensor, s: float, beta: float, h: float, z: Tensor) -> tuple:
    predicted = x + h * beta * (x + sc) / 2
    whole = x + h * beta * (x / 2 + su + s * (sc - su)) + z * math.sqrt(beta) * math.sqrt(h)
    return predicted, whole


def _pc_su(sc: Tensor, su: Tensor, x: Tensor, s: float, beta: float, h: float, z: Tensor) -> list:
    k = beta * h
    first = (1 + k / 2) * x + k / 2 * sc
    return [first, first + k * (s - 0.5) * sc - k * (s - 1) * su + k**0.5 * z]


PC = Exercise(
    id="10.3",
    names=("pc_step",),
    references=(pc_step,),
    inputs=_pc_inputs,
    batch=("sc", "su", "x", "z"),
    without=("treats every example on its own",),
    facts=(
        Fact("the ODE leaves a standard normal where it is", _pc_still, "dx/dt = beta / 2 (x + score), towards data"),
        Fact("the first move is the ODE of p(x | y)", _pc_ode, "of the class alone: no s, no su, no noise"),
        Fact(
            "the second move is a Langevin step",
            _pc_langevin,
            "Langevin on q: half the squared size of the noise, times grad log q",
        ),
        Fact(
            "together they are the guided SDE",
            _pc_total,
            "how much of s sc + (1 - s) su is left when sc / 2 is gone? Factor 1/2 out: which g?",
        ),
    ),
    mistakes=(
        Mistake(
            "g = s",
            "The Langevin step has g = s. The ODE has taken half of a score of p(x | y) already; 2 s - 1 is what is "
            "left, so that both together have s.",
            _pc_by(g=lambda s: s),
        ),
        Mistake(
            "g = 2 s",
            "g = 2 s: the half score of the ODE is forgotten, which leaves 2 s - 1.",
            _pc_by(g=lambda s: 2 * s),
        ),
        Mistake("g = s - 1", "g = s - 1, as in the (1 + w) convention; it is 2 s - 1.", _pc_by(g=lambda s: s - 1)),
        Mistake(
            "noise twice",
            "The noise is in both moves: the ODE has none. Twice the noise is not what the SDE has.",
            _pc_by(early=1.0),
        ),
        Mistake(
            "whole score in the ODE",
            "The first move has the whole drift of the SDE. The probability-flow ODE takes half of beta times the "
            "score.",
            _pc_by(predict=lambda sc, su, x, s: x + 2 * sc),
        ),
        Mistake(
            "whole score in the corrector",
            "The 1/2 is on the predictor only: a Langevin step with noise of variance beta h moves by beta h / 2 times "
            "the score.",
            _pc_by(half=1.0),
        ),
        Mistake(
            "noise without beta",
            "The noise is sqrt(h) z; beta is missing: its variance is beta h.",
            _pc_by(noise=lambda beta, h: math.sqrt(h)),
        ),
        Mistake(
            "noise without root",
            "The noise is beta h z; a step of variance beta h is sqrt(beta h) z.",
            _pc_by(noise=lambda beta, h: beta * h),
        ),
        Mistake(
            "guided predictor",
            "The first move is guided already. DDIM here goes with p(x | y) alone; all of s is in the second move.",
            _pc_by(predict=lambda sc, su, x, s: x + s * sc + (1 - s) * su),
        ),
        Mistake(
            "corrector from x",
            "The second move starts at x again; it goes on from where the first has led.",
            _pc_by(base=False),
        ),
        Mistake(
            "no pull",
            "The x / 2 of the drift is missing: the ODE would shrink what stands still.",
            _pc_by(predict=lambda sc, su, x, s: sc),
        ),
        Mistake(
            "forwards",
            "The sign of x / 2 is that of the SDE from data to noise; towards data it pushes outwards.",
            _pc_by(predict=lambda sc, su, x, s: sc - x),
        ),
        Mistake(
            "moves swapped",
            "The two results are exchanged: (predicted, corrected).",
            (lambda *args: pc_step(*args)[::-1],),
        ),
    ),
    alternatives=((_pc_difference,), (_pc_su,)),
    hints=(
        "Towards data the ODE of a density p is dx = beta / 2 (x + grad log p) dt. Subtract it from the guided SDE: "
        "what is left is Langevin on which combination of sc and su?",
        "predicted = x + beta h / 2 (x + sc); g = 2 s - 1; corrected = predicted + beta h / 2 (g sc + (1 - g) su) + "
        "sqrt(beta h) z.",
    ),
    points=2,
)

# --- 10.4 autoguide ---------------------------------------------------------------------------------------------------


def _model(g: Generator, entries: int = 6) -> Callable:
    """An estimate of x0 (B, 2, 3) that depends on xt, t, and on the label, or its absence."""
    mix, labels = randn(g, entries, entries), randn(g, 4, entries)

    def estimate(xt: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        of_label = labels[3].expand(len(xt), -1) if y is None else labels[y]
        out = torch.tanh(xt.flatten(1).double() @ mix + of_label.to(xt.device)) + pad(t.double(), xt.flatten(1))
        return out.view_as(xt).to(xt.dtype)

    return estimate


def _auto_inputs(g: Generator) -> dict:
    xt, t, y = randn(g, 4, 2, 3), torch.rand(4, generator=g, dtype=torch.float64), torch.randperm(4, generator=g) % 3
    return {"autoguide": dict(main=_model(g), bad=_model(g), xt=xt, t=t, y=y, w=_uniform(g, 1.5, 4))}


def _auto_ends(answer: Answer, g: Generator) -> None:
    args = _auto_inputs(g)["autoguide"]
    for w, name in ((1.0, "main"), (0.0, "bad")):
        got = answer(*(args | dict(w=w)).values())
        need(got, args[name](args["xt"], args["t"], args["y"]), f"w = {w:g} must give what {name} says")


def _auto_by_hand(answer: Answer, g: Generator) -> None:
    xt, t, y = torch.zeros(1, 1).double(), _row(0.5), torch.zeros(1).long()
    for w, right in ((2.0, 0.8), (3.0, 1.1), (0.5, 0.35)):
        got = answer(lambda xt, t, y: 0 * xt + 0.5, lambda xt, t, y: 0 * xt + 0.2, xt, t, y, w)
        need(got, torch.full((1, 1), right).double(), f"main says 0.5, bad says 0.2, w = {w:g}", atol=1e-7)


def _auto_asked(answer: Answer, g: Generator) -> None:
    args, asked = _auto_inputs(g)["autoguide"], []

    def spy(name: str) -> Callable:
        def estimate(xt: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
            asked.append((name, xt, t, y))
            return args[name](xt, t, y)

        return estimate

    answer(*(args | dict(main=spy("main"), bad=spy("bad"))).values())
    for name in ("main", "bad"):
        calls = [call for call in asked if call[0] == name]
        if len(calls) != 1:
            raise Wrong(
                f"{name} was asked {len(calls)} times; once is enough, and an evaluation is what sampling costs"
            )
        _, xt, t, y = calls[0]
        if y is None:
            raise Wrong(f"{name} was asked without a label: both models are given the label")
        if not all(close(plain(a), plain(args[k])) for k, a in (("xt", xt), ("t", t), ("y", y))):
            raise Wrong(f"{name} was asked about another xt, t or y than it was given")


def _auto_order(answer: Answer, g: Generator) -> None:
    """N(0, v): both believe the data wider, main by d, bad by k d; w = k / (k - 1) cancels that, in first order."""
    v, a, k = _uniform(g, 0.5, 1.5), _uniform(g, 0.5, 0.8), _uniform(g, 2.5, 4)
    w, x = k / (k - 1), randn(g, 5, 1)
    t, y = torch.zeros(5).double(), torch.zeros(5).long()

    def believes(variance: float) -> Callable:
        return lambda xt, t, y: a * variance / (a**2 * variance + 1 - a**2) * xt

    right = believes(v)(x, t, y)
    off = []
    for d in (1e-2, 1e-3):
        got = answer(believes(v + d), believes(v + k * d), x, t, y, w)
        off.append(float((got - right).abs().max() / x.abs().max()))
    if off[0] > 2e-3 or off[1] > off[0] / 30:
        raise Wrong(
            f"both models see data that are too wide, bad {k:.3g} times as much; w = {w:.3g} must cancel that: an "
            f"error ten times smaller must leave a hundredth of {off[0]:.2g}, yours leaves {off[1]:.2g}"
        )


def _auto_by(
    mix: Callable[[Tensor, Tensor, float], Tensor] = lambda main, bad, w: bad + w * (main - bad),
    ask: Callable[..., tuple[Tensor, Tensor]] = lambda main, bad, xt, t, y: (main(xt, t, y), bad(xt, t, y)),
) -> tuple[Callable]:
    return (lambda main, bad, xt, t, y, w: mix(*ask(main, bad, xt, t, y), w),)


AUTOGUIDE = Exercise(
    id="10.4",
    names=("autoguide",),
    references=(autoguide,),
    inputs=_auto_inputs,
    batch=("xt", "t", "y"),
    facts=(
        Fact("w = 1 is main, w = 0 is bad", _auto_ends, "a straight line through the two estimates"),
        Fact("one entry, by hand", _auto_by_hand, "start at bad, and walk the way to main w times"),
        Fact("each model is asked once, with the label", _auto_asked, "what differs is the model, not the condition"),
        Fact(
            "cancels an error that both models share",
            _auto_order,
            "if bad errs k times as much as main, which w leads back to the truth?",
        ),
    ),
    mistakes=(
        Mistake(
            "w on the bad side",
            "main and bad are exchanged: the result moves towards what the bad model says.",
            _auto_by(lambda main, bad, w: main + w * (bad - main)),
        ),
        Mistake(
            "bad without label",
            "The bad model is asked without the label. Then the difference holds the label too: this is "
            "classifier-free guidance with a poor unconditional model; autoguidance keeps the condition and changes "
            "the model.",
            _auto_by(ask=lambda main, bad, xt, t, y: (main(xt, t, y), bad(xt, t, None))),
        ),
        Mistake(
            "plain CFG",
            "You ask main twice, with the label and without: this is classifier-free guidance, and `bad` is not used.",
            _auto_by(ask=lambda main, bad, xt, t, y: (main(xt, t, y), main(xt, t, None))),
        ),
        Mistake(
            "1 + w",
            "You walk from main on: main + w (main - bad). Here w = 1 is main itself, so your w is one too strong.",
            _auto_by(lambda main, bad, w: main + w * (main - bad)),
        ),
        Mistake(
            "difference alone",
            "You return w (main - bad) alone, without the estimate it is added to.",
            _auto_by(lambda main, bad, w: w * (main - bad)),
        ),
        Mistake(
            "subtracted",
            "The difference is subtracted: bad - w (main - bad) leads away from main.",
            _auto_by(lambda main, bad, w: bad - w * (main - bad)),
        ),
        Mistake(
            "w = 0 unconditional",
            "At w = 0 you expect the unconditional estimate: main without the label is your base. The base of "
            "autoguidance is the bad model with the label.",
            _auto_by(
                lambda base_main, bad, w: base_main[1] + w * (base_main[0] - bad),
                lambda main, bad, xt, t, y: ((main(xt, t, y), main(xt, t, None)), bad(xt, t, y)),
            ),
        ),
        Mistake(
            "clamped",
            "w is cut to [0, 1]: the result lies between the two models. Guidance goes beyond main.",
            _auto_by(lambda main, bad, w: bad + min(max(w, 0.0), 1.0) * (main - bad)),
        ),
        Mistake(
            "no w",
            "The result does not depend on w: it is what main says.",
            _auto_by(lambda main, bad, w: bad + (main - bad)),
        ),
    ),
    alternatives=(
        _auto_by(lambda main, bad, w: w * main + (1 - w) * bad),
        _auto_by(lambda main, bad, w: torch.lerp(bad, main, w)),
        _auto_by(lambda main, bad, w: main + (w - 1) * (main - bad)),
    ),
    hints=(
        "The formula is that of classifier-free guidance. What stands for eps_c, and what for eps_u? Which label does "
        "each model get?",
        "bad(xt, t, y) + w (main(xt, t, y) - bad(xt, t, y)).",
    ),
    hides=("guidance.cfg",),
    probe=lambda answer, g: [
        answer(*(_auto_inputs(g)["autoguide"] | dict(w=w)).values()) for w in (0.0, 0.4, 1.0, 2.0)
    ],
)

# --- 10.5 mg_target, mg_scale, gft_target -----------------------------------------------------------------------------


def _train_inputs(g: Generator) -> dict:
    eps, eps_c, eps_u = (randn(g, 4, 3, 2) for _ in range(3))
    return {
        "mg_target": dict(eps=eps, eps_c=eps_c, eps_u=eps_u, w=_uniform(g, 0.1, 0.9)),
        "mg_scale": dict(w=_uniform(g, 0.1, 0.9)),
        "gft_target": dict(eps=eps, eps_null=eps_u, beta=_uniform(g, 0.15, 0.9)),
    }


def _w_atoms(g: Generator) -> tuple[list[dict[str, object]], Atoms]:
    w = 0.1 + 0.8 * torch.rand(9, generator=g, dtype=torch.float64)
    return [dict(w=float(v)) for v in w], {"w": w, "1 - w": 1 - w, "1 + w": 1 + w}


def _beta_atoms(g: Generator) -> tuple[list[dict[str, object]], Atoms]:
    b = 0.15 + 0.75 * torch.rand(9, generator=g, dtype=torch.float64)
    return [dict(beta=float(v)) for v in b], {
        "beta": b,
        "1 - beta": 1 - b,
        "1/beta": 1 / b,
        "(1 - beta)/beta": 1 / b - 1,
    }


def _mg_by_hand(answer: Answer, g: Generator) -> None:
    for w, right in ((0.5, 1.35), (0.0, 1.0), (0.8, 1.56)):
        got = answer.call("mg_target", *(torch.full((1, 1), v).double() for v in (1.0, 0.4, -0.3)), w)
        need(got, torch.full((1, 1), right).double(), f"mg_target: eps = 1, eps_c = 0.4, eps_u = -0.3, w = {w:g}")


def _mg_fixed(answer: Answer, g: Generator) -> None:
    """A network that learns its target on average perfectly, round after round."""
    ec, eu, w = randn(g, 3, 2), randn(g, 3, 2), _uniform(g, 0.2, 0.7)
    network = ec
    for _ in range(120):
        network = answer.call("mg_target", ec.clone(), network.clone(), eu.clone(), w)
        if not isinstance(network, Tensor) or not network.abs().max() < 1e6:
            raise Wrong(f"mg_target: trained again and again on its own target, w = {w:.3g}, the network diverges")
    right = eu + (ec - eu) * math.fsum(w**k for k in range(200))
    need(
        network,
        right,
        f"mg_target: trained again and again on its own target, w = {w:.3g}, the network must end at plain guidance",
    )


def _mg_scales(answer: Answer, g: Generator) -> None:
    for w, right in ((0.0, 1.0), (0.5, 2.0), (0.75, 4.0), (0.9, 10.0), (-0.5, 2 / 3)):
        _number(answer.call("mg_scale", w), right, f"mg_scale({w:g})", rtol=1e-9)


def _mg_end(answer: Answer, g: Generator) -> None:
    for w in (1.0, 1.5, 3.0):
        _must_raise(answer, "mg_scale", (w,), f"mg_scale({w:g})")


def _gft_met(answer: Answer, g: Generator) -> None:
    eps, null, beta = randn(g, 3, 2), randn(g, 3, 2), _uniform(g, 0.2, 0.9)
    got = answer.call("gft_target", eps.clone(), null.clone(), beta)
    need(
        beta * got + (1 - beta) * null,
        eps,
        f"gft_target: with it as the label's prediction, beta = {beta:.3g}, the mixture must be eps",
    )
    need(answer.call("gft_target", eps.clone(), null.clone(), 1.0), eps, "gft_target: at beta = 1 it is eps itself")


def _gft_by_hand(answer: Answer, g: Generator) -> None:
    for beta, right in ((0.5, 2.3), (0.25, 4.9), (0.8, 1.325)):
        got = answer.call("gft_target", torch.ones(1, 1).double(), torch.full((1, 1), -0.3).double(), beta)
        need(got, torch.full((1, 1), right).double(), f"gft_target: eps = 1, eps_null = -0.3, beta = {beta:g}")


def _gft_range(answer: Answer, g: Generator) -> None:
    eps, null = randn(g, 2, 2), randn(g, 2, 2)
    for beta in (0.0, -0.5, 1.2, 3.0):
        _must_raise(answer, "gft_target", (eps.clone(), null.clone(), beta), f"gft_target at beta = {beta:g}")


def _constants(answer: Answer, g: Generator) -> None:
    eps, eps_c, eps_u = (randn(g, 2, 3) for _ in range(3))
    for name, args in (
        ("mg_target", (eps, eps_c.clone().requires_grad_(), eps_u.clone().requires_grad_(), 0.5)),
        ("gft_target", (eps, eps_u.clone().requires_grad_(), 0.5)),
    ):
        got = answer.call(name, *args)
        if isinstance(got, Tensor) and got.requires_grad:
            raise Wrong(
                f"{name}: gradients flow through the target into the network's predictions; a target is a constant"
            )


def _train_by(
    mg: Callable[..., Tensor] = mg_target,
    scale: Callable[[float], float] = mg_scale,
    gft: Callable[..., Tensor] = gft_target,
) -> tuple[Callable, Callable, Callable]:
    return mg, scale, gft


def _up_to_one(formula: Callable[[float], float]) -> Callable[[float], float]:
    def mg_scale_(w):
        if w >= 1:
            raise ValueError("w must be below 1")
        return formula(w)

    return mg_scale_


def _in_range(formula: Callable[..., Tensor], low: float = 0.0, high: float = 1.0, closed: bool = False) -> Callable:
    def gft_target_(eps, eps_null, beta):
        if beta > high or beta < low or (beta == low and not closed):
            raise ValueError("beta is out of range")
        return formula(eps, eps_null.detach(), beta)

    return gft_target_


def _gft_graph(eps: Tensor, eps_null: Tensor, beta: float) -> Tensor:
    if not 0 < beta <= 1:
        raise ValueError("beta is out of range")
    return (eps - (1 - beta) * eps_null) / beta


def _right_gft(eps: Tensor, null: Tensor, beta: float) -> Tensor:
    return (eps - (1 - beta) * null) / beta


def _mg_no_grad(eps: Tensor, eps_c: Tensor, eps_u: Tensor, w: float) -> Tensor:
    with torch.no_grad():
        return torch.lerp(eps, eps + eps_c - eps_u, w)


def _gft_scale(eps: Tensor, eps_null: Tensor, beta: float) -> Tensor:
    if beta <= 0 or beta > 1:
        raise ValueError(f"beta = {beta}")
    s, null = 1 / beta, eps_null.data
    return null + s * (eps - null)


def _train_see(answer: Answer, g: Generator) -> object:
    eps, c, u = (randn(g, 2, 2) for _ in range(3))
    graphs = [
        bool(getattr(_error(answer, name, *args), "requires_grad", False))
        for name, args in (
            ("mg_target", (eps, c.clone().requires_grad_(), u.clone().requires_grad_(), 0.5)),
            ("gft_target", (eps, u.clone().requires_grad_(), 0.5)),
        )
    ]
    ends = [_error(answer, "mg_scale", w) for w in (-1.0, 0.0, 0.3, 1.0, 1.5)]
    return [graphs, ends, [_error(answer, "gft_target", eps, u, beta) for beta in (-0.5, 0.0, 0.4, 1.0, 1.2)]]


TRAINED = Exercise(
    id="10.5",
    names=("mg_target", "mg_scale", "gft_target"),
    references=(mg_target, mg_scale, gft_target),
    inputs=_train_inputs,
    batch=("eps", "eps_c", "eps_u", "eps_null"),
    formulas=(
        Formula("mg_target", "target", ("eps", "eps_c", "eps_u"), "target = eps + w*eps_c - w*eps_u", _w_atoms),
        Formula(
            "gft_target",
            "target",
            ("eps", "eps_null"),
            "target = 1/beta*eps - (1 - beta)/beta*eps_null",
            _beta_atoms,
        ),
    ),
    facts=(
        Fact("mg_target, by hand", _mg_by_hand, "the noise, and w times a difference of the network's own predictions"),
        Fact(
            "training again and again ends at plain guidance",
            _mg_fixed,
            "at the end the network's prediction n satisfies n = eps_c + w (n - eps_u)",
        ),
        Fact("mg_scale at 0, 1/2, 3/4, 9/10 and -1", _mg_scales, "solve n = eps_c + w (n - eps_u) for n"),
        Fact("mg_scale refuses w from 1 on", _mg_end, "each round adds w times the last: 1 + w + w^2 + ..."),
        Fact("gft_target, by hand", _gft_by_hand, "solve beta r + (1 - beta) eps_null = eps for r"),
        Fact("gft_target meets what is trained", _gft_met, "put it back into the mixture"),
        Fact("gft_target refuses beta outside (0, 1]", _gft_range, "which scales s = 1 / beta are meant?"),
        Fact("targets are constants", _constants, "detach(), or torch.no_grad()"),
    ),
    mistakes=(
        Mistake(
            "mg target not detached",
            "mg_target: no stop-gradient. The loss then also moves the target towards the network, the gradient is "
            "multiplied by 1 - w, and the null branch is pushed away.",
            _train_by(mg=lambda eps, eps_c, eps_u, w: eps + w * (eps_c - eps_u)),
        ),
        Mistake(
            "mg difference reversed",
            "mg_target: the difference is reversed: the network is trained away from its label.",
            _train_by(mg=lambda eps, eps_c, eps_u, w: eps + w * (eps_u - eps_c).detach()),
        ),
        Mistake(
            "mg without the noise",
            "mg_target: eps does not enter: eps_c + w (eps_c - eps_u) is guidance at sampling. A target without data "
            "teaches nothing about data.",
            _train_by(mg=lambda eps, eps_c, eps_u, w: (eps_c + w * (eps_c - eps_u)).detach()),
        ),
        Mistake(
            "mg towards the guided prediction",
            "mg_target: you mix the noise with the prediction: (1 - w) eps + w eps_c. The difference of two "
            "predictions is added to the whole noise.",
            _train_by(mg=lambda eps, eps_c, eps_u, w: (1 - w) * eps + w * eps_c.detach()),
        ),
        Mistake(
            "mg difference to the noise",
            "mg_target: the difference is eps - eps_u: the label's own prediction is not used. That is the target of a "
            "CFG at 1 + w, with no fixed point to find.",
            _train_by(mg=lambda eps, eps_c, eps_u, w: eps + w * (eps - eps_u.detach())),
        ),
        Mistake(
            "scale 1 + w",
            "mg_scale: 1 + w is one round only. The target is built from a prediction that has the guidance of the "
            "round before in it: 1 + w + w^2 + ...",
            _train_by(scale=_up_to_one(lambda w: 1 + w)),
        ),
        Mistake(
            "scale 1 / w",
            "mg_scale: 1 / w is infinite for plain training, w = 0, where s = 1.",
            _train_by(scale=_up_to_one(lambda w: 1 / w)),
        ),
        Mistake(
            "scale w / (1 - w)",
            "mg_scale: w / (1 - w) counts from eps_c on, as the (1 + w) convention does; s is one more.",
            _train_by(scale=_up_to_one(lambda w: w / (1 - w))),
        ),
        Mistake(
            "w from 1 on accepted",
            "mg_scale: w >= 1 is accepted. 1 / (1 - w) is negative there, or infinite, and no training ends at it: "
            "each round adds at least as much as the last. (A public copy of the training code counts "
            "otherwise: there 1 is plain training.)",
            _train_by(scale=lambda w: 1 / (1 - w) if w != 1 else math.inf),
        ),
        Mistake(
            "gft null not detached",
            "gft_target: no stop-gradient on eps_null: the guidance would train the unconditional prediction too.",
            _train_by(gft=_gft_graph),
        ),
        Mistake(
            "gft weights exchanged",
            "gft_target: beta and 1 - beta are exchanged. beta = 1 must be plain training.",
            _train_by(gft=_in_range(lambda eps, null, beta: (eps - beta * null) / (1 - beta))),
        ),
        Mistake(
            "gft beta as scale",
            "gft_target: beta is used as if it were the scale, null + beta (eps - null). The scale is 1 / beta.",
            _train_by(gft=_in_range(lambda eps, null, beta: null + beta * (eps - null))),
        ),
        Mistake(
            "gft not divided",
            "gft_target: the share of eps_null is taken off, but what is left is not divided by beta.",
            _train_by(gft=_in_range(lambda eps, null, beta: eps - (1 - beta) * null)),
        ),
        Mistake(
            "gft sign",
            "gft_target: eps_null is added; bring it to the other side of the equation.",
            _train_by(gft=_in_range(lambda eps, null, beta: (eps + (1 - beta) * null) / beta)),
        ),
        Mistake(
            "gft beta above 1 accepted",
            "gft_target: beta above 1 is accepted. That would be a scale below 1, which GFT does not train.",
            _train_by(gft=_in_range(_right_gft, high=math.inf)),
        ),
        Mistake(
            "gft beta 0 accepted",
            "gft_target: beta = 0 is accepted. There the label's prediction does not occur in the loss, and no target "
            "is defined.",
            _train_by(gft=_in_range(_right_gft, closed=True)),
        ),
    ),
    alternatives=(
        (_mg_no_grad, _up_to_one(lambda w: 1 + w / (1 - w)), _gft_scale),
        (
            lambda eps, eps_c, eps_u, w: eps + w * eps_c.detach() - w * eps_u.detach(),
            _up_to_one(lambda w: (1 - w) ** -1),
            _in_range(lambda eps, null, beta: eps / beta + (1 - 1 / beta) * null),
        ),
    ),
    hints=(
        "mg: when training ends, the network n fits its target on average, n = E[eps | xt, y] + w (n - eps_u). "
        "gft: solve the mixture for the label's prediction.",
        "eps + w (eps_c - eps_u).detach(); 1 / (1 - w), ValueError for w >= 1; (eps - (1 - beta) eps_null.detach()) / "
        "beta, ValueError unless 0 < beta <= 1.",
    ),
    hides=("guidance.cfg",),
    probe=_train_see,
    points=2,
)

# --- 10.6 cfgpp_step, cfgpp_scale -------------------------------------------------------------------------------------


def _earlier(g: Generator, t: Tensor) -> Tensor:
    """A time before each, at least 1."""
    return (t * (0.2 + 0.6 * torch.rand(len(t), generator=g))).long().clamp(min=1)


def _pp_inputs(g: Generator) -> dict:
    eps_c, eps_u, xt = pictures(g, 3)
    abar, t = random_abar(g), times(g, low=6)
    after, lam = _earlier(g, t), _uniform(g, 0.2, 0.9)
    return {
        "cfgpp_step": dict(eps_c=eps_c, eps_u=eps_u, xt=xt, t=t, t_next=after, abar=abar, lam=lam),
        "cfgpp_scale": dict(lam=lam, t=t, t_next=after, abar=abar),
    }


def _noised(x0: Tensor, eps: Tensor, a: Tensor) -> Tensor:
    a = a.reshape(-1, *[1] * (x0.ndim - 1))
    return a**0.5 * x0 + (1 - a) ** 0.5 * eps


def _pp_true(answer: Answer, g: Generator) -> None:
    """xt made of an x0 and a noise that one of the predictions knows."""
    x0, eps, other = (randn(g, 4, 3, 2) for _ in range(3))
    abar, t = random_abar(g), times(g, low=6)
    after = _earlier(g, t)
    xt = _noised(x0, eps, abar[t])
    got = answer.call("cfgpp_step", other, eps, xt.clone(), t, after, abar, 0.0)
    need(got, _noised(x0, eps, abar[after]), "cfgpp_step: lam = 0 is a plain DDIM step with eps_u")
    got = answer.call("cfgpp_step", eps, other, xt.clone(), t, after, abar, 1.0)
    right = _noised(x0, other, abar[after])
    need(got, right, "cfgpp_step: at lam = 1, x0 comes from eps_c, and the noise that is put back is eps_u")


def _pp_last(answer: Answer, g: Generator) -> None:
    eps_c, eps_u, x0 = (randn(g, 3, 2) for _ in range(3))
    abar, t, lam = random_abar(g), times(g, 3, low=6), _uniform(g, 0.2, 0.9)
    xt = _noised(x0, eps_u + lam * (eps_c - eps_u), abar[t])
    got = answer.call("cfgpp_step", eps_c, eps_u, xt, t, torch.zeros_like(t), abar, lam)
    need(got, x0, "cfgpp_step: at t_next = 0, where abar is 1, no noise is left: the estimate of x0 must come back")


TABLE = (1.0, 0.8, 0.5, 0.2, 0.1)  # sigma / alpha: 0, 1/2, 1, 2, 3


def _pp_scale_by_hand(answer: Answer, g: Generator) -> None:
    abar = _row(*TABLE)
    t, after = torch.tensor([2, 3, 3, 4]), torch.tensor([1, 2, 1, 3])
    got = answer.call("cfgpp_scale", 0.6, t, after, abar)
    right = 0.6 * _row(2, 2, 4 / 3, 3)
    for i in range(4):
        if not isinstance(got, Tensor) or got.shape != (4,):
            break
        what = f"abar from {TABLE[t[i]]:g} to {TABLE[after[i]]:g}, that is sigma / alpha from "
        levels = [math.sqrt(1 / TABLE[j] - 1) for j in (int(t[i]), int(after[i]))]
        _number(got[i], float(right[i]), f"cfgpp_scale: {what}{levels[0]:g} to {levels[1]:g}, lam = 0.6")
    need(got, right, "cfgpp_scale: four steps of a table with sigma / alpha = 0, 1/2, 1, 2, 3")


def _pp_scale_last(answer: Answer, g: Generator) -> None:
    abar, t, lam = random_abar(g), times(g, 3), _uniform(g, 0.2, 0.9)
    got = answer.call("cfgpp_scale", lam, t, torch.zeros_like(t), abar)
    need(
        got,
        torch.full((3,), lam).double(),
        f"cfgpp_scale: the step to t_next = 0 puts no noise back: s = lam = {lam:.3g}",
    )


def _pp_same(answer: Answer, g: Generator) -> None:
    eps_c, eps_u, xt = (randn(g, 4, 3) for _ in range(3))
    abar, t, lam = random_abar(g), times(g, low=6), _uniform(g, 0.2, 0.9)
    after = _earlier(g, t)
    s = answer.call("cfgpp_scale", lam, t, after, abar)
    if not isinstance(s, Tensor) or s.shape != (4,):
        raise Wrong("cfgpp_scale: one scale per example is due, (4,)")
    eps = eps_u + s[:, None] * (eps_c - eps_u)
    a, b = abar[t][:, None], abar[after][:, None]
    guided = b**0.5 * (xt - (1 - a) ** 0.5 * eps) / a**0.5 + (1 - b) ** 0.5 * eps
    x0 = (xt - (1 - a) ** 0.5 * (lam * eps_c + (1 - lam) * eps_u)) / a**0.5
    right = b**0.5 * x0 + (1 - b) ** 0.5 * eps_u
    need(guided, right, f"cfgpp_scale: DDIM with CFG at your scale is not the CFG++ step at lam = {lam:.3g}")


def _pp_finer(answer: Answer, g: Generator) -> None:
    """A step half as long, in sigma / alpha, needs twice the scale."""
    noise, lam = 1.0, 0.6
    levels = [noise, noise - 0.1, noise - 0.05]
    abar = torch.cat([_row(1.0), 1 / (1 + _row(*levels) ** 2)])
    got = answer.call("cfgpp_scale", lam, torch.tensor([1, 1]), torch.tensor([2, 3]), abar)
    if isinstance(got, Tensor) and got.shape == (2,):
        _number(got[0], 6.0, "cfgpp_scale: sigma / alpha falls by a tenth, from 1 to 0.9, lam = 0.6")
        _number(got[1], 12.0, "cfgpp_scale: sigma / alpha falls by a twentieth, from 1 to 0.95, lam = 0.6")


def _pp_by(
    x0_from: Callable[..., Tensor] = lambda c, u, lam: u + lam * (c - u),
    put_back: Callable[..., Tensor] = lambda c, u, lam: u,
    exchanged: bool = False,
    rooted: bool = True,
    scale: Callable[..., Tensor] | None = None,
) -> tuple[Callable, Callable]:
    def cfgpp_step_(eps_c, eps_u, xt, t, t_next, abar, lam):
        a, b = pad(abar[t], xt), pad(abar[t_next], xt)
        if exchanged:
            a, b = b, a
        root = torch.sqrt if rooted else (lambda v: v)
        x0 = (xt - root(1 - a) * x0_from(eps_c, eps_u, lam)) / root(a)
        return root(b) * x0 + root(1 - b) * put_back(eps_c, eps_u, lam)

    def cfgpp_scale_(lam, t, t_next, abar):
        return scale(lam, abar[t], abar[t_next])

    return cfgpp_step_, cfgpp_scale if scale is None else cfgpp_scale_


def _ratio(a: Tensor) -> Tensor:
    return ((1 - a) / a).sqrt()


def _scale_by(rule: Callable[..., Tensor], level: Callable[[Tensor], Tensor] = _ratio) -> tuple[Callable, Callable]:
    return _pp_by(scale=lambda lam, a, b: rule(lam, level(a), level(b)))


def _pp_moved(eps_c: Tensor, eps_u: Tensor, xt: Tensor, t: Tensor, t_next: Tensor, abar: Tensor, lam: float) -> Tensor:
    """The unconditional DDIM step, and then a push."""
    a, b = pad(abar[t], xt), pad(abar[t_next], xt)
    step = (b / a).sqrt() * (xt - (1 - a).sqrt() * eps_u) + (1 - b).sqrt() * eps_u
    return step - (b * (1 - a) / a).sqrt() * lam * (eps_c - eps_u)


def _scale_snr(lam: float, t: Tensor, t_next: Tensor, abar: Tensor) -> Tensor:
    snr, snr_next = (abar[i] / (1 - abar[i]) for i in (t, t_next))
    return lam / (1 - (snr / snr_next).sqrt())


def _scale_products(lam: float, t: Tensor, t_next: Tensor, abar: Tensor) -> Tensor:
    a, b = abar[t], abar[t_next]
    up, down = (b * (1 - a)).sqrt(), (a * (1 - b)).sqrt()
    return lam * up / (up - down)


CFGPP = Exercise(
    id="10.6",
    names=("cfgpp_step", "cfgpp_scale"),
    references=(cfgpp_step, cfgpp_scale),
    inputs=_pp_inputs,
    batch=("eps_c", "eps_u", "xt", "t", "t_next"),
    facts=(
        Fact("cfgpp_step with predictions that know the noise", _pp_true, "two predictions: one for x0, one put back"),
        Fact("cfgpp_step: the last step returns the estimate of x0", _pp_last, "abar[0] = 1"),
        Fact(
            "cfgpp_scale, by hand",
            _pp_scale_by_hand,
            "divide both steps by sqrt(abar[t_next]) and compare the factors of eps_c - eps_u",
        ),
        Fact("cfgpp_scale of the last step is lam", _pp_scale_last, "what is sigma / alpha at t_next = 0?"),
        Fact("cfgpp_scale: half the step, twice the scale", _pp_finer, "lam is a strength per step"),
        Fact("DDIM with CFG at that scale makes the same step", _pp_same, "equal for every xt, eps_c and eps_u"),
    ),
    mistakes=(
        Mistake(
            "guided noise put back",
            "cfgpp_step: the mixed prediction is also the noise that is put back: this is DDIM with classifier-free "
            "guidance. CFG++ puts eps_u back.",
            _pp_by(put_back=lambda c, u, lam: u + lam * (c - u)),
        ),
        Mistake(
            "conditional noise put back",
            "cfgpp_step: eps_c is put back; CFG++ puts the unconditional eps_u back.",
            _pp_by(put_back=lambda c, u, lam: c),
        ),
        Mistake(
            "roles exchanged",
            "cfgpp_step: x0 is estimated with eps_u, and the mixed prediction put back: the other way round.",
            _pp_by(lambda c, u, lam: u, lambda c, u, lam: u + lam * (c - u)),
        ),
        Mistake(
            "x0 from eps_c",
            "cfgpp_step: x0 is estimated with eps_c alone; lam has no effect.",
            _pp_by(lambda c, u, lam: c),
        ),
        Mistake(
            "labels exchanged",
            "cfgpp_step: eps_c and eps_u are exchanged in the mixture: lam = 0 must be unconditional.",
            _pp_by(lambda c, u, lam: c + lam * (u - c)),
        ),
        Mistake("times exchanged", "cfgpp_step: t and t_next are exchanged.", _pp_by(exchanged=True)),
        Mistake(
            "roots missing",
            "cfgpp_step: abar and 1 - abar without their square roots.",
            _pp_by(rooted=False),
        ),
        Mistake(
            "lam is s",
            "cfgpp_scale: you return lam itself. CFG++ puts eps_u back, CFG the guided noise; so s is lam only in the "
            "last step, where no noise is put back, and 16 times that in the middle of 50 steps (cosine).",
            _scale_by(lambda lam, now, after: lam + 0 * now),
        ),
        Mistake(
            "sigma for sigma / alpha",
            "cfgpp_scale: you count noise in sigma = sqrt(1 - abar). The step from t to t_next also rescales x: what "
            "counts is sigma / alpha.",
            _scale_by(lambda lam, now, after: lam * now / (now - after), lambda a: (1 - a).sqrt()),
        ),
        Mistake(
            "variances",
            "cfgpp_scale: you count noise in its variance, (1 - abar) / abar, without the root.",
            _scale_by(lambda lam, now, after: lam * now / (now - after), lambda a: (1 - a) / a),
        ),
        Mistake(
            "next on top",
            "cfgpp_scale: the noise after the step stands on top; it is the noise before it. (At the last step yours "
            "gives 0.)",
            _scale_by(lambda lam, now, after: lam * after / (now - after)),
        ),
        Mistake(
            "before and after exchanged",
            "cfgpp_scale: the noise levels before and after the step are exchanged, so s is negative.",
            _scale_by(lambda lam, now, after: lam * after / (after - now)),
        ),
        Mistake(
            "difference not divided",
            "cfgpp_scale: you multiply by the length of the step, relative to the noise, where you should divide by "
            "it: shorter steps need a larger s.",
            _scale_by(lambda lam, now, after: lam * (now - after) / now),
        ),
        Mistake(
            "absolute step",
            "cfgpp_scale: lam over the length of the step; the length counts relative to the noise before it.",
            _scale_by(lambda lam, now, after: lam / (now - after)),
        ),
    ),
    alternatives=((_pp_moved, _scale_snr), (cfgpp_step, _scale_products)),
    hints=(
        "step: like DDIM, with one prediction in the estimate of x0 and another where the noise is put back. scale: "
        "x / alpha moves by (change of sigma / alpha) times eps under CFG; what does CFG++ give eps_c - eps_u?",
        "x0 = (xt - sigma (eps_u + lam (eps_c - eps_u))) / alpha, then alpha_next x0 + sigma_next eps_u. With "
        "n = sigma / alpha: s = lam n / (n - n_next).",
    ),
    hides=("samplers.ddim_step", "guidance.cfg"),
    points=2,
)

# --- 10.7 measurement_grad, dps_vs_exact ------------------------------------------------------------------------------


def _spd(g: Generator, n: int) -> Tensor:
    root = randn(g, n, n)
    return root @ root.mT / n + 0.3 * torch.eye(n, dtype=torch.float64)


def _curved(g: Generator, d: int) -> Callable:
    """A denoiser with a Jacobian that is neither constant nor symmetric."""
    mix, pull = randn(g, d, d), randn(g, d, d) / 2

    def denoise(x: Tensor) -> Tensor:
        return torch.tanh(x @ mix.to(x)) + x @ pull.to(x)

    return denoise


def _field(g: Generator, d: int) -> Callable:
    mix = randn(g, d, d)
    return lambda x: torch.sin(x @ mix.to(x)) + x


def _dps_inputs(g: Generator) -> dict:
    d, m = 3, 2
    args = dict(x=randn(g, 5, d), a=_uniform(g, 0.3, 0.9), A=randn(g, m, d), R=_spd(g, m), y=randn(g, m))
    denoise, method = _curved(g, d), "pigdm" if integer(g, 0, 1) else "dps"
    return {
        "measurement_grad": dict(denoise=denoise) | args | dict(method=method),
        "dps_vs_exact": dict(denoise=denoise, exact=_field(g, d)) | args,
    }


def _method(
    answer: Answer, denoise: Callable, x: Tensor, a: float, A: Tensor, R: Tensor, y: Tensor, method: str
) -> Tensor:
    return answer.call("measurement_grad", denoise, x.clone(), a, A.clone(), R.clone(), y.clone(), method)


def _pull(got: Tensor, right: Tensor, what: str) -> None:
    """As `need`, in terms of direction and length."""
    if isinstance(got, Tensor) and got.shape == right.shape and got.isfinite().all():
        cosine = torch.cosine_similarity(got.double(), right, dim=1)
        length = (got.norm(dim=1) / right.norm(dim=1)).tolist()
        if cosine.min() > 1 - 1e-6:
            what += (
                f"; the direction is right, the length is off by the factors {', '.join(f'{v:.3g}' for v in length)}"
            )
        else:
            what += f"; the cosine with the right gradient goes down to {float(cosine.min()):.3f}"
    need(got, right, what)


def _dps_linear(answer: Answer, g: Generator) -> None:
    """A denoiser that is linear in x: the gradient is a matrix times a residual."""
    M, x, A, R, y = randn(g, 3, 3), randn(g, 5, 3), randn(g, 2, 3), _spd(g, 2), randn(g, 2)
    got = _method(answer, lambda x: x @ M.T.to(x), x, 0.6, A, R, y, "dps")
    right = torch.stack([M.T @ A.T @ torch.linalg.solve(R, y - A @ M @ row) for row in x])
    _pull(got, right, '"dps", with a denoiser M x: the gradient of -(y - A M x)^T R^-1 (y - A M x) / 2')


def _dps_vague(answer: Answer, g: Generator) -> None:
    denoise, x, A, R, y = _curved(g, 3), randn(g, 4, 3), randn(g, 2, 3), _spd(g, 2), randn(g, 2)
    one, four = (_method(answer, denoise, x, 0.6, A, k * R, y, "dps") for k in (1.0, 4.0))
    if not close(plain(four), plain(one / 4), rtol=1e-5, atol=1e-7):
        ratio = float((four.norm() / one.norm()).nan_to_num())
        raise Wrong(
            f'"dps": with four times the noise variance, 4 R, the measurement pulls {ratio:.3g} times as hard',
            expected="0.25 times",
        )


def _dps_difference(answer: Answer, g: Generator) -> None:
    denoise, x, A, R, y = _curved(g, 3), randn(g, 4, 3), randn(g, 2, 3), _spd(g, 2), randn(g, 2)
    inverse = torch.linalg.inv(R)

    def log_p(x: Tensor) -> Tensor:
        off = y - denoise(x) @ A.T
        return -((off @ inverse) * off).sum(1) / 2

    step = 1e-5
    right = torch.stack([(log_p(x + step * e) - log_p(x - step * e)) / (2 * step) for e in torch.eye(3).double()], 1)
    got = _method(answer, denoise, x, 0.6, A, R, y, "dps")
    need(got, right, '"dps" must agree with differences of log N(y; A denoise(x), R)', rtol=1e-4, atol=1e-5)


def _pigdm_exact(answer: Answer, g: Generator) -> None:
    """Standard normal data: x0 given xt is N(a x, (1 - a^2) I), so the Gaussian of PiGDM is the truth."""
    a, x, A, R, y = _uniform(g, 0.3, 0.9), randn(g, 5, 3), randn(g, 2, 3), _spd(g, 2), randn(g, 2)
    leaf = x.clone().requires_grad_()
    with torch.enable_grad():
        of_y = torch.distributions.MultivariateNormal(a * leaf @ A.T, R + (1 - a**2) * A @ A.T)
        right = torch.autograd.grad(of_y.log_prob(y).sum(), leaf)[0]
    got = _method(answer, lambda x: a * x, x, a, A, R, y, "pigdm")
    need(got, right, f'"pigdm" is exact where the data are standard normal, denoise(x) = a x, a = {a:.3g}')


def _grad_apart(answer: Answer, g: Generator) -> None:
    denoise, x, A, R, y = _curved(g, 3), randn(g, 5, 3), randn(g, 2, 3), _spd(g, 2), randn(g, 2)
    for method in ("dps", "pigdm"):
        with torch.no_grad():
            whole = _method(answer, denoise, x, 0.6, A, R, y, method)
            alone = _method(answer, denoise, x[:1], 0.6, A, R, y, method)
        need(alone, whole[:1], f'"{method}": one point must get the same gradient alone and among five')
        if whole.requires_grad:
            raise Wrong(f'"{method}": the gradient still carries autograd\'s graph')


def _compared(
    answer: Answer, exact: Callable, denoise: Callable, x: Tensor, a: float, A: Tensor, R: Tensor, y: Tensor
) -> dict:
    got = answer.call("dps_vs_exact", denoise, exact, x.clone(), a, A.clone(), R.clone(), y.clone())
    if not isinstance(got, dict) or set(got) != {"dps", "pigdm"}:
        keys = f"a dict with {', '.join(map(str, got))}" if isinstance(got, dict) else type(got).__name__
        raise Wrong(f'dps_vs_exact returns a dict with the keys "dps" and "pigdm"; yours is {keys}')
    for key, pair in got.items():
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise Wrong(
                f"dps_vs_exact: {key!r} is to be a pair (cosine, length), yours is of type {type(pair).__name__}"
            )
    return got


def _compare_normal(answer: Answer, g: Generator) -> None:
    """Standard normal data, orthonormal rows of A, R = r I: DPS points the right way, too long by (r + sigma^2) / r."""
    a, r, x = _uniform(g, 0.3, 0.9), _uniform(g, 0.05, 0.5), randn(g, 9, 3)
    A, y = torch.linalg.qr(randn(g, 3, 3))[0][:2], randn(g, 2)

    def exact(x: Tensor) -> Tensor:
        return a * (y - a * x @ A.T) @ A / (r + 1 - a**2)

    got = _compared(answer, exact, lambda x: a * x, x, a, A, r * torch.eye(2).double(), y)
    what = f"dps_vs_exact: standard normal data, a = {a:.3g}, R = {r:.3g} I"
    for key, i, right in (("dps", 0, 1.0), ("pigdm", 0, 1.0), ("pigdm", 1, 1.0), ("dps", 1, 1 + (1 - a**2) / r)):
        _number(got[key][i], right, f"{what}: {('cosine', 'length')[i]} of {key!r}", rtol=1e-5)


def _compare_median(answer: Answer, g: Generator) -> None:
    """Points whose truth is 1, 1, 1, 1/2, 1/100 of the estimate in length, and opposite to it for two of them."""
    A, y, x = torch.eye(2).double(), randn(g, 2), randn(g, 5, 2)
    length, sign = _row(1, 1, 1, 2, 100)[:, None], _row(1, 1, 1, -1, -1)[:, None]
    got = _compared(answer, lambda x: (y - x) / length * sign, lambda x: x, x, 1.0, A, torch.eye(2).double(), y)
    what = "dps_vs_exact: five points, estimates 1, 1, 1, 2 and 100 times as long as the truth, the last two opposite"
    _number(got["dps"][1], 1.0, f"{what}; median length", rtol=1e-5)
    _number(got["dps"][0], 1.0, f"{what}; median cosine", rtol=1e-5)
    got = _compared(answer, lambda x: (y - x) / 3, lambda x: x, x, 1.0, A, torch.eye(2).double(), y)
    _number(got["dps"][1], 3.0, "dps_vs_exact: estimates three times as long as the truth", rtol=1e-5)


def _grad_by(
    spread: Callable[[float], float] = lambda a: 1 - a**2,
    precision: Callable[..., Tensor] = lambda R, A, r2: torch.linalg.inv(R + r2 * A @ A.T),
    jacobian: bool = True,
    value: Callable[..., Tensor] = lambda off, P: -((off @ P) * off).sum() / 2,
    after: Callable[[Tensor], Tensor] = lambda grad: grad,
) -> Callable:
    def measurement_grad_(denoise, x, a, A, R, y, method):
        r2 = spread(a) if method == "pigdm" else 0.0
        P = precision(R, A, r2)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            x0 = denoise(x) if jacobian else denoise(x).detach().requires_grad_()
            out = value(y - x0 @ A.T, P)
        return after(torch.autograd.grad(out, x if jacobian else x0)[0])

    return measurement_grad_


def _against(
    grad: Callable = measurement_grad,
    cosine: Callable[[Tensor, Tensor], Tensor] = lambda one, two: torch.cosine_similarity(one, two, dim=1).median(),
    length: Callable[[Tensor, Tensor], Tensor] = lambda one, two: (one.norm(dim=1) / two.norm(dim=1)).median(),
) -> tuple[Callable, Callable]:
    def dps_vs_exact_(denoise, exact, x, a, A, R, y):
        right = exact(x)
        found = {method: grad(denoise, x, a, A, R, y, method) for method in ("dps", "pigdm")}
        return {method: (float(cosine(got, right)), float(length(got, right))) for method, got in found.items()}

    return grad, dps_vs_exact_


def _grad_vjp(denoise: Callable, x: Tensor, a: float, A: Tensor, R: Tensor, y: Tensor, method: str) -> Tensor:
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        x0 = denoise(leaf)
        cov = R if method == "dps" else R + (1 - a * a) * (A @ A.T)
        pull = torch.linalg.solve(cov, (y - x0.detach() @ A.T).T).T @ A
        return torch.autograd.grad(x0, leaf, pull)[0]


def _grad_rows(denoise: Callable, x: Tensor, a: float, A: Tensor, R: Tensor, y: Tensor, method: str) -> Tensor:
    cov = {"dps": R, "pigdm": R + (1 - a**2) / (a**2 + 1 - a**2) * A @ A.mT}[method]
    rows = []
    for row in x:
        with torch.enable_grad():
            leaf = row[None].clone().requires_grad_()
            off = (y - (denoise(leaf) @ A.T)[0])[:, None]
            (-0.5 * off.T @ torch.linalg.inv(cov) @ off).sum().backward()
        rows.append(leaf.grad[0])
    return torch.stack(rows)


DPS = Exercise(
    id="10.7",
    names=("measurement_grad", "dps_vs_exact"),
    references=(measurement_grad, dps_vs_exact),
    inputs=_dps_inputs,
    batch=(),
    facts=(
        Fact(
            '"dps" with a linear denoiser', _dps_linear, "log N(y; A denoise(x), R), differentiated with respect to x"
        ),
        Fact('"dps" trusts a vague measurement less', _dps_vague, "the inverse of R weighs the residual"),
        Fact('"dps" agrees with finite differences', _dps_difference, "autograd goes through the denoiser"),
        Fact(
            '"pigdm" is exact for standard normal data',
            _pigdm_exact,
            "y = A x0 + n, and x0 has the covariance r^2 I: what is the covariance of y?",
        ),
        Fact("each point has its own gradient, without a graph", _grad_apart, "differentiate the sum over the points"),
        Fact(
            "dps_vs_exact, standard normal data",
            _compare_normal,
            "cosine and length of the estimate against exact(x), for both methods",
        ),
        Fact(
            "dps_vs_exact takes medians over points", _compare_median, "one cosine and one ratio per point, then median"
        ),
    ),
    mistakes=(
        Mistake(
            "no Jacobian",
            "measurement_grad: you differentiate with respect to the estimate of x0, not with respect to x: the "
            "denoiser's Jacobian is missing.",
            _against(_grad_by(jacobian=False)),
        ),
        Mistake(
            "R forgotten",
            "measurement_grad: R does not enter: a precise measurement must pull harder than a vague one.",
            _against(_grad_by(precision=lambda R, A, r2: torch.linalg.inv(torch.eye(len(R)).to(R) + r2 * A @ A.T))),
        ),
        Mistake(
            "R for its inverse",
            "measurement_grad: the residual is multiplied by the covariance; it is divided by it (its inverse).",
            _against(_grad_by(precision=lambda R, A, r2: R + r2 * A @ A.T)),
        ),
        Mistake(
            "length, not squared",
            "measurement_grad: you differentiate the length of the residual, as programs for DPS do to normalise the "
            "step. log N has half its square: near the measurement your pull does not fade.",
            _against(_grad_by(value=lambda off, P: -((off @ P) * off).sum(1).sqrt().sum())),
        ),
        Mistake(
            "sign",
            "measurement_grad: the sign is turned: it leads away from what was measured.",
            _against(_grad_by(after=torch.neg)),
        ),
        Mistake(
            "no half",
            "measurement_grad: the 1/2 of the Gaussian's exponent is missing.",
            _against(_grad_by(after=lambda grad: 2 * grad)),
        ),
        Mistake(
            "mean over points",
            "measurement_grad: the mean over the points is differentiated: each gradient is divided by their number.",
            _against(_grad_by(value=lambda off, P: -((off @ P) * off).sum(1).mean() / 2)),
        ),
        Mistake(
            "variance inverted",
            "measurement_grad: the variance of PiGDM is inverted. For standard normal data x0 given x_t has variance "
            "sigma^2 / (a^2 + sigma^2): nothing at no noise, all at full noise.",
            _against(_grad_by(spread=lambda a: a**2)),
        ),
        Mistake(
            "sigma / alpha",
            "measurement_grad: r^2 = sigma^2 / a^2 in place of sigma^2 / (a^2 + sigma^2): without the prior, it grows "
            "beyond the variance of the data.",
            _against(_grad_by(spread=lambda a: (1 - a**2) / a**2)),
        ),
        Mistake(
            "r, not squared",
            "measurement_grad: r in place of r^2.",
            _against(_grad_by(spread=lambda a: math.sqrt(1 - a**2))),
        ),
        Mistake(
            "A A^T forgotten",
            "measurement_grad: r^2 is added to R as it is. The uncertainty of x0 reaches y through A: r^2 A A^T.",
            _against(_grad_by(precision=lambda R, A, r2: torch.linalg.inv(R + r2 * torch.eye(len(R)).to(R)))),
        ),
        Mistake(
            "dps for both",
            'measurement_grad: "pigdm" gives what "dps" gives: R + r^2 A A^T is the covariance of y there.',
            _against(_grad_by(spread=lambda a: 0.0)),
        ),
        Mistake(
            "mean for median",
            "dps_vs_exact: means over the points. One point where the truth is near 0 spoils a mean; take medians.",
            _against(
                cosine=lambda one, two: torch.cosine_similarity(one, two, dim=1).mean(),
                length=lambda one, two: (one.norm(dim=1) / two.norm(dim=1)).mean(),
            ),
        ),
        Mistake(
            "ratio inverted",
            "dps_vs_exact: the ratio of lengths is inverted: asked for is the estimate over the truth.",
            _against(length=lambda one, two: (two.norm(dim=1) / one.norm(dim=1)).median()),
        ),
        Mistake(
            "all points as one vector",
            "dps_vs_exact: all points together are taken as one long vector. Compare point by point, then take the "
            "median.",
            _against(
                cosine=lambda one, two: torch.cosine_similarity(one.flatten(), two.flatten(), dim=0),
                length=lambda one, two: one.norm() / two.norm(),
            ),
        ),
    ),
    alternatives=(_against(_grad_vjp), (_grad_rows, dps_vs_exact)),
    hints=(
        "Both are the gradient of a Gaussian log-density of y around A denoise(x), by autograd through the denoiser. "
        "Its covariance: R for dps; what does x0's own uncertainty r^2 I add for pigdm?",
        "C = R, or R + sigma^2 / (a^2 + sigma^2) A A^T; torch.autograd.grad of the sum of -(y - A x0)^T C^-1 (y - A "
        "x0) / 2 with respect to x. Then torch.cosine_similarity(dim=1) and norm(dim=1) ratios, .median().",
    ),
    points=3,
)

# --- 10.8 classify ----------------------------------------------------------------------------------------------------


def _net(g: Generator, entries: int, labels: int) -> Callable:
    mix, of_label = randn(g, entries, entries), randn(g, labels, entries)

    def net(xt: Tensor, t: Tensor, y: Tensor) -> Tensor:
        flat = xt.flatten(1).double()
        out = torch.tanh(flat @ mix + of_label[y] + t[:, None] / 20)
        return out.view_as(xt).to(xt.dtype)

    return net


def _classify_inputs(g: Generator) -> dict:
    t = times(g, 5)
    return {
        "classify": dict(
            net=_net(g, 6, 3),
            x0=randn(g, 4, 2, 3),
            t=t,
            eps=randn(g, 5, 2, 3),
            weight=0.2 + torch.rand(5, generator=g, dtype=torch.float64),
            log_prior=randn(g, 3).log_softmax(0),
            abar=random_abar(g),
        )
    }


def _classify_sums(answer: Answer, g: Generator) -> None:
    got = answer(*_classify_inputs(g)["classify"].values())
    need(got.exp().sum(1), torch.ones(4).double(), "the probabilities of all labels must add up to 1 for each example")


def _classify_prior(answer: Answer, g: Generator) -> None:
    args = _classify_inputs(g)["classify"]
    blind = args | dict(net=lambda xt, t, y: 0.3 * xt)
    got = answer(*blind.values())
    need(
        got,
        args["log_prior"].expand(4, -1),
        "a network that does not look at the label: what is left is the prior",
    )


def _classify_by_hand(answer: Answer, g: Generator) -> None:
    """Predictions 0 and 1 whatever xt is; noises .25 and -1 in both entries, weights 2 and 1, uniform prior."""
    eps, weight, abar = _row(0.25, -1.0)[:, None].expand(2, 2), _row(2, 1), random_abar(g)

    def net(xt: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return y.to(xt)[:, None].expand_as(xt)

    prior = _row(0.5, 0.5).log()
    got = answer(net, torch.zeros(3, 2).double(), torch.tensor([3, 9]), eps.clone(), weight, prior, abar)
    # errors: label 0: 2 (.0625 + .0625) + 1 (1 + 1) = 2.25; label 1: 2 (.5625 + .5625) + 1 (4 + 4) = 10.25; half the
    # difference is 4
    right = _row(-math.log1p(math.exp(-4)), -4 - math.log1p(math.exp(-4))).expand(3, -1)
    what = (
        "two entries, labels predict the noise 0 and 1, eps .25 in both and -1 in both, weight 2 and 1: log p(y | x0)"
    )
    need(got, right, what)


def _classify_common(answer: Answer, g: Generator) -> None:
    args, asked = _classify_inputs(g)["classify"], []

    def spy(xt: Tensor, t: Tensor, y: Tensor) -> Tensor:
        asked.append((xt.detach().clone(), t.detach().clone(), y.detach().clone()))
        return args["net"](xt, t, y)

    answer(*(args | dict(net=spy)).values())
    xt, t, y = (torch.cat([call[i] for call in asked]) for i in range(3))
    a = args["abar"][args["t"]].view(-1, 1, 1, 1)
    due = (a**0.5 * args["x0"] + (1 - a) ** 0.5 * args["eps"][:, None]).flatten(0, 1).flatten(1)
    for label in range(3):
        seen = xt[y == label].flatten(1)
        if not len(seen):
            raise Wrong(f"the network is never asked about label {label}")
        apart = torch.cdist(due, seen)
        if apart.min(1).values.max() > 1e-5 and apart.min(0).values.max() <= 1e-5:
            raise Wrong(f"label {label} is not asked about every draw of t and eps")
        if apart.min(0).values.max() > 1e-5:
            raise Wrong(
                f"label {label} is asked about other noisy pictures than those of x0, t and eps: all labels must be "
                "compared on the same noise"
            )
    if not set(t.long().tolist()) <= set(args["t"].tolist()):
        raise Wrong("the network is asked at times that are not in t")


def _classify_exact(answer: Answer, g: Generator) -> None:
    """The exact world on a line: over all noise levels, weighted by d log SNR, the errors give the exact posterior."""
    world, abar, weight, t, eps = _quadrature()
    x0 = _row(-0.6, -0.1, 0.25, 0.9)[:, None] + 0.05 * randn(g, 4, 1)
    worlds = [world.given(label) for label in (0, 1)]

    def net(xt: Tensor, t: Tensor, y: Tensor) -> Tensor:
        both = torch.stack([exact_eps(w, xt, t, abar) for w in worlds])
        return both[y, torch.arange(len(y))].to(xt.dtype)

    got = answer(net, x0, t, eps, weight, _row(0.5, 0.5).log(), abar)
    zero = torch.zeros(4, dtype=torch.float64)
    right = torch.stack([world.class_log_prob(x0, zero, discrete(abar), label) for label in (0, 1)], dim=1)
    need(
        got.exp(),
        right.exp(),
        "the exact network, all noise levels weighted by d log SNR: p(y | x0) must be that of Bayes",
        rtol=0,
        atol=0.005,
    )


@cache
def _quadrature() -> tuple[GaussianMixture, Tensor, Tensor, Tensor, Tensor]:
    """World, table, and draws with weights: 16 noise levels times 3 Gauss-Hermite nodes, exact for Gaussian classes."""
    world = line2(0.5, 0.4)
    log_snr = torch.linspace(7, -7, 16, dtype=torch.float64)
    abar = torch.cat([_row(1.0), log_snr.sigmoid()])
    nodes, sizes = (torch.from_numpy(v) for v in hermite_e.hermegauss(3))
    sizes = sizes / sizes.sum()
    t = torch.arange(1, 17).repeat_interleave(3)
    weight = (log_snr[0] - log_snr[1]) * sizes.repeat(16)
    return world, abar, weight, t, nodes.repeat(16)[:, None]


def _classify_by(
    error: Callable[[Tensor], Tensor] = lambda off: off.flatten(1).square().sum(1),
    half: float = 0.5,
    weights: bool = True,
    prior: bool = True,
    noise: Callable[[Tensor, int, int], Tensor] = lambda eps, m, label: eps[m],
    added: Callable[[Tensor, int, int], Tensor] | None = None,
    against: Callable[..., Tensor] = lambda out, eps, x0: out - eps,
    roots: bool = True,
    shift: int = 0,
    after: Callable[[Tensor], Tensor] = lambda log_joint: log_joint.log_softmax(1),
) -> tuple[Callable]:
    def classify_(net, x0, t, eps, weight, log_prior, abar):
        columns = []
        for label in range(len(log_prior)):
            total = torch.zeros(len(x0)).to(x0)
            for m in range(len(t)):
                a = abar[t[m] - shift].to(x0)
                e = noise(eps, m, label)
                n = e if added is None else added(eps, m, label)
                xt = a.sqrt() * x0 + (1 - a).sqrt() * n if roots else a * x0 + (1 - a) * n
                out = net(xt, t[m].expand(len(x0)), torch.full((len(x0),), label, device=x0.device))
                total = total - half * (weight[m] if weights else 1.0) * error(against(out, e, x0))
            columns.append(total + (log_prior[label] if prior else 0.0))
        return after(torch.stack(columns, dim=1))

    return (classify_,)


def _classify_all(
    net: Callable, x0: Tensor, t: Tensor, eps: Tensor, weight: Tensor, log_prior: Tensor, abar: Tensor
) -> Tensor:
    """One call for all."""
    b, m, k = len(x0), len(t), len(log_prior)
    a = abar[t].to(x0).reshape(m, *[1] * x0.ndim)
    xt = (a.sqrt() * x0 + (1 - a).sqrt() * eps[:, None]).expand(k, *[-1] * (x0.ndim + 1))
    times_ = t.view(1, m, 1).expand(k, m, b)
    y = torch.arange(k, device=x0.device).view(k, 1, 1).expand(k, m, b)
    out = net(xt.flatten(0, 2), times_.flatten(), y.flatten()).view_as(xt)
    error = (out - eps[None, :, None]).flatten(3).pow(2).sum(3)
    log_joint = log_prior[:, None] - torch.einsum("m,kmb->kb", weight, error) / 2
    return (log_joint - log_joint.logsumexp(0)).T.to(x0)


def _classify_steps(
    net: Callable, x0: Tensor, t: Tensor, eps: Tensor, weight: Tensor, log_prior: Tensor, abar: Tensor
) -> Tensor:
    """Bayes after each draw, in the order of the draws."""
    log_p = log_prior.to(x0).repeat(len(x0), 1)
    for time, e, w in zip(t.tolist(), eps, weight.tolist(), strict=True):
        a = float(abar[time])
        xt = math.sqrt(a) * x0 + math.sqrt(1 - a) * e
        when = torch.full((len(x0),), time, device=x0.device)
        off = [
            torch.linalg.vector_norm((net(xt, when, torch.full_like(when, k)) - e).flatten(1), dim=1)
            for k in range(len(log_prior))
        ]
        log_p = (log_p - w * torch.stack(off, dim=1) ** 2 / 2).log_softmax(1)
    return log_p


CLASSIFY = Exercise(
    id="10.8",
    names=("classify",),
    references=(classify,),
    inputs=_classify_inputs,
    batch=("x0",),
    facts=(
        Fact("probabilities add up to 1 over the labels", _classify_sums, "log_softmax over which axis?"),
        Fact(
            "two draws and two labels, by hand",
            _classify_by_hand,
            "weight times squared error, summed over draws, halved",
        ),
        Fact(
            "a network blind to labels leaves the prior", _classify_prior, "p(y | x0) is proportional to p(y) p(x0 | y)"
        ),
        Fact("all labels are asked about the same noise", _classify_common, "xt from x0, abar[t[m]] and eps[m]"),
        Fact(
            "with the exact network, it is the exact posterior",
            _classify_exact,
            "-log p(x0 | y) is half the integral of the squared error over log SNR, up to a constant",
        ),
    ),
    mistakes=(
        Mistake(
            "fresh noise",
            "Noise of your own in place of eps, new for each label: the difference between two labels then has the "
            "variance of both, and draws by the hundred are needed to see anything. Common random numbers cancel it.",
            _classify_by(noise=lambda eps, m, label: torch.randn_like(eps[m])),
        ),
        Mistake(
            "noise of another label",
            "The noise that is added is not the one that the prediction is compared with.",
            _classify_by(added=lambda eps, m, label: eps[m - 1]),
        ),
        Mistake(
            "not normalised",
            "You return prior times likelihood, not normalised: subtract the logsumexp over the labels.",
            _classify_by(after=lambda log_joint: log_joint),
        ),
        Mistake(
            "probabilities",
            "You return probabilities; asked for are their logarithms.",
            _classify_by(after=lambda log_joint: log_joint.softmax(1)),
        ),
        Mistake(
            "softmax over the batch",
            "Normalised over the examples instead of the labels: an example's answer depends on the others.",
            _classify_by(after=lambda log_joint: log_joint.log_softmax(0)),
        ),
        Mistake(
            "sign",
            "The label with the largest error wins: the log-likelihood is minus the error.",
            _classify_by(half=-0.5),
        ),
        Mistake(
            "no half",
            "The half is missing: all evidence counts twice, and the result is too sure.",
            _classify_by(half=1.0),
        ),
        Mistake(
            "mean over entries",
            "The squared error is averaged over the entries of an example. The log-density is a sum over them; the "
            "mean makes pictures of 784 pixels 784 times too unsure.",
            _classify_by(lambda off: off.flatten(1).square().mean(1)),
        ),
        Mistake(
            "not squared",
            "The length of the error in place of its square.",
            _classify_by(lambda off: off.flatten(1).norm(dim=1)),
        ),
        Mistake("no weight", "`weight` does not enter: all draws count the same.", _classify_by(weights=False)),
        Mistake(
            "no prior",
            "The prior does not enter: this is right for labels that are equally likely.",
            _classify_by(prior=False),
        ),
        Mistake(
            "against x0",
            "The prediction is compared with x0; the network predicts the noise.",
            _classify_by(against=lambda out, eps, x0: out - x0),
        ),
        Mistake(
            "roots missing",
            "abar and 1 - abar without their roots where x0 is noised.",
            _classify_by(roots=False),
        ),
        Mistake(
            "one level off",
            "abar[t - 1] for abar[t]: the table has abar[0] = 1, so its index is t.",
            _classify_by(shift=1),
        ),
    ),
    alternatives=((_classify_all,), (_classify_steps,)),
    hints=(
        "For each draw m: noise all examples to t[m] with eps[m], ask the network about every label, and take the "
        "squared error of its prediction of eps[m]. Bayes: add log_prior, normalise over the labels.",
        "log_joint[:, k] = log_prior[k] - sum over m of weight[m] / 2 |net(xt, t[m], k) - eps[m]|^2; log_softmax(1).",
    ),
    points=2,
)

# --- 10.9 museum ------------------------------------------------------------------------------------------------------

NAMED = museum()


def _named(answer: Answer) -> dict:
    got = answer()
    if not isinstance(got, dict):
        raise Wrong(f"museum returns a dict, {{exhibit: word}}; yours is {_a(got)}")
    return got


def _a(value: object) -> str:
    return "None: is there a return statement?" if value is None else f"of type {type(value).__name__}"


def _museum_words(answer: Answer, g: Generator) -> None:
    got = _named(answer)
    missing = sorted(set(EXHIBITS) - set(got))
    if missing:
        raise Wrong(f"museum: no word for {', '.join(missing)}")
    more = sorted(str(key) for key in set(got) - set(EXHIBITS))
    if more:
        raise Wrong(f"museum: there is no exhibit {', '.join(more)}")
    for key in EXHIBITS:
        if got[key] not in MUSEUM_WORDS:
            raise Wrong(
                f"museum: {key} is named {got[key]!r}, which is not among MUSEUM_WORDS; copy a word as it stands"
            )


def _museum_right(answer: Answer, g: Generator) -> None:
    got = _named(answer)
    right = sum(got.get(key) == word for key, word in NAMED.items())
    if right < len(NAMED):
        raise Wrong(
            "museum: not every exhibit is named rightly. Which ones is for you to find out: each property can be tried "
            "on the code, in a line or two, with random tensors",
            expected=f"{right} of {len(NAMED)} are right",
        )


def _confused(**words: str) -> tuple[Callable]:
    return (lambda: NAMED | words,)


MUSEUM = Exercise(
    id="10.9",
    names=("museum",),
    references=(museum,),
    inputs=lambda g: {"museum": {}},
    kind="value",
    universal=False,
    facts=(
        Fact("a word of the list for every exhibit", _museum_words, "for word, meaning in MUSEUM_WORDS.items(): print"),
        Fact(
            "all exhibits are named rightly",
            _museum_right,
            "call EXHIBITS[...].function with equal predictions, at scale 1, with a batch of one: what fails?",
        ),
    ),
    mistakes=(
        Mistake(
            "zero output taken for a bug",
            "All right but for a layer that outputs 0. With weights at 0 that is what it is for: the adapter starts by "
            "changing nothing, and its weights get a gradient from the first step on.",
            _confused(B="can learn"),
        ),
        Mistake(
            "the sum taken for a bug",
            "All right but for the sum over the batch. Example i appears in one term of the sum only, so the "
            "derivative with respect to example i is its own; a sum mixes nothing.",
            _confused(F="examples apart"),
        ),
        Mistake(
            "both innocents accused",
            "All right but for the two exhibits that are not broken. A report is a report: try the code before you "
            "believe it.",
            _confused(B="can learn", F="examples apart"),
        ),
        Mistake(
            "mean taken for a wrong derivative",
            "All right but for the mean over the batch. For one example its derivative is the one that was promised; "
            "with 64 it is a 64th. What breaks is that examples are kept apart.",
            _confused(J="derivative"),
        ),
        Mistake(
            "lost sign taken for scale one",
            "All right but for the weights s and s - 1. At scale 1 they give eps_c, as they should; try two equal "
            "predictions.",
            _confused(A="scale one"),
        ),
        Mistake(
            "1 + w taken for agreement",
            "All right but for eps_c + s (eps_c - eps_u). Its weights add up to 1, so equal predictions stay; but what "
            "does it give at scale 1?",
            _confused(E="agreement"),
        ),
        Mistake(
            "early shift taken for agreement",
            "All right but for the difference that is taken before eps_u is rescaled. Equal predictions stay equal "
            "there; try scale 1.",
            _confused(K="agreement"),
        ),
        Mistake(
            "early shift taken for nothing",
            "All right but for the difference taken before eps_u is rescaled: at scale 1 it does not give eps_c.",
            _confused(K="nothing"),
        ),
        Mistake(
            "equal labels taken for the null label",
            "All right but for the double batch. In it the label stands twice, so both halves agree, and no scale has "
            'an effect. "null label" is about training.',
            _confused(C="null label"),
        ),
        Mistake(
            "lost root taken for the last step",
            "All right but for (1 - abar) without its root. It is wrong at every step: a noised x0 does not come back.",
            _confused(D="last step"),
        ),
        Mistake(
            "two zero layers taken for nothing",
            "All right but for two zero layers in a row. One zero layer wakes up, since its input is not zero. Of two, "
            "each blocks the gradient of the other's weights: only the last bias ever moves.",
            _confused(M="nothing"),
        ),
    ),
    alternatives=(
        (lambda: dict(sorted(NAMED.items(), reverse=True)),),
        (lambda: dict(zip(EXHIBITS, (NAMED[key] for key in EXHIBITS), strict=True)),),
    ),
    hints=(
        "Three tests sort most of the guidance rules: equal predictions, scale 1, and whether scale matters at all. "
        "Two exhibits are not broken.",
        ", ".join(f"{key}: {word}" for key, word in NAMED.items()) + ".",
    ),
    probe=lambda answer, g: answer(),
    points=3,
)

# --- 10.10 guide ------------------------------------------------------------------------------------------------------

ASKED = 5.0  # the scale that rules are tried at
SURE = 1.7  # a rule must be as sure of the class as plain guidance at this scale
KEPT = 0.8  # and keep this share of the mode that it neglects most
STEPS = 30


def _guide_inputs(g: Generator) -> dict:
    sigma = _uniform(g, 0.2, 0.98)
    step = (0, 10, 19)[integer(g, 0, 2)]
    state = dict(s=_uniform(g, 2, 6), sigma_next=0.8 * sigma, step=step, steps=20)
    return {"guide": dict(eps_c=randn(g, 6, 3), eps_u=randn(g, 6, 3), x=randn(g, 6, 3), sigma=sigma, state=state)}


def _levels() -> Tensor:
    return _row(0.99, 0.9, 0.7, 0.5, 0.3, 0.1, 0.03)


def _guide_one(answer: Answer, g: Generator) -> None:
    for i, sigma in enumerate(_levels().tolist()):
        eps_c, eps_u, x = randn(g, 5, 3), randn(g, 5, 3), randn(g, 5, 3)
        state = dict(s=1.0, sigma_next=0.8 * sigma, step=i, steps=7)
        got = answer(eps_c.clone(), eps_u, x, sigma, state)
        need(got, eps_c, f"at s = 1 there is nothing to guide: eps_c is due, here at sigma = {sigma:g}")


def _guide_origin(answer: Answer, g: Generator) -> None:
    for i, sigma in enumerate(_levels().tolist()):
        eps_c, eps_u, x = randn(g, 5, 3), randn(g, 5, 3), randn(g, 5, 3)
        state = dict(s=ASKED, sigma_next=0.8 * sigma, step=i, steps=7)
        one = answer(eps_c.clone(), eps_u.clone(), x.clone(), sigma, dict(state))
        two = answer(eps_c.clone(), eps_u.clone(), x + 4.0, sigma, dict(state))
        need(two, one, f"sigma = {sigma:g}: the same world about another origin, x + 4, must give the same eps")


def _hidden(g: Generator) -> tuple[GaussianMixture, Tensor]:
    world = hidden_world(g)
    return world, start(world, 512, g)


def _sampled(answer: Answer, world: GaussianMixture, x: Tensor, steps: int) -> Tensor:
    def rule(*args: object) -> Tensor:
        got = answer(*args)
        odd = oddity(got, args[0])
        if odd:
            raise Wrong(f"on the way from noise to data: {odd}")
        if got.abs().max() > 1e4:
            raise Wrong(f"on the way from noise to data the prediction reaches {float(got.abs().max()):.3g}")
        return got

    return travel(rule, world, 0, ASKED, x, steps)


def _constant(scale: float) -> Callable:
    return lambda eps_c, eps_u, x, sigma, state: eps_u + scale * (eps_c - eps_u)


def _guide_hidden(answer: Answer, g: Generator) -> None:
    world, x = _hidden(g)
    ends = _sampled(answer, world, x, STEPS)
    kept = coverage(world, 0, ends)
    where = f"a hidden world in {x.shape[1]} dimensions, s = {ASKED:g}, {STEPS} steps"
    if kept < KEPT:
        raise Wrong(
            f"{where}: the island that your rule neglects most gets {kept:.0%} of its share",
            expected=f"at least {KEPT:.0%}; plain guidance at {ASKED:g} keeps less than 15%",
        )


def _guide_sure(answer: Answer, g: Generator) -> None:
    world, x = _hidden(g)
    sure, plain_sure = (
        -log_densities(world, 0, ends)[1]
        for ends in (_sampled(answer, world, x, STEPS), travel(_constant(SURE), world, 0, ASKED, x, STEPS))
    )
    if not sure <= plain_sure:
        raise Wrong(
            f"a hidden world in {x.shape[1]} dimensions, s = {ASKED:g}: your samples are less sure of their class than "
            f"those of plain guidance at {SURE:g}; the mean of -log p(y | x) is {sure:.5f}, theirs {plain_sure:.5f}"
        )


def _guide_steps(answer: Answer, g: Generator) -> None:
    world, x = _hidden(g)
    seen = {}
    for steps in (15, 60):
        ends = _sampled(answer, world, x[:256], steps)
        seen[steps] = coverage(world, 0, ends), log_densities(world, 0, ends)[0]
    (kept, dense), (kept_too, dense_too) = seen.values()
    if abs(dense - dense_too) > 0.4 or abs(kept - kept_too) > 0.2:
        raise Wrong(
            f"15 steps and 60 end at different distributions: mean log p(x | y) {dense:.3g} and {dense_too:.3g}, the "
            f"neglected island keeps {kept:.0%} and {kept_too:.0%}"
        )


def _rule(scale: Callable[[float, dict], float]) -> tuple[Callable]:
    """A rule by its scale, from the noise sigma / alpha and the state."""

    def guide_(eps_c, eps_u, x, sigma, state):
        return eps_u + scale(sigma / math.sqrt(1 - sigma**2), state) * (eps_c - eps_u)

    return (guide_,)


def _guide_ramp(eps_c: Tensor, eps_u: Tensor, x: Tensor, sigma: float, state: dict) -> Tensor:
    """Falls smoothly from s to 1 as the noise grows."""
    more = (state["s"] - 1) / (1 + 4 * sigma**2 / (1 - sigma**2))
    return eps_c + more * (eps_c - eps_u)


def _guide_window(eps_c: Tensor, eps_u: Tensor, x: Tensor, sigma: float, state: dict) -> Tensor:
    """An interval with two ends, by sigma itself."""
    return torch.lerp(eps_u, eps_c, state["s"]) if 0.05 < sigma < 0.68 else eps_c.clone()


def _guide_projected(eps_c: Tensor, eps_u: Tensor, x: Tensor, sigma: float, state: dict) -> Tensor:
    """APG with a cap, at low noise only."""
    alpha = math.sqrt(1 - sigma**2)
    x0, d = (x - sigma * eps_c) / alpha, eps_c - eps_u
    if sigma > 0.7:
        return eps_c
    d = d - (d * x0).sum(1, keepdim=True) / x0.square().sum(1, keepdim=True) * x0
    return eps_c + (state["s"] - 1) * d


def _guide_mean(eps_c: Tensor, eps_u: Tensor, x: Tensor, sigma: float, state: dict) -> Tensor:
    s = state["s"] if sigma < 0.7 else 1.0
    return eps_u + s * (eps_c - eps_u).mean(0, keepdim=True) + (eps_c - eps_u) - (eps_c - eps_u).mean(0, keepdim=True)


def _guide_see(answer: Answer, g: Generator) -> object:
    """The weight of eps_c at each noise level, for short and long steps, early and late; and the ends."""
    seen = []
    for s in (1.0, 3.0, 5.0):
        for sigma in (0.95, 0.72, 0.69, 0.3, 0.04):
            for ahead, step, steps in ((0.9, 3, 10), (0.5, 9, 10), (0.0, 59, 60), (0.98, 40, 60), (0.7, 0, 30)):
                state = dict(s=s, sigma_next=ahead * sigma, step=step, steps=steps)
                eps_c, eps_u, x = (randn(g, 3, 2) for _ in range(3))
                seen.append(plain(answer(eps_c, eps_u, x, sigma, state)))
    return seen


GUIDE = Exercise(
    id="10.10",
    names=("guide",),
    references=(guide,),
    inputs=_guide_inputs,
    free=True,
    batch=("eps_c", "eps_u", "x"),
    facts=(
        Fact("s = 1 gives eps_c", _guide_one, "at every noise level"),
        Fact("does not depend on where the origin is", _guide_origin, "use predictions and differences, not x or x0"),
        Fact(
            "keeps all modes of a hidden world",
            _guide_hidden,
            "at which noise are islands chosen, and which scale is right there?",
        ),
        Fact("guides: it is sure of the class", _guide_sure, "at which noise does a large scale do no harm?"),
        Fact(
            "does not depend on the number of steps",
            _guide_steps,
            "decide by the noise, sigma or sigma / alpha; not by the step's number, nor by its length",
        ),
    ),
    mistakes=(
        Mistake(
            "plain guidance",
            "The same scale at all noise levels: plain classifier-free guidance. At high noise, where islands are "
            "chosen, it is about s times too strong, and empties the crowded one.",
            _rule(lambda noise, state: state["s"]),
        ),
        Mistake(
            "no guidance",
            "Always eps_c: all islands are kept, and nothing is guided.",
            _rule(lambda noise, state: 1.0),
        ),
        Mistake(
            "interval upside down",
            "Guided at high noise, not at low: just where the islands are chosen. It is the other side of the interval "
            "that does no harm.",
            _rule(lambda noise, state: 1.0 if noise <= 1 else state["s"]),
        ),
        Mistake(
            "off outside",
            "Outside the interval your scale is 0, the unconditional prediction, which takes samples to other classes. "
            "Outside it must be 1.",
            _rule(lambda noise, state: state["s"] if noise <= 1 else 0.0),
        ),
        Mistake(
            "by the number of steps gone",
            "Guided from the 15th step on, whatever the noise is then: with another number of steps this is another "
            "rule.",
            _rule(lambda noise, state: state["s"] if state["step"] >= 15 else 1.0),
        ),
        Mistake(
            "CFG++ at all noise levels",
            "A strength per step, lam n / (n - n_next) as in CFG++: more steps, more guidance. And it is strongest "
            "where islands are chosen.",
            (
                lambda eps_c, eps_u, x, sigma, state: (
                    eps_u
                    + 0.6
                    / (1 - math.sqrt((1 / sigma**2 - 1) / (1 / max(state["sigma_next"], 1e-9) ** 2 - 1)))
                    * (eps_c - eps_u)
                ),
            ),
        ),
        Mistake(
            "fixed scale in the interval",
            'The scale in the interval is a number of your own, 5, and not state["s"]: at s = 1 it still guides.',
            _rule(lambda noise, state: 5.0 if noise <= 1 else 1.0),
        ),
        Mistake(
            "1 + w",
            "Within the interval your scale is s + 1, the convention of Ho & Salimans: at s = 1 it still guides.",
            _rule(lambda noise, state: state["s"] + 1 if noise <= 1 else 1.0),
        ),
        Mistake(
            "projection",
            "You drop the part of the difference that is parallel to the estimate of x0, as APG does. What is parallel "
            "depends on where the origin is, and the world does not know.",
            (_guide_projected,),
        ),
        Mistake(
            "mean over the batch",
            "The difference is averaged over the batch: every sample is pushed the same way, so the result of one "
            "depends on the others.",
            (_guide_mean,),
        ),
        Mistake(
            "linear ramp from the start",
            "The scale falls with the noise, but is still far above 1 where islands are chosen.",
            _rule(lambda noise, state: 1 + (state["s"] - 1) / (1 + noise / 4)),
        ),
    ),
    alternatives=((_guide_ramp,), (_guide_window,), _rule(lambda noise, state: 1 + (state["s"] - 1) * (noise < 0.9))),
    hints=(
        "Lesson 04 measured the scale that the tilt asks for: about 1 where sigma / alpha is above 1, and s only near "
        "the data. Any rule like it will do.",
        'noise = sigma / sqrt(1 - sigma^2); s = state["s"] if noise <= 1 else 1; eps_u + s (eps_c - eps_u).',
    ),
    probe=_guide_see,
    points=4,
)

EXERCISES = (FK, RESAMPLE, PC, AUTOGUIDE, TRAINED, CFGPP, DPS, CLASSIFY, MUSEUM, GUIDE)
