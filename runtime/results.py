"""Writing of results."""
import json
import math
from contextlib import suppress

import numpy as np
from scipy.stats import sem

from pages.case_studies import case_studies
from runtime.errors import RunnerError
from runtime.files import replacing


def jsonable(value):
    """Arrays and what holds them as lists for JSON; NaN (no token was there) becomes None."""
    if isinstance(value, dict):
        return {name: jsonable(part) for name, part in value.items()}
    value = value.tolist() if hasattr(value, "tolist") else value  # arrays of numpy or torch
    if isinstance(value, list):
        return [jsonable(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def finite_number(value, name):
    """A finite float."""
    with suppress(TypeError, ValueError, RuntimeError):
        if math.isfinite(number := float(value)):
            return number
    shape = f" of shape {(*value.shape,)}" if hasattr(value, "shape") else ""
    raise RunnerError(f"{name} is {value if isinstance(value, float) else type(value).__name__ + shape}, wanted one finite number.")


def summarise_seeds(per_seed, headlines):
    """final_info.json's entries: of results {evaluation: {"metrics", "curves", "per_sequence"}} of each seed the
    means, the headlines apart; from two seeds on standard errors, std(ddof=1) / sqrt(seeds)."""
    info = {}
    for name in per_seed[0]:
        results = [seed[name] for seed in per_seed]
        common = [key for key in results[0]["metrics"] if all(key in r["metrics"] for r in results)]
        values = {key: [r["metrics"][key] for r in results] for key in common}
        shown = {key: values[key] for key in headlines[name] if key in values}
        info[name] = {"means": {f"{key}_mean": np.mean(v) for key, v in shown.items()},
                      "metrics": {key: np.mean(v) for key, v in values.items()}, "final_info_dict": shown,
                      "curves": [r["curves"] for r in results], "per_sequence": [r["per_sequence"] for r in results]}
        if len(results) > 1:
            info[name] |= {"stderrs": {f"{key}_stderr": sem(v) for key, v in shown.items()},
                           "metric_stderrs": {key: sem(v) for key, v in values.items()}}
    return info


NOT_IN_PREFLIGHT = {"final_train_loss", "best_val_loss", "total_train_time",    # in the first evaluation, whichever it is
                    "probe_token_type"}                                         # too few tokens


def write_result_files(folder, per_seed, headlines, config, timing, source, summary_text):
    """final_info.json, whole or not at all, and what stands beside it -> its content."""
    for seed, result in zip(config["SEEDS"], per_seed):
        place = folder if seed == config["SEEDS"][0] else folder / f"seed_{seed}"
        (place / "features.json").write_text(json.dumps(result["features"], separators=",:"))
    per_seed = [{name: result[name] for name in config["EVALS"]} for result in per_seed]
    for name, result in per_seed[0].items() if not timing else ():          # in the preflight
        if lacking := set(headlines[name]) - set(result["metrics"]) - NOT_IN_PREFLIGHT:
            raise RunnerError(f"EVALUATIONS has {sorted(lacking)} among the headlines of {name!r}, whose Result has no such metric.")
    if "hierarchy" in per_seed[0]:
        (folder / "case_studies.md").write_text(case_studies(per_seed[0]["hierarchy"]["curves"]["tree"]))
    info = summarise_seeds(per_seed, headlines)
    next(iter(info.values()))["config"] = config
    np.save(folder / "all_results.npy", {f"seed_{seed}": result for seed, result in zip(config["SEEDS"], per_seed)})
    (folder / "experiment.py").write_text(source)
    (folder / "timing.json").write_text(json.dumps(timing, indent=1))
    (folder / "summary.md").write_text(summary_text(info) + "\n")
    with replacing(folder / "final_info.json") as path:
        path.write_text(json.dumps(info, allow_nan=False))
    return info
