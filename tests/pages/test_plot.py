"""plot.py: figures and tests from any set of results, complete or not, in any place."""
import itertools
import json
import os
import re
import struct
import subprocess
import sys
import warnings

import matplotlib.colors
import numpy as np
import pytest

from copies import load_module, PROJECT

FIGURES = ("training_curves", "headline_metrics", "sparsity_fidelity", "position", "stability_fidelity", "autocorrelation",
           "feature_evolution", "similarity", "parameters", "losses", "variance_scaling", "unlearning", "clamped_passage",
           "sparse_probing", "recovery", "dwell", "compositions", "reuse", "level_information", "causal_tracing", "level_tree",
           "ablations", "latents")
FILES, SEQ = 64, 127
TOKENS = ["import", " numpy", "\n", "\t", "$x$", "漢字", "\x00", " averylongidentifier", "_", "\n        "] * 13


def other_entries(seeds):
    """The entries of unlearning, without neighbours in its controls, and of sparse probing."""
    rows = [{"strength": s, "forget": 0.4 * s, "neighbours": 0.01 * s, "retain": -0.001} for s in (1, 0.25, 4)]
    frontier = dict.fromkeys(("standard", "pattern", "hybrid"), rows) | {"projection": [{"forget": 0.4, "retain": 0.1}]}
    passage = {"tokens": [" a", "\n", "<b>", "$x$"], "match": [0.1, 0.9, 0.2, 0.8], "gate": [0.0, 0.0, 0.5, 0.5],
               "standard": [True, True, False, True], "pattern": [False, True, False, True], "hybrid": [False] * 4}
    probing = {"k": [1, 2, 5], "sae": [0.7, 0.8, 0.9], "channels": [0.6, 0.7, 0.9], "untrained": [0.5, 0.6, 0.6],
               "tokens": [0.6, 0.6, 0.7]}
    passages = [{"before": "from ", "token": "im\tport", "after": " $x$\n", "value": 0.5}]
    unit = {"id": 7, "rate": 0.01, "passages": passages}
    levels = {"information_matrix": [[0.3, 0.1, 0.0], [0.0, None, 0.2]], "matrix_parents": [3, 5], "matrix_children": [7, 8, 9],
              "matrix_family": [3, 3, 5], "tree": [unit | {"cosine": 0.8, "cosine_rival": 0.1, "children": [
                  unit | {"weight": 0.5}] * n} for n in (2, 6)]}
    scores = {"cosine_primitives": 0.9, "cosine_compositions": 0.5, "auroc_seen": 0.9, "auroc_unseen": 0.8}
    recovery = [{"task": "boolean", "rho": rho, **dict.fromkeys(("sae", "pca", "nmf", "random"), scores)} for rho in (1.0, 0.5, 0.0)]
    patterns = {"compositions": [3, 8], "features": [5, 6, 9], "effects": [[1.0, 0.2, 0.0], [0.0, -0.5, 0.7]],
                "tokens": [[" a", "\n"], ["$x$"]], "pairs": [[(5, 6, 0.3)], []]}
    dwell = {"sae": {f"{n}_{name}": 0.9 - n / 200 for n in (1, 4, 16, 64) for name in ("cosine", "auroc")} | {"boundary": 0.7},
             "null": {f"{n}_{name}": value for n in (1, 4, 16, 64) for name, value in (("cosine", 0.3), ("auroc", 0.5))}}
    return {"dwell": {"means": {}, "metrics": {"dwell_64_auroc": 0.58}, "curves": [{"dwell": dwell}] * seeds},
            "recovery": {"means": {}, "metrics": {"boolean_1_auroc_seen": 0.9}, "curves": [{"recovery": recovery}] * seeds},
            "composition": {"means": {}, "metrics": {"reuse_gini": 0.4, "reuse_gini_null_95": 0.3}, "curves": [{
                "patterns": patterns, "reuse": [5, 3, 0, 1], "reuse_null": [4.0, 3.2, 1.1]}] * seeds},
            "hierarchy": {"means": {"causal_specificity_mean": 8.0}, "metrics": {
                "patched_rise": 0.6, "patched_rise_rival": 0.0, "patched_children": 0.4, "patched_children_rival": 0.1},
                "curves": [levels] * seeds},
            "unlearning": {"means": {"hybrid_retain_mean": 0.001}, "metrics": {"hybrid_retain": 0.001}, "curves": [{
                "frontier": frontier, "roc": dict.fromkeys(("pattern", "hybrid"), [0.0, 0.8, 1.0]), "passage": passage}] * seeds,
                "config": {"FORGET_NATS": 0.4}},
            "sparse_probing": {"means": {"sae_top_1_mean": 0.7}, "metrics": {"sae_top_1": 0.7},
                               "curves": [{"sparse_probing": probing}] * seeds}}


def temporal_entry(rng, seeds, adapted):
    """What eval_temporal leaves of one run: `seeds` seeds, one file without a full window."""
    values = {"stability": 0.02, "smoothness": 0.5, "coherence": 0.9}
    lags, square = np.arange(1, 33), np.arange(64)
    near = np.exp(-abs(square[:, None] - square) / 4.0)

    def curves():
        found = {"autocorrelation": (0.2 / lags + 0.01 * rng.random()).tolist(),
                 "stability_null": rng.normal(0, 3e-4, 50).tolist(), "stability_by_rate_decile": [None] + [0.01] * 9,
                 "similarity_matrix": (near * rng.uniform(0.5, 0.9)).tolist(),
                 "evolution": {"tokens": TOKENS[:SEQ], "latents": list(range(100, 116)),
                               "values": np.maximum(rng.normal(size=(16, SEQ)), 0).tolist()}}
        if adapted:
            variance = rng.lognormal(-7, 1, 300)
            found |= {"variance": variance.tolist(), "scaled_variance": (variance / variance.mean()).tolist(),
                      "decay": rng.uniform(0.2, 0.9, 300).tolist()}
        return found

    entry = {"means": {f"{k}_mean": v for k, v in values.items()}, "curves": [curves() for _ in range(seeds)],
             "metrics": values | {"stability_token": 0.002, "stability_null_95": 5e-4},
             "per_sequence": [{"stability": [None, *(0.02 + rng.normal(0, 0.01, FILES - 1)).tolist()],
                               "smoothness": [None, *(0.5 + rng.normal(0, 0.05, FILES - 1)).tolist()]} for _ in range(seeds)]}
    if seeds > 1:
        entry |= {"stderrs": {f"{k}_stderr": 0.01 for k in values}, "metric_stderrs": dict.fromkeys(values, 0.01)}
    return entry


def results(variant, fvu, seeds=1, starts=(0,), data="abc", ablate=(), temporal=True):
    """A final_info.json with explained variance 1 - fvu, the files' difficulty the same in every run."""
    rng = np.random.default_rng(sum(map(ord, "".join((variant, *ablate)))))
    hard = np.random.default_rng(0).lognormal(0, 0.3, FILES)
    steps, names = list(range(20, 401, 20)), ["autoencoder", "attention", "consistency"][:len(starts)]
    values = {"explained_variance": 1 - fvu, "l0": 32.0, "loss_increase_nats": fvu, "ce_recovered_vs_unigram": 1 - fvu / 2,
              "avg_inference_tokens_per_second": 71641.6}
    parameters = {"temporal": ("gate",), "temporal_adaptation": ("beta", "theta", "temperature")}
    training = {"step": steps, "losses": {"reconstruction": [fvu + 1 / s for s in steps]} | (
                    {"contrastive": [2 / s for s in steps]} if variant in parameters else {}),
                "l0": [32 + 3000 / s for s in steps], "dead_fraction": [0.0] * len(steps),
                "parameters": {name: [1 / s for s in steps] for name in parameters.get(variant, ())},
                "val_step": [200, 400], "val_loss": [fvu + 0.01, fvu], "stage_starts": list(starts), "stages": names}
    headlines = {"final_train_loss": fvu, "best_val_loss": fvu, "total_train_time": 60.0}
    config = {"SAE_VARIANT": variant, "ABLATE": list(ablate), "TARGET_L0": 32, "STABILITY_LAGS": [5, 16],
              "SEEDS": list(range(seeds)), "data_hash": data}
    controls = {"bigram_explained_variance": 0.7, "untrained_explained_variance": 0.05, "detection_reinitialised": 0.45}
    entries = {
        "training": entry_of(headlines, {}, [{"training": training}] * seeds, [{}] * seeds) | {"config": config},
        "core": entry_of(
            values, controls,
            [{"explained_variance_by_position": [1 - fvu] * 127, "loss_increase_by_position": [fvu] * 126}] * seeds,
            [{"fvu": (fvu * hard * rng.lognormal(0, 0.02, FILES)).tolist(),
              "loss_increase_nats": (0.3 * hard + rng.normal(0, 0.02, FILES)).tolist()} for _ in range(seeds)]),
        "detection": entry_of({}, {"detection": 0.5, "detection_same_token": 0.3, "detection_null": 0.2},
                              [{}] * seeds, [{}] * seeds)}
    if temporal:
        entries["temporal"] = temporal_entry(rng, seeds, variant == "temporal_adaptation")
        entries |= other_entries(seeds)
    return entries


def entry_of(headlines, others, curves, per_sequence):
    """An evaluation's entry in final_info.json, with errors where there is more than one seed."""
    seeds, metrics = len(curves), headlines | others
    entry = {"means": {f"{k}_mean": v for k, v in headlines.items()}, "metrics": metrics,
             "final_info_dict": {k: [v] * seeds for k, v in headlines.items()},
             "curves": curves, "per_sequence": per_sequence}
    if seeds > 1:
        entry |= {"stderrs": {f"{k}_stderr": 0.01 for k in headlines}, "metric_stderrs": dict.fromkeys(metrics, 0.01)}
    return entry


def template(folder, runs, labels=None):
    """A copy of plot.py, with pages/, in `folder` beside the runs {name: what final_info.json holds, or its text}."""
    source = (PROJECT / "plot.py").read_text()
    if labels is not None:
        source, found = re.subn(r"^labels = \{\}$", lambda _: f"labels = {labels!r}", source, flags=re.M)
        assert found == 1
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plot.py").write_text(source)
    for room in ("pages", "runtime"):
        (folder / room).symlink_to(PROJECT / room, target_is_directory=True)
    for name, content in runs.items():
        (folder / name).mkdir()
        if content is not None:
            (folder / name / "final_info.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def load(folder):
    """plot.py of that folder as a module."""
    return load_module(folder / "plot.py")


def run_plot(folder, cwd, *arguments, **variables):
    env = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"} | variables
    return subprocess.run([sys.executable, str(folder / "plot.py"), *arguments], cwd=cwd, env=env, capture_output=True, text=True)


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
            "run_8": {"core": 3}, "run_9": '{"core": {"means": {"l0_mean": NaN}}}', "run_11": results("topk", 0.2),
            "run_12": results("temporal_adaptation", 0.2, temporal=False), "run_13": results("temporal_adaptation", 0.2),
            "run_14": results("temporal_adaptation", 0.3, ablate=("trace",))}
    labels = {"run_0": "standard (baseline)"} | {f"run_{i}": None for i in range(1, 15) if i != 11}
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
    assert "runs: run_0 (standard (baseline)), run_1 (topk), run_5 (mine), run_6 (run_6), run_7 (gated), run_12 (temporal_adaptation), " \
        "run_13 (temporal_adaptation (run_13)), run_14 (temporal_adaptation, no trace)" in said
    table = (folder / "comparison.md").read_text()
    assert table.strip() in done.stdout
    assert len(re.findall(r"^\| run_1: topk +\| fvu .*\| 0\.0001 .*\| yes +\| 2 against 1", table, re.M)) == 1
    assert len(re.findall(r"^\| run_5: mine +\| loss_increase_nats .*\| no ", table, re.M)) == 1
    assert "run_7 was not tested" in table and "run_6 was not tested" in table and "| run_7" not in table.split("## How well")[0]
    assert "run_12 was not tested on stability" in table and len(re.findall(r"\| stability ", table)) == 4


def test_labels_as_they_ship_and_one_run(tmp_path):
    folder = template(tmp_path, {"run_0": results("standard", 0.3), "run_1": None})
    (folder / "recovery.png").write_bytes(b"of a run that is gone")
    del (content := results("standard", 0.3))["recovery"]
    (folder / "run_0" / "final_info.json").write_text(json.dumps(content))
    done = run_plot(folder, cwd=folder)
    assert done.returncode == 0 and done.stderr == ""
    assert "run_1: skipped" in done.stdout and "Nothing was tested" in (folder / "comparison.md").read_text()
    assert {path.stem for path in folder.glob("*.png")} == set(FIGURES) - {"parameters", "losses", "variance_scaling", "ablations", "recovery"}


def test_all_complete_runs_are_drawn_in_order(tmp_path):
    runs = {name: results("topk", 0.2) for name in ("run_10", "run_9", "run_batch_topk", "run_0", "run_a", "run_01.old.1", "other")}
    folder = template(tmp_path, runs | {"run_11": None})
    (folder / "run_2.py").write_text("")
    assert [run.folder for run in load(folder).load_runs()] == ["run_0", "run_a", "run_batch_topk", "run_9", "run_10"]
    named = template(tmp_path / "named", {"run_10": runs["run_10"], "run_0": runs["run_0"]}, {"run_10": "mine", "run_0": None})
    assert [(run.folder, run.label) for run in load(named).load_runs()] == [("run_10", "mine"), ("run_0", "topk")]


def test_no_run_at_all_is_an_error(tmp_path):
    for labels, named in ((None, "run_*"), ({"run_0": None, "run_7": "mine"}, "run_0, run_7")):
        folder = template(tmp_path / named[-1], {"run_0": None} | ({"run_5": results("topk", 0.2)} if labels else {}), labels)
        done = run_plot(folder, cwd=folder)
        assert done.returncode == 1 and not list(folder.glob("*.png"))
        assert "nothing to draw" in done.stderr and named in done.stderr and "Traceback" not in done.stderr
        assert ("run_5: not in labels" in done.stdout) == (labels is not None)


def test_help_and_arguments_that_there_are_not(tmp_path):
    folder = template(tmp_path, {"run_0": results("standard", 0.3)})
    done = run_plot(folder, folder, "--help")
    assert done.returncode == 0 and "labels = {" in done.stdout and "run_batch_topk" in done.stdout
    done = run_plot(folder, folder, "--out", "x")
    assert done.returncode == 2 and "--out" in done.stderr and len(done.stderr) < 200
    assert not list(folder.glob("*.png"))


def test_a_backend_that_is_not_there(tmp_path):
    done = run_plot(template(tmp_path, {}), tmp_path, "--help", MPLBACKEND="module://matplotlib_inline.backend_inline")
    assert done.returncode == 0 and done.stderr == ""


def test_a_folder_that_cannot_be_written(tmp_path):
    plot = load(template(tmp_path, {"run_0": results("standard", 0.3)}))
    for place in ("/proc", tmp_path / "plot.py"):           # whoever runs this, no file can be made there
        plot.HERE = plot.Path(place)
        with pytest.raises(SystemExit, match=f"cannot be written into {place} .*Copy the folder"):
            plot.main()


def test_what_to_open_is_said_last(tmp_path):
    folder = template(tmp_path, {f"run_{i}": results("topk", 0.2) for i in range(3)})
    for i, name in enumerate(("run_2", "run_0", "run_1")):
        os.utime(folder / name / "final_info.json", (i, i))
    (folder / "run_1" / "features.json").write_text(json.dumps({"latents": []}))
    plot = load(folder)
    plot.FIGURES = {}
    (folder / "headline_metrics.png").write_bytes(b"")
    runs = plot.load_runs()
    assert plot.what_to_open(runs) == ["headline_metrics.png"]
    for name in ("comparison.md", "run_0/features.html", "run_1/features.html"):
        (folder / name).write_text("")
    assert plot.what_to_open(runs) == ["run_1/features.html", "comparison.md", "headline_metrics.png"]


# Reading and drawing -------------------------------------------------------------------------------------------------
def test_legends_and_colors(tmp_path):
    ablated = results("topk", 0.2)
    ablated["training"]["config"]["ABLATE"] = ["auxk"]
    runs = {"run_0": results("standard", 0.3), "run_1": results("topk", 0.2), "run_2": results("topk", 0.2), "run_3": ablated}
    plot = load(template(tmp_path, runs, {"run_0": "base", "run_1": None, "run_2": None, "run_3": None}))
    loaded = plot.load_runs()
    assert [run.label for run in loaded] == ["base", "topk", "topk (run_2)", "topk, no auxk"]
    assert len({run.color for run in loaded}) == 4
    want = [matplotlib.colors.to_rgba(run.color) for run in loaded]
    bars = plot.fig_headlines(loaded).axes[0].patches
    assert [bar.get_facecolor() for bar in bars] == want[1:]        # differences from the first
    bars = plot.fig_headlines(loaded[:1]).axes[0].patches
    assert [bar.get_facecolor() for bar in bars] == want[:1]
    for draw in (plot.fig_training, plot.fig_position, plot.fig_autocorrelation):
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


def panel(axes, title):
    return next(axis for axis in axes if axis.get_title(loc="left").replace("\n", " ").replace("\xa0", " ") == title)


def test_metrics_never_seen(tmp_path):
    extra = results("mine", 0.2) | {"other": {"means": {"brand_new_score_mean": -0.4}, "stderrs": {"brand_new_score_stderr": 0.1}}}
    plot = load(template(tmp_path, {"run_0": results("standard", 0.3), "run_1": extra}))
    axes = plot.fig_headlines(plot.load_runs()).axes
    unknown = panel(axes, "other: brand new score")
    assert [text.get_text() for text in unknown.texts] == ["n/a", "-0.400"] and unknown.get_xlabel() == ""
    assert unknown.patches[0].get_width() == -0.4       # the baseline has none: the value itself
    assert unknown.get_xlim()[0] < -0.5 and len(axes) == 13
    assert [axis.get_title(loc="left") for axis in axes[6:9]] == ["stability\xa0↑", "smoothness\xa0↓", "coherence\xa0↑"]
    plot.plt.close("all")


def test_headlines_are_differences_with_intervals(tmp_path):
    """.945 against .94 is visible, its direction is said, and its interval is that of the paired test."""
    runs = {"run_0": results("standard", 0.055), "run_1": results("topk", 0.06), "run_2": results("topk", 0.05, data="xyz")}
    runs["run_2"]["training"]["config"]["TARGET_L0"] = 8
    plot = load(template(tmp_path, runs))
    loaded = plot.load_runs()
    axis = panel(plot.fig_headlines(loaded).axes, "explained variance ↑")
    bar, = axis.patches
    assert bar.get_width() == pytest.approx(-0.005) and bar.get_y() < 1 < bar.get_y() + bar.get_height()
    low, high = axis.get_xlim()
    assert high - low < 0.02 and low < -0.0051 and high > 0
    assert "minus standard" in axis.get_xlabel() and axis.get_xlabel().endswith("better →")
    assert [text.get_text() for text in axis.texts] == ["0.945", "0.940", "0.950"]      # the last does not compare: no bar
    difference = plot.paired_test(*plot.paired(loaded[1], loaded[0], "fvu"))
    (line,), = (collection.get_segments() for collection in axis.collections)
    assert sorted(line[:, 0] + 0.005 - difference.mean) == pytest.approx([-difference.high, -difference.low])
    assert panel(plot.fig_headlines(loaded).axes, "loss increase (nats) ↓").get_xlabel().endswith("← better")
    plot.plt.close("all")


def test_names_and_times_of_headlines(tmp_path):
    """No doubled names, no wall-clock times, and a mean over prefixes is called that."""
    extra = {"probes": {"means": {"probe_token_type_mean": 0.8, "probe_brand_new_mean": 0.5}}, "core": results("topk", 0.2)["core"]}
    extra["core"]["means"]["best_val_loss_mean"] = 0.1
    plot = load(template(tmp_path, {"run_0": results("matryoshka", 0.3), "run_1": extra}))
    titles = [axis.get_title(loc="left").replace("\xa0", " ") for axis in plot.fig_headlines(plot.load_runs()).axes]
    assert {"probe: token type ↑", "probe brand new", "training loss (last) ↓\n(matryoshka: mean over prefixes)"} <= set(titles)
    assert {"core: validation loss (best)\n↓", "core: validation loss (best) ↓"} & set(titles)
    assert not [title for title in titles if "time" in title or "tokens/s" in title]
    runs = plot.load_runs()
    assert plot.fig_training(runs).axes[0].get_ylabel() == "reconstruction loss\n(matryoshka: mean over prefixes)"
    assert plot.prefix_note([run._replace(config={"SAE_VARIANT": "topk"}) for run in runs]) == ""
    plot.plt.close("all")


def test_intervals(tmp_path):
    one, two = results("standard", 0.3), results("topk", 0.2, seeds=2)
    one["core"]["per_sequence"] = [{"fvu": [0.0] * 60 + [1.0] * 4}]
    plot = load(template(tmp_path, {"run_0": one, "run_1": two}))
    single, several = plot.load_runs()
    assert plot.over_seeds([several], "core", "l0") == [0.01, 0.01] and plot.over_seeds([single, several], "core", "l0") is None
    assert plot.over_seeds([several, several], "core", "l0") == pytest.approx([0.01 * 2 ** 0.5] * 2)
    assert plot.over_sequences(single, "ce_recovered_vs_unigram") is None
    below, above = plot.over_sequences(single, "explained_variance")
    assert 0 < above < 4 / 64 <= below < 0.1                     # rare bad files: the longer tail is below
    below, above = plot.over_sequences(single, "stability")
    assert below == pytest.approx(1.96 * 0.01 / 63 ** 0.5, rel=0.4) and above > 0     # one file has None
    nothing = single._replace(per_sequence=[{"stability": [None] * FILES}])
    assert plot.over_sequences(nothing, "stability") is None
    assert plot.over_sequences(several, "stability", single)
    assert plot.point_error(several, "stability") == [[0.01], [0.01]] and plot.point_error(single, "stability")[0][0] < 0.005


def test_controls_inside_and_outside_the_panel(tmp_path):
    plot = load(template(tmp_path, {"run_0": results("standard", 0.4), "run_1": results("topk", 0.2)}))
    left, right = plot.fig_sparsity_fidelity(plot.load_runs()).axes
    assert left.get_title(loc="right") == "dotted: token-pair lookup (0.7); off scale: untrained SAE (0.05)"
    low, high = left.get_ylim()
    assert low < 0.6 and 0.8 < high and right.get_title(loc="right") == "off scale: the model itself (0)"
    plot.plt.close("all")


def test_a_line_through_the_runs_of_one_variant(tmp_path):
    """Only through runs that differ in TARGET_L0 alone; every point has its name and its interval."""
    def run(variant, l0, fvu, **constants):
        content = results(variant, fvu)
        content["core"]["metrics"] |= {"l0": l0 + 0.5}
        content["core"]["per_sequence"][0]["l0"] = [l0 - 0.5, l0 + 1.5] * (FILES // 2)
        content["training"]["config"] |= {"TARGET_L0": l0} | constants
        return content

    plot = load(template(tmp_path, {
        "run_0": run("topk", 32, 0.1), "run_1": run("topk", 64, 0.05), "run_2": run("topk", 16, 0.2, SEEDS=[1]),
        "run_3": run("topk", 8, 0.3, TRAIN_TOKENS=5), "run_4": run("gated", 32, 0.15), "run_5": run("gated", 32, 0.16)}))
    runs = plot.load_runs()
    assert [[run.folder for run in group] for group in plot.frontiers(runs)] == [["run_2", "run_0", "run_1"]]
    for axis, values in zip(plot.fig_sparsity_fidelity(runs).axes, ([0.8, 0.9, 0.95], [0.2, 0.1, 0.05])):
        line, = [line for line in axis.lines if len(line.get_xdata()) == 3]
        assert list(line.get_xdata()) == [16.5, 32.5, 64.5] and list(line.get_ydata()) == pytest.approx(values)
        assert [text.get_text() for text in axis.texts] == [run.label for run in runs]
        assert len(axis.containers) == len(runs) and all(bars.has_xerr and bars.has_yerr for bars in axis.containers)
        (left, right), = axis.containers[0].lines[2][0].get_segments()
        assert left[0] == pytest.approx(32.25, abs=0.1) and right[0] == pytest.approx(32.75, abs=0.1)
    plot.plt.close("all")


def test_names_at_points_hide_neither_points_nor_names(plot):
    rng = np.random.default_rng(0)
    panel, names = (0, 0, 300, 200), []
    points = rng.uniform((100, 60), (200, 140), (12, 2))
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    for point in points:
        x, y = plot.free_place(point, 40, panel, [*taken, *names])
        names.append((x - 20, y - 4, x + 20, y + 4))
    for i, (left, bottom, right, top) in enumerate(names):
        assert 0 < left and right < 300 and 0 < bottom and top < 200
        assert not [box for box in taken + names[:i] if left < box[2] and box[0] < right and bottom < box[3] and box[1] < top]
    assert plot.free_place((150, 100), 400, panel, []) == (359, 100)       # too long for the panel: to the right


def test_many_points_have_a_legend(tmp_path):
    core = {"core": {"means": {}, "metrics": {"l0": 31.0, "explained_variance": 0.5, "stability": 0.1}}}
    plot = load(template(tmp_path, {f"run_{i}": core for i in range(13)}))
    runs = plot.load_runs()
    for draw in (plot.fig_sparsity_fidelity, plot.fig_stability_fidelity):
        figure = draw(runs)
        assert len(figure.legends[0].get_texts()) == 13 and not figure.axes[0].texts
        assert not draw(runs[:12]).legends
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
    run.curves[0]["training"]["losses"]["never"] = [None, None]
    assert plot.training_curve(run, "step", "never") is None


def test_a_loss_of_some_stages_stands_at_their_steps(plot, tmp_path):
    run = load(template(tmp_path, {"run_0": results("topk", 0.2)})).load_runs()[0]
    run = run._replace(curves=[{"training": {"step": [10, 20, 30, 40, 50], "losses": {"some": [None, 2.0, None, 4.0, None]}}}])
    steps, values = plot.training_curve(run, "step", "some")
    assert steps == [20, 30, 40] and values[0, [0, 2]].tolist() == [2.0, 4.0] and np.isnan(values[0, 1])


# The temporal figures ------------------------------------------------------------------------------------------------
VARIANTS = ("standard", "temporal", "temporal_adaptation", "tsae", "batch_topk", "hysteresis", "topk")


def several(tmp_path, n, seeds=1):
    """plot.py beside n runs of different variants, the last two of nine ablated; and the runs as it loads them."""
    contents = [results(name, 0.1 + 0.01 * i, seeds, starts=(0, 200, 300) if name == "temporal" else (0,))
                for i, name in enumerate(VARIANTS)]
    contents += [results("temporal", 0.2, seeds, (0, 200), ablate=("consistency",)),
                 results("temporal", 0.3, seeds, (0, 200, 300), ablate=("attention", "positions"))]
    runs = {f"run_{i}": content for i, content in enumerate(contents[:n])}
    plot = load(template(tmp_path, runs, dict.fromkeys(runs)))
    plot.RESAMPLES = 300
    return plot, plot.load_runs()


@pytest.mark.parametrize("n, seeds", [(1, 1), (9, 3)])
def test_nothing_is_cut_off(tmp_path, n, seeds):
    """Every figure is drawn without a warning, at paper width, with all of its artists inside."""
    plot, runs = several(tmp_path, n, seeds)
    missing = {"parameters", "losses", "variance_scaling", "ablations"} if n == 1 else set()
    with plot.plt.rc_context(plot.STYLE):
        for name, draw in plot.FIGURES.items():
            figure = draw(runs)
            assert (figure is None) == (name in missing), name
            if figure is not None:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    figure.savefig(tmp_path / f"{name}.png")
                assert not [text for text in figure.findobj(plot.Text) if text.get_visible() and "mathdefault" in text.get_text()], name
                assert png_size(tmp_path / f"{name}.png")[0] == 1300
                box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
                assert -0.02 < box.x0 and box.x1 < width + 0.02 and -0.02 < box.y0 and box.y1 < height + 0.02, (name, box)
    plot.plt.close("all")


def test_any_key_may_be_missing(tmp_path):
    """Each part of the temporal entry and the training log is taken from one run of two, then is None in both."""
    plot, (_, *runs) = several(tmp_path, 3)
    names = [("curves", name) for name in (*runs[1].entries["temporal"]["curves"][0], "training")]
    names += [("per_sequence", name) for name in ("stability", "smoothness")]
    for part, name in names:
        absent = runs[1]._replace(**{part: [{k: v for k, v in seed.items() if k != name} for seed in getattr(runs[1], part)]})
        none = [run._replace(**{part: [seed | {name: None} for seed in getattr(run, part)]}) for run in runs]
        for some in [[runs[0], absent], none][:1 if name == "training" else 2]:
            drawn = [figure for figure, draw in plot.FIGURES.items() if draw(some) is not None]
            assert len(drawn) >= 8, (name, drawn)
            plot.compare(some)
            plot.plt.close("all")
    for name in runs[1].entries["temporal"]["metrics"]:
        cut = runs[1]._replace(metrics={k: v for k, v in runs[1].metrics.items() if k != name})
        assert plot.fig_autocorrelation([runs[0], cut]) and plot.fig_stability_fidelity([runs[0], cut])
    bare = [run._replace(curves=[], per_sequence=[], metrics={}, config={}, errors={}) for run in runs]
    assert [name for name, draw in plot.FIGURES.items() if draw(bare) is not None] == ["headline_metrics"]
    plot.plt.close("all")


def test_autocorrelation_and_its_nulls(tmp_path):
    plot, runs = several(tmp_path, 3, seeds=3)
    left, right = plot.fig_autocorrelation(runs).axes
    mean = np.mean([seed["autocorrelation"] for seed in runs[1].curves], axis=0)
    assert np.allclose(left.lines[1].get_ydata(), mean) and list(left.lines[1].get_xdata()) == list(range(1, 33))
    assert left.get_yscale() == "log" and len(left.collections) == 3        # the ranges of the seeds
    shaded = left.patches[0].get_extents().transformed(left.transData.inverted())
    assert [shaded.x0, shaded.x1] == pytest.approx([5, 16])
    assert [text.get_text() for text in right.get_yticklabels()] == [run.label for run in runs]
    assert "filled: plain mean; hollow: by energy" in right.get_xlabel()
    null, token, observed = right.lines[3:6]
    draws = np.concatenate([seed["stability_null"] for seed in runs[1].curves])
    assert list(null.get_xdata()) == pytest.approx(list(np.percentile(draws, (2.5, 97.5)))) and list(null.get_ydata()) == [1, 1]
    assert [list(line.get_xdata()) for line in (token, observed)] == [[0.002], [0.02]]
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["permuted positions (95 %)", "from tokens alone"]
    unweighted = runs[0]._replace(metrics=runs[0].metrics | {"stability_weighted": 0.015})
    *_, filled, hollow = plot.fig_autocorrelation([unweighted]).axes[1].lines
    assert [(line.get_xdata()[0], line.get_markerfacecolor()) for line in (filled, hollow)] == [(0.02, runs[0].color), (0.015, "white")]
    below = runs[0]._replace(curves=[{"autocorrelation": [0.1, -0.1, None]}], config={"STABILITY_LAGS": [2, 3]})
    left, right = plot.fig_autocorrelation([below]).axes
    assert left.get_yscale() == "linear" and "2-3" in left.get_title(loc="right")
    plot.plt.close("all")


def test_stability_against_fidelity(tmp_path):
    plot, runs = several(tmp_path, 2, seeds=3)
    bare = runs[0]._replace(metrics={"explained_variance": 0.9})
    axis, = plot.fig_stability_fidelity([bare, runs[1]]).axes
    (point, _, bars), = axis.containers
    assert [point.get_xdata()[0], point.get_ydata()[0]] == [pytest.approx(0.89), 0.02] and len(bars) == 2
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("explained variance ↑", "stability ↑")
    assert plot.fig_stability_fidelity([bare]) is None
    both = runs[1]._replace(metrics=runs[1].metrics | {"slow_explained_variance": 0.01})
    assert [axis.get_ylabel() for axis in plot.fig_stability_fidelity([bare, both]).axes] == ["slow explained variance ↑", "stability ↑"]
    plot.plt.close("all")


def test_tokens_are_shown_as_they_are(plot):
    shown = [plot.visible(token) for token in (" a b", "\n    ", "\t", "漢\x00", "x" * 10, " averylongidentifier", "\ufffd", "$x$")]
    assert shown == ["␣a␣b", "↵␣␣␣␣", "→", "□□", "x" * 10, "␣averylon…", "\ufffd", "$x$"]


def test_evolution_shows_the_last_two_runs(tmp_path):
    """Rows that fire, in one unit: q95 if both runs have it, else their values."""
    plot, runs = several(tmp_path, 4)
    passages = [run.curves[0]["evolution"] for run in runs]
    passages[3]["values"][5] = [1.0] * (SEQ - 64) + [0.0] * 64          # silent where it is shown
    passages[2]["values"] = (3 * np.array(passages[2]["values"])).tolist()
    passages[3] |= {"q95": [2.0] * 8 + [0.5] * 8, "file": "a/b.py", "selection": "first window"}
    shown = [list(range(16)), [i for i in range(16) if i != 5]]
    for units in (np.ones((2, 16)), np.array([[4.0] * 16, passages[3]["q95"]])):
        figure = plot.fig_evolution(runs)
        *axes, bar = figure.axes
        assert [axis.get_title(loc="left") for axis in axes] == [runs[2].label, f"{runs[3].label}: a/b.py"]
        assert bar.get_ylabel() == ("value" if units.max() == 1 else "value / q95")
        assert "first window" in figure.get_supxlabel() and "One scale" in figure.get_supxlabel()
        for axis, passage, rows, unit in zip(axes, passages[2:], shown, units):
            values, found = np.array(axis.images[0].get_array()), np.array(passage["values"])[rows, -64:]
            assert np.allclose(values * unit[rows, None], found) and values.shape == (len(rows), 64)
            assert [text.get_text() for text in axis.get_xticklabels()] == [plot.visible(t) for t in TOKENS[SEQ - 64:SEQ]]
            assert [text.get_text() for text in axis.get_yticklabels()] == [str(100 + i) for i in rows]
        assert len({axis.images[0].get_clim() for axis in axes}) == 1
        assert axes[0].images[0].get_clim()[1] == max(axis.images[0].get_array().max() for axis in axes)
        passages[2]["q95"] = [4.0] * 16
    passages[3]["values"] = np.zeros((16, SEQ)).tolist()
    assert [axis.get_title(loc="left") for axis in plot.fig_evolution(runs).axes[:2]] == [run.label for run in runs[1:3]]
    plot.plt.close("all")


def test_similarity_has_one_scale(tmp_path):
    plot, runs = several(tmp_path, 6, seeds=3)
    holed = [seed | {"similarity_matrix": [[None, 0.5], [0.25, 1.0]]} for seed in runs[5].curves]
    panels = [axis for axis in plot.fig_similarity([*runs[:5], runs[5]._replace(curves=holed)]).axes if axis.images]
    assert len(panels) == 6 and len({axis.images[0].get_clim() for axis in panels}) == 1
    low, high = panels[0].images[0].get_clim()
    assert low == 0 and 0.3 < high < 0.9                # the diagonal is beyond the scale
    mean = np.mean([seed["similarity_matrix"] for seed in runs[1].curves], axis=0)
    assert np.allclose(panels[1].images[0].get_array(), mean) and panels[1].images[0].get_extent() == [0, 128, 128, 0]
    assert panels[5].images[0].get_extent() == [0, 4, 4, 0]
    plot.plt.close("all")


def test_parameters_and_the_stages_of_their_runs(tmp_path):
    plot, runs = several(tmp_path, 9)
    axes = plot.FIGURES["parameters"](runs).axes
    assert [axis.get_ylabel() for axis in axes] == ["gate", "beta", "theta", "temperature"]
    gate, theta = axes[0], axes[2]
    curves = [line.get_ydata() for line in gate.lines if len(line.get_ydata()) == 20]
    assert len(curves) == 3 and np.allclose(curves, [1 / s for s in range(20, 401, 20)])
    borders = [line.get_xdata()[0] for line in gate.lines if list(line.get_ydata()) == [0, 1]]
    assert borders == [200, 300, 200]       # one plan of two runs, one of the run without its last stage
    assert [text.get_text() for text in gate.texts] == ["autoencoder", "attention", "consistency", "autoencoder", "attention"]
    assert len(theta.lines) == 1 and not theta.texts
    axes = plot.FIGURES["losses"](runs).axes
    assert [axis.get_ylabel() for axis in axes] == ["contrastive"]
    assert np.allclose(axes[0].lines[0].get_ydata(), [2 / s for s in range(20, 401, 20)])
    assert axes[0].lines[0].get_linestyle() == "-"
    late = [run for run in runs if "contrastive" in run.curves[0]["training"].get("losses", {})]
    for run in late:
        log = run.curves[0]["training"]
        log["losses"]["contrastive"] = log["losses"]["contrastive"][-4:]
    axis, = plot.FIGURES["losses"](late).axes
    assert "consistency" in [text.get_text() for text in axis.texts] and "autoencoder" not in [text.get_text() for text in axis.texts]
    for run in runs:
        for seed in run.curves:
            seed["training"]["weighed"] = ["reconstruction"]
    axis, = plot.FIGURES["losses"](runs).axes
    assert axis.get_ylabel() == "contrastive\n(dotted: not trained on)" and axis.lines[0].get_linestyle() == ":"
    plot.plt.close("all")


def test_parameters_that_do_not_learn(tmp_path):
    """Fixed ones, and the weight that is steered towards TARGET_L0, are no curves of learning."""
    plot, runs = several(tmp_path, 3)
    log = runs[2].curves[0]["training"]
    n = len(log["step"])
    log["parameters"] = {"fixed": [0.3] * n, "beta_1": [1 / s for s in log["step"]], "late": [None] * (n - 2) + [0.5, 0.6]}
    axes = plot.FIGURES["parameters"](runs).axes
    assert [axis.get_ylabel() for axis in axes] == ["gate", "late"]
    del log["parameters"]["late"]
    assert plot.FIGURES["parameters"]([runs[2]]) is None
    plot.plt.close("all")


@pytest.mark.parametrize("starts", [(0, 200, 350, 352), (0, 339, 341, 343)])
def test_names_of_short_stages_do_not_overlap(tmp_path, starts):
    """Also where a loss begins late, just before a border."""
    plot, runs = several(tmp_path, 2)
    log = runs[1].curves[0]["training"]
    log |= {"stage_starts": list(starts), "stages": ["first", "second", "third", "fourth"]}
    log["losses"]["contrastive"] = log["losses"]["contrastive"][-4:]
    axis, *_ = plot.FIGURES["losses"](runs).axes
    axis.figure.canvas.draw()
    corners = [text.get_window_extent().x0 * 72 / axis.figure.dpi for text in axis.texts]
    assert len(corners) == sum(end > 340 for end in (*starts[1:], np.inf)) >= 2
    assert (np.diff(corners) > 16).all()
    plot.plt.close("all")


def test_unlearning_has_a_panel_for_each_strategy(tmp_path):
    """One line a false-positive rate, controls beside the strategy without a gate, dots for one thing."""
    plot, runs = several(tmp_path, 2)
    for run in runs:
        frontier = run.curves[0]["frontier"]
        for i, name in enumerate(("pattern_0.05", "pattern_0.2", "random_latents")):
            frontier[name] = [row | {"neighbours": 1.0 + i} for row in frontier["hybrid"]]
        run.config.update(FALSE_POSITIVES=[0.01, 0.05, 0.2], FORGET="sympy")
    (plot.HERE / "bench" / "results").mkdir(parents=True)
    (plot.HERE / "bench" / "results" / "oracle.json").write_text('{"forget": "sympy", "increase": {"forget": 0.7}}')
    figure = plot.fig_unlearning(runs)
    axes = np.array(figure.axes).reshape(3, 3)
    assert [axis.get_title(loc="left") for axis in axes[0]] == ["standard", "pattern", "hybrid"]
    for axis, styles in zip(axes[0], (["-", "None"], ["-", "--", "-."], ["-"])):
        curves = [line for line in axis.lines if list(line.get_ydata()) != [0, 1]]
        assert [line.get_linestyle() for line in curves] == styles * 2
        assert {line.get_color() for line in curves} == {run.color for run in runs}
        borders = [line for line in axis.lines if list(line.get_ydata()) == [0, 1]]
        assert [(line.get_xdata()[0], line.get_linestyle()) for line in borders] == [(0.4, "-"), (0.7, "-")]
    pattern = axes[0, 1].lines[0]
    assert list(pattern.get_xdata()) == [0.1, 0.4, 1.6] and list(pattern.get_ydata()) == [0.0025, 0.01, 0.04]
    assert list(axes[0, 1].lines[1].get_ydata()) == [1, 1, 1] and len(axes[1, 0].lines) == 2 * 3 + 2        # projection
    assert {axis.get_ylim() for axis in axes[:2].flat} == {axes[0, 0].get_ylim()} and axes[0, 0].get_ylim()[1] > 2
    assert [axis.get_title(loc="left") for axis in axes[2]] == ["pattern: tokens of FORGET", "hybrid: windows of FORGET", ""]
    assert list(axes[2, 0].lines[0].get_ydata()) == [0.0, 0.8, 1.0]
    names = [text.get_text() for text in axes[2, 2].get_legend().get_texts()]
    assert names[:3] == ["false positives 0.01", "false positives 0.05", "false positives 0.2"]
    note = " ".join(figure.legends[0].get_title().get_text().split())
    assert "where strategies are compared (0.4 nats), a model trained without FORGET (0.7 nats)" in note
    plot.plt.close("all")


def test_the_clamped_passage_shows_how_the_gate_opens(tmp_path):
    plot, runs = several(tmp_path, 1)
    n = 100
    passage = {"tokens": [f"t{i}" for i in range(n)], "match": [0.5] * n, "gate": [0.0] * 40 + [0.9] * (n - 40),
               "threshold": [0.6] * n, "standard": [i % 2 == 0 for i in range(n)], "hybrid": [i >= 40 and i % 2 == 0 for i in range(n)]}
    runs[0].curves[0]["passage"] = passage
    clamps, gate = plot.fig_clamped_passage(runs).axes
    assert [text.get_text() for text in gate.get_xticklabels()] == passage["tokens"][24:72]
    assert [text.get_text() for text in clamps.get_yticklabels()] == ["clamped: standard", "clamped: hybrid"]
    assert [list(line.get_xdata()) for line in clamps.lines] == [list(range(0, 48, 2)), list(range(16, 48, 2))]
    assert clamps.get_xlim() == gate.get_xlim() == (-0.6, 47.6)
    for gates, first in (([0.0] * n, 52), ([0.9] * n, 0), ([0.0] * 98 + [0.9] * 2, 52)):     # closed: the end
        assert plot.part_of_passage(passage | {"gate": gates})["tokens"][0] == f"t{first}"
    plot.plt.close("all")


def test_the_panel_of_ratings_is_there_if_latents_are_rated(tmp_path):
    plot, runs = several(tmp_path, 2)
    figure = plot.fig_latents(runs)
    axis, = figure.axes
    assert [text.get_text() for text in axis.get_yticklabels()] == [run.label for run in runs]
    assert axis.get_title(loc="right") == "control: an untrained SAE on a model\nwith random weights"
    found = {line.get_marker(): line.get_xdata()[0] for line in axis.lines if line.get_color() == runs[1].color}
    assert found == {runs[1].marker: 0.5, "|": 0.3, "x": 0.2, "2": 0.45}
    assert "people (95 % interval)" not in [text.get_text() for text in figure.legends[0].get_texts()]
    rated = runs[1]._replace(ratings={name: {i: {"a": i % 2} for i in range(9)} for name in ("score", "correct")})
    figure = plot.fig_latents([runs[0], rated])
    assert [len(axis.containers) for axis in figure.axes] == [1, 1]
    assert "people (95 % interval)" in [text.get_text() for text in figure.legends[0].get_texts()]
    plot.plt.close("all")


def test_windows_of_different_lengths_are_whole(tmp_path):
    plot, runs = several(tmp_path, 2)
    runs[1].curves[0]["similarity_matrix"] = np.eye(16).tolist()
    first, second, _ = plot.fig_similarity(runs).axes
    assert first.get_ylim() == (128, 0) and second.get_ylim() == (32, 0)
    plot.plt.close("all")


def test_planted_states_by_how_long_they_last(tmp_path):
    plot, runs = several(tmp_path, 2, seeds=3)
    left, right = plot.fig_dwell(runs).axes
    for axis, chance in ((left, 0.5), (right, 0.3)):
        assert [text.get_text() for text in axis.get_xticklabels()] == ["1", "4", "16", "64"]
        *lines, null = axis.lines
        assert [(line.get_color(), list(line.get_ydata())) for line in lines] == [
            (run.color, pytest.approx([0.895, 0.88, 0.82, 0.58])) for run in runs]
        assert list(null.get_ydata()) == [chance] * 4
    plot.plt.close("all")


def test_bars_of_many_runs_have_their_markers(tmp_path):
    plot, runs = several(tmp_path, 2)
    axis = plot.fig_recovery(runs).axes[0]
    marks = [(line.get_color(), line.get_marker()) for line in axis.lines if line.get_marker() != "None"]
    assert marks == [(run.color, run.marker) for run in runs for _ in range(3)]
    right = plot.fig_causal(runs).axes[1]
    assert [patch.get_width() for patch in right.patches] == [0.6, 0.0, 0.4, 0.1] * 2
    assert [text.get_text() for text in right.get_yticklabels()] == [
        "standard: top tokens' logits", "standard: children that fire", "temporal: top tokens' logits", "temporal: children that fire"]
    plot.plt.close("all")


def test_a_figure_that_fails_keeps_no_other_from_being_drawn(tmp_path, capsys):
    """Whether it fails while it is drawn or while it is saved."""
    def unsaved(runs):
        figure = plot.plt.figure()
        figure.text(0, 0, r"cost $\alhpa$ 5", parse_math=True)
        return figure

    plot, runs = several(tmp_path, 2)
    for name in ("similarity", "position"):
        (plot.HERE / f"{name}.png").write_bytes(b"of an earlier time")
    plot.FIGURES = {"similarity": lambda runs: {}["run_length"], "position": unsaved, "headline_metrics": plot.fig_headlines}
    with pytest.raises(SystemExit, match="these failed, see above: similarity, position$"):
        plot.main()
    said = capsys.readouterr()
    assert "KeyError: 'run_length'" in said.err and "position.png: skipped" in said.err and "alhpa" in said.err
    assert (plot.HERE / "headline_metrics.png").exists() and (plot.HERE / "comparison.md").exists()
    assert not (plot.HERE / "similarity.png").exists() and not (plot.HERE / "position.png").exists()
    assert said.out.splitlines()[-1].startswith("Open first: comparison.md") and not plot.plt.get_fignums()


def test_a_page_that_cannot_be_written(tmp_path, capsys):
    plot, runs = several(tmp_path, 2)
    (plot.HERE / "run_0" / "features.json").write_text(json.dumps({"latents": []}))
    (plot.HERE / "run_0" / "features.html").mkdir()
    assert plot.write_pages(runs) == ["run_0/features.html"]
    said = capsys.readouterr()
    assert "run_0/features.html: not written" in said.err and "run_1/features.html" in said.out


HOSTILE = r"cost $\alhpa$ 5 | a_b * `c` <b>, per" + "\nline"


def test_labels_are_literal(tmp_path):
    """Neither mathematics nor Markdown: every figure is saved, every row of a table has its cells."""
    runs = {"run_0": results("standard", 0.3), "run_1": results("temporal_adaptation", 0.2)}
    folder = template(tmp_path, runs, {"run_0": "$", "run_1": HOSTILE})
    done = run_plot(folder, folder)
    assert done.returncode == 0 and done.stderr == ""
    assert len(list(folder.glob("*.png"))) == len(FIGURES) - 1      # no ablations
    rows = [line for line in (folder / "comparison.md").read_text().splitlines() if line.startswith("|")]
    counts = [len(re.split(r"(?<!\\)\|", row)) for row in rows]
    headers = [i for i, row in enumerate(rows) if row.startswith("| run  ")] + [len(rows)]
    assert sum("alhpa" in row for row in rows) >= 5 and len(headers) == 4       # three tables
    assert all(set(counts[i:j]) == {counts[i]} for i, j in zip(headers, headers[1:]))
    assert all(r"5 \| a_b" in row for row in rows if "alhpa" in row)


def test_names_of_runs_say_what_differs(tmp_path):
    def run(seeds=1, **constants):
        content = results("temporal", 0.2, seeds, ablate=constants.pop("ABLATE", ()))
        content["training"]["config"] |= {"WINDOW": 5, "EVALS": ["core"], "torch": "2"} | constants
        return content

    runs = {"run_0": results("standard", 0.3), "run_1": run(), "run_2": run(WINDOW=9), "run_3": run(EVALS=["core", "x"], torch="3"),
            "run_4": run(ABLATE=("attention",)), "run_5": run(ABLATE=("attention",), WINDOW=7), "run_6": run(seeds=3)}
    loaded = load(template(tmp_path, runs)).load_runs()
    assert [run.label for run in loaded] == [
        "standard", "temporal", "temporal, WINDOW 9", "temporal (run_3)", "temporal, no attention", "temporal, no attention, WINDOW 7",
        "temporal, SEEDS [0, 1, 2]"]


OTHER = {"TRAIN_TOKENS": 9, "EXPANSION": 2, "TARGET_L0": 32, "MODEL_NAME": "other", "LAYER": 4, "data_hash": "xyz"}


def test_runs_that_do_not_compare_are_marked_in_every_figure(tmp_path, monkeypatch):
    """Each figure that shows such a run says why; the others, and the tables, have no asterisk."""
    runs = {"run_0": results("temporal", 0.2), "run_1": results("temporal", 0.3, ablate=("attention",)),
            "run_2": results("temporal_adaptation", 0.2, starts=(0, 200))}
    runs["run_2"]["training"]["config"]["TARGET_L0"] = 48
    plot = load(template(tmp_path, runs))
    loaded, saved = plot.load_runs(), {}
    assert [run.caveat for run in loaded] == ["", "", "TARGET_L0 (48, not 32)"]
    monkeypatch.setattr(plot.plt.Figure, "savefig", lambda figure, path: saved.update({path.stem: figure}))
    assert plot.draw_figures(loaded) == []
    assert set(saved) == set(FIGURES)
    for name, figure in saved.items():
        texts = " ".join(" ".join(text.get_text().split()) for text in figure.findobj(plot.Text))
        marked = "temporal_adaptation *" in texts
        assert figure.get_suptitle() == "* other TARGET_L0 (48, not 32) than run_0" * marked, name
        assert marked == (name != "ablations") and "temporal *" not in texts, name
    assert " * " not in plot.comparison_text(loaded)


@pytest.mark.parametrize("name", OTHER)
def test_what_keeps_runs_from_being_compared(plot, name):
    same = {key: 1 for key in OTHER} | {"SAE_VARIANT": "topk"}
    caveat = plot.caveat_of(same | {name: OTHER[name]}, same)
    assert caveat == ("data_hash" if name == "data_hash" else f"{name} ({OTHER[name]}, not 1)")
    assert plot.caveat_of(same | {"SAE_VARIANT": "x", "SEEDS": [2]}, same) == ""
    assert plot.caveat_of(same | {"LAYER": None, "layer": 1}, same) == ""            # the middle one, left to the runner
    assert plot.caveat_of({}, same).count(", not 1)") == 5                            # unknown


def test_several_reasons_name_their_runs(plot, tmp_path):
    runs = {f"run_{i}": results(f"v{i}", 0.2) for i in range(4)}
    runs["run_1"]["training"]["config"]["EXPANSION"] = runs["run_3"]["training"]["config"]["EXPANSION"] = 2
    plot = load(template(tmp_path, runs | {"run_2": results("v2", 0.2, data="xyz")}))
    runs = [run._replace(label=run.label + " *" * bool(run.caveat)) for run in plot.load_runs()]
    figure = plot.fig_position(runs)
    figure.suptitle("of its own")
    plot.explain_asterisks(figure, runs)
    assert figure.get_suptitle().splitlines() == [
        "of its own", "* v1, v3: other EXPANSION (2, not None) than run_0", "* v2: other data_hash than run_0"]
    plot.plt.close("all")


def test_many_runs_stay_apart(plot, tmp_path):
    n = plot.MOST_RUNS
    assert n == 63 and len(set(zip(itertools.islice(itertools.cycle(plot.COLORS), n), itertools.cycle(plot.MARKERS)))) == n
    core = {"core": {"means": {"l0_mean": 31.0}, "metrics": {"l0": 31.0}}}
    plot = load(template(tmp_path, {f"run_{i}": core for i in range(n + 1)}))
    loaded = plot.load_runs()
    assert len({(run.color, run.marker) for run in loaded[:n]}) == n
    plot.FIGURES = {"headline_metrics": lambda runs: shown.append(len(runs)) or plot.plt.figure()}
    shown = []
    plot.main()
    assert shown == [n]


def test_histograms_of_the_variances(tmp_path):
    plot, runs = several(tmp_path, 3, seeds=3)
    still = [{"variance": [0.0, 1.0, None], "scaled_variance": [1.0] * 3, "decay": [0.5] * 3}]
    axes = plot.fig_variance_scaling([*runs, runs[1]._replace(curves=still)]).axes
    assert [axis.get_xlabel() for axis in axes] == ["log10 variance", "log10 scaled variance", "decay per token"]
    for axis in axes:
        assert [sum(line.get_ydata()) for line in axis.lines] == pytest.approx([1, 1])
        assert [(line.get_color(), line.get_marker()) for line in axis.lines] == [(run.color, run.marker) for run in (runs[2], runs[1])]
    assert axes[0].get_xlim()[0] == pytest.approx(-9, abs=0.6)      # a dead latent's variance of 0
    assert plot.fig_variance_scaling(runs[:2]) is None
    plot.plt.close("all")


def test_what_counts_as_an_ablation(tmp_path):
    others = {"WINDOW": 7}, {"data_hash": "xyz"}, {"SAE_VARIANT": "tsae"}, {"SEEDS": [4]}, {"torch": "3"}
    runs = {"run_0": results("standard", 0.3), "run_1": results("temporal", 0.2), "run_2": results("temporal", 0.2)}
    for i, other in enumerate(others, 3):
        runs[f"run_{i}"] = results("temporal", 0.25, ablate=("attention",))
        runs[f"run_{i}"]["training"]["config"] |= other
    plot = load(template(tmp_path, runs, dict.fromkeys(runs)))
    found = plot.ablations(plot.load_runs())
    assert [(run.folder, full.folder) for run, full in found] == [("run_6", "run_1"), ("run_7", "run_1")]
    assert plot.fig_ablations(plot.load_runs()[:6]) is None


def test_bars_of_the_ablations(tmp_path):
    plot, runs = several(tmp_path, 9, seeds=3)
    axes = plot.fig_ablations(runs).axes
    assert [axis.get_title(loc="left") for axis in axes] == ["explained variance ↑", "loss increase (nats) ↓",
                                                              "stability ↑", "smoothness ↓"]
    assert [text.get_text() for text in axes[0].get_yticklabels()] == ["temporal, no consistency", "temporal, no attention, no\npositions"]
    for axis, metric, sign in ((axes[0], "fvu", -1), (axes[2], "stability", 1)):
        difference, low, high, _ = plot.paired_test(*plot.paired(runs[8], runs[1], metric))
        assert axis.patches[1].get_width() == pytest.approx(sign * difference)
        assert sorted(axis.lines[1].get_xdata()) == pytest.approx(sorted([sign * low, sign * high]))
    assert axes[0].patches[1].get_width() < -0.1                    # .3 of the variance is lost, not .11
    for seed in runs[8].per_sequence:
        del seed["smoothness"]
    assert len(plot.fig_ablations([runs[1], runs[8]]).axes) == 3
    plot.plt.close("all")



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
    rows, notes = plot.compare(loaded)
    p = sorted(row.difference.p for row in rows)
    assert len(rows) == 12 and notes == []
    assert {row.metric for row in rows} == {"fvu", "loss_increase_nats", "stability", "smoothness"}
    q = np.minimum.accumulate([p[i] * 12 / (i + 1) for i in reversed(range(12))])[::-1]
    shown = sorted(float(line.split("|")[8]) for line in plot.file_table(rows) if line.startswith("| run_"))
    assert shown == pytest.approx(np.minimum(q, 1), abs=6e-5)


def test_runs_that_cannot_be_paired(tmp_path):
    short, none = results("topk", 0.2), results("gated", 0.2)
    short["core"]["per_sequence"][0]["fvu"].pop()
    del none["training"]["config"]["data_hash"], none["core"]["per_sequence"]
    runs = {"run_0": results("standard", 0.3), "run_1": short, "run_2": none}
    rows, notes = (lambda plot: plot.compare(plot.load_runs()))(load(template(tmp_path, runs, dict.fromkeys(runs))))
    assert {(row.run.folder, row.metric) for row in rows} == {("run_1", name) for name in ("loss_increase_nats", "stability", "smoothness")}
    assert len(notes) == 2 and "run_2 was not tested: other held-out data" in notes[0] and "run_1 was not tested on fvu" in notes[1]


def test_files_that_only_one_run_has(tmp_path):
    """Pairs are the files where every seed of both runs has the metric."""
    runs = {"run_0": results("standard", 0.3), "run_1": results("topk", 0.2, seeds=2), "run_2": results("tsae", 0.2, temporal=False)}
    runs["run_1"]["temporal"]["per_sequence"][1]["stability"][7] = None
    runs["run_1"]["temporal"]["per_sequence"][0]["smoothness"] = [None] * FILES
    plot = load(template(tmp_path, runs, dict.fromkeys(runs)))
    base, one, two = plot.load_runs()
    rows, notes = plot.compare([base, one, two])
    _, _, mine, other, (difference, low, high, p) = next(row for row in rows if row.metric == "stability")
    kept = [i for i in range(FILES) if i not in (0, 7)]
    expected = [[seed["stability"][i] for i in kept] for seed in one.per_sequence]
    assert np.array_equal(mine, expected) and other.shape == (1, 62)
    assert difference == pytest.approx(np.mean(expected) - other.mean()) and low < difference < high and 0 < p <= 1
    assert [note.split(":")[0] for note in notes] == ["run_1 was not tested on smoothness", "run_2 was not tested on stability",
                                                      "run_2 was not tested on smoothness"]
    assert "nan" not in plot.comparison_text([base, one, two]).lower()


def test_an_older_baseline_without_the_temporal_metrics(tmp_path):
    runs = {"run_0": results("standard", 0.3, temporal=False), "run_1": results("topk", 0.2)}
    rows, notes = (lambda plot: plot.compare(plot.load_runs()))(load(template(tmp_path, runs)))
    assert [row.metric for row in rows] == ["fvu", "loss_increase_nats"] and len(notes) == 2 and "on stability" in notes[0]
