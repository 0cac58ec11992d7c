"""Reconstruction, sparsity, token tables and next-token losses against loops, hooks and by hand."""
import collections
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from scipy.sparse import csc_array

from data.windows import Windows
import records
from records import with_codes

D_IN, CONTEXT, VOCABULARY, N_TRAIN = 16, 12, 40, 24


# ---- A tiny language model that predicts its own text well ----
@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=D_IN, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, initializer_range=0.3, attn_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    model.get_output_embeddings().weight.mul_(3.0)
    return model


@pytest.fixture(scope="module")
def text(model):
    """[56, CONTEXT] tokens drawn from the model itself, token 0 in front."""
    g = torch.Generator().manual_seed(0)
    tokens = torch.zeros(56, 1, dtype=torch.long)
    while tokens.shape[1] < CONTEXT:
        chances = model(input_ids=tokens).logits[:, -1].softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(chances, 1, generator=g)], 1)
    return tokens.numpy()


@pytest.fixture
def spoken(E, model, text, tmp_path, monkeypatch):
    """spoken(lengths, filler) -> Store of the text's activations; 16 held-out files of two windows."""
    monkeypatch.setattr(E, "CONTEXT_LENGTH", CONTEXT)
    monkeypatch.setattr(E, "TARGET_L0", 4)

    def make(lengths=None, filler=0):
        lengths = np.full(56, CONTEXT) if lengths is None else np.asarray(lengths)
        tokens = np.where(np.arange(CONTEXT) < lengths[:, None], text, filler).astype(np.int32)
        doc_ids = np.concatenate([np.arange(24), 24 + np.arange(32) // 2])
        names = [str(i) for i in range(40)]
        windows = Windows(tokens, lengths, doc_ids, N_TRAIN, names, names)
        store = E.Store(tmp_path / f"store-{filler}-{lengths.sum()}", windows, D_IN, torch.float32)
        store.collect(lambda: model, 0)
        return store
    return make


UNEVEN = np.where(np.arange(56) % 3 == 0, 5, np.where(np.arange(56) % 5 == 0, 8, CONTEXT))


def identity(E, decode=None):
    """An SAE that reconstructs x to the last bit, latents +-x_i; or whose decoder is `decode(x, sae)`."""
    sae = E.SAE(D_IN, 2 * D_IN, 4).eval()
    sae.W_enc.data = torch.cat([torch.eye(D_IN), -torch.eye(D_IN)], 1)
    sae.W_dec.data = sae.W_enc.data.t().contiguous()
    if decode is not None:
        sae.decode = lambda latents: decode(latents.decode(sae.W_dec))
    return sae


def run_of(E, store, sae, model=None, live=(1, 1)):
    return records.run_of(E, sae, store, model, live=live)


# ---- Explained variance ----
def four_corners(make_store):
    """Training and held-out tokens alike (0, 0), (2, 0), (0, 2), (2, 2): mean (1, 1), variance 1 + 1."""
    corners = torch.tensor([[9.0, 9.0], [0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]])
    return make_store(corners.repeat(4, 1, 1), 2)


class Fixed:
    """A reconstruction of a test's choice: `x_hat(x)`."""
    d_sae = 1

    def __init__(self, x_hat):
        self.x_hat = x_hat

    def encode(self, batch):
        return SimpleNamespace(x=batch.x, active=lambda: (torch.zeros(0, dtype=torch.long),) * 3)

    def decode(self, latents):
        return self.x_hat(latents.x)


def test_explained_variance_by_hand(E, make_store):
    store = four_corners(make_store)
    by_position, variance = E.variance_by_position(store)
    assert store.mean.tolist() == [1.0, 1.0] and store.scale == pytest.approx(2 ** 0.5)
    assert variance == pytest.approx(1.0) and by_position == pytest.approx([1.0] * 4)   # in units of the scale
    off_by_one = torch.tensor([1.0, 0.0]) / store.scale         # errors 1 of a variance of 2
    stretched = 1.5                                             # errors a quarter of the variance
    for x_hat, wanted in ((lambda x: x, 1.0), (torch.zeros_like, 0.0), (lambda x: x + off_by_one, 0.5),
                          (lambda x: x * stretched, 0.75), (lambda x: -x, -3.0)):
        assert E.explained_by(Fixed(x_hat), store, variance) == pytest.approx(wanted, abs=1e-6)


def test_the_mean_that_scores_zero_is_that_of_the_held_out_tokens(E, make_store):
    """A predictor of another mean is charged for the difference."""
    x = torch.randn(40, 9, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 7)
    x[20:] += torch.tensor([3.0, 0, 0, 0, 0, 0])
    store = make_store(x, 20)
    _, variance = E.variance_by_position(store)
    heldout = (x[20:, 1:].flatten(0, 1).double() - store.mean) / store.scale
    assert variance == pytest.approx(heldout.var(0, correction=0).sum().item(), rel=1e-5)
    mean = heldout.mean(0).float()
    assert E.explained_by(Fixed(mean.expand_as), store, variance) == pytest.approx(0, abs=1e-5)
    charge = mean.square().sum().item() / variance
    assert charge > 0.05
    assert E.explained_by(Fixed(torch.zeros_like), store, variance) == pytest.approx(-charge, rel=1e-3)


def padded_store(make_store, rubbish=0.0, name="store", seed=0):
    """150 windows, 70 of them held out in 35 files, many with padding that holds `rubbish`."""
    g = torch.Generator().manual_seed(seed)
    x, lengths = torch.randn(150, 9, 6, generator=g) + 1, np.random.default_rng(seed).integers(4, 10, 150)
    tokens = np.random.default_rng(seed + 1).integers(1, 8, (150, 9))
    padding = np.arange(9) >= lengths[:, None]
    tokens[padding] = 3 if rubbish else 0
    x[torch.from_numpy(padding)] = rubbish
    return make_store(x, 80, tokens, lengths, np.concatenate([np.arange(80), 80 + np.arange(70) // 2]), name)


def test_variance_by_position_leaves_padding_out(E, make_store):
    store = padded_store(make_store, 1e3)
    x, lengths = ((store.raw(range(150)) - store.mean) / store.scale).double(), store.windows.lengths
    rows = [[x[w, p] for w in range(80, 150) if lengths[w] > p] for p in range(1, 9)]
    mean = torch.stack(sum(rows, [])).mean(0)
    by_position, variance = E.variance_by_position(store)
    assert by_position == pytest.approx([(torch.stack(r) - mean).square().sum(1).mean().item() for r in rows], rel=1e-5)
    assert variance == pytest.approx((torch.stack(sum(rows, [])) - mean).square().sum(1).mean().item(), rel=1e-5)


# ---- Codes of the held-out tokens ----
def test_encode_heldout_against_a_loop(E, make_store):
    store = padded_store(make_store, 50.0)
    torch.manual_seed(0)
    sae = E.TopK(6, 20, 3).eval()
    encoded = E.encode_windows(sae, store, store.windows.heldout())
    codes, wanted, place = encoded.codes, collections.defaultdict(list), 0
    rows = {name: getattr(encoded, name) for name in ("error", "norm", "norm_hat", "dot", "l0")}
    assert all(v.shape == (70, 8) for v in rows.values())
    for w in range(80, 150):
        batch = store.batch([w])
        z, x = sae.encode(batch).dense()[0].detach(), batch.x[0]
        x_hat = z @ sae.W_dec.detach() + sae.b_dec.detach()
        for p in range(8):
            if p + 1 < store.windows.lengths[w]:
                wanted["codes"] += [(place, i, z[p, i].item()) for i in range(20) if z[p, i] != 0]
                for name, value in (("error", (x[p] - x_hat[p]).square().sum()), ("norm", x[p].square().sum()),
                                    ("norm_hat", x_hat[p].square().sum()), ("dot", x[p] @ x_hat[p]),
                                    ("l0", z[p].count_nonzero())):
                    assert rows[name][w - 80, p] == pytest.approx(value.item(), rel=1e-4, abs=1e-5)
            else:
                assert all(np.isnan(rows[name][w - 80, p]) for name in rows)
            place += 1
    token, latent = codes.nonzero()
    got = sorted(zip(token.tolist(), latent.tolist(), codes[token, latent].tolist()))
    assert [g[:2] for g in got] == [w[:2] for w in wanted["codes"]]
    assert [g[2] for g in got] == pytest.approx([w[2] for w in wanted["codes"]], rel=1e-4)
    assert codes.shape == (70 * 8, 20) and encoded.tokens_per_second > 0
    for i, (at, values) in zip((3, 0, 19), E.firings(codes, np.array([3, 0, 19]))):     # by latent, tokens in order
        assert list(zip(at, values)) == [(t, pytest.approx(v, rel=1e-4)) for t, j, v in wanted["codes"] if j == i]


def planted_codes(E, make_store):
    """12 held-out files of two windows of 10 tokens, 220 of the 240 valid, and an empty list to plant codes in."""
    lengths = [11] * 28
    lengths[4 + 23] = lengths[4 + 22] = 1
    tokens = np.random.default_rng(0).integers(100, 200, (28, 11))
    doc_ids = np.concatenate([np.arange(4), 4 + np.arange(24) // 2])
    store = make_store(torch.randn(28, 11, 4), 4, tokens, lengths, doc_ids)
    return store, []


def planted_run(E, store, planted, d_sae, live=(1, 1)):
    token, latent, value = map(np.array, zip(*planted)) if planted else np.zeros((3, 0), int)
    codes = csc_array((value, (token, latent)), (24 * 10, d_sae))
    return with_codes(E, records.run_of(E, None, store, live=live), codes)


def test_live_latents(E, make_store):
    assert (E.LIVE_MIN_FIRINGS, E.LIVE_MIN_FILES) == (50, 10)
    store, planted = planted_codes(E, make_store)

    def fire(latent, per_file):
        for file, n in enumerate(per_file):
            planted.extend((file * 20 + i, latent, 1.0) for i in range(n))
    fire(0, [2, 2, 2])              # six firings in three files: just enough
    fire(1, [2, 2, 1])              # five: too few
    fire(2, [6, 6])                 # two files: too few
    fire(3, [10] * 11)              # exactly half of the 220 valid tokens
    fire(4, [10] * 10 + [11])       # more than half
    fire(6, [20] * 11)              # always
    live = planted_run(E, store, planted, 8, (6, 3)).live
    assert live.mask.tolist() == [True, False, False, True, False, False, False, False]
    assert live.ids.tolist() == [0, 3]
    assert live.rate == pytest.approx(np.array([6, 5, 12, 110, 111, 0, 220, 0]) / 220)


def test_no_firing_at_all(E, make_store):
    store, _ = planted_codes(E, make_store)
    with pytest.raises(E.RunnerError, match=r"no latent of 3 is live: fired 1 times in 1 held-out files \(L0 = 0.00\)"):
        planted_run(E, store, [], 3).live


def single_token_fraction(E, run, live):
    firings = E.firings(run.encoded.codes, np.flatnonzero(live))
    return E.single_token_fraction(run.store.windows, firings)


@pytest.mark.parametrize("firings, same, counts", [(50, 36, True), (50, 35, False), (10, 9, True), (10, 8, False),
                                                   (1, 1, True), (40, 40, True), (220, 36, True), (20, 18, True)])
def test_single_token_fraction(E, make_store, firings, same, counts):
    """A latent whose `same` strongest firings are one token and whose others are all kinds, beside three that
    are fixed: one certainly of a single token, one of many tokens, and one of a single token that is not live."""
    store, planted = planted_codes(E, make_store)
    store.windows.tokens[:] = np.arange(28 * 11).reshape(28, 11) + 1000         # every token another
    tokens = store.windows.tokens[4:, 1:]
    for i in range(firings):
        planted.append((i, 1, 100.0 - i))
    for i in range(same):
        tokens[i // 10, i % 10] = 7
    tokens[15, :] = 8
    for i in range(10):
        planted += [(150 + i, 0, 1.0 + i), (100 + i, 2, 2.0 + i), (150 + i, 3, 0.5)]
    live = np.array([True, True, True, False, False])
    if firings == 220:                              # the weaker ones do not matter
        assert len({*tokens.flatten()[:220]}) > 100
    wanted = (1 + counts) / 3
    assert single_token_fraction(E, planted_run(E, store, planted, 5), live) == pytest.approx(wanted)


def test_the_sample_is_the_first_held_out_window_of_each_file(E, make_store):
    doc_ids = np.array([0, 1, 1, 5, 5, 2, 2, 2, 9, 5])
    store = make_store(torch.randn(10, 8, 4), 3, doc_ids=doc_ids)
    assert sorted(store.windows.sample().tolist()) == [3, 5, 8]


# ---- Token tables ----
def test_unigram_losses_by_hand(E, make_store):
    """Training tokens after the first: 1 1 1 2 | 2 1 (padding): counts + 1 are 1 5 3 1 of 10 in a vocabulary of 4."""
    tokens = np.array([[3, 1, 1, 1, 2, 0], [3, 2, 1, 3, 3, 3], [3, 0, 1, 2, 1, 3], [3, 3, 0, 2, 1, 1]])
    tokens[0, 5] = 1
    store = make_store(torch.randn(4, 6, 2), 2, tokens, [5, 3, 6, 4])
    losses = E.unigram_losses(store.windows, 4)
    p = np.array([1, 5, 3, 1]) / 10
    wanted = -np.log([[p[1], p[2], p[1], p[3]], [p[0], p[2], np.nan, np.nan]])
    assert losses == pytest.approx(wanted, nan_ok=True)


def test_unigram_losses_against_a_loop(E, make_store):
    store = padded_store(make_store, 1.0)
    counts, tokens, lengths = collections.Counter(range(9)), store.windows.tokens, store.windows.lengths
    for w in range(80):
        counts.update(int(t) for t in tokens[w, 1:lengths[w]])
    total = sum(counts.values())
    wanted = [[-math.log(counts[int(t)] / total) for t in tokens[w, 2:lengths[w]]] + [math.nan] * (9 - lengths[w])
              for w in range(80, 150, 2)]
    assert E.unigram_losses(store.windows, 9) == pytest.approx(np.array(wanted), nan_ok=True)


def bigram_by_loop(store, n_train=80):
    """The published shrinkage, token by token: pair -> token -> 0, one pseudo-count each."""
    x, tokens, lengths = (store.raw(range(150)) - store.mean) / store.scale, store.windows.tokens, store.windows.lengths
    of_token, of_pair = collections.defaultdict(list), collections.defaultdict(list)
    for w in range(n_train):
        for p in range(1, lengths[w]):
            of_token[tokens[w, p]].append(x[w, p])
            of_pair[tokens[w, p - 1], tokens[w, p]].append(x[w, p])
    error, n = 0.0, 0
    for w in range(80, 150):
        for p in range(1, lengths[w]):
            guess = sum(of_token[tokens[w, p]], torch.zeros(x.shape[2])) / (len(of_token[tokens[w, p]]) + 1)
            seen = of_pair.get((tokens[w, p - 1], tokens[w, p]))
            guess = guess if seen is None else (sum(seen) + guess) / (len(seen) + 1)
            error, n = error + (x[w, p] - guess).square().sum().item(), n + 1
    return error / n


def bigram_error(E, store, *n_tokens):
    return E.bigram_error(store.windows, lambda ids: store.batch(ids).x.numpy(), *n_tokens)


def test_bigram_error_against_a_loop(E, make_store):
    store = padded_store(make_store, 30.0)
    assert bigram_error(E, store) == pytest.approx(bigram_by_loop(store), abs=1e-5)


def test_the_bigram_lookup_is_fitted_on_the_first_tokens_alone(E, make_store):
    """Whole windows of them, and never more than are for training."""
    store = padded_store(make_store, 30.0)
    width = store.windows.tokens.shape[1]
    for n_tokens, n_train in ((20 * width, 20), (21 * width - 1, 20), (10 ** 9, 80)):
        assert bigram_error(E, store, n_tokens) == pytest.approx(bigram_by_loop(store, n_train), abs=1e-5)


def table_store(make_store, kind, vocabulary=6):
    """Activations as a function of (previous token, token), of the token alone, or of nothing."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocabulary, (200, 25))
    table = torch.randn(vocabulary, vocabulary, 8, generator=torch.Generator().manual_seed(1))
    if kind == "token":
        table = table[:1].expand(vocabulary, vocabulary, 8)
        tokens[:120][tokens[:120] == 1] = 2             # token 1 occurs held out only after tokens it never followed:
        tokens[:120, -1] = 1                            # in training only at the end, in other pairs
    x = torch.randn(200, 25, 8, generator=torch.Generator().manual_seed(2))
    if kind != "noise":
        x[:, 1:] = table[tokens[:, :-1], tokens[:, 1:]]
    return make_store(x, 120, tokens)


@pytest.mark.parametrize("kind, least, most", [("pair", 0.98, 1.0), ("token", 0.98, 1.0), ("noise", -0.1, 0.0)])
def test_bigram_bar(E, make_store, kind, least, most):
    store = table_store(make_store, kind)
    _, variance = E.variance_by_position(store)
    assert least <= 1 - bigram_error(E, store) / variance <= most


def test_bigram_bar_of_a_token_table_is_below_one_for_pairs(E, make_store):
    """What depends on the token before the previous one stays out of reach."""
    tokens = np.random.default_rng(0).integers(0, 2, (200, 25))
    x = torch.zeros(200, 25, 2)
    hidden = torch.from_numpy(tokens[:, :-2] ^ tokens[:, 2:]).float()
    x[:, 2:, 0], x[:, 2:, 1] = hidden, torch.from_numpy(tokens[:, 2:]).float()
    store = make_store(x[:, 1:], 120, tokens[:, 1:])
    _, variance = E.variance_by_position(store)
    assert 1 - bigram_error(E, store) / variance == pytest.approx(0.5, abs=0.03)


# ---- Reconstructions spliced into the model ----
def spliced_by_hook(model, store, ids, x_hat):
    """Logits with block 0's output replaced after the first token, by a hook in a full forward pass."""
    def replace(module, inputs, output):
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = torch.cat([hidden[:, :1], x_hat[:, :hidden.shape[1] - 1]], 1)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
    handle = model.gpt_neox.layers[0].register_forward_hook(replace)
    try:
        return model(input_ids=store.tokens(ids)).logits.log_softmax(-1)
    finally:
        handle.remove()


def test_next_token_losses_against_a_loop(E, model, spoken):
    store = spoken(UNEVEN)
    noise = 0.3 * torch.randn(56, CONTEXT - 1, D_IN, generator=torch.Generator().manual_seed(0))
    sample = store.windows.sample()
    assert sample.tolist() == list(range(24, 56, 2))
    given = iter(np.array_split(sample, 2))

    def splice(batch):
        return store.unscaled(batch.x) + noise[next(given)]
    losses, kl = E.next_token_losses(run_of(E, store, None, model), splice)
    assert losses.shape == kl.shape == (16, CONTEXT - 2)
    for row, w in enumerate(sample):
        own = model(input_ids=store.tokens([w])).logits.log_softmax(-1)[0]
        got = spliced_by_hook(model, store, [w], store.raw([w])[:, 1:] + noise[[w]])[0]
        for p in range(CONTEXT - 2):                    # the loss after position p + 1 is that of the token at p + 2
            if p + 2 < store.windows.lengths[w]:
                token = int(store.windows.tokens[w, p + 2])
                assert losses[row, p] == pytest.approx(-got[p + 1, token].item(), abs=1e-4)
                wanted = (own[p + 1].exp() * (own[p + 1] - got[p + 1])).sum().item()
                assert kl[row, p] == pytest.approx(wanted, abs=1e-4)
            else:
                assert np.isnan(losses[row, p]) and np.isnan(kl[row, p])
    assert np.nanmin(kl) > -1e-6 and np.nanmean(kl) > 0.02


@pytest.mark.parametrize("lengths", [None, UNEVEN], ids=["full", "uneven"])
def test_the_identity_spliced_in_changes_nothing(E, model, spoken, lengths):
    store = spoken(lengths)
    own = E.next_token_losses(run_of(E, store, None, model), lambda batch: store.unscaled(batch.x))
    direct = model(input_ids=store.tokens(slice(None))).logits.log_softmax(-1)
    sample = store.windows.sample()
    wanted = -direct[sample, 1:-1].gather(2, store.tokens(sample)[:, 2:, None])[..., 0].numpy()
    kept = ~np.isnan(own[0])
    assert kept.sum() == np.maximum(store.windows.lengths[sample] - 2, 0).sum()
    assert own[0][kept] == pytest.approx(wanted[kept], abs=1e-4)
    assert np.abs(own[1][kept]).max() < 1e-5
    result = E.eval_core(run_of(E, store, identity(E), model)).metrics
    for name, value in (("explained_variance", 1), ("loss_increase_nats", 0), ("kl", 0), ("ce_recovered_vs_unigram", 1),
                        ("ce_recovered_vs_mean", 1), ("ce_recovered_vs_zero", 1), ("cosine", 1), ("l2_ratio", 1),
                        ("relative_reconstruction_bias", 1), ("l0", D_IN), ("dead_fraction", 0)):
        assert result[name] == pytest.approx(value, abs=1e-4), name
    assert result["ce_model"] < result["ce_unigram"] - 0.5      # the planted model knows its text,
    assert result["ce_mean"] > result["ce_model"] + 0.5         # and needs this layer for it
    assert result["permuted_decoder_explained_variance"] < 0


@pytest.mark.parametrize("lengths", [None, UNEVEN], ids=["full", "uneven"])
@pytest.mark.parametrize("kind", ["mean", "zero"])
def test_an_ablation_recovers_nothing_of_its_own_loss(E, model, spoken, kind, lengths):
    """The mean (of training tokens) in x's place scores 0 against mean ablation, zero 0 against zero ablation."""
    store = spoken(lengths)
    at_zero = -store.mean / store.scale
    sae = identity(E, lambda x: 1e-6 * x if kind == "mean" else at_zero.expand_as(x))
    result = E.eval_core(run_of(E, store, sae, model)).metrics
    assert result[f"ce_recovered_vs_{kind}"] == pytest.approx(0, abs=1e-3)
    assert result[f"ce_{kind}"] == pytest.approx(result["ce_sae"], abs=1e-3)
    assert result["ce_recovered_vs_unigram"] == pytest.approx(
        (result["ce_unigram"] - result["ce_sae"]) / (result["ce_unigram"] - result["ce_model"]))
    other = "zero" if kind == "mean" else "mean"
    assert abs(result[f"ce_recovered_vs_{other}"]) > 0.01
    assert result["kl"] > 0.5


def test_every_ce_is_the_mean_over_the_same_tokens(E, model, spoken):
    """The model's, the unigrams', the ablations' and the SAE's: else the shares recovered compare unlike things."""
    store, sae = spoken(UNEVEN), noisy(E)
    run = run_of(E, store, sae, model)
    metrics = E.eval_core(run).metrics

    def mean_of(splice):
        return np.nanmean(E.next_token_losses(run, splice)[0])
    unigram = E.unigram_losses(store.windows, VOCABULARY)
    assert (np.isnan(unigram) == np.isnan(E.next_token_losses(run, lambda b: store.unscaled(b.x))[0])).all()
    for name, wanted in (("ce_model", mean_of(lambda b: store.unscaled(b.x))), ("ce_unigram", np.nanmean(unigram)),
                         ("ce_zero", mean_of(lambda b: 0 * b.x)),
                         ("ce_mean", mean_of(lambda b: store.mean.expand_as(b.x))),
                         ("ce_sae", mean_of(lambda b: store.unscaled(sae.decode(sae.encode(b)))))):
        assert metrics[name] == pytest.approx(wanted, abs=1e-6), name


# ---- The evaluation as a whole ----
def noisy(E):
    """A real SAE with latents that are silent, rare and dense."""
    torch.manual_seed(1)
    sae = E.JumpReLU(D_IN, 64, 4).eval()
    sae.log_threshold.data = torch.linspace(-4, 2, 64)
    sae.b_enc.data[:2] = 5.0
    return sae


def test_core_agrees_with_its_parts(E, model, spoken):
    store = spoken(UNEVEN)
    run = run_of(E, store, noisy(E), model, (5, 3))
    result, encoded = E.eval_core(run), E.encode_windows(run.sae, store, store.windows.heldout())
    (_, variance), m, codes = E.variance_by_position(store), result.metrics, encoded.codes
    valid = (UNEVEN[24:] - 1).sum()
    rate = np.diff(codes.indptr) / valid
    assert m["explained_variance"] == pytest.approx(1 - np.nansum(encoded.error) / valid / variance)
    assert m["l0"] == pytest.approx(codes.nnz / valid) and 1 < m["l0"] < 40
    assert m["dead_fraction"] == (rate == 0).mean() > 0 and m["dense_fraction"] == (rate > 0.1).mean() > 0
    live = run.live.mask
    assert m["live_fraction"] == live.mean() and not live[:2].any()
    assert m["single_token_fraction"] == single_token_fraction(E, run, live)
    assert m["bigram_explained_variance"] == pytest.approx(1 - bigram_error(E, store) / variance)
    assert m["ce_sae"] - m["ce_model"] == pytest.approx(m["loss_increase_nats"])
    x = torch.cat([store.batch([w]).x[0, :UNEVEN[w] - 1] for w in range(24, 56)])
    x_hat = torch.cat([run.sae.decode(run.sae.encode(store.batch([w])))[0, :UNEVEN[w] - 1] for w in range(24, 56)])
    cosine = torch.cosine_similarity(x, x_hat, dim=1).mean().item()
    assert m["cosine"] == pytest.approx(cosine, rel=1e-4)
    assert m["l2_ratio"] == pytest.approx((x_hat.norm(dim=1) / x.norm(dim=1)).mean().item(), rel=1e-4)
    bias = (x_hat.square().sum(1).mean() / (x * x_hat).sum(1).mean()).item()
    assert m["relative_reconstruction_bias"] == pytest.approx(bias, rel=1e-3)
    assert len(result.curves["explained_variance_by_position"]) == CONTEXT - 1
    assert all(len(values) == 16 for values in result.per_sequence.values())
    tokens = UNEVEN[24::2] - 2
    increase = (result.per_sequence["loss_increase_nats"] * tokens).sum() / tokens.sum()
    assert increase == pytest.approx(m["loss_increase_nats"])
    first = [np.nanmean(encoded.error[i]) / variance for i in range(0, 32, 2)]
    assert result.per_sequence["fvu"] == pytest.approx(first)


def test_what_stands_in_the_padding_changes_no_figure(E, model, spoken):
    results = []
    for filler in (0, 7):
        store = spoken(UNEVEN, filler)
        padding = torch.from_numpy(np.arange(CONTEXT) >= UNEVEN[:, None])
        if filler:
            store.shard_tensors[0][padding] = 1e3
            store.windows.tokens[padding.numpy()] = filler
        results.append(E.eval_core(run_of(E, store, noisy(E), model, (5, 3))))
    a, b = results
    for name in a.metrics:
        if "per_second" not in name:
            assert a.metrics[name] == pytest.approx(b.metrics[name], abs=1e-5), name
    for part in ("curves", "per_sequence"):
        for name, values in getattr(a, part).items():
            assert values == pytest.approx(getattr(b, part)[name], abs=1e-5), name


def test_positions_that_no_held_out_window_reaches(E, model, spoken):
    """Short documents: every held-out window ends early. The results can still be written."""
    store = spoken(np.where(np.arange(56) < N_TRAIN, CONTEXT, 9))
    result = E.run_evaluation(E.eval_core, run_of(E, store, noisy(E), model, (5, 3)))
    json.dumps(result, allow_nan=False)


def test_a_dictionary_without_live_latents_is_an_error(E, model, spoken):
    sae = identity(E)
    sae.b_enc.data -= 100.0
    with pytest.raises(E.RunnerError, match="no latent of 32 is live"):
        E.eval_core(run_of(E, spoken(), sae, model))


def test_controls_are_computed_once(E, model, spoken, capsys):
    store, sae = spoken(), identity(E)
    first = E.controls(run_of(E, store, sae, model))
    assert "computing" in capsys.readouterr().out
    run = run_of(E, store, sae)
    run.get_model = lambda: pytest.fail("the model is asked for again")
    assert E.controls(run) == first
    assert "computing" not in capsys.readouterr().out
    E.controls(run_of(E, store, sae, model, (2, 1)))            # the control of detection is of its live latents
    assert "computing" in capsys.readouterr().out
    wider = E.SAE(D_IN, 48, 4)
    assert E.controls(run_of(E, store, wider, model)).metrics["ce_model"] == first.metrics["ce_model"]
    assert "computing" in capsys.readouterr().out


def test_controls_leave_the_run_as_it_was(E, model, spoken):
    """The untrained SAE among them is drawn with its own seed and touches neither the SAE nor the model."""
    store, sae = spoken(), noisy(E)
    before = [p.clone() for p in [*sae.parameters(), *model.parameters()]]
    found = E.controls(run_of(E, store, sae, model))
    assert all(torch.equal(a, b) for a, b in zip(before, [*sae.parameters(), *model.parameters()]))
    torch.manual_seed(0)
    untrained = E.TopK(D_IN, 64, 4).eval()
    wanted = E.explained_by(untrained, store, E.variance_by_position(store)[1])
    assert found.metrics["untrained_explained_variance"] == pytest.approx(wanted)
