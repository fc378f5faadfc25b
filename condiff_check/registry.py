"""All exercises by their ids; a lesson's module is imported when one of its exercises is asked for."""

from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from .exercise import Exercise


def lessons() -> list[str]:
    """The numbers of the lessons that have exercises: "00", "01", ..."""
    modules = (module.name for module in iter_modules([str(Path(__file__).parent)]))
    return sorted(name.removeprefix("lesson") for name in modules if name.removeprefix("lesson").isdigit())


@cache
def lesson(number: str) -> tuple[Exercise, ...]:
    """The exercises of a lesson, in order. Raises KeyError for a lesson that has none."""
    if number not in lessons():
        raise KeyError(f"there is no lesson {number!r} with exercises: there are {', '.join(lessons())}")
    return import_module(f"{__package__}.lesson{number}").EXERCISES


def exercises() -> list[Exercise]:
    """All of them, in order."""
    return [exercise for number in lessons() for exercise in lesson(number)]


def find(id: str) -> Exercise:
    """The exercise with this id, such as "01.2". Raises KeyError, naming those there are."""
    number = id.partition(".")[0]
    known = {exercise.id: exercise for exercise in (lesson(number) if number in lessons() else exercises())}
    if id not in known:
        raise KeyError(f"there is no exercise {id!r}: there are {', '.join(known)}")
    return known[id]
