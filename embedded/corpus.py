"""Text for the runner: the embedded corpus and the loaders of named data sets. Data only: no model, no SAE, and
of the metrics what tokens and labels decide by themselves, or with functions of the model that they are given. At the
end a run's files and books, and reports of errors.

The embedded corpus is the Python source of the packages pinned in requirements.txt (and of what they bring), read where
they are installed. Each package is a labelled domain, each file a document. The same versions give the same bytes on
every machine, so the corpus needs no download and no copy; `corpus_hash` says whether yours is the one of run_0.
"""
import ast
import atexit
import copy
import ctypes
import errno
import fcntl
import glob
import hashlib
import importlib.metadata
import importlib.util
import inspect
import io
import keyword
import json
import shutil
import tempfile
import textwrap
import time
import zlib
import logging
import math
import os
import pickle
import random
import re
import resource
import signal
import sys
import sysconfig
import threading
import tokenize
import traceback
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from datetime import timedelta
from bisect import bisect_left, bisect_right
from collections import Counter, deque
from functools import lru_cache, partial
from itertools import chain, compress, islice, permutations
from pathlib import Path
from queue import SimpleQueue
from typing import Iterator, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.spatial.distance import cdist
from scipy.stats import binomtest, false_discovery_control, linregress, norm, rankdata, sem, spearmanr
from sklearn.decomposition import MiniBatchNMF, PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, roc_auc_score, roc_curve
from sklearn.preprocessing import MaxAbsScaler, normalize
from tqdm import tqdm

# Domain (the folder that is imported) -> the distribution that requirements.txt pins.
DOMAINS = {
    "torch": "torch", "transformers": "transformers", "sympy": "sympy", "scipy": "scipy", "pandas": "pandas",
    "sklearn": "scikit-learn", "matplotlib": "matplotlib", "numpy": "numpy", "networkx": "networkx",
    "huggingface_hub": "huggingface_hub", "datasets": "datasets", "fontTools": "fonttools", "narwhals": "narwhals",
    "pydantic": "pydantic", "mpmath": "mpmath", "rich": "rich", "PIL": "pillow", "seaborn": "seaborn",
    "fsspec": "fsspec", "joblib": "joblib",
}
# Left out: tests, vendored copies, generated tables and what differs between builds of one version.
SKIP_FOLDERS = {"tests", "test", "testing", "_testing", "__pycache__", "_vendor", "vendor", "externals", "_internal",
                "benchmarks", "serialized_patterns", "generated", "lib", "bin", "include", "share", "examples"}
SKIP_SUBTREES = {"transformers/models", "torch/onnx", "torch/_inductor", "torch/_dynamo", "torch/_functorch",
                 "torch/_refs"}
SKIP_FILES = {"version.py", "_version.py", "__config__.py", "_distributor_init.py", "_triton_ops_meta.py", "_cmp.py"}
MIN_CHARS, MAX_CHARS = 400, 400_000
HELDOUT_ONE_IN = 12          # by a hash of the path: held out from the language model and from every SAE alike

# Other data sets. Suffix of a local file -> the builder in `datasets` that reads it.
BUILDERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
COMPRESSED = {".gz", ".zst", ".bz2", ".xz"}                        # as a second suffix: pile.jsonl.zst
OTHER_FILES = {".arrow", ".bin", ".html", ".md", ".pdf", ".pkl", ".tsv", ".xml", ".zip"}    # no hub name ends so
# Hub data sets that come with a loading script, which `datasets` no longer runs -> the files that it would read.
PARQUET_FILES = {"codeparrot/github-code": "hf://datasets/codeparrot/github-code/data/train-*.parquet"}
NOT_DATA = {"dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json", "README.txt"}
DOMAIN_COLUMNS = ("domain", "source", "label", "pile_set_name")    # the first that holds a string names a row's domain
TITLE = re.compile(r"\s?= [^=]+ =\s*$")     # " = Title = " begins an article of wikitext; " = = Section = = " does not
PART_CHARS, SHORTEST_PART = 20_000, 1_000
FEW_DOCUMENTS = 48           # with fewer, parts are held out: of whole documents perhaps none would be
SHUFFLE_CHARS = 20_000_000   # text held in memory to draw from: bounds memory, mixes what is nearer than this
SHARD_SHUFFLE = {"buffer_size": 32, "max_buffer_input_shards": 1}      # files in random order, one at a time


class DataError(ValueError):
    """A data set that cannot be read. Its message is one paragraph: what was asked, what is wrong, what would work."""


class Document(NamedTuple):
    name: str                # path within site-packages, or "<data set>#<row>", or "<data set>#<row>.<part>"
    text: str
    domain: str              # the package, or the row's own label, or the data set's name
    heldout: bool            # True: evaluation only


def is_heldout(name):
    return int(hashlib.md5(name.encode()).hexdigest(), 16) % HELDOUT_ONE_IN == 0


def _keep(relative):
    folders = relative.parts[:-1]
    return not (SKIP_FOLDERS & set(folders) or relative.name in SKIP_FILES
                or any(relative.as_posix().startswith(s + "/") for s in SKIP_SUBTREES))


@lru_cache(maxsize=1)
def embedded_documents():
    """Every file of the embedded corpus, in the order of its path: tuple of Document."""
    site, found = Path(sysconfig.get_paths()["purelib"]), []
    for domain in sorted(DOMAINS):
        if not (site / domain).is_dir():
            raise DataError(f"The embedded corpus reads the package {DOMAINS[domain]!r}, which is not installed: "
                            "pip install -r requirements.txt")
        for path in sorted((site / domain).rglob("*.py")):
            relative = path.relative_to(site)
            if _keep(relative):
                text = path.read_text(encoding="utf-8", errors="ignore").replace("\r\n", "\n")
                if MIN_CHARS <= len(text) <= MAX_CHARS:
                    name = relative.as_posix()
                    found.append(Document(name, text, domain, is_heldout(name)))
    return tuple(found)


@lru_cache(maxsize=1)
def corpus_hash():
    """SHA-256 over names and texts: equal hashes mean the same documents."""
    digest = hashlib.sha256()
    for document in embedded_documents():
        digest.update(f"{document.name}\0{document.text}\0".encode())
    return digest.hexdigest()


def corpus_versions():
    return {domain: importlib.metadata.version(package).split("+")[0] for domain, package in DOMAINS.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Named data sets
# ---------------------------------------------------------------------------------------------------------------------
def load_documents(dataset: str, seed: int) -> Iterator[Document]:
    """Documents of a data set, training and held-out mixed, in an order that is a function of the seed alone.

    `dataset` is one of
      "embedded"          the embedded corpus, whole files
      a path              .txt (one document a file), .json, .jsonl, .parquet or .csv (one a row), also with .gz, .bz2,
                          .xz or .zst after it, or a folder of files of one of these kinds
      a nanoGPT folder    train.bin and val.bin (uint16 ids) and meta.pkl with "itos": a path, or a bare name such as
                          "shakespeare_char" that is found in data/, ../data/, ../../data/ or ../../../data/
      a hub name          "monology/pile-uncopyrighted" or, with a configuration after a colon,
                          "Salesforce/wikitext:wikitext-2-raw-v1", "cais/wmdp-corpora:bio-retain-corpus": streamed

    Rows are read from the column "text", else "content", else the only column of strings; lines under " = Title = "
    headings are joined to articles; documents above PART_CHARS characters come in parts. Held out is one whole document
    in HELDOUT_ONE_IN, by a hash of its text, whatever the seed; in a data set of fewer than FEW_DOCUMENTS documents one
    part in HELDOUT_ONE_IN; of a nanoGPT folder val.bin. In memory: SHUFFLE_CHARS characters and the longest document.

    Raises DataError, before the first document where it can.
    """
    place = find(dataset)
    if dataset == "embedded":
        documents = list(embedded_documents())
        random.Random(seed).shuffle(documents)
        return iter(documents)
    if place is None:
        return _documents(dataset, dataset, _hub_rows(dataset), seed)
    if _is_nanogpt(place):
        return _nanogpt_documents(place, seed)
    name = place.resolve().name              # "pile.jsonl.zst" is called "pile"
    while place.is_file() and Path(name).suffix.lower() in set(BUILDERS) | COMPRESSED:
        name = Path(name).stem
    return _documents(dataset, name, _local_rows(dataset, place), seed)


def data_identity(dataset: str) -> str:
    """What the documents depend on: the embedded corpus's hash; sizes and dates of local files; a hub data set's name.

    Raises DataError when a local data set is missing."""
    place = find(dataset)
    if dataset == "embedded":
        return corpus_hash()
    if place is None:
        return f"hub {dataset}"
    if _is_nanogpt(place):
        files = [place / name for name in ("train.bin", "val.bin", "meta.pkl")]
    else:
        _, files = _data_files(dataset, place)
    return repr([(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.exists()])


def find(dataset):
    """The local Path that a data set's name means, or None where it is "embedded" or a hub name. Asks no network."""
    works = ("\"embedded\", a .txt, .json, .jsonl, .parquet or .csv file, a folder of these, a nanoGPT data folder, "
             "or a hub name")
    if not isinstance(dataset, str) or not dataset.strip() or len(dataset) > 1_000:
        raise DataError(f"The data set {repr(dataset)[:80]} is no name. What works: {works}.")
    if dataset == "embedded":
        return None
    path = Path(os.path.expanduser(dataset))
    if os.path.exists(path):                 # False for a name that cannot be, where Path.exists raises
        return path
    suffixes = set(BUILDERS) | COMPRESSED | OTHER_FILES
    if dataset[0] in "./~\\" or path.suffix.lower() in suffixes or dataset.count("/") > 1:
        raise DataError(f"The data set {dataset!r} looks like a path, and there is no such file or folder (relative "
                        f"paths start from {Path.cwd()}). What works: {works}.")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[^/\s]+)?", dataset):
        raise DataError(f"The data set {dataset!r} is neither a path that exists nor a possible hub name. What works: "
                        f"{works}; a hub data set's configuration follows a colon, as in "
                        "\"Salesforce/wikitext:wikitext-2-raw-v1\".")
    if re.fullmatch(r"[\w.-]+", dataset):
        project = Path(__file__).resolve().parent.parent
        for base in (Path.cwd(), project):
            for up in ("data", "../data", "../../data", "../../../data"):
                if os.path.isdir(base / up / dataset):
                    return base / up / dataset
    return None


def _documents(dataset, name, open_rows, seed):
    """Documents from `open_rows(seed or None) -> iterator of rows`; None asks for the order of the files."""
    head = list(islice(_readable(dataset, open_rows(None)), FEW_DOCUMENTS))
    if not head:
        raise DataError(f"The data set {dataset!r} is empty: not one row in it.")
    column = _text_column(dataset, head)
    by_line = _is_by_line([row.get(column) for row in head])

    def texts(order):
        rows = ((row.get(column), _domain(row) or name) for row in _readable(dataset, open_rows(order)))
        return ((text, domain) for text, domain in (_articles(rows) if by_line else rows)
                if isinstance(text, str) and text.strip())

    first = [len(text) for text, _ in islice(texts(None), FEW_DOCUMENTS)]
    if not first:
        raise DataError(f"The data set {dataset!r} is empty: its column {column!r} has no text in any row.")
    few = len(first) < FEW_DOCUMENTS
    part_chars = max(SHORTEST_PART, min(PART_CHARS, sum(first) // (2 * HELDOUT_ONE_IN))) if few else PART_CHARS
    # Articles that go on from one file to the next stay whole only in the order of the files.
    return _shuffled(_parts(name, texts(None if few or by_line else seed), few, part_chars), seed)


def _parts(name, texts, few, part_chars):
    count = 0
    for row, (text, domain) in enumerate(texts):
        whole_heldout, pieces = is_heldout(text), _cut(text, part_chars)
        for part, piece in enumerate(pieces):
            heldout = count % HELDOUT_ONE_IN == HELDOUT_ONE_IN // 2 if few else whole_heldout
            yield Document(f"{name}#{row}.{part}" if len(pieces) > 1 else f"{name}#{row}", piece, domain, heldout)
            count += 1


def _cut(text, size):
    """The text in pieces of at most `size` characters, cut after a line's or a word's end where there is one nearby."""
    pieces, start = [], 0
    while len(text) - start > size:
        near = (start + size // 2, start + size)
        end = text.rfind("\n", *near) + 1 or text.rfind(" ", *near) + 1 or start + size
        pieces.append(text[start:end])
        start = end
    return [piece for piece in pieces + [text[start:]] if piece.strip()]


def _shuffled(documents, seed):
    rng, pool, held = random.Random(seed), [], 0
    for document in documents:
        pool.append(document)
        held += len(document.text)
        while held > SHUFFLE_CHARS:
            chosen = rng.randrange(len(pool))
            pool[chosen], pool[-1] = pool[-1], pool[chosen]
            held -= len(pool[-1].text)
            yield pool.pop()
    rng.shuffle(pool)
    yield from pool


def _text_column(dataset, rows):
    columns = list(dict.fromkeys(column for row in rows for column in row))
    strings = [column for column in columns if any(isinstance(row.get(column), str) for row in rows)]
    for column in ("text", "content"):
        if column in strings:
            return column
    candidates = [column for column in strings if column not in DOMAIN_COLUMNS]
    if len(candidates) == 1:
        return candidates[0]
    raise DataError(f"The data set {dataset!r} has no column of strings named \"text\" or \"content\", and "
                    f"{len(candidates)} others that could be meant. Its columns: {', '.join(columns)}. Rename the one "
                    "to read to \"text\".")


def _domain(row):
    labels = {**row["meta"], **row} if isinstance(row.get("meta"), dict) else row     # the Pile's label is in "meta"
    return next((labels[c] for c in DOMAIN_COLUMNS if isinstance(labels.get(c), str) and labels[c].strip()), None)


def _is_by_line(texts):
    """True for wikitext and its like: every row is one line, some are headings."""
    lines = [text for text in texts if isinstance(text, str)]
    return any(map(TITLE.match, lines)) and not any("\n" in line.strip() for line in lines)


def _articles(rows):
    """(text, domain) of each article from (line, domain) of each line."""
    lines, domain = [], None
    for line, line_domain in rows:
        if isinstance(line, str):
            if TITLE.match(line) and lines:
                yield "".join(lines), domain
                lines = []
            domain = domain if lines else line_domain
            lines.append(line.rstrip("\n") + "\n")
    yield "".join(lines), domain


# --- local files -----------------------------------------------------------------------------------------------------
def _builder(path):
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return BUILDERS.get(suffixes[-1]) if suffixes else None


def _data_files(dataset, place):
    """(builder, files in the order of their paths) of a local file or folder."""
    if place.is_file():
        if not _builder(place):
            raise DataError(f"The data set {dataset!r} is a file of a kind that is not read. What works: .txt, .json, "
                            ".jsonl, .parquet and .csv, also with .gz, .bz2, .xz or .zst after it.")
        return _builder(place), [place]
    found = {}
    for path in sorted(place.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(place).parts)
        if path.is_file() and not hidden and path.name not in NOT_DATA and _builder(path):
            found.setdefault(_builder(path), []).append(path)
    if len(found) == 1:
        return next(iter(found.items()))
    if found:
        kinds = ", ".join(f"{len(files)} of {builder}" for builder, files in found.items())
        raise DataError(f"The data set {dataset!r} is a folder with files of several kinds ({kinds}); name a folder "
                        "with one kind, or one file.")
    raise DataError(f"The data set {dataset!r} is a folder with no file that can be read: no .txt, .json, .jsonl, "
                    ".parquet or .csv, and no train.bin with val.bin and meta.pkl.")


def _local_rows(dataset, place):
    rows = _stream(dataset, *_data_files(dataset, place))
    return lambda seed: iter(rows if seed is None else rows.reshard().shuffle(seed=seed, **SHARD_SHUFFLE))


def _stream(dataset, builder, files):
    files = [f for f in files if f.stat().st_size]            # an empty JSON file ends the reader with a StopIteration
    if not files:
        raise DataError(f"The data set {dataset!r} is empty: 0 bytes.")
    datasets = _datasets_library()
    options = {"sample_by": "document"} if builder == "text" else {}
    try:
        return datasets.load_dataset(builder, data_files=[glob.escape(str(f.resolve())) for f in files],
                                     split="train", streaming=True, **options)
    except Exception as error:
        raise _unreadable(dataset, error) from error


def _readable(dataset, rows):
    """The same rows; whatever goes wrong in reading them becomes a DataError."""
    try:
        yield from rows
    except DataError:
        raise
    except Exception as error:
        raise _unreadable(dataset, error) from error


def _unreadable(dataset, error):
    """DataError from a library's error, shortened and without addresses."""
    text = " ".join(without_addresses(str(error)).split())[:300]
    if isinstance(error, UnicodeDecodeError):
        advice = "It is not UTF-8 text: re-encode it."
    elif "zstandard" in text or "zstd" in text.lower():
        advice = "Files that end in .zst need the package zstandard: pip install -r requirements.txt."
    elif isinstance(error, ConnectionError) or "Couldn't find cache" in text:
        advice = ("The hub does not answer, or offline mode is on, and nothing of it is cached: use a local file or "
                  "\"embedded\".")
    elif "gated" in text.lower() or "authenticat" in text:
        advice = ("It is gated: accept its licence on the hub and log in with `hf auth login`, or name a local folder "
                  "with the same columns.")
    elif "Config name is missing" in text or "BuilderConfig" in text:
        advice = "Put one of its configurations after a colon, as in \"Salesforce/wikitext:wikitext-2-raw-v1\"."
    else:
        advice = "Check that the file or the name is what you mean; \"embedded\" always works."
    return DataError(f"The data set {dataset!r} cannot be read: {type(error).__name__}: {text.rstrip('.')}. {advice}")


# --- nanoGPT folders -------------------------------------------------------------------------------------------------
class _PlainUnpickler(pickle.Unpickler):
    """Numbers, strings, lists and dictionaries only: a pickle that names a class or function could run any code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, and a vocabulary needs no code")


def _is_nanogpt(place):
    return place.is_dir() and (place / "train.bin").is_file()


def _nanogpt_documents(place, seed):
    asked = f"The nanoGPT data set {str(place)!r}"
    try:
        with open(place / "meta.pkl", "rb") as file:
            itos = _PlainUnpickler(file).load()["itos"]
        itos = dict(enumerate(itos)) if isinstance(itos, list) else {int(i): str(s) for i, s in itos.items()}
        ids = {split: np.memmap(place / f"{split}.bin", dtype=np.uint16, mode="r") for split in ("train", "val")}
    except FileNotFoundError as error:
        raise DataError(f"{asked} lacks {Path(error.filename).name}: it needs train.bin, val.bin (uint16 ids) and "
                        "meta.pkl (with \"itos\", id to text), as nanoGPT's prepare.py writes them for character data "
                        "sets.") from error
    except Exception as error:
        raise DataError(f"{asked} cannot be read: {type(error).__name__}: {error}. meta.pkl must hold a plain "
                        "dictionary with \"itos\", train.bin and val.bin uint16 ids.") from error
    # Short parts where the text is short, so that val.bin is several held-out documents.
    size = {split: min(PART_CHARS, max(SHORTEST_PART, len(ids[split]) // HELDOUT_ONE_IN)) for split in ids}
    parts = [(split, start) for split in ids for start in range(0, len(ids[split]), size[split])]
    random.Random(seed).shuffle(parts)

    def document(split, start):
        try:
            text = "".join(itos[i] for i in ids[split][start:start + size[split]].tolist())
        except KeyError as error:
            raise DataError(f"{asked} has the id {error} in {split}.bin, which \"itos\" in meta.pkl ({len(itos)} ids) "
                            "lacks: they do not belong together; run its prepare.py again.") from error
        return Document(f"{place.name}#{split}.{start // size[split]}", text, place.name, split == "val")

    return (document(*part) for part in parts)


# --- the hub ---------------------------------------------------------------------------------------------------------
def _hub_rows(dataset):
    splits = _hub_splits(dataset)
    rows = splits["train"] if "train" in splits else next(iter(splits.values()))
    return lambda seed: iter(rows if seed is None else rows.shuffle(seed=seed, **SHARD_SHUFFLE))


def _hub_splits(dataset):
    name, _, configuration = dataset.partition(":")
    if not hub_reachable():
        go_offline()
    datasets = _datasets_library()
    try:
        if name in PARQUET_FILES:
            return datasets.load_dataset("parquet", data_files=PARQUET_FILES[name], streaming=True)
        return datasets.load_dataset(name, configuration or None, streaming=True)
    except Exception as error:
        bare = "" if "/" in name else f" No folder data/{name} was found here or up to three folders above."
        raise DataError(str(_unreadable(dataset, error)) + bare) from error


def _splits(dataset):
    """{split: its rows}: the splits of a hub data set; of a local one "test", the files with that word in their names,
    and "train", all others."""
    if dataset == "embedded":
        raise DataError("The embedded corpus is text without columns: name a file, a folder or a hub data set that has "
                        "them.")
    if (place := find(dataset)) is None:
        return _hub_splits(dataset)
    builder, files = _data_files(dataset, place)
    parts = {"train": [], "test": []}
    for file in files:
        words = re.split("[^a-z]+", file.relative_to(place).as_posix().lower())
        parts["test" if "test" in words else "train"].append(file)
    return {split: _stream(dataset, builder, chosen) for split, chosen in parts.items() if chosen}


@lru_cache(maxsize=1)
def hub_reachable(timeout: float = 4.0) -> bool:
    """Whether the model and data hub answers within `timeout` seconds: asked once a process; False in offline mode.

    In a thread, because the look-up of a host's name heeds no timeout."""
    from huggingface_hub import constants, is_offline_mode
    from huggingface_hub.utils import get_session
    answers = []

    def ask():
        try:
            answers.append(get_session().head(constants.ENDPOINT, timeout=timeout))
        except Exception:            # whatever the reason: no answer
            pass

    if not is_offline_mode():
        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(timeout)
    return bool(answers)


def go_offline() -> None:
    """From here on transformers, datasets and huggingface_hub look in their caches only: a look-up ends at once."""
    from huggingface_hub import constants
    os.environ["HF_HUB_OFFLINE"] = "1"                    # for processes that start later
    constants.HF_HUB_OFFLINE = True                       # read at each request, by transformers too
    if "datasets" in sys.modules:                         # has a copy of its own, made when it is imported
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True


def _datasets_library():
    """The module `datasets`, imported late (it is slow to import), without its progress bars and warnings."""
    import datasets
    import huggingface_hub
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)
    huggingface_hub.utils.logging.set_verbosity(logging.CRITICAL)
    return datasets


# ---------------------------------------------------------------------------------------------------------------------
# Labels of Python source
# ---------------------------------------------------------------------------------------------------------------------
# Label -> its classes. Syntax: token_type, what a character is part of; an f-string is string from end to end, a
# backslash that joins lines is whitespace. Context, which may have begun far above: all the others. A docstring
# includes its quotes, a call is from "(" to ")", a body from the colon before it to the end of its last line.
LABELS = {
    "token_type": ("whitespace", "comment", "string", "docstring", "keyword", "operator", "number", "name"),
    "docstring": ("outside", "inside"),
    "class": ("outside", "inside"),
    "function": ("outside", "inside"),
    "call": ("outside", "inside"),
}
# ERRORTOKEN: before Python 3.12 the letters that belong to names and are not in the re module's \w.
TOKEN_TYPES = {tokenize.COMMENT: "comment", tokenize.STRING: "string", tokenize.OP: "operator",
               tokenize.NUMBER: "number", tokenize.NAME: "name", tokenize.ERRORTOKEN: "name"}
# From Python 3.12 on f-strings are tokens too, from 3.14 on t-strings, which contain their expressions' tokens.
QUOTES_BEGIN = {getattr(tokenize, name, None) for name in ("FSTRING_START", "TSTRING_START")}
QUOTES_END = {getattr(tokenize, name, None) for name in ("FSTRING_END", "TSTRING_END")}
FORMATTED = (ast.JoinedStr, getattr(ast, "TemplateStr", ast.JoinedStr))


def char_labels(text: str) -> np.ndarray | None:
    """Class of each character for each of LABELS, [len(text), len(LABELS)] int8; None where the text is not Python.

    Expressions in f-strings count as text: before Python 3.12 their places are not known.
    """
    # The parser ends lines at \n, \r\n and \r, tokenize not at \r, str.splitlines at form feeds and others too.
    source = re.sub("\r\n?", "\n", text) + "\n"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")          # of invalid escapes
            labels = _source_labels(source, ast.parse(source))
    except Exception:            # a syntax error, a zero byte, a lone surrogate, too deep nesting, ...
        return None
    steps = np.ones(len(text), int)
    steps[[match.start() + 1 for match in re.finditer("\r\n", text)]] = 0         # \r\n is one character of source
    return labels[steps.cumsum() - 1]


def _source_labels(source, tree):
    lines = source.split("\n")
    begins = np.cumsum([0, 0] + [len(line) + 1 for line in lines]).tolist()        # where line n = 1, 2, ... begins
    labels = np.zeros((len(source), len(LABELS)), np.int8)
    types, docstring, in_class, in_function, call = labels.T
    type_ids = {name: i for i, name in enumerate(LABELS["token_type"])}
    colons, line_ends, parentheses, opened, quotes, quotes_start = [], [], {}, [], 0, 0
    for kind, string, (line, column), _, _ in tokenize.generate_tokens(io.StringIO(source).readline):
        start = begins[line] + column
        end = start + len(string)        # tokenize's own end is wrong after some strings in early versions of 3.12
        if kind in QUOTES_BEGIN:
            quotes_start = quotes_start if quotes else start
            quotes += 1
        elif kind in QUOTES_END:
            quotes -= 1
            types[quotes_start:end] = type_ids["string"]
        elif kind == tokenize.NEWLINE:
            line_ends.append(start)
        elif kind in TOKEN_TYPES and not quotes and not string.isspace():
            types[start:end] = type_ids["keyword" if keyword.iskeyword(string) else TOKEN_TYPES[kind]]
            if string == "(":
                opened.append(start)
            elif string == ")":
                parentheses[end] = opened.pop()
            elif string == ":":
                colons.append(end)

    def place(line, column):
        """The character at a line and a column in bytes, as ast counts."""
        return begins[line] + len(lines[line - 1].encode()[:column].decode())

    nodes = [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, FORMATTED):
            continue
        nodes.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Call):
            end = place(node.end_lineno, node.end_col_offset)
            call[parentheses[end]:end] = 1
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = (getattr(node.body[0], "decorator_list", None) or node.body)[0]
            start = colons[bisect_right(colons, place(first.lineno, first.col_offset)) - 1]
            end = line_ends[bisect_left(line_ends, place(node.end_lineno, node.end_col_offset))]
            (in_class if isinstance(node, ast.ClassDef) else in_function)[start:end] = 1
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) \
                and ast.get_docstring(node, clean=False) is not None:
            found = node.body[0].value
            start, end = place(found.lineno, found.col_offset), place(found.end_lineno, found.end_col_offset)
            docstring[start:end] = 1
    types[(docstring == 1) & (types == type_ids["string"])] = type_ids["docstring"]
    return labels


def _first_character(text, start, end):
    """Where in the text the token at [start, end) has the character that its labels are those of.

    Some tokenizers leave spaces out of a token's place: then that of spaces alone is empty and lies after them."""
    if start == end and text[max(0, start - 1):start].isspace():
        start -= 1
    blank = end - start - len(text[start:end].lstrip())
    return min(start + blank if start + blank < end else start, len(text) - 1)


# ---------------------------------------------------------------------------------------------------------------------
# Windows of tokens
# ---------------------------------------------------------------------------------------------------------------------
class Windows(NamedTuple):
    """Windows of tokens, training ones first: BOS, tokens of one document, padding."""
    tokens: np.ndarray      # [n, context_length] int32
    lengths: np.ndarray     # [n] tokens before the padding
    doc_ids: np.ndarray     # [n] document of each window
    n_train: int            # windows from here on are held out
    names: list             # document -> its name
    domains: list           # document -> its domain
    # [n - n_train, context_length, len(LABELS)] int8 classes of held-out tokens; -1 unknown (BOS, padding, not Python)
    labels: np.ndarray | None = None

    def valid(self, ids):
        """[len(ids), context_length] True at tokens that count: not the first, not padding."""
        position = np.arange(self.tokens.shape[1])
        return (position > 0) & (position < self.lengths[ids][:, None])

    def heldout(self):
        """Ids of the held-out windows."""
        return np.arange(self.n_train, len(self.tokens))

    def heldout_tokens(self):
        """Places of the held-out tokens that count, in [n - n_train, context_length - 1] counted row by row."""
        return np.flatnonzero(self.valid(self.heldout())[:, 1:])

    def domain_of(self, ids):
        """Names of the domains of windows, [len(ids)]."""
        return np.asarray(self.domains)[self.doc_ids[ids]]

    def fewer(self, n):
        """With the last n training windows alone."""
        first = max(0, self.n_train - n)
        return self._replace(tokens=self.tokens[first:], lengths=self.lengths[first:], doc_ids=self.doc_ids[first:],
                             n_train=self.n_train - first)

    def train_pool(self, which, forget):
        """Ids of the training windows of the domain `forget`, of the rest ("retain"), or of "both"."""
        ids = np.arange(self.n_train)
        of_forget = self.domain_of(ids) == forget
        pool = {"both": ids, "forget": ids[of_forget], "retain": ids[~of_forget]}[which]
        if which != "both" and not (of_forget.any() and len(pool)):
            raise DataError(f"TRAIN_ON = {which!r}, FORGET = {forget!r}: of it there are {of_forget.sum()} training "
                            f"windows of {len(ids)}. The domains are {', '.join(sorted(set(self.domains)))[:300]}.")
        return pool

    def full(self):
        """Held-out windows without padding, counted from the first held-out one."""
        rows = np.flatnonzero(self.lengths[self.n_train:] == self.tokens.shape[1])
        if len(rows) < 2:
            raise DataError(f"too few held-out documents fill CONTEXT_LENGTH = {self.tokens.shape[1]}.")
        return rows

    def by_document(self, values, docs):
        """Mean of values [n] over each of the sample's documents [sample]; NaN where there are none."""
        of = (values[docs == doc] for doc in self.doc_ids[self.sample()])
        return np.array([part.mean(dtype=float) if len(part) else np.nan for part in of])

    def sample(self):
        """The first held-out window of each held-out file: the per-sequence sample."""
        return self.n_train + np.unique(self.doc_ids[self.n_train:], return_index=True)[1]


def batch_ids(seed, step, n_windows, size):
    """Windows of one training step: a slice of a permutation per (seed, epoch)."""
    epoch, place = divmod(step, n_windows // size)
    return _epoch_order(seed, epoch, n_windows)[place * size:(place + 1) * size]


@lru_cache(maxsize=2)
def _epoch_order(seed, epoch, n_windows):
    return np.random.default_rng((seed, epoch)).permutation(n_windows)


class Wanted(NamedTuple):
    """How much of a data set is taken, and how it is cut."""
    context_length: int     # tokens in a window, BOS included
    train_tokens: int       # distinct training tokens, at least
    eval_files: int         # held-out documents, where there are as many
    train_windows_per_file: int
    eval_windows_per_file: int
    min_window: int         # a document's tail shorter than this is left out
    seed: int               # order of documents, choice of windows
    forget: str = ""        # a domain of the data set, or a second data set; "": neither


def make_windows(dataset: str, tokenizer, bos: int, wanted: Wanted) -> Windows:
    """Windows, a random choice from each document, of the first documents that give what is wanted.

    Where `wanted.forget` names no domain of the data set, it names a second one: its documents alternate one for one
    with the first one's until either ends, its name is their domain, and what is wanted holds for both together.

    Raises DataError where the data set runs dry.
    """
    rng, body = np.random.default_rng(wanted.seed), wanted.context_length - 1
    most = wanted.train_windows_per_file, wanted.eval_windows_per_file
    rows, seen, names, domains = ([], []), [0, 0], [], []           # seen: training tokens, held-out files
    labels = []                                                     # of each held-out document's windows
    enough = wanted.train_tokens, wanted.eval_files
    for document in _with_forget(dataset, wanted):
        split = int(document.heldout)
        if seen[0] >= enough[0] and seen[1] >= enough[1]:
            break
        if seen[split] >= enough[split]:
            continue
        labelled = document.heldout and getattr(tokenizer, "is_fast", False)
        options = {"return_offsets_mapping": True} if labelled else {}
        encoded = tokenizer(document.text, add_special_tokens=False, **options)
        kept = [i != bos for i in encoded["input_ids"]]          # a document may spell the token out
        ids = list(compress(encoded["input_ids"], kept))
        starts = [i for i in range(0, len(ids), body) if len(ids) - i >= min(body, wanted.min_window)]
        chosen = [starts[c] for c in sorted(rng.permutation(len(starts))[:most[split]])]
        found = [[bos] + ids[start:start + body] for start in chosen]
        seen[split] += bool(found) if split else sum(len(window) - 1 for window in found)
        rows[split].extend((np.array(window, np.int32), len(names)) for window in found)
        if split:
            labels.append(np.full((len(found), wanted.context_length, len(LABELS)), -1, dtype=np.int8))
            of_characters = char_labels(document.text) if labelled and found else None
            if of_characters is not None:
                spans = list(compress(encoded["offset_mapping"], kept))
                for row, start in zip(labels[-1], chosen):
                    places = [_first_character(document.text, *span) for span in spans[start:start + body]]
                    row[1:1 + len(places)] = of_characters[places]
        names.append(document.name)
        domains.append(document.domain)
    if seen[0] < wanted.train_tokens or seen[1] < 2:
        second = f" and {wanted.forget!r}" if wanted.forget else ""
        raise DataError(f"DATASET = {dataset!r}{second} ran dry: {len(names):,} documents gave {seen[0]:,} training "
                        f"tokens and {seen[1]} held-out documents (1 in {HELDOUT_ONE_IN}); TRAIN_TOKENS = "
                        f"{wanted.train_tokens:,} and 2 are needed. Lower it or take a larger data set.")
    windows, doc_ids = zip(*rows[0], *rows[1])
    tokens = np.full((len(windows), wanted.context_length), bos, dtype=np.int32)
    for i, window in enumerate(windows):
        tokens[i, :len(window)] = window
    lengths = np.array([len(window) for window in windows])
    return Windows(tokens, lengths, np.array(doc_ids), len(rows[0]), names, domains, np.concatenate(labels))


def _with_forget(dataset, wanted):
    documents, forget = load_documents(dataset, wanted.seed), wanted.forget
    if not forget:
        return documents
    head = list(islice(documents, 1_000))                  # in random order: a domain that matters is among them
    known, documents = {document.domain for document in head}, chain(head, documents)
    if forget in known or dataset == "embedded" and forget in DOMAINS:
        return documents
    try:
        second = load_documents(forget, wanted.seed)
    except DataError as error:
        raise DataError(f"{forget!r} is no domain of DATASET = {dataset!r}, which has {', '.join(sorted(known)[:20])}; "
                        f"as a data set: {error}") from error
    return chain.from_iterable(zip(documents, (document._replace(domain=forget) for document in second)))


def beginning(tokenizer):
    """The id that begins every window: beginning of sequence; where there is none end of sequence, or 0."""
    return next(mark for mark in (tokenizer.bos_token_id, tokenizer.eos_token_id, 0) if mark is not None)


def _identity(tokenizer):
    return tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer.name_or_path


def load_windows(dataset: str, tokenizer, wanted: Wanted, folder: Path) -> tuple[Windows, str]:
    """The windows, from the cache `folder` where they are there, and the key of what made them.

    Raises DataError where there is no tokenizer to speak of."""
    if not tokenizer("text", add_special_tokens=False)["input_ids"]:
        raise DataError(f"{tokenizer.name_or_path} has no tokenizer (tokenizer.json).")
    bos = beginning(tokenizer)
    if dataset == "embedded" and wanted.forget in DOMAINS:
        wanted = wanted._replace(forget="")                # its documents are there as they are
    identities = [data_identity(dataset)]
    with suppress(DataError):                              # a domain's name need not be a data set's
        identities += [data_identity(wanted.forget)] if wanted.forget else []
    key = fingerprint(identities, _identity(tokenizer), bos, wanted, Path(__file__).read_text())
    with RANKS.first():
        return _kept_windows(folder / f"{key}.npz", dataset, lambda: make_windows(dataset, tokenizer, bos, wanted)), key


def probing_windows(dataset, tokenizer, sizes, context_length, folder):
    """The texts of `probing_examples`, sizes = (n_train, n_test) of each class, as windows: the first context_length - 1
    tokens of each; domains are the classes; and the key of what made them."""
    texts = dataset if dataset in PROBING_DATASETS else data_identity(dataset)
    key = fingerprint("probing", texts, sizes, context_length, _identity(tokenizer), Path(__file__).read_text())

    def make():
        examples, bos = probing_examples(dataset, *sizes), beginning(tokenizer)
        order = np.argsort(~examples.train, kind="stable")
        rows = [[bos, *ids[:context_length - 1]] for ids in tokenizer(
            [examples.texts[i] for i in order], add_special_tokens=False)["input_ids"]]
        tokens = np.full((len(rows), context_length), bos, dtype=np.int32)
        for row, ids in zip(tokens, rows):
            row[:len(ids)] = ids
        classes = [examples.names[examples.labels[i]] for i in order]
        return Windows(tokens, np.array([len(ids) for ids in rows]), np.arange(len(rows)), int(examples.train.sum()),
                       [f"{dataset}#{i}" for i in order], classes)

    return _kept_windows(folder / f"{key}.npz", dataset, make), key


def _kept_windows(path, dataset, make):
    if not (windows := read_windows(path)):
        print(f"tokenising {dataset}", flush=True)
        windows = make()
        with replacing(path) as partial, open(partial, "wb") as file:
            np.savez(file, **{name: value for name, value in windows._asdict().items() if value is not None})
    return windows


def read_windows(path: Path) -> Windows | None:
    """Windows saved with np.savez; None where there are none, or damaged ones."""
    if not (zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip() is None):
        return None
    with np.load(path) as file:
        windows = Windows(**{name: file[name] for name in file.files})
    return windows._replace(n_train=int(windows.n_train))


# ---------------------------------------------------------------------------------------------------------------------
# What windows tell by themselves
# ---------------------------------------------------------------------------------------------------------------------
def stand_in_windows(context_length, forget, n=16):
    """Windows of 256 random tokens, two of a document, half of them held out, every other pair of the domain `forget`;
    one is padded."""
    tokens = np.random.default_rng(0).integers(1, 256, (n, context_length)).astype(np.int32)
    lengths = np.full(n, context_length)
    lengths[3] //= 2
    names = [str(i) for i in range(n // 2)]
    domains = [forget if i % 4 < 2 else "other" for i in range(n // 2)]
    return Windows(tokens, lengths, np.arange(n) // 2, n // 2, names, domains)


def unigram_losses(windows, vocabulary):
    """Cross-entropy of the sample's tokens from the third on, [sample, context_length - 2], under the training tokens'
    frequencies, one added to each count; NaN at padding."""
    train, sample = np.arange(windows.n_train), windows.sample()
    counts = np.bincount(windows.tokens[train][windows.valid(train)], minlength=vocabulary) + 1.0
    losses = -np.log(counts / counts.sum())[windows.tokens[sample][:, 2:]]
    return np.where(windows.valid(sample)[:, 2:], losses, np.nan)


def bigram_error(windows, activations, n_tokens=2 ** 18):
    """Mean squared error on held-out tokens of a lookup by (previous token, token) fitted on the first training tokens:
    a pair's mean, shrunk by one pseudo-count to its token's, and that to 0. activations(ids) are those of windows,
    [len(ids), context_length - 1, d]."""
    vocabulary = int(windows.tokens.max()) + 1

    def rows(ids):          # token and pair of each valid token, and its activation
        keep, tokens = windows.valid(ids)[:, 1:], windows.tokens[ids].astype(np.int64)
        return tokens[:, 1:][keep], (tokens[:, :-1] * vocabulary + tokens[:, 1:])[keep], activations(ids)[keep]

    def shrunk_means(index, x, prior):
        members = csr_array((np.ones(len(index), x.dtype), (index, np.arange(len(index)))), (len(prior), len(index)))
        return (members @ x + prior) / (np.bincount(index, minlength=len(prior))[:, None] + 1)

    tokens, pairs, x = rows(np.arange(min(windows.n_train, n_tokens // windows.tokens.shape[1])))
    of_token = shrunk_means(tokens, x, np.zeros((vocabulary, x.shape[1]), x.dtype))
    known, index = np.unique(pairs, return_inverse=True)
    of_pair, errors = shrunk_means(index, x, of_token[known % vocabulary]), []
    for ids in np.array_split(windows.heldout(), len(windows.heldout()) // 64 + 1):
        tokens, pairs, x = rows(ids)
        at = np.searchsorted(known, pairs).clip(max=len(known) - 1)
        guess = np.where((known[at] == pairs)[:, None], of_pair[at], of_token[tokens])
        errors.append(np.square(x - guess).sum(1))
    return np.concatenate(errors).mean(dtype=float)


def moments(parts):
    """Of activations x [n, seq, d_in] with keep [n, seq], in parts, by position: sum of x [seq, d_in], of |x|^2 [seq],
    and tokens [seq]."""
    PATIENCE.renew()
    sums = [[part.sum(0) for part in (x * keep[..., None], (x ** 2).sum(-1) * keep, keep)] for x, keep in parts]
    return map(sum, zip(*sums))


def variances(sums, squares, n):
    """Of `moments`: the variance about the overall mean by position [seq], and overall."""
    mean = sums.sum(0) / n.sum()
    total = squares - 2 * (sums @ mean) + n * mean.square().sum()
    return (total / n.clamp_min(1)).tolist(), (total.sum() / n.sum()).item()


def token_classes(windows):
    """A class for each held-out token but BOS, [window * (context_length - 1) + position - 1]: its labels taken
    together; without labels, the token where it is one of the 255 most frequent."""
    tokens = windows.tokens[windows.n_train:, 1:].ravel()
    if windows.labels is not None and (windows.labels >= 0).any():
        labels = windows.labels[:, 1:].reshape(len(tokens), -1)
        return np.unique(labels, axis=0, return_inverse=True)[1].ravel()
    rank = np.argsort(np.argsort(-np.bincount(tokens), kind="stable"))
    return np.minimum(rank[tokens], 255)


def entropy(values):
    """Miller-Madow entropy in nats of a sample."""
    share = np.unique(values, return_counts=True)[1] / len(values)
    return -(share * np.log(share)).sum() + (len(share) - 1) / (2 * len(values))


def polysemanticity(fired, kinds, places, rng, draws=50, n=64):
    """Mean over units of the smaller of the entropies of token and of class at n firings, each over that at random
    `places`. fired: token indices of each unit; kinds: [token] arrays."""
    null = [np.mean([entropy(kind[rng.choice(places, n)]) for _ in range(draws)]) for kind in kinds]
    samples = [rng.choice(unit, n, replace=False) for unit in fired if len(unit) >= n]
    ratios = [min(entropy(kind[at]) / base for kind, base in zip(kinds, null)) for at in samples]
    return np.mean(ratios) if ratios else 1.0


def channel_firings(x, keep, rate):
    """Of channels x [window, seq, d] the tokens, a share `rate` of all, where each is largest, then smallest."""
    x = x.masked_fill(~keep[..., None], 0.0).flatten(0, 1)
    top = torch.cat([x, -x], 1).topk(max(1, int(rate * len(x))), dim=0, sorted=False).indices
    return list(top.t().cpu().numpy())


def evolution(z, tokens, stable, alive, n=16):
    """The latents with the most stable energy in one window, over its tokens; z [seq, d_sae]."""
    top = alive[np.argsort(-np.square(z[:, alive]).sum(0) * np.maximum(stable, 1e-6))[:n]]
    return {"tokens": tokens, "latents": top, "values": z[:, top].T.round(4)}


def repetition(texts):
    """Of each of {name: tokens [n, seq]}, flat: mean share of a row's pairs of neighbours that came before in it; mean
    entropy of a row in nats."""
    found = {}
    for name, rows in texts.items():
        rows = rows.tolist()
        found |= {f"{name}_repetition": 1 - np.mean([len(set(zip(row, row[1:]))) / (len(row) - 1) for row in rows]),
                  f"{name}_entropy": np.mean([entropy(row) for row in rows])}
    return found


def firings(z, latents):
    """The tokens on which each of `latents` fires, in order, and its values there; z sparse [token, d_sae] by column."""
    return [(z.indices[a:b], z.data[a:b]) for a, b in zip(z.indptr[latents], z.indptr[latents + 1])]


def percentiles_95(z, latents=None):
    """Of the values where each of `latents`, or each, fires; 1 where it never does; z as in `firings`."""
    latents = np.arange(z.shape[1]) if latents is None else latents
    return np.array([np.quantile(values, 0.95) if len(values) else 1.0 for _, values in firings(z, latents)],
                    dtype=np.float32)


def heldout_files(windows):
    """Document of each held-out token that counts."""
    return windows.doc_ids[windows.n_train + windows.heldout_tokens() // (windows.tokens.shape[1] - 1)]


def live_latents(z, windows, least, least_files):
    """Of codes of the held-out tokens, sparse [token, d_sae] by column: [d_sae] whether each latent fired at least `least`
    times, in `least_files` files, on at most half the tokens; and its firing rate."""
    activity = Activity.of(z, windows.heldout_tokens())
    live, rate = activity.live(heldout_files(windows), least, least_files), activity.rates()
    if not live.any():
        raise DataError(f"no latent of {len(live)} is live: fired {least} times in {least_files} held-out files "
                        f"(L0 = {z.nnz / z.shape[0]:.2f}).")
    return live, rate


def ranked_latents(z, forget, rule, most, n):
    """All latents in order, and which to clamp: "forget", the first n that may be, and "random_latents", those next to them
    in firing rate; of codes sparse [token, d_sae], the tokens forget [token] to be forgotten. By "ratio", E[z^2] there over
    elsewhere (arXiv 2504.08192), or by "frequency" there, among those active on less than a share `most` of the tokens
    elsewhere (SAEBench)."""
    size = z.power(2) if rule == "ratio" else z > 0
    there, elsewhere = (np.asarray(size[part].mean(0)).ravel() for part in (forget, ~forget))
    score = there / (elsewhere + 0.01 * there.mean()) if rule == "ratio" else there * (elsewhere < most)
    ranked, n = np.argsort(-score), min(n, (score > 0).sum())
    if not 0 < n < len(score):
        raise DataError(f"CLAMPED: {n} of {len(score)} latents may be clamped, it takes one and leaves one.")
    return ranked, {"forget": ranked[:n], "random_latents": alike((z > 0).mean(0), ranked[:n])}


def single_token_fraction(windows, firings, most=40):
    """Share of units of which 90 % of the strongest firings are one token; of each unit the places of held-out tokens where
    it fires [n], and its values there [n]."""
    tokens = windows.tokens[windows.n_train:, 1:].ravel()
    strongest = [tokens[at[np.argsort(-values, kind="stable")[:most]]] for at, values in firings]
    return np.mean([np.bincount(top).max() >= 0.9 * len(top) for top in strongest])


def positions_apart(active, rate, lags):
    """active by latent [d, window, seq]; weights of pairs of positions so far apart [seq, seq], 1 in
    all; mean product of two positions if permuted [d, window]; variance [d, 1]."""
    a, seq = active.permute(2, 0, 1).float(), active.shape[1]
    band = torch.ones(seq, seq, device=active.device).triu(lags[0]).tril(lags[1])
    shuffled = (a.sum(2) ** 2 - a.square().sum(2)) / (seq * (seq - 1))
    return a, band / band.sum().clamp_min(1), shuffled, (rate * (1 - rate)).clamp_min(1e-9)[:, None]


def stability(active, rate, lags):
    """Autocorrelation of each latent's activity over that of permuted positions, mean over lags:
    [window, d].

    active [window, seq, d] is 0 or 1, or the probability of firing; rate [d] its mean."""
    a, band, shuffled, variance = positions_apart(active, rate, lags)
    return ((((a @ band) * a).sum(2) - shuffled) / variance).t()


def stability_null(active, rate, lags, draws):
    """The mean stability under random permutations of positions, shared by 64 windows each
    [draws, d]; autocorrelation by lag [lag, d]."""
    a, band, shuffled, variance = positions_apart(active, rate, lags)
    n, seq, d = active.shape
    null, both = a.new_zeros(d, draws), a.new_zeros(d, seq, seq)
    for part in a.split(64, 1):
        sums, order = part.transpose(1, 2) @ part, torch.rand(draws, seq, device=active.device).argsort(1)
        null += sums.flatten(1) @ band[order[:, :, None], order[:, None]].flatten(1).t()
        both += sums
    null = (null / n - shuffled.mean(1, keepdim=True)) / variance
    r = torch.stack([both.diagonal(l, 1, 2).mean(1) / n for l in range(1, min(33, seq))])
    return null.t(), (r - rate ** 2) / variance[:, 0]


def smoothness(z, x, scale):
    """max_t |z_t+1 - z_t| / scale / |x_t+1 - x_t|, summed over latents: [window]."""
    change = x.diff(dim=1).norm(dim=-1, keepdim=True).clamp_min(1e-9)
    return torch.cat([((a.diff(dim=1).abs() / c).amax(1) / scale).sum(1)
                      for a, c in zip(z.split(64), change.split(64))])


def fire_given_token(active, tokens, fold):
    """P(fire | token), as counted in the windows of the other fold [window], with one more firing at the mean rate: [window,
    seq, d]; active sparse [window * seq, d], tokens [window, seq]."""
    known, index = np.unique(tokens, return_inverse=True)
    index, fold, rate = index.ravel(), np.repeat(fold, tokens.shape[1]), active.mean(0)
    is_token = csr_array((np.ones(len(index)), index, np.arange(len(index) + 1)), (len(index), len(known)))
    active, expected = active.tocsr(), np.empty(active.shape, dtype=np.float32)
    for held in (fold, ~fold):
        seen = np.bincount(index[~held], minlength=len(known))[:, None] + 1
        expected[held] = (((is_token[~held].T @ active[~held]).toarray() + rate) / seen)[index[held]]
    return expected.reshape(*tokens.shape, -1)


def similarity_matrix(codes, seq):
    """Mean over windows of the cosine of a window's codes at t and s, minus that between different windows: [seq, seq];
    codes sparse [window * seq, d]."""
    unit = normalize(codes)
    windows = [unit[start:start + seq] for start in range(0, unit.shape[0], seq)]
    same = sum((window @ window.T).toarray() for window in windows)
    total, n = sum(windows), len(windows)
    return same / n - ((total @ total.T).toarray() - same) / (n * (n - 1))


def convergence(log):
    """What a training log says of the parameters it follows: the last value of each, and the first step after which it
    stays within 5 % of that; and of the consistency gap, at the end and before the last stage, with the alarm where it
    fell."""
    found = {}
    for name in log["parameters"]:
        steps, values = recorded(log, "parameters", name)
        final = values[-1]
        off = np.flatnonzero(np.abs(np.array(values) - final) > 0.05 * max(abs(final), 1e-3))
        found |= {f"{name}_final": final, f"{name}_converged_at": steps[off.max(initial=-1) + 1]}
    if "consistency_gap" in log["losses"]:
        steps, gaps = recorded(log, "losses", "consistency_gap")
        before = gaps[max(np.searchsorted(steps, log["stage_starts"][-1], "right") - 1, 0)]
        found |= {"consistency_gap": gaps[-1], "consistency_gap_before": before, "collapse_alarm": float(gaps[-1] < before)}
    return found


def recorded(log, table, name):
    """Steps and values of a row of a training log's table, where it has one."""
    return zip(*((step, value) for step, value in zip(log["step"], log[table][name]) if value is not None))


def sensitivities(sae, loss):
    """The slope of loss() in each scalar parameter, by a central difference of 10 % of it."""
    found = {}
    for name, p in sae.named_parameters():
        if p.numel() == 1:
            at, d, losses = p.data.clone(), 0.1 * max(abs(p.item()), 0.1), []
            for value in (at + d, at - d):
                p.data.copy_(value)
                losses.append(loss())
            p.data.copy_(at)
            found[f"{name}_sensitivity"] = (losses[0] - losses[1]) / (2 * d)
    return found


def decay_slope(variance, decay):
    """Of the regression of log(-log decay) on log variance [latent]: slope and r^2; nothing where the variance is one."""
    x, y = (part.double().cpu().numpy() for part in (variance, decay))
    x, y = np.log(x), np.log(-np.log(y.clip(1e-30, 1 - 1e-7)))
    if x.std() == 0:
        return {}
    fit = linregress(x, np.broadcast_to(y, x.shape))
    return {"decay_slope": fit.slope, "decay_r2": fit.rvalue ** 2}


def coherence(fired, classes, files, rate, rng, n_firings=50, group=100):
    """How often a latent is recognised among `group` of like rate by the classes it fires on, from positions 1-32 to 64
    on of other files; over the same from 1-32 to 1-32; each above chance.

    fired: token indices [n] of each latent; classes: of each token; files: of each held-out window."""
    roles, seq = [], len(classes) // len(files)
    for at in (fired[i] for i in np.argsort(rate, kind="stable")):
        window, position = np.divmod(at, seq)
        early, other = position < 32, files[window] % 2 == 1
        blocks = [at[early & ~other], at[early & other], at[(position >= 63) & other]]
        if min(map(len, blocks)) >= n_firings:
            drawn = (rng.choice(block, n_firings, replace=False) for block in blocks)
            roles.append([np.bincount(classes[of], minlength=classes.max() + 1) for of in drawn])
    n, hits = min(group, len(roles)), np.zeros(2)
    if n < 10:
        return None
    for low in range(0, len(roles) - n + 1, n):
        first, *blocks = np.array(roles[low:low + n]).swapaxes(0, 1)
        hits += [(cdist(block, first, "jensenshannon").argmin(1) == np.arange(n)).sum() for block in blocks]
    same, later = hits - len(roles) // n  # above chance
    return later / same if same >= 1 else None


def significant_fraction(values, null):
    """Share of values [n] above their null draws [n, draws], taken as normal, at a false discovery rate of .05."""
    p = norm.sf((values - null.mean(1)) / np.maximum(null.std(1, ddof=1), 1e-12))
    return (false_discovery_control(p) < 0.05).mean()


def mean_by_decile(values, rate):
    """Mean of values [n] within each decile of rate [n]; 0 where one is empty."""
    decile = np.digitize(rate, np.quantile(rate, np.arange(0.1, 1, 0.1)))
    return np.bincount(decile, values, 10) / np.maximum(np.bincount(decile, minlength=10), 1)


def mean_difference(x, keep, forget):
    """Of x [n, seq, d]: the mean of tokens `keep` that are not to be forgotten [d], and the direction from it to the mean of
    those that are [d], of length 1; keep, forget [n, seq] of bool."""
    rest = x[keep & ~forget].mean(0)
    return rest, F.normalize(x[keep & forget].mean(0) - rest, dim=0)


def alike(rate, chosen):
    """The units that are next to the chosen ones in rate [n], without them and without repeats."""
    others = np.setdiff1d(np.argsort(rate, kind="stable"), chosen, assume_unique=True)
    return np.unique(others[np.searchsorted(rate[others], rate[chosen]).clip(max=len(others) - 1)])


def probe_tasks(windows, every, n_documents=20):
    """{name: (places [n] as token_classes counts held-out tokens, whether each is in the first of two folds [n], its
    class [n])}: LABELS, where the tokens have them, and the domain, of every `every`-th token, the folds apart by file;
    and the document, of all tokens of the first `n_documents` with most windows, the folds apart by window. What has one
    class in a fold is left out."""
    context, docs = windows.tokens.shape[1] - 1, windows.doc_ids[windows.n_train:]
    all_places = windows.heldout_tokens()
    places, found = all_places[::every], {}
    if windows.labels is not None:
        classes = windows.labels[:, 1:].reshape(-1, len(LABELS))
        known = places[(classes[places] >= 0).all(1)]
        if len(known) > len(places) / 2:
            places, found = known, dict(zip(LABELS, classes[known].T))
    of = docs[places // context]
    found["domain"] = np.unique(np.asarray(windows.domains)[of], return_inverse=True)[1]
    found = {name: (places, of % 2 == 0, classes) for name, classes in found.items()}
    names, first, counts = np.unique(docs, return_index=True, return_counts=True)
    chosen = names[counts == counts.max()][:n_documents]
    places = all_places[np.isin(docs[all_places // context], chosen)]
    of, window = docs[places // context], places // context
    found["document"] = places, (window - first[np.searchsorted(names, of)]) % 2 == 0, np.searchsorted(chosen, of)
    return {name: task for name, task in found.items()
            if min(len(np.unique(task[2][part])) for part in (task[1], ~task[1])) > 1}


def bags_of_tokens(windows, rows, positions, last):
    """Counts of the token at each position [n] of the windows rows [n] and of the last - 1 before it, sparse
    [n, vocabulary]."""
    back = np.maximum(positions[:, None] - np.arange(last), 0)
    tokens, shape = windows.tokens[rows[:, None], back], (len(rows), int(windows.tokens.max()) + 1)
    return csr_array((np.ones(tokens.size), tokens.ravel(), np.arange(len(rows) + 1) * last), shape)


def probe(features, labels, fold):
    """Labels as logistic regressions predict them, fitted on the other fold of files."""
    predicted = np.empty_like(labels)
    for held in (fold, ~fold):
        model = LogisticRegression(max_iter=200, class_weight="balanced")
        predicted[held] = model.fit(features[~held], labels[~held]).predict(features[held])
    return predicted


def probe_baselines(windows, every, folder):
    """Of each of probe_tasks: balanced accuracy from the token alone, and from a bag of the last 8: {label: [2]}; kept
    in the folder, which is of these windows alone."""
    def compute():
        found = {}
        for name, (places, fold, of) in probe_tasks(windows, every).items():
            row, at = np.divmod(places, windows.tokens.shape[1] - 1)
            bags = [bags_of_tokens(windows, row + windows.n_train, at + 1, n) for n in (1, 8)]
            found[name] = [balanced_accuracy_score(of, probe(bag, of, fold)) for bag in bags]
        return found

    return kept(folder / f"probe_baselines-{every}.json", compute)


def probe_scores(windows, features, every, folder):
    """Of each of probe_tasks, from features [token, d], scaled by their largest values: balanced accuracy of `probe` beside
    probe_baselines, and the share of a document's labels that it predicts [sample]; and their mean over all but token_type."""
    metrics, right, docs = {}, {}, windows.doc_ids[windows.n_train:]
    base, seq = probe_baselines(windows, every, folder), windows.tokens.shape[1] - 1
    for name, (places, fold, of) in probe_tasks(windows, every).items():
        predicted = probe(MaxAbsScaler().fit_transform(features[places]), of, fold)
        metrics[f"probe_{name}"] = balanced_accuracy_score(of, predicted)
        metrics[f"probe_{name}_token"], metrics[f"probe_{name}_bag"] = base[name]
        right[f"probe_{name}"] = windows.by_document(predicted == of, docs[places // seq])
    if context := [name for name in right if name != "probe_token_type"]:
        metrics["probe_context"] = np.mean([metrics[name] for name in context])
        right["probe_context"] = np.nanmean([right[name] for name in context], 0)
    return metrics, right


class UnlearningPlan(NamedTuple):
    """Windows to unlearn a domain with, spread over the files. Groups are "forget", "neighbours" (the domains nearest
    to it in vocabulary) and "retain" (the others)."""
    dev: np.ndarray         # ids of training windows
    dev_group: np.ndarray   # group of each
    test: np.ndarray        # ids of held-out windows
    group: np.ndarray       # group of each
    clozes: "Clozes"        # of the test windows
    cloze_group: np.ndarray     # group of each
    folder: Path | None = None  # keeps what no SAE changes

    def kept(self, what, compute):
        if self.folder is None:
            return compute()
        which = (self.dev, self.dev_group, self.test, self.group, self.clozes.options)
        key = fingerprint(what, *(part.tolist() for part in which))
        return kept(self.folder / f"unlearning-{key}.json", compute)

    def means(self, losses, right, before=None):
        """By group: mean of losses [test windows], if any, share of the clozes that are right [clozes]; where those that were right
        before are given, the p of McNemar's test between the two."""
        found = {} if losses is None else {str(g): losses[self.group == g].mean() for g in np.unique(self.group)}
        for name in np.unique(self.cloze_group):
            now = right[self.cloze_group == name]
            found[f"cloze_{name}"] = now.mean()
            if before is not None:
                found[f"cloze_{name}_p"] = mcnemar(now, before[self.cloze_group == name])
        return found

    def by_document(self, windows, losses):
        """By group: mean of losses [test windows] over each document of the sample."""
        docs = windows.doc_ids[self.test]
        return {str(name): windows.by_document(losses[self.group == name], docs[self.group == name])
                for name in np.unique(self.group)}

    def frontier(self, windows, forgetting, strategies, controls, edit, results):
        """What strategies and controls cost the test windows, at the strengths that cost every fifth dev window of "forget"
        `forgetting` nats, and strategies at a quarter of it to four times: {name: edit}, metrics, {name: its rows}, by
        document of the sample.

        edit(strategy, strength) -> an edit; results(edit, ids) -> as Clozes.scores takes them."""
        def scores(*of):
            return self.clozes.scores(results(*of))

        def measured(name, factors):
            strength = strength_for(lambda s: scores(edit(name, s), search)[0].mean() - own_search, forgetting)
            return strength, [[part.tolist() for part in scores(edit(name, strength * factor), self.test)]
                              for factor in factors]

        edits, rows, lost = {"unclamped": edit("projection", 0.0)}, {}, {}        # which leaves all as it is
        search = self.dev[self.dev_group == "forget"][::5]
        own, own_right, own_search = map(np.array, self.kept("own", lambda: [part.tolist() for part in (
            *scores(edits["unclamped"], self.test), scores(edits["unclamped"], search)[0].mean())]))
        metrics = self.means(None, own_right)
        for name in strategies + controls:
            factors = (1, 0.25, 0.5, 2, 4) if name in strategies else (1,)
            compute = partial(measured, name, factors)
            strength, found = self.kept((name, forgetting), compute) if name == "projection" else compute()  # it has no latents
            edits[name], rows[name] = edit(name, strength), []
            for factor, (loss, right) in zip(factors, (map(np.array, of) for of in found)):
                rows[name].append({"strength": strength * factor} | self.means(loss - own, right, own_right))
                if factor == 1:
                    lost |= {f"{name}_{g}": values for g, values in self.by_document(windows, loss - own).items()}
            metrics |= {f"{name}_{key}": value for key, value in rows[name][0].items()}
        return edits, metrics, rows, lost

    def padded_losses(self, windows, strategies, edits, logits, config):
        """What strategies add to the loss of full windows of "forget" behind 0, 32 and 64 tokens of "retain", as far as the
        model takes so many; logits(edit, tokens [n, seq], mask [n, seq]) -> [n, seq, vocabulary]."""
        (full, others), n = self.full(windows), windows.tokens.shape[1] - 2
        longest, found = getattr(config, "max_position_embeddings", None) or math.inf, {}
        for pad in (pad for pad in (0, 32, 64) if n + 2 + pad <= longest):
            tokens = behind(windows, full, others, pad)
            loss = {name: last_loss(logits(edits[name], tokens, np.ones(tokens.shape, bool)), tokens, n)
                    for name in ("unclamped", *strategies)}
            found |= {f"{name}_padded_{pad}": loss[name] - loss["unclamped"] for name in strategies}
        return found

    def question_scores(self, datasets, tokenizer, edits, logits):
        """`compared` answers of the model under each of edits {name: edit} to the data sets {kind: its name or None}, flat;
        logits(edit, tokens, mask)."""
        found = {}
        for kind, dataset in datasets.items():
            if dataset:
                answers = {name: partial(right_answers, dataset, tokenizer, partial(logits, edit))
                           for name, edit in edits.items()}
                own = self.kept(("questions", data_identity(dataset)), lambda: answers["unclamped"]().tolist())
                answers["unclamped"] = partial(np.array, own)
                found |= compared({name: right() for name, right in answers.items()}, f"_{kind}_questions")
        return found

    def full(self, windows, most=32):
        """Up to `most` test windows of "forget" without padding, and as many of "retain"."""
        forget, retain = (self.test[self.group == name] for name in ("forget", "retain"))
        forget = forget[windows.lengths[forget] == windows.tokens.shape[1]][:most]
        if not len(forget):
            raise DataError("no held-out document of FORGET fills CONTEXT_LENGTH.")
        return forget, np.resize(retain, len(forget))

    def halves(self, windows):
        """[dev windows] True for every other file of "forget", and of what is not."""
        docs, half = windows.doc_ids[self.dev], np.zeros(len(self.dev), dtype=bool)
        for side in (self.dev_group == "forget", self.dev_group != "forget"):
            half[side] = np.unique(docs[side], return_inverse=True)[1] % 2 == 0
        return half


def strength_for(forgets, forgetting, low=2 ** -4, high=2.0 ** 8):
    """The least strength, to 10 %, of which forgets(strength) is `forgetting` nats; `high` where none does."""
    while high > 1.1 * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if forgets(middle) >= forgetting else (middle, high)
    return high


def behind(windows, ids, others, n):
    """Tokens of windows `ids`, with n tokens of windows `others` put after the first."""
    return np.concatenate([windows.tokens[others, :n + 1], windows.tokens[ids, 1:]], 1).astype(np.int64)


def last_loss(logits, tokens, n):
    """Mean loss of the last n of tokens [batch, seq]; logits [batch, seq, vocabulary]."""
    following = torch.from_numpy(tokens[:, -n:]).to(logits.device)
    return F.cross_entropy(logits[:, -n - 1:-1].flatten(0, 1).float(), following.flatten()).item()


def mcnemar(now, before):
    """Exact p that as many answers turned right as turned wrong; both [n] of bool."""
    gained, lost = (now & ~before).sum(), (before & ~now).sum()
    return binomtest(int(gained), int(gained + lost)).pvalue if gained + lost else 1.0


def compared(answers, suffix):
    """Of {name: whether each question was answered rightly [n]}, flat: the share, and p of McNemar's test against
    "unclamped"."""
    found = {f"{name}{suffix}": right.mean() for name, right in answers.items()}
    return found | {f"{name}{suffix}_p": mcnemar(right, answers["unclamped"])
                    for name, right in answers.items() if name != "unclamped"}


def right_answers(dataset, tokenizer, logits):
    """Whether each question is answered rightly under all orders of its options (SAEBench): [question] of bool;
    logits(tokens [24, seq], mask [24, seq]) -> [24, seq, vocabulary]."""
    right = []
    for tokens, mask, letters, answers in encoded_questions(dataset, tokenizer):
        said = logits(tokens, mask)
        last = said[np.arange(len(tokens)), mask.sum(1) - 1][:, np.array(letters) % said.shape[-1]]
        right.append((last.argmax(1).cpu().numpy() == answers).all())
    return np.array(right)


def sparse_accuracies(features, windows, numbers):
    """Test accuracy of one domain against the rest, mean over domains, by logistic regression on the k of `features`
    [window, d] whose means differ most, for each k of `numbers`, and on all (SAEBench); training windows train."""
    labels = np.unique(windows.domain_of(np.arange(len(windows.tokens))), return_inverse=True)[1]
    train, rng, found = np.arange(len(labels)) < windows.n_train, np.random.default_rng(42), []
    for c in range(labels.max() + 1):
        fit, y, test, truth = binary_task(labels, train, c, rng)
        difference = features[fit[y == 1]].mean(0) - features[fit[y == 0]].mean(0)
        best = np.argsort(-np.abs(difference), kind="stable")
        found.append([LogisticRegression(max_iter=1000).fit(features[fit][:, best[:k]], y).score(
            features[test][:, best[:k]], truth) for k in (*numbers, None)])
    return np.mean(found, 0)


def mean_accuracies(found, numbers):
    """Means over data sets of {features: sparse_accuracies}: flat, and as curves beside the single ones."""
    curves = {name: np.mean([accuracies[name] for accuracies in found], 0) for name in found[0]}
    kinds = *(f"top_{k}" for k in numbers), "all"
    metrics = {f"{name}_{kind}": value for name, values in curves.items() for kind, value in zip(kinds, values)}
    return metrics, curves | {"k": numbers, "data_sets": found}


def pooled(store, values):
    """values(batch) [batch, seq, d], mean over the tokens of each window that count: [window, d]."""
    ids, found = np.arange(len(store.windows.tokens)), []
    for part in np.array_split(ids, len(ids) // 32 + 1):
        keep = store.valid(part)[..., None]
        found.append(((values(store.batch(part)) * keep).sum(1) / keep.sum(1)).cpu().numpy())
    return np.concatenate(found)


def probing_baselines(store, features, numbers):
    """sparse_accuracies of pooled features {name: function of a batch}, and of counts of tokens."""
    found = {name: sparse_accuracies(pooled(store, values), store.windows, numbers).tolist()
             for name, values in features.items()}
    return found | {"tokens": sparse_accuracies(token_shares(store.windows), store.windows, numbers).tolist()}


def sparse_probing(stores, features, numbers, key):
    """mean_accuracies over stores of pooled features {name: function of a batch}; those of all but "sae", and of counts of
    tokens, are kept beside the store's files, under the key."""
    baselines, found = {name: values for name, values in features.items() if name != "sae"}, []
    for store in stores:
        base = kept(store.folder / f"{key}.json", lambda: probing_baselines(store, baselines, numbers))
        found.append(base | {"sae": sparse_accuracies(pooled(store, features["sae"]), store.windows, numbers)})
    return mean_accuracies(found, numbers)


def token_shares(windows):
    """Share of each token among those of a window that count, sparse [window, vocabulary]."""
    keep = windows.valid(np.arange(len(windows.tokens)))
    row, column = np.nonzero(keep)
    shape = len(keep), int(windows.tokens.max()) + 1
    return csr_array((1 / keep.sum(1)[row], (row, windows.tokens[row, column])), shape)


def unlearning_plan(windows, forget, tokenizer, most=(256, 128), folder=None):
    """UnlearningPlan of the domain `forget`, at most `most` windows of a group (dev, test)."""
    n_near, found = min(3, (len(set(windows.domains)) - 1) // 2), []
    near = nearest_domains(windows, forget, n_near) if n_near else []
    for split, ids, n in (("dev", np.arange(windows.n_train), most[0]), ("test", windows.heldout(), most[1])):
        domains = windows.domain_of(ids)
        group = np.where(domains == forget, "forget", np.where(np.isin(domains, near), "neighbours", "retain"))
        chosen = []
        for g in ("forget", "neighbours", "retain"):
            members = np.flatnonzero(group == g)
            if g != "neighbours" and not len(members):
                which = "of it" if g == "forget" else "of another domain"
                raise DataError(f"FORGET = {forget!r}: no {split} window is {which}. The domains are "
                                f"{', '.join(sorted(set(domains)))[:300]}.")
            chosen.append(members[np.linspace(0, len(members) - 1, min(n, len(members))).astype(int)])
        chosen = np.sort(np.concatenate(chosen))
        found += ids[chosen], group[chosen]
    strings = tokenizer.batch_decode(np.arange(windows.tokens.max() + 1)[:, None])
    _, _, test, group = found
    questions = clozes(windows, test, strings)
    return UnlearningPlan(*found, questions, group[np.searchsorted(test, questions.window)], folder)


def encoded_questions(dataset, tokenizer):
    """Of each question all 24 prompts: tokens [24, seq], padded at the end, whether they count [24, seq], ids of the four
    letters, index of the right one [24]."""
    letters = [tokenizer(f" {letter}", add_special_tokens=False)["input_ids"][-1] for letter in "ABCD"]
    for question in load_questions(dataset):
        prompts, answers = question_prompts(question)
        rows = [[beginning(tokenizer), *ids] for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"]]
        lengths = np.array([len(row) for row in rows])
        tokens = np.array([row + [0] * (lengths.max() - len(row)) for row in rows])
        yield tokens, np.arange(lengths.max()) < lengths[:, None], letters, np.array(answers)


def bag_auroc(windows, plan, last):
    """AUROC on the test windows of a logistic regression, fitted on `dev`, that tells "forget" by the last tokens."""
    def compute():
        bags, labels = [], []
        for ids, group in ((plan.dev, plan.dev_group), (plan.test, plan.group)):
            row, column = np.nonzero(windows.valid(ids))
            bags.append(bags_of_tokens(windows, ids[row], column, last))
            labels.append(group[row] == "forget")
        model = LogisticRegression(max_iter=300, class_weight="balanced").fit(bags[0], labels[0])
        return roc_auc_score(labels[1], model.decision_function(bags[1]))

    return plan.kept(("bag", last), compute)


@torch.enable_grad()
def fit_matcher(kind, x, forget):
    """Windows of codes x [n, f, w], whether they are to be forgotten [n] -> function of windows to that probability: a
    logistic regression, or one learned attention query over the window."""
    if kind == "logistic":
        model = LogisticRegression(C=75 / len(x), max_iter=300, class_weight="balanced")
        model.fit(x.flatten(1).cpu().numpy(), forget.cpu().numpy())
        weights, bias = (x.new_tensor(a[0]) for a in (model.coef_, model.intercept_))
        return lambda x: (x.flatten(-2) @ weights + bias).sigmoid()
    (f, w), y = x.shape[1:], forget.float()
    query, value, place, bias = parts = [x.new_zeros(n, requires_grad=True) for n in (f, f, w, 1)]

    def logit(x):
        return ((query @ x + place).softmax(-1) * (value @ x)).sum(-1) + bias

    optimizer, balance = torch.optim.Adam(parts, 0.05), (1 - y).sum() / y.sum()
    for _ in range(200):
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(logit(x), y, pos_weight=balance).backward()
        optimizer.step()
    return lambda x: logit(x).detach().sigmoid()


def gate(match, n):
    """The greatest mean of n matches in a row up to each position: [window, seq]."""
    if match.shape[1] < n:
        return torch.zeros_like(match)
    return F.pad(match.unfold(1, n, 1).mean(-1).cummax(1).values, (n - 1, 0))


class Matcher:
    """Tells by windows of `width` codes of the given latents where text to forget stands: a matcher for the patterns, one
    that sees a single position, one that sees them in random order. `gate_tokens` matches in a row open the gate.
    q95 [d_sae] are the units of latents z."""

    def __init__(self, kind, width, gate_tokens, latents, q95):
        self.kind, self.width, self.gate_tokens, self.latents, self.q95 = kind, width, gate_tokens, latents, q95

    def codes(self, z):
        """Of z [n, seq, d_sae], dense: [n, seq, f]."""
        return self.scaled(z[..., self.latents])

    def codes_of_sparse(self, z, seq):
        """Of z [n * seq, d_sae]: [n, seq, f]."""
        chosen = torch.from_numpy(z[:, self.latents].toarray()).to(self.q95.device)
        return self.scaled(chosen.view(-1, seq, len(self.latents)))

    def scaled(self, chosen):
        return torch.log1p(chosen / self.q95[self.latents])

    def fit(self, z, keep, forget, half, false_positives):
        """On the tokens `keep`, of which `forget` are to be forgotten, both [n, seq] of bool, z sparse [n * seq, d_sae];
        thresholds of each rate of `false_positives`, by matchers fitted on the windows of either `half` [n] for those of
        the other: "pattern" and "hybrid" at the first rate, "pattern_RATE" and "hybrid_RATE" at others."""
        codes = self.codes_of_sparse(z, keep.shape[1])
        half = torch.from_numpy(half).to(keep.device)[:, None].expand(keep.shape)
        if codes.shape[1] < self.gate_tokens:
            raise DataError(f"CONTEXT_LENGTH: unlearning's gate needs more than {self.gate_tokens} tokens.")
        apart = keep & (torch.arange(keep.shape[1], device=keep.device) % self.width == 0)  # windows do not overlap

        def fitted(name, rows):
            return fit_matcher(self.kind, self.windows(codes, name)[rows], forget[rows])

        self.matchers = {side: fitted("pattern", apart & (half == side)) for side in (False, True)}
        match = torch.where(half, self.match(codes, False), self.match(codes, True)) * keep
        self.matchers = {name: fitted(name, apart) for name in ("pattern", "one_position", "shuffled")}
        whole = gate(match, self.gate_tokens)[~forget[:, 0], -1]
        self.thresholds = {
            name + f"_{rate:g}" * (i > 0): evidence.quantile(1 - rate).item() for i, rate in enumerate(false_positives)
            for name, evidence in (("pattern", match[keep & ~forget]), ("hybrid", whole))}

    def windows(self, codes, name):
        """The last codes at each position, zeros before the first: [n, seq, f, width]."""
        width = 1 if name == "one_position" else self.width
        x = F.pad(codes, (0, 0, width - 1, 0)).unfold(1, width, 1)
        return x.gather(-1, torch.rand_like(x[..., :1, :]).argsort(-1).expand_as(x)) if name == "shuffled" else x

    def match(self, codes, name="pattern"):
        """The probability that text to forget stands at each position: [n, seq]."""
        return torch.cat([self.matchers[name](self.windows(part, name)) for part in codes.split(32)])

    def evidence(self, z):
        """Match and gate at each position, [n, seq]."""
        match = self.match(self.codes(z))
        return match, gate(match, self.gate_tokens)

    def opens(self, strategy, z):
        """Whether the evidence of a strategy that has a threshold is above it; True for others: [n, seq]."""
        if strategy not in self.thresholds:
            return torch.ones(z.shape[:2], dtype=torch.bool, device=z.device)
        match, gate = self.evidence(z)
        return (gate if strategy.startswith("hybrid") else match) > self.thresholds[strategy]

    def passage(self, z, on, tokens, tokenizer):
        """Of the window whose gate is the median at its end: its text, match, gate and its threshold, and where "standard"
        clamps, which is `on` [n, seq], and "hybrid"; tokens [n, seq]."""
        match, gate = self.evidence(z)
        i, threshold = gate[:, -1].argsort()[len(gate) // 2].item(), self.thresholds["hybrid"]
        return {"tokens": tokenizer.batch_decode(tokens[i, :, None]), "match": match[i], "gate": gate[i],
                "threshold": torch.full_like(gate[i], threshold), "standard": on[i], "hybrid": on[i] & (gate[i] > threshold)}

    def scores(self, z, keep, forget):
        """detection_scores of tokens `keep` [n, seq], and of whole windows; forget [n]; z sparse [n * seq, d_sae]."""
        codes = self.codes_of_sparse(z, keep.shape[1])
        matches, of_token = {name: self.match(codes, name) * keep for name in self.matchers}, forget.repeat(keep.sum(1).tolist())
        tasks = {name: (of_token, match[keep].cpu().numpy()) for name, match in matches.items()}
        tasks["hybrid"] = forget, gate(matches["pattern"], self.gate_tokens)[:, -1].cpu().numpy()
        return detection_scores(tasks, self.thresholds)


def detection_scores(tasks, thresholds):
    """Of tasks {name: (truth [n], score [n])}, flat: AUROC; above a threshold, for names that have one, false positives
    and balanced accuracy; and {name: [101] true positives at evenly spaced rates of false ones}."""
    found, rocs = {f"auroc_{name}": roc_auc_score(*task) for name, task in tasks.items()}, {}
    for name, threshold in thresholds.items():
        truth, score = tasks[name.partition("_")[0]]
        found |= {f"false_positives_{name}": (score > threshold)[~truth].mean(),
                  f"accuracy_{name}": balanced_accuracy_score(truth, score > threshold)}
        if name in tasks:                   # and not the same at another threshold
            false, true, _ = roc_curve(truth, score)
            rocs[name] = np.interp(np.linspace(0, 1, 101), false, true)
    return found, rocs


# ---------------------------------------------------------------------------------------------------------------------
# What a page shows of latents
# ---------------------------------------------------------------------------------------------------------------------
EXCERPT, QUESTION = 32, 16  # tokens of a passage; of those to choose from
TOP, BANDS, A_BAND, NULL = 8, 5, 2, 5       # passages: strongest, quantile bands of the values and those of each, random
DETECTION_TASKS, OPTIONS = 10, 5      # detection tasks of a latent at most; passages to choose from
COMMON = 10                 # times that a token stands in the training text, to be named as promoted or suppressed
PROFILE, REACH = 128, 5     # firings that make a profile, and its tokens: the one at the place and those just before


class Passages:
    """The held-out tokens, counted row by row without BOS, and excerpts of them: `size` tokens of one window."""

    def __init__(self, windows, size):
        ids = windows.heldout()
        self.tokens, self.lengths, self.files = windows.tokens[ids, 1:], windows.lengths[ids] - 1, windows.doc_ids[ids]
        self.seq, self.places = self.tokens.shape[1], windows.heldout_tokens()
        self.size, self.flat = min(size, self.seq), self.tokens.ravel()
        back = np.maximum(np.arange(1, self.seq + 1) - np.arange(REACH)[:, None], 0)
        self.context = windows.tokens[ids][:, back].swapaxes(0, 1).reshape(REACH, -1)   # the token at o before each place
        train = np.arange(windows.n_train)
        counts = np.bincount(windows.tokens[train][windows.valid(train)], minlength=int(windows.tokens.max()) + 1) + 1.0
        self.share, self.common = counts / counts.sum(), np.flatnonzero(counts > COMMON)
        self.starts = np.flatnonzero(np.arange(self.seq) <= np.maximum(self.lengths - self.size, 0)[:, None])

    def file(self, place):
        return self.files[place // self.seq]

    def start(self, place, lead):
        """Where the excerpt begins that has `lead` tokens before the place, if its window has them."""
        row, at = np.divmod(place, self.seq)
        return row * self.seq + np.clip(at - lead, 0, np.maximum(self.lengths[row] - self.size, 0))

    def stop(self, start):
        row, at = np.divmod(start, self.seq)
        return row * self.seq + np.minimum(at + self.size, self.lengths[row])

    def shown(self, start, active, peak=None):
        """An excerpt for the page: [index, value] where the latent fires; active: its value at each place; peak: the
        place it was chosen for."""
        part = slice(start, self.stop(start))
        values = [[int(i), _short(active[start + i])] for i in np.flatnonzero(active[part])]
        return {"file": int(self.file(start)), "at": int(start % self.seq) + 1, "tokens": self.flat[part].tolist(),
                "values": values, "peak": None if peak is None else int(peak - start)}

    def profile(self, places, others):
        """Weights [REACH, vocabulary] of the token at a place, and of those before it, in a logistic regression that tells
        `places` from `others`."""
        used, n = np.concatenate([places, others]), len(self.share)
        columns = (self.context[:, used] + n * np.arange(REACH)[:, None]).T.ravel().astype(np.int32)
        ends = np.arange(0, len(columns) + 1, REACH, dtype=np.int32)
        rows = csr_array((np.ones(len(columns)), columns, ends), (len(used), n * REACH))
        model = LogisticRegression(solver="liblinear", class_weight="balanced")
        return model.fit(rows, np.arange(len(used)) < len(places)).coef_.reshape(REACH, n)

    def guessed(self, profile, options):
        """1 where the first of the excerpts that begin at `options` holds the place with the highest sum of weights, ties
        shared."""
        parts = (self.context[:, start:self.stop(start)] for start in options)
        best = np.array([np.take_along_axis(profile, part, 1).sum(0).max() for part in parts])
        return (best[0] == best.max()) / (best == best.max()).sum()


def _short(value):
    return float(f"{value:.3g}") if value else 0


def detection_tasks(text, at, active, held, rng):
    """Of each file of `held`: the start of an excerpt where the latent fires and of four from other files where it does
    not; the same with four that hold the token on which it fired; None where there are not as many."""
    fired = np.concatenate([[0], np.cumsum(active > 0)])

    def quiet(starts, file):        # four of other files and different windows, or None
        starts = starts[(fired[text.stop(starts)] == fired[starts]) & (text.file(starts) != file)]
        drawn = rng.permutation(starts)[:256]
        drawn = drawn[np.sort(np.unique(drawn // text.seq, return_index=True)[1])][:OPTIONS - 1]
        return drawn if len(drawn) == OPTIONS - 1 else None

    tasks = []
    for file in held:
        place = rng.choice(at[text.file(at) == file])
        begin = text.start(place, rng.integers(text.size // 2, text.size))
        like = text.places[text.flat[text.places] == text.flat[place]]
        pools = text.starts, text.start(like, rng.integers(text.size // 2, text.size, len(like)))
        others = [quiet(pool, file) for pool in pools]
        tasks.append([None if four is None else [int(begin), *map(int, four)] for four in others])
    return tasks


def latent_passages(text, at, active, held, rng):
    """Strongest (one a file), stratified by value and random passages, none from the files `held`."""
    at = at[~np.isin(text.file(at), held)]
    strongest, lead = at[np.argsort(-active[at], kind="stable")], text.size * 3 // 4
    first = np.sort(np.unique(text.file(strongest), return_index=True)[1])[:TOP]
    bands = np.array_split(strongest, BANDS)
    drawn = [rng.permutation(band)[:A_BAND] for band in bands]
    random_ones = rng.choice(text.places[~np.isin(text.file(text.places), held)], NULL)
    return {"top": [text.shown(text.start(p, lead), active, p) for p in strongest[first]],
            "stratified": [[text.shown(text.start(p, lead), active, p) for p in band] for band in drawn],
            "random": [text.shown(text.start(p, lead), active) for p in random_ones]}, strongest


def latent_entry(text, short_text, latent, at, values, rng):
    """What the page shows of a latent that fires at places `at` [n] with `values` [n], and of each task whether its own
    profile finds where it fires, also among like tokens, and whether one of random places does: [tasks, 3] in [0, 1],
    NaN where there is no such task. short_text: Passages of the tasks."""
    active = np.zeros(len(text.flat), dtype=np.float32)
    active[at] = values
    files = rng.permutation(np.unique(text.file(at)))
    held = files[:min(DETECTION_TASKS, len(files) // 4)]
    tasks = detection_tasks(short_text, at, active, held, rng)
    passages, strongest = latent_passages(text, at, active, held, rng)
    known = text.places[~np.isin(text.file(text.places), held)]
    quiet, drawn = rng.permutation(known[active[known] == 0])[:4 * PROFILE], rng.permutation(known)[:5 * PROFILE]
    own, chance = text.profile(strongest[:PROFILE], quiet), text.profile(drawn[::5], np.delete(drawn, np.s_[::5]))
    right = [[short_text.guessed(profile, options) if options else np.nan for profile, options in (
        (own, anywhere), (own, like), (chance, anywhere))] for anywhere, like in tasks]
    question = next((options for options, _ in tasks if options), None)
    order, edges = rng.permutation(OPTIONS), np.linspace(0, text.seq, min(text.seq, 32) + 1).astype(int)
    keep = np.arange(text.seq) < text.lengths[:, None]
    sums, n = (np.add.reduceat(a.sum(0), edges[:-1]) for a in (active.reshape(keep.shape), keep))
    entry = {"latent": int(latent), "rate": _short(len(at) / len(text.places)), "files": len(files),
             "max": _short(values.max()), "mean": _short(values.mean()), "passages": passages,
             "histogram": np.histogram(values, 30, (0, values.max()))[0].tolist(),
             "by_position": [[int(low) + 1, _short(mean)] for low, mean in zip(edges, sums / np.maximum(n, 1))]}
    if question:
        entry["question"] = {"passages": [short_text.shown(question[i], active) for i in order],
                             "answer": int(np.argmin(order))}
    return entry, np.array(right).reshape(-1, 3)


def leading(weights, names, most=12):
    """What a latent is related to: the names of the largest of `weights` [n] above 0, and these."""
    values, at = weights.cpu().topk(min(most, len(weights)))
    return [(names[i], value) for i, value in zip(at.tolist(), values.tolist()) if value > 0]


def children(latents, weights, tokenizer, tokens, h):
    """Of latents of level 2, weights [d_2, d_1]: the features of level 1 on which no other latent has a larger weight, and
    those on which one has. A feature is named by its number and the one of tokens [batch, seq] where h [batch, seq, d_1]
    is largest, if it is anywhere."""
    most, at = h.flatten(0, 1).max(0)
    texts = tokenizer.batch_decode(tokens.flatten()[at, None])
    names = [f"{i} {text}" if value > 0 else str(i) for i, (text, value) in enumerate(zip(texts, most.tolist()))]
    own, largest = weights[latents], weights.amax(0)
    return [{"children, features of level 1": leading(row * (row == largest), names),
             "other features of level 1": leading(row * (row < largest), names)} for row in own]


def compositions(latents, reads, fires, ids, f, attention, most=256):
    """Of latents, features first: how strongly a composition reads features, or which compositions read a feature, reads
    [d_f, d_c]; and, where attention(ids, f) gives some, the mean attention that features get where the latent fires [batch, seq,
    latent]: from it or, where it is a composition, from all features of the token, ids [n, k] with values f [n, k]."""
    n, found = len(reads), []
    for latent, on in zip(latents.tolist(), fires.flatten(0, 1).T > 0):
        rows = {"compositions that read it": leading(reads[latent], range(n, n + reads.shape[1]))} if latent < n else {
            "features that it reads": leading(reads[:, latent - n], range(n))}
        here, values = ids[on][:most], f[on][:most]
        if (seen := attention(here, values)) is not None:
            of = here == latent if latent < n else values > 0
            weights = torch.einsum("nhij,ni->nj", seen, of.float()).flatten()
            got = torch.zeros(n, device=f.device).index_add(0, here.flatten(), weights)
            rows["attention where it fires"] = leading(got / got.sum().clamp_min(1e-9), range(n))
        found.append(rows)
    return found


def latents_page(windows, tokenizer, latents, z, logits, related, n_live):
    """What features.html shows, and the share of detection tasks that a latent's own strongest contexts solve.

    z: codes of the held-out tokens, sparse by column; logits [latent, vocabulary]: what a latent's decoder row adds, shown
    for common tokens against their mean (those never trained on share one direction);
    related: of each latent {title: [[label, number], ...]}, a label that is a whole number naming a latent."""
    texts, page, right, named = [Passages(windows, size) for size in (EXCERPT, QUESTION)], [], [], {}
    common = texts[0].common[texts[0].common < logits.shape[1]]
    for latent, (at, values), logit, relation in zip(latents, firings(z, latents), logits, related):
        entry, found = latent_entry(*texts, latent, at, values, np.random.default_rng([0, int(latent)]))
        order = common[np.argsort(logit[common], kind="stable")]
        logit = logit - logit[common].sum() / max(1, len(common))
        entry |= {"promoted": [[int(i), _short(logit[i])] for i in order[::-1][:10]],
                  "suppressed": [[int(i), _short(logit[i])] for i in order[:10]]}
        if relation:
            entry["related"] = {title: [[label, _short(value)] for label, value in rows[:24]]
                                for title, rows in relation.items()}
            others = sorted({label for rows in relation.values() for label, _ in rows if isinstance(label, int)})
            named |= {i: int(texts[0].flat[at[values.argmax()]])
                      for i, (at, values) in zip(others, firings(z, np.array(others, int))) if len(at)}
        if len(found):
            entry["detected"] = [int(found.shape[0]), *(_short(value) for value in np.nansum(found, 0))]
        page.append(entry)
        right.append(found)
    used, files = set(), set()
    for passage in _all_passages(page):
        used.update(passage["tokens"])
        files.add(passage["file"])
    used.update(named.values(), (token for entry in page for token, _ in entry["promoted"] + entry["suppressed"]))
    known, names = ({value: i for i, value in enumerate(sorted(values))} for values in (used, files))
    for passage in _all_passages(page):
        passage |= {"tokens": [known[token] for token in passage["tokens"]], "file": names[passage["file"]]}
    for entry in page:
        for rows in (entry["promoted"], entry["suppressed"]):
            rows[:] = [[known[token], value] for token, value in rows]
    right, metrics = np.concatenate(right), {}
    for name, values in zip(("detection", "detection_same_token", "detection_null"), right.T):
        if not np.isnan(values).all():
            metrics[name] = np.nanmean(values)
    return {"schema": "temporal-sae-runner/features/1", "seed": 0, "n_live": int(n_live), "tokens": len(texts[0].places),
            "n_files": len(np.unique(texts[0].files)), "strings": tokenizer.batch_decode([[token] for token in known]),
            "files": [str(windows.names[file]) for file in names], "latents": page,
            "named": {i: known[token] for i, token in named.items()}}, metrics


def _all_passages(page):
    for entry in page:
        shown = entry["passages"]
        yield from chain(shown["top"], *shown["stratified"], shown["random"],
                         entry.get("question", {"passages": ()})["passages"])


# ---------------------------------------------------------------------------------------------------------------------
# Two levels of units: what a parent's activity tells of its children, and how well groups follow labels
# ---------------------------------------------------------------------------------------------------------------------
class Activity(NamedTuple):
    """When units fire: on which of the n tokens that count, and how strongly."""
    places: list            # unit -> tokens [firings], in order
    values: list            # unit -> [firings]
    n: int

    @classmethod
    def of(cls, z, keep):
        """Of codes z, sparse [token, unit] by column; `keep` are the tokens that count, in order."""
        rank = np.full(z.shape[0], -1)
        rank[keep] = np.arange(len(keep))
        parts = firings(z, np.arange(z.shape[1]))
        return cls([rank[at] for at, _ in parts], [values for _, values in parts], len(keep))

    def rates(self):
        return np.array([len(at) for at in self.places]) / self.n

    def live(self, files, least, least_files):
        """[unit] whether it fires often, in many of files [n], and on at most half of the tokens."""
        return np.array([least <= len(at) <= self.n / 2 and len(np.unique(files[at])) >= least_files for at in self.places])

    def only(self, units):
        return Activity([self.places[i] for i in units], [self.values[i] for i in units], self.n)

    def union(self, groups):
        """Activity of groups [unit] of units: a group fires where one of its units does."""
        members = [np.flatnonzero(groups == g) for g in range(max(groups) + 1)]
        places = [np.unique(np.concatenate([self.places[i] for i in of])) for of in members]
        return Activity(places, [np.ones(len(at)) for at in places], self.n)


def binary_information(both, first, second, n):
    """Mutual information in nats of two events that happen first and second times in n, both times together."""
    total = 0.0
    for joint, a, b in ((both, first, second), (first - both, first, n - second), (second - both, n - first, second),
                        (n - first - second + both, n - first, n - second)):
        with np.errstate(divide="ignore", invalid="ignore"):
            total = total + np.where(joint > 0, joint / n * np.log(joint * n / np.asarray(a * b, dtype=float)), 0.0)
    return total


def binary_entropy(count, n):
    return binary_information(count, count, count, n)


class Edges(NamedTuple):
    """What parents tell of children, by edge."""
    information: np.ndarray     # [edge] bias-corrected mutual information over the child's entropy
    p: np.ndarray               # [edge] share of circular shifts that reach it
    draws: np.ndarray           # [draw] mean over edges for files drawn with replacement

    @property
    def mean(self):
        return self.information.mean() if len(self.information) else 0.0


def edge_information(parents, children, edges, files, draws=200, least_shift=17):
    """Edges of pairs (parent, child) [edge, 2]: I(parent; child) of binary activity, less its mean over circular shifts
    of the parent by at least `least_shift` tokens, over H(child). files [n]: of each token."""
    rng, n, found = np.random.default_rng(0), parents.n, []
    names, of = np.unique(files, return_inverse=True)
    weights = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), draws).T        # [file, draw]
    if n <= 2 * least_shift:
        raise DataError(f"{n} held-out tokens are too few for circular shifts of {least_shift}.")
    shifts, sizes = rng.integers(least_shift, n - least_shift, draws), np.bincount(of)
    on, total = np.zeros(2 * n, dtype=bool), np.zeros(draws)
    for parent, child in edges:
        at, times = parents.places[parent], children.places[child]
        on[at], on[at + n] = True, True
        both = times[on[times]]
        shifted = on[times[None] + shifts[:, None]].sum(1)
        on[at], on[at + n] = False, False
        observed = binary_information(len(both), len(at), len(times), n)
        null = binary_information(shifted, len(at), len(times), n)
        entropy = max(binary_entropy(len(times), n), 1e-12)
        found.append(((observed - null.mean()) / entropy, (1 + (null >= observed).sum()) / (1 + draws)))
        counts = [np.bincount(of[part], minlength=len(names)) @ weights for part in (both, at, times)]
        drawn = sizes @ weights
        again = binary_information(*counts, drawn) - null.mean()
        total += again / np.maximum(binary_entropy(counts[2], drawn), 1e-12)
    information, p = np.array(found).reshape(-1, 2).T
    return Edges(information, p, total / max(len(edges), 1))


def alike_parents(rates, edges, rng):
    """For each edge (parent, child) another parent, one of the ten nearest in rate."""
    order = np.argsort(rates, kind="stable")
    place = np.argsort(order)
    found = []
    for parent, child in edges:
        low = int(np.clip(place[parent] - 5, 0, max(len(order) - 11, 0)))
        near = order[low:low + 11]
        found.append((rng.choice(near[near != parent]), child))
    return np.array(found)


def information_scores(edges, controls):
    """Mean information of Edges and of {name: Edges} of controls; of each the difference with its 95 % interval over
    files, and q after Benjamini-Hochberg over the controls; share of the edges that are significant after it."""
    found = {"mutual_information": edges.mean,
             "edges_significant": (false_discovery_control(edges.p) < 0.05).mean() if len(edges.p) else 0.0}
    tails = []
    for name, control in controls.items():
        gap = edges.draws - control.draws
        low, high = np.percentile(gap, (2.5, 97.5))
        found |= {f"mutual_information_{name}": control.mean, f"mutual_information_over_{name}": edges.mean - control.mean,
                  f"mutual_information_over_{name}_low": low, f"mutual_information_over_{name}_high": high}
        tails.append(min(1.0, 2 * (1 + min((gap <= 0).sum(), (gap >= 0).sum())) / (1 + len(gap))))
    for name, q in zip(controls, false_discovery_control(tails)):
        found[f"mutual_information_over_{name}_q"] = q
    return found


def label_kinds(windows):
    """Labels of the held-out tokens that count {name: class [n]}: the token, its class with all labels taken together,
    and, where there are labels, its type and its context apart."""
    keep = windows.heldout_tokens()
    found = {"token": windows.tokens[windows.n_train:, 1:].ravel()[keep], "class": token_classes(windows)[keep]}
    if windows.labels is not None and (windows.labels >= 0).any():
        labels = windows.labels[:, 1:].reshape(-1, len(LABELS))[keep]
        found["type"] = labels[:, 0] + 1
        found["context"] = np.unique(labels[:, 1:], axis=0, return_inverse=True)[1].ravel()
    return found


def modal_labels(places, classes):
    """The most frequent class on the tokens where each unit fires."""
    return np.array([np.bincount(classes[at]).argmax() for at in places])


def ward(directions, n_groups):
    """Group [unit] of directions [unit, d] by Ward's method."""
    from sklearn.cluster import AgglomerativeClustering
    return AgglomerativeClustering(int(np.clip(n_groups, 1, len(directions)))).fit_predict(directions)


def kmeans(directions, n_groups):
    from sklearn.cluster import KMeans
    return KMeans(int(np.clip(n_groups, 1, len(directions))), n_init=1, random_state=0).fit_predict(directions)


def clustering_scores(groups, places, kinds, directions):
    """How well groups [unit] follow the labels of the units: adjusted mutual information and adjusted Rand index with
    the modal label of each of `kinds`; and the silhouette of the directions [unit, d], which proves nothing where a
    loss trained it."""
    from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score, silhouette_score
    found = {}
    for kind, classes in kinds.items():
        labels = modal_labels(places, classes)
        found |= {f"ami_{kind}": adjusted_mutual_info_score(labels, groups), f"ari_{kind}": adjusted_rand_score(labels, groups)}
    if 1 < len(np.unique(groups)) < len(groups):
        found["silhouette"] = silhouette_score(directions, groups)
    return found


class Levels(NamedTuple):
    """Two levels of live units: the children (level 1, or those of a flat dictionary) and the parent of each."""
    lower: Activity
    upper: Activity
    parents: np.ndarray     # [child] index into upper
    children: np.ndarray    # live children whose parent is live

    @classmethod
    def of(cls, lower, upper, parents, files, live):
        alive = lower.live(files, *live) & upper.live(files, *live)[parents]
        return cls(lower, upper, parents, np.flatnonzero(alive))

    def families(self):
        """{parent: its live children}, of parents that have at least two."""
        order = self.children[np.argsort(self.parents[self.children], kind="stable")]
        parents, first = np.unique(self.parents[order], return_index=True)
        return {int(p): part for p, part in zip(parents, np.split(order, first[1:])) if len(part) > 1}

    def edges(self):
        found = [(parent, child) for parent, part in self.families().items() for child in part]
        if not found:
            raise DataError(f"no parent has two live children: {len(self.children)} live ones of {len(self.parents)} have "
                            "a live parent, each another one.")
        return np.array(found)

    def information(self, files, edges=None):
        return edge_information(self.upper, self.lower, self.edges() if edges is None else edges, files)


def grouped(activity, groups):
    """Units in groups [unit], as Levels: a group fires where one of its units does."""
    return Levels(activity, activity.union(groups), groups, np.arange(len(groups)))


def levels(windows, live, lower, upper, parents):
    """Levels of codes of the held-out tokens, sparse [token, unit] by column."""
    both = (Activity.of(codes, windows.heldout_tokens()) for codes in (lower, upper))
    return Levels.of(*both, parents.cpu().numpy(), heldout_files(windows), live)


def hierarchy_scores(windows, levels, starts, flat, directions, flat_directions, live):
    """What two Levels tell: -> metrics, curves, families.

    starts: {name: Levels} with the level 2 that was not trained; flat: codes of a flat SAE, sparse; directions of the
    features of level 1 and of the flat SAE's latents [unit, d]; live: (firings, files) of a live unit."""
    files = heldout_files(windows)
    if not levels.families():                               # no parent has two live children
        return {"groups": 0}, {}, {}
    rng, edges, families = np.random.default_rng(0), levels.edges(), levels.families()
    units, directions, flat_directions = levels.children, directions.cpu().numpy(), flat_directions.cpu().numpy()
    groups = np.unique(levels.parents[units], return_inverse=True)[1]
    flat = Activity.of(flat, windows.heldout_tokens())
    of_flat = np.flatnonzero(flat.live(files, *live))
    flat, flat_directions = flat.only(of_flat), flat_directions[of_flat]
    n_groups = max(1, round(len(of_flat) * (groups.max() + 1) / len(units)))           # as many units in each
    kinds, own = label_kinds(windows), [levels.lower.places[i] for i in units]
    metrics = {"groups": groups.max() + 1, "group_size": len(units) / (groups.max() + 1),
               "singletons": (np.bincount(groups) == 1).mean(), "duplicates": duplicates(families, directions)}
    tables = {"": (groups, own, directions[units])}
    for method in (ward, kmeans):
        tables[f"_{method.__name__}"] = method(flat_directions, n_groups), flat.places, flat_directions
        tables[f"_{method.__name__}_level_1"] = method(directions[units], groups.max() + 1), own, directions[units]
    for name, (found, places, d) in tables.items():
        metrics |= {f"{key}{name}": value for key, value in clustering_scores(found, places, kinds, d).items()}
    controls = {"non_edges": levels.information(files, alike_parents(levels.upper.rates(), edges, rng)),
                "ward": grouped(flat, tables["_ward"][0]).information(files)}
    controls |= {name: start.information(files) for name, start in starts.items()}
    metrics |= information_scores(levels.information(files), controls)
    shown = sorted(families, key=lambda p: -len(families[p]))[:12]
    children = np.concatenate([families[p][:3] for p in shown])
    pairs = np.array([(p, i) for p in shown for i in children])
    matrix = edge_information(levels.upper, levels.lower, pairs, files, 50).information
    curves = {"information_matrix": matrix.reshape(len(shown), -1).round(4), "matrix_parents": np.array(shown),
              "matrix_children": children, "matrix_family": np.array([levels.parents[i] for i in children])}
    return metrics, curves, families


def duplicates(families, directions):
    """Share of the children that point as a sibling does, cosine above .95."""
    same, n = 0, 0
    for part in families.values():
        unit = normalize(directions[part])
        cosine = unit @ unit.T - 2 * np.eye(len(part))
        same, n = same + (cosine.max(1) > 0.95).sum(), n + len(part)
    return same / max(n, 1)


def evenly(families, rates, n):
    """n parents, evenly spaced in the order of their rates."""
    order = sorted(families, key=lambda p: (rates[p], p))
    return [order[i] for i in np.unique(np.linspace(0, len(order) - 1, n).round().astype(int))] if order else []


def cosines(a, b):
    """Of rows [n, d]; 0 where one is zero."""
    return (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-12)


def rivals(size, parent, rates):
    """Of latents of `size` [windows, seq, d_sae]: where the parent is active beside another one, [windows, seq]; which of
    those is nearest to it in log size and log rate [d_sae] together; and which of all in rate."""
    size, rate = size.log(), torch.as_tensor(rates, device=size.device).clamp_min(1e-9).log()
    near = (rate - rate[parent]).abs()
    near[parent] = math.inf
    apart = (size - size[..., parent, None]).abs() + near
    apart, rival = apart.nan_to_num(math.inf, math.inf).min(2)
    return size[..., parent].isfinite() & apart.isfinite(), rival, near.argmin()


def traced(docs, on, changes, rises, h, children):
    """Of one parent, at the tokens `on` [windows, seq] of documents [windows], n in all, what changes in the logits,
    [2 + children, n, vocab], where it, its rival, each child is ablated; what in those, [2, m, vocab], where it and its rival
    are put in; and level 1 there, h [2][m, d_1]. -> cosines with the children's sum [n]; mean rise of the ten tokens that
    this sum lowers most; share of the children that then fire."""
    files = docs[on.nonzero()[:, 0].cpu().numpy()]
    changes, rises = changes.cpu().numpy(), rises.cpu().numpy()
    fires = [(part[:, children] > 0).float().mean().item() for part in h]
    own, other, *single = changes
    summed = np.sum(single, 0)
    top = np.argsort((summed - summed.mean(1, keepdims=True)).mean(0), kind="stable")[:10]
    up = (rises - rises.mean(2, keepdims=True))[:, :, top].mean((1, 2))
    return {"files": files, "own": cosines(own, summed), "rival": cosines(other, summed), "patched_rise": up[0],
            "rival_rise": up[1], "patched_children": fires[0], "rival_children": fires[1]}


def causal_scores(traces, windows):
    """Of traces, one a parent (see `traced`): mean cosine of a parent's effect with its children's summed effects,
    and of its rival's; their ratio, the causal specificity; p of the difference, by sign flips of files; what patching
    does to the logits of the children's top tokens, and to the children; and the cosines by document [sample]."""
    if not traces:
        return {}, {}
    files, own, rival = (np.concatenate([trace[name] for trace in traces]) for name in ("files", "own", "rival"))
    means = np.array([[values[files == file].mean() for values in (own, rival)] for file in np.unique(files)])
    gap, rng = means[:, 0] - means[:, 1], np.random.default_rng(0)
    flips = rng.choice((-1.0, 1.0), (10_000, len(gap))) @ gap
    found = {"causal_cosine": own.mean(), "causal_cosine_rival": rival.mean(),
             "causal_specificity": own.mean() / max(rival.mean(), 1e-3),
             "causal_p": (1 + (flips >= gap.sum() - 1e-12).sum()) / (1 + len(flips))}
    for name in ("rise", "children"):
        a, b = (np.array([trace[key] for trace in traces]) for key in (f"patched_{name}", f"rival_{name}"))
        found |= {f"patched_{name}": a.mean(), f"patched_{name}_rival": b.mean(), f"patched_{name}_share": (a > b).mean()}
    return found, {f"causal_cosine{end}": windows.by_document(values, files)
                   for end, values in (("", own), ("_rival", rival))}


def passages(windows, strings, places, values, n=3, around=8):
    """The n strongest firings of a unit, each in another window: text before, token, text after, value."""
    keep, found, seen = windows.heldout_tokens(), [], set()
    for i in np.argsort(-values, kind="stable"):
        row, at = divmod(int(keep[places[i]]), windows.tokens.shape[1] - 1)
        if row not in seen:
            seen.add(row)
            text = [strings[t] for t in windows.tokens[windows.n_train + row][:windows.lengths[windows.n_train + row]]]
            found.append(("".join(text[max(1, at + 1 - around):at + 1]), text[at + 1],
                          "".join(text[at + 2:at + 2 + around]), round(float(values[i]), 4)))
        if len(found) == n:
            break
    return found


def family_tree(windows, tokenizer, levels, families, parents, weights, traces):
    """Of parents: rate, passages and causal cosines, and of each child its weight [parent, child], rate and passages."""
    strings = tokenizer.batch_decode(np.arange(windows.tokens.max() + 1)[:, None])

    def unit(activity, i):
        return {"id": int(i), "rate": float(len(activity.places[i]) / activity.n),
                "passages": passages(windows, strings, activity.places[i], activity.values[i])}

    return [unit(levels.upper, p) | {
        "cosine": float(np.mean(trace["own"])), "cosine_rival": float(np.mean(trace["rival"])),
        "children": [unit(levels.lower, i) | {"weight": float(weights[p, i])} for i in families[p]]}
        for p, trace in zip(parents, traces)]


def case_studies(tree):
    """family_tree as Markdown."""
    def quoted(passage):
        before, token, after, value = (part.replace("`", "'").replace("\n", "\\n") if isinstance(part, str) else part
                                       for part in passage)
        return f"`{before}`**`{token}`**`{after}` ({value:.2f})"

    lines = ["# Case studies: parents, their children, and the text that fires them", "", textwrap.fill(
        "Parents are latents of level 2 that have at least two live children, evenly spaced in the order of their firing "
        "rates; none was selected for how it reads. A child's weight is the parent's decoder weight. Cosine: of what "
        "ablating the parent does to the model's logits with what ablating its children singly does in sum, beside the "
        "same for a rival matched in rate and size. In passages the token that fires is bold; its value follows.", 110)]
    for parent in tree:
        lines += ["", f"## Parent {parent['id']}", f"Fires on {parent['rate']:.2%} of the tokens. Cosine "
                  f"{parent['cosine']:.2f}, rival {parent['cosine_rival']:.2f}.", ""]
        lines += [f"- {quoted(passage)}" for passage in parent["passages"]]
        for child in sorted(parent["children"], key=lambda c: -c["weight"]):
            lines += ["", f"Child {child['id']}, weight {child['weight']:.2f}, on {child['rate']:.2%}:", ""]
            lines += [f"- {quoted(passage)}" for passage in child["passages"]]
    return "\n".join(lines) + "\n"


def windows_with(windows, activity, unit, n=4):
    """Ids of up to n windows, one a file, in which a unit fires most, and of as many of other files in which it fires
    least."""
    seq, files = windows.tokens.shape[1] - 1, windows.doc_ids[windows.n_train:]
    rows = windows.heldout_tokens()[activity.places[unit]] // seq
    counts = np.bincount(rows, minlength=len(files)) + np.random.default_rng(unit).random(len(files)) / 2  # ties: any
    order = np.argsort(-counts)
    first = order[np.sort(np.unique(files[order], return_index=True)[1])]          # the best window of each file
    chosen = first[:min(n, len(first) // 2)]
    others = order[::-1][~np.isin(files[order[::-1]], files[chosen])]
    absent = others[np.sort(np.unique(files[others], return_index=True)[1])][:n]
    return windows.n_train + chosen, windows.n_train + absent


# ---------------------------------------------------------------------------------------------------------------------
# Tasks: questions, texts to classify, clozes
# ---------------------------------------------------------------------------------------------------------------------
class Question(NamedTuple):
    question: str
    choices: list           # 4 strings
    answer: int             # the right one
    subject: str            # "" where unknown


SUBJECTS = {"wmdp-bio": "biology", "wmdp-chem": "chemistry", "wmdp-cyber": "cybersecurity"}    # WMDP has no such column


def load_questions(dataset: str) -> list[Question]:
    """Four-way questions with the columns of WMDP and MMLU (question, choices, answer, perhaps subject): the test split
    where there is one, of a hub data set ("cais/wmdp:wmdp-bio") or of a local file or folder."""
    def fits(row):
        choices = row.get("choices")
        return (isinstance(row.get("question"), str) and row.get("answer") in range(4) and isinstance(choices, list)
                and [type(choice) for choice in choices] == [str] * 4)

    splits = _splits(dataset)
    rows = list(_readable(dataset, splits.get("test") or next(iter(splits.values()))))
    if not rows or not all(map(fits, rows)):
        columns = ", ".join(next((row for row in rows if not fits(row)), ["not one row"]))
        raise DataError(f"The data set {dataset!r} cannot be asked: each row needs question (a text), choices (4 "
                        f"texts) and answer (0, 1, 2 or 3). The columns of the first without them: {columns}.")
    default = next((subject for name, subject in SUBJECTS.items() if name in dataset), "")
    return [Question(row["question"], row["choices"], row["answer"], row.get("subject") or default) for row in rows]


def question_prompts(question: Question) -> tuple[list, list]:
    """The prompts under all 24 orders of the choices, in MMLU's format, and the index of the right letter in each."""
    about = f" about {question.subject.replace('_', ' ')}" if question.subject else ""
    head = f"The following are multiple choice questions (with answers){about}.\n\n{question.question.strip()}\n"
    orders = list(permutations(range(4)))
    lines = ["".join(f"{letter}. {question.choices[i]}\n" for letter, i in zip("ABCD", order)) for order in orders]
    return [f"{head}{options}Answer:" for options in lines], [order.index(question.answer) for order in orders]


class Examples(NamedTuple):
    """Texts to classify."""
    texts: list
    labels: np.ndarray      # [text] index into names
    train: np.ndarray       # [text] True: to fit on, False: to test on
    names: list             # of the classes


def _columns(text, label, group=None):
    """What reads a row: its text, its label and the group that is balanced within a class."""
    def read(row):
        if not {text, label} <= set(row):
            raise DataError(f"A data set to classify needs the columns {text} and {label}; this one has "
                            f"{', '.join(row)}.")
        return row[text], row[label], row.get(group)
    return read


def _code(row):
    """Without the first 150 characters, mostly the licence, of files with more than 384 others."""
    return row["content"][150:] if len(row["content"]) > 534 else "", Path(row["path"]).suffix, None


def _europarl(row):
    language = EUROPARL["-".join(sorted(row["translation"]))]
    return row["translation"][language], language, None


EUROPARL = {"en-fr": "en", "fr-it": "fr", "de-en": "de", "es-fr": "es", "nl-pt": "nl"}      # pair -> the one read
BIOS, REVIEWS = "LabHC/bias_in_bios", "canrager/amazon_reviews_mcauley_1and5"
_bios = _columns("hard_text", "profession", "gender")
# SAEBench's data sets: name -> ({hub name: {label: class}}, what reads a row).
PROBING_DATASETS = {
    f"{BIOS}_class_set1": (
        {BIOS: {0: "accountant", 1: "architect", 2: "attorney", 6: "dentist", 9: "filmmaker"}}, _bios),
    f"{BIOS}_class_set2": (
        {BIOS: {11: "journalist", 13: "nurse", 14: "painter", 18: "photographer", 19: "physician"}}, _bios),
    f"{BIOS}_class_set3": (
        {BIOS: {20: "poet", 21: "professor", 22: "psychologist", 25: "surgeon", 26: "teacher"}}, _bios),
    REVIEWS: ({REVIEWS: {1: "Toys_and_Games", 2: "Cell_Phones_and_Accessories", 3: "Industrial_and_Scientific",
                         5: "Musical_Instruments", 6: "Electronics"}}, _columns("text", "category", "rating")),
    f"{REVIEWS}_sentiment": ({REVIEWS: {1.0: "1.0", 5.0: "5.0"}}, _columns("text", "rating")),
    "codeparrot/github-code": ({"codeparrot/github-code": {".c": "C", ".h": "C", ".py": "Python", ".html": "HTML",
                                                           ".java": "Java"} | dict.fromkeys(
        (".php", ".php3", ".php4", ".php5", ".phps", ".phpt"), "PHP")}, _code),
    "fancyzhx/ag_news": (
        {"fancyzhx/ag_news": dict(enumerate(("World", "Sports", "Business", "Sci/Tech")))}, _columns("text", "label")),
    "Helsinki-NLP/europarl": (
        {f"Helsinki-NLP/europarl:{pair}": {chosen: chosen} for pair, chosen in EUROPARL.items()}, _europarl),
}


def probing_examples(dataset: str, n_train: int, n_test: int, seed: int = 42) -> Examples:
    """`n_train` and `n_test` texts of each class of
      "embedded"                 the five domains with most files: stretches of at most 700 characters that begin at a
                                 line's start and share nothing; those to test on from held-out files, the others not
      one of PROBING_DATASETS    drawn as SAEBench draws them, but for blank texts
      another hub name or path   with columns text and label; drawn from its own train and test where it has both

    Raises DataError where a class has fewer."""
    drawn = (_draw_stretches if dataset == "embedded" else _draw_texts)(dataset, (n_train, n_test), seed)
    for name, (train, test) in drawn.items():
        if len(train) < n_train or len(test) < n_test or len(drawn) < 2:
            raise DataError(f"The data set {dataset!r} is too small: {len(drawn)} classes, and {name!r} does not give "
                            f"{n_train} texts to train on and {n_test} others to test on, in equal groups.")
    is_train = np.arange(n_train + n_test) < n_train
    return Examples([text for train, test in drawn.values() for text in train + test],
                    np.repeat(np.arange(len(drawn)), len(is_train)), np.tile(is_train, len(drawn)), list(drawn))


def _draw_stretches(_, sizes, seed):
    """{domain: (train texts, test texts)}: of each file one stretch, then a second, ..."""
    rng, drawn = np.random.default_rng(seed), {}
    for domain, _ in Counter(document.domain for document in embedded_documents()).most_common(5):
        ranked = [], []
        for document in embedded_documents():
            if document.domain == domain:
                stretches = rng.permutation(_stretches(document.text, rng)).tolist()
                ranked[document.heldout].extend((i, rng.random(), stretch) for i, stretch in enumerate(stretches))
        drawn[domain] = tuple([stretch for _, _, stretch in sorted(part)[:n]] for part, n in zip(ranked, sizes))
    return drawn


def _stretches(text, rng, size=700, least=200):
    """What a text is cut into from a random one of its first lines on."""
    starts = [0] + [match.end() for match in re.finditer("\n", text[:size])]
    start, found = starts[rng.integers(len(starts))], []
    while start < len(text):
        found.append(text[start:start + size])
        start = text.find("\n", start + len(found[-1]) - 1) + 1 or len(text)
    return [stretch for stretch in found if len(stretch.strip()) >= least]


def _draw_texts(dataset, sizes, seed):
    """{class: (train texts, test texts)}, SAEBench's way: a sample of each split, in equal groups, where there are both
    splits; else the first that are enough (all where the classes are not known), shuffled."""
    sources, read = PROBING_DATASETS.get(dataset, ({dataset: {}}, _columns("text", "label")))
    pools = {name: {} for classes in sources.values() for name in classes.values()}  # {class: {(split, group): texts}}
    for source, classes in sources.items():
        splits = _splits(source)
        both = {"train", "test"} <= set(splits)
        for split in ("train", "test") if both else list(splits)[:1]:
            for text, label, group in _readable(source, map(read, splits[split])):
                if isinstance(text, str) and text.strip() and label in (classes or {label} - {None}):
                    pool = pools.setdefault(classes.get(label, str(label)), {})
                    pool.setdefault((split if both else "", group), []).append(text)
                    if classes and not both and all(sum(map(len, pools[name].values())) > sum(sizes)
                                                    for name in classes.values()):
                        break
    shuffler, drawn = random.Random(seed), {}
    for name in [name for classes in sources.values() for name in dict.fromkeys(classes.values())] or sorted(pools):
        groups = [[pools[name][key] for key in sorted(pools[name]) if key[0] == split]
                  for split in ("train", "test", "")]
        for texts in groups[2]:
            shuffler.shuffle(texts)
        drawn[name] = (groups[2][0][:sizes[0]], groups[2][0][sizes[0]:sum(sizes)]) if groups[2] else tuple(
            _sample(of_split, n, seed) for of_split, n in zip(groups, sizes))
    return drawn


def _sample(groups, n, seed):
    """n texts, as many of each group, as pandas samples them; [] where a group has not so many."""
    parts = [n // len(groups) + (i < n % len(groups)) for i in range(len(groups))]
    if any(len(group) < part for group, part in zip(groups, parts)):
        return []
    return [group[i] for group, part in zip(groups, parts)
            for i in np.random.RandomState(seed).choice(len(group), part, replace=False)]


def binary_task(labels, train, c, rng):
    """Class c against the rest: (train indices, their y, test indices, their y), y = 1 for c: the whole class and as
    many of the others, drawn evenly from each."""
    def part(of):
        positive, *others = (np.flatnonzero(of & (labels == k)) for k in (c, *np.setdiff1d(labels, c)))
        each = -(-len(positive) // len(others))
        negative = rng.permutation(np.concatenate([rng.permutation(other)[:each] for other in others]))
        index = np.concatenate([positive, negative[:len(positive)]])
        return index, (labels[index] == c).astype(int)

    return *part(train), *part(~train)


def nearest_domains(windows, domain, n=3):
    """Names of the n domains whose training tokens' TF-IDF vectors have the highest cosine to a domain's; domains with
    fewer than 5 training windows are left out."""
    from sklearn.feature_extraction.text import TfidfTransformer
    train = np.arange(windows.n_train)
    names, of, sizes = np.unique(windows.domain_of(train), return_inverse=True, return_counts=True)
    valid = windows.valid(train)
    tokens = windows.tokens[train][valid]
    counts = csr_array((np.ones(len(tokens)), (np.repeat(of, valid.sum(1)), tokens)))[sizes >= 5]
    names = names[sizes >= 5]
    if domain not in names:
        raise DataError(f"The domain {domain!r} has fewer than 5 training windows, unlike {', '.join(names)}.")
    vectors = TfidfTransformer().fit_transform(counts)     # of length 1
    cosines = (vectors @ vectors[names == domain].T).toarray()[:, 0]
    return [str(name) for name in names[np.argsort(-cosines, kind="stable")] if name != domain][:n]


class Clozes(NamedTuple):
    """Four-way questions: which token follows."""
    window: np.ndarray      # [n] id
    position: np.ndarray    # [n] of the last token that is given
    options: np.ndarray     # [n, 4] tokens, the right one first

    def answered(self, ids, logp):
        """Whether each cloze of the windows `ids` is answered rightly by logp [len(ids), seq, vocabulary], of the
        tokens that follow positions from 1."""
        here = np.flatnonzero(np.isin(self.window, ids))
        row, at = np.searchsorted(ids, self.window[here]), self.position[here] - 1
        return logp[row[:, None], at[:, None], self.options[here]].cpu().numpy().argmax(1) == 0

    def scores(self, parts):
        """Mean loss of each window, and whether each cloze of them is answered rightly; of windows in parts (ids,
        log-probabilities as in `answered`, losses [len(ids), seq], NaN at padding)."""
        found = [(np.nanmean(loss, 1), self.answered(ids, logp)) for ids, logp, loss in parts]
        losses, right = map(np.concatenate, zip(*found))
        return losses, right


def clozes(windows, ids, strings, seed=0):
    """Clozes of the windows `ids`, at most 8 each, where a name begins or goes on with a token that is not among the 32
    before it. strings: token -> text.

    The wrong options are such tokens too, with a space in front or without as the right one, about as frequent in the
    domain's training windows: up to 20 ranks and a factor of 2 away. How many of them are the more frequent ones is
    drawn evenly from 0 to 3, so that frequency cannot answer."""
    rng, found = np.random.default_rng(seed), []
    kinds = np.array([0 if not re.fullmatch(r" ?_*[^\W\d_]\w*", text) or keyword.iskeyword(text.strip())
                      else 1 + text.startswith(" ") for text in strings])
    domains = windows.domain_of(np.arange(len(windows.tokens)))
    for domain in np.unique(domains[ids]):
        train = np.flatnonzero(domains[:windows.n_train] == domain)
        tokens = windows.tokens[train][windows.valid(train)]
        counts = np.bincount(tokens, minlength=len(strings))[:len(strings)]
        order = rng.permutation(len(strings))              # among equals at random
        order = order[np.argsort(counts[order], kind="stable")]
        ranked = {kind: order[(kinds[order] == kind) & (counts[order] > 0)] for kind in (1, 2)}
        rank = {int(token): i for members in ranked.values() for i, token in enumerate(members)}
        for window in np.asarray(ids)[domains[ids] == domain]:
            tokens, asked = windows.tokens[window], []
            for position in rng.permutation(np.arange(33, windows.lengths[window] - 1)):
                right, recent = int(tokens[position + 1]), tokens[position - 31:position + 1]
                if right in recent or right not in rank:
                    continue
                members, at = ranked[kinds[right]], rank[right]
                below, above = (part[~np.isin(part, recent) & (counts[part] <= 2 * counts[right])
                                     & (counts[right] <= 2 * counts[part])]
                                for part in (members[max(at - 20, 0):at], members[at + 1:at + 21]))
                if min(len(below), len(above)) >= 3 and len(asked) < 8:
                    more = rng.integers(4)
                    asked.append((window, position, right, *rng.choice(above, more, replace=False),
                                  *rng.choice(below, 3 - more, replace=False)))
            found += sorted(asked)
    table = np.array(sorted(found), dtype=np.int64).reshape(-1, 6)
    return Clozes(table[:, 0], table[:, 1], table[:, 2:])


# ---------------------------------------------------------------------------------------------------------------------
# Synthetic activations with known features
# ---------------------------------------------------------------------------------------------------------------------
TASKS = ("arithmetic", "boolean", "grammar")
PRIMITIVES, COMPOSED, DIMENSIONS, NOISE = 64, 128, 96, 0.1
AMOUNTS = (0.5, 1.5)         # of an active primitive, uniform
ACTIVE = (2, 3, 4)           # primitives of a token
PLANTED = 0.5                # of the tokens hold a pair that makes something; others may by chance
NEVER_TOGETHER = 0.2         # of the pairs in training


class Wiring(NamedTuple):
    """Which primitives make what: 256 pairs make 128 compositions, two pairs each."""
    pairs: np.ndarray       # [256, 2] primitives
    made: np.ndarray        # [256] composition of each pair
    seen: np.ndarray        # [256] False: never together in training; the other pair of that composition is
    apart: np.ndarray       # [64, 64] True: exclude each other
    words: list             # [64] text of each primitive
    joint: list             # [256] text of each pair

    def table(self):
        """[64, 64] pair of two primitives, -1 where they make nothing."""
        found = np.full((PRIMITIVES, PRIMITIVES), -1)
        found[tuple(self.pairs.T)] = found[tuple(self.pairs.T[::-1])] = np.arange(len(self.pairs))
        return found


def wiring(task, seed=0):
    """arithmetic: a and 4 b, a and b below 32, make their sum modulo 128, of eight such pairs two. boolean: literals of
    32 variables, each variable with four others, make the exclusive or of the two variables, by name and value.
    grammar: one of 16 nouns and of 16 verbs, each with eight others, make the clause they say where both are singular
    or both plural, and nothing where they disagree."""
    rng, found, apart = np.random.default_rng(seed), [], np.zeros((PRIMITIVES, PRIMITIVES), bool)
    first, second, half = rng.permutation(32), rng.permutation(16), PRIMITIVES // 2
    if task == "arithmetic":
        for total in range(COMPOSED):
            for m in rng.permutation(8)[:2]:                # a = total % 4 + 4 m
                found.append((total % 4 + 4 * m, half + (total // 4 - m) % 32, total))
        words = [f"{n}" for n in range(half)] + [f"{4 * n}" for n in range(half)]
        joint = [f"{words[i]} + {words[j]} = {made}" for i, j, made in found]
    elif task == "boolean":
        steps = [(first[v], first[(v + step) % 32]) for v in range(32) for step in (1, 5)]
        for n, (p, q) in enumerate(steps):
            found += [(2 * p + x, 2 * q + y, 2 * n + (x ^ y)) for x in (0, 1) for y in (0, 1)]
        for v in range(32):
            apart[2 * v, 2 * v + 1] = apart[2 * v + 1, 2 * v] = True
        words = [f"v{n // 2} is {bool(n % 2)}" for n in range(PRIMITIVES)]
        joint = [f"{words[i]} and {words[j]}" for i, j, _ in found]
    elif task == "grammar":
        for n, v in enumerate((n, second[(n + step) % 16]) for n in range(16) for step in range(8)):
            found += [(2 * v[0] + number, half + 2 * v[1] + number, n) for number in (0, 1)]
        words = [noun + end for noun in NOUNS for end in ("", "s")] + [verb + end for verb in VERBS for end in ("s", "")]
        joint = [f"the {words[i]} {words[j]}" for i, j, _ in found]
    else:
        raise DataError(f"no task {task!r}: {', '.join(TASKS)}.")
    *pairs, made = np.array(found).T
    lost = np.array([rng.choice(np.flatnonzero(made == c)) for c in range(COMPOSED)])
    seen = np.ones(len(made), bool)
    seen[rng.permutation(lost)[:round(NEVER_TOGETHER * len(made))]] = False
    return Wiring(np.stack(pairs, 1), made, seen, apart, words, joint)


NOUNS = ("cat dog bird horse child river train star king writer garden clock ship lamp friend song").split()
VERBS = ("run sleep turn stop shine break move fall wait change grow stand speak return start end").split()


def combinations(wired, n, rng, training):
    """Amounts of the primitives in n tokens, [n, 64]; in training without the pairs that are never together."""
    table, pool = wired.table(), np.flatnonzero(wired.seen | (not training))
    wrong = wired.apart | (training & (table >= 0) & ~wired.seen[table])
    active, todo = np.zeros((n, PRIMITIVES), bool), np.arange(n)
    while len(todo):
        order = rng.random((len(todo), PRIMITIVES))
        planted = np.flatnonzero(rng.random(len(todo)) < PLANTED)
        order[planted[:, None], wired.pairs[rng.choice(pool, len(planted))]] = -1
        rank = order.argsort(1).argsort(1)
        active[todo] = rank < rng.choice(ACTIVE, len(todo))[:, None]
        todo = todo[((active[todo] @ wrong.astype(np.float32)) * active[todo]).sum(1) > 0]
    return np.where(active, rng.uniform(*AMOUNTS, active.shape), 0.0).astype(np.float32)


class Synthetic(NamedTuple):
    """x = sum_i a_i d_i + rho sum_ij sqrt(a_i a_j) d_c(i, j) + noise, windows of it, and what made it."""
    x: np.ndarray           # [window, context_length, 96] float32; the first position, BOS, is 0
    windows: Windows        # the training ones, then DEV, then as many of TEST
    amounts: np.ndarray     # [window * (context_length - 1), 64] primitives
    directions: np.ndarray  # [64 + 128, 96] of primitives, then compositions; unit norm
    wired: Wiring
    rho: float

    def composed(self):
        """Amounts of the compositions, [token, 128]."""
        (first, second), found = self.wired.pairs.T, np.zeros((len(self.amounts), COMPOSED), np.float32)
        np.add.at(found.T, self.wired.made, np.sqrt(self.amounts[:, first] * self.amounts[:, second]).T)
        return found

    def parts(self):
        """Tokens of training, DEV, TEST: three slices."""
        seq = self.windows.tokens.shape[1] - 1
        a, end = self.windows.n_train * seq, len(self.amounts)
        middle = a + (end - a) // seq // 2 * seq
        return slice(0, a), slice(a, middle), slice(middle, end)

    def flat_x(self):
        return self.x[:, 1:].reshape(-1, DIMENSIONS)


def synthetic(task, rho, context_length, n_tokens, forget="", seed=0):
    """Synthetic of about n_tokens training tokens and half as many for each of DEV and TEST. Every token is drawn by
    itself; its id is 1 + its largest primitive; every second document is of the domain `forget`."""
    rng, wired, seq = np.random.default_rng(seed), wiring(task, seed), context_length - 1
    n_train = max(8, n_tokens // seq)
    n_held = 2 * max(4, n_tokens // seq // 2)
    directions = normalize(rng.standard_normal((PRIMITIVES + COMPOSED, DIMENSIONS)))
    amounts = np.concatenate([combinations(wired, n_train * seq, rng, True),
                              combinations(wired, n_held * seq, rng, False)])
    n, tokens = n_train + n_held, np.zeros((n_train + n_held, context_length), np.int32)
    tokens[:, 1:] = 1 + amounts.argmax(1).reshape(n, seq)
    windows = Windows(tokens, np.full(n, context_length), np.arange(n), n_train, [f"{task}#{i}" for i in range(n)],
                      [forget if i % 2 else "other" for i in range(n)])
    made = Synthetic(np.zeros((n, context_length, DIMENSIONS), np.float32), windows, amounts, directions, wired, rho)
    x = amounts @ directions[:PRIMITIVES] + rho * made.composed() @ directions[PRIMITIVES:]
    made.x[:, 1:] = (x + NOISE * rng.standard_normal(x.shape)).reshape(n, seq, -1)
    return made


def aurocs(values, positive):
    """AUROC of each column of non-negative values [n, d], sparse in n, for positive [n]. A column that fires on less
    than a fifth of the positives, for which it is at most .6, counts as .5."""
    found, n = np.full(values.shape[1], 0.5), positive.sum()
    often = np.flatnonzero((values[positive] > 0).mean(0) >= 0.2)
    ranks = rankdata(values[:, often], axis=0)[positive].sum(0)
    found[often] = (ranks - n * (n + 1) / 2) / (n * (len(positive) - n))
    return found


def recovery(truth, dev, test, dictionary):
    """How well latents dev and test [token, d_sae] >= 0 of truth's DEV and TEST, and a dictionary [d_sae, 96], match the
    truth: mean cosine with the true directions under the best assignment (Hungarian); mean AUROC, on TEST, of the latent
    that is best on DEV: of primitives, and of pairs against tokens with exactly one of the two, for pairs seen together
    in training and pairs that never were ("unseen"); and the smaller of the two latents of its primitives instead
    ("minimum"). One latent that is one of the two primitives has .75 there."""
    cosine = truth.directions @ normalize(plain(dictionary)).T
    rows, columns = linear_sum_assignment(-cosine)
    found = np.zeros(len(cosine))                           # 0 for what no row is left for
    found[rows] = cosine[rows, columns]
    PATIENCE.renew()
    scores = {"cosine_primitives": found[:PRIMITIVES].mean(), "cosine_compositions": found[PRIMITIVES:].mean()}
    on = [truth.amounts[part] > 0 for part in truth.parts()[1:]]
    few = DataError("too few synthetic tokens: no pair of primitives is there often enough.")
    if not all(part.any(0).all() for part in on):
        raise few
    best = [aurocs(dev, on[0][:, i]).argmax() for i in range(PRIMITIVES)]
    scores["auroc_primitives"] = np.mean([roc_auc_score(on[1][:, i], test[:, b]) for i, b in enumerate(best)])
    rows = []
    for i, j in truth.wired.pairs:
        one = [part[:, i] | part[:, j] for part in on]
        both = [(part[:, i] & part[:, j])[rows_] for part, rows_ in zip(on, one)]
        if min(part.sum() for part in both) < 3:
            rows.append((np.nan, np.nan, -1))
            continue
        chosen = aurocs(dev[one[0]], both[0]).argmax()
        least = np.minimum(test[one[1], best[i]], test[one[1], best[j]])
        rows.append((roc_auc_score(both[1], test[one[1], chosen]), roc_auc_score(both[1], least), chosen))
    rows = np.array(rows)
    for name, part in (("seen", truth.wired.seen), ("unseen", ~truth.wired.seen)):
        if np.isnan(rows[part, 0]).all():
            raise few
        scores[f"auroc_{name}"], scores[f"minimum_{name}"] = np.nanmean(rows[part, :2], 0)
    return scores


def strongest(values, k):
    """Values [n, d] >= 0 with all but the k largest of each row set to 0."""
    least = np.partition(values, -k, axis=1)[:, -k, None]
    return np.where(values >= least, values, 0.0)


def signed(values):  # [n, d] -> [n, 2 d] >= 0
    return np.concatenate([np.maximum(values, 0), np.maximum(-values, 0)], 1)


def recovery_baselines(truth, k, d_sae, seed=0):
    """`recovery` of PCA (the k largest signed components of a token), of NMF of [x+, x-] with as many components as
    there are true features (the k largest), and of a random dictionary of d_sae rows, as TopK reads it."""
    train, *parts = (truth.flat_x()[part] for part in truth.parts())
    pca = PCA(DIMENSIONS, random_state=seed).fit(train)
    nmf = MiniBatchNMF(PRIMITIVES + COMPOSED, init="nndsvda", batch_size=1024, max_iter=20, random_state=seed)
    nmf.fit(signed(train[:8192]))
    random = normalize(np.random.default_rng((seed, 1)).standard_normal((d_sae, DIMENSIONS)))
    codes = {"pca": (lambda x: signed(pca.transform(x)), np.concatenate([pca.components_, -pca.components_])),
             "nmf": (lambda x: nmf.transform(signed(x)), nmf.components_[:, :DIMENSIONS] - nmf.components_[:, DIMENSIONS:]),
             "random": (lambda x: np.maximum((x - train.mean(0)) @ random.T, 0), random)}
    return {name: recovery(truth, *(strongest(code(part), k) for part in parts), dictionary)
            for name, (code, dictionary) in codes.items()}


class TaskText(NamedTuple):
    """Sentences of a task as windows of tokens, and what is in them."""
    windows: Windows
    primitives: np.ndarray  # [window, context_length] primitive that a token ends, or -1
    pairs: np.ndarray       # [window, context_length] pair that a token ends, or -1


def task_text(task, tokenizer, context_length, n_windows, seed=0):
    """TaskText: each window a run of sentences, half of them of a random pair of the task, each after the other."""
    rng, wired, bos = np.random.default_rng(seed), wiring(task, seed), beginning(tokenizer)
    tokens, table = np.full((n_windows, context_length), bos, np.int32), wired.table()
    primitives, made = np.full((2, n_windows, context_length), -1)
    lengths = np.empty(n_windows, int)
    for row in range(n_windows):
        text, ends = "", []                                 # (character, primitive or -1, pair or -1)
        while len(text) < 5 * context_length:
            if rng.random() < 0.5:
                pair = rng.integers(len(wired.pairs))
                i, j = wired.pairs[pair]
            else:
                i, j = rng.integers(0, PRIMITIVES // 2), rng.integers(PRIMITIVES // 2, PRIMITIVES)
                pair = table[i, j]
            form = {"arithmetic": "{} + {} ", "boolean": "{} and {} ", "grammar": "the {} {} "}[task]
            before, between, _ = form.split("{}")
            text += before + wired.words[i]
            ends.append((len(text), i, -1))
            text += between + wired.words[j]
            ends.append((len(text), j, pair))
            text += " . "
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, spans = encoded["input_ids"][:context_length - 1], encoded["offset_mapping"][:context_length - 1]
        tokens[row, 1:1 + len(ids)], lengths[row] = ids, 1 + len(ids)
        last = [end for _, end in spans]
        for end, primitive, pair in ends:
            at = bisect_left(last, end)                     # the first token that reaches the word's end
            if at < len(last):
                primitives[row, 1 + at], made[row, 1 + at] = primitive, pair
    windows = Windows(tokens, lengths, np.arange(n_windows), n_windows // 2,
                      [f"{task}#{i}" for i in range(n_windows)], [task] * n_windows)
    return TaskText(windows, primitives, made)


# ---------------------------------------------------------------------------------------------------------------------
# What parts of a composition do
# ---------------------------------------------------------------------------------------------------------------------
def dropped(compose, f, fires, rng, draws=8):
    """What each composition of a token loses where one of its features is dropped, or two.

    compose(f) gives compositions [n, d_c] of features f [n, k] >= 0; fires [n, d_c] are those that count. -> singles:
    (token, slot, composition, c(f) - c(f without slot)); pairs, `draws` at random of each token's active features:
    (token, slot, slot, the composition that interacts most, |c(f) - c(f\\i) - c(f\\j) + c(f\\ij)| of it)."""
    def without(*slots):
        left = f.copy()
        for slot in slots:
            left[row, slot] = 0
        return compose(left)

    whole, row, k = compose(f), np.arange(len(f)), f.shape[1]
    alone = np.stack([without(slot) for slot in range(k)], 1)
    token, slot, of = np.nonzero((f > 0)[:, :, None] & fires[:, None])
    singles = token, slot, of, (whole[token, of] - alone[token, slot, of]).astype(float)
    pairs = []
    for _ in range(draws):
        first, second = np.where(f > 0, rng.random(f.shape), -1).argsort(1)[:, -2:].T
        joint = np.abs(whole - alone[row, first] - alone[row, second] + without(first, second)) * fires
        most = joint.argmax(1)
        use = (f[row, first] > 0) & (f[row, second] > 0) & fires.any(1)
        pairs.append([part[use] for part in (row, first, second, most, joint[row, most].astype(float))])
    return singles, [np.concatenate(part) for part in zip(*pairs)]


def composition_scores(compose, ids, f, codes, attention, text, rng, least):
    """Metrics and curves of compositions, compose(f): features ids [n, k] with values f [n, k] of n tokens, text [n]; codes
    [n, d_c] after the bottleneck; attention [n, heads, k, k] between features, or None; `least`: see reuse."""
    device, (ids, f, codes) = f.device, (part.cpu().numpy() for part in (ids, f, codes))
    (token, slot, of, effect), pairs = dropped(
        lambda f: compose(torch.from_numpy(f).to(device)).cpu().numpy(), f, codes > 0, rng)
    metrics = {"compositions_per_token": (codes > 0).sum(1).mean(), "live_compositions": (codes > 0).any(0).mean()}
    if not len(token):                                      # the features take all of TARGET_L0
        return metrics, {}
    row, a, b, composition, interaction = pairs
    feature, first, second = ids[token, slot], ids[row, a], ids[row, b]
    found, took, random = reuse(token * codes.shape[1] + of, feature, of, effect, rng, least=least)
    metrics |= found
    if attention is not None:
        attention = attention.mean(1).cpu().numpy()
        seen = attention[row, a, b] + attention[row, b, a]
        metrics |= interaction_scores(first, second, seen, interaction)
    return metrics, {
        "patterns": patterns(codes, feature, of, effect, first, second, composition, interaction, text),
        "reuse": np.bincount(took), "reuse_null": np.mean([np.bincount(r, minlength=len(took)) for r in random], 0)[:40]}


def interaction_scores(first, second, attention, effect):
    """Whether attention tells which features act together. Of each instance [n] two features, the attention between them
    and the size of their interaction; by pair of features the means: Spearman's correlation of the two, and the AUROC
    of attention for the tenth of the pairs that interact most against as many pairs with like numbers of instances."""
    low, high = np.minimum(first, second), np.maximum(first, second)
    _, index, counts = np.unique(low * (high.max() + 1) + high, return_inverse=True, return_counts=True)
    attention, effect = (np.bincount(index, values) / counts for values in (attention, effect))
    if len(counts) < 20 or effect.max() == effect.min():    # none acts together with another
        return {"feature_pairs": len(counts)}
    chosen = np.argsort(-effect, kind="stable")[:len(effect) // 10]
    others = alike(counts, chosen)
    truth = np.arange(len(chosen) + len(others)) < len(chosen)
    return {"attention_spearman": spearmanr(attention, effect).statistic,
            "attention_auroc": roc_auc_score(truth, attention[np.concatenate([chosen, others])]), "feature_pairs": len(counts)}


def gini(values):
    """Gini coefficient of values [n] >= 0."""
    order = np.sort(values)
    n = len(order)
    return (2 * np.arange(1, n + 1) - n - 1) @ order / max(n * order.sum(), 1e-12)


def reuse(group, feature, composition, effect, rng, draws=50, least=5):
    """In how many compositions each feature takes part: in how many its ablation acts above the 95th percentile of what
    it is when effects are shuffled among the features of a token.

    Of each instance [n] its group (token and composition), feature, composition, effect; pairs of feature and
    composition with fewer than `least` instances are left out. -> metrics; the counts of features with any such pair;
    and of `draws` random bipartite graphs with as many edges the counts [draws, feature]."""
    edges, index, counts = np.unique(np.stack([feature, composition]), axis=1, return_inverse=True, return_counts=True)
    index, known = index.ravel(), counts >= least
    total, null = np.bincount(index, effect), []
    by_group = np.argsort(group, kind="stable")
    for _ in range(draws):
        order = np.lexsort((rng.random(len(group)), group))
        shuffled = np.empty_like(effect)
        shuffled[by_group] = effect[order]
        null.append(np.bincount(index, shuffled, len(counts)))
    acts = known & (total > np.quantile(null, 0.95, axis=0) + 1e-9 * np.abs(total).max())
    features, of = np.unique(edges[0, known], return_inverse=True)
    if not acts.any():
        return {"reuse_edges": 0.0}, np.zeros(1, int), np.zeros((1, 1), int)
    took = np.bincount(of, acts[known], len(features)).astype(int)
    random = np.array([np.bincount(rng.choice(of, took.sum(), replace=False), minlength=len(features))
                       for _ in range(draws)])
    ginis = [gini(row) for row in random]
    return {"reuse_mean": took.mean(), "reuse_gini": gini(took), "reuse_gini_null": np.mean(ginis),
            "reuse_gini_null_95": np.quantile(ginis, 0.95), "reused_fraction": (took > 1).mean(),
            "reuse_edges": acts.sum() / known.sum()}, took, random


def patterns(codes, feature, composition, effect, first, second, of, interaction, text, most=16):
    """What the `most` compositions of the largest total value are made of: {"compositions": ids; "features": the features
    that act most on them; "effects" [composition, feature]: mean change of it where the feature is dropped, over its mean
    value; "pairs": of each the three pairs of features with the largest mean interaction; "tokens": of each the tokens
    [str] where it is largest}. codes [token, d_c]; instances as of `reuse`, and of pairs."""
    top = np.argsort(-codes.sum(0), kind="stable")[:most]
    top = top[codes[:, top].sum(0) > 0]
    mean = codes.sum(0) / np.maximum((codes > 0).sum(0), 1)
    chosen = []
    for c in top:
        here = composition == c
        names, index = np.unique(feature[here], return_inverse=True)
        chosen += list(names[np.argsort(-np.bincount(index, effect[here]), kind="stable")[:2]])
    features = np.array(list(dict.fromkeys(chosen)))
    table, found = np.zeros((len(top), len(features))), []
    for row, c in zip(table, top):
        for column, name in enumerate(features):
            here = (composition == c) & (feature == name)
            row[column] = effect[here].mean() / mean[c] if here.any() else 0.0
        low, high = np.minimum(first, second)[of == c], np.maximum(first, second)[of == c]
        pairs, index = np.unique(np.stack([low, high]), axis=1, return_inverse=True)
        means = np.bincount(index.ravel(), interaction[of == c]) / np.maximum(np.bincount(index.ravel()), 1)
        found.append([(*pairs[:, i].tolist(), float(means[i])) for i in np.argsort(-means, kind="stable")[:3]])
    return {"compositions": top, "features": features, "effects": table.round(4), "pairs": found,
            "tokens": [[text[i] for i in np.argsort(-codes[:, c], kind="stable")[:5] if codes[i, c] > 0] for c in top]}


# ---------------------------------------------------------------------------------------------------------------------
# Several processes, threads beside the GPU
# ---------------------------------------------------------------------------------------------------------------------
class Ranks:
    """The processes of a torchrun, each with its share of every batch: `rank` of `size`. One process, and any within
    `alone`, is 0 of 1, and all of this does nothing."""
    rank, size = 0, 1

    def join(self):
        """Of a torchrun: meets the others, takes its GPU, and leaves stdout to rank 0."""
        size = int(os.environ.get("WORLD_SIZE", 1))
        if size == 1 or "MASTER_ADDR" not in os.environ:
            return
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=6))     # rank 0 evaluates alone
        self.rank, self.size = dist.get_rank(), size
        if self.rank:
            sys.stdout = open(os.devnull, "w")

    def leave(self):
        if self.size > 1:
            dist.destroy_process_group()

    @contextmanager
    def alone(self):
        before = self.rank, self.size
        self.rank, self.size = 0, 1
        try:
            yield
        finally:
            self.rank, self.size = before

    @contextmanager
    def first(self):
        """Rank 0 does what it does before the others."""
        if self.rank:
            dist.barrier()
        yield
        if self.size > 1 and not self.rank:
            dist.barrier()

    def share(self, ids):
        """This process's part of them."""
        if len(ids) < self.size:
            raise DataError(f"{len(ids)} windows a step for {self.size} processes: raise BATCH_TOKENS.")
        return ids[self.rank::self.size]

    def agree(self, value):
        """Rank 0's value."""
        if self.size > 1:
            dist.broadcast_object_list(found := [value], 0)
            return found[0]
        return value

    def total(self, value):
        """Sum over the processes of a tensor or a number."""
        if self.size == 1:
            return value
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dist.all_reduce(total := torch.as_tensor(value, device=device).clone())
        return total

    def reduce(self, sae, n, fired):
        """Gradients as of the whole batch, of which this process saw n tokens; running means over the processes -> n and
        `fired` [d_sae] of all. In one exchange: each has its price."""
        if self.size == 1:
            return n, fired

        def stored(values):                                     # a view, as they lie in memory
            return (values if values.is_contiguous() else values.mT).view(-1)

        parameters = [p for p in sae.parameters() if p.requires_grad]
        buffers = [buffer for buffer in sae.buffers() if buffer.is_floating_point()]
        known = torch.tensor([float(n), *(p.grad is not None for p in parameters)], device=fired.device)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.mul_(n) for p in parameters]
        parts = [known, fired, *map(stored, gradients), *map(stored, buffers)]
        dist.all_reduce(whole := torch.cat(parts))
        (n, *known), fired, *sums = whole.split([part.numel() for part in parts])
        for value, total in zip(gradients, sums):
            stored(value).copy_(total).div_(n)
        for p, grad, there in zip(parameters, gradients, known):
            p.grad = grad if there else None
        for buffer, total in zip(buffers, sums[len(parameters):]):
            stored(buffer).copy_(total).div_(self.size)
        return n.long(), fired.long()

    def same(self, sae):
        """All as rank 0 has it."""
        if self.size > 1:
            for value in (*sae.parameters(), *sae.buffers()):
                dist.broadcast(value.data, 0)


RANKS = Ranks()


@contextmanager
def tf32():
    """Products of fp32 matrices with 10 bits of mantissa, on a GPU."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def ahead(make, slow):
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


def spelled(n_bytes):
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes > 1e8 else f"{n_bytes / 1e6:.0f} MB"


def memory_plan(config, store, expansion, batch_tokens, device):
    """What will take memory, in one line; where a GPU has too little, what to lower and to what."""
    d_in, d_sae, lm = store.d_in, round(expansion * store.d_in), model_bytes(config, store.dtype)
    sae, step = 16 * (2 * d_in + 2) * d_sae, 4 * batch_tokens * (3 * d_sae + 8 * d_in)
    activations = store.windows.tokens.size * d_in * store.dtype.itemsize
    text = (f"memory: model {spelled(lm)}, SAE with its optimiser {spelled(sae)}, a training step {spelled(step)}; "
            f"activations {spelled(activations)} on disk")
    if device != "cuda":
        return text
    free = torch.cuda.mem_get_info()[0]
    kept_there = activations < (free - lm) // 2
    room = free - lm - activations * kept_there
    text += f", {'kept on the GPU' if kept_there else 'read as they are needed'}; {spelled(free)} free"
    if sae + step > room > sae:
        text += f". Too much: BATCH_TOKENS = {max(1, int(batch_tokens * (room - sae) / step))} would fit"
    elif sae + step > room:
        text += f". Too much: EXPANSION = {expansion * max(room, 0) / (sae + step):.2g} would fit"
    return text


# ---------------------------------------------------------------------------------------------------------------------
# Files and books of a run
# ---------------------------------------------------------------------------------------------------------------------
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
        raise DataError(f"{folder} cannot be written ({error.strerror or error}): {advice}.") from None


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
def resuming(folder, key):
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
def publishing(out_dir, template):
    """A folder that takes out_dir's place only when all went well; files of an earlier run that
    this one does not write (ratings) are kept. Rank 0 alone publishes."""
    if RANKS.rank:
        yield None
        DONE.add("results")
        return
    if out_dir == template or out_dir in template.parents or out_dir.exists() and not out_dir.is_dir():
        raise DataError(f"--out_dir={out_dir} must be a folder for the results alone.")
    partial, old = (out_dir.with_name(out_dir.name + end) for end in (".partial", ".replaced"))
    if old.exists() and not out_dir.exists():        # killed between the two renames below
        os.replace(old, out_dir)
    for rest in (partial, old):
        shutil.rmtree(rest, ignore_errors=True)
    make_folder(partial, "choose another --out_dir")
    try:
        yield partial
        if not (partial / "final_info.json").exists():
            raise DataError("final_info.json was not written: `main` must call write_results(partial, ...).")
        for kept in out_dir.iterdir() if out_dir.exists() else ():
            if not (partial / kept.name).exists():
                (shutil.copytree if kept.is_dir() else shutil.copy2)(kept, partial / kept.name)
        if out_dir.exists():
            os.replace(out_dir, old)
        os.replace(partial, out_dir)
        DONE.add("results")
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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


def shards(folder, n_rows, size):
    """The files of a table of n_rows rows, `size` in each."""
    return [Shard(folder / f"{i:09d}.bin", i, min(size, n_rows - i)) for i in range(0, n_rows, size)]


@contextmanager
def missing_shards(shards, row_bytes):
    """The shards that are not there whole, for which there is room, or this process's part; under a lock that other runs
    wait for."""
    folder, began, missing = shards[0].path.parent, time.time(), []
    with nullcontext() if RANKS.rank else locked(folder / "lock"):
        if not RANKS.rank:
            for left in folder.glob("*.partial"):
                left.unlink()
            missing = [shard for shard in shards if not intact(shard.path)]
            if missing:
                check_room(folder, sum(shard.rows for shard in missing) * row_bytes)
        missing = RANKS.agree(missing)
        try:
            yield tqdm(missing[RANKS.rank::RANKS.size], "collecting", disable=not missing or None)
            written()
        finally:                                            # no thread writes once the lock is free
            while WRITING:
                WRITING.pop().exception()
        RANKS.total(0)                                      # all have come this far
        if missing:
            size = sum(shard.rows for shard in missing) * row_bytes
            print(f"collected {size / 1e9:.2f} GB in {time.time() - began:.0f} s", flush=True)


def opened(shards, row_shape, dtype, device):
    """The tables of the shards, [rows, *row_shape], not read before they are used: on a GPU where they fill at most half of
    its free memory."""
    row, n_rows = math.prod(row_shape), sum(shard.rows for shard in shards)
    room = torch.cuda.mem_get_info()[0] // 2 if device == "cuda" else 0
    place = device if n_rows * row * dtype.itemsize < room else "cpu"
    maps = (torch.from_file(str(shard.path), size=shard.rows * row, dtype=dtype) for shard in shards)
    with unbounded_memory():
        return [part.view(-1, *row_shape).to(place) for part in maps]


WRITERS, WRITING = ThreadPoolExecutor(3), deque()      # the threads, and what they are still at


def write(path, parts):
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
                        raise DataError("non-finite activations: the model overflows before LAYER ends. Take MODEL_DTYPE = torch.float32, or "
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
    written(2)


def written(left=0):
    """Waits until at most so many files are not whole yet."""
    while len(WRITING) > left:
        WRITING[0].result()
        WRITING.popleft()


def kept(path, compute):
    """compute() as it stands in the file at `path`, written where there is none."""
    if not path.exists():
        PATIENCE.renew()
        found = compute()
        PATIENCE.renew()
        with replacing(path) as partial:
            partial.write_text(json.dumps(found))
    return json.loads(path.read_text())


def plain(value):
    """Arrays and what holds them as lists for JSON; NaN (no token was there) becomes None."""
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    value = value.tolist() if hasattr(value, "tolist") else value  # arrays of numpy or torch
    if isinstance(value, list):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


PLAIN_WEIGHTS = {"W_enc", "b_enc", "W_dec", "b_dec"}
SAELENS = {"standard": PLAIN_WEIGHTS, "topk": PLAIN_WEIGHTS, "jumprelu": PLAIN_WEIGHTS | {"threshold"},
           "gated": {"W_enc", "W_dec", "b_dec", "b_gate", "r_mag", "b_mag"}}   # the architectures that it knows
SAELENS_OTHERS = {"abstopk", "matching_pursuit", "temporal", "transcoder", "skip_transcoder", "jumprelu_transcoder",
                  "jumprelu_skip_transcoder"}                           # and those whose equations are none of ours


def saelens_latents(weights, architecture, k, x):
    """What SAELens would make of x [..., d_in] with a run's weights: [..., d_sae]."""
    pre = (x - weights["b_dec"]) @ weights["W_enc"]
    if architecture == "gated":
        return torch.relu(weights["r_mag"].exp() * pre + weights["b_mag"]) * (pre + weights["b_gate"] > 0)
    pre = pre + weights["b_enc"]
    if architecture == "topk":
        values, ids = pre.topk(k)
        return torch.zeros_like(pre).scatter(-1, ids, torch.relu(values))
    return torch.relu(pre) * (pre > weights.get("threshold", 0.0))


def save_sae(folder, weights, architecture, k, metadata):
    """SAELens's two files, of weights {name: tensor} that take the model's own activations."""
    if architecture in SAELENS_OTHERS:
        raise DataError(f"architecture = {architecture!r} is another SAE of SAELens's: give the class a name of its own.")
    if architecture in SAELENS and (others := sorted(set(weights) ^ SAELENS[architecture])):
        raise DataError(f"architecture = {architecture!r} is SAELens's, which knows {sorted(SAELENS[architecture])}; {others} "
                        "differ. Give the class an `architecture` of its own.")
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().float().cpu().contiguous() for name, value in weights.items()}
    d_in, d_sae = len(weights.get("lower.W_enc", weights["W_enc"])), len(weights["W_dec"])
    metadata = metadata | {"sae_lens_version": "6.54.12"}           # of the layout; without it SAELens drops the metadata
    cfg = {"architecture": architecture, "d_in": d_in, "d_sae": d_sae, "dtype": "float32", "device": "cpu",
           "apply_b_dec_to_input": True, "metadata": metadata, "normalize_activations": "none", "reshape_activations": "none"}
    if architecture == "topk":
        cfg |= {"k": k, "rescale_acts_by_decoder_norm": False}
    save_file(weights, folder / "sae_weights.safetensors")
    (folder / "sae_weights.safetensors").chmod(0o644)               # safetensors makes it readable for its owner alone
    (folder / "cfg.json").write_text(json.dumps(cfg, indent=1))


def steps_left(steps, step):
    """Of each stage's steps those to come, where `step` are done."""
    return [int(min(n, max(0, end - step))) for n, end in zip(steps, np.cumsum(steps))]


def fit_to_deadline(steps, step, seconds, deadline):
    """Steps of each stage, of which `step` are done; those to come, of so many `seconds` each, shrink in proportion to end
    before `deadline`."""
    left = steps_left(steps, step)
    need, have = sum(n * s for n, s in zip(left, seconds)), max(deadline - time.time(), 0.0)
    if need <= have:
        return steps
    return [n - l + max(int(l > 0), int(l * have / need * 0.97)) for n, l in zip(steps, left)]


class Progress:
    """A bar on a terminal; elsewhere a line every 15 seconds."""

    def __init__(self, total, done):
        self.bar, self.said = tqdm(total=total, initial=done, disable=None), time.time()

    def update(self, what, values):
        self.bar.update()
        if self.bar.disable and time.time() - self.said > 15:
            self.said = time.time()
            print(f"  {what}", *(f"{name} {value:.4g}" for name, value in values.items()), flush=True)


class Plan:
    """A training's books: `step` of the `steps` of each stage, fewer than `planned` where the forecast passes the deadline,
    and the log."""

    def __init__(self, stages, per_epoch):
        self.stages, self.i, self.step, self.log = stages, 0, 0, {}
        self.planned = self.steps = [round(stage.epochs * per_epoch) for stage in stages]
        if 0 in self.planned:
            raise DataError(f"stage {stages[self.planned.index(0)].name!r} gets no step: raise TRAIN_TOKENS or EPOCHS_SCALE, "
                            "or lower BATCH_TOKENS.")

    def state_dict(self):
        return {"step": self.step, "steps": self.steps, "log": self.log}

    def load_state_dict(self, state):
        self.step, self.steps, self.log = state["step"], state["steps"], state["log"]

    def begin(self, what, seconds, deadline):
        """The clock runs: a step of each stage takes so many `seconds` at first."""
        self.seconds, self.deadline, self.paced = seconds, deadline, False
        if not self.step:
            self.steps = RANKS.agree(fit_to_deadline(self.planned, 0, seconds, deadline))
        PATIENCE.renew()
        left, carrying = steps_left(self.steps, self.step), f"carrying on at step {self.step}, " if self.step else ""
        minutes = sum(n * s for n, s in zip(left, seconds)) / 60
        print(f"{what}: {carrying}about {minutes:.1f} min for {sum(left):,} steps", flush=True)
        self.progress, self.saved = Progress(sum(self.steps), self.step), time.time()
        self.since = self.saved, self.step

    def steps_of(self, i):
        """Yields (step, the stage's progress) for each step of stage i that is still to do; `advance` counts it."""
        self.i, first = i, sum(self.steps[:i])
        while self.step < first + self.steps[i]:
            yield self.step, (self.step - first) / self.steps[i]

    def advance(self, losses):
        self.step += 1
        self.progress.update(f"{self.stages[self.i].name}: step {self.step}/{sum(self.steps)}", losses)

    def at(self, every):
        """Whether so many steps have passed again, or all."""
        return self.step % every == 0 or self.step == sum(self.steps)

    def due(self, seconds):
        """Whether as much time has passed since this was last so, or all steps are done."""
        if time.time() - self.saved <= seconds and self.step < sum(self.steps):
            return False
        self.saved = time.time()
        return True

    def append(self, **row):
        """Appends each value to the list of its name in the log; a table's values, to those in the table of its name, as
        long as the list of steps: None where there was no value."""
        for name, value in row.items():
            if not isinstance(value, dict):
                self.log.setdefault(name, []).append(value)
                continue
            table = self.log.setdefault(name, {})
            for key in table | value:
                table.setdefault(key, [None] * (len(self.log["step"]) - 1)).append(value.get(key))

    def record(self, losses, dead, followed):
        """Appends to the log; the pace since the last time corrects the forecast. A loss that is not finite ends the run."""
        PATIENCE.renew()
        values = {name: (RANKS.total(loss) / RANKS.size).item() for name, loss in losses.items()}
        if wrong := [f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)]:
            raise DataError(f"step {self.step} of stage {self.stages[self.i].name!r}: {', '.join(wrong)}. Look for a log or a "
                            "division by zero in `losses`, or lower LEARNING_RATE.")
        self.append(step=self.step, l0=values.pop("l0"), dead_fraction=dead.float().mean().item(), losses=values,
                    parameters={name: single(value, f"parameter of interest {name!r}") for name, value in followed.items()})
        (began, first), now = self.since, time.time()
        if self.paced:                      # what comes first is slow
            pace = (now - began) / (self.step - first) / self.seconds[self.i]
            self.seconds = [s * pace ** 0.3 for s in self.seconds]
        self.paced, self.since = True, (now, self.step)
        self.steps = RANKS.agree(fit_to_deadline(self.steps, self.step, self.seconds, self.deadline))

    def finished(self):
        """The whole log, steps planned and done."""
        starts = np.cumsum([0] + self.steps[:-1]).tolist()
        weighed = sorted({loss for stage in self.stages for loss in stage.weights})
        return (self.log | {"stage_starts": starts, "stages": [stage.name for stage in self.stages], "weighed": weighed},
                self.planned, self.steps)


def save_state(path, parts):
    """state_dict() of each of parts {name: part}, in one file, which rank 0 writes."""
    if RANKS.rank:
        return
    with replacing(path) as partial:
        content = io.BytesIO()          # torch does not tell a full disk
        torch.save({name: part.state_dict() for name, part in parts.items()}, content)
        partial.write_bytes(content.getbuffer())


def load_state(path, parts):
    """What save_state wrote, where it did, into the parts."""
    state = torch.load(path, weights_only=True) if path.exists() else {}
    for name in state:
        parts[name].load_state_dict(state[name])


def evaluated(evaluation, run):
    """Its result as a dict; the SAE is as before it."""
    PATIENCE.renew()
    before = copy.deepcopy(run.sae.state_dict())
    result, after = evaluation(run), run.sae.state_dict()
    changed = [name for name, value in before.items() if not torch.equal(value, after[name])]
    if changed or run.sae.training:
        what = f"changes {changed} of the SAE" if changed else "leaves the SAE in training mode"
        raise DataError(f"{evaluation.__name__} {what}: it must work on copy.deepcopy(run.sae).")
    if not hasattr(result, "_asdict"):
        raise DataError(f"{evaluation.__name__} returns a {type(result).__name__}, wanted Result(metrics, curves, per_sequence).")
    metrics = {key: single(value, f"metric {key!r} of {evaluation.__name__}") for key, value in result.metrics.items()}
    return {"metrics": metrics, "curves": plain(result.curves), "per_sequence": plain(result.per_sequence)}


def single(value, name):
    """A finite float."""
    with suppress(TypeError, ValueError, RuntimeError):
        if math.isfinite(number := float(value)):
            return number
    shape = f" of shape {(*value.shape,)}" if hasattr(value, "shape") else ""
    raise DataError(f"{name} is {value if isinstance(value, float) else type(value).__name__ + shape}, wanted one finite number.")


def summarised(per_seed, headlines):
    """final_info.json's entries: of results {evaluation: {"metrics", "curves", "per_sequence"}} of each seed the
    means, the headlines apart; from two seeds on standard errors, std(ddof=1) / sqrt(seeds)."""
    info = {}
    for name in per_seed[0]:
        results = [seed[name] for seed in per_seed]
        common = [key for key in results[0]["metrics"] if all(key in r["metrics"] for r in results)]
        values = {key: [r["metrics"][key] for r in results] for key in common}
        shown = {key: values[key] for key in headlines[name] if key in values}
        info[name] = {"means": {f"{key}_mean": np.mean(v) for key, v in shown.items()},
                      "metrics": {key: np.mean(v) for key, v in values.items()}, "final_info_dict": shown,
                      "curves": [r["curves"] for r in results], "per_sequence": [r["per_sequence"] for r in results]}
        if len(results) > 1:
            info[name] |= {"stderrs": {f"{key}_stderr": sem(v) for key, v in shown.items()},
                           "metric_stderrs": {key: sem(v) for key, v in values.items()}}
    return info


def with_training(results, log, train_seconds):
    """Results {evaluation: {"metrics", "curves", "per_sequence"}} of one seed, the templates' training figures and the log
    in the first."""
    first = next(iter(results.values()))
    training = {"final_train_loss": np.mean([*recorded(log, "losses", "reconstruction")][1][-5:]), "best_val_loss": min(log["val_loss"]),
                "total_train_time": train_seconds}
    first["metrics"] = training | first["metrics"]
    first["curves"] = first["curves"] | {"training": log}
    first["metrics"] = {name: single(value, f"metric {name!r}") for name, value in first["metrics"].items()}
    return results


def resolved(constants, windows, steps):
    """The UPPER_CASE ones of a module's constants, the data's figures, versions, and of the steps (planned, done) of each
    seed whether all were done."""
    import transformers
    plain = {name: value for name, value in constants.items() if name.isupper() and name != "SOURCE"
             and isinstance(value, str | int | float | tuple | None)}
    planned, done = steps[0]
    return plain | {"steps_planned": planned, "steps_done": done, "budget_hit": any(a != b for a, b in steps),
                    "evaluation_files": len(windows.sample()),
                    "data_hash": fingerprint(zlib.crc32(windows.tokens.tobytes())),
                    "torch": torch.__version__, "transformers": transformers.__version__}


NOT_IN_PREFLIGHT = {"final_train_loss", "best_val_loss", "total_train_time",    # in the first evaluation, whichever it is
                    "probe_token_type"}                                         # too few tokens


def write_results(folder, per_seed, headlines, config, timing, source):
    """final_info.json, whole or not at all, and what stands beside it -> its content."""
    for seed, result in zip(config["SEEDS"], per_seed):
        place = folder if seed == config["SEEDS"][0] else folder / f"seed_{seed}"
        (place / "features.json").write_text(json.dumps(result["features"], separators=",:"))
    per_seed = [{name: result[name] for name in config["EVALS"]} for result in per_seed]
    for name, result in per_seed[0].items() if not timing else ():          # in the preflight
        if lacking := set(headlines[name]) - set(result["metrics"]) - NOT_IN_PREFLIGHT:
            raise DataError(f"EVALUATIONS has {sorted(lacking)} among the headlines of {name!r}, whose Result has no such metric.")
    if "hierarchy" in per_seed[0]:
        (folder / "case_studies.md").write_text(case_studies(per_seed[0]["hierarchy"]["curves"]["tree"]))
    info = summarised(per_seed, headlines)
    next(iter(info.values()))["config"] = config
    np.save(folder / "all_results.npy", {f"seed_{seed}": result for seed, result in zip(config["SEEDS"], per_seed)})
    (folder / "experiment.py").write_text(source)
    (folder / "timing.json").write_text(json.dumps(timing, indent=1))
    (folder / "summary.md").write_text(summary(info) + "\n")
    with replacing(folder / "final_info.json") as path:
        path.write_text(json.dumps(info, allow_nan=False))
    return info


def summary(info):
    """A paragraph on a run: what it trained on what, and the means, of final_info.json's content."""
    c = next(iter(info.values()))["config"]
    off = f" without {', '.join(c['ABLATE'])}" if c["ABLATE"] else ""
    planned, done = sum(c["steps_planned"]), sum(c["steps_done"])
    cut = f" of {planned:,} planned, cut to the time budget" if c["budget_hit"] else ""
    means = []
    for entry in info.values():
        for name, value in entry["means"].items():
            name = name.removesuffix("_mean")
            error = entry.get("stderrs", {}).get(f"{name}_stderr")
            means.append(f"{name} {value:.4g}" + ("" if error is None else f" ± {error:.2g}"))
    return (f"{c['SAE_VARIANT']}{off}, {c['d_sae']:,} latents with TARGET_L0 {c['TARGET_L0']}, on {c['MODEL_NAME']} after block "
            f"{c['layer']}: {done:,} steps{cut} on {c['TRAIN_TOKENS']:,} tokens of {c['DATASET']}, seeds "
            f"{', '.join(map(str, c['SEEDS']))}; measured on {c['evaluation_files']} held-out files. {', '.join(means)}.")


def folder_identity(folder):
    """Name and checksum of each file of a folder; above 64 MB size and date stand for the bytes."""
    def identity(path):
        size, date = path.stat().st_size, path.stat().st_mtime_ns
        return path.name, zlib.crc32(path.read_bytes()) if size < 2 ** 26 else (size, date)

    return [identity(path) for path in sorted(folder.iterdir()) if path.is_file()]


def model_folder(name):
    """The folder that a model's name means, from here or from the template's; None where it is a hub id."""
    places = Path(name).expanduser(), Path(__file__).parent.parent / name
    return next((path.resolve() for path in places if path.is_dir()), None)


def model_identity(name, config):
    """What activations depend on: a local model's files, or a hub commit."""
    folder = model_folder(name)
    return folder_identity(folder) if folder else (name, config._commit_hash)


def small_config(config):
    """A copy with two layers and 256 tokens."""
    config = type(config).from_dict(config.to_dict())
    text = config.get_text_config()
    text.num_hidden_layers, text.vocab_size = 2, 256
    text.bos_token_id = text.eos_token_id = text.pad_token_id = 0
    if types := getattr(text, "layer_types", None):
        text.layer_types = types[:2]
    return config


LOADERS = {"config.json": "AutoConfig", "tokenizer": "AutoTokenizer", "weights": "AutoModelForCausalLM"}


def load_pretrained(name, what, **kwargs):
    """One of LOADERS of a local folder or a hub id; one error for all that can go wrong."""
    import transformers
    folder = model_folder(name)
    if folder is None and not hub_reachable():
        go_offline()
    try:
        return getattr(transformers, LOADERS[what]).from_pretrained(str(folder or name), **kwargs)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        cause = str(error).split("\n")[0].split("http")[0][:300]
        if "gated" in str(error).lower():
            cause = "gated: accept its licence on the hub and log in with `hf auth login`"
        raise DataError(f"MODEL_NAME = {name!r}: no {what} ({cause}). Names that work: 'embedded/model', "
                        "'EleutherAI/pythia-70m-deduped', a folder.") from None


def find_blocks(model):
    """The largest ModuleList as long as the configuration says."""
    depth = model.config.get_text_config().num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == depth]
    if not lists:
        raise DataError(f"MODEL_NAME = {model.name_or_path!r} has no list of {depth} blocks.")
    return max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))


def model_bytes(config, dtype):
    import transformers
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in model.parameters()) * dtype.itemsize


def load_model(name, dtype, device):
    """The model on the device; where a GPU has no room for it, over all GPUs and the memory, as accelerate places it."""
    options, free = {}, torch.cuda.mem_get_info()[0] if device == "cuda" else math.inf
    if free < math.inf and (need := model_bytes(load_pretrained(name, "config.json"), dtype)) > 0.8 * free:
        if not importlib.util.find_spec("accelerate"):
            raise DataError(f"MODEL_NAME = {name!r} takes {spelled(need)}, and the GPU has {spelled(free)} free. Take a smaller model, "
                            "or `pip install accelerate`, which spreads it over GPUs and memory.")
        options = {"device_map": "auto"}
    model = load_pretrained(name, "weights", dtype=dtype, **options)
    return (model if options else model.to(device)).eval().requires_grad_(False)


def reinitialised(model):
    """A model like this one, with random weights."""
    import transformers
    torch.manual_seed(0)
    with torch.device(model.device):
        other = transformers.AutoModelForCausalLM.from_config(model.config, dtype=model.dtype)
    return other.eval().requires_grad_(False)


def load_config(name, layer, context_length):
    """A model's configuration, and the layer, None for the middle one; a layer or a context that it lacks is an error."""
    config = load_pretrained(name, "config.json").get_text_config()
    depth, longest = config.num_hidden_layers, getattr(config, "max_position_embeddings", None) or context_length
    layer = depth // 2 - 1 if layer is None else layer
    if not 0 <= layer < depth:
        raise DataError(f"LAYER = {layer}: the model has {depth} blocks.")
    if context_length > longest:
        raise DataError(f"CONTEXT_LENGTH = {context_length}: the model takes {longest}.")
    return config, layer


def check_room(folder, need):
    """Raises where a folder's disk has not `need` bytes left."""
    free = shutil.disk_usage(folder).free
    if free < need * 1.05:
        raise DataError(f"{folder} needs {need / 1e6:,.0f} MB and has {free / 1e6:,.0f}. Lower TRAIN_TOKENS or set "
                        "SAE_CACHE_DIR.")


# ---------------------------------------------------------------------------------------------------------------------
# What went wrong
# ---------------------------------------------------------------------------------------------------------------------
def checks(constants):
    """Functions (check, choice, whole, positive, text, several, span) of the names of constants, space between: each raises where
    one is neither what it must be nor among `others`."""
    def check(names, wanted, right, others=()):
        for name in names.split():
            value = constants[name]
            if value not in others and not right(value):
                wanted = " or ".join(map(str, others)) + f", or {wanted}" if others else wanted
                raise DataError(f"{name} = {value!r} is not valid: it must be {wanted}.")

    def choice(**options):  # constant -> names, space between
        for name, good in options.items():
            good = good.split()
            check(name, f"one of {', '.join(good)}", lambda v: type(v) is str and v in good)

    def whole(names, least=1, others=()):
        check(names, f"a whole number from {least}", lambda v: type(v) is int and v >= least, others)

    def positive(names, most=math.inf, others=()):
        wanted = "a number above 0" + f", at most {most}" * (most < math.inf)
        check(names, wanted, lambda v: type(v) in (int, float) and 0 < v <= most and v < math.inf, others)

    def text(names, others=()):
        check(names, "a path or a hub name", lambda v: type(v) is str and v != "", others)

    def several(name, options, about="", least=1):  # a range stands for whole numbers
        numbers = isinstance(options, range)
        wanted = "a tuple of different " + ("whole numbers" if numbers else f"names out of {[*options]}{about}")
        check(name, wanted, lambda v: type(v) is tuple and len(v) >= least and all(
            type(x) is (int if numbers else str) and x in options and v.count(x) == 1 for x in v))

    def span(name, end):
        check(name, "(low, high) within the window", lambda v: type(v) is tuple and [type(x) for x in v] == [int, int]
              and 0 < v[0] < v[1] < end, [None])

    return check, choice, whole, positive, text, several, span


def check_config(constants, variants, evaluations):
    """The constants of experiment.py by name: what would be right for each. Others need no rule."""
    check, choice, whole, positive, text, several, span = checks(constants)
    choice(SAE_VARIANT=" ".join(variants), ATTENTION="causal centred", DRIVE="u z",
           TSAE_READING="paper code", TRAIN_ON="both forget retain", SELECTION="ratio frequency",
           BUFFER_POSITIONS="learned sinusoidal", MATCHER="logistic attention",
           LEVEL_SPARSITY="topk l1")
    whole("TRAIN_TOKENS TARGET_L0 WINDOW CONTRAST_SPAN HEADS HEAD_WIDTH BUFFER CLAMPED MATCHED "
          "MATCHER_WINDOW COMPOSITION_HEADS COMPOSITION_HEAD_WIDTH")
    positive("COMPOSITIONS", 0.9)
    positive("COMPOSITION_SLOTS", 1)
    whole("CONTEXT_LENGTH", 8)
    whole("EVAL_FILES", 2)
    whole("BATCH_TOKENS", constants["CONTEXT_LENGTH"])
    whole("LAYER", 0, [None])
    positive("EXPANSION TIME_BUDGET_MINUTES EPOCHS_SCALE REGULARISATION CONSISTENCY_WEIGHT "
             "CONTRAST_WEIGHT DENSITY COSINE_WEIGHT GROUP_WEIGHT")
    positive("CONSISTENT_FRACTION", 1)
    positive("LEARNING_RATE", others=[None])
    positive("TEMPERATURE", others=["learned", "scheduled"])
    text("MODEL_NAME DATASET FORGET")
    text("FORGET_QUESTIONS RETAIN_QUESTIONS", [None])
    span("TRAIN_POSITIONS", constants["CONTEXT_LENGTH"])
    check("LEVEL_WIDTHS", "(level 1, level 2), falling to TARGET_L0 at least", lambda v: type(
        v) is tuple and [type(x) for x in v] == [int, int] and v[0] >= v[1] >= constants["TARGET_L0"], [None])
    check("LIVE STABILITY_LAGS FAR_LAGS PROBING_SIZE SYNTHETIC_SAE", "two whole numbers from 1",
          lambda v: type(v) is tuple and len(v) == 2 and all(type(x) is int and x > 0 for x in v))
    several("SYNTHETIC_TASKS", TASKS)
    several("SEEDS", range(2 ** 31))
    name = constants["SAE_VARIANT"]
    variant = variants[name]
    check_curriculum(variant, name)
    for evaluation, entry in evaluations.items():
        if not (isinstance(entry, tuple) and len(entry) == 3 and callable(entry[0]) and isinstance(entry[2], tuple)):
            raise DataError(f"EVALUATIONS[{evaluation!r}] is a {type(entry).__name__}, wanted (function, what it asks of a variant, "
                            "(names of headline metrics,)), with all commas.")
    several("EVALS", [evaluation for evaluation, (_, asks, _) in evaluations.items() if hasattr(variant, asks)], f" for {name}")
    parts = set(variant.components).union(*(stage.weights for stage in variant.curriculum))
    several("ABLATE", sorted(parts - {"reconstruction"}), f" for {name}", 0)


EPOCHS = 20     # of a curriculum


def check_curriculum(variant, name):
    """A class with a tuple of stages, each with some epochs."""
    if not inspect.isclass(variant):
        raise DataError(f"SAE_VARIANTS[{name!r}] is a {type(variant).__name__}, wanted a class.")
    stages = variant.curriculum if isinstance(variant.curriculum, tuple) else [None]
    if not all(hasattr(stage, "epochs") for stage in stages):
        raise DataError(f"the curriculum of {name} must be a tuple of Stage: (Stage(...),) with its comma.")
    if none := [stage.name for stage in stages if not stage.epochs > 0]:
        raise DataError(f"the stages {none} of {name} have no epochs: give them some, or leave them out.")
    if (epochs := sum(stage.epochs for stage in stages)) != EPOCHS:
        print(f"note: the stages of {name} add up to {epochs:g} epochs; runs compare at {EPOCHS} (EPOCHS_SCALE scales all alike)")


def check_parameters(sae, losses, name):
    """What the losses would teach are parameters of the SAE."""
    known, seen = set(map(id, sae.parameters())), set()
    nodes = [loss.grad_fn for loss in losses]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            raise DataError(f"{name} uses a tensor of shape {(*leaf.shape,)} that asks for a gradient, but that nothing trains or "
                            "saves: make it an nn.Parameter and an attribute of the SAE, or several an nn.ParameterList or "
                            "nn.ModuleList; a plain list hides them.")


def check_losses(sae, batch, stage, name):
    """The losses of a training batch, found to be a function of it, of parameters and buffers: of nothing that earlier
    batches left elsewhere, nor of x at padding; and x stays as it is. All that the stage weighs are there."""
    def losses_of(x):
        sae.load_state_dict(state)
        torch.manual_seed(0)
        given = batch._replace(x=x)
        return sae.train().losses(given, sae.encode(given))

    PATIENCE.renew()
    state, totals = copy.deepcopy(sae.state_dict()), []
    for x in (batch.x, batch.x + ~batch.mask[..., None], 2 * batch.x.flip(0), batch.x):
        losses = losses_of(given := x.clone())
        if given._version or not torch.equal(x, given):
            losses_of(x.clone().requires_grad_())          # torch refuses, and tells the line
            raise DataError(f"{name} changes batch.x in place, which others read too: make a new tensor of it.")
        if not isinstance(losses, dict):
            raise DataError(f"`losses` of {name} is a {type(losses).__name__}, wanted a dict {{name: scalar}}.")
        for key, loss in losses.items():
            if not isinstance(loss, torch.Tensor) or loss.shape:
                what = f"of shape {(*loss.shape,)}" if isinstance(loss, torch.Tensor) else f"a {type(loss).__name__}"
                raise DataError(f"the loss {key!r} of {name} is {what}, wanted a scalar tensor.")
        totals.append([loss.detach().double() for loss in losses.values()])
    if missing := sorted(set(stage.weights) - set(losses)):
        raise DataError(f"stage {stage.name!r} weighs {missing}, but `losses` of {name} has {sorted(losses)}.")
    check_parameters(sae, losses.values(), name)
    first, padded, _, again = totals
    for other, why in ((again, "what earlier batches left, or random numbers that are not torch's. Keep state in buffers "
                        "(self.register_buffer): a resumed run has nothing else"),
                       (padded, "x at padding: use batch.mask, `valid` or `counted`")):
        if wrong := [key for key, a, b in zip(losses, first, other) if not torch.allclose(a, b, 1e-3, 1e-6, True)]:
            raise DataError(f"{name}: the losses {wrong} depend on {why}.")
    return losses


def exported(sae, read):
    """The weights that an SAE exports: its parameters and what it adds, then those of `read`, without what it drops."""
    added, dropped = sae.exported()
    weights = dict(sae.named_parameters()) | added | read
    for name in dropped:
        del weights[name]
    return weights


def check_latents(sae, batch, alone, name):
    """In evaluation, with every parameter moved: the batch's last row is as in the batch `alone`, of it; what is causal does
    not look ahead; padding is silent."""
    def differ(some, others):      # a tie that rounding breaks may move a token or two
        return ((some - others).abs() > 1e-4 * (1 + others.abs())).any(-1).sum() > 2

    PATIENCE.renew()
    if not sae.W_dec.any(1).all():
        raise DataError(f"{name}: W_dec has rows of zeros, which no step can bring to unit norm. Begin with random ones.")
    with torch.no_grad():
        for p in sae.eval().parameters():      # at first a gate may be shut
            p += 0.1 * torch.randn_like(p)
        z = sae.encode(batch).dense()
        if differ(sae.encode(alone).dense()[0], z[-1]):
            raise DataError(f"{name}: the rows of a batch are different documents; one changes another's latents.")
        half = batch.x.shape[1] // 2
        later = batch._replace(x=torch.cat([batch.x[:, :half], batch.x[:, half:] + 1], 1))
        if sae.causal and differ(sae.encode(later).dense()[:, :half], z[:, :half]):
            raise DataError(f"{name}: later positions of a window change the latents of earlier ones. Look back only, or say "
                            "causal = False in the class.")
        if z[~batch.mask].any():
            raise DataError(f"{name} has latents that fire on padding.")
        weights = exported(sae, {"W_enc": sae.W_enc})
        if set(weights) == SAELENS.get(sae.architecture):          # otherwise save_sae says so
            theirs = saelens_latents(weights, sae.architecture, sae.k, batch.x)
            if differ(theirs[batch.mask], z[batch.mask]):
                raise DataError(f"architecture = {sae.architecture!r} of {name} promises SAELens's equation, whose latents differ "
                                "from encode's. Give the class an `architecture` of its own.")


@contextmanager
def doing(what, timing=None):
    """Adds to an error what was being done; where all went well, its seconds to `timing`."""
    began = time.time()
    try:
        yield
    except Exception as error:
        error.add_note(what)
        raise
    if timing is not None:
        timing[what] = time.time() - began


class Patience:
    """With work that comes no further: `work` seconds of this thread's own time, or `wait` of anyone's."""

    def __init__(self, work=15, wait=300):
        self.limits = np.array([work, wait])
        self.renew()

    def now(self):
        return np.array([time.thread_time(), time.monotonic()])

    def renew(self):
        self.since = self.now()

    def look(self, *_):
        passed = self.now() - self.since
        if (passed > self.limits).any():
            self.since = self.now() - self.limits / 2         # time to clean up
            raise TimeoutError(f"no end after {passed.max():.0f} s, on tiny batches: an endless loop, or one over tokens or "
                               "latents that should be one operation on tensors.")


PATIENCE = Patience()


@contextmanager
def trial():
    """Nothing on stdout, and an end to what comes no further."""
    PATIENCE.renew()
    before = signal.signal(signal.SIGALRM, PATIENCE.look)
    signal.setitimer(signal.ITIMER_REAL, 1, 1)
    try:
        with redirect_stdout(io.StringIO()), RANKS.alone():
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


DONE, SCRIPT = set(), Path(getattr(sys.modules["__main__"], "__file__", "")).name


@atexit.register
def end_of_the_script():
    """A script that never comes to run() must not pass for a finished one."""
    if SCRIPT == "experiment.py" and "run" not in DONE and not hasattr(sys, "last_value"):
        print(f"{SCRIPT} ended without results: its last lines must call corpus.run(main, ...)", file=sys.stderr)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(1)


def run(main, file, shown, variants, name):
    """main() of the script `file`; an error becomes a report about the variant `name`, and an exit status."""
    DONE.clear()
    DONE.add("run")
    keep_freed_memory()
    bound_memory()
    quiet_libraries()
    RANKS.join()
    try:
        main()
        RANKS.leave()
        if "results" not in DONE:
            raise DataError("main() came to its end without results: `publishing` and write_results are missing.")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command carries on")
    except SystemExit as stop:  # argparse's, or one in an edit, which must not pass for a finished run
        if stop.code in (None, 0) and not {"-h", "--help"} & set(sys.argv):
            sys.exit(f"{Path(file).name} was left by sys.exit() before the results were written")
        raise
    except Exception as error:
        variant = variants.get(name) if isinstance(name, str) else None
        at = f" (line {inspect.getsourcelines(variant)[1]})" if inspect.isclass(variant) else ""
        print(report(error, file, f"SAE_VARIANT = {name!r}{at}", shown), file=sys.stderr, flush=True)
        code = 2 if isinstance(error, DataError) else 1
        if WRITING:                                         # threads that may never come to their end
            os._exit(code)
        sys.exit(code)


def without_addresses(text):
    """An editor might fetch them."""
    return re.sub(r"\w+://[^\s'\")]+|www\.[^\s'\")]+", "(address)", text)


def report(error, file, about, shown):
    """At most 1,400 characters on an error of the script `file`: its notes, what the run was about, lines of the script,
    tensors, the cause, what to try. Of a DataError only the lines in methods of the class `shown`."""
    known, source = isinstance(error, DataError), Path(file).read_text().splitlines()
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
