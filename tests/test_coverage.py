"""Every row of the lecture sources and every erratum has a place in a lesson and a test, or is known to be open."""

from copy import deepcopy
from pathlib import Path

import pytest

import sources

ROOT = Path(__file__).resolve().parents[1]
ROWS = {"S0": 74, "S1": 69, "S2": 25, "S3": 31, "S4": 53}  # counted in the sources
ERRATA = 41
QUESTIONS = {f"S0.{n}" for n in range(63, 68)} | {f"S3.{n}" for n in range(23, 31)}
# delete here what docs/coverage.yaml does not call open any more; nothing is ever added
OPEN: set[str] = set()


@pytest.fixture(scope="module")
def lessons() -> sources.Lessons:
    return sources.Lessons(ROOT)


@pytest.fixture(scope="module")
def data() -> dict:
    return sources.load(ROOT)


def test_every_row_and_every_erratum_is_there_in_order(data):
    assert list(data["rows"]) == [f"{source}.{n}" for source, last in ROWS.items() for n in range(1, last + 1)]
    assert list(data["errata"]) == [f"E{n}" for n in range(1, ERRATA + 1)]
    assert list(data["sources"]) == list(ROWS)


def test_every_pointer_leads_somewhere_and_every_number_is_shown_there(data, lessons):
    assert sources.problems(data, lessons) == []


def test_nothing_else_is_open(data):
    assert {name for name, entry in sources.entries(data) if "open" in entry} == OPEN


def test_every_question_of_the_sources_is_an_item_that_is_checked(data):
    assert {name for name, row in data["rows"].items() if row["verdict"] == "question"} == QUESTIONS
    assert not [name for name in QUESTIONS - OPEN if not data["rows"][name].get("items")]


def test_every_wrong_row_has_an_erratum_and_every_erratum_a_row(data):
    wrong = {name for name, row in data["rows"].items() if row["verdict"] == "wrong"}
    assert not [name for name in wrong if not data["rows"][name].get("errata")]
    named = {erratum for row in data["rows"].values() for erratum in row.get("errata", [])}
    assert set(data["errata"]) - named == {"E39"}  # what no source says


def test_the_pages_are_what_the_file_and_the_lessons_give(data, lessons):
    for name, text in sources.pages(data, lessons).items():
        assert (ROOT / "docs" / name).read_text("utf-8") == text, f"docs/{name}: run python tools/sources.py"


# --- a file with one thing wrong --------------------------------------------------------------------------------------


def spoil(name, **changes):
    """The entry with these values; None takes a key away."""

    def change(data):
        entry = data["errata" if name in data["errata"] else "rows"][name]
        entry.update(changes)
        for key in [key for key, value in entry.items() if value is None]:
            del entry[key]

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (spoil("S0.3", at=["03: words that no lesson has"]), "stands in 0 cells of lesson 03"),
        (spoil("S0.3", at=["03: classifier"]), "cells of lesson 03 (03-text-1, "),
        (spoil("S0.3", at=["03: sigma"]), "too short to point to anything"),
        (spoil("S0.3", at=["77: Bayes' rule for the *noisy* picture"]), "there is no lesson 77"),
        (spoil("S0.3", at=["03.99"]), "stands in 0 cells of lesson 03"),
        (spoil("S0.3", at=["section 1"]), "neither an exercise like 04.5 nor words"),
        (spoil("S0.3", at=None), "it points to no lesson"),
        (spoil("S0.3", topic=""), "it has no topic"),
        (spoil("S0.3", verdict="fine"), "its verdict is 'fine'"),
        (spoil("S0.3", errata=["E77"]), "there is no erratum E77"),
        (spoil("S0.3", remark="x"), "'remark' means nothing here"),
        (spoil("S0.3", test=None), "it names no test"),
        (spoil("S0.3", test=["03.99"]), "stands in 0 cells of lesson 03"),
        (spoil("S0.3", test=["test_mixture.py::test_nothing"]), "there is no test tests/test_mixture.py::test_nothing"),
        (spoil("S0.3", test=["test_nowhere.py::test_x"]), "there is no test tests/test_nowhere.py::test_x"),
        (spoil("S0.3", test=["surely"]), "'surely' is no kind of test"),
        (spoil("S0.2", test=["printed"]), "compare the output of none of its cells"),
        (spoil("S4.30", test=["cited: Nobody 1999"]), "names 'Nobody 1999' among its sources"),
        (spoil("E14", shows=["-2.671796771"]), "none of its cells shows '-2.671796771'"),
        (spoil("E14", title=None), "it has no title"),
        (spoil("S0.65", items=None), "'nothing' is no item that is checked"),
        (spoil("S0.65", items=["07: Derive the gradient of a zero convolution"]), "is no item that is checked"),
        (spoil("S0.57", open="it"), "what is open says what is missing, and the lesson it is for"),
        (spoil("S0.73", at=["09: words that no lesson has"]), "stands in 0 cells of lesson 09"),
    ],
)
def test_what_is_wrong_is_named(data, lessons, change, told):
    spoiled = deepcopy(data)
    change(spoiled)
    found = sources.problems(spoiled, lessons)
    assert len(found) == 1
    assert told in found[0]


def test_a_pointer_knows_its_section(lessons):
    cell, words = lessons.find("04: And $s\\to\\infty$?")
    assert cell.section(words) == "5. What does CFG sample?"
    cell, words = lessons.find("03: Why not any classifier?")
    assert cell.section(words) == "6. Why not any classifier?"


def test_the_check_refuses_pages_out_of_step(data, lessons, monkeypatch, capsys):
    monkeypatch.setattr(sources, "pages", lambda *_: {"coverage.md": "something else"})
    with pytest.raises(sources.typer.Exit) as end:
        sources.main(check=True, root=ROOT)
    assert end.value.exit_code == 1
    assert "docs/coverage.md is not what" in capsys.readouterr().err
