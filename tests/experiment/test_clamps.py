"""Unlearning by hand: which latents, the matcher, the gate and the clamps, on planted codes."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.sparse import csr_array
from sklearn.metrics import roc_auc_score

from data.tasks import UnlearningPlan
from small_saes import batch_of, close, D_IN, D_SAE, make, random_batch
from test_questions import questions_file

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


def test_latents_of_forget_come_first(E, settings):
    z, forget = planted_codes()
    for selection in ("ratio", "frequency"):
        settings(SELECTION=selection, CLAMPED=6)
        ranked = E.ranked_latents(csr_array(z), forget, E.RETAIN_FREQUENCY)[0]
        assert sorted(ranked) == list(range(7)) and ranked[0] == 3
        assert E.ranked_latents(csr_array(z), ~forget, E.RETAIN_FREQUENCY)[0][0] == 5
        place = ranked.tolist().index
        if selection == "frequency":                    # frequent elsewhere: behind the rare one, however frequent here
            assert place(1) == 1 and place(0) > 1
        else:
            assert place(0) == 1 and place(5) > place(2)


def test_ratio_by_a_loop(E, settings):
    """By energy: a latent that fires as often but more strongly on FORGET goes before."""
    settings(SELECTION="ratio", CLAMPED=6)
    rng = np.random.default_rng(1)
    z, forget = rng.random((300, 12)) * (rng.random((300, 12)) < 0.3), rng.random(300) < 0.3
    z[forget, 4] *= 3
    there, elsewhere = ([np.mean([z[t, i] ** 2 for t in np.flatnonzero(part)]) for i in range(12)]
                        for part in (forget, ~forget))
    ratios = np.array(there) / (np.array(elsewhere) + 0.01 * np.mean(there))
    ranked = E.ranked_latents(csr_array(z), forget, E.RETAIN_FREQUENCY)[0]
    assert ranked[0] == 4 and ranked.tolist() == np.argsort(-ratios).tolist()


def test_each_clamped_latent_has_another_one_of_its_rate(E):
    """Each its own, the nearest that is left, none of the clamped ones; fewer where latents run out."""
    rate = np.array([0.5, 0.1, 0.1, 0.1, 0.3, 0.11, 0.9, 0.12])
    assert E.rate_matched(rate, np.array([1, 2, 3])).tolist() == [5, 7, 4]
    assert E.rate_matched(rate, np.array([6])).tolist() == [0]
    found = E.rate_matched(rate, np.array([2, 0, 3, 1, 4]))
    assert sorted(found) == [5, 6, 7] and found[0] == 5 and E.rate_matched(rate, np.arange(8)).tolist() == []


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
    return roc_auc_score(fresh[1].numpy(), E.fit_matcher(*fitted)(fresh[0]).numpy())


@pytest.mark.parametrize("matcher", ["logistic", "attention"])
def test_a_matcher_sees_an_order(E, settings, matcher):
    """Not where the windows' positions are shuffled, with the same latents in them."""
    settings(MATCHER=matcher)
    assert auroc(E, windows_of_two(1_000, 0), windows_of_two(500, 1)) > 0.95
    assert 0.35 < auroc(E, windows_of_two(1_000, 0, True), windows_of_two(500, 1, True)) < 0.65


@pytest.mark.parametrize("matcher", ["logistic", "attention"])
def test_a_matcher_finds_the_one_latent_that_tells(E, settings, matcher):
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
        match = E.fit_matcher(*planted(0))
    found = match(x)
    assert found.shape == (800,) and not found.requires_grad and (found > 0).all() and (found < 1).all()
    assert roc_auc_score(forget.numpy(), found.numpy()) > 0.95
    assert found[forget].mean() > 0.5 > found[~forget].mean()
    assert torch.allclose(match(x.view(8, 100, 5, 4)), found.view(8, 100), atol=1e-6)


@pytest.mark.parametrize("matcher", ["logistic", "attention"])
def test_a_matcher_of_nothing_is_at_chance(E, settings, matcher):
    settings(MATCHER=matcher)
    x, forget = torch.rand(2_000, 5, 4), torch.arange(2_000) % 2 == 0
    assert 0.4 < auroc(E, (x[:1_000], forget[:1_000]), (x[1_000:], forget[1_000:])) < 0.6


# ---- McNemar's test of answers ----
def test_mcnemar_by_hand(E):
    """Of six answers that changed one turned right: p = 2 (1 + 6) / 2^6; those that stay have no say."""
    before = np.array([True] * 5 + [False] + [True, False] * 20)
    now = np.array([False] * 5 + [True] + [True, False] * 20)
    assert E.mcnemar(now, before) == pytest.approx(14 / 64)
    assert E.mcnemar(before, before) == 1.0


def test_answers_under_edits_are_compared_with_the_models_own(E, settings, tmp_path):
    before = np.array([True] * 5 + [False] + [True, False] * 20)
    now = np.array([False] * 5 + [True] + [True, False] * 20)
    settings(FORGET_QUESTIONS=questions_file(tmp_path), RETAIN_QUESTIONS=None,
             right_answers=lambda run, dataset, edit: edit)
    run = SimpleNamespace(store=SimpleNamespace(folder=tmp_path))
    ids, group = np.arange(2), np.array(["forget", "retain"])
    plan = UnlearningPlan(ids, group, ids, group, SimpleNamespace(options=ids), group)
    found = E.question_scores(run, plan, {"unclamped": before, "standard": now})
    assert found == {"unclamped_forget_questions": before.mean(), "standard_forget_questions": now.mean(),
                     "standard_forget_questions_p": pytest.approx(14 / 64)}


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
    found = E.gate_evidence(match)
    assert not found[0, :31].any()
    assert found[0, 31:42].tolist() == pytest.approx([(t - 9) / 32 for t in range(31, 42)])
    assert (found[0, 41:] == 1).all()
    assert not found[1, :50].any() and found[1, 57:].tolist() == pytest.approx([8 * 0.5 / 32] * 23)


@pytest.mark.parametrize("seq", [32, 33, 90])
def test_gate_against_loops(E, seq):
    match = torch.rand(3, seq, generator=torch.Generator().manual_seed(seq))
    close(E.gate_evidence(match), naive_gate(match, 32), 1e-5)
    assert (E.gate_evidence(match).diff() >= 0).all()


def test_gate_is_causal_and_padding_before_never_dilutes(E):
    match = torch.rand(3, 70, generator=torch.Generator().manual_seed(0))
    found, changed = E.gate_evidence(match), match.clone()
    changed[:, 45:] = 1 - changed[:, 45:]
    after = E.gate_evidence(changed)
    assert torch.equal(after[:, :45], found[:, :45]) and not torch.equal(after, found)
    for pad in (1, 40, 200):
        behind = E.gate_evidence(torch.cat([torch.zeros(3, pad), match], 1))[:, pad:]
        assert (behind >= found - 1e-6).all()


def test_too_few_positions_open_no_gate(E):
    for seq in (1, 8, 31):
        assert torch.equal(E.gate_evidence(torch.ones(2, seq)), torch.zeros(2, seq))
    assert E.gate_evidence(torch.ones(2, 32))[:, -1].tolist() == [1.0, 1.0]


# ---- Edits by hand ----
def bare(E, sae, clamped, q95, matchers={}, thresholds={}, **others):
    """An Unlearner whose selection, matchers and thresholds are a test's; the matcher sees all latents."""
    unlearner = E.Unlearner.__new__(E.Unlearner)
    matcher = E.Matcher(np.arange(sae.d_sae), torch.tensor(q95))
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
def test_pattern_clamps_where_its_window_matches(E, settings, three, back):
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
    unlearner = bare(E, three, [0], [1.0] * 3, direction=direction, retain_mean=rest)
    before = (POINTS - rest) @ direction
    for strength in (0.5, 1.0, 2.0):
        moved = POINTS + unlearner.edit("projection", strength)(batch_of(E, POINTS))
        assert torch.allclose((moved - rest) @ direction, (1 - strength) * before, atol=1e-5)
        close(moved @ torch.tensor([0.8, -0.6]), POINTS @ torch.tensor([0.8, -0.6]), 1e-5)
    assert not unlearner.edit("projection", 0.0)(batch_of(E, POINTS)).any()         # "unclamped"
