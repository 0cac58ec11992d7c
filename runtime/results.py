"""Writing of results: plain finite numbers, whole files."""
import json
import math
from contextlib import suppress

import numpy as np
from scipy.stats import sem

from runtime.errors import RunnerError
from runtime.files import replacing
from runtime.provenance import write_sources


def jsonable(value):
    """Returns a value for JSON: arrays of numpy or torch, also within lists and dictionaries, as
    lists, numbers that are not finite as None (no token was there)."""
    if isinstance(value, dict):
        return {name: jsonable(part) for name, part in value.items()}
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, list):
        return [jsonable(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def finite_number(value, name):
    """Returns the value as a float; raises RunnerError, which speaks of `name`, where it is not one
    finite number."""
    with suppress(TypeError, ValueError, RuntimeError):
        if math.isfinite(number := float(value)):
            return number
    shape = f" of shape {(*value.shape,)}" if hasattr(value, "shape") else ""
    kind = value if isinstance(value, float) else type(value).__name__ + shape
    raise RunnerError(f"{name} is {kind}, wanted one finite number.")


def summarise_seeds(per_seed, headlines):
    """Returns final_info.json's entries {evaluation: entry}.

    per_seed holds for each seed {evaluation: {"metrics", "curves", "per_sequence"}}, headlines
    {evaluation: names of its headline metrics}. An entry has the means over the seeds of the
    headlines ("means") and of all metrics that every seed has ("metrics"), the headlines of each
    seed ("final_info_dict"), each seed's curves and per_sequence; from two seeds on standard errors
    std(ddof=1) / sqrt(seeds) ("stderrs", "metric_stderrs").
    """
    info = {}
    for name in per_seed[0]:
        results = [seed[name] for seed in per_seed]
        common = [key for key in results[0]["metrics"] if all(key in r["metrics"] for r in results)]
        values = {key: [r["metrics"][key] for r in results] for key in common}
        shown = {key: values[key] for key in headlines[name] if key in values}
        info[name] = {
            "means": {f"{key}_mean": np.mean(v) for key, v in shown.items()},
            "metrics": {key: np.mean(v) for key, v in values.items()},
            "final_info_dict": shown,
            "curves": [r["curves"] for r in results],
            "per_sequence": [r["per_sequence"] for r in results]}
        if len(results) > 1:
            info[name]["stderrs"] = {f"{key}_stderr": sem(v) for key, v in shown.items()}
            info[name]["metric_stderrs"] = {key: sem(v) for key, v in values.items()}
    return info


def write_result_files(folder, info, per_seed, texts, source):
    """Writes a run's results into its folder, final_info.json last and whole or not at all.

    info: final_info.json's content; raises ValueError where a number in it is not finite.
    per_seed: {"seed_0": {evaluation: result}, ...}, all_results.npy's content.
    texts: {path in the folder: text} of further files.
    source: the text of the script as it ran, kept with the sources of the rooms.
    """
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for path in folder.rglob("*.safetensors"):  # written readable for their owner alone
        path.chmod(0o644)
    np.save(folder / "all_results.npy", per_seed)
    write_sources(folder, source)
    with replacing(folder / "final_info.json") as partial:
        partial.write_text(json.dumps(info, indent=1, allow_nan=False), encoding="utf-8")
