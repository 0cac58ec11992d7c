"""temporal_adaptation against naive loops: the trace, what scales it, its ablations."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F

from small_saes import (
    adaptive, attending, batch_of, close, D_IN, D_SAE, doubles, encode_and_update, gradients, K, make,
    padding, random_batch, softplus, true_scaled_variance)

# ---- AdaptationScan: the trace and what it does to the pre-activations ----
def naive_scan(pre, lam, theta):
    h, z = torch.zeros_like(pre[:, 0]), []
    for t in range(pre.shape[1]):
        z.append(F.relu(pre[:, t] - theta * h))
        h = lam * h + (1 - lam) * F.relu(pre[:, t])
    return torch.stack(z, 1)


@pytest.mark.parametrize("seq", [1, 2, 3, 17])
@pytest.mark.parametrize("layout", ["plain", "transposed"])
def test_adaptation_is_the_recursion(E, seq, layout):
    g = torch.Generator().manual_seed(seq)
    pre = torch.randn(3, seq, 6, generator=g, dtype=torch.float64)
    if layout == "transposed":
        pre = pre.transpose(0, 1).contiguous().transpose(0, 1)
    given = {"pre": pre, "lam": torch.tensor([0.0, 1e-3, 0.3, 0.9, 0.999, 1.0]).double(),
             "theta": torch.tensor([0.5, -0.5, 0.9, -0.9, 0.0, 0.3]).double()}
    for tensor in given.values():
        tensor.requires_grad_()
    weight, results = torch.randn(3, seq, 6, generator=g, dtype=torch.float64), []
    for form in (E.AdaptationScan.apply, naive_scan):
        z = form(*given.values())
        results.append((z, *gradients((z * weight).sum(), given).values(),
                        *gradients(form(*given.values()).sum(), given).values()))       # an expanded gradient
    for got, wanted in zip(*results):
        close(got.detach(), wanted.detach(), 1e-12)
    assert seq == 1 or (results[0][0] > F.relu(pre)).any() and (results[0][0] < F.relu(pre)).any()


def test_adaptation_gradients_numerically(E):
    g = torch.Generator().manual_seed(0)
    pre = torch.randn(2, 5, 3, generator=g, dtype=torch.float64, requires_grad=True)
    lam, theta = (torch.rand(3, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(E.AdaptationScan.apply, (pre, lam, theta))


def test_the_scan_by_hand(E):
    """A constant input of 8, lam 1/2: traces 0, 4, 6, 7, ...; the position itself never counts."""
    half = torch.tensor([0.5])
    z = E.AdaptationScan.apply(torch.full((1, 5, 1), 8.0), half, half)
    assert z.flatten().tolist() == [8.0, 6.0, 5.0, 4.5, 4.25]
    assert E.AdaptationScan.apply(torch.ones(2, 1, 1), half, half).tolist() == [[[1.0]], [[1.0]]]


# ---- TemporalAdaptation ----
def adapted(p, v, x, mask, drive):
    """The equation of the docstring, position by position, in float64."""
    theta, lam = torch.tanh(p["theta_raw"]), torch.exp(-softplus(p["beta"]) * v ** p["T"])
    h, z = torch.zeros(len(x), p["W_enc"].shape[1], dtype=torch.float64), []
    for t in range(x.shape[1]):
        pre = (x[:, t].double() - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
        keep = torch.ones(len(x), 1) if mask is None else mask[:, t, None]
        u, here = pre.clamp_min(0) * keep, (pre - theta * h).clamp_min(0) * keep
        z.append(here)
        h = lam * h + (1 - lam) * (u if drive == "u" else here)
    return torch.stack(z, 1)


@pytest.mark.parametrize("shift, low, high", [(-0.4, 0.0, 0.12), (0.0, 0.2, 0.6), (1.0, 0.6, 1.0)])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("drive", ["u", "z"])
@pytest.mark.parametrize("theta_raw", [0.8, -0.7])
def test_adaptation_is_its_equation(E, settings, theta_raw, drive, padded, shift, low, high):
    """Latents, few or many, and the gradients of all parameters."""
    settings(DRIVE=drive)
    sae = adaptive(E).eval()
    sae.b_enc.data += shift
    sae.theta_raw.data.fill_(theta_raw)
    mask = padding() if padded else None
    batch = random_batch(E, mask=mask)
    if padded:
        batch = batch._replace(x=torch.where(mask[..., None], batch.x, 30.0))
    latents = sae.encode(batch)
    n = 21 if padded else 36
    assert latents.shape == (4, 9, D_SAE) and low < len(latents.active()[2]) / (n * D_SAE) < high
    p = doubles(sae)
    wanted = adapted(p, true_scaled_variance(sae.variance), batch.x, mask, drive)
    close(latents.dense().detach(), wanted.detach(), what="z")
    weight = torch.randn(4, 9, D_SAE, generator=torch.Generator().manual_seed(3))
    got = gradients((latents.dense() * weight).sum(), dict(sae.named_parameters()))
    for name, grad in gradients((wanted * weight).sum(), p).items():
        assert name == "W_dec" or grad.abs().max() > 0, name
        close(got[name], grad, 2e-5, what=f"gradient of {name}")
    plain = F.relu((batch.x - sae.b_dec) @ sae.W_enc + sae.b_enc)
    assert (latents.dense() - plain)[:, 1:].abs().max() > 0.05          # the adaptation shows


def test_adaptation_by_hand(E):
    """One latent reading x itself, theta 1/2, lam 1/2: u = 8 8 8 0 8, h = 0 4 6 7 3.5, z = 8 6 5 0 6.25."""
    sae = E.TemporalAdaptation(1, 1, 1).eval()
    sae.W_enc.data.fill_(1.0)
    sae.theta_raw.data.fill_(math.atanh(0.5))
    sae.beta.data.fill_(0.0)                    # softplus(0) = log 2, and v = 1 for a single latent
    z = sae.encode(batch_of(E, torch.tensor([8.0, 8.0, 8.0, -3.0, 8.0])[None, :, None])).dense()
    assert torch.allclose(z.flatten(), torch.tensor([8.0, 6.0, 5.0, 0.0, 6.25]), atol=1e-5)


@pytest.mark.parametrize("drive", ["u", "z"])
@pytest.mark.parametrize("ablate", [(), ("sharing",), ("variance_scaling",)])
def test_without_strength_it_is_the_standard_sae(E, settings, drive, ablate):
    settings(DRIVE=drive, ABLATE=ablate)
    sae, standard = adaptive(E), make(E, "standard")
    sae.theta_raw.data.zero_()
    standard.load_state_dict({n: v for n, v in sae.state_dict().items() if n in standard.state_dict()})
    for mask in (None, padding()):
        batch = random_batch(E, mask=mask)
        z, wanted = sae.encode(batch).dense(), standard.encode(batch).dense()
        assert torch.equal(z > 1e-6, wanted > 1e-6)
        close(z.detach(), wanted.detach(), 1e-6)


def test_it_starts_as_the_standard_sae(E):
    sae = E.TemporalAdaptation(D_IN, D_SAE, K)
    assert sae.theta_raw.item() == 0.0
    losses = sae.losses(random_batch(E), sae.encode(random_batch(E)))
    assert losses["regularisation"].item() == 0.0
    assert set(losses) == {"reconstruction", "sparsity", "auxk", "regularisation"}


@pytest.mark.parametrize("ablate, drive", [((), "u"), ((), "z"), (("trace",), "u"), (("sharing",), "u")])
def test_its_first_batch_has_the_target_l0(E, settings, ablate, drive):
    settings(ABLATE=ablate, DRIVE=drive)
    torch.manual_seed(0)
    sae, batch = E.TemporalAdaptation(D_IN, D_SAE, K), random_batch(E, mask=padding())
    sae.initialise(batch)
    assert len(sae.encode(batch).active()[2]) / 21 == pytest.approx(K, abs=0.05)


def auxk_of(sae, batch):
    """From its definition: the top d_in / 2 dead latents' share of the residual, token by token, in float64."""
    inputs, centre, W_enc = (a.double() for a in sae.encoder_inputs(batch))
    keep = torch.ones(batch.x.shape[:2], dtype=torch.bool) if batch.mask is None else batch.mask
    residual = (batch.x - sae.decode(sae.encode(batch)))[keep].detach().double()
    dead, guesses = sae.dead_mask().nonzero().flatten(), []
    for token in inputs[keep]:
        pre_acts = (token - centre) @ W_enc[:, dead] + sae.b_enc[dead]
        best = pre_acts.argsort(descending=True)[:sae.d_in // 2]
        guesses.append(F.leaky_relu(pre_acts[best], 0.1) @ sae.W_dec[dead[best]].double())
    error = (residual - torch.stack(guesses)).square().sum()
    return error / (residual - residual.mean(0)).square().sum()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["temporal_adaptation", "temporal", "tsae"])
def test_auxk_of_dead_latents(E, name, padded):
    """They read what the encoder reads, attention included."""
    sae = {"temporal": attending, "temporal_adaptation": adaptive}.get(name, lambda E: make(E, name))(E)
    batch = random_batch(E, mask=padding() if padded else None)
    latents = sae.eval().encode(batch)
    assert sae.losses(batch, latents)["auxk"].item() == 0.0
    sae.dead_after.fill_(100)
    sae.tokens_since_fired[5:15] = 1000
    got, wanted = sae.losses(batch, latents)["auxk"], auxk_of(sae, batch)
    assert got.item() == pytest.approx(wanted.item(), rel=1e-4) and abs(got.item() - 1) > 1e-3
    parameters = {n: p for n, p in sae.named_parameters() if n not in ("T", "beta", "theta_raw")}
    expected = gradients(wanted, parameters)
    for parameter, grad in gradients(got, parameters).items():
        assert expected[parameter].any(), parameter
        close(grad, expected[parameter], 1e-4, what=parameter)


SHARED = {"beta": (), "theta_raw": ()}
WIDE = {"beta": (D_SAE,), "theta_raw": (D_SAE,)}
CHANNELS = {"beta": (D_IN,), "theta_raw": (D_IN,)}
KINDS = [((), "learned", SHARED | {"T": ()}), ((), "scheduled", SHARED | {"T": (), "T_decay": ()}), ((), 0.3, SHARED),
         ((), 1, SHARED), (("sharing",), "learned", WIDE | {"T": ()}),
         (("sharing",), "scheduled", WIDE | {"T": (), "T_decay": ()}), (("variance_scaling",), "learned", SHARED),
         (("variance_scaling",), "scheduled", SHARED), (("sharing", "variance_scaling"), 0.5, WIDE),
         (("trace",), "learned", SHARED | {"T": ()}), (("trace",), 0.1, SHARED),
         (("trace", "sharing"), "scheduled", CHANNELS | {"T": (), "T_decay": ()}),
         (("trace", "sharing", "variance_scaling"), "learned", CHANNELS)]


@pytest.mark.parametrize("ablate, temperature, wanted", KINDS)
def test_ablations_have_the_parameters_they_should_and_all_of_them_learn(E, settings, ablate, temperature, wanted):
    settings(ABLATE=ablate, TEMPERATURE=temperature)
    sae = adaptive(E)
    common = {n for n, _ in E.SAE(D_IN, D_SAE, K).named_parameters()}
    own = {n: tuple(p.shape) for n, p in sae.named_parameters() if n not in common}
    assert own == wanted
    sae.progress = 0.5
    batch = random_batch(E, mask=padding())
    losses = sae.losses(batch, sae.encode(batch))
    for loss in ("reconstruction", "regularisation"):
        grads = gradients(losses[loss], {n: getattr(sae, n) for n in wanted})
        for name, grad in grads.items():
            assert torch.isfinite(grad).all() and grad.any(), f"{loss} does not reach {name}"
    assert all(isinstance(value, float) for value in sae.parameters_of_interest().values())


def test_regularisation_by_hand(E, settings):
    settings(TEMPERATURE="scheduled", ABLATE=("sharing",))
    sae = E.TemporalAdaptation(2, 2, 1)
    sae.beta.data, sae.theta_raw.data = torch.tensor([3.0, 1.0]), torch.tensor([2.0, 0.0])
    sae.T.data.fill_(1.5)
    sae.T_decay.data.fill_(0.0)
    batch = random_batch(E, d_in=2)
    wanted = (9 + 1) / 2 + 4 / 2 + 1 + 0.25
    assert sae.losses(batch, sae.encode(batch))["regularisation"].item() == pytest.approx(wanted)


@pytest.mark.parametrize("temperature", ["learned", "scheduled", 0.1, 1.0])
def test_temperature(E, settings, temperature):
    settings(TEMPERATURE=temperature)
    sae = E.TemporalAdaptation(D_IN, D_SAE, K)
    stage, = E.curriculum_of(sae)
    for done in (0.0, 0.4, 0.9):
        E.anneal(sae, stage, done)
        wanted = {"learned": 0.5, "scheduled": 0.5 * math.exp(-0.5 * done)}.get(temperature, temperature)
        assert float(sae.temperature()) == pytest.approx(wanted)
        assert sae.parameters_of_interest()["temperature"] == pytest.approx(wanted)


@pytest.mark.parametrize("ablate", [(), ("sharing",), ("variance_scaling",), ("sharing", "variance_scaling")])
@pytest.mark.parametrize("temperature", ["learned", 1])
def test_decay_is_its_formula_between_0_and_1(E, settings, ablate, temperature):
    settings(ABLATE=ablate, TEMPERATURE=temperature)
    sae = adaptive(E).eval()
    v = torch.ones(D_SAE) if "variance_scaling" in ablate else true_scaled_variance(sae.variance)
    T = float(sae.temperature())
    wanted = torch.exp(-softplus(sae.beta.detach().double()) * v ** T)
    lam = sae.decay().detach()
    assert (lam > 0).all() and (lam < 1).all()
    close(lam.expand(D_SAE), wanted.expand(D_SAE))
    if not ablate:
        assert v.min() == 1 / 16 < 0.1 and v.max() > 5          # the clamp binds, and v spreads


def test_scaled_variance_has_geometric_mean_1_over_the_live(E):
    """Latents that never fire have no say, whatever the unit of the variances."""
    sae = E.TemporalAdaptation(2, 6, 1).eval()
    for unit in (1.0, 1e-3, 50.0):
        sae.variance.copy_(unit * torch.tensor([0.5, 1.0, 2.0, 1e-15, 1e-15, 0.0]))
        assert sae.scaled_variance().tolist() == pytest.approx([0.5, 1.0, 2.0, 1 / 16, 1 / 16, 1 / 16], rel=1e-4)
    sae.variance.copy_(torch.tensor([1.0, 1e-6, 1e6, 1.0, 1.0, 1.0]))
    assert sae.scaled_variance().tolist() == pytest.approx([1, 1 / 16, 16, 1, 1, 1], rel=1e-4)
    sae.variance.zero_()
    assert torch.isfinite(sae.scaled_variance()).all()


@pytest.mark.parametrize("ablate", [(), ("trace",)])
def test_variance_runs_in_training_and_is_frozen_in_evaluation(E, settings, ablate):
    settings(ABLATE=ablate)
    sae, batch = adaptive(E), random_batch(E, rows=16)
    x = batch.x.flatten(0, 1)
    values = x if ablate else F.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc).detach()
    variance, lam = sae.variance.clone(), sae.eval().decay().detach()
    sae.encode(batch)
    assert torch.equal(sae.variance, variance) and torch.equal(sae.decay(), lam)
    for _ in range(3):
        encode_and_update(sae.train(), batch)
        variance += 0.01 * (values.var(0) - variance)
    close(sae.variance, variance, 1e-3)
    assert not torch.equal(sae.decay(), lam)
    moved, state = sae.eval().decay().detach(), copy.deepcopy(sae.state_dict())
    sae.losses(batch, sae.encode(batch._replace(x=5 * batch.x)))
    assert torch.equal(sae.decay(), moved)
    assert all(torch.equal(v, state[n]) for n, v in sae.state_dict().items())


@pytest.mark.parametrize("ablate", [(), ("trace",)])
def test_padding_has_no_say_in_the_variance(E, settings, ablate):
    """The running variance of a padded batch is that of its tokens without the padding."""
    settings(ABLATE=ablate)
    mask = padding()
    batch = random_batch(E, mask=mask)
    x, found = torch.where(mask[..., None], batch.x, 30.0), []
    for each in (batch_of(E, x, mask), batch_of(E, x[mask][None])):
        sae = make(E, "temporal_adaptation")
        encode_and_update(sae, each)
        found.append(1 - sae.variance)
    close(*found, 1e-4)


@pytest.mark.parametrize("ablate, drive", [((), "u"), ((), "z"), (("trace",), "u"), (("sharing",), "u")])
def test_adaptation_sees_the_past_of_its_own_row_alone(E, settings, ablate, drive):
    settings(ABLATE=ablate, DRIVE=drive)
    sae = adaptive(E).eval()
    x = random_batch(E).x.requires_grad_()
    for row, t in ((0, 0), (1, 3), (3, 8)):
        z = sae.encode(batch_of(E, x)).dense()
        reached = torch.autograd.grad(z[row, t].sum(), x)[0].any(-1)
        wanted = torch.zeros(4, 9, dtype=torch.bool)
        wanted[row, t if ablate == ("trace",) else slice(0, t + 1)] = True
        assert torch.equal(reached, wanted)


def test_without_trace_the_encoder_reads_rescaled_channels(E, settings):
    settings(ABLATE=("trace",))
    sae = adaptive(E).eval()
    mask = padding()
    batch = random_batch(E, mask=mask)
    p = doubles(sae)
    v = true_scaled_variance(sae.variance)
    assert sae.variance.shape == (D_IN,)
    inputs = p["beta"] * batch.x / v ** p["T"] + torch.tanh(p["theta_raw"])
    wanted = ((inputs - p["b_dec"]) @ p["W_enc"] + p["b_enc"]).clamp_min(0) * mask[..., None]
    close(sae.encode(batch).dense().detach(), wanted.detach())
    fresh, standard = make(E, "temporal_adaptation"), make(E, "standard")
    close(*(each.encode(batch).dense().detach() for each in (fresh, standard)), 1e-2)   # at first it changes nothing


@pytest.mark.parametrize("theta, T", [(0.6, 0.8), (-0.4, 0.15)])
def test_planted_adaptation_is_found(E, theta, T):
    """A teacher with this strength and temperature; a student with its dictionary, the rest at its starts."""
    width, spread = 24, torch.logspace(-1.5, 0.5, 24)           # variances of u over two orders of magnitude
    p = {"W_enc": torch.eye(width), "b_enc": torch.zeros(width), "b_dec": torch.zeros(width),
         "theta_raw": torch.tensor(math.atanh(theta)), "beta": torch.tensor(-0.8), "T": torch.tensor(T)}
    p, v = {n: value.double() for n, value in p.items()}, true_scaled_variance(spread)
    assert v.min() > 1 / 16 and v.max() < 16
    torch.manual_seed(0)
    sae = E.TemporalAdaptation(width, width, K).train()
    sae.W_enc.data, g = torch.eye(width), torch.Generator().manual_seed(1)
    own = [getattr(sae, name) for name in sae.starts]
    assert len(own) == 3
    batches = []
    for _ in range(4):
        x = torch.randn(32, 16, width, generator=g)
        for t in range(1, 16):
            x[:, t] = 0.6 * x[:, t - 1] + 0.8 * x[:, t]
        batch = batch_of(E, x * spread.sqrt())
        batches.append((batch, adapted(p, v, batch.x, None, "u").float()))
    with torch.no_grad():                                       # as after a while of training
        sae.variance.copy_(torch.cat([batch.x.relu().flatten(0, 1) for batch, _ in batches]).var(0))
    optimizer = torch.optim.Adam(own, lr=0.05)
    for step in range(250):
        batch, wanted = batches[step % 4]
        optimizer.param_groups[0]["lr"] = 0.05 * min(1.0, 2 * (1 - step / 250))
        loss = (sae.encode(batch).dense() - wanted).square().sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert sae.T.item() == pytest.approx(T, abs=0.1)
    assert sae.theta_raw.tanh().item() == pytest.approx(theta, rel=0.1)
    assert sae.beta.item() == pytest.approx(-0.8, abs=0.1)
