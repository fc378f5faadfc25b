"""Scores for nbgrader: into its gradebook through its own API, or as the CSV file that its exporter writes.

nbgrader itself is needed for the gradebook alone. `nbgrader db` imports students and assignments but no scores; the
Gradebook is what its own autograder writes them with. Cells have the names that the course's notebooks give them in
their nbgrader metadata, so a gradebook made by `nbgrader generate_assignment` fits, and an empty one is filled.
"""

import contextlib
import os
import re
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .feedback import as_text, feedback, named, one_line, unsettled
from .rubric import Scored, ScoredVerdict
from .tables import exercises, sort, to_csv, write_atomically

if TYPE_CHECKING:
    from nbgrader.api import Comment, Grade, Gradebook, Notebook, SubmittedNotebook

COLUMNS = "assignment duedate timestamp student_id last_name first_name email raw_score late_submission_penalty score"


def assignment_of(lesson: str) -> str:
    """The name of a lesson's assignment, unless another one is given."""
    return f"lesson{lesson}"


def cell_of(exercise: str) -> str:
    """The id of the cell that an exercise's points belong to: 04-1-check."""
    return f"{exercise.replace('.', '-')}-check"


def student_of(scored: Scored) -> str:
    """The student's id. nbgrader's exporter does not quote: a comma in an id would move the scores of its line."""
    return re.sub(r'[,"]', "_", one_line(named(scored), 128))


def write_csv(scored: Sequence[Scored], path: Path, *, assignment: str | None = None) -> None:
    """The columns of `nbgrader export`; what is not known, as names and due dates, is empty."""
    rows: list[list[object]] = [[*COLUMNS.split(), "max_score"]]
    for one in sort(scored):
        name = assignment or assignment_of(one.graded.lesson)
        rows.append(
            [name, "", "", student_of(one), "", "", "", one.points + one.late, one.late, one.points, one.out_of]
        )
    write_atomically(Path(path), to_csv(rows))


def write_gradebook(
    scored: Sequence[Scored],
    db_url: str,
    *,
    assignment: str | None = None,
    course: str = "default_course",
    extra: Collection[str] = (),
) -> int:
    """Write all scores into the gradebook at db_url, such as "sqlite:///gradebook.db"; returns how many submissions.

    An override becomes a manual score with its comment; a grader error becomes a cell that needs manual grading. Manual
    scores that somebody has given in nbgrader stay. `extra` names exercises that do not count in the maximum. Raises
    ImportError where nbgrader is missing.
    """
    from nbgrader.api import Gradebook

    with _at_home(), Gradebook(db_url, course_id=course) as gradebook:
        for lesson in sorted({one.graded.lesson for one in scored}):
            group = [one for one in sort(scored) if one.graded.lesson == lesson]
            name = assignment or assignment_of(lesson)
            notebook = _notebook(gradebook, name, group, extra)
            cells = {cell.name: cell.id for cell in (*notebook.grade_cells, *notebook.solution_cells)}
            for one in group:
                _write(gradebook, one, name, notebook.name, cells)
    return len(scored)


@contextlib.contextmanager
def _at_home() -> Iterator[None]:
    """What nbgrader expects: `alembic`, which it calls to make a new gradebook and which is beside this Python, on the
    PATH. Its own code warns of its own use of SQLAlchemy, which says nothing to whoever grades.
    """
    from sqlalchemy.exc import SAWarning

    before = os.environ.get("PATH", os.defpath)
    os.environ["PATH"] = os.pathsep.join((before, str(Path(sys.executable).parent)))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SAWarning)
            yield
    finally:
        os.environ["PATH"] = before


def _notebook(gradebook: "Gradebook", assignment: str, group: Sequence[Scored], extra: Collection[str]) -> "Notebook":
    """The notebook of the assignment that holds our cells, made if there is none; all cells exist afterwards."""
    from nbgrader.api import MissingEntry

    worth = {item.verdict.exercise: item.out_of for one in group for item in one.verdicts}
    try:
        there: Sequence[Notebook] = gradebook.find_assignment(assignment).notebooks
    except MissingEntry:
        there = gradebook.add_assignment(assignment).notebooks
    ours = {cell_of(id) for id in exercises(group)}
    name = next((one.name for one in there if ours & {cell.name for cell in one.grade_cells}), None)
    name = name or next((one.name for one in there), assignment)
    gradebook.update_or_create_notebook(name, assignment)
    for id, points in worth.items():
        most = 0.0 if id in extra else points
        gradebook.update_or_create_grade_cell(cell_of(id), name, assignment, max_score=most, cell_type="code")
        gradebook.update_or_create_solution_cell(cell_of(id).replace("-check", "-answer"), name, assignment)
    return gradebook.find_notebook(name, assignment)


def _write(gradebook: "Gradebook", one: Scored, assignment: str, notebook: str, cells: Mapping[str, str]) -> None:
    student = student_of(one)
    gradebook.update_or_create_student(student)
    gradebook.update_or_create_submission(assignment, student)
    handed_in = gradebook.find_submission_notebook(notebook, assignment, student)
    handed_in.late_submission_penalty = one.late
    there = {each.cell_id: each for each in (*handed_in.grades, *handed_in.comments)}
    for item in one.verdicts:
        cell = cell_of(item.verdict.exercise)
        _write_cell(gradebook, item, handed_in, there, cells[cell], cells[cell.replace("-check", "-answer")])
    gradebook.db.commit()


def _write_cell(
    gradebook: "Gradebook",
    item: ScoredVerdict,
    handed_in: "SubmittedNotebook",
    there: "Mapping[str, Grade | Comment]",
    check: str,
    answer: str,
) -> None:
    from nbgrader.api import Comment, Grade

    # a cell that is newer than the submission has neither yet
    grade = there.get(check) or Grade(cell_id=check, notebook=handed_in)
    comment = there.get(answer) or Comment(cell_id=answer, notebook=handed_in)
    gradebook.db.add_all([grade, comment])
    grade.auto_score = None if item.verdict.outcome == "grader error" else item.verdict.points
    grade.needs_manual_grade = unsettled(item) and grade.manual_score is None
    comment.auto_comment = as_text(feedback(item))
    if item.override:
        grade.manual_score, comment.manual_comment = item.points, item.override
    elif grade.auto_score is not None:
        grade.auto_score = item.points
