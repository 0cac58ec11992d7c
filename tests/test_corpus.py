"""embedded/corpus.py: the embedded corpus, every kind of data set, and a helpful error for every kind of mistake."""
import json
import pickle
import re
import socket
import subprocess
import sys
import time
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
