"""The SAEs for single tokens against their published equations, by hand, and what holds for all."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F

from small_saes import encode_and_update

NAMES = ["standard", "topk", "batch_topk", "jumprelu", "gated", "matryoshka"]
TOPK_FAMILY = ["topk", "batch_topk", "matryoshka"]
PENALISED = ["standard", "jumprelu", "gated"]           # latents where pre-activations pass a threshold
D_IN, D_SAE, K = 12, 64, 5


def make(E, name, seed=0, d_sae=D_SAE, k=K):
    """A variant all of whose parameters are at random places, decoder rows at unit norm."""
    torch.manual_seed(seed)
    sae = E.SAE_VARIANTS[name](D_IN, d_sae, k)
    with torch.no_grad():
        sae.W_dec.copy_(F.normalize(sae.W_dec + 0.2 * torch.randn(d_sae, D_IN), dim=1))
        sae.b_enc.normal_(-0.1, 0.1)
        sae.b_dec.normal_(0, 0.1)
        if name == "jumprelu":
            sae.log_threshold.copy_(torch.empty(d_sae).uniform_(0.1, 0.4).log())
        if name == "gated":
            sae.r_mag.normal_(0, 0.3)
            sae.b_mag.normal_(0, 0.1)
    return sae.train()


def some_are_dead(sae, n=17):
    sae.dead_after.fill_(100)
    sae.tokens_since_fired[3:3 + n] = 1000


def make_batch(E, seed=1, batch=4, seq=6, mask=None):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, seq, D_IN, generator=g) / D_IN ** 0.5
    tokens = torch.randint(9, (batch, seq), generator=g)
    return E.Batch(x, tokens, torch.arange(batch), torch.arange(1, seq + 1), mask)


def padded_and_stripped(E):
    """A batch with rubbish at its padding, and its other tokens alone."""
    lengths = torch.tensor([6, 2, 5, 1])
    mask = torch.arange(6) < lengths[:, None]
    batch = make_batch(E)
    x = torch.where(mask[..., None], batch.x, 7 * torch.randn(4, 6, D_IN, generator=torch.Generator().manual_seed(5)))
    stripped = E.Batch(x[mask][None], batch.tokens[mask][None], batch.doc_ids[:1], torch.arange(1, 15), None)
    return batch._replace(x=x, mask=mask), stripped


# ---- The published equations, dense, in float64 ----
class JumpReLUPublished(torch.autograd.Function):
    """Rajamanoharan et al. 2024, eq. 11 and 12: d/dz = H(z - theta), d/dtheta = -theta / eps K((z - theta) / eps)."""
    @staticmethod
    def forward(ctx, z, theta, bandwidth):
        ctx.save_for_backward(z, theta)
        ctx.bandwidth = bandwidth
        return z * (z > theta)

    @staticmethod
    def backward(ctx, grad):
        (z, theta), eps = ctx.saved_tensors, ctx.bandwidth
        kernel = ((z - theta).abs() < eps / 2).to(z)
        return grad * (z > theta), (-theta / eps * kernel * grad).sum(0), None


class StepPublished(torch.autograd.Function):
    """d/dtheta H(z - theta) = -1 / eps K((z - theta) / eps); nothing to z."""
    @staticmethod
    def forward(ctx, z, theta, bandwidth):
        ctx.save_for_backward(z, theta)
        ctx.bandwidth = bandwidth
        return (z > theta).to(z)

    @staticmethod
    def backward(ctx, grad):
        (z, theta), eps = ctx.saved_tensors, ctx.bandwidth
        return None, (-((z - theta).abs() < eps / 2).to(z) / eps * grad).sum(0), None


def published(name, sae, x, target_l0=K):
    """(z [n, d_sae], x_hat, {loss: scalar}, parameters) of x [n, d_in], all tokens valid."""
    p = {n: v.detach().double().requires_grad_() for n, v in sae.named_parameters()}
    x, n, losses = x.double(), len(x), {}
    pre = (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    if name == "standard":
        z = pre.clamp_min(0)
    elif name == "topk":
        z = torch.zeros_like(pre).scatter(1, *(lambda t: (t.indices, t.values.clamp_min(0)))(pre.topk(sae.k, dim=1)))
    elif name in ("batch_topk", "matryoshka"):
        cut = pre.flatten().sort(descending=True).values[sae.k * n - 1] if sae.training else sae.threshold.double()
        z = (pre * (pre >= cut if sae.training else pre > cut)).clamp_min(0)
    elif name == "jumprelu":
        theta = p["log_threshold"].exp()
        z = JumpReLUPublished.apply(pre, theta, sae.bandwidth)
        l0 = StepPublished.apply(pre, theta, sae.bandwidth).sum(1).mean()
        losses["l0_target"] = (l0 / target_l0 - 1) ** 2
    elif name == "gated":
        inner = (x - p["b_dec"]) @ p["W_enc"]
        magnitude = (inner * p["r_mag"].exp() + p["b_mag"]).clamp_min(0)
        z, gate = (inner + p["b_enc"] > 0) * magnitude, (inner + p["b_enc"]).clamp_min(0)
        losses["gate"] = (x - gate @ p["W_dec"].detach() - p["b_dec"].detach()).square().sum(1).mean()
    x_hat = z @ p["W_dec"] + p["b_dec"]
    losses["reconstruction"] = (x - x_hat).square().sum(1).mean()
    if name != "matryoshka":
        losses["sparsity"] = (gate if name == "gated" else z.abs()).sum(1).mean()
    else:
        ends = [round(D_SAE * f) for f in (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1)]
        errors = [(x - z[:, :m] @ p["W_dec"][:m] - p["b_dec"]).square().sum(1).mean() for m in ends]
        losses["reconstruction"] = sum(errors) / len(errors)
    dead = torch.where(sae.tokens_since_fired > sae.dead_after)[0]
    losses["auxk"] = torch.zeros((), dtype=torch.float64, requires_grad=True)
    if len(dead):
        residual = (x - x_hat).detach()
        top = F.leaky_relu(pre[:, dead], 0.1).topk(min(D_IN // 2, len(dead)), dim=1)     # never flat: all can be revived
        z_dead = torch.zeros(n, len(dead), dtype=torch.float64).scatter(1, top.indices, top.values)
        error = (residual - z_dead @ p["W_dec"][dead]).square().sum()
        losses["auxk"] = error / (residual - residual.mean(0)).square().sum()
    return z, x_hat, losses, p


def total_of(losses):
    return sum((0.3 + 0.2 * i) * losses[name] for i, name in enumerate(sorted(losses)))


def gradients(total, parameters):
    grads = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), grads)}


def close(got, wanted, tolerance=1e-5, what=""):
    assert got.shape == wanted.shape, what
    scale, worst = wanted.abs().max().item(), (got.double() - wanted.double()).abs().max().item()
    assert worst <= tolerance * max(scale, 1e-3), f"{what}: off by {worst:.2e} at a scale of {scale:.2e}"


def agrees(E, name, sae, batch, x, seen=True):
    """encode, decode, losses and all gradients of `batch` are those of the published form on x [n, d_in]; `seen`: no
    gradient is zero."""
    z, x_hat, wanted, p = published(name, sae, x)
    latents = sae.encode(batch)
    valid = slice(None) if batch.mask is None else batch.mask.flatten()
    close(latents.dense().flatten(0, 1)[valid].detach(), z.detach(), what="z")
    close(sae.decode(latents).flatten(0, 1)[valid].detach(), x_hat.detach(), what="x_hat")
    losses = sae.losses(batch, latents)
    assert losses.keys() == wanted.keys()
    for loss in losses:
        assert losses[loss].shape == ()
        close(losses[loss].detach(), wanted[loss].detach(), what=loss)
    got, expected = gradients(total_of(losses), dict(sae.named_parameters())), gradients(total_of(wanted), p)
    for parameter in got:
        assert not seen or expected[parameter].abs().max() > 0, f"the test would not see {parameter}"
        close(got[parameter], expected[parameter], what=f"gradient of {parameter}")
    return latents


@pytest.mark.parametrize("dead", [0, 2, 17])
@pytest.mark.parametrize("shift, low, high", [(-0.55, 0.001, 0.1), (0.0, 0.1, 0.5), (0.3, 0.3, 0.95)])
@pytest.mark.parametrize("name", PENALISED)
def test_penalised_variants_follow_their_equations(E, name, shift, low, high, dead):
    """Whatever the share of the pairs that are active."""
    for seed in (0, 1):
        sae, batch = make(E, name, seed), make_batch(E, seed)
        sae.b_enc.data += shift
        some_are_dead(sae, dead)
        latents = agrees(E, name, sae, batch, batch.x.flatten(0, 1))
        assert low < len(latents.active()[2]) / (24 * D_SAE) < high


@pytest.mark.parametrize("bias, fires", [(-100.0, False), (100.0, True)])
@pytest.mark.parametrize("name", PENALISED)
def test_no_latent_and_every_latent_active(E, name, bias, fires):
    sae, batch = make(E, name), make_batch(E)
    sae.b_enc.data.fill_(bias)
    if name == "gated":
        sae.b_mag.data.fill_(bias)
    latents = agrees(E, name, sae, batch, batch.x.flatten(0, 1), seen=False)
    assert len(latents.active()[2]) == (24 * D_SAE if fires else 0)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("dead", [0, 2, 17])
@pytest.mark.parametrize("name", TOPK_FAMILY)
def test_topk_variants_follow_their_equations(E, monkeypatch, name, dead, bf16):
    if dead == 0:
        sae, losses = make(E, name), None
        batch = make_batch(E)
        losses = sae.losses(batch, sae.encode(batch))
        assert losses["auxk"].item() == 0.0
        return
    monkeypatch.setattr("runtime.sparse_ops.BF16_UNITS", bf16)
    for seed in (0, 1):
        sae, batch = make(E, name, seed), make_batch(E, seed)
        some_are_dead(sae, dead)
        agrees(E, name, sae, batch, batch.x.flatten(0, 1))


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_mode_follows_the_equation(E, name):
    sae, batch = make(E, name).eval(), make_batch(E)
    if name in ("batch_topk", "matryoshka"):
        sae.threshold.fill_(0.25)
    z = published(name, sae, batch.x.flatten(0, 1))[0]
    before = {n: v.clone() for n, v in sae.state_dict().items()}
    close(sae.encode(batch).dense().flatten(0, 1).detach(), z.detach())
    assert all(torch.equal(v, before[n]) for n, v in sae.state_dict().items())


@pytest.mark.parametrize("bandwidth", [0.05, 0.15])
def test_jumprelu_straight_through_gradients(E, bandwidth):
    """theta's gradient from the sparsity term alone, and from the reconstruction alone, by the formulas:
    latents inside the window above and below theta count, others do not, and pre-activations get nothing from L0."""
    sae, batch = make(E, "jumprelu", 3), make_batch(E, 3, 8, 16)
    sae.bandwidth = bandwidth
    x, n = batch.x.flatten(0, 1), 128
    pre, theta = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).detach(), sae.log_threshold.detach().exp()
    inside, above = (pre - theta).abs() < bandwidth / 2, pre > theta
    assert (inside & above).sum() > 20 and (inside & ~above).sum() > 20
    losses = sae.losses(batch, sae.encode(batch))
    by_l0 = gradients(losses["l0_target"], dict(sae.named_parameters()))
    slope = 2 * (above.sum() / n / K - 1) / K / n
    close(by_l0["log_threshold"], slope * -inside.sum(0) / bandwidth * theta, what="L0")
    assert not by_l0["W_enc"].any() and not by_l0["b_enc"].any() and not by_l0["b_dec"].any()
    losses = sae.losses(batch, sae.encode(batch))
    got = gradients(losses["reconstruction"], dict(sae.named_parameters()))["log_threshold"]
    x_hat = (pre * above) @ sae.W_dec + sae.b_dec
    per_z = (2 * (x_hat - x) @ sae.W_dec.t() / n).detach()
    close(got, (per_z * -theta / bandwidth * inside).sum(0) * theta, what="reconstruction")


# ---- Cases worked out by hand: d_in 2, latents along (1, 0), (0, 1), (.6, .8), and x = (3, 4), (1, 0) ----
def by_hand(E, name, k=1, d_sae=3):
    sae = E.SAE_VARIANTS[name](2, d_sae, k)
    directions = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]] + [[1.0, 0.0]] * (d_sae - 3))
    sae.W_dec.data, sae.W_enc.data = directions, directions.clone().t()
    sae.b_enc.data[3:] = -100.0
    return sae, E.Batch(torch.tensor([[[3.0, 4.0], [1.0, 0.0]]]), torch.zeros(1, 2, dtype=torch.long),
                        torch.zeros(1), torch.tensor([1, 2]), None)


def test_standard_by_hand(E):
    sae, batch = by_hand(E, "standard")
    latents = sae.encode(batch)
    assert torch.allclose(latents.dense(), torch.tensor([[[3.0, 4.0, 5.0], [1.0, 0.0, 0.6]]]))
    losses = sae.losses(batch, latents)     # x_hat = (6, 8), (1.36, .48): errors 25 and .36
    assert losses["reconstruction"].item() == pytest.approx((25 + 0.36) / 2)
    assert losses["sparsity"].item() == pytest.approx((12 + 1.6) / 2)


def test_topk_by_hand(E):
    sae, batch = by_hand(E, "topk")
    latents = sae.encode(batch)
    assert torch.allclose(latents.dense(), torch.tensor([[[0.0, 0.0, 5.0], [1.0, 0.0, 0.0]]]))
    assert sae.losses(batch, latents)["reconstruction"].item() == pytest.approx(0.0, abs=1e-10)


def test_batch_topk_by_hand(E):
    """k = 1, two tokens: the two largest of 3, 4, 5, 1, 0, .6 belong to the first token."""
    sae, batch = by_hand(E, "batch_topk")
    latents = sae.train().encode(batch)
    assert torch.allclose(latents.dense(), torch.tensor([[[0.0, 4.0, 5.0], [0.0, 0.0, 0.0]]]))
    sae.after_step(batch, latents, torch.tensor(1.0))
    assert sae.threshold.item() == 4.0
    assert torch.allclose(sae.eval().encode(batch).dense(), torch.tensor([[[0.0, 0.0, 5.0], [0.0, 0.0, 0.0]]]))


def test_jumprelu_by_hand(E):
    sae, batch = by_hand(E, "jumprelu")
    sae.log_threshold.data = torch.tensor([2.0, 4.5, 0.5]).log()
    latents = sae.encode(batch)
    assert torch.allclose(latents.dense(), torch.tensor([[[3.0, 0.0, 5.0], [0.0, 0.0, 0.6]]]))
    assert sae.losses(batch, latents)["l0_target"].item() == pytest.approx((1.5 / 1 - 1) ** 2)


def test_gated_by_hand(E):
    sae, batch = by_hand(E, "gated")
    sae.b_enc.data, sae.b_mag.data = torch.tensor([-2.0, 1.0, -0.6]), torch.tensor([0.5, -1.0, 0.0])
    sae.r_mag.data = torch.tensor([0.0, math.log(2), 0.0])
    # pi = (1, 5, 4.4), (-1, 1, 0): gates open 1 1 1 and 0 1 0; magnitudes 3.5, 7, 5 and 1.5, relu(-1), .6
    latents = sae.encode(batch)
    assert torch.allclose(latents.dense(), torch.tensor([[[3.5, 7.0, 5.0], [0.0, 0.0, 0.0]]]))
    losses = sae.losses(batch, latents)
    assert losses["sparsity"].item() == pytest.approx((1 + 5 + 4.4 + 0 + 1 + 0) / 2)
    # through the frozen decoder: (3.64, 8.52) and (0, 1)
    assert losses["gate"].item() == pytest.approx((0.64 ** 2 + 4.52 ** 2 + 1 + 1) / 2, rel=1e-5)


# ---- Properties of all ----
class Spy:
    """An optimizer that notes the gradients it is given, and steps downhill."""
    def __init__(self, sae, lr=0.5):
        self.sae, self.lr = sae, lr

    def step(self):
        self.grads = {n: p.grad.clone() for n, p in self.sae.named_parameters() if p.grad is not None}
        for p in self.sae.parameters():
            p -= 0 if p.grad is None else self.lr * p.grad

    def zero_grad(self, set_to_none):
        assert set_to_none
        for p in self.sae.parameters():
            p.grad = None


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_padding_counts_nowhere(E, name, dead):
    """Losses, gradients, L0, thresholds and the dead count are those of the batch without the padding."""
    padded, stripped = padded_and_stripped(E)
    results = []
    for batch in (padded, stripped):
        sae = make(E, name)
        if dead:
            some_are_dead(sae)
        latents = sae.encode(batch)
        losses = sae.losses(batch, latents)
        grads = gradients(total_of(losses), dict(sae.named_parameters()))
        stage = E.Stage("test", 1, {loss: 1.0 for loss in losses})
        if hasattr(sae, "threshold"):
            sae.threshold.zero_()
        step = E.train_step(sae, Spy(sae), batch, stage, 0.0)
        results.append((latents, losses, grads, step, sae.state_dict()))
    z = results[0][0].dense()
    assert not z[~padded.mask].any()
    close(z[padded.mask].detach(), results[1][0].dense()[0].detach(), what="z")
    for part in (1, 2, 3, 4):
        for key, wanted in results[1][part].items():
            close(results[0][part][key].detach(), wanted.detach(), 2e-5, what=key)
    l0 = results[1][0].dense().count_nonzero().item() / 14
    assert l0 > 0 and results[0][3]["l0"].item() == pytest.approx(l0)


@pytest.mark.parametrize("name", NAMES)
def test_padding_has_no_say_in_the_beginning(E, name):
    states = []
    for batch in padded_and_stripped(E):
        sae = make(E, name)
        sae.initialise(batch)
        states.append(sae.state_dict())
    for key, wanted in states[1].items():
        close(states[0][key], wanted, what=key)


@pytest.mark.parametrize("d_sae, k", [(D_SAE, K), (D_SAE, 1), (33, 7), (D_SAE, 20)])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["standard", "jumprelu"])
def test_the_first_batch_has_the_target_l0(E, name, padded, d_sae, k):
    torch.manual_seed(0)
    sae, batch = E.SAE_VARIANTS[name](D_IN, d_sae, k), make_batch(E, 0, 8, 64)
    if padded:                              # rubbish where nothing counts
        mask = torch.arange(64) < torch.tensor([64, 3, 40, 1, 64, 64, 20, 7])[:, None]
        batch = batch._replace(x=torch.where(mask[..., None], batch.x, 7.0), mask=mask)
    sae.initialise(batch)
    n, fired = 263 if padded else 512, len(sae.encode(batch).active()[2])
    assert k * n <= fired <= k * n + 1      # a token more or less is the quantile's rounding


@pytest.mark.parametrize("name", ["standard", "jumprelu"])
def test_a_target_of_all_latents_begins_with_all_that_are_positive(E, name):
    sae, batch = make(E, name, k=D_SAE), make_batch(E, 0, 8, 64)
    if name == "jumprelu":
        sae.b_enc.data.zero_()
    sae.initialise(batch)
    assert all(torch.isfinite(p).all() for p in sae.parameters())
    inner = (batch.x - sae.b_dec) @ sae.W_enc
    assert torch.equal(sae.encode(batch).dense() > 0, inner > 1e-3)


@pytest.mark.parametrize("name", TOPK_FAMILY + ["gated"])
def test_others_begin_as_they_are_made(E, name):
    sae = make(E, name)
    before = copy.deepcopy(sae.state_dict())
    sae.initialise(make_batch(E))
    assert all(torch.equal(value, before[key]) for key, value in sae.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_a_latent_stays_silent_at_padding_whatever_its_bias(E, name):
    padded, _ = padded_and_stripped(E)
    sae = make(E, name)
    sae.b_enc.data += 50.0
    for mode in (True, False):
        z = sae.train(mode).encode(padded).dense()
        assert z[padded.mask].any() and not z[~padded.mask].any()


@pytest.mark.parametrize("name", NAMES)
def test_rows_do_not_see_each_other(E, name):
    """In evaluation (and in training where the batch does not share a budget) a row's latents are its own."""
    batch, sae = make_batch(E, 2), make(E, name)
    if hasattr(sae, "threshold"):
        sae.threshold.fill_(0.2)
    for mode in [False] + [True] * (name not in ("batch_topk", "matryoshka")):
        sae.train(mode)
        together = sae.encode(batch).dense()
        for i in range(4):
            alone = sae.encode(E.Batch(batch.x[i:i + 1], batch.tokens[i:i + 1], batch.doc_ids[i:i + 1],
                                       batch.positions, None)).dense()[0]
            close(together[i].detach(), alone.detach())
        other = batch._replace(x=batch.x.clone())
        other.x[1:] *= 30
        close(sae.encode(other).dense()[0].detach(), together[0].detach())


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_keeps_decoder_rows_on_the_sphere(E, name, scale):
    """Gradients arrive without their part along the rows and clipped at GRADIENT_CLIP; rows leave with unit norm."""
    sae, batch = make(E, name), make_batch(E)
    batch = batch._replace(x=batch.x * scale)
    before = copy.deepcopy(sae)
    losses = before.losses(batch, before.encode(batch))
    stage = E.Stage("test", 1, {loss: 1.0 for loss in losses if loss != "sparsity"})
    raw = gradients(sum(losses[loss] for loss in stage.weights), dict(before.named_parameters()))
    spy, W = Spy(sae), before.W_dec.detach()
    E.train_step(sae, spy, batch, stage, 0.0)
    assert (spy.grads["W_dec"] * W).sum(1).abs().max() < 1e-5 * spy.grads["W_dec"].norm()
    raw["W_dec"] = raw["W_dec"] - (raw["W_dec"] * W).sum(1, keepdim=True) * W
    norm = torch.stack([g.norm() for g in raw.values()]).norm()
    assert scale == 1.0 or norm > 10 * E.GRADIENT_CLIP
    for parameter, grad in raw.items():
        close(spy.grads[parameter], grad * min(1.0, E.GRADIENT_CLIP / norm), 2e-5, what=parameter)
    assert (sae.W_dec.norm(dim=1) - 1).abs().max() < 1e-6
    assert (sae.W_dec - W).abs().max() > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_a_step_counts_tokens_since_each_latent_fired(E, name):
    sae, batch = make(E, name), make_batch(E)
    sae.tokens_since_fired += 7
    sae.b_enc.data[[0, 9]] = -100.0
    fires = sae.encode(batch).dense().flatten(0, 1).any(0)
    assert fires.any() and not fires.all()
    E.train_step(sae, Spy(sae, 0.0), batch, E.Stage("s", 1, {"reconstruction": 1.0}), 0.0)
    assert torch.equal(sae.tokens_since_fired, torch.where(fires, 0, 31))
    sae.dead_after.fill_(30)
    assert torch.equal(sae.dead_mask(), ~fires)


def test_inputs_of_another_width_are_named(E):
    sae, batch = make(E, "standard"), make_batch(E)
    with pytest.raises(E.RunnerError, match=r"\(4, 6, 11\)"):
        sae.encode(batch._replace(x=batch.x[..., 1:]))
    with pytest.raises(E.RunnerError, match=r"\(24, 12\)"):
        sae.encode(batch._replace(x=batch.x.flatten(0, 1)))
    with pytest.raises(E.RunnerError, match="x_hat"):
        E.squared_error(batch, batch.x[:1])


# ---- BatchTopK ----
@pytest.mark.parametrize("name", ["batch_topk", "matryoshka"])
@pytest.mark.parametrize("shape", [(4, 6), (24, 1), (1, 24), (2, 12), (6, 4)])
@pytest.mark.parametrize("threshold", [0.0, 0.01, 0.3, 1e6])
def test_batch_topk_keeps_k_per_token_in_any_shape(E, name, shape, threshold):
    """Exactly k * n_tokens, the largest of all, whatever the running threshold has come to."""
    x = make_batch(E).x.view(*shape, D_IN)
    sae = make(E, name)
    sae.threshold.fill_(threshold)
    latents = sae.encode(E.Batch(x, torch.zeros(shape, dtype=torch.long), torch.arange(shape[0]),
                                 torch.arange(1, shape[1] + 1), None))
    assert latents.shape == (*shape, D_SAE) == latents.dense().shape
    z = latents.dense().view(24, D_SAE)
    pre = torch.addmm(sae.b_enc, x.view(24, D_IN) - sae.b_dec, sae.W_enc)
    assert z.count_nonzero() == K * 24 == len(latents.active()[2])
    assert torch.equal(z != 0, pre >= pre.flatten().topk(K * 24).values[-1])
    assert len(z.count_nonzero(1).unique()) > 1         # the tokens share the budget unevenly


def test_batch_topk_keeps_only_positive_latents(E):
    sae, batch = make(E, "batch_topk"), make_batch(E)
    sae.b_enc.data -= 0.75
    pre = torch.addmm(sae.b_enc, batch.x.flatten(0, 1) - sae.b_dec, sae.W_enc)
    assert 0 < (pre > 0).sum() < K * 24
    z = encode_and_update(sae, batch).dense().flatten(0, 1)
    assert torch.equal(z != 0, pre > 0)
    assert sae.threshold > 0


def test_batch_topk_threshold_follows_the_least_value_kept(E):
    sae, batch = make(E, "batch_topk"), make_batch(E)
    first = encode_and_update(sae, batch).active()[2].min().item()
    assert sae.threshold.item() == pytest.approx(first)         # no history: the first is taken whole
    stronger = batch._replace(x=batch.x * 3)
    second = encode_and_update(sae, stronger).active()[2].min().item()
    assert second > 1.5 * first
    assert first < sae.threshold.item() < first + 0.1 * (second - first)
    for _ in range(1500):
        encode_and_update(sae, stronger)
    assert sae.threshold.item() == pytest.approx(second, rel=1e-4)
    z = sae.eval().encode(batch).dense()
    assert sae.threshold.item() == pytest.approx(second, rel=1e-4)      # evaluation leaves it alone
    assert not z.any() or z[z != 0].min() > sae.threshold


@pytest.mark.parametrize("name", ["batch_topk", "matryoshka"])
def test_batch_topk_in_evaluation_has_the_sparsity_of_training(E, name):
    sae = make(E, name)
    for seed in range(300):
        encode_and_update(sae, make_batch(E, seed, 8, 16))
    with torch.no_grad():
        fired = sae.eval().encode(make_batch(E, 1000, 64, 32)).active()[2]
    assert len(fired) / (64 * 32) == pytest.approx(K, rel=0.05)


# ---- Matryoshka ----
@pytest.mark.parametrize("d_sae", [8, 33, 64, 100, 1536])
def test_matryoshka_groups_cover_all_latents_once(E, d_sae, monkeypatch):
    sae, batch = make(E, "matryoshka", d_sae=d_sae, k=3), make_batch(E, batch=1, seq=1)
    seen, keep = [], E.Latents.keep

    def spy(latents, chosen):
        seen.append(chosen.nonzero().flatten().tolist())
        return keep(latents, chosen)
    monkeypatch.setattr(E.Latents, "keep", spy)
    sae.losses(batch, E.Latents.from_dense(torch.ones(1, 1, d_sae)))        # the token has a pair with every latent
    assert len(seen) == 5 and sum(seen, []) == list(range(d_sae))
    sizes = torch.tensor([len(group) for group in seen]) / d_sae
    assert (sizes - torch.tensor([1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32])).abs().max() <= 1 / d_sae


def test_matryoshka_prefix_errors(E):
    """x = one latent's direction: the prefixes that hold the latent are right, the others miss all of x."""
    nothing = None
    for latent, missed in ((None, 5), (31, 4), (15, 4), (14, 3), (7, 3), (6, 2), (3, 2), (2, 1), (1, 1), (0, 0)):
        sae = E.Matryoshka(2, 32, 1).eval()
        sae.W_dec.data = torch.tensor([[0.6, 0.8]]).repeat(32, 1)
        sae.W_enc.data = torch.zeros(2, 32)
        if latent is not None:
            sae.W_enc.data[:, latent] = torch.tensor([0.6, 0.8])
        x = torch.tensor([[[0.6, 0.8]]])
        batch = E.Batch(x, torch.zeros(1, 1, dtype=torch.long), torch.zeros(1), torch.ones(1), None)
        loss = sae.losses(batch, sae.encode(batch))["reconstruction"].item()
        nothing = loss if nothing is None else nothing
        assert loss == pytest.approx(nothing * missed / 5, abs=1e-6)


# ---- Dead latents ----
@pytest.mark.parametrize("name", NAMES)
def test_auxk_is_silent_without_dead_latents_and_trains_only_the_dead(E, name):
    sae, batch = make(E, name), make_batch(E)
    assert sae.losses(batch, sae.encode(batch))["auxk"].item() == 0.0
    some_are_dead(sae)
    loss = sae.losses(batch, sae.encode(batch))["auxk"]
    grads = gradients(loss, dict(sae.named_parameters()))
    dead = sae.dead_mask()
    assert loss > 0 and grads["W_enc"][:, dead].any() and grads["W_dec"][dead].any()
    assert not grads["W_enc"][:, ~dead].any() and not grads["W_dec"][~dead].any() and not grads["b_enc"][~dead].any()


@pytest.mark.parametrize("name", NAMES)
def test_auxk_is_finite_where_the_residual_has_no_variance(E, name):
    sae = make(E, name)
    some_are_dead(sae)
    batch = make_batch(E)
    batch = batch._replace(x=batch.x[:1, :1].expand(4, 6, D_IN))
    loss = sae.losses(batch, sae.encode(batch))["auxk"]
    assert torch.isfinite(loss)
    same = batch._replace(x=sae.decode(sae.encode(batch)).detach())
    assert sae.auxk_loss(same, same.x).item() == 0.0


def planted(E, seed, n=256):
    """Sparse combinations of 24 directions in 12 dimensions."""
    directions = F.normalize(torch.randn(24, D_IN, generator=torch.Generator().manual_seed(0)), dim=1)
    g = torch.Generator().manual_seed(seed)
    a = (torch.rand(n, 24, generator=g) < 0.1) * torch.rand(n, 24, generator=g)
    x = a @ directions
    return E.Batch(x.view(8, n // 8, D_IN), torch.zeros(8, n // 8, dtype=torch.long), torch.arange(8),
                   torch.arange(1, n // 8 + 1), None)


def train_with_dead_latents(E, sae, dead, auxk, steps):
    """Whether each of the dead latents has ever fired."""
    sae.dead_after.fill_(2000)
    stage, = sae.curriculum
    if not auxk:
        stage = stage._replace(weights={loss: weight for loss, weight in stage.weights.items() if loss != "auxk"})
    optimizer, fired = E.ContiguousAdam(sae, 1e-2), torch.zeros(sae.d_sae, dtype=torch.bool)
    for step in range(steps):
        E.train_step(sae, optimizer, planted(E, step), stage, step / steps)
        fired |= sae.tokens_since_fired == 0
    return fired[dead].tolist()


@pytest.mark.parametrize("name", TOPK_FAMILY + ["jumprelu"])
@pytest.mark.parametrize("auxk", [True, False])
def test_auxk_revives_latents_too_weak_to_fire(E, name, auxk):
    """Four latents whose pre-activations are positive but never among the largest, or above the threshold: with auxk they
    come to fire, without it they never do."""
    torch.manual_seed(0)
    sae, weak = E.SAE_VARIANTS[name](D_IN, 24, 2).train(), [20, 21, 22, 23]
    sae.initialise(planted(E, 0))
    sae.W_enc.data[:, weak] *= 0.02
    sae.b_enc.data[weak] = -0.01
    assert train_with_dead_latents(E, sae, weak, auxk, 150) == [auxk] * 4


@pytest.mark.parametrize("name", ["standard", "gated"])
@pytest.mark.parametrize("auxk", [True, False])
def test_auxk_revives_latents_whose_pre_activations_are_negative(E, name, auxk):
    """The dead latents of a ReLU: four that no token brings above 0."""
    torch.manual_seed(0)
    sae, dead, batch = E.SAE_VARIANTS[name](D_IN, 24, 2).train(), [20, 21, 22, 23], planted(E, 0)
    E.SAE.initialise(sae, batch)
    sae.b_enc.data[dead] = -2 * (batch.x @ sae.W_enc[:, dead]).amax((0, 1))
    assert train_with_dead_latents(E, sae, dead, auxk, 400) == [auxk] * 4


@pytest.mark.parametrize("last", [0.0, 0.3, 5.0])
def test_batch_topk_keeps_the_same_latents_whatever_the_last_step_kept(E, last):
    torch.manual_seed(0)
    sae = E.BatchTopK(16, 64, 4).train()
    batch = E.Batch(torch.randn(2, 8, 16), torch.zeros(2, 8, dtype=torch.long), torch.arange(2), torch.arange(1, 9), None)
    fresh = sae.encode(batch).dense()
    sae.last_least_kept.fill_(last)
    assert torch.equal(sae.encode(batch).dense(), fresh) and (fresh != 0).sum() <= 4 * 16
