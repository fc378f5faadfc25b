"""check(): try an answer against every fact, name the mistake, and lend the reference to whoever is not there yet."""

import os
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

from torch import Generator

from .diagnose import diagnose, readings, relate, right_readings
from .exercise import Answer, Exercise, Fact, Wrong
from .guard import Failed, Guard, NotDone, OutOfTime
from .invariants import KIND, first_facts, last_facts
from .registry import find
from .report import NOT_DONE, RIGHT, WRONG, Report, Result

EXPLAINING = 5.0  # seconds that each way to explain a wrong answer may run its code
Guarded = Callable[[float], Guard]
LENT = "this is the reference, lent to you by the check before: run the cell with your own answer, then check again."


def check(id: str, *objects: object, hint: int = 1, seed: int | None = None) -> object:
    """Check an answer, show what holds and what does not, and return what the cells below should use: the answer itself
    if it is right, else the reference.

    `hint` goes from 1 (the property) over 2 (where to look) to 3 (the answer). `seed` repeats the inputs of an earlier
    check; without it they are new each time. Raises KeyError for an unknown exercise, TypeError for a wrong number of
    objects and ValueError for another hint; under nbgrader AssertionError unless the answer is right.
    """
    exercise = find(id)
    if len(objects) != len(exercise.names):
        raise TypeError(
            f'exercise {id} is checked by check("{id}", {", ".join(exercise.names)}): '
            f"you passed {len(objects)}, it takes {len(exercise.names)}"
        )
    if hint not in (1, 2, 3):
        raise ValueError(f"hint is 1, 2 or 3, not {hint!r}")
    seed = random.SystemRandom().randrange(100_000) if seed is None else seed
    if any(mine is ours for mine, ours in zip(objects, exercise.references, strict=True)):
        report = Report(exercise, NOT_DONE, (), hint, seed, diagnosis=LENT)
    else:
        report = judge(exercise, objects, seed=seed, hint=hint)
        with suppress(Exception):  # an answer too odd to be explained is still refused, and the notebook lives on
            report = explain(report, objects)
    _show(report)
    if report.status != RIGHT and "NBGRADER_EXECUTION" in os.environ:
        raise AssertionError(str(report))
    chosen = objects if report.status == RIGHT else exercise.references
    return chosen[0] if len(chosen) == 1 else tuple(chosen)


def examine(exercise: Exercise, objects: Sequence[object], *, seed: int, hint: int = 1) -> Report:
    """The whole report on an answer; nothing is shown."""
    return explain(judge(exercise, objects, seed=seed, hint=hint), objects)


def judge(
    exercise: Exercise, objects: Sequence[object], *, seed: int, hint: int = 1, guarded: Guarded = Guard
) -> Report:
    """Which facts hold. `guarded(seconds)` makes what calls the answer, which may be in another process."""
    guard = guarded(exercise.seconds)
    answer = Answer(dict(zip(exercise.names, objects, strict=True)), guard)
    results = _try_all((*first_facts(exercise), *exercise.facts, *last_facts(exercise)), answer, seed)
    results = _order(exercise, results)
    status = _status(results)
    return Report(exercise, status, results, hint, seed, printed=_printed(guard))


def _try_all(facts: Sequence[Fact], answer: Answer, seed: int) -> tuple[Result, ...]:
    results: list[Result] = []
    for number, fact in enumerate(facts):
        answer.reseed(seed % 1000)
        result = _try(fact, answer, Generator().manual_seed(seed * 100 + number))
        if result.state == "raises" and any(r.state == "raises" for r in results):
            result = Result(fact, "not reached")  # one error is enough to read
        results.append(result)
        if fact.name == KIND and result.state != "holds":  # nothing sensible can be said of what is of the wrong kind
            return (*results, *(Result(other, "not reached") for other in facts[number + 1 :]))
    return tuple(results)


def _try(fact: Fact, answer: Answer, generator: Generator) -> Result:
    try:
        fact.test(answer, generator)
    except Wrong as wrong:
        return Result(fact, "fails", str(wrong), wrong.expected)
    except NotDone:
        return Result(fact, "not done")
    except (Failed, OutOfTime) as error:
        return Result(fact, "raises", str(error))
    except Exception as error:  # our own code met a result that it could not handle, say a string for a tensor
        return Result(fact, "fails", f"what came back cannot be used: {type(error).__name__}: {error}")
    return Result(fact, "holds")


def _order(exercise: Exercise, results: Sequence[Result]) -> tuple[Result, ...]:
    """Where several functions are asked for and one got the wrong number of arguments, ask about their order."""
    question = f"\n  are they in the order {', '.join(exercise.names)}?"
    return tuple(
        replace(result, message=result.message + question)
        if len(exercise.names) > 1 and "positional argument" in result.message
        else result
        for result in results
    )


def _status(results: Sequence[Result]) -> str:
    states = {result.state for result in results}
    if "not done" in states:
        return NOT_DONE
    return RIGHT if states == {"holds"} else WRONG


def explain(report: Report, objects: Sequence[object], guarded: Guarded = Guard) -> Report:
    """Add, for a wrong answer, what it computes, the mistake that it is, or else how it relates to the right one."""
    exercise, seed = report.exercise, report.seed
    if report.status != WRONG or (report.first and "needs more than" in report.first.message):
        return report

    def answer() -> Answer:
        return Answer(dict(zip(exercise.names, objects, strict=True)), guarded(EXPLAINING))

    seen = readings(exercise, answer(), seed)
    right = {reading.formula.function: str(reading) for reading in right_readings(exercise, seed)}
    off = [one for one in seen if str(one) != right.get(one.formula.function)]
    mistake = diagnose(exercise, answer(), seed)
    related = relate(exercise, answer(), seed) if mistake is None else None
    return replace(
        report,
        formulas=tuple(str(reading) for reading in off if reading.told),
        diagnosis=mistake.diagnosis if mistake else None,
        relation=related,
    )


def _printed(guard: Guard) -> str:
    if guard.printed is None or not guard.printed.total:
        return ""
    lines = guard.printed.text.splitlines()
    more = guard.printed.total - sum(len(line) + 1 for line in lines[:3])
    return "\n".join([*(line[:100] for line in lines[:3]), *([f"... and {more} more characters"] if more > 0 else [])])


def _show(report: Report) -> None:
    """As HTML where there is a notebook, as text elsewhere."""
    try:
        from IPython import get_ipython
        from IPython.display import display
    except ImportError:
        print(report)
        return
    if get_ipython() is None:
        print(report)
    else:
        display(report)
