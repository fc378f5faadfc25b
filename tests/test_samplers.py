"""Facts about the samplers: closed forms, orders of accuracy, the continuity equation, and diffusers as an oracle.

Float64, and assert_close's own tolerance for rounding (1e-7), unless said. Numbers of an "erratum" and "the curriculum"
were computed for the course before this package and without it.
"""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch.testing import assert_close

from condiff_ref.denoisers import CallCounter, as_denoiser
from condiff_ref.guidance import cfg
from condiff_ref.mixture import GaussianMixture, archipelago, line2, tilted_gaussian
from condiff_ref.samplers import (
    ddim_step,
    ddpm_step,
    euler_step,
    heun_step,
    posterior,
    sample,
    trajectory,
    velocity,
)
from condiff_ref.schedules import Schedule, cosine, ddpm_alpha_bar, flow, time_grid
from condiff_ref.shapes import Denoiser, Step

WORLD = archipelago()
DDPM_TABLE = ddpm_alpha_bar(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
STEPS = {
    "ddpm": lambda schedule: ddpm_step(schedule, generator=torch.Generator().manual_seed(0)),
    "ddim": ddim_step,
    "ddim, eta 1/2": lambda schedule: ddim_step(schedule, eta=0.5, generator=torch.Generator().manual_seed(0)),
    "euler": euler_step,
    "heun": heun_step,
}


def numbers(*values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def grid(steps: int, start: float = 1.0, end: float = 0.0) -> Tensor:
    return torch.linspace(start, end, steps + 1, dtype=torch.float64)


def gaussian(mean: float, variance: float) -> GaussianMixture:
    return GaussianMixture(numbers(1.0), numbers([mean]), numbers([[variance]]), torch.tensor([0]))


def table(alpha_bar: Tensor) -> Schedule:
    """DDPM's integers i = 0 .. 1000 as our times i / 1000; diffusers counts the same noise levels from 0, i - 1."""

    def at(t: Tensor) -> Tensor:
        return torch.cat([alpha_bar.new_ones(1), alpha_bar])[(1000 * t).round().long()]

    def no_rate(t: Tensor) -> Tensor:
        raise NotImplementedError

    return Schedule(lambda t: at(t).sqrt(), lambda t: (1 - at(t)).sqrt(), no_rate, no_rate)


# --- the posterior of a step -----------------------------------------------------------------------------------------


def test_posterior_is_bayes_rule_for_gaussians(schedule: Schedule):
    t, s = numbers(0.2, 0.5, 0.8, 0.95), numbers(0.1, 0.1, 0.7, 0.5)
    on_xt, on_x0, std = posterior(schedule, t, s, like=t)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.at(t, t), schedule.at(s, s)
    forward = alpha_t / alpha_s  # xt = forward xs + noise, which brings sigma_s^2 to sigma_t^2
    variance = sigma_t**2 - forward**2 * sigma_s**2
    precision = forward**2 / variance + 1 / sigma_s**2  # what xt says about xs, plus what x0 says
    assert_close(std, precision**-0.5)
    assert_close(on_xt, forward / variance / precision)
    assert_close(on_x0, alpha_s / sigma_s**2 / precision)


def test_posterior_averaged_over_xt_is_q_of_xs_given_x0(schedule: Schedule):
    t, s = numbers(0.2, 0.5, 0.8, 1.0), numbers(0.0, 0.1, 0.7, 0.5)
    on_xt, on_x0, std = posterior(schedule, t, s, like=t)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.at(t, t), schedule.at(s, s)
    assert_close(on_xt * alpha_t + on_x0, alpha_s)
    assert_close((on_xt * sigma_t) ** 2 + std**2, sigma_s**2)


def test_the_last_step_lands_on_the_estimate_of_x0(schedule: Schedule):
    assert [number.item() for number in posterior(schedule, numbers(0.3), numbers(0.0), random(1))] == [0, 1, 0]


def test_posterior_on_ddpms_table_is_erratum_e15s_number_and_ho_et_als_variance():
    on_xt, on_x0, std = posterior(table(DDPM_TABLE), numbers(0.5), numbers(0.499), like=random(1))
    assert (on_xt * -0.4 + on_x0 * 0.7).item() == pytest.approx(-0.395493618, abs=5e-10)
    beta = 1e-4 + 499 / 999 * (0.02 - 1e-4)
    tilde = (1 - DDPM_TABLE[498]) / (1 - DDPM_TABLE[499]) * beta
    assert std.item() ** 2 == pytest.approx(tilde.item())


# --- DDPM and DDIM ---------------------------------------------------------------------------------------------------


def test_ddim_with_eta_one_is_ddpm_with_the_same_noise(schedule: Schedule):
    denoiser, x = WORLD.denoiser(schedule, label=0), random(16, 2)
    ddim = ddim_step(schedule, eta=1.0, generator=torch.Generator().manual_seed(1))
    ddpm = ddpm_step(schedule, generator=torch.Generator().manual_seed(1))
    assert_close(sample(ddim, denoiser, x, time_grid(25)), sample(ddpm, denoiser, x, time_grid(25)))


def test_ddim_on_straight_paths_is_euler():
    path, x = flow(), random(256, 2)
    guided = cfg(WORLD.denoiser(path, label=1), WORLD.denoiser(path), 3.0)
    euler = sample(euler_step(path), guided, x, time_grid(25))
    assert_close(sample(ddim_step(path), guided, x, time_grid(25)), euler, atol=1e-9, rtol=0)
    curved, denoiser = cosine(), WORLD.denoiser(cosine())
    ends = [sample(step(curved), denoiser, x, time_grid(25)) for step in (ddim_step, euler_step)]
    assert (ends[0] - ends[1]).abs().max() > 0.01  # on a curved path it is not


@pytest.mark.parametrize("steps", [1, 7])
def test_ddim_is_exact_where_the_data_are_one_point(steps: int, schedule: Schedule):
    point, eps, t, s = numbers([1.5, -2.0]), random(1, 2), numbers(0.9), numbers(0.2)
    alpha, sigma = schedule.at(t, eps)
    end = sample(ddim_step(schedule), lambda xt, t: point, alpha * point + sigma * eps, grid(steps, 0.9, 0.2))
    alpha, sigma = schedule.at(s, eps)
    assert_close(end, alpha * point + sigma * eps)


def test_a_ddim_step_for_standard_normal_data_turns_by_the_angle_between_the_times():
    x = random(5, 1)
    end = sample(ddim_step(cosine()), gaussian(0.0, 1.0).denoiser(cosine()), x, numbers(1.0, 0.7, 0.6, 0.1))
    assert_close(end, x * math.cos(0.3 * math.pi / 2) * math.cos(0.1 * math.pi / 2) * math.cos(0.5 * math.pi / 2))


@pytest.mark.parametrize(("scale", "end"), [(3.0, 1.348837941), (4.0, 1.498992)])
def test_ten_guided_ddim_steps_end_at_erratum_e2s_and_e9s_numbers(scale: float, end: float):
    path, world = table(DDPM_TABLE), line2(1.0, 0.25)
    guided = cfg(world.denoiser(path, label=1), world.denoiser(path), scale)
    x = sample(ddim_step(path), guided, numbers([-0.5]), grid(10))
    assert x.item() == pytest.approx(end, abs=5e-7)


# --- the ODE ---------------------------------------------------------------------------------------------------------


def test_the_velocity_obeys_the_continuity_equation(schedule: Schedule):  # d log p/dt + div u + u grad log p = 0
    x, t = random(20, 2).requires_grad_(), torch.rand(20, generator=torch.Generator().manual_seed(0)).double()
    t = (0.05 + 0.9 * t).requires_grad_()
    u = velocity(WORLD.denoiser(schedule, label=0), x, t, schedule)
    divergence = sum(torch.autograd.grad(u[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(2))
    score, change = torch.autograd.grad(WORLD.log_prob(x, t, schedule, label=0).sum(), (x, t))
    assert_close(change + divergence + (u * score).sum(1), torch.zeros(20, dtype=torch.float64))


@pytest.mark.parametrize(
    ("path", "coefficient"),
    [(flow, lambda t: -t / (1 - t)), (cosine, lambda t: -math.pi / 2 * torch.tan(math.pi * t / 2))],
)
def test_a_condition_bends_the_velocity_by_b_t_times_the_classifiers_gradient(path, coefficient):
    schedule, x, t = path(), random(9, 2).requires_grad_(), grid(8, 0.9, 0.1)
    bend = velocity(WORLD.denoiser(schedule, 1), x, t, schedule) - velocity(WORLD.denoiser(schedule), x, t, schedule)
    (gradient,) = torch.autograd.grad(WORLD.class_log_prob(x, t, schedule, 1).sum(), x)
    assert_close(bend, coefficient(t)[:, None] * gradient)  # erratum E40 with its time reversed


def exact_end(mean: float, variance: float, x: Tensor, start: float, end: float, schedule: Schedule) -> Tensor:
    """Where the ODE takes x if the data are N(mean, variance): as many standard deviations off the mean as before."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (schedule.at(numbers(time), numbers(0.0)) for time in (start, end))
    ratio = ((alpha_s**2 * variance + sigma_s**2) / (alpha_t**2 * variance + sigma_t**2)).sqrt()
    return alpha_s * mean + ratio * (x - alpha_t * mean)


@pytest.mark.parametrize(("step", "order"), [(euler_step, 1), (ddim_step, 1), (heun_step, 2)])
def test_the_order_of_accuracy(step, order: int, schedule: Schedule):
    x, denoiser = numbers([1.3], [-0.4]), gaussian(-0.7, 0.3).denoiser(schedule)
    truth = exact_end(-0.7, 0.3, x, 0.9, 0.1, schedule)
    errors = [(sample(step(schedule), denoiser, x, grid(n, 0.9, 0.1)) - truth).norm() for n in (20, 40, 80)]
    slopes = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert slopes == pytest.approx([order, order], abs=0.1)  # the next order's share, 1 / n, moves it a little


@pytest.mark.parametrize("path", [cosine, flow])
def test_the_ode_ends_at_mean_plus_std_ratio_times_start(path):
    x = random(5, 1)
    end = sample(heun_step(path()), gaussian(2.0, 0.25).denoiser(path()), x, grid(100))
    assert_close(end, 2.0 + 0.5 * x, atol=1e-3, rtol=0)  # order 2: the error of 100 steps is of order 100^-2


def test_velocity_is_not_finite_at_time_zero():
    assert not velocity(lambda xt, t: xt, random(1, 1), numbers(0.0), flow()).isfinite().any()


# --- what guided samplers sample -------------------------------------------------------------------------------------


def law(step: Step, denoiser: Denoiser, times: Tensor) -> Tensor:
    """The exact (mean, variance) of a sampler that starts from N(0, 1), for a one-dimensional affine denoiser.

    Each of its steps is slope x + shift + std z, read off three probes: two noises at x = 0, one at x = 1.
    """
    n = len(times) - 1
    x = numbers(0.0, 0.0, 1.0).repeat_interleave(n)[:, None]
    first, second, third = step(denoiser, x, times[:-1].repeat(3), times[1:].repeat(3)).view(3, n)
    z = random(3 * n, 1).view(3, n)  # the generators of STEPS start at seed 0 too
    std = (first - second) / (z[0] - z[1])
    shift = first - std * z[0]
    slope = third - std * z[2] - shift
    mean, variance = 0.0, 1.0
    for a, b, c in zip(slope.tolist(), shift.tolist(), std.tolist(), strict=True):
        mean, variance = a * mean + b, a**2 * variance + c**2
    return numbers(mean, variance)


def law_of_infinitely_many_steps(step: str, denoiser: Denoiser, schedule: Schedule) -> list[float]:
    """Richardson: both samplers are of order 1, so that twice as many steps halve the error."""
    coarse, fine = (law(STEPS[step](schedule), denoiser, grid(n)) for n in (1000, 2000))
    return (2 * fine - coarse).tolist()


ORDINARY = (gaussian(1.0, 0.5), gaussian(0.0, 1.0))
WIDE = (gaussian(0.0, 1.0), gaussian(0.0, 2.0))


@pytest.mark.parametrize("path", [cosine, flow])
@pytest.mark.parametrize(
    ("pair", "scale", "tilt", "ode", "sde"),
    [
        (ORDINARY, 1.0, (1, 1 / 2), (1, 1 / 2), (1, 1 / 2)),
        (ORDINARY, 2.0, (4 / 3, 1 / 3), (1.623225240, 1 / 4), (3 / 2, 7 / 24)),  # erratum E1
        (WIDE, 3.0, (0, 1 / 2), (0, 1 / 4), (0, 0.3875)),  # the curriculum's number
    ],
)
def test_cfg_does_not_sample_the_tilt_its_ode_is_geometric_and_ddpm_lies_between(pair, scale, tilt, ode, sde, path):
    """No bug to fix: with variances v_c, v_u the guided ODE ends at v_c^s v_u^(1-s), the tilt p_c^s p_u^(1-s) has
    1 / (s/v_c + (1-s)/v_u), and ancestral sampling ends at a third law. At scale 1 all three are p_c."""
    cond, uncond = pair
    guided = cfg(cond.denoiser(path()), uncond.denoiser(path()), scale)
    exact = tilted_gaussian(cond, uncond, scale)
    assert (exact.means.item(), exact.covs.item()) == pytest.approx(tilt)
    assert ode[1] == pytest.approx(cond.covs.item() ** scale * uncond.covs.item() ** (1 - scale))
    accuracy = {"abs": 1e-4}  # Richardson leaves an error of order 1000^-2, times the constants of three schedules
    assert law_of_infinitely_many_steps("ddim", guided, path()) == pytest.approx(ode, **accuracy)
    assert law_of_infinitely_many_steps("ddpm", guided, path()) == pytest.approx(sde, **accuracy)


# --- diffusers as an oracle ------------------------------------------------------------------------------------------

DIFFUSERS_KINDS = [("eps", "epsilon"), ("x0", "sample"), ("v", "v_prediction")]


def network(xt: Tensor, t: Tensor) -> Tensor:
    """Any function will do: both sides are asked to follow it."""
    return torch.sin(2 * xt) + t[:, None, None, None] * xt.roll(1, dims=3)


def diffusers_run(scheduler, x: Tensor, **options) -> tuple[Tensor, Tensor]:
    """Its end point, and its times in ours."""
    if hasattr(scheduler, "alphas_cumprod"):
        scheduler.alphas_cumprod = DDPM_TABLE  # the same numbers as its own, in float64
    for i in scheduler.timesteps:
        x = scheduler.step(network(x, ((i + 1) / 1000).expand(len(x)).to(x)), i, x, **options).prev_sample
    return x, torch.cat([(scheduler.timesteps + 1) / 1000, torch.zeros(1)]).double()


@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize(("kind", "theirs"), DIFFUSERS_KINDS)
def test_fifty_ddim_steps_are_diffusers(kind: str, theirs: str, eta: float):
    scheduler = DDIMScheduler(1000, prediction_type=theirs, clip_sample=False)
    scheduler.set_timesteps(50)
    x = random(3, 1, 4, 4)
    end, times = diffusers_run(scheduler, x, eta=eta, generator=torch.Generator().manual_seed(1))
    path = table(DDPM_TABLE)
    step = ddim_step(path, eta=eta, generator=torch.Generator().manual_seed(1))
    assert_close(sample(step, as_denoiser(network, kind, path), x, times), end)


@pytest.mark.parametrize(("kind", "theirs"), DIFFUSERS_KINDS)
def test_fifty_ddpm_steps_are_diffusers_with_the_same_noise(kind: str, theirs: str):
    scheduler = DDPMScheduler(1000, prediction_type=theirs, clip_sample=False)
    scheduler.set_timesteps(50)
    x = random(3, 1, 4, 4)
    end, times = diffusers_run(scheduler, x, generator=torch.Generator().manual_seed(1))
    path = table(DDPM_TABLE)
    step = ddpm_step(path, generator=torch.Generator().manual_seed(1))
    assert_close(sample(step, as_denoiser(network, kind, path), x, times), end)


def test_euler_on_the_straight_path_is_diffusers_flow_matching():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(28)
    x = start = random(3, 1, 4, 4).float()  # it computes in float32
    for i, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        x = scheduler.step(network(x, sigma.expand(3)), i, x).prev_sample
    ours = sample(euler_step(flow()), as_denoiser(network, "flow", flow()), start, scheduler.sigmas)
    assert_close(ours, x, atol=1e-4, rtol=1e-4)  # 28 steps of float32 rounding, divided by sigma near 0


# --- steps and trajectories ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STEPS)
def test_examples_do_not_see_each_other(name: str, schedule: Schedule):
    denoiser = WORLD.denoiser(schedule)
    x, t, s = random(3, 2), numbers(0.5, 0.9, 0.4), numbers(0.3, 0.8, 0.1)
    first = STEPS[name](schedule)(denoiser, x, t, s)
    for kept in range(3):
        others = torch.arange(3) != kept
        other_t, other_s = numbers(0.6, 0.7, 0.2).where(others, t), numbers(0.0, 0.1, 0.0).where(others, s)
        second = STEPS[name](schedule)(denoiser, (x + 1).where(others[:, None], x), other_t, other_s)
        assert_close(first[kept], second[kept], atol=1e-14, rtol=0)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("shape", [(4,), (4, 2), (4, 3, 5, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sampling_keeps_shape_and_dtype_and_leaves_its_inputs_alone(name: str, shape: tuple, dtype: torch.dtype):
    x, times = random(*shape).to(dtype), time_grid(5)
    copies = x.clone(), times.clone()
    end = sample(STEPS[name](cosine()), lambda xt, t: xt.tanh(), x, times)
    assert (end.shape, end.dtype) == (x.shape, dtype)
    assert end.isfinite().all()
    assert torch.equal(x, copies[0])
    assert torch.equal(times, copies[1])


@pytest.mark.parametrize("name", STEPS)
def test_a_step_to_the_data_is_finite(name: str, schedule: Schedule):
    end = STEPS[name](schedule)(WORLD.denoiser(schedule), random(3, 2), numbers(0.1, 0.5, 0.9), numbers(0.0, 0.0, 0.1))
    assert end.isfinite().all()


@pytest.mark.parametrize(("name", "stochastic"), [("ddpm", True), ("ddim", False), ("ddim, eta 1/2", True)])
def test_only_stochastic_steps_draw_and_only_from_their_generator(name: str, stochastic: bool):
    before, denoiser, x = torch.get_rng_state(), WORLD.denoiser(cosine()), random(4, 2)
    step = STEPS[name](cosine())
    first, again = (sample(step, denoiser, x, time_grid(5)) for _ in range(2))  # the generator has moved on
    assert torch.equal(first, again) is not stochastic
    assert torch.equal(first, sample(STEPS[name](cosine()), denoiser, x, time_grid(5)))  # same seed, same samples
    assert torch.equal(torch.get_rng_state(), before)


def test_a_trajectory_yields_each_point_and_computes_no_further_than_asked():
    counter, x, times = CallCounter(WORLD.denoiser(cosine())), random(4, 2), time_grid(10)
    points = trajectory(ddim_step(cosine()), counter, x, times)
    assert counter.calls == 0
    third = [next(points) for _ in range(3)][-1]
    assert counter.calls == 3
    assert_close(third, sample(ddim_step(cosine()), counter, x, times[:4]))
    rest = list(points)
    assert len(rest) == 7
    assert_close(rest[-1], sample(ddim_step(cosine()), counter, x, times))


def test_sampling_leaves_no_graph():
    weight = torch.ones(1, dtype=torch.float64, requires_grad=True)
    assert not sample(euler_step(cosine()), lambda xt, t: weight * xt, random(4, 2), time_grid(3)).requires_grad
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    "times", [(0.0, 0.5, 1.0), (0.9, 0.5, 0.5), (0.9,), (999.0, 500.0, 0.0), (0.9, 0.1, -0.1), (0.9, math.nan, 0.0)]
)
def test_times_that_do_not_decrease_within_zero_and_one_are_refused(times: tuple):
    with pytest.raises(ValueError, match="times must decrease, from noise .near 1. to data .0., and hold at least two"):
        sample(ddim_step(cosine()), WORLD.denoiser(cosine()), random(4, 2), numbers(*times))
