"""Time of a training step by two processes with one thread each (torchrun, gloo), against one such process.

    python bench/ranks.py               the embedded default's sizes, batches of 1,024 to 16,384 tokens, on two quiet cores

Each process trains on its share of the same batches, as in a run: forward, backward, the exchange, clipping, Adam,
bookkeeping. One and two processes take turns; the time is the median of all steps of rank 0. Writes bench/results/ranks.json.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def work(args):
    """One process of a turn; rank 0 prints milliseconds a step."""
    import experiment as E
    import torch
    from runtime.memory import keep_freed_memory
    torch.set_num_threads(1)
    keep_freed_memory()
    said = sys.stdout
    E.RANKS.join()
    torch.manual_seed(0)
    n = args.tokens // 128
    x = torch.randn(4, n, 128, args.d_in) / args.d_in ** 0.5
    sae = E.SAE_VARIANTS[args.variant](args.d_in, args.d_sae, args.k)
    share = E.RANKS.share(torch.arange(n))
    batches = [E.Batch(part[share], torch.zeros(len(share), 128, dtype=torch.long), share, torch.arange(1, 129), None) for part in x]
    sae.initialise(batches[0])
    optimizer, times = E.ContiguousAdam(sae, 1e-4), []
    for step in range(args.steps + 5):
        began = time.perf_counter()
        E.train_step(sae.train(), optimizer, batches[step % 4], sae.curriculum[0], 0.5)
        times.append(1e3 * (time.perf_counter() - began))
    if E.RANKS.rank == 0:
        print(json.dumps(times[5:]), file=said)
    E.RANKS.leave()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=["standard", "topk"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1_024, 4_096, 16_384])
    parser.add_argument("--d-in", type=int, default=192)
    parser.add_argument("--d-sae", type=int, default=1_536)
    parser.add_argument("--k", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="in a round, besides five to warm up")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "ranks.json")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        return work(args)
    rows = []
    print("| variant | d_sae | tokens a step | one process, ms | two | ratio |\n|---|---|---|---|---|---|")
    for variant in args.variants:
        for tokens in args.batches:
            times = {1: [], 2: []}
            for turn in range(2 * args.rounds):
                n = 1 + turn % 2
                launch = [] if n == 1 else ["-m", "torch.distributed.run", f"--nproc_per_node={n}"]
                done = subprocess.run([sys.executable, *launch, __file__, "--variant", variant, "--tokens", str(tokens), "--k", str(args.k),
                                       "--d-in", str(args.d_in), "--d-sae", str(args.d_sae), "--steps", str(args.steps)],
                                      capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
                if done.returncode:
                    raise SystemExit(done.stderr[-1500:])
                times[n] += json.loads(done.stdout.splitlines()[-1])
            one, two = (statistics.median(times[n]) for n in (1, 2))
            rows.append({"variant": variant, "d_in": args.d_in, "d_sae": args.d_sae, "tokens": tokens, "ms_1": one, "ms_2": two,
                         "ratio": one / two})
            print(f"| {variant} | {args.d_sae:,} | {tokens:,} | {one:.1f} | {two:.1f} | {one / two:.2f} |", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
