"""The trained weights that come with the course."""

import dataclasses
import hashlib
from pathlib import Path

import pytest
import torch
from torch import nn

from condiff_ref import checkpoints, recipes
from condiff_ref.checkpoints import Checkpoint, TableNetwork
from condiff_ref.data import Affine
from condiff_ref.files import CheckpointError, read_safetensors, write_safetensors
from condiff_ref.shapes import pad

PATHS = sorted(checkpoints.SHIPPED.glob("*.safetensors"))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_shipped_checkpoint_loads_and_its_card_is_of_it(path: Path):
    card = path.with_suffix(".md").read_text()
    assert hashlib.sha256(path.read_bytes()).hexdigest() in card
    model = checkpoints.load(path.stem)
    assert f"condiff train {model.recipe.name}" in card
    assert model.recipe.name == path.stem
    assert f"{model.card['steps']:,}" in card


def test_all_of_them_stay_under_twelve_megabytes():
    assert PATHS
    assert sum(path.stat().st_size for path in PATHS) < 12e6


def test_files_of_data_sets_and_pickles_are_not_among_the_checkpoints():
    assert {path.suffix for path in checkpoints.SHIPPED.iterdir()} == {".safetensors", ".md"}


def test_files_are_written_for_everyone_to_read(tmp_path):
    reference = tmp_path / "reference"
    reference.write_bytes(b"")
    write_safetensors(tmp_path / "file.safetensors", {}, {})
    assert (tmp_path / "file.safetensors").stat().st_mode == reference.stat().st_mode


def test_a_checkpoint_of_another_version_is_refused_with_a_way_out(tmp_path):
    tensors, about = read_safetensors(PATHS[0])
    about["recipe"]["a_setting_of_the_future"] = 1
    write_safetensors(tmp_path / "file.safetensors", tensors, about)
    with pytest.raises(CheckpointError, match="does not fit this version of the course .*train it again"):
        checkpoints.load(tmp_path / "file.safetensors")


class GaussianFlow(nn.Module):
    """The velocity of the straight path for data N(0, 1): E[eps - x0 | x] = (2 t - 1) x / ((1 - t)^2 + t^2)."""

    null = 10

    def forward(self, xt, t, *, label=None):
        self.label = label
        return pad((2 * t - 1) / ((1 - t) ** 2 + t**2), xt) * xt


class Spy(nn.Module):
    """A classifier that records what it is asked."""

    def forward(self, xt, t):
        self.asked = xt, t
        return xt.flatten(1)[:, :10]


def on_table(network: nn.Module, recipe: recipes.Recipe, abar: torch.Tensor) -> TableNetwork:
    return TableNetwork(Checkpoint(network, recipe, Affine(0.25, 2.0), {}), abar)


def test_on_a_variance_preserving_table_the_best_eps_for_standard_normal_data_is_sigma_x():
    abar = torch.linspace(1, 0.01, 21, dtype=torch.float64)
    net = on_table(GaussianFlow(), recipes.DIGITS_UNET, abar)
    t, xt = torch.tensor([1, 7, 20]), torch.randn(3, 1, 4, 4, dtype=torch.float64)
    label = torch.tensor([3, 1, 10])
    torch.testing.assert_close(net(xt, t, label), pad((1 - abar[t]).sqrt(), xt) * xt)
    assert net.network.label is label
    assert net.null == 10


def test_a_classifier_on_a_table_sees_its_own_path_at_the_same_signal_to_noise_ratio():
    abar = torch.linspace(1, 0.01, 21, dtype=torch.float64)
    spy = Spy()
    x0, eps = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    t = torch.tensor([1, 7, 20])
    alpha, sigma = abar[t].sqrt(), (1 - abar[t]).sqrt()
    on_table(spy, recipes.DIGITS_CLASSIFIER, abar)(pad(alpha, x0) * x0 + pad(sigma, x0) * eps, t)
    seen, time = spy.asked
    torch.testing.assert_close(time / (1 - time), sigma / alpha)
    torch.testing.assert_close(seen, (1 - pad(time, x0)) * x0 + pad(time, x0) * eps)


def test_pixels_are_encoded_and_decoded_as_the_checkpoint_does():
    net = on_table(GaussianFlow(), recipes.DIGITS_UNET, torch.ones(2))
    pixels = torch.rand(2, 1, 4, 4) * 2 - 1
    torch.testing.assert_close(net.encode(pixels), (pixels - 0.25) * 2)
    torch.testing.assert_close(net.decode(net.encode(pixels)), pixels)


def test_a_checkpoint_of_another_path_is_refused_on_a_table():
    recipe = dataclasses.replace(recipes.DIGITS_UNET, schedule="cosine")
    with pytest.raises(ValueError, match="path 'cosine'"):
        on_table(GaussianFlow(), recipe, torch.ones(2))


def test_stored_in_sixteen_bits_a_checkpoint_is_half_as_large_and_loads_to_full_precision(tmp_path):
    recipe = recipes.DIGITS_CLASSIFIER
    model = Checkpoint(recipe.build(), recipe, Affine(0, 1), {})
    for half in (False, True):
        checkpoints.save(tmp_path / f"{half}.safetensors", model, half=half)
    sizes = [(tmp_path / f"{half}.safetensors").stat().st_size for half in (False, True)]
    assert 0.5 < sizes[1] / sizes[0] < 0.55
    loaded = checkpoints.load(tmp_path / "True.safetensors").network.state_dict()
    for name, weight in model.network.state_dict().items():
        assert loaded[name].dtype == torch.float32
        torch.testing.assert_close(loaded[name], weight, rtol=1e-3, atol=1e-6)


def test_a_name_that_is_no_checkpoint_is_refused_with_those_there_are():
    shipped = "the course ships digits-always, .*mnist-unet, .*; of your own"
    with pytest.raises(CheckpointError, match=f"no checkpoint mnist-unett: {shipped}"):
        checkpoints.load("mnist-unett")
