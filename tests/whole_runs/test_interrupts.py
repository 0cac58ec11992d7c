"""Ctrl-C and SIGTERM at any moment: one line, nothing lost, and the same command carries on."""
import os
import signal
import time

import pytest
import torch

from copies import PROJECT, results, timeless
from lab import succeeded, TRAINED
from processes import Process, run, start

FIRST_SECONDS = 1.5                       # in which a Python imports torch


def wait_for(process, text):
    while text not in process.printed():
        assert not process.ended(), process.wait()
        time.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_checkpoint_is_written_from_the_first_second(lab, number):
    """Though the next regular one is an hour away."""
    whole = lab.trained("batch_topk")[0]
    folder = lab.copy(f"interrupted_{number}", SAE_VARIANT="batch_topk", **TRAINED["batch_topk"] | {"CHECKPOINT_SECONDS": 3600})
    process = start(folder, lab.cache)
    wait_for(process, "seed 0:")
    os.kill(process.pid, number)
    finished = process.wait()
    assert finished.code == 130 and not list(folder.glob("run_1*")), finished
    assert finished.stderr.split("\n")[-2] == "interrupted; the same command carries on" and "Traceback" not in finished.stderr
    (checkpoint,) = (lab.cache / "runs").glob("*/*/seed_0.pt")
    step = torch.load(checkpoint, weights_only=True)["schedule"]["step"]
    assert step >= 1
    finished = succeeded(run(folder, lab.cache))
    assert f"carrying on at step {step}," in finished.stdout
    mine, theirs = timeless(results(folder)), timeless(results(whole))
    for name in ("CHECKPOINT_SECONDS", "code"):            # a constant that `train` reads, so its key differs
        assert mine["training"]["config"].pop(name) != theirs["training"]["config"].pop(name)
    assert mine == theirs


def test_during_the_imports(lab):
    folder = lab.copy("early")
    process = start(folder, lab.cache, kind=Process)
    time.sleep(FIRST_SECONDS / 2)
    os.kill(process.pid, signal.SIGINT)
    finished = process.wait()
    assert finished.code == 130 and "Traceback" not in finished.stderr, finished
    assert finished.stderr.strip() == "interrupted" and finished.wall < 5


def test_a_plot_is_interrupted_with_a_line(tmp_path):
    process = Process(tmp_path, [str(PROJECT / "plot.py")], tmp_path)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGINT)
    finished = process.wait()
    assert finished.code == 130 and "Traceback" not in finished.stderr and "interrupted" in finished.stderr, finished


def test_without_out_dir_no_run_is_replaced(lab):
    folder = lab.copy("unnamed", SAE_VARIANT="topk", EVALS=("core",))
    for name in ("run_0", "run_1"):
        (folder / name).mkdir()
        (folder / name / "final_info.json").write_text("{}")
    finished = succeeded(start(folder, lab.cache, out_dir=None).wait())
    assert "run_2 (" in finished.stdout and (folder / "run_2" / "final_info.json").exists()
    assert {(folder / name / "final_info.json").read_text() for name in ("run_0", "run_1")} == {"{}"}
