"""The process that a run is: its libraries, its threads, its start and its end."""
import atexit
import inspect
import logging
import os
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from runtime.errors import error_report, RunnerError
from runtime.files import COMPLETED
from runtime.interrupts import INTERRUPTS, SCRIPT, STATUS
from runtime.memory import bound_memory, keep_freed_memory
from runtime.ranks import RANKS
from runtime.shards import WRITING

# what a run imports, late or early, by the names of their modules
PACKAGES = {"torch", "transformers", "datasets", "numpy", "matplotlib", "seaborn", "sklearn",
            "scipy", "safetensors", "tokenizers", "huggingface_hub", "pandas", "pyarrow", "fsspec",
            "tqdm", "regex", "joblib", "networkx", "sympy", "accelerate", "requests", "httpx"}


@contextmanager
def allow_tf32():
    """Lets a GPU multiply fp32 matrices with 10 bits of mantissa within the block."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def prefetched(make, slow):
    """Returns a function of a step that returns what make(step), a tuple with tensors in it, does.

    Where `slow`, a thread makes the next step's tuple meanwhile, on a CUDA stream of its own.
    """
    if not slow:
        return make
    pool, waiting = ThreadPoolExecutor(1), {}  # step -> its future
    stream = torch.cuda.Stream() if torch.cuda.is_available() else None

    def make_on_stream(step):
        with torch.cuda.stream(stream):
            return make(step), stream and stream.record_event()

    def get(step):
        future = waiting.pop(step, None) or pool.submit(make_on_stream, step)
        waiting.clear()
        waiting[step + 1] = pool.submit(make_on_stream, step + 1)
        batch, event = future.result()
        if event:
            torch.cuda.current_stream().wait_event(event)
            for tensor in filter(torch.is_tensor, batch):
                tensor.record_stream(torch.cuda.current_stream())
        return batch

    return get


def readable_bytes(n_bytes):
    """Returns a number of bytes in GB or MB, as text."""
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes > 1e8 else f"{n_bytes / 1e6:.0f} MB"


def quiet_libraries():
    """Keeps all but errors off stderr: warnings and progress bars, also of what is imported later.
    """
    import huggingface_hub
    import transformers
    os.environ |= {"DATASETS_VERBOSITY": "critical", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    huggingface_hub.utils.logging.set_verbosity(logging.CRITICAL)
    huggingface_hub.utils.disable_progress_bars()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@atexit.register
def end_of_the_script():
    """Ends a script that never came to run_script with an error: it must not pass for a finished
    run."""
    if SCRIPT == "experiment.py" and "run" not in COMPLETED and not hasattr(sys, "last_value"):
        print(f"{SCRIPT} ended without results: its last lines must call run_script(main, ...)",
              file=sys.stderr)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(1)


def run_script(main, file, shown, variants, name, memory_settings=()):
    """Runs main() of the script `file`; an error becomes a report on stderr and an exit status, 2
    for a RunnerError and 1 for any other.

    The report is about the variant `name` of `variants` {name: class}; `shown` and
    `memory_settings` are those of `error_report`.
    """
    COMPLETED.clear()
    COMPLETED.add("run")
    INTERRUPTS.listen()
    keep_freed_memory()
    bound_memory()
    quiet_libraries()
    RANKS.join()
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # one that an edit or a test put there
            stream.reconfigure(errors="replace")  # a locale may lack characters of a text
    try:
        check_python(Path(file).parent)
        main()
        RANKS.leave()
        if "results" not in COMPLETED:
            raise RunnerError("main() came to its end without results: `atomic_run_folder` and "
                              "write_results are missing.")
    except KeyboardInterrupt:
        print("interrupted; the same command carries on", file=sys.stderr, flush=True)
        sys.exit(STATUS)
    except SystemExit as stop:  # argparse's, or one in an edit, which is no finished run
        if stop.code in (None, 0) and not {"-h", "--help"} & set(sys.argv):
            script = Path(file).name
            sys.exit(f"{script} was left by sys.exit() before the results were written")
        raise
    except Exception as error:
        about = f"SAE_VARIANT = {name!r}{line_of(variants, name)}"
        report = error_report(error, file, about, shown, memory_settings)
        print(report, file=sys.stderr, flush=True)
        code = 2 if isinstance(error, RunnerError) else 1
        if WRITING:  # threads that may never come to their end
            os._exit(code)
        sys.exit(code)


def check_python(folder):
    """Raises RunnerError where Python strips docstrings, or where a file of the folder, from which
    it imports first, has the name of a package that a run needs."""
    if sys.flags.optimize > 1:
        raise RunnerError("python -OO strips docstrings, without which transformers makes no "
                          "model: leave -OO out.")
    for path in sorted(folder.glob("*.py")):
        if path.stem in PACKAGES:
            raise RunnerError(f"{path.name} beside the script hides the package {path.stem!r}, "
                              "which has the same name: rename the file.")


def line_of(classes, name):
    """Returns " (line n)", where the class of that name begins in its file; "" if there is none."""
    found = classes.get(name) if isinstance(name, str) else None
    return f" (line {inspect.getsourcelines(found)[1]})" if inspect.isclass(found) else ""
