"""Caches, locks and files that are written whole or not at all."""
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import zlib
from contextlib import contextmanager
from pathlib import Path

from runtime.errors import RunnerError
from runtime.preflight import WATCHDOG
from runtime.ranks import RANKS

COMPLETED = set()         # what this process has come to: "run", "results"


def cache_folder():
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("SAE_CACHE_DIR") or user / "temporal-sae-runner").absolute()


def fingerprint(*parts):
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:20]


def make_folder(folder, advice):
    """Makes a folder, or says at once why nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise RunnerError(f"{folder} cannot be written ({error.strerror or error}): {advice}.") from None


@contextmanager
def replacing(path, durable=True):
    """A partial file that becomes `path` only when it is whole and, where it must be durable, on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        if durable:
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def locked(path):
    """Waits until no other process holds the lock at `path`; a killed process holds none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print(f"waiting for another run at {path}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def resumable_state(folder, key):
    """A folder, locked, for what a killed run leaves behind: empty at first and where the key has changed, gone when
    all went well."""
    state = folder / key
    if RANKS.rank:
        RANKS.total(0)
        yield state
        return
    with locked(folder.with_suffix(".lock")):
        if folder.exists() and not state.exists():
            print("settings or code have changed: starting afresh")
            shutil.rmtree(folder)
        state.mkdir(parents=True, exist_ok=True)
        RANKS.total(0)                                      # the others may begin
        yield state
        shutil.rmtree(folder)


@contextmanager
def atomic_run_folder(out_dir, template):
    """A folder that takes out_dir's place only when all went well; files of an earlier run that
    this one does not write (ratings) are kept. Rank 0 alone publishes."""
    if RANKS.rank:
        yield None
        COMPLETED.add("results")
        return
    if out_dir == template or out_dir in template.parents or out_dir.exists() and not out_dir.is_dir():
        raise RunnerError(f"--out_dir={out_dir} must be a folder for the results alone.")
    partial, old = (out_dir.with_name(out_dir.name + end) for end in (".partial", ".replaced"))
    if old.exists() and not out_dir.exists():        # killed between the two renames below
        os.replace(old, out_dir)
    for rest in (partial, old):
        shutil.rmtree(rest, ignore_errors=True)
    make_folder(partial, "choose another --out_dir")
    try:
        yield partial
        if not (partial / "final_info.json").exists():
            raise RunnerError("final_info.json was not written: `main` must call write_results(partial, ...).")
        for earlier in out_dir.iterdir() if out_dir.exists() else ():
            if not (partial / earlier.name).exists():
                (shutil.copytree if earlier.is_dir() else shutil.copy2)(earlier, partial / earlier.name)
        if out_dir.exists():
            os.replace(out_dir, old)
        os.replace(partial, out_dir)
        COMPLETED.add("results")
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def cached_json(path, compute):
    """compute() as it stands in the file at `path`, written where there is none."""
    if not path.exists():
        WATCHDOG.renew()
        found = compute()
        WATCHDOG.renew()
        with replacing(path) as partial:
            partial.write_text(json.dumps(found))
    return json.loads(path.read_text())


def folder_identity(folder):
    """Name and checksum of each file of a folder; above 64 MB size and date stand for the bytes."""
    def identity(path):
        size, date = path.stat().st_size, path.stat().st_mtime_ns
        return path.name, zlib.crc32(path.read_bytes()) if size < 2 ** 26 else (size, date)

    return [identity(path) for path in sorted(folder.iterdir()) if path.is_file()]


def check_room(folder, need):
    """Raises where a folder's disk has not `need` bytes left."""
    free = shutil.disk_usage(folder).free
    if free < need * 1.05:
        raise RunnerError(f"{folder} needs {need / 1e6:,.0f} MB and has {free / 1e6:,.0f}. Lower TRAIN_TOKENS or set "
                        "SAE_CACHE_DIR.")
