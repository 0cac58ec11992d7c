"""The content of features.json, from which pages/ratings.py makes the page of a run's latents."""
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from data.token_text import token_texts, vocabulary_texts
from runtime.sparse_ops import firings

EXCERPT = 32                # tokens of a passage
STRONGEST = 8               # passages of the strongest firings, one a file
BANDS, PER_BAND = 5, 2      # bands of equally many firings by value, and passages from each
RANDOM = 5                  # passages drawn without regard to the latent: a control
COMMON = 10                 # times a token must occur in training to be named as promoted
NAMED = 10                  # tokens that a latent promotes, and that it suppresses
FIRED_ON = 6                # tokens on which it fires most often
EFFECT_BINS = 41            # of the histogram of its effects on logits
RATE_BINS = 40              # of the histogram of all latents' firing rates
RELATIVES = 24              # rows of a list of related latents at most
NEIGHBOURS = 8              # latents that fire together with one, and that point where it does
ALL_LATENTS = 20_000        # a wider SAE's page has no facts of the latents that it does not show


class PageLatent(NamedTuple):
    """A latent that the page shows: all that the run knows of it besides where it fires."""
    latent: int
    why: list  # of "random" (drawn at random, and rated), "evolution" (in that figure), "stable"
    logits: np.ndarray  # [vocabulary] that its direction adds
    related: dict  # {title: rows (label, number)}; a label that is a whole number is a latent
    similar: list  # (latent, cosine) whose directions are the nearest to its own
    stability: float | None = None  # None where the run did not measure it
    # `task_files` (documents of its detection tasks), `question` (where the five options of the
    # first task begin, the right one first, or None), `order` (in which they are shown), `tasks`
    # (their number), `solved` (how many its own profile solves, the same among options with the
    # same token, and how many a random profile solves); None: it has no tasks
    detection: object = None


class Passages:
    """Cuts excerpts of `size` tokens, each from one window, out of the held-out tokens.

    A place is an index into `flat`, where the windows follow one another without BOS.
    """

    def __init__(self, windows, size):
        ids = windows.heldout()
        self.flat = windows.tokens[ids, 1:].ravel()     # [place] tokens, padding included
        self.seq = windows.tokens.shape[1] - 1          # places of a window
        self.size = min(size, self.seq)                 # tokens of an excerpt
        self.lengths = windows.lengths[ids] - 1         # [window] tokens before the padding
        self.files = windows.doc_ids[ids]               # [window] document
        self.places = windows.heldout_tokens()          # places that are not padding
        last = np.maximum(self.lengths - self.size, 0)
        self.starts = np.flatnonzero(np.arange(self.seq) <= last[:, None])  # where excerpts begin

    def file(self, place):
        """Returns the document of a place."""
        return self.files[place // self.seq]

    def start(self, place, lead):
        """Returns where the excerpt begins that has `lead` tokens before the place, or fewer
        where its window begins or ends too near."""
        window, offset = np.divmod(place, self.seq)
        last = np.maximum(self.lengths[window] - self.size, 0)
        return window * self.seq + np.clip(offset - lead, 0, last)

    def stop(self, start):
        """Returns where the excerpt that begins at `start` ends."""
        window, offset = np.divmod(start, self.seq)
        return window * self.seq + np.minimum(offset + self.size, self.lengths[window])

    def shown(self, start, active, peak=None):
        """Returns an excerpt as features.json has it, but for its texts: "values" are pairs (token
        in the excerpt, value) where the latent fires, "peak" is the token for which the excerpt was
        chosen, "place" where it begins, "tokens" how many it has.

        active [place]: the latent's values; peak: a place or None.
        """
        part = slice(start, self.stop(start))
        values = [[int(i), three_digits(active[start + i])] for i in np.flatnonzero(active[part])]
        return {"file": int(self.file(start)), "place": int(start),
                "at": int(start % self.seq) + 1, "tokens": len(self.flat[part]), "values": values,
                "peak": None if peak is None else int(peak - start)}

    def reader(self, tokenizer):
        """Returns a function that returns the texts of n tokens from a place on, as they stand in
        their window; an excerpt that begins within a character begins with all of it."""
        known, rows = {}, {}

        def texts(place, n):
            window, offset = divmod(place, self.seq)
            if window not in rows:
                first = window * self.seq
                tokens = self.flat[first:first + self.lengths[window]]
                rows[window] = token_texts(tokenizer, tokens, known)
            row, begin = rows[window], offset
            while begin and not row[begin]:
                begin -= 1
            return [row[begin], *row[offset + 1:offset + n]]

        return texts


def three_digits(value):
    """Returns a value as a float of three significant digits, or the integer 0."""
    return float(f"{value:.3g}") if value else 0


def latent_passages(text, places, active, held, rng):
    """Returns passages of the strongest firings, of each band of values and of random places.

    text: Passages; places [n]: where the latent fires; active [place]: its values; held: documents
    kept for detection, from which no passage comes.
    """
    places = places[~np.isin(text.file(places), held)]
    by_value = places[np.argsort(-active[places], kind="stable")]
    lead = text.size * 3 // 4

    def around(chosen):
        """Returns the excerpts around places."""
        return [text.shown(text.start(place, lead), active, place) for place in chosen]

    first_of_file = np.sort(np.unique(text.file(by_value), return_index=True)[1])
    bands = np.array_split(by_value, BANDS)
    drawn = [rng.permutation(band)[:PER_BAND] for band in bands]
    anywhere = rng.choice(text.places[~np.isin(text.file(text.places), held)], RANDOM)
    return {"top": around(by_value[first_of_file[:STRONGEST]]),
            "stratified": [around(band) for band in drawn],
            "ranges": [[three_digits(active[band[-1]]), three_digits(active[band[0]])]
                       if len(band) else None for band in bands],
            "random": [text.shown(text.start(place, lead), active) for place in anywhere]}


def mean_by_position(text, active):
    """Returns pairs (first position, mean value of the latent) of up to 32 ranges of positions."""
    edges = np.linspace(0, text.seq, min(text.seq, 32) + 1).astype(int)
    is_token = np.arange(text.seq) < text.lengths[:, None]
    sums = np.add.reduceat(active.reshape(is_token.shape).sum(0), edges[:-1])
    counts = np.add.reduceat(is_token.sum(0), edges[:-1])
    means = sums / np.maximum(counts, 1)
    return [[int(first) + 1, three_digits(mean)] for first, mean in zip(edges, means)]


def fired_on(text, places):
    """Returns rows (token, share of the firings that are on it, share of its occurrences on which
    the latent fires) of the FIRED_ON tokens on which a latent fires most often."""
    seen = np.bincount(text.flat[text.places])
    fired = np.bincount(text.flat[places], minlength=len(seen))
    order = np.argsort(-fired, kind="stable")[:FIRED_ON]
    return [[int(token), three_digits(fired[token] / len(places)),
             three_digits(fired[token] / seen[token])] for token in order if fired[token]]


def latent_entry(text, question_text, shown, firing, energy):
    """Returns what the page shows of a latent's firings.

    text, question_text: Passages of the excerpts and of the question's options; shown: its
    PageLatent; firing: (places [n] where the latent fires, its values [n]); energy: sum of the
    squared values of all latents.
    """
    (places, values), latent, detection = firing, int(shown.latent), shown.detection
    active = np.zeros(len(text.flat), dtype=np.float32)
    active[places] = values
    rng, held = np.random.default_rng([1, latent]), detection.task_files if detection else []

    entry = {"latent": latent, "why": shown.why,
             "rate": three_digits(len(places) / len(text.places)),
             "files": len(np.unique(text.file(places))), "max": three_digits(values.max()),
             "mean": three_digits(values.mean()),
             "energy": three_digits(np.square(values, dtype=float).sum() / energy),
             "fired_on": fired_on(text, places),
             "passages": latent_passages(text, places, active, held, rng),
             "histogram": np.histogram(values, 30, (0, values.max()))[0].tolist(),
             "by_position": mean_by_position(text, active)}

    if shown.stability is not None:
        entry["stability"] = three_digits(shown.stability)
    if detection and detection.question is not None:
        options = [question_text.shown(detection.question[i], active) for i in detection.order]
        entry["question"] = {"passages": options, "answer": int(np.argmin(detection.order))}
    if detection and detection.tasks:
        entry["detected"] = [int(detection.tasks), *map(three_digits, detection.solved)]
    return entry


# ---- Neighbours ----
def nearest_directions(directions, latents, most=NEIGHBOURS):
    """Returns for each of `latents` pairs (another latent, cosine of the two directions), of the
    nearest ones, nearest first; directions [d_sae, d_in]."""
    unit = F.normalize(directions.float(), dim=1)
    cosines = unit[latents] @ unit.T
    cosines[torch.arange(len(latents)), torch.as_tensor(latents)] = -2.0  # itself: last
    values, nearest = cosines.topk(min(most, len(unit) - 1))
    return [[*zip(*row)] for row in zip(nearest.tolist(), values.tolist())]


def fires_together(z, latents, n_tokens, most=NEIGHBOURS):
    """Returns for each of `latents` rows (another latent, share of this one's firings at which the
    other fires too, correlation of the two over all tokens) of those with the highest correlations
    above 0. A latent counts as 1 where it fires and 0 elsewhere.

    z: codes, sparse by column [place, d_sae]; n_tokens: tokens that count.
    """
    fires = z.astype(np.float32)  # a copy
    fires.data[:] = 1
    counts = np.diff(fires.indptr).astype(float)
    both = (fires[:, latents].T @ fires).toarray().astype(float)  # [latents, d_sae]
    deviation = np.sqrt(counts * (n_tokens - counts))

    product = np.maximum(deviation[latents, None] * deviation, 1e-9)
    correlation = (both * n_tokens - counts[latents, None] * counts) / product
    correlation[np.arange(len(latents)), latents] = -2.0  # itself: last
    order = np.argsort(-correlation, axis=1, kind="stable")[:, :most]
    return [[(int(other), both[i, other] / counts[latent], correlation[i, other])
             for other in order[i] if correlation[i, other] > 0]
            for i, latent in enumerate(latents)]


# ---- Logits ----
def common_tokens(windows):
    """Returns the tokens that occur at least COMMON times in the training windows."""
    train = np.arange(windows.n_train)
    return np.flatnonzero(np.bincount(windows.tokens[train][windows.valid(train)]) >= COMMON)


def effect_on_logits(logits, common):
    """Returns the common tokens that a latent promotes and suppresses most, with what it adds to
    their logits [vocabulary] beyond the mean over common tokens, and a histogram of that.

    Tokens never seen in training share one direction and would fill both lists otherwise.
    """
    order = common[np.argsort(logits[common], kind="stable")]
    above_mean = logits - logits[common].sum() / max(1, len(common))
    counts, edges = np.histogram(above_mean[common], EFFECT_BINS)

    def rows(tokens):
        """Returns pairs (token, what is added to its logit)."""
        return [[int(token), three_digits(above_mean[token])] for token in tokens]

    return {"promoted": rows(order[::-1][:NAMED]), "suppressed": rows(order[:NAMED]),
            "logits": {"low": three_digits(edges[0]), "high": three_digits(edges[-1]),
                       "counts": counts.tolist()}}


# ---- Relatives, by variant ----
def strongest_names(weights, names, most=12):
    """Returns pairs (name, weight) of the largest positive weights [n], largest first."""
    values, indices = weights.cpu().topk(min(most, len(weights)))
    pairs = zip(indices.tolist(), values.tolist())
    return [(names[i], value) for i, value in pairs if value > 0]


def children_of(latents, weights, tokenizer, tokens, h):
    """Returns for each of `latents`, of level 2, its children, i.e. the features of level 1 on
    which no other latent has a larger weight, and the other features on which it has one.

    weights [d_2, d_1]; h [batch, seq, d_1]: values of level 1 at tokens [batch, seq]. A feature is
    named by its number and the token at which it is largest, if it fires at all.
    """
    largest_value, token_index = h.flatten(0, 1).max(0)
    texts = vocabulary_texts(tokenizer, tokens.flatten()[token_index].tolist())
    names = [f"{i} {text}" if value > 0 else str(i)
             for i, (text, value) in enumerate(zip(texts, largest_value.tolist()))]

    rows, largest_weight = weights[latents], weights.amax(0)
    return [{"children, features of level 1": strongest_names(row * (row == largest_weight), names),
             "other features of level 1": strongest_names(row * (row < largest_weight), names)}
            for row in rows]


def attention_received(weights, ids, queries, n_features):
    """Returns the share of attention that each feature gets [n_features] from chosen slots.

    weights [n, heads, query, key]: attention among the k slots of a token; ids [n, k]: the feature
    in each slot; queries [n, k]: which slots count as queries.
    """
    per_slot = torch.einsum("nhij,ni->nj", weights, queries.float()).flatten()
    received = torch.zeros(n_features, device=weights.device)
    received = received.index_add(0, ids.flatten(), per_slot)
    return received / received.sum().clamp_min(1e-9)


def compositions_of(latents, reads, fires, ids, values, attention, most=256):
    """Returns for each of `latents` which compositions read it or, where it is a composition,
    which features it reads; and, if the SAE has attention, which features are attended to where it
    fires: by the feature itself, or by all features of the token where it is a composition.

    latents: features are numbered before compositions; reads [d_f, d_c]: how strongly a
    composition reads a feature; fires [batch, seq, latent]; ids, values [token, k]: the features
    of each token; attention(ids, values) -> [token, heads, k, k] or None; most: tokens used.
    """
    n_features, n_compositions = reads.shape
    features, compositions = range(n_features), range(n_features, n_features + n_compositions)
    related = []
    for latent, on in zip(latents.tolist(), fires.flatten(0, 1).T > 0):
        is_feature = latent < n_features
        if is_feature:
            rows = {"compositions that read it": strongest_names(reads[latent], compositions)}
        else:
            read = reads[:, latent - n_features]
            rows = {"features that it reads": strongest_names(read, features)}

        active_ids, active_values = ids[on][:most], values[on][:most]
        weights = attention(active_ids, active_values)
        if weights is not None:
            queries = active_ids == latent if is_feature else active_values > 0
            received = attention_received(weights, active_ids, queries, n_features)
            rows["attention where it fires"] = strongest_names(received, features)
        related.append(rows)
    return related


# ---- The whole page ----
def strongest_tokens(text, z, latents):
    """Returns {latent: the token on which it fires most strongly} of those of `latents` that fire;
    z: codes, sparse by column."""
    latents = np.array(sorted(set(latents)), dtype=int)
    return {int(latent): int(text.flat[places[values.argmax()]])
            for latent, (places, values) in zip(latents, firings(z, latents)) if len(places)}


def passages_of(entries):
    """Yields every passage of the entries of latents."""
    for entry in entries:
        passages, question = entry["passages"], entry.get("question", {"passages": ()})
        yield from chain(passages["top"], *passages["stratified"], passages["random"],
                         question["passages"])


def neighbours_of(entries):
    """Yields the latents that the entries of latents name."""
    for entry in entries:
        rows = chain(entry["similar"], entry["together"], *entry.get("related", {}).values())
        yield from (row[0] for row in rows if isinstance(row[0], int))


class Numbering(dict):
    """Numbers values from 0, in the order in which they are first asked for."""
    def __missing__(self, value):
        return self.setdefault(value, len(self))


def number_texts_and_files(entries, named, text, tokenizer):
    """Puts texts in the place of tokens in entries and `named`, and then in the place of each text
    and each document its number; returns these texts and these documents, in order."""
    texts, files, read = Numbering(), Numbering(), text.reader(tokenizer)
    rows = [row for entry in entries for key in ("promoted", "suppressed", "fired_on")
            for row in entry[key]]
    tokens = sorted({row[0] for row in rows} | set(named.values()))
    token_text = dict(zip(tokens, vocabulary_texts(tokenizer, tokens)))

    for passage in passages_of(entries):
        passage["tokens"] = [texts[part] for part in read(passage.pop("place"), passage["tokens"])]
        passage["file"] = files[passage["file"]]
    for row in rows:
        row[0] = texts[token_text[row[0]]]
    named.update((latent, texts[token_text[token]]) for latent, token in named.items())
    return list(texts), list(files)


def activity_of(z, live, n_tokens):
    """Returns for the page, of all latents: "activity", a digit for each (0: it never fires, 1: too
    seldom, in too few files or on too many tokens to be live, 2: live), and "rates", a histogram of
    log10 of the firing rates of those that fire; and up to ALL_LATENTS each one's "rate" and "max",
    its largest value. live [d_sae]: bool."""
    fired = np.diff(z.indptr)
    kinds = (fired > 0).astype(int) + (live & (fired > 0))
    lowest = int(np.floor(np.log10(1 / n_tokens)))
    counts, _ = np.histogram(np.log10(fired[fired > 0] / n_tokens), RATE_BINS, (lowest, 0))
    found = {"activity": "".join(map(str, kinds)),
             "rates": {"low": lowest, "high": 0, "counts": counts.tolist()}}
    if len(fired) <= ALL_LATENTS:
        found["rate"] = [three_digits(n / n_tokens) for n in fired]
        found["max"] = [three_digits(values.max()) if len(values) else 0
                        for _, values in firings(z, np.arange(len(fired)))]
    return found


def latents_page(windows, tokenizer, shown, z, live, question_size):
    """Returns the content of features.json: what the page shows of latents.

    shown: a PageLatent for each of them; z: codes of the held-out tokens, sparse [place, d_sae] by
    column; live [d_sae]: True at live latents; question_size: tokens of an option of the question.
    """
    text, question_text = Passages(windows, EXCERPT), Passages(windows, question_size)
    latents = np.array([part.latent for part in shown])
    common = common_tokens(windows)
    common = common[common < len(shown[0].logits)]
    energy = np.square(z.data, dtype=float).sum()
    neighbours = fires_together(z, latents, len(text.places))

    entries = []
    for part, firing, together in zip(shown, firings(z, latents), neighbours):
        entry = latent_entry(text, question_text, part, firing, energy)
        entry |= effect_on_logits(part.logits, common)
        entry["similar"] = [[other, three_digits(cosine)] for other, cosine in part.similar]
        entry["together"] = [[other, *map(three_digits, row)] for other, *row in together]
        if part.related:
            entry["related"] = {title: [[label, three_digits(number)]
                                        for label, number in pairs[:RELATIVES]]
                                for title, pairs in part.related.items()}
        entries.append(entry)

    few = z.shape[1] <= ALL_LATENTS
    named = strongest_tokens(text, z, range(z.shape[1]) if few else neighbours_of(entries))
    texts, files = number_texts_and_files(entries, named, text, tokenizer)
    return {"schema": "temporal-sae-runner/features/2", "seed": 0, "n_live": int(live.sum()),
            "tokens": len(text.places), "n_files": len(np.unique(text.files)),
            "n_common": len(common), **activity_of(z, live, len(text.places)), "strings": texts,
            "files": [str(windows.names[file]) for file in files],
            "latents": entries, "named": named}
