"""Caches, locks and files that are written whole or not at all."""
import fcntl
import hashlib
import itertools
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

COMPLETED = set()  # how far this process has come: "run", then "results"


def cache_folder():
    """Returns the folder of the caches: SAE_CACHE_DIR, or one in the user's cache directory."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("SAE_CACHE_DIR") or user / "temporal-sae-runner").absolute()


def fingerprint(*parts):
    """Returns 20 hexadecimal digits that stand for values that JSON or str can spell."""
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:20]


def make_folder(folder, advice):
    """Makes a folder; raises RunnerError, which ends with `advice`, where no file can be written
    there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        reason = error.strerror or error
        raise RunnerError(f"{folder} cannot be written ({reason}): {advice}.") from None


def check_room(folder, need):
    """Raises RunnerError where a folder's disk has not `need` bytes left, and 5 % more."""
    free = shutil.disk_usage(folder).free
    if free < need * 1.05:
        raise RunnerError(
            f"{folder} needs {need / 1e6:,.0f} MB and has {free / 1e6:,.0f}. Take less data, or "
            "set SAE_CACHE_DIR to a larger disk.")


@contextmanager
def replacing(path, durable=True):
    """Yields the path of a partial file that becomes `path` when the block ends without an error;
    where it must be durable, only once its bytes are on the disk."""
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
    """Holds the lock at `path`, once no other process does; a killed process holds none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print(f"waiting for another run at {path}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def cached_json(path, compute):
    """Returns compute() as JSON spells it, from the file at `path`, which is written if missing.

    Lists stand for tuples, and keys of dictionaries are texts.
    """
    if not path.exists():
        WATCHDOG.renew()
        value = compute()
        WATCHDOG.renew()
        with replacing(path) as partial:
            partial.write_text(json.dumps(value), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def folder_identity(folder):
    """Returns [(name, checksum)] of a folder's files; from 64 MB on size and date stand for it."""
    def identity(path):
        size, date = path.stat().st_size, path.stat().st_mtime_ns
        return path.name, zlib.crc32(path.read_bytes()) if size < 2 ** 26 else (size, date)

    return [identity(path) for path in sorted(folder.iterdir()) if path.is_file()]


@contextmanager
def resumable_state(folder, key):
    """Yields a folder, under a lock, for what a killed run leaves behind: empty at first and where
    `key` has changed since; it goes when the block ends without an error."""
    state = folder / key
    if RANKS.rank:
        RANKS.total(0)  # waits for rank 0
        yield state
        return

    with locked(folder.with_suffix(".lock")):
        if folder.exists() and not state.exists():
            print("settings or code have changed: starting afresh")
            shutil.rmtree(folder)
        state.mkdir(parents=True, exist_ok=True)
        RANKS.total(0)  # the others may begin
        yield state
        shutil.rmtree(folder)


@contextmanager
def atomic_run_folder(out_dir, template):
    """Yields a partial folder that takes out_dir's place when the block ends without an error and
    final_info.json is in it; what else an earlier run's folder holds (ratings) is kept.

    Rank 0 alone has a folder, the others None. Raises RunnerError where `out_dir` is the template's
    folder, one around it or a file.
    """
    if RANKS.rank:
        yield None
        COMPLETED.add("results")
        return

    is_file = out_dir.exists() and not out_dir.is_dir()
    if is_file or out_dir in (template, *template.parents):
        raise RunnerError(f"--out_dir={out_dir} must be a folder for the results alone.")
    partial, old = (out_dir.with_name(out_dir.name + end) for end in (".partial", ".replaced"))
    if old.exists() and not out_dir.exists():  # killed between the two renames below
        os.replace(old, out_dir)
    for left in (partial, old):
        shutil.rmtree(left, ignore_errors=True)
    make_folder(partial, "choose another --out_dir")

    try:
        yield partial
        if not (partial / "final_info.json").exists():
            raise RunnerError(
                "final_info.json was not written: `main` must call write_results(partial, ...).")
        copy_missing(out_dir, partial)
        if out_dir.exists():
            os.replace(out_dir, old)
        os.replace(partial, out_dir)
        COMPLETED.add("results")
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def next_run(folder):
    """Returns the path of the first of run_1, run_2, ... that is not in the folder."""
    names = (folder / f"run_{i}" for i in itertools.count(1))
    return next(path for path in names if not path.exists())


def copy_missing(source, target):
    """Copies into a folder the files and folders of `source`, if it exists, that it lacks."""
    for path in source.iterdir() if source.exists() else ():
        if not (target / path.name).exists():
            (shutil.copytree if path.is_dir() else shutil.copy2)(path, target / path.name)
