"""Draws figures that compare runs, and tests the runs against a baseline.

    python plot.py

Reads run_i/final_info.json of the runs beside this file. Writes there one PNG per figure and
comparison.md (tests of each run against the baseline, run_0), and run_i/features.html, a page on
which to look at latents and rate them.

Which runs: every complete run_*, in this order: run_0, runs with a name such as run_batch_topk,
then run_1, run_2, ... Each goes by the name of its variant and what it has otherwise than the
first run of that variant. To draw some of them alone, in another order or by other names, fill in
the dictionary `labels` in this file: labels = {"run_0": None, "run_2": "without attention"}, where
None stands for the name that the run would have without it.

To add a figure: write a function that takes the runs and returns a matplotlib figure (None if no
run has what it shows), and name it in FIGURES.
"""
import argparse
import functools
import itertools
import json
import math
import re
import sys
import tempfile
import textwrap
import traceback
from collections import ChainMap
from os import environ
from pathlib import Path
from typing import NamedTuple

from runtime.interrupts import leave_quietly

leave_quietly()  # where Ctrl-C ends the imports below, or the drawing
environ["MPLBACKEND"] = "agg"       # before the import, which fails at a backend that is not there

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.font_manager import findfont, get_font
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from scipy.stats import false_discovery_control, permutation_test, ttest_ind

from pages.ratings import (
    agreement, BATCH, bootstrap_interval, Difference, LEAST_RATED, load_ratings, mean_by_latent,
    RESAMPLES, unpaired_test, write_page)

# Run directory -> its name in figures, None: that of its variant. Empty: all complete runs are
# drawn; else those named here alone, in this order: {"run_0": None, "run_2": "without attention"}.
labels = {}

HERE = Path(__file__).resolve().parent


# ---- Runs ----------------------------------------------------------------------------------------
class Run(NamedTuple):
    """A complete run and how it is drawn."""
    folder: str         # "run_0"
    label: str          # its name in figures
    color: str
    marker: str
    entries: dict       # evaluation -> {"means": ..., "stderrs": ..., ...} as in final_info.json
    config: dict        # constants and facts of the run
    metrics: dict       # metric -> mean over seeds, of all evaluations together
    errors: dict        # metric -> standard error over seeds; empty with one seed
    curves: list        # one dict a seed: "training", "explained_variance_by_position", ...
    per_sequence: list  # one dict a seed: metric -> values, one a held-out sequence
    ratings: dict       # "score" or "correct" -> {latent: {rater: value in [0, 1]}}
    caveat: str         # why it does not compare with the baseline; empty where it does


def check(entries):
    """Raises ValueError with the reason why the content of a final_info.json cannot be drawn."""
    if not isinstance(entries, dict) or not entries:
        raise ValueError("it holds no evaluations")
    for name, entry in entries.items():
        means = entry.get("means") if isinstance(entry, dict) else None
        if not isinstance(means, dict):
            raise ValueError(f"its entry {name!r} has no dictionary 'means'")
        wrong = [f"{key} in its entry {name!r} is {value!r}" for key, value in means.items()
                 if not isinstance(value, (int, float)) or not math.isfinite(value)]
        if wrong:
            raise ValueError(f"{wrong[0]}, not a finite number")


def read_entries(folder):
    """Returns the content of a run's final_info.json; None where it cannot be drawn, after
    printing why."""
    try:
        entries = json.loads((HERE / folder / "final_info.json").read_text(encoding="utf-8"))
        check(entries)
    except OSError:
        print(f"{folder}: skipped, it has no final_info.json (not run, or not finished)")
        return None
    except ValueError as error:
        print(f"{folder}: skipped, its final_info.json cannot be used: {error}")
        return None
    return entries


def merged(entries, key):
    """Returns the dictionaries entry[key] of all evaluations as one."""
    return dict(ChainMap(*(entry.get(key) or {} for entry in entries.values())))


def per_seed(entries, key):
    """Returns the lists entry[key], of one dictionary a seed, of all evaluations as one list."""
    lists = [entry[key] for entry in entries.values() if entry.get(key)]
    return [dict(ChainMap(*parts)) for parts in zip(*lists)]


def variant_name(config, folder):
    """Returns a run's variant and what is ablated in it; its folder if it names no variant."""
    ablated = "".join(f", no {part}" for part in config.get("ABLATE") or ())
    return config.get("SAE_VARIANT", folder) + ablated


def run_order(folder):
    """Returns what sorts the folders of runs: run_0, then names, then numbers from 1 on."""
    number = folder.removeprefix("run_")
    return (2 * (int(number) > 0), int(number), "") if number.isdecimal() else (1, 0, folder)


def folders_to_draw():
    """Returns the folders of `labels`, after printing which complete runs it leaves out; or, where
    it is empty, all that have the name of a run."""
    there = [path.name for path in HERE.glob("run_*")
             if path.is_dir() and re.fullmatch(r"run_[\w-]+", path.name)]
    there.sort(key=run_order)
    if not labels:
        return there
    for folder in there:
        if folder not in labels and (HERE / folder / "final_info.json").exists():
            print(f"{folder}: not in labels, so not drawn; add it there to draw it")
    return list(labels)


def constants_that_differ(config, other):
    """Returns the constants, at most three, that a run has otherwise than another, as text; ABLATE
    is in the variant's name, and EVALS changes nothing that is drawn."""
    differing = [name for name in config if name.isupper() and name not in ("ABLATE", "EVALS")
                 and name in other and config[name] != other[name]]
    return "".join(f", {name} {config[name]}" for name in differing[:3])


def label_of(folder, config, earlier):
    """Returns a run's name in figures: the one in `labels`, or else its variant and what it has
    otherwise than the first of the `earlier` runs of that variant. None of these has the same."""
    label = labels.get(folder)
    if not label:
        label = variant_name(config, folder)
        same = [run for run in earlier if variant_name(run.config, run.folder) == label]
        if same:
            label += constants_that_differ(config, same[0].config)
    label = " ".join(str(label).split())        # one line: it stands in headings and tables
    return f"{label} ({folder})" if label in [run.label for run in earlier] else label


# Runs compare only where all of these are the same
COMPARED = ("MODEL_NAME", "LAYER", "TRAIN_TOKENS", "EXPANSION", "TARGET_L0", "data_hash")


def caveat_of(config, baseline):
    """Returns which of COMPARED a run has otherwise than the baseline, as text."""
    own, others = ({name: part.get(name) for name in COMPARED}
                   | {"LAYER": part.get("layer", part.get("LAYER"))} for part in (config, baseline))
    return ", ".join("data_hash" if name == "data_hash" else f"{name} ({own[name]}, not {value})"
                     for name, value in others.items() if own[name] != value)


def load_runs():
    """Returns the complete runs to draw; prints which are left out and why."""
    runs = []
    for folder in folders_to_draw():
        if (entries := read_entries(folder)) is None:
            continue
        config, i = merged(entries, "config"), len(runs)
        runs.append(Run(
            folder, label_of(folder, config, runs), COLORS[i % len(COLORS)],
            MARKERS[i % len(MARKERS)], entries, config, merged(entries, "metrics"),
            merged(entries, "metric_stderrs"), per_seed(entries, "curves"),
            per_seed(entries, "per_sequence"), ratings={}, caveat=""))

    ratings = load_ratings([HERE / run.folder for run in runs])
    for i, run in enumerate(runs):
        runs[i] = run._replace(ratings=ratings.get(run.folder, {}),
                               caveat=caveat_of(run.config, baseline_of(runs).config))
    return runs


def runs_with(runs, curve):
    """Returns the runs whose first seed has the curve."""
    return [run for run in runs if run.curves and run.curves[0].get(curve)]


def baseline_of(runs):
    """Returns the run against which the others are tested: run_0, or else the first."""
    return next((run for run in runs if run.folder == "run_0"), runs[0])


# ---- Style ---------------------------------------------------------------------------------------
# Okabe-Ito without its yellow, the baseline in grey: distinct with any colour vision. The numbers
# of colours and markers have no common divisor, so that MOST_RUNS runs differ in the pair of them.
COLORS = ("#777777", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#882255",
          "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MOST_RUNS = math.lcm(len(COLORS), len(MARKERS))
MOST_NAMES = 12         # of points in a panel; more have a legend
NOTE = {"fontsize": 6.5, "color": "#555555"}        # what belongs to no run: targets, controls
WIDTH = 6.5             # inches, the text width of a paper
STYLE = {
    "figure.constrained_layout.use": True, "savefig.dpi": 200, "font.size": 8,
    "axes.labelsize": 8, "axes.titlesize": 8, "figure.labelsize": 8, "xtick.labelsize": 7,
    "ytick.labelsize": 7, "legend.fontsize": 7.5, "legend.frameon": False,
    "legend.title_fontsize": 6.5, "text.parse_math": False,     # "$" in a label is a dollar
    "axes.spines.top": False, "axes.spines.right": False,
    "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6,
    "xtick.minor.size": 0, "ytick.minor.size": 0, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": "#e6e6e6", "grid.linewidth": 0.5, "lines.linewidth": 1.3,
    "lines.markersize": 3.5,
}
# Names of metrics in figures, the arrow towards better; other metrics go under their own name.
TITLES = {
    "final_train_loss": "training loss (last) ↓", "best_val_loss": "validation loss (best) ↓",
    "l0": "L0 (latents per token)", "explained_variance": "explained variance ↑",
    "loss_increase_nats": "loss increase (nats) ↓", "dead_fraction": "dead latents (fraction) ↓",
    "ce_recovered_vs_unigram": "CE recovered (unigram) ↑", "stability": "stability ↑",
    "stability_weighted": "stability (energy-weighted) ↑",
    "slow_explained_variance": "slow explained variance ↑", "smoothness": "smoothness ↓",
    "coherence": "coherence ↑", "probe_token_type": "probe: token type ↑",
    "probe_context": "probe: context ↑", "sae_top_1": "probe of a single latent ↑",
    "auroc_hybrid": "AUROC of the gate ↑", "causal_specificity": "causal specificity ↑",
}
# They depend on what else the machine does, so no figure compares them
WALL_CLOCK = ("total_train_time", "avg_inference_tokens_per_second")
PREFIXED = ("matryoshka", "tsae")       # their reconstruction loss is a mean over prefixes of z
SEEDS_NOTE = "lines: mean over seeds; bands: range of the seeds"
POINTS_NOTE = ("lines at points: standard error over seeds; with one seed 95 % bootstrap interval "
               "over held-out sequences")


def title_of(metric):
    """Returns the name of a metric in figures."""
    return TITLES.get(metric, metric.replace("_", " "))


def prefix_note(runs):
    """Returns a line for the label of the reconstruction loss, which is another one in PREFIXED;
    empty where no run is of these."""
    variants = {run.config.get("SAE_VARIANT") for run in runs}
    names = [name for name in PREFIXED if name in variants]
    return "\n" + textwrap.fill(f"({', '.join(names)}: mean over prefixes)", 32) if names else ""


def short(value, _=None):
    """Returns a number with three significant digits, thousands without an exponent; the second
    argument is the tick's position when matplotlib calls it."""
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def short_ticks(axis, locator=None):
    """Writes the tick labels of an x or y axis with `short`; locator: where ticks stand."""
    if locator:
        axis.set_major_locator(locator)
    axis.set_major_formatter(FuncFormatter(short))
    axis.set_minor_formatter(NullFormatter())


def panels(n, columns, height, **kwargs):
    """Returns a figure of n panels of `height` inches, at most `columns` in a row, and its axes
    [rows, columns]."""
    rows = math.ceil(n / min(columns, n))
    figure, axes = plt.subplots(rows, min(columns, n), squeeze=False,
                                figsize=(WIDTH, rows * height + 0.3), **kwargs)
    for axis in axes.flat[n:]:
        axis.remove()
    return figure, axes


def one_row_per_run(axis, runs):
    """Labels the rows of a panel with the runs, the first at the top."""
    axis.set_yticks(range(len(runs)), [textwrap.fill(run.label, 28) for run in runs])
    axis.set_ylim(len(runs) - 0.5, -0.5)


def token_grid(axis, tokens):
    """Labels the columns of a panel with tokens and removes its grid."""
    axis.set_xticks(range(len(tokens)), [visible(token) for token in tokens], rotation=90,
                    fontsize=5.5)
    axis.grid(False)
    axis.tick_params(length=0, pad=1)


def seed_values(run, name):
    """Returns a curve of each seed [seeds, ...], NaN for None; of length 0 where there is none."""
    return np.array([seed[name] for seed in run.curves if seed.get(name)], dtype=float)


def draw_band(axis, run, x, values, every=1, line="-"):
    """Draws the mean over seeds of values [seeds, x] as a line and their range as a band."""
    axis.plot(x, values.mean(0), line, color=run.color, marker=run.marker, markevery=every)
    if len(values) > 1:
        axis.fill_between(x, values.min(0), values.max(0), color=run.color, alpha=0.25, linewidth=0)


def legend(figure, runs, note, line="-", several=False):
    """Draws one legend of the runs below all panels, under the note if a run has several seeds or
    `several` is set."""
    handles = [plt.Line2D([], [], color=run.color, marker=run.marker, linestyle=line)
               for run in runs]
    several = several or any(len(run.curves) > 1 for run in runs)
    names = [textwrap.fill(run.label, 100) for run in runs]
    columns = 125 // (10 + max(map(len, names)))        # as many as fit the width
    columns = max(1, min(4, columns, len(runs)))
    figure.set_figheight(figure.get_figheight() + 0.16 * ((len(runs) - 1) // columns))
    figure.legend(handles, names, loc="outside lower center", ncols=columns,
                  title=textwrap.fill(note, 120) if several and note else None)


def labelled_artists(axis):
    """Returns {label: artist} of a panel's labelled artists, each label once."""
    handles, names = axis.get_legend_handles_labels()
    return dict(zip(names, handles))


GLYPHS = get_font(findfont("DejaVu Sans"))


def printable(text):
    """Returns text with line breaks and tabs as symbols and a box where the font has no glyph."""
    text = text.replace("\n", "↵").replace("\t", "→")
    return "".join(c if GLYPHS.get_char_index(ord(c)) else "□" for c in text)


def visible(token):
    """Returns a token as a label: printable, spaces as symbols, ten characters at most."""
    token = printable(token.replace(" ", "␣"))
    return token if len(token) < 11 else f"{token[:9]}…"


# ---- Tests between runs --------------------------------------------------------------------------
# Two questions. Does the method differ? Its units are seeds: nothing is said with one. Do these two
# SAEs differ? Its units are held-out files: two seeds of one method differ too.
# The better direction of a metric: by its name, or by how its name begins.
HIGHER = ("explained_variance", "ce_recovered", "stability", "coherence", "probe_", "accuracy_",
          "detection", "avg_inference", "auroc", "causal_specificity", "sae_top", "cosine", "slow_")
LOWER = ("fvu", "loss_increase", "final_train_loss", "best_val_loss", "total_train_time", "kl",
         "dead_fraction", "smoothness", "polysemanticity")
CLOCKS = ("total_train_time", "avg_inference_tokens_per_second")    # depend on the machine's load


class Comparison(NamedTuple):
    """A metric of a run tested against the baseline's at the same held-out sequences."""
    run: Run
    metric: str
    values: np.ndarray      # [seeds, sequences]
    baseline: np.ndarray    # [seeds of the baseline, sequences]
    difference: Difference


class SeedComparison(NamedTuple):
    """A headline metric of a run tested against the baseline's, seeds being the units."""
    run: Run
    metric: str
    values: np.ndarray              # [seeds]
    baseline: np.ndarray            # [seeds of the baseline]
    difference: Difference | None   # None where one of the two has one seed: nothing is tested


def better_direction(metric):
    """Returns 1 where a higher value of a metric is better, -1 where a lower one is, 0 where
    neither is known to be."""
    return int(metric.startswith(HIGHER)) - int(metric.startswith(LOWER))


@functools.cache
def seed_noise():
    """Returns {metric: its standard deviation between seeds of one method}, see
    bench/seed_noise.py."""
    return json.loads((HERE / "pages" / "seed_noise.json").read_text(encoding="utf-8"))


def sequences(run, metric):
    """Returns a metric at each held-out sequence [seeds, sequences], NaN for None; None where the
    run has no such metric."""
    rows = [seed.get(metric) or () for seed in run.per_sequence]
    complete = rows and len(rows[0]) > 0 and all(len(row) == len(rows[0]) for row in rows)
    return np.array(rows, dtype=float) if complete else None


def paired(run, other, metric):
    """Returns a metric of two runs, each [seeds, sequences], at the sequences where all seeds of
    both have it; None where these are fewer than two."""
    first, second = sequences(run, metric), sequences(other, metric)
    if first is None or second is None or first.shape[1] != second.shape[1]:
        return None
    both = np.isfinite(first).all(0) & np.isfinite(second).all(0)
    return (first[:, both], second[:, both]) if both.sum() > 1 else None


def bootstrap_means(values, chosen, rng):
    """Returns bootstrap means [draws] of values [seeds, sequences]: of the sequences `chosen`
    [draws, sequences], the seeds drawn with replacement.

    scipy.stats.bootstrap resamples one level. Here sequences are drawn for two runs at once, and
    the seeds of each run besides.
    """
    n_seeds = len(values)
    weights = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=len(chosen)) / n_seeds
    return np.take_along_axis(weights @ values, chosen, axis=1).mean(1)


def absolute_mean(values, axis):
    """Returns the absolute value of the mean, the statistic of a two-sided test."""
    return np.abs(values.mean(axis))


def paired_test(values, baseline):
    """Returns the Difference of two runs on the same sequences, each [seeds, sequences].

    p: sign flips of the sequences' differences, seeds averaged first. Interval: bootstrap over
    sequences, and over the seeds of each run.
    """
    rng, n = np.random.default_rng(0), values.shape[1]
    chosen = rng.integers(n, size=(RESAMPLES, n))
    draws = bootstrap_means(values, chosen, rng) - bootstrap_means(baseline, chosen, rng)
    difference = values.mean(0) - baseline.mean(0)
    flipped = permutation_test(
        (difference,), absolute_mean, permutation_type="samples", alternative="greater",
        vectorized=True, batch=BATCH, n_resamples=RESAMPLES, rng=rng)
    return Difference(difference.mean(), *np.percentile(draws, (2.5, 97.5)), flipped.pvalue)


def compare(runs):
    """Returns a Comparison with the baseline for each metric of each other run, and notes on what
    was not tested."""
    baseline = baseline_of(runs)
    data_hash = baseline.config.get("data_hash")
    comparisons, notes, pairs = [], [], []
    for run in (run for run in runs if run is not baseline):
        if data_hash is None or run.config.get("data_hash") != data_hash:
            notes.append(f"{run.folder} was not tested: other held-out data than {baseline.folder} "
                         f"(data_hash {run.config.get('data_hash')}, not {data_hash}).")
            continue
        metrics = ChainMap(*run.per_sequence[:1], *baseline.per_sequence[:1])
        pairs += [(run, metric) for metric in metrics]

    for run, metric in pairs:
        if pair := paired(run, baseline, metric):
            comparisons.append(Comparison(run, metric, *pair, paired_test(*pair)))
        else:
            notes.append(f"{run.folder} was not tested on {metric}: other sequences, or none.")
    return comparisons, notes


def cell(text):
    """Returns text as a cell of a Markdown table: one line, its pipes escaped."""
    return " ".join(text.split()).replace("|", "\\|")


def markdown(table):
    """Returns the lines of a Markdown table; the first row of `table` is its head."""
    table = [[cell(text) for text in row] for row in table]
    widths = [max(map(len, column)) for column in zip(*table)]
    rows = [table[0], ["-" * width for width in widths], *table[1:]]
    return ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |" for row in rows]


def paragraph(text):
    """Returns text in lines of at most 100 characters."""
    return textwrap.fill(text, 100, break_on_hyphens=False)


def headline_seeds(run):
    """Returns {headline metric: its value of each seed [seeds]} of a run."""
    return {metric: np.array(values, dtype=float) for entry in run.entries.values()
            for metric, values in (entry.get("final_info_dict") or {}).items()}


def seed_test(values, baseline):
    """Returns the Difference of two samples of seeds by Welch's t test; None with one seed in
    either, or where no seed differs from another."""
    if min(len(values), len(baseline)) < 2 or not (np.ptp(values) or np.ptp(baseline)):
        return None
    test = ttest_ind(values, baseline, equal_var=False)
    return Difference(values.mean() - baseline.mean(), *test.confidence_interval(), test.pvalue)


def compare_seeds(runs):
    """Returns a SeedComparison with the baseline for each headline metric, but clocks, that both
    have, of each other run on the same data."""
    baseline, rows = baseline_of(runs), []
    reference = headline_seeds(baseline)
    for run in runs:
        same_data = run.config.get("data_hash") == baseline.config.get("data_hash")
        for metric, values in headline_seeds(run).items() if run is not baseline else ():
            if metric in reference and metric not in CLOCKS and same_data:
                other = reference[metric]
                rows.append(SeedComparison(run, metric, values, other, seed_test(values, other)))
    return rows


def corrected(p_values):
    """Returns p values after Benjamini-Hochberg, None where there is none."""
    known = [p for p in p_values if p is not None]
    adjusted = iter(false_discovery_control(known) if known else ())
    return [None if p is None else next(adjusted) for p in p_values]


def seed_row(row, q):
    """Returns the cells of a SeedComparison; q: its p after the correction, None: not tested."""
    change, sign = row.values.mean() - row.baseline.mean(), better_direction(row.metric)
    direction = {1: "better", 0: "", -1: "worse"}[int(np.sign(change * sign))]
    noise = seed_noise().get(row.metric)
    tested = ["", "", "one seed: no finding"]
    if q is not None:
        low, high, p = row.difference.low, row.difference.high, row.difference.p
        tested = [f"[{low:+.3g}, {high:+.3g}]", f"{p:.4f} ({q:.4f})",
                  (direction or "differs") if q < 0.05 else "no difference shown"]
    better = {1: "higher", 0: "", -1: "lower"}[sign]
    return [f"{row.run.folder}: {row.run.label}", row.metric, better,
            f"{row.values.mean():.4g}", f"{row.baseline.mean():.4g}", f"{change:+.3g}", direction,
            "" if noise is None else f"{noise:.2g}", *tested,
            f"{len(row.values)} against {len(row.baseline)}"]


def seed_table(rows):
    """Returns the lines on what is shown of the methods."""
    adjusted = corrected([row.difference and row.difference.p for row in rows])
    head = ["run", "metric", "better is", "value", "baseline", "difference", "change", "seed noise",
            "95 % interval", "p (q)", "finding", "seeds"]
    note = (
        "Values are those of final_info.json, means over seeds. Seed noise: the standard deviation "
        "between seeds of one method, measured on the committed runs; two runs of one seed each "
        "differ by up to about three times as much without any reason. Interval and p: Welch's t "
        "test over seeds; q: p after Benjamini-Hochberg over this table. A finding about the "
        "method needs q < .05, and that needs SEEDS = (0, 1, 2) or more in both runs.")
    return ["## Do the methods differ?", "", *markdown([head, *map(seed_row, rows, adjusted)]), "",
            paragraph(note)]


def comparison_row(comparison, q):
    """Returns the cells of a comparison by file; q: its p after the correction."""
    run, metric, values, baseline, difference = comparison
    return [f"{run.folder}: {run.label}", f"{metric} by file", f"{values.mean():.4g}",
            f"{baseline.mean():.4g}", f"{difference.mean:+.3g}",
            f"[{difference.low:+.3g}, {difference.high:+.3g}]", f"{difference.p:.4f}", f"{q:.4f}",
            "yes" if q < 0.05 else "no", f"{len(values)} against {len(baseline)}"]


def file_table(comparisons):
    """Returns the lines on how these very SAEs differ over files."""
    adjusted = corrected([row.difference.p for row in comparisons])
    head = ["run", "metric", "value", "baseline", "difference", "95 % interval", "p", "q (FDR)",
            "these SAEs differ", "seeds"]
    note = (
        "How far the choice of held-out files decides a difference between these SAEs. It says "
        "nothing about the methods: of two seeds of one method more than a third of these tests "
        "find a difference. Values are means over files, each file counted once; final_info.json's "
        "are over tokens, and its probes' are balanced over classes, so they differ a little. "
        "Difference: paired over the held-out sequences (one a file) that both have. p: "
        f"permutation test ({RESAMPLES:,} sign flips), seeds averaged first. Interval: bootstrap "
        "over sequences, and over seeds where there are several. q: p after Benjamini-Hochberg "
        "over this table.")
    return ["## Do these SAEs differ, file by file?", "",
            *markdown([head, *map(comparison_row, comparisons, adjusted)]), "", paragraph(note)]


def comparison_text(runs):
    """Returns the tests of all runs against the baseline as Markdown."""
    (comparisons, notes), seed_rows = compare(runs), compare_seeds(runs)
    baseline = baseline_of(runs)
    text = [f"# Runs against {baseline.folder}: {baseline.label}", ""]
    text += [*seed_table(seed_rows), ""] if seed_rows else []
    text += [*file_table(comparisons), ""] if comparisons else []
    if not (seed_rows or comparisons):
        text += ["Nothing was tested.", ""]
    return "\n".join([*text, *notes])


# ---- Ratings of latents --------------------------------------------------------------------------
DETECTION = {"detection": "automatic detection",
             "detection_same_token": "among passages with the same token",
             "detection_null": "profile of random places",
             "detection_reinitialised": "untrained SAE and model",
             "detection_same_token_reinitialised": "untrained, same token"}


def rating_cells(run, baseline, question):
    """Returns two cells: the mean of the answers to "score" or "correct" with its interval, and
    its difference from the baseline's; empty where there are none."""
    rated = mean_by_latent(run.ratings.get(question, {}))
    reference = mean_by_latent(baseline.ratings.get(question, {}))
    mean = f"{rated.values.mean():.3f} [{rated.low:.3f}, {rated.high:.3f}]" if rated else ""
    if not rated and run.ratings:
        return [f"fewer than {LEAST_RATED}", ""]
    if not (rated and reference) or run is baseline:
        return [mean, ""]
    test = unpaired_test(rated.values, reference.values)
    return [mean, f"{test.mean:+.3f} [{test.low:+.3f}, {test.high:+.3f}], p {test.p:.4f}"]


def ratings_row(run, baseline):
    """Returns the cells of a run in the table of ratings."""
    scores = run.ratings.get("score", {})
    raters = {rater for by_rater in scores.values() for rater in by_rater}
    alpha = agreement(scores)
    return [f"{run.folder}: {run.label}", str(len(raters)), str(len(scores)),
            *rating_cells(run, baseline, "score"), "" if alpha is None else f"{alpha:.3f}",
            *rating_cells(run, baseline, "correct"),
            *(f"{run.metrics[name]:.3f}" if name in run.metrics else "" for name in DETECTION)]


def ratings_text(runs):
    """Returns how people rated the latents, and how well passages were identified by people and
    automatically, as Markdown."""
    baseline = baseline_of(runs)
    head = ["run", "raters", "latents", "interpretable (0 to 1)", "against baseline", "alpha",
            "detection by people", "against baseline", *DETECTION.values()]
    notes = (
        f"Means over latents with 95 % bootstrap intervals; baseline: {baseline.folder}; p: "
        f"{RESAMPLES:,} permutations of latents between runs; all of them need {LEAST_RATED} rated "
        "latents of a run. Alpha: Krippendorff's, ordinal. "
        "Detection: on which of five passages does the latent fire (chance .2)? Automatic "
        "detection chooses the passage that best fits a profile of the contexts in which the "
        "latent fires most strongly in other files; then the same where the other four passages "
        "hold the token on which it fires. Controls: a profile of random places; latents of an "
        "untrained TopK on the same model with random weights.")
    text = ["## How well latents are understood", "",
            *markdown([head, *(ratings_row(run, baseline) for run in runs)]), "", paragraph(notes)]
    if not any(run.ratings for run in runs):
        text += ["", paragraph(
            "Nobody has rated these latents. Open run_i/features.html in a browser, press Rate, "
            "export the answers into run_i/ as human_ratings_NAME.json, and run plot.py again.")]
    return "\n".join(text)


# ---- Figures: training ---------------------------------------------------------------------------
def training_curve(run, x_name, y_name):
    """Returns (steps, values [seeds, steps]) of a quantity in the training log; None without it.

    NaN: the stage has no such quantity.
    """
    pairs = []
    for log in (seed["training"] for seed in run.curves if seed.get("training")):
        y = (log.get("parameters", {}) | log | log.get("losses", {})).get(y_name)
        if y:           # a quantity of the last stages alone has fewer values than there are steps
            missing = [None] * (len(log[x_name]) - len(y))
            pairs.append((log[x_name], np.array(missing + y, dtype=float)))
    if not pairs:
        return None
    steps = min((x for x, _ in pairs), key=lambda x: x[-1])     # seeds may differ in their steps
    rows = np.array([y if x == steps else np.interp(steps, x, y) for x, y in pairs])
    known = np.flatnonzero(~np.isnan(rows).all(0))
    if not len(known):
        return None
    kept = slice(known[0], known[-1] + 1)
    return steps[kept], rows[:, kept]


def draw_training_curve(axis, run, x_name, y_name, line="-"):
    """Draws a quantity in the training log, with a marker at six of its steps."""
    if curve := training_curve(run, x_name, y_name):
        draw_band(axis, run, *curve, every=math.ceil(len(curve[0]) / 6), line=line)


def curricula(runs):
    """Returns {((first step, name) of each stage): runs} of the curricula of several stages."""
    plans = {}
    for run in runs_with(runs, "training"):
        log = run.curves[0]["training"]
        starts = log.get("stage_starts", [])
        if len(starts) > 1:
            plans.setdefault((*zip(starts, log.get("stages", starts)),), []).append(run)
    return plans


def draw_stage_borders(axis, stages, color):
    """Draws vertical lines where stages but the first begin."""
    left = axis.get_xlim()[0]
    for start, _ in stages[1:]:
        if start > left:
            axis.axvline(start, color=color, linewidth=0.7, linestyle=(0, (4, 2)), zorder=0)


def write_stage_names(axis, stages, color, height):
    """Writes above a panel the names of the stages that reach into it, `height` points high. They
    stand 20 points apart or more: after a short stage a name moves to the right."""
    first, (left, _), bottom = axis.dataLim.x0, axis.get_xlim(), axis.get_ylim()[0]
    ends, taken = [*(start for start, _ in stages[1:]), math.inf], -math.inf
    for (start, name), end in zip(stages, ends):
        if end > first:
            x = max(start, left)
            place = axis.transData.transform((x, bottom))[0] * 72 / axis.figure.dpi     # points
            taken = max(place, taken + 20)
            axis.annotate(
                str(name).replace("_", " "), (x, 1), (2 + taken - place, 2 + height), rotation=25,
                rotation_mode="anchor", xycoords=("data", "axes fraction"),
                textcoords="offset points", fontsize=6, color=color)


def draw_stages(axes, runs):
    """Marks where stages begin and names them above the top panels; one row a curriculum."""
    plans = [(stages, sharing[0].color if len(sharing) == 1 else NOTE["color"])
             for stages, sharing in curricula(runs).items()]
    longest = max((len(str(name)) for stages, _ in plans for _, name in stages), default=0)
    for axis in axes[0]:        # before the borders, which widen the range of the data
        for row, (stages, color) in enumerate(plans):
            write_stage_names(axis, stages, color, (8 + 1.4 * longest) * row)
    for axis in axes.flat:
        for stages, color in plans:
            draw_stage_borders(axis, stages, color)


def draw_l0_targets(axis, runs):
    """Draws a dotted line at each TARGET_L0 and widens the panel to show it."""
    for target in {run.config["TARGET_L0"] for run in runs if run.config.get("TARGET_L0")}:
        axis.axhline(target, color=NOTE["color"], linewidth=0.8, linestyle=":")
        low, high = axis.get_ylim()
        axis.set_ylim(min(low, target / 1.6), max(high, target * 1.6))
        axis.annotate(f"target {target:g}", (1, target), (0, -2), ha="right", va="top",
                      **NOTE, xycoords=("axes fraction", "data"), textcoords="offset points")


def fig_training(runs):
    """Draws losses, L0 and dead latents over training."""
    runs = runs_with(runs, "training")
    if not runs:
        return None
    figure, axes = plt.subplots(2, 2, figsize=(WIDTH, 4.6), sharex=True)
    for axis, x_name, y_name, text in (
            (axes[0, 0], "step", "reconstruction", f"reconstruction loss{prefix_note(runs)}"),
            (axes[0, 1], "val_step", "val_loss", "validation loss"),
            (axes[1, 0], "step", "l0", TITLES["l0"]),
            (axes[1, 1], "step", "dead_fraction", "dead latents (fraction)")):
        for run in runs:
            draw_training_curve(axis, run, x_name, y_name)
        axis.set_ylabel(text)
    for axis in axes.flat[:3]:
        axis.set_yscale("log")
        short_ticks(axis.yaxis, LogLocator(subs=(1, 2, 5)))
    for axis in axes[1]:
        axis.set_xlabel("training step")
        short_ticks(axis.xaxis, MaxNLocator(5))
    draw_l0_targets(axes[1, 0], runs)
    top = max(0.05, axes[1, 1].get_ylim()[1])
    axes[1, 1].set_ylim(-0.02 * top, top)
    draw_stages(axes, runs)
    legend(figure, runs, SEEDS_NOTE)
    return figure


STEERED = ("beta_1", "beta_2")          # the weights of L1 in the two levels of `hierarchical`


def is_learned(run, name):
    """Returns whether a logged parameter learns. One that never moves does not: it is fixed, or its
    part is switched off. A weight that the trainer steers towards TARGET_L0 moves without being
    learned; its curve looks like any other, so these are known by name."""
    values = training_curve(run, "step", name)[1]
    return name not in STEERED and np.nanmax(values) - np.nanmin(values) > 1e-9


def logged_names(run, kind):
    """Returns the losses but for the reconstruction, or the parameters that learn, of a run's
    log."""
    log = run.curves[0]["training"].get(kind) or ()
    names = [name for name in log if training_curve(run, "step", name)]
    if kind == "parameters":
        return [name for name in names if is_learned(run, name)]
    return [name for name in names if name != "reconstruction"]


def fig_logged(runs, kind):
    """Draws the "parameters" or the "losses" of the training log over its steps: losses without
    their weights, dotted in runs where no stage gives them a weight."""
    logs = {run.folder: logged_names(run, kind) for run in runs_with(runs, "training")}
    runs = [run for run in runs if logs.get(run.folder)]
    if not runs:
        return None
    names = list(dict.fromkeys(name for run in runs for name in logs[run.folder]))
    figure, axes = panels(len(names), 2, 1.9)
    for axis, name in zip(axes.flat, names):
        drawn = [run for run in runs if name in logs[run.folder]]
        only_logged = [run for run in drawn if kind == "losses"
                       and name not in run.curves[0]["training"].get("weighed", names)]
        for run in drawn:
            draw_training_curve(axis, run, "step", name, ":" if run in only_logged else "-")
        axis.set_ylabel(name.replace("_", " ") + "\n(dotted: not trained on)" * bool(only_logged))
        axis.set_xlabel("training step")
        short_ticks(axis.xaxis, MaxNLocator(4))
        draw_stages(np.array([[axis]]), drawn)
    legend(figure, runs, SEEDS_NOTE)
    return figure


# ---- Figures: headline metrics, reconstruction ---------------------------------------------------
def headline(run, evaluation, metric):
    """Returns a headline metric of a run; None where it was not measured."""
    entry = run.entries.get(evaluation, {"means": {}})
    return entry["means"].get(f"{metric}_mean", entry.get("metrics", {}).get(metric))


def over_sequences(run, metric, baseline=None):
    """Returns [below, above] of the 95 % bootstrap interval of a metric over held-out sequences, or
    of its difference from the baseline, paired; None without the metric of each sequence."""
    is_variance = metric == "explained_variance"        # 1 - fvu, which sequences have
    pair = paired(run, baseline or run, "fvu" if is_variance else metric)
    if pair is None:
        return None
    if baseline is None:
        values = pair[0].mean(0)
        mean, (low, high) = values.mean(), bootstrap_interval((values,), np.mean)
    else:
        difference = paired_test(*pair)
        mean, low, high = difference.mean, difference.low, difference.high
    ends = [max(mean - low, 0.0), max(high - mean, 0.0)]
    return ends[::-1] if is_variance else ends


def over_seeds(runs, evaluation, metric):
    """Returns [below, above], the standard error over seeds of a headline metric of a run, or of
    the difference of two; None where one has a single seed."""
    errors = [run.entries[evaluation].get("stderrs", {}).get(f"{metric}_stderr") for run in runs]
    return None if None in errors else [math.hypot(*errors)] * 2


def draw_bar(axis, row, run, evaluation, metric, baseline):
    """Draws a headline metric of a run, or how it differs from the baseline if there is one, as a
    horizontal bar, and writes its value at the right; returns the ends of the bar's interval. A run
    that does not compare has no difference: it would only set the scale of the panel."""
    value = headline(run, evaluation, metric)
    text = {"xy": (1, row), "xycoords": ("axes fraction", "data"), "va": "center", "ha": "right"}
    if value is None:
        axis.annotate("n/a", **text, **NOTE)
        return []
    number = short(value) if abs(value) >= 100 else f"{value:#.3g}"
    axis.annotate(number, **text, fontsize=6.5)
    if run is baseline or baseline and run.caveat:
        return []
    if baseline is None:
        bar = seeds = over_seeds([run], evaluation, metric)
        bar = bar or over_sequences(run, metric)
    else:
        value -= headline(baseline, evaluation, metric)
        seeds = over_seeds([run, baseline], evaluation, metric)
        bar = over_sequences(run, metric, baseline) or seeds
    below, above = bar or (0.0, 0.0)
    axis.barh(row, value, height=0.72, color=run.color)
    if bar:
        axis.errorbar(value, row, xerr=[[below], [above]], color="black", linewidth=0.8,
                      capsize=2 if bar is seeds else 0)
    return [value - below, value + above]


def headline_title(evaluation, metric, n_evaluations):
    """Returns a panel's title, with the evaluation's name unless the metric begins with it, or is a
    known one that no other of the n_evaluations has."""
    title = title_of(metric)
    alone = metric in TITLES and n_evaluations == 1
    if not alone and not title.startswith(evaluation.removesuffix("s")):
        title = f"{evaluation.replace('_', ' ')}: {title}"
    title = re.sub(" (?=[↑↓]$)", "\u00a0", title)       # no arrow on a line of its own
    return textwrap.fill(title, 30, break_on_hyphens=False)


def draw_headline(axis, runs, evaluation, metric):
    """Draws the bars of a headline metric: differences from the baseline where it and another run
    have it, since bars from zero would look alike; else the values themselves."""
    baseline = baseline_of(runs)
    measured = [run for run in runs
                if headline(run, evaluation, metric) is not None and not run.caveat]
    if baseline not in measured or len(measured) < 2:
        baseline = None
    ends = [0.0]
    for row, run in enumerate(runs):
        ends += draw_bar(axis, row, run, evaluation, metric, baseline)
    span = max(ends) - min(ends) or 1.0
    axis.set_xlim(min(ends) - 0.05 * span, max(ends) + 0.45 * span)    # the right for the values
    axis.axvline(0, color="black", linewidth=0.6)
    better = {"↑": "better →", "↓": "← better"}.get(title_of(metric)[-1])
    minus = baseline and f"minus {textwrap.shorten(baseline.label, 24, placeholder='…')}"
    axis.set_xlabel("     ".join(filter(None, (minus, better))), **NOTE)
    short_ticks(axis.xaxis, MaxNLocator(3))


def fig_headlines(runs):
    """Draws every headline metric of every evaluation, but for times, one small panel each."""
    names = dict.fromkeys((evaluation, key.removesuffix("_mean")) for run in runs
                          for evaluation, entry in run.entries.items() for key in entry["means"])
    names = [(evaluation, metric) for evaluation, metric in names if metric not in WALL_CLOCK]
    if not names:
        return None
    metrics = [metric for _, metric in names]
    lines = max(textwrap.fill(run.label, 28).count("\n") for run in runs) + 1
    bar = 0.04 + 0.11 * lines                           # inches
    figure, axes = panels(len(names), 3, 0.75 + bar * len(runs), sharey=True)
    for axis, (evaluation, metric) in zip(axes.flat, names):
        draw_headline(axis, runs, evaluation, metric)
        title = headline_title(evaluation, metric, metrics.count(metric))
        axis.set_title(title + prefix_note(runs) * (metric == "final_train_loss"), loc="left")
        one_row_per_run(axis, runs)
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="y", visible=False)
    figure.supxlabel(
        f"Numbers: the runs' values (n/a: not measured). Bars: differences from "
        f"{baseline_of(runs).folder} of the runs that compare with it; without such, the values.\n"
        "Lines: 95 % bootstrap interval over held-out sequences, of differences paired and over "
        "seeds too; with caps: standard error over seeds.", **NOTE)
    return figure


def draw_references(axis, references):
    """Draws dotted lines at reference values {name: value} and names them above the panel, those
    off its scale too."""
    low, high = axis.get_ylim()
    names = {"dotted": [], "off scale": []}
    for name, value in references.items():
        inside = low <= value <= high
        names["dotted" if inside else "off scale"].append(f"{name} ({short(value)})")
        if inside:
            axis.axhline(value, color=NOTE["color"], linewidth=0.8, linestyle=":", zorder=0)
    text = "; ".join(f"{place}: {', '.join(group)}" for place, group in names.items() if group)
    axis.set_title(text, loc="right", **NOTE)


def point_error(run, metric):
    """Returns [[below], [above]] of a metric of a run, see POINTS_NOTE; None where neither is
    known."""
    error = run.errors.get(metric)
    ends = [error, error] if error is not None else over_sequences(run, metric)
    return None if ends is None else [[end] for end in ends]


def free_place(point, width, panel, taken):
    """Returns (x, y) of the middle of a name `width` wide that is to stand beside a point: the
    nearest place in the panel that is not taken; the one to the right where there is none. Boxes
    are (left, bottom, right, top), all lengths in points."""
    def is_free(x, y):
        box = x - width / 2, y - 4, x + width / 2, y + 4
        inside = panel[0] < box[0] and panel[1] < box[1] and box[2] < panel[2] and box[3] < panel[3]
        return inside and not any(box[0] < other[2] and other[0] < box[2] and box[1] < other[3]
                                  and other[1] < box[3] for other in taken)

    beside = 9 + width / 2
    places = [(point[0] + side * beside, point[1] + rise)
              for rise in sorted(range(-90, 91, 9), key=abs) for side in (1, -1, 0)]
    return next((place for place in places if is_free(*place)), places[0])


def label_points(axis, runs, x, y):
    """Writes the names of runs beside their points in the plane of two metrics, where neither
    points nor other names are."""
    axis.autoscale_view()               # else transData is of an empty panel
    scale = 72 / axis.figure.dpi        # from pixels to points
    points = [axis.transData.transform((run.metrics[x], run.metrics[y])) * scale for run in runs]
    taken = [(*(point - 5), *(point + 5)) for point in points]
    for run, point in zip(runs, points):
        width = 3.6 * len(run.label)
        place = free_place(point, width, axis.bbox.get_points().ravel() * scale, taken)
        taken.append((place[0] - width / 2, place[1] - 4, place[0] + width / 2, place[1] + 4))
        axis.annotate(
            run.label, (run.metrics[x], run.metrics[y]), place - point, va="center", ha="center",
            textcoords="offset points", fontsize=6.5, color=run.color,
            arrowprops={"arrowstyle": "-", "color": run.color, "linewidth": 0.4})


def draw_points(axis, runs, x, y):
    """Draws the runs that have both of two metrics in their plane, with intervals and names."""
    runs = [run for run in runs if x in run.metrics and y in run.metrics]
    for run in runs:
        axis.errorbar(
            run.metrics[x], run.metrics[y], xerr=point_error(run, x), yerr=point_error(run, y),
            color=run.color, marker=run.marker, markersize=5, markeredgecolor="white",
            markeredgewidth=0.4, elinewidth=0.9)
    axis.set_xlabel(title_of(x))
    axis.set_ylabel(title_of(y))
    axis.margins(0.2, 0.12)
    axis.xaxis.set_major_locator(MaxNLocator(6))
    if len(runs) <= MOST_NAMES:
        label_points(axis, runs, x, y)


def finish_points(figure, runs):
    """Writes below panels of `draw_points` what their lines mean, and a legend where there are too
    many points to name each."""
    if len(runs) > MOST_NAMES:
        legend(figure, runs, POINTS_NOTE, line="", several=True)
    else:
        figure.supxlabel(POINTS_NOTE, **NOTE)


def constants(run, *others):
    """Returns the constants and the data of a run but for some."""
    return {name: value for name, value in run.config.items()
            if (name == "data_hash" or name.isupper()) and name not in others}


def frontiers(runs):
    """Returns groups of runs that differ in TARGET_L0, and perhaps SEEDS and EVALS, alone, each in
    the order of L0."""
    groups = []
    for run in (run for run in runs if "TARGET_L0" in run.config):
        but = constants(run, "TARGET_L0", "SEEDS", "EVALS")
        group = next((group for same, group in groups if same == but), None)
        groups += [] if group else [(but, [run])]
        if group:
            group.append(run)
    return [sorted(group, key=lambda run: run.metrics["l0"]) for _, group in groups
            if len({run.config["TARGET_L0"] for run in group}) > 1]


def fig_sparsity_fidelity(runs):
    """Draws explained variance and loss increase over L0, with a line through the runs of a variant
    at several L0, and controls as a scale."""
    runs = [run for run in runs if "l0" in run.metrics]
    if not runs:
        return None
    known = ChainMap(*(run.metrics for run in runs))
    controls = {"token-pair lookup": known.get("bigram_explained_variance"),
                "untrained SAE": known.get("untrained_explained_variance")}
    losses = {"the model itself": 0.0}
    if {"ce_unigram", "ce_model"} <= known.keys():
        losses["token frequencies"] = known["ce_unigram"] - known["ce_model"]
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 2.9))
    for axis, metric, references in ((axes[0], "explained_variance", controls),
                                     (axes[1], "loss_increase_nats", losses)):
        draw_points(axis, runs, "l0", metric)
        for group in frontiers([run for run in runs if metric in run.metrics]):
            axis.plot([run.metrics["l0"] for run in group], [run.metrics[metric] for run in group],
                      color=group[0].color, linewidth=1, zorder=1)
        draw_references(axis, {k: v for k, v in references.items() if v is not None})
    finish_points(figure, runs)
    return figure


def by_position(run, name):
    """Returns (positions, values [seeds, bins]) of a curve over positions, averaged in bins of
    about half an octave; None without it."""
    values = seed_values(run, name)
    if not len(values):
        return None
    n = values.shape[1]
    starts = np.round(2 ** np.arange(0, max(math.log2(n), 0.5), 0.5))
    edges = np.unique(np.append(starts, n + 1)).astype(int)
    bins = list(zip(edges, edges[1:] - 1))                     # first and last position, from 1
    return ([math.sqrt(first * last) for first, last in bins],
            np.stack([values[:, first - 1:last].mean(1) for first, last in bins], axis=1))


def fig_position(runs):
    """Draws explained variance and loss increase along the context."""
    names = {"explained_variance_by_position": "explained variance ↑",
             "loss_increase_by_position": "loss increase (nats) ↓"}
    runs = [run for run in runs if any(seed.get(name) for seed in run.curves for name in names)]
    if not runs:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 2.8))
    for axis, (name, text) in zip(axes, names.items()):
        for run in runs:
            if curve := by_position(run, name):
                draw_band(axis, run, *curve)
        axis.set_xscale("log", base=2)
        short_ticks(axis.xaxis)
        axis.set_xlabel("position in the context (tokens, binned)")
        axis.set_ylabel(text)
    legend(figure, runs, SEEDS_NOTE)
    return figure


# ---- Figures: latents over time ------------------------------------------------------------------
def fig_stability_fidelity(runs):
    """Draws slow explained variance and stability over explained variance: up and right is
    better."""
    runs = [run for run in runs if "explained_variance" in run.metrics]
    metrics = [metric for metric in ("slow_explained_variance", "stability")
               if any(metric in run.metrics for run in runs)]
    if not metrics:
        return None
    figure, axes = panels(len(metrics), 2, 2.6)
    for axis, metric in zip(axes.flat, metrics):
        draw_points(axis, runs, "explained_variance", metric)
    finish_points(figure, runs)
    return figure


def draw_stability(axis, row, run):
    """Draws a run's stability beside what permuted positions and tokens alone give."""
    if len(null := seed_values(run, "stability_null")):
        axis.plot(np.nanpercentile(null, (2.5, 97.5)), [row, row], color="#bbbbbb", linewidth=7,
                  solid_capstyle="butt", label="permuted positions (95 %)")
    if "stability_token" in run.metrics:
        axis.plot(run.metrics["stability_token"], row, "k|", markersize=8,
                  label="from tokens alone")
    for name, filled in (("stability", True), ("stability_weighted", False)):
        if name in run.metrics:
            axis.plot(run.metrics[name], row, color=run.color, marker=run.marker, markersize=5,
                      markerfacecolor=run.color if filled else "white")


def fig_autocorrelation(runs):
    """Draws how long latents stay active, and stability beside chance and tokens alone."""
    runs = [run for run in runs
            if len(seed_values(run, "autocorrelation")) or "stability" in run.metrics]
    if not runs:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, max(3, 0.8 + 0.24 * len(runs))))
    lags = next((run.config["STABILITY_LAGS"] for run in runs if "STABILITY_LAGS" in run.config),
                (5, 16))
    left.axvspan(*lags, color="#eeeeee", zorder=0)
    for row, run in enumerate(runs):
        draw_stability(right, row, run)
        if len(values := seed_values(run, "autocorrelation")):
            draw_band(left, run, np.arange(1, values.shape[1] + 1), values, every=4)
    left.set_title(f"shaded: lags of stability ({lags[0]}-{lags[1]})", loc="right",
                   **NOTE)
    left.set_xlabel("lag (tokens)")
    left.set_ylabel("autocorrelation (mean over latents)")
    if left.dataLim.y0 > 0:
        left.set_yscale("log")
        left.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    short_ticks(left.yaxis)
    right.set_xscale("symlog", linthresh=1e-3)
    short_ticks(right.xaxis)
    right.set_xlabel("stability ↑ (log scale beyond 0.001)\n"
                     "filled: plain mean; hollow: by energy")
    one_row_per_run(right, runs)
    controls = labelled_artists(right)
    right.legend(controls.values(), controls, loc="lower right", bbox_to_anchor=(1, 1), ncols=2,
                 fontsize=6.5, columnspacing=1)
    legend(figure, runs, SEEDS_NOTE)
    return figure


EVOLUTION = {"tokens", "latents", "values"}      # a curve of other keys is not drawn


def evolution_values(run, in_q95=False):
    """Returns the values [latent, token] of the last 64 tokens of a run's passage, over each
    latent's q95 if asked for; empty where the run has no passage."""
    passage = run.curves[0]["evolution"]
    if not EVOLUTION <= passage.keys():
        return np.zeros((0, 0))
    values = np.nan_to_num(np.array(passage["values"], dtype=float))[:, -64:]
    return values / np.array(passage["q95"])[:, None] if in_q95 else values


def draw_evolution(axis, run, values, highest):
    """Draws the latents that fire in a run's passage [latent, token], on a scale up to `highest`;
    returns the image."""
    passage, firing = run.curves[0]["evolution"], np.flatnonzero(values.any(1))
    image = axis.imshow(values[firing], aspect="auto", cmap="Blues", vmin=0, vmax=highest)
    file = f": {passage['file']}" if passage.get("file") else ""
    axis.set_title(textwrap.shorten(run.label + file, 110, placeholder="…"), loc="left")
    axis.set_ylabel("latent")
    axis.set_yticks(range(len(firing)), np.array(passage["latents"])[firing], fontsize=5)
    token_grid(axis, passage["tokens"][-64:])
    return image


def fig_evolution(runs):
    """Draws latents along a held-out passage, of the last two runs, on one scale for all rows: in
    units of each latent's q95 if both runs have it, else their values."""
    runs = [run for run in runs_with(runs, "evolution") if evolution_values(run).any()][-2:]
    if not runs:
        return None
    passages = [run.curves[0]["evolution"] for run in runs]
    in_q95 = all("q95" in passage for passage in passages)
    values = [evolution_values(run, in_q95) for run in runs]
    figure, axes = panels(len(runs), 1, 2.2)
    for axis, run, rows in zip(axes.flat, runs, values):
        image = draw_evolution(axis, run, rows, max(rows.max() for rows in values))
    unit = "value / q95" if in_q95 else "value"
    figure.colorbar(image, ax=axes, label=unit, shrink=0.7, pad=0.01)
    text = f"Of the {passages[-1]['selection']}: its" if "selection" in passages[-1] else "The"
    text += " last 64 tokens, latents that fire there. One scale for all rows"
    text += ". q95: a latent's 95th percentile where it fires in held-out text." if in_q95 else "."
    figure.supxlabel(textwrap.fill(text, 130), **NOTE)
    return figure


def fig_similarity(runs):
    """Draws how similar the latents of two positions of a window are, beyond other windows'."""
    matrices = [(run, seed_values(run, "similarity_matrix")) for run in runs]
    matrices = [(run, values.mean(0)) for run, values in matrices if len(values)]
    if not matrices:
        return None
    titles = [textwrap.fill(run.label, 20) for run, _ in matrices]
    height = max(1.3, min(2.4, 4.8 / len(matrices))) + 0.12 * max(t.count("\n") for t in titles)
    figure, axes = panels(len(matrices), 4, 0.5 + height)      # windows may differ in length
    off_diagonal = np.concatenate([m[~np.eye(len(m), dtype=bool)] for _, m in matrices])
    low, high = np.nanpercentile(off_diagonal, (0.5, 99.5))
    for axis, (_, matrix), title in zip(axes.flat, matrices, titles):
        n = 2 * len(matrix)
        image = axis.imshow(matrix, cmap="cividis", vmin=min(low, 0), vmax=high,
                            extent=(0, n, n, 0))
        axis.set_title(title, loc="left", fontsize=7)
        axis.set_xlabel("position s")
        axis.grid(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("position t")
    figure.colorbar(image, ax=figure.axes, label="cosine minus cosine\nbetween windows",
                    extend="max", aspect=25, pad=0.01)
    return figure


def fig_variance_scaling(runs):
    """Draws the variances of the latents before and after scaling, and the decays they imply."""
    parts = {"variance": "log10 variance", "scaled_variance": "log10 scaled variance",
             "decay": "decay per token"}
    runs = [run for run in runs if any(len(seed_values(run, name)) for name in parts)]
    if not runs:
        return None
    figure, axes = panels(3, 3, 2.3)
    for axis, (name, text) in zip(axes.flat, parts.items()):
        samples = [seed_values(run, name).ravel() for run in runs]
        if name != "decay":
            samples = [np.log10(np.maximum(values, 1e-9)) for values in samples]
        samples = [values[np.isfinite(values)] for values in samples]
        bins = np.histogram_bin_edges(np.concatenate(samples), 40)
        for run, values in zip(runs, samples):
            shares = np.histogram(values, bins)[0] / max(len(values), 1)
            axis.plot((bins[1:] + bins[:-1]) / 2, shares, drawstyle="steps-mid", color=run.color,
                      marker=run.marker, markevery=4, linewidth=1.2)
        axis.set_xlabel(text)
    axes[0, 0].set_ylabel("share of the latents")
    legend(figure, runs, None)
    return figure


# ---- Figures: unlearning -------------------------------------------------------------------------
STRATEGIES = ("standard", "pattern", "hybrid")      # of unlearning
RATES = ("-", "--", "-.", ":")                      # lines: false-positive rates of a strategy
CONTROLS = {"random_latents": "x", "random_directions": "+", "projection": "1"}


def marked_losses(run):
    """Returns {name: loss increase on FORGET [nats]} of where strategies are compared and of a
    model trained without FORGET, as far as they are known."""
    marks, path = {}, HERE / "bench" / "results" / "oracle.json"
    if compared := run.config.get("FORGET_NATS"):
        marks["where strategies are compared"] = compared
    if path.exists():
        measured = json.loads(path.read_text(encoding="utf-8"))
        if measured["forget"] == run.config.get("FORGET"):
            marks["a model trained without FORGET"] = measured["increase"]["forget"]
    return marks


def draw_frontier(axis, run, strategy, group):
    """Draws what a strategy costs on a group of windows over what it costs on FORGET, one line a
    false-positive rate; beside "standard" the controls, which have no gate either."""
    frontier = run.curves[0]["frontier"]
    names = [name for name in frontier if name.partition("_")[0] == strategy]
    drawn = {name: {"linestyle": RATES[i % len(RATES)], "marker": run.marker}
             for i, name in enumerate(names)}
    if strategy == "standard":
        drawn |= {name: {"linestyle": "", "marker": marker, "markersize": 5}
                  for name, marker in CONTROLS.items() if name in frontier}
    for name, style in drawn.items():
        points = sorted((row["forget"], row[group]) for row in frontier[name] if group in row)
        if points:
            axis.plot(*zip(*points), color=run.color, linewidth=1, **style)


def finish_frontier(axis, marks):
    """Scales a panel of `draw_frontier`, with vertical lines at losses on FORGET."""
    axis.set_xlim(left=0)
    axis.set_yscale("symlog", linthresh=0.01)
    axis.set_ylim(-0.003, max(0.01, 1.5 * axis.dataLim.y1, axis.get_ylim()[1]))
    axis.yaxis.set_major_formatter(FuncFormatter(short))
    for nats in marks.values():
        axis.axvline(nats, color=NOTE["color"], linewidth=0.6, zorder=0)


def draw_roc(axis, runs, strategy, what):
    """Draws how well what belongs to FORGET is identified by a strategy's matcher."""
    for run in runs:
        rates = run.curves[0]["roc"].get(strategy, ())
        axis.plot(np.linspace(0, 1, len(rates)), rates, color=run.color, marker=run.marker,
                  markevery=max(1, len(rates) // 5), linewidth=1)
    axis.plot([0, 1], [0, 1], color=NOTE["color"], linewidth=0.6)
    axis.set_xlabel("false-positive rate")
    axis.set_ylabel("true-positive rate")
    axis.set_title(f"{strategy}: {what}", loc="left")


def explain_frontiers(axis, runs):
    """Fills a panel with a legend of the lines and markers of `draw_frontier`."""
    first = runs[-1].config.get("FALSE_POSITIVES", ["lowest"])[0]
    names = dict.fromkeys(name for run in runs for name in run.curves[0]["frontier"]
                          if name not in CONTROLS)
    rates = [str(first), *dict.fromkeys(name.partition("_")[2] for name in names if "_" in name)]
    kinds = {f"false positives {rate}": (RATES[i % len(RATES)], "") for i, rate in enumerate(rates)}
    kinds |= {f"control: {name.replace('_', ' ')}": ("", mark) for name, mark in CONTROLS.items()}
    axis.axis("off")
    axis.legend([plt.Line2D([], [], color="black", linewidth=1, linestyle=line, marker=marker)
                 for line, marker in kinds.values()], kinds, loc="center left", fontsize=6.5)


def fig_unlearning(runs):
    """Draws what forgetting costs elsewhere, one panel for each strategy and group of windows, and
    how well FORGET is identified."""
    runs = runs_with(runs, "frontier")
    if not runs:
        return None
    marks = marked_losses(runs[-1])
    figure, axes = plt.subplots(3, 3, figsize=(WIDTH, 6), height_ratios=(1, 1, 0.8))
    for axis in axes[:2].flat[1:]:
        axis.sharex(axes[0, 0])
        axis.sharey(axes[0, 0])
    for (i, group), (j, strategy) in itertools.product(
            enumerate(("neighbours", "retain")), enumerate(STRATEGIES)):
        for run in runs:
            draw_frontier(axes[i, j], run, strategy, group)
        finish_frontier(axes[i, j], marks)
        axes[0, j].set_title(strategy, loc="left")
        axes[1, j].set_xlabel("gained on FORGET (nats) ↑")
        axes[i, 0].set_ylabel(f"on {group} (nats) ↓")
    draw_roc(axes[2, 0], runs, "pattern", "tokens of FORGET")
    draw_roc(axes[2, 1], runs, "hybrid", "windows of FORGET")
    explain_frontiers(axes[2, 2], runs)
    note = ("losses gained; each line: strengths from a quarter of the one compared to four times "
            "it; vertical axes logarithmic beyond 0.01 nats")
    if marks:
        at = ", ".join(f"{name} ({short(nats)} nats)" for name, nats in marks.items())
        note += f"; vertical lines: {at}"
    legend(figure, runs, note, several=True)
    return figure


def part_of_passage(passage, n=48):
    """Returns a part of a passage {name: values of each token}, n tokens long: with 16 before the
    gate opens, or the end if it stays closed."""
    n_tokens = len(passage["tokens"])
    threshold = np.array(passage.get("threshold", [math.inf] * n_tokens))
    opened = np.flatnonzero(np.array(passage["gate"]) > threshold)
    start = opened[0] - 16 if len(opened) else n_tokens
    start = max(0, min(start, n_tokens - n))
    return {name: values[start:start + n] for name, values in passage.items()}


def draw_clamps(axis, run, passage):
    """Draws one row of marks for each strategy: at which tokens it clamps."""
    rows = [name for name in STRATEGIES if name in passage]
    for row, name in enumerate(rows):
        clamped = np.flatnonzero(passage[name])
        axis.plot(clamped, np.full(len(clamped), row), "s", color=run.color, markersize=4)
    axis.set_yticks(range(len(rows)), [f"clamped: {name}" for name in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xticks([])
    axis.set_title(run.label, loc="left")


def draw_gate(axis, run, passage):
    """Draws the matcher's probability at each token, and the gate that it opens."""
    x = np.arange(len(passage["tokens"]))
    axis.bar(x, passage["match"], color=run.color, alpha=0.35)
    axis.step(x, passage["gate"], where="mid", color="black", linewidth=1.2)
    if "threshold" in passage:
        axis.plot(x, passage["threshold"], "--", color="black", linewidth=0.8)
    axis.set_ylim(0, 1.02)
    axis.set_ylabel("probability of FORGET")
    token_grid(axis, passage["tokens"])
    axis.tick_params(axis="x", labelsize=6.5)


def fig_clamped_passage(runs):
    """Draws a held-out passage of FORGET, of the last two runs: where latents are clamped, the
    matcher, and the gate."""
    runs = runs_with(runs, "passage")[-2:]
    if not runs:
        return None
    figure, axes = plt.subplots(2 * len(runs), 1, figsize=(WIDTH, 2.6 * len(runs) + 0.3),
                                height_ratios=[1, 4] * len(runs))
    for strip, axis, run in zip(axes[::2], axes[1::2], runs):
        passage = part_of_passage(run.curves[0]["passage"])
        draw_clamps(strip, run, passage)
        draw_gate(axis, run, passage)
        for panel in (strip, axis):
            panel.set_xlim(-0.6, len(passage["tokens"]) - 0.4)
    figure.legend(
        [plt.Rectangle((0, 0), 1, 1, color="#bbbbbb"), plt.Line2D([], [], color="black"),
         plt.Line2D([], [], color="black", linestyle="--", linewidth=0.8)],
        ["match of the last tokens", "gate: largest mean match so far", "threshold of the gate"],
        loc="outside lower center", ncols=3)
    return figure


# ---- Figures: probing and ratings ----------------------------------------------------------------
def fig_sparse_probing(runs):
    """Draws the accuracy of probes on the k best latents, beside channels and tokens."""
    runs = runs_with(runs, "sparse_probing")
    if not runs:
        return None
    figure, axis = plt.subplots(figsize=(WIDTH, 3))
    for run in runs:
        probing = run.curves[0]["sparse_probing"]
        values = np.array([curves["sparse_probing"]["sae"] for curves in run.curves])
        draw_band(axis, run, probing["k"], values[:, :len(probing["k"])])
    baselines = {"channels": ("model's channels", "-"), "untrained": ("untrained SAE", "--"),
                 "tokens": ("counts of tokens", ":")}
    for name, (text, line) in baselines.items():
        values = probing[name][:len(probing["k"])]      # without the probe on all features
        axis.plot(probing["k"], values, line, color=NOTE["color"], linewidth=1)
        axis.annotate(text, (probing["k"][-1], values[-1]), (4, 0), textcoords="offset points",
                      va="center", **NOTE)
    axis.set_xscale("log")
    short_ticks(axis.xaxis)
    axis.set_xticks(probing["k"])
    axis.set_xlim(right=2 * probing["k"][-1])
    axis.set_xlabel("features that the probe sees")
    axis.set_ylabel("test accuracy ↑")
    legend(figure, runs, SEEDS_NOTE)
    return figure


def draw_rating(axis, row, run, question, marker):
    """Draws the mean of people's answers to "score" or "correct" with its interval, if there are
    any."""
    if rated := mean_by_latent(run.ratings.get(question, {})):
        mean = rated.values.mean()
        axis.errorbar(mean, row, color=run.color, marker=marker, markersize=6, linestyle="",
                      xerr=[[mean - rated.low], [rated.high - mean]])


DETECTION_MARKERS = {"detection": "o", "detection_same_token": "|", "detection_null": "x",
                     "detection_reinitialised": "2"}


def draw_detection(axis, row, run):
    """Draws how often passages are identified automatically, and the controls."""
    for name, marker in (DETECTION_MARKERS | {"detection": run.marker}).items():
        if name in run.metrics:
            axis.plot(run.metrics[name], row, color=run.color, marker=marker, markersize=5)


def fig_latents(runs):
    """Draws how well the passages on which latents fire are identified among others and, where
    people have rated latents, their ratings."""
    runs = [run for run in runs if run.ratings or "detection" in run.metrics]
    if not runs:
        return None
    rated, chosen = (any(mean_by_latent(run.ratings.get(question, {})) for run in runs)
                     for question in ("score", "correct"))
    figure, axes = plt.subplots(1, 1 + rated, squeeze=False, sharey=True,
                                figsize=(WIDTH, 1.5 + 0.24 * len(runs)))
    right = axes[0, -1]
    for row, run in enumerate(runs):
        draw_detection(right, row, run)
        draw_rating(right, row, run, "correct", "*")
        if rated:
            draw_rating(axes[0, 0], row, run, "score", run.marker)
    right.axvline(0.2, color=NOTE["color"], linewidth=0.8, linestyle=":")
    right.set_xlabel("passages identified (dotted: chance) ↑")
    right.set_title("control: an untrained SAE on a model\nwith random weights", loc="right",
                    **NOTE)
    if rated:
        axes[0, 0].set_xlabel("rated interpretable (0 no, 1 yes) ↑")
    one_row_per_run(axes[0, 0], runs)
    for axis in axes.flat:
        axis.set_xlim(0, 1)
        axis.tick_params(axis="y", length=0)
    marks = {DETECTION[name]: marker for name, marker in DETECTION_MARKERS.items()
             if any(name in run.metrics for run in runs)}
    marks |= {"people (95 % interval)": "*"} if chosen else {}
    figure.legend([plt.Line2D([], [], color=NOTE["color"], marker=marker, linestyle="")
                   for marker in marks.values()], marks, loc="outside lower right", ncols=3)
    return figure


# ---- Figures: compositions and levels ------------------------------------------------------------
RECOVERY = {"cosine_primitives": "primitives: cosine ↑",
            "cosine_compositions": "compositions: cosine ↑",
            "auroc_seen": "seen pairs: AUROC ↑",
            "auroc_unseen": "unseen pairs: AUROC ↑"}
HATCHES = {"pca": "////", "nmf": "....", "random": ""}      # baselines
BASELINES = {"pca": "PCA", "nmf": "NMF", "random": "random dictionary"}


def recovery_values(run, dictionary, metric, task, rho):
    """Returns a score of "sae" or of a baseline in a task at a strength rho, one a seed."""
    return [row[dictionary][metric] for curves in run.curves for row in curves["recovery"]
            if (row["task"], row["rho"]) == (task, rho)]


def draw_recovery(axis, runs, metric, task, rhos):
    """Draws groups of bars, one for each rho: the baselines, as the first run has them, then each
    run's SAE; with the range of the seeds."""
    bars = [(runs[0], name, {"color": "white", "edgecolor": "#888888", "hatch": hatch})
            for name, hatch in HATCHES.items()]
    bars += [(run, "sae", {"color": run.color, "edgecolor": run.color}) for run in runs]
    width = 0.84 / len(bars)
    for (i, (run, dictionary, style)), (group, rho) in itertools.product(
            enumerate(bars), enumerate(rhos)):
        values = recovery_values(run, dictionary, metric, task, rho)
        if values:
            x = group + (i - (len(bars) - 1) / 2) * width
            axis.bar(x, np.mean(values), 0.92 * width, linewidth=0.6, **style)
            axis.plot([x, x], [min(values), max(values)], color="black", linewidth=0.7)
            if dictionary == "sae":     # more runs than colours: markers tell them apart
                axis.plot(x, np.mean(values), run.marker, color=run.color, markersize=3,
                          markeredgecolor="white", markeredgewidth=0.3)


def fig_recovery(runs):
    """Draws how much of a known ground truth is recovered, by the strength of its compositions."""
    runs = runs_with(runs, "recovery")
    if not runs:
        return None
    figure, axes = panels(len(RECOVERY), 2, 2.0, sharex=True)
    first = runs[0].curves[0]["recovery"]
    task = first[0]["task"]
    rhos = sorted({row["rho"] for row in first if row["task"] == task})
    for axis, (metric, text) in zip(axes.flat, RECOVERY.items()):
        draw_recovery(axis, runs, metric, task, rhos)
        axis.set_title(text, loc="left")
        axis.set_ylim(0.5 if "auroc" in metric else 0, 1.02)
        axis.set_xticks(range(len(rhos)), [f"{rho:g}" for rho in rhos])
        axis.grid(axis="x", visible=False)
    for axis in axes[-1]:
        axis.axhline(0.75, color=NOTE["color"], linewidth=0.8, linestyle=":")
        axis.set_title("dotted: one primitive alone (0.75)", loc="right", **NOTE)
        axis.set_xlabel(f"rho: strength of compositions (task: {task})")
    boxes = [plt.Rectangle((0, 0), 1, 1, facecolor="white", edgecolor="#888888", hatch=hatch)
             for hatch in HATCHES.values()]
    axes[0, 1].legend(boxes, BASELINES.values(), fontsize=6, loc="upper left", ncols=3)
    legend(figure, runs, "lines: range of the seeds", line="")
    return figure


def fig_dwell(runs):
    """Draws how well planted states are found, by how long they last, over the null of the first
    run."""
    runs = runs_with(runs, "dwell")
    if not runs:
        return None
    figure, axes = panels(2, 2, 2.6)
    dwells = sorted(int(name.removesuffix("_auroc")) for name in runs[0].curves[0]["dwell"]["sae"]
                    if name.endswith("_auroc"))
    titles = {"auroc": "when a state is on: AUROC ↑", "cosine": "its direction: cosine ↑"}
    for axis, (name, title) in zip(axes.flat, titles.items()):
        keys = [f"{dwell}_{name}" for dwell in dwells]
        for run in runs:
            draw_band(axis, run, range(len(dwells)), np.array(
                [[seed["dwell"]["sae"][key] for key in keys] for seed in run.curves], float))
        axis.plot([runs[0].curves[0]["dwell"]["null"][key] for key in keys], ":",
                  color=NOTE["color"])
        axis.set_title(title, loc="left")
        axis.set_title("dotted: chance", loc="right", **NOTE)
        axis.set_ylim(None, 1.02)
        axis.set_xticks(range(len(dwells)), dwells)
        axis.set_xlabel("tokens that a state lasts, on average")
    legend(figure, runs, SEEDS_NOTE)
    return figure


def fig_compositions(runs):
    """Draws how much of each composition is lost where a feature is dropped, beside the tokens at
    which it is largest, of the last two runs."""
    runs = runs_with(runs, "patterns")[-2:]
    if not runs:
        return None
    figure, axes = panels(len(runs), 1, 3.2)
    for axis, run in zip(axes.flat, runs):
        patterns = run.curves[0]["patterns"]
        effects = np.array(patterns["effects"], dtype=float)
        limit = max(np.abs(effects).max(), 1e-9)
        image = axis.imshow(effects, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit)
        names = [f"{c}: {' '.join(visible(token) for token in tokens[:4])}"
                 for c, tokens in zip(patterns["compositions"], patterns["tokens"])]
        axis.set_yticks(range(len(names)), names, fontsize=6)
        axis.set_xticks(range(len(patterns["features"])), patterns["features"], rotation=90,
                        fontsize=6)
        axis.set_title(run.label, loc="left")
        axis.set_xlabel("feature that is dropped")
        axis.set_ylabel("composition: its largest tokens")
        axis.grid(False)
        axis.tick_params(length=0, pad=1)
        figure.colorbar(image, ax=axis, label="loss / mean value", pad=0.01)
    return figure


def fig_reuse(runs):
    """Draws in how many compositions each feature takes part, beside random graphs."""
    runs = runs_with(runs, "reuse_null")
    if not runs:
        return None
    figure, axes = panels(len(runs), 2, 2.2)
    for axis, run in zip(axes.flat, runs):
        counts, null = (np.array(run.curves[0][name], dtype=float)
                        for name in ("reuse", "reuse_null"))
        n = max(len(counts), int(np.flatnonzero(null > 0.5).max(initial=0)) + 1)
        axis.bar(range(len(counts)), counts, color=run.color, label="SAE")
        axis.plot(range(n), np.pad(null, (0, n))[:n], "k_", markersize=6,
                  label="random graph with as many edges")
        axis.set_yscale("symlog", linthresh=1)
        axis.yaxis.set_major_formatter(FuncFormatter(short))
        axis.set_ylim(bottom=0)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlabel("compositions in which it takes part")
        axis.set_ylabel("features")
        axis.set_title(run.label, loc="left")
        if {"reuse_gini", "reuse_gini_null_95"} <= run.metrics.keys():
            axis.set_title(f"Gini {short(run.metrics['reuse_gini'])}, random at most "
                           f"{short(run.metrics['reuse_gini_null_95'])}", loc="right", **NOTE)
        axis.legend(fontsize=6)
    return figure


def fig_information(runs):
    """Draws the mutual information of parents with their own children (boxed) and with those of
    other parents, of the last two runs."""
    runs = runs_with(runs, "tree")[-2:]
    if not runs:
        return None
    matrices = [np.array(run.curves[0]["information_matrix"], dtype=float) for run in runs]
    highest = max(np.nanmax(matrix) for matrix in matrices)
    figure, axes = panels(len(runs), 2, 3.2)
    for axis, run, matrix in zip(axes.flat, runs, matrices):
        curves = run.curves[0]
        image = axis.imshow(matrix, aspect="auto", cmap="cividis", vmin=0, vmax=highest)
        for row, parent in enumerate(curves["matrix_parents"]):
            own = np.flatnonzero(np.array(curves["matrix_family"]) == parent)
            axis.add_patch(plt.Rectangle((own[0] - 0.5, row - 0.5), len(own), 1, fill=False,
                                         edgecolor="white", linewidth=0.8))
        axis.set_yticks(range(len(matrix)), curves["matrix_parents"], fontsize=6)
        axis.set_xticks(range(len(matrix[0])), curves["matrix_children"], fontsize=5, rotation=90)
        axis.set_xlabel("child (level 1)")
        axis.set_ylabel("parent (level 2)")
        axis.set_title(run.label, loc="left")
        axis.grid(False)
    figure.colorbar(image, ax=figure.axes, label="mutual information / entropy of the child",
                    shrink=0.8, pad=0.01)
    figure.supxlabel("Boxed: a parent's own children, up to three of each of the largest families.",
                     **NOTE)
    return figure


def draw_patching(axis, runs):
    """Draws what patching an absent parent in does to its top tokens' logits and its children,
    beside the same for a matched control."""
    rows = []
    for run in runs:
        for name, text in (("patched_rise", "top tokens' logits"),
                           ("patched_children", "children that fire")):
            rows.append(text if len(runs) == 1 else textwrap.fill(f"{run.label}: {text}", 30))
            own, control = (run.metrics.get(key, math.nan) for key in (name, f"{name}_rival"))
            axis.barh(len(rows) - 1.2, own, 0.36, color=run.color)
            axis.barh(len(rows) - 0.8, control, 0.36, color=run.color, alpha=0.35)
    axis.set_yticks(range(len(rows)), rows)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_title("an absent parent is patched in", loc="left")
    axis.set_xlabel("rise of the logits; share of the children\n(pale: a matched control)")


def fig_causal(runs):
    """Draws the effects of ablating and patching parents against those of matched controls."""
    runs = runs_with(runs, "tree")
    if not runs:
        return None
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(WIDTH, max(3, 1 + 0.5 * len(runs))), width_ratios=(1, 1.2))
    for run in runs:
        tree = run.curves[0]["tree"]
        left.plot([parent["cosine_rival"] for parent in tree],
                  [parent["cosine"] for parent in tree], run.marker, color=run.color,
                  markersize=4, alpha=0.8, markeredgewidth=0)
    low = min(left.get_xlim()[0], left.get_ylim()[0], -0.05)
    left.plot([low, 1], [low, 1], color=NOTE["color"], linewidth=0.6)
    left.set_xlabel("control matched in rate and size")
    left.set_ylabel("parent")
    left.set_title("ablation: cosine with the children's sum", loc="left")
    draw_patching(right, runs)
    legend(figure, runs, "each point: one parent", "", True)
    return figure


def draw_unit(axis, x, y, unit, color):
    """Draws a latent of a tree: a point, its number, and the passage on which it fires most."""
    passage = unit["passages"][0]
    before, token, after = (printable(text) for text in (
        passage["before"][-14:], passage["token"], passage["after"][:10]))
    axis.plot(x, y, "o", color=color, markersize=4)
    axis.text(x + 0.012, y, f"{unit['id']}  ", fontsize=6.5, va="center", weight="bold")
    axis.text(x + 0.075, y, f"{before}‹{token}›{after}", fontsize=6, va="center",
              family="monospace")


def fig_tree(runs):
    """Draws five parents of the last run with up to four children each and their passages."""
    runs = runs_with(runs, "tree")[-1:]
    if not runs:
        return None
    run, child_x = runs[0], 0.53
    parents = sorted(run.curves[0]["tree"], key=lambda parent: -parent["cosine"])[:5]
    families = [(parent, parent["children"][:4]) for parent in parents]
    height = sum(len(children) + 0.7 for _, children in families)
    figure, axis = plt.subplots(figsize=(WIDTH, 0.27 * height + 0.4))
    y = 0.0
    for parent, children in families:
        middle = y + (len(children) - 1) / 2
        draw_unit(axis, 0.0, middle, parent, run.color)
        for child in children:
            axis.plot([0.47, child_x], [middle, y], color=NOTE["color"], linewidth=0.8)
            draw_unit(axis, child_x, y, child, run.color)
            y += 1
        y += 0.7
    axis.set_xlim(-0.02, 1.03)
    axis.set_ylim(y - 0.7, -0.8)
    axis.axis("off")
    axis.set_title(f"{run.label}: parents (left), children, and their strongest passages, ‹firing "
                   "token›", loc="left", fontsize=7.5)
    return figure


# ---- Figures: ablations --------------------------------------------------------------------------
def ablations(runs):
    """Returns pairs (ablated run, the complete run whose constants differ in ABLATE alone)."""
    complete = [run for run in runs if "SAE_VARIANT" in run.config and not run.config.get("ABLATE")]
    pairs = []
    for run in (run for run in runs if run.config.get("ABLATE")):
        same = [other for other in complete
                if constants(other, "ABLATE", "SEEDS") == constants(run, "ABLATE", "SEEDS")]
        pairs += [(run, same[0])] if same else []
    return pairs


def draw_ablation(axis, row, pair, metric, sign):
    """Draws the difference of an ablated run from the complete one in a metric, times `sign`, and
    its interval, if the two can be paired."""
    if values := paired(*pair, metric):
        difference = paired_test(*values)
        axis.barh(row, sign * difference.mean, height=0.6, color=pair[0].color)
        ends = sign * difference.low, sign * difference.high
        axis.plot(ends, [row, row], color="black", linewidth=0.8)


def fig_ablations(runs):
    """Draws how metrics change where a part of a variant is switched off."""
    known = {"fvu": "explained_variance", "loss_increase_nats": "loss_increase_nats",
             "stability": "stability", "smoothness": "smoothness"}
    pairs = ablations(runs)
    metrics = [name for name in known if any(paired(*pair, name) for pair in pairs)]
    if not metrics:
        return None
    figure, axes = panels(len(metrics), 2, 0.6 + 0.3 * len(pairs), sharey=True)
    for axis, metric in zip(axes.flat, metrics):
        for row, pair in enumerate(pairs):
            draw_ablation(axis, row, pair, metric, sign=-1 if metric == "fvu" else 1)
        axis.axvline(0, color="black", linewidth=0.6)
        axis.set_title(TITLES[known[metric]], loc="left")
        one_row_per_run(axis, [run for run, _ in pairs])
        short_ticks(axis.xaxis, MaxNLocator(5))
    figure.supxlabel("Difference from the same variant with nothing switched off; lines: 95 % "
                     "intervals, paired over held-out sequences.", **NOTE)
    return figure


FIGURES = {"training_curves": fig_training, "headline_metrics": fig_headlines,
           "sparsity_fidelity": fig_sparsity_fidelity, "position": fig_position,
           "stability_fidelity": fig_stability_fidelity, "autocorrelation": fig_autocorrelation,
           "feature_evolution": fig_evolution, "similarity": fig_similarity,
           "parameters": functools.partial(fig_logged, kind="parameters"),
           "losses": functools.partial(fig_logged, kind="losses"),
           "variance_scaling": fig_variance_scaling,
           "unlearning": fig_unlearning, "clamped_passage": fig_clamped_passage,
           "sparse_probing": fig_sparse_probing, "recovery": fig_recovery, "dwell": fig_dwell,
           "compositions": fig_compositions, "reuse": fig_reuse,
           "level_information": fig_information, "causal_tracing": fig_causal,
           "level_tree": fig_tree, "ablations": fig_ablations, "latents": fig_latents}


def with_asterisks(runs):
    """Returns the runs, those that do not compare with the baseline marked in their labels."""
    return [run._replace(label=f"{run.label}\u00a0*") if run.caveat else run for run in runs]


def explain_asterisks(figure, runs):
    """Writes above a figure why the runs that it marks with an asterisk do not compare with the
    baseline."""
    shown = " ".join(" ".join(text.get_text().split()) for text in figure.findobj(Text))
    caveats = {}
    for run in runs:
        if run.caveat and " ".join(run.label.split()) in shown:
            caveats.setdefault(run.caveat, []).append(run.label[:-2])
    lines = [figure.get_suptitle()] * bool(figure.get_suptitle())
    for caveat, names in caveats.items():
        of = f"{', '.join(names)}: " if len(caveats) > 1 else ""
        lines += textwrap.wrap(f"* {of}other {caveat} than {baseline_of(runs).folder}", 130)
    if caveats:         # above: below there are legends, which would not make room
        figure.set_figheight(figure.get_figheight() + 0.12 * len(lines))
        figure.suptitle("\n".join(lines), x=0.01, ha="left", **NOTE)


def draw_figures(runs):
    """Writes every figure as a PNG; prints the error of each that fails, while it is drawn or
    saved, and returns their names. One that is not drawn now does not stay from an earlier time."""
    runs, failed = with_asterisks(runs), []
    for name, draw in FIGURES.items():
        path, figure = HERE / f"{name}.png", None
        try:
            figure = draw(runs)
            if figure is None:
                print(f"{path.name}: not drawn, no run holds what it shows")
            else:
                explain_asterisks(figure, runs)
                figure.savefig(path)
                print(path.name)
        except Exception:                               # the other figures are still drawn
            traceback.print_exc()
            print(f"{path.name}: skipped, it failed (see above)", file=sys.stderr)
            failed.append(name)
        if figure is None or name in failed:
            path.unlink(missing_ok=True)
        plt.close("all")
    return failed


def write_pages(runs):
    """Writes the page of each run; prints the error of each that cannot be written and returns
    their names."""
    failed = []
    for run in runs:
        try:
            write_page(HERE / run.folder, run.label, run.config, run.metrics)
        except OSError as error:
            failed.append(f"{run.folder}/features.html")
            print(f"{failed[-1]}: not written: {error}", file=sys.stderr)
    return failed


def refuse_read_only():
    """Ends with a message where no file can be written beside this one."""
    try:
        tempfile.TemporaryFile(dir=HERE).close()
    except OSError as error:
        sys.exit(f"plot.py: figures and comparison.md cannot be written into {HERE} "
                 f"({error.strerror}). Copy the folder to where you may write, and run it there.")


def what_to_open(runs):
    """Returns the files to look at first: the newest run's page, the tests, the headlines."""
    newest = max(runs, key=lambda run: (HERE / run.folder / "final_info.json").stat().st_mtime)
    names = f"{newest.folder}/features.html", "comparison.md", "headline_metrics.png"
    return [name for name in names if (HERE / name).exists()]


def main():
    """Draws all figures and writes all pages and comparison.md; exits with an error if there is no
    run, or a figure or a page failed."""
    plt.rcParams.update(STYLE)
    refuse_read_only()
    runs = load_runs()
    if not runs:
        sys.exit(f"plot.py: nothing to draw: none of {', '.join(labels) or 'the folders run_*'} "
                 f"in {HERE} is a complete run. Finish one with `python experiment.py "
                 "--out_dir=run_1`, or name others in labels.")
    print("runs:", ", ".join(f"{run.folder} ({run.label})" for run in runs))
    if len(runs) > MOST_RUNS:
        print(f"Figures show the first {MOST_RUNS} of {len(runs)} runs, as many as colours and "
              "markers tell apart; name others in labels.")
    failed = draw_figures(runs[:MOST_RUNS]) + write_pages(runs)
    text = f"{comparison_text(runs)}\n\n{ratings_text(runs)}"
    (HERE / "comparison.md").write_text(text + "\n", encoding="utf-8")
    print(f"comparison.md:\n\n{text}\n")
    print("Open first:", ", ".join(what_to_open(runs)))
    if failed:
        sys.exit(f"plot.py: these failed, see above: {', '.join(failed)}")


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
