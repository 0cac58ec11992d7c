"""Measures the memory and the speed of a run on corpora whose activations take 10 to 100 times a share of memory.

    python bench/streaming.py                    about 10 minutes on two cores, 3.5 GB of disk; --small shows that it works

One process for each size, 10, 30 and 100 times --share MB of activations on disk: it collects them with the embedded model, then
trains a TopK for some steps on windows drawn from all of them. Its memory is the peak of its anonymous pages: files that are
mapped hold none that others need. tokens/s are of CPU time, so that a busy machine does not show. Writes streaming.json and streaming.png to
bench/results; fails where memory grows by a tenth of what the corpus does, or speed falls by a tenth. (Peaks differ by
some 200 MB from one time to another: freed buffers are kept, and threads interleave.)
"""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def status(field):
    """MB of a field of /proc/self/status."""
    return int(re.search(rf"^{field}:\s+(\d+)", Path("/proc/self/status").read_text(), re.M)[1]) / 1024


class Peak:
    """Largest anonymous memory of this process, in MB."""

    def __init__(self):
        self.anonymous = 0.0
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self):
        while True:
            self.anonymous = max(self.anonymous, status("RssAnon"))
            time.sleep(0.01)


def child(args):
    """Collects and trains on args.tokens tokens; prints what it took."""
    sys.path.insert(0, str(ROOT))
    import numpy as np
    import torch
    import experiment as E
    from data.windows import Windows
    from runtime.memory import keep_freed_memory
    torch.set_num_threads(1)
    keep_freed_memory()
    model = E.load_model()
    d_in, length, rng = model.config.hidden_size, E.CONTEXT_LENGTH, np.random.default_rng(0)
    n = args.tokens // length
    windows = Windows(tokens=rng.integers(1, 4096, (n, length)).astype(np.int32), lengths=np.full(n, length),
                      doc_ids=np.arange(n), n_train=n, names=[], domains=np.zeros(n, np.int8))
    E.SHARD_WINDOWS = 64
    peak = Peak()
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        store = E.Store(Path(folder), windows, d_in, torch.float32)
        began = time.process_time()
        store.collect(lambda: model, 2)
        collecting = time.process_time() - began
        torch.manual_seed(0)
        sae = E.TopK(d_in, 1536, 48)
        optimizer, stage, size = E.ContiguousAdam(sae, 1e-3), E.TopK.curriculum[0], 8
        step_seconds = []
        for step in range(args.steps):
            began = time.process_time()
            E.train_step(sae, optimizer, store.batch(rng.integers(0, n, size)), stage, 0.5)
            step_seconds.append(time.process_time() - began)
        print(json.dumps({"activations_mb": n * length * d_in * 4 / 1e6, "tokens": n * length, "collected_per_second": n * length / collecting,
                          "trained_per_second": size * (length - 1) / float(np.median(step_seconds)),
                          "anonymous_mb": peak.anonymous}))


def draw(rows, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True)
    size = [row["activations_mb"] for row in rows]
    left.loglog(size, size, ":", color="0.6", label="the activations")
    left.loglog(size, [row["anonymous_mb"] for row in rows], "o-", color="C0", label="peak memory of the process")
    left.set(xlabel="activations on disk (MB)", ylabel="MB", title="memory")
    for i, (name, label) in enumerate((("collected_per_second", "collected"), ("trained_per_second", "trained on"))):
        right.semilogx(size, [row[name] / rows[0][name] for row in rows], "o-", color=f"C{i + 1}", label=label)
    right.set(xlabel="activations on disk (MB)", ylabel="of the smallest corpus'", title="tokens/s", ylim=(0, 1.3))
    left.set_yticks([300, 1000, 3000], ["300", "1,000", "3,000"])
    left.minorticks_off()
    for axes in (left, right):
        axes.set_xticks(size, [f"{mb:,.0f}" for mb in size])
        axes.minorticks_off()
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    fig.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=int, default=32, help="MB of activations; the largest corpus has 100")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--small", action="store_true", help="up to 4 shares of 24 MB, 20 steps")
    parser.add_argument("--scratch", default=None, help="a folder on the disk to use")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--tokens", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.tokens:
        return child(args)
    share, steps, times = (24, 20, (1, 4)) if args.small else (args.share, args.steps, (10, 30, 100))
    rows, d_in = [], json.loads((ROOT / "embedded" / "model" / "config.json").read_text())["hidden_size"]
    for factor in times:
        tokens = factor * share * 10 ** 6 // (4 * d_in)
        command = [sys.executable, __file__, "--tokens", str(tokens), "--steps", str(steps)]
        command += ["--scratch", args.scratch] if args.scratch else []
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        if done.returncode:
            sys.exit(f"{factor} shares: {done.stderr[-1500:]}")
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        row = rows[-1]
        print(f"{row['activations_mb']:,.0f} MB of activations: peak {row['anonymous_mb']:.0f} MB, {row['collected_per_second']:,.0f} tokens/s "
              f"collected, {row['trained_per_second']:,.0f} trained on", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "streaming.json").write_text(json.dumps(rows, indent=1) + "\n")
    draw(rows, args.out / "streaming.png")
    first, last = rows[0], rows[-1]
    grown = last["anonymous_mb"] - first["anonymous_mb"]
    slower = [name for name in ("collected_per_second", "trained_per_second") if last[name] < 0.9 * first[name]]
    print(f"memory grew by {grown:.0f} MB, the corpus by {last['activations_mb'] - first['activations_mb']:,.0f}")
    if not args.small and (slower or grown > 0.1 * (last["activations_mb"] - first["activations_mb"])):
        sys.exit(f"not flat: {slower or 'memory'}")


if __name__ == "__main__":
    main()
