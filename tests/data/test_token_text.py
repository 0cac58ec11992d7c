"""Tokens read as their passage does, whatever the tokenizer: spaces, characters of several tokens, bytes that are none."""
import numpy as np
import pytest

from data.tasks import make_clozes, unlearning_plan
from data.token_text import token_texts, vocabulary_texts
from data.windows import Windows
from made_tokenizers import byte_level, KINDS, sentencepiece, WORDS

ANYTHING = "the file 😀😀 is read 世界 here\n  x = '\ufffd', é à la  carte 🏳️‍🌈 and\tthen \u200b."


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    return KINDS[request.param]()


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_words_stand_apart(tokenizer):
    """Each token adds its text to what stands before it; so a passage that begins in the middle reads as its text does."""
    text = " ".join([*WORDS, "thread", "row"])          # the second last is no token
    ids = ids_of(tokenizer, text)
    assert len(ids) > len(WORDS) + 2
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids) and all(texts)
    assert "".join(texts).removeprefix(" ") == text
    for start in range(len(ids)):
        assert text.endswith("".join(token_texts(tokenizer, ids[start:])).removeprefix(" "))
        assert texts[start + 1:] == token_texts(tokenizer, ids[start:])[1:]
    assert token_texts(tokenizer, []) == []


@pytest.mark.parametrize("maker", [sentencepiece, byte_level])
def test_any_text_comes_back(maker):
    tokenizer = maker()
    assert "".join(token_texts(tokenizer, ids_of(tokenizer, ANYTHING))).removeprefix(" ") == ANYTHING


@pytest.mark.parametrize("maker, tokens", [(sentencepiece, 4), (byte_level, 3)])
def test_a_split_character_is_shown_once(maker, tokens):
    tokenizer = maker()
    ids, known = ids_of(tokenizer, "the 😀😀 file"), {}
    texts = token_texts(tokenizer, ids, known)
    first = texts.index("😀")
    assert texts[first:first + 2 * tokens] == ["😀", *[""] * (tokens - 1)] * 2 and texts[-1] == " file"
    assert texts == token_texts(tokenizer, ids, known)          # from what was decoded before


@pytest.mark.parametrize("maker", [sentencepiece, byte_level])
def test_part_of_a_character_is_bytes(maker):
    """At the end and at the start of a passage, and where bytes are wrong."""
    tokenizer = maker()
    ids = ids_of(tokenizer, "the 😀 file")
    first = token_texts(tokenizer, ids).index("😀")
    cut, rest = token_texts(tokenizer, ids[:first + 2]), token_texts(tokenizer, ids[first + 2:])
    assert "".join(cut).startswith(("the <0xF0>", " the <0xF0>")) and "\ufffd" not in "".join(cut)
    assert rest[0].startswith("<0x") and rest[-1] == " file"
    assert "".join(cut[first:] + rest[:-1]).count("<0x") == 4


def test_tokens_of_the_vocabulary(tokenizer):
    texts = vocabulary_texts(tokenizer, range(len(tokenizer)))
    assert len(texts) == len(tokenizer) and "\ufffd" not in texts
    assert [texts[token] for token in ids_of(tokenizer, " ".join(WORDS))[1:]].count(" the") >= 1
    if "<0x41>" in tokenizer.get_vocab():
        assert texts[tokenizer.get_vocab()["<0xF0>"]] == "<0xF0>" and texts[tokenizer.get_vocab()["<0x41>"]] == "A"


def test_clozes_have_options_of_one_kind():
    """On a tokenizer that shows no leading space where a token is decoded alone."""
    tokenizer, rng = sentencepiece(), np.random.default_rng(0)
    vocabulary = tokenizer.get_vocab()
    begin = [token for text, token in vocabulary.items() if text.startswith("\u2581") and text[1:].isalpha()]
    go_on = [token for text, token in vocabulary.items() if text.isalpha() and not text.startswith("\u2581")]
    assert min(len(begin), len(go_on)) > 10
    tokens = rng.choice(begin + go_on, (400, 128)).astype(np.int32)
    tokens[:, 0] = tokenizer.bos_token_id
    windows = Windows(tokens, np.full(400, 128), np.arange(400) // 4, 200, [str(i) for i in range(100)], ["a", "b"] * 50)
    clozes = unlearning_plan(windows, "a", tokenizer).clozes
    kinds = np.isin(clozes.options, begin)
    assert len(kinds) > 20 and (kinds == kinds[:, :1]).all() and 0 < kinds[:, 0].mean() < 1
    alone = make_clozes(windows, windows.heldout(), [tokenizer.decode([token]) for token in range(len(tokenizer))])
    mixed = np.isin(alone.options, begin)
    assert (mixed != mixed[:, :1]).any()                        # what decoding them alone would give
