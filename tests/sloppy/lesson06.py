"""Wrong answers to lesson 06 that are not on file, as people in a hurry write them."""

import math

import torch
import torch.nn.functional as F
from torch import Generator

from condiff_check.lesson06 import (
    attn_cost,
    drop_caption,
    encode,
    localisation,
    merge_heads,
    split_heads,
    token_map,
    token_swap,
)

# --- 06.1 encode ------------------------------------------------------------------------------------------------------


def encode_with(row, refuse=True):
    """row(caption, vocab, length) -> list of ids; the mask is where they are not pads."""

    def wrong(captions, vocab, length):
        rows = [row(caption, vocab, length) for caption in captions]
        if refuse and any(len(r) > length for r in rows):
            raise ValueError("too long")
        ids = torch.tensor([r + [vocab["<pad>"]] * (length - len(r)) for r in rows])
        return ids, ids != vocab["<pad>"]

    return wrong


def known(words, vocab):
    if any(word not in vocab for word in words):
        raise ValueError("unknown")
    return [vocab[word] for word in words]


def split(caption):
    return caption.lower().replace(",", " , ").split() or ["<null>"]


key_error = encode_with(lambda c, v, n: [v[w] for w in split(c)])
always_null = encode_with(lambda c, v, n: known(["<null>"] * bool(c) + split(c), v))
off_by_one = encode_with(lambda c, v, n: known(split(c), v) + [0] * (n if len(split(c)) >= n else 0))
unknown_is_null = encode_with(lambda c, v, n: [v.get(w, v["<null>"]) for w in split(c)])
sorted_words = encode_with(lambda c, v, n: sorted(known(split(c), v)))
letters = encode_with(lambda c, v, n: [v.get(w, 0) for w in c])


def mask_of_ids(captions, vocab, length):
    ids, _ = encode(captions, vocab, length)
    return ids, ids != 0


def whole_number_mask(captions, vocab, length):
    ids, mask = encode(captions, vocab, length)
    return ids, mask.long()


def assertion(captions, vocab, length):
    assert all(len(split(caption)) <= length for caption in captions)
    assert all(word in vocab for caption in captions for word in split(caption))
    return encode(captions, vocab, length)


def ids_alone(captions, vocab, length):
    return encode(captions, vocab, length)[0]


# --- 06.2 attention ---------------------------------------------------------------------------------------------------


def attention_with(
    scores=lambda q, k: q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]), fill=-math.inf, weigh=None, v=None
):
    def wrong(q, k, values, mask):
        s = scores(q, k).masked_fill(~mask[:, None], fill)
        w = weigh(s) if weigh else s.softmax(-1)
        return w @ (v(values) if v else values)

    return wrong


values_width = attention_with(lambda q, k: q @ k.transpose(1, 2) / 7**0.5)
small_fill = attention_with(fill=-10.0)
tiny_fill = attention_with(fill=torch.finfo(torch.float32).tiny)
plain_exp = attention_with(weigh=lambda s: s.exp() / s.exp().sum(-1, keepdim=True))
sigmoid = attention_with(weigh=torch.sigmoid)
over_everything = attention_with(weigh=lambda s: s.flatten(1).softmax(1).view_as(s))
normed = attention_with(lambda q, k: F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(1, 2))
hard = attention_with(weigh=lambda s: F.one_hot(s.argmax(-1), s.shape[-1]).to(s))


def keys_zeroed(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k * mask[:, :, None], v)


def mask_added(q, k, v, mask):
    return (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]) + mask[:, None].to(q)).softmax(-1) @ v


def mask_over_queries(q, k, v, mask):
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~mask[:, :, None], -math.inf).softmax(-1) @ v


def first_mask(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[0].expand(q.shape[1], -1))


# --- 06.3 split_heads, merge_heads ------------------------------------------------------------------------------------


def heads_last(x, heads):
    if x.shape[-1] % heads:
        raise ValueError
    return x.unflatten(2, (heads, -1)).permute(2, 0, 1, 3)


def split_flipped(x, heads):
    return split_heads(x, heads).flip(1)


def split_scaled(x, heads):
    return split_heads(x, heads) / math.sqrt(x.shape[-1] // heads)


def split_asserts(x, heads):
    assert x.shape[-1] % heads == 0
    return split_heads(x, heads)


def split_channels_first(x, heads):
    return split_heads(x, heads).transpose(2, 3)


def merge_sums(x):
    return x.sum(1)


def merge_transposed(x):
    return x.permute(0, 3, 2, 1).flatten(2).reshape(x.shape[0], x.shape[2], -1)


# --- 06.4 attn_cost ---------------------------------------------------------------------------------------------------


def cost_with(**changes):
    def wrong(n, tokens, dim, heads, context_dim, bytes_per):
        a = dict(n=n, L=tokens, c=dim, h=heads, e=context_dim, by=bytes_per)
        counts = attn_cost(n, tokens, dim, heads, context_dim, bytes_per)
        counts |= {key: f(a) for key, f in changes.items()}
        if "flops" not in changes:
            counts["flops"] = 2 * (counts["core"] + counts["proj"])
        return counts

    return wrong


softmax_too = cost_with(core=lambda a: 2 * a["n"] * a["L"] * a["c"] + 5 * a["n"] * a["L"] * a["h"])
biases = cost_with(proj=lambda a: 2 * a["n"] * (a["c"] + 1) * a["c"] + 2 * a["L"] * (a["e"] + 1) * a["c"])
proj_by_heads = cost_with(proj=lambda a: a["h"] * (2 * a["n"] * a["c"] ** 2 + 2 * a["L"] * a["e"] * a["c"]))
weights_only = cost_with(proj=lambda a: 2 * a["c"] ** 2 + 2 * a["e"] * a["c"])
core_squared = cost_with(core=lambda a: 2 * a["n"] * a["L"] * a["c"] ** 2)
both_matrices = cost_with(matrix_bytes=lambda a: 2 * a["h"] * a["n"] * a["L"] * a["by"])
matrix_of_values = cost_with(matrix_bytes=lambda a: a["n"] * a["c"] * a["by"])
bits = cost_with(matrix_bytes=lambda a: 8 * a["h"] * a["n"] * a["L"] * a["by"])
queries_from_context = cost_with(
    proj=lambda a: a["n"] * a["e"] * a["c"] + a["n"] * a["c"] ** 2 + 2 * a["L"] * a["e"] * a["c"]
)


def cost_tuple(n, tokens, dim, heads, context_dim, bytes_per):
    return tuple(attn_cost(n, tokens, dim, heads, context_dim, bytes_per).values())


# --- 06.5 chunked_attention -------------------------------------------------------------------------------------------


def chunked_with(update, scale=lambda q: q.shape[-1] ** -0.5, end=lambda out, total, top: out / total):
    def wrong(q, k, v, chunk):
        top = torch.full_like(q[:, :, :1], -math.inf)
        total, out = torch.zeros_like(top), torch.zeros(*q.shape[:2], v.shape[2]).to(v)
        for keys, values in zip(k.split(chunk, dim=1), v.split(chunk, dim=1), strict=True):
            top, total, out = update(q @ keys.transpose(1, 2) * scale(q), values, top, total, out)
        return end(out, total, top)

    return wrong


def online(s, v, top, total, out, shrink=lambda top, new: (top - new).exp(), weigh=lambda s, new: (s - new).exp()):
    new = torch.maximum(top, s.amax(-1, True))
    w, k = weigh(s, new), shrink(top, new)
    return new, k * total + w.sum(-1, True), k * out + w @ v


upside_down = chunked_with(lambda *a: online(*a, shrink=lambda top, new: (new - top).exp().nan_to_num(posinf=0.0)))
never_divided = chunked_with(online, end=lambda out, total, top: out)
divided_inside = chunked_with(lambda *a: (lambda t, n, o: (t, n, o / n))(*online(*a)))
shrink_squared = chunked_with(lambda *a: online(*a, shrink=lambda top, new: (2 * (top - new)).exp()))
max_multiplied = chunked_with(online, end=lambda out, total, top: out / total * top.exp())
clamped = chunked_with(lambda *a: online(*a, weigh=lambda s, new: s.clamp(max=50).exp(), shrink=lambda t, n: 1.0))
scaled_by_chunk = chunked_with(online, scale=lambda q: 3**-0.5)


def first_chunk(q, k, v, chunk):
    return F.scaled_dot_product_attention(q, k[:, :chunk], v[:, :chunk])


def torchs_own(q, k, v, chunk):
    return F.scaled_dot_product_attention(q, k, v)


# --- 06.6 token_map, localisation -------------------------------------------------------------------------------------


def map_median(weights, token, height, width):
    return weights[..., token].median(1).values.reshape(-1, height, width)


def map_all_heads(weights, token, height, width):
    return weights[..., token].reshape(*weights.shape[:2], height, width)


def map_of_pixel(weights, token, height, width):
    """Row `token` of the matrix instead of its column."""
    return weights[:, :, token].mean(1)


def map_view_swapped(weights, token, height, width):
    return weights[..., token].mean(1).reshape(-1, width, height)


def map_last_axis_first(weights, token, height, width):
    return weights.reshape(*weights.shape[:2], -1, height, width).mean(1)[:, token]


def map_times_tokens(weights, token, height, width):
    return token_map(weights, token, height, width) * weights.shape[-1]


def box_no_left(heat, box):
    top, _, bottom, right = box
    return heat[:, top:bottom, :right].sum((1, 2)) / heat.sum((1, 2))


def box_exclusive(heat, box):
    return localisation(heat, (box[0] + 1, box[1] + 1, box[2], box[3]))


def box_per_row(heat, box):
    top, left, bottom, right = box
    return (heat / heat.sum(2, keepdim=True))[:, top:bottom, left:right].sum((1, 2)) / heat.shape[1]


def box_peak(heat, box):
    top, left, bottom, right = box
    return heat[:, top:bottom, left:right].amax((1, 2)) / heat.amax((1, 2))


def box_outside(heat, box):
    return 1 - localisation(heat, box)


def box_clipped(heat, box):
    return localisation((heat - heat.mean((1, 2), keepdim=True)).clamp(min=0), box)


# --- 06.7 drop_caption, token_swap ------------------------------------------------------------------------------------


def drop_zero_pad(ids, mask, p, pad, null, gen):
    return drop_caption(ids, mask, p, 0, null, gen)


def drop_times_mask(ids, mask, p, pad, null, gen):
    keep = (torch.rand(len(ids), generator=gen) >= p)[:, None]
    return ids * keep, mask & keep


def drop_seeded(ids, mask, p, pad, null, gen):
    return drop_caption(ids, mask, p, pad, null, Generator().manual_seed(0))


def drop_half(ids, mask, p, pad, null, gen):
    return drop_caption(ids, mask, p / 2, pad, null, gen)


def drop_mask_all(ids, mask, p, pad, null, gen):
    ids, _ = drop_caption(ids, mask, p, pad, null, gen)
    return ids, torch.ones_like(mask)


def drop_normal(ids, mask, p, pad, null, gen):
    gone = (torch.randn(len(ids), generator=gen) < p)[:, None]
    first = torch.arange(ids.shape[1]) == 0
    return torch.where(gone, torch.where(first, null, pad), ids), torch.where(gone, first, mask)


def swap_ignores_seed(sample, judge, captions, swapped, seed):
    return token_swap(sample, judge, captions, swapped, 0)


def swap_filtered_apart(sample, judge, captions, swapped, seed):
    """Single captions are left out of the first list alone."""
    ones = [one for one, other in zip(captions, swapped, strict=True) if one != other]
    right = [judge(sample(some, Generator().manual_seed(seed)), some) for some in (ones, swapped[: len(ones)])]
    return (right[0] & right[1]).double().mean().item()


def swap_same_verdict(sample, judge, captions, swapped, seed):
    pairs = [(a, b) for a, b in zip(captions, swapped, strict=True) if a != b]
    if not pairs:
        raise ValueError
    right = [judge(sample(list(s), Generator().manual_seed(seed)), list(s)) for s in zip(*pairs, strict=True)]
    return (right[0] == right[1]).double().mean().item()


def swap_counts(sample, judge, captions, swapped, seed):
    changed = sum(a != b for a, b in zip(captions, swapped, strict=True))
    return token_swap(sample, judge, captions, swapped, seed) * changed


def swap_commas(sample, judge, captions, swapped, seed):
    """Whoever has a comma has two digits, and is taken to change."""
    pairs = [(a, b) for a, b in zip(captions, swapped, strict=True) if "," in a]
    right = [judge(sample(list(s), Generator().manual_seed(seed)), list(s)) for s in zip(*pairs, strict=True)]
    return (right[0] & right[1]).double().mean().item()


def swap_two_seeds(sample, judge, captions, swapped, seed):
    pairs = [(a, b) for a, b in zip(captions, swapped, strict=True) if a != b]
    if not pairs:
        raise ValueError
    right = [
        judge(sample(list(s), Generator().manual_seed(seed + i)), list(s))
        for i, s in enumerate(zip(*pairs, strict=True))
    ]
    return (right[0] & right[1]).double().mean().item()


def swap_tensor(sample, judge, captions, swapped, seed):
    pairs = [(a, b) for a, b in zip(captions, swapped, strict=True) if a != b]
    if not pairs:
        raise ValueError
    right = [judge(sample(list(s), Generator().manual_seed(seed)), list(s)) for s in zip(*pairs, strict=True)]
    return right[0] & right[1]


# --- 06.8 my_attention_test -------------------------------------------------------------------------------------------


def case(n=5, tokens=3):
    return torch.randn(2, n, 4), torch.randn(2, tokens, 4), torch.randn(2, tokens, 6), torch.ones(2, tokens) > 0


def no_assertion(attention):
    attention(*case())


def to_the_last_bit(attention):
    q, k, v, mask = case()
    assert torch.equal(attention(q, k, v, mask), (q @ k.mT / 2).softmax(-1) @ v)


def zero_queries(attention):
    q, k, v, mask = case()
    assert torch.allclose(attention(0 * q, k, v, mask), v.mean(1, keepdim=True).expand(2, 5, 6), atol=1e-5)


def four_tokens(attention):
    """As many tokens as channels."""
    q, k, v, mask = case(4, 4)
    assert torch.allclose(attention(q, k, v, mask), (q @ k.mT / 2).softmax(-1) @ v, atol=1e-5)


def against_no_mask(attention):
    q, k, v, mask = case()
    some = mask.clone()
    some[:, -1] = False
    assert not torch.allclose(attention(q, k, v, mask), attention(q, k, v, some))


def inverted_mask(attention):
    q, k, v, mask = case()
    mask[:, -1] = False
    right = F.scaled_dot_product_attention(q, k, v, attn_mask=~mask[:, None])
    assert torch.allclose(attention(q, k, v, mask), right, atol=1e-5)


# Read by a person: these are told that something is wrong, and too little of what.
WEAK = {"root of the chunk", "queries made of the context", "weights of the maps", "divided after each chunk"}

SLOPPY = (
    ("06.1", "KeyError for unknown words", (key_error,)),
    ("06.1", "null before every caption", (always_null,)),
    ("06.1", "no room for the last token", (off_by_one,)),
    ("06.1", "unknown words become null", (unknown_is_null,)),
    ("06.1", "tokens sorted", (sorted_words,)),
    ("06.1", "letters for words", (letters,)),
    ("06.1", "mask where the id is not 0", (mask_of_ids,)),
    ("06.1", "mask of integers", (whole_number_mask,)),
    ("06.1", "assert for ValueError", (assertion,)),
    ("06.1", "ids alone", (ids_alone,)),
    ("06.2", "root of the values' width", (values_width,)),
    ("06.2", "masked scores -10", (small_fill,)),
    ("06.2", "masked scores tiny, not min", (tiny_fill,)),
    ("06.2", "exp without a maximum", (plain_exp,)),
    ("06.2", "sigmoid", (sigmoid,)),
    ("06.2", "softmax over the whole matrix", (over_everything,)),
    ("06.2", "normalised queries and keys", (normed,)),
    ("06.2", "argmax", (hard,)),
    ("06.2", "masked keys set to 0", (keys_zeroed,)),
    ("06.2", "mask added", (mask_added,)),
    ("06.2", "mask along the queries", (mask_over_queries,)),
    ("06.2", "mask of the first example", (first_mask,)),
    ("06.3", "heads before the batch", (heads_last, merge_heads)),
    ("06.3", "heads in reverse order", (split_flipped, merge_heads)),
    ("06.3", "scaled on the way", (split_scaled, merge_heads)),
    ("06.3", "assert", (split_asserts, merge_heads)),
    ("06.3", "channels before pixels", (split_channels_first, merge_heads)),
    ("06.3", "heads summed", (split_heads, merge_sums)),
    ("06.3", "merged the wrong way round", (split_heads, merge_transposed)),
    ("06.4", "softmax counted", (softmax_too,)),
    ("06.4", "biases counted", (biases,)),
    ("06.4", "maps times heads", (proj_by_heads,)),
    ("06.4", "weights of the maps", (weights_only,)),
    ("06.4", "width squared in the core", (core_squared,)),
    ("06.4", "scores and weights", (both_matrices,)),
    ("06.4", "bytes of the result", (matrix_of_values,)),
    ("06.4", "bits", (bits,)),
    ("06.4", "queries made of the context", (queries_from_context,)),
    ("06.4", "tuple", (cost_tuple,)),
    ("06.5", "rescaled the other way", (upside_down,)),
    ("06.5", "never divided", (never_divided,)),
    ("06.5", "divided after each chunk", (divided_inside,)),
    ("06.5", "rescaled twice", (shrink_squared,)),
    ("06.5", "maximum put back", (max_multiplied,)),
    ("06.5", "scores cut at 50", (clamped,)),
    ("06.5", "root of the chunk", (scaled_by_chunk,)),
    ("06.5", "first chunk only", (first_chunk,)),
    ("06.5", "torch's own, all at once", (torchs_own,)),
    ("06.6", "median over heads", (map_median, localisation)),
    ("06.6", "all heads", (map_all_heads, localisation)),
    ("06.6", "row for column", (map_of_pixel, localisation)),
    ("06.6", "width before height", (map_view_swapped, localisation)),
    ("06.6", "axes reshaped past one another", (map_last_axis_first, localisation)),
    ("06.6", "times the number of tokens", (map_times_tokens, localisation)),
    ("06.6", "left edge ignored", (token_map, box_no_left)),
    ("06.6", "first row and column left out", (token_map, box_exclusive)),
    ("06.6", "shares of rows", (token_map, box_per_row)),
    ("06.6", "peak for sum", (token_map, box_peak)),
    ("06.6", "share outside", (token_map, box_outside)),
    ("06.6", "above average only", (token_map, box_clipped)),
    ("06.7", "0 for pad", (drop_zero_pad, token_swap)),
    ("06.7", "times the mask", (drop_times_mask, token_swap)),
    ("06.7", "a seed of its own", (drop_seeded, token_swap)),
    ("06.7", "p halved", (drop_half, token_swap)),
    ("06.7", "mask all True", (drop_mask_all, token_swap)),
    ("06.7", "normal numbers for coins", (drop_normal, token_swap)),
    ("06.7", "seed ignored", (drop_caption, swap_ignores_seed)),
    ("06.7", "one list filtered", (drop_caption, swap_filtered_apart)),
    ("06.7", "equal verdicts", (drop_caption, swap_same_verdict)),
    ("06.7", "a count", (drop_caption, swap_counts)),
    ("06.7", "all captions with a comma", (drop_caption, swap_commas)),
    ("06.7", "next seed for the second half", (drop_caption, swap_two_seeds)),
    ("06.7", "verdicts, not their share", (drop_caption, swap_tensor)),
    ("06.8", "no assertion", (no_assertion,)),
    ("06.8", "equality to the last bit, no mask", (to_the_last_bit,)),
    ("06.8", "queries of zeros", (zero_queries,)),
    ("06.8", "as many tokens as channels", (four_tokens,)),
    ("06.8", "mask does something", (against_no_mask,)),
    ("06.8", "expects an inverted mask", (inverted_mask,)),
)
