"""Data sets of the hub, which is played by rows with its columns, and the hub out of reach."""
import socket
import time

import pytest

from data.documents import data_identity, find_local, load_documents, PARQUET_FILES
from data.tasks import load_questions, probing_examples
from data_sets import error_of, fails, load, prose, rows
from runtime.hub import go_offline, hub_reachable


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
    assert hub_reachable(timeout=0.3) is False
    assert time.monotonic() - began < 2


def test_go_offline_ends_look_ups_of_every_library(monkeypatch, online_again):
    import datasets
    import transformers
    from huggingface_hub import hf_hub_download
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("asked the network"))
    go_offline()
    for look_up in (lambda: transformers.AutoConfig.from_pretrained("org/no-such-model"),
                    lambda: transformers.AutoTokenizer.from_pretrained("org/no-such-model"),
                    lambda: datasets.load_dataset("org/no-such-data-set", streaming=True),
                    lambda: hf_hub_download("org/no-such-model", "config.json")):
        began = time.monotonic()
        with pytest.raises((OSError, ValueError)):
            look_up()
        assert time.monotonic() - began < 15
    assert hub_reachable() is False


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
    monkeypatch.setattr("data.documents.hub_reachable", lambda: True)
    first, again, other = load("Org/data:part-1"), load("Org/data:part-1"), load("Org/data:part-1", 1)
    assert asked[0] == (("Org/data", "part-1"), {"streaming": True})
    assert first == again != other and len(first) == len({d.text for d in first}) == 200
    assert {d.text for d in first if d.heldout} == {d.text for d in other if d.heldout}
    assert first[0].name.startswith("Org/data:part-1#")


def test_errors_of_the_hub_say_what_to_do(monkeypatch, online_again):
    import datasets
    monkeypatch.setattr("data.documents.hub_reachable", lambda: True)
    missing = datasets.exceptions.DatasetNotFoundError
    for error, advice in (
            (missing("Dataset 'o/d' is a gated dataset on the Hub. Visit https://h.co/x"), "log in"),
            (missing("Dataset 'o/d' doesn't exist on the Hub"), "the name is what you mean"),
            (ValueError("Config name is missing.\nPlease pick one among the configs: ['a', 'b']"), "after a colon")):
        def load_dataset(*_, **__):
            raise error
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        fails("o/d", "'o/d'", advice)


# ---- Names of hub data sets ----
@pytest.mark.parametrize("name", ["cais/wmdp-corpora:bio-retain-corpus", "Salesforce/wikitext:wikitext-2-raw-v1",
                                  "cais/wmdp:wmdp-bio", "Helsinki-NLP/europarl:en-fr"])
def test_a_configuration_follows_a_colon(hub, name):
    asked = hub(*name.split(":"), train=rows(30))
    documents = list(load_documents(name, 0))
    assert len(documents) == 30 and set(asked) == {tuple(name.split(":"))}
    assert find_local(name) is None and data_identity(name) == f"hub {name}"


def test_a_gated_data_set_says_how_to_get_it(monkeypatch, online_again):  # noqa: F811
    import datasets
    for text in ("Dataset 'o/d' is a gated dataset on the Hub. Visit the dataset page at https://h.co/o/d to ask for "
                 "access.", "401 Client Error. Cannot access gated repo for url https://h.co/o/d/resolve/a.parquet"):
        def load_dataset(*_, **__):
            raise datasets.exceptions.DatasetNotFoundError(text)
        monkeypatch.setattr("data.documents.hub_reachable", lambda: True)
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        for ask in (lambda: load_documents("o/d:part", 0), lambda: load_questions("o/d:part"),
                    lambda: probing_examples("o/d:part", 1, 1)):
            message = error_of(ask)
            assert all(part in message for part in ("'o/d:part'", "gated", "accept its licence", "`hf auth login`",
                                                    "local folder", "same columns"))


def test_a_wrong_configuration_names_the_right_ones(monkeypatch, online_again):  # noqa: F811
    import datasets

    def load_dataset(*_, **__):
        raise ValueError("BuilderConfig 'bio' not found. Available: ['bio-retain-corpus', 'cyber-retain-corpus']")
    monkeypatch.setattr("data.documents.hub_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    fails("cais/wmdp-corpora:bio", "bio-retain-corpus", "after a colon")


def test_github_code_is_read_from_its_files_and_not_by_its_script(hub):
    files = PARQUET_FILES["codeparrot/github-code"]
    asked = hub("parquet", files, train=[{"content": prose(i, 9), "path": "a.c"} for i in range(60)])
    assert len(list(load_documents("codeparrot/github-code", 0))) == 60
    assert set(asked) == {("parquet", files)} and files.endswith("data/train-*.parquet")
