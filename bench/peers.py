"""The contestants of the benchmarks: one training step of an SAE in each library, behind one small interface.

Every peer trains with its own code: SAELens through SAETrainer.step, dictionary_learning through <Trainer>.update, sparsify
through SparseCoder and the calls its Trainer makes around it. This project's side is `Ours`, at the end.
"""
import contextlib
import functools
import importlib
import math
import os
import sys
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
import numpy as np
import torch

PROJECT = Path(__file__).resolve().parent.parent
VARIANTS = ("topk", "standard", "batch_topk", "jumprelu", "gated", "matryoshka")
GROUPS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32)       # Matryoshka prefixes, the same for all
FP32 = "fp32 state, fp32 arithmetic"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"     # gpu.py alone lets it be seen


class Contestant:
    """`step(x)` is one whole training step on x [n, d_in]; `latents(x)` are dense and as in training."""
    name, optimizer, precision = "", "Adam", FP32
    sparsity = None                     # weight of the sparsity penalty; None where the variant has none to steer
    thresholds, log_thresholds = None, False    # JumpReLU's thresholds, a parameter [d_sae]; whether it holds logarithms
    last_l0 = None

    def step(self, x):
        raise NotImplementedError

    def latents(self, x):
        raise NotImplementedError

    def reconstruct(self, latents):
        raise NotImplementedError

    @torch.no_grad()
    def measure(self, x):
        """Mean number of active latents and explained variance on x."""
        z = self.latents(x)
        error = (x - self.reconstruct(z)).square().sum(1).mean()
        return (z != 0).sum(1).float().mean().item(), (1 - error / x.var(0, unbiased=False).sum()).item()

    @torch.no_grad()
    def load(self, start):
        """Begin from a given dictionary: unit directions [d_sae, d_in] and a threshold on their projections.

        The sparsity weight starts where its optimum keeps what the threshold keeps: an L1 weight w shrinks by w / 2, a
        latent's price c drops values below sqrt(c).
        """
        theta = start["threshold"]
        for parameter, value in self.targets(start):
            parameter.copy_(value)
        if self.thresholds is not None:
            now = self.thresholds.exp() if self.log_thresholds else self.thresholds
            self.scale_thresholds(theta / now.mean().item())
        if self.sparsity is not None:
            self.sparsity = 2 * theta if self.thresholds is None else theta ** 2

    @torch.no_grad()
    def scale_thresholds(self, factor):
        self.thresholds.add_(math.log(factor)) if self.log_thresholds else self.thresholds.mul_(factor)

    def steer(self, x, k):
        """Moves what sets the sparsity towards an L0 of k: JumpReLU's thresholds, or the penalty's weight by how far L0 is
        from k and by how fast it moves."""
        if self.thresholds is None and self.sparsity is None:
            return
        l0 = max(self.measure(x)[0], 0.1)
        if self.thresholds is not None:
            return self.scale_thresholds(min(1.2, max(0.8, (l0 / k) ** 0.15)))
        self.sparsity *= min(1.6, max(0.6, (l0 / k) ** 0.2 * (l0 / (self.last_l0 or l0)) ** 1.5))
        self.last_l0 = l0


class SAELens(Contestant):
    def __init__(self, variant, d_in, d_sae, k, sparse=False, lr=3e-4, steps=10 ** 6, batch=2048, **trainer):
        from sae_lens import saes
        from sae_lens.config import LoggingConfig, SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer
        self.name, self.variant = "SAELens" + (" (sparse activations)" if sparse else ""), variant
        base, options = {
            # its sparse form has no backward through the rescaling by decoder norms: off there
            "topk": ("TopK", dict(k=k, use_sparse_activations=sparse, rescale_acts_by_decoder_norm=not sparse)),
            "standard": ("Standard", dict(l1_coefficient=1.0)),
            "batch_topk": ("BatchTopK", dict(k=float(k))),
            "jumprelu": ("JumpReLU", dict(l0_coefficient=1.0)),
            "gated": ("Gated", dict(l1_coefficient=1.0)),
            "matryoshka": ("MatryoshkaBatchTopK", dict(k=float(k), matryoshka_widths=[
                round(f * d_sae) for f in np.cumsum(GROUPS)])),
        }[variant]
        options.update(trainer.pop("sae", {}))
        sae = getattr(saes, base + "TrainingSAE")(
            getattr(saes, base + "TrainingSAEConfig")(d_in=d_in, d_sae=d_sae, device=DEVICE, **options))
        cfg = SAETrainerConfig(total_training_samples=steps * batch, train_batch_size_samples=batch, lr=lr, lr_end=lr / 10,
                               device=DEVICE, logger=LoggingConfig(log_to_wandb=False), **trainer)
        self.trainer = SAETrainer(cfg, sae, iter(()))
        self.sae, self.thresholds = sae, getattr(sae, "threshold", None)

    def step(self, x):
        self.trainer.step(x)
        self.trainer.n_training_steps += 1      # what fit() does after each step

    def latents(self, x):
        z = self.sae.encode_with_hidden_pre(x)[0]
        return z.to_dense() if z.is_sparse else z

    def reconstruct(self, latents):
        return self.sae.decode(latents)

    @property
    def schedule(self):
        return next(iter(self.trainer.coefficient_schedulers.values()), None)

    @property
    def sparsity(self):
        return self.schedule and self.schedule.final_value

    @sparsity.setter
    def sparsity(self, value):
        self.schedule.final_value = self.schedule.current_value = value

    def targets(self, start):
        sae, theta = self.sae, start["threshold"]
        yield sae.W_dec, start["directions"]
        yield sae.W_enc, start["directions"].t()
        if self.variant == "standard":
            yield sae.b_enc, torch.full_like(sae.b_enc, -theta)
        if self.variant == "gated":
            yield sae.b_gate, torch.full_like(sae.b_gate, -theta)


class DictionaryLearning(Contestant):
    name = "dictionary_learning"

    def __init__(self, variant, d_in, d_sae, k, steps=10 ** 6, autocast=False, **options):
        self.autocast = functools.partial(torch.autocast, DEVICE, torch.bfloat16, enabled=autocast)
        module, trainer, extra = {
            "topk": ("top_k", "TopKTrainer", dict(k=k)),
            "standard": ("standard", "StandardTrainer", dict(sparsity_warmup_steps=None)),
            "batch_topk": ("batch_top_k", "BatchTopKTrainer", dict(k=k)),
            "jumprelu": ("jumprelu", "JumpReluTrainer", dict(target_l0=float(k), sparsity_warmup_steps=None)),
            "gated": ("gdm", "GatedSAETrainer", dict(sparsity_warmup_steps=None)),
            "matryoshka": ("matryoshka_batch_top_k", "MatryoshkaBatchTopKTrainer", dict(k=k, group_fractions=list(GROUPS))),
        }[variant]
        self.variant, self.n_steps = variant, 0
        make = getattr(importlib.import_module("dictionary_learning.trainers." + module), trainer)
        self.trainer = make(steps=steps, activation_dim=d_in, dict_size=d_sae, layer=0, lm_name="none", device=DEVICE,
                            **extra | options)
        self.ae = self.trainer.ae
        self.thresholds = self.ae.threshold if variant == "jumprelu" else None

    def step(self, x):
        with self.autocast():       # as its trainSAE does with autocast_dtype
            self.trainer.update(self.n_steps, x)
        self.n_steps += 1

    def latents(self, x):
        if self.variant in ("topk", "batch_topk", "matryoshka"):
            return self.ae.encode(x, use_threshold=False)
        return self.ae.encode(x)

    def reconstruct(self, latents):
        return self.ae.decode(latents)

    @property
    def sparsity(self):
        return getattr(self.trainer, "l1_penalty", None)

    @sparsity.setter
    def sparsity(self, value):
        self.trainer.l1_penalty = value

    def targets(self, start):
        ae, directions, theta = self.ae, start["directions"], start["threshold"]
        self.n_steps = 1                # step 0 would set the decoder's bias from the data; the data are centred
        if self.variant in ("jumprelu", "matryoshka"):
            yield ae.W_dec, directions
            yield ae.W_enc, directions.t()
        else:
            yield ae.decoder.weight, directions.t()
            yield ae.encoder.weight, directions
        if self.variant == "standard":
            yield ae.encoder.bias, torch.full_like(ae.encoder.bias, -theta)
        if self.variant == "gated":
            yield ae.gate_bias, torch.full_like(ae.gate_bias, -theta)


class Sparsify(Contestant):
    """SparseCoder with the calls of sparsify's Trainer.fit around one batch: its loop needs a language model, so the
    calls are repeated here in its order. Its `adam` setting (its default is a sign-based optimiser of its own)."""
    name = "sparsify"

    def __init__(self, variant, d_in, d_sae, k, lr=None, auxk_alpha=1 / 32):
        with contextlib.redirect_stdout(sys.stderr):        # it says there whether it has Triton
            from sparsify import SparseCoder, SparseCoderConfig
        assert variant == "topk", "sparsify has TopK alone"
        self.coder = SparseCoder(d_in, SparseCoderConfig(num_latents=d_sae, k=k), device=DEVICE, dtype=torch.float32)
        self.adam = torch.optim.Adam(self.coder.parameters(), lr=lr or 2e-4 / (d_sae / 2 ** 14) ** 0.5)
        self.tokens_since_fired = torch.zeros(d_sae, dtype=torch.long, device=DEVICE)
        self.did_fire = torch.zeros(d_sae, dtype=torch.bool, device=DEVICE)
        self.auxk_alpha = auxk_alpha

    def step(self, x):
        coder = self.coder
        coder.set_decoder_norm_to_unit_norm()
        dead = self.tokens_since_fired > 10_000_000
        variance = (x - x.mean(0)).pow(2).sum()
        out = coder(x=x, y=x, dead_mask=dead, total_variance=variance)
        self.did_fire[out.latent_indices.flatten()] = True
        float(out.fvu.detach()), float(out.auxk_loss.detach())
        (out.fvu + self.auxk_alpha * out.auxk_loss + out.multi_topk_fvu / 8).backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        self.adam.step()
        self.adam.zero_grad()
        self.tokens_since_fired += len(x)
        self.tokens_since_fired[self.did_fire] = 0
        self.did_fire.zero_()

    def latents(self, x):
        values, ids, _ = self.coder.encode(x)
        return torch.zeros(len(x), self.coder.num_latents, device=x.device).scatter_(1, ids, values.float())

    def reconstruct(self, latents):
        return latents @ self.coder.W_dec + self.coder.b_dec

    def targets(self, start):
        yield self.coder.W_dec, start["directions"]
        yield self.coder.encoder.weight, start["directions"]


# ---------------------------------------------------------------------------------------------------------------------
# This project's side: the only place in the benchmarks that knows its interface
# ---------------------------------------------------------------------------------------------------------------------
@functools.cache
def load_experiment():
    sys.path.insert(0, str(PROJECT))
    import experiment
    return experiment


class Ours(Contestant):
    optimizer = "fused Adam"

    def __init__(self, variant, d_in, d_sae, k, seq=128, lr=1e-3, bf16=None):
        self.E = E = load_experiment()
        from runtime import sparse_ops
        self.sparse_ops, self.variant, self.seq, self.d_in = sparse_ops, variant, seq, d_in
        self.bf16 = sparse_ops.has_bf16_units() if bf16 is None else bf16
        self.sae = E.SAE_VARIANTS[variant](d_in, d_sae, k).to(DEVICE)
        self.adam = E.ContiguousAdam(self.sae, lr)
        self.stage = self.sae.curriculum[0]
        self.thresholds, self.log_thresholds = getattr(self.sae, "log_threshold", None), True
        proposes = self.bf16 and isinstance(self.sae, E.TopK) and not isinstance(self.sae, E.BatchTopK)
        self.name = "ours" if bf16 is None else f"ours ({'bf16 proposals' if bf16 else 'fp32 only'})"
        self.precision = "fp32 state, bf16 proposals rescored in fp32" if proposes else FP32

    def batch(self, x):
        seq = self.seq if len(x) % self.seq == 0 else 1
        x = x.view(-1, seq, self.d_in)
        return self.E.Batch(x=x, tokens=x.new_zeros(x.shape[:2], dtype=torch.long), mask=None,
                            doc_ids=torch.arange(len(x), device=x.device), positions=torch.arange(1, seq + 1, device=x.device))

    def step(self, x):
        self.sparse_ops.BF16_UNITS = self.bf16
        self.E.train_step(self.sae, self.adam, self.batch(x), self.stage, 0.5)

    def latents(self, x):
        self.sparse_ops.BF16_UNITS = self.bf16
        return self.sae.encode(self.batch(x)).dense().flatten(0, 1)

    def reconstruct(self, latents):
        return latents @ self.sae.W_dec + self.sae.b_dec

    def gradients(self, x):
        """Gradients of the mean squared reconstruction error alone, {name: tensor}: for the exactness check."""
        self.sparse_ops.BF16_UNITS = self.bf16
        batch = self.batch(x)
        self.sae.zero_grad()
        self.sae.losses(batch, self.sae.encode(batch))["reconstruction"].backward()
        return {name: getattr(self.sae, name).grad.clone() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}

    @property
    def sparsity(self):
        return self.sae.sparsity_weight.item() if "sparsity" in self.stage.weights else None

    @sparsity.setter
    def sparsity(self, value):
        self.sae.sparsity_weight.fill_(value)

    def targets(self, start):
        sae, theta = self.sae, start["threshold"]
        yield sae.W_dec, start["directions"]
        yield sae.W_enc, start["directions"].t()
        if self.variant in ("standard", "gated"):
            yield sae.b_enc, torch.full_like(sae.b_enc, -theta)


def contestants(variant, d_in, d_sae, k, only=""):
    """{name: function that makes the contestant}, ours first. `only` is "peers", "ours" or nothing.

    All train at one learning rate, which does not change the time of a step; their defaults differ by a factor of 20.
    """
    args, made, lr = (variant, d_in, d_sae, k), {}, 5e-4
    if only != "peers":
        made["ours"] = lambda: Ours(*args, lr=lr)
        if variant == "topk":
            made["ours (fp32 only)"] = lambda: Ours(*args, lr=lr, bf16=False)
    if only != "ours":
        steps = dict(lr=lr, warmup_steps=1)
        if variant in ("topk", "batch_topk", "matryoshka"):
            steps["threshold_start_step"] = 0       # so that each step updates the inference threshold, as most do
        made["SAELens"] = lambda: SAELens(*args, lr=lr)
        made["dictionary_learning"] = lambda: DictionaryLearning(*args, **steps)
        if variant == "topk":
            made["SAELens (sparse activations)"] = lambda: SAELens(*args, lr=lr, sparse=True)
            made["sparsify"] = lambda: Sparsify(*args, lr=lr)
    return made


def quiet():
    """No warnings or progress lines from the libraries."""
    warnings.filterwarnings("ignore")
    import logging
    logging.disable(logging.WARNING)
