"""The trainer: schedules, what trains, optimiser, errors, the log, the same bits after a kill."""
import copy
import itertools
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from runtime.process import prefetched

D_IN, D_SAE, K, CONTEXT, SIZE = 12, 32, 3, 17, 4
FAR = 10 ** 12                          # a deadline that never comes


def planted(seed, windows, context=CONTEXT, d_in=D_IN, features=20):
    """Sparse sums of few directions, [window, position, d_in]."""
    directions = F.normalize(torch.randn(features, d_in, generator=torch.Generator().manual_seed(0)), dim=1)
    g = torch.Generator().manual_seed(seed)
    shape = (windows, context, features)
    return (torch.rand(shape, generator=g) < 0.12) * torch.rand(shape, generator=g) @ directions + 0.3


@pytest.fixture
def store(make_store):
    """24 training windows (six batches of four, one of them with padding) and 8 held-out ones."""
    lengths = [CONTEXT] * 32
    lengths[5], lengths[26] = 9, 12
    return make_store(planted(0, 32), 24, lengths=lengths)


def stage(E, epochs=4.0, **kwargs):
    kwargs = {"name": "autoencoder", "weights": {"reconstruction": 1.0}} | kwargs
    return E.Stage(epochs=epochs, **kwargs)


def make(E, name, seed=0):
    torch.manual_seed(seed)
    return E.SAE_VARIANTS[name](D_IN, D_SAE, K)


def run(E, store, sae, stages, tmp_path, seed=0, deadline=FAR, name="state.pt"):
    """The log, and the steps of each stage planned and done."""
    return E.train(sae, store, stages, seed, SIZE, deadline, tmp_path / name)[:3]


def same_bits(a, b):
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"{different} differ"


# ---- Schedules ----
def test_learning_rate_is_a_pure_function_with_three_parts(E, monkeypatch):
    monkeypatch.setattr(E, "LEARNING_RATE", 0.5)
    at = np.linspace(0, 1, 2001)
    rates = np.array([E.learning_rate(done, 1536) for done in at])
    assert list(rates) == [E.learning_rate(done, 1536) for done in at]
    warm, decay = E.WARMUP_FRACTION, 1 - E.DECAY_FRACTION
    assert 0 < rates[0] < 0.05 and rates.max() == 0.5
    assert (np.diff(rates[at < warm - 0.002]) > 0).all()
    assert np.allclose(rates[(at >= warm) & (at <= decay)], 0.5, rtol=1e-12)
    assert (np.diff(rates[at > decay + 0.001]) < 0).all() and rates[-1] == 0.0
    assert E.learning_rate(1 - E.DECAY_FRACTION / 4, 1536) == pytest.approx(0.125)     # linear


def test_learning_rate_by_width(E, monkeypatch):
    monkeypatch.setattr(E, "LEARNING_RATE", None)
    assert 1e-4 < E.learning_rate(0.5, 1536) < 1e-2
    assert E.learning_rate(0.5, 4 * 1536) == pytest.approx(E.learning_rate(0.5, 1536) / 2)


def test_planned_stages_apply_ablations_and_scale(E, monkeypatch):
    class Two(E.SAE):
        curriculum = (E.Stage("one", 15, {"reconstruction": 1.0, "sparsity": 0.5}, ("W_enc",), 2.0),
                      E.Stage("two", 5, {"reconstruction": 1.0, "other": 0.1}, anneals={"a": abs}))
    assert E.planned_stages(Two) == list(Two.curriculum)
    monkeypatch.setattr(E, "ABLATE", ("sparsity", "other"))
    monkeypatch.setattr(E, "EPOCHS_SCALE", 0.2)
    one, two = E.planned_stages(Two)
    assert one == E.Stage("one", 3.0, {"reconstruction": 1.0}, ("W_enc",), 2.0)
    assert two == E.Stage("two", 1.0, {"reconstruction": 1.0}, anneals={"a": abs})
    assert Two.curriculum[0].weights == {"reconstruction": 1.0, "sparsity": 0.5}        # unharmed


@pytest.mark.parametrize("n_windows, size", [(24, 4), (26, 4), (7, 7), (5, 1)])
def test_each_epoch_is_a_permutation_of_its_own(E, n_windows, size):
    per_epoch = n_windows // size

    def epoch(seed, number):
        return [E.batch_ids(seed, number * per_epoch + i, n_windows, size) for i in range(per_epoch)]
    epochs = {}
    for seed, number in itertools.product((0, 1, 12), (0, 1, 7)):
        batches = epoch(seed, number)
        assert all(len(ids) == size for ids in batches)
        ids = np.concatenate(batches)
        assert len(np.unique(ids)) == len(ids) and ids.min() >= 0 and ids.max() < n_windows
        epochs[seed, number] = tuple(ids)
    assert len(set(epochs.values())) == len(epochs)
    for (seed, number), ids in epochs.items():              # again, in any order
        assert tuple(np.concatenate(epoch(seed, number))) == ids


def test_windows_left_out_of_an_epoch_are_others_in_the_next(E):
    seen = {int(i) for step in range(60) for i in E.batch_ids(0, step, 26, 4)}
    assert seen == set(range(26))


# ---- What trains and what does not ----
@pytest.mark.parametrize("name", ["standard", "topk", "matryoshka", "gated"])
@pytest.mark.parametrize("trains", [("W_enc",), ("W_enc", "b_"), ("b_dec",)])
def test_frozen_parameters_keep_every_bit(E, store, tmp_path, name, trains):
    """Decoder rows too: they are planted off the unit sphere, where a renormalisation would show."""
    sae = make(E, name)
    sae.W_dec.data *= torch.linspace(0.7, 1.4, D_SAE)[:, None]
    sae.initialise(store.batch(E.batch_ids(0, 0, 24, SIZE)))            # no part of the training
    before, (one,) = copy.deepcopy(dict(sae.named_parameters())), sae.curriculum
    run(E, store, sae, [one._replace(epochs=2.0, trains=trains)], tmp_path)
    for parameter, value in sae.named_parameters():
        moved = not torch.equal(value, before[parameter])
        assert moved == parameter.startswith(trains), parameter


def test_frozen_parameters_stay_frozen_between_stages_that_train_them(E, store, tmp_path, monkeypatch):
    """all -> encoder alone -> all: in the middle stage Adam's momentum does not move the others either."""
    stages = [stage(E, 1.0, name="first"), stage(E, 2.0, name="middle", trains=("W_enc",)), stage(E, 1.0, name="last")]
    states, train_step = {}, E.train_step

    def spy(sae, optimizer, batch, stage, done):
        if sae is watched:
            states.setdefault(stage.name, copy.deepcopy(dict(sae.named_parameters())))
        return train_step(sae, optimizer, batch, stage, done)
    watched = make(E, "topk")
    monkeypatch.setattr(E, "train_step", spy)
    log, planned, steps = run(E, store, watched, stages, tmp_path)
    assert planned == steps == [6, 12, 6] and log["stage_starts"] == [0, 6, 18]
    for parameter in ("W_dec", "b_enc", "b_dec"):
        assert not torch.equal(states["first"][parameter], states["middle"][parameter])
        assert torch.equal(states["middle"][parameter], states["last"][parameter])
        assert not torch.equal(states["last"][parameter], dict(watched.named_parameters())[parameter])
    assert not torch.equal(states["middle"]["W_enc"], states["last"]["W_enc"])


class Annealed:
    """A mix-in with two stages: the first anneals an attribute, the second leaves it where it came to."""
    temperature = 1.0

    def activate(self, latents):
        return super().activate(latents) * self.temperature


def annealed(E):
    class Variant(Annealed, E.TopK):
        pass
    torch.manual_seed(0)
    return Variant(D_IN, D_SAE, K), [
        stage(E, 2.0, name="anneal", anneals={"temperature": lambda done: 2.0 - 1.5 * done}),
        stage(E, 2.0, name="rest", lr=0.5)]


def watch(E, monkeypatch, sae, seen, attribute="temperature"):
    encode = type(sae).encode

    def spy(self, batch):
        if self is sae and self.training:
            seen.append(getattr(self, attribute))
        return encode(self, batch)
    monkeypatch.setattr(type(sae), "encode", spy)


def test_anneals_set_the_attribute_of_their_stage(E, store, tmp_path, monkeypatch):
    sae, stages = annealed(E)
    seen = []
    watch(E, monkeypatch, sae, seen)
    log, *_ = run(E, store, sae, stages, tmp_path)
    assert log["stages"] == ["anneal", "rest"] and log["stage_starts"] == [0, 12]
    assert log["weighed"] == sorted(stages[0].weights)
    assert seen[:12] == pytest.approx([2.0 - 1.5 * i / 12 for i in range(12)])
    assert len(seen) == 24 and len(set(seen[12:])) == 1
    assert seen[12] in (pytest.approx(0.5), pytest.approx(seen[11]))    # the end, or the last step before it
    assert sae.temperature == seen[-1]


def test_loss_weights_may_be_functions_of_progress(E, store, tmp_path):
    """An annealed weight and rate: each term enters with its own weight at that step."""
    asked = []

    def weight(done):
        asked.append(done)
        return 0.0
    stages = [stage(E, 1.0, name="a", weights={"reconstruction": weight}), stage(E, 1.0, name="b", lr=0.0)]
    sae = make(E, "topk")
    before = copy.deepcopy(sae.state_dict())
    run(E, store, sae, stages, tmp_path)
    assert asked[-6:] == pytest.approx([i / 6 for i in range(6)])
    for parameter in ("W_enc", "b_enc", "b_dec"):
        assert torch.equal(sae.state_dict()[parameter], before[parameter])      # weight 0, then rate 0
    assert torch.allclose(sae.W_dec, before["W_dec"], atol=1e-6)


@pytest.mark.parametrize("loss, weight", [("sparsity", 0.5), ("reconstruction", 0.25)])
def test_total_loss_is_the_weighted_sum(E, store, monkeypatch, loss, weight):
    """Of the named terms, "sparsity" times the steered weight."""
    monkeypatch.setattr(E, "GRADIENT_CLIP", 1e9)
    sae = make(E, "standard")
    sae.sparsity_weight.fill_(0.03)
    batch = store.batch(np.arange(4))
    term = sae.losses(batch, sae.encode(batch))[loss] * weight * (0.03 if loss == "sparsity" else 1.0)
    wanted, = torch.autograd.grad(term, sae.b_enc)
    kept = {}

    class Keep(torch.optim.SGD):
        def step(self):
            kept["b_enc"] = sae.b_enc.grad.clone()
    E.train_step(sae, Keep(sae.parameters(), lr=0.0), batch, stage(E, weights={loss: weight}), 0.0)
    assert torch.allclose(kept["b_enc"], wanted, rtol=1e-4, atol=1e-8) and wanted.any()


# ---- Optimiser ----
def test_adam_is_adam_whatever_the_layout(E):
    """The same parameters as of the unfused Adam, transposed in memory or not, with gradients as autograd lays them out;
    layouts and shapes stay, and one that loads its state goes on alike."""
    class Holder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            g = torch.Generator().manual_seed(0)
            self.wide, self.tall, self.square = (torch.nn.Parameter(torch.randn(*shape, generator=g)) for shape in
                                                 ((5, 7), (7, 5), (6, 6)))
            for p in (self.wide, self.square):
                p.data = p.data.t().contiguous().t()
            self.vector, self.scalar = torch.nn.Parameter(torch.randn(9, generator=g)), torch.nn.Parameter(torch.ones(()))
            self.idle = torch.nn.Parameter(torch.randn(4, 3, generator=g).t())

    ours, theirs = Holder(), Holder()
    layouts = [p.stride() for p in ours.parameters()]
    optimizer, other = E.ContiguousAdam(ours, 1e-2), torch.optim.Adam(theirs.parameters(), 1e-2, fused=False, foreach=False)
    for step in range(6):
        if step == 3:
            state, optimizer = optimizer.state_dict(), E.ContiguousAdam(ours, 1.0)
            optimizer.load_state_dict(state)
        for a, b in zip(ours.parameters(), theirs.parameters()):
            if a is not ours.idle:
                slope = torch.randn(a.shape)
                slope = slope.mT.contiguous().mT if step % 2 and a.dim() > 1 else slope
                for p in (a, b):
                    (p * slope).sum().backward()
        for each in (optimizer, other):
            each.step()
            each.zero_grad()
    assert [p.stride() for p in ours.parameters()] == layouts
    for a, b in zip(ours.parameters(), theirs.parameters()):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    assert torch.equal(ours.idle, Holder().idle)


# ---- Sparsity control ----
def test_sparsity_weight_moves_towards_the_target(E, store):
    batch, penalty = store.batch(np.arange(4)), stage(E, weights={"reconstruction": 1.0, "sparsity": 1.0})
    for shift, higher in ((5.0, True), (-5.0, False)):
        sae = make(E, "standard")
        sae.b_enc.data += shift
        before, optimizer = sae.sparsity_weight.item(), E.ContiguousAdam(sae, 1e-4)
        l0 = E.train_step(sae, optimizer, batch, penalty, 0.0)["l0"]
        assert (l0 > K) == higher and (sae.sparsity_weight > before) == higher
        assert 0.5 < sae.sparsity_weight.item() / before < 2.0            # no jump, even from L0 = 0
        after = sae.sparsity_weight.item()
        E.train_step(sae, optimizer, batch, stage(E), 0.0)                # a stage without the penalty
        assert sae.sparsity_weight.item() == after


@pytest.mark.parametrize("name", ["standard", "gated", "jumprelu", "topk", "batch_topk", "matryoshka"])
def test_held_out_l0_ends_at_the_target(E, make_store, tmp_path, name):
    store = make_store(planted(1, 96, 33, 16, 40), 64)
    torch.manual_seed(0)
    sae, (one,) = E.SAE_VARIANTS[name](16, 64, 4), E.SAE_VARIANTS[name].curriculum
    training = E.train(sae, store, [one], 0, 4, FAR, tmp_path / "state.pt")
    log = training.log
    assert training.done == [320]
    batch = store.batch(np.arange(64, 96))
    l0 = len(sae.eval().encode(batch).active()[2]) / (32 * 32)
    assert l0 == pytest.approx(4, rel=0.15 if name == "jumprelu" else 0.1)     # steered by its loss alone
    most = 0.5 if name in ("standard", "matryoshka") else 0.2          # shrinkage; short prefixes
    assert np.mean(log["losses"]["reconstruction"][-3:]) < most         # it learned at that


# ---- Errors ----
@pytest.mark.parametrize("size, epochs", [(25, 4.0), (4, 0.01)])
def test_a_stage_without_a_step_is_an_error(E, store, tmp_path, size, epochs):
    stages = [stage(E, 4.0, name="first"), stage(E, epochs, name="short one")]
    with pytest.raises(E.RunnerError, match="first" if size == 25 else "short one"):
        E.train(make(E, "topk"), store, stages, 0, size, FAR, tmp_path / "state.pt")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_an_error(E, store, tmp_path, bad):
    class Breaks(E.TopK):
        steps = 0

        def losses(self, batch, latents):
            Breaks.steps += 1
            losses = super().losses(batch, latents)
            return losses | {"strange": losses["reconstruction"] * (bad if Breaks.steps > 10 else 1.0)}
    stages = [stage(E, 1.0, name="fine"), stage(E, 20.0, name="goes wrong", weights={"strange": 1.0})]
    with pytest.raises(E.RunnerError, match="goes wrong.*strange = (nan|inf)"):
        run(E, store, Breaks(D_IN, D_SAE, K), stages, tmp_path)
    assert Breaks.steps < 10 + 2 * E.LOG_EVERY


def test_a_dead_dictionary_is_an_error(E, store, tmp_path):
    sae = make(E, "topk")
    sae.b_enc.data.fill_(-100.0)
    with pytest.raises(E.RunnerError, match=f"all {D_SAE} latents are dead"):
        run(E, store, sae, [stage(E, 4.0, trains=("b_dec",))], tmp_path)


# ---- The log ----
def test_log(E, store, tmp_path):
    sae = make(E, "topk")
    sae.parameters_of_interest = lambda: {"first bias": sae.b_enc[0].item()}
    sae.b_enc.data[[3, 8]] = -100.0
    log, planned, steps = run(E, store, sae, [stage(E, 10.0, weights={"reconstruction": 1.0})], tmp_path)
    assert planned == steps == [60]
    assert log["step"] == [20, 40, 60] and all(type(step) is int for step in log["step"])
    assert set(log["losses"]) == {"reconstruction", "sparsity", "auxk"}
    for values in [log["l0"], log["dead_fraction"], *log["losses"].values(), log["parameters"]["first bias"]]:
        assert len(values) == 3 and all(type(v) is float for v in values)
    assert log["l0"] == pytest.approx([K] * 3, abs=0.3)
    assert 2 / D_SAE <= log["dead_fraction"][-1] == sae.dead_mask().float().mean().item()
    assert log["parameters"]["first bias"][-1] == sae.b_enc[0].item()
    assert log["val_step"] == list(range(6, 61, 6)) and len(log["val_loss"]) == 10
    batch = store.batch(np.arange(24, 32))
    with torch.no_grad():
        last = E.squared_error(batch, sae.decode(sae.eval().encode(batch))).item()
    assert log["val_loss"][-1] == pytest.approx(last, rel=1e-6) and last < log["val_loss"][0]


def test_validation_changes_nothing(E, store):
    sae = make(E, "batch_topk").train()
    batch = store.batch(np.arange(4))
    sae.after_step(batch, sae.encode(batch), torch.tensor(float(K)))
    before = copy.deepcopy(sae.state_dict())
    assert before["threshold"] > 0
    assert set(E.validation(sae, store)) == {"val_loss"}
    same_bits(sae.state_dict(), before)


def test_measuring_the_speed_changes_nothing(E, store):
    sae = make(E, "batch_topk").train()
    sae.sparsity_weight.fill_(0.02)
    before = copy.deepcopy(sae.state_dict())
    seconds = E.seconds_per_step(sae, store, [stage(E), stage(E, weights={"reconstruction": 0.5, "auxk": 1.0})], SIZE)
    assert len(seconds) == 2 and all(0 < s < 5 for s in seconds)
    same_bits(sae.state_dict(), before)
    assert all(p.grad is None for p in sae.parameters())


# ---- Same bits: again, and after a kill ----
class Killed(BaseException):
    """As a signal would end it: nothing in the trainer may catch it."""


@contextmanager
def killed(E, monkeypatch, at):
    """A training in here dies when it asks for the data of step `at`."""
    batch_ids = E.batch_ids

    def dies(seed, step, *args):
        if step == at and at > 0:
            raise Killed
        return batch_ids(seed, step, *args)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(E, "batch_ids", dies)
        yield


def problem(E, name):
    """A variant with two dead latents and a curriculum of two stages, the second with frozen parts."""
    if name == "annealed":
        return annealed(E)
    sae = make(E, name)
    sae.W_enc.data[:, [3, 8]] = 0.0
    one, = sae.curriculum
    trains = ("W_enc", "W_dec", "b_")
    return sae, [one._replace(epochs=5.0), one._replace(name="second", epochs=3.0, trains=trains, lr=0.5)]


VARIANTS = ["standard", "topk", "batch_topk", "jumprelu", "gated", "matryoshka"]


@pytest.mark.parametrize("name", VARIANTS)
def test_same_seed_same_bits_other_seed_others(E, store, tmp_path, name):
    results = []
    for i, seed in enumerate((0, 0, 1)):
        sae, stages = problem(E, name)
        torch.manual_seed(i)                # what happened before does not matter
        torch.rand(i)
        log, *_ = run(E, store, sae, stages, tmp_path, seed, name=f"{i}.pt")
        results.append((sae.state_dict(), log))
    same_bits(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert not torch.equal(results[0][0]["W_enc"], results[2][0]["W_enc"])


@pytest.mark.parametrize("name", ["topk", "standard"])
def test_batches_made_ahead_train_the_same_sae(E, store, tmp_path, monkeypatch, name):
    """As on a GPU whose memory the activations do not fit into: a thread reads the next batch."""
    direct, ahead, asked = {}, prefetched, []

    for slow in (False, True):
        def forced(make_batch, slow, chosen=slow):
            asked.append((slow, chosen))
            return ahead(make_batch, chosen)
        monkeypatch.setattr(E, "prefetched", forced)
        sae, stages = problem(E, name)
        log, *_ = run(E, store, sae, stages, tmp_path, name=f"{slow}.pt")
        direct[slow] = sae.state_dict(), log
    same_bits(direct[True][0], direct[False][0])
    assert direct[True][1] == direct[False][1] and asked == [(False, False), (False, True)]


@pytest.mark.parametrize("name", VARIANTS + ["annealed"])
def test_a_killed_run_carries_on_to_the_same_bits(E, store, tmp_path, monkeypatch, name):
    """Killed at the start, at an epoch's end and after it, in the second stage and before the last step."""
    monkeypatch.setattr(E, "LOG_EVERY", 5)
    whole, stages = problem(E, name)
    log, planned, steps = run(E, store, whole, stages, tmp_path, name="whole.pt")
    total = sum(steps)
    assert name == "annealed" or max(log["losses"]["auxk"]) > 0, "the test should see dead latents"
    monkeypatch.setattr(E, "CHECKPOINT_SECONDS", -1)
    for at in (1, 6, 7, 15, total - 1):
        sae, stages = problem(E, name)
        with killed(E, monkeypatch, at):
            run(E, store, sae, stages, tmp_path)
        assert (tmp_path / "state.pt").exists()
    sae, stages = problem(E, name)
    torch.manual_seed(99)
    again, *rest = run(E, store, sae, stages, tmp_path)
    same_bits(sae.state_dict(), whole.state_dict())
    assert again == log and rest == [planned, steps]
    if name == "annealed":
        assert sae.temperature == whole.temperature


def test_checkpoints_in_the_middle_are_used(E, store, tmp_path, monkeypatch, capsys):
    """After the kill the trainer does only the steps that were left."""
    monkeypatch.setattr(E, "CHECKPOINT_SECONDS", -1)
    sae, stages = problem(E, "topk")
    with killed(E, monkeypatch, 20):
        run(E, store, sae, stages, tmp_path)
    asked, batch_ids = [], E.batch_ids
    monkeypatch.setattr(E, "batch_ids", lambda seed, step, *args: asked.append(step) or batch_ids(seed, step, *args))
    sae, stages = problem(E, "topk")
    run(E, store, sae, stages, tmp_path)
    assert [step for step in asked if step > 0] == list(range(20, 48))
    assert "carrying on at step 20" in capsys.readouterr().out


def test_seconds_of_a_killed_training_count(E, store, tmp_path, monkeypatch):
    monkeypatch.setattr(E, "CHECKPOINT_SECONDS", -1)
    sae, stages = problem(E, "topk")
    began = time.time()
    with killed(E, monkeypatch, 20):
        run(E, store, sae, stages, tmp_path)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert 0 < state["schedule"]["spent"] < time.time() - began
    state["schedule"]["spent"] += 1_000
    torch.save(state, tmp_path / "state.pt")
    sae, stages = problem(E, "topk")
    seconds = E.train(sae, store, stages, 0, SIZE, FAR, tmp_path / "state.pt").seconds
    assert state["schedule"]["spent"] < seconds < 1_000 + time.time() - began


def test_a_kill_while_the_checkpoint_is_written_costs_only_steps(E, store, tmp_path, monkeypatch):
    whole, stages = problem(E, "batch_topk")
    log, *_ = run(E, store, whole, stages, tmp_path, name="whole.pt")
    monkeypatch.setattr(E, "CHECKPOINT_SECONDS", -1)
    saves, write = [], Path.write_bytes

    def dies(path, content):
        saves.append(path)
        if len(saves) == 9:
            write(path, content[:len(content) // 2])
            raise Killed
        write(path, content)
    sae, stages = problem(E, "batch_topk")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "write_bytes", dies)
        run(E, store, sae, stages, tmp_path)
    assert len(saves) == 9 and [p.name for p in tmp_path.glob("state.pt*")] == ["state.pt"]
    sae, stages = problem(E, "batch_topk")
    assert run(E, store, sae, stages, tmp_path)[0] == log
    same_bits(sae.state_dict(), whole.state_dict())


@pytest.mark.parametrize("name", ["standard", "annealed"])
def test_a_finished_training_is_taken_as_it_is(E, store, tmp_path, name):
    """Killed in the evaluation: the next run finds parameters, log and annealed attributes as training left them."""
    whole, stages = problem(E, name)
    log, planned, steps = run(E, store, whole, stages, tmp_path)
    sae, stages = problem(E, name)
    again, *rest = run(E, store, sae, stages, tmp_path)
    assert again == log and rest == [planned, steps]
    same_bits(sae.state_dict(), whole.state_dict())
    if name == "annealed":
        assert sae.temperature == whole.temperature


# ---- Deadlines ----
def test_training_ends_when_the_time_is_up(E, store, tmp_path):
    stages = [stage(E, 2.0, name="a"), stage(E, 4000.0, name="b")]
    began = time.time()
    log, planned, steps = run(E, store, make(E, "topk"), stages, tmp_path, deadline=time.time() + 2.0)
    assert planned == [12, 24000] and 1 <= steps[0] <= 12 and 1 <= steps[1] < 24000
    assert time.time() - began < 20 and log["step"][-1] == sum(steps)


def test_a_deadline_that_has_passed_still_gives_every_stage_a_step(E, store, tmp_path):
    stages = [stage(E, 2.0, name="a"), stage(E, 4.0, name="b")]
    sae = make(E, "topk")
    before = sae.W_enc.detach().clone()
    log, planned, steps = run(E, store, sae, stages, tmp_path, deadline=0.0)
    assert planned == [12, 24] and steps == [1, 1] and log["step"] == [2]
    assert not torch.equal(before, sae.W_enc)
