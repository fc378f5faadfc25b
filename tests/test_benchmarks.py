"""What the benchmarks share."""

import re
from pathlib import Path

import pytest
from rows import Kept, over_seeds, step_times, table, untrained

from condiff_ref import recipes

FOLDER = Path(__file__).parents[1] / "benchmarks"


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


def test_tables_are_markdown():
    assert table(["a", "b"], [[1, "x"]]) == "| a | b |\n| --- | --- |\n| 1 | x |\n"


def test_every_table_is_listed():
    written = {path.name for path in FOLDER.glob("*.md")} - {"README.md"}
    linked = set(re.findall(r"\]\(([\w.]+)\)", (FOLDER / "README.md").read_text()))
    assert linked == written
    assert all((FOLDER / name).with_suffix(".py").exists() for name in written - {"kill_matrix.md"})
