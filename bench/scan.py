"""Measures the cost of `temporal_adaptation`'s leaky trace: its training step against a dense standard SAE's, taking turns.

    python bench/scan.py                embedded default's sizes, windows of 128, one thread

The dense step is the textbook form: one matrix product each way over all latents, ReLU, L1, autograd, the same optimiser,
clipping and renormalisation. `standard` computes at the active latents only and is quicker; the trace needs all of them.
CPU seconds of this process, so that a busy machine matters little: read the ratios. Writes bench/results/scan.json.
"""
import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import experiment as E
from runtime.memory import keep_freed_memory


def dense_step(sae, optimizer, batch):
    z = torch.relu((batch.x - sae.b_dec) @ sae.W_enc + sae.b_enc)
    x_hat = z @ sae.W_dec + sae.b_dec
    loss = (batch.x - x_hat).square().sum(-1).mean() + 1e-3 * z.sum(-1).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(sae.parameters(), E.GRADIENT_CLIP)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-in", type=int, default=192)
    parser.add_argument("--d-sae", type=int, default=1536)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8, help="windows")
    parser.add_argument("--k", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    torch.manual_seed(0)
    x = torch.randn(args.batch, args.seq, args.d_in) / args.d_in ** 0.5
    batch = E.Batch(x, torch.zeros(x.shape[:2], dtype=torch.long), torch.arange(args.batch), torch.arange(1, args.seq + 1), None)
    steps, seconds = {}, {}
    for name, variant in (("dense standard", "standard"), ("standard", "standard"), ("temporal_adaptation", "temporal_adaptation")):
        sae = E.SAE_VARIANTS[variant](args.d_in, args.d_sae, args.k)
        sae.initialise(batch)
        stage, optimizer = E.curriculum_of(type(sae))[0], E.ContiguousAdam(sae, 1e-4)
        steps[name] = ((lambda s=sae, o=optimizer: dense_step(s, o, batch)) if name.startswith("dense") else
                       (lambda s=sae, o=optimizer, g=stage: E.train_step(s, o, batch, g, 0.5)))
        seconds[name] = []
    for turn in range(args.rounds + 5):
        for name, step in steps.items():
            began = time.process_time()
            step()
            if turn >= 5:
                seconds[name].append(time.process_time() - began)
    found = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {name: value / found["dense standard"] for name, value in found.items()}
    print(f"d_in {args.d_in}, d_sae {args.d_sae}, {args.batch} windows of {args.seq}, {args.threads} thread(s)")
    for name, value in found.items():
        print(f"{name:20} {1e3 * value:7.1f} ms  {ratios[name]:.2f}x the dense step")
    (ROOT / "bench" / "results" / "scan.json").write_text(json.dumps(vars(args) | {"seconds": found, "ratios": ratios}, indent=1) + "\n")


if __name__ == "__main__":
    main()
