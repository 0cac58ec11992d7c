"""Every variant and every evaluation at small settings on the CPU: the referee of a change that must change no number.

    python bench/pin.py FOLDER [--tree PROJECT] [--only NAME ...]   runs them, and keeps their results in FOLDER
    python bench/pin.py --compare BEFORE AFTER                      what differs between two such folders, number by number

FOLDER gets, for each run, NAME.json (final_info.json without times and without recorded constants) and the exported
weights. Both folders must come from the same machine. Exit status of --compare: 1 where anything differs.
"""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

PROJECT = Path(__file__).resolve().parent.parent
SMALL = dict(TRAIN_TOKENS=16_384, CONTEXT_LENGTH=64, EXPANSION=2, TARGET_L0=12, EPOCHS_SCALE=0.3, BATCH_TOKENS=512,
             EVAL_FILES=48, SYNTHETIC_TOKENS=8_192, SYNTHETIC_SAE=(96, 8), TRACED_PARENTS=4, PROBING_SIZE=(60, 20),
             COMPOSED_TOKENS=128)
RENAMED = {"TRACED_PARENTS": "TRACED"}         # constants of earlier trees
FEW = ("core", "temporal", "probes")
ALL = (*FEW, "unlearning", "sparse_probing", "recovery")
# name -> the constants that differ from SMALL, and the evaluations
RUNS = {
    "standard": ({}, ALL), "topk": ({}, ALL), "batch_topk": ({}, ALL), "jumprelu": ({}, ALL), "gated": ({}, ALL),
    "matryoshka": ({}, ALL), "tsae": ({}, ALL), "slow": ({}, (*ALL, "dwell")), "temporal": ({}, ALL), "temporal_adaptation": ({}, ALL),
    "temporal_context": ({}, ALL), "compositional": ({}, (*ALL, "composition")), "hierarchical": ({}, (*ALL[:-1], "hierarchy")),
    "temporal, centred, two seeds": (dict(ATTENTION="centred", SEEDS=(0, 1)), FEW),
    "temporal, no attention": (dict(ABLATE=("attention",), CONSISTENT_FRACTION=0.5, TRAIN_POSITIONS=(3, 40)), FEW),
    "tsae, code": (dict(TSAE_READING="code"), FEW),
    "temporal_adaptation, by feature, driven by z": (dict(ABLATE=("sharing",), TEMPERATURE="scheduled", DRIVE="z"), FEW),
    "temporal_adaptation, no trace": (dict(ABLATE=("trace",)), FEW),
    "temporal_context, other matcher": (dict(MATCHER="attention", BUFFER_POSITIONS="sinusoidal", SELECTION="frequency",
                                             TRAIN_ON="retain"), ALL),
    "compositional, no bottleneck": (dict(ABLATE=("bottleneck", "gate", "curriculum")), FEW),
    "hierarchical, l1": (dict(LEVEL_SPARSITY="l1", LEVEL_WIDTHS=(144, 96), ABLATE=("nonnegative",)), FEW),
}
NOT_RESULTS = ("total_train_time", "avg_inference_tokens_per_second", "config")


def copy_of(tree, folder, name):
    """A copy of the runner in `folder` with the constants of the run `name` in its experiment.py."""
    folder.mkdir(parents=True)
    for part in ("embedded", "data", "runtime", "pages"):
        if (tree / part).is_dir():
            (folder / part).symlink_to(tree / part, target_is_directory=True)
    constants, chosen = RUNS[name]
    text = (tree / "experiment.py").read_text()
    if "def eval_detection" in text:            # in earlier trees no evaluation of its own
        chosen += ("detection",)
    for constant, value in (SMALL | {"SAE_VARIANT": name.partition(",")[0], "EVALS": chosen} | constants).items():
        constant = constant if re.search(rf"^{constant} = ", text, flags=re.M) else RENAMED[constant]
        text, n = re.subn(rf"^{constant} = [^#\n]*", f"{constant} = {value!r}  ", text, flags=re.M)
        assert n == 1, f"experiment.py has {n} lines that begin with {constant} ="
    (folder / "experiment.py").write_text(text)
    return folder


def results_alone(value):
    """A final_info.json's content without what speaks of time, and without the recorded constants."""
    if isinstance(value, dict):
        return {key: results_alone(part) for key, part in value.items() if not key.startswith(NOT_RESULTS)}
    return [results_alone(part) for part in value] if isinstance(value, list) else value


def record(folder, tree, names):
    """Runs `names` in turn in the tree; what they leave goes to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="pin.") as work:
        environment = os.environ | {"SAE_CACHE_DIR": f"{work}/cache", "CUDA_VISIBLE_DEVICES": ""}
        for name in names:
            copy = copy_of(tree, Path(work, name.replace(" ", "_").replace(",", "")), name)
            done = subprocess.run([sys.executable, "experiment.py", "--out_dir=run_1"], cwd=copy, env=environment,
                                  capture_output=True, text=True)
            if done.returncode:
                print(f"{name} failed: {done.stdout[-500:]}\n{done.stderr}", flush=True)
                continue
            info = results_alone(json.loads((copy / "run_1" / "final_info.json").read_text()))
            (folder / f"{name}.json").write_text(json.dumps(info, indent=1, sort_keys=True))
            for weights in sorted((copy / "run_1").rglob("sae_weights.safetensors")):
                seed = "" if weights.parent.name == "run_1" else f", {weights.parent.name}"
                shutil.copy(weights, folder / f"{name}{seed}.safetensors")
            shutil.copy(copy / "run_1" / "features.json", folder / f"{name}.features.json")
            print(f"{name}: {(copy / 'run_1' / 'timing.json').read_text().split('total_seconds')[1][2:8]} s", flush=True)


def flat(value, name=""):
    """{path: leaf} of nested dictionaries and lists."""
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for part, inner in items for key, leaf in flat(inner, f"{name}/{part}").items()}
    return {name: value}


def merged(info):
    """The evaluations of a final_info.json in one: {"metrics", "curves", "per_sequence"}."""
    found = {key: {} for key in ("metrics", "curves", "per_sequence")}
    for entry in info.values():
        found["metrics"] |= entry["metrics"]
        for key in ("curves", "per_sequence"):
            for seed, values in enumerate(entry[key]):
                found[key].setdefault(seed, {}).update(values)
    return found


def differences(before, after):
    """Lines that tell what differs between two files of results, the first 20."""
    if before.suffix == ".safetensors":
        old, new = load_file(before), load_file(after)
        return [f"{key}: {old[key].shape if key in old else None}, {new[key].shape if key in new else None}"
                for key in sorted(old.keys() | new.keys())
                if key not in old or key not in new or not np.array_equal(old[key], new[key])]
    old, new = (json.loads(path.read_text()) for path in (before, after))
    if not before.name.endswith(".features.json"):
        old, new = merged(old), merged(new)
    old, new = flat(old), flat(new)
    keys = [key for key in dict.fromkeys([*old, *new]) if old.get(key, "absent") != new.get(key, "absent")]
    lines = [f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}" for key in keys[:20]]
    return lines + [f"... and {len(keys) - 20} more"] * (len(keys) > 20)


def compare(before, after):
    """Prints what differs; returns whether anything does."""
    names = {path.name for path in before.iterdir()}
    found = {name: differences(before / name, path) for name in sorted(names) if (path := after / name).exists()}
    for name, lines in found.items():
        print(f"{name}: {'equal' if not lines else ''}", *lines, sep="\n  " if lines else "")
    absent = sorted(names - set(found))
    print(f"{len(found)} files compared, {sum(map(bool, found.values()))} differ, not there: {absent or 'none'}")
    return bool(absent) or any(found.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--tree", type=Path, default=PROJECT)
    parser.add_argument("--only", nargs="+", default=list(RUNS))
    parser.add_argument("--compare", type=Path, nargs=2)
    args = parser.parse_args()
    if args.compare:
        sys.exit(compare(*args.compare))
    record(args.folder, args.tree.resolve(), args.only)


if __name__ == "__main__":
    main()
