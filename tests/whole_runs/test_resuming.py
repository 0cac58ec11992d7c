"""Runs that are started again, killed, short of time or short of disk."""
import json
import re
import shutil
import subprocess
import time

import pytest
import torch

import kills
from copies import edit, results, substitute, timeless
from processes import run, start
from lab import contents, succeeded, TRAINED


def unbroken(lab, name):
    """The folder of a run of TRAINED, with checkpoints, that nothing interrupted."""
    folder, finished = lab.trained(name)
    succeeded(finished)
    return folder


def test_the_same_command_again(lab):
    """The same numbers, a new folder in place of the old, and what was put beside the results is kept."""
    folder = lab.root / "again"
    shutil.copytree(unbroken(lab, "batch_topk"), folder, symlinks=True)
    made = folder / "run_1"
    before, weights = results(folder), (made / "sae_weights.safetensors").read_bytes()
    (made / "human_ratings_a.json").write_text('{"mine": 1}')
    (made / "notes").mkdir()
    (made / "notes" / "a.txt").write_text("kept")
    (made / "timing.json").write_text("{}")
    finished = succeeded(run(folder, lab.cache))
    assert "collected" not in finished.stdout and "tokenising" not in finished.stdout
    after = results(folder)
    assert timeless(after) == timeless(before) and after != before
    assert (made / "sae_weights.safetensors").read_bytes() == weights
    assert (made / "human_ratings_a.json").read_text() == '{"mine": 1}'
    assert (made / "notes" / "a.txt").read_text() == "kept"
    assert (made / "timing.json").read_text() != "{}"
    assert {path.name for path in folder.iterdir()} & {"run_1.partial", "run_1.replaced"} == set()


def kill_at_step(E, lab, folder, seed, step):
    """Starts the run and kills it once the checkpoint of `seed` has come to `step`; what it had printed."""
    checkpoint = f"{E.fingerprint(str(folder / 'run_1'))}/*/seed_{seed}.pt"
    process, reached = start(folder, lab.cache), 0
    while reached < step:
        assert not process.ended(), f"it ended before step {step} of seed {seed}: {process.wait()}"
        time.sleep(0.01)
        for path in (lab.cache / "runs").glob(checkpoint):
            reached = torch.load(path, weights_only=True)["schedule"]["step"]
    process.kill()
    finished = process.wait()
    assert finished.code == -9 and not (folder / "run_1").exists()
    return finished.stdout


def test_a_run_killed_at_random_moments_ends_with_the_same_numbers(lab, tmp_path):
    folder, whole = lab.copy("killed", **TRAINED["standard"]), unbroken(lab, "standard")
    told = kills.kill_and_carry_on(folder, tmp_path / "cache", whole, ("collecting", "training 3", "evaluation 3", "training 5"))
    assert sum(said == "killed" for _, said in told) >= 3, told        # one may come too late
    assert {path.name for path in folder.iterdir()} & {"run_1.partial", "run_1.replaced"} == set()


def test_a_run_killed_in_its_last_stage_ends_with_the_same_numbers(E, lab):
    """What earlier stages switched on is on again."""
    folder, whole = lab.copy("temporal_killed", SAE_VARIANT="temporal", **TRAINED["temporal"]), unbroken(lab, "temporal")
    steps = results(whole)["training"]["config"]["steps_done"]
    kill_at_step(E, lab, folder, 0, sum(steps[:2]) + 2)
    succeeded(run(folder, lab.cache))
    assert timeless(results(folder)) == timeless(results(whole))


def test_other_constants_after_a_kill_start_afresh(E, lab):
    folder = lab.copy("changed", SAE_VARIANT="batch_topk", TARGET_L0=5, **TRAINED["batch_topk"])
    kill_at_step(E, lab, folder, 0, 6)
    edit(folder, TARGET_L0=8)
    finished = succeeded(run(folder, lab.cache))
    assert "starting afresh" in finished.stdout and "carrying on" not in finished.stdout
    kills.same_results(folder, unbroken(lab, "batch_topk"))


def test_a_failure_at_the_end_loses_nothing(E, lab):
    """A full disk while the results are written: the completed run stays, and the next attempt need not train again."""
    folder = lab.copy("full", SAE_VARIANT="topk")
    substitute(folder, 'info = write_results(', 'full_disk()\n                info = write_results(')
    substitute(folder, "def write_results(", """def full_disk():
    if (HERE / "full").exists():
        raise OSError(28, "No space left on device")


def write_results(""")
    (folder / "run_1").mkdir()
    for name in ("final_info.json", "human_ratings.json"):
        (folder / "run_1" / name).write_text('{"earlier": 1}')
    before = contents(folder / "run_1")
    (folder / "full").touch()
    finished = run(folder, lab.cache)
    assert finished.code not in (0, None), finished.stdout
    assert "No space left" in finished.tail and "writing the results" in finished.tail
    assert re.search(r"free disk space|SAE_CACHE_DIR", finished.tail) and "Traceback" not in finished.stderr
    assert contents(folder / "run_1") == before and not (folder / "run_1.partial").exists()
    (folder / "full").unlink()
    finished = succeeded(run(folder, lab.cache))
    assert "carrying on at step" in finished.stdout
    after = contents(folder / "run_1")
    assert after["human_ratings.json"] == before["human_ratings.json"]
    assert set(results(folder)["core"]["means"]) == {f"{name}_mean" for name in E.EVALUATIONS["core"].headlines}


# ---- The time budget ----
def test_a_variant_50_times_slower_keeps_the_time_budget(lab):
    """Every stage of every seed shrinks, none vanishes, and the results say so."""
    folder = lab.copy("hurry", SAE_VARIANT="slow", TIME_BUDGET_MINUTES=0.6, EPOCHS_SCALE=20.0, SEEDS=(0, 1))
    substitute(folder, "SAE_VARIANTS = {", '''class Slow(TopK):
    """TopK, encoded 50 times."""
    curriculum = (Stage("autoencoder", 15, PLAIN), Stage("second", 5, PLAIN))

    def encode(self, batch):
        return [super(Slow, self).encode(batch) for _ in range(50)][-1]


SAE_VARIANTS = {"slow": Slow, ''')
    finished = succeeded(run(folder, lab.cache))
    timing, entry = json.loads((folder / "run_1" / "timing.json").read_text()), results(folder)["training"]
    config = entry["config"]
    assert config["budget_hit"] is True
    assert all(0 < done < planned for done, planned in zip(config["steps_done"], config["steps_planned"]))
    for curves in entry["curves"]:                                     # of each seed
        training, second = curves["training"], curves["training"]["stage_starts"][1]
        assert training["stages"] == ["autoencoder", "second"]
        assert 0 < second < training["step"][-1]
    assert timing["total_seconds"] < 1.5 * 60 * 0.6                  # the machine may be busy
    assert re.search(r"seed 0: about \d+ s for [\d,]+ steps", finished.stdout)


# ---- The disk ----
def mounted(folder, size, *more):
    return subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join((f"size={size}", *more)), "tmpfs", str(folder)],
                          capture_output=True).returncode == 0


def test_a_disk_that_is_full(lab, tmp_path):
    """Too small for the activations: told before they are collected. Full at the first checkpoint: told, nothing is lost, and
    with more room the same command carries on."""
    cache, folder = tmp_path / "cache", lab.copy("small_disk", SAE_VARIANT="topk", CHECKPOINT_SECONDS=0)
    cache.mkdir()
    if not mounted(cache, "7m"):
        pytest.skip("no file system can be mounted here")
    try:
        (folder / "run_1").mkdir()
        (folder / "run_1" / "final_info.json").write_text('{"earlier": 1}')
        finished = run(folder, cache)
        assert finished.code == 2 and "collecting activations" in finished.tail, finished.stderr
        assert "SAE_CACHE_DIR" in finished.tail and str(cache) in finished.tail, finished.stderr
        need = int(re.search(r"needs (\d+) MB", finished.tail)[1]) * 1e6
        used = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
        assert mounted(cache, int(1.05 * need + used + 2e6), "remount")
        finished = run(folder, cache)
        assert finished.code not in (0, None) and "training, seed 0" in finished.tail, finished.stderr
        assert "free disk space" in finished.tail and "Traceback" not in finished.stderr, finished.stderr
        assert contents(folder / "run_1") == {"final_info.json": b'{"earlier": 1}'}
        assert mounted(cache, "64m", "remount")
        succeeded(run(folder, cache))
        assert results(folder)["core"]["metrics"]["l0"] > 0
    finally:
        subprocess.run(["umount", "-l", str(cache)], check=True)
