"""Every lesson: notebooks in step with the source, solution and student's version run, nbgrader takes both."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbgrader.api import Gradebook
from nbgrader.nbgraderformat.v3 import MetadataValidatorV3

import build as build_tool

ROOT = Path(__file__).resolve().parents[1]
LESSONS = sorted(path.stem for path in (ROOT / "lessons").glob("*.py"))
every_lesson = pytest.mark.parametrize("lesson", LESSONS or ["no lessons found"])
SMALLEST = LESSONS[:1] or ["no lessons found"]  # one lesson goes all the way through nbgrader: it takes 20 s
SHORT = ("01_score_and_noise", "03_classifier_guidance")  # student notebooks that run in 20 s
every_student = pytest.mark.parametrize(
    "lesson", [each if each in SHORT else pytest.param(each, marks=pytest.mark.slow) for each in LESSONS]
)


def notebook(folder, lesson):
    return nbformat.read(ROOT / folder / f"{lesson}.ipynb", as_version=4)


def checks(cells):
    return [cell for cell in cells if cell.get("id", "").endswith("-check")]


def told(cell):
    """What a cell shows as text: printed, or beside its HTML."""
    shown = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs]
    return "".join(shown)


def tool(name, *words, timeout=290):
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / name, *words], capture_output=True, text=True, cwd=ROOT, timeout=timeout
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_notebooks_are_what_the_lessons_give_and_tell_no_answers():
    tool("build.py", "--check")


@every_lesson
def test_the_solution_runs_and_prints_what_it_printed(lesson):
    tool("run.py", f"solutions/{lesson}.ipynb", "--tier", "smoke")


@every_lesson
def test_every_answer_in_the_solution_is_right(lesson):
    said = {cell.id: told(cell).partition("\n")[0] for cell in checks(notebook("solutions", lesson).cells)}
    assert said
    assert {name: line for name, line in said.items() if not line.endswith(": right")} == {}


@every_student
def test_a_fresh_student_notebook_runs_to_its_end_and_every_check_says_not_done_yet(lesson, monkeypatch):
    monkeypatch.setenv("CONDIFF_BUDGET", "smoke")
    student = notebook("notebooks", lesson)
    build_tool.execute(student, ROOT / "notebooks")  # raises where a cell does
    assert checks(student.cells)
    said = {cell.id: told(cell).count("not done yet") for cell in student.cells if cell.cell_type == "code"}
    assert {name: n for name, n in said.items() if n} == {cell.id: 1 for cell in checks(student.cells)}


# --- nbgrader ---------------------------------------------------------------------------------------------------------


@every_lesson
@pytest.mark.parametrize("folder", ["notebooks", "solutions"])
def test_nbgrader_accepts_the_metadata(lesson, folder):
    found = notebook(folder, lesson)
    MetadataValidatorV3().validate_nb(found)
    answers = [cell for cell in found.cells if cell.metadata.get("nbgrader", {}).get("solution")]
    assert len(answers) == len(checks(found.cells)) > 0


class Course:
    """An nbgrader course whose source is a student notebook as it is."""

    def __init__(self, folder):
        self.folder = folder
        # our student notebooks are what students get; without this line nbgrader would empty the answer cells
        (folder / "nbgrader_config.py").write_text("c = get_config()\nc.ClearSolutions.enabled = False\n")
        # it starts `alembic` by name
        self.env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        self.env |= {"CONDIFF_BUDGET": "smoke", "JUPYTER_CONFIG_DIR": str(folder / "config")}
        self.env.pop("MPLBACKEND", None)

    def nbgrader(self, *words):
        command = [sys.executable, "-m", "nbgrader", *words]
        done = subprocess.run(command, cwd=self.folder, env=self.env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    def put(self, file, *folder):
        (self.folder.joinpath(*folder)).mkdir(parents=True)
        shutil.copy(file, self.folder.joinpath(*folder, "lesson.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("lesson", SMALLEST)
def test_nbgrader_releases_the_student_notebook_and_grades_nothing_and_everything(lesson, tmp_path):
    course = Course(tmp_path)
    course.put(ROOT / f"notebooks/{lesson}.ipynb", "source", "first")
    course.nbgrader("generate_assignment", "first", "--create")
    released = nbformat.read(tmp_path / "release/first/lesson.ipynb", as_version=4)
    ours = notebook("notebooks", lesson)
    assert [cell.source for cell in released.cells] == [cell.source for cell in ours.cells]

    course.put(tmp_path / "release/first/lesson.ipynb", "submitted", "nobody", "first")
    course.put(ROOT / f"solutions/{lesson}.ipynb", "submitted", "everybody", "first")
    course.nbgrader("autograde", "first")
    points = sum(cell.metadata.nbgrader.points for cell in checks(ours.cells))
    with Gradebook(f"sqlite:///{tmp_path / 'gradebook.db'}") as book:
        scores = {name: book.find_submission("first", name).score for name in ("nobody", "everybody")}
        assert book.find_assignment("first").max_score == points
    assert scores == {"nobody": 0, "everybody": points}


@pytest.mark.slow
@pytest.mark.parametrize("lesson", SMALLEST)
def test_nbgrader_validates_the_solution_and_nothing_less(lesson):
    for folder, verdict in (("solutions", "Success"), ("notebooks", "VALIDATION FAILED")):
        command = [sys.executable, "-m", "nbgrader", "validate", f"{folder}/{lesson}.ipynb"]
        env = os.environ | {"CONDIFF_BUDGET": "smoke"}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert re.search(verdict, done.stdout), done.stdout + done.stderr
