"""Figures and significance tests that compare runs.

    python plot.py

reads run_i/final_info.json of the runs named in `labels` and writes, beside this file, one PNG per
figure and comparison.md (tests of each run against the baseline), and run_i/features.html, a page
to look at latents and to rate them. To add a figure: write a function that takes the runs and
returns a matplotlib figure (None: no run has what it shows), and name it in FIGURES.
"""
import functools
import hashlib
import json
import math
import re
import sys
import textwrap
import traceback
from collections import ChainMap
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.font_manager import findfont, get_font
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
COLORS = ("#777777", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#882255",
          "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
NOTE = {"fontsize": 6.5, "color": "#555555"}        # what belongs to no run: targets, controls
WIDTH = 6.5             # inches, the text width of a paper
STYLE = {
    "figure.constrained_layout.use": True, "savefig.dpi": 200, "font.size": 8,
    "axes.labelsize": 8, "axes.titlesize": 8, "figure.labelsize": 8, "xtick.labelsize": 7,
    "ytick.labelsize": 7, "legend.fontsize": 7.5, "legend.frameon": False,
    "legend.title_fontsize": 6.5, "axes.spines.top": False, "axes.spines.right": False,
    "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6,
    "xtick.minor.size": 0, "ytick.minor.size": 0, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": "#e6e6e6", "grid.linewidth": 0.5, "lines.linewidth": 1.3,
    "lines.markersize": 3.5,
}
# How known metrics are named in figures, and where better lies; others go under their own name.
TITLES = {
    "final_train_loss": "training loss (last) ↓", "total_train_time": "training time (s) ↓",
    "best_val_loss": "validation loss (best) ↓", "l0": "L0 (latents per token)",
    "explained_variance": "explained variance ↑", "loss_increase_nats": "loss increase (nats) ↓",
    "dead_fraction": "dead latents (fraction) ↓", "ce_recovered": "CE recovered (unigram) ↑",
    "avg_inference_tokens_per_second": "encoding speed (tokens/s) ↑",
    "stability": "stability ↑", "smoothness": "smoothness ↓", "coherence": "coherence ↑",
    "causal_specificity": "causal specificity ↑",
}
SEEDS_NOTE = "lines: mean over seeds; bands: range of the seeds"


def short(value, _=None):
    """Three significant digits, no exponent for thousands; also the format of ticks."""
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def panels(n, columns, height, **kwargs):
    """A figure of n panels of that height (inches), at most `columns` in a row, and its axes."""
    rows = math.ceil(n / min(columns, n))
    figure, axes = plt.subplots(rows, min(columns, n), squeeze=False,
                                figsize=(WIDTH, rows * height + 0.3), **kwargs)
    for axis in axes.flat[n:]:
        axis.remove()
    return figure, axes


def seed_values(run, name):
    """A curve of each seed [seeds, ...], NaN for None; of length 0 where the run has none."""
    return np.array([seed[name] for seed in run.curves if seed.get(name)], dtype=float)


def draw_band(axis, run, x, values, every=1, line="-"):
    """Mean over the seeds of values [seeds, x] as a line, their range as a band."""
    axis.plot(x, values.mean(0), line, color=run.color, marker=run.marker, markevery=every)
    if len(values) > 1:
        axis.fill_between(x, values.min(0), values.max(0), color=run.color, alpha=0.25, linewidth=0)


def legend(figure, runs, note, line="-", several=False):
    """One legend for all panels, below them; the note, of what several seeds look like, stands
    where there are several."""
    handles = [plt.Line2D([], [], color=r.color, marker=r.marker, linestyle=line) for r in runs]
    several = several or any(len(run.curves) > 1 for run in runs)
    columns = 125 // (10 + max(len(run.label) for run in runs))     # as many as fit the width
    columns = max(1, min(4, columns, len(runs)))
    figure.set_figheight(figure.get_figheight() + 0.16 * ((len(runs) - 1) // columns))
    figure.legend(handles, [run.label for run in runs], loc="outside lower center",
                  ncols=columns, title=note if several else None)


# ---- Tests between runs --------------------------------------------------------------------------
def sequences(run, metric):
    """A metric of each held-out sequence [seeds, sequences], NaN for None; None where the run has
    no such metric."""
    rows = [seed.get(metric) or () for seed in run.per_sequence]
    same = rows and len(rows[0]) > 0 and all(len(row) == len(rows[0]) for row in rows)
    return np.array(rows, dtype=float) if same else None


def paired(run, other, metric):
    """The metric of two runs at the sequences where all their seeds have it, or None."""
    mine, theirs = sequences(run, metric), sequences(other, metric)
    if mine is None or theirs is None or mine.shape[1] != theirs.shape[1]:
        return None
    both = np.isfinite(mine).all(0) & np.isfinite(theirs).all(0)
    return (mine[:, both], theirs[:, both]) if both.any() else None


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
        for metric in ChainMap(*run.per_sequence[:1], *baseline.per_sequence[:1]):
            if pair := paired(run, baseline, metric):
                rows.append((run, metric, *pair, *paired_test(*pair)))
            else:
                notes.append(f"{run.folder} was not tested on {metric}: other sequences, or none.")
    return baseline, rows, notes


def markdown(table):
    """Lines of a table whose first row is its head."""
    widths = [max(map(len, column)) for column in zip(*table)]
    rows = [table[0], ["-" * width for width in widths], *table[1:]]
    return ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |" for row in rows]


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
    text = [f"# Runs against {baseline.folder}: {baseline.label}", "", *markdown(table)]
    text += ["", textwrap.fill(
        "Difference = run - baseline, paired over the held-out sequences (one a file) that both "
        "have. p: "
        f"permutation test ({RESAMPLES:,} sign flips) of the files' differences, seeds averaged "
        "first. Interval: bootstrap over files, and over seeds where there are several. q: p after "
        "Benjamini-Hochberg over all rows.", 100, break_on_hyphens=False)]
    return "\n".join((text if rows else text[:2] + ["Nothing was tested."]) + [""] + notes)


# ---- Pages of latents, and what people say of these ----------------------------------------------
TEMPLATE = HERE / "assets" / "features.html"
MOST_BYTES = 3_000_000          # of a page
RATINGS = "temporal-sae-runner/ratings/1"
SCORES = {"no": 0.0, "partly": 0.5, "yes": 1.0}


@functools.cache
def load_features(folder):
    """What run_i/features.json holds, and the hash by which ratings name it; None without one."""
    try:
        content = (HERE / folder / "features.json").read_bytes()
        return json.loads(content) | {"hash": hashlib.sha256(content).hexdigest()[:16]}
    except OSError:
        return None
    except ValueError as error:
        print(f"{folder}: its features.json cannot be used: {error}")


def to_rate(features):
    """The part of a run's latents that rating needs."""
    keys = ("latent", "max", "promoted", "question")
    passages = ({"top": entry["passages"]["top"][:6], "stratified": [
        band[:1] for band in entry["passages"]["stratified"]]} for entry in features["latents"])
    latents = [{key: entry[key] for key in keys if key in entry} | {"passages": part}
               for entry, part in zip(features["latents"], passages)]
    return features | {"latents": latents}


def page(run, template):
    """features.html of a run, run_0's latents mixed into what is to be rated; None: no data."""
    features, other = load_features(run.folder), load_features("run_0")
    if features is None:
        return None
    known = {"explained_variance": "explained variance", "l0": "L0", "loss_increase_nats": "nats"}
    about = [f"{run.folder}, {run.config.get('MODEL_NAME', 'model')}, after block "
             f"{run.config.get('layer')}"]
    about += [f"{text} {run.metrics[key]:.3g}" for key, text in known.items() if key in run.metrics]
    data = {"run": run.folder, "label": run.label, "about": ", ".join(about),
            "hash": features["hash"], "length": run.config.get("CONTEXT_LENGTH", 1) - 1,
            "features": features}
    if other and run.folder != "run_0":
        data["baseline"] = {"run": "run_0", "hash": other["hash"], "features": to_rate(other)}
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return template.replace("{{DATA}}", text)


def write_pages(runs):
    """run_i/features.html of each run that left the data for it."""
    template = TEMPLATE.read_text(encoding="utf-8") if TEMPLATE.exists() else None
    for run in runs:
        name, text = f"{run.folder}/features.html", template and page(run, template)
        if not text:
            print(f"{name}: not written, there is no "
                  + (f"{run.folder}/features.json" if template else "assets/features.html"))
        elif len(text.encode()) > MOST_BYTES:
            print(f"{name}: not written, it would be larger than {MOST_BYTES / 1e6:g} MB")
        else:
            (HERE / name).write_text(text, encoding="utf-8")
            print(f"{name}: {len(text.encode()) / 1e6:.2f} MB")


def check_ratings(found, folder):
    """Raises ValueError with the reason why a file's content is no ratings of the run `folder`."""
    if not isinstance(found, dict) or found.get("schema") != RATINGS:
        raise ValueError(f"its schema is not {RATINGS}")
    hashes, answers = found.get("hashes"), found.get("answers")
    if found.get("run") != folder or not isinstance(hashes, dict) or folder not in hashes:
        raise ValueError(f"it rates {found.get('run')!r}")
    if not isinstance(found.get("rater_id"), str) or not isinstance(answers, list):
        raise ValueError("it has no rater_id or no list of answers")
    for name, value in hashes.items():
        if set(hashes) - {folder, "run_0"} or value != (load_features(name) or {}).get("hash"):
            raise ValueError(f"it rates other latents of {name} than {name}/features.json has")
    known = {(name, entry["latent"]): len(entry.get("question", {}).get("passages", ()))
             for name in hashes for entry in load_features(name)["latents"]}
    for row in answers:
        n = known.get((row.get("run"), row.get("latent"))) if isinstance(row, dict) else None
        if n is None or row.get("score") not in (*SCORES, None) or not (
                row.get("choice") is None or type(row["choice"]) is int and 0 <= row["choice"] < n):
            raise ValueError(f"{str(row)[:80]} is no answer to its page")


@functools.cache
def load_ratings(folders):
    """{run: {"score" or "right": {latent: {rater: value}}}} of all files that pass; says which do
    not, and why."""
    found = {}
    for path in [path for folder in folders
                 for path in sorted((HERE / folder).glob("human_ratings*.json"))]:
        name = f"{path.parent.name}/{path.name}"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            check_ratings(content, path.parent.name)
        except (OSError, ValueError, TypeError) as error:
            print(f"{name}: skipped, {error}")
            continue
        for row in content["answers"]:
            entry = next(entry for entry in load_features(row["run"])["latents"]
                         if entry["latent"] == row["latent"])
            values = {"score": SCORES.get(row.get("score"))}
            if row.get("choice") is not None:
                values["right"] = float(row["choice"] == entry["question"]["answer"])
            for key, value in values.items():
                if value is not None:
                    of_run = found.setdefault(row["run"], {}).setdefault(key, {})
                    of_run.setdefault(row["latent"], {})[content["rater_id"]] = value
        print(f"{name}: {len(content['answers'])} latents rated")
    return found


def by_latent(answers, key):
    """Mean over raters of each latent that was rated, and the ends of the 95 % bootstrap interval
    of the mean over latents; None where none was."""
    values = np.array([np.mean([*raters.values()]) for raters in answers.get(key, {}).values()])
    if not len(values):
        return None
    draws = np.random.default_rng(0).choice(values, (RESAMPLES, len(values))).mean(1)
    return values, *np.percentile(draws, (2.5, 97.5))


def agreement(answers):
    """Krippendorff's alpha of the scores, ordinal; None where no two people rated one latent, or
    all say the same."""
    scores = answers.get("score", {})
    raters = sorted({rater for row in scores.values() for rater in row})
    table = np.array([[row.get(rater, np.nan) for row in scores.values()] for rater in raters])
    both = np.isfinite(table).sum(0) > 1 if len(raters) > 1 else np.zeros(0, dtype=bool)
    if not both.any() or len(np.unique(table[:, both][np.isfinite(table[:, both])])) < 2:
        return None
    import krippendorff         # here, so that figures need it only where people have rated
    return krippendorff.alpha(reliability_data=table, level_of_measurement="ordinal")


def unpaired_test(values, baseline):
    """(difference of means, the ends of its 95 % bootstrap interval, p) of two sets of latents; p:
    permutations of the latents between the two."""
    rng, both, n = np.random.default_rng(0), np.append(values, baseline), len(values)
    draws = (rng.choice(values, (RESAMPLES, n)).mean(1)
             - rng.choice(baseline, (RESAMPLES, len(baseline))).mean(1))
    order = rng.permuted(np.tile(both, (RESAMPLES, 1)), axis=1)
    difference = values.mean() - baseline.mean()
    shuffled = order[:, :n].mean(1) - order[:, n:].mean(1)
    p = (1 + (np.abs(shuffled) >= abs(difference) - 1e-9).sum()) / (1 + RESAMPLES)
    return difference, *np.percentile(draws, (2.5, 97.5)), p


def latents_table(runs):
    """How well latents are understood, by people and by their own contexts, as Markdown."""
    ratings, baseline = load_ratings(tuple(run.folder for run in runs)), runs[0].folder
    baseline = "run_0" if "run_0" in ratings else baseline
    table = [["run", "raters", "latents", "interpretable (0 to 1)", "against baseline",
              "alpha", "detection by people", "against baseline", "automatic", "like tokens",
              "null", "control", "control, like tokens"]]
    for run in runs:
        answers, parts = ratings.get(run.folder, {}), []
        for key in ("score", "right"):
            mine, theirs = by_latent(answers, key), by_latent(ratings.get(baseline, {}), key)
            parts += [f"{mine[0].mean():.3f} [{mine[1]:.3f}, {mine[2]:.3f}]" if mine else ""]
            parts += ["{:+.3f} [{:+.3f}, {:+.3f}], p {:.4f}".format(*unpaired_test(
                mine[0], theirs[0])) if mine and theirs and run.folder != baseline else ""]
        scores, alpha = answers.get("score", {}), agreement(answers)
        raters = {rater for row in scores.values() for rater in row}
        machine = [f"{run.metrics[name]:.3f}" if name in run.metrics else "" for name in (
            "detection", "detection_same_token", "detection_null", "detection_reinitialised",
            "detection_same_token_reinitialised")]
        table.append([f"{run.folder}: {run.label}", str(len(raters)), str(len(scores)), *parts[:2],
                      "" if alpha is None else f"{alpha:.3f}", *parts[2:], *machine])
    notes = (f"Means over latents with 95 % bootstrap intervals; baseline: {baseline}; p: "
             f"{RESAMPLES:,} permutations of latents between runs. Alpha: Krippendorff's, ordinal. "
             "Detection: on which of five passages does the latent fire (chance .2)? Automatic: "
             "told by the contexts of its strongest firings in other files; like tokens: the other "
             "four hold the token on which it fires; null: told by random contexts; control: as "
             "automatic, of an untrained TopK on the same model with random weights.")
    how = ("Nobody has rated these latents. Open run_i/features.html in a browser, press Rate, "
           "export the answers into run_i/ as human_ratings_NAME.json, and run plot.py again.")
    text = ["## How well latents are understood", "", *markdown(table), "",
            textwrap.fill(notes, 100, break_on_hyphens=False)]
    return "\n".join(text if ratings else text + ["", textwrap.fill(how, 100)])


# ---- Figures -------------------------------------------------------------------------------------
def training_curve(run, x_name, y_name):
    """(steps, values [seeds, steps]) of a quantity in the training log, or None."""
    logs = [seed["training"] for seed in run.curves if "training" in seed]
    values = [(log.get("parameters", {}) | log | log.get("losses", {})).get(y_name) for log in logs]
    pairs = [(log[x_name], np.array([None] * (len(log[x_name]) - len(y)) + y, float))
             for log, y in zip(logs, values) if y]              # NaN where a stage has no such loss
    if not pairs:
        return None
    steps = min((x for x, _ in pairs), key=lambda x: x[-1])     # seeds may differ in their steps
    rows = np.array([y if x == steps else np.interp(steps, x, y) for x, y in pairs])
    known = np.flatnonzero(~np.isnan(rows).all(0))
    return steps[known[0]:known[-1] + 1], rows[:, known[0]:known[-1] + 1]


def draw_stages(axes, runs):
    """Vertical lines where stages begin, their names above the top panels; one row a curriculum."""
    plans = {}
    for run in runs:
        log = run.curves[0].get("training", {})
        starts = log.get("stage_starts", [])
        if len(starts) > 1:
            plans.setdefault((*zip(starts, log.get("stages", starts)),), []).append(run)
    first = [(axis, axis.dataLim.x0, axis.get_xlim()[0]) for axis in axes.flat]
    for row, (plan, sharing) in enumerate(plans.items()):
        color = sharing[0].color if len(sharing) == 1 else NOTE["color"]
        ends = [*(start for start, _ in plan[1:]), np.inf]
        for axis, begins, left in first:
            for i, ((start, name), end) in enumerate(zip(plan, ends)):
                if i and start > left:
                    axis.axvline(start, color=color, linewidth=0.7, linestyle=(0, (4, 2)), zorder=0)
                if end > begins and axis in axes[0]:
                    at = max(start, left), 1
                    axis.annotate(str(name).replace("_", " "), at, (2, 2 + 20 * row), rotation=25,
                                  xycoords=("data", "axes fraction"), textcoords="offset points",
                                  rotation_mode="anchor", fontsize=6, color=color)


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
    legend(figure, runs, SEEDS_NOTE)
    return figure


def error_bar(run, entry, metric):
    """[below, above] of a headline and whether it is the standard error over seeds; with one seed a
    95 % bootstrap interval over held-out sequences; None where neither exists."""
    error = entry.get("stderrs", {}).get(f"{metric}_stderr")
    if error is not None:
        return [error, error], True
    name = "fvu" if metric == "explained_variance" else metric
    if (pair := paired(run, run, name)) is None:
        return None, False
    values, rng = pair[0], np.random.default_rng(0)
    draws = resampled(values, rng.integers(values.shape[1], size=(RESAMPLES, values.shape[1])), rng)
    low, high = np.percentile(draws, (2.5, 97.5)) - values.mean()
    ends = [max(-low, 0.0), max(high, 0.0)]
    return (ends if name == metric else ends[::-1]), False


def draw_bars(axis, runs, evaluation, metric):
    """One horizontal bar a run, its value printed beside it."""
    ends = [0.0]
    for row, run in enumerate(runs):
        entry = run.entries.get(evaluation, {"means": {}})
        value = entry["means"].get(f"{metric}_mean", entry.get("metrics", {}).get(metric))
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
    main_evaluation, legends = next(iter(names))[0], [textwrap.fill(run.label, 28) for run in runs]
    bar = 0.04 + 0.11 * max(text.count("\n") + 1 for text in legends)           # inches
    figure, axes = panels(len(names), 3, 0.6 + bar * len(runs), sharey=True)
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


def draw_point(axis, run, x, y):
    """A run in the plane of two metrics, where it has both."""
    if x in run.metrics and y in run.metrics:
        axis.errorbar(run.metrics[x], run.metrics[y], xerr=run.errors.get(x),
                      yerr=run.errors.get(y), color=run.color, marker=run.marker,
                      markersize=6, markeredgecolor="white", markeredgewidth=0.4)
    axis.margins(0.1, 0.12)
    axis.set_xlabel(TITLES.get(x, x.replace("_", " ")))
    axis.set_ylabel(TITLES.get(y, y.replace("_", " ")))


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
            draw_point(axis, run, "l0", metric)
        l0 = [run.metrics["l0"] for run in runs]
        axis.set_xlim(0.94 * min(l0), 1.06 * max(l0))
        axis.xaxis.set_major_locator(MaxNLocator(6))
        draw_references(axis, references)
    legend(figure, runs, "error bars: standard error over seeds", line="")
    return figure


def by_position(run, name):
    """(positions, values [seeds, bins]) of a curve, averaged in bins of about half an octave."""
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
    """Explained variance and loss increase along the context."""
    names = {"explained_variance_by_position": "explained variance ↑",
             "loss_increase_by_position": "loss increase (nats) ↓"}
    runs = [run for run in runs if any(seed.get(name) for seed in run.curves for name in names)]
    if not runs:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 2.8))
    for axis, (name, text) in zip(axes, names.items()):
        for run in runs:
            if found := by_position(run, name):
                draw_band(axis, run, *found)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(FuncFormatter(short))
        axis.set_xlabel("position in the context (tokens, binned)")
        axis.set_ylabel(text)
    legend(figure, runs, SEEDS_NOTE)
    return figure


def fig_stability_fidelity(runs):
    """What stability costs in reconstruction: up and right is better."""
    runs = [run for run in runs if {"stability", "explained_variance"} <= run.metrics.keys()]
    if not runs:
        return None
    figure, axis = plt.subplots(figsize=(WIDTH, 3))
    for run in runs:
        draw_point(axis, run, "explained_variance", "stability")
    legend(figure, runs, "error bars: standard error over seeds", line="")
    return figure


def fig_autocorrelation(runs):
    """How long latents stay active, and stability beside what chance and tokens alone give."""
    runs = [run for run in runs
            if len(seed_values(run, "autocorrelation")) or "stability" in run.metrics]
    if not runs:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3))
    lags = next((run.config["STABILITY_LAGS"] for run in runs if "STABILITY_LAGS" in run.config),
                (5, 16))
    left.axvspan(*lags, color="#eeeeee", zorder=0)
    for row, run in enumerate(runs):
        if len(values := seed_values(run, "autocorrelation")):
            draw_band(left, run, np.arange(1, values.shape[1] + 1), values, every=4)
        if len(null := seed_values(run, "stability_null")):
            low, high = np.nanpercentile(null, (2.5, 97.5))
            right.plot([low, high], [row, row], color="#bbbbbb", linewidth=7,
                       solid_capstyle="butt", label="permuted positions (95 %)")
        if "stability_token" in run.metrics:
            right.plot(run.metrics["stability_token"], row, "k|", markersize=8,
                       label="from tokens alone")
        if "stability" in run.metrics:
            right.plot(run.metrics["stability"], row, color=run.color, marker=run.marker,
                       markersize=5)
    left.set_title(f"shaded: lags {lags[0]}-{lags[1]} make stability", loc="right", **NOTE)
    left.set_xlabel("lag (tokens)")
    left.set_ylabel("autocorrelation (energy-weighted)")
    if left.dataLim.y0 > 0:
        left.set_yscale("log")
        left.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    right.set_xscale("symlog", linthresh=1e-3)
    for axis in (left.yaxis, right.xaxis):
        axis.set_major_formatter(FuncFormatter(short))
        axis.set_minor_formatter(NullFormatter())
    right.set_xlabel(f"{TITLES['stability']} (logarithmic beyond 0.001)")
    right.set_ylim(len(runs) - 0.5, -0.5)
    right.set_yticks([])
    named = dict(zip(*right.get_legend_handles_labels()[::-1]))
    right.legend(named.values(), named, loc="lower right", bbox_to_anchor=(1, 1), ncols=2,
                 fontsize=6.5, columnspacing=1)
    legend(figure, runs, SEEDS_NOTE)
    return figure


GLYPHS = get_font(findfont("DejaVu Sans"))


def visible(token):
    """A token as a label: white space marked, what the font lacks boxed."""
    token = token.replace(" ", "␣").replace("\n", "↵").replace("\t", "→")
    token = "".join(c if GLYPHS.get_char_index(ord(c)) else "□" for c in token)
    return token if len(token) < 11 else f"{token[:9]}…"


def shown(text):
    """The same for a passage, unshortened."""
    return "".join(visible(c) if c != " " else c for c in text)


def fig_evolution(runs):
    """Latents along a held-out passage, each over its maximum there, in the last two runs."""
    needed = {"tokens", "latents", "values"}
    runs = [run for run in runs
            if run.curves and needed <= (run.curves[0].get("evolution") or {}).keys()][-2:]
    if not runs:
        return None
    figure, axes = panels(len(runs), 1, 2.2)
    for axis, run in zip(axes.flat, runs):
        found = run.curves[0]["evolution"]
        values = np.nan_to_num(np.array(found["values"], dtype=float))[:, -64:]
        tokens = [visible(token) for token in found["tokens"][-64:]]
        values /= np.maximum(values.max(1, keepdims=True), 1e-9)
        image = axis.imshow(values, aspect="auto", cmap="Blues", vmin=0, vmax=1)
        axis.set_title(run.label, loc="left")
        axis.set_ylabel("latent")
        axis.set_yticks(range(len(values)), found["latents"], fontsize=5)
        axis.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=5.5, parse_math=False)
        axis.grid(False)
        axis.tick_params(length=0, pad=1)
    figure.colorbar(image, ax=axes, label="value / maximum here", shrink=0.7, pad=0.01)
    return figure


def fig_similarity(runs):
    """How alike the latents of two positions of a window are, beyond those of other windows."""
    found = [(run, seed_values(run, "similarity_matrix")) for run in runs]
    found = [(run, values.mean(0)) for run, values in found if len(values)]
    if not found:
        return None
    titles = [textwrap.fill(run.label, 20) for run, _ in found]
    height = max(1.3, min(2.4, 4.8 / len(found))) + 0.12 * max(t.count("\n") for t in titles)
    figure, axes = panels(len(found), 4, 0.5 + height, sharey=True)
    apart = np.concatenate([m[~np.eye(len(m), dtype=bool)] for _, m in found])
    low, high = np.nanpercentile(apart, (0.5, 99.5))
    for axis, (_, matrix), title in zip(axes.flat, found, titles):
        n = 2 * len(matrix)
        image = axis.imshow(matrix, cmap="cividis", vmin=min(low, 0), vmax=high,
                            extent=(0, n, n, 0))
        axis.set_title(title, loc="left", fontsize=7)
        axis.set_xlabel("position s")
        axis.grid(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("position t")
    figure.colorbar(image, ax=figure.axes, label="cosine, less that\nbetween windows",
                    extend="max", aspect=25, pad=0.01)
    return figure


def fig_logged(runs, kind):
    """What training logged over its steps: "parameters" of interest, or the "losses" by name but
    for the reconstruction, each without its weight; dotted where no stage of the run weighs it."""
    logs = {run.folder: [name for name in run.curves[0].get("training", {}).get(kind) or ()
                         if name != "reconstruction"] for run in runs if run.curves}
    runs = [run for run in runs if logs.get(run.folder)]
    if not runs:
        return None
    names = list(dict.fromkeys(name for run in runs for name in logs[run.folder]))
    figure, axes = panels(len(names), 2, 1.9)
    for axis, name in zip(axes.flat, names):
        drawn = [run for run in runs if name in logs[run.folder]]
        watched = [run for run in drawn if kind == "losses"
                   and name not in run.curves[0]["training"].get("weighed", names)]
        for run in drawn:
            if found := training_curve(run, "step", name):
                draw_band(axis, run, *found, every=math.ceil(len(found[0]) / 6),
                          line=":" if run in watched else "-")
        draw_stages(np.array([[axis]]), drawn)
        axis.set_ylabel(name.replace("_", " ") + "\n(dotted: not trained on)" * bool(watched))
        axis.set_xlabel("training step")
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.xaxis.set_major_formatter(FuncFormatter(short))
    legend(figure, runs, SEEDS_NOTE)
    return figure


def fig_variance_scaling(runs):
    """Variances of the latents before and after scaling, and the decays that follow."""
    parts = {"variance": "log10 variance", "scaled_variance": "log10 scaled variance",
             "decay": "decay per token"}
    runs = [run for run in runs if any(len(seed_values(run, name)) for name in parts)]
    if not runs:
        return None
    figure, axes = panels(3, 3, 2.3)
    for axis, (name, text) in zip(axes.flat, parts.items()):
        found = [seed_values(run, name).ravel() for run in runs]
        if name != "decay":
            found = [np.log10(np.maximum(values, 1e-9)) for values in found]
        found = [values[np.isfinite(values)] for values in found]
        bins = np.histogram_bin_edges(np.concatenate(found), 40)
        for run, values in zip(runs, found):
            axis.hist(values, bins, weights=np.full(len(values), 1 / max(len(values), 1)),
                      histtype="step", color=run.color, linewidth=1.2)
        axis.set_xlabel(text)
    axes[0, 0].set_ylabel("share of the latents")
    legend(figure, runs, None)
    return figure


LINES = {"standard": ":", "pattern": "--", "hybrid": "-"}    # strategies of unlearning
CONTROLS = {"random_latents": "x", "random_directions": "+", "projection": "1"}


def oracle(run):
    """What the model loses on the run's FORGET where it is retrained without it, if measured."""
    path = HERE / "bench" / "results" / "oracle.json"
    found = json.loads(path.read_text()) if path.exists() else {"forget": None}
    same = found["forget"] and found["forget"] == run.config.get("FORGET")
    return [found["increase"]["forget"]] if same else []


def fig_unlearning(runs):
    """What forgetting costs elsewhere, by strategy, and how well the forgotten domain is told."""
    runs = [run for run in runs if run.curves and "frontier" in run.curves[0]]
    if not runs:
        return None
    looser = {name for run in runs for name in run.curves[0]["frontier"]} - {*LINES, *CONTROLS}
    figure, axes = plt.subplots(1, 3, figsize=(WIDTH, 2.7))
    for run in runs:
        for axis, group in zip(axes, ("neighbours", "retain")):
            for strategy, rows in run.curves[0]["frontier"].items():
                points = sorted((row["forget"], row[group]) for row in rows if group in row)
                pale = strategy in looser
                if points:
                    axis.plot(*zip(*points), color=run.color, alpha=0.4 if pale else 1,
                              linestyle=LINES.get(strategy.partition("_")[0], ""),
                              marker=None if pale else CONTROLS.get(strategy, run.marker))
        for strategy, tpr in run.curves[0]["roc"].items():
            axes[2].plot(np.linspace(0, 1, len(tpr)), tpr, LINES[strategy], color=run.color)
    for axis, group in zip(axes, ("neighbours", "retain")):
        axis.set_xlabel("loss gained on FORGET (nats)")
        axis.set_ylabel(f"on {group} (nats)")
        axis.set_xlim(left=0)
        axis.set_yscale("symlog", linthresh=0.01)
        axis.set_ylim(-0.003, max(0.01, 1.5 * axis.dataLim.y1))
        axis.yaxis.set_major_formatter(FuncFormatter(short))
        for nats in (runs[-1].config["FORGETTING"], *oracle(runs[-1])):
            axis.axvline(nats, color=NOTE["color"], linewidth=0.8, ls=":")
    axes[2].plot([0, 1], [0, 1], color=NOTE["color"], linewidth=0.6)
    axes[2].set_xlabel("false positives")
    axes[2].set_ylabel("true positives")
    axes[2].set_title("windows (--), sequences (-)", loc="right", **NOTE)
    kinds = {name: (line, "") for name, line in LINES.items()}
    kinds |= {name.replace("_", " "): ("", mark) for name, mark in CONTROLS.items()}
    axes[2].legend([plt.Line2D([], [], color="black", linestyle=line, marker=mark)
                    for line, mark in kinds.values()], kinds, fontsize=6, loc="lower right")
    note = "dotted: where strategies are compared" + ", and the model retrained without it" * bool(
        oracle(runs[-1]))
    rates = sorted({name.partition("_")[2] for name in looser})
    note += f"; paler: {' and '.join(rates)} false positives" * bool(rates)
    legend(figure, runs, f"{note}; logarithmic beyond 0.01 nats", several=True)
    return figure


def fig_clamped_passage(runs):
    """A held-out passage of FORGET: the matcher, the gate, and where latents are clamped."""
    runs = [run for run in runs if run.curves and run.curves[0].get("passage")][-2:]
    if not runs:
        return None
    figure, axes = panels(len(runs), 1, 1.9)
    for axis, run in zip(axes.flat, runs):
        found = {name: values[-64:] for name, values in run.curves[0]["passage"].items()}
        at = np.arange(len(found["tokens"]))
        axis.bar(at, found["match"], color=run.color, alpha=0.35, label="match")
        axis.step(at, found["gate"], where="mid", color="black", linewidth=0.9, label="gate")
        if "threshold" in found:
            axis.plot(at, found["threshold"], ":", color="black", linewidth=0.9, label="opens at")
        for name, height, mark in (("standard", 1.04, "|"), ("hybrid", 1.12, "v")):
            clamped = at[np.array(found[name], dtype=bool)]
            axis.plot(clamped, np.full(len(clamped), height), mark, color=run.color, markersize=4,
                      label=f"clamped, {name}")
        axis.set_ylim(0, 1.18)
        axis.set_xlim(-0.6, len(at) - 0.4)
        axis.set_title(run.label, loc="left")
        tokens = [visible(token) for token in found["tokens"]]
        axis.set_xticks(at, tokens, rotation=90, fontsize=5.5, parse_math=False)
        axis.grid(False)
        axis.tick_params(length=0, pad=1)
    axes[0, 0].legend(fontsize=6, ncols=5, loc="lower right", bbox_to_anchor=(1, 1))
    return figure


def fig_sparse_probing(runs):
    """Accuracy of probes on the k best latents, beside the model's channels and tokens."""
    runs = [run for run in runs if run.curves and "sparse_probing" in run.curves[0]]
    if not runs:
        return None
    figure, axis = plt.subplots(figsize=(WIDTH, 3))
    for run in runs:
        found = run.curves[0]["sparse_probing"]
        values = np.array([curves["sparse_probing"]["sae"] for curves in run.curves])
        draw_band(axis, run, found["k"], values[:, :len(found["k"])])
    baselines = {"channels": ("model's channels", "-"), "untrained": ("untrained SAE", "--"),
                 "tokens": ("counts of tokens", ":")}
    for name, (text, line) in baselines.items():
        values = found[name][:len(found["k"])]          # without the probe on all features
        axis.plot(found["k"], values, line, color=NOTE["color"], linewidth=1)
        axis.annotate(text, (found["k"][-1], values[-1]), (4, 0), textcoords="offset points",
                      va="center", **NOTE)
    axis.set_xscale("log")
    axis.set_xticks(found["k"], found["k"])
    axis.set_xlim(right=2 * found["k"][-1])
    axis.set_xlabel("features that the probe sees")
    axis.set_ylabel("test accuracy ↑")
    legend(figure, runs, SEEDS_NOTE)
    return figure


def fig_latents(runs):
    """What people say of latents, and how well passages on which they fire are told from others."""
    ratings = load_ratings(tuple(run.folder for run in runs))
    runs = [run for run in runs if run.folder in ratings or "detection" in run.metrics]
    if not runs:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 1.1 + 0.3 * len(runs)), sharey=True)
    for row, run in enumerate(runs):
        for axis, key, mark in ((left, "score", run.marker), (right, "right", "*")):
            found = by_latent(ratings.get(run.folder, {}), key)
            if found:
                axis.errorbar(found[0].mean(), row, color=run.color, marker=mark, markersize=6,
                              xerr=[[found[0].mean() - found[1]], [found[2] - found[0].mean()]],
                              label="people (95 % interval)", linestyle="")
            elif axis is left:
                axis.annotate("not rated", (0.02, row), va="center", **NOTE)
        for name, mark, text in (("detection", run.marker, "own contexts"),
                                 ("detection_same_token", "|", "among like tokens"),
                                 ("detection_null", "x", "random contexts"),
                                 ("detection_reinitialised", "2", "nothing trained")):
            if name in run.metrics:
                right.plot(run.metrics[name], row, color=run.color, marker=mark, linestyle="",
                           markersize=5, label=text)
    right.axvline(0.2, color=NOTE["color"], linewidth=0.8, linestyle=":")
    left.set_yticks(range(len(runs)), [textwrap.fill(run.label, 28) for run in runs])
    left.set_ylim(len(runs) - 0.5, -0.5)
    left.set_xlabel("rated interpretable (0 no, 1 yes) ↑")
    right.set_xlabel("right of five passages (dotted: chance) ↑")
    for axis in (left, right):
        axis.set_xlim(0, 1)
        axis.tick_params(axis="y", length=0)
    named = dict(zip(*right.get_legend_handles_labels()[::-1]))
    figure.legend(named.values(), named, loc="outside lower right", ncols=5, fontsize=6.5)
    return figure


RECOVERY = {"cosine_primitives": "primitives: cosine ↑",
            "cosine_compositions": "compositions: cosine ↑",
            "auroc_seen": "pairs seen: AUROC ↑",
            "auroc_unseen": "unseen pairs: AUROC ↑"}
BASELINES = {"pca": "PCA", "nmf": "NMF", "random": "random dictionary"}


def fig_recovery(runs):
    """How much of a known truth is found again, by how strong its compositions are."""
    runs = [run for run in runs if run.curves and run.curves[0].get("recovery")]
    if not runs:
        return None
    figure, axes = panels(len(RECOVERY), 2, 2.0, sharex=True)
    first = runs[0].curves[0]["recovery"]
    rhos = sorted({row["rho"] for row in first if row["task"] == first[0]["task"]})
    hatches = dict(zip(BASELINES, ("////", "....", "")))
    bars = [(name, None, "white") for name in BASELINES]
    bars += [("sae", run, run.color) for run in runs]
    width = 0.84 / len(bars)
    for axis, (metric, text) in zip(axes.flat, RECOVERY.items()):
        for i, (name, run, color) in enumerate(bars):
            for at, rho in enumerate(rhos):
                rows = [row[name][metric] for seed in (run or runs[0]).curves
                        for row in seed["recovery"]
                        if (row["task"], row["rho"]) == (first[0]["task"], rho)]
                if rows:
                    x = at + (i - (len(bars) - 1) / 2) * width
                    axis.bar(x, np.mean(rows), 0.92 * width, color=color, linewidth=0.6,
                             hatch=hatches.get(name), edgecolor=color if run else "#888888")
                    axis.plot([x, x], [min(rows), max(rows)], color="black", linewidth=0.7)
        axis.set_title(text, loc="left")
        axis.set_ylim(0.5 if "auroc" in metric else 0, 1.02)
        axis.set_xticks(range(len(rhos)), [f"{rho:g}" for rho in rhos])
        axis.grid(axis="x", visible=False)
    for axis in axes[-1]:
        axis.axhline(0.75, color=NOTE["color"], linewidth=0.8, linestyle=":")
        axis.set_title("dotted: one primitive alone (0.75)", loc="right", **NOTE)
        axis.set_xlabel(f"rho: strength of compositions (task: {first[0]['task']})")
    known = [plt.Rectangle((0, 0), 1, 1, facecolor="white", edgecolor="#888888", hatch=hatch)
             for hatch in hatches.values()]
    axes[0, 1].legend(known, BASELINES.values(), fontsize=6, loc="upper left", ncols=3)
    legend(figure, runs, "lines: range of the seeds", line="")
    return figure


def fig_compositions(runs):
    """What each composition loses where a feature is dropped, and the tokens that it is for."""
    runs = [run for run in runs if run.curves and run.curves[0].get("patterns")][-2:]
    if not runs:
        return None
    figure, axes = panels(len(runs), 1, 3.2)
    for axis, run in zip(axes.flat, runs):
        found = run.curves[0]["patterns"]
        effects = np.array(found["effects"], dtype=float)
        limit = max(np.abs(effects).max(), 1e-9)
        image = axis.imshow(effects, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit)
        names = [f"{c}: {' '.join(visible(t) for t in tokens[:4])}"
                 for c, tokens in zip(found["compositions"], found["tokens"])]
        axis.set_yticks(range(len(names)), names, fontsize=6, parse_math=False)
        axis.set_xticks(range(len(found["features"])), found["features"], rotation=90, fontsize=6)
        axis.set_title(run.label, loc="left")
        axis.set_xlabel("feature that is dropped")
        axis.set_ylabel("composition: its largest tokens")
        axis.grid(False)
        axis.tick_params(length=0, pad=1)
        figure.colorbar(image, ax=axis, label="lost, share of its mean", pad=0.01)
    return figure


def fig_reuse(runs):
    """In how many compositions each feature takes part, beside random graphs."""
    runs = [run for run in runs if run.curves and run.curves[0].get("reuse_null")]
    if not runs:
        return None
    figure, axes = panels(len(runs), 2, 2.2)
    for axis, run in zip(axes.flat, runs):
        counts, null = (np.array(run.curves[0][name], dtype=float)
                        for name in ("reuse", "reuse_null"))
        n = max(len(counts), int(np.flatnonzero(null > 0.5).max(initial=0)) + 1)
        axis.bar(range(len(counts)), counts, color=run.color, label="found")
        axis.plot(range(n), np.pad(null, (0, n))[:n], "k_", markersize=6,
                  label="random graph, as many edges")
        axis.set_yscale("symlog", linthresh=1)
        axis.yaxis.set_major_formatter(FuncFormatter(short))
        axis.set_ylim(bottom=0)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlabel("compositions that it acts on")
        axis.set_ylabel("features")
        axis.set_title(run.label, loc="left")
        if {"reuse_gini", "reuse_gini_null_95"} <= run.metrics.keys():
            axis.set_title(f"Gini {short(run.metrics['reuse_gini'])}, random at most "
                           f"{short(run.metrics['reuse_gini_null_95'])}", loc="right", **NOTE)
        axis.legend(fontsize=6)
    return figure


def with_levels(runs):
    """(run, the curves of its first seed) of the runs with two levels."""
    return [(run, run.curves[0]) for run in runs if run.curves and run.curves[0].get("tree")]


def fig_information(runs):
    """What parents tell of children: their own (boxed) and those of other parents."""
    found = with_levels(runs)[-2:]
    if not found:
        return None
    highest = max(np.nanmax(np.array(curves["information_matrix"], dtype=float))
                  for _, curves in found)
    figure, axes = panels(len(found), 2, 3.2)
    for axis, (run, curves) in zip(axes.flat, found):
        matrix = np.array(curves["information_matrix"], dtype=float)
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


def fig_causal(runs):
    """What ablating and patching parents does, against what their rivals do."""
    found = with_levels(runs)
    if not found:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3), width_ratios=(1, 1.2))
    for run, curves in found:
        points = [(parent["cosine_rival"], parent["cosine"]) for parent in curves["tree"]]
        left.plot(*zip(*points), run.marker, color=run.color, markersize=4, alpha=0.8,
                  markeredgewidth=0)
    low = min(left.get_xlim()[0], left.get_ylim()[0], -0.05)
    left.plot([low, 1], [low, 1], color=NOTE["color"], linewidth=0.6)
    left.set_xlabel("rival matched in rate and size")
    left.set_ylabel("parent")
    left.set_title("cosine with the children's summed effect", loc="left")
    rows = []
    for run, _ in found:
        for name, text in (("patched_rise", "top tokens' logits"),
                           ("patched_children", "children that fire")):
            rows.append(text if len(found) == 1 else f"{textwrap.shorten(run.label, 18)}: {text}")
            pair = [run.metrics.get(f"{name}{end}", math.nan) for end in ("", "_rival")]
            right.barh(len(rows) - 1.2, pair[0], 0.36, color=run.color)
            right.barh(len(rows) - 0.8, pair[1], 0.36, color=run.color, alpha=0.35)
    right.set_yticks(range(len(rows)), rows)
    right.set_ylim(len(rows) - 0.5, -0.5)
    right.set_title("an absent parent is put in", loc="left")
    right.set_xlabel("rise of the logits; share of the children\n(pale: a rival is put in)")
    legend(figure, [run for run, _ in found], "each point: one parent", "", True)
    return figure


def fig_tree(runs):
    """A few parents with their children and the text that fires them most, in the last run."""
    found = with_levels(runs)[-1:]
    if not found:
        return None
    parents = sorted(found[0][1]["tree"], key=lambda parent: -parent["cosine"])
    parents = [parent | {"children": parent["children"][:4]} for parent in parents][:5]
    height = sum(len(parent["children"]) + 0.7 for parent in parents)
    figure, axis = plt.subplots(figsize=(WIDTH, 0.27 * height + 0.4))

    def unit(at, x, name, passage):
        before, token, after, _ = passage
        text = f"{shown(before[-14:])}‹{shown(token)}›{shown(after[:10])}"
        axis.plot(x, at, "o", color=found[0][0].color, markersize=4)
        axis.text(x + 0.012, at, f"{name}  ", fontsize=6.5, va="center", weight="bold")
        axis.text(x + 0.075, at, text, fontsize=6, va="center", family="monospace",
                  parse_math=False)

    at = 0.0
    for parent in parents:
        middle = at + (len(parent["children"]) - 1) / 2
        unit(middle, 0.0, parent["id"], parent["passages"][0])
        for child in parent["children"]:
            axis.plot([0.47, 0.53], [middle, at], color=NOTE["color"], linewidth=0.8)
            unit(at, 0.53, child["id"], child["passages"][0])
            at += 1
        at += 0.7
    axis.set_xlim(-0.02, 1.03)
    axis.set_ylim(at - 0.7, -0.8)
    axis.axis("off")
    axis.set_title(f"{found[0][0].label}: parents (left) and children, each with its strongest "
                   "passage, ‹its token›", loc="left", fontsize=7.5)
    return figure


def ablations(runs):
    """(run, the unablated run from which its constants differ in ABLATE alone) of every such."""
    def rest(run):
        return {name: value for name, value in run.config.items()
                if name == "data_hash" or name.isupper() and name not in ("ABLATE", "SEEDS")}

    whole = [run for run in runs if "SAE_VARIANT" in run.config and not run.config.get("ABLATE")]
    return [(run, full[0]) for run in runs if run.config.get("ABLATE")
            if (full := [other for other in whole if rest(other) == rest(run)])]


def fig_ablations(runs):
    """What is lost where a part of a variant is switched off."""
    known = {"fvu": "explained_variance", "loss_increase_nats": "loss_increase_nats",
             "stability": "stability", "smoothness": "smoothness"}
    cut = ablations(runs)
    metrics = [name for name in known if any(paired(*pair, name) for pair in cut)]
    if not metrics:
        return None
    figure, axes = panels(len(metrics), 2, 0.6 + 0.3 * len(cut), sharey=True)
    for axis, metric in zip(axes.flat, metrics):
        sign = -1 if metric == "fvu" else 1
        for row, pair in enumerate(cut):
            if values := paired(*pair, metric):
                mean, *ends, _ = np.array(paired_test(*values)) * sign
                axis.barh(row, mean, height=0.6, color=pair[0].color)
                axis.plot(ends, [row, row], color="black", linewidth=0.8)
        axis.axvline(0, color="black", linewidth=0.6)
        axis.set_title(TITLES[known[metric]], loc="left")
        axis.set_yticks(range(len(cut)), [textwrap.fill(run.label, 28) for run, _ in cut])
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.xaxis.set_major_formatter(FuncFormatter(short))
    axes[0, 0].set_ylim(len(cut) - 0.5, -0.5)
    figure.supxlabel("Difference to the same variant with nothing switched off; lines: 95 % "
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
           "sparse_probing": fig_sparse_probing, "recovery": fig_recovery,
           "compositions": fig_compositions, "reuse": fig_reuse,
           "level_information": fig_information, "causal_tracing": fig_causal,
           "level_tree": fig_tree, "ablations": fig_ablations, "latents": fig_latents}


def main():
    plt.rcParams.update(STYLE)
    runs = load_runs()
    if not runs:
        sys.exit(f"plot.py: nothing to draw: none of the runs in labels ({', '.join(labels)}) is "
                 "complete. Finish one with `python experiment.py --out_dir=run_0`, or name others "
                 "there.")
    failed = []
    for name, draw in FIGURES.items():
        try:
            figure = draw(runs)
        except Exception:                               # the others are drawn all the same
            traceback.print_exc()
            failed.append(name)
            (HERE / f"{name}.png").unlink(missing_ok=True)
            continue
        if figure is None:
            print(f"{name}.png: not drawn, no run holds what it shows")
            continue
        figure.savefig(HERE / f"{name}.png")
        plt.close(figure)
        print(f"{name}.png: {', '.join(run.folder for run in runs)}")
    write_pages(runs)
    text = f"{comparison(runs)}\n\n{latents_table(runs)}"
    (HERE / "comparison.md").write_text(text + "\n", encoding="utf-8")
    print(f"comparison.md:\n\n{text}")
    if failed:
        sys.exit(f"plot.py: these figures failed, see above: {', '.join(failed)}")


if __name__ == "__main__":
    main()
