"""Trained SAEs of every variant in the neighbours' tools: SAELens loads them, SAEBench's core evaluation measures them.

    make interop                              or: "$(bench/setup_interop.sh)" bench/interop.py [--variants topk temporal]

Every variant is trained by a small run of experiment.py, in a copy, on the embedded model and the standard library's text.
That process notes down what our code makes of held-out activations: latents and reconstructions. Then

  SAELens   loads the run's folder. Its latents and reconstructions of the same activations, as the model made them, must be
            ours up to rounding: |a - ours| / |ours| of each token's vector, the largest of all tokens, at most 1e-5. Left out
            and counted are tokens where a latent is active on one side alone (a tie: at its threshold, or a TopK's last
            place); of all active latents they may be one in 10,000. A folder that its layout cannot express must have an
            architecture of a name that it does not know, and must be refused.
  SAEBench  runs its core evaluation, `multiple_evals`, on the run's held-out windows: on what SAELens loaded, or on `BenchSAE`,
            for variants that SAELens refuses. Its figures must be those of the run's final_info.json. Replaced
            are two calls that need a hub: the model's loader, which knows hub names alone, and the look-up of the tokenizer
            that a data set of token ids was made with.

Ends with an error where one of these does not hold; the table is also written to bench/results/interop.md. No hub is asked.
"""
import argparse
import importlib.util
import json
import logging
import math
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import peers
import collect
import torch
from safetensors.torch import load_file, save_file

sys.path[:0] = [str(peers.PROJECT), str(peers.PROJECT / "tests")]
import copies

WINDOWS = 32            # of which latents and reconstructions are compared
# Held-out windows are one a document and have no padding: then all measures of a run are of the same tokens, all of them
SETTINGS = dict(TRAIN_TOKENS=32_768, CONTEXT_LENGTH=128, MIN_WINDOW=128, EVAL_FILES=48, EVAL_WINDOWS_PER_FILE=1, EXPANSION=4,
                TARGET_L0=16, EPOCHS_SCALE=0.5, BATCH_TOKENS=1024, EVALS=("core",))
DEVIATION, TIES = 1e-5, 1e-4
# L0: of active latents; the others: absolute, cross-entropy in nats
TOLERANCES = {"L0": 1e-3, "explained variance": 1e-4, "CE": 1e-4, "CE with the SAE": 1e-3}


# ---- Our side, in a process of its own ----
def experiment_of(folder):
    """Returns the folder's experiment.py as a module; data/, runtime/ and pages/ are the project's."""
    spec = importlib.util.spec_from_file_location("experiment", Path(folder) / "experiment.py")
    module = sys.modules["experiment"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def note(E, sae, store, path):
    """Held-out tokens and activations as the model made them; of the first windows without BOS latents and reconstructions."""
    ids = store.windows.heldout()
    first = ids[:WINDOWS]
    batch = store.batch(first)
    latents = sae.encode(batch)
    assert batch.mask is None and not sae.training
    save_file({"tokens": store.tokens(ids), "x": store.raw(ids), "latents": latents.dense(),
               "reconstructions": store.unscaled(sae.decode(latents))}, path)


def train(folders):
    """A whole run in each of the folders; `noted.safetensors` beside it is what our code computes."""
    for folder in map(Path, folders):
        os.chdir(folder)
        sys.argv = ["experiment.py", "--out_dir=run_1"]
        E = experiment_of(folder)

        def export(sae, store, layer, to, export=E.export):
            export(sae, store, layer, to)
            if to.name == "run_1.partial":          # not the preflight's
                note(E, sae, store, folder / "noted.safetensors")
        E.export = export
        E.run_script(E.main, E.__file__, E.SAE, E.SAE_VARIANTS, E.SAE_VARIANT)


# ---- SAELens ----
def deviation(theirs, ours):
    """The largest of |theirs - ours| / |ours| over rows; infinite where there are none."""
    relative = (theirs - ours).norm(dim=-1) / ours.norm(dim=-1).clamp_min(1e-30)
    return relative.max().item() if len(relative) else math.inf


@torch.no_grad()
def compare(sae, noted):
    """{name: number} of an SAE that takes the model's activations, against what our code computed."""
    x, ours, x_hat = noted["x"][:WINDOWS], noted["latents"], noted["reconstructions"]
    z = sae.encode(x)
    ties = (z[:, 1:] != 0) != (ours != 0)
    same = ~ties.any(-1)
    found = {"latents": deviation(z[:, 1:][same], ours[same])}
    for name, theirs in (("reconstructions", sae.decode(z)), ("forward", sae(x))):
        found[name] = deviation(theirs[:, 1:][same], x_hat[same])
    return found | {"ties": ties.sum().item(), "active": (ours != 0).sum().item()}


def too_far(found):
    wrong = [f"{name} deviate by {found[name]:.1e}" for name in ("latents", "reconstructions", "forward")
             if not found[name] <= DEVIATION]
    return wrong + [f"{found['ties']} ties"] * (not 0 < found["active"] >= found["ties"] / TIES)


def in_saelens(run, cfg, known):
    """SAELens's object of a run's folder, or None where it refuses; and what is wrong. `known` are the architectures whose
    layout is SAELens's."""
    from sae_lens import SAE
    from sae_lens.registry import SAE_CLASS_REGISTRY
    architecture, wrong = cfg["architecture"], []
    if architecture not in known:
        if architecture in SAE_CLASS_REGISTRY:
            wrong.append(f"{architecture!r} is the name of another architecture in SAELens")
        try:
            SAE.load_from_disk(run)
            wrong.append("SAELens loads what it cannot express")
        except Exception as error:
            if not isinstance(error, KeyError) or error.args != (architecture,):    # of its registry
                wrong.append(f"SAELens refuses it by accident: {type(error).__name__} {error}")
        return None, wrong
    sae = SAE.load_from_disk(run)
    for name, value in cfg["metadata"].items():
        if sae.cfg.metadata[name] != value:
            wrong.append(f"metadata {name}: {sae.cfg.metadata[name]!r} is not {value!r}")
    return sae, wrong


# ---- SAEBench ----
def bench_sae(folder, cfg):
    """An SAE of a run's folder for SAEBench, of our class and its saved weights.

    It takes windows [batch, 1 + seq, d_in] as the model made them, with BOS, whose latents are zero: SAEBench leaves that token
    out of its means and as it is in the model. So variants whose latents depend on earlier tokens work too.
    """
    from sae_bench.custom_saes.base_sae import BaseSAE
    E, weights = experiment_of(folder), load_file(folder / "run_1" / "sae_weights.safetensors")
    d_in, d_sae, about = cfg["d_in"], cfg["d_sae"], cfg["metadata"]
    mean, scale = weights["input_mean"], weights["input_scale"].item()
    sae = E.SAE_VARIANTS[E.SAE_VARIANT](d_in, d_sae, E.TARGET_L0).eval()
    below = "lower." if hasattr(sae, "lower") else ""
    weights |= {below + "W_enc": weights[below + "W_enc"] * scale, below + "W_dec": weights[below + "W_dec"] / scale,
                below + "b_dec": (weights[below + "b_dec"] - mean) / scale}
    with torch.no_grad():
        for name, value in sae.state_dict().items():
            if name in weights:             # a threshold for each latent, of a class that has one
                value.copy_(weights[name] if value.shape == weights[name].shape else weights[name][0])
            elif name == "begun":           # level 2 has been initialised
                value.fill_(True)
    assert set(dict(sae.named_parameters())) <= set(weights)
    E.anneal(sae, E.planned_stages(type(sae))[-1], 1.0)     # as training leaves it

    class BenchSAE(BaseSAE):
        def __init__(self):
            super().__init__(d_in, d_sae, about["model_name"], about["hook_layer"], torch.device("cpu"), torch.float32,
                             about["hook_name"])
            self.sae, self.cfg.architecture, self.cfg.context_size = sae, cfg["architecture"], about["context_size"]
            reads = {"compositional": lambda: torch.cat([sae.W_enc, sae.W_enc @ sae.E @ sae.W_c], 1),
                     "hierarchical": lambda: sae.lower.W_enc @ sae.W_enc}.get(cfg["architecture"], lambda: sae.W_enc)
            self.W_enc.data, self.W_dec.data = reads() / scale, sae.directions() * scale
            self.b_enc.data, self.b_dec.data = sae.b_enc.data, weights[below + "b_dec"] * scale + mean

        def batch(self, x):
            x = (x[:, 1:] - mean) / scale
            return E.Batch(x=x, tokens=x.new_zeros(x.shape[:2], dtype=torch.long), mask=None, doc_ids=torch.arange(len(x)),
                           positions=torch.arange(1, 1 + x.shape[1]))

        def encode(self, x):
            z = self.sae.encode(self.batch(x)).dense()
            return torch.cat([z.new_zeros(len(z), 1, d_sae), z], 1)

        def decode(self, z):
            x_hat = self.sae.decode(E.Latents.from_dense(z[:, 1:])) * scale + mean
            return torch.cat([x_hat.new_zeros(len(z), 1, d_in), x_hat], 1)

        def forward(self, x):
            return self.decode(self.encode(x))
    return BenchSAE()


def in_saebench(saes, tokens, model, tokenizer, folder):
    """{variant: metrics} of SAEBench's core evaluation of {variant: SAE}, on windows of tokens [n, context], of which it takes
    as many at a time as the second result says."""
    import sae_bench.evals.core.main as core
    from sae_lens.training import activations_store
    hooked = collect.hooked_transformer(model)
    hooked.tokenizer = tokenizer
    core.HookedTransformer = SimpleNamespace(from_pretrained_no_processing=lambda name, **options: hooked)
    activations_store.validate_pretokenized_dataset_tokenizer = lambda **_: None
    logging.getLogger("datasets.load").disabled = True      # of an option that SAEBench sets and datasets 5 ignores
    (folder / "heldout").mkdir()
    (folder / "heldout" / "train.jsonl").write_text("".join(
        json.dumps({"input_ids": ids}) + "\n" for ids in tokens.tolist()))
    size = max(n for n in range(1, 17) if len(tokens) % n == 0)
    os.chdir(folder)        # where "heldout" is a data set, and looks like a name on the hub
    results = core.multiple_evals(
        list(saes.items()), n_eval_reconstruction_batches=len(tokens) // size,
        n_eval_sparsity_variance_batches=len(tokens) // size, eval_batch_size_prompts=size,
        compute_featurewise_density_statistics=True, compute_featurewise_weight_based_metrics=True,
        exclude_special_tokens_from_reconstruction=True, dataset="heldout", context_size=tokens.shape[1],
        output_folder="saebench", device="cpu")
    return {result["sae_set"]: result["metrics"] for result in results}, size


def figures(metrics, reported, x, size):
    """{name: (SAEBench's figure, ours)}; x [n, context, d_in]: the model's activations, of which SAEBench took `size` windows
    at a time.

    What SAEBench calls explained variance is 1 - error / (E|x|^2 - (mean of x^2 over tokens and channels)^2); ours has the
    variance about the mean, E|x|^2 - |E x|^2. Its `mse` is the mean squared error divided by the batch's tokens: from it follows
    ours, and from ours what it calls explained variance.
    """
    x = x[:, 1:].double()
    of_batch, x = size * x.shape[1], x.flatten(0, 1)
    squares, variance = x.square().sum(1).mean(), (x - x.mean(0)).square().sum(1).mean()
    quality, performance = metrics["reconstruction_quality"], metrics["model_performance_preservation"]
    ours = reported["explained_variance"]
    divisor = squares - x.square().mean() ** 2
    return {
        "L0": (metrics["sparsity"]["l0"], reported["l0"]),
        "explained variance": (1 - (quality["mse"] * of_batch / variance).item(), ours),
        "its explained variance": (quality["explained_variance"], 1 - ((1 - ours) * variance / divisor).item()),
        "CE": (performance["ce_loss_without_sae"], reported["ce_model"]),
        "CE with the SAE": (performance["ce_loss_with_sae"], reported["ce_sae"])}


def disagreements(found):
    wrong = []
    for name, (theirs, ours) in found.items():
        allowed = TOLERANCES[name.removeprefix("its ")] * (ours if name == "L0" else 1)
        if not abs(theirs - ours) <= allowed:
            wrong.append(f"SAEBench: {name} {theirs:.5f}, ours {ours:.5f}")
    return wrong


# ---- All of it ----
HEADER = """SAELens {saelens}, SAEBench {saebench}, torch {torch}. Every variant trained on {train:,} tokens; its latents and
reconstructions are compared on {compared:,} held-out tokens, SAEBench ran on {measured:,}. Loaded: by SAELens, or, where it knows
no such architecture and refuses, by `BenchSAE`. Deviation: the largest |a - ours| / |ours| of a token's vector (allowed 1e-5);
ties: latents active on one side alone. Pairs: SAEBench's figure / ours, from final_info.json; "its" explained variance is the
one that SAEBench reports, beside what its formula makes of our error. CE: next-token cross-entropy.

| variant | loaded | latents | reconstruction | ties | L0 | explained variance | its explained variance | CE | CE with the SAE |
|---|---|---|---|---|---|---|---|---|---|
"""


def row(variant, loaded, found, pairs):
    numbers = [" / ".join(f"{value:.{2 if name == 'L0' else 4}f}" for value in pair) for name, pair in pairs.items()]
    cells = [variant, loaded, f"{found['latents']:.0e}", f"{max(found['reconstructions'], found['forward']):.0e}",
             f"{found['ties']} of {found['active']:,}", *(numbers or ["none"])]
    return f"| {' | '.join(cells)} |\n"


def measured_in(temporary, variants):
    """The table, and what is wrong; all files are below the folder `temporary`."""
    import transformers
    transformers.logging.disable_progress_bar()
    text, began, known = copies.write_text_data(temporary / "text.jsonl"), time.time(), peers.load_experiment().SAELENS
    folders = {variant: copies.copy_template(temporary / variant, SAE_VARIANT=variant, DATASET=str(text), **SETTINGS)
               for variant in variants}
    print(f"training {', '.join(variants)}", flush=True)
    subprocess.run([sys.executable, __file__, "--train", *folders.values()], check=True,
                   env=os.environ | {"SAE_CACHE_DIR": str(temporary / "cache")}, stdout=subprocess.DEVNULL)
    print(f"trained after {time.time() - began:.0f} s; now SAELens and SAEBench", flush=True)
    saes, loaded, found, reported, wrong = {}, {}, {}, {}, []
    for variant, folder in folders.items():
        cfg, noted = json.loads((folder / "run_1" / "cfg.json").read_text()), load_file(folder / "noted.safetensors")
        sae, problems = in_saelens(folder / "run_1", cfg, known)
        loaded[variant], saes[variant] = "SAELens" if sae else "BenchSAE", sae or bench_sae(folder, cfg)
        found[variant] = compare(saes[variant], noted)
        wrong += [f"{variant}: {problem}" for problem in problems + too_far(found[variant])]
        print("".join(f"{variant}: {problem}\n" for problem in problems), end="", flush=True)     # SAEBench may fail on them
        reported[variant] = copies.results(folder)["core"]["metrics"]
    model, tokenizer = collect.load_model(peers.PROJECT / "embedded" / "model")
    metrics, size = in_saebench(saes, noted["tokens"], model, tokenizer, temporary)
    rows = []
    for variant in variants:
        pairs = figures(metrics[variant], reported[variant], noted["x"], size) if variant in metrics else {}
        wrong += [f"{variant}: {problem}" for problem in disagreements(pairs) or ["SAEBench failed"] * (not pairs)]
        rows.append(row(variant, loaded[variant], found[variant], pairs))
    head = HEADER.format(saelens=version("sae-lens"), saebench=version("sae-bench"), torch=torch.__version__,
                         train=SETTINGS["TRAIN_TOKENS"], compared=noted["latents"].shape[:2].numel(),
                         measured=noted["x"][:, 1:, 0].numel())
    return head + "".join(rows), wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", help="default: all")
    parser.add_argument("--out", type=Path, default=collect.RESULTS / "interop.md")
    parser.add_argument("--train", nargs="+", metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        return train(args.train)
    peers.quiet()
    out = args.out.resolve()
    with tempfile.TemporaryDirectory(prefix="interop.") as temporary:
        table, wrong = measured_in(Path(temporary), args.variants or [*peers.load_experiment().SAE_VARIANTS])
        os.chdir(peers.PROJECT)
    print("\n" + table, flush=True)
    out.write_text(table)
    if wrong:
        sys.exit("\n".join(["Not as it should be:", *wrong]))
    print("All agree.")


if __name__ == "__main__":
    main()
