"""Synthetic activations: the wiring of the tasks, and what made each of them."""
import math

import numpy as np
import pytest

from data.synthetic import make_synthetic, make_wiring


@pytest.mark.parametrize("task", ["arithmetic", "boolean", "grammar"])
def test_the_wiring_has_the_fixed_difficulty(task):
    wired = make_wiring(task)
    assert len({frozenset(pair) for pair in wired.pairs.tolist()}) == 256 and (wired.pairs[:, 0] != wired.pairs[:, 1]).all()
    assert (np.bincount(wired.made) == 2).all() and len(np.bincount(wired.made)) == 128
    assert set(wired.pairs.ravel()) == set(range(64)) and (~wired.seen).sum() == 51        # 20 %
    assert set(wired.made[~wired.seen]) <= set(wired.made[wired.seen])
    assert not wired.apart[tuple(wired.pairs.T)].any()


def test_the_tasks_say_what_they_compute(E):
    wired = make_wiring("arithmetic")
    for (i, j), made, text in zip(wired.pairs, wired.made, wired.joint):
        a, b, total = map(int, text.replace("+", "=").split("="))
        assert (a + b) % 128 == total == made and wired.words[i] == str(a) and wired.words[j] == str(b)
    wired, values = make_wiring("boolean"), {}
    for (i, j), made in zip(wired.pairs, wired.made):
        values.setdefault(made // 2, {})[i % 2, j % 2] = made % 2
    assert len(values) == 64 and all(table == {(0, 0): 0, (0, 1): 1, (1, 0): 1, (1, 1): 0} for table in values.values())
    wired = make_wiring("grammar")
    assert all(wired.words[i].endswith("s") != wired.words[j].endswith("s") for i, j in wired.pairs)     # they agree


def test_activations_are_what_made_them():
    truth = make_synthetic("boolean", 1.0, 33, 2 ** 13)
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
