"""Sparse probing on planted latents and against loops, and SAEBench's protocol and file."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from sklearn.linear_model import LogisticRegression

from copies import load_module
from data.tasks import probing_examples, probing_windows
from data.windows import first_token, Windows
from records import run_of
from test_probes import CONTEXT

saebench = load_module("bench/saebench.py")
PLANTED = 3                                     # classes, and latents that know one each


def texts_of(E, n=240, n_train=160, lengths=None, seed=0):
    """Windows of n texts of three classes, a document each, tokens at random."""
    tokens = np.random.default_rng(seed).integers(1, 30, (n, CONTEXT)).astype(np.int32)
    lengths = np.full(n, CONTEXT) if lengths is None else lengths
    names = [str(i) for i in range(n)]
    return Windows(tokens, lengths, np.arange(n), n_train, names, ["abc"[i % PLANTED] for i in range(n)])


def planted_features(n=240, width=40, seed=1):
    rng = np.random.default_rng(seed)
    features = rng.random((n, width)) * (rng.random((n, width)) < 0.5)
    features[:, [7, 11, 30]] = 2.0 * np.eye(PLANTED)[np.arange(n) % PLANTED] + 0.1 * rng.random((n, PLANTED))
    return features


def test_planted_latents_answer_alone_and_others_guess(E):
    windows, features = texts_of(E), planted_features()
    found = E.sparse_accuracies(features, windows, (1, 5, 40))
    assert found.shape == (4,) and found.min() > 0.98
    others = np.delete(features, [7, 11, 30], 1)
    assert E.sparse_accuracies(others, windows, (1, 5, 37)) == pytest.approx(np.full(4, 0.5), abs=0.12)
    half = features.copy()
    half[:, [7, 30]] = 0.0                      # one class is known; the other two are two thirds of each other's rest
    assert 0.6 < E.sparse_accuracies(half, windows, (1,))[0] < 0.95


@pytest.mark.parametrize("form", [np.asarray, csr_array], ids=["dense", "sparse"])
def test_sparse_accuracies_against_a_loop(E, form):
    windows, features = texts_of(E), planted_features()
    features[:, [7, 11, 30]] += 2 * np.random.default_rng(2).random((240, PLANTED))         # not too easy
    labels, rng, wanted = np.arange(240) % PLANTED, np.random.default_rng(42), []
    parts = np.arange(240) < 160, np.arange(240) >= 160
    for c in range(PLANTED):
        (fit, y), (test, truth) = (E.balanced_binary_task(labels, part, c, rng) for part in parts)
        assert fit.max() < 160 <= test.min()
        gap = [abs(np.mean([features[i, j] for i, of in zip(fit, y) if of])
                   - np.mean([features[i, j] for i, of in zip(fit, y) if not of])) for j in range(40)]
        row = []
        for k in (1, 3, 10, None):                                 # None: on all
            best = sorted(range(40), key=lambda j: -gap[j])[:k]
            model = LogisticRegression(max_iter=1000).fit(features[np.ix_(fit, best)], y)
            row.append(np.mean(model.predict(features[np.ix_(test, best)]) == truth))
        wanted.append(row)
    found = E.sparse_accuracies(form(features), windows, (1, 3, 10))
    assert found == pytest.approx(np.mean(wanted, 0)) and 0.6 < found[0] < 1


def test_token_shares(E):
    lengths = np.where(np.arange(240) % 2, 9, CONTEXT)
    windows = texts_of(E, lengths=lengths)
    shares = E.token_shares(windows).toarray()
    for row, tokens, n in zip(shares, windows.tokens, lengths):
        known, counts = np.unique(tokens[1:n], return_counts=True)
        assert row.sum() == pytest.approx(1) and row[known] == pytest.approx(counts / (n - 1))


def test_pooled_leaves_padding_out(E, make_store):
    lengths = np.random.default_rng(0).integers(2, CONTEXT + 1, 70)
    x = torch.randn(70, CONTEXT, 4)
    x[torch.from_numpy(np.arange(CONTEXT) >= lengths[:, None])] = 1e3
    store = make_store(x, 40, lengths=lengths)
    found = E.pooled_features(store, lambda batch: batch.x.square())
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
    examples = probing_examples(classified, *sizes)
    windows, key = probing_windows(classified, tokenizer, sizes, 12, tmp_path / "tokens")
    assert windows.tokens.shape == (76, 12) and windows.n_train == 60
    order = [*np.flatnonzero(examples.train), *np.flatnonzero(~examples.train)]
    for row, n, domain, i in zip(windows.tokens, windows.lengths, windows.domains, order):
        ids = tokenizer(examples.texts[i], add_special_tokens=False)["input_ids"][:11]
        mark = first_token(tokenizer)
        assert n == 1 + len(ids) and row.tolist() == [mark, *ids] + [mark] * (11 - len(ids))
        assert domain == examples.names[examples.labels[i]]
    assert windows.lengths.min() < 12 == windows.lengths.max() and len(set(windows.doc_ids)) == 76
    others = [probing_windows(classified, tokenizer, *other, tmp_path / "tokens")[1]
              for other in (((30, 7), 12), (sizes, 13))]
    assert len({key, *others}) == 3
    monkeypatch.setattr("data.tasks.probing_examples", lambda *of: pytest.fail("the texts are read again"))
    again, same = probing_windows(classified, tokenizer, sizes, 12, tmp_path / "tokens")
    assert same == key and again.n_train == 60
    assert np.array_equal(again.tokens, windows.tokens) and list(again.domains) == list(windows.domains)
    monkeypatch.undo()
    with open(classified, "a") as file:                                 # other texts under the same name
        file.write("\n" + json.dumps({"text": "left and more", "label": "left"}))
    assert probing_windows(classified, tokenizer, sizes, 12, tmp_path / "tokens")[1] != key


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
    run = run_of(E, None, like, "the model", layer=3)
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
    for name, value in dict(PROBING=("known", "unknown"), PROBED_COUNTS=(1, 2, 4), TARGET_L0=3).items():
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
    monkeypatch.setattr(E, "probing_store", lambda run, dataset: stores[dataset])
    made, cached_json = [], E.cached_json  # of each data set, whether its baselines are made
    monkeypatch.setattr(E, "cached_json", lambda path, compute: (
        made.append(not path.exists()) or cached_json(path, compute)))
    run = run_of(E, sae, None)
    result = E.Result(**E.run_evaluation(E.eval_sparse_probing, run))
    assert made == [True, True]
    m, c = result.metrics, result.curves["sparse_probing"]
    names = ("channels", "untrained", "tokens", "sae")
    kinds = ("top_1", "top_2", "top_4", "all")
    assert set(m) == {f"{name}_{kind}" for name in names for kind in kinds} and set(c) == {*names, "k", "data_sets"}
    assert list(c["k"]) == [1, 2, 4] and all(c[name] == [m[f"{name}_{kind}"] for kind in kinds] for name in names)
    assert c["sae"] == pytest.approx(np.mean([found["sae"] for found in c["data_sets"]], 0)) and len(c["data_sets"]) == 2
    assert m["sae_top_1"] == pytest.approx((1 + 0.5) / 2, abs=0.06)
    assert m["tokens_top_1"] == pytest.approx(0.5, abs=0.1)
    assert m["channels_top_1"] < m["sae_top_1"] and json.dumps(result._asdict(), allow_nan=False)
    made.clear()                                                        # they are kept beside the activations,
    assert E.eval_sparse_probing(run).metrics == m and made == [False, False]
    monkeypatch.setattr(E, "PROBING", ("known",))
    for name, value in (("PROBED_COUNTS", (1, 8)), ("TARGET_L0", 2)):       # but not for other settings
        made.clear()
        with monkeypatch.context() as patch:
            patch.setattr(E, name, value)
            kinds = *(f"top_{k}" for k in E.PROBED_COUNTS), "all"
            assert set(E.eval_sparse_probing(run).metrics) == {f"{n}_{kind}" for n in names for kind in kinds}
        assert made == [True], name


def test_a_class_against_the_rest(E):
    labels, train = np.repeat(np.arange(4), 50), np.tile(np.arange(50) < 40, 4)
    seen = []
    for seed in range(2):
        rng, found = np.random.default_rng(seed), []
        for part, n in ((train, 40), (~train, 10)):
            index, y = E.balanced_binary_task(labels, part, 2, rng)
            found.append(index)
            assert part[index].all() and len(set(index)) == len(index) == 2 * n and y.sum() == n
            assert ((labels[index] == 2) == (y == 1)).all()
            counts = np.bincount(labels[index][y == 0], minlength=4)
            assert counts[2] == 0 and sorted(counts)[1] >= n // 3 - 1 and counts.max() <= -(-n // 3)
        seen.append(found[0])
    assert not np.array_equal(*seen)
    fit, y = E.balanced_binary_task(labels % 2, train, 1, np.random.default_rng(0))
    assert len(fit) == 160 and y.sum() == 80


# ---- SAEBench's file ----
METRICS = {f"{side}_{kind}test_accuracy" for side in ("llm", "sae") for kind in ("top_1_", "top_2_", "")}


@pytest.fixture
def content():
    found = {"channels": [0.6, 0.7, 0.9], "sae": [0.7, 0.8, 0.95], "tokens": [0.5, 0.5, 0.6], "untrained": [0.5, 0.6, 0.7]}
    info = {"training": {"means": {}, "config": {"PROBING": ["embedded", "fancyzhx/ag_news"], "PROBING_SIZE": [1000, 250],
                                             "CONTEXT_LENGTH": 128, "MODEL_NAME": "embedded/model"}},
            "sparse_probing": {"means": {}, "curves": [{"sparse_probing": {
                **found, "k": [1, 2], "data_sets": [found, {name: [0.5] * 3 for name in found}]}}]}}
    return saebench.saebench(info, {"architecture": "topk", "d_in": 192})


def test_metrics_are_under_saebench_s_names(content):
    metrics = content["eval_result_metrics"]
    assert set(metrics["llm"]) | set(metrics["sae"]) == METRICS
    assert metrics["llm"] == {"llm_top_1_test_accuracy": 0.6, "llm_top_2_test_accuracy": 0.7, "llm_test_accuracy": 0.9}
    assert metrics["sae"]["sae_top_1_test_accuracy"] == 0.7 and metrics["sae"]["sae_test_accuracy"] == 0.95
    first, second = content["eval_result_details"]
    assert set(first) == METRICS | {"dataset_name"} and first["dataset_name"] == "embedded"
    assert second["dataset_name"] == "fancyzhx/ag_news" and second["sae_top_2_test_accuracy"] == 0.5
    assert content["eval_config"]["dataset_names"] == ["embedded", "fancyzhx/ag_news"]
    assert content["eval_config"]["k_values"] == [1, 2] and content["sae_cfg_dict"]["d_in"] == 192


def test_a_run_without_sparse_probing_is_told_so():
    with pytest.raises(SystemExit, match="EVALS"):
        saebench.saebench({"core": {"means": {}}}, {})


def test_the_package_s_own_loader_takes_it(content):
    """Skipped where sae_bench is not installed (pip install --no-deps sae-bench==0.6.0)."""
    output = pytest.importorskip("sae_bench.evals.sparse_probing.eval_output")
    from pydantic import TypeAdapter
    loaded = TypeAdapter(output.SparseProbingEvalOutput).validate_json(json.dumps(content))
    assert loaded.eval_result_metrics.sae.sae_top_2_test_accuracy == 0.8
    assert loaded.eval_result_details[0].llm_test_accuracy == 0.9


# ---- SAEBench's protocol ----
KS = (1, 2, 5, 10, 20, 50)
# what SAEBench's functions make of `two_classes()`, one entry a k; and with all features
PUBLISHED = [0.69, 0.685, 0.765, 0.815, 0.83, 0.825, 0.835]


def two_classes(n_train=300, n_test=200, d=80):
    """Features [n, d] of two classes of equal size, training rows first, some of them telling; the class of each row."""
    rng = np.random.default_rng(0)
    labels = np.concatenate([np.arange(n_train) % 2, np.arange(n_test) % 2])
    shift = rng.normal(size=d) * (rng.random(d) < 0.3) * 0.5
    features = np.maximum(rng.normal(size=(len(labels), d)) + labels[:, None] * shift, 0).astype(np.float32)
    return features, labels, n_train


def ours(E, features, labels, n_train):
    windows = SimpleNamespace(tokens=labels, n_train=n_train, domain_of=lambda ids: np.array(["a", "b"])[labels[ids]])
    return E.sparse_accuracies(features, windows, KS)


def test_accuracies_are_those_that_saebench_gave(E):
    assert ours(E, *two_classes()) == pytest.approx(PUBLISHED, abs=0.005)


def test_accuracies_agree_with_the_package(E):
    """Skipped where sae_bench, beartype and jaxtyping are not installed."""
    pytest.importorskip("jaxtyping").config.update("jaxtyping_disable", True)      # its annotations contradict each other
    package = pytest.importorskip("sae_bench.evals.sparse_probing.probe_training")
    (features, labels, n_train), found = two_classes(), []
    train, test = ({c: torch.from_numpy(part[of == i]) for i, c in enumerate("ab")}
                   for part, of in ((features[:n_train], labels[:n_train]), (features[n_train:], labels[n_train:])))
    for k in (*KS, None):
        _, accuracies = package.train_probe_on_activations(train, test, select_top_k=k)
        found.append(np.mean(list(accuracies.values())))
    assert ours(E, features, labels, n_train) == pytest.approx(found, abs=0.005)
    assert PUBLISHED == pytest.approx(found, abs=0.005)
