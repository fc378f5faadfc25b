"""Lesson 10's worlds, league and museum: against quadrature, against other routes, and each exhibit for what it is."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from condiff_ref import league
from condiff_ref.frontier import measured
from condiff_ref.metrics import energy_distance
from condiff_ref.mixture import archipelago, line2
from condiff_ref.museum import EXHIBITS, MUSEUM_WORDS
from condiff_ref.schedules import cosine

SCHEDULE = cosine()


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=Generator().manual_seed(seed), dtype=torch.float64)


# --- measured ---------------------------------------------------------------------------------------------------------


def test_a_measured_world_is_bayes_rule_on_the_densities():
    world, x = archipelago(), normal(0, 50, 2)
    A, R, y = normal(1, 1, 2), torch.full((1, 1), 0.3).double(), normal(2, 1)
    zero = torch.zeros(50).double()
    log_likelihood = -((x @ A[0] - y) ** 2) / (2 * R[0, 0])
    gap = measured(world, A, R, y).log_prob(x, zero, SCHEDULE) - world.log_prob(x, zero, SCHEDULE) - log_likelihood
    torch.testing.assert_close(gap, gap[:1].expand(50), rtol=0, atol=1e-10)  # log p(y): the same everywhere


def test_its_score_less_the_old_one_is_the_gradient_of_the_noised_likelihood():
    world, t = line2(1.0, 0.3), torch.full((7,), 0.5).double()
    A, R, y = torch.full((1, 1), 0.8).double(), torch.full((1, 1), 0.2).double(), torch.full((1,), 0.7).double()
    x = torch.linspace(-2, 2, 7).double()[:, None]
    alpha, sigma = (float(v) for v in (SCHEDULE.alpha(t[:1]), SCHEDULE.sigma(t[:1])))
    x0 = torch.linspace(-8, 8, 4001).double()
    log_prior = world.log_prob(x0[:, None], torch.zeros(4001).double(), SCHEDULE)

    def log_p(x: Tensor) -> Tensor:  # log p(y | xt) by quadrature over x0
        log_xt = -((x - alpha * x0) ** 2) / (2 * sigma**2) + log_prior
        log_y = -((0.8 * x0 - 0.7) ** 2) / 0.4
        return (log_xt + log_y).logsumexp(1) - log_xt.logsumexp(1)

    right = (log_p(x + 1e-5) - log_p(x - 1e-5)) / 2e-5
    got = measured(world, A, R, y).score(x, t, SCHEDULE) - world.score(x, t, SCHEDULE)
    torch.testing.assert_close(got[:, 0], right, rtol=1e-5, atol=1e-6)


def test_shapes_that_disagree_are_refused():
    with pytest.raises(ValueError, match="2 dimensions"):
        measured(archipelago(), torch.ones(1, 3).double(), torch.ones(1, 1).double(), torch.ones(1).double())
    with pytest.raises(ValueError, match="need R"):
        measured(archipelago(), torch.ones(1, 2).double(), torch.ones(2, 2).double(), torch.ones(1).double())


# --- league -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.3, 0.6])
def test_the_noised_tilt_by_draws_agrees_with_the_grid(t):
    world, x = line2(0.5, 0.4), torch.linspace(-2, 2, 9).double()[:, None]  # classes that overlap, so that s matters
    sigma = float(SCHEDULE.sigma(torch.tensor([t]).double()))
    right = -sigma * world.tilted(0, 3.0).score(x, torch.full((9,), t).double(), SCHEDULE)
    got = league.noised_tilt_eps(world, 0, 3.0, x, sigma, 1024, Generator().manual_seed(0))
    torch.testing.assert_close(got, right, rtol=0, atol=0.005)


def test_the_noised_tilt_agrees_with_the_grid_in_two_dimensions():
    world, x, times = archipelago(), normal(0, 12, 2), torch.full((12,), 0.5).double()
    sigma = float(SCHEDULE.sigma(times[:1]))
    right = -sigma * world.tilted(0, 5.0, points=221).score(x, times, SCHEDULE)
    got = league.noised_tilt_eps(world, 0, 5.0, x, sigma, 1024, Generator().manual_seed(0))
    torch.testing.assert_close(got, right, rtol=0, atol=0.02)


def test_samples_of_the_tilt_have_its_moments():
    for world, s in ((line2(0.5, 0.4), 3.0), (archipelago(), 5.0)):
        x, grid = league.tilt_sample(world, 0, s, 20_000, Generator().manual_seed(0)), world.tilted(0, s)
        assert x.shape == (20_000, world.means.shape[1])
        torch.testing.assert_close(x.mean(0), grid.mean(), rtol=0, atol=0.05)
        torch.testing.assert_close(x.T.cov().reshape_as(grid.cov()), grid.cov(), rtol=0, atol=0.08)


def test_coverage_counts_the_most_neglected_island():
    world = archipelago()
    lonely, crowded = (world.means[k] + 0.01 * normal(k, 100, 2) for k in (0, 1))
    assert league.coverage(world, 0, torch.cat([lonely, crowded])) == pytest.approx(1, abs=0.01)
    assert league.coverage(world, 0, torch.cat([lonely, crowded[:20]])) == pytest.approx(2 * 20 / 120, abs=0.01)
    assert league.coverage(world, 0, lonely) == pytest.approx(0, abs=0.01)


def test_without_guidance_the_sampler_gives_the_class():
    world, gen = archipelago(), Generator().manual_seed(0)
    x = league.travel(league.conditional, world, 0, 5.0, league.start(world, 1000, gen), 60)
    assert energy_distance(x, world.given(0).sample(1000, gen)[0]) < 0.02


def test_starting_noise_is_even():
    x = league.start(archipelago(), 512, Generator().manual_seed(0))
    assert x.mean(0).abs().max() < 0.01  # independent draws: 0.04
    assert (x.var(0) - 1).abs().max() < 0.03


def test_hidden_worlds_differ_in_dimension_and_place():
    worlds = [league.hidden_world(Generator().manual_seed(seed)) for seed in range(8)]
    assert {world.means.shape[1] for world in worlds} == {2, 3, 4}
    assert all(world.given(0).weights.tolist() == [0.5, 0.5] for world in worlds)
    same = [world for world in worlds if world.means.shape[1] == 2]
    assert (same[0].means - same[1].means).abs().max() > 0.1


def test_hidden_worlds_share_the_layout_and_the_weights_of_the_archipelago_and_no_more():
    known = archipelago()
    between = torch.cdist(known.means, known.means)
    for seed in range(8):
        world = league.hidden_world(Generator().manual_seed(seed))
        assert (torch.cdist(world.means, world.means) - between).abs().max() < 0.6  # no turn changes a distance
        assert world.labels.tolist() == known.labels.tolist()
        torch.testing.assert_close(world.weights, known.weights)
        variances = torch.linalg.eigvalsh(world.covs)
        assert 0.25**2 - 1e-9 < variances.min() < variances.max() < 0.35**2 + 1e-9


def test_evaluations_over_a_run_are_those_of_the_levels_that_look_at_both():
    world, counted = archipelago(), league.Counted(league.in_interval())
    league.travel(counted, world, 0, 5.0, league.start(world, 20, Generator().manual_seed(0)), 60)
    t = league.time_grid(60, league.START)[:-1].double()
    inside = int((league.SCHEDULE.sigma(t) <= league.SCHEDULE.alpha(t)).sum())
    assert 0 < inside < 60
    assert counted.evaluations == 60 + inside


def test_evaluations_are_counted_by_what_a_rule_looks_at():
    state = dict(s=3.0, sigma_next=0.4, step=0, steps=2)
    for rule, due in ((league.conditional, 1), (league.plain_cfg, 2), (league.in_interval(0.1), 1)):
        counted = league.Counted(rule)
        counted(normal(0, 3, 2), normal(1, 3, 2), normal(2, 3, 2), 0.5, state)
        assert counted.evaluations == due


def test_the_league_ranks_what_is_known():
    rules = dict(
        cfg=league.plain_cfg, interval=league.in_interval(), apg=league.projected(), broken=lambda *_: math.nan * _[0]
    )
    table = league.league(rules, archipelago(), n=300, steps=(15, 30), samplers=dict(oracle=league.oracled))
    assert all(tuple(row) == league.COLUMNS for row in table.values())
    assert table["oracle"]["ED tilt"] < 0.05 < table["interval"]["coverage"] - table["cfg"]["coverage"] - 0.5
    assert table["cfg"]["shift"] < 1e-6 < 0.1 < table["apg"]["shift"]
    assert table["interval"]["NFE"] < table["cfg"]["NFE"] == 60
    assert all(math.isnan(value) for value in table["broken"].values())


def test_particles_without_weights_lose_the_crowded_island_and_with_weights_less_so():
    def growth(sc, su, s, beta, dt):
        return beta * s * (s - 1) / 2 * (sc - su).square().sum(1) * dt

    def share(logw):
        return 1 / logw.softmax(0).square().sum()

    def redraw(logw, gen):
        return torch.multinomial(logw.softmax(0), len(logw), replacement=True, generator=gen)

    world, gen = archipelago(), Generator().manual_seed(0)
    x = league.start(world, 4000, gen)
    kept = {}
    for below in (0.0, 0.5):
        ends, shares = league.particles(world, 0, 2.0, x, 100, gen, growth, share, redraw, below)
        kept[below] = league.coverage(world, 0, ends)
        assert len(shares) == 100
        assert all(0 < share <= 1 + 1e-9 for share in shares)
    assert kept[0.0] < 0.7 < kept[0.5]


# --- museum -----------------------------------------------------------------------------------------------------------


def shown(key: str):
    return EXHIBITS[key].function


def test_every_exhibit_shows_its_code_and_its_report():
    for exhibit in EXHIBITS.values():
        assert exhibit.code.startswith(f"def {exhibit.name}(")
        assert exhibit.report in str(exhibit)
    assert list(EXHIBITS) == [chr(ord("A") + i) for i in range(13)]
    assert "nothing" in MUSEUM_WORDS


def rules():
    """The guidance rules of the museum as functions of eps_c, eps_u, s, and what the answers say of each."""

    def twice(eps_c, eps_u, s):
        def net(x, t, y):
            return torch.where((y == 1).view(-1, 1, 1, 1), torch.cat([eps_c, eps_c]), torch.cat([eps_u, eps_u]))

        return shown("C")(net, eps_c, torch.zeros(len(eps_c)), torch.ones(len(eps_c)).long(), s)

    return {"A": shown("A"), "C": twice, "E": shown("E"), "H": shown("H"), "K": shown("K")}


def properties(rule) -> set[str]:
    """Which of the museum's properties of a guidance rule hold."""
    eps_c, eps_u = normal(0, 3, 5, 2, 2), normal(1, 3, 5, 2, 2)
    one, two = rule(eps_c, eps_u, 2.0), rule(eps_c, eps_u, 4.0)
    held = {"agreement"} if torch.allclose(rule(eps_u, eps_u, 3.0), eps_u) else set()
    held |= {"scale one"} if torch.allclose(rule(eps_c, eps_u, 1.0), eps_c) else set()
    held |= {"scale counts"} if not torch.allclose(one, two) else set()
    moved = (two - one).abs().amax((0, 2, 3)) > 1e-9
    held |= {"all channels"} if moved.all() or not moved.any() else set()
    alone = rule(eps_c[:1], eps_u[:1], 2.0)
    held |= {"examples apart"} if torch.allclose(alone, one[:1]) else set()
    held |= {"repeatable"} if torch.equal(rule(eps_c, eps_u, 2.0), one) else set()
    return held


@pytest.mark.parametrize(
    ("key", "broken"),
    [("A", "agreement"), ("C", "scale counts"), ("E", "scale one"), ("H", "all channels"), ("K", "scale one")],
)
def test_a_rule_of_the_museum_breaks_one_property_and_no_other(key, broken):
    every = {"agreement", "scale one", "scale counts", "all channels", "examples apart", "repeatable"}
    assert every - properties(rules()[key]) == {broken}
    assert properties(lambda eps_c, eps_u, s: eps_u + s * (eps_c - eps_u)) == every


def test_the_zero_layer_is_no_bug_and_two_of_them_are():
    torch.manual_seed(0)
    block, zero = nn.Linear(4, 4), nn.Linear(4, 4)
    for parameter in zero.parameters():
        nn.init.zeros_(parameter)
    pair = shown("M")(3)
    x, h = torch.randn(8, 4), torch.randn(8, 4)
    assert torch.equal(shown("B")(x, h, block, zero), h)

    def moved(parameters: list, run) -> list[bool]:
        before = [parameter.detach().clone() for parameter in parameters]
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            out = run()
            F.mse_loss(out, torch.ones_like(out) * torch.arange(out.shape[-1])).backward()
            optimizer.step()
        return [not torch.equal(a, b) for a, b in zip(before, parameters, strict=True)]

    assert all(moved([*block.parameters(), *zero.parameters()], lambda: shown("B")(x, h, block, zero)))
    picture = x.view(8, 1, 2, 2).expand(-1, 3, -1, -1)
    assert moved(list(pair.parameters()), lambda: pair(picture)) == [False] * 3 + [True]


def test_the_lost_root_shows_in_a_round_trip():
    abar, t, x0, eps = (
        torch.tensor([1.0, 0.8, 0.3]).double(),
        torch.tensor([1, 2]),
        normal(0, 2, 3, 2, 2),
        normal(1, 2, 3, 2, 2),
    )
    a = abar[t].view(-1, 1, 1, 1)
    xt = a.sqrt() * x0 + (1 - a).sqrt() * eps
    assert not torch.allclose(shown("D")(xt, eps, t, abar), x0)
    assert torch.allclose(shown("D")(xt, (1 - a).rsqrt() * eps, t, abar), x0)  # the root alone is missing


def test_the_sum_mixes_nothing_and_the_mean_depends_on_the_batch():
    def log_prob(x, t, y):
        return -(x**2).sum(1) * (1 + y)

    x, t, y = normal(0, 4, 2), torch.zeros(4), torch.arange(4)
    right = -2 * x * (1 + y)[:, None]
    assert torch.allclose(shown("F")(log_prob, x, t, y), right)
    assert torch.allclose(shown("J")(log_prob, x, t, y), right / 4)
    assert torch.allclose(shown("J")(log_prob, x[:1], t[:1], y[:1]), right[:1])  # alone it is the derivative


def test_the_loss_never_asks_about_the_null_label():
    asked = []

    def net(xt, t, y):
        asked.append(y)
        return 0 * xt

    y, gen = torch.arange(500) % 10, Generator().manual_seed(0)
    before = y.clone()
    shown("G")(net, torch.zeros(500, 1, 2, 2), y, 10, torch.linspace(1, 0.01, 20), gen)
    assert not (asked[0] == 10).any()
    assert torch.equal(y, before)


def test_the_sampler_ends_with_noise_in_it():
    x0, abar = normal(0, 5, 2), torch.linspace(0.98, 0.05, 12).double()
    eps = normal(1, 5, 2)

    def net(x, i):
        return (x - abar[i].sqrt() * x0) / (1 - abar[i]).sqrt()

    x = abar[11].sqrt() * x0 + (1 - abar[11]).sqrt() * eps
    end = shown("I")(net, x, [11, 7, 3, 0], abar)
    assert torch.allclose(end, abar[0].sqrt() * x0 + (1 - abar[0]).sqrt() * eps)


def test_the_measurement_gradient_is_by_the_wrong_variable():
    x, mix = normal(0, 1, 2), normal(1, 2, 2)
    got = shown("L")(lambda x: x @ mix, lambda x0: -(x0**2).sum(1) / 2, x)
    assert torch.allclose(got, -x @ mix)
    assert not torch.allclose(got, -x @ mix @ mix.T)  # the derivative that was promised
