"""The diffusion transformer (Peebles & Xie 2023): patches are tokens; time and label scale, shift and gate them."""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from .dit_blocks import AdaLNBlock, AdaLNZeroBlock, CrossAttentionBlock, InContextBlock, layer_norm, modulate
from .layers import LabelEmbedding, position_embedding, time_embedding, zero_init
from .shapes import Images, Labels, Time

# Peebles & Xie 2023, table 1. DiT-XL/2 on 32 x 32 latents: DiT(4, 32, 2, **CONFIGS["XL"], classes=1000).
CONFIGS = {
    "S": dict(dim=384, depth=12, heads=6),
    "B": dict(dim=768, depth=12, heads=12),
    "L": dict(dim=1024, depth=24, heads=16),
    "XL": dict(dim=1152, depth=28, heads=16),
}
TIME_FEATURES = 256
BLOCKS = {
    "adaLN-Zero": AdaLNZeroBlock,
    "adaLN": AdaLNBlock,
    "cross-attention": CrossAttentionBlock,
    "in-context": InContextBlock,
}


def patchify(x: Images, patch: int) -> Tensor:
    """(b, c, h, w) -> (b, h w / patch^2, patch^2 c): patches row by row; within a patch rows, columns, channels.

    Raises ValueError where the patches do not tile the picture.
    """
    b, channels, height, width = x.shape
    if height % patch or width % patch:
        raise ValueError(f"patches of {patch} do not tile a picture of shape {tuple(x.shape)}")
    x = x.reshape(b, channels, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, patch**2 * channels)


def unpatchify(tokens: Tensor, patch: int, height: int, width: int) -> Images:
    """(b, h w / patch^2, patch^2 c) -> (b, c, h, w), the inverse of `patchify`. Raises ValueError for other tokens."""
    b, m, features = tokens.shape
    rows, columns = height // patch, width // patch
    if m != rows * columns or features % patch**2:
        raise ValueError(
            f"{height} x {width} in patches of {patch} is (b, {rows * columns}, {patch**2} c), "
            f"got {tuple(tokens.shape)}"
        )
    x = tokens.reshape(b, rows, columns, patch, patch, features // patch**2)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, rows * patch, columns * patch)


class DiT(nn.Module):
    """Patches of (channels, size, size) pictures through `depth` blocks, all modulated by time plus label; or told of
    the two in another of the four published ways, by `conditioning`, to compare.

    As published, but for two things: queries, keys and values have no bias, and no variance is predicted, so the output
    has as many channels as the input. Raises ValueError for a size that patches do not tile, a conditioning that does
    not exist, and one other than adaLN-Zero with `context_dim`.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        patch: int,
        dim: int,
        depth: int,
        heads: int,
        classes: int | None = None,
        context_dim: int | None = None,
        *,
        conditioning: str = "adaLN-Zero",
    ):
        super().__init__()
        if size % patch:
            raise ValueError(f"patches of {patch} do not tile a side of {size}")
        if conditioning not in BLOCKS or (context_dim and conditioning != "adaLN-Zero"):
            beside = " that takes a context" if context_dim else ""
            raise ValueError(f"no conditioning {conditioning!r}{beside}: choose one of {', '.join(BLOCKS)}")
        self.channels, self.size, self.patch = channels, size, patch
        self.dim, self.heads, self.context_dim = dim, heads, context_dim
        self.time_mlp = nn.Sequential(nn.Linear(TIME_FEATURES, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label_embedding = LabelEmbedding(classes, dim) if classes else None
        self.stem = nn.Linear(patch**2 * channels, dim)
        positions = position_embedding(size // patch, size // patch, dim)
        self.register_buffer("positions", positions, persistent=False)  # fixed: neither trained nor saved
        self.conditioning = conditioning
        self.modulated = conditioning in ("adaLN-Zero", "adaLN")
        block, told = BLOCKS[conditioning], [context_dim] if context_dim else []
        self.blocks = nn.ModuleList(block(dim, heads, *told) for _ in range(depth))
        self.norm = layer_norm(dim)
        self.modulation = nn.Linear(dim, 2 * dim) if self.modulated else None
        self.head = nn.Linear(dim, patch**2 * channels)
        init_weights(self)

    @property
    def null(self) -> int:
        """The label that stands for no class. Raises ValueError for a network without classes."""
        if self.label_embedding is None:
            raise ValueError("this network has no classes, hence no null label")
        return self.label_embedding.null

    def forward(
        self,
        xt: Images,
        t: Time,
        *,
        label: Labels | None = None,
        context: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Images:
        """Raw output of the network's kind, shaped as xt. No label means the null label, for every example.

        Raises ValueError, naming the shapes, for pictures of another size and labels out of range.
        """
        self._check(xt, label)
        conditions = self.embed(t, label)
        x = self.stem(patchify(xt, self.patch)) + self.positions
        if self.conditioning == "in-context":
            x = torch.cat([conditions, x], dim=1)
        for block in self.blocks:
            x = block(x, *self._told(conditions, context, mask))
        x = self.norm(x[:, -len(self.positions) :])  # all tokens but those in context
        if self.modulated:
            shift, scale = self.modulation(F.silu(conditions.sum(1)))[:, None].chunk(2, dim=-1)
            x = modulate(x, shift, scale)
        return unpatchify(self.head(x), self.patch, self.size, self.size)

    def embed(self, t: Time, label: Labels | None = None) -> Tensor:
        """A vector of time and, with classes, one of the label: (b,), (b,) -> (b, 2, dim), else (b, 1, dim)."""
        time = self.time_mlp(time_embedding(t, TIME_FEATURES))
        if self.label_embedding is None:
            return time[:, None]
        label = torch.full(t.shape, self.null, device=t.device) if label is None else label
        return torch.stack([time, self.label_embedding(label)], dim=1)

    def _told(self, conditions: Tensor, context: Tensor | None, mask: Tensor | None) -> tuple[Tensor | None, ...]:
        """What a block takes beside x."""
        match self.conditioning:
            case "adaLN-Zero":
                return conditions.sum(1), context, mask
            case "adaLN":
                return (conditions.sum(1),)
            case "cross-attention":
                return (conditions,)
        return ()

    def _check(self, xt: Tensor, label: Tensor | None) -> None:
        if xt.shape[1:] != (self.channels, self.size, self.size):
            expected = f"(b, {self.channels}, {self.size}, {self.size})"
            raise ValueError(f"this network takes {expected}, got {tuple(xt.shape)}")
        if label is not None and self.label_embedding is None:
            raise ValueError("this network has no classes: build it with `classes` to use labels")
        if label is not None and not xt.is_cuda and ((label < 0) | (label > self.null)).any():
            raise ValueError(f"labels are 0 to {self.null - 1}, and {self.null} for none; got {label.tolist()}")


def init_weights(dit: DiT, generator: Generator | None = None) -> None:
    """Xavier for linear layers with biases 0, N(0, 0.02^2) for the embeddings of time and label; then zeros, last: the
    head, what modulates in adaLN-Zero, and what a context adds (Peebles & Xie 2023, section 3.2 and the authors' code).
    """
    for module in dit.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    tables = [] if dit.label_embedding is None else [dit.label_embedding.table]
    for layer in (dit.time_mlp[0], dit.time_mlp[2], *tables):
        nn.init.normal_(layer.weight, std=0.02, generator=generator)
    zero = dit.conditioning == "adaLN-Zero"
    crossings = [block.cross_attention.to_out for block in dit.blocks] if dit.context_dim else []
    modulations = [block.modulation for block in dit.blocks] + [dit.modulation] if zero else []
    for layer in (*modulations, *crossings, dit.head):
        zero_init(layer)
