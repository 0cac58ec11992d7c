"""Planted states that last: how the sequences are made, and what latents score on them that know the states, or nothing."""
import numpy as np
import pytest

from data.synthetic import DWELLS, make_sequences, NOISE, STATES

SEQ = 127
N_STATES = STATES * sum(slots for _, slots in DWELLS.values())


@pytest.fixture(scope="module")
def truth():
    return make_sequences(SEQ + 1, 2 ** 15)


@pytest.fixture(scope="module")
def heldout(truth):
    """What is on in DEV and in TEST, [token, state]."""
    return np.split(truth.on[truth.windows.n_train:].reshape(-1, N_STATES).astype(np.float32), 2)


def test_one_state_of_each_slot_is_on_and_lasts_as_long_as_planted(truth):
    assert truth.on.shape == (len(truth.x), SEQ, N_STATES) and (truth.on.sum(-1) == N_STATES // STATES).all()
    assert (truth.on.reshape(*truth.on.shape[:2], -1, STATES).sum(-1) == 1).all()
    came_on = truth.on[:, 1:] & ~truth.on[:, :-1]
    assert np.array_equal(truth.begins[:, 1:], came_on) and not truth.begins[:, 0].any()
    for dwell in DWELLS:
        of_dwell = truth.dwells == dwell
        slots = of_dwell.sum() / STATES
        assert came_on[..., of_dwell].sum() / (len(truth.x) * (SEQ - 1) * slots) == pytest.approx(1 / dwell, rel=0.1)


def test_x_is_the_sum_of_what_is_on_and_noise(truth):
    amounts = (truth.x[:, 1:] @ np.linalg.pinv(truth.directions)).reshape(len(truth.x), SEQ, -1)
    assert np.allclose(np.linalg.norm(truth.directions, axis=1), 1) and not truth.x[:, 0].any()
    for dwell, (strength, _) in DWELLS.items():        # as far as 96 dimensions tell 192 states apart
        of_dwell = truth.dwells == dwell
        on, off = (amounts[..., of_dwell][truth.on[..., of_dwell] == is_on].mean() for is_on in (True, False))
        assert 0.3 * strength < on - off < 0.7 * strength
    alone = truth.x[:, 1:] - truth.x[:, 1:].mean((0, 1))
    assert alone.var((0, 1)).min() > NOISE ** 2


def test_a_state_lasts_with_its_amount(truth):
    """What a slow state adds is the same from one token to the next, while it lasts."""
    slow = np.flatnonzero(truth.dwells == 64)
    stays = (truth.on[:, 1:, slow] & truth.on[:, :-1, slow]).any(-1)
    step = np.diff(truth.x[:, 1:], axis=1)
    passing = np.abs((step @ truth.directions[truth.dwells == 1].T))[stays].mean()
    assert np.abs((step @ truth.directions[slow].T))[stays].mean() < passing


def test_latents_that_are_the_states_score_one(E, truth, heldout):
    dev, test = heldout
    scores = E.dwell_scores(truth, dev, test, truth.directions)
    assert all(scores[f"{dwell}_{name}"] == pytest.approx(1) for dwell in DWELLS for name in ("cosine", "auroc"))
    assert scores["boundary"] > 0.97


def test_order_and_scale_of_latents_do_not_matter(E, truth, heldout):
    order = np.random.default_rng(0).permutation(N_STATES)
    dev, test = (3.0 * part[:, order] for part in heldout)
    scores = E.dwell_scores(truth, dev, test, 0.2 * truth.directions[order])
    assert scores["64_cosine"] == pytest.approx(1) and scores["16_auroc"] == pytest.approx(1)


def test_latents_of_other_sequences_and_random_directions_score_their_null(E, truth, heldout):
    dev, test = heldout
    random = np.random.default_rng(0).standard_normal(truth.directions.shape)
    scores = E.dwell_scores(truth, dev, np.roll(test, len(test) // 2, 0), random)
    for dwell in DWELLS:
        assert scores[f"{dwell}_auroc"] == pytest.approx(0.5, abs=0.08) and scores[f"{dwell}_cosine"] < 0.4
    assert scores["boundary"] == pytest.approx(0.5, abs=0.06)


def test_latents_that_know_fast_states_alone_say_nothing_of_slow_ones(E, truth, heldout):
    dev, test = (part * (truth.dwells <= 4) for part in heldout)
    scores = E.dwell_scores(truth, dev, test, truth.directions * (truth.dwells <= 4)[:, None] + 1e-9)
    assert scores["1_auroc"] == pytest.approx(1) and scores["64_auroc"] == pytest.approx(0.5, abs=0.08)
    assert scores["boundary"] == pytest.approx(0.5, abs=0.06)


def test_the_evaluation_trains_the_variant(E, settings, monkeypatch, tmp_path):
    """On sequences of its own, at the size that DWELL_SAE gives."""
    settings(SAE_VARIANT="slow", DWELL_SAE=(64, 8), EPOCHS_SCALE=0.1)
    made = {}
    real = E.dwell_scores

    def scores(truth, dev, test, dictionary):
        made.setdefault("shapes", (dev.shape, test.shape, np.shape(dictionary)))
        return real(truth, dev, test, dictionary)

    monkeypatch.setattr(E, "dwell_scores", scores)
    monkeypatch.setattr(E, "cache_folder", lambda: tmp_path)
    result = E.eval_dwell(E.Run(None, None, None, 0, None, {}, seed=1, tiny=True))
    (n_tokens, _), _, (width, _) = made["shapes"]
    assert width == 64 and n_tokens % (E.CONTEXT_LENGTH - 1) == 0
    assert {"dwell_64_cosine", "dwell_64_auroc", "dwell_boundary", "dwell_explained_variance", "dwell_l0"} <= set(result.metrics)
    assert 4 < result.metrics["dwell_l0"] < 16 and set(result.curves["dwell"]) == {"sae", "null"}
