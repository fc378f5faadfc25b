"""Which mistake is it? Compare how a wrong answer behaves with how each mistake on file behaves on the same inputs."""

import re
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Generator, Tensor

from .compare import close, copied, plain
from .exercise import Answer, Exercise, Mistake
from .guard import Failed, Guard, NotDone, OutOfTime
from .invariants import calls
from .relations import relation
from .xray import Reading, read

DRAWS = 3


def diagnose(exercise: Exercise, answer: Answer, seed: int) -> Mistake | None:
    """The one mistake on file that behaves as the answer does; None where there is none, or more than one."""
    behaviour = trace(exercise, answer, seed)
    if _alike(behaviour, _right(exercise, seed)):
        return None  # what is wrong does not show in the trace, so neither would a mistake
    same = [mistake for mistake, known in _known(exercise, seed) if _alike(behaviour, known)]
    return same[0] if len(same) == 1 else None


@lru_cache(maxsize=32)
def _right(exercise: Exercise, seed: int) -> list[object]:
    return trace(exercise, answer_of(exercise, exercise.references), seed)


@lru_cache(maxsize=32)  # the kill matrix asks for each many times
def _known(exercise: Exercise, seed: int) -> list[tuple[Mistake, list[object]]]:
    return [(mistake, trace(exercise, answer_of(exercise, mistake.answers), seed)) for mistake in exercise.mistakes]


def _alike(one: object, two: object) -> bool:
    return close(one, two, rtol=1e-5, atol=1e-6)  # part of what is compared was computed in float32


def answer_of(exercise: Exercise, objects: Sequence[object]) -> Answer:
    """One of the course's own answers, right or wrong, as the facts see a learner's."""
    return Answer(dict(zip(exercise.names, objects, strict=True)), Guard(exercise.seconds))


def trace(exercise: Exercise, answer: Answer, seed: int) -> list[object]:
    """All that shows of an answer: results, errors, changed arguments, alone and in a batch, in both precisions."""
    generator = Generator().manual_seed(seed)
    seen: list[object] = []
    for draw in range(DRAWS if exercise.universal and not exercise.by_probe else 0):
        answer.reseed(seed % 1000 + draw)
        dtype = torch.float32 if draw == 1 else None
        for name, args in calls(exercise, generator):
            seen.append(_observe(answer, name, copied(args, dtype)))
            batched = [key for key in args if key in exercise.batch]
            if batched and draw == 0:
                one = {k: (v[:1] if k in batched else v) for k, v in args.items()}
                seen.append(_observe(answer, name, copied(one)))
    if exercise.probe is not None:
        try:
            seen.append(plain(exercise.probe(answer, generator)))
        except Exception as error:  # the learner's, or ours at a result that cannot be used
            seen.append(_error(error))
    return seen


def _observe(answer: Answer, name: str, args: dict[str, object]) -> object:
    try:
        out = answer.call(name, *args.values())
    except (Failed, NotDone, OutOfTime) as error:
        return _error(error)
    dtype = str(out.dtype) if isinstance(out, Tensor) else type(out).__name__
    graph = isinstance(out, Tensor) and out.requires_grad
    return dict(out=plain(out), dtype=dtype, graph=graph, after=[_state(value) for value in args.values()])


def _state(value: object) -> object:
    if isinstance(value, Generator):
        return None
    return [plain(value), isinstance(value, Tensor) and value.requires_grad]


def _error(error: Exception) -> str:
    """The error without the line that led to it; what people word themselves counts by its type alone, and an index
    that was drawn at random without its number."""
    text = str(error).partition("\n")[0]
    kind = text.partition(":")[0]
    if kind in ("ValueError", "AssertionError"):
        return kind
    return re.sub(r"\d+", "#", text) if kind == "IndexError" else text


@lru_cache(maxsize=32)
def right_readings(exercise: Exercise, seed: int) -> tuple[Reading, ...]:
    """The x-ray of the reference."""
    return tuple(readings(exercise, answer_of(exercise, exercise.references), seed))


def readings(exercise: Exercise, answer: Answer, seed: int) -> list[Reading]:
    """The x-ray of each formula of the exercise that the answer lets itself be asked for."""
    found = []
    for formula in exercise.formulas:
        args = exercise.inputs(Generator().manual_seed(seed))[formula.function]

        def call(*values: object, name: str = formula.function) -> Tensor:
            return answer.call(name, *values)

        try:
            found.append(read(formula, call, tuple(args), Generator().manual_seed(seed)))
        except (Failed, NotDone, OutOfTime, RuntimeError, AttributeError):
            continue  # the facts have said what is wrong with it
    return found


def relate(exercise: Exercise, answer: Answer, seed: int) -> str | None:
    """How the answer's results relate to the right ones, where a simple relation holds on all draws."""
    if not exercise.universal or exercise.free:
        return None
    generator = Generator().manual_seed(seed)
    draws: dict[str, list] = {name: [] for name in exercise.names}
    for _ in range(DRAWS):
        for name, args in calls(exercise, generator):
            try:
                got = answer.call(name, *copied(args).values())
            except (Failed, NotDone, OutOfTime):
                return None
            right = exercise.references[exercise.names.index(name)](*copied(args).values())
            got, right = (torch.as_tensor(x) if isinstance(x, int | float) else x for x in (got, right))
            if isinstance(got, Tensor) and isinstance(right, Tensor) and not close(plain(got), plain(right)):
                draws[name].append((args, got, right))
    for name, found in draws.items():
        sentence = relation(found) if len(found) == DRAWS else None
        if sentence:
            return f"{name}: {sentence}" if len(exercise.names) > 1 else sentence
    return None
