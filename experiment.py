"""Temporal SAE Runner: trains one sparse autoencoder (SAE) on a language model's activations.

    python experiment.py --out_dir=run_1

There is no other argument: everything that varies is a constant below. Results: final_info.json in
that folder, and the SAE beside it. A preflight first passes the chosen variant through every stage
and evaluation on tiny batches. The run ends within TIME_BUDGET_MINUTES; killed and started again,
it carries on.

To add a variant: (A) copy a small class from "Variants", state its equation in the docstring and
override what differs: `encode` (or `select`, `activate`), `decode`, `losses`, `curriculum`;
(B) add one line to SAE_VARIANTS; (C) name it in SAE_VARIANT.
"""
import argparse
import copy
import ctypes
import errno
import fcntl
import functools
import hashlib
import inspect
import json
import math
import os
import shutil
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Callable, NamedTuple

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("GOMP_SPINCOUNT", "0")    # spinning threads cost 4x on a busy machine
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
SOURCE = Path(__file__).read_text()
sys.path.insert(0, str(HERE / "embedded"))
import corpus

# ---- CONFIG: edit here; there is no command line for these ----
SAE_VARIANT = "standard"      # standard, topk, batch_topk, jumprelu, gated, matryoshka
ABLATE = ()                   # losses or components of the variant to switch off, e.g. ("auxk",)
MODEL_NAME = "embedded/model" # a local folder or a hub id, e.g. "google/gemma-2-2b"
LAYER = None                  # residual stream after this block, from 0; None: the middle one
DATASET = "embedded"          # or a local file or folder, a nanoGPT data folder, a hub name
TRAIN_TOKENS = 196_608        # distinct training tokens; every epoch passes over all of them
CONTEXT_LENGTH = 128          # tokens in a window, with the beginning-of-sequence token
EXPANSION = 8                 # d_sae / d_in
TARGET_L0 = 48                # active latents per token, the same for every variant
SEEDS = (0,)                  # one SAE is trained and evaluated per seed
TIME_BUDGET_MINUTES = 90      # the whole run; training shrinks where it would take longer
EVALS = ("core",)             # names in EVALUATIONS
EPOCHS_SCALE = 1.0            # multiplies the epochs of every stage
BATCH_TOKENS = 1024           # tokens per training step (whole windows)
LEARNING_RATE = None          # Adam; None: 3e-3 * sqrt(1536 / d_sae)

# FIXED PROTOCOL: runs compare only while these stay as they are
DATA_SEED = 42                # order of documents, choice of windows
TRAIN_WINDOWS_PER_FILE = 8    # windows taken from one document, spread over it at random
EVAL_FILES = 256              # held-out documents
EVAL_WINDOWS_PER_FILE = 4     # windows of each; the first is in the per-sequence sample
MIN_WINDOW = 32               # a document's tail shorter than this is left out
WARMUP_FRACTION = 0.05        # of all steps: linear rise of the learning rate
DECAY_FRACTION = 0.2          # of all steps: linear fall to zero
GRADIENT_CLIP = 1.0           # norm over all parameters
DEAD_AFTER_FRACTION = 0.05    # dead: has not fired for this share of all training tokens
AUXK_WEIGHT = 1 / 32          # Gao et al. 2024 (arXiv 2406.04093)
LIVE = (50, 10)               # firings, and held-out files with one, for a latent to be live
EVALUATION_RESERVE = 0.15     # share of the time budget kept for evaluation
LOG_EVERY = 20                # steps
CHECKPOINT_SECONDS = 60       # between checkpoints, from which a killed run carries on
SHARD_WINDOWS = 512           # windows in one file of the activation cache
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODEL_DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32     # of the language model


class RunnerError(Exception):
    """A mistake in settings, data or environment: one paragraph for the user, exit code 2."""


class Batch(NamedTuple):
    """What flows into a variant. A row is a window of one document without its first token, BOS."""
    x: torch.Tensor             # [batch, seq, d_in] activations, centred, mean squared norm 1
    tokens: torch.Tensor        # [batch, seq] token ids
    doc_ids: torch.Tensor       # [batch] document of each window
    positions: torch.Tensor     # [seq] position in the window, from 1
    mask: torch.Tensor | None   # [batch, seq] False at padding; None where there is none


# ---- Sparse latents: arithmetic at the active (token, latent) pairs, equal to the dense form ----
NEVER = -1e9                    # the pre-activation at padding: no latent fires there
MAX_DENSITY = 0.08              # above this share of active pairs the dense form is faster
BF16_UNITS = DEVICE == "cpu" and torch.cpu._is_avx512_bf16_supported()


class Pairs:
    """The (token, latent) pairs where latents may be non-zero, in the order of tokens."""

    def __init__(self, ids, starts, pre_acts=None):
        self.ids = ids              # [n_pairs] latent of each pair
        self.starts = starts        # [n_tokens] index of each token's first pair
        self.pre_acts = pre_acts    # [n_pairs] pre-activations, where the selection computed them

    @classmethod
    def from_flat(cls, flat, pre_acts):     # ascending indices into pre_acts [n_tokens, d_sae]
        n, d_sae = pre_acts.shape
        rows = torch.div(flat, d_sae, rounding_mode="floor")
        counts = torch.bincount(rows, minlength=n)
        pairs = cls(flat - rows * d_sae, counts.cumsum(0) - counts, pre_acts.flatten()[flat])
        pairs.rows = rows
        return pairs

    @classmethod
    def from_ids(cls, ids, pre_acts=None):  # [n_tokens, k], as many for each token
        starts = torch.arange(0, ids.numel(), ids.shape[1], device=ids.device)
        return cls(ids.flatten(), starts, None if pre_acts is None else pre_acts.flatten())

    @functools.cached_property
    def rows(self):                         # [n_pairs] token of each pair
        ends = torch.cat([self.starts[1:], self.starts.new_tensor([len(self.ids)])])
        tokens = torch.arange(len(self.starts), device=self.ids.device)
        return tokens.repeat_interleave(ends - self.starts)

    def by_latent(self, d_sae):
        """The transposed pattern: order of pairs, their tokens in it, each latent's first pair."""
        if not hasattr(self, "_by_latent"):
            order = self.ids.argsort(stable=True)
            counts = torch.bincount(self.ids, minlength=d_sae)
            self._by_latent = order, self.rows[order], counts.cumsum(0) - counts
        return self._by_latent

    def dots(self, a, b):                   # [n_tokens, d], [d_sae, d] -> [n_pairs]
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(
            a, b, self.ids, self.starts, self.rows, 0)

    def sums(self, values, b):              # value * b[latent] over a token's pairs: [n_tokens, d]
        return F.embedding_bag(self.ids, b, self.starts, mode="sum", per_sample_weights=values)

    def sums_by_latent(self, values, a, d_sae):     # value * a[token] over a latent's: [d_sae, d]
        order, rows, starts = self.by_latent(d_sae)
        return F.embedding_bag(rows, a, starts, mode="sum", per_sample_weights=values[order])


class PairEncode(torch.autograd.Function):
    """values[p] = (x[row_p] - b_dec) . W_enc[:, latent_p] + b_enc[latent_p]"""

    @staticmethod
    def forward(ctx, x, b_dec, W_enc, b_enc, pairs):
        centred = x - b_dec
        ctx.save_for_backward(centred, W_enc)
        ctx.pairs = pairs
        values, pairs.pre_acts = pairs.pre_acts, None       # kept there, it would close a cycle
        return values if values is not None else pairs.dots(centred, W_enc.t()) + b_enc[pairs.ids]

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
        learns = ctx.needs_input_grad[1]
        grad_W_dec = pairs.sums_by_latent(values, grad, len(W_dec)) if learns else None
        return pairs.dots(grad, W_dec), grad_W_dec, None


class Latents(NamedTuple):
    """Latents z of a batch, at pairs or, where `pairs` is None, dense; a token is a row."""
    values: torch.Tensor            # [n_pairs], or [n_tokens, d_sae] where dense
    pre_acts: torch.Tensor          # of the same shape: what the values were made from
    pairs: Pairs | None
    shape: tuple                    # (batch, seq, d_sae)

    def at(self, per_latent):       # [d_sae] -> the entry of each value's latent
        return per_latent if self.pairs is None else per_latent.index_select(0, self.pairs.ids)

    def decode(self, W_dec):        # -> [batch, seq, d_in]
        dense, pairs = self.pairs is None, self.pairs
        x_hat = self.values @ W_dec if dense else PairDecode.apply(self.values, W_dec, pairs)
        return x_hat.view(*self.shape[:2], -1)

    def within(self, low, high):    # only the latents low <= i < high
        if self.pairs is None:
            columns = torch.arange(self.shape[2], device=self.values.device)
            return self._replace(values=self.values * ((columns >= low) & (columns < high)))
        keep = (self.pairs.ids >= low) & (self.pairs.ids < high)
        counts = torch.bincount(self.pairs.rows[keep], minlength=len(self.pairs.starts))
        pairs = Pairs(self.pairs.ids[keep], counts.cumsum(0) - counts)
        return Latents(self.values[keep], self.pre_acts[keep], pairs, self.shape)

    def dense(self):                # -> [batch, seq, d_sae]
        z = self.values
        if self.pairs is not None:
            zeros = z.new_zeros(math.prod(self.shape[:2]), self.shape[2])
            z = zeros.index_put((self.pairs.rows, self.pairs.ids), z)
        return z.view(self.shape)

    def active(self):               # -> token [n], latent [n], value [n] of the non-zero latents
        if self.pairs is None:
            rows, ids = self.values.nonzero(as_tuple=True)
            return rows, ids, self.values[rows, ids]
        keep = self.values != 0
        return self.pairs.rows[keep], self.pairs.ids[keep], self.values[keep]


def group_top_k(values, k, groups=16):
    """Exact top k of each row of [n, width]: the k groups with the largest maxima hold them."""
    n, width = values.shape
    columns = width // groups
    if width % groups or columns < 2 * k:
        return values.topk(k, dim=1, sorted=False)
    best = values.view(n, groups, columns).amax(1).topk(k, dim=1, sorted=False).indices
    members = torch.arange(0, width, columns, device=values.device)
    candidates = (best[:, None, :] + members[None, :, None]).flatten(1)          # [n, groups * k]
    top, where = values.gather(1, candidates).topk(k, dim=1, sorted=False)
    return top, candidates.gather(1, where)


def top_k_pairs(x, W_enc, b_enc, k, groups=16):
    """The k largest pre-activations x @ W_enc + b_enc of each token, exact in fp32.

    With bf16 units, bf16 proposes all latents that reach the 2k-th best group, and fp32 rescores
    them. Another latent lies at most one rounding error above that; rows where it could matter are
    computed again in fp32.
    """
    (n, _), (_, width) = x.shape, W_enc.shape
    if not BF16_UNITS or width % groups or width < 4 * groups * k:
        pre_acts, ids = group_top_k(torch.addmm(b_enc, x, W_enc), k)
        return Pairs.from_ids(ids, pre_acts)
    x_coarse, W_coarse = x.bfloat16(), W_enc.bfloat16()
    coarse = torch.addmm(b_enc.bfloat16(), x_coarse, W_coarse)
    best = coarse.view(n, groups, -1).amax(1).topk(2 * k, dim=1, sorted=False)
    members = torch.arange(0, width, width // groups, device=x.device)
    candidates = (best.indices[:, None, :] + members[None, :, None]).flatten(1)
    last = best.values.amin(1, keepdim=True)
    flat = (coarse.gather(1, candidates) >= last).flatten().nonzero().flatten()
    proposed = Pairs.from_flat(flat, candidates)
    row, proposed.ids = proposed.rows, proposed.pre_acts        # from candidates' columns to latents
    exact = proposed.dots(x, W_enc.t()) + b_enc[proposed.ids]
    place = torch.arange(len(flat), device=x.device) - proposed.starts[row]
    width = int(place.max()) + 1                                # [n, width]: proposals, left-aligned
    pre_acts, ids = exact.new_full((n, width), NEVER), flat.new_zeros(n, width)
    pre_acts[row, place], ids[row, place] = exact, proposed.ids
    pre_acts, where = pre_acts.topk(k, dim=1, sorted=False)
    ids, last = ids.gather(1, where), last[:, 0].float()
    rounding = ((x - x_coarse).norm(dim=1) * W_enc.norm(dim=0).max()
                + x.norm(dim=1) * (W_enc - W_coarse).norm(dim=0).max()
                + 2 ** -8 * (b_enc.abs().max() + last.abs()))
    doubtful = (pre_acts.amin(1) < last + 1.01 * rounding).nonzero().flatten()
    if len(doubtful):
        pre_acts[doubtful], ids[doubtful] = group_top_k(torch.addmm(b_enc, x[doubtful], W_enc), k)
    return Pairs.from_ids(ids, pre_acts)


class Step(torch.autograd.Function):
    """Heaviside step whose pseudo-derivative is a rectangle of the given width."""

    @staticmethod
    def forward(ctx, u, bandwidth):
        ctx.save_for_backward(u)
        ctx.bandwidth = bandwidth
        return (u > 0).to(u.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad * (ctx.saved_tensors[0].abs() < ctx.bandwidth / 2) / ctx.bandwidth, None


# ---- Variants. One contiguous block each; a curriculum is data ----
class Stage(NamedTuple):
    """One stage of a curriculum. The stages of every variant add up to 20 epochs."""
    name: str
    epochs: float
    weights: dict               # loss -> weight: a number, or a function of the stage's progress
    trains: tuple = ("",)       # prefixes of parameters' names; the others keep every bit
    lr: float = 1.0             # multiplies LEARNING_RATE
    anneals: dict = {}          # attribute of the SAE -> function of the stage's progress in [0, 1)


class SAE(nn.Module):
    """Standard SAE: z = ReLU((x - b_dec) W_enc + b_enc), x_hat = z W_dec + b_dec,
    L = |x - x_hat|^2 + w |z|_1 (Bricken et al. 2023).

    Rows of W_dec keep unit norm. w multiplies the loss named "sparsity" and is steered until
    L0 = TARGET_L0.
    """
    curriculum = (Stage("autoencoder", 20, {"reconstruction": 1.0, "sparsity": 1.0}),)
    components = ()             # what ABLATE may name besides losses
    resamples_dead = True       # dead latents are resampled in the first half of training

    def __init__(self, d_in, d_sae, target_l0):
        super().__init__()
        self.d_in, self.d_sae, self.target_l0 = d_in, d_sae, target_l0
        directions = F.normalize(torch.randn(d_sae, d_in), dim=1)
        self.W_dec = nn.Parameter(directions)               # [d_sae, d_in]
        self.W_enc = nn.Parameter(directions.clone().t())   # [d_in, d_sae], columns contiguous
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_in))        # inputs are centred: 0 is their mean
        self.register_buffer("tokens_since_fired", torch.zeros(d_sae, dtype=torch.long))
        self.register_buffer("dead_after", torch.tensor(10 ** 12))      # tokens; set by the trainer
        self.register_buffer("sparsity_weight", torch.tensor(1e-3))

    def initialise(self, batch):
        """Called once with the first batch, before training: thresholds and the like."""

    def resampled(self, dead):
        """Called when the latents `dead` were resampled, for what else keeps them from firing."""

    def encoder_input(self, batch):
        """What the encoder reads, [batch, seq, d_in]."""
        return batch.x

    def select(self, x, mask):
        """Pairs at which to compute latents of x [n_tokens, d_in]; None: all. mask: [n_tokens]."""
        pre_acts = torch.addmm(self.b_enc, x - self.b_dec, self.W_enc)
        flat = (pre_acts > self.lowest_pre_act()).flatten().nonzero().flatten()
        dense = len(flat) > MAX_DENSITY * pre_acts.numel()
        return None if dense else Pairs.from_flat(flat, pre_acts)

    def lowest_pre_act(self):
        return 0.0

    def activate(self, latents):
        """Values of the latents from `latents.pre_acts`, at the same places."""
        return F.relu(latents.pre_acts)

    def encode(self, batch):
        """batch -> Latents [batch, seq, d_sae]; zero at padding."""
        inputs = self.encoder_input(batch)
        expect_shape("the encoder's input", inputs, (None, None, self.d_in))
        x, mask = inputs.flatten(0, 1), None if batch.mask is None else batch.mask.flatten()
        with torch.no_grad():
            pairs = self.select(x, mask)
        if pairs is None:
            pre_acts = torch.addmm(self.b_enc - self.b_dec @ self.W_enc, x, self.W_enc)
        else:
            pre_acts = PairEncode.apply(x, self.b_dec, self.W_enc, self.b_enc, pairs)
        if mask is not None:
            padding = ~(mask[:, None] if pairs is None else mask[pairs.rows])
            pre_acts = pre_acts.masked_fill(padding, NEVER)
        latents = Latents(pre_acts, pre_acts, pairs, (*inputs.shape[:2], self.d_sae))
        return latents._replace(values=self.activate(latents))

    def decode(self, latents):
        """Latents -> x_hat [batch, seq, d_in]."""
        return latents.decode(self.W_dec) + self.b_dec

    def losses(self, batch, latents):
        """Named loss terms without their weights, each a scalar."""
        return {"reconstruction": squared_error(batch, self.decode(latents)),
                "sparsity": self.l1(batch, latents)}

    def l1(self, batch, latents):
        return latents.values.abs().sum() / n_tokens(batch)

    def dead_mask(self):             # [d_sae]
        return self.tokens_since_fired > self.dead_after

    def saelens_layout(self):
        """SAELens's name for the architecture, weights to add, and names of those to drop."""
        return "standard", {}, ()

    def parameters_of_interest(self):
        """Scalars to follow through training, {name: float}."""
        return {}


def n_tokens(batch):
    return batch.x.shape[0] * batch.x.shape[1] if batch.mask is None else batch.mask.sum()


def valid(batch, values):       # [batch, seq, ...], zero at padding
    return values if batch.mask is None else values * batch.mask[..., None]


def squared_error(batch, x_hat):
    """Mean over tokens of |x - x_hat|^2: with inputs of mean squared norm 1, the fraction of
    variance unexplained."""
    expect_shape("x_hat", x_hat, tuple(batch.x.shape))
    return valid(batch, (batch.x - x_hat).square()).sum() / n_tokens(batch)


class TopK(SAE):
    """z = TopK_k(ReLU((x - b_dec) W_enc + b_enc)), L = |x - x_hat|^2 + 1/32 auxk (Gao et al. 2024,
    arXiv 2406.04093)."""
    curriculum = (Stage("autoencoder", 20, {"reconstruction": 1.0, "auxk": AUXK_WEIGHT}),)
    resamples_dead = False           # auxk revives them

    def __init__(self, d_in, d_sae, target_l0):
        super().__init__(d_in, d_sae, target_l0)
        self.k = target_l0

    def select(self, x, mask):
        return top_k_pairs(x - self.b_dec, self.W_enc, self.b_enc, self.k)

    def losses(self, batch, latents):
        x_hat = self.decode(latents)
        return {"reconstruction": squared_error(batch, x_hat), "auxk": self.auxk_loss(batch, x_hat)}

    def saelens_layout(self):
        return "topk", {}, ()

    def auxk_loss(self, batch, x_hat):
        """The residual as the top d_in / 2 dead latents reconstruct it: error over variance."""
        dead = self.dead_mask().nonzero().flatten()
        if not len(dead):
            return x_hat.new_zeros(())
        x = self.encoder_input(batch)
        residual = batch._replace(x=valid(batch, (batch.x - x_hat).detach()))
        pre_acts = (x - self.b_dec) @ self.W_enc[:, dead] + self.b_enc[dead]
        top = F.relu(pre_acts).topk(min(self.d_in // 2, len(dead)), dim=-1)
        latents = torch.zeros_like(pre_acts).scatter(-1, top.indices, top.values)
        error = squared_error(residual, latents @ self.W_dec[dead])
        mean = residual.x.sum((0, 1)) / n_tokens(batch)
        variance = squared_error(residual, mean.expand_as(x_hat))
        return error / variance if variance > 1e-12 else 0.0 * error


class BatchTopK(TopK):
    """TopK over the whole batch: the k * n_tokens largest pre-activations (Bussmann et al. 2024,
    arXiv 2412.06410). In evaluation z = pre * 1[pre > threshold], the threshold a running mean of
    the least value kept in training."""
    def __init__(self, d_in, d_sae, target_l0):
        super().__init__(d_in, d_sae, target_l0)
        self.register_buffer("threshold", torch.tensor(0.0))

    def select(self, x, mask):
        pre_acts = torch.addmm(self.b_enc, x - self.b_dec, self.W_enc)
        if mask is not None:
            pre_acts.masked_fill_(~mask[:, None], NEVER)
        least = 0.8 * self.threshold if self.training else self.threshold
        flat = (pre_acts > least).flatten().nonzero().flatten()
        if self.training:       # what lies above 0.8 thresholds is short and nearly always enough
            keep = int(self.k * (len(x) if mask is None else mask.sum()))
            if len(flat) < keep:
                flat = torch.arange(pre_acts.numel(), device=x.device)
            values = pre_acts.flatten()[flat]
            least = values.kthvalue(len(values) - keep + 1).values.clamp_min(1e-12)
            self.threshold.lerp_(least, 0.01 if self.threshold > 0 else 1.0)
            flat = flat[values >= least]
        return Pairs.from_flat(flat, pre_acts)

    def saelens_layout(self):
        return "jumprelu", {"threshold": self.threshold.expand(self.d_sae)}, ()


class Matryoshka(BatchTopK):
    """BatchTopK of which each nested prefix of latents reconstructs x; L is the mean of the
    prefixes' errors (Bussmann et al. 2025, arXiv 2503.17547)."""
    group_fractions = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32)

    def losses(self, batch, latents):
        ends = [round(f * self.d_sae) for f in np.cumsum(self.group_fractions)]
        x_hat, error = self.b_dec, 0.0
        for low, high in zip([0] + ends, ends):
            x_hat = x_hat + latents.within(low, high).decode(self.W_dec)
            error = error + squared_error(batch, x_hat) / len(ends)
        return {"reconstruction": error, "auxk": self.auxk_loss(batch, x_hat)}


class JumpReLU(SAE):
    """z = pre * 1[pre > theta], L = |x - x_hat|^2 + 3 (L0 / TARGET_L0 - 1)^2, straight-through
    gradients to theta (Rajamanoharan et al. 2024, arXiv 2407.14435)."""
    curriculum = (Stage("autoencoder", 20, {"reconstruction": 1.0, "l0": 3.0}),)
    bandwidth = 0.05

    def __init__(self, d_in, d_sae, target_l0):
        super().__init__(d_in, d_sae, target_l0)
        self.log_threshold = nn.Parameter(torch.full((d_sae,), math.log(0.1)))

    def initialise(self, batch):
        x = batch.x.flatten(0, 1) if batch.mask is None else batch.x[batch.mask]
        pre_acts = ((x[:1024] - self.b_dec) @ self.W_enc + self.b_enc).flatten()
        rank = int(len(pre_acts) * (1 - self.target_l0 / self.d_sae))       # where L0 is on target
        self.log_threshold.data.fill_(pre_acts.kthvalue(max(1, rank)).values.clamp_min(1e-3).log())

    def lowest_pre_act(self):
        return self.log_threshold.exp() - self.bandwidth / 2

    def resampled(self, dead):
        self.b_enc[dead] = self.lowest_pre_act()[dead]      # where thresholds let them learn

    def gate(self, latents):
        above = latents.pre_acts.detach() - latents.at(self.log_threshold.exp())
        return Step.apply(above, self.bandwidth)

    def activate(self, latents):
        gate, theta = self.gate(latents), latents.at(self.log_threshold.exp()).detach()
        return F.relu(latents.pre_acts) * gate.detach() + theta * (gate - gate.detach())

    def losses(self, batch, latents):
        l0 = self.gate(latents).sum() / n_tokens(batch)
        return {"reconstruction": squared_error(batch, self.decode(latents)),
                "l0": (l0 / self.target_l0 - 1).square()}

    def saelens_layout(self):
        return "jumprelu", {"threshold": self.log_threshold.exp()}, ("log_threshold",)


class Gated(SAE):
    """pi = (x - b_dec) W_enc + b_enc, z = 1[pi > 0] ReLU(exp(r) (pi - b_enc) + b_mag),
    L = |x - x_hat|^2 + w |ReLU(pi)|_1 + |x - x_hat_frozen(ReLU(pi))|^2, the last through a frozen
    decoder (Rajamanoharan et al. 2024, arXiv 2404.16014)."""
    curriculum = (Stage("autoencoder", 20, {"reconstruction": 1.0, "sparsity": 1.0, "gate": 1.0}),)

    def __init__(self, d_in, d_sae, target_l0):
        super().__init__(d_in, d_sae, target_l0)
        self.r_mag, self.b_mag = nn.Parameter(torch.zeros(d_sae)), nn.Parameter(torch.zeros(d_sae))

    def activate(self, latents):
        pi = latents.pre_acts
        scale, b_enc, b_mag = map(latents.at, (self.r_mag.exp(), self.b_enc, self.b_mag))
        return F.relu(scale * (pi - b_enc) + b_mag) * (pi > 0)

    def losses(self, batch, latents):
        gate = latents._replace(values=F.relu(latents.pre_acts))
        frozen = gate.decode(self.W_dec.detach()) + self.b_dec.detach()
        return {"reconstruction": squared_error(batch, self.decode(latents)),
                "sparsity": self.l1(batch, gate), "gate": squared_error(batch, frozen)}

    def saelens_layout(self):
        return "gated", {"b_gate": self.b_enc}, ("b_enc",)


SAE_VARIANTS = {"standard": SAE, "topk": TopK, "batch_topk": BatchTopK, "jumprelu": JumpReLU,
                "gated": Gated, "matryoshka": Matryoshka}


# ---- Data and model ----
def load_windows(tokenizer, bos, cache):
    """The windows of this configuration, from the cache where they are known, and their key."""
    wanted = corpus.Wanted(CONTEXT_LENGTH, TRAIN_TOKENS, EVAL_FILES, TRAIN_WINDOWS_PER_FILE,
                           EVAL_WINDOWS_PER_FILE, MIN_WINDOW, DATA_SEED)
    vocabulary = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else MODEL_NAME
    source = inspect.getsource(corpus)
    key = fingerprint(corpus.data_identity(DATASET), vocabulary, bos, wanted, source)
    path = cache / "tokens" / f"{key}.npz"
    windows = corpus.read_windows(path)
    if windows is None:
        print(f"tokenising {DATASET}", flush=True)
        windows = corpus.make_windows(DATASET, tokenizer, bos, wanted)
        with replacing(path) as partial, open(partial, "wb") as file:
            np.savez(file, **windows._asdict())
    return windows, key


def model_folder():
    """The local folder that MODEL_NAME means, as a path or from here; None where it is a hub id."""
    folders = [path for path in (Path(MODEL_NAME).expanduser(), HERE / MODEL_NAME) if path.is_dir()]
    return folders[0].resolve() if folders else None


def load_pretrained(loader, what, **kwargs):
    """A config, tokenizer or model by MODEL_NAME, or one short error for all that can go wrong."""
    if model_folder() is None and not corpus.hub_reachable():
        corpus.go_offline()
    try:
        return loader.from_pretrained(str(model_folder() or MODEL_NAME), **kwargs)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        cause = str(error).split("\n")[0].split("http")[0][:300]
        if "gated" in str(error).lower():
            cause = "access is gated: accept its licence on the hub and log in with `hf auth login`"
        raise RunnerError(
            f"MODEL_NAME = {MODEL_NAME!r}: no {what} in such a folder or on the hub ({cause}). "
            "Names that work: 'embedded/model', 'EleutherAI/pythia-70m-deduped', "
            "'google/gemma-2-2b', or a folder with config.json, model.safetensors and "
            "tokenizer.json.") from None


def load_model():
    model = load_pretrained(transformers.AutoModelForCausalLM, "weights", dtype=MODEL_DTYPE)
    return model.to(DEVICE).eval().requires_grad_(False)


def model_identity(config):
    """What activations depend on: a local model's files (their bytes; above 64 MB size and date),
    or a hub commit."""
    def identity(path):
        size, date = path.stat().st_size, path.stat().st_mtime_ns
        return path.name, zlib.crc32(path.read_bytes()) if size < 2 ** 26 else (size, date)

    if model_folder() is None:
        return MODEL_NAME, config._commit_hash
    return [identity(path) for path in sorted(model_folder().iterdir()) if path.is_file()]


def stand_in(config):
    """A random causal model of the same family: real hidden size, two layers, 256 tokens."""
    config = type(config).from_dict(config.to_dict())
    text = config.get_text_config()
    text.num_hidden_layers, text.vocab_size = 2, 256
    text.bos_token_id = text.eos_token_id = text.pad_token_id = 0
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:2]
    wrong = f"MODEL_NAME = {MODEL_NAME!r} ({config.model_type}) is no causal language model"
    advice = "Take a decoder: GPT-NeoX/Pythia, GPT-2, Llama, Gemma, Qwen, OPT or Mistral."
    try:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except ValueError:
        raise RunnerError(f"{wrong}: transformers has no such head for it. {advice}") from None
    model.to(DEVICE).eval().requires_grad_(False)
    tokens = torch.arange(1, 9, device=DEVICE)[None]
    before = residual_after(model, 0, tokens)[0, :-1]
    tokens[0, -1] = 0
    if not torch.allclose(before, residual_after(model, 0, tokens)[0, :-1], atol=1e-5):
        raise RunnerError(f"{wrong}: a later token changes earlier activations. {advice}")
    return model


def find_blocks(model):
    """The decoder's blocks: the largest ModuleList as long as the configuration says."""
    depth = model.config.get_text_config().num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not lists:
        raise RunnerError(f"MODEL_NAME = {MODEL_NAME!r} has no list of {depth} blocks.")
    return max(lists, key=lambda m: sum(p.numel() for p in m.parameters()))


class Captured(Exception):
    """Ends a forward pass at the hooked layer."""


@torch.no_grad()
def block_output(model, layer, tokens):
    """What block `layer` returns, a tensor or a tuple by family; nothing later is computed."""
    def stop(module, inputs, output):
        raise Captured(output)
    handle = find_blocks(model)[layer].register_forward_hook(stop)
    try:
        model.base_model(input_ids=tokens, use_cache=False)
    except Captured as captured:
        return captured.args[0]
    finally:
        handle.remove()


def residual_after(model, layer, tokens):
    """Residual stream after block `layer`: [batch, seq, d_in]."""
    output = block_output(model, layer, tokens)
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def logits_from(model, layer, hidden, tokens):
    """Logits [batch, seq, vocab] with `hidden` as the residual stream after block `layer`; the
    blocks up to there are skipped."""
    skipped, output = find_blocks(model)[:layer + 1], hidden.to(next(model.parameters()).dtype)
    usual = block_output(model, layer, tokens[:1, :1])
    output = (output, *usual[1:]) if isinstance(usual, tuple) else output
    for block in skipped:
        block.forward = lambda *args, **kwargs: output
    try:
        return model(input_ids=tokens, use_cache=False).logits.float()
    finally:
        for block in skipped:
            del block.forward


# ---- Activations: collected once, cached by content in shards, shared by all runs ----
def cache_folder():
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("SAE_CACHE_DIR") or user / "temporal-sae-runner").absolute()


def fingerprint(*parts):
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:20]


def make_folder(folder, advice):
    """Makes a folder, or says at once why nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        reason = error.strerror or error
        raise RunnerError(f"{folder} cannot be written ({reason}): {advice}.") from None


@contextmanager
def replacing(path):
    """A partial file that becomes `path` only when it is whole and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def locked(path):
    """Waits until no other process holds the lock at `path`; a killed process holds none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print(f"waiting for another run at {path}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Store:
    """Cached activations of all windows, [window, CONTEXT_LENGTH, d_in] in shards; hands out
    batches, centred and scaled."""

    def __init__(self, folder, windows, d_in, dtype):
        self.folder, self.windows, self.d_in, self.dtype = folder, windows, d_in, dtype
        n = len(windows.tokens)
        self.shards = [(i, min(i + SHARD_WINDOWS, n)) for i in range(0, n, SHARD_WINDOWS)]
        self.tokens = torch.from_numpy(windows.tokens.astype(np.int64)).to(DEVICE)

    def path(self, start):
        return self.folder / f"{start:09d}.bin"

    def intact(self, start):
        """Whether a shard is there with the checksum that was written after it."""
        shard, checksum = self.path(start), self.path(start).with_suffix(".crc32")
        if not (checksum.exists() and shard.exists()):
            return False
        found = zlib.crc32(np.memmap(shard, np.uint8, "r")) if shard.stat().st_size else 0
        if str(found).encode() == checksum.read_bytes():
            return True
        print(f"{self.path(start)} is damaged: collecting it again", flush=True)
        return False

    def collect(self, get_model, layer):
        """Fills in the missing shards, under a lock that other runs wait for; then opens all."""
        with locked(self.folder / "lock"):
            for killed in self.folder.glob("*.partial"):
                killed.unlink()
            missing = [(a, b) for a, b in self.shards if not self.intact(a)]
            if missing:
                model, began = get_model(), time.time()
                tokens = sum(b - a for a, b in missing) * CONTEXT_LENGTH
                need = tokens * self.d_in * self.dtype.itemsize
                free = shutil.disk_usage(self.folder).free
                if free < need * 1.05:
                    raise RunnerError(
                        f"the activation cache needs {need / 1e9:.1f} GB in {self.folder}, where "
                        f"{free / 1e9:.1f} GB are free. Lower TRAIN_TOKENS or set SAE_CACHE_DIR.")
                for start, end in tqdm(missing, "collecting", disable=not sys.stderr.isatty()):
                    self.collect_shard(model, layer, start, end)
                rate = tokens / (time.time() - began)
                print(f"collected {tokens:,} tokens at {rate:,.0f} tokens/s", flush=True)
        self.open()

    def collect_shard(self, model, layer, start, end, batch=32):
        with replacing(self.path(start)) as partial:
            with open(partial, "wb") as file:
                for i in range(start, end, batch):
                    hidden = residual_after(model, layer, self.tokens[i:min(i + batch, end)])
                    if not torch.isfinite(hidden).all():
                        raise RunnerError(f"non-finite activations after block {layer}.")
                    file.write(hidden.to(self.dtype).cpu().contiguous().view(torch.uint8).numpy())
            checksum = zlib.crc32(np.memmap(partial, np.uint8, "r"))
        with replacing(self.path(start).with_suffix(".crc32")) as partial:
            partial.write_text(str(checksum))

    def open(self):
        """Maps the shards; takes the mean and the scale from the first 2^18 training tokens."""
        row = CONTEXT_LENGTH * self.d_in
        self.maps = [torch.from_file(str(self.path(a)), size=(b - a) * row, dtype=self.dtype)
                     .view(b - a, CONTEXT_LENGTH, self.d_in) for a, b in self.shards]
        room = torch.cuda.mem_get_info()[0] // 2 if DEVICE == "cuda" else free_memory() // 4
        size = len(self.tokens) * row * self.dtype.itemsize
        self.resident = torch.cat(self.maps).to(DEVICE) if size < room else None
        self.mean, self.scale = torch.zeros(self.d_in, device=DEVICE), 1.0
        sample = np.arange(min(self.windows.n_train, 2 ** 18 // CONTEXT_LENGTH))
        sums, square, n = self.moments(np.array_split(sample, len(sample) // 64 + 1))
        self.mean = (sums.sum(0) / n.sum()).float()
        self.scale = (square.sum() / n.sum() - (sums.sum(0) / n.sum()).square().sum()).sqrt().item()

    def moments(self, chunks):
        """Over windows, by position: sum of x [seq, d_in], of |x|^2 [seq], and tokens [seq]."""
        sums, squares, n = 0.0, 0.0, 0
        for ids in chunks:
            x, keep = self.batch(ids).x.double(), self.valid(ids)[:, 1:].to(DEVICE)
            sums = sums + (x * keep[..., None]).sum(0)
            squares = squares + (x.square().sum(-1) * keep).sum(0)
            n = n + keep.sum(0)
        return sums, squares, n

    def valid(self, ids):
        """[len(ids), CONTEXT_LENGTH] True at tokens that count: not the first, not padding."""
        position = torch.arange(CONTEXT_LENGTH)
        return (position > 0) & (position < torch.from_numpy(self.windows.lengths[ids])[:, None])

    def raw(self, ids):
        """Activations as the model made them, BOS included: [len(ids), CONTEXT_LENGTH, d_in]."""
        if self.resident is not None:
            return self.resident[torch.as_tensor(ids, device=DEVICE)].float()
        rows = [self.maps[i // SHARD_WINDOWS][i % SHARD_WINDOWS] for i in map(int, ids)]
        return torch.stack(rows).to(DEVICE, torch.float32)

    def batch(self, ids):
        ids = np.asarray(ids)
        x = (self.raw(ids)[:, 1:] - self.mean) / self.scale
        full = (self.windows.lengths[ids] == CONTEXT_LENGTH).all()
        mask = None if full else self.valid(ids)[:, 1:].to(DEVICE)
        doc_ids = torch.as_tensor(self.windows.doc_ids[ids], device=DEVICE)
        positions = torch.arange(1, CONTEXT_LENGTH, device=DEVICE)
        return Batch(x, self.tokens_of(ids)[:, 1:], doc_ids, positions, mask)

    def tokens_of(self, ids):
        return self.tokens[torch.as_tensor(ids, device=DEVICE)]

    def unscaled(self, x):
        """x as `batch` gives it -> as the model made it."""
        return x * self.scale + self.mean

    def heldout(self, size):
        """Held-out window ids in chunks of `size`."""
        ids = np.arange(self.windows.n_train, len(self.windows.tokens))
        return [ids[i:i + size] for i in range(0, len(ids), size)]


def free_memory():
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# ---- Trainer: knows no variant ----
def planned_stages(variant):
    """The variant's curriculum with ABLATE and EPOCHS_SCALE applied."""
    def kept(weights):
        return {name: weight for name, weight in weights.items() if name not in ABLATE}
    return [stage._replace(epochs=stage.epochs * EPOCHS_SCALE, weights=kept(stage.weights))
            for stage in variant.curriculum]


def learning_rate(done, d_sae):
    """Adam's rate when the share `done` of all steps is behind: rise, constant, fall to zero."""
    base = LEARNING_RATE or 3e-3 * math.sqrt(1536 / d_sae)
    return base * min(1.0, (done + 1e-3) / WARMUP_FRACTION, (1 - done) / DECAY_FRACTION)


def make_optimizer(sae, lr):
    return torch.optim.Adam(sae.parameters(), lr=lr, betas=(0.9, 0.999), fused=True)


def anneal(sae, stage, done):
    for attribute, schedule in stage.anneals.items():
        setattr(sae, attribute, schedule(done))


def train_step(sae, optimizer, batch, stage, done):
    """One step; `done` is the stage's progress in [0, 1). Returns the named losses and L0."""
    anneal(sae, stage, done)
    latents = sae.encode(batch)
    losses, total = sae.losses(batch, latents), 0.0
    for name, weight in stage.weights.items():
        weight = weight(done) if callable(weight) else weight
        total = total + weight * (sae.sparsity_weight if name == "sparsity" else 1.0) * losses[name]
    total.backward()
    with torch.no_grad():
        W, learns = sae.W_dec, sae.W_dec.grad is not None
        if learns:              # the gradient along a row would be undone by the renormalisation
            W.grad.addcmul_((W.grad * W).sum(1, keepdim=True), W, value=-1)
        nn.utils.clip_grad_norm_(sae.parameters(), GRADIENT_CLIP)       # gradients are final here
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if learns:
            W.div_(W.norm(dim=1, keepdim=True))
        fired = latents.active()[1]
        sae.tokens_since_fired += n_tokens(batch)
        sae.tokens_since_fired[fired] = 0
        l0 = torch.as_tensor(len(fired) / n_tokens(batch))
        if "sparsity" in stage.weights:     # multiplicative control: too many active raise it
            error = (l0.clamp_min(1e-2) / sae.target_l0).log().clamp(-1, 1)
            sae.sparsity_weight.mul_((0.05 * error).exp())
    return {name: loss.detach() for name, loss in losses.items()} | {"l0": l0}


@torch.no_grad()
def resample_dead(sae, optimizer, batch):
    """Points dead latents at badly reconstructed tokens (Bricken et al. 2023)."""
    dead, parameters = sae.dead_mask().nonzero().flatten(), (sae.W_dec, sae.W_enc, sae.b_enc)
    if not len(dead) or not all(parameter.requires_grad for parameter in parameters):
        return
    residual = valid(batch, batch.x - sae.decode(sae.encode(batch))).flatten(0, 1)
    worst = residual.square().sum(1).square()           # 0 at padding
    rows = F.normalize(residual[torch.multinomial(worst, len(dead), replacement=True)], dim=1)
    sae.W_dec[dead] = rows
    sae.W_enc[:, dead] = 0.2 * sae.W_enc.norm(dim=0).mean() * rows.t()
    sae.b_enc[dead] = 0.0
    sae.tokens_since_fired[dead] = 0
    sae.resampled(dead)
    for parameter, at in zip(parameters, (dead, (slice(None), dead), dead)):
        for moment in ("exp_avg", "exp_avg_sq"):
            optimizer.state[parameter][moment][at] = 0.0


def batch_ids(seed, step, n_windows, size):
    """Windows of one step: slices of a permutation per (seed, epoch). Only here is data ordered."""
    epoch, place = divmod(step, n_windows // size)
    return epoch_order(seed, epoch, n_windows)[place * size:(place + 1) * size]


@functools.lru_cache(maxsize=2)
def epoch_order(seed, epoch, n_windows):
    return np.random.default_rng((seed, epoch)).permutation(n_windows)


@torch.no_grad()
def validation_loss(sae, store):
    """Reconstruction loss on the first held-out windows (at most 64), in evaluation mode."""
    batch = store.batch(store.heldout(64)[0])
    return squared_error(batch, sae.eval().decode(sae.encode(batch))).item()


def seconds_per_step(sae, store, stages, size):
    """Seconds of one step of each stage, measured on a copy."""
    seconds, batch = [], store.batch(np.arange(size))
    for stage in stages:
        trial = copy.deepcopy(sae).train()
        optimizer = make_optimizer(trial, 1e-4)
        train_step(trial, optimizer, batch, stage, 0.0)
        began = time.perf_counter()
        train_step(trial, optimizer, batch, stage, 0.0)
        seconds.append(time.perf_counter() - began)
    return seconds


def fit_to_deadline(steps, step, seconds, deadline):
    """Steps of each stage; where they would overrun, those to come shrink in proportion."""
    left = [int(min(n, max(0, end - step))) for n, end in zip(steps, np.cumsum(steps))]
    need, have = sum(n * s for n, s in zip(left, seconds)), max(deadline - time.time(), 0.0)
    if need <= have:
        return steps
    return [n - l + max(int(l > 0), int(l * have / need * 0.97)) for n, l in zip(steps, left)]


def record(log, sae, step, stage, losses):
    """Appends one row to the log; a loss that is not finite ends the run."""
    values = {name: float(value) for name, value in losses.items()}
    if wrong := [f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)]:
        raise RunnerError(f"non-finite loss at step {step} of stage {stage.name!r}: "
                          f"{', '.join(wrong)}. Look for a log or a division by zero in `losses`, "
                          "or lower LEARNING_RATE.")
    dead = sae.dead_mask().float().mean().item()
    row = {"step": step, "l0": values.pop("l0"), "dead_fraction": dead}
    parameters = sae.parameters_of_interest()
    for table, names in ((log, row), (log["losses"], values), (log["parameters"], parameters)):
        for name, value in names.items():
            table.setdefault(name, []).append(value if name == "step" else float(value))


def plan_steps(stages, n_windows, size):
    """Steps of each stage at `size` windows a step; a stage without any is an error."""
    planned = [round(stage.epochs * (n_windows // size)) for stage in stages]
    for stage, steps in zip(stages, planned):
        if steps < 1:
            raise RunnerError(f"stage {stage.name!r} would get no step: {n_windows} windows make "
                              f"{n_windows // size} batches of {size}, for {stage.epochs} epochs. "
                              "Raise TRAIN_TOKENS or EPOCHS_SCALE, or lower BATCH_TOKENS.")
    return planned


def train(sae, store, stages, seed, size, deadline, state_path):
    """Trains `sae` through its stages -> log, steps planned, steps done (of each stage). From the
    latest checkpoint at `state_path` a killed run carries on, to the same bits."""
    n_windows, step, current = store.windows.n_train, 0, None
    per_epoch, planned = n_windows // size, plan_steps(stages, n_windows, size)
    sae.dead_after.fill_(int(DEAD_AFTER_FRACTION * sum(planned) * size * CONTEXT_LENGTH))
    sae.initialise(store.batch(batch_ids(seed, 0, n_windows, size)))
    seconds, optimizer = seconds_per_step(sae, store, stages, size), make_optimizer(sae, 1e-4)
    steps = fit_to_deadline(planned, 0, seconds, deadline)
    log = {"losses": {}, "parameters": {}, "val_step": [], "val_loss": []}
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        sae.load_state_dict(state["sae"])
        optimizer.load_state_dict(state["optimizer"])
        step, steps, log = state["step"], state["steps"], state["log"]
        for past, n in zip(stages, steps[:int(np.searchsorted(np.cumsum(steps), step, "right"))]):
            anneal(sae, past, (n - 1) / n)
        print(f"seed {seed}: carrying on at step {step}", flush=True)
    minutes = sum(n * s for n, s in zip(steps, seconds)) / 60
    print(f"seed {seed}: about {minutes:.1f} min for {sum(steps):,} steps", flush=True)
    bar = tqdm(total=sum(steps), initial=step, disable=not sys.stderr.isatty())
    saved = said = since = time.time()
    while step < sum(steps):
        index = int(np.searchsorted(np.cumsum(steps), step, side="right"))
        stage, first = stages[index], sum(steps[:index])
        if stage is not current:
            current = stage
            for name, parameter in sae.named_parameters():
                parameter.requires_grad_(name.startswith(stage.trains))
        torch.manual_seed(seed * 1_000_003 + step)      # a function of the step: nothing to resume
        optimizer.param_groups[0]["lr"] = stage.lr * learning_rate(step / sum(steps), sae.d_sae)
        batch = store.batch(batch_ids(seed, step, n_windows, size))
        losses = train_step(sae.train(), optimizer, batch, stage, (step - first) / steps[index])
        step, now = step + 1, time.time()
        if step % LOG_EVERY == 0 or step == sum(steps):
            record(log, sae, step, stage, losses)
            pace = (now - since) / LOG_EVERY / seconds[index]
            seconds, since = [s * pace ** (0.3 if step > LOG_EVERY else 0) for s in seconds], now
            steps = fit_to_deadline(steps, step, seconds, deadline)
        if step % per_epoch == 0 or step == sum(steps):
            log["val_step"].append(step)
            log["val_loss"].append(validation_loss(sae, store))
            if sae.resamples_dead and step < sum(steps) / 2:
                resample_dead(sae.train(), optimizer, batch)
        bar.update()
        if bar.disable and now - said > 15 and "l0" in log:
            latest = {"L0": log["l0"]} | log["losses"]
            figures = [f"{name} {values[-1]:.4g}" for name, values in latest.items()]
            print(f"  {stage.name}: step {step}/{sum(steps)}", *figures, flush=True)
            said = now
        if now - saved > CHECKPOINT_SECONDS or step == sum(steps):
            state = {"sae": sae.state_dict(), "optimizer": optimizer.state_dict(), "step": step,
                     "steps": steps, "log": log}
            with replacing(state_path) as partial:
                torch.save(state, partial)
            saved = now
    if sae.dead_mask().all():
        raise RunnerError(f"all {sae.d_sae} latents are dead after training: it has collapsed.")
    borders = {"stage_starts": np.cumsum([0] + steps[:-1]).tolist()}
    return log | borders | {"stages": [stage.name for stage in stages]}, planned, steps


# ---- Evaluations on held-out documents: Run -> Result. plot.py compares runs ----
class Run(NamedTuple):
    """What an evaluation may look at."""
    sae: SAE
    store: Store
    get_model: Callable     # -> the language model
    layer: int
    live: tuple             # (firings, files) that a latent needs to count as live


class Result(NamedTuple):
    metrics: dict           # name -> float
    curves: dict = {}       # name -> list of floats
    per_sequence: dict = {}     # name -> list of floats, one per sample window


class Codes(NamedTuple):
    """The non-zero latents of all held-out tokens, in the order of tokens; arrays [n]."""
    token: np.ndarray       # held-out window * (CONTEXT_LENGTH - 1) + position - 1
    latent: np.ndarray
    value: np.ndarray


@torch.no_grad()
def encode_heldout(run):
    """Codes, and {name: [window, position]} of |x - x_hat|^2 and the like, NaN at padding."""
    codes, sums, offset = [], {}, 0
    for ids in run.store.heldout(32):
        batch = run.store.batch(ids)
        latents = run.sae.encode(batch)
        x, x_hat, (token, latent, value) = batch.x, run.sae.decode(latents), latents.active()
        codes.append([a.cpu().numpy() for a in (token + offset, latent, value)])
        offset += len(ids) * (CONTEXT_LENGTH - 1)
        l0 = torch.bincount(token, minlength=x.shape[0] * x.shape[1]).view(x.shape[:2])
        rows = {"error": (x - x_hat).square().sum(-1), "norm": x.square().sum(-1), "l0": l0,
                "norm_hat": x_hat.square().sum(-1), "dot": (x * x_hat).sum(-1)}
        padding = ~run.store.valid(ids)[:, 1:].to(DEVICE)
        for name, values in rows.items():
            values = values.double().masked_fill(padding, torch.nan)
            sums.setdefault(name, []).append(values.cpu().numpy())
    return Codes(*map(np.concatenate, zip(*codes))), {k: np.concatenate(v) for k, v in sums.items()}


def variance_by_position(store):
    """Mean squared distance of held-out x from its overall mean: by position [seq], and overall."""
    sums, squares, n = store.moments(store.heldout(64))
    mean = sums.sum(0) / n.sum()
    total = squares - 2 * (sums @ mean) + n * mean.square().sum()
    return (total / n.clamp_min(1)).tolist(), (total.sum() / n.sum()).item()


def sample_windows(store):
    """The first held-out window of each held-out file: the per-sequence sample."""
    heldout = np.concatenate(store.heldout(64))
    return heldout[np.unique(store.windows.doc_ids[heldout], return_index=True)[1]]


@torch.no_grad()
def next_token_losses(run, splice):
    """Cross-entropy after each position >= 1, and KL from the model's own prediction to the spliced
    one: [sample, CONTEXT_LENGTH - 2], NaN at padding. splice(batch) gives the residual stream
    [batch, seq, d_in] in the model's own scale; BOS is left alone."""
    losses, divergences, model, sample = [], [], run.get_model(), sample_windows(run.store)
    for ids in np.array_split(sample, len(sample) // 16 + 1):
        hidden, tokens = run.store.raw(ids), run.store.tokens_of(ids)
        own = logits_from(model, run.layer, hidden, tokens)[:, 1:-1].log_softmax(-1)
        hidden = torch.cat([hidden[:, :1], splice(run.store.batch(ids))], 1)
        spliced = logits_from(model, run.layer, hidden, tokens)[:, 1:-1].log_softmax(-1)
        padding = ~run.store.valid(ids)[:, 2:].to(DEVICE)
        loss = -spliced.gather(2, tokens[:, 2:, None])[..., 0]
        kl = (own.exp() * (own - spliced)).sum(-1)
        for parts, values in ((losses, loss), (divergences, kl)):
            parts.append(values.double().masked_fill(padding, torch.nan).cpu().numpy())
    return np.concatenate(losses), np.concatenate(divergences)


def unigram_losses(store, vocabulary):
    """Cross-entropy as above under the training tokens' frequencies, one added to each count."""
    train, sample = np.arange(store.windows.n_train), sample_windows(store)
    tokens = store.windows.tokens[train][store.valid(train).numpy()]
    counts = np.bincount(tokens, minlength=vocabulary) + 1.0
    losses = -np.log(counts / counts.sum())[store.windows.tokens[sample][:, 2:]]
    return np.where(store.valid(sample)[:, 2:].numpy(), losses, np.nan)


@torch.no_grad()
def bigram_explained_variance(store, variance):
    """Explained variance of a lookup by (previous token, token), fitted on the first 2^18 training
    tokens: a pair's mean, shrunk by one pseudo-count to its token's, and that to the overall, 0."""
    vocabulary = int(store.tokens.max()) + 1

    def rows(ids):          # pair key, token and activation of each valid token
        before, after = store.tokens_of(ids)[:, :-1], store.tokens_of(ids)[:, 1:]
        keep = store.valid(ids)[:, 1:].to(DEVICE)
        return (before * vocabulary + after)[keep], after[keep], store.batch(ids).x[keep]

    train = np.arange(min(store.windows.n_train, 2 ** 18 // CONTEXT_LENGTH))
    pairs, tokens, x = rows(train)
    known, index, pair_counts = pairs.unique(return_inverse=True, return_counts=True)
    token_counts = torch.bincount(tokens, minlength=vocabulary)[:, None]
    of_token = x.new_zeros(vocabulary, store.d_in).index_add_(0, tokens, x) / (token_counts + 1)
    of_pair = of_token[known % vocabulary].index_add_(0, index, x) / (pair_counts[:, None] + 1)
    error, count = 0.0, 0
    for ids in store.heldout(64):
        pairs, tokens, x = rows(ids)
        at = torch.searchsorted(known, pairs).clamp_max(len(known) - 1)
        guess = torch.where((known[at] == pairs)[:, None], of_pair[at], of_token[tokens])
        error, count = error + (x - guess).square().sum().item(), count + len(x)
    return 1 - error / count / variance


def controls(run):
    """What does not depend on the SAE, cached beside the activations: the model's own loss, losses
    under ablations and unigrams, the bigram bar, an untrained TopK."""
    functions = (controls, next_token_losses, unigram_losses, bigram_explained_variance, TopK)
    key = fingerprint(*map(inspect.getsource, functions), TARGET_L0, run.sae.d_sae)
    path = run.store.folder / f"controls-{key}.json"
    if path.exists():
        return json.loads(path.read_text())
    print("computing the model's own loss and the controls", flush=True)
    store = run.store
    by_position, variance = variance_by_position(store)
    torch.manual_seed(0)
    untrained = TopK(store.d_in, run.sae.d_sae, TARGET_L0).to(DEVICE).eval()
    own = next_token_losses(run, lambda batch: store.unscaled(batch.x))[0]
    found = {
        "variance": variance, "variance_by_position": by_position,
        "ce": own, "ce_by_sequence": np.nanmean(own, 1).tolist(),
        "ce_by_position": np.nanmean(own, 0).tolist(),
        "ce_zero": next_token_losses(run, lambda batch: torch.zeros_like(batch.x))[0],
        "ce_mean": next_token_losses(run, lambda batch: store.mean.expand_as(batch.x))[0],
        "ce_unigram": unigram_losses(store, len(run.get_model().get_output_embeddings().weight)),
        "bigram_explained_variance": bigram_explained_variance(store, variance),
        "untrained_explained_variance": explained_variance(run._replace(sae=untrained), variance)}
    for name in ("ce", "ce_zero", "ce_mean", "ce_unigram"):
        found[name] = float(np.nanmean(found[name]))
    with replacing(path) as partial:
        partial.write_text(json.dumps(found))
    return found


def explained_variance(run, variance):
    """1 - E|x - x_hat|^2 / sum_d Var(x_d) on held-out tokens: a mean predictor scores 0."""
    return 1 - float(np.nanmean(encode_heldout(run)[1]["error"])) / variance


def live_latents(codes, run):
    """[d_sae] whether a latent fired often enough, in enough files, on at most half the tokens; and
    [d_sae] firing rates."""
    heldout = np.concatenate(run.store.heldout(64))
    file = run.store.windows.doc_ids[heldout][codes.token // (CONTEXT_LENGTH - 1)].astype(np.int64)
    n_files, d_sae = file.max(initial=0) + 1, run.sae.d_sae
    firings = np.bincount(codes.latent, minlength=d_sae)
    files = np.bincount(np.unique(codes.latent * n_files + file) // n_files, minlength=d_sae)
    rate = firings / run.store.valid(heldout).sum().item()
    return (firings >= run.live[0]) & (files >= run.live[1]) & (rate <= 0.5), rate


def single_token_fraction(codes, run, live):
    """Share of live latents of which 90 % of the top 40 firings are one token."""
    order = np.lexsort((-codes.value, codes.latent))
    latent = codes.latent[order]
    keep = (np.arange(len(latent)) - np.searchsorted(latent, latent) < 40) & live[latent]
    tokens = run.store.windows.tokens[np.concatenate(run.store.heldout(64))][:, 1:].flatten()
    pairs = np.stack([latent[keep], tokens[codes.token[order][keep]]])
    (of, _), counts = np.unique(pairs, axis=1, return_counts=True)
    most = np.zeros(len(live))
    np.maximum.at(most, of, counts)
    return float((most >= 0.9 * np.bincount(latent[keep], minlength=len(live)))[live].mean())


def eval_core(run):
    """Reconstruction, sparsity and next-token loss, beside controls (README: result keys)."""
    base, sae, store = controls(run), run.sae, run.store
    began = time.perf_counter()
    codes, rows = encode_heldout(run)
    seconds = time.perf_counter() - began
    live, rate = live_latents(codes, run)
    mean = {name: float(np.nanmean(values)) for name, values in rows.items()}
    if not live.any():
        raise RunnerError(f"no latent of {sae.d_sae} is live (fired {run.live[0]} times in "
                          f"{run.live[1]} held-out files): collapsed, L0 = {mean['l0']:.2f}.")
    losses, kl = next_token_losses(run, lambda batch: store.unscaled(sae.decode(sae.encode(batch))))
    permuted = copy.deepcopy(sae)
    permuted.W_dec.data = sae.W_dec.data.roll(sae.d_sae // 2, 0)
    ce, ce_sae = base["ce"], float(np.nanmean(losses))
    metrics = {
        "explained_variance": 1 - mean["error"] / base["variance"], "l0": mean["l0"],
        "dead_fraction": float((rate == 0).mean()), "live_fraction": float(live.mean()),
        "dense_fraction": float((rate > 0.1).mean()), "ce_model": ce, "ce_sae": ce_sae,
        "loss_increase_nats": ce_sae - ce, "kl": float(np.nanmean(kl)),
        "ce_recovered": (base["ce_unigram"] - ce_sae) / (base["ce_unigram"] - ce),
        "ce_recovered_vs_mean": (base["ce_mean"] - ce_sae) / (base["ce_mean"] - ce),
        "ce_recovered_vs_zero": (base["ce_zero"] - ce_sae) / (base["ce_zero"] - ce),
        "cosine": float(np.nanmean(rows["dot"] / np.sqrt(rows["norm"] * rows["norm_hat"] + 1e-12))),
        "l2_ratio": float(np.nanmean(np.sqrt(rows["norm_hat"] / rows["norm"]))),
        "relative_reconstruction_bias": mean["norm_hat"] / mean["dot"],
        "single_token_fraction": single_token_fraction(codes, run, live),
        "permuted_decoder_explained_variance":
            explained_variance(run._replace(sae=permuted), base["variance"]),
        "avg_inference_tokens_per_second": rows["error"].size / seconds}
    metrics |= {name: base[name] for name in ("bigram_explained_variance", "ce_unigram", "ce_mean",
                                              "untrained_explained_variance", "ce_zero")}
    first = sample_windows(store) - store.windows.n_train
    by_position = 1 - np.nanmean(rows["error"], 0) / np.array(base["variance_by_position"])
    curves = {"explained_variance_by_position": by_position, "firing_rates": np.sort(rate)[::-1],
              "loss_increase_by_position": np.nanmean(losses, 0) - np.array(base["ce_by_position"])}
    per_sequence = {"fvu": np.nanmean(rows["error"][first], 1) / base["variance"],
                    "l0": np.nanmean(rows["l0"][first], 1),
                    "loss_increase_nats": np.nanmean(losses, 1) - np.array(base["ce_by_sequence"])}
    return Result(metrics, lists(curves), lists(per_sequence))


def lists(arrays):          # NaN, where there was no token, becomes None
    return {name: [v if math.isfinite(v) else None for v in values.tolist()]
            for name, values in arrays.items()}


EVALUATIONS = {"core": eval_core}
# The means that go into every agent's prompt: at most 16 over all evaluations
HEADLINES = {"core": ("final_train_loss", "best_val_loss", "total_train_time",
                      "avg_inference_tokens_per_second", "explained_variance", "l0",
                      "dead_fraction", "loss_increase_nats", "ce_recovered")}


# ---- Results ----
def finite(name, value):
    """A plain float; tensors and numpy scalars are welcome, what is not finite is not."""
    value = float(value)
    if not math.isfinite(value):
        raise RunnerError(f"metric {name!r} is {value}: what is not finite is no result.")
    return value


def evaluate(run, log, train_seconds):
    """{evaluation: Result as a dict} of one seed, the templates' training figures first."""
    run.sae.eval()
    results = {name: EVALUATIONS[name](run) for name in EVALS}
    figures = {"final_train_loss": np.mean(log["losses"]["reconstruction"][-5:]),
               "best_val_loss": min(log["val_loss"]), "total_train_time": train_seconds}
    first = results[EVALS[0]]
    results[EVALS[0]] = first._replace(metrics=figures | first.metrics,
                                       curves=first.curves | {"training": log})
    for name, result in results.items():
        metrics = {key: finite(key, value) for key, value in result.metrics.items()}
        results[name] = result._replace(metrics=metrics)._asdict()
    return results


def summarise(per_seed, config):
    """final_info.json: an entry per evaluation; standard errors are std(ddof=1) / sqrt(seeds)."""
    info = {}
    for name in EVALS:
        results = [seed[name] for seed in per_seed]
        values = {key: [r["metrics"][key] for r in results] for key in results[0]["metrics"]}
        shown = [key for key in HEADLINES[name] if key in values]
        means = {key: float(np.mean(v)) for key, v in values.items()}
        info[name] = {"means": {f"{key}_mean": means[key] for key in shown}, "metrics": means,
                      "final_info_dict": {key: values[key] for key in shown}}
        if len(results) > 1:
            errors = {k: float(np.std(v, ddof=1) / math.sqrt(len(v))) for k, v in values.items()}
            info[name]["stderrs"] = {f"{key}_stderr": errors[key] for key in shown}
            info[name]["metric_stderrs"] = errors
        for part in ("curves", "per_sequence"):
            info[name][part] = [result[part] for result in results]
    info[EVALS[0]]["config"] = config
    return info


def export(sae, store, layer, folder):
    """sae_weights.safetensors and cfg.json as SAELens lays them out, with the inputs' centring and
    scaling folded in."""
    folder.mkdir(parents=True, exist_ok=True)
    architecture, added, dropped = sae.saelens_layout()
    weights = dict(sae.named_parameters()) | added | {
        "W_enc": sae.W_enc / store.scale, "W_dec": sae.W_dec * store.scale,
        "b_dec": sae.b_dec * store.scale + store.mean}
    save_file({name: value.detach().float().cpu().contiguous() for name, value in weights.items()
               if name not in dropped}, folder / "sae_weights.safetensors")
    cfg = {"architecture": architecture, "d_in": sae.d_in, "d_sae": sae.d_sae, "dtype": "float32",
           "device": "cpu", "apply_b_dec_to_input": True, "normalize_activations": "none",
           "reshape_activations": "none",
           "metadata": {"sae_variant": SAE_VARIANT, "model_name": MODEL_NAME, "hook_layer": layer,
                        "hook_name": f"blocks.{layer}.hook_resid_post", "dataset_path": DATASET,
                        "context_size": CONTEXT_LENGTH, "prepend_bos": True}}
    if architecture == "topk":
        cfg |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    (folder / "cfg.json").write_text(json.dumps(cfg, indent=1))


def write_results(folder, per_seed, config, timing):
    info = summarise(per_seed, config)
    np.save(folder / "all_results.npy", {f"seed_{s}": r for s, r in zip(SEEDS, per_seed)})
    (folder / "experiment.py").write_text(SOURCE)
    (folder / "timing.json").write_text(json.dumps(timing, indent=1))
    with replacing(folder / "final_info.json") as path:
        path.write_text(json.dumps(info, allow_nan=False))
    return info


@contextmanager
def publishing(out_dir):
    """A folder that takes out_dir's place only when all went well; files of an earlier run that
    this one does not write (ratings) are kept."""
    if out_dir == HERE or out_dir in HERE.parents or out_dir.exists() and not out_dir.is_dir():
        raise RunnerError(f"--out_dir={out_dir} must be a folder for the results alone.")
    partial, old = (out_dir.with_name(out_dir.name + end) for end in (".partial", ".replaced"))
    if old.exists() and not out_dir.exists():        # killed between the two renames below
        os.replace(old, out_dir)
    for rest in (partial, old):
        shutil.rmtree(rest, ignore_errors=True)
    make_folder(partial, "choose another --out_dir")
    try:
        yield partial
        for kept in out_dir.iterdir() if out_dir.exists() else ():
            if not (partial / kept.name).exists():
                (shutil.copytree if kept.is_dir() else shutil.copy2)(kept, partial / kept.name)
        if out_dir.exists():
            os.replace(out_dir, old)
        os.replace(partial, out_dir)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# ---- Checks at the door ----
def check_config():
    """Every constant: what is wrong with it, and what would be right."""
    def whole(value, least=1):
        return type(value) is int and value >= least

    def positive(value):
        return type(value) in (int, float) and 0 < value < math.inf

    def subset(value, names):
        return (isinstance(value, tuple)
                and all(v in list(names) and value.count(v) == 1 for v in value))

    known = SAE_VARIANT in list(SAE_VARIANTS)
    variant = SAE_VARIANTS[SAE_VARIANT] if known else SAE
    losses = {name for stage in variant.curriculum for name in stage.weights} - {"reconstruction"}
    parts, names = sorted(losses | set(variant.components)), ", ".join
    for name, valid, wanted in (
            ("SAE_VARIANT", known, f"one of {names(SAE_VARIANTS)}"),
            ("ABLATE", subset(ABLATE, parts), f"a tuple of names out of {parts} for {SAE_VARIANT}"),
            ("MODEL_NAME", MODEL_NAME and isinstance(MODEL_NAME, str), "a hub id or a folder"),
            ("LAYER", LAYER is None or whole(LAYER, 0), "None (the middle) or a whole number"),
            ("DATASET", DATASET and isinstance(DATASET, str), "'embedded', a path or a hub name"),
            ("TRAIN_TOKENS", whole(TRAIN_TOKENS), "a whole number of tokens"),
            ("CONTEXT_LENGTH", whole(CONTEXT_LENGTH, 8), "a whole number from 8"),
            ("EVAL_FILES", whole(EVAL_FILES, 2), "a whole number from 2"),
            ("EXPANSION", positive(EXPANSION), "a number above 0"),
            ("TARGET_L0", whole(TARGET_L0), "a whole number from 1"),
            ("SEEDS", SEEDS and subset(SEEDS, SEEDS) and all(whole(seed, 0) for seed in SEEDS),
             "a tuple of different whole numbers, e.g. (0, 1, 2)"),
            ("TIME_BUDGET_MINUTES", positive(TIME_BUDGET_MINUTES), "minutes, above 0"),
            ("EVALS", EVALS and subset(EVALS, EVALUATIONS), f"a tuple out of {names(EVALUATIONS)}"),
            ("EPOCHS_SCALE", positive(EPOCHS_SCALE), "a number above 0"),
            ("BATCH_TOKENS", whole(CONTEXT_LENGTH) and whole(BATCH_TOKENS, CONTEXT_LENGTH),
             "at least CONTEXT_LENGTH, whole"),
            ("LEARNING_RATE", LEARNING_RATE is None or positive(LEARNING_RATE), "None or above 0")):
        if not valid:
            raise RunnerError(f"{name} = {globals()[name]!r} is not valid: it must be {wanted}.")


def expect_shape(name, tensor, wanted):
    """Raises where a tensor's shape is not `wanted`; None stands for any size."""
    got = tuple(tensor.shape)
    if len(got) != len(wanted) or any(w not in (None, g) for w, g in zip(wanted, got)):
        form = "a scalar" if not wanted else f"{tuple(w or 'any' for w in wanted)}"
        raise RunnerError(f"{name} has shape {got}, wanted {form}.")


def check_variant(sae, store, stages):
    """On a tiny batch: every weighed loss exists, every parameter learns, rows do not see each
    other, padding is silent."""
    batch, reached = store.batch(np.arange(store.windows.n_train)), set()
    for stage in stages:
        losses = sae.train().losses(batch, sae.encode(batch))
        if missing := sorted(set(stage.weights) - set(losses)):
            raise RunnerError(f"stage {stage.name!r} weighs {missing}, but `losses` of "
                              f"{SAE_VARIANT} has {sorted(losses)}.")
        for name in stage.weights:
            expect_shape(f"the loss {name!r}", losses[name], ())
        if (total := sum(losses[name] for name in stage.weights)).requires_grad:
            total.backward()
        reached |= {name for name, parameter in sae.named_parameters()
                    if parameter.grad is not None and name.startswith(stage.trains)}
        sae.zero_grad(set_to_none=True)
    if dark := sorted({name for name, _ in sae.named_parameters()} - reached):
        raise RunnerError(f"no stage's loss reaches {dark}: detached, unused, or not named by any "
                          "stage's `trains`.")
    with torch.no_grad():
        z = sae.eval().encode(batch).dense()
        expect_shape("encode(batch).dense()", z, (*batch.x.shape[:2], sae.d_sae))
        turned = Batch(*(part if part is batch.positions else part.flip(0) for part in batch))
        if not torch.allclose(sae.encode(turned).dense().flip(0), z, atol=1e-4):
            raise RunnerError(f"latents of {SAE_VARIANT} change when the rows of a batch change "
                              "places: rows are different documents, not to see each other.")
        if z[~batch.mask].any():
            raise RunnerError(f"{SAE_VARIANT} has latents that fire on padding.")


def preflight(config, cache):
    """The variant through every stage, evaluation and the writing of results, on a stand-in."""
    folder = cache / f"preflight.{os.getpid()}"
    try:
        model, d_in = stand_in(config), config.hidden_size
        tokens = np.random.default_rng(0).integers(1, 256, (8, CONTEXT_LENGTH)).astype(np.int32)
        lengths = np.full(8, CONTEXT_LENGTH)
        lengths[3] //= 2        # one is padded
        windows = corpus.Windows(tokens, lengths, np.arange(8) // 2, 4, list("abcd"), list("abcd"))
        store = Store(folder / "activations", windows, d_in, torch.float32)
        store.collect(lambda: model, 0)
        sae = make_sae(d_in, min(round(EXPANSION * d_in), max(1024, 4 * TARGET_L0)), 0)
        stages = [stage._replace(epochs=1) for stage in planned_stages(type(sae))]
        check_variant(copy.deepcopy(sae), store, stages)
        log, _, _ = train(sae, store, stages, 0, 2, time.time() + 60, folder / "checkpoint.pt")
        result = evaluate(Run(sae, store, lambda: model, 0, (1, 1)), log, 1.0)
        export(sae, store, 0, folder / "results")
        write_results(folder / "results", [result] * len(SEEDS), {}, {})
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ---- main: config -> preflight -> tokens -> activations -> train -> evaluate -> write ----
@contextmanager
def doing(what):
    """Names the part of the run that an error comes from."""
    try:
        yield
    except Exception as error:
        error.add_note(what)
        raise


def make_sae(d_in, d_sae, seed):
    if TARGET_L0 > d_sae:
        raise RunnerError(f"TARGET_L0 = {TARGET_L0} is more than the {d_sae} latents that "
                          f"EXPANSION = {EXPANSION} gives.")
    torch.manual_seed(seed)
    return SAE_VARIANTS[SAE_VARIANT](d_in, d_sae, TARGET_L0).to(DEVICE)


def run_seed(seed, store, layer, get_model, state, deadline, timing):
    """Trains and evaluates one SAE -> (sae, results, steps planned, steps done of each stage).

    `state` keeps what is finished."""
    began, kept = time.time(), state / f"seed_{seed}.json"
    with doing(f"training, seed {seed}"):
        sae = make_sae(store.d_in, round(EXPANSION * store.d_in), seed)
        stages, size = planned_stages(type(sae)), BATCH_TOKENS // CONTEXT_LENGTH
        log, *steps = train(sae, store, stages, seed, size, deadline, state / f"seed_{seed}.pt")
    trained = time.time()
    with doing(f"evaluation, seed {seed}"):
        if not kept.exists():
            result = evaluate(Run(sae, store, get_model, layer, LIVE), log, trained - began)
            with replacing(kept) as partial:
                partial.write_text(json.dumps(result))
    timing[f"train_seconds, seed {seed}"] = trained - began
    timing[f"evaluation_seconds, seed {seed}"] = time.time() - trained
    return sae, json.loads(kept.read_text()), *steps


def resolved_config(store, layer, seeds):
    """Every constant of this file and what they came to."""
    plain = (str, int, float, tuple, type(None))
    constants = {name: value for name, value in globals().items()
                 if name.isupper() and isinstance(value, plain) and name != "SOURCE"}
    sae, _, planned, done = seeds[0]
    return constants | {
        "layer": layer, "d_in": store.d_in, "d_sae": sae.d_sae, "steps_planned": planned,
        "steps_done": done, "evaluation_files": len(sample_windows(store)),
        "budget_hit": any(planned != done for _, _, planned, done in seeds),
        "data_hash": fingerprint(zlib.crc32(store.windows.tokens.tobytes())),
        "torch": torch.__version__, "transformers": transformers.__version__}


def open_store(config, layer, cache):
    """Tokens and activations of this configuration, collected where they are not cached."""
    with doing("reading the data"):
        tokenizer = load_pretrained(transformers.AutoTokenizer, "tokenizer")
        if not tokenizer("text", add_special_tokens=False)["input_ids"]:
            raise RunnerError(f"MODEL_NAME = {MODEL_NAME!r} has no tokenizer (tokenizer.json).")
        marks = (tokenizer.bos_token_id, tokenizer.eos_token_id, 0)
        windows, key = load_windows(tokenizer, next(m for m in marks if m is not None), cache)
    with doing("collecting activations"):
        name = fingerprint(key, model_identity(config), layer, MODEL_DTYPE)
        store = Store(cache / "activations" / name, windows, config.hidden_size, MODEL_DTYPE)
        get_model = functools.cache(load_model)
        store.collect(get_model, layer)
    return store, get_model


def main():
    parser = argparse.ArgumentParser(description="everything else is a constant in experiment.py")
    parser.add_argument("--out_dir", default="run_0", help="folder for the results")
    out_dir = Path(parser.parse_args().out_dir).resolve()
    began, cache, timing = time.time(), cache_folder(), {}
    with doing("checking the settings"):
        check_config()
        make_folder(cache, "set SAE_CACHE_DIR to another folder")
        config = load_pretrained(transformers.AutoConfig, "config.json").get_text_config()
        layer = config.num_hidden_layers // 2 - 1 if LAYER is None else LAYER
        if not 0 <= layer < config.num_hidden_layers:
            raise RunnerError(f"LAYER = {LAYER} is out of range: {MODEL_NAME} has "
                              f"{config.num_hidden_layers} blocks, from 0.")
        longest = getattr(config, "max_position_embeddings", None) or CONTEXT_LENGTH
        if CONTEXT_LENGTH > longest:
            raise RunnerError(f"CONTEXT_LENGTH = {CONTEXT_LENGTH} is more than the {longest} "
                              f"positions of {MODEL_NAME}.")
    with publishing(out_dir) as partial:
        with doing("preflight"):
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
                preflight(config, cache)
        print(f"preflight passed after {time.time() - began:.1f} s", flush=True)
        store, get_model = open_store(config, layer, cache)
        timing["seconds_before_training"] = time.time() - began
        state = cache / "runs" / fingerprint(str(out_dir))
        with locked(state.with_suffix(".lock")):
            code = state / fingerprint(SOURCE, store.folder.name)
            if state.exists() and not code.exists():
                print("settings or code differ from the unfinished run's: starting afresh")
                shutil.rmtree(state)
            code.mkdir(parents=True, exist_ok=True)
            end, seeds = began + 60 * TIME_BUDGET_MINUTES * (1 - EVALUATION_RESERVE), []
            for i, seed in enumerate(SEEDS):
                deadline = time.time() + (end - time.time()) / (len(SEEDS) - i)
                seeds.append(run_seed(seed, store, layer, get_model, code, deadline, timing))
            with doing("writing the results"):
                for seed, (sae, *_) in zip(SEEDS, seeds):
                    folder = partial if seed == SEEDS[0] else partial / f"seed_{seed}"
                    export(sae, store, layer, folder)
                timing["total_seconds"] = time.time() - began
                results = [result for _, result, *_ in seeds]
                info = write_results(partial, results, resolved_config(store, layer, seeds), timing)
        shutil.rmtree(state)
    means = [item for entry in info.values() for item in entry["means"].items()]
    print(f"{out_dir.name}: {SAE_VARIANT} in {time.time() - began:.0f} s. ",
          *(f"{name.removesuffix('_mean')} {value:.4g}" for name, value in means), flush=True)


def describe(error):
    """At most 1,400 characters: stage, variant, lines of experiment.py, tensors, the cause."""
    stages, source = ", ".join(getattr(error, "__notes__", ["start"])), SOURCE.splitlines()
    known = isinstance(error, (RunnerError, corpus.DataError))
    frames = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__)
              if frame.f_code.co_filename == __file__
              and (not known or isinstance(frame.f_locals.get("self"), SAE))]
    variant = SAE_VARIANTS.get(SAE_VARIANT) if isinstance(SAE_VARIANT, str) else None
    at = f" (line {inspect.getsourcelines(variant)[1]})" if variant else ""
    report = [f"experiment.py failed in: {stages}; SAE_VARIANT = {SAE_VARIANT!r}{at}"]
    report += [f"  line {line} in {frame.f_code.co_name}: {source[line - 1].strip()[:110]}"
               for frame, line in frames[-4:]]
    if known:
        return "\n".join(report) + f"\n{str(error)[:900]}"
    tensors = [f"{name} {tuple(value.shape)} {value.dtype}"
               for name, value in (frames[-1][0].f_locals if frames else {}).items()
               if isinstance(value, (torch.Tensor, np.ndarray))]
    report += [f"  there: {', '.join(tensors)[:350]}"] * bool(tensors)
    report.append(f"{type(error).__name__}: {' '.join(str(error).split())[:400]}")
    if "out of memory" in str(error).lower() or "can't allocate memory" in str(error):
        report.append("Try: lower BATCH_TOKENS, EXPANSION or CONTEXT_LENGTH.")
    if getattr(error, "errno", None) == errno.ENOSPC:
        report.append("Try: free disk space, or set SAE_CACHE_DIR to a larger disk.")
    return "\n".join(report)


def keep_freed_memory():
    """glibc returns large buffers at each free and faults them in again: that costs a third."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 1 << 30)                        # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)                  # M_TRIM_THRESHOLD


if __name__ == "__main__":
    keep_freed_memory()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command carries on")
    except Exception as error:
        print(describe(error), file=sys.stderr, flush=True)
        sys.exit(2 if isinstance(error, (RunnerError, corpus.DataError)) else 1)
