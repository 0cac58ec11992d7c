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
import importlib.util
import inspect
import io
import json
import math
import os
import tempfile
import time
import zlib
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Callable, NamedTuple

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("GOMP_SPINCOUNT", "0")  # spinning threads cost 4x on a busy machine
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array, vstack
from scipy.spatial.distance import cdist
from scipy.stats import binomtest, false_discovery_control, linregress, norm, rankdata, spearmanr
from sklearn.decomposition import MiniBatchNMF, PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, roc_auc_score, roc_curve
from sklearn.preprocessing import MaxAbsScaler, normalize
from torch import nn

import data.synthetic
from data.code_labels import LABELS
from data.documents import data_identity
from data.synthetic import COMPOSED, DIMENSIONS, make_synthetic, PRIMITIVES, TASKS
from data.tasks import Clozes, encoded_questions, make_clozes, nearest_domains, probing_windows
from data.windows import load_windows, stand_in_windows, Wanted
from pages.case_studies import family_tree
from pages.latents_page import children_of, compositions_of, latents_page
from runtime.errors import run_stage, RunnerError
from runtime.files import (
    atomic_run_folder, cache_folder, cached_json, fingerprint, folder_identity, make_folder,
    replacing, resumable_state)
from runtime.hub import go_offline, hub_reachable
from runtime.preflight import preflight_sandbox, setting_rules, WATCHDOG
from runtime.process import allow_tf32, prefetched, readable_bytes, run_script
from runtime.progress import fit_to_deadline, Progress, steps_left
from runtime.ranks import RANKS
from runtime.results import finite_number, jsonable, write_result_files
from runtime.shards import missing_shards, open_shards, shard_table, write_shard
from runtime.sparse_ops import (
    firings, largest, Latents, MASKED_PRE_ACT, PairDecode, PairEncode, Pairs, top_k_pairs)

torch.set_flush_denormal(True)  # decaying traces become denormal, which is slow
HERE = Path(__file__).resolve().parent
SOURCE = Path(__file__).read_text()

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
PROBING = ("embedded",)  # data sets, e.g. (*PROBING_DATASETS,)
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
            pre_acts = pre_acts.masked_fill(~batch.mask.flatten()[pairs.rows], MASKED_PRE_ACT)
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
            pre_acts.masked_fill_(~batch.mask.reshape(-1, 1), MASKED_PRE_ACT)
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
        return (scores + MASKED_PRE_ACT * (1 - inside)).softmax(-1), inputs

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
        one_by_one, silent = Pairs.from_ids(ids.view(-1, 1)), (MASKED_PRE_ACT * (f <= 0))[:, None]
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
        return compositions_of(latents, self.E @ self.W_c, fires, *self.features(batch),
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
    logits = (now @ then.t()).masked_fill(same, MASKED_PRE_ACT)
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
            pre_acts = pre_acts.masked_fill(~batch.mask[..., None], MASKED_PRE_ACT)
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
            parent = ward_groups(self.lower.W_dec.cpu().numpy(), self.d_sae)
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
        return children_of(latents, self.W_dec, load_tokenizer(), batch.tokens,
                               self.levels(batch).dense())


SAE_VARIANTS = {"standard": SAE, "topk": TopK, "batch_topk": BatchTopK, "jumprelu": JumpReLU,
                "gated": Gated, "matryoshka": Matryoshka, "temporal": Temporal, "tsae": TSAE,
                "temporal_adaptation": TemporalAdaptation, "temporal_context": TemporalContext,
                "compositional": Compositional, "hierarchical": Hierarchical}


# ---- Model ----
@functools.cache
def load_tokenizer():
    return load_pretrained(MODEL_NAME, "tokenizer")


def load_model():
    return load_causal_model(MODEL_NAME, MODEL_DTYPE, DEVICE)


def stand_in(config):
    """A random model of the same family and hidden size: two layers, 256 tokens."""
    config, tokens = small_config(config), torch.arange(1, 9, device=DEVICE).repeat(2, 1)
    tokens[1, -1] = 0  # a later token must not change earlier activations
    model = None
    with suppress(ValueError):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.to(DEVICE).eval()
    if not model or not torch.allclose(*residual_after(model, 0, tokens)[:, :-1], atol=1e-5):
        raise RunnerError(f"MODEL_NAME = {MODEL_NAME!r} ({config.model_type}) is no causal model. "
                          "Take a decoder: Pythia, GPT-2, Llama, Gemma, Qwen, OPT, Mistral.")
    return model


LOADERS = {"config.json": "AutoConfig", "tokenizer": "AutoTokenizer", "weights": "AutoModelForCausalLM"}


def model_folder(name):
    """The folder that a model's name means, from here or from the template's; None where it is a hub id."""
    places = Path(name).expanduser(), Path(__file__).parent.parent / name
    return next((path.resolve() for path in places if path.is_dir()), None)


def model_identity(name, config):
    """What activations depend on: a local model's files, or a hub commit."""
    folder = model_folder(name)
    return folder_identity(folder) if folder else (name, config._commit_hash)


def small_config(config):
    """A copy with two layers and 256 tokens."""
    config = type(config).from_dict(config.to_dict())
    text = config.get_text_config()
    text.num_hidden_layers, text.vocab_size = 2, 256
    text.bos_token_id = text.eos_token_id = text.pad_token_id = 0
    if types := getattr(text, "layer_types", None):
        text.layer_types = types[:2]
    return config


def load_pretrained(name, what, **kwargs):
    """One of LOADERS of a local folder or a hub id; one error for all that can go wrong."""
    import transformers
    folder = model_folder(name)
    if folder is None and not hub_reachable():
        go_offline()
    try:
        return getattr(transformers, LOADERS[what]).from_pretrained(str(folder or name), **kwargs)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        cause = str(error).split("\n")[0].split("http")[0][:300]
        if "gated" in str(error).lower():
            cause = "gated: accept its licence on the hub and log in with `hf auth login`"
        raise RunnerError(f"MODEL_NAME = {name!r}: no {what} ({cause}). Names that work: 'embedded/model', "
                        "'EleutherAI/pythia-70m-deduped', a folder.") from None


def find_blocks(model):
    """The largest ModuleList as long as the configuration says."""
    depth = model.config.get_text_config().num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == depth]
    if not lists:
        raise RunnerError(f"MODEL_NAME = {model.name_or_path!r} has no list of {depth} blocks.")
    return max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))


def model_bytes(config, dtype):
    import transformers
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in model.parameters()) * dtype.itemsize


def load_causal_model(name, dtype, device):
    """The model on the device; where a GPU has no room for it, over all GPUs and the memory, as accelerate places it."""
    options, free = {}, torch.cuda.mem_get_info()[0] if device == "cuda" else math.inf
    if free < math.inf and (need := model_bytes(load_pretrained(name, "config.json"), dtype)) > 0.8 * free:
        if not importlib.util.find_spec("accelerate"):
            raise RunnerError(f"MODEL_NAME = {name!r} takes {readable_bytes(need)}, and the GPU has {readable_bytes(free)} free. Take a smaller model, "
                            "or `pip install accelerate`, which spreads it over GPUs and memory.")
        options = {"device_map": "auto"}
    model = load_pretrained(name, "weights", dtype=dtype, **options)
    return (model if options else model.to(device)).eval().requires_grad_(False)


def reinitialised_model(model):
    """A model like this one, with random weights."""
    import transformers
    torch.manual_seed(0)
    with torch.device(model.device):
        other = transformers.AutoModelForCausalLM.from_config(model.config, dtype=model.dtype)
    return other.eval().requires_grad_(False)


def load_config(name, layer, context_length):
    """A model's configuration, and the layer, None for the middle one; a layer or a context that it lacks is an error."""
    config = load_pretrained(name, "config.json").get_text_config()
    depth, longest = config.num_hidden_layers, getattr(config, "max_position_embeddings", None) or context_length
    layer = depth // 2 - 1 if layer is None else layer
    if not 0 <= layer < depth:
        raise RunnerError(f"LAYER = {layer}: the model has {depth} blocks.")
    if context_length > longest:
        raise RunnerError(f"CONTEXT_LENGTH = {context_length}: the model takes {longest}.")
    return config, layer


def memory_plan(config, store, expansion, batch_tokens, device):
    """What will take memory, in one line; where a GPU has too little, what to lower and to what."""
    d_in, d_sae, lm = store.d_in, round(expansion * store.d_in), model_bytes(config, store.dtype)
    sae, step = 16 * (2 * d_in + 2) * d_sae, 4 * batch_tokens * (3 * d_sae + 8 * d_in)
    activations = store.windows.tokens.size * d_in * store.dtype.itemsize
    text = (f"memory: model {readable_bytes(lm)}, SAE with its optimiser {readable_bytes(sae)}, a training step {readable_bytes(step)}; "
            f"activations {readable_bytes(activations)} on disk")
    if device != "cuda":
        return text
    free = torch.cuda.mem_get_info()[0]
    kept_there = activations < (free - lm) // 2
    room = free - lm - activations * kept_there
    text += f", {'kept on the GPU' if kept_there else 'read as they are needed'}; {readable_bytes(free)} free"
    if sae + step > room > sae:
        text += f". Too much: BATCH_TOKENS = {max(1, int(batch_tokens * (room - sae) / step))} would fit"
    elif sae + step > room:
        text += f". Too much: EXPANSION = {expansion * max(room, 0) / (sae + step):.2g} would fit"
    return text



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
        self.shards = shard_table(folder, len(windows.tokens), SHARD_WINDOWS)

    def collect(self, get_model, layer):
        """Fills in missing shards, under a lock that other runs wait for; then opens all."""
        row_bytes = CONTEXT_LENGTH * self.d_in * self.dtype.itemsize
        with missing_shards(self.shards, row_bytes) as missing:
            for shard in missing:
                self.collect_shard(get_model(), layer, shard)
        self.maps = open_shards(self.shards, (CONTEXT_LENGTH, self.d_in), self.dtype, DEVICE)
        self.normalise()

    def collect_shard(self, model, layer, shard):
        rows = np.arange(shard.start, shard.start + shard.rows)
        write_shard(shard.path, (
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
        return position_moments((self.batch(ids).x.double(), self.valid(ids)) for ids in chunks)

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


def batch_ids(seed, step, n_windows, size):
    """Windows of one training step: a slice of a permutation per (seed, epoch)."""
    epoch, place = divmod(step, n_windows // size)
    return _epoch_order(seed, epoch, n_windows)[place * size:(place + 1) * size]


@lru_cache(maxsize=2)
def _epoch_order(seed, epoch, n_windows):
    return np.random.default_rng((seed, epoch)).permutation(n_windows)


class Plan:
    """A training's books: `step` of the `steps` of each stage, fewer than `planned` where the forecast passes the deadline,
    and the log."""

    def __init__(self, stages, per_epoch):
        self.stages, self.i, self.step, self.log = stages, 0, 0, {}
        self.planned = self.steps = [round(stage.epochs * per_epoch) for stage in stages]
        if 0 in self.planned:
            raise RunnerError(f"stage {stages[self.planned.index(0)].name!r} gets no step: raise TRAIN_TOKENS or EPOCHS_SCALE, "
                            "or lower BATCH_TOKENS.")

    def state_dict(self):
        return {"step": self.step, "steps": self.steps, "log": self.log}

    def load_state_dict(self, state):
        self.step, self.steps, self.log = state["step"], state["steps"], state["log"]

    def begin(self, what, seconds, deadline):
        """The clock runs: a step of each stage takes so many `seconds` at first."""
        self.seconds, self.deadline, self.paced = seconds, deadline, False
        if not self.step:
            self.steps = RANKS.agree(fit_to_deadline(self.planned, 0, seconds, deadline))
        WATCHDOG.renew()
        left, carrying = steps_left(self.steps, self.step), f"carrying on at step {self.step}, " if self.step else ""
        minutes = sum(n * s for n, s in zip(left, seconds)) / 60
        print(f"{what}: {carrying}about {minutes:.1f} min for {sum(left):,} steps", flush=True)
        self.progress, self.saved = Progress(sum(self.steps), self.step), time.time()
        self.since = self.saved, self.step

    def steps_of(self, i):
        """Yields (step, the stage's progress) for each step of stage i that is still to do; `advance` counts it."""
        self.i, first = i, sum(self.steps[:i])
        while self.step < first + self.steps[i]:
            yield self.step, (self.step - first) / self.steps[i]

    def advance(self, losses):
        self.step += 1
        self.progress.update(f"{self.stages[self.i].name}: step {self.step}/{sum(self.steps)}", losses)

    def at(self, every):
        """Whether so many steps have passed again, or all."""
        return self.step % every == 0 or self.step == sum(self.steps)

    def due(self, seconds):
        """Whether as much time has passed since this was last so, or all steps are done."""
        if time.time() - self.saved <= seconds and self.step < sum(self.steps):
            return False
        self.saved = time.time()
        return True

    def append(self, **row):
        """Appends each value to the list of its name in the log; a table's values, to those in the table of its name, as
        long as the list of steps: None where there was no value."""
        for name, value in row.items():
            if not isinstance(value, dict):
                self.log.setdefault(name, []).append(value)
                continue
            table = self.log.setdefault(name, {})
            for key in table | value:
                table.setdefault(key, [None] * (len(self.log["step"]) - 1)).append(value.get(key))

    def record(self, losses, dead, followed):
        """Appends to the log; the pace since the last time corrects the forecast. A loss that is not finite ends the run."""
        WATCHDOG.renew()
        values = {name: (RANKS.total(loss) / RANKS.size).item() for name, loss in losses.items()}
        if wrong := [f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)]:
            raise RunnerError(f"step {self.step} of stage {self.stages[self.i].name!r}: {', '.join(wrong)}. Look for a log or a "
                            "division by zero in `losses`, or lower LEARNING_RATE.")
        self.append(step=self.step, l0=values.pop("l0"), dead_fraction=dead.float().mean().item(), losses=values,
                    parameters={name: finite_number(value, f"parameter of interest {name!r}") for name, value in followed.items()})
        (began, first), now = self.since, time.time()
        if self.paced:                      # what comes first is slow
            pace = (now - began) / (self.step - first) / self.seconds[self.i]
            self.seconds = [s * pace ** 0.3 for s in self.seconds]
        self.paced, self.since = True, (now, self.step)
        self.steps = RANKS.agree(fit_to_deadline(self.steps, self.step, self.seconds, self.deadline))

    def finished(self):
        """The whole log, steps planned and done."""
        starts = np.cumsum([0] + self.steps[:-1]).tolist()
        weighed = sorted({loss for stage in self.stages for loss in stage.weights})
        return (self.log | {"stage_starts": starts, "stages": [stage.name for stage in self.stages], "weighed": weighed},
                self.planned, self.steps)


def save_state(path, parts):
    """state_dict() of each of parts {name: part}, in one file, which rank 0 writes."""
    if RANKS.rank:
        return
    with replacing(path) as partial:
        content = io.BytesIO()          # torch does not tell a full disk
        torch.save({name: part.state_dict() for name, part in parts.items()}, content)
        partial.write_bytes(content.getbuffer())


def load_state(path, parts):
    """What save_state wrote, where it did, into the parts."""
    state = torch.load(path, weights_only=True) if path.exists() else {}
    for name in state:
        parts[name].load_state_dict(state[name])



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


@allow_tf32()
def train(sae, store, stages, seed, size, deadline, state_path):
    """Trains `sae` -> log, steps planned and done of each stage; a killed run carries on from the
    checkpoint at `state_path`, to the same bits."""
    n_windows, pool = store.windows.n_train, store.windows.train_pool(TRAIN_ON, FORGET)
    per_epoch = n_windows // size

    def batch_at(step, share=RANKS.share):
        ids = pool[batch_ids(seed, step, n_windows, size) % len(pool)]
        return only_positions(store.batch(share(ids)))

    plan = Plan(stages, per_epoch)
    first = batch_at(0, lambda ids: ids)
    ready = prefetched(batch_at, store.maps[0].device.type != DEVICE)
    sae.dead_after.fill_(int(DEAD_AFTER_FRACTION * sum(plan.planned) * n_tokens(first)))
    sae.initialise(first)
    seconds, optimizer = seconds_per_step(sae, store, stages, size), Adam(sae, 1e-4)
    parts = {"sae": sae, "optimizer": optimizer, "plan": plan}
    load_state(state_path, parts)
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
                save_state(state_path, parts)
    if sae.dead_mask().all():
        raise RunnerError(f"all {sae.d_sae} latents are dead after training.")
    return plan.finished()


def position_moments(parts):
    """Of activations x [n, seq, d_in] with keep [n, seq], in parts, by position: sum of x [seq, d_in], of |x|^2 [seq],
    and tokens [seq]."""
    WATCHDOG.renew()
    sums = [[part.sum(0) for part in (x * keep[..., None], (x ** 2).sum(-1) * keep, keep)] for x, keep in parts]
    return map(sum, zip(*sums))


def position_variances(sums, squares, n):
    """Of `moments`: the variance about the overall mean by position [seq], and overall."""
    mean = sums.sum(0) / n.sum()
    total = squares - 2 * (sums @ mean) + n * mean.square().sum()
    return (total / n.clamp_min(1)).tolist(), (total.sum() / n.sum()).item()



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
        return live_latents(self.heldout[0], self.store.windows, *self.live)


def percentiles_95(z, latents=None):
    """Of the values where each of `latents`, or each, fires; 1 where it never does; z as in `firings`."""
    latents = np.arange(z.shape[1]) if latents is None else latents
    return np.array([np.quantile(values, 0.95) if len(values) else 1.0 for _, values in firings(z, latents)],
                    dtype=np.float32)


def heldout_files(windows):
    """Document of each held-out token that counts."""
    return windows.doc_ids[windows.n_train + windows.heldout_tokens() // (windows.tokens.shape[1] - 1)]


class Activity(NamedTuple):
    """When units fire: on which of the n tokens that count, and how strongly."""
    places: list            # unit -> tokens [firings], in order
    values: list            # unit -> [firings]
    n: int

    @classmethod
    def of(cls, z, keep):
        """Of codes z, sparse [token, unit] by column; `keep` are the tokens that count, in order."""
        rank = np.full(z.shape[0], -1)
        rank[keep] = np.arange(len(keep))
        parts = firings(z, np.arange(z.shape[1]))
        return cls([rank[at] for at, _ in parts], [values for _, values in parts], len(keep))

    def rates(self):
        return np.array([len(at) for at in self.places]) / self.n

    def live(self, files, least, least_files):
        """[unit] whether it fires often, in many of files [n], and on at most half of the tokens."""
        return np.array([least <= len(at) <= self.n / 2 and len(np.unique(files[at])) >= least_files for at in self.places])

    def only(self, units):
        return Activity([self.places[i] for i in units], [self.values[i] for i in units], self.n)

    def union(self, groups):
        """Activity of groups [unit] of units: a group fires where one of its units does."""
        members = [np.flatnonzero(groups == g) for g in range(max(groups) + 1)]
        places = [np.unique(np.concatenate([self.places[i] for i in of])) for of in members]
        return Activity(places, [np.ones(len(at)) for at in places], self.n)


def live_latents(z, windows, least, least_files):
    """Of codes of the held-out tokens, sparse [token, d_sae] by column: [d_sae] whether each latent fired at least `least`
    times, in `least_files` files, on at most half the tokens; and its firing rate."""
    activity = Activity.of(z, windows.heldout_tokens())
    live, rate = activity.live(heldout_files(windows), least, least_files), activity.rates()
    if not live.any():
        raise RunnerError(f"no latent of {len(live)} is live: fired {least} times in {least_files} held-out files "
                        f"(L0 = {z.nnz / z.shape[0]:.2f}).")
    return live, rate


def rate_matched(rate, chosen):
    """The units that are next to the chosen ones in rate [n], without them and without repeats."""
    others = np.setdiff1d(np.argsort(rate, kind="stable"), chosen, assume_unique=True)
    return np.unique(others[np.searchsorted(rate[others], rate[chosen]).clip(max=len(others) - 1)])



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
    return position_variances(*store.moments(store.heldout(64)))


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
    return cached_json(run.store.folder / f"controls-{key}.json", lambda: compute_controls(run))


def compute_controls(run):
    """Losses of the model, ablated, of unigrams; bigrams; untrained TopK."""
    print("computing the model's own loss and the controls", flush=True)
    store, (by_position, variance) = run.store, variance_by_position(run.store)
    vocabulary = len(run.get_model().get_output_embeddings().weight)
    own = next_token_losses(run, lambda batch: store.unscaled(batch.x))[0]
    losses = {"ce_model": own, "ce_unigram": unigram_losses(store.windows, vocabulary),
              "ce_zero": next_token_losses(run, lambda batch: torch.zeros_like(batch.x))[0],
              "ce_mean": next_token_losses(run, lambda batch: store.mean.expand_as(batch.x))[0]}
    bigram = bigram_error(store.windows, lambda ids: store.batch(ids).x.cpu().numpy())
    metrics = {name: np.nanmean(loss) for name, loss in losses.items()} | {
        "bigram_explained_variance": 1 - bigram / variance,
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
    model, like = reinitialised_model(run.get_model()), run.store
    store = Store(like.folder / "random", like.windows.fewer(256), like.d_in, like.dtype)
    store.collect(lambda: model, run.layer)
    control = Run(untrained(run), store, lambda: model, run.layer, run.live, {}, run.probing)
    return {f"{name}_reinitialised": value for name, value in features(control)[1].items()}


def explained_variance(rows, variance):
    """1 - E|x - x_hat|^2 / sum_d Var(x_d), rows as of encode_windows."""
    return 1 - np.nanmean(rows["error"]) / variance


def explained_by(sae, store, variance):  # of held-out tokens
    return explained_variance(encode_windows(sae, store, store.windows.heldout())[1], variance)


def unigram_losses(windows, vocabulary):
    """Cross-entropy of the sample's tokens from the third on, [sample, context_length - 2], under the training tokens'
    frequencies, one added to each count; NaN at padding."""
    train, sample = np.arange(windows.n_train), windows.sample()
    counts = np.bincount(windows.tokens[train][windows.valid(train)], minlength=vocabulary) + 1.0
    losses = -np.log(counts / counts.sum())[windows.tokens[sample][:, 2:]]
    return np.where(windows.valid(sample)[:, 2:], losses, np.nan)


def bigram_error(windows, activations, n_tokens=2 ** 18):
    """Mean squared error on held-out tokens of a lookup by (previous token, token) fitted on the first training tokens:
    a pair's mean, shrunk by one pseudo-count to its token's, and that to 0. activations(ids) are those of windows,
    [len(ids), context_length - 1, d]."""
    vocabulary = int(windows.tokens.max()) + 1

    def rows(ids):          # token and pair of each valid token, and its activation
        keep, tokens = windows.valid(ids)[:, 1:], windows.tokens[ids].astype(np.int64)
        return tokens[:, 1:][keep], (tokens[:, :-1] * vocabulary + tokens[:, 1:])[keep], activations(ids)[keep]

    def shrunk_means(index, x, prior):
        members = csr_array((np.ones(len(index), x.dtype), (index, np.arange(len(index)))), (len(prior), len(index)))
        return (members @ x + prior) / (np.bincount(index, minlength=len(prior))[:, None] + 1)

    tokens, pairs, x = rows(np.arange(min(windows.n_train, n_tokens // windows.tokens.shape[1])))
    of_token = shrunk_means(tokens, x, np.zeros((vocabulary, x.shape[1]), x.dtype))
    known, index = np.unique(pairs, return_inverse=True)
    of_pair, errors = shrunk_means(index, x, of_token[known % vocabulary]), []
    for ids in np.array_split(windows.heldout(), len(windows.heldout()) // 64 + 1):
        tokens, pairs, x = rows(ids)
        at = np.searchsorted(known, pairs).clip(max=len(known) - 1)
        guess = np.where((known[at] == pairs)[:, None], of_pair[at], of_token[tokens])
        errors.append(np.square(x - guess).sum(1))
    return np.concatenate(errors).mean(dtype=float)


def single_token_fraction(windows, firings, most=40):
    """Share of units of which 90 % of the strongest firings are one token; of each unit the places of held-out tokens where
    it fires [n], and its values there [n]."""
    tokens = windows.tokens[windows.n_train:, 1:].ravel()
    keep_strongest = [tokens[at[np.argsort(-values, kind="stable")[:most]]] for at, values in firings]
    return np.mean([np.bincount(top).max() >= 0.9 * len(top) for top in keep_strongest])



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
        "single_token_fraction": single_token_fraction(
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
def token_classes(windows):
    """A class for each held-out token but BOS, [window * (context_length - 1) + position - 1]: its labels taken
    together; without labels, the token where it is one of the 255 most frequent."""
    tokens = windows.tokens[windows.n_train:, 1:].ravel()
    if windows.labels is not None and (windows.labels >= 0).any():
        labels = windows.labels[:, 1:].reshape(len(tokens), -1)
        return np.unique(labels, axis=0, return_inverse=True)[1].ravel()
    rank = np.argsort(np.argsort(-np.bincount(tokens), kind="stable"))
    return np.minimum(rank[tokens], 255)


def miller_madow_entropy(values):
    """Miller-Madow entropy in nats of a sample."""
    share = np.unique(values, return_counts=True)[1] / len(values)
    return -(share * np.log(share)).sum() + (len(share) - 1) / (2 * len(values))


def polysemanticity(fired, kinds, places, rng, draws=50, n=64):
    """Mean over units of the smaller of the entropies of token and of class at n firings, each over that at random
    `places`. fired: token indices of each unit; kinds: [token] arrays."""
    null = [np.mean([miller_madow_entropy(kind[rng.choice(places, n)]) for _ in range(draws)]) for kind in kinds]
    samples = [rng.choice(unit, n, replace=False) for unit in fired if len(unit) >= n]
    ratios = [min(miller_madow_entropy(kind[at]) / base for kind, base in zip(kinds, null)) for at in samples]
    return np.mean(ratios) if ratios else 1.0


def channel_firings(x, keep, rate):
    """Of channels x [window, seq, d] the tokens, a share `rate` of all, where each is largest, then smallest."""
    x = x.masked_fill(~keep[..., None], 0.0).flatten(0, 1)
    top = torch.cat([x, -x], 1).topk(max(1, int(rate * len(x))), dim=0, sorted=False).indices
    return list(top.t().cpu().numpy())


def top_latents_over_passage(z, tokens, stable, alive, n=16):
    """The latents with the most stable energy in one window, over its tokens; z [seq, d_sae]."""
    top = alive[np.argsort(-np.square(z[:, alive]).sum(0) * np.maximum(stable, 1e-6))[:n]]
    return {"tokens": tokens, "latents": top, "values": z[:, top].T.round(4)}


def positions_apart(active, rate, lags):
    """active by latent [d, window, seq]; weights of pairs of positions so far apart [seq, seq], 1 in
    all; mean product of two positions if permuted [d, window]; variance [d, 1]."""
    a, seq = active.permute(2, 0, 1).float(), active.shape[1]
    band = torch.ones(seq, seq, device=active.device).triu(lags[0]).tril(lags[1])
    shuffled = (a.sum(2) ** 2 - a.square().sum(2)) / (seq * (seq - 1))
    return a, band / band.sum().clamp_min(1), shuffled, (rate * (1 - rate)).clamp_min(1e-9)[:, None]


def excess_autocorrelation(active, rate, lags):
    """Autocorrelation of each latent's activity over that of permuted positions, mean over lags:
    [window, d].

    active [window, seq, d] is 0 or 1, or the probability of firing; rate [d] its mean."""
    a, band, shuffled, variance = positions_apart(active, rate, lags)
    return ((((a @ band) * a).sum(2) - shuffled) / variance).t()


def autocorrelation_null(active, rate, lags, draws):
    """The mean stability under random permutations of positions, shared by 64 windows each
    [draws, d]; autocorrelation by lag [lag, d]."""
    a, band, shuffled, variance = positions_apart(active, rate, lags)
    n, seq, d = active.shape
    null, both = a.new_zeros(d, draws), a.new_zeros(d, seq, seq)
    for part in a.split(64, 1):
        sums, order = part.transpose(1, 2) @ part, torch.rand(draws, seq, device=active.device).argsort(1)
        null += sums.flatten(1) @ band[order[:, :, None], order[:, None]].flatten(1).t()
        both += sums
    null = (null / n - shuffled.mean(1, keepdim=True)) / variance
    r = torch.stack([both.diagonal(l, 1, 2).mean(1) / n for l in range(1, min(33, seq))])
    return null.t(), (r - rate ** 2) / variance[:, 0]


def smoothness(z, x, scale):
    """max_t |z_t+1 - z_t| / scale / |x_t+1 - x_t|, summed over latents: [window]."""
    change = x.diff(dim=1).norm(dim=-1, keepdim=True).clamp_min(1e-9)
    return torch.cat([((a.diff(dim=1).abs() / c).amax(1) / scale).sum(1)
                      for a, c in zip(z.split(64), change.split(64))])


def fire_given_token(active, tokens, fold):
    """P(fire | token), as counted in the windows of the other fold [window], with one more firing at the mean rate: [window,
    seq, d]; active sparse [window * seq, d], tokens [window, seq]."""
    known, index = np.unique(tokens, return_inverse=True)
    index, fold, rate = index.ravel(), np.repeat(fold, tokens.shape[1]), active.mean(0)
    is_token = csr_array((np.ones(len(index)), index, np.arange(len(index) + 1)), (len(index), len(known)))
    active, expected = active.tocsr(), np.empty(active.shape, dtype=np.float32)
    for held in (fold, ~fold):
        seen = np.bincount(index[~held], minlength=len(known))[:, None] + 1
        expected[held] = (((is_token[~held].T @ active[~held]).toarray() + rate) / seen)[index[held]]
    return expected.reshape(*tokens.shape, -1)


def similarity_matrix(codes, seq):
    """Mean over windows of the cosine of a window's codes at t and s, minus that between different windows: [seq, seq];
    codes sparse [window * seq, d]."""
    unit = normalize(codes)
    windows = [unit[start:start + seq] for start in range(0, unit.shape[0], seq)]
    same = sum((window @ window.T).toarray() for window in windows)
    total, n = sum(windows), len(windows)
    return same / n - ((total @ total.T).toarray() - same) / (n * (n - 1))


def parameter_convergence(log):
    """What a training log says of the parameters it follows: the last value of each, and the first step after which it
    stays within 5 % of that; and of the consistency gap, at the end and before the last stage, with the alarm where it
    fell."""
    found = {}
    for name in log["parameters"]:
        steps, values = logged_values(log, "parameters", name)
        final = values[-1]
        off = np.flatnonzero(np.abs(np.array(values) - final) > 0.05 * max(abs(final), 1e-3))
        found |= {f"{name}_final": final, f"{name}_converged_at": steps[off.max(initial=-1) + 1]}
    if "consistency_gap" in log["losses"]:
        steps, gaps = logged_values(log, "losses", "consistency_gap")
        before = gaps[max(np.searchsorted(steps, log["stage_starts"][-1], "right") - 1, 0)]
        found |= {"consistency_gap": gaps[-1], "consistency_gap_before": before, "collapse_alarm": float(gaps[-1] < before)}
    return found


def logged_values(log, table, name):
    """Steps and values of a row of a training log's table, where it has one."""
    return zip(*((step, value) for step, value in zip(log["step"], log[table][name]) if value is not None))


def parameter_sensitivities(sae, loss):
    """The slope of loss() in each scalar parameter, by a central difference of 10 % of it."""
    found = {}
    for name, p in sae.named_parameters():
        if p.numel() == 1:
            at, d, losses = p.data.clone(), 0.1 * max(abs(p.item()), 0.1), []
            for value in (at + d, at - d):
                p.data.copy_(value)
                losses.append(loss())
            p.data.copy_(at)
            found[f"{name}_sensitivity"] = (losses[0] - losses[1]) / (2 * d)
    return found


def decay_slope(variance, decay):
    """Of the regression of log(-log decay) on log variance [latent]: slope and r^2; nothing where the variance is one."""
    x, y = (part.double().cpu().numpy() for part in (variance, decay))
    x, y = np.log(x), np.log(-np.log(y.clip(1e-30, 1 - 1e-7)))
    if x.std() == 0:
        return {}
    fit = linregress(x, np.broadcast_to(y, x.shape))
    return {"decay_slope": fit.slope, "decay_r2": fit.rvalue ** 2}


def coherence(fired, classes, files, rate, rng, n_firings=50, group=100):
    """How often a latent is recognised among `group` of like rate by the classes it fires on, from positions 1-32 to 64
    on of other files; over the same from 1-32 to 1-32; each above chance.

    fired: token indices [n] of each latent; classes: of each token; files: of each held-out window."""
    roles, seq = [], len(classes) // len(files)
    for at in (fired[i] for i in np.argsort(rate, kind="stable")):
        window, position = np.divmod(at, seq)
        early, other = position < 32, files[window] % 2 == 1
        blocks = [at[early & ~other], at[early & other], at[(position >= 63) & other]]
        if min(map(len, blocks)) >= n_firings:
            drawn = (rng.choice(block, n_firings, replace=False) for block in blocks)
            roles.append([np.bincount(classes[of], minlength=classes.max() + 1) for of in drawn])
    n, hits = min(group, len(roles)), np.zeros(2)
    if n < 10:
        return None
    for low in range(0, len(roles) - n + 1, n):
        first, *blocks = np.array(roles[low:low + n]).swapaxes(0, 1)
        hits += [(cdist(block, first, "jensenshannon").argmin(1) == np.arange(n)).sum() for block in blocks]
    same, later = hits - len(roles) // n  # above chance
    return later / same if same >= 1 else None


def significant_fraction(values, null):
    """Share of values [n] above their null draws [n, draws], taken as normal, at a false discovery rate of .05."""
    p = norm.sf((values - null.mean(1)) / np.maximum(null.std(1, ddof=1), 1e-12))
    return (false_discovery_control(p) < 0.05).mean()


def mean_by_decile(values, rate):
    """Mean of values [n] within each decile of rate [n]; 0 where one is empty."""
    decile = np.digitize(rate, np.quantile(rate, np.arange(0.1, 1, 0.1)))
    return np.bincount(decile, values, 10) / np.maximum(np.bincount(decile, minlength=10), 1)



def follow(run):
    """What the training did to the parameters of interest, and the alarm of a collapse."""
    found, sae = parameter_convergence(run.log), run.sae
    found |= parameter_sensitivities(sae, lambda: validation_loss(sae, run.store))
    if getattr(sae, "traces", False):
        found |= decay_slope(sae.scaled_variance().detach(), sae.decay().detach())
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
        observed, far = (excess_autocorrelation(active, rate, lags)
                         for lags in (STABILITY_LAGS, FAR_LAGS))
        null, r = autocorrelation_null(active, rate, STABILITY_LAGS, NULL_DRAWS)
        expected = fire_given_token(z[:, alive[at]] > 0, tokens, fold)
        token = excess_autocorrelation(torch.from_numpy(expected).to(DEVICE), rate, STABILITY_LAGS)
        found.append((observed.t(), far.t(), null.t(), token.mean(0), r.t(), rate, energy))
        scaled += smoothness(dense, x, torch.from_numpy(q95[at]).to(DEVICE))
        raw += smoothness(dense, x, 1.0)
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
    fired, q95 = [at for at, _ in firings(z, alive)], percentiles_95(z, alive)
    z = z.tocsr()[(full[:, None] * seq + np.arange(seq)).ravel()]
    observed, far, null, token, r, rate, energy, scaled, raw = latent_statistics(
        run, z, full, alive, q95)
    mean, weight = observed.mean(1), energy / energy.sum()
    kinds = windows.tokens[windows.n_train:, 1:].ravel(), token_classes(windows)
    everything, places, half = windows.heldout(), windows.heldout_tokens(), seq // 2
    error, variance = np.nanmean(errors["error"], 0), np.array(variance_by_position(store)[0])
    metrics = {
        "stability_token": token @ weight,
        "stability_unweighted": mean.mean(), "energy": energy.sum(),
        "stability_null_95": np.quantile(weight @ null, 0.95),
        "stable_fraction": significant_fraction(mean, null),
        "autocorrelation_lag1": r[:, 0] @ weight,
        "smoothness": scaled.mean(), "smoothness_raw": raw.mean(),
        "polysemanticity": polysemanticity(fired, kinds, places, rng, NULL_DRAWS),
        "polysemanticity_channels": polysemanticity(
            channel_firings(store.x(everything), store.valid(everything), rate.mean()),
            kinds, places, rng, NULL_DRAWS),
        "explained_variance_early": 1 - error[:half].sum() / variance[:half].sum(),
        "explained_variance_late": 1 - error[half:].sum() / variance[half:].sum()} | follow(run)
    if (value := coherence(fired, kinds[1], files, rates[alive], rng)) is not None:
        metrics["coherence"] = value
    held = {"stability": weight @ observed}  # by window
    if seq > FAR_LAGS[1]:
        held["stability_far"] = weight @ far
    metrics |= {name: values.mean() for name, values in held.items()}
    curves = {
        "autocorrelation": weight @ r, "stability_null": weight @ null,
        "stability_by_rate_decile": mean_by_decile(mean, rate),
        "similarity_matrix": similarity_matrix(z[:256 * seq], seq)[::2, ::2].round(4),
        "evolution": top_latents_over_passage(z[:seq].toarray(), load_tokenizer().batch_decode(
            windows.tokens[full[0] + windows.n_train, 1:, None]), mean, alive)}
    if hasattr(sae, "variance"):
        curves |= {"variance": sae.variance, "decay": sae.decay(),
                   "scaled_variance": sae.scaled_variance()}
    per_sequence = {name: windows.by_document(values, files[full])
                    for name, values in (held | {"smoothness": scaled}).items()}
    return Result(metrics, curves, per_sequence)


# ---- Probes: what latents tell about the context ----
def probe_tasks(windows, every, n_documents=20):
    """{name: (places [n] as token_classes counts held-out tokens, whether each is in the first of two folds [n], its
    class [n])}: LABELS, where the tokens have them, and the domain, of every `every`-th token, the folds apart by file;
    and the document, of all tokens of the first `n_documents` with most windows, the folds apart by window. What has one
    class in a fold is left out."""
    context, docs = windows.tokens.shape[1] - 1, windows.doc_ids[windows.n_train:]
    all_places = windows.heldout_tokens()
    places, found = all_places[::every], {}
    if windows.labels is not None:
        classes = windows.labels[:, 1:].reshape(-1, len(LABELS))
        known = places[(classes[places] >= 0).all(1)]
        if len(known) > len(places) / 2:
            places, found = known, dict(zip(LABELS, classes[known].T))
    of = docs[places // context]
    found["domain"] = np.unique(np.asarray(windows.domains)[of], return_inverse=True)[1]
    found = {name: (places, of % 2 == 0, classes) for name, classes in found.items()}
    names, first, counts = np.unique(docs, return_index=True, return_counts=True)
    chosen = names[counts == counts.max()][:n_documents]
    places = all_places[np.isin(docs[all_places // context], chosen)]
    of, window = docs[places // context], places // context
    found["document"] = places, (window - first[np.searchsorted(names, of)]) % 2 == 0, np.searchsorted(chosen, of)
    return {name: task for name, task in found.items()
            if min(len(np.unique(task[2][part])) for part in (task[1], ~task[1])) > 1}


def bags_of_tokens(windows, rows, positions, last):
    """Counts of the token at each position [n] of the windows rows [n] and of the last - 1 before it, sparse
    [n, vocabulary]."""
    back = np.maximum(positions[:, None] - np.arange(last), 0)
    tokens, shape = windows.tokens[rows[:, None], back], (len(rows), int(windows.tokens.max()) + 1)
    return csr_array((np.ones(tokens.size), tokens.ravel(), np.arange(len(rows) + 1) * last), shape)


def cross_fitted_probe(features, labels, fold):
    """Labels as logistic regressions predict them, fitted on the other fold of files."""
    predicted = np.empty_like(labels)
    for held in (fold, ~fold):
        model = LogisticRegression(max_iter=200, class_weight="balanced")
        predicted[held] = model.fit(features[~held], labels[~held]).predict(features[held])
    return predicted


def probe_baselines(windows, every, folder):
    """Of each of probe_tasks: balanced accuracy from the token alone, and from a bag of the last 8: {label: [2]}; kept
    in the folder, which is of these windows alone."""
    def compute():
        found = {}
        for name, (places, fold, of) in probe_tasks(windows, every).items():
            row, at = np.divmod(places, windows.tokens.shape[1] - 1)
            bags = [bags_of_tokens(windows, row + windows.n_train, at + 1, n) for n in (1, 8)]
            found[name] = [balanced_accuracy_score(of, cross_fitted_probe(bag, of, fold)) for bag in bags]
        return found

    return cached_json(folder / f"probe_baselines-{every}.json", compute)


def probe_scores(windows, features, every, folder):
    """Of each of probe_tasks, from features [token, d], scaled by their largest values: balanced accuracy of `probe` beside
    probe_baselines, and the share of a document's labels that it predicts [sample]; and their mean over all but token_type."""
    metrics, right, docs = {}, {}, windows.doc_ids[windows.n_train:]
    base, seq = probe_baselines(windows, every, folder), windows.tokens.shape[1] - 1
    for name, (places, fold, of) in probe_tasks(windows, every).items():
        predicted = cross_fitted_probe(MaxAbsScaler().fit_transform(features[places]), of, fold)
        metrics[f"probe_{name}"] = balanced_accuracy_score(of, predicted)
        metrics[f"probe_{name}_token"], metrics[f"probe_{name}_bag"] = base[name]
        right[f"probe_{name}"] = windows.by_document(predicted == of, docs[places // seq])
    if context := [name for name in right if name != "probe_token_type"]:
        metrics["probe_context"] = np.mean([metrics[name] for name in context])
        right["probe_context"] = np.nanmean([right[name] for name in context], 0)
    return metrics, right



def eval_probes(run):
    """Balanced accuracy of linear probes on a token's latents, beside those on tokens;
    `probe_context` is the mean over all labels but the token's type."""
    metrics, right = probe_scores(run.store.windows, run.heldout[0].tocsr(), PROBE_EVERY,
                                         run.store.folder)
    return Result(metrics, {}, right)


# ---- Unlearning: FORGET by clamping latents, and what that costs the rest ----
CONTROLS = ("random_latents", "random_directions", "projection")


def ranked_latents(z, forget, rule, most, n):
    """All latents in order, and which to clamp: "forget", the first n that may be, and "random_latents", those next to them
    in firing rate; of codes sparse [token, d_sae], the tokens forget [token] to be forgotten. By "ratio", E[z^2] there over
    elsewhere (arXiv 2504.08192), or by "frequency" there, among those active on less than a share `most` of the tokens
    elsewhere (SAEBench)."""
    size = z.power(2) if rule == "ratio" else z > 0
    there, elsewhere = (np.asarray(size[part].mean(0)).ravel() for part in (forget, ~forget))
    score = there / (elsewhere + 0.01 * there.mean()) if rule == "ratio" else there * (elsewhere < most)
    ranked, n = np.argsort(-score), min(n, (score > 0).sum())
    if not 0 < n < len(score):
        raise RunnerError(f"CLAMPED: {n} of {len(score)} latents may be clamped, it takes one and leaves one.")
    return ranked, {"forget": ranked[:n], "random_latents": rate_matched((z > 0).mean(0), ranked[:n])}


def mean_difference(x, keep, forget):
    """Of x [n, seq, d]: the mean of tokens `keep` that are not to be forgotten [d], and the direction from it to the mean of
    those that are [d], of length 1; keep, forget [n, seq] of bool."""
    rest = x[keep & ~forget].mean(0)
    return rest, F.normalize(x[keep & forget].mean(0) - rest, dim=0)


class UnlearningPlan(NamedTuple):
    """Windows to unlearn a domain with, spread over the files. Groups are "forget", "neighbours" (the domains nearest
    to it in vocabulary) and "retain" (the others)."""
    dev: np.ndarray         # ids of training windows
    dev_group: np.ndarray   # group of each
    test: np.ndarray        # ids of held-out windows
    group: np.ndarray       # group of each
    clozes: Clozes        # of the test windows
    cloze_group: np.ndarray     # group of each
    folder: Path | None = None  # keeps what no SAE changes

    def kept(self, what, compute):
        if self.folder is None:
            return compute()
        which = (self.dev, self.dev_group, self.test, self.group, self.clozes.options)
        key = fingerprint(what, *(part.tolist() for part in which))
        return cached_json(self.folder / f"unlearning-{key}.json", compute)

    def means(self, losses, right, before=None):
        """By group: mean of losses [test windows], if any, share of the clozes that are right [clozes]; where those that were right
        before are given, the p of McNemar's test between the two."""
        found = {} if losses is None else {str(g): losses[self.group == g].mean() for g in np.unique(self.group)}
        for name in np.unique(self.cloze_group):
            now = right[self.cloze_group == name]
            found[f"cloze_{name}"] = now.mean()
            if before is not None:
                found[f"cloze_{name}_p"] = mcnemar(now, before[self.cloze_group == name])
        return found

    def by_document(self, windows, losses):
        """By group: mean of losses [test windows] over each document of the sample."""
        docs = windows.doc_ids[self.test]
        return {str(name): windows.by_document(losses[self.group == name], docs[self.group == name])
                for name in np.unique(self.group)}

    def frontier(self, windows, forgetting, strategies, controls, edit, results):
        """What strategies and controls cost the test windows, at the strengths that cost every fifth dev window of "forget"
        `forgetting` nats, and strategies at a quarter of it to four times: {name: edit}, metrics, {name: its rows}, by
        document of the sample.

        edit(strategy, strength) -> an edit; results(edit, ids) -> as Clozes.scores takes them."""
        def scores(*of):
            return self.clozes.scores(results(*of))

        def measured(name, factors):
            strength = strength_for(lambda s: scores(edit(name, s), search)[0].mean() - own_search, forgetting)
            return strength, [[part.tolist() for part in scores(edit(name, strength * factor), self.test)]
                              for factor in factors]

        edits, rows, lost = {"unclamped": edit("projection", 0.0)}, {}, {}        # which leaves all as it is
        search = self.dev[self.dev_group == "forget"][::5]
        own, own_right, own_search = map(np.array, self.kept("own", lambda: [part.tolist() for part in (
            *scores(edits["unclamped"], self.test), scores(edits["unclamped"], search)[0].mean())]))
        metrics = self.means(None, own_right)
        for name in strategies + controls:
            factors = (1, 0.25, 0.5, 2, 4) if name in strategies else (1,)
            compute = partial(measured, name, factors)
            strength, found = self.kept((name, forgetting), compute) if name == "projection" else compute()  # it has no latents
            edits[name], rows[name] = edit(name, strength), []
            for factor, (loss, right) in zip(factors, (map(np.array, of) for of in found)):
                rows[name].append({"strength": strength * factor} | self.means(loss - own, right, own_right))
                if factor == 1:
                    lost |= {f"{name}_{g}": values for g, values in self.by_document(windows, loss - own).items()}
            metrics |= {f"{name}_{key}": value for key, value in rows[name][0].items()}
        return edits, metrics, rows, lost

    def padded_losses(self, windows, strategies, edits, logits, config):
        """What strategies add to the loss of full windows of "forget" behind 0, 32 and 64 tokens of "retain", as far as the
        model takes so many; logits(edit, tokens [n, seq], mask [n, seq]) -> [n, seq, vocabulary]."""
        (full, others), n = self.full(windows), windows.tokens.shape[1] - 2
        longest, found = getattr(config, "max_position_embeddings", None) or math.inf, {}
        for pad in (pad for pad in (0, 32, 64) if n + 2 + pad <= longest):
            tokens = prepend_context(windows, full, others, pad)
            loss = {name: last_loss(logits(edits[name], tokens, np.ones(tokens.shape, bool)), tokens, n)
                    for name in ("unclamped", *strategies)}
            found |= {f"{name}_padded_{pad}": loss[name] - loss["unclamped"] for name in strategies}
        return found

    def question_scores(self, datasets, tokenizer, edits, logits):
        """`compared` answers of the model under each of edits {name: edit} to the data sets {kind: its name or None}, flat;
        logits(edit, tokens, mask)."""
        found = {}
        for kind, dataset in datasets.items():
            if dataset:
                answers = {name: partial(right_answers, dataset, tokenizer, partial(logits, edit))
                           for name, edit in edits.items()}
                own = self.kept(("questions", data_identity(dataset)), lambda: answers["unclamped"]().tolist())
                answers["unclamped"] = partial(np.array, own)
                found |= compare_answers({name: right() for name, right in answers.items()}, f"_{kind}_questions")
        return found

    def full(self, windows, most=32):
        """Up to `most` test windows of "forget" without padding, and as many of "retain"."""
        forget, retain = (self.test[self.group == name] for name in ("forget", "retain"))
        forget = forget[windows.lengths[forget] == windows.tokens.shape[1]][:most]
        if not len(forget):
            raise RunnerError("no held-out document of FORGET fills CONTEXT_LENGTH.")
        return forget, np.resize(retain, len(forget))

    def halves(self, windows):
        """[dev windows] True for every other file of "forget", and of what is not."""
        docs, half = windows.doc_ids[self.dev], np.zeros(len(self.dev), dtype=bool)
        for side in (self.dev_group == "forget", self.dev_group != "forget"):
            half[side] = np.unique(docs[side], return_inverse=True)[1] % 2 == 0
        return half


def strength_for(forgets, forgetting, low=2 ** -4, high=2.0 ** 8):
    """The least strength, to 10 %, of which forgets(strength) is `forgetting` nats; `high` where none does."""
    while high > 1.1 * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if forgets(middle) >= forgetting else (middle, high)
    return high


def prepend_context(windows, ids, others, n):
    """Tokens of windows `ids`, with n tokens of windows `others` put after the first."""
    return np.concatenate([windows.tokens[others, :n + 1], windows.tokens[ids, 1:]], 1).astype(np.int64)


def last_loss(logits, tokens, n):
    """Mean loss of the last n of tokens [batch, seq]; logits [batch, seq, vocabulary]."""
    following = torch.from_numpy(tokens[:, -n:]).to(logits.device)
    return F.cross_entropy(logits[:, -n - 1:-1].flatten(0, 1).float(), following.flatten()).item()


def mcnemar(now, before):
    """Exact p that as many answers turned right as turned wrong; both [n] of bool."""
    gained, lost = (now & ~before).sum(), (before & ~now).sum()
    return binomtest(int(gained), int(gained + lost)).pvalue if gained + lost else 1.0


def compare_answers(answers, suffix):
    """Of {name: whether each question was answered rightly [n]}, flat: the share, and p of McNemar's test against
    "unclamped"."""
    found = {f"{name}{suffix}": right.mean() for name, right in answers.items()}
    return found | {f"{name}{suffix}_p": mcnemar(right, answers["unclamped"])
                    for name, right in answers.items() if name != "unclamped"}


def right_answers(dataset, tokenizer, logits):
    """Whether each question is answered rightly under all orders of its options (SAEBench): [question] of bool;
    logits(tokens [24, seq], mask [24, seq]) -> [24, seq, vocabulary]."""
    right = []
    for tokens, mask, letters, answers in encoded_questions(dataset, tokenizer):
        said = logits(tokens, mask)
        last = said[np.arange(len(tokens)), mask.sum(1) - 1][:, np.array(letters) % said.shape[-1]]
        right.append((last.argmax(1).cpu().numpy() == answers).all())
    return np.array(right)


def unlearning_plan(windows, forget, tokenizer, most=(256, 128), folder=None):
    """UnlearningPlan of the domain `forget`, at most `most` windows of a group (dev, test)."""
    n_near, found = min(3, (len(set(windows.domains)) - 1) // 2), []
    near = nearest_domains(windows, forget, n_near) if n_near else []
    for split, ids, n in (("dev", np.arange(windows.n_train), most[0]), ("test", windows.heldout(), most[1])):
        domains = windows.domain_of(ids)
        group = np.where(domains == forget, "forget", np.where(np.isin(domains, near), "neighbours", "retain"))
        chosen = []
        for g in ("forget", "neighbours", "retain"):
            members = np.flatnonzero(group == g)
            if g != "neighbours" and not len(members):
                which = "of it" if g == "forget" else "of another domain"
                raise RunnerError(f"FORGET = {forget!r}: no {split} window is {which}. The domains are "
                                f"{', '.join(sorted(set(domains)))[:300]}.")
            chosen.append(members[np.linspace(0, len(members) - 1, min(n, len(members))).astype(int)])
        chosen = np.sort(np.concatenate(chosen))
        found += ids[chosen], group[chosen]
    strings = tokenizer.batch_decode(np.arange(windows.tokens.max() + 1)[:, None])
    _, _, test, group = found
    questions = make_clozes(windows, test, strings)
    return UnlearningPlan(*found, questions, group[np.searchsorted(test, questions.window)], folder)


def bag_auroc(windows, plan, last):
    """AUROC on the test windows of a logistic regression, fitted on `dev`, that tells "forget" by the last tokens."""
    def compute():
        bags, labels = [], []
        for ids, group in ((plan.dev, plan.dev_group), (plan.test, plan.group)):
            row, column = np.nonzero(windows.valid(ids))
            bags.append(bags_of_tokens(windows, ids[row], column, last))
            labels.append(group[row] == "forget")
        model = LogisticRegression(max_iter=300, class_weight="balanced").fit(bags[0], labels[0])
        return roc_auc_score(labels[1], model.decision_function(bags[1]))

    return plan.kept(("bag", last), compute)


@torch.enable_grad()
def fit_matcher(kind, x, forget):
    """Windows of codes x [n, f, w], whether they are to be forgotten [n] -> function of windows to that probability: a
    logistic regression, or one learned attention query over the window."""
    if kind == "logistic":
        model = LogisticRegression(C=75 / len(x), max_iter=300, class_weight="balanced")
        model.fit(x.flatten(1).cpu().numpy(), forget.cpu().numpy())
        weights, bias = (x.new_tensor(a[0]) for a in (model.coef_, model.intercept_))
        return lambda x: (x.flatten(-2) @ weights + bias).sigmoid()
    (f, w), y = x.shape[1:], forget.float()
    query, value, place, bias = parts = [x.new_zeros(n, requires_grad=True) for n in (f, f, w, 1)]

    def logit(x):
        return ((query @ x + place).softmax(-1) * (value @ x)).sum(-1) + bias

    optimizer, balance = torch.optim.Adam(parts, 0.05), (1 - y).sum() / y.sum()
    for _ in range(200):
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(logit(x), y, pos_weight=balance).backward()
        optimizer.step()
    return lambda x: logit(x).detach().sigmoid()


def gate_evidence(match, n):
    """The greatest mean of n matches in a row up to each position: [window, seq]."""
    if match.shape[1] < n:
        return torch.zeros_like(match)
    return F.pad(match.unfold(1, n, 1).mean(-1).cummax(1).values, (n - 1, 0))


class Matcher:
    """Tells by windows of `width` codes of the given latents where text to forget stands: a matcher for the patterns, one
    that sees a single position, one that sees them in random order. `gate_tokens` matches in a row open the gate.
    q95 [d_sae] are the units of latents z."""

    def __init__(self, kind, width, gate_tokens, latents, q95):
        self.kind, self.width, self.gate_tokens, self.latents, self.q95 = kind, width, gate_tokens, latents, q95

    def codes(self, z):
        """Of z [n, seq, d_sae], dense: [n, seq, f]."""
        return self.scaled(z[..., self.latents])

    def codes_of_sparse(self, z, seq):
        """Of z [n * seq, d_sae]: [n, seq, f]."""
        chosen = torch.from_numpy(z[:, self.latents].toarray()).to(self.q95.device)
        return self.scaled(chosen.view(-1, seq, len(self.latents)))

    def scaled(self, chosen):
        return torch.log1p(chosen / self.q95[self.latents])

    def fit(self, z, keep, forget, half, false_positives):
        """On the tokens `keep`, of which `forget` are to be forgotten, both [n, seq] of bool, z sparse [n * seq, d_sae];
        thresholds of each rate of `false_positives`, by matchers fitted on the windows of either `half` [n] for those of
        the other: "pattern" and "hybrid" at the first rate, "pattern_RATE" and "hybrid_RATE" at others."""
        codes = self.codes_of_sparse(z, keep.shape[1])
        half = torch.from_numpy(half).to(keep.device)[:, None].expand(keep.shape)
        if codes.shape[1] < self.gate_tokens:
            raise RunnerError(f"CONTEXT_LENGTH: unlearning's gate needs more than {self.gate_tokens} tokens.")
        apart = keep & (torch.arange(keep.shape[1], device=keep.device) % self.width == 0)  # windows do not overlap

        def fitted(name, rows):
            return fit_matcher(self.kind, self.windows(codes, name)[rows], forget[rows])

        self.matchers = {side: fitted("pattern", apart & (half == side)) for side in (False, True)}
        match = torch.where(half, self.match(codes, False), self.match(codes, True)) * keep
        self.matchers = {name: fitted(name, apart) for name in ("pattern", "one_position", "shuffled")}
        whole = gate_evidence(match, self.gate_tokens)[~forget[:, 0], -1]
        self.thresholds = {
            name + f"_{rate:g}" * (i > 0): evidence.quantile(1 - rate).item() for i, rate in enumerate(false_positives)
            for name, evidence in (("pattern", match[keep & ~forget]), ("hybrid", whole))}

    def windows(self, codes, name):
        """The last codes at each position, zeros before the first: [n, seq, f, width]."""
        width = 1 if name == "one_position" else self.width
        x = F.pad(codes, (0, 0, width - 1, 0)).unfold(1, width, 1)
        return x.gather(-1, torch.rand_like(x[..., :1, :]).argsort(-1).expand_as(x)) if name == "shuffled" else x

    def match(self, codes, name="pattern"):
        """The probability that text to forget stands at each position: [n, seq]."""
        return torch.cat([self.matchers[name](self.windows(part, name)) for part in codes.split(32)])

    def evidence(self, z):
        """Match and gate at each position, [n, seq]."""
        match = self.match(self.codes(z))
        return match, gate_evidence(match, self.gate_tokens)

    def opens(self, strategy, z):
        """Whether the evidence of a strategy that has a threshold is above it; True for others: [n, seq]."""
        if strategy not in self.thresholds:
            return torch.ones(z.shape[:2], dtype=torch.bool, device=z.device)
        match, gate_evidence = self.evidence(z)
        return (gate_evidence if strategy.startswith("hybrid") else match) > self.thresholds[strategy]

    def passage(self, z, on, tokens, tokenizer):
        """Of the window whose gate is the median at its end: its text, match, gate and its threshold, and where "standard"
        clamps, which is `on` [n, seq], and "hybrid"; tokens [n, seq]."""
        match, gate_evidence = self.evidence(z)
        i, threshold = gate_evidence[:, -1].argsort()[len(gate_evidence) // 2].item(), self.thresholds["hybrid"]
        return {"tokens": tokenizer.batch_decode(tokens[i, :, None]), "match": match[i], "gate": gate_evidence[i],
                "threshold": torch.full_like(gate_evidence[i], threshold), "standard": on[i], "hybrid": on[i] & (gate_evidence[i] > threshold)}

    def scores(self, z, keep, forget):
        """detection_scores of tokens `keep` [n, seq], and of whole windows; forget [n]; z sparse [n * seq, d_sae]."""
        codes = self.codes_of_sparse(z, keep.shape[1])
        matches, of_token = {name: self.match(codes, name) * keep for name in self.matchers}, forget.repeat(keep.sum(1).tolist())
        tasks = {name: (of_token, match[keep].cpu().numpy()) for name, match in matches.items()}
        tasks["hybrid"] = forget, gate_evidence(matches["pattern"], self.gate_tokens)[:, -1].cpu().numpy()
        return detection_scores(tasks, self.thresholds)


def detection_scores(tasks, thresholds):
    """Of tasks {name: (truth [n], score [n])}, flat: AUROC; above a threshold, for names that have one, false positives
    and balanced accuracy; and {name: [101] true positives at evenly spaced rates of false ones}."""
    found, rocs = {f"auroc_{name}": roc_auc_score(*task) for name, task in tasks.items()}, {}
    for name, threshold in thresholds.items():
        truth, score = tasks[name.partition("_")[0]]
        found |= {f"false_positives_{name}": (score > threshold)[~truth].mean(),
                  f"accuracy_{name}": balanced_accuracy_score(truth, score > threshold)}
        if name in tasks:                   # and not the same at another threshold
            false, true, _ = roc_curve(truth, score)
            rocs[name] = np.interp(np.linspace(0, 1, 101), false, true)
    return found, rocs


def repetition(texts):
    """Of each of {name: tokens [n, seq]}, flat: mean share of a row's pairs of neighbours that came before in it; mean
    entropy of a row in nats."""
    found = {}
    for name, rows in texts.items():
        rows = rows.tolist()
        found |= {f"{name}_repetition": 1 - np.mean([len(set(zip(row, row[1:]))) / (len(row) - 1) for row in rows]),
                  f"{name}_entropy": np.mean([miller_madow_entropy(row) for row in rows])}
    return found



class Unlearner:
    """Latents selected and matchers fitted on a plan's dev windows; thresholds from matchers fitted
    on every other file, for the rest."""

    def __init__(self, run, plan):
        self.sae, store, ids = run.sae, run.store, plan.dev
        z, keep = encode_windows(self.sae, store, ids)[0], store.valid(ids)
        forget = keep & torch.from_numpy(plan.dev_group == "forget").to(DEVICE)[:, None]
        self.q95 = torch.from_numpy(percentiles_95(z)).to(DEVICE)
        ranked, self.clamped = ranked_latents(
            z.tocsr()[keep.flatten().cpu().numpy()], forget[keep].cpu().numpy(), SELECTION,
            1.0 if run.probing else RETAIN_FREQUENCY, CLAMPED)
        self.rest, self.direction = mean_difference(store.x(ids), keep, forget)
        self.matcher = Matcher(
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
    plan = unlearning_plan(windows, FORGET, tokenizer, folder=store.folder)
    unlearner = Unlearner(run, plan)
    strategies = "standard", *unlearner.matcher.thresholds
    metrics, rocs = unlearner.matcher.scores(
        encode_windows(run.sae, store, plan.test)[0], store.valid(plan.test),
        plan.group == "forget")
    metrics["auroc_bag_of_tokens"] = bag_auroc(windows, plan, MATCHER_WINDOW)
    edits, scores, frontier, per_sequence = plan.frontier(
        windows, FORGETTING, strategies, CONTROLS, unlearner.edit, lambda edit, ids: spliced(
            run, ids, lambda batch: store.unscaled(batch.x + edit(batch))))
    logits = functools.partial(edited_logits, run)
    metrics |= scores | plan.padded_losses(
        windows, strategies, edits, logits, run.get_model().config)
    metrics |= plan.question_scores(
        {"forget": FORGET_QUESTIONS, "retain": RETAIN_QUESTIONS}, tokenizer, edits, logits)
    full, _ = plan.full(windows)
    metrics |= repetition({name: sampled(
        run, edit, store.tokens(full)[:, :CONTEXT_LENGTH // 2]) for name, edit in edits.items()})
    z = run.sae.encode(batch := store.batch(full)).dense()
    clamped = z[..., unlearner.clamped["forget"]]
    adjacent = consistency(batch, F.normalize(clamped, dim=-1))
    metrics["clamped_consistency"] = 1 - adjacent["consistency"].item()
    passage = unlearner.matcher.passage(z, (clamped > 0).any(-1), batch.tokens, tokenizer)
    return Result(metrics, {"frontier": frontier, "roc": rocs, "passage": passage},
                  per_sequence)


# ---- Sparse probing, in SAEBench's protocol ----
def binary_task(labels, train, c, rng):
    """Class c against the rest: (train indices, their y, test indices, their y), y = 1 for c: the whole class and as
    many of the others, drawn evenly from each."""
    def part(of):
        positive, *others = (np.flatnonzero(of & (labels == k)) for k in (c, *np.setdiff1d(labels, c)))
        each = -(-len(positive) // len(others))
        negative = rng.permutation(np.concatenate([rng.permutation(other)[:each] for other in others]))
        index = np.concatenate([positive, negative[:len(positive)]])
        return index, (labels[index] == c).astype(int)

    return *part(train), *part(~train)


def sparse_accuracies(features, windows, numbers):
    """Test accuracy of one domain against the rest, mean over domains, by logistic regression on the k of `features`
    [window, d] whose means differ most, for each k of `numbers`, and on all (SAEBench); training windows train."""
    labels = np.unique(windows.domain_of(np.arange(len(windows.tokens))), return_inverse=True)[1]
    train, rng, found = np.arange(len(labels)) < windows.n_train, np.random.default_rng(42), []
    for c in range(labels.max() + 1):
        fit, y, test, truth = binary_task(labels, train, c, rng)
        difference = features[fit[y == 1]].mean(0) - features[fit[y == 0]].mean(0)
        best = np.argsort(-np.abs(difference), kind="stable")
        found.append([LogisticRegression(max_iter=1000).fit(features[fit][:, best[:k]], y).score(
            features[test][:, best[:k]], truth) for k in (*numbers, None)])
    return np.mean(found, 0)


def mean_accuracies(found, numbers):
    """Means over data sets of {features: sparse_accuracies}: flat, and as curves beside the single ones."""
    curves = {name: np.mean([accuracies[name] for accuracies in found], 0) for name in found[0]}
    kinds = *(f"top_{k}" for k in numbers), "all"
    metrics = {f"{name}_{kind}": value for name, values in curves.items() for kind, value in zip(kinds, values)}
    return metrics, curves | {"k": numbers, "data_sets": found}


def pooled_features(store, values):
    """values(batch) [batch, seq, d], mean over the tokens of each window that count: [window, d]."""
    ids, found = np.arange(len(store.windows.tokens)), []
    for part in np.array_split(ids, len(ids) // 32 + 1):
        keep = store.valid(part)[..., None]
        found.append(((values(store.batch(part)) * keep).sum(1) / keep.sum(1)).cpu().numpy())
    return np.concatenate(found)


def probing_baselines(store, features, numbers):
    """sparse_accuracies of pooled features {name: function of a batch}, and of counts of tokens."""
    found = {name: sparse_accuracies(pooled_features(store, values), store.windows, numbers).tolist()
             for name, values in features.items()}
    return found | {"tokens": sparse_accuracies(token_shares(store.windows), store.windows, numbers).tolist()}


def sparse_probing(stores, features, numbers, key):
    """mean_accuracies over stores of pooled features {name: function of a batch}; those of all but "sae", and of counts of
    tokens, are kept beside the store's files, under the key."""
    baselines, found = {name: values for name, values in features.items() if name != "sae"}, []
    for store in stores:
        base = cached_json(store.folder / f"{key}.json", lambda: probing_baselines(store, baselines, numbers))
        found.append(base | {"sae": sparse_accuracies(pooled_features(store, features["sae"]), store.windows, numbers)})
    return mean_accuracies(found, numbers)


def token_shares(windows):
    """Share of each token among those of a window that count, sparse [window, vocabulary]."""
    keep = windows.valid(np.arange(len(windows.tokens)))
    row, column = np.nonzero(keep)
    shape = len(keep), int(windows.tokens.max()) + 1
    return csr_array((1 / keep.sum(1)[row], (row, windows.tokens[row, column])), shape)



def probing_store(run, dataset):
    """Activations of a data set's texts, one a window, scaled as in training."""
    windows, key = probing_windows(
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
    metrics, curves = sparse_probing(
        stores, features, PROBED, fingerprint(
            *sources(TopK, untrained, eval_sparse_probing), TARGET_L0, PROBED, run.sae.d_sae))
    return Result(metrics, {"sparse_probing": curves}, {})


# ---- Hierarchy: level 2 against level 1, and through the model ----
def binary_information(both, first, second, n):
    """Mutual information in nats of two events that happen first and second times in n, both times together."""
    total = 0.0
    for joint, a, b in ((both, first, second), (first - both, first, n - second), (second - both, n - first, second),
                        (n - first - second + both, n - first, n - second)):
        with np.errstate(divide="ignore", invalid="ignore"):
            total = total + np.where(joint > 0, joint / n * np.log(joint * n / np.asarray(a * b, dtype=float)), 0.0)
    return total


def binary_entropy(count, n):
    return binary_information(count, count, count, n)


class Edges(NamedTuple):
    """What parents tell of children, by edge."""
    information: np.ndarray     # [edge] bias-corrected mutual information over the child's entropy
    p: np.ndarray               # [edge] share of circular shifts that reach it
    draws: np.ndarray           # [draw] mean over edges for files drawn with replacement

    @property
    def mean(self):
        return self.information.mean() if len(self.information) else 0.0


def edge_information(parents, children_of, edges, files, draws=200, least_shift=17):
    """Edges of pairs (parent, child) [edge, 2]: I(parent; child) of binary activity, less its mean over circular shifts
    of the parent by at least `least_shift` tokens, over H(child). files [n]: of each token."""
    rng, n, found = np.random.default_rng(0), parents.n, []
    names, of = np.unique(files, return_inverse=True)
    weights = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), draws).T        # [file, draw]
    if n <= 2 * least_shift:
        raise RunnerError(f"{n} held-out tokens are too few for circular shifts of {least_shift}.")
    shifts, sizes = rng.integers(least_shift, n - least_shift, draws), np.bincount(of)
    on, total = np.zeros(2 * n, dtype=bool), np.zeros(draws)
    for parent, child in edges:
        at, times = parents.places[parent], children_of.places[child]
        on[at], on[at + n] = True, True
        both = times[on[times]]
        shifted = on[times[None] + shifts[:, None]].sum(1)
        on[at], on[at + n] = False, False
        observed = binary_information(len(both), len(at), len(times), n)
        null = binary_information(shifted, len(at), len(times), n)
        miller_madow_entropy = max(binary_entropy(len(times), n), 1e-12)
        found.append(((observed - null.mean()) / miller_madow_entropy, (1 + (null >= observed).sum()) / (1 + draws)))
        counts = [np.bincount(of[part], minlength=len(names)) @ weights for part in (both, at, times)]
        drawn = sizes @ weights
        again = binary_information(*counts, drawn) - null.mean()
        total += again / np.maximum(binary_entropy(counts[2], drawn), 1e-12)
    information, p = np.array(found).reshape(-1, 2).T
    return Edges(information, p, total / max(len(edges), 1))


def alike_parents(rates, edges, rng):
    """For each edge (parent, child) another parent, one of the ten nearest in rate."""
    order = np.argsort(rates, kind="stable")
    place = np.argsort(order)
    found = []
    for parent, child in edges:
        low = int(np.clip(place[parent] - 5, 0, max(len(order) - 11, 0)))
        near = order[low:low + 11]
        found.append((rng.choice(near[near != parent]), child))
    return np.array(found)


def information_scores(edges, controls):
    """Mean information of Edges and of {name: Edges} of controls; of each the difference with its 95 % interval over
    files, and q after Benjamini-Hochberg over the controls; share of the edges that are significant after it."""
    found = {"mutual_information": edges.mean,
             "edges_significant": (false_discovery_control(edges.p) < 0.05).mean() if len(edges.p) else 0.0}
    tails = []
    for name, control in controls.items():
        gap = edges.draws - control.draws
        low, high = np.percentile(gap, (2.5, 97.5))
        found |= {f"mutual_information_{name}": control.mean, f"mutual_information_over_{name}": edges.mean - control.mean,
                  f"mutual_information_over_{name}_low": low, f"mutual_information_over_{name}_high": high}
        tails.append(min(1.0, 2 * (1 + min((gap <= 0).sum(), (gap >= 0).sum())) / (1 + len(gap))))
    for name, q in zip(controls, false_discovery_control(tails)):
        found[f"mutual_information_over_{name}_q"] = q
    return found


def label_kinds(windows):
    """Labels of the held-out tokens that count {name: class [n]}: the token, its class with all labels taken together,
    and, where there are labels, its type and its context apart."""
    keep = windows.heldout_tokens()
    found = {"token": windows.tokens[windows.n_train:, 1:].ravel()[keep], "class": token_classes(windows)[keep]}
    if windows.labels is not None and (windows.labels >= 0).any():
        labels = windows.labels[:, 1:].reshape(-1, len(LABELS))[keep]
        found["type"] = labels[:, 0] + 1
        found["context"] = np.unique(labels[:, 1:], axis=0, return_inverse=True)[1].ravel()
    return found


def modal_labels(places, classes):
    """The most frequent class on the tokens where each unit fires."""
    return np.array([np.bincount(classes[at]).argmax() for at in places])


def ward_groups(directions, n_groups):
    """Group [unit] of directions [unit, d] by Ward's method."""
    from sklearn.cluster import AgglomerativeClustering
    return AgglomerativeClustering(int(np.clip(n_groups, 1, len(directions)))).fit_predict(directions)


def kmeans_groups(directions, n_groups):
    from sklearn.cluster import KMeans
    return KMeans(int(np.clip(n_groups, 1, len(directions))), n_init=1, random_state=0).fit_predict(directions)


def clustering_scores(groups, places, kinds, directions):
    """How well groups [unit] follow the labels of the units: adjusted mutual information and adjusted Rand index with
    the modal label of each of `kinds`; and the silhouette of the directions [unit, d], which proves nothing where a
    loss trained it."""
    from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score, silhouette_score
    found = {}
    for kind, classes in kinds.items():
        labels = modal_labels(places, classes)
        found |= {f"ami_{kind}": adjusted_mutual_info_score(labels, groups), f"ari_{kind}": adjusted_rand_score(labels, groups)}
    if 1 < len(np.unique(groups)) < len(groups):
        found["silhouette"] = silhouette_score(directions, groups)
    return found


class Levels(NamedTuple):
    """Two levels of live units: the children (level 1, or those of a flat dictionary) and the parent of each."""
    lower: Activity
    upper: Activity
    parents: np.ndarray     # [child] index into upper
    children_of: np.ndarray    # live children whose parent is live

    @classmethod
    def of(cls, lower, upper, parents, files, live):
        alive = lower.live(files, *live) & upper.live(files, *live)[parents]
        return cls(lower, upper, parents, np.flatnonzero(alive))

    def families(self):
        """{parent: its live children}, of parents that have at least two."""
        order = self.children[np.argsort(self.parents[self.children], kind="stable")]
        parents, first = np.unique(self.parents[order], return_index=True)
        return {int(p): part for p, part in zip(parents, np.split(order, first[1:])) if len(part) > 1}

    def edges(self):
        found = [(parent, child) for parent, part in self.families().items() for child in part]
        if not found:
            raise RunnerError(f"no parent has two live children: {len(self.children)} live ones of {len(self.parents)} have "
                            "a live parent, each another one.")
        return np.array(found)

    def information(self, files, edges=None):
        return edge_information(self.upper, self.lower, self.edges() if edges is None else edges, files)


def or_groups(activity, groups):
    """Units in groups [unit], as Levels: a group fires where one of its units does."""
    return Levels(activity, activity.union(groups), groups, np.arange(len(groups)))


def levels_of_codes(windows, live, lower, upper, parents):
    """Levels of codes of the held-out tokens, sparse [token, unit] by column."""
    both = (Activity.of(codes, windows.heldout_tokens()) for codes in (lower, upper))
    return Levels.of(*both, parents.cpu().numpy(), heldout_files(windows), live)


def hierarchy_scores(windows, levels_of_codes, starts, flat, directions, flat_directions, live):
    """What two Levels tell: -> metrics, curves, families.

    starts: {name: Levels} with the level 2 that was not trained; flat: codes of a flat SAE, sparse; directions of the
    features of level 1 and of the flat SAE's latents [unit, d]; live: (firings, files) of a live unit."""
    files = heldout_files(windows)
    if not levels_of_codes.families():                               # no parent has two live children
        return {"groups": 0}, {}, {}
    rng, edges, families = np.random.default_rng(0), levels_of_codes.edges(), levels_of_codes.families()
    units, directions, flat_directions = levels_of_codes.children, directions.cpu().numpy(), flat_directions.cpu().numpy()
    groups = np.unique(levels_of_codes.parents[units], return_inverse=True)[1]
    flat = Activity.of(flat, windows.heldout_tokens())
    of_flat = np.flatnonzero(flat.live(files, *live))
    flat, flat_directions = flat.only(of_flat), flat_directions[of_flat]
    n_groups = max(1, round(len(of_flat) * (groups.max() + 1) / len(units)))           # as many units in each
    kinds, own = label_kinds(windows), [levels_of_codes.lower.places[i] for i in units]
    metrics = {"groups": groups.max() + 1, "group_size": len(units) / (groups.max() + 1),
               "singletons": (np.bincount(groups) == 1).mean(), "duplicates": duplicate_fraction(families, directions)}
    tables = {"": (groups, own, directions[units])}
    for method in (ward_groups, kmeans_groups):
        tables[f"_{method.__name__}"] = method(flat_directions, n_groups), flat.places, flat_directions
        tables[f"_{method.__name__}_level_1"] = method(directions[units], groups.max() + 1), own, directions[units]
    for name, (found, places, d) in tables.items():
        metrics |= {f"{key}{name}": value for key, value in clustering_scores(found, places, kinds, d).items()}
    controls = {"non_edges": levels_of_codes.information(files, alike_parents(levels_of_codes.upper.rates(), edges, rng)),
                "ward": or_groups(flat, tables["_ward"][0]).information(files)}
    controls |= {name: start.information(files) for name, start in starts.items()}
    metrics |= information_scores(levels_of_codes.information(files), controls)
    shown = sorted(families, key=lambda p: -len(families[p]))[:12]
    children_of = np.concatenate([families[p][:3] for p in shown])
    pairs = np.array([(p, i) for p in shown for i in children_of])
    matrix = edge_information(levels_of_codes.upper, levels_of_codes.lower, pairs, files, 50).information
    curves = {"information_matrix": matrix.reshape(len(shown), -1).round(4), "matrix_parents": np.array(shown),
              "matrix_children": children_of, "matrix_family": np.array([levels_of_codes.parents[i] for i in children_of])}
    return metrics, curves, families


def duplicate_fraction(families, directions):
    """Share of the children that point as a sibling does, cosine above .95."""
    same, n = 0, 0
    for part in families.values():
        unit = normalize(directions[part])
        cosine = unit @ unit.T - 2 * np.eye(len(part))
        same, n = same + (cosine.max(1) > 0.95).sum(), n + len(part)
    return same / max(n, 1)


def evenly_by_rate(families, rates, n):
    """n parents, evenly spaced in the order of their rates."""
    order = sorted(families, key=lambda p: (rates[p], p))
    return [order[i] for i in np.unique(np.linspace(0, len(order) - 1, n).round().astype(int))] if order else []


def row_cosines(a, b):
    """Of rows [n, d]; 0 where one is zero."""
    return (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-12)


def matched_controls(size, parent, rates):
    """Of latents of `size` [windows, seq, d_sae]: where the parent is active beside another one, [windows, seq]; which of
    those is nearest to it in log size and log rate [d_sae] together; and which of all in rate."""
    size, rate = size.log(), torch.as_tensor(rates, device=size.device).clamp_min(1e-9).log()
    near = (rate - rate[parent]).abs()
    near[parent] = math.inf
    apart = (size - size[..., parent, None]).abs() + near
    apart, rival = apart.nan_to_num(math.inf, math.inf).min(2)
    return size[..., parent].isfinite() & apart.isfinite(), rival, near.argmin()


def summarise_ablation(docs, on, changes, rises, h, children_of):
    """Of one parent, at the tokens `on` [windows, seq] of documents [windows], n in all, what changes in the logits,
    [2 + children, n, vocab], where it, its rival, each child is ablated; what in those, [2, m, vocab], where it and its rival
    are put in; and level 1 there, h [2][m, d_1]. -> cosines with the children's sum [n]; mean rise of the ten tokens that
    this sum lowers most; share of the children that then fire."""
    files = docs[on.nonzero()[:, 0].cpu().numpy()]
    changes, rises = changes.cpu().numpy(), rises.cpu().numpy()
    fires = [(part[:, children_of] > 0).float().mean().item() for part in h]
    own, other, *finite_number = changes
    summed = np.sum(finite_number, 0)
    top = np.argsort((summed - summed.mean(1, keepdims=True)).mean(0), kind="stable")[:10]
    up = (rises - rises.mean(2, keepdims=True))[:, :, top].mean((1, 2))
    return {"files": files, "own": row_cosines(own, summed), "rival": row_cosines(other, summed), "patched_rise": up[0],
            "rival_rise": up[1], "patched_children": fires[0], "rival_children": fires[1]}


def causal_scores(traces, windows):
    """Of traces, one a parent (see `traced`): mean cosine of a parent's effect with its children's summed effects,
    and of its rival's; their ratio, the causal specificity; p of the difference, by sign flips of files; what patching
    does to the logits of the children's top tokens, and to the children; and the cosines by document [sample]."""
    if not traces:
        return {}, {}
    files, own, rival = (np.concatenate([trace[name] for trace in traces]) for name in ("files", "own", "rival"))
    means = np.array([[values[files == file].mean() for values in (own, rival)] for file in np.unique(files)])
    gap, rng = means[:, 0] - means[:, 1], np.random.default_rng(0)
    flips = rng.choice((-1.0, 1.0), (10_000, len(gap))) @ gap
    found = {"causal_cosine": own.mean(), "causal_cosine_rival": rival.mean(),
             "causal_specificity": own.mean() / max(rival.mean(), 1e-3),
             "causal_p": (1 + (flips >= gap.sum() - 1e-12).sum()) / (1 + len(flips))}
    for name in ("rise", "children"):
        a, b = (np.array([trace[key] for trace in traces]) for key in (f"patched_{name}", f"rival_{name}"))
        found |= {f"patched_{name}": a.mean(), f"patched_{name}_rival": b.mean(), f"patched_{name}_share": (a > b).mean()}
    return found, {f"causal_cosine{end}": windows.by_document(values, files)
                   for end, values in (("", own), ("_rival", rival))}


def windows_with(windows, activity, unit, n=4):
    """Ids of up to n windows, one a file, in which a unit fires most, and of as many of other files in which it fires
    least."""
    seq, files = windows.tokens.shape[1] - 1, windows.doc_ids[windows.n_train:]
    rows = windows.heldout_tokens()[activity.places[unit]] // seq
    counts = np.bincount(rows, minlength=len(files)) + np.random.default_rng(unit).random(len(files)) / 2  # ties: any
    order = np.argsort(-counts)
    first = order[np.sort(np.unique(files[order], return_index=True)[1])]          # the best window of each file
    chosen = first[:min(n, len(first) // 2)]
    others = order[::-1][~np.isin(files[order[::-1]], files[chosen])]
    absent = others[np.sort(np.unique(files[others], return_index=True)[1])][:n]
    return windows.n_train + chosen, windows.n_train + absent



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
    on, rival, like = matched_controls(z * norm, parent, rates)
    deltas = [edited(z, latent, 0.0, on) for latent in (parent, rival[..., None])]
    deltas += [-(h[..., i] * on)[..., None] * sae.lower.W_dec[i] for i in children]
    changes, value = logit_changes(run, ids, deltas, on), z[..., parent][on].mean()
    batch = run.store.batch(absent)
    z = sae.encode(batch).dense()
    where = run.store.valid(absent) & (batch.positions % 8 == 1) & (z[..., parent] == 0)
    deltas = [edited(z, i, value * norm[parent] / norm[i], where) for i in (parent, like)]
    rises = logit_changes(run, absent, deltas, where)
    h = [sae.levels(batch._replace(x=batch.x + delta)).dense()[where] for delta in deltas]
    return summarise_ablation(run.store.windows.doc_ids[ids], on, changes, rises, h, children)


@torch.no_grad()
def eval_hierarchy(run):
    """Mutual information of the levels, clustering, causal tracing of parents."""
    sae, store, windows = run.sae, run.store, run.store.windows
    ids, (flat, share) = windows.heldout(), flat_peer(run)
    (lower, rows, _), (peer, flat_rows, _) = (
        encode_windows(s, store, ids) for s in (sae.lower, flat))
    levels = functools.partial(levels_of_codes, windows, run.live, lower)
    both, starts = levels(run.heldout[0], sae.parents()), {}
    for name in ("untrained", "start"):
        start = copy.deepcopy(sae)
        torch.manual_seed(0)
        start.begin(store.batch(ids[:32]), grouped=name == "start")
        starts[name] = levels(encode_windows(start, store, ids)[0], start.parents())
    metrics, curves, families = hierarchy_scores(
        windows, both, starts, peer, sae.lower.W_dec, flat.W_dec, run.live)
    rates, variance = both.upper.rates(), controls(run)["variance"]
    parents = evenly_by_rate(families, rates, 2 if run.probing else TRACED)
    traces = [trace(run, p, families[p], rates, *windows_with(windows, both.upper, p))
              for p in parents]
    curves["tree"] = family_tree(
        windows, load_tokenizer(), both, families, parents, sae.W_dec, traces)
    causal, per_sequence = causal_scores(traces, windows)
    metrics |= causal | {"level_1_l0": np.nanmean(rows["l0"]), "flat_trained": share,
                         "level_1_explained_variance": explained_variance(rows, variance),
                         "flat_explained_variance": explained_variance(flat_rows, variance)}
    return Result(metrics, curves, per_sequence)


# ---- Compositions: recovery of known ones, interaction and reuse ----
def aurocs(values, positive):
    """AUROC of each column of non-negative values [n, d], sparse in n, for positive [n]. A column that fires on less
    than a fifth of the positives, for which it is at most .6, counts as .5."""
    found, n = np.full(values.shape[1], 0.5), positive.sum()
    often = np.flatnonzero((values[positive] > 0).mean(0) >= 0.2)
    ranks = rankdata(values[:, often], axis=0)[positive].sum(0)
    found[often] = (ranks - n * (n + 1) / 2) / (n * (len(positive) - n))
    return found


def recovery_scores(truth, dev, test, dictionary):
    """How well latents dev and test [token, d_sae] >= 0 of truth's DEV and TEST, and a dictionary [d_sae, 96], match the
    truth: mean cosine with the true directions under the best assignment (Hungarian); mean AUROC, on TEST, of the latent
    that is best on DEV: of primitives, and of pairs against tokens with exactly one of the two, for pairs seen together
    in training and pairs that never were ("unseen"); and the smaller of the two latents of its primitives instead
    ("minimum"). One latent that is one of the two primitives has .75 there."""
    cosine = truth.directions @ normalize(jsonable(dictionary)).T
    rows, columns = linear_sum_assignment(-cosine)
    found = np.zeros(len(cosine))                           # 0 for what no row is left for
    found[rows] = cosine[rows, columns]
    WATCHDOG.renew()
    scores = {"cosine_primitives": found[:PRIMITIVES].mean(), "cosine_compositions": found[PRIMITIVES:].mean()}
    on = [truth.amounts[part] > 0 for part in truth.parts()[1:]]
    few = RunnerError("too few synthetic tokens: no pair of primitives is there often enough.")
    if not all(part.any(0).all() for part in on):
        raise few
    best = [aurocs(dev, on[0][:, i]).argmax() for i in range(PRIMITIVES)]
    scores["auroc_primitives"] = np.mean([roc_auc_score(on[1][:, i], test[:, b]) for i, b in enumerate(best)])
    rows = []
    for i, j in truth.wired.pairs:
        one = [part[:, i] | part[:, j] for part in on]
        both = [(part[:, i] & part[:, j])[rows_] for part, rows_ in zip(on, one)]
        if min(part.sum() for part in both) < 3:
            rows.append((np.nan, np.nan, -1))
            continue
        chosen = aurocs(dev[one[0]], both[0]).argmax()
        least = np.minimum(test[one[1], best[i]], test[one[1], best[j]])
        rows.append((roc_auc_score(both[1], test[one[1], chosen]), roc_auc_score(both[1], least), chosen))
    rows = np.array(rows)
    for name, part in (("seen", truth.wired.seen), ("unseen", ~truth.wired.seen)):
        if np.isnan(rows[part, 0]).all():
            raise few
        scores[f"auroc_{name}"], scores[f"minimum_{name}"] = np.nanmean(rows[part, :2], 0)
    return scores


def keep_strongest(values, k):
    """Values [n, d] >= 0 with all but the k largest of each row set to 0."""
    least = np.partition(values, -k, axis=1)[:, -k, None]
    return np.where(values >= least, values, 0.0)


def signed_parts(values):  # [n, d] -> [n, 2 d] >= 0
    return np.concatenate([np.maximum(values, 0), np.maximum(-values, 0)], 1)


def recovery_baselines(truth, k, d_sae, seed=0):
    """`recovery` of PCA (the k largest signed components of a token), of NMF of [x+, x-] with as many components as
    there are true features (the k largest), and of a random dictionary of d_sae rows, as TopK reads it."""
    train, *parts = (truth.flat_x()[part] for part in truth.parts())
    pca = PCA(DIMENSIONS, random_state=seed).fit(train)
    nmf = MiniBatchNMF(PRIMITIVES + COMPOSED, init="nndsvda", batch_size=1024, max_iter=20, random_state=seed)
    nmf.fit(signed_parts(train[:8192]))
    random = normalize(np.random.default_rng((seed, 1)).standard_normal((d_sae, DIMENSIONS)))
    codes = {"pca": (lambda x: signed_parts(pca.transform(x)), np.concatenate([pca.components_, -pca.components_])),
             "nmf": (lambda x: nmf.transform(signed_parts(x)), nmf.components_[:, :DIMENSIONS] - nmf.components_[:, DIMENSIONS:]),
             "random": (lambda x: np.maximum((x - train.mean(0)) @ random.T, 0), random)}
    return {name: recovery_scores(truth, *(keep_strongest(code(part), k) for part in parts), dictionary)
            for name, (code, dictionary) in codes.items()}


def ablation_effects(compose, f, fires, rng, draws=8):
    """What each composition of a token loses where one of its features is dropped, or two.

    compose(f) gives compositions [n, d_c] of features f [n, k] >= 0; fires [n, d_c] are those that count. -> singles:
    (token, slot, composition, c(f) - c(f without slot)); pairs, `draws` at random of each token's active features:
    (token, slot, slot, the composition that interacts most, |c(f) - c(f\\i) - c(f\\j) + c(f\\ij)| of it)."""
    def without(*slots):
        left = f.copy()
        for slot in slots:
            left[row, slot] = 0
        return compose(left)

    whole, row, k = compose(f), np.arange(len(f)), f.shape[1]
    alone = np.stack([without(slot) for slot in range(k)], 1)
    token, slot, of = np.nonzero((f > 0)[:, :, None] & fires[:, None])
    singles = token, slot, of, (whole[token, of] - alone[token, slot, of]).astype(float)
    pairs = []
    for _ in range(draws):
        first, second = np.where(f > 0, rng.random(f.shape), -1).argsort(1)[:, -2:].T
        joint = np.abs(whole - alone[row, first] - alone[row, second] + without(first, second)) * fires
        most = joint.argmax(1)
        use = (f[row, first] > 0) & (f[row, second] > 0) & fires.any(1)
        pairs.append([part[use] for part in (row, first, second, most, joint[row, most].astype(float))])
    return singles, [np.concatenate(part) for part in zip(*pairs)]


def composition_scores(compose, ids, f, codes, attention, text, rng, least):
    """Metrics and curves of compositions, compose(f): features ids [n, k] with values f [n, k] of n tokens, text [n]; codes
    [n, d_c] after the bottleneck; attention [n, heads, k, k] between features, or None; `least`: see reuse."""
    device, (ids, f, codes) = f.device, (part.cpu().numpy() for part in (ids, f, codes))
    (token, slot, of, effect), pairs = ablation_effects(
        lambda f: compose(torch.from_numpy(f).to(device)).cpu().numpy(), f, codes > 0, rng)
    metrics = {"compositions_per_token": (codes > 0).sum(1).mean(), "live_compositions": (codes > 0).any(0).mean()}
    if not len(token):                                      # the features take all of TARGET_L0
        return metrics, {}
    row, a, b, composition, interaction = pairs
    feature, first, second = ids[token, slot], ids[row, a], ids[row, b]
    found, took, random = feature_reuse(token * codes.shape[1] + of, feature, of, effect, rng, least=least)
    metrics |= found
    if attention is not None:
        attention = attention.mean(1).cpu().numpy()
        seen = attention[row, a, b] + attention[row, b, a]
        metrics |= interaction_scores(first, second, seen, interaction)
    return metrics, {
        "patterns": composition_patterns(codes, feature, of, effect, first, second, composition, interaction, text),
        "reuse": np.bincount(took), "reuse_null": np.mean([np.bincount(r, minlength=len(took)) for r in random], 0)[:40]}


def interaction_scores(first, second, attention, effect):
    """Whether attention tells which features act together. Of each instance [n] two features, the attention between them
    and the size of their interaction; by pair of features the means: Spearman's correlation of the two, and the AUROC
    of attention for the tenth of the pairs that interact most against as many pairs with like numbers of instances."""
    low, high = np.minimum(first, second), np.maximum(first, second)
    _, index, counts = np.unique(low * (high.max() + 1) + high, return_inverse=True, return_counts=True)
    attention, effect = (np.bincount(index, values) / counts for values in (attention, effect))
    if len(counts) < 20 or effect.max() == effect.min():    # none acts together with another
        return {"feature_pairs": len(counts)}
    chosen = np.argsort(-effect, kind="stable")[:len(effect) // 10]
    others = rate_matched(counts, chosen)
    truth = np.arange(len(chosen) + len(others)) < len(chosen)
    return {"attention_spearman": spearmanr(attention, effect).statistic,
            "attention_auroc": roc_auc_score(truth, attention[np.concatenate([chosen, others])]), "feature_pairs": len(counts)}


def gini(values):
    """Gini coefficient of values [n] >= 0."""
    order = np.sort(values)
    n = len(order)
    return (2 * np.arange(1, n + 1) - n - 1) @ order / max(n * order.sum(), 1e-12)


def feature_reuse(group, feature, composition, effect, rng, draws=50, least=5):
    """In how many compositions each feature takes part: in how many its ablation acts above the 95th percentile of what
    it is when effects are shuffled among the features of a token.

    Of each instance [n] its group (token and composition), feature, composition, effect; pairs of feature and
    composition with fewer than `least` instances are left out. -> metrics; the counts of features with any such pair;
    and of `draws` random bipartite graphs with as many edges the counts [draws, feature]."""
    edges, index, counts = np.unique(np.stack([feature, composition]), axis=1, return_inverse=True, return_counts=True)
    index, known = index.ravel(), counts >= least
    total, null = np.bincount(index, effect), []
    by_group = np.argsort(group, kind="stable")
    for _ in range(draws):
        order = np.lexsort((rng.random(len(group)), group))
        shuffled = np.empty_like(effect)
        shuffled[by_group] = effect[order]
        null.append(np.bincount(index, shuffled, len(counts)))
    acts = known & (total > np.quantile(null, 0.95, axis=0) + 1e-9 * np.abs(total).max())
    features, of = np.unique(edges[0, known], return_inverse=True)
    if not acts.any():
        return {"reuse_edges": 0.0}, np.zeros(1, int), np.zeros((1, 1), int)
    took = np.bincount(of, acts[known], len(features)).astype(int)
    random = np.array([np.bincount(rng.choice(of, took.sum(), replace=False), minlength=len(features))
                       for _ in range(draws)])
    ginis = [gini(row) for row in random]
    return {"reuse_mean": took.mean(), "reuse_gini": gini(took), "reuse_gini_null": np.mean(ginis),
            "reuse_gini_null_95": np.quantile(ginis, 0.95), "reused_fraction": (took > 1).mean(),
            "reuse_edges": acts.sum() / known.sum()}, took, random


def composition_patterns(codes, feature, composition, effect, first, second, of, interaction, text, most=16):
    """What the `most` compositions of the largest total value are made of: {"compositions": ids; "features": the features
    that act most on them; "effects" [composition, feature]: mean change of it where the feature is dropped, over its mean
    value; "pairs": of each the three pairs of features with the largest mean interaction; "tokens": of each the tokens
    [str] where it is largest}. codes [token, d_c]; instances as of `reuse`, and of pairs."""
    top = np.argsort(-codes.sum(0), kind="stable")[:most]
    top = top[codes[:, top].sum(0) > 0]
    mean = codes.sum(0) / np.maximum((codes > 0).sum(0), 1)
    chosen = []
    for c in top:
        here = composition == c
        names, index = np.unique(feature[here], return_inverse=True)
        chosen += list(names[np.argsort(-np.bincount(index, effect[here]), kind="stable")[:2]])
    features = np.array(list(dict.fromkeys(chosen)))
    table, found = np.zeros((len(top), len(features))), []
    for row, c in zip(table, top):
        for column, name in enumerate(features):
            here = (composition == c) & (feature == name)
            row[column] = effect[here].mean() / mean[c] if here.any() else 0.0
        low, high = np.minimum(first, second)[of == c], np.maximum(first, second)[of == c]
        pairs, index = np.unique(np.stack([low, high]), axis=1, return_inverse=True)
        means = np.bincount(index.ravel(), interaction[of == c]) / np.maximum(np.bincount(index.ravel()), 1)
        found.append([(*pairs[:, i].tolist(), float(means[i])) for i in np.argsort(-means, kind="stable")[:3]])
    return {"compositions": top, "features": features, "effects": table.round(4), "pairs": found,
            "tokens": [[text[i] for i in np.argsort(-codes[:, c], kind="stable")[:5] if codes[i, c] > 0] for c in top]}



def recovered(run, task, rho):
    """An SAE of this variant on synthetic activations -> its scores, those of baselines."""
    n_tokens, (width, k) = 2 ** 13 if run.probing else SYNTHETIC_TOKENS, SYNTHETIC_SAE
    made = task, rho, CONTEXT_LENGTH, n_tokens, FORGET
    truth, folder = make_synthetic(*made), cache_folder() / "synthetic"
    store = Store(folder, truth.windows, DIMENSIONS, torch.float32)
    store.maps = torch.from_numpy(truth.x).to(DEVICE).split(SHARD_WINDOWS)
    store.normalise()
    sae = make_sae(store.d_in, width, run.seed, k)
    stages = [stage._replace(epochs=1) if run.probing else stage
              for stage in planned_stages(type(sae))]
    with tempfile.TemporaryDirectory() as state:
        train(sae, store, stages, run.seed, batch_windows(store), math.inf, Path(state, "sae"))
    z, rows, _ = encode_windows(sae.eval(), store, store.windows.heldout())
    scores = recovery_scores(truth, *np.split(z.toarray(), 2), sae.W_dec)
    scores |= {"explained_variance": explained_variance(rows, variance_by_position(store)[1]),
               "l0": np.nanmean(rows["l0"])}
    key = fingerprint(made, SYNTHETIC_SAE, Path(data.synthetic.__file__).read_text(), *map(
        inspect.getsource, (recovery_scores, recovery_baselines)))
    return scores, cached_json(folder / f"{key}.json",
                        lambda: recovery_baselines(truth, k, width))


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
    metrics, curves = composition_scores(
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
    return latents_page(store.windows, load_tokenizer(), latents, z,
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


def run_evaluation(evaluation, run_script):
    """Its result as a dict; the SAE is as before it."""
    WATCHDOG.renew()
    before = copy.deepcopy(run_script.sae.state_dict())
    result, after = evaluation(run_script), run_script.sae.state_dict()
    changed = [name for name, value in before.items() if not torch.equal(value, after[name])]
    if changed or run_script.sae.training:
        what = f"changes {changed} of the SAE" if changed else "leaves the SAE in training mode"
        raise RunnerError(f"{evaluation.__name__} {what}: it must work on copy.deepcopy(run.sae).")
    if not hasattr(result, "_asdict"):
        raise RunnerError(f"{evaluation.__name__} returns a {type(result).__name__}, wanted Result(metrics, curves, per_sequence).")
    metrics = {key: finite_number(value, f"metric {key!r} of {evaluation.__name__}") for key, value in result.metrics.items()}
    return {"metrics": metrics, "curves": jsonable(result.curves), "per_sequence": jsonable(result.per_sequence)}


def with_training(results, log, train_seconds):
    """Results {evaluation: {"metrics", "curves", "per_sequence"}} of one seed, the templates' training figures and the log
    in the first."""
    first = next(iter(results.values()))
    training = {"final_train_loss": np.mean([*logged_values(log, "losses", "reconstruction")][1][-5:]), "best_val_loss": min(log["val_loss"]),
                "total_train_time": train_seconds}
    first["metrics"] = training | first["metrics"]
    first["curves"] = first["curves"] | {"training": log}
    first["metrics"] = {name: finite_number(value, f"metric {name!r}") for name, value in first["metrics"].items()}
    return results


PLAIN_WEIGHTS = {"W_enc", "b_enc", "W_dec", "b_dec"}
SAELENS = {"standard": PLAIN_WEIGHTS, "topk": PLAIN_WEIGHTS, "jumprelu": PLAIN_WEIGHTS | {"threshold"},
           "gated": {"W_enc", "W_dec", "b_dec", "b_gate", "r_mag", "b_mag"}}   # the architectures that it knows
SAELENS_OTHERS = {"abstopk", "matching_pursuit", "temporal", "transcoder", "skip_transcoder", "jumprelu_transcoder",
                  "jumprelu_skip_transcoder"}                           # and those whose equations are none of ours


def saelens_latents(weights, architecture, k, x):
    """What SAELens would make of x [..., d_in] with a run's weights: [..., d_sae]."""
    pre = (x - weights["b_dec"]) @ weights["W_enc"]
    if architecture == "gated":
        return torch.relu(weights["r_mag"].exp() * pre + weights["b_mag"]) * (pre + weights["b_gate"] > 0)
    pre = pre + weights["b_enc"]
    if architecture == "topk":
        values, ids = pre.topk(k)
        return torch.zeros_like(pre).scatter(-1, ids, torch.relu(values))
    return torch.relu(pre) * (pre > weights.get("threshold", 0.0))


def save_sae(folder, weights, architecture, k, metadata):
    """SAELens's two files, of weights {name: tensor} that take the model's own activations."""
    if architecture in SAELENS_OTHERS:
        raise RunnerError(f"architecture = {architecture!r} is another SAE of SAELens's: give the class a name of its own.")
    if architecture in SAELENS and (others := sorted(set(weights) ^ SAELENS[architecture])):
        raise RunnerError(f"architecture = {architecture!r} is SAELens's, which knows {sorted(SAELENS[architecture])}; {others} "
                        "differ. Give the class an `architecture` of its own.")
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().float().cpu().contiguous() for name, value in weights.items()}
    d_in, d_sae = len(weights.get("lower.W_enc", weights["W_enc"])), len(weights["W_dec"])
    metadata = metadata | {"sae_lens_version": "6.54.12"}           # of the layout; without it SAELens drops the metadata
    cfg = {"architecture": architecture, "d_in": d_in, "d_sae": d_sae, "dtype": "float32", "device": "cpu",
           "apply_b_dec_to_input": True, "metadata": metadata, "normalize_activations": "none", "reshape_activations": "none"}
    if architecture == "topk":
        cfg |= {"k": k, "rescale_acts_by_decoder_norm": False}
    save_file(weights, folder / "sae_weights.safetensors")
    (folder / "sae_weights.safetensors").chmod(0o644)               # safetensors makes it readable for its owner alone
    (folder / "cfg.json").write_text(json.dumps(cfg, indent=1))


def exported_weights(sae, read):
    """The weights that an SAE exports: its parameters and what it adds, then those of `read`, without what it drops."""
    added, ablation_effects = sae.exported()
    weights = dict(sae.named_parameters()) | added | read
    for name in ablation_effects:
        del weights[name]
    return weights


def recorded_config(constants, windows, steps):
    """The UPPER_CASE ones of a module's constants, the data's figures, versions, and of the steps (planned, done) of each
    seed whether all were done."""
    import transformers
    jsonable = {name: value for name, value in constants.items() if name.isupper() and name != "SOURCE"
             and isinstance(value, str | int | float | tuple | None)}
    planned, done = steps[0]
    return jsonable | {"steps_planned": planned, "steps_done": done, "budget_hit": any(a != b for a, b in steps),
                    "evaluation_files": len(windows.sample()),
                    "data_hash": fingerprint(zlib.crc32(windows.tokens.tobytes())),
                    "torch": torch.__version__, "transformers": transformers.__version__}


def summary_text(info):
    """A paragraph on a run: what it trained on what, and the means, of final_info.json's content."""
    c = next(iter(info.values()))["config"]
    off = f" without {', '.join(c['ABLATE'])}" if c["ABLATE"] else ""
    planned, done = sum(c["steps_planned"]), sum(c["steps_done"])
    cut = f" of {planned:,} planned, cut to the time budget" if c["budget_hit"] else ""
    means = []
    for entry in info.values():
        for name, value in entry["means"].items():
            name = name.removesuffix("_mean")
            error = entry.get("stderrs", {}).get(f"{name}_stderr")
            means.append(f"{name} {value:.4g}" + ("" if error is None else f" ± {error:.2g}"))
    return (f"{c['SAE_VARIANT']}{off}, {c['d_sae']:,} latents with TARGET_L0 {c['TARGET_L0']}, on {c['MODEL_NAME']} after block "
            f"{c['layer']}: {done:,} steps{cut} on {c['TRAIN_TOKENS']:,} tokens of {c['DATASET']}, seeds "
            f"{', '.join(map(str, c['SEEDS']))}; measured on {c['evaluation_files']} held-out files. {', '.join(means)}.")



# ---- Results ----
def evaluate(run, train_seconds):
    """{evaluation: Result as a dict} of one seed, the templates' training figures first."""
    run.sae.eval()
    results = {name: run_evaluation(EVALUATIONS[name][0], run) for name in EVALS}
    page, detection = features(run)
    results[EVALS[0]]["metrics"] |= detection
    return with_training(results, run.log, train_seconds) | {"features": page}


def export(sae, store, layer, folder):
    """SAELens's two files, the inputs' centring and scaling folded in; where other parameters than
    SAELens knows may read inputs, both stand beside them."""
    lower = getattr(sae, "lower", sae)  # what touches x
    scaled = {"W_enc": lower.W_enc / store.scale, "W_dec": lower.W_dec * store.scale,
              "b_dec": lower.b_dec * store.scale + store.mean}
    weights = exported_weights(sae, {"lower." * (lower is not sae) + name: value
                                    for name, value in scaled.items()})
    if sae.architecture not in SAELENS:
        weights |= {"input_mean": store.mean, "input_scale": torch.tensor(store.scale)}
    save_sae(folder, weights, sae.architecture, sae.k, {
        "sae_variant": SAE_VARIANT, "model_name": MODEL_NAME, "hook_layer": layer,
        "hook_name": f"blocks.{layer}.hook_resid_post", "dataset_path": DATASET,
        "context_size": CONTEXT_LENGTH, "prepend_bos": True})


def write_results(folder, seeds, store, layer, timing):
    """What run_seed gave for each of SEEDS -> final_info.json's content; writes all files."""
    for seed, (sae, *_) in zip(SEEDS, seeds):
        export(sae, store, layer, folder if seed == SEEDS[0] else folder / f"seed_{seed}")
    results, steps = [result for _, result, *_ in seeds], [steps for _, _, *steps in seeds]
    config = recorded_config(globals(), store.windows, steps) | {
        "layer": layer, "d_in": store.d_in, "d_sae": seeds[0][0].d_sae}
    headlines = {name: means for name, (*_, means) in EVALUATIONS.items()}
    return write_result_files(folder, results, headlines, config, timing, SOURCE, summary_text)


# ---- Checks at the door ----
def check_config(constants, variants, evaluations):
    """The constants of experiment.py by name: what would be right for each. Others need no rule."""
    check, choice, whole, positive, text, several, span = setting_rules(constants)
    choice(SAE_VARIANT=" ".join(variants), ATTENTION="causal centred", DRIVE="u z",
           TSAE_READING="paper code", TRAIN_ON="both forget retain", SELECTION="ratio frequency",
           BUFFER_POSITIONS="learned sinusoidal", MATCHER="logistic attention",
           LEVEL_SPARSITY="topk l1")
    whole("TRAIN_TOKENS TARGET_L0 WINDOW CONTRAST_SPAN HEADS HEAD_WIDTH BUFFER CLAMPED MATCHED "
          "MATCHER_WINDOW COMPOSITION_HEADS COMPOSITION_HEAD_WIDTH")
    positive("COMPOSITIONS", 0.9)
    positive("COMPOSITION_SLOTS", 1)
    whole("CONTEXT_LENGTH", 8)
    whole("EVAL_FILES", 2)
    whole("BATCH_TOKENS", constants["CONTEXT_LENGTH"])
    whole("LAYER", 0, [None])
    positive("EXPANSION TIME_BUDGET_MINUTES EPOCHS_SCALE REGULARISATION CONSISTENCY_WEIGHT "
             "CONTRAST_WEIGHT DENSITY COSINE_WEIGHT GROUP_WEIGHT")
    positive("CONSISTENT_FRACTION", 1)
    positive("LEARNING_RATE", others=[None])
    positive("TEMPERATURE", others=["learned", "scheduled"])
    text("MODEL_NAME DATASET FORGET")
    text("FORGET_QUESTIONS RETAIN_QUESTIONS", [None])
    span("TRAIN_POSITIONS", constants["CONTEXT_LENGTH"])
    check("LEVEL_WIDTHS", "(level 1, level 2), falling to TARGET_L0 at least", lambda v: type(
        v) is tuple and [type(x) for x in v] == [int, int] and v[0] >= v[1] >= constants["TARGET_L0"], [None])
    check("LIVE STABILITY_LAGS FAR_LAGS PROBING_SIZE SYNTHETIC_SAE", "two whole numbers from 1",
          lambda v: type(v) is tuple and len(v) == 2 and all(type(x) is int and x > 0 for x in v))
    several("SYNTHETIC_TASKS", TASKS)
    several("SEEDS", range(2 ** 31))
    name = constants["SAE_VARIANT"]
    variant = variants[name]
    check_curriculum(variant, name)
    for evaluation, entry in evaluations.items():
        if not (isinstance(entry, tuple) and len(entry) == 3 and callable(entry[0]) and isinstance(entry[2], tuple)):
            raise RunnerError(f"EVALUATIONS[{evaluation!r}] is a {type(entry).__name__}, wanted (function, what it asks of a variant, "
                            "(names of headline metrics,)), with all commas.")
    several("EVALS", [evaluation for evaluation, (_, asks, _) in evaluations.items() if hasattr(variant, asks)], f" for {name}")
    parts = set(variant.components).union(*(stage.weights for stage in variant.curriculum))
    several("ABLATE", sorted(parts - {"reconstruction"}), f" for {name}", 0)


CURRICULUM_EPOCHS = 20     # of a curriculum


def check_curriculum(variant, name):
    """A class with a tuple of stages, each with some epochs."""
    if not inspect.isclass(variant):
        raise RunnerError(f"SAE_VARIANTS[{name!r}] is a {type(variant).__name__}, wanted a class.")
    stages = variant.curriculum if isinstance(variant.curriculum, tuple) else [None]
    if not all(hasattr(stage, "epochs") for stage in stages):
        raise RunnerError(f"the curriculum of {name} must be a tuple of Stage: (Stage(...),) with its comma.")
    if none := [stage.name for stage in stages if not stage.epochs > 0]:
        raise RunnerError(f"the stages {none} of {name} have no epochs: give them some, or leave them out.")
    if (epochs := sum(stage.epochs for stage in stages)) != CURRICULUM_EPOCHS:
        print(f"note: the stages of {name} add up to {epochs:g} epochs; runs compare at {CURRICULUM_EPOCHS} (EPOCHS_SCALE scales all alike)")


def check_parameters(sae, losses, name):
    """What the losses would teach are parameters of the SAE."""
    known, seen = set(map(id, sae.parameters())), set()
    nodes = [loss.grad_fn for loss in losses]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            raise RunnerError(f"{name} uses a tensor of shape {(*leaf.shape,)} that asks for a gradient, but that nothing trains or "
                            "saves: make it an nn.Parameter and an attribute of the SAE, or several an nn.ParameterList or "
                            "nn.ModuleList; a plain list hides them.")


def check_losses(sae, batch, stage, name):
    """The losses of a training batch, found to be a function of it, of parameters and buffers: of nothing that earlier
    batches left elsewhere, nor of x at padding; and x stays as it is. All that the stage weighs are there."""
    def losses_of(x):
        sae.load_state_dict(state)
        torch.manual_seed(0)
        given = batch._replace(x=x)
        return sae.train().losses(given, sae.encode(given))

    WATCHDOG.renew()
    state, totals = copy.deepcopy(sae.state_dict()), []
    for x in (batch.x, batch.x + ~batch.mask[..., None], 2 * batch.x.flip(0), batch.x):
        losses = losses_of(given := x.clone())
        if given._version or not torch.equal(x, given):
            losses_of(x.clone().requires_grad_())          # torch refuses, and tells the line
            raise RunnerError(f"{name} changes batch.x in place, which others read too: make a new tensor of it.")
        if not isinstance(losses, dict):
            raise RunnerError(f"`losses` of {name} is a {type(losses).__name__}, wanted a dict {{name: scalar}}.")
        for key, loss in losses.items():
            if not isinstance(loss, torch.Tensor) or loss.shape:
                what = f"of shape {(*loss.shape,)}" if isinstance(loss, torch.Tensor) else f"a {type(loss).__name__}"
                raise RunnerError(f"the loss {key!r} of {name} is {what}, wanted a scalar tensor.")
        totals.append([loss.detach().double() for loss in losses.values()])
    if missing := sorted(set(stage.weights) - set(losses)):
        raise RunnerError(f"stage {stage.name!r} weighs {missing}, but `losses` of {name} has {sorted(losses)}.")
    check_parameters(sae, losses.values(), name)
    first, padded, _, again = totals
    for other, why in ((again, "what earlier batches left, or random numbers that are not torch's. Keep state in buffers "
                        "(self.register_buffer): a resumed run has nothing else"),
                       (padded, "x at padding: use batch.mask, `valid` or `counted`")):
        if wrong := [key for key, a, b in zip(losses, first, other) if not torch.allclose(a, b, 1e-3, 1e-6, True)]:
            raise RunnerError(f"{name}: the losses {wrong} depend on {why}.")
    return losses


def check_latents(sae, batch, alone, name):
    """In evaluation, with every parameter moved: the batch's last row is as in the batch `alone`, of it; what is causal does
    not look ahead; padding is silent."""
    def differ(some, others):      # a tie that rounding breaks may move a token or two
        return ((some - others).abs() > 1e-4 * (1 + others.abs())).any(-1).sum() > 2

    WATCHDOG.renew()
    if not sae.W_dec.any(1).all():
        raise RunnerError(f"{name}: W_dec has rows of zeros, which no step can bring to unit norm. Begin with random ones.")
    with torch.no_grad():
        for p in sae.eval().parameters():      # at first a gate may be shut
            p += 0.1 * torch.randn_like(p)
        z = sae.encode(batch).dense()
        if differ(sae.encode(alone).dense()[0], z[-1]):
            raise RunnerError(f"{name}: the rows of a batch are different documents; one changes another's latents.")
        half = batch.x.shape[1] // 2
        later = batch._replace(x=torch.cat([batch.x[:, :half], batch.x[:, half:] + 1], 1))
        if sae.causal and differ(sae.encode(later).dense()[:, :half], z[:, :half]):
            raise RunnerError(f"{name}: later positions of a window change the latents of earlier ones. Look back only, or say "
                            "causal = False in the class.")
        if z[~batch.mask].any():
            raise RunnerError(f"{name} has latents that fire on padding.")
        weights = exported_weights(sae, {"W_enc": sae.W_enc})
        if set(weights) == SAELENS.get(sae.architecture):          # otherwise save_sae says so
            theirs = saelens_latents(weights, sae.architecture, sae.k, batch.x)
            if differ(theirs[batch.mask], z[batch.mask]):
                raise RunnerError(f"architecture = {sae.architecture!r} of {name} promises SAELens's equation, whose latents differ "
                                "from encode's. Give the class an `architecture` of its own.")



def expect_shape(name, tensor, wanted):
    if tensor.shape != wanted:
        raise RunnerError(f"{name} has shape {(*tensor.shape,)}, wanted {wanted}.")


def check_variant(sae, store, stages):
    """Every weighed loss exists, every parameter learns, rows are apart, padding is silent."""
    batch, dark = store.batch(np.arange(store.windows.n_train)), dict(sae.named_parameters())
    for stage in stages:
        anneal(sae, stage, 0.0)
        losses = check_losses(sae, batch, stage, SAE_VARIANT)
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
    check_latents(sae, batch, store.batch([len(z) - 1]), SAE_VARIANT)


def preflight(config, cache):
    """Every stage, evaluation and result, on a stand-in."""
    with tempfile.TemporaryDirectory(prefix="preflight.", dir=cache) as folder:
        folder, d_in, model = Path(folder), config.hidden_size, stand_in(config)
        windows = stand_in_windows(CONTEXT_LENGTH, FORGET)
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
    with run_stage(training := f"training, seed {seed}", timing):
        sae = make_sae(store.d_in, round(EXPANSION * store.d_in), seed)
        stages, size = planned_stages(type(sae)), BATCH_TOKENS // CONTEXT_LENGTH
        log, *steps = train(sae, store, stages, seed, size, deadline, state / f"seed_{seed}.pt")
    if RANKS.rank:
        return
    with run_stage(f"evaluation, seed {seed}", timing), RANKS.alone():
        run = Run(sae, store, get_model, layer, LIVE, log, seed=seed)
        result = cached_json(state / f"seed_{seed}.json", lambda: evaluate(run, timing[training]))
    return sae, result, *steps


def open_store(config, layer, cache):
    """-> store, function that loads the model."""
    with run_stage("reading the data"):
        wanted = Wanted(CONTEXT_LENGTH, TRAIN_TOKENS, EVAL_FILES, TRAIN_WINDOWS_PER_FILE,
                               EVAL_WINDOWS_PER_FILE, MIN_WINDOW, DATA_SEED,
                               FORGET if "unlearning" in EVALS or TRAIN_ON != "both" else "")
        windows, key = load_windows(DATASET, load_tokenizer(), wanted, cache / "tokens")
    with run_stage("collecting activations"):
        name = fingerprint(key, model_identity(MODEL_NAME, config), layer, MODEL_DTYPE,
                           SHARD_WINDOWS)
        store = Store(cache / "activations" / name, windows, config.hidden_size, MODEL_DTYPE)
        print(memory_plan(config, store, EXPANSION, BATCH_TOKENS, DEVICE), flush=True)
        get_model = functools.cache(load_model)
        store.collect(get_model, layer)
    return store, get_model


def main():
    parser = argparse.ArgumentParser(description="all else is a constant of this file")
    parser.add_argument("--out_dir", default="run_0", help="folder for the results")
    out_dir = Path(parser.parse_args().out_dir).resolve()
    began, cache, timing, seeds = time.time(), cache_folder(), {}, []
    with run_stage("checking the settings"):
        check_config(globals(), SAE_VARIANTS, EVALUATIONS)
        make_folder(cache, "set SAE_CACHE_DIR to another folder")
        config, layer = load_config(MODEL_NAME, LAYER, CONTEXT_LENGTH)
    with atomic_run_folder(out_dir, HERE) as partial:
        with run_stage("preflight"), preflight_sandbox():
            preflight(config, cache)
        print(f"preflight passed after {time.time() - began:.1f} s", flush=True)
        store, get_model = open_store(config, layer, cache)
        timing["seconds_before_training"] = time.time() - began
        code = fingerprint(SOURCE, store.folder.name)
        with resumable_state(cache / "runs" / fingerprint(str(out_dir)), code) as state:
            end = began + 60 * TIME_BUDGET_MINUTES * (1 - EVALUATION_RESERVE)
            for i, seed in enumerate(SEEDS):
                deadline = time.time() + (end - time.time()) / (len(SEEDS) - i)
                seeds.append(run_seed(seed, store, layer, get_model, state, deadline, timing))
            if RANKS.rank:
                return
            with run_stage("writing the results"):
                timing["total_seconds"] = time.time() - began
                info = write_results(partial, seeds, store, layer, timing)
    print(f"{out_dir.name}, {time.time() - began:.0f} s:", summary_text(info), flush=True)


if __name__ == "__main__":
    run_script(main, __file__, SAE, SAE_VARIANTS, SAE_VARIANT)
