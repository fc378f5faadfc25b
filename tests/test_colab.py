"""A lesson on something like Colab: its published versions in an environment of their own, and its set-up cell.

What is not Colab's here: the operating system, the front end, the GPU; and Python, where there is no 3.13. It takes
some 6 GB of disk and minutes, most of them for torch.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell
from rich.console import Console

import setup_cell
from condiff_check.grading import commands
from condiff_check.registry import find
from lesson import build

ROOT = Path(__file__).resolve().parents[1]
LESSON = "03_classifier_guidance"  # it reads trained networks that come with the course, and has a slider
PINS = dict(line.split("==") for line in (ROOT / "tests/colab-pins.txt").read_text().split() if "==" in line)
# What a lesson imports, and Colab's kernel. ipython is not in the file: pyproject.toml asks for a later one to grade.
HERE = ["ipykernel", "ipywidgets", "matplotlib", "numpy", "pillow", "rich", "safetensors", "scikit-learn"]
HERE += ["scipy", "torch", "tqdm", "typer"]
VERSIONS = {name: PINS[name] for name in HERE} | {"ipython": "7.34.0"}
NEEDED = 8e9  # bytes of disk

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

GOOGLE = {  # what of google.colab the notebooks use
    "google/colab/__init__.py": "",
    "google/colab/_message.py": """
        import json

        def blocking_request(kind, request="", timeout_sec=5):
            return {"ipynb": json.load(open("as-colab-has-it.json"))}
        """,
    "google/colab/files.py": """
        def download(name):
            open("downloads.txt", "a").write(name)
        """,
}
LAUNCH = "import google.colab; from ipykernel import kernelapp; kernelapp.launch_new_instance()"
LOOK = """
import importlib.metadata, json, condiff_ref, ipywidgets
every = list(ipywidgets.Widget.widgets.values())
control = next(one for one in every if isinstance(one, ipywidgets.SelectionSlider))
picture = next(one for one in every if isinstance(one, ipywidgets.HTML) and "<img " in one.value)
pictures = set()
for value in [value for _, value in control.options]:
    control.value = value
    pictures.add(picture.value)
json.dump({
    "versions": {name: importlib.metadata.version(name).partition("+")[0] for name in NAMES},
    "condiff": condiff_ref.__file__,
    "pictures": [len(pictures), len(control.options)],
}, open("found.json", "w"))
"""


def python() -> str:
    """Colab's version of Python, or else the latest that the course takes."""
    for minor in (13, 12, 11):
        own = sorted(Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python3.{minor}"))
        for program in (*map(str, own), f"python3.{minor}"):
            asked = [program, "-c", "import ensurepip, ssl, sqlite3"]
            if shutil.which(program) and subprocess.run(asked, capture_output=True).returncode == 0:
                return program
    if importlib.util.find_spec("ensurepip"):
        return sys.executable
    pytest.skip("needs a Python with ensurepip")


def run(*words: object, **how: object) -> None:
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, **how)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def colab(tmp_path_factory):
    """A folder with venv/, Colab's versions in it; content/, where notebooks run; repository/, what set-up fetches."""
    folder = tmp_path_factory.mktemp("colab")
    if shutil.disk_usage(folder).free < NEEDED:
        pytest.skip(f"needs {NEEDED / 1e9:.0f} GB of disk")
    (folder / "content").mkdir()
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in filter(lambda name: (ROOT / name).is_file(), listed.stdout.splitlines()):
        (folder / "repository" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / "repository" / name)
    who = ["-c", "user.name=x", "-c", "user.email=x@x"]
    for words in (["init", "-q"], ["add", "-A"], [*who, "commit", "-q", "-m", "the course"]):
        run("git", *words, cwd=folder / "repository")
    run(python(), "-m", "venv", folder / "venv")
    pinned = [f"{name}=={version}" for name, version in VERSIONS.items()]
    run(folder / "venv/bin/python", "-m", "pip", "install", "-q", *pinned)
    (site,) = (folder / "venv/lib").glob("python3.*/site-packages")
    for name, text in GOOGLE.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(textwrap.dedent(text))
    yield folder
    shutil.rmtree(folder)


def notebook(repository: Path):
    """The solution as a student's file, with the hand-in cell, and what set-up fetches lying on this machine."""
    made = build((ROOT / f"lessons/{LESSON}.py").read_text(), LESSON, find)
    cells = [*made.solution.cells, made.student.cells[-1]]
    setup = next(cell for cell in cells if cell.id.endswith("-setup"))
    assert setup_cell.REPOSITORY in setup.source
    setup.source = setup.source.replace(setup_cell.REPOSITORY, f"file://{repository}")
    return nbformat.v4.new_notebook(cells=cells, metadata=made.student.metadata)


def execute(made, colab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the environment's own kernel, which has imported google.colab, as Colab's has."""
    spec = dict(argv=[str(colab / "venv/bin/python"), "-c", LAUNCH, "-f", "{connection_file}"], language="python")
    (colab / "share/kernels/colab").mkdir(parents=True)
    (colab / "share/kernels/colab/kernel.json").write_text(json.dumps(spec | {"display_name": "Colab"}))
    monkeypatch.setenv("JUPYTER_PATH", str(colab / "share"))
    environment = os.environ | {"CONDIFF_BUDGET": "smoke", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    for name in ("PYTHONPATH", "MPLBACKEND", "CONDIFF_STATIC", "VIRTUAL_ENV"):
        environment.pop(name, None)
    client = NotebookClient(made, km=KernelManager(kernel_name="colab"), timeout=600, store_widget_state=False)
    client.execute(env=environment, cwd=str(colab / "content"))


def test_a_lesson_runs_with_colabs_versions_and_what_it_hands_in_is_graded_right(colab, monkeypatch):
    made = notebook(colab / "repository")
    (colab / "content/as-colab-has-it.json").write_text(nbformat.writes(made))
    made.cells.append(new_code_cell(f"NAMES = {list(VERSIONS)!r}\n" + LOOK))
    execute(made, colab, monkeypatch)

    found = json.loads((colab / "content/found.json").read_text())
    assert found["versions"] == VERSIONS  # set-up has changed none of them
    assert Path(found["condiff"]).is_relative_to(colab / "content/condiff")
    n, values = found["pictures"]
    assert n == values > 2

    assert (colab / "content/downloads.txt").read_text() == f"{LESSON}.ipynb"
    hand_in = colab / "hand-ins/kim" / f"{LESSON}.ipynb"
    hand_in.parent.mkdir(parents=True)
    shutil.copyfile(colab / "content" / f"{LESSON}.ipynb", hand_in)
    options = commands.Options(
        submissions=colab / "hand-ins", out=colab / "graded", trusted=True, self_check=False, quiet=True
    )
    quiet = Console(quiet=True)
    commands.grade(options, quiet, quiet)
    (graded,) = map(json.loads, (colab / "graded/results.jsonl").read_text().splitlines())
    assert graded["points"] == graded["out_of"] > 0
