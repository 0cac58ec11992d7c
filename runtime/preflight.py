"""Rules for settings, and a preflight that cannot hang or print."""
import io
import math
import signal
import time
from contextlib import contextmanager, redirect_stdout

import numpy as np

from runtime.errors import RunnerError
from runtime.ranks import RANKS


class SettingRules:
    """Rules for a script's constants {name: value}. Each method takes names, with spaces between,
    and raises RunnerError for one that is neither right nor among `others`."""

    def __init__(self, constants):
        self.constants = constants

    def check(self, names, wanted, is_right, others=()):
        """Holds each constant to is_right(value); `wanted` says in words what that is."""
        for name in names.split():
            value = self.constants[name]
            if value not in others and not is_right(value):
                good = [" or ".join(map(str, others)), wanted] if others else [wanted]
                raise RunnerError(
                    f"{name} = {value!r} is not valid: it must be {', or '.join(good)}.")

    def choice(self, **options):
        """Holds each constant to one of the words of its text: NAME="first second"."""
        for name, words in options.items():
            good = words.split()
            self.check(name, f"one of {', '.join(good)}",
                       lambda value: type(value) is str and value in good)

    def whole(self, names, least=1, others=()):
        """Holds the constants to whole numbers from `least`."""
        self.check(names, f"a whole number from {least}",
                   lambda value: type(value) is int and value >= least, others)

    def positive(self, names, most=math.inf, others=()):
        """Holds the constants to finite numbers above 0, at most `most`."""
        wanted = "a number above 0" + f", at most {most}" * (most < math.inf)
        self.check(names, wanted, lambda value: type(value) in (int, float)
                   and 0 < value <= most and value < math.inf, others)

    def text(self, names, others=()):
        """Holds the constants to texts that are not empty."""
        self.check(names, "a path or a hub name",
                   lambda value: type(value) is str and value != "", others)

    def several(self, name, options, about="", least=1):
        """Holds a constant to a tuple of at least so many different members of `options`: names, or
        whole numbers where it is a range. `about` follows the names in the message."""
        kind, value = int if isinstance(options, range) else str, self.constants[name]
        words = "whole numbers" if kind is int else f"names out of {[*options]}{about}"
        some = "one or more " * (least > 0) + "different"
        hint = f": ({value!r},), with the comma" if type(value) is kind else ""

        def is_right(value):
            return type(value) is tuple and len(value) >= least and all(
                type(x) is kind and x in options and value.count(x) == 1 for x in value)

        self.check(name, f"a tuple of {some} {words}{hint}", is_right)

    def span(self, name, end):
        """Holds a constant to None or (low, high), whole numbers with 0 < low < high < end."""
        def is_right(value):
            return (type(value) is tuple and [type(x) for x in value] == [int, int]
                    and 0 < value[0] < value[1] < end)

        self.check(name, "(low, high) within the window", is_right, [None])


class Watchdog:
    """An end to work that comes no further: after `work` seconds of this thread's own time, or
    `wait` seconds of anyone's, since the last `renew`."""

    def __init__(self, work=15, wait=300):
        self.limits = np.array([work, wait])
        self.renew()

    def now(self):
        """Returns the clocks [this thread's, everyone's], in seconds."""
        return np.array([time.thread_time(), time.monotonic()])

    def renew(self):
        """Starts the time afresh: work has come further."""
        self.since = self.now()

    def look(self, *_):
        """Raises TimeoutError where a limit has passed; takes what a signal's handler takes."""
        passed = self.now() - self.since
        if (passed > self.limits).any():
            self.since = self.now() - self.limits / 2  # time to clean up
            raise TimeoutError(
                f"no end after {passed.max():.0f} s, on tiny batches: an endless loop, or one over "
                "tokens or latents that should be one operation on tensors.")


WATCHDOG = Watchdog()


@contextmanager
def preflight_sandbox():
    """Keeps the block off stdout, in one process, under the watchdog, which looks every second."""
    WATCHDOG.renew()
    before = signal.signal(signal.SIGALRM, WATCHDOG.look)
    signal.setitimer(signal.ITIMER_REAL, 1, 1)
    try:
        with redirect_stdout(io.StringIO()), RANKS.alone():
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
