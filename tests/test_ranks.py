"""Several processes by torchrun, and what threads and GPUs do beside the computation, all on the CPU."""
import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from copies import PROJECT, Process, copy_template, environment, results, start, write_text_data
from safetensors.torch import load_file


def torchrun(folder, cache, n=2):
    return Process(folder, [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}", "experiment.py",
                            "--out_dir=run_1"], cache)


def succeeded(finished):
    assert finished.code == 0, finished.stderr
    return finished


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return folder, write_text_data(folder / "text.jsonl")


def copied(place, name, **constants):
    folder, text = place
    return copy_template(folder / name, DATASET=str(text), EVALS=("core",), **constants), folder / "cache"


# --- torchrun ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("variant, near", [("topk", 1e-3), ("standard", 1e-3), ("batch_topk", 0.02)])
def test_two_processes_give_what_one_gives(place, variant, near):
    """For the same global batch. BatchTopK selects within each process's part, so it is near, not the same."""
    (one, cache), (two, _) = (copied(place, f"{variant}_{n}", SAE_VARIANT=variant) for n in "12")
    succeeded(start(one, cache).wait())
    finished = succeeded(torchrun(two, cache).wait())
    assert finished.stdout.count("preflight passed") == 1 and finished.stdout.count("run_1, ") == 1    # rank 0 alone speaks
    a, b = (results(folder) for folder in (one, two))
    single, both = (load_file(folder / "run_1" / "sae_weights.safetensors") for folder in (one, two))
    assert a["core"]["config"]["steps_done"] == b["core"]["config"]["steps_done"]
    a, b = ({name: value for entry in info.values() for name, value in entry["means"].items()} for info in (a, b))
    for name, within in (("explained_variance", near), ("best_val_loss", near), ("final_train_loss", near),
                         ("loss_increase_nats", 10 * near), ("l0", 10 * near)):
        assert abs(a[f"{name}_mean"] - b[f"{name}_mean"]) < within, name
    cosine = F.cosine_similarity(single["W_dec"], both["W_dec"], dim=1)
    assert cosine.mean() > 1 - 5 * near, "the same latents in the same places"


def test_a_step_of_two_processes_is_a_step_of_one(place):
    """After one epoch of few steps the weights differ by rounding alone."""
    few = dict(SAE_VARIANT="topk", TRAIN_TOKENS=1_024, EPOCHS_SCALE=0.1, BATCH_TOKENS=512, DEAD_AFTER_FRACTION=1.0)
    (one, cache), (two, _) = (copied(place, f"few_{n}", **few) for n in "12")
    succeeded(start(one, cache).wait())
    succeeded(torchrun(two, cache).wait())
    single, both = (load_file(folder / "run_1" / "sae_weights.safetensors") for folder in (one, two))
    for name, value in single.items():
        assert torch.allclose(value, both[name], atol=1e-5 * value.abs().max()), name


def test_a_killed_rank_ends_the_run_and_the_same_command_carries_on(place):
    folder, cache = copied(place, "killed", SAE_VARIANT="topk", EPOCHS_SCALE=20.0, CHECKPOINT_SECONDS=0)
    process = torchrun(folder, cache)
    while "about" not in process.printed() and not process.ended():
        time.sleep(0.1)
    time.sleep(2)
    children = [int(pid) for pid in open(f"/proc/{process.process.pid}/task/{process.process.pid}/children").read().split()]
    told = {pid: open(f"/proc/{pid}/environ").read() for pid in children}
    os.kill(next(pid for pid, env in told.items() if "\0RANK=1\0" in env), signal.SIGKILL)
    finished = process.wait(timeout=120)
    assert finished.code not in (0, None) and "SIGKILL" in finished.stderr
    assert not (folder / "run_1").exists()


def test_a_mistake_is_told_by_torchrun_too(place):
    folder, cache = copied(place, "mistake", TARGET_L0=-1)
    finished = torchrun(folder, cache).wait()
    assert finished.code not in (0, None) and "TARGET_L0 = -1 is not valid" in finished.stderr


def test_more_processes_than_windows_in_a_step(place):
    folder, cache = copied(place, "crowded", SAE_VARIANT="topk", BATCH_TOKENS=32)
    finished = torchrun(folder, cache).wait()
    assert finished.code not in (0, None) and "raise BATCH_TOKENS" in finished.stderr


def test_one_process_shares_with_nobody(E):
    ranks, ids = E.corpus.Ranks(), np.arange(7)
    assert np.array_equal(ranks.share(ids), ids) and ranks.agree("x") == "x" and ranks.total(3) == 3
    ranks.rank, ranks.size = 1, 3
    assert ranks.share(ids).tolist() == [1, 4]
    with ranks.alone():
        assert (ranks.rank, ranks.size) == (0, 1) and len(ranks.share(ids)) == 7
    assert (ranks.rank, ranks.size) == (1, 3)


def test_the_exchange_of_two_alike(E, monkeypatch):
    """Two processes with the same part of a batch: gradients and running means stay, tokens and firings double; layouts stay,
    and what no process has a gradient of gets none."""
    ranks, exchanges = E.corpus.Ranks(), []
    ranks.size = 2
    monkeypatch.setattr(E.corpus.dist, "all_reduce", lambda whole: exchanges.append(whole.mul_(2)))
    sae = E.JumpReLU(4, 6, 2)
    sae.register_buffer("running", torch.tensor([0.5, -2.0]))
    for name, p in sae.named_parameters():
        if name != "log_threshold":
            (p * torch.randn(p.shape)).sum().backward()
    before = {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}
    n, fired = ranks.reduce(sae, 7, torch.tensor([0, 1, 0, 2, 0, 7]))
    assert n == 14 and fired.tolist() == [0, 2, 0, 4, 0, 14] and len(exchanges) == 1
    assert sae.log_threshold.grad is None and sae.running.tolist() == [0.5, -2.0]
    for name, grad in before.items():
        p = dict(sae.named_parameters())[name]
        assert torch.allclose(p.grad, grad, rtol=1e-6) and p.grad.stride() == p.stride(), name
    ranks.size = 1
    assert ranks.reduce(sae, 7, fired) == (7, fired) and len(exchanges) == 1


# --- beside the computation ----------------------------------------------------------------------------------------------
def test_the_next_batch_is_made_ahead(E):
    made, threads = [], set()

    def make(step):
        threads.add(threading.get_ident())
        made.append(step)
        return torch.tensor(step), None

    get = E.corpus.ahead(make, slow=True)
    for step in (0, 1, 2, 7, 8):
        assert get(step)[0] == step
    time.sleep(0.2)
    assert made == [0, 1, 2, 3, 7, 8, 9] and threading.get_ident() not in threads
    assert E.corpus.ahead(make, slow=False) is make


def test_a_failure_ahead_is_told(E):
    def make(step):
        return (1 / (step - 1),)

    get = E.corpus.ahead(make, slow=True)
    get(0)
    with pytest.raises(ZeroDivisionError):
        get(1)


@pytest.mark.filterwarnings("ignore:Sparse")
def test_products_of_sparse_matrices_are_those_of_bags(E):
    """What CUDA computes, on the CPU."""
    torch.manual_seed(0)
    counts = torch.tensor([3, 0, 5, 2])
    starts, ids = counts.cumsum(0) - counts, torch.cat([torch.randperm(9)[:n] for n in counts])
    values, table, x = torch.randn(10), torch.randn(9, 6), torch.randn(4, 6)
    bags = E.weighted_sums(values, ids, starts, table)
    assert torch.allclose(E.csr(values, ids, starts, 9) @ table, bags, atol=1e-6) and not bags[1].any()
    pairs = E.Pairs(ids, starts)
    assert pairs.rows.tolist() == [0] * 3 + [2] * 5 + [3] * 2
    dense = (x @ table.t())[pairs.rows, ids]
    assert torch.allclose(pairs.dots(x, table), dense, atol=1e-6)


@pytest.mark.parametrize("size", [8, 16])
@pytest.mark.parametrize("d, k", [(512, 8), (4_096, 32), (4_095, 32), (160, 5)])
def test_the_largest_by_groups_are_the_largest(E, monkeypatch, d, k, size):
    monkeypatch.setattr(E, "GROUP", size)
    torch.manual_seed(0)
    values = torch.randn(50, d)
    top, at = E.largest(values, k)
    right = values.topk(k)
    assert torch.equal(top.sort(1).values, right.values.sort(1).values)
    assert torch.equal(at.sort(1).values, right.indices.sort(1).values)
    assert torch.equal(values.gather(1, at), top)


@pytest.mark.parametrize("last", [0.0, 0.3, 5.0])
def test_batch_topk_keeps_the_same_latents_whatever_the_last_step_kept(E, last):
    torch.manual_seed(0)
    sae = E.BatchTopK(16, 64, 4).train()
    batch = E.Batch(torch.randn(2, 8, 16), torch.zeros(2, 8, dtype=torch.long), torch.arange(2), torch.arange(1, 9), None)
    fresh = sae.encode(batch).dense()
    sae.last.fill_(last)
    assert torch.equal(sae.encode(batch).dense(), fresh) and (fresh != 0).sum() <= 4 * 16


# --- the benchmarks of GPUs and memory, small -----------------------------------------------------------------------------
def bench(name, tmp_path, *arguments):
    done = subprocess.run([sys.executable, str(PROJECT / "bench" / name), "--small", *arguments, str(tmp_path)], capture_output=True,
                          text=True, env=environment(tmp_path / "cache"), timeout=300)
    assert done.returncode == 0, done.stderr[-1500:]
    return done.stdout


def test_the_gpu_benchmark_works_without_a_gpu(tmp_path):
    said = bench("gpu.py", tmp_path / "gpu.json", "--parts", "exact", "collect", "--out")
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["exact"]["ours_vs_dense"] < 1e-4 and found["collect"]["tokens_per_second"] > 0
    assert "of the bare forward pass" in said


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    said = bench("streaming.py", tmp_path, "--out")
    assert "memory grew by" in said and (tmp_path / "streaming.png").stat().st_size > 10_000


# --- memory ------------------------------------------------------------------------------------------------------------
def test_the_memory_plan_counts_what_there_is(E, monkeypatch):
    config, _ = E.corpus.load_config(E.MODEL_NAME, None, 128)
    store = SimpleNamespace(d_in=192, dtype=torch.float32, windows=SimpleNamespace(tokens=np.zeros((1_000, 128))))
    said = E.corpus.memory_plan(config, store, 8, 1_024, "cpu")
    model = sum(p.numel() for p in E.load_model().parameters()) * 4 / 1e6
    assert f"model {model:.0f} MB" in said and f"activations {1_000 * 128 * 192 * 4 / 1e6:.0f} MB on disk" in said
    assert f"SAE with its optimiser {16 * (2 * 192 + 2) * 1536 / 1e6:.0f} MB" in said
    for free, advice in ((80e9, "kept on the GPU"), (40e6, "BATCH_TOKENS ="), (20e6, "EXPANSION =")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 0))
        assert advice in E.corpus.memory_plan(config, store, 8, 1_024, "cuda")
