"""The benchmarks of GPUs and memory, small."""
import json
import subprocess
import sys

from copies import PROJECT
from processes import environment


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
