"""Sparse latents: arithmetic at the active (token, latent) pairs alone, and top-k selection.

A pair p is a token row_p and a latent latent_p at which a latent may be non-zero. Of the dense
products x @ W_enc and z @ W_dec only what the pairs need is computed: [n_pairs] values instead of
[n_tokens, d_sae].
"""
import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F

MASKED_PRE_ACT = -1e9  # the pre-activation at padding: no latent fires there


# ---- Private operations of torch, one wrapper each ----
def pair_dots_on_cpu(a, b, pairs):
    """Returns a[row_p] . b[latent_p] of pairs on the CPU: [n_pairs]; a [n_tokens, d], b [d_sae, d].

    The operation is a part of the derivative of F.embedding_bag: no public one of torch has these
    products at the pairs alone without copying a row of b for each pair.
    """
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        a, b, pairs.ids, pairs.starts, pairs.rows, 0)


def has_bf16_units():
    """Returns whether the CPU has AVX-512 units for bf16, which multiply matrices faster than its
    fp32 ones; torch has no public question for it."""
    return torch.cpu._is_avx512_bf16_supported()


BF16_UNITS = has_bf16_units()


# ---- Pairs ----
def first_places(ids, n):
    """Returns the place at which each of 0 ... n - 1 begins among sorted ids: [n]."""
    counts = ids.new_zeros(n).scatter_add_(0, ids, torch.ones_like(ids))
    return counts.cumsum(0) - counts


def csr(values, ids, starts, width):
    """Returns the sparse matrix [len(starts), width] with `values` in the columns `ids`, its rows
    beginning at `starts`: for CUDA's sparse products, 3x as fast there as embedding_bag."""
    ends = F.pad(starts, (0, 1), value=len(ids)).int()
    return torch.sparse_csr_tensor(ends, ids.int(), values, (len(starts), width))


def weighted_sums(values, ids, starts, table):
    """Returns sum_p values[p] * table[ids[p]] over the p from each start to the next:
    [len(starts), d]."""
    if table.is_cuda:
        return csr(values, ids, starts, len(table)) @ table
    return F.embedding_bag(ids, table, starts, mode="sum", per_sample_weights=values)


class Pairs:
    """The (token, latent) pairs where latents may be non-zero: sorted by token, in any order within
    one. Every token has its place in `starts`, even with no pair."""

    def __init__(self, ids, starts, pre_acts=None):
        self.ids = ids  # [n_pairs] latent of each pair
        self.starts = starts  # [n_tokens] each token's first pair
        self.pre_acts = pre_acts  # [n_pairs], where the selection computed them, or None

    @classmethod
    def from_flat(cls, flat, pre_acts):
        """Returns the Pairs at ascending places `flat` in pre_acts [n_tokens, d_sae] flattened."""
        n, d_sae = pre_acts.shape
        return cls(flat % d_sae, first_places(flat // d_sae, n), pre_acts.flatten()[flat])

    @classmethod
    def from_ids(cls, ids, pre_acts=None):
        """Returns the Pairs of k latents for each token: ids, pre_acts [n_tokens, k]."""
        starts = torch.arange(0, ids.numel(), ids.shape[1], device=ids.device)
        return cls(ids.flatten(), starts, None if pre_acts is None else pre_acts.flatten())

    @functools.cached_property
    def rows(self):
        """The token of each pair: [n_pairs]."""
        counts = F.pad(self.starts, (0, 1), value=len(self.ids)).diff()
        return torch.repeat_interleave(counts, output_size=len(self.ids))

    @functools.cached_property
    def by_latent(self):
        """The order of the pairs by latent, and their tokens in that order: two [n_pairs]."""
        order = self.ids.argsort(stable=True)
        return order, self.rows[order]

    def dots(self, a, b):
        """Returns a[row_p] . b[latent_p]: [n_pairs]; a [n_tokens, d], b [d_sae, d]."""
        if a.is_cuda:
            places = csr(a.new_zeros(len(self.ids)), self.ids, self.starts, len(b))
            return torch.sparse.sampled_addmm(places, a, b.t(), beta=0.0).values()
        return pair_dots_on_cpu(a, b, self)

    def sums(self, values, b):
        """Returns sum_p values[p] * b[latent_p] over each token's pairs: [n_tokens, d]; values
        [n_pairs], b [d_sae, d]."""
        return weighted_sums(values, self.ids, self.starts, b)

    def sums_by_latent(self, values, a, d_sae):
        """Returns sum_p values[p] * a[row_p] over each latent's pairs: [d_sae, d]; values
        [n_pairs], a [n_tokens, d]."""
        (order, rows), starts = self.by_latent, first_places(self.ids, d_sae)
        return weighted_sums(values[order], rows, starts, a)


# ---- Encoder and decoder at the pairs ----
class PairEncode(torch.autograd.Function):
    """values[p] = (x[row_p] - b_dec) . W_enc[:, latent_p] + b_enc[latent_p]

    x [n_tokens, d_in], b_dec [d_in], W_enc [d_in, d_sae], b_enc [d_sae], Pairs -> [n_pairs]. Takes
    the values from pairs.pre_acts where they are there, and removes them.
    """

    @staticmethod
    def forward(ctx, x, b_dec, W_enc, b_enc, pairs):
        centred = x - b_dec
        ctx.save_for_backward(centred, W_enc)
        ctx.pairs = pairs
        values, pairs.pre_acts = pairs.pre_acts, None  # left there, it would close a cycle
        return pairs.dots(centred, W_enc.t()) + b_enc[pairs.ids] if values is None else values

    @staticmethod
    def backward(ctx, grad):
        (centred, W_enc), pairs = ctx.saved_tensors, ctx.pairs
        grad_b_enc = grad.new_zeros(W_enc.shape[1]).index_add_(0, pairs.ids, grad)
        grad_W_enc = pairs.sums_by_latent(grad, centred, W_enc.shape[1]).t()
        grad_x = pairs.sums(grad, W_enc.t()) if ctx.needs_input_grad[0] else None
        return grad_x, -(W_enc @ grad_b_enc), grad_W_enc, grad_b_enc, None


class PairDecode(torch.autograd.Function):
    """x_hat[row] = sum of values[p] * W_dec[latent_p] over the row's pairs

    values [n_pairs], W_dec [d_sae, d_in], Pairs -> [n_tokens, d_in].
    """

    @staticmethod
    def forward(ctx, values, W_dec, pairs):
        ctx.save_for_backward(values, W_dec)
        ctx.pairs = pairs
        return pairs.sums(values, W_dec)

    @staticmethod
    def backward(ctx, grad):
        (values, W_dec), pairs, grad = ctx.saved_tensors, ctx.pairs, grad.contiguous()
        values_learn, W_dec_learns, _ = ctx.needs_input_grad
        grad_values = pairs.dots(grad, W_dec) if values_learn else None
        grad_W_dec = pairs.sums_by_latent(values, grad, len(W_dec)) if W_dec_learns else None
        return grad_values, grad_W_dec, None


class Latents(NamedTuple):
    """Latents z [batch, seq, d_sae] of a batch, at pairs; zero everywhere else."""
    values: torch.Tensor  # [n_pairs] z at each pair
    pre_acts: torch.Tensor  # [n_pairs] before the activation function
    pairs: Pairs  # of the batch's tokens, counted window by window
    shape: tuple  # (batch, seq, d_sae)
    # what the variant's losses or after_step need of this forward pass: level 1's latents, batch
    # statistics, or None
    extra: object = None

    @classmethod
    def from_dense(cls, z):
        """Returns the Latents of z [batch, seq, d_sae], at its non-zero values."""
        flat = z.detach().flatten().nonzero().flatten()
        values = z.flatten().index_select(0, flat)
        return cls(values, values, Pairs.from_flat(flat, z.detach().flatten(0, 1)), (*z.shape,))

    def at(self, per_latent):
        """Returns per_latent [d_sae] at each pair: [n_pairs]."""
        return per_latent.index_select(0, self.pairs.ids)

    def decode(self, W_dec):
        """Returns z @ W_dec: [batch, seq, d_in]; W_dec [d_sae, d_in]."""
        return PairDecode.apply(self.values, W_dec, self.pairs).view(*self.shape[:2], -1)

    def keep(self, chosen):
        """Returns the Latents at the pairs where `chosen` [n_pairs] is True, without `extra`."""
        starts = first_places(self.pairs.rows[chosen], len(self.pairs.starts))
        return Latents(self.values[chosen], self.pre_acts[chosen],
                       Pairs(self.pairs.ids[chosen], starts), self.shape)

    def dense(self):
        """Returns z [batch, seq, d_sae]."""
        n, seq, d_sae = self.shape
        z = self.values.new_zeros(n * seq, d_sae)
        return z.index_put((self.pairs.rows, self.pairs.ids), self.values).view(n, seq, d_sae)

    def active(self):
        """Returns token, latent and value of the non-zero latents, by token: three [n]."""
        part = self.keep(self.values != 0)
        return part.pairs.rows, part.pairs.ids, part.values


def side_by_side(a, b):
    """Returns the Latents [batch, seq, d_a + d_b] of Latents a and b of the same tokens, without
    `extra`; at a token those of a come first."""
    first, second, n = a.pairs, b.pairs, len(a.pairs.ids)
    of_a = torch.arange(n, device=first.ids.device) + second.starts[first.rows]
    of_b = torch.arange(len(second.ids), device=first.ids.device)
    of_b = of_b + F.pad(first.starts, (0, 1), value=n)[1:][second.rows]
    source = torch.empty(n + len(second.ids), dtype=torch.long, device=first.ids.device)
    source[torch.cat([of_a, of_b])] = torch.arange(len(source), device=source.device)

    d_a, (batch, seq, d_b) = a.shape[2], b.shape
    ids = torch.cat([first.ids, second.ids + d_a])[source]
    values, pre_acts = (torch.cat(parts)[source] for parts in (
        (a.values, b.values), (a.pre_acts, b.pre_acts)))
    return Latents(values, pre_acts, Pairs(ids, first.starts + second.starts),
                   (batch, seq, d_a + d_b))


def firings(z, latents):
    """Returns for each of `latents` the tokens on which it fires, ascending, and its values there.

    z: scipy's sparse [n_tokens, d_sae] by column.
    """
    return [(z.indices[a:b], z.data[a:b])
            for a, b in zip(z.indptr[latents], z.indptr[latents + 1])]


# ---- Top-k ----
def largest(values, k):
    """Returns the k largest of each row of values [n, d] and their columns, two [n, k], unsorted.

    They lie in the k groups of columns with the largest maxima, which is 3x as fast on a GPU and
    1.7x on a CPU as topk over all.
    """
    group = 16 if values.is_cuda else 8
    n_groups = values.shape[1] // group
    if values.shape[1] % group or n_groups < 2 * k:
        return values.topk(k, sorted=False)
    groups = values.view(-1, group, n_groups)
    best = largest(groups.amax(1), k)[1]  # [n, k] groups
    members = groups.gather(2, best[:, None].expand(-1, group, -1)).flatten(1)  # [n, group * k]
    top, places = members.topk(k, sorted=False)
    return top, places // k * n_groups + best.gather(1, places % k)


def largest_pre_acts(x, W_enc, b_enc, k):
    """Returns the k largest of each row of x @ W_enc + b_enc and their columns, two [n, k]; on a
    CPU in parts that its caches hold."""
    parts = x.split(len(x) if x.is_cuda else 384)
    tops = [largest(torch.addmm(b_enc, part, W_enc), k) for part in parts]
    return map(torch.cat, zip(*tops))


def top_k_pairs(x, W_enc, b_enc, k):
    """Returns the Pairs of the k largest pre-activations x @ W_enc + b_enc of each token, with
    them, exact in fp32.

    x [n_tokens, d_in], W_enc [d_in, d_sae], b_enc [d_sae]. With bf16 units, bf16 proposes 2k or 3k
    and fp32 rescores them; tokens where another one could lie above, by its rounding error, are
    done again.
    """
    d_sae = len(b_enc)
    if not BF16_UNITS or x.is_cuda or d_sae < 64 * k:
        pre_acts, ids = largest_pre_acts(x, W_enc, b_enc, k)
        return Pairs.from_ids(ids, pre_acts)

    n_proposed = k * (2 if d_sae < 8192 else 3)
    coarse, ids = largest_pre_acts(x.bfloat16(), W_enc.bfloat16(), b_enc.bfloat16(), n_proposed)
    proposed = Pairs.from_ids(ids)
    exact = proposed.dots(x, W_enc.t()) + b_enc[proposed.ids]
    pre_acts, places = exact.view_as(ids).topk(k, sorted=False)
    ids, least_proposed = ids.gather(1, places), coarse.amin(1).float()

    size = x.norm(dim=1) * W_enc.norm(dim=0).max() + b_enc.abs().max() + least_proposed.abs()
    bound = least_proposed + 1.01 * 2 ** -8 * size  # no other pre-activation lies above
    again = (pre_acts.amin(1) < bound).nonzero().flatten()
    if len(again):
        pre_acts[again], ids[again] = largest_pre_acts(x[again], W_enc, b_enc, k)
    return Pairs.from_ids(ids, pre_acts)
