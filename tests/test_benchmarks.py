"""What the benchmarks share."""

import re
from dataclasses import replace
from pathlib import Path

import ablations
import pytest
import torch
from rows import Kept, over_seeds, step_times, table, untrained, write
from training import together

from condiff_ref import checkpoints, recipes
from condiff_ref.train import fit

FOLDER = Path(__file__).parents[1] / "benchmarks"
OTHERWISE = ("README.md", "kill_matrix.md", "guidance.md")  # written otherwise


def test_rows_are_kept_and_never_measured_twice(tmp_path):
    measured = []

    def measure() -> dict:
        measured.append(1)
        return {"a": len(measured)}

    path = tmp_path / "outputs" / "kept.json"
    assert Kept(path)("key", measure) == {"a": 1}
    assert Kept(path)("key", measure) == {"a": 1}  # a new process finds it
    assert Kept(path)("another key", measure) == {"a": 2}
    assert len(measured) == 2


def test_a_row_that_fails_leaves_the_others(tmp_path):
    kept = Kept(tmp_path / "kept.json")
    kept("one", lambda: {"a": 1})
    with pytest.raises(ZeroDivisionError):
        kept("two", lambda: {"a": 1 / 0})
    assert Kept(tmp_path / "kept.json").rows == {"one": {"a": 1}}


def test_intervals_over_seeds_are_students():
    """t = 4.303 for two degrees of freedom (any table), and the standard error of 1, 2, 3 is 1 / sqrt(3)."""
    found = over_seeds([1.0, 2.0, 3.0])
    assert found.value == 2
    assert found.high - 2 == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
    assert 2 - found.low == pytest.approx(found.high - 2)


def test_a_step_of_each_recipe_is_timed():
    found = step_times([untrained(recipes.DIGITS_DIT), untrained(recipes.MNIST_LATENT)], rounds=1, steps=2)
    assert len(found) == 2
    assert min(found) > 0


VARIANTS = {f"{group} {name}": variant for group, of in ablations.variants().items() for name, variant in of.items()}


def test_a_table_keeps_what_other_machines_measured_and_replaces_its_own(tmp_path, monkeypatch):
    for machine, found in (("one", "slow"), ("two (AMX)", "fast"), ("one", "less slow")):
        monkeypatch.setattr(checkpoints, "hardware", lambda name=machine: name)
        write(str(tmp_path / "steps.py"), "Steps", f"{found}.", "### Part\n", table(["a"], [[found]]))
    text = (tmp_path / "steps.md").read_text()
    assert re.findall("^#+ .*", text, re.MULTILINE) == ["# Steps", "## one", "### Part", "## two (AMX)", "### Part"]
    assert re.findall(r"^\| (.*) \|$", text, re.MULTILINE) == ["a", "---", "less slow", "a", "---", "fast"]
    assert "`python benchmarks/steps.py`" in text


@pytest.mark.parametrize(
    "file", sorted({*FOLDER.glob("*.md")} - {FOLDER / name for name in OTHERWISE}), ids=lambda f: f.stem
)
def test_every_section_of_a_table_is_of_a_machine(file):
    """Or another machine's run would keep pieces of this one."""
    sections = re.findall("^## (.*)", file.read_text(), re.MULTILINE)
    assert sections
    assert all(re.fullmatch(r".+ \(\d+ threads, .*\)", section) for section in sections), sections


def test_no_two_ablations_are_the_same():
    assert len({variant.key for variant in VARIANTS.values()}) == len(VARIANTS)


def test_what_stands_instead_is_what_the_loop_uses():
    """Each is called by one step of training, and by none after it."""
    used = []
    stand_ins = [variant for variant in VARIANTS.values() if variant.instead]
    assert len(stand_ins) > 1
    for variant in stand_ins:
        recipe, (name, function) = variant.recipe, variant.instead
        watched = replace(variant, instead=(name, lambda *a, f=function, **k: (used.append(f), f(*a, **k))[1]))
        x0, label = torch.zeros(2, 1, 28, 28), torch.zeros(2, dtype=torch.long)
        options = dict(steps=1, batch_size=2, lr=recipe.lr, progress=False)
        with watched.swapped():
            fit(recipe.build(), recipe.loss, x0, label, **options)
        fit(recipe.build(), recipe.loss, x0, label, **options)
    assert used == [variant.instead[1] for variant in stand_ins]


def test_steps_are_timed_once_on_each_machine(tmp_path, monkeypatch):
    """A file of rows that was made elsewhere, or with other threads, must not lend its seconds."""
    timed = []
    monkeypatch.setattr(ablations, "step_times", lambda models, *_: timed.append(len(models)) or [2.0] * len(models))
    kept, chosen = Kept(tmp_path / "kept.json"), list(VARIANTS.values())[:3]
    assert ablations.times(kept, chosen) == ablations.times(kept, chosen) == [2.0] * 3
    assert timed == [1, 4]  # the recipe alone, then all beside it
    monkeypatch.setattr(checkpoints, "machine", lambda: "another one")
    ablations.times(kept, chosen)
    assert timed == [1, 4, 1, 4]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([[0.5, 0.2, 0.9]], "0.500 [0.200, 0.900]"),
        ([[0.5, 0.2, 0.9], [0.5, 0.2, 0.9]], "0.500 [0.200, 0.900]"),  # no spread over seeds: of what never varies
        ([[1.0, 0, 9], [2.0, 0, 9], [3.0, 0, 9]], "2.000 [-0.484, 4.484]"),  # Student's, as above
    ],
)
def test_a_cell_has_the_interval_of_its_seeds_or_else_of_its_samples(values, told):
    assert together(values) == told


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.crop])
def test_samples_of_cropped_pictures_have_their_black_frame_again(name):
    model = VARIANTS[name].untrained()
    whole = model.decode(torch.zeros(1, *model.shape))
    assert whole.shape == (1, 1, 28, 28)
    frame = torch.ones(28, 28, dtype=torch.bool)
    frame[2:26, 2:26] = False
    assert (whole[0, 0][frame] == -1).all() and (whole[0, 0][~frame] == 0).all()


def test_tables_are_markdown():
    assert table(["a", "b"], [[1, "x"]]) == "| a | b |\n| --- | --- |\n| 1 | x |\n"


def test_every_table_is_listed():
    written = {path.name for path in FOLDER.glob("*.md")} - {"README.md"}
    linked = set(re.findall(r"\]\(([\w.]+)\)", (FOLDER / "README.md").read_text()))
    assert linked == written
    assert all((FOLDER / name).with_suffix(".py").exists() for name in written - {"kill_matrix.md"})
