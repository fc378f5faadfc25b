"""Looks on while a function computes: beside it, in whichever process that is."""

import weakref

from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class Columns(TorchFunctionMode):
    """Watches what is computed from queries (b, n, d), keys (b, tokens, d) and values (b, tokens, e): how many columns
    of the n x tokens matrix stand in one tensor (`widest`), and in all tensors that exist at one time (`held`)."""

    def __init__(self, b: int, n: int, tokens: int, d: int, e: int):
        super().__init__()
        self.settings = [b, n, tokens, d, e]
        self.b, self.n, self.tokens, self.widths = b, n, tokens, (1, d, e)
        self.alive: list[weakref.ref] = []
        self.widest = self.held = 0.0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        new = [x for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, Tensor)]
        self.widest = max([self.widest, *map(self._columns, new)])
        if func is F.scaled_dot_product_attention:  # what it makes does not show
            keys = args[1] if len(args) > 1 else (kwargs or {})["key"]
            self.widest = max(self.widest, keys.shape[-2])
        alive = [x for one in self.alive if (x := one()) is not None] + [x for x in new if self._columns(x)]
        self.held = max(self.held, sum({x.untyped_storage().data_ptr(): self._columns(x) for x in alive}.values()))
        self.alive = [weakref.ref(x) for x in alive]
        return out

    def _columns(self, x: Tensor) -> float:
        """0 for what has the shape of queries, keys, values, sums and results."""
        if x.ndim < 2 or x.shape[-1] in self.widths or x.shape[-2] in self.widths:
            return 0.0
        if self.tokens in x.shape:  # of some of the queries, perhaps
            return float(self.tokens)
        return x.numel() / (self.b * self.n) if self.n in x.shape else 0.0
