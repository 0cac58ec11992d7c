"""temporal's attention and temporal_context's buffer against naive loops."""
import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from small_saes import (
    attending, batch_of, close, D_SAE, doubles, gradients, K, make, padding, random_batch)

# ---- temporal ----
def attended(E, sae, x, mask=None):
    """Pre-activations by the docstring's equation: loops over rows, positions, heads and windows, in float64."""
    p, (rows, seq, _) = doubles(sae), x.shape
    before, width = E.WINDOW - 1 if E.ATTENTION == "causal" else E.WINDOW // 2, E.HEAD_WIDTH
    x, pre = x.double(), torch.zeros(rows, seq, D_SAE, dtype=torch.float64)
    for row, t in itertools.product(range(rows), range(seq)):
        if mask is not None and not mask[row, t]:
            continue
        places = [s for s in range(t - before, t - before + E.WINDOW)
                  if 0 <= s < seq and (mask is None or mask[row, s])]
        here = (x[row, t] - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
        for head in range(E.HEADS):
            part = slice(head * width, (head + 1) * width)
            inputs = [x[row, s] + (p["P"][s - t + before] if "P" in p else 0.0) for s in places]
            scores = [(x[row, t] @ p["W_q"][:, part]) @ (y @ p["W_k"][:, part]) / math.sqrt(width) for y in inputs]
            a = torch.stack(scores).softmax(0)
            context = sum(weight * (y - p["b_dec"]) for weight, y in zip(a, inputs))
            here = here + torch.tanh(p["gate"][head]) * (context @ p["W_enc"])
        pre = pre.index_put((torch.tensor(row), torch.tensor(t)), here)
    return pre, p


KINDS_OF_ATTENTION = [dict(HEADS=1), dict(HEADS=2), dict(HEADS=2, HEAD_WIDTH=3, WINDOW=3), dict(WINDOW=1),
                      dict(ATTENTION="centred"), dict(ATTENTION="centred", HEADS=2, WINDOW=3), dict(WINDOW=20),
                      dict(ABLATE=("positions",)), dict(ABLATE=("positions",), HEADS=2, ATTENTION="centred")]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("constants", KINDS_OF_ATTENTION, ids=str)
def test_attention_is_its_equation(E, settings, constants, padded):
    """Latents, and the gradients of all parameters."""
    settings(**{"HEAD_WIDTH": 4} | constants)
    sae, mask = attending(E, everything=True), padding(3) if padded else None
    batch = random_batch(E, rows=3, mask=mask)
    x = batch.x if mask is None else torch.where(mask[..., None], batch.x, 30.0)
    pre, p = attended(E, sae, x, mask)
    got, wanted = sae.encode(batch._replace(x=x)).dense(), pre.clamp_min(0)
    close(got.detach(), wanted.detach())
    plain = F.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
    assert (got - plain)[wanted > 0].abs().max() > 0.1          # the attention shows
    weight = torch.randn(3, 9, D_SAE, generator=torch.Generator().manual_seed(3))
    own = {n: q for n, q in sae.named_parameters() if n != "W_dec"}
    assert len(own) == 3 + (3 if "ABLATE" in constants else 4)
    grads = gradients((got * weight).sum(), own)
    for name, grad in gradients((wanted * weight).sum(), {n: p[n] for n in own}).items():
        close(grads[name], grad, 1e-4, what=f"gradient of {name}")
        assert grad.any() or E.WINDOW == 1 and name in ("W_q", "W_k", "P"), name


@pytest.mark.parametrize("attention", ["causal", "centred"])
def test_attention_weights_sum_to_1_and_leave_the_outside_out(E, settings, attention):
    settings(ATTENTION=attention, HEADS=2)
    sae, mask = attending(E), padding()
    x = torch.where(mask[..., None], random_batch(E).x, 30.0)
    weights = sae.attention(batch_of(E, x, mask))[0].view(4, 9, 2, 5)
    before, lengths = 4 if attention == "causal" else 2, mask.sum(1)
    for row in range(4):
        for t in range(lengths[row]):
            places = torch.arange(5) + t - before
            inside = (places >= 0) & (places < lengths[row])
            w = weights[row, t]
            assert torch.allclose(w.sum(-1), torch.ones(2), atol=1e-6)
            assert not w[:, ~inside].any() and (w[:, inside] > 0).all()


@pytest.mark.parametrize("constants, before, after", [
    (dict(), 4, 0), (dict(WINDOW=2), 1, 0), (dict(WINDOW=1), 0, 0), (dict(HEADS=2, WINDOW=3), 2, 0),
    (dict(ATTENTION="centred"), 2, 2), (dict(ATTENTION="centred", WINDOW=3, HEADS=2), 1, 1)])
def test_attention_sees_its_window_alone(E, settings, constants, before, after):
    """Gradients of the latents at (row, t): nothing of other rows, of the future, or beyond the window."""
    settings(**constants)
    sae, x = attending(E, everything=True), random_batch(E, seq=12).x.requires_grad_()
    for row, t in ((0, 0), (1, 2), (2, 7), (3, 11)):
        weight = torch.randn(D_SAE, generator=torch.Generator().manual_seed(t))
        z = sae.encode(batch_of(E, x)).dense()
        reached = torch.autograd.grad(z[row, t] @ weight, x)[0].any(-1)
        wanted = torch.zeros(4, 12, dtype=torch.bool)
        wanted[row, max(0, t - before):t + after + 1] = True
        assert torch.equal(reached, wanted)


@pytest.mark.parametrize("window, attention, before", [(5, "causal", 4), (3, "centred", 1), (1, "centred", 0)])
def test_the_window_is_that_of_the_constants(edited, window, attention, before):
    """As an agent edits them; a buffer of temporal_context is another matter."""
    module = edited(WINDOW=window, ATTENTION=attention, BUFFER=6)
    for variant, wanted in ((module.Temporal, (window, before)), (module.TemporalContext, (6, 5))):
        sae = variant(4, 8, 2)
        assert (sae.window, sae.before) == wanted and sae.P.shape == (wanted[0], 4)


def test_padding_does_not_reach_the_tokens_before_it(E, settings):
    settings(ATTENTION="centred")
    sae, mask = attending(E, everything=True), padding()
    batch = random_batch(E, mask=mask)
    got = [sae.encode(batch._replace(x=torch.where(mask[..., None], batch.x, rubbish))).dense()
           for rubbish in (0.0, 30.0)]
    assert torch.equal(*got) and not got[0][~mask].any()


@pytest.mark.parametrize("constants", KINDS_OF_ATTENTION, ids=str)
def test_gates_start_shut(E, settings, constants):
    """Until a gate opens, the encoder computes what it computes without attention."""
    settings(**constants)
    sae = make(E, "temporal").eval()
    sae.threshold.fill_(-1e8)
    for mask in (None, padding()):
        batch = random_batch(E, mask=mask)
        sae.attends = False
        wanted = sae.encode(batch).dense()
        sae.attends = True
        assert not sae.gate.any()
        close(sae.encode(batch).dense().detach(), wanted.detach(), 1e-6)


def test_the_second_stage_begins_with_the_function_that_the_first_one_learned(E):
    """The same losses; then the gates open, and everything behind them learns."""
    sae = make(E, "temporal")
    first, second, third = E.curriculum_of(sae)
    sae.dead_after.fill_(100)
    sae.tokens_since_fired[:10] = 1000
    batch, found, trained = random_batch(E), [], []
    for stage in (first, second):
        trial = copy.deepcopy(sae)
        optimizer = E.ContiguousAdam(trial, 1e-2)
        torch.manual_seed(0)
        found.append(E.train_step(trial, optimizer, batch, stage, 0.0))
        trained.append((trial, optimizer))
    assert found[0]["auxk"] > 0
    for name in found[0]:
        assert found[1][name].item() == pytest.approx(found[0][name].item(), rel=1e-5), name
    assert set(found[1]) - set(found[0]) == {"consistency"}      # followed from here on, not weighed
    assert not trained[0][0].gate.any() and trained[1][0].gate.any()
    trial, optimizer = trained[1]
    start = copy.deepcopy(trial.state_dict())
    E.train_step(trial, optimizer, batch, second, 0.5)
    for name in ("gate", "W_q", "W_k", "P"):
        assert not torch.equal(trial.state_dict()[name], start[name]), name
    binding = {"consistency", "contrastive"}
    assert not binding & set(second.weights) and binding <= set(third.weights)
    assert binding <= set(E.train_step(trial, optimizer, batch, third, 0.0))


def test_the_first_stage_computes_no_attention(E, monkeypatch):
    sae = make(E, "temporal")

    def attention(batch):
        raise AssertionError("attention is computed")
    monkeypatch.setattr(sae, "attention", attention)
    first, second, third = E.curriculum_of(sae)
    E.train_step(sae, E.ContiguousAdam(sae, 1e-2), random_batch(E), first, 0.0)
    sae.eval().encode(random_batch(E))
    for stage in (second, third):
        with pytest.raises(AssertionError, match="attention is computed"):
            E.train_step(sae.train(), E.ContiguousAdam(sae, 1e-2), random_batch(E), stage, 0.0)


def test_ablated_attention_leaves_batch_topk(E, settings):
    settings(ABLATE=("attention",))
    sae, plain = make(E, "temporal"), make(E, "batch_topk")
    sae.attends = True
    assert {n for n, _ in sae.named_parameters()} == {n for n, _ in plain.named_parameters()}
    assert sae.parameters_of_interest() == {}
    batch = random_batch(E, mask=padding())
    assert torch.equal(sae.encode(batch).dense(), plain.encode(batch).dense())


@pytest.mark.parametrize("ablate", [(), ("positions",)])
def test_the_order_within_the_window_matters_by_positions_alone(E, settings, ablate):
    settings(ABLATE=ablate)
    sae, batch = attending(E, everything=True), random_batch(E, seq=5)
    assert hasattr(sae, "P") != bool(ablate)
    other = batch._replace(x=batch.x[:, [2, 0, 3, 1, 4]])
    change = (sae.encode(batch).dense()[:, 4] - sae.encode(other).dense()[:, 4]).abs().max()
    assert change < 1e-5 if ablate else change > 1e-2


def test_latents_after_attention_are_as_sparse_as_without(E):
    sae = attending(E)
    assert sae.encode(random_batch(E)).dense().count_nonzero() == K * 4 * 9


@pytest.mark.parametrize("heads", [1, 2])
def test_gates_of_interest(E, settings, heads):
    settings(HEADS=heads)
    sae = attending(E)
    assert sae.parameters_of_interest() == {"gate": pytest.approx(sae.gate.detach().tanh().abs().mean().item())}


# ---- temporal_context ----
def opened(E, seed=0, everything=True):
    """With open gates, attention that shows, and in evaluation a threshold that every latent passes: z = ReLU(pre)."""
    sae, g = make(E, "temporal_context", seed), torch.Generator().manual_seed(seed + 50)
    E.anneal(sae, sae.curriculum[0], 0.0)
    with torch.no_grad():
        for name, value in sae.state_dict().items():
            if name in ("W_q", "W_k", "P"):
                value.mul_(5.0)
        sae.gate.copy_(torch.randn(sae.gate.shape, generator=g))
    if everything:
        sae.eval().threshold.fill_(-1e8)
    return sae


@pytest.mark.parametrize("places", ["learned", "sinusoidal"])
@pytest.mark.parametrize("padded", [False, True])
def test_context_begins_as_batch_topk(E, settings, padded, places):  # noqa: F811
    settings(BUFFER_POSITIONS=places)
    sae, plain = make(E, "temporal_context"), make(E, "batch_topk")
    plain.load_state_dict({n: v for n, v in sae.state_dict().items() if n in plain.state_dict()})
    batch = random_batch(E, mask=padding() if padded else None)
    stage, = sae.curriculum
    E.anneal(sae, stage, 0.0)
    assert stage.epochs == 20 and "consistency" not in stage.weights and "contrastive" not in stage.weights
    for mode in (True, False):
        got, wanted = (one.train(mode).encode(batch).dense().detach() for one in (sae, plain))
        assert wanted.any() and torch.equal(got > 0, wanted > 0)
        close(got, wanted, 1e-6)
    E.train_step(sae.train(), E.ContiguousAdam(sae, 1e-2), batch, stage, 0.0)
    assert sae.gate.any()                                       # from the first step on


@pytest.mark.parametrize("buffer", [1, 2, 4, 6])
def test_latents_see_their_buffer_alone(E, edited, buffer):  # noqa: F811
    """Gradients of the latents at (row, t): positions t - BUFFER + 1 to t of that row."""
    module = E if buffer == E.BUFFER else edited(BUFFER=buffer)
    sae, x = opened(module), random_batch(module, seq=12).x.requires_grad_()
    for row, t in ((0, 0), (1, 2), (2, 7), (3, 11)):
        weight = torch.randn(D_SAE, generator=torch.Generator().manual_seed(t))
        z = sae.encode(batch_of(module, x)).dense()
        reached = torch.autograd.grad(z[row, t] @ weight, x)[0].any(-1)
        wanted = torch.zeros(4, 12, dtype=torch.bool)
        wanted[row, max(0, t - buffer + 1):t + 1] = True
        assert torch.equal(reached, wanted)


def test_padding_is_in_no_buffer(E):
    """Neither the padding at a row's end nor positions before it that do not count (TRAIN_POSITIONS)."""
    sae, mask = opened(E), padding()
    mask[0, :3] = False
    x = random_batch(E).x.requires_grad_()
    z = sae.encode(batch_of(E, x, mask)).dense()
    assert not z[~mask].any()
    reached = torch.autograd.grad(z[mask].square().sum(), x)[0].any(-1)
    assert torch.equal(reached, mask)
    rubbish = torch.where(mask[..., None], x, 30.0)
    assert torch.equal(sae.encode(batch_of(E, rubbish, mask)).dense(), z)
    alone = sae.encode(batch_of(E, x[:1, 3:])).dense()          # as if the row began there
    close(z[:1, 3:].detach(), alone.detach(), 1e-6)


def test_sinusoidal_positions_by_hand(E, settings):  # noqa: F811
    settings(BUFFER_POSITIONS="sinusoidal")
    P = E.TemporalContext(4, 8, 2).P
    wanted = [[f(at * rate) / math.sqrt(2) for f in (math.sin, math.cos) for rate in (1, 0.01)] for at in range(4)]
    assert P.tolist() == [pytest.approx(row, abs=1e-6) for row in wanted]
    for d_in in (2, 10, 192):
        P = E.TemporalContext(d_in, 8, 2).P
        assert P.shape == (4, d_in) and torch.allclose(P.norm(dim=1), torch.ones(4), atol=1e-5)
        assert torch.cdist(P, P).add(torch.eye(4)).min() > 1e-2
    assert E.TemporalContext(5, 8, 2).P.shape == (4, 5)


@pytest.mark.parametrize("places", ["learned", "sinusoidal"])
def test_learned_positions_learn_and_fixed_ones_do_not(E, settings, places, tmp_path):  # noqa: F811
    settings(BUFFER_POSITIONS=places)
    learned = places == "learned"
    sae = opened(E, everything=False)
    assert ("P" in dict(sae.named_parameters())) == learned and sae.P.requires_grad == learned
    assert "P" in sae.state_dict()
    before, optimizer = sae.P.detach().clone(), E.ContiguousAdam(sae, 1e-2)
    for _ in range(3):
        E.train_step(sae, optimizer, random_batch(E), sae.curriculum[0], 0.5)
    assert torch.equal(sae.P, before) != learned
    torch.save(sae.state_dict(), tmp_path / "checkpoint.pt")
    other = opened(E, seed=1)
    other.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    other.threshold.fill_(-1e8)
    sae.eval().threshold.fill_(-1e8)
    assert torch.equal(other.P, sae.P)
    assert torch.equal(other.encode(random_batch(E)).dense(), sae.encode(random_batch(E)).dense())


@pytest.mark.parametrize("places, ablate", [("learned", ()), ("sinusoidal", ()), ("learned", ("positions",)),
                                            ("sinusoidal", ("positions",))])
def test_order_in_the_buffer_matters_by_positions_alone(E, settings, places, ablate):  # noqa: F811
    settings(BUFFER_POSITIONS=places, ABLATE=ablate)
    sae, batch = opened(E), random_batch(E, seq=4)
    assert ("P" in sae.state_dict()) != bool(ablate)
    other = batch._replace(x=batch.x[:, [2, 0, 1, 3]])
    change = (sae.encode(batch).dense()[:, 3] - sae.encode(other).dense()[:, 3]).abs().max()
    assert change < 1e-5 if ablate else change > 1e-2


@pytest.mark.parametrize("places", ["learned", "sinusoidal"])
def test_without_attention_a_buffer_leaves_batch_topk(E, settings, places):  # noqa: F811
    settings(ABLATE=("attention",), BUFFER_POSITIONS=places)
    sae, plain = make(E, "temporal_context"), make(E, "batch_topk")
    E.anneal(sae, sae.curriculum[0], 0.5)
    assert set(sae.state_dict()) == set(plain.state_dict()) and sae.parameters_of_interest() == {}
    batch = random_batch(E, mask=padding())
    assert torch.equal(sae.encode(batch).dense(), plain.encode(batch).dense())
