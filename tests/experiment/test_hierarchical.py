"""The hierarchical SAE against naive forms of its equations, and its training."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from made_tokenizers import Joined

D_IN = 8


@pytest.fixture
def make(E, monkeypatch):
    """make(d_sae, k, ...) -> a Hierarchical whose second level has begun; constants by name."""
    def make(d_sae=16, k=3, level=2, **constants):
        for name, value in constants.items():
            monkeypatch.setattr(E, name, value)
        torch.manual_seed(0)
        sae = E.Hierarchical(D_IN, d_sae, k)
        sae.level = level
        sae.start_level_2(a_batch(E))
        return sae
    return make


def a_batch(E, n=4, seq=6, mask=None, seed=1):
    x = torch.randn(n, seq, D_IN, generator=torch.Generator().manual_seed(seed)) / D_IN ** 0.5
    return E.Batch(x, torch.ones(n, seq, dtype=torch.long), torch.arange(n), torch.arange(1, seq + 1), mask)


# ---- The equations ----
def test_forward_by_hand(E, monkeypatch):
    """Three features, two parents, one active: features 0 and 1 have parent 0, feature 2 parent 1."""
    monkeypatch.setattr(E, "LEVEL_WIDTHS", (3, 2))
    sae = E.Hierarchical(2, 99, 1)
    assert sae.d_sae == 2 and sae.d_in == 2
    low = sae.lower
    low.W_enc.data = torch.tensor([[1.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
    low.W_dec.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    low.b_enc.data, low.b_dec.data = torch.tensor([0.0, -0.5, 0.0]), torch.tensor([1.0, 0.0])
    sae.W_enc.data = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    sae.W_dec.data = torch.tensor([[0.6, 0.8, 0.0], [0.0, 0.1, 1.0]])
    sae.b_enc.data, sae.b_dec.data = torch.tensor([1.0, -0.75]), torch.tensor([-1.0, 0.0, 0.5])
    sae.begun.fill_(True)
    sae.level = 2
    x = torch.tensor([[[3.0, 1.5], [0.0, 0.0]]])                  # x - b: (2, 1.5), (-1, 0)
    batch = E.Batch(x, torch.ones(1, 2), torch.zeros(1), torch.arange(1, 3), None)
    h = sae.levels(batch).dense()
    assert torch.equal(h, torch.tensor([[[2.0, 1.0, 0.0], [0.0, 0.0, 1.0]]]))
    # h: (2, 1, 0), (0, 0, 1); pre-activations (4, -.75), (1, 1.25)
    z = sae.encode(batch)
    torch.testing.assert_close(z.dense(), torch.tensor([[[4.0, 0.0], [0.0, 1.25]]]))
    # z W_dec + c: (1.4, 3.2, .5), (-1, .125, 1.75) -> ReLU
    wanted = torch.tensor([[[1.4 - 0.5 + 1, 3.2], [-1.75 + 1, 0.125]]])
    torch.testing.assert_close(sae.decode(z), wanted)
    assert sae.parents().tolist() == [0, 0, 1]
    torch.testing.assert_close(sae.directions(), sae.W_dec @ low.W_dec)
    found = sae.losses(batch, z)
    torch.testing.assert_close(found["reconstruction"], (x - wanted).square().sum(-1).mean())
    x_hat1 = torch.tensor([[[3.0, 1.0], [0.0, 0.0]]])
    torch.testing.assert_close(found["level_1"], (x - x_hat1).square().sum(-1).mean())
    # cos(d_0, d_1) = 0: both lack .5; feature 2 is alone. Group 0: sqrt 2 * |(2, 1)|; group 1: 1
    torch.testing.assert_close(found["cosine"], torch.tensor(0.5))
    torch.testing.assert_close(found["group"], torch.tensor((2 ** 0.5 * 5 ** 0.5 + 1) / 2))


@torch.no_grad()
def test_a_parent_is_shown_with_its_children(E, make, monkeypatch):
    """Features 0 and 1 are children of latent 0, feature 2 of latent 1, which has a part in feature 1 too; 3 is nobody's."""
    sae, batch = make(LEVEL_WIDTHS=(4, 3), k=1), a_batch(E, n=1, seq=3)
    sae.W_dec.data = torch.tensor([[0.6, 0.8, 0.0, 0.0], [0.0, 0.1, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    h = torch.tensor([[[0.0, 1.0, 3.0, 0.0], [2.0, 0.0, 1.0, 0.0], [1.0, 4.0, 0.0, 0.0]]])
    monkeypatch.setattr(sae, "levels", lambda batch: E.Latents.from_dense(h))
    monkeypatch.setattr(E, "load_tokenizer", lambda: Joined("abcdefgh".__getitem__))
    found = sae.related(np.array([0, 1, 2]), batch._replace(tokens=torch.tensor([[5, 6, 7]])), None)
    own, other = "children, features of level 1", "other features of level 1"
    assert [{title: [(name, round(weight, 4)) for name, weight in rows] for title, rows in latent.items()} for latent in found] == [
        {own: [("1 h", 0.8), ("0 g", 0.6)], other: []}, {own: [("2 f", 1.0)], other: [("1 h", 0.1)]}, {own: [], other: []}]


@pytest.mark.parametrize("cosine, wanted", [(0.9, 0.0), (0.5, 0.0), (0.2, 0.3), (-1.0, 1.5)])
def test_the_cosine_loss_of_a_pair(E, make, cosine, wanted):
    sae = make(LEVEL_WIDTHS=(3, 3), k=1)
    sae.W_dec.data = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    d = torch.zeros(3, D_IN)
    d[0, 0] = d[2, 2] = 1.0
    d[1, :2] = torch.tensor([cosine, (1 - cosine ** 2) ** 0.5])
    sae.lower.W_dec.data = d
    found = sae.grouping(a_batch(E), sae.levels(a_batch(E)))["cosine"]
    torch.testing.assert_close(found, torch.tensor(wanted), atol=1e-6, rtol=1e-5)


def test_group_loss_equals_the_naive_form_and_its_gradient_is_finite(E, make):
    sae, batch = make(), a_batch(E)
    h, parents = sae.levels(batch), sae.parents()
    dense, total = h.dense().double(), 0.0
    for p in range(sae.d_sae):
        part = dense[..., parents == p]
        total += part.shape[-1] ** 0.5 * part.norm(dim=-1).sum() / (4 * 6)
    found = sae.grouping(batch, h)["group"]
    torch.testing.assert_close(found.double(), total)
    found.backward()
    assert torch.isfinite(sae.lower.W_enc.grad).all() and sae.lower.W_enc.grad.abs().sum() > 0


def test_level_2_is_not_one_flat_dictionary(E, make):
    """The ReLU between the decoders matters: x_hat2 is not linear in the latents."""
    sae, batch = make(), a_batch(E)
    sae.start_level_2(batch, grouped=False)
    sae.b_dec.data.fill_(-0.1)
    z = sae.encode(batch).dense().detach()
    whole = sae.decode(E.Latents.from_dense(z))
    parts = [sae.decode(E.Latents.from_dense(torch.where(torch.arange(16) % 2 == i, z, 0.0))) for i in (0, 1)]
    assert (whole - sum(parts) + sae.lower.b_dec).abs().max() > 1e-3


def test_padding_and_other_rows_count_nowhere(E, make):
    sae = make().eval()
    mask = torch.arange(6) < torch.tensor([6, 2, 5, 1])[:, None]
    batch = a_batch(E, mask=mask)
    other = batch._replace(x=torch.where(mask[..., None], batch.x, 9.0))
    for (name, a), b in zip(sae.losses(batch, sae.encode(batch)).items(), sae.losses(other, sae.encode(other)).values()):
        torch.testing.assert_close(a, b, msg=name)
    assert not sae.encode(other).dense()[~mask].any()
    alone = sae.encode(batch._replace(x=batch.x[:1], mask=mask[:1], doc_ids=batch.doc_ids[:1])).dense()
    torch.testing.assert_close(alone[0], sae.encode(batch).dense()[0])


@pytest.mark.parametrize("grouped", [True, False])
def test_how_level_2_begins(E, make, grouped):
    sae = make()
    sae.start_level_2(a_batch(E), grouped)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(16))
    assert (sae.W_dec >= 0).all() and torch.equal(sae.W_enc, sae.W_dec.t())
    if grouped:
        assert ((sae.W_dec > 0).sum(0) == 1).all()                # each feature in one group, none empty
        assert np.array_equal(E.ward_groups(sae.lower.W_dec.detach().numpy(), 16), sae.parents().numpy())
    else:
        assert (sae.W_dec > 0).float().mean() > 0.9


# ---- Training ----
def trained(E, make_store, tmp_path, stages=None, **settings):
    x = torch.randn(24, 7, D_IN, generator=torch.Generator().manual_seed(0)) / D_IN ** 0.5
    store, sae = make_store(x, 16), settings.pop("sae", None) or E.Hierarchical(D_IN, 16, 3)
    stages = stages or [s._replace(epochs=2) for s in E.curriculum_of(E.Hierarchical)]
    log = E.train(sae, store, stages, 0, 4, np.inf, tmp_path / "state.pt").log
    return sae, log, store


def test_frozen_levels_keep_every_bit(E, make_store, tmp_path):
    """Stage 1 leaves level 2 alone, stage 2 level 1, with all of its buffers; stage 3 moves every parameter."""
    torch.manual_seed(0)
    seen, sae, train_step = {}, E.Hierarchical(D_IN, 16, 3), E.train_step

    def step(sae, optimizer, batch, stage, done):
        before = {name: value.clone() for name, value in sae.state_dict().items()}
        losses = train_step(sae, optimizer, batch, stage, done)
        moved = {name for name, value in sae.state_dict().items() if not torch.equal(value, before[name])}
        seen.setdefault(stage.name, []).append((moved, bool(before["begun"])))
        return losses

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(E, "train_step", step)
        patch.setattr(E, "seconds_per_step", lambda *_: [1.0] * 3)
        trained(E, make_store, tmp_path, sae=sae)
    level_1 = {name for name in sae.state_dict() if name.startswith("lower.")}
    for moved, _ in seen["level_1"]:
        assert "lower.W_dec" in moved and moved <= level_1 | {"tokens_since_fired"}
    for i, (moved, begun) in enumerate(seen["level_2"]):
        assert "W_dec" in moved and not moved & level_1
        assert begun == (i > 0)                                   # level 2 begins once
    parameters = {name for name, _ in sae.named_parameters()}
    assert parameters <= set.union(*(moved for moved, _ in seen["both"]))


def test_gradients_of_the_third_stage_reach_level_1_through_level_2(E, make):
    sae, batch = make(), a_batch(E)
    sae.losses(batch, sae.encode(batch))["reconstruction"].backward()
    for name, p in sae.lower.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("sparsity", ["topk", "l1"])
def test_latents_and_gradients_equal_the_dense_form(E, make, sparsity):
    sae, mask = make(LEVEL_SPARSITY=sparsity), torch.ones(4, 6, dtype=torch.bool)
    mask[1, 3:] = False
    batch, weigh = a_batch(E, mask=mask), torch.randn(4, 6, sae.d_sae)
    low, learned = sae.lower, (sae.W_enc, sae.b_enc, sae.lower.W_enc, sae.lower.b_enc)
    h = F.relu((batch.x - low.b_dec) @ low.W_enc + low.b_enc)
    z = F.relu(h @ sae.W_enc + sae.b_enc) * mask[..., None]
    if sparsity == "topk":
        z = z * (z >= z.topk(sae.k).values[..., -1:])
    found = sae.encode(batch).dense()
    torch.testing.assert_close(found, z)
    grads = (torch.autograd.grad((values * weigh).sum(), learned) for values in (found, z))
    for ours, dense in zip(*grads):
        torch.testing.assert_close(ours, dense)


def test_the_decoder_stays_non_negative_with_unit_rows(E, make_store, tmp_path):
    sae, log, store = trained(E, make_store, tmp_path)
    with torch.no_grad():
        x_hat = sae.decode(sae.encode(store.batch(np.arange(4))))
    assert (sae.W_dec >= 0).all() and torch.isfinite(x_hat).all()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(E, "ABLATE", ("nonnegative",))
        free, *_ = trained(E, make_store, tmp_path / "free")
    assert (free.W_dec < 0).any()
    torch.testing.assert_close(sae.lower.W_dec.norm(dim=1), torch.ones(24))
    assert log["stages"] == ["level_1", "level_2", "both"] and set(log["parameters"]) == {"beta_1"}


@pytest.mark.parametrize("off, others", [("cosine", ("start",)), ("group", ()), ("level_1", ()), ("sparsity_1", ()),
                                         ("start", ()), ("nonnegative", ())])
def test_every_part_can_be_switched_off(E, make_store, tmp_path, monkeypatch, off, others):
    """What is switched off leaves other weights than the whole variant has (a random start: siblings are not alike)."""
    def weights():
        torch.manual_seed(0)
        stages = [s._replace(epochs=2) for s in E.planned_stages(E.Hierarchical)]
        (tmp_path / "state.pt").unlink(missing_ok=True)
        return trained(E, make_store, tmp_path, stages)[0].lower.W_dec.detach().clone()

    monkeypatch.setattr(E, "ABLATE", others)
    whole = weights()
    monkeypatch.setattr(E, "ABLATE", (*others, off))
    assert not torch.equal(weights(), whole)


def test_matched_sparsity(E, make):
    assert (make(k=3).encode(a_batch(E)).dense() != 0).sum(-1).max() <= 3
