"""Wrong answers that are on nobody's list, as people in a hurry write them: refused, and told something useful."""

from importlib import import_module
from pathlib import Path

import pytest

from condiff_check.checking import examine
from condiff_check.registry import find, lessons
from condiff_check.report import WRONG

LESSONS = sorted(path.stem for path in (Path(__file__).parent / "sloppy").glob("lesson*.py"))
ANSWERS = [entry for lesson in LESSONS for entry in import_module(f"sloppy.{lesson}").SLOPPY]


@pytest.mark.slow
@pytest.mark.parametrize(("id", "what", "answers"), ANSWERS, ids=[f"{id}-{what}" for id, what, _ in ANSWERS])
def test_a_sloppy_answer_is_refused(id: str, what: str, answers: tuple):
    report = examine(find(id), answers, seed=5)
    assert report.status == WRONG, str(report)
    assert report.diagnosis or report.formulas or report.relation or report.first.message


@pytest.mark.parametrize("lesson", LESSONS)
def test_four_in_five_are_told_something_useful_as_a_person_judged(lesson: str):
    module = import_module(f"sloppy.{lesson}")
    names = {what for _, what, _ in module.SLOPPY}
    assert names >= module.WEAK and len(names) >= 10
    assert len(module.WEAK) <= len(names) / 5


def test_every_lesson_has_sloppy_answers():
    assert {f"lesson{number}" for number in lessons()} == {name.partition("_")[0] for name in LESSONS}
