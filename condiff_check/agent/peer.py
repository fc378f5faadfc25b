"""Calls between the judge and the code under test, in both directions, as if both were in one process.

Each side calls what the other has shown it, and while it waits for the answer it answers calls itself: a sampler under
test calls the model that the judge gave it. Plain data are copied. Functions, modules, generators and optimizers have
handles; modules stay in step on both sides, gradients flow through a call as through any operation, and what a call
does to its arguments happens to the caller's.

The judge is the trusted side. It answers calls of what it has shown, and nothing else.
"""

import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Generator, Tensor, nn

from . import errors, grads, modules
from .proxies import RemoteFunction, object_like
from .values import Decoder, Encoder, Json, index
from .wire import ODD, TooMany, Violation, Wire, WireError

NESTED = 20  # calls within calls
TAPES = 500  # calls whose gradients can still be asked for
HANDLES = 20_000
COPIES = 20  # of a judge's modules, made for the other side
TRAFFIC = 512 << 20  # bytes that a judge takes and gives in all: its models may keep what they are asked
LOOSE = "loose"


class Peer:
    """One end of the connection; `side` is one letter, the first of its handles.

    allowed: how many calls of the other side are answered, None for any number.
    """

    def __init__(self, wire: Wire, side: str, *, trusted: bool, allowed: int | None = None):
        self.wire, self.side, self.trusted, self.allowed = wire, side, trusted, allowed
        self.served = 0
        self.altered: set[str] = set()  # what calls have left changed of things that are this side's
        self._originals = modules.Originals()  # of all that the other side has changed so far
        self._call: modules.Originals | None = None  # of what it has changed in the call at hand
        self._count = self._depth = self._copies = self._traffic = 0
        self._exports: dict[str, object] = {}
        self._imports: dict[str, object] = {}
        self._handles: dict[int, tuple[str, str]] = {}  # id of an object: its handle and path
        self._shadows: dict[str, modules.Shadow] = {}
        self._new: list[tuple[str, dict]] = []
        self._encode: Encoder | None = None
        self._dropped: list[str] = []  # what the other side does not use any more, but for the message at hand
        self.seed: int | None = None  # of the random state that the other side's calls start from
        self._random: Tensor | None = None  # torch's global random state, as the other side knows it
        self.watch: list[int] | None = None  # what watching.Columns is to look for in the other side's next call
        self.watched: object = None  # what it saw
        self.ended: WireError | None = None
        self._tapes: deque[tuple[str, grads.Tape]] = deque(maxlen=TAPES)

    def __deepcopy__(self, memo: dict) -> "Peer":
        return self

    # --- ask the other side

    def call(
        self,
        handle: str,
        path: str,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
        **more: Any,
    ) -> object:
        """Call the other side's function or module. Raises what it raises."""
        return self._ask("call", (list(args), dict(kwargs or {})), handle=handle, path=path, **more)

    def post(self, handle: str, *args: object) -> None:
        """Send a call and wait for no answer."""
        self._message("call", (list(args), {}), handle=handle, path="", grad=True, seed=0, watch=None)

    def get(self, handle: str, path: str, name: str) -> object:
        """An attribute of the other side's object."""
        return self._ask("get", None, handle=handle, path=path, name=name)

    def copy(self, handle: str, path: str) -> Any:
        """A deep copy, made there."""
        return self._ask("copy", None, handle=handle, path=path)

    def back(self, tape: str, slopes: Sequence[Tensor | None], leaves: Sequence[Tensor]) -> list[Tensor | None]:
        """Gradients for the leaves of an earlier call."""
        found = self._ask("back", list(slopes), of=tape, create=torch.is_grad_enabled(), leaves=leaves)
        if not isinstance(found, list) or len(found) != len(leaves):
            raise Violation("not one gradient for each leaf")
        for slope, leaf in zip(found, leaves, strict=True):
            if slope is not None and (not isinstance(slope, Tensor) or slope.shape != leaf.shape):
                raise Violation("a gradient of another shape")
        return found

    def _ask(self, op: str, value: object, leaves: Sequence[Tensor] = (), **header: Any) -> Any:
        if self.ended is not None:
            raise self.ended
        call = modules.Originals() if self.trusted and not self._depth else None
        try:
            encode = self._message(op, value, grad=torch.is_grad_enabled(), seed=self.seed, watch=self.watch, **header)
            if call is not None:
                self._call = call
            header, decode = self._receive()
            while header.get("op") != "reply":
                self._serve(header, decode)
                header, decode = self._receive()
            self.watched = header.get("watched")
            error, found = self._answer(header, decode, encode, leaves)
        except WireError as error:
            self.ended = error
            raise
        finally:
            if call is not None:
                self.altered |= call.altered(self._is_mine)
                self._call = None
        if error is not None:
            raise error
        return found

    def _answer(
        self, header: dict, decode: Decoder, encode: Encoder, leaves: Sequence[Tensor]
    ) -> tuple[BaseException | None, object]:
        """An error or a result. Raises Violation for what is neither."""
        decode.sent = encode.tensors
        try:
            error = errors.unpack(header["error"]) if header.get("error") else None
            found = None if error else self._join(header, decode, encode, decode(header["value"]), leaves)
        except ODD as odd:
            raise Violation(f"a reply without its parts: {type(odd).__name__}") from odd
        self._take_after(header, decode, encode)
        return error, found

    def undo(self) -> None:
        """Put back what the other side has changed here: a fact may have lent what others need as it was."""
        self._originals.restore()

    def _join(self, header: dict, decode: Decoder, encode: Encoder, found: object, leaves: Sequence[Tensor]) -> object:
        """Results with gradients become results of an operation on this side's tensors."""
        tape, results = header.get("tape"), [t for t in decode.tensors if t.requires_grad]
        if not results:
            return found
        sources = [self._source(told, encode, leaves) for told in header.get("leaves", [])]
        joined = iter(grads.join(self, tape, results, sources))
        replaced = {id(tensor): next(joined) for tensor in results}
        return _mapped(found, replaced)

    def _source(self, told: Any, encode: Encoder, leaves: Sequence[Tensor]) -> Tensor:
        try:
            kind, *rest = told
            if kind == "argument":
                return encode.tensors[index(rest[0])]
            if kind == "leaf":
                return leaves[index(rest[0])]
            return self.leaf(rest[0], rest[1])
        except (ValueError, IndexError, TypeError) as error:
            raise Violation("a gradient for an unknown tensor") from error

    def share_random(self, seed: int | None) -> None:
        """From here on both sides draw from one global stream, as they would in one process; with None no longer."""
        self._random = None
        if seed is not None:
            torch.default_generator.manual_seed(seed)
            self._random = torch.default_generator.get_state()

    # --- answer the other side

    def serve(self) -> None:
        """Answer until the connection ends; raises wire.Ended then."""
        while True:
            self.answer()

    def answer(self) -> None:
        """Answer one request."""
        self._serve(*self._receive())

    def _serve(self, header: dict, decode: Decoder) -> None:
        self.served += 1
        if self._depth >= NESTED:
            raise Violation(f"calls within calls, {NESTED} deep")
        if self.allowed is not None and self.served > self.allowed:
            raise TooMany(f"it called what it was given more than {self.allowed} times")
        op = header.get("op")
        if self.trusted and op not in ("call", "back", "copy"):
            raise Violation(f"a request for {str(op)[:20]!r}")
        self._depth += 1
        given = _Given()
        try:
            with self.framed(header):
                value, tape = self._do(op, header, decode, given)
            self._reply(value, given, tape)
        except WireError:
            raise
        except BaseException as error:
            if self.trusted and not isinstance(error, Exception):  # Ctrl-C is not for the student's code
                raise
            self._message("reply", None, given=given, error=errors.pack(error))
        finally:
            self._depth -= 1

    def _reply(self, value: object, given: "_Given", tape: grads.Tape | None) -> None:
        try:
            self._message("reply", value, given=given, tape=tape, watched=self.watched)
        except Violation as error:  # nothing has been sent: the result is too large
            self._drop([handle for handle, _ in self._new], self._exports)
            self._new = []
            self._message("reply", None, error=errors.pack(RuntimeError(str(error))))

    def _do(self, op: str, header: dict, decode: Decoder, given: "_Given") -> tuple[object, grads.Tape | None]:
        if op == "back":
            return self._back(header, decode, given)
        thing = self._own(header)
        if op == "get":
            name = header.get("name")
            if not isinstance(name, str) or name.startswith("__"):
                raise AttributeError(str(name))
            return getattr(thing, name), None
        if op == "copy":
            self._copies += 1
            if not isinstance(thing, nn.Module) or (self.trusted and self._copies > COPIES):
                raise Violation(f"a copy of what is no module, or more than {COPIES} copies")
            return deepcopy(thing), None
        if op != "call":
            raise Violation("an unknown request")
        args, kwargs = decode(header["value"])
        if not isinstance(args, list) or not isinstance(kwargs, dict) or not all(isinstance(k, str) for k in kwargs):
            raise Violation("no arguments")
        given.note(decode)
        with torch.set_grad_enabled(bool(header.get("grad", True))):
            value = thing(*args, **kwargs)
        return value, grads.Tape([("argument", i, t) for i, t in enumerate(decode.tensors)])

    def _back(self, header: dict, decode: Decoder, given: "_Given") -> tuple[object, grads.Tape | None]:
        slopes = decode(header["value"])
        tape = next((tape for name, tape in self._tapes if name == header.get("of")), None)
        if tape is None:
            raise RuntimeError("the graph of this call has been freed")
        create = bool(header.get("create"))
        found = tape.back(slopes, create)
        if not create:
            return found, None
        leaves = [("leaf", i, leaf) for i, leaf in enumerate(tape.leaves)]
        if self.trusted and tape.order >= grads.ORDERS:
            raise RuntimeError(f"gradients of more than order {grads.ORDERS}")
        return found, grads.Tape([*(("argument", i, t) for i, t in enumerate(decode.tensors)), *leaves], tape.order + 1)

    def _own(self, header: dict) -> Any:
        handle, path = header.get("handle"), header.get("path")
        thing = self._exports.get(handle) if isinstance(handle, str) else None
        if thing is None or not isinstance(path, str):
            raise Violation("a call of what was never shown")
        if isinstance(thing, torch.optim.Optimizer) and path == "step":
            return thing.step
        return _part(thing, path)

    def framed(self, header: dict) -> Any:
        """What is around a call that this side answers."""
        return torch.enable_grad()

    # --- messages

    def _message(
        self, op: str, value: object, given: "_Given | None" = None, tape: grads.Tape | None = None, **header: Any
    ) -> Encoder:
        encode = self._encode = Encoder(self, given.tensors if given is not None else ())
        self._drop(self._dropped, self._exports)
        self._dropped = []
        self._export_modules(value)
        content = encode(value)
        if tape is not None:
            header |= self._keep(tape, encode)
        if given is not None:
            header["after"] = given.after(encode)
        sync = [[h, told] for h, m in list(self._modules()) if (told := self._shadows[h].changes(m, encode))]
        optimizers = [[h, modules.describe_optimizer(self, o, encode)] for h, o in list(self._optimizers())]
        if self._random is not None and not torch.equal(state := torch.default_generator.get_state(), self._random):
            header["random"], self._random = encode.size, state
            encode.raw(state)
        new, self._new = self._new, []
        drop = self._unused()  # last: what has become of them is told first
        self._count_traffic(encode.size)
        self.wire.send(
            dict(op=op, value=content, new=new, sync=sync, optimizers=optimizers, drop=drop, **header), encode.chunks
        )
        return encode

    def _receive(self) -> tuple[dict, Decoder]:
        header, body = self.wire.receive()
        self._count_traffic(len(body))
        decode = Decoder(self, body)
        try:
            if self._random is not None and header.get("random") is not None:
                decode.state(torch.default_generator, header["random"])
                self._random = torch.default_generator.get_state()
            later = []
            for handle, told in header.get("new", []):
                self._import(handle, told, decode) if told["kind"] != "optimizer" else later.append((handle, told))
            for handle, told in header.get("sync", []):
                module = self._find(handle)
                if module is not None:
                    self._note_modes(handle, module)
                    self._shadows[handle].apply(module, told, decode, self._note)
            for handle, told in later:
                self._import(handle, told, decode)
            for handle, told in header.get("optimizers", []):
                optimizer = self._find(handle)
                if optimizer is not None and handle not in dict(later):
                    modules.update_optimizer(self, optimizer, told, decode)
            self._dropped = [handle for handle in header.get("drop", []) if isinstance(handle, str)]
        except ODD as error:
            raise Violation(f"a message without its parts: {type(error).__name__}: {str(error)[:200]}") from error
        return header, decode

    def _count_traffic(self, size: int) -> None:
        self._traffic += size
        if self.trusted and self._traffic > TRAFFIC:
            raise Violation(f"more than {TRAFFIC >> 20} MiB in all")

    def _note(self, tensor: Tensor, lent: bool = False) -> None:
        """The other side is about to change this tensor; `lent`: an argument of a call."""
        for originals in (self._originals, self._call) if self.trusted else ():
            if originals is not None:
                originals.note(tensor, lent)

    def _note_modes(self, handle: str, module: nn.Module) -> None:
        for originals in (self._originals, self._call) if self.trusted and handle in self._exports else ():
            if originals is not None:
                originals.note_modes(module)

    def _keep(self, tape: grads.Tape, encode: Encoder) -> dict[str, Any]:
        """The tape of results with gradients, by a name; and which tensors it can be asked about."""
        results = [t for t in encode.tensors if t.requires_grad]
        if not results:
            return {}
        known = self.parameters()
        leaves = tape.close(results, lambda tensor: known.find(tensor))
        self._count += 1
        name = f"{self.side}{self._count}"
        self._tapes.append((name, tape))
        return dict(tape=name, leaves=leaves)

    def _take_after(self, header: dict, decode: Decoder, encode: Encoder) -> None:
        """What the call did to its arguments happens to ours."""
        try:
            told = header.get("after") or dict(tensors=[], generators=[])
            for i, value, grad, requires_grad in told["tensors"]:
                tensor = encode.tensors[index(i)]
                self._note(tensor, lent=True)
                _change(tensor, value and decode(value), grad and decode(grad), requires_grad)
            for i, offset in told["generators"]:
                decode.state(encode.generators[index(i)], offset)
        except ODD as error:
            raise Violation(f"what became of the arguments is not told: {type(error).__name__}") from error

    # --- handles

    def name(self, value: object) -> Json:
        """For the encoder: the handle of an object, new if need be."""
        found = self._handles.get(id(value))
        if found is None:
            if not self._can_cross(value):
                return ["x", type(value).__name__[:80]]
            found = (self.export(value), "")
        return ["h", *found]

    def named(self, handle: str, path: str) -> object:
        """For the decoder: the object with this handle."""
        thing = self._find(handle)
        if thing is None:
            raise Violation("a handle of nothing")
        return _part(thing, path)

    def export(self, value: object) -> str:
        """Show an object to the other side."""
        if len(self._exports) >= HANDLES:
            raise Violation(f"more than {HANDLES} objects")
        self._count += 1
        handle = f"{self.side}{self._count}"
        self._exports[handle] = value
        self._handles[id(value)] = (handle, "")
        if isinstance(value, nn.Module):
            for path, part in value.named_modules():
                self._handles.setdefault(id(part), (handle, path))
        told = self._described(value)
        if isinstance(value, nn.Module):
            self._shadows[handle] = modules.Shadow(value)
        self._new.append((handle, told))
        return handle

    def _described(self, value: object) -> dict:
        encode = self._encode
        if isinstance(value, nn.Module):
            return dict(kind="module", tree=modules.describe(self, value, encode))
        if isinstance(value, Generator):
            return dict(kind="generator")
        if isinstance(value, torch.optim.Optimizer):
            return dict(kind="optimizer", told=modules.describe_optimizer(self, value, encode))
        if self.trusted and callable(value):
            return dict(kind="function", name="function")  # its own name might tell right from wrong
        if callable(value) and hasattr(value, "__name__"):
            return dict(kind="function", name=str(value.__name__)[:80])
        return dict(kind="object", name=type(value).__name__[:80], callable=callable(value))

    def _can_cross(self, value: object) -> bool:
        """A judge shows nothing that is not meant to be called."""
        return not self.trusted or callable(value) or isinstance(value, Generator | torch.optim.Optimizer)

    def _import(self, handle: str, told: dict, decode: Decoder) -> None:
        if not isinstance(handle, str) or handle[:1] == self.side or self._find(handle) is not None:
            raise Violation("no new handle")
        match told["kind"]:
            case "module":
                thing = modules.rebuild(self, handle, told["tree"], decode)
            case "generator":
                thing = Generator()
            case "optimizer":
                thing = modules.rebuild_optimizer(self, told["told"], decode)
                if not self.trusted:  # the judge's own optimizer steps: a fact may count how often
                    thing.step = lambda closure=None: self.call(handle, "step", [] if closure is None else [closure])
            case "function":
                thing = RemoteFunction(self, handle, str(told["name"])[:80])
            case "object":
                thing = object_like(self, handle, str(told["name"])[:80], bool(told["callable"]))
            case _:
                raise Violation("an object of no known kind")
        if len(self._imports) >= HANDLES:
            raise Violation(f"more than {HANDLES} objects")
        self._imports[handle] = thing
        self._handles[id(thing)] = (handle, "")
        if isinstance(thing, nn.Module):
            for path, part in thing.named_modules():
                self._handles.setdefault(id(part), (handle, path))
            self._shadows[handle] = modules.Shadow(thing)

    def _find(self, handle: object) -> Any:
        if not isinstance(handle, str):
            raise Violation("no handle")
        if handle in self._exports:
            return self._exports[handle]
        return self._imports.get(handle)

    def _unused(self) -> list[str]:
        """Stand-ins that nothing here holds any more: the other side need not keep what they stand for.

        Messages alternate, so whoever reads that a handle is dropped has not used it since.
        """
        optimizers = [thing for thing in self._imports.values() if isinstance(thing, torch.optim.Optimizer)]
        held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
        del optimizers
        unused = [handle for handle in list(self._imports) if self._is_unused(handle, held)]
        self._drop(unused, self._imports)
        return unused

    def _is_unused(self, handle: str, held: set[int]) -> bool:
        thing = self._imports[handle]
        if sys.getrefcount(thing) > 3:  # this table, the name `thing`, the argument
            return False
        if not isinstance(thing, nn.Module):
            return True
        parts = [part for part in thing.modules() if part is not thing]
        if any(sys.getrefcount(part) > 4 for part in parts):  # its parent, the list, the name, the argument
            return False
        return not any(id(leaf) in held for _, leaf in modules.leaves(thing))  # by an optimizer

    def _drop(self, handles: Sequence[str], table: dict[str, object]) -> None:
        known = {handle for handle in handles if handle in table}
        if known:
            self._handles = {number: found for number, found in self._handles.items() if found[0] not in known}
        for handle in known:
            del table[handle]
            self._shadows.pop(handle, None)

    def _modules(self) -> Iterator[tuple[str, nn.Module]]:
        for handle in list(self._shadows):
            thing = self._find(handle)
            if thing is not None:
                yield handle, thing

    def _optimizers(self) -> Iterator[tuple[str, torch.optim.Optimizer]]:
        for handle in [*self._exports, *self._imports]:
            thing = self._find(handle)
            if isinstance(thing, torch.optim.Optimizer):
                yield handle, thing

    def _export_modules(self, value: object) -> None:
        """Modules first: optimizers name their parameters."""
        if isinstance(value, nn.Module):
            self.name(value)
        elif isinstance(value, list | tuple):
            for item in value:
                self._export_modules(item)
        elif isinstance(value, dict):
            for item in value.values():
                self._export_modules(item)

    # --- parameters

    def parameters(self) -> "Parameters":
        """Whose parameter is whose, now."""
        return Parameters(self)

    def leaves(self, handle: str) -> dict[str, Tensor]:
        """The parameters and buffers of a module that both sides know."""
        module = self._find(handle)
        return dict(modules.leaves(module)) if isinstance(module, nn.Module) else {}

    def leaf(self, handle: str, name: str) -> Tensor:
        """The parameter or buffer of that name."""
        found = self.leaves(handle).get(name)
        if found is None:
            raise Violation("an unknown parameter")
        return found

    def _is_mine(self, tensor: Tensor) -> bool:
        """Whether a module that this side has shown has this parameter, or its memory."""
        shown = (thing for thing in self._exports.values() if isinstance(thing, nn.Module))
        return any(
            leaf is tensor or (leaf.numel() and leaf.data_ptr() == tensor.data_ptr())
            for module in shown
            for _, leaf in modules.leaves(module)
        )

    def parameter(self, reference: Sequence[str]) -> Tensor:
        return self.leaf(*reference)


class Parameters:
    """The parameters and buffers of all modules that both sides know."""

    def __init__(self, peer: Peer):
        self._peer = peer
        self._by_id: dict[int, tuple[str, str]] = {}
        self._by_memory: dict[tuple, tuple[str, str]] = {}
        for handle, module in peer._modules():
            for name, leaf in modules.leaves(module):
                self._by_id.setdefault(id(leaf), (handle, name))
                if leaf.numel():
                    self._by_memory.setdefault((leaf.data_ptr(), leaf.shape), (handle, name))

    def find(self, tensor: Tensor) -> tuple[str, str] | None:
        return self._by_id.get(id(tensor))

    def same(self, tensor: Tensor) -> tuple[tuple[str, str], bool] | None:
        """Where this parameter is known already; True if only its memory is."""
        if id(tensor) in self._by_id:
            return self._by_id[id(tensor)], False
        found = self._by_memory.get((tensor.data_ptr(), tensor.shape)) if tensor.numel() else None
        return (found, True) if found else None

    def reference(self, tensor: Tensor) -> tuple[str, str]:
        """Its name; one that belongs to no module gets one."""
        found = self.find(tensor)
        if found is None:
            holder = nn.ParameterList([tensor])
            found = self._by_id[id(tensor)] = (self._peer.export(holder), "0")
        return found


class _Given:
    """The arguments of a call that this side answers, as they came."""

    def __init__(self) -> None:
        self._tensors: list[tuple[Tensor, Tensor, bool]] = []
        self._generators: list[Generator] = []

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for tensor, _, _ in self._tensors]

    def note(self, decode: Decoder) -> None:
        self._tensors = [(t, t.detach().clone(), t.requires_grad) for t in decode.tensors]
        self._generators = list(decode.generators)

    def after(self, encode: Encoder) -> dict:
        """What became of them."""
        told = []
        for i, (tensor, before, requires_grad) in enumerate(self._tensors):
            same = modules.equal(tensor.detach(), before)
            value = None if same or tensor.shape != before.shape else encode.number(tensor.detach())
            grad = encode.number(tensor.grad) if tensor.is_leaf and tensor.grad is not None else None
            if value or grad or tensor.requires_grad != requires_grad:
                told.append([i, value, grad, tensor.requires_grad])
        states = []
        for i, generator in enumerate(self._generators):
            states.append([i, encode.size])
            encode.raw(generator.get_state())
        return dict(tensors=told, generators=states)


def _change(tensor: Tensor, value: object, grad: object, requires_grad: object) -> None:
    with torch.no_grad():
        if isinstance(value, Tensor):
            tensor.data.copy_(value)
        if tensor.is_leaf and isinstance(grad, Tensor) and grad.shape == tensor.shape:
            grad = grad.to(tensor.dtype)
            tensor.grad = grad if tensor.grad is None else tensor.grad + grad
    if tensor.is_leaf and tensor.is_floating_point():
        tensor.requires_grad_(bool(requires_grad))


def _mapped(value: object, replaced: Mapping[int, Tensor]) -> object:
    if isinstance(value, Tensor):
        return replaced.get(id(value), value)
    if isinstance(value, list | tuple):
        return type(value)(_mapped(item, replaced) for item in value)
    if isinstance(value, dict):
        return {key: _mapped(item, replaced) for key, item in value.items()}
    return value


def _part(thing: Any, path: str) -> Any:
    """The part of a module; get_submodule would ask a stand-in for attributes."""
    for name in path.split(".") if path and isinstance(thing, nn.Module) else ():
        thing = thing._modules.get(name)
        if thing is None:
            raise Violation("an unknown part of a module")
    return thing
