"""Whole runs with the evaluations that are off by default."""
import json
import math

import pytest

from copies import results
from lab import succeeded

STRATEGIES = "standard", "pattern", "hybrid"
EDITS = (*STRATEGIES, "pattern_0.05", "hybrid_0.05", "pattern_0.2", "hybrid_0.2", "random_latents", "random_directions", "projection")
LEVELS = dict(SAE_VARIANT="hierarchical", EVALS=("core", "hierarchy"))
RUNS = {
    "sparse_probing": dict(SAE_VARIANT="topk", DATASET="embedded", EVALS=("sparse_probing",), PROBING_SIZE=(60, 20)),
    "unlearning": dict(SAE_VARIANT="temporal_context", DATASET="embedded", EVALS=("core", "unlearning"), CONTEXT_LENGTH=64),
    "compositional": dict(SAE_VARIANT="compositional", EXPANSION=4, TARGET_L0=12, ABLATE=("bottleneck",),
                          EVALS=("core", "recovery", "composition"), SYNTHETIC_TASKS=("grammar",), SYNTHETIC_RHOS=(1.0,),
                          SYNTHETIC_TOKENS=16_384),
    "hierarchical": LEVELS,
    "hierarchical_l1": LEVELS | dict(LEVEL_WIDTHS=(144, 96), LEVEL_SPARSITY="l1", EPOCHS_SCALE=1.0)}


@pytest.fixture(scope="module")
def folders(lab):
    """name -> the folder of the run, which succeeded: from the command to the file of results, under the preflight too."""
    return {name: folder for name, (folder, finished) in lab.runs(**RUNS).items() if succeeded(finished)}


def test_sparse_probing(folders):
    """The five domains of the embedded corpus."""
    entry = results(folders["sparse_probing"])["sparse_probing"]
    m = entry["metrics"]
    assert entry["means"]["sae_top_1_mean"] == m["sae_top_1"]
    for name in ("sae", "channels", "untrained"):                       # small as it is, it beats guessing
        assert 0.55 < m[f"{name}_top_50"] <= 1 and m[f"{name}_top_50"] > m[f"{name}_top_1"]
    assert entry["curves"][0]["sparse_probing"]["k"] == [1, 2, 5, 10, 20, 50]
    assert "training" in entry["curves"][0] and entry["config"]["PROBING"] == ["embedded"]


def test_unlearning(folders):
    entry = results(folders["unlearning"])["unlearning"]
    assert all(type(value) is float and math.isfinite(value) for value in entry["metrics"].values())
    for name in EDITS:
        for key in ("strength", "forget", "neighbours", "retain", "repetition", "entropy"):
            assert f"{name}_{key}" in entry["metrics"], f"{name}_{key}"
    for name in STRATEGIES:
        assert {f"{name}_padded_{pad}" for pad in (0, 32, 64)} <= set(entry["metrics"])
        # the same windows; no text in front is no change
        assert entry["metrics"][f"{name}_padded_0"] == pytest.approx(entry["metrics"][f"{name}_forget"], abs=0.02)
    curves, = entry["curves"]
    assert set(curves["frontier"]) == set(EDITS) and set(curves["roc"]) == {"pattern", "hybrid"}
    assert set(entry["means"]) == {"auroc_hybrid_mean"}
    sequences, = entry["per_sequence"]
    assert {len(values) for values in sequences.values()} == {24}


def test_recovery_and_composition(folders):
    info = results(folders["compositional"])
    (row,), metrics = info["recovery"]["curves"][0]["recovery"], info["recovery"]["metrics"]
    assert row["task"] == "grammar" and set(row) == {"task", "rho", "sae", "pca", "nmf", "random"}
    assert row["random"]["cosine_primitives"] < 0.33 < metrics["grammar_1_cosine_primitives"]
    assert info["composition"]["metrics"]["compositions_per_token"] > 0
    assert len(info["composition"]["curves"][0]["patterns"]["effects"]) > 0


@pytest.mark.parametrize("name", ["hierarchical", "hierarchical_l1"])
def test_hierarchy(folders, name):
    folder, info = folders[name], results(folders[name])
    metrics, tree = info["hierarchy"]["metrics"], info["hierarchy"]["curves"][0]["tree"]
    assert metrics["causal_cosine"] > metrics["causal_cosine_rival"] and metrics["mutual_information"] > 0
    assert info["core"]["config"]["d_sae"] == (96 if name == "hierarchical_l1" else 384)
    shown = json.loads((folder / "run_1" / "features.json").read_text())["latents"]
    assert any(entry["related"]["children, features of level 1"] for entry in shown)
    text = (folder / "run_1" / "case_studies.md").read_text()
    assert text.count("## Parent") == len(tree) > 3 and all(len(parent["children"]) > 1 for parent in tree)
    log = info["core"]["curves"][0]["training"]
    second, third = log["stage_starts"][1:]
    for step, value in zip(log["step"], log["losses"]["sparsity_1"], strict=True):
        assert (value is None) == (second < step <= third)      # the frozen level has no such loss
    if name == "hierarchical_l1":
        assert set(log["parameters"]) == {"beta_1", "beta_2"}
