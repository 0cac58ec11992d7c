"""Language models: every decoder family through the same code, and a short error for what is no decoder."""
import json
import os
import shutil

import pytest
import torch
import transformers
from copies import PROJECT, TAIL, copy_template, run, run_in_turn, write_text_data

DEPTH, WIDTH, VOCABULARY = 4, 48, 4096
SIZES = dict(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=4, bos_token_id=0,
             eos_token_id=0, pad_token_id=0, max_position_embeddings=64)
GROUPED = SIZES | dict(intermediate_size=96, num_key_value_heads=2)
GPT2_SIZES = dict(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=DEPTH, n_head=4, n_positions=64, bos_token_id=0,
                  eos_token_id=0)
# family -> its configuration, and where its final norm stands
FAMILIES = {
    "gpt_neox": (transformers.GPTNeoXConfig(**SIZES, intermediate_size=96), "final_layer_norm"),
    "gpt_neox_serial": (transformers.GPTNeoXConfig(**SIZES, intermediate_size=96, use_parallel_residual=False,
                                                   tie_word_embeddings=True), "final_layer_norm"),
    "gpt2": (transformers.GPT2Config(**GPT2_SIZES), "ln_f"),
    "llama": (transformers.LlamaConfig(**GROUPED), "norm"),
    "gemma": (transformers.GemmaConfig(**GROUPED, head_dim=12), "norm"),
    "gemma2": (transformers.Gemma2Config(**GROUPED, head_dim=12, sliding_window=4, query_pre_attn_scalar=12), "norm"),
    "gemma3": (transformers.Gemma3TextConfig(**GROUPED, head_dim=12, sliding_window=4, query_pre_attn_scalar=12),
               "norm"),
    "qwen2": (transformers.Qwen2Config(**GROUPED), "norm"),
    "qwen3": (transformers.Qwen3Config(**GROUPED, head_dim=12), "norm"),
    "opt": (transformers.OPTConfig(**SIZES, ffn_dim=96, word_embed_proj_dim=WIDTH), "decoder.final_layer_norm"),
    "mistral": (transformers.MistralConfig(**GROUPED, sliding_window=4), "norm"),
    "phi": (transformers.PhiConfig(**SIZES, intermediate_size=96), "final_layernorm"),
    "gpt_neo": (transformers.GPTNeoConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, num_layers=DEPTH, num_heads=4,
                                          attention_types=[[["global", "local"], DEPTH // 2]], window_size=4,
                                          max_position_embeddings=64, bos_token_id=0, eos_token_id=0), "ln_f"),
    "gptj": (transformers.GPTJConfig(**GPT2_SIZES, rotary_dim=4), "ln_f"),
    "bloom": (transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, n_layer=DEPTH, n_head=4), "ln_f"),
}
ENCODERS = {
    "bert": transformers.BertConfig(**SIZES, intermediate_size=96),
    "roberta": transformers.RobertaConfig(**SIZES, intermediate_size=96),
    "distilbert": transformers.DistilBertConfig(vocab_size=VOCABULARY, dim=WIDTH, n_layers=DEPTH, n_heads=4,
                                                hidden_dim=96),
    "t5": transformers.T5Config(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=12, d_ff=96, num_layers=DEPTH, num_heads=4),
}


def copy_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(PROJECT / "embedded" / "model" / name, folder)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """family -> folder with a random checkpoint of it, norms and biases random too, so that leaving one out shows."""
    root = tmp_path_factory.mktemp("checkpoints")
    for family, (config, _) in FAMILIES.items():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(root / family)
        copy_tokenizer(root / family)
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
    tokenizer = E.corpus.load_pretrained(E.MODEL_NAME, "tokenizer")
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
    config = E.corpus.load_pretrained(E.MODEL_NAME, "config.json")
    model = E.stand_in(config)
    assert type(model) is type(transformers.AutoModelForCausalLM.from_config(config))
    assert len(E.find_blocks(model)) == 2 and model.config.get_text_config().vocab_size == 256
    hidden = E.residual_after(model, 0, torch.arange(1, 9)[None])
    assert hidden.shape == (1, 8, WIDTH)
    assert E.logits_from(model, 0, hidden, torch.arange(1, 9)[None]).shape == (1, 8, 256)
    assert config.get_text_config().num_hidden_layers == DEPTH and config.get_text_config().vocab_size == VOCABULARY


@pytest.mark.parametrize("name", ENCODERS)
def test_stand_in_refuses_what_is_no_decoder(E, name):
    with pytest.raises(E.RunnerError, match="causal"):
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
        return E.fingerprint(E.corpus.model_identity(
            E.MODEL_NAME, E.corpus.load_pretrained(E.MODEL_NAME, "config.json")))

    copied = shutil.copytree(checkpoints / "llama", tmp_path / "elsewhere")
    assert identity(copied) == identity(checkpoints / "llama") != identity(checkpoints / "mistral")
    weights = copied / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-3] ^= 1
    weights.write_bytes(raw)
    assert identity(copied) != identity(checkpoints / "llama")


# --- what goes wrong with a model: one paragraph, in seconds ----------------------------------------------------------
def one_paragraph(finished, *parts):
    """Exit 2 and, in what an agent sees, one paragraph that holds `parts` and no address."""
    assert finished.code == 2, finished.stderr
    for text in (finished.stderr, finished.stdout):
        assert "://" not in text and "www." not in text and "Traceback" not in text
    head, _, message = finished.stderr.rstrip("\n").partition("\n")
    assert head.startswith("experiment.py failed in: ") and message and "\n" not in message, finished.stderr
    assert len(finished.stderr) <= TAIL
    for part in parts:
        assert part in finished.stderr, finished.stderr


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_text_data(tmp_path_factory.mktemp("data") / "library.jsonl")


def test_a_name_that_the_hub_lacks(tmp_path, data):
    folder = copy_template(tmp_path / "copy", MODEL_NAME="pythia-70m-deduped", DATASET=str(data))
    finished = run(folder, tmp_path / "cache")
    one_paragraph(finished, "'pythia-70m-deduped'", "EleutherAI/pythia-70m-deduped", "checking the settings")
    assert finished.cpu < 40 and finished.wall < 60          # the hub's own retries take half a minute


def broken(folder, source, *without):
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(*without))
    return str(folder)


def test_models_that_cannot_be_used(tmp_path, data, checkpoints):
    made = tmp_path / "models"
    for name in ("bert", "t5"):
        transformers.AutoModel.from_config(ENCODERS[name]).save_pretrained(made / name)
        copy_tokenizer(made / name)
    (made / "empty").mkdir()
    cut = broken(made / "cut", checkpoints / "gpt2")
    weights = made / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1_000])
    odd = broken(made / "odd", checkpoints / "gpt2")
    (made / "odd" / "config.json").write_text(json.dumps({"model_type": "no_such_family"}))
    embedded = "'embedded/model'"
    cases = {                                 # constants -> what the message names
        "missing": (dict(MODEL_NAME=str(made / "none")), [str(made / "none"), embedded]),
        "missing_relative": (dict(MODEL_NAME="models/of/mine"), ["'models/of/mine'", embedded]),
        "missing_dotted": (dict(MODEL_NAME="./models/mine"), ["'./models/mine'", embedded]),
        "no_config": (dict(MODEL_NAME=str(made / "empty")), [str(made / "empty"), "config.json"]),
        "unknown_family": (dict(MODEL_NAME=odd), [odd, "no_such_family"]),
        "no_weights": (dict(MODEL_NAME=broken(made / "bare", checkpoints / "gpt2", "*.safetensors")), ["weights"]),
        "cut_weights": (dict(MODEL_NAME=cut), ["weights"]),
        "no_tokenizer": (dict(MODEL_NAME=broken(made / "mute", checkpoints / "gpt2", "tokenizer*")), ["tokenizer"]),
        "bert": (dict(MODEL_NAME=str(made / "bert")), ["bert", "causal"]),
        "t5": (dict(MODEL_NAME=str(made / "t5")), ["t5", "causal"]),
        "layer": (dict(LAYER=6), ["LAYER = 6", "6 blocks"]),
        "long": (dict(MODEL_NAME=str(checkpoints / "gpt2"), CONTEXT_LENGTH=65), ["CONTEXT_LENGTH = 65", "64"]),
    }
    folders = {name: copy_template(tmp_path / name, **{"DATASET": str(data)} | constants)
               for name, (constants, _) in cases.items()}
    finished, wrong = run_in_turn(list(folders.values()), tmp_path / "cache"), []
    for name, (_, parts) in cases.items():
        try:
            one_paragraph(finished[folders[name]], *parts)
            assert finished[folders[name]].cpu < 40
        except AssertionError as error:
            wrong.append(f"{name}: {error}")
    assert not wrong, "\n\n".join(wrong)
