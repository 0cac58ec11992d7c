"""Files of an SAE in the layout of SAELens."""
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from test_variants import close, D_IN, D_SAE, K, make, make_batch, NAMES

SAELENS = {"standard": {"W_enc", "b_enc", "W_dec", "b_dec"}, "topk": {"W_enc", "b_enc", "W_dec", "b_dec"},
           "jumprelu": {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"},
           "gated": {"W_enc", "W_dec", "b_dec", "b_gate", "r_mag", "b_mag"}}        # as the package names them


@pytest.mark.parametrize("name", NAMES)
def test_saelens_layout_holds_the_weights_of_its_architecture(E, name):
    """The names are SAELens's, and its inference equation with these weights gives our latents in evaluation."""
    sae, batch = make(E, name).eval(), make_batch(E)
    if hasattr(sae, "threshold"):
        sae.threshold.fill_(0.3)
    architecture, (added, dropped) = sae.architecture, sae.exported()
    weights = {n: p for n, p in (dict(sae.named_parameters()) | added).items() if n not in dropped}
    assert set(weights) == SAELENS[architecture]
    assert architecture == {"matryoshka": "jumprelu", "batch_topk": "jumprelu"}.get(name, name)
    centred = batch.x - weights["b_dec"]
    if architecture == "gated":
        inner = centred @ weights["W_enc"]
        magnitude = centred @ (weights["W_enc"] * weights["r_mag"].exp()) + weights["b_mag"]
        z = (inner + weights["b_gate"] > 0) * F.relu(magnitude)
    else:
        pre = centred @ weights["W_enc"] + weights["b_enc"]
        z = F.relu(pre)
        if architecture == "jumprelu":
            assert weights["threshold"].shape == (D_SAE,)
            z = z * (pre > weights["threshold"])
        if architecture == "topk":
            z = torch.zeros_like(z).scatter(-1, pre.topk(sae.k).indices, F.relu(pre.topk(sae.k).values))
    close(sae.encode(batch).dense().detach(), z.detach())
    assert z.any()


def test_a_name_of_saelens_is_for_its_equation_alone(E, tmp_path):
    sae = make(E, "topk")
    weights = dict(sae.named_parameters())
    E.save_sae(tmp_path / "right", weights, sae, {})
    for wrong in (weights | {"W_q": weights["W_enc"]}, {n: p for n, p in weights.items() if n != "b_enc"}):
        with pytest.raises(E.RunnerError, match="architecture = 'topk'.*(W_q|b_enc).*of its own"):
            E.save_sae(tmp_path / "wrong", wrong, sae, {})
    sae.architecture = "temporal"
    with pytest.raises(E.RunnerError, match="another SAE of SAELens's"):        # it would load and mean something else
        E.save_sae(tmp_path / "wrong", weights, sae, {})
    assert not (tmp_path / "wrong").exists()


SAELENS_S_NAMES = {"standard", "gated", "topk", "abstopk", "jumprelu", "transcoder", "skip_transcoder", "jumprelu_transcoder",
                   "jumprelu_skip_transcoder", "temporal", "matching_pursuit"}      # 6.54.12; bench/interop.py asks it


def test_a_layout_of_its_own_has_a_name_that_saelens_does_not_know(E):
    assert E.SAELENS_OTHERS == SAELENS_S_NAMES - set(SAELENS)
    for name, variant in E.SAE_VARIANTS.items():
        assert (variant.architecture in SAELENS_S_NAMES) == (variant.architecture in E.SAELENS), name


@pytest.mark.parametrize("name", ["topk", "compositional", "hierarchical"])
def test_cfg_has_the_sae_s_sizes_and_metadata_that_saelens_keeps(E, tmp_path, name):
    """SAELens drops the metadata of a cfg.json that names no version from 6 on."""
    store = SimpleNamespace(mean=torch.zeros(D_IN), scale=2.0)
    E.export(E.SAE_VARIANTS[name](D_IN, D_SAE, K), store, 1, tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    assert (cfg["d_in"], cfg["d_sae"]) == (D_IN, D_SAE)
    assert int(cfg["metadata"]["sae_lens_version"].split(".")[0]) >= 6
    assert cfg["metadata"]["hook_name"] == "blocks.1.hook_resid_post"


def test_registry(E):
    assert set(NAMES) <= set(E.SAE_VARIANTS)
    for name, variant in E.SAE_VARIANTS.items():
        assert issubclass(variant, E.SAE), name
        stages = E.curriculum_of(variant)
        assert sum(stage.epochs for stage in stages) == E.CURRICULUM_EPOCHS == 20, name
        assert all("reconstruction" in stage.weights for stage in stages), name
