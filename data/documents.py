"""Documents of the embedded corpus and of named data sets: files, folders, the hub."""
import csv
import hashlib
import importlib.metadata
import io
import json
import logging
import os
import pickle
import random
import re
import sys
import sysconfig
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Iterator, NamedTuple

import numpy as np

from runtime.errors import RunnerError, without_addresses
from runtime.hub import go_offline, hub_reachable

# ---- The embedded corpus: Python files of the packages that requirements.txt pins ----
# Domain (the folder that is imported) -> its distribution.
DOMAINS = {
    "torch": "torch", "transformers": "transformers", "sympy": "sympy", "scipy": "scipy",
    "pandas": "pandas", "sklearn": "scikit-learn", "matplotlib": "matplotlib", "numpy": "numpy",
    "networkx": "networkx", "huggingface_hub": "huggingface_hub", "datasets": "datasets",
    "fontTools": "fonttools", "narwhals": "narwhals", "pydantic": "pydantic", "mpmath": "mpmath",
    "rich": "rich", "PIL": "pillow", "seaborn": "seaborn", "fsspec": "fsspec", "joblib": "joblib",
}
# Left out: tests, vendored copies, generated tables and what differs between builds of one version.
SKIP_FOLDERS = {
    "tests", "test", "testing", "_testing", "__pycache__", "_vendor", "vendor", "externals",
    "_internal", "benchmarks", "serialized_patterns", "generated", "lib", "bin", "include", "share",
    "examples"}
SKIP_SUBTREES = {"transformers/models", "torch/onnx", "torch/_inductor", "torch/_dynamo",
                 "torch/_functorch", "torch/_refs"}
SKIP_FILES = {"version.py", "_version.py", "__config__.py", "_distributor_init.py",
              "_triton_ops_meta.py", "_cmp.py"}
MIN_CHARS, MAX_CHARS = 400, 400_000  # of a file; others are left out
HELDOUT_ONE_IN = 12  # documents, by a hash: held out from the language model and every SAE alike

# ---- Other data sets ----
# Suffix of a file -> the kind of its rows (see READERS).
KINDS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
COMPRESSED = {".gz", ".zst", ".bz2", ".xz"}  # as a second suffix: pile.jsonl.zst
# No hub name ends in one of these.
OTHER_FILES = {".arrow", ".bin", ".html", ".md", ".pdf", ".pkl", ".tsv", ".xml", ".zip"}
# Hub data sets whose loading script `datasets` no longer runs -> the files that it would read.
PARQUET_FILES = {
    "codeparrot/github-code": "hf://datasets/codeparrot/github-code/data/train-*.parquet"}
NOT_DATA = {"dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json",
            "README.txt"}
# The first of these columns that holds a string names a row's domain.
DOMAIN_COLUMNS = ("domain", "source", "label", "pile_set_name")
# " = Title = " begins an article of wikitext; " = = Section = = " does not.
TITLE = re.compile(r"\s?= [^=]+ =\s*$")
PART_CHARS, SHORTEST_PART = 20_000, 1_000  # of the parts of a long document, at most and at least
FEW_DOCUMENTS = 48  # with fewer, parts are held out: of whole documents perhaps none would be
HEAD_ROWS = 10_000  # read at most in search of FEW_DOCUMENTS rows that have a text
SHUFFLE_CHARS = 20_000_000  # held in memory to draw from: mixes what is nearer than this
SHARD_SHUFFLE = {"buffer_size": 32, "max_buffer_input_shards": 1}  # files in random order

WHAT_WORKS = ("\"embedded\", a .txt, .json, .jsonl, .parquet or .csv file, a folder of these, a "
              "nanoGPT data folder, or a hub name")
NANOGPT_FILES = ("train.bin", "val.bin", "meta.pkl")


class Document(NamedTuple):
    """A text to cut windows from."""
    name: str  # path within site-packages, or "<data set>#<row>", or "<data set>#<row>.<part>"
    text: str
    domain: str  # the package, or the row's own label, or the data set's name
    heldout: bool  # True: evaluation only


def is_heldout(name):
    """Returns whether a document is held out: one in HELDOUT_ONE_IN is, by a hash of `name`."""
    return int(hashlib.md5(name.encode()).hexdigest(), 16) % HELDOUT_ONE_IN == 0


# ---- The embedded corpus ----
@lru_cache(maxsize=1)
def embedded_documents():
    """Returns every Document of the embedded corpus, a tuple in the order of domains and paths.

    Raises RunnerError where one of its packages is not installed.
    """
    site, documents = Path(sysconfig.get_paths()["purelib"]), []
    for domain in sorted(DOMAINS):
        if not (site / domain).is_dir():
            raise RunnerError(
                f"The embedded corpus reads the package {DOMAINS[domain]!r}, which is not "
                "installed: pip install -r requirements.txt")
        paths = [path.relative_to(site) for path in sorted((site / domain).rglob("*.py"))]
        for path in filter(_in_corpus, paths):
            text = (site / path).read_text(encoding="utf-8", errors="ignore")
            text, name = text.replace("\r\n", "\n"), path.as_posix()
            if MIN_CHARS <= len(text) <= MAX_CHARS:
                documents.append(Document(name, text, domain, is_heldout(name)))
    return tuple(documents)


def _in_corpus(path):
    """Returns whether a file belongs to the corpus, by its path within site-packages."""
    if SKIP_FOLDERS & set(path.parts[:-1]) or path.name in SKIP_FILES:
        return False
    return not any(path.as_posix().startswith(f"{subtree}/") for subtree in SKIP_SUBTREES)


@lru_cache(maxsize=1)
def corpus_hash():
    """Returns the SHA-256 of the corpus's names and texts: equal ones mean the same documents."""
    digest = hashlib.sha256()
    for document in embedded_documents():
        digest.update(f"{document.name}\0{document.text}\0".encode())
    return digest.hexdigest()


def corpus_versions():
    """Returns {domain: version of its package}."""
    return {domain: importlib.metadata.version(package).split("+")[0]
            for domain, package in DOMAINS.items()}


# ---- Any data set ----
def load_documents(dataset: str, seed: int) -> Iterator[Document]:
    """Returns the documents of a data set, training and held-out ones mixed, in an order that is a
    function of the seed alone.

    `dataset` is one of
      "embedded"        the embedded corpus, whole files
      a path            .txt (one document a file), .json, .jsonl, .parquet or .csv (one a row),
                        also with .gz, .bz2, .xz or .zst after it, or a folder of files of one of
                        these kinds
      a nanoGPT folder  train.bin and val.bin (uint16 ids) and meta.pkl with "itos": a path, or a
                        bare name such as "shakespeare_char" that is found in data/, ../data/,
                        ../../data/ or ../../../data/
      a hub name        "monology/pile-uncopyrighted" or, with a configuration after a colon,
                        "Salesforce/wikitext:wikitext-2-raw-v1": streamed

    Rows are read from the column "text", else "content", else the only column of strings; lines
    under " = Title = " headings are joined to articles; documents above PART_CHARS characters come
    in parts. Held out is one whole document in HELDOUT_ONE_IN, by a hash of its text, whatever the
    seed; in a data set of fewer than FEW_DOCUMENTS documents one part in HELDOUT_ONE_IN; of a
    nanoGPT folder val.bin. In memory are SHUFFLE_CHARS characters and the longest document.

    Raises RunnerError, before the first document where it can.
    """
    place = find_local(dataset)
    if dataset == "embedded":
        documents = list(embedded_documents())
        random.Random(seed).shuffle(documents)
        return iter(documents)
    if place is None:
        return _documents(dataset, dataset, _hub_rows(dataset), seed)
    if _is_nanogpt(place):
        return _nanogpt_documents(place, seed)

    name = place.resolve().name  # "pile.jsonl.zst" is called "pile"
    while place.is_file() and Path(name).suffix.lower() in set(KINDS) | COMPRESSED:
        name = Path(name).stem
    return _documents(dataset, name, _local_rows(dataset, place), seed)


def data_identity(dataset: str) -> str:
    """Returns a text that changes with the documents: the embedded corpus's hash; sizes and dates
    of local files; a hub data set's name.

    Raises RunnerError when a local data set is missing.
    """
    place = find_local(dataset)
    if dataset == "embedded":
        return corpus_hash()
    if place is None:
        return f"hub {dataset}"
    if _is_nanogpt(place):
        files = [place / name for name in NANOGPT_FILES]
    else:
        _, files = data_files(dataset, place)
    return repr([(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns)
                 for file in files if file.exists()])


def find_local(dataset):
    """Returns the local Path that a data set's name means, or None where it is "embedded" or a hub
    name. Asks no network; raises RunnerError where the name can be neither."""
    if not isinstance(dataset, str) or not dataset.strip() or len(dataset) > 1_000:
        raise RunnerError(
            f"The data set {repr(dataset)[:80]} is no name. What works: {WHAT_WORKS}.")
    if dataset == "embedded":
        return None
    path = Path(os.path.expanduser(dataset))
    if os.path.exists(path):  # False for a name that cannot be, where Path.exists raises
        return path

    suffixes = set(KINDS) | COMPRESSED | OTHER_FILES
    if dataset[0] in "./~\\" or path.suffix.lower() in suffixes or dataset.count("/") > 1:
        raise RunnerError(
            f"The data set {dataset!r} looks like a path, and there is no such file or folder "
            f"(relative paths start from {Path.cwd()}). What works: {WHAT_WORKS}.")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[^/\s]+)?", dataset):
        raise RunnerError(
            f"The data set {dataset!r} is neither a path that exists nor a possible hub name. What "
            f"works: {WHAT_WORKS}; a hub data set's configuration follows a colon, as in "
            "\"Salesforce/wikitext:wikitext-2-raw-v1\".")
    return _folder_in_data(dataset) if re.fullmatch(r"[\w.-]+", dataset) else None


def _folder_in_data(name):
    """Returns the folder of that name in data/, here, in the project or up to three folders above,
    or None."""
    project = Path(__file__).resolve().parent.parent
    for base in (Path.cwd(), project):
        for up in ("data", "../data", "../../data", "../../../data"):
            if os.path.isdir(base / up / name):
                return base / up / name
    return None


# ---- Rows to documents ----
def _documents(dataset, name, open_rows, seed):
    """Returns an iterator of the Documents of open_rows(seed or None) -> iterator of rows, which
    are dictionaries; None asks for the order of the files."""
    head = _head(checked_rows(dataset, open_rows(None)))
    if not head:
        raise RunnerError(f"The data set {dataset!r} is empty: not one row in it.")
    column = _text_column(dataset, head)
    if skipped := sum(row.get(column) is None for row in head):
        print(f"note: {skipped} of the first {len(head)} rows of {dataset} have no {column}: such "
              "rows are left out")
    by_line = _is_by_line([row.get(column) for row in head])

    def texts(order):
        rows = ((row.get(column), _domain(row) or name)
                for row in checked_rows(dataset, open_rows(order)))
        return ((text, domain) for text, domain in (_articles(rows) if by_line else rows)
                if isinstance(text, str) and text.strip())

    sizes = [len(text) for text, _ in islice(texts(None), FEW_DOCUMENTS)]
    if not sizes:
        raise RunnerError(f"The data set {dataset!r} is empty: its column {column!r} has no text "
                          "in any row.")
    few, part_chars = len(sizes) < FEW_DOCUMENTS, PART_CHARS
    if few:
        part_chars = max(SHORTEST_PART, min(PART_CHARS, sum(sizes) // (2 * HELDOUT_ONE_IN)))
    # Articles that go on from one file to the next stay whole only in the order of the files.
    order = None if few or by_line else seed
    return _shuffled(_parts(name, texts(order), few, part_chars), seed)


def _head(rows):
    """Returns the rows up to the FEW_DOCUMENTS-th that has a text, of the first HEAD_ROWS."""
    head, found = [], 0
    for row in islice(rows, HEAD_ROWS):
        head.append(row)
        found += any(_is_text(row.get(column)) for column in row if column not in DOMAIN_COLUMNS)
        if found == FEW_DOCUMENTS:
            break
    return head


def _is_text(value):
    """Returns whether a value is a text; a number written as one, as in a .csv file, is none."""
    return isinstance(value, str) and not re.fullmatch(r"\s*[-+]?[\d.]+\s*", value)


def _parts(name, texts, few, part_chars):
    """Yields Documents of at most part_chars characters from texts [(text, domain)]; where there
    are `few` texts, parts are held out instead of whole texts."""
    count = 0
    for row, (text, domain) in enumerate(texts):
        whole_heldout, pieces = is_heldout(text), _cut(text, part_chars)
        for part, piece in enumerate(pieces):
            part_heldout = count % HELDOUT_ONE_IN == HELDOUT_ONE_IN // 2
            place = f"{row}.{part}" if len(pieces) > 1 else f"{row}"
            yield Document(f"{name}#{place}", piece, domain, part_heldout if few else whole_heldout)
            count += 1


def _cut(text, size):
    """Returns the text in pieces of at most `size` characters, cut after a line's or a word's end
    where there is one nearby; blank pieces are left out."""
    pieces, start = [], 0
    while len(text) - start > size:
        near = (start + size // 2, start + size)
        end = text.rfind("\n", *near) + 1 or text.rfind(" ", *near) + 1 or start + size
        pieces.append(text[start:end])
        start = end
    return [piece for piece in pieces + [text[start:]] if piece.strip()]


def _shuffled(documents, seed):
    """Yields documents in a random order, drawn from a pool of SHUFFLE_CHARS characters."""
    rng, pool, n_chars = random.Random(seed), [], 0
    for document in documents:
        pool.append(document)
        n_chars += len(document.text)
        while n_chars > SHUFFLE_CHARS:
            chosen = rng.randrange(len(pool))
            pool[chosen], pool[-1] = pool[-1], pool[chosen]
            n_chars -= len(pool[-1].text)
            yield pool.pop()
    rng.shuffle(pool)
    yield from pool


def _text_column(dataset, rows):
    """Returns the name of the column that holds the text of rows."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    strings = [column for column in columns if any(_is_text(row.get(column)) for row in rows)]
    for column in ("text", "content"):
        if column in strings:
            return column
    candidates = [column for column in strings if column not in DOMAIN_COLUMNS]
    if len(candidates) == 1:
        return candidates[0]
    for column in (name for name in ("text", "content") if name in columns):
        kinds = {type(row[column]).__name__ for row in rows if row.get(column) is not None}
        raise RunnerError(
            f"The column {column!r} of the data set {dataset!r} holds no text: in its first "
            f"{len(rows)} rows it is {' or '.join(sorted(kinds)) or 'always null'}. Write each "
            "document as one string.")
    raise RunnerError(
        f"The data set {dataset!r} has no column of strings named \"text\" or \"content\", and "
        f"{len(candidates)} others that could be meant. Its columns: {', '.join(columns)}. Rename "
        "the one to read to \"text\".")


def _domain(row):
    """Returns the domain that a row names, or None; the Pile's is in the column "meta"."""
    labels = {**row["meta"], **row} if isinstance(row.get("meta"), dict) else row
    return next((labels[column] for column in DOMAIN_COLUMNS
                 if isinstance(labels.get(column), str) and labels[column].strip()), None)


def _is_by_line(texts):
    """Returns whether every row is one line and some are headings, as in wikitext."""
    lines = [text for text in texts if isinstance(text, str)]
    return any(map(TITLE.match, lines)) and not any("\n" in line.strip() for line in lines)


def _articles(rows):
    """Yields (text, domain) of each article from (line, domain) of each line."""
    lines, domain = [], None
    for line, line_domain in rows:
        if not isinstance(line, str):
            continue
        if TITLE.match(line) and lines:
            yield "".join(lines), domain
            lines = []
        domain = domain if lines else line_domain
        lines.append(line.rstrip("\n") + "\n")
    yield "".join(lines), domain


# ---- Local files ----
def _kind(path):
    """Returns the kind of a file's rows, by its suffixes, or None."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return KINDS.get(suffixes[-1]) if suffixes else None


def data_files(dataset, place):
    """Returns the kind of a local file or folder, and its files in the order of their paths."""
    if place.is_file():
        if not _kind(place):
            raise RunnerError(
                f"The data set {dataset!r} is a file of a kind that is not read. What works: .txt, "
                ".json, .jsonl, .parquet and .csv, also with .gz, .bz2, .xz or .zst after it.")
        return _kind(place), [place]

    by_kind = {}
    for path in sorted(place.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(place).parts)
        if path.is_file() and not hidden and path.name not in NOT_DATA and _kind(path):
            by_kind.setdefault(_kind(path), []).append(path)
    if len(by_kind) == 1:
        return next(iter(by_kind.items()))
    if by_kind:
        kinds = ", ".join(f"{len(files)} of {kind}" for kind, files in by_kind.items())
        raise RunnerError(f"The data set {dataset!r} is a folder with files of several kinds "
                          f"({kinds}); name a folder with one kind, or one file.")
    raise RunnerError(
        f"The data set {dataset!r} is a folder with no file that can be read: no .txt, .json, "
        ".jsonl, .parquet or .csv, and no train.bin with val.bin and meta.pkl.")


def _local_rows(dataset, place):
    """Returns a function of a seed, or None for the order of the files, that opens the rows."""
    rows = _stream(dataset, *data_files(dataset, place))
    return lambda seed: iter(rows if seed is None else rows.reshard().shuffle(
        seed=seed, **SHARD_SHUFFLE))


def _stream(dataset, kind, files):
    """Returns the rows of local files, not read before they are iterated over."""
    files = [str(file.resolve()) for file in files if file.stat().st_size]
    if not files:
        raise RunnerError(f"The data set {dataset!r} is empty: 0 bytes.")
    return _rows_of(kind, files)


def _rows_of(kind, files):
    """Returns the rows of files, local or on the hub, as `datasets` streams them: dictionaries with
    whatever types they have, since a library that gives each column a type for all files refuses
    data sets for columns that are never read."""
    return _datasets_library().IterableDataset.from_generator(
        _read_files, gen_kwargs={"files": files, "kind": kind})


def _read_files(files, kind):
    """Yields the rows of files of one kind; an error says in which file."""
    import fsspec
    for file in files:
        try:
            with fsspec.open(file, "rb", compression="infer") as opened:
                yield from READERS[kind](io.BufferedReader(opened))  # .zst has no lines without
        except (ValueError, csv.Error) as error:
            error.add_note(f" (in {Path(file).name})")
            raise


def _text_rows(file):
    """Yields one row: a file's whole text."""
    yield {"text": file.read().decode("utf-8-sig")}


def _json_rows(file):
    """Yields the rows of a JSON file: one a line, or a list of all of them."""
    for number, line in enumerate(file):
        line = line.decode("utf-8-sig" if number == 0 else "utf-8").strip()
        if number == 0 and line[:1] == "[" or line == "{":  # not a row a line
            yield from _json_list(line + file.read().decode())
            return
        if line:
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number + 1}: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"line {number + 1} is a {type(row).__name__}, not a row {{...}}")
            yield row


def _json_list(text):
    """Returns the rows of a JSON text that is a list of rows, or one row."""
    rows = json.loads(text)
    rows = rows if isinstance(rows, list) else [rows]
    if wrong := [row for row in rows if not isinstance(row, dict)]:
        raise ValueError(f"a list with a {type(wrong[0]).__name__}, not of rows {{...}}")
    return rows


def _csv_rows(file):
    """Yields the rows of a .csv file, all values as texts."""
    csv.field_size_limit(sys.maxsize)
    yield from csv.DictReader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""))


def _parquet_rows(file):
    """Yields the rows of a .parquet file."""
    from pyarrow.parquet import ParquetFile
    for batch in ParquetFile(file).iter_batches(1_000):
        yield from batch.to_pylist()


READERS = {"text": _text_rows, "json": _json_rows, "csv": _csv_rows, "parquet": _parquet_rows}


def checked_rows(dataset, rows):
    """Yields the rows; whatever goes wrong in reading them becomes a RunnerError."""
    try:
        yield from rows
    except RunnerError:
        raise
    except Exception as error:
        raise _unreadable(dataset, error) from error


def _unreadable(dataset, error):
    """Returns a RunnerError from a library's error, shortened, without addresses, with advice."""
    where = "".join(getattr(error, "__notes__", ()))
    text = " ".join(without_addresses(f"{error}{where}").split())[:300]
    if isinstance(error, UnicodeDecodeError):
        advice = "It is not UTF-8 text: re-encode it."
    elif "zstandard" in text or "zstd" in text.lower():
        advice = ("Files that end in .zst need the package zstandard: pip install -r "
                  "requirements.txt.")
    elif isinstance(error, ConnectionError) or "Couldn't find cache" in text:
        advice = ("The hub does not answer, or offline mode is on, and nothing of it is cached: "
                  "use a local file or \"embedded\".")
    elif "gated" in text.lower() or "authenticat" in text:
        advice = ("It is gated: accept its licence on the hub and log in with `hf auth login`, or "
                  "name a local folder with the same columns.")
    elif "Config name is missing" in text or "BuilderConfig" in text:
        advice = ("Put one of its configurations after a colon, as in "
                  "\"Salesforce/wikitext:wikitext-2-raw-v1\".")
    else:
        advice = ("Check that the file or the name is what you mean; \"embedded\" always works.")
    return RunnerError(f"The data set {dataset!r} cannot be read: {type(error).__name__}: "
                       f"{text.rstrip('.')}. {advice}")


# ---- nanoGPT folders ----
class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, strings, lists and dictionaries only: a pickle that names a class or function
    could run any code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, and a vocabulary needs no code")


def _is_nanogpt(place):
    """Returns whether a path is a nanoGPT data folder."""
    return place.is_dir() and (place / "train.bin").is_file()


def _nanogpt_documents(place, seed):
    """Returns an iterator of the Documents of a nanoGPT folder; val.bin is held out."""
    itos, ids = _nanogpt_data(place)
    # Short parts where the text is short, so that val.bin is several held-out documents.
    size = {split: min(PART_CHARS, max(SHORTEST_PART, len(ids[split]) // HELDOUT_ONE_IN))
            for split in ids}
    parts = [(split, start) for split in ids for start in range(0, len(ids[split]), size[split])]
    random.Random(seed).shuffle(parts)

    def document(split, start):
        try:
            text = "".join(itos[i] for i in ids[split][start:start + size[split]].tolist())
        except KeyError as error:
            raise RunnerError(
                f"The nanoGPT data set {str(place)!r} has the id {error} in {split}.bin, which "
                f"\"itos\" in meta.pkl ({len(itos)} ids) lacks: they do not belong together; run "
                "its prepare.py again.") from error
        name = f"{place.name}#{split}.{start // size[split]}"
        return Document(name, text, place.name, split == "val")

    return (document(*part) for part in parts)


def _nanogpt_data(place):
    """Returns {id: text} and {"train", "val": ids [n]} of a nanoGPT folder."""
    try:
        with open(place / "meta.pkl", "rb") as file:
            itos = _PlainUnpickler(file).load()["itos"]
        pairs = enumerate(itos) if isinstance(itos, list) else (
            (int(i), str(text)) for i, text in itos.items())
        return dict(pairs), {split: np.memmap(place / f"{split}.bin", dtype=np.uint16, mode="r")
                             for split in ("train", "val")}
    except FileNotFoundError as error:
        raise RunnerError(
            f"The nanoGPT data set {str(place)!r} lacks {Path(error.filename).name}: it needs "
            "train.bin, val.bin (uint16 ids) and meta.pkl (with \"itos\", id to text), as "
            "nanoGPT's prepare.py writes them for character data sets.") from error
    except Exception as error:
        raise RunnerError(
            f"The nanoGPT data set {str(place)!r} cannot be read: {type(error).__name__}: {error}. "
            "meta.pkl must hold a plain dictionary with \"itos\", train.bin and val.bin uint16 "
            "ids.") from error


# ---- The hub ----
def _hub_rows(dataset):
    """Returns a function of a seed, or None for the order of the files, that opens the rows."""
    splits = _hub_splits(dataset)
    rows = splits["train"] if "train" in splits else next(iter(splits.values()))
    return lambda seed: iter(rows if seed is None else rows.shuffle(seed=seed, **SHARD_SHUFFLE))


def _hub_splits(dataset):
    """Returns {split: its rows, streamed} of a hub data set."""
    name, _, configuration = dataset.partition(":")
    if not hub_reachable():
        go_offline()
    datasets = _datasets_library()
    try:
        if name in PARQUET_FILES:
            files = PARQUET_FILES[name]
            return datasets.load_dataset("parquet", data_files=files, streaming=True)
        splits = datasets.load_dataset(name, configuration or None, streaming=True)
        if getattr(next(iter(splits.values())), "builder_name", None) != "json":
            return splits
        files = datasets.load_dataset_builder(name, configuration or None).config.data_files
        return {split: _rows_of("json", list(map(str, files[split]))) for split in splits}
    except Exception as error:
        bare = "" if "/" in name else (
            f" No folder data/{name} was found here or up to three folders above.")
        raise RunnerError(f"{_unreadable(dataset, error)}{bare}") from error


def read_splits(dataset):
    """Returns {split: its rows}: of a hub data set its splits; of a local one "test", the files
    with that word in their names, and "train", all others."""
    if dataset == "embedded":
        raise RunnerError("The embedded corpus is text without columns: name a file, a folder or a "
                          "hub data set that has them.")
    if (place := find_local(dataset)) is None:
        return _hub_splits(dataset)
    kind, files = data_files(dataset, place)
    parts = {"train": [], "test": []}
    for file in files:
        words = re.split("[^a-z]+", file.relative_to(place).as_posix().lower())
        parts["test" if "test" in words else "train"].append(file)
    return {split: _stream(dataset, kind, chosen) for split, chosen in parts.items() if chosen}


def _datasets_library():
    """Returns the module `datasets`, imported late (it is slow to import), without its progress
    bars and warnings."""
    import datasets
    import huggingface_hub
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)
    huggingface_hub.utils.logging.set_verbosity(logging.CRITICAL)
    return datasets
