"""The page on which people look at a run's latents and rate them, and statistics of ratings."""
import hashlib
import json
from collections import defaultdict
from contextlib import suppress
from typing import NamedTuple

import numpy as np
from scipy.stats import bootstrap, permutation_test

from pages.templates import filled

MOST_BYTES = 3_000_000          # of a page
SCHEMA = "temporal-sae-runner/ratings/1"
SCORES = {"no": 0.0, "partly": 0.5, "yes": 1.0}
LEAST_RATED = 5                 # latents of a run, before means, intervals and tests are made
BASELINE = "run_0"              # its latents are mixed into those to be rated on every page
RESAMPLES = 10_000              # permutations of a test, draws of a bootstrap
BATCH = 1_000                   # of these at a time: a few megabytes


class Difference(NamedTuple):
    """A difference of two means."""
    mean: float
    low: float          # ends of its 95 % bootstrap interval
    high: float
    p: float            # two-sided, of a permutation test


class RatedMean(NamedTuple):
    """How the latents of a run were rated."""
    values: np.ndarray  # [latents] means over raters
    low: float          # ends of the 95 % bootstrap interval of their mean
    high: float


# ---- The page ------------------------------------------------------------------------------------
def load_features(folder):
    """Returns the content of folder/features.json with the "hash" by which ratings refer to it;
    None if there is none, or an unreadable one, which is printed."""
    path = folder / "features.json"
    if not path.exists():
        return None
    content = path.read_bytes()
    try:
        features = json.loads(content)
    except ValueError as error:
        print(f"{folder.name}: its features.json cannot be used: {error}")
        return None
    return features | {"hash": hashlib.sha256(content).hexdigest()[:16]}


def rated_latents(features):
    """Returns the entries of the latents that people rate: those drawn at random."""
    return [entry for entry in features["latents"] if "random" in entry.get("why", ["random"])]


def rating_part(features):
    """Returns features with only what rating shows of each latent that is rated."""
    latents = []
    for entry in rated_latents(features):
        passages = entry["passages"]
        part = {key: entry[key] for key in ("latent", "max", "promoted", "question")
                if key in entry}
        latents.append(part | {"passages": {
            "top": passages["top"][:6],
            "stratified": [band[:1] for band in passages["stratified"]]}})
    kept = {key: features[key] for key in ("strings", "files") if key in features}
    return kept | {"latents": latents}


def page_html(folder, label, config, metrics):
    """Returns the page of the run in `folder`; None without features.json.

    label: the run's name; config, metrics: its constants and metrics by name.
    """
    features, baseline = load_features(folder), load_features(folder.parent / BASELINE)
    if features is None:
        return None
    known = {"explained_variance": "explained variance {:.3g}", "l0": "L0 {:.3g}",
             "loss_increase_nats": "loss {:+.3g} nats"}
    about = [folder.name, config.get("MODEL_NAME", "model"), f"after block {config.get('layer')}"]
    about += [text.format(metrics[key]) for key, text in known.items() if key in metrics]
    data = {"run": folder.name, "label": label, "about": ", ".join(about), "made": made_of(config),
            "hash": features["hash"], "length": config.get("CONTEXT_LENGTH", 1) - 1,
            "lags": config.get("STABILITY_LAGS"), "d_in": config.get("d_in"),
            "least": LEAST_RATED, "labels": load_labels(folder), "features": features}
    if baseline and folder.name != BASELINE:
        data["baseline"] = {"run": BASELINE, "hash": baseline["hash"],
                            "features": rating_part(baseline)}
    return filled("features.html", data)


def made_of(config):
    """Returns a sentence on what was trained on what; "" where a run has not recorded it."""
    names = ("SAE_VARIANT", "d_sae", "TARGET_L0", "MODEL_NAME", "layer", "d_in", "DATASET")
    if any(name not in config for name in names):
        return ""
    variant, d_sae, l0, model, layer, d_in, data = (config[name] for name in names)
    return (f"{variant}: {d_sae:,} latents, {l0} of them active on a token, read the residual "
            f"stream of {model} after block {layer} ({d_in:,} dimensions). Data: {data}.")


def write_page(folder, label, config, metrics):
    """Writes folder/features.html, see `page_html`; prints its size, or why it is not written."""
    name, text = f"{folder.name}/features.html", page_html(folder, label, config, metrics)
    if text is None:
        print(f"{name}: not written, there is no {folder.name}/features.json")
        return
    size = len(text.encode())
    if size > MOST_BYTES:
        print(f"{name}: not written, it would be larger than {MOST_BYTES / 1e6:g} MB")
        return
    (folder / "features.html").write_text(text, encoding="utf-8")
    print(f"{name}: {size / 1e6:.2f} MB")


# ---- Files of ratings ----------------------------------------------------------------------------
def check_answers(answers, features):
    """Raises ValueError at the first of `answers` that does not fit a latent of `features`
    {run: load_features of it}."""
    options = {(run, entry["latent"]): len(entry.get("question", {}).get("passages", ()))
               for run, content in features.items() for entry in rated_latents(content)}
    for row in answers:
        valid = isinstance(row, dict) and (row.get("run"), row.get("latent")) in options
        if valid:
            choice, n = row.get("choice"), options[row["run"], row["latent"]]
            valid = row.get("score") in (*SCORES, None) and (
                choice is None or type(choice) is int and 0 <= choice < n)
        if not valid:
            raise ValueError(f"{str(row)[:80]} is no answer to its page")


def check_ratings(content, folder):
    """Raises ValueError with the reason why `content` is no file of ratings made on the page of
    the run in `folder`; returns {run: load_features of it} of the runs whose latents it rates."""
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ValueError(f"its schema is not {SCHEMA}")
    hashes, answers = content.get("hashes"), content.get("answers")
    if content.get("run") != folder.name or not isinstance(hashes, dict) or (
            folder.name not in hashes):
        raise ValueError(f"it rates {content.get('run')!r}")
    if not isinstance(content.get("rater_id"), str) or not isinstance(answers, list):
        raise ValueError("it has no rater_id or no list of answers")
    if not answers:
        raise ValueError("it holds no answers")
    if set(hashes) - {folder.name, BASELINE}:
        raise ValueError(f"it rates latents of other runs than {folder.name} and {BASELINE}")

    features = {run: load_features(folder.parent / run) for run in hashes}
    for run, value in hashes.items():
        if not features[run] or value != features[run]["hash"]:
            raise ValueError(f"it rates other latents of {run} than {run}/features.json has")
    check_answers(answers, features)
    return features


def add_answers(ratings, content, features):
    """Adds the answers of a checked file of ratings to `ratings`, see `load_ratings`."""
    right_options = {(run, entry["latent"]): entry["question"]["answer"]
                     for run, part in features.items() for entry in part["latents"]
                     if "question" in entry}
    rater = content["rater_id"]
    for row in content["answers"]:
        run, latent = row["run"], row["latent"]
        if row.get("score") is not None:
            ratings[run]["score"][latent][rater] = SCORES[row["score"]]
        if row.get("choice") is not None:
            is_right = row["choice"] == right_options[run, latent]
            ratings[run]["correct"][latent][rater] = float(is_right)


def read_ratings(path):
    """Returns the content of a file of ratings, and {run: load_features of it} of the runs whose
    latents it rates; raises OSError, ValueError or TypeError where it is none, see
    `check_ratings`."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return content, check_ratings(content, path.parent)


def load_labels(folder):
    """Returns {latent: the different labels that people gave it} of the run in `folder`, from those
    of its files of ratings that can be used."""
    labels = defaultdict(dict)
    for path in sorted(folder.glob("human_ratings*.json")):
        with suppress(OSError, ValueError, TypeError):
            for row in read_ratings(path)[0]["answers"]:
                label = row.get("label")
                if row["run"] == folder.name and isinstance(label, str) and label.strip():
                    labels[row["latent"]][label.strip()] = None
    return {latent: [*found] for latent, found in labels.items()}


def load_ratings(folders):
    """Returns {run: {"score": answers, "correct": answers}}, answers being {latent: {rater: value
    in [0, 1]}}, of all human_ratings*.json in folders of runs; prints how many latents each file
    rates, or why it is skipped."""
    ratings = defaultdict(lambda: {"score": defaultdict(dict), "correct": defaultdict(dict)})
    for path in [path for folder in folders for path in sorted(folder.glob("human_ratings*.json"))]:
        name = f"{path.parent.name}/{path.name}"
        try:
            content, features = read_ratings(path)
        except (OSError, ValueError, TypeError) as error:
            print(f"{name}: skipped, {error}")
            continue
        add_answers(ratings, content, features)
        rated = sum(row.get("score") is not None or row.get("choice") is not None
                    for row in content["answers"])
        print(f"{name}: {rated} latents rated")
    return dict(ratings)


# ---- Statistics of ratings -----------------------------------------------------------------------
def mean_difference(values, baseline, axis):
    """Returns the difference of two means along an axis."""
    return values.mean(axis) - baseline.mean(axis)


def absolute_mean_difference(values, baseline, axis):
    """Returns its absolute value, the statistic of a two-sided test."""
    return np.abs(mean_difference(values, baseline, axis))


def bootstrap_interval(samples, statistic):
    """Returns the ends of the 95 % percentile bootstrap interval of a statistic of samples, each
    [n] with n > 1 and resampled on its own."""
    drawn = bootstrap(samples, statistic, method="percentile", vectorized=True, batch=BATCH,
                      n_resamples=RESAMPLES, rng=np.random.default_rng(0))
    return drawn.confidence_interval


def mean_by_latent(answers):
    """Returns the RatedMean of answers {latent: {rater: value}}; None with fewer than LEAST_RATED
    latents."""
    if len(answers) < LEAST_RATED:
        return None
    values = np.array([np.mean([*by_rater.values()]) for by_rater in answers.values()])
    return RatedMean(values, *bootstrap_interval((values,), np.mean))


def unpaired_test(values, baseline):
    """Returns the Difference of the means of two sets of latents, values [n] and baseline [m]; p:
    permutations of the latents between the two."""
    permuted = permutation_test(
        (values, baseline), absolute_mean_difference, permutation_type="independent",
        alternative="greater", vectorized=True, batch=BATCH, n_resamples=RESAMPLES,
        rng=np.random.default_rng(0))
    low, high = bootstrap_interval((values, baseline), mean_difference)
    return Difference(values.mean() - baseline.mean(), low, high, permuted.pvalue)


def agreement(answers):
    """Returns Krippendorff's ordinal alpha of answers {latent: {rater: value}}; None if fewer than
    LEAST_RATED latents were rated by two people, or all of them agree on one value."""
    raters = sorted({rater for by_rater in answers.values() for rater in by_rater})
    if len(raters) < 2:
        return None
    table = np.array([[by_rater.get(rater, np.nan) for by_rater in answers.values()]
                      for rater in raters])
    compared = table[:, np.isfinite(table).sum(0) > 1]
    if compared.shape[1] < LEAST_RATED or len(np.unique(compared[np.isfinite(compared)])) < 2:
        return None
    import krippendorff         # here: needed only where people have rated
    return krippendorff.alpha(reliability_data=table, level_of_measurement="ordinal")
