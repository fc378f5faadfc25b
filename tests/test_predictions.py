"""Facts about the five kinds of prediction, on every path. Float64, assert_close's own tolerance unless said."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from condiff_ref.predictions import KINDS, basis, convert, implied_weight, solve, target
from condiff_ref.schedules import Schedule, add_noise, cosine, flow, linear_beta

# Away from both ends, where some kinds lose a number: the worst division there is by alpha or sigma, about 0.01.
TIMES = st.lists(st.floats(0.02, 0.98), min_size=16, max_size=16).map(lambda t: torch.tensor(t, dtype=torch.float64))
POINTS = st.integers(0, 2**32).map(lambda seed: random(16, 3, seed=seed))
QUICK = settings(max_examples=4, deadline=None)  # of 16 times each, on every path and kind
HALF = torch.tensor([0.5], dtype=torch.float64)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- what each kind is -----------------------------------------------------------------------------------------------


def test_every_kind_by_hand_at_thirty_degrees():
    t, x0, eps = torch.tensor([1 / 3], dtype=torch.float64), 2 * torch.ones(1, 1).double(), torch.ones(1, 1).double()
    alpha, sigma = math.sqrt(3) / 2, 1 / 2
    flow = math.pi / 2 * (-sigma * 2 + alpha * 1)  # on this path d alpha = -pi/2 sigma, d sigma = pi/2 alpha
    by_hand = {"eps": 1, "x0": 2, "v": alpha * 1 - sigma * 2, "flow": flow, "score": -1 / sigma}
    assert {kind: target(kind, x0, eps, t, cosine()).item() for kind in KINDS} == pytest.approx(by_hand)


def test_flow_is_the_velocity_of_xt(schedule: Schedule):
    x0, eps, t = random(4, 3), random(4, 3, seed=1), torch.tensor([0.1, 0.4, 0.7, 0.9], dtype=torch.float64)
    (velocity,) = torch.autograd.functional.jvp(lambda t: add_noise(x0, eps, t, schedule), t, torch.ones_like(t))[1:]
    assert_close(target("flow", x0, eps, t, schedule), velocity)


def test_score_is_the_gradient_of_log_q_of_xt_given_x0(schedule: Schedule):
    x0, eps, t = random(4, 3), random(4, 3, seed=1), torch.tensor([0.1, 0.4, 0.7, 0.9], dtype=torch.float64)
    xt = add_noise(x0, eps, t, schedule).requires_grad_()
    q = torch.distributions.Normal(schedule.alpha(t)[:, None] * x0, schedule.sigma(t)[:, None])
    (gradient,) = torch.autograd.grad(q.log_prob(xt).sum(), xt)
    assert_close(target("score", x0, eps, t, schedule), gradient)


def test_v_is_diffusers_get_velocity():
    scheduler = DDPMScheduler(1000)
    alpha_bar, step = scheduler.alphas_cumprod[600], torch.tensor([600])
    angle = 2 / math.pi * torch.acos(alpha_bar.sqrt())[None]  # the time at which the cosine path is as noisy
    x0, eps = random(1, 1, 8, 8).float(), random(1, 1, 8, 8, seed=1).float()
    assert_close(target("v", x0, eps, angle, cosine()), scheduler.get_velocity(x0, eps, step))


# --- one kind from another -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@QUICK
@given(x0=POINTS, eps=POINTS, t=TIMES)
def test_solve_inverts_target(kind: str, schedule: Schedule, x0: Tensor, eps: Tensor, t: Tensor):
    out, xt = target(kind, x0, eps, t, schedule), add_noise(x0, eps, t, schedule)
    assert_close(solve(kind, out, xt, t, schedule), (x0, eps))


@pytest.mark.parametrize("kind_in", KINDS)
@pytest.mark.parametrize("kind_out", KINDS)
@QUICK
@given(x0=POINTS, eps=POINTS, t=TIMES)
def test_every_kind_converts_to_every_other(
    kind_in: str, kind_out: str, schedule: Schedule, x0: Tensor, eps: Tensor, t: Tensor
):
    out, xt = target(kind_in, x0, eps, t, schedule), add_noise(x0, eps, t, schedule)
    there = convert(kind_in, kind_out, out, xt, t, schedule)
    assert_close(there, target(kind_out, x0, eps, t, schedule))
    assert_close(convert(kind_out, kind_in, there, xt, t, schedule), out)


@pytest.mark.parametrize("kind", KINDS)
@QUICK
@given(out=POINTS, xt=POINTS, t=TIMES)
def test_whatever_a_network_says_the_two_estimates_add_up_to_xt(
    kind: str, schedule: Schedule, out: Tensor, xt: Tensor, t: Tensor
):
    x0, eps = solve(kind, out, xt, t, schedule)
    assert_close(add_noise(x0, eps, t, schedule), xt)


@pytest.mark.parametrize("kind", KINDS)
@QUICK
@given(x0=POINTS, error=POINTS, t=TIMES)
def test_implied_weight_is_the_ratio_of_the_squared_errors(
    kind: str, schedule: Schedule, x0: Tensor, error: Tensor, t: Tensor
):
    eps = random(16, 3, seed=1)
    right = target(kind, x0, eps, t, schedule)
    x0_hat, _ = solve(kind, right + error, add_noise(x0, eps, t, schedule), t, schedule)
    ratio = error.square().sum(1) / (x0_hat - x0).square().sum(1)
    assert_close(implied_weight(kind, t, schedule), ratio, rtol=1e-6, atol=0)


def test_the_implied_weights_of_the_literature(schedule: Schedule):
    t = torch.linspace(0.02, 0.98, 9, dtype=torch.float64)
    snr = schedule.log_snr(t).exp()
    assert_close(implied_weight("eps", t, schedule), snr)
    assert_close(implied_weight("x0", t, schedule), torch.ones_like(t))
    assert_close(implied_weight("v", t, cosine()), cosine().log_snr(t).exp() + 1)
    assert_close(implied_weight("v", t, linear_beta()), linear_beta().log_snr(t).exp() + 1)
    assert_close(implied_weight("flow", t, flow()), 1 / t**2)


# --- limits and errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "lost_at"), [("eps", {1}), ("x0", {0}), ("v", set()), ("flow", set()), ("score", {0, 1})]
)
@pytest.mark.parametrize("path", [cosine, flow])
def test_each_kind_loses_its_information_where_the_docstring_says(kind: str, lost_at: set, path):
    lost = set()
    for end in (0, 1):
        numbers = solve(kind, random(1, 3), random(1, 3, seed=1), torch.full((1,), end).double(), path())
        if not all(number.isfinite().all() for number in numbers):
            lost.add(end)
    assert lost == lost_at


def test_an_unknown_kind_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown kind 'epsilon': choose one of eps, x0, v, flow, score"):
        basis("epsilon", HALF, random(1, 2), cosine())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 4, 8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_examples_do_not_see_each_other(kind: str, schedule: Schedule, shape: tuple, dtype: torch.dtype):
    out, xt = random(*shape).to(dtype), random(*shape, seed=1).to(dtype)
    t = torch.tensor([0.2, 0.5, 0.8], dtype=dtype)
    together = solve(kind, out, xt, t, schedule)
    for i in range(3):
        alone = solve(kind, out[i : i + 1], xt[i : i + 1], t[i : i + 1], schedule)
        assert_close([number[i : i + 1] for number in together], list(alone), rtol=0, atol=0)
