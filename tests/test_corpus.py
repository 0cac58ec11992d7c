"""embedded/corpus.py: the embedded corpus, every kind of data set, helpful errors for mistakes, labels of tokens."""
import ast
import io
import json
import keyword
import pickle
import re
import socket
import subprocess
import sys
import time
import tokenize
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT / "embedded"))
import corpus

WORDS = "the cat sat on a mat while rain fell over old stone roofs near quiet harbour towns".split()


def prose(seed, words):
    rng = np.random.default_rng(seed)
    return " ".join(rng.choice(WORDS, words)) + "."


def rows(n=200):
    return [{"text": f"row {i}: {prose(i, 12)}", "source": ("web", "books")[i % 2]} for i in range(n)]


def load(dataset, seed=0):
    return list(corpus.load_documents(str(dataset), seed))


def write(path, records):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(r) for r in records))
    elif path.suffix == ".json":
        path.write_text(json.dumps(records))
    elif path.suffix == ".csv":
        pd.DataFrame(records).to_csv(path, index=False)
    else:
        pd.DataFrame(records).to_parquet(path, row_group_size=50)
    return path


def fails(dataset, *expected):
    """The message of the DataError, which comes within seconds, is one paragraph and names no address."""
    began = time.monotonic()
    with pytest.raises(corpus.DataError) as caught:
        load(dataset) if isinstance(dataset, (str, Path)) else corpus.load_documents(dataset, 0)
    message = str(caught.value)
    assert time.monotonic() - began < 20          # the hub's own retries take longer; a busy machine needs some of it
    assert "\n" not in message and "://" not in message and len(message) < 700
    for part in expected:
        assert part in message, message
    return message


# --- the embedded corpus ---------------------------------------------------------------------------------------------
def test_embedded_corpus_has_every_domain_and_enough_held_out_files():
    documents = corpus.embedded_documents()
    assert {d.domain for d in documents} == set(corpus.DOMAINS)
    assert sum(d.heldout for d in documents) >= 200
    assert {d.domain for d in documents if d.heldout} == set(corpus.DOMAINS)
    assert len({d.name for d in documents}) == len(documents)
    assert all(d.heldout == corpus.is_heldout(d.name) and d.name.startswith(d.domain + "/") for d in documents)
    assert all(corpus.MIN_CHARS <= len(d.text) <= corpus.MAX_CHARS for d in documents)


def test_embedded_corpus_keeps_to_its_skip_lists():
    for document in corpus.embedded_documents():
        *folders, name = document.name.split("/")
        assert not corpus.SKIP_FOLDERS & set(folders) and name not in corpus.SKIP_FILES
        assert not any(document.name.startswith(f"{subtree}/") for subtree in corpus.SKIP_SUBTREES)


def test_embedded_corpus_is_shuffled_by_the_seed_alone():
    first, again, other = load("embedded"), load("embedded"), load("embedded", 1)
    assert first == again and first != other
    assert sorted(first) == sorted(other) == sorted(corpus.embedded_documents())


def test_corpus_hash_is_of_names_and_texts():
    assert re.fullmatch("[0-9a-f]{64}", corpus.corpus_hash())
    assert corpus.data_identity("embedded") == corpus.corpus_hash()


def test_requirements_pin_every_package_of_the_corpus():
    pins = dict(re.findall(r"^([\w-]+)==(\S+)", (PROJECT / "requirements.txt").read_text(), re.M))
    assert {package: pins.get(package) for package in corpus.DOMAINS.values()} == \
        {corpus.DOMAINS[domain]: version for domain, version in corpus.corpus_versions().items()}


# --- local files -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_rows_of_a_file(tmp_path, suffix):
    path = write(tmp_path / f"some{suffix}", rows())
    first, again, other = load(path), load(path), load(path, 1)
    assert first == again and [d.text for d in first] != [d.text for d in other]
    assert {d.text for d in first} == {d.text for d in other} == {r["text"] for r in rows()}
    assert {d.text for d in first if d.heldout} == {d.text for d in other if d.heldout}
    assert all(d.heldout == corpus.is_heldout(d.text) for d in first)
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
    assert all(len(d.text) <= corpus.PART_CHARS and d.text.endswith(("\n", ".")) for d in in_order)
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
    assert all(len(d.text) <= corpus.PART_CHARS for d in documents)
    assert sum(len(d.text) for d in documents) == sum(len(r["text"]) for r in long)


def test_text_without_any_break_is_cut_all_the_same():
    assert [len(piece) for piece in corpus._cut("x" * 45_000, 20_000)] == [20_000, 20_000, 5_000]
    assert corpus._cut("ab cd\nef gh ij", 9) == ["ab cd\n", "ef gh ij"]


def test_shuffling_in_bounded_memory_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "SHUFFLE_CHARS", 1_000)
    path = write(tmp_path / "some.jsonl", rows())
    documents = load(path)
    assert documents == load(path) and {d.text for d in documents} == {r["text"] for r in rows()}
    pulled = []
    source = (pulled.append(i) or corpus.Document(str(i), "x" * 100, "d", False) for i in range(1_000))
    next(corpus._shuffled(source, 0))
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
    before = corpus.data_identity(str(path))
    assert before == corpus.data_identity(str(path))
    write(path, rows(11))
    assert before != corpus.data_identity(str(path))
    with pytest.raises(corpus.DataError):
        corpus.data_identity(str(tmp_path / "none.jsonl"))


# --- nanoGPT folders -------------------------------------------------------------------------------------------------
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
    assert "shakespeare_char" in corpus.data_identity("shakespeare_char")


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


# --- mistakes --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["./none", "/none/at/all", "~/none", "none.txt", "no.jsonl.zst", "a/b/c", "none.tsv"])
def test_a_missing_path_never_asks_the_hub(monkeypatch, name):
    monkeypatch.setattr(corpus, "hub_reachable", lambda: pytest.fail("asked the hub"))
    fails(name, repr(name), "no such file or folder", '"embedded"')


@pytest.mark.parametrize("name", ["", "  ", None, 7, "two words", "https:x", "a" * 5_000, "a\0b"])
def test_names_that_cannot_be(monkeypatch, name):
    monkeypatch.setattr(corpus, "hub_reachable", lambda: False)
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


# --- the hub ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def online_again(monkeypatch):
    """Whatever a test does to offline mode is undone after it."""
    import datasets
    from huggingface_hub import constants
    for module in (constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    forget = corpus.hub_reachable.cache_clear
    forget()
    yield
    forget()


def test_without_a_network_a_hub_name_fails_at_once(monkeypatch, online_again):
    def no_network(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    fails("org/no-such-data-set", "org/no-such-data-set", "hub does not answer", '"embedded"')
    fails("org/no-such-data-set:part", "hub does not answer")
    fails("text8_missing", "hub does not answer", "data/text8_missing")


def test_a_look_up_that_hangs_is_given_up(monkeypatch, online_again):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(3))
    began = time.monotonic()
    assert corpus.hub_reachable(timeout=0.3) is False
    assert time.monotonic() - began < 2


def test_go_offline_ends_look_ups_of_every_library(monkeypatch, online_again):
    import datasets
    import transformers
    from huggingface_hub import hf_hub_download
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("asked the network"))
    corpus.go_offline()
    for look_up in (lambda: transformers.AutoConfig.from_pretrained("org/no-such-model"),
                    lambda: transformers.AutoTokenizer.from_pretrained("org/no-such-model"),
                    lambda: datasets.load_dataset("org/no-such-data-set", streaming=True),
                    lambda: hf_hub_download("org/no-such-model", "config.json")):
        began = time.monotonic()
        with pytest.raises((OSError, ValueError)):
            look_up()
        assert time.monotonic() - began < 15
    assert corpus.hub_reachable() is False


def test_hub_rows_are_streamed_by_name_and_configuration(monkeypatch, online_again):
    import datasets
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        shards = [[dict(r, text=f"shard {s} {r['text']}") for r in rows(50)] for s in range(4)]
        stream = datasets.IterableDataset.from_generator(lambda parts: (r for part in parts for r in part),
                                                         gen_kwargs={"parts": shards})
        return datasets.IterableDatasetDict({"test": stream.take(1), "train": stream})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(corpus, "hub_reachable", lambda: True)
    first, again, other = load("Org/data:part-1"), load("Org/data:part-1"), load("Org/data:part-1", 1)
    assert asked[0] == (("Org/data", "part-1"), {"streaming": True})
    assert first == again != other and len(first) == len({d.text for d in first}) == 200
    assert {d.text for d in first if d.heldout} == {d.text for d in other if d.heldout}
    assert first[0].name.startswith("Org/data:part-1#")


def test_errors_of_the_hub_say_what_to_do(monkeypatch, online_again):
    import datasets
    monkeypatch.setattr(corpus, "hub_reachable", lambda: True)
    missing = datasets.exceptions.DatasetNotFoundError
    for error, advice in (
            (missing("Dataset 'o/d' is a gated dataset on the Hub. Visit https://h.co/x"), "log in"),
            (missing("Dataset 'o/d' doesn't exist on the Hub"), "the name is what you mean"),
            (ValueError("Config name is missing.\nPlease pick one among the configs: ['a', 'b']"), "after a colon")):
        def load_dataset(*_, **__):
            raise error
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        fails("o/d", "'o/d'", advice)


def test_a_consumer_that_stops_early_ends_cleanly_and_quietly(tmp_path):
    path = write(tmp_path / "some.parquet", rows(5_000))
    code = f"import sys; sys.path.insert(0, {str(PROJECT / 'embedded')!r}); import corpus; " \
           f"print(next(iter(corpus.load_documents({str(path)!r}, 0))).domain)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.strip() in ("web", "books")


# --- labels of Python source -----------------------------------------------------------------------------------------
def check_labels(text, expected):
    """expected: "before|part|after", which occurs once in the text -> the token_type of every character of the part
    and then the contexts it is inside of."""
    labels = corpus.char_labels(text)
    assert labels.shape == (len(text), len(corpus.LABELS)) and labels.dtype == np.int8
    for place, words in expected.items():
        before, part, after = place.split("|")
        whole = before + part + after
        assert text.count(whole) == 1, place
        start = text.index(whole) + len(before)
        token_type, *inside = words.split()
        row = [corpus.LABELS["token_type"].index(token_type)]
        row += [int(context in inside) for context in list(corpus.LABELS)[1:]]
        assert labels[start:start + len(part)].tolist() == [row] * len(part), place


def test_names_of_labels():
    assert list(corpus.LABELS) == ["token_type", "docstring", "class", "function", "call"]
    assert all(classes == ("outside", "inside") for classes in list(corpus.LABELS.values())[1:])


def test_labels_of_types_and_bodies():
    check_labels("""# before
'''Module's
docs.'''
import os

class Outer(Base, metaclass=Meta):  # why
    "Class docs."
    size: int = 0x1f + 1_000.5e3j

    @decorate(7, by="name")
    @(other)
    async def method(self, x=first(), *, y: int = -1) -> bool:

        # a comment before the docstring
        "method" " docs"
        class Inner:
            def deep(self): return lambda a: a  # noqa

            held = 2
        "not docs"
        if x is not None and x != y \\
                or await x:
            return [print(x), b"bytes"]     # at the end
    # after the method
    last = True

def plain(): pass
tail = ...
""", {
        "|# before|": "comment", "before|\n|": "whitespace", "|'''Module's\ndocs.'''|": "docstring docstring",
        "|import| os": "keyword", "import| |os": "whitespace", "|os|\n": "name",
        "|class| Outer": "keyword", "|Outer|": "name", "Outer|(|": "operator", "metaclass|=|": "operator",
        "Meta|)|:": "operator", "Meta)|:|": "operator", "Meta):|  |": "whitespace class", "|# why|": "comment class",
        "why|\n    |": "whitespace class", '|"Class docs."|': "docstring docstring class", "|size|": "name class",
        "size|:|": "operator class", "|0x1f|": "number class", "|1_000.5e3j|": "number class",
        "|@|decorate": "operator class", "@|decorate|(": "name class", "decorate|(|7": "operator class call",
        "|7|, by": "number class call", "7,| |by": "whitespace class call", '|"name"|': "string class call",
        '"name"|)|': "operator class call", "(|other|)": "name class",
        "|async| def": "keyword class", "async |def| m": "keyword class",
        "|method|(self": "name class", "(|self|, x": "name class",
        "|first|()": "name class", "first|()|": "operator class call", "first()|,|": "operator class",
        "-> |bool|": "name class", "bool|:|": "operator class",
        "bool:|\n\n        |# a": "whitespace class function",
        "|# a comment before the docstring|": "comment class function",
        '|"method"| ': "docstring docstring class function", '"method"| |': "whitespace docstring class function",
        '|" docs"|': "docstring docstring class function", '" docs"|\n        |class': "whitespace class function",
        "|Inner|": "name class function", "|def| deep": "keyword class function", "deep(|self|": "name class function",
        "|return| lambda": "keyword class function", "|lambda|": "keyword class function",
        "|# noqa|": "comment class function", "|held|": "name class function",
        '|"not docs"|': "string class function", "x |is| not": "keyword class function",
        "|None|": "keyword class function", "|!=|": "operator class function", 
        "y| \\\n                |or": "whitespace class function",
        "|await|": "keyword class function", "[|print|": "name class function",
        "print|(|": "operator class function call", "print(|x|": "name class function call",
        "print(x|)|": "operator class function call", '|b"bytes"|': "string class function",
        "|# at the end|": "comment class function", "|# after the method|": "comment class", "|last|": "name class",
        "|True|": "keyword class", "True|\n\n|def": "whitespace", "def |plain|": "name", "plain|()|": "operator",
        "plain()|:|": "operator", "plain():| |": "whitespace function", "|pass|": "keyword function",
        "pass|\n|": "whitespace", "|tail|": "name", "|...|": "operator"})


def test_labels_of_calls():
    check_labels("""value = one(two(
    3,  # three
    [four for five in six(7)],
), **{"k": (8, eight)})(nine).ten(
)[eleven]((12))
(thirteen)(14)
print, (fifteen)
@decorate
class C(call(16), key=17): pass
del(x)
""", {
        "value = |one|": "name", "one|(|two": "operator call", "|two|": "name call", "|# three|": "comment call",
        "[|four|": "name call", "in |six|": "name call", "|eight|": "name call", "})|(|nine": "operator call",
        "|nine|": "name call", "nine)|.|ten": "operator", "|ten|": "name",
        "ten|(|": "operator call", "ten(|\n|)": "whitespace call",
        "[|eleven|": "name", "]|((|12": "operator call", "12|))|": "operator call", "|(|thirteen": "operator",
        "|thirteen|": "name", "thirteen|)|(14": "operator", "(|14|": "number call", "|fifteen|": "name",
        "@|decorate|": "name", "C|(|call": "operator", "|call|": "name", "|16|": "number call", "key=|17|": "number",
        "del|(|x": "operator", "del(|x|": "name"})


def test_labels_after_characters_of_many_bytes():
    """ast counts bytes, tokenize characters."""
    check_labels("""äöü = '日本'; run('é', 日本)  # ü
class Ä: 'ß'; x = '🙂'; y = f(1)
def é(): 'dóc'; return "à" + g(2)
def multi(): '''ö
ü'''; é(3)
text = \"\"\"ä
🙂\"\"\"; x = (4)
col·lecció = 5
""", {
        "|äöü|": "name", "|'日本'|": "string", "|run|": "name", "run|(|": "operator call",
        "('é', |日本|": "name call",
        "日本|)|": "operator call", ")|  |# ü": "whitespace", "|# ü|": "comment", "|Ä|": "name",
        "Ä:| |": "whitespace class", "|'ß'|": "docstring docstring class", "'ß'|;|": "operator class",
        "|'🙂'|": "string class", "|f|(1": "name class", "f(|1|)": "number class call",
        "f(1|)|": "operator class call",
        "|é|():": "name", "é|()|:": "operator", "|'dóc'|": "docstring docstring function",
        "'dóc'|;|": "operator function", "|g|(2": "name function", "(|2|)": "number function call",
        "2)|\n|": "whitespace", "|'''ö\nü'''|": "docstring docstring function",
        "ü'''|;|": "operator function", "(|3|)": "number function call", '|"""ä\n🙂"""|; x': "string",
        '"""|;| x = (': "operator", "|(|4": "operator", "|4|": "number", "|col·lecció|": "name"})


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_labels_after_characters_that_end_lines_elsewhere(newline):
    """Form feeds, vertical tabs and others end lines for str.splitlines, not for Python."""
    text = ('x = 1\n\f\n# a\x0bb\x1cc\u2028d\x85e\ndef f():\f\n\f    "doc\x0c \u2029"\n    y = """\n\x1d\n"""; g(2)\n'
            '\fclass C:\n    z = 3\n').replace("\n", newline)
    check_labels(text, {
        "|x| =": "name", "1|" + newline + "\f" + newline + "|#": "whitespace", "|# a\x0bb\x1cc\u2028d\x85e|": "comment",
        "():|\f|": "whitespace function", '|"doc\x0c \u2029"|': "docstring docstring function",
        '|"""' + newline + "\x1d" + newline + '"""|;': "string function", "|g|(2": "name function",
        "g(|2|)": "number function call", "2)|" + newline + "\f|class": "whitespace", "|class| C": "keyword",
        "C:|" + newline + "    |z": "whitespace class", "|3|": "number class", "3|" + newline + "|": "whitespace"})


def test_f_strings_are_strings_from_end_to_end():
    """Whether Python makes one token of them or, from 3.12 on, many."""
    check_labels("""def f(x):
    f"no docs {x}"
    a = f"{x!r:>{width(1)}} {{braces}} {run(x, 'y')}" + rf'''{
        f"{x}" if x else (lambda: 3)}
    é {x}''' "more" f'{x=}'
    return call(f"{g(x)}é{x}" f"{x}", 4)
b = "doc" f"{1}"
""", {
        "|f\"no docs {x}\"|": "string function", "|f\"{x!r:>{width(1)}} {{braces}} {run(x, 'y')}\"|": "string function",
        "|rf'''{\n        f\"{x}\" if x else (lambda: 3)}\n    é {x}'''|": "string function",
        "'''| |\"more\"": "whitespace function", "|\"more\"|": "string function", "|f'{x=}'|": "string function",
        "|call|": "name function", "|f\"{g(x)}é{x}\"|": "string function call", "\"|,| 4": "operator function call",
        "|4|": "number function call", "\"doc\"| |": "whitespace", "|f\"{1}\"|": "string"})


@pytest.mark.parametrize("text, docstring", [
    ('def f():\n    x = 1\n    "second"\n', None),
    ('x = 1\n"second"\n', None),
    ('class A:\n    b"bytes"\n', None),
    ('class A:\n    f"formatted"\n', None),
    ('class A:\n    "a" + "b"\n', None),
    ('if x:\n    "of an if"\n', None),
    ('x = lambda: "of a lambda"\n', None),
    ('# first\n\n("in parentheses")\n', '"in parentheses"'),
    ('class A: "one line"; x = "other"', '"one line"'),
    ('async def f():\n    r"""raw\n    \\d"""', 'r"""raw\n    \\d"""'),
    ('def f():\n    ""\n', '""'),
    ('"a" \\\n"b"\n', '"a" \\\n"b"'),
])
def test_labels_of_docstrings(text, docstring):
    labels = corpus.char_labels(text)
    inside = "".join(c for c, row in zip(text, labels) if row[list(corpus.LABELS).index("docstring")])
    assert inside == (docstring or "")
    of_type = labels[:, 0] == corpus.LABELS["token_type"].index("docstring")
    assert "".join(c for c, is_docstring in zip(text, of_type) if is_docstring) == inside.replace(" \\\n", "")


@pytest.mark.parametrize("text", [
    "The cat sat on the mat.", "print 'two'", "def f(:\n", "x = 'open\n", "x = (", "  indented\nx", "x = 1\n\0",
    "x = '\ud800'", "f(" * 500 + ")" * 500, "-" * 200_000 + "1", " = Title = \n\n Text .\n", "\\begin{document}",
    '{"text": "a\n"}', "x\n\ty\n", "[" * 90, "{" * 90, "(" * 60 + "a" + "}" * 60])
def test_what_is_not_python_has_no_labels(text):
    began = time.monotonic()
    assert corpus.char_labels(text) is None
    assert time.monotonic() - began < 5


def test_labels_of_next_to_nothing():
    assert corpus.char_labels("").shape == (0, len(corpus.LABELS))
    assert corpus.char_labels(" \n\n").tolist() == [[0] * len(corpus.LABELS)] * 3
    assert corpus.char_labels("x").shape == corpus.char_labels("#").shape == (1, len(corpus.LABELS))


def test_labelling_is_quiet():
    """Also where the source has invalid escapes and the like, and where Python is asked for every warning."""
    code = f"import sys; sys.path.insert(0, {str(PROJECT / 'embedded')!r}); import corpus; " \
           "print(corpus.char_labels(r\"x = '\\d' is 1if 2else 3\" + \"\\nassert (1, 'x')\\n\").shape)"
    for flags in ([], ["-W", "always"]):
        done = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, timeout=180)
        assert (done.returncode, done.stderr, done.stdout) == (0, "", "(40, 5)\n")


def test_labels_of_real_files():
    """Against other ways to count the same: tokenize's own strings, ast.get_docstring, the lines of functions."""
    documents = sorted((d for d in corpus.embedded_documents() if d.heldout), key=lambda d: d.name[::-1])[::15]
    assert len(documents) >= 28
    names = list(corpus.LABELS)
    for document in documents:
        text, labels = document.text, corpus.char_labels(document.text)
        types = np.array(corpus.LABELS["token_type"])[labels[:, 0]]
        inside = {name: labels[:, names.index(name)] == 1 for name in names[1:]}
        assert set(np.unique(labels[:, 1:])) <= {0, 1}

        def parts(mask):
            edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
            return [text[a:b] for a, b in edges.reshape(-1, 2)]

        assert all(keyword.iskeyword(part) for part in parts(types == "keyword"))
        assert all(part.isidentifier() and not keyword.iskeyword(part) for part in parts(types == "name"))
        assert all(part.startswith("#") and "\n" not in part for part in parts(types == "comment"))
        assert all(re.fullmatch(r"[\s\\]+", part) for part in parts(types == "whitespace"))
        assert all(part[0] in "0123456789." for part in parts(types == "number"))
        assert not any(re.search(r"[\w\s\"'#]", part) for part in parts(types == "operator"))
        assert not (inside["docstring"] & (types == "string")).any()
        assert inside["docstring"][types == "docstring"].all()

        tree = ast.parse(text)
        have = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        nodes = [node for node in ast.walk(tree) if isinstance(node, have)]
        found = [ast.get_docstring(node, clean=False) for node in nodes]
        assert len(parts(inside["docstring"])) == sum(docstring is not None for docstring in found)
        assert sorted(ast.literal_eval(f"({part})") for part in parts(inside["docstring"])) == \
            sorted(docstring for docstring in found if docstring is not None)
        assert sum(map(len, parts(types == "comment"))) == sum(
            len(token.string) for token in tokenize.generate_tokens(io.StringIO(text).readline)
            if token.type == tokenize.COMMENT)

        line_starts = np.cumsum([0] + [len(line) + 1 for line in text.split("\n")])
        for name, kinds in (("class", ast.ClassDef), ("function", (ast.FunctionDef, ast.AsyncFunctionDef))):
            bodies = [range(node.body[0].lineno, node.end_lineno + 1) for node in nodes if isinstance(node, kinds)]
            lines = set().union(*bodies)
            of_line = {n + 1: inside[name][start:end - 1][-1:].any()
                       for n, (start, end) in enumerate(zip(line_starts, line_starts[1:])) if end - start > 1}
            assert all(of_line[n] for n in lines if n in of_line)
        assert parts(types == "keyword").count("class") == sum(isinstance(node, ast.ClassDef) for node in nodes)


# --- labels of windows -----------------------------------------------------------------------------------------------
WANTED = corpus.Wanted(context_length=64, train_tokens=2_000, eval_files=8, train_windows_per_file=2,
                       eval_windows_per_file=3, min_window=16, seed=42)


@pytest.fixture(scope="module")
def tokenizer():
    import transformers
    return transformers.AutoTokenizer.from_pretrained(PROJECT / "embedded" / "model")


@pytest.fixture(scope="module")
def windows(tokenizer):
    return corpus.make_windows("embedded", tokenizer, tokenizer.bos_token_id, WANTED)


def heldout_tokens(found):
    """(token, labels) of every held-out token that is neither BOS nor padding, by window."""
    for tokens, length, labels in zip(found.tokens[found.n_train:], found.lengths[found.n_train:], found.labels):
        assert (labels[0] == -1).all() and (labels[length:] == -1).all()
        yield tokens[1:length], labels[1:length]


def test_labels_of_windows_line_up_with_their_tokens(windows, tokenizer):
    texts = {d.name: d.text for d in corpus.embedded_documents()}
    heldout = windows.doc_ids[windows.n_train:]
    assert windows.labels.shape == (len(heldout), 64, len(corpus.LABELS)) and windows.labels.dtype == np.int8
    assert len(set(heldout)) == 8
    seen = set()
    for document, (tokens, labels) in zip(heldout, heldout_tokens(windows)):
        text = texts[windows.names[document]]
        by_character = corpus.char_labels(text)
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
            name, stripped = corpus.LABELS["token_type"][row[0]], part.strip()
            seen.add(name)
            assert name != "keyword" or re.match(r"[A-Za-z]", stripped)
            assert name != "number" or re.match(r"[\d.a-fA-F_exo]", stripped)
            assert name != "whitespace" or not stripped or stripped == "\\"
            if name == "comment" and not stripped.startswith("#"):
                line = text[:at].rsplit("\n", 1)[-1]
                assert "#" in line
    assert {"comment", "docstring", "keyword", "operator", "name", "whitespace"} <= seen
    assert all(len(np.unique(windows.labels[..., k])) == 3 for k in range(1, len(corpus.LABELS)))


def test_windows_with_labels_are_those_without(windows, tokenizer):
    """Asking a tokenizer for offsets changes no id, and training documents are not asked about."""
    asked = []

    class Slow:
        is_fast = False

        def __call__(self, text, **options):
            asked.append(options)
            return tokenizer(text, **options)

    slow = corpus.make_windows("embedded", Slow(), tokenizer.bos_token_id, WANTED)
    assert all(options == {"add_special_tokens": False} for options in asked)
    assert all(np.array_equal(a, b) for a, b in zip(slow[:6], windows[:6]))
    assert slow.labels.shape == windows.labels.shape and slow.labels.dtype == np.int8 and (slow.labels == -1).all()
    for document in list(corpus.embedded_documents())[::400]:
        plain = tokenizer(document.text, add_special_tokens=False)["input_ids"]
        assert tokenizer(document.text, add_special_tokens=False, return_offsets_mapping=True)["input_ids"] == plain


def test_labels_are_made_for_heldout_documents_only(monkeypatch, tokenizer):
    asked = []
    monkeypatch.setattr(corpus, "char_labels", lambda text: asked.append(text))
    found = corpus.make_windows("embedded", tokenizer, tokenizer.bos_token_id, WANTED)
    texts = {d.text: d.name for d in corpus.embedded_documents()}
    assert {texts[text] for text in asked} == {found.names[d] for d in found.doc_ids[found.n_train:]}
    assert (found.labels == -1).all()


def python_rows(default=""):
    definition = f"(x={default!r}):\n    return print(x, 1)\n\n"
    return [{"text": f"# number {i} {default}\n" + f"def f{i}{definition}" * 9} for i in range(300)]


def test_labels_are_dropped_with_the_tokens_that_are_dropped(tmp_path, tokenizer):
    """Where a document spells BOS out."""
    path = write(tmp_path / "some.jsonl", python_rows(tokenizer.bos_token))
    found = corpus.make_windows(str(path), tokenizer, tokenizer.bos_token_id, WANTED)
    types, seen = corpus.LABELS["token_type"], set()
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
        found = corpus.make_windows(str(path), tokenizer, 0, WANTED._replace(min_window=8))
    else:
        path = write(tmp_path / "some.jsonl", python_rows())
        found = corpus.make_windows(str(path), lambda text, **_: {"input_ids": [1 + ord(c) for c in text]}, 0, WANTED)
    assert found.labels.shape == (len(found.tokens) - found.n_train, 64, len(corpus.LABELS))
    assert found.labels.dtype == np.int8 and (found.labels == -1).all()


def test_python_among_other_documents(tmp_path, tokenizer):
    mixed = [row for pair in zip(python_rows(), [{"text": prose(i, 60)} for i in range(300)]) for row in pair]
    found = corpus.make_windows(str(write(tmp_path / "some.jsonl", mixed)), tokenizer, 0, WANTED)
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
    labels = corpus.char_labels(text)
    of_tokens = [[labels[corpus._first_character(text, *span)].tolist() for span in spans] for spans in offsets]
    assert offsets[0] != offsets[1] and of_tokens[0] == of_tokens[1]
    assert corpus._first_character("a b", 3, 3) == 2


def test_labels_come_back_from_a_file(tmp_path, windows):
    np.savez(tmp_path / "windows.npz", **windows._asdict())
    back = corpus.read_windows(tmp_path / "windows.npz")
    assert np.array_equal(back.labels, windows.labels) and back.labels.dtype == np.int8
    assert all(np.array_equal(a, b) for a, b in zip(back, windows))
    assert corpus.Windows(*windows[:6]).labels is None
