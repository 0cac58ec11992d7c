"""Documents of the embedded corpus, of local files and of nanoGPT folders; errors that say what would work."""
import json
import pickle
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from copies import PROJECT
from data import documents
from data.documents import (
    _cut, _shuffled, corpus_hash, corpus_versions, data_identity, Document, DOMAINS,
    embedded_documents, is_heldout, MAX_CHARS, MIN_CHARS, PART_CHARS, SKIP_FILES, SKIP_FOLDERS,
    SKIP_SUBTREES)
from data_sets import fails, load, prose, rows, write
from runtime.errors import RunnerError

# ---- The embedded corpus ----
def test_embedded_corpus_has_every_domain_and_enough_held_out_files():
    documents = embedded_documents()
    assert {d.domain for d in documents} == set(DOMAINS)
    assert sum(d.heldout for d in documents) >= 200
    assert {d.domain for d in documents if d.heldout} == set(DOMAINS)
    assert len({d.name for d in documents}) == len(documents)
    assert all(d.heldout == is_heldout(d.name) and d.name.startswith(d.domain + "/") for d in documents)
    assert all(MIN_CHARS <= len(d.text) <= MAX_CHARS for d in documents)


def test_embedded_corpus_keeps_to_its_skip_lists():
    for document in embedded_documents():
        *folders, name = document.name.split("/")
        assert not SKIP_FOLDERS & set(folders) and name not in SKIP_FILES
        assert not any(document.name.startswith(f"{subtree}/") for subtree in SKIP_SUBTREES)


def test_embedded_corpus_is_shuffled_by_the_seed_alone():
    first, again, other = load("embedded"), load("embedded"), load("embedded", 1)
    assert first == again and first != other
    assert sorted(first) == sorted(other) == sorted(embedded_documents())


def test_corpus_hash_is_of_names_and_texts():
    assert re.fullmatch("[0-9a-f]{64}", corpus_hash())
    assert data_identity("embedded") == corpus_hash()


def test_requirements_pin_every_package_of_the_corpus():
    pins = dict(re.findall(r"^([\w-]+)==(\S+)", (PROJECT / "requirements.txt").read_text(), re.M))
    assert {package: pins.get(package) for package in DOMAINS.values()} == \
        {DOMAINS[domain]: version for domain, version in corpus_versions().items()}


# ---- Local files ----
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_rows_of_a_file(tmp_path, suffix):
    path = write(tmp_path / f"some{suffix}", rows())
    first, again, other = load(path), load(path), load(path, 1)
    assert first == again and [d.text for d in first] != [d.text for d in other]
    assert {d.text for d in first} == {d.text for d in other} == {r["text"] for r in rows()}
    assert {d.text for d in first if d.heldout} == {d.text for d in other if d.heldout}
    assert all(d.heldout == is_heldout(d.text) for d in first)
    assert 4 <= sum(d.heldout for d in first) <= 40
    assert {d.domain for d in first} == {"web", "books"}
    assert len({d.name for d in first}) == 200 and all(re.fullmatch(r"some#\d+", d.name) for d in first)


def test_compressed_files(tmp_path):
    write(tmp_path / "some.jsonl", rows())
    subprocess.run(["gzip", str(tmp_path / "some.jsonl")], check=True)
    assert {d.text for d in load(tmp_path / "some.jsonl.gz")} == {r["text"] for r in rows()}


def test_zstandard_files(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    plain = write(tmp_path / "some.jsonl", rows())
    (tmp_path / "some.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(plain.read_bytes()))
    assert {d.text for d in load(tmp_path / "some.jsonl.zst")} == {r["text"] for r in rows()}


def test_folder_of_text_files_is_one_document_a_file(tmp_path, monkeypatch):
    for i in range(60):
        (tmp_path / "books" / str(i % 3)).mkdir(parents=True, exist_ok=True)
        (tmp_path / "books" / str(i % 3) / f"{i} [draft]*.txt").write_text(f"Line {i}.\n{prose(i, 20)}\n")
    (tmp_path / "books" / ".hidden.txt").write_text("not this")
    (tmp_path / "books" / "empty.txt").write_text("")
    monkeypatch.chdir(tmp_path)
    documents = load("./books")
    assert len(documents) == 60 and {d.domain for d in documents} == {"books"}
    assert {d.text for d in documents} == {f"Line {i}.\n{prose(i, 20)}\n" for i in range(60)}
    assert documents == load("books") == load(tmp_path / "books")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert documents == load("~/books")


def test_one_long_text_file_has_held_out_parts(tmp_path):
    text = "\n".join(prose(i, 40) for i in range(1_000))
    (tmp_path / "novel.txt").write_text(text)
    documents = load(tmp_path / "novel.txt")
    in_order = sorted(documents, key=lambda d: int(d.name.split(".")[-1]))
    assert documents != in_order and "".join(d.text for d in in_order) == text
    assert [d.name for d in in_order] == [f"novel#0.{i}" for i in range(len(in_order))]
    assert all(len(d.text) <= PART_CHARS and d.text.endswith(("\n", ".")) for d in in_order)
    heldout = sum(len(d.text) for d in documents if d.heldout)
    assert sum(d.heldout for d in documents) >= 2 and len(text) / 20 < heldout < len(text) / 8
    assert {d.name for d in documents if d.heldout} == {d.name for d in load(tmp_path / "novel.txt", 5) if d.heldout}


def test_parts_of_a_document_are_held_out_together(tmp_path):
    long = [{"text": f"{i} {prose(i, 9_000 if i % 2 else 10)}"} for i in range(80)]
    documents = load(write(tmp_path / "long.jsonl", long))
    by_row = {}
    for document in documents:
        by_row.setdefault(re.match(r"long#\d+", document.name)[0], []).append(document)
    assert len(by_row) == 80 and max(len(parts) for parts in by_row.values()) >= 3
    assert all(len({d.heldout for d in parts}) == 1 for parts in by_row.values())
    assert {d.heldout for d in documents} == {True, False}
    assert all(len(d.text) <= PART_CHARS for d in documents)
    assert sum(len(d.text) for d in documents) == sum(len(r["text"]) for r in long)


def test_text_without_any_break_is_cut_all_the_same():
    assert [len(piece) for piece in _cut("x" * 45_000, 20_000)] == [20_000, 20_000, 5_000]
    assert _cut("ab cd\nef gh ij", 9) == ["ab cd\n", "ef gh ij"]


def test_shuffling_in_bounded_memory_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("data.documents.SHUFFLE_CHARS", 1_000)
    path = write(tmp_path / "some.jsonl", rows())
    documents = load(path)
    assert documents == load(path) and {d.text for d in documents} == {r["text"] for r in rows()}
    pulled = []
    source = (pulled.append(i) or Document(str(i), "x" * 100, "d", False) for i in range(1_000))
    next(_shuffled(source, 0))
    assert len(pulled) == 11


def test_lines_of_wikitext_become_articles(tmp_path):
    lines = []
    for i in range(60):
        lines += ["", f" = Article {i} = \n", "", f" {prose(i, 30)}\n", ""]
        lines += [" = = History = = \n", "", f" x = {i} = y .\n"]
    documents = load(write(tmp_path / "wiki.parquet", [{"text": line} for line in lines]))
    assert len(documents) == 60 and all(d.text.startswith(" = Article ") for d in documents)
    first = next(d for d in documents if "Article 0 =" in d.text)
    assert first.text == f" = Article 0 = \n\n {prose(0, 30)}\n\n = = History = = \n\n x = 0 = y .\n\n"
    assert {d.heldout for d in documents} == {True, False}


@pytest.mark.parametrize("record,text", [
    ({"content": "this one", "title": "not this", "n": 1}, "this one"),
    ({"text": "this one", "content": "not this"}, "this one"),
    ({"sentence": "this one", "label": "positive"}, "this one"),
    ({"n": 1, "review": "this one"}, "this one"),
])
def test_the_column_of_text(tmp_path, record, text):
    assert load(write(tmp_path / "some.jsonl", [record]))[0].text == text


def test_the_pile_s_own_domains(tmp_path):
    records = [{"text": prose(i, 9), "meta": {"pile_set_name": f"Set {i % 3}"}} for i in range(60)]
    assert {d.domain for d in load(write(tmp_path / "pile.jsonl", records))} == {"Set 0", "Set 1", "Set 2"}


def test_identity_of_local_data_changes_with_the_data(tmp_path):
    path = write(tmp_path / "some.jsonl", rows(10))
    before = data_identity(str(path))
    assert before == data_identity(str(path))
    write(path, rows(11))
    assert before != data_identity(str(path))
    with pytest.raises(RunnerError):
        data_identity(str(tmp_path / "none.jsonl"))


# ---- nanoGPT folders ----
def nanogpt(folder, train, val, **meta):
    folder.mkdir(parents=True)
    chars = sorted(set(train + val))
    for split, text in (("train", train), ("val", val)):
        np.array([chars.index(c) for c in text], dtype=np.uint16).tofile(folder / f"{split}.bin")
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(chars), "itos": dict(enumerate(chars)), **meta}))


@pytest.mark.parametrize("above", range(4))
def test_nanogpt_folder_by_its_bare_name(tmp_path, monkeypatch, above):
    train, val = "\n".join(prose(i, 40) for i in range(300)), "\n".join(prose(i, 40) for i in range(900, 930))
    nanogpt(tmp_path / "data" / "shakespeare_char", train, val)
    here = tmp_path.joinpath(*"abc"[:above])
    here.mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(here)
    documents = load("shakespeare_char")
    for text, heldout in ((train, False), (val, True)):
        parts = sorted((d for d in documents if d.heldout == heldout), key=lambda d: int(d.name.split(".")[-1]))
        assert "".join(d.text for d in parts) == text and len(parts) >= 2
    assert documents == load(tmp_path / "data" / "shakespeare_char") != load("shakespeare_char", 1)
    assert {d.domain for d in documents} == {"shakespeare_char"}
    assert "shakespeare_char" in data_identity("shakespeare_char")


class Malicious:
    def __reduce__(self):
        return (open, ("ran_code.txt", "w"))


def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nanogpt(tmp_path / "bad", "abc", "cba", extra=Malicious())
    fails("./bad", "io.open", "needs no code")
    assert not (tmp_path / "ran_code.txt").exists()


def test_damaged_nanogpt_folders(tmp_path):
    nanogpt(tmp_path / "ids", "abc" * 99, "cba", itos={0: "a"})
    fails(tmp_path / "ids", "has the id", "prepare.py")
    nanogpt(tmp_path / "val", "abc", "cba")
    (tmp_path / "val" / "val.bin").unlink()
    fails(tmp_path / "val", "lacks val.bin")
    nanogpt(tmp_path / "odd", "abc", "cba")
    (tmp_path / "odd" / "train.bin").write_bytes(b"abc")
    fails(tmp_path / "odd", "cannot be read", "uint16")
    nanogpt(tmp_path / "meta", "abc", "cba")
    (tmp_path / "meta" / "meta.pkl").write_bytes(b"no pickle")
    fails(tmp_path / "meta", "cannot be read", "itos")
    nanogpt(tmp_path / "gpt2", "abc", "cba")
    (tmp_path / "gpt2" / "meta.pkl").unlink()
    fails(tmp_path / "gpt2", "lacks meta.pkl")


# ---- Mistakes ----
@pytest.mark.parametrize("name", ["./none", "/none/at/all", "~/none", "none.txt", "no.jsonl.zst", "a/b/c", "none.tsv"])
def test_a_missing_path_never_asks_the_hub(monkeypatch, name):
    monkeypatch.setattr("data.documents.hub_reachable", lambda: pytest.fail("asked the hub"))
    fails(name, repr(name), "no such file or folder", '"embedded"')


@pytest.mark.parametrize("name", ["", "  ", None, 7, "two words", "https:x", "a" * 5_000, "a\0b"])
def test_names_that_cannot_be(monkeypatch, name):
    monkeypatch.setattr("data.documents.hub_reachable", lambda: False)
    fails(name, "The data set")


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    fails(tmp_path / "bad.jsonl", "bad.jsonl", "cannot be read")
    (tmp_path / "late.jsonl").write_text("\n".join(map(json.dumps, rows(10_000))) + '\n{"text": \n')
    fails(tmp_path / "late.jsonl", "cannot be read")
    (tmp_path / "bad.parquet").write_text("no parquet")
    fails(tmp_path / "bad.parquet", "cannot be read")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00abc")
    fails(tmp_path / "bad.txt", "not UTF-8")
    (tmp_path / "page.html").write_text("<p>")
    fails(tmp_path / "page.html", "kind that is not read", ".parquet")


def test_data_sets_without_text(tmp_path):
    (tmp_path / "a.txt").write_text("")
    fails(tmp_path / "a.txt", "is empty")
    (tmp_path / "b.txt").write_text(" \n \n")
    fails(tmp_path / "b.txt", "is empty")
    fails(write(tmp_path / "c.json", []), "is empty")
    fails(write(tmp_path / "d.jsonl", [{"text": ""}] * 100), "is empty", "'text'")
    (tmp_path / "e").mkdir()
    fails(tmp_path / "e", "no file that can be read")
    message = fails(write(tmp_path / "f.csv", [{"question": "a", "answer": "b", "n": 1}]), "question, answer, n")
    assert "2 others" in message
    (tmp_path / "g").mkdir()
    write(tmp_path / "g" / "a.csv", rows(3)), write(tmp_path / "g" / "b.jsonl", rows(3))
    fails(tmp_path / "g", "several kinds", "1 of csv", "1 of json")


def test_a_consumer_that_stops_early_ends_cleanly_and_quietly(tmp_path):
    path = write(tmp_path / "some.parquet", rows(5_000))
    code = "from data.documents import load_documents; " \
           f"print(next(iter(load_documents({str(path)!r}, 0))).domain)"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, timeout=180)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.strip() in ("web", "books")


# ---- Columns that are never read have any type ----
ODD = {"a number, then a text": [1, "x1"], "null, then a text": [None, "x1"], "a growing struct": [{"a": 1}, {"a": "x", "b": [2]}],
       "whole, then broken": [1, 1.5], "a list, then a number": [[1], 2]}


@pytest.mark.parametrize("values", ODD.values(), ids=ODD)
def test_columns_that_are_not_read_may_have_any_type(tmp_path, values):
    """In one file and in two, and a column that comes late."""
    first, second = ([row | {"id": value} for row in part] for part, value in zip((rows(60), rows(120)[60:]), values))
    second[-1]["late"] = 1
    for name, parts in (("one", [first + second]), ("two", [first, second])):
        (tmp_path / name).mkdir()
        for i, part in enumerate(parts):
            write(tmp_path / name / f"{i}.jsonl", part)
        assert sorted(d.text for d in load(tmp_path / name)) == sorted(row["text"] for row in rows(120))
    if values[1] == "x1":
        for kind in ("csv", "parquet"):
            (tmp_path / kind).mkdir()
            for i, part in enumerate((first, second)):
                write(tmp_path / kind / f"{i}.{kind}", part)
            assert len(load(tmp_path / kind)) == 120


def test_rows_of_a_hub_data_set_of_json_may_have_any_type(tmp_path, monkeypatch):
    """`datasets` gives a hub's JSON files one type a column for all files; the files are read without."""
    for name, value in (("a", 1), ("b", "x")):
        write(tmp_path / f"{name}.jsonl", [row | {"id": value} for row in rows(60)])
    monkeypatch.setattr(documents, "hub_reachable", lambda: True)
    splits = documents._hub_splits(str(tmp_path))
    assert len(list(splits["train"])) == 120


def test_rows_without_text_are_left_out_and_counted(tmp_path, capsys):
    path = write(tmp_path / "some.jsonl", [{"text": None}] * 300 + rows(100))
    assert len(load(path)) == 100
    assert "note: 300 of the first 348 rows of" in capsys.readouterr().out


def test_a_text_of_another_type_is_said(tmp_path):
    fails(write(tmp_path / "lists.jsonl", [{"text": ["a", "b"]}] * 60), "holds no text", "it is list", "one string")
    fails(write(tmp_path / "nulls.jsonl", [{"text": None}] * 60), "holds no text", "always null")
    frame = pd.DataFrame({"text": [b"some bytes"] * 60})
    frame.to_parquet(tmp_path / "bytes.parquet")
    fails(tmp_path / "bytes.parquet", "holds no text", "it is bytes")


def test_a_broken_line_is_named(tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"text": "one"}\n{"text": "two\n')
    fails(tmp_path / "broken.jsonl", "broken.jsonl", "line 2")
    (tmp_path / "list.jsonl").write_text('["one"]\n[1]\n')
    fails(tmp_path / "list.jsonl", "list.jsonl")


def test_a_long_text_in_a_csv_file(tmp_path):
    path = write(tmp_path / "long.csv", [{"id": i, "body": f"{i} " + "word " * 60_000, "source": "web"} for i in range(3)])
    assert sum(len(d.text) for d in load(path)) == sum(len(f"{i} ") + 300_000 for i in range(3))
