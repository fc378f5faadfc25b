"""Are two results the same? Copies of arguments, results as plain data, and what is odd about one at first sight."""

import copy
import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Generator, Tensor, nn

PLAIN = (Tensor, Generator, bool, int, float, str, type(None))


def copied(args: Mapping[str, object], dtype: torch.dtype | None = None) -> dict[str, object]:
    """The arguments again, sharing nothing with the first; a model and its optimizer stay together.

    With `dtype` floating-point tensors and modules are converted to it.
    """
    memo: dict[int, object] = {}
    for value in args.values():
        if type(value) is Generator:  # deepcopy cannot
            memo[id(value)] = Generator(value.device).set_state(value.get_state())
    if _are_plain(args.values()):  # the same, in less time
        new = {n: value.clone() if type(value) is Tensor else memo.get(id(value), value) for n, value in args.items()}
    else:
        new = {name: copy.deepcopy(value, memo) for name, value in args.items()}
    return new if dtype is None else {name: _cast(value, dtype) for name, value in new.items()}


def _are_plain(values: Collection[object]) -> bool:
    """Whether they are numbers, texts, generators and tensors without graph, each with memory of its own."""
    if not all(type(value) in PLAIN for value in values):
        return False
    tensors = [value for value in values if type(value) is Tensor]
    if any(
        x.layout is not torch.strided or x.requires_grad or x.grad is not None or not x.is_contiguous() for x in tensors
    ):
        return False
    return len({x.untyped_storage().data_ptr() for x in tensors}) == len(tensors)


def _cast(value: object, dtype: torch.dtype) -> object:
    if isinstance(value, nn.Module) or (isinstance(value, Tensor) and value.is_floating_point()):
        return value.to(dtype)
    return value


def plain(value: object) -> object:
    """Tensors, numbers, strings and nests of them, without graph; other things become the name of their type."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, nn.Module):
        state = {name: plain(tensor) for name, tensor in value.state_dict().items()}
        return dict(
            state=state, training=[m.training for m in value.modules()], seen=plain(getattr(value, "seen", None))
        )
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return type(value).__name__


def close(one: object, two: object, rtol: float = 1e-6, atol: float = 1e-9) -> bool:
    """Whether two plain values agree; NaN equals NaN, and a number equals a tensor without axes."""
    one, two = (torch.as_tensor(x) if isinstance(x, float) else x for x in (one, two))
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        if one.shape != two.shape or one.is_floating_point() != two.is_floating_point():
            return False
        if one.dtype == two.dtype and one.device == two.device and torch.equal(one, two):
            return True
        return torch.allclose(one.double().cpu(), two.double().cpu(), rtol=rtol, atol=atol, equal_nan=True)
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        return one.keys() == two.keys() and all(close(one[key], two[key], rtol, atol) for key in one)
    if isinstance(one, list) and isinstance(two, list):
        return len(one) == len(two) and all(close(a, b, rtol, atol) for a, b in zip(one, two, strict=True))
    return type(one) is type(two) and one == two


def oddity(got: object, like: object) -> str | None:
    """What is wrong at first sight with a result that should be of the type and shape of `like`; None if nothing is."""
    if got is None and like is not None:
        return "it returned None: is there a return statement?"
    if isinstance(like, tuple | list):
        if not isinstance(got, tuple | list) or len(got) != len(like):
            return f"it should return {len(like)} values, and returned {_kind(got)}"
        return next(
            (f"value {i}: {o}" for i, (g, k) in enumerate(zip(got, like, strict=True), 1) if (o := oddity(g, k))), None
        )
    if isinstance(like, Tensor):
        if not isinstance(got, Tensor):
            return f"it should return a tensor, and returned {_kind(got)}"
        if got.shape != like.shape:
            return f"the result has shape {tuple(got.shape)} where {tuple(like.shape)} is due"
        if got.is_floating_point() != like.is_floating_point():
            return f"the result has dtype {got.dtype} where {like.dtype} is due"
        if got.is_floating_point() and like.isfinite().all() and not got.isfinite().all():
            bad = (~got.isfinite()).sum()
            return f"{int(bad)} of {got.numel()} entries are NaN or infinite"
    if isinstance(like, float) and not (isinstance(got, int | float) or (isinstance(got, Tensor) and got.ndim == 0)):
        return f"it should return a number, and returned {_kind(got)}"
    return None


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{type(value).__name__}"


def gap(got: Tensor, expected: Tensor) -> tuple[str, str]:
    """Where two tensors of one shape differ most, and by how much; and what is expected there."""
    difference = (got - expected).abs().double()
    worst = int(difference.argmax())
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), got.shape))
    at = f" at {list(where)}" if where else ""
    text = f"largest difference {float(difference.max()):.3g}{at}, where yours is {float(got.flatten()[worst]):.6g}"
    return text, f"{float(expected.flatten()[worst]):.6g}"


def sizes(args: Mapping[str, object]) -> dict[str, int]:
    """The lengths of the axes of all tensors, by the names that a message gives them."""
    found: dict[str, int] = {}
    for name, value in args.items():
        if isinstance(value, Tensor):
            found |= {f"the length of axis {axis} of {name}": n for axis, n in enumerate(value.shape) if n > 1}
            rest = [math.prod(value.shape[i:]) for i in range(value.ndim)]
            found |= {f"the entries of {name} per example": rest[1]} if len(rest) > 2 else {}
            found |= {f"the number of entries of {name}": rest[0]} if len(rest) > 1 else {}
    return found
