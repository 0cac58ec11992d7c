"""Token windows and the activation cache: one document a window, nothing lost, nothing computed twice."""
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from copies import PROJECT, environment

BOS = 7


# --- windows ---------------------------------------------------------------------------------------------------------
class Numbering:
    """A tokenizer of texts "document length": an id says which document and where in it the token is."""
    is_fast, name_or_path, bos_token_id, eos_token_id = False, "numbers", BOS, BOS + 1

    def __call__(self, text, add_special_tokens=True, **options):
        if text == "text":
            return {"input_ids": [1]}
        document, length = map(int, text.split())
        body = [1_000 + 10_000 * document + i for i in range(length)]
        return {"input_ids": body if not add_special_tokens else [BOS] + body}


def documents(E, lengths, heldout_every=4):
    return [E.corpus.Document(f"file {i}", f"{i} {length}", f"domain {i % 3}", i % heldout_every == 1)
            for i, length in enumerate(lengths)]


def settings(E, monkeypatch, **constants):
    for name, value in constants.items():
        assert hasattr(E, name)
        monkeypatch.setattr(E, name, value)


def wanted(E):
    """What the runner's own constants ask for."""
    return E.corpus.Wanted(E.CONTEXT_LENGTH, E.TRAIN_TOKENS, E.EVAL_FILES, E.TRAIN_WINDOWS_PER_FILE,
                           E.EVAL_WINDOWS_PER_FILE, E.MIN_WINDOW, E.DATA_SEED)


def make_windows(E, monkeypatch, found, tokenizer=Numbering()):
    """What the runner makes of these documents, by its own constants."""
    monkeypatch.setattr(E.corpus, "load_documents", lambda dataset, seed: iter(found))
    monkeypatch.setattr(E.corpus, "data_identity", lambda dataset: "")
    with tempfile.TemporaryDirectory() as cache:
        return E.corpus.load_windows(E.DATASET, tokenizer, wanted(E), Path(cache))[0]


@pytest.fixture
def windows(E, monkeypatch):
    """Windows of 60 documents of 0 to 300 tokens."""
    settings(E, monkeypatch, CONTEXT_LENGTH=16, TRAIN_TOKENS=1_500, EVAL_FILES=5, MIN_WINDOW=6,
             TRAIN_WINDOWS_PER_FILE=8, EVAL_WINDOWS_PER_FILE=3)
    lengths = np.random.default_rng(0).integers(0, 300, 60)
    lengths[[0, 2, 5]] = 0, 5, 3                         # two for training and one held out without a window
    return make_windows(E, monkeypatch, documents(E, lengths)), lengths


def test_a_window_is_bos_then_a_stretch_of_one_document_then_padding(windows):
    found, lengths = windows
    assert found.tokens.shape == (len(found.lengths), 16) and found.tokens.dtype == np.int32
    starts = []
    for row, length, document in zip(found.tokens, found.lengths, found.doc_ids):
        assert row[0] == BOS and (row[length:] == BOS).all() and (row[1:length] != BOS).all()
        number = int(found.names[document].split()[1])
        place = row[1:length] - 1_000 - 10_000 * number
        assert (place == np.arange(place[0], place[0] + length - 1)).all()
        assert place[0] % 15 == 0 and place[-1] < lengths[number]             # windows of a document do not overlap
        assert length == 16 or place[-1] == lengths[number] - 1               # padded only where the document ends
        assert found.domains[document] == f"domain {number % 3}"
        starts.append((number, place[0]))
    assert len(set(starts)) == len(starts)
    assert (found.lengths < 16).any()
    assert found.lengths.min() == 1 + 6               # tails of 6 tokens and more are taken, shorter ones left out


def test_training_and_heldout_documents(windows):
    found, lengths = windows
    train, heldout = np.split(found.doc_ids, [found.n_train])
    numbers = [{int(found.names[d].split()[1]) for d in part} for part in (train, heldout)]
    assert not numbers[0] & numbers[1]
    assert all(n % 4 == 1 for n in numbers[1]) and not any(n % 4 == 1 for n in numbers[0])
    assert len(numbers[1]) == 5 and np.bincount(heldout).max() <= 3 and np.bincount(train).max() == 8
    tokens = (found.lengths - 1)[:found.n_train]
    assert tokens.sum() >= 1_500 > tokens[train != train[-1]].sum()           # the last document completes them


def test_windows_are_spread_over_a_document(E, monkeypatch):
    settings(E, monkeypatch, CONTEXT_LENGTH=16, TRAIN_TOKENS=2_000, EVAL_FILES=2, TRAIN_WINDOWS_PER_FILE=2)
    found = make_windows(E, monkeypatch, documents(E, [1_500] * 90))
    places = (found.tokens[:found.n_train, 1] - 1_000) % 10_000 / 1_500
    assert len(places) == 134 and np.histogram(places, 4, (0, 1))[0].min() > 15
    again = make_windows(E, monkeypatch, documents(E, [1_500] * 90))
    assert (again.tokens == found.tokens).all()
    monkeypatch.setattr(E, "DATA_SEED", E.DATA_SEED + 1)
    assert (make_windows(E, monkeypatch, documents(E, [1_500] * 90)).tokens != found.tokens).any()


def test_a_short_context_keeps_short_windows_out_too(E, monkeypatch):
    settings(E, monkeypatch, CONTEXT_LENGTH=8, TRAIN_TOKENS=60, EVAL_FILES=2, MIN_WINDOW=32)
    found = make_windows(E, monkeypatch, documents(E, [20] * 40))
    assert (found.lengths == 8).all()                # no tail is as long as MIN_WINDOW: full windows only


@pytest.mark.parametrize("lengths, parts", [
    ([30] * 40, ["40 documents", "900 training tokens", "10 held-out", "TRAIN_TOKENS = 1,500"]),
    ([200, 0, 200, 200] * 10, ["0 held-out"]),
    ([], ["0 documents", "0 training tokens"]),
])
def test_exhausted_data_says_how_much_there_was(E, monkeypatch, lengths, parts):
    settings(E, monkeypatch, CONTEXT_LENGTH=16, TRAIN_TOKENS=1_500, EVAL_FILES=50, MIN_WINDOW=10, DATASET="my_data")
    with pytest.raises(E.corpus.DataError) as error:
        make_windows(E, monkeypatch, documents(E, lengths))
    for part in ["'my_data'", *parts]:
        assert part in str(error.value)


@pytest.fixture
def tokenizer(E, monkeypatch):
    monkeypatch.setattr(E, "MODEL_NAME", str(PROJECT / "embedded" / "model"))
    return E.corpus.load_pretrained(E.MODEL_NAME, "tokenizer")


def test_bos_stands_first_and_nowhere_else(E, monkeypatch, tokenizer):
    """Also where the text itself holds the characters of the special token."""
    settings(E, monkeypatch, CONTEXT_LENGTH=32, TRAIN_TOKENS=200, EVAL_FILES=2)
    text = f"the marker {tokenizer.bos_token} divides documents, and {tokenizer.bos_token} is text here " * 8
    texts = [E.corpus.Document(f"file {i}", text, "x", i % 2 == 1) for i in range(30)]
    found = make_windows(E, monkeypatch, texts, tokenizer)
    for row, length in zip(found.tokens, found.lengths):
        assert row[0] == tokenizer.bos_token_id
        assert (row[1:length] != tokenizer.bos_token_id).all()


@pytest.mark.parametrize("bos, eos, mark", [(5, 6, 5), (None, 6, 6), (None, None, 0), (0, 6, 0)])
def test_the_first_token_where_the_tokenizer_lacks_one(E, monkeypatch, bos, eos, mark):
    settings(E, monkeypatch, CONTEXT_LENGTH=16, TRAIN_TOKENS=200, EVAL_FILES=2)
    tokenizer = Numbering()
    tokenizer.bos_token_id, tokenizer.eos_token_id = bos, eos
    found = make_windows(E, monkeypatch, documents(E, [100] * 40), tokenizer)
    assert (found.tokens[:, 0] == mark).all() and (found.tokens[:, 1:] != mark).all()


def test_a_tokenizer_that_knows_no_text_is_an_error(E, monkeypatch):
    class Mute(Numbering):
        def __call__(self, text, **options):
            return {"input_ids": []}
    with pytest.raises(E.corpus.DataError, match="numbers has no tokenizer"):
        make_windows(E, monkeypatch, documents(E, [100] * 40), Mute())


def load_windows(E, tokenizer, folder):
    return E.corpus.load_windows(E.DATASET, tokenizer, wanted(E), folder)


@pytest.mark.parametrize("others, forget", [
    ({}, ""), ({"EVALS": ("core", "unlearning")}, "secret"), ({"TRAIN_ON": "retain"}, "secret"),
    ({"TRAIN_ON": "forget"}, "secret")], ids=["neither", "evaluation", "retain", "forget"])
def test_the_runner_asks_for_what_its_constants_say(E, monkeypatch, tmp_path, others, forget):
    values = dict(CONTEXT_LENGTH=16, TRAIN_TOKENS=601, EVAL_FILES=3, TRAIN_WINDOWS_PER_FILE=5, EVAL_WINDOWS_PER_FILE=2,
                  MIN_WINDOW=7, DATA_SEED=11)
    settings(E, monkeypatch, **{"DATASET": "my_data", "FORGET": "secret"} | values | others)
    asked = []

    def load(*order):
        asked.append(order)
        raise KeyboardInterrupt
    monkeypatch.setattr(E.corpus, "load_windows", load)
    monkeypatch.setattr(E, "load_tokenizer", lambda: "the tokenizer")
    with pytest.raises(KeyboardInterrupt):
        E.open_store(None, 0, tmp_path)
    (dataset, tokenizer, order, folder), = asked
    assert (dataset, tokenizer, folder) == ("my_data", "the tokenizer", tmp_path / "tokens")
    constants = {name.removeprefix("DATA_").lower(): value for name, value in values.items()}
    assert order._asdict() == constants | {"forget": forget}


def test_windows_come_from_the_cache(E, monkeypatch, tokenizer, tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"text": f"number {i} " * 60}) for i in range(300)))
    settings(E, monkeypatch, CONTEXT_LENGTH=16, TRAIN_TOKENS=600, EVAL_FILES=3, DATASET=str(texts))
    first, key = load_windows(E, tokenizer, tmp_path)
    load = E.corpus.load_documents
    monkeypatch.setattr(E.corpus, "load_documents", lambda *args: pytest.fail("the data are read again"))
    second, again = load_windows(E, tokenizer, tmp_path)
    assert again == key and second.n_train == first.n_train and type(second.n_train) is int
    for name in ("tokens", "lengths", "doc_ids", "names", "domains"):
        assert np.array_equal(getattr(first, name), getattr(second, name))

    monkeypatch.setattr(E.corpus, "load_documents", load)
    keys = {key}
    for name, value in dict(TRAIN_TOKENS=700, CONTEXT_LENGTH=24, EVAL_FILES=4, DATA_SEED=1, MIN_WINDOW=8,
                            TRAIN_WINDOWS_PER_FILE=3, EVAL_WINDOWS_PER_FILE=2).items():
        with monkeypatch.context() as patch:
            patch.setattr(E, name, value)
            keys.add(load_windows(E, tokenizer, tmp_path)[1])
    with open(texts, "a") as file:
        file.write("\n" + json.dumps({"text": "one more " * 60}))
    keys.add(load_windows(E, tokenizer, tmp_path)[1])
    assert len(keys) == 9


def flip(path, at=1_001):
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 16]))


def cut(path):
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [flip, cut, lambda path: path.write_bytes(b"")], ids=["flipped", "cut", "empty"])
def test_a_damaged_file_of_windows_is_made_again(E, monkeypatch, tokenizer, tmp_path, damage):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"text": f"number {i} " * 60}) for i in range(300)))
    settings(E, monkeypatch, CONTEXT_LENGTH=16, TRAIN_TOKENS=600, EVAL_FILES=3, DATASET=str(texts))
    first, key = load_windows(E, tokenizer, tmp_path)
    damage(tmp_path / f"{key}.npz")
    second, _ = load_windows(E, tokenizer, tmp_path)
    assert np.array_equal(first.tokens, second.tokens)


# --- collection ------------------------------------------------------------------------------------------------------
N, N_TRAIN, CONTEXT, WIDTH, SHARD = 150, 110, 12, 24, 64


def some_windows(E):
    rng = np.random.default_rng(0)
    tokens, lengths = rng.integers(1, 300, (N, CONTEXT)).astype(np.int32), np.full(N, CONTEXT)
    tokens[:, 0] = 0
    lengths[::7] = rng.integers(5, CONTEXT, len(lengths[::7]))
    for row, length in zip(tokens, lengths):
        row[length:] = 0
    return E.corpus.Windows(tokens, lengths, np.arange(N) // 2, N_TRAIN, [f"{i}" for i in range(N // 2)], ["x"] * (N // 2))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=300, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=3,
                                      num_attention_heads=4, initializer_range=0.3)
    return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.fixture
def store(E, monkeypatch, tmp_path):
    """A store in three shards, nothing collected; and a list of the shards that it collects."""
    settings(E, monkeypatch, CONTEXT_LENGTH=CONTEXT, SHARD_WINDOWS=SHARD)
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
    chunks = store[0].heldout(16)
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


def append(path):
    with open(path, "ab") as file:
        file.write(b"\0" * 4)


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
    monkeypatch.setattr(E.corpus.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10 ** 9, 0, needed))
    with pytest.raises(E.corpus.DataError, match="SAE_CACHE_DIR") as error:         # just enough is not enough
        store.collect(lambda: model, 1)
    assert str(store.folder) in str(error.value)
    assert collected == [] and not list(store.folder.glob("*.bin*"))
    monkeypatch.setattr(E.corpus.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10 ** 9, 0, 2 * needed))
    store.collect(lambda: model, 1)
    monkeypatch.setattr(E.corpus.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10 ** 9, 0, 0))
    store.collect(no_model, 1)                                                 # what is cached needs no room


# --- several processes -----------------------------------------------------------------------------------------------
SCRIPT = """
import os, signal, sys, time
sys.path[:0] = [{tests!r}, {project!r}, {project!r} + "/embedded"]
from pathlib import Path
import torch
import experiment as E, test_store
folder, kill_at, log = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
E.CONTEXT_LENGTH, E.SHARD_WINDOWS, calls = test_store.CONTEXT, test_store.SHARD, 0
table = test_store.table()

def residual_after(model, layer, tokens):
    global calls
    calls += 1
    if calls == kill_at:
        time.sleep(1)                # the shard before is written meanwhile
        os.kill(os.getpid(), signal.SIGKILL)
    if not kill_at:
        time.sleep(0.3)              # long enough for the other process to come
    return table[tokens]

E.residual_after = residual_after
(log.parent / (log.name + ".ready")).touch()
while not kill_at and len(list(log.parent.glob("*.ready"))) < 2:
    time.sleep(0.01)
store = test_store.new_store(E, folder)
store.collect(lambda: None, 0)
log.write_text(f"{{calls}} {{store.scale}}")
"""


def table():
    return torch.randn(300, WIDTH, generator=torch.Generator().manual_seed(1))


def start(tmp_path, kill_at, name):
    script = SCRIPT.format(tests=str(PROJECT / "tests"), project=str(PROJECT))
    return subprocess.Popen([sys.executable, "-c", script, str(tmp_path), str(kill_at), str(tmp_path / name)],
                            env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_kill_midway_keeps_the_finished_shards(E, store, tmp_path, monkeypatch):
    store, collected = store
    process = start(tmp_path, 4, "killed")
    said = process.communicate(timeout=120)[0]
    assert process.returncode == -9, said
    assert E.corpus.intact(path(store, 0)) and not path(store, 64).exists() and not path(store, 128).exists()
    monkeypatch.setattr(E, "residual_after", lambda model, layer, tokens: table()[tokens])
    store.collect(lambda: None, 0)
    assert collected == [64, 128]
    ids = np.arange(N)
    assert torch.equal(store.raw(ids), table()[torch.from_numpy(some_windows(E).tokens).long()])
    left = [path.name for path in store.folder.glob("*.partial")]
    assert not left, f"the killed run's {left} take room for ever"


def test_two_processes_at_once_collect_once(E, store, tmp_path):
    processes = [start(tmp_path, 0, name) for name in ("one", "two")]
    said = [process.communicate(timeout=180)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    (calls_one, scale_one), (calls_two, scale_two) = ((tmp_path / name).read_text().split() for name in ("one", "two"))
    assert sorted(map(int, (calls_one, calls_two))) == [0, 5] and scale_one == scale_two, said
    assert sum("waiting for another run" in text for text in said) == 1, said
    store, collected = store
    store.collect(no_model, 0)
    assert torch.equal(store.raw(np.arange(N)), table()[torch.from_numpy(some_windows(E).tokens).long()])


def test_a_file_is_replaced_whole_or_not_at_all(E, tmp_path):
    path = tmp_path / "deep" / "file"
    with E.corpus.replacing(path) as partial:
        partial.write_text("first")
        assert not path.exists()
    with pytest.raises(OSError, match="full"), E.corpus.replacing(path) as partial:
        partial.write_text("sec")
        raise OSError("full")
    assert path.read_text() == "first" and os.listdir(path.parent) == ["file"]
