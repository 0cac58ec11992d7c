"""The README's results table: trains variants with several seeds and prints one row each.

usage: python bench/table.py [--variants topk gated] [--seeds 0 1 2] [--folder ideas/table]

Each variant runs in its own copy of the template, with SAE_VARIANT and SEEDS edited as an agent would. A finished run is
not made again while experiment.py is the same, and a killed one carries on: the same command may be started any number
of times. Writes bench/results/table.md. Intervals: standard error over seeds; with one seed a 95 % bootstrap over files.
"""
import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = {"explained_variance": "EV", "l0": "L0", "loss_increase_nats": "loss increase (nats)",
           "ce_recovered": "CE recovered vs unigram", "ce_recovered_vs_mean": "vs mean ablation",
           "ce_recovered_vs_zero": "vs zero ablation", "dead_fraction": "dead", "live_fraction": "live",
           "single_token_fraction": "single-token"}
BASELINES = ["standard", "topk", "batch_topk", "jumprelu", "gated", "matryoshka"]


def edited(source, **constants):
    for name, value in constants.items():
        source, count = re.subn(rf"^{name} = [^#\n]*", f"{name} = {value!r}  ", source, count=1, flags=re.M)
        if count != 1:
            sys.exit(f"experiment.py has no line that begins with {name} =")
    return source


def run(variant, seeds, folder, finished_only):
    """The parsed final_info.json of a finished run of `variant`."""
    place = folder / variant
    place.mkdir(parents=True, exist_ok=True)
    source, result = edited((ROOT / "experiment.py").read_text(), SAE_VARIANT=variant, SEEDS=tuple(seeds)), place / "run_1"
    done = (result / "final_info.json").exists() and (result / "experiment.py").read_text() == source
    if not done and not finished_only:
        shutil.copytree(ROOT / "embedded", place / "embedded", dirs_exist_ok=True)
        (place / "experiment.py").write_text(source)
        print(f"{variant}: {len(seeds)} seeds", flush=True)
        subprocess.run([sys.executable, "experiment.py", "--out_dir=run_1"], cwd=place, check=True)
    return json.loads((result / "final_info.json").read_text())["core"], json.loads((result / "timing.json").read_text())


def interval(core, metric):
    """The part of a cell after the mean: a standard error over seeds, or half a 95 % bootstrap interval over files."""
    if "metric_stderrs" in core:
        return f" ± {core['metric_stderrs'][metric]:.4f}"
    per_file = {"explained_variance": "fvu", "loss_increase_nats": "loss_increase_nats", "l0": "l0"}.get(metric)
    if per_file is None:
        return ""
    values, rng = np.array(core["per_sequence"][0][per_file]), np.random.default_rng(0)
    means = values[rng.integers(0, len(values), (2000, len(values)))].mean(1)
    return f" (± {np.diff(np.percentile(means, [2.5, 97.5]))[0] / 2:.4f})"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--variants", nargs="+", default=BASELINES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--finished", action="store_true", help="print what is finished, whatever made it")
    parser.add_argument("--folder", type=Path, default=ROOT / "ideas" / "table")
    args = parser.parse_args()
    lines = ["| variant | " + " | ".join(COLUMNS.values()) + " | training, min |", "|---" * (len(COLUMNS) + 2) + "|"]
    for variant in args.variants:
        core, timing = run(variant, args.seeds, args.folder, args.finished)
        cells = [f"{core['metrics'][m]:.{2 if m == 'l0' else 4}f}{interval(core, m)}" for m in COLUMNS]
        lines.append(f"| `{variant}` | " + " | ".join(cells) + f" | {core['metrics']['total_train_time'] / 60:.1f} |")
    metrics = core["metrics"]
    notes = (f"{len(args.seeds)} seeds; {core['config']['evaluation_files']} held-out files. Model's own loss {metrics['ce_model']:.3f} nats, "
             f"unigram {metrics['ce_unigram']:.3f}, mean ablation {metrics['ce_mean']:.3f}, zero ablation {metrics['ce_zero']:.3f}. "
             f"Explained variance of the bigram lookup {metrics['bigram_explained_variance']:.3f}, of an untrained TopK "
             f"{metrics['untrained_explained_variance']:.3f}.")
    text = "\n".join(lines) + f"\n\n{notes}\n"
    (ROOT / "bench" / "results").mkdir(exist_ok=True)
    (ROOT / "bench" / "results" / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
