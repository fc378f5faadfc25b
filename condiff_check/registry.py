"""All exercises by their ids; a lesson's module is imported when one of its exercises is asked for."""

from functools import cache
from importlib import import_module

from .exercise import Exercise

LESSONS = ("01",)


@cache
def lesson(number: str) -> tuple[Exercise, ...]:
    """The exercises of a lesson, in order. Raises KeyError for a lesson that does not exist."""
    if number not in LESSONS:
        raise KeyError(f"there is no lesson {number!r}: lessons are {', '.join(LESSONS)}")
    return import_module(f"condiff_check.lesson{number}").EXERCISES


def find(id: str) -> Exercise:
    """The exercise with this id, such as "01.2". Raises KeyError, naming those there are."""
    known = {exercise.id: exercise for number in LESSONS for exercise in lesson(number)}
    if id not in known:
        raise KeyError(f"there is no exercise {id!r}: there are {', '.join(known)}")
    return known[id]
