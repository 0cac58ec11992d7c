"""What whole runs say of the evaluations that are off by default."""
import json
import math

import pytest

from copies import results
from lab import succeeded

STRATEGIES = "standard", "pattern", "hybrid"
EDITS = (*STRATEGIES, "pattern_0.05", "hybrid_0.05", "pattern_0.2", "hybrid_0.2", "random_latents", "random_directions", "projection")


@pytest.fixture(scope="module")
def folder_of(lab):
    """folder_of(name) -> the folder of a run of TRAINED, which succeeded: from the command to the file of results."""
    def of(name):
        folder, finished = lab.trained(name)
        succeeded(finished)
        return folder
    return of


def test_sparse_probing(folder_of):
    """The five domains of the embedded corpus."""
    info = results(folder_of("topk"))
    entry = info["sparse_probing"]
    m = entry["metrics"]
    assert entry["means"]["sae_top_1_mean"] == m["sae_top_1"]
    for name in ("sae", "channels", "untrained"):                       # small as it is, it beats guessing
        assert 0.55 < m[f"{name}_top_50"] <= 1 and m[f"{name}_top_50"] > m[f"{name}_top_1"]
    assert entry["curves"][0]["sparse_probing"]["k"] == [1, 2, 5, 10, 20, 50]
    assert info["training"]["config"]["PROBING"] == ["embedded"]


def test_unlearning(folder_of):
    entry = results(folder_of("temporal_context"))["unlearning"]
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


def test_recovery_and_composition(folder_of):
    info = results(folder_of("compositional"))
    (row,), metrics = info["recovery"]["curves"][0]["recovery"], info["recovery"]["metrics"]
    assert row["task"] == "grammar" and set(row) == {"task", "rho", "sae", "pca", "nmf", "random"}
    assert row["random"]["cosine_primitives"] < 0.33 < metrics["grammar_1_cosine_primitives"]
    assert info["composition"]["metrics"]["compositions_per_token"] > 0
    assert len(info["composition"]["curves"][0]["patterns"]["effects"]) > 0


@pytest.mark.parametrize("name", ["hierarchical", "hierarchical_l1"])
def test_hierarchy(folder_of, name):
    folder = folder_of(name)
    info = results(folder)
    metrics, tree = info["hierarchy"]["metrics"], info["hierarchy"]["curves"][0]["tree"]
    assert metrics["causal_cosine"] > metrics["causal_cosine_rival"] and metrics["mutual_information"] > 0
    shown = json.loads((folder / "run_1" / "features.json").read_text())["latents"]
    assert any(entry["related"]["children, features of level 1"] for entry in shown)
    text = (folder / "run_1" / "case_studies.md").read_text()
    assert text.count("## Parent") == len(tree) > 3 and all(len(parent["children"]) > 1 for parent in tree)
    log = info["training"]["curves"][0]["training"]
    second, third = log["stage_starts"][1:]
    for step, value in zip(log["step"], log["losses"]["sparsity_1"], strict=True):
        assert (value is None) == (second < step <= third)      # the frozen level has no such loss
    if name == "hierarchical_l1":
        assert set(log["parameters"]) == {"beta_1", "beta_2"}
