"""Figures and significance tests that compare runs.

    python plot.py

reads run_i/final_info.json of the runs named in `labels` and writes, beside this file, one PNG per
figure and comparison.md (tests of each run against the baseline). To add a figure: write a function
that takes the runs and returns a matplotlib figure (None: no run has what it shows), and name it in
FIGURES.
"""
import json
import math
import re
import sys
import textwrap
from collections import ChainMap
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from scipy.stats import false_discovery_control

# Run directory -> legend. Only these runs are drawn, in this order; None: the run's own variant.
labels = {
    "run_0": "standard (baseline)",
    "run_1": None,
}

HERE = Path(__file__).resolve().parent
RESAMPLES = 10_000      # sign flips of a test, draws of a bootstrap


class Run(NamedTuple):
    folder: str         # "run_0"
    label: str
    color: str
    marker: str
    entries: dict       # evaluation -> {"means": ..., "stderrs": ..., ...} as in final_info.json
    config: dict        # constants and facts of the run
    metrics: dict       # every metric of every evaluation, mean over seeds
    errors: dict        # their standard errors; empty with one seed
    curves: list        # one dict a seed: "training", "explained_variance_by_position", ...
    per_sequence: list  # one dict a seed: metric -> values, one a held-out sequence


def check(entries):
    """Raises ValueError with the reason why the content of a final_info.json cannot be drawn."""
    if not isinstance(entries, dict) or not entries:
        raise ValueError("it holds no evaluations")
    for name, entry in entries.items():
        means = entry.get("means") if isinstance(entry, dict) else None
        if not isinstance(means, dict):
            raise ValueError(f"its entry {name!r} has no dictionary 'means'")
        for key, value in means.items():
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"{key} in its entry {name!r} is {value!r}, not a finite number")


def merged(entries, key):
    """The dictionaries entry[key] of all evaluations in one."""
    return dict(ChainMap(*(entry.get(key) or {} for entry in entries.values())))


def per_seed(entries, key):
    """The same for lists with one dictionary a seed."""
    lists = [entry[key] for entry in entries.values() if entry.get(key)]
    return [dict(ChainMap(*parts)) for parts in zip(*lists)]


def load_runs():
    """The runs of `labels` that are complete; says which are left out and why."""
    runs = []
    for folder, label in labels.items():
        try:
            entries = json.loads((HERE / folder / "final_info.json").read_text(encoding="utf-8"))
            check(entries)
        except OSError:
            print(f"{folder}: skipped, it has no final_info.json (not run, or not finished)")
            continue
        except ValueError as error:
            print(f"{folder}: skipped, its final_info.json cannot be used: {error}")
            continue
        config, i = merged(entries, "config"), len(runs)
        off = "".join(f", no {part}" for part in config.get("ABLATE") or ())
        label = label or config.get("SAE_VARIANT", folder) + off
        if label in [run.label for run in runs]:
            label = f"{label} ({folder})"
        runs.append(Run(folder, label, COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)], entries,
                        config, merged(entries, "metrics"), merged(entries, "metric_stderrs"),
                        per_seed(entries, "curves"), per_seed(entries, "per_sequence")))
    for folder in sorted(path.parent.name for path in HERE.glob("run_*/final_info.json")):
        if re.fullmatch(r"run_\d+", folder) and folder not in labels:
            print(f"{folder}: not in labels, so not drawn; add it there to draw it")
    return runs


# ---- Style ---------------------------------------------------------------------------------------
# Okabe-Ito without its yellow, the baseline in grey: told apart with any colour vision.
COLORS = ("#777777", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#882255")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
NOTE = {"fontsize": 6.5, "color": "#555555"}        # what belongs to no run: targets, controls
WIDTH = 6.5             # inches, the text width of a paper
STYLE = {
    "figure.constrained_layout.use": True, "savefig.dpi": 200, "font.size": 8,
    "axes.labelsize": 8, "axes.titlesize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7,
    "legend.fontsize": 7.5, "legend.frameon": False, "legend.title_fontsize": 6.5,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6,
    "xtick.major.width": 0.6, "ytick.major.width": 0.6, "xtick.minor.size": 0,
    "ytick.minor.size": 0, "axes.grid": True, "axes.axisbelow": True, "grid.color": "#e6e6e6",
    "grid.linewidth": 0.5, "lines.linewidth": 1.3, "lines.markersize": 3.5,
}
# How known metrics are named in figures, and where better lies; others go under their own name.
TITLES = {
    "final_train_loss": "training loss (last) ↓", "total_train_time": "training time (s) ↓",
    "best_val_loss": "validation loss (best) ↓", "l0": "L0 (latents per token)",
    "explained_variance": "explained variance ↑", "loss_increase_nats": "loss increase (nats) ↓",
    "dead_fraction": "dead latents (fraction) ↓", "ce_recovered": "CE recovered (unigram) ↑",
    "avg_inference_tokens_per_second": "encoding speed (tokens/s) ↑",
}


def short(value, _=None):
    """Three significant digits, no exponent for thousands; also the format of ticks."""
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def draw_band(axis, run, x, values, every=1):
    """Mean over the seeds of values [seeds, x] as a line, their range as a band."""
    axis.plot(x, values.mean(0), color=run.color, marker=run.marker, markevery=every)
    if len(values) > 1:
        axis.fill_between(x, values.min(0), values.max(0), color=run.color, alpha=0.25, linewidth=0)


def legend(figure, runs, note, line="-"):
    """One legend for all panels, below them; the note says what several seeds look like."""
    handles = [plt.Line2D([], [], color=r.color, marker=r.marker, linestyle=line) for r in runs]
    several = any(len(run.curves) > 1 for run in runs)
    columns = 125 // (10 + max(len(run.label) for run in runs))     # as many as fit the width
    figure.legend(handles, [run.label for run in runs], loc="outside lower center",
                  ncols=max(1, min(4, columns, len(runs))), title=note if several else None)


# ---- Tests between runs --------------------------------------------------------------------------
def sequences(run, metric):
    """A metric of each held-out sequence [seeds, sequences], or None where the run has no such."""
    rows = [seed.get(metric) or () for seed in run.per_sequence]
    same = rows and len(rows[0]) > 0 and all(len(row) == len(rows[0]) for row in rows)
    return np.array(rows, dtype=float) if same else None


def resampled(values, chosen, rng):
    """Bootstrap means of values [seeds, sequences]: the sequences `chosen` [draws, sequences], and
    seeds drawn with replacement too."""
    n_seeds = len(values)
    weights = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=len(chosen)) / n_seeds
    return np.take_along_axis(weights @ values, chosen, axis=1).mean(1)


def paired_test(values, baseline):
    """(mean difference, the ends of its 95 % bootstrap interval, p) of two runs on the same
    sequences, each [seeds, sequences]. p: sign flips of the differences, seeds averaged first."""
    rng = np.random.default_rng(0)
    difference = values.mean(0) - baseline.mean(0)
    chosen = rng.integers(len(difference), size=(RESAMPLES, len(difference)))
    draws = resampled(values, chosen, rng) - resampled(baseline, chosen, rng)
    flipped = np.abs(rng.choice((-1.0, 1.0), size=chosen.shape) @ difference)
    extreme = flipped >= abs(difference.sum()) - 1e-9 * np.abs(difference).sum()
    p = (1 + extreme.sum()) / (1 + RESAMPLES)
    return difference.mean(), *np.percentile(draws, (2.5, 97.5)), p


def compare(runs):
    """The baseline (run_0, else the first run), one row a test against it (run, metric, values,
    baseline's values, difference, low, high, p), and notes on what was not tested."""
    baseline = next((run for run in runs if run.folder == "run_0"), runs[0])
    rows, notes, data = [], [], baseline.config.get("data_hash")
    for run in runs:
        if run is baseline:
            continue
        if data is None or run.config.get("data_hash") != data:
            notes.append(f"{run.folder} was not tested: other held-out data than {baseline.folder} "
                         f"(data_hash {run.config.get('data_hash')}, not {data}).")
            continue
        for metric in baseline.per_sequence[0] if baseline.per_sequence else ():
            mine, other = sequences(run, metric), sequences(baseline, metric)
            if mine is None or other is None or mine.shape[1] != other.shape[1]:
                notes.append(f"{run.folder} was not tested on {metric}: other sequences, or none.")
            else:
                rows.append((run, metric, mine, other, *paired_test(mine, other)))
    return baseline, rows, notes


def comparison(runs):
    """The tests as a Markdown table."""
    baseline, rows, notes = compare(runs)
    table = [["run", "metric", "value", "baseline", "difference", "95 % interval", "p", "q (FDR)",
              "q < .05", "seeds"]]
    adjusted = false_discovery_control([row[-1] for row in rows]) if rows else ()
    for (run, metric, mine, other, difference, low, high, p), q in zip(rows, adjusted):
        table.append([f"{run.folder}: {run.label}", metric, f"{mine.mean():.4g}",
                      f"{other.mean():.4g}", f"{difference:+.3g}", f"[{low:+.3g}, {high:+.3g}]",
                      f"{p:.4f}", f"{q:.4f}", "yes" if q < 0.05 else "no",
                      f"{len(mine)} against {len(other)}"])
    widths = [max(map(len, column)) for column in zip(*table)]
    table.insert(1, ["-" * width for width in widths])
    text = [f"# Runs against {baseline.folder}: {baseline.label}", ""]
    text += ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |" for row in table]
    text += ["", textwrap.fill(
        "Difference = run - baseline, paired over the held-out sequences (one a file). p: "
        f"permutation test ({RESAMPLES:,} sign flips) of the files' differences, seeds averaged "
        "first. Interval: bootstrap over files, and over seeds where there are several. q: p after "
        "Benjamini-Hochberg over all rows.", 100, break_on_hyphens=False)]
    return "\n".join((text if rows else text[:2] + ["Nothing was tested."]) + [""] + notes)


# ---- Figures -------------------------------------------------------------------------------------
def training_curve(run, x_name, y_name):
    """(steps, values [seeds, steps]) of a quantity in the training log, or None."""
    logs = [seed["training"] for seed in run.curves if "training" in seed]
    values = [(log | log.get("losses", {})).get(y_name) for log in logs]
    pairs = [(log[x_name][-len(y):], y) for log, y in zip(logs, values) if y]
    if not pairs:
        return None
    steps = min((x for x, _ in pairs), key=lambda x: x[-1])     # seeds may differ in their steps
    return steps, np.array([np.interp(steps, x, y) for x, y in pairs])


def draw_stages(axes, runs):
    """Vertical lines where stages begin, their names above the top panels; one row a curriculum."""
    plans = {}
    for run in runs:
        starts = run.curves[0]["training"].get("stage_starts", [])
        if len(starts) > 1:
            plans.setdefault((*starts, *run.config.get("stages", [])), []).append((run, starts))
    for row, sharing in enumerate(plans.values()):
        run, starts = sharing[0]
        color = run.color if len(sharing) == 1 else NOTE["color"]
        for axis in axes.flat:
            for start in starts[1:]:
                axis.axvline(start, color=color, linewidth=0.7, linestyle=(0, (4, 2)), zorder=0)
        for axis in axes[0]:
            left, right = axis.get_xlim()
            for start, end, name in zip(starts, [*starts[1:], right], run.config.get("stages", [])):
                room = int(45 * (end - start) / (right - left))         # letters up to the next one
                name = textwrap.fill(name.replace("_", " "), max(room, 4), break_long_words=False)
                axis.annotate(name, (start, 1), (1, 2 + 16 * row), fontsize=6, color=color,
                              xycoords=("data", "axes fraction"), textcoords="offset points")


def fig_training(runs):
    """Losses, L0 and dead latents over training."""
    runs = [run for run in runs if run.curves and "training" in run.curves[0]]
    if not runs:
        return None
    figure, axes = plt.subplots(2, 2, figsize=(WIDTH, 4.6), sharex=True)
    for axis, x_name, y_name, text in (
            (axes[0, 0], "step", "reconstruction", "reconstruction loss"),
            (axes[0, 1], "val_step", "val_loss", "validation loss"),
            (axes[1, 0], "step", "l0", TITLES["l0"]),
            (axes[1, 1], "step", "dead_fraction", "dead latents (fraction)")):
        for run in runs:
            if found := training_curve(run, x_name, y_name):
                draw_band(axis, run, *found, every=math.ceil(len(found[0]) / 6))
        axis.set_ylabel(text)
    for axis in axes.flat[:3]:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(short))
        axis.yaxis.set_minor_formatter(NullFormatter())
    for axis in axes[1]:
        axis.set_xlabel("training step")
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.xaxis.set_major_formatter(FuncFormatter(short))
    l0, dead = axes[1]
    for target in {run.config["TARGET_L0"] for run in runs if run.config.get("TARGET_L0")}:
        l0.axhline(target, color=NOTE["color"], linewidth=0.8, linestyle=":")
        l0.set_ylim(min(l0.get_ylim()[0], target / 1.6), max(l0.get_ylim()[1], target * 1.6))
        l0.annotate(f"target {target:g}", (1, target), (0, -2), ha="right", va="top",
                    **NOTE, xycoords=("axes fraction", "data"), textcoords="offset points")
    dead.set_ylim(-0.02 * max(0.05, dead.get_ylim()[1]), max(0.05, dead.get_ylim()[1]))
    draw_stages(axes, runs)
    legend(figure, runs, "lines: mean over seeds; bands: range of the seeds")
    return figure


def error_bar(run, entry, metric):
    """[below, above] of a headline and whether it is the standard error over seeds; with one seed a
    95 % bootstrap interval over held-out sequences; None where neither exists."""
    error = entry.get("stderrs", {}).get(f"{metric}_stderr")
    if error is not None:
        return [error, error], True
    values = sequences(run, "fvu" if metric == "explained_variance" else metric)
    if values is None:
        return None, False
    rng = np.random.default_rng(0)
    draws = resampled(values, rng.integers(values.shape[1], size=(RESAMPLES, values.shape[1])), rng)
    low, high = np.percentile(draws, (2.5, 97.5)) - values.mean()
    return ([high, -low] if metric == "explained_variance" else [-low, high]), False


def draw_bars(axis, runs, evaluation, metric):
    """One horizontal bar a run, its value printed beside it."""
    ends = [0.0]
    for row, run in enumerate(runs):
        entry = run.entries.get(evaluation, {"means": {}})
        value = entry["means"].get(f"{metric}_mean")
        if value is None:
            axis.annotate("not measured", (0, row), (3, 0), textcoords="offset points",
                          va="center", **NOTE)
            continue
        bar, over_seeds = error_bar(run, entry, metric)
        below, above = bar or (0.0, 0.0)
        axis.barh(row, value, height=0.72, color=run.color)
        if bar:
            axis.errorbar(value, row, xerr=[[below], [above]], color="black", linewidth=0.8,
                          capsize=2 if over_seeds else 0)
        ends += [value - below, value + above]
        number = short(value) if abs(value) >= 100 else f"{value:#.3g}"
        axis.annotate(number, (max(value + above, 0), row), (3, 0), va="center",
                      textcoords="offset points", fontsize=6.5)
    span = max(ends) - min(ends) or 1.0
    axis.set_xlim(min(ends) - 0.05 * span * (min(ends) < 0), max(ends) + 0.35 * span)
    axis.axvline(0, color="black", linewidth=0.6)


def fig_headlines(runs):
    """Every headline metric of every evaluation, one small panel each."""
    names = dict.fromkeys((evaluation, key.removesuffix("_mean")) for run in runs
                          for evaluation, entry in run.entries.items() for key in entry["means"])
    if not names:
        return None
    columns, main_evaluation = min(3, len(names)), next(iter(names))[0]
    rows, legends = math.ceil(len(names) / columns), [textwrap.fill(run.label, 28) for run in runs]
    bar = 0.04 + 0.11 * max(text.count("\n") + 1 for text in legends)           # inches
    figure, axes = plt.subplots(rows, columns, squeeze=False, sharey=True,
                                figsize=(WIDTH, rows * (0.6 + bar * len(runs)) + 0.3))
    for axis, (evaluation, metric) in zip(axes.flat, names):
        draw_bars(axis, runs, evaluation, metric)
        text = "" if evaluation == main_evaluation else f"{evaluation}: "
        text += TITLES.get(metric, metric.replace("_", " "))
        axis.set_title(textwrap.fill(text, 30), loc="left")
        axis.set_yticks(range(len(runs)), legends)
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="y", visible=False)
        axis.xaxis.set_major_locator(MaxNLocator(3))
        axis.xaxis.set_major_formatter(FuncFormatter(short))
    axes[0, 0].set_ylim(len(runs) - 0.5, -0.5)
    for axis in axes.flat[len(names):]:
        axis.remove()
    figure.supxlabel("Error bars: standard error over seeds (with caps); for a run with one seed, "
                     "95 % bootstrap interval over held-out sequences (no caps).", **NOTE)
    return figure


def draw_references(axis, references):
    """Dotted lines at controls; what they are stands above the panel, where it hides no point."""
    low, high = axis.get_ylim()
    found = {"dotted": [], "off scale": []}
    for name, value in references.items():
        found["dotted" if low <= value <= high else "off scale"].append(f"{name} ({short(value)})")
        if low <= value <= high:
            axis.axhline(value, color=NOTE["color"], linewidth=0.8, linestyle=":", zorder=0)
    text = "; ".join(f"{where}: {', '.join(what)}" for where, what in found.items() if what)
    axis.set_title(text, loc="right", **NOTE)


def fig_sparsity_fidelity(runs):
    """The plane in which sparse autoencoders compete, with the controls that give it a scale."""
    runs = [run for run in runs if "l0" in run.metrics]
    if not runs:
        return None
    known = dict(ChainMap(*(run.metrics for run in runs)))
    controls = {"token-pair lookup": known.get("bigram_explained_variance"),
                "untrained SAE": known.get("untrained_explained_variance")}
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 2.9))
    for axis, metric, references in (
            (axes[0], "explained_variance", {k: v for k, v in controls.items() if v is not None}),
            (axes[1], "ce_recovered", {"the model's own loss": 1.0, "unigram loss": 0.0})):
        for run in runs:
            if metric in run.metrics:
                axis.errorbar(run.metrics["l0"], run.metrics[metric], xerr=run.errors.get("l0"),
                              yerr=run.errors.get(metric), color=run.color, marker=run.marker,
                              markersize=6, markeredgecolor="white", markeredgewidth=0.4)
        axis.margins(y=0.12)
        l0 = [run.metrics["l0"] for run in runs]
        axis.set_xlim(0.94 * min(l0), 1.06 * max(l0))
        axis.xaxis.set_major_locator(MaxNLocator(6))
        axis.set_xlabel(TITLES["l0"])
        axis.set_ylabel(TITLES[metric])
        draw_references(axis, references)
    legend(figure, runs, "error bars: standard error over seeds", line="")
    return figure


def by_position(run, name):
    """(positions, values [seeds, bins]) of a curve, averaged in bins of about half an octave."""
    rows = [seed[name] for seed in run.curves if seed.get(name)]
    if not rows:
        return None
    values, n = np.array(rows, dtype=float), len(rows[0])
    starts = np.round(2 ** np.arange(0, max(math.log2(n), 0.5), 0.5))
    edges = np.unique(np.append(starts, n + 1)).astype(int)
    bins = list(zip(edges, edges[1:] - 1))                     # first and last position, from 1
    return ([math.sqrt(first * last) for first, last in bins],
            np.stack([values[:, first - 1:last].mean(1) for first, last in bins], axis=1))


def fig_position(runs):
    """Explained variance and loss increase along the context."""
    panels = {"explained_variance_by_position": "explained variance ↑",
              "loss_increase_by_position": "loss increase (nats) ↓"}
    runs = [run for run in runs if any(seed.get(name) for seed in run.curves for name in panels)]
    if not runs:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 2.8))
    for axis, (name, text) in zip(axes, panels.items()):
        for run in runs:
            if found := by_position(run, name):
                draw_band(axis, run, *found)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(FuncFormatter(short))
        axis.set_xlabel("position in the context (tokens, binned)")
        axis.set_ylabel(text)
    legend(figure, runs, "lines: mean over seeds; bands: range of the seeds")
    return figure


FIGURES = {"training_curves": fig_training, "headline_metrics": fig_headlines,
           "sparsity_fidelity": fig_sparsity_fidelity, "position": fig_position}


def main():
    plt.rcParams.update(STYLE)
    runs = load_runs()
    if not runs:
        sys.exit(f"plot.py: nothing to draw: none of the runs in labels ({', '.join(labels)}) is "
                 "complete. Finish one with `python experiment.py --out_dir=run_0`, or name others "
                 "there.")
    for name, draw in FIGURES.items():
        figure = draw(runs)
        if figure is None:
            print(f"{name}.png: not drawn, no run holds what it shows")
            continue
        figure.savefig(HERE / f"{name}.png")
        plt.close(figure)
        print(f"{name}.png: {', '.join(run.folder for run in runs)}")
    text = comparison(runs)
    (HERE / "comparison.md").write_text(text + "\n", encoding="utf-8")
    print(f"comparison.md:\n\n{text}")


if __name__ == "__main__":
    main()
