"""The two-level variant and its evaluation: equations by hand, what is frozen, planted structure of every kind."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from copies import copy_template, results, run, write_text_data
from scipy.sparse import csc_array

D_IN = 8


@pytest.fixture
def make(E, monkeypatch):
    """make(d_sae, k, ...) -> a Hierarchical whose second level has begun; constants by name."""
    def make(d_sae=16, k=3, level=2, **constants):
        for name, value in constants.items():
            monkeypatch.setattr(E, name, value)
        torch.manual_seed(0)
        sae = E.Hierarchical(D_IN, d_sae, k)
        sae.level = level
        sae.begin(a_batch(E), grouped=True)
        return sae
    return make


def a_batch(E, n=4, seq=6, mask=None, seed=1):
    x = torch.randn(n, seq, D_IN, generator=torch.Generator().manual_seed(seed)) / D_IN ** 0.5
    return E.Batch(x, torch.ones(n, seq, dtype=torch.long), torch.arange(n), torch.arange(1, seq + 1), mask)


# ---- The equations ----
def test_forward_by_hand(E, monkeypatch):
    """Three features, two parents, one active: features 0 and 1 have parent 0, feature 2 parent 1."""
    monkeypatch.setattr(E, "LEVEL_WIDTHS", (3, 2))
    sae = E.Hierarchical(2, 99, 1)
    assert sae.d_sae == 2 and sae.d_in == 2
    low = sae.lower
    low.W_enc.data = torch.tensor([[1.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
    low.W_dec.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    low.b_enc.data, low.b_dec.data = torch.tensor([0.0, -0.5, 0.0]), torch.tensor([1.0, 0.0])
    sae.W_enc.data = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    sae.W_dec.data = torch.tensor([[0.6, 0.8, 0.0], [0.0, 0.1, 1.0]])
    sae.b_enc.data, sae.b_dec.data = torch.tensor([1.0, -0.75]), torch.tensor([-1.0, 0.0, 0.5])
    sae.begun.fill_(True)
    sae.level = 2
    x = torch.tensor([[[3.0, 1.5], [0.0, 0.0]]])                  # x - b: (2, 1.5), (-1, 0)
    batch = E.Batch(x, torch.ones(1, 2), torch.zeros(1), torch.arange(1, 3), None)
    h = sae.levels(batch).dense()
    assert torch.equal(h, torch.tensor([[[2.0, 1.0, 0.0], [0.0, 0.0, 1.0]]]))
    # h: (2, 1, 0), (0, 0, 1); pre-activations (4, -.75), (1, 1.25)
    z = sae.encode(batch)
    torch.testing.assert_close(z.dense(), torch.tensor([[[4.0, 0.0], [0.0, 1.25]]]))
    # z W_dec + c: (1.4, 3.2, .5), (-1, .125, 1.75) -> ReLU
    wanted = torch.tensor([[[1.4 - 0.5 + 1, 3.2], [-1.75 + 1, 0.125]]])
    torch.testing.assert_close(sae.decode(z), wanted)
    assert sae.parents().tolist() == [0, 0, 1]
    torch.testing.assert_close(sae.directions(), sae.W_dec @ low.W_dec)
    found = sae.losses(batch, z)
    torch.testing.assert_close(found["reconstruction"], (x - wanted).square().sum(-1).mean())
    x_hat1 = torch.tensor([[[3.0, 1.0], [0.0, 0.0]]])
    torch.testing.assert_close(found["level_1"], (x - x_hat1).square().sum(-1).mean())
    # cos(d_0, d_1) = 0: both lack .5; feature 2 is alone. Group 0: sqrt 2 * |(2, 1)|; group 1: 1
    torch.testing.assert_close(found["cosine"], torch.tensor(0.5))
    torch.testing.assert_close(found["group"], torch.tensor((2 ** 0.5 * 5 ** 0.5 + 1) / 2))


@torch.no_grad()
def test_a_parent_is_shown_with_its_children(E, make, monkeypatch):
    """Features 0 and 1 are children of latent 0, feature 2 of latent 1, which has a part in feature 1 too; 3 is nobody's."""
    sae, batch = make(LEVEL_WIDTHS=(4, 3), k=1), a_batch(E, n=1, seq=3)
    sae.W_dec.data = torch.tensor([[0.6, 0.8, 0.0, 0.0], [0.0, 0.1, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    h = torch.tensor([[[0.0, 1.0, 3.0, 0.0], [2.0, 0.0, 1.0, 0.0], [1.0, 4.0, 0.0, 0.0]]])
    monkeypatch.setattr(sae, "levels", lambda batch: E.Latents.from_dense(h))
    letters = SimpleNamespace(batch_decode=lambda ids: ["abcdefgh"[i] for i, in ids])
    monkeypatch.setattr(E, "load_tokenizer", lambda: letters)
    found = sae.related(np.array([0, 1, 2]), batch._replace(tokens=torch.tensor([[5, 6, 7]])), None)
    own, other = "children, features of level 1", "other features of level 1"
    assert [{title: [(name, round(weight, 4)) for name, weight in rows] for title, rows in latent.items()} for latent in found] == [
        {own: [("1 h", 0.8), ("0 g", 0.6)], other: []}, {own: [("2 f", 1.0)], other: [("1 h", 0.1)]}, {own: [], other: []}]


@pytest.mark.parametrize("cosine, wanted", [(0.9, 0.0), (0.5, 0.0), (0.2, 0.3), (-1.0, 1.5)])
def test_the_cosine_loss_of_a_pair(E, make, cosine, wanted):
    sae = make(LEVEL_WIDTHS=(3, 3), k=1)
    sae.W_dec.data = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    d = torch.zeros(3, D_IN)
    d[0, 0] = d[2, 2] = 1.0
    d[1, :2] = torch.tensor([cosine, (1 - cosine ** 2) ** 0.5])
    sae.lower.W_dec.data = d
    found = sae.grouping(a_batch(E), sae.levels(a_batch(E)))["cosine"]
    torch.testing.assert_close(found, torch.tensor(wanted), atol=1e-6, rtol=1e-5)


def test_group_loss_equals_the_naive_form_and_its_gradient_is_finite(E, make):
    sae, batch = make(), a_batch(E)
    h, parents = sae.levels(batch), sae.parents()
    dense, total = h.dense().double(), 0.0
    for p in range(sae.d_sae):
        part = dense[..., parents == p]
        total += part.shape[-1] ** 0.5 * part.norm(dim=-1).sum() / (4 * 6)
    found = sae.grouping(batch, h)["group"]
    torch.testing.assert_close(found.double(), total)
    found.backward()
    assert torch.isfinite(sae.lower.W_enc.grad).all() and sae.lower.W_enc.grad.abs().sum() > 0


def test_level_2_is_not_one_flat_dictionary(E, make):
    """The ReLU between the decoders matters: x_hat2 is not linear in the latents."""
    sae, batch = make(), a_batch(E)
    sae.begin(batch, grouped=False)
    sae.b_dec.data.fill_(-0.1)
    z = sae.encode(batch).dense().detach()
    whole = sae.decode(E.Latents.from_dense(z))
    parts = [sae.decode(E.Latents.from_dense(torch.where(torch.arange(16) % 2 == i, z, 0.0))) for i in (0, 1)]
    assert (whole - sum(parts) + sae.lower.b_dec).abs().max() > 1e-3


def test_padding_and_other_rows_count_nowhere(E, make):
    sae = make().eval()
    mask = torch.arange(6) < torch.tensor([6, 2, 5, 1])[:, None]
    batch = a_batch(E, mask=mask)
    other = batch._replace(x=torch.where(mask[..., None], batch.x, 9.0))
    for (name, a), b in zip(sae.losses(batch, sae.encode(batch)).items(), sae.losses(other, sae.encode(other)).values()):
        torch.testing.assert_close(a, b, msg=name)
    assert not sae.encode(other).dense()[~mask].any()
    alone = sae.encode(batch._replace(x=batch.x[:1], mask=mask[:1], doc_ids=batch.doc_ids[:1])).dense()
    torch.testing.assert_close(alone[0], sae.encode(batch).dense()[0])


@pytest.mark.parametrize("grouped", [True, False])
def test_how_level_2_begins(E, make, grouped):
    sae = make()
    sae.begin(a_batch(E), grouped)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(16))
    assert (sae.W_dec >= 0).all() and torch.equal(sae.W_enc, sae.W_dec.t())
    if grouped:
        assert ((sae.W_dec > 0).sum(0) == 1).all()                # each feature in one group, none empty
        assert np.array_equal(E.corpus.ward(sae.lower.W_dec.detach().numpy(), 16), sae.parents().numpy())
    else:
        assert (sae.W_dec > 0).float().mean() > 0.9


# ---- Training ----
def trained(E, make_store, tmp_path, stages=None, **settings):
    x = torch.randn(24, 7, D_IN, generator=torch.Generator().manual_seed(0)) / D_IN ** 0.5
    store, sae = make_store(x, 16), settings.pop("sae", None) or E.Hierarchical(D_IN, 16, 3)
    stages = stages or [s._replace(epochs=2) for s in E.Hierarchical.curriculum]
    log, *_ = E.train(sae, store, stages, 0, 4, np.inf, tmp_path / "state.pt")
    return sae, log, store


def test_frozen_levels_keep_every_bit(E, make_store, tmp_path):
    """Stage 1 leaves level 2 alone, stage 2 level 1, with all of its buffers; stage 3 moves every parameter."""
    torch.manual_seed(0)
    seen, sae, train_step = {}, E.Hierarchical(D_IN, 16, 3), E.train_step

    def step(sae, optimizer, batch, stage, done):
        before = {name: value.clone() for name, value in sae.state_dict().items()}
        losses = train_step(sae, optimizer, batch, stage, done)
        moved = {name for name, value in sae.state_dict().items() if not torch.equal(value, before[name])}
        seen.setdefault(stage.name, []).append((moved, bool(before["begun"])))
        return losses

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(E, "train_step", step)
        patch.setattr(E, "seconds_per_step", lambda *_: [1.0] * 3)
        trained(E, make_store, tmp_path, sae=sae)
    level_1 = {name for name in sae.state_dict() if name.startswith("lower.")}
    for moved, _ in seen["level_1"]:
        assert "lower.W_dec" in moved and moved <= level_1 | {"tokens_since_fired"}
    for i, (moved, begun) in enumerate(seen["level_2"]):
        assert "W_dec" in moved and not moved & level_1
        assert begun == (i > 0)                                   # level 2 begins once
    parameters = {name for name, _ in sae.named_parameters()}
    assert parameters <= set.union(*(moved for moved, _ in seen["both"]))


def test_gradients_of_the_third_stage_reach_level_1_through_level_2(E, make):
    sae, batch = make(), a_batch(E)
    sae.losses(batch, sae.encode(batch))["reconstruction"].backward()
    for name, p in sae.lower.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("sparsity", ["topk", "l1"])
def test_latents_and_gradients_equal_the_dense_form(E, make, sparsity):
    sae, mask = make(LEVEL_SPARSITY=sparsity), torch.ones(4, 6, dtype=torch.bool)
    mask[1, 3:] = False
    batch, weigh = a_batch(E, mask=mask), torch.randn(4, 6, sae.d_sae)
    low, learned = sae.lower, (sae.W_enc, sae.b_enc, sae.lower.W_enc, sae.lower.b_enc)
    h = F.relu((batch.x - low.b_dec) @ low.W_enc + low.b_enc)
    z = F.relu(h @ sae.W_enc + sae.b_enc) * mask[..., None]
    if sparsity == "topk":
        z = z * (z >= z.topk(sae.k).values[..., -1:])
    found = sae.encode(batch).dense()
    torch.testing.assert_close(found, z)
    grads = (torch.autograd.grad((values * weigh).sum(), learned) for values in (found, z))
    for ours, dense in zip(*grads):
        torch.testing.assert_close(ours, dense)


def test_the_decoder_stays_non_negative_with_unit_rows(E, make_store, tmp_path):
    sae, log, store = trained(E, make_store, tmp_path)
    with torch.no_grad():
        x_hat = sae.decode(sae.encode(store.batch(np.arange(4))))
    assert (sae.W_dec >= 0).all() and torch.isfinite(x_hat).all()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(E, "ABLATE", ("nonnegative",))
        free, *_ = trained(E, make_store, tmp_path / "free")
    assert (free.W_dec < 0).any()
    torch.testing.assert_close(sae.lower.W_dec.norm(dim=1), torch.ones(24))
    assert log["stages"] == ["level_1", "level_2", "both"] and set(log["parameters"]) == {"beta_1"}


@pytest.mark.parametrize("off, others", [("cosine", ("start",)), ("group", ()), ("level_1", ()), ("sparsity_1", ()),
                                         ("start", ()), ("nonnegative", ())])
def test_every_part_can_be_switched_off(E, make_store, tmp_path, monkeypatch, off, others):
    """What is switched off leaves other weights than the whole variant has (a random start: siblings are not alike)."""
    def weights():
        torch.manual_seed(0)
        stages = [s._replace(epochs=2) for s in E.planned_stages(E.Hierarchical)]
        (tmp_path / "state.pt").unlink(missing_ok=True)
        return trained(E, make_store, tmp_path, stages)[0].lower.W_dec.detach().clone()

    monkeypatch.setattr(E, "ABLATE", others)
    whole = weights()
    monkeypatch.setattr(E, "ABLATE", (*others, off))
    assert not torch.equal(weights(), whole)


def test_matched_sparsity(E, make):
    assert (make(k=3).encode(a_batch(E)).dense() != 0).sum(-1).max() <= 3


# ---- Mutual information ----
def activity(E, active):  # [n, unit] of bool
    return E.corpus.Activity.of(csc_array(active.astype(np.float32)), np.arange(len(active)))


def test_information_of_planted_pairs(E):
    """A copy tells everything, an independent unit nothing, half a copy a known part."""
    rng, n = np.random.default_rng(0), 20_000
    a, b, coin = rng.random((3, n)) < np.array([[0.1], [0.1], [0.5]])
    upper, lower = activity(E, a[:, None]), activity(E, np.stack([a, b, a & coin], 1))
    files = np.arange(n) // 100
    found = E.corpus.edge_information(upper, lower, [(0, 0), (0, 1), (0, 2)], files)
    h = lambda p: -p * np.log(p) - (1 - p) * np.log(1 - p)
    assert found.information[0] == pytest.approx(1, abs=2e-3)
    assert abs(found.information[1]) < 2e-3 and found.p[1] > 0.02
    assert found.information[2] == pytest.approx((h(0.05) - 0.1 * h(0.5)) / h(0.05), abs=0.02)
    assert found.p[0] == found.p[2] == pytest.approx(1 / 201)
    assert found.draws.mean() == pytest.approx(found.mean, abs=5e-3) and found.draws.std() > 0


def test_the_bias_of_few_firings_is_taken_away(E):
    rng, n = np.random.default_rng(1), 2_000
    lower, upper = (activity(E, rng.random((n, 60)) < 0.01) for _ in range(2))
    edges = [(i, i) for i in range(60)]
    raw = [E.corpus.binary_information(len(np.intersect1d(a, b)), len(a), len(b), n) / E.corpus.binary_entropy(len(b), n)
           for a, b in zip(upper.places, lower.places)]
    found = E.corpus.edge_information(upper, lower, edges, np.arange(n) // 50)
    assert np.mean(raw) > 2e-3 and abs(found.mean) < np.mean(raw) / 3


def test_scores_of_information_tell_the_better_parents(E):
    good, bad = (E.corpus.Edges(np.full(5, m), np.full(5, 0.005), m + np.random.default_rng(i).normal(0, 0.01, 200))
                 for i, m in enumerate((0.5, 0.2)))
    found = E.corpus.information_scores(good, {"ward": bad, "same": good})
    assert found["mutual_information_over_ward"] == pytest.approx(0.3)
    assert found["mutual_information_over_ward_q"] < 0.05 < found["mutual_information_over_same_q"]
    assert found["mutual_information_over_ward_low"] > 0.2 and found["edges_significant"] == 1
    assert E.corpus.information_scores(bad, {"ward": good})["mutual_information_over_ward_high"] < 0


def test_other_parents_are_of_like_rate(E):
    rates = np.arange(40) / 1000
    found = E.corpus.alike_parents(rates, [(20, 3), (0, 1), (39, 2)], np.random.default_rng(0))
    assert found[:, 1].tolist() == [3, 1, 2]
    assert all(p != q and abs(p - q) <= 10 for p, q in zip((20, 0, 39), found[:, 0]))


# ---- Clusters ----
def test_planted_clusters(E):
    """Groups that follow the labels score 1, others 0; directions of the same clusters are found by both methods."""
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(5), 20)
    directions = np.eye(5)[truth] + rng.normal(0, 0.05, (100, 5))
    classes = rng.integers(0, 5, 5_000)
    places = [rng.choice(np.flatnonzero(classes == c), 60, replace=False) for c in truth]
    kinds = {"class": classes}
    assert np.array_equal(E.corpus.modal_labels(places, classes), truth)
    for groups in (truth, E.corpus.ward(directions, 5), E.corpus.kmeans(directions, 5)):
        found = E.corpus.clustering_scores(groups, places, kinds, directions)
        assert found["ami_class"] == pytest.approx(1) and found["ari_class"] == pytest.approx(1)
        assert found["silhouette"] > 0.8
    found = E.corpus.clustering_scores(rng.permutation(truth), places, kinds, directions)
    assert abs(found["ami_class"]) < 0.1 and abs(found["ari_class"]) < 0.1


def test_families_leave_out_single_and_dead_children(E):
    rng = np.random.default_rng(0)
    lower, upper = rng.random((400, 6)) < 0.2, rng.random((400, 3)) < 0.2
    lower[:, 5] = False                                            # never fires
    parents = np.array([0, 0, 1, 2, 2, 0])
    levels = E.corpus.Levels.of(activity(E, lower), activity(E, upper), parents, np.arange(400) // 20, (10, 5))
    assert {p: part.tolist() for p, part in levels.families().items()} == {0: [0, 1], 2: [3, 4]}
    assert levels.edges().tolist() == [[0, 0], [0, 1], [2, 3], [2, 4]]
    directions = np.eye(6)
    directions[1] = directions[0] + 0.1 * directions[2]
    assert E.corpus.duplicates(levels.families(), directions) == 0.5
    with pytest.raises(E.corpus.DataError, match="no parent has two"):
        levels._replace(parents=np.array([0, 1, 2, 0, 1, 2]), children=np.array([0, 1, 2])).edges()


def test_a_group_fires_where_a_member_does(E):
    active = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]]) > 0
    union = E.corpus.grouped(activity(E, active), np.array([0, 0, 1])).upper
    assert [at.tolist() for at in union.places] == [[0, 1], [2]]


# ---- Causal tracing ----
@pytest.fixture
def planted(E, make_store, monkeypatch):
    """A run whose model's first logits are what is added to the residual stream; parent p has the children 2p and 2p + 1, which point along
    axes of their own; all parents but 0 have the same rate."""
    monkeypatch.setattr(E, "LEVEL_WIDTHS", (8, 4))
    sae = E.Hierarchical(D_IN, 4, 4)
    sae.level = 2
    sae.begun.fill_(True)
    low = sae.lower
    low.W_enc.data, low.W_dec.data = torch.eye(8), torch.eye(8)
    low.b_enc.data.zero_()
    W = torch.zeros(4, 8)
    W[torch.arange(8) // 2, torch.arange(8)] = 0.5 ** 0.5
    sae.W_dec.data, sae.W_enc.data = W, W.t().clone()
    g = torch.Generator().manual_seed(0)
    on = (torch.rand(40, 33, 4, generator=g) < 0.5).repeat_interleave(2, -1)
    store = make_store(on * torch.rand(40, 33, 8, generator=g).add(0.5), 8)
    store.mean, store.scale = torch.zeros(8), 1.0
    monkeypatch.setattr(E, "edited_logits", lambda run, edit, tokens, mask: F.pad(edit(None), (0, 42, 1, 0)))
    return E.Run(sae.eval(), store, lambda: None, 0, (1, 1), {})


def trace(E, run, children):
    with torch.no_grad():
        return E.trace(run, 0, children, torch.full((4,), 0.5), np.arange(10, 14), np.arange(20, 24))


def test_a_planted_cause_is_found(E, planted):
    found = trace(E, planted, np.array([0, 1]))
    assert found["own"].min() > 0.9                    # one scalar stands for two children: not quite 1
    assert np.abs(found["rival"]).max() < 1e-6         # other axes
    assert found["patched_children"] == 1 and found["rival_children"] < 0.75
    assert len(found["files"]) == len(found["own"]) and set(found["files"]) <= {10, 11, 12, 13}


def test_wrong_children_are_not_its_cause(E, planted):
    found = trace(E, planted, np.array([2, 3]))
    assert np.abs(found["own"]).max() < 1e-6 and np.nanmax(found["rival"]) > 0.9


def test_patching_raises_the_childrens_tokens(E, planted, monkeypatch):
    weights = torch.zeros(8, 50)
    weights[0, :5] = weights[1, 5:10] = weights[2, 10:20] = 1.0
    monkeypatch.setattr(E, "edited_logits", lambda run, edit, tokens, mask: F.pad(edit(None), (0, 0, 1, 0)) @ weights)
    found = trace(E, planted, np.array([0, 1]))
    assert found["patched_rise"] > 0.3 and found["rival_rise"] <= 0


def test_causal_scores(E):
    rng = np.random.default_rng(0)
    files = np.repeat(np.arange(20), 5)
    one = {"files": files, "own": 0.8 + rng.normal(0, 0.05, 100), "rival": 0.2 + rng.normal(0, 0.05, 100), "patched_rise": 1.0,
           "rival_rise": 0.1, "patched_children": 0.5, "rival_children": 0.6}
    windows = SimpleNamespace(by_document=lambda values, docs: [values[docs == d].mean() for d in range(20)])
    found, by_file = E.corpus.causal_scores([one, one], windows)
    assert len(by_file["causal_cosine"]) == 20 and np.mean(by_file["causal_cosine_rival"]) == pytest.approx(0.2, abs=0.02)
    assert found["causal_specificity"] == pytest.approx(4, rel=0.1) and found["causal_p"] < 1e-3
    assert found["patched_rise_share"] == 1 and found["patched_children_share"] == 0
    found, _ = E.corpus.causal_scores([one | {"own": one["rival"], "rival": one["own"]}], windows)
    assert found["causal_specificity"] < 0.3 and found["causal_p"] > 0.99


def test_windows_with_and_without_a_unit(E):
    n, seq = 24, 10
    tokens = np.ones((n, seq + 1), dtype=np.int32)
    windows = E.corpus.Windows(tokens, np.full(n, seq + 1), np.arange(n) // 2, 4, [], [])
    active = np.zeros((20, seq))
    active[[2, 3, 7], :5] = 1
    active[7] = 1
    chosen, absent = E.corpus.windows_with(windows, activity(E, active.reshape(-1, 1)), 0, 2)
    assert chosen[0] == 4 + 7 and chosen[1] in (4 + 2, 4 + 3)
    assert not active[absent - 4].any() and not set(windows.doc_ids[chosen]) & set(windows.doc_ids[absent])


# ---- Whole runs ----
def test_a_variant_without_levels_is_told_at_once(E, monkeypatch):
    monkeypatch.setattr(E, "EVALS", ("core", "hierarchy"))
    with pytest.raises(E.RunnerError, match="EVALS.*for standard"):
        E.corpus.check_config(vars(E), E.SAE_VARIANTS, E.EVALUATIONS)
    monkeypatch.setattr(E, "SAE_VARIANT", "hierarchical")
    E.corpus.check_config(vars(E), E.SAE_VARIANTS, E.EVALUATIONS)


@pytest.mark.parametrize("name, value", [("LEVEL_WIDTHS", (96, 144)), ("LEVEL_WIDTHS", (96, 4)), ("LEVEL_WIDTHS", 7),
                                         ("LEVEL_SPARSITY", "l2"), ("DENSITY", 0), ("GROUP_WEIGHT", -1)])
def test_wrong_constants_are_refused(E, monkeypatch, name, value):
    monkeypatch.setattr(E, name, value)
    with pytest.raises(E.RunnerError, match=name):
        E.corpus.check_config(vars(E), E.SAE_VARIANTS, E.EVALUATIONS)


@pytest.mark.parametrize("constants", [{}, {"LEVEL_WIDTHS": (144, 96), "LEVEL_SPARSITY": "l1", "EPOCHS_SCALE": 1.0}])
def test_a_whole_run(tmp_path, constants):
    data = str(write_text_data(tmp_path / "texts.jsonl"))
    folder = copy_template(tmp_path / "run", SAE_VARIANT="hierarchical", EVALS=("core", "hierarchy"), DATASET=data, **constants)
    finished = run(folder, tmp_path / "cache")
    assert finished.code == 0 and finished.stderr == "", finished.stderr
    info = results(folder)
    metrics, tree = info["hierarchy"]["metrics"], info["hierarchy"]["curves"][0]["tree"]
    assert metrics["causal_cosine"] > metrics["causal_cosine_rival"] and metrics["mutual_information"] > 0
    assert info["core"]["config"]["d_sae"] == (96 if constants else 384)
    shown = json.loads((folder / "run_1" / "features.json").read_text())["latents"]
    assert any(entry["related"]["children, features of level 1"] for entry in shown)
    text = (folder / "run_1" / "case_studies.md").read_text()
    assert text.count("## Parent") == len(tree) > 3 and all(len(parent["children"]) > 1 for parent in tree)
    log = info["core"]["curves"][0]["training"]
    second, third = log["stage_starts"][1:]
    for step, value in zip(log["step"], log["losses"]["sparsity_1"], strict=True):
        assert (value is None) == (second < step <= third)      # the frozen level has no such loss
    if constants:
        assert set(log["parameters"]) == {"beta_1", "beta_2"}
