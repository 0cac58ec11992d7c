"""Explained variance of TopK SAEs on held-out activations: ours, SAELens's and dictionary_learning's own trainers.

    python bench/quality.py --export FILE             in the project's environment: the runner's cached activations -> FILE
    python bench/quality.py --activations FILE        in the peers' environment: trains on them and compares
    python bench/quality.py --activations FILE --run run_1     ours is the SAE of a finished run on the same activations

Everyone gets the same tokens (centred, mean squared norm 1), as many of them (20 epochs), the same width, k and batch. Peers
train at their defaults, and once more tuned for a run of this length: another learning rate, warm-up over the first 5 % of
the steps, linear decay over the last 20 %, latents called dead after 5 % of the tokens. Peers draw single tokens at random,
ours whole windows. Without FILE the model reads the standard library's modules, a fifth of them held out.

Each contestant is kept in --out as it finishes: the same command goes on with the others.

    EV = 1 - E|x - x_hat|^2 / sum_d Var(x_d)        L0 = mean number of non-zero latents        both on held-out tokens
"""
import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import collect
import peers
import numpy as np
import torch

RESULTS = Path(__file__).resolve().parent / "results"


class Data:
    """Windows of activations [window, position, d_in], float32, and which positions count."""

    def __init__(self, train, train_mask, heldout, heldout_mask, mean, scale, k=48, batch=1024):
        self.train, self.heldout = torch.as_tensor(train), torch.as_tensor(heldout)
        self.train_mask, self.heldout_mask = torch.as_tensor(train_mask), torch.as_tensor(heldout_mask)
        self.mean, self.scale = torch.as_tensor(mean), float(scale)     # x * scale + mean: the model's
        self.k, self.batch = int(k), int(batch)     # what the runner trains with

    @property
    def heldout_tokens(self):
        return self.heldout[self.heldout_mask]


def export(path):
    """The runner's own activations, training and held-out windows, with its sparsity and batch, to
    one file. Runs where experiment.py runs."""
    E = peers.load_experiment()
    store, _ = E.open_store(*E.load_config(E.MODEL_NAME, E.LAYER, E.CONTEXT_LENGTH), E.cache_folder())

    def part(name, ids):
        x, mask = (lambda batch: (batch.x, batch.mask))(store.batch(ids))
        mask = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        return {name: x.numpy(), name + "_mask": mask.numpy()}
    arrays = part("train", np.arange(store.windows.n_train))
    arrays |= part("heldout", store.windows.heldout())
    arrays |= {"mean": store.mean.numpy(), "scale": store.scale, "k": E.TARGET_L0, "batch": E.BATCH_TOKENS}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)
    print(f"{path}: {arrays['train_mask'].sum():,} training tokens and {arrays['heldout_mask'].sum():,} "
          f"held-out tokens of width {store.d_in}")


@torch.no_grad()
def make_data(folder, layer, tokens, length=128):
    """Activations of a local model on the standard library; the first position of each window is left out."""
    model, tokenizer = collect.load_model(folder)
    layer = model.config.num_hidden_layers // 2 - 1 if layer is None else layer

    def activations(n, keep):
        ids = collect.token_windows(tokenizer, n, length, model.config.vocab_size, keep)
        return torch.cat([model(input_ids=chunk, output_hidden_states=True, use_cache=False).hidden_states[layer + 1][:, 1:]
                          for chunk in ids.split(32)])
    train = activations(-(-tokens // (length - 1)), lambda name: zlib.crc32(name.encode()) % 5)
    heldout = activations(256, lambda name: zlib.crc32(name.encode()) % 5 == 0)
    mean = train.mean((0, 1))
    scale = (train - mean).square().sum(-1).mean().sqrt().item()
    full = [torch.ones(x.shape[:2], dtype=torch.bool) for x in (train, heldout)]
    return Data((train - mean) / scale, full[0], (heldout - mean) / scale, full[1], mean, scale)


@torch.no_grad()
def score(encode, decode, x):
    """Explained variance and L0 on tokens x [n, d_in]."""
    error = active = 0.0
    for chunk in x.split(4096):
        z = encode(chunk)
        error += (chunk - decode(z)).square().sum().double().item()
        active += (z != 0).sum().item()
    variance = (x.double() - x.double().mean(0)).square().sum().item()
    return {"explained_variance": 1 - error / variance, "l0": active / len(x)}


def token_batches(data, batch, seed):
    """Endless batches of single training tokens, a new order each epoch; the last incomplete batch is left out."""
    tokens, g = data.train[data.train_mask], torch.Generator().manual_seed(seed)
    while True:
        for ids in torch.randperm(len(tokens), generator=g)[:len(tokens) // batch * batch].split(batch):
            yield tokens[ids]


def train_saelens(data, args, steps, seed, lr):
    torch.manual_seed(seed)
    options = {} if lr is None else dict(lr=lr, lr_warm_up_steps=steps // 20, lr_decay_steps=steps // 5,
                                         dead_feature_window=steps // 20)
    peer = peers.SAELens("topk", data.train.shape[2], args.d_sae, args.k, steps=steps, batch=args.batch, **options)
    peer.trainer.data_provider = token_batches(data, args.batch, seed)
    with contextlib.redirect_stderr(io.StringIO()):
        sae = peer.trainer.fit()
    return score(peer.latents, sae.decode, data.heldout_tokens)


def train_dictionary_learning(data, args, steps, seed, lr):
    options = {} if lr is None else dict(lr=lr, warmup_steps=steps // 20, decay_start=steps - steps // 5)
    options.setdefault("warmup_steps", min(1000, steps - 1))
    peer = peers.DictionaryLearning("topk", data.train.shape[2], args.d_sae, args.k, steps=steps, seed=seed, **options)
    if lr is not None:
        peer.trainer.dead_feature_threshold = steps * args.batch // 20
    for _, x in zip(range(steps), token_batches(data, args.batch, seed)):
        peer.step(x)
    return score(peer.latents, peer.reconstruct, data.heldout_tokens)


def train_ours(data, args, seed):
    """This project's side: its trainer on the same arrays. The place to adjust."""
    E = peers.load_experiment()
    n, length, d_in = data.train.shape
    x, mask = torch.cat([data.train, data.heldout]), torch.cat([data.train_mask, data.heldout_mask])

    def batch(ids):
        ids = torch.as_tensor(np.asarray(ids))
        return E.Batch(x[ids], torch.zeros(len(ids), length, dtype=torch.long), ids, torch.arange(1, length + 1),
                       None if mask[ids].all() else mask[ids])
    windows = SimpleNamespace(n_train=n, train_pool=lambda *_: np.arange(n))
    store = SimpleNamespace(windows=windows, d_in=d_in, batch=batch, shard_tensors=[x],
                            heldout_chunks=lambda size: [np.arange(i, min(i + size, len(x))) for i in range(n, len(x), size)])
    E.CONTEXT_LENGTH, E.LEARNING_RATE = length + 1, None
    torch.manual_seed(seed)
    sae = E.SAE_VARIANTS["topk"](d_in, args.d_sae, args.k)
    stages = [stage._replace(epochs=args.epochs) for stage in sae.curriculum]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        E.train(sae, store, stages, seed, args.batch // (length + 1), time.time() + 10 ** 6, Path(folder) / "state.pt")
    sae.eval()

    def encode(tokens):
        shape = (len(tokens), 1)
        return sae.encode(E.Batch(tokens[:, None], torch.zeros(shape, dtype=torch.long), torch.zeros(len(tokens)), torch.ones(1),
                                  None)).dense()[:, 0]
    return score(encode, lambda z: z @ sae.W_dec + sae.b_dec, data.heldout_tokens)


def read_run(data, folder, d_sae, k):
    """A finished run's TopK weights (SAELens's layout, inputs as the model made them)."""
    from safetensors.torch import load_file
    w = load_file(Path(folder) / "sae_weights.safetensors")
    cfg = json.loads((Path(folder) / "cfg.json").read_text())
    if cfg["architecture"] != "topk" or cfg["k"] != k or len(w["b_enc"]) != d_sae:
        raise SystemExit(f"{folder} holds a {cfg['architecture']} SAE of {len(w['b_enc'])} latents; this compares topk, k = {k}, "
                         f"{d_sae} latents")

    def encode(x):
        pre_acts = (x * data.scale + data.mean - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
        top = pre_acts.topk(k, dim=1)
        return torch.zeros_like(pre_acts).scatter(1, top.indices, top.values.relu())

    def decode(z):
        return (z @ w["W_dec"] + w["b_dec"] - data.mean) / data.scale
    return score(encode, decode, data.heldout_tokens)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--export", type=Path, metavar="FILE")
    parser.add_argument("--activations", type=Path, metavar="FILE")
    parser.add_argument("--model", default=str(peers.PROJECT / "embedded" / "model"), help="where there is no FILE")
    parser.add_argument("--layer", type=int)
    parser.add_argument("--tokens", type=int, default=196_608, help="training tokens where there is no FILE")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, help="tokens per step, for all; default: the runner's")
    parser.add_argument("--d-sae", type=int, help="default: 8 x d_in")
    parser.add_argument("--k", type=int, help="default: the runner's target L0")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--saelens-lr", nargs="*", type=float, default=[1e-3], help="tuned learning rates; none: defaults alone")
    parser.add_argument("--dictionary-learning-lr", nargs="*", type=float, default=[2e-3])
    parser.add_argument("--run", nargs="*", type=Path, help="finished runs whose SAE stands for ours")
    parser.add_argument("--only", choices=("", "ours", "peers"), default="")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "quality.json")
    args = parser.parse_args()
    peers.quiet()
    torch.set_num_threads(args.threads)
    if args.export:
        return export(args.export)
    data = Data(**np.load(args.activations)) if args.activations else make_data(args.model, args.layer, args.tokens)
    args.d_sae = args.d_sae or 8 * data.train.shape[2]
    args.k, args.batch = args.k or data.k, args.batch or data.batch
    steps = args.epochs * int(data.train_mask.sum()) // args.batch
    jobs = []
    if args.only != "peers":
        jobs += [("ours, " + folder.name, lambda s, f=folder: read_run(data, f, args.d_sae, args.k)) for folder in args.run or ()] or [
            ("ours", lambda s: train_ours(data, args, s))]
    if args.only != "ours":
        for name, train, rates in (("SAELens", train_saelens, args.saelens_lr),
                                   ("dictionary_learning", train_dictionary_learning, args.dictionary_learning_lr)):
            jobs += [(f"{name}, {'default' if lr is None else f'tuned, lr {lr:g}'}",
                      lambda s, train=train, lr=lr: train(data, args, steps, s, lr)) for lr in (None, *rates)]
    settings = {"d_in": data.train.shape[2], "d_sae": args.d_sae, "k": args.k, "steps": steps, "batch": args.batch,
                "epochs": args.epochs, "seeds": args.seeds, "train_tokens": int(data.train_mask.sum()),
                "heldout_tokens": len(data.heldout_tokens)}
    before = json.loads(args.out.read_text()) if args.out.exists() else {}
    kept = {row["contestant"]: row for row in before.get("quality", ()) if before["settings"] == settings}
    rows = []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for name, job in jobs:
        if name not in kept:
            found = [job(seed) for seed in args.seeds]
            kept[name] = {"contestant": name, **{key: [f[key] for f in found] for key in ("explained_variance", "l0")}}
            args.out.write_text(json.dumps({"settings": settings, "quality": [*kept.values()]}, indent=1) + "\n")
        rows.append(kept[name])
        print(f"{name}: EV {statistics.mean(kept[name]['explained_variance']):.4f}", flush=True)
    print(f"\nTopK, d_in {settings['d_in']}, d_sae {args.d_sae}, k {args.k}, {steps:,} steps of {args.batch} tokens, fp32\n")
    print("| contestant | EV, held out | L0 | seeds |\n|---|---|---|---|")
    for r in rows:
        ev, spread = r["explained_variance"], ""
        if len(ev) > 1:
            spread = f" ± {statistics.stdev(ev) / len(ev) ** 0.5:.4f}"
        print(f"| {r['contestant']} | {statistics.mean(ev):.4f}{spread} | {statistics.mean(r['l0']):.1f} | {len(ev)} |")


if __name__ == "__main__":
    main()
