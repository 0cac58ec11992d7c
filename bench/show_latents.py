"""Unselected latents of a finished run, with the contexts that fire them most: for reading, in Markdown.

usage: python bench/show_latents.py RUN_FOLDER [--n 15] [--contexts 4] [--seed 0]

The latents are a random draw from the live ones, made before any look. Reads the run's own experiment.py, its weights and
the activation cache (so the run's model and data are needed, as for the run).
"""
import argparse
import importlib.util
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent


def load_runner(run):
    """Returns the run's experiment.py as a module; data/, runtime/, pages/ and the model are the project's."""
    sys.path.insert(0, str(ROOT))
    spec = importlib.util.spec_from_file_location("experiment", run / "experiment.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["experiment"] = module
    spec.loader.exec_module(module)
    module.HERE = ROOT
    return module


def load_run(E, run):
    """The SAE (weights unfolded to the scaled inputs that the store gives), the store and the tokenizer."""
    cfg = json.loads((run / "cfg.json").read_text())
    config, layer = E.load_config(E.MODEL_NAME, cfg["metadata"]["hook_layer"], E.CONTEXT_LENGTH)
    store, _ = E.open_store(config, layer, E.cache_folder())
    sae = E.make_sae(cfg["d_in"], cfg["d_sae"], 0)
    saved = load_file(run / "sae_weights.safetensors")
    unfolded = {"W_enc": saved["W_enc"] * store.scale, "W_dec": saved["W_dec"] / store.scale,
                "b_dec": (saved["b_dec"] - store.mean.cpu()) / store.scale}
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            value = unfolded.get(name, saved.get(name))
            if name == "log_threshold":
                value = saved["threshold"].log()
            if name == "b_enc" and value is None:
                value = saved["b_gate"]
            parameter.copy_(value)
        if hasattr(sae, "threshold"):
            sae.threshold.copy_(saved["threshold"][0])
    for stage in E.planned_stages(type(sae)):      # attention and the like, which are no parameters
        E.anneal(sae, stage, 1.0)
    return sae.eval(), store, E.load_tokenizer(), layer


def context(tokenizer, tokens, position, width=12):
    """The text around one position, the firing token between markers."""
    from data.token_text import token_texts     # here: load_runner has made it known
    texts = token_texts(tokenizer, tokens)

    def text(start, stop):
        return "".join(texts[start:stop]).replace("\n", "⏎").replace("`", "'").replace("|", "¦")
    start, begin = max(1, position - width), position
    while not texts[begin]:                     # within a character
        begin -= 1
    return f"{text(start, begin)}**⟦{text(begin, position + 1)}⟧**{text(position + 1, position + 5)}"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--n", type=int, default=15)
    parser.add_argument("--contexts", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    E = load_runner(args.run.resolve())
    with redirect_stdout(sys.stderr):
        sae, store, tokenizer, layer = load_run(E, args.run.resolve())
    run = E.Run(sae, store, E.load_model, layer, E.LiveRule(E.LIVE_MIN_FIRINGS, E.LIVE_MIN_FILES), {})
    rate = run.live.rate
    chosen = np.random.default_rng(args.seed).choice(run.live.ids, args.n, replace=False)
    tokens = store.windows.tokens[store.windows.heldout()]
    files = store.windows.doc_ids[store.windows.heldout()]
    per_window = E.CONTEXT_LENGTH - 1
    chosen = np.sort(chosen)
    print(f"# {args.n} live latents of `{E.SAE_VARIANT}`, unselected\n\nDrawn at random (seed {args.seed}) from the live latents of a finished run, "
          f"before any look; `python bench/show_latents.py {args.run}`. ⟦ ⟧ marks the token on which the latent fires, ⏎ a line's end.")
    for latent, (token, value) in zip(chosen, E.firings(run.encoded.codes, chosen)):
        print(f"\n**Latent {latent}**, fires on {100 * rate[latent]:.2f} % of tokens; strongest firing of each of "
              f"{args.contexts} files:\n")
        seen = set()
        for i in np.argsort(-value):
            window, place = divmod(int(token[i]), per_window)
            if files[window] in seen:
                continue
            seen.add(files[window])
            name = str(store.windows.names[files[window]])
            print(f"- {value[i]:.2f} `{name}`: {context(tokenizer, tokens[window], place + 1)}")
            if len(seen) == args.contexts:
                break


if __name__ == "__main__":
    main()
