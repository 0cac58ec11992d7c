"""Copies of the template, edited as an agent edits them, and the runs of them that a harness would start."""
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).resolve().parent.parent
# A whole run in a few seconds
SMALL = dict(TRAIN_TOKENS=8_192, CONTEXT_LENGTH=32, EXPANSION=2, TARGET_L0=8, EPOCHS_SCALE=0.25, BATCH_TOKENS=512,
             EVAL_FILES=24)
TAIL = 1_500                  # characters of stderr that an agent sees after a failure


def edit(folder, **constants):
    """Sets constants in the folder's experiment.py; each must have a line of its own there."""
    path = Path(folder) / "experiment.py"
    text = path.read_text()
    for name, value in constants.items():
        code = f"float('{value}')" if isinstance(value, float) and not math.isfinite(value) else repr(value)
        text, found = re.subn(rf"^{name} = .*$", lambda match: f"{name} = {code}", text, flags=re.M)
        assert found == 1, f"experiment.py has {found} lines that begin with {name} ="
    path.write_text(text)


def substitute(folder, old, new):
    """A SEARCH/REPLACE block: `old` must stand in the folder's experiment.py exactly once."""
    path = Path(folder) / "experiment.py"
    text = path.read_text()
    assert text.count(old) == 1, f"experiment.py has {old!r} {text.count(old)} times"
    path.write_text(text.replace(old, new))


def copy_template(folder, **constants):
    """The template in `folder`, with the small settings and these constants; embedded/ is a link."""
    Path(folder).mkdir(parents=True)
    shutil.copy(PROJECT / "experiment.py", folder)
    (Path(folder) / "embedded").symlink_to(PROJECT / "embedded", target_is_directory=True)
    edit(folder, **SMALL | constants)
    return Path(folder)


def write_text_data(path):
    """A small data set of real text: the starts of the standard library's files, one a row."""
    files = sorted(Path(os.__file__).parent.rglob("*.py"))
    texts = [file.read_text(errors="ignore")[:4_000] for file in files if "site-packages" not in file.parts][:640]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts if len(text) > 500))
    return path


def environment(cache):
    return os.environ | {"SAE_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


class Finished(NamedTuple):
    code: int                 # exit status; -9: killed
    stdout: str
    stderr: str
    cpu: float                # seconds of user and system time
    wall: float               # seconds

    @property
    def tail(self):           # what an agent is shown
        return self.stderr[-TAIL:]


class Process:
    """A command, started in a session of its own so that what it leaves behind can be seen."""

    def __init__(self, folder, command, cache):
        self.began, self.folder = time.monotonic(), Path(folder)
        self.out, self.err = (open(self.folder / name, "w+") for name in ("stdout.log", "stderr.log"))
        self.process = subprocess.Popen(command, cwd=folder, env=environment(cache), stdin=subprocess.DEVNULL,
                                        stdout=self.out, stderr=self.err, start_new_session=True)

    def printed(self):
        return (self.folder / "stdout.log").read_text()

    def ended(self):
        return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def kill(self):
        os.kill(self.process.pid, signal.SIGKILL)           # it may have ended; Popen.send_signal would take its status away

    def wait(self, timeout=300):
        """Finished; beyond the timeout it is killed, with its children, and the test fails."""
        status = None
        while status is None:
            pid, status_now, usage = os.wait4(self.process.pid, os.WNOHANG)
            status = status_now if pid else None
            if status is None and time.monotonic() - self.began > timeout:
                os.killpg(self.process.pid, signal.SIGKILL)
                raise AssertionError(f"still running after {timeout} s; printed: {self.printed()[-500:]}")
            time.sleep(0.02)
        self.process.returncode = os.waitstatus_to_exitcode(status)
        texts = []
        for file in (self.out, self.err):
            file.seek(0)
            texts.append(file.read())
            file.close()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
            raise AssertionError("processes that the run started outlive it")
        return Finished(self.process.returncode, *texts, usage.ru_utime + usage.ru_stime, time.monotonic() - self.began)


def start(folder, cache, out_dir="run_1"):
    return Process(folder, [sys.executable, "experiment.py", f"--out_dir={out_dir}"], cache)


def run(folder, cache, out_dir="run_1"):
    return start(folder, cache, out_dir).wait()


def results(folder, out_dir="run_1"):
    """The content of final_info.json; NaN and infinity, which are no JSON, are errors."""
    def refuse(constant):
        raise ValueError(f"{constant} in final_info.json")
    return json.loads((Path(folder) / out_dir / "final_info.json").read_text(), parse_constant=refuse)


TIMES = ("total_train_time", "avg_inference_tokens_per_second")         # results that speak of time


def timeless(value):
    """Results without what speaks of time."""
    if isinstance(value, dict):
        return {key: timeless(part) for key, part in value.items() if not key.startswith(TIMES)}
    return [timeless(part) for part in value] if isinstance(value, list) else value


DRIVER = """
import contextlib, io, json, os, runpy, sys, time
import torch, transformers
for folder, out_dir in json.loads(sys.argv[1]).items():
    os.chdir(folder)
    sys.argv = ["experiment.py", f"--out_dir={out_dir}"]
    out, err, code = io.StringIO(), io.StringIO(), 0
    cpu, wall = time.process_time(), time.monotonic()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(os.path.join(folder, "experiment.py"), run_name="__main__")
        except SystemExit as end:
            code = end.code
            if isinstance(code, str):      # as Python ends
                print(code, file=sys.stderr)
                code = 1
    report = [code, out.getvalue(), err.getvalue(), time.process_time() - cpu, time.monotonic() - wall]
    with open(os.path.join(folder, "outcome.json"), "w") as file:
        json.dump(report, file)
"""


def run_in_turn(out_dirs, cache, timeout=2_400):
    """{folder: Finished} of the same command in each folder, in turn in one process: torch is imported once.

    `out_dirs` is {folder: its --out_dir}, or the folders alone.
    """
    out_dirs = {str(folder): dict(out_dirs)[folder] if isinstance(out_dirs, dict) else "run_1" for folder in out_dirs}
    base = Path(next(iter(out_dirs))).parent
    finished = Process(base, [sys.executable, "-c", DRIVER, json.dumps(out_dirs)], cache).wait(timeout)
    assert finished.code == 0, finished.stderr[-3_000:]
    return {Path(folder): Finished(*json.loads((Path(folder) / "outcome.json").read_text())) for folder in out_dirs}
