"""Configurations of small models of every family, and checkpoints of them."""
import shutil

import torch
import transformers

from copies import PROJECT

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


def save_checkpoint(family, folder):
    """Writes a random checkpoint, norms and biases random too, so that leaving one out shows; with a tokenizer."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family][0])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    copy_tokenizer(folder)
