"""Interactions and reuse of features, planted and found again."""
import numpy as np
import pytest


def test_planted_interactions_are_found(E):
    """c = 2 f0 f1 + f2: dropping f0 and f1 interacts, by 2 f0 f1; f2 acts alone."""
    def compose(f):
        return np.stack([2 * f[:, 0] * f[:, 1] + f[:, 2], f[:, 3]], 1)

    f = np.random.default_rng(0).uniform(1, 2, (200, 4))
    names = np.array([7, 5, 9, 2])                      # of the features in the four slots
    singles, pairs = E.ablation_effects(compose, np.tile(names, (200, 1)), f, np.ones((200, 2), bool),
                                        np.random.default_rng(1))
    assert len(singles.token) == 200 * 4 * 2

    def lost(slot):
        here = (singles.feature == names[slot]) & (singles.composition == 0)
        assert singles.token[here].tolist() == list(range(200))
        return singles.effect[here]

    np.testing.assert_allclose(lost(2), f[:, 2])
    np.testing.assert_allclose(lost(0), 2 * f[:, 0] * f[:, 1])
    a, b, row = pairs.slot, pairs.other_slot, pairs.token
    assert (pairs.first == names[a]).all() and (pairs.second == names[b]).all() and (a != b).all()
    planted = (np.minimum(a, b) == 0) & (np.maximum(a, b) == 1)
    assert planted.any() and (pairs.composition[planted] == 0).all()
    np.testing.assert_allclose(pairs.effect[planted], 2 * f[row[planted], 0] * f[row[planted], 1])
    np.testing.assert_allclose(pairs.effect[~planted], 0, atol=1e-9)


def test_attention_is_evidence_only_where_it_predicts(E):
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 40, (2, 20_000))
    keep = first != second
    first, second = first[keep], second[keep]
    strength = rng.random((40, 40))
    effect, none = (strength + strength.T)[first, second], np.zeros(len(first), int)
    pairs = E.PairEffects(none, none, none, first, second, none, effect)
    good = E.interaction_metrics(pairs, effect + 0.1 * rng.random(len(effect)))
    assert good["attention_spearman"] > 0.95 and good["attention_auroc"] > 0.95 and good["feature_pairs"] == 780
    bad = E.interaction_metrics(pairs, rng.random(len(effect)))
    assert abs(bad["attention_spearman"]) < 0.15 and 0.35 < bad["attention_auroc"] < 0.65
    alone = pairs._replace(effect=np.zeros(len(effect)))
    assert E.interaction_metrics(alone, effect) == {"feature_pairs": 780}


def test_planted_reuse(E):
    """20 features, 10 compositions; feature 0 acts on all, 1-9 on one each, the others on none."""
    rng = np.random.default_rng(0)
    sizes = np.arange(60), np.arange(10), np.arange(20)
    token, composition, feature = (a.ravel() for a in np.meshgrid(*sizes, indexing="ij"))
    acts = (feature == 0) | (feature == composition) & (feature > 0)
    effect = acts + 0.01 * rng.standard_normal(len(acts))
    singles = E.SingleEffects(token, feature, composition, effect)
    metrics, took, random = E.feature_reuse(singles, 10, rng)
    assert took[0] == 10 and (took[1:10] >= 1).all() and took[1:10].sum() <= 18 and took[10:].sum() <= 12
    assert metrics["reuse_gini"] > metrics["reuse_gini_null_95"] and random.sum(1).tolist() == [took.sum()] * len(random)
    none = E.feature_reuse(singles._replace(effect=np.zeros(len(acts))), 10, rng)
    assert none.metrics == {"reuse_edges": 0.0}


def test_gini_by_hand(E):
    assert E.gini(np.array([3, 3, 3])) == pytest.approx(0)
    assert E.gini(np.array([0, 0, 0, 1])) == pytest.approx(0.75)
    assert E.gini(np.array([1, 3])) == pytest.approx(0.25)


def test_patterns_by_hand(E):
    """Composition 1 is made by features 4 and 6 together, composition 0 by 5; composition 2 never."""
    codes = np.array([[0, 2, 0], [1, 0, 0], [0, 4, 0]], float)
    singles = E.SingleEffects(*map(np.array, ([0, 0, 2, 2, 1], [4, 6, 4, 6, 5], [1, 1, 1, 1, 0])),
                              np.array([2, 1, 4, 2, 1.0]))
    slots = np.zeros(2, int)
    pairs = E.PairEffects(np.array([0, 2]), slots, slots, np.array([6, 4]), np.array([4, 6]),
                          np.array([1, 1]), np.array([2, 4.0]))
    found = E.composition_patterns(codes, singles, pairs, ["a", "b", "c"])
    assert found["compositions"].tolist() == [1, 0] and found["features"].tolist() == [4, 6, 5]
    assert found["effects"].tolist() == [[1.0, 0.5, 0.0], [0.0, 0.0, 1.0]]
    assert found["pairs"] == [[(4, 6, 3.0)], []] and found["tokens"] == [["c", "a"], ["b"]]
