"""Whole runs of every variant, and what they leave."""
import functools
import json
import math
import zlib

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from copies import IN_SAELENS, PROJECT, results, ROOMS, SMALL, VARIANTS
from lab import COMMON, succeeded, TRAINED
from runtime.files import fingerprint

BY_DOCUMENT = {"core", "temporal", "probes", "unlearning", "hierarchy"}          # evaluations with per_sequence
WITHOUT_HEADLINES = {"recovery", "composition", "detection"}


def numbers(value):
    """Every number in nested results, with the path to it."""
    if isinstance(value, (dict, list)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from ((f"{key}.{path}", number) for path, number in numbers(part))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield "", value


@pytest.fixture(scope="module")
def runs(lab):
    """name -> (folder, Finished) of the runs of TRAINED."""
    return {name: lab.trained(name) for name in TRAINED}


def test_every_variant_is_tested_here(E):
    assert set(VARIANTS) == set(E.SAE_VARIANTS)
    assert set(VARIANTS) <= set(TRAINED)
    headlines = [E.TRAINING_HEADLINES, *(evaluation.headlines for evaluation in E.EVALUATIONS.values())]
    assert sum(map(len, headlines)) <= 16


@pytest.mark.parametrize("name", TRAINED)
def test_a_whole_run(runs, name):
    folder, finished = runs[name]
    succeeded(finished)
    assert "://" not in finished.stdout
    made, wanted = folder / "run_1", dict(SAE_VARIANT=name, SEEDS=(0,)) | SMALL | COMMON | TRAINED[name]
    seeds = wanted["SEEDS"]
    files = {"final_info.json", "all_results.npy", "experiment.py", "sources.zip", "sae_weights.safetensors", "trained_sae.safetensors", "cfg.json",
             "features.json", "timing.json", "summary.md"}
    assert files <= {path.name for path in made.iterdir()}
    assert (made / "experiment.py").read_bytes() == (folder / "experiment.py").read_bytes()
    assert (made / "sae_weights.safetensors").stat().st_mode & 0o777 == 0o644     # others may read them too
    kept = {"experiment.py", *ROOMS, "run_1", "stdout.log", "stderr.log", "outcome.json", "__pycache__"}
    assert {path.name for path in folder.iterdir()} <= kept

    info, headlines = results(folder), 0
    assert list(info) == ["training", *wanted["EVALS"]]
    for evaluation, entry in info.items():
        assert isinstance(entry, dict) and isinstance(entry["means"], dict)
        assert entry["means"] or evaluation in WITHOUT_HEADLINES
        headlines += len(entry["means"])
        assert all(type(value) is float and math.isfinite(value) for value in entry["means"].values())
        assert all(type(value) is float and math.isfinite(value) for value in entry["metrics"].values())
        assert len(entry["final_info_dict"]) == len(entry["means"])
        assert ("stderrs" in entry) == (len(seeds) > 1)
        for metric, values in entry["final_info_dict"].items():
            mean = entry["means"][f"{metric}_mean"]
            assert len(values) == len(seeds) and mean == pytest.approx(np.mean(values), rel=1e-12)
            assert entry["metrics"][metric] == mean
            if len(seeds) > 1:
                error = np.std(values, ddof=1) / math.sqrt(len(seeds))
                assert entry["stderrs"][f"{metric}_stderr"] == pytest.approx(error, rel=1e-9)
        assert len(entry["curves"]) == len(entry["per_sequence"]) == len(seeds)
        for table in entry["per_sequence"]:
            assert bool(table) == (evaluation in BY_DOCUMENT)
            assert {len(values) for values in table.values()} <= {24}
    assert 0 < headlines <= 16
    assert all(math.isfinite(number) for _, number in numbers(info))
    everything = np.load(made / "all_results.npy", allow_pickle=True).item()
    assert list(everything) == [f"seed_{seed}" for seed in seeds]
    assert all(result["core"]["metrics"]["l0"] > 0 for result in everything.values())
    config = info["training"]["config"]
    recorded = {constant: list(value) if type(value) is tuple else value for constant, value in wanted.items()}
    assert {constant: config[constant] for constant in recorded} == recorded
    assert config["steps_done"] == config["steps_planned"] and sum(config["steps_done"]) > 50
    assert config["budget_hit"] is False
    d_sae = wanted.get("LEVEL_WIDTHS", (0, 192 * wanted["EXPANSION"]))[1]
    assert config["d_in"] == 192 and config["d_sae"] == d_sae and config["layer"] == 2
    summary = (made / "summary.md").read_text().strip()
    assert summary in finished.stdout and "\n" not in summary
    assert summary.startswith(f"`{wanted['SAE_VARIANT']}`, {d_sae} latents with TARGET_L0 = {wanted['TARGET_L0']}, was trained on")
    for name in (metric.removesuffix("_mean") for entry in info.values() for metric in entry["means"]):
        value = next(entry["metrics"][name] for entry in info.values() if name in entry["metrics"])
        assert f" {round(value, 4):.4g}" in summary, name              # each headline, beside its controls
    assert f"lookup table of token pairs explains {info['core']['metrics']['bigram_explained_variance']:.4f}"[:-1] in summary
    timing = json.loads((made / "timing.json").read_text())
    assert all(value >= 0 for _, value in numbers(timing)) and list(numbers(timing))


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_did_something(runs, variant):
    """In a few steps every variant learns to beat the untrained dictionary, and loses less than the mean does."""
    info = results(runs[variant][0])
    metrics, training = info["core"]["metrics"], info["training"]["curves"][0]["training"]
    assert metrics["explained_variance"] > metrics["untrained_explained_variance"] + 0.1
    assert metrics["ce_model"] < metrics["ce_sae"] < metrics["ce_mean"]
    assert metrics["permuted_decoder_explained_variance"] < metrics["explained_variance"] - 0.1
    assert training["val_loss"][-1] < training["val_loss"][0]
    assert len(training["step"]) == len(training["losses"]["reconstruction"]) == len(training["l0"])
    if variant in ("topk", "batch_topk", "matryoshka"):
        assert metrics["l0"] == pytest.approx(8, rel=0.01 if variant == "topk" else 0.3)     # thresholds settle later


def reconstruct(weights, cfg, x):
    """Latents and reconstruction of raw activations x [n, d_in] by SAELens's inference formulas."""
    x_in = x - weights["b_dec"]
    if cfg["architecture"] == "gated":
        gate = x_in @ weights["W_enc"] + weights["b_gate"] > 0
        z = gate * torch.relu(x_in @ (weights["W_enc"] * weights["r_mag"].exp()) + weights["b_mag"])
    else:
        pre = x_in @ weights["W_enc"] + weights["b_enc"]
        if cfg["architecture"] == "topk":
            top = pre.topk(cfg["k"], dim=1)
            z = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
        elif cfg["architecture"] == "jumprelu":
            z = pre.relu() * (pre > weights["threshold"])
        else:
            assert cfg["architecture"] == "standard"
            z = pre.relu()
    return z, z @ weights["W_dec"] + weights["b_dec"]


@functools.cache
def heldout(cache, data_hash, layer):
    """Returns the model's own activations of the held-out tokens, float64 [token, d_in]; which tokens count
    [window, position]; and the document of each window."""
    files = [np.load(path) for path in (cache / "tokens").glob("*.npz")]
    windows = next(f for f in files if fingerprint(zlib.crc32(f["tokens"].tobytes())) == data_hash)
    tokens, lengths, documents = (windows[name][int(windows["n_train"]):] for name in ("tokens", "lengths", "doc_ids"))
    model = transformers.AutoModelForCausalLM.from_pretrained(PROJECT / "embedded" / "model", dtype=torch.float32)
    with torch.no_grad():
        states = model(torch.from_numpy(tokens).long(), output_hidden_states=True).hidden_states
    position = np.arange(tokens.shape[1])
    counts = torch.from_numpy((position > 0) & (position < lengths[:, None]))
    return states[layer + 1][counts].double(), counts, documents


@pytest.mark.parametrize("variant", IN_SAELENS)
def test_exported_weights_give_the_reported_figures(lab, runs, variant):
    """From the files alone, on the language model's own activations, in float64."""
    folder, _ = runs[variant]
    info, cfg = results(folder), json.loads((folder / "run_1" / "cfg.json").read_text())
    entry, config = info["core"], info["training"]["config"]
    x, counts, documents = heldout(lab.cache, config["data_hash"], config["layer"])
    assert cfg["metadata"]["hook_name"] == f"blocks.{config['layer']}.hook_resid_post"
    variance = (x - x.mean(0)).square().sum(1).mean().item()
    first = np.sort(np.unique(documents, return_index=True)[1])
    for i, seed_folder in enumerate([folder / "run_1"] + [folder / "run_1" / "seed_5"] * (len(config["SEEDS"]) - 1)):
        weights = {name: value.double() for name, value in load_file(seed_folder / "sae_weights.safetensors").items()}
        assert weights["W_enc"].shape == (cfg["d_in"], cfg["d_sae"]) == weights["W_dec"].T.shape
        z, x_hat = reconstruct(weights, cfg, x)
        error, l0 = torch.full(counts.shape, torch.nan).double(), torch.full(counts.shape, torch.nan).double()
        error[counts], l0[counts] = (x - x_hat).square().sum(1) / variance, (z != 0).sum(1).double()
        sequences = entry["per_sequence"][i]
        np.testing.assert_allclose(error[first].nanmean(1), sequences["fvu"], rtol=2e-3)
        np.testing.assert_allclose(l0[first].nanmean(1), sequences["l0"], atol=0.04)
        reported = entry["final_info_dict"]
        assert 1 - error.nanmean().item() == pytest.approx(reported["explained_variance"][i], abs=5e-4)
        assert l0.nanmean().item() == pytest.approx(reported["l0"][i], rel=2e-3)


def test_exported_weights_of_the_attention_give_its_latents(E, lab, runs, monkeypatch):
    """From the file alone, with the class: the model's own activations, through weights that take them."""
    folder, _ = runs["temporal"]
    weights = load_file(folder / "run_1" / "sae_weights.safetensors")
    scale, mean = weights["input_scale"].item(), weights["input_mean"]
    d_in, d_sae = weights["W_enc"].shape
    monkeypatch.setattr(E, "WINDOW", len(weights["P"]))
    config = results(folder)["training"]["config"]
    sae = E.Temporal(d_in, d_sae, config["TARGET_L0"]).eval()
    own = {name: weights[name] for name in dict(sae.named_parameters()) if name in weights}
    own |= {"W_enc": weights["W_enc"] * scale, "W_dec": weights["W_dec"] / scale,
            "b_dec": (weights["b_dec"] - mean) / scale, "threshold": weights["threshold"][0]}
    assert set(own) == {*dict(sae.named_parameters()), "threshold"}
    sae.load_state_dict(own, strict=False)
    sae.attends = True
    files = [np.load(path) for path in (lab.cache / "tokens").glob("*.npz")]
    windows = next(f for f in files if fingerprint(zlib.crc32(f["tokens"].tobytes())) == config["data_hash"])
    n, lengths = int(windows["n_train"]), torch.from_numpy(windows["lengths"])
    tokens, mask = torch.from_numpy(windows["tokens"][n:]).long(), torch.arange(1, 32) < lengths[n:, None]
    model = transformers.AutoModelForCausalLM.from_pretrained(PROJECT / "embedded" / "model", dtype=torch.float32)
    with torch.no_grad():
        x = model(tokens, output_hidden_states=True).hidden_states[config["layer"] + 1][:, 1:]
        batch = E.Batch((x - mean) / scale, tokens[:, 1:], torch.arange(len(x)), torch.arange(1, 32), mask)
        x_hat = sae.decode(sae.encode(batch)) * scale + mean
    error = (x - x_hat)[mask].double().square().sum(1).mean()
    variance = (x[mask].double() - x[mask].double().mean(0)).square().sum(1).mean()
    reported = results(folder)["core"]["metrics"]["explained_variance"]
    assert 1 - (error / variance).item() == pytest.approx(reported, abs=5e-4) and (weights["P"] != 0).any()
