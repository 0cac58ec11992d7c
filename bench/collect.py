"""Activation collection in tokens/s: ours, the model's full forward pass, and SAELens's ActivationsStore, interleaved.

    python bench/collect.py --model embedded/model --layer 3

The same token windows go to all: the text of the standard library's modules, cut into windows of one document each.
  full forward     the model with its head, activations thrown away: what collection must undercut
  ours             this project's activation cache: stopped at the layer, written to disk with checksums, mapped again
  ours, in memory  the same forward passes, nothing written: what the cache itself costs
  SAELens, ...     its store: `raw` the activations of each batch of windows, `shuffled` through its mixing buffer as a
                   trainer gets them; on a model loaded as AutoModelForCausalLM or as a HookedTransformer
"""
import argparse
import contextlib
import io
import json
import statistics
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import peers
import numpy as np
import torch

RESULTS = Path(__file__).resolve().parent / "results"


def load_model(folder, vocab=4096):
    """The model of a local folder in fp32; a random GPT-NeoX (6 layers, width 192) where there is none."""
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if (Path(folder) / "config.json").exists():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    else:
        print(f"no model in {folder}: a random one instead", file=sys.stderr)
        torch.manual_seed(0)
        model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(
            vocab_size=vocab, hidden_size=192, num_hidden_layers=6, num_attention_heads=6, intermediate_size=768,
            max_position_embeddings=512))
        tokenizer = None
    return model.eval().requires_grad_(False), tokenizer


def token_windows(tokenizer, n, length, vocab, keep=lambda name: True):
    """[n, length] ids; each window from one module of the standard library whose name `keep` accepts."""
    if tokenizer is None:
        return torch.randint(1, vocab, (n, length), generator=torch.Generator().manual_seed(0))
    rows = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        if keep(path.stem):
            ids = tokenizer(path.read_text(errors="ignore"), add_special_tokens=False)["input_ids"]
            rows += [ids[i:i + length] for i in range(0, len(ids) - length + 1, length)]
    return torch.tensor((rows * (n // len(rows) + 1))[:n])


def hooked_transformer(model):
    """The model as TransformerLens has it; its loader knows hub names alone, so its converters are called directly."""
    from transformer_lens import HookedTransformer
    from transformer_lens.config.hooked_transformer_config import HookedTransformerConfig
    from transformer_lens.loading_from_pretrained import convert_hf_model_config
    from transformer_lens.pretrained.weight_conversions.neox import convert_neox_weights
    with tempfile.TemporaryDirectory() as temporary:
        model.config.architectures = ["GPTNeoXForCausalLM"]
        model.config.save_pretrained(temporary)
        cfg = HookedTransformerConfig.from_dict(convert_hf_model_config(temporary) | {
            "dtype": torch.float32, "device": "cpu", "model_name": "local", "tokenizer_name": None})
    hooked = HookedTransformer(cfg, move_to_device=False)
    hooked.load_and_process_state_dict(convert_neox_weights(model, cfg), fold_ln=False, center_writing_weights=False,
                                       center_unembed=False, fold_value_biases=False)
    return hooked.eval().requires_grad_(False)


def saelens_store(model, hook, windows, d_in, batch):
    """SAELens's ActivationsStore over the windows as a local data set of token ids."""
    from datasets import Dataset
    from sae_lens.training.activations_store import ActivationsStore
    return ActivationsStore(model=model, dataset=Dataset.from_dict({"input_ids": windows.tolist()}), streaming=False,
                            hook_name=hook, hook_head_index=None, context_size=windows.shape[1], d_in=d_in,
                            n_batches_in_buffer=64, total_training_tokens=windows.numel(), store_batch_size_prompts=batch,
                            train_batch_size_tokens=2048, prepend_bos=False, normalize_activations="none",
                            device=torch.device("cpu"), dtype="float32")


def ours(model, layer, windows, d_in):
    """This project's side: functions that collect all windows, into a fresh activation cache and without it. The place to
    adjust."""
    E = peers.load_experiment()
    from data.windows import Windows

    def collect():
        n, length = windows.shape
        table = Windows(tokens=windows.numpy().astype(np.int32), lengths=np.full(n, length), doc_ids=np.arange(n), n_train=n,
                        names=[str(i) for i in range(n)], domains=[""] * n)
        E.CONTEXT_LENGTH = length
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            store = E.Store(Path(folder), table, d_in, torch.float32)
            store.collect(lambda: model, layer)
            return store.raw(range(min(n, 4)))

    def in_memory(batch=32):
        return [E.residual_after(model, layer, chunk) for chunk in windows.split(batch)][0]
    return collect, in_memory


def contestants(args, model, tokenizer, windows):
    """{name: function that passes over all windows and returns the first activations it has, or None}."""
    from sae_lens.load_model import HookedProxyLM
    d_in, layer, batch = model.config.hidden_size, args.layer, args.batch
    made = {}

    @torch.no_grad()
    def full_forward():
        for chunk in windows.split(batch):
            model(input_ids=chunk, use_cache=False).logits

    if args.only != "peers":
        made["ours"], made["ours, in memory"] = ours(model, layer, windows, d_in)
    made["full forward"] = full_forward
    if args.only == "ours":
        return made
    hook = f"gpt_neox.layers.{layer}"
    # its own copy of the model, since its proxy leaves a hook in the module that it wraps
    proxy = HookedProxyLM(load_model(args.model)[0], tokenizer, hook_names=[hook])
    hooked = hooked_transformer(model)
    for name, wrapped, where in (("AutoModelForCausalLM", proxy, hook),
                                 ("HookedTransformer", hooked, f"blocks.{layer}.hook_resid_post")):
        raw = saelens_store(wrapped, where, windows, d_in, batch)
        shuffled = saelens_store(wrapped, where, windows, d_in, batch)

        def collect_raw(store=raw):
            first = None
            for _ in range(len(windows) // batch):
                acts = store.get_filtered_llm_batch()
                first = acts if first is None else first
            return first.view(batch, -1, d_in)

        def collect_shuffled(store=shuffled):
            for _ in range(windows.numel() // 2048):
                next(store)
        made[f"SAELens, {name}, raw"], made[f"SAELens, {name}, shuffled"] = collect_raw, collect_shuffled
    return made


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(peers.PROJECT / "embedded" / "model"))
    parser.add_argument("--layer", type=int, help="activations after this block, from 0; default: the middle one")
    parser.add_argument("--windows", type=int, default=512, help="windows each contestant passes over in one round")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32, help="windows in one forward pass")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: CPU time, for a busy machine and 1 thread")
    parser.add_argument("--only", choices=("", "ours", "peers"), default="")
    parser.add_argument("--out", type=Path, default=RESULTS / "collect.json")
    args = parser.parse_args()
    peers.quiet()
    model, tokenizer = load_model(args.model)
    depth = model.config.num_hidden_layers
    args.layer = depth // 2 - 1 if args.layer is None else args.layer       # as the project's default
    windows = token_windows(tokenizer, args.windows // args.batch * args.batch, args.context, model.config.vocab_size)
    field = contestants(args, model, tokenizer, windows)
    with torch.no_grad():
        truth = model(input_ids=windows[:4], output_hidden_states=True).hidden_states[args.layer + 1]
    rows, base = [], next(iter(field))
    for threads in args.threads:
        torch.set_num_threads(threads)
        times, off = {name: [] for name in field}, {}
        clock, names = time.process_time if args.clock == "cpu" else time.perf_counter, list(field)
        for r in range(args.rounds + 1):        # the first round warms up
            for name in names[r % len(names):] + names[:r % len(names)]:
                began = clock()
                first = field[name]()
                times[name].append(clock() - began)
                if r == 0 and first is not None:
                    off[name] = ((first[:4] - truth).abs().max() / truth.abs().max()).item()
        for name in field:
            seconds = times[name][1:]
            rows.append({"contestant": name, "threads": threads, "tokens_per_second": windows.numel() / statistics.median(seconds),
                         "relative_to": base, "speed_ratio": statistics.median(b / s for s, b in zip(seconds, times[base][1:])),
                         "deviation": off.get(name)})
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"settings": {"layer": args.layer, "blocks": depth, "d_in": model.config.hidden_size,
                                                 "context": args.context, "batch": args.batch, "tokens": windows.numel(),
                                                 "rounds": args.rounds}, "collection": rows}, indent=1) + "\n")
    print(f"\nAfter block {args.layer} of {depth}, d_in {model.config.hidden_size}, fp32; speed relative to {base}; deviation: largest "
          "difference from the model's own hidden states, relative\n")
    print("| contestant | threads | tokens/s | relative speed | deviation |\n|---|---|---|---|---|")
    for r in rows:
        off = "" if r["deviation"] is None else f"{r['deviation']:.0e}"
        print(f"| {r['contestant']} | {r['threads']} | {r['tokens_per_second']:,.0f} | {r['speed_ratio']:.2f} | {off} |")


if __name__ == "__main__":
    main()
