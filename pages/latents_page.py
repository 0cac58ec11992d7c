"""The content of features.json, from which pages/ratings.py makes the page of a run's latents."""
from itertools import chain

import numpy as np
import torch

from data.token_text import vocabulary_texts
from runtime.sparse_ops import firings

EXCERPT = 32                # tokens of a passage
STRONGEST = 8               # passages of the strongest firings, one a file
BANDS, PER_BAND = 5, 2      # bands of equally many firings by value, and passages from each
RANDOM = 5                  # passages drawn without regard to the latent: a control
COMMON = 10                 # times a token must occur in training to be named as promoted
NAMED = 10                  # tokens that a latent promotes, and that it suppresses
RELATIVES = 24              # rows of a list of related latents at most


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
        """Returns an excerpt as features.json has it: "values" are pairs (token in the excerpt,
        value) where the latent fires, "peak" is the token for which the excerpt was chosen.

        active [place]: the latent's values; peak: a place or None.
        """
        part = slice(start, self.stop(start))
        values = [[int(i), three_digits(active[start + i])] for i in np.flatnonzero(active[part])]
        return {"file": int(self.file(start)), "at": int(start % self.seq) + 1,
                "tokens": self.flat[part].tolist(), "values": values,
                "peak": None if peak is None else int(peak - start)}


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
    bands = [rng.permutation(band)[:PER_BAND] for band in np.array_split(by_value, BANDS)]
    anywhere = rng.choice(text.places[~np.isin(text.file(text.places), held)], RANDOM)
    return {"top": around(by_value[first_of_file[:STRONGEST]]),
            "stratified": [around(band) for band in bands],
            "random": [text.shown(text.start(place, lead), active) for place in anywhere]}


def mean_by_position(text, active):
    """Returns pairs (first position, mean value of the latent) of up to 32 ranges of positions."""
    edges = np.linspace(0, text.seq, min(text.seq, 32) + 1).astype(int)
    is_token = np.arange(text.seq) < text.lengths[:, None]
    sums = np.add.reduceat(active.reshape(is_token.shape).sum(0), edges[:-1])
    counts = np.add.reduceat(is_token.sum(0), edges[:-1])
    means = sums / np.maximum(counts, 1)
    return [[int(first) + 1, three_digits(mean)] for first, mean in zip(edges, means)]


def latent_entry(text, question_text, latent, firing, detection):
    """Returns what the page shows of a latent's firings.

    text, question_text: Passages of the excerpts and of the question's options; firing: (places
    [n] where the latent fires, its values [n]); detection: a record as in `latents_page`.
    """
    places, values = firing
    active = np.zeros(len(text.flat), dtype=np.float32)
    active[places] = values
    rng = np.random.default_rng([1, int(latent)])

    entry = {"latent": int(latent), "rate": three_digits(len(places) / len(text.places)),
             "files": len(np.unique(text.file(places))), "max": three_digits(values.max()),
             "mean": three_digits(values.mean()),
             "passages": latent_passages(text, places, active, detection.task_files, rng),
             "histogram": np.histogram(values, 30, (0, values.max()))[0].tolist(),
             "by_position": mean_by_position(text, active)}

    if detection.question is not None:
        options = [question_text.shown(detection.question[i], active) for i in detection.order]
        entry["question"] = {"passages": options, "answer": int(np.argmin(detection.order))}
    if detection.tasks:
        entry["detected"] = [int(detection.tasks), *map(three_digits, detection.solved)]
    return entry


def common_tokens(windows):
    """Returns the tokens that occur at least COMMON times in the training windows."""
    train = np.arange(windows.n_train)
    return np.flatnonzero(np.bincount(windows.tokens[train][windows.valid(train)]) >= COMMON)


def effect_on_logits(logits, common):
    """Returns the common tokens that a latent promotes and suppresses most, with what it adds to
    their logits [vocabulary] beyond the mean over common tokens.

    Tokens never seen in training share one direction and would fill both lists otherwise.
    """
    order = common[np.argsort(logits[common], kind="stable")]
    above_mean = logits - logits[common].sum() / max(1, len(common))

    def rows(tokens):
        """Returns pairs (token, what is added to its logit)."""
        return [[int(token), three_digits(above_mean[token])] for token in tokens]

    return {"promoted": rows(order[::-1][:NAMED]), "suppressed": rows(order[:NAMED])}


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


def strongest_tokens(text, z, relations):
    """Returns {latent: the token on which it fires most strongly} of the latents that fire among
    those named by whole numbers in `relations`; z: codes, sparse by column."""
    rows = chain(*relations.values())
    latents = np.array(sorted({label for label, _ in rows if isinstance(label, int)}), dtype=int)
    return {int(latent): int(text.flat[places[values.argmax()]])
            for latent, (places, values) in zip(latents, firings(z, latents)) if len(places)}


def passages_of(entries):
    """Yields every passage of the entries of latents."""
    for entry in entries:
        passages, question = entry["passages"], entry.get("question", {"passages": ()})
        yield from chain(passages["top"], *passages["stratified"], passages["random"],
                         question["passages"])


def number_tokens_and_files(entries, named):
    """Replaces ids of tokens and of documents in entries and `named` by their index among those
    that occur; returns these tokens and these documents, sorted."""
    passages = list(passages_of(entries))
    effects = [entry[key] for entry in entries for key in ("promoted", "suppressed")]
    tokens = {token for passage in passages for token in passage["tokens"]}
    tokens.update(named.values(), (token for rows in effects for token, _ in rows))
    tokens, files = sorted(tokens), sorted({passage["file"] for passage in passages})
    token_index = {token: i for i, token in enumerate(tokens)}
    file_index = {file: i for i, file in enumerate(files)}

    for passage in passages:
        passage["tokens"] = [token_index[token] for token in passage["tokens"]]
        passage["file"] = file_index[passage["file"]]
    for rows in effects:
        rows[:] = [[token_index[token], value] for token, value in rows]
    named.update((latent, token_index[token]) for latent, token in named.items())
    return tokens, files


def latents_page(windows, tokenizer, latents, z, logits, related, n_live, detections,
                 question_size):
    """Returns the content of features.json: what the page shows of `latents` [n].

    z: codes of the held-out tokens, sparse [place, d_sae] by column; logits [n, vocabulary]: what
    each latent's decoder row adds to the model's logits; related: for each latent {title: rows of
    (label, number)}, a label that is a whole number being a latent; n_live: latents from which
    these were drawn; question_size: tokens of an option of the question; detections: a record for
    each latent with `task_files` (documents of its detection tasks), `question` (where the five
    options of the first task begin, the right one first, or None), `order` (in which they are
    shown), `tasks` (their number) and `solved` (how many of them the latent's own profile solves,
    the same among options with the same token, and how many a random profile solves)."""
    text, question_text = Passages(windows, EXCERPT), Passages(windows, question_size)
    common = common_tokens(windows)
    common = common[common < logits.shape[1]]
    rows = zip(latents, firings(z, latents), logits, related, detections)

    entries, named = [], {}     # named: related latent -> the token on which it is strongest
    for latent, firing, logits_added, relations, detection in rows:
        entry = latent_entry(text, question_text, latent, firing, detection)
        entry |= effect_on_logits(logits_added, common)
        if relations:
            entry["related"] = {title: [[label, three_digits(number)]
                                        for label, number in pairs[:RELATIVES]]
                                for title, pairs in relations.items()}
            named |= strongest_tokens(text, z, relations)
        entries.append(entry)

    tokens, files = number_tokens_and_files(entries, named)
    return {"schema": "temporal-sae-runner/features/1", "seed": 0, "n_live": int(n_live),
            "tokens": len(text.places), "n_files": len(np.unique(text.files)),
            "strings": tokenizer.batch_decode([[token] for token in tokens]),
            "files": [str(windows.names[file]) for file in files],
            "latents": entries, "named": named}
