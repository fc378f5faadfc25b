"""The command line as its users meet it: real runs, real files, and clear words for what goes wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from condiff_ref import checkpoints, cli, recipes
from condiff_ref.checkpoints import Checkpoint
from condiff_ref.data import Affine, digits
from condiff_ref.files import write_safetensors
from condiff_ref.generate import RULES, SAMPLERS, Guidance, generate


def run(monkeypatch, *arguments: object) -> int:
    """The exit code of `condiff ARGUMENTS`, in this process."""
    monkeypatch.setattr(sys, "argv", ["condiff", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code or 0


def trained(path: Path, recipe: str, **settings) -> Path:
    checkpoints.train_recipe(recipes.find(recipe), path, progress=False, **settings)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with checkpoints trained for some seconds: a U-Net, a worse one, and a noise-aware classifier."""
    folder = tmp_path_factory.mktemp("trained")
    trained(folder / "unet.safetensors", "digits-unet", steps=300)
    trained(folder / "worse.safetensors", "digits-unet", steps=50, seed=1)
    trained(folder / "classifier.safetensors", "digits-classifier", steps=100)
    return folder


def test_train_sample_evaluate_from_end_to_end(folder, tmp_path, monkeypatch, capsys):
    npz, figures = tmp_path / "samples.npz", tmp_path / "figures.json"
    assert run(monkeypatch, "sample", folder / "unet.safetensors", "--per-class", 20, "--scale", 2, "--out", npz) == 0
    assert run(monkeypatch, "evaluate", npz, "--data", "digits", "--json", figures) == 0
    measured = json.loads(figures.read_text())
    assert measured["n"] == 200
    assert measured["accuracy"]["low"] > 0.5  # chance is 0.1: the labels reach the samples
    assert "accuracy" in capsys.readouterr().out


def test_samples_have_the_documented_format(folder, tmp_path, monkeypatch):
    npz = tmp_path / "samples.npz"
    run(monkeypatch, "sample", folder / "unet.safetensors", "--per-class", 3, "--steps", 4, "--out", npz)
    with np.load(npz) as arrays:
        assert arrays["images"].shape == (30, 1, 8, 8)
        assert arrays["images"].dtype == np.float32
        assert arrays["labels"].dtype == np.int64
        assert np.bincount(arrays["labels"]).tolist() == [3] * 10
        assert -1 <= arrays["images"].min() < arrays["images"].max() <= 1


def test_a_picture_is_written_with_its_description(folder, tmp_path, monkeypatch):
    png = tmp_path / "samples.png"
    run(monkeypatch, "sample", folder / "unet.safetensors", "--per-class", 3, "--steps", 4, "--out", png)
    content = png.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert b"30 samples, a row for each of the classes" in content


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("rule", RULES)
def test_every_guidance_goes_with_every_sampler(folder, rule, sampler):
    model = checkpoints.load(folder / "unet.safetensors")
    others = dict(classifier=checkpoints.load(folder / "classifier.safetensors"), avoid=3)
    if rule == "autoguidance":
        others["uncond"] = checkpoints.load(folder / "worse.safetensors")
    label = torch.arange(10)
    images = generate(model, label, Guidance(rule, 2.0, **others), sampler=sampler, steps=4)
    assert images.shape == (10, 1, 8, 8)
    assert images.isfinite().all()


def test_same_seed_same_samples_and_another_seed_others(folder):
    model, label = checkpoints.load(folder / "unet.safetensors"), torch.arange(10)
    first, again, other = (generate(model, label, Guidance(scale=2.0), steps=3, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_samples_do_not_depend_on_how_they_are_cut_into_batches(folder):
    model, label = checkpoints.load(folder / "unet.safetensors"), torch.arange(10)
    whole = generate(model, label, Guidance(scale=2.0), steps=3, chunk=10)
    parts = generate(model, label, Guidance(scale=2.0), steps=3, chunk=4)
    torch.testing.assert_close(whole, parts, atol=1e-4, rtol=0)


def test_a_checkpoint_carries_recipe_scaling_and_card(folder):
    model = checkpoints.load(folder / "unet.safetensors")
    images, _ = digits("train")
    encoded = model.affine.encode(images)
    assert abs(encoded.mean()) < 1e-4
    assert abs(encoded.std(correction=0) - 1) < 1e-4
    assert (model.recipe.name, model.card["steps"], model.card["seed"]) == ("digits-unet", 300, 0)
    assert not model.network.training


def test_the_estimate_of_x0_is_clipped_to_black_and_white():
    recipe = recipes.find("digits-unet")
    model = Checkpoint(recipe.build(), recipe, Affine(center=-0.4, scale=1.5), {})
    extreme = model.clip(lambda xt, t: 100 * xt)
    pixels = model.affine.decode(extreme(torch.tensor([[-1.0, 1.0]]), torch.rand(1)))
    torch.testing.assert_close(pixels, torch.tensor([[-1.0, 1.0]]))


def broken_npz(folder: Path, **arrays) -> Path:
    path = folder / "broken.npz"
    np.savez(path, **arrays)
    return path


IMAGES, LABELS = np.zeros((4, 1, 8, 8), np.float32), np.arange(4)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (dict(images=IMAGES), "labels"),
        (dict(images=IMAGES[0], labels=LABELS), "images must be (n, 1, h, w)"),
        (dict(images=IMAGES, labels=LABELS[:3]), "images must be (n, 1, h, w) and labels (n,)"),
        (dict(images=IMAGES + 9, labels=LABELS), "pixels must lie in [-1, 1], these go from 9 to 9"),
        (dict(images=IMAGES * np.nan, labels=LABELS), "pixels must lie in [-1, 1]"),
        (dict(images=IMAGES, labels=LABELS / 2), "labels integers"),
        (dict(images=np.zeros((4, 1, 28, 28), np.float32), labels=LABELS), "reads images (n, 1, 8, 8)"),
        (dict(images=IMAGES, labels=LABELS + 8), "labels must be 0 to 9"),
    ],
)
def test_samples_that_cannot_be_judged_are_named(tmp_path, monkeypatch, capsys, arrays, message):
    assert run(monkeypatch, "evaluate", broken_npz(tmp_path, **arrays), "--data", "digits") == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_bad_input_gets_one_line_and_a_way_out(folder, tmp_path, monkeypatch, capsys):
    unet, out = folder / "unet.safetensors", tmp_path / "x.npz"
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(unet.read_bytes()[:-100])
    foreign = tmp_path / "foreign.safetensors"
    write_safetensors(foreign, {"x": torch.zeros(1)}, {"other": 1})
    for arguments, message in [
        (["sample", "nowhere.safetensors", "--out", out], "no checkpoint nowhere.safetensors: train one"),
        (["sample", damaged, "--out", out], "damaged.safetensors is damaged"),
        (["sample", foreign, "--out", out], "foreign.safetensors does not fit this version"),
        (["sample", folder / "classifier.safetensors", "--out", out], "it cannot draw samples"),
        (["sample", unet, "--out", tmp_path / "x.jpg"], "--out must end in .npz or .png"),
        (["sample", unet, "--guidance", "classifier", "--out", out], "needs --classifier CHECKPOINT"),
        (["sample", unet, "--guidance", "autoguidance", "--out", out], "needs --uncond CHECKPOINT"),
        (["sample", unet, "--guidance", "perp-neg", "--out", out], "needs --avoid CLASS"),
        (["sample", unet, "--guidance", "negative", "--avoid", 12, "--out", out], "labels are 0 to 9"),
        (["sample", unet, "--device", "warp", "--out", out], "device 'warp' cannot be used here"),
        (["train", "digits-resnet"], "there is no recipe 'digits-resnet': choose one of digits-unet"),
        (["train", "unet", "--out", unet, "--steps", 2], "exists: add --overwrite"),
        (["train", "unet", "--out", out.with_suffix(".st"), "--steps", 2, "--seconds", 3], "either steps or seconds"),
        (["evaluate", tmp_path / "none.npz", "--data", "digits"], "there is no file"),
        (["evaluate", unet, "--data", "digits"], "is not an npz with `images` and `labels`"),
    ]:
        assert run(monkeypatch, *arguments) == 1, arguments
        captured = capsys.readouterr()
        assert message in captured.err.replace("\n", " "), (arguments, captured.err)
        assert "Traceback" not in captured.err
        assert captured.out == ""
    assert not out.exists()


def test_training_says_what_it_did_and_writes_it_as_json(tmp_path, monkeypatch, capsys):
    out, card = tmp_path / "unet.safetensors", tmp_path / "card.json"
    assert run(monkeypatch, "train", "unet", "--steps", 5, "--out", out, "--json", card) == 0
    assert json.loads(card.read_text())["steps"] == 5
    assert "steps: 5" in capsys.readouterr().out
    assert run(monkeypatch, "train", "unet", "--steps", 5, "--out", out, "--overwrite") == 0


def test_the_demo_leaves_a_picture_a_table_and_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("condiff_ref.demo.PER_CLASS", 10)
    assert run(monkeypatch, "demo", "--seconds", 2, "--out", tmp_path) == 0
    figures = json.loads((tmp_path / "demo-digits.json").read_text())
    assert list(figures["scales"]) == ["0", "1", "2", "4"]
    assert figures["scales"]["0"]["accuracy"]["high"] < 0.2  # nobody asked the samples for a class
    assert (tmp_path / "demo-digits.png").read_bytes().startswith(b"\x89PNG")
    captured = capsys.readouterr()
    assert "Frechet" in captured.out
    assert "demo-digits.png" in captured.err


def test_training_on_a_busy_machine_says_so_before_it_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("os.getloadavg", lambda: (99.0, 99.0, 99.0))
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    assert run(monkeypatch, "train", "unet", "--steps", 2, "--out", tmp_path / "unet.safetensors") == 0
    assert "export OMP_NUM_THREADS=1" in capsys.readouterr().err.replace("\n", " ")
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    assert run(monkeypatch, "train", "unet", "--steps", 2, "--out", tmp_path / "other.safetensors") == 0
    assert "OMP_NUM_THREADS" not in capsys.readouterr().err


def test_doctor_finds_nothing_broken_here(monkeypatch, capsys):
    assert run(monkeypatch, "doctor") == 0
    screen = capsys.readouterr().out
    assert all(word in screen for word in ("python", "torch", "digits", "checkpoints", "disk"))


def test_doctor_says_what_is_broken_and_what_to_type(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("condiff_ref.doctor.SHIPPED", tmp_path)
    (tmp_path / "mnist-judge.safetensors").write_bytes(b"half a file")
    assert run(monkeypatch, "doctor") == 1
    screen = capsys.readouterr().out
    assert "broken" in screen
    assert "git checkout -- " in screen


def test_importing_the_package_is_light():
    # measured by `python -X importtime`; here only: nothing heavy comes along
    heavy = ["sklearn", "scipy", "torchvision", "matplotlib", "typer", "rich", "pandas"]
    code = f"import condiff_ref, sys; print([name for name in {heavy} if name in sys.modules])"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSTARTUP"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert result.stdout.strip() == "[]"
