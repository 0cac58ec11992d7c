"""Temporal SAE Runner: trains one sparse autoencoder (SAE) on a language model's activations.

    python experiment.py --out_dir=run_1

Every setting is a constant of the region Config. The results are final_info.json in that folder and
the SAE beside it. A preflight first passes the variant through every stage and evaluation on tiny
data, so that a mistake ends the run within seconds. A killed run carries on with the same command.

To add a variant: (A) copy a small class of the region Variants, state its equation in the docstring
and override what differs: `encoder_inputs` (what latents read), `select`, `activate` or all of
`encode`, `decode`, `losses`, `curriculum`; `architecture` where it computes latents in a way of its
own, and `exported` where its equation needs more than the parameters; what changes the SAE's state
outside the optimiser goes into `after_step`; (B) add its name to SAE_VARIANTS; (C) name it in
SAE_VARIANT. To add a metric: put it into the Result of an evaluation. To add an evaluation: a
function of a Run that returns a Result, a line in EVALUATIONS, and its name in EVALS.

Data flows one way: tokens -> activations -> latents -> metrics -> final_info.json -> figures.

Regions, in order:
    Config                 the settings
    Protocol               the settings that stay, or runs no longer compare
    Batch                  what flows into a variant, and means over its tokens
    Variants               the SAEs, from `SAE` (standard) to `Hierarchical`; SAE_VARIANTS
    Trainer                curriculum, learning rate, one step, the loop, its log, its time budget
    Model                  loading the language model, reading and replacing its residual stream
    Activations            the store: activations collected once, batches of them
    Evaluation: shared     held-out latents, live latents, spliced forward passes, activity of units
    Evaluation: core       reconstruction, sparsity, next-token loss, controls
    Evaluation: temporal   stability, smoothness, coherence, polysemanticity
    Evaluation: probes     linear probes on a token's latents
    Evaluation: sparse probing   SAEBench's probes on a few latents of a text
    Evaluation: unlearning       clamping, its gate, forgetting against preservation
    Evaluation: hierarchy        two levels: information, clusters, causal tracing
    Evaluation: composition      interaction and reuse of features
    Evaluation: recovery         planted features of synthetic activations
    Evaluation: dwell            planted states that last
    Evaluation: detection        predicting where a latent fires from its strongest contexts
    Results                EVALUATIONS, export of the SAE, final_info.json
    Checks                 settings and variants that cannot work, named before anything slow
    Main                   preflight -> tokens -> activations -> train -> evaluate -> write
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
import platform
import tempfile
import time
import zlib
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Callable, NamedTuple

from runtime.interrupts import INTERRUPTS, leave_quietly

leave_quietly()  # where Ctrl-C ends the imports below
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("GOMP_SPINCOUNT", "0")  # spinning threads cost 4x on a busy machine
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array, vstack
from scipy.spatial.distance import cdist
from scipy.stats import binomtest, false_discovery_control, linregress, norm, rankdata, spearmanr
from sklearn.cluster import AgglomerativeClustering, KMeans
from sklearn.decomposition import PCA, MiniBatchNMF
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    adjusted_mutual_info_score, adjusted_rand_score, balanced_accuracy_score, roc_auc_score,
    roc_curve, silhouette_score)
from sklearn.preprocessing import MaxAbsScaler, normalize
from torch import nn

from data.code_labels import LABELS
from data.documents import data_identity
from data.synthetic import (
    COMPOSED, DIMENSIONS, PRIMITIVES, TASKS, make_sequences, make_synthetic)
from data.tasks import encoded_questions, probing_windows, unlearning_plan
from data.token_text import token_texts, vocabulary_texts
from data.windows import Wanted, load_windows, stand_in_windows
from pages.case_studies import case_studies, family_tree
from pages.latents_page import (
    PageLatent, Passages, children_of, compositions_of, latents_page, nearest_directions)
from runtime.errors import RunnerError, run_stage
from runtime.files import (
    atomic_run_folder, cache_folder, cached_json, fingerprint, folder_identity, make_folder,
    next_run, replacing, resumable_state)
from runtime.hub import go_offline, hub_reachable
from runtime.preflight import WATCHDOG, SettingRules, preflight_sandbox
from runtime.process import allow_tf32, prefetched, readable_bytes, run_script
from runtime.progress import (
    KnownTimes, Progress, fit_to_deadline, readable_time, steps_left)
from runtime.provenance import code_key, sources_key
from runtime.ranks import RANKS
from runtime.results import finite_number, jsonable, summarise_seeds, write_result_files
from runtime.shards import missing_shards, open_shards, shard_table, write_shard
from runtime.sparse_ops import (
    MASKED_PRE_ACT, Latents, PairDecode, PairEncode, Pairs, firings, largest, side_by_side,
    top_k_pairs)

torch.set_flush_denormal(True)  # decaying traces become denormal numbers, which are slow
HERE = Path(__file__).resolve().parent
SOURCE = Path(__file__).read_text(encoding="utf-8")


# region Config
# Edit here; there is no command line for these.
# One of: standard, topk, batch_topk, jumprelu, gated, matryoshka, tsae, slow, temporal,
# temporal_adaptation, temporal_context, compositional, hierarchical
SAE_VARIANT = "standard"
ABLATE = ()  # losses or components to switch off, e.g. ("auxk",)
MODEL_NAME = "embedded/model"  # a local folder or a hub id, e.g. "google/gemma-2-2b"
LAYER = None  # residual stream after this block, from 0; None: the middle
DATASET = "embedded"  # or a file, a folder, a nanoGPT data folder, a hub name
TRAIN_TOKENS = 196_608  # distinct tokens; each epoch passes over all of them
CONTEXT_LENGTH = 128  # tokens in a window, the first (BOS) included
EXPANSION = 8  # d_sae / d_in
TARGET_L0 = 48  # active latents per token
SEEDS = (0,)  # one SAE for each
TIME_BUDGET_MINUTES = 90  # of the whole run; training shrinks to fit
# Also "unlearning", "sparse_probing", "recovery", "dwell"; for their variants "composition" and
# "hierarchy"
EVALS = ("core", "temporal", "probes", "detection")
EPOCHS_SCALE = 1.0  # multiplies the epochs of every stage
BATCH_TOKENS = 1024  # tokens per training step
LEARNING_RATE = None  # of Adam; None: 3e-3 * sqrt(1536 / d_sae)
TRAIN_POSITIONS = None  # None: all; (low, high): train only on these, counted from 1

# temporal
WINDOW = 5  # positions that attention sees
ATTENTION = "causal"  # or "centred": the window lies around its token
HEADS = 1  # of the attention
HEAD_WIDTH = 32  # channels of queries and keys
CONSISTENT_FRACTION = 1.0  # share of the latents that the consistency losses bind
CONSISTENCY_WEIGHT = 0.01  # of the consistency loss
CONTRAST_WEIGHT = 0.2  # of the contrastive loss
CONTRAST_SPAN = 16  # positions back that should agree

# slow
SLOW_LATENTS = 1 / 8  # share of the latents that read a running mean of x
SLOW_PLACES = 1 / 8  # their share of TARGET_L0
SLOW_DECAY = 0.95  # of the running mean, from one token to the next
SLOW_PRIOR = 5.0  # tokens' weight of the mean over all text in it: it begins near that
PREDICTION_WEIGHT = 0.1  # of the loss that makes them predict
PREDICTED = 16  # tokens ahead, whose mean they predict

# tsae
TSAE_READING = "paper"  # or "code": as its authors released it

# temporal_adaptation
TEMPERATURE = "learned"  # or "scheduled" (learned with a learned decay), or a fixed number
DRIVE = "u"  # the trace averages the rectified pre-activations; "z": the latents
REGULARISATION = 1e-3  # weight that pulls its global parameters towards their starts

# temporal_context
BUFFER = 4  # latest positions that the encoder sees
BUFFER_POSITIONS = "learned"  # or "sinusoidal"

# compositional
COMPOSITIONS = 1 / 3  # share of latents that are compositions: d_sae = 384 gives 256 + 128
COMPOSITION_HEADS = 8  # of its attention
COMPOSITION_HEAD_WIDTH = 16  # channels of a head
COMPOSITION_SLOTS = 1 / 4  # share of TARGET_L0 that compositions take before features

# hierarchical
LEVEL_WIDTHS = None  # (level 1, level 2), e.g. (144, 96); None: (3/2 d_sae, d_sae)
LEVEL_SPARSITY = "topk"  # of level 2; or "l1", its weight steered to TARGET_L0
LEVEL1_L0_RATIO = 1.5  # active features of level 1 per token / TARGET_L0
COSINE_WEIGHT = 0.1  # of the loss that makes siblings' directions alike
GROUP_WEIGHT = 0.1  # of the group-sparsity (L2,1) loss

# unlearning
FORGET = "sympy"  # a domain of DATASET, or another data set
TRAIN_ON = "both"  # or "forget", "retain": training windows of that domain alone, or without it
FORGET_QUESTIONS = None  # a data set of four-way questions, e.g. "cais/wmdp:wmdp-bio"
RETAIN_QUESTIONS = None  # e.g. "cais/mmlu:human_aging"
SELECTION = "ratio"  # of latents to clamp: by E[z^2] on FORGET over elsewhere; or "frequency"
CLAMPED = 20  # latents at most to clamp
MATCHED = 1536  # latents at most that the matcher reads
MATCHER = "logistic"  # or "attention"
MATCHER_WINDOW = 4  # positions that the matcher reads
# endregion


# region Protocol
# FIXED PROTOCOL: runs compare only while these stay as they are.
DATA_SEED = 42  # order of documents, choice of windows
TRAIN_WINDOWS_PER_FILE = 8
EVAL_FILES = 256  # held-out documents
EVAL_WINDOWS_PER_FILE = 4
MIN_WINDOW = 32  # tokens; shorter tails of documents are left out
CURRICULUM_EPOCHS = 20  # that the stages of a curriculum should add up to
WARMUP_FRACTION = 0.05  # of all steps: the learning rate rises
DECAY_FRACTION = 0.2  # of all steps: it falls to zero
GRADIENT_CLIP = 1.0  # norm of all gradients together
DEAD_AFTER_FRACTION = 0.05  # of the training tokens: a latent silent for so many is dead
AUXK_WEIGHT = 1 / 32  # Gao et al. 2024 (arXiv 2406.04093)
LIVE_MIN_FIRINGS = 50  # of a live latent, on held-out tokens
LIVE_MIN_FILES = 10  # held-out files in which a live latent fires
STABILITY_LAGS = (5, 16)  # tokens apart, beyond WINDOW
FAR_LAGS = (17, 32)  # beyond CONTRAST_SPAN too
SLOW_AUTOCORRELATION = 0.2  # of a latent's values over FAR_LAGS, from which it counts as slow
ENERGY_ALARM = 1.5  # sum of E[z^2] from which latents are large and cancel each other
NULL_DRAWS = 50  # permutations
PROBE_EVERY = 8  # one held-out token in so many is probed
PROBING = ("embedded",)  # data sets, e.g. (*PROBING_DATASETS,) of data/tasks.py
PROBING_SIZE = (1000, 250)  # texts of a class to train, to test; SAEBench: (4000, 1000)
PROBED_COUNTS = (1, 2, 5, 10, 20, 50)  # latents that a sparse probe reads
TRACED_PARENTS = 32  # parents ablated in causal tracing
FORGET_NATS = 0.33  # rise of FORGET's loss at which strategies are compared: half of what
#                    retraining the model without FORGET gives
RETAIN_FREQUENCY = 0.01  # firing rate outside FORGET at most, for SELECTION "frequency"
GATE_TOKENS = 32  # in a row, whose mean match opens the gate
FALSE_POSITIVES = (0.01, 0.05, 0.2)  # rates outside FORGET at which thresholds are set; the first
#                                    is the one of metrics without a suffix
SYNTHETIC_TASKS = ("boolean", "arithmetic", "grammar")
SYNTHETIC_RHOS = (1.0, 0.5, 0.0)  # strengths of compositions in the first task; the others: 1
SYNTHETIC_TOKENS = 65_536  # of training
SYNTHETIC_SAE = (384, 8)  # width, L0
DWELL_SAE = (384, 16)  # width, L0
BOUNDARY_TOKENS = 16  # after which a change of state should show
COMPOSED_TOKENS = 512  # tokens on which features are ablated one by one
DETECTED_LATENTS = 50  # live ones, drawn at random, that detection is measured on and people rate;
#                     features.html shows them and those that figures of the run name
DETECTION_TASKS = 10  # of a latent at most, one a file
DETECTION_OPTIONS = 5  # excerpts to choose from: chance is .2
DETECTION_TOKENS = 16  # of such an excerpt
PROFILE_FIRINGS = 128  # strongest firings that make a latent's profile
PROFILE_REACH = 5  # tokens that a profile reads: the one at the place and those just before
EVALUATION_RESERVE = 0.15  # share of the time budget
LOG_EVERY = 20  # steps
CHECKPOINT_SECONDS = 60
SHARD_WINDOWS = 512  # windows of activations in one file
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODEL_DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
# endregion


# region Batch
class Batch(NamedTuple):
    """The one thing that flows into a variant. A row is a window of one document without BOS."""
    x: torch.Tensor  # [batch, seq, d_in] activations, centred, mean squared norm 1
    tokens: torch.Tensor | None  # [batch, seq] token ids; None where the model generates
    doc_ids: torch.Tensor  # [batch] document of each row
    positions: torch.Tensor  # [seq] from 1
    mask: torch.Tensor | None  # [batch, seq] False at padding, wherever it is; None: there is none


def n_tokens(batch):
    """Returns how many tokens count: an int, or a scalar tensor where there is padding."""
    return batch.x.shape[0] * batch.x.shape[1] if batch.mask is None else batch.mask.sum()


def zero_padding(batch, values):
    """Returns values [batch, seq, ...] with zeros at padding."""
    return values if batch.mask is None else values * batch.mask[..., None]


def drop_padding(batch, values):
    """Returns values [batch, seq, d] as [tokens, d], without padding."""
    return values.flatten(0, 1) if batch.mask is None else values[batch.mask]


def squared_error(batch, x_hat):
    """Returns the mean over tokens of |x - x_hat|^2: the fraction of variance unexplained, exactly
    so on the tokens that set the scale, where x has mean squared norm 1."""
    expect_shape("x_hat", x_hat, batch.x.shape)
    return zero_padding(batch, (batch.x - x_hat).square()).sum() / n_tokens(batch)


def l1(batch, latents):
    """Returns the mean over tokens of the sum of |z|."""
    return latents.values.abs().sum() / n_tokens(batch)


def expect_shape(name, tensor, wanted):
    """Raises RunnerError where a tensor has another shape than wanted."""
    if tensor.shape != wanted:
        raise RunnerError(f"{name} has shape {(*tensor.shape,)}, wanted {wanted}.")
# endregion


# region Variants
# One contiguous block each. A curriculum is data: a tuple of stages, or a classmethod that returns
# one where it depends on constants. Latents (runtime/sparse_ops.py) hold z only at its (token,
# latent) pairs: `values` and `pre_acts` [n_pairs], `pairs.rows` their tokens, `pairs.ids` their
# latents; at(v) gives v [d_sae] at the pairs, keep(mask) some of them, `extra` what losses or
# after_step need of this forward pass.
class Stage(NamedTuple):
    """A stage of a curriculum. The epochs of all stages add up to CURRICULUM_EPOCHS."""
    name: str
    epochs: float  # passes over the training tokens
    weights: dict  # loss -> its weight: a number, or a function of the stage's progress in [0, 1)
    trains: tuple = ("",)  # prefixes of the names of the parameters that learn
    lr: float = 1.0  # multiplies the learning rate
    anneals: dict = {}  # attribute of the SAE -> its value, or a function of progress


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
        if not hasattr(type(self), "W_enc"):  # a property: tied to the decoder
            self.W_enc = nn.Parameter(directions.clone().t())  # [d_in, d_sae]
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.register_buffer("tokens_since_fired", torch.zeros(d_sae, dtype=torch.long))
        self.register_buffer("dead_after", torch.tensor(10 ** 12))  # tokens; the trainer sets it
        self.register_buffer("sparsity_weight", torch.tensor(1e-3))

    # --- what a variant may override ---
    def initialise(self, batch):
        """Sets b_enc from the first batch so that training begins at L0 = TARGET_L0. Called before
        training, not before the preflight's checks."""
        self.b_enc.data.fill_(-self.pre_act_quantile(batch))

    def begin_stage(self, batch):
        """Prepares a stage, with its first batch and its annealed attributes set."""

    def encoder_inputs(self, batch):
        """Returns what the encoder computes with: inputs [batch, seq, d], the centre subtracted
        from them [d], and weights [d, d_sae]. d may exceed d_in (see Temporal)."""
        return batch.x, self.b_dec, self.W_enc

    def select(self, centred, W_enc, batch):
        """Returns the (token, latent) Pairs at which pre-activations are computed; all other
        latents are 0. centred [n_tokens, d]: the encoder's inputs minus their centre."""
        pre_acts = torch.addmm(self.b_enc, centred, W_enc)
        flat = (pre_acts > self.lowest_pre_act()).flatten().nonzero().flatten()
        return Pairs.from_flat(flat, pre_acts)

    def lowest_pre_act(self):
        """Returns the pre-activation below which a latent is surely 0."""
        return 0.0

    def activate(self, latents):
        """Returns the latents' values [n_pairs] from `latents.pre_acts` at the same places."""
        return F.relu(latents.pre_acts)

    def encode(self, batch):
        """Returns the Latents [batch, seq, d_sae] of a batch; zero at padding. A variant that
        overrides it keeps that, and overrides `encoder_inputs` too where auxk should revive its
        latents."""
        inputs, centre, W_enc = self.encoder_inputs(batch)
        expect_shape("the encoder's input", inputs, (*batch.x.shape[:2], len(W_enc)))
        x = inputs.flatten(0, 1)  # [n_tokens, d]
        with torch.no_grad():
            pairs = self.select(x - centre, W_enc, batch)
        return self.at_pairs(batch, pairs, x, centre, W_enc, self.b_enc)

    def at_pairs(self, batch, pairs, x, centre, W_enc, b_enc):
        """Returns the Latents [batch, seq, width] at the Pairs, of the encoder's inputs x
        [n_tokens, d], their centre [d], W_enc [d, width] and b_enc [width]."""
        pre_acts = PairEncode.apply(x, centre, W_enc, b_enc, pairs)
        if batch.mask is not None:
            pre_acts = pre_acts.masked_fill(~batch.mask.flatten()[pairs.rows], MASKED_PRE_ACT)

        shape = (*batch.x.shape[:2], len(b_enc))
        latents = Latents(values=pre_acts, pre_acts=pre_acts, pairs=pairs, shape=shape)
        return latents._replace(values=self.activate(latents))

    def decode(self, latents):
        """Returns x_hat [batch, seq, d_in] of Latents."""
        return latents.decode(self.W_dec) + self.b_dec

    def directions(self):
        """Returns each latent's direction in x: [d_sae, d_in]."""
        return self.W_dec

    def losses(self, batch, latents):
        """Returns the named loss terms without their weights, each a scalar. The trainer knows two
        names: "reconstruction", which every variant has, and "sparsity", whose weight is
        steered."""
        x_hat = self.decode(latents)
        return {"reconstruction": squared_error(batch, x_hat), "sparsity": l1(batch, latents),
                "auxk": self.auxk_loss(batch, x_hat)}

    def after_step(self, batch, latents, l0):
        """Changes, after each step of the optimiser, what the optimiser does not: thresholds,
        running means, clamps. l0: mean active latents per token of the whole batch. With several
        processes `batch` and `latents` are this one's part; buffers are averaged in the next
        step."""

    def exported(self):
        """Returns weights to add to the parameters at export, and names to drop from them. What the
        equation needs besides parameters (buffers, constants) belongs here, as tensors."""
        return {}, ()

    def parameters_of_interest(self):
        """Returns the scalars to follow through training, {name: float}."""
        return {}

    def bound_codes(self, latents):
        """Returns the codes [batch, seq, n], of unit or zero length, that losses over time bind;
        None where there are none."""
        return None

    def related(self, latents, batch, fires):
        """Returns, for features.html, {title: [(latent or text, number), ...]} of each of
        `latents`. fires [batch, seq, latents]: 1 where each fires."""
        return [{} for _ in latents]

    # --- what all variants share ---
    def pre_act_quantile(self, batch):
        """Returns the threshold that on average TARGET_L0 pre-activations per token exceed while
        b_enc = 0: a scalar of at least 1e-3, from the first 1,024 tokens."""
        x = drop_padding(batch, batch.x)[:1024]
        pre_acts = ((x - self.b_dec) @ self.W_enc).flatten()
        rank = max(1, int(len(pre_acts) * (1 - self.k / self.d_sae)))
        return pre_acts.kthvalue(rank).values.clamp_min(1e-3)

    def auxk_loss(self, batch, x_hat):
        """Returns the share of the residual's variance that its top d_in / 2 dead latents leave
        unexplained (Gao et al. 2024), with a leaky ReLU: the gradient of a dead latent never
        vanishes."""
        dead = self.dead_mask().nonzero().flatten()
        if not len(dead):
            return x_hat.new_zeros(())
        x, centre, W_enc = self.encoder_inputs(batch)
        residual = batch._replace(x=zero_padding(batch, (batch.x - x_hat).detach()))

        z = F.leaky_relu((x - centre) @ W_enc[:, dead] + self.b_enc[dead], 0.1)
        values, ids = z.topk(min(self.d_in // 2, len(dead)), dim=-1)
        z = torch.zeros_like(z).scatter(-1, ids, values)
        error = squared_error(residual, z @ self.directions()[dead])

        mean = residual.x.sum((0, 1)) / n_tokens(batch)
        variance = squared_error(residual, mean.expand_as(x_hat))
        return error / variance if variance > 1e-12 else 0.0 * error

    def steer(self, l0):
        """Raises the weight of L1 where too many latents are active, and lowers it else. The
        trainer calls it after each step of a stage that weighs "sparsity"."""
        error = (l0.clamp_min(1e-2) / self.k).log().clamp(-1, 1)
        self.sparsity_weight.mul_((0.05 * error).exp()).clamp_(max=1e4)

    def running_mean_weight(self, batch):
        """Returns the weight of this batch in a running mean whose time constant is
        DEAD_AFTER_FRACTION of the steps, at most 100 steps."""
        return (n_tokens(batch) / self.dead_after).clamp(0.01, 1.0)

    def dead_mask(self):
        """Returns [d_sae] True at latents that have not fired for `dead_after` tokens."""
        return self.tokens_since_fired > self.dead_after


class TopK(SAE):
    """z = TopK_k(ReLU((x - b_dec) W_enc + b_enc)), L = |x - x_hat|^2 + 1/32 auxk (Gao et al. 2024,
    arXiv 2406.04093)."""
    curriculum = (Stage("autoencoder", 20, PLAIN),)
    architecture = "topk"

    def initialise(self, batch):
        """Needs nothing: k latents are active from the start."""

    def select(self, centred, W_enc, batch):
        return top_k_pairs(centred, W_enc, self.b_enc, self.k)


class BatchTopK(TopK):
    """TopK over the whole batch: the k * n_tokens largest pre-activations; in evaluation
    z = pre * 1[pre > threshold], a running mean of the least value kept in training (Bussmann et
    al. 2024, arXiv 2412.06410)."""
    architecture = "jumprelu"

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("threshold", torch.tensor(0.0))
        self.register_buffer("last_least_kept", torch.tensor(0.0), persistent=False)

    def select(self, centred, W_enc, batch):
        """Returns the Pairs of the k * n_tokens largest; in evaluation those above the
        threshold."""
        pre_acts = torch.addmm(self.b_enc, centred, W_enc)
        return self.largest_of_batch(pre_acts, batch, self.k, self.threshold,
                                     self.last_least_kept)

    def largest_of_batch(self, pre_acts, batch, k, threshold, last_least_kept):
        """Returns the Pairs that `select` does, of pre_acts [n_tokens, d]."""
        if batch.mask is not None:
            pre_acts.masked_fill_(~batch.mask.reshape(-1, 1), MASKED_PRE_ACT)
        lower_bound = 0.9 * last_least_kept if self.training else threshold
        flat = (pre_acts > lower_bound).flatten().nonzero().flatten()

        if self.training:  # .9 of the last step's bound leaves few candidates; if too few, take all
            keep = int(k * n_tokens(batch))
            if len(flat) < keep:
                flat = torch.arange(pre_acts.numel(), device=pre_acts.device)
            values = pre_acts.flatten()[flat]
            least_kept = values.topk(keep, sorted=False).values.amin().clamp_min(1e-12)
            flat = flat[values >= least_kept]
        return Pairs.from_flat(flat, pre_acts)

    def after_step(self, batch, latents, l0):
        """The threshold follows the least value kept."""
        self.follow(batch, latents.pre_acts, self.threshold, self.last_least_kept)

    def follow(self, batch, pre_acts, threshold, last_least_kept):
        """Moves a threshold towards the least of the pre-activations that were kept [n_pairs]."""
        if len(pre_acts):
            last_least_kept.copy_(pre_acts.detach().amin())
            weight = self.running_mean_weight(batch) if threshold > 0 else 1.0
            threshold.lerp_(last_least_kept, weight)

    def exported(self):
        return {"threshold": self.threshold.expand(self.d_sae)}, ()


class Matryoshka(BatchTopK):
    """BatchTopK; L is the mean error of nested prefixes of the latents (Bussmann et al. 2025,
    arXiv 2503.17547)."""
    group_fractions = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32)

    def losses(self, batch, latents):
        """Returns the mean error of the prefixes, and auxk on what the whole leaves."""
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
    architecture = "jumprelu"
    bandwidth = 0.05  # of the straight-through gradient

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.log_threshold = nn.Parameter(torch.zeros(self.d_sae))

    def initialise(self, batch):
        self.log_threshold.data.fill_(self.pre_act_quantile(batch).log())

    def lowest_pre_act(self):
        return self.log_threshold.exp() - self.bandwidth / 2

    def step_function(self, latents):
        """Returns 1[pre > theta] [n_pairs]; its gradient to theta is a rectangle of the
        bandwidth."""
        margin = latents.pre_acts.detach() - latents.at(self.log_threshold.exp())
        near = margin.abs() < self.bandwidth / 2
        return (margin > 0) + (margin - margin.detach()) * near / self.bandwidth

    def activate(self, latents):
        gate, theta = self.step_function(latents), latents.at(self.log_threshold.exp()).detach()
        return F.relu(latents.pre_acts) * gate.detach() + theta * (gate - gate.detach())

    def losses(self, batch, latents):
        l0 = self.step_function(latents).sum() / n_tokens(batch)
        return super().losses(batch, latents) | {"l0_target": (l0 / self.k - 1).square()}

    def exported(self):
        return {"threshold": self.log_threshold.exp()}, ("log_threshold",)


class Gated(SAE):
    """pi = (x - b_dec) W_enc + b_enc, z = 1[pi > 0] ReLU(exp(r) (pi - b_enc) + b_mag),
    L = |x - x_hat|^2 + w |ReLU(pi)|_1 + |x - x_hat(ReLU(pi))|^2 + 1/32 auxk, the third through a
    frozen decoder (Rajamanoharan et al. 2024, arXiv 2404.16014)."""
    curriculum = (Stage("autoencoder", 20, PLAIN | {"sparsity": 1.0, "gate": 1.0}),)
    architecture = "gated"

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.r_mag = nn.Parameter(torch.zeros(self.d_sae))
        self.b_mag = nn.Parameter(torch.zeros(self.d_sae))

    def initialise(self, batch):
        """Needs nothing: it begins dense."""

    def activate(self, latents):
        pi = latents.pre_acts
        scale, b_enc, b_mag = map(latents.at, (self.r_mag.exp(), self.b_enc, self.b_mag))
        return F.relu(scale * (pi - b_enc) + b_mag) * (pi > 0)

    def losses(self, batch, latents):
        """Returns the standard losses with L1 on the gate, and the gate's own reconstruction."""
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

    Gates start at 0: the second stage begins with the function of the first. The third adds two
    losses on the first CONSISTENT_FRACTION of the latents, called H: consistency = mean of 1 -
    cos(zH_t, zH_{t-1}), contrastive = InfoNCE of cos(zH_t, zH_s), s up to CONTRAST_SPAN before
    t."""
    components = ("attention", "positions")
    architecture = "temporal_attention"
    attends = False  # whether attention is on
    binds = False  # whether the losses over time are on

    @classmethod
    def curriculum(cls):
        """Returns three stages: the autoencoder, with attention, with the losses over time."""
        bound = {"consistency": CONSISTENCY_WEIGHT, "contrastive": CONTRAST_WEIGHT}
        return (Stage("autoencoder", 10, PLAIN),
                Stage("attention", 5, PLAIN, anneals={"attends": True}),
                Stage("consistency", 5, PLAIN | bound, anneals={"attends": True, "binds": True}))

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.window, self.before = self.reach()
        self.causal = self.before == self.window - 1
        if "attention" in ABLATE:
            return
        self.W_q, self.W_k = (nn.Parameter(
            torch.randn(self.d_in, HEADS * HEAD_WIDTH) * self.d_in ** -0.5) for _ in range(2))
        self.gate = nn.Parameter(torch.zeros(HEADS, self.d_sae))
        if "positions" not in ABLATE:
            self.add_positions()

    def reach(self):
        """Returns the positions in a window, and how many of them lie before its token."""
        return WINDOW, WINDOW - 1 if ATTENTION == "causal" else WINDOW // 2

    def add_positions(self):
        """Makes the position embeddings P [window, d_in]."""
        self.P = nn.Parameter(torch.randn(self.window, self.d_in) * 0.1 * self.d_in ** -0.5)

    def windows(self, values):
        """Returns the window at each position of values [batch, seq, n]: [batch, seq, window, n],
        zero outside the row."""
        after = self.window - 1 - self.before
        padded = F.pad(values, (0, 0, self.before, after))
        return padded.unfold(1, self.window, 1).transpose(2, 3)

    def attention(self, batch):
        """Returns the weights [batch, seq, HEADS, window] and what they weigh, y
        [batch, seq, window, d_in]."""
        inputs = self.windows(zero_padding(batch, batch.x))
        if "positions" not in ABLATE:
            inputs = inputs + self.P
        queries = (batch.x @ self.W_q).unflatten(-1, (HEADS, HEAD_WIDTH))
        keys = (inputs @ self.W_k).unflatten(-1, (HEADS, HEAD_WIDTH))

        scores = torch.einsum("bthd,btwhd->bthw", queries, keys) / math.sqrt(HEAD_WIDTH)
        inside = self.windows(zero_padding(batch, torch.ones_like(batch.x[..., :1])))
        return (scores + MASKED_PRE_ACT * (1 - inside.transpose(2, 3))).softmax(-1), inputs

    def encoder_inputs(self, batch):
        """Returns [x; context of each head] and an encoder that reads the context through gates."""
        if not self.attends or "attention" in ABLATE:
            return super().encoder_inputs(batch)
        (weights, inputs), rows = self.attention(batch), self.W_enc.t()
        context = (weights @ inputs).flatten(2)  # [batch, seq, HEADS * d_in]
        W_enc = torch.cat([rows, *(rows * g.tanh()[:, None] for g in self.gate)], 1).t()
        return torch.cat([batch.x, context], -1), self.b_dec.repeat(1 + HEADS), W_enc

    def losses(self, batch, latents):
        """Returns BatchTopK's losses; from the second stage the consistency too, in the third the
        contrastive loss."""
        terms = super().losses(batch, latents)
        if not self.attends:
            return terms
        z = self.bound_codes(latents)
        terms["consistency"] = consistency(batch, z)
        if self.binds:
            terms["contrastive"] = contrastive(batch, z, CONTRAST_SPAN, 2 * CONTRAST_SPAN)
        return terms

    def bound_codes(self, latents):
        return F.normalize(latents.dense()[..., :round(CONSISTENT_FRACTION * self.d_sae)], dim=-1)

    def parameters_of_interest(self):
        return {} if "attention" in ABLATE else {"gate": self.gate.tanh().abs().mean().item()}

    def exported(self):
        added, dropped = super().exported()
        return added | ({"P": self.P} if hasattr(self, "P") else {}), dropped

    def related(self, latents, batch, fires):
        """Returns the mean attention by offset where each latent fires."""
        if "attention" in ABLATE:
            return super().related(latents, batch, fires)
        seen = torch.einsum("btn,bthw->nw", fires, self.attention(batch)[0])
        return [{"attention by offset": [(f"{i - self.before:+d}", w) for i, w in enumerate(row)]}
                for row in F.normalize(seen, p=1, dim=1).tolist()]


def consistency(batch, z):
    """Returns the consistency loss of codes z [batch, seq, n] of unit or zero length: the mean of
    1 - cos(z_t, z_{t-1}) where both are non-zero."""
    coded = z.detach().any(-1)  # [batch, seq]
    adjacent = coded[:, 1:] & coded[:, :-1]
    cosine = (z[:, 1:] * z[:, :-1]).sum(-1)
    return 1 - (cosine * adjacent).sum() / adjacent.sum().clamp_min(1)


def consistency_gap(batch, z):
    """Returns how far the cosine of adjacent codes lies above the one between different documents
    at the same position. Codes z [batch, seq, n] as in `consistency`; rows of one document are
    neighbours."""
    half = len(z) // 2
    coded = z.any(-1)
    across = coded & coded.roll(half, 0) & (batch.doc_ids != batch.doc_ids.roll(half))[:, None]
    other = ((z * z.roll(half, 0)).sum(-1) * across).sum() / across.sum().clamp_min(1)
    return 1 - consistency(batch, z) - other


def contrastive(batch, z, span, far=None):
    """Returns the symmetric InfoNCE loss between z_t and z_s, z [batch, seq, d], with s drawn
    uniformly from the `span` positions before t. Negatives are tokens of other documents and, where
    `far` is given, tokens of the same window more than `far` positions apart."""
    n, seq, width = z.shape
    t = torch.arange(1, seq, device=z.device)
    earlier = t - 1 - (torch.rand(n, seq - 1, device=z.device) * t.clamp_max(span)).long()
    z_earlier = z.gather(1, earlier[..., None].expand(-1, -1, width)).flatten(0, 1)
    z_now, docs = z[:, 1:].flatten(0, 1), batch.doc_ids.repeat_interleave(seq - 1)
    window = torch.arange(n, device=z.device).repeat_interleave(seq - 1)
    place = window * 10 ** 6 + t.repeat(n)  # windows are never near each other
    if batch.mask is not None:
        keep = (batch.mask[:, 1:] & batch.mask.gather(1, earlier)).flatten()
        z_now, z_earlier, docs, place = (a[keep] for a in (z_now, z_earlier, docs, place))

    excluded = (docs[:, None] == docs).fill_diagonal_(False)  # neither positive nor negative
    if far is not None:
        distance = (place[:, None] - place).abs()
        excluded &= (distance <= far) | (distance >= 1e5)
    logits = (z_now @ z_earlier.t()).masked_fill(excluded, MASKED_PRE_ACT)
    target = torch.arange(len(z_now), device=z.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2


class TSAE(Matryoshka):
    """Temporal SAE (arXiv 2511.05541): L = |x - z_H W_H - b|^2 + |x - z W - b|^2 + auxk + alpha
    InfoNCE, symmetric, between z_H at t and at an earlier position of its window.

    TSAE_READING "paper": cosines, the position before, alpha 1; "code": dot products, a random
    earlier position, alpha .1. Negatives: other documents."""
    group_fractions = (0.2, 0.8)

    @classmethod
    def curriculum(cls):
        """Returns one stage. The reconstruction is the mean of two prefixes where the paper has
        their sum, so it has weight 2."""
        alpha = 1.0 if TSAE_READING == "paper" else 0.1
        return (Stage("autoencoder", 20, PLAIN | {"reconstruction": 2.0, "contrastive": alpha}),)

    def losses(self, batch, latents):
        """Returns Matryoshka's losses, InfoNCE on the first prefix, and its consistency, which is
        only logged."""
        unit = self.bound_codes(latents)
        z = latents.dense()[..., :unit.shape[-1]]
        code, span = (unit, 1) if TSAE_READING == "paper" else (z, z.shape[1])
        return super().losses(batch, latents) | {
            "contrastive": contrastive(batch, code, span), "consistency": consistency(batch, unit)}

    def bound_codes(self, latents):
        bound = round(self.group_fractions[0] * self.d_sae)
        return F.normalize(latents.dense()[..., :bound], dim=-1)


class Slow(BatchTopK):
    """x_hat = s + f + b_dec. The first SLOW_LATENTS of the latents, the slow block, read a running
    mean of x: s_t = BatchTopK((m_t - b_dec) W_enc + b_enc) W_dec, SLOW_PLACES of the k places, with
    m_t = gain sum_{r <= t} decay^(t-r) x_r / (SLOW_PRIOR + sum_{r <= t} decay^(t-r)), decay =
    SLOW_DECAY; the gain gives it a mean squared norm of 1. The others read what the block leaves:
    f_t = BatchTopK((x_t - s_t - b_dec) W_enc + b_enc) W_dec.

    L = |x - x_hat|^2 + 1/32 auxk + PREDICTION_WEIGHT |mean of x_{t+1} ... x_{t+PREDICTED} - s_t|^2:
    s_t is worth a place only as far as it lasts. ABLATE "memory": m = x; "residual": the others
    read x."""
    components = ("memory", "residual")
    architecture = "slow"

    @classmethod
    def curriculum(cls):
        """Returns one stage."""
        return (Stage("autoencoder", 20, PLAIN | {"prediction": PREDICTION_WEIGHT}),)

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.d_slow, self.k_slow = (max(1, round(share * n)) for share, n in (
            (SLOW_LATENTS, self.d_sae), (SLOW_PLACES, self.k)))
        if self.k < 2:
            raise RunnerError("TARGET_L0 = 1: slow needs 2, a place for each of its two parts.")
        self.register_buffer("gain", torch.tensor(1.0))
        self.register_buffer("slow_threshold", torch.tensor(0.0))
        self.register_buffer("slow_least_kept", torch.tensor(0.0), persistent=False)

    def initialise(self, batch):
        """Sets the gain from the first batch."""
        size = zero_padding(batch, self.memory(batch).square()).sum() / n_tokens(batch)
        self.gain.copy_(size.clamp_min(1e-12) ** -0.5)

    def memory_weights(self, seq):
        """Returns how much of x_r is in m_t: [seq, seq]."""
        at = torch.arange(seq, device=self.gain.device)
        weights = (SLOW_DECAY ** (at[:, None] - at).clamp_min(0).float()).tril()
        return self.gain * weights / (SLOW_PRIOR + weights.sum(1, keepdim=True))

    def memory(self, batch):
        """Returns m [batch, seq, d_in]; padding counts as 0."""
        if "memory" in ABLATE:
            return batch.x
        return self.memory_weights(batch.x.shape[1]) @ zero_padding(batch, batch.x)

    def encoder_inputs(self, batch):
        """Returns [m; x], which auxk reads; the encoder itself reads x - s in place of x."""
        rows = self.W_enc.t()
        is_slow = (torch.arange(self.d_sae, device=rows.device) < self.d_slow)[:, None]
        W_enc = torch.cat([rows * is_slow, rows * ~is_slow], 1).t()
        return torch.cat([self.memory(batch), batch.x], -1), self.b_dec.repeat(2), W_enc

    def encode(self, batch):
        """Returns the Latents; their `extra` is s [batch, seq, d_in]."""
        slow = self.encode_part(batch, self.memory(batch), slice(0, self.d_slow))
        s = slow.decode(self.W_dec[:self.d_slow])
        rest = batch.x if "residual" in ABLATE else batch.x - s
        fast = self.encode_part(batch, rest, slice(self.d_slow, self.d_sae))
        return side_by_side(slow, fast)._replace(extra=s)

    def encode_part(self, batch, inputs, part):
        """Returns the Latents [batch, seq, width] of one part of the latents, a slice of them, that
        read inputs [batch, seq, d_in]."""
        W_enc, b_enc, x = self.W_enc[:, part], self.b_enc[part], inputs.flatten(0, 1)
        limits = (self.k_slow, self.slow_threshold, self.slow_least_kept) if part.start == 0 else (
            self.k - self.k_slow, self.threshold, self.last_least_kept)
        with torch.no_grad():
            pre_acts = torch.addmm(b_enc, x - self.b_dec, W_enc)
            pairs = self.largest_of_batch(pre_acts, batch, *limits)
        return self.at_pairs(batch, pairs, x, self.b_dec, W_enc, b_enc)

    def losses(self, batch, latents):
        """Returns BatchTopK's losses, and "prediction", over tokens that have all those tokens
        after them."""
        seq = batch.x.shape[1]
        reach = min(PREDICTED, seq - 1)
        counted = zero_padding(batch, torch.ones_like(batch.x[..., :1]))[..., 0].cumsum(1)
        total = zero_padding(batch, batch.x).cumsum(1)
        use = counted[:, reach:] - counted[:, :seq - reach] == reach  # [batch, seq - reach]
        ahead = (total[:, reach:] - total[:, :seq - reach]) / reach
        error = (ahead - latents.extra[:, :seq - reach]).square().sum(-1)
        return super().losses(batch, latents) | {
            "prediction": (error * use).sum() / use.sum().clamp_min(1)}

    def after_step(self, batch, latents, l0):
        """Each part's threshold follows its least value kept."""
        slow = latents.pairs.ids < self.d_slow
        self.follow(batch, latents.pre_acts[slow], self.slow_threshold, self.slow_least_kept)
        self.follow(batch, latents.pre_acts[~slow], self.threshold, self.last_least_kept)

    def exported(self):
        """Returns the thresholds [d_sae], and what m is made with."""
        is_slow = torch.arange(self.d_sae, device=self.gain.device) < self.d_slow
        thresholds = torch.where(is_slow, self.slow_threshold, self.threshold)
        return {"threshold": thresholds, "gain": self.gain, "d_slow": torch.tensor(self.d_slow),
                "decay": torch.tensor(SLOW_DECAY), "prior": torch.tensor(float(SLOW_PRIOR))}, ()

    def related(self, latents, batch, fires):
        """Returns of slow latents the tokens that raise them most where they fire."""
        slow = [i for i, latent in enumerate(latents) if latent < self.d_slow]
        found = super().related(latents, batch, fires)
        if not slow or "memory" in ABLATE:
            return found
        held = self.memory_weights(batch.x.shape[1]).t() @ fires[..., slow]  # [batch, seq, slow]
        raised = held * ((batch.x - self.b_dec) @ self.W_enc[:, [latents[i] for i in slow]])
        by_token = torch.zeros(int(batch.tokens.max()) + 1, len(slow), device=raised.device)
        by_token.index_add_(0, batch.tokens.flatten(), zero_padding(batch, raised).flatten(0, 1))
        amounts, tokens = (by_token / by_token.clamp_min(0).sum(0).clamp_min(1e-9)).topk(8, dim=0)
        for i, of_latent, shares in zip(slow, tokens.t().tolist(), amounts.t().tolist()):
            texts = vocabulary_texts(load_tokenizer(), of_latent)
            found[i] = {"tokens that its memory holds": [
                (text, share) for text, share in zip(texts, shares) if share > 0]}
        return found


class TemporalContext(Temporal):
    """Temporal's encoder over the last BUFFER positions, from the first step on, without losses
    that bind; P is learned, or sinusoidal and fixed."""
    curriculum = (Stage("autoencoder", 20, PLAIN, anneals={"attends": True}),)

    def reach(self):
        return BUFFER, BUFFER - 1

    def add_positions(self):
        """Makes P [window, d_in], learned, or sinusoidal and fixed."""
        if BUFFER_POSITIONS == "learned":
            return super().add_positions()
        at = torch.arange(self.window)[:, None] / 1e4 ** (torch.arange(0, self.d_in, 2) / self.d_in)
        waves = torch.cat([at.sin(), at.cos()], 1)[:, :self.d_in]
        self.register_buffer("P", waves * (2 / self.d_in) ** 0.5)

    def losses(self, batch, latents):
        return BatchTopK.losses(self, batch, latents)


class AdaptationScan(torch.autograd.Function):
    """z_t = ReLU(pre_t - theta h_{t-1}), h_t = lam h_{t-1} + (1 - lam) ReLU(pre_t), h_{-1} = 0:
    pre [batch, seq, d]; lam, theta [d]."""

    @staticmethod
    def forward(ctx, pre, lam, theta):
        """Returns z by a scan over positions."""
        u, h = F.relu(pre), torch.zeros_like(pre)  # h[:, t]: h_{t-1}
        for t in range(1, pre.shape[1]):
            torch.lerp(u[:, t - 1], h[:, t - 1], lam, out=h[:, t])
        z = torch.addcmul(pre, h, theta, value=-1).relu_()
        ctx.save_for_backward(u, h, z, lam, theta)
        return z

    @staticmethod
    def backward(ctx, grad):
        """Returns the gradients to pre, lam and theta by the reversed scan."""
        u, h, z, lam, theta = ctx.saved_tensors
        grad = torch.ops.aten.threshold_backward(grad, z, 0)  # ReLU's, without a copy
        total = F.pad(grad[:, 1:] * -theta, (0, 0, 0, 1))  # dL / dh_t
        for t in reversed(range(total.shape[1] - 2)):
            total[:, t].addcmul_(total[:, t + 1], lam)
        grad_lam, grad_theta = (total * (h - u)).sum((0, 1)), -(grad * h).sum((0, 1))
        total = torch.ops.aten.threshold_backward(total.mul_(1 - lam), u, 0)
        return total.add_(grad), grad_lam, grad_theta


class TemporalAdaptation(SAE):
    """u_t = ReLU(pre_t), h_t = lam_i h_{t-1} + (1 - lam_i) u_t, z_t = ReLU(pre_t - theta h_{t-1});
    lam_i = exp(-softplus(beta) v_i ** T), T: the temperature, v_i = clamp(running variance of u_i /
    geometric mean of these over live latents, 1/16, 16);
    L = |x - x_hat|^2 + w |z|_1 + 1/32 auxk + REGULARISATION (beta, theta, T - their starts)^2.

    beta, theta = tanh(theta_raw) and T are global. ABLATE "sharing": beta and theta by latent;
    "variance_scaling": v = 1; "trace": no h; a standard SAE whose encoder reads
    beta x / v ** T + theta in place of x, v by input channel."""
    components = ("trace", "sharing", "variance_scaling")
    architecture = "temporal_adaptation"
    progress = 0.0  # of the stage, in [0, 1)

    @classmethod
    def curriculum(cls):
        """Returns one stage; a scheduled temperature follows its progress."""
        weights = PLAIN | {"sparsity": 1.0, "regularisation": REGULARISATION}
        return (Stage("autoencoder", 20, weights, anneals={"progress": lambda progress: progress}),)

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
        """Returns T, a scalar; scheduled: T exp(-T_decay progress)."""
        if "T_decay" not in self.starts:
            return self.T
        return self.T * torch.exp(-self.T_decay * self.progress)

    def scaled_variance(self):
        """Returns v [width]: the running variance over its geometric mean over live latents,
        clamped to [1/16, 16]."""
        if "variance_scaling" in ABLATE:
            return torch.ones_like(self.variance)
        log = self.variance.clamp_min(1e-9).log()
        mean = log[log > math.log(2e-9)].mean().nan_to_num(0.0)
        return (log - mean).exp().clamp(1 / 16, 16)

    def decay(self):
        """Returns lam [d_sae], or [width]: what a trace keeps from one position to the next."""
        return torch.exp(-F.softplus(self.beta) * self.scaled_variance() ** self.temperature())

    def encoder_inputs(self, batch):
        """Returns x; without a trace beta x / v ** T + theta."""
        if self.traces:
            return super().encoder_inputs(batch)
        scale = self.scaled_variance() ** -self.temperature()
        return self.beta * scale * batch.x + self.theta_raw.tanh(), self.b_dec, self.W_enc

    def encode(self, batch):
        """Returns Latents adapted by their traces; `extra` is the batch's variance in training."""
        if not self.traces:
            return super().encode(batch)._replace(extra=self.batch_variance(batch, batch.x))
        pre_acts = batch.x @ self.W_enc + (self.b_enc - self.b_dec @ self.W_enc)
        if batch.mask is not None:
            pre_acts = pre_acts.masked_fill(~batch.mask[..., None], MASKED_PRE_ACT)
        z = self.adapted(pre_acts)
        return Latents.from_dense(z)._replace(extra=self.batch_variance(batch, F.relu(pre_acts)))

    @torch.no_grad()
    def batch_variance(self, batch, values):
        """Returns the variance over tokens of each channel of values [batch, seq, d]: [d]; None in
        evaluation, which learns nothing from it."""
        if not self.training:
            return None
        values = drop_padding(batch, values)
        return values.square().mean(0) - values.mean(0).square()

    def adapted(self, pre_acts):
        """Returns z [batch, seq, d_sae] of pre-activations of the same shape."""
        lam, theta = self.decay().expand(self.d_sae), self.theta_raw.tanh().expand(self.d_sae)
        if DRIVE == "u":
            return AdaptationScan.apply(pre_acts, lam, theta)
        h, z = torch.zeros_like(pre_acts[:, 0]), []
        for pre in pre_acts.unbind(1):
            z.append(F.relu(pre - theta * h))
            h = torch.lerp(z[-1], h, lam)
        return torch.stack(z, 1)

    def losses(self, batch, latents):
        regularisation = sum((getattr(self, name) - start).square().mean()
                             for name, start in self.starts.items())
        return super().losses(batch, latents) | {"regularisation": regularisation}

    def after_step(self, batch, latents, l0):
        """The running variance follows that of the batch."""
        self.variance.lerp_(latents.extra, self.running_mean_weight(batch))

    def exported(self):
        return {"variance": self.variance}, ()

    @torch.no_grad()
    def parameters_of_interest(self):
        return {"beta": self.beta.mean().item(), "theta": self.theta_raw.tanh().mean().item(),
                "temperature": float(self.temperature())}


class Compositional(TopK):
    """f = TopK_k(ReLU((x - b_dec) W_enc + b_enc)); U: a row u_i = f_i E_i for each feature that is
    active at the token; U' = U + tanh(g) MHA(U), g = 0 at first; c = ReLU(W_c sum_i U'_i + b_c);
    z = TopK_k([f; c]);
    L = |x - z W_dec - b_dec|^2 + 1/32 auxk. COMPOSITION_SLOTS of the k places are reserved for the
    largest c: else features that respond to the same inputs would crowd them out. W_c starts at .1
    times the compositions' directions.

    In the first half k falls from 4 TARGET_L0, and attention combines a token's 2, 3, then 4
    largest features, later all. ABLATE "attention": U' = U; "gate": U' = U + MHA(U); "slots": the
    k largest; "bottleneck": z = [f; c]. It was proposed with BATCH_TOKENS 512 and LEARNING_RATE
    3e-4."""
    components = ("attention", "gate", "curriculum", "slots", "bottleneck")
    architecture = "compositional"
    widening = 1.0  # latents kept now / TARGET_L0
    combined = None  # features that attention combines; None: all

    @classmethod
    def curriculum(cls):
        """Returns two stages: k falls while more and more features combine, then all combine;
        without "curriculum" one plain stage."""
        if "curriculum" in ABLATE:
            return (Stage("all", 20, PLAIN),)
        annealed = {"widening": lambda done: 4 ** (1 - done),
                    "combined": lambda done: 2 + int(3 * done)}
        return (Stage("combinations", 10, PLAIN, anneals=annealed),
                Stage("all", 10, PLAIN, anneals={"widening": 1.0, "combined": None}))

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

    def encoder_inputs(self, batch):
        """Returns x, its centre and weights: W_enc for features; for compositions W_enc E W_c, a
        linear stand-in for how they read x, by which auxk revives them."""
        return batch.x, self.b_dec, torch.cat([self.W_enc, self.W_enc @ self.E @ self.W_c], 1)

    def n_kept(self):
        """Returns how many latents per token are kept now."""
        return min(round(self.k * self.widening), self.d_f, self.d_sae - self.d_f)

    def select(self, centred, W_enc, batch):
        return top_k_pairs(centred, W_enc[:, :self.d_f], self.b_enc[:self.d_f], self.n_kept())

    def heads(self, ids, f):
        """Returns of each head how a token's active features attend to each other [n, k, k], and
        their values [n, k, COMPOSITION_HEAD_WIDTH]; features ids [n, k] with amounts f [n, k]."""
        # a row of its own for each feature: PairDecode then gives u_i W
        one_by_one = Pairs.from_ids(ids.view(-1, 1))
        silent = (MASKED_PRE_ACT * (f <= 0))[:, None]
        parts = (PairDecode.apply(f.flatten(), self.E @ W, one_by_one)
                 .view(*ids.shape, COMPOSITION_HEADS, -1).unbind(2)
                 for W in (self.W_q * COMPOSITION_HEAD_WIDTH ** -0.5, self.W_k, self.W_v))
        return [(torch.baddbmm(silent, q, k.mT).softmax(-1), v) for q, k, v in zip(*parts)]

    def attention(self, ids, f):
        """Returns the attention between a token's features [n, heads, k, k]; None without any."""
        if "attention" in ABLATE:
            return None
        return torch.stack([weights for weights, _ in self.heads(ids, f)], 1)

    def compose(self, ids, f):
        """Returns compositions c [n, d_c] of features ids [n, k] with amounts f [n, k]."""
        total = PairDecode.apply(f.flatten(), self.E, Pairs.from_ids(ids))
        if "attention" not in ABLATE:
            if self.combined and self.combined < f.shape[1]:
                f, places = f.topk(self.combined)
                ids = ids.gather(1, places)
            is_active = (f > 0).to(f)[:, None]
            mixed = torch.cat([is_active @ weights @ v for weights, v in self.heads(ids, f)], -1)
            mixed = mixed[:, 0] @ self.W_o
            total = total + (1.0 if "gate" in ABLATE else self.gate.tanh()) * mixed
        return F.relu(total @ self.W_c + self.b_enc[self.d_f:])

    def features(self, batch):
        """Returns the features of each token: ids [n, k] and amounts [n, k]."""
        latents, k = super().encode(batch), self.n_kept()
        return latents.pairs.ids.view(-1, k), latents.values.view(-1, k)

    def encode(self, batch):
        """Returns the Latents [features; compositions] that the bottleneck keeps."""
        ids, f = self.features(batch)
        c = self.compose(ids, f).view(*batch.x.shape[:2], -1)
        c = zero_padding(batch, c).flatten(0, 1)
        k, n = self.n_kept(), c.shape[1]
        if not {"slots", "bottleneck"} & set(ABLATE):
            n = max(1, round(k * COMPOSITION_SLOTS))

        c, own = c.topk(n)
        values, ids = torch.cat([f, c], 1), torch.cat([ids, own + self.d_f], 1)
        if "bottleneck" not in ABLATE:
            # active ones of the n reserved places come before every feature
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


class Hierarchical(TopK):
    """h_1 = ReLU((x - b) W_enc1 + b_enc1), x_hat1 = h_1 W_dec1 + b: level 1, `lower`;
    z_2 = TopK_k(ReLU(h_1 W_enc + b_enc)), h_hat = ReLU(z_2 W_dec + c), W_dec >= 0,
    x_hat2 = h_hat W_dec1 + b: level 2, the latents.

    The parent of level-1 feature i is the latent p of level 2 with the largest W_dec[p, i]; G_p are
    the children of p. cosine = mean over children of
    max(0, .5 - cos(d_i, mean of its siblings)); group = E_t sum_p sqrt|G_p| |h_1[G_p]|_2. The
    first stage trains level 1, the second level 2 on the frozen first, the third both. Level 2 is
    initialised from Ward clusters of level 1's directions; ABLATE "start": at random;
    "nonnegative": W_dec of any sign."""
    components = ("start", "nonnegative")
    architecture = "hierarchical"
    level = 1  # the highest level trained so far: 1 or 2

    @classmethod
    def curriculum(cls):
        """Returns three stages: level 1; level 2 on the frozen first; both, at a lower rate."""
        upper = PLAIN | ({"sparsity": 1.0} if LEVEL_SPARSITY == "l1" else {})
        grouping = {"level_1": 1.0, "sparsity_1": 1.0, "cosine": COSINE_WEIGHT,
                    "group": GROUP_WEIGHT}
        return (Stage("level_1", 8, {"reconstruction": 1.0, "sparsity_1": 1.0}, ("lower",)),
                Stage("level_2", 8, upper, ("W_", "b_"), 1 / 3, {"level": 2}),
                Stage("both", 4, upper | grouping, ("",), 0.3, {"level": 2}))

    def __init__(self, d_in, d_sae, target_l0):
        d_1, d_2 = LEVEL_WIDTHS or (3 * d_sae // 2, d_sae)
        super().__init__(d_1, d_2, target_l0)
        self.W_enc = nn.Parameter(self.W_enc.data.contiguous())
        self.d_in, self.lower = d_in, SAE(d_in, d_1, round(LEVEL1_L0_RATIO * target_l0))
        self.register_buffer("begun", torch.tensor(False))  # whether level 2 has its start

    def initialise(self, batch):
        self.lower.initialise(batch)

    def begin_stage(self, batch):
        if self.level == 2 and not self.begun:
            self.start_level_2(batch, "start" not in ABLATE)

    @torch.no_grad()
    def start_level_2(self, batch, grouped=True):
        """Sets level 2: a latent for each Ward cluster of level 1's directions; not grouped: at
        random."""
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

    def levels(self, batch):
        """Returns level 1's Latents h_1 [batch, seq, d_1]."""
        return self.lower.encode(batch)

    def parents(self):
        """Returns the parent of each of level 1's features: [d_1]."""
        return self.W_dec.detach().max(0).indices

    def encoder_inputs(self, batch):
        return self.levels(batch).dense(), 0.0, self.W_enc

    def encode(self, batch):
        """Returns level 2's Latents; `extra` are level 1's. In the first stage none is active."""
        h, shape = self.levels(batch), (*batch.x.shape[:2], self.d_sae)
        if self.level == 1:  # no latents yet
            return Latents.from_dense(batch.x.new_zeros(shape))._replace(extra=h)
        z = zero_padding(batch, F.relu(h.decode(self.W_enc) + self.b_enc))
        if LEVEL_SPARSITY == "l1":
            return Latents.from_dense(z)._replace(extra=h)
        ids = largest(z.detach().flatten(0, 1), self.k)[1]
        values = z.flatten(0, 1).gather(1, ids).flatten()
        return Latents(values, values, Pairs.from_ids(ids), shape, h)

    def decode(self, latents):
        h_hat = F.relu(latents.decode(self.W_dec) + self.b_dec)
        return h_hat @ self.lower.W_dec + self.lower.b_dec

    def directions(self):
        return self.W_dec @ self.lower.W_dec

    def losses(self, batch, latents):
        """Returns the losses of the levels that learn; sparsity_1 has its steered weight in it."""
        if not self.lower.W_enc.requires_grad:  # level 1 is frozen
            return super().losses(batch, latents)
        h, error = latents.extra, squared_error(batch, self.lower.decode(latents.extra))
        terms = {"sparsity_1": self.lower.sparsity_weight * l1(batch, h)}
        if self.level == 1:
            return terms | {"reconstruction": error}
        return super().losses(batch, latents) | terms | {"level_1": error} | self.grouping(batch, h)

    def grouping(self, batch, h):
        """Returns the losses that group level 1's features h under their parents."""
        parent, d = self.parents(), self.lower.W_dec
        size = torch.bincount(parent, minlength=self.d_sae)
        siblings = d.new_zeros(self.d_sae, self.d_in).index_add(0, parent, d)[parent] - d
        cosine = F.cosine_similarity(d, siblings, dim=1)[size[parent] > 1]

        at = h.pairs.rows * self.d_sae + h.at(parent)  # [n_pairs] place of (token, parent)
        energy = h.values.new_zeros(len(h.pairs.starts) * self.d_sae).index_add(
            0, at, h.values.square()).view(-1, self.d_sae)
        norms = (energy + 1e-12).sqrt() * (energy > 0) * size.sqrt()
        return {"cosine": F.relu(0.5 - cosine).sum() / max(1, len(cosine)),
                "group": norms.sum() / n_tokens(batch)}

    def after_step(self, batch, latents, l0):
        """Steers level 1's L1 weight; keeps W_dec non-negative; no latent dies before level 2
        begins."""
        if self.lower.W_enc.requires_grad:
            self.lower.steer((latents.extra.values.detach() > 0).sum() / n_tokens(batch))
        if self.level == 1:
            self.tokens_since_fired.zero_()
            return
        if "nonnegative" not in ABLATE:
            self.W_dec.data.clamp_(min=0)

    def parameters_of_interest(self):
        parts = (self.lower, self)[:1 + (LEVEL_SPARSITY == "l1")]
        return {f"beta_{i}": part.sparsity_weight.item() for i, part in enumerate(parts, 1)}

    def related(self, latents, batch, fires):
        return children_of(latents, self.W_dec, load_tokenizer(), batch.tokens,
                           self.levels(batch).dense())


SAE_VARIANTS = {"standard": SAE, "topk": TopK, "batch_topk": BatchTopK, "jumprelu": JumpReLU,
                "gated": Gated, "matryoshka": Matryoshka, "tsae": TSAE, "slow": Slow,
                "temporal": Temporal, "temporal_adaptation": TemporalAdaptation,
                "temporal_context": TemporalContext, "compositional": Compositional,
                "hierarchical": Hierarchical}
# endregion


# region Trainer
# Knows no variant: only its curriculum, `encode`, `losses`, `begin_stage` and `after_step`.
class Later(NamedTuple):
    """The rest of a run after a training, for the forecast."""
    evaluation: float = 0.0  # seconds of one seed's evaluations; 0: unknown
    seeds: int = 0  # to train after this one


class TrainingSchedule:
    """Steps of each stage, done and to do; a forecast of their time that the deadline may
    shrink."""

    def __init__(self, stages, steps_per_epoch):
        self.stages, self.step = stages, 0  # steps done
        self.began, self.spent = time.time(), 0.0  # now; seconds of earlier processes
        # planned never changes; steps shrink to fit the deadline
        self.planned = self.steps = [round(stage.epochs * steps_per_epoch) for stage in stages]
        if 0 in self.planned:
            raise RunnerError(f"stage {stages[self.planned.index(0)].name!r} gets no step: raise "
                              "TRAIN_TOKENS or EPOCHS_SCALE, or lower BATCH_TOKENS.")

    def state_dict(self):
        """Returns what a checkpoint keeps."""
        return {"step": self.step, "steps": self.steps, "spent": self.seconds_spent()}

    def load_state_dict(self, state):
        """Takes over what `state_dict` gave."""
        self.step, self.steps, self.spent = state["step"], state["steps"], state["spent"]

    def seconds_spent(self):
        """Returns the seconds of this training, those of a killed process before it included."""
        return self.spent + time.time() - self.began

    def start(self, what, seconds, deadline, later):
        """Starts the clock: a step of each stage takes so many `seconds` at first; the Later
        follows."""
        self.seconds, self.deadline, self.later = seconds, deadline, later
        self.first_interval_over = False
        if not self.step:
            self.steps = RANKS.agree(fit_to_deadline(self.planned, 0, seconds, deadline))
        carrying = f"carrying on at step {self.step}, " if self.step else ""
        evaluation = f" and {readable_time(later.evaluation)} for the evaluations"
        print(f"{what}: {carrying}about {readable_time(self.forecast(self.step))} for "
              f"{sum(self.steps) - self.step:,} steps{evaluation * bool(later.evaluation)}",
              flush=True)

        self.progress = Progress(what, sum(self.steps), self.step)
        self.saved_at = time.time()
        self.timed_from = self.saved_at, self.step

    def forecast(self, step):
        """Returns the seconds of the steps after the first `step`."""
        return sum(n * s for n, s in zip(steps_left(self.steps, step), self.seconds))

    def run_forecast(self):
        """Returns the seconds that are left of the whole run, as far as they are known."""
        later = self.later
        return (self.forecast(self.step) + later.seeds * self.forecast(0)
                + (later.seeds + 1) * later.evaluation)

    def steps_of(self, i):
        """Yields (step, the stage's progress in [0, 1)) for each step of stage i still to do."""
        first = sum(self.steps[:i])
        while self.step < first + self.steps[i]:
            yield self.step, (self.step - first) / self.steps[i]

    def advance(self, stage, losses):
        """Counts a step as done."""
        self.step += 1
        self.progress.update(stage.name, self.step, losses, self.run_forecast())

    def is_multiple_of(self, every):
        """Returns whether the steps done are a multiple of `every`, or all are done."""
        return self.step % every == 0 or self.step == sum(self.steps)

    def checkpoint_due(self, seconds):
        """Returns whether so many `seconds` have passed since the last checkpoint, all steps are
        done, or the run is to stop; if so, starts to count anew."""
        over = self.step == sum(self.steps) or INTERRUPTS.requested
        if time.time() - self.saved_at <= seconds and not over:
            return False
        self.saved_at = time.time()
        return True

    def correct_forecast(self, i):
        """Corrects the seconds of a step by the pace in stage i, then the steps to the deadline."""
        (began, first), now = self.timed_from, time.time()
        if self.first_interval_over:  # the first steps are slow
            pace = (now - began) / (self.step - first) / self.seconds[i]
            self.seconds = [s * pace ** 0.3 for s in self.seconds]  # damped: a pace is noisy
        self.first_interval_over, self.timed_from = True, (now, self.step)
        fitted = fit_to_deadline(self.steps, self.step, self.seconds, self.deadline)
        self.steps = RANKS.agree(fitted)


class TrainingLog:
    """The figures of a training as final_info.json has them: lists by name, and tables {name: list}
    "losses" and "parameters" beside the list "step"."""

    def __init__(self):
        self.rows = {}

    def state_dict(self):
        """Returns what a checkpoint keeps."""
        return self.rows

    def load_state_dict(self, state):
        """Takes over what `state_dict` gave."""
        self.rows = state

    def append(self, **row):
        """Appends a row {name: value}: a plain value to the list of its name; a dict to a table,
        whose lists, one per key, get None at the steps where the key has no value."""
        for name, value in row.items():
            if not isinstance(value, dict):
                self.rows.setdefault(name, []).append(value)
                continue
            table = self.rows.setdefault(name, {})
            for key in table | value:
                earlier = [None] * (len(self.rows["step"]) - 1)
                table.setdefault(key, earlier).append(value.get(key))

    def record(self, step, stage, losses, sae):
        """Appends a step's figures. A loss that is not finite ends the run."""
        WATCHDOG.renew()
        values = {name: (RANKS.total(loss) / RANKS.size).item() for name, loss in losses.items()}
        if wrong := [f"{name} = {v}" for name, v in values.items() if not math.isfinite(v)]:
            raise RunnerError(f"step {step} of stage {stage.name!r}: {', '.join(wrong)}. Look for "
                              "a log or a division by zero in `losses`, or lower LEARNING_RATE.")
        followed = {name: finite_number(value, f"parameter of interest {name!r}")
                    for name, value in sae.parameters_of_interest().items()}
        dead = sae.dead_mask().float().mean().item()
        self.append(step=step, l0=values.pop("l0"), dead_fraction=dead, losses=values,
                    parameters=followed)


class Training(NamedTuple):
    """A finished training."""
    log: dict  # a TrainingLog's rows, with the stages' names and starts
    planned: list  # steps of each stage that the curriculum asks for
    done: list  # steps of each stage that were done
    seconds: float  # that it took, in all processes that worked on it


def curriculum_of(variant):
    """Returns the stages of a variant, which lists them or has a classmethod that does."""
    return variant.curriculum() if callable(variant.curriculum) else variant.curriculum


def planned_stages(variant):
    """Returns the variant's curriculum under ABLATE and EPOCHS_SCALE."""
    return [stage._replace(epochs=stage.epochs * EPOCHS_SCALE, weights={
        loss: weight for loss, weight in stage.weights.items() if loss not in ABLATE})
        for stage in curriculum_of(variant)]


def scheduled(value, done):
    """Returns a weight or an annealed value at the stage's progress `done` in [0, 1)."""
    return value(done) if callable(value) else value


def anneal(sae, stage, done):
    """Sets the attributes of the SAE that the stage anneals."""
    for attribute, value in stage.anneals.items():
        getattr(sae, attribute)  # raises AttributeError where the SAE has none of that name
        setattr(sae, attribute, scheduled(value, done))


def learning_rate(done, d_sae):
    """Returns the rate after the share `done` of all steps: it rises, stays, falls to zero."""
    base = LEARNING_RATE or 3e-3 * math.sqrt(1536 / d_sae)
    return base * min(1.0, (done + 1e-3) / WARMUP_FRACTION, (1 - done) / DECAY_FRACTION)


class ContiguousAdam(torch.optim.Adam):
    """Fused Adam. It would copy parameters that lie transposed in memory, so they are turned for
    the step."""

    def __init__(self, sae, lr):
        super().__init__(sae.parameters(), lr, fused=True)

    def step(self):
        """Does a step."""
        turned = [p for p in self.param_groups[0]["params"]
                  if p.grad is not None and p.dim() > 1 and not p.is_contiguous()]
        for p in turned:
            p.data, p.grad = p.data.mT, p.grad.mT
        super().step()
        for p in turned:
            p.data, p.grad = p.data.mT, p.grad.mT


def train_step(sae, optimizer, batch, stage, done):
    """Does one step, at the stage's progress `done`; returns the named losses and L0, detached."""
    anneal(sae, stage, done)
    if done == 0:
        sae.begin_stage(batch)

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
        step_on_unit_sphere(sae, optimizer)
        sae.tokens_since_fired.add_(n).masked_fill_(fired > 0, 0)
        l0 = fired.sum() / n
        sae.after_step(batch, latents, l0)
        if "sparsity" in stage.weights:
            sae.steer(l0)
    return {name: loss.detach() for name, loss in losses.items()} | {"l0": l0}


def step_on_unit_sphere(sae, optimizer):
    """Does the optimiser's step with rows of W_dec of unit norm before and after."""
    decoders = [part.W_dec for part in sae.modules()
                if isinstance(part, SAE) and part.W_dec.grad is not None]
    for W in decoders:  # without what the renormalisation would undo
        W.grad.addcmul_((W.grad * W).sum(1, keepdim=True), W, value=-1)
    nn.utils.clip_grad_norm_(sae.parameters(), GRADIENT_CLIP)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for W in decoders:
        W.div_(W.norm(dim=1, keepdim=True).clamp_min(1e-12))


def only_positions(batch):
    """Returns the batch with all but TRAIN_POSITIONS as padding."""
    if TRAIN_POSITIONS is None:
        return batch
    (low, high), at = TRAIN_POSITIONS, batch.positions.expand(batch.x.shape[:2])
    inside = (at >= low) & (at <= high)
    return batch._replace(mask=inside if batch.mask is None else inside & batch.mask)


@torch.no_grad()
def validation(sae, store):
    """Returns {"val_loss": the reconstruction loss on the first 128 held-out windows}, and the
    "consistency_gap" there of a variant that binds codes over time; leaves evaluation mode on."""
    batch = store.batch(store.heldout_chunks(128)[0])
    latents = sae.eval().encode(batch)
    found = {"val_loss": squared_error(batch, sae.decode(latents)).item()}
    if (bound := sae.bound_codes(latents)) is not None:
        found["consistency_gap"] = consistency_gap(batch, bound).item()
    return found


def seconds_per_step(sae, store, stages, size):
    """Returns the seconds that a step of each stage takes: of two steps on a copy of the SAE the
    latter is timed."""
    seconds, batch = [], store.batch(RANKS.share(np.arange(size)))
    for stage in stages:
        trial = copy.deepcopy(sae).train()
        optimizer = ContiguousAdam(trial, 1e-4)
        for _ in range(2):
            began = time.perf_counter()
            train_step(trial, optimizer, batch, stage, 0.0)
        seconds.append(time.perf_counter() - began)
    return seconds


def batch_ids(seed, step, n_windows, size):
    """Returns the windows of one training step: a slice of a permutation per (seed, epoch)."""
    epoch, place = divmod(step, n_windows // size)
    return epoch_order(seed, epoch, n_windows)[place * size:(place + 1) * size]


@functools.lru_cache(maxsize=2)
def epoch_order(seed, epoch, n_windows):
    """Returns the order of the training windows in an epoch."""
    return np.random.default_rng((seed, epoch)).permutation(n_windows)


@allow_tf32()
@INTERRUPTS.deferred()
def train(sae, store, stages, seed, size, deadline, state_path, later=Later()):
    """Trains `sae` in place on batches of `size` windows until `deadline` at the latest; returns
    the Training. A killed run carries on from the checkpoint at `state_path`, to the same bits.
    later: what follows, for the forecast."""
    n_windows, pool = store.windows.n_train, store.windows.train_pool(TRAIN_ON, FORGET)
    steps_per_epoch = n_windows // size

    def batch_at(step, share=RANKS.share):
        ids = pool[batch_ids(seed, step, n_windows, size) % len(pool)]
        return only_positions(store.batch(share(ids)))

    schedule, log = TrainingSchedule(stages, steps_per_epoch), TrainingLog()
    first = batch_at(0, lambda ids: ids)
    next_batch = prefetched(batch_at, slow=store.shard_tensors[0].device.type != DEVICE)
    sae.dead_after.fill_(int(DEAD_AFTER_FRACTION * sum(schedule.planned) * n_tokens(first)))
    sae.initialise(first)
    seconds, optimizer = seconds_per_step(sae, store, stages, size), ContiguousAdam(sae, 1e-4)
    parts = {"sae": sae, "optimizer": optimizer, "schedule": schedule, "log": log}
    load_state(state_path, parts)
    schedule.start(f"seed {seed}", seconds, deadline, later)

    for i, stage in enumerate(stages):
        # a resumed run skips finished stages but needs the attributes they ended with
        anneal(sae, stage, (schedule.steps[i] - 1) / schedule.steps[i])
        for name, p in sae.named_parameters():
            p.requires_grad_(name.startswith(stage.trains))

        for step, done in schedule.steps_of(i):
            torch.manual_seed(seed * 1_000_003 + step)  # so that no generator needs resuming
            rate = stage.lr * learning_rate(step / sum(schedule.steps), sae.d_sae)
            optimizer.param_groups[0]["lr"] = rate
            losses = train_step(sae.train(), optimizer, next_batch(step), stage, done)
            if not done:  # a stage has begun
                RANKS.same(sae)
            schedule.advance(stage, losses)

            if schedule.is_multiple_of(LOG_EVERY):
                log.record(schedule.step, stage, losses, sae)
                schedule.correct_forecast(i)
            if schedule.is_multiple_of(steps_per_epoch):
                log.append(val_step=schedule.step, **validation(sae, store))
            if schedule.checkpoint_due(CHECKPOINT_SECONDS):
                save_state(state_path, parts)
            INTERRUPTS.stop_here()

    schedule.progress.close()
    if sae.dead_mask().all():
        raise RunnerError(f"all {sae.d_sae} latents are dead after training.")
    return finished_training(schedule, log)


def finished_training(schedule, log):
    """Returns the Training, its log with the stages' names, starts and weighed losses."""
    starts = np.cumsum([0] + schedule.steps[:-1]).tolist()
    weighed = sorted({loss for stage in schedule.stages for loss in stage.weights})
    names = [stage.name for stage in schedule.stages]
    return Training(log.rows | {"stage_starts": starts, "stages": names, "weighed": weighed},
                    schedule.planned, schedule.steps, schedule.seconds_spent())


def save_state(path, parts):
    """Writes state_dict() of each of parts {name: part} to one file; rank 0 alone does."""
    if RANKS.rank:
        return
    with replacing(path) as partial:
        content = io.BytesIO()  # torch does not report a full disk
        torch.save({name: part.state_dict() for name, part in parts.items()}, content)
        partial.write_bytes(content.getbuffer())


def load_state(path, parts):
    """Loads into the parts what save_state wrote, where it did."""
    state = torch.load(path, weights_only=True) if path.exists() else {}
    for name in state:
        parts[name].load_state_dict(state[name])
# endregion


# region Model
LOADERS = {"config.json": "AutoConfig", "tokenizer": "AutoTokenizer",
           "weights": "AutoModelForCausalLM"}  # part of a model -> the class that loads it


def model_folder(name):
    """Returns the folder that a model's name means, seen from here or from this file; None where it
    is a hub id."""
    places = Path(name).expanduser(), HERE / name
    return next((path.resolve() for path in places if path.is_dir()), None)


def load_pretrained(name, part, **kwargs):
    """Returns a part (see LOADERS) of the model in a local folder or of a hub id. Raises
    RunnerError for all that can go wrong."""
    folder = model_folder(name)
    offline = folder is None and not hub_reachable()
    if offline:
        go_offline()
    try:
        return getattr(transformers, LOADERS[part]).from_pretrained(str(folder or name), **kwargs)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        cause = str(error).split("\n")[0].split("http")[0][:300]
        if folder is None and (name[0] in "./~" or name.count("/") > 1):
            cause = "there is no such folder"
        elif offline:
            cause = "the hub does not answer, and no model of that name was fetched from it before"
        elif "gated" in str(error).lower():
            cause = "gated: accept its licence on the hub and log in with `hf auth login`"
        raise RunnerError(f"MODEL_NAME = {name!r}: no {part} ({cause}). Names that work: "
                          "'embedded/model', 'EleutherAI/pythia-70m-deduped', a folder.") from None


@functools.cache
def load_tokenizer():
    """Returns MODEL_NAME's tokenizer."""
    return load_pretrained(MODEL_NAME, "tokenizer")


def load_config(name, layer, context_length):
    """Returns a model's text configuration and the layer, None meaning the middle one. Raises
    RunnerError where the model lacks that layer or takes no window so long."""
    config = load_pretrained(name, "config.json").get_text_config()
    depth = config.num_hidden_layers
    longest = getattr(config, "max_position_embeddings", None) or context_length
    layer = depth // 2 - 1 if layer is None else layer
    if not 0 <= layer < depth:
        raise RunnerError(f"LAYER = {layer}: the blocks of {name} are 0 to {depth - 1}.")
    if context_length > longest:
        raise RunnerError(f"CONTEXT_LENGTH = {context_length}: {name} takes {longest} at most.")
    return config, layer


def model_identity(name, config):
    """Returns what activations depend on: a local model's files, or a hub commit."""
    folder = model_folder(name)
    return folder_identity(folder) if folder else (name, config._commit_hash)


def model_bytes(config, dtype):
    """Returns the size in bytes of a model's parameters."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in model.parameters()) * dtype.itemsize


def load_model():
    """Returns MODEL_NAME in MODEL_DTYPE on DEVICE; where a GPU has no room for it, spread over all
    GPUs and the memory as accelerate places it."""
    options = {}
    if DEVICE == "cuda":
        need = model_bytes(load_pretrained(MODEL_NAME, "config.json"), MODEL_DTYPE)
        free = torch.cuda.mem_get_info()[0]
        if need > 0.8 * free and not importlib.util.find_spec("accelerate"):
            raise RunnerError(
                f"MODEL_NAME = {MODEL_NAME!r} takes {readable_bytes(need)}, and the GPU has "
                f"{readable_bytes(free)} free. Take a smaller model, or `pip install accelerate`, "
                "which spreads it over GPUs and memory.")
        options = {"device_map": "auto"} if need > 0.8 * free else {}
    model = load_pretrained(MODEL_NAME, "weights", dtype=MODEL_DTYPE, **options)
    return (model if options else model.to(DEVICE)).eval().requires_grad_(False)


def reinitialised_model(model):
    """Returns a model of the same configuration with random weights."""
    torch.manual_seed(0)
    with torch.device(model.device):
        other = transformers.AutoModelForCausalLM.from_config(model.config, dtype=model.dtype)
    return other.eval().requires_grad_(False)


def small_config(config):
    """Returns a copy of a configuration with two layers and a vocabulary of 256."""
    config = type(config).from_dict(config.to_dict())
    text = config.get_text_config()
    text.num_hidden_layers, text.vocab_size = 2, 256
    text.bos_token_id = text.eos_token_id = text.pad_token_id = 0
    if types := getattr(text, "layer_types", None):
        with suppress(AttributeError):  # in some families it follows from num_hidden_layers
            text.layer_types = types[:2]
    return config


def stand_in(config):
    """Returns a random model of the same family and hidden size: two layers, a vocabulary of 256.
    Raises RunnerError where it is no causal model."""
    config, tokens = small_config(config), torch.arange(1, 9, device=DEVICE).repeat(2, 1)
    tokens[1, -1] = 0  # a later token must not change earlier activations
    of_it = f"MODEL_NAME = {MODEL_NAME!r} ({config.model_type})"
    families = "Families that work: Pythia, GPT-2, Llama, Gemma, Qwen, OPT, Mistral."
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise RunnerError(f"{of_it} is no model of the next token. {families}")
    try:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model = model.to(DEVICE).eval()
        plain, changed = residual_after(model, 0, tokens)[:, :-1]
    except (RunnerError, TimeoutError):  # of find_blocks; of the watchdog
        raise
    except Exception as error:
        cause = f"{type(error).__name__}: {str(error)[:300]}"
        raise RunnerError(f"{of_it}: a small random model of its configuration cannot be made and "
                          f"run ({cause}). {families}") from error
    if not torch.allclose(plain, changed, atol=1e-5):
        raise RunnerError(f"{of_it} looks ahead: what follows a token changes its activations. "
                          f"{families}")
    return model


def find_blocks(model):
    """Returns the model's blocks: the largest ModuleList as long as the configuration says."""
    depth = model.config.get_text_config().num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not lists:
        raise RunnerError(f"MODEL_NAME = {model.name_or_path!r} has no list of {depth} blocks.")
    return max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))


class StopForward(Exception):
    """Ends a forward pass at the hooked layer; carries that layer's output."""


@torch.no_grad()
def block_output(model, layer, tokens):
    """Returns the output of block `layer`, a tensor or a tuple, list or ModelOutput that begins
    with one; nothing later is computed."""
    def stop(module, inputs, output):
        raise StopForward(output)

    try:
        with find_blocks(model)[layer].register_forward_hook(stop):
            model.base_model(input_ids=tokens, use_cache=False)
    except StopForward as stopped:
        return stopped.args[0]


def residual_after(model, layer, tokens):
    """Returns the residual stream after block `layer`: [batch, seq, d_in]."""
    output = block_output(model, layer, tokens)
    return (output if torch.is_tensor(output) else output[0]).to(DEVICE)


@torch.no_grad()
def logits_from(model, layer, hidden, tokens):
    """Returns the logits [batch, seq, vocab] from `hidden`, the residual stream after block `layer`
    [batch, seq, d_in]: the blocks up to that one are skipped."""
    skipped = find_blocks(model)[:layer + 1]
    real_output = block_output(model, layer, tokens[:1, :1])
    output = hidden.to(model.dtype)
    if isinstance(real_output, dict):  # a ModelOutput
        output = type(real_output)(**{**real_output, next(iter(real_output)): output})
    elif not torch.is_tensor(real_output):
        output = type(real_output)([output, *real_output[1:]])

    # accelerate sets block.forward on models spread over devices: it is put back afterwards
    before = [vars(block).get("forward") for block in skipped]
    for block in skipped:
        block.forward = lambda *args, **kwargs: output
    try:
        return model(input_ids=tokens, use_cache=False).logits.to(DEVICE, torch.float32)
    finally:
        for block, forward in zip(skipped, before):
            del block.forward
            if forward:
                block.forward = forward
# endregion


# region Activations
# Collected once, cached by what decides them, shared by all runs.
class Store:
    """Activations of all windows, [window, CONTEXT_LENGTH, d_in], cached; batches of them."""

    def __init__(self, folder, windows, d_in, dtype):
        self.folder, self.windows, self.d_in, self.dtype = folder, windows, d_in, dtype
        self.shards = shard_table(folder, len(windows.tokens), SHARD_WINDOWS)

    def collect(self, get_model, layer):
        """Collects the missing shards, under a lock that other runs wait for; then opens all."""
        row_bytes = CONTEXT_LENGTH * self.d_in * self.dtype.itemsize
        with missing_shards(self.shards, row_bytes) as missing:
            for shard in missing:
                self.collect_shard(get_model(), layer, shard)
        row_shape = CONTEXT_LENGTH, self.d_in
        self.shard_tensors = open_shards(self.shards, row_shape, self.dtype, DEVICE)
        self.normalise()

    def collect_shard(self, model, layer, shard):
        """Writes the activations of a shard's windows."""
        rows = np.arange(shard.start, shard.start + shard.rows)
        write_shard(shard.path, (
            residual_after(model, layer, self.tokens(rows[i:i + 32])).to(self.dtype)
            for i in range(0, len(rows), 32)), ": the model overflows before LAYER ends. Take "
            "MODEL_DTYPE = torch.float32, or an earlier LAYER")

    def normalise(self):
        """Sets mean [d_in] and scale from the first 2^18 training tokens: mean squared norm 1."""
        self.mean, self.scale = torch.zeros(self.d_in, device=DEVICE), 1.0  # for now: raw
        sample = np.arange(min(self.windows.n_train, 2 ** 18 // CONTEXT_LENGTH))
        sums, squares, n = self.moments(np.array_split(sample, len(sample) // 64 + 1))
        mean = sums.sum(0) / n.sum()
        variance, size = squares.sum() / n.sum() - mean.square().sum(), squares.sum() / n.sum()
        if not variance > 1e-10 * size:
            raise RunnerError("the activations after this LAYER are the same at every token: the "
                              "weights of the model may be missing, or its first blocks broken.")
        self.mean, self.scale = mean.float(), variance.sqrt().item()

    def moments(self, chunks):
        """Returns sums over windows (chunks of ids) at each position: of x [seq, d_in], of |x|^2
        [seq], and the number of tokens [seq]."""
        sums = []
        for ids in chunks:
            x, keep = self.batch(ids).x.double(), self.valid(ids)
            parts = x * keep[..., None], (x ** 2).sum(-1) * keep, keep
            sums.append([part.sum(0) for part in parts])
        return map(sum, zip(*sums))

    def tokens(self, ids):
        """Returns the tokens of windows with BOS, [len(ids), CONTEXT_LENGTH]."""
        return torch.from_numpy(self.windows.tokens[ids].astype(np.int64)).to(DEVICE)

    def valid(self, ids):
        """Returns [len(ids), seq] False at padding, without BOS."""
        return torch.from_numpy(self.windows.valid(ids)[:, 1:]).to(DEVICE)

    def raw(self, ids):
        """Returns activations as the model made them, with BOS: [len(ids), CONTEXT_LENGTH,
        d_in]."""
        rows = [self.shard_tensors[i // SHARD_WINDOWS][i % SHARD_WINDOWS] for i in map(int, ids)]
        return torch.stack(rows).to(DEVICE, torch.float32)

    def batch(self, ids):
        """Returns the Batch of the windows `ids`."""
        doc_ids, mask = self.windows.doc_ids[ids], self.valid(ids)
        return self.batch_of(self.raw(ids), self.tokens(ids), doc_ids, mask)

    def batch_of(self, raw, tokens, doc_ids, mask):
        """Returns the Batch of raw activations [batch, 1 + seq, d_in] and tokens with BOS, or None;
        mask [batch, seq]."""
        return Batch((raw[:, 1:] - self.mean) / self.scale,
                     None if tokens is None else tokens[:, 1:],
                     torch.as_tensor(doc_ids, device=DEVICE),
                     torch.arange(1, raw.shape[1], device=DEVICE), None if mask.all() else mask)

    def x(self, ids):
        """Returns x of many windows, [len(ids), seq, d_in]."""
        return torch.cat([self.batch(part).x for part in np.array_split(ids, len(ids) // 64 + 1)])

    def unscaled(self, x):
        """Returns x [..., d_in] as the model made it."""
        return x * self.scale + self.mean

    def heldout_chunks(self, size):
        """Returns the ids of the held-out windows in chunks of at most `size`."""
        return np.array_split(ids := self.windows.heldout(), range(size, len(ids), size))


def memory_plan(config, store):
    """Returns one line on what will take memory; where a GPU has too little, what to lower."""
    d_in, d_sae, model = store.d_in, round(EXPANSION * store.d_in), model_bytes(config, store.dtype)
    sae, step = 16 * (2 * d_in + 2) * d_sae, 4 * BATCH_TOKENS * (3 * d_sae + 8 * d_in)
    activations = store.windows.tokens.size * d_in * store.dtype.itemsize
    text = (f"memory: model {readable_bytes(model)}, SAE with its optimiser {readable_bytes(sae)}, "
            f"a training step {readable_bytes(step)}; activations {readable_bytes(activations)} on "
            "disk")
    if DEVICE != "cuda":
        return text

    free = torch.cuda.mem_get_info()[0]
    on_gpu = activations < (free - model) // 2
    room = free - model - activations * on_gpu
    text += (f", {'kept on the GPU' if on_gpu else 'read as they are needed'}; "
             f"{readable_bytes(free)} free")
    if sae + step > room > sae:
        fits = max(1, int(BATCH_TOKENS * (room - sae) / step))
        text += f". Too much: BATCH_TOKENS = {fits} would fit"
    elif sae + step > room:
        text += f". Too much: EXPANSION = {EXPANSION * max(room, 0) / (sae + step):.2g} would fit"
    return text
# endregion


# region Evaluation: shared
# Evaluations are functions of a Run that return a Result. Results are on held-out documents; what
# is fitted or chosen for them may be so on training ones. "ids" are numbers of windows, "rows"
# count the held-out windows from 0, and a "place" is row * seq + position - 1, with seq =
# CONTEXT_LENGTH - 1. "The sample" is the first held-out window of each file; "the page" is
# features.html. Of Windows (data/windows.py), heldout() and sample() are ids, full() rows without
# padding, heldout_tokens() the places that count; firings(codes, ids) gives each latent's places in
# order, and its values there.
class LiveRule(NamedTuple):
    """A live latent fires that often, in so many files, and on at most half of the tokens."""
    firings: int
    files: int


@dataclass
class Run:
    """All that an evaluation may look at."""
    sae: SAE
    store: Store
    get_model: Callable  # () -> the language model
    layer: int  # the SAE reads the residual stream after this block
    live_rule: LiveRule
    log: dict  # of the training
    seed: int = 0
    tiny: bool = False  # the preflight's: smallest sizes everywhere

    @functools.cached_property
    def encoded(self):
        """The Encoded held-out windows."""
        return encode_windows(self.sae, self.store, self.store.windows.heldout())

    @functools.cached_property
    def live(self):
        """The LiveLatents: those that core's fractions, temporal, detection and the page cover."""
        return live_latents(self.encoded.codes, self.store.windows, self.live_rule)

    @functools.cached_property
    def detections(self):
        """The Detection of each of random_latents."""
        return detections(self)


class Result(NamedTuple):
    """An evaluation's findings."""
    metrics: dict  # name, unlike any of another evaluation -> a finite number; one that is
    #                undefined is left out
    curves: dict  # name -> list
    per_sequence: dict  # name -> list of floats, one per held-out file, in the sample's order


class Encoded(NamedTuple):
    """Windows as an SAE encodes and decodes them. Arrays are NaN at padding."""
    codes: csr_array  # latents, sparse by column [window * seq + position - 1, d_sae]
    error: np.ndarray  # [window, seq] |x - x_hat|^2
    norm: np.ndarray  # [window, seq] |x|^2, a square, in the SAE's units
    norm_hat: np.ndarray  # [window, seq] |x_hat|^2, a square too
    dot: np.ndarray  # [window, seq] x . x_hat
    l0: np.ndarray  # [window, seq] active latents
    tokens_per_second: float


@torch.no_grad()
def encode_windows(sae, store, windows):
    """Returns windows (ids) as Encoded."""
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
    codes = vstack(codes, "csc")
    speed = codes.shape[0] / (time.perf_counter() - began)
    return Encoded(codes, *np.concatenate(rows, 1), speed)


def explained_variance(encoded, variance):
    """Returns 1 - E|x - x_hat|^2 / sum_d Var(x_d), both over all held-out tokens; the variance is
    about their mean."""
    return 1 - np.nanmean(encoded.error) / variance


def explained_by(sae, store, variance):
    """Returns the explained variance of an SAE on the held-out tokens."""
    return explained_variance(encode_windows(sae, store, store.windows.heldout()), variance)


def variance_by_position(store):
    """Returns the variance of held-out x about its overall mean: by position [seq], and overall."""
    sums, squares, n = store.moments(store.heldout_chunks(64))
    mean = sums.sum(0) / n.sum()
    total = squares - 2 * (sums @ mean) + n * mean.square().sum()
    return (total / n.clamp_min(1)).tolist(), (total.sum() / n.sum()).item()


# --- units and when they fire ---
class Activity(NamedTuple):
    """When units fire: on which of the n tokens that count, and how strongly."""
    places: list  # unit -> tokens [firings], in order, numbered 0 to n - 1 among those that count
    values: list  # unit -> [firings]
    n: int  # tokens

    @classmethod
    def of(cls, codes, keep):
        """Returns the activity of codes, sparse by column [token, unit]; `keep`: the tokens that
        count, in order."""
        rank = np.full(codes.shape[0], -1)
        rank[keep] = np.arange(len(keep))
        parts = firings(codes, np.arange(codes.shape[1]))
        return cls([rank[at] for at, _ in parts], [values for _, values in parts], len(keep))

    def rates(self):
        """Returns the firing rate of each unit: [unit]."""
        return np.array([len(at) for at in self.places]) / self.n

    def live(self, files, rule):
        """Returns [unit] whether it is live by the LiveRule; files [n] of each token."""
        return np.array([rule.firings <= len(at) <= self.n / 2
                         and len(np.unique(files[at])) >= rule.files for at in self.places])

    def only(self, units):
        """Returns the activity of some units."""
        return Activity([self.places[i] for i in units], [self.values[i] for i in units], self.n)

    def union(self, groups):
        """Returns the activity of groups [unit] of units: one fires where one of its units does."""
        members = [np.flatnonzero(groups == g) for g in range(max(groups) + 1)]
        places = [np.unique(np.concatenate([self.places[i] for i in units])) for units in members]
        return Activity(places, [np.ones(len(at)) for at in places], self.n)


class LiveLatents(NamedTuple):
    """The latents that pass the LiveRule."""
    mask: np.ndarray  # [d_sae] True at live latents
    rate: np.ndarray  # [d_sae] firing rate of every latent

    @property
    def ids(self):
        """The live latents, in order."""
        return np.flatnonzero(self.mask)


def heldout_files(windows):
    """Returns the document of each held-out token that counts."""
    return windows.doc_ids[windows.n_train + windows.heldout_tokens()
                           // (windows.tokens.shape[1] - 1)]


def live_latents(codes, windows, rule):
    """Returns the LiveLatents of codes of the held-out tokens, sparse by column [token, d_sae]."""
    activity = Activity.of(codes, windows.heldout_tokens())
    live = activity.live(heldout_files(windows), rule)
    if not live.any():
        raise RunnerError(f"no latent of {len(live)} is live: fired {rule.firings} times in "
                          f"{rule.files} held-out files (L0 = {codes.nnz / codes.shape[0]:.2f}).")
    return LiveLatents(live, activity.rates())


def percentiles_95(codes, latents=None):
    """Returns the 95th percentile of each latent's non-zero values, 1 where it never fires:
    [latent]; codes sparse by column [token, d_sae]; latents: which ones (None: all)."""
    latents = np.arange(codes.shape[1]) if latents is None else latents
    return np.array([np.quantile(values, 0.95) if len(values) else 1.0
                     for _, values in firings(codes, latents)], dtype=np.float32)


def rate_matched(rate, chosen):
    """Returns for each of the chosen units, in their order, another one: the nearest in rate [n]
    that is neither chosen nor taken yet, as far as there are any."""
    free = np.ones(len(rate), dtype=bool)
    free[chosen] = False
    matches = []
    for unit in chosen[:free.sum()]:
        others = np.flatnonzero(free)
        nearest = others[np.abs(rate[others] - rate[unit]).argmin()]
        free[nearest] = False
        matches.append(nearest)
    return np.array(matches, dtype=int)


def token_classes(windows):
    """Returns a class for each held-out token but BOS, [window * seq + position - 1]: its labels
    taken together; without labels the token itself where it is one of the 255 most frequent."""
    tokens = windows.tokens[windows.n_train:, 1:].ravel()
    if windows.labels is not None and (windows.labels >= 0).any():
        labels = windows.labels[:, 1:].reshape(len(tokens), -1)
        return np.unique(labels, axis=0, return_inverse=True)[1].ravel()
    rank = np.argsort(np.argsort(-np.bincount(tokens), kind="stable"))
    return np.minimum(rank[tokens], 255)


def miller_madow_entropy(values):
    """Returns the entropy in nats of a sample, Miller-Madow corrected."""
    share = np.unique(values, return_counts=True)[1] / len(values)
    return -(share * np.log(share)).sum() + (len(share) - 1) / (2 * len(values))


def bags_of_tokens(windows, rows, positions, last):
    """Returns counts of the tokens at each position [n] of the windows `rows` [n] and of the
    last - 1 before it, sparse [n, vocabulary]."""
    back = np.maximum(positions[:, None] - np.arange(last), 0)
    tokens, shape = windows.tokens[rows[:, None], back], (len(rows), int(windows.tokens.max()) + 1)
    ends = np.arange(len(rows) + 1) * last
    return csr_array((np.ones(tokens.size), tokens.ravel(), ends), shape)


# --- through the language model ---
@torch.no_grad()
def spliced(run, ids, splice):
    """Yields, for windows `ids` in chunks: ids, log-probabilities [n, seq - 1, vocab] of what
    follows each position, and the cross-entropy [n, seq - 1] of what did, NaN at padding.
    splice(batch) gives the residual stream [batch, seq, d_in], unscaled; BOS is left alone."""
    model, store = run.get_model(), run.store
    for part in np.array_split(ids, len(ids) // 16 + 1):
        tokens, padding = store.tokens(part), ~store.valid(part)[:, 1:]
        hidden = torch.cat([store.raw(part)[:, :1], splice(store.batch(part))], 1)
        logp = logits_from(model, run.layer, hidden, tokens)[:, 1:-1].log_softmax(-1)
        loss = -logp.gather(2, tokens[:, 2:, None])[..., 0].double()
        yield part, logp, loss.masked_fill(padding, torch.nan).cpu().numpy()


def next_token_losses(run, splice):
    """Returns of the sample, after each position, [sample, seq - 1], NaN at padding: the
    cross-entropy, and the KL divergence from the model's own distribution."""
    ids, parts = run.store.windows.sample(), []
    whole = spliced(run, ids, lambda batch: run.store.unscaled(batch.x))
    for (_, model_logp, _), (_, logp, loss) in zip(whole, spliced(run, ids, splice)):
        kl = (model_logp.exp() * (model_logp - logp)).sum(-1).cpu().numpy()
        parts.append((loss, np.where(np.isnan(loss), np.nan, kl)))
    return np.concatenate(parts, 1)


@contextmanager
def editing(run, edit, tokens=None, mask=None):
    """While open, edit(batch) is added to the residual stream after block run.layer, but not at the
    first position. Yields the model. Works for one pass over whole texts, then tokens and mask
    [batch, seq] may be given; and for generation with a cache, where later tokens come one by one,
    then both are None."""
    past = []  # hidden states so far, [batch, seq, d_in]

    def change(module, inputs, output):
        hidden = output[0] if isinstance(output, tuple) else output
        past[:] = [torch.cat([*past, hidden.float()], 1)]  # a copy: `hidden` is changed in place
        everywhere = torch.ones(past[0].shape[:2], dtype=torch.bool, device=past[0].device)
        keep = everywhere if mask is None else mask
        if keep.shape[1] > 1:
            batch = run.store.batch_of(past[0], tokens, np.arange(len(keep)), keep[:, 1:])
            delta = edit(batch)[:, -hidden.shape[1]:] * run.store.scale
            hidden[:, -delta.shape[1]:] += delta

    with find_blocks(run.get_model())[run.layer].register_forward_hook(change):
        yield run.get_model()


def edited_logits(run, edit, tokens, mask):
    """Returns the logits [batch, seq, vocab] of tokens [batch, seq] that count where the mask is
    True, with edit(batch) added to the residual stream."""
    tokens, mask = (torch.from_numpy(part).to(DEVICE) for part in (tokens, mask))
    with editing(run, edit, tokens, mask) as model:
        size = model.get_input_embeddings().num_embeddings  # the preflight's is small
        return model(tokens % size, attention_mask=mask.long(), use_cache=False).logits


# --- SAEs that an evaluation compares with ---
def untrained(run):
    """Returns an untrained TopK SAE of the run's width and TARGET_L0."""
    torch.manual_seed(0)
    return TopK(run.sae.d_in, run.sae.d_sae, TARGET_L0).to(DEVICE).eval()


def peer_batch(store):
    """Returns the windows of a batch of SAEs that are trained beside the run's own."""
    return min(BATCH_TOKENS // CONTEXT_LENGTH, store.windows.n_train)
# endregion


# region Evaluation: core
def eval_core(run):
    """Reconstruction, sparsity and next-token loss, beside controls that no SAE changes."""
    sae, store, base = run.sae, run.store, controls(run)
    encoded, variance = run.encoded, base.variance
    losses, kl = next_token_losses(run, lambda b: store.unscaled(sae.decode(sae.encode(b))))
    permuted = copy.deepcopy(sae)
    permuted.W_dec.data = sae.W_dec.data.roll(sae.d_sae // 2, 0)

    metrics = base.metrics | reconstruction_metrics(encoded, variance) | {
        **sparsity_metrics(run), **next_token_metrics(losses, kl, base.metrics),
        "permuted_decoder_explained_variance": explained_by(permuted, store, variance)}
    by_position = 1 - np.nanmean(encoded.error, 0) / base.variance_by_position
    curves = {"explained_variance_by_position": by_position,
              "loss_increase_by_position": np.nanmean(losses, 0) - base.ce_by_position}
    sample_rows = store.windows.sample() - store.windows.n_train
    per_sequence = {"fvu": np.nanmean(encoded.error[sample_rows], 1) / variance,
                    "l0": np.nanmean(encoded.l0[sample_rows], 1),
                    "loss_increase_nats": np.nanmean(losses, 1) - base.ce_by_sequence}
    return Result(metrics, curves, per_sequence)


def reconstruction_metrics(encoded, variance):
    """Returns how x_hat compares with x: explained variance, mean cosine, mean |x_hat| / |x|,
    E|x_hat|^2 / E[x . x_hat]."""
    norm_hat = encoded.norm_hat
    cosine = encoded.dot / np.sqrt(encoded.norm * norm_hat + 1e-12)
    return {"explained_variance": explained_variance(encoded, variance),
            "cosine": np.nanmean(cosine), "l2_ratio": np.nanmean(np.sqrt(norm_hat / encoded.norm)),
            "relative_reconstruction_bias": np.nanmean(norm_hat) / np.nanmean(encoded.dot),
            "avg_inference_tokens_per_second": encoded.tokens_per_second}


def sparsity_metrics(run):
    """Returns mean L0 and the shares of latents that are dead, live, dense (fire on more than a
    tenth of the tokens) and, of the live ones, that fire on a single token."""
    rate, live = run.live.rate, run.live.mask
    return {"l0": np.nanmean(run.encoded.l0), "dead_fraction": (rate == 0).mean(),
            "live_fraction": live.mean(), "dense_fraction": (rate > 0.1).mean(),
            "single_token_fraction": single_token_fraction(
                run.store.windows, firings(run.encoded.codes, run.live.ids))}


def next_token_metrics(losses, kl, control):
    """Returns the model's loss with x_hat in place of x, its increase in nats, KL, and the share
    recovered of the loss between a worst case and the model's own: unigrams, or the stream ablated
    to its mean or to zero. All are means over tokens."""
    ce_sae, metrics = np.nanmean(losses), {}
    for worst in ("unigram", "mean", "zero"):
        whole = control[f"ce_{worst}"] - control["ce_model"]
        metrics[f"ce_recovered_vs_{worst}"] = (control[f"ce_{worst}"] - ce_sae) / whole
    return metrics | {"kl": np.nanmean(kl), "ce_sae": ce_sae,
                      "loss_increase_nats": ce_sae - control["ce_model"]}


def single_token_fraction(windows, fired, most=40):
    """Returns the share of units of which 90 % of the 40 strongest firings are one token. fired, of
    each unit: the held-out tokens where it fires [n], its values there [n]."""
    tokens = windows.tokens[windows.n_train:, 1:].ravel()
    strongest = [tokens[at[np.argsort(-values, kind="stable")[:most]]] for at, values in fired]
    return np.mean([np.bincount(top).max() >= 0.9 * len(top) for top in strongest])


class Controls(NamedTuple):
    """Figures that no SAE changes."""
    metrics: dict  # the model's own loss, ablated losses, lookups, untrained and random controls
    variance: float  # sum over channels of the variance of held-out x
    variance_by_position: list  # [seq]
    ce_by_sequence: list  # [sample] the model's own loss
    ce_by_position: list  # [seq - 1]


def controls(run):
    """Returns the Controls, cached in the store's folder under a key of the code that makes
    them."""
    key = code_key(compute_controls, Store, Run, run.live_rule, run.sae.d_sae)
    path = run.store.folder / f"controls-{key}.json"
    return Controls(**cached_json(path, lambda: compute_controls(run)._asdict()))


def compute_controls(run):
    """Returns the Controls of the run's activations."""
    print("computing the model's own loss and the controls", flush=True)
    store, (by_position, variance) = run.store, variance_by_position(run.store)
    vocabulary = len(run.get_model().get_output_embeddings().weight)
    own = next_token_losses(run, lambda batch: store.unscaled(batch.x))[0]
    zero = next_token_losses(run, lambda batch: torch.zeros_like(batch.x))[0]
    mean = next_token_losses(run, lambda batch: store.mean.expand_as(batch.x))[0]
    losses = {"ce_model": own, "ce_unigram": unigram_losses(store.windows, vocabulary),
              "ce_zero": zero, "ce_mean": mean}

    lookup_error = bigram_error(store.windows, lambda ids: store.batch(ids).x.cpu().numpy())
    metrics = {name: float(np.nanmean(loss)) for name, loss in losses.items()} | {
        "bigram_explained_variance": 1 - lookup_error / variance,
        "untrained_explained_variance": explained_by(untrained(run), store, variance),
        **random_model_detection(run)}
    return Controls(metrics, variance, by_position, np.nanmean(own, 1).tolist(),
                    np.nanmean(own, 0).tolist())


def unigram_losses(windows, vocabulary):
    """Returns the cross-entropy of the sample's tokens from the third on, [sample, seq - 1], under
    the training tokens' frequencies, one added to each count; NaN at padding."""
    training, sample = np.arange(windows.n_train), windows.sample()
    seen = windows.tokens[training][windows.valid(training)]
    counts = np.bincount(seen, minlength=vocabulary) + 1.0
    losses = -np.log(counts / counts.sum())[windows.tokens[sample][:, 2:]]
    return np.where(windows.valid(sample)[:, 2:], losses, np.nan)


def bigram_error(windows, activations, most=2 ** 18):
    """Returns the mean squared error on held-out tokens of a lookup by (previous token, token),
    fitted on the first `most` training tokens: a pair's mean, shrunk by one pseudo-count to its
    token's, and that to 0. activations(ids): x of windows, [len(ids), seq, d]."""
    vocabulary = int(windows.tokens.max()) + 1

    def rows(ids):  # token and pair of each valid token, and its activation
        keep, tokens = windows.valid(ids)[:, 1:], windows.tokens[ids].astype(np.int64)
        pairs = tokens[:, :-1] * vocabulary + tokens[:, 1:]
        return tokens[:, 1:][keep], pairs[keep], activations(ids)[keep]

    first = np.arange(min(windows.n_train, most // windows.tokens.shape[1]))
    tokens, pairs, x = rows(first)
    token_means = shrunk_means(tokens, x, np.zeros((vocabulary, x.shape[1]), x.dtype))
    known, index = np.unique(pairs, return_inverse=True)
    pair_means, errors = shrunk_means(index, x, token_means[known % vocabulary]), []
    for ids in np.array_split(windows.heldout(), len(windows.heldout()) // 64 + 1):
        tokens, pairs, x = rows(ids)
        at = np.searchsorted(known, pairs).clip(max=len(known) - 1)
        seen = (known[at] == pairs)[:, None]
        estimate = np.where(seen, pair_means[at], token_means[tokens])
        errors.append(np.square(x - estimate).sum(1))
    return np.concatenate(errors).mean(dtype=float)


def shrunk_means(index, x, prior):
    """Returns the mean of rows x [n, d] by index [n], with one more row as the prior says: [m,
    d]."""
    ones = np.ones(len(index), x.dtype)
    members = csr_array((ones, (index, np.arange(len(index)))), (len(prior), len(index)))
    counts = np.bincount(index, minlength=len(prior))[:, None]
    return (members @ x + prior) / (counts + 1)


def random_model_detection(run):
    """Returns the detection metrics of an untrained TopK on the same model with random weights:
    what the metric gives where nothing was learned."""
    model, store = reinitialised_model(run.get_model()), run.store
    other = Store(store.folder / "random", store.windows.fewer(256), store.d_in, store.dtype)
    other.collect(lambda: model, run.layer)
    control = Run(untrained(run), other, lambda: model, run.layer, run.live_rule, {}, tiny=run.tiny)
    metrics = eval_detection(control).metrics
    return {f"{name}_reinitialised": float(value) for name, value in metrics.items()}
# endregion


# region Evaluation: temporal
# Slow explained variance, stability and smoothness are of the held-out windows without padding, all
# else of all held-out tokens; so are the firing rates: LatentStatistics.rate is of the former,
# run.live.rate of the latter.
class LatentStatistics(NamedTuple):
    """Statistics of the live latents on full windows."""
    stability: np.ndarray  # [latent, window] excess autocorrelation over STABILITY_LAGS
    stability_far: np.ndarray  # [latent, window] over FAR_LAGS
    between: np.ndarray  # [latent] the autocorrelation that stays with positions permuted
    null: np.ndarray  # [latent, draw] mean stability with positions permuted
    token_surrogate: np.ndarray  # [latent] mean stability of P(fire | token)
    autocorrelation: np.ndarray  # [latent, lag] from lag 1
    rate: np.ndarray  # [latent] share of tokens on which it fires
    energy: np.ndarray  # [latent] E[z^2]
    smoothness: np.ndarray  # [window] mean over active latents, z in units of q95
    smoothness_raw: np.ndarray  # [window] the same without units

    @property
    def weight(self):
        """The share of each latent in the energy: [latent]."""
        return self.energy / self.energy.sum()

    @property
    def mean_stability(self):
        """The mean over windows: [latent]."""
        return self.stability.mean(1)


@torch.no_grad()
def eval_temporal(run):
    """Slow explained variance, stability and polysemanticity beside their nulls, smoothness,
    coherence, parameters."""
    windows, live, rng = run.store.windows, run.live.ids, np.random.default_rng(0)
    torch.manual_seed(0)
    full, seq, codes = windows.full(), CONTEXT_LENGTH - 1, run.encoded.codes  # full: rows
    fired, q95 = [at for at, _ in firings(codes, live)], percentiles_95(codes, live)
    in_full = (full[:, None] * seq + np.arange(seq)).ravel()
    full_codes = codes.tocsr()[in_full]
    statistics = latent_statistics(run, full_codes, full, live, q95)

    stability, by_window = stability_metrics(statistics, seq)
    slow, slow_by_window = slow_metrics(run, full_codes, full)
    smooth = {"smoothness": statistics.smoothness.mean(),
              "smoothness_raw": statistics.smoothness_raw.mean()}
    metrics = slow | stability | smooth | polysemanticity_metrics(
        run, fired, statistics.rate.mean(), rng)
    metrics |= halves_of_the_window(run) | parameter_metrics(run)
    files = windows.doc_ids[windows.n_train:]
    value = coherence(fired, token_classes(windows), files, run.live.rate[live], rng)
    metrics |= {} if value is None else {"coherence": value}

    of_window = slow_by_window | by_window | {"smoothness": statistics.smoothness}
    per_sequence = {name: windows.by_document(values, files[full])
                    for name, values in of_window.items()}
    return Result(metrics, temporal_curves(run, statistics, full_codes, full), per_sequence)


def stability_metrics(statistics, seq):
    """Returns the stability metrics, plain means over live latents but for those `_weighted` by
    energy E[z^2]; and by window those that are tested between runs: {name: [window]}. `_raw` is
    what positions permuted within their windows do not lower, with their part, `_between`
    windows."""
    if seq <= STABILITY_LAGS[1]:
        print(f"note: CONTEXT_LENGTH = {CONTEXT_LENGTH} is too short for stability over "
              f"{STABILITY_LAGS[0]} to {STABILITY_LAGS[1]} positions: it is left out")
        return {}, {}
    weight, by_window = statistics.weight, {"stability": statistics.stability.mean(0)}
    metrics = {"stability_weighted": weight @ statistics.mean_stability}
    if seq > FAR_LAGS[1]:
        by_window["stability_far"] = statistics.stability_far.mean(0)
        metrics["stability_far_weighted"] = weight @ statistics.stability_far.mean(1)
    energy, between = statistics.energy.sum(), statistics.between.mean()
    return metrics | {name: values.mean() for name, values in by_window.items()} | {
        "stability_raw": by_window["stability"].mean() + between, "stability_between": between,
        "stability_token": statistics.token_surrogate.mean(),
        "stability_null_95": np.quantile(statistics.null.mean(0), 0.95),
        "stable_fraction": significant_fraction(statistics.mean_stability, statistics.null),
        "autocorrelation_lag1": statistics.autocorrelation[:, 0].mean(),
        "energy": energy, "energy_alarm": float(energy > ENERGY_ALARM),
        "largest_ten_share": np.sort(weight)[-10:].sum()}, by_window


def polysemanticity_metrics(run, fired, rate, rng):
    """Returns the polysemanticity of latents, and of the stream's own channels, thresholded to the
    same mean rate."""
    store, windows = run.store, run.store.windows
    kinds = windows.tokens[windows.n_train:, 1:].ravel(), token_classes(windows)
    places, heldout = windows.heldout_tokens(), windows.heldout()
    own = polysemanticity(fired, kinds, places, rng, NULL_DRAWS)
    channels = channel_firings(store.x(heldout), store.valid(heldout), rate)
    return {"polysemanticity": own,
            "polysemanticity_channels": polysemanticity(channels, kinds, places, rng, NULL_DRAWS)}


def halves_of_the_window(run):
    """Returns the explained variance on the first and on the second half of the positions."""
    error = np.nanmean(run.encoded.error, 0)
    variance, half = np.array(variance_by_position(run.store)[0]), (CONTEXT_LENGTH - 1) // 2
    return {"explained_variance_early": 1 - error[:half].sum() / variance[:half].sum(),
            "explained_variance_late": 1 - error[half:].sum() / variance[half:].sum()}


def temporal_curves(run, statistics, codes, full):
    """Returns what the figures of the temporal evaluation draw."""
    windows, seq = run.store.windows, CONTEXT_LENGTH - 1
    mean = statistics.mean_stability
    texts = token_texts(load_tokenizer(), windows.tokens[full[0] + windows.n_train, 1:])
    passage = top_latents_over_passage(codes[:seq].toarray(), texts, mean, run.live.ids)
    passage |= {
        "q95": percentiles_95(codes[:, passage["latents"]].tocsc()),
        "file": windows.names[windows.doc_ids[full[0] + windows.n_train]],
        "selection": "first held-out window without padding; the live latents with the largest "
                     "energy times stability in it"}
    curves = {
        "autocorrelation": statistics.autocorrelation.mean(0),
        "stability_null": statistics.null.mean(0),
        "stability_by_rate_decile": mean_by_decile(mean, statistics.rate),
        "similarity_matrix": similarity_matrix(codes[:256 * seq], seq)[::2, ::2].round(4),
        "evolution": passage}
    if seq > STABILITY_LAGS[1]:
        curves["most_stable"] = most_stable(mean, run.live.ids)
    if hasattr(run.sae, "variance"):
        curves |= {"variance": run.sae.variance, "decay": run.sae.decay(),
                   "scaled_variance": run.sae.scaled_variance()}
    return curves


def latent_statistics(run, codes, full, live, q95):
    """Returns the LatentStatistics of sparse codes [window * seq, d_sae] of the held-out windows
    `full`, of the latents `live`; q95 [latent]: the units of z."""
    windows = run.store.windows
    ids, columns, parts = full + windows.n_train, codes.tocsc(), []
    x, tokens, fold = run.store.x(ids), windows.tokens[ids, 1:], windows.doc_ids[ids] % 2 == 0
    smooth, smooth_raw, present = torch.zeros(3, len(ids), device=DEVICE)

    for at in np.array_split(np.arange(len(live)), len(live) // 256 + 1):
        chosen = columns[:, live[at]]
        z = torch.from_numpy(chosen.toarray(order="F")).to(DEVICE).view(*tokens.shape, -1)
        active = (z > 0).float()
        surrogate = torch.from_numpy(fire_given_token(chosen > 0, tokens, fold)).to(DEVICE)
        parts.append(autocorrelations(active, surrogate) + (
            active.mean((0, 1)), z.square().mean((0, 1))))
        smooth += smoothness(z, x, torch.from_numpy(q95[at]).to(DEVICE))
        smooth_raw += smoothness(z, x, 1.0)
        present += active.amax(1).sum(1)

    by_latent = [torch.cat(part).cpu().double().numpy() for part in zip(*parts)]
    return LatentStatistics(*by_latent, *((total / present.clamp_min(1)).cpu().numpy()
                                          for total in (smooth, smooth_raw)))


def autocorrelations(active, surrogate):
    """Returns the first six fields of LatentStatistics, as tensors, of activity [window, seq, d]
    and of P(fire | token) of the same shape."""
    rate = active.mean(0)
    near, between = excess_autocorrelation(active, rate, STABILITY_LAGS)
    far, _ = excess_autocorrelation(active, rate, FAR_LAGS)
    null, r = autocorrelation_null(active, rate, STABILITY_LAGS, NULL_DRAWS)
    token = excess_autocorrelation(surrogate, rate, STABILITY_LAGS)[0]
    return near.t(), far.t(), between.mean(0), null.t(), token.mean(0), r.t()


class AutocorrelationTerms(NamedTuple):
    """Terms that the autocorrelation of activity and its null share."""
    active: torch.Tensor  # [d, window, seq] without its mean at each position
    lag_weights: torch.Tensor  # [seq, seq] uniform over pairs of positions so far apart, sum 1
    shuffled_product: torch.Tensor  # [d, window] mean product of two positions, in random order
    variance: torch.Tensor  # [d, 1] mean over these pairs of the product of the two deviations


def autocorrelation_terms(active, rate, lags):
    """Returns the AutocorrelationTerms of activity [window, seq, d], the rate at each position
    [seq, d], lags (low, high)."""
    a, seq = (active.float() - active.float().mean(0)).permute(2, 0, 1), active.shape[1]
    band = torch.ones(seq, seq, device=active.device).triu(lags[0]).tril(lags[1])
    weights = band / band.sum().clamp_min(1)
    shuffled = (a.sum(2) ** 2 - a.square().sum(2)) / (seq * (seq - 1))
    deviation = (rate * (1 - rate)).clamp_min(0).sqrt().t()  # [d, seq]
    variance = ((deviation @ weights) * deviation).sum(1, keepdim=True).clamp_min(1e-9)
    return AutocorrelationTerms(a, weights, shuffled, variance)


def excess_autocorrelation(active, rate, lags):
    """Returns for each window and latent [window, d] the mean of (a_s - p_s)(a_t - p_t) over all
    pairs of positions that are lags[0] to lags[1] apart, both included, minus its mean over all
    pairs of different positions of that window (its expectation in random order), over the mean of
    sqrt(p_s (1 - p_s) p_t (1 - p_t)); and the part that is subtracted, [window, d].

    active [window, seq, d]: 0 or 1, or a probability of firing; rate [seq, d]: p at each position,
    so that a latent that knows its position has none."""
    terms = autocorrelation_terms(active, rate, lags)
    product = ((terms.active @ terms.lag_weights) * terms.active).sum(2)
    excess = (product - terms.shuffled_product) / terms.variance
    return excess.t(), (terms.shuffled_product / terms.variance).t()


def autocorrelation_null(active, rate, lags, draws):
    """Returns the mean excess under random permutations of the positions, shared by 64 windows
    each, [draws, d]; and the autocorrelation by lag l from 1, E[(a_t - p_t)(a_t+l - p_t+l)] over
    the product of the two deviations, each a mean over t, [lag, d]."""
    terms = autocorrelation_terms(active, rate, lags)
    n, seq, d = active.shape
    null, coactivations = active.new_zeros(d, draws), active.new_zeros(d, seq, seq)
    for part in terms.active.split(64, 1):
        sums = part.transpose(1, 2) @ part  # [d, seq, seq]
        order = torch.rand(draws, seq, device=active.device).argsort(1)
        shuffled = terms.lag_weights[order[:, :, None], order[:, None]].flatten(1)
        null += sums.flatten(1) @ shuffled.t()
        coactivations += sums
    null = (null / n - terms.shuffled_product.mean(1, keepdim=True)) / terms.variance
    deviation, r = (rate * (1 - rate)).clamp_min(0).sqrt(), []
    for lag in range(1, min(FAR_LAGS[1] + 1, seq)):
        scale = (deviation[:-lag] * deviation[lag:]).mean(0).clamp_min(1e-9)
        r.append(coactivations.diagonal(lag, 1, 2).mean(1) / n / scale)
    return null.t(), torch.stack(r)


# --- slow explained variance ---
def slow_metrics(run, codes, full):
    """Returns the slow explained variance, its null and its ceilings; and by window: {name:
    [window]}. {} twice where windows are shorter than FAR_LAGS.

    Of the files in two halves: latents whose values last (see slow_latents) are found on one half;
    on the other, what their sum at position t - lag explains of x_t, means over FAR_LAGS; then the
    other way round. Latents that cancel count only through their sum, and neither the place in the
    window, constants, density nor the scale of z gain anything. Null: the sum of another document's
    latents at the same positions. codes: sparse [window * seq, d_sae] of the held-out windows
    `full`."""
    store, seq = run.store, CONTEXT_LENGTH - 1
    if seq <= FAR_LAGS[1]:
        return {}, {}
    ids = full + store.windows.n_train
    first, x, W = store.windows.doc_ids[ids] % 2 == 0, store.x(ids), run.sae.directions()
    explained, null, chosen = np.zeros(len(ids)), [], []
    for half in (first, ~first):
        found_on, tested_on = (np.repeat(part, seq) for part in (~half, half))
        slow = run.live.ids[slow_latents(codes[found_on][:, run.live.ids], seq)]
        latents = torch.from_numpy(codes[tested_on][:, slow].toarray()).to(x)
        total = (latents @ W[slow]).unflatten(0, (-1, seq))
        target = x[torch.from_numpy(half).to(x.device)]
        explained[half] = lagged_share(total, target).cpu().numpy()
        other = total.roll(len(total) // 2, 0)  # windows of one document are neighbours
        null.append(lagged_share(other, target).mean().item())
        chosen.append(len(slow))
    names = "slow_ceiling_x", "slow_ceiling_mean"
    return {"slow_explained_variance": explained.mean(), "slow_latents": np.mean(chosen),
            "slow_explained_variance_null": np.mean(null)} | dict(
                zip(names, slow_ceilings(store, ids))), {"slow_explained_variance": explained}


def slow_latents(codes, seq):
    """Returns [latent] True where the autocorrelation of its values over FAR_LAGS, without their
    mean at each position, is at least SLOW_AUTOCORRELATION; codes sparse [window * seq, latent]."""
    position, n = np.arange(codes.shape[0]) % seq, codes.shape[0] // seq
    at_position = csr_array((np.ones(len(position)), (position, np.arange(len(position)))))
    mean, square = ((at_position @ part).toarray() / n for part in (codes, codes.power(2)))
    deviation = np.sqrt(np.maximum(square - mean ** 2, 0))  # [seq, latent]
    total = np.zeros(codes.shape[1])
    for lag in range(FAR_LAGS[0], FAR_LAGS[1] + 1):
        product = codes[position < seq - lag].multiply(codes[position >= lag]).sum(0) / n
        covariance = product - (mean[:-lag] * mean[lag:]).sum(0)
        total += covariance / np.maximum((deviation[:-lag] * deviation[lag:]).sum(0), 1e-12)
    return total / (FAR_LAGS[1] + 1 - FAR_LAGS[0]) >= SLOW_AUTOCORRELATION


def lagged_share(total, x):
    """Returns for each window [window] what total_(t - lag), times one number, explains of x_t
    without its mean at each position, as a share of the latter's mean; mean over FAR_LAGS. Its mean
    over windows is the squared correlation of the two. total, x: [window, seq, d]."""
    total, x, share = total - total.mean((0, 1)), x - x.mean(0), 0.0
    for lag in range(FAR_LAGS[0], FAR_LAGS[1] + 1):
        before, now = total[:, :-lag], x[:, lag:]
        product, size = (before * now).sum((1, 2)), before.square().sum((1, 2))
        scale = product.sum() / size.sum().clamp_min(1e-12)
        share = share + (2 * scale * product - scale ** 2 * size) / now.square().sum() * len(x)
    return share / (FAR_LAGS[1] + 1 - FAR_LAGS[0])


def slow_ceilings(store, ids):
    """Returns what linear regressions explain of x_t in the windows `ids`, means over FAR_LAGS:
    from x_(t - lag), and from its exponential mean up to t - lag. Fitted on one half of the files,
    measured on the other, both ways. Kept beside the activations."""
    key = fingerprint(code_key(slow_ceilings), len(ids), int(ids.sum()))
    return cached_json(store.folder / f"slow-{key}.json", lambda: [
        explained_from_before(store, ids, running) for running in (False, True)])


def explained_from_before(store, ids, running):
    """Returns one of slow_ceilings: from the exponential mean where `running`."""
    x = store.x(ids)
    first = torch.from_numpy(store.windows.doc_ids[ids] % 2 == 0).to(x.device)
    before, shares = exponential_mean(x) if running else x, []
    before, x = before - before.mean(0), x - x.mean(0)
    for lag in range(FAR_LAGS[0], FAR_LAGS[1] + 1):
        past, now = before[:, :-lag], x[:, lag:]
        for half in (first, ~first):
            a, b = past[~half].flatten(0, 1), now[~half].flatten(0, 1)
            ridge = 1e-3 * a.square().sum() / a.shape[1] * torch.eye(a.shape[1], device=a.device)
            weights = torch.linalg.solve(a.T @ a + ridge, a.T @ b)
            error = (now[half] - past[half] @ weights).square().sum()
            shares.append(1 - (error / now[half].square().sum()).item())
    return np.mean(shares)


def exponential_mean(x, decay=0.95):
    """Returns the bias-corrected exponential mean of x [window, seq, d] up to each position."""
    mean, means = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        mean = decay * mean + (1 - decay) * x[:, t]
        means.append(mean / (1 - decay ** (t + 1)))
    return torch.stack(means, 1)


def smoothness(z, x, scale):
    """Returns max over t of |z(t+1) - z(t)| / scale / |x(t+1) - x(t)|, summed over latents:
    [window]. latent_statistics divides by the number of latents that fire in the window. Lower is
    smoother."""
    change = x.diff(dim=1).norm(dim=-1, keepdim=True).clamp_min(1e-9)
    return torch.cat([((a.diff(dim=1).abs() / c).amax(1) / scale).sum(1)
                      for a, c in zip(z.split(64), change.split(64))])


def fire_given_token(active, tokens, fold):
    """Returns P(fire | token) as counted in the windows of the other fold [window], with one more
    firing at the mean rate: [window, seq, d]; active sparse [window * seq, d], tokens
    [window, seq]."""
    known, index = np.unique(tokens, return_inverse=True)
    index, fold, rate = index.ravel(), np.repeat(fold, tokens.shape[1]), active.mean(0)
    is_token = csr_array((np.ones(len(index)), index, np.arange(len(index) + 1)),
                         (len(index), len(known)))
    active, expected = active.tocsr(), np.empty(active.shape, dtype=np.float32)
    for held in (fold, ~fold):
        seen = np.bincount(index[~held], minlength=len(known))[:, None] + 1
        counts = (is_token[~held].T @ active[~held]).toarray()
        expected[held] = ((counts + rate) / seen)[index[held]]
    return expected.reshape(*tokens.shape, -1)


def significant_fraction(values, null):
    """Returns the share of values [n] above their null draws [n, draws], taken as normal, at a
    false discovery rate of .05 (Benjamini-Hochberg)."""
    p = norm.sf((values - null.mean(1)) / np.maximum(null.std(1, ddof=1), 1e-12))
    return (false_discovery_control(p) < 0.05).mean()


def mean_by_decile(values, rate):
    """Returns the mean of values [n] within each decile of rate [n]; 0 where one is empty."""
    decile = np.digitize(rate, np.quantile(rate, np.arange(0.1, 1, 0.1)))
    return np.bincount(decile, values, 10) / np.maximum(np.bincount(decile, minlength=10), 1)


def similarity_matrix(codes, seq):
    """Returns the mean over windows of the cosine of a window's codes at t and s, minus that
    between different windows: [seq, seq]; codes sparse [window * seq, d]."""
    unit = normalize(codes)
    windows = [unit[start:start + seq] for start in range(0, unit.shape[0], seq)]
    same = sum((window @ window.T).toarray() for window in windows)
    total, n = sum(windows), len(windows)
    return same / n - ((total @ total.T).toarray() - same) / (n * (n - 1))


def top_latents_over_passage(z, tokens, stable, live, n=16):
    """Returns the latents with the largest energy times stability in one window, over its tokens
    [seq] of text; z [seq, d_sae], stable [latent] stability of the latents `live`."""
    top = live[np.argsort(-np.square(z[:, live]).sum(0) * np.maximum(stable, 1e-6))[:n]]
    return {"tokens": tokens, "latents": top, "values": z[:, top].T.round(4)}


def most_stable(stable, live, n=10):
    """Returns the n latents with the highest stability, highest first, and that stability; stable
    [latent]: of the latents `live`."""
    top = np.argsort(-stable, kind="stable")[:n]
    return {"latents": live[top], "stability": stable[top].round(4)}


def stability_of(run, latents):
    """Returns the mean stability of latents on full windows, as LatentStatistics has it:
    [latent]."""
    rows, seq = run.store.windows.full(), CONTEXT_LENGTH - 1
    codes = run.encoded.codes[:, latents].tocsr()
    active = torch.from_numpy(codes.toarray() > 0).to(DEVICE).view(-1, seq, len(latents))
    active = active[torch.from_numpy(rows).to(DEVICE)].float()
    excess, _ = excess_autocorrelation(active, active.mean(0), STABILITY_LAGS)
    return excess.mean(0).tolist()


def polysemanticity(fired, kinds, places, rng, draws=50, n=64):
    """Returns the mean over units of the smaller of two ratios: the entropy of the token, and of
    the class, at n random firings, each over its mean at n random `places`. Units with fewer
    firings are left out; 1 where none remains. fired: the token indices of each unit; kinds:
    [token] arrays of token and class."""
    null = [np.mean([miller_madow_entropy(kind[rng.choice(places, n)]) for _ in range(draws)])
            for kind in kinds]
    samples = [rng.choice(unit, n, replace=False) for unit in fired if len(unit) >= n]
    ratios = [min(miller_madow_entropy(kind[at]) / base for kind, base in zip(kinds, null))
              for at in samples]
    return np.mean(ratios) if ratios else 1.0


def channel_firings(x, keep, rate):
    """Returns of channels x [window, seq, d] the tokens, a share `rate` of all, where each is
    largest, then smallest: 2 d lists."""
    x = x.masked_fill(~keep[..., None], 0.0).flatten(0, 1)
    top = torch.cat([x, -x], 1).topk(max(1, int(rate * len(x))), dim=0, sorted=False).indices
    return list(top.t().cpu().numpy())


def coherence(fired, classes, files, rate, rng, n_firings=50, group=100):
    """Returns late hits / early hits, each less the hits expected by chance; None where fewer than
    ten latents fire often enough, or early hits do not exceed chance. Each latent has three
    histograms of the token classes at 50 of its firings: a reference (positions 1-32 of even files)
    and, of odd files, an early (1-32) and a late one (64 and later). A hit: of the references of
    `group` latents of similar rate the nearest to a latent's early, or late, histogram
    (Jensen-Shannon) is its own. Chance is one hit per group; latents beyond the last whole group
    are left out.

    fired: token indices [n] of each latent; classes: of each token; files: of each held-out
    window."""
    histograms, seq = [], len(classes) // len(files)
    for at in (fired[i] for i in np.argsort(rate, kind="stable")):
        window, position = np.divmod(at, seq)
        early, odd = position < 32, files[window] % 2 == 1
        firing_sets = [at[early & ~odd], at[early & odd], at[(position >= 63) & odd]]
        if min(map(len, firing_sets)) >= n_firings:
            drawn = [rng.choice(firing, n_firings, replace=False) for firing in firing_sets]
            histograms.append([np.bincount(classes[places], minlength=classes.max() + 1)
                               for places in drawn])

    n, hits = min(group, len(histograms)), np.zeros(2)
    if n < 10:
        return None
    for low in range(0, len(histograms) - n + 1, n):
        first, *others = np.array(histograms[low:low + n]).swapaxes(0, 1)
        nearest = [cdist(other, first, "jensenshannon").argmin(1) for other in others]
        hits += [(found == np.arange(n)).sum() for found in nearest]
    early_hits, late_hits = hits - len(histograms) // n
    return late_hits / early_hits if early_hits >= 1 else None


# --- parameters of interest ---
def parameter_metrics(run):
    """Returns what training did to the parameters of interest, and the alarm of a collapse."""
    metrics = parameter_convergence(run.log) | consistency_metrics(run.log)
    sae = copy.deepcopy(run.sae)
    metrics |= parameter_sensitivities(sae, lambda: validation(sae, run.store)["val_loss"])
    if getattr(run.sae, "traces", False):
        metrics |= decay_slope(run.sae.scaled_variance().detach(), run.sae.decay().detach())
    return metrics


def logged_values(log, table, name):
    """Returns the steps and values of a row of a training log's table, where it has a value."""
    return zip(*((step, value) for step, value in zip(log["step"], log[table][name])
                 if value is not None))


def parameter_convergence(log):
    """Returns the last value of each parameter in a training log, and the first step after which it
    stays within 5 % of that."""
    metrics = {}
    for name in log["parameters"]:
        steps, values = logged_values(log, "parameters", name)
        final = values[-1]
        off = np.flatnonzero(np.abs(np.array(values) - final) > 0.05 * max(abs(final), 1e-3))
        metrics |= {f"{name}_final": final,
                    f"{name}_converged_at": steps[off.max(initial=-1) + 1]}
    return metrics


def consistency_metrics(log):
    """Returns the consistency gap on held-out windows at the end and before the last stage, with an
    alarm where it fell: {} where the log has none."""
    if "consistency_gap" not in log:
        return {}
    steps, gaps = log["val_step"], log["consistency_gap"]
    before = gaps[max(np.searchsorted(steps, log["stage_starts"][-1], "right") - 1, 0)]
    return {"consistency_gap": gaps[-1], "consistency_gap_before": before,
            "collapse_alarm": float(gaps[-1] < before)}


def parameter_sensitivities(sae, loss):
    """Returns the slope of loss() in each scalar parameter, by a central difference of 10 % of
    it."""
    metrics = {}
    for name, p in sae.named_parameters():
        if p.numel() == 1:
            at, d, losses = p.data.clone(), 0.1 * max(abs(p.item()), 0.1), []
            for value in (at + d, at - d):
                p.data.copy_(value)
                losses.append(loss())
            p.data.copy_(at)
            metrics[f"{name}_sensitivity"] = (losses[0] - losses[1]) / (2 * d)
    return metrics


def decay_slope(variance, decay):
    """Returns slope and r^2 of the regression of log(-log decay) on log variance [latent]; {} where
    all variances are one."""
    x, y = (part.double().cpu().numpy() for part in (variance, decay))
    x, y = np.log(x), np.log(-np.log(y.clip(1e-30, 1 - 1e-7)))
    if x.std() == 0:
        return {}
    fit = linregress(x, np.broadcast_to(y, x.shape))
    return {"decay_slope": fit.slope, "decay_r2": fit.rvalue ** 2}
# endregion


# region Evaluation: probes
class ProbeTask(NamedTuple):
    """Labels of held-out tokens to predict."""
    places: np.ndarray  # [n] tokens, counted as in token_classes
    fold: np.ndarray  # [n] True in the first of two folds
    labels: np.ndarray  # [n] class of each


def eval_probes(run):
    """Balanced accuracy of linear probes on a token's latents, beside those on tokens;
    `probe_context` is the mean over all tasks but token_type, domain and document included."""
    windows, codes = run.store.windows, run.encoded.codes.tocsr()
    base, seq = probe_baselines(run.store), windows.tokens.shape[1] - 1
    metrics, correct, docs = {}, {}, windows.doc_ids[windows.n_train:]
    for name, task in probe_tasks(windows, PROBE_EVERY).items():
        scaled = MaxAbsScaler().fit_transform(codes[task.places])
        predicted = cross_fitted_probe(scaled, task.labels, task.fold)
        metrics[f"probe_{name}"] = balanced_accuracy_score(task.labels, predicted)
        metrics[f"probe_{name}_token"], metrics[f"probe_{name}_bag"] = base[name]
        correct[f"accuracy_{name}"] = windows.by_document(  # plain: a file lacks some classes
            predicted == task.labels, docs[task.places // seq])

    if context := [name for name in base if f"probe_{name}" in metrics and name != "token_type"]:
        for kind in ("", "_token", "_bag"):
            values = [metrics[f"probe_{name}{kind}"] for name in context]
            metrics[f"probe_context{kind}"] = np.mean(values)
        accuracies = [correct[f"accuracy_{name}"] for name in context]
        correct["accuracy_context"] = np.nanmean(accuracies, 0)
    return Result(metrics, {}, correct)


def cross_fitted_probe(features, labels, fold):
    """Returns the labels [n] as logistic regressions fitted on the other fold predict them."""
    predicted = np.empty_like(labels)
    for held in (fold, ~fold):
        model = LogisticRegression(max_iter=200, class_weight="balanced")
        predicted[held] = model.fit(features[~held], labels[~held]).predict(features[held])
    return predicted


def probe_tasks(windows, every, n_documents=20):
    """Returns {name: ProbeTask}. One task for each of LABELS and one for the domain, on every
    `every`-th token, with folds split by file; where more than half of these tokens have labels,
    only they are used. And one for the document, on all tokens of up to `n_documents` documents of
    those with most windows, with folds split by window. A task with one class in a fold is left
    out."""
    seq, docs = windows.tokens.shape[1] - 1, windows.doc_ids[windows.n_train:]
    all_places, labels = windows.heldout_tokens(), {}
    places = all_places[::every]
    if windows.labels is not None:
        classes = windows.labels[:, 1:].reshape(-1, len(LABELS))
        known = places[(classes[places] >= 0).all(1)]
        if len(known) > len(places) / 2:
            places, labels = known, dict(zip(LABELS, classes[known].T))

    token_docs = docs[places // seq]
    domains = np.asarray(windows.domains)[token_docs]
    labels["domain"] = np.unique(domains, return_inverse=True)[1]
    tasks = {name: ProbeTask(places, token_docs % 2 == 0, part) for name, part in labels.items()}
    tasks["document"] = document_task(all_places, docs, seq, n_documents)
    return {name: task for name, task in tasks.items() if min(
        len(np.unique(task.labels[part])) for part in (task.fold, ~task.fold)) > 1}


def document_task(all_places, docs, seq, n_documents):
    """Returns the ProbeTask of telling which of `n_documents` documents a token is from."""
    names, first, counts = np.unique(docs, return_index=True, return_counts=True)
    chosen = names[counts == counts.max()][:n_documents]
    places = all_places[np.isin(docs[all_places // seq], chosen)]
    token_docs, window = docs[places // seq], places // seq
    fold = (window - first[np.searchsorted(names, token_docs)]) % 2 == 0
    return ProbeTask(places, fold, np.searchsorted(chosen, token_docs))


def probe_baselines(store):
    """Returns, for each of probe_tasks, the balanced accuracy from the token alone and from a bag
    of the last 8: {label: [2]}, kept beside the activations."""
    windows = store.windows

    def compute():
        accuracies = {}
        for name, task in probe_tasks(windows, PROBE_EVERY).items():
            row, at = np.divmod(task.places, windows.tokens.shape[1] - 1)
            bags = [bags_of_tokens(windows, row + windows.n_train, at + 1, n) for n in (1, 8)]
            accuracies[name] = [balanced_accuracy_score(
                task.labels, cross_fitted_probe(bag, task.labels, task.fold)) for bag in bags]
        return accuracies

    key = code_key(probe_tasks, bags_of_tokens, cross_fitted_probe, PROBE_EVERY)
    return cached_json(store.folder / f"probe_baselines-{key}.json", compute)
# endregion


# region Evaluation: sparse probing
# In SAEBench's protocol (docs/metrics.md).
@torch.no_grad()
def eval_sparse_probing(run):
    """Accuracies of probes on few latents of a text, mean over PROBING, beside those on the
    stream's channels, on an untrained SAE and on counts of tokens."""
    control = untrained(run)
    baselines = {"channels": lambda batch: batch.x,
                 "untrained": lambda batch: control.encode(batch).dense()}
    accuracies = []
    for dataset in PROBING:
        store = run.store if run.tiny else probing_store(run, dataset)
        pooled = pooled_features(store, lambda batch: run.sae.encode(batch).dense())
        accuracies.append(probing_baselines(store, baselines, run.sae.d_sae) | {
            "sae": sparse_accuracies(pooled, store.windows, PROBED_COUNTS)})

    means = {name: np.mean([of_set[name] for of_set in accuracies], 0) for name in accuracies[0]}
    kinds = *(f"top_{k}" for k in PROBED_COUNTS), "all"
    metrics = {f"{name}_{kind}": value for name, values in means.items()
               for kind, value in zip(kinds, values)}
    curves = means | {"k": PROBED_COUNTS, "data_sets": accuracies}
    return Result(metrics, {"sparse_probing": curves}, {})


def probing_texts(dataset):
    """Returns the Windows of a data set's texts, one a window, and their key."""
    return probing_windows(
        dataset, load_tokenizer(), PROBING_SIZE, CONTEXT_LENGTH, cache_folder() / "tokens")


def probing_store(run, dataset):
    """Returns the Store of a data set's texts, one a window, scaled as in training."""
    windows, key = probing_texts(dataset)
    run_store = run.store
    folder = run_store.folder.parent / fingerprint(key, run_store.folder.name)
    store = Store(folder, windows, run_store.d_in, run_store.dtype)
    store.collect(run.get_model, run.layer)
    store.mean, store.scale = run_store.mean, run_store.scale
    return store


def pooled_features(store, values):
    """Returns values(batch) [batch, seq, d], mean over the tokens of each window that count:
    [window, d]."""
    ids, parts = np.arange(len(store.windows.tokens)), []
    for part in np.array_split(ids, len(ids) // 32 + 1):
        keep = store.valid(part)[..., None]
        parts.append(((values(store.batch(part)) * keep).sum(1) / keep.sum(1)).cpu().numpy())
    return np.concatenate(parts)


def token_shares(windows):
    """Returns the share of each token among those of a window that count, sparse
    [window, vocabulary]."""
    keep = windows.valid(np.arange(len(windows.tokens)))
    row, column = np.nonzero(keep)
    shape = len(keep), int(windows.tokens.max()) + 1
    return csr_array((1 / keep.sum(1)[row], (row, windows.tokens[row, column])), shape)


def probing_baselines(store, features, d_sae):
    """Returns sparse_accuracies of pooled features {name: function of a batch} and of counts of
    tokens, kept beside the store's files."""
    def compute():
        tables = {name: pooled_features(store, values) for name, values in features.items()}
        tables["tokens"] = token_shares(store.windows)
        return {name: sparse_accuracies(table, store.windows, PROBED_COUNTS).tolist()
                for name, table in tables.items()}

    key = code_key(untrained, pooled_features, token_shares, sparse_accuracies, PROBED_COUNTS,
                   d_sae)
    return cached_json(store.folder / f"probing-{key}.json", compute)


def sparse_accuracies(features, windows, numbers):
    """Returns the test accuracy of one domain against the rest, mean over domains, by logistic
    regression on the k of `features` [window, d] whose class means differ most, for each k of
    `numbers`, and on all: [len(numbers) + 1]. The k are chosen and the regression is fitted on
    training windows; tests are balanced (SAEBench)."""
    labels = windows.domain_of(np.arange(len(windows.tokens)))
    labels = np.unique(labels, return_inverse=True)[1]
    training, rng = np.arange(len(labels)) < windows.n_train, np.random.default_rng(42)
    accuracies = []
    for c in range(labels.max() + 1):
        fit, y = balanced_binary_task(labels, training, c, rng)
        test, truth = balanced_binary_task(labels, ~training, c, rng)
        difference = features[fit[y == 1]].mean(0) - features[fit[y == 0]].mean(0)
        best = np.argsort(-np.abs(difference), kind="stable")
        accuracies.append([
            LogisticRegression(max_iter=1000).fit(features[fit][:, best[:k]], y)
            .score(features[test][:, best[:k]], truth) for k in (*numbers, None)])
    return np.mean(accuracies, 0)


def balanced_binary_task(labels, part, c, rng):
    """Returns class c against the rest among the rows of `part` [n]: indices, and y = 1 for c; the
    whole class and as many of the others, drawn evenly from each."""
    classes = c, *np.setdiff1d(labels, c)
    positive, *others = (np.flatnonzero(part & (labels == k)) for k in classes)
    each = -(-len(positive) // len(others))
    negative = rng.permutation(np.concatenate([rng.permutation(rows)[:each] for rows in others]))
    index = np.concatenate([positive, negative[:len(positive)]])
    return index, (labels[index] == c).astype(int)
# endregion


# region Evaluation: unlearning
# FORGET by clamping latents, and what that costs the rest. Strategies: "standard" clamps wherever a
# chosen latent fires, "pattern" only where the matcher finds FORGET at that position, "hybrid" only
# behind an open gate; pattern_RATE and hybrid_RATE at thresholds of other false-positive rates.
UNLEARNING_CONTROLS = ("random_latents", "random_directions", "projection")


@torch.no_grad()
def eval_unlearning(run):
    """Forgetting of FORGET's test windows and harm to the others, at strengths that cost its dev
    windows FORGET_NATS."""
    torch.manual_seed(0)
    store, windows, tokenizer = run.store, run.store.windows, load_tokenizer()
    plan = unlearning_plan(windows, FORGET, tokenizer)
    unlearner = Unlearner(run, plan)
    matcher, strategies = unlearner.matcher, ("standard", *unlearner.matcher.thresholds)

    metrics, rocs = matcher.scores(encode_windows(run.sae, store, plan.test).codes,
                                   store.valid(plan.test), plan.group == "forget")
    metrics["auroc_bag_of_tokens"] = bag_auroc(run, plan)
    frontier = clamping_frontier(run, plan, unlearner, strategies)
    metrics |= frontier.metrics | padded_losses(run, plan, strategies, frontier.edits)
    metrics |= question_scores(run, plan, frontier.edits)

    full, _ = plan.full(windows)
    prompts = store.tokens(full)[:, :CONTEXT_LENGTH // 2]
    metrics |= repetition({name: sampled(run, edit, prompts)
                           for name, edit in frontier.edits.items()})
    batch = store.batch(full)
    z = run.sae.encode(batch).dense()
    clamped = z[..., unlearner.clamped["forget"]]
    adjacent = consistency(batch, F.normalize(clamped, dim=-1))
    metrics["clamped_consistency"] = 1 - adjacent.item()

    passage = matcher.passage(z, (clamped > 0).any(-1), batch.tokens, tokenizer)
    curves = {"frontier": frontier.rows, "roc": rocs, "passage": passage}
    return Result(metrics, curves, frontier.by_document)


class Unlearner:
    """Latents selected and matchers fitted on a plan's dev windows. Thresholds are cross-fitted:
    each half of the files is scored by a matcher fitted on the other half."""

    def __init__(self, run, plan):
        self.sae, store, ids = run.sae, run.store, plan.dev
        codes, keep = encode_windows(self.sae, store, ids).codes, store.valid(ids)
        forget = keep & torch.from_numpy(plan.dev_group == "forget").to(DEVICE)[:, None]
        self.q95 = torch.from_numpy(percentiles_95(codes)).to(DEVICE)
        most = 1.0 if run.tiny else RETAIN_FREQUENCY
        token_codes = codes.tocsr()[keep.flatten().cpu().numpy()]
        ranked, self.clamped = ranked_latents(token_codes, forget[keep].cpu().numpy(), most)
        self.retain_mean, self.direction = mean_difference(store.x(ids), keep, forget)

        self.matcher = Matcher(ranked[:MATCHED], self.q95)
        self.matcher.fit(codes, keep, forget, plan.halves(store.windows))

    def edit(self, strategy, strength):
        """Returns a function of a Batch that gives what to add to x [batch, seq, d_in]: where the
        strategy says so, latents that fire are set to -strength times the 95th percentile of their
        values. "projection" moves x back along the mean difference, "random_directions" by as much
        in random directions."""
        latents = self.clamped.get(strategy, self.clamped["forget"])

        def change(batch):
            if strategy == "projection":
                along = (batch.x - self.retain_mean) @ self.direction
                return -strength * along[..., None] * self.direction
            whole = self.sae.encode(batch).dense()
            z, target = whole[..., latents], -strength * self.q95[latents]
            on = (z > 0) & self.matcher.clamps_here(strategy, whole)[..., None]
            delta = torch.where(on, target - z, 0.0) @ self.sae.directions()[latents]
            if strategy == "random_directions":
                delta = F.normalize(torch.randn_like(delta), dim=-1) * delta.norm(dim=-1)[..., None]
            return delta
        return change


def ranked_latents(codes, forget, most):
    """Returns all latents in order, and which to clamp: {"forget": the first CLAMPED that may be,
    "random_latents": those nearest to them in firing rate}; of codes sparse [token, d_sae], the
    tokens forget [token] to be forgotten.

    SELECTION "ratio": E[z^2] there over elsewhere (arXiv 2504.08192); "frequency": firing rate
    there, among those active on less than a share `most` of the tokens elsewhere (SAEBench)."""
    size = codes.power(2) if SELECTION == "ratio" else codes > 0
    there, elsewhere = (np.asarray(size[part].mean(0)).ravel() for part in (forget, ~forget))
    score = (there / (elsewhere + 0.01 * there.mean()) if SELECTION == "ratio"
             else there * (elsewhere < most))
    ranked, n = np.argsort(-score), min(CLAMPED, (score > 0).sum())
    if not 0 < n < len(score):
        raise RunnerError(f"CLAMPED: {n} of {len(score)} latents may be clamped, it takes one and "
                          "leaves one.")
    rates = (codes > 0).mean(0)
    return ranked, {"forget": ranked[:n], "random_latents": rate_matched(rates, ranked[:n])}


def mean_difference(x, keep, forget):
    """Returns of x [n, seq, d] the mean of tokens `keep` that are not to be forgotten [d], and the
    direction of length 1 from it to the mean of those that are [d]; keep, forget [n, seq] bool."""
    rest = x[keep & ~forget].mean(0)
    return rest, F.normalize(x[keep & forget].mean(0) - rest, dim=0)


# --- the matcher ---
class Matcher:
    """Predicts from the last MATCHER_WINDOW positions of chosen latents whether a position belongs
    to FORGET: a matcher of patterns, and for comparison one that sees a single position and one
    that sees positions in random order. GATE_TOKENS matches in a row open the gate.

    q95 [d_sae]: the units of latents z."""

    def __init__(self, latents, q95):
        self.latents, self.q95 = latents, q95

    def log_codes(self, z):
        """Returns log(1 + z / q95) of the matched latents of dense z [n, seq, d_sae]: [n, seq,
        f]."""
        return self.scaled(z[..., self.latents])

    def codes_of_sparse(self, z, seq):
        """Returns the same of sparse z [n * seq, d_sae]."""
        chosen = torch.from_numpy(z[:, self.latents].toarray()).to(self.q95.device)
        return self.scaled(chosen.view(-1, seq, len(self.latents)))

    def scaled(self, chosen):
        """Returns log(1 + z / q95)."""
        return torch.log1p(chosen / self.q95[self.latents])

    def fit(self, z, keep, forget, half):
        """Fits matchers on the tokens `keep`, of which `forget` are to be forgotten, both [n, seq]
        bool, z sparse [n * seq, d_sae]; then thresholds at FALSE_POSITIVES: by matchers fitted on
        the windows of either `half` [n] for those of the other."""
        codes = self.codes_of_sparse(z, keep.shape[1])
        half = torch.from_numpy(half).to(keep.device)[:, None].expand(keep.shape)
        if codes.shape[1] < GATE_TOKENS:
            raise RunnerError(f"CONTEXT_LENGTH: unlearning's gate needs more than {GATE_TOKENS} "
                              "tokens.")
        position = torch.arange(keep.shape[1], device=keep.device)
        apart = keep & (position % MATCHER_WINDOW == 0)  # windows do not overlap

        def fitted(name, rows):
            return fit_matcher(self.windows(codes, name)[rows], forget[rows])

        # matches by the matcher that was fitted on the windows where half is False, and True
        by_false, by_true = (self.match(codes, matcher=fitted("pattern", apart & (half == side)))
                             for side in (False, True))
        match = torch.where(half, by_false, by_true) * keep
        self.matchers = {name: fitted(name, apart)
                         for name in ("pattern", "one_position", "shuffled")}
        self.thresholds = self.thresholds_of(match, keep, forget)

    def thresholds_of(self, match, keep, forget):
        """Returns {strategy: threshold}: what the match at a token ("pattern"), or the gate at the
        end of a window ("hybrid"), exceeds at each rate of FALSE_POSITIVES where nothing is to be
        forgotten."""
        retained_windows = gate_evidence(match)[~forget[:, 0], -1]
        evidence = {"pattern": match[keep & ~forget], "hybrid": retained_windows}
        # the first rate's thresholds have the bare names
        return {name if i == 0 else f"{name}_{rate:g}": values.quantile(1 - rate).item()
                for i, rate in enumerate(FALSE_POSITIVES) for name, values in evidence.items()}

    def windows(self, codes, name):
        """Returns the last codes at each position, zeros before the first: [n, seq, f, width]."""
        width = 1 if name == "one_position" else MATCHER_WINDOW
        x = F.pad(codes, (0, 0, width - 1, 0)).unfold(1, width, 1)
        if name != "shuffled":
            return x
        return x.gather(-1, torch.rand_like(x[..., :1, :]).argsort(-1).expand_as(x))

    def match(self, codes, name="pattern", matcher=None):
        """Returns the probability that text to forget stands at each position, [n, seq], by one of
        the fitted matchers or by the given one."""
        matcher = matcher or self.matchers[name]
        return torch.cat([matcher(self.windows(part, name)) for part in codes.split(32)])

    def match_and_gate(self, z):
        """Returns match and gate at each position of dense z, each [n, seq]."""
        match = self.match(self.log_codes(z))
        return match, gate_evidence(match)

    def clamps_here(self, strategy, z):
        """Returns [n, seq] whether the strategy's evidence is above its threshold; True for a
        strategy without one."""
        if strategy not in self.thresholds:
            return torch.ones(z.shape[:2], dtype=torch.bool, device=z.device)
        match, gate = self.match_and_gate(z)
        evidence = gate if strategy.startswith("hybrid") else match
        return evidence > self.thresholds[strategy]

    def passage(self, z, on, tokens, tokenizer):
        """Returns, of the window whose gate is the median at its end: its text, match, gate and
        threshold, and where "standard", which is `on` [n, seq], and "hybrid" clamp."""
        match, gate = self.match_and_gate(z)
        i, threshold = gate[:, -1].argsort()[len(gate) // 2].item(), self.thresholds["hybrid"]
        return {"tokens": token_texts(tokenizer, tokens[i]), "match": match[i],
                "gate": gate[i], "threshold": torch.full_like(gate[i], threshold),
                "standard": on[i], "hybrid": on[i] & (gate[i] > threshold)}

    def scores(self, z, keep, forget):
        """Returns matcher_scores of tokens `keep` [n, seq] and of whole windows; forget [n] bool;
        z sparse [n * seq, d_sae]."""
        codes = self.codes_of_sparse(z, keep.shape[1])
        matches = {name: self.match(codes, name) * keep for name in self.matchers}
        token_truth = forget.repeat(keep.sum(1).tolist())
        tasks = {name: (token_truth, match[keep].cpu().numpy()) for name, match in matches.items()}
        tasks["hybrid"] = forget, gate_evidence(matches["pattern"])[:, -1].cpu().numpy()
        return matcher_scores(tasks, self.thresholds)


@torch.enable_grad()
def fit_matcher(x, forget):
    """Returns a function of windows of codes [..., f, w] to the probability that they are to be
    forgotten, fitted on x [n, f, w] and forget [n] bool. MATCHER "logistic": logistic regression;
    "attention": one learned query over the window."""
    if MATCHER == "logistic":
        # a ridge that does not fade as windows are added
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


def gate_evidence(match):
    """Returns the greatest mean of GATE_TOKENS matches in a row up to each position: [n, seq]."""
    if match.shape[1] < GATE_TOKENS:
        return torch.zeros_like(match)
    means = match.unfold(1, GATE_TOKENS, 1).mean(-1)
    return F.pad(means.cummax(1).values, (GATE_TOKENS - 1, 0))


def matcher_scores(tasks, thresholds):
    """Returns of tasks {name: (truth [n], score [n])} on the test windows: AUROC, and above each
    threshold false positives and balanced accuracy; and {name: [101] true positives at evenly
    spaced rates of false ones}."""
    metrics = {f"auroc_{name}": roc_auc_score(*task) for name, task in tasks.items()}
    rocs = {}
    for name, threshold in thresholds.items():
        truth, score = tasks[name.partition("_")[0]]
        metrics |= {f"false_positives_{name}": (score > threshold)[~truth].mean(),
                    f"accuracy_{name}": balanced_accuracy_score(truth, score > threshold)}
        if name in tasks:  # and not the same at another threshold
            false, true, _ = roc_curve(truth, score)
            rocs[name] = np.interp(np.linspace(0, 1, 101), false, true)
    return metrics, rocs


def bag_auroc(run, plan):
    """Returns the AUROC on the test windows of a logistic regression on counts of the last
    MATCHER_WINDOW tokens, fitted on the dev windows."""
    windows = run.store.windows

    def compute():
        bags, labels = [], []
        for ids, group in ((plan.dev, plan.dev_group), (plan.test, plan.group)):
            row, column = np.nonzero(windows.valid(ids))
            bags.append(bags_of_tokens(windows, ids[row], column, MATCHER_WINDOW))
            labels.append(group[row] == "forget")
        model = LogisticRegression(max_iter=300, class_weight="balanced").fit(bags[0], labels[0])
        return roc_auc_score(labels[1], model.decision_function(bags[1]))

    return cached_for_plan(run, plan, ("bag", MATCHER_WINDOW), compute)


# --- forgetting against preservation ---
def cached_for_plan(run, plan, what, compute):
    """Returns compute(), which depends on no SAE, as cached in the store's folder."""
    rows = plan.dev, plan.dev_group, plan.test, plan.group, plan.clozes.options
    code = code_key(bag_auroc, clamping_frontier, right_answers, Unlearner)
    key = fingerprint(what, code, *(part.tolist() for part in rows))
    return cached_json(run.store.folder / f"unlearning-{key}.json", compute)


class Frontier(NamedTuple):
    """Forgetting and preservation of all strategies."""
    edits: dict  # name -> function of a Batch, at the strength that costs FORGET_NATS
    metrics: dict
    rows: dict  # name -> a dict for each strength tried
    by_document: dict  # {name}_{group} -> loss increase by document of the sample


def clamping_frontier(run, plan, unlearner, strategies):
    """Returns the Frontier: the test windows under strategies and controls, at the strength at
    which the loss on every fifth dev window of FORGET rises by FORGET_NATS; strategies also at 1/4,
    1/2, 2 and 4 times it."""
    search = plan.dev[plan.dev_group == "forget"][::5]
    edits = {"unclamped": unlearner.edit("projection", 0.0)}  # which leaves all as it is
    unclamped = cached_for_plan(run, plan, "own", lambda: {
        **edited_scores(run, plan, edits["unclamped"], plan.test),
        "search": np.mean(edited_scores(run, plan, edits["unclamped"], search)["losses"])})
    own_losses, own_right = np.array(unclamped["losses"]), np.array(unclamped["right"])

    def measured(name, factors):  # the strength that costs FORGET_NATS, scores at its multiples
        def lost(strength):
            scores = edited_scores(run, plan, unlearner.edit(name, strength), search)
            return np.mean(scores["losses"]) - unclamped["search"]

        strength = strength_for(lost)
        tried = [unlearner.edit(name, strength * factor) for factor in factors]
        return strength, [edited_scores(run, plan, edit, plan.test) for edit in tried]

    metrics, rows, by_document = group_means(plan, None, own_right), {}, {}
    for name in (*strategies, *UNLEARNING_CONTROLS):
        factors = (1, 0.25, 0.5, 2, 4) if name in strategies else (1,)
        compute = functools.partial(measured, name, factors)
        strength, scores = (cached_for_plan(run, plan, (name, FORGET_NATS), compute)
                            if name == "projection" else compute())  # needs no SAE: cached
        edits[name], rows[name] = unlearner.edit(name, strength), []
        for factor, score in zip(factors, scores):
            losses, right = np.array(score["losses"]) - own_losses, np.array(score["right"])
            rows[name].append({"strength": strength * factor}
                              | group_means(plan, losses, right, own_right))
            if factor == 1:
                by_document |= group_losses(run, plan, losses, name)
        metrics |= {f"{name}_{key}": value for key, value in rows[name][0].items()}
    return Frontier(edits, metrics, rows, by_document)


def strength_for(forgets, low=2 ** -4, high=2.0 ** 8):
    """Returns the least strength, to 10 %, of which forgets(strength) is FORGET_NATS; `high` where
    none does."""
    while high > 1.1 * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if forgets(middle) >= FORGET_NATS else (middle, high)
    return high


def edited_scores(run, plan, edit, ids):
    """Returns {"losses": mean next-token loss of each of the windows `ids`, "right": whether each
    cloze in them is answered rightly} with edit(batch) added to x."""
    parts = spliced(run, ids, lambda batch: run.store.unscaled(batch.x + edit(batch)))
    losses, right = [], []
    for part, logp, loss in parts:
        losses += np.nanmean(loss, 1).tolist()
        right += cloze_answers(plan.clozes, part, logp).tolist()
    return {"losses": losses, "right": right}


def cloze_answers(clozes, ids, logp):
    """Returns whether each cloze of the windows `ids` is answered rightly by logp
    [len(ids), seq, vocabulary] of the tokens that follow positions from 1."""
    here = np.flatnonzero(np.isin(clozes.window, ids))
    row, at = np.searchsorted(ids, clozes.window[here]), clozes.position[here] - 1
    options = logp[row[:, None], at[:, None], clozes.options[here]]
    return options.cpu().numpy().argmax(1) == 0  # the first option is the right one


def group_means(plan, losses, right, before=None):
    """Returns by group the mean of losses [test windows], if any, and the share of right [clozes];
    where those that were right before are given, the p of McNemar's test between the two."""
    means = {} if losses is None else {
        str(name): losses[plan.group == name].mean() for name in np.unique(plan.group)}
    for name in np.unique(plan.cloze_group):
        now = right[plan.cloze_group == name]
        means[f"cloze_{name}"] = now.mean()
        if before is not None:
            means[f"cloze_{name}_p"] = mcnemar(now, before[plan.cloze_group == name])
    return means


def group_losses(run, plan, losses, strategy):
    """Returns {strategy_group: mean of losses [test windows] over each document of the sample}."""
    windows, means = run.store.windows, {}
    for name in np.unique(plan.group):
        part = plan.group == name
        means[f"{strategy}_{name}"] = windows.by_document(
            losses[part], windows.doc_ids[plan.test][part])
    return means


def mcnemar(now, before):
    """Returns the exact p that as many answers turned right as turned wrong; both [n] bool."""
    gained, lost = (now & ~before).sum(), (before & ~now).sum()
    return binomtest(int(gained), int(gained + lost)).pvalue if gained + lost else 1.0


def padded_losses(run, plan, strategies, edits):
    """Returns what strategies add to the loss of full windows of FORGET, but for each one's first
    token, behind 0, 32 and 64 tokens of retained text, as far as the model takes so many."""
    windows = run.store.windows
    (full, others), n = plan.full(windows), windows.tokens.shape[1] - 2
    config = run.get_model().config.get_text_config()
    longest, metrics = getattr(config, "max_position_embeddings", None) or math.inf, {}
    for pad in (pad for pad in (0, 32, 64) if n + 2 + pad <= longest):
        tokens = prepend_context(windows, full, others, pad)
        everywhere = np.ones(tokens.shape, bool)
        loss = {}
        for name in ("unclamped", *strategies):
            logits = edited_logits(run, edits[name], tokens, everywhere)
            loss[name] = mean_loss_of_last(logits, tokens, n)
        metrics |= {f"{name}_padded_{pad}": loss[name] - loss["unclamped"] for name in strategies}
    return metrics


def prepend_context(windows, ids, others, n):
    """Returns the tokens of windows `ids` with n tokens of windows `others` put after the first."""
    return np.concatenate(
        [windows.tokens[others, :n + 1], windows.tokens[ids, 1:]], 1).astype(np.int64)


def mean_loss_of_last(logits, tokens, n):
    """Returns the mean loss of the last n of tokens [batch, seq]; logits [batch, seq,
    vocabulary]."""
    following = torch.from_numpy(tokens[:, -n:]).to(logits.device)
    return F.cross_entropy(logits[:, -n - 1:-1].flatten(0, 1).float(), following.flatten()).item()


def question_scores(run, plan, edits):
    """Returns the share of four-way questions that the model answers rightly under each edit, and
    the p of McNemar's test against the unclamped model; {} without questions."""
    metrics = {}
    for kind, dataset in (("forget", FORGET_QUESTIONS), ("retain", RETAIN_QUESTIONS)):
        if not dataset:
            continue
        answers = {name: functools.partial(right_answers, run, dataset, edit)
                   for name, edit in edits.items()}
        own = np.array(cached_for_plan(run, plan, ("questions", data_identity(dataset)),
                                       lambda: answers["unclamped"]().tolist()))
        right = {name: own if name == "unclamped" else answer() for name, answer in answers.items()}
        metrics |= {f"{name}_{kind}_questions": of_edit.mean() for name, of_edit in right.items()}
        metrics |= {f"{name}_{kind}_questions_p": mcnemar(of_edit, own)
                    for name, of_edit in right.items() if name != "unclamped"}
    return metrics


def right_answers(run, dataset, edit):
    """Returns whether each question is answered rightly under all 24 orders of its options
    (SAEBench): [question] bool."""
    right = []
    for tokens, mask, letters, answers in encoded_questions(dataset, load_tokenizer()):
        logits = edited_logits(run, edit, tokens, mask)  # [24, seq, vocabulary]
        last = logits[np.arange(len(tokens)), mask.sum(1) - 1]
        letters = np.array(letters) % logits.shape[-1]  # the preflight's vocabulary is small
        chosen = last[:, letters].argmax(1).cpu().numpy()
        right.append((chosen == answers).all())
    return np.array(right)


def sampled(run, edit, prompts):
    """Returns tokens sampled after the prompts [n, seq], half as many: [n, seq / 2]."""
    n = prompts.shape[1] // 2
    torch.manual_seed(0)
    with editing(run, edit) as model:
        return model.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=n, min_new_tokens=n,
            do_sample=True, pad_token_id=0)[:, -n:]


def repetition(texts):
    """Returns, of each of {name: tokens [n, seq]}, the mean share of a row's pairs of neighbours
    that came before in it, and the mean entropy of a row in nats."""
    metrics = {}
    for name, rows in texts.items():
        rows = rows.tolist()
        distinct = [len(set(zip(row, row[1:]))) / (len(row) - 1) for row in rows]
        metrics |= {f"{name}_repetition": 1 - np.mean(distinct),
                    f"{name}_entropy": np.mean([miller_madow_entropy(row) for row in rows])}
    return metrics
# endregion


# region Evaluation: hierarchy
class Levels(NamedTuple):
    """Two levels of live units: the children (level 1, or a flat dictionary) and their parents."""
    lower: Activity
    upper: Activity
    parents: np.ndarray  # [child] its parent, an index into upper
    children: np.ndarray  # live children whose parent is live

    def families(self):
        """Returns {parent: its live children}, of parents that have at least two."""
        order = self.children[np.argsort(self.parents[self.children], kind="stable")]
        parents, first = np.unique(self.parents[order], return_index=True)
        return {int(p): part for p, part in zip(parents, np.split(order, first[1:]))
                if len(part) > 1}

    def edges(self):
        """Returns the pairs (parent, child) of all families: [edge, 2]."""
        pairs = [(parent, child) for parent, part in self.families().items() for child in part]
        if not pairs:
            raise RunnerError(f"no parent has two live children: {len(self.children)} live ones of "
                              f"{len(self.parents)} have a live parent, each another one.")
        return np.array(pairs)


def levels_of_codes(run, lower, upper, parents):
    """Returns Levels of codes of the held-out tokens, sparse by column [token, unit]; parents
    [d_1]."""
    windows, parents = run.store.windows, parents.cpu().numpy()
    lower, upper = (Activity.of(codes, windows.heldout_tokens()) for codes in (lower, upper))
    files = heldout_files(windows)
    alive = lower.live(files, run.live_rule) & upper.live(files, run.live_rule)[parents]
    return Levels(lower, upper, parents, np.flatnonzero(alive))


def levels_from_groups(activity, groups):
    """Returns units in groups [unit] as Levels: a group fires where one of its units does."""
    return Levels(activity, activity.union(groups), groups, np.arange(len(groups)))


@torch.no_grad()
def eval_hierarchy(run):
    """Mutual information of the levels, clustering, causal tracing of parents."""
    sae, store, ids = run.sae, run.store, run.store.windows.heldout()
    flat, share = flat_peer(run)
    encoded_lower = encode_windows(sae.lower, store, ids)
    encoded_flat = encode_windows(flat, store, ids)
    levels = levels_of_codes(run, encoded_lower.codes, run.encoded.codes, sae.parents())
    starts = {name: starting_levels(run, encoded_lower.codes, grouped)
              for name, grouped in (("untrained", False), ("start", True))}

    metrics, curves = grouping_results(run, levels, starts, encoded_flat.codes, flat.W_dec)
    families, rates = levels.families(), levels.upper.rates()
    parents = evenly_by_rate(families, rates, 2 if run.tiny else TRACED_PARENTS)
    traces = [trace_parent(run, p, families[p], rates, windows_with(store.windows, levels.upper, p))
              for p in parents]
    curves["tree"] = family_tree(store.windows, load_tokenizer(), levels, families, parents,
                                 sae.W_dec, traces)

    causal, per_sequence = causal_scores(traces, store.windows)
    variance = variance_by_position(store)[1]
    metrics |= causal | {
        "level_1_l0": np.nanmean(encoded_lower.l0), "flat_trained": share,
        "level_1_explained_variance": explained_variance(encoded_lower, variance),
        "flat_explained_variance": explained_variance(encoded_flat, variance)}
    return Result(metrics, curves, per_sequence)


@torch.enable_grad()
def flat_peer(run):
    """Returns a TopK SAE of the same width, L0 and number of steps, of seed 0 whatever the run's,
    cached in the store's folder; and the share of its steps that the time for evaluations
    allowed."""
    store, flat, steps = run.store, untrained(run), run.log["step"][-1]
    size = peer_batch(store)
    stage = Stage("flat", steps / (store.windows.n_train // size), PLAIN)
    key = code_key(train, untrained, Store, steps, size, flat.d_sae)
    deadline = time.time() + 60 * TIME_BUDGET_MINUTES * EVALUATION_RESERVE
    training = train(flat, store, [stage], 0, size, deadline, store.folder / f"flat-{key}.pt")
    return flat.eval(), sum(training.done) / sum(training.planned)


def starting_levels(run, lower_codes, grouped):
    """Returns the Levels with level 2 as it starts: Ward clusters, or not grouped: at random."""
    start = copy.deepcopy(run.sae)
    ids = run.store.windows.heldout()
    torch.manual_seed(0)
    start.start_level_2(run.store.batch(ids[:32]), grouped)
    codes = encode_windows(start, run.store, ids).codes
    return levels_of_codes(run, lower_codes, codes, start.parents())


# --- what a parent's activity says about its children's ---
def binary_information(both, first, second, n):
    """Returns the mutual information in nats of two events that happen first and second times in n,
    both times together; arrays broadcast."""
    total = 0.0
    cells = ((both, first, second), (first - both, first, n - second),
             (second - both, n - first, second), (n - first - second + both, n - first, n - second))
    for joint, a, b in cells:
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = joint * n / np.asarray(a * b, dtype=float)
            total = total + np.where(joint > 0, joint / n * np.log(ratio), 0.0)
    return total


def binary_entropy(count, n):
    """Returns the entropy in nats of an event that happens count times in n."""
    return binary_information(count, count, count, n)


class EdgeInformation(NamedTuple):
    """How much parents say about their children, by edge."""
    share: np.ndarray  # [edge] bias-corrected mutual information / the child's entropy
    p: np.ndarray  # [edge] share of circular shifts with at least this mutual information
    draws: np.ndarray  # [draw] mean share over edges, files resampled with replacement

    @property
    def mean(self):
        """The mean share over edges; 0 without edges."""
        return self.share.mean() if len(self.share) else 0.0


def edge_information(levels, edges, files, draws=200, least_shift=FAR_LAGS[0]):
    """Returns the EdgeInformation of pairs (parent, child) [edge, 2]: I(parent; child) of binary
    activity, less its mean over circular shifts of the parent by at least `least_shift` tokens,
    over H(child). files [n]: of each token."""
    rng, n, rows = np.random.default_rng(0), levels.upper.n, []
    names, file_of = np.unique(files, return_inverse=True)
    shares = np.full(len(names), 1 / len(names))
    weights = rng.multinomial(len(names), shares, draws).T  # [file, draw]
    if n <= 2 * least_shift:
        raise RunnerError(f"{n} held-out tokens are too few for circular shifts of {least_shift}.")
    shifts = rng.integers(least_shift, n - least_shift, draws)
    drawn = np.bincount(file_of) @ weights  # [draw] tokens
    parent_fires = np.zeros(2 * n, dtype=bool)  # doubled, so that shifts need no modulo
    total = np.zeros(draws)

    for parent, child in edges:
        at, times = levels.upper.places[parent], levels.lower.places[child]
        parent_fires[at], parent_fires[at + n] = True, True
        both = times[parent_fires[times]]
        shifted = parent_fires[times[None] + shifts[:, None]].sum(1)
        parent_fires[at], parent_fires[at + n] = False, False

        observed = binary_information(len(both), len(at), len(times), n)
        null = binary_information(shifted, len(at), len(times), n)
        entropy = max(binary_entropy(len(times), n), 1e-12)
        p = (1 + (null >= observed).sum()) / (1 + draws)
        rows.append(((observed - null.mean()) / entropy, p))

        counts = [np.bincount(file_of[part], minlength=len(names)) @ weights
                  for part in (both, at, times)]
        again = binary_information(*counts, drawn) - null.mean()
        total += again / np.maximum(binary_entropy(counts[2], drawn), 1e-12)
    share, p = np.array(rows).reshape(-1, 2).T
    return EdgeInformation(share, p, total / max(len(edges), 1))


def rate_matched_parents(rates, edges, rng):
    """Returns each edge (parent, child) with another parent, one of the ten nearest in rate."""
    order = np.argsort(rates, kind="stable")
    place, pairs = np.argsort(order), []
    for parent, child in edges:
        low = int(np.clip(place[parent] - 5, 0, max(len(order) - 11, 0)))
        near = order[low:low + 11]
        pairs.append((rng.choice(near[near != parent]), child))
    return np.array(pairs)


def information_metrics(information, rivals):
    """Returns the mean of EdgeInformation and of {name: EdgeInformation} of rivals; of each the
    difference with its 95 % interval over files, and q after Benjamini-Hochberg over the rivals;
    the share of the edges that are significant after it."""
    q = false_discovery_control(information.p) if len(information.p) else np.ones(1)
    metrics = {"mutual_information": information.mean, "edges_significant": (q < 0.05).mean()}
    tails = []
    for name, rival in rivals.items():
        difference, over = information.draws - rival.draws, f"mutual_information_over_{name}"
        low, high = np.percentile(difference, (2.5, 97.5))
        metrics |= {f"mutual_information_{name}": rival.mean, f"{over}_low": low,
                    over: information.mean - rival.mean, f"{over}_high": high}
        extreme = min((difference <= 0).sum(), (difference >= 0).sum())
        tails.append(min(1.0, 2 * (1 + extreme) / (1 + len(difference))))
    for name, q in zip(rivals, false_discovery_control(tails) if tails else ()):
        metrics[f"mutual_information_over_{name}_q"] = q
    return metrics


# --- how well groups follow labels ---
class Units(NamedTuple):
    """Units that are put into groups."""
    places: list  # unit -> tokens on which it fires
    directions: np.ndarray  # [unit, d]


def ward_groups(directions, n_groups):
    """Returns the group [unit] of directions [unit, d] by Ward's method."""
    n_groups = int(np.clip(n_groups, 1, len(directions)))
    return AgglomerativeClustering(n_groups).fit_predict(directions)


def kmeans_groups(directions, n_groups):
    """Returns the group [unit] of directions [unit, d] by k-means."""
    n_groups = int(np.clip(n_groups, 1, len(directions)))
    return KMeans(n_groups, n_init=1, random_state=0).fit_predict(directions)


def label_kinds(windows):
    """Returns the labels of the held-out tokens that count, {name: class [n]}: the token, its class
    with all labels taken together, and, where there are labels, its type and its context apart."""
    keep = windows.heldout_tokens()
    tokens = windows.tokens[windows.n_train:, 1:].ravel()[keep]
    kinds = {"token": tokens, "class": token_classes(windows)[keep]}
    if windows.labels is not None and (windows.labels >= 0).any():
        labels = windows.labels[:, 1:].reshape(-1, len(LABELS))[keep]
        kinds["type"] = labels[:, 0] + 1
        kinds["context"] = np.unique(labels[:, 1:], axis=0, return_inverse=True)[1].ravel()
    return kinds


def modal_labels(places, classes):
    """Returns the most frequent class on the tokens where each unit fires."""
    return np.array([np.bincount(classes[at]).argmax() for at in places])


def clustering_metrics(groups, units, kinds):
    """Returns how well groups [unit] follow the modal label of each of `kinds`: adjusted mutual
    information and adjusted Rand index; and the silhouette of the directions, which proves nothing
    where a loss trained it."""
    metrics = {}
    for kind, classes in kinds.items():
        labels = modal_labels(units.places, classes)
        metrics |= {f"ami_{kind}": adjusted_mutual_info_score(labels, groups),
                    f"ari_{kind}": adjusted_rand_score(labels, groups)}
    if 1 < len(np.unique(groups)) < len(groups):
        metrics["silhouette"] = silhouette_score(units.directions, groups)
    return metrics


def grouping_results(run, levels, starts, flat_codes, flat_directions):
    """Returns metrics and curves of Levels beside {name: Levels} of level 2 as it starts, and
    beside groups of a flat SAE's latents (sparse codes, directions [latent, d])."""
    windows, families = run.store.windows, levels.families()
    if not families:
        return {"groups": 0}, {}
    files, units = heldout_files(windows), levels.children
    groups = np.unique(levels.parents[units], return_inverse=True)[1]
    directions = run.sae.lower.W_dec.cpu().numpy()
    level_1 = Units([levels.lower.places[i] for i in units], directions[units])
    flat = Activity.of(flat_codes, windows.heldout_tokens())
    live = np.flatnonzero(flat.live(files, run.live_rule))
    flat, flat_directions = flat.only(live), flat_directions.cpu().numpy()[live]

    flat_units = Units(flat.places, flat_directions)
    n_groups, kinds = groups.max() + 1, label_kinds(windows)
    n_flat_groups = max(1, round(len(live) * n_groups / len(units)))  # of the same mean size
    groupings = {"": (groups, level_1)}
    for name, cluster in (("ward", ward_groups), ("kmeans", kmeans_groups)):
        groupings[f"_{name}"] = cluster(flat_directions, n_flat_groups), flat_units
        groupings[f"_{name}_level_1"] = cluster(directions[units], n_groups), level_1
    metrics = {"groups": n_groups, "group_size": len(units) / n_groups,
               "singletons": (np.bincount(groups) == 1).mean(),
               "duplicates": duplicate_fraction(families, directions)}
    for name, (grouping, of_units) in groupings.items():
        scores = clustering_metrics(grouping, of_units, kinds)
        metrics |= {f"{key}{name}": value for key, value in scores.items()}

    ward = levels_from_groups(flat, groupings["_ward"][0])
    metrics |= information_against_rivals(levels, ward, starts, files)
    return metrics, information_curves(levels, families, files)


def information_against_rivals(levels, ward, starts, files):
    """Returns information_metrics of Levels beside other parents of similar rate, Ward clusters of
    a flat SAE, where a group fires if any of its latents does, the child among them, and level 2 as
    it starts. A rival without a family is left out."""
    edges, rng = levels.edges(), np.random.default_rng(0)
    others = rate_matched_parents(levels.upper.rates(), edges, rng)
    rivals = {"non_edges": edge_information(levels, others, files)}
    rivals |= {name: edge_information(rival, rival.edges(), files)
               for name, rival in ({"ward": ward} | starts).items() if rival.families()}
    return information_metrics(edge_information(levels, edges, files), rivals)


def information_curves(levels, families, files):
    """Returns the information of the largest families' parents about children of all of them."""
    shown = sorted(families, key=lambda p: -len(families[p]))[:12]
    children = np.concatenate([families[p][:3] for p in shown])
    pairs = np.array([(p, i) for p in shown for i in children])
    matrix = edge_information(levels, pairs, files, 50).share
    return {"information_matrix": matrix.reshape(len(shown), -1).round(4),
            "matrix_parents": np.array(shown), "matrix_children": children,
            "matrix_family": np.array([levels.parents[i] for i in children])}


def duplicate_fraction(families, directions):
    """Returns the share of the children that point as a sibling does, cosine above .95."""
    same, n = 0, 0
    for part in families.values():
        unit = normalize(directions[part])
        cosine = unit @ unit.T - 2 * np.eye(len(part))
        same, n = same + (cosine.max(1) > 0.95).sum(), n + len(part)
    return same / max(n, 1)


# --- causal tracing ---
def evenly_by_rate(families, rates, n):
    """Returns n parents, evenly spaced in the order of their rates."""
    order = sorted(families, key=lambda p: (rates[p], p))
    if not order:
        return []
    return [order[i] for i in np.unique(np.linspace(0, len(order) - 1, n).round().astype(int))]


def windows_with(windows, activity, unit, n=4):
    """Returns the ids of up to n windows, one a file, in which a unit fires most, and of as many of
    other files in which it fires least."""
    seq, files = windows.tokens.shape[1] - 1, windows.doc_ids[windows.n_train:]
    rows = windows.heldout_tokens()[activity.places[unit]] // seq
    ties = np.random.default_rng(unit).random(len(files)) / 2  # broken at random
    order = np.argsort(-(np.bincount(rows, minlength=len(files)) + ties))

    first = order[np.sort(np.unique(files[order], return_index=True)[1])]  # a file's best window
    chosen = first[:min(n, len(first) // 2)]
    others = order[::-1][~np.isin(files[order[::-1]], files[chosen])]
    absent = others[np.sort(np.unique(files[others], return_index=True)[1])][:n]
    return windows.n_train + chosen, windows.n_train + absent


def trace_parent(run, parent, children, rates, windows):
    """Returns the AblationSummary of a parent; windows: ids where it fires most, and least. In the
    first three things are ablated: the parent, each child alone, and a control, another latent of
    level 2 that is active at the same token, of similar rate (rates [d_sae]) and size (its value
    times the length of its direction). In the second the parent, and another latent of similar
    rate, are switched on instead."""
    sae, size, (present, absent) = run.sae, run.sae.directions().norm(dim=1), windows

    def edited(z, latent, value, where):  # change of x_hat2 where a latent is set to value
        chosen = where[..., None] & (torch.arange(sae.d_sae, device=DEVICE) == latent)
        new = Latents.from_dense(torch.where(chosen, value, z))
        return sae.decode(new) - sae.decode(Latents.from_dense(z))

    batch = run.store.batch(present)
    z, h = sae.encode(batch).dense(), sae.levels(batch).dense()
    active, control, patched_control = matched_controls(z * size, parent, rates)
    deltas = [edited(z, latent, 0.0, active) for latent in (parent, control[..., None])]
    deltas += [-(h[..., i] * active)[..., None] * sae.lower.W_dec[i] for i in children]
    changes = logit_changes(run, present, deltas, active)
    value = z[..., parent][active].mean()

    batch = run.store.batch(absent)
    z = sae.encode(batch).dense()
    patched = run.store.valid(absent) & (batch.positions % 8 == 1) & (z[..., parent] == 0)
    deltas = [edited(z, i, value * size[parent] / size[i], patched)
              for i in (parent, patched_control)]
    rises = logit_changes(run, absent, deltas, patched)
    fired = [(sae.levels(batch._replace(x=batch.x + delta)).dense()[patched][:, children] > 0)
             .float().mean().item() for delta in deltas]
    files = run.store.windows.doc_ids[present][active.nonzero()[:, 0].cpu().numpy()]
    return ablation_summary(files, changes.cpu().numpy(), rises.cpu().numpy(), fired)


def matched_controls(size, parent, rates):
    """Returns of latents of `size` [windows, seq, d_sae]: where the parent is active beside another
    one, [windows, seq]; which of those is nearest to it in log size and log rate [d_sae] together;
    and which of all is nearest in rate."""
    size, rate = size.log(), torch.as_tensor(rates, device=size.device).clamp_min(1e-9).log()
    near = (rate - rate[parent]).abs()
    near[parent] = math.inf
    apart = (size - size[..., parent, None]).abs() + near
    apart, control = apart.nan_to_num(math.inf, math.inf).min(2)
    return size[..., parent].isfinite() & apart.isfinite(), control, near.argmin()


def logit_changes(run, ids, deltas, at):
    """Returns what adding each of deltas [windows, seq, d_in] to x changes in the logits at the
    tokens `at` [windows, seq]: [deltas, n, vocab]."""
    tokens = run.store.windows.tokens[ids]
    unedited, *edited = (
        edited_logits(run, lambda _: delta, tokens, tokens >= 0)[:, 1:][at].float()
        for delta in (torch.zeros_like(deltas[0]), *deltas))
    return torch.stack(edited) - unedited


class AblationSummary(NamedTuple):
    """Effects of one parent on the logits, at n tokens."""
    files: np.ndarray  # [n] document of each token
    parent_cosine: np.ndarray  # [n] of the parent's effect with its children's summed effects
    control_cosine: np.ndarray  # [n] of the control's effect with the same sum
    parent_rise: float  # switched on: rise of the ten logits that the children raise most
    control_rise: float
    parent_children: float  # switched on: share of the children that then fire
    control_children: float


def ablation_summary(files, changes, rises, fired):
    """Returns the AblationSummary of changes of the logits [2 + children, n, vocab] where the
    parent, its control and each child is ablated, rises [2, m, vocab] where parent and control are
    switched on, fired [2]: the share of children that then fire."""
    parent, control, *single = changes
    summed = np.sum(single, 0)
    top = np.argsort((summed - summed.mean(1, keepdims=True)).mean(0), kind="stable")[:10]
    up = (rises - rises.mean(2, keepdims=True))[:, :, top].mean((1, 2))
    return AblationSummary(
        files, row_cosines(parent, summed), row_cosines(control, summed), parent_rise=up[0],
        control_rise=up[1], parent_children=fired[0], control_children=fired[1])


def row_cosines(a, b):
    """Returns the cosines of rows [n, d]; 0 where one is zero."""
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(1) / np.maximum(lengths, 1e-12)


def causal_scores(traces, windows):
    """Returns of AblationSummaries, one per parent, pooled over their tokens: the mean cosine of a
    parent's effect with its children's summed effects, and of its control's with the same sum;
    their ratio, the causal specificity (the control's is at least .001 there); p of the difference,
    by sign flips of files; what switching on does to the logits of the children's top tokens, and
    to the children; and the cosines by document [sample]."""
    if not traces:
        return {}, {}
    files, parent, control = (np.concatenate([getattr(part, name) for part in traces])
                              for name in ("files", "parent_cosine", "control_cosine"))
    means = np.array([[values[files == file].mean() for values in (parent, control)]
                      for file in np.unique(files)])
    gap, rng = means[:, 0] - means[:, 1], np.random.default_rng(0)
    flips = rng.choice((-1.0, 1.0), (10_000, len(gap))) @ gap
    metrics = {"causal_cosine": parent.mean(), "causal_cosine_rival": control.mean(),
               "causal_specificity": parent.mean() / max(control.mean(), 1e-3),
               "causal_p": (1 + (flips >= gap.sum() - 1e-12).sum()) / (1 + len(flips))}

    for name in ("rise", "children"):
        a, b = (np.array([getattr(part, f"{who}_{name}") for part in traces])
                for who in ("parent", "control"))
        metrics |= {f"patched_{name}": a.mean(), f"patched_{name}_rival": b.mean(),
                    f"patched_{name}_share": (a > b).mean()}
    return metrics, {f"causal_cosine{end}": windows.by_document(values, files)
                     for end, values in (("", parent), ("_rival", control))}
# endregion


# region Evaluation: composition
@torch.no_grad()
def eval_composition(run):
    """Whether attention shows which features act together; their reuse; patterns."""
    sae, windows, rng = run.sae, run.store.windows, np.random.default_rng(0)
    places = rng.permutation(windows.heldout_tokens())[:32 if run.tiny else COMPOSED_TOKENS]
    row, at = np.divmod(places, CONTEXT_LENGTH - 1)
    batch = run.store.batch(windows.n_train + row)
    x, tokens = (a[torch.arange(len(at)), at][:, None] for a in (batch.x, batch.tokens))
    positions = batch.positions[:1]
    batch = batch._replace(x=x, tokens=tokens, positions=positions, mask=None)  # one token per row

    (ids, f), attention = sae.features(batch), None
    codes = sae.encode(batch).dense()[:, 0, sae.d_f:].cpu().numpy()
    if (weights := sae.attention(ids, f)) is not None:
        attention = weights.mean(1).cpu().numpy()  # over heads: [n, k, k]
    metrics = {"compositions_per_token": (codes > 0).sum(1).mean(),
               "live_compositions": (codes > 0).any(0).mean()}
    singles, pairs = ablation_effects(
        lambda amounts: sae.compose(ids, torch.from_numpy(amounts).to(DEVICE)).cpu().numpy(),
        ids.cpu().numpy(), f.cpu().numpy(), codes > 0, rng)
    if not len(singles.token):  # the features take all of TARGET_L0
        return Result(metrics, {}, {})

    reuse = feature_reuse(singles, codes.shape[1], rng, least=min(5, run.live_rule.firings))
    metrics |= reuse.metrics
    if attention is not None:
        seen = (attention[pairs.token, pairs.slot, pairs.other_slot]
                + attention[pairs.token, pairs.other_slot, pairs.slot])
        metrics |= interaction_metrics(pairs, seen)
    most = reuse.random_counts.max() + 1
    null = [np.bincount(row, minlength=most) for row in reuse.random_counts]
    text = vocabulary_texts(load_tokenizer(), tokens[:, 0])
    return Result(metrics, {
        "patterns": composition_patterns(codes, singles, pairs, text),
        "reuse": np.bincount(reuse.counts), "reuse_null": np.mean(null, 0)[:40]}, {})


class SingleEffects(NamedTuple):
    """Losses of compositions where one feature is dropped, by instance [n]."""
    token: np.ndarray
    feature: np.ndarray
    composition: np.ndarray
    effect: np.ndarray  # c(f) - c(f without the feature)


class PairEffects(NamedTuple):
    """Interactions of two features of a token, by instance [n]."""
    token: np.ndarray
    slot: np.ndarray  # of the first feature among the token's k
    other_slot: np.ndarray
    first: np.ndarray  # feature
    second: np.ndarray
    composition: np.ndarray  # the one that interacts most
    effect: np.ndarray  # |c(f) - c(f\i) - c(f\j) + c(f\ij)| of it


def ablation_effects(compose, ids, f, fires, rng, draws=8):
    """Returns what each composition of a token loses where one of its features is dropped, as
    SingleEffects, and where two are, `draws` random pairs of each token's active features, as
    PairEffects. compose(f) gives compositions [n, d_c] of the features ids [n, k] with amounts
    f [n, k] >= 0; fires [n, d_c]: those that count."""
    def without(*slots):
        left = f.copy()
        for slot in slots:
            left[row, slot] = 0
        return compose(left)

    whole, row, k = compose(f), np.arange(len(f)), f.shape[1]
    alone = np.stack([without(slot) for slot in range(k)], 1)
    token, slot, composition = np.nonzero((f > 0)[:, :, None] & fires[:, None])
    effect = (whole[token, composition] - alone[token, slot, composition]).astype(float)
    singles, parts = SingleEffects(token, ids[token, slot], composition, effect), []

    for _ in range(draws):
        first, second = np.where(f > 0, rng.random(f.shape), -1).argsort(1)[:, -2:].T
        joint = whole - alone[row, first] - alone[row, second] + without(first, second)
        joint = np.abs(joint) * fires
        most = joint.argmax(1)
        use = (f[row, first] > 0) & (f[row, second] > 0) & fires.any(1)
        columns = row, first, second, most, joint[row, most].astype(float)
        parts.append([column[use] for column in columns])
    token, slot, other, composition, effect = (np.concatenate(part) for part in zip(*parts))
    return singles, PairEffects(token, slot, other, ids[token, slot], ids[token, other],
                                composition, effect)


def interaction_metrics(pairs, attention):
    """Returns whether attention [n] between the two features of each of PairEffects shows which act
    together: by pair of features the means, Spearman's correlation of the two, and the AUROC of
    attention for the tenth of the pairs that interact most against as many pairs with similar
    numbers of instances."""
    low, high = np.minimum(pairs.first, pairs.second), np.maximum(pairs.first, pairs.second)
    _, index, counts = np.unique(low * (high.max() + 1) + high, return_inverse=True,
                                 return_counts=True)
    attention, effect = (np.bincount(index, values) / counts
                         for values in (attention, pairs.effect))
    if len(counts) < 20 or effect.max() == effect.min():  # none acts together with another
        return {"feature_pairs": len(counts)}

    chosen = np.argsort(-effect, kind="stable")[:len(effect) // 10]
    others = rate_matched(counts, chosen)
    truth = np.arange(len(chosen) + len(others)) < len(chosen)
    score = attention[np.concatenate([chosen, others])]
    return {"attention_spearman": spearmanr(attention, effect).statistic,
            "attention_auroc": roc_auc_score(truth, score), "feature_pairs": len(counts)}


def gini(values):
    """Returns the Gini coefficient of values [n] >= 0."""
    order = np.sort(values)
    n = len(order)
    return (2 * np.arange(1, n + 1) - n - 1) @ order / max(n * order.sum(), 1e-12)


class Reuse(NamedTuple):
    """In how many compositions features take part."""
    metrics: dict
    counts: np.ndarray  # [feature] of features with enough instances
    random_counts: np.ndarray  # [draw, feature] the same in random graphs


def feature_reuse(singles, d_c, rng, draws=50, least=5):
    """Returns the Reuse of SingleEffects: a feature takes part in a composition if the summed
    effect of dropping it exceeds the 95th percentile of sums with effects shuffled among the
    token's features. Pairs of feature and composition with fewer than `least` instances are left
    out; random graphs draw as many edges from the pairs that are not."""
    group, effect = singles.token * d_c + singles.composition, singles.effect
    edges, index, counts = np.unique(np.stack([singles.feature, singles.composition]), axis=1,
                                     return_inverse=True, return_counts=True)
    index, known = index.ravel(), counts >= least
    summed_effect, null = np.bincount(index, effect), []
    by_group = np.argsort(group, kind="stable")
    for _ in range(draws):
        order = np.lexsort((rng.random(len(group)), group))
        shuffled = np.empty_like(effect)
        shuffled[by_group] = effect[order]
        null.append(np.bincount(index, shuffled, len(counts)))

    is_edge = known & (summed_effect > np.quantile(null, 0.95, axis=0)
                       + 1e-9 * np.abs(summed_effect).max())
    features, edge_feature = np.unique(edges[0, known], return_inverse=True)
    if not is_edge.any():
        return Reuse({"reuse_edges": 0.0}, np.zeros(1, int), np.zeros((1, 1), int))
    n_compositions = np.bincount(edge_feature, is_edge[known], len(features)).astype(int)
    drawn = [rng.choice(edge_feature, n_compositions.sum(), replace=False) for _ in range(draws)]
    random_counts = np.array([np.bincount(row, minlength=len(features)) for row in drawn])
    ginis = [gini(row) for row in random_counts]
    return Reuse({
        "reuse_mean": n_compositions.mean(), "reuse_gini": gini(n_compositions),
        "reuse_gini_null": np.mean(ginis), "reuse_gini_null_95": np.quantile(ginis, 0.95),
        "reused_fraction": (n_compositions > 1).mean(),
        "reuse_edges": is_edge.sum() / known.sum()}, n_compositions, random_counts)


def composition_patterns(codes, singles, pairs, text, most=16):
    """Returns what the `most` compositions of the largest total value are made of: {"compositions":
    ids; "features": the features that act most on them; "effects" [composition, feature]: mean
    change of it where the feature is dropped, over its mean value; "pairs": of each the three pairs
    of features with the largest mean interaction; "tokens": of each the tokens [str] where it is
    largest}. codes [token, d_c]; text [token]."""
    top = np.argsort(-codes.sum(0), kind="stable")[:most]
    top = top[codes[:, top].sum(0) > 0]
    mean, chosen = codes.sum(0) / np.maximum((codes > 0).sum(0), 1), []
    for c in top:
        here = singles.composition == c
        names, index = np.unique(singles.feature[here], return_inverse=True)
        strongest = np.argsort(-np.bincount(index, singles.effect[here]), kind="stable")[:2]
        chosen += list(names[strongest])
    features = np.array(list(dict.fromkeys(chosen)))

    effects = np.zeros((len(top), len(features)))
    for row, c in zip(effects, top):
        for column, name in enumerate(features):
            here = (singles.composition == c) & (singles.feature == name)
            row[column] = singles.effect[here].mean() / mean[c] if here.any() else 0.0
    strongest = [np.argsort(-codes[:, c], kind="stable")[:5] for c in top]
    return {"compositions": top, "features": features, "effects": effects.round(4),
            "pairs": [strongest_pairs(pairs, c) for c in top],
            "tokens": [[text[i] for i in places if codes[i, c] > 0]
                       for c, places in zip(top, strongest)]}


def strongest_pairs(pairs, composition, most=3):
    """Returns the pairs of features with the largest mean interaction in a composition, and that
    mean: [(first, second, mean), ...]."""
    here = pairs.composition == composition
    both = pairs.first[here], pairs.second[here]
    edges, index = np.unique(np.stack([np.minimum(*both), np.maximum(*both)]), axis=1,
                             return_inverse=True)
    index = index.ravel()
    means = np.bincount(index, pairs.effect[here]) / np.maximum(np.bincount(index), 1)
    return [(*edges[:, i].tolist(), float(means[i]))
            for i in np.argsort(-means, kind="stable")[:most]]
# endregion


# region Evaluation: recovery
# SAEs of this variant on synthetic activations whose features are known (data/synthetic.py).
def eval_recovery(run):
    """Matched cosine with true directions and AUROC of true features, by task and rho, beside PCA,
    NMF and a random dictionary."""
    first, *others = SYNTHETIC_TASKS
    wanted = [(first, rho) for rho in SYNTHETIC_RHOS] + [(task, 1.0) for task in others]
    metrics, rows = {}, []
    for task, rho in wanted[:1] if run.tiny else wanted:
        tokens = 2 ** 13 if run.tiny else SYNTHETIC_TOKENS
        truth = make_synthetic(task, rho, CONTEXT_LENGTH, tokens, FORGET)
        store = synthetic_store(truth)
        scores = recovered(run, truth, store)
        baselines = recovery_baselines(truth, store, task)
        rows.append({"task": task, "rho": rho, "sae": scores} | baselines)
        metrics |= {f"{task}_{rho:g}_{name}": value for name, value in scores.items()}
    return Result(metrics, {"recovery": rows}, {})


def synthetic_store(truth):
    """Returns synthetic activations as a Store."""
    store = Store(cache_folder() / "synthetic", truth.windows, DIMENSIONS, torch.float32)
    store.shard_tensors = torch.from_numpy(truth.x).to(DEVICE).split(SHARD_WINDOWS)
    store.normalise()
    return store


def recovered(run, truth, store):
    """Returns the recovery_scores of an SAE of this variant, trained on synthetic activations."""
    sae, dev, test, fidelity = trained_on(run, store, SYNTHETIC_SAE)
    return recovery_scores(truth, dev, test, jsonable(sae.directions())) | fidelity


def trained_on(run, store, size):
    """Returns an SAE of this variant, of a size (width, L0), trained on synthetic activations; its
    latents on DEV and on TEST [token, d_sae]; its explained variance and L0 there, {name:
    value}."""
    width, k = size
    sae = make_sae(store.d_in, width, run.seed, k)
    stages = [stage._replace(epochs=1) if run.tiny else stage
              for stage in planned_stages(type(sae))]
    with tempfile.TemporaryDirectory() as state:
        train(sae, store, stages, run.seed, peer_batch(store), math.inf, Path(state, "sae"))
    sae.eval().requires_grad_(False)
    encoded = encode_windows(sae, store, store.windows.heldout())
    return sae, *np.split(encoded.codes.toarray(), 2), {
        "explained_variance": explained_variance(encoded, variance_by_position(store)[1]),
        "l0": np.nanmean(encoded.l0)}


def recovery_scores(truth, dev, test, dictionary):
    """Returns how well latents dev and test [token, d_sae] >= 0 of truth's DEV and TEST, and a
    dictionary [d_sae, DIMENSIONS], match the truth: mean cosine with the true directions under the
    best assignment (Hungarian), and mean AUROC on TEST of the latent that is best on DEV, of
    primitives and of pairs (pair_aurocs). A latent that copies one of a pair's primitives has .75
    there."""
    cosine = truth.directions @ normalize(dictionary).T
    rows, columns = linear_sum_assignment(-cosine)
    matched = np.zeros(len(cosine))  # 0 for true directions left unassigned
    matched[rows] = cosine[rows, columns]

    on_dev, on_test = (truth.amounts[part] > 0 for part in truth.parts()[1:])
    if not (on_dev.any(0).all() and on_test.any(0).all()):
        raise RunnerError("too few synthetic tokens: some primitive is never there.")
    best = [aurocs(dev, on_dev[:, i]).argmax() for i in range(PRIMITIVES)]
    primitives = [roc_auc_score(on_test[:, i], test[:, b]) for i, b in enumerate(best)]
    return {"cosine_primitives": matched[:PRIMITIVES].mean(),
            "cosine_compositions": matched[PRIMITIVES:].mean(),
            "auroc_primitives": np.mean(primitives),
            **pair_aurocs(truth, dev, test, on_dev, on_test, best)}


def pair_aurocs(truth, dev, test, on_dev, on_test, best):
    """Returns the AUROC on TEST, pairs against tokens with exactly one of the two primitives, of
    the latent that is best on DEV, for pairs "seen" together in training and for those "unseen";
    and of the smaller of the two latents that are best for its primitives ("minimum"). DEV holds
    the unseen pairs too; pairs with fewer than 3 joint tokens in either are left out."""
    rows = []
    for i, j in truth.wired.pairs:
        one_dev, one_test = (on[:, i] | on[:, j] for on in (on_dev, on_test))
        both_dev, both_test = ((on[:, i] & on[:, j])[one]
                               for on, one in ((on_dev, one_dev), (on_test, one_test)))
        if min(both_dev.sum(), both_test.sum()) < 3:
            rows.append((np.nan, np.nan))
            continue
        chosen = aurocs(dev[one_dev], both_dev).argmax()
        least = np.minimum(test[one_test, best[i]], test[one_test, best[j]])
        rows.append((roc_auc_score(both_test, test[one_test, chosen]),
                     roc_auc_score(both_test, least)))

    rows, scores = np.array(rows), {}
    for name, part in (("seen", truth.wired.seen), ("unseen", ~truth.wired.seen)):
        if np.isnan(rows[part, 0]).all():
            raise RunnerError("too few synthetic tokens: no pair is there often enough.")
        scores[f"auroc_{name}"], scores[f"minimum_{name}"] = np.nanmean(rows[part], 0)
    return scores


def aurocs(values, positive):
    """Returns the AUROC of each column of non-negative values [n, d] for positive [n] bool. A
    column that fires on less than a fifth of the positives, for which it is at most .6, counts as
    .5."""
    scores, n = np.full(values.shape[1], 0.5), positive.sum()
    often = np.flatnonzero((values[positive] > 0).mean(0) >= 0.2)
    ranks = rankdata(values[:, often], axis=0)[positive].sum(0)
    scores[often] = (ranks - n * (n + 1) / 2) / (n * (len(positive) - n))
    return scores


def recovery_baselines(truth, store, task):
    """Returns the recovery_scores of PCA (the k largest signed components of a token), of NMF of
    [x+, x-] with as many components as there are true features (the k largest), and of a random
    dictionary as TopK reads it; kept in the cache."""
    key = code_key(make_synthetic, compute_recovery_baselines, task, truth.rho,
                   len(truth.amounts), CONTEXT_LENGTH)
    path = store.folder / f"{key}.json"
    return cached_json(path, lambda: compute_recovery_baselines(truth))


def compute_recovery_baselines(truth, seed=0):
    """Returns {baseline: recovery_scores} for recovery_baselines."""
    width, k = SYNTHETIC_SAE
    training, *parts = (truth.flat_x()[part] for part in truth.parts())
    pca = PCA(DIMENSIONS, random_state=seed).fit(training)
    nmf = MiniBatchNMF(PRIMITIVES + COMPOSED, init="nndsvda", batch_size=1024, max_iter=20,
                       random_state=seed)
    nmf.fit(signed_parts(training[:8192]))
    random = normalize(np.random.default_rng((seed, 1)).standard_normal((width, DIMENSIONS)))

    halves = nmf.components_[:, :DIMENSIONS], nmf.components_[:, DIMENSIONS:]
    codes = {"pca": (lambda x: signed_parts(pca.transform(x)),
                     np.concatenate([pca.components_, -pca.components_])),
             "nmf": (lambda x: nmf.transform(signed_parts(x)), halves[0] - halves[1]),
             "random": (lambda x: np.maximum((x - training.mean(0)) @ random.T, 0), random)}
    scores = {}
    for name, (code, dictionary) in codes.items():
        dev, test = (keep_largest(code(part), k) for part in parts)
        scores[name] = recovery_scores(truth, dev, test, dictionary)
    return scores


def keep_largest(values, k):
    """Returns values [n, d] >= 0 with all but the k largest of each row set to 0."""
    least = np.partition(values, -k, axis=1)[:, -k, None]
    return np.where(values >= least, values, 0.0)


def signed_parts(values):
    """Returns the positive and the negative parts of values [n, d]: [n, 2 d] >= 0."""
    return np.concatenate([np.maximum(values, 0), np.maximum(-values, 0)], 1)
# endregion


# region Evaluation: dwell
def eval_dwell(run):
    """How well an SAE of this variant, trained on sequences of planted states that last 1, 4, 16 or
    64 tokens, finds their directions, when they are on and where slow ones change. What lasts
    longer is weaker, so that one token does not show it."""
    tokens = 2 ** 13 if run.tiny else 2 * SYNTHETIC_TOKENS
    truth = make_sequences(CONTEXT_LENGTH, tokens)
    sae, dev, test, fidelity = trained_on(run, synthetic_store(truth), DWELL_SAE)
    scores = dwell_scores(truth, dev, test, jsonable(sae.directions())) | fidelity
    random = normalize(np.random.default_rng(run.seed).standard_normal(sae.W_dec.shape))
    null = dwell_scores(truth, dev, np.roll(test, len(test) // 2, 0), random)
    return Result({f"dwell_{name}": value for name, value in scores.items()},
                  {"dwell": {"sae": scores, "null": null}}, {})


def dwell_scores(truth, dev, test, dictionary):
    """Returns, of latents [token, d_sae] >= 0 on truth's DEV and TEST and a dictionary [d_sae,
    DIMENSIONS], by dwell the mean cosine with the states' directions under the best assignment
    (Hungarian) and the mean AUROC, on TEST, of the latent that is best on DEV for each state; and
    `boundary`, the AUROC of a linear probe, fitted on DEV, that tells from the change of the
    latents over BOUNDARY_TOKENS whether a state of the two longest dwells began within them. The
    null has a random dictionary, and TEST latents of other sequences."""
    cosine = truth.directions @ normalize(dictionary).T
    rows, columns = linear_sum_assignment(-cosine)
    heldout = slice(truth.windows.n_train, None)
    on_dev, on_test = np.split(truth.on[heldout].reshape(-1, len(cosine)), 2)
    auroc = np.full(len(cosine), 0.5)
    for state in range(len(cosine)):
        best = aurocs(dev, on_dev[:, state]).argmax()
        auroc[state] = roc_auc_score(on_test[:, state], test[:, best])
    scores = {}
    for dwell in np.unique(truth.dwells):
        of_dwell = truth.dwells == dwell
        scores |= {f"{dwell}_cosine": cosine[rows, columns][of_dwell[rows]].mean(),
                   f"{dwell}_auroc": auroc[of_dwell].mean()}
    return scores | {"boundary": boundary_auroc(truth, dev, test)}


def boundary_auroc(truth, dev, test):
    """Returns the `boundary` of dwell_scores."""
    slow = truth.dwells >= np.unique(truth.dwells)[-2]
    begins = truth.begins[truth.windows.n_train:][..., slow].any(-1)  # [window, seq]
    recent = np.lib.stride_tricks.sliding_window_view(begins, BOUNDARY_TOKENS, 1).any(-1)[:, 1:]
    labels, seq = np.split(recent, 2), begins.shape[1]
    changes = []
    for latents in (dev, test):
        z = latents.reshape(-1, seq, latents.shape[1])
        change = np.abs(z[:, BOUNDARY_TOKENS:] - z[:, :-BOUNDARY_TOKENS])
        changes.append(csr_array(change.reshape(-1, latents.shape[1])))
    probe = LogisticRegression(C=0.1, max_iter=200).fit(changes[0], labels[0].ravel())
    return roc_auc_score(labels[1].ravel(), probe.decision_function(changes[1]))
# endregion


# region Evaluation: detection
# Automatic: on which of five excerpts does a latent fire? Answered by a profile of the tokens on
# which it fires most strongly in other files. People answer the same questions on the page.
@torch.no_grad()
def eval_detection(run):
    """The share of detection tasks, pooled over latents, that the latents' own profiles solve; the
    same where all excerpts hold the token on which it fired; and a null, by profiles of random
    places. Chance is .2."""
    right, metrics = np.concatenate([part.right for part in run.detections]), {}
    for name, values in zip(("detection", "detection_same_token", "detection_null"), right.T):
        if not np.isnan(values).all():
            metrics[name] = np.nanmean(values)
    return Result(metrics, {}, {})


class Detection(NamedTuple):
    """Detection tasks of one latent."""
    task_files: np.ndarray  # used for the tasks alone: the page shows nothing else of them
    question: list | None  # starts of the excerpts of the first task: the right one first
    order: np.ndarray  # [options] in which the page shows them
    right: np.ndarray  # [task, 3] solved by its own profile; the same with all options holding the
    #                    same token; by a random profile. In [0, 1], NaN if there was no such task

    @property
    def tasks(self):
        """The number of tasks."""
        return len(self.right)

    @property
    def solved(self):
        """How many were solved, in each of the three ways: [3]."""
        return np.nansum(self.right, 0)


def random_latents(run):
    """Returns random live latents, drawn before any look: those that detection is measured on and
    that people rate."""
    live = run.live.ids
    n = min(4 if run.tiny else DETECTED_LATENTS, len(live))
    return np.sort(np.random.default_rng(0).choice(live, n, replace=False))


def page_latents(run, temporal):
    """Returns {latent: why features.html shows it, see PageLatent} in order: the random ones, and
    those that the curves `temporal` of that evaluation name (none where it was not run)."""
    named = {"random": random_latents(run).tolist()}
    for why, curve in (("evolution", "evolution"), ("stable", "most_stable")):
        named[why] = temporal.get(curve, {"latents": []})["latents"]
    latents = sorted(set().union(*named.values()))
    return {latent: [why for why, ids in named.items() if latent in ids] for latent in latents}


def detections(run):
    """Returns the Detection of each of random_latents."""
    windows, latents = run.store.windows, random_latents(run)
    excerpts, contexts = Passages(windows, DETECTION_TOKENS), token_contexts(windows)
    return [detection_of(excerpts, contexts, at, values, np.random.default_rng([0, int(latent)]))
            for latent, (at, values) in zip(latents, firings(run.encoded.codes, latents))]


def token_contexts(windows):
    """Returns the token at each held-out place and those just before it, the first one repeated:
    [PROFILE_REACH, window * seq]."""
    tokens = windows.tokens[windows.heldout()]
    positions = np.arange(1, tokens.shape[1])
    back = np.maximum(positions - np.arange(PROFILE_REACH)[:, None], 0)
    return tokens[:, back].swapaxes(0, 1).reshape(PROFILE_REACH, -1)


def detection_of(excerpts, contexts, at, values, rng):
    """Returns the Detection of a latent that fires at places `at` [n] with `values` [n]."""
    active = np.zeros(contexts.shape[1], dtype=np.float32)
    active[at] = values
    files = rng.permutation(np.unique(excerpts.file(at)))
    task_files = files[:min(DETECTION_TASKS, len(files) // 4)]
    tasks = [detection_task(excerpts, at, active, file, rng) for file in task_files]

    known = excerpts.places[~np.isin(excerpts.file(excerpts.places), task_files)]
    quiet = rng.permutation(known[active[known] == 0])[:4 * PROFILE_FIRINGS]
    drawn = rng.permutation(known)[:5 * PROFILE_FIRINGS]
    fired = at[~np.isin(excerpts.file(at), task_files)]
    strongest = fired[np.argsort(-active[fired], kind="stable")][:PROFILE_FIRINGS]
    own_profile = profile(contexts, strongest, quiet)
    random_profile = profile(contexts, drawn[::5], np.delete(drawn, np.s_[::5]))

    right = [[guess(excerpts, contexts, weights, options) if options else np.nan
              for weights, options in ((own_profile, anywhere), (own_profile, same_token),
                                       (random_profile, anywhere))]
             for anywhere, same_token in tasks]
    question = next((options for options, _ in tasks if options), None)
    return Detection(task_files, question, rng.permutation(DETECTION_OPTIONS),
                     np.array(right).reshape(-1, 3))


def detection_task(excerpts, at, active, file, rng):
    """Returns two tasks, each the starts of DETECTION_OPTIONS excerpts, or None where there are too
    few: first an excerpt of `file` in which the latent fires, at one of places `at`, then excerpts
    of other files in which it does not; in the second task these hold the token on which it fired.
    active: its value at each place."""
    place = rng.choice(at[excerpts.file(at) == file])
    lead_range = excerpts.size // 2, excerpts.size
    begin = int(excerpts.start(place, rng.integers(*lead_range)))
    same = excerpts.places[excerpts.flat[excerpts.places] == excerpts.flat[place]]
    pools = excerpts.starts, excerpts.start(same, rng.integers(*lead_range, len(same)))

    fired, tasks = np.concatenate([[0], np.cumsum(active > 0)]), []
    for starts in pools:
        quiet = fired[excerpts.stop(starts)] == fired[starts]
        starts = rng.permutation(starts[quiet & (excerpts.file(starts) != file)])[:256]
        first = np.unique(starts // excerpts.seq, return_index=True)[1]  # of different windows
        others = starts[np.sort(first)][:DETECTION_OPTIONS - 1]
        enough = len(others) == DETECTION_OPTIONS - 1
        tasks.append([begin, *map(int, others)] if enough else None)
    return tasks


def profile(contexts, places, others):
    """Returns the weights [PROFILE_REACH, vocabulary] of the token at a place, and of those before
    it, in a logistic regression that discriminates `places` from `others`."""
    used, size = np.concatenate([places, others]), int(contexts.max()) + 1
    columns = contexts[:, used] + size * np.arange(PROFILE_REACH)[:, None]
    columns = columns.T.ravel().astype(np.int32)
    ends = np.arange(0, len(columns) + 1, PROFILE_REACH, dtype=np.int32)
    rows = csr_array((np.ones(len(columns)), columns, ends), (len(used), size * PROFILE_REACH))
    model = LogisticRegression(solver="liblinear", class_weight="balanced")
    return model.fit(rows, np.arange(len(used)) < len(places)).coef_.reshape(PROFILE_REACH, size)


def guess(excerpts, contexts, weights, options):
    """Returns 1 where the first of the excerpts that begin at `options` holds the place with the
    highest sum of weights, ties shared."""
    parts = (contexts[:, start:excerpts.stop(start)] for start in options)
    best = np.array([np.take_along_axis(weights, part, 1).sum(0).max() for part in parts])
    return (best[0] == best.max()) / (best == best.max()).sum()
# endregion


# region Results
class Evaluation(NamedTuple):
    """A line of EVALUATIONS."""
    function: Callable  # Run -> Result
    headlines: tuple = ()  # metrics whose means final_info.json has under "means", which
    #                        AI-Scientist puts into its agents' prompts: keep them few. Each must
    #                        exist in the preflight already
    needs: str = "encode"  # the method that a variant must have


# EVALS picks; a new metric goes into the Result of one of these.
EVALUATIONS = {
    "core": Evaluation(eval_core, (
        "avg_inference_tokens_per_second", "explained_variance", "l0", "dead_fraction",
        "loss_increase_nats", "ce_recovered_vs_unigram")),
    "temporal": Evaluation(eval_temporal, ("slow_explained_variance", "smoothness")),
    "probes": Evaluation(eval_probes, ("probe_token_type", "probe_context")),
    "detection": Evaluation(eval_detection),
    "unlearning": Evaluation(eval_unlearning, ("auroc_hybrid",)),
    "sparse_probing": Evaluation(eval_sparse_probing, ("sae_top_1",)),
    "recovery": Evaluation(eval_recovery),
    "dwell": Evaluation(eval_dwell),
    "composition": Evaluation(eval_composition, needs="compose"),
    "hierarchy": Evaluation(eval_hierarchy, ("causal_specificity",), needs="levels")}
TRAINING_HEADLINES = ("final_train_loss", "best_val_loss", "total_train_time")
# Its windows have no labels, and in short windows there are no far lags
NOT_IN_PREFLIGHT = {"probe_token_type", "slow_explained_variance"}


def evaluate(run, train_seconds, times):
    """Returns {"training": ..., evaluation: ..., "page": ...} of one seed; each but the page is a
    dict of metrics, curves and per_sequence. times: the KnownTimes of evaluations."""
    run.sae.eval()
    results = {"training": training_result(run.log, train_seconds)}
    steps = evaluation_steps(run.store, run.sae.d_sae)
    for i, name in enumerate(EVALS):
        with run_stage(name), times.measured(f"evaluation {i + 1} of {len(EVALS)}: {name}",
                                             steps[i]):
            results[name] = run_evaluation(EVALUATIONS[name].function, run)
    temporal = results.get("temporal", {"curves": {}})["curves"]
    return results | {"page": page_of_latents(run, temporal)}


def evaluation_steps(store, d_sae):
    """Returns the names of EVALS in KnownTimes, with what decides how long they take."""
    size = f"{d_sae} latents, {len(store.windows.heldout())} windows of {CONTEXT_LENGTH}, {DEVICE}"
    return [f"{name}: {SAE_VARIANT}, {size}" for name in EVALS]


def run_evaluation(evaluation, run):
    """Returns an evaluation's Result as a dict of plain values. Raises RunnerError where it changes
    the SAE or returns something else."""
    WATCHDOG.renew()
    before = copy.deepcopy(run.sae.state_dict())
    result, after = evaluation(run), run.sae.state_dict()
    changed = [name for name, value in before.items() if not torch.equal(value, after[name])]
    if changed or run.sae.training:
        what = f"changes {changed} of the SAE" if changed else "leaves the SAE in training mode"
        raise RunnerError(f"{evaluation.__name__} {what}: it must work on copy.deepcopy(run.sae).")
    if not isinstance(result, Result):
        raise RunnerError(f"{evaluation.__name__} returns a {type(result).__name__}, wanted "
                          "Result(metrics, curves, per_sequence).")
    metrics = {key: finite_number(value, f"metric {key!r} of {evaluation.__name__}")
               for key, value in result.metrics.items()}
    return {"metrics": metrics, "curves": jsonable(result.curves),
            "per_sequence": jsonable(result.per_sequence)}


def training_result(log, train_seconds):
    """Returns the AI-Scientist templates' training figures, and the training log."""
    _, losses = logged_values(log, "losses", "reconstruction")
    # in earlier stages the SAE may be another one, as that of a curriculum with a larger k is
    of_last_stage = [loss for step, loss in zip(log["val_step"], log["val_loss"])
                     if step > log["stage_starts"][-1]]
    metrics = {"final_train_loss": np.mean(losses[-5:]),
               "best_val_loss": min(of_last_stage or log["val_loss"][-1:]),
               "total_train_time": train_seconds}
    metrics = {name: finite_number(value, f"metric {name!r}") for name, value in metrics.items()}
    return {"metrics": metrics, "curves": {"training": log}, "per_sequence": {}}


@torch.no_grad()
def page_of_latents(run, temporal):
    """Returns what features.html shows of page_latents. temporal: the curves of that evaluation, {}
    where it was not run."""
    why = page_latents(run, temporal)
    latents = np.array(list(why))
    detected = dict(zip(random_latents(run).tolist(), run.detections))
    similar = nearest_directions(run.sae.directions(), latents)
    measured = temporal.get("most_stable")  # where it is, windows are long enough for stability
    stability = stability_of(run, latents) if measured else [None] * len(latents)

    parts = zip(latents.tolist(), why.values(), added_logits(run, latents),
                related_latents(run, latents), similar, stability)
    shown = [PageLatent(*part, detected.get(part[0])) for part in parts]
    return latents_page(run.store.windows, load_tokenizer(), shown, run.encoded.codes,
                        run.live.mask, DETECTION_TOKENS)


def added_logits(run, latents):
    """Returns the logits that each latent's direction alone gives after the last norm, beyond those
    of no direction: [latent, vocabulary]."""
    model = run.get_model()
    rows = F.pad(run.sae.directions()[latents], (0, 0, 0, 1))[:, None]  # the last is 0
    tokens = run.store.tokens([0])[:, :1].expand(len(rows), 1)
    logits = logits_from(model, len(find_blocks(model)) - 1, rows, tokens)[:, 0]
    return (logits[:-1] - logits[-1]).cpu().numpy()


def related_latents(run, latents):
    """Returns what the variant says of each latent, on the first held-out windows: see
    SAE.related."""
    batch = run.store.batch(run.store.heldout_chunks(64)[0])
    codes = run.encoded.codes[:, latents].tocsr()[:batch.tokens.numel()]
    fires = torch.from_numpy(codes.toarray() > 0).view(*batch.tokens.shape, -1).to(batch.x)
    return run.sae.related(latents, batch, fires)


# --- export of the SAE ---
PLAIN_WEIGHTS = {"W_enc", "b_enc", "W_dec", "b_dec"}
SAELENS = {  # the architectures that SAELens knows, and the weights of each
    "standard": PLAIN_WEIGHTS, "topk": PLAIN_WEIGHTS, "jumprelu": PLAIN_WEIGHTS | {"threshold"},
    "gated": {"W_enc", "W_dec", "b_dec", "b_gate", "r_mag", "b_mag"}}
SAELENS_OTHERS = {  # and those whose equations are none of ours
    "abstopk", "matching_pursuit", "temporal", "transcoder", "skip_transcoder",
    "jumprelu_transcoder", "jumprelu_skip_transcoder"}


def saelens_latents(weights, architecture, k, x):
    """Returns what SAELens would make of x [..., d_in] with a run's weights: [..., d_sae]."""
    pre = (x - weights["b_dec"]) @ weights["W_enc"]
    if architecture == "gated":
        gate = pre + weights["b_gate"] > 0
        return torch.relu(weights["r_mag"].exp() * pre + weights["b_mag"]) * gate
    pre = pre + weights["b_enc"]
    if architecture == "topk":
        values, ids = pre.topk(k)
        return torch.zeros_like(pre).scatter(-1, ids, torch.relu(values))
    return torch.relu(pre) * (pre > weights.get("threshold", 0.0))


def exported_weights(sae, scaled):
    """Returns the weights {name: tensor} that an SAE exports: its parameters and what it adds, then
    those of `scaled`, without what it drops."""
    added, dropped = sae.exported()
    weights = dict(sae.named_parameters()) | added | scaled
    for name in dropped:
        del weights[name]
    return weights


def export(sae, store, layer, folder):
    """Writes SAELens's two files. The inputs' centring and scaling are folded into W_enc, W_dec and
    b_dec; an architecture that SAELens lacks has input_mean and input_scale written too, for its
    other parameters that read inputs."""
    lower = getattr(sae, "lower", sae)  # what reads and writes x
    prefix = "" if lower is sae else "lower."
    weights = exported_weights(sae, {
        f"{prefix}W_enc": lower.W_enc / store.scale, f"{prefix}W_dec": lower.W_dec * store.scale,
        f"{prefix}b_dec": lower.b_dec * store.scale + store.mean})
    if sae.architecture not in SAELENS:
        weights |= {"input_mean": store.mean, "input_scale": torch.tensor(store.scale)}
    save_sae(folder, weights, sae, {
        "sae_variant": SAE_VARIANT, "model_name": MODEL_NAME, "hook_layer": layer,
        "hook_name": f"blocks.{layer}.hook_resid_post", "dataset_path": DATASET,
        "context_size": CONTEXT_LENGTH, "prepend_bos": True})


def save_trained(folder, sae, store):
    """Writes trained_sae.safetensors, from which load_trained makes the same SAE again, whatever
    its variant: the parameters and buffers as they are, and what brings activations to their
    scale."""
    state = sae.state_dict() | {"input_mean": store.mean, "input_scale": torch.tensor(store.scale)}
    state = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    save_file(state, folder / "trained_sae.safetensors")


def load_trained(folder, d_in, steps_done):
    """Returns the SAE of a run's folder in evaluation mode, and the mean [d_in] and scale of its
    inputs. d_in and steps_done are those of the run's config."""
    state = load_file(folder / "trained_sae.safetensors", device=DEVICE)
    mean, scale = state.pop("input_mean"), state.pop("input_scale").item()
    sae = make_sae(d_in, round(EXPANSION * d_in), 0)
    for stage, n_steps in zip(planned_stages(type(sae)), steps_done):
        anneal(sae, stage, (n_steps - 1) / n_steps)
    sae.load_state_dict(state)
    return sae.eval().requires_grad_(False), mean, scale


def save_sae(folder, weights, sae, metadata):
    """Writes sae_weights.safetensors and cfg.json of weights {name: tensor} that read the model's
    own activations. Raises RunnerError where the architecture promises another SAE of SAELens's."""
    architecture = sae.architecture
    if architecture in SAELENS_OTHERS:
        raise RunnerError(f"architecture = {architecture!r} is another SAE of SAELens's: give the "
                          "class a name of its own.")
    known = SAELENS.get(architecture)
    if known and (others := sorted(set(weights) ^ known)):
        raise RunnerError(f"architecture = {architecture!r} is SAELens's, which knows "
                          f"{sorted(known)}; {others} differ. Give the class an `architecture` of "
                          "its own.")

    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().float().cpu().contiguous() for name, value in weights.items()}
    cfg = {"architecture": architecture, "d_in": sae.d_in, "d_sae": sae.d_sae, "dtype": "float32",
           "device": "cpu", "apply_b_dec_to_input": True, "normalize_activations": "none",
           "reshape_activations": "none",
           "metadata": metadata | {"sae_lens_version": "6.54.12"}}  # the layout's; SAELens needs it
    if architecture == "topk":
        cfg |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    save_file(weights, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(cfg, indent=1), encoding="utf-8")


# --- final_info.json and what is beside it ---
class SeedResult(NamedTuple):
    """One seed's SAE and results."""
    sae: SAE
    results: dict  # as `evaluate` returns
    planned: list  # steps of each stage that the curriculum asks for
    done: list  # steps of each stage that were done


def recorded_config(seeds, store, layer):
    """Returns the UPPER_CASE constants, the data's figures, versions, a key of the code that
    decides the numbers, and whether all steps were done."""
    windows, first = store.windows, seeds[0]
    plain = {name: value for name, value in globals().items() if name.isupper() and name != "SOURCE"
             and isinstance(value, str | int | float | tuple | None)}
    return plain | {
        "steps_planned": first.planned, "steps_done": first.done,
        "budget_hit": any(seed.planned != seed.done for seed in seeds),
        "evaluation_files": len(windows.sample()),
        "data_hash": fingerprint(zlib.crc32(windows.tokens.tobytes())),
        "first_token": int(windows.tokens[0, 0]),
        "code": code_key(open_store, train, evaluate, type(first.sae)),
        "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__,
        "layer": layer, "d_in": store.d_in, "d_sae": first.sae.d_sae}


def write_results(folder, seeds, store, layer, timing):
    """Writes all files of a run from a SeedResult for each of SEEDS; returns final_info.json's
    content."""
    texts, per_seed = {}, []
    for seed, part in zip(SEEDS, seeds):
        prefix = "" if seed == SEEDS[0] else f"seed_{seed}/"
        export(part.sae, store, layer, folder / prefix)
        save_trained(folder / prefix, part.sae, store)
        texts[f"{prefix}features.json"] = json.dumps(part.results["page"], separators=(",", ":"))
        per_seed.append({name: part.results[name] for name in ("training", *EVALS)})

    headlines = {"training": TRAINING_HEADLINES} | {
        name: EVALUATIONS[name].headlines for name in EVALS}
    info = summarise_seeds(per_seed, headlines)
    info["training"]["config"] = recorded_config(seeds, store, layer)
    if "hierarchy" in EVALS:
        texts["case_studies.md"] = case_studies(per_seed[0]["hierarchy"]["curves"].get("tree", []))
    texts |= {"timing.json": json.dumps(timing, indent=1), "summary.md": summary_text(info) + "\n"}
    by_seed = {f"seed_{seed}": results for seed, results in zip(SEEDS, per_seed)}
    write_result_files(folder, info, by_seed, texts, SOURCE)
    return info


SUMMARY = [  # sentences of summary.md; those with a number that a run lacks are left out
    "It explains {explained_variance} of the variance of held-out activations with {l0} active "
    "latents per token; a lookup table of token pairs explains {bigram_explained_variance}.",
    "With the reconstruction in place of the activations the model's next-token loss rises by "
    "{loss_increase_nats} nats from {ce_model}; word frequencies alone give {ce_unigram}.",
    "{dead_fraction} of the latents never fire, and {single_token_fraction} of the live ones fire "
    "on one token only.",
    "Latents whose values last explain {slow_explained_variance} of the variance 17 to 32 tokens "
    "later; {slow_explained_variance_null} is chance, and a regression on the activations "
    "themselves gives {slow_ceiling_x}.",
    "Live latents that fire do so again 5 to 16 tokens later with an excess correlation of "
    "{stability}; tokens alone give {stability_token}, and {stability_null_95} is chance.",
    "Linear probes on the latents predict where in its text a token is with a balanced accuracy of "
    "{probe_context}; the token alone gives {probe_context_token}, the last eight tokens "
    "{probe_context_bag}.",
    "A profile of a latent's strongest contexts finds the passage on which it fires among five in "
    "{detection} of the cases; chance is 0.2, and latents of an untrained SAE on a model with "
    "random weights reach {detection_reinitialised}."]


def summary_text(info):
    """Returns a paragraph on a run from final_info.json's content: what was trained on what, and
    the numbers beside their controls."""
    config, values = info["training"]["config"], {}
    for entry in info.values():
        errors = entry.get("metric_stderrs", {})
        values |= {name: f"{round(value, 4):.4g}" + f" ± {errors.get(name, 0):.2g}" * bool(
            errors.get(name)) for name, value in entry["metrics"].items()}
    sentences = [text for text in SUMMARY if set(placeholders(text)) <= set(values)]
    said = {name for text in sentences for name in placeholders(text)}
    headlines = [key.removesuffix("_mean") for entry in info.values() for key in entry["means"]]
    rest = [f"{name} {values[name]}" for name in headlines if name not in said]
    return " ".join([training_text(config), *sentences, "Also: " + ", ".join(rest) + "."]
                    ).format_map(values)


def placeholders(text):
    """Returns the names in braces in a text."""
    return [name for _, name, _, _ in Formatter().parse(text) if name]


def training_text(config):
    """Returns a sentence on what was trained on what."""
    off = f" without {' and '.join(config['ABLATE'])}" if config["ABLATE"] else ""
    planned, done = sum(config["steps_planned"]), sum(config["steps_done"])
    cut = f" (of {planned:,} planned: the time budget ended)" if config["budget_hit"] else ""
    several = len(config["SEEDS"]) > 1
    return (f"`{config['SAE_VARIANT']}`{off}, {config['d_sae']:,} latents with TARGET_L0 = "
            f"{config['TARGET_L0']}, was trained on the activations of {config['MODEL_NAME']} "
            f"after block {config['layer']}: {done:,} steps{cut} over {config['TRAIN_TOKENS']:,} "
            f"tokens of {config['DATASET']}, {'seeds' if several else 'seed'} "
            f"{', '.join(map(str, config['SEEDS']))}. All numbers are of "
            f"{config['evaluation_files']} held-out files"
            f"{', means with their standard errors over the seeds' * several}.")
# endregion


# region Checks
def check_config():
    """Raises RunnerError that names the first constant with a bad value, and the good ones.
    Constants that are not here need no rule."""
    rules = SettingRules(globals())
    rules.choice(SAE_VARIANT=" ".join(SAE_VARIANTS), ATTENTION="causal centred", DRIVE="u z",
                 TSAE_READING="paper code", TRAIN_ON="both forget retain",
                 SELECTION="ratio frequency", BUFFER_POSITIONS="learned sinusoidal",
                 MATCHER="logistic attention", LEVEL_SPARSITY="topk l1")
    rules.whole("TRAIN_TOKENS TARGET_L0 WINDOW CONTRAST_SPAN HEADS HEAD_WIDTH BUFFER CLAMPED "
                "MATCHED MATCHER_WINDOW COMPOSITION_HEADS COMPOSITION_HEAD_WIDTH PREDICTED "
                "LIVE_MIN_FIRINGS LIVE_MIN_FILES BOUNDARY_TOKENS")
    rules.whole("CONTEXT_LENGTH", 8)
    rules.whole("EVAL_FILES", max(2, LIVE_MIN_FILES))
    rules.whole("LAYER", 0, [None])
    rules.positive("EXPANSION TIME_BUDGET_MINUTES EPOCHS_SCALE REGULARISATION CONSISTENCY_WEIGHT "
                   "CONTRAST_WEIGHT PREDICTION_WEIGHT SLOW_PRIOR LEVEL1_L0_RATIO COSINE_WEIGHT "
                   "GROUP_WEIGHT")
    rules.positive("CONSISTENT_FRACTION COMPOSITION_SLOTS", 1)
    rules.positive("COMPOSITIONS SLOW_LATENTS SLOW_PLACES", 0.9)
    rules.positive("SLOW_DECAY", 0.9999)
    rules.positive("LEARNING_RATE", others=[None])
    rules.positive("TEMPERATURE", others=["learned", "scheduled"])
    rules.text("MODEL_NAME DATASET FORGET")
    rules.text("FORGET_QUESTIONS RETAIN_QUESTIONS", [None])
    rules.span("TRAIN_POSITIONS", CONTEXT_LENGTH)
    rules.check("LEVEL_WIDTHS", "(level 1, level 2), falling to TARGET_L0 at least", lambda v: type(
        v) is tuple and [type(x) for x in v] == [int, int] and v[0] >= v[1] >= TARGET_L0, [None])
    rules.check("STABILITY_LAGS FAR_LAGS PROBING_SIZE SYNTHETIC_SAE DWELL_SAE",
                "two whole numbers from 1", lambda v: type(v) is tuple and len(v) == 2
                and all(type(x) is int and x > 0 for x in v))
    rules.several("SYNTHETIC_TASKS", TASKS)
    rules.several("SEEDS", range(2 ** 31))
    check_tables(rules)
    if {"composition", "hierarchy"} & set(EVALS):  # they compare latents of one token
        rules.whole("TARGET_L0", 2)


def check_sizes(config):
    """Raises RunnerError where CONTEXT_LENGTH, BATCH_TOKENS, EXPANSION and TARGET_L0 do not go
    together on a model of this configuration."""
    SettingRules(globals()).whole("BATCH_TOKENS", CONTEXT_LENGTH)
    if TARGET_L0 > (width := round(EXPANSION * config.hidden_size)):
        raise RunnerError(f"TARGET_L0 = {TARGET_L0}: there are {width} latents, EXPANSION = "
                          f"{EXPANSION} times {config.hidden_size} channels. Lower it, or raise "
                          "EXPANSION.")


def check_data(windows):
    """Raises RunnerError where the data lack what one of EVALS needs."""
    if "temporal" in EVALS:
        windows.full()
    if "sparse_probing" in EVALS:
        for dataset in PROBING:
            probing_texts(dataset)
    if "unlearning" in EVALS:
        unlearning_plan(windows, FORGET, load_tokenizer()).full(windows)
        for dataset in filter(None, (FORGET_QUESTIONS, RETAIN_QUESTIONS)):
            next(iter(encoded_questions(dataset, load_tokenizer())))


def check_tables(rules):
    """Raises RunnerError where the variant's curriculum, EVALUATIONS, EVALS or ABLATE is wrong."""
    variant = SAE_VARIANTS[SAE_VARIANT]
    check_curriculum(variant)
    for name, entry in EVALUATIONS.items():
        if not (isinstance(entry, Evaluation) and callable(entry.function)
                and isinstance(entry.headlines, tuple)):
            raise RunnerError(f"EVALUATIONS[{name!r}] is a {type(entry).__name__}, wanted "
                              "Evaluation(function, (names of headline metrics,)), with commas.")
    answered = [name for name, entry in EVALUATIONS.items() if hasattr(variant, entry.needs)]
    rules.several("EVALS", answered, f" for {SAE_VARIANT}")
    parts = set(variant.components).union(*(stage.weights for stage in curriculum_of(variant)))
    rules.several("ABLATE", sorted(parts - {"reconstruction"}), f" for {SAE_VARIANT}", 0)


def check_curriculum(variant):
    """Raises RunnerError where a variant is no class with a tuple of stages that have epochs."""
    if not inspect.isclass(variant):
        raise RunnerError(f"SAE_VARIANTS[{SAE_VARIANT!r}] is a {type(variant).__name__}, wanted a "
                          "class.")
    stages = curriculum_of(variant)
    if not (isinstance(stages, tuple) and all(isinstance(stage, Stage) for stage in stages)):
        raise RunnerError(f"the curriculum of {SAE_VARIANT} must be a tuple of Stage: "
                          "(Stage(...),) with its comma.")
    if none := [stage.name for stage in stages if not stage.epochs > 0]:
        raise RunnerError(f"the stages {none} of {SAE_VARIANT} have no epochs: give them some, or "
                          "leave them out.")
    if (epochs := sum(stage.epochs for stage in stages)) != CURRICULUM_EPOCHS:
        print(f"note: the stages of {SAE_VARIANT} add up to {epochs:g} epochs; runs compare at "
              f"{CURRICULUM_EPOCHS} (EPOCHS_SCALE scales all alike)")


def check_variant(sae, store, stages):
    """Raises RunnerError where a weighed loss is missing, a parameter never learns, rows of a batch
    depend on each other, latents look ahead, or padding is not silent."""
    batch, dark = store.batch(np.arange(store.windows.n_train)), dict(sae.named_parameters())
    for stage in stages:
        anneal(sae, stage, 0.0)
        sae.begin_stage(batch)
        losses = check_losses(sae, batch, stage)
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
    check_latents(sae, batch, store.batch([len(z) - 1]))


def check_losses(sae, batch, stage):
    """Returns the losses of a training batch. Raises RunnerError where they depend on anything but
    its tokens, the parameters and the buffers: on what earlier batches left elsewhere, or on x at
    padding; where they change x; or where one that the stage weighs is missing."""
    def losses_of(x):
        sae.load_state_dict(state)
        torch.manual_seed(0)
        given = batch._replace(x=x)
        return sae.train().losses(given, sae.encode(given))

    WATCHDOG.renew()
    state, totals = copy.deepcopy(sae.state_dict()), {}
    inputs = {"first": batch.x, "padded": batch.x + ~batch.mask[..., None],
              "other": 2 * batch.x.flip(0), "again": batch.x}  # other: makes state left behind seen
    for label, x in inputs.items():
        losses = losses_of(given := x.clone())
        if given._version or not torch.equal(x, given):
            losses_of(x.clone().requires_grad_())  # torch refuses, and names the line
            raise RunnerError(f"{SAE_VARIANT} changes batch.x in place, which others read too: "
                              "make a new tensor of it.")
        check_scalars(losses)
        totals[label] = [loss.detach().double() for loss in losses.values()]
    if missing := sorted(set(stage.weights) - set(losses)):
        raise RunnerError(f"stage {stage.name!r} weighs {missing}, but `losses` of {SAE_VARIANT} "
                          f"has {sorted(losses)}.")
    check_parameters(sae, losses.values())

    reasons = {"again": "what earlier batches left, or random numbers that are not torch's. Keep "
                        "state in buffers (self.register_buffer): a resumed run has nothing else",
               "padded": "x at padding: use batch.mask, `zero_padding` or `drop_padding`"}
    for label, why in reasons.items():
        wrong = [key for key, a, b in zip(losses, totals["first"], totals[label])
                 if not torch.allclose(a, b, 1e-3, 1e-6, True)]
        if wrong:
            raise RunnerError(f"{SAE_VARIANT}: the losses {wrong} depend on {why}.")
    return losses


def check_scalars(losses):
    """Raises RunnerError where losses are no dict of scalar tensors."""
    if not isinstance(losses, dict):
        raise RunnerError(f"`losses` of {SAE_VARIANT} is a {type(losses).__name__}, wanted a dict "
                          "{name: scalar}.")
    for key, loss in losses.items():
        is_tensor = isinstance(loss, torch.Tensor)
        if not is_tensor or loss.shape:
            what = f"of shape {(*loss.shape,)}" if is_tensor else f"a {type(loss).__name__}"
            raise RunnerError(f"the loss {key!r} of {SAE_VARIANT} is {what}, wanted a scalar "
                              "tensor.")


def check_parameters(sae, losses):
    """Raises RunnerError where losses would teach a tensor that is no parameter of the SAE."""
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
            raise RunnerError(
                f"{SAE_VARIANT} uses a tensor of shape {(*leaf.shape,)} that asks for a gradient, "
                "but that nothing trains or saves: make it an nn.Parameter and an attribute of the "
                "SAE, or several an nn.ParameterList or nn.ModuleList; a plain list hides them.")


def check_latents(sae, batch, alone):
    """Raises RunnerError where, in evaluation and with every parameter moved, the batch's last row
    has other latents than in the batch `alone` of it, a causal variant looks ahead, padding fires,
    or an `architecture` of SAELens's gives other latents there."""
    def differ(some, others):  # a tie that rounding breaks may move a token or two
        return ((some - others).abs() > 1e-4 * (1 + others.abs())).any(-1).sum() > 2

    WATCHDOG.renew()
    if not sae.W_dec.any(1).all():
        raise RunnerError(f"{SAE_VARIANT}: W_dec has rows of zeros, which no step can bring to "
                          "unit norm. Begin with random ones.")
    with torch.no_grad():
        for p in sae.eval().parameters():  # at first a gate may be shut
            p += 0.1 * torch.randn_like(p)
        z = sae.encode(batch).dense()
        if differ(sae.encode(alone).dense()[0], z[-1]):
            raise RunnerError(f"{SAE_VARIANT}: the rows of a batch are different documents; one "
                              "changes another's latents.")
        half = batch.x.shape[1] // 2
        later = batch._replace(x=torch.cat([batch.x[:, :half], batch.x[:, half:] + 1], 1))
        if sae.causal and differ(sae.encode(later).dense()[:, :half], z[:, :half]):
            raise RunnerError(f"{SAE_VARIANT}: later positions of a window change the latents of "
                              "earlier ones. Look back only, or set causal = False in the class.")
        if z[~batch.mask].any():
            raise RunnerError(f"{SAE_VARIANT} has latents that fire on padding.")
        weights = exported_weights(sae, {"W_enc": sae.W_enc})
        if set(weights) == SAELENS.get(sae.architecture):  # save_sae names other weights
            theirs = saelens_latents(weights, sae.architecture, sae.k, batch.x)
            if differ(theirs[batch.mask], z[batch.mask]):
                raise RunnerError(
                    f"architecture = {sae.architecture!r} of {SAE_VARIANT} promises SAELens's "
                    "equation, whose latents differ from encode's. Give the class an "
                    "`architecture` of its own.")


def check_metrics(results):
    """Raises RunnerError where two evaluations of the preflight have a metric of one name, or one
    lacks a headline that EVALUATIONS names."""
    owners = {}
    for name in EVALS:
        metrics = results[name]["metrics"]
        if shared := sorted(owners.keys() & metrics.keys()):
            raise RunnerError(f"the evaluations {owners[shared[0]]!r} and {name!r} both have the "
                              f"metrics {shared}: give them different names.")
        owners |= dict.fromkeys(metrics, name)
        wanted = set(EVALUATIONS[name].headlines) - NOT_IN_PREFLIGHT
        if lacking := wanted - set(metrics):
            raise RunnerError(f"EVALUATIONS has {sorted(lacking)} among the headlines of {name!r}, "
                              "whose Result has no such metric.")


def preflight(config, cache):
    """Passes the variant through every stage, evaluation and result, on a stand-in for the model
    and tiny data."""
    with tempfile.TemporaryDirectory(prefix="preflight.", dir=cache) as folder:
        folder, d_in, model = Path(folder), config.hidden_size, stand_in(config)
        windows = stand_in_windows(CONTEXT_LENGTH, FORGET)
        store = Store(folder / "activations", windows, d_in, torch.float32)
        store.collect(lambda: model, 0)
        sae = make_sae(d_in, min(round(EXPANSION * d_in), max(1024, 4 * TARGET_L0)), 0)
        stages = [stage._replace(epochs=1) for stage in planned_stages(type(sae))]
        check_variant(copy.deepcopy(sae), store, stages)

        state, deadline = folder / "checkpoint.pt", time.time() + 60
        log, planned, done, _ = train(sae, store, stages, 0, 2, deadline, state)
        run = Run(sae, store, lambda: model, 0, LiveRule(1, 1), log, tiny=True)
        results = evaluate(run, 1.0, KnownTimes(folder / "seconds.json"))
        check_metrics(results)
        write_results(folder, [SeedResult(sae, results, planned, done)] * len(SEEDS), store, 0, {})
# endregion


# region Main
def make_sae(d_in, d_sae, seed, target_l0=None):
    """Returns an untrained SAE of the variant."""
    torch.manual_seed(seed)
    return SAE_VARIANTS[SAE_VARIANT](d_in, d_sae, target_l0 or TARGET_L0).to(DEVICE)


def run_seed(seed, store, layer, get_model, state, deadline, timing):
    """Returns the SeedResult of one seed (None where another process evaluates); the folder `state`
    keeps what is finished."""
    times = KnownTimes(cache_folder() / "seconds.json")
    with run_stage(f"training, seed {seed}", timing):
        sae = make_sae(store.d_in, round(EXPANSION * store.d_in), seed)
        stages, size = planned_stages(type(sae)), BATCH_TOKENS // CONTEXT_LENGTH
        seconds, all_known = times.of(evaluation_steps(store, sae.d_sae))
        later = Later(seconds * all_known, len(SEEDS) - 1 - SEEDS.index(seed))
        log, planned, done, seconds = train(sae, store, stages, seed, size, deadline,
                                            state / f"seed_{seed}.pt", later)
    if RANKS.rank:
        return None
    with run_stage(f"evaluation, seed {seed}", timing), RANKS.alone():
        rule = LiveRule(LIVE_MIN_FIRINGS, LIVE_MIN_FILES)
        run = Run(sae, store, get_model, layer, rule, log, seed)
        results = cached_json(state / f"seed_{seed}.json", lambda: evaluate(run, seconds, times))
    return SeedResult(sae, results, planned, done)


def open_store(config, layer, cache):
    """Returns the Store of DATASET's activations, collected where they are missing, and a function
    that loads the model."""
    with run_stage("reading the data"):
        wanted = Wanted(CONTEXT_LENGTH, TRAIN_TOKENS, EVAL_FILES, TRAIN_WINDOWS_PER_FILE,
                        EVAL_WINDOWS_PER_FILE, MIN_WINDOW, DATA_SEED,
                        FORGET if "unlearning" in EVALS or TRAIN_ON != "both" else "",
                        max(2, LIVE_MIN_FILES))
        windows, key = load_windows(DATASET, load_tokenizer(), wanted, cache / "tokens")
        check_data(windows)
    with run_stage("collecting activations"):
        name = fingerprint(key, model_identity(MODEL_NAME, config), layer, MODEL_DTYPE,
                           SHARD_WINDOWS, code_key(residual_after))
        if (largest_id := windows.tokens.max()) >= config.vocab_size:
            raise RunnerError(
                f"MODEL_NAME = {MODEL_NAME!r}: its tokenizer gives ids up to {largest_id}, and its "
                f"embedding has {config.vocab_size} rows. They do not belong together, or a token "
                "was added: model.resize_token_embeddings(len(tokenizer)), then save it again.")
        store = Store(cache / "activations" / name, windows, config.hidden_size, MODEL_DTYPE)
        print(memory_plan(config, store), flush=True)
        get_model = functools.cache(load_model)
        store.collect(get_model, layer)
    return store, get_model


def main():
    """Preflight, tokens, activations, training, evaluation, results."""
    parser = argparse.ArgumentParser(description="all else is a constant of this file")
    parser.add_argument("--out_dir", help="folder for the results; without it, the next free of "
                        "run_1, run_2, ... beside this file")
    arguments, others = parser.parse_known_args()
    if others:
        parser.error(f"{' '.join(others)}: there is no such argument. Settings such as "
                     "LEARNING_RATE are constants at the top of this file: edit them there")
    out_dir = Path(arguments.out_dir or next_run(HERE)).resolve()
    began, cache, timing, seeds = time.time(), cache_folder(), {}, []
    with run_stage("checking the settings"):
        check_config()
        make_folder(cache, "set SAE_CACHE_DIR to another folder")
        config, layer = load_config(MODEL_NAME, LAYER, CONTEXT_LENGTH)
        check_sizes(config)

    with atomic_run_folder(out_dir, HERE) as partial:
        with run_stage("preflight"), preflight_sandbox():
            preflight(config, cache)
        print(f"preflight passed after {time.time() - began:.1f} s", flush=True)
        store, get_model = open_store(config, layer, cache)
        timing["seconds_before_training"] = time.time() - began

        code = fingerprint(sources_key(SOURCE), store.folder.name)
        with resumable_state(cache / "runs" / fingerprint(str(out_dir)), code) as state:
            end = began + 60 * TIME_BUDGET_MINUTES
            reserve = 60 * TIME_BUDGET_MINUTES * EVALUATION_RESERVE / len(SEEDS)
            for i, seed in enumerate(SEEDS):
                deadline = time.time() + (end - time.time()) / (len(SEEDS) - i) - reserve
                seeds.append(run_seed(seed, store, layer, get_model, state, deadline, timing))
            if RANKS.rank:
                return
            with run_stage("writing the results"):
                timing["total_seconds"] = time.time() - began
                info = write_results(partial, seeds, store, layer, timing)
    print(f"{out_dir.name} ({readable_time(time.time() - began)}): {summary_text(info)}\n"
          "Then: python plot.py, which draws the figures and writes comparison.md and "
          f"{out_dir.name}/features.html, a page of latents to look at.", flush=True)


if __name__ == "__main__":
    run_script(main, __file__, SAE, SAE_VARIANTS, SAE_VARIANT,
               memory_settings=("BATCH_TOKENS", "EXPANSION", "CONTEXT_LENGTH"))
# endregion
