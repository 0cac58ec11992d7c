"""Makes the results tables of docs/: trains every row with several seeds and prints them, with paired tests against a peer.

    python bench/table.py                                   seven variants, seeds 0 1 2
    python bench/table.py --rows ablations --seeds 0        the ablations; --rows controls; or names of rows
    python bench/table.py --finished                        prints what is there

One run per row and seed, each in its own copy of the template under ideas/table, edited as an agent edits it. The results of a
run are kept in bench/results/runs/ROW.SEED.json; a run is not made again while the edited experiment.py, data/, runtime/ and
pages/ are the same (--reuse: whatever they are), and a killed one carries on: the same command may be started any number of
times. Takes 3 to 26 minutes a run on two busy cores (--jobs 2 trains two at a time). Writes bench/results/table.md, or ROWS.md
of another set, of the seeds asked for; docs/results-*.md quote and discuss these.
"""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import plot
from runtime.provenance import ROOMS, sources_key

MAKING = Lock()
KEPT = ROOT / "bench" / "results" / "runs"
VARIANTS = ("standard", "topk", "batch_topk", "jumprelu", "gated", "matryoshka", "tsae", "slow", "temporal", "temporal_adaptation")
ROWS = {name: {"SAE_VARIANT": name} for name in VARIANTS}
ROWS |= {f"temporal, no {part}": {"SAE_VARIANT": "temporal", "ABLATE": (part,)}
         for part in ("attention", "positions", "consistency", "contrastive")}
ROWS |= {f"slow, no {' or '.join(parts)}": {"SAE_VARIANT": "slow", "ABLATE": parts}
         for parts in (("memory",), ("residual",), ("prediction",), ("memory", "prediction"))}
ROWS |= {f"temporal_adaptation, no {part}": {"SAE_VARIANT": "temporal_adaptation", "ABLATE": (part,)}
         for part in ("trace", "sharing", "variance_scaling", "regularisation")}
ROWS |= {f"temporal_adaptation, T {value}": {"SAE_VARIANT": "temporal_adaptation", "TEMPERATURE": value}
         for value in ("scheduled", 0.1, 0.5, 1.0)}
ROWS |= {f"hysteresis {bonus}": {"SAE_VARIANT": "hysteresis", "HYSTERESIS": bonus} for bonus in (0.25, 0.5, 0.75, 1.0)}
ROWS |= {"tsae, as released": {"SAE_VARIANT": "tsae", "TSAE_READING": "code"},
         "batch_topk, as many parameters as temporal": {"SAE_VARIANT": "batch_topk", "EXPANSION": 8.2},
         "batch_topk, layer 4": {"SAE_VARIANT": "batch_topk", "LAYER": 4}, "temporal, layer 4": {"SAE_VARIANT": "temporal", "LAYER": 4},
         "temporal, centred": {"SAE_VARIANT": "temporal", "ATTENTION": "centred"},
         **{f"{name}, re-initialised model": {"SAE_VARIANT": name, "MODEL_NAME": "../reinitialised"}
            for name in ("topk", "batch_topk", "slow", "temporal")}}
ROWS |= {f"{name}, positions {low}-{high}": {"SAE_VARIANT": name, "TRAIN_POSITIONS": (low, high)}
         for name in ("standard", "temporal", "temporal_adaptation") for low, high in ((1, 63), (64, 127))}
ROWS |= {f"{name}, sparse probing": {"SAE_VARIANT": name, "EVALS": ("core", "detection", "sparse_probing")}
         for name in ("standard", "temporal_adaptation")}
OWN = {"EXPANSION": 2, "TARGET_L0": 32}                             # compositional's own widths, 256 + 128; flat peers of 384
ROWS |= {f"{name}, own widths": {"SAE_VARIANT": name, **OWN, "EVALS": ("core", "detection")} for name in ("standard", "topk", "batch_topk")}
ROWS |= {"compositional, own widths": {"SAE_VARIANT": "compositional", **OWN, "EVALS": ("core", "detection", "composition")}}
ROWS |= {f"compositional, own widths, no {part}": {**ROWS["compositional, own widths"], "ABLATE": (part,)} for part in ("attention", "slots")}
ROWS |= {"compositional, own widths, the idea's batch and rate":
         {**ROWS["compositional, own widths"], "BATCH_TOKENS": 512, "LEARNING_RATE": 3e-4}}
RECOVERY = {"EVALS": ("recovery",), "EXPANSION": 2, "TARGET_L0": 8, "TRAIN_TOKENS": 16_384}  # a small SAE on text: recovery trains its own
ROWS |= {f"{name}, recovery": {**RECOVERY, "SAE_VARIANT": name} for name in ("standard", "topk", "batch_topk", "compositional")}
ROWS |= {f"compositional, recovery, no {part}": {**ROWS["compositional, recovery"], "SYNTHETIC_TASKS": ("boolean",),
                                                 "SYNTHETIC_RHOS": (1.0, 0.5), "ABLATE": (part,)}
         for part in ("attention", "gate", "curriculum", "slots", "bottleneck")}
ROWS |= {"compositional": {"SAE_VARIANT": "compositional", "EVALS": ("core", "temporal", "probes", "detection", "composition")}}
ROWS |= {"compositional, no attention": {**ROWS["compositional"], "ABLATE": ("attention",)}}
HIERARCHY = {"SAE_VARIANT": "hierarchical", "EVALS": ("core", "detection", "hierarchy")}
ROWS |= {"hierarchical": HIERARCHY, "hierarchical, own widths": {**HIERARCHY, "LEVEL_WIDTHS": (144, 96), "TARGET_L0": 12},
         **{f"hierarchical, no {part}": {**HIERARCHY, "ABLATE": (part,)} for part in ("cosine", "group", "start", "nonnegative")},
         "hierarchical, neither group nor nonnegative": {**HIERARCHY, "ABLATE": ("group", "nonnegative")}}
# variants that are not the template's: their file here, where in it they begin, their class
RIVALS = {"hysteresis": ("hysteresis.py", "HYSTERESIS =", "Hysteresis"), "tfa": ("temporal_peers.py", "TFA_HEADS", "TFA"),
          "crosscoder": ("temporal_peers.py", "TFA_HEADS", "Crosscoder")}
ROWS |= {"tfa": {"SAE_VARIANT": "tfa"}, "crosscoder, 48 a window": {"SAE_VARIANT": "crosscoder"},
         "crosscoder, 48 a token": {"SAE_VARIANT": "crosscoder", "CROSS_K": 2.0}}
ROWS |= {f"{name}, dwell": {**ROWS[row], "EVALS": ("dwell",), "TRAIN_TOKENS": 16_384} for name, row in (
    *((name, name) for name in ("topk", "batch_topk", "tsae", "slow", "temporal", "temporal_adaptation", "tfa")),
    ("crosscoder", "crosscoder, 48 a window"), ("slow, no memory", "slow, no memory"))}
SETS = {"variants": ["standard", "topk", "batch_topk", "matryoshka", "tsae", "slow", "temporal", "temporal_adaptation"],
        "slow": ["batch_topk", "tsae", "temporal", *(row for row in ROWS if row.startswith("slow") and "dwell" not in row and "model" not in row)],
        "slow_main": ["slow", "batch_topk", "tsae", "temporal"],
        "peers": ["tfa", "crosscoder, 48 a window", "crosscoder, 48 a token"],
        "dwell": [row for row in ROWS if row.endswith(", dwell")],
        "baselines": list(VARIANTS[:6]), "ablations": [row for row in ROWS if row.startswith("temporal") and (row in VARIANTS or ", no " in row or ", T " in row)] + ["hysteresis 1.0"],
        "positions": [row for row in ROWS if ", positions " in row],
        "probing": [row for row in ROWS if ", sparse probing" in row],
        "recovery": [row for row in ROWS if ", recovery" in row],
        "own_widths": [row for row in ROWS if ", own widths" in row and "hierarchical" not in row],
        "compositional": ["topk", "batch_topk", "compositional", "compositional, no attention"],
        "hierarchy": [row for row in ROWS if row.startswith("hierarchical")],
        "controls": ["hysteresis 0.25", "hysteresis 0.5", "hysteresis 0.75", "hysteresis 1.0", "tsae, as released",
                     "batch_topk, as many parameters as temporal", "batch_topk, layer 4", "temporal, layer 4", "temporal, centred",
                     *(row for row in ROWS if row.endswith(", re-initialised model"))]}
COLUMNS = {"explained_variance": "EV", "l0": "L0", "loss_increase_nats": "loss increase (nats)", "ce_recovered_vs_unigram": "CE recovered vs unigram",
           "ce_recovered_vs_mean": "vs mean", "ce_recovered_vs_zero": "vs zero", "dead_fraction": "dead", "single_token_fraction": "single-token",
           "slow_explained_variance": "slow EV", "slow_explained_variance_null": "its null", "stability": "stability",
           "stability_far": "stability, lags 17-32", "stability_token": "of tokens alone", "largest_ten_share": "share of the ten largest",
           "stability_one_rate": "stability, one rate", "stability_weighted_one_rate": "stability, weighted, one rate",
           "stability_far_weighted_one_rate": "stability, weighted, one rate, lags 17-32", "energy": "E[z²]",
           "smoothness": "smoothness", "smoothness_raw": "raw", "coherence": "coherence",
           "explained_variance_early": "EV, positions 1-63", "explained_variance_late": "EV, 64-127",
           "polysemanticity": "polysemanticity", "probe_token_type": "syntax probe", "probe_context": "context probe",
           "probe_document": "document probe", "theta_final": "θ", "live_fraction": "live",
           **{f"{name}_top_{k}": f"{title}, top {k}" for k in (1, 5, 20) for name, title in
              {"sae": "sparse probing", "channels": "channels"}.items()}, "sae_all": "all latents", "channels_all": "all channels",
           "detection": "detection", "detection_same_token": "among like tokens", "detection_null": "its null",
           "detection_reinitialised": "of an untrained TopK, re-initialised model",
           "compositions_per_token": "compositions a token", "live_compositions": "live compositions",
           "attention_spearman": "attention and interaction, ρ", "attention_auroc": "AUROC", "reuse_mean": "reuse",
           "reuse_gini": "its Gini", "reuse_gini_null_95": "of random graphs, 95 %"}
COLUMNS |= {f"{task}_{name}": f"{task.replace('_', ', ρ ')}: {title}" for task, names in
            {"boolean_1": "cosine_primitives cosine_compositions auroc_seen minimum_seen auroc_unseen",
             "boolean_0.5": "cosine_compositions auroc_seen minimum_seen", "boolean_0": "cosine_compositions",
             "arithmetic_1": "auroc_seen", "grammar_1": "auroc_seen"}.items()
            for name, title in {"cosine_primitives": "cosine of primitives", "cosine_compositions": "cosine of compositions",
                                "auroc_seen": "AUROC", "minimum_seen": "of the smaller primitive", "auroc_unseen": "AUROC unseen"}.items()
            if name in names.split()}
COLUMNS |= {f"dwell_{name}": f"{title}" for name, title in {
    **{f"{dwell}_{kind}": f"dwell {dwell}: {title}" for kind, title in (("cosine", "cosine"), ("auroc", "AUROC")) for dwell in (1, 4, 16, 64)},
    "boundary": "boundary", "explained_variance": "EV", "l0": "L0"}.items()}
COLUMNS |= {"flat_explained_variance": "EV of the flat TopK", "mutual_information": "mutual information",
            "mutual_information_non_edges": "non-edges", "mutual_information_ward": "Ward parents", "mutual_information_untrained": "level 2 untrained",
            **{f"ami_{kind}{rival}": f"AMI, {kind}" if not rival else title for kind in ("token", "context")
               for rival, title in {"": "", "_ward": "Ward", "_kmeans": "k-means"}.items()},
            "causal_specificity": "causal specificity", "causal_cosine": "causal cosine", "patched_children": "patched children", "patched_children_rival": "of a rival"}
TESTED = {"explained_variance": "explained variance", "loss_increase_nats": "loss increase", "probe_document": "document probe",
          "slow_explained_variance": "slow EV", "stability": "stability", "stability_far": "stability, lags 17-32",
          "stability_weighted_one_rate": "stability, weighted, one rate",
          "stability_far_weighted_one_rate": "stability, weighted, one rate, lags 17-32", "smoothness": "smoothness", "probe_token_type": "syntax probe",
          "probe_context": "context probe"}
BY_FILE = ("fvu", "loss_increase_nats", "slow_explained_variance", "stability", "stability_far",
           "smoothness", "accuracy_token_type", "accuracy_context")
PEERS = {"slow": ("batch_topk", "tsae", "temporal"), "temporal": ("batch_topk", "tsae", "hysteresis 1.0"), "temporal_adaptation": ("standard",)}
PEERS["compositional"] = "topk", "batch_topk"
PEERS |= {row: (row.split(", no ")[0].split(", T ")[0],) for row in ROWS if ", no " in row or ", T " in row}


def edited(source, **constants):
    for name, value in constants.items():
        source, count = re.subn(rf"^{name} = [^#\n]*", f"{name} = {value!r}  ", source, count=1, flags=re.M)
        if count != 1:
            sys.exit(f"experiment.py has no line that begins with {name} =")
    return source


def source_of(row, seed):
    source = (ROOT / "experiment.py").read_text()
    if (variant := ROWS[row]["SAE_VARIANT"]) in RIVALS:
        file, first, name = RIVALS[variant]
        rival = (ROOT / "bench" / file).read_text()
        rival = rival[rival.index(first):]
        source = source.replace("SAE_VARIANTS = {", f'{rival.strip()}\n\n\nSAE_VARIANTS = {{"{variant}": {name}, ', 1)
    return edited(source, **ROWS[row], SEEDS=(seed,))


def reinitialise(folder):
    """The embedded model with random weights, and its tokenizer, at `folder`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    torch.manual_seed(0)
    model = ROOT / "embedded" / "model"
    shutil.copytree(model, folder)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), dtype=torch.float32).save_pretrained(folder)


def results_of(row, seed, folder, reuse, finished_only):
    """Returns the results of a row's run with a seed; None where they are not there and not to be made."""
    source, name = source_of(row, seed), f"{re.sub('[^a-z0-9_.]+', '-', row.lower())}.{seed}"
    kept, key = KEPT / f"{name}.json", sources_key(source)
    if kept.exists() and (reuse or finished_only or json.loads(kept.read_text())["source"] == key):
        return json.loads(kept.read_text())
    if finished_only:
        return None
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    for room in ("embedded", *ROOMS):
        if not (place / room).exists():
            (place / room).symlink_to(ROOT / room, target_is_directory=True)
    (place / "experiment.py").write_text(source)
    with MAKING:
        if "MODEL_NAME" in ROWS[row] and not (folder / "reinitialised").exists():
            reinitialise(folder / "reinitialised")
    print(f"{row}, seed {seed}", flush=True)
    done = subprocess.run([sys.executable, "experiment.py", "--out_dir=run_1"], cwd=place, stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, text=True)
    if done.returncode:
        print(f"{row}, seed {seed} failed:\n{done.stderr[-1500:]}", flush=True)
        return None
    info = json.loads((place / "run_1" / "final_info.json").read_text())
    rivals = {name: {f"{row['task']}_{row['rho']:g}_{metric}": value for row in plot.per_seed(info, "curves")[0].get("recovery", ())
                     for metric, value in row[name].items()} for name in ("pca", "nmf", "random")}
    found = {"source": key, "metrics": plot.merged(info, "metrics"), "rivals": rivals, "per_file": {
        metric: [None if v is None else round(v, 5) for v in values]
        for metric, values in plot.per_seed(info, "per_sequence")[0].items() if metric in BY_FILE}}
    KEPT.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(found) + "\n")
    return found


def cell(runs, metric):
    values = [run["metrics"][metric] for run in runs if metric in run["metrics"]]
    if not values:
        return ""
    digits = 2 if metric == "l0" else 4
    error = f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{error}"


def tests(found):
    """Welch's tests over seeds of the rows in PEERS against their peers, with BH-FDR over all of them."""
    claims = []
    for row, peers in PEERS.items():
        for peer in (peer for peer in peers if row in found and peer in found):
            for metric, title in TESTED.items():
                values = [np.array([run["metrics"][metric] for run in found[name] if metric in run["metrics"]]) for name in (row, peer)]
                if test := plot.seed_test(*values):
                    claims.append((row, peer, title, test))
    lines = ["", "| variant | against | metric | difference | 95 % interval | q (FDR) | |", "|---|---|---|---|---|---|---|"]
    for (row, peer, title, test), q in zip(claims, plot.corrected([claim[-1].p for claim in claims])):
        verdict = ("higher" if test.mean > 0 else "lower") if q < 0.05 else "no difference shown"
        lines.append(f"| `{row}` | `{peer}` | {title} | {test.mean:+.4f} | {test.low:+.4f} to {test.high:+.4f} | {q:.2g} | {verdict} |")
    return lines if claims else []


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=["variants"], help=f"{', '.join(SETS)}, or names of rows")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--reuse", action="store_true", help="make only what is missing, whatever code made the rest")
    parser.add_argument("--finished", action="store_true", help="print what is there, whatever code made it")
    parser.add_argument("--folder", type=Path, default=ROOT / "ideas" / "table")
    args = parser.parse_args()
    rows = [row for name in args.rows for row in SETS.get(name, [name])]
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.jobs)))
    with ThreadPoolExecutor(args.jobs) as pool:
        made = {(row, seed): pool.submit(results_of, row, seed, args.folder, args.reuse, args.finished) for seed in args.seeds for row in rows}
        found = {row: [made[row, seed].result() for seed in args.seeds if made[row, seed].result()] for row in rows}
    found = {row: runs for row, runs in found.items() if runs}
    if not found:
        sys.exit("no run is finished")
    columns = {metric: title for metric, title in COLUMNS.items() if any(metric in r["metrics"] for runs in found.values() for r in runs)}
    lines = ["| variant | seeds | " + " | ".join(columns.values()) + " | training, min |", "|---" * (len(columns) + 3) + "|"]
    for row, runs in found.items():
        minutes = np.mean([run["metrics"]["total_train_time"] for run in runs]) / 60
        lines.append(f"| `{row}` | {len(runs)} | " + " | ".join(cell(runs, m) for m in columns) + f" | {minutes:.1f} |")
    rivals = {name: run["rivals"][name] for runs in found.values() for run in runs[:1] for name in run.get("rivals", {})}
    for name, scores in rivals.items():
        if scores:
            lines.append(f"| {name} | | " + " | ".join(f"{scores[m]:.4f}" if m in scores else "" for m in columns) + " | |")
    m = found[next(iter(found))][0]["metrics"]
    lines += ["", "± is the standard error over seeds."]
    if any("one rate" in title for title in columns.values()):
        lines[-1] += (" Stability with one rate is an earlier formula: it took a latent's mean rate for its rate at each position, so "
                      "it counts what follows from the position in the window.")
    if "ce_model" in m:
        lines[-1] += (f" Model's own loss {m['ce_model']:.3f} nats, unigram {m['ce_unigram']:.3f}, mean ablation "
                      f"{m['ce_mean']:.3f}, zero ablation {m['ce_zero']:.3f}. Explained variance of the bigram lookup "
                      f"{m['bigram_explained_variance']:.3f}, of an untrained TopK {m['untrained_explained_variance']:.3f}.")
    text = "\n".join(lines + tests(found)) + "\n"
    if len(args.rows) == 1 and args.rows[0] in SETS:
        (ROOT / "bench" / "results" / ("table.md" if args.rows == ["variants"] else f"{args.rows[0]}.md")).write_text(text)
    print(text)


if __name__ == "__main__":
    main()
