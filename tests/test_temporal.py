"""The temporal variants against naive loops, and their evaluation on planted chains, tokens, roles and codes."""
import copy
import importlib.util
import itertools
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from copies import copy_template
from scipy.sparse import csc_array, csr_array

D_IN, D_SAE, K = 10, 40, 4


@pytest.fixture(autouse=True)
def one_thread():
    """Batches are tiny: a second thread would only wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def settings(E, monkeypatch):
    """settings(WINDOW=3, ...) sets module constants for one test."""
    def change(**values):
        for name, value in values.items():
            monkeypatch.setattr(E, name, value)
    return change


@pytest.fixture
def edited(tmp_path):
    """edited(BUFFER=2, ...) -> the module as an agent edits it."""
    def load(**constants):
        folder, path = copy_template(tmp_path / "copy", **constants), list(sys.path)
        spec = importlib.util.spec_from_file_location("edited_experiment", folder / "experiment.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.path[:] = path
        return module
    return load


def make(E, name, seed=0, d_in=D_IN, d_sae=D_SAE):
    """A variant all of whose common parameters are at random places, decoder rows at unit norm."""
    torch.manual_seed(seed)
    sae = E.SAE_VARIANTS[name](d_in, d_sae, K)
    with torch.no_grad():
        sae.W_dec.copy_(F.normalize(sae.W_dec + 0.2 * torch.randn(d_sae, d_in), dim=1))
        sae.b_enc.normal_(-0.1, 0.1)
        sae.b_dec.normal_(0, 0.1)
    return sae.train()


def batch_of(E, x, mask=None, doc_ids=None):
    rows, seq = x.shape[:2]
    doc_ids = torch.arange(rows) if doc_ids is None else torch.tensor(doc_ids)
    return E.Batch(x, torch.zeros(rows, seq, dtype=torch.long), doc_ids, torch.arange(1, seq + 1), mask)


def random_batch(E, seed=1, rows=4, seq=9, d_in=D_IN, mask=None, doc_ids=None):
    g = torch.Generator().manual_seed(seed)
    return batch_of(E, torch.randn(rows, seq, d_in, generator=g) / d_in ** 0.5, mask, doc_ids)


def padding(rows=4, seq=9):
    """Rows of 9, 4, 7 and 1 tokens."""
    return torch.arange(seq) < torch.tensor([9, 4, 7, 1])[:rows, None]


def close(got, wanted, tolerance=1e-5, what=""):
    assert got.shape == wanted.shape, what
    scale, worst = wanted.abs().max().item(), (got.double() - wanted.double()).abs().max().item()
    assert worst <= tolerance * max(scale, 1e-3), f"{what}: off by {worst:.2e} at a scale of {scale:.2e}"


def doubles(sae):
    return {n: p.detach().double().requires_grad_() for n, p in sae.named_parameters()}


def gradients(total, parameters):
    grads = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), grads)}


# ---- Adapt: the trace and what it does to the pre-activations ----
def naive_adapt(pre, lam, theta):
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
    for form in (E.Adapt.apply, naive_adapt):
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
    assert torch.autograd.gradcheck(E.Adapt.apply, (pre, lam, theta))


def test_adapt_by_hand(E):
    """A constant input of 8, lam 1/2: traces 0, 4, 6, 7, ...; the position itself never counts."""
    half = torch.tensor([0.5])
    z = E.Adapt.apply(torch.full((1, 5, 1), 8.0), half, half)
    assert z.flatten().tolist() == [8.0, 6.0, 5.0, 4.5, 4.25]
    assert E.Adapt.apply(torch.ones(2, 1, 1), half, half).tolist() == [[[1.0]], [[1.0]]]


# ---- TemporalAdaptation ----
def adaptive(E, seed=0, **kwargs):
    """Away from its starts: theta, beta, T, and variances over three orders of magnitude."""
    sae = make(E, "temporal_adaptation", seed, **kwargs)
    g = torch.Generator().manual_seed(seed + 50)
    with torch.no_grad():
        for name, value in (("beta", 0.3), ("theta_raw", 0.8), ("T", 0.7), ("T_decay", 0.4)):
            p = getattr(sae, name, None)
            if isinstance(p, torch.nn.Parameter):
                p.copy_(value + 0.3 * torch.randn(p.shape, generator=g) * (p.dim() > 0))
        sae.variance.copy_(10 ** (3 * torch.rand(sae.variance.shape, generator=g) - 3))
    return sae


def true_scaled_variance(variance):
    v = variance.double()
    return (v / v.log().mean().exp()).clamp(1 / 16, 16)


def softplus(beta):
    return torch.log1p(torch.exp(beta))


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
    inputs, centre, W_enc = (a.double() for a in sae.encoder(batch))
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
    sae.done = 0.5
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
    stage, = sae.curriculum
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
        sae.train().encode(batch)
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
        sae.encode(each)
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


# ---- Temporal ----
def attending(E, seed=0, everything=False):
    """With open gates and every parameter of the attention at a size that shows; in evaluation, with a threshold
    that all latents pass where `everything` is set: z = ReLU(pre)."""
    sae = make(E, "temporal", seed)
    sae.attends = True
    g = torch.Generator().manual_seed(seed + 50)
    with torch.no_grad():
        sae.W_q.mul_(4.0)
        sae.W_k.mul_(4.0)
        sae.gate.copy_(torch.randn(sae.gate.shape, generator=g))
        if hasattr(sae, "P"):
            sae.P.mul_(5.0)
    if everything:
        sae.eval().threshold.fill_(-1e8)
    return sae


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
    first, second, third = sae.curriculum
    sae.dead_after.fill_(100)
    sae.tokens_since_fired[:10] = 1000
    batch, found, trained = random_batch(E), [], []
    for stage in (first, second):
        trial = copy.deepcopy(sae)
        optimizer = E.Adam(trial, 1e-2)
        torch.manual_seed(0)
        found.append(E.train_step(trial, optimizer, batch, stage, 0.0))
        trained.append((trial, optimizer))
    assert found[0]["auxk"] > 0
    for name in found[0]:
        assert found[1][name].item() == pytest.approx(found[0][name].item(), rel=1e-5), name
    assert set(found[1]) - set(found[0]) == {"consistency", "consistency_gap"}      # followed from here on, not weighed
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
    first, second, third = sae.curriculum
    E.train_step(sae, E.Adam(sae, 1e-2), random_batch(E), first, 0.0)
    sae.eval().encode(random_batch(E))
    for stage in (second, third):
        with pytest.raises(AssertionError, match="attention is computed"):
            E.train_step(sae.train(), E.Adam(sae, 1e-2), random_batch(E), stage, 0.0)


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


# ---- Consistency ----
def unit(z, n_high):
    """Codes of the first n_high latents, of norm 1 where there are any."""
    return F.normalize(torch.as_tensor(z)[..., :n_high], dim=-1)


def test_consistency_by_hand(E):
    """Two of three latents are bound. Row 0: cos 45 degrees, then an empty code; row 1: cos 1, then 0."""
    z = torch.tensor([[[1.0, 0, 9], [1, 1, 0], [0, 0, 7]], [[0, 2, 0], [0, 1, 5], [4, 0, 0]]], requires_grad=True)
    batch, half = random_batch(E, rows=2, seq=3), 0.5 ** 0.5
    found = E.consistency(batch, unit(z, 2))
    cosine = (half + 1 + 0) / 3
    assert found["consistency"].item() == pytest.approx(1 - cosine)
    assert found["consistency_gap"].item() == pytest.approx(cosine - (0 + half) / 2)    # the third has an empty code
    same = E.consistency(batch._replace(doc_ids=torch.tensor([3, 3])), unit(z, 2))
    assert same["consistency_gap"].item() == pytest.approx(cosine)          # one document: nothing to compare with
    grad = torch.autograd.grad(found["consistency"], z)[0]
    assert grad[..., :2].any() and not grad[..., 2].any() and not found["consistency_gap"].requires_grad


def test_consistency_against_a_loop(E):
    g = torch.Generator().manual_seed(0)
    z = torch.rand(5, 7, 12, generator=g) * (torch.rand(5, 7, 12, generator=g) < 0.25)
    docs, n_high = [4, 4, 1, 0, 4], 6
    near, far = [], []
    for row, t in itertools.product(range(5), range(7)):
        code = z[row, t, :n_high]
        if t and code.any() and z[row, t - 1, :n_high].any():
            near.append(F.cosine_similarity(code, z[row, t - 1, :n_high], dim=0))
        other = z[row - 1, t, :n_high]
        if docs[row] != docs[row - 1] and code.any() and other.any():
            far.append(F.cosine_similarity(code, other, dim=0))
    assert 10 < len(near) < 30 and 5 < len(far) < 21
    found = E.consistency(random_batch(E, rows=5, seq=7, doc_ids=docs), unit(z, n_high))
    near_mean, far_mean = torch.stack(near).mean().item(), torch.stack(far).mean().item()
    assert found["consistency"].item() == pytest.approx(1 - near_mean, abs=1e-6)
    assert found["consistency_gap"].item() == pytest.approx(near_mean - far_mean, abs=1e-6)


def test_the_gap_shows_a_collapse(E):
    """The same code everywhere is perfectly consistent, and its gap is 0; a code for each document has a gap of 1."""
    constant = torch.tensor([0.0, 2.0, 1.0, 0.0]).expand(4, 6, 4)
    found = E.consistency(random_batch(E, seq=6), unit(constant, 3))
    assert [found[name].item() for name in ("consistency", "consistency_gap")] == pytest.approx([0, 0], abs=1e-6)
    of_document = torch.eye(4)[:, None].expand(4, 6, 4)
    found = E.consistency(random_batch(E, seq=6), unit(of_document, 4))
    assert [found[name].item() for name in ("consistency", "consistency_gap")] == pytest.approx([0, 1], abs=1e-6)


def test_nothing_active_is_no_division_by_zero(E):
    z = torch.zeros(2, 4, 6, requires_grad=True)
    found = E.consistency(random_batch(E, rows=2, seq=4), unit(z, 3))
    found["consistency"].backward()
    assert all(torch.isfinite(value) for value in found.values()) and torch.isfinite(z.grad).all()


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
    for name, wanted in E.consistency(batch, unit(high, n_high)).items():
        close(losses[name].detach(), wanted.detach(), what=name)
    (z, span), = given
    assert span == 3 and z.shape == (4, 9, n_high)
    close(z.detach(), unit(high, n_high).detach())
    plain = {"reconstruction", "sparsity", "auxk"}
    assert set(losses) == plain | {"consistency", "consistency_gap", "contrastive"}
    sae.binds = False
    assert set(sae.losses(batch, latents)) == plain | {"consistency", "consistency_gap"}
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
    assert set(losses) == {"reconstruction", "auxk", "contrastive", "consistency", "consistency_gap"}
    z = latents.dense()
    high = z[..., :D_SAE // 5]
    code = F.normalize(high, dim=-1) if reading == "paper" else high
    wanted = info_nce(code, [0, 1, 1, 2], batch.mask, earlier)
    assert losses["contrastive"].item() == pytest.approx(wanted.item(), rel=1e-4)
    errors = [(batch.x - z[..., :n] @ sae.W_dec[:n] - sae.b_dec)[batch.mask].square().sum(-1).mean()
              for n in (D_SAE // 5, D_SAE)]
    weight = sae.curriculum[0].weights["reconstruction"]
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


# ---- Stability ----
def chains(p01, p10, windows, seq, seed=0):
    """Two-state Markov chains [window, seq, latent], begun in their stationary state."""
    rng, p01, p10 = np.random.default_rng(seed), np.asarray(p01), np.asarray(p10)
    state = np.empty((windows, seq, len(p01)), np.int8)
    state[:, 0] = rng.random((windows, len(p01))) < p01 / (p01 + p10)
    for t in range(1, seq):
        change = rng.random((windows, len(p01)))
        state[:, t] = np.where(state[:, t - 1] == 1, change >= p10, change < p01)
    return state


def expected_stability(rho, seq, lags):
    """Of an autocorrelation rho(lag): the mean over the lags, minus that over all pairs of positions."""
    every = np.arange(1, seq)
    return rho(np.arange(lags[0], lags[1] + 1)).mean() - (rho(every) * (seq - every)).sum() / (seq - every).sum()


def by_hand(active, rate, lags, order=None):
    """(mean over pairs at these lags - mean over all pairs) of a_t a_s, in units of the variance, by loops."""
    active = active if order is None else active[:, order]
    seq = active.shape[1]
    pairs = [(t, t + lag) for lag in range(lags[0], lags[1] + 1) for t in range(seq - lag)]
    near = np.mean([active[:, t] * active[:, s] for t, s in pairs], 0)
    every = np.mean([active[:, t] * active[:, s] for t, s in itertools.permutations(range(seq), 2)], 0)
    return (near - every) / (rate * (1 - rate))


@pytest.mark.parametrize("kind", ["firing", "probability"])
def test_stability_against_a_loop(E, kind):
    rng = np.random.default_rng(0)
    active = rng.random((70, 11, 3)) if kind == "probability" else chains([0.2, 0.5, 0.1], [0.3, 0.5, 0.1], 70, 11)
    active = active.astype(np.float32)
    rate = np.array([0.4, 0.5, 0.45])
    found = torch.from_numpy(active), torch.tensor(rate).float()
    got, (null, r) = E.corpus.stability(*found, (2, 4)), E.corpus.stability_null(*found, (2, 4), 1)
    assert null.shape == (1, 3) and got.shape == (70, 3)
    for lag in range(1, 11):
        wanted = ((active[:, :-lag] * active[:, lag:]).mean((0, 1)) - rate ** 2) / (rate * (1 - rate))
        assert r[lag - 1].numpy() == pytest.approx(wanted, abs=1e-5)
    assert got.numpy() == pytest.approx(by_hand(active, rate, (2, 4)), abs=1e-5)


def test_the_null_is_the_mean_over_all_permutations(E):
    active = np.random.default_rng(0).integers(0, 2, (6, 5, 4)).astype(np.float32)
    rate = np.full(4, 0.5)
    wanted = np.mean([by_hand(active, rate, (1, 2), list(order)) for order in itertools.permutations(range(5))], 0)
    assert wanted == pytest.approx(0, abs=1e-6)         # what stability subtracts is exactly that null
    torch.manual_seed(0)
    draws, _ = E.corpus.stability_null(torch.from_numpy(active), torch.tensor(rate).float(), (1, 2), 4000)
    assert draws.shape == (4000, 4)
    assert (draws.mean(0).abs() < 4 * draws.std(0) / 4000 ** 0.5).all()


def test_every_draw_is_a_stability_of_permuted_positions(E):
    """One permutation for 64 windows and all of their latents; another for the next."""
    active = np.array([1, 1, 0, 0], np.float32)[None, :, None].repeat(128, 0).repeat(3, 2)
    possible = {round(float(by_hand(active[:1], 0.5, (1, 1), list(order))[0, 0]), 4)
                for order in itertools.permutations(range(4))}
    torch.manual_seed(0)
    draws, _ = E.corpus.stability_null(torch.from_numpy(active), torch.full((3,), 0.5), (1, 1), 50)
    means = {round((a + b) / 2, 4) for a in possible for b in possible}
    assert torch.equal(draws[:, 0], draws[:, 1]) and torch.equal(draws[:, 0], draws[:, 2])
    assert {round(value, 4) for value in draws[:, 0].tolist()} == means         # the two halves apart


RATES = ([0.02, 0.05, 0.2, 0.05], [0.08, 0.1, 0.3, 0.95])       # the last has no memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stability_of_planted_chains(E, dtype):
    """Autocorrelation (1 - p01 - p10)^lag, over the null of such finite windows: by its formula and by permuting."""
    assert E.STABILITY_LAGS == (5, 16)
    state, rng = chains(*RATES, 800, 100), np.random.default_rng(1)
    active = torch.from_numpy(state).to(dtype)
    rate = active.float().mean((0, 1))
    torch.manual_seed(0)
    got, (draws, _) = E.corpus.stability(active, rate, (5, 16)), E.corpus.stability_null(active, rate, (5, 16), 4)
    assert got.shape == (800, 4) and draws.shape == (4, 4)
    permuted = np.take_along_axis(state, rng.random((800, 100, 1)).argsort(1), 1).astype(np.float32)
    a, p = state.astype(np.float32), rate.numpy()

    def r(values):          # mean autocorrelation over the lags
        return np.mean([(values[:, :-lag] * values[:, lag:]).mean((0, 1)) - p ** 2 for lag in range(5, 17)],
                       0) / (p * (1 - p))
    mean = got.mean(0).numpy()
    for i, (p01, p10) in enumerate(zip(*RATES)):
        rho = 1 - p01 - p10
        wanted = expected_stability(lambda lag: rho ** lag.astype(float), 100, (5, 16))
        assert mean[i] == pytest.approx(wanted, abs=0.02), rho
    assert mean == pytest.approx(r(a) - r(permuted), abs=0.02)
    assert mean[0] > 0.15 and abs(mean[3]) < 0.005
    assert draws.mean(0).abs().max() < 0.005            # the draws are centred on the exact mean


def test_stability_of_noise_is_0_within_its_null(E):
    rng = np.random.default_rng(0)
    active = torch.from_numpy((rng.random((60, 127, 200)) < rng.random(200) * 0.2 + 0.02).astype(np.float32))
    torch.manual_seed(0)
    found = active.bfloat16(), active.mean((0, 1))
    got, (draws, _) = E.corpus.stability(*found, (5, 16)), E.corpus.stability_null(*found, (5, 16), 50)
    z = ((got.mean(0) - draws.mean(0)) / draws.std(0)).numpy()
    assert abs(z.mean()) < 0.3 and 0.8 < z.std() < 1.25 and np.abs(z).max() < 5
    assert got.mean(0).abs().max() < 0.03


def test_slow_latents_keep_their_stability_when_windows_are_turned(E):
    """Blocks of 32 positions: autocorrelation 1 - lag / 32. A circular shift of each window changes little."""
    rng, seq = np.random.default_rng(0), 127
    blocks = rng.random((400, 6, 5)) < 0.2
    phase = rng.integers(0, 32, 400)
    active = np.stack([np.repeat(b, 32, 0)[s:s + seq] for b, s in zip(blocks, phase)]).astype(np.float32)
    turned = np.stack([np.roll(a, s, 0) for a, s in zip(active, rng.integers(0, seq, 400))])
    wanted = expected_stability(lambda lag: np.maximum(1 - lag / 32, 0), seq, (5, 16))
    found = [E.corpus.stability(torch.from_numpy(a), torch.from_numpy(a).mean((0, 1)), (5, 16)).mean(0).numpy()
             for a in (active, turned)]
    assert wanted > 0.4
    assert found[0] == pytest.approx(wanted, abs=0.05)
    assert (found[1] < found[0]).all() and (found[1] > 0.8 * found[0]).all()    # lost is what lies across the seam


# ---- What tokens alone explain ----
def fire_given_token(E, active, tokens, fold):
    """Of tensors active [window, seq, d], tokens [window, seq], fold [window]."""
    sparse = csc_array(active.float().flatten(0, 1).numpy())
    return torch.from_numpy(E.corpus.fire_given_token(sparse, tokens.numpy(), fold.numpy()))


def slow_tokens(windows=300, seq=100, vocabulary=12, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocabulary, (windows, seq))
    stay = rng.random((windows, seq)) < 0.9
    for t in range(1, seq):
        tokens[:, t] = np.where(stay[:, t], tokens[:, t - 1], tokens[:, t])
    return torch.from_numpy(tokens)


def test_what_is_a_function_of_the_token_is_explained_by_it(E):
    """Three latents by the token, slow with it; three as slow and blind to it."""
    tokens = slow_tokens()
    by_token = torch.stack([(tokens < 2), (tokens == 5), (tokens % 3 == 0)], -1).float()
    blind = torch.from_numpy(chains([0.02] * 3, [0.08] * 3, 300, 100)).float()
    active = torch.cat([by_token, blind], -1)
    rate, fold = active.float().mean((0, 1)), torch.arange(300) % 2 == 0
    expected = fire_given_token(E, active, tokens, fold)
    assert expected.shape == active.shape
    assert (expected[..., :3].float() - by_token).abs().max() < 0.01
    assert (expected[..., 3:].float() - rate[3:]).abs().max() < 0.15
    observed, surrogate = (E.corpus.stability(a, rate, (5, 16)).mean(0) for a in (active, expected))
    assert observed.min() > 0.15
    assert surrogate[:3].tolist() == pytest.approx(observed[:3].tolist(), rel=0.02)
    assert surrogate[3:].abs().max() < 0.01


def test_fire_given_token_counts_in_the_other_fold(E):
    """Token 3: 4 times and 3 firings in the second fold, twice and no firing in the first; 9 is in the first alone. Mean
    rate: 7 of 12."""
    tokens = torch.tensor([[3, 9, 3], [3, 3, 4], [3, 3, 4], [9, 9, 4]])
    active = torch.tensor([[0.0, 1, 0], [1, 1, 0], [1, 0, 1], [1, 1, 0]])[..., None]
    fold, rate = torch.tensor([True, False, False, True]), 7 / 12
    expected = fire_given_token(E, active, tokens, fold)[..., 0]
    first, second, four = (3 + rate) / 5, (0 + rate) / 3, (1 + rate) / 3
    own = (0 + rate) / 2                                # token 4 in the first fold: once, silent
    wanted = [[first, rate, first], [second, second, own], [second, second, own], [rate, rate, four]]
    assert torch.allclose(expected, torch.tensor(wanted))


def test_fire_given_token_against_a_loop(E):
    rng = np.random.default_rng(0)
    tokens, fold = rng.integers(0, 8, (20, 6)) * 1000, np.arange(20) % 3 == 0
    active = (rng.random((20, 6, 3)) < 0.3).astype(np.float32)
    rate = active.mean((0, 1))
    got = fire_given_token(E, *map(torch.from_numpy, (active, tokens, fold))).numpy()
    for w, t in itertools.product(range(20), range(6)):
        same = tokens[fold != fold[w]] == tokens[w, t]
        wanted = (active[fold != fold[w]][same].sum(0) + rate) / (same.sum() + 1)
        assert got[w, t] == pytest.approx(wanted, rel=1e-5)


# ---- Smoothness ----
def test_smoothness_by_hand(E):
    """|dx| = 2, 1. Latent 0 moves by 3, 2: at most 2 a unit of x, of a scale of 4. Latent 1 by 0, 4, of 2."""
    z = torch.tensor([[[0.0, 0.0], [3.0, 0.0], [1.0, 4.0]]])
    x = torch.tensor([[[0.0, 0.0], [0.0, 2.0], [1.0, 2.0]]])
    assert E.corpus.smoothness(z, x, 1.0).tolist() == pytest.approx([6.0])
    assert E.corpus.smoothness(z, x, torch.tensor([4.0, 2.0])).tolist() == pytest.approx([2.5])


def test_smoothness_is_that_of_each_window_and_free_of_scale(E):
    g = torch.Generator().manual_seed(0)
    z, x = torch.rand(130, 8, 5, generator=g), torch.randn(130, 8, 3, generator=g)
    scale = torch.rand(5, generator=g) + 0.5
    got, wanted = E.corpus.smoothness(z, x, scale), []
    for w in range(130):
        wanted.append(sum(max((abs(z[w, t + 1, i] - z[w, t, i]) / (x[w, t + 1] - x[w, t]).norm()).item()
                              for t in range(7)) / scale[i].item() for i in range(5)))
    assert got.tolist() == pytest.approx(wanted, rel=1e-4)
    for factor in (0.01, torch.tensor([1.0, 100.0, 0.1, 3.0, 7.0])):
        close(E.corpus.smoothness(factor * z, x, factor * scale), got, 1e-4)
    assert not torch.allclose(E.corpus.smoothness(0.5 * z, x, 1.0), E.corpus.smoothness(z, x, 1.0))


# ---- Classes and coherence ----
def test_token_classes(E, make_store):
    tokens = np.array([[0, 1, 1], [0, 7, 7], [0, 7, 2], [0, 2, 7], [0, 5, 7]])
    store = make_store(torch.randn(5, 3, 2), 1, tokens)
    assert E.corpus.token_classes(store.windows)[[0, 1, 2, 5, 7]].tolist() == [0] * 5     # the most frequent token
    of_token = dict(zip(tokens[1:, 1:].ravel().tolist(), E.corpus.token_classes(store.windows).tolist()))
    assert of_token[7] == 0 and of_token[2] == 1 and len(set(of_token.values())) == 3
    labels = np.zeros((4, 3, 2), np.int8) - 1
    labels[:, 1] = [[0, 1], [0, 2], [0, 1], [1, 1]]
    store.windows = store.windows._replace(labels=labels)
    a, b, c, d = E.corpus.token_classes(store.windows).reshape(4, 2)[:, 0].tolist()
    assert a == c and len({a, b, d}) == 3
    store.windows = store.windows._replace(labels=np.full((4, 3, 2), -1, np.int8))
    assert E.corpus.token_classes(store.windows)[0] == 0               # nothing known: by token


def test_token_classes_beyond_the_255_most_frequent(E, make_store):
    tokens = np.concatenate([np.arange(400), np.arange(254), np.arange(253), np.full(93, 399)]).reshape(10, 100)
    windows = np.concatenate([np.zeros((10, 1), int), tokens], 1)
    store = make_store(torch.randn(11, 101, 1), 1, np.concatenate([windows[:1], windows]))
    classes = E.corpus.token_classes(store.windows)
    of_token = dict(zip(tokens.ravel().tolist(), classes.tolist()))
    assert of_token[399] == 0 and {of_token[i] for i in range(254)} == set(range(1, 255))
    assert {of_token[i] for i in range(254, 399)} == {255}


class Roles:
    """128 files of two windows of 127 positions with 50 classes; latents fire on the classes of their role."""
    n_windows, n_classes = 256, 50

    def __init__(self, seed=0):
        self.rng = np.random.default_rng(seed)
        self.classes = self.rng.integers(0, self.n_classes, self.n_windows * 127)
        self.files = np.repeat(np.arange(128), 2) + 1000
        window, self.position = np.divmod(np.arange(len(self.classes)), 127)
        self.late, self.odd = self.position >= 63, self.files[window] % 2 == 1
        self.early = self.position < 32
        self.roles = [self.rng.choice(self.n_classes, 3, replace=False) for _ in range(100)]

    def firings(self, early, late, odd=None, n=60):
        """Indices where a latent of role `early` (at positions 1-32; in odd files `odd`, where given) and `late`
        (from 64 on) fires; where the role is not looked at, it fires often, and on other classes."""
        on_early, on_late = (np.isin(self.classes, role) for role in (early, late))
        on_odd = on_early if odd is None else np.isin(self.classes, odd)
        blocks = [on_early & self.early & ~self.odd, on_odd & self.early & self.odd, on_late & self.late & self.odd]
        chosen = [self.rng.choice(np.flatnonzero(block), n, replace=False) for block in blocks]
        other = np.isin(self.classes, self.roles[self.rng.integers(100)]) & ~self.early & ~(self.late & self.odd)
        return np.sort(np.concatenate([*chosen, self.rng.choice(np.flatnonzero(other), 300, replace=False)]))

    def coherence(self, E, firings, rate=None, **kwargs):
        rate = np.linspace(0.01, 0.02, len(firings)) if rate is None else np.asarray(rate)
        return E.corpus.coherence(firings, self.classes, self.files, rate, np.random.default_rng(0), **kwargs)


@pytest.mark.parametrize("swapped", [0, 50, 100])
def test_coherence_is_the_share_of_stable_roles(E, settings, swapped):
    """The first `swapped` latents exchange their roles in pairs between positions 1-32 and 64 and later."""
    settings(CONTEXT_LENGTH=128)
    plan = Roles()
    firings = [plan.firings(plan.roles[i], plan.roles[i ^ 1 if i < swapped else i]) for i in range(100)]
    assert plan.coherence(E, firings) == pytest.approx(1 - swapped / 100, abs=0.05)


def test_coherence_is_over_the_recognition_in_the_same_block(E, settings):
    """Half of the latents change their roles between files and not between positions: as coherent as files allow."""
    settings(CONTEXT_LENGTH=128)
    plan = Roles()
    others = [plan.roles[i ^ 1 if i < 50 else i] for i in range(100)]
    assert plan.coherence(E, [plan.firings(plan.roles[i], others[i], others[i]) for i in range(100)]) > 0.9


def test_coherence_counts_from_chance(E, settings):
    """Of ten, one would be recognised by chance: none is where roles are swapped, all are in the same block."""
    settings(CONTEXT_LENGTH=128)
    plan = Roles()
    firings = [plan.firings(range(5 * i, 5 * i + 5), range(5 * (i ^ 1), 5 * (i ^ 1) + 5)) for i in range(10)]
    assert plan.coherence(E, firings) == pytest.approx((0 - 1) / (10 - 1))


def test_coherence_compares_latents_of_like_rate(E, settings):
    """From 64 on, ten latents fire mostly on what another one fires on early: told apart where that one, by its
    rate, is in another group."""
    settings(CONTEXT_LENGTH=128)
    plan, firings = Roles(), []
    pairs = [([4 * i, 4 * i + 1], [4 * i + 2, 4 * i + 3]) for i in range(10)]
    firings += [plan.firings(own, own[:1] + other) for own, other in pairs]
    firings += [plan.firings(other, other) for own, other in pairs]
    near = [2 * i for i in range(10)] + [2 * i + 1 for i in range(10)]
    assert plan.coherence(E, firings, np.arange(20), group=10) > 0.9
    assert plan.coherence(E, firings, near, group=10) == pytest.approx(0.5, abs=0.1)
    assert plan.coherence(E, firings, np.arange(20), group=20) == pytest.approx(0.5, abs=0.1)


def test_coherence_of_too_few_latents_is_none(E, settings):
    settings(CONTEXT_LENGTH=128)
    plan = Roles()
    firings = [plan.firings(role, role) for role in plan.roles[:12]]
    assert plan.coherence(E, firings) is not None
    assert plan.coherence(E, firings[:9]) is None
    assert plan.coherence(E, [plan.firings(role, role, n=49) for role in plan.roles[:12]]) is None
    assert plan.coherence(E, []) is None
    early = [f[plan.early[f]] for f in firings]         # nothing at later positions
    assert plan.coherence(E, early) is None


@pytest.mark.parametrize("n", [12, 40])
def test_coherence_of_latents_without_roles_stays_within_bounds(E, settings, n):
    """Where the same block is not recognised above chance there is nothing to divide by."""
    settings(CONTEXT_LENGTH=128)
    every = np.arange(50)
    for seed in range(6):
        plan = Roles(seed)
        value = plan.coherence(E, [plan.firings(every, every) for _ in range(n)])
        assert value is None or abs(value) < 10


# ---- Entropies ----
def test_entropy_by_hand(E):
    assert E.corpus.entropy(np.array([4, 4, 4])) == 0.0
    assert E.corpus.entropy(np.array([1, 1, 2, 3])) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(4) + 2 / 8)
    assert E.corpus.entropy(np.array([9, 5] * 8)) == pytest.approx(math.log(2) + 1 / 32)


def test_entropy_is_nearly_unbiased(E):
    rng = np.random.default_rng(0)
    found = np.mean([E.corpus.entropy(rng.integers(0, 20, 64)) for _ in range(400)])
    assert found == pytest.approx(math.log(20), abs=0.03)


@pytest.mark.parametrize("kind, low, high", [("random", 0.95, 1.05), ("token", 0.0, 0.001), ("class", 0.0, 0.001),
                                             ("two tokens", 0.15, 0.3), ("mixed", 0.48, 0.53)])
def test_polysemanticity_of_planted_units(E, kind, low, high):
    """Tokens and classes independent: a unit of one of either has none, by the smaller of the two."""
    rng = np.random.default_rng(0)
    tokens, classes = rng.integers(0, 30, 20000), rng.integers(0, 8, 20000)

    def unit(kind):
        among = {"token": tokens == 3, "class": classes == 2, "two tokens": np.isin(tokens, (3, 4))}
        return rng.choice(np.flatnonzero(among.get(kind, np.ones(20000, bool))), 200, replace=False)
    units = [unit(("random", "token")[i % 2] if kind == "mixed" else kind) for i in range(40)]
    found = E.corpus.polysemanticity(units, (tokens, classes), np.arange(20000), np.random.default_rng(1))
    assert low <= found <= high


def test_polysemanticity_of_units_that_fire_too_rarely(E):
    rng, places, kinds = np.random.default_rng(0), np.arange(500), (np.arange(500), np.arange(500) % 7)
    assert E.corpus.polysemanticity([np.arange(63)] * 5, kinds, places, rng) == 1.0
    one_class = np.flatnonzero(kinds[1] == 3)[:64]      # 64 firings are enough, and all that counts
    assert E.corpus.polysemanticity([np.arange(63), one_class], kinds, places, rng) == 0.0


def test_polysemanticity_is_over_the_null_at_its_places(E):
    """Where the null's places hold two kinds, four kinds are twice as many nats."""
    kinds, rng = (np.arange(4000) % 4, np.arange(4000) % 4), np.random.default_rng(0)
    two = np.flatnonzero(kinds[0] < 2)
    assert E.corpus.polysemanticity([np.arange(4000)] * 20, kinds, two, rng) == pytest.approx(2, rel=0.05)


# ---- Similarity between positions ----
def loop_similarity(z):
    z = F.normalize(z.double(), dim=-1)
    n, seq, _ = z.shape
    matrix = torch.zeros(seq, seq)
    for t, s in itertools.product(range(seq), repeat=2):
        same = sum(z[w, t] @ z[w, s] for w in range(n)) / n
        other = sum(z[a, t] @ z[b, s] for a in range(n) for b in range(n) if a != b) / n / (n - 1)
        matrix[t, s] = same - other
    return matrix


def similarity_matrix(E, z):
    return torch.from_numpy(E.corpus.similarity_matrix(csr_array(z.flatten(0, 1).numpy()), z.shape[1]))


def test_similarity_matrix_against_a_double_loop(E):
    z = torch.randn(24, 6, 9, generator=torch.Generator().manual_seed(0)).relu()       # more than one chunk
    close(similarity_matrix(E, z), loop_similarity(z), 1e-5)


@pytest.mark.parametrize("kind, wanted", [("constant", 0.0), ("document", 1.0), ("position", 0.0)])
def test_similarity_matrix_of_planted_codes(E, kind, wanted):
    """Of one code for all, of one for each document, of one for each position: only the second stands out."""
    n, seq = 20, 6
    z = {"constant": torch.ones(n, seq, n), "document": 3 * torch.eye(n)[:, None].expand(n, seq, n),
         "position": torch.eye(n)[:seq].expand(n, seq, n)}[kind]
    got = similarity_matrix(E, z)
    assert torch.allclose(got.float(), torch.full((seq, seq), wanted), atol=1e-5)


# ---- Parameters through training ----
def log_of(**kwargs):
    return {"step": [20, 40, 60, 80, 100], "parameters": {}, "losses": {}, "stages": ["a"],
            "stage_starts": [0]} | kwargs


def run_of(E, store, sae, log=None, live=(5, 3)):
    return E.Run(sae, store, None, 0, live, log or log_of())


@pytest.mark.parametrize("values, step", [([0, 0.5, 1.04, 0.96, 1.0], 60), ([1.0] * 5, 20), ([1, 1, 1, 0.9, 1], 100),
                                          ([5, 4, 3, 2, 1], 100), ([-2, -1, -1, -1, -1], 40)])
def test_convergence_is_the_step_from_which_a_parameter_stays(E, make_store, values, step):
    store = make_store(torch.randn(6, 5, 3), 3)
    found = E.follow(run_of(E, store, E.SAE(3, 8, 2), log_of(parameters={"theta": values})))
    assert found == {"theta_final": values[-1], "theta_converged_at": step}


def test_sensitivity_is_the_slope_of_the_validation_loss(E, make_store):
    """A decoder bias p (1, 1, 1): the loss has the slope 2 p |1|^2 - 2 E[1 . (x - z W_dec)]; the rest stays put."""
    store = make_store(torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(0)), 3)
    for start in (0.0, 2.0, -0.5):
        torch.manual_seed(0)
        sae = E.TopK(3, 8, 2)
        sae.p = torch.nn.Parameter(torch.tensor(start))
        sae.decode = lambda latents: latents.decode(sae.W_dec) + sae.p
        state = copy.deepcopy(sae.state_dict())
        found = E.follow(run_of(E, store, sae))
        batch = store.batch(np.arange(3, 6))
        slope = torch.autograd.grad(E.squared_error(batch, sae.decode(sae.encode(batch))), sae.p)[0].item()
        assert found == {"p_sensitivity": pytest.approx(slope, rel=1e-2, abs=1e-3)}
        assert all(torch.equal(v, state[n]) for n, v in sae.state_dict().items())


@pytest.mark.parametrize("gaps, alarm", [([0.1, 0.3, 0.5, 0.6, 0.7], 0.0), ([0.1, 0.3, 0.5, 0.2, 0.2], 1.0),
                                         ([0.9, 0.2, 0.3, 0.3, 0.4], 0.0)])
def test_collapse_alarm(E, make_store, gaps, alarm):
    """The gap is compared with the one at the end of the stage before the consistency loss came in, step 40."""
    store = make_store(torch.randn(6, 5, 3), 3)
    log = log_of(losses={"consistency_gap": gaps}, stages=["a", "b", "c"], stage_starts=[0, 20, 40])
    found = E.follow(run_of(E, store, E.SAE(3, 8, 2), log))
    assert found == {"consistency_gap": gaps[-1], "consistency_gap_before": gaps[1], "collapse_alarm": alarm}
    found = E.follow(run_of(E, store, E.SAE(3, 8, 2), log | {"stages": ["a"], "stage_starts": [0]}))
    assert found["consistency_gap_before"] == gaps[0]   # a single stage: with its beginning


def test_collapse_alarm_of_a_short_run(E, make_store):
    """The last stage begins before the first logged row: that row is the nearest."""
    log = log_of(losses={"consistency_gap": [0.5, 0.4, 0.3, 0.2, 0.1]}, stages=["a", "b"], stage_starts=[0, 10])
    found = E.follow(run_of(E, make_store(torch.randn(6, 5, 3), 3), E.SAE(3, 8, 2), log))
    assert found == {"consistency_gap": 0.1, "consistency_gap_before": 0.5, "collapse_alarm": 1.0}


def test_cross_feature_consistency_gives_the_temperature(E, make_store, settings):
    store = make_store(torch.randn(6, 5, D_IN), 3)
    sae = adaptive(E).eval()
    found = E.follow(run_of(E, store, sae))
    assert found["decay_slope"] == pytest.approx(0.7, abs=1e-3) and found["decay_r2"] == pytest.approx(1, abs=1e-4)
    assert {f"{name}_sensitivity" for name in ("beta", "theta_raw", "T")} <= set(found)
    settings(ABLATE=("sharing",))
    spread = adaptive(E).eval()
    found = E.follow(run_of(E, store, spread))
    assert 0.5 < found["decay_slope"] < 0.9 and found["decay_r2"] < 0.999
    settings(ABLATE=("variance_scaling",))
    assert "decay_slope" not in E.follow(run_of(E, store, adaptive(E).eval()))


@pytest.mark.parametrize("beta, T", [(3.0, 2.0), (-15.0, 1.5)])
def test_decays_near_0_and_1_give_finite_results(E, make_store, beta, T):
    """A fast and a slow adaptation: the decays round to 0 or 1 in single precision."""
    store = make_store(torch.randn(6, 5, D_IN), 3)
    sae = adaptive(E).eval()
    sae.beta.data.fill_(beta)
    sae.T.data.fill_(T)
    assert all(math.isfinite(value) for value in E.follow(run_of(E, store, sae)).values())


# ---- The evaluation as a whole ----
CONTEXT = 40


@pytest.fixture
def text(E, make_store, monkeypatch):
    """text(name, lengths, filler) -> Store: 12 training windows and 40 held-out ones of 20 files, with slow and
    fast directions; controls and a tokenizer that need no model."""
    def build(name="store", lengths=None, filler=None, n=40):
        g = torch.Generator().manual_seed(0)
        x = torch.randn(12 + n, CONTEXT, 16, generator=g)
        for t in range(1, CONTEXT):
            x[:, t, :8] = 0.9 * x[:, t - 1, :8] + 0.44 * x[:, t, :8]
        lengths = np.full(12 + n, CONTEXT) if lengths is None else np.asarray(lengths)
        tokens = np.random.default_rng(0).integers(1, 30, (12 + n, CONTEXT))
        hidden = np.arange(CONTEXT) >= lengths[:, None]
        if filler is not None:
            tokens[hidden] = filler(hidden.sum())
        x[torch.from_numpy(hidden)] = 0.0
        doc_ids = np.concatenate([np.arange(12), 12 + np.arange(n) // 2])
        return make_store(x, 12, tokens, lengths, doc_ids, name)

    def controls(run):
        return {"variance_by_position": E.variance_by_position(run.store)[0]}
    monkeypatch.setattr(E, "controls", controls)
    monkeypatch.setattr(E, "STABILITY_LAGS", (2, 4))            # within windows of 39 positions
    decode = SimpleNamespace(batch_decode=lambda tokens: [f"<{int(t[0])}>" for t in tokens])
    monkeypatch.setattr(E, "load_tokenizer", lambda: decode)
    return build


def dictionary(E, name="topk", d_sae=64):
    torch.manual_seed(0)
    sae = E.SAE_VARIANTS[name](16, d_sae, 6).eval()
    if hasattr(sae, "threshold"):
        sae.threshold.fill_(0.4)
    if name in ("standard", "temporal_adaptation"):
        sae.b_enc.data.fill_(-0.3)
    sae.b_enc.data[5:9] = -10.0                         # four latents are dead
    return sae


def is_plain(value):
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(part) for key, part in value.items())
    return is_plain(list(value)) if type(value) is tuple else (
        all(map(is_plain, value)) if type(value) is list else type(value) in (float, int, str, type(None)))


METRICS = {"stability", "stability_unweighted", "energy", "stability_token", "stability_null_95", "stability_far",
           "stable_fraction", "autocorrelation_lag1", "smoothness", "smoothness_raw", "polysemanticity",
           "polysemanticity_channels", "explained_variance_early", "explained_variance_late"}
CURVES = {"autocorrelation", "stability_null", "stability_by_rate_decile", "similarity_matrix", "evolution"}


@pytest.mark.parametrize("name, ablate, own, drawn", [
    ("topk", (), set(), set()), ("standard", (), set(), set()),
    ("temporal", (), set(), set()), ("temporal", ("attention",), set(), set()), ("tsae", (), set(), set()),
    ("temporal_adaptation", (), {f"{n}_sensitivity" for n in ("beta", "theta_raw", "T")},
     {"variance", "scaled_variance", "decay"}),
    ("temporal_adaptation", ("sharing",), {"T_sensitivity"}, {"variance", "scaled_variance", "decay"}),
    ("temporal_adaptation", ("variance_scaling",), {f"{n}_sensitivity" for n in ("beta", "theta_raw")},
     {"variance", "scaled_variance", "decay"}),
    ("temporal_adaptation", ("trace",), {f"{n}_sensitivity" for n in ("beta", "theta_raw", "T")}, {"variance"})])
def test_eval_temporal_end_to_end(E, settings, text, name, ablate, own, drawn):
    settings(ABLATE=ablate, NULL_DRAWS=8)
    store = text()
    sae = dictionary(E, name)
    if name == "temporal":
        sae.attends = True
    result = E.Result(**E.corpus.evaluated(E.eval_temporal, run_of(E, store, sae)))
    assert METRICS | own <= set(result.metrics) and CURVES | drawn <= set(result.curves)
    assert all(math.isfinite(float(value)) for value in result.metrics.values())
    assert is_plain(result.curves) and is_plain(result.per_sequence)
    json.dumps(result[1:], allow_nan=False)
    n = len(store.windows.sample())
    assert n == 20 and {k: len(v) for k, v in result.per_sequence.items()} == {"stability": n, "stability_far": n, "smoothness": n}
    m, c = result.metrics, result.curves
    assert m["stability"] > 0.03 and m["stability"] > m["stability_null_95"]    # half of the directions are slow
    assert np.mean(result.per_sequence["stability"]) == pytest.approx(m["stability"], rel=1e-4)
    assert np.mean(result.per_sequence["smoothness"]) == pytest.approx(m["smoothness"], rel=1e-4)
    assert abs(m["stability_token"]) < 0.02                                             # tokens are noise here
    assert 0 < m["stable_fraction"] <= 1 and 0.8 < m["polysemanticity"] < 1.2
    assert c["autocorrelation"][0] == pytest.approx(m["autocorrelation_lag1"]) and len(c["autocorrelation"]) == 32
    assert np.quantile(c["stability_null"], 0.95) == pytest.approx(m["stability_null_95"])
    assert len(c["stability_null"]) == 8 and len(c["stability_by_rate_decile"]) == 10
    similarity = np.array(c["similarity_matrix"])
    assert similarity.shape == (20, 20) and np.abs(similarity - similarity.T).max() < 2e-4
    assert np.diag(similarity).min() > np.diag(similarity, 8).max()
    seen = c["evolution"]
    assert len(seen["tokens"]) == CONTEXT - 1 and len(seen["values"]) == len(seen["latents"]) <= 16
    assert seen["tokens"] == [f"<{t}>" for t in store.windows.tokens[12, 1:]]
    z = sae.encode(store.batch([12])).dense()[0]
    assert np.array(seen["values"]) == pytest.approx(z[:, seen["latents"]].t().detach().numpy(), abs=1e-4)


def test_explained_variance_of_the_two_halves(E, settings, text):
    settings(NULL_DRAWS=2)
    store, sae = text(), dictionary(E)
    store.maps[0] *= torch.linspace(0.5, 2.0, CONTEXT)[:, None]        # later tokens have more to explain
    m = E.eval_temporal(run_of(E, store, sae)).metrics
    batch = store.batch(np.arange(12, 52))
    error = (batch.x - sae.decode(sae.encode(batch))).square().sum(-1).mean(0).detach()
    variance = (batch.x - batch.x.mean((0, 1))).square().sum(-1).mean(0)
    for name, part in (("early", slice(0, 19)), ("late", slice(19, 39))):
        wanted = 1 - (error[part].sum() / variance[part].sum()).item()
        assert m[f"explained_variance_{name}"] == pytest.approx(wanted, abs=1e-4)


def test_evolution_shows_the_latents_with_the_most_stable_energy(E, text):
    store, sae = text(), dictionary(E)
    z = sae.encode(store.batch([20])).dense()[0].detach().numpy()
    alive = np.flatnonzero(z.any(0))[::2]
    for stable in (np.ones(len(alive)), np.linspace(-0.1, 0.5, len(alive))):
        score = np.square(z[:, alive]).sum(0) * np.maximum(stable, 1e-6)
        found = E.corpus.evolution(z, ["a"] * len(z), stable, alive, n=7)
        assert found["latents"].tolist() == alive[np.argsort(-score)[:7]].tolist()
        assert found["values"] == pytest.approx(z[:, found["latents"]].T, abs=1e-4)
        assert found["tokens"] == ["a"] * len(z)


def statistics(E, store, sae, full):
    run = run_of(E, store, sae)
    z, alive = run.heldout[0], np.flatnonzero(run.live_latents[0])
    q95 = np.array([np.quantile(z[:, [i]].data, 0.95) for i in alive], dtype=np.float32)
    rows = [window * (CONTEXT - 1) + t for window in full for t in range(CONTEXT - 1)]
    with torch.no_grad():
        return run, q95, alive, E.latent_statistics(run, z.tocsr()[rows], full, alive, q95)


def test_latent_statistics_against_loops(E, settings, text):
    """By latent: stability, its token surrogate, autocorrelation, rate, energy; by window: smoothness."""
    settings(NULL_DRAWS=3)
    lengths = np.full(52, CONTEXT)
    lengths[[14, 15, 30]] = 20, 33, 39
    store, sae = text(lengths=lengths), dictionary(E)
    full = store.windows.full()
    assert full.tolist() == [i for i in range(40) if i not in (2, 3, 18)]
    run, q95, alive, (observed, far, null, token, r, rate, energy, scaled, raw) = statistics(E, store, sae, full)
    assert len(alive) == 60
    batch = store.batch(full + 12)
    z = sae.encode(batch).dense().detach()[..., torch.from_numpy(alive)]
    a = (z > 0).float()
    p = a.mean((0, 1))
    assert rate == pytest.approx(p.numpy(), rel=1e-5)
    assert energy == pytest.approx(z.square().mean((0, 1)).numpy(), rel=1e-5)
    assert observed == pytest.approx(by_hand(a.numpy(), p.numpy(), (2, 4)).T, abs=2e-3)
    assert far == pytest.approx(by_hand(a.numpy(), p.numpy(), (17, 32)).T, abs=2e-3)
    assert null.shape == (len(alive), 3) and observed.shape == (len(alive), len(full))
    fold = torch.from_numpy(store.windows.doc_ids[full + 12] % 2 == 0)
    given = fire_given_token(E, a, batch.tokens, fold)
    assert token == pytest.approx(by_hand(given.numpy(), p.numpy(), (2, 4)).mean(0), abs=2e-3)
    for lag in (1, 5, 32):
        wanted = ((a[:, :-lag] * a[:, lag:]).mean((0, 1)) - p ** 2) / (p * (1 - p))
        assert r[:, lag - 1] == pytest.approx(wanted.numpy(), abs=1e-4)
    present = (a.amax(1) > 0).sum(1)
    assert scaled == pytest.approx((E.corpus.smoothness(z, batch.x, torch.from_numpy(q95)) / present).numpy(), rel=1e-4)
    assert raw == pytest.approx((E.corpus.smoothness(z, batch.x, 1.0) / present).numpy(), rel=1e-4)
    m, mean, weight = E.eval_temporal(run).metrics, observed.mean(1), energy / energy.sum()
    for name, value in (("stability", mean @ weight), ("stability_far", far.mean(1) @ weight), ("stability_unweighted", mean.mean()), ("energy", energy.sum()),
                        ("stability_token", token @ weight),
                        ("autocorrelation_lag1", r[:, 0] @ weight),
                        ("smoothness", scaled.mean()), ("smoothness_raw", raw.mean())):
        assert m[name] == pytest.approx(value, rel=1e-4), name


def test_smoothness_divides_by_the_exact_number_of_present_latents(E, settings, text):
    """Hundreds of latents in a window: more than eight bits can count."""
    settings(NULL_DRAWS=1)
    store, sae = text(n=8), dictionary(E, "standard", 700)
    full = store.windows.full()
    _, _, alive, found = statistics(E, store, sae, full)
    batch = store.batch(full + 12)
    z = sae.encode(batch).dense().detach()[..., torch.from_numpy(alive)]
    present = (z > 0).any(1).sum(1)
    assert present.min() > 257
    assert found[-1] == pytest.approx((E.corpus.smoothness(z, batch.x, 1.0) / present).numpy(), rel=2e-4)


def test_a_padded_window_is_left_out(E, settings, text):
    """Of the figures by position; its file is in the per-sequence lists by its other window, or as None."""
    settings(NULL_DRAWS=2)
    lengths = np.full(52, CONTEXT)
    lengths[[12, 13, 14]] = 20, 33, 39                  # both windows of the first file, one of the second
    store, sae = text(lengths=lengths), dictionary(E)
    result = E.Result(**E.corpus.evaluated(E.eval_temporal, run_of(E, store, sae)))
    assert result.per_sequence["stability"][0] is None and result.per_sequence["smoothness"][0] is None
    assert all(value is not None for values in result.per_sequence.values() for value in values[1:])
    json.dumps(result[1:], allow_nan=False)
    full = store.windows.full()
    *_, (*_, scaled, _) = statistics(E, store, sae, full)
    assert full.tolist() == list(range(3, 40)) and len(scaled) == 37
    assert result.per_sequence["smoothness"][1] == pytest.approx(scaled[0])
    assert result.per_sequence["smoothness"][2] == pytest.approx(scaled[1:3].mean())
    assert result.curves["evolution"]["tokens"] == [f"<{t}>" for t in store.windows.tokens[15, 1:]]


def test_what_stands_in_the_padding_changes_no_temporal_figure(E, settings, text):
    settings(NULL_DRAWS=4)
    lengths = np.where(np.arange(52) % 4 == 1, 15, CONTEXT)
    rng, results = np.random.default_rng(5), []
    for name, filler in (("same", np.zeros), ("other", lambda n: rng.integers(100, 130, n))):
        results.append(E.eval_temporal(run_of(E, text(name, lengths, filler), dictionary(E))))
    for part in ("metrics", "per_sequence"):
        a, b = (getattr(result, part) for result in results)
        for name in a:
            assert a[name] == pytest.approx(b[name], abs=1e-6), name


def test_no_full_window_is_an_error(E, settings, text):
    store, sae = text(lengths=np.full(52, CONTEXT - 1)), dictionary(E)
    with pytest.raises(E.corpus.DataError, match="CONTEXT_LENGTH = 40"):
        E.eval_temporal(run_of(E, store, sae))
    lengths = np.full(52, CONTEXT - 1)
    lengths[[0, 20]] = CONTEXT                          # one is not enough, nor do training windows help
    with pytest.raises(E.corpus.DataError, match="CONTEXT_LENGTH = 40"):
        text("one", lengths).windows.full()


def test_a_dictionary_without_live_latents_is_an_error(E, text):
    sae = dictionary(E)
    sae.b_enc.data -= 100.0
    with pytest.raises(E.RunnerError, match="live"):
        E.eval_temporal(run_of(E, text(), sae))


def test_slow_and_scrambled_activations_are_told_apart(E, settings, text):
    """The same dictionary over the same tokens, with each window's positions shuffled: nothing is left."""
    settings(NULL_DRAWS=20)
    store, sae = text(), dictionary(E)
    slow = E.eval_temporal(run_of(E, store, sae)).metrics
    g = torch.Generator().manual_seed(0)
    for w in range(52):
        store.maps[0][w, 1:] = store.maps[0][w, 1:][torch.randperm(CONTEXT - 1, generator=g)]
    fast = E.eval_temporal(run_of(E, store, sae)).metrics
    assert slow["stability"] > 0.03 and abs(fast["stability"]) < 0.01
    assert slow["stable_fraction"] > 0.4 and fast["stable_fraction"] < 0.1
    assert slow["autocorrelation_lag1"] > fast["autocorrelation_lag1"] + 0.1
    assert slow["smoothness"] != fast["smoothness"]
