"""Temporal SAE Runner: trains one sparse autoencoder (SAE) on a language model's activations.

    python experiment.py --out_dir=run_1

The settings are the constants below. Results: final_info.json in that folder, the SAE beside it. A
preflight passes the variant through every stage and evaluation first. A killed run carries on.

To add a variant: (A) copy a small class from "Variants", state its equation in the docstring and
override what differs: `encode` (or `select`, `activate`), `decode`, `losses`, `curriculum`, and
`architecture` where it computes latents in a way of its own; (B) add its name to SAE_VARIANTS;
(C) name it in SAE_VARIANT. To add a metric, or an evaluation: see EVALUATIONS.
"""
import argparse
import copy
import functools
import inspect
import math
import os
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, NamedTuple

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("GOMP_SPINCOUNT", "0")  # spinning threads cost 4x on a busy machine
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from scipy.sparse import csr_array, vstack
from torch import nn

torch.set_flush_denormal(True)  # decaying traces become denormal, which is slow
HERE = Path(__file__).resolve().parent
SOURCE = Path(__file__).read_text()
sys.path.insert(0, str(HERE / "embedded"))
import corpus
from corpus import RANKS, batch_ids, cache_folder, doing, find_blocks, fingerprint, firings, kept
from corpus import DataError as RunnerError  # settings, data, environment: one paragraph, exit 2

# ---- CONFIG: edit here; there is no command line for these ----
# standard, topk, batch_topk, jumprelu, gated, matryoshka, tsae, temporal, temporal_adaptation,
# temporal_context, compositional, hierarchical
SAE_VARIANT = "standard"
ABLATE = ()  # losses or components to switch off, e.g. ("auxk",)
MODEL_NAME = "embedded/model"  # a local folder or a hub id, e.g. "google/gemma-2-2b"
LAYER = None  # residual stream after this block, from 0; None: the middle
DATASET = "embedded"  # or a file, a folder, a nanoGPT data folder, a hub name
TRAIN_TOKENS = 196_608  # distinct, all in every epoch
CONTEXT_LENGTH = 128  # tokens in a window, BOS included
EXPANSION = 8  # d_sae / d_in
TARGET_L0 = 48  # active latents per token
SEEDS = (0,)  # one SAE a seed
TIME_BUDGET_MINUTES = 90  # the whole run's; training shrinks to it
# and "unlearning", "sparse_probing", "recovery"; of their variants "composition", "hierarchy"
EVALS = ("core", "temporal", "probes")
EPOCHS_SCALE = 1.0  # multiplies the epochs of every stage
BATCH_TOKENS = 1024  # tokens per training step
LEARNING_RATE = None  # Adam; None: 3e-3 * sqrt(1536 / d_sae)
TRAIN_POSITIONS = None  # None: all; (low, high): on these alone, from 1
# temporal
WINDOW = 5  # positions that attention sees
ATTENTION = "causal"  # or "centred": the window lies around its token
HEADS, HEAD_WIDTH = 1, 32
CONSISTENT_FRACTION = 1.0  # of the latents are bound
CONSISTENCY_WEIGHT = 0.01
CONTRAST_WEIGHT = 0.2
CONTRAST_SPAN = 16  # positions back that should agree
# tsae
TSAE_READING = "paper"  # or "code", as its authors released it
# temporal_adaptation
TEMPERATURE = "learned"  # "learned", "scheduled" or a fixed number
DRIVE = "u"  # the trace follows u, or the latents: "z"
REGULARISATION = 1e-3  # towards where its parameters start
# temporal_context
BUFFER = 4  # positions
BUFFER_POSITIONS = "learned"  # or "sinusoidal"
# compositional
COMPOSITIONS = 1 / 3  # of the latents; EXPANSION = 384 / d_in: 256 features, 128 compositions
COMPOSITION_HEADS, COMPOSITION_HEAD_WIDTH = 8, 16  # of its attention
COMPOSITION_SLOTS = 1 / 4  # of TARGET_L0, for compositions before features
# hierarchical
LEVEL_WIDTHS = None  # e.g. (144, 96), 3/4 and 1/2 of d_in; None: 3/2 and 1 times d_sae
LEVEL_SPARSITY = "topk"  # of level 2; or "l1", its weight steered to TARGET_L0
DENSITY = 1.5  # level 1 has that many times TARGET_L0 active features
COSINE_WEIGHT, GROUP_WEIGHT = 0.1, 0.1
# unlearning
FORGET = "sympy"  # a domain of DATASET, or another data set
TRAIN_ON = "both"  # or "forget", "retain"
FORGET_QUESTIONS = None  # e.g. "cais/wmdp:wmdp-bio"
RETAIN_QUESTIONS = None  # e.g. "cais/mmlu:human_aging"
SELECTION = "ratio"  # of the latents to clamp: by E[z^2], or by "frequency"
CLAMPED, MATCHED = 20, 1536  # latents at most to clamp, and to match
MATCHER = "logistic"  # or "attention"
MATCHER_WINDOW = 4

# FIXED PROTOCOL: runs compare only while these stay as they are
DATA_SEED = 42  # order of documents, choice of windows
TRAIN_WINDOWS_PER_FILE = 8
EVAL_FILES = 256  # held-out documents
EVAL_WINDOWS_PER_FILE = 4
MIN_WINDOW = 32  # tokens; shorter tails are left out
WARMUP_FRACTION = 0.05  # of all steps: the learning rate rises
DECAY_FRACTION = 0.2  # of all steps: it falls to zero
GRADIENT_CLIP = 1.0
DEAD_AFTER_FRACTION = 0.05  # of training's tokens without firing: dead
AUXK_WEIGHT = 1 / 32  # Gao et al. 2024 (arXiv 2406.04093)
STABILITY_LAGS, FAR_LAGS = (5, 16), (17, 32)  # beyond WINDOW; beyond CONTRAST_SPAN too
NULL_DRAWS = 50  # permutations
PROBE_EVERY = 8  # held-out tokens
PROBING = ("embedded",)  # data sets, e.g. (*corpus.PROBING_DATASETS,)
PROBING_SIZE = (1000, 250)  # texts of a class to train, test; SAEBench: (4000, 1000)
PROBED = (1, 2, 5, 10, 20, 50)  # latents
TRACED = 32  # parents, through the model
LIVE = (50, 10)  # firings, and files with one, of a live latent
FORGETTING = 0.33  # nats, where strategies are compared: half the oracle's
RETAIN_FREQUENCY = 0.01  # at most, for "frequency"
GATE_TOKENS = 32  # whose mean match opens the gate
FALSE_POSITIVES = (0.01, 0.05, 0.2)  # outside FORGET; 1 % is what counts
SYNTHETIC_TASKS = ("boolean", "arithmetic", "grammar")
SYNTHETIC_RHOS = (1.0, 0.5, 0.0)  # of compositions in the first task; 1 in the others
SYNTHETIC_TOKENS = 65_536
SYNTHETIC_SAE = (384, 8)  # width, L0
COMPOSED_TOKENS = 512  # whose features are dropped one by one
EVALUATION_RESERVE = 0.15  # of the time
LOG_EVERY = 20
CHECKPOINT_SECONDS = 60
SHARD_WINDOWS = 512  # in one file
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODEL_DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


class Batch(NamedTuple):
    """What flows into a variant. A row is a window of one document without BOS."""
    x: torch.Tensor  # [batch, seq, d_in] activations, centred, mean squared norm 1
    tokens: torch.Tensor  # [batch, seq]
    doc_ids: torch.Tensor  # [batch]
    positions: torch.Tensor  # [seq] from 1
    mask: torch.Tensor | None  # [batch, seq] False at padding; None: there is none


# ---- Sparse latents: arithmetic at the active (token, latent) pairs alone ----
NEVER = -1e9  # the pre-activation at padding: no latent fires there
GROUP = 16 if DEVICE == "cuda" else 8
BF16_UNITS = DEVICE == "cpu" and torch.cpu._is_avx512_bf16_supported()


def first_places(ids, n):
    """Where each of 0 ... n - 1 begins among the sorted ids: [n]."""
    counts = ids.new_zeros(n).scatter_add_(0, ids, torch.ones_like(ids))
    return counts.cumsum(0) - counts


def csr(values, ids, starts, width):  # a sparse matrix, for CUDA's products: 3x as fast there
    ends = F.pad(starts, (0, 1), value=len(ids)).int()
    return torch.sparse_csr_tensor(ends, ids.int(), values, (len(starts), width))


def weighted_sums(values, ids, starts, table):
    """The sum of value * table[id] from each start to the next: [len(starts), d]."""
    if table.is_cuda:
        return csr(values, ids, starts, len(table)) @ table
    return F.embedding_bag(ids, table, starts, mode="sum", per_sample_weights=values)


class Pairs:
    """The (token, latent) pairs where latents may be non-zero: by token, in any order within one;
    every token has its place in `starts`, even with no pair."""

    def __init__(self, ids, starts, pre_acts=None):
        self.ids = ids  # [n_pairs] latent of each pair
        self.starts = starts  # [n_tokens] each token's first pair
        self.pre_acts = pre_acts  # [n_pairs], where the selection computed them

    @classmethod
    def from_flat(cls, flat, pre_acts):  # ascending places in pre_acts [n_tokens, d_sae]
        n, d_sae = pre_acts.shape
        return cls(flat % d_sae, first_places(flat // d_sae, n), pre_acts.flatten()[flat])

    @classmethod
    def from_ids(cls, ids, pre_acts=None):  # [n_tokens, k], as many for each token
        starts = torch.arange(0, ids.numel(), ids.shape[1], device=ids.device)
        return cls(ids.flatten(), starts, None if pre_acts is None else pre_acts.flatten())

    @functools.cached_property
    def rows(self):  # [n_pairs] token of each pair
        counts = F.pad(self.starts, (0, 1), value=len(self.ids)).diff()
        return torch.repeat_interleave(counts, output_size=len(self.ids))

    @functools.cached_property
    def by_latent(self):  # order of pairs by latent, their tokens in it
        order = self.ids.argsort(stable=True)
        return order, self.rows[order]

    def dots(self, a, b):  # [n_tokens, d], [d_sae, d] -> [n_pairs]
        if a.is_cuda:
            places = csr(a.new_zeros(len(self.ids)), self.ids, self.starts, len(b))
            return torch.sparse.sampled_addmm(places, a, b.t(), beta=0.0).values()
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(
            a, b, self.ids, self.starts, self.rows, 0)

    def sums(self, values, b):  # value * b[latent] over a token's pairs: [n_tokens, d]
        return weighted_sums(values, self.ids, self.starts, b)

    def sums_by_latent(self, values, a, d_sae):  # value * a[token] over a latent's: [d_sae, d]
        (order, rows), starts = self.by_latent, first_places(self.ids, d_sae)
        return weighted_sums(values[order], rows, starts, a)


class PairEncode(torch.autograd.Function):
    """values[p] = (x[row_p] - b_dec) . W_enc[:, latent_p] + b_enc[latent_p]"""

    @staticmethod
    def forward(ctx, x, b_dec, W_enc, b_enc, pairs):
        centred = x - b_dec
        ctx.save_for_backward(centred, W_enc)
        ctx.pairs = pairs
        values, pairs.pre_acts = pairs.pre_acts, None  # kept, it would close a cycle
        return pairs.dots(centred, W_enc.t()) + b_enc[pairs.ids] if values is None else values

    @staticmethod
    def backward(ctx, grad):
        (centred, W_enc), pairs = ctx.saved_tensors, ctx.pairs
        grad_b_enc = grad.new_zeros(W_enc.shape[1]).index_add_(0, pairs.ids, grad)
        grad_W_enc = pairs.sums_by_latent(grad, centred, W_enc.shape[1]).t()
        grad_x = pairs.sums(grad, W_enc.t()) if ctx.needs_input_grad[0] else None
        return grad_x, -(W_enc @ grad_b_enc), grad_W_enc, grad_b_enc, None


class PairDecode(torch.autograd.Function):
    """x_hat[row] = sum over the row's pairs of values[p] * W_dec[latent_p]"""

    @staticmethod
    def forward(ctx, values, W_dec, pairs):
        ctx.save_for_backward(values, W_dec)
        ctx.pairs = pairs
        return pairs.sums(values, W_dec)

    @staticmethod
    def backward(ctx, grad):
        (values, W_dec), pairs, grad = ctx.saved_tensors, ctx.pairs, grad.contiguous()
        learns = ctx.needs_input_grad
        return (pairs.dots(grad, W_dec) if learns[0] else None,
                pairs.sums_by_latent(values, grad, len(W_dec)) if learns[1] else None, None)


class Latents(NamedTuple):
    """Latents z of a batch, at pairs."""
    values: torch.Tensor  # [n_pairs]
    pre_acts: torch.Tensor  # [n_pairs]
    pairs: Pairs
    shape: tuple  # (batch, seq, d_sae)
    below: "Latents | None" = None  # these come from

    @classmethod
    def from_dense(cls, z):  # [batch, seq, d_sae], at its non-zero values
        flat = z.detach().flatten().nonzero().flatten()
        values = z.flatten().index_select(0, flat)
        return cls(values, values, Pairs.from_flat(flat, z.detach().flatten(0, 1)), (*z.shape,))

    def at(self, per_latent):  # [d_sae] -> [n_pairs]
        return per_latent.index_select(0, self.pairs.ids)

    def decode(self, W_dec):  # -> [batch, seq, d_in]
        return PairDecode.apply(self.values, W_dec, self.pairs).view(*self.shape[:2], -1)

    def keep(self, chosen):  # [n_pairs] of bool
        starts = first_places(self.pairs.rows[chosen], len(self.pairs.starts))
        return Latents(self.values[chosen], self.pre_acts[chosen],
                       Pairs(self.pairs.ids[chosen], starts), self.shape)

    def dense(self):  # -> [batch, seq, d_sae]
        n, seq, d_sae = self.shape
        z = self.values.new_zeros(n * seq, d_sae)
        return z.index_put((self.pairs.rows, self.pairs.ids), self.values).view(n, seq, d_sae)

    def active(self):  # -> token [n], latent [n], value [n] of the non-zero latents
        part = self.keep(self.values != 0)
        return part.pairs.rows, part.pairs.ids, part.values


def largest(values, k):
    """The k largest of each row [n, d], and where: they lie in the k groups with the largest maxima
    (3x as fast on a GPU, 1.7x on a CPU)."""
    n_groups = values.shape[1] // GROUP
    if values.shape[1] % GROUP or n_groups < 2 * k:
        return values.topk(k, sorted=False)
    groups = values.view(-1, GROUP, n_groups)
    best = largest(groups.amax(1), k)[1]
    members = groups.gather(2, best[:, None].expand(-1, GROUP, -1)).flatten(1)  # [n, GROUP * k]
    top, at = members.topk(k, sorted=False)
    return top, at // k * n_groups + best.gather(1, at % k)


def top_k_pairs(x, W_enc, b_enc, k):
    """The k largest pre-activations x @ W_enc + b_enc of each token, exact in fp32.

    With bf16 units, bf16 proposes 2k or 3k and fp32 rescores them; tokens where another one could
    lie above, by its rounding error, are done again.
    """
    def dense(x, W_enc, b_enc, k):  # in parts: a CPU's caches hold them
        parts = x.split(len(x) if x.is_cuda else 384)
        return map(torch.cat, zip(*(largest(torch.addmm(b_enc, p, W_enc), k) for p in parts)))

    d_sae = len(b_enc)
    if not BF16_UNITS or d_sae < 64 * k:
        pre_acts, ids = dense(x, W_enc, b_enc, k)
        return Pairs.from_ids(ids, pre_acts)
    halved = (a.bfloat16() for a in (x, W_enc, b_enc))
    coarse, ids = dense(*halved, k * (2 if d_sae < 8192 else 3))
    proposed = Pairs.from_ids(ids)
    exact = proposed.dots(x, W_enc.t()) + b_enc[proposed.ids]
    pre_acts, where = exact.view_as(ids).topk(k, sorted=False)
    ids, last = ids.gather(1, where), coarse.amin(1).float()
    size = x.norm(dim=1) * W_enc.norm(dim=0).max() + b_enc.abs().max() + last.abs()
    again = (pre_acts.amin(1) < last + 1.01 * 2 ** -8 * size).nonzero().flatten()
    if len(again):
        pre_acts[again], ids[again] = dense(x[again], W_enc, b_enc, k)
    return Pairs.from_ids(ids, pre_acts)


# ---- Variants. One contiguous block each; a curriculum is data ----
class Stage(NamedTuple):
    """Of a curriculum. Its stages add up to 20 epochs."""
    name: str
    epochs: float
    weights: dict  # loss -> a number, or a function of the stage's progress in [0, 1)
    trains: tuple = ("",)  # prefixes of the parameters that learn
    lr: float = 1.0  # multiplies LEARNING_RATE
    anneals: dict = {}  # attribute of the SAE -> what it is, in the same way


PLAIN = {"reconstruction": 1.0, "auxk": AUXK_WEIGHT}  # the weights of most variants


class SAE(nn.Module):
    """Standard SAE: z = ReLU((x - b_dec) W_enc + b_enc), x_hat = z W_dec + b_dec,
    L = |x - x_hat|^2 + w |z|_1 + 1/32 auxk (Bricken et al. 2023).

    Rows of W_dec keep unit norm; w is steered until L0 = TARGET_L0; auxk revives dead latents.
    """
    curriculum = (Stage("autoencoder", 20, PLAIN | {"sparsity": 1.0}),)
    components = ()  # what ABLATE may name besides losses
    architecture = "standard"  # SAELens's, if its equation gives the same latents; or a new name
    causal = True  # latents depend on no later position

    def __init__(self, d_in, d_sae, target_l0):
        super().__init__()
        self.d_in, self.d_sae, self.k = d_in, d_sae, target_l0
        directions = F.normalize(torch.randn(d_sae, d_in), dim=1)
        self.W_dec = nn.Parameter(directions)  # [d_sae, d_in]
        if not hasattr(type(self), "W_enc"):  # a property: tied
            self.W_enc = nn.Parameter(directions.clone().t())  # [d_in, d_sae]
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.register_buffer("tokens_since_fired", torch.zeros(d_sae, dtype=torch.long))
        self.register_buffer("dead_after", torch.tensor(10 ** 12))  # tokens; the trainer's
        self.register_buffer("sparsity_weight", torch.tensor(1e-3))

    def initialise(self, batch):
        """Before training (not before the preflight's checks), with the first batch: begins at
        L0 = TARGET_L0."""
        self.b_enc.data.fill_(-self.pre_act_quantile(batch))

    def pre_act_quantile(self, batch):  # that TARGET_L0 latents of a token exceed
        x = counted(batch, batch.x)[:1024]
        pre_acts = ((x - self.b_dec) @ self.W_enc).flatten()
        rank = max(1, int(len(pre_acts) * (1 - self.k / self.d_sae)))
        return pre_acts.kthvalue(rank).values.clamp_min(1e-3)

    def encoder(self, batch):
        """Its inputs [batch, seq, d], their centre [d], its weights [d, d_sae]."""
        return batch.x, self.b_dec, self.W_enc

    def select(self, x, W_enc, batch):
        """The Pairs to compute, of x [n_tokens, d]."""
        pre_acts = torch.addmm(self.b_enc, x, W_enc)
        flat = (pre_acts > self.lowest_pre_act()).flatten().nonzero().flatten()
        return Pairs.from_flat(flat, pre_acts)

    def lowest_pre_act(self):
        return 0.0

    def activate(self, latents):
        """Values from `latents.pre_acts`, at the same places."""
        return F.relu(latents.pre_acts)

    def encode(self, batch):
        """batch -> Latents [batch, seq, d_sae]; zero at padding."""
        inputs, centre, W_enc = self.encoder(batch)
        expect_shape("the encoder's input", inputs, (*batch.x.shape[:2], len(W_enc)))
        x = inputs.flatten(0, 1)
        with torch.no_grad():
            pairs = self.select(x - centre, W_enc, batch)
        pre_acts = PairEncode.apply(x, centre, W_enc, self.b_enc, pairs)
        if batch.mask is not None:
            pre_acts = pre_acts.masked_fill(~batch.mask.flatten()[pairs.rows], NEVER)
        latents = Latents(pre_acts, pre_acts, pairs, (*inputs.shape[:2], self.d_sae))
        return latents._replace(values=self.activate(latents))

    def decode(self, latents):
        """Latents -> x_hat [batch, seq, d_in]."""
        return latents.decode(self.W_dec) + self.b_dec

    def directions(self):  # in x, of the latents: [d_sae, d_in]
        return self.W_dec

    def losses(self, batch, latents):
        """Named loss terms without their weights, each a scalar."""
        x_hat = self.decode(latents)
        return {"reconstruction": squared_error(batch, x_hat), "sparsity": l1(batch, latents),
                "auxk": self.auxk_loss(batch, x_hat)}

    def auxk_loss(self, batch, x_hat):
        """The residual's fraction of variance unexplained by its top d_in / 2 dead latents."""
        dead = self.dead_mask().nonzero().flatten()
        if not len(dead):
            return x_hat.new_zeros(())
        x, centre, W_enc = self.encoder(batch)
        residual = batch._replace(x=valid(batch, (batch.x - x_hat).detach()))
        z = F.leaky_relu((x - centre) @ W_enc[:, dead] + self.b_enc[dead], 0.1)  # never flat
        values, ids = z.topk(min(self.d_in // 2, len(dead)), dim=-1)
        z = torch.zeros_like(z).scatter(-1, ids, values)
        error = squared_error(residual, z @ self.directions()[dead])
        mean = residual.x.sum((0, 1)) / n_tokens(batch)
        variance = squared_error(residual, mean.expand_as(x_hat))
        return error / variance if variance > 1e-12 else 0.0 * error

    def steer(self, l0):
        """Too many active latents raise the weight of L1."""
        error = (l0.clamp_min(1e-2) / self.k).log().clamp(-1, 1)
        self.sparsity_weight.mul_((0.05 * error).exp())

    def pace(self, batch):
        """Of running means: they forget in 5 % of the steps, at most 100."""
        return (n_tokens(batch) / self.dead_after).clamp(0.01, 1.0)

    def dead_mask(self):  # [d_sae]
        return self.tokens_since_fired > self.dead_after

    def exported(self):
        """Weights to add to the parameters at export, and names to drop."""
        return {}, ()

    def parameters_of_interest(self):  # scalars to follow through training, {name: float}
        return {}

    def related(self, latents, batch, fires):
        """For features.html: {title: [(latent or text, number), ...]} of each; fires: where."""
        return [{} for _ in latents]


def l1(batch, latents):
    return latents.values.abs().sum() / n_tokens(batch)


def n_tokens(batch):
    return batch.x.shape[0] * batch.x.shape[1] if batch.mask is None else batch.mask.sum()


def valid(batch, values):  # [batch, seq, ...], zero at padding
    return values if batch.mask is None else values * batch.mask[..., None]


def counted(batch, values):  # [batch, seq, d] -> [tokens, d] without padding
    return values.flatten(0, 1) if batch.mask is None else values[batch.mask]


def squared_error(batch, x_hat):
    """Mean over tokens of |x - x_hat|^2, the fraction of variance unexplained."""
    expect_shape("x_hat", x_hat, batch.x.shape)
    return valid(batch, (batch.x - x_hat).square()).sum() / n_tokens(batch)


class TopK(SAE):
    """z = TopK_k(ReLU((x - b_dec) W_enc + b_enc)), L = |x - x_hat|^2 + 1/32 auxk (Gao et al. 2024,
    arXiv 2406.04093)."""
    curriculum = (Stage("autoencoder", 20, PLAIN),)
    architecture = "topk"

    def initialise(self, batch):
        """Needs nothing."""

    def select(self, x, W_enc, batch):
        return top_k_pairs(x, W_enc, self.b_enc, self.k)


class BatchTopK(TopK):
    """TopK over the whole batch: the k * n_tokens largest pre-activations; in evaluation
    z = pre * 1[pre > threshold], a running mean of the least value kept in training (Bussmann et
    al. 2024, arXiv 2412.06410)."""
    architecture = "jumprelu"

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("threshold", torch.tensor(0.0))
        self.register_buffer("last", torch.tensor(0.0), persistent=False)  # least value kept

    def select(self, x, W_enc, batch):
        pre_acts = torch.addmm(self.b_enc, x, W_enc)
        if batch.mask is not None:
            pre_acts.masked_fill_(~batch.mask.reshape(-1, 1), NEVER)
        least = 0.9 * self.last if self.training else self.threshold
        flat = (pre_acts > least).flatten().nonzero().flatten()
        if self.training:  # above that lie few, nearly always enough
            keep = int(self.k * n_tokens(batch))
            if len(flat) < keep:
                flat = torch.arange(pre_acts.numel(), device=x.device)
            values = pre_acts.flatten()[flat]
            least = values.topk(keep, sorted=False).values.amin().clamp_min(1e-12)
            self.last.copy_(least)
            self.threshold.lerp_(least, self.pace(batch) if self.threshold > 0 else 1.0)
            flat = flat[values >= least]
        return Pairs.from_flat(flat, pre_acts)

    def exported(self):
        return {"threshold": self.threshold.expand(self.d_sae)}, ()


class Matryoshka(BatchTopK):
    """BatchTopK; L is the mean error of nested prefixes of the latents (Bussmann et al. 2025,
    arXiv 2503.17547)."""
    group_fractions = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32)

    def losses(self, batch, latents):
        ends = [round(f * self.d_sae) for f in np.cumsum(self.group_fractions)]
        x_hat, error = self.b_dec, 0.0
        for low, high in zip([0] + ends, ends):
            ids = latents.pairs.ids
            x_hat = x_hat + latents.keep((ids >= low) & (ids < high)).decode(self.W_dec)
            error = error + squared_error(batch, x_hat) / len(ends)
        return {"reconstruction": error, "auxk": self.auxk_loss(batch, x_hat)}


class JumpReLU(SAE):
    """z = pre * 1[pre > theta], L = |x - x_hat|^2 + 3 (L0 / TARGET_L0 - 1)^2 + 1/32 auxk, with
    straight-through gradients to theta (Rajamanoharan et al. 2024, arXiv 2407.14435)."""
    curriculum = (Stage("autoencoder", 20, PLAIN | {"l0_target": 3.0}),)
    bandwidth, architecture = 0.05, "jumprelu"

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.log_threshold = nn.Parameter(torch.zeros(self.d_sae))

    def initialise(self, batch):
        self.log_threshold.data.fill_(self.pre_act_quantile(batch).log())

    def lowest_pre_act(self):
        return self.log_threshold.exp() - self.bandwidth / 2

    def gate(self, latents):  # 1[pre > theta], its gradient a rectangle
        above = latents.pre_acts.detach() - latents.at(self.log_threshold.exp())
        near = above.abs() < self.bandwidth / 2
        return (above > 0) + (above - above.detach()) * near / self.bandwidth

    def activate(self, latents):
        gate, theta = self.gate(latents), latents.at(self.log_threshold.exp()).detach()
        return F.relu(latents.pre_acts) * gate.detach() + theta * (gate - gate.detach())

    def losses(self, batch, latents):
        l0 = self.gate(latents).sum() / n_tokens(batch)
        return super().losses(batch, latents) | {"l0_target": (l0 / self.k - 1).square()}

    def exported(self):
        return {"threshold": self.log_threshold.exp()}, ("log_threshold",)


class Gated(SAE):
    """pi = (x - b_dec) W_enc + b_enc, z = 1[pi > 0] ReLU(exp(r) (pi - b_enc) + b_mag),
    L = |x - x_hat|^2 + w |ReLU(pi)|_1 + |x - x_hat(ReLU(pi))|^2 + 1/32 auxk, the third through a
    frozen decoder (Rajamanoharan et al. 2024, arXiv 2404.16014)."""
    curriculum = (Stage("autoencoder", 20, PLAIN | {"sparsity": 1.0, "gate": 1.0}),)
    architecture, initialise = "gated", TopK.initialise  # it begins dense

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.r_mag, self.b_mag = (nn.Parameter(torch.zeros(self.d_sae)) for _ in range(2))

    def activate(self, latents):
        pi = latents.pre_acts
        scale, b_enc, b_mag = map(latents.at, (self.r_mag.exp(), self.b_enc, self.b_mag))
        return F.relu(scale * (pi - b_enc) + b_mag) * (pi > 0)

    def losses(self, batch, latents):
        gate = latents._replace(values=F.relu(latents.pre_acts))
        frozen = gate.decode(self.W_dec.detach()) + self.b_dec.detach()
        return super().losses(batch, latents) | {"sparsity": l1(batch, gate),
                                                 "gate": squared_error(batch, frozen)}

    def exported(self):
        return {"b_gate": self.b_enc}, ("b_enc",)


class Temporal(BatchTopK):
    """pre_i = (x_t - b_dec + tanh(gate_i) sum_s a_ts (y_s - b_dec)) . W_enc_i + b_enc_i, s in the
    WINDOW at t, y_s = x_s + P_{t-s}, a = softmax((x_t W_q) . (y_s W_k) / sqrt(HEAD_WIDTH)); then
    BatchTopK.

    Gates start at 0: the second stage begins with the function of the first. The third binds the
    first CONSISTENT_FRACTION of the latents, H: consistency = mean of 1 - cos(zH_t, zH_{t-1}),
    contrastive = InfoNCE of cos(zH_t, zH_s), s up to CONTRAST_SPAN before t.
    """
    curriculum = (
        Stage("autoencoder", 10, PLAIN), Stage("attention", 5, PLAIN, anneals={"attends": True}),
        Stage("consistency", 5, PLAIN | {"consistency": CONSISTENCY_WEIGHT,
                                         "contrastive": CONTRAST_WEIGHT},
              anneals={"attends": True, "binds": True}))
    components, architecture = ("attention", "positions"), "temporal_attention"
    attends = binds = False
    causal = ATTENTION == "causal"

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.window, self.before = self.reach()
        if "attention" in ABLATE:
            return
        self.W_q, self.W_k = (nn.Parameter(
            torch.randn(self.d_in, HEADS * HEAD_WIDTH) * self.d_in ** -0.5) for _ in range(2))
        self.gate = nn.Parameter(torch.zeros(HEADS, self.d_sae))
        if "positions" not in ABLATE:
            self.add_positions()  # P [window, d_in]

    def reach(self):  # positions in a window, those before its token
        return WINDOW, WINDOW - 1 if ATTENTION == "causal" else WINDOW // 2

    def add_positions(self):
        self.P = nn.Parameter(torch.randn(self.window, self.d_in) * 0.1 * self.d_in ** -0.5)

    def attention(self, batch):
        """Weights [batch, seq, HEADS, window], and what they weigh [batch, seq, window, d_in]."""
        def windows(a):  # [batch, seq, n] -> [batch, seq, window, n]; zero outside
            after = self.window - 1 - self.before
            return F.pad(a, (0, 0, self.before, after)).unfold(1, self.window, 1).transpose(2, 3)

        inputs = windows(valid(batch, batch.x))
        if "positions" not in ABLATE:
            inputs = inputs + self.P
        queries, keys = ((a @ W).unflatten(-1, (HEADS, HEAD_WIDTH)) for a, W in (
            (batch.x, self.W_q), (inputs, self.W_k)))
        scores = torch.einsum("bthd,btwhd->bthw", queries, keys) / math.sqrt(HEAD_WIDTH)
        inside = windows(valid(batch, torch.ones_like(batch.x[..., :1]))).transpose(2, 3)
        return (scores + NEVER * (1 - inside)).softmax(-1), inputs

    def encoder(self, batch):
        if not self.attends or "attention" in ABLATE:
            return super().encoder(batch)
        (weights, inputs), rows = self.attention(batch), self.W_enc.t()
        context = (weights @ inputs).flatten(2)  # [batch, seq, HEADS * d_in]
        W_enc = torch.cat([rows, *(rows * g.tanh()[:, None] for g in self.gate)], 1).t()
        return torch.cat([batch.x, context], -1), self.b_dec.repeat(1 + HEADS), W_enc

    def losses(self, batch, latents):
        found = super().losses(batch, latents)
        if not self.attends:
            return found
        z = latents.dense()[..., :round(CONSISTENT_FRACTION * self.d_sae)]
        z = F.normalize(z, dim=-1)
        found |= consistency(batch, z)
        if self.binds:
            found["contrastive"] = contrastive(batch, z, CONTRAST_SPAN, 2 * CONTRAST_SPAN)
        return found

    def parameters_of_interest(self):
        return {} if "attention" in ABLATE else {"gate": self.gate.tanh().abs().mean().item()}

    def exported(self):
        added, dropped = super().exported()
        return added | ({"P": self.P} if hasattr(self, "P") else {}), dropped

    def related(self, latents, batch, fires):
        if "attention" in ABLATE:
            return super().related(latents, batch, fires)
        seen = torch.einsum("btn,bthw->nw", fires, self.attention(batch)[0])
        return [{"attention by offset": [(f"{i - self.before:+d}", w) for i, w in enumerate(row)]}
                for row in F.normalize(seen, p=1, dim=1).tolist()]


class TemporalContext(Temporal):
    """Temporal's encoder over the last BUFFER positions, from the first step on, without losses
    that bind; P is learned, or sinusoidal and fixed."""
    curriculum = (Stage("autoencoder", 20, PLAIN, anneals={"attends": True}),)
    losses, causal = BatchTopK.losses, True

    def reach(self):
        return BUFFER, BUFFER - 1

    def add_positions(self):
        if BUFFER_POSITIONS == "learned":
            return super().add_positions()
        at = torch.arange(self.window)[:, None] / 1e4 ** (torch.arange(0, self.d_in, 2) / self.d_in)
        waves = torch.cat([at.sin(), at.cos()], 1)[:, :self.d_in]
        self.register_buffer("P", waves * (2 / self.d_in) ** 0.5)


class Compositional(TopK):
    """f = TopK_k(ReLU((x - b_dec) W_enc + b_enc)); of a token's active features u_i = f_i e_i;
    U' = U + tanh(g) MHA(U), g = 0 at first; c = ReLU(W_c sum_i U'_i + b_c); z = TopK_k([f; c]),
    COMPOSITION_SLOTS of it for the largest c, or those fall silent beside features that read the
    same; L = |x - z W_dec - b_dec|^2 + 1/32 auxk. c begins with a tenth of what its rows read.

    In the first half k falls from 4 TARGET_L0, and attention combines a token's 2, 3, then 4
    largest features, later all. ABLATE "attention": U' = U; "gate": U' = U + MHA(U); "slots": the
    k largest; "bottleneck": z = [f; c]. The idea's BATCH_TOKENS: 512, LEARNING_RATE: 3e-4."""
    curriculum = (Stage("combinations", 10, PLAIN, anneals={
        "widening": lambda done: 4 ** (1 - done), "combined": lambda done: 2 + int(3 * done)}),
        Stage("all", 10, PLAIN, anneals={"widening": 1.0, "combined": None}))
    if "curriculum" in str(ABLATE):
        curriculum = (Stage("all", 20, PLAIN),)
    components = ("attention", "gate", "curriculum", "slots", "bottleneck")
    architecture, widening, combined = "compositional", 1.0, None

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.d_f = round(self.d_sae * (1 - COMPOSITIONS))
        width = COMPOSITION_HEADS * COMPOSITION_HEAD_WIDTH
        self.W_enc = nn.Parameter(self.W_enc.data[:, :self.d_f])
        places = nn.init.orthogonal_(torch.empty(self.d_in, width))
        features, compositions = self.W_dec.data.split([self.d_f, self.d_sae - self.d_f])
        self.E = nn.Parameter(features @ places)  # [d_f, width]
        self.W_c = nn.Parameter(0.1 * places.t() @ compositions.t())  # [width, d_c]
        if "attention" not in ABLATE:
            self.W_q, self.W_k, self.W_v, self.W_o = (
                nn.Parameter(torch.randn(width, width) * width ** -0.5) for _ in range(4))
            if "gate" not in ABLATE:
                self.gate = nn.Parameter(torch.zeros(()))

    def encoder(self, batch):  # of compositions, for auxk, what they read of x
        return batch.x, self.b_dec, torch.cat([self.W_enc, self.W_enc @ self.E @ self.W_c], 1)

    def width(self):  # latents kept now
        return min(round(self.k * self.widening), self.d_f, self.d_sae - self.d_f)

    def select(self, x, W_enc, batch):
        return top_k_pairs(x, W_enc[:, :self.d_f], self.b_enc[:self.d_f], self.width())

    def heads(self, ids, f):
        """Of each: how an active feature attends to those of its token [n, k, k]; values."""
        one_by_one, silent = Pairs.from_ids(ids.view(-1, 1)), (NEVER * (f <= 0))[:, None]
        parts = (PairDecode.apply(f.flatten(), self.E @ W, one_by_one)
                 .view(*ids.shape, COMPOSITION_HEADS, -1).unbind(2)
                 for W in (self.W_q * COMPOSITION_HEAD_WIDTH ** -0.5, self.W_k, self.W_v))
        return [(torch.baddbmm(silent, q, k.mT).softmax(-1), v) for q, k, v in zip(*parts)]

    def attention(self, ids, f):  # [n, heads, k, k], or None
        if "attention" in ABLATE:
            return None
        return torch.stack([weights for weights, _ in self.heads(ids, f)], 1)

    def compose(self, ids, f):
        """c [n, d_c] of features ids [n, k] with values f [n, k]."""
        total = PairDecode.apply(f.flatten(), self.E, Pairs.from_ids(ids))
        if "attention" not in ABLATE:
            if self.combined and self.combined < f.shape[1]:
                f, places = f.topk(self.combined)
                ids = ids.gather(1, places)
            on = (f > 0).to(f)[:, None]
            mixed = torch.cat([on @ weights @ v for weights, v in self.heads(ids, f)], -1)
            mixed = mixed[:, 0] @ self.W_o
            total = total + (1.0 if "gate" in ABLATE else self.gate.tanh()) * mixed
        return F.relu(total @ self.W_c + self.b_enc[self.d_f:])

    def features(self, batch):  # of each token: ids [n, k], values [n, k]
        found, k = super().encode(batch), self.width()
        return found.pairs.ids.view(-1, k), found.values.view(-1, k)

    def encode(self, batch):
        ids, f = self.features(batch)
        c = valid(batch, self.compose(ids, f).view(*batch.x.shape[:2], -1)).flatten(0, 1)
        k, n = self.width(), c.shape[1]
        if not {"slots", "bottleneck"} & set(ABLATE):
            n = max(1, round(k * COMPOSITION_SLOTS))
        c, own = c.topk(n)
        values, ids = torch.cat([f, c], 1), torch.cat([ids, own + self.d_f], 1)
        if "bottleneck" not in ABLATE:
            first = c if "slots" in ABLATE else torch.where(c > 0, torch.inf, 0.0)
            places = torch.cat([f, first], 1).topk(k).indices
            values, ids = values.gather(1, places), ids.gather(1, places)
        values = values.flatten()
        return Latents(values, values, Pairs.from_ids(ids), (*batch.x.shape[:2], self.d_sae))

    def parameters_of_interest(self):
        return {"gate": self.gate.tanh().item()} if hasattr(self, "gate") else {}

    def related(self, latents, batch, fires):
        return corpus.compositions(latents, self.E @ self.W_c, fires, *self.features(batch),
                                   self.attention)


def consistency(batch, z):
    """Of unit or zero codes z [batch, seq, n]: mean of 1 - cos(z_t, z_{t-1}), both non-zero; and
    how far that cosine lies above the one between documents."""
    live, other = z.detach().any(-1), (batch.doc_ids != batch.doc_ids.roll(1))[:, None]
    both, across = live[:, 1:] & live[:, :-1], live & live.roll(1, 0) & other
    near, far = (z[:, 1:] * z[:, :-1]).sum(-1), (z * z.roll(1, 0)).detach().sum(-1)
    cosine = (near * both).sum() / both.sum().clamp_min(1)
    gap = cosine.detach() - (far * across).sum() / across.sum().clamp_min(1)
    return {"consistency": 1 - cosine, "consistency_gap": gap}


class TSAE(Matryoshka):
    """Temporal SAE (arXiv 2511.05541): L = |x - z_H W_H - b|^2 + |x - z W - b|^2 + auxk + alpha
    InfoNCE, symmetric, between z_H at t and at an earlier position of its window.

    TSAE_READING "paper": cosines, the position before, alpha 1; "code": dot products, a random
    earlier position, alpha .1. Negatives: other documents."""
    group_fractions = (0.2, 0.8)
    curriculum = (Stage("autoencoder", 20, PLAIN | {
        "reconstruction": 2.0, "contrastive": 1.0 if TSAE_READING == "paper" else 0.1}),)

    def losses(self, batch, latents):
        z = latents.dense()[..., :round(self.group_fractions[0] * self.d_sae)]
        unit = F.normalize(z, dim=-1)
        code, span = (unit, 1) if TSAE_READING == "paper" else (z, z.shape[1])
        return super().losses(batch, latents) | {
            "contrastive": contrastive(batch, code, span)} | consistency(batch, unit)


def contrastive(batch, z, span, far=None):
    """Symmetric InfoNCE over z_t . z_s, z [batch, seq, d], s random among the `span` positions
    before t. Negatives: other documents, and the same window more than `far` away."""
    n, seq, width = z.shape
    t = torch.arange(1, seq, device=z.device)
    places = t - 1 - (torch.rand(n, seq - 1, device=z.device) * t.clamp_max(span)).long()
    then = z.gather(1, places[..., None].expand(-1, -1, width)).flatten(0, 1)
    now, docs = z[:, 1:].flatten(0, 1), batch.doc_ids.repeat_interleave(seq - 1)
    at = torch.arange(n, device=z.device).repeat_interleave(seq - 1) * 10 ** 6 + t.repeat(n)
    if batch.mask is not None:
        keep = (batch.mask[:, 1:] & batch.mask.gather(1, places)).flatten()
        now, then, docs, at = (a[keep] for a in (now, then, docs, at))
    same = (docs[:, None] == docs).fill_diagonal_(False)
    if far is not None:
        apart = (at[:, None] - at).abs()
        same &= (apart <= far) | (apart >= 1e5)
    logits = (now @ then.t()).masked_fill(same, NEVER)
    target = torch.arange(len(now), device=z.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2


class Adapt(torch.autograd.Function):
    """z_t = ReLU(pre_t - theta h_{t-1}), h_t = lam h_{t-1} + (1 - lam) ReLU(pre_t), h_{-1} = 0:
    pre [batch, seq, d]; lam, theta [d]."""

    @staticmethod
    def forward(ctx, pre, lam, theta):
        u, h = F.relu(pre), torch.zeros_like(pre)  # h[:, t]: h_{t-1}
        for t in range(1, pre.shape[1]):
            torch.lerp(u[:, t - 1], h[:, t - 1], lam, out=h[:, t])
        z = torch.addcmul(pre, h, theta, value=-1).relu_()
        ctx.save_for_backward(u, h, z, lam, theta)
        return z

    @staticmethod
    def backward(ctx, grad):
        u, h, z, lam, theta = ctx.saved_tensors
        grad = torch.ops.aten.threshold_backward(grad, z, 0)
        total = F.pad(grad[:, 1:] * -theta, (0, 0, 0, 1))  # dL / dh_t
        for t in reversed(range(total.shape[1] - 2)):
            total[:, t].addcmul_(total[:, t + 1], lam)
        grad_lam, grad_theta = (total * (h - u)).sum((0, 1)), -(grad * h).sum((0, 1))
        total = torch.ops.aten.threshold_backward(total.mul_(1 - lam), u, 0)
        return total.add_(grad), grad_lam, grad_theta


class TemporalAdaptation(SAE):
    """u_t = ReLU(pre_t), h_t = lam_i h_{t-1} + (1 - lam_i) u_t, z_t = ReLU(pre_t - theta h_{t-1});
    lam_i = exp(-softplus(beta) v_i^T), v_i = clamp(var(u_i) / geometric mean, 1/16, 16), running;
    L = |x - x_hat|^2 + w |z|_1 + 1/32 auxk + REGULARISATION (beta, theta, T - their starts)^2.

    beta, theta = tanh(theta_raw) and T are global. ABLATE "sharing": beta and theta by latent;
    "variance_scaling": v = 1; "trace": (beta x / Var^T + theta) W_enc, by input channel."""
    curriculum = (Stage("autoencoder", 20, PLAIN | {
        "sparsity": 1.0, "regularisation": REGULARISATION}, anneals={"done": lambda done: done}),)
    components, architecture = ("trace", "sharing", "variance_scaling"), "temporal_adaptation"
    done = 0.0  # of the stage

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.traces, learned = "trace" not in ABLATE, isinstance(TEMPERATURE, str)
        width, self.starts = self.d_in, {"beta": 1.0, "theta_raw": 0.0}
        if self.traces:
            width, self.starts["beta"] = self.d_sae, 0.0
        if learned and "variance_scaling" not in ABLATE:
            self.starts |= {"T": 0.5} | ({"T_decay": 0.5} if TEMPERATURE == "scheduled" else {})
        else:
            self.T = 0.5 if learned else TEMPERATURE
        for name, start in self.starts.items():
            shape = (width,) if "sharing" in ABLATE and not name.startswith("T") else ()
            setattr(self, name, nn.Parameter(torch.full(shape, start)))
        self.register_buffer("variance", torch.ones(width))

    def temperature(self):
        return self.T * torch.exp(-self.T_decay * self.done) if "T_decay" in self.starts else self.T

    def scaled_variance(self, batch=None, values=None):  # v [width]; those of values teach it
        if self.training and batch is not None:
            values = counted(batch, values.detach())
            variance = values.square().mean(0) - values.mean(0).square()
            self.variance.lerp_(variance, self.pace(batch))
        if "variance_scaling" in ABLATE:
            return torch.ones_like(self.variance)
        log = self.variance.clamp_min(1e-9).log()
        mean = log[log > math.log(2e-9)].mean().nan_to_num(0.0)  # over live latents
        return (log - mean).exp().clamp(1 / 16, 16)

    def decay(self, *learned_from):  # lam [d_sae]
        v = self.scaled_variance(*learned_from) ** self.temperature()
        return torch.exp(-F.softplus(self.beta) * v)

    def encoder(self, batch):
        if self.traces:
            return super().encoder(batch)
        scale = self.scaled_variance(batch, batch.x) ** -self.temperature()
        return self.beta * scale * batch.x + self.theta_raw.tanh(), self.b_dec, self.W_enc

    def encode(self, batch):
        if not self.traces:
            return super().encode(batch)
        pre_acts = batch.x @ self.W_enc + (self.b_enc - self.b_dec @ self.W_enc)
        if batch.mask is not None:
            pre_acts = pre_acts.masked_fill(~batch.mask[..., None], NEVER)
        lam = self.decay(batch, F.relu(pre_acts)).expand(self.d_sae)
        theta = self.theta_raw.tanh().expand(self.d_sae)
        if DRIVE == "u":
            return Latents.from_dense(Adapt.apply(pre_acts, lam, theta))
        h, z = torch.zeros_like(pre_acts[:, 0]), []
        for pre in pre_acts.unbind(1):
            z.append(F.relu(pre - theta * h))
            h = torch.lerp(z[-1], h, lam)
        return Latents.from_dense(torch.stack(z, 1))

    def losses(self, batch, latents):
        moved = sum((getattr(self, name) - at).square().mean() for name, at in self.starts.items())
        return super().losses(batch, latents) | {"regularisation": moved}

    def exported(self):
        return {"variance": self.variance}, ()

    def parameters_of_interest(self):
        return {"beta": self.beta.mean().item(), "theta": self.theta_raw.tanh().mean().item(),
                "temperature": float(self.temperature())}


class Hierarchical(TopK):
    """h_1 = ReLU((x - b) W_enc1 + b_enc1), x_hat1 = h_1 W_dec1 + b: level 1, `lower`;
    z_2 = TopK_k(ReLU(h_1 W_enc + b_enc)), h_hat = ReLU(z_2 W_dec + c), W_dec >= 0,
    x_hat2 = h_hat W_dec1 + b: level 2, the latents.

    The parent of i is argmax_p W_dec[p, i], G_p its children. cosine = mean over children of
    max(0, .5 - cos(d_i, mean of its siblings)); group = E_t sum_p sqrt|G_p| |h_1[G_p]|_2. The
    first stage trains level 1, the second level 2 on the frozen first, the third both. Level 2
    starts at Ward clusters; ABLATE "start": at random; "nonnegative": W_dec of any sign."""
    upper = PLAIN | ({"sparsity": 1.0} if LEVEL_SPARSITY == "l1" else {})
    curriculum = (
        Stage("level_1", 8, {"reconstruction": 1.0, "sparsity_1": 1.0}, ("lower",)),
        Stage("level_2", 8, upper, ("W_", "b_"), 1 / 3, {"level": 2}),
        Stage("both", 4, upper | {"level_1": 1.0, "sparsity_1": 1.0, "cosine": COSINE_WEIGHT,
                                  "group": GROUP_WEIGHT}, ("",), 0.3, {"level": 2}))
    components, architecture, level = ("start", "nonnegative"), "hierarchical", 1

    def __init__(self, d_in, d_sae, target_l0):
        d_1, d_2 = LEVEL_WIDTHS or (3 * d_sae // 2, d_sae)
        super().__init__(d_1, d_2, target_l0)
        self.W_enc = nn.Parameter(self.W_enc.data.contiguous())
        self.d_in, self.lower = d_in, SAE(d_in, d_1, round(DENSITY * target_l0))
        self.register_buffer("begun", torch.tensor(False))

    def initialise(self, batch):
        self.lower.initialise(batch)

    @torch.no_grad()
    def begin(self, batch, grouped=True):
        """Level 2 at first: a latent for each Ward cluster of level 1's directions; not
        grouped: random."""
        W = torch.rand_like(self.W_dec)
        if grouped:
            parent = corpus.ward(self.lower.W_dec.cpu().numpy(), self.d_sae)
            W = F.one_hot(torch.from_numpy(parent), self.d_sae).t().to(W)
        self.W_dec.copy_(F.normalize(W, dim=1))
        self.W_enc.copy_(self.W_dec.t())
        self.b_enc.zero_()
        self.b_dec.zero_()
        if LEVEL_SPARSITY == "l1":
            SAE.initialise(self, batch._replace(x=self.levels(batch).dense()))
        self.begun.fill_(True)

    def levels(self, batch):  # h_1
        return self.lower.encode(batch)

    def parents(self):  # of level 1's features: [d_1]
        return self.W_dec.detach().max(0).indices

    def encoder(self, batch):
        return self.levels(batch).dense(), 0.0, self.W_enc

    def encode(self, batch):
        h, shape = self.levels(batch), (*batch.x.shape[:2], self.d_sae)
        if self.level == 1:  # none yet
            self.tokens_since_fired.zero_()
            return Latents.from_dense(batch.x.new_zeros(shape))._replace(below=h)
        if not self.begun:
            self.begin(batch, "start" not in ABLATE)
        z = valid(batch, F.relu(h.decode(self.W_enc) + self.b_enc))
        if LEVEL_SPARSITY == "l1":
            return Latents.from_dense(z)._replace(below=h)
        ids = largest(z.detach().flatten(0, 1), self.k)[1]
        values = z.flatten(0, 1).gather(1, ids).flatten()
        return Latents(values, values, Pairs.from_ids(ids), shape, h)

    def decode(self, latents):
        if "nonnegative" not in ABLATE:
            self.W_dec.data.clamp_(min=0)
        h_hat = F.relu(latents.decode(self.W_dec) + self.b_dec)
        return h_hat @ self.lower.W_dec + self.lower.b_dec

    def directions(self):
        return self.W_dec @ self.lower.W_dec

    def losses(self, batch, latents):
        if not self.lower.W_enc.requires_grad:  # frozen
            return super().losses(batch, latents)
        h, beta_1 = latents.below, self.lower.sparsity_weight.clone()
        found = {"sparsity_1": beta_1 * l1(batch, h)}
        error = squared_error(batch, self.lower.decode(h))
        if self.training:
            self.lower.steer((h.values.detach() > 0).sum() / n_tokens(batch))
        if self.level == 1:
            return found | {"reconstruction": error}
        return super().losses(batch, latents) | found | {"level_1": error} | self.grouping(batch, h)

    def grouping(self, batch, h):
        parent, d = self.parents(), self.lower.W_dec
        size = torch.bincount(parent, minlength=self.d_sae)
        siblings = d.new_zeros(self.d_sae, self.d_in).index_add(0, parent, d)[parent] - d
        cosine = F.cosine_similarity(d, siblings, dim=1)[size[parent] > 1]
        at = h.pairs.rows * self.d_sae + h.at(parent)
        energy = h.values.new_zeros(len(h.pairs.starts) * self.d_sae).index_add(
            0, at, h.values.square()).view(-1, self.d_sae)
        norms = (energy + 1e-12).sqrt() * (energy > 0) * size.sqrt()
        return {"cosine": F.relu(0.5 - cosine).sum() / max(1, len(cosine)),
                "group": norms.sum() / n_tokens(batch)}

    def parameters_of_interest(self):
        parts = (self.lower, self)[:1 + (LEVEL_SPARSITY == "l1")]
        return {f"beta_{i}": part.sparsity_weight.item() for i, part in enumerate(parts, 1)}

    def related(self, latents, batch, fires):
        return corpus.children(latents, self.W_dec, load_tokenizer(), batch.tokens,
                               self.levels(batch).dense())


SAE_VARIANTS = {"standard": SAE, "topk": TopK, "batch_topk": BatchTopK, "jumprelu": JumpReLU,
                "gated": Gated, "matryoshka": Matryoshka, "temporal": Temporal, "tsae": TSAE,
                "temporal_adaptation": TemporalAdaptation, "temporal_context": TemporalContext,
                "compositional": Compositional, "hierarchical": Hierarchical}


# ---- Model ----
@functools.cache
def load_tokenizer():
    return corpus.load_pretrained(MODEL_NAME, "tokenizer")


def load_model():
    return corpus.load_model(MODEL_NAME, MODEL_DTYPE, DEVICE)


def stand_in(config):
    """A random model of the same family and hidden size: two layers, 256 tokens."""
    config, tokens = corpus.small_config(config), torch.arange(1, 9, device=DEVICE).repeat(2, 1)
    tokens[1, -1] = 0  # a later token must not change earlier activations
    model = None
    with suppress(ValueError):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.to(DEVICE).eval()
    if not model or not torch.allclose(*residual_after(model, 0, tokens)[:, :-1], atol=1e-5):
        raise RunnerError(f"MODEL_NAME = {MODEL_NAME!r} ({config.model_type}) is no causal model. "
                          "Take a decoder: Pythia, GPT-2, Llama, Gemma, Qwen, OPT, Mistral.")
    return model


class Captured(Exception):
    """Ends a forward pass at the hooked layer."""


@torch.no_grad()
def block_output(model, layer, tokens):
    """What block `layer` returns, a tensor or a tuple; nothing later is computed."""
    def stop(module, inputs, output):
        raise Captured(output)

    try:
        with find_blocks(model)[layer].register_forward_hook(stop):
            model.base_model(input_ids=tokens, use_cache=False)
    except Captured as captured:
        return captured.args[0]


def residual_after(model, layer, tokens):
    """Residual stream after block `layer`: [batch, seq, d_in]."""
    output = block_output(model, layer, tokens)
    return (output[0] if isinstance(output, tuple) else output).to(DEVICE)


@torch.no_grad()
def logits_from(model, layer, hidden, tokens):
    """Logits [batch, seq, vocab] from `hidden`, the residual stream after block `layer`."""
    skipped, usual = find_blocks(model)[:layer + 1], block_output(model, layer, tokens[:1, :1])
    output = hidden.to(model.dtype)
    if isinstance(usual, tuple):
        output = output, *usual[1:]
    before = [vars(block).get("forward") for block in skipped]  # of a model on several devices
    for block in skipped:
        block.forward = lambda *args, **kwargs: output
    try:
        return model(input_ids=tokens, use_cache=False).logits.to(DEVICE, torch.float32)
    finally:
        for block, forward in zip(skipped, before):
            del block.forward
            if forward:
                block.forward = forward


# ---- Activations: collected once, cached by content, shared by all runs ----
class Store:
    """Activations of all windows, [window, CONTEXT_LENGTH, d_in], cached; batches of them."""

    def __init__(self, folder, windows, d_in, dtype):
        self.folder, self.windows, self.d_in, self.dtype = folder, windows, d_in, dtype
        self.shards = corpus.shards(folder, len(windows.tokens), SHARD_WINDOWS)

    def collect(self, get_model, layer):
        """Fills in missing shards, under a lock that other runs wait for; then opens all."""
        row_bytes = CONTEXT_LENGTH * self.d_in * self.dtype.itemsize
        with corpus.missing_shards(self.shards, row_bytes) as missing:
            for shard in missing:
                self.collect_shard(get_model(), layer, shard)
        self.maps = corpus.opened(self.shards, (CONTEXT_LENGTH, self.d_in), self.dtype, DEVICE)
        self.normalise()

    def collect_shard(self, model, layer, shard):
        rows = np.arange(shard.start, shard.start + shard.rows)
        corpus.write(shard.path, (
            residual_after(model, layer, self.tokens(rows[i:i + 32])).to(self.dtype)
            for i in range(0, len(rows), 32)))

    def normalise(self):
        """Mean and scale, of the first 2^18 training tokens."""
        self.mean, self.scale = torch.zeros(self.d_in, device=DEVICE), 1.0
        sample = np.arange(min(self.windows.n_train, 2 ** 18 // CONTEXT_LENGTH))
        sums, squares, n = self.moments(np.array_split(sample, len(sample) // 64 + 1))
        mean = sums.sum(0) / n.sum()
        self.mean = mean.float()
        self.scale = (squares.sum() / n.sum() - mean.square().sum()).sqrt().item()

    def moments(self, chunks):
        """By position: sum of x [seq, d_in], of |x|^2 [seq], and tokens [seq]."""
        return corpus.moments((self.batch(ids).x.double(), self.valid(ids)) for ids in chunks)

    def tokens(self, ids):  # [len(ids), CONTEXT_LENGTH]
        return torch.from_numpy(self.windows.tokens[ids].astype(np.int64)).to(DEVICE)

    def valid(self, ids):  # [len(ids), seq] False at padding
        return torch.from_numpy(self.windows.valid(ids)[:, 1:]).to(DEVICE)

    def raw(self, ids):
        """Activations as the model made them, with BOS: [len(ids), CONTEXT_LENGTH, d_in]."""
        rows = [self.maps[i // SHARD_WINDOWS][i % SHARD_WINDOWS] for i in map(int, ids)]
        return torch.stack(rows).to(DEVICE, torch.float32)

    def batch(self, ids):
        doc_ids, valid = self.windows.doc_ids[ids], self.valid(ids)
        return self.batch_of(self.raw(ids), self.tokens(ids), doc_ids, valid)

    def batch_of(self, raw, tokens, doc_ids, mask):
        """raw [batch, 1 + seq, d_in] and tokens with BOS; mask [batch, seq]."""
        return Batch((raw[:, 1:] - self.mean) / self.scale, tokens[:, 1:],
                     torch.as_tensor(doc_ids, device=DEVICE),
                     torch.arange(1, raw.shape[1], device=DEVICE), None if mask.all() else mask)

    def x(self, ids):  # of many windows, [len(ids), seq, d_in]
        return torch.cat([self.batch(part).x for part in np.array_split(ids, len(ids) // 64 + 1)])

    def unscaled(self, x):  # -> as the model made it
        return x * self.scale + self.mean

    def heldout(self, size):  # ids of windows in chunks
        return np.array_split(ids := self.windows.heldout(), range(size, len(ids), size))


# ---- Trainer: knows no variant ----
def planned_stages(variant):
    """The variant's curriculum under ABLATE and EPOCHS_SCALE."""
    return [stage._replace(epochs=stage.epochs * EPOCHS_SCALE, weights={
        loss: weight for loss, weight in stage.weights.items() if loss not in ABLATE})
        for stage in variant.curriculum]


def learning_rate(done, d_sae):
    """After the share `done` of all steps: rise, constant, fall to zero."""
    base = LEARNING_RATE or 3e-3 * math.sqrt(1536 / d_sae)
    return base * min(1.0, (done + 1e-3) / WARMUP_FRACTION, (1 - done) / DECAY_FRACTION)


class Adam(torch.optim.Adam):
    """Fused. It would copy what lies transposed, so that is turned meanwhile."""

    def __init__(self, sae, lr):
        super().__init__(sae.parameters(), lr, fused=True)

    def step(self):
        turned = [p for p in self.param_groups[0]["params"]
                  if p.grad is not None and p.dim() > 1 and not p.is_contiguous()]
        for p in turned:
            p.data, p.grad = p.data.mT, p.grad.mT
        super().step()
        for p in turned:
            p.data, p.grad = p.data.mT, p.grad.mT


def scheduled(value, done):
    return value(done) if callable(value) else value


def anneal(sae, stage, done):
    for attribute, value in stage.anneals.items():
        getattr(sae, attribute)  # or there is none of that name
        setattr(sae, attribute, scheduled(value, done))


def train_step(sae, optimizer, batch, stage, done):
    """One step, at the stage's progress `done` -> the named losses and L0."""
    anneal(sae, stage, done)
    latents = sae.encode(batch)
    losses, total = sae.losses(batch, latents), 0.0
    for name, weight in stage.weights.items():
        steered = sae.sparsity_weight if name == "sparsity" else 1.0
        total = total + scheduled(weight, done) * steered * losses[name]
    total.backward()
    with torch.no_grad():
        fired = torch.zeros_like(sae.tokens_since_fired).index_add_(
            0, latents.pairs.ids, (latents.values != 0).long())
        n, fired = RANKS.reduce(sae, n_tokens(batch), fired)
        learning = [part.W_dec for part in sae.modules()
                    if isinstance(part, SAE) and part.W_dec.grad is not None]
        for W in learning:  # without what the renormalisation would undo
            W.grad.addcmul_((W.grad * W).sum(1, keepdim=True), W, value=-1)
        nn.utils.clip_grad_norm_(sae.parameters(), GRADIENT_CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for W in learning:
            W.div_(W.norm(dim=1, keepdim=True))
        sae.tokens_since_fired.add_(n).masked_fill_(fired > 0, 0)
        l0 = fired.sum() / n
        if "sparsity" in stage.weights:
            sae.steer(l0)
    return {name: loss.detach() for name, loss in losses.items()} | {"l0": l0}


def only_positions(batch):
    """The batch with TRAIN_POSITIONS alone; the others are padding."""
    if TRAIN_POSITIONS is None:
        return batch
    (low, high), at = TRAIN_POSITIONS, batch.positions.expand(batch.x.shape[:2])
    inside = (at >= low) & (at <= high)
    return batch._replace(mask=inside if batch.mask is None else inside & batch.mask)


@torch.no_grad()
def validation_loss(sae, store):
    """Reconstruction loss on the first 64 held-out windows."""
    batch = store.batch(store.heldout(64)[0])
    return squared_error(batch, sae.eval().decode(sae.encode(batch))).item()


def seconds_per_step(sae, store, stages, size):
    """Seconds of one step of each stage, the second one on a copy."""
    seconds, batch = [], store.batch(RANKS.share(np.arange(size)))
    for stage in stages:
        optimizer = Adam(trial := copy.deepcopy(sae).train(), 1e-4)
        for _ in range(2):
            began = time.perf_counter()
            train_step(trial, optimizer, batch, stage, 0.0)
        seconds.append(time.perf_counter() - began)
    return seconds


@corpus.tf32()
def train(sae, store, stages, seed, size, deadline, state_path):
    """Trains `sae` -> log, steps planned and done of each stage; a killed run carries on from the
    checkpoint at `state_path`, to the same bits."""
    n_windows, pool = store.windows.n_train, store.windows.train_pool(TRAIN_ON, FORGET)
    per_epoch = n_windows // size

    def batch_at(step, share=RANKS.share):
        ids = pool[batch_ids(seed, step, n_windows, size) % len(pool)]
        return only_positions(store.batch(share(ids)))

    plan = corpus.Plan(stages, per_epoch)
    first = batch_at(0, lambda ids: ids)
    ready = corpus.ahead(batch_at, store.maps[0].device.type != DEVICE)
    sae.dead_after.fill_(int(DEAD_AFTER_FRACTION * sum(plan.planned) * n_tokens(first)))
    sae.initialise(first)
    seconds, optimizer = seconds_per_step(sae, store, stages, size), Adam(sae, 1e-4)
    parts = {"sae": sae, "optimizer": optimizer, "plan": plan}
    corpus.load_state(state_path, parts)
    plan.begin(f"seed {seed}", seconds, deadline)
    for i, stage in enumerate(stages):
        anneal(sae, stage, (plan.steps[i] - 1) / plan.steps[i])  # as it was left, where it is over
        for name, p in sae.named_parameters():
            p.requires_grad_(name.startswith(stage.trains))
        for step, done in plan.steps_of(i):
            torch.manual_seed(seed * 1_000_003 + step)  # nothing to resume
            rate = stage.lr * learning_rate(step / sum(plan.steps), sae.d_sae)
            optimizer.param_groups[0]["lr"] = rate
            losses = train_step(sae.train(), optimizer, ready(step), stage, done)
            if not done:
                RANKS.same(sae)
            plan.advance(losses)
            if plan.at(LOG_EVERY):
                plan.record(losses, sae.dead_mask(), sae.parameters_of_interest())
            if plan.at(per_epoch):
                plan.append(val_step=plan.step, val_loss=validation_loss(sae, store))
            if plan.due(CHECKPOINT_SECONDS):
                corpus.save_state(state_path, parts)
    if sae.dead_mask().all():
        raise RunnerError(f"all {sae.d_sae} latents are dead after training.")
    return plan.finished()


# ---- Evaluations on held-out documents: Run -> Result ----
@dataclass
class Run:
    """What an evaluation may look at."""
    sae: SAE
    store: Store
    get_model: Callable  # -> the language model
    layer: int
    live: tuple  # (firings, files) that a live latent needs
    log: dict  # of the training
    probing: Callable | None = None  # (run, data set) -> Store of its texts; in the preflight
    seed: int = 0

    @functools.cached_property
    def heldout(self):
        return encode_windows(self.sae, self.store, self.store.windows.heldout())

    @functools.cached_property
    def live_latents(self):
        return corpus.live_latents(self.heldout[0], self.store.windows, *self.live)


class Result(NamedTuple):
    metrics: dict  # name -> a finite number
    curves: dict  # name -> list
    per_sequence: dict  # name -> list of floats, one per sample window


@torch.no_grad()
def encode_windows(sae, store, windows):
    """The latents of all their tokens, sparse [window * seq + position - 1, d_sae] by column;
    {name: [window, seq]} of |x - x_hat|^2 and the like, NaN at padding; tokens per second."""
    codes, rows, began = [], [], time.perf_counter()
    for ids in np.array_split(windows, range(32, len(windows), 32)):
        batch, keep = store.batch(ids), store.valid(ids)
        latents = sae.encode(batch)
        x, x_hat = batch.x, sae.decode(latents)
        token, latent, value = (part.cpu().numpy() for part in latents.active())
        codes.append(csr_array((value, (token, latent)), (keep.numel(), sae.d_sae)))
        l0 = np.bincount(token, minlength=keep.numel()).reshape(keep.shape)
        products = (x - x_hat).square(), x.square(), x_hat.square(), x * x_hat
        sums = torch.stack([product.sum(-1) for product in products]).double().cpu().numpy()
        rows.append(np.where(keep.cpu().numpy(), [*sums, l0], np.nan))
    rows = dict(zip(("error", "norm", "norm_hat", "dot", "l0"), np.concatenate(rows, 1)))
    z = vstack(codes, "csc")
    return z, rows, z.shape[0] / (time.perf_counter() - began)


def variance_by_position(store):
    """Variance of held-out x about its overall mean: by position [seq], and overall."""
    return corpus.variances(*store.moments(store.heldout(64)))


@torch.no_grad()
def spliced(run, ids, splice):
    """Of windows `ids`, in chunks: ids, log-probabilities [n, seq - 1, vocab] of what follows each
    position and cross-entropy [n, seq - 1] of what did, NaN at padding. splice(batch) gives the
    residual stream [batch, seq, d_in], unscaled; BOS is left alone."""
    model, store = run.get_model(), run.store
    for part in np.array_split(ids, len(ids) // 16 + 1):
        tokens, padding = store.tokens(part), ~store.valid(part)[:, 1:]
        hidden = torch.cat([store.raw(part)[:, :1], splice(store.batch(part))], 1)
        logp = logits_from(model, run.layer, hidden, tokens)[:, 1:-1].log_softmax(-1)
        loss = -logp.gather(2, tokens[:, 2:, None])[..., 0].double()
        yield part, logp, loss.masked_fill(padding, torch.nan).cpu().numpy()


def next_token_losses(run, splice):
    """Of the sample after each position, [sample, seq - 1], NaN at padding: cross-entropy, and the
    KL divergence from the model's own distribution."""
    ids, found = run.store.windows.sample(), []
    whole = spliced(run, ids, lambda batch: run.store.unscaled(batch.x))
    for (_, own, _), (_, logp, loss) in zip(whole, spliced(run, ids, splice)):
        kl = (own.exp() * (own - logp)).sum(-1).cpu().numpy()
        found.append((loss, np.where(np.isnan(loss), np.nan, kl)))
    return np.concatenate(found, 1)


def controls(run):
    """What no SAE changes, kept beside the activations until the code for it changes."""
    code = SOURCE[SOURCE.index("# ---- Model ----"):SOURCE.index("# ---- Temporal evaluation")]
    key = fingerprint(code, *sources(TopK), TARGET_L0, run.sae.d_sae)
    return kept(run.store.folder / f"controls-{key}.json", lambda: compute_controls(run))


def compute_controls(run):
    """Losses of the model, ablated, of unigrams; bigrams; untrained TopK."""
    print("computing the model's own loss and the controls", flush=True)
    store, (by_position, variance) = run.store, variance_by_position(run.store)
    vocabulary = len(run.get_model().get_output_embeddings().weight)
    own = next_token_losses(run, lambda batch: store.unscaled(batch.x))[0]
    losses = {"ce_model": own, "ce_unigram": corpus.unigram_losses(store.windows, vocabulary),
              "ce_zero": next_token_losses(run, lambda batch: torch.zeros_like(batch.x))[0],
              "ce_mean": next_token_losses(run, lambda batch: store.mean.expand_as(batch.x))[0]}
    bigram_error = corpus.bigram_error(store.windows, lambda ids: store.batch(ids).x.cpu().numpy())
    metrics = {name: np.nanmean(loss) for name, loss in losses.items()} | {
        "bigram_explained_variance": 1 - bigram_error / variance,
        "untrained_explained_variance": explained_by(untrained(run), store, variance),
        **reinitialised(run)}
    return {"metrics": metrics, "variance": variance, "variance_by_position": by_position,
            "ce_by_sequence": np.nanmean(own, 1).tolist(),
            "ce_by_position": np.nanmean(own, 0).tolist()}


def sources(*parts):  # code, of SAEs and of these, on which something kept depends
    return map(inspect.getsource, (Pairs, Latents, SAE, *parts))


def untrained(run):  # the control of several evaluations
    torch.manual_seed(0)
    return TopK(run.sae.d_in, run.sae.d_sae, TARGET_L0).to(DEVICE).eval()


def reinitialised(run):
    """How an untrained TopK's latents are told, on the model with random weights."""
    model, like = corpus.reinitialised(run.get_model()), run.store
    store = Store(like.folder / "random", like.windows.fewer(256), like.d_in, like.dtype)
    store.collect(lambda: model, run.layer)
    control = Run(untrained(run), store, lambda: model, run.layer, run.live, {}, run.probing)
    return {f"{name}_reinitialised": value for name, value in features(control)[1].items()}


def explained_variance(rows, variance):
    """1 - E|x - x_hat|^2 / sum_d Var(x_d), rows as of encode_windows."""
    return 1 - np.nanmean(rows["error"]) / variance


def explained_by(sae, store, variance):  # of held-out tokens
    return explained_variance(encode_windows(sae, store, store.windows.heldout())[1], variance)


def eval_core(run):
    """Reconstruction, sparsity and next-token loss, beside controls."""
    sae, store, base = run.sae, run.store, controls(run)
    (z, rows, speed), (live, rate) = run.heldout, run.live_latents
    losses, kl = next_token_losses(run, lambda b: store.unscaled(sae.decode(sae.encode(b))))
    permuted = copy.deepcopy(sae)
    permuted.W_dec.data = sae.W_dec.data.roll(sae.d_sae // 2, 0)
    mean, variance = {name: np.nanmean(values) for name, values in rows.items()}, base["variance"]
    control, ce_sae = base["metrics"], np.nanmean(losses)
    metrics = control | {
        "explained_variance": explained_variance(rows, variance), "l0": mean["l0"],
        "dead_fraction": (rate == 0).mean(), "live_fraction": live.mean(),
        "dense_fraction": (rate > 0.1).mean(), "kl": np.nanmean(kl), "ce_sae": ce_sae,
        "loss_increase_nats": ce_sae - control["ce_model"],
        "cosine": np.nanmean(rows["dot"] / np.sqrt(rows["norm"] * rows["norm_hat"] + 1e-12)),
        "l2_ratio": np.nanmean(np.sqrt(rows["norm_hat"] / rows["norm"])),
        "relative_reconstruction_bias": mean["norm_hat"] / mean["dot"],
        "single_token_fraction": corpus.single_token_fraction(
            store.windows, firings(z, np.flatnonzero(live))),
        "permuted_decoder_explained_variance": explained_by(permuted, store, variance),
        "avg_inference_tokens_per_second": speed}
    for name, worst in (("", "ce_unigram"), ("_vs_mean", "ce_mean"), ("_vs_zero", "ce_zero")):
        whole = control[worst] - control["ce_model"]
        metrics[f"ce_recovered{name}"] = (control[worst] - ce_sae) / whole
    by_position = 1 - np.nanmean(rows["error"], 0) / base["variance_by_position"]
    curves = {"explained_variance_by_position": by_position,
              "loss_increase_by_position": np.nanmean(losses, 0) - base["ce_by_position"]}
    first = store.windows.sample() - store.windows.n_train
    per_sequence = {"fvu": np.nanmean(rows["error"][first], 1) / variance,
                    "l0": np.nanmean(rows["l0"][first], 1),
                    "loss_increase_nats": np.nanmean(losses, 1) - base["ce_by_sequence"]}
    return Result(metrics, curves, per_sequence)


# ---- Temporal evaluation, on held-out windows without padding ----
def follow(run):
    """What the training did to the parameters of interest, and the alarm of a collapse."""
    found, sae = corpus.convergence(run.log), run.sae
    found |= corpus.sensitivities(sae, lambda: validation_loss(sae, run.store))
    if getattr(sae, "traces", False):
        found |= corpus.decay_slope(sae.scaled_variance().detach(), sae.decay().detach())
    return found


def latent_statistics(run, z, full, alive, q95):
    """By live latent: stability and that at FAR_LAGS [latent, window], under the null [latent,
    draws], of the token surrogate, autocorrelation [latent, lag], rate, E[z^2]; by window:
    smoothness, and raw.

    z: sparse codes [window * seq, d_sae] of the held-out windows `full`; q95 [latent]: units."""
    store, ids, found = run.store, full + run.store.windows.n_train, []
    x, tokens, z = store.x(ids), store.windows.tokens[ids, 1:], z.tocsc()
    fold = store.windows.doc_ids[ids] % 2 == 0
    scaled, raw, present = torch.zeros(3, len(ids), device=DEVICE)
    for at in np.array_split(np.arange(len(alive)), len(alive) // 256 + 1):
        dense = torch.from_numpy(z[:, alive[at]].toarray(order="F")).to(DEVICE)
        dense = dense.view(*tokens.shape, -1)
        active = (dense > 0).float()
        rate, energy = active.mean((0, 1)), dense.square().mean((0, 1))
        observed, far = (corpus.stability(active, rate, lags)
                         for lags in (STABILITY_LAGS, FAR_LAGS))
        null, r = corpus.stability_null(active, rate, STABILITY_LAGS, NULL_DRAWS)
        expected = corpus.fire_given_token(z[:, alive[at]] > 0, tokens, fold)
        token = corpus.stability(torch.from_numpy(expected).to(DEVICE), rate, STABILITY_LAGS)
        found.append((observed.t(), far.t(), null.t(), token.mean(0), r.t(), rate, energy))
        scaled += corpus.smoothness(dense, x, torch.from_numpy(q95[at]).to(DEVICE))
        raw += corpus.smoothness(dense, x, 1.0)
        present += active.amax(1).sum(1)
    windows = [(total / present.clamp_min(1)).cpu().numpy() for total in (scaled, raw)]
    return [torch.cat(part).cpu().double().numpy() for part in zip(*found)] + windows


@torch.no_grad()
def eval_temporal(run):
    """Stability, smoothness, coherence, polysemanticity beside their nulls."""
    sae, store, windows, rng = run.sae, run.store, run.store.windows, np.random.default_rng(0)
    torch.manual_seed(0)
    (z, errors, _), (live, rates), full = run.heldout, run.live_latents, windows.full()
    alive, files, seq = np.flatnonzero(live), windows.doc_ids[windows.n_train:], CONTEXT_LENGTH - 1
    fired, q95 = [at for at, _ in firings(z, alive)], corpus.percentiles_95(z, alive)
    z = z.tocsr()[(full[:, None] * seq + np.arange(seq)).ravel()]
    observed, far, null, token, r, rate, energy, scaled, raw = latent_statistics(
        run, z, full, alive, q95)
    mean, weight = observed.mean(1), energy / energy.sum()
    kinds = windows.tokens[windows.n_train:, 1:].ravel(), corpus.token_classes(windows)
    everything, places, half = windows.heldout(), windows.heldout_tokens(), seq // 2
    error, variance = np.nanmean(errors["error"], 0), np.array(variance_by_position(store)[0])
    metrics = {
        "stability_token": token @ weight,
        "stability_unweighted": mean.mean(), "energy": energy.sum(),
        "stability_null_95": np.quantile(weight @ null, 0.95),
        "stable_fraction": corpus.significant_fraction(mean, null),
        "autocorrelation_lag1": r[:, 0] @ weight,
        "smoothness": scaled.mean(), "smoothness_raw": raw.mean(),
        "polysemanticity": corpus.polysemanticity(fired, kinds, places, rng, NULL_DRAWS),
        "polysemanticity_channels": corpus.polysemanticity(
            corpus.channel_firings(store.x(everything), store.valid(everything), rate.mean()),
            kinds, places, rng, NULL_DRAWS),
        "explained_variance_early": 1 - error[:half].sum() / variance[:half].sum(),
        "explained_variance_late": 1 - error[half:].sum() / variance[half:].sum()} | follow(run)
    if (value := corpus.coherence(fired, kinds[1], files, rates[alive], rng)) is not None:
        metrics["coherence"] = value
    held = {"stability": weight @ observed}  # by window
    if seq > FAR_LAGS[1]:
        held["stability_far"] = weight @ far
    metrics |= {name: values.mean() for name, values in held.items()}
    curves = {
        "autocorrelation": weight @ r, "stability_null": weight @ null,
        "stability_by_rate_decile": corpus.mean_by_decile(mean, rate),
        "similarity_matrix": corpus.similarity_matrix(z[:256 * seq], seq)[::2, ::2].round(4),
        "evolution": corpus.evolution(z[:seq].toarray(), load_tokenizer().batch_decode(
            windows.tokens[full[0] + windows.n_train, 1:, None]), mean, alive)}
    if hasattr(sae, "variance"):
        curves |= {"variance": sae.variance, "decay": sae.decay(),
                   "scaled_variance": sae.scaled_variance()}
    per_sequence = {name: windows.by_document(values, files[full])
                    for name, values in (held | {"smoothness": scaled}).items()}
    return Result(metrics, curves, per_sequence)


# ---- Probes: what latents tell about the context ----
def eval_probes(run):
    """Balanced accuracy of linear probes on a token's latents, beside those on tokens;
    `probe_context` is the mean over all labels but the token's type."""
    metrics, right = corpus.probe_scores(run.store.windows, run.heldout[0].tocsr(), PROBE_EVERY,
                                         run.store.folder)
    return Result(metrics, {}, right)


# ---- Unlearning: FORGET by clamping latents, and what that costs the rest ----
CONTROLS = ("random_latents", "random_directions", "projection")


class Unlearner:
    """Latents selected and matchers fitted on a plan's dev windows; thresholds from matchers fitted
    on every other file, for the rest."""

    def __init__(self, run, plan):
        self.sae, store, ids = run.sae, run.store, plan.dev
        z, keep = encode_windows(self.sae, store, ids)[0], store.valid(ids)
        forget = keep & torch.from_numpy(plan.dev_group == "forget").to(DEVICE)[:, None]
        self.q95 = torch.from_numpy(corpus.percentiles_95(z)).to(DEVICE)
        ranked, self.clamped = corpus.ranked_latents(
            z.tocsr()[keep.flatten().cpu().numpy()], forget[keep].cpu().numpy(), SELECTION,
            1.0 if run.probing else RETAIN_FREQUENCY, CLAMPED)
        self.rest, self.direction = corpus.mean_difference(store.x(ids), keep, forget)
        self.matcher = corpus.Matcher(
            MATCHER, MATCHER_WINDOW, GATE_TOKENS, ranked[:MATCHED], self.q95)
        self.matcher.fit(z, keep, forget, plan.halves(store.windows), FALSE_POSITIVES)

    def edit(self, strategy, strength):
        """batch -> what to add to x [batch, seq, d_in]: where the strategy says so, latents that
        fire are set to -strength times the 95th percentile of their values."""
        latents = self.clamped.get(strategy, self.clamped["forget"])

        def change(batch):
            if strategy == "projection":
                along = (batch.x - self.rest) @ self.direction
                return -strength * along[..., None] * self.direction
            whole = self.sae.encode(batch).dense()
            z, target = whole[..., latents], -strength * self.q95[latents]
            on = (z > 0) & self.matcher.opens(strategy, whole)[..., None]
            delta = torch.where(on, target - z, 0.0) @ self.sae.directions()[latents]
            if strategy == "random_directions":
                delta = F.normalize(torch.randn_like(delta), dim=-1) * delta.norm(dim=-1)[..., None]
            return delta
        return change


@contextmanager
def editing(run, edit, mask=None):
    """While open, edit(batch) is added to the residual stream after block run.layer, but not at the
    first position, whether tokens come together or one by one with a cache."""
    past = []

    def change(module, inputs, output):
        hidden = output[0] if isinstance(output, tuple) else output
        past[:] = [torch.cat([*past, hidden.float()], 1)]  # a copy: `hidden` is changed in place
        keep = torch.ones_like(past[0][..., 0]) > 0 if mask is None else mask
        if keep.shape[1] > 1:
            batch = run.store.batch_of(past[0], keep.long(), np.arange(len(keep)), keep[:, 1:])
            delta = edit(batch)[:, -hidden.shape[1]:] * run.store.scale
            hidden[:, -delta.shape[1]:] += delta

    with find_blocks(run.get_model())[run.layer].register_forward_hook(change):
        yield run.get_model()


def edited_logits(run, edit, tokens, mask):
    """Of tokens that count where the mask is True, [batch, seq]: [batch, seq, vocab]."""
    tokens, mask = (torch.from_numpy(part).to(DEVICE) for part in (tokens, mask))
    with editing(run, edit, mask) as model:
        size = model.get_input_embeddings().num_embeddings  # the preflight's is small
        return model(tokens % size, attention_mask=mask.long(), use_cache=False).logits


def sampled(run, edit, prompts):
    """Tokens after the prompts, half as many."""
    n = prompts.shape[1] // 2
    torch.manual_seed(0)
    with editing(run, edit) as model:
        return model.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=n, min_new_tokens=n,
            do_sample=True, pad_token_id=0)[:, -n:]


@torch.no_grad()
def eval_unlearning(run):
    """What FORGET's test windows lose, and the others with them, at strengths that cost its dev
    windows FORGETTING nats."""
    torch.manual_seed(0)
    store, windows, tokenizer = run.store, run.store.windows, load_tokenizer()
    plan = corpus.unlearning_plan(windows, FORGET, tokenizer, folder=store.folder)
    unlearner = Unlearner(run, plan)
    strategies = "standard", *unlearner.matcher.thresholds
    metrics, rocs = unlearner.matcher.scores(
        encode_windows(run.sae, store, plan.test)[0], store.valid(plan.test),
        plan.group == "forget")
    metrics["auroc_bag_of_tokens"] = corpus.bag_auroc(windows, plan, MATCHER_WINDOW)
    edits, scores, frontier, per_sequence = plan.frontier(
        windows, FORGETTING, strategies, CONTROLS, unlearner.edit, lambda edit, ids: spliced(
            run, ids, lambda batch: store.unscaled(batch.x + edit(batch))))
    logits = functools.partial(edited_logits, run)
    metrics |= scores | plan.padded_losses(
        windows, strategies, edits, logits, run.get_model().config)
    metrics |= plan.question_scores(
        {"forget": FORGET_QUESTIONS, "retain": RETAIN_QUESTIONS}, tokenizer, edits, logits)
    full, _ = plan.full(windows)
    metrics |= corpus.repetition({name: sampled(
        run, edit, store.tokens(full)[:, :CONTEXT_LENGTH // 2]) for name, edit in edits.items()})
    z = run.sae.encode(batch := store.batch(full)).dense()
    clamped = z[..., unlearner.clamped["forget"]]
    adjacent = consistency(batch, F.normalize(clamped, dim=-1))
    metrics["clamped_consistency"] = 1 - adjacent["consistency"].item()
    passage = unlearner.matcher.passage(z, (clamped > 0).any(-1), batch.tokens, tokenizer)
    return Result(metrics, {"frontier": frontier, "roc": rocs, "passage": passage},
                  per_sequence)


# ---- Sparse probing, in SAEBench's protocol ----
def probing_store(run, dataset):
    """Activations of a data set's texts, one a window, scaled as in training."""
    windows, key = corpus.probing_windows(
        dataset, load_tokenizer(), PROBING_SIZE, CONTEXT_LENGTH, cache_folder() / "tokens")
    like = run.store
    store = Store(like.folder.parent / fingerprint(key, like.folder.name), windows,
                  like.d_in, like.dtype)
    store.collect(run.get_model, run.layer)
    store.mean, store.scale = like.mean, like.scale
    return store


@torch.no_grad()
def eval_sparse_probing(run):
    """Accuracies of probes on latents, mean over PROBING; baselines."""
    control = untrained(run)
    features = {"channels": lambda batch: batch.x,
                "untrained": lambda batch: control.encode(batch).dense(),
                "sae": lambda batch: run.sae.encode(batch).dense()}
    stores = ((run.probing or probing_store)(run, dataset) for dataset in PROBING)
    metrics, curves = corpus.sparse_probing(
        stores, features, PROBED, fingerprint(
            *sources(TopK, untrained, eval_sparse_probing), TARGET_L0, PROBED, run.sae.d_sae))
    return Result(metrics, {"sparse_probing": curves}, {})


# ---- Hierarchy: level 2 against level 1, and through the model ----
def batch_windows(store):  # of SAEs trained beside the run's own
    return min(BATCH_TOKENS // CONTEXT_LENGTH, store.windows.n_train)


@torch.enable_grad()
def flat_peer(run):
    """A TopK SAE as wide, as sparse and as long trained, kept beside the activations; the share of
    its steps that the time for evaluations allowed."""
    store, flat, steps = run.store, untrained(run), run.log["step"][-1]
    size = batch_windows(store)
    key = fingerprint(*sources(TopK, train, train_step), steps, flat.d_sae, TARGET_L0, BATCH_TOKENS,
                      LEARNING_RATE, TRAIN_ON, TRAIN_POSITIONS)
    stage = Stage("flat", steps / (store.windows.n_train // size), PLAIN)
    deadline = time.time() + 60 * TIME_BUDGET_MINUTES * EVALUATION_RESERVE
    _, planned, done = train(flat, store, [stage], 0, size, deadline,
                             store.folder / f"flat-{key}.pt")
    return flat.eval(), sum(done) / sum(planned)


def logit_changes(run, ids, deltas, at):
    """What adding each of deltas [windows, seq, d_in] to x changes in the logits at the tokens `at`
    [windows, seq]: [deltas, n, vocab]."""
    tokens = run.store.windows.tokens[ids]
    own, *found = (edited_logits(run, lambda _: delta, tokens, tokens >= 0)[:, 1:][at].float()
                   for delta in (torch.zeros_like(deltas[0]), *deltas))
    return torch.stack(found) - own


def trace(run, parent, children, rates, ids, absent):
    """On windows `ids` ablates a parent, its children singly, and the active parent that is nearest
    to it in rate [d_sae] and size; puts it, and one of like rate, into windows `absent`."""
    sae, norm = run.sae, run.sae.directions().norm(dim=1)

    def edited(z, latent, value, where):  # change of x_hat2 where a latent is set to value
        chosen = where[..., None] & (torch.arange(sae.d_sae, device=DEVICE) == latent)
        new = Latents.from_dense(torch.where(chosen, value, z))
        return sae.decode(new) - sae.decode(Latents.from_dense(z))

    batch = run.store.batch(ids)
    z, h = sae.encode(batch).dense(), sae.levels(batch).dense()
    on, rival, like = corpus.rivals(z * norm, parent, rates)
    deltas = [edited(z, latent, 0.0, on) for latent in (parent, rival[..., None])]
    deltas += [-(h[..., i] * on)[..., None] * sae.lower.W_dec[i] for i in children]
    changes, value = logit_changes(run, ids, deltas, on), z[..., parent][on].mean()
    batch = run.store.batch(absent)
    z = sae.encode(batch).dense()
    where = run.store.valid(absent) & (batch.positions % 8 == 1) & (z[..., parent] == 0)
    deltas = [edited(z, i, value * norm[parent] / norm[i], where) for i in (parent, like)]
    rises = logit_changes(run, absent, deltas, where)
    h = [sae.levels(batch._replace(x=batch.x + delta)).dense()[where] for delta in deltas]
    return corpus.traced(run.store.windows.doc_ids[ids], on, changes, rises, h, children)


@torch.no_grad()
def eval_hierarchy(run):
    """Mutual information of the levels, clustering, causal tracing of parents."""
    sae, store, windows = run.sae, run.store, run.store.windows
    ids, (flat, share) = windows.heldout(), flat_peer(run)
    (lower, rows, _), (peer, flat_rows, _) = (
        encode_windows(s, store, ids) for s in (sae.lower, flat))
    levels = functools.partial(corpus.levels, windows, run.live, lower)
    both, starts = levels(run.heldout[0], sae.parents()), {}
    for name in ("untrained", "start"):
        start = copy.deepcopy(sae)
        torch.manual_seed(0)
        start.begin(store.batch(ids[:32]), grouped=name == "start")
        starts[name] = levels(encode_windows(start, store, ids)[0], start.parents())
    metrics, curves, families = corpus.hierarchy_scores(
        windows, both, starts, peer, sae.lower.W_dec, flat.W_dec, run.live)
    rates, variance = both.upper.rates(), controls(run)["variance"]
    parents = corpus.evenly(families, rates, 2 if run.probing else TRACED)
    traces = [trace(run, p, families[p], rates, *corpus.windows_with(windows, both.upper, p))
              for p in parents]
    curves["tree"] = corpus.family_tree(
        windows, load_tokenizer(), both, families, parents, sae.W_dec, traces)
    causal, per_sequence = corpus.causal_scores(traces, windows)
    metrics |= causal | {"level_1_l0": np.nanmean(rows["l0"]), "flat_trained": share,
                         "level_1_explained_variance": explained_variance(rows, variance),
                         "flat_explained_variance": explained_variance(flat_rows, variance)}
    return Result(metrics, curves, per_sequence)


# ---- Compositions: recovery of known ones, interaction and reuse ----
def recovered(run, task, rho):
    """An SAE of this variant on synthetic activations -> its scores, those of baselines."""
    n_tokens, (width, k) = 2 ** 13 if run.probing else SYNTHETIC_TOKENS, SYNTHETIC_SAE
    made = task, rho, CONTEXT_LENGTH, n_tokens, FORGET
    truth, folder = corpus.synthetic(*made), cache_folder() / "synthetic"
    store = Store(folder, truth.windows, corpus.DIMENSIONS, torch.float32)
    store.maps = torch.from_numpy(truth.x).to(DEVICE).split(SHARD_WINDOWS)
    store.normalise()
    sae = make_sae(store.d_in, width, run.seed, k)
    stages = [stage._replace(epochs=1) if run.probing else stage
              for stage in planned_stages(type(sae))]
    with tempfile.TemporaryDirectory() as state:
        train(sae, store, stages, run.seed, batch_windows(store), math.inf, Path(state, "sae"))
    z, rows, _ = encode_windows(sae.eval(), store, store.windows.heldout())
    scores = corpus.recovery(truth, *np.split(z.toarray(), 2), sae.W_dec)
    scores |= {"explained_variance": explained_variance(rows, variance_by_position(store)[1]),
               "l0": np.nanmean(rows["l0"])}
    key = fingerprint(made, SYNTHETIC_SAE, Path(corpus.__file__).read_text())
    return scores, kept(folder / f"{key}.json",
                        lambda: corpus.recovery_baselines(truth, k, width))


def eval_recovery(run):
    """Matched cosine with true directions and AUROC of true features, by task and rho."""
    metrics, rows, (first, *others) = {}, [], SYNTHETIC_TASKS
    wanted = [(first, rho) for rho in SYNTHETIC_RHOS] + [(task, 1.0) for task in others]
    for task, rho in wanted[:1] if run.probing else wanted:
        scores, baselines = recovered(run, task, rho)
        rows.append({"task": task, "rho": rho, "sae": scores} | baselines)
        metrics |= {f"{task}_{rho:g}_{name}": value for name, value in scores.items()}
    return Result(metrics, {"recovery": rows}, {})


@torch.no_grad()
def eval_composition(run):
    """Whether attention tells which features act together; their reuse; patterns."""
    sae, windows, rng = run.sae, run.store.windows, np.random.default_rng(0)
    places = rng.permutation(windows.heldout_tokens())[:32 if run.probing else COMPOSED_TOKENS]
    row, at = np.divmod(places, CONTEXT_LENGTH - 1)
    batch = run.store.batch(windows.n_train + row)
    x, tokens = (a[torch.arange(len(at)), at][:, None] for a in (batch.x, batch.tokens))
    batch = batch._replace(x=x, mask=None)
    (ids, f), z = sae.features(batch), sae.encode(batch).dense()[:, 0, sae.d_f:]
    metrics, curves = corpus.composition_scores(
        functools.partial(sae.compose, ids), ids, f, z, sae.attention(ids, f),
        load_tokenizer().batch_decode(tokens), rng, min(5, run.live[0]))
    return Result(metrics, curves, {})


# ---- What features.html shows ----
@torch.no_grad()
def features(run):
    """What the page shows of 50 live latents, drawn before any look; detection metrics."""
    store, z, ids, model = run.store, run.heldout[0], run.store.heldout(64)[0], run.get_model()
    live = np.flatnonzero(run.live_latents[0])
    n = min(4 if run.probing else 50, len(live))
    latents = np.sort(np.random.default_rng(0).choice(live, n, replace=False))
    rows = F.pad(run.sae.directions()[latents], (0, 0, 0, 1))[:, None]  # the last is 0
    tokens, batch = store.tokens([0])[:, :1].expand(len(rows), 1), store.batch(ids)
    logits = logits_from(model, len(find_blocks(model)) - 1, rows, tokens)[:, 0]
    fires = torch.from_numpy(z[:, latents].tocsr()[:batch.tokens.numel()].toarray() > 0)
    related = run.sae.related(latents, batch, fires.view(*batch.tokens.shape, -1).to(batch.x))
    return corpus.latents_page(store.windows, load_tokenizer(), latents, z,
                               (logits[:-1] - logits[-1]).cpu().numpy(), related, len(live))


# name: function, what it asks of a variant, the metrics of which the means go into every agent's
# prompt: keep them few. EVALS picks; a new metric goes into the Result of one of these
EVALUATIONS = {
    "core": (eval_core, "encode", (
        "final_train_loss", "best_val_loss", "total_train_time", "avg_inference_tokens_per_second",
        "explained_variance", "l0", "dead_fraction", "loss_increase_nats", "ce_recovered")),
    "temporal": (eval_temporal, "encode", ("stability", "smoothness")),
    "probes": (eval_probes, "encode", ("probe_token_type", "probe_context")),
    "unlearning": (eval_unlearning, "encode", ("auroc_hybrid",)),
    "sparse_probing": (eval_sparse_probing, "encode", ("sae_top_1",)),
    "recovery": (eval_recovery, "encode", ()),
    "composition": (eval_composition, "compose", ()),
    "hierarchy": (eval_hierarchy, "levels", ("causal_specificity",))}


# ---- Results ----
def evaluate(run, train_seconds):
    """{evaluation: Result as a dict} of one seed, the templates' training figures first."""
    run.sae.eval()
    results = {name: corpus.evaluated(EVALUATIONS[name][0], run) for name in EVALS}
    page, detection = features(run)
    results[EVALS[0]]["metrics"] |= detection
    return corpus.with_training(results, run.log, train_seconds) | {"features": page}


def export(sae, store, layer, folder):
    """SAELens's two files, the inputs' centring and scaling folded in; where other parameters than
    SAELens knows may read inputs, both stand beside them."""
    lower = getattr(sae, "lower", sae)  # what touches x
    scaled = {"W_enc": lower.W_enc / store.scale, "W_dec": lower.W_dec * store.scale,
              "b_dec": lower.b_dec * store.scale + store.mean}
    weights = corpus.exported(sae, {"lower." * (lower is not sae) + name: value
                                    for name, value in scaled.items()})
    if sae.architecture not in corpus.SAELENS:
        weights |= {"input_mean": store.mean, "input_scale": torch.tensor(store.scale)}
    corpus.save_sae(folder, weights, sae.architecture, sae.k, {
        "sae_variant": SAE_VARIANT, "model_name": MODEL_NAME, "hook_layer": layer,
        "hook_name": f"blocks.{layer}.hook_resid_post", "dataset_path": DATASET,
        "context_size": CONTEXT_LENGTH, "prepend_bos": True})


def write_results(folder, seeds, store, layer, timing):
    """What run_seed gave for each of SEEDS -> final_info.json's content; writes all files."""
    for seed, (sae, *_) in zip(SEEDS, seeds):
        export(sae, store, layer, folder if seed == SEEDS[0] else folder / f"seed_{seed}")
    results, steps = [result for _, result, *_ in seeds], [steps for _, _, *steps in seeds]
    config = corpus.resolved(globals(), store.windows, steps) | {
        "layer": layer, "d_in": store.d_in, "d_sae": seeds[0][0].d_sae}
    headlines = {name: means for name, (*_, means) in EVALUATIONS.items()}
    return corpus.write_results(folder, results, headlines, config, timing, SOURCE)


# ---- Checks at the door ----
def expect_shape(name, tensor, wanted):
    if tensor.shape != wanted:
        raise RunnerError(f"{name} has shape {(*tensor.shape,)}, wanted {wanted}.")


def check_variant(sae, store, stages):
    """Every weighed loss exists, every parameter learns, rows are apart, padding is silent."""
    batch, dark = store.batch(np.arange(store.windows.n_train)), dict(sae.named_parameters())
    for stage in stages:
        anneal(sae, stage, 0.0)
        losses = corpus.check_losses(sae, batch, stage, SAE_VARIANT)
        total = sum(losses[name] for name in stage.weights)
        if total.requires_grad:
            total.backward()
        dark = {name: p for name, p in dark.items()
                if p.grad is None or not name.startswith(stage.trains)}
        sae.zero_grad()
    if dark:
        raise RunnerError(f"no stage's loss reaches {sorted(dark)}: detached, unused, or named by "
                          "no stage's `trains`.")
    z = sae.encode(batch).dense()
    expect_shape("encode(batch).dense()", z, (*batch.x.shape[:2], sae.d_sae))
    corpus.check_latents(sae, batch, store.batch([len(z) - 1]), SAE_VARIANT)


def preflight(config, cache):
    """Every stage, evaluation and result, on a stand-in."""
    with tempfile.TemporaryDirectory(prefix="preflight.", dir=cache) as folder:
        folder, d_in, model = Path(folder), config.hidden_size, stand_in(config)
        windows = corpus.stand_in_windows(CONTEXT_LENGTH, FORGET)
        store = Store(folder / "activations", windows, d_in, torch.float32)
        store.collect(lambda: model, 0)
        sae = make_sae(d_in, min(round(EXPANSION * d_in), max(1024, 4 * TARGET_L0)), 0)
        stages = [stage._replace(epochs=1) for stage in planned_stages(type(sae))]
        check_variant(copy.deepcopy(sae), store, stages)
        log, *steps = train(sae, store, stages, 0, 2, time.time() + 60, folder / "checkpoint.pt")
        result = evaluate(Run(sae, store, lambda: model, 0, (1, 1), log, lambda *_: store), 1.0)
        write_results(folder, [(sae, result, *steps)] * len(SEEDS), store, 0, {})


# ---- main: preflight -> tokens -> activations -> train -> evaluate -> write ----
def make_sae(d_in, d_sae, seed, target_l0=None):
    if TARGET_L0 > d_sae:
        raise RunnerError(f"TARGET_L0 = {TARGET_L0} of {d_sae} latents: raise EXPANSION.")
    torch.manual_seed(seed)
    return SAE_VARIANTS[SAE_VARIANT](d_in, d_sae, target_l0 or TARGET_L0).to(DEVICE)


def run_seed(seed, store, layer, get_model, state, deadline, timing):
    """One SAE -> (sae, results, steps planned, done); the folder `state` keeps what is finished."""
    with doing(training := f"training, seed {seed}", timing):
        sae = make_sae(store.d_in, round(EXPANSION * store.d_in), seed)
        stages, size = planned_stages(type(sae)), BATCH_TOKENS // CONTEXT_LENGTH
        log, *steps = train(sae, store, stages, seed, size, deadline, state / f"seed_{seed}.pt")
    if RANKS.rank:
        return
    with doing(f"evaluation, seed {seed}", timing), RANKS.alone():
        run = Run(sae, store, get_model, layer, LIVE, log, seed=seed)
        result = kept(state / f"seed_{seed}.json", lambda: evaluate(run, timing[training]))
    return sae, result, *steps


def open_store(config, layer, cache):
    """-> store, function that loads the model."""
    with doing("reading the data"):
        wanted = corpus.Wanted(CONTEXT_LENGTH, TRAIN_TOKENS, EVAL_FILES, TRAIN_WINDOWS_PER_FILE,
                               EVAL_WINDOWS_PER_FILE, MIN_WINDOW, DATA_SEED,
                               FORGET if "unlearning" in EVALS or TRAIN_ON != "both" else "")
        windows, key = corpus.load_windows(DATASET, load_tokenizer(), wanted, cache / "tokens")
    with doing("collecting activations"):
        name = fingerprint(key, corpus.model_identity(MODEL_NAME, config), layer, MODEL_DTYPE,
                           SHARD_WINDOWS)
        store = Store(cache / "activations" / name, windows, config.hidden_size, MODEL_DTYPE)
        print(corpus.memory_plan(config, store, EXPANSION, BATCH_TOKENS, DEVICE), flush=True)
        get_model = functools.cache(load_model)
        store.collect(get_model, layer)
    return store, get_model


def main():
    parser = argparse.ArgumentParser(description="all else is a constant of this file")
    parser.add_argument("--out_dir", default="run_0", help="folder for the results")
    out_dir = Path(parser.parse_args().out_dir).resolve()
    began, cache, timing, seeds = time.time(), cache_folder(), {}, []
    with doing("checking the settings"):
        corpus.check_config(globals(), SAE_VARIANTS, EVALUATIONS)
        corpus.make_folder(cache, "set SAE_CACHE_DIR to another folder")
        config, layer = corpus.load_config(MODEL_NAME, LAYER, CONTEXT_LENGTH)
    with corpus.publishing(out_dir, HERE) as partial:
        with doing("preflight"), corpus.trial():
            preflight(config, cache)
        print(f"preflight passed after {time.time() - began:.1f} s", flush=True)
        store, get_model = open_store(config, layer, cache)
        timing["seconds_before_training"] = time.time() - began
        code = fingerprint(SOURCE, store.folder.name)
        with corpus.resuming(cache / "runs" / fingerprint(str(out_dir)), code) as state:
            end = began + 60 * TIME_BUDGET_MINUTES * (1 - EVALUATION_RESERVE)
            for i, seed in enumerate(SEEDS):
                deadline = time.time() + (end - time.time()) / (len(SEEDS) - i)
                seeds.append(run_seed(seed, store, layer, get_model, state, deadline, timing))
            if RANKS.rank:
                return
            with doing("writing the results"):
                timing["total_seconds"] = time.time() - began
                info = write_results(partial, seeds, store, layer, timing)
    print(f"{out_dir.name}, {time.time() - began:.0f} s:", corpus.summary(info), flush=True)


if __name__ == "__main__":
    corpus.run(main, __file__, SAE, SAE_VARIANTS, SAE_VARIANT)
