"""Hierarchy: information between levels, clusters and causal effects, planted and found again."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.sparse import csc_array

from data.windows import Windows
from runtime.errors import RunnerError
from records import run_of

D_IN = 8


# ---- Mutual information ----
def activity(E, active):  # [n, unit] of bool
    return E.Activity.of(csc_array(active.astype(np.float32)), np.arange(len(active)))


def test_information_of_planted_pairs(E):
    """A copy tells everything, an independent unit nothing, half a copy a known part."""
    rng, n = np.random.default_rng(0), 20_000
    a, b, coin = rng.random((3, n)) < np.array([[0.1], [0.1], [0.5]])
    upper, lower = activity(E, a[:, None]), activity(E, np.stack([a, b, a & coin], 1))
    levels, files = E.Levels(lower, upper, np.zeros(3, int), np.arange(3)), np.arange(n) // 100
    found = E.edge_information(levels, [(0, 0), (0, 1), (0, 2)], files)
    h = lambda p: -p * np.log(p) - (1 - p) * np.log(1 - p)
    assert found.share[0] == pytest.approx(1, abs=2e-3)
    assert abs(found.share[1]) < 2e-3 and found.p[1] > 0.02
    assert found.share[2] == pytest.approx((h(0.05) - 0.1 * h(0.5)) / h(0.05), abs=0.02)
    assert found.p[0] == found.p[2] == pytest.approx(1 / 201)
    assert found.draws.mean() == pytest.approx(found.mean, abs=5e-3) and found.draws.std() > 0


def test_the_bias_of_few_firings_is_taken_away(E):
    rng, n = np.random.default_rng(1), 2_000
    lower, upper = (activity(E, rng.random((n, 60)) < 0.01) for _ in range(2))
    edges = [(i, i) for i in range(60)]
    raw = [E.binary_information(len(np.intersect1d(a, b)), len(a), len(b), n) / E.binary_entropy(len(b), n)
           for a, b in zip(upper.places, lower.places)]
    levels = E.Levels(lower, upper, np.arange(60), np.arange(60))
    found = E.edge_information(levels, edges, np.arange(n) // 50)
    assert np.mean(raw) > 2e-3 and abs(found.mean) < np.mean(raw) / 3


def test_metrics_of_information_tell_the_better_parents(E):
    good, bad = (E.EdgeInformation(np.full(5, m), np.full(5, 0.005), m + np.random.default_rng(i).normal(0, 0.01, 200))
                 for i, m in enumerate((0.5, 0.2)))
    found = E.information_metrics(good, {"ward": bad, "same": good})
    assert found["mutual_information_over_ward"] == pytest.approx(0.3)
    assert found["mutual_information_over_ward_q"] < 0.05 < found["mutual_information_over_same_q"]
    assert found["mutual_information_over_ward_low"] > 0.2 and found["edges_significant"] == 1
    assert E.information_metrics(bad, {"ward": good})["mutual_information_over_ward_high"] < 0


def test_other_parents_are_of_similar_rate(E):
    rates = np.arange(40) / 1000
    found = E.rate_matched_parents(rates, [(20, 3), (0, 1), (39, 2)], np.random.default_rng(0))
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
    units, kinds = E.Units(places, directions), {"class": classes}
    assert np.array_equal(E.modal_labels(places, classes), truth)
    for groups in (truth, E.ward_groups(directions, 5), E.kmeans_groups(directions, 5)):
        found = E.clustering_metrics(groups, units, kinds)
        assert found["ami_class"] == pytest.approx(1) and found["ari_class"] == pytest.approx(1)
        assert found["silhouette"] > 0.8
    found = E.clustering_metrics(rng.permutation(truth), units, kinds)
    assert abs(found["ami_class"]) < 0.1 and abs(found["ari_class"]) < 0.1


def test_families_leave_out_single_and_dead_children(E):
    rng = np.random.default_rng(0)
    lower, upper = rng.random((400, 6)) < 0.2, rng.random((400, 3)) < 0.2
    lower[:, 5] = False                                            # never fires
    tokens, lengths = np.ones((22, 21), np.int32), np.full(22, 21)
    windows = Windows(tokens, lengths, np.arange(22), 2, [], [])
    run = SimpleNamespace(store=SimpleNamespace(windows=windows), live_rule=E.LiveRule(10, 5))
    codes = (csc_array(active.astype(np.float32)) for active in (lower, upper))
    levels = E.levels_of_codes(run, *codes, torch.tensor([0, 0, 1, 2, 2, 0]))
    assert {p: part.tolist() for p, part in levels.families().items()} == {0: [0, 1], 2: [3, 4]}
    assert levels.edges().tolist() == [[0, 0], [0, 1], [2, 3], [2, 4]]
    directions = np.eye(6)
    directions[1] = directions[0] + 0.1 * directions[2]
    assert E.duplicate_fraction(levels.families(), directions) == 0.5
    with pytest.raises(RunnerError, match="no parent has two"):
        levels._replace(parents=np.array([0, 1, 2, 0, 1, 2]), children=np.array([0, 1, 2])).edges()


def test_a_group_fires_where_a_member_does(E):
    active = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]]) > 0
    union = E.levels_from_groups(activity(E, active), np.array([0, 0, 1])).upper
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
    return run_of(E, sae.eval(), store)


def trace(E, run, children):
    with torch.no_grad():
        windows = np.arange(10, 14), np.arange(20, 24)
        return E.trace_parent(run, 0, children, np.full(4, 0.5), windows)


def test_a_planted_cause_is_found(E, planted):
    found = trace(E, planted, np.array([0, 1]))
    assert found.parent_cosine.min() > 0.9                    # one scalar stands for two children: not quite 1
    assert np.abs(found.control_cosine).max() < 1e-6         # other axes
    assert found.parent_children == 1 and found.control_children < 0.75
    assert len(found.files) == len(found.parent_cosine) and set(found.files) <= {10, 11, 12, 13}


def test_wrong_children_are_not_its_cause(E, planted):
    found = trace(E, planted, np.array([2, 3]))
    assert np.abs(found.parent_cosine).max() < 1e-6 and np.nanmax(found.control_cosine) > 0.9


def test_patching_raises_the_childrens_tokens(E, planted, monkeypatch):
    weights = torch.zeros(8, 50)
    weights[0, :5] = weights[1, 5:10] = weights[2, 10:20] = 1.0
    monkeypatch.setattr(E, "edited_logits", lambda run, edit, tokens, mask: F.pad(edit(None), (0, 0, 1, 0)) @ weights)
    found = trace(E, planted, np.array([0, 1]))
    assert found.parent_rise > 0.3 and found.control_rise <= 0


def test_causal_scores(E):
    rng = np.random.default_rng(0)
    files = np.repeat(np.arange(20), 5)
    one = E.AblationSummary(
        files, 0.8 + rng.normal(0, 0.05, 100), 0.2 + rng.normal(0, 0.05, 100), parent_rise=1.0,
        control_rise=0.1, parent_children=0.5, control_children=0.6)
    windows = SimpleNamespace(by_document=lambda values, docs: [values[docs == d].mean() for d in range(20)])
    found, by_file = E.causal_scores([one, one], windows)
    assert len(by_file["causal_cosine"]) == 20 and np.mean(by_file["causal_cosine_rival"]) == pytest.approx(0.2, abs=0.02)
    assert found["causal_specificity"] == pytest.approx(4, rel=0.1) and found["causal_p"] < 1e-3
    assert found["patched_rise_share"] == 1 and found["patched_children_share"] == 0
    turned = one._replace(parent_cosine=one.control_cosine, control_cosine=one.parent_cosine)
    found, _ = E.causal_scores([turned], windows)
    assert found["causal_specificity"] < 0.3 and found["causal_p"] > 0.99


def test_windows_with_and_without_a_unit(E):
    n, seq = 24, 10
    tokens = np.ones((n, seq + 1), dtype=np.int32)
    windows = Windows(tokens, np.full(n, seq + 1), np.arange(n) // 2, 4, [], [])
    active = np.zeros((20, seq))
    active[[2, 3, 7], :5] = 1
    active[7] = 1
    chosen, absent = E.windows_with(windows, activity(E, active.reshape(-1, 1)), 0, 2)
    assert chosen[0] == 4 + 7 and chosen[1] in (4 + 2, 4 + 3)
    assert not active[absent - 4].any() and not set(windows.doc_ids[chosen]) & set(windows.doc_ids[absent])
