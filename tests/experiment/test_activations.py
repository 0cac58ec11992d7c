"""Activations are collected once, whole, centred and scaled; damaged files are collected again."""
import os
import shutil
import signal
import sys
import time
import traceback
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import transformers

import runtime.shards
from damage import append, cut, flip
from data.windows import Windows
from runtime.errors import RunnerError
from runtime.shards import intact


@pytest.mark.parametrize("others, forget", [
    ({}, ""), ({"EVALS": ("core", "unlearning")}, "secret"), ({"TRAIN_ON": "retain"}, "secret"),
    ({"TRAIN_ON": "forget"}, "secret")], ids=["neither", "evaluation", "retain", "forget"])
def test_the_runner_asks_for_what_its_constants_say(E, settings, monkeypatch, tmp_path, others, forget):
    values = dict(CONTEXT_LENGTH=16, TRAIN_TOKENS=601, EVAL_FILES=3, TRAIN_WINDOWS_PER_FILE=5, EVAL_WINDOWS_PER_FILE=2,
                  MIN_WINDOW=7, DATA_SEED=11)
    settings(**{"DATASET": "my_data", "FORGET": "secret"} | values | others)
    asked = []

    def load(*order):
        asked.append(order)
        raise KeyboardInterrupt
    monkeypatch.setattr(E, "load_windows", load)
    monkeypatch.setattr(E, "load_tokenizer", lambda: "the tokenizer")
    with pytest.raises(KeyboardInterrupt):
        E.open_store(None, 0, tmp_path)
    (dataset, tokenizer, order, folder), = asked
    assert (dataset, tokenizer, folder) == ("my_data", "the tokenizer", tmp_path / "tokens")
    constants = {name.removeprefix("DATA_").lower(): value for name, value in values.items()}
    assert order._asdict() == constants | {"forget": forget, "least_eval_files": E.LIVE_MIN_FILES}


# ---- Collection ----
N, N_TRAIN, CONTEXT, WIDTH, SHARD = 150, 110, 12, 24, 64


def some_windows(E):
    rng = np.random.default_rng(0)
    tokens, lengths = rng.integers(1, 300, (N, CONTEXT)).astype(np.int32), np.full(N, CONTEXT)
    tokens[:, 0] = 0
    lengths[::7] = rng.integers(5, CONTEXT, len(lengths[::7]))
    for row, length in zip(tokens, lengths):
        row[length:] = 0
    return Windows(tokens, lengths, np.arange(N) // 2, N_TRAIN, [f"{i}" for i in range(N // 2)], ["x"] * (N // 2))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=300, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=3,
                                      num_attention_heads=4, initializer_range=0.3)
    return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.fixture
def store(E, settings, monkeypatch, tmp_path):
    """A store in three shards, nothing collected; and a list of the shards that it collects."""
    settings(CONTEXT_LENGTH=CONTEXT, SHARD_WINDOWS=SHARD)
    store, collected, original = new_store(E, tmp_path), [], E.Store.collect_shard

    def collect_shard(self, model, layer, shard):
        collected.append(shard.start)
        return original(self, model, layer, shard)

    monkeypatch.setattr(E.Store, "collect_shard", collect_shard)
    return store, collected


def new_store(E, folder, dtype=torch.float32):
    return E.Store(folder / "activations", some_windows(E), WIDTH, dtype)


def path(store, start):
    return {shard.start: shard.path for shard in store.shards}[start]


def no_model():
    raise AssertionError("the model is loaded again")


def test_batches_are_the_models_activations_centred_and_scaled(E, model, store):
    store, collected = store
    store.collect(lambda: model, 1)
    assert collected == [0, 64, 128]
    windows = store.windows
    hidden = model(torch.from_numpy(windows.tokens).long(), output_hidden_states=True).hidden_states[2]
    position = torch.arange(CONTEXT)
    counts = (position > 0) & (position < torch.from_numpy(windows.lengths)[:, None])
    train = hidden[:N_TRAIN][counts[:N_TRAIN]].double()
    mean = train.mean(0)
    scale = (train - mean).square().sum(1).mean().sqrt()
    torch.testing.assert_close(store.mean.double(), mean, rtol=1e-5, atol=1e-6)
    assert store.scale == pytest.approx(scale.item(), rel=1e-6)

    for ids in (np.arange(N), np.array([149, 3, 64, 63, 7, 128]), [1, 2, 3]):
        batch = store.batch(ids)
        wanted = (hidden[ids][:, 1:] - mean) / scale
        valid = counts[ids][:, 1:]
        torch.testing.assert_close(batch.x[valid].double(), wanted[valid], rtol=1e-4, atol=1e-5)
        assert batch.x.shape == (len(ids), CONTEXT - 1, WIDTH) and batch.x.dtype == torch.float32
        assert torch.equal(batch.tokens, torch.from_numpy(windows.tokens[ids][:, 1:]).long())
        assert batch.doc_ids.tolist() == (np.asarray(ids) // 2).tolist()
        assert batch.positions.tolist() == list(range(1, CONTEXT))
        assert batch.mask is None and valid.all() or torch.equal(batch.mask, valid)
        torch.testing.assert_close(store.unscaled(batch.x), store.raw(ids)[:, 1:], rtol=1e-5, atol=1e-5)
    batch = store.batch(np.arange(N_TRAIN))
    assert batch.x[batch.mask].square().sum(1).mean().item() == pytest.approx(1, abs=1e-5)
    assert batch.x[batch.mask].mean(0).norm().item() < 1e-5
    assert store.batch([1, 2, 3]).mask is None


@pytest.mark.parametrize("value", [0.0, 3.0, 1e-20, 1e4])
def test_activations_that_do_not_vary_are_an_error(E, make_store, value):
    with pytest.raises(E.RunnerError, match="the same at every token"):
        make_store(torch.full((20, 6, 8), value), 12)


def test_ids_that_the_embedding_lacks_are_an_error(E, settings, monkeypatch, tmp_path):
    settings(CONTEXT_LENGTH=CONTEXT)
    windows = some_windows(E)
    monkeypatch.setattr(E, "load_windows", lambda *order: (windows, "key"))
    monkeypatch.setattr(E, "load_tokenizer", lambda: None)
    config = transformers.LlamaConfig(vocab_size=int(windows.tokens.max()))
    with pytest.raises(E.RunnerError, match=f"ids up to {windows.tokens.max()}.*has {windows.tokens.max()} rows"):
        E.open_store(config, 0, tmp_path)


def test_bos_padding_and_heldout_windows_do_not_move_the_mean(E, make_store):
    x = torch.randn(20, 6, 8)
    lengths = np.array([6, 4] * 10)
    plain = make_store(x, 12, lengths=lengths, name="plain")
    other = x.clone()
    other[:, 0] += 100.0
    other[1::2, 4:] -= 1_000.0
    other[12:] *= 50.0
    moved = make_store(other, 12, lengths=lengths, name="moved")
    assert torch.equal(plain.mean, moved.mean) and plain.scale == moved.scale
    assert torch.equal(plain.batch([0, 2]).x, moved.batch([0, 2]).x)


def test_heldout_windows_in_chunks(store):
    chunks = store[0].heldout_chunks(16)
    assert [len(chunk) for chunk in chunks] == [16, 16, 8]
    assert np.concatenate(chunks).tolist() == list(range(N_TRAIN, N))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_all_shards_in_any_order(E, model, store, tmp_path, dtype):
    store = new_store(E, tmp_path, dtype)
    store.collect(lambda: model, 1)
    hidden = E.residual_after(model, 1, store.tokens(slice(None))).to(dtype).float()
    for ids in (np.arange(N), np.array([149, 0, 64, 63, 64, 127, 128]), [3, 70]):
        assert store.raw(ids).dtype == torch.float32
        torch.testing.assert_close(store.raw(ids), hidden[ids], rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    size = sum(path.stat().st_size for path in store.folder.glob("*.bin"))
    assert size == N * CONTEXT * WIDTH * dtype.itemsize


def test_a_second_run_needs_no_model(E, model, store, tmp_path):
    first, collected = store
    first.collect(lambda: model, 1)
    second = new_store(E, tmp_path)
    second.collect(no_model, 1)
    assert collected == [0, 64, 128] and torch.equal(first.batch([5, 140]).x, second.batch([5, 140]).x)


DAMAGES = {
    "flipped": flip, "cut": cut, "longer": append,
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
    "no checksum": lambda path: path.with_suffix(".crc32").unlink(),
    "empty checksum": lambda path: path.with_suffix(".crc32").write_text(""),
    "other checksum": lambda path: path.with_suffix(".crc32").write_text(str(zlib.crc32(b"other"))),
    "bytes as checksum": lambda path: path.with_suffix(".crc32").write_bytes(b"\xff\0\xfe"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_collected_again_and_no_other(E, model, store, tmp_path, damage):
    first, collected = store
    first.collect(lambda: model, 1)
    whole, untouched = path(first, 64).read_bytes(), [path(first, start).stat().st_mtime_ns for start in (0, 128)]
    DAMAGES[damage](path(first, 64))
    collected.clear()
    second = new_store(E, tmp_path)
    second.collect(lambda: model, 1)
    assert collected == [64] and path(first, 64).read_bytes() == whole
    assert [path(first, start).stat().st_mtime_ns for start in (0, 128)] == untouched
    new_store(E, tmp_path).collect(no_model, 1)


def test_an_error_midway_keeps_what_is_finished(E, model, store, tmp_path, monkeypatch):
    first, collected = store
    calls, original = [], E.residual_after

    def failing(*args):
        calls.append(1)
        if len(calls) == 4:                          # two calls make a shard of 64 windows: midway through the second
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(E, "residual_after", failing)
        first.collect(lambda: model, 1)
    assert sorted(p.name for p in first.folder.iterdir()) == ["000000000.bin", "000000000.crc32", "lock"]
    collected.clear()
    first.collect(lambda: model, 1)
    assert collected == [64, 128]


def test_activations_that_are_not_finite_are_not_cached(E, model, store, monkeypatch):
    original = E.residual_after
    monkeypatch.setattr(E, "residual_after", lambda *args: original(*args).log())
    with pytest.raises(E.RunnerError, match="non-finite activations"):
        store[0].collect(lambda: model, 1)
    assert not list(store[0].folder.glob("*.bin*"))


def test_a_full_disk_is_noticed_before_anything_is_written(E, model, store, monkeypatch):
    store, collected = store
    needed = N * CONTEXT * WIDTH * 4
    monkeypatch.setattr("runtime.files.shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10 ** 9, 0, needed))
    with pytest.raises(RunnerError, match="SAE_CACHE_DIR") as error:         # just enough is not enough
        store.collect(lambda: model, 1)
    assert str(store.folder) in str(error.value)
    assert collected == [] and not list(store.folder.glob("*.bin*"))
    monkeypatch.setattr("runtime.files.shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10 ** 9, 0, 2 * needed))
    store.collect(lambda: model, 1)
    monkeypatch.setattr("runtime.files.shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10 ** 9, 0, 0))
    store.collect(no_model, 1)                                                 # what is cached needs no room


# ---- Several processes ----
def table():
    return torch.randn(300, WIDTH, generator=torch.Generator().manual_seed(1))


def collect(E, folder, name, kill_at):
    """Collects from `table`, as the process `name`: killed at the beginning of the batch `kill_at`; if that is 0, slowly, and once
    the other process is ready too. Leaves the number of batches and the scale in the file `name`."""
    calls = []

    def residual_after(model, layer, tokens):
        calls.append(len(tokens))
        if len(calls) == kill_at:
            time.sleep(1)                # the shard before is written meanwhile
            os.kill(os.getpid(), signal.SIGKILL)
        if not kill_at:
            time.sleep(0.3)              # long enough for the other process to come
        return table()[tokens]

    E.residual_after = residual_after
    (folder / f"{name}.ready").touch()
    while not kill_at and len(list(folder.glob("*.ready"))) < 2:
        time.sleep(0.01)
    store = new_store(E, folder)
    store.collect(lambda: None, 0)
    (folder / name).write_text(f"{len(calls)} {store.scale}")


def start(E, folder, name, kill_at):
    """Returns the id of a copy of this process that collects; what it prints is in the file `name`.out."""
    process = os.fork()
    if process:
        return process
    runtime.shards.WRITERS = ThreadPoolExecutor(3)          # a copy has no threads
    with open(folder / f"{name}.out", "w") as sys.stdout:
        try:
            collect(E, folder, name, kill_at)
        except BaseException:
            traceback.print_exc(file=sys.stdout)
        sys.stdout.flush()
        os._exit(0)


def test_a_kill_midway_keeps_the_finished_shards(E, store, tmp_path, monkeypatch):
    store, collected = store
    _, status = os.waitpid(start(E, tmp_path, "killed", 4), 0)
    assert os.waitstatus_to_exitcode(status) == -9, (tmp_path / "killed.out").read_text()
    assert intact(path(store, 0)) and not path(store, 64).exists() and not path(store, 128).exists()
    monkeypatch.setattr(E, "residual_after", lambda model, layer, tokens: table()[tokens])
    store.collect(lambda: None, 0)
    assert collected == [64, 128]
    ids = np.arange(N)
    assert torch.equal(store.raw(ids), table()[torch.from_numpy(some_windows(E).tokens).long()])
    left = [path.name for path in store.folder.glob("*.partial")]
    assert not left, f"the killed run's {left} take room for ever"


def test_two_processes_at_once_collect_once(E, store, tmp_path):
    for process in [start(E, tmp_path, name, 0) for name in ("one", "two")]:
        os.waitpid(process, 0)
    said = [(tmp_path / f"{name}.out").read_text() for name in ("one", "two")]
    assert all((tmp_path / name).exists() for name in ("one", "two")), said
    (calls_one, scale_one), (calls_two, scale_two) = ((tmp_path / name).read_text().split() for name in ("one", "two"))
    assert sorted(map(int, (calls_one, calls_two))) == [0, 5] and scale_one == scale_two, said
    assert sum("waiting for another run" in text for text in said) == 1, said
    store, collected = store
    store.collect(no_model, 0)
    assert torch.equal(store.raw(np.arange(N)), table()[torch.from_numpy(some_windows(E).tokens).long()])


# ---- What evaluations need of the data, before anything slow ----
def test_what_the_evaluations_need_of_the_data(E, settings, monkeypatch):
    """Windows without padding for the temporal evaluation, windows of FORGET for unlearning, texts for sparse probing."""
    windows = some_windows(E)
    settings(CONTEXT_LENGTH=CONTEXT, EVALS=("core",), FORGET="no such domain")
    E.check_data(windows)
    monkeypatch.setattr(E, "EVALS", ("temporal",))
    E.check_data(windows)
    with pytest.raises(E.RunnerError, match="fill CONTEXT_LENGTH"):
        E.check_data(windows._replace(lengths=np.full(N, CONTEXT - 1)))
    monkeypatch.setattr(E, "load_tokenizer", lambda: None)
    monkeypatch.setattr(E, "EVALS", ("unlearning",))
    with pytest.raises(E.RunnerError, match="no such domain"):
        E.check_data(windows)
    monkeypatch.setattr(E, "EVALS", ("sparse_probing",))
    monkeypatch.setattr(E, "PROBING", ("no_such_file.jsonl",))
    with pytest.raises(E.RunnerError, match="no_such_file"):
        E.check_data(windows)
