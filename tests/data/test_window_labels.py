"""Labels of the tokens of windows."""
import re

import numpy as np
import pytest

from data.code_labels import char_labels, first_character, LABELS
from data.documents import embedded_documents
from data.windows import make_windows, read_windows, Wanted, Windows
from data_sets import prose, rows, write

WANTED = Wanted(context_length=64, train_tokens=2_000, eval_files=8, train_windows_per_file=2,
                       eval_windows_per_file=3, min_window=16, seed=42)


@pytest.fixture(scope="module")
def windows(tokenizer):
    return make_windows("embedded", tokenizer, tokenizer.bos_token_id, WANTED)


def heldout_tokens(found):
    """(token, labels) of every held-out token that is neither BOS nor padding, by window."""
    for tokens, length, labels in zip(found.tokens[found.n_train:], found.lengths[found.n_train:], found.labels):
        assert (labels[0] == -1).all() and (labels[length:] == -1).all()
        yield tokens[1:length], labels[1:length]


def test_labels_of_windows_line_up_with_their_tokens(windows, tokenizer):
    texts = {d.name: d.text for d in embedded_documents()}
    heldout = windows.doc_ids[windows.n_train:]
    assert windows.labels.shape == (len(heldout), 64, len(LABELS)) and windows.labels.dtype == np.int8
    assert len(set(heldout)) == 8
    seen = set()
    for document, (tokens, labels) in zip(heldout, heldout_tokens(windows)):
        text = texts[windows.names[document]]
        by_character = char_labels(text)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        start = next(i for i in range(0, len(ids), 63) if ids[i:i + len(tokens)] == tokens.tolist())
        at = len(tokenizer.decode(ids[:start]))
        for token, row in zip(tokens, labels):
            part = tokenizer.decode([token])
            if text.isascii():
                assert text.startswith(part, at)
                first = at + (len(part) - len(part.lstrip()) if part.strip() else 0)
                assert row.tolist() == by_character[first].tolist()
                at += len(part)
            name, stripped = LABELS["token_type"][row[0]], part.strip()
            seen.add(name)
            assert name != "keyword" or re.match(r"[A-Za-z]", stripped)
            assert name != "number" or re.match(r"[\d.a-fA-F_exo]", stripped)
            assert name != "whitespace" or not stripped or stripped == "\\"
            if name == "comment" and not stripped.startswith("#"):
                line = text[:at].rsplit("\n", 1)[-1]
                assert "#" in line
    assert {"comment", "docstring", "keyword", "operator", "name", "whitespace"} <= seen
    assert all(len(np.unique(windows.labels[..., k])) == 3 for k in range(1, len(LABELS)))


def test_windows_with_labels_are_those_without(windows, tokenizer):
    """Asking a tokenizer for offsets changes no id, and training documents are not asked about."""
    asked = []

    class Slow:
        is_fast = False

        def __call__(self, text, **options):
            asked.append(options)
            return tokenizer(text, **options)

    slow = make_windows("embedded", Slow(), tokenizer.bos_token_id, WANTED)
    assert all(options == {"add_special_tokens": False} for options in asked)
    assert all(np.array_equal(a, b) for a, b in zip(slow[:6], windows[:6]))
    assert slow.labels.shape == windows.labels.shape and slow.labels.dtype == np.int8 and (slow.labels == -1).all()
    for document in list(embedded_documents())[::400]:
        plain = tokenizer(document.text, add_special_tokens=False)["input_ids"]
        assert tokenizer(document.text, add_special_tokens=False, return_offsets_mapping=True)["input_ids"] == plain


def test_labels_are_made_for_heldout_documents_only(monkeypatch, tokenizer):
    asked = []
    monkeypatch.setattr("data.windows.char_labels", lambda text: asked.append(text))
    found = make_windows("embedded", tokenizer, tokenizer.bos_token_id, WANTED)
    texts = {d.text: d.name for d in embedded_documents()}
    assert {texts[text] for text in asked} == {found.names[d] for d in found.doc_ids[found.n_train:]}
    assert (found.labels == -1).all()


def python_rows(default=""):
    definition = f"(x={default!r}):\n    return print(x, 1)\n\n"
    return [{"text": f"# number {i} {default}\n" + f"def f{i}{definition}" * 9} for i in range(300)]


def test_labels_are_dropped_with_the_tokens_that_are_dropped(tmp_path, tokenizer):
    """Where a document spells BOS out."""
    path = write(tmp_path / "some.jsonl", python_rows(tokenizer.bos_token))
    found = make_windows(str(path), tokenizer, tokenizer.bos_token_id, WANTED)
    types, seen = LABELS["token_type"], set()
    for tokens, labels in heldout_tokens(found):
        assert (labels >= 0).all() and (tokens != tokenizer.bos_token_id).all()
        for token, row in zip(tokens, labels):
            part = tokenizer.decode([token]).strip()
            if part in ("def", "return", "print"):
                assert types[row[0]] == ("name" if part == "print" else "keyword")
                seen.add(part)
    assert len(seen) == 3


@pytest.mark.parametrize("make", ["plain", "other_tokenizer"])
def test_labels_are_unknown_where_they_cannot_be_known(tmp_path, tokenizer, make):
    if make == "plain":
        path = write(tmp_path / "some.jsonl", rows(900))
        found = make_windows(str(path), tokenizer, 0, WANTED._replace(min_window=8))
    else:
        path = write(tmp_path / "some.jsonl", python_rows())
        found = make_windows(str(path), lambda text, **_: {"input_ids": [1 + ord(c) for c in text]}, 0, WANTED)
    assert found.labels.shape == (len(found.tokens) - found.n_train, 64, len(LABELS))
    assert found.labels.dtype == np.int8 and (found.labels == -1).all()


def test_python_among_other_documents(tmp_path, tokenizer):
    mixed = [row for pair in zip(python_rows(), [{"text": prose(i, 60)} for i in range(300)]) for row in pair]
    found = make_windows(str(write(tmp_path / "some.jsonl", mixed)), tokenizer, 0, WANTED)
    known = [(labels >= 0).all() for _, labels in heldout_tokens(found)]
    python = ["def" in tokenizer.decode(tokens) for tokens, _ in heldout_tokens(found)]
    assert known == python and {True, False} == set(known)


def test_tokenizers_that_leave_spaces_out_of_offsets(tokenizer):
    """Byte-level ones with trim_offsets, as of many models: the place of a token of spaces is empty and after them."""
    text = 'def f():\n    """é  x"""\n    if x:\n        return  "  a"   # b   \n' * 3 + "    "
    offsets = []
    for trim in ("false", "true"):
        fast = type(tokenizer.backend_tokenizer).from_str(re.sub(
            r'("trim_offsets":)(true|false)', rf"\1{trim}", tokenizer.backend_tokenizer.to_str()))
        offsets.append(fast.encode(text, add_special_tokens=True).offsets)
    labels = char_labels(text)
    of_tokens = [[labels[first_character(text, *span)].tolist() for span in spans] for spans in offsets]
    assert offsets[0] != offsets[1] and of_tokens[0] == of_tokens[1]
    assert first_character("a b", 3, 3) == 2


def test_labels_come_back_from_a_file(tmp_path, windows):
    np.savez(tmp_path / "windows.npz", **windows._asdict())
    back = read_windows(tmp_path / "windows.npz")
    assert np.array_equal(back.labels, windows.labels) and back.labels.dtype == np.int8
    assert all(np.array_equal(a, b) for a, b in zip(back, windows))
    assert Windows(*windows[:6]).labels is None
