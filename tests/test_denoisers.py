"""Facts about denoisers: every kind of exact network is the same denoiser, and what it costs is counted."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from condiff_ref.denoisers import CallCounter, as_denoiser, clip_x0
from condiff_ref.guidance import cfg
from condiff_ref.mixture import archipelago
from condiff_ref.predictions import KINDS, target
from condiff_ref.samplers import ddim_step, euler_step, heun_step, sample
from condiff_ref.schedules import Schedule, cosine, time_grid

WORLD = archipelago()
T = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_network_of_any_kind_is_the_posterior_mean(kind: str, schedule: Schedule):
    def network(xt: Tensor, t: Tensor) -> Tensor:  # the best prediction is the mean of the target given xt
        score = WORLD.score(xt, t, schedule)
        alpha, sigma = schedule.at(t, xt)
        return target(kind, (xt + sigma**2 * score) / alpha, -sigma * score, t, schedule)

    xt = random(3, 2)
    assert_close(as_denoiser(network, kind, schedule)(xt, T), WORLD.posterior_mean(xt, T, schedule))


def test_clipping_bounds_the_estimate_and_leaves_the_rest():
    clipped = clip_x0(lambda xt, t: xt, low=-0.5, high=2.0)
    assert clipped(torch.tensor([[-3.0, -0.4, 1.9, 5.0]]), torch.ones(1)).tolist() == [
        [-0.5, pytest.approx(-0.4), pytest.approx(1.9), 2.0]
    ]


def test_clipping_before_guidance_is_not_clipping_after_it():
    def cond(xt: Tensor, t: Tensor) -> Tensor:
        return torch.full_like(xt, 1.5)

    def uncond(xt: Tensor, t: Tensor) -> Tensor:
        return torch.full_like(xt, 1.2)

    xt, t = torch.zeros(1, 1), torch.ones(1)
    before, after = cfg(clip_x0(cond), clip_x0(uncond), 3.0), clip_x0(cfg(cond, uncond, -3.0))
    assert (before(xt, t).item(), after(xt, t).item()) == (1.0, pytest.approx(1.2 - 3 * 0.3))


@pytest.mark.parametrize(("step", "calls"), [(ddim_step, 10), (euler_step, 10), (heun_step, 19)])
def test_evaluations_are_one_per_step_and_two_for_heun_except_the_last(step, calls: int):
    counter = CallCounter(WORLD.denoiser(cosine()))
    sample(step(cosine()), counter, random(6, 2), time_grid(10))
    assert (counter.calls, counter.examples) == (calls, 6 * calls)


def test_counting_changes_nothing():
    denoiser = WORLD.denoiser(cosine())
    assert torch.equal(CallCounter(denoiser)(random(3, 2), T), denoiser(random(3, 2), T))


def test_a_denoiser_leaves_no_graph_but_lets_gradients_through(schedule: Schedule):
    denoiser = clip_x0(as_denoiser(lambda xt, t: xt.sin(), "v", schedule), -100.0, 100.0)
    assert not denoiser(random(3, 2), T).requires_grad
    xt = random(3, 2).requires_grad_()
    (gradient,) = torch.autograd.grad(denoiser(xt, T).sum(), xt)
    step = 1e-6
    slope = (denoiser(xt + step, T) - denoiser(xt - step, T)).detach() / (2 * step)  # pointwise: one slope per number
    assert_close(gradient, slope, rtol=1e-6, atol=1e-6)  # central differences: step^2 and rounding / step
