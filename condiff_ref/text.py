"""Text as a condition: words to token ids, and a small transformer that turns those into a context to attend to."""

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor, nn

from .layers import Attention, zero_init
from .shapes import Images, Time

Tokens = Int[Tensor, "b n"]  # token ids
Mask = Bool[Tensor, "b n"]  # true where a token counts
Context = Float[Tensor, "b n e"]


class Vocabulary:
    """The words that captions may use. Token `pad` fills up a short caption, `null` alone is the empty caption "",
    which stands for no condition; the words follow in the order given.

    Punctuation marks are words too. Raises ValueError for none, doubled, and words that no caption splits into.
    """

    pad, null = 0, 1

    def __init__(self, words: Sequence[str]):
        doubled = sorted({word for word in words if words.count(word) > 1})
        broken = [word for word in words if _split(word) != [word]]
        if isinstance(words, str) or not words:
            raise ValueError(f"a vocabulary is a sequence of words, got {words!r}")
        if doubled or broken:
            raise ValueError(f"words are lower-case, single and different: doubled {doubled}, not a word {broken}")
        self.tokens = ("<pad>", "<null>", *words)  # by id, to label figures with
        self._ids = {word: i for i, word in enumerate(self.tokens) if i > self.null}

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, captions: Sequence[str], length: int) -> tuple[Tokens, Mask]:
        """Token ids and a mask, true where a token counts, (b, length) each; upper and lower case are alike.

        Nothing is cut off and nothing is skipped: raises ValueError, naming the caption, for one of over `length`
        tokens and for unknown words.
        """
        if isinstance(captions, str):
            raise ValueError(f"captions are a sequence of strings; for a single one write [{captions!r}]")
        ids = torch.full((len(captions), length), self.pad)
        for row, caption in zip(ids, captions, strict=True):
            words = _split(caption)
            unknown = [word for word in words if word not in self._ids]
            if unknown:
                names = ", ".join(map(repr, unknown))
                raise ValueError(f"unknown {names} in {caption!r}: the words are {' '.join(self._ids)}")
            tokens = [self._ids[word] for word in words] or [self.null]
            if len(tokens) > length:
                raise ValueError(f"{caption!r} has {len(tokens)} tokens, and there is room for {length}")
            row[: len(tokens)] = torch.tensor(tokens)
        return ids, ids != self.pad


class TextEncoder(nn.Module):
    """Token ids to vectors that know their neighbours: a transformer that reads in both directions (Vaswani et al.
    2017, section 3), with learned positions and the norm before each branch (Xiong et al. 2020, figure 1b).

    `length` is that of the longest caption it can read. Depth 0 mixes nothing: each vector knows its word and place.
    """

    def __init__(self, vocabulary: Vocabulary, dim: int, depth: int, heads: int, *, length: int = 32):
        super().__init__()
        self.pad, self.length = vocabulary.pad, length
        self.word = nn.Embedding(len(vocabulary), dim)
        self.place = nn.Embedding(length, dim)
        self.blocks = nn.ModuleList(TextBlock(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, ids: Tokens) -> Context:
        """(b, n) -> (b, n, dim), zero at the pads, whose number changes no other vector. A network that attends to the
        pads too finds nothing there, but may come to count on them: hand it the mask, or keep `length` as in training.

        Raises ValueError for more than `length` tokens, for a row of nothing but pads (the empty caption is the null
        token), and for ids beyond the vocabulary.
        """
        self._check(ids)
        mask = ids != self.pad
        x = self.word(ids) + self.place.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x) * mask[:, :, None]

    def _check(self, ids: Tensor) -> None:
        if ids.shape[1] > self.length:
            raise ValueError(f"this encoder reads up to {self.length} tokens, got {tuple(ids.shape)}")
        if ids.is_cuda:  # looking at the values would wait for the device
            return
        if ((ids < 0) | (ids >= self.word.num_embeddings)).any():
            raise ValueError(f"token ids are 0 to {self.word.num_embeddings - 1}, got {ids.min()} to {ids.max()}")
        if (ids == self.pad).all(dim=1).any():
            raise ValueError("a caption of pads alone leaves nothing to attend to: the empty one is the null token")


class TextBlock(nn.Module):
    """Self-attention, then two layers on each token, each added to its input."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Context, mask: Mask) -> Context:
        """(b, n, dim), (b, n) -> (b, n, dim)."""
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.mlp(self.norm2(x))


class TextToImage(nn.Module):
    """A text encoder and a network that attends to what it says; a caption, as token ids, is the label."""

    def __init__(self, text: TextEncoder, unet: nn.Module):
        super().__init__()
        self.text, self.unet = text, unet
        null = torch.full((text.length,), Vocabulary.pad)
        null[0] = Vocabulary.null
        self.register_buffer("null", null, persistent=False)  # the empty caption, (n,)

    def forward(self, xt: Images, t: Time, *, label: Int[Tensor, "captions n"] | None = None) -> Images:
        """Raw output of the network's kind, shaped as xt. No label means the empty caption, for every example.

        Raises ValueError, naming the shapes, where there is not one caption for each picture.
        """
        context, mask = self._read(label, len(xt))
        return self.unet(xt, t, context=context, mask=mask)

    @torch.no_grad()
    def weights(self, xt: Images, t: Time, label: Tokens | None = None) -> Float[Tensor, "b heads m n"]:
        """Which words each of the m pixels of the U-Net's lowest resolution attends to, row by row."""
        context, mask = self._read(label, len(xt))
        seen = []
        handle = self.unet.attention.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
        try:
            self.unet(xt, t, context=context, mask=mask)
        finally:
            handle.remove()
        return self.unet.attention.weights(seen[0], context, mask)

    def _read(self, label: Tensor | None, n: int) -> tuple[Context, Mask]:
        ids = self.null.expand(n, -1) if label is None else label
        if len(ids) != n:
            raise ValueError(f"{n} pictures need {n} captions, got token ids of shape {tuple(ids.shape)}")
        return self.text(ids), ids != Vocabulary.pad


def bind(
    text: TextEncoder,
    ids: Tokens,
    subjects: Int[Tensor, " k"],
    offsets: Sequence[int],
    steps: int,
    *,
    seed: int = 0,
    batch_size: int = 64,
    lr: float = 3e-3,
) -> float:
    """Teach an encoder that words belong together, on the captions `ids`: from the vector of each token that is one of
    `subjects`, a linear map must tell the tokens at these offsets from it. Returns the loss of the last step.

    Adam, with a learning rate that falls linearly to 0. Raises ValueError where an offset leads out of a caption.
    """
    gen = Generator().manual_seed(seed)
    read = zero_init(nn.Linear(text.word.embedding_dim, len(offsets) * text.word.num_embeddings))
    optimizer = torch.optim.Adam([*text.parameters(), *read.parameters()], lr)
    for step in range(steps):
        chosen = ids[torch.randint(len(ids), (batch_size,), generator=gen)]
        rows, places = torch.isin(chosen, subjects).nonzero(as_tuple=True)
        asked = places[:, None] + torch.tensor(offsets)
        if asked.min() < 0 or asked.max() >= ids.shape[1]:
            raise ValueError(f"offsets {tuple(offsets)} lead out of captions of {ids.shape[1]} tokens")
        logits = read(text(chosen)[rows, places]).unflatten(1, (len(offsets), -1))
        loss = F.cross_entropy(logits.flatten(0, 1), chosen[rows[:, None], asked].flatten())
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def _split(caption: str) -> list[str]:
    """Words and punctuation marks, in lower case."""
    return re.findall(r"\w+|[^\w\s]", caption.lower())
