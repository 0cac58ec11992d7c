"""What a preflight needs: a watchdog, and rules for settings."""
import io
import math
import signal
import time
from contextlib import contextmanager, redirect_stdout

import numpy as np

from runtime.errors import RunnerError
from runtime.ranks import RANKS


def setting_rules(constants):
    """Functions (check, choice, whole, positive, text, several, span) of the names of constants, space between: each raises where
    one is neither what it must be nor among `others`."""
    def check(names, wanted, right, others=()):
        for name in names.split():
            value = constants[name]
            if value not in others and not right(value):
                wanted = " or ".join(map(str, others)) + f", or {wanted}" if others else wanted
                raise RunnerError(f"{name} = {value!r} is not valid: it must be {wanted}.")

    def choice(**options):  # constant -> names, space between
        for name, good in options.items():
            good = good.split()
            check(name, f"one of {', '.join(good)}", lambda v: type(v) is str and v in good)

    def whole(names, least=1, others=()):
        check(names, f"a whole number from {least}", lambda v: type(v) is int and v >= least, others)

    def positive(names, most=math.inf, others=()):
        wanted = "a number above 0" + f", at most {most}" * (most < math.inf)
        check(names, wanted, lambda v: type(v) in (int, float) and 0 < v <= most and v < math.inf, others)

    def text(names, others=()):
        check(names, "a path or a hub name", lambda v: type(v) is str and v != "", others)

    def several(name, options, about="", least=1):  # a range stands for whole numbers
        numbers = isinstance(options, range)
        wanted = "a tuple of different " + ("whole numbers" if numbers else f"names out of {[*options]}{about}")
        check(name, wanted, lambda v: type(v) is tuple and len(v) >= least and all(
            type(x) is (int if numbers else str) and x in options and v.count(x) == 1 for x in v))

    def span(name, end):
        check(name, "(low, high) within the window", lambda v: type(v) is tuple and [type(x) for x in v] == [int, int]
              and 0 < v[0] < v[1] < end, [None])

    return check, choice, whole, positive, text, several, span


class Watchdog:
    """With work that comes no further: `work` seconds of this thread's own time, or `wait` of anyone's."""

    def __init__(self, work=15, wait=300):
        self.limits = np.array([work, wait])
        self.renew()

    def now(self):
        return np.array([time.thread_time(), time.monotonic()])

    def renew(self):
        self.since = self.now()

    def look(self, *_):
        passed = self.now() - self.since
        if (passed > self.limits).any():
            self.since = self.now() - self.limits / 2         # time to clean up
            raise TimeoutError(f"no end after {passed.max():.0f} s, on tiny batches: an endless loop, or one over tokens or "
                               "latents that should be one operation on tensors.")


WATCHDOG = Watchdog()


@contextmanager
def preflight_sandbox():
    """Nothing on stdout, and an end to what comes no further."""
    WATCHDOG.renew()
    before = signal.signal(signal.SIGALRM, WATCHDOG.look)
    signal.setitimer(signal.ITIMER_REAL, 1, 1)
    try:
        with redirect_stdout(io.StringIO()), RANKS.alone():
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
