"""Fixtures of the evaluations: edited modules, and runs on the activations of tiny language models."""
import numpy as np
import pytest
import torch
import transformers

from copies import copy_template, load_module
from data.windows import Windows
from tiny_models import FAMILIES, WIDTH


@pytest.fixture
def edited(tmp_path):
    """edited(BUFFER=2, ...) -> the module as an agent edits it."""
    def load(**constants):
        return load_module(copy_template(tmp_path / "copy", **constants) / "experiment.py")
    return load


@pytest.fixture(scope="session")
def models():
    """family -> a random model, in evaluation."""
    found = {}
    for name, config in FAMILIES.items():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        found[name] = model
    return found


@pytest.fixture
def spoken(E, models, tmp_path, monkeypatch):
    """spoken(tokens, n_train, domains, ...) -> Run on their activations in a tiny model; two windows a document."""
    def make_run(tokens, n_train, domains, lengths=None, family="gpt_neox", layer=0):
        monkeypatch.setattr(E, "CONTEXT_LENGTH", tokens.shape[1])
        lengths = np.full(len(tokens), tokens.shape[1]) if lengths is None else np.asarray(lengths)
        docs, names = np.arange(len(tokens)) // 2, [str(i) for i in range(len(tokens) // 2)]
        windows = Windows(tokens.astype(np.int32), lengths, docs, n_train, names, list(domains))
        model = models[family]
        folder = tmp_path / f"{family}-{len(list(tmp_path.iterdir()))}"
        store = E.Store(folder, windows, WIDTH, torch.float32)
        store.collect(lambda: model, layer)
        torch.manual_seed(0)
        sae = E.TopK(WIDTH, 64, 4).eval().requires_grad_(False)
        return E.Run(sae, store, lambda: model, layer, E.LiveRule(1, 1), {})
    return make_run
