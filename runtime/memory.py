"""Memory of the process: kept when freed, bounded by what the machine has."""
import ctypes
import re
import resource
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import torch


def keep_freed_memory():
    """glibc returns large buffers at each free and faults them in again: that costs a third."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 1 << 30)                        # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)                  # M_TRIM_THRESHOLD


def bound_memory():
    """Memory that the machine has not got is refused, with an error at a line: else the system ends the process, wordless."""
    if sys.platform != "linux" or torch.cuda.is_available():
        return
    found = dict(re.findall(r"^(VmData|MemAvailable|SwapFree):\s+(\d+)", "".join(
        Path("/proc", name).read_text() for name in ("self/status", "meminfo")), re.M))
    used, *free = (1024 * int(found[name]) for name in ("VmData", "MemAvailable", "SwapFree"))
    group, left = Path("/sys/fs/cgroup"), sum(free)
    with suppress(OSError, ValueError):                      # of a container
        left = min(left, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    most = resource.getrlimit(resource.RLIMIT_DATA)[1]
    limit = used + max(left, 0)
    resource.setrlimit(resource.RLIMIT_DATA, (limit if most < 0 else min(limit, most), most))


@contextmanager
def unbounded_memory():
    """For files that are mapped, which need none."""
    limit, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    yield
    if limit != most:
        bound_memory()
