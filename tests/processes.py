"""Runs of copies of the template, as a harness would start them."""
import atexit
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

TAIL = 1_500                  # characters of stderr that an agent sees after a failure


class Finished(NamedTuple):
    code: int                 # exit status; -9: killed
    stdout: str
    stderr: str
    cpu: float                # seconds of user and system time
    wall: float               # seconds

    @property
    def tail(self):           # what an agent is shown
        return self.stderr[-TAIL:]


def environment(cache):
    return os.environ | {"SAE_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0", "CUDA_VISIBLE_DEVICES": ""}


class Process:
    """Python with `arguments` in a folder, in a session of its own so that what it leaves behind can be seen.

    What it prints is in files there, whose names begin with `label`."""

    def __init__(self, folder, arguments, cache, label="", **variables):
        self.began, self.folder, self.ending = time.monotonic(), Path(folder), None
        self.logs = {name: self.folder / f"{label}{name}.log" for name in ("stdout", "stderr")}
        for log in self.logs.values():
            log.write_text("")                  # may be read before the process has opened it
        self.pid = self.begin(arguments, environment(cache) | variables)

    def begin(self, arguments, variables):
        with open(self.logs["stdout"], "a") as out, open(self.logs["stderr"], "a") as err:
            self.process = subprocess.Popen([sys.executable, *arguments], cwd=self.folder, env=variables, stdin=subprocess.DEVNULL,
                                            stdout=out, stderr=err, start_new_session=True)
        return self.process.pid

    def poll(self):
        """Returns its status, and the seconds of CPU time that it took; None while it runs."""
        pid, status, usage = os.wait4(self.pid, os.WNOHANG)
        if not pid:
            return None
        self.process.returncode = os.waitstatus_to_exitcode(status)
        return status, usage.ru_utime + usage.ru_stime

    def printed(self, name="stdout"):
        return self.logs[name].read_text()

    def ended(self):
        self.ending = self.ending or self.poll()
        return self.ending is not None

    def kill(self):
        if not self.ended():
            os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout=300):
        """Returns Finished; beyond the timeout it is killed, with its children, and the test fails."""
        while not self.ended():
            if time.monotonic() - self.began > timeout:
                os.killpg(self.pid, signal.SIGKILL)
                raise AssertionError(f"still running after {timeout} s; printed: {self.printed()[-500:]}")
            time.sleep(0.02)
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
            raise AssertionError("processes that the run started outlive it")
        status, cpu = self.ending
        code, wall = os.waitstatus_to_exitcode(status), time.monotonic() - self.began
        return Finished(code, self.printed("stdout"), self.printed("stderr"), cpu, wall)


# Starts copies of a Python that has imported what experiment.py needs of other packages: 10 s of CPU time less for each
SERVER = """
import json, os, runpy, sys
import sklearn.linear_model, torch, transformers
from transformers.models.gpt_neox import modeling_gpt_neox
for line in sys.stdin:
    wanted = json.loads(line)
    if "wait" in wanted:
        pid, status, usage = os.wait4(wanted["wait"], os.WNOHANG)
        print(json.dumps([status, usage.ru_utime + usage.ru_stime] if pid else None), flush=True)
    elif pid := os.fork():
        print(json.dumps(pid), flush=True)
    else:
        os.setsid()
        for number, path in enumerate((os.devnull, *wanted["logs"])):
            os.dup2(os.open(path, os.O_WRONLY if number else os.O_RDONLY), number)
        os.chdir(wanted["folder"])
        os.environ.update(wanted["variables"])
        sys.argv, sys.path[0] = wanted["arguments"], wanted["folder"]
        runpy.run_path(sys.argv[0], run_name="__main__")
        sys.exit()
"""


class Server:
    """The process that runs SERVER, and answers."""

    def __init__(self):
        self.process = subprocess.Popen([sys.executable, "-c", SERVER], env=environment(""), text=True, start_new_session=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        atexit.register(self.process.stdin.close)

    def ask(self, **wanted):
        print(json.dumps(wanted), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


server = lru_cache(Server)


class Copy(Process):
    """The same, in a copy of a Python that has imported the libraries: arguments[0] is a script."""

    def begin(self, arguments, variables):
        return server().ask(folder=str(self.folder), arguments=[str(argument) for argument in arguments],
                            logs=[str(path) for path in self.logs.values()], variables=variables)

    def poll(self):
        return server().ask(wait=self.pid)


def start(folder, cache, out_dir="run_1", kind=Copy, **variables):
    """Returns the Process, of its kind: `Process` where Python itself must start, with its imports, as a harness has it."""
    arguments = [f"--out_dir={out_dir}"] if out_dir else []
    return kind(folder, ["experiment.py", *arguments], cache, **variables)


def run(folder, cache, out_dir="run_1", kind=Copy):
    return start(folder, cache, out_dir, kind).wait()


DRIVER = Path(__file__).with_name("in_turn.py")


def run_in_turn(out_dirs, cache, timeout=2_400):
    """Returns {folder: Finished} of the same command in each folder, in turn in one process, which says nothing itself.

    `out_dirs` is {folder: its --out_dir}, or the folders alone.
    """
    out_dirs = {str(folder): dict(out_dirs)[folder] if isinstance(out_dirs, dict) else "run_1" for folder in out_dirs}
    base = Path(next(iter(out_dirs))).parent
    finished = Copy(base, [DRIVER, json.dumps(out_dirs)], cache).wait(timeout)
    assert finished.code == 0 and finished.stderr == "", finished
    return {Path(folder): Finished(*json.loads((Path(folder) / "outcome.json").read_text())) for folder in out_dirs}
