"""Tables of activations in files: written by threads, checked, mapped into memory."""
import math
import time
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from runtime.errors import RunnerError
from runtime.files import check_room, locked, replacing
from runtime.memory import unbounded_memory
from runtime.ranks import RANKS

WRITERS = ThreadPoolExecutor(3)
WRITING = deque()  # futures of the files that the writers are still at


class Shard(NamedTuple):
    """A file with some consecutive rows of a table."""
    path: Path
    start: int  # row of the table that it holds first
    rows: int  # how many it holds


def shard_table(folder, n_rows, size):
    """Returns the Shards of a table of n_rows rows, `size` in each but the last."""
    return [Shard(folder / f"{i:09d}.bin", i, min(size, n_rows - i))
            for i in range(0, n_rows, size)]


def intact(path):
    """Returns whether a file has the checksum that was written after it; False if one is missing.
    """
    checksum = path.with_suffix(".crc32")
    if not (checksum.exists() and path.exists()):
        return False
    present = zlib.crc32(np.memmap(path, np.uint8, "r")) if path.stat().st_size else 0
    if str(present).encode() == checksum.read_bytes():
        return True
    print(f"{path} is damaged: collecting it again", flush=True)
    return False


@contextmanager
def missing_shards(shards, row_bytes):
    """Yields this process's part of the shards that are not intact, to be written in the block
    with write_shard, and waits for the writers.

    A row takes row_bytes; raises RunnerError where the disk has no room for all. Other runs wait at
    a lock meanwhile.
    """
    folder, began, missing = shards[0].path.parent, time.time(), []
    with nullcontext() if RANKS.rank else locked(folder / "lock"):
        if not RANKS.rank:
            for left in folder.glob("*.partial"):
                left.unlink()
            missing = [shard for shard in shards if not intact(shard.path)]
            if missing:
                check_room(folder, bytes_of(missing, row_bytes))
        missing = RANKS.agree(missing)
        mine = missing[RANKS.rank::RANKS.size]
        try:
            yield tqdm(mine, "collecting", disable=not missing or None)
            wait_for_writers()
        finally:  # no thread writes once the lock is free
            while WRITING:
                WRITING.pop().exception()
        RANKS.total(0)  # all have come this far
        if missing:
            size, seconds = bytes_of(missing, row_bytes), time.time() - began
            print(f"collected {size / 1e9:.2f} GB in {seconds:.0f} s", flush=True)


def bytes_of(shards, row_bytes):
    """Returns how many bytes shards take on the disk."""
    return sum(shard.rows for shard in shards) * row_bytes


def open_shards(shards, row_shape, dtype, device):
    """Returns a tensor [rows, *row_shape] for each shard.

    On a GPU it lies there if all fill at most half of its free memory; else it is a map of the
    file, not read before it is used.
    """
    row, n_rows = math.prod(row_shape), sum(shard.rows for shard in shards)
    room = torch.cuda.mem_get_info()[0] // 2 if device == "cuda" else 0
    place = device if n_rows * row * dtype.itemsize < room else "cpu"
    with unbounded_memory():
        maps = [torch.from_file(str(shard.path), size=shard.rows * row, dtype=dtype)
                for shard in shards]
        return [values.view(-1, *row_shape).to(place) for values in maps]


def write_shard(path, parts, advice=""):
    """Writes tensors, one after another, to the file `path`, and its checksum beside it, only when
    it is whole.

    A thread copies and writes, also after the return, while what comes next is computed:
    wait_for_writers waits for it, and raises its errors. Non-finite values are a RunnerError, whose
    message ends with `advice`.
    """
    stream = torch.cuda.Stream() if torch.cuda.is_available() else None
    waiting = SimpleQueue()  # (tensor, whether it is finite, event when it is ready), then None
    try:
        WRITING.append(WRITERS.submit(write_tensors, path, waiting, stream, advice))
        for tensor in parts:
            finite = torch.isfinite(tensor).all()
            event = torch.cuda.current_stream().record_event() if stream else None  # after finite
            waiting.put((tensor, finite, event))
        waiting.put(None)
    except BaseException as error:
        waiting.put(error)  # the thread takes the partial file away
        raise
    wait_for_writers(2)


def write_tensors(path, waiting, stream, advice):
    """Writes the tensors of a queue to a file until None comes; raises an error that comes."""
    checksum = 0
    with replacing(path, durable=False) as partial:  # the checksum would tell
        with open(partial, "wb") as file, torch.cuda.stream(stream):
            for part in iter(waiting.get, None):
                if isinstance(part, BaseException):
                    raise part
                tensor, finite, event = part
                if event:
                    event.wait()
                    tensor.record_stream(stream)
                content = tensor.cpu().contiguous().flatten().view(torch.uint8).numpy()
                if not finite.item():
                    raise RunnerError(f"non-finite activations{advice}.")
                file.write(content)
                checksum = zlib.crc32(content, checksum)
    with replacing(path.with_suffix(".crc32")) as partial:
        partial.write_text(str(checksum))


def wait_for_writers(left=0):
    """Waits until at most so many files are not whole yet; raises what a writer raised."""
    while len(WRITING) > left:
        WRITING[0].result()
        WRITING.popleft()
