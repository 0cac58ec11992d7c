"""Training on the windows of FORGET, of the rest, or of both."""
import numpy as np
import pytest
import torch

from runtime.errors import RunnerError
from small_saes import D_IN, make

N_TRAIN, SIZE = 24, 4
OF_FORGET = np.arange(N_TRAIN) % 3 == 0


@pytest.fixture
def store(make_store):
    """24 training windows, every third of "secret", and 8 held-out ones."""
    g = torch.Generator().manual_seed(0)
    store = make_store(torch.randn(N_TRAIN + 8, 9, D_IN, generator=g) + 0.3, N_TRAIN)
    store.windows = store.windows._replace(domains=["open" if i % 3 else "secret" for i in range(N_TRAIN + 8)])
    return store


@pytest.mark.parametrize("train_on, wanted", [
    ("both", np.arange(N_TRAIN)), ("forget", np.flatnonzero(OF_FORGET)), ("retain", np.flatnonzero(~OF_FORGET))])
def test_pool_of_training_windows(store, train_on, wanted):
    assert store.windows.train_pool(train_on, "secret").tolist() == wanted.tolist()


@pytest.mark.parametrize("train_on", ["forget", "retain"])
def test_an_unknown_domain_to_forget(E, store, train_on):
    with pytest.raises(RunnerError, match="FORGET = 'secrets'.*open, secret"):
        store.windows.train_pool(train_on, "secrets")
    assert len(store.windows.train_pool("both", "secrets")) == N_TRAIN
    alone = store.windows._replace(domains=["secret"] * (N_TRAIN + 8))
    assert len(alone.train_pool("forget", "secret")) == N_TRAIN
    with pytest.raises(RunnerError, match="FORGET = 'secret'"):
        alone.train_pool("retain", "secret")


@pytest.mark.parametrize("pool", [np.array([3, 5, 7, 11, 20, 21, 22]), np.arange(8) * 3, np.array([9])])
def test_batches_come_from_the_pool_alone_and_evenly(E, settings, store, tmp_path, pool):  # noqa: F811
    store.windows = store.windows._replace(domains=["secret" if i in pool else "open" for i in range(N_TRAIN + 8)])
    settings(TRAIN_ON="forget", FORGET="secret")
    seen = trained_on(E, store, make(E, "topk"), tmp_path / "state.pt", 1)[0]
    for ids in np.split(seen, 3):                               # an epoch each
        assert len(ids) == N_TRAIN and set(ids) == set(pool)
        counts = np.unique(ids, return_counts=True)[1]
        assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("n, size", [(24, 4), (26, 4), (7, 7)])
def test_training_on_both_keeps_the_order(E, n, size):
    """A permutation of its own per seed and epoch, cut into batches."""
    for seed, step in ((0, 0), (3, 5), (3, 11)):
        epoch, place = divmod(step, n // size)
        order = np.random.default_rng((seed, epoch)).permutation(n)
        got = E.batch_ids(seed, step, n, size)
        assert got.tolist() == order[place * size:(place + 1) * size].tolist()


def trained_on(E, store, sae, path, seed=0):  # noqa: F811
    """Three epochs of training -> the windows of its steps in order, those of the first batch, steps planned, done."""
    seen, first, step = [], [], E.train_step

    def watched(trained, optimizer, batch, *rest):
        if trained is sae:                                      # and not the copy whose speed is measured
            seen.extend(batch.doc_ids.tolist())
        return step(trained, optimizer, batch, *rest)

    sae.initialise = lambda batch: first.extend(batch.doc_ids.tolist())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(E, "train_step", watched)
        stage = E.Stage("one", 3, {"reconstruction": 1.0})
        training = E.train(sae, store, [stage], seed, SIZE, 10 ** 12, path)
    return np.array(seen), first, training.planned, training.done


def test_training_keeps_to_the_pool_and_its_steps(E, settings, store, tmp_path):  # noqa: F811
    """Steps planned and done do not depend on TRAIN_ON; the first batch is the pool's too."""
    for train_on in ("both", "forget", "retain"):
        settings(TRAIN_ON=train_on, FORGET="secret")
        seen, first, planned, done = trained_on(E, store, make(E, "topk"), tmp_path / f"{train_on}.pt")
        pool = set(store.windows.train_pool(train_on, "secret"))
        assert len(first) == SIZE and set(first) <= pool
        assert len(seen) == 3 * N_TRAIN and set(seen) == pool
        assert planned == done == [18]
