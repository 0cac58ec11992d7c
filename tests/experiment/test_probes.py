"""Probes on planted latents."""
from types import SimpleNamespace

import numpy as np
import pytest
from data.code_labels import LABELS
from data.windows import Windows
import records
from runtime.results import jsonable

CONTEXT, N_TRAIN, N_FILES, PER_FILE = 21, 4, 24, 4
SEQ = CONTEXT - 1
TOKENS = N_FILES * PER_FILE * SEQ


@pytest.fixture
def windows(E):
    """24 held-out files of four windows; tokens at random, labels by hand: token type 0-2 by token, the rest in runs of 5."""
    rng, n = np.random.default_rng(0), N_TRAIN + N_FILES * PER_FILE
    tokens = rng.integers(1, 40, (n, CONTEXT)).astype(np.int32)
    doc_ids = np.concatenate([np.arange(N_TRAIN), N_TRAIN + np.arange(N_FILES * PER_FILE) // PER_FILE])
    labels = np.full((n - N_TRAIN, CONTEXT, len(LABELS)), -1, np.int8)
    labels[:, 1:, 0] = tokens[N_TRAIN:, 1:] % 3
    labels[:, 1:, 1:] = rng.integers(0, 2, (n - N_TRAIN, SEQ // 5, len(LABELS) - 1)).repeat(5, 1)
    names, domains = [f"file {i}" for i in range(N_TRAIN + N_FILES)], ["ab"[i // 2 % 2] for i in range(N_TRAIN + N_FILES)]
    return Windows(tokens, np.full(n, CONTEXT), doc_ids, N_TRAIN, names, domains, labels)


def run_of(E, tmp_path, windows, z):
    store = SimpleNamespace(windows=windows, folder=tmp_path)
    return records.with_codes(E, records.run_of(E, None, store), z)


def test_a_planted_latent_is_found(E, monkeypatch, tmp_path, windows):
    monkeypatch.setattr(E, "CONTEXT_LENGTH", CONTEXT)
    monkeypatch.setattr(E, "PROBE_EVERY", 1)
    rng, flat = np.random.default_rng(1), windows.labels[:, 1:].reshape(TOKENS, -1)
    inside = 3.0 * (flat[:, 1] == 1)                                    # docstring
    of_file = np.eye(N_FILES)[np.arange(TOKENS) // (PER_FILE * SEQ)]    # one latent a document
    noise = rng.random((TOKENS, 4)) * (rng.random((TOKENS, 4)) < 0.3)
    result = E.Result(*jsonable([*E.eval_probes(run_of(E, tmp_path, windows, np.column_stack([inside, of_file, noise])))]))
    m = result.metrics
    assert m["probe_docstring"] == 1.0 and m["probe_document"] == 1.0
    for name in ("class", "function", "call"):                          # no latent knows these, nor do tokens
        assert m[f"probe_{name}"] == pytest.approx(0.5, abs=0.06)
        assert m[f"probe_{name}_token"] == pytest.approx(0.5, abs=0.06)
    assert m["probe_token_type_token"] == 1.0 and m["probe_token_type"] == pytest.approx(1 / 3, abs=0.06)
    assert m["probe_domain"] < 0.75         # a latent of one file says nothing of the files in the other fold
    context = [m[f"probe_{name}"] for name in ("docstring", "class", "function", "call", "domain", "document")]
    assert m["probe_context"] == pytest.approx(np.mean(context))
    files = result.per_sequence
    assert files["accuracy_docstring"] == [1.0] * N_FILES and files["accuracy_document"] == [1.0] * 20 + [None] * 4
    each = [files[f"accuracy_{name}"][0] for name in ("docstring", "class", "function", "call", "domain", "document")]
    assert files["accuracy_context"][0] == pytest.approx(np.mean(each))


def test_latents_that_know_nothing_score_chance(E, monkeypatch, tmp_path, windows):
    monkeypatch.setattr(E, "CONTEXT_LENGTH", CONTEXT)
    monkeypatch.setattr(E, "PROBE_EVERY", 1)
    z = np.random.default_rng(2).random((TOKENS, 30))
    m = E.eval_probes(run_of(E, tmp_path, windows, z * (z > 0.8))).metrics
    assert m["probe_context"] == pytest.approx((5 * 0.5 + 1 / 20) / 6, abs=0.04)
    assert m["probe_document"] < 0.12 and m["probe_token_type"] == pytest.approx(1 / 3, abs=0.06)


def test_folds(E, windows):
    """By file, but for the document by window; every token of the documents, every third of the rest."""
    tasks = E.probe_tasks(windows, 3)
    assert list(tasks) == [*LABELS, "domain", "document"]
    docs = windows.doc_ids[N_TRAIN:]
    for name, (places, fold, labels) in tasks.items():
        assert len(places) == len(fold) == len(labels)
        unit = places // SEQ if name == "document" else docs[places // SEQ]
        assert not set(unit[fold]) & set(unit[~fold]), name
        if name != "document":
            assert (np.diff(places) == 3).all()
    places, fold, labels = tasks["document"]
    assert len(places) == 20 * PER_FILE * SEQ and (docs[places // SEQ] - N_TRAIN == labels).all()
    assert all((fold[labels == i]).sum() == 2 * SEQ for i in range(20))


def test_padding_and_unknown_labels_are_no_places(E, windows):
    lengths, labels = windows.lengths.copy(), windows.labels.copy()
    lengths[N_TRAIN] = 8                        # 13 tokens of the first held-out window are padding
    labels[1, :, 2] = -1                        # the second is not Python
    tasks = E.probe_tasks(windows._replace(lengths=lengths, labels=labels), 1)
    assert tasks["class"].places.tolist() == [*range(7), *range(2 * SEQ, TOKENS)]
    places = tasks["document"].places
    assert places.min() == 0 and not set(range(7, SEQ)) & set(places)
    only = windows._replace(labels=None)
    assert list(E.probe_tasks(only, 1)) == ["domain", "document"]


def test_a_label_of_one_class_is_left_out(E, windows):
    windows.labels[..., 1][windows.labels[..., 1] >= 0] = 0
    assert "docstring" not in E.probe_tasks(windows._replace(domains=["a"] * 28), 1)
    assert "domain" not in E.probe_tasks(windows._replace(domains=["a"] * 28), 1)


def test_bags_of_tokens(E, windows):
    bags = E.bags_of_tokens(windows, N_TRAIN + np.array([0, 0, 1]), np.array([1, 3, 6]), 3).toarray()
    first, second = windows.tokens[N_TRAIN], windows.tokens[N_TRAIN + 1]
    for row, tokens in zip(bags, ([first[1], first[0], first[0]], first[1:4], second[4:7])):
        assert row.sum() == 3 and row[np.unique(tokens)].tolist() == np.unique(tokens, return_counts=True)[1].tolist()
