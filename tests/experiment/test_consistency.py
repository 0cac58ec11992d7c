"""Consistency, contrastive losses and tsae against loops; training on some positions."""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from small_saes import adaptive, attending, close, D_SAE, gradients, make, padding, random_batch

# ---- Consistency ----
def both(E, batch, z):
    """Returns the loss and the gap, as numbers."""
    with torch.no_grad():
        return E.consistency(batch, z).item(), E.consistency_gap(batch, z).item()


def unit(z, n_high):
    """Codes of the first n_high latents, of norm 1 where there are any."""
    return F.normalize(torch.as_tensor(z)[..., :n_high], dim=-1)


def test_consistency_by_hand(E):
    """Two of three latents are bound. Row 0: cos 45 degrees, then an empty code; row 1: cos 1, then 0."""
    z = torch.tensor([[[1.0, 0, 9], [1, 1, 0], [0, 0, 7]], [[0, 2, 0], [0, 1, 5], [4, 0, 0]]], requires_grad=True)
    batch, half = random_batch(E, rows=2, seq=3), 0.5 ** 0.5
    cosine = (half + 1 + 0) / 3
    loss, gap = both(E, batch, unit(z, 2))
    assert loss == pytest.approx(1 - cosine)
    assert gap == pytest.approx(cosine - (0 + half) / 2)                    # the third has an empty code
    same = batch._replace(doc_ids=torch.tensor([3, 3]))
    assert both(E, same, unit(z, 2))[1] == pytest.approx(cosine)            # one document: nothing to compare with
    grad = torch.autograd.grad(E.consistency(batch, unit(z, 2)), z)[0]
    assert grad[..., :2].any() and not grad[..., 2].any()


def test_consistency_against_a_loop(E):
    g = torch.Generator().manual_seed(0)
    z = torch.rand(5, 7, 12, generator=g) * (torch.rand(5, 7, 12, generator=g) < 0.25)
    docs, n_high = [4, 4, 1, 0, 4], 6
    near, far = [], []
    for row, t in itertools.product(range(5), range(7)):
        code = z[row, t, :n_high]
        if t and code.any() and z[row, t - 1, :n_high].any():
            near.append(F.cosine_similarity(code, z[row, t - 1, :n_high], dim=0))
        other = z[row - 2, t, :n_high]              # half of the rows away
        if docs[row] != docs[row - 2] and code.any() and other.any():
            far.append(F.cosine_similarity(code, other, dim=0))
    assert 10 < len(near) < 30 and 5 < len(far) <= 21
    loss, gap = both(E, random_batch(E, rows=5, seq=7, doc_ids=docs), unit(z, n_high))
    near_mean, far_mean = torch.stack(near).mean().item(), torch.stack(far).mean().item()
    assert loss == pytest.approx(1 - near_mean, abs=1e-6)
    assert gap == pytest.approx(near_mean - far_mean, abs=1e-6)


def test_the_gap_shows_a_collapse(E):
    """The same code everywhere is perfectly consistent, and its gap is 0; a code for each document has a gap of 1."""
    constant = torch.tensor([0.0, 2.0, 1.0, 0.0]).expand(4, 6, 4)
    assert both(E, random_batch(E, seq=6), unit(constant, 3)) == pytest.approx((0, 0), abs=1e-6)
    of_document = torch.eye(4)[:, None].expand(4, 6, 4)
    assert both(E, random_batch(E, seq=6), unit(of_document, 4)) == pytest.approx((0, 1), abs=1e-6)


def test_nothing_active_is_no_division_by_zero(E):
    z = torch.zeros(2, 4, 6, requires_grad=True)
    batch = random_batch(E, rows=2, seq=4)
    E.consistency(batch, unit(z, 3)).backward()
    assert all(map(math.isfinite, both(E, batch, unit(z, 3)))) and torch.isfinite(z.grad).all()


@pytest.mark.parametrize("fraction", [0.2, 0.5, 1.0])
def test_temporal_binds_the_first_latents(E, settings, fraction):
    """By consistency and by contrast of unit codes; not before the last stage."""
    given = []

    def contrastive(batch, z, span, *rest):
        given.append((z, span))
        return z.sum()
    settings(CONSISTENT_FRACTION=fraction, CONTRAST_SPAN=3, contrastive=contrastive)
    sae, batch = make(E, "temporal"), random_batch(E, mask=padding())
    sae.attends, sae.binds, sae.gate.data[:] = True, True, 0.1
    latents, n_high = sae.encode(batch), round(fraction * D_SAE)
    losses, high = sae.losses(batch, latents), latents.dense()[..., :n_high]
    close(losses["consistency"].detach(), E.consistency(batch, unit(high, n_high)).detach())
    (z, span), = given
    assert span == 3 and z.shape == (4, 9, n_high)
    close(z.detach(), unit(high, n_high).detach())
    plain = {"reconstruction", "sparsity", "auxk"}
    assert set(losses) == plain | {"consistency", "contrastive"}
    sae.binds = False
    assert set(sae.losses(batch, latents)) == plain | {"consistency"}
    sae.attends = False
    assert set(sae.losses(batch, latents)) == plain


# ---- Contrastive loss and TSAE ----
def info_nce(z, docs, keep, earlier, far=math.inf):
    """Symmetric InfoNCE of all pairs (row, t) -> (row, earlier[row, t]), both of which count, by a double loop;
    against other documents, and what is more than `far` away in the same row."""
    z = z.double()
    places = [(row, t, int(earlier[row, t])) for row in range(len(z)) for t in range(1, z.shape[1])
              if keep[row, t] and keep[row, earlier[row, t]]]
    loss = 0.0
    for i, (row, t, before) in enumerate(places):
        forward, backward, own = [], [], z[row, t] @ z[row, before]
        for j, (other, s, s_before) in enumerate(places):
            if i == j or docs[other] != docs[row] or other == row and abs(s - t) > far:
                forward.append(z[row, t] @ z[other, s_before])
                backward.append(z[other, s] @ z[row, before])
        loss = loss - 2 * own + torch.stack(forward).logsumexp(0) + torch.stack(backward).logsumexp(0)
    return loss / len(places) / 2


def drawn_places(seed, rows, seq, span):
    """The earlier positions that this seed draws: [rows, seq], the first column unused."""
    torch.manual_seed(seed)
    t = torch.arange(1, seq)
    return F.pad(t - 1 - (torch.rand(rows, seq - 1) * t.clamp_max(span)).long(), (1, 0))


KEEPS = {"all": torch.ones(3, 7, dtype=torch.bool), "padded": torch.arange(7) < torch.tensor([7, 3, 5])[:, None],
         "positions": ((torch.arange(7) >= 2) & (torch.arange(7) < 6)).expand(3, 7)}    # as TRAIN_POSITIONS makes it


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("docs", [[0, 1, 2], [5, 2, 5]], ids=str)
@pytest.mark.parametrize("span", [1, 3, 7])
def test_contrastive_loss_against_a_double_loop(E, span, docs, keep):
    """Random earlier positions at most `span` back; padding counts in no place, whatever stands there."""
    g, keep = torch.Generator().manual_seed(0), KEEPS[keep]
    z = torch.rand(3, 7, 6, generator=g) * (torch.rand(3, 7, 6, generator=g) < 0.5)
    z = torch.where(keep[..., None], z, torch.rand(3, 7, 6, generator=g)).requires_grad_()   # rubbish at padding
    earlier = drawn_places(11, 3, 7, span)
    assert (earlier[:, 1:] >= torch.arange(1, 7) - span).all() and (earlier[:, 1:] < torch.arange(1, 7)).all()
    batch = random_batch(E, rows=3, seq=7, mask=None if keep.all() else keep, doc_ids=docs)
    wanted = info_nce(z, docs, keep, earlier)
    assert wanted > 0.1
    torch.manual_seed(11)
    got = E.contrastive(batch, z, span)
    assert got.item() == pytest.approx(wanted.item(), rel=1e-4)
    close(*(torch.autograd.grad(loss, z)[0] for loss in (got, wanted)), 1e-4)


@pytest.mark.parametrize("keep", ["all", "padded"])
@pytest.mark.parametrize("span, far", [(1, 2), (3, 3), (2, 6)])
def test_far_positions_of_the_same_window_are_negatives_where_asked(E, span, far, keep):
    z, keep = torch.rand(3, 7, 6, generator=torch.Generator().manual_seed(0)), KEEPS[keep]
    for docs in ([0, 1, 2], [5, 5, 5]):             # never other windows of the document
        wanted = info_nce(z, docs, keep, drawn_places(7, 3, 7, span), far)
        batch = random_batch(E, rows=3, seq=7, mask=None if keep.all() else keep, doc_ids=docs)
        torch.manual_seed(7)
        assert E.contrastive(batch, z, span, far).item() == pytest.approx(wanted.item(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("span", [1, 9])
def test_windows_of_one_document_are_no_negatives(E, span):
    z = torch.rand(4, 9, 6, generator=torch.Generator().manual_seed(0))
    assert E.contrastive(random_batch(E, doc_ids=[2, 2, 2, 2]), z, span).item() == pytest.approx(0, abs=1e-6)
    assert E.contrastive(random_batch(E), z, span).item() > 0.5


def test_contrastive_loss_by_hand(E):
    """Two documents with a code each: cosines 1 within, 0 across, three anchors each."""
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0]])[:, None].expand(2, 4, 2)
    got = E.contrastive(random_batch(E, rows=2, seq=4), z, 1).item()
    assert got == pytest.approx(math.log((math.e + 3) / math.e), rel=1e-5)


@pytest.mark.parametrize("reading", ["paper", "code"])
def test_tsae_losses(E, settings, reading):
    """Errors of the first fifth and of all; the contrast of the first fifth, in the two readings."""
    settings(TSAE_READING=reading)
    sae, batch = make(E, "tsae"), random_batch(E, mask=padding(), doc_ids=[0, 1, 1, 2])
    latents = sae.encode(batch)
    earlier = drawn_places(7, 4, 9, 1 if reading == "paper" else 9)
    torch.manual_seed(7)
    losses = sae.losses(batch, latents)
    assert set(losses) == {"reconstruction", "auxk", "contrastive", "consistency"}
    z = latents.dense()
    high = z[..., :D_SAE // 5]
    code = F.normalize(high, dim=-1) if reading == "paper" else high
    wanted = info_nce(code, [0, 1, 1, 2], batch.mask, earlier)
    assert losses["contrastive"].item() == pytest.approx(wanted.item(), rel=1e-4)
    errors = [(batch.x - z[..., :n] @ sae.W_dec[:n] - sae.b_dec)[batch.mask].square().sum(-1).mean()
              for n in (D_SAE // 5, D_SAE)]
    weight = E.curriculum_of(sae)[0].weights["reconstruction"]
    assert (weight * losses["reconstruction"]).item() == pytest.approx(sum(errors).item(), rel=1e-5)


# ---- Training on some positions ----
def test_only_positions(E, settings):
    batch = random_batch(E)
    assert E.only_positions(batch) is batch
    settings(TRAIN_POSITIONS=(3, 5))
    inside = torch.tensor([False, False, True, True, True, False, False, False, False])
    kept = E.only_positions(batch)
    assert torch.equal(kept.mask, inside.expand(4, 9)) and kept.x is batch.x
    both = E.only_positions(batch._replace(mask=padding()))
    assert torch.equal(both.mask, inside & padding())
    assert both.mask.sum(1).tolist() == [3, 2, 3, 0] and E.n_tokens(both) == 8


@pytest.mark.parametrize("name", ["temporal", "temporal_adaptation", "tsae", "standard"])
def test_other_positions_have_no_say_in_training(E, settings, name):
    """Losses and gradients are the same whatever stands at the positions left out."""
    settings(TRAIN_POSITIONS=(3, 7))
    batch, found = random_batch(E), []
    inside = (torch.arange(1, 10) >= 3) & (torch.arange(1, 10) <= 7)
    for rubbish in (0.0, 5.0):
        sae = {"temporal": attending, "temporal_adaptation": adaptive}.get(name, lambda E: make(E, name))(E)
        part = E.only_positions(batch._replace(x=torch.where(inside[:, None], batch.x, rubbish)))
        latents = sae.encode(part)
        assert not latents.dense()[:, ~inside].any() and latents.dense()[:, inside].any()
        losses = sae.losses(part, latents)
        found.append((losses, gradients(losses["reconstruction"], dict(sae.named_parameters()))))
    for a, b in zip(*found):
        assert all(torch.equal(a[key], b[key]) for key in a)
