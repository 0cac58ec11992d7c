"""Model families: the residual stream, logits from it, stand-ins, files that are not whole."""
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_outputs import BaseModelOutput

from model_families import DEPTH, ENCODERS, FAMILIES, save_checkpoint, VOCABULARY, WIDTH


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder with a random checkpoint of each family."""
    root = tmp_path_factory.mktemp("checkpoints")
    for family in FAMILIES:
        save_checkpoint(family, root / family)
    return root


@pytest.fixture(params=FAMILIES)
def family(request, E, checkpoints, monkeypatch):
    monkeypatch.setattr(E, "MODEL_NAME", str(checkpoints / request.param))
    return request.param


@pytest.fixture
def model(E, family):
    return E.load_model()


TEXT = "def load(path):\n    with open(path) as file:\n        return file.read()\n\n\nclass Reader:\n    pass\n"


@pytest.fixture
def tokens(E, family):
    tokenizer = E.load_pretrained(E.MODEL_NAME, "tokenizer")
    ids = [tokenizer.bos_token_id] + tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    return torch.tensor([ids[:20], ids[:1] + ids[5:24]])


def close(got, wanted):
    assert got.shape == wanted.shape
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


class Calls:
    """How often each block's linear layers, and the head, are computed."""

    def __init__(self, E, model):
        self.blocks, self.head = [0] * DEPTH, 0
        for i, block in enumerate(E.find_blocks(model)):
            for module in block.modules():
                if getattr(module, "weight", torch.zeros(0)).ndim == 2:            # linear layers, and not norms
                    module.register_forward_hook(lambda module, inputs, output, i=i: self.count(i, inputs[0]))
        model.get_output_embeddings().register_forward_hook(lambda *args: self.count(None, None))

    def count(self, i, x):
        if i is None:
            self.head += 1
        elif x.shape[:-1].numel() > 1:      # one token is computed to see what a block returns
            self.blocks[i] += 1


def test_residual_is_the_hidden_state_after_each_block(E, family, model, tokens):
    with torch.no_grad():
        states = model(tokens, output_hidden_states=True).hidden_states
        assert len(states) == DEPTH + 1
        for layer in range(DEPTH - 1):
            close(E.residual_after(model, layer, tokens), states[layer + 1])
            assert not torch.allclose(states[layer], states[layer + 1], rtol=1e-2)      # the blocks do something
        last = E.residual_after(model, DEPTH - 1, tokens)
        norm = model.base_model.get_submodule(FAMILIES[family][1])
        close(norm(last), states[DEPTH])                          # transformers reports the last one normalised


@pytest.mark.parametrize("layer", range(DEPTH))
def test_later_blocks_and_the_head_are_not_computed(E, model, tokens, layer):
    calls = Calls(E, model)
    hidden = E.residual_after(model, layer, tokens)
    assert hidden.shape == (*tokens.shape, WIDTH)
    assert all(calls.blocks[:layer + 1]) and not any(calls.blocks[layer + 1:]) and calls.head == 0


@pytest.mark.parametrize("layer", range(DEPTH))
def test_logits_from_a_residual(E, model, tokens, layer):
    with torch.no_grad():
        own = model(tokens).logits
        hidden = E.residual_after(model, layer, tokens)
        changed = hidden + hidden.std() * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))

        def replace(module, inputs, output):
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        handle = E.find_blocks(model)[layer].register_forward_hook(replace)
        wanted = model(tokens).logits
        handle.remove()
        assert not torch.allclose(own, wanted, rtol=0.1)
        calls = Calls(E, model)
        close(E.logits_from(model, layer, hidden, tokens), own)
        assert not any(calls.blocks[:layer + 1]) and all(calls.blocks[layer + 1:]) and calls.head == 1
        close(E.logits_from(model, layer, changed, tokens), wanted)


def test_the_model_is_as_before(E, model, tokens):
    with torch.no_grad():
        before = model(tokens).logits
        hidden = E.residual_after(model, 1, tokens)
        E.logits_from(model, 1, torch.zeros_like(hidden), tokens)
        for layer, bad in ((1, tokens + VOCABULARY), (2, tokens + VOCABULARY)):       # ids that the embedding lacks
            with pytest.raises(IndexError):
                E.residual_after(model, layer, bad)
            with pytest.raises(IndexError):
                E.logits_from(model, layer, hidden, bad)
        assert torch.equal(model(tokens).logits, before)
    for block in E.find_blocks(model):
        assert "forward" not in vars(block) and not block._forward_hooks
    assert not any(p.requires_grad for p in model.parameters()) and not model.training


def test_a_later_token_or_another_row_changes_nothing(E, model, tokens):
    whole = E.residual_after(model, 2, tokens)
    close(E.residual_after(model, 2, tokens[:, :9]), whole[:, :9])
    close(E.residual_after(model, 2, tokens[1:]), whole[1:])


def test_stand_in_has_the_family_and_the_width(E, family):
    config = E.load_pretrained(E.MODEL_NAME, "config.json")
    model = E.stand_in(config)
    assert type(model) is type(transformers.AutoModelForCausalLM.from_config(config))
    assert len(E.find_blocks(model)) == 2 and model.config.get_text_config().vocab_size == 256
    hidden = E.residual_after(model, 0, torch.arange(1, 9)[None])
    assert hidden.shape == (1, 8, WIDTH)
    assert E.logits_from(model, 0, hidden, torch.arange(1, 9)[None]).shape == (1, 8, 256)
    assert config.get_text_config().num_hidden_layers == DEPTH and config.get_text_config().vocab_size == VOCABULARY


@pytest.mark.parametrize("kind", ["tensor", "tuple", "list", "ModelOutput"])
def test_whatever_a_block_returns(E, checkpoints, monkeypatch, kind):
    """A tensor, a tuple, a list or a ModelOutput that begins with the stream; it reads and takes back the same."""
    monkeypatch.setattr(E, "MODEL_NAME", str(checkpoints / "llama"))
    model, tokens = E.load_model(), torch.arange(1, 9)[None]
    with torch.no_grad():
        own, hidden = model(tokens).logits, E.residual_after(model, 1, tokens)
    wrap = {"tensor": lambda x: x, "tuple": lambda x: (x, None), "list": lambda x: [x, None],
            "ModelOutput": lambda x: BaseModelOutput(last_hidden_state=x)}[kind]
    for block in E.find_blocks(model):
        plain = block.forward
        block.forward = lambda x, *args, plain=plain, **kwargs: wrap(plain(x if torch.is_tensor(x) else x[0], *args, **kwargs))
    norm = model.base_model.norm.forward
    model.base_model.norm.forward = lambda x: norm(x if torch.is_tensor(x) else x[0])
    assert torch.equal(E.residual_after(model, 1, tokens), hidden)
    close(E.logits_from(model, 1, hidden, tokens), own)
    assert not torch.allclose(E.logits_from(model, 1, 2 * hidden, tokens), own, rtol=0.1)


def test_the_reason_why_no_stand_in_can_be_made_is_said(E, monkeypatch):
    def broken(*args, **kwargs):
        raise ValueError("two layers are not enough")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_config", broken)
    with pytest.raises(E.RunnerError, match="two layers are not enough"):
        E.stand_in(FAMILIES["llama"][0])


@pytest.mark.parametrize("name", ENCODERS)
def test_stand_in_refuses_what_is_no_decoder(E, name):
    with pytest.raises(E.RunnerError, match="looks ahead|no model of the next token"):
        E.stand_in(ENCODERS[name])


@pytest.mark.parametrize("left", ["half", "none"])
def test_a_download_that_was_interrupted_is_named(E, checkpoints, tmp_path, monkeypatch, left):
    shutil.copytree(checkpoints / "gpt_neox", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    if left == "half":
        os.truncate(weights, weights.stat().st_size // 2)
    else:
        weights.rename(weights.with_suffix(".incomplete"))
    monkeypatch.setattr(E, "MODEL_NAME", str(tmp_path / "model"))
    with pytest.raises(E.RunnerError, match="no weights") as error:
        E.load_model()
    assert str(tmp_path / "model") in str(error.value) and len(str(error.value)) < 700


def test_identity_follows_the_files_of_a_model(E, checkpoints, tmp_path, monkeypatch):
    def identity(folder):
        monkeypatch.setattr(E, "MODEL_NAME", str(folder))
        return E.fingerprint(E.model_identity(
            E.MODEL_NAME, E.load_pretrained(E.MODEL_NAME, "config.json")))

    copied = shutil.copytree(checkpoints / "llama", tmp_path / "elsewhere")
    assert identity(copied) == identity(checkpoints / "llama") != identity(checkpoints / "mistral")
    weights = copied / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-3] ^= 1
    weights.write_bytes(raw)
    assert identity(copied) != identity(checkpoints / "llama")


# ---- Memory ----
def test_the_memory_plan_counts_what_there_is(E, monkeypatch):
    config, _ = E.load_config(E.MODEL_NAME, None, 128)
    store = SimpleNamespace(d_in=192, dtype=torch.float32, windows=SimpleNamespace(tokens=np.zeros((1_000, 128))))
    monkeypatch.setattr(E, "EXPANSION", 8)
    monkeypatch.setattr(E, "BATCH_TOKENS", 1_024)
    said = E.memory_plan(config, store)
    model = sum(p.numel() for p in E.load_model().parameters()) * 4 / 1e6
    assert f"model {model:.0f} MB" in said and f"activations {1_000 * 128 * 192 * 4 / 1e6:.0f} MB on disk" in said
    assert f"SAE with its optimiser {16 * (2 * 192 + 2) * 1536 / 1e6:.0f} MB" in said
    monkeypatch.setattr(E, "DEVICE", "cuda")
    for free, advice in ((80e9, "kept on the GPU"), (40e6, "BATCH_TOKENS ="), (20e6, "EXPANSION =")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 0))
        assert advice in E.memory_plan(config, store)
