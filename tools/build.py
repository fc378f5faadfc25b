"""Write the notebooks of the lessons: lessons/NN_name.py -> notebooks/NN_name.ipynb and solutions/NN_name.ipynb.

python tools/build.py                   all lessons; outputs stay where no code before them has changed
python tools/build.py --execute         and run the solutions that have code without outputs
python tools/build.py --check           write nothing; say what is out of step, and exit with 1
python tools/build.py lessons/01_*.py   these lessons only
"""

import base64
import copy
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Annotated

try:
    import nbformat
    import typer
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, DeadKernelError
    from nbformat import NotebookNode
    from PIL import Image

    from lesson import Lesson, LessonError, build
except ModuleNotFoundError as error:
    sys.exit(f"{error.name} is not installed. What the notebooks are built with comes with: pip install -e '.[test]'")

ROOT = Path(__file__).resolve().parents[1]
SHORT = 12  # characters; shorter lines of an answer, like `return x0`, stand in any code
IMPORTS = ("import ", "from ")
WIDGET = "application/vnd.jupyter.widget-view+json"
PNG = "image/png"


def main(
    lessons: Annotated[list[Path] | None, typer.Argument(help="files of lessons/; all if none is named")] = None,
    check: Annotated[bool, typer.Option("--check", help="write nothing, exit with 1 if files are out of step")] = False,
    execute: Annotated[bool, typer.Option("--execute", help="run solutions that have code without outputs")] = False,
    everything: Annotated[bool, typer.Option("--all", help="with --execute: run every solution")] = False,
    root: Annotated[Path, typer.Option(help="the folder with lessons/, notebooks/, solutions/")] = ROOT,
) -> None:
    """Write student notebooks and solutions from the lessons."""
    from condiff_check.registry import find  # imports torch: not for --help

    paths = [path.resolve() for path in lessons or sorted((root / "lessons").glob("*.py"))]
    problems = [] if lessons else _orphans(root, paths)
    if not paths:
        problems.append(f"no lessons found in {root / 'lessons'}")
    for path in paths:
        try:
            lesson = build(path.read_text(encoding="utf-8"), path.stem, find, _measured(root, path.stem))
        except LessonError as error:
            problems.append(str(error))
            continue
        problems += _check(root, path.stem, lesson) if check else _write(root, path.stem, lesson, execute, everything)
    for problem in problems:
        print(problem, file=sys.stderr)
    raise typer.Exit(bool(problems))


def _measured(root: Path, stem: str) -> dict | None:
    file = root / "lessons" / "minutes.json"
    return json.loads(file.read_text(encoding="utf-8")).get(stem) if file.exists() else None


def _orphans(root: Path, paths: list[Path]) -> list[str]:
    stems = {path.stem for path in paths}
    files = [file for folder in ("notebooks", "solutions") for file in sorted((root / folder).glob("*.ipynb"))]
    return [f"{file.relative_to(root)} belongs to no lesson" for file in files if file.stem not in stems]


# --- write ------------------------------------------------------------------------------------------------------------


def text_of(notebook: NotebookNode) -> str:
    return nbformat.writes(notebook).rstrip("\n") + "\n"


def _write(root: Path, stem: str, lesson: Lesson, execute: bool, everything: bool) -> list[str]:
    student, solution = root / "notebooks" / f"{stem}.ipynb", root / "solutions" / f"{stem}.ipynb"
    notebook, problems = lesson.solution, []
    if solution.exists():
        keep_outputs(nbformat.read(solution, as_version=4), notebook)
    if execute and (everything or not_run(notebook)):
        solution.parent.mkdir(parents=True, exist_ok=True)
        notebook, problems = run(notebook, solution)
    for output in (output for cell in _code(notebook) for output in cell.outputs):
        if PNG in output.get("data", {}):
            output.data[PNG] = with_palette(output.data[PNG])
    for file, content in ((student, lesson.student), (solution, notebook)):
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists() or file.read_text(encoding="utf-8") != text_of(content):
            file.write_text(text_of(content), encoding="utf-8", newline="\n")
            print(f"wrote {file.relative_to(root)}")
    return problems


def with_palette(picture: str) -> str:
    """A PNG in base64, its colours reduced to 256: a third of the size, and no difference to the eye. One that is that
    already stays as it is."""
    image = Image.open(io.BytesIO(base64.b64decode(picture)))
    if image.mode == "P":
        return picture
    small = io.BytesIO()
    on_white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")
    on_white.quantize(256, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def keep_outputs(old: NotebookNode, new: NotebookNode) -> None:
    """Give the cells of `new` the outputs that they have in `old`, up to the first change of code."""
    for before, after in zip(_code(old), _code(new), strict=False):
        if (before.id, before.source) != (after.id, after.source):
            return
        after.outputs, after.execution_count = before.outputs, before.execution_count


def not_run(notebook: NotebookNode) -> list[str]:
    """The ids of the code cells that have not been executed. Jupyter does not execute empty cells."""
    return [cell.id for cell in _code(notebook) if cell.source.strip() and cell.execution_count is None]


def _code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


# --- execute ----------------------------------------------------------------------------------------------------------


def run(notebook: NotebookNode, file: Path) -> tuple[NotebookNode, list[str]]:
    """The notebook with its outputs, as it comes out of a fresh kernel in the file's folder; without them if it fails.

    The tier is the full one, unless CONDIFF_BUDGET says otherwise.
    """
    print(f"running {file.parent.name}/{file.name} ...", flush=True)
    done = copy.deepcopy(notebook)
    for cell in _code(done):
        cell.outputs, cell.execution_count = [], None
    empty = copy.deepcopy(done)
    try:
        execute(done, file.parent)
    except (CellExecutionError, DeadKernelError) as error:
        plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
        return empty, [f"{file.parent.name}/{file.name} does not run to its end:\n{plain}"]
    for cell in _code(done):
        cell.outputs = [output for output in map(_without_widget, cell.outputs) if output]
    done.metadata = notebook.metadata
    return done, []


def execute(notebook: NotebookNode, folder: Path) -> None:
    """Run all cells in place; figures are drawn as in Jupyter, whatever MPLBACKEND says here."""
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    client = NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
    )
    client.execute(env=environment)


def _without_widget(output: NotebookNode) -> NotebookNode | None:
    """A widget without its state shows nothing; what stands beside it (a picture, text) stays."""
    if WIDGET in output.get("data", {}):
        del output["data"][WIDGET]
        return output if output["data"] else None
    return output


# --- check ------------------------------------------------------------------------------------------------------------


def _check(root: Path, stem: str, lesson: Lesson) -> list[str]:
    student, solution = root / "notebooks" / f"{stem}.ipynb", root / "solutions" / f"{stem}.ipynb"
    missing = [f"{file.relative_to(root)} is missing" for file in (student, solution) if not file.exists()]
    if missing:
        return missing
    problems = []
    if student.read_bytes() != text_of(lesson.student).encode():
        problems.append(f"notebooks/{stem}.ipynb is not what lessons/{stem}.py gives: run make notebooks")
    problems += leaks(stem, lesson, nbformat.read(student, as_version=4))
    notebook = nbformat.read(solution, as_version=4)
    changed = _first_difference(lesson.solution, notebook)
    if changed:
        problems.append(f"solutions/{stem}.ipynb is not what lessons/{stem}.py gives ({changed}): run make notebooks")
    cells = [cell.id for cell in _code(notebook) if _is_compared(cell) and not cell.outputs]
    lacking = list(dict.fromkeys(cells + not_run(notebook)))
    if lacking:
        problems.append(f"solutions/{stem}.ipynb lacks the outputs of {', '.join(lacking)}: tools/build.py --execute")
    return problems


def _is_compared(cell: NotebookNode) -> bool:
    return "nbval-check-output" in cell.metadata.get("tags", [])


def _first_difference(expected: NotebookNode, found: NotebookNode) -> str | None:
    """The first cell that differs in anything but its outputs."""
    for ours, theirs in zip(expected.cells, found.cells, strict=False):
        if any(ours.get(key) != theirs.get(key) for key in ("id", "cell_type", "source", "metadata")):
            return f"first at cell {ours.id}"
    if len(expected.cells) != len(found.cells):
        return f"{len(found.cells)} cells instead of {len(expected.cells)}"
    return None if expected.metadata == found.metadata else "its metadata"


def leaks(stem: str, lesson: Lesson, student: NotebookNode) -> list[str]:
    """Cells of a student notebook that hold a line of an answer, blanks aside, which no text shows."""
    visible = _squeezed(lesson.visible)
    candidates = {_squeezed(line): line.strip() for line in lesson.hidden if not line.lstrip().startswith(IMPORTS)}
    secret = {key: line for key, line in candidates.items() if len(key) >= SHORT and key not in visible}
    found = [(cell.id, line) for cell in student.cells for key, line in secret.items() if key in _squeezed(cell.source)]
    return [f"notebooks/{stem}.ipynb gives an answer away in cell {name}: {line}" for name, line in found]


def _squeezed(text: str) -> str:
    return "".join(text.split())


if __name__ == "__main__":
    typer.run(main)
