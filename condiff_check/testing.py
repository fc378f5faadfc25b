"""Exercises in which the learner writes the test: it must spare what is right and catch what is wrong."""

from collections.abc import Callable, Sequence

from torch import Generator

from .exercise import Answer, Exercise, Fact, Mistake, Wrong
from .guard import Failed, NotDone


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
) -> Exercise:
    """Graded by what the test does: each of the `right` functions must pass it, at least `needed` of the `wrong` ones,
    given with a name each, must make it raise. Every function is tried three times."""

    def spares(answer: Answer, generator: Generator) -> None:
        for function in right:
            if not all(passes(answer, function) for _ in range(3)):
                raise Wrong("your test raises on a correct function: is its own idea of the right value wrong?")

    def catches(answer: Answer, generator: Generator) -> None:
        survivors = [title for title, function in wrong if all(passes(answer, function) for _ in range(3))]
        if len(wrong) - len(survivors) < needed:
            raise Wrong(
                f"survived: {len(survivors)} of {len(wrong)} wrong functions (at most {len(wrong) - needed} may): "
                + "; ".join(survivors)
            )

    def probe(answer: Answer, generator: Generator) -> object:
        return [passes(answer, function) for function in (*right, *(function for _, function in wrong))]

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
        probe=probe,
        universal=False,
        kind="test",
        points=2,
    )


def passes(answer: Answer, function: Callable) -> bool:
    """Whether the learner's test lets this function pass; any error of the test counts as an alarm."""
    try:
        answer(function)
    except (NotDone, Failed) as error:
        if isinstance(error, NotDone):
            raise
        return False
    return True
