"""Gradients through a call that the other side computes."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .peer import Peer

NODES = 200_000  # of a graph that is searched for leaves
ORDERS = 4  # of gradients of gradients, whose graphs grow with each


class Tape:
    """On the side that computes: the results of a call, and the tensors that they depend on."""

    def __init__(self, sources: Sequence[tuple[str, int, Tensor]], order: int = 0):
        self.order = order
        self._sources = {id(tensor): (kind, index) for kind, index, tensor in sources}
        self._held = [tensor for _, _, tensor in sources]  # so that no id is given out twice
        self.results: list[Tensor] = []
        self.leaves: list[Tensor] = []

    def close(self, results: Sequence[Tensor], parameter: Callable[[Tensor], tuple[str, str] | None]) -> list[Any]:
        """Find what the results depend on, and say so in terms that the other side knows."""
        self.results, told = list(results), []
        for leaf in self._reachable():
            source = self._sources.get(id(leaf)) or parameter(leaf)
            if source is not None and leaf.requires_grad and all(leaf is not known for known in self.leaves):
                self.leaves.append(leaf)
                told.append(list(source) if id(leaf) in self._sources else ["parameter", *source])
        return told

    def back(self, slopes: object, create: bool) -> list[Tensor | None]:
        """The gradients of the leaves, from those of the results."""
        if not isinstance(slopes, list) or len(slopes) != len(self.results):
            raise ValueError("one slope for each result")
        pairs = [(r, s) for r, s in zip(self.results, slopes, strict=True) if s is not None]
        if not pairs or not self.leaves:
            return [None] * len(self.leaves)
        results, given = zip(*pairs, strict=True)
        found = torch.autograd.grad(
            results, self.leaves, given, retain_graph=True, create_graph=create, allow_unused=True
        )
        return list(found)

    def _reachable(self) -> list[Tensor]:
        """The leaves of the graph, without recursion."""
        found, seen, waiting = [r for r in self.results if r.is_leaf], set(), [r.grad_fn for r in self.results]
        while waiting and len(seen) < NODES:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if hasattr(node, "variable"):
                found.append(node.variable)
            waiting += [before for before, _ in node.next_functions]
        return found


class _Bridge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, peer: "Peer", tape: str, values: list[Tensor], *sources: Tensor) -> tuple[Tensor, ...]:
        ctx.peer, ctx.tape, ctx.set = peer, tape, ctx.set_materialize_grads(False)
        ctx.save_for_backward(*sources)
        return tuple(value.detach() for value in values)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor | None) -> tuple[Tensor | None, ...]:
        sources = ctx.saved_tensors
        if ctx.tape is None:
            return None, None, None, *(None for _ in sources)
        return None, None, None, *ctx.peer.back(ctx.tape, slopes, sources)


def join(peer: "Peer", tape: str, results: Sequence[Tensor], sources: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The results as functions of the sources; of nothing, where they depend on what only the other side has."""
    with torch.enable_grad():
        if not any(source.requires_grad for source in sources):
            return _Bridge.apply(peer, None, list(results), torch.zeros((), requires_grad=True))
        return _Bridge.apply(peer, tape, list(results), *sources)
