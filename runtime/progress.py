"""Progress of a run and its time budget."""
import json
import time
from contextlib import contextmanager, suppress

import numpy as np
from tqdm import tqdm

from runtime.files import replacing

LINE_SECONDS = 15  # between two lines of text
BAR_SECONDS = 0.5  # between two looks at the losses, which a GPU must wait for


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


def readable_time(seconds):
    """Returns a duration as text: "40 s", "4 min", "1 h 20 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


class KnownTimes:
    """How long steps of runs took when they were last done here, kept in a file: for forecasts
    alone. A step's name says its size too."""

    def __init__(self, path):
        self.path, self.seconds = path, {}
        with suppress(OSError, ValueError):
            self.seconds = json.loads(path.read_text(encoding="utf-8"))

    def of(self, names):
        """Returns the seconds of the named steps together, unknown ones as 0, and whether all are
        known."""
        known = [self.seconds[name] for name in names if name in self.seconds]
        return sum(known), len(known) == len(names)

    @contextmanager
    def measured(self, label, name):
        """Prints the label of a step, and about how long it will take; keeps what the block took
        under the name of the step."""
        seconds, known = self.of([name])
        print(label + f", about {readable_time(seconds)}" * known, flush=True)
        began = time.time()
        yield
        self.seconds[name] = round(time.time() - began, 1)
        with replacing(self.path, durable=False) as partial:
            partial.write_text(json.dumps(self.seconds), encoding="utf-8")


class Progress:
    """A bar on a terminal; elsewhere a line of text every 15 seconds."""

    def __init__(self, what, total, done):
        """Begins at `done` of `total` steps of `what`."""
        layout = "{desc} {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt}{postfix}"
        self.bar = tqdm(total=total, initial=done, desc=what, disable=None, bar_format=layout)
        self.what, self.printed = what, time.time()

    def update(self, stage, step, losses, seconds_left):
        """Counts a step; what the user reads: the stage, the step's losses {name: number}, the time
        that is left for the run."""
        self.bar.update()
        passed = time.time() - self.printed
        if passed < (LINE_SECONDS if self.bar.disable else BAR_SECONDS):
            return
        self.printed = time.time()
        numbers = {("L0 of the batch" if name == "l0" else name): value
                   for name, value in losses.items()}
        left = f"{readable_time(seconds_left)} left"
        if self.bar.disable:
            print(f"  {self.what}, {stage}: step {step}/{self.bar.total};",
                  *(f"{name} {value:.4g}," for name, value in numbers.items()), left, flush=True)
            return
        shown = {name: numbers[name] for name in ("reconstruction", "L0 of the batch")
                 if name in numbers}
        self.bar.set_description_str(f"{self.what}, {stage}", refresh=False)
        self.bar.set_postfix_str(", ".join([left, *(
            f"{name} {value:.3g}" for name, value in shown.items())]))

    def close(self):
        """Leaves the bar as it is."""
        self.bar.close()
