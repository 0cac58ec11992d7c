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
from runtime.ranks import RANKS


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
            raise RunnerError(f"TRAIN_ON = {which!r}, FORGET = {forget!r}: of it there are {of_forget.sum()} training "
                            f"windows of {len(ids)}. The domains are {', '.join(sorted(set(self.domains)))[:300]}.")
        return pool

    def full(self):
        """Held-out windows without padding, counted from the first held-out one."""
        rows = np.flatnonzero(self.lengths[self.n_train:] == self.tokens.shape[1])
        if len(rows) < 2:
            raise RunnerError(f"too few held-out documents fill CONTEXT_LENGTH = {self.tokens.shape[1]}.")
        return rows

    def by_document(self, values, docs):
        """Mean of values [n] over each of the sample's documents [sample]; NaN where there are none."""
        of = (values[docs == doc] for doc in self.doc_ids[self.sample()])
        return np.array([part.mean(dtype=float) if len(part) else np.nan for part in of])

    def sample(self):
        """The first held-out window of each held-out file: the per-sequence sample."""
        return self.n_train + np.unique(self.doc_ids[self.n_train:], return_index=True)[1]


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
                    places = [first_character(document.text, *span) for span in spans[start:start + body]]
                    row[1:1 + len(places)] = of_characters[places]
        names.append(document.name)
        domains.append(document.domain)
    if seen[0] < wanted.train_tokens or seen[1] < 2:
        second = f" and {wanted.forget!r}" if wanted.forget else ""
        raise RunnerError(f"DATASET = {dataset!r}{second} ran dry: {len(names):,} documents gave {seen[0]:,} training "
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
    except RunnerError as error:
        raise RunnerError(f"{forget!r} is no domain of DATASET = {dataset!r}, which has {', '.join(sorted(known)[:20])}; "
                        f"as a data set: {error}") from error
    return chain.from_iterable(zip(documents, (document._replace(domain=forget) for document in second)))


def first_token(tokenizer):
    """The id that begins every window: beginning of sequence; where there is none end of sequence, or 0."""
    return next(mark for mark in (tokenizer.bos_token_id, tokenizer.eos_token_id, 0) if mark is not None)


def tokenizer_identity(tokenizer):
    return tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer.name_or_path


def load_windows(dataset: str, tokenizer, wanted: Wanted, folder: Path) -> tuple[Windows, str]:
    """The windows, from the cache `folder` where they are there, and the key of what made them.

    Raises DataError where there is no tokenizer to speak of."""
    if not tokenizer("text", add_special_tokens=False)["input_ids"]:
        raise RunnerError(f"{tokenizer.name_or_path} has no tokenizer (tokenizer.json).")
    bos = first_token(tokenizer)
    if dataset == "embedded" and wanted.forget in DOMAINS:
        wanted = wanted._replace(forget="")                # its documents are there as they are
    identities = [data_identity(dataset)]
    with suppress(RunnerError):                              # a domain's name need not be a data set's
        identities += [data_identity(wanted.forget)] if wanted.forget else []
    key = fingerprint(identities, tokenizer_identity(tokenizer), bos, wanted, Path(__file__).read_text())
    with RANKS.first():
        return cached_windows(folder / f"{key}.npz", dataset, lambda: make_windows(dataset, tokenizer, bos, wanted)), key


def cached_windows(path, dataset, make):
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


def stand_in_windows(context_length, forget, n=16):
    """Windows of 256 random tokens, two of a document, half of them held out, every other pair of the domain `forget`;
    one is padded."""
    tokens = np.random.default_rng(0).integers(1, 256, (n, context_length)).astype(np.int32)
    lengths = np.full(n, context_length)
    lengths[3] //= 2
    names = [str(i) for i in range(n // 2)]
    domains = [forget if i % 4 < 2 else "other" for i in range(n // 2)]
    return Windows(tokens, lengths, np.arange(n) // 2, n // 2, names, domains)
