"""Tables of activations in files: written by threads, checked, mapped."""
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


def intact(path):
    """Whether a file is there with the checksum that was written after it."""
    checksum = path.with_suffix(".crc32")
    if not (checksum.exists() and path.exists()):
        return False
    found = zlib.crc32(np.memmap(path, np.uint8, "r")) if path.stat().st_size else 0
    if str(found).encode() == checksum.read_bytes():
        return True
    print(f"{path} is damaged: collecting it again", flush=True)
    return False


class Shard(NamedTuple):
    path: Path
    start: int              # row of the table that it holds first
    rows: int


def shard_table(folder, n_rows, size):
    """The files of a table of n_rows rows, `size` in each."""
    return [Shard(folder / f"{i:09d}.bin", i, min(size, n_rows - i)) for i in range(0, n_rows, size)]


@contextmanager
def missing_shards(shard_table, row_bytes):
    """The shards that are not there whole, for which there is room, or this process's part; under a lock that other runs
    wait for."""
    folder, began, missing = shard_table[0].path.parent, time.time(), []
    with nullcontext() if RANKS.rank else locked(folder / "lock"):
        if not RANKS.rank:
            for left in folder.glob("*.partial"):
                left.unlink()
            missing = [shard for shard in shard_table if not intact(shard.path)]
            if missing:
                check_room(folder, sum(shard.rows for shard in missing) * row_bytes)
        missing = RANKS.agree(missing)
        try:
            yield tqdm(missing[RANKS.rank::RANKS.size], "collecting", disable=not missing or None)
            wait_for_writers()
        finally:                                            # no thread writes once the lock is free
            while WRITING:
                WRITING.pop().exception()
        RANKS.total(0)                                      # all have come this far
        if missing:
            size = sum(shard.rows for shard in missing) * row_bytes
            print(f"collected {size / 1e9:.2f} GB in {time.time() - began:.0f} s", flush=True)


def open_shards(shard_table, row_shape, dtype, device):
    """The tables of the shards, [rows, *row_shape], not read before they are used: on a GPU where they fill at most half of
    its free memory."""
    row, n_rows = math.prod(row_shape), sum(shard.rows for shard in shard_table)
    room = torch.cuda.mem_get_info()[0] // 2 if device == "cuda" else 0
    place = device if n_rows * row * dtype.itemsize < room else "cpu"
    maps = (torch.from_file(str(shard.path), size=shard.rows * row, dtype=dtype) for shard in shard_table)
    with unbounded_memory():
        return [part.view(-1, *row_shape).to(place) for part in maps]


WRITERS, WRITING = ThreadPoolExecutor(3), deque()      # the threads, and what they are still at


def write_shard(path, parts):
    """The tensors `parts`, one after another, become the file `path`, with a checksum beside it, only when it is whole. A thread
    copies and writes, also after the return, while what comes next is computed: `written` waits for it."""
    stream, waiting = torch.cuda.Stream() if torch.cuda.is_available() else None, SimpleQueue()

    def work():
        checksum = 0
        with replacing(path, durable=False) as partial:        # the checksum would tell
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
                        raise RunnerError("non-finite activations: the model overflows before LAYER ends. Take MODEL_DTYPE = torch.float32, or "
                                        "an earlier LAYER.")
                    file.write(content)
                    checksum = zlib.crc32(content, checksum)
        with replacing(path.with_suffix(".crc32")) as partial:
            partial.write_text(str(checksum))

    try:
        WRITING.append(WRITERS.submit(work))
        for tensor in parts:
            finite = torch.isfinite(tensor).all()
            waiting.put((tensor, finite, torch.cuda.current_stream().record_event() if stream else None))
        waiting.put(None)
    except BaseException as error:
        waiting.put(error)                                      # the thread takes the partial file away
        raise
    wait_for_writers(2)


def wait_for_writers(left=0):
    """Waits until at most so many files are not whole yet."""
    while len(WRITING) > left:
        WRITING[0].result()
        WRITING.popleft()
