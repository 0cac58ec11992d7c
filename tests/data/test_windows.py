"""Windows of tokens: one document each, nothing lost, kept in a cache."""
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest

from copies import PROJECT
from damage import cut, flip
from data.documents import Document, load_documents
from data.windows import load_windows, Wanted
from runtime.errors import RunnerError

BOS = 7


class Numbering:
    """A tokenizer of texts "document length": an id says which document and where in it the token is."""
    is_fast, name_or_path, bos_token_id, eos_token_id, first = False, "numbers", BOS, BOS + 1, None

    def __call__(self, text, add_special_tokens=True, **options):
        if text == "text":
            return {"input_ids": [1]}
        document, length = map(int, text.split())
        body = [self.first] * (self.first is not None) + [1_000 + 10_000 * document + i for i in range(length)]
        return {"input_ids": body if not add_special_tokens else [BOS] + body}


def documents(E, lengths, heldout_every=4):
    return [Document(f"file {i}", f"{i} {length}", f"domain {i % 3}", i % heldout_every == 1)
            for i, length in enumerate(lengths)]


def wanted(E):
    """What the runner's own constants ask for."""
    return Wanted(E.CONTEXT_LENGTH, E.TRAIN_TOKENS, E.EVAL_FILES, E.TRAIN_WINDOWS_PER_FILE,
                           E.EVAL_WINDOWS_PER_FILE, E.MIN_WINDOW, E.DATA_SEED)


def make_windows(E, monkeypatch, found, tokenizer=Numbering()):
    """What the runner makes of these documents, by its own constants."""
    monkeypatch.setattr("data.windows.load_documents", lambda dataset, seed: iter(found))
    monkeypatch.setattr("data.windows.data_identity", lambda dataset: "")
    with tempfile.TemporaryDirectory() as cache:
        return load_windows(E.DATASET, tokenizer, wanted(E), Path(cache))[0]


@pytest.fixture
def windows(E, settings, monkeypatch):
    """Windows of 60 documents of 0 to 300 tokens."""
    settings(CONTEXT_LENGTH=16, TRAIN_TOKENS=1_500, EVAL_FILES=5, MIN_WINDOW=6,
             TRAIN_WINDOWS_PER_FILE=8, EVAL_WINDOWS_PER_FILE=3)
    lengths = np.random.default_rng(0).integers(0, 300, 60)
    lengths[[0, 2, 5]] = 0, 5, 3                         # two for training and one held out without a window
    return make_windows(E, monkeypatch, documents(E, lengths)), lengths


def test_a_window_is_bos_then_a_stretch_of_one_document_then_padding(windows):
    found, lengths = windows
    assert found.tokens.shape == (len(found.lengths), 16) and found.tokens.dtype == np.int32
    starts = []
    for row, length, document in zip(found.tokens, found.lengths, found.doc_ids):
        assert row[0] == BOS and (row[length:] == BOS).all() and (row[1:length] != BOS).all()
        number = int(found.names[document].split()[1])
        place = row[1:length] - 1_000 - 10_000 * number
        assert (place == np.arange(place[0], place[0] + length - 1)).all()
        assert place[0] % 15 == 0 and place[-1] < lengths[number]             # windows of a document do not overlap
        assert length == 16 or place[-1] == lengths[number] - 1               # padded only where the document ends
        assert found.domains[document] == f"domain {number % 3}"
        starts.append((number, place[0]))
    assert len(set(starts)) == len(starts)
    assert (found.lengths < 16).any()
    assert found.lengths.min() == 1 + 6               # tails of 6 tokens and more are taken, shorter ones left out


def test_training_and_heldout_documents(windows):
    found, lengths = windows
    train, heldout = np.split(found.doc_ids, [found.n_train])
    numbers = [{int(found.names[d].split()[1]) for d in part} for part in (train, heldout)]
    assert not numbers[0] & numbers[1]
    assert all(n % 4 == 1 for n in numbers[1]) and not any(n % 4 == 1 for n in numbers[0])
    assert len(numbers[1]) == 5 and np.bincount(heldout).max() <= 3 and np.bincount(train).max() == 8
    tokens = (found.lengths - 1)[:found.n_train]
    assert tokens.sum() >= 1_500 > tokens[train != train[-1]].sum()           # the last document completes them


def test_windows_are_spread_over_a_document(E, settings, monkeypatch):
    settings(CONTEXT_LENGTH=16, TRAIN_TOKENS=2_000, EVAL_FILES=2, TRAIN_WINDOWS_PER_FILE=2)
    found = make_windows(E, monkeypatch, documents(E, [1_500] * 90))
    places = (found.tokens[:found.n_train, 1] - 1_000) % 10_000 / 1_500
    assert len(places) == 134 and np.histogram(places, 4, (0, 1))[0].min() > 15
    again = make_windows(E, monkeypatch, documents(E, [1_500] * 90))
    assert (again.tokens == found.tokens).all()
    monkeypatch.setattr(E, "DATA_SEED", E.DATA_SEED + 1)
    assert (make_windows(E, monkeypatch, documents(E, [1_500] * 90)).tokens != found.tokens).any()


def test_a_short_context_keeps_short_windows_out_too(E, settings, monkeypatch):
    settings(CONTEXT_LENGTH=8, TRAIN_TOKENS=60, EVAL_FILES=2, MIN_WINDOW=32)
    found = make_windows(E, monkeypatch, documents(E, [20] * 40))
    assert (found.lengths == 8).all()                # no tail is as long as MIN_WINDOW: full windows only


@pytest.mark.parametrize("lengths, parts", [
    ([30] * 40, ["40 documents", "900 training tokens", "10 held-out", "TRAIN_TOKENS = 1,500"]),
    ([200, 0, 200, 200] * 10, ["0 held-out"]),
    ([], ["0 documents", "0 training tokens"]),
])
def test_exhausted_data_says_how_much_there_was(E, settings, monkeypatch, lengths, parts):
    settings(CONTEXT_LENGTH=16, TRAIN_TOKENS=1_500, EVAL_FILES=50, MIN_WINDOW=10, DATASET="my_data")
    with pytest.raises(RunnerError) as error:
        make_windows(E, monkeypatch, documents(E, lengths))
    for part in ["'my_data'", *parts]:
        assert part in str(error.value)


@pytest.fixture
def tokenizer(E, monkeypatch):
    monkeypatch.setattr(E, "MODEL_NAME", str(PROJECT / "embedded" / "model"))
    return E.load_pretrained(E.MODEL_NAME, "tokenizer")


def test_bos_stands_first_and_nowhere_else(E, settings, monkeypatch, tokenizer):
    """Also where the text itself holds the characters of the special token."""
    settings(CONTEXT_LENGTH=32, TRAIN_TOKENS=200, EVAL_FILES=2)
    text = f"the marker {tokenizer.bos_token} divides documents, and {tokenizer.bos_token} is text here " * 8
    texts = [Document(f"file {i}", text, "x", i % 2 == 1) for i in range(30)]
    found = make_windows(E, monkeypatch, texts, tokenizer)
    for row, length in zip(found.tokens, found.lengths):
        assert row[0] == tokenizer.bos_token_id
        assert (row[1:length] != tokenizer.bos_token_id).all()


@pytest.mark.parametrize("bos, eos, mark", [(5, 6, 5), (None, 6, 6), (None, None, 0), (0, 6, 0)])
def test_the_first_token_where_the_tokenizer_lacks_one(E, settings, monkeypatch, bos, eos, mark):
    settings(CONTEXT_LENGTH=16, TRAIN_TOKENS=200, EVAL_FILES=2)
    tokenizer = Numbering()
    tokenizer.bos_token_id, tokenizer.eos_token_id = bos, eos
    tokenizer.first = mark              # a document that spells it out, or has the character of id 0
    found = make_windows(E, monkeypatch, documents(E, [100] * 40), tokenizer)
    assert (found.tokens[:, 0] == mark).all()
    assert (found.tokens[:, 1:] == mark).any() == (bos is eos is None)      # a character, where no mark has its id


def test_a_tokenizer_that_knows_no_text_is_an_error(E, monkeypatch):
    class Mute(Numbering):
        def __call__(self, text, **options):
            return {"input_ids": []}
    with pytest.raises(RunnerError, match="numbers has no tokenizer"):
        make_windows(E, monkeypatch, documents(E, [100] * 40), Mute())


def windows_of(E, tokenizer, folder):
    return load_windows(E.DATASET, tokenizer, wanted(E), folder)


def test_windows_come_from_the_cache(E, settings, monkeypatch, tokenizer, tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"text": f"number {i} " * 60}) for i in range(300)))
    settings(CONTEXT_LENGTH=16, TRAIN_TOKENS=600, EVAL_FILES=3, DATASET=str(texts))
    first, key = windows_of(E, tokenizer, tmp_path)
    load = load_documents
    monkeypatch.setattr("data.windows.load_documents", lambda *args: pytest.fail("the data are read again"))
    second, again = windows_of(E, tokenizer, tmp_path)
    assert again == key and second.n_train == first.n_train and type(second.n_train) is int
    for name in ("tokens", "lengths", "doc_ids", "names", "domains"):
        assert np.array_equal(getattr(first, name), getattr(second, name))

    monkeypatch.setattr("data.windows.load_documents", load)
    keys = {key}
    for name, value in dict(TRAIN_TOKENS=700, CONTEXT_LENGTH=24, EVAL_FILES=4, DATA_SEED=1, MIN_WINDOW=8,
                            TRAIN_WINDOWS_PER_FILE=3, EVAL_WINDOWS_PER_FILE=2).items():
        with monkeypatch.context() as patch:
            patch.setattr(E, name, value)
            keys.add(windows_of(E, tokenizer, tmp_path)[1])
    with open(texts, "a") as file:
        file.write("\n" + json.dumps({"text": "one more " * 60}))
    keys.add(windows_of(E, tokenizer, tmp_path)[1])
    assert len(keys) == 9


@pytest.mark.parametrize("damage", [flip, cut, lambda path: path.write_bytes(b"")], ids=["flipped", "cut", "empty"])
def test_a_damaged_file_of_windows_is_made_again(E, settings, tokenizer, tmp_path, damage):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"text": f"number {i} " * 60}) for i in range(300)))
    settings(CONTEXT_LENGTH=16, TRAIN_TOKENS=600, EVAL_FILES=3, DATASET=str(texts))
    first, key = windows_of(E, tokenizer, tmp_path)
    damage(tmp_path / f"{key}.npz")
    second, _ = windows_of(E, tokenizer, tmp_path)
    assert np.array_equal(first.tokens, second.tokens)
