"""The process that a run is: memory, libraries, its start and its end."""
import atexit
import inspect
import logging
import os
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from runtime.files import COMPLETED
from runtime.errors import error_report, RunnerError
from runtime.memory import bound_memory, keep_freed_memory
from runtime.ranks import RANKS
from runtime.shards import WRITING


@contextmanager
def allow_tf32():
    """Products of fp32 matrices with 10 bits of mantissa, on a GPU."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def prefetched(make, slow):
    """make, a function of a step that gives a tuple of tensors; where that is slow a thread makes the next step's meanwhile, on
    a stream of its own."""
    if not slow:
        return make
    pool, waiting = ThreadPoolExecutor(1), {}
    stream = torch.cuda.Stream() if torch.cuda.is_available() else None

    def made(step):
        with torch.cuda.stream(stream):
            return make(step), stream and stream.record_event()

    def get(step):
        wanted = waiting.pop(step, None) or pool.submit(made, step)
        waiting.clear()
        waiting[step + 1] = pool.submit(made, step + 1)
        batch, event = wanted.result()
        if event:
            torch.cuda.current_stream().wait_event(event)
            for part in batch:
                if torch.is_tensor(part):
                    part.record_stream(torch.cuda.current_stream())
        return batch
    return get


def readable_bytes(n_bytes):
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes > 1e8 else f"{n_bytes / 1e6:.0f} MB"


def quiet_libraries():
    """Nothing on stderr but errors: no warnings, no bars, also of what an edit imports."""
    import huggingface_hub
    import transformers
    os.environ |= {"DATASETS_VERBOSITY": "critical", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}      # imported late, if at all
    huggingface_hub.utils.logging.set_verbosity(logging.CRITICAL)
    huggingface_hub.utils.disable_progress_bars()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


SCRIPT = Path(getattr(sys.modules["__main__"], "__file__", "")).name


@atexit.register
def end_of_the_script():
    """A script that never comes to run() must not pass for a finished one."""
    if SCRIPT == "experiment.py" and "run" not in COMPLETED and not hasattr(sys, "last_value"):
        print(f"{SCRIPT} ended without results: its last lines must call run_script(main, ...)", file=sys.stderr)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(1)


def run_script(main, file, shown, variants, name):
    """main() of the script `file`; an error becomes a report about the variant `name`, and an exit status."""
    COMPLETED.clear()
    COMPLETED.add("run")
    keep_freed_memory()
    bound_memory()
    quiet_libraries()
    RANKS.join()
    try:
        main()
        RANKS.leave()
        if "results" not in COMPLETED:
            raise RunnerError("main() came to its end without results: `atomic_run_folder` and write_results are missing.")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command carries on")
    except SystemExit as stop:  # argparse's, or one in an edit, which must not pass for a finished run
        if stop.code in (None, 0) and not {"-h", "--help"} & set(sys.argv):
            sys.exit(f"{Path(file).name} was left by sys.exit() before the results were written")
        raise
    except Exception as error:
        variant = variants.get(name) if isinstance(name, str) else None
        at = f" (line {inspect.getsourcelines(variant)[1]})" if inspect.isclass(variant) else ""
        print(error_report(error, file, f"SAE_VARIANT = {name!r}{at}", shown), file=sys.stderr, flush=True)
        code = 2 if isinstance(error, RunnerError) else 1
        if WRITING:                                         # threads that may never come to their end
            os._exit(code)
        sys.exit(code)
