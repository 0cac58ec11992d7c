"""Errors that a user can mend, and reports of all others."""
import errno
import re
import time
import traceback
from contextlib import contextmanager
from pathlib import Path


class RunnerError(ValueError):
    """A data set that cannot be read. Its message is one paragraph: what was asked, what is wrong, what would work."""


@contextmanager
def run_stage(what, timing=None):
    """Adds to an error what was being done; where all went well, its seconds to `timing`."""
    began = time.time()
    try:
        yield
    except Exception as error:
        error.add_note(what)
        raise
    if timing is not None:
        timing[what] = time.time() - began


def without_addresses(text):
    """An editor might fetch them."""
    return re.sub(r"\w+://[^\s'\")]+|www\.[^\s'\")]+", "(address)", text)


def error_report(error, file, about, shown):
    """At most 1,400 characters on an error of the script `file`: its notes, what the run was about, lines of the script,
    tensors, the cause, what to try. Of a DataError only the lines in methods of the class `shown`."""
    known, source = isinstance(error, RunnerError), Path(file).read_text().splitlines()
    frames = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__)
              if frame.f_code.co_filename == file and (not known or isinstance(frame.f_locals.get("self"), shown))]
    found = [f"{Path(file).name} failed in: {', '.join(getattr(error, '__notes__', ['start']))}; {about}"]
    found += [f"  line {line} in {frame.f_code.co_name}: {source[line - 1].strip()[:110]}" for frame, line in frames[-4:]]
    if known:
        return without_addresses("\n".join([*found, str(error)[:900]]))
    text, there = " ".join(str(error).split()), frames[-1][0].f_locals if frames else {}
    tensors = [f"{name} {tuple(value.shape)} {value.dtype}" for name, value in there.items()
               if hasattr(value, "shape") and hasattr(value, "dtype")]
    if tensors:
        found.append(f"  there: {', '.join(tensors)[:350]}")
    found.append(f"{type(error).__name__}: {text[:400]}")
    if "out of memory" in text.lower() or "can't allocate memory" in text or isinstance(error, MemoryError):
        constants = frames[-1][0].f_globals if frames else {}
        halved = [f"{name} = {value / 2:g}" for name in ("BATCH_TOKENS", "EXPANSION", "CONTEXT_LENGTH")
                  if isinstance(value := constants.get(name), (int, float))]
        found.append(f"Try: {', or '.join(halved) or 'lower BATCH_TOKENS, EXPANSION or CONTEXT_LENGTH'}.")
    if getattr(error, "errno", None) == errno.ENOSPC:
        found.append("Try: free disk space, or set SAE_CACHE_DIR to a larger disk.")
    return without_addresses("\n".join(found))
