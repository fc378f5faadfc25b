"""No hole in the checks: every mistake on file is refused and named, every right answer accepted.

Once each; `make kill-matrix` does it 20 times, with fresh inputs.
"""

from dataclasses import replace

import pytest

from condiff_check import kill_matrix
from condiff_check.exercise import Exercise
from condiff_check.kill_matrix import rows, table
from condiff_check.registry import exercises, find

LONG = ("02.6", "03.6", "03.7", "05.6", "07.5", "09.5")  # samplers and training steps


@pytest.mark.parametrize(
    "exercise",
    [pytest.param(each, marks=pytest.mark.slow if each.id in LONG else ()) for each in exercises()],
    ids=lambda exercise: exercise.id,
)
def test_every_mistake_is_refused_and_named_and_every_right_answer_accepted(exercise: Exercise):
    found = rows(exercise, seeds=[0])
    assert len(found) == 1 + len(exercise.alternatives) + len(exercise.mistakes)
    assert not [row for row in found if row.hole]


def test_a_mistake_that_no_fact_refuses_is_a_hole():
    exercise = find("01.2")
    blind = replace(exercise, facts=exercise.facts[:1], formulas=())
    assert [row.name for row in rows(blind, seeds=[2]) if row.hole]


def test_two_mistakes_that_behave_alike_are_a_hole():
    exercise = find("01.2")
    twin = replace(exercise.mistakes[0], name="twin", diagnosis="another name for it")
    found = rows(replace(exercise, mistakes=(*exercise.mistakes, twin)), seeds=[2])
    assert [row.name for row in found if row.hole] == [exercise.mistakes[0].name, "twin"]


def test_a_right_answer_that_is_refused_is_a_hole():
    exercise = find("01.2")
    odd = (exercise.mistakes[0].answers,)
    assert [row.name for row in rows(replace(exercise, alternatives=odd), seeds=[2]) if row.hole] == [""]


def test_the_table_counts():
    found = rows(find("01.9"), seeds=[1, 2])
    lines = table(found, 2).splitlines()
    assert "| 01.9 | 4 | 4 | 4 | 3 | 3 |" in "\n".join(lines)
    assert "| 01.9 | shape only | 2 of 2 | 2 of 2 |" in lines


def test_rows_are_kept_and_measured_again_only_after_a_change(tmp_path, monkeypatch):
    monkeypatch.setattr(kill_matrix, "exercises", lambda: [find("01.9")])
    kept, out = tmp_path / "kept.json", tmp_path / "table.md"
    call = [str(out), "--repeats", "1", "--kept", str(kept)]
    assert kill_matrix.main(call) == 0
    kept.write_text(kept.read_text().replace("shape only", "from the file"))
    assert kill_matrix.main(call) == 0
    assert "| 01.9 | from the file | 1 of 1 | 1 of 1 |" in out.read_text()
    kept.write_text(kept.read_text().replace("01.9|1|", "01.9|1|of other code"))
    assert kill_matrix.main(call) == 0
    assert "| 01.9 | shape only | 1 of 1 | 1 of 1 |" in out.read_text()
