"""`slow` against its equation, dense in float64, and what its memory, its places and its prediction do."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from runtime.sparse_ops import Latents, side_by_side
from small_saes import batch_of, close, D_IN, D_SAE, doubles, encode_and_update, gradients, K, make, padding, random_batch


@pytest.fixture
def small(E, monkeypatch):
    """A block of 10 of 40 latents with one of four places, short memories and a short reach."""
    for name, value in dict(SLOW_LATENTS=0.25, SLOW_PLACES=0.25, SLOW_DECAY=0.8, SLOW_PRIOR=2.0, PREDICTED=3).items():
        monkeypatch.setattr(E, name, value)
    sae = make(E, "slow")
    sae.gain.fill_(1.5)
    assert (sae.d_slow, sae.k_slow) == (D_SAE // 4, K // 4)
    return sae


def true_memory(x, mask, decay, prior, gain):
    """By the recurrence: a sum and a weight that both decay."""
    total, m = torch.zeros_like(x[:, 0]), []
    weight = 0.0
    for t in range(x.shape[1]):
        total, weight = decay * total + x[:, t] * mask[:, t, None], decay * weight + 1
        m.append(gain * total / (prior + weight))
    return torch.stack(m, 1)


def true_codes(sae, p, x, mask):
    """(z, s) dense: in training the largest of the batch in each part, else what passes its threshold."""
    def part(inputs, columns, k, threshold):
        pre = ((inputs - p["b_dec"]) @ p["W_enc"][:, columns] + p["b_enc"][columns]).masked_fill(~mask[..., None], -1e9)
        if sae.training:
            threshold = pre.flatten().sort(descending=True).values[int(k * mask.sum())]
        return F.relu(pre) * (pre > threshold)

    slow, fast = slice(0, sae.d_slow), slice(sae.d_slow, D_SAE)
    z = part(true_memory(x, mask, 0.8, 2.0, 1.5), slow, sae.k_slow, sae.slow_threshold)
    s = z @ p["W_dec"][slow]
    return torch.cat([z, part(x - s, fast, sae.k - sae.k_slow, sae.threshold)], -1), s


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("padded", [False, True])
def test_the_equation_and_its_gradients(E, small, training, padded):
    mask = padding() if padded else torch.ones(4, 9, dtype=torch.bool)
    batch = random_batch(E, mask=mask if padded else None)
    encode_and_update(small, batch)
    small.train(training)
    latents, p = small.encode(batch), doubles(small)
    z, s = true_codes(small, p, batch.x.double(), mask)
    close(latents.dense(), z, what="z")
    close(latents.extra * mask[..., None], s * mask[..., None], what="s")

    losses = small.losses(batch, latents)
    x, n = batch.x.double(), mask.sum()
    x_hat = z @ p["W_dec"] + p["b_dec"]
    reconstruction = ((x - x_hat).square().sum(-1) * mask).sum() / n
    errors = [(x[b, t + 1:t + 4].mean(0) - s[b, t]).square().sum() for b in range(4) for t in range(6) if mask[b, t + 1:t + 4].all()]
    prediction = torch.stack(errors).mean()
    close(losses["reconstruction"], reconstruction, what="reconstruction")
    close(losses["prediction"], prediction, what="prediction")
    total, wanted = losses["reconstruction"] + 0.3 * losses["prediction"], reconstruction + 0.3 * prediction
    theirs = gradients(wanted, p)
    for name, got in gradients(total, dict(small.named_parameters())).items():
        close(got, theirs[name], 1e-4, what=name)


def test_memory_by_hand(E, small):
    """Decay .8, prior 2, gain 1.5: x = 1, then 0, then 2."""
    x = torch.zeros(1, 3, D_IN)
    x[0, :, 0] = torch.tensor([1.0, 0.0, 2.0])
    m = small.memory(batch_of(E, x))[0, :, 0]
    assert m.tolist() == pytest.approx([1.5 * 1 / 3, 1.5 * 0.8 / 3.8, 1.5 * (0.64 + 2) / (2 + 2.44)])


def test_the_gain_gives_the_memory_the_size_of_x(E, small):
    batch = random_batch(E, rows=16)
    small.gain.fill_(1.0)
    small.initialise(batch)
    assert small.memory(batch).square().sum(-1).mean().item() == pytest.approx(1.0)


def test_one_place_is_too_few(E):
    with pytest.raises(E.RunnerError, match="TARGET_L0 = 1"):
        E.SAE_VARIANTS["slow"](D_IN, D_SAE, 1)


def test_each_part_has_its_places(E, small):
    """In training on average over the batch, k_slow and the rest; their sum is TARGET_L0."""
    batch = random_batch(E, rows=8, seq=16)
    ids = small.encode(batch).pairs.ids
    assert (ids < small.d_slow).sum() == small.k_slow * 8 * 16
    assert (ids >= small.d_slow).sum() == (K - small.k_slow) * 8 * 16


def test_latents_depend_on_no_later_position(E, small):
    small.eval().threshold.fill_(0.05)
    small.slow_threshold.fill_(0.05)
    batch = random_batch(E)
    changed = batch.x.clone()
    changed[:, 5:] += 1.0
    before, after = (small.encode(batch._replace(x=x)).dense() for x in (batch.x, changed))
    assert torch.equal(before[:, :5], after[:, :5]) and not torch.equal(before[:, 5:], after[:, 5:])
    earlier = batch.x.clone()
    earlier[:, 0] += 1.0
    of_earlier = small.encode(batch._replace(x=earlier)).dense()
    assert not torch.equal(before[:, 8, :small.d_slow], of_earlier[:, 8, :small.d_slow])


def test_ablations(E, small, monkeypatch):
    """Without memory the block reads x; without "residual" the others do not see what it wrote."""
    small.eval().threshold.fill_(0.05)
    small.slow_threshold.fill_(0.05)
    batch = random_batch(E)
    whole, s = small.encode(batch), small.encode(batch).extra
    monkeypatch.setattr(E, "ABLATE", ("residual",))
    plain = small.encode(batch)
    pre = ((batch.x - small.b_dec) @ small.W_enc + small.b_enc)[..., small.d_slow:]
    close(plain.dense()[..., small.d_slow:], F.relu(pre) * (pre > 0.05))
    assert torch.equal(plain.extra, s) and not torch.equal(plain.dense(), whole.dense())
    monkeypatch.setattr(E, "ABLATE", ("memory",))
    assert torch.equal(small.memory(batch), batch.x)
    assert "prediction" in E.planned_stages(E.Slow)[0].weights
    monkeypatch.setattr(E, "ABLATE", ("prediction",))
    assert "prediction" not in E.planned_stages(E.Slow)[0].weights


def test_codes_side_by_side(E):
    """As dense ones are, gradients included, also where a token has none of a part."""
    g = torch.Generator().manual_seed(3)
    parts = [F.relu(torch.randn(3, 4, d, generator=g) - 0.7).requires_grad_() for d in (5, 8)]
    with torch.no_grad():
        parts[0][0], parts[1][1, 2], parts[0][2, 3], parts[1][2, 3] = 0, 0, 0, 0
    joined = side_by_side(*map(Latents.from_dense, parts))
    assert torch.equal(joined.dense(), torch.cat(parts, -1)) and (joined.pairs.rows.diff() >= 0).all()
    weights = torch.randn(13, 6, generator=g)
    (joined.decode(weights) ** 2).sum().backward()
    got = [part.grad.clone() * (part > 0) for part in parts]
    for part in parts:
        part.grad = None
    ((torch.cat(parts, -1) @ weights) ** 2).sum().backward()
    for mine, part in zip(got, parts):
        close(mine, part.grad * (part > 0))


def test_the_page_shows_what_a_memory_holds(E, small, monkeypatch):
    """Of a slow latent that reads channel 0: the token whose activations have it; of the others nothing."""
    monkeypatch.setattr(E, "load_tokenizer", lambda: None)
    monkeypatch.setattr(E, "vocabulary_texts", lambda tokenizer, ids: [f"token {i}" for i in ids])
    with torch.no_grad():
        small.b_dec.zero_()
        small.W_enc[:, 2] = torch.eye(D_IN)[0]
    x, tokens = torch.zeros(1, 6, D_IN), torch.tensor([[7, 7, 9, 9, 3, 3]])
    x[0, :2, 0], x[0, 2:4, 0] = 1.0, 0.25
    batch = batch_of(E, x)._replace(tokens=tokens)
    fires = torch.zeros(1, 6, 2)
    fires[0, 3:, 0] = 1
    slow, fast = small.related([2, 30], batch, fires)
    (title, held), = slow.items()
    assert fast == {} and [text for text, _ in held] == ["token 7", "token 9"]
    weights = np.array([sum(0.8 ** (t - r) / (2 + sum(0.8 ** i for i in range(t + 1))) for t in range(3, 6)) for r in range(4)])
    raised = weights * [1, 1, 0.25, 0.25]
    assert [share for _, share in held] == pytest.approx([raised[:2].sum() / raised.sum(), raised[2:].sum() / raised.sum()], abs=1e-5)


def test_planted_slow_directions_are_found_by_the_block(E, monkeypatch):
    """x = a direction that lasts for the whole window + one of many that change at each token: after training the block
    carries the lasting ones and the others the rest; without memory it does not."""
    monkeypatch.setattr(E, "SLOW_LATENTS", 0.25)
    monkeypatch.setattr(E, "SLOW_PLACES", 0.5)
    d_in, slow, fast, seq = 32, 4, 24, 64
    directions = torch.linalg.qr(torch.randn(d_in, d_in, generator=torch.Generator().manual_seed(0)))[0]
    g = torch.Generator().manual_seed(1)

    def draw(n):
        lasting = torch.randint(slow, (n,), generator=g)
        passing = torch.randint(fast, (n, seq), generator=g)
        x = 0.7 * directions[lasting][:, None] + 0.7 * directions[slow + passing]
        return batch_of(E, x), lasting

    found = {}
    for ablate in ((), ("memory",)):
        monkeypatch.setattr(E, "ABLATE", ablate)
        torch.manual_seed(0)
        sae = E.SAE_VARIANTS["slow"](d_in, 64, 2).train()
        sae.dead_after.fill_(4_000)
        sae.initialise(draw(16)[0])
        optimizer, (stage,) = E.ContiguousAdam(sae, 3e-3), E.planned_stages(E.Slow)
        for step in range(250):
            E.train_step(sae, optimizer, draw(16)[0], stage, step / 250)
        batch, lasting = draw(32)
        s = sae.eval().encode(batch).extra[:, 32:]
        truth = 0.7 * directions[lasting][:, None]
        found[ablate] = F.cosine_similarity(s, truth.expand_as(s), dim=-1).mean().item()
    assert found[()] > 0.94 and found["memory",] < 0.9, found
