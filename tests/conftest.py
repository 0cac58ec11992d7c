"""What the test files share: the module under test, its settings, and stores that hold activations of a test's choice."""
import os

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")    # the tests compare bits: on the CPU
os.environ.setdefault("OMP_NUM_THREADS", "1")        # numpy's libraries as well
os.environ.setdefault("GOMP_SPINCOUNT", "0")         # as experiment.py has it, before torch is imported
import numpy as np
import pytest
import torch

from data.windows import Windows

torch.set_num_threads(1)            # tensors are tiny: a second thread would only wait
LONGEST_FIRST = "whole_runs"


def pytest_configure(config):
    """Files go to pytest-xdist's processes in the order below, not by their number of tests."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    """Whole runs come first: a long file that begins last would leave the other process without work."""
    items.sort(key=lambda item: LONGEST_FIRST not in item.path.parts)


@pytest.fixture(scope="session")
def E():
    import experiment
    return experiment


@pytest.fixture
def settings(E, monkeypatch):
    """settings(WINDOW=3, ...) sets constants of experiment.py, which must be there, for one test."""
    def change(**values):
        for name, value in values.items():
            monkeypatch.setattr(E, name, value)
    return change


@pytest.fixture
def make_store(E, tmp_path, monkeypatch):
    """make_store(x [window, position, d_in], n_train, ...) -> an experiment.Store of these activations.

    One document a window unless `doc_ids` says otherwise; `lengths` are the tokens before the padding.
    """
    def make(x, n_train, tokens=None, lengths=None, doc_ids=None, name="store"):
        n, context, d_in = x.shape
        monkeypatch.setattr(E, "CONTEXT_LENGTH", context)
        if tokens is None:
            tokens = np.random.default_rng(0).integers(1, 50, (n, context))
        lengths = np.full(n, context) if lengths is None else np.asarray(lengths)
        doc_ids = np.arange(n) if doc_ids is None else np.asarray(doc_ids)
        names = [f"document {i}" for i in range(doc_ids.max() + 1)]
        windows = Windows(np.asarray(tokens, np.int32), lengths, doc_ids, n_train, names, names)
        store, rest = E.Store(tmp_path / name, windows, d_in, torch.float32), [x.float()]

        def next_rows(model, layer, tokens):
            rows, rest[0] = rest[0][:len(tokens)], rest[0][len(tokens):]
            return rows

        with monkeypatch.context() as patch:
            patch.setattr(E, "residual_after", next_rows)
            store.collect(lambda: None, 0)
        return store
    return make
