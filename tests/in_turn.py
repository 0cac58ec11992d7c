"""Runs experiment.py in several folders, one after another in this process: argv[1] is {folder: its --out_dir}, as JSON.

Leaves the exit code, stdout, stderr, CPU and wall seconds of each in its outcome.json.
"""
import contextlib
import io
import json
import os
import runpy
import sys
import time


def run(folder, out_dir):
    os.chdir(folder)
    sys.argv, sys.path[0] = ["experiment.py", f"--out_dir={out_dir}"], folder
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
    return code, out.getvalue(), err.getvalue(), time.process_time() - cpu, time.monotonic() - wall


if __name__ == "__main__":
    for each, its_out_dir in json.loads(sys.argv[1]).items():
        outcome = run(each, its_out_dir)
        with open(os.path.join(each, "outcome.json"), "w") as file:
            json.dump(outcome, file)
