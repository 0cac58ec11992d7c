"""Questions, texts to classify, clozes, windows to unlearn a domain with: what evaluations ask."""
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
from data.token_text import vocabulary_texts
from data.windows import cached_windows, first_token, padded, tokenizer_identity, Windows
from runtime.errors import RunnerError
from runtime.files import fingerprint
from runtime.provenance import code_key

# WMDP has no column that names the subject: word of the data set's name -> subject.
SUBJECTS = {"wmdp-bio": "biology", "wmdp-chem": "chemistry", "wmdp-cyber": "cybersecurity"}
EMBEDDED_CLASSES = 5  # domains of the embedded corpus that are told apart
STRETCH_CHARS, SHORTEST_STRETCH = 700, 200  # of their texts, at most and at least
CLOZE_CONTEXT = 32  # tokens before an answer in which it must not stand
CLOZES_PER_WINDOW = 8  # at most
CLOZE_RANKS = 20  # wrong options are at most so many ranks of frequency away
FEW_WINDOWS = 5  # a domain with fewer training windows is near to none
GROUPS = ("forget", "neighbours", "retain")


# ---- Four-way questions ----
class Question(NamedTuple):
    """A question with four choices."""
    question: str
    choices: list  # 4 strings
    answer: int  # the right one
    subject: str  # "" where unknown


class Prompts(NamedTuple):
    """A question's prompts under all 24 orders of its choices."""
    tokens: np.ndarray  # [24, seq] padded at the end
    mask: np.ndarray  # [24, seq] False at the padding
    letters: list  # ids of the four letters, A to D
    answers: np.ndarray  # [24] index of the right letter


def load_questions(dataset: str) -> list[Question]:
    """Returns four-way questions with the columns of WMDP and MMLU (question, choices, answer,
    perhaps subject): the test split where there is one, of a hub data set ("cais/wmdp:wmdp-bio") or
    of a local file or folder.

    Raises RunnerError where a row lacks a column.
    """
    splits = read_splits(dataset)
    rows = list(checked_rows(dataset, splits.get("test") or next(iter(splits.values()))))
    if not rows or not all(map(_is_question, rows)):
        lacking = next((row for row in rows if not _is_question(row)), ["not one row"])
        raise RunnerError(
            f"The data set {dataset!r} cannot be asked: each row needs question (a text), choices "
            "(4 texts) and answer (0, 1, 2 or 3). The columns of the first without them: "
            f"{', '.join(lacking)}.")
    default = next((subject for name, subject in SUBJECTS.items() if name in dataset), "")
    return [Question(row["question"], row["choices"], row["answer"], row.get("subject") or default)
            for row in rows]


def _is_question(row):
    """Returns whether a row has the columns of a Question."""
    choices = row.get("choices")
    return (isinstance(row.get("question"), str) and row.get("answer") in range(4)
            and isinstance(choices, list) and [type(choice) for choice in choices] == [str] * 4)


def question_prompts(question: Question) -> tuple[list, list]:
    """Returns the prompts under all 24 orders of the choices, in MMLU's format, and the index of
    the right letter in each."""
    subject = question.subject.replace("_", " ")
    about = f" about {subject}" if subject else ""
    head = (f"The following are multiple choice questions (with answers){about}.\n\n"
            f"{question.question.strip()}\n")
    orders = list(permutations(range(4)))
    options = ["".join(f"{letter}. {question.choices[i]}\n" for letter, i in zip("ABCD", order))
               for order in orders]
    prompts = [f"{head}{lines}Answer:" for lines in options]
    return prompts, [order.index(question.answer) for order in orders]


def encoded_questions(dataset, tokenizer):
    """Yields the Prompts of each question of a data set."""
    letters = [tokenizer(f" {letter}", add_special_tokens=False)["input_ids"][-1]
               for letter in "ABCD"]
    for question in load_questions(dataset):
        prompts, answers = question_prompts(question)
        encoded = tokenizer(prompts, add_special_tokens=False)["input_ids"]
        rows = [[first_token(tokenizer), *ids] for ids in encoded]
        lengths = np.array([len(row) for row in rows])
        tokens = np.array([row + [0] * (lengths.max() - len(row)) for row in rows])
        mask = np.arange(lengths.max()) < lengths[:, None]
        yield Prompts(tokens, mask, letters, np.array(answers))


# ---- Texts to classify ----
class Examples(NamedTuple):
    """Texts to classify."""
    texts: list
    labels: np.ndarray  # [text] index into names
    train: np.ndarray  # [text] True: to fit on, False: to test on
    names: list  # of the classes


def _columns(text, label, group=None):
    """Returns a function that returns of a row its text, its label and the group that is balanced
    within a class, from the columns of these names."""
    def read(row):
        if not {text, label} <= set(row):
            raise RunnerError(f"A data set to classify needs the columns {text} and {label}; this "
                              f"one has {', '.join(row)}.")
        return row[text], row[label], row.get(group)

    return read


def _read_code(row):
    """Returns text, label and group of a row of github-code: of files with more than 534 characters
    without the first 150, mostly the licence; of shorter ones no text."""
    text = row["content"]
    return text[150:] if len(text) > 534 else "", Path(row["path"]).suffix, None


def _read_europarl(row):
    """Returns text, label and group of a row of Europarl, in the language that is read."""
    language = EUROPARL["-".join(sorted(row["translation"]))]
    return row["translation"][language], language, None


# Pair of languages -> the one that is read.
EUROPARL = {"en-fr": "en", "fr-it": "fr", "de-en": "de", "es-fr": "es", "nl-pt": "nl"}
BIOS, REVIEWS = "LabHC/bias_in_bios", "canrager/amazon_reviews_mcauley_1and5"
CODE, NEWS, PARLIAMENT = "codeparrot/github-code", "fancyzhx/ag_news", "Helsinki-NLP/europarl"
_read_bios = _columns("hard_text", "profession", "gender")
# SAEBench's data sets: name -> ({hub name: {label: class}}, the function that reads a row).
PROBING_DATASETS = {
    f"{BIOS}_class_set1": ({BIOS: {
        0: "accountant", 1: "architect", 2: "attorney", 6: "dentist", 9: "filmmaker"}}, _read_bios),
    f"{BIOS}_class_set2": ({BIOS: {
        11: "journalist", 13: "nurse", 14: "painter", 18: "photographer", 19: "physician"}},
        _read_bios),
    f"{BIOS}_class_set3": ({BIOS: {
        20: "poet", 21: "professor", 22: "psychologist", 25: "surgeon", 26: "teacher"}},
        _read_bios),
    REVIEWS: ({REVIEWS: {
        1: "Toys_and_Games", 2: "Cell_Phones_and_Accessories", 3: "Industrial_and_Scientific",
        5: "Musical_Instruments", 6: "Electronics"}}, _columns("text", "category", "rating")),
    f"{REVIEWS}_sentiment": ({REVIEWS: {1.0: "1.0", 5.0: "5.0"}}, _columns("text", "rating")),
    CODE: ({CODE: {
        ".c": "C", ".h": "C", ".py": "Python", ".html": "HTML", ".java": "Java", ".php": "PHP",
        ".php3": "PHP", ".php4": "PHP", ".php5": "PHP", ".phps": "PHP", ".phpt": "PHP"}},
        _read_code),
    NEWS: ({NEWS: {0: "World", 1: "Sports", 2: "Business", 3: "Sci/Tech"}},
           _columns("text", "label")),
    PARLIAMENT: ({f"{PARLIAMENT}:{pair}": {language: language}
                  for pair, language in EUROPARL.items()}, _read_europarl),
}


def probing_examples(dataset: str, n_train: int, n_test: int, seed: int = 42) -> Examples:
    """Returns `n_train` and `n_test` texts of each class of a data set.

    `dataset` is one of
      "embedded"                the domains with most files: stretches of at most STRETCH_CHARS
                                characters that begin at a line's start and share nothing; those to
                                test on from held-out files, the others not
      one of PROBING_DATASETS   drawn as SAEBench draws them, but for blank texts
      another hub name or path  with columns text and label; drawn from its own train and test where
                                it has both

    Raises RunnerError where a class has fewer.
    """
    draw = _draw_stretches if dataset == "embedded" else _draw_texts
    drawn = draw(dataset, (n_train, n_test), seed)
    for name, (train, test) in drawn.items():
        if len(train) < n_train or len(test) < n_test or len(drawn) < 2:
            raise RunnerError(
                f"The data set {dataset!r} is too small: {len(drawn)} classes, and {name!r} does "
                f"not give {n_train} texts to train on and {n_test} others to test on, in equal "
                "groups.")
    texts = [text for train, test in drawn.values() for text in train + test]
    is_train = np.arange(n_train + n_test) < n_train
    labels = np.repeat(np.arange(len(drawn)), len(is_train))
    return Examples(texts, labels, np.tile(is_train, len(drawn)), list(drawn))


def _draw_stretches(_, sizes, seed):
    """Returns {domain: (train texts, test texts)} of the embedded corpus, so many (sizes) of each:
    of every file one stretch, then a second, ..."""
    rng, drawn = np.random.default_rng(seed), {}
    n_files = Counter(document.domain for document in embedded_documents())
    for domain, _ in n_files.most_common(EMBEDDED_CLASSES):
        ranked = [], []  # to train on, to test on: (which of its file, random, stretch)
        for document in (d for d in embedded_documents() if d.domain == domain):
            stretches = rng.permutation(_stretches(document.text, rng)).tolist()
            ranked[document.heldout].extend(
                (i, rng.random(), stretch) for i, stretch in enumerate(stretches))
        drawn[domain] = tuple([stretch for _, _, stretch in sorted(part)[:n]]
                              for part, n in zip(ranked, sizes))
    return drawn


def _stretches(text, rng, size=STRETCH_CHARS, least=SHORTEST_STRETCH):
    """Returns the stretches of `size` characters that a text is cut into, each from a line's start,
    the first from a random one of its first lines; those with fewer than `least` are left out."""
    starts = [0] + [match.end() for match in re.finditer("\n", text[:size])]
    start, stretches = starts[rng.integers(len(starts))], []
    while start < len(text):
        stretches.append(text[start:start + size])
        start = text.find("\n", start + len(stretches[-1]) - 1) + 1 or len(text)
    return [stretch for stretch in stretches if len(stretch.strip()) >= least]


def _draw_texts(dataset, sizes, seed):
    """Returns {class: (train texts, test texts)}, so many (sizes) of each, SAEBench's way.

    Where the data set has both splits: a sample of each, in equal groups. Else the first texts that
    are enough (all where the classes are not known), shuffled.
    """
    sources, read = PROBING_DATASETS.get(dataset, ({dataset: {}}, _columns("text", "label")))
    names = [name for classes in sources.values() for name in dict.fromkeys(classes.values())]
    pools = {name: {} for name in names}  # {class: {(split, group): texts}}
    for source, classes in sources.items():
        _fill_pools(pools, source, classes, read, sum(sizes))

    shuffler, drawn, (n_train, n_test) = random.Random(seed), {}, sizes
    for name in names or sorted(pools):
        train, test, unsplit = ([pools[name][key] for key in sorted(pools[name]) if key[0] == split]
                                for split in ("train", "test", ""))
        for texts in unsplit:
            shuffler.shuffle(texts)
        if unsplit:
            drawn[name] = unsplit[0][:n_train], unsplit[0][n_train:n_train + n_test]
        else:
            drawn[name] = _sample(train, n_train, seed), _sample(test, n_test, seed)
    return drawn


def _fill_pools(pools, source, classes, read, enough):
    """Adds a data set's texts to pools {class: {(split, group): texts}}, the split "" where it has
    not both; then, if the classes are known, no more than give each of them `enough`."""
    splits = read_splits(source)
    both = {"train", "test"} <= set(splits)
    for split in ("train", "test") if both else list(splits)[:1]:
        for text, name, group in _labelled_texts(source, splits[split], classes, read):
            key = (split if both else "", group)
            pools.setdefault(name, {}).setdefault(key, []).append(text)
            if classes and not both and all(sum(map(len, pools[known].values())) > enough
                                            for known in classes.values()):
                break


def _labelled_texts(source, rows, classes, read):
    """Yields (text, class, group) of the rows that have a text and one of classes {label: class};
    where there are none of these the label is the class."""
    for text, label, group in checked_rows(source, map(read, rows)):
        labelled = label in classes if classes else label is not None
        if labelled and isinstance(text, str) and text.strip():
            yield text, classes.get(label, str(label)), group


def _sample(groups, n, seed):
    """Returns n texts, as many of each group, as pandas samples them; [] where a group has not so
    many."""
    parts = [n // len(groups) + (i < n % len(groups)) for i in range(len(groups))]
    if any(len(group) < part for group, part in zip(groups, parts)):
        return []
    return [group[i] for group, part in zip(groups, parts)
            for i in np.random.RandomState(seed).choice(len(group), part, replace=False)]


def probing_windows(dataset, tokenizer, sizes, context_length, folder):
    """Returns the Windows of make_probing_windows, from the cache `folder` where they are there,
    and the key of what made them."""
    texts = dataset if dataset in PROBING_DATASETS else data_identity(dataset)
    key = fingerprint("probing", texts, sizes, context_length, tokenizer_identity(tokenizer),
                      code_key(make_probing_windows))

    def make():
        return make_probing_windows(dataset, tokenizer, sizes, context_length)

    return cached_windows(folder / f"{key}.npz", dataset, make), key


def make_probing_windows(dataset, tokenizer, sizes, context_length):
    """Returns the texts of probing_examples, sizes = (n_train, n_test) of each class, as Windows:
    the first context_length - 1 tokens of each; domains are the classes."""
    examples, bos = probing_examples(dataset, *sizes), first_token(tokenizer)
    order = np.argsort(~examples.train, kind="stable")
    texts = [examples.texts[i] for i in order]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    rows = [[bos, *ids[:context_length - 1]] for ids in encoded]
    lengths = np.array([len(row) for row in rows])
    names = [f"{dataset}#{i}" for i in order]
    classes = [examples.names[examples.labels[i]] for i in order]
    return Windows(padded(rows, context_length, bos), lengths, np.arange(len(rows)),
                   int(examples.train.sum()), names, classes)


# ---- Domains ----
def nearest_domains(windows, domain, n=3):
    """Returns the names of the n domains whose training tokens' TF-IDF vectors have the highest
    cosine to a domain's; domains with fewer than FEW_WINDOWS training windows are left out.

    Raises RunnerError where the domain itself is.
    """
    from sklearn.feature_extraction.text import TfidfTransformer
    train = np.arange(windows.n_train)
    names, row, sizes = np.unique(
        windows.domain_of(train), return_inverse=True, return_counts=True)
    valid = windows.valid(train)
    tokens = windows.tokens[train][valid]
    places = (np.repeat(row, valid.sum(1)), tokens)
    enough = sizes >= FEW_WINDOWS
    counts, names = csr_array((np.ones(len(tokens)), places))[enough], names[enough]
    if domain not in names:
        raise RunnerError(f"The domain {domain!r} has fewer than {FEW_WINDOWS} training windows, "
                          f"unlike {', '.join(names)}.")

    vectors = TfidfTransformer().fit_transform(counts)  # of length 1
    cosines = (vectors @ vectors[names == domain].T).toarray()[:, 0]
    order = np.argsort(-cosines, kind="stable")
    return [str(name) for name in names[order] if name != domain][:n]


# ---- Clozes ----
class Clozes(NamedTuple):
    """Four-way questions about windows: which token follows."""
    window: np.ndarray  # [n] id
    position: np.ndarray  # [n] of the last token that is given
    options: np.ndarray  # [n, 4] tokens, the right one first


class NameTokens(NamedTuple):
    """The tokens that begin or go on with a name, by frequency in a domain's training windows."""
    counts: np.ndarray  # [token]
    kinds: np.ndarray  # [token] 1: without a space in front, 2: with one, 0: part of no name
    ranked: dict  # kind -> its tokens that occur, by ascending count, equal ones in random order
    rank: dict  # token -> its place among those of its kind


def make_clozes(windows, ids, strings, seed=0):
    """Returns the Clozes of the windows `ids`, at most CLOZES_PER_WINDOW each, where a name begins
    or goes on with a token that is not among the CLOZE_CONTEXT before it. strings: token -> text.

    The wrong options are such tokens too, with a space in front or without as the right one, about
    as frequent in the domain's training windows: up to CLOZE_RANKS ranks and a factor of 2 away.
    How many of them are the more frequent ones is drawn evenly from 0 to 3, so that frequency
    cannot answer.
    """
    rng, rows, ids = np.random.default_rng(seed), [], np.asarray(ids, int)
    kinds = np.array([_name_kind(text) for text in strings])
    domains = windows.domain_of(np.arange(len(windows.tokens)))
    for domain in np.unique(domains[ids]):
        train = np.flatnonzero(domains[:windows.n_train] == domain)
        tokens = windows.tokens[train][windows.valid(train)]
        names = _name_tokens(tokens, kinds, rng)
        for window in ids[domains[ids] == domain]:
            rows += _window_clozes(windows, window, names, rng)
    table = np.array(sorted(rows), dtype=np.int64).reshape(-1, 6)
    return Clozes(table[:, 0], table[:, 1], table[:, 2:])


def _name_kind(text):
    """Returns 1 where a token's text is a part of a name, 2 where it begins with a space too, 0
    where it is neither, or a keyword."""
    if not re.fullmatch(r" ?_*[^\W\d_]\w*", text) or keyword.iskeyword(text.strip()):
        return 0
    return 1 + text.startswith(" ")


def _name_tokens(tokens, kinds, rng):
    """Returns the NameTokens of a domain's training tokens [n]; kinds [token]."""
    counts = np.bincount(tokens, minlength=len(kinds))[:len(kinds)]
    order = rng.permutation(len(kinds))
    order = order[np.argsort(counts[order], kind="stable")]
    ranked = {kind: order[(kinds[order] == kind) & (counts[order] > 0)] for kind in (1, 2)}
    rank = {int(token): i for members in ranked.values() for i, token in enumerate(members)}
    return NameTokens(counts, kinds, ranked, rank)


def _window_clozes(windows, window, names, rng):
    """Returns the sorted rows (window, position, right, three wrong tokens) of a window's clozes,
    at random positions."""
    tokens, rows = windows.tokens[window], []
    positions = np.arange(CLOZE_CONTEXT + 1, windows.lengths[window] - 1)
    for position in rng.permutation(positions):
        right = int(tokens[position + 1])
        recent = tokens[position - CLOZE_CONTEXT + 1:position + 1]
        if right in recent or right not in names.rank:
            continue
        below, above = _rivals(right, recent, names)
        if min(len(below), len(above)) >= 3:
            n_above = rng.integers(4)
            rows.append((window, position, right, *rng.choice(above, n_above, replace=False),
                         *rng.choice(below, 3 - n_above, replace=False)))
        if len(rows) == CLOZES_PER_WINDOW:
            break
    return sorted(rows)


def _rivals(right, recent, names):
    """Returns the tokens of the kind of `right` that are a little less frequent, and those that are
    a little more, without recent ones."""
    members, place, counts = names.ranked[names.kinds[right]], names.rank[right], names.counts
    below = members[max(place - CLOZE_RANKS, 0):place]
    above = members[place + 1:place + 1 + CLOZE_RANKS]

    def near(part):
        within = (counts[part] <= 2 * counts[right]) & (counts[right] <= 2 * counts[part])
        return part[~np.isin(part, recent) & within]

    return near(below), near(above)


# ---- Unlearning ----
class UnlearningPlan(NamedTuple):
    """Windows to unlearn a domain with, spread over the files. The groups are "forget" (the
    domain), "neighbours" (the domains nearest to it in vocabulary) and "retain" (the others)."""
    dev: np.ndarray  # ids of training windows
    dev_group: np.ndarray  # group of each
    test: np.ndarray  # ids of held-out windows
    group: np.ndarray  # group of each
    clozes: Clozes  # of the test windows
    cloze_group: np.ndarray  # group of each

    def full(self, windows, most=32):
        """Returns the ids of up to `most` test windows of "forget" without padding, and as many of
        "retain", repeated where there are fewer. Raises RunnerError where either has none."""
        is_full = windows.lengths[self.test] == windows.tokens.shape[1]
        forget, retain = (self.test[is_full & (self.group == name)]
                          for name in ("forget", "retain"))
        for name, ids in (("FORGET", forget), ("another domain", retain)):
            if not len(ids):
                raise RunnerError(f"no held-out document of {name} fills CONTEXT_LENGTH.")
        return forget[:most], np.resize(retain, len(forget[:most]))

    def halves(self, windows):
        """Returns [dev windows], True for every other file of "forget", and of what is not."""
        docs, half = windows.doc_ids[self.dev], np.zeros(len(self.dev), dtype=bool)
        for side in (self.dev_group == "forget", self.dev_group != "forget"):
            half[side] = np.unique(docs[side], return_inverse=True)[1] % 2 == 0
        return half


def unlearning_plan(windows, forget, tokenizer, most=(256, 128)):
    """Returns the UnlearningPlan of the domain `forget`, with at most `most` = (dev, test) windows
    of a group; raises RunnerError where one of its windows or of the others' is missing."""
    n_near = min(3, (len(set(windows.domains)) - 1) // 2)
    near = nearest_domains(windows, forget, n_near) if n_near else []
    train = np.arange(windows.n_train)
    dev, dev_group = _spread(windows, "dev", train, forget, near, most[0])
    test, group = _spread(windows, "test", windows.heldout(), forget, near, most[1])

    strings = vocabulary_texts(tokenizer, range(windows.tokens.max() + 1))
    clozes = make_clozes(windows, test, strings)
    cloze_group = group[np.searchsorted(test, clozes.window)]
    return UnlearningPlan(dev, dev_group, test, group, clozes, cloze_group)


def _spread(windows, split, ids, forget, near, most):
    """Returns at most `most` of the windows `ids` of each group, evenly spaced, as ids in order,
    and their groups. `split` is what the message calls them."""
    domains = windows.domain_of(ids)
    others = np.where(np.isin(domains, near), "neighbours", "retain")
    group, chosen = np.where(domains == forget, "forget", others), []
    for name in GROUPS:
        members = np.flatnonzero(group == name)
        if name != "neighbours" and not len(members):
            which = "of it" if name == "forget" else "of another domain"
            raise RunnerError(
                f"FORGET = {forget!r}: no {split} window is {which}. The domains are "
                f"{', '.join(sorted(set(domains)))[:300]}.")
        places = np.linspace(0, len(members) - 1, min(most, len(members))).astype(int)
        chosen.append(members[places])
    chosen = np.sort(np.concatenate(chosen))
    return ids[chosen], group[chosen]
