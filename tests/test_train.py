"""The loss and its floor, label dropout, and a training loop that survives being killed."""

import itertools
import math
import os
import random
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch import Generator, nn

from condiff_ref.files import CheckpointError, read_safetensors, write_safetensors
from condiff_ref.mixture import archipelago
from condiff_ref.schedules import cosine, flow
from condiff_ref.train import TrainingDiverged, diffusion_loss, drop, fit, keep, logit_normal, uniform, uses_bf16

WORLD = archipelago()


class Line(nn.Module):
    """One weight per pixel, the simplest network that `fit` can train."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 1, 2, 2))


def data(n: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = Generator().manual_seed(0)
    return torch.randn(n, 1, 2, 2, generator=generator), torch.arange(n) % 10


# --- label dropout -------------------------------------------------------------------------------------------------


def test_labels_are_dropped_one_by_one_with_the_given_probability():
    n, prob = 40_000, 0.1
    dropped = drop(torch.arange(n) % 10, 10, prob, Generator().manual_seed(0)) == 10
    standard_error = math.sqrt(prob * (1 - prob) / n)
    assert abs(dropped.float().mean() - prob) < 5 * standard_error
    neighbours = (dropped[1:] & dropped[:-1]).float().mean()  # independent: both with probability prob^2
    assert abs(neighbours - prob**2) < 5 * math.sqrt(prob**2 / n)


def test_kept_labels_are_untouched_and_the_input_too():
    label = torch.arange(1000) % 10
    before = label.clone()
    dropped = drop(label, 10, 0.5, Generator().manual_seed(0))
    assert torch.equal(label, before)
    assert ((dropped == label) | (dropped == 10)).all()
    assert torch.equal(drop(label, 10, 0.0), label)
    assert (drop(label, 10, 1.0) == 10).all()


# --- the loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("t", "published"), [(0.1, 0.808), (0.5, 0.535), (0.9, 0.048)])
def test_a_perfect_network_still_has_the_loss_of_what_cannot_be_known(t, published):
    # E |eps - eps*|^2 / d = alpha^2 / sigma^2 tr Cov[x0 | xt] / d; the numbers come from a second program
    schedule, n = cosine(), 20_000
    x0, _ = WORLD.sample(n, Generator().manual_seed(0))

    def perfect(xt, t):
        return -schedule.sigma(t)[:, None] * WORLD.score(xt, t, schedule)

    loss = diffusion_loss(perfect, x0, "eps", schedule, Generator().manual_seed(1), draw_time=_always(t))
    assert abs(float(loss) - published) < 5 * published / math.sqrt(n)


@pytest.mark.parametrize("kind", ["eps", "x0", "v", "flow"])
def test_conditional_minus_unconditional_loss_is_their_squared_distance(kind):
    # the label explains E |out_c - out_u|^2 of the loss, because out_u is the mean of out_c (law of total variance)
    schedule, n = flow(), 40_000
    x0, label = WORLD.sample(n, Generator().manual_seed(0))
    gaps = []

    def network(conditional):
        def out(xt, t):
            x_u = WORLD.posterior_mean(xt, t, schedule)
            x_c = torch.stack([WORLD.posterior_mean(xt, t, schedule, k) for k in range(3)])[label, torch.arange(n)]
            raw = [_raw(kind, x, xt, t, schedule) for x in (x_u, x_c)]
            gaps.append((raw[1] - raw[0]).square().mean())
            return raw[conditional]

        return out

    losses = [
        diffusion_loss(network(c), x0, kind, schedule, Generator().manual_seed(1), draw_time=_always(0.5))
        for c in (0, 1)
    ]
    assert float(losses[0] - losses[1]) == pytest.approx(float(gaps[0]), rel=0.05)


def _always(t):
    return lambda n, generator: torch.full((n,), t, dtype=torch.float64)


def _raw(kind, x0, xt, t, schedule):
    alpha, sigma = schedule.at(t, xt)
    eps = (xt - alpha * x0) / sigma
    return {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0, "flow": eps - x0}[kind]


def test_the_label_reaches_the_network_only_when_there_is_one():
    seen = []

    def spy(xt, t, **condition):
        seen.append(condition)
        return xt

    label = torch.arange(4)
    diffusion_loss(spy, torch.zeros(4, 1, 2, 2), "eps", flow(), label=label)
    diffusion_loss(spy, torch.zeros(4, 1, 2, 2), "eps", flow())
    assert torch.equal(seen[0]["label"], label)
    assert seen[1] == {}


def test_logit_normal_times_have_a_standard_normal_logit():
    logit = torch.logit(logit_normal(20_000, Generator().manual_seed(0)).double())
    shifted = torch.logit(logit_normal(20_000, Generator().manual_seed(0), mean=0.8).double())
    assert abs(logit.mean()) < 5 / math.sqrt(20_000)
    assert abs(shifted.mean() - 0.8) < 5 / math.sqrt(20_000)
    assert abs(logit.std() - 1) < 5 / math.sqrt(40_000)


def test_uniform_times_are_uniform():
    t = uniform(20_000, Generator().manual_seed(0))
    assert abs(t.mean() - 0.5) < 5 / math.sqrt(12 * 20_000)
    assert abs(t.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / 20_000)


# --- the loop ------------------------------------------------------------------------------------------------------


def _downhill(network, images, labels, generator):
    return network.weight.sum()  # gradient 1 everywhere: each AdamW step is the learning rate itself


def test_the_learning_rate_warms_up_and_falls_to_zero():
    path = []

    def loss(network, images, labels, generator):
        path.append(network.weight[0, 0, 0, 0].item())
        return _downhill(network, images, labels, generator)

    fit(Line(), loss, *data(), steps=200, batch_size=8, lr=1e-2, weight_decay=0, progress=False)
    rates = [-(after - before) / 1e-2 for before, after in itertools.pairwise(path)]
    assert rates[0] < 0.03
    assert max(rates) == pytest.approx(1, abs=0.02)
    assert rates.index(max(rates)) == pytest.approx(200 * 0.05, abs=2)
    assert rates[105] == pytest.approx((1 - 105 / 200) / 0.95, abs=0.02)
    assert rates[-1] < 0.02


def test_the_average_is_the_exponential_moving_average_of_the_weights():
    path = []

    def loss(network, images, labels, generator):
        path.append(network.weight[0, 0, 0, 0].item())
        return _downhill(network, images, labels, generator)

    network = Line()
    result = fit(network, loss, *data(), steps=30, batch_size=8, lr=1e-2, ema=0.8, progress=False)
    path.append(network.weight[0, 0, 0, 0].item())
    mean = path[0]
    for k, weight in enumerate(path[1:], start=1):
        decay = min(0.8, (1 + k) / (10 + k))
        mean = decay * mean + (1 - decay) * weight
    assert result.network.weight[0, 0, 0, 0].item() == pytest.approx(mean, rel=1e-5)
    assert not result.network.training and not result.network.weight.requires_grad


def test_seconds_stop_the_run_and_steps_count_it():
    result = fit(Line(), _downhill, *data(), seconds=0.3, batch_size=8, progress=False)
    assert 0.3 <= result.seconds < 1.3
    assert result.steps == len(result.losses) > 0
    assert fit(Line(), _downhill, *data(), steps=7, batch_size=8, progress=False).steps == 7


@pytest.mark.parametrize("budget", [dict(), dict(steps=3, seconds=1.0), dict(steps=0), dict(seconds=-1.0)])
def test_a_run_needs_one_positive_budget(budget):
    with pytest.raises(ValueError, match="either steps or seconds"):
        fit(Line(), _downhill, *data(), batch_size=8, progress=False, **budget)


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where():
    calls = []

    def loss(network, images, labels, generator):
        calls.append(1)
        return network.weight.sum() * (math.nan if len(calls) == 3 else 1)

    with pytest.raises(TrainingDiverged, match=r"became nan at step 3 .*the gradient of weight"):
        fit(Line(), loss, *data(), steps=9, batch_size=8, progress=False)
    assert len(calls) == 3


def test_a_diverged_state_is_never_written(tmp_path):
    path = tmp_path / "run.resume"
    with pytest.raises(TrainingDiverged):
        fit(Line(), _diverges_at(5), *data(), steps=9, batch_size=8, checkpoint=path, every=0, progress=False)
    assert read_safetensors(path)[0]["network.weight"].isfinite().all()


def _diverges_at(step):
    calls = []

    def loss(network, images, labels, generator):
        calls.append(1)
        return network.weight.sum() * (math.inf if len(calls) == step else 1)

    return loss


def test_precision_is_one_of_three():
    assert uses_bf16("bf16", "cpu") and not uses_bf16("fp32", "cpu")
    with pytest.raises(ValueError, match="auto, bf16 or fp32, not 'half'"):
        uses_bf16("half", "cpu")


def test_a_t4_runs_in_fp32_and_an_l4_in_bf16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda _: True)  # by emulation, slowly
    for major, bf16 in ((7, False), (8, True)):
        card = SimpleNamespace(major=major)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_, card=card: card)
        assert uses_bf16("auto", "cuda") is bf16


# --- resuming ------------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def _noisy(network, images, labels, generator):
    noise = torch.randn(images.shape, generator=generator)
    return (network.weight * images + noise - labels[:, None, None, None]).square().mean()


def _stops_at(step):
    calls = []

    def loss(*arguments):
        calls.append(1)
        if len(calls) > step:
            raise Interrupted
        return _noisy(*arguments)

    return loss


@pytest.mark.parametrize("cut", [1, 2, 9, 17])
def test_a_run_cut_off_anywhere_ends_as_if_it_had_not_been(tmp_path, cut):
    settings = dict(steps=18, batch_size=8, seed=3, progress=False)
    straight = fit(Line(), _noisy, *data(), **settings)
    path = tmp_path / "run.resume"
    with pytest.raises(Interrupted):
        fit(Line(), _stops_at(cut), *data(), checkpoint=path, every=0, **settings)
    resumed = fit(Line(), _noisy, *data(), checkpoint=path, **settings)
    assert torch.equal(resumed.network.weight, straight.network.weight)
    assert resumed.losses == straight.losses


def test_a_resumed_run_goes_on_with_its_clock(tmp_path):
    path, settings = tmp_path / "run.resume", dict(seconds=1.0, batch_size=8, progress=False)
    with pytest.raises(Interrupted):
        fit(Line(), _stops_at(40), *data(), checkpoint=path, every=0, **settings)
    before = read_safetensors(path)[1]["elapsed"]
    result = fit(Line(), _noisy, *data(), checkpoint=path, **settings)
    assert 0 < before < 1 <= result.seconds
    assert result.steps > 40


def test_the_checkpoint_of_another_run_is_refused(tmp_path):
    path = tmp_path / "run.resume"
    with pytest.raises(Interrupted):
        fit(Line(), _stops_at(5), *data(), steps=9, batch_size=8, checkpoint=path, every=0, progress=False)
    with pytest.raises(ValueError, match=r"belongs to another run, with \{'seed': 0\}: delete it"):
        fit(Line(), _noisy, *data(), steps=9, batch_size=8, seed=1, checkpoint=path, progress=False)


def test_a_damaged_checkpoint_is_named(tmp_path):
    path = tmp_path / "run.resume"
    write_safetensors(path, {"x": torch.zeros(100)}, {})
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="run.resume is damaged .*delete it"):
        fit(Line(), _noisy, *data(), steps=9, batch_size=8, checkpoint=path, progress=False)


def test_a_kill_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.safetensors"
    write_safetensors(path, {"x": torch.zeros(3)}, {"age": "old"})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(Interrupted))
    with pytest.raises(Interrupted):
        write_safetensors(path, {"x": torch.ones(3)}, {"age": "new"})
    assert read_safetensors(path)[1] == {"age": "old"}


def test_a_run_is_kept_in_the_folder_that_is_named_and_nowhere_else(tmp_path, monkeypatch):
    monkeypatch.delenv("CONDIFF_CHECKPOINTS", raising=False)
    assert keep("05-points") is None
    monkeypatch.setenv("CONDIFF_CHECKPOINTS", str(tmp_path / "drive"))
    settings = dict(steps=18, batch_size=8, progress=False, checkpoint=keep("05-points"))
    first = fit(Line(), _noisy, *data(), **settings)
    again = fit(Line(), _stops_at(0), *data(), **settings)  # this loss would raise
    assert torch.equal(again.network.weight, first.network.weight) and again.losses == first.losses
    assert [file.parent.name for file in tmp_path.rglob("*") if file.is_file()] == ["drive"]


def test_a_network_that_starts_elsewhere_is_another_run(tmp_path):
    settings = dict(steps=9, batch_size=8, progress=False, checkpoint=tmp_path / "run.resume")
    fit(Line(), _noisy, *data(), **settings)
    other = Line()
    other.weight.data += 1
    with pytest.raises(ValueError, match="belongs to another run, with {'start': "):
        fit(other, _noisy, *data(), **settings)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_run_on_a_gpu_goes_on_there(tmp_path):
    def loss(network, images, labels, generator):
        return (network.weight * images - labels[:, None, None, None]).square().mean()

    settings = dict(batch_size=8, progress=False, device="cuda", checkpoint=tmp_path / "run.resume")
    done = fit(Line(), loss, *data(), seconds=0.2, **settings)
    state, about = read_safetensors(settings["checkpoint"])
    write_safetensors(settings["checkpoint"], state, about | {"elapsed": 0.1})  # as if cut off half-way
    assert fit(Line(), loss, *data(), seconds=0.2, **settings).steps > done.steps


CELL = """
from condiff_ref import data, recipes
from condiff_ref.train import fit, keep

recipe = recipes.find("digits-unet")
images, labels = data.digits("train")
done = fit(recipe.build(0), recipe.loss, images, labels, steps=30, checkpoint=keep("cell"), every=0, progress=False)
print(sum(float(value.double().sum()) for value in done.network.parameters()), done.losses)
"""


@pytest.mark.slow
def test_a_cell_goes_on_after_its_kernel_is_killed(tmp_path):
    def kernel(folder):
        environment = os.environ | {"CONDIFF_CHECKPOINTS": str(tmp_path / folder)}
        return subprocess.Popen([sys.executable, "-c", CELL], stdout=subprocess.PIPE, env=environment)

    straight = kernel("straight").communicate()[0]
    kept, step = tmp_path / "drive" / "cell.resume", 0
    lost = kernel("drive")
    while lost.poll() is None and step < 5:
        time.sleep(0.002)
        step = read_safetensors(kept)[1]["step"] if kept.exists() else 0
    lost.kill()
    lost.communicate()
    assert 5 <= read_safetensors(kept)[1]["step"] < 30, "no run was caught alive"
    resumed = kernel("drive")
    assert resumed.communicate()[0] == straight != b""
    assert resumed.returncode == 0


def _train(out, *more):
    arguments = ["train", "digits-unet", "--steps", "40", "--checkpoint-every", "0", "--out", str(out), *more]
    return [sys.executable, "-m", "condiff_ref.cli", *arguments]


@pytest.mark.slow
def test_kill_nine_at_any_moment_and_the_weights_are_bit_identical(tmp_path):
    straight, killed = tmp_path / "straight.safetensors", tmp_path / "killed.safetensors"
    subprocess.run(_train(straight), check=True, capture_output=True)
    chance, kills = random.Random(), 0  # any moment: a new one each time this test runs
    resume = killed.with_name(killed.name + ".resume")
    for _ in range(3):
        process = subprocess.Popen(_train(killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        age = resume.stat().st_mtime_ns if resume.exists() else 0
        while process.poll() is None and (not resume.exists() or resume.stat().st_mtime_ns == age):
            time.sleep(0.002)  # until this process, too, has written something
        time.sleep(chance.uniform(0, 0.4))
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert kills, "no run was caught alive"
    if not killed.exists():
        subprocess.run(_train(killed), check=True, capture_output=True)
    ours, theirs = (read_safetensors(path)[0] for path in (killed, straight))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not resume.exists()
