"""Memory of the process: kept when freed, and bounded by what the machine has."""
import ctypes
import re
import resource
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's mallopt


def keep_freed_memory():
    """Makes glibc keep freed memory. It would return large buffers at each free and fault them in
    again at the next use, which costs a third of the time."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def bound_memory():
    """Bounds this process's memory by what the machine or the container has left: too large a
    request ends in an error at its line; without the bound the system ends the process silently.
    Does nothing with a GPU or on another system than Linux."""
    if sys.platform != "linux" or torch.cuda.is_available():
        return
    texts = [Path("/proc", name).read_text() for name in ("self/status", "meminfo")]
    kilobytes = dict(re.findall(r"^(VmData|MemAvailable|SwapFree):\s+(\d+)", "".join(texts), re.M))
    used, *free = (1024 * int(kilobytes[name]) for name in ("VmData", "MemAvailable", "SwapFree"))

    left, container = sum(free), Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # there is no container, or no limit
        most, used_there = (int((container / f"memory.{name}").read_text())
                            for name in ("max", "current"))
        left = min(left, most - used_there)

    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    limit = used + max(left, 0)
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard < 0 else min(limit, hard), hard))


@contextmanager
def unbounded_memory():
    """Lifts the bound for the block, for files that are mapped, which need no memory."""
    limit, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
    yield
    if limit != hard:
        bound_memory()
