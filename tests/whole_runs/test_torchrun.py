"""A run in several processes, on the CPU: by torchrun, or as torchrun would start them."""
import os
import signal
import socket
import time

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from copies import results
from lab import succeeded, TRAINED
from processes import Copy, Process, run, start


def torchrun(folder, cache, n=2):
    return Process(folder, ["-m", "torch.distributed.run", f"--nproc_per_node={n}", "experiment.py", "--out_dir=run_1"], cache)


def two_ranks(folder, cache):
    """Returns [Finished] of two processes, with the variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    processes = [start(folder, cache, kind=Copy, label=f"{rank}-", RANK=rank, LOCAL_RANK=rank, **where) for rank in "01"]
    return [process.wait() for process in processes]


@pytest.mark.parametrize("variant, near", [("topk", 1e-3), ("standard", 1e-3), ("batch_topk", 0.02)])
def test_two_processes_give_what_one_gives(lab, variant, near):
    """For the same global batch. BatchTopK selects within each process's part, so it is near, not the same."""
    (one, told), seed = lab.trained(variant), TRAINED[variant].get("SEEDS", (0,))[:1]
    succeeded(told)
    two = lab.copy(variant, **TRAINED[variant] | dict(SAE_VARIANT=variant, SEEDS=seed, EVALS=("core",)))
    finished = [torchrun(two, lab.cache).wait()] if variant == "topk" else two_ranks(two, lab.cache)
    assert all(each.code == 0 for each in finished), finished
    said = "".join(each.stdout for each in finished)
    assert said.count("preflight passed") == 1 and said.count("run_1 (") == 1          # rank 0 alone speaks
    a, b = (results(folder) for folder in (one, two))
    single, both = (load_file(folder / "run_1" / "sae_weights.safetensors") for folder in (one, two))
    assert a["training"]["config"]["steps_done"] == b["training"]["config"]["steps_done"]
    a, b = ({name: values[0] for entry in info.values() for name, values in entry["final_info_dict"].items()} for info in (a, b))
    for name, within in (("explained_variance", near), ("best_val_loss", near), ("final_train_loss", near),
                         ("loss_increase_nats", 10 * near), ("l0", 10 * near)):
        assert abs(a[name] - b[name]) < within, name
    cosine = F.cosine_similarity(single["W_dec"], both["W_dec"], dim=1)
    assert cosine.mean() > 1 - 5 * near, "the same latents in the same places"


def test_a_step_of_two_processes_is_a_step_of_one(lab):
    """After one epoch of few steps the weights differ by rounding alone."""
    few = dict(SAE_VARIANT="topk", TRAIN_TOKENS=1_024, EPOCHS_SCALE=0.1, BATCH_TOKENS=512, DEAD_AFTER_FRACTION=1.0)
    one, two = (lab.copy(f"few_{n}", **few) for n in "12")
    succeeded(run(one, lab.cache))
    assert [finished.code for finished in two_ranks(two, lab.cache)] == [0, 0]
    single, both = (load_file(folder / "run_1" / "sae_weights.safetensors") for folder in (one, two))
    for name, value in single.items():
        assert torch.allclose(value, both[name], atol=1e-5 * value.abs().max()), name


def test_a_killed_rank_ends_the_run(lab):
    folder = lab.copy("killed", SAE_VARIANT="topk", EPOCHS_SCALE=20.0, CHECKPOINT_SECONDS=0)
    process = torchrun(folder, lab.cache)
    while "about" not in process.printed() and not process.ended():
        time.sleep(0.1)
    time.sleep(2)
    children = [int(pid) for pid in open(f"/proc/{process.pid}/task/{process.pid}/children").read().split()]
    told = {pid: open(f"/proc/{pid}/environ").read() for pid in children}
    os.kill(next(pid for pid, env in told.items() if "\0RANK=1\0" in env), signal.SIGKILL)
    finished = process.wait(timeout=120)
    assert finished.code not in (0, None) and "SIGKILL" in finished.stderr
    assert not (folder / "run_1").exists()


def test_a_mistake_is_told_by_torchrun_too(lab):
    finished = torchrun(lab.copy("mistake", TARGET_L0=-1), lab.cache, 1).wait()
    assert finished.code not in (0, None) and "TARGET_L0 = -1 is not valid" in finished.stderr


def test_more_processes_than_windows_in_a_step(lab):
    for finished in two_ranks(lab.copy("crowded", SAE_VARIANT="topk", BATCH_TOKENS=32), lab.cache):
        assert finished.code not in (0, None) and "BATCH_TOKENS gives 1 windows" in finished.stderr
