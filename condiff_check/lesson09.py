"""Exercises of lesson 09: the autoencoder, the scale of its latents, and diffusion between its two ends."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.distributions import Normal, kl_divergence

from condiff_ref.shapes import pad

from .compare import close, plain
from .draws import PICTURES, integer, pictures, randn
from .exercise import Answer, Exercise, Fact, Mistake, Wrong, need
from .guard import Failed
from .lesson02 import TRAIN_STEP, Asked, Recorder, Spy
from .testing import test_exercise
from .xray import Formula, random_abar

# --- the reference answers, as the solutions show them ----------------------------------------------------------------


def kl_gauss(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, diag exp(logvar)) || N(0, I)) in nats, summed over all entries of an example: (B, ...) -> (B,)."""
    return (mu**2 + logvar.exp() - 1 - logvar).flatten(1).sum(dim=1) / 2


def reparam(mu: Tensor, logvar: Tensor, gen: Generator) -> Tensor:
    """One sample of N(mu, diag exp(logvar)), with gradients to both: (B, ...) -> (B, ...).

    Each entry has its own standard normal noise, drawn with gen on the CPU, which then goes where mu is.
    """
    eps = torch.randn(mu.shape, generator=gen, dtype=mu.dtype).to(mu.device)
    return mu + (logvar / 2).exp() * eps


def vae_loss(x: Tensor, rec: Tensor, mu: Tensor, logvar: Tensor, beta: float) -> Tensor:
    """|x - rec|^2 summed over the pixels of an image, plus beta times its KL, averaged over the batch: ().

    x, rec (B, C, H, W); mu, logvar (B, c, h, w).
    """
    error = ((x - rec) ** 2).flatten(1).sum(dim=1)
    kl = (mu**2 + logvar.exp() - 1 - logvar).flatten(1).sum(dim=1) / 2
    return (error + beta * kl).mean()


def scale_factor(z: Tensor) -> float:
    """The one number that gives latents unit variance when they are multiplied by it: z (N, c, h, w), the means of many
    images, encoded without noise. Variance is about the mean of all entries, not about 0, and divides by their number.
    """
    return 1 / z.std(correction=0).item()


def to_model(z: Tensor, factor: float) -> Tensor:
    """Latents as the diffusion model sees them, at unit variance."""
    return z * factor


def from_model(z: Tensor, factor: float) -> Tensor:
    """And back, as the decoder knows them."""
    return z / factor


def ldm_train_step(
    model: nn.Module,
    encoder: nn.Module,
    factor: float,
    opt: torch.optim.Optimizer,
    x0: Tensor,
    y: Tensor,
    p: float,
    abar: Tensor,
    gen: Generator,
) -> float:
    """One step of the optimiser on mean |model(z_t, t, y) - eps|^2 in the space of scaled latents; returns this loss.

    encoder(x0) gives mean and log-variance of the latents, each (B, c, h, w); the step uses the mean, times factor. It
    puts the encoder in eval mode and gives it no gradient. Each example has its own t, uniform over 1 .. T =
    len(abar) - 1, its own standard normal eps, and its label becomes model.null with probability p. All is drawn with
    gen, on the CPU, in this order, and then goes where x0 is.
    """
    encoder.eval()
    with torch.no_grad():
        z0 = encoder(x0)[0] * factor
    abar = abar.to(z0)
    t = torch.randint(1, len(abar), (len(z0),), generator=gen).to(z0.device)
    eps = torch.randn(z0.shape, generator=gen, dtype=z0.dtype).to(z0.device)
    zt = pad(abar[t].sqrt(), z0) * z0 + pad((1 - abar[t]).sqrt(), z0) * eps
    dropped = (torch.rand(y.shape, generator=gen) < p).to(y.device)
    loss = F.mse_loss(model(zt, t, torch.where(dropped, model.null, y)), eps)
    opt.zero_grad()
    loss.backward()
    opt.step()
    return loss.item()


@torch.no_grad()
def ldm_sample(
    model: nn.Module,
    decoder: nn.Module,
    factor: float,
    y: Tensor,
    scale: float,
    steps: int,
    shape: tuple[int, ...],
    abar: Tensor,
    gen: Generator,
) -> Tensor:
    """Images of the classes y (B,): deterministic DDIM with guidance in scaled latents, decoded once, at the end.

    shape is that of one latent (c, h, w). Noise is drawn with gen on the CPU; the times are torch.linspace(T, 0,
    steps + 1), rounded. model(z, t, y) predicts eps, with integer t (B,) and null label model.null; scale 0 is
    unconditional, 1 conditional. Latents are not clamped. decoder takes latents as the encoder made them, before
    scaling.
    """
    times = torch.linspace(len(abar) - 1, 0, steps + 1).round().long().tolist()
    z = torch.randn(len(y), *shape, generator=gen).to(y.device)
    abar = abar.to(z)
    for t, s in zip(times[:-1], times[1:], strict=True):  # noqa: RUF007
        now = torch.full_like(y, t)
        eps_u, eps_c = model(z, now, torch.full_like(y, model.null)), model(z, now, y)
        eps = eps_u + scale * (eps_c - eps_u)
        z0 = (z - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()
        z = abar[s].sqrt() * z0 + (1 - abar[s]).sqrt() * eps
    return decoder(z / factor)


def compute_ledger(encoder: int, network: int, decoder: int, steps: int, scale: float) -> dict[str, int]:
    """FLOPs of drawing one picture by latent diffusion: {"encoder", "network", "decoder", "total"}.

    encoder, network and decoder: multiply-adds of one evaluation of each. The sampler asks the network once a step and
    for each label that the guidance scale needs: scale 0 needs only the null label, 1 only the class, others both.
    """
    passes = 1 if scale in (0, 1) else 2
    flops = {"encoder": 0, "network": 2 * network * steps * passes, "decoder": 2 * decoder}
    return {**flops, "total": sum(flops.values())}


def rate_distortion(x: Tensor, rec: Tensor, mu: Tensor, logvar: Tensor) -> tuple[float, float]:
    """One point on the rate-distortion curve: (bits per image, mean squared error per pixel), averaged over images.

    The rate is the KL from q(z | x) to N(0, I): what it costs, on average, to tell someone who knows the prior which z.
    x, rec (B, C, H, W); mu, logvar (B, c, h, w).
    """
    nats = (mu**2 + logvar.exp() - 1 - logvar).flatten(1).sum(dim=1) / 2
    return nats.mean().item() / math.log(2), F.mse_loss(rec, x).item()


def my_kl_test(kl_gauss: Callable) -> None:
    """Raise an AssertionError if kl_gauss(mu, logvar) does not do what it should; else return None."""
    zero = torch.zeros(2, 3, 2, 2)
    assert torch.allclose(kl_gauss(zero, zero), torch.zeros(2)), "N(0, 1) is no distance from itself"
    mu = torch.stack([torch.full((3, 2, 2), 2.0), torch.zeros(3, 2, 2)])
    assert torch.allclose(kl_gauss(mu, zero), torch.tensor([24.0, 0.0])), "mu^2 / 2 each, summed, example by example"
    logvar = torch.full_like(zero, math.log(4.0))
    right = torch.full((2,), 12 * (4 - 1 - math.log(4.0)) / 2)
    assert torch.allclose(kl_gauss(zero, logvar), right), "(var - 1 - log var) / 2 each"
    small = torch.full_like(zero, math.log(0.25))
    right = torch.full((2,), 12 * (0.25 - 1 - math.log(0.25)) / 2)
    assert torch.allclose(kl_gauss(zero, small), right), "the other way round it would be another number"
    gen = torch.Generator().manual_seed(0)
    mu, logvar = torch.randn(2, 50_000, generator=gen) * 0.3, torch.randn(2, 50_000, generator=gen)
    assert (kl_gauss(mu, logvar) > 0).all(), "a distance is never negative"


# --- what several exercises share -------------------------------------------------------------------------------------


def _gen(g: Generator) -> Generator:
    return Generator().manual_seed(integer(g, 0, 10**6))


def _posterior(g: Generator, *shape: int) -> tuple[Tensor, Tensor]:
    """Mean and log-variance of latents, the variances from about 0.1 to 10."""
    return randn(g, *shape), randn(g, *shape)


def _oracle_kl(mu: Tensor, logvar: Tensor) -> Tensor:
    """By torch.distributions: (B, ...) -> (B,)."""
    q, prior = Normal(mu, (logvar / 2).exp()), Normal(torch.zeros_like(mu), torch.ones_like(mu))
    return kl_divergence(q, prior).flatten(1).sum(1)


def _sum_of(out: Tensor, **parts: Tensor) -> str:
    """What `out` is made of: "0.3 z_label + 0.7 noise", or that it is no such sum."""
    design = torch.stack([part.flatten() for part in parts.values()], dim=1).double()
    wanted = out.detach().double().flatten()
    fit = torch.linalg.lstsq(design, wanted[:, None]).solution[:, 0]
    if (design @ fit - wanted).abs().max() > 1e-3 * (1 + wanted.abs().max()):
        return f"something else than a sum of {' and '.join(parts)}"
    terms = [_term(float(share), name) for share, name in zip(fit, parts, strict=True) if abs(share) > 1e-4]
    return " + ".join(terms).replace("+ -", "- ") or "0"


def _term(share: float, name: str) -> str:
    size = "" if math.isclose(abs(share), 1, rel_tol=1e-4) else f"{abs(share):.3g} "
    return f"{'-' if share < 0 else ''}{size}{name}"


def _times(got: float, due: float, **named: int) -> str:
    """By what known factor a number is off: "; that is 3 times too small, the number of channels". "" if by none."""
    for name, n in {"twice": 2, **named}.items():
        for one, two, word in ((got, due, "small"), (due, got, "large")):
            if due and math.isclose(one * n, two, rel_tol=1e-9):
                what = "" if name == "twice" else f", the number of {name}"
                return f"; that is {n} times too {word}{what}"
    return ""


# --- 09.1 kl_gauss ----------------------------------------------------------------------------------------------------


def _kl_inputs(g: Generator) -> dict:
    mu, logvar = _posterior(g, *PICTURES)
    return {"kl_gauss": dict(mu=mu, logvar=logvar)}


def _kl_zero(answer: Answer, g: Generator) -> None:
    for shape in ((3, 2), (4, 3, 2, 5)):
        zero = torch.zeros(shape, dtype=torch.float64)
        need(answer(zero, zero), zero.flatten(1).sum(1), f"mu = 0 and logvar = 0, {shape}: q is N(0, I) itself")


def _kl_shift(answer: Answer, g: Generator) -> None:
    """One entry of one example, at a distance d from 0: d^2 / 2."""
    mu, d = torch.zeros(4, 3, 2, 5, dtype=torch.float64), 1.5 + integer(g, 0, 3) / 2
    b = integer(g, 0, 3)
    mu[b, 1, 0, 3] = -d
    right = torch.zeros(4, dtype=torch.float64)
    right[b] = d * d / 2
    need(answer(mu, torch.zeros_like(mu)), right, f"variance 1, and one entry of example {b} has the mean {-d:g}")


def _kl_spread(answer: Answer, g: Generator) -> None:
    """Two examples, wide and narrow: (v - 1 - log v) / 2 for each of n entries, which grows either way from v = 1."""
    v = (3.0, 4.0, 5.0)[integer(g, 0, 2)]
    logvar = torch.stack([torch.full((2, 3), math.log(v)), torch.full((2, 3), -math.log(v))]).double()
    right = torch.tensor([3 * (v - 1 - math.log(v)), 3 * (1 / v - 1 + math.log(v))], dtype=torch.float64)
    got = answer(torch.zeros_like(logvar), logvar)
    need(got, right, f"mu = 0, example 0 has the variance {v:g} and example 1 the variance 1/{v:g}, 6 entries each")


def _kl_torch(answer: Answer, g: Generator) -> None:
    for shape in ((5, 7), (3, 2, 4, 3), (6, 2, 3)):
        mu, logvar = _posterior(g, *shape)
        need(answer(mu, logvar), _oracle_kl(mu, logvar), f"random mu and logvar of shape {shape}")


def _kl_slope(answer: Answer, g: Generator) -> None:
    """d KL / d mu = mu, d KL / d logvar = (exp(logvar) - 1) / 2."""
    mu, logvar = (v.requires_grad_() for v in _posterior(g, 3, 2, 2, 4))
    out = answer(mu, logvar)
    if not out.requires_grad:
        raise Wrong("the result has no gradient: nothing can be trained with it")
    by_mu, by_logvar = torch.autograd.grad(out.sum(), (mu, logvar), allow_unused=True)
    for name, got, right in (("mu", by_mu, mu), ("logvar", by_logvar, (logvar.exp() - 1) / 2)):
        if got is None:
            raise Wrong(f"no gradient reaches {name}")
        need(got, right.detach(), f"the gradient with respect to {name} is not that of the KL")


def _kl_by(
    term: Callable[[Tensor, Tensor], Tensor] = lambda mu, lv: mu**2 + lv.exp() - 1 - lv,
    over: Callable[[Tensor], Tensor] = lambda kl: kl.flatten(1).sum(1),
    factor: float = 0.5,
) -> Callable:
    return lambda mu, logvar: factor * over(term(mu, logvar))


def _kl_by_std(mu: Tensor, logvar: Tensor) -> Tensor:
    """Log of the ratio of standard deviations, and what is left of the quadratic form."""
    std = torch.exp(0.5 * logvar)
    each = -torch.log(std) + (std * std + mu * mu) / 2 - 0.5
    return torch.einsum("bn->b", each.reshape(len(mu), -1))


def _kl_one_by_one(mu: Tensor, logvar: Tensor) -> Tensor:
    return torch.stack([((m * m).sum() + (v.expm1() - v).sum()) / 2 for m, v in zip(mu, logvar, strict=True)])


KL_GAUSS = Exercise(
    id="09.1",
    names=("kl_gauss",),
    references=(kl_gauss,),
    inputs=_kl_inputs,
    batch=("mu", "logvar"),
    facts=(
        Fact("is 0 for N(0, I) itself", _kl_zero, "at mu = 0 and variance 1 every entry must contribute 0"),
        Fact("a mean d away costs d^2 / 2, in its own example", _kl_shift, "the squared distance of the means, halved"),
        Fact(
            "too wide and too narrow both cost, as they should",
            _kl_spread,
            "how does the variance come out of logvar? And which of the two Gaussians is the expectation under?",
        ),
        Fact("agrees with torch.distributions", _kl_torch, "the sum over all axes but the first"),
        Fact("its gradient is that of the KL", _kl_slope, "no detach, no no_grad, no .item()"),
    ),
    mistakes=(
        Mistake(
            "sign",
            "The whole KL has the wrong sign: a KL is never negative, and training would push q away from the prior.",
            (_kl_by(factor=-0.5),),
        ),
        Mistake(
            "sign of the logarithm",
            "logvar enters with a plus: it is subtracted, or nothing keeps the variance from falling to 0.",
            (_kl_by(lambda mu, lv: mu**2 + lv.exp() - 1 + lv),),
        ),
        Mistake(
            "no 1/2",
            "The factor 1/2 is missing: your KL is twice as large, as if beta were.",
            (_kl_by(factor=1.0),),
        ),
        Mistake(
            "logvar outside of the half",
            "The factor 1/2 belongs to logvar, too: you subtract all of it, as if the KL were "
            "(mu^2 + var - 1) / 2 - logvar. (A logarithm of the standard deviation would be logvar / 2.)",
            (_kl_by(lambda mu, lv: mu**2 + lv.exp() - 1 - 2 * lv),),
        ),
        Mistake(
            "logvar taken for the standard deviation",
            "You square logvar as if it were a standard deviation: a log-variance is not a std. The variance is "
            "exp(logvar).",
            (_kl_by(lambda mu, lv: mu**2 + lv**2 - 1 - (lv**2).log()),),
        ),
        Mistake(
            "logvar taken for the variance",
            "You take logvar for the variance itself: it is its logarithm, and negative for every variance below 1.",
            (_kl_by(lambda mu, lv: mu**2 + lv - 1 - lv.log()),),
        ),
        Mistake(
            "logvar taken for the log of the standard deviation",
            "You take logvar for the logarithm of the standard deviation: the variance comes out as exp(2 logvar).",
            (_kl_by(lambda mu, lv: mu**2 + (2 * lv).exp() - 1 - 2 * lv),),
        ),
        Mistake(
            "standard deviation for the variance",
            "exp(logvar / 2) stands where the variance belongs; that is the standard deviation.",
            (_kl_by(lambda mu, lv: mu**2 + (lv / 2).exp() - 1 - lv),),
        ),
        Mistake(
            "mean over the entries",
            "You average over the entries of an example: the KL is their sum, so yours is too small by their number, "
            "and so is the effective beta.",
            (_kl_by(over=lambda kl: kl.flatten(1).mean(1)),),
        ),
        Mistake(
            "mean over the batch",
            "You return one number for the whole batch: here each example has its own KL, the batch is averaged later.",
            (_kl_by(over=lambda kl: kl.flatten(1).sum(1).mean()),),
        ),
        Mistake(
            "sum over the batch",
            "You sum over the examples, too: each example has its own KL.",
            (_kl_by(over=torch.sum),),
        ),
        Mistake(
            "sum over axis 1 only",
            "You sum over axis 1 only, so that images keep their height and width: sum over all axes but the first.",
            (_kl_by(over=lambda kl: kl.sum(1)),),
        ),
        Mistake(
            "reversed",
            "This is the reversed KL, KL(N(0, I) || N(mu, var)): the expectation is under q, so that nothing is "
            "divided by the variance.",
            (_kl_by(lambda mu, lv: mu**2 * (-lv).exp() + (-lv).exp() - 1 + lv),),
        ),
        Mistake(
            "mu not squared",
            "mu is not squared: a mean on the negative side would be rewarded.",
            (_kl_by(lambda mu, lv: mu + lv.exp() - 1 - lv),),
        ),
        Mistake(
            "the 1 forgotten",
            "The -1 is missing: N(0, I) is then 1/2 per entry away from itself.",
            (_kl_by(lambda mu, lv: mu**2 + lv.exp() - lv),),
        ),
        Mistake(
            "entropy forgotten",
            "The logarithm of the variance is missing: without it the best variance would be 0.",
            (_kl_by(lambda mu, lv: mu**2 + lv.exp() - 1),),
        ),
    ),
    alternatives=((_oracle_kl,), (_kl_by_std,), (_kl_one_by_one,)),
    hints=(
        "For one entry: E_q[log q(z) - log p(z)], where only E_q[z] = mu and E_q[z^2] = mu^2 + variance are needed.",
        "(mu^2 + exp(logvar) - 1 - logvar) / 2, summed over all axes but the first.",
    ),
    hides=("autoencoder.kl_per_image",),
)

# --- 09.2 reparam -----------------------------------------------------------------------------------------------------


def _reparam_inputs(g: Generator) -> dict:
    mu, logvar = _posterior(g, *PICTURES)
    return {"reparam": dict(mu=mu, logvar=logvar, gen=_gen(g))}


def _noise_of(answer: Answer, seed: int, *shape: int) -> Tensor:
    """The eps of this generator: mean 0 and variance 1 leave nothing else."""
    zero = torch.zeros(shape, dtype=torch.float64)
    return plain(answer(zero, zero, Generator().manual_seed(seed)))


def _reparam_own(answer: Answer, g: Generator) -> None:
    seed = integer(g, 0, 10**6)
    eps = _noise_of(answer, seed, 6, 3, 4, 5)
    if eps.shape != (6, 3, 4, 5):
        raise Wrong(f"for mu of shape (6, 3, 4, 5) the sample has the shape {tuple(eps.shape)}")
    shared = _shared(eps)
    if shared:
        raise Wrong(f"mu = 0 and logvar = 0, which is variance 1: {shared}")
    gen = Generator().manual_seed(seed)
    zero = torch.zeros(6, 3, 4, 5, dtype=torch.float64)
    if close(plain(answer(zero, zero, gen)), plain(answer(zero, zero, gen))):
        raise Wrong("two samples, one after the other, are the same: draw from gen as it comes, and do not seed it")


def _spread(answer: Answer, seed: int, eps: Tensor) -> object:
    """How much larger the noise becomes with logvar = 3."""
    zero = torch.zeros_like(eps)
    std = float(plain(answer(zero, zero + 3, Generator().manual_seed(seed))).std())
    if eps.any():
        return round(std / float(eps.std()), 2)
    return next((name for name, v in (("logvar", 3.0), ("half of it", 1.5)) if abs(std - v) < 0.15), "other")


def _shared(eps: Tensor) -> str:
    """Which entries have the same noise; "" if none."""
    if not eps.any():
        return "the sample is 0 everywhere: there is no noise in it"
    axes = enumerate(("examples", "channels", "rows", "columns"))
    alike = [f"all {what}" for axis, what in axes if (eps == eps.narrow(axis, 0, 1)).all()]
    return f"{' and '.join(alike)} have one and the same noise: each entry needs its own" if alike else ""


def _reparam_normal(answer: Answer, g: Generator) -> None:
    eps = _noise_of(answer, integer(g, 0, 10**6), 10, 4, 8, 10)
    n, mean, var = eps.numel(), float(eps.mean()), float(eps.var())
    if abs(mean) > 7 / math.sqrt(n) or abs(var - 1) > 7 * math.sqrt(2 / n):
        raise Wrong(f"mu = 0 and logvar = 0: the sample has mean {mean:.3f} and variance {var:.3f}, not 0 and 1")
    tail = float((eps.abs() > 2).double().mean())
    if abs(tail - 0.0455) > 0.02:
        raise Wrong(f"mu = 0 and logvar = 0: {tail:.1%} of the entries are beyond 2, of a Gaussian 4.6 %")


_FACTORS = {  # what people multiply the noise by
    "exp(logvar / 2)": lambda lv: (lv / 2).exp(),
    "exp(logvar)": torch.exp,
    "exp(2 logvar)": lambda lv: (2 * lv).exp(),
    "exp(-logvar / 2)": lambda lv: (-lv / 2).exp(),
    "logvar": lambda lv: lv,
    "logvar / 2": lambda lv: lv / 2,
    "1": torch.ones_like,
    "0": torch.zeros_like,
}


def _reparam_scale(answer: Answer, g: Generator) -> None:
    """The same generator twice: once for eps alone, once with mu and logvar."""
    seed, shape = integer(g, 0, 10**6), (3, 2, 4, 5)
    mu, logvar = _posterior(g, *shape)
    eps = _noise_of(answer, seed, *shape)
    z = plain(answer(mu.clone(), logvar.clone(), Generator().manual_seed(seed)))
    right = mu + (logvar / 2).exp() * eps
    if close(z, right, rtol=1e-5, atol=1e-6):
        return
    for name, factor in _FACTORS.items():
        if close(z, mu + factor(logvar) * eps, rtol=1e-5, atol=1e-6):
            raise Wrong(f"with the eps of this generator your sample is mu + {name} eps", expected="mu + std eps")
    need(z, right, "with the eps of this generator your sample is not mu plus eps times the standard deviation")


def _reparam_slope(answer: Answer, g: Generator) -> None:
    mu, logvar = (v.requires_grad_() for v in _posterior(g, 3, 2, 4, 5))
    z = answer(mu, logvar, _gen(g))
    if not z.requires_grad:
        raise Wrong("no gradient reaches mu or logvar: the encoder could not be trained through the sample")
    by_mu, by_logvar = torch.autograd.grad(z.sum(), (mu, logvar), allow_unused=True)
    for name, got, right in (("mu", by_mu, torch.ones_like(mu)), ("logvar", by_logvar, (z - mu) / 2)):
        if got is None:
            raise Wrong(f"no gradient reaches {name}")
        need(got, right.detach(), f"the gradient of the sample with respect to {name} is another")


def _reparam_by(
    std: Callable[[Tensor], Tensor] = lambda lv: (lv / 2).exp(),
    noise: Callable[[Tensor, Generator], Tensor] = lambda mu, gen: torch.randn(mu.shape, generator=gen, dtype=mu.dtype),
    mean: Callable[[Tensor], Tensor] = lambda mu: mu,
    join: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda mu, std, eps: mu + std * eps,
) -> Callable:
    return lambda mu, logvar, gen: join(mean(mu), std(logvar), noise(mu, gen))


def _reparam_rows(mu: Tensor, logvar: Tensor, gen: Generator) -> Tensor:
    rows = []
    for m, v in zip(mu, logvar, strict=True):
        rows.append(torch.addcmul(m, v.exp().sqrt(), torch.randn(m.shape, generator=gen).to(m)))
    return torch.stack(rows)


def _reparam_minus(mu: Tensor, logvar: Tensor, gen: Generator) -> Tensor:
    """-eps is as normal as eps."""
    eps = torch.empty(mu.shape, dtype=mu.dtype).normal_(generator=gen)
    return mu - eps.to(mu.device) * torch.exp(0.5 * logvar)


def _reparam_see(answer: Answer, g: Generator) -> object:
    seed, shape = integer(g, 0, 10**6), (6, 3, 8, 10)
    mu, logvar = _posterior(g, *shape)
    answer.reseed(1)
    eps, z = _noise_of(answer, seed, *shape), plain(answer(mu, logvar, Generator().manual_seed(seed)))
    answer.reseed(2)
    var, mean = float(eps.var()), float(eps.mean())
    seen = dict(
        shape=list(z.shape),
        from_gen=close(_noise_of(answer, seed, *shape), eps),
        gen_matters=not close(_noise_of(answer, seed + 1, *shape), eps),
        shared=_shared(eps),
        mean=_shared(eps) or round(2 * mean) / 2 + 0.0,
        var=_shared(eps) or min((0.0, 1 / 12, 1 / 3, 1.0), key=lambda v: abs(v - var)),
        scale=[n for n, f in _FACTORS.items() if close(z, mu + f(logvar) * eps, rtol=1e-5, atol=1e-6)],
        spread=_spread(answer, seed, eps),
        product=close(z, (mu + eps) * (logvar / 2).exp(), rtol=1e-5),
        exchanged=close(z, (logvar / 2).exp() + mu * eps, rtol=1e-5),
    )
    mu, logvar = mu.requires_grad_(), logvar.requires_grad_()
    z = answer(mu, logvar, Generator().manual_seed(seed))
    grads = torch.autograd.grad(z.sum(), (mu, logvar), allow_unused=True) if z.requires_grad else (None, None)
    return seen | dict(grads=[grad is not None and bool(grad.any()) for grad in grads])


REPARAM = Exercise(
    by_probe=True,
    id="09.2",
    names=("reparam",),
    references=(reparam,),
    inputs=_reparam_inputs,
    changes=("gen",),
    facts=(
        Fact("each entry has noise of its own, anew each time", _reparam_own, "torch.randn of mu's shape"),
        Fact("the noise is standard normal", _reparam_normal, "randn, not rand"),
        Fact(
            "the noise is multiplied by the standard deviation, and mu added",
            _reparam_scale,
            "logvar is the logarithm of the variance; what is that of its square root?",
        ),
        Fact(
            "gradients pass through the sample to mu and logvar", _reparam_slope, "the noise needs none, the rest does"
        ),
    ),
    mistakes=(
        Mistake(
            "variance for standard deviation",
            "The noise is multiplied by exp(logvar), the variance: where the encoder is sure there is too little "
            "noise, and elsewhere too much.",
            (_reparam_by(torch.exp),),
        ),
        Mistake(
            "exp(2 logvar)",
            "The noise is multiplied by exp(2 logvar), the square of the variance: the root halves the logarithm, the "
            "square doubles it.",
            (_reparam_by(lambda lv: (2 * lv).exp()),),
        ),
        Mistake(
            "logvar taken for the standard deviation",
            "The noise is multiplied by logvar itself: a log-variance is not a std. It is negative where the encoder "
            "is sure.",
            (_reparam_by(lambda lv: lv),),
        ),
        Mistake(
            "exp forgotten",
            "The noise is multiplied by logvar / 2: that is the logarithm of the standard deviation, not the standard "
            "deviation.",
            (_reparam_by(lambda lv: lv / 2),),
        ),
        Mistake(
            "divided by the standard deviation",
            "The noise is divided by the standard deviation: the surer the encoder, the noisier its sample.",
            (_reparam_by(lambda lv: (-lv / 2).exp()),),
        ),
        Mistake(
            "logvar ignored",
            "logvar has no effect: every sample has unit variance around mu.",
            (_reparam_by(torch.ones_like),),
        ),
        Mistake(
            "the mean, without noise",
            "You return mu without noise: the decoder never sees the spread that the KL asks for.",
            (_reparam_by(noise=lambda mu, gen: torch.zeros_like(mu)),),
        ),
        Mistake(
            "one noise for the batch",
            "All examples of the batch share one noise; each needs its own.",
            (_reparam_by(noise=lambda mu, gen: torch.randn(mu[:1].shape, generator=gen).to(mu).expand_as(mu)),),
        ),
        Mistake(
            "one noise for all channels",
            "All channels of an example share one noise: each entry needs its own.",
            (_reparam_by(noise=lambda mu, gen: torch.randn(mu[:, :1].shape, generator=gen).to(mu).expand_as(mu)),),
        ),
        Mistake(
            "one number per example",
            "Each example has a single random number: all its entries move up and down together.",
            (_reparam_by(noise=lambda mu, gen: pad(torch.randn(len(mu), generator=gen).to(mu), mu).expand_as(mu)),),
        ),
        Mistake(
            "mu detached",
            "mu is detached: no gradient of the reconstruction reaches it, and the encoder's mean learns from the KL "
            "alone, which pulls it to 0.",
            (_reparam_by(mean=Tensor.detach),),
        ),
        Mistake(
            "no gradient to logvar",
            "The standard deviation is detached: nothing tells the encoder that its noise hurts the reconstruction.",
            (_reparam_by(lambda lv: (lv / 2).exp().detach()),),
        ),
        Mistake(
            "no gradient at all",
            "The sample carries no gradient (no_grad, detach or torch.normal(mu, std)): the encoder cannot be trained "
            "through it. That is what mu + std eps is for.",
            (torch.no_grad()(_reparam_by()),),
        ),
        Mistake(
            "noise not from gen",
            "The noise does not come from gen (torch.randn_like cannot take one): the run cannot be repeated.",
            (_reparam_by(noise=lambda mu, gen: torch.randn_like(mu)),),
        ),
        Mistake(
            "uniform noise",
            "The noise is uniform in [0, 1] (torch.rand): it must be standard normal (torch.randn).",
            (_reparam_by(noise=lambda mu, gen: torch.rand(mu.shape, generator=gen, dtype=mu.dtype)),),
        ),
        Mistake(
            "mu scaled, too",
            "mu is multiplied by the standard deviation as well: only the noise is.",
            (_reparam_by(join=lambda mu, std, eps: (mu + eps) * std),),
        ),
        Mistake(
            "mu and the standard deviation exchanged",
            "mu and the standard deviation are exchanged: the noise is multiplied by mu.",
            (_reparam_by(join=lambda mu, std, eps: std + mu * eps),),
        ),
    ),
    alternatives=((_reparam_rows,), (_reparam_minus,)),
    hints=(
        "Draw eps, which depends on nothing; then make of it, with mu and logvar, a number of the right mean and "
        "standard deviation.",
        "mu + exp(logvar / 2) eps, with eps = torch.randn(mu.shape, generator=gen).",
    ),
    probe=_reparam_see,
    hides=("autoencoder.draw",),
)

# --- 09.3 vae_loss ----------------------------------------------------------------------------------------------------


def _vae_inputs(g: Generator) -> dict:
    x, rec = pictures(g, 2)
    mu, logvar = _posterior(g, 4, 2, 3, 2)
    return {"vae_loss": dict(x=x, rec=rec, mu=mu, logvar=logvar, beta=0.1 + 0.3 * float(torch.rand((), generator=g)))}


def _loss_is(answer: Answer, args: Sequence, right: float, message: str) -> None:
    got = float(answer(*(v.clone() if isinstance(v, Tensor) else v for v in args)).detach())
    if not math.isclose(got, right, rel_tol=1e-6, abs_tol=1e-9):
        x, mu = args[0], args[2]
        named = {"images": len(x), "channels": x.shape[1], "pixels": x[0].numel(), "latents": mu[0].numel()}
        raise Wrong(f"{message}: yours is {got:.6g}{_times(got, right, **named)}", expected=f"{right:.6g}")


def _vae_error(answer: Answer, g: Generator) -> None:
    x, d, zero = pictures(g, 1)[0], 0.5 + integer(g, 0, 4) / 4, torch.zeros(4, 2, 3, 2, dtype=torch.float64)
    what = f"beta = 0.7, q is the prior, and each of {x[0].numel()} pixels of each of 4 images is off by {d:g}"
    _loss_is(answer, (x, x + d, zero, zero, 0.7), x[0].numel() * d * d, what)
    rec = x.clone()
    rec[1] += d
    what = f"beta = 0.7, q is the prior, and each of {x[0].numel()} pixels of 1 of 4 images is off by {d:g}"
    _loss_is(answer, (x, rec, zero, zero, 0.7), x[0].numel() * d * d / 4, what)


def _vae_kl(answer: Answer, g: Generator) -> None:
    (x,), m, beta = pictures(g, 1), 1 + integer(g, 0, 3) / 2, integer(g, 1, 6) / 4
    mu = torch.full((4, 2, 3, 2), m, dtype=torch.float64)
    what = f"rec = x, beta = {beta:g}, and each of 12 latents has the mean {m:g} and variance 1"
    _loss_is(answer, (x, x.clone(), mu, 0 * mu, beta), beta * 12 * m * m / 2, what)
    logvar = torch.full_like(mu, math.log(3))
    what = f"rec = x, beta = {beta:g}, and each of 12 latents has the mean 0 and variance 3"
    _loss_is(answer, (x, x.clone(), 0 * mu, logvar, beta), beta * 12 * (2 - math.log(3)) / 2, what)


def _vae_elbo(answer: Answer, g: Generator) -> None:
    """With beta = 1: -log N(x; rec, 1/2) + KL, less the constant of the Gaussian."""
    for shape, latent in (((5, 1, 4, 3), (5, 2, 2, 1)), ((3, 3, 2, 2), (3, 4, 1, 1))):
        x, rec = randn(g, *shape), randn(g, *shape)
        mu, logvar = _posterior(g, *latent)
        log_p = Normal(rec, math.sqrt(0.5)).log_prob(x).flatten(1).sum(1)
        elbo = log_p + x[0].numel() * math.log(math.pi) / 2 - _oracle_kl(mu, logvar)
        what = f"beta = 1, {shape[0]} images: not -log N(x; rec, I/2) + KL, constants aside"
        _loss_is(answer, (x, rec, mu, logvar, 1.0), float(-elbo.mean()), what)


def _vae_batch(answer: Answer, g: Generator) -> None:
    x, rec, mu, logvar, beta = _vae_inputs(g)["vae_loss"].values()
    once = answer(x, rec, mu, logvar, beta)
    twice = answer(*(torch.cat([v, v]) for v in (x, rec, mu, logvar)), beta)
    if not close(plain(once), plain(twice), rtol=1e-6):
        raise Wrong(f"every image twice: the loss was {float(once):.5g} and is {float(twice):.5g}, and must not change")


def _vae_slope(answer: Answer, g: Generator) -> None:
    x, *rest, beta = _vae_inputs(g)["vae_loss"].values()
    rec, mu, logvar = (v.requires_grad_() for v in rest)
    loss = answer(x, rec, mu, logvar, beta)
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        raise Wrong("the loss carries no gradient: nothing can be trained with it")
    grads = torch.autograd.grad(loss, (rec, mu, logvar), allow_unused=True)
    due = 2 * (rec - x) / 4, beta * mu / 4, beta * (logvar.exp() - 1) / 8
    for name, got, right in zip(("rec", "mu", "logvar"), grads, due, strict=True):
        if got is None:
            raise Wrong(f"no gradient reaches {name}")
        need(got, right.detach(), f"the gradient with respect to {name} is another")


def _each(v: Tensor) -> Tensor:
    return v.flatten(1).sum(1)


def _vae_by(
    error: Callable[[Tensor, Tensor], Tensor] = lambda x, rec: _each((x - rec) ** 2),
    kl: Callable[[Tensor, Tensor], Tensor] = _oracle_kl,
    join: Callable[[Tensor, Tensor, float], Tensor] = lambda error, kl, beta: (error + beta * kl).mean(),
) -> tuple[Callable]:
    return (lambda x, rec, mu, logvar, beta: join(error(x, rec), kl(mu, logvar), beta),)


def _kl_of_sample(mu: Tensor, logvar: Tensor) -> Tensor:
    std = (logvar / 2).exp()
    z = mu + std * torch.randn_like(mu)
    return _each(Normal(mu, std).log_prob(z) - Normal(torch.zeros_like(mu), 1.0).log_prob(z))


def _vae_sums(x: Tensor, rec: Tensor, mu: Tensor, logvar: Tensor, beta: float) -> Tensor:
    """Everything summed, and divided by the batch at the end."""
    kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    return (F.mse_loss(rec, x, reduction="sum") + beta * kl) / x.shape[0]


def _vae_loop(x: Tensor, rec: Tensor, mu: Tensor, logvar: Tensor, beta: float) -> Tensor:
    total = torch.zeros((), dtype=x.dtype, device=x.device)
    for i in range(len(x)):
        total = total + torch.dist(x[i], rec[i]) ** 2 + beta * kl_gauss(mu[i : i + 1], logvar[i : i + 1])[0]
    return total / len(x)


VAE_LOSS = Exercise(
    id="09.3",
    names=("vae_loss",),
    references=(vae_loss,),
    inputs=_vae_inputs,
    facts=(
        Fact("the error is summed over an image's pixels", _vae_error, "sum over pixels, mean over images"),
        Fact("the KL is summed over an image's latents, times beta", _vae_kl, "which term does beta belong to?"),
        Fact("with beta = 1 it is the negative ELBO", _vae_elbo, "the decoder is a Gaussian of variance 1/2"),
        Fact("does not grow with the batch", _vae_batch, "the mean over the batch, so that the step size can stay"),
        Fact("its gradients reach rec, mu and logvar", _vae_slope, "no detach, no .item(): backward() comes later"),
    ),
    mistakes=(
        Mistake(
            "mean error, summed KL",
            "The error is averaged over pixels while the KL is summed over latents: your effective beta is as many "
            "times larger as an image has pixels, 784 on MNIST, and latents that are not worth that "
            "collapse to the prior.",
            _vae_by(error=F.mse_loss),
        ),
        Mistake(
            "summed error, mean KL",
            "The KL is averaged over the latents while the error is summed over pixels: your effective beta is as many "
            "times smaller as an image has latents.",
            _vae_by(kl=lambda mu, lv: _oracle_kl(mu, lv) / mu[0].numel()),
        ),
        Mistake(
            "means everywhere",
            "Both terms are averages over all entries: they no longer add up to a log-likelihood, and beta changes its "
            "meaning with the size of image and latents.",
            _vae_by(error=F.mse_loss, kl=lambda mu, lv: _oracle_kl(mu, lv).mean() / mu[0].numel()),
        ),
        Mistake(
            "beta on the error",
            "beta weights the error instead of the KL: with a small beta "
            "the KL wins, and the latents collapse to the prior.",
            _vae_by(join=lambda error, kl, beta: (beta * error + kl).mean()),
        ),
        Mistake(
            "beta on both",
            "beta weights the error as well as the KL: then it only changes the size of the loss.",
            _vae_by(join=lambda error, kl, beta: beta * (error + kl).mean()),
        ),
        Mistake(
            "beta ignored",
            "beta has no effect.",
            _vae_by(join=lambda error, kl, beta: (error + kl).mean()),
        ),
        Mistake(
            "KL subtracted",
            "The KL is subtracted: training would drive q away from the prior. The ELBO has the minus, the loss is its "
            "negative.",
            _vae_by(join=lambda error, kl, beta: (error - beta * kl).mean()),
        ),
        Mistake(
            "Bernoulli loss",
            "You use the cross-entropy of pixels in [0, 1]; these are in [-1, 1] and continuous: for rec = x your "
            "error is not 0.",
            _vae_by(lambda x, rec: _each(F.binary_cross_entropy_with_logits(rec, (x + 1) / 2, reduction="none"))),
        ),
        Mistake(
            "sum over the batch",
            "You sum over the batch: with twice the batch the step is twice as long, so that the learning rate would "
            "depend on the batch size.",
            _vae_by(join=lambda error, kl, beta: (error + beta * kl).sum()),
        ),
        Mistake(
            "error summed over the batch, KL averaged",
            "The error is summed over all images of the batch (reduction='sum' does that), the KL is averaged over "
            "them: your effective beta is as many times smaller as the batch has images.",
            _vae_by(join=lambda error, kl, beta: error.sum() + beta * kl.mean()),
        ),
        Mistake(
            "one loss per image",
            "You return one loss per image: the mean over the batch is missing, and backward() needs one number.",
            _vae_by(join=lambda error, kl, beta: error + beta * kl),
        ),
        Mistake(
            "KL of a sample",
            "You estimate the KL from one sample, log q(z) - log p(z): right on average, but it needs noise and is "
            "noisy, where a closed form is known.",
            _vae_by(kl=_kl_of_sample),
        ),
        Mistake(
            "half of the error",
            "The squared error is halved: that is a decoder of variance 1, while the loss here is |x - rec|^2, of "
            "variance 1/2. beta would count double.",
            _vae_by(lambda x, rec: _each((x - rec) ** 2) / 2),
        ),
        Mistake(
            "KL without 1/2",
            "The KL lacks its factor 1/2: it counts double.",
            _vae_by(kl=lambda mu, lv: 2 * _oracle_kl(mu, lv)),
        ),
        Mistake(
            "not squared",
            "You take the length |x - rec|, not its square.",
            _vae_by(lambda x, rec: (x - rec).flatten(1).norm(dim=1)),
        ),
        Mistake(
            "absolute error",
            "You sum absolute errors: that is a Laplace decoder; the loss asked for is the squared error.",
            _vae_by(lambda x, rec: _each((x - rec).abs())),
        ),
        Mistake(
            "logvar taken for the standard deviation",
            "In the KL you square logvar as if it were a standard deviation: a log-variance is not a std. The variance "
            "is exp(logvar).",
            _vae_by(kl=lambda mu, lv: _each(mu**2 + lv**2 - 1 - (lv**2).log()) / 2),
        ),
        Mistake(
            "a plain number",
            "You return a plain number (.item()): backward() needs the tensor with its graph.",
            (lambda x, rec, mu, logvar, beta: vae_loss(x, rec, mu, logvar, beta).item(),),
        ),
    ),
    alternatives=((_vae_sums,), (_vae_loop,)),
    hints=(
        "One number per image for each of the two terms: sums over all axes but the first. Then add, then average.",
        "((x - rec)^2).flatten(1).sum(1) + beta kl_gauss(mu, logvar), and the mean of that.",
    ),
    hides=("autoencoder.vae_loss", "autoencoder.error_per_image", "autoencoder.kl_per_image"),
)

# --- 09.4 scale_factor, to_model, from_model --------------------------------------------------------------------------


def _latents(g: Generator, n: int = 5) -> Tensor:
    """Not of unit variance, not centred, and other in each channel and image: (n, 2, 3, 2)."""
    spread = torch.tensor([0.6, 2.5], dtype=torch.float64).view(2, 1, 1)
    return 0.8 + 1.5 * randn(g, 2, 1, 1) + randn(g, n, 1, 1, 1) + spread * randn(g, n, 2, 3, 2)


def _scale_inputs(g: Generator) -> dict:
    z, factor = _latents(g), (0.2, 0.45, 3.0)[integer(g, 0, 2)]
    return {"scale_factor": dict(z=z), "to_model": dict(z=z, factor=factor), "from_model": dict(z=z, factor=factor)}


def _scale_one(answer: Answer, g: Generator) -> None:
    """By the statistics module of the standard library."""
    for n in (40, 1):
        z = _latents(g, n)
        got = answer.call("scale_factor", z)
        if isinstance(got, Tensor) and got.ndim:
            raise Wrong(f"scale_factor returned a tensor of shape {tuple(got.shape)}: one number for all channels")
        variance = statistics.pvariance([float(got) * v for v in z.flatten().tolist()])
        if not math.isclose(variance, 1, rel_tol=1e-6):
            raise Wrong(
                f"{z.numel()} latents of mean {float(z.mean()):.3f}, times your factor {float(got):.5g}, have the "
                f"variance {variance:.5g}, not 1",
                expected=f"a factor of {1 / statistics.pstdev(z.flatten().tolist()):.5g}",
            )


def _scale_shift(answer: Answer, g: Generator) -> None:
    z = _latents(g)
    one, two = (float(answer.call("scale_factor", v)) for v in (z, z + 5))
    if not math.isclose(one, two, rel_tol=1e-9):
        raise Wrong(
            f"scale_factor: with 5 added to all latents the factor goes from {one:.4g} to {two:.4g}; their spread has "
            "not changed"
        )
    half = float(answer.call("scale_factor", 2 * z))
    if not math.isclose(half, one / 2, rel_tol=1e-9):
        raise Wrong(f"scale_factor: latents twice as large take the factor from {one:.4g} to {half:.4g}, not to half")


def _scale_multiplies(answer: Answer, g: Generator) -> None:
    """z is not what the factor was measured on: one image, and all of them shifted."""
    for factor in (0.3, 2.5):
        z = _latents(g, 1) + 2
        for name, right, word in (("to_model", z * factor, "times"), ("from_model", z / factor, "divided by")):
            got = answer.call(name, z.clone(), factor)
            if close(plain(got), right, rtol=1e-9, atol=1e-9):
                continue
            named = {"z * factor": z * factor, "z / factor": z / factor, "z itself": z}
            found = next((f", it gave {n}" for n, v in named.items() if close(plain(got), v, rtol=1e-9)), "")
            slope = float((got * z).sum() / (z * z).sum()) if got.shape == z.shape else math.nan
            if not found and close(plain(got), slope * z, rtol=1e-6, atol=1e-9):
                found = f", it gave {slope:.5g} z"
            elif not found and got.shape == z.shape:
                found = f", it gave a mean of {float(got.mean()):.3g} and a std of {float(got.std()):.3g}"
            text = f"{name}: one image's latents, mean {float(z.mean()):.3g} and std {float(z.std()):.3g}"
            raise Wrong(f"{text}, and factor = {factor:g}{found}", expected=f"z {word} the factor")


def _scale_round(answer: Answer, g: Generator) -> None:
    z = _latents(g)
    factor = answer.call("scale_factor", z)
    there = answer.call("to_model", z.clone(), factor)
    variance = float(there.var(correction=0))
    if not math.isclose(variance, 1, rel_tol=1e-6):
        raise Wrong(f"to_model(z, scale_factor(z)) has the variance {variance:.5g}, not 1")
    back = answer.call("from_model", there.clone(), factor)
    if not close(plain(back), z, rtol=1e-6, atol=1e-9):
        slope = float((back * z).sum() / (z * z).sum())
        how = f": it is {slope:.4g} z" if close(plain(back), slope * z, rtol=1e-6, atol=1e-9) else ""
        raise Wrong(f"from_model(to_model(z, factor), factor) is not z{how}")


def _scale_probes(g: Generator) -> tuple:
    factor = 0.2 + 3 * torch.rand(9, generator=g, dtype=torch.float64)
    atoms = {"factor": factor, "(1 + factor)": 1 + factor, "(1 + factor^2)": 1 + factor**2}
    return [dict(factor=float(f)) for f in factor], atoms


def _up(z: Tensor, factor: float) -> Tensor:
    return z * factor


def _down(z: Tensor, factor: float) -> Tensor:
    return z / factor


def _scale_only(measure: Callable[[Tensor], Tensor]) -> tuple[Callable, Callable, Callable]:
    return (lambda z: measure(z).item(), _up, _down)


def _scale_moments(z: Tensor) -> float:
    z = z.double()
    return float(((z**2).mean() - z.mean() ** 2) ** -0.5)


def _scale_statistics(z: Tensor) -> float:
    return 1 / statistics.pstdev(z.flatten().tolist())


SCALE_FACTOR = Exercise(
    id="09.4",
    names=("scale_factor", "to_model", "from_model"),
    references=(scale_factor, to_model, from_model),
    inputs=_scale_inputs,
    formulas=(
        Formula("to_model", "to_model(z)", ("z",), "to_model(z) = factor*z", _scale_probes),
        Formula("from_model", "from_model(z)", ("z",), "from_model(z) = (1/factor)*z", _scale_probes),
    ),
    facts=(
        Fact("latents times the factor have variance 1", _scale_one, "one over what? Over all entries at once"),
        Fact("the factor depends on the spread alone", _scale_shift, "about the mean of all entries, not about 0"),
        Fact(
            "to_model multiplies by the factor that it is given, from_model divides",
            _scale_multiplies,
            "the factor is measured once, on many images, and stored; a batch has no say in it",
        ),
        Fact("there and back is z again, with variance 1 in between", _scale_round, "what does each of the two undo?"),
    ),
    mistakes=(
        Mistake(
            "multiplied and divided exchanged",
            "to_model divides by the factor and from_model multiplies: the round trip is right, but the model sees "
            "latents of the variance std^4, further from 1 than without any scaling.",
            (scale_factor, _down, _up),
        ),
        Mistake(
            "std for 1 / std",
            "scale_factor returns the standard deviation itself; the factor is what latents are multiplied by, one "
            "over it.",
            _scale_only(lambda z: z.std(correction=0)),
        ),
        Mistake(
            "the other convention throughout",
            "Your factor is the standard deviation, to_model divides and from_model multiplies: consistent, but the "
            "other way round than asked, and than any stored factor (0.18215 of Stable Diffusion) is meant.",
            (lambda z: z.std(correction=0).item(), _down, _up),
        ),
        Mistake(
            "variance for standard deviation",
            "You divide by the variance: latents of the variance v come out with variance 1 / v.",
            _scale_only(lambda z: 1 / z.var(correction=0)),
        ),
        Mistake(
            "about 0",
            "Your spread is measured about 0, not about the mean: where the latents are not centred the factor is too "
            "small.",
            _scale_only(lambda z: 1 / (z**2).mean().sqrt()),
        ),
        Mistake(
            "mean of the channels' factors",
            "You measure each channel on its own and average the factors: all entries together do not get unit "
            "variance.",
            _scale_only(lambda z: (1 / z.std(dim=(0, 2, 3), correction=0)).mean()),
        ),
        Mistake(
            "each channel about its own mean",
            "You measure the variance of each channel about its own mean: what the channels' means differ by is "
            "missing.",
            _scale_only(lambda z: 1 / z.var(dim=(0, 2, 3), correction=0).mean().sqrt()),
        ),
        Mistake(
            "mean of the images' factors",
            "You measure each image on its own and average: the variance between images is missing.",
            _scale_only(lambda z: (1 / z.std(dim=(1, 2, 3), correction=0)).mean()),
        ),
        Mistake(
            "one factor per channel",
            "You return one factor per channel; here it is one number for all of them.",
            (lambda z: 1 / z.std(dim=(0, 2, 3), correction=0), _up, _down),
        ),
        Mistake(
            "divided by n - 1",
            "You divide by n - 1, which is what std() does by default (correction=0 turns it off): with many images "
            "that is the same, here the factor comes out a little too small.",
            _scale_only(lambda z: 1 / z.std()),
        ),
        Mistake(
            "each batch by its own std",
            "to_model ignores the factor and divides by the spread of its own batch: the same image gets other latents "
            "in another batch, and from_model cannot take them back.",
            (scale_factor, lambda z, factor: z / z.std(correction=0), _down),
        ),
        Mistake(
            "centred, too",
            "to_model subtracts the batch's mean, which from_model does not know: the factor alone is meant.",
            (scale_factor, lambda z, factor: (z - z.mean()) * factor, _down),
        ),
        Mistake(
            "from_model does nothing",
            "from_model returns its argument: the decoder gets latents of unit variance, which it has never seen.",
            (scale_factor, _up, lambda z, factor: z),
        ),
        Mistake(
            "from_model multiplies",
            "from_model multiplies once more where it should divide: the latents go further away instead of back.",
            (scale_factor, _up, _up),
        ),
    ),
    alternatives=(
        (_scale_moments, torch.mul, torch.div),
        (_scale_statistics, lambda z, factor: factor * z, lambda z, factor: z * (1 / factor)),
    ),
    hints=(
        "One standard deviation over all entries, images and channels alike. And two functions that undo one another.",
        "1 / z.std(correction=0).item(); z * factor; z / factor.",
    ),
    hides=("autoencoder.Autoencoder.measure_scale", "data.measure_affine"),
)

# --- 09.5 ldm_train_step, ldm_sample ----------------------------------------------------------------------------------

_NULL = 13  # neither the largest label plus one, nor MNIST's 10
_SHAPE = (2, 2, 3)  # of a latent; images are (3, 4, 6)


@dataclass(frozen=True)
class Seen:
    """One call of an encoder or a decoder: its argument, what it made of it, and the state it was in."""

    given: Tensor
    out: Tensor
    training: bool
    graph: bool


class Halves(nn.Module):
    """Encoder: channels mixed, 2 x 2 pixels averaged. (b, 3, h, w) -> mean and log-variance (b, 2, h / 2, w / 2)."""

    def __init__(self, weight: Tensor, logvar: float = 1.0):
        super().__init__()
        self.weight, self.logvar, self.asked = nn.Parameter(weight), logvar, []

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = torch.einsum("dc,bchw->bdhw", self.weight.to(x.dtype), F.avg_pool2d(x, 2))
        self.asked.append(Seen(x.detach().clone(), mean.detach(), self.training, mean.requires_grad))
        return mean, 0 * mean + self.logvar


class Doubles(nn.Module):
    """Decoder: each latent spread over 2 x 2 pixels, channels mixed: (b, 2, h, w) -> (b, 3, 2 h, 2 w)."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight, self.asked = nn.Parameter(weight), []

    def forward(self, z: Tensor) -> Tensor:
        large = z.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        out = 0.5 + torch.einsum("cd,bdhw->bchw", self.weight.to(z.dtype), large)
        self.asked.append(Seen(z.detach().clone(), out.detach(), self.training, out.requires_grad))
        return out


# ldm_train_step without its encoder is train_step of lesson 02, and is looked at as that


class AsPixels(nn.Module):
    """The model for a learner who trains on latents (b, n, 1, 1), where lesson 02's has x of any shape."""

    def __init__(self, model: nn.Module, shape: Sequence[int]):
        super().__init__()
        self.model, self.shape, self.null = model, shape, model.null

    def forward(self, z: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.model(z.reshape(self.shape), t, y).reshape(z.shape)


class Nothing(nn.Module):
    """An encoder that changes nothing and is sure of it."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, torch.full_like(x, -80.0)


class AsTrainStep:
    """An ldm_train_step behind the signature of lesson 02's train_step."""

    def __init__(self, answer: Answer):
        self.answer, self.reseed = answer, answer.reseed

    def __call__(self, model, opt, x0, y, p, abar, gen) -> object:
        flat = x0.reshape(len(x0), -1, 1, 1)
        pixels = AsPixels(model, x0.shape).train(model.training)
        return self.answer.call("ldm_train_step", pixels, Nothing().eval(), 1.0, opt, flat, y, p, abar, gen)


def _from_02(name: str, hint: str = "") -> Fact:
    """A fact of exercise 02.4, about ldm_train_step."""
    fact = next(fact for fact in TRAIN_STEP.facts if fact.name == name)

    def test(answer: Answer, g: Generator) -> None:
        try:
            fact.test(AsTrainStep(answer), g)
        except Wrong as wrong:
            text = f"ldm_train_step, with an encoder that changes nothing and factor = 1: {wrong}"
            raise Wrong(text, expected=wrong.expected) from None

    return Fact(f"training: {name}", test, hint or fact.hint)


def _encoded(
    answer: Answer, g: Generator, factor: float, logvar: float = 1.0, shift: float = 0.0, n: int = 6
) -> tuple[Halves, Spy, object]:
    """One training step on n images; equal states of g give equal steps, but for logvar and shift."""
    encoder, model = Halves(randn(g, 2, 3), logvar).train(), Spy(g, null=_NULL)
    x0, y = randn(g, n, 3, 4, 6) + shift, torch.arange(n) % 6
    opt, gen = torch.optim.SGD(model.parameters(), lr=0.1), _gen(g)
    loss = answer.call("ldm_train_step", model, encoder, factor, opt, x0, y, 0.2, _train_table(), gen)
    if not encoder.asked:
        raise Wrong("ldm_train_step: the encoder was not called")
    if not close(plain(encoder.asked[0].given), x0):
        raise Wrong("ldm_train_step: the encoder was given other images than x0")
    if not model.asked:
        raise Wrong("ldm_train_step: the model was not called")
    return encoder, model, loss


def _train_table() -> Tensor:
    return torch.linspace(1, 0.1, 9, dtype=torch.float64)


def _again(g: Generator) -> Generator:
    return Generator().set_state(g.get_state())


def _train_scaled(answer: Answer, g: Generator) -> None:
    """The image moved under the same random numbers: the noise stays, so that the share of the latents shows."""
    factor, abar = (0.4, 2.5)[integer(g, 0, 1)], _train_table()
    one, model = _encoded(answer, _again(g), factor)[:2]
    two, other = _encoded(answer, _again(g), factor, shift=1.0)[:2]
    zt, due = model.asked[0].xt, one.asked[0].out
    if zt.shape != due.shape:
        what = "these are pixels: " if zt.shape == one.asked[0].given.shape else ""
        raise Wrong(
            f"images {tuple(one.asked[0].given.shape)} have latents {tuple(due.shape)}, and the model was given "
            f"{what}{tuple(zt.shape)}"
        )
    signal = pad(abar[model.asked[0].t].sqrt(), zt)
    share = (other.asked[0].xt - zt) / (signal * (two.asked[0].out - due))
    if close(share, torch.full_like(share, factor), rtol=1e-4):
        return
    if not share.std() < 1e-4:
        raise Wrong("what the model was given is not sqrt(abar_t) times the encoder's mean, plus noise")
    value = float(share.mean())
    named = {"1": 1.0, "1 / factor": 1 / factor, "factor^2": factor**2, "0": 0.0}
    found = next((n for n, v in named.items() if math.isclose(value, v, rel_tol=1e-4, abs_tol=1e-6)), f"{value:.4g}")
    raise Wrong(
        f"factor = {factor:g}: the encoder's mean reaches the model as sqrt(abar_t) times {found}", expected="factor"
    )


def _train_noise(answer: Answer, g: Generator) -> None:
    factor = (0.4, 2.5)[integer(g, 0, 1)]
    var = _noise_variance(*_encoded(answer, g, factor, n=300)[:2], factor)
    if abs(var - 1) > 0.25:
        times = ", which is factor^2" if abs(math.log(var / factor**2)) < 0.25 else ""
        raise Wrong(
            f"factor = {factor:g}: the noise in z_t has a variance of {var:.3f} (1 - abar_t){times}; the factor is for "
            "the latents, and the noise is standard normal",
            expected="1 - abar_t",
        )


def _noise_variance(encoder: Halves, model: Spy, share: float) -> float:
    """Of what is left of z_t without its latents, over 1 - abar_t."""
    zt, signal = model.asked[0].xt, _train_table()[model.asked[0].t]
    if zt.shape != encoder.asked[0].out.shape:
        raise Wrong(f"the model was given {tuple(zt.shape)}; latents are {tuple(encoder.asked[0].out.shape)}")
    rest = zt - share * pad(signal.sqrt(), zt) * encoder.asked[0].out
    return float((rest / pad((1 - signal).sqrt(), zt)).var())


def _train_mean(answer: Answer, g: Generator) -> None:
    """Encoders that differ in their log-variance alone."""
    zts = [_encoded(answer, _again(g), 0.5, logvar)[1].asked[0].xt for logvar in (1.0, -4.0)]
    if zts[0].shape == zts[1].shape and not close(zts[0], zts[1], rtol=1e-6):
        raise Wrong(
            "with another log-variance of the encoder, and the same mean, the model is given other latents: train on "
            "the mean"
        )


def _train_frozen(answer: Answer, g: Generator) -> None:
    g_ = _again(g)
    encoder = _encoded(answer, g, 0.5)[0]
    if any(seen.training for seen in encoder.asked):
        raise Wrong("the encoder came in train mode and was asked in it: dropout and batch statistics change latents")
    if encoder.weight.grad is not None and encoder.weight.grad.any():
        raise Wrong("the loss left gradients in the encoder: it is trained already, and must not follow the model")
    if not close(plain(encoder.weight), randn(g_, 2, 3), rtol=0, atol=0):
        raise Wrong("the encoder's weights have changed")


class KnowsLatents(Recorder):
    """Knows one latent per label, null among them: predicts the eps that makes z_t of it."""

    def __init__(self, points: Tensor, abar: Tensor):
        super().__init__()
        self.points, self.abar, self.null = points, abar, _NULL
        self.gain = nn.Parameter(torch.ones(()))

    def answer(self, xt: Tensor, t: Tensor, y: Tensor) -> Tensor:
        a = pad(self.abar[t.round().long().clamp(0, len(self.abar) - 1)], xt)
        eps = (xt.double() - a.sqrt() * self.points[y]) / (1 - a).sqrt().clamp(min=1e-6)
        return (self.gain * eps).to(xt.dtype)


class GaussianLatents(Recorder):
    """The best eps network where the latents of each class are N(0, variances[y]) in every entry, null among them."""

    def __init__(self, variances: Tensor, abar: Tensor):
        super().__init__()
        self.variances, self.abar, self.null = variances, abar, _NULL
        self.gain = nn.Parameter(torch.ones(()))

    def answer(self, xt: Tensor, t: Tensor, y: Tensor) -> Tensor:
        a = pad(self.abar[t.long()], xt)
        eps = (1 - a).sqrt() * xt.double() / (a * pad(self.variances[y], xt) + 1 - a)
        return (self.gain * eps).to(xt.dtype)


def _table(T: int) -> Tensor:
    """DDPM's betas, stretched to T steps: next to nothing is left of z_0 at T."""
    betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * (1000 / T)
    return torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0)])


def _known(
    answer: Answer, g: Generator, scale: float = 2.5, steps: int = 6, factor: float = 0.4, seed: int | None = None
) -> tuple[KnowsLatents, Doubles, Tensor, Tensor]:
    """Model and decoder after sampling from them, the labels, and the images."""
    abar = _table(61 + integer(g, 0, 1))
    model = KnowsLatents(2 * randn(g, _NULL + 1, *_SHAPE), abar).eval()
    decoder = Doubles(randn(g, 3, 2)).eval()
    y, gen = torch.randperm(9, generator=g)[:5], _gen(g) if seed is None else Generator().manual_seed(seed)
    out = answer.call("ldm_sample", model, decoder, factor, y, scale, steps, _SHAPE, abar, gen)
    if not model.asked:
        raise Wrong("ldm_sample: the model was not called")
    return model, decoder, y, out


def _by_time(asked: Sequence[Asked]) -> list[tuple[int, list[int], Tensor]]:
    """Calls at one time after the other, however they are batched: time, labels in order, the z of the first call."""
    found: list[tuple[int, list[int], Tensor]] = []
    for one in asked:
        t = int(one.t.reshape(-1)[0])
        if found and found[-1][0] == t:
            found[-1][1].extend(one.y.tolist())
        else:
            found.append((t, one.y.tolist(), one.xt))
    return [(t, sorted(labels), xt) for t, labels, xt in found]


def _sample_times(answer: Answer, g: Generator) -> None:
    steps = (6, 9)[integer(g, 0, 1)]
    model = _known(answer, g, steps=steps)[0]
    T = len(model.abar) - 1
    if model.asked[0].t.is_floating_point():
        raise Wrong(f"the model was given t as {model.asked[0].t.dtype}: in training t was an integer")
    if any((one.t != one.t[0]).any() for one in model.asked):
        raise Wrong("within one evaluation the examples have different t: they all go down together")
    seen, due = [t for t, _, _ in _by_time(model.asked)], [round(T * (steps - i) / steps) for i in range(steps)]
    if seen != due:
        text = f"T = {T}, {steps} steps: the model was asked at t = {', '.join(map(str, seen))}"
        raise Wrong(text, expected=", ".join(map(str, due)))


def _sample_labels(answer: Answer, g: Generator) -> None:
    for scale, what in ((2.5, "both"), (1.0, "class"), (0.0, "null")):
        model, _, y, _ = _known(answer, g, scale=scale)
        due = {"both": sorted([*y.tolist(), *[_NULL] * len(y)]), "class": sorted(y.tolist()), "null": [_NULL] * len(y)}
        for t, labels, _ in _by_time(model.asked):
            if labels not in (due[what], due["both"]):
                raise Wrong(
                    f"scale {scale:g}, t = {t}: the model was asked for the labels {labels}; wanted are "
                    f"{y.tolist()} and, for each, model.null = {_NULL}"
                )


def _sample_noise(answer: Answer, g: Generator) -> None:
    z = torch.stack([_known(answer, g, steps=1)[0].asked[0].xt.double()[:5] for _ in range(60)])
    if z.shape[1:] != (5, *_SHAPE):
        raise Wrong(f"the first z has shape {tuple(z.shape[1:])}; 5 labels and shape {_SHAPE} make {(5, *_SHAPE)}")
    if (z[:, 1:] == z[:, :1]).all():
        raise Wrong("all images start from one noise: each needs its own")
    if (z[1:] == z[:1]).all():
        raise Wrong("the noise is the same whatever the state of gen: draw it with generator=gen")
    n, mean, var = z.numel(), float(z.mean()), float(z.var())
    if abs(mean) > 7 * math.sqrt(var / n) or abs(var - 1) > 7 * math.sqrt(2 / n):
        raise Wrong(
            f"factor = 0.4: z at t = T has mean {mean:.3f} and variance {var:.3f}, not 0 and 1: the model knows scaled "
            "latents, whose noise is standard normal"
        )


def _sample_decoded(answer: Answer, g: Generator) -> None:
    model, decoder, y, out = _known(answer, g)
    if len(decoder.asked) != 1:
        often = "not called" if not decoder.asked else f"called {len(decoder.asked)} times"
        raise Wrong(
            f"6 steps: the decoder was {often}; the sampler stays in latent space, and decodes once, at the end"
        )
    (seen,) = decoder.asked
    if seen.given.shape != (len(y), *_SHAPE):
        raise Wrong(f"the decoder was given {tuple(seen.given.shape)}; the latents are {(len(y), *_SHAPE)}")
    if not isinstance(out, Tensor) or out.shape != seen.out.shape or not close(plain(out), seen.out, rtol=1e-6):
        raise Wrong("what you return is not what the decoder made")
    if seen.graph or any(one.graph for one in model.asked):
        raise Wrong("model or decoder are evaluated with autograd on: memory grows with every step")
    if {one.xt.dtype for one in model.asked} | {seen.given.dtype} != {torch.float32}:
        raise Wrong("z became float64 on its way (the table abar is): networks of float32 weights refuse that")


def _sample_arrives(answer: Answer, g: Generator) -> None:
    """Where one latent is known for each label, every step of DDIM is exact, guided or not, and so is the end."""
    for scale, factor in ((2.5, 0.4), (0.0, 1.7), (1.0, 0.4)):
        model, decoder, y, _ = _known(answer, g, scale=scale, factor=factor)
        z_label, z_null = model.points[y], model.points[_NULL].expand(len(y), *_SHAPE)
        goal, noise = (1 - scale) * z_null + scale * z_label, model.asked[0].xt[: len(y)].double()
        knows = (
            f"scale = {scale:g}, factor = {factor:g}: the model knows a latent z_label for each label and one for null"
        )
        if not decoder.asked or decoder.asked[-1].given.shape != goal.shape or noise.shape != goal.shape:
            raise Wrong(f"{knows}; nothing of the shape {tuple(goal.shape)} has arrived at the decoder")
        got = decoder.asked[-1].given.double()
        if not close(got, goal / factor, rtol=1e-3, atol=1e-3):
            made = _sum_of(got, z_label=z_label, z_null=z_null, noise=noise)
            cut = " (nothing is beyond [-1, 1]: is z clamped?)" if (got * factor).abs().max() < 1.001 else ""
            due = f"({_term(1 - scale, 'z_null')} + {_term(scale, 'z_label')}) / factor"
            raise Wrong(f"{knows}; the decoder was given {made}{cut}", expected=due)
        a = model.abar
        for t, _, z in _by_time(model.asked):
            z = z[: len(y)].double()
            sigma = float((1 - a[t]).sqrt())
            start = (noise - a[-1].sqrt() * goal) / (1 - a[-1]).sqrt()
            if not close(z, a[t].sqrt() * goal + sigma * start, rtol=1e-3, atol=1e-3):
                raise Wrong(f"{knows}; the end is right, but at t = {t} z is not sqrt(abar) z_0 + sqrt(1 - abar) eps")


def _sample_weights(answer: Answer, g: Generator) -> None:
    """After one step z is a sum of what is known of the label, of null, and of the noise, which gives the weights away.

    Where the step itself is wrong, the weights' sum does not fit the noise, and other facts say so.
    """
    for scale in (2.5, 0.0, 1.0):
        model, _, y, _ = _known(answer, g, scale=scale, steps=2)
        asked = _by_time(model.asked)
        first, second = (one[2][: len(y)].double() for one in (asked[0], asked[-1]))
        parts = model.points[y], model.points[_NULL].expand(len(y), *_SHAPE), first
        if len(asked) != 2 or any(z.shape != parts[0].shape for z in (first, second)):
            return
        design = torch.stack([part.flatten() for part in parts], dim=1)
        fit = torch.linalg.lstsq(design, second.flatten()[:, None]).solution[:, 0]
        if (design @ fit - second.flatten()).abs().max() > 1e-3 * (1 + second.abs().max()):
            return
        at, as_ = model.abar[asked[0][0]], model.abar[asked[1][0]]
        kept, left = (as_ / at).sqrt(), ((1 - as_) / (1 - at)).sqrt()
        on_c, on_u = (float(v / (as_.sqrt() - left * at.sqrt())) for v in fit[:2])
        total = float((fit[2] - kept) / (left - kept))
        if abs(total - on_c - on_u) < 0.02 and abs(on_c - scale) + abs(on_u - 1 + scale) > 0.02:
            terms = [f"{w:.2f} {name}" for w, name in ((on_c, "eps(label)"), (on_u, "eps(null)")) if abs(w) > 5e-3]
            due = f"{scale:g} eps(label) + {1 - scale:g} eps(null)"
            raise Wrong(f"scale = {scale:g}: your guided eps is {' + '.join(terms).replace('+ -', '- ')}", expected=due)


def _sample_gaussian(answer: Answer, g: Generator) -> None:
    """Guided DDIM shrinks N(0, 1) to N(0, V) with V = V_null^(1 - scale) V_label^scale, when the steps are small.

    From d(z / a) = eps d(sigma / a), where eps is linear in z: logarithms of the two ways from T to 0 are mixed with
    the weights 1 - scale and scale.
    """
    abar, factor, scale = _table(300), 0.5, (1.0, 2.0, 3.0)[integer(g, 0, 2)]
    variances = torch.full((_NULL + 1,), 0.9, dtype=torch.float64)
    variances[:3] = torch.tensor([0.5, 0.7, 1.4])
    model, decoder, y = GaussianLatents(variances, abar).eval(), Doubles(randn(g, 3, 2)).eval(), torch.arange(3)
    out = answer.call("ldm_sample", model, decoder, factor, y, scale, 300, _SHAPE, abar, _gen(g))
    if not model.asked:
        raise Wrong("ldm_sample: the model was not called")
    noise, end = model.asked[0].xt[:3].double(), float(abar[-1])
    shrink = (variances / (end * variances + 1 - end)).sqrt()
    z0 = pad(shrink[_NULL] ** (1 - scale) * shrink[y] ** scale, noise) * noise
    due = Doubles(decoder.weight.detach())(z0 / factor).detach()
    if out.shape != due.shape:
        raise Wrong(f"images have the shape {tuple(out.shape)} where {tuple(due.shape)} is due")
    off = float((plain(out).double() - due).norm() / due.norm())
    if not off < 0.04:
        raise Wrong(
            f"Gaussian latents, scale = {scale:g}, a network that is best possible, a linear decoder: your images are "
            f"{off:.0%} away from where small steps lead"
        )


def _ldm_inputs(g: Generator) -> dict:
    model = Spy(g, null=_NULL)
    train = dict(
        model=model,
        encoder=Halves(randn(g, 2, 3)).eval(),
        factor=0.4,
        opt=torch.optim.SGD(model.parameters(), lr=0.1),
        x0=randn(g, 5, 3, 4, 6),
        y=torch.randperm(9, generator=g)[:5],
        p=0.5,
        abar=random_abar(g),
        gen=_gen(g),
    )
    abar = _table(31)
    sample = dict(
        model=GaussianLatents(0.3 + torch.rand(_NULL + 1, generator=g, dtype=torch.float64), abar).eval(),
        decoder=Doubles(randn(g, 3, 2)).eval(),
        factor=0.4,
        y=torch.randperm(9, generator=g)[:5],
        scale=2.5,
        steps=4,
        shape=_SHAPE,
        abar=abar,
        gen=_gen(g),
    )
    return {"ldm_train_step": train, "ldm_sample": sample}


def _encode(encoder: nn.Module, x0: Tensor, factor: float, gen: Generator) -> Tensor:
    encoder.eval()
    with torch.no_grad():
        return encoder(x0)[0] * factor


def _encode_by(
    change: Callable[[Tensor, float], Tensor] = lambda z, factor: z * factor,
    ready: Callable[[nn.Module], object] = lambda encoder: encoder.eval(),
    no_grad: bool = True,
    sampled: bool = False,
) -> Callable:
    def encode(encoder: nn.Module, x0: Tensor, factor: float, gen: Generator) -> Tensor:
        ready(encoder)
        with torch.set_grad_enabled(not no_grad):
            mean, logvar = encoder(x0)
            if sampled:
                mean = mean + (logvar / 2).exp() * torch.randn(mean.shape, generator=gen, dtype=mean.dtype)
            return change(mean, factor)

    return encode


def _encode_second(encoder: nn.Module, x0: Tensor, factor: float, gen: Generator) -> Tensor:
    encoder.eval()
    with torch.no_grad():
        return encoder(x0)[1] * factor


def _pixels(encoder: nn.Module, x0: Tensor, factor: float, gen: Generator) -> Tensor:
    encoder.eval()
    with torch.no_grad():
        encoder(x0)
    return x0


def _ldm_train_by(
    encode: Callable = _encode,
    low: int = 1,
    one_t: bool = False,
    drop: bool = True,
    target: Callable[[Tensor, Tensor], Tensor] = lambda eps, z0: eps,
    zero: bool = True,
    noise: Callable[[float], float] = lambda factor: 1.0,
    sigma: Callable[[Tensor], Tensor] = lambda a: (1 - a).sqrt(),
) -> tuple[Callable, Callable]:
    def ldm_train_step(model, encoder, factor, opt, x0, y, p, abar, gen):
        z0 = encode(encoder, x0, factor, gen)
        abar, n = abar.to(z0), len(z0)
        t = torch.randint(low, len(abar), (1 if one_t else n,), generator=gen).expand(n)
        eps = torch.randn(z0.shape, generator=gen, dtype=z0.dtype)
        zt = pad(abar[t].sqrt(), z0) * z0 + noise(factor) * pad(sigma(abar[t]), z0) * eps
        gone = (torch.rand(y.shape, generator=gen) < p) & drop
        loss = F.mse_loss(model(zt, t, torch.where(gone, model.null, y)), target(eps, z0))
        if zero:
            opt.zero_grad()
        loss.backward()
        opt.step()
        return loss.item()

    return ldm_train_step, ldm_sample


def _ldm_sample_by(
    mix: Callable[[Tensor, Tensor, float], Tensor] = lambda u, c, s: u + s * (c - u),
    null: Callable[[nn.Module, Tensor], Tensor] = lambda model, y: torch.full_like(y, model.null),
    clip: float = math.inf,
    unscale: Callable[[Tensor, float], Tensor] = lambda z, factor: z / factor,
    noise: Callable[..., Tensor] = lambda n, shape, gen, factor: torch.randn(n, *shape, generator=gen),
    grid: Callable[[int, int], Tensor] = lambda T, steps: torch.linspace(T, 0, steps + 1),
    last: int = 0,
    no_grad: bool = True,
    decode: bool = True,
    each: bool = False,
    fresh: bool = False,
) -> tuple[Callable, Callable]:
    def ldm_sample_(model, decoder, factor, y, scale, steps, shape, abar, gen):
        with torch.set_grad_enabled(not no_grad):
            z = noise(len(y), shape, gen, factor)
            times = grid(len(abar) - 1, steps).round().long().tolist()
            images = None
            for t, s in pairwise(times):
                s, now = max(s, last), torch.full_like(y, t)
                eps = mix(model(z, now, null(model, y)), model(z, now, y), scale)
                z0 = ((z - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()).clamp(-clip, clip)
                if each:
                    images = decoder(unscale(z0, factor))
                if fresh:
                    eps = torch.randn(z.shape, generator=gen)
                z = abar[s].sqrt() * z0 + (1 - abar[s]).sqrt() * eps
            return images if each else decoder(unscale(z, factor)) if decode else unscale(z, factor)

    return ldm_train_step, ldm_sample_


def _train_detached(model, encoder, factor, opt, x0, y, p, abar, gen):
    """The graph cut afterwards, the optimiser's gradients cleared at the end, labels first."""
    was = encoder.training
    encoder.train(False)
    z0 = (factor * encoder(x0)[0]).detach()
    encoder.train(was)
    gone = torch.bernoulli(torch.full(y.shape, float(p)), generator=gen).bool()
    noise = torch.empty_like(z0).normal_(generator=gen)
    angle = torch.acos(abar.sqrt()).to(z0)
    t = 1 + (torch.rand(len(z0), generator=gen) * (len(abar) - 1)).long()
    zt = torch.einsum("b,b...->b...", angle[t].cos(), z0) + torch.einsum("b,b...->b...", angle[t].sin(), noise)
    loss = (model(zt, t, y.masked_fill(gone, model.null)) - noise).pow(2).mean()
    model.zero_grad()
    opt.zero_grad()
    loss.backward()
    opt.step()
    return float(loss.detach())


def _train_inference(model, encoder, factor, opt, x0, y, p, abar, gen):
    with torch.inference_mode():
        mean, _ = encoder.eval()(x0)
    z0 = mean.clone() * factor
    rows = []
    eps = torch.stack([torch.randn(z.shape, generator=gen, dtype=z.dtype) for z in z0])
    t = torch.tensor([1 + int(torch.randint(len(abar) - 1, (), generator=gen)) for _ in z0])
    for n, z, e in zip(t.tolist(), z0, eps, strict=True):
        rows.append(math.sqrt(float(abar[n])) * z + math.sqrt(1 - float(abar[n])) * e)
    labels = torch.tensor([model.null if torch.rand((), generator=gen) < p else int(label) for label in y])
    opt.zero_grad()
    loss = F.mse_loss(eps, model(torch.stack(rows), t, labels))
    loss.backward()
    opt.step()
    return loss.item()


def _sample_doubled(model, decoder, factor, y, scale, steps, shape, abar, gen):
    """Both labels in one batch; z / a and sigma / a, in which a step is a shift."""
    z = torch.stack([torch.randn(shape, generator=gen) for _ in y])
    T, labels = len(abar) - 1, torch.cat([y, y * 0 + model.null])
    slope = ((1 - abar) / abar).sqrt().float()
    a, t = abar.sqrt().float(), T
    with torch.no_grad():
        for i in range(steps):
            s = round(T * (steps - 1 - i) / steps)
            on_c, on_u = model(torch.cat([z, z]), torch.tensor([t]).repeat(2 * len(y)), labels).chunk(2)
            z = a[s] * (z / a[t] + (slope[s] - slope[t]) * (scale * on_c + (1 - scale) * on_u))
            t = s
        return decoder(from_model(z, factor))


@torch.inference_mode()
def _sample_frugal(model, decoder, factor, y, scale, steps, shape, abar, gen):
    """The network is asked only where the scale needs it, in eval mode, which is given back."""
    modes = [(m, m.training) for m in (*model.modules(), *decoder.modules())]
    model.eval(), decoder.eval()
    z = torch.empty(len(y), *shape).normal_(generator=gen)
    table, null = abar.tolist(), y.new_full(y.shape, model.null)
    times = torch.linspace(len(abar) - 1, 0, steps + 1).round().int().tolist()
    for t, s in pairwise(times):
        now, eps = y.new_full(y.shape, t), 0.0
        if scale != 1:
            eps = (1 - scale) * model(z, now, null)
        if scale != 0:
            eps = eps + scale * model(z, now, y)
        z0 = (z - math.sqrt(1 - table[t]) * eps) / math.sqrt(table[t])
        z = math.sqrt(table[s]) * z0 + math.sqrt(1 - table[s]) * eps
    images = decoder(z * (1 / factor))
    for m, mode in modes:
        m.training = mode
    return images.clone()


def _ldm_see(answer: Answer, g: Generator) -> object:
    """Categories, the same for all answers with one mistake, in whatever order they draw."""
    return [_see(_train_see, answer, g), _see(_sample_see, answer, g)]


def _see(look: Callable[[Answer, Generator], object], answer: Answer, g: Generator) -> object:
    try:
        return look(answer, g)
    except (Wrong, Failed) as error:
        return str(error).partition("\n")[0]


def _train_see(answer: Answer, g: Generator) -> object:
    factor, abar = 0.4, _train_table()
    answer.reseed(1)
    (one, model, _), (two, other, _) = (_encoded(answer, _again(g), factor, shift=by) for by in (0.0, 1.0))
    sure = _encoded(answer, _again(g), factor, logvar=-4.0)[1]
    zt, signal = model.asked[0].xt, pad(abar[model.asked[0].t].sqrt(), model.asked[0].xt)
    seen = dict(
        shape=list(zt.shape[1:]),
        training=[any(e.asked[i].training for i in range(len(e.asked))) for e in (one, two)],
        graph=one.weight.grad is not None and bool(one.weight.grad.any()),
    )
    gap = (zt - sure.asked[0].xt) / signal
    seen["sampled"] = "no" if close(gap, 0 * gap, atol=1e-6) else "shifted" if gap.std() < 1e-6 else "yes"
    if zt.shape == one.asked[0].out.shape:
        share = (other.asked[0].xt - zt) / (signal * (two.asked[0].out - one.asked[0].out))
        seen["share"] = round(float(share.mean()), 2) if share.std() < 1e-4 else "varies"
        if isinstance(seen["share"], float):
            var = _noise_variance(*_encoded(answer, _again(g), factor, logvar=-80.0, n=300)[:2], seen["share"])
            seen["noise"] = min((factor**2, 0.5, 1.0), key=lambda v: abs(math.log(v / var)))
    return [seen, TRAIN_STEP.probe(AsTrainStep(answer), g)]


def _sample_see(answer: Answer, g: Generator) -> object:
    seed, state, seen = integer(g, 0, 10**6), g.get_state(), []
    first = []
    for noise, gen, scale in ((1, seed, 2.5), (2, seed, 2.5), (1, seed + 1, 2.5), (1, seed, 0.0), (1, seed, 1.0)):
        answer.reseed(noise)
        model, decoder, y, out = _known(answer, g.set_state(state), scale=scale, seed=gen)
        noise_ = model.asked[0].xt[: len(y)].double()
        z_label, z_null = model.points[y], model.points[_NULL].expand(len(y), *_SHAPE)
        first.append(noise_)
        steps = _by_time(model.asked)  # however many calls a step takes
        second = steps[min(1, len(steps) - 1)][2][: len(y)].double()
        seen.append(
            dict(
                times=[t for t, _, _ in steps],
                labels=[labels for _, labels, _ in steps] if scale == 2.5 else None,
                graph=isinstance(out, Tensor) and out.requires_grad,
                decoded=len(decoder.asked),
                ends=_end(out, z_label, z_null, noise_, decoder),
                one_noise=bool((noise_[1:] == noise_[:1]).all()),
                second=_shares(second, z_label, z_null, noise_),
            )
        )
    var = float(torch.stack(first).var())
    seen.append(min((0.16, 1.0, 6.25), key=lambda v: abs(math.log(v / var))))
    return [*seen, close(first[0], first[1]), close(first[0], first[2])]


def _end(out: Tensor, z_label: Tensor, z_null: Tensor, noise: Tensor, decoder: Doubles) -> object:
    """The shares that the returned images, or what else it is, have in what the model knows."""
    kind, flat = "latents", out.detach().double()
    if decoder.asked:
        kind = "images" if close(plain(out), decoder.asked[-1].out, rtol=1e-6) else "other"
        flat = decoder.asked[-1].given.double()
    return [kind, _shares(flat, z_label, z_null, noise)]


def _shares(z: Tensor, *parts: Tensor) -> object:
    """What a latent is made of, rounded."""
    if z.shape != parts[0].shape or parts[-1].shape != z.shape:
        return list(z.shape)
    design = torch.stack([part.flatten() for part in parts], dim=1)
    fit = torch.linalg.lstsq(design, z.flatten()[:, None]).solution[:, 0]
    exact = (design @ fit - z.flatten()).abs().max() < 1e-3 * (1 + z.abs().max())
    return [round(float(v), 1) + 0.0 for v in fit] if exact else "no sum of these"


LDM = Exercise(
    by_probe=True,
    without=("keeps the dtype of its inputs",),  # z is drawn in float32
    id="09.5",
    names=("ldm_train_step", "ldm_sample"),
    references=(ldm_train_step, ldm_sample),
    inputs=_ldm_inputs,
    changes=("model", "opt", "gen"),
    kind="training",
    points=3,
    facts=(
        Fact(
            "training: the model sees latents times the factor, noised",
            _train_scaled,
            "encoder(x0)[0] * factor is what x0 was in lesson 02",
        ),
        Fact(
            "training: the noise is standard normal, whatever the factor",
            _train_noise,
            "first scale the latents, then noise them",
        ),
        Fact("training: latents are the encoder's mean", _train_mean, "the encoder returns two things"),
        Fact(
            "training: the encoder is in eval mode and gets no gradient",
            _train_frozen,
            "encoder.eval(), and torch.no_grad() around its call",
        ),
        _from_02("each example has its own t, uniform over 1 .. T"),
        _from_02("the model sees x0 noised to t", "the latents as x0, and standard normal noise of their shape"),
        _from_02("a share p of the labels that the model sees is null"),
        _from_02("the loss is the mean squared error of the noise"),
        _from_02("each step goes down the gradient of its own loss"),
        _from_02("works with float32 images and a float64 table"),
        Fact(
            "sampling: asks at `steps` integer times, from t = T down",
            _sample_times,
            "steps + 1 times make `steps` intervals; nothing is asked at t = 0",
        ),
        Fact("sampling: asks for the classes and for null", _sample_labels, "model.null, one for each image"),
        Fact(
            "sampling: guides as lesson 04 does, at every scale",
            _sample_weights,
            "scale 0 is unconditional, scale 1 conditional: which straight line goes through both?",
        ),
        Fact(
            "sampling: starts from standard normal noise of the latents' shape",
            _sample_noise,
            "torch.randn(len(y), *shape, generator=gen); the factor comes at the end",
        ),
        Fact(
            "sampling: decodes once, at the end, without a graph",
            _sample_decoded,
            "the loop knows latents only; torch.no_grad() around all of it",
        ),
        Fact(
            "sampling: the decoder gets the guided latent, unscaled",
            _sample_arrives,
            "the decoder has never seen scaled latents, and the model no others",
        ),
        Fact(
            "sampling: ends where Gaussian latents are known to end",
            _sample_gaussian,
            "estimate z_0, then noise it again, with the same guided eps",
        ),
    ),
    mistakes=(
        Mistake(
            "latents not scaled",
            "ldm_train_step trains on latents as the encoder makes them, without the factor: the schedule takes unit "
            "variance for granted, and the sampler divides by the factor in the end.",
            _ldm_train_by(_encode_by(lambda z, factor: z)),
        ),
        Mistake(
            "latents divided by the factor",
            "ldm_train_step divides the latents by the factor: they are multiplied before the model, and divided "
            "before the decoder.",
            _ldm_train_by(_encode_by(lambda z, factor: z / factor)),
        ),
        Mistake(
            "pixels are diffused",
            "ldm_train_step noises the images themselves: the diffusion happens in the latents, encoder(x0)[0] * "
            "factor.",
            _ldm_train_by(_pixels),
        ),
        Mistake(
            "the log-variance for the mean",
            "ldm_train_step takes the encoder's second output, the log-variance: the mean is the first.",
            _ldm_train_by(_encode_second),
        ),
        Mistake(
            "gradients reach the encoder",
            "The loss runs through the encoder (no torch.no_grad() around it): gradients pile up there, "
            "which costs time and memory, and an optimiser that holds the encoder would move it away from its decoder.",
            _ldm_train_by(_encode_by(no_grad=False)),
        ),
        Mistake(
            "encoder in train mode",
            "The encoder is asked in the mode it came in, train mode here: dropout and batch statistics make other "
            "latents of the same image each time.",
            _ldm_train_by(_encode_by(ready=lambda encoder: None)),
        ),
        Mistake(
            "a sample for the mean",
            "You train on a sample of the encoder's Gaussian, mean + std eps; here the latent is the mean.",
            _ldm_train_by(_encode_by(sampled=True)),
        ),
        Mistake(
            "noise scaled, too",
            "The noise is multiplied by the factor as well as the latents: only the latents are, so that both have "
            "unit variance.",
            _ldm_train_by(noise=lambda factor: factor),
        ),
        Mistake(
            "variance for standard deviation",
            "The noise is multiplied by its variance 1 - abar instead of the standard deviation.",
            _ldm_train_by(sigma=lambda a: 1 - a),
        ),
        Mistake(
            "t from 0",
            "t = 0 is among your times: there z_t is z_0 itself, and the noise to predict is not in it.",
            _ldm_train_by(low=0),
        ),
        Mistake(
            "one t per batch",
            "The whole batch has one t: each example needs its own.",
            _ldm_train_by(one_t=True),
        ),
        Mistake(
            "no label dropped",
            "The model never sees the null label: without it there is no unconditional prediction to guide with.",
            _ldm_train_by(drop=False),
        ),
        Mistake(
            "predicts the latents",
            "The prediction is compared with the latents; the sampler will take it for the noise.",
            _ldm_train_by(target=lambda eps, z0: z0),
        ),
        Mistake(
            "no zero_grad",
            "Gradients are never set to zero: each step moves by the sum of all gradients so far.",
            _ldm_train_by(zero=False),
        ),
        Mistake(
            "scaled latents decoded",
            "ldm_sample decodes scaled latents: the decoder knows them as the encoder made them, so divide by the "
            "factor first. It has never seen others.",
            _ldm_sample_by(unscale=lambda z, factor: z),
        ),
        Mistake(
            "multiplied by the factor before decoding",
            "ldm_sample multiplies by the factor before decoding, where it should divide: the latents are scaled "
            "twice.",
            _ldm_sample_by(unscale=lambda z, factor: z * factor),
        ),
        Mistake(
            "latents clamped",
            "The estimate of z_0 is clamped to [-1, 1]: pixels lie there, latents do not. They have unit variance, and "
            "a third of a Gaussian is beyond 1, so that their spread is clipped away.",
            _ldm_sample_by(clip=1.0),
        ),
        Mistake(
            "Ho and Salimans' scale",
            "You take eps_c + scale (eps_c - eps_u), where scale counts what is added to the conditional prediction: "
            "here 0 is unconditional and 1 conditional.",
            _ldm_sample_by(lambda u, c, s: c + s * (c - u)),
        ),
        Mistake(
            "class and null exchanged",
            "The predictions with and without the class are exchanged: you are guided away from the class.",
            _ldm_sample_by(lambda u, c, s: c + s * (u - c)),
        ),
        Mistake(
            "no null label",
            "The unconditional prediction is asked with the class, too: their difference is zero, and the scale has no "
            "effect.",
            _ldm_sample_by(null=lambda model, y: y),
        ),
        Mistake(
            "0 for null",
            "The unconditional prediction is asked with label 0, which is a class: null is model.null.",
            _ldm_sample_by(null=lambda model, y: torch.zeros_like(y)),
        ),
        Mistake(
            "noise divided by the factor",
            "ldm_sample starts from noise divided by the factor, as if the model knew latents before scaling: at t = T "
            "it has only ever seen unit variance.",
            _ldm_sample_by(noise=lambda n, shape, gen, factor: torch.randn(n, *shape, generator=gen) / factor),
        ),
        Mistake(
            "one noise for all",
            "All images start from one noise: each needs its own.",
            _ldm_sample_by(noise=lambda n, shape, gen, f: torch.randn(shape, generator=gen).expand(n, *shape)),
        ),
        Mistake(
            "noise not from gen",
            "The first noise does not come from gen: the same seed gives other images each time.",
            _ldm_sample_by(noise=lambda n, shape, gen, factor: torch.randn(n, *shape)),
        ),
        Mistake(
            "decoded at every step",
            "The decoder is called at every step: it costs as much each time, and only the last picture is kept.",
            _ldm_sample_by(each=True),
        ),
        Mistake(
            "latents returned",
            "ldm_sample returns latents: the decoder is never called.",
            _ldm_sample_by(decode=False),
        ),
        Mistake(
            "graph kept",
            "The graph of all steps is kept: memory grows with each step, and the images carry gradients.",
            _ldm_sample_by(no_grad=False),
        ),
        Mistake(
            "last step ends at 1",
            "The last step ends at t = 1, not at t = 0: the latents keep a little noise.",
            _ldm_sample_by(last=1),
        ),
        Mistake(
            "steps - 1 evaluations",
            "The model is asked at steps - 1 times: `steps` times have steps - 1 intervals between them.",
            _ldm_sample_by(grid=lambda T, steps: torch.linspace(T, 0, steps)),
        ),
        Mistake(
            "fresh noise",
            "You put back fresh noise instead of the predicted eps: that is not deterministic DDIM.",
            _ldm_sample_by(fresh=True),
        ),
    ),
    alternatives=((_train_detached, _sample_doubled), (_train_inference, _sample_frugal)),
    hints=(
        "Training is lesson 02's step with other data: which line makes the data? Sampling is lesson 02's loop with "
        "guidance, and one line after it.",
        "z0 = encoder(x0)[0] * factor under no_grad and in eval mode, then all as in 02.4. Sampling: as in 02.6 with "
        "eps_u + scale (eps_c - eps_u), then decoder(z / factor).",
    ),
    probe=_ldm_see,
    hides=(
        "samplers.ddim_step",
        "train.diffusion_loss",
        "schedules.add_noise",
        "train.drop",
        "guidance.cfg",
        "guidance.negative",
        "guidance.perp_neg",
        "guidance.apg",
    ),
)

# --- 09.6 compute_ledger ----------------------------------------------------------------------------------------------

_ENTRIES = ("encoder", "network", "decoder", "total")


def _ledger_inputs(g: Generator) -> dict:
    encoder, network, decoder = (1000 * integer(g, 100, 900) + 1 for _ in range(3))
    scale = (0.0, 1.0, 2.5, 4.0)[integer(g, 0, 3)]
    return {
        "compute_ledger": dict(encoder=encoder, network=network, decoder=decoder, steps=integer(g, 5, 60), scale=scale)
    }


def _ledger(answer: Answer, *args: object) -> dict[str, float]:
    """The learner's ledger. Raises Wrong for one that lacks an entry."""
    got = answer(*args)
    if not isinstance(got, Mapping):
        raise Wrong(f"it should return a dict, and returned {type(got).__name__}")
    missing = [name for name in _ENTRIES if name not in got]
    if missing or len(got) != len(_ENTRIES):
        raise Wrong(f"the entries are {', '.join(map(str, got))}; asked for are {', '.join(_ENTRIES)}")
    for name in _ENTRIES:
        if isinstance(got[name], bool) or not isinstance(got[name], int | float):
            raise Wrong(f"{name} is of type {type(got[name]).__name__}: FLOPs are whole numbers")
    return dict(got)


def _entry(got: Mapping[str, float], name: str, due: int, what: str) -> None:
    if got[name] != due:
        raise Wrong(f"{what}: {name} is {got[name]:,} FLOPs{_times(got[name], due)}", expected=f"{due:,}")


def _ledger_network(answer: Answer, g: Generator) -> None:
    """Right at scale 1 or at scale 3 is enough here: how many labels a scale needs is looked at on its own."""
    n = 1000 * integer(g, 1, 900)
    for macs, steps in ((1, 2), (1, 7), (n, 50)):
        if _ledger(answer, 0, macs, 0, steps, 3.0)["network"] != 4 * macs * steps:
            what = f"network = {macs:,} multiply-adds, {steps} steps, scale 1"
            _entry(_ledger(answer, 0, macs, 0, steps, 1.0), "network", 2 * macs * steps, what)


def _ledger_passes(answer: Answer, g: Generator) -> None:
    two, seven = (_ledger(answer, 10, 1000, 30, 25, scale)["network"] for scale in (2.0, 7.5))
    if two != seven:
        raise Wrong(
            f"network = 1000, 25 steps: {two:,} FLOPs at scale 2 and {seven:,} at scale 7.5; the scale is a weight, "
            "and does not count evaluations"
        )
    for scale, passes in ((2.0, 2), (7.5, 2), (1.0, 1), (0.0, 1), (0.5, 2), (-1.0, 2), (1, 1), (0, 1)):
        got = _ledger(answer, 10, 1000, 30, 25, scale)
        due = 2 * 1000 * 25 * passes
        if got["network"] != due and got["network"] in (due / 2, due * 2):
            asked = "both labels" if got["network"] * passes / due == 2 else "one label"
            raise Wrong(
                f"scale {scale:g}: you count {asked}, in eps_u + scale (eps_c - eps_u) this scale needs "
                f"{'both' if passes == 2 else 'only one of them'}"
            )
        _entry(got, "network", due, f"network = 1000, 25 steps, scale {scale:g}")


def _ledger_ends(answer: Answer, g: Generator) -> None:
    for steps, scale in ((10, 1.0), (40, 3.0)):
        d = integer(g, 100, 900)
        got = _ledger(answer, 7777, 100, d, steps, scale)
        what = f"encoder = 7777, decoder = {d}, {steps} steps, scale {scale:g}"
        _entry(got, "decoder", 2 * d, what)
        if got["encoder"] != 0:
            raise Wrong(f"{what}: the encoder is counted; drawing a picture starts from noise, which nobody encodes")


def _ledger_total(answer: Answer, g: Generator) -> None:
    got = _ledger(answer, *_ledger_inputs(g)["compute_ledger"].values())
    parts = got["encoder"] + got["network"] + got["decoder"]
    if got["total"] != parts:
        raise Wrong(f"total is {got['total']:,}, and the three parts make {parts:,}")


def _ledger_example(answer: Answer, g: Generator) -> None:
    """By hand: 50 steps of guided sampling with a network of 350 G, a decoder of 1240 G multiply-adds."""
    got = _ledger(answer, 540 * 10**9, 350 * 10**9, 1240 * 10**9, 50, 7.5)
    what = "a network of 350 G and a decoder of 1240 G multiply-adds, 50 steps, scale 7.5"
    _entry(got, "total", 72_480 * 10**9, what)


def _ledger_by(
    passes: Callable[[float], int] = lambda scale: 1 if scale in (0, 1) else 2,
    flops: int = 2,
    extra: int = 0,
    encoder: int = 0,
    decodes: Callable[[int, int], int] = lambda steps, passes: 1,
    total: Callable[[dict], int] = lambda parts: sum(parts.values()),
) -> tuple[Callable]:
    def compute_ledger_(e, n, d, steps, scale):
        k = passes(scale)
        parts = {
            "encoder": flops * e * encoder,
            "network": flops * n * (steps + extra) * k,
            "decoder": flops * d * decodes(steps, k),
        }
        return {**parts, "total": total(parts)}

    return (compute_ledger_,)


def _ledger_sum(encoder: int, network: int, decoder: int, steps: int, scale: float) -> dict[str, int]:
    asked = [w for w in (scale, 1 - scale) if w != 0]
    evaluations = sum(1 for _ in range(steps) for _ in asked)
    rows = [("encoder", 0 * encoder), ("network", evaluations * network * 2), ("decoder", decoder + decoder)]
    return dict([*rows, ("total", rows[1][1] + rows[2][1])])


def _ledger_if(encoder: int, network: int, decoder: int, steps: int, scale: float) -> dict[str, int]:
    ledger = {"total": 0, "decoder": 2 * decoder, "network": 2 * steps * network, "encoder": 0}
    if not (scale == 0.0 or scale == 1.0):
        ledger["network"] *= 2
    ledger["total"] = ledger["decoder"] + ledger["network"]
    return ledger


LEDGER = Exercise(
    id="09.6",
    names=("compute_ledger",),
    references=(compute_ledger,),
    inputs=_ledger_inputs,
    kind="value",
    facts=(
        Fact(
            "a multiply-add is two FLOPs, and each step counts",
            _ledger_network,
            "what is a multiply-add made of? And how often does the sampler ask?",
        ),
        Fact(
            "guidance doubles the network, unless the scale is 0 or 1",
            _ledger_passes,
            "with which weight does each of the two predictions enter?",
        ),
        Fact("the picture is decoded once, and nothing is encoded", _ledger_ends, "where does sampling start?"),
        Fact("the total is the sum of the three", _ledger_total, "add what you return"),
        Fact("a worked example", _ledger_example, "a hundred evaluations and one decoder"),
    ),
    mistakes=(
        Mistake(
            "decoder forgotten",
            "The decoder is not in the ledger: it works at full "
            "resolution, and the fewer the steps, the more it weighs.",
            _ledger_by(decodes=lambda steps, passes: 0),
        ),
        Mistake(
            "decoder not in the total",
            "The decoder is listed, but is missing from the total.",
            _ledger_by(total=lambda parts: parts["network"]),
        ),
        Mistake(
            "guidance not counted",
            "You count one evaluation per step: guidance asks the network twice, with the class and with null.",
            _ledger_by(passes=lambda scale: 1),
        ),
        Mistake(
            "always two passes",
            "You count two evaluations per step at every scale: at scale 0 the class, and at scale 1 null, has the "
            "weight 0 and need not be asked.",
            _ledger_by(passes=lambda scale: 2),
        ),
        Mistake(
            "two passes at scale 0",
            "You count two evaluations at scale 0, where only the null label is needed.",
            _ledger_by(passes=lambda scale: 1 if scale == 1 else 2),
        ),
        Mistake(
            "two passes at scale 1",
            "You count two evaluations at scale 1, where only the class is needed: it is 0 that is unconditional here.",
            _ledger_by(passes=lambda scale: 1 if scale == 0 else 2),
        ),
        Mistake(
            "two passes above 1 only",
            "You count one evaluation for every scale up to 1; between 0 and 1, and below 0, both labels are needed, "
            "too.",
            _ledger_by(passes=lambda scale: 2 if scale > 1 else 1),
        ),
        Mistake(
            "multiply-adds for FLOPs",
            "You add up multiply-adds: each is two FLOPs, a product and a sum.",
            _ledger_by(flops=1),
        ),
        Mistake(
            "steps + 1",
            "You count steps + 1 evaluations: there are steps + 1 times, and the last, t = 0, is only arrived at.",
            _ledger_by(extra=1),
        ),
        Mistake(
            "steps - 1",
            "You count steps - 1 evaluations: every one of the steps asks the network.",
            _ledger_by(extra=-1),
        ),
        Mistake(
            "encoder counted",
            "The encoder is counted: it is needed in training only. Sampling starts from noise in latent space.",
            _ledger_by(encoder=1),
        ),
        Mistake(
            "decoded at every step",
            "The decoder is counted once a step: the sampler stays in latent space, and decodes once.",
            _ledger_by(decodes=lambda steps, passes: steps),
        ),
        Mistake(
            "decoder doubled by guidance",
            "Guidance doubles the decoder, too, in your ledger: the two predictions become one latent before it.",
            _ledger_by(decodes=lambda steps, passes: passes),
        ),
    ),
    alternatives=((_ledger_sum,), (_ledger_if,)),
    hints=(
        "How often is each of the three asked while one picture is drawn? Then: multiply-adds to FLOPs.",
        "encoder 0; network 2 * network * steps * (1 if scale in (0, 1) else 2); decoder 2 * decoder; and their sum.",
    ),
    hides=("cost.sampling_cost",),
    probe=lambda answer, g: [
        {name: float(v) for name, v in answer(11, 1000, 37, 9, scale).items()} for scale in (0.0, 0.5, 1.0, 2.0, -1.0)
    ],
)

# --- 09.7 rate_distortion ---------------------------------------------------------------------------------------------


def _rate_inputs(g: Generator) -> dict:
    x, rec = pictures(g, 2)
    mu, logvar = _posterior(g, 4, 2, 3, 2)
    return {"rate_distortion": dict(x=x, rec=rec, mu=mu, logvar=logvar)}


def _point(answer: Answer, args: Sequence, due: tuple[float, float], what: str) -> None:
    got = answer(*args)
    for name, mine, right in zip(("rate", "distortion"), got, due, strict=True):
        if not math.isclose(float(mine), right, rel_tol=1e-6, abs_tol=1e-9):
            raise Wrong(f"{what}: your {name} is {float(mine):.6g}", expected=f"{right:.6g}")


def _rate_whole(answer: Answer, g: Generator) -> None:
    """Means that cost k bits each: mu^2 / 2 = k log 2."""
    bits, (x,) = integer(g, 1, 5), pictures(g, 1)
    mu = torch.zeros(4, 2, 3, 2, dtype=torch.float64)
    _point(
        answer, (x, x.clone(), mu, 0 * mu), (0.0, 0.0), "q is the prior: z tells nothing of x (rec = x all the same)"
    )
    mu[:, 1, 2, 0] = math.sqrt(2 * bits * math.log(2))
    what = f"variance 1, and one latent of each image has the mean sqrt(2 * {bits} ln 2), rec = x"
    _point(answer, (x, x.clone(), mu, 0 * mu), (bits, 0.0), what)
    mu[::2] = 0
    what = "the same mean, in 2 of 4 images, and 0 in the others, rec = x"
    _point(answer, (x, x.clone(), mu, 0 * mu), (bits / 2, 0.0), what)


def _rate_size(answer: Answer, g: Generator) -> None:
    """Bits per image add up over latents, whatever the batch; the mean over pixels does not grow."""
    m, d = 1 + integer(g, 0, 3) / 4, 0.5 + integer(g, 0, 3) / 4
    for b, latent, pixels in ((2, (1, 2, 2), (1, 4, 4)), (5, (3, 2, 4), (3, 2, 2))):
        x, mu = randn(g, b, *pixels), torch.full((b, *latent), m, dtype=torch.float64)
        bits = math.prod(latent) * m * m / 2 / math.log(2)
        what = f"{b} images of {math.prod(pixels)} pixels, each off by {d:g}, {math.prod(latent)} latents of mean {m:g}"
        _point(answer, (x, x - d, mu, 0 * mu), (bits, d * d), what)


def _rate_shannon(answer: Answer, g: Generator) -> None:
    """The best code of a Gaussian of variance S at distortion D = S v: z = a x + sqrt(v) eps, with a^2 S + v = 1, and
    rec = a S z. Its rate is log2(S / D) / 2 per pixel; x = +-sqrt(S) and eps = +-1 have the moments that count."""
    s, v = 0.5 + integer(g, 0, 6) / 4, (0.5, 0.1, 0.02)[integer(g, 0, 2)]
    sign = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    a, eps = math.sqrt((1 - v) / s), sign[:, 1].view(4, 1, 1, 1).expand(4, 1, 3, 2)
    x = math.sqrt(s) * sign[:, 0].view(4, 1, 1, 1).expand(4, 1, 3, 2)
    mu, logvar = a * x, torch.full((4, 1, 3, 2), math.log(v), dtype=torch.float64)
    rec = a * s * (mu + math.sqrt(v) * eps)
    due = 6 * math.log2(1 / v) / 2, s * v
    what = f"Shannon's code for a Gaussian source of variance {s:g}, 6 pixels, posterior variance {v:g}"
    _point(answer, (x.clone(), rec, mu, logvar), due, what)


def _rate_torch(answer: Answer, g: Generator) -> None:
    x, rec, mu, logvar = _rate_inputs(g)["rate_distortion"].values()
    due = float(_oracle_kl(mu, logvar).mean() / math.log(2)), float((x - rec).square().mean())
    _point(answer, (x, rec, mu, logvar), due, "random images and latents")


def _rate_by(
    rate: Callable[[Tensor], Tensor] = lambda kl: kl.mean(),
    unit: float = 1 / math.log(2),
    error: Callable[[Tensor, Tensor], Tensor] = lambda x, rec: ((x - rec) ** 2).mean(),
    kl: Callable[[Tensor, Tensor], Tensor] = _oracle_kl,
    per: Callable[[Tensor, Tensor], int] = lambda x, mu: 1,
    exchanged: bool = False,
) -> tuple[Callable]:
    def rate_distortion_(x, rec, mu, logvar):
        point = rate(kl(mu, logvar)).item() * unit / per(x, mu), error(x, rec).item()
        return point[::-1] if exchanged else point

    return (rate_distortion_,)


def _rate_log2(x: Tensor, rec: Tensor, mu: Tensor, logvar: Tensor) -> tuple[float, float]:
    """In bits from the start."""
    each = -logvar / math.log(4) + (mu.square() + logvar.exp() - 1) / (2 * math.log(2))
    return float(each.sum() / len(mu)), float(torch.dist(x, rec) ** 2 / x.numel())


def _rate_loop(x: Tensor, rec: Tensor, mu: Tensor, logvar: Tensor) -> tuple[float, float]:
    bits = [float(kl_gauss(m[None], v[None])) / math.log(2) for m, v in zip(mu, logvar, strict=True)]
    errors = [float(((a - b) ** 2).mean()) for a, b in zip(x, rec, strict=True)]
    return statistics.fmean(bits), statistics.fmean(errors)


RATE = Exercise(
    id="09.7",
    names=("rate_distortion",),
    references=(rate_distortion,),
    inputs=_rate_inputs,
    kind="value",
    facts=(
        Fact("latents that cost whole bits", _rate_whole, "a nat is 1 / ln 2 bits; the mean over images"),
        Fact(
            "the rate is per image, the distortion per pixel",
            _rate_size,
            "sum over the latents of an image; mean over its pixels; mean over images",
        ),
        Fact("Shannon: log2(variance / distortion) / 2 bits per pixel", _rate_shannon, "a code that is known exactly"),
        Fact("agrees with torch.distributions", _rate_torch, "the KL of 09.1, averaged over images, in bits"),
    ),
    mistakes=(
        Mistake("nats", "Your rate is in nats: divide by ln 2 for bits.", _rate_by(unit=1.0)),
        Mistake(
            "multiplied by ln 2",
            "You multiply by ln 2 where nats become bits by dividing: a bit is less than a nat, so there are more of "
            "them.",
            _rate_by(unit=math.log(2)),
        ),
        Mistake(
            "bits per pixel",
            "Your rate is per pixel; asked for is the rate of an image.",
            _rate_by(per=lambda x, mu: x[0].numel()),
        ),
        Mistake(
            "bits per latent",
            "Your rate is per latent (a mean over them); the rate of an image is the sum over its latents.",
            _rate_by(per=lambda x, mu: mu[0].numel()),
        ),
        Mistake(
            "bits of the whole batch",
            "You add up the bits of all images: the rate is that of one image, on average.",
            _rate_by(rate=torch.sum),
        ),
        Mistake(
            "squared error per image",
            "Your distortion is summed over the pixels of an image; asked for is the mean per pixel.",
            _rate_by(error=lambda x, rec: ((x - rec) ** 2).flatten(1).sum(1).mean()),
        ),
        Mistake(
            "root of the mean squared error",
            "Your distortion is the root of the mean squared error; asked for is the mean squared error itself.",
            _rate_by(error=lambda x, rec: ((x - rec) ** 2).mean().sqrt()),
        ),
        Mistake(
            "absolute error",
            "Your distortion is the mean absolute error; asked for is the squared one.",
            _rate_by(error=lambda x, rec: (x - rec).abs().mean()),
        ),
        Mistake(
            "exchanged", "The two are exchanged: the rate comes first, then the distortion.", _rate_by(exchanged=True)
        ),
        Mistake(
            "KL without 1/2",
            "The KL lacks its factor 1/2: your rate is twice as high.",
            _rate_by(kl=lambda mu, lv: 2 * _oracle_kl(mu, lv)),
        ),
        Mistake(
            "reversed KL",
            "This is the KL from the prior to q; the rate is that from q(z | x) to the prior.",
            _rate_by(kl=lambda mu, lv: _each((mu**2 + 1) * (-lv).exp() - 1 + lv) / 2),
        ),
        Mistake(
            "logvar taken for the standard deviation",
            "In the KL you square logvar as if it were a standard deviation: the variance is exp(logvar).",
            _rate_by(kl=lambda mu, lv: _each(mu**2 + lv**2 - 1 - (lv**2).log()) / 2),
        ),
    ),
    alternatives=((_rate_log2,), (_rate_loop,)),
    hints=(
        "Two averages over images, in two units: of the KL of 09.1, and of the squared error.",
        "kl_gauss(mu, logvar).mean() / ln 2 and mse_loss(rec, x), both with .item().",
    ),
    hides=("autoencoder.kl_per_image", "autoencoder.error_per_image"),
)

# --- 09.8 my_kl_test --------------------------------------------------------------------------------------------------


def _kl_batch_mean(mu: Tensor, logvar: Tensor) -> Tensor:
    """Of the right shape, and the same for all."""
    kl = _oracle_kl(mu, logvar)
    return kl.mean().expand(len(kl))


def _test_positive(kl: Callable) -> None:
    for _ in range(20):
        assert (kl(torch.randn(4, 6), torch.randn(4, 6)) >= 0).all()


def _test_shape(kl: Callable) -> None:
    assert kl(torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)).shape == (4,)


def _test_one_number(kl: Callable) -> None:
    """Everything, but in one example of one entry."""
    for m, v in ((0.0, 0.0), (2.0, 0.0), (1.0, 0.7), (-1.0, -2.0)):
        due = (m * m + math.exp(v) - 1 - v) / 2
        assert abs(float(kl(torch.tensor([[m]]), torch.tensor([[v]]))) - due) < 1e-4


def _test_means(kl: Callable) -> None:
    mu = torch.randn(4, 3, 2)
    assert torch.allclose(kl(mu, torch.zeros(4, 3, 2)), (mu**2).flatten(1).sum(1) / 2, atol=1e-5)


def _test_one_sample(kl: Callable) -> None:
    """Compares with log q(z) - log p(z) of one z, which is right on average only."""
    mu, logvar = torch.randn(4, 6), torch.randn(4, 6)
    assert torch.allclose(kl(mu, logvar), _kl_of_sample(mu, logvar), rtol=1e-2)


def _test_oracle(kl: Callable) -> None:
    gen = Generator().manual_seed(3)
    for shape in ((2, 3), (4, 2, 3, 5)):
        mu, logvar = torch.randn(2, *shape, generator=gen, dtype=torch.float64)
        q, p = Normal(mu, logvar.mul(0.5).exp()), Normal(torch.zeros(shape).double(), torch.ones(shape).double())
        torch.testing.assert_close(kl(mu, logvar), kl_divergence(q, p).flatten(1).sum(1))


def _test_monte_carlo(kl: Callable) -> None:
    """The mean of log q(z) - log p(z) over many z, within a few of its standard errors."""
    mu, std = torch.tensor([[0.5, -1.0], [2.0, 0.0]]).double(), torch.tensor([[0.5, 1.0], [2.0, 1.2]]).double()
    z = mu + std * torch.randn(20_000, 2, 2, dtype=torch.float64, generator=Generator().manual_seed(0))
    terms = Normal(mu, std).log_prob(z).sum(-1) - Normal(0.0, 1.0).log_prob(z).sum(-1)
    error = terms.std(0) / math.sqrt(len(z))
    if ((kl(mu, 2 * std.log()) - terms.mean(0)).abs() > 6 * error).any():
        raise ValueError("not the mean of log q - log p")


_planted = {mistake.name: mistake.answers[0] for mistake in KL_GAUSS.mistakes}

MY_KL_TEST = test_exercise(
    "09.8",
    "my_kl_test",
    my_kl_test,
    right=(kl_gauss, _oracle_kl, _kl_one_by_one),
    wrong=(
        *(
            (hint, _planted[name])
            for name, hint in (
                ("no 1/2", "one without the factor 1/2"),
                ("sign of the logarithm", "one that adds logvar instead of subtracting it"),
                (
                    "logvar taken for the log of the standard deviation",
                    "one that takes logvar for the logarithm of the standard deviation",
                ),
                ("mean over the entries", "one that averages over the entries of an example"),
                ("reversed", "one that computes KL(N(0, I) || q)"),
            )
        ),
        ("one that gives every example the mean over the batch", _kl_batch_mean),
    ),
    needed=5,
    mistakes=(
        Mistake(
            "never negative, and no more",
            "Your test asks only that the KL is not negative: twice the KL, the reversed one and averages of it are "
            "not negative either.",
            (_test_positive,),
        ),
        Mistake(
            "shape or prior only",
            "Your test lets every wrong function pass. All have the right shape, and at mu = 0 and logvar = 0 nearly "
            "every formula gives 0: look elsewhere, too.",
            (_test_shape,),
        ),
        Mistake(
            "one number",
            "You try examples of a single entry, one at a time: there sums and means are the same. Try several "
            "entries, and several examples that differ.",
            (_test_one_number,),
        ),
        Mistake(
            "variance 1 only",
            "You change mu only, and leave logvar at 0: what is wrong with the variance does not show.",
            (_test_means,),
        ),
        Mistake(
            "refuses all",
            "Your test refuses every function, the correct ones, too: it compares with a formula that is wrong itself, "
            "or with log q(z) - log p(z) at one sample z, whose mean is the KL and a single value is not; or it asks "
            "for more than holds (== for allclose, another shape).",
            (_test_one_sample,),
        ),
    ),
    alternatives=(_test_oracle, _test_monte_carlo),
    hides=("autoencoder.kl_per_image",),
    hints=(
        "For which mu and logvar do you know the KL by hand? Choose some where sum and mean, examples, and the two "
        "directions of the KL differ.",
        "Assert: 0 at mu = 0, logvar = 0; the sum of mu^2 / 2 at logvar = 0, with examples that differ; "
        "n (v - 1 - log v) / 2 at mu = 0 and variance v, for a v above and a v below 1.",
    ),
)

EXERCISES = (KL_GAUSS, REPARAM, VAE_LOSS, SCALE_FACTOR, LDM, LEDGER, RATE, MY_KL_TEST)
