"""Errors that a user can mend, notes on what a run was doing, and reports for stderr."""
import errno
import re
import time
import traceback
from contextlib import contextmanager
from pathlib import Path


class RunnerError(ValueError):
    """A setting, data set or environment that its user can mend.

    The message is one paragraph: what was asked, what is wrong, what would work.
    """


@contextmanager
def run_stage(name, timing=None):
    """Notes on an error that leaves the block that `name` was being done; where none does, puts the
    block's seconds into the dictionary `timing`, if there is one."""
    began = time.time()
    try:
        yield
    except Exception as error:
        error.add_note(name)
        raise
    if timing is not None:
        timing[name] = time.time() - began


def without_addresses(text):
    """Returns the text without web addresses, which an editor that is shown it might fetch."""
    return re.sub(r"\w+://[^\s'\")]+|www\.[^\s'\")]+", "(address)", text)


def error_report(error, file, about, shown, memory_settings=()):
    """Returns at most 1,400 characters on an error of the script `file`, for its author.

    They tell what was being done, what the run was about (`about`), the lines of the script that
    led to the error, the tensors there, the cause and what to try. A RunnerError speaks for itself:
    of the lines only those in methods of the class `shown` are given. `memory_settings` are the
    names of the script's numbers that decide how much memory it takes.
    """
    known = isinstance(error, RunnerError)
    frames = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__)
              if frame.f_code.co_filename == file
              and (not known or isinstance(frame.f_locals.get("self"), shown))]
    notes = ", ".join(getattr(error, "__notes__", ["start"]))

    report = [f"{Path(file).name} failed in: {notes}; {about}", *script_lines(frames[-4:], file)]
    if known:
        report.append(str(error)[:900])
    else:
        report += [*cause_lines(error, frames), *advice_lines(error, frames, memory_settings)]
    return without_addresses("\n".join(report))


def script_lines(frames, file):
    """Returns a line of text on each of frames [(frame, line number)] of the script `file`."""
    source = Path(file).read_text(encoding="utf-8").splitlines()
    return [f"  line {line} in {frame.f_code.co_name}: {source[line - 1].strip()[:110]}"
            for frame, line in frames]


def cause_lines(error, frames):
    """Returns lines of text: the tensors in the last frame, with shapes, and the error itself."""
    variables = frames[-1][0].f_locals if frames else {}
    tensors = [f"{name} {tuple(value.shape)} {value.dtype}" for name, value in variables.items()
               if hasattr(value, "shape") and hasattr(value, "dtype")]
    there = [f"  there: {', '.join(tensors)[:350]}"] if tensors else []
    return [*there, f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"]


def advice_lines(error, frames, memory_settings):
    """Returns lines of text: what to try where memory or disk space ran out, else none."""
    lines, text = [], str(error)
    no_memory = "out of memory" in text.lower() or "can't allocate memory" in text
    if no_memory or isinstance(error, MemoryError):
        settings = frames[-1][0].f_globals if frames else {}
        halved = [f"{name} = {value / 2:g}" for name in memory_settings
                  if isinstance(value := settings.get(name), (int, float))]
        lower = f"lower {' or '.join(memory_settings) or 'what takes memory'}"
        lines.append(f"Try: {', or '.join(halved) or lower}.")
    if getattr(error, "errno", None) == errno.ENOSPC:
        lines.append("Try: free disk space, or set SAE_CACHE_DIR to a larger disk.")
    return lines
