"""The child's end of the calls: what frames each of them."""

import contextlib
from collections.abc import Iterator

import torch

from .peer import Peer
from .watching import Columns
from .wire import Wire


class ChildPeer(Peer):
    """Answers the judge, from a known random state, and undoes what a call does to torch's settings."""

    def __init__(self, wire: Wire):
        super().__init__(wire, "C", trusted=False)

    def show(self, handle: str, thing: object) -> None:
        """Let the judge call this by a handle that it knows beforehand."""
        self._exports[handle] = thing

    @contextlib.contextmanager
    def framed(self, header: dict) -> Iterator[None]:
        seed = header.get("seed")
        if self._depth == 1:
            self.share_random(seed)
        dtype = torch.get_default_dtype()
        self.watched = None
        columns = Columns(*header["watch"]) if header.get("watch") else contextlib.nullcontext()
        try:
            with torch.enable_grad(), columns:
                yield
        finally:
            if isinstance(columns, Columns):
                self.watched = [float(columns.widest), float(columns.held)]
            torch.set_default_dtype(dtype)
