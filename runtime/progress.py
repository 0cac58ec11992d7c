"""Progress of a run and its time budget."""
import time

import numpy as np
from tqdm import tqdm


def steps_left(steps, step):
    """Returns how many of each stage's steps are still to come where `step` of all are done."""
    return [int(min(n, max(0, end - step))) for n, end in zip(steps, np.cumsum(steps))]


def fit_to_deadline(steps, step, seconds, deadline):
    """Returns the steps of each stage, shrunk in proportion to end before `deadline` (Unix time).

    Of all steps `step` are done, which stay; the others take so many `seconds` each, by stage. A
    stage with steps to come keeps at least one.
    """
    left = steps_left(steps, step)
    need, have = sum(n * s for n, s in zip(left, seconds)), max(deadline - time.time(), 0.0)
    if need <= have:
        return steps
    shrunk = [max(int(n > 0), int(n * have / need * 0.97)) for n in left]
    return [n - before + after for n, before, after in zip(steps, left, shrunk)]


class Progress:
    """A bar on a terminal; elsewhere a line of text every 15 seconds."""

    def __init__(self, total, done):
        """Begins at `done` of `total` steps."""
        self.bar, self.printed = tqdm(total=total, initial=done, disable=None), time.time()

    def update(self, name, values):
        """Counts a step; `name` and values {name: number} are what a line of text tells."""
        self.bar.update()
        if self.bar.disable and time.time() - self.printed > 15:
            self.printed = time.time()
            print(f"  {name}", *(f"{key} {value:.4g}" for key, value in values.items()), flush=True)
