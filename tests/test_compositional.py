"""The compositional SAE against a naive form of its equation; known truths, interactions and reuse found again."""
import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from copies import copy_template, results, run, write_text_data
from sklearn.metrics import roc_auc_score

D_IN, D_SAE, K = 12, 48, 6


@pytest.fixture
def corpus(E):
    return E.corpus


def make(E, ablate=(), monkeypatch=None, gate=0.7, seed=0):
    if monkeypatch:
        monkeypatch.setattr(E, "ABLATE", ablate)
    torch.manual_seed(seed)
    sae = E.SAE_VARIANTS["compositional"](D_IN, D_SAE, K)
    with torch.no_grad():
        sae.b_enc.normal_(0, 0.1)
        sae.b_dec.normal_(0, 0.1)
        sae.W_c *= 10                                        # as large as features
        if hasattr(sae, "gate"):
            sae.gate.fill_(gate)
    return sae.eval()


def make_batch(E, batch=4, seq=5, seed=1, mask=None):
    x = torch.randn(batch, seq, D_IN, generator=torch.Generator().manual_seed(seed))
    return E.Batch(x, torch.zeros(batch, seq, dtype=torch.long), torch.arange(batch), torch.arange(1, seq + 1), mask)


def naive(E, sae, x):
    """z of one token x [d_in], with loops over its features: the equation of the docstring."""
    pre, heads = (x - sae.b_dec) @ sae.W_enc + sae.b_enc[:sae.d_f], E.COMPOSITION_HEADS
    f = torch.zeros_like(pre)
    top = pre.topk(K).indices
    f[top] = F.relu(pre[top])
    active = [i for i in range(sae.d_f) if f[i] > 0]
    u = {i: f[i] * sae.E[i] for i in active}
    total = sum(u.values())
    queries, keys, values = ({i: u[i] @ W for i in active} for W in (sae.W_q, sae.W_k, sae.W_v))
    for i in active:
        parts = []
        for h in range(heads):
            part = slice(h * sae.W_q.shape[1] // heads, (h + 1) * sae.W_q.shape[1] // heads)
            q = queries[i][part]
            scores = torch.stack([q @ keys[j][part] for j in active]) / math.sqrt(len(q))
            parts.append(sum(w * values[j][part] for w, j in zip(scores.softmax(0), active)))
        total = total + sae.gate.tanh() * torch.cat(parts) @ sae.W_o
    c = F.relu(total @ sae.W_c + sae.b_enc[sae.d_f:])
    if "slots" in E.ABLATE:
        kept = torch.cat([f, c]).topk(K).indices.tolist()
    else:                                                    # the largest compositions, then features
        first = [sae.d_f + int(i) for i in c.topk(max(1, round(K * E.COMPOSITION_SLOTS))).indices if c[i] > 0]
        kept = first + f.topk(K - len(first)).indices.tolist()
    z = torch.zeros(D_SAE)
    z[kept] = torch.cat([f, c])[kept]
    return z


@torch.no_grad()
@pytest.mark.parametrize("ablate", [(), ("slots",)])
def test_latents_equal_the_naive_form(E, monkeypatch, ablate):
    sae, batch = make(E, ablate, monkeypatch), make_batch(E)
    z = sae.encode(batch).dense()
    for row in range(2):
        for t in range(2):
            torch.testing.assert_close(z[row, t], naive(E, sae, batch.x[row, t]), atol=1e-5, rtol=1e-4)
    assert (z[..., sae.d_f:] > 0).any() and (z[..., :sae.d_f] > 0).any()


@torch.no_grad()
@pytest.mark.parametrize("ablate", [(), ("attention",)])
def test_what_the_page_shows_beside_a_latent(E, monkeypatch, ablate):
    """Of a feature the compositions that read it, of a composition its features, both by E W_c; attention from a feature,
    or from all features of a token, where the latent fires; against loops."""
    sae, batch = make(E, ablate, monkeypatch), make_batch(E)
    z, reads = sae.encode(batch).dense(), sae.E @ sae.W_c
    alive = (z > 0).any(1).any(0).nonzero().flatten()
    latents = torch.cat([alive[alive < sae.d_f][:3], alive[alive >= sae.d_f][:2], torch.tensor([D_SAE - 1])])
    found = sae.related(latents.numpy(), batch, (z[..., latents] > 0).float())
    assert (latents >= sae.d_f).sum() == 3 and (latents < sae.d_f).sum() == 3
    (ids, f), fires = sae.features(batch), z.flatten(0, 1) > 0
    for latent, rows in zip(latents.tolist(), found):
        first, weights = (sae.d_f, reads[latent]) if latent < sae.d_f else (0, reads[:, latent - sae.d_f])
        shown = rows.pop("compositions that read it" if first else "features that it reads")
        wanted = sorted(((w, first + i) for i, w in enumerate(weights.tolist()) if w > 0), reverse=True)[:12]
        assert [name for name, _ in shown] == [name for _, name in wanted]
        assert [w for _, w in shown] == pytest.approx([w for w, _ in wanted])
        if ablate:
            assert not rows
            continue
        total = torch.zeros(sae.d_f)
        for token in fires[:, latent].nonzero().flatten().tolist():
            weights = sae.attention(ids[token, None], f[token, None])[0]
            for place in range(K):
                if f[token, place] > 0 and (latent >= sae.d_f or ids[token, place] == latent):
                    for head in weights[:, place]:
                        total.index_add_(0, ids[token], head)
        assert dict(rows.pop("attention where it fires")) == pytest.approx(
            {i: total[i].item() / total.sum().item() for i in total.argsort(descending=True)[:12].tolist() if total[i] > 0}, rel=1e-4)
        assert not rows


@torch.no_grad()
def test_attention_never_crosses_tokens_or_rows(E):
    sae, batch = make(E), make_batch(E)
    z, order = sae.encode(batch).dense(), torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(sae.encode(batch._replace(x=batch.x[order])).dense(), z[order])
    back = batch._replace(x=batch.x.flip(1))
    torch.testing.assert_close(sae.encode(back).dense(), z.flip(1))
    x = batch.x.clone()
    x[1, 2] += 1
    changed = (sae.encode(batch._replace(x=x)).dense() - z).abs().amax(-1) > 1e-5
    assert changed[1, 2] and changed.sum() == 1


@torch.no_grad()
def test_gate_at_zero_is_the_form_without_attention(E, monkeypatch):
    batch, sae = make_batch(E), make(E, gate=0.0)
    ids, f = sae.features(batch)
    plain = F.relu(torch.einsum("nk,nkw->nw", f, sae.E[ids]) @ sae.W_c + sae.b_enc[sae.d_f:])
    torch.testing.assert_close(sae.compose(ids, f), plain)
    with_gate = copy.deepcopy(sae)
    with_gate.gate.fill_(1.0)
    assert not torch.allclose(with_gate.compose(ids, f), plain, atol=1e-3)


@torch.no_grad()
def test_each_component_can_be_switched_off(E, monkeypatch):
    batch = make_batch(E)
    whole = make(E)
    ids, f = whole.features(batch)
    z = whole.encode(batch)
    bare = make(E, ("attention",), monkeypatch)
    assert not {"W_q", "W_k", "W_v", "W_o", "gate"} & {name for name, _ in bare.named_parameters()}
    assert bare.parameters_of_interest() == {}
    ungated = make(E, ("gate",), monkeypatch)
    assert not hasattr(ungated, "gate")
    ungated.load_state_dict({k: v for k, v in whole.state_dict().items() if k != "gate"})
    whole.gate.fill_(20.0)                                   # tanh = 1
    c = ungated.compose(ids, f)
    monkeypatch.setattr(E, "ABLATE", ())
    torch.testing.assert_close(c, whole.compose(ids, f))
    dense = make(E, ("bottleneck",), monkeypatch)
    assert len(dense.encode(batch).active()[0]) > len(z.active()[0])
    everything = dense.encode(batch).dense()[..., dense.d_f:].flatten(0, 1)
    torch.testing.assert_close(everything, dense.compose(*dense.features(batch)))


def test_k_anneals_and_combinations_grow(E):
    sae, batch, (first, second) = make(E), make_batch(E), E.Compositional.curriculum
    seen = []
    for stage, done in ((first, 0.0), (first, 0.4), (first, 0.7), (first, 0.999), (second, 0.0)):
        E.anneal(sae, stage, done)
        z = sae.encode(batch)
        seen.append((sae.width(), len(z.values) // 20, sae.combined))
    assert [row[0] for row in seen] == [16, 14, 9, 6, 6] and [row[2] for row in seen] == [2, 3, 4, 4, None]
    assert all(kept == width for width, kept, _ in seen)
    E.anneal(sae, first, 0.999)                              # k is as later: what differs is who attends
    ids, f = sae.features(batch)
    few = sae.compose(ids, f)
    sae.combined = None
    assert not torch.allclose(few, sae.compose(ids, f), atol=1e-4)


@torch.no_grad()
def test_padding_is_silent(E):
    mask = torch.arange(5) < torch.tensor([5, 2, 4, 1])[:, None]
    sae = make(E)
    sae.b_enc.fill_(1.0)
    z = sae.encode(make_batch(E, mask=mask)).dense()
    assert not z[~mask].any() and z[mask].any(-1).all()


# ---- Known truth ----
@pytest.fixture(scope="module")
def truth(E):
    return E.corpus.synthetic("boolean", 1.0, 33, 2 ** 13)


def codes(truth, values):
    return [values[part] for part in truth.parts()[1:]]


@pytest.mark.parametrize("task", ["arithmetic", "boolean", "grammar"])
def test_the_wiring_has_the_fixed_difficulty(corpus, task):
    wired = corpus.wiring(task)
    assert len({frozenset(pair) for pair in wired.pairs.tolist()}) == 256 and (wired.pairs[:, 0] != wired.pairs[:, 1]).all()
    assert (np.bincount(wired.made) == 2).all() and len(np.bincount(wired.made)) == 128
    assert set(wired.pairs.ravel()) == set(range(64)) and (~wired.seen).sum() == 51        # 20 %
    assert set(wired.made[~wired.seen]) <= set(wired.made[wired.seen])
    assert not wired.apart[tuple(wired.pairs.T)].any()


def test_the_tasks_say_what_they_compute(corpus):
    wired = corpus.wiring("arithmetic")
    for (i, j), made, text in zip(wired.pairs, wired.made, wired.joint):
        a, b, total = map(int, text.replace("+", "=").split("="))
        assert (a + b) % 128 == total == made and wired.words[i] == str(a) and wired.words[j] == str(b)
    wired, values = corpus.wiring("boolean"), {}
    for (i, j), made in zip(wired.pairs, wired.made):
        values.setdefault(made // 2, {})[i % 2, j % 2] = made % 2
    assert len(values) == 64 and all(table == {(0, 0): 0, (0, 1): 1, (1, 0): 1, (1, 1): 0} for table in values.values())
    wired = corpus.wiring("grammar")
    assert all(wired.words[i].endswith("s") != wired.words[j].endswith("s") for i, j in wired.pairs)     # they agree


def test_activations_are_what_made_them(truth):
    a, wired = truth.amounts.astype(float), truth.wired
    x, composed = a @ truth.directions[:64], truth.composed()
    for token in range(50):
        for (i, j), made in zip(wired.pairs, wired.made):
            x[token] += math.sqrt(a[token, i] * a[token, j]) * truth.directions[64 + made]
    rest = truth.flat_x()[:50] - x[:50]
    assert abs(rest.std() - 0.1) < 0.01 and composed[:50].any()
    train, *held = truth.parts()
    together = (a[:, wired.pairs[:, 0]] > 0) & (a[:, wired.pairs[:, 1]] > 0)
    assert not together[train][:, ~wired.seen].any()
    assert all(together[part][:, ~wired.seen].any(0).all() for part in held)
    assert set((a > 0).sum(1)) == {2, 3, 4} and not ((a > 0).astype(float) @ wired.apart * (a > 0)).any()
    assert (truth.x[:, 0] == 0).all() and truth.windows.n_train * 32 == train.stop


def test_a_perfect_dictionary_scores_1_and_a_random_one_its_null(corpus, truth):
    scores = corpus.recovery(truth, *codes(truth, np.concatenate([truth.amounts, truth.composed()], 1)), truth.directions)
    assert all(value == pytest.approx(1, abs=1e-6) for value in scores.values())
    found = corpus.recovery_baselines(truth, 8, 384)
    assert 0.25 < found["random"]["cosine_primitives"] < 0.33 and 0.25 < found["random"]["cosine_compositions"] < 0.33
    for name in ("pca", "nmf", "random"):
        assert found[name]["auroc_seen"] < 0.85 and found[name]["cosine_compositions"] < 0.4


def test_without_compositions_nobody_finds_them(corpus):
    truth = corpus.synthetic("boolean", 0.0, 33, 2 ** 13)
    rng = np.random.default_rng(5)
    random = rng.standard_normal((320, 96))
    dictionary = np.concatenate([truth.directions[:64], random])
    values = np.concatenate([truth.amounts, np.maximum(truth.flat_x() @ random.T / 10 - 1, 0)], 1)
    scores = corpus.recovery(truth, *codes(truth, values), dictionary)
    assert scores["cosine_primitives"] == pytest.approx(1) and scores["cosine_compositions"] < 0.33
    assert scores["auroc_seen"] < 0.83 and scores["auroc_unseen"] < 0.83
    assert scores["minimum_seen"] > 0.99                     # both primitives are known exactly


def test_one_primitive_is_three_quarters(corpus, truth):
    scores = corpus.recovery(truth, *codes(truth, truth.amounts), truth.directions[:64])
    assert scores["cosine_primitives"] == pytest.approx(1) and scores["cosine_compositions"] == 0
    assert 0.74 < scores["auroc_seen"] < 0.80 and scores["minimum_unseen"] == pytest.approx(1)


def test_too_few_tokens_are_an_error(corpus):
    truth = corpus.synthetic("boolean", 1.0, 9, 64)
    with pytest.raises(corpus.DataError, match="too few"):
        corpus.recovery(truth, *codes(truth, truth.amounts), truth.directions[:64])


def test_auroc_by_hand(corpus):
    values = np.array([[0, 1], [2, 1], [3, 0], [1, 0], [0, 5]], float)
    positive = np.array([False, True, True, False, False])
    assert corpus.aurocs(values, positive).tolist() == [1.0, pytest.approx(2 / 6)]
    assert roc_auc_score(positive, values[:, 1]) == pytest.approx(2 / 6)        # as the library has it


def test_texts_name_what_they_hold(E, corpus):
    tokenizer = E.load_tokenizer()
    for task in corpus.TASKS:
        found, wired = corpus.task_text(task, tokenizer, 64, 6), corpus.wiring(task)
        assert (found.primitives >= 0).sum() > 30 and (found.pairs >= 0).any()
        for row, at in zip(*np.nonzero(found.primitives >= 0)):
            text = tokenizer.decode(found.windows.tokens[row, 1:at + 1]).rstrip()
            assert text.endswith(wired.words[found.primitives[row, at]]), text
            if found.pairs[row, at] >= 0:
                i, j = wired.pairs[found.pairs[row, at]]
                last = found.primitives[row, at]
                assert last in (i, j) and wired.words[i + j - last] in text[-60:]


# ---- Interactions and reuse ----
def test_planted_interactions_are_found(corpus):
    """c = 2 f0 f1 + f2: dropping f0 and f1 interacts, by 2 f0 f1; f2 acts alone."""
    def compose(f):
        return np.stack([2 * f[:, 0] * f[:, 1] + f[:, 2], f[:, 3]], 1)

    f = np.random.default_rng(0).uniform(1, 2, (200, 4))
    (token, slot, of, effect), pairs = corpus.dropped(compose, f, np.ones((200, 2), bool), np.random.default_rng(1))
    assert len(token) == 200 * 4 * 2
    np.testing.assert_allclose(effect[(slot == 2) & (of == 0)], f[:, 2])
    np.testing.assert_allclose(effect[(slot == 0) & (of == 0)], 2 * f[:, 0] * f[:, 1])
    row, a, b, composition, joint = pairs
    planted = (np.minimum(a, b) == 0) & (np.maximum(a, b) == 1)
    assert planted.any() and (composition[planted] == 0).all()
    np.testing.assert_allclose(joint[planted], 2 * f[row[planted], 0] * f[row[planted], 1])
    np.testing.assert_allclose(joint[~planted], 0, atol=1e-9)


def test_attention_is_evidence_only_where_it_predicts(corpus):
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 40, (2, 20_000))
    keep = first != second
    first, second = first[keep], second[keep]
    strength = rng.random((40, 40))
    effect = (strength + strength.T)[first, second]
    good = corpus.interaction_scores(first, second, effect + 0.1 * rng.random(len(effect)), effect)
    assert good["attention_spearman"] > 0.95 and good["attention_auroc"] > 0.95 and good["feature_pairs"] == 780
    bad = corpus.interaction_scores(first, second, rng.random(len(effect)), effect)
    assert abs(bad["attention_spearman"]) < 0.15 and 0.35 < bad["attention_auroc"] < 0.65
    assert corpus.interaction_scores(first, second, effect, np.zeros(len(effect))) == {"feature_pairs": 780}   # no effect


def test_planted_reuse(corpus):
    """20 features, 10 compositions; feature 0 acts on all, 1-9 on one each, the others on none."""
    rng = np.random.default_rng(0)
    token, composition, feature = (a.ravel() for a in np.meshgrid(np.arange(60), np.arange(10), np.arange(20), indexing="ij"))
    acts = (feature == 0) | (feature == composition) & (feature > 0)
    effect = acts + 0.01 * rng.standard_normal(len(acts))
    metrics, took, random = corpus.reuse(token * 10 + composition, feature, composition, effect, rng)
    assert took[0] == 10 and (took[1:10] >= 1).all() and took[1:10].sum() <= 18 and took[10:].sum() <= 12
    assert metrics["reuse_gini"] > metrics["reuse_gini_null_95"] and random.sum(1).tolist() == [took.sum()] * len(random)
    none, _, _ = corpus.reuse(token * 10 + composition, feature, composition, np.zeros(len(acts)), rng)
    assert none == {"reuse_edges": 0.0}


def test_gini_by_hand(corpus):
    assert corpus.gini(np.array([3, 3, 3])) == pytest.approx(0)
    assert corpus.gini(np.array([0, 0, 0, 1])) == pytest.approx(0.75)
    assert corpus.gini(np.array([1, 3])) == pytest.approx(0.25)


# ---- Whole runs ----
def test_only_what_composes_is_evaluated_so(E, monkeypatch):
    monkeypatch.setattr(E, "EVALS", ("composition",))
    with pytest.raises(E.RunnerError, match="EVALS"):
        E.corpus.check_config(vars(E), E.SAE_VARIANTS, E.EVALUATIONS)
    monkeypatch.setattr(E, "SAE_VARIANT", "compositional")
    E.corpus.check_config(vars(E), E.SAE_VARIANTS, E.EVALUATIONS)


def test_a_whole_run(tmp_path):
    data = str(write_text_data(tmp_path / "library.jsonl"))
    folder = copy_template(tmp_path / "copy", SAE_VARIANT="compositional", DATASET=data, EXPANSION=4, TARGET_L0=12, ABLATE=("bottleneck",),
                           EVALS=("core", "recovery", "composition"),
                           SYNTHETIC_TASKS=("grammar",), SYNTHETIC_RHOS=(1.0,), SYNTHETIC_TOKENS=16_384)
    finished = run(folder, tmp_path / "cache")
    assert finished.code == 0 and finished.stderr == "", finished.stderr
    info = results(folder)
    (row,), metrics = info["recovery"]["curves"][0]["recovery"], info["recovery"]["metrics"]
    assert row["task"] == "grammar" and set(row) == {"task", "rho", "sae", "pca", "nmf", "random"}
    assert row["random"]["cosine_primitives"] < 0.33 < metrics["grammar_1_cosine_primitives"]
    assert info["composition"]["metrics"]["compositions_per_token"] > 0
    assert len(info["composition"]["curves"][0]["patterns"]["effects"]) > 0
