"""Questions, texts to classify, clozes: what evaluations ask, known before any model runs."""
import keyword
import random
import re
from collections import Counter
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array

from data.documents import checked_rows, data_identity, embedded_documents, read_splits
from data.windows import cached_windows, first_token, tokenizer_identity, Windows
from runtime.errors import RunnerError
from runtime.files import fingerprint


def probing_windows(dataset, tokenizer, sizes, context_length, folder):
    """The texts of `probing_examples`, sizes = (n_train, n_test) of each class, as windows: the first context_length - 1
    tokens of each; domains are the classes; and the key of what made them."""
    texts = dataset if dataset in PROBING_DATASETS else data_identity(dataset)
    key = fingerprint("probing", texts, sizes, context_length, tokenizer_identity(tokenizer), Path(__file__).read_text())

    def make():
        examples, bos = probing_examples(dataset, *sizes), first_token(tokenizer)
        order = np.argsort(~examples.train, kind="stable")
        rows = [[bos, *ids[:context_length - 1]] for ids in tokenizer(
            [examples.texts[i] for i in order], add_special_tokens=False)["input_ids"]]
        tokens = np.full((len(rows), context_length), bos, dtype=np.int32)
        for row, ids in zip(tokens, rows):
            row[:len(ids)] = ids
        classes = [examples.names[examples.labels[i]] for i in order]
        return Windows(tokens, np.array([len(ids) for ids in rows]), np.arange(len(rows)), int(examples.train.sum()),
                       [f"{dataset}#{i}" for i in order], classes)

    return cached_windows(folder / f"{key}.npz", dataset, make), key


def encoded_questions(dataset, tokenizer):
    """Of each question all 24 prompts: tokens [24, seq], padded at the end, whether they count [24, seq], ids of the four
    letters, index of the right one [24]."""
    letters = [tokenizer(f" {letter}", add_special_tokens=False)["input_ids"][-1] for letter in "ABCD"]
    for question in load_questions(dataset):
        prompts, answers = question_prompts(question)
        rows = [[first_token(tokenizer), *ids] for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"]]
        lengths = np.array([len(row) for row in rows])
        tokens = np.array([row + [0] * (lengths.max() - len(row)) for row in rows])
        yield tokens, np.arange(lengths.max()) < lengths[:, None], letters, np.array(answers)


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

    splits = read_splits(dataset)
    rows = list(checked_rows(dataset, splits.get("test") or next(iter(splits.values()))))
    if not rows or not all(map(fits, rows)):
        columns = ", ".join(next((row for row in rows if not fits(row)), ["not one row"]))
        raise RunnerError(f"The data set {dataset!r} cannot be asked: each row needs question (a text), choices (4 "
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
            raise RunnerError(f"A data set to classify needs the columns {text} and {label}; this one has "
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
            raise RunnerError(f"The data set {dataset!r} is too small: {len(drawn)} classes, and {name!r} does not give "
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
        splits = read_splits(source)
        both = {"train", "test"} <= set(splits)
        for split in ("train", "test") if both else list(splits)[:1]:
            for text, label, group in checked_rows(source, map(read, splits[split])):
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
        raise RunnerError(f"The domain {domain!r} has fewer than 5 training windows, unlike {', '.join(names)}.")
    vectors = TfidfTransformer().fit_transform(counts)     # of length 1
    row_cosines = (vectors @ vectors[names == domain].T).toarray()[:, 0]
    return [str(name) for name in names[np.argsort(-row_cosines, kind="stable")] if name != domain][:n]


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


def make_clozes(windows, ids, strings, seed=0):
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
