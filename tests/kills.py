"""Runs killed at random moments of every kind of work, and carried on: they end with the bits of a run never killed.

`make kills` kills 20 times and writes the table bench/results/kills.md.
"""
import argparse
import json
import random
import re
import sys
import tempfile
import time
from pathlib import Path

import torch
from copies import copy_template, FEWER, PROJECT, results, timeless, write_text_data
from processes import run, start

SETTINGS = FEWER | dict(SEEDS=(0, 1), CHECKPOINT_SECONDS=0, SHARD_WINDOWS=16)
MOMENTS = ("collecting", "training 0", "evaluation 0", "training 1", "evaluation 1")
TABLE = PROJECT / "bench" / "results" / "kills.md"


def same_results(folder, other):
    """Every bit but of the times."""
    assert timeless(results(folder)) == timeless(results(other))
    names = {path.relative_to(other / "run_1") for path in (other / "run_1").rglob("sae_weights.safetensors")}
    assert names
    for name in names:
        assert (folder / "run_1" / name).read_bytes() == (other / "run_1" / name).read_bytes(), name


def steps_done(cache, seed):
    """Of the checkpoint of a seed."""
    for path in (cache / "runs").glob(f"*/*/seed_{seed}.pt"):
        return torch.load(path, weights_only=True)["schedule"]["step"]
    return 0


class Moment:
    """A random moment in a kind of work: `come` when it is there."""

    def __init__(self, kind, cache, unbroken):
        chance, (work, _, seed) = random.Random(), kind.partition(" ")
        timing = json.loads((unbroken / "run_1" / "timing.json").read_text())
        self.cache, self.seed, self.work, self.ready = cache, seed, work, None
        self.steps = sum(results(unbroken)["training"]["config"]["steps_done"])
        self.step, self.share = chance.randrange(1, self.steps), chance.random()
        self.shards = chance.randrange(20)
        self.delay = self.share * timing.get(f"evaluation, seed {seed}", 0)

    def come(self, printed):
        if self.work == "collecting":
            return len(list((self.cache / "activations").glob("*/*.bin"))) >= self.shards and "preflight passed" in printed
        if self.work == "training":
            return steps_done(self.cache, self.seed) >= self.step
        if self.ready is None and steps_done(self.cache, self.seed) == self.steps:
            self.ready = time.monotonic()
        return self.ready is not None and time.monotonic() > self.ready + self.delay

    def __str__(self):
        return {"collecting": f"after {self.shards} shards", "training": f"after step {self.step} of {self.steps}",
                "evaluation": f"{self.share:.0%} into it"}[self.work]


def kill_and_carry_on(folder, cache, unbroken, kinds):
    """[(moment, what came of it)] of a run killed once in each kind of work, in a cache of its own; it ends as `unbroken`."""
    told = []
    for kind in kinds:
        moment, process, said = Moment(kind, cache, unbroken), start(folder, cache), "killed"
        while not moment.come(process.printed()):
            if process.ended():
                said = "had ended"
                break
            time.sleep(0.01)
        process.kill()
        finished = process.wait()
        told.append((f"{kind}: {moment}", said))
        if finished.code == 0 or (folder / "run_1").exists():           # a kill between the results and the exit harms nothing
            break
        assert finished.code == -9, (told, finished)
    else:
        finished = run(folder, cache)
        assert finished.code == 0, (told, finished)
    assert (folder / "run_1").exists() and finished.stderr == "" and "afresh" not in finished.stdout, (told, finished)
    carried = re.findall(r"carrying on at step (\d+)", finished.stdout)
    assert carried or len(told) == 1 or "training" not in kinds[len(told) - 1], (told, finished.stdout)
    same_results(folder, unbroken)
    assert not list((cache / "runs").glob("*/*/*"))                     # nothing is left to resume
    return told


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--variants", nargs="+", default=["standard", "temporal"])
    arguments = parser.parse_args()
    told, began = [], time.time()
    with tempfile.TemporaryDirectory() as root:
        root, unbroken = Path(root), {}
        data = str(write_text_data(root / "library.jsonl"))
        while sum(said == "killed" for *_, said in told) < arguments.kills:
            i = len(told)
            variant = arguments.variants[i // len(MOMENTS) % len(arguments.variants)]
            if variant not in unbroken:
                unbroken[variant] = copy_template(root / variant, DATASET=data, SAE_VARIANT=variant, **SETTINGS)
                finished = run(unbroken[variant], root / "cache")
                assert finished.code == 0, finished.stderr
            folder = copy_template(root / f"killed_{i}", DATASET=data, SAE_VARIANT=variant, **SETTINGS)
            one = kill_and_carry_on(folder, root / f"cache_{i}", unbroken[variant], MOMENTS)
            told += [(variant, moment, said) for moment, said in one]
            print(*(f"{variant}, {moment}: {said}" for moment, said in one), sep="\n", flush=True)
    killed = sum(said == "killed" for *_, said in told)
    text = ["# Runs killed at random moments", "",
            f"`make kills` sent SIGKILL {killed} times in {len(told)} tries; each run was started again until it ended, with every "
            f"bit of its results and weights as in a run never killed ({torch.get_num_threads()} threads, CPU).", "",
            "| variant | moment | came of it |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in told)]
    TABLE.write_text("\n".join(text) + "\n")
    print(f"{killed} kills, {time.time() - began:.0f} s")
    sys.exit(killed < arguments.kills)


if __name__ == "__main__":
    main()
