"""Synthetic activations with known features: primitives and compositions of two of them; and
states that last."""
from typing import NamedTuple

import numpy as np
from sklearn.preprocessing import normalize

from data.windows import Windows
from runtime.errors import RunnerError

TASKS = ("arithmetic", "boolean", "grammar")
PRIMITIVES, COMPOSED, DIMENSIONS = 64, 128, 96
NOISE = 0.1  # standard deviation in each dimension; directions have length 1
AMOUNTS = (0.5, 1.5)  # of an active primitive, uniform
ACTIVE = (2, 3, 4)  # primitives of a token
PLANTED = 0.5  # of the tokens hold a pair that makes something; others may by chance
NEVER_TOGETHER = 0.2  # of the pairs in training
# tokens that a state lasts -> strength of its direction, and slots for such states; an eighth of
# what is on lasts for long, as SLOW_PLACES supposes
DWELLS = {1: (1.0, 7), 4: (1.0, 7), 16: (0.5, 1), 64: (0.5, 1)}
STATES = 12  # of a slot, which holds one at a time
NOUNS = "cat dog bird horse child river train star king writer garden clock ship lamp friend song"
VERBS = "run sleep turn stop shine break move fall wait change grow stand speak return start end"


class Wiring(NamedTuple):
    """Which primitives make what: 256 pairs make 128 compositions, two pairs each."""
    pairs: np.ndarray  # [256, 2] primitives
    made: np.ndarray  # [256] composition of each pair
    seen: np.ndarray  # [256] False: never together in training; of each composition one may be
    apart: np.ndarray  # [64, 64] True: exclude each other
    words: list  # [64] text of each primitive
    joint: list  # [256] text of each pair

    def table(self):
        """Returns the pair of two primitives, -1 where they make nothing: [64, 64]."""
        table = np.full((PRIMITIVES, PRIMITIVES), -1)
        first, second = self.pairs.T
        table[first, second] = table[second, first] = np.arange(len(self.pairs))
        return table


def make_wiring(task, seed=0):
    """Returns the Wiring of one of TASKS.

    arithmetic: a and 4 b, a and b below 32, make their sum modulo 128, of eight such pairs two.
    boolean: literals of 32 variables, each variable with four others, make the exclusive or of the
    two variables, by name and value.
    grammar: one of 16 nouns and of 16 verbs, each with eight others, make the clause they say where
    both are singular or both plural, and nothing where they disagree.

    Raises RunnerError for another task.
    """
    rng, apart = np.random.default_rng(seed), np.zeros((PRIMITIVES, PRIMITIVES), bool)
    variables, verbs = rng.permutation(32), rng.permutation(16)
    if task == "arithmetic":
        triples, words, joint = _arithmetic(rng)
    elif task == "boolean":
        triples, words, joint = _boolean(variables)
        positive, negative = np.arange(0, PRIMITIVES, 2), np.arange(1, PRIMITIVES, 2)
        apart[positive, negative] = apart[negative, positive] = True
    elif task == "grammar":
        triples, words, joint = _grammar(verbs)
    else:
        raise RunnerError(f"no task {task!r}: {', '.join(TASKS)}.")

    *pairs, made = np.array(triples).T
    lost = np.array([rng.choice(np.flatnonzero(made == c)) for c in range(COMPOSED)])
    seen = np.ones(len(made), bool)
    seen[rng.permutation(lost)[:round(NEVER_TOGETHER * len(made))]] = False
    return Wiring(np.stack(pairs, 1), made, seen, apart, words, joint)


def _arithmetic(rng):
    """Returns [(primitive, primitive, composition)] of sums, and the words and joint of Wiring."""
    triples, half = [], PRIMITIVES // 2
    for total in range(COMPOSED):
        for m in rng.permutation(8)[:2]:  # a = total % 4 + 4 m
            triples.append((total % 4 + 4 * m, half + (total // 4 - m) % 32, total))
    words = [f"{n}" for n in range(half)] + [f"{4 * n}" for n in range(half)]
    return triples, words, [f"{words[i]} + {words[j]} = {total}" for i, j, total in triples]


def _boolean(variables):
    """Returns [(primitive, primitive, composition)] of exclusive ors of `variables` [32], and the
    words and joint of Wiring; primitives 2 v and 2 v + 1 say that v is False and True."""
    triples = []
    partners = [(variables[v], variables[(v + step) % 32]) for v in range(32) for step in (1, 5)]
    for n, (p, q) in enumerate(partners):
        triples += [(2 * p + x, 2 * q + y, 2 * n + (x ^ y)) for x in (0, 1) for y in (0, 1)]
    words = [f"v{n // 2} is {bool(n % 2)}" for n in range(PRIMITIVES)]
    return triples, words, [f"{words[i]} and {words[j]}" for i, j, _ in triples]


def _grammar(verbs):
    """Returns [(primitive, primitive, composition)] of clauses, the verbs in the order `verbs`
    [16], and the words and joint of Wiring; each noun and verb has a singular and a plural."""
    triples, half = [], PRIMITIVES // 2
    clauses = [(noun, verbs[(noun + step) % 16]) for noun in range(16) for step in range(8)]
    for n, (noun, verb) in enumerate(clauses):
        triples += [(2 * noun + number, half + 2 * verb + number, n) for number in (0, 1)]
    words = [noun + end for noun in NOUNS.split() for end in ("", "s")]
    words += [verb + end for verb in VERBS.split() for end in ("s", "")]
    return triples, words, [f"the {words[i]} {words[j]}" for i, j, _ in triples]


def combinations(wired, n, rng, training):
    """Returns the amounts of the primitives in n tokens, [n, 64] float32; in training without the
    pairs that are never together."""
    table, pool = wired.table(), np.flatnonzero(wired.seen | (not training))
    wrong = wired.apart | (training & (table >= 0) & ~wired.seen[table])
    active, todo = np.zeros((n, PRIMITIVES), bool), np.arange(n)
    while len(todo):
        order = rng.random((len(todo), PRIMITIVES))
        planted = np.flatnonzero(rng.random(len(todo)) < PLANTED)
        order[planted[:, None], wired.pairs[rng.choice(pool, len(planted))]] = -1
        rank = order.argsort(1).argsort(1)
        active[todo] = rank < rng.choice(ACTIVE, len(todo))[:, None]
        n_wrong = ((active[todo] @ wrong.astype(np.float32)) * active[todo]).sum(1)
        todo = todo[n_wrong > 0]
    return np.where(active, rng.uniform(*AMOUNTS, active.shape), 0.0).astype(np.float32)


class Synthetic(NamedTuple):
    """x = sum_i a_i d_i + rho sum_ij sqrt(a_i a_j) d_c(i, j) + noise, in windows, and what made it:
    amounts a, directions d, the composition c(i, j) of each pair of primitives."""
    x: np.ndarray  # [window, context_length, 96] float32; the first position, BOS, is 0
    windows: Windows  # the training ones, then DEV, then as many of TEST
    amounts: np.ndarray  # [window * (context_length - 1), 64] primitives
    directions: np.ndarray  # [64 + 128, 96] of primitives, then compositions; unit norm
    wired: Wiring
    rho: float

    def composed(self):
        """Returns the amounts of the compositions, [token, 128] float32."""
        composed = np.zeros((len(self.amounts), COMPOSED), np.float32)
        first, second = self.wired.pairs.T
        of_pairs = np.sqrt(self.amounts[:, first] * self.amounts[:, second])
        np.add.at(composed.T, self.wired.made, of_pairs.T)
        return composed

    def parts(self):
        """Returns the tokens of training, DEV and TEST, three slices."""
        seq = self.windows.tokens.shape[1] - 1
        trained, end = self.windows.n_train * seq, len(self.amounts)
        middle = trained + (end - trained) // seq // 2 * seq
        return slice(0, trained), slice(trained, middle), slice(middle, end)

    def flat_x(self):
        """Returns x without the first positions, [token, 96]."""
        return self.x[:, 1:].reshape(-1, DIMENSIONS)


def make_synthetic(task, rho, context_length, n_tokens, forget="", seed=0):
    """Returns the Synthetic of about n_tokens training tokens and half as many for each of DEV and
    TEST.

    Every token is drawn by itself; its id is 1 + its largest primitive. Every second document is of
    the domain `forget`.
    """
    rng, wired, seq = np.random.default_rng(seed), make_wiring(task, seed), context_length - 1
    n_train = max(8, n_tokens // seq)
    n_heldout = 2 * max(4, n_tokens // seq // 2)
    n = n_train + n_heldout
    directions = normalize(rng.standard_normal((PRIMITIVES + COMPOSED, DIMENSIONS)))
    amounts = np.concatenate([combinations(wired, n_train * seq, rng, True),
                              combinations(wired, n_heldout * seq, rng, False)])

    tokens = np.zeros((n, context_length), np.int32)
    tokens[:, 1:] = 1 + amounts.argmax(1).reshape(n, seq)
    names = [f"{task}#{i}" for i in range(n)]
    domains = [forget if i % 2 else "other" for i in range(n)]
    windows = Windows(tokens, np.full(n, context_length), np.arange(n), n_train, names, domains)

    empty = np.zeros((n, context_length, DIMENSIONS), np.float32)
    synthetic = Synthetic(empty, windows, amounts, directions, wired, rho)
    x = amounts @ directions[:PRIMITIVES] + rho * synthetic.composed() @ directions[PRIMITIVES:]
    synthetic.x[:, 1:] = (x + NOISE * rng.standard_normal(x.shape)).reshape(n, seq, -1)
    return synthetic


# ---- States that last ----
class Sequences(NamedTuple):
    """x_t = sum of strength * a * d of the states that are on + noise, in windows, and what made
    it. One state of each slot of DWELLS is on; each lasts a random time with that mean."""
    x: np.ndarray  # [window, context_length, 96] float32; the first position, BOS, is 0
    windows: Windows  # the training ones, then DEV, then as many of TEST
    on: np.ndarray  # [window, seq, state] bool
    begins: np.ndarray  # [window, seq, state] bool: here it comes on, not at the first position
    directions: np.ndarray  # [state, 96], unit norm
    dwells: np.ndarray  # [state] mean number of tokens that it lasts


def make_sequences(context_length, n_tokens, seed=0):
    """Returns the Sequences of about n_tokens training tokens and half as many for each of DEV and
    TEST. A token's id is 1 + the state of dwell 1 in the first slot."""
    rng, seq = np.random.default_rng(seed), context_length - 1
    n_train = max(8, n_tokens // seq)
    n = n_train + 2 * max(4, n_tokens // seq // 2)
    slots = [(dwell, strength) for dwell, (strength, n_slots) in DWELLS.items()
             for _ in range(n_slots)]
    amounts = np.zeros((n, seq, len(slots), STATES), np.float32)
    begins = np.zeros(amounts.shape, bool)
    for i, (dwell, strength) in enumerate(slots):
        state, amount = rng.integers(STATES, size=n), rng.uniform(*AMOUNTS, n)
        for t in range(seq):
            change = rng.random(n) < 1 / dwell if t else np.zeros(n, bool)
            other = (state + rng.integers(1, STATES, n)) % STATES
            state = np.where(change, other, state)
            amount = np.where(change, rng.uniform(*AMOUNTS, n), amount)
            amounts[np.arange(n), t, i, state] = strength * amount
            begins[np.arange(n)[change], t, i, state[change]] = True

    amounts, begins = (a.reshape(n, seq, -1) for a in (amounts, begins))
    directions = normalize(rng.standard_normal((amounts.shape[2], DIMENSIONS)))
    x = np.zeros((n, context_length, DIMENSIONS), np.float32)
    x[:, 1:] = amounts @ directions + NOISE * rng.standard_normal((n, seq, DIMENSIONS))
    tokens = np.zeros((n, context_length), np.int32)
    tokens[:, 1:] = 1 + amounts[..., :STATES].argmax(-1)
    windows = Windows(tokens, np.full(n, context_length), np.arange(n), n_train,
                      [f"sequence#{i}" for i in range(n)], ["sequences"] * n)
    dwells = np.repeat([dwell for dwell, _ in slots], STATES)
    return Sequences(x, windows, amounts > 0, begins, directions, dwells)
