"""Whole runs, started as a harness starts them: every variant, killed and resumed runs, mistakes of all kinds."""
import json
import math
import re
import subprocess
import time
import zlib

import kills
import numpy as np
import pytest
import torch
import transformers
from copies import (PROJECT, TAIL, copy_template, edit, results, run, run_in_turn, start, substitute, timeless,
                    write_text_data)
from safetensors.torch import load_file

IN_SAELENS = ("standard", "topk", "batch_topk", "jumprelu", "gated", "matryoshka", "tsae")
VARIANTS = (*IN_SAELENS, "temporal", "temporal_adaptation", "temporal_context", "compositional", "hierarchical")


class Lab:
    """One cache and one data set for all runs here, and each variant's run, done once."""

    def __init__(self, root):
        self.root, self.cache, self.runs = root, root / "cache", {}
        self.data = str(write_text_data(root / "library.jsonl"))

    def copy(self, name, **constants):
        return copy_template(self.root / name, **{"DATASET": self.data} | constants)

    def variant(self, name):
        """(folder, Finished) of a variant's run; "standard" on the embedded corpus, "topk" with two seeds."""
        if name not in self.runs:
            special = {"standard": dict(DATASET="embedded"), "topk": dict(SEEDS=(3, 5))}.get(name, {})
            folder = self.copy(name, SAE_VARIANT=name, **special)
            self.runs[name] = folder, run(folder, self.cache)
        return self.runs[name]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab(tmp_path_factory.mktemp("runs"))


def succeeded(finished):
    assert finished.code == 0, finished.stderr
    assert finished.stderr == ""                     # it is no terminal: no bars, and nothing to say
    return finished


def numbers(value):
    """Every number in nested results, with the path to it."""
    if isinstance(value, (dict, list)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from ((f"{key}.{path}", number) for path, number in numbers(part))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield "", value


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- what a run leaves -----------------------------------------------------------------------------------------------
def test_every_variant_is_tested_here(E):
    assert set(VARIANTS) == set(E.SAE_VARIANTS)
    assert sum(len(means) for *_, means in E.EVALUATIONS.values()) <= 16


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_whole_run(lab, variant):
    folder, finished = lab.variant(variant)
    succeeded(finished)
    assert "://" not in finished.stdout
    made, seeds = folder / "run_1", 2 if variant == "topk" else 1
    wanted = {"final_info.json", "all_results.npy", "experiment.py", "sae_weights.safetensors", "cfg.json",
              "timing.json", "summary.md"}
    assert wanted <= {path.name for path in made.iterdir()}
    assert (made / "experiment.py").read_bytes() == (folder / "experiment.py").read_bytes()
    assert (made / "sae_weights.safetensors").stat().st_mode & 0o777 == 0o644     # others may read them too
    kept = {"experiment.py", "embedded", "run_1", "stdout.log", "stderr.log", "__pycache__"}
    assert {path.name for path in folder.iterdir()} <= kept

    info, headlines = results(folder), 0
    for entry in info.values():
        assert isinstance(entry, dict) and isinstance(entry["means"], dict) and entry["means"]
        headlines += len(entry["means"])
        assert all(type(value) is float and math.isfinite(value) for value in entry["means"].values())
        assert all(type(value) is float and math.isfinite(value) for value in entry["metrics"].values())
        assert len(entry["final_info_dict"]) == len(entry["means"])
        assert ("stderrs" in entry) == (seeds > 1)
        for name, values in entry["final_info_dict"].items():
            assert len(values) == seeds and entry["means"][f"{name}_mean"] == pytest.approx(np.mean(values), rel=1e-12)
            assert entry["metrics"][name] == entry["means"][f"{name}_mean"]
            if seeds > 1:
                error = np.std(values, ddof=1) / math.sqrt(seeds)
                assert entry["stderrs"][f"{name}_stderr"] == pytest.approx(error, rel=1e-9)
        assert len(entry["curves"]) == len(entry["per_sequence"]) == seeds
        for table in entry["per_sequence"]:
            assert table and {len(values) for values in table.values()} == {24}
    assert 0 < headlines <= 16
    assert all(math.isfinite(number) for _, number in numbers(info))
    everything = np.load(made / "all_results.npy", allow_pickle=True).item()
    assert len(everything) == seeds
    for seed, result in zip(((3, 5) if seeds > 1 else (0,)), everything.values()):
        assert f"seed_{seed}" in everything and result["core"]["metrics"]["l0"] > 0
    config = info["core"]["config"]
    assert config["SAE_VARIANT"] == variant and config["TARGET_L0"] == 8
    assert config["SEEDS"] == ([3, 5] if seeds > 1 else [0])
    assert config["steps_done"] == config["steps_planned"] and sum(config["steps_done"]) > 50
    assert config["budget_hit"] is False
    assert config["d_in"] == 192 and config["d_sae"] == 384 and config["layer"] == 2
    summary = (made / "summary.md").read_text().strip()
    assert summary in finished.stdout and "\n" not in summary and summary.startswith(f"{variant}, 384 latents with TARGET_L0 8")
    for entry in info.values():
        for name, value in entry["means"].items():
            assert f"{name.removesuffix('_mean')} {value:.4g}" in summary
    timing = json.loads((made / "timing.json").read_text())
    assert all(value >= 0 for _, value in numbers(timing)) and list(numbers(timing))


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_did_something(lab, variant):
    """In a few steps every variant learns to beat the untrained dictionary, and loses less than the mean does."""
    folder, _ = lab.variant(variant)
    entry = results(folder)["core"]
    metrics, training = entry["metrics"], entry["curves"][0]["training"]
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


@pytest.mark.parametrize("variant", IN_SAELENS)
def test_exported_weights_give_the_reported_figures(E, lab, variant):
    """From the files alone, on the language model's own activations, in float64."""
    folder, _ = lab.variant(variant)
    entry, cfg = results(folder)["core"], json.loads((folder / "run_1" / "cfg.json").read_text())
    config = entry["config"]
    files = [np.load(path) for path in (lab.cache / "tokens").glob("*.npz")]
    windows = next(f for f in files if E.fingerprint(zlib.crc32(f["tokens"].tobytes())) == config["data_hash"])
    heldout = slice(int(windows["n_train"]), None)
    tokens, lengths, documents = (windows[name][heldout] for name in ("tokens", "lengths", "doc_ids"))
    model = transformers.AutoModelForCausalLM.from_pretrained(PROJECT / "embedded" / "model", dtype=torch.float32)
    with torch.no_grad():
        states = model(torch.from_numpy(tokens).long(), output_hidden_states=True).hidden_states
    assert cfg["metadata"]["hook_name"] == f"blocks.{config['layer']}.hook_resid_post"
    position = np.arange(tokens.shape[1])
    counts = torch.from_numpy((position > 0) & (position < lengths[:, None]))
    x = states[config["layer"] + 1][counts].double()
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


def test_exported_weights_of_the_attention_give_its_latents(E, lab, monkeypatch):
    """From the file alone, with the class: the model's own activations, through weights that take them."""
    folder, _ = lab.variant("temporal")
    weights = load_file(folder / "run_1" / "sae_weights.safetensors")
    scale, mean = weights["input_scale"].item(), weights["input_mean"]
    d_in, d_sae = weights["W_enc"].shape
    monkeypatch.setattr(E, "WINDOW", len(weights["P"]))
    config = results(folder)["core"]["config"]
    sae = E.Temporal(d_in, d_sae, config["TARGET_L0"]).eval()
    own = {name: weights[name] for name in dict(sae.named_parameters()) if name in weights}
    own |= {"W_enc": weights["W_enc"] * scale, "W_dec": weights["W_dec"] / scale,
            "b_dec": (weights["b_dec"] - mean) / scale, "threshold": weights["threshold"][0]}
    assert set(own) == {*dict(sae.named_parameters()), "threshold"}
    sae.load_state_dict(own, strict=False)
    sae.attends = True
    files = [np.load(path) for path in (lab.cache / "tokens").glob("*.npz")]
    windows = next(f for f in files if E.fingerprint(zlib.crc32(f["tokens"].tobytes())) == config["data_hash"])
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


# --- the same command again ------------------------------------------------------------------------------------------
def test_the_same_command_again(lab):
    """The same numbers, a new folder in place of the old, and what was put beside the results is kept."""
    folder, _ = lab.variant("standard")
    made = folder / "run_1"
    before, weights = results(folder), (made / "sae_weights.safetensors").read_bytes()
    (made / "human_ratings_a.json").write_text('{"mine": 1}')
    (made / "notes").mkdir()
    (made / "notes" / "a.txt").write_text("kept")
    (made / "timing.json").write_text("{}")
    finished = succeeded(run(folder, lab.cache))
    assert "collected" not in finished.stdout and "tokenising" not in finished.stdout
    after = results(folder)
    assert timeless(after) == timeless(before) and after != before
    assert (made / "sae_weights.safetensors").read_bytes() == weights
    assert (made / "human_ratings_a.json").read_text() == '{"mine": 1}'
    assert (made / "notes" / "a.txt").read_text() == "kept"
    assert (made / "timing.json").read_text() != "{}"
    assert {path.name for path in folder.iterdir()} & {"run_1.partial", "run_1.replaced"} == set()


def kill_at_step(E, lab, folder, seed, step):
    """Starts the run and kills it once the checkpoint of `seed` has come to `step`; what it had printed."""
    checkpoint = f"{E.fingerprint(str(folder / 'run_1'))}/*/seed_{seed}.pt"
    process, reached = start(folder, lab.cache), 0
    while reached < step:
        assert not process.ended(), f"it ended before step {step} of seed {seed}: {process.wait()}"
        time.sleep(0.01)
        for path in (lab.cache / "runs").glob(checkpoint):
            reached = torch.load(path, weights_only=True)["plan"]["step"]
    process.kill()
    finished = process.wait()
    assert finished.code == -9 and not (folder / "run_1").exists()
    return finished.stdout


SETTINGS = kills.SETTINGS


@pytest.fixture(scope="module")
def unbroken(lab):
    """A run with checkpoints that nothing interrupted."""
    folder = lab.copy("unbroken", **SETTINGS)
    succeeded(run(folder, lab.cache))
    return folder


def test_a_run_killed_at_random_moments_ends_with_the_same_numbers(lab, unbroken, tmp_path):
    folder = lab.copy("killed", **SETTINGS)
    told = kills.kill_and_carry_on(folder, tmp_path / "cache", unbroken, ("collecting", "training 0", "evaluation 0", "training 1"))
    assert sum(said == "killed" for _, said in told) >= 3, told        # one may come too late
    assert {path.name for path in folder.iterdir()} & {"run_1.partial", "run_1.replaced"} == set()


def test_a_run_killed_in_its_last_stage_ends_with_the_same_numbers(E, lab):
    """What earlier stages switched on is on again."""
    constants, runs = dict(SAE_VARIANT="temporal", CHECKPOINT_SECONDS=0), []
    for name in ("temporal_unbroken", "temporal_killed"):
        folder = lab.copy(name, **constants)
        if name == "temporal_killed":
            steps = results(runs[0])["core"]["config"]["steps_done"]
            kill_at_step(E, lab, folder, 0, sum(steps[:2]) + 2)
        succeeded(run(folder, lab.cache))
        runs.append(folder)
    assert timeless(results(runs[0])) == timeless(results(runs[1]))


def test_other_constants_after_a_kill_start_afresh(E, lab, unbroken):
    folder = lab.copy("changed", TARGET_L0=5, **SETTINGS)
    kill_at_step(E, lab, folder, 0, 6)
    edit(folder, TARGET_L0=8)
    finished = succeeded(run(folder, lab.cache))
    assert "starting afresh" in finished.stdout and "carrying on" not in finished.stdout
    kills.same_results(folder, unbroken)


def test_a_failure_at_the_end_loses_nothing(lab):
    """A full disk while the results are written: the completed run stays, and the next attempt need not train again."""
    folder = lab.copy("full", SAE_VARIANT="topk")
    substitute(folder, 'info = write_results(', 'full_disk()\n                info = write_results(')
    substitute(folder, "def write_results(", """def full_disk():
    if (HERE / "full").exists():
        raise OSError(28, "No space left on device")


def write_results(""")
    (folder / "run_1").mkdir()
    for name in ("final_info.json", "human_ratings.json"):
        (folder / "run_1" / name).write_text('{"earlier": 1}')
    before = contents(folder / "run_1")
    (folder / "full").touch()
    finished = run(folder, lab.cache)
    assert finished.code not in (0, None), finished.stdout
    assert "No space left" in finished.tail and "writing the results" in finished.tail
    assert re.search(r"free disk space|SAE_CACHE_DIR", finished.tail) and "Traceback" not in finished.stderr
    assert contents(folder / "run_1") == before and not (folder / "run_1.partial").exists()
    (folder / "full").unlink()
    finished = succeeded(run(folder, lab.cache))
    assert "carrying on at step" in finished.stdout
    after = contents(folder / "run_1")
    assert after["human_ratings.json"] == before["human_ratings.json"]
    others, wanted = results(folder)["core"], results(lab.variant("topk")[0])["core"]
    assert others["means"].keys() == wanted["means"].keys()


# --- a folder takes another's place (without a run) -------------------------------------------------------------------
def publish(E, out_dir, text):
    with E.corpus.publishing(out_dir, E.HERE) as partial:
        (partial / "final_info.json").write_text(text)


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_report_takes_any_text(E):
    """Percent signs and braces in a setting are text."""
    error = E.RunnerError("no such variant")
    error.add_note("checking the settings")
    about = "SAE_VARIANT = 'top%s{k}%'"
    assert E.corpus.report(error, E.__file__, about, E.SAE).splitlines() == [
        f"experiment.py failed in: checking the settings; {about}", "no such variant"]


def test_publishing_replaces_and_keeps(E, tmp_path):
    out_dir = tmp_path / "deep" / "run_1"
    publish(E, out_dir, "first")
    (out_dir / "human_ratings.json").write_text("ratings")
    publish(E, out_dir, "second")
    assert (out_dir / "final_info.json").read_text() == "second"
    assert (out_dir / "human_ratings.json").read_text() == "ratings"
    with pytest.raises(ZeroDivisionError), E.corpus.publishing(out_dir, E.HERE) as partial:
        (partial / "final_info.json").write_text("third")
        1 / 0
    assert (out_dir / "final_info.json").read_text() == "second"
    assert listing(out_dir.parent) == ["run_1"]


@pytest.mark.parametrize("left", [
    {"run_1": "first", "run_1.partial": "second"},               # killed before the old folder moves away
    {"run_1.replaced": "first", "run_1.partial": "second"},      # between the two renames
    {"run_1": "second", "run_1.replaced": "first"},              # before the old folder is deleted
    {"run_1": "first", "run_1.partial": "second", "run_1.replaced": "older"},
], ids=lambda left: " ".join(left))
@pytest.mark.parametrize("fails", [False, True])
def test_a_kill_while_publishing_loses_nothing(E, tmp_path, left, fails):
    for name, text in left.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "final_info.json").write_text(text)
        (tmp_path / name / "human_ratings.json").write_text("ratings")
    completed = left.get("run_1") or left["run_1.replaced"]
    if fails:
        with pytest.raises(ZeroDivisionError), E.corpus.publishing(tmp_path / "run_1", E.HERE):
            1 / 0
    else:
        publish(E, tmp_path / "run_1", "third")
    assert (tmp_path / "run_1" / "final_info.json").read_text() == (completed if fails else "third")
    assert (tmp_path / "run_1" / "human_ratings.json").read_text() == "ratings"
    assert fails or listing(tmp_path) == ["run_1"]


# --- the time budget -------------------------------------------------------------------------------------------------
def test_a_variant_50_times_slower_keeps_the_time_budget(lab):
    """Every stage of every seed shrinks, none vanishes, and the results say so."""
    folder = lab.copy("hurry", SAE_VARIANT="slow", TIME_BUDGET_MINUTES=1.2, EPOCHS_SCALE=20.0, SEEDS=(0, 1), EVALS=("core",))
    substitute(folder, "SAE_VARIANTS = {", '''class Slow(TopK):
    """TopK, encoded 50 times."""
    curriculum = (Stage("autoencoder", 15, PLAIN), Stage("second", 5, PLAIN))

    def encode(self, batch):
        return [super(Slow, self).encode(batch) for _ in range(50)][-1]


SAE_VARIANTS = {"slow": Slow, ''')
    finished = succeeded(run(folder, lab.cache))
    timing, entry = json.loads((folder / "run_1" / "timing.json").read_text()), results(folder)["core"]
    config = entry["config"]
    assert config["budget_hit"] is True
    assert all(0 < done < planned for done, planned in zip(config["steps_done"], config["steps_planned"]))
    for curves in entry["curves"]:                                     # of each seed
        training, second = curves["training"], curves["training"]["stage_starts"][1]
        assert training["stages"] == ["autoencoder", "second"]
        assert 0 < second < training["step"][-1]
    assert timing["total_seconds"] < 1.5 * 60 * 1.2                  # the machine may be busy
    assert re.search(r"seed 0: about 0\.\d min for [\d,]+ steps", finished.stdout)


# --- mistakes in the settings ----------------------------------------------------------------------------------------
NAN = float("nan")
BAD = [                                   # constant, bad values, what the message must say besides its name
    ("SAE_VARIANT", ["topkk", "", None, 3, ["topk"]], VARIANTS),
    ("ABLATE", [("attention",), "sparsity", ("sparsity", "sparsity"), None, ["sparsity"], (["sparsity"],)],
     ["tuple", "sparsity"]),
    ("MODEL_NAME", ["", None, 3, "../no/such/folder"], []),
    ("LAYER", [-1, 2.0, "2", True], ["None", "whole number"]),
    ("LAYER", [6], ["6 blocks"]),
    ("DATASET", ["", None, "no/such/file.jsonl", 3], []),
    ("TRAIN_TOKENS", [0, -1, 1e5, "100", None, True], ["whole number"]),
    ("TRAIN_TOKENS", [10 ** 9], ["ran dry", "training tokens"]),
    ("CONTEXT_LENGTH", [0, 4, 64.0, "128"], ["whole number"]),
    ("EXPANSION", [0, -2, NAN, math.inf, "8", None], ["above 0"]),
    ("TARGET_L0", [0, 2.5, "8", None], ["whole number"]),
    ("TARGET_L0", [385], ["384"]),
    ("SEEDS", [(), (0, 0), 0, (-1,), [0], (0.5,), ("a",), ([0],)], ["tuple"]),
    ("TIME_BUDGET_MINUTES", [0, -5, "90", NAN, math.inf, None], ["above 0"]),
    ("EVALS", [(), ("nope",), "core", None, ["core"]], ["tuple", "core", "temporal", "probes"]),
    ("EPOCHS_SCALE", [0, -1, NAN, "1"], ["above 0"]),
    ("EPOCHS_SCALE", [1e-6], ["no step"]),
    ("BATCH_TOKENS", [0, 16, 512.0, "2048"], ["whole number from 32"]),      # CONTEXT_LENGTH here
    ("BATCH_TOKENS", [10 ** 9], ["no step", "TRAIN_TOKENS"]),
    ("LEARNING_RATE", [0, -1e-3, "fast", NAN], ["None", "above 0"]),
    ("EVAL_FILES", [1, 0, 2.5], ["whole number from 2"]),
]


def test_bad_constants_are_named_with_the_good_values(lab):
    cases = {(name, i, j): (value, parts)
             for i, (name, values, parts) in enumerate(BAD) for j, value in enumerate(values)}
    folders = {key: lab.copy("bad_{}_{}_{}".format(*key), **{key[0]: value}) for key, (value, _) in cases.items()}
    finished, wrong = run_in_turn(list(folders.values()), lab.cache), []
    for key, (value, parts) in cases.items():
        one = finished[folders[key]]
        missing = [part for part in (key[0], *parts) if part not in one.tail]
        clean = "://" not in one.stderr and "Traceback" not in one.stderr and len(one.stderr) <= TAIL
        if one.code != 2 or missing or not clean or one.cpu > 15 or (folders[key] / "run_1").exists():
            wrong.append(f"{key[0]} = {value!r}: exit {one.code}, {one.cpu:.1f} s, lacks {missing}\n    {one.stderr}")
    assert not wrong, f"{len(wrong)} of {len(cases)}\n" + "\n".join(wrong)


WHOLE, ABOVE_0, NAMES = (1, 7), (0.01, 1, 3e4), ("x", "a/b")
NOT_WHOLE, NO_NAMES = (0, -1, 2.0, "2", None, True), ("", None, 3)
NOT_ABOVE_0 = (0, -1.0, NAN, math.inf, "1", None, True)
RULES = {                                 # constant -> good values, bad ones, what the message must say
    "SAE_VARIANT": (VARIANTS, ("topkk", None, ["topk"]), VARIANTS),
    "ABLATE": (((), ("sparsity",), ("auxk", "sparsity")), (("reconstruction",), ("attention",), ["auxk"], "auxk", None),
               ("tuple", "'auxk', 'sparsity'", "standard")),
    "MODEL_NAME": (NAMES, NO_NAMES, ("hub name",)), "DATASET": (NAMES, NO_NAMES, ("hub name",)),
    "LAYER": ((None, 0, 5), (-1, 2.0, "2", True), ("None", "whole number from 0")),
    "TRAIN_TOKENS": (WHOLE, NOT_WHOLE, ("whole number from 1",)),
    "CONTEXT_LENGTH": ((8, 1024), (7, 64.0, "128", None), ("whole number from 8",)),
    "EXPANSION": (ABOVE_0, NOT_ABOVE_0, ("number above 0",)), "TARGET_L0": (WHOLE, NOT_WHOLE, ("whole number from 1",)),
    "SEEDS": (((0,), (5, 0, 2)), ((), (0, 0), 0, [0], (-1,), (0.5,), (2.0,), ("a",), ([0],), (True,), None),
              ("tuple of different whole numbers",)),
    "TIME_BUDGET_MINUTES": (ABOVE_0, NOT_ABOVE_0, ("number above 0",)),
    "EVALS": ((("core",), ("probes", "core"), ("sparse_probing", "unlearning")), ((), ("nope",), ("core", "core"), "core", ["core"], None),
              ("tuple", "'core'", "'temporal'", "'probes'", "'unlearning'", "'sparse_probing'")),
    "EPOCHS_SCALE": (ABOVE_0, NOT_ABOVE_0, ("number above 0",)),
    "BATCH_TOKENS": ((128, 4096), (127, 0, 512.0, "2048", None), ("whole number from 128",)),
    "LEARNING_RATE": ((None, 1e-3, 1), (0, -1e-3, "fast", NAN, True), ("None", "number above 0")),
    "TRAIN_POSITIONS": ((None, (1, 2), (64, 127)), (
        (0, 5), (5, 5), (5, 3), (1,), (1, 2, 3), (), [1, 2], (1, 128), "12", 5, (True, 5), ("a", "b")),
                        ("None", "(low, high) within the window")),
    "WINDOW": (WHOLE, NOT_WHOLE, ("whole number from 1",)),
    "ATTENTION": (("causal", "centred"), ("both", None, ["causal"]), ("causal, centred",)),
    "HEADS": (WHOLE, NOT_WHOLE, ("whole number from 1",)), "HEAD_WIDTH": (WHOLE, NOT_WHOLE, ("whole number from 1",)),
    "CONSISTENT_FRACTION": ((0.01, 0.5, 1), (0, 1.01, -0.1, "1", NAN, None), ("above 0, at most 1",)),
    "CONSISTENCY_WEIGHT": (ABOVE_0, NOT_ABOVE_0, ("number above 0",)),
    "CONTRAST_WEIGHT": (ABOVE_0, NOT_ABOVE_0, ("number above 0",)),
    "CONTRAST_SPAN": (WHOLE, NOT_WHOLE, ("whole number from 1",)),
    "TSAE_READING": (("paper", "code"), ("paper, code", None), ("paper, code",)),
    "TEMPERATURE": (("learned", "scheduled", 0.1, 2), (0, -1, "fixed", NAN, None, True),
                    ("learned or scheduled", "number above 0")),
    "DRIVE": (("u", "z"), ("uz", None), ("u, z",)), "REGULARISATION": (ABOVE_0, NOT_ABOVE_0, ("number above 0",)),
    "BUFFER": (WHOLE, NOT_WHOLE, ("whole number from 1",)),
    "BUFFER_POSITIONS": (("learned", "sinusoidal"), ("fixed", None, ["learned"]), ("learned, sinusoidal",)),
    "FORGET": (NAMES, NO_NAMES, ("hub name",)),
    "TRAIN_ON": (("both", "forget", "retain"), ("all", None, ("both",)), ("both, forget, retain",)),
    "FORGET_QUESTIONS": ((None, *NAMES), ("", 3), ("None", "hub name")),
    "RETAIN_QUESTIONS": ((None, *NAMES), ("", 3), ("None", "hub name")),
    "SELECTION": (("ratio", "frequency"), ("energy", None), ("ratio, frequency",)),
    "CLAMPED": (WHOLE, NOT_WHOLE, ("whole number from 1",)), "MATCHED": (WHOLE, NOT_WHOLE, ("whole number from 1",)),
    "MATCHER": (("logistic", "attention"), ("linear", None), ("logistic, attention",)),
    "MATCHER_WINDOW": (WHOLE, NOT_WHOLE, ("whole number from 1",)),
    "COMPOSITIONS": ((0.1, 1 / 3, 0.9), (0, 1, 1.0, -0.1, NAN, "1", None), ("number above 0", "at most 0.9")),
    "LEVEL_WIDTHS": ((None, (288, 192), (96, 96)), ((96,), (96, 192), [288, 192], (288.0, 192), (96, 8), 96), ("level 1, level 2",)),
    "LEVEL_SPARSITY": (("topk", "l1"), ("none", None), ("topk, l1",)),
    "DENSITY": (ABOVE_0, NOT_ABOVE_0, ("number above 0",)), "COSINE_WEIGHT": (ABOVE_0, NOT_ABOVE_0, ("number above 0",)),
    "GROUP_WEIGHT": (ABOVE_0, NOT_ABOVE_0, ("number above 0",)),
    "COMPOSITION_SLOTS": ((0.01, 1 / 4, 1), (0, 1.1, -0.1, NAN, "1", None), ("number above 0", "at most 1")),
    "COMPOSITION_HEADS": ((1, 8, 64), NOT_WHOLE, ("whole number from 1",)),
    "COMPOSITION_HEAD_WIDTH": ((1, 16), (0, -8, 8.0, "8", None), ("whole number from 1",)),
    "EVAL_FILES": ((2, 300), (1, 0, 2.5, None), ("whole number from 2",)),
}


def test_every_setting_has_a_rule_here(E):
    settings = E.SOURCE.split("# ---- CONFIG")[1].split("# FIXED PROTOCOL")[0]
    names = {name for line in re.findall(r"^[A-Z][A-Z_0-9, ]* = ", settings, flags=re.M)
             for name in line.removesuffix(" = ").split(", ")}
    assert names | {"EVAL_FILES"} == set(RULES)


@pytest.mark.parametrize("name", RULES)
def test_rules_of_the_settings(E, monkeypatch, name):
    good, bad, parts = RULES[name]
    for value in good:
        monkeypatch.setattr(E, name, value)
        if name == "CONTEXT_LENGTH":
            monkeypatch.setattr(E, "BATCH_TOKENS", 1024)
        E.corpus.check_config(vars(E), E.SAE_VARIANTS, E.EVALUATIONS)
    for value in bad:
        monkeypatch.setattr(E, name, value)
        with pytest.raises(E.RunnerError) as error:
            E.corpus.check_config(vars(E), E.SAE_VARIANTS, E.EVALUATIONS)
        said = str(error.value)
        assert said.startswith(f"{name} = {value!r} ") and all(part in said for part in parts), said


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_may_be_ablated(E, monkeypatch, variant):
    """Every loss but the reconstruction, and every component; nothing of another variant."""
    made = E.SAE_VARIANTS[variant]
    losses = {loss for stage in made.curriculum for loss in stage.weights}
    assert "auxk" in losses
    monkeypatch.setattr(E, "SAE_VARIANT", variant)
    for name in sorted(losses | set(made.components) | {"trace", "attention", "gate", "contrastive", "l0_target"}):
        monkeypatch.setattr(E, "ABLATE", (name,))
        if name != "reconstruction" and name in losses | set(made.components):
            E.corpus.check_config(vars(E), E.SAE_VARIANTS, E.EVALUATIONS)
        else:
            with pytest.raises(E.RunnerError, match="ABLATE"):
                E.corpus.check_config(vars(E), E.SAE_VARIANTS, E.EVALUATIONS)


def test_an_out_dir_that_cannot_be(lab):
    file = lab.root / "a_file"
    file.write_text("mine")
    out_dirs = {"file": "run_1", "below_a_file": str(file / "run_1"), "here": ".", "above": "..",
                "no_place": "/proc/run_1"}
    folders = {lab.copy(f"out_{name}"): out_dir for name, out_dir in out_dirs.items()}
    (lab.root / "out_file" / "run_1").write_text("mine")
    before = {folder: listing(folder) for folder in folders}
    finished, wrong = run_in_turn(folders, lab.cache), []
    for folder, one in finished.items():
        left = [name for name in listing(folder) if name not in ("outcome.json", "__pycache__")]
        named = str((folder / folders[folder]).resolve()) in one.tail
        clear = "Traceback" not in one.stderr and named and "://" not in one.stderr
        early = "preflight passed" not in one.stdout and left == before[folder]
        if one.code not in (1, 2) or not clear or not early:
            wrong.append(f"--out_dir={folders[folder]}: exit {one.code}, {left}\n{one.stdout}\n{one.stderr}")
    assert (lab.root / "out_file" / "run_1").read_text() == file.read_text() == "mine"
    assert not wrong, "\n".join(wrong)


def test_a_cache_that_cannot_be(lab):
    folder = lab.copy("no_cache")
    file = folder / "file"
    file.write_text("mine")
    finished = run(folder, file / "cache")
    assert finished.code == 2 and "SAE_CACHE_DIR" in finished.tail and str(file) in finished.tail, finished.stderr


# --- mistakes in the data and the environment -------------------------------------------------------------------------
def data_files(root):
    """{what is wrong: (constants, what the message must say)}; the files are written."""
    def put(name, content):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    def lines(*values):
        return "".join(json.dumps(value) + "\n" for value in values)

    good = lines(*({"text": f"row {i} " * 100} for i in range(400)))
    (root / "empty_folder").mkdir(parents=True)
    (root / "gone.jsonl").symlink_to(root / "nowhere.jsonl")
    put("mixed/a.jsonl", good), put("mixed/b.csv", "text\nx\n")
    put("nanogpt/train.bin", b"abcd"), put("nanogpt/val.bin", b"abcd")
    data = {
        "no such file": (put("x", "")[:-1] + "none.jsonl", "no such file or folder"),
        "a dangling link": (str(root / "gone.jsonl"), "no such file or folder"),
        "no JSON": (put("bad.jsonl", '{"text": "a"}\n{"text": \n'), "cannot be read"),
        "no JSON at the end": (put("late.jsonl", good + '{"text": \n'), "cannot be read"),
        "no parquet": (put("bad.parquet", "no parquet"), "cannot be read"),
        "no gzip": (put("bad.jsonl.gz", "no gzip"), "cannot be read"),
        "no UTF-8": (put("bad.txt", b"\xff\xfe\x00abc"), "not UTF-8"),
        "a web page": (put("page.html", "<p>"), "kind that is not read"),
        "a pickle": (put("data.pkl", b"\x80\x04N."), "kind that is not read"),
        "nothing": (put("none.txt", ""), "is empty"),
        "blanks": (put("blank.txt", " \n \n"), "is empty"),
        "no rows": (put("none.json", "[]"), "is empty"),
        "rows without text": (put("bare.jsonl", lines(*[{"text": ""}] * 100)), "is empty"),
        "no column of text": (put("columns.csv", "question,answer,n\na,b,1\n"), "question, answer, n"),
        "a column of numbers": (put("numbers.jsonl", lines({"text": 1}, {"text": 2})), "column"),
        "no files": (str(root / "empty_folder"), "no file that can be read"),
        "files of two kinds": (str(root / "mixed"), "several kinds"),
        "no vocabulary": (str(root / "nanogpt"), "lacks meta.pkl"),
        "two words": ("two words", "hub name"),
        "too little text": (put("short.jsonl", lines(*({"text": f"row {i} " * 20} for i in range(60)))), "ran dry"),
    }
    good = put("good.jsonl", good)
    unlearning = dict(DATASET="embedded", EVALS=("unlearning",), CONTEXT_LENGTH=64)
    return {name: (dict(DATASET=path), part) for name, (path, part) in data.items()} | {
        "no domain to forget": (dict(DATASET=good, TRAIN_ON="forget", FORGET="./none.jsonl"), "no domain of DATASET"),
        "nothing to forget": (dict(DATASET=good, TRAIN_ON="forget", FORGET=put("few.jsonl", lines({"text": "a b c"}))), "ran dry"),
        "no questions": (unlearning | dict(FORGET_QUESTIONS=put("q.jsonl", lines({"text": "a"}))), "choices (4 texts)"),
        "questions that are gone": (unlearning | dict(RETAIN_QUESTIONS="./none.json"), "no such file or folder"),
    }


def test_data_that_cannot_be_used(lab):
    """One paragraph, exit code 2, and an earlier run's folder as it was. Without the preflight, which reads no data."""
    cases, folders, wrong = data_files(lab.root / "data"), {}, []
    for name, (constants, _) in cases.items():
        folders[name] = lab.copy(f"data {name}", **constants)
        substitute(folders[name], "            preflight(config, cache)\n", "            pass\n")
        (folders[name] / "run_1").mkdir()
        (folders[name] / "run_1" / "final_info.json").write_text('{"earlier": 1}')
    finished = run_in_turn(list(folders.values()), lab.cache)
    for name, (_, part) in cases.items():
        one = finished[folders[name]]
        head, *message = one.stderr.rstrip("\n").split("\n")
        clean = "://" not in one.stderr and "Traceback" not in one.stderr and len(one.stderr) <= TAIL
        kept = contents(folders[name] / "run_1") == {"final_info.json": b'{"earlier": 1}'}
        if one.code != 2 or part not in one.tail or len(message) != 1 or not clean or not kept:
            wrong.append(f"{name}: exit {one.code}, lacks {part!r}\n    {one.stderr}")
    assert not wrong, f"{len(wrong)} of {len(cases)}\n" + "\n".join(wrong)


def mounted(folder, size, *more):
    return subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join((f"size={size}", *more)), "tmpfs", str(folder)],
                          capture_output=True).returncode == 0


def test_a_disk_that_is_full(lab, tmp_path):
    """Too small for the activations: told before they are collected. Full at the first checkpoint: told, nothing is lost, and
    with more room the same command carries on."""
    cache, folder = tmp_path / "cache", lab.copy("small_disk", SAE_VARIANT="topk", CHECKPOINT_SECONDS=0)
    cache.mkdir()
    if not mounted(cache, "7m"):
        pytest.skip("no file system can be mounted here")
    try:
        (folder / "run_1").mkdir()
        (folder / "run_1" / "final_info.json").write_text('{"earlier": 1}')
        finished = run(folder, cache)
        assert finished.code == 2 and "collecting activations" in finished.tail, finished.stderr
        assert "SAE_CACHE_DIR" in finished.tail and str(cache) in finished.tail, finished.stderr
        need = int(re.search(r"needs (\d+) MB", finished.tail)[1]) * 1e6
        used = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
        assert mounted(cache, int(1.05 * need + used + 2e6), "remount")
        finished = run(folder, cache)
        assert finished.code not in (0, None) and "training, seed 0" in finished.tail, finished.stderr
        assert "free disk space" in finished.tail and "Traceback" not in finished.stderr, finished.stderr
        assert contents(folder / "run_1") == {"final_info.json": b'{"earlier": 1}'}
        assert mounted(cache, "64m", "remount")
        succeeded(run(folder, cache))
        assert results(folder)["core"]["metrics"]["l0"] > 0
    finally:
        subprocess.run(["umount", "-l", str(cache)], check=True)


# --- leaving early ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("code, said", [(None, True), (0, True), (3, False)])
def test_leaving_by_exit_is_no_success(E, monkeypatch, code, said):
    monkeypatch.setattr(E.corpus, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(E.corpus, "bound_memory", lambda: None)
    monkeypatch.setattr(E.corpus, "quiet_libraries", lambda: None)
    monkeypatch.setattr("sys.argv", ["experiment.py", "--out_dir=run_1"])
    with pytest.raises(SystemExit) as left:
        E.corpus.run(lambda: exit(code), "experiment.py", object, {}, "standard")
    assert ("sys.exit() before the results" in str(left.value.code)) == said and left.value.code not in (None, 0)
