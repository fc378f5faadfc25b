"""What is right is graded right, however it is written and wherever it stands (part B of GRADING.md, and more)."""

from importlib.util import find_spec

import pytest
import variations_answers
import variations_notebooks
from variations_common import Variation

from conftest import Graders, with_limits

VARIATIONS = (*variations_answers.RECORDS, *variations_notebooks.RECORDS)
FEW = [each.id for each in VARIATIONS if each.fast][::2]
TRIED = [
    pytest.param(each, id=each.id, marks=() if each.id in FEW else pytest.mark.slow)
    for each in sorted(VARIATIONS, key=lambda each: each.lesson)
]


@pytest.mark.parametrize("variation", TRIED)
def test_a_right_answer_is_graded_right(variation: Variation, graders: Graders):
    if variation.needs and not find_spec(variation.needs):
        pytest.skip(f"{variation.needs} is not installed")
    grader = graders.at("auto")
    limits = with_limits(cell_seconds=3 if variation.entry == "10" else 10)
    verdicts, cells, _ = grader.grade(variation.content, variation.lesson, variation.ids, limits)
    for id in variation.ids:
        verdict = verdicts[id]
        facts = [f"{fact.name}: {fact.message}" for fact in verdict.facts if fact.state != "holds"]
        raised = [f"cell {cell.number} {cell.state}: {cell.note}" for cell in cells if cell.state != "ran"]
        assert verdict.outcome == "right", (verdict.reason, facts, raised)
        assert verdict.points == verdict.out_of > 0


def test_every_entry_of_the_page_has_its_notebooks():
    entries = {variation.entry for variation in VARIATIONS}
    assert {str(number) for number in range(1, 17)} <= entries
    assert sum(variation.entry != "+" for variation in VARIATIONS) >= 60
    assert sum(variation.entry == "+" for variation in VARIATIONS) >= 10
    ids = [variation.id for variation in VARIATIONS]
    assert len(ids) == len(set(ids))
