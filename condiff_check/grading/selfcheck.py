"""Is the grader in order? Answers that are known are graded like submissions, before a batch and after it."""

import ast
import hashlib
import importlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator
from functools import cache

from ..exercise import Exercise
from ..registry import lesson as exercises_of
from .batch import Engine, Task
from .results import Graded

STUDENT = "the grader's own check"
EMPTY = "def {name}(*args, **kwargs):\n    raise NotImplementedError"
NOTHING = "def {name}(*args, **kwargs):\n    return None"
ARGUMENT = "def {name}(*args, **kwargs):\n    return args[0] if args else None"
REFUSES = "def {name}(*args, **kwargs):\n    raise AssertionError('always')"
OFF = "{name} = slightly_off({name})"
SLIGHTLY_OFF = '''
import torch


def slightly_off(thing):
    """A function whose numbers are one part in a hundred too large; a class whose methods return nothing."""
    if isinstance(thing, type):
        methods = [name for name, value in vars(thing).items() if callable(value) and name != "__init__"]
        return type(thing.__name__, (thing,), {name: lambda *args, **kwargs: None for name in methods})

    def changed(value):
        if isinstance(value, torch.Tensor):
            return value * 1.01 + 0.01 if value.is_floating_point() else value + 1
        if isinstance(value, (bool, str)):
            return not value
        if isinstance(value, (int, float)):
            return value * 1.01 + 1
        if isinstance(value, dict):
            return {key: changed(each) for key, each in value.items()}
        if isinstance(value, (tuple, list)):
            return tuple(changed(each) for each in value)
        return slightly_off(value) if callable(value) else None

    return lambda *args, **kwargs: changed(thing(*args, **kwargs))
'''


def check_grader(engine: Engine, lessons: Iterable[str], only: tuple[str, ...] | None = None) -> list[str]:
    """What is wrong with the grader: a sentence for each known answer that it does not judge as it must."""
    expected = {}
    known = {}
    for lesson in lessons:
        ids = [exercise.id for exercise in exercises_of(lesson) if only is None or exercise.id in only]
        for name, data, fits in answers(lesson):
            id = f"lesson {lesson}, {name}"
            task = Task(id, STUDENT, lesson, name, hashlib.sha256(data).hexdigest(), tuple(ids))
            known[id], expected[id] = (task, data), fits
    problems = []
    for graded in engine.run([task for task, _ in known.values()], lambda task: known[task.submission][1]):
        problems += _problems(graded, expected[graded.submission])
    return sorted(problems)


def _problems(graded: Graded, fits: Callable[[str], bool]) -> Iterator[str]:
    if graded.status != "graded":
        yield f"{graded.submission}: {graded.status}; {'; '.join(graded.notes) or graded.verdicts[0].reason}"
        return
    for verdict in graded.verdicts:
        if not fits(verdict.outcome):
            yield f"{graded.submission}: exercise {verdict.exercise} came out as {verdict.outcome!r}; {verdict.reason}"


def answers(lesson: str) -> Iterator[tuple[str, bytes, Callable[[str], bool]]]:
    """(name, notebook, which outcomes are as they must be): the reference, the empty template, three wrong ones."""
    exercises = exercises_of(lesson)
    references = [_reference(exercise) for exercise in exercises]
    yield "reference answers", notebook(references), lambda outcome: outcome == "right"
    yield "empty answers", notebook(_each(exercises, EMPTY)), lambda outcome: outcome in ("not done", "missing")
    off = [SLIGHTLY_OFF, *references, *_each(exercises, OFF)]
    for name, cells in (
        ("answers that return nothing", _each(exercises, NOTHING)),
        ("answers that return their argument", _each(exercises, ARGUMENT)),
        ("answers that are slightly off", off),
    ):
        yield name, notebook(cells), lambda outcome: outcome not in ("right", "grader error")


def notebook(cells: Iterable[str]) -> bytes:
    """A notebook of code cells."""
    parts = [
        dict(cell_type="code", id=f"cell-{n}", metadata={}, source=source, outputs=[], execution_count=None)
        for n, source in enumerate(cells, 1)
    ]
    return json.dumps(dict(nbformat=4, nbformat_minor=5, metadata={}, cells=parts)).encode()


def _each(exercises: Iterable[Exercise], pattern: str) -> list[str]:
    """A cell per exercise. For a test that the learner writes, to be slightly off is to refuse everything."""
    return [
        "\n\n\n".join(
            (REFUSES if exercise.kind == "test" and pattern is OFF else pattern).format(name=name)
            for name in exercise.names
        )
        for exercise in exercises
    ]


# --- the source of the reference answers, with all that it stands on --------------------------------------------------


def _reference(exercise: Exercise) -> str:
    parts: dict[tuple[str, str], str] = {}
    for name, reference in zip(exercise.names, exercise.references, strict=True):
        reference = inspect.unwrap(reference)
        _collect(reference.__module__, reference.__name__, parts)
        if reference.__name__ != name:
            parts["", name] = f"{name} = {reference.__name__}"
    return "\n\n".join(parts.values())


def _collect(module: str, name: str, parts: dict[tuple[str, str], str], alias: str | None = None) -> None:
    """Put the definition of a module's name into `parts`, after all that it names itself."""
    if (module, name) in parts or (node := _bindings(module)[0].get(name)) is None:
        return
    if isinstance(node, ast.ImportFrom) and node.level:
        origin = importlib.util.resolve_name("." * node.level + (node.module or ""), module.rpartition(".")[0])
        (found,) = [each for each in node.names if (each.asname or each.name) == name]
        _collect(origin, found.name, parts)
        if found.asname:
            parts[module, name] = f"{name} = {found.name}"
        return
    if isinstance(node, ast.Import | ast.ImportFrom):
        kept = [each for each in node.names if (each.asname or each.name.partition(".")[0]) == name]
        parts[module, name] = ast.unparse(type(node)(**{**vars(node), "names": kept}))
        return
    parts[module, name] = ""  # its place, should it name itself
    for each in ast.walk(node):
        if isinstance(each, ast.Name):
            _collect(module, each.id, parts)
    del parts[module, name]
    lines = _bindings(module)[1]
    first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))])
    parts[module, name] = "\n".join(lines[first - 1 : node.end_lineno])


@cache
def _bindings(module: str) -> tuple[dict[str, ast.stmt], list[str]]:
    """What each name at the top of a module is bound by, and the module's lines."""
    source = inspect.getsource(importlib.import_module(module))
    found: dict[str, ast.stmt] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {each.asname or each.name.partition(".")[0]: node for each in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {each.id: node for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)}
    return found, source.splitlines()
