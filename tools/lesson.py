"""From the source of a lesson, lessons/NN_name.py in jupytext's percent format, to its two notebooks.

Cells of the source:

    # %% [markdown]               text; the first cell is the title
    # %%                          code, for both notebooks
    # %% tags=["setup"]           becomes the set-up cell, once in each lesson
    # %% exercise="01.2"          becomes the answer cell and the check cell of that exercise
    # %% tags=["solution-only"]   not for students (text or code)
    # %% tags=["shown"]           code for both, though a line of it is a line of an answer too

Students get one cell more, the last, which hands in.

In text and code alike, what stands between `### BEGIN SOLUTION` and `### END SOLUTION` is for the solution only. Lines
`### STUDENT: guess = ...` directly after the first marker are what students get in its place.
"""

import ast
import builtins
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import jupytext
import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

import stubs
from setup_cell import SETUP, badge, minutes_line, submit

BEGIN, END, STUDENT = "### BEGIN SOLUTION", "### END SOLUTION", "### STUDENT:"
TEXT_ANSWER = "*Your answer here.*"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


class LessonError(ValueError):
    """The source of a lesson breaks a rule; the message says where and which."""


@dataclass(frozen=True)
class Lesson:
    """Both notebooks, the lines that students must not see, and the text that they may see all the same."""

    solution: NotebookNode
    student: NotebookNode
    hidden: tuple[str, ...]
    visible: str


def build(text: str, stem: str, find: Callable, measured: dict | None = None) -> Lesson:
    """Both notebooks of the lesson `stem` ("01_score_and_noise"); find("01.2") is the exercise.

    Raises LessonError where the source breaks a rule.
    """
    if not re.fullmatch(r"\d\d_[a-z0-9_]+", stem):
        raise LessonError(f"{stem}: a lesson's file is called like 01_score_and_noise.py")
    cells = jupytext.reads(text, fmt="py:percent").cells
    _refuse(stem, cells)
    pieces, counts = [], Counter()
    for cell in cells:
        pieces += _pieces(stem, cell, find, counts)
    pieces.append((None, _cell(f"{stem[:2]}-submit", "code", submit(stem), ["skip-grading"]), ""))
    _put_under_title(stem, pieces[0], measured)
    solution, student = (_notebook([piece[side] for piece in pieces if piece[side]]) for side in (0, 1))
    _refuse_broken_code(stem, student)
    _refuse_missing_names(stem, solution)
    hidden = tuple(line for piece in pieces for line in piece[2].splitlines())
    return Lesson(solution, student, hidden, "\n".join(cell.source for cell in student.cells if _may_tell(cell)))


# --- rules ------------------------------------------------------------------------------------------------------------


def _refuse(stem: str, cells: list[NotebookNode]) -> None:
    if not cells or not cells[0].source.startswith("# ") or "solution-only" in _tags(cells[0]):
        raise LessonError(f"{stem}: the first cell starts with the title, '# ...', and is for everybody")
    if cells[0].cell_type != "markdown":
        raise LessonError(f"{stem}: the first cell is text")
    setups = sum("setup" in _tags(cell) for cell in cells)
    if setups != 1:
        raise LessonError(f'{stem}: one cell has tags=["setup"]; found {setups}')
    ids = Counter(cell.metadata["exercise"] for cell in cells if "exercise" in cell.metadata)
    for exercise, times in ids.items():
        if times > 1:
            raise LessonError(f"{stem}: exercise {exercise} stands there {times} times")
    for cell in cells:
        # jupytext notes blank lines in lines_to_next_cell
        unknown = set(cell.metadata) - {"tags", "exercise", "lines_to_next_cell"}
        if unknown:
            raise LessonError(f"{stem}: a cell's first line says {', '.join(sorted(unknown))}; only tags and exercise")


def _refuse_code(stem: str, what: str, cell: NotebookNode) -> None:
    lines = [line for line in cell.source.splitlines() if line.strip() and not line.startswith("#")]
    if cell.cell_type != "code" or lines:
        raise LessonError(f"{stem}: {what} is generated, so its cell holds nothing but comments")


def _refuse_broken_code(stem: str, student: NotebookNode) -> None:
    for cell in student.cells:
        if cell.cell_type == "code":
            try:
                parsed(cell)
            except SyntaxError as error:
                told = f"{error.msg}, line {error.lineno}"
                raise LessonError(f"{stem}: cell {cell.id} is not valid Python for students ({told})") from error


def _refuse_missing_names(stem: str, solution: NotebookNode) -> None:
    """A reference comes without the imports of its module: those it needs, the lesson has to have."""
    bound = set(dir(builtins))
    for cell in solution.cells:
        if cell.cell_type == "code":
            tree = parsed(cell)
            bound |= bound_names(tree)
            used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
            if cell.id.endswith("-answer") and used - bound:
                missing = ", ".join(sorted(used - bound))
                name = cell.metadata["exercise"]
                raise LessonError(f"{stem}: exercise {name}: its answer uses {missing}; import that in a cell above")


def parsed(cell: NotebookNode) -> ast.Module:
    """Jupyter's magics are not Python's business."""
    return ast.parse(re.sub(r"(?m)^(\s*)[%!].*$", r"\1pass", cell.source))


def bound_names(tree: ast.Module) -> set[str]:
    """Every name that the code defines, imports, assigns or takes as an argument."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.alias):
            names.add(node.asname or node.name.partition(".")[0])
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, (*stubs.FUNCTION, ast.ClassDef, ast.ExceptHandler)) and node.name:
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
    return names


# --- cells ------------------------------------------------------------------------------------------------------------

Piece = tuple[NotebookNode | None, NotebookNode | None, str]  # for the solution, for the student, what is hidden


def _pieces(stem: str, cell: NotebookNode, find: Callable, counts: Counter) -> list[Piece]:
    number, tags = stem[:2], _tags(cell)
    if "exercise" in cell.metadata:
        _refuse_code(stem, f"exercise {cell.metadata['exercise']}", cell)
        return _exercise(stem, cell, find)
    if "setup" in tags:
        _refuse_code(stem, "the set-up", cell)
        return [_both(f"{number}-setup", "code", SETUP, SETUP, tags)]
    kind = "text" if cell.cell_type == "markdown" else "code"
    counts[kind] += 1
    name = f"{number}-{kind}-{counts[kind]}"
    ours, theirs, hidden = _split(f"{stem}: cell {name}", cell)
    if "solution-only" in tags:
        return [(_cell(name, cell.cell_type, ours, tags), None, ours)]
    return [_both(name, cell.cell_type, ours, theirs, tags, hidden)]


def _exercise(stem: str, cell: NotebookNode, find: Callable) -> list[Piece]:
    """The answer cell and the check cell."""
    name = cell.metadata["exercise"]
    if not re.fullmatch(rf"{stem[:2]}\.\d+[a-z]?", name):
        raise LessonError(f"{stem}: exercise {name!r} is not called like {stem[:2]}.1")
    try:
        exercise = find(name)
        ours, theirs = stubs.answer(exercise.references), stubs.stub(exercise.references)
    except (LookupError, TypeError) as error:
        raise LessonError(f"{stem}: exercise {name}: {error.args[0]}") from error
    defined = tuple(reference.__name__ for reference in exercise.references)
    if defined != exercise.names:
        raise LessonError(f"{stem}: exercise {name} asks for {exercise.names}, its references are called {defined}")

    grade_id = name.replace(".", "-")  # no dots in the ids of nbformat
    comment = cell.source.strip() + "\n" if cell.source.strip() else ""
    kept = theirs.splitlines()
    # a decorator such as @torch.no_grad() is no answer by itself
    hidden = "\n".join(line for line in ours.splitlines() if line not in kept and not line.lstrip().startswith("@"))
    write = _both(f"{grade_id}-answer", "code", comment + ours, comment + theirs, _tags(cell), hidden)
    names = ", ".join(exercise.names)
    line = f'{names} = check("{name}", {names})'
    test = _both(f"{grade_id}-check", "code", line, line, ["nbval-check-output"])
    for ours, theirs, _ in (write, test):
        for each in (ours, theirs):
            each.metadata["exercise"] = name
            each.metadata["nbgrader"] = _nbgrader(each.id, exercise.points)
    return [write, test]


def _nbgrader(grade_id: str, points: int) -> dict:
    solution = grade_id.endswith("-answer")
    common = dict(grade_id=grade_id, schema_version=3, task=False)
    if solution:
        return dict(grade=False, locked=False, solution=True, **common)
    return dict(grade=True, locked=True, points=points, solution=False, **common)


def _split(where: str, cell: NotebookNode) -> tuple[str, str, str]:
    """The text for the solution, for the student, and what only the solution has."""
    ours, theirs, hidden = [], [], []
    begun = fresh = False  # fresh: directly after the opening marker
    for line in cell.source.splitlines():
        mark = line.strip()
        if mark == BEGIN:
            if begun:
                raise LessonError(f"{where} opens a solution inside a solution")
            begun = fresh = True
            if cell.cell_type == "markdown":
                theirs.append(TEXT_ANSWER)
        elif mark == END:
            if not begun:
                raise LessonError(f"{where} closes a solution that it never opened")
            begun = fresh = False
        elif mark.startswith(STUDENT):
            if not fresh or cell.cell_type == "markdown":
                raise LessonError(f"{where}: '{STUDENT}' stands directly after '{BEGIN}', in code")
            theirs.append(line[: len(line) - len(line.lstrip())] + mark.removeprefix(STUDENT).strip())
        else:
            fresh = False
            ours.append(line)
            (hidden if begun else theirs).append(line)
    if begun:
        raise LessonError(f"{where} opens a solution and never closes it")
    return "\n".join(ours), "\n".join(theirs).strip("\n"), "\n".join(hidden)


def _both(name: str, kind: str, ours: str, theirs: str, tags: list[str], hidden: str = "") -> Piece:
    return _cell(name, kind, ours, tags), _cell(name, kind, theirs, tags), hidden


def _cell(name: str, kind: str, source: str, tags: list[str]) -> NotebookNode:
    new = new_code_cell if kind == "code" else new_markdown_cell
    return new(source, id=name, metadata={"tags": list(tags)} if tags else {})


def _tags(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def _may_tell(cell: NotebookNode) -> bool:
    """Text may quote a line of an answer; code may do so in what is generated, and where the author says so."""
    return cell.cell_type == "markdown" or cell.id.endswith(("-answer", "-setup", "-submit")) or "shown" in _tags(cell)


def _put_under_title(stem: str, piece: Piece, measured: dict | None) -> None:
    lines = [badge(stem), minutes_line(measured)]
    for cell in piece[:2]:
        title, _, rest = cell.source.partition("\n")
        cell.source = "\n\n".join([title, *filter(None, lines), rest.strip("\n")]).rstrip()


def _notebook(cells: list[NotebookNode]) -> NotebookNode:
    notebook = new_notebook(cells=cells, metadata=nbformat.from_dict(METADATA))
    nbformat.validate(notebook)
    return notebook
