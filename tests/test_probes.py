"""The probes on planted latents: what a latent tells is found, what none tells is chance, and no fold sees the other."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from copies import copy_template, results, run as run_copy
from scipy.sparse import csc_array, csr_array
from sklearn.linear_model import LogisticRegression

CONTEXT, N_TRAIN, N_FILES, PER_FILE = 21, 4, 24, 4
SEQ = CONTEXT - 1
TOKENS = N_FILES * PER_FILE * SEQ


@pytest.fixture
def windows(E):
    """24 held-out files of four windows; tokens at random, labels by hand: token type 0-2 by token, the rest in runs of 5."""
    rng, n = np.random.default_rng(0), N_TRAIN + N_FILES * PER_FILE
    tokens = rng.integers(1, 40, (n, CONTEXT)).astype(np.int32)
    doc_ids = np.concatenate([np.arange(N_TRAIN), N_TRAIN + np.arange(N_FILES * PER_FILE) // PER_FILE])
    labels = np.full((n - N_TRAIN, CONTEXT, len(E.corpus.LABELS)), -1, np.int8)
    labels[:, 1:, 0] = tokens[N_TRAIN:, 1:] % 3
    labels[:, 1:, 1:] = rng.integers(0, 2, (n - N_TRAIN, SEQ // 5, len(E.corpus.LABELS) - 1)).repeat(5, 1)
    names, domains = [f"file {i}" for i in range(N_TRAIN + N_FILES)], ["ab"[i // 2 % 2] for i in range(N_TRAIN + N_FILES)]
    return E.corpus.Windows(tokens, np.full(n, CONTEXT), doc_ids, N_TRAIN, names, domains, labels)


def run_of(E, tmp_path, windows, z):
    run = E.Run(SimpleNamespace(d_sae=z.shape[1]), SimpleNamespace(windows=windows, folder=tmp_path), None, 0, (1, 1), {})
    run.heldout = csc_array(z), {}, 0.0
    return run


def test_a_planted_latent_is_found(E, monkeypatch, tmp_path, windows):
    monkeypatch.setattr(E, "CONTEXT_LENGTH", CONTEXT)
    monkeypatch.setattr(E, "PROBE_EVERY", 1)
    rng, flat = np.random.default_rng(1), windows.labels[:, 1:].reshape(TOKENS, -1)
    inside = 3.0 * (flat[:, 1] == 1)                                    # docstring
    of_file = np.eye(N_FILES)[np.arange(TOKENS) // (PER_FILE * SEQ)]    # one latent a document
    noise = rng.random((TOKENS, 4)) * (rng.random((TOKENS, 4)) < 0.3)
    result = E.Result(*E.corpus.plain([*E.eval_probes(run_of(E, tmp_path, windows, np.column_stack([inside, of_file, noise])))]))
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
    assert files["probe_docstring"] == [1.0] * N_FILES and files["probe_document"] == [1.0] * 20 + [None] * 4
    each = [files[f"probe_{name}"][0] for name in ("docstring", "class", "function", "call", "domain", "document")]
    assert files["probe_context"][0] == pytest.approx(np.mean(each))


def test_latents_that_know_nothing_score_chance(E, monkeypatch, tmp_path, windows):
    monkeypatch.setattr(E, "CONTEXT_LENGTH", CONTEXT)
    monkeypatch.setattr(E, "PROBE_EVERY", 1)
    z = np.random.default_rng(2).random((TOKENS, 30))
    m = E.eval_probes(run_of(E, tmp_path, windows, z * (z > 0.8))).metrics
    assert m["probe_context"] == pytest.approx((5 * 0.5 + 1 / 20) / 6, abs=0.04)
    assert m["probe_document"] < 0.12 and m["probe_token_type"] == pytest.approx(1 / 3, abs=0.06)


def test_folds(E, windows):
    """By file, but for the document by window; every token of the documents, every third of the rest."""
    tasks = E.corpus.probe_tasks(windows, 3)
    assert list(tasks) == [*E.corpus.LABELS, "domain", "document"]
    docs = windows.doc_ids[N_TRAIN:]
    for name, (places, fold, of) in tasks.items():
        assert len(places) == len(fold) == len(of)
        unit = places // SEQ if name == "document" else docs[places // SEQ]
        assert not set(unit[fold]) & set(unit[~fold]), name
        if name != "document":
            assert (np.diff(places) == 3).all()
    places, fold, of = tasks["document"]
    assert len(places) == 20 * PER_FILE * SEQ and (docs[places // SEQ] - N_TRAIN == of).all()
    assert all((fold[of == i]).sum() == 2 * SEQ for i in range(20))


def test_padding_and_unknown_labels_are_no_places(E, windows):
    lengths, labels = windows.lengths.copy(), windows.labels.copy()
    lengths[N_TRAIN] = 8                        # 13 tokens of the first held-out window are padding
    labels[1, :, 2] = -1                        # the second is not Python
    tasks = E.corpus.probe_tasks(windows._replace(lengths=lengths, labels=labels), 1)
    assert tasks["class"][0].tolist() == [*range(7), *range(2 * SEQ, TOKENS)]
    assert tasks["document"][0].min() == 0 and not set(range(7, SEQ)) & set(tasks["document"][0])
    only = windows._replace(labels=None)
    assert list(E.corpus.probe_tasks(only, 1)) == ["domain", "document"]


def test_a_label_of_one_class_is_left_out(E, windows):
    windows.labels[..., 1][windows.labels[..., 1] >= 0] = 0
    assert "docstring" not in E.corpus.probe_tasks(windows._replace(domains=["a"] * 28), 1)
    assert "domain" not in E.corpus.probe_tasks(windows._replace(domains=["a"] * 28), 1)


def test_bags_of_tokens(E, windows):
    bags = E.corpus.bags_of_tokens(windows, N_TRAIN + np.array([0, 0, 1]), np.array([1, 3, 6]), 3).toarray()
    first, second = windows.tokens[N_TRAIN], windows.tokens[N_TRAIN + 1]
    for row, tokens in zip(bags, ([first[1], first[0], first[0]], first[1:4], second[4:7])):
        assert row.sum() == 3 and row[np.unique(tokens)].tolist() == np.unique(tokens, return_counts=True)[1].tolist()


# ---- Sparse probing ----
PLANTED = 3                                     # classes, and latents that know one each


def texts_of(E, n=240, n_train=160, lengths=None, seed=0):
    """Windows of n texts of three classes, a document each, tokens at random."""
    tokens = np.random.default_rng(seed).integers(1, 30, (n, CONTEXT)).astype(np.int32)
    lengths = np.full(n, CONTEXT) if lengths is None else lengths
    names = [str(i) for i in range(n)]
    return E.corpus.Windows(tokens, lengths, np.arange(n), n_train, names, ["abc"[i % PLANTED] for i in range(n)])


def planted_features(n=240, width=40, seed=1):
    rng = np.random.default_rng(seed)
    features = rng.random((n, width)) * (rng.random((n, width)) < 0.5)
    features[:, [7, 11, 30]] = 2.0 * np.eye(PLANTED)[np.arange(n) % PLANTED] + 0.1 * rng.random((n, PLANTED))
    return features


def test_planted_latents_answer_alone_and_others_guess(E):
    windows, features = texts_of(E), planted_features()
    found = E.corpus.sparse_accuracies(features, windows, (1, 5, 40))
    assert found.shape == (4,) and found.min() > 0.98
    others = np.delete(features, [7, 11, 30], 1)
    assert E.corpus.sparse_accuracies(others, windows, (1, 5, 37)) == pytest.approx(np.full(4, 0.5), abs=0.12)
    half = features.copy()
    half[:, [7, 30]] = 0.0                      # one class is known; the other two are two thirds of each other's rest
    assert 0.6 < E.corpus.sparse_accuracies(half, windows, (1,))[0] < 0.95


@pytest.mark.parametrize("form", [np.asarray, csr_array], ids=["dense", "sparse"])
def test_sparse_accuracies_against_a_loop(E, form):
    windows, features = texts_of(E), planted_features()
    features[:, [7, 11, 30]] += 2 * np.random.default_rng(2).random((240, PLANTED))         # not too easy
    labels, rng, wanted = np.arange(240) % PLANTED, np.random.default_rng(42), []
    for c in range(PLANTED):
        fit, y, test, truth = E.corpus.binary_task(labels, np.arange(240) < 160, c, rng)
        assert fit.max() < 160 <= test.min()
        gap = [abs(np.mean([features[i, j] for i, of in zip(fit, y) if of])
                   - np.mean([features[i, j] for i, of in zip(fit, y) if not of])) for j in range(40)]
        row = []
        for k in (1, 3, 10, None):                                 # None: on all
            best = sorted(range(40), key=lambda j: -gap[j])[:k]
            model = LogisticRegression(max_iter=1000).fit(features[np.ix_(fit, best)], y)
            row.append(np.mean(model.predict(features[np.ix_(test, best)]) == truth))
        wanted.append(row)
    found = E.corpus.sparse_accuracies(form(features), windows, (1, 3, 10))
    assert found == pytest.approx(np.mean(wanted, 0)) and 0.6 < found[0] < 1


def test_token_shares(E):
    lengths = np.where(np.arange(240) % 2, 9, CONTEXT)
    windows = texts_of(E, lengths=lengths)
    shares = E.corpus.token_shares(windows).toarray()
    for row, tokens, n in zip(shares, windows.tokens, lengths):
        known, counts = np.unique(tokens[1:n], return_counts=True)
        assert row.sum() == pytest.approx(1) and row[known] == pytest.approx(counts / (n - 1))


def test_pooled_leaves_padding_out(E, make_store):
    lengths = np.random.default_rng(0).integers(2, CONTEXT + 1, 70)
    x = torch.randn(70, CONTEXT, 4)
    x[torch.from_numpy(np.arange(CONTEXT) >= lengths[:, None])] = 1e3
    store = make_store(x, 40, lengths=lengths)
    found = E.corpus.pooled(store, lambda batch: batch.x.square())
    scaled = (x - store.mean) / store.scale
    wanted = np.array([scaled[i, 1:n].square().mean(0).tolist() for i, n in enumerate(lengths)])
    assert found == pytest.approx(wanted, rel=1e-4)


@pytest.fixture
def classified(tmp_path):
    """A data set of 40 texts of each of two classes, the shortest of one word, and the tokenizer."""
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"{kind} " * (1 + i), "label": kind})
                              for i in range(40) for kind in ("left", "right")))
    return str(path)


def test_texts_to_classify_as_windows(E, classified, tmp_path, monkeypatch):
    """Cut to the context, those to train on first; cached, by all that makes them."""
    tokenizer, sizes = E.load_tokenizer(), (30, 8)
    examples = E.corpus.probing_examples(classified, *sizes)
    windows, key = E.corpus.probing_windows(classified, tokenizer, sizes, 12, tmp_path / "tokens")
    assert windows.tokens.shape == (76, 12) and windows.n_train == 60
    order = [*np.flatnonzero(examples.train), *np.flatnonzero(~examples.train)]
    for row, n, domain, i in zip(windows.tokens, windows.lengths, windows.domains, order):
        ids = tokenizer(examples.texts[i], add_special_tokens=False)["input_ids"][:11]
        mark = E.corpus.beginning(tokenizer)
        assert n == 1 + len(ids) and row.tolist() == [mark, *ids] + [mark] * (11 - len(ids))
        assert domain == examples.names[examples.labels[i]]
    assert windows.lengths.min() < 12 == windows.lengths.max() and len(set(windows.doc_ids)) == 76
    others = [E.corpus.probing_windows(classified, tokenizer, *other, tmp_path / "tokens")[1]
              for other in (((30, 7), 12), (sizes, 13))]
    assert len({key, *others}) == 3
    monkeypatch.setattr(E.corpus, "probing_examples", lambda *of: pytest.fail("the texts are read again"))
    again, same = E.corpus.probing_windows(classified, tokenizer, sizes, 12, tmp_path / "tokens")
    assert same == key and again.n_train == 60
    assert np.array_equal(again.tokens, windows.tokens) and list(again.domains) == list(windows.domains)
    monkeypatch.undo()
    with open(classified, "a") as file:                                 # other texts under the same name
        file.write("\n" + json.dumps({"text": "left and more", "label": "left"}))
    assert E.corpus.probing_windows(classified, tokenizer, sizes, 12, tmp_path / "tokens")[1] != key


def test_probing_activations_are_scaled_as_those_of_training(E, make_store, classified, tmp_path, monkeypatch):
    for name, value in dict(PROBING_SIZE=(20, 6), SHARD_WINDOWS=16, load_tokenizer=E.load_tokenizer,
                            cache_folder=lambda: tmp_path / "cache").items():
        monkeypatch.setattr(E, name, value)
    like = make_store(5 + 3 * torch.randn(20, CONTEXT, 8), 12)
    table, asked = torch.randn(5000, 8), []

    def residual_after(model, layer, tokens):
        asked.append((model, layer))
        return table[tokens % 5000]

    monkeypatch.setattr(E, "residual_after", residual_after)
    run = E.Run(None, like, lambda: "the model", 3, (1, 1), {})
    store = E.probing_store(run, classified)
    assert set(asked) == {("the model", 3)} and store.folder.parent == like.folder.parent != store.folder
    assert torch.equal(store.mean, like.mean) and store.scale == like.scale
    wanted = (table[store.tokens(slice(None))[:, 1:] % 5000] - like.mean) / like.scale
    assert torch.allclose(store.batch(np.arange(52)).x, wanted, atol=1e-6)
    asked.clear()
    E.probing_store(run, classified)
    assert not asked                                                    # from the cache


def test_sparse_probing_as_a_whole(E, make_store, monkeypatch):
    """Latents that know a class each, behind channels that mix them; two data sets, the second without a class to find."""
    for name, value in dict(PROBING=("known", "unknown"), PROBED=(1, 2, 4), TARGET_L0=3).items():
        monkeypatch.setattr(E, name, value)
    torch.manual_seed(0)
    sae, stores = E.TopK(8, 12, 3).eval().requires_grad_(False), {}
    sae.b_enc.fill_(-0.2)
    for name in E.PROBING:
        like, known = texts_of(E), torch.from_numpy(np.random.default_rng(3).permutation(240) % PLANTED)
        known = torch.arange(240) % PLANTED if name == "known" else known
        x = sae.W_dec[known][:, None] + 0.05 * torch.randn(240, CONTEXT, 8)
        stores[name] = make_store(x, 160, like.tokens, name=name)
        stores[name].mean, stores[name].scale = torch.zeros(8), 1.0
        stores[name].windows = like
    run = E.Run(sae, None, None, 0, (1, 1), {}, lambda run, dataset: stores[dataset])
    result = E.Result(**E.corpus.evaluated(E.eval_sparse_probing, run))
    m, c = result.metrics, result.curves["sparse_probing"]
    names = ("channels", "untrained", "tokens", "sae")
    kinds = ("top_1", "top_2", "top_4", "all")
    assert set(m) == {f"{name}_{kind}" for name in names for kind in kinds} and set(c) == {*names, "k", "data_sets"}
    assert list(c["k"]) == [1, 2, 4] and all(c[name] == [m[f"{name}_{kind}"] for kind in kinds] for name in names)
    assert c["sae"] == pytest.approx(np.mean([found["sae"] for found in c["data_sets"]], 0)) and len(c["data_sets"]) == 2
    assert m["sae_top_1"] == pytest.approx((1 + 0.5) / 2, abs=0.06)
    assert m["tokens_top_1"] == pytest.approx(0.5, abs=0.1)
    assert m["channels_top_1"] < m["sae_top_1"] and json.dumps(result._asdict(), allow_nan=False)
    baselines = E.corpus.probing_baselines
    with monkeypatch.context() as patch:                                # they are kept beside the activations,
        patch.setattr(E.corpus, "probing_baselines", lambda *of: pytest.fail("computed again"))
        assert E.eval_sparse_probing(run).metrics == m
    for name, value in (("PROBED", (1, 2, 8)), ("TARGET_L0", 2)):       # but not for other settings
        asked = []
        with monkeypatch.context() as patch:
            patch.setattr(E, name, value)
            patch.setattr(E.corpus, "probing_baselines", lambda *of: asked.append(of) or baselines(*of))
            kinds = *(f"top_{k}" for k in E.PROBED), "all"
            assert set(E.eval_sparse_probing(run).metrics) == {f"{n}_{kind}" for n in names for kind in kinds}
        assert len(asked) == 2, name


def test_a_run_with_sparse_probing(tmp_path):
    """The five domains of the embedded corpus, from the command to the file of results, under the preflight too."""
    folder = copy_template(tmp_path / "run", SAE_VARIANT="topk", EVALS=("sparse_probing",), PROBING_SIZE=(60, 20))
    finished = run_copy(folder, tmp_path / "cache")
    assert finished.code == 0 and finished.stderr == "", finished.stderr
    entry = results(folder)["sparse_probing"]
    m = entry["metrics"]
    assert entry["means"]["sae_top_1_mean"] == m["sae_top_1"]
    for name in ("sae", "channels", "untrained"):                       # small as it is, it beats guessing
        assert 0.55 < m[f"{name}_top_50"] <= 1 and m[f"{name}_top_50"] > m[f"{name}_top_1"]
    assert entry["curves"][0]["sparse_probing"]["k"] == [1, 2, 5, 10, 20, 50]
    assert "training" in entry["curves"][0] and entry["config"]["PROBING"] == ["embedded"]
