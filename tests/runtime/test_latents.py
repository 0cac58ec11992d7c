"""Sparse latents: equal to the dense form in values and gradients, and an exact choice of the top k."""
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F

from runtime import sparse_ops
from runtime.sparse_ops import Latents, PairEncode, Pairs, top_k_pairs

TIGHT = 2e-6        # fp32 against float64, relative to the largest entry


def close(got, wanted, tolerance=TIGHT):
    assert got.shape == wanted.shape
    scale = wanted.abs().max().item() if wanted.numel() else 0.0
    worst = (got.double() - wanted).abs().max().item() if wanted.numel() else 0.0
    assert worst <= tolerance * max(scale, 1.0), f"off by {worst:.2e} at a scale of {scale:.2e}"


def pairs_of(mask, pre_acts=None):
    """The Pairs of a dense pattern [n_tokens, d_sae], built entry by entry."""
    ids, starts, values = [], [], []
    for row in range(len(mask)):
        starts.append(len(ids))
        for latent in range(mask.shape[1]):
            if mask[row, latent]:
                ids.append(latent)
                values.append(0.0 if pre_acts is None else pre_acts[row, latent].item())
    ids, starts = torch.tensor(ids, dtype=torch.long), torch.tensor(starts)
    return Pairs(ids, starts, None if pre_acts is None else torch.tensor(values))


def pattern(kind, seed, n=12, d_sae=10):
    mask = torch.rand(n, d_sae, generator=torch.Generator().manual_seed(seed)) < 0.3
    if kind == "holes":         # tokens with no pair (first, middle, last two), latents with no token
        mask[[0, 5, -2, -1]] = False
        mask[:, [0, 4, -1]] = False
    elif kind in ("empty", "full"):
        mask[:] = kind == "full"
    elif kind == "one":
        mask[:] = False
        mask[3, 7] = True
    return mask


def problem(seed, n=12, d_in=7, d_sae=10):
    g = torch.Generator().manual_seed(seed)
    x, b_dec = torch.randn(n, d_in, generator=g), torch.randn(d_in, generator=g)
    W_enc = torch.randn(d_sae, d_in, generator=g).t()       # columns contiguous, as an SAE's
    return [t.requires_grad_() for t in (x, b_dec, W_enc, torch.randn(d_sae, generator=g),
                                         torch.randn(d_sae, d_in, generator=g))]


PATTERNS = [("random", 0), ("random", 1), ("holes", 2), ("holes", 3), ("one", 4), ("empty", 5), ("full", 6)]


@pytest.mark.parametrize("kind, seed", PATTERNS)
@pytest.mark.parametrize("precomputed", [False, True])
def test_values_and_gradients_equal_dense_autograd(kind, seed, precomputed):
    mask, leaves = pattern(kind, seed), problem(seed)
    weight = torch.randn(12, 7, generator=torch.Generator().manual_seed(seed + 100))
    x, b_dec, W_enc, b_enc, W_dec = leaves
    pre = ((x - b_dec) @ W_enc + b_enc).detach() if precomputed else None
    pairs = pairs_of(mask, pre)
    pre_acts = PairEncode.apply(x, b_dec, W_enc, b_enc, pairs)
    latents = Latents(pre_acts.tanh(), pre_acts, pairs, (3, 4, 10))
    x_hat = latents.decode(W_dec)
    assert x_hat.shape == (3, 4, 7)
    loss = (x_hat.flatten(0, 1) * weight).sum() + pre_acts.square().sum()
    grads = torch.autograd.grad(loss, leaves)

    truth = [t.detach().double().requires_grad_() for t in leaves]
    x, b_dec, W_enc, b_enc, W_dec = truth
    dense_pre = (x - b_dec) @ W_enc + b_enc
    z = dense_pre.tanh() * mask
    dense_hat = z @ W_dec
    dense_loss = (dense_hat * weight).sum() + (dense_pre.square() * mask).sum()
    close(pre_acts.detach(), dense_pre[mask].detach())
    close(latents.dense().flatten(0, 1).detach(), z.detach())
    close(x_hat.flatten(0, 1).detach(), dense_hat.detach())
    for name, got, wanted in zip(("x", "b_dec", "W_enc", "b_enc", "W_dec"), grads,
                                 torch.autograd.grad(dense_loss, truth)):
        assert got.shape == wanted.shape, name
        close(got, wanted, 1e-5)


def test_gradients_only_where_asked():
    """Frozen inputs get no gradient; the gradients of the others do not change for it."""
    mask, (x, b_dec, W_enc, b_enc, W_dec) = pattern("random", 7), problem(7)
    pairs = pairs_of(mask)

    def grads():
        for t in (x, b_dec, W_enc, b_enc, W_dec):
            t.grad = None
        pre_acts = PairEncode.apply(x, b_dec, W_enc, b_enc, pairs)
        Latents(pre_acts, pre_acts, pairs, (3, 4, 10)).decode(W_dec).square().sum().backward()
        return {n: t.grad for n, t in zip(("x", "b_dec", "W_enc", "b_enc", "W_dec"),
                                          (x, b_dec, W_enc, b_enc, W_dec))}
    everything = grads()
    x.requires_grad_(False)
    W_dec.requires_grad_(False)
    some = grads()
    assert some["x"] is None and some["W_dec"] is None
    for name in ("b_dec", "W_enc", "b_enc"):
        assert torch.equal(some[name], everything[name])


def test_a_gradient_that_is_not_contiguous():
    mask, (x, b_dec, W_enc, b_enc, W_dec) = pattern("random", 8), problem(8)
    pairs = pairs_of(mask)
    pre_acts = PairEncode.apply(x, b_dec, W_enc, b_enc, pairs)
    x_hat = Latents(pre_acts, pre_acts, pairs, (3, 4, 10)).decode(W_dec)
    x_hat[..., 2].sum().backward()                          # an expanded gradient, zero strides
    wanted = torch.zeros(10, 7)
    wanted[:, 2] = (((x - b_dec) @ W_enc + b_enc) * mask).sum(0).detach()
    close(W_dec.grad, wanted.double())


def both_forms(kind, seed):
    """A dense pattern [12, 10], values in it as [12, 10], and the same as Latents whose values are a leaf."""
    mask, z = pattern(kind, seed), torch.randn(12, 10, generator=torch.Generator().manual_seed(seed))
    z[2] = 0.0                                              # zero values at pairs
    values, pairs = z[mask].clone().requires_grad_(), pairs_of(mask)
    return mask, z * mask, Latents(values, 2 * values, pairs, (4, 3, 10))


@pytest.mark.parametrize("kind, seed", PATTERNS)
def test_dense_and_active_say_the_same(kind, seed):
    mask, z, latents = both_forms(kind, seed)
    assert torch.equal(latents.dense(), z.view(4, 3, 10))
    rows, ids = z.nonzero(as_tuple=True)
    for got, wanted in zip(latents.active(), (rows, ids, z[rows, ids])):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("kind, seed", PATTERNS)
@pytest.mark.parametrize("width", [None, 1, 7, 10])
def test_gradients_of_the_first_latents(kind, seed, width):
    mask, z, latents = both_forms(kind, seed)
    got = latents.dense()[..., :width]
    weight = torch.randn(4, 3, width or 10, generator=torch.Generator().manual_seed(1))
    assert torch.equal(got, z.view(4, 3, 10)[..., :width])
    grad, = torch.autograd.grad((got * weight).sum(), latents.values)
    wanted = torch.zeros(12, 10)
    wanted[:, :width] = weight.flatten(0, 1)
    assert torch.equal(grad, wanted[mask])


@pytest.mark.parametrize("kind, seed", PATTERNS)
@pytest.mark.parametrize("chosen", ["none", "all", "some"])
def test_keep(kind, seed, chosen):
    """The latents at the chosen pairs: values, pre-activations, reconstruction and gradients."""
    mask, z, latents = both_forms(kind, seed)
    kept = {"none": torch.zeros, "all": torch.ones}.get(chosen, torch.rand)(12, 10) > 0.5
    part, W_dec = latents.keep(kept[mask]), torch.randn(10, 7, generator=torch.Generator().manual_seed(1))
    assert part.shape == latents.shape and torch.equal(part.dense(), (z * kept).view(4, 3, 10))
    assert torch.equal(part.pre_acts, latents.pre_acts[kept[mask]])
    assert torch.equal(part.pairs.rows, (mask & kept).nonzero()[:, 0])
    assert torch.equal(part.pairs.ids, (mask & kept).nonzero()[:, 1])
    x_hat = part.decode(W_dec)
    close(x_hat.detach(), ((z * kept).double() @ W_dec.double()).view(4, 3, 7))
    grad, = torch.autograd.grad(x_hat.sum(), latents.values)
    close(grad, (W_dec.sum(1) * kept)[mask].double())


@pytest.mark.parametrize("low, high", [(0, 10), (0, 3), (3, 4), (5, 5), (0, 0), (7, 10)])
@pytest.mark.parametrize("kind, seed", PATTERNS)
def test_keeping_a_range_of_latents(kind, seed, low, high):
    mask, z, latents = both_forms(kind, seed)
    W_dec = torch.randn(10, 7, generator=torch.Generator().manual_seed(1))
    columns = torch.zeros(10, dtype=torch.bool)
    columns[low:high] = True
    part = latents.keep((latents.pairs.ids >= low) & (latents.pairs.ids < high))
    assert torch.equal(part.dense(), (z * columns).view(4, 3, 10))
    x_hat = part.decode(W_dec)
    close(x_hat.detach(), ((z * columns).double() @ W_dec.double()).view(4, 3, 7))
    grad, = torch.autograd.grad(x_hat.sum(), latents.values)
    close(grad, (W_dec.sum(1) * columns).expand(12, 10)[mask].double())
    assert torch.equal(latents.pre_acts[columns[latents.pairs.ids]], part.pre_acts)


@pytest.mark.parametrize("kind, seed", PATTERNS)
def test_from_dense(kind, seed):
    """Pairs at the non-zero values alone, however many; what reads them gives its gradients to the dense values."""
    z = both_forms(kind, seed)[1].view(4, 3, 10).requires_grad_()
    W_dec = torch.randn(10, 7, generator=torch.Generator().manual_seed(1))
    latents = Latents.from_dense(z)
    assert latents.shape == (4, 3, 10) and len(latents.values) == z.count_nonzero()
    assert torch.equal(latents.values, latents.pre_acts) and torch.equal(latents.dense(), z)
    assert not len(latents.values) or (latents.active()[2] == latents.values).all()
    x_hat, weight = latents.decode(W_dec), torch.randn(4, 3, 7, generator=torch.Generator().manual_seed(2))
    close(x_hat.detach(), (z.double() @ W_dec.double()).detach())
    grad, = torch.autograd.grad((x_hat * weight).sum(), z)
    close(grad, ((weight @ W_dec.t()) * (z.detach() != 0)).double())


@pytest.mark.parametrize("kind", ["random", "holes"])
def test_at_gives_each_value_the_entry_of_its_latent(kind):
    mask, _, latents = both_forms(kind, 9)
    per_latent = torch.arange(10.0).requires_grad_()
    assert torch.equal(latents.at(per_latent), torch.arange(10.0).expand(12, 10)[mask])
    grad, = torch.autograd.grad(latents.at(per_latent).sum(), per_latent)
    assert torch.equal(grad, mask.sum(0).float())


def test_from_ids_takes_latents_in_any_order():
    ids = torch.tensor([[3, 0], [9, 2], [0, 9]])
    pairs = Pairs.from_ids(ids, ids.float())
    assert torch.equal(pairs.rows, torch.tensor([0, 0, 1, 1, 2, 2]))
    latents = Latents(pairs.pre_acts, pairs.pre_acts, pairs, (1, 3, 10))
    wanted = torch.zeros(1, 3, 10)
    wanted[0, 0, 3], wanted[0, 1, 9], wanted[0, 1, 2], wanted[0, 2, 9] = 3.0, 9.0, 2.0, 9.0
    assert torch.equal(latents.dense(), wanted)


@pytest.mark.parametrize("precomputed", [False, True])
def test_a_step_leaves_no_memory_to_the_garbage_collector(precomputed):
    """A cycle through the graph would keep every step's pairs until the collector happens to run."""
    mask, (x, b_dec, W_enc, b_enc, W_dec) = pattern("random", 10), problem(10)
    pairs = pairs_of(mask, ((x - b_dec) @ W_enc + b_enc).detach() if precomputed else None)
    alive = weakref.ref(pairs)
    gc.disable()
    try:
        pre_acts = PairEncode.apply(x, b_dec, W_enc, b_enc, pairs)
        Latents(pre_acts, pre_acts, pairs, (3, 4, 10)).decode(W_dec).square().sum().backward()
        del pre_acts, pairs
        assert alive() is None
    finally:
        gc.enable()


# ---- The choice of the top k ----
def make_input(kind, seed, n, d_in, d_sae):
    """x [n, d_in], W_enc [d_in, d_sae], b_enc [d_sae], hard for a choice in bf16."""
    g = torch.Generator().manual_seed(seed)
    W = F.normalize(torch.randn(d_sae, d_in, generator=g), dim=1)
    x, b = torch.randn(n, d_in, generator=g) / d_in ** 0.5, torch.zeros(d_sae)
    if kind == "correlated":            # tokens near a plane, latents crowded around few directions
        x = torch.randn(n, 3, generator=g) @ torch.randn(3, d_in, generator=g) / d_in ** 0.5 + 0.02 * x
        W = F.normalize(W[torch.randint(6, (d_sae,), generator=g)] + 0.2 * W, dim=1)
    elif kind == "near ties":           # every latent nearly the same: bf16 cannot tell them apart
        W = F.normalize(W[:1] + 1e-3 * W, dim=1)
    elif kind == "pairs of ties":       # each direction five times, apart by less than bf16 resolves
        W = W[torch.arange(d_sae) // 5] * (1 + 1e-4 * torch.rand(d_sae, 1, generator=g))
    elif kind == "large biases":
        b = 30 * torch.randn(d_sae, generator=g)
    elif kind == "a large common bias":
        b = torch.full((d_sae,), 300.0)
    elif kind == "large negative biases":
        b = -50 - 10 * torch.rand(d_sae, generator=g)
    elif kind == "large mean":
        x = x + 20
    elif kind == "one long latent":     # its norm widens the bound for all
        W[0] *= 100
    elif kind == "zero tokens":
        x[::2] = 0.0
    return x, W.t(), b


KINDS = ["random", "correlated", "near ties", "pairs of ties", "large biases", "a large common bias",
         "large negative biases", "large mean", "one long latent", "zero tokens"]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("d_sae, k", [(512, 16), (512, 8), (512, 3), (500, 4), (512, 64), (512, 512), (20, 4), (9, 9), (512, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_top_k_is_that_of_fp32(monkeypatch, kind, d_sae, k, bf16):
    """The chosen latents are the k largest. Tolerance: fp32 itself cannot order pre-activations that
    differ by less than its rounding, 1e-6 of |x| |W| + |b|; a latent off the list may exceed one on
    it by that much and no more."""
    monkeypatch.setattr(sparse_ops, "BF16_UNITS", bf16)
    x, W_enc, b_enc = make_input(kind, 3, 80, 48, d_sae)
    pairs = top_k_pairs(x, W_enc, b_enc, k)
    ids, pre_acts = pairs.ids.view(80, k), pairs.pre_acts.view(80, k)
    assert (ids.sort(1).values.diff(dim=1) > 0).all()
    assert torch.equal(pairs.rows, torch.arange(80).repeat_interleave(k))
    exact = x.double() @ W_enc.double() + b_enc.double()
    rounding = 1e-6 * (x.norm(dim=1, keepdim=True) * W_enc.norm(dim=0).max() + b_enc.abs().max()).double()
    assert ((pre_acts - exact.gather(1, ids)).abs() <= rounding).all()
    chosen = torch.zeros(80, d_sae, dtype=torch.bool).scatter(1, ids, True)
    best_left = exact.masked_fill(chosen, -torch.inf).amax(1, keepdim=True)
    least_kept = exact.gather(1, ids).amin(1, keepdim=True)
    assert (best_left <= least_kept + rounding).all()
    if kind in ("random", "large mean", "large biases"):        # no ties: the very same sets
        wanted = torch.addmm(b_enc, x, W_enc).topk(k, dim=1).indices
        assert torch.equal(ids.sort(1).values, wanted.sort(1).values)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", ["random", "near ties", "large biases"])
def test_top_k_of_many_tokens_and_latents(monkeypatch, kind, bf16):
    """More tokens than one part holds, and so many latents that bf16 proposes 3k and groups are found among groups."""
    monkeypatch.setattr(sparse_ops, "BF16_UNITS", bf16)
    x, W_enc, b_enc = make_input(kind, 5, 1100, 16, 16_384)
    pairs = top_k_pairs(x, W_enc, b_enc, 8)
    ids, dense = pairs.ids.view(1100, 8), torch.addmm(b_enc, x, W_enc)
    rounding = 1e-6 * (x.norm(dim=1, keepdim=True) * W_enc.norm(dim=0).max() + b_enc.abs().max())
    assert ((pairs.pre_acts.view(1100, 8) - dense.gather(1, ids)).abs() <= rounding).all()
    assert (ids.sort(1).values.diff(dim=1) > 0).all()
    assert ((dense.gather(1, ids).sort(1).values - dense.topk(8).values.sort(1).values).abs() <= 2 * rounding).all()


@pytest.fixture
def products(monkeypatch):
    """Precision and number of tokens of every product with the whole encoder, bf16 units present."""
    calls, addmm = [], torch.addmm
    monkeypatch.setattr(sparse_ops, "BF16_UNITS", True)
    monkeypatch.setattr(torch, "addmm", lambda b, x, W: calls.append((x.dtype, len(x))) or addmm(b, x, W))
    return calls


def test_bf16_proposes_and_only_doubtful_rows_are_done_again(products):
    """On ordinary data the proposals suffice; on near-ties every row is repeated; of a mixture those that point at them."""
    top_k_pairs(*make_input("random", 0, 80, 48, 512), 7)
    assert products[0] == (torch.bfloat16, 80) and sum(n for _, n in products[1:]) < 10
    products.clear()
    top_k_pairs(*make_input("near ties", 0, 80, 48, 512), 7)
    assert products == [(torch.bfloat16, 80), (torch.float32, 80)]
    products.clear()
    x, W_enc, b_enc = make_input("random", 0, 80, 48, 512)
    crowd = make_input("near ties", 0, 80, 48, 512)[1]
    x[:30] += 3 * crowd[:, 0]
    x[30:] -= 3 * crowd[:, 0]
    top_k_pairs(x, torch.cat([W_enc[:, :256], crowd[:, 256:]], 1), b_enc, 7)
    assert products == [(torch.bfloat16, 80), (torch.float32, 30)]


@pytest.mark.parametrize("bf16, d_sae", [(False, 512), (True, 511)])
def test_bf16_proposes_only_where_it_has_units_and_latents_are_many(monkeypatch, products, bf16, d_sae):
    monkeypatch.setattr(sparse_ops, "BF16_UNITS", bf16)
    top_k_pairs(*make_input("random", 0, 80, 48, d_sae), 8)
    assert products == [(torch.float32, 80)]


def test_more_than_all_latents_is_an_error():
    x, W_enc, b_enc = make_input("random", 0, 4, 8, 16)
    with pytest.raises(RuntimeError):
        top_k_pairs(x, W_enc, b_enc, 17)
