"""The data of features.html."""
from itertools import chain

import numpy as np
import torch
from scipy.sparse import csr_array
from sklearn.linear_model import LogisticRegression

from runtime.sparse_ops import firings


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
        values = [[int(i), three_digits(active[start + i])] for i in np.flatnonzero(active[part])]
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


def three_digits(value):
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
    keep_strongest, lead = at[np.argsort(-active[at], kind="stable")], text.size * 3 // 4
    first = np.sort(np.unique(text.file(keep_strongest), return_index=True)[1])[:TOP]
    bands = np.array_split(keep_strongest, BANDS)
    drawn = [rng.permutation(band)[:A_BAND] for band in bands]
    random_ones = rng.choice(text.places[~np.isin(text.file(text.places), held)], NULL)
    return {"top": [text.shown(text.start(p, lead), active, p) for p in keep_strongest[first]],
            "stratified": [[text.shown(text.start(p, lead), active, p) for p in band] for band in drawn],
            "random": [text.shown(text.start(p, lead), active) for p in random_ones]}, keep_strongest


def latent_entry(text, short_text, latent, at, values, rng):
    """What the page shows of a latent that fires at places `at` [n] with `values` [n], and of each task whether its own
    profile finds where it fires, also among like tokens, and whether one of random places does: [tasks, 3] in [0, 1],
    NaN where there is no such task. short_text: Passages of the tasks."""
    active = np.zeros(len(text.flat), dtype=np.float32)
    active[at] = values
    files = rng.permutation(np.unique(text.file(at)))
    held = files[:min(DETECTION_TASKS, len(files) // 4)]
    tasks = detection_tasks(short_text, at, active, held, rng)
    passages, keep_strongest = latent_passages(text, at, active, held, rng)
    known = text.places[~np.isin(text.file(text.places), held)]
    quiet, drawn = rng.permutation(known[active[known] == 0])[:4 * PROFILE], rng.permutation(known)[:5 * PROFILE]
    own, chance = text.profile(keep_strongest[:PROFILE], quiet), text.profile(drawn[::5], np.delete(drawn, np.s_[::5]))
    right = [[short_text.guessed(profile, options) if options else np.nan for profile, options in (
        (own, anywhere), (own, like), (chance, anywhere))] for anywhere, like in tasks]
    question = next((options for options, _ in tasks if options), None)
    order, edges = rng.permutation(OPTIONS), np.linspace(0, text.seq, min(text.seq, 32) + 1).astype(int)
    keep = np.arange(text.seq) < text.lengths[:, None]
    sums, n = (np.add.reduceat(a.sum(0), edges[:-1]) for a in (active.reshape(keep.shape), keep))
    entry = {"latent": int(latent), "rate": three_digits(len(at) / len(text.places)), "files": len(files),
             "max": three_digits(values.max()), "mean": three_digits(values.mean()), "passages": passages,
             "histogram": np.histogram(values, 30, (0, values.max()))[0].tolist(),
             "by_position": [[int(low) + 1, three_digits(mean)] for low, mean in zip(edges, sums / np.maximum(n, 1))]}
    if question:
        entry["question"] = {"passages": [short_text.shown(question[i], active) for i in order],
                             "answer": int(np.argmin(order))}
    return entry, np.array(right).reshape(-1, 3)


def strongest_names(weights, names, most=12):
    """What a latent is related to: the names of the largest of `weights` [n] above 0, and these."""
    values, at = weights.cpu().topk(min(most, len(weights)))
    return [(names[i], value) for i, value in zip(at.tolist(), values.tolist()) if value > 0]


def children_of(latents, weights, tokenizer, tokens, h):
    """Of latents of level 2, weights [d_2, d_1]: the features of level 1 on which no other latent has a larger weight, and
    those on which one has. A feature is named by its number and the one of tokens [batch, seq] where h [batch, seq, d_1]
    is largest, if it is anywhere."""
    most, at = h.flatten(0, 1).max(0)
    texts = tokenizer.batch_decode(tokens.flatten()[at, None])
    names = [f"{i} {text}" if value > 0 else str(i) for i, (text, value) in enumerate(zip(texts, most.tolist()))]
    own, largest = weights[latents], weights.amax(0)
    return [{"children, features of level 1": strongest_names(row * (row == largest), names),
             "other features of level 1": strongest_names(row * (row < largest), names)} for row in own]


def compositions_of(latents, reads, fires, ids, f, attention, most=256):
    """Of latents, features first: how strongly a composition reads features, or which compositions read a feature, reads
    [d_f, d_c]; and, where attention(ids, f) gives some, the mean attention that features get where the latent fires [batch, seq,
    latent]: from it or, where it is a composition, from all features of the token, ids [n, k] with values f [n, k]."""
    n, found = len(reads), []
    for latent, on in zip(latents.tolist(), fires.flatten(0, 1).T > 0):
        rows = {"compositions that read it": strongest_names(reads[latent], range(n, n + reads.shape[1]))} if latent < n else {
            "features that it reads": strongest_names(reads[:, latent - n], range(n))}
        here, values = ids[on][:most], f[on][:most]
        if (seen := attention(here, values)) is not None:
            of = here == latent if latent < n else values > 0
            weights = torch.einsum("nhij,ni->nj", seen, of.float()).flatten()
            got = torch.zeros(n, device=f.device).index_add(0, here.flatten(), weights)
            rows["attention where it fires"] = strongest_names(got / got.sum().clamp_min(1e-9), range(n))
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
        entry |= {"promoted": [[int(i), three_digits(logit[i])] for i in order[::-1][:10]],
                  "suppressed": [[int(i), three_digits(logit[i])] for i in order[:10]]}
        if relation:
            entry["related"] = {title: [[label, three_digits(value)] for label, value in rows[:24]]
                                for title, rows in relation.items()}
            others = sorted({label for rows in relation.values() for label, _ in rows if isinstance(label, int)})
            named |= {i: int(texts[0].flat[at[values.argmax()]])
                      for i, (at, values) in zip(others, firings(z, np.array(others, int))) if len(at)}
        if len(found):
            entry["detected"] = [int(found.shape[0]), *(three_digits(value) for value in np.nansum(found, 0))]
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
