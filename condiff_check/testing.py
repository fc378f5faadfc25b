"""Exercises in which the learner writes the test: it must spare what is right and catch what is wrong."""

from collections.abc import Callable, Sequence

import torch
from torch import Generator

from .exercise import Answer, Exercise, Fact, Mistake, Wrong
from .guard import Failed

STRICT = "it objects to a right function: is its own formula wrong, is it too strict (allclose, not ==), or broken?"


def test_exercise(
    id: str,
    name: str,
    reference: Callable,
    right: Sequence[Callable],
    wrong: Sequence[tuple[str, Callable]],
    *,
    needed: int,
    mistakes: Sequence[Mistake],
    alternatives: Sequence[Callable],
    hints: tuple[str, str],
    hides: tuple[str, ...],
) -> Exercise:
    """Graded by what the test does: each of the `right` functions must pass it, at least `needed` of the `wrong` ones,
    given with a name each, must make it raise. Every function is tried three times."""

    def spares(answer: Answer, generator: Generator) -> None:
        for noise in range(3):
            answer.reseed(noise)
            for function in right:
                said = answer(_veiled(function))  # its errors go through: the report shows the line that objects
                if said is not None:
                    raise Wrong(f"your test returned {said!r}: it says no by raising (assert ...), and returns nothing")

    def catches(answer: Answer, generator: Generator) -> None:
        tried = [("", function) for function in right] + list(wrong)
        survivors = []
        for i in torch.randperm(len(tried), generator=generator).tolist():  # so that counting its calls helps no test
            title, function = tried[i]
            caught = any(verdict(answer, _veiled(function), n) for n in range(3 if title else 1))
            if caught and not title:
                raise Wrong(STRICT)
            survivors += [] if caught or not title else [title]
        survivors.sort(key=[title for title, _ in wrong].index)
        if len(wrong) - len(survivors) < needed:
            raise Wrong(
                f"survived: {len(survivors)} of {len(wrong)} wrong functions (at most {len(wrong) - needed} may): "
                + "; ".join(survivors)
            )

    def probe(answer: Answer, generator: Generator) -> object:
        return [verdict(answer, function, 0) for function in (*right, *(function for _, function in wrong))]

    return Exercise(
        id=id,
        names=(name,),
        references=(reference,),
        inputs=lambda generator: {},
        facts=(
            Fact(
                "lets correct functions pass", spares, "what must hold for every input, whatever the code looks like?"
            ),
            Fact(
                f"catches at least {needed} of {len(wrong)} wrong functions",
                catches,
                "each survivor names what you do not look at yet",
            ),
        ),
        mistakes=tuple(mistakes),
        alternatives=tuple((alternative,) for alternative in alternatives),
        hints=hints,
        hides=hides,
        probe=probe,
        universal=False,
        kind="test",
        points=2,
    )


def _veiled(function: Callable) -> Callable:
    """One that is new each time, and nameless: what a test says of it comes from what it does."""
    return lambda *args, **kwargs: function(*args, **kwargs)


def verdict(answer: Answer, function: Callable, noise: int) -> str:
    """What the test says of a function: nothing (""), "raises", or the type of what it returns."""
    answer.reseed(noise)
    try:
        said = answer(function)
    except Failed:
        return "raises"
    return "" if said is None else type(said).__name__
