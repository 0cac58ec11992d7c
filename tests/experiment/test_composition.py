"""Interactions and reuse of features, planted and found again."""
import numpy as np
import pytest


def test_planted_interactions_are_found(E):
    """c = 2 f0 f1 + f2: dropping f0 and f1 interacts, by 2 f0 f1; f2 acts alone."""
    def compose(f):
        return np.stack([2 * f[:, 0] * f[:, 1] + f[:, 2], f[:, 3]], 1)

    f = np.random.default_rng(0).uniform(1, 2, (200, 4))
    (token, slot, of, effect), pairs = E.ablation_effects(compose, f, np.ones((200, 2), bool), np.random.default_rng(1))
    assert len(token) == 200 * 4 * 2
    np.testing.assert_allclose(effect[(slot == 2) & (of == 0)], f[:, 2])
    np.testing.assert_allclose(effect[(slot == 0) & (of == 0)], 2 * f[:, 0] * f[:, 1])
    row, a, b, composition, joint = pairs
    planted = (np.minimum(a, b) == 0) & (np.maximum(a, b) == 1)
    assert planted.any() and (composition[planted] == 0).all()
    np.testing.assert_allclose(joint[planted], 2 * f[row[planted], 0] * f[row[planted], 1])
    np.testing.assert_allclose(joint[~planted], 0, atol=1e-9)


def test_attention_is_evidence_only_where_it_predicts(E):
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 40, (2, 20_000))
    keep = first != second
    first, second = first[keep], second[keep]
    strength = rng.random((40, 40))
    effect = (strength + strength.T)[first, second]
    good = E.interaction_scores(first, second, effect + 0.1 * rng.random(len(effect)), effect)
    assert good["attention_spearman"] > 0.95 and good["attention_auroc"] > 0.95 and good["feature_pairs"] == 780
    bad = E.interaction_scores(first, second, rng.random(len(effect)), effect)
    assert abs(bad["attention_spearman"]) < 0.15 and 0.35 < bad["attention_auroc"] < 0.65
    assert E.interaction_scores(first, second, effect, np.zeros(len(effect))) == {"feature_pairs": 780}   # no effect


def test_planted_reuse(E):
    """20 features, 10 compositions; feature 0 acts on all, 1-9 on one each, the others on none."""
    rng = np.random.default_rng(0)
    token, composition, feature = (a.ravel() for a in np.meshgrid(np.arange(60), np.arange(10), np.arange(20), indexing="ij"))
    acts = (feature == 0) | (feature == composition) & (feature > 0)
    effect = acts + 0.01 * rng.standard_normal(len(acts))
    metrics, took, random = E.feature_reuse(token * 10 + composition, feature, composition, effect, rng)
    assert took[0] == 10 and (took[1:10] >= 1).all() and took[1:10].sum() <= 18 and took[10:].sum() <= 12
    assert metrics["reuse_gini"] > metrics["reuse_gini_null_95"] and random.sum(1).tolist() == [took.sum()] * len(random)
    none, _, _ = E.feature_reuse(token * 10 + composition, feature, composition, np.zeros(len(acts)), rng)
    assert none == {"reuse_edges": 0.0}


def test_gini_by_hand(E):
    assert E.gini(np.array([3, 3, 3])) == pytest.approx(0)
    assert E.gini(np.array([0, 0, 0, 1])) == pytest.approx(0.75)
    assert E.gini(np.array([1, 3])) == pytest.approx(0.25)
