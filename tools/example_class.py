"""Write a class of example submissions, with what is known of each: to try condiff-grade on, and to test it with.

python tools/example_class.py OUT --lesson 01 --students 12    submissions/, truth.csv, rubric.yaml, times.csv in OUT
python tools/example_class.py OUT --compare RESULTS            does what condiff-grade found agree with truth.csv?

The submissions are the lessons' student notebooks, filled in from the exercises: reference answers, other right answers
and mistakes on file. Each text is tried once before it is used. truth.csv has for each exercise of each submission
"right", the name of the mistake, or "not done", "missing", "unreadable".
"""

import argparse
import ast
import csv
import inspect
import json
import random
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path

import nbformat
from nbformat import NotebookNode

import stubs
from condiff_check import registry
from condiff_check.checking import examine
from condiff_check.exercise import Exercise
from condiff_check.grading.discover import discover
from condiff_check.report import RIGHT, WRONG

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
# who comes first in a small class, and of whom there is one in a large one
SPECIAL = ("mistakes", "unfinished", "renamed", "hangs", "no notebook", "right", "twin", "late")
OTHERS = ("mistakes", "right", "mistakes", "right", "right")
MISTAKES = 3  # at most, in one submission
DEADLINE = datetime(2031, 5, 2, 23, 59, tzinfo=UTC)
HANGS = "steps = 10\nwhile steps > 0:  # count down\n    total = steps"
PAGE = "<!DOCTYPE html>\n<html><head><title>Log in</title></head><body><form>Log in to go on</form></body></html>\n"


@dataclass(frozen=True)
class Text:
    """An answer as a student writes it, and what is true of it: "right" or the mistake's name."""

    source: str
    truth: str = "right"

    @property
    def names(self) -> set[str]:
        """Every name that it uses."""
        return {node.id for node in ast.walk(ast.parse(self.source)) if isinstance(node, ast.Name)}


@dataclass(frozen=True)
class Work:
    """One student's notebook for one lesson; a `page` is handed in in its place."""

    answers: Mapping[str, Text] = field(default_factory=dict)
    hangs: bool = False
    page: bool = False

    def truth(self, exercise: str) -> str:
        if self.page:
            return "unreadable"
        return self.answers[exercise].truth if exercise in self.answers else "not done"


# --- texts ------------------------------------------------------------------------------------------------------------


def right(exercise: Exercise, rng: random.Random) -> Text:
    """The reference answer or another right answer that can be written down."""
    others = [objects for objects in exercise.alternatives if rng.random() < len(exercise.alternatives) / 4]
    tried = (_tried(exercise, objects, "right") for objects in rng.sample(others, len(others)))
    return next(filter(None, tried), Text(stubs.answer(exercise.references)))


def wrong(exercise: Exercise, rng: random.Random) -> Text | None:
    """A mistake on file that can be written down, if there is one."""
    mistakes = rng.sample(exercise.mistakes, len(exercise.mistakes))
    return next(filter(None, (_tried(exercise, m.answers, m.name) for m in mistakes)), None)


@cache
def _tried(exercise: Exercise, objects: tuple, truth: str) -> Text | None:
    """An answer's text, if it can do without what stands around it in its file and is what it is said to be."""
    try:
        parts = [_source(thing, name) for thing, name in zip(objects, exercise.names, strict=True)]
    except TypeError:
        return None
    text = Text("\n\n\n".join(parts), truth)
    return text if _holds(exercise, text) else None


def _holds(exercise: Exercise, text: Text) -> bool:
    """Run a text in a lesson's notebook without its figures, and check it there."""
    lesson = exercise.id.partition(".")[0]
    space = dict(_above(lesson))
    try:
        exec(compile(text.source, f"<exercise {exercise.id}>", "exec"), space)
        report = examine(exercise, [space[name] for name in exercise.names], seed=0)
    except Exception:
        return False
    if text.truth == "right":
        return report.status == RIGHT
    mistake = next(m for m in exercise.mistakes if m.name == text.truth)
    return report.status == WRONG and report.diagnosis == mistake.diagnosis


@cache
def _above(lesson: str) -> dict[str, object]:
    """What a lesson's notebook imports, and the reference answers, which may use one another."""
    space: dict[str, object] = {"__name__": "__main__"}
    for cell in notebook(lesson).cells:
        if cell.cell_type == "code":
            tree = ast.parse(cell.source)
            tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
            exec(compile(tree, cell.id, "exec"), space)
    for exercise in registry.lesson(lesson):
        exec(stubs.answer(exercise.references), space)
    return space


def _source(thing: object, name: str) -> str:
    """A function's or class's source, under this name. Raises TypeError for what has none that stands alone."""
    if getattr(inspect.unwrap(thing), "__closure__", None):
        raise TypeError("made by another function")
    if getattr(thing, "__name__", None) == "<lambda>":
        return _lambda(thing, name)
    text = stubs.answer([thing])
    if thing.__name__ == name:
        return text  # with its comments
    return ast.unparse(_Renamed({thing.__name__: name}).visit(ast.parse(text)))


def _lambda(thing: object, name: str) -> str:
    """A lambda as a def, if it is the only one that begins in its line."""
    tree = ast.parse(Path(inspect.getsourcefile(thing)).read_text())
    line = thing.__code__.co_firstlineno
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Lambda) and node.lineno == line]
    if len(found) != 1:
        raise TypeError("not the only lambda of its line")
    return f"def {name}({ast.unparse(found[0].args)}):\n    return {ast.unparse(found[0].body)}"


class _Renamed(ast.NodeTransformer):
    """Other names for variables, arguments, functions and classes."""

    def __init__(self, names: Mapping[str, str]):
        self._names = names

    def visit_Name(self, node: ast.Name) -> ast.Name:
        node.id = self._names.get(node.id, node.id)
        return node

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.arg = self._names.get(node.arg, node.arg)
        return self.generic_visit(node)

    def _definition(self, node: ast.AST) -> ast.AST:
        node.name = self._names.get(node.name, node.name)
        return self.generic_visit(node)

    visit_FunctionDef = visit_ClassDef = _definition


def renamed(exercise: Exercise, text: Text) -> Text:
    """The same answer with other names for its arguments and variables; as it was, where that is another answer."""
    tree = ast.parse(text.source)
    own = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)} - {"self"}
    own |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names = {name: f"{name}_mine" for name in own - set(exercise.names)}
    other = Text(ast.unparse(_Renamed(names).visit(tree)), text.truth)
    return other if _holds(exercise, other) else text


# --- students ---------------------------------------------------------------------------------------------------------


def works(lesson: str, profiles: Sequence[str], rng: random.Random) -> list[Work]:
    """What students with these profiles hand in."""
    found: list[Work] = []
    for profile in profiles:
        answers = {exercise.id: right(exercise, rng) for exercise in registry.lesson(lesson)}
        match profile:
            case "mistakes":
                answers |= _mistakes(lesson, answers, rng)
            case "unfinished":
                answers = dict(list(answers.items())[: rng.randint(2, len(answers) - 2)])
            case "renamed":
                answers = {e.id: renamed(e, answers[e.id]) for e in registry.lesson(lesson)}
        work = Work(answers, hangs=profile == "hangs", page=profile == "no notebook")
        found.append(found[profiles.index("right")] if profile == "twin" else work)
    return found


def _mistakes(lesson: str, answers: Mapping[str, Text], rng: random.Random) -> dict[str, Text]:
    """Some mistakes, none of which another answer of the notebook would inherit."""
    exercises = registry.lesson(lesson)
    chosen: dict[str, Text] = {}
    for exercise in rng.sample(exercises, len(exercises)):
        others = [text for id, text in {**answers, **chosen}.items() if id != exercise.id]
        if len(chosen) < MISTAKES and not any(set(exercise.names) & text.names for text in others):
            chosen |= {exercise.id: text} if (text := wrong(exercise, rng)) else {}
    return chosen


def profiles(students: int) -> list[str]:
    """One for each."""
    return [SPECIAL[n] if n < len(SPECIAL) else OTHERS[n % len(OTHERS)] for n in range(students)]


def notebook(lesson: str) -> NotebookNode:
    """A lesson's notebook, as students get it."""
    return nbformat.read(path(lesson), as_version=4)


def path(lesson: str) -> Path:
    """Where that is."""
    (found,) = NOTEBOOKS.glob(f"{lesson}_*.ipynb")
    return found


def filled(lesson: str, work: Work, *, brief: bool = False) -> str:
    """The file that is handed in. `brief`: without the cells between the exercises, which draw and compare."""
    if work.page:
        return PAGE
    made = notebook(lesson)
    for cell in made.cells:
        if cell.id.endswith("-answer") and cell.metadata["exercise"] in work.answers:
            cell.source = work.answers[cell.metadata["exercise"]].source
    if brief:
        made.cells = [cell for cell in made.cells if "exercise" in cell.metadata or _imports(cell)]
    if work.hangs:
        made.cells.insert(len(made.cells) // 2, nbformat.v4.new_code_cell(HANGS, id="count-down"))
    return nbformat.writes(made)


def _imports(cell: NotebookNode) -> bool:
    return cell.cell_type == "code" and "\nimport " in f"\n{cell.source}" and "skip-grading" not in _tags(cell)


def _tags(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


# --- files ------------------------------------------------------------------------------------------------------------


def write(out: Path, lessons: Sequence[str], students: int, seed: int = 0, *, brief: bool = False) -> None:
    """A folder per student in OUT/submissions, and beside them what is known. An earlier class there is replaced.

    Raises FileExistsError for a folder that holds something else.
    """
    if out.exists() and any(out.iterdir()) and not (out / "truth.csv").exists():
        raise FileExistsError(f"{out} holds something else than a class: give another folder")
    shutil.rmtree(out / "submissions", ignore_errors=True)
    rng, roles = random.Random(seed), profiles(students)
    ids = [f"student-{n:02}" for n in range(1, students + 1)]
    rng.shuffle(ids)
    truth = {}
    for lesson in lessons:
        for id, work in zip(ids, works(lesson, roles, rng), strict=True):
            file = out / "submissions" / id / path(lesson).name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(filled(lesson, work, brief=brief))
            truth[id, lesson] = work
    _write_truth(out, truth)
    _write_rubric(out, lessons, dict(zip(ids, roles, strict=True)))


def _write_truth(out: Path, works: Mapping[tuple[str, str], Work]) -> None:
    lines = [("submission", "exercise", "truth")]
    for one in discover(out / "submissions").submissions:
        work = works[one.student, one.lesson]
        lines += [(one.id, exercise.id, work.truth(exercise.id)) for exercise in registry.lesson(one.lesson)]
    _write_csv(out / "truth.csv", lines)


def _write_rubric(out: Path, lessons: Sequence[str], roles: Mapping[str, str]) -> None:
    quoted = ", ".join(f'"{lesson}"' for lesson in lessons)
    (out / "rubric.yaml").write_text(
        f"title: An example class\nlessons: [{quoted}]\ndeadline: {DEADLINE.isoformat()}\n"
        "late: {per_day: 10%, at_most: 50%, grace: 15 minutes}\nsubmitted: times.csv\n"
    )
    times = {id: DEADLINE + timedelta(hours=30 if role == "late" else -5) for id, role in sorted(roles.items())}
    _write_csv(out / "times.csv", [("student", "time"), *((id, time.isoformat()) for id, time in times.items())])


def _write_csv(path: Path, lines: Sequence[Sequence[str]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(lines)


# --- compare ----------------------------------------------------------------------------------------------------------


def compare(out: Path, results: Path) -> tuple[Counter, list[str]]:
    """How many verdicts agree with truth.csv, by what is true, and a line for each that does not."""
    found = {(one, exercise): said for one, exercise, said in _verdicts(results)}
    agree, lines = Counter(), []
    with (out / "truth.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            said = found.pop((row["submission"], row["exercise"]), "nothing")
            if said == row["truth"]:
                agree[said if said in ("right", "not done", "unreadable") else "mistakes, by name"] += 1
            else:
                lines.append(f"{row['submission']} {row['exercise']}: {row['truth']!r} is graded as {said!r}")
    lines += [f"{one} {exercise}: graded as {said!r}, and not in truth.csv" for (one, exercise), said in found.items()]
    return agree, lines


def _verdicts(results: Path) -> Iterator[tuple[str, str, str]]:
    """Submission, exercise, and the mistake's name or else the outcome."""
    for line in (results / "results.jsonl").read_text().splitlines():
        graded = json.loads(line)
        for verdict in graded["verdicts"]:
            yield graded["submission"], verdict["exercise"], verdict["mistake"] or verdict["outcome"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--students", type=int, default=12)
    parser.add_argument("--lesson", action="append", choices=registry.lessons(), help="01 and 04 if not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--brief", action="store_true", help="answers and checks alone")
    parser.add_argument("--compare", type=Path, metavar="RESULTS")
    options = parser.parse_args()
    if options.compare is None:
        write(options.out, options.lesson or ["01", "04"], options.students, options.seed, brief=options.brief)
        print(f"{options.students} students in {options.out / 'submissions'}; {options.out / 'truth.csv'} knows them")
        return 0
    agree, lines = compare(options.out, options.compare)
    for line in lines:
        print(line)
    listed = ", ".join(f"{n} {what}" for what, n in agree.most_common())
    print(f"{agree.total()} of {agree.total() + len(lines)} verdicts agree with what is known: {listed}")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
