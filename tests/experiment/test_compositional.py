"""The compositional SAE against a naive form of its equation."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F

D_IN, D_SAE, K = 12, 48, 6


def make(E, ablate=(), monkeypatch=None, gate=0.7, seed=0):
    if monkeypatch:
        monkeypatch.setattr(E, "ABLATE", ablate)
    torch.manual_seed(seed)
    sae = E.SAE_VARIANTS["compositional"](D_IN, D_SAE, K)
    with torch.no_grad():
        sae.b_enc.normal_(0, 0.1)
        sae.b_dec.normal_(0, 0.1)
        sae.W_c *= 10                                        # as large as features
        if hasattr(sae, "gate"):
            sae.gate.fill_(gate)
    return sae.eval()


def make_batch(E, batch=4, seq=5, seed=1, mask=None):
    x = torch.randn(batch, seq, D_IN, generator=torch.Generator().manual_seed(seed))
    return E.Batch(x, torch.zeros(batch, seq, dtype=torch.long), torch.arange(batch), torch.arange(1, seq + 1), mask)


def naive(E, sae, x):
    """z of one token x [d_in], with loops over its features: the equation of the docstring."""
    pre, heads = (x - sae.b_dec) @ sae.W_enc + sae.b_enc[:sae.d_f], E.COMPOSITION_HEADS
    f = torch.zeros_like(pre)
    top = pre.topk(K).indices
    f[top] = F.relu(pre[top])
    active = [i for i in range(sae.d_f) if f[i] > 0]
    u = {i: f[i] * sae.E[i] for i in active}
    total = sum(u.values())
    queries, keys, values = ({i: u[i] @ W for i in active} for W in (sae.W_q, sae.W_k, sae.W_v))
    for i in active:
        parts = []
        for h in range(heads):
            part = slice(h * sae.W_q.shape[1] // heads, (h + 1) * sae.W_q.shape[1] // heads)
            q = queries[i][part]
            scores = torch.stack([q @ keys[j][part] for j in active]) / math.sqrt(len(q))
            parts.append(sum(w * values[j][part] for w, j in zip(scores.softmax(0), active)))
        total = total + sae.gate.tanh() * torch.cat(parts) @ sae.W_o
    c = F.relu(total @ sae.W_c + sae.b_enc[sae.d_f:])
    if "slots" in E.ABLATE:
        kept = torch.cat([f, c]).topk(K).indices.tolist()
    else:                                                    # the largest compositions, then features
        first = [sae.d_f + int(i) for i in c.topk(max(1, round(K * E.COMPOSITION_SLOTS))).indices if c[i] > 0]
        kept = first + f.topk(K - len(first)).indices.tolist()
    z = torch.zeros(D_SAE)
    z[kept] = torch.cat([f, c])[kept]
    return z


@torch.no_grad()
@pytest.mark.parametrize("ablate", [(), ("slots",)])
def test_latents_equal_the_naive_form(E, monkeypatch, ablate):
    sae, batch = make(E, ablate, monkeypatch), make_batch(E)
    z = sae.encode(batch).dense()
    for row in range(2):
        for t in range(2):
            torch.testing.assert_close(z[row, t], naive(E, sae, batch.x[row, t]), atol=1e-5, rtol=1e-4)
    assert (z[..., sae.d_f:] > 0).any() and (z[..., :sae.d_f] > 0).any()


@torch.no_grad()
@pytest.mark.parametrize("ablate", [(), ("attention",)])
def test_what_the_page_shows_beside_a_latent(E, monkeypatch, ablate):
    """Of a feature the compositions that read it, of a composition its features, both by E W_c; attention from a feature,
    or from all features of a token, where the latent fires; against loops."""
    sae, batch = make(E, ablate, monkeypatch), make_batch(E)
    z, reads = sae.encode(batch).dense(), sae.E @ sae.W_c
    alive = (z > 0).any(1).any(0).nonzero().flatten()
    latents = torch.cat([alive[alive < sae.d_f][:3], alive[alive >= sae.d_f][:2], torch.tensor([D_SAE - 1])])
    found = sae.related(latents.numpy(), batch, (z[..., latents] > 0).float())
    assert (latents >= sae.d_f).sum() == 3 and (latents < sae.d_f).sum() == 3
    (ids, f), fires = sae.features(batch), z.flatten(0, 1) > 0
    for latent, rows in zip(latents.tolist(), found):
        first, weights = (sae.d_f, reads[latent]) if latent < sae.d_f else (0, reads[:, latent - sae.d_f])
        shown = rows.pop("compositions that read it" if first else "features that it reads")
        wanted = sorted(((w, first + i) for i, w in enumerate(weights.tolist()) if w > 0), reverse=True)[:12]
        assert [name for name, _ in shown] == [name for _, name in wanted]
        assert [w for _, w in shown] == pytest.approx([w for w, _ in wanted])
        if ablate:
            assert not rows
            continue
        total = torch.zeros(sae.d_f)
        for token in fires[:, latent].nonzero().flatten().tolist():
            weights = sae.attention(ids[token, None], f[token, None])[0]
            for place in range(K):
                if f[token, place] > 0 and (latent >= sae.d_f or ids[token, place] == latent):
                    for head in weights[:, place]:
                        total.index_add_(0, ids[token], head)
        assert dict(rows.pop("attention where it fires")) == pytest.approx(
            {i: total[i].item() / total.sum().item() for i in total.argsort(descending=True)[:12].tolist() if total[i] > 0}, rel=1e-4)
        assert not rows


@torch.no_grad()
def test_attention_never_crosses_tokens_or_rows(E):
    sae, batch = make(E), make_batch(E)
    z, order = sae.encode(batch).dense(), torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(sae.encode(batch._replace(x=batch.x[order])).dense(), z[order])
    back = batch._replace(x=batch.x.flip(1))
    torch.testing.assert_close(sae.encode(back).dense(), z.flip(1))
    x = batch.x.clone()
    x[1, 2] += 1
    changed = (sae.encode(batch._replace(x=x)).dense() - z).abs().amax(-1) > 1e-5
    assert changed[1, 2] and changed.sum() == 1


@torch.no_grad()
def test_gate_at_zero_is_the_form_without_attention(E, monkeypatch):
    batch, sae = make_batch(E), make(E, gate=0.0)
    ids, f = sae.features(batch)
    plain = F.relu(torch.einsum("nk,nkw->nw", f, sae.E[ids]) @ sae.W_c + sae.b_enc[sae.d_f:])
    torch.testing.assert_close(sae.compose(ids, f), plain)
    with_gate = copy.deepcopy(sae)
    with_gate.gate.fill_(1.0)
    assert not torch.allclose(with_gate.compose(ids, f), plain, atol=1e-3)


@torch.no_grad()
def test_each_component_can_be_switched_off(E, monkeypatch):
    batch = make_batch(E)
    whole = make(E)
    ids, f = whole.features(batch)
    z = whole.encode(batch)
    bare = make(E, ("attention",), monkeypatch)
    assert not {"W_q", "W_k", "W_v", "W_o", "gate"} & {name for name, _ in bare.named_parameters()}
    assert bare.parameters_of_interest() == {}
    ungated = make(E, ("gate",), monkeypatch)
    assert not hasattr(ungated, "gate")
    ungated.load_state_dict({k: v for k, v in whole.state_dict().items() if k != "gate"})
    whole.gate.fill_(20.0)                                   # tanh = 1
    c = ungated.compose(ids, f)
    monkeypatch.setattr(E, "ABLATE", ())
    torch.testing.assert_close(c, whole.compose(ids, f))
    dense = make(E, ("bottleneck",), monkeypatch)
    assert len(dense.encode(batch).active()[0]) > len(z.active()[0])
    everything = dense.encode(batch).dense()[..., dense.d_f:].flatten(0, 1)
    torch.testing.assert_close(everything, dense.compose(*dense.features(batch)))


def test_k_anneals_and_combinations_grow(E):
    sae, batch, (first, second) = make(E), make_batch(E), E.curriculum_of(E.Compositional)
    seen = []
    for stage, done in ((first, 0.0), (first, 0.4), (first, 0.7), (first, 0.999), (second, 0.0)):
        E.anneal(sae, stage, done)
        z = sae.encode(batch)
        seen.append((sae.n_kept(), len(z.values) // 20, sae.combined))
    assert [row[0] for row in seen] == [16, 14, 9, 6, 6] and [row[2] for row in seen] == [2, 3, 4, 4, None]
    assert all(kept == width for width, kept, _ in seen)
    E.anneal(sae, first, 0.999)                              # k is as later: what differs is who attends
    ids, f = sae.features(batch)
    few = sae.compose(ids, f)
    sae.combined = None
    assert not torch.allclose(few, sae.compose(ids, f), atol=1e-4)


@torch.no_grad()
def test_padding_is_silent(E):
    mask = torch.arange(5) < torch.tensor([5, 2, 4, 1])[:, None]
    sae = make(E)
    sae.b_enc.fill_(1.0)
    z = sae.encode(make_batch(E, mask=mask)).dense()
    assert not z[~mask].any() and z[mask].any(-1).all()
