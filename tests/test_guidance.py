"""Facts about guidance: Bayes, invariance, limits, published numbers, and what guided samplers do to the exact world.

Float64, and assert_close's own tolerance for rounding (1e-7), unless said. Numbers of an "erratum" and "the curriculum"
were computed for the course before this package and without it.
"""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from condiff_ref.denoisers import CallCounter, as_denoiser, clip_x0
from condiff_ref.guidance import apg, cfg, classifier_guidance, interval, negative, perp_neg, project, rescale
from condiff_ref.mixture import GaussianMixture, archipelago, line2, tilted_gaussian
from condiff_ref.predictions import KINDS, convert
from condiff_ref.samplers import ddpm_step, heun_step, sample
from condiff_ref.schedules import Schedule, cosine, ddpm_alpha_bar, flow, time_grid
from condiff_ref.shapes import Denoiser

WORLD = archipelago()
NOW = cosine()
T = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64)


def numbers(*values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def says(*values) -> Denoiser:
    """A denoiser with one answer."""
    return lambda xt, t: numbers(*values).expand(xt.shape)


# Three denoisers for data of any shape, none a multiple of another, and a log-probability.
def positive(xt: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(xt + 0.5)


def other(xt: Tensor, t: Tensor) -> Tensor:
    return torch.cos(2 * xt) * 0.7


def plain(xt: Tensor, t: Tensor) -> Tensor:
    return torch.sin(xt) * 0.8


def log_prob(xt: Tensor, t: Tensor) -> Tensor:
    return -(xt - 0.3).flatten(1).pow(2).sum(1) * (1 + t)


# Everything in the module, as (positive, negative, unconditional) -> guided.
GUIDANCE = {
    "cfg": lambda p, n, u: cfg(p, u, 3.0),
    "classifier_guidance": lambda p, n, u: classifier_guidance(u, log_prob, 0.3, NOW),
    "apg": lambda p, n, u: apg(p, u, 3.0),
    "apg, capped": lambda p, n, u: apg(p, u, 3.0, parallel=0.5, max_norm=0.4),
    "perp_neg": lambda p, n, u: perp_neg(p, n, u, 3.0, 0.7),
    "negative": lambda p, n, u: negative(p, n, u, 3.0),
    "interval": lambda p, n, u: interval(cfg(p, u, 3.0), p, 0.2, 0.8),
    "rescale": lambda p, n, u: rescale(cfg(p, u, 3.0), p, 0.7),
}
everything = pytest.mark.parametrize("guide", GUIDANCE.values(), ids=GUIDANCE)


# --- plain and classifier guidance -----------------------------------------------------------------------------------


def test_exact_classifier_guidance_at_scale_one_is_the_conditional_denoiser(schedule: Schedule):
    xt = random(5, 2)
    for label in range(3):
        guided = classifier_guidance(WORLD.denoiser(schedule), WORLD.classifier(schedule, label), 1.0, schedule)
        assert_close(guided(xt, T), WORLD.denoiser(schedule, label)(xt, T))


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0, 7.5])
def test_exact_classifier_guidance_is_cfg_at_every_scale(scale: float, schedule: Schedule):
    xt, uncond = random(5, 2), WORLD.denoiser(schedule)
    guided = classifier_guidance(uncond, WORLD.classifier(schedule, 1), scale, schedule)
    assert_close(guided(xt, T), cfg(WORLD.denoiser(schedule, 1), uncond, scale)(xt, T))


def test_the_guided_score_is_the_gradient_of_the_weighted_log_densities(schedule: Schedule):
    xt, scale = random(5, 2).requires_grad_(), 3.0
    potential = scale * WORLD.log_prob(xt, T, schedule, 0) + (1 - scale) * WORLD.log_prob(xt, T, schedule)
    (gradient,) = torch.autograd.grad(potential.sum(), xt)
    guided = cfg(WORLD.denoiser(schedule, 0), WORLD.denoiser(schedule), scale)(xt.detach(), T)
    assert_close(convert("x0", "score", guided, xt.detach(), T, schedule), gradient)


def test_scale_zero_is_unconditional_one_conditional_and_between_a_line():
    xt = random(5, 2)
    at = {scale: cfg(positive, plain, scale)(xt, T) for scale in (0.0, 1.0, 2.0, 5.0)}
    assert_close(at[0.0], plain(xt, T))
    assert_close(at[1.0], positive(xt, T))
    assert_close(at[5.0], 4 * at[2.0] - 3 * at[1.0])
    assert cfg(says(-0.25), says(0.5), 3.0)(random(1, 1), T[:1]).item() == -1.75  # erratum E9


def test_classifier_guidance_of_a_linear_log_probability():
    def linear(xt: Tensor, t: Tensor) -> Tensor:
        return xt @ numbers(2.0, -1.0)

    guided = classifier_guidance(plain, linear, 3.0, flow())
    xt = random(5, 2)
    assert_close(guided(xt, T), plain(xt, T) + 3 * (T**2 / (1 - T))[:, None] * numbers(2.0, -1.0))


def test_guided_noise_is_erratum_e2s_number():
    world, xt, t = line2(1.0, 0.25), numbers([0.3]), numbers(0.5)  # alpha_bar = 1/2
    guided = classifier_guidance(world.denoiser(NOW), world.classifier(NOW, 1), 3.0, NOW)(xt, t)
    assert guided.item() == pytest.approx(1.961730, abs=5e-7)
    assert convert("x0", "eps", guided, xt, t, NOW).item() == pytest.approx(-1.537466047, abs=5e-10)


def test_classifier_guidance_shifts_ddpms_mean_by_beta_over_sqrt_alpha_times_the_gradient():
    """Erratum E38. Dhariwal & Nichol's algorithm 1 shifts by the posterior variance: equal to first order only."""
    alpha_bar = ddpm_alpha_bar(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))

    def at(t: Tensor) -> Tensor:
        return alpha_bar[(1000 * t).round().long() - 1]

    table = Schedule(lambda t: at(t).sqrt(), lambda t: (1 - at(t)).sqrt(), at, at)
    xt, t, s = random(4, 2), numbers(0.3).expand(4), numbers(0.299).expand(4)
    ends = [
        ddpm_step(table, generator=torch.Generator().manual_seed(0))(denoiser, xt, t, s)
        for denoiser in (plain, classifier_guidance(plain, log_prob, 2.0, table))
    ]
    beta = 1e-4 + 299 / 999 * (0.02 - 1e-4)
    gradient = -2 * (xt - 0.3) * (1 + 0.3)
    assert_close(ends[1] - ends[0], beta / math.sqrt(1 - beta) * 2.0 * gradient)


def test_classifier_guidance_works_where_gradients_are_off():
    xt = random(5, 2)
    guided = classifier_guidance(WORLD.denoiser(NOW), WORLD.classifier(NOW, 1), 1.0, NOW)
    with torch.no_grad():
        assert_close(guided(xt, T), WORLD.denoiser(NOW, 1)(xt, T))
    x = sample(heun_step(NOW), guided, random(4, 2), time_grid(4))
    assert_close(x, sample(heun_step(NOW), WORLD.denoiser(NOW, 1), random(4, 2), time_grid(4)))


# --- which guidance depends on the kind of prediction ----------------------------------------------------------------

METHODS = {
    "cfg": GUIDANCE["cfg"],
    "negative": GUIDANCE["negative"],
    "perp_neg": GUIDANCE["perp_neg"],
    "apg": GUIDANCE["apg"],
    "apg, capped": lambda p, n, u: apg(p, u, 3.0, parallel=1.0, max_norm=0.4),
    "rescale": lambda p, n, u: rescale(cfg(p, u, 3.0), p, 1.0),
    "clip": lambda p, n, u: clip_x0(cfg(p, u, 3.0)),
}


def spread_over_kinds(method: Callable, schedule: Schedule) -> float:
    """Apply it to raw predictions of each kind, then compare x0: the largest relative gap to guiding x0 itself."""
    xt = random(5, 3)

    def raw(denoiser: Denoiser, kind: str) -> Denoiser:
        return lambda xt, t: convert("x0", kind, denoiser(xt, t), xt, t, schedule)

    guided = {
        kind: as_denoiser(method(*(raw(d, kind) for d in (positive, other, plain))), kind, schedule)(xt, T)
        for kind in KINDS
    }
    return max(((guided[kind] - guided["x0"]).norm() / guided["x0"].norm()).item() for kind in KINDS)


@pytest.mark.parametrize("name", ["cfg", "negative", "perp_neg"])
def test_what_adds_differences_is_the_same_in_all_five_kinds(name: str, schedule: Schedule):
    """Weights sum to one, or the projection is of a difference onto a difference, which all kinds merely scale."""
    assert spread_over_kinds(METHODS[name], schedule) < 1e-9


@pytest.mark.parametrize("name", ["apg", "apg, capped", "rescale", "clip"])
def test_projection_caps_rescaling_and_clipping_depend_on_the_kind(name: str, schedule: Schedule):
    assert spread_over_kinds(METHODS[name], schedule) > 0.1


def test_projected_guidance_in_x0_is_erratum_e8s_number_and_in_eps_another():
    level = Schedule(lambda t: 0 * t + 0.6, lambda t: 0 * t + 0.8, torch.zeros_like, torch.zeros_like)
    xt, t = numbers([1.0, 1.0]), T[:1]
    eps_c, eps_u = says(2.0, 1.0), says(1.0, 0.0)
    guided = apg(as_denoiser(eps_c, "eps", level), as_denoiser(eps_u, "eps", level), 5.0)
    assert_close(convert("x0", "eps", guided(xt, t), xt, t, level), numbers([3.6, 5.8]))
    assert_close(apg(eps_c, eps_u, 5.0)(xt, t), numbers([1.2, 2.6]))


# --- projection, caps and rescaling ----------------------------------------------------------------------------------

VECTORS = st.integers(0, 2**32).map(lambda seed: random(4, 2, 3, seed=seed))


@settings(max_examples=20, deadline=None)
@given(v=VECTORS, w=VECTORS, onto=VECTORS, factor=st.floats(0.01, 100))
def test_project_is_the_orthogonal_projection(v: Tensor, w: Tensor, onto: Tensor, factor: float):
    part = project(v, onto)
    assert_close(((v - part) * onto).sum((1, 2)), torch.zeros(4, dtype=torch.float64))
    assert_close(project(part, onto), part)
    assert_close(project(onto, onto), onto)
    assert_close(project(v, -factor * onto), part)  # only the line matters
    assert_close(project(2 * v - w, onto), 2 * part - project(w, onto))
    assert_close(part / onto, (part / onto)[:, :1, :1].expand_as(part))  # parallel


def test_project_onto_nothing_is_nothing():
    onto = random(2, 3)
    onto[1] = 0
    assert_close(project(random(2, 3, seed=1), onto)[1], torch.zeros(3, dtype=torch.float64))
    assert_close(project(numbers(3.0, 5.0), numbers(2.0, 0.0)), numbers(3.0, 0.0))  # one number per example


def test_apg_without_projection_or_cap_is_cfg():
    xt = random(5, 2)
    assert_close(apg(positive, plain, 3.0, parallel=1.0)(xt, T), cfg(positive, plain, 3.0)(xt, T))


def test_apg_moves_across_the_estimate_by_at_most_the_cap():
    xt = random(5, 2, 3, 3)
    cond = positive(xt, T)
    update = apg(positive, plain, 3.0)(xt, T) - cond
    assert update.norm() > 1
    assert_close((update * cond).sum((1, 2, 3)), torch.zeros(5, dtype=torch.float64))
    lengths = (cond - plain(xt, T)).flatten(1).norm(dim=1)
    cap = lengths.median().item()  # binds for two of the five examples
    capped = apg(positive, plain, 3.0, parallel=1.0, max_norm=cap)(xt, T) - cond
    assert_close(capped.flatten(1).norm(dim=1), 2 * lengths.clamp(max=cap))
    assert_close(
        capped / capped.flatten(1).norm(dim=1)[:, None, None, None],
        (cond - plain(xt, T)) / lengths[:, None, None, None],
    )


def test_apg_halves_its_parallel_part_with_parallel_one_half():
    xt = random(5, 2)
    whole, across, half = (apg(positive, plain, 3.0, parallel=share)(xt, T) for share in (1.0, 0.0, 0.5))
    assert_close(half, (whole + across) / 2)


@pytest.mark.parametrize("max_norm", [0.4, math.inf])
def test_apg_at_scale_one_or_without_a_difference_is_the_conditional_denoiser(max_norm: float):
    xt = random(5, 2)
    assert_close(apg(positive, plain, 1.0, max_norm=max_norm)(xt, T), positive(xt, T))
    assert_close(apg(positive, positive, 3.0, max_norm=max_norm)(xt, T), positive(xt, T))


def test_rescale_gives_each_example_the_spread_of_the_conditional_estimate():
    xt, guided = random(5, 2, 4, 4), cfg(positive, plain, 5.0)
    full = rescale(guided, positive, 1.0)(xt, T)
    assert_close(full.flatten(1).std(dim=1), positive(xt, T).flatten(1).std(dim=1))
    assert_close(rescale(guided, positive, 0.0)(xt, T), guided(xt, T))
    assert_close(rescale(guided, positive, 0.7)(xt, T), 0.7 * full + 0.3 * guided(xt, T))  # Lin et al. 2023, eq. 16
    assert_close(rescale(cfg(positive, plain, 1.0), positive, 0.7)(xt, T), positive(xt, T))


# --- negatives -------------------------------------------------------------------------------------------------------


def test_the_two_negative_prompts_are_erratum_e18s_numbers():
    xt, p, n, u = random(1, 1), says(1.0), says(0.5), says(0.2)
    three = [negative(p, n, u, scale)(xt, T[:1]).item() for scale in (7.5, 1.0)]
    two = [cfg(p, n, scale)(xt, T[:1]).item() for scale in (7.5, 1.0)]
    assert three == pytest.approx([3.95, 0.7])
    assert two == pytest.approx([4.25, 1.0])


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_the_two_negative_prompts_differ_by_the_same_at_every_scale(scale: float):
    xt = random(5, 2)
    gap = negative(positive, other, plain, scale)(xt, T) - cfg(positive, other, scale)(xt, T)
    assert_close(gap, plain(xt, T) - other(xt, T))


def test_perp_neg_ignores_what_a_negative_shares_with_the_positive():
    xt = random(5, 2)

    def parallel(xt: Tensor, t: Tensor) -> Tensor:
        return plain(xt, t) - 2.5 * (positive(xt, t) - plain(xt, t))

    assert_close(perp_neg(positive, parallel, plain, 3.0, 0.7)(xt, T), cfg(positive, plain, 3.0)(xt, T))
    assert_close(perp_neg(positive, other, plain, 3.0, 0.0)(xt, T), cfg(positive, plain, 3.0)(xt, T))


def test_perp_neg_subtracts_the_perpendicular_rest():
    # d_p = (2, 0), d_n = (3, 4), whose perpendicular rest is (0, 4): u + 3 ((2, 0) - 0.5 (0, 4))
    guided = perp_neg(says(3.0, 1.0), says(4.0, 5.0), says(1.0, 1.0), 3.0, 0.5)
    assert_close(guided(random(1, 2), T[:1]), numbers([7.0, -5.0]))


# --- intervals -------------------------------------------------------------------------------------------------------


def test_interval_includes_its_upper_end_only():
    guided = interval(says(1.0), says(0.0), 0.3, 0.7)
    t = numbers(0.1, 0.3, 0.31, 0.7, 0.71)
    assert guided(random(5, 1), t)[:, 0].tolist() == [0, 0, 1, 1, 0]


def test_interval_of_full_length_is_guided_and_an_empty_one_is_not():
    xt = random(5, 2)
    assert_close(interval(positive, plain, 0.0, 1.0)(xt, T), positive(xt, T))
    assert_close(interval(positive, plain, 0.5, 0.5)(xt, T), plain(xt, T))


@pytest.mark.parametrize(("time", "calls"), [(0.5, (1, 0)), (0.9, (0, 1)), (0.1, (0, 1))])
def test_interval_evaluates_only_what_is_needed(time: float, calls: tuple):
    inside, outside = CallCounter(positive), CallCounter(plain)
    interval(inside, outside, 0.3, 0.7)(random(4, 2), torch.full((4,), time, dtype=torch.float64))
    assert (inside.calls, outside.calls) == calls


# --- what holds for all of them --------------------------------------------------------------------------------------


@everything
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5, 2), (5, 4, 3, 6)])
def test_examples_do_not_see_each_other(guide: Callable, dtype: torch.dtype, shape: tuple):
    guided, xt, t = guide(positive, other, plain), random(*shape).to(dtype), T.to(dtype)
    together = guided(xt, t)
    assert together.dtype == dtype
    for i in range(5):
        assert_close(together[i : i + 1], guided(xt[i : i + 1], t[i : i + 1]))


@everything
def test_every_channel_is_guided_alike(guide: Callable):
    guided, xt, shuffled = guide(positive, other, plain), random(5, 4, 3, 3), [2, 0, 3, 1]
    assert_close(guided(xt[:, shuffled], T), guided(xt, T)[:, shuffled])
    moved = (guided(xt, T) - positive(xt, T)).abs().amax((2, 3))[1:4]  # the times inside the interval
    assert (moved > 0.05).all()


@everything
def test_the_same_call_gives_the_same_answer_and_leaves_no_trace(guide: Callable):
    guided, xt, t = guide(positive, other, plain), random(5, 2), T.clone()
    first, second = guided(xt, t), guided(xt, t)
    assert torch.equal(first, second)
    assert torch.equal(xt, random(5, 2))
    assert torch.equal(t, T)
    assert not first.requires_grad
    assert not xt.requires_grad


# --- what guided samplers do, no bug to fix --------------------------------------------------------------------------


def test_the_score_of_cfg_is_not_that_of_the_noised_tilt():
    world, xt, t = line2(1.0, 0.25), numbers([0.3]), numbers(0.5)
    guided = cfg(world.denoiser(NOW, 1), world.denoiser(NOW), 3.0)
    assert convert("x0", "score", guided(xt, t), xt, t, NOW).item() == pytest.approx(2.174305, abs=5e-7)  # erratum E1
    assert world.tilted(1, 3.0).score(xt, t, NOW).item() == pytest.approx(0.723156, abs=5e-7)


def test_guided_gaussians_have_the_score_of_the_noised_tilt_only_if_their_variances_agree():
    def gaussian(mean: float, variance: float) -> GaussianMixture:
        return GaussianMixture(numbers(1.0), numbers([mean]), numbers([[variance]]), torch.tensor([0]))

    xt, t, data = numbers([0.0], [1.0]), torch.full((2,), 0.5, dtype=torch.float64), gaussian(0.0, 1.0)
    scores = []
    for cond in (gaussian(1.0, 0.5), gaussian(1.0, 1.0)):
        guided = cfg(cond.denoiser(NOW), data.denoiser(NOW), 2.0)(xt, t)
        scores += [convert("x0", "score", guided, xt, t, NOW), tilted_gaussian(cond, data, 2.0).score(xt, t, NOW)]
    precisions = [(score[0] - score[1]).item() for score in scores]
    assert precisions == pytest.approx([5 / 3, 3 / 2, 1, 1])  # erratum E1, at alpha_bar = 1/2
    assert_close(scores[2], math.sqrt(2) - xt)
    assert_close(scores[3], math.sqrt(2) - xt)


def test_guidance_between_two_atoms_points_at_the_scale_itself():
    world, x, t = line2(1.0, 0.0), numbers([0.0], [0.4], [-1.3]), torch.full((3,), 0.5, dtype=torch.float64)
    guided = cfg(world.denoiser(NOW, 1), world.denoiser(NOW), 3.0)
    assert_close(guided(x, t), 3 - 2 * torch.tanh(math.sqrt(0.5) * x / 0.5))  # erratum E1: exactly 3 at x = 0


def crowded_share(denoiser: Denoiser, n: int = 2000) -> float:
    """The share of class 0's samples on the crowded island, by Heun's method in 25 steps."""
    x = sample(heun_step(NOW), denoiser, random(n, 2), time_grid(25, end=1e-3))
    return ((x - WORLD.means[1]).norm(dim=1) < (x - WORLD.means[0]).norm(dim=1)).double().mean().item()


def within_five_standard_errors(share: float, n: int = 2000) -> object:
    return pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / n))


@pytest.mark.parametrize(("scale", "share"), [(1.0, 0.500), (3.0, 0.139), (5.0, 0.023)])
def test_strong_guidance_empties_the_crowded_island(scale: float, share: float):
    guided = cfg(WORLD.denoiser(NOW, 0), WORLD.denoiser(NOW), scale)
    # the curriculum's table; the tilt would keep .48 at scale 3 and .47 at 5, see test_mixture.py
    assert crowded_share(guided) == within_five_standard_errors(share)


@pytest.mark.parametrize(("low", "high", "share"), [(0.0, 0.5, 0.460), (0.0, 0.7, 0.286), (0.3, 0.7, 0.286)])
def test_guidance_at_low_noise_alone_keeps_the_crowded_island(low: float, high: float, share: float):
    cond = WORLD.denoiser(NOW, 0)
    guided = interval(cfg(cond, WORLD.denoiser(NOW), 5.0), cond, low, high)
    assert crowded_share(guided) == within_five_standard_errors(share)  # the curriculum's table
