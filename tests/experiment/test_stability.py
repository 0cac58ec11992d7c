"""Stability, its nulls and smoothness on planted chains and against loops."""
import itertools

import numpy as np
import pytest
import torch
from scipy.sparse import csc_array

from small_saes import close

# ---- Stability ----
def chains(p01, p10, windows, seq, seed=0):
    """Two-state Markov chains [window, seq, latent], begun in their stationary state."""
    rng, p01, p10 = np.random.default_rng(seed), np.asarray(p01), np.asarray(p10)
    state = np.empty((windows, seq, len(p01)), np.int8)
    state[:, 0] = rng.random((windows, len(p01))) < p01 / (p01 + p10)
    for t in range(1, seq):
        change = rng.random((windows, len(p01)))
        state[:, t] = np.where(state[:, t - 1] == 1, change >= p10, change < p01)
    return state


def expected_stability(rho, seq, lags):
    """Of an autocorrelation rho(lag): the mean over the lags, minus that over all pairs of positions."""
    every = np.arange(1, seq)
    return rho(np.arange(lags[0], lags[1] + 1)).mean() - (rho(every) * (seq - every)).sum() / (seq - every).sum()


def by_hand(active, rate, lags, order=None):
    """(mean over pairs at these lags - mean over all pairs) of (a_t - p_t)(a_s - p_s), in units of the deviations at these
    lags, by loops; rate [seq, d]: of which the deviations are."""
    active, seq = active - active.mean(0), active.shape[1]
    active = active if order is None else active[:, order]
    deviation = np.sqrt(np.broadcast_to(rate, active.shape[1:]) * (1 - rate))
    scale = np.mean([deviation[t] * deviation[t + lag] for lag in range(lags[0], lags[1] + 1) for t in range(seq - lag)], 0)
    pairs = [(t, t + lag) for lag in range(lags[0], lags[1] + 1) for t in range(seq - lag)]
    near = np.mean([active[:, t] * active[:, s] for t, s in pairs], 0)
    every = np.mean([active[:, t] * active[:, s] for t, s in itertools.permutations(range(seq), 2)], 0)
    return (near - every) / scale


@pytest.mark.parametrize("kind", ["firing", "probability"])
def test_stability_against_a_loop(E, kind):
    rng = np.random.default_rng(0)
    active = rng.random((70, 11, 3)) if kind == "probability" else chains([0.2, 0.5, 0.1], [0.3, 0.5, 0.1], 70, 11)
    active = active.astype(np.float32)
    rate = rng.uniform(0.2, 0.6, (11, 3))
    found = torch.from_numpy(active), torch.tensor(rate).float()
    (got, between), (null, r) = E.excess_autocorrelation(*found, (2, 4)), E.autocorrelation_null(*found, (2, 4), 1)
    assert null.shape == (1, 3) and got.shape == between.shape == (70, 3)
    centred, deviation = active - active.mean(0), np.sqrt(rate * (1 - rate))
    for lag in range(1, 11):
        wanted = (centred[:, :-lag] * centred[:, lag:]).mean((0, 1)) / (deviation[:-lag] * deviation[lag:]).mean(0)
        assert r[lag - 1].numpy() == pytest.approx(wanted, abs=1e-5)
    assert got.numpy() == pytest.approx(by_hand(active, rate, (2, 4)), abs=1e-5)
    pairs = [(t, t + lag) for lag in (2, 3, 4) for t in range(11 - lag)]
    raw = np.mean([centred[:, t] * centred[:, s] for t, s in pairs], 0) / np.mean([deviation[t] * deviation[s] for t, s in pairs], 0)
    assert (got + between).numpy() == pytest.approx(raw, abs=1e-5)


def test_the_null_is_the_mean_over_all_permutations(E):
    active = np.random.default_rng(0).integers(0, 2, (6, 5, 4)).astype(np.float32)
    rate = np.full((5, 4), 0.5)
    wanted = np.mean([by_hand(active, rate, (1, 2), list(order)) for order in itertools.permutations(range(5))], 0)
    assert wanted == pytest.approx(0, abs=1e-6)         # what stability subtracts is exactly that null
    torch.manual_seed(0)
    draws, _ = E.autocorrelation_null(torch.from_numpy(active), torch.tensor(rate).float(), (1, 2), 4000)
    assert draws.shape == (4000, 4)
    assert (draws.mean(0).abs() < 4 * draws.std(0) / 4000 ** 0.5).all()


def test_every_draw_is_a_stability_of_permuted_positions(E):
    """One permutation for 64 windows and all of their latents; another for the next."""
    one = np.array([[1, 1, 0, 0], [0, 0, 1, 1]], np.float32)[..., None].repeat(3, 2)     # so that every position has rate 1/2
    active, half = np.concatenate([one] * 64), np.full((4, 3), 0.5)
    possible = {round(float(by_hand(one, half, (1, 1), list(order)).mean(0)[0]), 4) for order in itertools.permutations(range(4))}
    torch.manual_seed(0)
    draws, _ = E.autocorrelation_null(torch.from_numpy(active), torch.full((4, 3), 0.5), (1, 1), 50)
    means = {round((a + b) / 2, 4) for a in possible for b in possible}
    assert torch.equal(draws[:, 0], draws[:, 1]) and torch.equal(draws[:, 0], draws[:, 2])
    assert {round(value, 4) for value in draws[:, 0].tolist()} == means         # the two halves apart


RATES = ([0.02, 0.05, 0.2, 0.05], [0.08, 0.1, 0.3, 0.95])       # the last has no memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stability_of_planted_chains(E, dtype):
    """Autocorrelation (1 - p01 - p10)^lag, over the null of such finite windows: by its formula and by permuting."""
    assert E.STABILITY_LAGS == (5, 16)
    state, rng = chains(*RATES, 800, 100), np.random.default_rng(1)
    active = torch.from_numpy(state).to(dtype)
    rate = active.float().mean(0)
    torch.manual_seed(0)
    got, (draws, _) = E.excess_autocorrelation(active, rate, (5, 16))[0], E.autocorrelation_null(active, rate, (5, 16), 4)
    assert got.shape == (800, 4) and draws.shape == (4, 4)
    permuted = np.take_along_axis(state, rng.random((800, 100, 1)).argsort(1), 1).astype(np.float32)
    a, p = state.astype(np.float32), rate.numpy().mean(0)

    def r(values):          # mean autocorrelation over the lags
        return np.mean([(values[:, :-lag] * values[:, lag:]).mean((0, 1)) - p ** 2 for lag in range(5, 17)],
                       0) / (p * (1 - p))
    mean = got.mean(0).numpy()
    for i, (p01, p10) in enumerate(zip(*RATES)):
        rho = 1 - p01 - p10
        wanted = expected_stability(lambda lag: rho ** lag.astype(float), 100, (5, 16))
        assert mean[i] == pytest.approx(wanted, abs=0.02), rho
    assert mean == pytest.approx(r(a) - r(permuted), abs=0.02)
    assert mean[0] > 0.15 and abs(mean[3]) < 0.005
    assert draws.mean(0).abs().max() < 0.005            # the draws are centred on the exact mean


def test_stability_of_noise_is_0_within_its_null(E):
    rng = np.random.default_rng(0)
    active = torch.from_numpy((rng.random((60, 127, 200)) < rng.random(200) * 0.2 + 0.02).astype(np.float32))
    torch.manual_seed(0)
    found = active.bfloat16(), active.mean(0)
    got, (draws, _) = E.excess_autocorrelation(*found, (5, 16))[0], E.autocorrelation_null(*found, (5, 16), 50)
    z = ((got.mean(0) - draws.mean(0)) / draws.std(0)).numpy()
    assert abs(z.mean()) < 0.3 and 0.8 < z.std() < 1.25 and np.abs(z).max() < 5
    assert got.mean(0).abs().max() < 0.03


def test_slow_latents_keep_their_stability_when_windows_are_turned(E):
    """Blocks of 32 positions: autocorrelation 1 - lag / 32. A circular shift of each window changes little."""
    rng, seq = np.random.default_rng(0), 127
    blocks = rng.random((400, 6, 5)) < 0.2
    phase = rng.integers(0, 32, 400)
    active = np.stack([np.repeat(b, 32, 0)[s:s + seq] for b, s in zip(blocks, phase)]).astype(np.float32)
    turned = np.stack([np.roll(a, s, 0) for a, s in zip(active, rng.integers(0, seq, 400))])
    wanted = expected_stability(lambda lag: np.maximum(1 - lag / 32, 0), seq, (5, 16))
    found = [E.excess_autocorrelation(torch.from_numpy(a), torch.from_numpy(a).mean(0), (5, 16))[0].mean(0).numpy()
             for a in (active, turned)]
    assert wanted > 0.4
    assert found[0] == pytest.approx(wanted, abs=0.05)
    assert (found[1] < found[0]).all() and (found[1] > 0.8 * found[0]).all()    # lost is what lies across the seam


def test_a_latent_that_knows_its_position_is_not_stable(E):
    """On in the first 20 positions of every window, or there with a high rate: slow, but nothing of the text."""
    rng = np.random.default_rng(0)
    rate = np.where(np.arange(100) < 20, 0.94, 0.05)
    active = np.stack([rng.random((300, 100)) < rate, np.broadcast_to(np.arange(100) < 20, (300, 100))], -1)
    found = torch.from_numpy(active.astype(np.float32))
    got, between = E.excess_autocorrelation(found, found.mean(0), (5, 16))
    assert got.mean(0).abs().max() < 0.01 and between.mean(0).abs().max() < 0.02
    one_rate = active.mean((0, 1))                 # what a single rate for all positions would have given
    near = np.mean([(active[:, :-lag] * active[:, lag:]).mean((0, 1)) - one_rate ** 2 for lag in range(5, 17)], 0)
    assert (near / (one_rate * (1 - one_rate)) > 0.25).all()


def test_a_latent_of_whole_documents_has_all_its_autocorrelation_between_windows(E):
    on = np.random.default_rng(0).random(400) < 0.3
    found = torch.from_numpy(np.broadcast_to(on[:, None, None], (400, 60, 1)).astype(np.float32))
    got, between = E.excess_autocorrelation(found, found.mean(0), (5, 16))
    assert got.mean().item() == pytest.approx(0, abs=1e-4) and between.mean().item() == pytest.approx(1, abs=0.01)


# ---- What tokens alone explain ----
def fire_given_token(E, active, tokens, fold):
    """Of tensors active [window, seq, d], tokens [window, seq], fold [window]."""
    sparse = csc_array(active.float().flatten(0, 1).numpy())
    return torch.from_numpy(E.fire_given_token(sparse, tokens.numpy(), fold.numpy()))


def slow_tokens(windows=300, seq=100, vocabulary=12, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocabulary, (windows, seq))
    stay = rng.random((windows, seq)) < 0.9
    for t in range(1, seq):
        tokens[:, t] = np.where(stay[:, t], tokens[:, t - 1], tokens[:, t])
    return torch.from_numpy(tokens)


def test_what_is_a_function_of_the_token_is_explained_by_it(E):
    """Three latents by the token, slow with it; three as slow and blind to it."""
    tokens = slow_tokens()
    by_token = torch.stack([(tokens < 2), (tokens == 5), (tokens % 3 == 0)], -1).float()
    blind = torch.from_numpy(chains([0.02] * 3, [0.08] * 3, 300, 100)).float()
    active = torch.cat([by_token, blind], -1)
    rate, fold = active.float().mean(0), torch.arange(300) % 2 == 0
    expected = fire_given_token(E, active, tokens, fold)
    assert expected.shape == active.shape
    assert (expected[..., :3].float() - by_token).abs().max() < 0.01
    assert (expected[..., 3:].float() - rate.mean(0)[3:]).abs().max() < 0.15
    observed, surrogate = (E.excess_autocorrelation(a, rate, (5, 16))[0].mean(0) for a in (active, expected))
    assert observed.min() > 0.15
    assert surrogate[:3].tolist() == pytest.approx(observed[:3].tolist(), rel=0.02)
    assert surrogate[3:].abs().max() < 0.01


def test_fire_given_token_counts_in_the_other_fold(E):
    """Token 3: 4 times and 3 firings in the second fold, twice and no firing in the first; 9 is in the first alone. Mean
    rate: 7 of 12."""
    tokens = torch.tensor([[3, 9, 3], [3, 3, 4], [3, 3, 4], [9, 9, 4]])
    active = torch.tensor([[0.0, 1, 0], [1, 1, 0], [1, 0, 1], [1, 1, 0]])[..., None]
    fold, rate = torch.tensor([True, False, False, True]), 7 / 12
    expected = fire_given_token(E, active, tokens, fold)[..., 0]
    first, second, four = (3 + rate) / 5, (0 + rate) / 3, (1 + rate) / 3
    own = (0 + rate) / 2                                # token 4 in the first fold: once, silent
    wanted = [[first, rate, first], [second, second, own], [second, second, own], [rate, rate, four]]
    assert torch.allclose(expected, torch.tensor(wanted))


def test_fire_given_token_against_a_loop(E):
    rng = np.random.default_rng(0)
    tokens, fold = rng.integers(0, 8, (20, 6)) * 1000, np.arange(20) % 3 == 0
    active = (rng.random((20, 6, 3)) < 0.3).astype(np.float32)
    rate = active.mean((0, 1))
    got = fire_given_token(E, *map(torch.from_numpy, (active, tokens, fold))).numpy()
    for w, t in itertools.product(range(20), range(6)):
        same = tokens[fold != fold[w]] == tokens[w, t]
        wanted = (active[fold != fold[w]][same].sum(0) + rate) / (same.sum() + 1)
        assert got[w, t] == pytest.approx(wanted, rel=1e-5)


# ---- Smoothness ----
def test_smoothness_by_hand(E):
    """|dx| = 2, 1. Latent 0 moves by 3, 2: at most 2 a unit of x, of a scale of 4. Latent 1 by 0, 4, of 2."""
    z = torch.tensor([[[0.0, 0.0], [3.0, 0.0], [1.0, 4.0]]])
    x = torch.tensor([[[0.0, 0.0], [0.0, 2.0], [1.0, 2.0]]])
    assert E.smoothness(z, x, 1.0).tolist() == pytest.approx([6.0])
    assert E.smoothness(z, x, torch.tensor([4.0, 2.0])).tolist() == pytest.approx([2.5])


def test_smoothness_is_that_of_each_window_and_free_of_scale(E):
    g = torch.Generator().manual_seed(0)
    z, x = torch.rand(130, 8, 5, generator=g), torch.randn(130, 8, 3, generator=g)
    scale = torch.rand(5, generator=g) + 0.5
    got, wanted = E.smoothness(z, x, scale), []
    for w in range(130):
        wanted.append(sum(max((abs(z[w, t + 1, i] - z[w, t, i]) / (x[w, t + 1] - x[w, t]).norm()).item()
                              for t in range(7)) / scale[i].item() for i in range(5)))
    assert got.tolist() == pytest.approx(wanted, rel=1e-4)
    for factor in (0.01, torch.tensor([1.0, 100.0, 0.1, 3.0, 7.0])):
        close(E.smoothness(factor * z, x, factor * scale), got, 1e-4)
    assert not torch.allclose(E.smoothness(0.5 * z, x, 1.0), E.smoothness(z, x, 1.0))
