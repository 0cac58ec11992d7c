"""comparison.md: what it says of methods rests on seeds, and it finds nothing where there is nothing."""
import itertools
import json

import numpy as np
import pytest

from copies import load_module, PROJECT

NOISE = load_module("bench/seed_noise.py")
HEADLINES = ("explained_variance", "l0", "dead_fraction", "loss_increase_nats", "ce_recovered_vs_unigram", "stability", "smoothness",
             "probe_token_type", "probe_context", "final_train_loss", "best_val_loss")


@pytest.fixture(scope="module")
def plot():
    return load_module("plot.py")


@pytest.fixture(scope="module")
def committed():
    """{row: [metrics of each seed]} of the committed runs with three seeds."""
    return NOISE.seeds_of_rows(PROJECT / "bench" / "results" / "runs")


def run_of(plot, folder, seeds, data="abc"):
    """A Run with these headline values: one dictionary a seed."""
    values = {metric: [seed[metric] for seed in seeds] for metric in seeds[0]}
    entries = {"core": {"means": {}, "final_info_dict": values}}
    caveat = "" if data == "abc" else "data_hash"
    return plot.Run(folder, folder, "k", "o", entries, {"data_hash": data}, {}, {}, [], [], {}, caveat)


def findings(plot, *runs):
    """{metric: finding} of the second run against the first."""
    rows = plot.compare_seeds(list(runs))
    adjusted = plot.corrected([row.difference and row.difference.p for row in rows])
    return {row.metric: plot.seed_row(row, q)[-2] for row, q in zip(rows, adjusted)}


def headlines_of(seeds):
    shared = [name for name in HEADLINES if all(name in seed for seed in seeds)]
    return shared, np.array([[seed[name] for name in shared] for seed in seeds])


# ---- One seed ----
def test_one_seed_is_no_finding_however_large_the_difference(plot):
    small, large = {"explained_variance": 0.1, "l0": 50.0}, {"explained_variance": 0.9, "l0": 20.0}
    for mine, theirs in (([large], [small]), ([large] * 3, [small]), ([large], [small] * 3)):
        runs = run_of(plot, "run_0", theirs), run_of(plot, "run_1", mine)
        assert set(findings(plot, *runs).values()) == {"one seed: no finding"}
    text = "\n".join(plot.seed_table(plot.compare_seeds(list(runs))))
    assert "better is" in text and "| higher " in text and "| +0.8 " in text and "| better " in text


def test_no_pair_of_committed_seeds_is_a_finding(plot, committed):
    pairs = [pair for seeds in committed.values() for pair in itertools.combinations(seeds, 2)]
    found = []
    for one, other in pairs:
        shared = headlines_of([one, other])[0]
        runs = (run_of(plot, f"run_{i}", [{name: seed[name] for name in shared}]) for i, seed in enumerate((one, other)))
        found += findings(plot, *runs).values()
    assert len(pairs) >= 75 and set(found) == {"one seed: no finding"}


# ---- Several seeds ----
def test_several_seeds_show_a_difference_and_its_direction(plot):
    rng = np.random.default_rng(0)

    def seeds(ev, nats, l0):
        return [{"explained_variance": ev + 0.001 * a, "loss_increase_nats": nats + 0.001 * b, "l0": l0 + 0.1 * c}
                for a, b, c in rng.normal(size=(3, 3))]

    found = findings(plot, run_of(plot, "run_0", seeds(0.90, 0.10, 48)), run_of(plot, "run_1", seeds(0.95, 0.15, 30)))
    assert found == {"explained_variance": "better", "loss_increase_nats": "worse", "l0": "differs"}
    found = findings(plot, run_of(plot, "run_0", seeds(0.90, 0.10, 48)), run_of(plot, "run_1", seeds(0.90, 0.10, 48)))
    assert set(found.values()) == {"no difference shown"}


def test_the_test_is_welchs(plot):
    mine, theirs = np.array([1.0, 1.2, 1.4]), np.array([0.9, 0.8])
    error = np.sqrt(mine.var(ddof=1) / 3 + theirs.var(ddof=1) / 2)
    freedom = error ** 4 / ((mine.var(ddof=1) / 3) ** 2 / 2 + (theirs.var(ddof=1) / 2) ** 2 / 1)
    from scipy.stats import t
    test = plot.seed_test(mine, theirs)
    assert test.mean == pytest.approx(0.35) and test.p == pytest.approx(2 * t.sf(0.35 / error, freedom))
    assert (test.high - test.low) / 2 == pytest.approx(t.ppf(0.975, freedom) * error)
    assert plot.seed_test(np.ones(3), np.ones(3)) is None                    # nothing differs: nothing to test


@pytest.mark.parametrize("n_seeds", [2, 3, 5])
def test_two_halves_of_one_method_differ_in_at_most_one_case_in_twenty(plot, committed, n_seeds):
    """A/A: as many seeds a side, with the variances and correlations between seeds that the committed runs have."""
    rng, called, n = np.random.default_rng(n_seeds), 0, 0
    for seeds in committed.values():
        names, values = headlines_of(seeds)
        spread = (values - values.mean(0)) / np.sqrt(len(values) - 1)
        for _ in range(20):
            draws = values.mean(0) + rng.normal(size=(2, n_seeds, len(values))) @ spread
            runs = [run_of(plot, f"run_{i}", [dict(zip(names, row)) for row in half]) for i, half in enumerate(draws)]
            called += bool({"better", "worse", "differs"} & set(findings(plot, *runs).values()))
            n += 1
    assert n >= 500 and called / n <= 0.05


# ---- Files ----
def test_file_by_file_two_seeds_of_one_method_often_differ(plot, committed, monkeypatch):
    """What comparison.md says of its second table: more than a third of such tests, over the committed runs."""
    monkeypatch.setattr(plot, "RESAMPLES", 400)
    folder, called = PROJECT / "bench" / "results" / "runs", []
    for name in committed:
        seeds = [json.loads((folder / f"{name}.{seed}.json").read_text())["per_file"] for seed in range(3)]
        for one, other in itertools.combinations(seeds, 2):
            pairs = [np.array([one[metric], other[metric]], float) for metric in one if metric in other]
            pairs = [pair[:, np.isfinite(pair).all(0)] for pair in pairs]
            p = [plot.paired_test(mine[None], theirs[None]).p for mine, theirs in pairs if len(mine) > 1]
            called += [q < 0.05 for q in plot.corrected(p)]
    assert len(called) > 400 and np.mean(called) > 1 / 3, (len(called), np.mean(called))


def test_names_say_that_a_value_is_by_file(plot):
    values = np.random.default_rng(0).normal(size=(1, 40))
    row = plot.Comparison(run_of(plot, "run_1", [{"l0": 1.0}]), "l0", values, values, plot.paired_test(values, values))
    assert "| l0 by file |" in "\n".join(plot.file_table([row]))


# ---- Noise and directions ----
def test_seed_noise_is_that_of_the_committed_runs(plot, committed):
    assert plot.seed_noise() == NOISE.seed_noise(committed)
    planted = {"a": [{"m": 1.0}, {"m": 2.0}, {"m": 3.0}], "b": [{"m": 0.0}] * 3, "c": [{"m": 0.0}, {"m": 0.0}, {"m": 3.0}]}
    assert NOISE.seed_noise(planted) == {"m": pytest.approx(np.sqrt((1 + 0 + 3) / 3), rel=5e-3)}


def test_every_headline_has_a_direction(plot):
    import experiment
    headlines = {*experiment.TRAINING_HEADLINES, *(name for line in experiment.EVALUATIONS.values() for name in line.headlines)}
    assert {name for name in headlines if plot.better_direction(name) == 0} == {"l0"}
    assert plot.better_direction("explained_variance") == 1 and plot.better_direction("loss_increase_nats") == -1
    assert plot.better_direction("fvu") == -1 and plot.better_direction("a_new_metric") == 0
