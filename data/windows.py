"""Windows of tokens: cut from documents, cached by what made them."""
import zipfile
from contextlib import suppress
from itertools import chain, compress, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.code_labels import char_labels, first_character, LABELS
from data.documents import data_identity, DOMAINS, HELDOUT_ONE_IN, load_documents
from runtime.errors import RunnerError
from runtime.files import fingerprint, replacing
from runtime.provenance import code_key
from runtime.ranks import RANKS


class Windows(NamedTuple):
    """Windows of tokens, training ones first: BOS, tokens of one document, padding."""
    tokens: np.ndarray  # [n, context_length] int32
    lengths: np.ndarray  # [n] tokens before the padding
    doc_ids: np.ndarray  # [n] document of each window
    n_train: int  # windows from here on are held out
    names: list  # document -> its name
    domains: list  # document -> its domain
    # [n - n_train, context_length, len(LABELS)] int8 classes of the held-out tokens, -1 where they
    # are unknown (BOS, padding, not Python); None: there are none
    labels: np.ndarray | None = None

    def valid(self, ids):
        """Returns [len(ids), context_length], True at tokens of windows `ids` that count: not the
        first, not padding."""
        position = np.arange(self.tokens.shape[1])
        return (position > 0) & (position < self.lengths[ids][:, None])

    def heldout(self):
        """Returns the ids of the held-out windows."""
        return np.arange(self.n_train, len(self.tokens))

    def heldout_tokens(self):
        """Returns the places of the held-out tokens that count, in [n - n_train,
        context_length - 1] counted row by row."""
        return np.flatnonzero(self.valid(self.heldout())[:, 1:])

    def domain_of(self, ids):
        """Returns the names of the domains of windows: [len(ids)]."""
        return np.asarray(self.domains)[self.doc_ids[ids]]

    def fewer(self, n):
        """Returns the Windows with the last n training windows alone."""
        first = max(0, self.n_train - n)
        return self._replace(tokens=self.tokens[first:], lengths=self.lengths[first:],
                             doc_ids=self.doc_ids[first:], n_train=self.n_train - first)

    def train_pool(self, which, forget):
        """Returns the ids of the training windows of the domain `forget` ("forget"), of the others
        ("retain"), or of "both"; raises RunnerError where there are none."""
        ids = np.arange(self.n_train)
        forgotten = self.domain_of(ids) == forget
        pool = {"both": ids, "forget": ids[forgotten], "retain": ids[~forgotten]}[which]
        if which != "both" and not (forgotten.any() and len(pool)):
            raise RunnerError(
                f"TRAIN_ON = {which!r}, FORGET = {forget!r}: of it there are {forgotten.sum()} "
                f"training windows of {len(ids)}. The domains are "
                f"{', '.join(sorted(set(self.domains)))[:300]}.")
        return pool

    def full(self):
        """Returns the held-out windows without padding, counted from the first held-out one; raises
        RunnerError where there are fewer than two."""
        rows = np.flatnonzero(self.lengths[self.n_train:] == self.tokens.shape[1])
        if len(rows) < 2:
            raise RunnerError("too few held-out documents fill CONTEXT_LENGTH = "
                              f"{self.tokens.shape[1]}.")
        return rows

    def by_document(self, values, docs):
        """Returns the mean of values [n] over each document of the sample, [sample], NaN where it
        has none; docs [n] are the documents of the values."""
        parts = [values[docs == doc] for doc in self.doc_ids[self.sample()]]
        return np.array([part.mean(dtype=float) if len(part) else np.nan for part in parts])

    def sample(self):
        """Returns the id of the first held-out window of each held-out file: the per-sequence
        sample."""
        return self.n_train + np.unique(self.doc_ids[self.n_train:], return_index=True)[1]


class Wanted(NamedTuple):
    """How much of a data set is taken, and how it is cut."""
    context_length: int  # tokens in a window, BOS included
    train_tokens: int  # distinct training tokens, at least
    eval_files: int  # held-out documents, where there are as many
    train_windows_per_file: int
    eval_windows_per_file: int
    min_window: int  # tokens; a document's tail shorter than this is left out
    seed: int  # order of documents, choice of windows
    forget: str = ""  # a domain of the data set, or a second data set; "": neither
    least_eval_files: int = 2  # held-out documents without which nothing can be measured


# ---- Making windows ----
def make_windows(dataset: str, tokenizer, bos: int | None, wanted: Wanted) -> Windows:
    """Returns Windows, a random choice from each document, of the first documents that give what is
    wanted. bos: the tokenizer's first_mark; None: there is none, and windows begin with the id 0.

    Where `wanted.forget` names no domain of the data set, it names a second one: its documents
    alternate one for one with the first one's until either ends, its name is their domain, and what
    is wanted holds for both together.

    Raises RunnerError where the data set runs dry.
    """
    rng, enough = np.random.default_rng(wanted.seed), (wanted.train_tokens, wanted.eval_files)
    pieces, counts = ([], []), [0, 0]  # (window, document); training tokens, held-out files
    names, domains, labels = [], [], []
    for document in _with_forget(dataset, wanted):
        split = int(document.heldout)
        if counts[0] >= enough[0] and counts[1] >= enough[1]:
            break
        if counts[split] >= enough[split]:
            continue
        cut, cut_labels = _cut_document(document, tokenizer, bos, wanted, rng)
        counts[split] += bool(cut) if split else sum(len(window) - 1 for window in cut)
        pieces[split].extend((np.array(window, np.int32), len(names)) for window in cut)
        if document.heldout:
            labels.append(cut_labels)
        names.append(document.name)
        domains.append(document.domain)

    if counts[0] < wanted.train_tokens or counts[1] < wanted.least_eval_files:
        second = f" and {wanted.forget!r}" if wanted.forget else ""
        raise RunnerError(
            f"DATASET = {dataset!r}{second} ran dry: {len(names):,} documents gave {counts[0]:,} "
            f"training tokens and {counts[1]} held-out documents (1 in {HELDOUT_ONE_IN}, with "
            f"{min(wanted.min_window, wanted.context_length - 1)} tokens at least); TRAIN_TOKENS = "
            f"{wanted.train_tokens:,} and {wanted.least_eval_files} held-out documents are needed. "
            "Lower it, or take a larger data set.")
    windows, doc_ids = zip(*pieces[0], *pieces[1])
    tokens = padded(windows, wanted.context_length, bos or 0)
    lengths = np.array([len(window) for window in windows])
    return Windows(tokens, lengths, np.array(doc_ids), len(pieces[0]), names, domains,
                   np.concatenate(labels))


def _with_forget(dataset, wanted):
    """Returns an iterator of the documents of a data set, and of those of wanted.forget where it is
    a second one."""
    documents, forget = load_documents(dataset, wanted.seed), wanted.forget
    if not forget:
        return documents
    head = list(islice(documents, 1_000))  # in random order: a domain that matters is among them
    known, documents = {document.domain for document in head}, chain(head, documents)
    if forget in known or dataset == "embedded" and forget in DOMAINS:
        return documents

    try:
        second = load_documents(forget, wanted.seed)
    except RunnerError as error:
        raise RunnerError(
            f"{forget!r} is no domain of DATASET = {dataset!r}, which has "
            f"{', '.join(sorted(known)[:20])}; as a data set: {error}") from error
    renamed = (document._replace(domain=forget) for document in second)
    return chain.from_iterable(zip(documents, renamed))


def _cut_document(document, tokenizer, bos, wanted, rng):
    """Returns a random choice of a document's windows, lists of ids with BOS first, and of a
    held-out document their labels [n, context_length, len(LABELS)], else None."""
    labelled = document.heldout and getattr(tokenizer, "is_fast", False)
    options = {"return_offsets_mapping": True} if labelled else {}
    encoded = tokenizer(document.text, add_special_tokens=False, **options)
    kept = [i != bos for i in encoded["input_ids"]]  # a document may spell the mark out
    ids = list(compress(encoded["input_ids"], kept))

    body = wanted.context_length - 1
    least = min(body, wanted.min_window)
    most = wanted.eval_windows_per_file if document.heldout else wanted.train_windows_per_file
    starts = [i for i in range(0, len(ids), body) if len(ids) - i >= least]
    starts = [starts[i] for i in sorted(rng.permutation(len(starts))[:most])]
    windows = [[bos or 0] + ids[start:start + body] for start in starts]
    if not document.heldout:
        return windows, None

    labels = np.full((len(starts), wanted.context_length, len(LABELS)), -1, dtype=np.int8)
    if labelled and starts:
        spans = list(compress(encoded["offset_mapping"], kept))
        _label_windows(labels, document.text, [spans[start:start + body] for start in starts])
    return windows, labels


def _label_windows(labels, text, spans):
    """Sets labels [window, context_length, len(LABELS)] where the text is Python; spans are the
    places (start, end) of each window's tokens in it."""
    of_characters = char_labels(text)
    if of_characters is None:
        return
    for row, of_window in zip(labels, spans):
        characters = [first_character(text, *span) for span in of_window]
        row[1:1 + len(characters)] = of_characters[characters]


def padded(windows, context_length, bos):
    """Returns windows of at most context_length ids as [n, context_length] int32, padded with BOS.
    """
    tokens = np.full((len(windows), context_length), bos, dtype=np.int32)
    for row, window in zip(tokens, windows):
        row[:len(window)] = window
    return tokens


def stand_in_windows(context_length, forget, n=16):
    """Returns Windows of 256 random tokens, two of a document, half of them held out, every other
    pair of the domain `forget`; one is padded."""
    tokens = np.random.default_rng(0).integers(1, 256, (n, context_length)).astype(np.int32)
    lengths = np.full(n, context_length)
    lengths[3] //= 2
    names = [str(i) for i in range(n // 2)]
    domains = [forget if i % 4 < 2 else "other" for i in range(n // 2)]
    return Windows(tokens, lengths, np.arange(n) // 2, n // 2, names, domains)


# ---- Keeping windows ----
def first_mark(tokenizer):
    """Returns the id of the mark that begins every window: beginning of sequence; where there is
    none end of sequence, or None."""
    marks = tokenizer.bos_token_id, tokenizer.eos_token_id
    return next((mark for mark in marks if mark is not None), None)


def first_token(tokenizer):
    """Returns the id that begins every window: the first_mark, or 0 where there is none."""
    return first_mark(tokenizer) or 0


def tokenizer_identity(tokenizer):
    """Returns a text that stands for what a tokenizer does."""
    fast = tokenizer.is_fast
    return tokenizer.backend_tokenizer.to_str() if fast else tokenizer.name_or_path


def load_windows(dataset: str, tokenizer, wanted: Wanted, folder: Path) -> tuple[Windows, str]:
    """Returns the Windows of make_windows, from the cache `folder` where they are there, and the
    key of what made them: data, tokenizer, what is wanted, the code that decides.

    Raises RunnerError where there is no tokenizer to speak of.
    """
    if not tokenizer("text", add_special_tokens=False)["input_ids"]:
        raise RunnerError(f"{tokenizer.name_or_path} has no tokenizer (tokenizer.json).")
    bos = first_mark(tokenizer)
    if bos is None:
        print("note: the tokenizer has no mark for the beginning or end of a text: every window "
              "begins with its token 0")
    if dataset == "embedded" and wanted.forget in DOMAINS:
        wanted = wanted._replace(forget="")  # its documents are there as they are

    identities = [data_identity(dataset)]
    with suppress(RunnerError):  # a domain's name need not be a data set's
        identities += [data_identity(wanted.forget)] if wanted.forget else []
    key = fingerprint(
        identities, tokenizer_identity(tokenizer), bos, wanted, code_key(make_windows))

    def make():
        return make_windows(dataset, tokenizer, bos, wanted)

    with RANKS.first():
        return cached_windows(folder / f"{key}.npz", dataset, make), key


def cached_windows(path, dataset, make):
    """Returns make(), from the file at `path`, which is written if missing or damaged."""
    if not (windows := read_windows(path)):
        print(f"tokenising {dataset}", flush=True)
        windows = make()
        arrays = {name: value for name, value in windows._asdict().items() if value is not None}
        with replacing(path) as partial, open(partial, "wb") as file:
            np.savez(file, **arrays)
    return windows


def read_windows(path: Path) -> Windows | None:
    """Returns the Windows of a file of np.savez; None where it is missing or damaged."""
    if not (zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip() is None):
        return None
    with np.load(path) as file:
        windows = Windows(**{name: file[name] for name in file.files})
    return windows._replace(n_train=int(windows.n_train))
