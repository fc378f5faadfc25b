"""The trained weights that come with the course."""

import hashlib
from pathlib import Path

import pytest

from condiff_ref import checkpoints
from condiff_ref.files import CheckpointError, read_safetensors, write_safetensors

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
