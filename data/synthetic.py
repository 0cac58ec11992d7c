"""Synthetic activations with known features."""
from typing import NamedTuple

import numpy as np
from sklearn.preprocessing import normalize

from data.windows import Windows
from runtime.errors import RunnerError


TASKS = ("arithmetic", "boolean", "grammar")
PRIMITIVES, COMPOSED, DIMENSIONS, NOISE = 64, 128, 96, 0.1
AMOUNTS = (0.5, 1.5)         # of an active primitive, uniform
ACTIVE = (2, 3, 4)           # primitives of a token
PLANTED = 0.5                # of the tokens hold a pair that makes something; others may by chance
NEVER_TOGETHER = 0.2         # of the pairs in training


class Wiring(NamedTuple):
    """Which primitives make what: 256 pairs make 128 compositions, two pairs each."""
    pairs: np.ndarray       # [256, 2] primitives
    made: np.ndarray        # [256] composition of each pair
    seen: np.ndarray        # [256] False: never together in training; the other pair of that composition is
    apart: np.ndarray       # [64, 64] True: exclude each other
    words: list             # [64] text of each primitive
    joint: list             # [256] text of each pair

    def table(self):
        """[64, 64] pair of two primitives, -1 where they make nothing."""
        found = np.full((PRIMITIVES, PRIMITIVES), -1)
        found[tuple(self.pairs.T)] = found[tuple(self.pairs.T[::-1])] = np.arange(len(self.pairs))
        return found


def make_wiring(task, seed=0):
    """arithmetic: a and 4 b, a and b below 32, make their sum modulo 128, of eight such pairs two. boolean: literals of
    32 variables, each variable with four others, make the exclusive or of the two variables, by name and value.
    grammar: one of 16 nouns and of 16 verbs, each with eight others, make the clause they say where both are singular
    or both plural, and nothing where they disagree."""
    rng, found, apart = np.random.default_rng(seed), [], np.zeros((PRIMITIVES, PRIMITIVES), bool)
    first, second, half = rng.permutation(32), rng.permutation(16), PRIMITIVES // 2
    if task == "arithmetic":
        for total in range(COMPOSED):
            for m in rng.permutation(8)[:2]:                # a = total % 4 + 4 m
                found.append((total % 4 + 4 * m, half + (total // 4 - m) % 32, total))
        words = [f"{n}" for n in range(half)] + [f"{4 * n}" for n in range(half)]
        joint = [f"{words[i]} + {words[j]} = {made}" for i, j, made in found]
    elif task == "boolean":
        steps = [(first[v], first[(v + step) % 32]) for v in range(32) for step in (1, 5)]
        for n, (p, q) in enumerate(steps):
            found += [(2 * p + x, 2 * q + y, 2 * n + (x ^ y)) for x in (0, 1) for y in (0, 1)]
        for v in range(32):
            apart[2 * v, 2 * v + 1] = apart[2 * v + 1, 2 * v] = True
        words = [f"v{n // 2} is {bool(n % 2)}" for n in range(PRIMITIVES)]
        joint = [f"{words[i]} and {words[j]}" for i, j, _ in found]
    elif task == "grammar":
        for n, v in enumerate((n, second[(n + step) % 16]) for n in range(16) for step in range(8)):
            found += [(2 * v[0] + number, half + 2 * v[1] + number, n) for number in (0, 1)]
        words = [noun + end for noun in NOUNS for end in ("", "s")] + [verb + end for verb in VERBS for end in ("s", "")]
        joint = [f"the {words[i]} {words[j]}" for i, j, _ in found]
    else:
        raise RunnerError(f"no task {task!r}: {', '.join(TASKS)}.")
    *pairs, made = np.array(found).T
    lost = np.array([rng.choice(np.flatnonzero(made == c)) for c in range(COMPOSED)])
    seen = np.ones(len(made), bool)
    seen[rng.permutation(lost)[:round(NEVER_TOGETHER * len(made))]] = False
    return Wiring(np.stack(pairs, 1), made, seen, apart, words, joint)


NOUNS = ("cat dog bird horse child river train star king writer garden clock ship lamp friend song").split()
VERBS = ("run sleep turn stop shine break move fall wait change grow stand speak return start end").split()


def combinations(wired, n, rng, training):
    """Amounts of the primitives in n tokens, [n, 64]; in training without the pairs that are never together."""
    table, pool = wired.table(), np.flatnonzero(wired.seen | (not training))
    wrong = wired.apart | (training & (table >= 0) & ~wired.seen[table])
    active, todo = np.zeros((n, PRIMITIVES), bool), np.arange(n)
    while len(todo):
        order = rng.random((len(todo), PRIMITIVES))
        planted = np.flatnonzero(rng.random(len(todo)) < PLANTED)
        order[planted[:, None], wired.pairs[rng.choice(pool, len(planted))]] = -1
        rank = order.argsort(1).argsort(1)
        active[todo] = rank < rng.choice(ACTIVE, len(todo))[:, None]
        todo = todo[((active[todo] @ wrong.astype(np.float32)) * active[todo]).sum(1) > 0]
    return np.where(active, rng.uniform(*AMOUNTS, active.shape), 0.0).astype(np.float32)


class Synthetic(NamedTuple):
    """x = sum_i a_i d_i + rho sum_ij sqrt(a_i a_j) d_c(i, j) + noise, windows of it, and what made it."""
    x: np.ndarray           # [window, context_length, 96] float32; the first position, BOS, is 0
    windows: Windows        # the training ones, then DEV, then as many of TEST
    amounts: np.ndarray     # [window * (context_length - 1), 64] primitives
    directions: np.ndarray  # [64 + 128, 96] of primitives, then compositions; unit norm
    wired: Wiring
    rho: float

    def composed(self):
        """Amounts of the compositions, [token, 128]."""
        (first, second), found = self.wired.pairs.T, np.zeros((len(self.amounts), COMPOSED), np.float32)
        np.add.at(found.T, self.wired.made, np.sqrt(self.amounts[:, first] * self.amounts[:, second]).T)
        return found

    def parts(self):
        """Tokens of training, DEV, TEST: three slices."""
        seq = self.windows.tokens.shape[1] - 1
        a, end = self.windows.n_train * seq, len(self.amounts)
        middle = a + (end - a) // seq // 2 * seq
        return slice(0, a), slice(a, middle), slice(middle, end)

    def flat_x(self):
        return self.x[:, 1:].reshape(-1, DIMENSIONS)


def make_synthetic(task, rho, context_length, n_tokens, forget="", seed=0):
    """Synthetic of about n_tokens training tokens and half as many for each of DEV and TEST. Every token is drawn by
    itself; its id is 1 + its largest primitive; every second document is of the domain `forget`."""
    rng, wired, seq = np.random.default_rng(seed), make_wiring(task, seed), context_length - 1
    n_train = max(8, n_tokens // seq)
    n_held = 2 * max(4, n_tokens // seq // 2)
    directions = normalize(rng.standard_normal((PRIMITIVES + COMPOSED, DIMENSIONS)))
    amounts = np.concatenate([combinations(wired, n_train * seq, rng, True),
                              combinations(wired, n_held * seq, rng, False)])
    n, tokens = n_train + n_held, np.zeros((n_train + n_held, context_length), np.int32)
    tokens[:, 1:] = 1 + amounts.argmax(1).reshape(n, seq)
    windows = Windows(tokens, np.full(n, context_length), np.arange(n), n_train, [f"{task}#{i}" for i in range(n)],
                      [forget if i % 2 else "other" for i in range(n)])
    made = Synthetic(np.zeros((n, context_length, DIMENSIONS), np.float32), windows, amounts, directions, wired, rho)
    x = amounts @ directions[:PRIMITIVES] + rho * made.composed() @ directions[PRIMITIVES:]
    made.x[:, 1:] = (x + NOISE * rng.standard_normal(x.shape)).reshape(n, seq, -1)
    return made
