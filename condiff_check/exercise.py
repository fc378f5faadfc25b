"""What an exercise is: a reference, facts that every right answer satisfies, and the mistakes that people make."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Generator, Tensor

from .agent.watching import Columns
from .compare import close, gap, oddity, plain
from .guard import Failed, Guard
from .xray import Formula

KINDS = ("function", "module", "sampler", "training", "value", "test")


class Wrong(Exception):
    """What a fact raises: in the learner's words what does not hold. `expected` is shown with the last hint only."""

    def __init__(self, message: str, *, expected: str | None = None):
        super().__init__(message)
        self.expected = expected


def need(got: Tensor, right: Tensor, message: str, *, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Raise Wrong with this message, and the gap, unless a result agrees with what is right."""
    if not close(plain(got), plain(right), rtol=rtol, atol=atol):
        if not isinstance(got, Tensor) or got.shape != right.shape:
            raise Wrong(f"{message}; {oddity(got, right)}")
        text, due = gap(got.detach(), right)
        raise Wrong(f"{message}; {text}", expected=f"{due} there")


class Answer:
    """The learner's objects, called under guard. Facts know an answer through these methods and nothing else.

    Calls raise guard.Failed where the learner's own code raises, guard.NotDone for an answer that is still to be
    written, and guard.OutOfTime where the time allowed is used up.
    """

    def __init__(self, objects: Mapping[str, object], guard: Guard):
        self._objects, self._guard = objects, guard

    def call(self, name: str, *args: object) -> object:
        """The result of the learner's function, or an instance of the learner's class."""
        thing = self._objects[name]
        if not callable(thing):
            quotes = ", without quotes" if isinstance(thing, str) else ""
            raise Failed(f"{name} is of type {type(thing).__name__}: hand over the function itself{quotes}, uncalled")
        return self._guard(thing, *args)

    def ask(self, thing: object, method: str, *args: object) -> object:
        """The result of a method of something that `call` returned."""
        return self._guard(getattr(thing, method), *args)

    def __call__(self, *args: object) -> object:
        """Call the first of the learner's objects."""
        return self.call(next(iter(self._objects)), *args)

    def watched(self, columns: Columns, *args: object) -> object:
        """Call the first of the learner's objects, and note in `columns` how large a matrix it makes."""
        return self._guard.watched(columns, next(iter(self._objects.values())), *args)

    def reseed(self, noise: int) -> None:
        """From now on each call starts from this global random state: a right answer does not mind."""
        self._guard.noise = noise


@dataclass(frozen=True)
class Fact:
    """A property of every right answer. The value it compares with does not come from the code under test.

    name: the property, as a line that gets a mark. test(answer, generator) raises Wrong where it does not hold.
    hint: what to think about, without the answer.
    """

    name: str
    test: Callable[[Answer, Generator], None]
    hint: str = ""


@dataclass(frozen=True)
class Mistake:
    """A wrong answer that people give, and what to tell them. `answers` are in the order of Exercise.names."""

    name: str
    diagnosis: str
    answers: tuple[Callable, ...]


Inputs = Mapping[str, Mapping[str, object]]  # function: its arguments by name, in the order of its signature


@dataclass(frozen=True)
class Exercise:
    """One exercise, complete: what check() runs, what the notebooks show, what the kill matrix tests.

    inputs(generator) draws fresh arguments, {function: {argument: value}}; `batch` names the arguments with a batch
    axis, for the fact that examples do not see one another. `changes` names arguments that the answer is meant to
    change. `hints`: where to look, then the answer in words. `hides`: what condiff_ref must not lend while grading.
    A `probe` returns what a wrong answer is recognised by, where calling it on `inputs` does not show enough; with
    `by_probe` it is recognised by that alone, as is due where two answers may rightly draw in another order. `graph`:
    the result is to carry one. `without` names facts of `invariants` that do not apply; `universal` is False where none
    does. `free`: so many answers are right that a wrong one is not told how it relates to the reference.
    """

    id: str
    names: tuple[str, ...]
    references: tuple[Callable, ...]
    inputs: Callable[[Generator], Inputs]
    facts: tuple[Fact, ...]
    mistakes: tuple[Mistake, ...]
    alternatives: tuple[tuple[Callable, ...], ...]
    hints: tuple[str, str]
    batch: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    formulas: tuple[Formula, ...] = ()
    probe: Callable[[Answer, Generator], object] | None = None
    by_probe: bool = False
    universal: bool = True
    free: bool = False
    without: tuple[str, ...] = ()
    graph: bool = False
    kind: str = "function"
    points: int = 1
    hides: tuple[str, ...] = ()
    seconds: float = field(default=20.0)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"{self.id}: kind is one of {', '.join(KINDS)}, not {self.kind!r}")
        for answers in (self.references, *self.alternatives, *(m.answers for m in self.mistakes)):
            if len(answers) != len(self.names):
                raise ValueError(f"{self.id} defines {', '.join(self.names)}: {len(answers)} objects do not match")
