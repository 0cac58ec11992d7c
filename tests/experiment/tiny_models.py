"""Tiny language models of three families, and text of two kinds of documents."""
import numpy as np
import transformers

WIDTH, CONTEXT, VOCABULARY, DEPTH = 16, 49, 60, 3
SIZES = dict(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=2, bos_token_id=0,
             eos_token_id=0, pad_token_id=0, max_position_embeddings=160)
FAMILIES = {
    "gpt_neox": transformers.GPTNeoXConfig(**SIZES, intermediate_size=32, attn_implementation="eager"),
    "gpt2": transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=DEPTH, n_head=2, n_positions=160,
                                    bos_token_id=0, eos_token_id=0),
    "gptj": transformers.GPTJConfig(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=DEPTH, n_head=2, n_positions=160,
                                    rotary_dim=4, bos_token_id=0, eos_token_id=0)}


def two_kinds(n, forget, low=20, seed=0):
    """[n, CONTEXT] random tokens, BOS in front; where `forget` says so from 1 ... low - 1, else from low on."""
    rng = np.random.default_rng(seed)
    tokens = np.where(forget[:, None], rng.integers(1, low, (n, CONTEXT)), rng.integers(low, VOCABULARY, (n, CONTEXT)))
    tokens[:, 0] = 0
    return tokens


def separable(spoken, n=96, n_train=64, **kwargs):
    """(run, ids of training windows, whether they are FORGET's, the same of held-out ones); documents 0 and 1 are
    FORGET's, 2 and 3 not, 4 and 5 are, ..."""
    forget = np.arange(n) // 4 % 2 == 0
    domains = ["secret" if i // 2 % 2 == 0 else "open" for i in range(n // 2)]
    run = spoken(two_kinds(n, forget), n_train, domains, **kwargs)
    return run, np.arange(n_train), forget[:n_train], np.arange(n_train, n), forget[n_train:]
