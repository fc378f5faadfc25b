"""Wrong answers that are on nobody's list, written as people in a hurry write them: refused, and told something useful."""

from importlib import import_module
from pathlib import Path

import pytest

from condiff_check.checking import examine
from condiff_check.registry import find, lessons
from condiff_check.report import WRONG, Report

LESSONS = sorted(path.stem for path in (Path(__file__).parent / "sloppy").glob("lesson*.py"))
ANSWERS = [(lesson, *entry) for lesson in LESSONS for entry in import_module(f"sloppy.{lesson}").SLOPPY]


def told(report: Report) -> bool:
    """Whether the report says more than that something differs: the mistake, the formula, how the results relate, or
    the error with its line; or a fact of the exercise's own that fails alone, and so names what is wrong."""
    failing = [result for result in report.results if result.state in ("fails", "raises")]
    error = any(result.state == "raises" for result in failing)
    return bool(report.diagnosis or report.formulas or report.relation or error or len(failing) == 1)


@pytest.mark.parametrize(("lesson", "id", "what", "answers"), ANSWERS, ids=lambda value: str(value)[:40])
def test_a_sloppy_answer_is_refused(lesson: str, id: str, what: str, answers: tuple):
    report = examine(find(id), answers, seed=5)
    assert report.status == WRONG, str(report)


@pytest.mark.parametrize("lesson", LESSONS)
def test_four_in_five_sloppy_answers_are_told_what_is_wrong(lesson: str):
    own = [(id, what, answers) for name, id, what, answers in ANSWERS if name == lesson]
    silent = [f"{id} {what}" for id, what, answers in own if not told(examine(find(id), answers, seed=5))]
    assert len(own) >= 10 and len(silent) <= len(own) / 5, silent


def test_every_lesson_has_sloppy_answers():
    assert [f"lesson{number}" for number in lessons()] == LESSONS
