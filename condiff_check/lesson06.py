"""Exercises of lesson 06: captions as tokens, cross-attention and its cost, and what a picture owes to each word."""

import math
import re
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.utils.flop_counter import mm_flop, sdpa_flop_count

from condiff_ref import scenes
from condiff_ref.cost import attention_layer_cost
from condiff_ref.text import Vocabulary

from .agent.watching import Columns
from .compare import close, plain
from .draws import integer, randn
from .exercise import Answer, Exercise, Fact, Mistake, Wrong, need
from .guard import Failed
from .testing import test_exercise

# --- the reference answers, as the solutions show them ----------------------------------------------------------------


def encode(captions: Sequence[str], vocab: dict[str, int], length: int) -> tuple[Tensor, Tensor]:
    """Captions as token ids (B, length), filled up with the id of "<pad>", and a mask (B, length), True at the tokens.

    Words are separated by spaces; captions may have capitals, while `vocab` is all lower-case. A comma is a token of
    its own, also right behind a word. The empty caption "" is the single token "<null>", which counts. Raises
    ValueError for a word that is not in `vocab` and for a caption of more than `length` tokens.
    """
    ids = torch.full((len(captions), length), vocab["<pad>"])
    mask = torch.zeros(len(captions), length, dtype=torch.bool)
    for i, caption in enumerate(captions):
        words = caption.lower().replace(",", " , ").split() or ["<null>"]
        unknown = [word for word in words if word not in vocab]
        if unknown:
            raise ValueError(f"not in the vocabulary: {unknown}")
        if len(words) > length:
            raise ValueError(f"{caption!r} has {len(words)} tokens, and there is room for {length}")
        ids[i, : len(words)] = torch.tensor([vocab[word] for word in words])
        mask[i, : len(words)] = True
    return ids, mask


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """For each query a mixture of the values: softmax(q k^T / sqrt(d)) v, over the tokens that the mask lets through.

    q (B, N, d), k (B, L, d), v (B, L, e), mask (B, L), True where a token counts, at least once per example ->
    (B, N, e). Scores may be in the thousands.
    """
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~mask[:, None, :], -math.inf)
    return scores.softmax(dim=-1) @ v


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, C) -> (B, heads, N, C / heads): head i has the i-th run of C / heads neighbouring channels.

    Raises ValueError where heads do not divide C.
    """
    b, n, c = x.shape
    if c % heads:
        raise ValueError(f"{heads} heads do not divide {c} channels")
    return x.reshape(b, n, heads, c // heads).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """The way back: (B, heads, N, C / heads) -> (B, N, C)."""
    b, heads, n, c = x.shape
    return x.transpose(1, 2).reshape(b, n, heads * c)


def attn_cost(n: int, tokens: int, dim: int, heads: int, context_dim: int, bytes_per: int) -> dict[str, int]:
    """What one layer of cross-attention costs for one example: n pixels of width dim attend to so many tokens, of width
    context_dim.

    "core": multiply-adds of q k^T and of its product with v, over all heads, which share the dim channels evenly.
    "proj": multiply-adds of the four linear maps without biases: queries and output dim -> dim, keys and values
    context_dim -> dim. "flops": of core and proj together. "matrix_bytes": of the attention weights of all heads, at
    bytes_per bytes a number.
    """
    core = 2 * n * tokens * dim
    proj = 2 * n * dim * dim + 2 * tokens * context_dim * dim
    return {"core": core, "proj": proj, "flops": 2 * (core + proj), "matrix_bytes": heads * n * tokens * bytes_per}


def chunked_attention(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) v without ever holding more than `chunk` columns of the (B, N, L) matrix.

    q (B, N, d), k (B, L, d), v (B, L, e) -> (B, N, e). The last chunk may be shorter. Scores may be in the thousands.
    """
    top = torch.full_like(q[:, :, :1], -math.inf)  # the largest score so far, of each query
    total, out = torch.zeros_like(top), torch.zeros(*q.shape[:2], v.shape[2]).to(v)
    for keys, values in zip(k.split(chunk, dim=1), v.split(chunk, dim=1), strict=True):
        scores = q @ keys.transpose(1, 2) / math.sqrt(q.shape[-1])
        higher = torch.maximum(top, scores.amax(dim=-1, keepdim=True))
        weights, shrink = (scores - higher).exp(), (top - higher).exp()  # what came before was measured from `top`
        total = shrink * total + weights.sum(dim=-1, keepdim=True)
        out = shrink * out + weights @ values
        top = higher
    return out / total


def token_map(weights: Tensor, token: int, height: int, width: int) -> Tensor:
    """Where the picture looks at one token: its attention weights as a picture, averaged over heads.

    weights (B, heads, height * width, L), pixels row by row -> (B, height, width).
    """
    return weights[..., token].mean(dim=1).reshape(-1, height, width)


def localisation(heat: Tensor, box: tuple[int, int, int, int]) -> Tensor:
    """The share of each heat map's total that lies in the box (top, left, bottom, right), bottom and right excluded.

    heat (B, height, width), not negative -> (B,).
    """
    top, left, bottom, right = box
    return heat[:, top:bottom, left:right].sum(dim=(1, 2)) / heat.sum(dim=(1, 2))


def drop_caption(ids: Tensor, mask: Tensor, p: float, pad: int, null: int, gen: Generator) -> tuple[Tensor, Tensor]:
    """Replace each caption as a whole, with probability p and each on its own, by the empty one.

    The empty caption is the token `null`, then `pad`s; only its first token counts. ids and mask (B, L); neither is
    changed in place. gen lives on the CPU: draw there, then go where ids are.
    """
    dropped = (torch.rand(len(ids), generator=gen) < p).to(ids.device)[:, None]
    first = torch.arange(ids.shape[1], device=ids.device) == 0
    empty = torch.where(first, null, pad)
    return torch.where(dropped, empty, ids), torch.where(dropped, first, mask)


def token_swap(sample: Callable, judge: Callable, captions: Sequence[str], swapped: Sequence[str], seed: int) -> float:
    """The token-swap test: the share of pairs of captions of which both pictures are right.

    A pair is captions[i] and swapped[i], which has its two digit words exchanged. Captions that the swap leaves as they
    are say nothing, and are left out. Both pictures of a pair start from the same noise, different pairs from different
    noise. sample(captions, generator) -> (n, ...) draws one picture for each caption, all noise from the generator, the
    i-th caption's as the i-th. judge(pictures, captions) -> (n,) bool, True for a picture that shows all its caption
    says. Raises ValueError where no caption changes.
    """
    pairs = [(one, other) for one, other in zip(captions, swapped, strict=True) if one != other]
    if not pairs:
        raise ValueError("no caption changes when its digits are exchanged")
    right = []
    for some in zip(*pairs, strict=True):
        pictures = sample(list(some), torch.Generator().manual_seed(seed))
        right.append(judge(pictures, list(some)))
    return (right[0] & right[1]).double().mean().item()


def my_attention_test(attention: Callable) -> None:
    """Raise an AssertionError if attention(q, k, v, mask) is not what exercise 06.2 asks for; else return None."""
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, *shape, generator=gen) for shape in ((5, 4), (3, 4), (3, 6)))
    mask = torch.tensor([[True, True, True], [True, True, False]])
    out = attention(q, k, v, mask)
    assert out.shape == (2, 5, 6)
    weights = (q @ k.transpose(1, 2) / 2).masked_fill(~mask[:, None], -math.inf).softmax(-1)
    assert torch.allclose(out, weights @ v, atol=1e-5), "softmax over the tokens of q k^T / sqrt(d)"
    ones = attention(q, k, torch.ones_like(v), mask)
    assert torch.allclose(ones, torch.ones_like(ones), atol=1e-5), "the weights of a query add up to 1"
    other = torch.where(mask[:, :, None], v, 100.0)
    assert torch.allclose(attention(q, k, other, mask), out, atol=1e-4), "a masked token's value counts for nothing"


# --- what several exercises share -------------------------------------------------------------------------------------


def _refused(answer: Answer, name: str, args: Sequence[object], said: str) -> None:
    """Raise Wrong unless the answer raises ValueError; `said` is the situation, in words."""
    try:
        answer.call(name, *args)
    except Failed as error:
        if not str(error).startswith("ValueError"):
            raise Wrong(f"{said}: a ValueError is due, and yours raised {error}") from None
        return
    raise Wrong(f"{said}: a ValueError is due, and yours returned something instead")


def _outcome(answer: Answer, name: str, *args: object) -> object:
    """The result as plain data, or the type of the error."""
    try:
        return plain(answer.call(name, *args))
    except Failed as error:
        return str(error).partition(":")[0]


def _gen(g: Generator) -> Generator:
    return Generator().manual_seed(integer(g, 0, 10**6))


# --- 06.1 encode ------------------------------------------------------------------------------------------------------

_VOCAB = {"small": 3, "a": 0, "<pad>": 7, "two": 5, ",": 2, "<null>": 4, "three": 6, "large": 1, "at": 8}


def _spelled(ids: Sequence[int]) -> str:
    names = {i: word for word, i in _VOCAB.items()}
    return " ".join(names.get(int(i), f"[{int(i)}]") for i in ids)


def _encode_inputs(g: Generator) -> dict:
    words = ["a", "at", "the", "small", "large", "top", "left", "two", "three", "seven"]
    order = torch.randperm(len(words), generator=g).tolist()
    tokens = [words[order[0]], "<pad>", *(words[i] for i in order[1:5]), ",", "<null>", *(words[i] for i in order[5:])]
    captions = [" ".join(words[integer(g, 0, len(words) - 1)] for _ in range(n)) for n in (3, 1, 5, 2)]
    return {"encode": dict(captions=captions, vocab={token: i for i, token in enumerate(tokens)}, length=7)}


def _encode_row(answer: Answer, caption: str, length: int) -> tuple[list[int], list[bool]]:
    ids, mask = answer([caption], dict(_VOCAB), length)
    return ids[0].tolist(), [bool(m) for m in mask[0]]


def _encode_words(answer: Answer, g: Generator) -> None:
    for caption in ("small two", "a large three", "at"):
        words = caption.split()
        ids, _ = _encode_row(answer, caption, 5)
        if ids[: len(words)] != [_VOCAB[word] for word in words]:
            raise Wrong(
                f'"{caption}" comes out as "{_spelled(ids)}", ids {ids}: the words belong first, in their order'
            )


def _encode_pads(answer: Answer, g: Generator) -> None:
    for caption in ("small two", "a large three"):
        ids, _ = _encode_row(answer, caption, 6)
        rest = ids[len(caption.split()) :]
        if any(i != _VOCAB["<pad>"] for i in rest):
            raise Wrong(
                f'"{caption}" at length 6 comes out as "{_spelled(ids)}", ids {ids}: after the words belong pads '
                f'alone, and the id of "<pad>" is {_VOCAB["<pad>"]} in this vocabulary'
            )


def _encode_mask(answer: Answer, g: Generator) -> None:
    for caption in ("small two", "a large three"):
        n = len(caption.split())
        _, mask = _encode_row(answer, caption, 5)
        if mask != [i < n for i in range(5)]:
            what = (
                "it is the other way round" if mask == [i >= n for i in range(5)] else f"True belongs at its {n} words"
            )
            raise Wrong(f'"{caption}" at length 5 has the mask {mask}: {what}', expected=str([i < n for i in range(5)]))


def _encode_comma(answer: Answer, g: Generator) -> None:
    right = [_VOCAB[word] for word in ("a", "two", ",", "a", "three")]
    for caption in ("a two , a three", "a two, a three"):
        ids, mask = _encode_row(answer, caption, 7)
        if ids[:5] != right or sum(mask) != 5:
            raise Wrong(
                f'"{caption}" comes out as "{_spelled(ids)}" with {sum(mask)} True in its mask: it has five tokens, '
                "and the comma is the third"
            )


def _encode_capitals(answer: Answer, g: Generator) -> None:
    one, other = _encode_row(answer, "A Large THREE", 5), _encode_row(answer, "a large three", 5)
    if one != other:
        raise Wrong(f'"A Large THREE" comes out as "{_spelled(one[0])}", "a large three" as "{_spelled(other[0])}"')


def _encode_empty(answer: Answer, g: Generator) -> None:
    ids, mask = _encode_row(answer, "", 4)
    if not any(mask):
        raise Wrong(
            f'the empty caption comes out as "{_spelled(ids)}" with no True in its mask: attention would take a '
            "softmax over no token at all, which is NaN"
        )
    if ids != [_VOCAB["<null>"]] + [_VOCAB["<pad>"]] * 3 or mask != [True, False, False, False]:
        raise Wrong(f'the empty caption comes out as "{_spelled(ids)}", mask {mask}: it is the token <null>, then pads')


def _encode_length(answer: Answer, g: Generator) -> None:
    ids, mask = _encode_row(answer, "a small two", 3)
    if ids != [_VOCAB[word] for word in ("a", "small", "two")] or not all(mask):
        raise Wrong(f'"a small two" fits length 3, and comes out as "{_spelled(ids)}", mask {mask}')
    said = 'at length 3, "a small two, a large three" is too long by four tokens'
    _refused(answer, "encode", (["a small two, a large three"], dict(_VOCAB), 3), said)
    said = 'at length 3, "a small two ," is too long by its comma'
    _refused(answer, "encode", (["a small two ,"], dict(_VOCAB), 3), said)


def _encode_unknown(answer: Answer, g: Generator) -> None:
    said = '"zebra" in "a small zebra" is not in the vocabulary'
    _refused(answer, "encode", (["small two", "a small zebra"], dict(_VOCAB), 6), said)


def _encode_types(answer: Answer, g: Generator) -> None:
    ids, mask = answer(["small two"], dict(_VOCAB), 4)
    if ids.dtype != torch.int64:
        raise Wrong(f"the ids are {ids.dtype}; token ids are integers, torch.int64")
    if mask.dtype != torch.bool:
        raise Wrong(f"the mask is {mask.dtype}; as torch.bool it can be negated by ~ and passed to masked_fill")


def _encode_course(answer: Answer, g: Generator) -> None:
    """Scenes' own captions, by the course's own vocabulary, which splits them by another route."""
    vocabulary = Vocabulary(scenes.WORDS)
    captions = [*scenes.scenes(12, Generator().manual_seed(integer(g, 0, 999))).captions, ""]
    vocab = {word: i for i, word in enumerate(vocabulary.tokens)}
    ids, mask = answer(captions, vocab, scenes.LENGTH)
    right_ids, right_mask = vocabulary.encode(captions, scenes.LENGTH)
    for caption, *rows in zip(captions, ids, mask, right_ids, right_mask, strict=True):
        got_ids, got_mask, due_ids, due_mask = (row.tolist() for row in rows)
        if got_ids != due_ids:
            tokens = " ".join(vocabulary.tokens[i] if 0 <= i < len(vocabulary) else f"[{i}]" for i in got_ids)
            raise Wrong(f'"{caption}" comes out as "{tokens}", within a batch of {len(captions)}')
        if got_mask != due_mask:
            raise Wrong(f'"{caption}" has {sum(got_mask)} True in its mask, within a batch of {len(captions)}')


def _encode_by(
    split: Callable[[str], list[str]] = lambda caption: caption.lower().replace(",", " , ").split(),
    empty: str | None = "<null>",
    pad: Callable[[dict], int] = lambda vocab: vocab["<pad>"],
    mask: Callable[[Tensor, Tensor, dict], Tensor] = lambda mask, ids, vocab: mask,
    cut: bool = False,
    skip: bool = False,
    left: bool = False,
) -> tuple[Callable]:
    def encode(captions: Sequence[str], vocab: dict[str, int], length: int) -> tuple[Tensor, Tensor]:
        rows = [split(caption) or ([empty] if empty else []) for caption in captions]
        rows = [[word for word in row if word in vocab or not skip][: length if cut else None] for row in rows]
        if any(len(row) > length or any(word not in vocab for word in row) for row in rows):
            raise ValueError("too long or unknown")
        fill = [[pad(vocab)] * (length - len(row)) for row in rows]
        known = [[vocab[word] for word in row] for row in rows]
        ids = [f + k if left else k + f for k, f in zip(known, fill, strict=True)]
        counts = torch.tensor([len(row) for row in rows])[:, None]
        place = torch.arange(length).flip(0) if left else torch.arange(length)
        ids = torch.tensor(ids)
        return ids, mask(place < counts, ids, vocab)

    return (encode,)


def _encode_longest(captions: Sequence[str], vocab: dict[str, int], length: int) -> tuple[Tensor, Tensor]:
    ids, mask = encode(captions, vocab, length)
    longest = int(mask.sum(1).max())
    return ids[:, :longest], mask[:, :longest]


def _encode_regex(captions: Sequence[str], vocab: dict[str, int], length: int) -> tuple[Tensor, Tensor]:
    rows = []
    for caption in captions:
        try:
            row = [vocab[word.lower()] for word in re.findall(r"[^\s,]+|,", caption)]
        except KeyError as error:
            raise ValueError(f"unknown word {error}") from error
        row = row if row else [vocab["<null>"]]
        if len(row) > length:
            raise ValueError("too long")
        rows.append(row)
    ids = torch.tensor([row + [vocab["<pad>"]] * (length - len(row)) for row in rows], dtype=torch.long)
    return ids, ids.ne(vocab["<pad>"])


def _encode_loop(captions: Sequence[str], vocab: dict[str, int], length: int) -> tuple[Tensor, Tensor]:
    ids = torch.zeros(len(captions), length, dtype=torch.int64)
    mask = torch.zeros(len(captions), length) > 0
    for i, caption in enumerate(captions):
        words = []
        for word in caption.split():
            words += [word[:-1], ","] if word.endswith(",") and len(word) > 1 else [word]
        words = [word.lower() for word in words]
        if not words:
            words.append("<null>")
        if not set(words) <= set(vocab) or len(words) > length:
            raise ValueError(caption)
        for j in range(length):
            ids[i, j] = vocab[words[j]] if j < len(words) else vocab["<pad>"]
            mask[i, j] = j < len(words)
    return ids, mask


def _encode_see(answer: Answer, g: Generator) -> object:
    tries = (("small two", 5), ("a two , a three", 7), ("a two, a three", 7), ("A Large THREE", 5), ("", 4))
    tries += (("a small two", 3), ("a small two ,", 3), ("a small zebra", 6))
    return [_outcome(answer, "encode", [caption], dict(_VOCAB), length) for caption, length in tries]


ENCODE = Exercise(
    id="06.1",
    names=("encode",),
    references=(encode,),
    inputs=_encode_inputs,
    without=("keeps the dtype of its inputs",),  # they are strings; the types of the results are looked at
    facts=(
        Fact("each word becomes its id, in its place", _encode_words, "vocab is a dict: vocab[word]"),
        Fact("the rest is <pad>", _encode_pads, "torch.full makes a tensor full of one number; which one?"),
        Fact("the mask is True at the tokens", _encode_mask, "True means: this one counts"),
        Fact(
            "a comma is a token, with or without a space before it", _encode_comma, "split() parts words at spaces only"
        ),
        Fact("capitals make no difference", _encode_capitals, "str.lower()"),
        Fact("the empty caption is <null>, which counts", _encode_empty, "what does split() give for an empty string?"),
        Fact(
            "`length` tokens fit, and one more raises ValueError",
            _encode_length,
            "slicing is silent: a caption that is cut is another caption",
        ),
        Fact(
            "an unknown word raises ValueError",
            _encode_unknown,
            "which error does a dict raise, and is it the one asked for?",
        ),
        Fact("ids are integers, the mask is boolean", _encode_types, "dtype=torch.bool"),
        Fact("the course's own captions, in one batch", _encode_course, "each caption fills a row of its own"),
    ),
    mistakes=(
        Mistake(
            "0 for <pad>",
            "Short captions are filled up with 0, and 0 is the id of a word here: the caption seems to repeat that "
            'word. The id to fill with is vocab["<pad>"].',
            _encode_by(pad=lambda vocab: 0),
        ),
        Mistake(
            "<null> for <pad>",
            "Short captions are filled up with <null>, the token of the empty caption: each would say a little of "
            '"no condition" too. The id to fill with is vocab["<pad>"].',
            _encode_by(pad=lambda vocab: vocab["<null>"]),
        ),
        Mistake(
            "mask inverted",
            "The mask is the other way round, True at the pads: attention would read nothing but pads.",
            _encode_by(mask=lambda mask, ids, vocab: ~mask),
        ),
        Mistake(
            "pads count",
            "The mask is True everywhere: the pads count as if they had been said.",
            _encode_by(mask=lambda mask, ids, vocab: torch.ones_like(mask)),
        ),
        Mistake(
            "silent truncation",
            "Long captions are cut off without a word: the end of the sentence never reaches the picture, and nobody "
            "is told. Raise ValueError instead.",
            _encode_by(cut=True),
        ),
        Mistake(
            "empty caption of pads alone",
            "The empty caption becomes nothing but pads, and its mask has no True: a softmax over no token at all is "
            "NaN, and the whole picture with it. The token <null> is there for that.",
            _encode_by(empty=None),
        ),
        Mistake(
            "<null> masked",
            "The empty caption is <null>, but its mask has no True: <null> must count, or there is nothing to attend "
            "to.",
            _encode_by(mask=lambda mask, ids, vocab: mask & (ids != vocab["<null>"])),
        ),
        Mistake(
            "commas lost",
            "Commas are dropped. They are tokens as any other, and separate what is said of one digit from the next.",
            _encode_by(split=lambda caption: caption.lower().replace(",", " ").split()),
        ),
        Mistake(
            "comma stuck to its word",
            'A comma right behind a word stays stuck to it, so that "two," is no known word: part them before you '
            "split at spaces.",
            _encode_by(split=lambda caption: caption.lower().split()),
        ),
        Mistake(
            "capitals kept",
            'The words of `vocab` are lower-case, and yours are looked up as they were written, so that "Large" is not '
            "found.",
            _encode_by(split=lambda caption: caption.replace(",", " , ").split()),
        ),
        Mistake(
            "unknown words skipped",
            'Unknown words are skipped: "a small zebra" becomes "a small", another caption, and nobody is told. Raise '
            "ValueError instead.",
            _encode_by(skip=True),
        ),
        Mistake(
            "padded on the left",
            "The pads stand before the words. Here they follow: an encoder gives each place a meaning of its own.",
            _encode_by(left=True),
        ),
        Mistake(
            "as long as the longest",
            "The rows are as long as the longest caption of the batch, not `length`: what a caption becomes would "
            "depend on its batch mates.",
            (_encode_longest,),
        ),
    ),
    alternatives=((_encode_regex,), (_encode_loop,)),
    hints=(
        "Make the tokens of one caption first: lower case, commas set apart by spaces, split(), and one special case. "
        "Check them. Then write them into the first places of a row that is full of pads.",
        'words = caption.lower().replace(",", " , ").split() or ["<null>"]; ValueError if one is not in vocab or there '
        "are more than length; ids[i, :len(words)] = their ids, mask[i, :len(words)] = True.",
    ),
    hides=("text.Vocabulary",),
    probe=_encode_see,
)

# --- 06.2 attention ---------------------------------------------------------------------------------------------------


def _attention_case(g: Generator, b: int = 3, n: int = 5, tokens: int = 6, d: int = 4, e: int = 7) -> dict:
    """q, k, v and a mask with at least two True and one False per example, anywhere."""
    count = torch.randint(2, tokens, (b, 1), generator=g)
    mask = torch.rand(b, tokens, generator=g).argsort(dim=1) < count
    return dict(q=randn(g, b, n, d), k=randn(g, b, tokens, d), v=randn(g, b, tokens, e), mask=mask)


def _attention_inputs(g: Generator) -> dict:
    return {"attention": _attention_case(g)}


def _weights_of(answer: Answer, q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """With the identity for values, the result is the attention matrix itself: (b, n, tokens)."""
    eye = torch.eye(k.shape[1], dtype=k.dtype).expand(len(k), -1, -1).clone()
    return answer(q, k, eye, mask).detach()


def _attention_sums(answer: Answer, g: Generator) -> None:
    case = _attention_case(g)
    every = torch.ones_like(case["mask"])
    weights = _weights_of(answer, case["q"], case["k"], every)
    rows, columns = weights.sum(2), weights.sum(1)
    said = "with the identity for v, the result is the matrix of weights; without a masked token"
    if close(columns, torch.ones_like(columns), rtol=1e-5):
        raise Wrong(
            f"{said} its COLUMNS add up to 1: the softmax runs over the queries, so that pixels share out a word"
        )
    if not close(rows, torch.ones_like(rows), rtol=1e-5):
        raise Wrong(f"{said} its rows add up to {_range(rows)}: each query shares out a weight of 1 among the tokens")
    if (weights < 0).any():
        raise Wrong(f"{said} it has negative entries, down to {float(weights.min()):.3g}")


def _range(values: Tensor) -> str:
    low, high = float(values.min()), float(values.max())
    if math.isnan(low):
        return "NaN"
    return f"{low:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g} to {high:.3g}"


def _attention_average(answer: Answer, g: Generator) -> None:
    """A query of zeros has no preference."""
    case = _attention_case(g)
    mask, v = case["mask"], case["v"]
    out = answer(0 * case["q"], case["k"], v, mask)
    due = torch.stack([value[keep].mean(0) for value, keep in zip(v, mask, strict=True)])
    everything, sums = v.mean(1), torch.stack([value[keep].sum(0) for value, keep in zip(v, mask, strict=True)])
    said = "queries of zeros prefer no token, and must get the plain average of the values that count; yours get"
    if not close(plain(out), due[:, None].expand_as(out) if out.shape[::2] == due.shape else due):
        for other, name in (
            (everything, "the average of all values, masked ones too"),
            (sums / mask.shape[1], "the sum of the values that count, divided by the number of all tokens"),
            (sums, "the sum of the values that count"),
            (sums / out.shape[1], "the sum of the values that count, divided by the number of queries"),
        ):
            if close(plain(out), other[:, None].expand_as(out)):
                raise Wrong(f"{said} {name}")
        raise Wrong(f"{said} something else")


def _attention_scale(answer: Answer, g: Generator) -> None:
    """How steeply the weights follow q . k, measured on two tokens at a time."""
    b, n, tokens, d = 1, 4, 5, 9
    q, k = 0.5 * randn(g, b, n, d), 0.5 * randn(g, b, tokens, d)
    weights = _weights_of(answer, q, k, torch.ones(b, tokens, dtype=torch.bool))
    if weights.isnan().any() or (weights <= 0).any():
        raise Wrong("without a masked token all weights must be above 0, and yours are not")
    logs = weights.log()
    scores = q @ k.transpose(1, 2)
    got, right = (x[..., 1:] - x[..., :1] for x in (logs, scores))
    steep = float((got * right).sum() / (right * right).sum())
    if not close(got, steep * right, rtol=1e-4, atol=1e-6):
        raise Wrong(
            "the weights of two tokens must be in the ratio exp(c (q.k1 - q.k2)), with one number c; yours are not"
        )
    names = {"1/sqrt(d)": d**-0.5, "1 (no scaling)": 1.0, "1/d": 1 / d, "sqrt(d)": d**0.5, "-1/sqrt(d)": -(d**-0.5)}
    names |= {"1/sqrt(L), L the number of tokens": tokens**-0.5, "1/sqrt(N), N the number of queries": n**-0.5}
    names |= {"1/L, L the number of tokens": 1 / tokens, "1/d^2": d**-2.0}
    if not math.isclose(steep, d**-0.5, rel_tol=1e-4):
        name = next(
            (f", which is {name}" for name, value in names.items() if math.isclose(steep, value, rel_tol=1e-4)), ""
        )
        raise Wrong(
            f"measured with d = {d} and {tokens} tokens, yours multiplies the scores q.k by {steep:.4g}{name}",
            expected=f"{d**-0.5:.4g} = 1/sqrt(d)",
        )


def _attention_masked(answer: Answer, g: Generator) -> None:
    case = _attention_case(g)
    mask = case["mask"]
    weights = _weights_of(answer, case["q"], case["k"], mask)
    if weights.isfinite().all():
        hidden = (weights * ~mask[:, None]).sum(2)
        shown = (weights * mask[:, None]).sum(2)
        if hidden.abs().max() > 1e-6:
            raise Wrong(
                f"tokens that the mask shuts out get a share of {_range(hidden)} of each query's weight, "
                f"the others {_range(shown)}"
            )
        if not close(shown, torch.ones_like(shown), rtol=1e-5):
            raise Wrong(
                f"masked tokens have no weight, as it should be, but those that count are left with {_range(shown)}: "
                "they share out the whole, 1"
            )
    out = answer(case["q"], case["k"], case["v"], mask)
    shut = ~mask[:, :, None]
    other = answer(case["q"], torch.where(shut, 3.0, case["k"]), torch.where(shut, -50.0, case["v"]), mask)
    need(other, out.detach(), "with other keys and values at the tokens that are masked, the result changes")


def _attention_large(answer: Answer, g: Generator) -> None:
    """Each query has one token far ahead of the others, and then none."""
    v, every = randn(g, 1, 4, 3), torch.ones(1, 4, dtype=torch.bool)
    k = torch.eye(4, dtype=torch.float64)[None]
    for q, due, scores in (
        (3000 * k, v, "1500, 0, 0 and 0"),
        (0 * k - 3000, v.mean(1, keepdim=True), "-1500 all four"),
    ):
        out = answer(q.clone(), k.clone(), v.clone(), every.clone())
        if not out.isfinite().all():
            raise Wrong(f"with scores of {scores} the result is not finite: exp(1500) is too large, exp(-1500) is 0")
        need(out, due.expand_as(out), f"with scores of {scores} the result is wrong", atol=1e-4)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, :])


def _attention_torch(answer: Answer, g: Generator) -> None:
    case = _attention_case(g, 2, 7, 4, 3, 5)
    need(answer(*case.values()), _sdpa(**case), "yours and F.scaled_dot_product_attention differ")


def _attention_by(
    scale: Callable[[Tensor, Tensor], float] = lambda q, k: q.shape[-1] ** -0.5,
    before: Callable[[Tensor, Tensor], Tensor] = lambda scores, m: scores.masked_fill(~m, -math.inf),
    softmax: Callable[[Tensor], Tensor] = lambda scores: scores.softmax(-1),
    after: Callable[[Tensor, Tensor], Tensor] = lambda weights, m: weights,
) -> tuple[Callable]:
    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = scale(q, k) * (q @ k.transpose(1, 2))
        return after(softmax(before(scores, mask[:, None, :])), mask[:, None, :]) @ v

    return (attention,)


def _attention_late(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return _attention_by(scale=lambda q, k: 1.0)[0](q, k, v, mask) / math.sqrt(q.shape[-1])


def _attention_einsum(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.einsum("bnd,bld->bnl", q, k).div(q.size(2) ** 0.5)
    scores = scores + torch.where(mask, 0.0, -1e9)[:, None].to(scores)
    weights = (scores - scores.amax(2, keepdim=True)).exp()
    return torch.einsum("bnl,ble->bne", weights / weights.sum(2, keepdim=True), v)


def _attention_loop(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Example by example, with the masked tokens taken out."""
    rows = []
    for i, keep in enumerate(mask):
        scores = q[i] @ k[i][keep].T * q.shape[-1] ** -0.5
        rows.append(torch.softmax(scores, dim=1) @ v[i][keep])
    return torch.stack(rows)


_OVER_QUERIES = (
    "Your softmax runs over the QUERY axis: all pixels share out each word, and the columns add up to 1. It must be "
    "each pixel that shares out its weight among the words, so that the rows do."
)

ATTENTION = Exercise(
    id="06.2",
    names=("attention",),
    references=(attention,),
    inputs=_attention_inputs,
    batch=("q", "k", "v", "mask"),
    facts=(
        Fact(
            "each query's weights add up to 1",
            _attention_sums,
            "scores are (B, N, L); which axis is that of the tokens?",
        ),
        Fact(
            "the scores are scaled as they should be", _attention_scale, "the sum of d products grows as the root of d"
        ),
        Fact("masked tokens get no weight, the others all of it", _attention_masked, "exp(what) is 0?"),
        Fact("without a preference it is the average", _attention_average, "equal scores make equal weights"),
        Fact("copes with scores in the thousands", _attention_large, "torch.softmax takes the maximum off first"),
        Fact("agrees with F.scaled_dot_product_attention", _attention_torch, "one line for each part of the formula"),
    ),
    mistakes=(
        Mistake(
            "softmax over the queries",
            f"{_OVER_QUERIES} (A masked token's column is then -inf all over, and its softmax NaN.)",
            _attention_by(softmax=lambda scores: scores.softmax(1)),
        ),
        Mistake(
            "softmax over the queries, -1e9 for the mask",
            _OVER_QUERIES,
            _attention_by(
                before=lambda scores, m: scores.masked_fill(~m, -1e9), softmax=lambda scores: scores.softmax(1)
            ),
        ),
        Mistake(
            "no scale",
            "The scores are not divided by sqrt(d): their size grows with d, and the softmax becomes nearly one-hot.",
            _attention_by(scale=lambda q, k: 1.0),
        ),
        Mistake(
            "1/d",
            "The scores are divided by d instead of sqrt(d): the weights are too even.",
            _attention_by(scale=lambda q, k: 1 / q.shape[-1]),
        ),
        Mistake(
            "length of the text under the root",
            "The scores are divided by sqrt(L), and L is the length of the text: what a pixel sees would change with "
            "the number of pads. It is the width d of queries and keys that makes the scores large.",
            _attention_by(scale=lambda q, k: k.shape[1] ** -0.5),
        ),
        Mistake(
            "times sqrt(d)",
            "The scores are multiplied by sqrt(d) instead of divided by it.",
            _attention_by(scale=lambda q, k: q.shape[-1] ** 0.5),
        ),
        Mistake(
            "scaled after the softmax",
            "You divide by sqrt(d) after the softmax: the weights then add up to 1/sqrt(d). It is the scores that are "
            "divided.",
            (_attention_late,),
        ),
        Mistake(
            "masked scores set to 0",
            "The scores of masked tokens are set to 0, and exp(0) = 1 is not masking: they still get weight, and often "
            "much of it. Set them to -inf.",
            _attention_by(before=lambda scores, m: scores * m),
        ),
        Mistake(
            "masked after the softmax",
            "The mask is applied after the softmax (or to the values): masked tokens have taken their share by then, "
            "and the weights of the others add up to less than 1.",
            _attention_by(before=lambda scores, m: scores, after=lambda w, m: w * m),
        ),
        Mistake(
            "mask ignored",
            "The mask has no effect: pixels attend to the pads as well.",
            _attention_by(before=lambda scores, m: scores),
        ),
        Mistake(
            "mask inverted",
            "The mask is the other way round: it is True where a token counts, and masked_fill fills where its mask is "
            "True. So fill where ~mask.",
            _attention_by(before=lambda scores, m: scores.masked_fill(m, -math.inf)),
        ),
        Mistake(
            "no softmax",
            "There is no softmax: the scores themselves are used as weights, negative ones too.",
            _attention_by(softmax=lambda scores: scores.nan_to_num(neginf=0.0)),
        ),
    ),
    alternatives=((_sdpa,), (_attention_einsum,), (_attention_loop,)),
    hints=(
        "Four lines: scores (B, N, L) by a matrix product, divided by something; the mask, with an axis for the "
        "queries; softmax over one axis; and a second matrix product.",
        "scores = q @ k.transpose(1, 2) / sqrt(d); scores.masked_fill(~mask[:, None, :], -inf).softmax(dim=-1) @ v.",
    ),
    hides=("layers.Attention",),
    points=2,
)
# --- 06.3 split_heads, merge_heads ------------------------------------------------------------------------------------


def _heads_inputs(g: Generator) -> dict:
    return {"split_heads": dict(x=randn(g, 2, 5, 12), heads=3), "merge_heads": dict(x=randn(g, 2, 3, 5, 4))}


def _numbered(b: int, n: int, c: int) -> Tensor:
    """(b, n, c), each entry telling where it stands."""
    example, pixel, channel = (torch.arange(size, dtype=torch.float64) for size in (b, n, c))
    return 10_000 * example[:, None, None] + 100 * pixel[:, None] + channel


def _place(number: float) -> str:
    example, rest = divmod(round(number), 10_000)
    return f"channel {rest % 100} of pixel {rest // 100} of example {example}"


def _heads_split(answer: Answer, g: Generator) -> None:
    b, n, heads, d = 2, 5, 3, 4
    x = _numbered(b, n, heads * d)
    got = answer.call("split_heads", x.clone(), heads)
    due = torch.stack([x[:, :, d * i : d * (i + 1)] for i in range(heads)], dim=1)
    if got.shape != due.shape:
        raise Wrong(f"x {tuple(x.shape)} with {heads} heads becomes {tuple(got.shape)}", expected=f"{tuple(due.shape)}")
    wrong = (got != due).nonzero()
    if len(wrong):
        e, i, pixel, j = wrong[0].tolist()
        raise Wrong(
            f"of x {tuple(x.shape)} with {heads} heads: your [{e}, {i}, {pixel}, {j}], which is head {i}'s place {j} "
            f"for pixel {pixel} of example {e}, holds {_place(float(got[e, i, pixel, j]))}",
            expected=f"{_place(float(due[e, i, pixel, j]))}",
        )


def _heads_merge(answer: Answer, g: Generator) -> None:
    b, n, heads, d = 2, 5, 3, 4
    due = _numbered(b, n, heads * d)
    x = torch.stack([due[:, :, d * i : d * (i + 1)] for i in range(heads)], dim=1)
    got = answer.call("merge_heads", x.clone())
    if got.shape != due.shape:
        raise Wrong(f"{tuple(x.shape)} becomes {tuple(got.shape)}", expected=f"{tuple(due.shape)}")
    wrong = (got != due).nonzero()
    if len(wrong):
        e, pixel, c = wrong[0].tolist()
        source = round(float(got[e, pixel, c])) % 10_000
        raise Wrong(
            f"merged from {heads} heads of {d} channels: your [{e}, {pixel}, {c}] comes from place {source % 100 % d} "
            f"of head {source % 100 // d}, for pixel {source // 100}",
            expected=f"place {c % d} of head {c // d}, for pixel {pixel}",
        )


def _heads_round(answer: Answer, g: Generator) -> None:
    for b, n, heads, d in ((2, 5, 3, 4), (3, 4, 4, 1), (1, 6, 1, 5)):
        x = randn(g, b, n, heads * d)
        back = answer.call("merge_heads", answer.call("split_heads", x.clone(), heads))
        need(back, x, f"{heads} heads of {d} channels, split and merged, are not what they were")


def _heads_torch(answer: Answer, g: Generator) -> None:
    """torch's own multi-head attention, with the identity for its four maps."""
    b, n, heads, d = 2, 5, 3, 4
    q, k, v = (randn(g, b, length, heads * d) for length in (n, 7, 7))
    layer = nn.MultiheadAttention(heads * d, heads, bias=False, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        eye = torch.eye(heads * d, dtype=torch.float64)
        layer.in_proj_weight.copy_(eye.repeat(3, 1))
        layer.out_proj.weight.copy_(eye)
        right, _ = layer(q, k, v, need_weights=False)
    parts = [answer.call("split_heads", x.clone(), heads) for x in (q, k, v)]
    got = answer.call("merge_heads", F.scaled_dot_product_attention(*parts))
    need(got, right, "attention between your split_heads and merge_heads is not what nn.MultiheadAttention gives")


def _heads_refuse(answer: Answer, g: Generator) -> None:
    _refused(answer, "split_heads", (randn(g, 2, 5, 12), 5), "12 channels cannot be shared out among 5 heads")


def _split_by(split: Callable[[Tensor, int, int], Tensor]) -> Callable:
    def split_heads(x: Tensor, heads: int) -> Tensor:
        if x.shape[-1] % heads:
            raise ValueError("heads do not divide channels")
        return split(x, heads, x.shape[-1] // heads)

    return split_heads


def _split_unchecked(x: Tensor, heads: int) -> Tensor:
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads).transpose(1, 2)


def _split_cut(x: Tensor, heads: int) -> Tensor:
    d = x.shape[-1] // heads
    return torch.stack([x[..., d * i : d * (i + 1)] for i in range(heads)], dim=1)


_split_viewed = _split_by(lambda x, h, d: x.reshape(x.shape[0], h, x.shape[1], d))
_split_strided = _split_by(lambda x, h, d: x.unflatten(2, (d, h)).permute(0, 3, 1, 2))


def _merge_viewed(x: Tensor) -> Tensor:
    b, heads, n, d = x.shape
    return x.reshape(b, n, heads * d)


def _merge_strided(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(2)


def _split_chunks(x: Tensor, heads: int) -> Tensor:
    if x.size(-1) % heads != 0:
        raise ValueError(f"{x.size(-1)} channels, {heads} heads")
    return torch.stack(x.chunk(heads, dim=-1), dim=1)


def _merge_cat(x: Tensor) -> Tensor:
    return torch.cat(x.unbind(dim=1), dim=-1)


def _split_index(x: Tensor, heads: int) -> Tensor:
    d, rest = divmod(x.shape[2], heads)
    if rest > 0:
        raise ValueError("no")
    out = x.new_zeros(x.shape[0], heads, x.shape[1], d)
    for c in range(x.shape[2]):
        out[:, c // d, :, c % d] = x[:, :, c]
    return out


def _merge_index(x: Tensor) -> Tensor:
    return torch.einsum("bhnd->bnhd", x).flatten(start_dim=2)


HEADS = Exercise(
    id="06.3",
    names=("split_heads", "merge_heads"),
    references=(split_heads, merge_heads),
    inputs=_heads_inputs,
    batch=("x",),
    facts=(
        Fact(
            "split_heads: each head has its own channels, of each pixel",
            _heads_split,
            "first part the channels into two axes, then move one of them",
        ),
        Fact("merge_heads: the heads' channels side by side again", _heads_merge, "the same two steps, backwards"),
        Fact("merging undoes splitting", _heads_round, "merge_heads(split_heads(x, h)) is x"),
        Fact(
            "attention between the two is that of nn.MultiheadAttention",
            _heads_torch,
            "a pair can undo each other and still mix up pixels and heads",
        ),
        Fact("heads that do not divide the channels raise ValueError", _heads_refuse, "look at c % heads first"),
    ),
    mistakes=(
        Mistake(
            "split by a view alone",
            "split_heads reshapes (B, N, C) straight to (B, heads, N, C / heads): the shape is right, but head 0 reads "
            "the channels of other pixels. Part the channels first, (B, N, heads, C / heads), then exchange two axes.",
            (_split_viewed, merge_heads),
        ),
        Mistake(
            "merged by a view alone",
            "merge_heads reshapes (B, heads, N, C / heads) straight to (B, N, C): the shape is right, but the pixels "
            "get channels of one another. Put the heads back beside their channels first, then flatten.",
            (split_heads, _merge_viewed),
        ),
        Mistake(
            "views alone, both ways",
            "Both functions reshape without exchanging axes. They undo each other, so that a round trip shows nothing; "
            "but between the two, each head sees a part of the picture with all its channels, not all pixels with a "
            "part of the channels.",
            (_split_viewed, _merge_viewed),
        ),
        Mistake(
            "channels dealt out in turn",
            "Channel 0 goes to head 0, channel 1 to head 1, and so on in turn. They undo each other, but a head is a "
            "run of neighbouring channels here: (B, N, heads, C / heads), not (B, N, C / heads, heads).",
            (_split_strided, _merge_strided),
        ),
        Mistake(
            "split in turn",
            "split_heads deals the channels out to the heads in turn, while merge_heads expects runs of neighbours: "
            "part C into (heads, C / heads), in this order.",
            (_split_strided, merge_heads),
        ),
        Mistake(
            "merge in the wrong order",
            "merge_heads flattens (C / heads, heads) instead of (heads, C / heads): the heads' channels alternate.",
            (split_heads, _merge_strided),
        ),
        Mistake(
            "axes not exchanged",
            "split_heads stops at (B, N, heads, C / heads): a matrix product would then multiply heads with heads. The "
            "heads belong beside the batch.",
            (_split_by(lambda x, h, d: x.unflatten(2, (h, d))), merge_heads),
        ),
        Mistake(
            "heads and their channels exchanged",
            "The axis of heads has length C / heads, and each head `heads` channels: the two numbers are exchanged.",
            (_split_by(lambda x, h, d: x.unflatten(2, (d, h)).transpose(1, 2)), merge_heads),
        ),
        Mistake(
            "heads folded into the batch",
            "The heads are folded into the batch, (B heads, N, C / heads). Many programs do that; asked for is an axis "
            "of their own, after which the mask can be broadcast over them.",
            (_split_by(lambda x, h, d: x.unflatten(2, (h, d)).transpose(1, 2).flatten(0, 1)), merge_heads),
        ),
        Mistake(
            "left to reshape",
            "Heads that do not divide the channels are left to reshape, whose RuntimeError speaks of sizes only. Say "
            "yourself what is wrong, with a ValueError.",
            (_split_unchecked, merge_heads),
        ),
        Mistake(
            "rest of the channels cut off",
            "Where heads do not divide the channels, the rest of them is dropped silently: raise ValueError.",
            (_split_cut, merge_heads),
        ),
    ),
    alternatives=((_split_chunks, _merge_cat), (_split_index, _merge_index)),
    hints=(
        "reshape never moves a number past another: it can only part an axis or join neighbours. So part C into heads "
        "and channels of a head, and let transpose move the heads.",
        "x.reshape(b, n, heads, c // heads).transpose(1, 2), and back x.transpose(1, 2).reshape(b, n, heads * c); "
        "ValueError if c % heads.",
    ),
    hides=("layers.Attention",),
    probe=lambda answer, g: _outcome(answer, "split_heads", randn(g, 2, 5, 12), 5),
)

# --- 06.4 attn_cost ---------------------------------------------------------------------------------------------------

_KEYS = ("core", "proj", "flops", "matrix_bytes")


def _cost_args(g: Generator) -> dict[str, int]:
    """No number divides another in the way a mistake would hide behind."""
    heads = (3, 5, 7)[integer(g, 0, 2)]
    return dict(
        n=integer(g, 40, 90),
        tokens=integer(g, 9, 30),
        dim=heads * integer(g, 11, 19),
        heads=heads,
        context_dim=integer(g, 200, 300),
        bytes_per=(2, 4)[integer(g, 0, 1)],
    )


def _cost_inputs(g: Generator) -> dict:
    return {"attn_cost": _cost_args(g)}


def _cost_of(answer: Answer, key: str, **args: int) -> float:
    counts = answer(*args.values())
    if not isinstance(counts, dict) or set(counts) != set(_KEYS):
        raise Wrong(f"it should return a dict with the keys {', '.join(_KEYS)}, and returned {counts!r}"[:300])
    return float(counts[key])


def _cost_same(got: float, right: int, key: str, args: dict[str, int]) -> None:
    """A wrong count is told with the factor that it is off by, where this has a name."""
    if math.isclose(got, right, rel_tol=1e-12):
        return
    a, ratio = args, got / right
    names = {"twice": 2.0, "half of": 0.5, "four times": 4.0, "a quarter of": 0.25}
    names |= {"heads times": a["heads"], "n / tokens times": a["n"] / a["tokens"], "bytes_per times": a["bytes_per"]}
    names |= {
        "dim times": a["dim"],
        "8 / bytes_per times": 8 / a["bytes_per"],
        "1 / heads times": 1 / a["heads"],
        "1 / bytes_per times": 1 / a["bytes_per"],
    }
    names |= {"2^-20 times (MiB)": 2.0**-20, "10^-6 times (MB)": 1e-6, "2^-10 times": 2.0**-10, "10^-3 times": 1e-3}
    name = next((f", {n} what is due" for n, value in names.items() if math.isclose(ratio, value, rel_tol=1e-9)), "")
    name = name or f", {ratio:.4g} times what is due"
    text = ", ".join(f"{name} = {value}" for name, value in args.items())
    raise Wrong(f'{text}: your "{key}" is {_number(got)}{name}', expected=f"{right:,}")


def _number(value: float) -> str:
    return f"{round(value):,}" if value == round(value) else f"{value:,.7g}"


def _cost_keys(answer: Answer, g: Generator) -> None:
    args = _cost_args(g)
    counts = answer(*args.values())
    _cost_of(answer, "core", **args)
    odd = [key for key in _KEYS if float(counts[key]) != round(float(counts[key])) or counts[key] <= 0]
    if odd:
        raise Wrong(f'"{odd[0]}" is {counts[odd[0]]!r}: multiply-adds, FLOPs and bytes are counted, in whole numbers')


def _cost_core(answer: Answer, g: Generator) -> None:
    a = _cost_args(g)
    n, tokens, heads, d = a["n"], a["tokens"], a["heads"], a["dim"] // a["heads"]
    # one head at a time: queries (batch, heads, n, d), keys and values (batch, heads, tokens, d)
    both = sdpa_flop_count((1, heads, n, d), (1, heads, tokens, d), (1, heads, tokens, d))
    one = heads * mm_flop((n, d), (d, tokens))
    got = _cost_of(answer, "core", **a)
    if got == one // 2:
        raise Wrong(f'your "core" is {got:,.0f}: that is q k^T alone; its product with v costs as much again')
    more, entries = got - both // 2, n * tokens * heads
    if 0 < more <= 8 * entries and more % entries == 0 and got != both:  # a softmax adds a few, not a whole factor
        raise Wrong(
            f'your "core" is {got:,.0f}, {more / entries:g} more for each of the heads n tokens scores than the two '
            "products take: count these alone, no scaling and no softmax"
        )
    _cost_same(got, both // 2, "core", a)


def _cost_proj(answer: Answer, g: Generator) -> None:
    a = _cost_args(g)
    maps = {
        "queries": (a["n"], a["dim"], a["dim"]),
        "keys": (a["tokens"], a["context_dim"], a["dim"]),
        "values": (a["tokens"], a["context_dim"], a["dim"]),
        "output": (a["n"], a["dim"], a["dim"]),
    }
    flops = {name: mm_flop((rows, width), (width, out)) for name, (rows, width, out) in maps.items()}
    got = _cost_of(answer, "proj", **a)
    for missing, what in (("output", "one of queries and output"), ("keys", "one of keys and values")):
        if got == (sum(flops.values()) - flops[missing]) // 2:
            raise Wrong(f'your "proj" is {got:,.0f}: {what} is missing, there are four maps')
    if got == sum(flops.values()) // 2 + 2 * (a["n"] + a["tokens"]) * a["dim"]:
        raise Wrong(f'your "proj" is {got:,.0f}: you count biases, and the four maps have none')
    pixels, wide = 2 * a["n"] * a["dim"] ** 2, 2 * a["dim"]
    if got == pixels + wide * a["n"] * a["context_dim"]:
        raise Wrong(f'your "proj" is {got:,.0f}: keys and values are made once per token, yours once per pixel')
    if got == pixels + wide * a["tokens"] * a["dim"]:
        raise Wrong(f'your "proj" is {got:,.0f}: keys and values are made of vectors of width context_dim, not dim')
    _cost_same(got, sum(flops.values()) // 2, "proj", a)


def _cost_flops(answer: Answer, g: Generator) -> None:
    args = _cost_args(g)
    counts = answer(*args.values())
    both = float(counts["core"]) + float(counts["proj"])
    got = float(counts["flops"])
    if not math.isclose(got, 2 * both, rel_tol=1e-12):
        parts = {"core": 2 * float(counts["core"]), "proj": 2 * float(counts["proj"])}
        alone = next((f", two for each in {key} alone" for key, value in parts.items() if math.isclose(got, value)), "")
        said = f'your "flops" is {got / both:.4g} times your core + proj{alone}'
        raise Wrong(f"{said}: a multiply-add is a multiplication and an addition", expected="2 (core + proj)")


def _cost_one_head(answer: Answer, g: Generator) -> None:
    """The well-known example: a 64 x 64 latent, 77 tokens, one head of 64 channels, float32."""
    args = dict(n=64 * 64, tokens=77, dim=64, heads=1, context_dim=768, bytes_per=4)
    _cost_same(_cost_of(answer, "core", **args), 40_370_176, "core", args)
    _cost_same(_cost_of(answer, "matrix_bytes", **args), 1_261_568, "matrix_bytes", args)
    args["context_dim"] = 64
    _cost_same(_cost_of(answer, "flops", **args), 80_740_352 + 68_370_432, "flops", args)  # of the core, of the maps


def _cost_heads(answer: Answer, g: Generator) -> None:
    args = _cost_args(g)
    args["dim"] = 840  # 1 to 8 divide it
    one, eight = ({**args, "heads": heads} for heads in (1, 8))
    for key, right, why in (
        ("core", 1, "they share the channels, so that the arithmetic stays"),
        ("proj", 1, "the four maps are the same, whatever the heads"),
        ("matrix_bytes", 8, "each has a matrix of its own"),
    ):
        ratio = _cost_of(answer, key, **eight) / _cost_of(answer, key, **one)
        if not math.isclose(ratio, right, rel_tol=1e-9):
            raise Wrong(f'8 heads instead of 1 multiply your "{key}" by {ratio:g}: {why}', expected=f"{right}")


def _cost_layer(answer: Answer, g: Generator) -> None:
    """Cross-attention of Stable Diffusion 1 at 64 x 64, in half precision, worked out by hand."""
    args = dict(n=4096, tokens=77, dim=320, heads=8, context_dim=768, bytes_per=2)
    due = dict(core=201_850_880, proj=876_707_840, flops=2_157_117_440, matrix_bytes=5_046_272)
    for key, right in due.items():
        _cost_same(_cost_of(answer, key, **args), right, key, args)


def _cost_by(**changes: Callable) -> tuple[Callable]:
    """core, proj and matrix_bytes as functions of the six arguments, flops as one of core and proj."""

    def changed(n: int, tokens: int, dim: int, heads: int, context_dim: int, bytes_per: int) -> dict:
        args = (n, tokens, dim, heads, context_dim, bytes_per)
        right = attn_cost(*args)
        new = {key: changes[key](*args) if key in changes else right[key] for key in ("core", "proj", "matrix_bytes")}
        new["flops"] = changes.get("flops", lambda core, proj: 2 * (core + proj))(new["core"], new["proj"])
        return new

    return (changed,)


def _cost_head_by_head(n: int, tokens: int, dim: int, heads: int, context_dim: int, bytes_per: int) -> dict:
    d = dim / heads
    scores = sum(n * tokens * d for _ in range(heads))
    maps = sum(rows * width * dim for rows, width in ((n, dim), (tokens, context_dim), (tokens, context_dim), (n, dim)))
    core = int(2 * scores)
    return dict(core=core, proj=maps, flops=2 * core + 2 * maps, matrix_bytes=bytes_per * n * tokens * heads)


def _cost_course(n: int, tokens: int, dim: int, heads: int, context_dim: int, bytes_per: int) -> dict:
    layer = attention_layer_cost(n, tokens, dim, heads, bytes_per, context_dim=context_dim)
    core = tokens * dim * n + n * dim * tokens
    return {"matrix_bytes": layer.score_bytes, "flops": layer.flops, "core": core, "proj": layer.macs - core}


COST = Exercise(
    id="06.4",
    names=("attn_cost",),
    references=(attn_cost,),
    inputs=_cost_inputs,
    facts=(
        Fact("four counts, in whole numbers", _cost_keys, "the docstring names the keys"),
        Fact(
            '"core" is what torch counts in q k^T and its product with v',
            _cost_core,
            "a product of (n, d) with (d, m) takes n d m multiply-adds",
        ),
        Fact(
            '"proj" is what torch counts in the four linear maps',
            _cost_proj,
            "which of the four sees pixels, and which sees tokens?",
        ),
        Fact('"flops" is two per multiply-add', _cost_flops, "count both, and of core and proj together"),
        Fact("heads multiply the matrix, not the arithmetic", _cost_heads, "each head has dim / heads channels"),
        Fact("64 x 64 pixels, 77 tokens, one head of 64", _cost_one_head, "work it out on paper first"),
        Fact("the layer of Stable Diffusion 1 at 64 x 64", _cost_layer, "320 channels, 8 heads, context 768, float16"),
    ),
    mistakes=(
        Mistake(
            "FLOPs for multiply-adds",
            '"core" and "proj" are counted in FLOPs: a multiply-add is one there, and two only in "flops".',
            _cost_by(
                core=lambda n, L, c, h, e, by: 4 * n * L * c,
                proj=lambda n, L, c, h, e, by: 4 * n * c * c + 4 * L * e * c,
                flops=lambda core, proj: core + proj,
            ),
        ),
        Mistake(
            "multiply-adds for FLOPs",
            '"flops" is the number of multiply-adds. Each is two floating-point operations, a multiplication and an '
            "addition. (Papers mix them up too: DiT's Gflops are multiply-adds.)",
            _cost_by(flops=lambda core, proj: core + proj),
        ),
        Mistake(
            "product with v forgotten",
            '"core" is that of q k^T only: the weights are multiplied with v as well, which costs as much again.',
            _cost_by(core=lambda n, L, c, h, e, by: n * L * c),
        ),
        Mistake(
            "heads multiply the core",
            "The core is multiplied by the heads: but they share the channels, dim / heads each, so that it stays the "
            "same whatever their number.",
            _cost_by(core=lambda n, L, c, h, e, by: 2 * n * L * c * h),
        ),
        Mistake(
            "core of one head",
            "The core is that of a single head, with its dim / heads channels: all of them are asked for.",
            _cost_by(core=lambda n, L, c, h, e, by: 2 * n * L * (c // h)),
        ),
        Mistake(
            "matrix of one head",
            '"matrix_bytes" is that of one head: each has an (n, tokens) matrix of its own.',
            _cost_by(matrix_bytes=lambda n, L, c, h, e, by: n * L * by),
        ),
        Mistake(
            "keys and values of the pixels",
            "Keys and values are counted once per pixel: they are made of the tokens, and there are far fewer of "
            "these.",
            _cost_by(proj=lambda n, L, c, h, e, by: 2 * n * c * c + 2 * n * e * c),
        ),
        Mistake(
            "context as wide as the pixels",
            "Keys and values are counted as maps dim -> dim: tokens have a width of their own, context_dim.",
            _cost_by(proj=lambda n, L, c, h, e, by: 2 * n * c * c + 2 * L * c * c),
        ),
        Mistake(
            "output map forgotten",
            "The output map is missing: after the heads are merged, a fourth linear map dim -> dim follows.",
            _cost_by(proj=lambda n, L, c, h, e, by: n * c * c + 2 * L * e * c),
        ),
        Mistake(
            "one of keys and values forgotten",
            "Keys and values are two maps of the tokens; you count one.",
            _cost_by(proj=lambda n, L, c, h, e, by: 2 * n * c * c + L * e * c),
        ),
        Mistake(
            "in MiB",
            '"matrix_bytes" is divided by 2^20: asked for are bytes. (2^20 bytes are a MiB, 10^6 a MB; those who mix '
            "the two are 4.9 % off.)",
            _cost_by(matrix_bytes=lambda n, L, c, h, e, by: h * n * L * by / 2**20),
        ),
        Mistake(
            "in MB",
            '"matrix_bytes" is divided by 10^6: asked for are bytes.',
            _cost_by(matrix_bytes=lambda n, L, c, h, e, by: h * n * L * by / 1e6),
        ),
        Mistake(
            "numbers, not bytes",
            '"matrix_bytes" counts the numbers of the matrix; each takes bytes_per bytes.',
            _cost_by(matrix_bytes=lambda n, L, c, h, e, by: h * n * L),
        ),
        Mistake(
            "self-attention",
            "You count self-attention, in which the pixels attend to one another: n x n. Here they attend to the "
            "tokens: n x tokens.",
            _cost_by(
                core=lambda n, L, c, h, e, by: 2 * n * n * c,
                proj=lambda n, L, c, h, e, by: 4 * n * c * c,
                matrix_bytes=lambda n, L, c, h, e, by: h * n * n * by,
            ),
        ),
        Mistake(
            "flops of the core alone",
            '"flops" counts the core only: the four maps belong to the layer, and often cost more.',
            _cost_by(flops=lambda core, proj: 2 * core),
        ),
    ),
    alternatives=((_cost_head_by_head,), (_cost_course,)),
    hints=(
        "A product of an (n, d) and a (d, m) matrix takes n d m multiply-adds. List the six products of the layer with "
        "their three sizes each: two for the core, four for the maps.",
        "core = 2 n tokens dim; proj = 2 n dim^2 + 2 tokens context_dim dim; flops = 2 (core + proj); "
        "matrix_bytes = heads n tokens bytes_per.",
    ),
    hides=("cost.attention_cost", "cost.attention_layer_cost"),
)

# --- 06.5 chunked_attention -------------------------------------------------------------------------------------------


def _chunked_case(g: Generator, b: int = 2, n: int = 5, tokens: int = 7, d: int = 4, e: int = 3) -> list[Tensor]:
    return [randn(g, b, n, d), randn(g, b, tokens, d), randn(g, b, tokens, e)]


def _chunked_inputs(g: Generator) -> dict:
    q, k, v = _chunked_case(g)
    return {"chunked_attention": dict(q=q, k=k, v=v, chunk=3)}


def _chunked_torch(answer: Answer, g: Generator) -> None:
    q, k, v = _chunked_case(g)
    right = F.scaled_dot_product_attention(q, k, v)
    wrong = []
    for chunk in (7, 9, 1, 2, 3, 5):
        got = answer(q.clone(), k.clone(), v.clone(), chunk)
        if not close(plain(got), right, rtol=1e-6, atol=1e-8):
            wrong.append(chunk)
    if len(wrong) == 6:
        raise Wrong("it differs from F.scaled_dot_product_attention for every chunk, even where one holds all tokens")
    if wrong:
        fits = _listed([chunk for chunk in (7, 9, 1, 2, 3, 5) if chunk not in wrong])
        raise Wrong(
            f"with 7 tokens it differs from F.scaled_dot_product_attention for chunks of {_listed(wrong)}, and is "
            f"right for {fits}"
        )


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))


def _chunked_ones(answer: Answer, g: Generator) -> None:
    q, k, v = _chunked_case(g)
    out = answer(q, k, torch.ones_like(v), 3)
    if not close(plain(out), torch.ones_like(out), rtol=1e-6):
        raise Wrong(
            f"where all values are 1 every mixture of them is 1; yours gives {_range(out)}, with chunks of 3 of 7"
        )


def _chunked_order(answer: Answer, g: Generator) -> None:
    """Two tokens, one chunk each: the weight of the first is sigmoid of the difference of the scores."""
    for first, second in ((0.5, 2.0), (2.0, 0.5), (-1.0, -3.0)):
        q = torch.full((1, 1, 4), 1.0, dtype=torch.float64)
        k = torch.tensor([[[first] * 4, [second] * 4]], dtype=torch.float64) / 2
        v = torch.tensor([[[1.0], [0.0]]], dtype=torch.float64)
        got, right = float(answer(q, k, v, 1)), 1 / (1 + math.exp(second - first))
        if not math.isclose(got, right, rel_tol=1e-6):
            raise Wrong(
                f"two tokens with the scores {first:g} and {second:g}, one chunk each: the weight of the first comes "
                f"out as {got:.4g}",
                expected=f"{right:.4g}, which is exp({first:g}) / (exp({first:g}) + exp({second:g}))",
            )


def _chunked_large(answer: Answer, g: Generator) -> None:
    """Scores in the thousands, of either sign, and very different from query to query."""
    _, _, v = _chunked_case(g)
    for name, size in (
        ("from -3000 to 3000", torch.linspace(-3000, 3000, 5)),
        ("all above 2000", torch.linspace(2000, 2400, 5)),
        ("all below -2000", -torch.linspace(2000, 2400, 5)),
    ):
        q = torch.cat([size.double()[:, None], torch.zeros(5, 3)], dim=1).expand(2, 5, 4)
        ups_and_downs = torch.tensor([2.9, 3.0, 2.8, 2.0, 2.1, 2.2, 2.9], dtype=torch.float64)[:, None]
        k = torch.cat([ups_and_downs, torch.zeros(7, 3)], dim=1).repeat(2, 1, 1)
        got = answer(q.clone(), k, v, 3)
        if not got.isfinite().all():
            bad = int((~got.isfinite()).any(2).sum())
            raise Wrong(f"scores {name}: {bad} of 10 queries get NaN or infinite results")
        need(got, F.scaled_dot_product_attention(q, k, v), f"scores {name}: the result is wrong", atol=1e-4)


def _watched(answer: Answer, g: Generator) -> Columns:
    """The answer at work on 96 tokens, with chunks of 4."""
    b, n, tokens, d, e = 1, 41, 96, 3, 2
    columns = Columns(b, n, tokens, d, e)
    answer.watched(columns, *_chunked_case(g, b, n, tokens, d, e), 4)
    return columns


def _chunked_memory(answer: Answer, g: Generator) -> None:
    columns = _watched(answer, g)
    if columns.widest > 60:
        raise Wrong(
            "with chunks of 4, you make a tensor with all 96 columns of the matrix: that is the memory which chunks "
            "are there to save"
        )
    if columns.held > 80:
        raise Wrong(
            "with chunks of 4, the weights or scores of one chunk are still there when those of the last are made, 96 "
            "columns in all: that is the memory which chunks are there to save"
        )


def _chunked_by(
    start: float = -math.inf,
    running: Callable[[Tensor, Tensor], Tensor] = lambda top, scores: torch.maximum(top, scores.amax(-1, True)),
    weigh: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda scores, top, higher: (scores - higher).exp(),
    shrinks: tuple[bool, bool] = (True, True),
    keep_total: bool = True,
    scale: float | None = None,
    chunks: Callable[[Tensor, int], tuple[Tensor, ...]] = lambda x, chunk: x.split(chunk, dim=1),
) -> tuple[Callable]:
    def chunked_attention(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Tensor:
        top = torch.full_like(q[:, :, :1], start)
        total, out = torch.zeros_like(top), torch.zeros(*q.shape[:2], v.shape[2]).to(v)
        for keys, values in zip(chunks(k, chunk), chunks(v, chunk), strict=True):
            scores = q @ keys.transpose(1, 2) * (scale or q.shape[-1] ** -0.5)
            higher = running(top, scores)
            weights, shrink = weigh(scores, top, higher), (top - higher).exp()
            of_total, of_out = (shrink if wanted else torch.ones_like(shrink) for wanted in shrinks)
            total = (of_total * total if keep_total else 0) + weights.sum(-1, True)
            out = of_out * out + weights @ values
            top = higher
        return out / total

    return (chunked_attention,)


def _whole_chunks(x: Tensor, chunk: int) -> tuple[Tensor, ...]:
    return x[:, : max(x.shape[1] // chunk, 1) * chunk].split(chunk, dim=1)


def _chunked_average(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Tensor:
    parts = zip(k.split(chunk, dim=1), v.split(chunk, dim=1), strict=True)
    outs = [F.scaled_dot_product_attention(q, keys, values) for keys, values in parts]
    return torch.stack(outs).mean(0)


def _chunked_sum(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Tensor:
    return _chunked_average(q, k, v, chunk) * len(k.split(chunk, dim=1))


def _chunked_whole(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Tensor:
    return (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1) @ v


def _chunked_kept(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Tensor:
    scores = [q @ keys.transpose(1, 2) / math.sqrt(q.shape[-1]) for keys in k.split(chunk, dim=1)]
    top = torch.stack([s.amax(-1) for s in scores]).amax(0)[..., None]
    weights = [(s - top).exp() for s in scores]
    out = sum(w @ values for w, values in zip(weights, v.split(chunk, dim=1), strict=True))
    return out / sum(w.sum(-1, keepdim=True) for w in weights)


def _chunked_logs(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Tensor:
    """Means of chunks, merged by the logarithms of their total weights."""
    log_total, mean = None, None
    for i in range(0, k.shape[1], chunk):
        scores = torch.einsum("bnd,bld->bnl", q, k[:, i : i + chunk]) * q.shape[2] ** -0.5
        log_here = scores.logsumexp(-1, keepdim=True)
        here = scores.softmax(-1) @ v[:, i : i + chunk]
        if log_total is None:
            log_total, mean = log_here, here
        else:
            both = torch.logaddexp(log_total, log_here)
            mean = (log_total - both).exp() * mean + (log_here - both).exp() * here
            log_total = both
    return mean


def _chunked_two_passes(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Tensor:
    """The largest score first; then everything again, measured from it."""
    starts = range(0, k.shape[1], chunk)

    def scores(i: int) -> Tensor:
        return q @ k[:, i : i + chunk].mT / q.shape[-1] ** 0.5

    top = torch.stack([scores(i).amax(-1) for i in starts], dim=-1).amax(-1, keepdim=True)
    total = sum((scores(i) - top).exp().sum(-1, keepdim=True) for i in starts)
    return sum((scores(i) - top).exp() / total @ v[:, i : i + chunk] for i in starts)


def _chunked_see(answer: Answer, g: Generator) -> object:
    """What comes of scores in the thousands, rising and falling, within a chunk and from chunk to chunk; and whether
    the matrix is held."""
    size = torch.tensor([-3000.0, -1.0, 2.0, 3000.0], dtype=torch.float64)
    q, v = size[None, :, None].clone(), torch.arange(10.0, dtype=torch.float64)[None, :5, None]
    k = torch.tensor([1.0, 1.5, 0.5, 2.0, 1.0], dtype=torch.float64)[None, :, None]
    columns = _watched(answer, g)
    large = [_outcome(answer, "chunked_attention", q, k, v, chunk) for chunk in (2, 5)]
    return [large, columns.widest > 60, columns.held > 80]


CHUNKED = Exercise(
    id="06.5",
    names=("chunked_attention",),
    references=(chunked_attention,),
    inputs=_chunked_inputs,
    batch=("q", "k", "v"),
    facts=(
        Fact(
            "for every chunk it is F.scaled_dot_product_attention",
            _chunked_torch,
            "compare by hand with one chunk, then with two",
        ),
        Fact(
            "where all values are 1, so is the result",
            _chunked_ones,
            "numerator and denominator are sums over the same weights: treat them alike",
        ),
        Fact(
            "two tokens, one chunk each: what the formula says",
            _chunked_order,
            "when the maximum rises, what came before was measured from a lower one",
        ),
        Fact(
            "copes with scores in the thousands",
            _chunked_large,
            "each query has a largest score of its own; no exponential may be of more than 0",
        ),
        Fact(
            "never holds more than a chunk of the matrix",
            _chunked_memory,
            "let go of a chunk's weights before the next: what do you need to remember of it?",
        ),
    ),
    mistakes=(
        Mistake(
            "no running maximum",
            "There is no running maximum: exp of a score in the thousands is inf, and of one below -1000 it is 0, so "
            "that inf / inf or 0 / 0 comes out.",
            _chunked_by(start=0.0, running=lambda top, scores: top),
        ),
        Mistake(
            "maximum starts at 0",
            "The running maximum starts at 0 instead of -inf: where all scores are far below 0, every exponential is "
            "0, and 0 / 0 comes out.",
            _chunked_by(start=0.0),
        ),
        Mistake(
            "one maximum for all queries",
            "One maximum is taken over all queries: those whose scores are far below it get nothing but exponentials "
            "of 0, and 0 / 0 comes out. Each query needs a maximum of its own.",
            _chunked_by(running=lambda top, scores: torch.maximum(top, scores.max())),
        ),
        Mistake(
            "nothing rescaled",
            "When the maximum rises, what was summed up before is not rescaled: it was measured from a lower maximum, "
            "and counts too much.",
            _chunked_by(shrinks=(False, False)),
        ),
        Mistake(
            "only the total rescaled",
            "When the maximum rises you rescale the total of the weights, and not the accumulated result: both were "
            "measured from the old maximum.",
            _chunked_by(shrinks=(True, False)),
        ),
        Mistake(
            "only the result rescaled",
            "When the maximum rises you rescale the accumulated result, and not the total of the weights: both were "
            "measured from the old maximum.",
            _chunked_by(shrinks=(False, True)),
        ),
        Mistake(
            "maximum of the chunk alone",
            "The maximum is that of the chunk alone, and may fall again: exp(old - new) is then above 1, and overflows "
            "where the scores are large. Keep the larger of the two.",
            _chunked_by(running=lambda top, scores: scores.amax(-1, True)),
        ),
        Mistake(
            "measured from the old maximum",
            "Each chunk is measured from the maximum before it: for the first that is -inf, and the exponential of "
            "score - (-inf) is inf. Take the new maximum first.",
            _chunked_by(weigh=lambda scores, top, higher: (scores - top).exp()),
        ),
        Mistake(
            "ragged chunk dropped",
            "The last, shorter chunk is dropped: its tokens are never read.",
            _chunked_by(chunks=_whole_chunks),
        ),
        Mistake(
            "normalised per chunk",
            "Each chunk is normalised on its own, and the chunks are averaged: a chunk of unimportant tokens counts as "
            "much as one of important tokens.",
            (_chunked_average,),
        ),
        Mistake(
            "normalised per chunk, summed",
            "Each chunk is normalised on its own, and the chunks are added up: the weights of all add up to the number "
            "of chunks.",
            (_chunked_sum,),
        ),
        Mistake(
            "total of the last chunk",
            "You divide by the total of the last chunk's weights: it must be gathered over all chunks.",
            _chunked_by(keep_total=False),
        ),
        Mistake(
            "no scale",
            "The scores are not divided by sqrt(d).",
            _chunked_by(scale=1.0),
        ),
        Mistake(
            "the whole matrix",
            "The numbers are right, and the chunks are not used: queries meet all tokens at once, and the rows of the "
            "matrix are as long as the text. Take `chunk` tokens at a time, their keys and their values.",
            (_chunked_whole,),
        ),
        Mistake(
            "all chunks kept",
            "The numbers are right, but the scores of all chunks are kept until the end: together they are the whole "
            "matrix. Either compute them a second time, or rescale as you go.",
            (_chunked_kept,),
        ),
    ),
    alternatives=((_chunked_logs,), (_chunked_two_passes,)),
    hints=(
        "Remember three things of each query: its largest score so far, the sum of its weights, and the sum of its "
        "weighted values, the last two measured from that largest score. What happens to both sums when a chunk brings "
        "a larger score?",
        "higher = max(top, scores.amax(-1, keepdim=True)); shrink = exp(top - higher); weights = exp(scores - "
        "higher); total = shrink total + weights.sum(-1, keepdim=True); out = shrink out + weights @ values; top = "
        "higher; at the end out / total. Start from top = -inf.",
    ),
    hides=("layers.Attention",),
    probe=_chunked_see,
    points=2,
)

# --- 06.6 token_map, localisation -------------------------------------------------------------------------------------


def _attended(g: Generator, b: int = 3, heads: int = 2, pixels: int = 20, tokens: int = 6) -> Tensor:
    return (2 * randn(g, b, heads, pixels, tokens)).softmax(-1)


def _box(g: Generator, height: int, width: int) -> tuple[int, int, int, int]:
    """Inside the picture, off the diagonal, touching no border."""
    top, left = integer(g, 1, height - 4), integer(g, 1, width - 4)
    bottom, right = integer(g, top + 2, height - 2), integer(g, left + 2, width - 2)
    return (top, left, bottom, right) if (top, bottom) != (left, right) else _box(g, height, width)


def _map_inputs(g: Generator) -> dict:
    return {
        "token_map": dict(weights=_attended(g), token=integer(g, 1, 4), height=4, width=5),
        "localisation": dict(heat=torch.rand(3, 8, 9, generator=g, dtype=torch.float64), box=_box(g, 8, 9)),
    }


def _map_place(answer: Answer, g: Generator) -> None:
    """A single pixel looks at the token."""
    height, width = 4, 5
    for _ in range(4):
        row, column = integer(g, 0, height - 1), integer(g, 0, width - 1)
        weights = torch.zeros(1, 1, height * width, 3, dtype=torch.float64)
        weights[..., 0] = 1
        weights[0, 0, row * width + column] = torch.tensor([0.0, 0.0, 1.0])
        heat = answer.call("token_map", weights, 2, height, width)
        if heat.shape != (1, height, width):
            raise Wrong(f"a picture of 4 x 5 pixels comes out with shape {tuple(heat.shape)}", expected="(1, 4, 5)")
        peaks = (heat[0] > 0.5).nonzero().tolist()
        if peaks != [[row, column]] or not math.isclose(float(heat.sum()), 1, rel_tol=1e-6):
            seen = f"at {peaks}" if peaks else "nowhere"
            raise Wrong(
                f"on a picture of 4 x 5 only the pixel in row {row}, column {column}, which is pixel "
                f"{row * width + column}, looks at the token; your map is above 0.5 {seen}, and adds up to "
                f"{float(heat.sum()):.3g}"
            )


def _map_heads(answer: Answer, g: Generator) -> None:
    """Three heads that give a token 0.1, 0.2 and 0.6 everywhere."""
    shares = torch.tensor([0.1, 0.7, 0.3, 0.5, 0.2], dtype=torch.float64)
    weights = torch.stack([shares, (1 - shares) / 4, 3 * (1 - shares) / 4], dim=-1)[None, :, None].repeat(1, 1, 12, 1)
    heat = answer.call("token_map", weights, 0, 3, 4)
    if not close(plain(heat), torch.full((1, 3, 4), 0.36, dtype=torch.float64), rtol=1e-6):
        names = {"their sum": 1.8, "that of the first head": 0.1, "that of the last head": 0.2, "the largest": 0.7}
        names |= {"their geometric mean": math.prod(shares.tolist()) ** 0.2, "the same whatever the weights": 1 / 3}
        names |= {"scaled so that the largest is 1": 1.0, "scaled so that its 12 pixels add up to 1": 1 / 12}
        names |= {"their median": 0.3}
        got = float(heat.mean())
        name = next((f", {name}" for name, value in names.items() if math.isclose(got, value, rel_tol=1e-6)), "")
        raise Wrong(
            "five heads give the token 0.1, 0.7, 0.3, 0.5 and 0.2 of their weight at every pixel: your map is "
            f"{_range(heat)} there{name}",
            expected="0.36, their average",
        )


def _map_all(answer: Answer, g: Generator) -> None:
    """The maps of all tokens add up to 1 at every pixel: what one word gets, the others lack."""
    weights = _attended(g)
    maps = [answer.call("token_map", weights.clone(), token, 4, 5) for token in range(6)]
    total = sum(maps)
    if not close(plain(total), torch.ones_like(total), rtol=1e-6):
        raise Wrong(f"the maps of all 6 tokens must add up to 1 at every pixel; yours add up to {_range(total)}")
    if all(close(plain(one), plain(maps[0])) for one in maps):
        raise Wrong("the map is the same for every token")
    if close(plain(maps[0]), torch.full_like(maps[0], float(maps[0].mean()))):
        raise Wrong("the map is the same at every pixel")


def _box_uniform(answer: Answer, g: Generator) -> None:
    box = _box(g, 8, 9)
    got = answer.call("localisation", torch.full((2, 8, 9), 0.7, dtype=torch.float64), box)
    cells = (box[2] - box[0]) * (box[3] - box[1])
    if not close(plain(got), torch.full((2,), cells / 72, dtype=torch.float64), rtol=1e-6):
        raise Wrong(
            f"8 x 9 pixels of equal heat, box (top, left, bottom, right) = {box}: it has {cells} of the 72 pixels; you "
            f"return {_range(got)}, as if it had {float(got.mean()) * 72:.4g}",
            expected=f"{cells / 72:.4g}",
        )


def _box_edges(answer: Answer, g: Generator) -> None:
    """All heat on one pixel, just inside or just outside the box, at each of its four sides."""
    box = _box(g, 8, 9)
    top, left, bottom, right = box
    for row, column in (
        (top, left),
        (bottom - 1, right - 1),
        (top - 1, left),
        (top, left - 1),
        (bottom, left),
        (top, right),
    ):
        heat = torch.zeros(1, 8, 9, dtype=torch.float64)
        heat[0, row, column] = 2.0
        inside = float(top <= row < bottom and left <= column < right)
        got = float(answer.call("localisation", heat, box))
        if not math.isclose(got, inside, abs_tol=1e-6):
            where = "inside" if inside else "outside"
            raise Wrong(
                f"all heat on the pixel in row {row}, column {column}, {where} the box (top, left, bottom, right) = "
                f"{box}: you return {got:.3g}",
                expected=f"{inside:g}",
            )


def _box_parts(answer: Answer, g: Generator) -> None:
    """Four quadrants share out everything, and the share does not depend on how much there is."""
    heat = torch.rand(3, 8, 10, generator=g, dtype=torch.float64)
    boxes = [(top, left, top + 4, left + 5) for top in (0, 4) for left in (0, 5)]
    total = sum(answer.call("localisation", heat.clone(), box) for box in boxes)
    if not close(plain(total), torch.ones(3, dtype=torch.float64), rtol=1e-6):
        raise Wrong(
            f"the shares of the four quadrants of 8 x 10 pixels must add up to 1; yours add up to {_range(total)}"
        )
    scaled = heat * torch.tensor([1.0, 10.0, 100.0])[:, None, None]
    need(
        answer.call("localisation", scaled, boxes[1]),
        answer.call("localisation", heat, boxes[1]).detach(),
        "a map that is ten times as bright as another has another share in the box",
    )


def _geometric(weights: Tensor, token: int, height: int, width: int) -> Tensor:
    return weights.log().mean(1).softmax(-1)[..., token].reshape(-1, height, width)


def _map_by(f: Callable[[Tensor, int], Tensor]) -> Callable:
    def token_map(weights: Tensor, token: int, height: int, width: int) -> Tensor:
        return f(weights, token).reshape(-1, height, width)

    return token_map


def _map_turned(weights: Tensor, token: int, height: int, width: int) -> Tensor:
    return weights[..., token].mean(dim=1).reshape(-1, width, height).transpose(1, 2)


def _map_bright(weights: Tensor, token: int, height: int, width: int) -> Tensor:
    heat = token_map(weights, token, height, width)
    return heat / heat.amax(dim=(1, 2), keepdim=True)


def _map_shares(weights: Tensor, token: int, height: int, width: int) -> Tensor:
    heat = token_map(weights, token, height, width)
    return heat / heat.sum(dim=(1, 2), keepdim=True)


def _map_over_pixels(weights: Tensor, token: int, height: int, width: int) -> Tensor:
    return weights[..., token].mean(dim=2)


def _box_by(edges: Callable[[tuple], tuple] = lambda box: box, share: Callable | None = None) -> Callable:
    def localisation(heat: Tensor, box: tuple[int, int, int, int]) -> Tensor:
        top, left, bottom, right = edges(box)
        inside = heat[:, top:bottom, left:right]
        return share(inside, heat) if share else inside.sum(dim=(1, 2)) / heat.sum(dim=(1, 2))

    return localisation


def _map_loop(weights: Tensor, token: int, height: int, width: int) -> Tensor:
    heat = weights.new_zeros(len(weights), height, width)
    for row in range(height):
        for column in range(width):
            heat[:, row, column] = weights[:, :, row * width + column, token].sum(1) / weights.shape[1]
    return heat


def _map_einsum(weights: Tensor, token: int, height: int, width: int) -> Tensor:
    return torch.einsum("bhnl->bnl", weights).div(weights.size(1)).unflatten(1, (height, width))[:, :, :, token]


def _box_masked(heat: Tensor, box: tuple[int, int, int, int]) -> Tensor:
    rows, columns = (torch.arange(n, device=heat.device) for n in heat.shape[1:])
    inside = ((rows >= box[0]) & (rows < box[2]))[:, None] & ((columns >= box[1]) & (columns < box[3]))
    return (heat * inside).flatten(1).sum(1) / heat.flatten(1).sum(1)


def _box_shares(heat: Tensor, box: tuple[int, int, int, int]) -> Tensor:
    shares = heat / heat.sum((1, 2), keepdim=True)
    return torch.stack([share[box[0] : box[2], box[1] : box[3]].sum() for share in shares])


MAPS = Exercise(
    id="06.6",
    names=("token_map", "localisation"),
    references=(token_map, localisation),
    inputs=_map_inputs,
    batch=("weights", "heat"),
    facts=(
        Fact("token_map: pixels row by row", _map_place, "pixel number row * width + column"),
        Fact("token_map: the average over heads", _map_heads, "which axis is that of the heads?"),
        Fact("token_map: all tokens together make 1", _map_all, "one column of the weights, as it is"),
        Fact("localisation: equal heat, the share of the area", _box_uniform, "(bottom - top) (right - left) pixels"),
        Fact("localisation: the box ends where it says", _box_edges, "slices exclude their end, as the box does"),
        Fact("localisation: quadrants share out everything", _box_parts, "each map's share is of its own total"),
    ),
    mistakes=(
        Mistake(
            "picture transposed",
            "Height and width are exchanged and the picture is turned: pixels come row by row, `width` to a row. On "
            "square pictures nothing but the place would tell.",
            (_map_turned, localisation),
        ),
        Mistake(
            "average over pixels",
            "You average over the pixels instead of the heads: no picture is left.",
            (_map_over_pixels, localisation),
        ),
        Mistake(
            "sum over heads",
            "The heads are summed up, not averaged: the map may be above 1.",
            (_map_by(lambda w, i: w[..., i].sum(1)), localisation),
        ),
        Mistake(
            "first head only",
            "You show the first head alone: others may look elsewhere.",
            (_map_by(lambda w, i: w[:, 0, :, i]), localisation),
        ),
        Mistake(
            "largest head",
            "At each pixel you show the head that looks at the token most, not their average.",
            (_map_by(lambda w, i: w[..., i].amax(1)), localisation),
        ),
        Mistake(
            "average of scores",
            "You average logarithms (scores) over the heads and take the softmax afterwards: a head that is sure then "
            "outvotes all others. It is the weights that are averaged.",
            (_geometric, localisation),
        ),
        Mistake(
            "average over tokens",
            "You average over the tokens: a pixel's weights add up to 1, so that this is 1 / L everywhere, whatever "
            "the network looks at.",
            (_map_by(lambda w, i: w.mean(dim=(1, 3))), localisation),
        ),
        Mistake(
            "next token",
            "You show the token before the one asked for: tokens are counted from 0.",
            (_map_by(lambda w, i: w[..., i - 1].mean(1)), localisation),
        ),
        Mistake(
            "brightest pixel 1",
            "Each map is divided by its largest value: that is fit for looking at, but maps of different words can no "
            "longer be compared.",
            (_map_bright, localisation),
        ),
        Mistake(
            "map adds up to 1",
            "Each map is divided by its sum over the pixels: asked for are the weights as they are. localisation takes "
            "the share later.",
            (_map_shares, localisation),
        ),
        Mistake(
            "box includes its end",
            "The box is one row and one column too large: bottom and right are excluded, as in a slice.",
            (token_map, _box_by(lambda box: (box[0], box[1], box[2] + 1, box[3] + 1))),
        ),
        Mistake(
            "rows counted from 1",
            "The box is read as if rows and columns were counted from 1: it lies one row too high and one column too "
            "far to the left.",
            (token_map, _box_by(lambda box: tuple(edge - 1 for edge in box))),
        ),
        Mistake(
            "x before y",
            "The box is read as (left, top, right, bottom); here rows come first: (top, left, bottom, right).",
            (token_map, _box_by(lambda box: (box[1], box[0], box[3], box[2]))),
        ),
        Mistake(
            "height and width of the box",
            "The last two numbers of the box are read as its height and width; they are where it ends.",
            (token_map, _box_by(lambda box: (box[0], box[1], box[0] + box[2], box[1] + box[3]))),
        ),
        Mistake(
            "sum, not share",
            "You return the heat in the box, not its share of the total.",
            (token_map, _box_by(share=lambda inside, heat: inside.sum(dim=(1, 2)))),
        ),
        Mistake(
            "mean of the box",
            "You divide by the size of the box: that is how hot it is, not which share of the heat it holds.",
            (token_map, _box_by(share=lambda inside, heat: inside.mean(dim=(1, 2)))),
        ),
        Mistake(
            "share of the batch",
            "You divide by the total of the whole batch: each map has a total of its own.",
            (token_map, _box_by(share=lambda inside, heat: inside.sum(dim=(1, 2)) / heat.sum())),
        ),
        Mistake(
            "inside over outside",
            "You divide by the heat outside the box; a share is of the whole.",
            (
                token_map,
                _box_by(share=lambda i, heat: i.sum(dim=(1, 2)) / (heat.sum(dim=(1, 2)) - i.sum(dim=(1, 2)))),
            ),
        ),
    ),
    alternatives=((_map_loop, _box_masked), (_map_einsum, _box_shares)),
    hints=(
        "token_map: pick one token from the last axis, average over one axis, and part the axis of pixels into two. "
        "localisation: two slices, and two sums over the axes of the picture.",
        "weights[..., token].mean(dim=1).reshape(-1, height, width); heat[:, top:bottom, left:right].sum(dim=(1, 2)) / "
        "heat.sum(dim=(1, 2)).",
    ),
    hides=(),
)

# --- 06.7 drop_caption, token_swap ------------------------------------------------------------------------------------

_PAD, _NULL = 7, 4


def _captions(g: Generator, n: int, length: int = 6) -> tuple[Tensor, Tensor]:
    """Ids and mask of n captions of two to `length` tokens, none of them pad or null."""
    count = torch.randint(2, length + 1, (n, 1), generator=g)
    mask = torch.arange(length) < count
    return torch.where(mask, torch.randint(10, 30, (n, length), generator=g), _PAD), mask


def _empty(length: int = 6) -> tuple[list[int], list[bool]]:
    return [_NULL] + [_PAD] * (length - 1), [True] + [False] * (length - 1)


class Painter:
    """A sampler whose pictures are (caption's number, noise, noise); `asked` records the captions and the noise."""

    def __init__(self) -> None:
        self.known: list[str] = []
        self.asked: list[tuple[list[str], Tensor]] = []

    def __call__(self, captions: Sequence[str], generator: Generator) -> Tensor:
        captions = list(captions)
        noise = torch.randn(len(captions), 2, generator=generator)
        self.asked.append((captions, noise))
        self.known += [caption for caption in captions if caption not in self.known]
        return torch.cat([torch.tensor([[float(self.known.index(caption))] for caption in captions]), noise], dim=1)


class Looker:
    """A judge of a Painter's pictures, which may be of their caption and still wrong: where it is not among `right`."""

    def __init__(self, painter: Painter, right: set[str]):
        self.painter, self.right = painter, right
        self.mixed = 0  # pictures that came with another caption than they were painted for

    def __call__(self, pictures: Tensor, captions: Sequence[str]) -> Tensor:
        names = [self.painter.known[int(row[0])] for row in pictures]
        other = [name != caption for name, caption in zip(names, captions, strict=True)]
        self.mixed += sum(other)
        wrong = [odd or caption not in self.right for odd, caption in zip(other, captions, strict=True)]
        return ~torch.tensor(wrong, dtype=torch.bool)


def _pairs(g: Generator) -> tuple[list[str], list[str], set[str]]:
    """Captions and swapped ones, in random order, and which pictures are right: of 7 pairs that change 2 are right in
    both, 3 in the first and 1 in the second alone, 1 in none; of 3 that do not change 2 are right."""
    digits = torch.randperm(10, generator=g).tolist()
    names = [scenes.DIGITS[i] for i in digits]
    changing = [(f"a {a} , a {b}", f"a {b} , a {a}") for a, b in pairwise(names[:8])]
    same = [f"a {name}" for name in names[:2]] + [f"a {names[3]} , a {names[3]}"]
    right = {caption for pair in changing[:2] for caption in pair} | {one for one, _ in changing[2:5]}
    right |= {changing[5][1], *same[:2]}
    pairs = changing + [(caption, caption) for caption in same]
    pairs = [pairs[i] for i in torch.randperm(10, generator=g).tolist()]
    return [one for one, _ in pairs], [other for _, other in pairs], right


def _swap_args(g: Generator) -> dict:
    captions, swapped, right = _pairs(g)
    painter = Painter()
    judge = Looker(painter, right)
    return dict(sample=painter, judge=judge, captions=captions, swapped=swapped, seed=integer(g, 0, 10**6))


def _drop_inputs(g: Generator) -> dict:
    ids, mask = _captions(g, 12)
    return {
        "drop_caption": dict(ids=ids, mask=mask, p=0.9, pad=_PAD, null=_NULL, gen=_gen(g)),
        "token_swap": _swap_args(g),
    }


def _dropped(answer: Answer, ids: Tensor, mask: Tensor, p: float, gen: Generator) -> tuple[Tensor, Tensor]:
    return answer.call("drop_caption", ids.clone(), mask.clone(), p, _PAD, _NULL, gen)


def _drop_ends(answer: Answer, g: Generator) -> None:
    ids, mask = _captions(g, 40)
    new_ids, new_mask = _dropped(answer, ids, mask, 0.0, _gen(g))
    for name, got, before in (("ids", new_ids, ids), ("masks", new_mask, mask)):
        changed = int((got != before).any(1).sum())
        if changed:
            raise Wrong(f"at p = 0 every caption must stay as it is, and the {name} of {changed} of 40 changed")
    new_ids, new_mask = _dropped(answer, ids, mask, 1.0, _gen(g))
    due_ids, due_mask = _empty()
    odd = [i for i in range(40) if new_ids[i].tolist() != due_ids or new_mask[i].tolist() != due_mask]
    if odd:
        raise Wrong(
            f"at p = 1, with pad = {_PAD} and null = {_NULL}, the caption with the ids {ids[odd[0]].tolist()} becomes "
            f"{new_ids[odd[0]].tolist()}, mask {_bits(new_mask[odd[0]])}: the empty caption is null, then pads, and "
            "only null counts",
            expected=f"{due_ids}, mask {_bits(torch.tensor(due_mask))}",
        )


def _bits(mask: Tensor) -> str:
    """T for True."""
    return " ".join("T" if m else "F" for m in mask.tolist())


def _drop_whole(answer: Answer, g: Generator) -> None:
    ids, mask = _captions(g, 300)
    new_ids, new_mask = _dropped(answer, ids, mask, 0.4, _gen(g))
    empty_ids, empty_mask = (torch.tensor(part) for part in _empty())
    ids_stay, ids_go = (new_ids == ids).all(1), (new_ids == empty_ids).all(1)
    mask_stays, mask_goes = (new_mask == mask).all(1), (new_mask == empty_mask).all(1)
    odd = (~((ids_stay & mask_stays) | (ids_go & mask_goes))).nonzero().flatten().tolist()
    if odd:
        i = odd[0]
        raise Wrong(
            f"{len(odd)} of 300 captions are neither as they were nor the empty one: ids {ids[i].tolist()}, mask "
            f"{_bits(mask[i])}, became {new_ids[i].tolist()}, mask {_bits(new_mask[i])} (pad = {_PAD}, null = {_NULL})"
        )


def _drop_share(answer: Answer, g: Generator) -> None:
    n, p = 4000, (0.1, 0.2, 0.3)[integer(g, 0, 2)]
    ids, mask = _captions(g, n)
    got = float((_dropped(answer, ids, mask, p, _gen(g))[0] != ids).any(1).double().mean())
    if abs(got - p) > 7 * math.sqrt(p * (1 - p) / n):
        raise Wrong(f"with p = {p}, {got:.3f} of {n} captions are changed")


def _drop_coins(answer: Answer, g: Generator) -> None:
    n, p, batches, gen = 40, 0.2, 100, _gen(g)
    ids, mask = _captions(g, n)
    gone = torch.stack([(_dropped(answer, ids, mask, p, gen)[0] != ids).any(1) for _ in range(batches)])
    if not gone.any() or gone.all():
        return  # for the share to say
    places, counts = gone.sum(0), gone.sum(1).double()
    if ((places == 0) | (places == batches)).all():
        raise Wrong(
            f"in {batches} batches it is always the same captions that are dropped: draw anew from gen each time"
        )
    share = float(gone.double().mean())
    ratio = float(counts.var()) / (n * share * (1 - share))
    if not 0.45 < ratio < 1.8:
        why = "captions share their coins" if ratio > 1 else "the number is fixed, not left to chance"
        raise Wrong(
            f"of {n} captions {counts.min():.0f} to {counts.max():.0f} are dropped, with p = {p}, a standard "
            f"deviation of {float(counts.std()):.1f}; coins of their own would give "
            f"{math.sqrt(n * share * (1 - share)):.1f}: {why}"
        )


def _drop_types(answer: Answer, g: Generator) -> None:
    new_ids, new_mask = _dropped(answer, *_captions(g, 20), 0.5, _gen(g))
    if new_ids.dtype != torch.int64 or new_mask.dtype != torch.bool:
        raise Wrong(f"ids came back as {new_ids.dtype}, the mask as {new_mask.dtype}: int64 and bool went in")


def _swap_value(answer: Answer, g: Generator) -> None:
    args = _swap_args(g)
    got = float(answer.call("token_swap", *args.values()))
    if args["judge"].mixed:
        raise Wrong(f"{args['judge'].mixed} pictures were judged by another caption than the one they were made for")
    names = {"the share of right pictures, not of pairs": 8 / 14, "the share of pairs with at least one right": 6 / 7}
    names |= {"the share of first captions that are right": 5 / 7, "the share of swapped ones that are right": 3 / 7}
    names |= {"as if the 3 pairs that do not change counted too": 4 / 10, "2 of all 10, with those 3 below": 2 / 10}
    names |= {"the share of all 20 pictures": 12 / 20, "the product of the two shares": 15 / 49}
    if not math.isclose(got, 2 / 7, rel_tol=1e-6):
        name = next((f", {name}" for name, value in names.items() if math.isclose(got, value, rel_tol=1e-6)), "")
        raise Wrong(
            "10 pairs, 3 of which do not change; of the other 7, 2 have both pictures right, 3 the first alone, 1 the "
            f"second alone, 1 none: you return {got:.4g}{name}",
            expected="2/7 = 0.2857",
        )


def _noises(painter: Painter) -> dict[str, list[Tensor]]:
    """By caption, the noise that its pictures started from."""
    found: dict[str, list[Tensor]] = {}
    for captions, noise in painter.asked:
        for caption, one in zip(captions, noise, strict=True):
            found.setdefault(caption, []).append(one)
    return found


def _swap_noise(answer: Answer, g: Generator) -> None:
    starts = []
    for shift in (0, 1):
        args = _swap_args(Generator().manual_seed(1))
        args["seed"] = integer(g, 0, 10**6) + shift
        answer.call("token_swap", *args.values())
        found, firsts = _noises(args["sample"]), []
        for one, other in zip(args["captions"], args["swapped"], strict=True):
            if one == other:
                continue
            if one not in found or other not in found:
                raise Wrong(f'no picture was made for "{one if one not in found else other}"')
            if not any(torch.equal(x, y) for x in found[one] for y in found[other]):
                raise Wrong(
                    f'"{one}" and "{other}" start from different noise: the pair is to differ in its words and in '
                    "nothing else"
                )
            firsts.append(found[one][0])
        if all(torch.equal(x, firsts[0]) for x in firsts):
            raise Wrong("all pairs start from one noise: the result would hang on a single draw")
        starts.append(torch.stack(firsts))
    if torch.equal(*starts):
        raise Wrong("the noise is the same whatever the seed")


def _swap_none(answer: Answer, g: Generator) -> None:
    args = _swap_args(g)
    same = ["a two", "a three , a three"]
    _refused(answer, "token_swap", (args["sample"], args["judge"], same, list(same), 3), "no caption changes")


def _drop_by(
    coins: Callable[[Tensor, float, Generator], Tensor] = lambda ids, p, gen: torch.rand(len(ids), generator=gen) < p,
    ids_of: Callable[..., Tensor] = lambda ids, gone, first, pad, null: torch.where(
        gone, torch.where(first, null, pad), ids
    ),
    mask_of: Callable[..., Tensor] = lambda mask, gone, first: torch.where(gone, first, mask),
) -> Callable:
    def drop_caption(ids: Tensor, mask: Tensor, p: float, pad: int, null: int, gen: Generator) -> tuple[Tensor, Tensor]:
        gone = coins(ids, p, gen)
        gone = gone if gone.ndim == 2 else gone[:, None]
        first = (torch.arange(ids.shape[1]) == 0).expand_as(ids)
        return ids_of(ids, gone, first, pad, null), mask_of(mask, gone, first)

    return drop_caption


def _drop_in_place(ids: Tensor, mask: Tensor, p: float, pad: int, null: int, gen: Generator) -> tuple[Tensor, Tensor]:
    gone = torch.rand(len(ids), generator=gen) < p
    ids[gone], mask[gone] = pad, False
    ids[gone, 0], mask[gone, 0] = null, True
    return ids, mask


def _drop_rows(ids: Tensor, mask: Tensor, p: float, pad: int, null: int, gen: Generator) -> tuple[Tensor, Tensor]:
    ids, mask = ids.clone(), mask.clone()
    for i in range(ids.shape[0]):
        if torch.rand((), generator=gen).item() < p:
            ids[i], mask[i] = pad, False
            ids[i, 0], mask[i, 0] = null, True
    return ids, mask


def _drop_bernoulli(ids: Tensor, mask: Tensor, p: float, pad: int, null: int, gen: Generator) -> tuple[Tensor, Tensor]:
    keep = torch.bernoulli(torch.full((len(ids), 1), 1 - p), generator=gen)
    empty = F.pad(torch.full_like(ids[:, :1], null), (0, ids.shape[1] - 1), value=pad)
    shown = F.pad(torch.ones_like(mask[:, :1]), (0, ids.shape[1] - 1), value=False)
    return torch.where(keep > 0, ids, empty), (mask & (keep > 0)) | (shown & (keep == 0))


def _swap_by(
    keep: Callable[[str, str], bool] = lambda one, other: one != other,
    start: Callable[[int, int], Generator] = lambda seed, which: Generator().manual_seed(seed),
    both: Callable[[Tensor, Tensor], object] = lambda x, y: (x & y).double().mean(),
    asks: Callable[[list, list], tuple] = lambda ones, others: (ones, others),
    judged: Callable[[list, list], tuple] = lambda ones, others: (ones, others),
    none: Callable[[], float] | None = None,
) -> Callable:
    def token_swap(sample: Callable, judge: Callable, captions: Sequence, swapped: Sequence, seed: int) -> float:
        pairs = [(one, other) for one, other in zip(captions, swapped, strict=True) if keep(one, other)]
        if all(one == other for one, other in pairs):
            if none:
                return none()
            raise ValueError("no caption changes")
        ones, others = [one for one, _ in pairs], [other for _, other in pairs]
        right = [
            judge(sample(some, start(seed, i)), said)
            for i, (some, said) in enumerate(zip(asks(ones, others), judged(ones, others), strict=True))
        ]
        return float(both(*right))

    return token_swap


def _swap_continued(sample: Callable, judge: Callable, captions: Sequence, swapped: Sequence, seed: int) -> float:
    gen = Generator().manual_seed(seed)
    return _swap_by(start=lambda seed, which: gen)(sample, judge, captions, swapped, seed)


def _swap_single_noise(sample: Callable, judge: Callable, captions: Sequence, swapped: Sequence, seed: int) -> float:
    return _swap_pairwise(sample, judge, captions, swapped, seed, step=0)


def _swap_pairwise(
    sample: Callable, judge: Callable, captions: Sequence, swapped: Sequence, seed: int, step: int = 1
) -> float:
    """One pair after the other, each with a seed of its own."""
    total = right = 0
    for i, (one, other) in enumerate(zip(captions, swapped, strict=True)):
        if one == other:
            continue
        total += 1
        verdicts = [judge(sample([c], Generator().manual_seed(seed + step * i)), [c])[0].item() for c in (one, other)]
        right += all(verdicts)
    if total == 0:
        raise ValueError("nothing to compare")
    return right / total


def _swap_all(sample: Callable, judge: Callable, captions: Sequence, swapped: Sequence, seed: int) -> float:
    """Pictures of all captions, those that stay as they are left out afterwards."""
    changes = torch.tensor([one != other for one, other in zip(captions, swapped, strict=True)])
    if not changes.any():
        raise ValueError("no caption changes")
    first = judge(sample(captions, Generator().manual_seed(seed)), captions)
    second = judge(sample(swapped, Generator().manual_seed(seed)), swapped)
    return torch.logical_and(first, second)[changes].float().mean().item()


def _drop_see(answer: Answer, g: Generator) -> object:
    """Categories, the same for all answers with one mistake, in whatever order they draw."""
    ids, mask = _captions(g, 12)
    ids[:, :2], mask[:, :2] = ids[:, :2].clamp(min=10), True
    ids[3], mask[3] = 20, True
    gen, p = _gen(g), 0.2
    outs, changed = [], False
    for _ in range(60):
        given = ids.clone(), mask.clone()
        outs.append(answer.call("drop_caption", *given, p, _PAD, _NULL, gen))
        changed |= not (torch.equal(given[0], ids) and torch.equal(given[1], mask))
    new_ids, new_mask = (torch.stack([out[i] for out in outs]) for i in (0, 1))
    off = (new_ids != ids).any(2) | (new_mask != mask).any(2)
    counts, share = off.sum(1), float(off.double().mean())
    empty_ids, empty_mask = (torch.tensor(part) for part in _empty())
    ids_go, mask_go = (new_ids == empty_ids).all(2), (new_mask == empty_mask).all(2)
    whole = [bool(((new_ids == ids).all(2) | ids_go).all()), bool(((new_mask == mask).all(2) | mask_go).all())]
    one_coin = 0 < share < 1 and bool(((counts == 0) | (counts == 12)).all())
    at_p = [float((new_ids[..., j] != ids[:, j]).double().mean()) for j in (0, 1)]
    one = answer.call("drop_caption", ids[3:4].clone(), mask[3:4].clone(), 1.0, _PAD, _NULL, _gen(g))
    seed, twins = integer(g, 0, 999), []
    for noise in (1, 2):
        answer.reseed(noise)
        long = _captions(Generator().manual_seed(0), 100)
        twins.append(answer.call("drop_caption", *long, 0.5, _PAD, _NULL, Generator().manual_seed(seed))[0])
    return dict(
        one=plain(one),
        dtypes=[str(new_ids.dtype), str(new_mask.dtype)],
        changed=changed,
        whole=whole,
        together=bool((ids_go == mask_go).all()),
        share="one coin" if one_coin else _nearest(share),
        columns="one coin" if one_coin else [_nearest(value) for value in at_p],
        exactly=bool((counts == counts[0]).all()),
        from_gen=torch.equal(*twins),
    )


def _nearest(share: float) -> str:
    known = {"none": 0.0, "p": 0.2, "1 - p": 0.8, "all": 1.0}
    return next((name for name, value in known.items() if abs(share - value) < 0.08), "another")


def _swap_see(answer: Answer) -> object:
    args = _swap_args(Generator().manual_seed(5))
    got = answer.call("token_swap", *args.values())
    found = _noises(args["sample"])
    pairs = [
        (a, b) for a, b in zip(args["captions"], args["swapped"], strict=True) if a != b and a in found and b in found
    ]
    noise = [bool(any(torch.equal(x, y) for x in found[a] for y in found[b])) for a, b in pairs]
    firsts = [found[a][0] for a, _ in pairs]
    same = ["a two", "a three , a three"]
    none = _outcome(answer, "token_swap", args["sample"], args["judge"], same, same, 3)
    return dict(
        got=round(float(got), 6),
        mixed=args["judge"].mixed > 0,
        asked=sorted(found) == sorted({c for pair in pairs for c in pair}),
        noise=noise,
        one_noise=len(firsts) > 1 and all(torch.equal(x, firsts[0]) for x in firsts),
        none=none if isinstance(none, str) else round(float(none), 6) if float(none) == float(none) else "NaN",
    )


_SWAP, _DROP = token_swap, drop_caption

DROP_SWAP = Exercise(
    by_probe=True,
    id="06.7",
    names=("drop_caption", "token_swap"),
    references=(drop_caption, token_swap),
    inputs=_drop_inputs,
    changes=("gen", "sample", "judge"),
    without=("keeps the dtype of its inputs",),  # ids and masks have theirs, which are looked at
    facts=(
        Fact(
            "drop_caption: p = 0 keeps all, p = 1 leaves the empty caption",
            _drop_ends,
            "two results, ids and mask, have to say the same",
        ),
        Fact(
            "drop_caption: captions stay or go as a whole, ids and mask together",
            _drop_whole,
            "one coin for a row, (B,), turned to (B, 1)",
        ),
        Fact("drop_caption: each caption has its own coin", _drop_coins, "how many random numbers do B captions need?"),
        Fact("drop_caption: the share p is dropped", _drop_share, "which side of the comparison is dropped?"),
        Fact("drop_caption: integers and booleans stay what they are", _drop_types, "torch.where keeps the dtype"),
        Fact(
            "token_swap: the share of changed pairs with both pictures right",
            _swap_value,
            "filter the pairs first; then both, not either",
        ),
        Fact(
            "token_swap: one noise for a pair, different ones for different pairs",
            _swap_noise,
            "two generators with the same seed draw the same numbers",
        ),
        Fact(
            "token_swap: nothing to compare raises ValueError",
            _swap_none,
            "the mean of nothing is NaN, and says nothing",
        ),
    ),
    mistakes=(
        Mistake(
            "words dropped",
            "You drop single words: each has a coin of its own. What is left is another caption, not none; guidance "
            "needs the network's answer to the empty one.",
            (_drop_by(lambda ids, p, gen: torch.rand(ids.shape, generator=gen) < p), _SWAP),
        ),
        Mistake(
            "mask kept",
            "The ids of a dropped caption are replaced, and its mask is kept: the null caption still reads as many "
            "pads as the old one had words.",
            (_drop_by(mask_of=lambda mask, gone, first: mask.clone()), _SWAP),
        ),
        Mistake(
            "two coins",
            "ids and mask are dropped by coins of their own, so that an empty caption keeps the mask of a long one, "
            "and the other way round: toss once, and use that for both.",
            (
                lambda ids, mask, p, pad, null, gen: (
                    _DROP(ids, mask, p, pad, null, gen)[0],
                    _DROP(ids, mask, p, pad, null, gen)[1],
                ),
                _SWAP,
            ),
        ),
        Mistake(
            "one coin per batch",
            "You toss one coin for the whole batch: all captions are dropped or none. Each needs its own.",
            (_drop_by(lambda ids, p, gen: (torch.rand((), generator=gen) < p).expand(len(ids))), _SWAP),
        ),
        Mistake(
            "inverted",
            "Captions are dropped with probability 1 - p: the comparison is the wrong way round.",
            (_drop_by(lambda ids, p, gen: torch.rand(len(ids), generator=gen) > p), _SWAP),
        ),
        Mistake(
            "mask all False",
            "The mask of a dropped caption has no True: attention takes a softmax over no token at all, which is NaN. "
            "The token null counts.",
            (_drop_by(mask_of=lambda mask, gone, first: mask & ~gone), _SWAP),
        ),
        Mistake(
            "pads without null",
            "A dropped caption becomes nothing but pads: its first token must be null, which stands for no caption.",
            (_drop_by(ids_of=lambda ids, gone, first, pad, null: torch.where(gone, pad, ids)), _SWAP),
        ),
        Mistake(
            "null everywhere",
            "A dropped caption is filled up with null: it is one null, then pads, as encode makes it of the empty "
            "caption.",
            (_drop_by(ids_of=lambda ids, gone, first, pad, null: torch.where(gone, null, ids)), _SWAP),
        ),
        Mistake(
            "words left behind null",
            "Only the first token of a dropped caption is replaced: its other words are still there, and whoever takes "
            "the mask from the ids reads them.",
            (_drop_by(ids_of=lambda ids, gone, first, pad, null: torch.where(gone & first, null, ids)), _SWAP),
        ),
        Mistake(
            "in place",
            "ids and mask are overwritten in place: the next epoch finds captions dropped already, and in the end "
            "there are none left.",
            (_drop_in_place, _SWAP),
        ),
        Mistake(
            "gen not used",
            "The random numbers do not come from gen, so that a run cannot be repeated.",
            (_drop_by(lambda ids, p, gen: torch.rand(len(ids)) < p), _SWAP),
        ),
        Mistake(
            "other noise in the pair",
            "The two pictures of a pair start from different noise, because one generator goes on drawing: if they "
            "differ, nobody knows whether the words or the noise did it. Seed it again for the second half.",
            (_DROP, _swap_continued),
        ),
        Mistake(
            "one noise for all pairs",
            "All pairs start from one and the same noise: the result hangs on a single draw. Sample many captions with "
            "one generator, or give each pair a seed of its own.",
            (_DROP, _swap_single_noise),
        ),
        Mistake(
            "unchanged captions counted",
            "Captions that the swap leaves as they are, with one digit or the same twice, are counted too: they are "
            "right twice or never, and tell nothing about binding.",
            (_DROP, _swap_by(keep=lambda one, other: True)),
        ),
        Mistake(
            "unchanged captions in the denominator",
            "Captions that the swap leaves as they are do not count as right, but you divide by them too.",
            (
                _DROP,
                lambda sample, judge, captions, swapped, seed: (
                    _SWAP(sample, judge, captions, swapped, seed)
                    * sum(one != other for one, other in zip(captions, swapped, strict=True))
                    / len(captions)
                ),
            ),
        ),
        Mistake(
            "pictures, not pairs",
            "You count pictures that are right, not pairs: a network that ignores which digit goes where is right in "
            "one picture of many a pair by luck.",
            (_DROP, _swap_by(both=lambda x, y: (x.double().mean() + y.double().mean()) / 2)),
        ),
        Mistake(
            "either is enough",
            "A pair counts as right if one of its pictures is: both must be.",
            (_DROP, _swap_by(both=lambda x, y: (x | y).double().mean())),
        ),
        Mistake(
            "product of two shares",
            "You multiply the shares of right pictures on either side: that is the share of right pairs only if the "
            "two had nothing to do with each other.",
            (_DROP, _swap_by(both=lambda x, y: x.double().mean() * y.double().mean())),
        ),
        Mistake(
            "judged by the first caption",
            "The pictures of the swapped captions are judged by the captions before the swap.",
            (_DROP, _swap_by(judged=lambda ones, others: (ones, ones))),
        ),
        Mistake(
            "swapped captions never used",
            "The pictures of both halves are made for the captions before the swap: nothing was exchanged.",
            (_DROP, _swap_by(asks=lambda ones, others: (ones, ones), judged=lambda ones, others: (ones, ones))),
        ),
        Mistake(
            "0 for nothing",
            "Where no caption changes you return 0, as if every pair had been wrong. There was none: raise ValueError.",
            (_DROP, _swap_by(none=lambda: 0.0)),
        ),
        Mistake(
            "NaN for nothing",
            "Where no caption changes you return NaN, the mean of nothing, which then wanders through every table: "
            "raise ValueError.",
            (_DROP, _swap_by(none=lambda: math.nan)),
        ),
    ),
    alternatives=((_drop_rows, _swap_pairwise), (_drop_bernoulli, _swap_all)),
    hints=(
        "drop_caption: as drop_labels, but for rows of two tensors, with one coin (B, 1) for both; what does encode "
        "make of the empty caption? token_swap: filter the pairs, sample twice with equally seeded generators, judge "
        "each half by its own captions, combine.",
        "dropped = (torch.rand(len(ids), generator=gen) < p)[:, None]; first = torch.arange(L) == 0; "
        "torch.where(dropped, torch.where(first, null, pad), ids) and torch.where(dropped, first, mask). For the "
        "pairs that change: judge(sample(some, torch.Generator().manual_seed(seed)), some) for both halves, then the "
        "mean of right[0] & right[1].",
    ),
    hides=("train.drop",),
    probe=lambda answer, g: [_drop_see(answer, g), _swap_see(answer)],
    points=2,
)

# --- 06.8 my_attention_test -------------------------------------------------------------------------------------------


def _test_case(n: int = 5, tokens: int = 3) -> list[Tensor]:
    q, k, v = torch.randn(2, n, 4), torch.randn(2, tokens, 4), torch.randn(2, tokens, 6)
    mask = torch.ones(2, tokens, dtype=torch.bool)
    mask[1, -1] = False
    return [q, k, v, mask]


def _only_shape(attention: Callable) -> None:
    assert attention(*_test_case()).shape == (2, 5, 6)


def _only_unmasked(attention: Callable) -> None:
    q, k, v, mask = _test_case()
    out = attention(q, k, v, torch.ones_like(mask))
    assert torch.allclose(out, F.scaled_dot_product_attention(q, k, v), atol=1e-5)


def _only_sums(attention: Callable) -> None:
    q, k, v, mask = _test_case()
    assert torch.allclose(attention(q, k, torch.ones_like(v), mask), torch.ones(2, 5, 6), atol=1e-5)


def _only_blind(attention: Callable) -> None:
    q, k, v, mask = _test_case()
    other = v.clone()
    other[1, -1] += 100
    assert torch.allclose(attention(q, k, v, mask), attention(q, k, other, mask), atol=1e-4)


def _own_formula(attention: Callable) -> None:
    q, k, v, mask = _test_case()
    weights = (q @ k.mT).masked_fill(~mask[:, None], -math.inf).softmax(-1)
    assert torch.allclose(attention(q, k, v, mask), weights @ v, atol=1e-5)


def _says_so(attention: Callable) -> bool:
    q, k, v, mask = _test_case()
    return torch.allclose(attention(q, k, v, mask), _sdpa(q, k, v, mask), atol=1e-5)


def _test_by_torch(attention: Callable) -> None:
    for n, tokens in ((5, 3), (4, 7)):
        q, k, v, mask = _test_case(n, tokens)
        torch.testing.assert_close(attention(q, k, v, mask), _sdpa(q, k, v, mask))


def _test_by_hand(attention: Callable) -> None:
    """One query, three tokens, of which the last is masked: weights 3 to 1 between the two others."""
    q = torch.full((1, 2, 4), 1.0).double()
    k = torch.tensor([[[math.log(3) / 2] * 4, [0.0] * 4, [5.0] * 4]]).double()
    v = torch.eye(3).double()[None]
    q[0, 1] = 0
    out = attention(q, k, v, torch.tensor([[True, True, False]]))
    for got, due in zip(out[0].flatten().tolist(), [0.75, 0.25, 0, 0.5, 0.5, 0], strict=True):
        if abs(got - due) > 1e-6:
            raise ValueError(f"{got} for {due}")


_wrong_attention = {mistake.name: mistake.answers[0] for mistake in ATTENTION.mistakes}

ATTENTION_TEST = test_exercise(
    "06.8",
    "my_attention_test",
    my_attention_test,
    right=(attention, _sdpa, _attention_loop),
    wrong=tuple(
        (title, _wrong_attention[name])
        for name, title in (
            ("softmax over the queries, -1e9 for the mask", "one whose softmax runs over the queries"),
            ("no scale", "one that does not divide the scores"),
            ("1/d", "one that divides by d"),
            ("masked scores set to 0", "one that sets masked scores to 0"),
            ("masked after the softmax", "one that masks after the softmax"),
            ("mask ignored", "one that ignores the mask"),
            ("mask inverted", "one that has the mask the other way round"),
        )
    ),
    needed=6,
    mistakes=(
        Mistake(
            "shape only",
            "Your test lets every wrong function pass: it looks at the shape alone, or at nothing, and every wrong "
            "formula has the right shape.",
            (_only_shape,),
        ),
        Mistake(
            "nothing masked",
            "Your test never masks a token: three ways to get the mask wrong go unnoticed.",
            (_only_unmasked,),
        ),
        Mistake(
            "sums only",
            "Your test looks only at whether a query's weights add up to 1, with all values alike: which token gets "
            "how much it does not see, nor whether a masked one gets something.",
            (_only_sums,),
        ),
        Mistake(
            "masked values only",
            "Your test looks only at whether the value of a masked token matters: it sees neither the scale nor the "
            "weights of the others.",
            (_only_blind,),
        ),
        Mistake(
            "a wrong formula of its own",
            "Your test refuses correct functions: the formula it compares with is wrong (are the scores divided by "
            "sqrt(d)?), or it is too strict, with == where allclose is due.",
            (_own_formula,),
        ),
        Mistake(
            "returns its verdict",
            "Your test returns True or False. A test says no by raising (assert ...), and says yes by returning "
            "nothing.",
            (_says_so,),
        ),
    ),
    alternatives=(_test_by_torch, _test_by_hand),
    hides=("layers.Attention",),
    hints=(
        "F.scaled_dot_product_attention knows the right answer; its attn_mask has an axis for the queries. Or choose "
        "inputs for which you know it: what comes out with all values 1? When a masked token's value changes?",
        "With different N, L, d and e, and at least one masked token: allclose to "
        "F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None]).",
    ),
)

EXERCISES = (ENCODE, ATTENTION, HEADS, COST, CHUNKED, MAPS, DROP_SWAP, ATTENTION_TEST)
