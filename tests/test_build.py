"""From the source of a lesson to its two notebooks: who sees what, and what is refused."""

import base64
import importlib.metadata
import io
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy
import pytest
import typer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from packaging.requirements import Requirement
from PIL import Image
from typer.testing import CliRunner

import build as build_tool
import setup_cell
import stubs
from answers_to_show import Scale, blend, halve, registered
from condiff_check.grading import intake
from lesson import LessonError, build

ROOT = Path(__file__).resolve().parents[1]
PATH = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
EXERCISES = {
    "07.1": SimpleNamespace(names=("blend", "halve"), references=(blend, halve), points=3),
    "07.2": SimpleNamespace(names=("Scale",), references=(Scale,), points=2),
    "07.8": SimpleNamespace(names=("registered",), references=(registered,), points=1),
    "07.9": SimpleNamespace(names=("renamed",), references=(halve,), points=1),
}


def find(name):
    if name not in EXERCISES:
        raise KeyError(f"there is no exercise {name!r}")
    return EXERCISES[name]


HEAD = """\
# %% [markdown]
# # Mixing
#
# What remains of a picture?

# %% tags=["setup"]
"""
SOURCE = f"""\
{HEAD}
# %% exercise="07.1"
# Write both.

# %% [markdown]
# Why the root?
#
# ### BEGIN SOLUTION
# Because variances add.
# ### END SOLUTION

# %% tags=["nbval-ignore-output"]
prices = [1, 2]
### BEGIN SOLUTION
### STUDENT: guess = ...
guess = sum(prices)
### END SOLUTION
print(guess)

# %% [markdown] tags=["solution-only"]
# Notes for those who teach.

# %% exercise="07.2"

# %%
print("the end")
"""


def made(text=SOURCE, **options):
    return build(text, "07_mixing", find, **options)


def by_id(notebook):
    return {cell.id: cell for cell in notebook.cells}


# --- the two faces of an answer ---------------------------------------------------------------------------------------


def test_the_solution_shows_the_reference_as_it_is_written_decorators_included():
    text = Path(sys.modules["answers_to_show"].__file__).read_text()
    shown = stubs.answer([blend, halve])
    assert shown in text.replace("\n\n\ndef halve", "\n\n\ndef halve")
    assert shown.startswith("@torch.no_grad()\ndef blend(")
    assert "# the square root keeps the variance" in shown
    assert shown.endswith("# powers of two are exact")


def test_the_student_sees_signature_and_docstring_only():
    assert (
        stubs.stub([blend, halve])
        == '''\
def blend(x0: Tensor, eps: Tensor, *, weights: dict[str, float] | None = None, pick=lambda x: x) -> Tensor:
    """Mix data and noise.

    weights: of both, `{"x0": 1.0}`.
    """
    raise NotImplementedError


def halve(
    x: Tensor,  # (b, *d)
    times: int = 1,
) -> Tensor:
    raise NotImplementedError'''
    )


def test_the_student_sees_every_method_of_a_class_and_no_attribute():
    assert (
        stubs.stub([Scale])
        == '''\
class Scale(nn.Module):
    """Multiply by a learned number."""

    def __init__(self, start: float = 1.0):
        raise NotImplementedError

    @property
    def size(self) -> float:
        """Its absolute value."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError'''
    )


@pytest.mark.parametrize("reference", [lambda x: x, len, 3])
def test_what_has_no_definition_in_a_file_is_no_reference(reference):
    with pytest.raises(TypeError, match="no source of its own|neither a function nor a class"):
        stubs.answer([reference])


# --- cells ------------------------------------------------------------------------------------------------------------


def test_both_notebooks_have_the_same_cells_but_for_answers():
    lesson = made()
    ours, theirs = by_id(lesson.solution), by_id(lesson.student)
    assert (list(ours.keys() - theirs.keys()), list(theirs.keys() - ours.keys())) == (["07-text-3"], ["07-submit"])
    both = {name: cell for name, cell in theirs.items() if name in ours}
    differ = {name for name, cell in both.items() if cell.source != ours[name].source}
    assert differ == {"07-1-answer", "07-2-answer", "07-text-2", "07-code-1"}
    assert all(ours[name].metadata == cell.metadata for name, cell in both.items())
    assert all(cell.get("outputs", []) == [] and cell.get("execution_count") is None for cell in theirs.values())


def test_an_exercise_is_an_answer_cell_and_a_check_cell():
    lesson = made()
    ours, theirs = by_id(lesson.solution), by_id(lesson.student)
    assert ours["07-1-answer"].source == "# Write both.\n" + stubs.answer([blend, halve])
    assert theirs["07-1-answer"].source == "# Write both.\n" + stubs.stub([blend, halve])
    assert theirs["07-1-check"].source == 'blend, halve = check("07.1", blend, halve)'
    assert theirs["07-2-check"].source == 'Scale = check("07.2", Scale)'
    assert "nbval-check-output" in theirs["07-2-check"].metadata.tags
    order = [cell.id for cell in lesson.student.cells]
    assert order.index("07-1-check") == order.index("07-1-answer") + 1


def test_answers_between_markers_are_replaced_and_markers_vanish():
    ours, theirs = by_id(made().solution), by_id(made().student)
    assert theirs["07-text-2"].source == "Why the root?\n\n*Your answer here.*"
    assert ours["07-text-2"].source == "Why the root?\n\nBecause variances add."
    assert theirs["07-code-1"].source == "prices = [1, 2]\nguess = ...\nprint(guess)"
    assert ours["07-code-1"].source == "prices = [1, 2]\nguess = sum(prices)\nprint(guess)"


def test_a_placeholder_keeps_its_place_in_a_block():
    block = (
        "# %%\nfor n in range(3):\n    ### BEGIN SOLUTION\n    ### STUDENT: pass\n    print(n)\n    ### END SOLUTION\n"
    )
    assert by_id(made(SOURCE + "\n" + block).student)["07-code-3"].source == "for n in range(3):\n    pass"


def test_ids_of_exercises_and_code_do_not_change_when_text_is_added():
    more = SOURCE.replace('# %% exercise="07.1"', '# %% [markdown]\n# New.\n\n# %% exercise="07.1"')
    names = [[cell.id for cell in made(text).solution.cells if "text" not in cell.id] for text in (SOURCE, more)]
    assert names[0] == names[1]
    assert len(made(more).solution.cells) == len(made().solution.cells) + 1


def test_building_twice_gives_the_same_bytes():
    first, second = made(), made()
    assert build_tool.text_of(first.student) == build_tool.text_of(second.student)
    assert build_tool.text_of(first.solution) == build_tool.text_of(second.solution)


def test_magics_are_no_python_and_are_let_through():
    assert (
        "%matplotlib inline"
        in by_id(made(SOURCE + "\n# %%\n# %matplotlib inline\nx = 1\n").student)["07-code-3"].source
    )


# --- set-up and title -------------------------------------------------------------------------------------------------


def test_the_setup_cell_is_the_same_everywhere_and_runs_outside_colab():
    assert by_id(made().student)["07-setup"].source == by_id(made().solution)["07-setup"].source == setup_cell.SETUP
    done = subprocess.run(
        [sys.executable, "-c", setup_cell.SETUP + "\nprint(SMOKE, device)"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"(True|False) (cpu|cuda)\n", done.stdout)


PRETEND = """
import importlib.util, os, subprocess, sys, types
google, colab, drive = (types.ModuleType(name) for name in ("google", "google.colab", "google.colab.drive"))
google.colab, colab.drive, drive.mount = colab, drive, lambda where: print("mount", where)
sys.modules |= {"google": google, "google.colab": colab, "google.colab.drive": drive}
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "condiff_ref" else real(name, *rest)
subprocess.run = lambda words, check: print(*words[1:], check)
"""


def on_colab(folder, source):
    """What the set-up cell, and then the source, prints on something like Colab."""
    words = [sys.executable, "-c", PRETEND + source]
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder, env=os.environ | {"PYTHONPATH": PATH})
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_on_colab_the_setup_cell_fetches_condiff_once_and_leaves_dependencies_alone(tmp_path):
    repository = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    source = tmp_path / "condiff"
    install = f"-m pip install -q --no-deps -e {source} jaxtyping wadler-lindig True"
    look = "\nprint(sys.path[-1], 'CONDIFF_CHECKPOINTS' in os.environ)"
    clone = f"clone -q --depth=1 {repository} {source} True"
    assert on_colab(tmp_path, setup_cell.SETUP + look) == [clone, install, f"{source} False"]
    source.mkdir()  # pip was cut off: the second time it is all that runs
    assert on_colab(tmp_path, setup_cell.SETUP) == [install]


def test_the_setup_cell_names_the_folder_for_unfinished_training_and_mounts_the_drive_it_is_on(tmp_path):
    (tmp_path / "condiff").mkdir()
    ask = "\nprint(os.environ.get('CONDIFF_CHECKPOINTS'))"
    for folder, mounted in (("/content/drive/MyDrive/condiff", ["mount /content/drive"]), ("kept", [])):
        named = setup_cell.SETUP.replace("KEEP = None", f"KEEP = {folder!r}")
        assert named != setup_cell.SETUP
        assert on_colab(tmp_path, named + ask)[1:] == [*mounted, folder]


def test_the_setup_cell_installs_what_colab_lacks_and_nothing_else():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    colab = {line.partition("==")[0] for line in (ROOT / "tests/colab-pins.txt").read_text().splitlines()}
    missing = {Requirement(line).name for line in project["dependencies"]} - colab
    for name in sorted(missing):
        needs = [Requirement(line) for line in importlib.metadata.requires(name) or []]
        missing |= {need.name for need in needs if not (need.marker and "extra" in str(need.marker))} - colab
    assert set(setup_cell.NOT_ON_COLAB) == missing


def test_the_badge_opens_the_student_notebook_and_stands_under_the_title():
    for notebook in (made().student, made().solution):
        title, badge, text = notebook.cells[0].source.split("\n\n")
        assert title == "# Mixing"
        assert badge.endswith(
            "(https://colab.research.google.com/github/condiff/condiff/blob/main/notebooks/07_mixing.ipynb)"
        )
        assert text == "What remains of a picture?"


def test_measured_times_stand_under_the_badge_once_there_are_any():
    measured = {"smoke": 31, "full": 150, "machine": "two cores"}
    told = made(measured=measured).student.cells[0].source.split("\n\n")[2]
    assert told == "The solution runs in 2.5 minutes, quick run 31 seconds, measured on two cores."
    assert "measured" not in made().student.cells[0].source


# --- handing in -------------------------------------------------------------------------------------------------------

HEARD = """
import json, os, sys, types
heard = json.load(open("as-colab-has-it.json"))
google, colab = types.ModuleType("google"), types.ModuleType("google.colab")
google.colab, colab._message, colab.files = colab, types.SimpleNamespace(), types.SimpleNamespace()
colab._message.blocking_request = lambda kind, request, timeout_sec: heard and {kind.removeprefix("get_"): heard}
colab.files.download = lambda name: print("downloads", name)
sys.modules |= {"google": google, "google.colab": colab}
"""


def handing_in(folder, before, **more):
    words = [sys.executable, "-c", before + setup_cell.submit("07_mixing")]
    environment = {name: text for name, text in os.environ.items() if name != "JPY_SESSION_NAME"} | more
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_students_hand_in_with_the_last_cell_which_is_no_part_of_the_grading():
    last = made().student.cells[-1]
    assert (last.id, last.metadata) == ("07-submit", {"tags": ["skip-grading"]})
    assert last.source == setup_cell.submit("07_mixing")


def test_on_colab_the_notebook_is_downloaded_as_it_stands_and_the_grader_reads_it(tmp_path):
    """Colab gives sources as lists of lines, and notes of its own on every cell and on the notebook."""
    stands = json.loads(build_tool.text_of(made().solution))
    stands["cells"] += [json.loads(nbformat.writes(made().student))["cells"][-1]]
    stands["metadata"] |= {
        "accelerator": "GPU",
        "colab": {"provenance": [], "gpuType": "T4", "name": "07_mixing.ipynb"},
    }
    stands["nbformat_minor"] = 0
    for cell in stands["cells"]:
        cell["metadata"] |= {"id": cell.pop("id"), "colab": {"base_uri": "https://localhost:8080/"}}
        cell["source"] = "".join(cell["source"]).splitlines(keepends=True)
    (tmp_path / "as-colab-has-it.json").write_text(json.dumps(stands))
    assert handing_in(tmp_path, HEARD) == "downloads 07_mixing.ipynb"
    read = intake.read_limited(tmp_path / "07_mixing.ipynb")
    ours = [(cell.id, cell.source) for cell in made().solution.cells if cell.cell_type == "code"]
    *before, last = read.cells
    assert [(cell.id, cell.source) for cell in before] == ours
    assert (last.id, last.tags, read.notes, read.lesson) == ("07-submit", ("skip-grading",), (), "07")


@pytest.mark.parametrize(
    "changed",
    [
        "del colab._message",
        "del colab._message.blocking_request",
        "colab._message.blocking_request = lambda kind: heard",
        "del colab.files",
    ],
)
def test_where_colab_has_changed_the_cell_still_says_how_to_hand_in(tmp_path, changed):
    (tmp_path / "as-colab-has-it.json").write_text('{"ipynb": {}}')
    assert "File, Download, Download .ipynb" in handing_in(tmp_path, f"{HEARD}{changed}\n")


def test_where_colab_does_not_answer_or_is_not_there_the_cell_says_which_file(tmp_path):
    (tmp_path / "as-colab-has-it.json").write_text("null")
    assert "File, Download, Download .ipynb" in handing_in(tmp_path, HEARD)
    plain = "import os, sys\n"
    assert handing_in(tmp_path, plain) == f"Hand in this file: {tmp_path / '07_mixing.ipynb'}"
    mine = str(tmp_path / "my copy.ipynb")
    assert handing_in(tmp_path, plain, JPY_SESSION_NAME=mine) == f"Hand in this file: {mine}"
    assert [file.name for file in tmp_path.iterdir()] == ["as-colab-has-it.json"]


# --- nbgrader's metadata ----------------------------------------------------------------------------------------------


def test_nbgrader_knows_the_answer_as_a_solution_and_the_check_as_a_locked_test():
    cells = by_id(made().student)
    common = {"schema_version": 3, "task": False}
    answer = {"grade_id": "07-1-answer", "solution": True, "grade": False, "locked": False}
    check = {"grade_id": "07-1-check", "solution": False, "grade": True, "locked": True, "points": 3}
    assert cells["07-1-answer"].metadata.nbgrader == answer | common
    assert cells["07-1-check"].metadata.nbgrader == check | common
    assert {name for name, cell in cells.items() if "nbgrader" in cell.metadata} == {
        f"07-{n}-{part}" for n in (1, 2) for part in ("answer", "check")
    }


# --- what is refused --------------------------------------------------------------------------------------------------

TAIL = "\n# %%\nx = 1\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SOURCE + TAIL + "### BEGIN SOLUTION\n", "cell 07-code-3 opens a solution and never closes it"),
        (SOURCE + TAIL + "### BEGIN SOLUTION\n### BEGIN SOLUTION\n### END SOLUTION\n", "inside a solution"),
        (SOURCE + TAIL + "### END SOLUTION\n", "closes a solution that it never opened"),
        (SOURCE + TAIL + "### STUDENT: x = 2\n", "directly after"),
        (
            SOURCE + TAIL + "if x:\n    ### BEGIN SOLUTION\n    x = 2\n    ### END SOLUTION\n",
            "not valid Python for students",
        ),
        (SOURCE + '\n# %% exercise="07.3"\n', "exercise 07.3: there is no exercise '07.3'"),
        (SOURCE + '\n# %% exercise="07.1"\n', "exercise 07.1 stands there 2 times"),
        (SOURCE + '\n# %% exercise="06.1"\n', "not called like 07.1"),
        (SOURCE + '\n# %% exercise="07.9"\n', "its references are called"),
        (SOURCE + '\n# %% exercise="07.8"\n', "its answer uses wraps; import that in a cell above"),
        (HEAD + '\n# %% exercise="07.1"\ndef blend(x):\n    pass\n', "exercise 07.1 is generated"),
        (HEAD + "import torch\n", "the set-up is generated"),
        (SOURCE.replace(' tags=["setup"]', ""), 'one cell has tags=\\["setup"\\]; found 0'),
        (SOURCE + '\n# %% tags=["setup"]\n', "found 2"),
        (SOURCE + '\n# %% excercise="07.2"\n', "excercise"),
        (SOURCE.replace("# # Mixing", "# Mixing"), "starts with the title"),
    ],
)
def test_a_source_that_breaks_a_rule_is_refused(text, message):
    with pytest.raises(LessonError, match=message) as told:
        made(text)
    assert str(told.value).startswith("07_mixing: ")


def test_a_file_with_another_kind_of_name_is_no_lesson():
    with pytest.raises(LessonError, match="01_score_and_noise.py"):
        build(SOURCE, "mixing", find)


# --- files ------------------------------------------------------------------------------------------------------------

RUNNABLE = f'{HEAD}\n# %% tags=["nbval-check-output"]\na = 2\nprint(a)\n\n# %%\na + 1\n\n# %%\n'


class Checkout:
    """A folder with one lesson, and the command line of build.py on it."""

    def __init__(self, folder):
        self.folder, self.lesson = folder, folder / "lessons/07_mixing.py"
        self.student, self.solution = folder / "notebooks/07_mixing.ipynb", folder / "solutions/07_mixing.ipynb"
        self.lesson.parent.mkdir()

    def write(self, text):
        self.lesson.write_text(text)

    def build(self, *words):
        """Exit code and everything that was said."""
        app = typer.Typer()
        app.command()(build_tool.main)
        done = CliRunner().invoke(app, ["--root", str(self.folder), *words])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done.exit_code, done.output

    def fill(self, outputs=("2\n", "3\n")):
        """Outputs as a run leaves them, without a run."""
        notebook = nbformat.read(self.solution, as_version=4)
        for number, cell in enumerate([cell for cell in notebook.cells if cell.cell_type == "code" and cell.source], 1):
            cell.execution_count = number
            text = ["", *outputs][number - 1] if number <= len(outputs) + 1 else "?"
            cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=text)] if text else []
        self.solution.write_text(build_tool.text_of(notebook))

    def counts(self):
        notebook = nbformat.read(self.solution, as_version=4)
        return [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    monkeypatch.setattr("condiff_check.registry.find", find)
    return Checkout(tmp_path)


def test_fresh_notebooks_are_in_step_once_the_solution_has_run(checkout):
    checkout.write(RUNNABLE)
    assert checkout.build()[0] == 0
    code, told = checkout.build("--check")
    assert code == 1
    assert "lacks the outputs of 07-code-1, 07-setup, 07-code-2" in told
    checkout.fill()
    assert checkout.build("--check") == (0, "")


@pytest.mark.parametrize("which", ["student", "solution"])
def test_a_notebook_that_was_edited_or_is_missing_is_out_of_step(checkout, which):
    checkout.write(RUNNABLE)
    checkout.build()
    checkout.fill()
    file = getattr(checkout, which)
    file.write_text(file.read_text().replace("a = 2", "a = 7"))
    code, told = checkout.build("--check")
    assert code == 1
    assert told.count("\n") == 1
    assert f"{file.parent.name}/07_mixing.ipynb is not what" in told
    file.unlink()
    assert checkout.build("--check") == (1, f"{file.parent.name}/07_mixing.ipynb is missing\n")


def test_a_check_writes_nothing(checkout):
    checkout.write(RUNNABLE)
    checkout.build("--check")
    assert [file.name for file in checkout.folder.rglob("*") if file.is_file()] == ["07_mixing.py"]


def test_a_compared_cell_needs_an_output(checkout):
    checkout.write(RUNNABLE)
    checkout.build()
    checkout.fill(outputs=("", "3\n"))
    assert checkout.build("--check")[1] == (
        "solutions/07_mixing.ipynb lacks the outputs of 07-code-1: tools/build.py --execute\n"
    )


def test_notebooks_without_a_lesson_and_a_folder_without_lessons_are_reported(checkout):
    code, told = checkout.build("--check")
    assert code == 1
    assert "no lessons found" in told
    checkout.write(RUNNABLE)
    checkout.build()
    checkout.student.with_name("06_old.ipynb").write_text("{}")
    assert "notebooks/06_old.ipynb belongs to no lesson" in checkout.build("--check")[1]


def test_outputs_stay_up_to_the_first_change_of_code(checkout):
    checkout.write(RUNNABLE)
    checkout.build()
    checkout.fill()
    checkout.write(RUNNABLE.replace("What remains", "How much remains"))
    checkout.build()
    assert checkout.counts() == [1, 2, 3, None]
    checkout.write(RUNNABLE.replace("a + 1", "a + 5"))
    checkout.build()
    assert checkout.counts() == [1, 2, None, None]
    checkout.fill()
    checkout.write(RUNNABLE.replace("a = 2", "a = 1"))
    checkout.build()
    assert checkout.counts() == [1, None, None, None]


def test_executing_runs_what_changed_and_leaves_no_trace_of_the_machine(checkout):
    text = RUNNABLE + "import os\nprint(os.environ['CONDIFF_TEST'], end=' ')\nprint(os.path.basename(os.getcwd()))\n"
    text += "plt.plot([1, 2])\nplt.show()\n\n# %%\nimport ipywidgets\nipywidgets.IntSlider()\n"
    checkout.write(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONDIFF_TEST", "seen")
        patch.setenv("MPLBACKEND", "agg")
        code, told = checkout.build("--execute")
    assert code == 0, told
    notebook = nbformat.read(checkout.solution, as_version=4)
    cells = by_id(notebook)
    assert checkout.counts() == [1, 2, 3, 4, 5]
    assert cells["07-code-1"].outputs[0].text == "2\n"
    printed, figure = cells["07-code-3"].outputs
    assert printed.text == "seen solutions\n"
    assert "image/png" in figure.data
    assert "widget" not in json.dumps({k: v for k, v in cells["07-code-4"].items() if k != "source"})
    assert notebook.metadata == made().solution.metadata
    assert all("execution" not in cell.metadata for cell in notebook.cells)
    before = checkout.solution.stat().st_mtime_ns
    assert checkout.build("--execute") == (0, "")
    assert checkout.solution.stat().st_mtime_ns == before


def test_a_solution_that_fails_is_reported_and_keeps_no_outputs(checkout):
    checkout.write(RUNNABLE + "raise RuntimeError('on purpose')\n")
    code, told = checkout.build("--execute")
    assert code == 1
    assert "solutions/07_mixing.ipynb does not run to its end" in told
    assert "on purpose" in told
    assert checkout.counts() == [None] * 4


# --- what students must not see ---------------------------------------------------------------------------------------


def leaks(text=SOURCE, add=""):
    lesson = made(text)
    student = nbformat.from_dict(lesson.student)
    by_id(student)["07-text-1"].source += add
    return build_tool.leaks("07_mixing", lesson, student)


@pytest.mark.parametrize(
    "line",
    [
        "    root = weights['x0'] ** 0.5".replace("'", '"'),
        "# return root*x0 + (1 - root**2)**0.5 * eps",
        "self.factor = nn.Parameter(Tensor([start]))",
        "shared_secret = 3.0",
        "Because variances add.",
        "guess = sum(prices)",
        "Notes for those who teach.",
        "# the square root keeps the variance",
    ],
)
def test_a_line_of_an_answer_in_a_student_notebook_is_a_leak(line):
    (told,) = leaks(add="\n" + line)
    assert "gives an answer away in cell 07-text-1" in told


def test_stubs_and_what_the_text_quotes_are_no_leaks():
    assert leaks() == []
    quoting = SOURCE.replace("# What remains", '# `root = weights["x0"]**0.5`, what remains')
    assert leaks(quoting + '\n# %%\nroot = weights["x0"] ** 0.5\n') == []


def test_code_may_repeat_a_line_of_an_answer_only_where_the_author_says_so():
    code = '\n# %%\nroot = weights["x0"] ** 0.5\n'
    assert len(leaks(SOURCE + code)) == 1
    assert leaks(SOURCE + code.replace("# %%", '# %% tags=["shown"]')) == []


def test_a_picture_with_a_palette_is_smaller_and_looks_the_same():
    figure = Figure()
    for at, colour in zip((0.2, 0.5, 0.8), ("#0072B2", "#E69F00", "#D55E00"), strict=True):
        figure.subplots().scatter(*numpy.random.default_rng(0).normal(at, 0.1, (2, 500)), s=3, color=colour)
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    before = base64.b64encode(file.getvalue()).decode()
    after = build_tool.with_palette(before)
    seen, drawn = (
        numpy.asarray(Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")).astype(float)
        for picture in (after, before)
    )
    assert len(after) < len(before) / 2
    assert (seen[(drawn == 255).all(axis=2)] == 255).all()
    assert numpy.abs(seen - drawn).mean() < 0.5  # of 255
    assert build_tool.with_palette(after) == after


def test_what_is_transparent_in_a_picture_becomes_paper():
    file = io.BytesIO()
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(file, "PNG")
    after = build_tool.with_palette(base64.b64encode(file.getvalue()).decode())
    assert Image.open(io.BytesIO(base64.b64decode(after))).convert("RGB").getpixel((0, 0)) == (255, 255, 255)
