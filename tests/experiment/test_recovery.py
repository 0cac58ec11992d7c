"""Known truths: a perfect dictionary scores 1, others what they must."""
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from data.synthetic import make_synthetic
from runtime.errors import RunnerError


@pytest.fixture(scope="module")
def truth(E):
    return make_synthetic("boolean", 1.0, 33, 2 ** 13)


def codes(truth, values):
    return [values[part] for part in truth.parts()[1:]]


def test_a_perfect_dictionary_scores_1(E, truth):
    values = np.concatenate([truth.amounts, truth.composed()], 1)
    scores = E.recovery_scores(truth, *codes(truth, values), truth.directions)
    assert all(value == pytest.approx(1, abs=1e-6) for value in scores.values())


def test_baselines_find_no_compositions_and_a_random_dictionary_scores_its_null(E):
    found = E.compute_recovery_baselines(make_synthetic("boolean", 1.0, 33, 2 ** 12))
    assert 0.25 < found["random"]["cosine_primitives"] < 0.33 and 0.25 < found["random"]["cosine_compositions"] < 0.33
    for name in ("pca", "nmf", "random"):
        assert found[name]["auroc_seen"] < 0.85 and found[name]["cosine_compositions"] < 0.4


def test_without_compositions_nobody_finds_them(E):
    truth = make_synthetic("boolean", 0.0, 33, 2 ** 13)
    rng = np.random.default_rng(5)
    random = rng.standard_normal((320, 96))
    dictionary = np.concatenate([truth.directions[:64], random])
    values = np.concatenate([truth.amounts, np.maximum(truth.flat_x() @ random.T / 10 - 1, 0)], 1)
    scores = E.recovery_scores(truth, *codes(truth, values), dictionary)
    assert scores["cosine_primitives"] == pytest.approx(1) and scores["cosine_compositions"] < 0.33
    assert scores["auroc_seen"] < 0.83 and scores["auroc_unseen"] < 0.83
    assert scores["minimum_seen"] > 0.99                     # both primitives are known exactly


def test_one_primitive_is_three_quarters(E, truth):
    scores = E.recovery_scores(truth, *codes(truth, truth.amounts), truth.directions[:64])
    assert scores["cosine_primitives"] == pytest.approx(1) and scores["cosine_compositions"] == 0
    assert 0.74 < scores["auroc_seen"] < 0.80 and scores["minimum_unseen"] == pytest.approx(1)


def test_too_few_tokens_are_an_error(E):
    truth = make_synthetic("boolean", 1.0, 9, 64)
    with pytest.raises(RunnerError, match="too few"):
        E.recovery_scores(truth, *codes(truth, truth.amounts), truth.directions[:64])


def test_auroc_by_hand(E):
    values = np.array([[0, 1], [2, 1], [3, 0], [1, 0], [0, 5]], float)
    positive = np.array([False, True, True, False, False])
    assert E.aurocs(values, positive).tolist() == [1.0, pytest.approx(2 / 6)]
    assert roc_auc_score(positive, values[:, 1]) == pytest.approx(2 / 6)        # as the library has it


def test_keep_largest_and_signed_parts_by_hand(E):
    values = np.array([[3.0, 0, 1, 2], [0, 0, 5, 0]])
    assert E.keep_largest(values, 2).tolist() == [[3, 0, 0, 2], [0, 0, 5, 0]]
    assert E.signed_parts(np.array([[1.0, -2]])).tolist() == [[1, 0, 0, 2]]


def test_baselines_are_kept_by_task_rho_and_size(E, truth, tmp_path, monkeypatch):
    computed = []
    monkeypatch.setattr(E, "compute_recovery_baselines", lambda truth: computed.append(truth.rho) or {"rho": truth.rho})
    store = SimpleNamespace(folder=tmp_path)
    for task, rho in (("boolean", 1.0), ("boolean", 0.5), ("grammar", 1.0), ("boolean", 1.0)):
        assert E.recovery_baselines(truth._replace(rho=rho), store, task) == {"rho": rho}
    assert computed == [1.0, 0.5, 1.0]
