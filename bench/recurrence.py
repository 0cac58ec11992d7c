"""How many latents come back with another seed: for every row of bench/table.py, from the weights that its runs left.

    python bench/recurrence.py

A latent recurs where a decoder row of the other seed's SAE has a cosine of at least .7 (.9) with its own; mean over ordered
pairs of seeds and over all latents. Beside it the mean of the best cosine, and the same against the other SAE's rows with
their entries shuffled (what as many random directions of that spectrum give). Writes bench/results/recurrence.md.
"""
import argparse
import itertools
import re
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent


def decoders(folder):
    """{row: [W_dec of each seed, rows of norm 1]}"""
    found = defaultdict(list)
    for path in sorted(folder.glob("*/run_1/sae_weights.safetensors")):
        name, seed = re.fullmatch(r"(.*)\.(\d+)", path.parent.parent.name).groups()
        found[name].append(F.normalize(load_file(path)["W_dec"], dim=1))
    return {name: rows for name, rows in found.items() if len(rows) > 1}


def best_cosines(a, b):
    """Returns the largest cosine of each row of a with a row of b: [n]."""
    return (a @ b.t()).amax(1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "ideas" / "table")
    folder = parser.parse_args().folder
    torch.manual_seed(0)
    lines = ["| variant | seeds | cosine ≥ .7 | cosine ≥ .9 | mean best cosine | shuffled |", "|---|---|---|---|---|---|"]
    for name, rows in decoders(folder).items():
        pairs = list(itertools.permutations(rows, 2))
        best = torch.cat([best_cosines(a, b) for a, b in pairs])
        shuffled = torch.cat([best_cosines(a, b[:, torch.randperm(b.shape[1])]) for a, b in pairs])
        lines.append(f"| `{name}` | {len(rows)} | {(best >= 0.7).float().mean():.3f} | {(best >= 0.9).float().mean():.3f} "
                     f"| {best.mean():.3f} | {shuffled.mean():.3f} |")
    text = "\n".join(lines) + "\n"
    (ROOT / "bench" / "results" / "recurrence.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
