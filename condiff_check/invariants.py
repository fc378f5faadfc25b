"""What holds for every exercise: right kind of result, arguments untouched, repeatable, examples apart, dtype kept.

These facts are made from the exercise's own `inputs`, and need no knowledge of what it is about.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Generator, Tensor, nn

from .compare import close, copied, gap, oddity, plain
from .exercise import Answer, Exercise, Fact, Wrong

KIND = "returns what it should: type, shape, finite numbers"
UNTOUCHED = "leaves its arguments as they were"

Test = Callable[[Answer, Generator], None]


def first_facts(exercise: Exercise) -> tuple[Fact, ...]:
    """What to look at before anything else: does it return the right kind of thing at all?"""
    if not exercise.universal:
        return ()
    return (Fact(KIND, _kind(exercise), "what does the docstring say of shapes and of the result?"),)


def last_facts(exercise: Exercise) -> tuple[Fact, ...]:
    """What an answer with right values can still get wrong."""
    if not exercise.universal:
        return ()
    facts = [
        Fact(UNTOUCHED, _untouched(exercise), "operations that end in _ and += work in place"),
        Fact(
            "gives the same result when called again",
            _repeatable(exercise),
            "randomness comes from the generator alone",
        ),
        Fact("keeps the dtype of its inputs", _dtype(exercise), "new tensors take dtype and device from the inputs"),
    ]
    if exercise.batch:
        hint = "each example has its own entry: reshape (b,) to (b, 1, ..., 1), and mind the axes of sums"
        facts.append(Fact("treats every example on its own", _apart(exercise), hint))
    if not exercise.graph:
        facts.append(
            Fact(
                "leaves no graph behind",
                _clean(exercise),
                "work on a copy of x (detach, clone), and return a plain value (detach, no_grad)",
            )
        )
    return tuple(fact for fact in facts if fact.name not in exercise.without)


def calls(exercise: Exercise, generator: Generator) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Each function of the exercise with fresh arguments."""
    yield from exercise.inputs(generator).items()


def _prefix(exercise: Exercise, name: str) -> str:
    return f"{name}: " if len(exercise.names) > 1 else ""


def _kind(exercise: Exercise) -> Test:
    def test(answer: Answer, generator: Generator) -> None:
        for name, args in calls(exercise, generator):
            reference = exercise.references[exercise.names.index(name)]
            odd = oddity(answer.call(name, *copied(args).values()), reference(*copied(args).values()))
            if odd:
                raise Wrong(_prefix(exercise, name) + odd)

    return test


def _untouched(exercise: Exercise) -> Test:
    def test(answer: Answer, generator: Generator) -> None:
        for name, args in calls(exercise, generator):
            given = copied(args)
            answer.call(name, *given.values())
            for key, value in args.items():
                if key in exercise.changes or isinstance(value, Generator):
                    continue
                if not close(plain(given[key]), plain(value), rtol=0, atol=0):
                    raise Wrong(f"{_prefix(exercise, name)}{_change(key, value, given[key])}")

    return test


def _change(key: str, before: object, after: object) -> str:
    if isinstance(before, nn.Module):
        if before.training != after.training:
            was, now = ("train", "eval") if before.training else ("eval", "train")
            return f"{key} came in {was}() mode and is left in {now}() mode: put it back"
        return f"you changed the module {key}"
    return f"you changed {key} in place: the caller still needs it"


def _repeatable(exercise: Exercise) -> Test:
    def test(answer: Answer, generator: Generator) -> None:
        for name, args in calls(exercise, generator):
            answer.reseed(1)
            one = plain(answer.call(name, *copied(args).values()))
            answer.reseed(2)
            two = plain(answer.call(name, *copied(args).values()))
            if not close(one, two):
                drawn = any(isinstance(value, Generator) for value in args.values())
                what = "equal arguments and generators in the same state" if drawn else "equal arguments"
                raise Wrong(f"{_prefix(exercise, name)}two calls with {what} give different results")

    return test


def _dtype(exercise: Exercise) -> Test:
    def test(answer: Answer, generator: Generator) -> None:
        for name, args in calls(exercise, generator):
            reference = exercise.references[exercise.names.index(name)]
            for dtype in (torch.float32, torch.float64):
                given = copied(args, dtype)
                due = _dtypes(reference(*copied(given).values()))
                got = _dtypes(answer.call(name, *copied(given).values()))
                if got != due and len(got) == len(due):  # a number may stand for a tensor without axes
                    bad = next(pair for pair in zip(got, due, strict=True) if pair[0] != pair[1])
                    raise Wrong(f"{_prefix(exercise, name)}from {dtype} inputs came {bad[0]} where {bad[1]} is due")

    return test


def _dtypes(value: object) -> list[torch.dtype]:
    if isinstance(value, Tensor):
        return [value.dtype]
    return [dtype for item in value for dtype in _dtypes(item)] if isinstance(value, tuple | list) else []


def _apart(exercise: Exercise) -> Test:
    def test(answer: Answer, generator: Generator) -> None:
        for name, args in calls(exercise, generator):
            batched = [key for key in args if key in exercise.batch]
            if not batched or any(isinstance(value, Generator) for value in args.values()):
                continue
            whole = answer.call(name, *copied(args).values())
            for i in range(len(args[batched[0]])):
                one = {k: (v[i : i + 1] if k in batched else v) for k, v in args.items()}
                alone = answer.call(name, *copied(one).values())
                if alone.shape != whole[i : i + 1].shape or not close(plain(alone), plain(whole[i : i + 1]), rtol=1e-5):
                    raise Wrong(f"{_prefix(exercise, name)}{_mates(i, alone, whole)}")

    return test


def _mates(i: int, alone: Tensor, whole: Tensor) -> str:
    text = f"example {i} comes out otherwise alone than within a batch of {len(whole)}"
    return f"{text}; {gap(alone, whole[i : i + 1])[0]}" if alone.shape == whole[i : i + 1].shape else text


def _clean(exercise: Exercise) -> Test:
    def test(answer: Answer, generator: Generator) -> None:
        for name, args in calls(exercise, generator):
            given = copied(args)
            out = answer.call(name, *given.values())
            if any(tensor.requires_grad for tensor in _tensors(out)):
                raise Wrong(f"{_prefix(exercise, name)}the result still carries autograd's graph")
            for key, value in args.items():
                if isinstance(value, Tensor) and given[key].requires_grad != value.requires_grad:
                    raise Wrong(f"{_prefix(exercise, name)}{key} came without requires_grad and is left with it")
                module = given[key] if isinstance(value, nn.Module) and key not in exercise.changes else None
                if module and any(p.grad is not None for p in module.parameters()):
                    raise Wrong(f"{_prefix(exercise, name)}gradients are left in the parameters of {key}")

    return test


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
