"""Classes of tokens, coherence, entropies and similarity between positions on planted units."""
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.sparse import csr_array

from small_saes import close

# ---- Classes and coherence ----
def test_token_classes(E, make_store):
    tokens = np.array([[0, 1, 1], [0, 7, 7], [0, 7, 2], [0, 2, 7], [0, 5, 7]])
    store = make_store(torch.randn(5, 3, 2), 1, tokens)
    assert E.token_classes(store.windows)[[0, 1, 2, 5, 7]].tolist() == [0] * 5     # the most frequent token
    of_token = dict(zip(tokens[1:, 1:].ravel().tolist(), E.token_classes(store.windows).tolist()))
    assert of_token[7] == 0 and of_token[2] == 1 and len(set(of_token.values())) == 3
    labels = np.zeros((4, 3, 2), np.int8) - 1
    labels[:, 1] = [[0, 1], [0, 2], [0, 1], [1, 1]]
    store.windows = store.windows._replace(labels=labels)
    a, b, c, d = E.token_classes(store.windows).reshape(4, 2)[:, 0].tolist()
    assert a == c and len({a, b, d}) == 3
    store.windows = store.windows._replace(labels=np.full((4, 3, 2), -1, np.int8))
    assert E.token_classes(store.windows)[0] == 0               # nothing known: by token


def test_token_classes_beyond_the_255_most_frequent(E, make_store):
    tokens = np.concatenate([np.arange(400), np.arange(254), np.arange(253), np.full(93, 399)]).reshape(10, 100)
    windows = np.concatenate([np.zeros((10, 1), int), tokens], 1)
    store = make_store(torch.randn(11, 101, 1), 1, np.concatenate([windows[:1], windows]))
    classes = E.token_classes(store.windows)
    of_token = dict(zip(tokens.ravel().tolist(), classes.tolist()))
    assert of_token[399] == 0 and {of_token[i] for i in range(254)} == set(range(1, 255))
    assert {of_token[i] for i in range(254, 399)} == {255}


class Roles:
    """128 files of two windows of 127 positions with 50 classes; latents fire on the classes of their role."""
    n_windows, n_classes = 256, 50

    def __init__(self, seed=0):
        self.rng = np.random.default_rng(seed)
        self.classes = self.rng.integers(0, self.n_classes, self.n_windows * 127)
        self.files = np.repeat(np.arange(128), 2) + 1000
        window, self.position = np.divmod(np.arange(len(self.classes)), 127)
        self.late, self.odd = self.position >= 63, self.files[window] % 2 == 1
        self.early = self.position < 32
        self.roles = [self.rng.choice(self.n_classes, 3, replace=False) for _ in range(100)]

    def firings(self, early, late, odd=None, n=60):
        """Indices where a latent of role `early` (at positions 1-32; in odd files `odd`, where given) and `late`
        (from 64 on) fires; where the role is not looked at, it fires often, and on other classes."""
        on_early, on_late = (np.isin(self.classes, role) for role in (early, late))
        on_odd = on_early if odd is None else np.isin(self.classes, odd)
        blocks = [on_early & self.early & ~self.odd, on_odd & self.early & self.odd, on_late & self.late & self.odd]
        chosen = [self.rng.choice(np.flatnonzero(block), n, replace=False) for block in blocks]
        other = np.isin(self.classes, self.roles[self.rng.integers(100)]) & ~self.early & ~(self.late & self.odd)
        return np.sort(np.concatenate([*chosen, self.rng.choice(np.flatnonzero(other), 300, replace=False)]))

    def coherence(self, E, firings, rate=None, **kwargs):
        rate = np.linspace(0.01, 0.02, len(firings)) if rate is None else np.asarray(rate)
        return E.coherence(firings, self.classes, self.files, rate, np.random.default_rng(0), **kwargs)


@pytest.mark.parametrize("swapped", [0, 50, 100])
def test_coherence_is_the_share_of_stable_roles(E, settings, swapped):
    """The first `swapped` latents exchange their roles in pairs between positions 1-32 and 64 and later."""
    settings(CONTEXT_LENGTH=128)
    plan = Roles()
    firings = [plan.firings(plan.roles[i], plan.roles[i ^ 1 if i < swapped else i]) for i in range(100)]
    assert plan.coherence(E, firings) == pytest.approx(1 - swapped / 100, abs=0.05)


def test_coherence_is_over_the_recognition_in_the_same_block(E, settings):
    """Half of the latents change their roles between files and not between positions: as coherent as files allow."""
    settings(CONTEXT_LENGTH=128)
    plan = Roles()
    others = [plan.roles[i ^ 1 if i < 50 else i] for i in range(100)]
    assert plan.coherence(E, [plan.firings(plan.roles[i], others[i], others[i]) for i in range(100)]) > 0.9


def test_coherence_counts_from_chance(E, settings):
    """Of ten, one would be recognised by chance: none is where roles are swapped, all are in the same block."""
    settings(CONTEXT_LENGTH=128)
    plan = Roles()
    firings = [plan.firings(range(5 * i, 5 * i + 5), range(5 * (i ^ 1), 5 * (i ^ 1) + 5)) for i in range(10)]
    assert plan.coherence(E, firings) == pytest.approx((0 - 1) / (10 - 1))


def test_coherence_compares_latents_of_like_rate(E, settings):
    """From 64 on, ten latents fire mostly on what another one fires on early: told apart where that one, by its
    rate, is in another group."""
    settings(CONTEXT_LENGTH=128)
    plan, firings = Roles(), []
    pairs = [([4 * i, 4 * i + 1], [4 * i + 2, 4 * i + 3]) for i in range(10)]
    firings += [plan.firings(own, own[:1] + other) for own, other in pairs]
    firings += [plan.firings(other, other) for own, other in pairs]
    near = [2 * i for i in range(10)] + [2 * i + 1 for i in range(10)]
    assert plan.coherence(E, firings, np.arange(20), group=10) > 0.9
    assert plan.coherence(E, firings, near, group=10) == pytest.approx(0.5, abs=0.1)
    assert plan.coherence(E, firings, np.arange(20), group=20) == pytest.approx(0.5, abs=0.1)


def test_coherence_of_too_few_latents_is_none(E, settings):
    settings(CONTEXT_LENGTH=128)
    plan = Roles()
    firings = [plan.firings(role, role) for role in plan.roles[:12]]
    assert plan.coherence(E, firings) is not None
    assert plan.coherence(E, firings[:9]) is None
    assert plan.coherence(E, [plan.firings(role, role, n=49) for role in plan.roles[:12]]) is None
    assert plan.coherence(E, []) is None
    early = [f[plan.early[f]] for f in firings]         # nothing at later positions
    assert plan.coherence(E, early) is None


@pytest.mark.parametrize("n", [12, 40])
def test_coherence_of_latents_without_roles_stays_within_bounds(E, settings, n):
    """Where the same block is not recognised above chance there is nothing to divide by."""
    settings(CONTEXT_LENGTH=128)
    every = np.arange(50)
    for seed in range(6):
        plan = Roles(seed)
        value = plan.coherence(E, [plan.firings(every, every) for _ in range(n)])
        assert value is None or abs(value) < 10


# ---- Entropies ----
def test_entropy_by_hand(E):
    assert E.miller_madow_entropy(np.array([4, 4, 4])) == 0.0
    assert E.miller_madow_entropy(np.array([1, 1, 2, 3])) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(4) + 2 / 8)
    assert E.miller_madow_entropy(np.array([9, 5] * 8)) == pytest.approx(math.log(2) + 1 / 32)


def test_entropy_is_nearly_unbiased(E):
    rng = np.random.default_rng(0)
    found = np.mean([E.miller_madow_entropy(rng.integers(0, 20, 64)) for _ in range(400)])
    assert found == pytest.approx(math.log(20), abs=0.03)


@pytest.mark.parametrize("kind, low, high", [("random", 0.95, 1.05), ("token", 0.0, 0.001), ("class", 0.0, 0.001),
                                             ("two tokens", 0.15, 0.3), ("mixed", 0.48, 0.53)])
def test_polysemanticity_of_planted_units(E, kind, low, high):
    """Tokens and classes independent: a unit of one of either has none, by the smaller of the two."""
    rng = np.random.default_rng(0)
    tokens, classes = rng.integers(0, 30, 20000), rng.integers(0, 8, 20000)

    def unit(kind):
        among = {"token": tokens == 3, "class": classes == 2, "two tokens": np.isin(tokens, (3, 4))}
        return rng.choice(np.flatnonzero(among.get(kind, np.ones(20000, bool))), 200, replace=False)
    units = [unit(("random", "token")[i % 2] if kind == "mixed" else kind) for i in range(40)]
    found = E.polysemanticity(units, (tokens, classes), np.arange(20000), np.random.default_rng(1))
    assert low <= found <= high


def test_polysemanticity_of_units_that_fire_too_rarely(E):
    rng, places, kinds = np.random.default_rng(0), np.arange(500), (np.arange(500), np.arange(500) % 7)
    assert E.polysemanticity([np.arange(63)] * 5, kinds, places, rng) == 1.0
    one_class = np.flatnonzero(kinds[1] == 3)[:64]      # 64 firings are enough, and all that counts
    assert E.polysemanticity([np.arange(63), one_class], kinds, places, rng) == 0.0


def test_polysemanticity_is_over_the_null_at_its_places(E):
    """Where the null's places hold two kinds, four kinds are twice as many nats."""
    kinds, rng = (np.arange(4000) % 4, np.arange(4000) % 4), np.random.default_rng(0)
    two = np.flatnonzero(kinds[0] < 2)
    assert E.polysemanticity([np.arange(4000)] * 20, kinds, two, rng) == pytest.approx(2, rel=0.05)


# ---- Similarity between positions ----
def loop_similarity(z):
    z = F.normalize(z.double(), dim=-1)
    n, seq, _ = z.shape
    matrix = torch.zeros(seq, seq)
    for t, s in itertools.product(range(seq), repeat=2):
        same = sum(z[w, t] @ z[w, s] for w in range(n)) / n
        other = sum(z[a, t] @ z[b, s] for a in range(n) for b in range(n) if a != b) / n / (n - 1)
        matrix[t, s] = same - other
    return matrix


def similarity_matrix(E, z):
    return torch.from_numpy(E.similarity_matrix(csr_array(z.flatten(0, 1).numpy()), z.shape[1]))


def test_similarity_matrix_against_a_double_loop(E):
    z = torch.randn(24, 6, 9, generator=torch.Generator().manual_seed(0)).relu()       # more than one chunk
    close(similarity_matrix(E, z), loop_similarity(z), 1e-5)


@pytest.mark.parametrize("kind, wanted", [("constant", 0.0), ("document", 1.0), ("position", 0.0)])
def test_similarity_matrix_of_planted_codes(E, kind, wanted):
    """Of one code for all, of one for each document, of one for each position: only the second stands out."""
    n, seq = 20, 6
    z = {"constant": torch.ones(n, seq, n), "document": 3 * torch.eye(n)[:, None].expand(n, seq, n),
         "position": torch.eye(n)[:seq].expand(n, seq, n)}[kind]
    got = similarity_matrix(E, z)
    assert torch.allclose(got.float(), torch.full((seq, seq), wanted), atol=1e-5)
