"""Time of one SAE training step, ours against SAELens, dictionary_learning and sparsify, in one process, interleaved.

    python bench/train_step.py                       the table of the README: all variants, 1 and 2 threads
    python bench/train_step.py --cells topk:16384    one cell; --only peers; --memory adds peak memory

One step is all that a trainer does per batch: forward, backward, clipping, projection, Adam, renormalisation, dead-latent
bookkeeping; no logging. All contestants see the same batches: sparse sums of random directions plus noise, centred, mean
squared norm 1. All start from the directions that made the data, with thresholds that leave k latents active, then train a
few steps with their own code, while a controller holds their L0 at k: the regime of a trained SAE, reached cheaply. L0 and
explained variance (ev) at that point stand beside each time.
"""
import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import peers
import torch
import torch.nn.functional as F

DEFAULT_CELLS = ("topk:4096", "topk:16384", "standard:4096", "batch_topk:4096", "jumprelu:4096", "gated:4096", "matryoshka:4096")
RESULTS = Path(__file__).resolve().parent / "results"


def make_start(d_in, d_sae, k, n_batches, batch, seed=0, active=24, noise=0.1):
    """The dictionary, and batches of activations made from it: about `active` directions per token, some far more often."""
    g = torch.Generator().manual_seed(seed)
    directions = F.normalize(torch.randn(d_sae, d_in, generator=g), dim=1)
    often = (torch.arange(d_sae) + 50.0) ** -0.7
    n = n_batches * batch
    ids = torch.multinomial(often, n * active, replacement=True, generator=g).view(n, active)
    sizes = 0.5 + torch.rand(n, active, generator=g)
    x = F.embedding_bag(ids, directions, per_sample_weights=sizes, mode="sum")
    x += noise ** 0.5 * x.norm(dim=1).mean() * torch.randn(n, d_in, generator=g) / d_in ** 0.5
    x -= x.mean(0)
    x /= x.square().sum(1).mean().sqrt()
    pre_acts = x[:512] @ directions.t()
    threshold = pre_acts.flatten().kthvalue(pre_acts.numel() - 512 * k).values.item()
    return {"directions": directions, "threshold": threshold}, list(x.split(batch))


def warm_up(contestant, start, batches, steps, k):
    """Trains `steps` steps from the given dictionary, its sparsity steered."""
    contestant.load(start)
    for i in range(steps):
        contestant.step(batches[i % len(batches)])
        if i % 2:
            contestant.steer(batches[0][:256], k)


def race(field, batches, rounds, k, clock):
    """One step each in turn, the order rotated from round to round: {name: [seconds]}."""
    times, names = {name: [] for name in field}, list(field)
    for r in range(rounds):
        x = batches[r % len(batches)]
        for name in names[r % len(names):] + names[:r % len(names)]:
            began = clock()
            field[name].step(x)
            times[name].append(clock() - began)
            if r % 2:
                field[name].steer(batches[0][:256], k)
    return times


def bench_cell(variant, d_sae, args):
    torch.manual_seed(0)
    torch.set_num_threads(max(args.threads))
    start, batches = make_start(args.d_in, d_sae, args.k, args.batches, args.batch)
    field = {name: make() for name, make in peers.contestants(variant, args.d_in, d_sae, args.k, args.only).items()}
    for contestant in field.values():
        warm_up(contestant, start, batches, args.warmup, args.k)
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        clock = time.process_time if args.clock == "cpu" else time.perf_counter
        race(field, batches, 1, args.k, clock)
        times = race(field, batches, args.rounds, args.k, clock)
        base = next(iter(field))        # ours, where it takes part
        for name, contestant in field.items():
            l0, ev = contestant.measure(batches[-1])
            ratios = [t / b for t, b in zip(times[name], times[base])]
            rows.append({"variant": variant, "d_sae": d_sae, "threads": threads, "contestant": name,
                         "ms": 1e3 * statistics.median(times[name]), "relative_to": base, "ratio": statistics.median(ratios),
                         "l0": l0, "explained_variance": ev, "optimizer": contestant.optimizer,
                         "precision": contestant.precision})
    return rows


# ---- exactness ------------------------------------------------------------------------------------------------------
def dense_gradients(parameters, x, k, dtype, ids=None):
    """Gradients of mean |x - x_hat|^2 of a TopK SAE by plain dense autograd, and the ids of the chosen latents (or of the
    given ones: a tie that another precision breaks otherwise is no error of arithmetic)."""
    p = {name: value.detach().to(dtype).requires_grad_() for name, value in parameters.items()}
    x = x.to(dtype)
    pre_acts = (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    ids = pre_acts.topk(k, dim=1).indices if ids is None else ids
    z = torch.zeros_like(pre_acts).scatter(1, ids, pre_acts.gather(1, ids).relu())
    (x - z @ p["W_dec"] - p["b_dec"]).square().sum(1).mean().backward()
    return {name: value.grad for name, value in p.items()}, ids


def difference(a, b):
    """Largest deviation relative to the largest entry, and the parameter where it is."""
    return max((((a[n].double() - b[n].double()).abs().max() / b[n].double().abs().max()).item(), n) for n in b)


def check_exact(d_sae, args):
    """Our TopK gradients against dense autograd: at random initialisation and after training."""
    rows, (_, batches) = [], make_start(args.d_in, d_sae, args.k, args.batches, args.batch, seed=1)
    for bf16 in (False, True):
        torch.manual_seed(1)
        ours = peers.Ours("topk", args.d_in, d_sae, args.k, bf16=bf16)
        for state, steps in (("random initialisation", 0), (f"after {args.exact_steps} steps", args.exact_steps)):
            for i in range(steps):
                ours.step(batches[i % len(batches)])
            x = batches[-1]
            parameters = {n: getattr(ours.sae, n) for n in ("W_enc", "b_enc", "W_dec", "b_dec")}
            dense, ids = dense_gradients(parameters, x, args.k, torch.float32)
            exact, _ = dense_gradients(parameters, x, args.k, torch.float64, ids)
            with torch.no_grad():       # a latent of ours that is not among the dense form's
                chosen = torch.zeros(len(x), d_sae, dtype=torch.bool).scatter_(1, ids, True)
                other_latents = ((ours.latents(x) != 0) & ~chosen).any(1).sum().item()
            gradients = ours.gradients(x)
            rows.append({"d_sae": d_sae, "path": ours.precision, "state": state,
                         "ours_vs_dense": difference(gradients, dense), "ours_vs_fp64": difference(gradients, exact),
                         "dense_vs_fp64": difference(dense, exact), "tokens_with_other_latents": other_latents})
    return rows


# ---- memory ---------------------------------------------------------------------------------------------------------
def resident(field):
    """VmRSS or VmHWM of this process in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024


def peak_of_one(variant, d_sae, name, args):
    """Run in its own process: peak resident memory of some steps above what the imports and the data take."""
    start, batches = make_start(args.d_in, d_sae, args.k, 2, args.batch)
    make = peers.contestants(variant, args.d_in, d_sae, args.k)[name]
    peers.contestants(variant, 16, 64, 4)[name]().step(torch.randn(128, 16))        # imports happen here
    Path("/proc/self/clear_refs").write_text("5")       # the peak is counted from now on
    before = resident("VmRSS")
    contestant = make()
    warm_up(contestant, start, batches, 4, args.k)
    print(json.dumps({"mb": resident("VmHWM") - before}))


def measure_memory(variant, d_sae, args):
    rows = []
    for name in peers.contestants(variant, args.d_in, d_sae, args.k, args.only):
        done = subprocess.run([sys.executable, __file__, "--peak-of", name, "--cells", f"{variant}:{d_sae}", "--k", str(args.k),
                               "--d-in", str(args.d_in), "--batch", str(args.batch), "--threads", "1"],
                              capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name} on {variant} {d_sae}: {done.stderr[-800:]}")
        rows.append({"variant": variant, "d_sae": d_sae, "contestant": name,
                     "peak_mb": json.loads(done.stdout.splitlines()[-1])["mb"]})
    return rows


# ---- tables ---------------------------------------------------------------------------------------------------------
def print_steps(rows):
    print("\n| variant | d_sae | threads | contestant | ms / step | relative to " + rows[0]["relative_to"]
          + " | L0 | ev | optimiser | precision |\n|---|---|---|---|---|---|---|---|---|---|")
    for r in rows:
        print(f"| {r['variant']} | {r['d_sae']:,} | {r['threads']} | {r['contestant']} | {r['ms']:.0f} | {r['ratio']:.2f} | "
              f"{r['l0']:.1f} | {r['explained_variance']:.3f} | {r['optimizer']} | {r['precision']} |")


def print_exact(rows):
    def show(found):
        return f"{found[0]:.1e} ({found[1]})"
    print("\n| d_sae | our path | state | ours against dense fp32 | ours against dense fp64 | dense fp32 against fp64 "
          "| tokens with other latents |\n|---|---|---|---|---|---|---|")
    for r in rows:
        print(f"| {r['d_sae']:,} | {r['path']} | {r['state']} | {show(r['ours_vs_dense'])} | {show(r['ours_vs_fp64'])} | "
              f"{show(r['dense_vs_fp64'])} | {r['tokens_with_other_latents']} |")


def print_memory(rows):
    print("\n| variant | d_sae | contestant | peak MB |\n|---|---|---|---|")
    for r in rows:
        print(f"| {r['variant']} | {r['d_sae']:,} | {r['contestant']} | {r['peak_mb']:.0f} |")


def keep_freed_memory():
    """The allocator setting of our runner, here for everyone: freed memory stays with the process (glibc alone)."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 1 << 30)               # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)         # M_TRIM_THRESHOLD


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", default=list(DEFAULT_CELLS), help="variant:d_sae, ...")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=60, help="training steps of each contestant before its clock starts")
    parser.add_argument("--batches", type=int, default=8, help="distinct batches, used in turn")
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--d-in", type=int, default=512)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--only", choices=("", "ours", "peers"), default="")
    parser.add_argument("--exact", nargs="*", type=int, default=[4096], help="widths of the exactness check; none: skip it")
    parser.add_argument("--exact-steps", type=int, default=200)
    parser.add_argument("--memory", action="store_true", help="also the peak memory of each, in its own process")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: CPU time, for a busy machine and 1 thread")
    parser.add_argument("--allocator", choices=("default", "keep"), default="default", help="keep: freed memory stays, for all")
    parser.add_argument("--out", type=Path, default=RESULTS / "train_step.json")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    peers.quiet()
    cells = [(variant, int(width)) for variant, width in (cell.split(":") for cell in args.cells)]
    if args.peak_of:
        torch.set_num_threads(args.threads[0])
        return peak_of_one(*cells[0], args.peak_of, args)
    if args.allocator == "keep":
        keep_freed_memory()
    results = {"settings": {n: v for n, v in vars(args).items() if n not in ("out", "peak_of")} | {
                   "torch": torch.__version__.split("+")[0], "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
                   "amx": torch.cpu._is_amx_tile_supported()}, "steps": [], "exactness": [], "memory": []}

    def save():
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")

    for variant, d_sae in cells:
        results["steps"] += bench_cell(variant, d_sae, args)
        print(f"{variant} {d_sae}: done", file=sys.stderr, flush=True)
        save()
    if args.only != "peers":
        for d_sae in args.exact:
            results["exactness"] += check_exact(d_sae, args)
    if args.memory:
        for variant, d_sae in cells:
            results["memory"] += measure_memory(variant, d_sae, args)
    save()
    print_steps(results["steps"])
    if results["exactness"]:
        print_exact(results["exactness"])
    if results["memory"]:
        print_memory(results["memory"])


if __name__ == "__main__":
    main()
