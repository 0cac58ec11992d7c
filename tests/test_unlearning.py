"""Unlearning: temporal_context's buffer, what it trains on, and the clamps on planted latents, matches and models."""
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from copies import copy_template, results, run as run_copy
from scipy.sparse import csr_array
from sklearn.metrics import roc_auc_score
from test_temporal import (D_IN, D_SAE, batch_of, close, edited, make, one_thread, padding,  # noqa: F401
                           random_batch, settings)


# ---- temporal_context ----
def opened(E, seed=0, everything=True):
    """With open gates, attention that shows, and in evaluation a threshold that every latent passes: z = ReLU(pre)."""
    sae, g = make(E, "temporal_context", seed), torch.Generator().manual_seed(seed + 50)
    E.anneal(sae, sae.curriculum[0], 0.0)
    with torch.no_grad():
        for name, value in sae.state_dict().items():
            if name in ("W_q", "W_k", "P"):
                value.mul_(5.0)
        sae.gate.copy_(torch.randn(sae.gate.shape, generator=g))
    if everything:
        sae.eval().threshold.fill_(-1e8)
    return sae


@pytest.mark.parametrize("places", ["learned", "sinusoidal"])
@pytest.mark.parametrize("padded", [False, True])
def test_context_begins_as_batch_topk(E, settings, padded, places):  # noqa: F811
    settings(BUFFER_POSITIONS=places)
    sae, plain = make(E, "temporal_context"), make(E, "batch_topk")
    plain.load_state_dict({n: v for n, v in sae.state_dict().items() if n in plain.state_dict()})
    batch = random_batch(E, mask=padding() if padded else None)
    stage, = sae.curriculum
    E.anneal(sae, stage, 0.0)
    assert stage.epochs == 20 and "consistency" not in stage.weights and "contrastive" not in stage.weights
    for mode in (True, False):
        got, wanted = (one.train(mode).encode(batch).dense().detach() for one in (sae, plain))
        assert wanted.any() and torch.equal(got > 0, wanted > 0)
        close(got, wanted, 1e-6)
    E.train_step(sae.train(), E.Adam(sae, 1e-2), batch, stage, 0.0)
    assert sae.gate.any()                                       # from the first step on


@pytest.mark.parametrize("buffer", [1, 2, 4, 6])
def test_latents_see_their_buffer_alone(E, edited, buffer):  # noqa: F811
    """Gradients of the latents at (row, t): positions t - BUFFER + 1 to t of that row."""
    module = E if buffer == E.BUFFER else edited(BUFFER=buffer)
    sae, x = opened(module), random_batch(module, seq=12).x.requires_grad_()
    for row, t in ((0, 0), (1, 2), (2, 7), (3, 11)):
        weight = torch.randn(D_SAE, generator=torch.Generator().manual_seed(t))
        z = sae.encode(batch_of(module, x)).dense()
        reached = torch.autograd.grad(z[row, t] @ weight, x)[0].any(-1)
        wanted = torch.zeros(4, 12, dtype=torch.bool)
        wanted[row, max(0, t - buffer + 1):t + 1] = True
        assert torch.equal(reached, wanted)


def test_padding_is_in_no_buffer(E):
    """Neither the padding at a row's end nor positions before it that do not count (TRAIN_POSITIONS)."""
    sae, mask = opened(E), padding()
    mask[0, :3] = False
    x = random_batch(E).x.requires_grad_()
    z = sae.encode(batch_of(E, x, mask)).dense()
    assert not z[~mask].any()
    reached = torch.autograd.grad(z[mask].square().sum(), x)[0].any(-1)
    assert torch.equal(reached, mask)
    rubbish = torch.where(mask[..., None], x, 30.0)
    assert torch.equal(sae.encode(batch_of(E, rubbish, mask)).dense(), z)
    alone = sae.encode(batch_of(E, x[:1, 3:])).dense()          # as if the row began there
    close(z[:1, 3:].detach(), alone.detach(), 1e-6)


def test_sinusoidal_positions_by_hand(E, settings):  # noqa: F811
    settings(BUFFER_POSITIONS="sinusoidal")
    P = E.TemporalContext(4, 8, 2).P
    wanted = [[f(at * rate) / math.sqrt(2) for f in (math.sin, math.cos) for rate in (1, 0.01)] for at in range(4)]
    assert P.tolist() == [pytest.approx(row, abs=1e-6) for row in wanted]
    for d_in in (2, 10, 192):
        P = E.TemporalContext(d_in, 8, 2).P
        assert P.shape == (4, d_in) and torch.allclose(P.norm(dim=1), torch.ones(4), atol=1e-5)
        assert torch.cdist(P, P).add(torch.eye(4)).min() > 1e-2
    assert E.TemporalContext(5, 8, 2).P.shape == (4, 5)


@pytest.mark.parametrize("places", ["learned", "sinusoidal"])
def test_learned_positions_learn_and_fixed_ones_do_not(E, settings, places, tmp_path):  # noqa: F811
    settings(BUFFER_POSITIONS=places)
    learned = places == "learned"
    sae = opened(E, everything=False)
    assert ("P" in dict(sae.named_parameters())) == learned and sae.P.requires_grad == learned
    assert "P" in sae.state_dict()
    before, optimizer = sae.P.detach().clone(), E.Adam(sae, 1e-2)
    for _ in range(3):
        E.train_step(sae, optimizer, random_batch(E), sae.curriculum[0], 0.5)
    assert torch.equal(sae.P, before) != learned
    torch.save(sae.state_dict(), tmp_path / "checkpoint.pt")
    other = opened(E, seed=1)
    other.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    other.threshold.fill_(-1e8)
    sae.eval().threshold.fill_(-1e8)
    assert torch.equal(other.P, sae.P)
    assert torch.equal(other.encode(random_batch(E)).dense(), sae.encode(random_batch(E)).dense())


@pytest.mark.parametrize("places, ablate", [("learned", ()), ("sinusoidal", ()), ("learned", ("positions",)),
                                            ("sinusoidal", ("positions",))])
def test_order_in_the_buffer_matters_by_positions_alone(E, settings, places, ablate):  # noqa: F811
    settings(BUFFER_POSITIONS=places, ABLATE=ablate)
    sae, batch = opened(E), random_batch(E, seq=4)
    assert ("P" in sae.state_dict()) != bool(ablate)
    other = batch._replace(x=batch.x[:, [2, 0, 1, 3]])
    change = (sae.encode(batch).dense()[:, 3] - sae.encode(other).dense()[:, 3]).abs().max()
    assert change < 1e-5 if ablate else change > 1e-2


@pytest.mark.parametrize("places", ["learned", "sinusoidal"])
def test_ablated_attention_leaves_batch_topk(E, settings, places):  # noqa: F811
    settings(ABLATE=("attention",), BUFFER_POSITIONS=places)
    sae, plain = make(E, "temporal_context"), make(E, "batch_topk")
    E.anneal(sae, sae.curriculum[0], 0.5)
    assert set(sae.state_dict()) == set(plain.state_dict()) and sae.parameters_of_interest() == {}
    batch = random_batch(E, mask=padding())
    assert torch.equal(sae.encode(batch).dense(), plain.encode(batch).dense())


# ---- TRAIN_ON ----
N_TRAIN, SIZE = 24, 4
OF_FORGET = np.arange(N_TRAIN) % 3 == 0


@pytest.fixture
def store(make_store):
    """24 training windows, every third of "secret", and 8 held-out ones."""
    g = torch.Generator().manual_seed(0)
    store = make_store(torch.randn(N_TRAIN + 8, 9, D_IN, generator=g) + 0.3, N_TRAIN)
    store.windows = store.windows._replace(domains=["open" if i % 3 else "secret" for i in range(N_TRAIN + 8)])
    return store


@pytest.mark.parametrize("train_on, wanted", [
    ("both", np.arange(N_TRAIN)), ("forget", np.flatnonzero(OF_FORGET)), ("retain", np.flatnonzero(~OF_FORGET))])
def test_pool_of_training_windows(store, train_on, wanted):
    assert store.windows.train_pool(train_on, "secret").tolist() == wanted.tolist()


@pytest.mark.parametrize("train_on", ["forget", "retain"])
def test_an_unknown_domain_to_forget(E, store, train_on):
    with pytest.raises(E.corpus.DataError, match="FORGET = 'secrets'.*open, secret"):
        store.windows.train_pool(train_on, "secrets")
    assert len(store.windows.train_pool("both", "secrets")) == N_TRAIN
    alone = store.windows._replace(domains=["secret"] * (N_TRAIN + 8))
    assert len(alone.train_pool("forget", "secret")) == N_TRAIN
    with pytest.raises(E.corpus.DataError, match="FORGET = 'secret'"):
        alone.train_pool("retain", "secret")


@pytest.mark.parametrize("pool", [np.array([3, 5, 7, 11, 20, 21, 22]), np.arange(8) * 3, np.array([9])])
def test_batches_come_from_the_pool_alone_and_evenly(E, settings, store, tmp_path, pool):  # noqa: F811
    store.windows = store.windows._replace(domains=["secret" if i in pool else "open" for i in range(N_TRAIN + 8)])
    settings(TRAIN_ON="forget", FORGET="secret")
    seen = trained_on(E, store, make(E, "topk"), tmp_path / "state.pt", 1)[0]
    for ids in np.split(seen, 3):                               # an epoch each
        assert len(ids) == N_TRAIN and set(ids) == set(pool)
        counts = np.unique(ids, return_counts=True)[1]
        assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("n, size", [(24, 4), (26, 4), (7, 7)])
def test_training_on_both_keeps_the_order(E, n, size):
    """A permutation of its own per seed and epoch, cut into batches."""
    for seed, step in ((0, 0), (3, 5), (3, 11)):
        epoch, place = divmod(step, n // size)
        order = np.random.default_rng((seed, epoch)).permutation(n)
        got = E.batch_ids(seed, step, n, size)
        assert got.tolist() == order[place * size:(place + 1) * size].tolist()


def trained_on(E, store, sae, path, seed=0):  # noqa: F811
    """Three epochs of training -> the windows of its steps in order, those of the first batch, steps planned, done."""
    seen, first, step = [], [], E.train_step

    def watched(trained, optimizer, batch, *rest):
        if trained is sae:                                      # and not the copy whose speed is measured
            seen.extend(batch.doc_ids.tolist())
        return step(trained, optimizer, batch, *rest)

    sae.initialise = lambda batch: first.extend(batch.doc_ids.tolist())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(E, "train_step", watched)
        stage = E.Stage("one", 3, {"reconstruction": 1.0})
        _, planned, done = E.train(sae, store, [stage], seed, SIZE, 10 ** 12, path)
    return np.array(seen), first, planned, done


def test_training_keeps_to_the_pool_and_its_steps(E, settings, store, tmp_path):  # noqa: F811
    """Steps planned and done do not depend on TRAIN_ON; the first batch is the pool's too."""
    for train_on in ("both", "forget", "retain"):
        settings(TRAIN_ON=train_on, FORGET="secret")
        seen, first, planned, done = trained_on(E, store, make(E, "topk"), tmp_path / f"{train_on}.pt")
        pool = set(store.windows.train_pool(train_on, "secret"))
        assert len(first) == SIZE and set(first) <= pool
        assert len(seen) == 3 * N_TRAIN and set(seen) == pool
        assert planned == done == [18]


# ---- Selection of latents ----
def planted_codes(seed=0, n=4_000):
    """(codes [n, 7], forget [n]): latent 3 fires on FORGET only, 0 nearly everywhere and most on FORGET, 5 elsewhere
    only, 1 rarely anywhere, 6 never, 2 and 4 alike on both."""
    rng, forget = np.random.default_rng(seed), np.arange(n) % 2 == 0
    rates = {0: (0.9, 0.6), 1: (0.004, 0.004), 2: (0.2, 0.2), 3: (0.2, 0), 4: (0.1, 0.1), 5: (0, 0.3)}
    z = np.zeros((n, 7))
    for latent, (there, elsewhere) in rates.items():
        z[:, latent] = (rng.random(n) < np.where(forget, there, elsewhere)) * (0.5 + rng.random(n))
    return z, forget


def test_latents_of_forget_come_first(E, settings):  # noqa: F811
    z, forget = planted_codes()
    for selection in ("ratio", "frequency"):
        settings(SELECTION=selection)
        ranked = E.corpus.ranked_latents(csr_array(z), forget, E.SELECTION, E.RETAIN_FREQUENCY, 6)[0]
        assert sorted(ranked) == list(range(7)) and ranked[0] == 3
        assert E.corpus.ranked_latents(csr_array(z), ~forget, E.SELECTION, E.RETAIN_FREQUENCY, 6)[0][0] == 5
        place = ranked.tolist().index
        if selection == "frequency":                    # frequent elsewhere: behind the rare one, however frequent here
            assert place(1) == 1 and place(0) > 1
        else:
            assert place(0) == 1 and place(5) > place(2)


def test_ratio_by_a_loop(E, settings):  # noqa: F811
    """By energy: a latent that fires as often but more strongly on FORGET goes before."""
    settings(SELECTION="ratio")
    rng = np.random.default_rng(1)
    z, forget = rng.random((300, 12)) * (rng.random((300, 12)) < 0.3), rng.random(300) < 0.3
    z[forget, 4] *= 3
    there, elsewhere = ([np.mean([z[t, i] ** 2 for t in np.flatnonzero(part)]) for i in range(12)]
                        for part in (forget, ~forget))
    ratios = np.array(there) / (np.array(elsewhere) + 0.01 * np.mean(there))
    ranked = E.corpus.ranked_latents(csr_array(z), forget, E.SELECTION, E.RETAIN_FREQUENCY, 6)[0]
    assert ranked[0] == 4 and ranked.tolist() == np.argsort(-ratios).tolist()


# ---- The matcher ----
def windows_of_two(n, seed, shuffled=False):
    """[n, 6, 4] codes with latent 1 (A) and 4 (B) once each among noise, A first where it is FORGET's."""
    rng, x = np.random.default_rng(seed), np.zeros((n, 6, 4), np.float32)
    forget = rng.random(n) < 0.5
    for row, label in zip(x, forget):
        first, second = sorted(rng.choice(4, 2, replace=False))
        a, b = (first, second) if label else (second, first)
        row[1, a] = row[4, b] = 1.0
        row[[0, 2, 3, 5]] = rng.random((4, 4)) * (rng.random((4, 4)) < 0.2)
        if shuffled:
            row[:] = row[:, rng.permutation(4)]
    return torch.from_numpy(x), torch.from_numpy(forget)


def auroc(E, fitted, fresh):
    return roc_auc_score(fresh[1].numpy(), E.corpus.fit_matcher(E.MATCHER, *fitted)(fresh[0]).numpy())


@pytest.mark.parametrize("matcher", ["logistic", "attention"])
def test_a_matcher_sees_an_order(E, settings, matcher):  # noqa: F811
    """Not where the windows' positions are shuffled, with the same latents in them."""
    settings(MATCHER=matcher)
    assert auroc(E, windows_of_two(1_000, 0), windows_of_two(500, 1)) > 0.95
    assert 0.35 < auroc(E, windows_of_two(1_000, 0, True), windows_of_two(500, 1, True)) < 0.65


@pytest.mark.parametrize("matcher", ["logistic", "attention"])
def test_a_matcher_finds_the_one_latent_that_tells(E, settings, matcher):  # noqa: F811
    """FORGET's windows, one in eight, have latent 2 at one of their positions; the classes weigh alike."""
    settings(MATCHER=matcher)

    def planted(seed, n=800):
        rng = np.random.default_rng(seed)
        x, forget = rng.random((n, 5, 4)) * (rng.random((n, 5, 4)) < 0.3), np.arange(n) % 8 == 0
        x[:, 2] = 0.0
        x[np.flatnonzero(forget), 2, rng.integers(0, 4, forget.sum())] = 1.0
        return torch.from_numpy(x).float(), torch.from_numpy(forget)

    x, forget = planted(1)
    with torch.no_grad():                                       # as evaluations run
        match = E.corpus.fit_matcher(E.MATCHER, *planted(0))
    found = match(x)
    assert found.shape == (800,) and not found.requires_grad and (found > 0).all() and (found < 1).all()
    assert roc_auc_score(forget.numpy(), found.numpy()) > 0.95
    assert found[forget].mean() > 0.5 > found[~forget].mean()
    assert torch.allclose(match(x.view(8, 100, 5, 4)), found.view(8, 100), atol=1e-6)


@pytest.mark.parametrize("matcher", ["logistic", "attention"])
def test_a_matcher_of_nothing_is_at_chance(E, settings, matcher):  # noqa: F811
    settings(MATCHER=matcher)
    x, forget = torch.rand(2_000, 5, 4), torch.arange(2_000) % 2 == 0
    assert 0.4 < auroc(E, (x[:1_000], forget[:1_000]), (x[1_000:], forget[1_000:])) < 0.6


# ---- McNemar's test of answers ----
def test_mcnemar_by_hand(E):
    """Of six answers that changed one turned right: p = 2 (1 + 6) / 2^6; those that stay have no say."""
    before = np.array([True] * 5 + [False] + [True, False] * 20)
    now = np.array([False] * 5 + [True] + [True, False] * 20)
    assert E.corpus.mcnemar(now, before) == pytest.approx(14 / 64)
    assert E.corpus.mcnemar(before, before) == 1.0
    found = E.corpus.compared({"unclamped": before, "standard": now}, "_q")
    assert found == {"unclamped_q": before.mean(), "standard_q": now.mean(), "standard_q_p": pytest.approx(14 / 64)}


# ---- The gate ----
def naive_gate(match, n):
    """By loops: the greatest mean of n matches in a row that end at s <= t; 0 before the first n."""
    found = torch.zeros_like(match)
    for row in range(len(match)):
        for t in range(n - 1, match.shape[1]):
            found[row, t] = max(match[row, s - n + 1:s + 1].mean() for s in range(n - 1, t + 1))
    return found


def test_gate_by_hand(E):
    assert E.GATE_TOKENS == 32
    match = torch.zeros(2, 80)
    match[0, 10:42] = 1.0                       # 32 in a row: the mean rises to 1 at 41 and stays
    match[1, 50:58] = 0.5
    found = E.corpus.gate(match, 32)
    assert not found[0, :31].any()
    assert found[0, 31:42].tolist() == pytest.approx([(t - 9) / 32 for t in range(31, 42)])
    assert (found[0, 41:] == 1).all()
    assert not found[1, :50].any() and found[1, 57:].tolist() == pytest.approx([8 * 0.5 / 32] * 23)


@pytest.mark.parametrize("seq", [32, 33, 90])
def test_gate_against_loops(E, seq):
    match = torch.rand(3, seq, generator=torch.Generator().manual_seed(seq))
    close(E.corpus.gate(match, 32), naive_gate(match, 32), 1e-5)
    assert (E.corpus.gate(match, 32).diff() >= 0).all()


def test_gate_is_causal_and_padding_before_never_dilutes(E):
    match = torch.rand(3, 70, generator=torch.Generator().manual_seed(0))
    found, changed = E.corpus.gate(match, 32), match.clone()
    changed[:, 45:] = 1 - changed[:, 45:]
    after = E.corpus.gate(changed, 32)
    assert torch.equal(after[:, :45], found[:, :45]) and not torch.equal(after, found)
    for pad in (1, 40, 200):
        behind = E.corpus.gate(torch.cat([torch.zeros(3, pad), match], 1), 32)[:, pad:]
        assert (behind >= found - 1e-6).all()


def test_too_few_positions_open_no_gate(E):
    for seq in (1, 8, 31):
        assert torch.equal(E.corpus.gate(torch.ones(2, seq), 32), torch.zeros(2, seq))
    assert E.corpus.gate(torch.ones(2, 32), 32)[:, -1].tolist() == [1.0, 1.0]


# ---- Edits by hand ----
def bare(E, sae, clamped, q95, matchers={}, thresholds={}, **others):
    """An Unlearner whose selection, matchers and thresholds are a test's; the matcher sees all latents."""
    unlearner = E.Unlearner.__new__(E.Unlearner)
    matcher = E.corpus.Matcher(E.MATCHER, E.MATCHER_WINDOW, E.GATE_TOKENS, np.arange(sae.d_sae), torch.tensor(q95))
    matcher.matchers, matcher.thresholds = matchers, thresholds
    everything = {"sae": sae, "clamped": {"forget": np.array(clamped), "random_latents": np.array([1])},
                  "matcher": matcher, "q95": torch.tensor(q95)}
    for name, value in (everything | others).items():
        setattr(unlearner, name, value)
    return unlearner


@pytest.fixture
def three(E):
    """z = ReLU(x . (1, 0)), ReLU(x . (0, 1)), ReLU(x . (.6, .8)) in two dimensions."""
    sae = E.TopK(2, 3, 3).eval().requires_grad_(False)
    sae.W_dec.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    sae.W_enc.data = sae.W_dec.data.t().contiguous()
    return sae


POINTS = torch.tensor([[[1.0, 0.5], [-1.0, 2.0], [-1.0, -1.0]]])        # z = 1 .5 1; 0 2 1; none


def test_standard_clamp_by_hand(E, three):
    """Latents 0 and 2 at half of their q95 of 2 and 4, below zero, where they fire: (-1 - 1) (1, 0) +
    (-2 - 1) (.6, .8), (-2 - 1) (.6, .8), nothing. A latent that nobody clamps and the SAE's error stay as they are."""
    unlearner = bare(E, three, [0, 2], [2.0, 9.0, 4.0])
    delta = unlearner.edit("standard", 0.5)(batch_of(E, POINTS))
    close(delta, torch.tensor([[[-3.8, -2.4], [-1.8, -2.4], [0.0, 0.0]]]))
    delta = unlearner.edit("random_latents", 2.0)(batch_of(E, POINTS))      # latent 1: (-18 - .5), (-18 - 2)
    close(delta, torch.tensor([[[0.0, -18.5], [0.0, -20.0], [0.0, 0.0]]]))


def test_zero_strength_is_ablation(E, three):
    delta = bare(E, three, [1], [2.0, 9.0, 4.0]).edit("standard", 0.0)(batch_of(E, POINTS))
    close(delta, torch.tensor([[[0.0, -0.5], [0.0, -2.0], [0.0, 0.0]]]))


def test_a_clamp_moves_x_along_clamped_decoder_rows_only(E):
    sae = make(E, "topk").eval().requires_grad_(False)
    batch, clamped = random_batch(E, rows=3, seq=7), [3, 11, 30]
    q95 = torch.rand(D_SAE).tolist()
    delta, z = bare(E, sae, clamped, q95).edit("standard", 1.5)(batch), sae.encode(batch).dense()
    for row in range(3):
        for t in range(7):
            wanted = sum(((-1.5 * q95[i] - z[row, t, i]) * sae.W_dec[i] for i in clamped if z[row, t, i] > 0),
                         torch.zeros(D_IN))
            assert torch.allclose(delta[row, t], wanted, atol=1e-5)
    fires = (z[..., clamped] > 0).any(-1)
    assert fires.any() and not fires.all() and torch.equal(delta.any(-1), fires)


@pytest.mark.parametrize("back", [0, 1, 3])
def test_pattern_clamps_where_its_window_matches(E, settings, three, back):  # noqa: F811
    """A matcher that looks `back` positions back in its window, for latent 1 with log(1 + z / q95) above .5."""
    settings(MATCHER_WINDOW=4)
    x = torch.tensor([[1.0, 9.0], [1.0, -1.0], [1.0, -1.0], [1.0, 9.0], [1.0, -1.0], [1.0, -1.0]])[None]
    unlearner = bare(E, three, [0], [1.0, 9.0, 1.0], thresholds={"pattern": 0.5}, matchers={
        "pattern": lambda windows: windows[..., 1, -1 - back]})
    delta = unlearner.edit("pattern", 1.0)(batch_of(E, x))
    wanted = torch.zeros(1, 6, 2)
    wanted[0, [at for at in (back, 3 + back) if at < 6], 0] = -2.0
    close(delta, wanted)
    unlearner.matcher.thresholds["pattern"] = math.log(2) + 1e-4
    assert not unlearner.edit("pattern", 1.0)(batch_of(E, x)).any()     # above the threshold, not at it


def test_hybrid_clamps_after_the_gate_has_opened(E, three):
    """Row 0 matches everywhere, row 1 never, row 2 in its first 20 positions: too few."""
    x = torch.ones(3, 60, 2)
    x[1, :, 1], x[2, 20:, 1] = -1.0, -1.0
    unlearner = bare(E, three, [0], [1.0, 1.0, 1.0], thresholds={"hybrid": 0.9}, matchers={
        "pattern": lambda windows: (windows[..., 1, -1] > 0).float()})
    delta = unlearner.edit("hybrid", 1.0)(batch_of(E, x))
    wanted = torch.zeros(3, 60, 2)
    wanted[0, 31:, 0] = -2.0                    # with the 32nd match
    close(delta, wanted)
    x[2, 23:, 1] = 1.0                          # three are missing: 29 of 32 is above .9, from the 32nd on
    x[0, 32:, 1] = -1.0                         # nothing matches any more: once open, the gate stays so
    delta = unlearner.edit("hybrid", 1.0)(batch_of(E, x))
    wanted[2, 31:, 0] = -2.0
    close(delta, wanted)


def test_random_directions_keep_the_norms(E):
    sae, batch = make(E, "topk").eval().requires_grad_(False), random_batch(E, rows=3, seq=7)
    unlearner = bare(E, sae, [3, 11, 30], [1.0] * D_SAE)
    standard, other = (unlearner.edit(name, 2.0)(batch) for name in ("standard", "random_directions"))
    close(other.norm(dim=-1), standard.norm(dim=-1), 1e-5)
    moved = standard.any(-1)
    assert F.cosine_similarity(standard, other, dim=-1)[moved].abs().max() < 0.99


def test_projection_by_hand(E, three):
    """Along (.6, .8) and from (1, 1): strength 1 leaves nothing, 1 / 2 half, 2 turns it round; across all is kept."""
    direction, rest = torch.tensor([0.6, 0.8]), torch.ones(2)
    unlearner = bare(E, three, [0], [1.0] * 3, direction=direction, rest=rest)
    before = (POINTS - rest) @ direction
    for strength in (0.5, 1.0, 2.0):
        moved = POINTS + unlearner.edit("projection", strength)(batch_of(E, POINTS))
        assert torch.allclose((moved - rest) @ direction, (1 - strength) * before, atol=1e-5)
        close(moved @ torch.tensor([0.8, -0.6]), POINTS @ torch.tensor([0.8, -0.6]), 1e-5)
    assert not unlearner.edit("projection", 0.0)(batch_of(E, POINTS)).any()         # "unclamped"


# ---- A tiny model whose text has two kinds of documents ----
WIDTH, CONTEXT, VOCABULARY, DEPTH = 16, 49, 60, 3
SIZES = dict(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=2, bos_token_id=0,
             eos_token_id=0, pad_token_id=0, max_position_embeddings=160)
FAMILIES = {
    "gpt_neox": transformers.GPTNeoXConfig(**SIZES, intermediate_size=32, attn_implementation="eager"),
    "gpt2": transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=DEPTH, n_head=2, n_positions=160,
                                    bos_token_id=0, eos_token_id=0),
    "gptj": transformers.GPTJConfig(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=DEPTH, n_head=2, n_positions=160,
                                    rotary_dim=4, bos_token_id=0, eos_token_id=0)}


@pytest.fixture(scope="module")
def models():
    """family -> a random model, in evaluation."""
    found = {}
    for name, config in FAMILIES.items():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        found[name] = model
    return found


@pytest.fixture
def spoken(E, models, tmp_path, monkeypatch):
    """spoken(tokens, n_train, domains, ...) -> Run on their activations in a tiny model; two windows a document."""
    def make_run(tokens, n_train, domains, lengths=None, family="gpt_neox", layer=0):
        monkeypatch.setattr(E, "CONTEXT_LENGTH", tokens.shape[1])
        lengths = np.full(len(tokens), tokens.shape[1]) if lengths is None else np.asarray(lengths)
        docs, names = np.arange(len(tokens)) // 2, [str(i) for i in range(len(tokens) // 2)]
        windows = E.corpus.Windows(tokens.astype(np.int32), lengths, docs, n_train, names, list(domains))
        model = models[family]
        folder = tmp_path / f"{family}-{len(list(tmp_path.iterdir()))}"
        store = E.Store(folder, windows, WIDTH, torch.float32)
        store.collect(lambda: model, layer)
        torch.manual_seed(0)
        sae = E.TopK(WIDTH, 64, 4).eval().requires_grad_(False)
        return E.Run(sae, store, lambda: model, layer, (1, 1), {})
    return make_run


def two_kinds(n, forget, low=20, seed=0):
    """[n, CONTEXT] random tokens, BOS in front; where `forget` says so from 1 ... low - 1, else from low on."""
    rng = np.random.default_rng(seed)
    tokens = np.where(forget[:, None], rng.integers(1, low, (n, CONTEXT)), rng.integers(low, VOCABULARY, (n, CONTEXT)))
    tokens[:, 0] = 0
    return tokens


def separable(spoken, n=96, n_train=64, **kwargs):
    """(run, ids of training windows, whether they are FORGET's, the same of held-out ones); documents 0 and 1 are
    FORGET's, 2 and 3 not, 4 and 5 are, ..."""
    forget = np.arange(n) // 4 % 2 == 0
    domains = ["secret" if i // 2 % 2 == 0 else "open" for i in range(n // 2)]
    run = spoken(two_kinds(n, forget), n_train, domains, **kwargs)
    return run, np.arange(n_train), forget[:n_train], np.arange(n_train, n), forget[n_train:]


def plain_losses(model, tokens, length):
    """Of one window in a plain forward pass: the loss of each token from the third on."""
    logits = model(input_ids=torch.tensor(tokens[None, :length], dtype=torch.long)).logits[0]
    return F.cross_entropy(logits[1:-1], torch.tensor(tokens[2:length], dtype=torch.long), reduction="none")


# ---- editing ----
class Blocks:
    """A run of a model, with a mean and a scale that show, and a temporal_context SAE whose latents need the past."""

    def __init__(self, E, store, model, layer=1):
        torch.manual_seed(0)
        store.mean, store.scale = 0.3 * torch.randn(WIDTH), 1.7
        sae = opened_wide(E)
        self.E, self.model, self.run = E, model, E.Run(sae, store, lambda: model, layer, (1, 1), {})
        self.edit = lambda batch: 0.5 * sae.decode(sae.encode(batch)).detach()

    def wanted(self, tokens, edit=None):
        """Logits when edit(x) is added after block `layer`, the first position left alone: without a hook."""
        E, run, edit = self.E, self.run, edit or self.edit
        hidden = E.residual_after(self.model, run.layer, tokens)
        batch = batch_of(E, (hidden[:, 1:] - run.store.mean) / run.store.scale)
        changed = torch.cat([hidden[:, :1], hidden[:, 1:] + run.store.scale * edit(batch)], 1)
        return E.logits_from(self.model, run.layer, changed, tokens)

    def hooks(self):
        return sum(len(block._forward_hooks) for block in self.E.find_blocks(self.model))


def opened_wide(E):
    torch.manual_seed(3)
    sae = E.TemporalContext(WIDTH, 64, 4).eval().requires_grad_(False)
    E.anneal(sae, sae.curriculum[0], 0.0)
    sae.gate.normal_()
    sae.W_q.mul_(4.0)
    return sae


@pytest.fixture(params=FAMILIES)
def blocks(request, E, models, make_store):
    return Blocks(E, make_store(torch.randn(6, 9, WIDTH), 4), models[request.param])


def some_tokens(rows=3, seq=14, seed=5):
    return torch.randint(1, VOCABULARY, (rows, seq), generator=torch.Generator().manual_seed(seed))


def own_logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def test_editing_adds_to_the_residual_stream_but_not_at_the_first_position(E, blocks):
    tokens = some_tokens()
    own, wanted = own_logits(blocks.model, tokens), blocks.wanted(tokens)
    with E.editing(blocks.run, blocks.edit) as model, torch.no_grad():
        assert model is blocks.model
        got = model(input_ids=tokens, use_cache=False).logits
    close(got, wanted, 1e-4)
    close(got[:, 0], own[:, 0], 1e-5)
    assert ((got - own)[:, 1:].abs().amax(-1) > 1e-3).all()
    with E.editing(blocks.run, lambda batch: torch.zeros_like(batch.x)) as model, torch.no_grad():
        close(model(input_ids=tokens, use_cache=False).logits, own, 1e-5)


def test_what_an_edit_sees(E, blocks):
    """x without the first position, centred and scaled as the SAE knows it; positions from 1; each row a document."""
    tokens, seen = some_tokens(), []
    with E.editing(blocks.run, lambda batch: seen.append(batch) or torch.zeros_like(batch.x)) as model, torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    (batch,), store = seen, blocks.run.store
    hidden = E.residual_after(blocks.model, blocks.run.layer, tokens)[:, 1:]
    close(batch.x * store.scale + store.mean, hidden, 1e-5)
    assert batch.positions.tolist() == list(range(1, 14)) and len(set(batch.doc_ids.tolist())) == 3
    assert batch.mask is None


def test_generation_with_a_cache_is_the_full_forward_pass(E, blocks):
    prompts = some_tokens(seq=5)
    with E.editing(blocks.run, blocks.edit) as model, torch.no_grad():
        made = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=9, min_new_tokens=9,
                              do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True)
    tokens, got = made.sequences, torch.stack(made.logits, 1)
    assert tokens.shape == (3, 14) and torch.equal(tokens[:, :5], prompts)
    wanted = blocks.wanted(tokens)[:, 4:-1]
    close(got, wanted, 1e-4)
    kept = wanted.clone()
    kept[..., 0] = -math.inf                                    # min_new_tokens forbids the end
    assert torch.equal(tokens[:, 5:], kept.argmax(-1))
    sae, last = blocks.run.sae, []                              # earlier positions do matter here
    for keep in (4, 13):
        hidden = E.residual_after(blocks.model, 1, tokens)[:, -keep:]
        last.append(sae.encode(batch_of(E, (hidden - blocks.run.store.mean) / blocks.run.store.scale)).dense()[:, -4:])
    assert not torch.allclose(last[0][:, 0], last[1][:, 0], atol=1e-3)
    close(last[0][:, 3], last[1][:, 3], 1e-4)


def by_hand(blocks, tokens, cut, edit):
    """Logits from a cache: the first `cut` tokens at once, then one by one."""
    with blocks.E.editing(blocks.run, edit) as model, torch.no_grad():
        out = model(input_ids=tokens[:, :cut], use_cache=True)
        logits = [out.logits]
        for t in range(cut, tokens.shape[1]):
            out = model(input_ids=tokens[:, t:t + 1], past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("cut", [2, 3, 7])
def test_tokens_one_by_one(blocks, cut):
    tokens = some_tokens()
    close(by_hand(blocks, tokens, cut, blocks.edit), blocks.wanted(tokens), 1e-4)


def test_the_first_token_alone(blocks):
    tokens = some_tokens()
    simple = lambda batch: 0.3 * batch.x.cumsum(1)
    close(by_hand(blocks, tokens, 1, simple), blocks.wanted(tokens, simple), 1e-4)


def test_the_first_token_alone_for_a_temporal_variant(blocks):
    tokens = some_tokens()
    close(by_hand(blocks, tokens, 1, blocks.edit), blocks.wanted(tokens), 1e-4)


def test_padded_prompts_end_as_unpadded_ones(E, blocks):
    """An edit that looks at the whole row: with the mask it sees the tokens and not the padding."""
    def edit(batch):
        mean = E.valid(batch, batch.x).sum(1, keepdim=True)
        count = batch.x.shape[1] if batch.mask is None else batch.mask.sum(1)[:, None, None]
        return 0.5 * (mean / count).expand_as(batch.x) + blocks.edit(batch)

    tokens, lengths = some_tokens(), torch.tensor([14, 5, 9])
    mask = torch.arange(14) < lengths[:, None]
    with E.editing(blocks.run, edit, mask) as model, torch.no_grad():
        got = model(input_ids=tokens.masked_fill(~mask, 0), attention_mask=mask.long(), use_cache=False).logits
    for row, n in enumerate(lengths.tolist()):
        close(got[row, n - 1], blocks.wanted(tokens[row:row + 1, :n], edit)[0, -1], 1e-4)
    with E.editing(blocks.run, edit) as model, torch.no_grad():
        blind = model(input_ids=tokens.masked_fill(~mask, 0), attention_mask=mask.long(), use_cache=False).logits
    assert (blind[1, 4] - got[1, 4]).abs().max() > 1e-3


@pytest.mark.parametrize("where", ["nowhere", "edit", "body", "model"])
def test_no_hook_is_left(E, blocks, where):
    tokens, own = some_tokens(), own_logits(blocks.model, some_tokens())

    def edit(batch):
        if where == "edit":
            raise ZeroDivisionError
        return blocks.edit(batch)

    def use():
        with E.editing(blocks.run, edit) as model, torch.no_grad():
            assert blocks.hooks() == 1
            if where == "body":
                raise ZeroDivisionError
            model(input_ids=tokens + VOCABULARY * (where == "model"), use_cache=False)

    if where == "nowhere":
        use()
    else:
        with pytest.raises((ZeroDivisionError, IndexError)):
            use()
    assert blocks.hooks() == 0 and torch.equal(own_logits(blocks.model, tokens), own)


# ---- Losses, generations ----
def test_behind_puts_other_text_after_the_first_token(E, store):
    ids, others = np.array([3, 5]), np.array([10, 20])
    tokens = store.windows.tokens
    for n in (0, 2, 4):
        got = E.corpus.behind(store.windows, ids, others, n)
        for row, (i, j) in enumerate(zip(ids, others)):
            assert got[row].tolist() == [tokens[j, 0], *tokens[j, 1:n + 1], *tokens[i, 1:]]


def padded_loss(E, run, tokens, n, edit):
    """Mean loss of the last n of tokens under an edit."""
    tokens = tokens.numpy()
    return E.corpus.last_loss(E.edited_logits(run, edit, tokens, np.ones(tokens.shape, bool)), tokens, n)


def scores(E, run, ids, clozes, edit=lambda batch: torch.zeros_like(batch.x)):
    """Loss of each window, and whether each cloze is answered rightly, under an edit."""
    return clozes.scores(E.spliced(run, ids, lambda batch: run.store.unscaled(batch.x + edit(batch))))


def no_clozes(E):
    return E.corpus.Clozes(*np.zeros((2, 0), int), np.zeros((0, 4), int))


def test_padded_loss_without_an_edit_is_the_models_own(E, blocks):
    tokens, nothing = some_tokens(), lambda batch: torch.zeros_like(batch.x)
    own = own_logits(blocks.model, tokens).log_softmax(-1)
    for n in (1, 5, 12):
        wanted = -np.mean([own[row, t - 1, tokens[row, t]].item() for row in range(3) for t in range(14 - n, 14)])
        with torch.no_grad():
            assert padded_loss(E, blocks.run, tokens, n, nothing) == pytest.approx(wanted, rel=1e-4)
    with torch.no_grad():
        assert abs(padded_loss(E, blocks.run, tokens, 12, blocks.edit) - wanted) > 1e-3


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2"])
def test_scores_without_an_edit_are_the_models_own(E, spoken, models, family):
    """Losses, padding left out, and answers to clozes; 40 windows take more than one chunk."""
    rng, n = np.random.default_rng(0), 40
    lengths = np.where(np.arange(n) % 3 == 0, 20, np.where(np.arange(n) % 5 == 0, 34, CONTEXT))
    tokens = np.where(np.arange(CONTEXT) < lengths[:, None], two_kinds(n, np.arange(n) < 0), 0)
    run = spoken(tokens, 10, ["a"] * 20, lengths, family, layer=1)
    ids = np.delete(np.arange(2, n), [4, 9])
    window = np.sort(rng.choice(ids, 60))
    position = np.array([rng.integers(1, lengths[w] - 1) for w in window])
    options = np.array([rng.permutation(np.arange(1, VOCABULARY))[:4] for _ in window])
    options[:, 0] = tokens[window, position + 1]
    loss, right = scores(E, run, ids, E.corpus.Clozes(window, position, options))
    wanted = [plain_losses(models[family], tokens[i], lengths[i]).mean().item() for i in ids]
    assert loss.tolist() == pytest.approx(wanted, rel=1e-4)
    answers = []
    for w, p, choice in zip(window, position, options):
        logits = models[family](input_ids=torch.tensor(tokens[w:w + 1, :p + 1])).logits[0, -1]
        answers.append(logits[choice].argmax().item() == 0)
    assert right.tolist() == answers and 0 < sum(answers) < 60
    assert len(scores(E, run, ids, no_clozes(E))[1]) == 0       # nothing was asked


def test_scores_under_an_edit_are_those_of_the_edited_model(E, spoken):
    run, _, _, ids, _ = separable(spoken, layer=1)
    edit = lambda batch: 0.5 * run.sae.decode(run.sae.encode(batch))
    loss, own = scores(E, run, ids, no_clozes(E), edit)[0], scores(E, run, ids, no_clozes(E))[0]
    for i, got in zip(ids, loss):
        with torch.no_grad():
            assert padded_loss(E, run, run.store.tokens([i]), CONTEXT - 2, edit) == pytest.approx(got, rel=1e-4)
    assert (np.abs(loss - own) > 1e-4).all()


def test_generations(E, blocks):
    """A model made to say one thing repeats itself; one that says anything does not; the draws are always the same."""
    head, prompts = blocks.model.get_output_embeddings(), some_tokens(rows=6, seq=64)      # of 64, 32 follow
    nothing = lambda batch: torch.zeros_like(batch.x)
    measured = lambda: tuple(E.corpus.repetition({"a": E.sampled(blocks.run, nothing, prompts)}).values())
    weight = head.weight.data.clone()
    bias = None if head.bias is None else head.bias.data.clone()
    try:
        head.weight.data.zero_()
        head.weight.data[7] = 0.0
        if bias is not None:
            head.bias.data.zero_()
        torch.manual_seed(9)
        repetition, spread = measured()
        assert repetition < 0.1 and 2.5 < spread
        torch.manual_seed(10)
        assert measured() == (repetition, spread)
        if bias is not None:
            head.bias.data[7] = 1e3
            repetition, spread = measured()
            assert repetition == pytest.approx(30 / 31) and spread == pytest.approx(0, abs=0.05)
    finally:
        head.weight.data = weight
        if bias is not None:
            head.bias.data = bias


# ---- The whole of an Unlearner, and detection ----
@pytest.fixture
def small(settings):  # noqa: F811
    settings(CLAMPED=6, MATCHED=24, FORGET="secret")


def unlearner_of(E, run, ids, forget):
    torch.manual_seed(0)
    group = np.where(forget, "forget", "retain")
    with torch.no_grad():
        return E.Unlearner(run, E.corpus.UnlearningPlan(ids, group, None, None, None, None))


def detection(unlearner, store, ids, forget):
    z = csr_array(unlearner.sae.encode(store.batch(ids)).dense().flatten(0, 1).numpy())
    return unlearner.matcher.scores(z, store.valid(ids), forget)


def test_what_an_unlearner_selects(E, spoken, small):
    run, ids, forget, _, _ = separable(spoken)
    unlearner, batch = unlearner_of(E, run, ids, forget), run.store.batch(ids)
    z = run.sae.encode(batch).dense().flatten(0, 1)
    of_token = np.repeat(forget, CONTEXT - 1)
    ranked = E.corpus.ranked_latents(csr_array(z.numpy()), of_token, E.SELECTION, E.RETAIN_FREQUENCY, 6)[0]
    assert unlearner.clamped["forget"].tolist() == ranked[:6].tolist()
    assert not set(unlearner.clamped["random_latents"]) & set(ranked[:6].tolist())
    for latent in range(64):
        values = z[:, latent][z[:, latent] > 0]
        assert not len(values) or unlearner.q95[latent].item() == pytest.approx(np.quantile(values, 0.95), rel=1e-4)
    x = batch.x.flatten(0, 1)
    along = unlearner.edit("projection", 1.0)(batch).flatten(0, 1) + x
    apart = (along[of_token].mean(0) - along[~of_token].mean(0)).norm()
    assert apart < 1e-4 * (x[of_token].mean(0) - x[~of_token].mean(0)).norm()


@pytest.mark.parametrize("matcher", ["logistic", "attention"])
def test_separable_text_is_detected(E, settings, spoken, small, matcher):  # noqa: F811
    settings(MATCHER=matcher)
    run, ids, forget, fresh, of_fresh = separable(spoken)
    unlearner = unlearner_of(E, run, ids, forget)
    with torch.no_grad():
        found, rocs = detection(unlearner, run.store, fresh, of_fresh)
    assert found["auroc_pattern"] > 0.9 and found["accuracy_pattern"] > 0.8
    assert found["auroc_hybrid"] > 0.95 and found["accuracy_hybrid"] > 0.8
    assert found["auroc_pattern"] > found["auroc_one_position"] - 0.02
    assert found["false_positives_pattern"] < 0.06 and found["false_positives_hybrid"] < 0.2
    for name, roc in rocs.items():
        assert len(roc) == 101 and (np.diff(roc) >= 0).all() and roc[-1] == 1
        assert np.mean(roc) == pytest.approx(found[f"auroc_{name}"], abs=0.03)
    standard = unlearner.edit("standard", 1.0)(run.store.batch(fresh)).any(-1).float().mean(1)
    hybrid = unlearner.edit("hybrid", 1.0)(run.store.batch(fresh)).any(-1).float().mean(1)
    assert standard[torch.from_numpy(of_fresh)].mean() > standard[torch.from_numpy(~of_fresh)].mean()
    assert hybrid[torch.from_numpy(of_fresh)].mean() > 5 * hybrid[torch.from_numpy(~of_fresh)].mean()
    batch = run.store.batch(fresh)                      # a looser threshold clamps there too, and "standard" wherever any does
    for name in ("pattern", "hybrid"):
        where = [unlearner.edit(kind, 1.0)(batch).any(-1) for kind in (name, f"{name}_0.05", f"{name}_0.2", "standard")]
        assert all((looser | ~stricter).all() for stricter, looser in zip(where, where[1:]))
        assert found[f"false_positives_{name}"] <= found[f"false_positives_{name}_0.05"] <= found[f"false_positives_{name}_0.2"]


def test_text_that_is_alike_is_not_detected_and_thresholds_hold(E, spoken, small):
    """All windows from one distribution: chance, and at most about FALSE_POSITIVES of fresh tokens above the threshold."""
    assert E.FALSE_POSITIVES[0] == 0.01
    n, n_train = 240, 160
    forget = np.arange(n) // 4 % 2 == 0
    run = spoken(two_kinds(n, np.zeros(n, bool), low=2), n_train, ["open"] * (n // 2))
    unlearner = unlearner_of(E, run, np.arange(n_train), forget[:n_train])
    with torch.no_grad():
        found, _ = detection(unlearner, run.store, np.arange(n_train, n), forget[n_train:])
    for name in ("pattern", "one_position", "shuffled"):
        assert 0.42 < found[f"auroc_{name}"] < 0.58
    assert found["false_positives_pattern"] < 0.02 and found["false_positives_hybrid"] <= 0.15
    assert found["accuracy_pattern"] == pytest.approx(0.5, abs=0.02)


def test_padding_is_no_evidence(E, spoken, small):
    """What stands in the padding changes no threshold, no figure."""
    n, n_train = 96, 64
    forget, lengths = np.arange(n) // 4 % 2 == 0, np.where(np.arange(n) % 3 == 0, 40, CONTEXT)
    found = []
    for filler in (0, 7):
        tokens = np.where(np.arange(CONTEXT) < lengths[:, None], two_kinds(n, forget), filler)
        run = spoken(tokens, n_train, ["x"] * (n // 2), lengths)
        unlearner = unlearner_of(E, run, np.arange(n_train), forget[:n_train])
        with torch.no_grad():
            found.append(detection(unlearner, run.store, np.arange(n_train, n), forget[n_train:])[0]
                         | unlearner.matcher.thresholds)
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert found[1][name] == pytest.approx(value, abs=1e-5), name


def test_padding_has_no_say_in_the_selection(E, settings, spoken, small):  # noqa: F811
    """Frequencies are those of the tokens that count; the limit is one that half of the latents keep."""
    n, lengths = 64, np.where(np.arange(64) % 2 == 0, 20, CONTEXT)
    forget = np.arange(n) // 4 % 2 == 0
    run = spoken(two_kinds(n, forget, low=40), n, ["x"] * (n // 2), lengths)
    keep = run.store.valid(np.arange(n))
    z, of_token = run.sae.encode(run.store.batch(np.arange(n))).dense()[keep].numpy(), forget.repeat(keep.sum(1))
    limit = np.median((z[~of_token] > 0).mean(0))
    settings(SELECTION="frequency", RETAIN_FREQUENCY=limit)
    wanted = E.corpus.ranked_latents(csr_array(z), of_token, E.SELECTION, E.RETAIN_FREQUENCY, 6)[0][:6]
    assert ((z[~of_token] > 0).mean(0)[wanted] < limit).all()
    assert set(unlearner_of(E, run, np.arange(n), forget).clamped["forget"]) == set(wanted)


# ---- Questions ----
class Answers(torch.nn.Module):
    """A model that answers by a rule: the letter of the choice that says "right"; A where none does, where it is D and
    "trap" is in the question, or after an edit. Everywhere but at the last token it says something else."""

    def __init__(self, tokenizer, width):
        super().__init__()
        self.blocks, self.tokenizer = torch.nn.ModuleList([torch.nn.Linear(width, width)]), tokenizer
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_hidden_layers=1))
        self.width, self.asked = width, 0
        self.get_input_embeddings = lambda: SimpleNamespace(num_embeddings=10 ** 6)
        self.letters = {letter: tokenizer(f" {letter}", add_special_tokens=False)["input_ids"][-1] for letter in "ABCD"}

    def forward(self, input_ids, attention_mask, use_cache):
        plain = torch.ones(*input_ids.shape, self.width)
        with torch.no_grad():
            self.blocks[0].weight.copy_(torch.eye(self.width))
            self.blocks[0].bias.zero_()
        moved = (self.blocks[0](plain) - plain).abs().flatten(1).amax(1) > 1e-3
        logits = torch.zeros(*input_ids.shape, 1 + max(len(self.tokenizer), *self.letters.values()))
        for row, (ids, mask) in enumerate(zip(input_ids, attention_mask)):
            n = int(mask.sum())
            assert mask[:n].all() and ids[0] == 0
            text = self.tokenizer.decode(ids[1:n])
            assert text.endswith("Answer:")
            said = next((line[0] for line in text.splitlines() if "right" in line), "A")
            if moved[row] or said == "D" and "trap" in text:
                said = "A"
            logits[row, n:, self.letters["B"]] = 9.0
            logits[row, :n - 1, self.letters["B"]] = 9.0
            logits[row, n - 1, self.letters[said]] = 1.0
            self.asked += 1
        return SimpleNamespace(logits=logits)


QUESTIONS = [{"question": "Which?", "choices": ["first", "the right one", "third", "a long winding one"], "answer": 1},
             {"question": "Which, in a trap?", "choices": ["right", "b", "c", "d"], "answer": 0},
             {"question": "And this?", "choices": ["a", "b", "c", "d"], "answer": 2},
             {"question": "Which at last?", "choices": ["no", "nor this", "neither", "but right"], "answer": 3}]


@pytest.fixture
def asked(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, QUESTIONS)))
    return str(path)


def test_a_question_counts_when_all_orders_are_right(E, make_store, asked, monkeypatch):
    """Questions 1 and 4 are known, the second but for 6 of 24 orders, the third by guessing A in 6 of 24. Behind all
    prompts is padding."""
    encoded = E.corpus.encoded_questions

    def padded(*of):
        for tokens, mask, *rest in encoded(*of):
            yield np.pad(tokens, ((0, 0), (0, 3)), constant_values=7), np.pad(mask, ((0, 0), (0, 3))), *rest

    monkeypatch.setattr(E.corpus, "encoded_questions", padded)
    store = make_store(torch.randn(6, 9, 8), 4)
    model = Answers(E.load_tokenizer(), 8)
    run = E.Run(None, store, lambda: model, 0, (1, 1), {})

    def right_answers(edit):
        return E.corpus.right_answers(asked, E.load_tokenizer(), lambda *of: E.edited_logits(run, edit, *of))

    with torch.no_grad():
        assert right_answers(lambda batch: torch.zeros_like(batch.x)).mean() == 0.5
        assert model.asked == 4 * 24
        assert not right_answers(lambda batch: torch.ones_like(batch.x)).any()


def test_encoded_questions(E, asked):
    tokenizer = E.load_tokenizer()
    found = list(E.corpus.encoded_questions(asked, tokenizer))
    assert len(found) == 4
    for (tokens, mask, letters, answers), question in zip(found, QUESTIONS):
        assert tokens.shape == mask.shape and len(tokens) == len(answers) == 24
        assert [tokenizer.decode([letter]).strip() for letter in letters] == list("ABCD")
        assert (tokens[:, 0] == E.corpus.beginning(tokenizer)).all() and mask.sum(1).max() == mask.shape[1]
        prompts = [tokenizer.decode(row[keep][1:]) for row, keep in zip(tokens, mask)]
        assert len(set(prompts)) == 24
        for prompt, answer, keep in zip(prompts, answers, mask):
            assert (np.diff(keep.astype(int)) <= 0).all()           # padded at the end
            right = question["choices"][question["answer"]]
            assert f"{'ABCD'[answer]}. {right}\n" in prompt and prompt.endswith("\nAnswer:")
        assert np.bincount(answers).tolist() == [6, 6, 6, 6]


class Letters:
    """A tokenizer of characters, which takes "A. right" for one: prompts are not all of one length."""
    bos_token_id, eos_token_id = 1, 2

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        ids = [[ord(c) for c in one.replace("A. right", "@")] for one in ([text] if isinstance(text, str) else text)]
        return {"input_ids": ids[0] if isinstance(text, str) else ids}


def test_prompts_of_different_lengths_are_padded_at_the_end(E, asked):
    found = list(E.corpus.encoded_questions(asked, Letters()))
    tokens, mask, letters, answers = found[1]
    assert letters == [ord(c) for c in "ABCD"] and (tokens[:, 0] == 1).all()
    lengths, short = mask.sum(1), answers == 0
    assert (lengths[short] == mask.shape[1] - 7).all() and (lengths[~short] == mask.shape[1]).all() and short.sum() == 6
    for row, n in zip(tokens, lengths):
        assert bytes(row[n - 7:n].tolist()) == b"Answer:" and not row[n:].any()
    assert (np.diff(mask.astype(int)) <= 0).all()


def test_the_strength_that_forgets_enough(E):
    strength_for = lambda forgets, **others: E.corpus.strength_for(forgets, 0.4, **others)
    for slope in (0.0025, 0.04, 0.1, 3.0):
        calls = []
        found = strength_for(lambda s: calls.append(s) or slope * s)
        assert 0.4 / slope <= found <= 1.1 * 0.4 / slope and len(calls) <= 10
    assert 7 <= strength_for(lambda s: float(s >= 7)) <= 7.7
    assert strength_for(lambda s: 0.39) == 256 == strength_for(lambda s: math.nan)
    assert strength_for(lambda s: 1.0) <= 1.1 / 16
    assert strength_for(lambda s: s, low=0.01, high=0.3) == 0.3


# ---- The plan: which windows ----
PARTS = SimpleNamespace(batch_decode=lambda tokens: [f" t{int(t[0])}" for t in tokens])


def plan_of_domains(E, names, per_domain=10, windows_of_each=4, heldout=3, seed=0):
    """Windows of `per_domain` documents of each domain for training and `heldout` held out. Domain i draws two thirds
    of its tokens from its own twenty and the rest from those of domain i + 1."""
    rng, rows, docs, domains = np.random.default_rng(seed), [], [], []
    for n in (per_domain, heldout):
        for i in range(n * len(names)):
            domain = i % len(names)
            own = 1 + 20 * domain + rng.integers(0, 20, (windows_of_each, CONTEXT))
            other = 1 + 20 * ((domain + 1) % len(names)) + rng.integers(0, 20, (windows_of_each, CONTEXT))
            rows.append(np.where(rng.random(own.shape) < 2 / 3, own, other))
            docs += [len(domains)] * windows_of_each
            domains.append(names[domain])
    tokens = np.concatenate(rows).astype(np.int32)
    tokens[:, 0] = 0
    n_train = per_domain * len(names) * windows_of_each
    return E.corpus.Windows(tokens, np.full(len(tokens), CONTEXT), np.array(docs), n_train,
                            [str(i) for i in range(len(domains))], domains)


NAMES, GROUPS = ["a", "b", "c", "d", "e", "f", "g"], ("forget", "neighbours", "retain")


@pytest.mark.parametrize("n_names, forget, near", [(7, "c", {"b", "d"}), (5, "a", {"b", "e"}), (3, "b", None),
                                                   (2, "a", set())])
def test_groups_of_windows(E, n_names, forget, near):
    """Neighbours are the domains that share words, half of the others at most and three; with two domains none."""
    windows = plan_of_domains(E, NAMES[:n_names])
    plan = E.corpus.unlearning_plan(windows, forget, PARTS, (1_000, 1_000))
    for every, ids, group in ((np.arange(windows.n_train), plan.dev, plan.dev_group),
                              (windows.heldout(), plan.test, plan.group)):
        assert ids.tolist() == every.tolist()                           # there are fewer than `most`
        by_group = {g: set(windows.domain_of(ids[group == g])) for g in GROUPS}
        assert by_group["forget"] == {forget} and sum(map(len, by_group.values())) == n_names
        assert len(by_group["neighbours"]) == min(3, (n_names - 1) // 2)
        assert near is None or near <= by_group["neighbours"]
    assert set(plan.clozes.window) <= set(plan.test) and len(plan.clozes.window) > 0


def test_windows_are_spread_over_the_files(E):
    windows = plan_of_domains(E, NAMES[:5])
    plan = E.corpus.unlearning_plan(windows, "b", PARTS, (10, 3))
    for ids, group, n, files in ((plan.dev, plan.dev_group, 10, 10), (plan.test, plan.group, 3, 3)):
        assert [(group == g).sum() for g in GROUPS] == [n] * 3 and (np.diff(ids) > 0).all()
        docs = windows.doc_ids[ids]
        assert len(set(docs[group == "forget"])) == files               # one window of each file
        assert all(len(set(docs[group == g])) == n for g in GROUPS[1:])         # of 20 and 6
    assert plan.dev.max() < windows.n_train <= plan.test.min()
    again = E.corpus.unlearning_plan(windows, "b", PARTS, (10, 3))
    assert all(np.array_equal(a, b) for a, b in zip(plan[:4], again[:4]))


def test_clozes_of_the_chosen_windows_alone(E):
    windows = plan_of_domains(E, NAMES[:5])
    plan = E.corpus.unlearning_plan(windows, "b", PARTS, (10, 3))
    clozes = plan.clozes
    assert set(clozes.window) <= set(plan.test)
    assert (clozes.options[:, 0] == windows.tokens[clozes.window, clozes.position + 1]).all()
    of = dict(zip(plan.test, plan.group))
    assert plan.cloze_group.tolist() == [of[w] for w in clozes.window]


def test_what_a_plan_sums_up(E):
    """Means by group, of windows and of clozes; by document in the sample's order; full windows; halves of the files."""
    windows = plan_of_domains(E, NAMES[:5], windows_of_each=3)
    plan = E.corpus.unlearning_plan(windows, "b", PARTS)
    rng = np.random.default_rng(0)
    losses, right = rng.random(len(plan.test)), rng.random(len(plan.clozes.window)) < 0.5
    found = plan.means(losses, right)
    assert set(found) == {*GROUPS, *(f"cloze_{g}" for g in GROUPS)}
    for g in GROUPS:
        assert found[g] == pytest.approx(np.mean([v for v, of in zip(losses, plan.group) if of == g]))
        assert found[f"cloze_{g}"] == pytest.approx(np.mean([v for v, of in zip(right, plan.cloze_group) if of == g]))
        files = plan.by_document(windows, losses)[g]
        for file, value in zip(windows.doc_ids[windows.sample()], files):
            members = [v for v, of, i in zip(losses, plan.group, plan.test) if of == g and windows.doc_ids[i] == file]
            assert value == pytest.approx(np.mean(members)) if members else np.isnan(value)
    windows.lengths[plan.test[plan.group == "forget"][0]] = 20
    full, others = plan.full(windows)
    assert full.tolist() == plan.test[plan.group == "forget"][1:].tolist() and len(others) == len(full)
    assert set(others) <= set(plan.test[plan.group == "retain"])
    half, docs = plan.halves(windows), windows.doc_ids[plan.dev]
    for side in (plan.dev_group == "forget", plan.dev_group != "forget"):
        files = np.unique(docs[side])
        assert set(docs[side & half]) == set(files[::2]) and set(docs[side & ~half]) == set(files[1::2])
    windows.lengths[:] = 20
    with pytest.raises(E.corpus.DataError, match="CONTEXT_LENGTH"):
        plan.full(windows)


def test_what_is_kept_of_a_plan_is_of_its_groups(E, tmp_path):
    groups, ids = np.array(["forget", "retain"] * 2), np.arange(4)
    plan = E.corpus.UnlearningPlan(ids, groups, ids, groups, SimpleNamespace(options=ids), groups[:1], tmp_path)
    assert plan.kept("own", lambda: 1) == plan.kept("own", lambda: 2) == 1
    assert plan._replace(dev_group=groups[::-1]).kept("own", lambda: 2) == 2
    assert plan._replace(folder=None).kept("own", lambda: 3) == 3


def test_domains_that_cannot_be_forgotten(E):
    windows = plan_of_domains(E, NAMES[:5])
    domains = np.array(windows.domains)

    def fails(windows, *parts):
        with pytest.raises(E.corpus.DataError) as caught:
            E.corpus.unlearning_plan(windows, "b", PARTS)
        assert all(part in str(caught.value) for part in parts), str(caught.value)

    train = windows.doc_ids[:windows.n_train].max() + 1
    domains[train:][domains[train:] == "b"] = "a"
    fails(windows._replace(domains=domains.tolist()), "FORGET = 'b'", "test")
    domains[:train][domains[:train] == "b"] = "a"
    fails(windows._replace(domains=domains.tolist()), "'b'")
    fails(windows._replace(domains=["b"] * len(domains)), "FORGET = 'b'", "another domain")
    fails(windows._replace(domains=["a" if d == "b" else "c" for d in windows.domains][:len(domains)]), "'b'")


def test_bag_auroc_of_planted_text(E):
    """Different words: 1; the same words: chance; one word in five of its own: .2 + .8 / 2; of four words at least
    one is with a chance of 1 - .8^4. Padding does not count."""
    rng, n, n_train = np.random.default_rng(0), 600, 300
    forget, ids = np.arange(n) % 2 == 0, np.arange(n)
    group = np.where(forget, "forget", "retain")
    plan = E.corpus.UnlearningPlan(ids[:n_train], group[:n_train], ids[n_train:], group[n_train:], None, None)

    def windows(own, lengths=None):
        """One in `own` of FORGET's tokens is from 40 on, all others are from 1 to 39."""
        tokens = rng.integers(1, 40, (n, CONTEXT))
        tokens[forget] += 40 * (rng.random((n // 2, CONTEXT)) < own)
        lengths = np.full(n, CONTEXT) if lengths is None else lengths
        return E.corpus.Windows(tokens.astype(np.int32), lengths, np.arange(n), n_train, [""] * n, [""] * n)

    assert E.corpus.bag_auroc(windows(1.0), plan, 4) > 0.999
    assert 0.44 < E.corpus.bag_auroc(windows(0.0), plan, 4) < 0.56
    some = windows(0.2)
    one, four = (E.corpus.bag_auroc(some, plan, last) for last in (1, 4))
    assert one == pytest.approx(0.6, abs=0.04) and four == pytest.approx(1 - 0.8 ** 4 / 2, abs=0.04)
    lengths = np.where(np.arange(n) % 3 == 0, 20, CONTEXT)
    padded = some._replace(lengths=lengths)
    rubbish = np.where(np.arange(CONTEXT) < lengths[:, None], some.tokens, 5).astype(np.int32)
    assert E.corpus.bag_auroc(padded, plan, 4) == pytest.approx(
        E.corpus.bag_auroc(padded._replace(tokens=rubbish), plan, 4), abs=1e-9)


# ---- The evaluation ----
def whole(E, spoken, settings):  # noqa: F811
    """eval_unlearning's (run, settings) on text of four domains, at the size of a test."""
    n, n_train = 128, 64
    rng, domain = np.random.default_rng(0), np.arange(n) // 2 % 4
    tokens = 1 + 10 * domain[:, None] + rng.integers(0, 19, (n, CONTEXT))
    tokens[:, 0] = 0
    settings(FORGET="0", CLAMPED=6, MATCHED=24, load_tokenizer=lambda: PARTS)
    return spoken(tokens, n_train, [str(i % 4) for i in range(n // 2)], layer=0)


STRATEGIES = "standard", "pattern", "hybrid", "pattern_0.05", "hybrid_0.05", "pattern_0.2", "hybrid_0.2"
NAMES_OF_EDITS = *STRATEGIES, "random_latents", "random_directions", "projection"


def test_the_evaluation_end_to_end(E, spoken, settings, monkeypatch):  # noqa: F811
    run = whole(E, spoken, settings)
    settings(FORGETTING=0.02)                           # a random model has little to forget
    result = E.Result(**E.corpus.evaluated(E.eval_unlearning, run))
    m, frontier = result.metrics, result.curves["frontier"]
    assert all(math.isfinite(value) for value in m.values()) and list(frontier) == list(NAMES_OF_EDITS)
    for name, rows in frontier.items():
        assert len(rows) == (5 if name in STRATEGIES else 1)
        factors = [row["strength"] / rows[0]["strength"] for row in rows]
        assert factors == pytest.approx([1, 0.25, 0.5, 2, 4][:len(rows)])
        for key, value in rows[0].items():
            assert m[f"{name}_{key}"] == value
        for group in ("forget", "neighbours", "retain"):
            files = [v for v in result.per_sequence[f"{name}_{group}"] if v is not None]
            assert np.mean(files) == pytest.approx(m[f"{name}_{group}"], abs=1e-6)      # two windows of each file
            assert len(result.per_sequence[f"{name}_{group}"]) == 32
        assert 0 <= m[f"{name}_repetition"] <= 1
    groups, docs = {g: result.per_sequence[f"standard_{g}"] for g in GROUPS}, np.arange(32) % 4
    known = {g: {int(d) for d, v in zip(docs, values) if v is not None} for g, values in groups.items()}
    assert known["forget"] == {0} and len(known["neighbours"]) == 1 and len(known["retain"]) == 2
    assert all(len(result.curves["roc"][name]) == 101 for name in ("pattern", "hybrid"))
    assert m["auroc_pattern"] > 0.6 and m["auroc_bag_of_tokens"] > 0.6
    asked_for, original = [], E.Unlearner.edit
    monkeypatch.setattr(E.Unlearner, "edit", lambda self, name, s: asked_for.append(name) or original(self, name, s))
    again = E.eval_unlearning(run).metrics
    assert again == m                                   # nothing is left to chance
    assert asked_for.count("projection") == 2           # no SAE changes it: what it does is kept; this one, and "unclamped"
    assert asked_for.count("standard") > 5


def test_the_bag_follows_the_matchers_window(E, spoken, settings, monkeypatch):  # noqa: F811
    run, bags = whole(E, spoken, settings), {}
    settings(FORGETTING=1e9)
    monkeypatch.setattr(E.corpus, "strength_for", lambda *of: 1.0)
    plan = E.corpus.unlearning_plan(run.store.windows, "0", PARTS)
    for window in (4, 1):
        settings(MATCHER_WINDOW=window)
        bags[window] = E.eval_unlearning(run).metrics["auroc_bag_of_tokens"]
        assert bags[window] == E.corpus.bag_auroc(run.store.windows, plan, window)
    assert bags[4] != bags[1]


def test_files_that_alternate_are_on_both_sides_of_the_split(E, spoken, small):
    forget = np.arange(96) // 2 % 2 == 1
    run = spoken(two_kinds(96, forget), 96, ["secret" if i % 2 else "open" for i in range(48)])
    unlearner_of(E, run, np.arange(96), forget)


def test_more_windows_of_forget_than_elsewhere(E, spoken, settings, monkeypatch):  # noqa: F811
    run = whole(E, spoken, settings)
    run.store.windows = run.store.windows._replace(domains=["0" if i % 5 < 4 else "1" for i in range(64)])
    monkeypatch.setattr(E.corpus, "strength_for", lambda *of: 1.0)
    assert math.isfinite(E.eval_unlearning(run).metrics["standard_padded_32"])


def preflight(E, settings, tmp_path, config=None, **constants):  # noqa: F811
    settings(**dict(SAE_VARIANT="temporal_context", EVALS=("unlearning",), CONTEXT_LENGTH=48, EXPANSION=4, TARGET_L0=4)
             | constants)
    E.preflight(config or transformers.GPTNeoXConfig(**SIZES | dict(vocab_size=4096), intermediate_size=32), tmp_path)


def test_the_preflight_passes_with_the_other_settings(E, settings, tmp_path):  # noqa: F811
    preflight(E, settings, tmp_path, MATCHER="attention", SELECTION="frequency", TRAIN_ON="forget",
              BUFFER_POSITIONS="sinusoidal")
    assert not list(tmp_path.iterdir())


def test_the_preflight_passes_with_questions(E, settings, tmp_path, asked):  # noqa: F811
    preflight(E, settings, tmp_path, FORGET_QUESTIONS=asked)


def test_windows_as_long_as_the_model_takes(E, settings, tmp_path):  # noqa: F811
    config = transformers.GPT2Config(vocab_size=4096, n_embd=16, n_layer=3, n_head=2, n_positions=64)
    preflight(E, settings, tmp_path, config, CONTEXT_LENGTH=64)


def test_another_data_set_is_read_to_be_forgotten(E, settings, tmp_path, monkeypatch):  # noqa: F811
    from test_corpus import rows, write
    first, second = (str(write(tmp_path / f"{name}.jsonl", [{"text": f"{name} " + row["text"]} for row in rows(400)]))
                     for name in ("first", "second"))
    settings(DATASET=first, FORGET=second, EVALS=("unlearning",), TRAIN_TOKENS=2_000, CONTEXT_LENGTH=32, EVAL_FILES=8)
    monkeypatch.setattr(E.Store, "collect", lambda self, get_model, layer: None)
    config = transformers.GPTNeoXConfig(**SIZES, intermediate_size=32)
    store, _ = E.open_store(config, 0, tmp_path / "cache")
    assert second in store.windows.domains


# ---- A whole run ----
def test_a_whole_run(tmp_path):
    folder = copy_template(tmp_path / "run", SAE_VARIANT="temporal_context", EVALS=("core", "unlearning"),
                           CONTEXT_LENGTH=64)
    finished = run_copy(folder, tmp_path / "cache")
    assert finished.code == 0 and finished.stderr == "", finished.stderr
    entry, = (results(folder)["unlearning"],)
    assert all(type(value) is float and math.isfinite(value) for value in entry["metrics"].values())
    for name in NAMES_OF_EDITS:
        for key in ("strength", "forget", "neighbours", "retain", "repetition", "entropy"):
            assert f"{name}_{key}" in entry["metrics"], f"{name}_{key}"
    for name in NAMES_OF_EDITS[:3]:
        assert {f"{name}_padded_{pad}" for pad in (0, 32, 64)} <= set(entry["metrics"])
        # the same windows; no text in front is no change
        assert entry["metrics"][f"{name}_padded_0"] == pytest.approx(entry["metrics"][f"{name}_forget"], abs=0.02)
    curves, = entry["curves"]
    assert set(curves["frontier"]) == set(NAMES_OF_EDITS) and set(curves["roc"]) == {"pattern", "hybrid"}
    assert set(entry["means"]) == {"auroc_hybrid_mean"}
    sequences, = entry["per_sequence"]
    assert {len(values) for values in sequences.values()} == {24}
