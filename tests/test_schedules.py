"""Facts about the paths from data to noise. Float64, and assert_close's own tolerance for rounding, unless said."""

import math
from fractions import Fraction
from itertools import accumulate
from operator import mul

import pytest
import torch
from diffusers import DDPMScheduler
from jaxtyping import TypeCheckError
from torch import Generator, Tensor
from torch.testing import assert_close

from condiff_ref.schedules import (
    Schedule,
    add_noise,
    cosine,
    ddpm_alpha_bar,
    discrete,
    draw_noise,
    flow,
    linear_beta,
    time_grid,
)
from condiff_ref.shapes import pad

INSIDE = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
DDPM_BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
SD_BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2  # Stable Diffusion's scaled-linear


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- the curves ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_time_zero_is_the_data_exactly(schedule: Schedule, dtype: torch.dtype):
    x0, eps = random(4, 2).to(dtype), random(4, 2, seed=1).to(dtype)
    assert torch.equal(add_noise(x0, eps, torch.zeros(4, dtype=dtype), schedule), x0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("path", [cosine, flow])
def test_time_one_is_pure_noise_exactly_on_cosine_and_flow(path, dtype: torch.dtype):
    x0, eps = 1e6 * random(4, 2).to(dtype), random(4, 2, seed=1).to(dtype)  # a leak of 1e-8 of the data would show
    assert torch.equal(add_noise(x0, eps, torch.ones(4, dtype=dtype), path()), eps)


def test_cosine_and_linear_beta_preserve_variance_and_flow_is_straight():
    for path in (cosine(), linear_beta()):
        assert_close(path.alpha(INSIDE) ** 2 + path.sigma(INSIDE) ** 2, torch.ones_like(INSIDE))
    assert_close(flow().alpha(INSIDE) + flow().sigma(INSIDE), torch.ones_like(INSIDE))
    assert_close(flow().sigma(INSIDE), INSIDE)


def test_cosine_turns_by_a_right_angle():
    alpha, sigma = cosine().at(torch.tensor([1 / 3], dtype=torch.float64), like=random(1))  # 30 degrees
    assert_close(torch.stack([alpha[0], sigma[0]]), torch.tensor([math.sqrt(3) / 2, 0.5], dtype=torch.float64))


def test_linear_beta_solves_d_alpha_is_minus_half_beta_alpha():
    schedule, t = linear_beta(beta_min=0.4, beta_max=7.0), INSIDE.clone().requires_grad_()
    alpha = schedule.alpha(t)
    (slope,) = torch.autograd.grad(alpha.sum(), t)
    assert_close(slope, -0.5 * (0.4 + 6.6 * INSIDE) * alpha.detach())


def test_linear_beta_is_the_limit_of_ddpms_table_as_its_steps_grow_finer():
    def gap(steps: int) -> float:
        alpha_bar = ddpm_alpha_bar(torch.linspace(0.1, 20.0, steps, dtype=torch.float64) / steps)
        t = torch.arange(1, steps + 1, dtype=torch.float64) / steps
        return (linear_beta().alpha(t) ** 2 - alpha_bar).abs().max().item()

    # A Riemann sum: its error is of order 1 / steps. At DDPM's own 1000 steps the betas are its published ones.
    assert gap(1000) < 0.01
    assert gap(1000) / gap(4000) == pytest.approx(4, rel=0.02)


def test_rates_are_the_derivatives_of_the_curves(schedule: Schedule):
    t = INSIDE.clone().requires_grad_()
    for curve, rate in zip((schedule.alpha, schedule.sigma), schedule.rates(INSIDE, like=INSIDE), strict=True):
        assert_close(rate, torch.autograd.grad(curve(t).sum(), t)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_snr_falls_from_plus_infinity(schedule: Schedule, dtype: torch.dtype):
    log_snr = schedule.log_snr(torch.linspace(0, 1, 101, dtype=dtype))
    assert log_snr[0] == math.inf
    assert (log_snr.diff() < 0).all()


def test_log_snr_is_the_log_of_the_ratio_of_variances():
    t = torch.tensor([0.2, 0.5], dtype=torch.float64)
    assert_close(flow().log_snr(t), torch.tensor([math.log(16.0), 0.0], dtype=torch.float64))


def test_linear_beta_keeps_its_digits_near_the_data_in_float32():
    sigma = linear_beta().sigma(torch.tensor([1e-6])).item()
    # 1 - alpha^2 is about 1e-7 there, float32's own rounding: without expm1 nothing would be left of it
    assert sigma == pytest.approx(math.sqrt(0.1 * 1e-6), rel=1e-4)


def test_linear_betas_sigma_starts_with_infinite_slope():
    assert linear_beta().d_sigma(torch.zeros(1)).item() == math.inf


# --- DDPM's table ----------------------------------------------------------------------------------------------------


def test_ddpms_table_ends_at_its_published_value():
    assert ddpm_alpha_bar(DDPM_BETAS)[-1].item() == pytest.approx(
        4.0358e-5, abs=5e-10
    )  # half of the last digit printed


def test_stable_diffusions_table_keeps_seven_percent_of_the_signal():
    assert ddpm_alpha_bar(SD_BETAS)[-1].sqrt().item() == pytest.approx(0.06826, abs=1e-5)  # Lin et al. 2023


def test_the_tables_first_entry_is_after_one_step():
    assert ddpm_alpha_bar(DDPM_BETAS)[0].item() == pytest.approx(1 - 1e-4, abs=1e-15)


def test_the_table_is_multiplied_in_float64():
    betas = DDPM_BETAS.float()
    exact = torch.tensor([float(p) for p in accumulate((1 - Fraction(beta) for beta in betas.tolist()), mul)])
    assert_close(
        ddpm_alpha_bar(betas), exact, rtol=1e-7, atol=0
    )  # float32's rounding, once, is at most 6e-8; all the way, 3e-7


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1, math.nan])
def test_a_beta_outside_zero_to_one_is_refused(beta: float):
    with pytest.raises(ValueError, match=r"every beta must lie strictly between 0 and 1"):
        ddpm_alpha_bar(torch.tensor([0.1, beta]))


@pytest.mark.parametrize(
    ("betas", "config"),
    [
        (DDPM_BETAS, {"beta_start": 1e-4, "beta_end": 0.02}),
        (SD_BETAS, {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}),
    ],
    ids=["linear", "scaled_linear"],
)
def test_adding_noise_by_the_table_is_diffusers_add_noise(betas: Tensor, config: dict):
    alpha_bar = ddpm_alpha_bar(betas).float()  # diffusers' table is float32, hence the tolerance

    def index(t: Tensor) -> Tensor:  # our t = i / 1000 is the paper's i = 1 .. 1000 and diffusers' i - 1
        return (1000 * t).round().long() - 1

    def none(t: Tensor) -> Tensor:
        raise NotImplementedError

    table = Schedule(lambda t: alpha_bar[index(t)].sqrt(), lambda t: (1 - alpha_bar[index(t)]).sqrt(), none, none)
    x0, eps, steps = random(4, 1, 8, 8).float(), random(4, 1, 8, 8, seed=1).float(), torch.tensor([1, 11, 501, 1000])
    theirs = DDPMScheduler(1000, **config).add_noise(x0, eps, steps - 1)
    assert_close(add_noise(x0, eps, steps / 1000, table), theirs, atol=2e-5, rtol=0)


# --- noise and times -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 4, 8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_example_is_noised_at_its_own_time(schedule: Schedule, shape: tuple, dtype: torch.dtype):
    x0, eps, t = random(*shape).to(dtype), random(*shape, seed=1).to(dtype), torch.tensor([0.1, 0.5, 0.9]).to(dtype)
    xt = add_noise(x0, eps, t, schedule)
    assert xt.dtype == dtype
    for i in range(3):
        alpha, sigma = schedule.alpha(t)[i].item(), schedule.sigma(t)[i].item()
        assert_close(xt[i], alpha * x0[i] + sigma * eps[i])


def test_the_scales_take_the_datas_dtype(schedule: Schedule):
    t = torch.tensor([0.5], dtype=torch.float64)
    for number in (*schedule.at(t, like=torch.ones(1, 2)), *schedule.rates(t, like=torch.ones(1, 2))):
        assert (number.dtype, number.shape) == (torch.float32, (1, 1))


def test_pad_multiplies_whole_examples():
    product = pad(torch.tensor([2.0, 3.0]), like=torch.ones(2, 4, 5)) * torch.ones(2, 4, 5)
    assert torch.equal(product[0], torch.full((4, 5), 2.0))
    assert torch.equal(product[1], torch.full((4, 5), 3.0))


def test_a_time_per_pixel_and_data_of_two_shapes_are_refused():
    with pytest.raises(TypeCheckError):
        add_noise(torch.ones(3, 2), torch.ones(3, 2), torch.ones(3, 1), flow())
    with pytest.raises(TypeCheckError):
        add_noise(torch.ones(3, 2), torch.ones(3, 3), torch.ones(3), flow())


def test_draw_noise_is_the_generators_next_numbers():
    like = torch.zeros(5, 3, dtype=torch.float64)
    before = torch.get_rng_state()
    assert torch.equal(draw_noise(like, torch.Generator().manual_seed(7)), random(5, 3, seed=7))
    assert torch.equal(torch.get_rng_state(), before)  # the global generator is left alone


def test_draw_noise_without_a_generator_follows_torchs_global_one():
    with torch.random.fork_rng():
        torch.manual_seed(7)
        assert torch.equal(draw_noise(torch.zeros(5, 3, dtype=torch.float64)), random(5, 3, seed=7))


def test_time_grid_is_equally_spaced_from_start_to_end():
    assert_close(time_grid(4, start=0.9, end=0.1), torch.tensor([0.9, 0.7, 0.5, 0.3, 0.1]))
    grid = time_grid(50)
    assert (len(grid), grid[0], grid[-1]) == (51, torch.tensor(0.999), 0)


@pytest.mark.parametrize(
    "arguments", [(0,), (-1,), (10, 0.5, 0.5), (10, 0.3, 0.5), (10, 1.1), (10, 0.9, -0.1), (10, math.nan)]
)
def test_a_time_grid_that_does_not_fall_from_one_to_zero_is_refused(arguments: tuple):
    with pytest.raises(ValueError, match=r"need steps >= 1 and 0 <= end < start <= 1, got steps="):
        time_grid(*arguments)


def test_a_discrete_table_is_ddpms_own_path():
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    table = torch.cat([torch.ones(1, dtype=torch.float64), ddpm_alpha_bar(betas)])
    path, scheduler = discrete(table), DDPMScheduler(1000, 1e-4, 0.02, "linear")
    x0, eps = torch.randn(2, 3, 4, generator=Generator().manual_seed(0))
    t = torch.tensor([1.0, 500.0, 1000.0])
    theirs = scheduler.add_noise(x0, eps, t.long() - 1)  # diffusers counts from 0
    torch.testing.assert_close(add_noise(x0, eps, t, path), theirs, atol=1e-5, rtol=1e-5)
    assert torch.equal(add_noise(x0, eps, 0 * t, path), x0)
    with pytest.raises(ValueError, match="no time derivative"):
        path.rates(t, x0)
