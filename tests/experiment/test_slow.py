"""Slow explained variance: known shares of planted dictionaries, and nothing for tricks."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

WINDOWS, SEQ, D = 1000, 64, 24


def slow_signal(rng, n, decay=0.98, windows=WINDOWS):
    """Values [window, seq, n] of variance 1 with autocorrelation decay^lag."""
    values = np.empty((windows, SEQ, n))
    values[:, 0] = rng.normal(size=(windows, n))
    for t in range(1, SEQ):
        values[:, t] = decay * values[:, t - 1] + np.sqrt(1 - decay ** 2) * rng.normal(size=(windows, n))
    return values


@pytest.fixture
def measure(E, settings, tmp_path):
    """measure(x, z, W): the slow metrics of codes z [window, seq, latent] with directions W [latent, d]."""
    settings(CONTEXT_LENGTH=SEQ + 1)

    def call(x, z, W):
        x, documents = torch.tensor(x, dtype=torch.float32), np.arange(WINDOWS) // 2
        windows = SimpleNamespace(n_train=0, doc_ids=documents)
        store = SimpleNamespace(windows=windows, x=lambda ids: x, folder=tmp_path / str(np.random.default_rng().integers(1e9)))
        sae = SimpleNamespace(directions=lambda: torch.tensor(W, dtype=torch.float32))
        run = SimpleNamespace(store=store, sae=sae, live=SimpleNamespace(ids=np.arange(len(W))))
        metrics, by_window = E.slow_metrics(run, csr_array(z.reshape(-1, len(W)).astype(np.float32)), np.arange(WINDOWS))
        assert by_window["slow_explained_variance"].mean() == pytest.approx(metrics["slow_explained_variance"])
        return metrics
    return call


def orthogonal(rng, n=D):
    return np.linalg.qr(rng.normal(size=(n, n)))[0]


def planted(seed=0, n_slow=4, decay=0.98):
    """x with n_slow slow directions among fast ones of the same size, and its codes."""
    rng = np.random.default_rng(seed)
    W = orthogonal(rng)
    z = np.concatenate([slow_signal(rng, n_slow, decay), rng.normal(size=(WINDOWS, SEQ, D - n_slow))], -1)
    return z @ W, z, W


def expected(n_slow=4, decay=0.98):
    """The share of x, n_slow of D directions, times what is left of it: the squared autocorrelation, mean over lags."""
    return n_slow / D * np.mean([decay ** (2 * lag) for lag in range(17, 33)])


def test_slow_directions_among_fast_ones_give_their_known_share(measure):
    for n_slow in (2, 6):
        x, z, W = planted(n_slow=n_slow)
        found = measure(x, z, W)
        assert found["slow_latents"] == n_slow
        assert found["slow_explained_variance"] == pytest.approx(expected(n_slow), rel=0.12)
        assert abs(found["slow_explained_variance_null"]) < 0.003
        assert found["slow_ceiling_x"] == pytest.approx(expected(n_slow), rel=0.12)         # the same by regression
        assert found["slow_ceiling_mean"] > 0.3 * expected(n_slow)


def test_latents_that_cancel_count_only_through_their_sum(measure):
    """A pair of large slow latents in opposite directions, whose difference is nothing of x."""
    x, z, W = planted(n_slow=0)
    pair = 5 * np.abs(slow_signal(np.random.default_rng(1), 1))
    direction = orthogonal(np.random.default_rng(2))[:1]
    found = measure(x, np.concatenate([z, pair, pair], -1), np.concatenate([W, direction, -direction]))
    assert found["slow_latents"] == 2 and abs(found["slow_explained_variance"]) < 0.003
    x, z, W = planted()
    before = measure(x, z, W)["slow_explained_variance"]
    after = measure(x, np.concatenate([z, pair, pair], -1), np.concatenate([W, direction, -direction]))
    assert after["slow_explained_variance"] == pytest.approx(before, rel=1e-3)


def test_a_code_of_the_position_gives_nothing(measure):
    """Even where x has a part that depends on the position alone."""
    x, z, W = planted(n_slow=0)
    place = np.broadcast_to(np.exp(-np.arange(SEQ) / 20)[None, :, None], (WINDOWS, SEQ, 1))
    noisy = place * (1 + 0.1 * np.random.default_rng(3).normal(size=(WINDOWS, SEQ, 1)))
    direction = orthogonal(np.random.default_rng(2))[:1]
    found = measure(x + place @ direction, np.concatenate([z, noisy], -1), np.concatenate([W, direction]))
    assert found["slow_latents"] == 0 and abs(found["slow_explained_variance"]) < 0.003


def test_a_constant_gives_nothing(measure):
    x, z, W = planted(n_slow=0)
    constant = np.ones((WINDOWS, SEQ, 1))
    found = measure(x + 3, np.concatenate([z, constant], -1), np.concatenate([W, orthogonal(np.random.default_rng(2))[:1]]))
    assert found["slow_latents"] == 0 and abs(found["slow_explained_variance"]) < 0.003


def test_rescaling_against_the_decoder_changes_nothing(measure):
    x, z, W = planted()
    scale = np.exp(np.random.default_rng(4).normal(0, 2, D))
    before, after = measure(x, z, W), measure(x, z * scale, W / scale[:, None])
    assert after["slow_explained_variance"] == pytest.approx(before["slow_explained_variance"], rel=1e-3)


def test_a_slow_gate_with_fast_values_gives_nothing(measure):
    """Latents that are on for long, whose values change from token to token."""
    x, z, W = planted(n_slow=0)
    rng = np.random.default_rng(5)
    gates = (slow_signal(rng, 4) > 0.5) * rng.choice([-1.0, 1.0], (WINDOWS, SEQ, 4))
    z = np.concatenate([gates, z[..., 4:]], -1)
    found = measure(z @ W, z, W)
    assert abs(found["slow_explained_variance"]) < 0.003


def test_fast_latents_that_read_a_slow_part_count_for_nothing_more(measure):
    """Only latents whose values last are counted: x's slow part, split among fast-blinking latents, is not."""
    x, z, W = planted()
    blink = np.random.default_rng(6).random((WINDOWS, SEQ, D)) < 0.1
    found = measure(x, z * blink, W)
    assert found["slow_latents"] == 0 and found["slow_explained_variance"] == 0


def test_windows_shorter_than_the_lags_have_none(E, settings):
    settings(CONTEXT_LENGTH=33)
    assert E.slow_metrics(SimpleNamespace(store=None), None, None) == ({}, {})


def test_against_a_loop(E, settings):
    settings(FAR_LAGS=(2, 3))
    rng = np.random.default_rng(0)
    total, x = rng.normal(size=(6, 9, 3)), rng.normal(size=(6, 9, 3))
    total += 0.5 * x
    got = E.lagged_share(torch.from_numpy(total), torch.from_numpy(x)).mean().item()
    u, v, shares = total - total.mean((0, 1)), x - x.mean(0), []
    for lag in (2, 3):
        a = np.concatenate([u[w, t - lag] for w in range(6) for t in range(lag, 9)])
        b = np.concatenate([v[w, t] for w in range(6) for t in range(lag, 9)])
        shares.append((a @ b) ** 2 / (a @ a) / (b @ b))
    assert got == pytest.approx(np.mean(shares))
    codes = rng.random((5 * 9, 4)) * (rng.random((5 * 9, 4)) < 0.7)
    settings(SLOW_AUTOCORRELATION=0.05)
    z = codes.reshape(5, 9, 4) - codes.reshape(5, 9, 4).mean(0)
    r = [[(z[:, :-lag, i] * z[:, lag:, i]).mean(0).sum() / (z[:, :-lag, i].std(0) * z[:, lag:, i].std(0)).sum()
          for lag in (2, 3)] for i in range(4)]
    assert E.slow_latents(csr_array(codes), 9).tolist() == [bool(np.mean(values) >= 0.05) for values in r]


def test_the_exponential_mean(E):
    x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    for t in range(5):
        weights = torch.tensor([0.9 ** (t - s) for s in range(t + 1)])
        wanted = (weights[:, None] * x[:, :t + 1]).sum(1) / weights.sum()
        assert torch.allclose(E.exponential_mean(x, 0.9)[:, t], wanted, atol=1e-6)
