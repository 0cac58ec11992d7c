"""Makes the unlearning table: the cost of forgetting FORGET, by strategy, beside the model retrained without it.

    python bench/unlearning.py                        rows of ROWS, seeds 0 1 2; runs of bench/table.py, and kept as they are
    python bench/unlearning.py --finished             prints what is there
    python bench/unlearning.py --oracle FOLDER        measures a model trained by
                                                      embedded/train_lm.py --exclude sympy --tokenizer embedded/model --out FOLDER
                                                      on the test windows of a run; writes bench/results/oracle.json

Writes bench/results/unlearning.md; docs/results-unlearning.md discusses it.
"""
import argparse
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
import table

ROWS = {"topk": {}, "temporal_context": {}, "temporal_context, sinusoidal": {"BUFFER_POSITIONS": "sinusoidal"},
        "temporal_context, w 16": {"BUFFER": 16}, "temporal_context, trained on forget": {"TRAIN_ON": "forget"},
        "temporal_context, trained on retain": {"TRAIN_ON": "retain"},
        "temporal_context, attention matches": {"MATCHER": "attention"},
        "temporal_context, latents by frequency": {"SELECTION": "frequency"}}
table.ROWS |= {f"unlearning, {name}": {"SAE_VARIANT": name.split(",")[0], "EVALS": ("core", "unlearning"), **constants}
               for name, constants in ROWS.items()}
RATES = "0.05", "0.2"  # of false positives, besides the default's
STRATEGIES = ("standard", "pattern", "hybrid", *(f"{name}_{rate}" for rate in RATES for name in ("pattern", "hybrid")))
GROUPS = "forget", "neighbours", "retain"
CONTROLS = ("random_latents", "random_directions", "projection")
table.TESTED |= {f"{strategy}_{group}": "" for strategy in STRATEGIES for group in GROUPS}
ORACLE = ROOT / "bench" / "results" / "oracle.json"


def with_interval(runs, metric):
    """Mean over seeds, and the 95 % interval of a bootstrap over seeds and files."""
    values = np.array([run["per_file"][metric] for run in runs], dtype=float)
    values, rng = values[:, ~np.isnan(values).any(0)], np.random.default_rng(0)
    n_seeds, n_files = values.shape
    draws = [values[rng.integers(n_seeds, size=n_seeds)][:, rng.integers(n_files, size=n_files)].mean() for _ in range(2000)]
    low, high = np.quantile(draws, [0.025, 0.975])
    return f"{values.mean():.4f} ({low:.4f} to {high:.4f})"


def measure_oracle(folder):
    """Losses of the model and of the oracle on the test windows of the three groups."""
    import experiment as E
    from transformers import AutoModelForCausalLM
    store, _ = E.open_store(*E.load_config(E.MODEL_NAME, E.LAYER, E.CONTEXT_LENGTH), E.cache_folder())
    plan = E.unlearning_plan(store.windows, E.FORGET, E.load_tokenizer())
    ids, group = plan.test, plan.group
    card, found = json.loads((folder / "training.json").read_text()), {}
    if card["excluded_domain"] != E.FORGET:
        sys.exit(f"{folder} was trained without {card['excluded_domain']}, not {E.FORGET}")
    with E.torch.no_grad():
        for name, place in (("model", ROOT / "embedded" / "model"), ("oracle", folder)):
            model, losses = AutoModelForCausalLM.from_pretrained(place, dtype=E.torch.float32).eval(), []
            for part in np.array_split(ids, len(ids) // 16 + 1):
                tokens, keep = store.tokens(part), store.valid(part)[:, 1:]
                logp = model(input_ids=tokens).logits[:, 1:-1].log_softmax(-1)
                loss = -logp.gather(2, tokens[:, 2:, None])[..., 0] * keep
                losses.append((loss.sum(1) / keep.sum(1)).numpy())
            losses = np.concatenate(losses)
            found[name] = {g: float(losses[group == g].mean()) for g in GROUPS}
    found["increase"] = {g: found["oracle"][g] - found["model"][g] for g in GROUPS}
    ORACLE.write_text(json.dumps(found | {"forget": E.FORGET, "heldout_loss_without_it": card["heldout_loss"],
                                          "training_tokens": card["training_tokens"]}, indent=1) + "\n")
    print(ORACLE.read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--reuse", action="store_true")
    parser.add_argument("--finished", action="store_true")
    parser.add_argument("--oracle", type=Path)
    args = parser.parse_args()
    if args.oracle:
        return measure_oracle(args.oracle)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.jobs)))
    with ThreadPoolExecutor(args.jobs) as pool:
        made = {(row, seed): pool.submit(table.results_of, f"unlearning, {row}", seed, ROOT / "ideas" / "table", args.reuse, args.finished)
                for seed in args.seeds for row in args.rows}
        found = {row: [r for seed in args.seeds if (r := made[row, seed].result())] for row in args.rows}
    lines = []
    for row, runs in found.items():
        if not runs:
            continue
        mean = {name: np.mean([run["metrics"][name] for run in runs]) for name in runs[0]["metrics"]}
        lines += [f"\n**{row}** ({len(runs)} seeds): explained variance {mean['explained_variance']:.4f}; AUROC of sequences "
                  f"{mean['auroc_hybrid']:.3f} (false positives {mean['false_positives_hybrid']:.3f}), of windows "
                  f"{mean['auroc_pattern']:.3f}, order shuffled {mean['auroc_shuffled']:.3f}, one position "
                  f"{mean['auroc_one_position']:.3f}, bag of tokens {mean['auroc_bag_of_tokens']:.3f}; cloze accuracy unclamped "
                  f"{mean['cloze_forget']:.3f} / {mean['cloze_neighbours']:.3f} / {mean['cloze_retain']:.3f}; cosine of the clamped "
                  f"latents at neighbouring tokens {mean['clamped_consistency']:.3f}.\n",
                  "| clamping | strength | loss on FORGET | on neighbours | on retain | cloze, FORGET | behind 32 tokens | 64 tokens "
                  "| repetition | entropy |", "|---" * 10 + "|"]
        for name in (name for name in STRATEGIES + CONTROLS if f"{name}_forget" in mean):
            shown = [with_interval(runs, f"{name}_{g}") if name in STRATEGIES else f"{mean[f'{name}_{g}']:.4f}" for g in GROUPS]
            kept = [f"{mean[f'{name}_padded_{n}'] / mean[f'{name}_padded_0']:.0%}" if name in STRATEGIES else "" for n in (32, 64)]
            lines.append(f"| {name.replace('_', ' ')} | {mean[f'{name}_strength']:.2f} | " + " | ".join(shown)
                         + f" | {mean[f'{name}_cloze_forget']:.3f} | " + " | ".join(kept)
                         + f" | {mean[f'{name}_repetition']:.3f} | {mean[f'{name}_entropy']:.2f} |")
        lines.append(f"| none | | | | | {mean['cloze_forget']:.3f} | | | {mean['unclamped_repetition']:.3f} | "
                     f"{mean['unclamped_entropy']:.2f} |")
    if ORACLE.exists():
        oracle = json.loads(ORACLE.read_text())["increase"]
        lines.append("\nThe loss of the model retrained without the domain rises by " + ", ".join(f"{oracle[g]:.3f} on {g}" for g in GROUPS) + ".")
    text = "\n".join(lines).strip() + "\n"
    (ROOT / "bench" / "results" / "unlearning.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
