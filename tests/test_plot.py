"""plot.py: figures and tests from any set of results, complete or not, in any place."""
import importlib.util
import itertools
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import matplotlib.colors
import numpy as np
import pytest

PROJECT = Path(__file__).resolve().parent.parent
FIGURES = ("training_curves", "headline_metrics", "sparsity_fidelity", "position")
FILES = 64


def results(variant, fvu, seeds=1, starts=(0,), data="abc"):
    """A final_info.json with explained variance 1 - fvu, the files' difficulty the same in every run."""
    rng = np.random.default_rng(sum(map(ord, variant)))
    hard = np.random.default_rng(0).lognormal(0, 0.3, FILES)
    steps, names = list(range(20, 401, 20)), ["autoencoder", "attention", "consistency"][:len(starts)]
    values = {"explained_variance": 1 - fvu, "l0": 32.0, "loss_increase_nats": fvu, "ce_recovered": 1 - fvu / 2,
              "avg_inference_tokens_per_second": 71641.6}
    training = {"step": steps, "stage": [names[0]] * len(steps), "losses": {"reconstruction": [fvu + 1 / s for s in steps]},
                "l0": [32 + 3000 / s for s in steps], "dead_fraction": [0.0] * len(steps), "parameters": {},
                "val_step": [200, 400], "val_loss": [fvu + 0.01, fvu], "stage_starts": list(starts)}
    entry = {
        "means": {f"{k}_mean": v for k, v in values.items()}, "final_info_dict": {k: [v] * seeds for k, v in values.items()},
        "metrics": values | {"bigram_explained_variance": 0.7, "untrained_explained_variance": 0.05},
        "curves": [{"training": training, "explained_variance_by_position": [1 - fvu] * 127,
                    "loss_increase_by_position": [fvu] * 126} for _ in range(seeds)],
        "per_sequence": [{"fvu": (fvu * hard * rng.lognormal(0, 0.02, FILES)).tolist(),
                          "loss_increase_nats": (0.3 * hard + rng.normal(0, 0.02, FILES)).tolist()} for _ in range(seeds)],
        "config": {"SAE_VARIANT": variant, "ABLATE": [], "TARGET_L0": 32, "data_hash": data, "stages": names}}
    if seeds > 1:
        entry |= {"stderrs": {f"{k}_stderr": 0.01 for k in values}, "metric_stderrs": dict.fromkeys(values, 0.01)}
    return {"core": entry}


def template(folder, runs, labels=None):
    """A copy of plot.py in `folder` beside the runs {name: what final_info.json holds, or its text}."""
    source = (PROJECT / "plot.py").read_text()
    if labels is not None:
        source, found = re.subn(r"^labels = \{\n.*?^\}\n", lambda _: f"labels = {labels!r}\n", source, flags=re.M | re.S)
        assert found == 1
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plot.py").write_text(source)
    for name, content in runs.items():
        (folder / name).mkdir()
        if content is not None:
            (folder / name / "final_info.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def load(folder):
    """plot.py of that folder as a module."""
    spec = importlib.util.spec_from_file_location("plot_under_test", folder / "plot.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_plot(folder, cwd):
    env = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    return subprocess.run([sys.executable, str(folder / "plot.py")], cwd=cwd, env=env, capture_output=True, text=True)


def png_size(path):
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


@pytest.fixture(scope="module")
def plot():
    return load(PROJECT)


# Whole runs ----------------------------------------------------------------------------------------------------------
def test_all_kinds_of_runs_at_once(tmp_path):
    unknown = results("mine", 0.2) | {"other": {"means": {"brand_new_score_mean": -0.4}}}
    runs = {"run_0": results("standard", 0.3), "run_1": results("topk", 0.2, seeds=2, starts=(0, 200, 300)),
            "run_2": None, "run_3": '{"core": {"means"', "run_4": [1, 2], "run_5": unknown,
            "run_6": {"core": {"means": {"l0_mean": 31.0}}}, "run_7": results("gated", 0.2, data="xyz"),
            "run_8": {"core": 3}, "run_9": '{"core": {"means": {"l0_mean": NaN}}}', "run_11": results("topk", 0.2)}
    labels = {"run_0": "standard (baseline)"} | {f"run_{i}": None for i in range(1, 11)}
    folder = template(tmp_path / "an idea, é" / "deep", runs, labels)
    done = run_plot(folder, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    said = done.stdout.splitlines()
    for name, why in {"run_2": "no final_info.json", "run_3": "cannot be used", "run_4": "no evaluations", "run_8": "'means'",
                      "run_9": "l0_mean", "run_10": "no final_info.json"}.items():
        assert [why in line for line in said if line.startswith(f"{name}: skipped")] == [True], name
    assert sum("not in labels" in line for line in said) == 1 and any(line.startswith("run_11: not in labels") for line in said)
    for name in FIGURES:
        assert png_size(folder / f"{name}.png")[0] == 1300, name
    assert "headline_metrics.png: run_0, run_1, run_5, run_6, run_7" in said
    table = (folder / "comparison.md").read_text()
    assert table.strip() in done.stdout
    assert len(re.findall(r"^\| run_1: topk +\| fvu .*\| 0\.0001 .*\| yes +\| 2 against 1", table, re.M)) == 1
    assert len(re.findall(r"^\| run_5: mine +\| loss_increase_nats .*\| no ", table, re.M)) == 1
    assert "run_7 was not tested" in table and "run_6 was not tested" in table and "| run_7" not in table


def test_labels_as_they_ship_and_one_run(tmp_path):
    folder = template(tmp_path, {"run_0": results("standard", 0.3)})
    done = run_plot(folder, cwd=folder)
    assert done.returncode == 0 and done.stderr == ""
    assert "run_1: skipped" in done.stdout and "Nothing was tested" in (folder / "comparison.md").read_text()
    assert {path.stem for path in folder.glob("*.png")} == set(FIGURES)


def test_no_run_at_all_is_an_error(tmp_path):
    folder = template(tmp_path, {"run_0": None, "run_5": results("topk", 0.2)})
    done = run_plot(folder, cwd=folder)
    assert done.returncode == 1 and not list(folder.glob("*.png"))
    assert "nothing to draw" in done.stderr and "run_0, run_1" in done.stderr and "Traceback" not in done.stderr
    assert "run_5: not in labels" in done.stdout


# Reading and drawing -------------------------------------------------------------------------------------------------
def test_legends_and_colors(tmp_path):
    ablated = results("topk", 0.2)
    ablated["core"]["config"]["ABLATE"] = ["auxk"]
    runs = {"run_0": results("standard", 0.3), "run_1": results("topk", 0.2), "run_2": results("topk", 0.2), "run_3": ablated}
    plot = load(template(tmp_path, runs, {"run_0": "base", "run_1": None, "run_2": None, "run_3": None}))
    loaded = plot.load_runs()
    assert [run.label for run in loaded] == ["base", "topk", "topk (run_2)", "topk, no auxk"]
    assert len({run.color for run in loaded}) == 4
    want = [matplotlib.colors.to_rgba(run.color) for run in loaded]
    bars = plot.fig_headlines(loaded).axes[0].patches
    assert [bar.get_facecolor() for bar in bars] == want
    for draw in (plot.fig_training, plot.fig_position):
        legend = draw(loaded).legends[0]
        assert [matplotlib.colors.to_rgba(line.get_color()) for line in legend.get_lines()] == want
        assert [text.get_text() for text in legend.get_texts()] == [run.label for run in loaded]
    plot.plt.close("all")


def test_stage_borders_and_target(tmp_path):
    plot = load(template(tmp_path, {"run_0": results("standard", 0.3), "run_1": results("temporal", 0.2, starts=(0, 200, 300))}))
    top, _, l0, _ = plot.fig_training(plot.load_runs()).axes
    assert [text.get_text() for text in top.texts] == ["autoencoder", "attention", "consistency"]
    borders = [line.get_xdata()[0] for line in top.lines if list(line.get_ydata()) == [0, 1]]
    assert borders == [200, 300]
    assert any(set(line.get_ydata()) == {32} for line in l0.lines)
    plot.plt.close("all")


def test_metrics_never_seen(tmp_path):
    extra = results("mine", 0.2) | {"other": {"means": {"brand_new_score_mean": -0.4}, "stderrs": {"brand_new_score_stderr": 0.1}}}
    plot = load(template(tmp_path, {"run_0": results("standard", 0.3), "run_1": extra}))
    axes = plot.fig_headlines(plot.load_runs()).axes
    panel = next(axis for axis in axes if axis.get_title(loc="left") == "other: brand new score")
    assert [text.get_text() for text in panel.texts] == ["not measured", "-0.400"]
    assert panel.get_xlim()[0] < -0.5 and len(axes) == 6
    plot.plt.close("all")


def test_error_bars(tmp_path):
    one, two = results("standard", 0.3), results("topk", 0.2, seeds=2)
    one["core"]["per_sequence"] = [{"fvu": [0.0] * 60 + [1.0] * 4}]
    plot = load(template(tmp_path, {"run_0": one, "run_1": two}))
    single, several = plot.load_runs()
    assert plot.error_bar(several, several.entries["core"], "l0") == ([0.01, 0.01], True)
    assert plot.error_bar(single, single.entries["core"], "ce_recovered") == (None, False)
    (below, above), over_seeds = plot.error_bar(single, single.entries["core"], "explained_variance")
    assert not over_seeds and 0 < above < 4 / 64 <= below < 0.1      # rare bad files: the longer tail is below


def test_controls_inside_and_outside_the_panel(tmp_path):
    plot = load(template(tmp_path, {"run_0": results("standard", 0.4), "run_1": results("topk", 0.2)}))
    left, right = plot.fig_sparsity_fidelity(plot.load_runs()).axes
    assert left.get_title(loc="right") == "dotted: token-pair lookup (0.7); off scale: untrained SAE (0.05)"
    low, high = left.get_ylim()
    assert low < 0.6 and 0.8 < high and right.get_title(loc="right").startswith("off scale")
    plot.plt.close("all")


def test_positions_fall_into_one_bin_each(plot, tmp_path):
    run = load(template(tmp_path, {"run_0": results("standard", 0.3)})).load_runs()[0]
    for n in (1, 2, 31, 127, 1023):
        values = np.random.default_rng(n).normal(size=n)
        x, binned = plot.by_position(run._replace(curves=[{"curve": values.tolist()}]), "curve")
        ones = np.eye(n)
        weights = np.concatenate([plot.by_position(run._replace(curves=[{"curve": row.tolist()}]), "curve")[1] for row in ones])
        assert ((weights > 0).sum(1) == 1).all() and np.allclose(values @ weights, binned[0])
        assert 1 <= x[0] and x[-1] <= n and (np.diff(x) > 0).all()


def test_seeds_that_stopped_at_different_steps(plot, tmp_path):
    run = load(template(tmp_path, {"run_0": results("topk", 0.2, seeds=2)})).load_runs()[0]
    logs = [{"step": [10, 20, 30], "losses": {"reconstruction": [3.0, 2.0, 1.0], "late": [5.0]}},
            {"step": [10, 15, 20], "losses": {"reconstruction": [1.0, 1.0, 1.0], "late": [7.0]}}]
    run = run._replace(curves=[{"training": log} for log in logs])
    steps, values = plot.training_curve(run, "step", "reconstruction")
    assert list(steps) == [10, 15, 20] and values.tolist() == [[3.0, 2.5, 2.0], [1.0, 1.0, 1.0]]
    assert plot.training_curve(run, "step", "absent") is None
    assert plot.training_curve(run, "step", "late")[0] == [20]


# The paired test -----------------------------------------------------------------------------------------------------
def test_identical_runs(plot):
    values = np.random.default_rng(0).normal(size=(2, 50))
    difference, low, high, p = plot.paired_test(values, values.copy()[::-1])        # the seeds in another order
    assert difference == pytest.approx(0) and low < 0 < high and p == 1
    assert plot.paired_test(values[:1], values[:1]) == (0, 0, 0, 1)


def test_planted_difference(plot):
    """Files differ by far more than the runs: only the pairing can find .02."""
    rng = np.random.default_rng(1)
    baseline = rng.lognormal(0, 1, (1, 256))
    values = baseline + 0.02 + rng.normal(0, 0.08, (1, 256))
    difference, low, high, p = plot.paired_test(values, baseline)
    error = (values - baseline).std(ddof=1) / 16
    assert p < 0.005 and low < 0.02 < high and low > 0
    assert difference == pytest.approx((values - baseline).mean()) and (high - low) == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_p_is_the_exact_one(plot):
    difference = np.array([0.3, -0.1, 0.4, 0.2, 0.5, -0.2, 0.1, 0.35])
    sums = [np.dot(signs, difference) for signs in itertools.product((-1, 1), repeat=8)]
    exact = np.mean(np.abs(sums) >= difference.sum() - 1e-9)
    assert plot.paired_test(difference[None], np.zeros((1, 8)))[3] == pytest.approx(exact, abs=0.01)


def test_null_differences_are_called_at_the_level(plot, monkeypatch):
    monkeypatch.setattr(plot, "RESAMPLES", 500)
    rng = np.random.default_rng(2)
    found = [plot.paired_test(rng.normal(size=(1, 40)), np.zeros((1, 40))) for _ in range(300)]
    assert 0.02 < np.mean([p < 0.05 for *_, p in found]) < 0.09
    assert 0.90 < np.mean([low < 0 < high for _, low, high, _ in found]) < 0.985


def test_interval_holds_the_spread_of_seeds(plot):
    rng = np.random.default_rng(3)
    baseline = rng.normal(size=(2, 100))
    together, apart = baseline + [[0.5], [0.5]], baseline + [[0.0], [1.0]]
    widths = [high - low for _, low, high, _ in (plot.paired_test(together, baseline), plot.paired_test(apart, baseline))]
    assert widths[1] > widths[0] + 0.5


def test_family_is_corrected_together(tmp_path):
    runs = {f"run_{i}": results(variant, fvu) for i, (variant, fvu) in enumerate([("standard", 0.3), ("a", 0.3), ("b", 0.29), ("c", 0.2)])}
    plot = load(template(tmp_path, runs, dict.fromkeys(runs)))
    loaded = plot.load_runs()
    _, rows, notes = plot.compare(loaded)
    p = sorted(row[-1] for row in rows)
    assert len(rows) == 6 and notes == []
    q = np.minimum.accumulate([p[i] * 6 / (i + 1) for i in reversed(range(6))])[::-1]
    shown = sorted(float(line.split("|")[8]) for line in plot.comparison(loaded).splitlines() if line.startswith("| run_"))
    assert shown == pytest.approx(np.minimum(q, 1), abs=6e-5)


def test_runs_that_cannot_be_paired(tmp_path):
    short, none = results("topk", 0.2), results("gated", 0.2)
    short["core"]["per_sequence"][0]["fvu"].pop()
    del none["core"]["config"]["data_hash"], none["core"]["per_sequence"]
    runs = {"run_0": results("standard", 0.3), "run_1": short, "run_2": none}
    _, rows, notes = (lambda plot: plot.compare(plot.load_runs()))(load(template(tmp_path, runs, dict.fromkeys(runs))))
    assert [(row[0].folder, row[1]) for row in rows] == [("run_1", "loss_increase_nats")]
    assert len(notes) == 2 and "run_1 was not tested on fvu" in notes[0] and "run_2 was not tested: other held-out data" in notes[1]
