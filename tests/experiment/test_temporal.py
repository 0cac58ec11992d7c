"""The temporal evaluation as a whole, and parameters through training."""
import copy
import json
import math

import numpy as np
import pytest
import torch

from made_tokenizers import Joined
from runtime.errors import RunnerError
from small_saes import adaptive, D_IN
from test_stability import by_hand, fire_given_token

# ---- Parameters through training ----
def log_of(**kwargs):
    return {"step": [20, 40, 60, 80, 100], "parameters": {}, "losses": {}, "stages": ["a"],
            "stage_starts": [0]} | kwargs


def run_of(E, store, sae, log=None, live=(5, 3)):
    return E.Run(sae, store, None, 0, E.LiveRule(*live), log or log_of())


@pytest.mark.parametrize("values, step", [([0, 0.5, 1.04, 0.96, 1.0], 60), ([1.0] * 5, 20), ([1, 1, 1, 0.9, 1], 100),
                                          ([5, 4, 3, 2, 1], 100), ([-2, -1, -1, -1, -1], 40)])
def test_convergence_is_the_step_from_which_a_parameter_stays(E, make_store, values, step):
    store = make_store(torch.randn(6, 5, 3), 3)
    found = E.parameter_metrics(run_of(E, store, E.SAE(3, 8, 2), log_of(parameters={"theta": values})))
    assert found == {"theta_final": values[-1], "theta_converged_at": step}


def test_sensitivity_is_the_slope_of_the_validation_loss(E, make_store):
    """A decoder bias p (1, 1, 1): the loss has the slope 2 p |1|^2 - 2 E[1 . (x - z W_dec)]; the rest stays put."""
    class Shifted(E.TopK):
        def __init__(self, start):
            super().__init__(3, 8, 2)
            self.p = torch.nn.Parameter(torch.tensor(start))

        def decode(self, latents):
            return latents.decode(self.W_dec) + self.p

    store = make_store(torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(0)), 3)
    for start in (0.0, 2.0, -0.5):
        torch.manual_seed(0)
        sae = Shifted(start)
        state = copy.deepcopy(sae.state_dict())
        found = E.parameter_metrics(run_of(E, store, sae))
        batch = store.batch(np.arange(3, 6))
        slope = torch.autograd.grad(E.squared_error(batch, sae.decode(sae.encode(batch))), sae.p)[0].item()
        assert found == {"p_sensitivity": pytest.approx(slope, rel=1e-2, abs=1e-3)}
        assert all(torch.equal(v, state[n]) for n, v in sae.state_dict().items())


@pytest.mark.parametrize("gaps, alarm", [([0.1, 0.3, 0.5, 0.6, 0.7], 0.0), ([0.1, 0.3, 0.5, 0.2, 0.2], 1.0),
                                         ([0.9, 0.2, 0.3, 0.3, 0.4], 0.0)])
def test_collapse_alarm(E, make_store, gaps, alarm):
    """The gap is compared with the one at the end of the stage before the consistency loss came in, step 40."""
    store = make_store(torch.randn(6, 5, 3), 3)
    log = log_of(val_step=[20, 40, 60, 80, 100], consistency_gap=gaps, stages=["a", "b", "c"], stage_starts=[0, 20, 40])
    found = E.parameter_metrics(run_of(E, store, E.SAE(3, 8, 2), log))
    assert found == {"consistency_gap": gaps[-1], "consistency_gap_before": gaps[1], "collapse_alarm": alarm}
    found = E.parameter_metrics(run_of(E, store, E.SAE(3, 8, 2), log | {"stages": ["a"], "stage_starts": [0]}))
    assert found["consistency_gap_before"] == gaps[0]   # a single stage: with its beginning


def test_collapse_alarm_of_a_short_run(E, make_store):
    """The last stage begins before the first logged row: that row is the nearest."""
    log = log_of(val_step=[20, 40, 60, 80, 100], consistency_gap=[0.5, 0.4, 0.3, 0.2, 0.1], stages=["a", "b"], stage_starts=[0, 10])
    found = E.parameter_metrics(run_of(E, make_store(torch.randn(6, 5, 3), 3), E.SAE(3, 8, 2), log))
    assert found == {"consistency_gap": 0.1, "consistency_gap_before": 0.5, "collapse_alarm": 1.0}


def test_cross_feature_consistency_gives_the_temperature(E, make_store, settings):
    store = make_store(torch.randn(6, 5, D_IN), 3)
    sae = adaptive(E).eval()
    found = E.parameter_metrics(run_of(E, store, sae))
    assert found["decay_slope"] == pytest.approx(0.7, abs=1e-3) and found["decay_r2"] == pytest.approx(1, abs=1e-4)
    assert {f"{name}_sensitivity" for name in ("beta", "theta_raw", "T")} <= set(found)
    settings(ABLATE=("sharing",))
    spread = adaptive(E).eval()
    found = E.parameter_metrics(run_of(E, store, spread))
    assert 0.5 < found["decay_slope"] < 0.9 and found["decay_r2"] < 0.999
    settings(ABLATE=("variance_scaling",))
    assert "decay_slope" not in E.parameter_metrics(run_of(E, store, adaptive(E).eval()))


@pytest.mark.parametrize("beta, T", [(3.0, 2.0), (-15.0, 1.5)])
def test_decays_near_0_and_1_give_finite_results(E, make_store, beta, T):
    """A fast and a slow adaptation: the decays round to 0 or 1 in single precision."""
    store = make_store(torch.randn(6, 5, D_IN), 3)
    sae = adaptive(E).eval()
    sae.beta.data.fill_(beta)
    sae.T.data.fill_(T)
    assert all(math.isfinite(value) for value in E.parameter_metrics(run_of(E, store, sae)).values())


# ---- The evaluation as a whole ----
CONTEXT = 40


@pytest.fixture
def text(E, make_store, monkeypatch):
    """text(name, lengths, filler) -> Store: 12 training windows and 40 held-out ones of 20 files, with slow and
    fast directions; and a tokenizer that needs no model."""
    def build(name="store", lengths=None, filler=None, n=40):
        g = torch.Generator().manual_seed(0)
        x = torch.randn(12 + n, CONTEXT, 16, generator=g)
        for t in range(1, CONTEXT):
            x[:, t, :8] = 0.9 * x[:, t - 1, :8] + 0.44 * x[:, t, :8]
        lengths = np.full(12 + n, CONTEXT) if lengths is None else np.asarray(lengths)
        tokens = np.random.default_rng(0).integers(1, 30, (12 + n, CONTEXT))
        hidden = np.arange(CONTEXT) >= lengths[:, None]
        if filler is not None:
            tokens[hidden] = filler(hidden.sum())
        x[torch.from_numpy(hidden)] = 0.0
        doc_ids = np.concatenate([np.arange(12), 12 + np.arange(n) // 2])
        return make_store(x, 12, tokens, lengths, doc_ids, name)

    monkeypatch.setattr(E, "STABILITY_LAGS", (2, 4))            # within windows of 39 positions
    monkeypatch.setattr(E, "load_tokenizer", lambda: Joined(lambda token: f"<{token}>"))
    return build


def dictionary(E, name="topk", d_sae=64):
    torch.manual_seed(0)
    sae = E.SAE_VARIANTS[name](16, d_sae, 6).eval()
    if hasattr(sae, "threshold"):
        sae.threshold.fill_(0.4)
    if name in ("standard", "temporal_adaptation"):
        sae.b_enc.data.fill_(-0.3)
    sae.b_enc.data[5:9] = -10.0                         # four latents are dead
    return sae


def is_plain(value):
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(part) for key, part in value.items())
    return is_plain(list(value)) if type(value) is tuple else (
        all(map(is_plain, value)) if type(value) is list else type(value) in (float, int, str, type(None)))


METRICS = {"stability", "stability_weighted", "energy", "stability_token", "stability_null_95", "stability_far",
           "stability_far_weighted", "stability_raw", "stability_between", "energy_alarm", "largest_ten_share",
           "slow_explained_variance", "slow_explained_variance_null", "slow_ceiling_x", "slow_ceiling_mean", "slow_latents",
           "stable_fraction", "autocorrelation_lag1", "smoothness", "smoothness_raw", "polysemanticity",
           "polysemanticity_channels", "explained_variance_early", "explained_variance_late"}
CURVES = {"autocorrelation", "stability_null", "stability_by_rate_decile", "similarity_matrix", "evolution", "most_stable"}


@pytest.mark.parametrize("name, ablate, own, drawn", [
    ("topk", (), set(), set()), ("standard", (), set(), set()),
    ("temporal", (), set(), set()), ("temporal", ("attention",), set(), set()), ("tsae", (), set(), set()),
    ("temporal_adaptation", (), {f"{n}_sensitivity" for n in ("beta", "theta_raw", "T")},
     {"variance", "scaled_variance", "decay"}),
    ("temporal_adaptation", ("sharing",), {"T_sensitivity"}, {"variance", "scaled_variance", "decay"}),
    ("temporal_adaptation", ("variance_scaling",), {f"{n}_sensitivity" for n in ("beta", "theta_raw")},
     {"variance", "scaled_variance", "decay"}),
    ("temporal_adaptation", ("trace",), {f"{n}_sensitivity" for n in ("beta", "theta_raw", "T")}, {"variance"})])
def test_eval_temporal_end_to_end(E, settings, text, name, ablate, own, drawn):
    settings(ABLATE=ablate, NULL_DRAWS=8)
    store = text()
    sae = dictionary(E, name)
    if name == "temporal":
        sae.attends = True
    result = E.Result(**E.run_evaluation(E.eval_temporal, run_of(E, store, sae)))
    assert METRICS | own <= set(result.metrics) and CURVES | drawn <= set(result.curves)
    assert all(math.isfinite(float(value)) for value in result.metrics.values())
    assert is_plain(result.curves) and is_plain(result.per_sequence)
    json.dumps(result[1:], allow_nan=False)
    n = len(store.windows.sample())
    assert n == 20 and {k: len(v) for k, v in result.per_sequence.items()} == {"slow_explained_variance": n, "stability": n, "stability_far": n, "smoothness": n}
    m, c = result.metrics, result.curves
    assert m["stability"] > 0.03 and m["stability"] > m["stability_null_95"]    # half of the directions are slow
    assert np.mean(result.per_sequence["stability"]) == pytest.approx(m["stability"], rel=1e-4)
    assert np.mean(result.per_sequence["smoothness"]) == pytest.approx(m["smoothness"], rel=1e-4)
    assert abs(m["stability_token"]) < 0.02                                             # tokens are noise here
    assert 0 < m["stable_fraction"] <= 1 and 0.8 < m["polysemanticity"] < 1.2
    assert c["autocorrelation"][0] == pytest.approx(m["autocorrelation_lag1"]) and len(c["autocorrelation"]) == 32
    assert np.quantile(c["stability_null"], 0.95) == pytest.approx(m["stability_null_95"])
    assert len(c["stability_null"]) == 8 and len(c["stability_by_rate_decile"]) == 10
    similarity = np.array(c["similarity_matrix"])
    assert similarity.shape == (20, 20) and np.abs(similarity - similarity.T).max() < 2e-4
    assert np.diag(similarity).min() > np.diag(similarity, 8).max()
    seen = c["evolution"]
    assert len(seen["tokens"]) == CONTEXT - 1 and len(seen["values"]) == len(seen["latents"]) <= 16
    assert seen["tokens"] == [f"<{t}>" for t in store.windows.tokens[12, 1:]]
    z = sae.encode(store.batch([12])).dense()[0]
    assert np.array(seen["values"]) == pytest.approx(z[:, seen["latents"]].t().detach().numpy(), abs=1e-4)
    every = sae.encode(store.batch(np.arange(12, 52))).dense().flatten(0, 1).detach().numpy()
    q95 = [np.quantile(every[every[:, i] != 0, i], 0.95) for i in seen["latents"]]
    assert np.array(seen["q95"]) == pytest.approx(q95, rel=1e-4)
    assert seen["file"] == store.windows.names[store.windows.doc_ids[12]] and "stability" in seen["selection"]


def test_explained_variance_of_the_two_halves(E, settings, text):
    settings(NULL_DRAWS=2)
    store, sae = text(), dictionary(E)
    store.shard_tensors[0] *= torch.linspace(0.5, 2.0, CONTEXT)[:, None]        # later tokens have more to explain
    m = E.eval_temporal(run_of(E, store, sae)).metrics
    batch = store.batch(np.arange(12, 52))
    error = (batch.x - sae.decode(sae.encode(batch))).square().sum(-1).mean(0).detach()
    variance = (batch.x - batch.x.mean((0, 1))).square().sum(-1).mean(0)
    for name, part in (("early", slice(0, 19)), ("late", slice(19, 39))):
        wanted = 1 - (error[part].sum() / variance[part].sum()).item()
        assert m[f"explained_variance_{name}"] == pytest.approx(wanted, abs=1e-4)


def test_evolution_shows_the_latents_with_the_most_stable_energy(E, text):
    store, sae = text(), dictionary(E)
    z = sae.encode(store.batch([20])).dense()[0].detach().numpy()
    alive = np.flatnonzero(z.any(0))[::2]
    for stable in (np.ones(len(alive)), np.linspace(-0.1, 0.5, len(alive))):
        score = np.square(z[:, alive]).sum(0) * np.maximum(stable, 1e-6)
        found = E.top_latents_over_passage(z, ["a"] * len(z), stable, alive, n=7)
        assert found["latents"].tolist() == alive[np.argsort(-score)[:7]].tolist()
        assert found["values"] == pytest.approx(z[:, found["latents"]].T, abs=1e-4)
        assert found["tokens"] == ["a"] * len(z)


def test_the_most_stable_latents_and_the_stability_of_any(E, settings, text):
    settings(NULL_DRAWS=2)
    lengths = np.full(52, CONTEXT)
    lengths[[14, 30]] = 20, 33                          # of windows that are left out
    store, sae = text(lengths=lengths), dictionary(E)
    run, _, found = statistics(E, store, sae, store.windows.full())
    mean, alive = found.mean_stability, run.live.ids
    assert E.stability_of(run, alive[::7]) == pytest.approx(mean[::7], abs=1e-6)
    best = E.eval_temporal(run).curves["most_stable"]
    order = sorted(range(len(alive)), key=lambda i: -mean[i])[:10]
    assert best["latents"].tolist() == alive[order].tolist()
    assert best["stability"] == pytest.approx(mean[order], abs=1e-4)
    assert E.most_stable(mean[:3], alive[:3])["latents"].tolist() == alive[np.argsort(-mean[:3])].tolist()


def statistics(E, store, sae, full):
    """A run, the 95th percentiles of its live latents, and their LatentStatistics on the windows `full`."""
    run = run_of(E, store, sae)
    codes, alive = run.encoded.codes, run.live.ids
    q95 = np.array([np.quantile(codes[:, [i]].data, 0.95) for i in alive], dtype=np.float32)
    rows = [window * (CONTEXT - 1) + t for window in full for t in range(CONTEXT - 1)]
    with torch.no_grad():
        return run, q95, E.latent_statistics(run, codes.tocsr()[rows], full, alive, q95)


def test_latent_statistics_against_loops(E, settings, text):
    """By latent: stability, its token surrogate, autocorrelation, rate, energy; by window: smoothness."""
    settings(NULL_DRAWS=3)
    lengths = np.full(52, CONTEXT)
    lengths[[14, 15, 30]] = 20, 33, 39
    store, sae = text(lengths=lengths), dictionary(E)
    full = store.windows.full()
    assert full.tolist() == [i for i in range(40) if i not in (2, 3, 18)]
    run, q95, found = statistics(E, store, sae, full)
    alive, observed, rate, energy = run.live.ids, found.stability, found.rate, found.energy
    assert len(alive) == 60
    batch = store.batch(full + 12)
    z = sae.encode(batch).dense().detach()[..., torch.from_numpy(alive)]
    a = (z > 0).float()
    p = a.mean((0, 1))
    assert rate == pytest.approx(p.numpy(), rel=1e-5)
    assert energy == pytest.approx(z.square().mean((0, 1)).numpy(), rel=1e-5)
    at_position = a.mean(0)
    assert observed == pytest.approx(by_hand(a.numpy(), at_position.numpy(), (2, 4)).T, abs=2e-3)
    assert found.stability_far == pytest.approx(by_hand(a.numpy(), at_position.numpy(), (17, 32)).T, abs=2e-3)
    assert found.null.shape == (len(alive), 3) and observed.shape == (len(alive), len(full))
    fold = torch.from_numpy(store.windows.doc_ids[full + 12] % 2 == 0)
    given = fire_given_token(E, a, batch.tokens, fold)
    assert found.token_surrogate == pytest.approx(by_hand(given.numpy(), at_position.numpy(), (2, 4)).mean(0), abs=2e-3)
    for lag in (1, 5, 32):
        deviation, centred = (at_position * (1 - at_position)).sqrt(), a - at_position
        wanted = (centred[:, :-lag] * centred[:, lag:]).mean((0, 1)) / (deviation[:-lag] * deviation[lag:]).mean(0)
        assert found.autocorrelation[:, lag - 1] == pytest.approx(wanted.numpy(), abs=1e-4)
    present = (a.amax(1) > 0).sum(1)
    scaled = (E.smoothness(z, batch.x, torch.from_numpy(q95)) / present).numpy()
    assert found.smoothness == pytest.approx(scaled, rel=1e-4)
    assert found.smoothness_raw == pytest.approx((E.smoothness(z, batch.x, 1.0) / present).numpy(), rel=1e-4)
    m, mean, weight = E.eval_temporal(run).metrics, observed.mean(1), energy / energy.sum()
    for name, value in (("stability", mean.mean()), ("stability_far", found.stability_far.mean()),
                        ("stability_weighted", mean @ weight), ("stability_far_weighted", found.stability_far.mean(1) @ weight),
                        ("energy", energy.sum()), ("energy_alarm", float(energy.sum() > 1.5)),
                        ("largest_ten_share", np.sort(weight)[-10:].sum()), ("stability_raw", mean.mean() + found.between.mean()),
                        ("stability_token", found.token_surrogate.mean()),
                        ("autocorrelation_lag1", found.autocorrelation[:, 0].mean()),
                        ("smoothness", found.smoothness.mean()), ("smoothness_raw", found.smoothness_raw.mean())):
        assert m[name] == pytest.approx(value, rel=1e-4), name


def test_smoothness_divides_by_the_exact_number_of_present_latents(E, settings, text):
    """Hundreds of latents in a window: more than eight bits can count."""
    settings(NULL_DRAWS=1)
    store, sae = text(n=8), dictionary(E, "standard", 700)
    full = store.windows.full()
    run, _, found = statistics(E, store, sae, full)
    batch = store.batch(full + 12)
    z = sae.encode(batch).dense().detach()[..., torch.from_numpy(run.live.ids)]
    present = (z > 0).any(1).sum(1)
    assert present.min() > 257
    assert found.smoothness_raw == pytest.approx((E.smoothness(z, batch.x, 1.0) / present).numpy(), rel=2e-4)


def test_a_padded_window_is_left_out(E, settings, text):
    """Of the figures by position; its file is in the per-sequence lists by its other window, or as None."""
    settings(NULL_DRAWS=2)
    lengths = np.full(52, CONTEXT)
    lengths[[12, 13, 14]] = 20, 33, 39                  # both windows of the first file, one of the second
    store, sae = text(lengths=lengths), dictionary(E)
    result = E.Result(**E.run_evaluation(E.eval_temporal, run_of(E, store, sae)))
    assert result.per_sequence["stability"][0] is None and result.per_sequence["smoothness"][0] is None
    assert all(value is not None for values in result.per_sequence.values() for value in values[1:])
    json.dumps(result[1:], allow_nan=False)
    full = store.windows.full()
    scaled = statistics(E, store, sae, full)[2].smoothness
    assert full.tolist() == list(range(3, 40)) and len(scaled) == 37
    assert result.per_sequence["smoothness"][1] == pytest.approx(scaled[0])
    assert result.per_sequence["smoothness"][2] == pytest.approx(scaled[1:3].mean())
    assert result.curves["evolution"]["tokens"] == [f"<{t}>" for t in store.windows.tokens[15, 1:]]


def test_what_stands_in_the_padding_changes_no_temporal_figure(E, settings, text):
    settings(NULL_DRAWS=4)
    lengths = np.where(np.arange(52) % 4 == 1, 15, CONTEXT)
    rng, results = np.random.default_rng(5), []
    for name, filler in (("same", np.zeros), ("other", lambda n: rng.integers(100, 130, n))):
        results.append(E.eval_temporal(run_of(E, text(name, lengths, filler), dictionary(E))))
    for part in ("metrics", "per_sequence"):
        a, b = (getattr(result, part) for result in results)
        for name in a:
            assert a[name] == pytest.approx(b[name], abs=1e-6), name


def test_no_full_window_is_an_error(E, settings, text):
    store, sae = text(lengths=np.full(52, CONTEXT - 1)), dictionary(E)
    with pytest.raises(RunnerError, match="CONTEXT_LENGTH = 40"):
        E.eval_temporal(run_of(E, store, sae))
    lengths = np.full(52, CONTEXT - 1)
    lengths[[0, 20]] = CONTEXT                          # one is not enough, nor do training windows help
    with pytest.raises(RunnerError, match="CONTEXT_LENGTH = 40"):
        text("one", lengths).windows.full()


def test_a_dictionary_without_live_latents_is_an_error(E, text):
    sae = dictionary(E)
    sae.b_enc.data -= 100.0
    with pytest.raises(E.RunnerError, match="live"):
        E.eval_temporal(run_of(E, text(), sae))


def test_slow_and_scrambled_activations_are_told_apart(E, settings, text):
    """The same dictionary over the same tokens, with each window's positions shuffled: nothing is left."""
    settings(NULL_DRAWS=20)
    store, sae = text(), dictionary(E)
    slow = E.eval_temporal(run_of(E, store, sae)).metrics
    g = torch.Generator().manual_seed(0)
    for w in range(52):
        store.shard_tensors[0][w, 1:] = store.shard_tensors[0][w, 1:][torch.randperm(CONTEXT - 1, generator=g)]
    fast = E.eval_temporal(run_of(E, store, sae)).metrics
    assert slow["stability"] > 0.03 and abs(fast["stability"]) < 0.01
    assert slow["stable_fraction"] > 0.4 and fast["stable_fraction"] < 0.1
    assert slow["autocorrelation_lag1"] > fast["autocorrelation_lag1"] + 0.1
    assert slow["smoothness"] != fast["smoothness"]
