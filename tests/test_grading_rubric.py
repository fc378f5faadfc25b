"""From verdicts to points: rubric files, deadlines, overrides, and what is said of a rubric that is not right."""

import zipfile
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from condiff_check.grading.results import Graded, Verdict
from condiff_check.grading.rubric import Rubric, RubricError, metadata_times, read_rubric

KNOWN = {"04.1": 1.0, "04.2": 2.0, "04.10": 1.0, "05.1": 1.0}


def graded(**outcomes: str) -> Graded:
    """graded(e04_1="right", e04_2="wrong") with the points that the exercises have."""
    verdicts = []
    for name, outcome in outcomes.items():
        id = name[1:].replace("_", ".")
        verdicts.append(Verdict(id, ("f",), outcome, KNOWN[id] * (outcome == "right"), KNOWN[id]))
    return Graded("kim-04", "kim", "04", "kim.ipynb", "00", "graded", tuple(verdicts))


def rubric(tmp_path: Path, text: str) -> Rubric:
    (tmp_path / "rubric.yaml").write_text(text, encoding="utf-8")
    return read_rubric(tmp_path / "rubric.yaml", KNOWN)


def points(scored) -> tuple[float, float]:
    return scored.points, scored.out_of


def test_without_a_rubric_points_are_the_exercises():
    assert points(Rubric().score(graded(e04_1="right", e04_2="wrong"))) == (1.0, 3.0)


def test_a_rubric_changes_points_and_leaves_the_others(tmp_path):
    scored = rubric(tmp_path, "exercises: {04.1: 5}").score(graded(e04_1="right", e04_2="right"))
    assert points(scored) == (7.0, 7.0)
    assert [one.points for one in scored.verdicts] == [5.0, 2.0]


def test_an_exercise_number_is_no_decimal_number(tmp_path):
    scored = rubric(tmp_path, "exercises:\n  04.10: 7\n  04.1: 3\n").score(graded(e04_1="right", e04_10="right"))
    assert [one.points for one in scored.verdicts] == [3.0, 7.0]


def test_extra_points_are_on_top(tmp_path):
    mine = rubric(tmp_path, "exercises: {04.2: {points: 4, extra: true}}")
    assert points(mine.score(graded(e04_1="right", e04_2="right"))) == (5.0, 1.0)
    assert points(mine.score(graded(e04_1="right", e04_2="wrong"))) == (1.0, 1.0)


def test_an_override_counts_for_its_student_and_carries_the_comment(tmp_path):
    text = "overrides:\n- {student: kim, exercise: 04.2, points: 1.5, comment: at the blackboard}\n"
    mine = rubric(tmp_path, text)
    scored = mine.score(graded(e04_1="right", e04_2="wrong"))
    assert points(scored) == (2.5, 3.0)
    assert [one.override for one in scored.verdicts] == ["", "at the blackboard"]
    assert not mine.unused([graded(e04_2="wrong")])
    assert mine.unused([graded(e04_1="right")]) == ["kim, exercise 04.2"]


def test_our_own_error_counts_neither_way_until_an_override_settles_it(tmp_path):
    broken = graded(e04_1="right", e04_2="grader error")
    assert points(Rubric().score(broken)) == (1.0, 1.0)
    settled = rubric(tmp_path, "overrides: [{submission: kim-04, exercise: 04.2, points: 2, comment: ours}]")
    assert points(settled.score(broken)) == (3.0, 3.0)


LATE = """
deadline: 2031-05-02T23:59+02:00
late: {per_day: 10%, at_most: 25%, grace: 15 minutes}
"""


@pytest.mark.parametrize(
    ("time", "off"),
    [
        ("2031-05-02T21:58+00:00", 0.0),
        ("2031-05-02T22:14+00:00", 0.0),  # 15 minutes after
        ("2031-05-02T22:15+00:00", 0.3),
        ("2031-05-03T21:59+00:00", 0.3),  # a day after
        ("2031-05-03T22:00+00:00", 0.6),
        ("2031-05-20T00:00+00:00", 0.75),
    ],
)
def test_each_day_begun_takes_its_share_of_what_was_earned(tmp_path, time, off):
    scored = rubric(tmp_path, LATE).score(graded(e04_1="right", e04_2="right"), datetime.fromisoformat(time))
    assert scored.late == off
    assert points(scored) == (3.0 - off, 3.0)
    assert bool(scored.late_note) == bool(off)


def test_times_come_from_a_table_in_any_zone(tmp_path):
    table = "student,time\nkim,2031-05-03 00:30\nlee,2031-05-02T21:00:00Z\n"
    (tmp_path / "times.csv").write_text("\ufeff" + table, encoding="utf-8")
    mine = rubric(tmp_path, LATE + "submitted: times.csv")
    assert mine.score(graded(e04_1="right")).late == 0.1  # without a zone it is the deadline's
    assert mine.times["lee"] == datetime(2031, 5, 2, 21, tzinfo=UTC)


def test_an_unknown_time_is_said(tmp_path):
    scored = rubric(tmp_path, LATE).score(graded(e04_1="right"))
    assert scored.late == 0
    assert "unknown time" in scored.late_note


def test_times_of_a_gradescope_export(tmp_path):
    text = """
submission_1:
  :submitters:
  - :name: Kim
    :sid: "1"
  :created_at: 2031-05-02 21:37:06.394041000 Z
"""
    (tmp_path / "submission_metadata.yml").write_text(text)
    assert metadata_times(tmp_path) == {"submission_1": datetime(2031, 5, 2, 21, 37, 6, 394041, UTC)}
    with pytest.raises(RubricError, match="which is not there"):
        metadata_times(tmp_path / "elsewhere")


@pytest.mark.parametrize("kind", ["zip", "zip around", "around"])
def test_times_of_a_gradescope_export_in_a_zip_or_below(tmp_path, kind):
    text = "submission_1:\n  :created_at: 2031-05-02 21:37:06 Z\n"
    folder = tmp_path / "download" / "export"
    folder.mkdir(parents=True)
    (folder / "submission_metadata.yml").write_text(text)
    export = folder.parent
    if kind != "around":
        export = tmp_path / "export.zip"
        with zipfile.ZipFile(export, "w") as archive:
            archive.writestr(f"{'assignment/' if kind == 'zip around' else ''}submission_metadata.yml", text)
    assert metadata_times(export) == {"submission_1": datetime(2031, 5, 2, 21, 37, 6, tzinfo=UTC)}


def test_codes_take_the_place_of_names(tmp_path):
    text = LATE + "submitted: times.csv\noverrides: [{student: kim, exercise: 04.2, points: 2, comment: x}]\n"
    (tmp_path / "times.csv").write_text("submission,time\nkim-04,2031-05-03 00:30\n")
    mine = rubric(tmp_path, text).renamed({"kim": "s-1", "kim-04": "s-1-04"})
    coded = replace(graded(e04_1="right", e04_2="wrong"), student="s-1", submission="s-1-04")
    assert mine.score(coded).late == pytest.approx(0.3)
    assert not mine.unused([coded])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("exercises: [", "this is not YAML"),
        ("- a list", "the file: is a mapping; its keys are title"),
        (
            "exercises:\n  04.1: 1\n  04.3: 2\n",
            ":3: exercises.04.3: there is no exercise '04.3' in the course",
        ),
        ("lesson: 04\nexercises: {05.1: 1}", "no exercise '05.1' in lesson 04; did you mean 04.1"),
        ("exercises:\n  04.1: 1\n  04.1: 2\n", ":3: exercises.04.1: stands here twice"),
        ("exercises: {04.1: -1}", "exercises.04.1: is a number of points, 0 or more, not '-1'"),
        ("exercises: {04.1: nan}", "is a number of points"),
        ("exercises: {04.1: 1e9}", "is a number of points"),
        ("exercises: {04.1: [1]}", "is a number of points"),
        ("exercises: {04.1: {extra: true}}", "exercises.04.1: lacks points"),
        ("exercises: {04.1: {points: 1, extra: maybe}}", "exercises.04.1.extra: is true or false, not 'maybe'"),
        ("exercise: {04.1: 1}", "exercise: is not known here; did you mean exercises?"),
        ("lesson: 44", "lesson: there is no lesson '44': there are 04, 05"),
        ("lesson: 04\nlessons: [04]", "stands beside lessons"),
        ("deadline: 2031-05-02", "deadline: is a time with its zone"),
        ("deadline: 2031-05-02T12:00", "deadline: is a time with its zone"),
        ("late: {per_day: 10%}", "late: needs a deadline"),
        ("deadline: 2031-05-02T12:00Z\nlate: {at_most: 10%}", "late: lacks per_day"),
        ("deadline: 2031-05-02T12:00Z\nlate: {per_day: 10}", "late.per_day: is a share such as 10% or 0.1, not '10'"),
        ("deadline: 2031-05-02T12:00Z\nlate: {per_day: 1%, grace: soon}", "late.grace: is a time such as 15 minutes"),
        ("submitted: nowhere.csv", "submitted: is metadata, file times or a CSV file"),
        ("overrides: {kim: 1}", "overrides: is a list"),
        ("overrides: [{exercise: 04.1, points: 1, comment: x}]", "overrides.1: names either"),
        ("overrides: [{student: kim, exercise: 04.1, points: 1}]", "overrides.1: lacks comment"),
        ("overrides: [{student: kim, exercise: 04.9, points: 1, comment: x}]", "overrides.1.exercise: there is no"),
        (
            "overrides:\n" + "- {student: kim, exercise: 04.1, points: 1, comment: x}\n" * 2,
            "rubric.yaml:3: overrides.2: is the second one for kim, exercise 04.1",
        ),
    ],
)
def test_a_bad_rubric_is_told_by_line_and_key(tmp_path, text, words):
    with pytest.raises(RubricError) as told:
        rubric(tmp_path, text)
    assert words in str(told.value)
    assert str(told.value).startswith(str(tmp_path / "rubric.yaml"))


def test_a_rubric_that_cannot_be_read_is_told(tmp_path):
    with pytest.raises(RubricError, match="No such file"):
        read_rubric(tmp_path / "nowhere.yaml", KNOWN)
    (tmp_path / "rubric.yaml").write_bytes(b"title: \xff\xfe")
    with pytest.raises(RubricError, match="not YAML in UTF-8"):
        read_rubric(tmp_path / "rubric.yaml", KNOWN)
    (tmp_path / "times.csv").write_text("who,when\nkim,today\n")
    with pytest.raises(RubricError, match=r"times.csv:2: needs the columns"):
        rubric(tmp_path, "submitted: times.csv")


def test_yaml_makes_no_objects(tmp_path):
    with pytest.raises(RubricError):
        rubric(tmp_path, "title: !!python/object/apply:os.mkdir [made]\nexercises: 1")
    assert not (tmp_path / "made").exists()


def test_by_default_the_exercises_of_the_course_are_known(tmp_path):
    (tmp_path / "rubric.yaml").write_text("exercises: {04.1: 3}")
    assert read_rubric(tmp_path / "rubric.yaml").exercises["04.1"].points == 3
