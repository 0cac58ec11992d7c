"""Domains of windows, the nearest to one, and clozes."""
import re
from collections import Counter

import numpy as np
import pytest

from data.tasks import make_clozes, nearest_domains
from data.windows import make_windows, Wanted, Windows
from data_sets import error_of


def planted(mixtures, n_train, n_heldout, length=128, seed=0):
    """Windows of each domain whose tokens are drawn from its own distribution over the vocabulary."""
    rng = np.random.default_rng(seed)
    tokens, domains = [], []
    for n in (n_train, n_heldout):
        for domain, p in mixtures.items():
            tokens.append(rng.choice(len(p), (n, length), p=p))
            domains += [domain] * n
    tokens = np.concatenate(tokens).astype(np.int32)
    tokens[:, 0] = 0
    names = [str(i) for i in range(len(tokens))]
    return Windows(tokens, np.full(len(tokens), length), np.arange(len(tokens)), n_train * len(mixtures), names,
                          domains)


def normal(weights):
    return np.asarray(weights, float) / np.sum(weights)


def test_domains_of_windows_and_the_nearest():
    base, rng = np.zeros((3, 300)), np.random.default_rng(0)
    for row, words in zip(base, np.split(np.arange(300), 3)):
        row[words] = rng.random(100)
    mixtures = {"a": normal(base[0] + .1 * base[2]), "near": normal(base[0] + .3 * base[1]), "far": normal(base[1]),
                "middle": normal(base[0] + base[1]), "rare": normal(base[0] + .1 * base[2])}
    windows = planted(mixtures, 20, 2)
    assert windows.domain_of([0, 25]).tolist() == ["a", "near"]
    assert windows.domain_of(windows.heldout()).tolist() == [name for name in mixtures for _ in range(2)]
    few = np.flatnonzero(windows.domain_of(np.arange(windows.n_train)) != "rare").tolist() + [80, 81, 82, 83]
    windows = windows._replace(tokens=windows.tokens[few], lengths=windows.lengths[few],
                               doc_ids=windows.doc_ids[few], n_train=84)
    assert nearest_domains(windows, "a", 2) == ["near", "middle"]
    assert nearest_domains(windows, "a") == ["near", "middle", "far"]
    assert nearest_domains(windows, "far", 1) == ["middle"]
    assert "'rare' has fewer than 5" in error_of(nearest_domains, windows, "rare")


def strings_of(n):
    """Every third token begins a name, every third goes on with one, the others are neither."""
    return [f" name{i}" if i % 3 == 0 else f"part_{i}" if i % 3 == 1 else (" return", "(", "\n  ", " 12", "_")[i % 5]
            for i in range(n)]


@pytest.fixture(scope="module")
def zipf():
    """Two domains of 3,000 tokens, each with its own order of frequencies."""
    rng = np.random.default_rng(1)
    frequencies = 1 / np.arange(5, 3005)
    return planted({d: normal(rng.permutation(frequencies)) for d in ("a", "b")}, 300, 250, seed=2), strings_of(3_000)


def test_clozes_keep_their_rules(zipf):
    windows, strings = zipf
    lengths = windows.lengths.copy()
    lengths[windows.n_train + 5] = 60
    windows = windows._replace(lengths=lengths)
    found = make_clozes(windows, windows.heldout(), strings)
    assert found.options.shape == (len(found.window), 4) and len(found.window) == len(found.position) > 2_000
    assert max(Counter(found.window).values()) == 8 and set(found.window) <= set(windows.heldout())
    assert len(set(zip(found.window, found.position))) == len(found.window)
    assert found.position[found.window == windows.n_train + 5].max() <= 58
    train = windows.domain_of(np.arange(windows.n_train))
    counts = {d: np.bincount(windows.tokens[:windows.n_train, 1:][train == d].ravel(), minlength=3_000) for d in "ab"}
    for window, position, options in zip(found.window, found.position, found.options):
        tokens = windows.tokens[window]
        assert 33 <= position < windows.lengths[window] - 1 and tokens[position + 1] == options[0]
        assert len(set(options)) == 4 and not set(options) & set(tokens[position - 31:position + 1])
        assert len({option % 3 for option in options}) == 1 and options[0] % 3 < 2
        frequency = counts[windows.domain_of([window])[0]][options]
        assert frequency.min() > 0 and 2 * frequency.min() >= frequency[0] >= frequency.max() / 2
    again, other = (make_clozes(windows, windows.heldout(), strings, seed) for seed in (0, 1))
    assert all(np.array_equal(*pair) for pair in zip(found, again)) and not np.array_equal(found.options, other.options)
    some = make_clozes(windows, windows.heldout()[:3], strings)
    assert set(some.window) == set(windows.heldout()[:3])
    assert make_clozes(windows, [], strings).options.shape == (0, 4)


def test_frequency_cannot_answer_clozes(zipf):
    """A unigram model of the domain, its opposite and one that takes the second are right by chance."""
    windows, strings = zipf
    found = make_clozes(windows, windows.heldout(), strings)
    of, train = windows.domain_of(found.window), windows.domain_of(np.arange(windows.n_train))
    counts = {d: np.bincount(windows.tokens[:windows.n_train, 1:][train == d].ravel(), minlength=3_000) for d in "ab"}
    frequency = np.stack([counts[d][options] for d, options in zip(of, found.options)]) / 1.0
    frequency += np.random.default_rng(0).random(frequency.shape) / 2              # no ties
    rank = (frequency > frequency[:, :1]).sum(1)
    assert len(rank) > 2_000 and (abs(np.bincount(rank) / len(rank) - .25) < .03).all()


def test_clozes_of_the_embedded_corpus(tokenizer):  # noqa: F811
    wanted = Wanted(128, 200_000, 40, 8, 4, 32, 42)
    windows = make_windows("embedded", tokenizer, tokenizer.bos_token_id, wanted)
    strings = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    found = make_clozes(windows, windows.heldout(), strings)
    assert len(found.window) > 2 * len(windows.heldout())
    assert all(re.fullmatch(r" ?_*[^\W\d_]\w*", strings[token]) for token in found.options.ravel())
