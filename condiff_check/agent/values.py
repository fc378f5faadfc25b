"""Values as JSON and raw bytes: numbers, text, nests, tensors; by handle whatever is not plain data.

A value becomes a list whose first item says what it is:

    ["n"]  ["b", true]  ["i", "12"]  ["f", "0x1.8p+1"]  ["s", "text"]  ["y", "float32"]  ["e"]   none, bool, int, ...
    ["l", [...]]  ["u", [...]]  ["d", [[key, value], ...]]  ["z", start, stop, step]    list, tuple, dict, slice
    ["t", dtype, shape, offset, requires_grad]  ["a", i]    a tensor, and the i-th tensor of this message again
    ["o", i]    the i-th tensor of the message that this one answers: an argument is returned
    ["r", dtype, shape, offset]    a tensor that is neither an argument nor a result: a parameter, say
    ["g", object, offset]    a generator and its state
    ["h", handle, path]    an object that one of the two sides has a handle for
    ["x", type]            what cannot cross, by the name of its type
"""

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from .wire import BODY, ODD, Violation

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
    )
}
LONGEST = 20_000  # characters of a text
ITEMS = 20_000  # of a nest
TWISTED = 624  # numbers that a Mersenne twister makes at a time
MERSENNE = struct.Struct("<8xiiQ")  # in torch's state of it: how many are left, whether it has a seed, which is next

Json = list[Any]


class Objects(Protocol):
    """Who knows the handles: what is not plain data goes through it."""

    def name(self, value: object) -> Json: ...

    def named(self, handle: str, path: str) -> object: ...


class Encoder:
    """Writes values into one message. `given`: tensors that the other side sent and has; `tensors` and `generators`:
    those that this one met, in order."""

    def __init__(self, objects: Objects, given: Sequence[Tensor] = ()):
        self._objects, self._given = objects, given
        self.chunks: list[bytes] = []
        self.size = 0
        self.tensors: list[Tensor] = []
        self.generators: list[Generator] = []

    def __call__(self, value: object) -> Json:
        if type(value) in (list, tuple):  # before the others: whether something is a generator takes long to ask
            return ["l" if type(value) is list else "u", [self(item) for item in value]]
        match value:
            case None:
                return ["n"]
            case bool():
                return ["b", value]
            case int():
                return ["i", str(int(value))]
            case float():
                return ["f", float(value).hex() if math.isfinite(value) else str(float(value))]
            case str():
                return ["s", str(value)[:LONGEST].encode("utf-8", "replace").decode()]
            case torch.dtype():
                return ["y", str(value).removeprefix("torch.")]
            case torch.device():
                return ["s", str(value)]
            case Tensor():
                return self.tensor(value)
            case slice():
                return ["z", self(value.start), self(value.stop), self(value.step)]
            case dict() if type(value) is dict:
                return ["d", [[self(key), self(item)] for key, item in value.items()]]
            case Generator():
                return self._generator(value)
        if value is Ellipsis:
            return ["e"]
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return ["u", [self(item) for item in value]]
        if isinstance(value, Mapping) and type(value).__name__ in (
            "dict",
            "OrderedDict",
            "defaultdict",
            "mappingproxy",
        ):
            return ["d", [[self(key), self(item)] for key, item in value.items()]]
        return self._objects.name(value)

    def tensor(self, value: Tensor) -> Json:
        """Dense real numbers are sent as they are; of anything else its description."""
        for kind, tensors in (("o", self._given), ("a", self.tensors)):
            seen = next((i for i, tensor in enumerate(tensors) if tensor is value), None)
            if seen is not None:
                return [kind, seen]
        told = self.number(value)
        if told[0] == "x":
            return told
        self.tensors.append(value)
        return ["t", *told[1:], bool(value.requires_grad)]

    def number(self, value: Tensor) -> Json:
        """A tensor that counts for itself, such as a parameter: no argument and no result."""
        dtype = str(value.dtype).removeprefix("torch.")
        if value.layout is not torch.strided or dtype not in DTYPES or value.is_meta or value.is_quantized:
            return ["x", f"{str(value.layout).removeprefix('torch.')} {dtype} tensor on {value.device}"]
        offset = self.size
        self.raw(value)
        return ["r", dtype, list(value.shape), offset]

    def raw(self, value: Tensor) -> None:
        if value.numel() * value.element_size() > BODY:
            shape = tuple(value.shape)
            raise Violation(f"a tensor of shape {shape} is too large: {BODY >> 20} MiB at most cross")
        data = bytes_of(value)
        self.chunks.append(data)
        self.size += len(data)

    def _generator(self, value: Generator) -> Json:
        self.generators.append(value)
        offset = self.size
        self.raw(value.get_state())
        return ["g", self._objects.name(value), offset]


class Decoder:
    """Reads values out of one message. `sent`: the tensors of the message that it answers."""

    def __init__(self, objects: Objects, body: bytes | bytearray, sent: Sequence[Tensor] = ()):
        self._objects, self._body, self._items, self.sent = objects, body, 0, sent
        self._unread = len(body)
        self.tensors: list[Tensor] = []
        self.generators: list[Generator] = []

    def __call__(self, value: Any) -> object:
        try:
            return self._read(value)
        except ODD as error:
            raise Violation(f"no value: {type(error).__name__}") from error

    def _read(self, value: Any) -> object:
        self._items += 1
        if self._items > ITEMS:
            raise Violation(f"more than {ITEMS} values in one message")
        kind, *rest = value
        match kind:
            case "n":
                return None
            case "e":
                return ...
            case "b":
                return bool(rest[0])
            case "i":
                return int(rest[0]) if len(rest[0]) <= 400 else 10**400
            case "f":
                return float(rest[0]) if rest[0] in ("inf", "-inf", "nan") else float.fromhex(rest[0])
            case "s":
                return _text(rest[0])
            case "y":
                return DTYPES[rest[0]]
            case "l":
                return [self._read(item) for item in rest[0]]
            case "u":
                return tuple(self._read(item) for item in rest[0])
            case "d":
                return {self._read(key): self._read(item) for key, item in rest[0]}
            case "z":
                return slice(*(self._read(item) for item in rest))
            case "t":
                return self._tensor(*rest)
            case "r":
                return self.raw(DTYPES[rest[0]], *rest[1:])
            case "a":
                return self.tensors[index(rest[0])]
            case "o":
                return self.sent[index(rest[0])]
            case "g":
                return self._generator(*rest)
            case "h":
                return self._objects.named(_text(rest[0]), _text(rest[1]))
            case "x":
                return Unsendable(_text(rest[0])[:100])
        raise Violation("a value of no known kind")

    def _tensor(self, dtype: str, shape: list[int], offset: int, requires_grad: bool) -> Tensor:
        tensor = self.raw(DTYPES[dtype], shape, offset)
        if requires_grad and tensor.is_floating_point():
            tensor.requires_grad_()
        self.tensors.append(tensor)
        return tensor

    def raw(self, dtype: torch.dtype, shape: Sequence[int], offset: int) -> Tensor:
        """The bytes at this place as a tensor of its own. No byte is read twice: memory is bounded by what has come."""
        if len(shape) > 16 or not all(type(n) is int and 0 <= n <= BODY for n in (*shape, offset)):
            raise Violation("no shape")
        count = math.prod(shape)
        size = count * dtype.itemsize
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        if offset + size > len(self._body) or size > self._unread:
            raise Violation(f"a tensor of {size} bytes in a message of {len(self._body)}")
        self._unread -= size
        data = bytearray(memoryview(self._body)[offset : offset + size])
        if dtype == torch.bool:  # a byte that is neither 0 nor 1 would be true and unequal to true
            return torch.frombuffer(data, dtype=torch.uint8).ne(0).reshape(shape)
        return torch.frombuffer(data, dtype=dtype).reshape(shape)

    def _generator(self, name: Json, offset: int) -> Generator:
        generator = self._read(name)
        if not isinstance(generator, Generator):
            raise Violation("no generator")
        self.state(generator, offset)
        self.generators.append(generator)
        return generator

    def state(self, generator: Generator, offset: int) -> None:
        """Set the state of a generator. torch reads past the end of a table for one that no seed leads to."""
        state = self.raw(torch.uint8, list(generator.get_state().shape), offset)
        left, seeded, following = MERSENNE.unpack_from(state.numpy())
        fresh, used = (left, following) == (1, 0), 1 <= left <= TWISTED and left + following == TWISTED + 1
        if seeded != 1 or not (fresh or used):
            raise Violation("no state of a generator")
        generator.set_state(state)


class Unsendable:
    """What could not cross: a sparse tensor, say. Its type is called what the other side says it is."""

    def __new__(cls, told: str) -> "Unsendable":
        return object.__new__(type(told, (Unsendable,), {}))

    def __init__(self, told: str):
        pass


def bytes_of(value: Tensor) -> bytes:
    """The numbers in C order, little-endian as all machines are that torch runs on."""
    plain = value.detach()
    if type(plain) is not Tensor:
        plain = plain.as_subclass(Tensor)
    plain = plain.resolve_conj().resolve_neg().cpu()
    return (plain.view(torch.int16) if plain.dtype == torch.bfloat16 else plain).numpy().tobytes()


def index(value: object) -> int:
    """A place in a list."""
    if type(value) is not int or value < 0:
        raise Violation("no index")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise Violation("no text")
    return value[:LONGEST]
