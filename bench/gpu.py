"""Measures the runner on a GPU, in one command of at most 8 minutes: prints a table, writes all numbers to bench/results/gpu.json.

    python bench/gpu.py                          all parts; needs the peers' environment (bench/setup_peers.sh) for "steps"
    python bench/gpu.py --parts exact steps      some of them
    python bench/gpu.py --small                  small sizes: shows that all of it works, also without a GPU

  exact    gradients of the sparse TopK step against dense autograd, both in fp32
  steps    one training step of ours, SAELens, dictionary_learning and sparsify at d_in 2,304, 4,096 tokens, k 64, each in its
           better setting: TF32 for all, and mixed precision where a peer has it; and the share of the measured bf16 rate of matrix
           products that our step makes of the arithmetic it needs: one dense product, and six sparse ones of k latents a token
  collect  the activation cache's rate, of a random model of gemma-2-2b's shape at layer 12, against its bare forward pass that ends
           there
  run      `python experiment.py` on such a model, d_sae 18,432, from the preflight to final_info.json: minutes, and its summary
"""
import argparse
import contextlib
import io
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
import peers
import train_step
import numpy as np
import torch

CUDA = peers.DEVICE == "cuda"
ROOMS = ("embedded", "data", "runtime", "pages")       # folders that a copy of experiment.py needs beside it
GEMMA = dict(hidden_size=2304, num_hidden_layers=26, intermediate_size=9216, num_attention_heads=8, num_key_value_heads=4,
             head_dim=256, vocab_size=256_000)
TINY = dict(hidden_size=64, num_hidden_layers=4, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2,
            head_dim=16, vocab_size=5_000)


def clock():
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def median_seconds(f, n=10, warm=3):
    times = []
    for _ in range(warm + n):
        began = clock()
        f()
        times.append(clock() - began)
    return statistics.median(times[warm:])


def device_name():
    return torch.cuda.get_device_name() if CUDA else "CPU"


# ---- exact ----------------------------------------------------------------------------------------------------------
def exact(args):
    """Largest deviation of our gradients from dense autograd's, relative to the largest entry, in fp32."""
    torch.manual_seed(1)
    torch.set_float32_matmul_precision("highest")
    _, batches = start_of(args, args.widths[0], n_batches=2)
    ours = peers.Ours("topk", args.d_in, args.widths[0], args.k, bf16=False)
    for i in range(10):
        ours.step(batches[i % 2])
    x = batches[0]
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    parameters = {name: getattr(ours.sae, name) for name in names}
    dense, ids = train_step.dense_gradients(parameters, x, args.k, torch.float32)
    found = {"ours_vs_dense": train_step.difference(ours.gradients(x), dense)[0]}
    if not args.small:
        found |= {"dense_vs_fp64": train_step.difference(dense, train_step.dense_gradients(
            parameters, x, args.k, torch.float64, ids)[0])[0]}
    return found


def start_of(args, d_sae, n_batches=4):
    start, batches = train_step.make_start(args.d_in, d_sae, args.k, n_batches, args.tokens)
    start["directions"] = start["directions"].to(peers.DEVICE)
    return start, [x.to(peers.DEVICE) for x in batches]


# ---- steps ----------------------------------------------------------------------------------------------------------
def contestants(variant, d_in, d_sae, k):
    """peers.contestants, and the peers again in their mixed precision."""
    made = peers.contestants(variant, d_in, d_sae, k)
    made.pop("ours (fp32 only)", None)
    made["SAELens, autocast"] = lambda: peers.SAELens(variant, d_in, d_sae, k, lr=5e-4, autocast=True)
    extra = {"threshold_start_step": 0} if variant in ("topk", "batch_topk") else {}
    made["dictionary_learning, autocast"] = lambda: peers.DictionaryLearning(
        variant, d_in, d_sae, k, lr=5e-4, warmup_steps=1, autocast=True, **extra)
    return made


def steps(args):
    torch.set_float32_matmul_precision("high")
    rows = []
    a, b = (torch.randn(n, n, device=peers.DEVICE, dtype=torch.bfloat16) for n in [512 if args.small else 8192] * 2)
    rate = 2 * len(a) ** 3 / median_seconds(lambda: a @ b, 20)
    for d_sae in args.widths:
        start, batches = start_of(args, d_sae)
        for variant in args.variants:
            for name, make in contestants(variant, args.d_in, d_sae, args.k).items():
                torch.manual_seed(0)
                row = {"variant": variant, "d_sae": d_sae, "contestant": name}
                try:
                    one = make()
                    train_step.warm_up(one, start, batches, 3 if args.small else 12, args.k)
                    turn = iter(range(10 ** 6))
                    row["ms"] = 1e3 * median_seconds(lambda: one.step(batches[next(turn) % len(batches)]))
                    row["l0"], row["explained_variance"] = one.measure(batches[-1][:1024])
                    if name == "ours":
                        need = 2 * args.tokens * args.d_in * (d_sae + 6 * row["l0"])
                        row["share_of_bf16_rate"] = need / (row["ms"] / 1e3) / rate
                except Exception as error:      # a peer that cannot, says so in the table
                    row["failed"] = f"{type(error).__name__}: {error}"[:200]
                    print(row, file=sys.stderr, flush=True)
                one = None
                if CUDA:
                    torch.cuda.empty_cache()
                rows.append(row)
    return {"bf16_tflops": rate / 1e12, "rows": rows}


# ---- collect --------------------------------------------------------------------------------------------------------
def collect(args):
    import transformers
    E = peers.load_experiment()
    from data.windows import Windows
    torch.manual_seed(0)
    with torch.device(peers.DEVICE):
        model = transformers.AutoModelForCausalLM.from_config(transformers.Gemma2Config(**args.shape), dtype=E.MODEL_DTYPE)
    model.eval().requires_grad_(False)
    n, length, layer = (64, 16, 1) if args.small else (2048, 128, 12)
    E.CONTEXT_LENGTH, d_in = length, model.config.hidden_size
    tokens = np.random.default_rng(0).integers(1, 4000, (n, length)).astype(np.int32)
    windows = Windows(tokens=tokens, lengths=np.full(n, length), doc_ids=np.arange(n), n_train=n,
                      names=[str(i) for i in range(n)], domains=[""] * n)
    times = {"bare": [], "cache": []}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(3):
            store = E.Store(Path(folder) / str(i), windows, d_in, E.MODEL_DTYPE)
            began = clock()
            for part in store.tokens(slice(None)).split(32):
                E.block_output(model, layer, part)
            times["bare"].append(clock() - began)
            began = clock()
            with contextlib.redirect_stdout(io.StringIO()), E.missing_shards(
                    store.shards, length * d_in * store.dtype.itemsize) as missing:
                for shard in missing:
                    store.collect_shard(model, layer, shard)
            times["cache"].append(clock() - began)
    bare, cache = (min(times[name][1:]) for name in ("bare", "cache"))
    return {"bare_tokens_per_second": n * length / bare, "tokens_per_second": n * length / cache, "of_bare": bare / cache}


# ---- run ------------------------------------------------------------------------------------------------------------
def run(args):
    """The runner itself, on a folder with a random checkpoint of that shape and the embedded tokenizer."""
    import transformers
    root = peers.PROJECT
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        folder = Path(folder)
        torch.manual_seed(0)
        with torch.device(peers.DEVICE):
            model = transformers.AutoModelForCausalLM.from_config(
                transformers.Gemma2Config(**args.shape, bos_token_id=0, eos_token_id=0, pad_token_id=0), dtype=torch.bfloat16)
        model.save_pretrained(folder / "model")
        del model
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if (root / "embedded" / "model" / name).exists():
                shutil.copy(root / "embedded" / "model" / name, folder / "model" / name)
        if CUDA:
            torch.cuda.empty_cache()
        for name in ROOMS:
            (folder / name).symlink_to(root / name, target_is_directory=True)
        source = (root / "experiment.py").read_text()
        edits = {"SAE_VARIANT": "topk", "MODEL_NAME": str(folder / "model"), "DATASET": args.text, "TARGET_L0": 64,
                 "LAYER": 12, "BATCH_TOKENS": 4096, "EVALS": tuple(args.evals)}
        if args.small:
            edits |= {"LAYER": 1, "BATCH_TOKENS": 1024, "TARGET_L0": 8, "TRAIN_TOKENS": 16_384, "EVAL_FILES": 16, "EPOCHS_SCALE": 0.2}
        for name, value in edits.items():
            source, count = re.subn(rf"^{name} = [^#\n]*", f"{name} = {value!r}  ", source, count=1, flags=re.M)
            assert count == 1, name
        (folder / "experiment.py").write_text(source)
        began = time.time()
        done = subprocess.run([sys.executable, "experiment.py", "--out_dir=run_1"], cwd=folder, text=True, capture_output=True,
                              env=os.environ | {"SAE_CACHE_DIR": str(folder / "cache")})
        found = {"seconds": time.time() - began, "stdout": done.stdout[-1500:]}
        if done.returncode:
            return found | {"failed": done.stderr[-1500:]}
        info = json.loads((folder / "run_1" / "final_info.json").read_text())
        timing = json.loads((folder / "run_1" / "timing.json").read_text())
        return found | {"timing": timing, "means": {name: value for entry in info.values() for name, value in entry["means"].items()}}


PARTS = {"exact": exact, "steps": steps, "collect": collect, "run": run}


def table(found):
    lines = [f"On {found['device']}, torch {found['torch']}"]
    if "exact" in found:
        lines.append("gradients: " + ", ".join(f"{name} {value:.1e}" for name, value in found["exact"].items()))
    if "steps" in found:
        lines += [f"\nbf16 matrix products: {found['steps']['bf16_tflops']:.0f} TFLOP/s\n",
                  "| variant | d_sae | contestant | ms | relative to ours | L0 | share of bf16 rate |", "|---|---|---|---|---|---|---|"]
        base = None
        for row in found["steps"]["rows"]:
            base = row if row["contestant"] == "ours" else base
            about = row.get("failed") or f"{row['ms']:.2f} | {row['ms'] / base['ms']:.2f} | {row['l0']:.0f} | " + (
                f"{row['share_of_bf16_rate']:.2f}" if "share_of_bf16_rate" in row else "")
            lines.append(f"| {row['variant']} | {row['d_sae']} | {row['contestant']} | {about} |")
    if "collect" in found:
        c = found["collect"]
        lines.append(f"\ncollection: {c['tokens_per_second']:,.0f} tokens/s, {c['of_bare']:.2f} of the bare forward pass")
    if "run" in found:
        r = found["run"]
        lines.append(f"\nrun: {r['seconds']:.0f} s; {r.get('failed') or r['stdout'][-900:]}\n{r.get('timing')}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--variants", nargs="+", default=["topk", "standard", "batch_topk"])
    parser.add_argument("--evals", nargs="+", default=["core", "temporal"], help="EVALS of the run")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--text", default="embedded", help="DATASET of the run")
    parser.add_argument("--scratch", type=Path, default=None, help="a folder with room for the checkpoint, 5 GB")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results" / "gpu.json")
    args = parser.parse_args()
    peers.quiet()
    args.d_in, args.tokens, args.k = (32, 256, 4) if args.small else (2304, 4096, 64)
    args.text = str(Path(args.text).resolve()) if Path(args.text).exists() else args.text
    args.widths, args.shape = ((128, 256), TINY) if args.small else ((18_432, 65_536), GEMMA)
    found = {"device": device_name(), "torch": torch.__version__}
    for name in args.parts:
        began = time.time()
        try:
            found[name] = PARTS[name](args)
        finally:
            print(f"{name}: {time.time() - began:.0f} s", file=sys.stderr, flush=True)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
