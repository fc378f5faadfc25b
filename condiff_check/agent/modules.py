"""Modules and optimizers across the wire: what they are made of, and what has changed in them since the last message.

A module is described once, as a tree of parts with their parameters and buffers. Afterwards both sides keep a copy of
what the other knows, and each message carries what differs from it.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .proxies import RemoteModule, module_like, torch_class
from .values import Decoder, Encoder
from .wire import Violation

if TYPE_CHECKING:
    from .peer import Peer

PARTS = 5000  # of a module at most, its parameters and buffers among them; shared ones as often as they are met
SHOWN = ("null", "classes")  # what exercises promise of the models that they hand over
PLAIN = (bool, int, float, str, type(None))


# --- describe ---------------------------------------------------------------------------------------------------------


def describe(peer: "Peer", module: nn.Module, encode: Encoder) -> dict:
    """The module as a tree. Parameters that the other side has already are named, so that sharing survives."""
    known = peer.parameters()
    own: dict[int, list[str]] = {}
    parts: dict[int, str] = {}

    def leaf(tensor: Tensor | None, path: str) -> Any:
        if tensor is None:
            return None
        if id(tensor) in own:
            return dict(tied=own[id(tensor)])
        own[id(tensor)] = path
        found = known.same(tensor)
        if found:
            return dict(like=found[0], data=found[1], grad=tensor.requires_grad)
        slope = tensor.grad if tensor.is_leaf else None
        return dict(
            value=encode.number(tensor),
            grad=tensor.requires_grad,
            slope=None if slope is None else encode.number(slope),
        )

    def tree(part: nn.Module, path: str) -> dict:
        if id(part) in parts:
            return dict(again=parts[id(part)])
        parts[id(part)] = path
        dot = f"{path}." if path else ""
        return dict(
            type=type(part).__name__[:80],
            torch=_torch_name(part),
            native=type(part).__module__.startswith("torch.nn.modules."),
            attributes=[[name, encode(value)] for name, value in _attributes(peer, part)],
            training=part.training,
            parameters=[[name, leaf(p, dot + name)] for name, p in part._parameters.items()],
            buffers=[[name, leaf(b, dot + name)] for name, b in part._buffers.items()],
            children=[[name, None if c is None else tree(c, dot + name)] for name, c in part._modules.items()],
        )

    return tree(module, "")


def _torch_name(part: nn.Module) -> str | None:
    """The class of torch.nn that the part's class is or extends."""
    classes = (cls for cls in type(part).__mro__ if cls.__module__.startswith("torch.nn.modules."))
    return next((cls.__name__ for cls in classes if cls is not nn.Module), None)


def _attributes(peer: "Peer", part: nn.Module) -> Iterator[tuple[str, object]]:
    """Plain attributes. A judge shows those of torch.nn's own modules, and few of its own: they may tell the answer."""
    native = type(part).__module__.startswith("torch.nn.modules.")
    shown = SHOWN if peer.trusted and not native else None
    for name, value in vars(part).items():
        if name in ("training", "_peer", "_handle", "_path") or not _is_plain(value):
            continue
        if shown is None or name in shown:
            yield name, value


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return len(value) <= 20 and all(isinstance(item, PLAIN) for item in value)
    return isinstance(value, PLAIN)


# --- rebuild ----------------------------------------------------------------------------------------------------------


def rebuild(peer: "Peer", handle: str, tree: Any, decode: Decoder) -> nn.Module:
    """A stand-in. A child gets torch.nn's own modules whole; a judge never runs what a child describes."""
    made_leaves: dict[str, Tensor] = {}
    parts: dict[str, nn.Module] = {}
    sizes: dict[str, int] = {}
    known: dict[str, dict[str, Tensor]] = {}

    def like(owner: str, name: str) -> Tensor:
        if owner not in known:
            known[owner] = peer.leaves(owner)
        return known[owner][name]

    def leaf(told: Any, path: str, is_parameter: bool) -> Tensor | None:
        if told is None:
            return None
        if "tied" in told:
            return made_leaves[told["tied"]]
        if "like" in told:
            tensor = like(*told["like"])
            if told["data"]:
                tensor = nn.Parameter(tensor.data, requires_grad=told["grad"]) if is_parameter else tensor.data
        else:
            value = decode(told["value"])
            if not isinstance(value, Tensor):
                raise Violation("a parameter that is no dense tensor")
            tensor = nn.Parameter(value, requires_grad=bool(told["grad"])) if is_parameter else value
            if is_parameter and told["slope"] is not None:
                tensor.grad = decode(told["slope"])
        made_leaves[path] = tensor
        return tensor

    def part(told: dict, path: str) -> nn.Module:
        if "again" in told:
            sizes[path] = sizes[told["again"]]  # KeyError for a module within itself
            return parts[told["again"]]
        made = _empty(peer, handle, path, told)
        parts[path] = made
        dot = f"{path}." if path else ""
        for name, value in told["attributes"]:
            if made.__dict__.get("_peer") is None or _may_set(made, name):
                made.__dict__[_name(name)] = decode(value)
        made.training = bool(told["training"])
        for name, value in told["parameters"]:
            made._parameters[_name(name)] = leaf(value, dot + name, True)
        for name, value in told["buffers"]:
            made._buffers[_name(name)] = leaf(value, dot + name, False)
        sizes_of_children = 0
        for name, child in told["children"]:
            made._modules[_name(name)] = None if child is None else part(child, dot + name)
            sizes_of_children += sizes[dot + name] if child is not None else 0
        sizes[path] = 1 + len(made._parameters) + len(made._buffers) + sizes_of_children
        if sizes[path] > PARTS:
            raise Violation(f"a module of more than {PARTS} parts")
        return made

    return part(tree, "")


def _empty(peer: "Peer", handle: str, path: str, told: dict) -> nn.Module:
    known = torch_class(told["torch"])
    if not peer.trusted and told["native"] and known is not None:
        made = known.__new__(known)
        nn.Module.__init__(made)
        return made
    return module_like(peer, handle, path, str(told["type"])[:80], told["torch"])


def _may_set(made: RemoteModule, name: object) -> bool:
    """Nothing that a child says replaces what makes a stand-in work."""
    return isinstance(name, str) and not name.startswith("_") and not hasattr(RemoteModule, name)


def _name(name: object) -> str:
    if not isinstance(name, str) or not name or "." in name or len(name) > 200:
        raise Violation("no name of a part")
    return name


# --- keep in step -----------------------------------------------------------------------------------------------------


class Shadow:
    """What the other side knows of a module."""

    def __init__(self, module: nn.Module):
        self._leaves = {name: _snapshot(leaf) for name, leaf in leaves(module)}
        self._training = _training(module)

    def changes(self, module: nn.Module, encode: Encoder) -> dict | None:
        """What it does not know yet, after which it does; None if there is nothing."""
        changed = []
        for name, leaf in leaves(module):
            before = self._leaves.get(name)
            if before is not None and not _is_as(leaf, before):
                now = _snapshot(leaf, copy=False)
                value, grad = (
                    None if equal(n, b) else n if n is None else encode.number(n)
                    for n, b in zip(now[:2], before, strict=False)
                )
                cleared = now[1] is None and before[1] is not None
                changed.append([name, value, grad, cleared, now[2]])
                self._leaves[name] = _snapshot(leaf)
        training = _training(module)
        if not changed and training == self._training:
            return None
        told = None if training == self._training else training
        self._training = training
        return dict(leaves=changed, training=told)

    def apply(self, module: nn.Module, told: dict, decode: Decoder, note: Callable[[Tensor], None]) -> None:
        """Take over what the other side has changed; `note` is told of each tensor before."""
        mine = dict(leaves(module))
        for name, value, grad, cleared, requires_grad in told["leaves"]:
            leaf = mine.get(name)
            if leaf is None:
                raise Violation("a change of an unknown parameter")
            note(leaf)
            if value is not None:
                _put(leaf, decode(value))
            if grad is not None:
                new = decode(grad)
                if not isinstance(new, Tensor) or new.shape != leaf.shape:
                    raise Violation("a gradient of another shape")
                leaf.grad = new.to(leaf.dtype)
            elif cleared:
                leaf.grad = None
            if leaf.is_leaf and leaf.is_floating_point():
                leaf.requires_grad_(bool(requires_grad))
            self._leaves[name] = _snapshot(leaf)
        if told["training"] is not None:
            for part, mode in zip(module.modules(), told["training"], strict=True):
                part.training = bool(mode)
            self._training = _training(module)


def leaves(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers by their names; module.named_parameters() takes several times as long."""
    for table in (module._parameters, module._buffers):
        for name, leaf in table.items():
            if leaf is not None:
                yield prefix + name, leaf
    for name, child in module._modules.items():
        if child is not None:
            yield from leaves(child, f"{prefix}{name}.")


def _training(module: nn.Module) -> list[bool]:
    return [part.training for part in module.modules()]


def _snapshot(leaf: Tensor, copy: bool = True) -> tuple[Tensor, Tensor | None, bool]:
    grad = leaf.grad if leaf.is_leaf else None
    value = leaf.detach()
    return (
        (value.clone() if copy else value),
        (grad.detach().clone() if copy and grad is not None else grad),
        leaf.requires_grad,
    )


def _is_as(leaf: Tensor, before: tuple[Tensor, Tensor | None, bool]) -> bool:
    value, grad, requires_grad = before
    return (
        leaf.requires_grad == requires_grad and equal(leaf, value) and equal(leaf.grad if leaf.is_leaf else None, grad)
    )


def equal(one: Tensor | None, two: Tensor | None) -> bool:
    """Of one dtype and shape, and with the same numbers; NaN is NaN."""
    if one is None or two is None:
        return one is two
    if one.dtype != two.dtype or one.shape != two.shape:
        return False
    return torch.equal(one, two) or (
        one.is_floating_point() and torch.allclose(one, two, rtol=0, atol=0, equal_nan=True)
    )


def _put(leaf: Tensor, value: object) -> None:
    if (
        not isinstance(value, Tensor)
        or value.shape != leaf.shape
        or value.is_floating_point() != leaf.is_floating_point()
    ):
        raise Violation("a parameter has got another shape")
    with torch.no_grad():
        if value.dtype == leaf.dtype:
            leaf.data.copy_(value)
        else:
            leaf.data = value


class Originals:
    """Tensors and modules as they were before the other side changed them."""

    def __init__(self) -> None:
        self._tensors: dict[int, tuple[Tensor, Tensor, tuple, bool]] = {}
        self._modes: dict[int, tuple[nn.Module, bool]] = {}

    def note(self, tensor: Tensor, lent: bool) -> None:
        if id(tensor) not in self._tensors:
            self._tensors[id(tensor)] = (tensor, tensor.data, _snapshot(tensor), lent)

    def note_modes(self, module: nn.Module) -> None:
        for part in module.modules():
            self._modes.setdefault(id(part), (part, part.training))

    def altered(self, mine: Callable[[Tensor], bool]) -> set[str]:
        """What is not as it was. `mine`: whether a tensor belongs to a module of this side."""
        found = {"the mode of a module" for part, mode in self._modes.values() if part.training != mode}
        for tensor, _, before, lent in self._tensors.values():
            if not lent and not mine(tensor):
                continue
            now, kind = _snapshot(tensor, copy=False), "an argument" if lent else "a parameter"
            if not equal(now[0], before[0]):
                found.add(kind)
            if not equal(now[1], before[1]):
                found.add(f"the gradient of {kind}")
            if now[2] != before[2]:
                found.add(f"requires_grad of {kind}")
        return found

    def restore(self) -> None:
        with torch.no_grad():
            for tensor, data, (value, grad, requires_grad), _ in reversed(self._tensors.values()):
                data.copy_(value)
                if tensor.dtype != data.dtype:
                    tensor.data = data
                if tensor.is_leaf:
                    tensor.grad = grad
                    tensor.requires_grad_(requires_grad)
        for part, mode in self._modes.values():
            part.training = mode


# --- optimizers -------------------------------------------------------------------------------------------------------


def describe_optimizer(peer: "Peer", optimizer: torch.optim.Optimizer, encode: Encoder) -> dict:
    """Its class, its groups with their settings, and its state; parameters by the modules that they belong to."""
    known = peer.parameters()
    cls = next((c for c in type(optimizer).__mro__ if getattr(torch.optim, c.__name__, None) is c), None)
    return dict(
        type=cls.__name__ if cls else "",
        groups=[
            dict(
                params=[known.reference(p) for p in group["params"]],
                settings=[
                    [key, _told(value, encode)]
                    for key, value in group.items()
                    if key != "params" and _is_setting(value)
                ],
            )
            for group in optimizer.param_groups
        ],
        state=[
            [known.reference(p), [[key, _told(value, encode)] for key, value in state.items() if _is_setting(value)]]
            for p, state in optimizer.state.items()
        ],
    )


def _told(value: object, encode: Encoder) -> Any:
    return encode.number(value) if isinstance(value, Tensor) else encode(value)


def _is_setting(value: object) -> bool:
    return isinstance(value, Tensor) or _is_plain(value)


def rebuild_optimizer(peer: "Peer", told: dict, decode: Decoder) -> torch.optim.Optimizer:
    """The same optimizer over this side's parameters."""
    cls = getattr(torch.optim, told["type"], None)
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)) or cls is torch.optim.Optimizer:
        raise Violation("an optimizer of no class of torch.optim")
    made = cls.__new__(cls)
    with contextlib.suppress(Exception):
        torch.optim.Optimizer.__init__(made, [dict(params=[nn.Parameter(torch.zeros(()))])], {})
    update_optimizer(peer, made, told, decode)
    return made


def update_optimizer(peer: "Peer", optimizer: torch.optim.Optimizer, told: dict, decode: Decoder) -> None:
    """Take over groups, settings and state."""
    groups = []
    for group in told["groups"]:
        settings = {_name(key): decode(value) for key, value in group["settings"]}
        groups.append(settings | dict(params=[peer.parameter(reference) for reference in group["params"]]))
    optimizer.param_groups[:] = groups
    optimizer.defaults = {key: value for key, value in groups[0].items() if key != "params"} if groups else {}
    optimizer.state.clear()
    for reference, state in told["state"]:
        optimizer.state[peer.parameter(reference)] = {_name(key): decode(value) for key, value in state}
