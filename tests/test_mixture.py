"""Facts about the exact world: each closed form by torch.distributions, autograd, quadrature or a published number.

Float64, and assert_close's own tolerance for rounding (1e-7), unless said. Numbers of an "erratum" and "the curriculum"
were computed for the course before this package and without it.
"""

import math
import re

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal
from torch.testing import assert_close

from condiff_ref.mixture import GaussianMixture, archipelago, line2, ring, tilted_gaussian
from condiff_ref.schedules import Schedule, cosine, flow

WORLD = archipelago()
NOW = cosine()
LEVELS = (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98)


def numbers(*values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def line(low: float, high: float, n: int) -> Tensor:
    return torch.linspace(low, high, n, dtype=torch.float64)


def at(t: float, n: int) -> Tensor:
    return torch.full((n,), t, dtype=torch.float64)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def batch(schedule: Schedule, each: int = 8) -> tuple[Tensor, Tensor]:
    """Points where the world's own noised samples lie, at seven noise levels, and their times."""
    x0, _ = WORLD.sample(each * len(LEVELS), torch.Generator().manual_seed(0))
    t = numbers(*LEVELS).repeat_interleave(each)
    alpha, sigma = schedule.at(t, x0)
    return alpha * x0 + sigma * random(*x0.shape, seed=1), t


def gradient(function, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(function(x).sum(), x)[0]


def noised(world: GaussianMixture, t: float, schedule: Schedule, label: int | None = None) -> MixtureSameFamily:
    """The same law by torch.distributions."""
    alpha, sigma = (curve(numbers(t)) for curve in (schedule.alpha, schedule.sigma))
    members = torch.ones_like(world.labels, dtype=torch.bool) if label is None else world.labels == label
    covs = alpha**2 * world.covs[members] + sigma**2 * torch.eye(world.means.shape[1]).double()
    return MixtureSameFamily(
        Categorical(world.weights[members]), MultivariateNormal(alpha * world.means[members], covs)
    )


def gaussian(mean: float, variance: float) -> GaussianMixture:
    return GaussianMixture(numbers(1.0), numbers([mean]), numbers([[variance]]), torch.tensor([0]))


TURN = torch.linalg.matrix_exp(numbers([0.0, 0.5, -0.9], [-0.5, 0.0, 0.7], [0.9, -0.7, 0.0]))
ELLIPSOID = TURN @ torch.diag(numbers(0.04, 0.3, 1.0)) @ TURN.T


# --- density, score, denoiser ----------------------------------------------------------------------------------------


def test_the_curriculums_fixture():
    x, t = numbers([0.3, 0.7]), numbers(0.5)
    half = {"atol": 5e-11, "rtol": 0}  # half of the last digit printed
    assert_close(WORLD.score(x, t, NOW), numbers([0.8524692193, -0.0117253760]), **half)
    assert_close(WORLD.posterior_mean(x, t, NOW), numbers([1.0270508344, 0.9816584008]), **half)
    p = torch.cat([WORLD.class_log_prob(x, t, NOW, label).exp() for label in range(3)])
    assert_close(p, numbers(0.5670351475, 0.3950432747, 0.0379215779), **half)
    pull = WORLD.score(x, t, NOW, label=0) - WORLD.score(x, t, NOW)
    assert_close(pull, numbers([-0.3077204852, 0.0485524224]), **half)


@pytest.mark.parametrize("label", [None, 0, 1, 2])
@pytest.mark.parametrize("t", [0.0, 0.3, 0.8])
def test_log_prob_is_the_noised_mixtures(t: float, label: int | None, schedule: Schedule):
    x = random(20, 2) * 2
    ours = WORLD.log_prob(x, at(t, 20), schedule, label)
    assert_close(ours, noised(WORLD, t, schedule, label).log_prob(x))


def test_log_prob_is_finite_a_thousand_away():
    far = numbers([1e3, -1e3])
    assert_close(WORLD.log_prob(far, numbers(0.0), NOW), noised(WORLD, 0.0, NOW).log_prob(far))
    assert WORLD.score(far, numbers(0.0), NOW).isfinite().all()


@pytest.mark.parametrize("label", [None, 0, 2])
def test_score_is_the_gradient_of_log_prob(label: int | None, schedule: Schedule):
    xt, t = batch(schedule)
    assert_close(WORLD.score(xt, t, schedule, label), gradient(lambda x: WORLD.log_prob(x, t, schedule, label), xt))


@pytest.mark.parametrize("label", [None, 1])
def test_posterior_mean_is_tweedies_formula(label: int | None, schedule: Schedule):
    xt, t = batch(schedule)
    alpha, sigma = schedule.at(t, xt)
    score = gradient(lambda x: WORLD.log_prob(x, t, schedule, label), xt)
    assert_close(WORLD.posterior_mean(xt, t, schedule, label), (xt + sigma**2 * score) / alpha)
    assert_close(WORLD.denoiser(schedule, label)(xt, t), (xt + sigma**2 * score) / alpha)


@pytest.mark.parametrize("label", [None, 0])
def test_posterior_cov_is_sigma2_over_alpha_times_the_slope_of_the_denoiser(label: int | None, schedule: Schedule):
    xt, t = batch(schedule, each=2)
    alpha, sigma = schedule.at(t, xt)
    denoiser = WORLD.denoiser(schedule, label)
    rows = [gradient(lambda x, i=i: denoiser(x, t)[:, i], xt) for i in range(2)]
    slope = torch.stack(rows, dim=1)
    assert_close(WORLD.posterior_cov(xt, t, schedule, label), (sigma**2 / alpha)[..., None] * slope)


def test_posterior_mean_and_cov_are_averages_over_the_data_that_explain_xt(schedule: Schedule):
    axis = line(-4.7, 4.7, 236)  # spacing .04, where the narrowest island's std is .25
    x0 = torch.cartesian_prod(axis, axis)
    prior = noised(WORLD, 0.0, schedule).log_prob(x0)
    for t, xt in ((numbers(0.3), numbers([0.5, 0.6])), (numbers(0.7), numbers([-0.2, 0.4]))):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        weights = (prior + Normal(alpha * x0, sigma).log_prob(xt).sum(1)).softmax(0)
        mean = weights @ x0
        cov = torch.einsum("n,ni,nj->ij", weights, x0 - mean, x0 - mean)
        assert_close(WORLD.posterior_mean(xt, t, schedule)[0], mean)
        assert_close(WORLD.posterior_cov(xt, t, schedule)[0], cov)


def test_posterior_mean_agrees_with_monte_carlo():
    x0, _ = WORLD.sample(4000, torch.Generator().manual_seed(3))
    xt, t = numbers([0.4, 0.3]), numbers(0.5)
    weights = Normal(NOW.alpha(t) * x0, NOW.sigma(t)).log_prob(xt).sum(1).softmax(0)[:, None]
    mean = (weights * x0).sum(0)
    error = (weights**2 * (x0 - mean) ** 2).sum(0).sqrt()  # of a self-normalised average
    assert ((WORLD.posterior_mean(xt, t, NOW)[0] - mean).abs() < 5 * error).all()


def test_at_time_zero_the_denoiser_knows_x0_and_at_time_one_only_the_class_mean():
    x = random(5, 2)
    for schedule in (cosine(), flow()):
        assert_close(WORLD.posterior_mean(x, at(0.0, 5), schedule), x)
        mean = WORLD.posterior_mean(x, at(1.0, 5), schedule, label=0)
        assert_close(mean, numbers([-0.45, 1.0]).expand(5, 2))  # halfway between the two islands of class 0


def test_the_denoiser_depends_on_xt_over_alpha_and_the_signal_to_noise_ratio_alone():
    t_flow = numbers(0.4)
    ratio = 0.4 / 0.6  # sigma / alpha
    t_cosine = numbers(math.atan(ratio) / (math.pi / 2))
    x = random(1, 2)
    on_flow = WORLD.posterior_mean(0.6 * x, t_flow, flow())
    assert_close(WORLD.posterior_mean(math.cos(math.atan(ratio)) * x, t_cosine, cosine()), on_flow)


def test_the_loss_of_a_perfect_network_is_what_no_denoiser_can_know(schedule: Schedule):
    grid = torch.cartesian_prod(line(-6, 6, 121), line(-6, 6, 121))
    x0, _ = WORLD.sample(4000, torch.Generator().manual_seed(0))
    for time in (0.2, 0.5, 0.9):
        t = at(time, len(grid))
        cov = WORLD.posterior_cov(grid, t, schedule)
        floor = WORLD.log_prob(grid, t, schedule).softmax(0) @ torch.einsum("nii->n", cov)
        t, eps = at(time, len(x0)), random(*x0.shape, seed=1)
        alpha, sigma = schedule.at(t, x0)
        loss = (WORLD.posterior_mean(alpha * x0 + sigma * eps, t, schedule) - x0).square().sum(1)
        assert abs(loss.mean() - floor) < 5 * loss.std() / math.sqrt(len(loss))


def test_the_noise_a_perfect_network_predicts_and_its_loss_in_one_dimension():
    x, t = line(-9, 9, 3601)[:, None], at(0.5, 3601)  # alpha = sigma there
    world = line2(1.0, 0.25)
    eps = -NOW.sigma(numbers(0.5)) * world.score(numbers([0.3]), numbers(0.5), NOW)
    assert eps.item() == pytest.approx(0.077849906, abs=5e-10)  # erratum E21
    p = world.log_prob(x, t, NOW).softmax(0)
    assert (p @ world.posterior_cov(x, t, NOW)[:, 0, 0]).item() == pytest.approx(0.532005894, abs=5e-10)


# --- classes ---------------------------------------------------------------------------------------------------------


def test_the_classifiers_gradient_is_the_difference_of_the_scores(schedule: Schedule):
    xt, t = batch(schedule)
    for label in range(3):
        pull = WORLD.score(xt, t, schedule, label) - WORLD.score(xt, t, schedule)
        assert_close(gradient(lambda x, y=label: WORLD.classifier(schedule, y)(x, t), xt), pull)


def test_class_probabilities_sum_to_one_and_weigh_the_scores(schedule: Schedule):
    xt, t = batch(schedule)
    p = torch.stack([WORLD.class_log_prob(xt, t, schedule, label).exp() for label in range(3)])
    scores = torch.stack([WORLD.score(xt, t, schedule, label) for label in range(3)])
    assert_close(p.sum(0), torch.ones(len(xt)).double())
    assert_close((p[..., None] * scores).sum(0), WORLD.score(xt, t, schedule))


def test_in_pure_noise_the_class_probabilities_are_the_priors():
    p = [WORLD.class_log_prob(random(1, 2), numbers(1.0), NOW, label).exp().item() for label in range(3)]
    assert p == pytest.approx([0.3, 0.3, 0.4])


def test_class_log_prob_is_bayes_rule_with_one_label_or_one_per_point():
    x, t, labels = random(6, 2), at(0.3, 6), torch.tensor([0, 1, 2, 2, 1, 0])
    bayes = [
        noised(WORLD, 0.3, NOW, y).log_prob(x[i])
        + math.log((0.3, 0.3, 0.4)[y])
        - noised(WORLD, 0.3, NOW).log_prob(x[i])
        for i, y in enumerate(labels.tolist())
    ]
    assert_close(WORLD.class_log_prob(x, t, NOW, labels), torch.stack(bayes))
    assert_close(WORLD.class_log_prob(x[:1], t[:1], NOW, 0), bayes[0][None])
    assert WORLD.class_log_prob(x, t, NOW, 3).tolist() == [-math.inf] * 6


def test_given_a_class_the_world_is_that_classes_components():
    assert WORLD.given(None) is WORLD
    island = WORLD.given(1)
    assert island.means.tolist() == [[2.0, 0.2], [0.9, 2.2]]
    assert_close(island.weights, numbers(2 / 3, 1 / 3))


def test_in_three_dimensions_too_where_no_axes_are_their_own_transpose(schedule: Schedule):
    world = GaussianMixture(
        numbers(0.4, 0.6), random(2, 3), torch.stack([ELLIPSOID, ELLIPSOID.inverse()]), torch.tensor([0, 1])
    )
    x, t = random(10, 3, seed=1), at(0.4, 10)
    law, (alpha, sigma) = noised(world, 0.4, schedule), schedule.at(t, x)
    score = gradient(law.log_prob, x)
    assert_close(world.log_prob(x, t, schedule), law.log_prob(x))
    assert_close(world.score(x, t, schedule), score)
    rows = [gradient(lambda x, i=i: world.posterior_mean(x, t, schedule)[:, i], x) for i in range(3)]
    assert_close(world.posterior_mean(x, t, schedule), (x + sigma**2 * score) / alpha)
    assert_close(world.posterior_cov(x, t, schedule), (sigma**2 / alpha)[..., None] * torch.stack(rows, dim=1))


# --- samples ---------------------------------------------------------------------------------------------------------


def test_samples_have_the_worlds_moments_and_class_shares():
    n = 4000
    x, labels = WORLD.sample(n, torch.Generator().manual_seed(0))
    shares = torch.stack([(labels == label).double() for label in range(3)], dim=1)
    mean = WORLD.weights @ WORLD.means
    offset = WORLD.means - mean
    cov = torch.einsum("k,kij->ij", WORLD.weights, WORLD.covs + offset[:, :, None] * offset[:, None])
    products = torch.einsum("ni,nj->nij", x - mean, x - mean)
    for draws, truth in ((x, mean), (products, cov), (shares, numbers(0.3, 0.3, 0.4))):
        assert ((draws.mean(0) - truth).abs() < 5 * draws.std(0) / math.sqrt(n)).all()


def test_samples_of_one_component_have_its_covariance():
    n = 4000
    world = GaussianMixture(numbers(1.0), numbers([1.0, 2.0, 3.0]), ELLIPSOID[None], torch.tensor([0]))
    x = world.sample(n, torch.Generator().manual_seed(0))[0] - numbers(1.0, 2.0, 3.0)
    products = torch.einsum("ni,nj->nij", x, x)
    assert ((products.mean(0) - ELLIPSOID).abs() < 5 * products.std(0) / math.sqrt(n)).all()


def test_samples_carry_the_label_of_their_component():
    far = GaussianMixture(
        numbers(1.0, 1.0), numbers([-100.0], [100.0]), numbers([[1.0]], [[1.0]]), torch.tensor([4, 2])
    )
    x, labels = far.sample(100, torch.Generator().manual_seed(0))
    assert torch.equal(labels, torch.where(x[:, 0] < 0, 4, 2))


def test_samples_come_from_the_generator_alone():
    before = torch.get_rng_state()
    first, second = (WORLD.sample(5, torch.Generator().manual_seed(1))[0] for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, WORLD.sample(5, torch.Generator().manual_seed(2))[0])
    assert torch.equal(torch.get_rng_state(), before)


# --- tilts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "crowded", "acceptance"),
    [(2.0, 0.485, 0.970), (3.0, 0.477, 0.956), (5.0, 0.468, 0.940), (15.0, 0.444, 0.899)],
)
def test_the_tilt_keeps_the_crowded_island(scale: float, crowded: float, acceptance: float):
    tilt, cond = WORLD.tilted(0, scale, points=121), WORLD.tilted(0, 1.0, points=121)
    nearer = (tilt.points - WORLD.means[1]).norm(dim=1) < (tilt.points - WORLD.means[0]).norm(dim=1)
    assert tilt.probs[nearer].sum().item() == pytest.approx(crowded, abs=1e-3)  # the curriculum's table, three digits
    # accepting x ~ p(x | y) with probability p(y | x)^(scale - 1) samples the tilt, this often (the same table)
    log_py = WORLD.class_log_prob(cond.points, at(0.0, len(cond.points)), NOW, 0)
    assert (cond.probs @ ((scale - 1) * log_py).exp()).item() == pytest.approx(acceptance, abs=1e-3)


def test_the_tilt_of_a_line_has_the_curriculums_moments():
    tilt = line2(1.0, 0.5).tilted(1, 3.0)
    assert (tilt.mean().item(), tilt.cov().item()) == (pytest.approx(1.190, abs=5e-4), pytest.approx(0.350, abs=5e-4))


@pytest.mark.parametrize(("scale", "label"), [(0.0, None), (1.0, 0)])
def test_the_tilt_at_scale_zero_is_the_world_and_at_one_the_class(scale: float, label: int | None):
    tilt = WORLD.tilted(0, scale, points=121)
    inside = tilt.probs > 1e-12
    assert_close(tilt.log_density()[inside], noised(WORLD, 0.0, NOW, label).log_prob(tilt.points)[inside])


def test_a_grids_noised_score_is_the_conditional_score_at_scale_one(schedule: Schedule):
    tilt, x, t = WORLD.tilted(0, 1.0, points=121), random(5, 2), numbers(0.4, 0.5, 0.6, 0.8, 0.95)
    assert_close(tilt.score(x, t, schedule), WORLD.score(x, t, schedule, label=0))


def test_a_grids_samples_have_its_moments_and_fill_its_cells():
    n = 4000
    long = GaussianMixture(
        numbers(0.5, 0.5), numbers([-8.0, 0.0], [8.0, 1.0]), torch.eye(2).double().expand(2, 2, 2), torch.tensor([0, 1])
    )
    tilt = long.tilted(0, 1.0, points=41)  # cells of 0.7 by 0.325
    x = tilt.sample(n, torch.Generator().manual_seed(0))
    assert ((x.mean(0) - numbers(-8.0, 0.0)).abs() < 5 * x.std(0) / math.sqrt(n)).all()
    spacing = numbers(28 / 40, 13 / 40)
    nearest = (x[:, None] - tilt.points).abs().sum(2).argmin(1)
    within = ((x - tilt.points[nearest]) / spacing).abs()
    assert_close(within.amax(0), numbers(0.5, 0.5), atol=0.01, rtol=0)  # of a cell, on both axes: nothing is left empty


def test_the_tilt_of_two_gaussians_is_erratum_e1s():
    tilt = tilted_gaussian(gaussian(1.0, 0.5), gaussian(0.0, 1.0), 2.0)
    assert (tilt.means.item(), tilt.covs.item()) == (pytest.approx(4 / 3), pytest.approx(1 / 3))


def test_the_tilt_of_two_gaussians_is_the_quadrature_of_the_product():
    cond = GaussianMixture(numbers(1.0), WORLD.means[:1], WORLD.covs[:1], WORLD.labels[:1])
    uncond = GaussianMixture(
        numbers(1.0), numbers([0.5, 0.0]), numbers([1.0, 0.3], [0.3, 0.8])[None], torch.tensor([0])
    )
    x = torch.cartesian_prod(line(-6, 2, 401), line(-2, 4, 301))
    log_c, log_u = (MultivariateNormal(w.means[0], w.covs[0]).log_prob(x) for w in (cond, uncond))
    p = (1.7 * log_c - 0.7 * log_u).softmax(0)
    mean = p @ x
    tilt = tilted_gaussian(cond, uncond, 1.7)
    assert_close(tilt.means[0], mean)
    assert_close(tilt.covs[0], torch.einsum("n,ni,nj->ij", p, x - mean, x - mean))


# --- limits, numerics, errors ----------------------------------------------------------------------------------------


def test_two_atoms_have_a_hyperbolic_tangent_for_a_denoiser():
    world, x, t = line2(1.0, 0.0), random(5, 1), at(0.5, 5)  # alpha_bar = 1/2
    assert_close(world.posterior_mean(x, t, NOW), torch.tanh(math.sqrt(0.5) * x / 0.5))


def test_each_point_is_seen_alone_at_its_own_time(schedule: Schedule):
    xt, t = random(3, 2), numbers(0.1, 0.5, 0.9)
    for method in (WORLD.log_prob, WORLD.score, WORLD.posterior_mean, WORLD.posterior_cov):
        for i in range(3):
            assert_close(method(xt, t, schedule, 1)[i], method(xt[i : i + 1], t[i : i + 1], schedule, 1)[0])


def test_float32_points_get_float32_answers():
    xt, t = batch(NOW)
    for method in (WORLD.log_prob, WORLD.score, WORLD.posterior_mean, WORLD.posterior_cov):
        single = method(xt.float(), t.float(), NOW)
        assert single.dtype == torch.float32
        assert_close(single.double(), method(xt, t, NOW), rtol=1e-3, atol=1e-4)  # 1e-7 times 1 / sigma^2 at t = .02


def test_archipelagos_classes_and_islands_are_the_courses():
    shares = [WORLD.weights[WORLD.labels == label].sum().item() for label in range(3)]
    assert shares == pytest.approx([0.3, 0.3, 0.4])
    assert torch.einsum("kii->k", WORLD.covs)[:2].tolist() == pytest.approx([0.185, 0.185])  # both islands of class 0
    lonely, crowded = (numbers([*m]) for m in ((-2.0, 1.0), (1.1, 1.0)))
    along = numbers([math.cos(math.radians(20)), math.sin(math.radians(20))])  # the long axis, 20 degrees anticlockwise
    assert (along @ WORLD.covs[0] @ along.T).item() == pytest.approx(0.35**2)
    assert_close(WORLD.means[:2], torch.cat([lonely, crowded]))


def test_line2_is_symmetric_and_ring_is_the_same_from_each_class():
    x, t = random(5, 1), at(0.3, 5)
    world = line2(1.5, 0.2)
    assert_close(world.log_prob(x, t, NOW, 0), world.log_prob(-x, t, NOW, 1))
    assert_close(noised(world, 0.0, NOW, 1).mean, numbers(1.5))
    x, angle = random(5, 2), 2 * math.pi / 5
    turn = numbers([math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)])
    for label in range(5):
        assert_close(ring(5).log_prob(x, t, NOW, label), ring(5).log_prob(x @ turn.T, t, NOW, (label + 1) % 5))
    assert_close(ring(5).means.norm(dim=1), at(2.0, 5))


GOOD = {
    "weights": numbers(0.5, 0.5),
    "means": numbers([0.0, 0.0], [1.0, 1.0]),
    "covs": torch.eye(2).double().expand(2, 2, 2),
    "labels": torch.tensor([0, 2]),
}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"means": numbers(0.0, 1.0)}, "means must be (k, d), got (2,)"),
        ({"weights": numbers(1.0)}, "2 components in 2 dimensions need weights (2,)"),
        ({"labels": torch.tensor([0])}, "2 components in 2 dimensions need weights (2,)"),
        ({"covs": torch.eye(2).double()}, "2 components in 2 dimensions need weights (2,)"),
        ({"weights": numbers(1.0, 0.0)}, "every weight must be positive"),
        ({"covs": -torch.eye(2).double().expand(2, 2, 2)}, "every covariance must be symmetric and positive"),
        ({"covs": numbers([1.0, 0.5], [0.0, 1.0]).expand(2, 2, 2)}, "every covariance must be symmetric and positive"),
    ],
)
def test_a_mixture_that_does_not_fit_together_is_refused(bad: dict, message: str):
    GaussianMixture(**GOOD)
    with pytest.raises(ValueError, match=re.escape(message)):
        GaussianMixture(**GOOD | bad)


def test_float32_covariances_on_the_border_are_accepted():
    lines = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    covs = lines[:, :, None] * lines[:, None]  # of rank one: two eigenvalues are 0, give or take rounding
    assert torch.linalg.eigvalsh(covs).min() < -1e-9
    GaussianMixture(torch.ones(50), torch.zeros(50, 3), covs, torch.zeros(50, dtype=torch.long))


@pytest.mark.parametrize("method", [lambda w: w.given(1), lambda w: w.tilted(1, 2.0), lambda w: w.denoiser(NOW, 1)])
def test_a_class_without_a_component_is_refused(method):
    with pytest.raises(ValueError, match=re.escape("no component has label 1: the labels are [0, 2]")):
        method(GaussianMixture(**GOOD))


def test_a_tilt_that_does_not_exist_is_refused():
    cube = GaussianMixture(numbers(1.0), torch.zeros(1, 3).double(), torch.eye(3).double()[None], torch.tensor([0]))
    with pytest.raises(ValueError, match="a grid needs one or two dimensions, this world has 3"):
        cube.tilted(0, 2.0)
    with pytest.raises(ValueError, match="only single Gaussians have a tilt in closed form"):
        tilted_gaussian(WORLD, gaussian(0.0, 1.0), 2.0)
    with pytest.raises(ValueError, match=re.escape("at scale 2.0 the tilt cannot be normalised")):
        tilted_gaussian(gaussian(0.0, 2.0), gaussian(0.0, 1.0), 2.0)  # precision 2 / 2 - 1 = 0
