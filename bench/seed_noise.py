"""How much headline metrics differ between seeds of one variant: pages/seed_noise.json, which comparison.md prints.

    python bench/seed_noise.py

Of the runs in bench/results/runs with three seeds: the standard deviation between seeds (ddof 1), the root mean square over
variants and settings. A difference between two runs of one seed each is noise by itself up to about three times as much.
"""
import json
import re
from collections import defaultdict
from pathlib import Path

import numpy as np

PROJECT = Path(__file__).resolve().parent.parent


def seeds_of_rows(folder):
    """Returns {row: [metrics of each seed]} of the rows with three seeds."""
    rows = defaultdict(list)
    for path in sorted(folder.glob("*.json")):
        name = re.fullmatch(r"(.+)\.\d+\.json", path.name)[1]
        rows[name].append(json.loads(path.read_text())["metrics"])
    return {name: seeds for name, seeds in rows.items() if len(seeds) >= 3}


def seed_noise(rows):
    """Returns {metric: root mean square over rows of the standard deviation between seeds} of metrics that three rows have."""
    variances = defaultdict(list)
    for seeds in rows.values():
        for metric in set.intersection(*map(set, seeds)):
            variances[metric].append(np.var([seed[metric] for seed in seeds], ddof=1))
    return {metric: float(f"{np.sqrt(np.mean(values)):.3g}") for metric, values in sorted(variances.items()) if len(values) >= 3}


def main():
    noise = seed_noise(seeds_of_rows(PROJECT / "bench" / "results" / "runs"))
    (PROJECT / "pages" / "seed_noise.json").write_text(json.dumps(noise, indent=1) + "\n")
    print(f"{len(noise)} metrics; explained_variance {noise['explained_variance']}")


if __name__ == "__main__":
    main()
