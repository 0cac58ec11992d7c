"""Trains the embedded language model (GPT-NeoX, byte-level BPE) on the embedded corpus and writes it in Hugging Face format.

usage: python embedded/train_lm.py [--out embedded/model] [--tokens 48000000] [--exclude sympy]

Only files that `is_heldout` of data/documents.py leaves in are read, for the tokenizer and for the model. Hidden matrices are trained by Muon,
the rest by AdamW; warm-up 100 steps, constant to 30 %, linear to 2 %. --exclude leaves one domain out (the unlearning oracle),
with the tokenizer of --tokenizer, so that losses stay comparable.
"""
import argparse
import copy
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data.documents import corpus_hash, corpus_versions, DOMAINS, embedded_documents
from runtime.memory import keep_freed_memory

VOCABULARY, SEQUENCE, BATCH = 4096, 256, 16
WIDTH, LAYERS, HEADS = 192, 6, 6
MUON_LR, ADAMW_LR = 1e-2, 4e-3


def train_tokenizer(texts):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], min_frequency=2, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end)


def pack(documents, tokenizer):
    """One stream of token ids, an end-of-text (0) before each document: [n_tokens] uint16."""
    encoded = tokenizer.backend_tokenizer.encode_batch([d.text for d in documents])
    return np.concatenate([np.array([0] + e.ids, dtype=np.uint16) for e in encoded])


def windows(stream, starts):
    """[batch, SEQUENCE] ids, each window beginning with end-of-text as in the runner."""
    ids = torch.from_numpy(np.stack([stream[s:s + SEQUENCE] for s in starts]).astype(np.int64))
    ids[:, 0] = 0
    return ids


def next_token_loss(model, ids):
    with torch.autocast(ids.device.type, dtype=torch.bfloat16):
        logits = model(ids[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


@torch.no_grad()
def heldout_loss(model, stream, device, tokens=100_000):
    model.eval()
    starts = np.arange(0, min(len(stream), tokens) - SEQUENCE, SEQUENCE)
    losses = [next_token_loss(model, windows(stream, starts[i:i + 32]).to(device)).item() for i in range(0, len(starts), 32)]
    model.train()
    return float(np.mean(losses))


def learning_rate_scale(step, steps):
    progress = step / steps
    return min(1.0, (step + 1) / 100) * (1.0 if progress < 0.3 else 1.0 - 0.98 * (progress - 0.3) / 0.7)


def train(model, stream, heldout, steps, device, checkpoint):
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    rest = [p for p in model.parameters() if not any(p is h for h in hidden)]
    optimizers = [torch.optim.Muon(hidden, lr=MUON_LR, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW(rest, lr=ADAMW_LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]
    base = [o.param_groups[0]["lr"] for o in optimizers]
    rng, starts, began, recent = np.random.default_rng(0), [], time.time(), []
    for step in range(steps):
        if len(starts) < BATCH:                              # a new epoch, at another phase
            starts = rng.permutation(np.arange(rng.integers(SEQUENCE), len(stream) - SEQUENCE, SEQUENCE - 1)).tolist()
        for optimizer, lr in zip(optimizers, base):
            optimizer.param_groups[0]["lr"] = lr * learning_rate_scale(step, steps)
        loss = next_token_loss(model, windows(stream, [starts.pop() for _ in range(BATCH)]).to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        recent = recent[-99:] + [loss.item()]
        if step % 1000 == 999 or step == steps - 1:
            rate = (step + 1) * BATCH * SEQUENCE / (time.time() - began)
            print(f"step {step}/{steps}  train {np.mean(recent):.3f}  held-out {heldout_loss(model, heldout, device):.3f}  "
                  f"{rate:,.0f} tokens/s", flush=True)
            checkpoint(model)


def main():
    keep_freed_memory()
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default=str(Path(__file__).parent / "model"))
    parser.add_argument("--tokens", type=int, default=36_000_000, help="training tokens, epochs counted")
    parser.add_argument("--exclude", default=None, choices=sorted(DOMAINS), help="a domain to leave out")
    parser.add_argument("--tokenizer", default=None, help="folder of a tokenizer to reuse")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    documents = [d for d in embedded_documents() if d.domain != args.exclude]
    training = [d for d in documents if not d.heldout]
    tokenizer = (AutoTokenizer.from_pretrained(args.tokenizer) if args.tokenizer
                 else train_tokenizer([d.text for d in training[::3]]))
    stream, heldout = pack(training, tokenizer), pack([d for d in documents if d.heldout], tokenizer)
    order = np.random.default_rng(1).permutation(len(heldout) // SEQUENCE)      # held-out windows of every domain
    heldout = np.concatenate([heldout[i * SEQUENCE:(i + 1) * SEQUENCE] for i in order])
    model = GPTNeoXForCausalLM(GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=4 * WIDTH,
        max_position_embeddings=512, bos_token_id=0, eos_token_id=0)).to(device)
    steps = args.tokens // (BATCH * SEQUENCE)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(stream):,} training tokens in {len(training):,} files, "
          f"{steps:,} steps", flush=True)
    tokenizer.save_pretrained(args.out)
    train(model, stream, heldout, steps, device, checkpoint=lambda m: copy.deepcopy(m).to(torch.bfloat16).save_pretrained(args.out))
    model = GPTNeoXForCausalLM.from_pretrained(args.out, dtype=torch.float32).to(device)      # as it ships: rounded to bf16
    card = {"corpus_hash": corpus_hash(), "versions": corpus_versions(), "excluded_domain": args.exclude,
            "training_tokens": args.tokens, "distinct_tokens": len(stream), "heldout_loss": heldout_loss(model, heldout, device, tokens=1_000_000)}
    (Path(args.out) / "training.json").write_text(json.dumps(card, indent=1) + "\n")
    print(json.dumps(card), flush=True)


if __name__ == "__main__":
    main()
