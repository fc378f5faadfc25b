"""Stand-ins for what lives in the other process: functions, modules, and anything else."""

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from .peer import Peer


class RemoteFunction:
    """Something that can be called: each call is answered by the other side."""

    def __init__(self, peer: "Peer", handle: str, name: str):
        self._peer, self._handle = peer, handle
        self.__name__ = self.__qualname__ = name

    def __call__(self, *args: object, **kwargs: object) -> object:
        return self._peer.call(self._handle, "", args, kwargs)

    def __deepcopy__(self, memo: dict) -> "RemoteFunction":
        return self

    def __repr__(self) -> str:
        return f"<function {self.__name__}>"


class RemoteObject:
    """An object of the other side. Its attributes are asked for one by one."""

    _peer: "Peer"
    _handle: str

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._peer.get(self._handle, "", name)

    def __deepcopy__(self, memo: dict) -> object:
        return self._peer.copy(self._handle, "")

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"


class RemoteCallable(RemoteObject):
    """One that can be called, too."""

    def __call__(self, *args: object, **kwargs: object) -> object:
        return self._peer.call(self._handle, "", args, kwargs)


class RemoteModule(nn.Module):
    """A module whose parameters are here, and in step with those of the module that they are of, which computes."""

    def forward(self, *args: object, **kwargs: object) -> object:
        return self._peer.call(self._handle, self._path, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "_peer" not in self.__dict__:
                raise
            if not self._peer.trusted:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}") from None
        return self._peer.get(self._handle, self._path, name)

    def __deepcopy__(self, memo: dict) -> nn.Module:
        found = self._peer.copy(self._handle, self._path)
        memo[id(self)] = found
        return found

    def extra_repr(self) -> str:
        return ""


def object_like(peer: "Peer", handle: str, name: str, is_callable: bool) -> RemoteObject:
    """A stand-in whose type has the name of the object's own type, for messages."""
    base = RemoteCallable if is_callable else RemoteObject
    made = type(name if name.isidentifier() else "object", (base,), {})()
    made._peer, made._handle = peer, handle
    return made


def module_like(peer: "Peer", handle: str, path: str, name: str, torch_name: str | None) -> RemoteModule:
    """A module without parts yet. It is an instance of the class of torch.nn that the original's class extends."""
    bases: tuple[type, ...] = (RemoteModule,)
    known = torch_class(torch_name)
    if known is not None and known is not nn.Module:
        bases = (RemoteModule, known)
    cls = type(name if name.isidentifier() else "Module", bases, {})
    made = cls.__new__(cls)
    nn.Module.__init__(made)
    made.__dict__.update(_peer=peer, _handle=handle, _path=path)
    return made


def torch_class(name: str | None) -> type[nn.Module] | None:
    """The class torch.nn.NAME."""
    found = getattr(nn, name, None) if isinstance(name, str) else None
    return found if isinstance(found, type) and issubclass(found, nn.Module) else None
