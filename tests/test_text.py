"""Captions to ids and to vectors: nothing is lost on the way, and padding and batch mates change nothing."""

import re

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from condiff_ref.scenes import LENGTH, WORDS, scenes
from condiff_ref.text import TextEncoder, Vocabulary
from condiff_ref.unet import UNet

CATS = Vocabulary(["a", "red", "cat", ",", "dog"])


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def encoder(depth: int = 2, length: int = 9) -> TextEncoder:
    made = TextEncoder(CATS, 12, depth, 3, length=length)
    for parameter in made.parameters():  # biases and norms that start at 0 and 1 would hide their place
        nn.init.normal_(parameter, std=0.5)
    return made.double()


# --- words to ids ----------------------------------------------------------------------------------------------------


def test_captions_become_ids_by_hand():
    ids, mask = CATS.encode(["a red, cat", "dog"], 5)
    assert ids.tolist() == [[2, 3, 5, 4, 0], [6, 0, 0, 0, 0]]
    assert mask.tolist() == [[True, True, True, True, False], [True, False, False, False, False]]


def test_case_and_spaces_do_not_matter():
    assert torch.equal(CATS.encode(["A  Red ,cat "], 4)[0], CATS.encode(["a red, cat"], 4)[0])


def test_the_tokens_read_back_are_the_caption():
    vocabulary = Vocabulary(WORDS)
    captions = scenes(200, torch.Generator().manual_seed(0)).captions
    ids, mask = vocabulary.encode(captions, LENGTH)
    read = [" ".join(vocabulary.tokens[i] for i in row[keep]) for row, keep in zip(ids, mask, strict=True)]
    assert read == [caption.replace(",", " ,") for caption in captions]
    assert len(vocabulary) == len(WORDS) + 2


def test_the_empty_caption_is_one_null_token_that_no_word_shares():
    ids, mask = CATS.encode(["", "a"], 3)
    assert ids[0].tolist() == [CATS.null, CATS.pad, CATS.pad] and mask[0].tolist() == [True, False, False]
    assert len({CATS.pad, CATS.null, *CATS.encode(["a red cat , dog"], 5)[0][0].tolist()}) == 7


def test_null_and_pad_may_be_words_like_any_other():
    assert Vocabulary(["pad", "null"]).encode(["pad null"], 2)[0].tolist() == [[2, 3]]


def test_all_unknown_words_are_named_with_their_caption_and_the_known_ones():
    with pytest.raises(ValueError, match="unknown 'blue', 'fish' in 'a blue, fish': the words are a red cat , dog"):
        CATS.encode(["a cat", "a blue, fish"], 2)


def test_nothing_is_cut_off():
    assert CATS.encode(["a red cat"], 3)[1].all()
    with pytest.raises(ValueError, match="'a red, cat' has 4 tokens, and there is room for 3"):
        CATS.encode(["a red cat", "a red, cat"], 3)


def test_a_single_string_is_no_list_of_captions():
    with pytest.raises(ValueError, match=re.escape("write ['a']")):
        CATS.encode("a", 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "a sequence of words"),
        ("abc", "a sequence of words"),
        (("a", "b", "a"), "doubled ['a'], not a word []"),
        (("a", "Red"), "not a word ['Red']"),
        (("two words", "a"), "not a word ['two words']"),
        (("", "a"), "not a word ['']"),
    ],
)
def test_a_vocabulary_of_what_no_caption_splits_into_is_refused(words, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Vocabulary(words)


# --- ids to vectors --------------------------------------------------------------------------------------------------


def test_the_encoder_is_torchs_own_transformer():
    ours = encoder()
    layer = nn.TransformerEncoderLayer(12, 3, 48, 0.0, "gelu", batch_first=True, norm_first=True)
    theirs = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(12), enable_nested_tensor=False).double()
    with torch.no_grad():
        theirs.norm.load_state_dict(ours.norm.state_dict())
        for a, b in zip(ours.blocks, theirs.layers, strict=True):
            b.self_attn.in_proj_weight.copy_(torch.cat([a.attention.to_q.weight, a.attention.to_kv.weight]))
            b.self_attn.in_proj_bias.zero_()
            b.self_attn.out_proj.load_state_dict(a.attention.to_out.state_dict())
            for one, other in ((a.norm1, b.norm1), (a.norm2, b.norm2), (a.mlp[0], b.linear1), (a.mlp[2], b.linear2)):
                other.load_state_dict(one.state_dict())
    ids, mask = CATS.encode(["a red, cat", "dog", ""], 5)
    embedded = ours.word.weight[ids] + ours.place.weight[None, :5]
    expected = theirs(embedded, src_key_padding_mask=~mask)
    assert_close(ours(ids)[mask], expected[mask])


def test_the_number_of_pads_changes_no_vector_and_pads_are_zero():
    ours, captions = encoder(), ["a red, cat", "dog", ""]
    (short, mask), (long, _) = CATS.encode(captions, 4), CATS.encode(captions, 9)
    assert_close(ours(long)[:, :4][mask], ours(short)[mask])
    assert not ours(short)[~mask].any() and not ours(long)[:, 4:].any()


def test_the_pads_own_embedding_is_never_read():
    ours = encoder()
    ours(CATS.encode(["a red, cat", "dog"], 6)[0]).square().sum().backward()
    assert not ours.word.weight.grad[CATS.pad].any()
    assert ours.word.weight.grad[2:].any(dim=1).all()


def test_examples_do_not_see_one_another_and_a_permuted_batch_is_permuted():
    ours, (ids, _) = encoder(), CATS.encode(["a red, cat", "dog", "", "a cat"], 6)
    together = ours(ids)
    assert_close(together, torch.cat([ours(row[None]) for row in ids]))
    order = torch.tensor([2, 0, 3, 1])
    assert_close(ours(ids[order]), together[order])


def changed(ours: TextEncoder, before: str, after: str) -> list[bool]:
    """Which of the vectors differ between two captions of equal length."""
    first, second = (ours(CATS.encode([caption], 5)[0])[0] for caption in (before, after))
    return ((first - second).abs().amax(dim=1) > 1e-6).tolist()


def test_each_word_is_read_by_those_before_and_after_it():
    assert changed(encoder(1), "a red cat", "a red dog") == [True] * 3 + [False] * 2
    assert changed(encoder(1), "a red cat", "dog red cat") == [True] * 3 + [False] * 2


def test_at_depth_0_a_word_changes_its_own_vector_only():
    assert changed(encoder(0), "a red cat", "a dog cat") == [False, True, False, False, False]


def test_the_order_of_words_is_seen():
    ours = encoder(0)
    there, back = (ours(CATS.encode([caption], 2)[0])[0] for caption in ("cat dog", "dog cat"))
    assert (there - back.flip(0)).abs().amax() > 1e-3


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[2] * 10], r"reads up to 9 tokens, got \(1, 10\)"),
        ([[2, 3], [0, 0]], "pads alone"),
        ([[2, 7]], "0 to 6, got 2 to 7"),
        ([[-1, 2]], "0 to 6, got -1 to 2"),
    ],
)
def test_what_it_cannot_read_is_named(ids, message):
    with pytest.raises(ValueError, match=message):
        encoder()(torch.tensor(ids))


def test_a_unet_learns_from_the_words():
    vocabulary = Vocabulary(WORDS)
    images, captions, _ = scenes(4, torch.Generator().manual_seed(0))
    text, unet = TextEncoder(vocabulary, 16, 2, 4), UNet(1, (8, 12), context_dim=16, emb_dim=16)
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.2)
    ids, _ = vocabulary.encode(captions, LENGTH)
    t = torch.full((4,), 0.5)
    out = unet(images, t, context=text(ids))
    null, _ = vocabulary.encode([""] * 4, LENGTH)
    assert (out - unet(images, t, context=text(null))).abs().amax() > 1e-3
    out.square().sum().backward()
    used = torch.zeros(len(vocabulary)).bool().scatter(0, ids.flatten(), True)
    used[vocabulary.pad] = False
    assert torch.equal(text.word.weight.grad.any(dim=1), used)
