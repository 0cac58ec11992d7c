"""Windows of a second data set, to be forgotten, among those of the first."""
import itertools
from collections import Counter

import numpy as np
import pytest

from data.documents import load_documents
from data.windows import _with_forget, load_windows, make_windows, Wanted
from data_sets import error_of, prose, rows, write

WANTED = Wanted(context_length=32, train_tokens=3_000, eval_files=8, train_windows_per_file=2,
                       eval_windows_per_file=3, min_window=16, seed=42)


def words(text, **_):
    return {"input_ids": [1 + sum(map(ord, word)) % 97 for word in text.split()]}


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b))


def test_a_domain_to_forget_changes_nothing(tmp_path, monkeypatch):
    path = str(write(tmp_path / "some.jsonl", [dict(row, text=prose(i, 60)) for i, row in enumerate(rows(400))]))
    plain = make_windows(path, words, 0, WANTED)
    assert same(plain, make_windows(path, words, 0, WANTED._replace(forget="books")))
    plain = make_windows("embedded", words, 0, WANTED)
    monkeypatch.setattr("data.windows.islice", lambda iterator, _: itertools.islice(iterator, 3))    # a rare domain
    assert same(plain, make_windows("embedded", words, 0, WANTED._replace(forget="joblib")))
    assert Wanted(*WANTED[:7]).forget == ""


def test_a_second_data_set_alternates_with_the_first(tmp_path, hub):
    first = [dict(row, text=f"{i} {prose(i, 60)}") for i, row in enumerate(rows(400))]
    second = [{"text": f"{i} {prose(i + 1_000, 50)}", "source": "papers"} for i in range(300)]
    path = str(write(tmp_path / "first.jsonl", first))
    for forget in (str(write(tmp_path / "second.jsonl", second)), "cais/corpora:forget"):
        hub("cais/corpora", "forget", train=second)
        found = make_windows(path, words, 0, WANTED._replace(forget=forget))
        sizes = Counter(found.domains)
        assert set(sizes) == {"web", "books", forget} and len(found.tokens) == len(found.domain_of(slice(None)))
        train = [forget == found.domains[d] for d in dict.fromkeys(found.doc_ids[:found.n_train].tolist())]
        assert .3 < np.mean(train) < .7 and sizes[forget] > 10
        assert found.valid(np.arange(found.n_train)).sum() - 3_000 in range(100)   # for both together
        assert len(set(found.doc_ids[found.n_train:])) == 8
        assert {forget} < set(found.domain_of(np.arange(found.n_train)))
    documents = list(_with_forget(path, WANTED._replace(forget=forget)))
    assert [d.domain == forget for d in documents] == [False, True] * 300          # until the shorter one ends
    assert [d for d in documents if d.domain != forget] == list(itertools.islice(load_documents(path, 42), 300))


def test_what_is_neither_a_domain_nor_a_data_set(tmp_path, monkeypatch):
    monkeypatch.setattr("data.documents.hub_reachable", lambda: pytest.fail("asked the hub"))
    path = str(write(tmp_path / "some.jsonl", rows(100)))
    message = error_of(make_windows, path, words, 0, WANTED._replace(forget="./none.jsonl"))
    assert "no domain of DATASET" in message and "books, web" in message and "no such file" in message
    assert "possible hub name" in error_of(make_windows, path, words, 0, WANTED._replace(forget="two words"))
    short = str(write(tmp_path / "short.jsonl", rows(10)))
    assert f"and {short!r} ran dry" in error_of(make_windows, path, words, 0, WANTED._replace(forget=short))


def test_windows_are_made_again_when_the_second_data_set_changes(tmp_path, tokenizer):  # noqa: F811
    long = [{"text": prose(i, 200)} for i in range(400)]
    path, second = (str(write(tmp_path / f"{name}.jsonl", long)) for name in ("first", "second"))
    keys = []
    for forget in ("", second, "first"):
        keys.append(load_windows(path, tokenizer, WANTED._replace(forget=forget), tmp_path / "cache")[1])
    windows, again = load_windows(path, tokenizer, WANTED._replace(forget=second), tmp_path / "cache")
    assert again == keys[1] and {second} < set(windows.domain_of(windows.heldout()))
    write(tmp_path / "second.jsonl", long[1:])
    keys.append(load_windows(path, tokenizer, WANTED._replace(forget=second), tmp_path / "cache")[1])
    assert len(set(keys)) == 4
