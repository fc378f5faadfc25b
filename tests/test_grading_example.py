"""A small class, graded by the whole of condiff-grade: what is known of each submission is what it says."""

import csv
import json
import time
from pathlib import Path

import grading
import pytest
from rich.console import Console

import example_class
from condiff_check.grading import commands
from condiff_check.registry import lesson

LESSON, STUDENTS = "01", 5

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def graded(tmp_path_factory) -> Path:
    """The folder of the class, with results/ in it."""
    out = tmp_path_factory.mktemp("class")
    example_class.write(out, [LESSON], STUDENTS, brief=True)
    options = commands.Options(
        submissions=out / "submissions",
        out=out / "results",
        rubric=out / "rubric.yaml",
        trusted=True,  # where no sandbox works, the level is P0
        self_check=False,
        quiet=True,
    )
    assert commands.grade(options, Console(quiet=True), Console(quiet=True))  # the one that is no notebook needs a look
    return out


def truth(out: Path) -> list[dict[str, str]]:
    with (out / "truth.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_class_has_right_answers_mistakes_and_all_that_goes_wrong(graded):
    known = [row["truth"] for row in truth(graded)]
    assert len(known) == STUDENTS * len(lesson(LESSON))
    mistakes = {mistake.name for exercise in lesson(LESSON) for mistake in exercise.mistakes}
    assert {"right", "not done", "unreadable"} < set(known) <= {"right", "not done", "unreadable"} | mistakes


def test_every_verdict_on_the_class_is_the_one_that_is_known(graded):
    agree, lines = example_class.compare(graded, graded / "results")
    assert lines == []
    assert agree.total() == STUDENTS * len(lesson(LESSON))
    assert agree["mistakes, by name"] > 0


def test_the_cell_that_hangs_is_found_and_costs_no_point(graded):
    lines = map(json.loads, (graded / "results/results.jsonl").read_text().splitlines())
    hung = [one for one in lines if any(cell["state"] == "timeout" for cell in one["cells"])]
    assert [[cell["id"] for cell in one["cells"] if cell["state"] == "timeout"] for one in hung] == [["count-down"]]
    assert hung[0]["points"] == hung[0]["out_of"]


def test_comparing_tells_each_verdict_that_differs_is_lacking_or_is_too_much(graded, tmp_path):
    rows = truth(graded)
    (tmp_path / "truth.csv").write_text(
        "submission,exercise,truth\n"
        + f"{rows[0]['submission']},{rows[0]['exercise']},another mistake\n"
        + "student-99-01,01.1,right\n"
    )
    agree, lines = example_class.compare(tmp_path, graded / "results")
    assert agree.total() == 0
    assert len(lines) == 2 + len(rows) - 1
    assert "'another mistake' is graded as" in lines[0]
    assert lines[1] == "student-99-01 01.1: 'right' is graded as 'nothing'"


def test_the_same_seed_writes_the_same_class_in_place_of_the_one_before(tmp_path):
    example_class.write(tmp_path, [LESSON], 2, seed=3, brief=True)
    first = {file.relative_to(tmp_path): file.read_bytes() for file in tmp_path.rglob("*.*")}
    example_class.write(tmp_path, [LESSON], 2, seed=3, brief=True)
    assert {file.relative_to(tmp_path): file.read_bytes() for file in tmp_path.rglob("*.*")} == first


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("one of a kind")
    with pytest.raises(FileExistsError, match="something else"):
        example_class.write(tmp_path, [LESSON], 1)
    assert (tmp_path / "thesis.txt").exists()


def test_the_benchmark_of_grading_watches_what_there_is_and_counts_every_second_once():
    clock = grading.Clock()
    with clock.watching(), clock.part(grading.SPAWN), clock.part(grading.CODE):
        began = time.perf_counter()
        time.sleep(0.05)
        took = time.perf_counter() - began
    assert clock.parts[grading.CODE] == pytest.approx(took, abs=0.01)
    assert clock.parts[grading.SPAWN] < 0.01
    assert set(grading.PARTS) >= set(clock.parts)
