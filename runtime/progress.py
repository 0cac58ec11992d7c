"""Progress and the time budget."""
import time

import numpy as np
from tqdm import tqdm


def steps_left(steps, step):
    """Of each stage's steps those to come, where `step` are done."""
    return [int(min(n, max(0, end - step))) for n, end in zip(steps, np.cumsum(steps))]


def fit_to_deadline(steps, step, seconds, deadline):
    """Steps of each stage, of which `step` are done; those to come, of so many `seconds` each, shrink in proportion to end
    before `deadline`."""
    left = steps_left(steps, step)
    need, have = sum(n * s for n, s in zip(left, seconds)), max(deadline - time.time(), 0.0)
    if need <= have:
        return steps
    return [n - l + max(int(l > 0), int(l * have / need * 0.97)) for n, l in zip(steps, left)]


class Progress:
    """A bar on a terminal; elsewhere a line every 15 seconds."""

    def __init__(self, total, done):
        self.bar, self.said = tqdm(total=total, initial=done, disable=None), time.time()

    def update(self, what, values):
        self.bar.update()
        if self.bar.disable and time.time() - self.said > 15:
            self.said = time.time()
            print(f"  {what}", *(f"{name} {value:.4g}" for name, value in values.items()), flush=True)
