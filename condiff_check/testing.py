"""Exercises in which the learner writes the test: it must spare what is right and catch what is wrong."""

from collections.abc import Callable, Sequence

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
                said = answer(function)  # its errors go through, so that the report shows the line that objects
                if said is not None:
                    raise Wrong(f"your test returned {said!r}: it says no by raising (assert ...), and returns nothing")

    def catches(answer: Answer, generator: Generator) -> None:
        survivors = [title for title, function in wrong if not any(verdict(answer, function, n) for n in range(3))]
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


def verdict(answer: Answer, function: Callable, noise: int) -> str:
    """What the test says of a function: nothing (""), "raises", or the type of what it returns."""
    answer.reseed(noise)
    try:
        said = answer(function)
    except Failed:
        return "raises"
    return "" if said is None else type(said).__name__
