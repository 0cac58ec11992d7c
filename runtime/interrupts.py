"""Ctrl-C and a polite kill (SIGTERM): one line instead of a traceback, and no step cut in two.

To be imported before the large libraries: their imports take seconds, in which Ctrl-C must work.
"""
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

SCRIPT = Path(getattr(sys.modules["__main__"], "__file__", None) or "").name
SIGNALS = (signal.SIGINT, signal.SIGTERM)
STATUS = 130  # of a process that Ctrl-C ended


def leave(*_):
    """Ends the process with a line; takes what a signal's handler takes."""
    print("\ninterrupted", file=sys.stderr, flush=True)
    os._exit(STATUS)


def leave_quietly():
    """From now on Ctrl-C ends a script of the template with a line; call it before slow imports."""
    if SCRIPT in ("experiment.py", "plot.py"):
        for number in SIGNALS:
            signal.signal(number, leave)


class Interrupts:
    """Turns signals into KeyboardInterrupt: at once, or where the work can be saved."""

    def __init__(self):
        self.deferring = self.requested = False

    def listen(self):
        """Takes over the signals from now on."""
        self.deferring = self.requested = False
        for number in SIGNALS:
            signal.signal(number, self.handle)

    def handle(self, *_):
        """Raises KeyboardInterrupt, or notes that one is wanted; a second signal does not wait."""
        if self.deferring and not self.requested:
            self.requested = True
            print("\nstopping after this step", file=sys.stderr, flush=True)
            return
        raise KeyboardInterrupt

    @contextmanager
    def deferred(self):
        """Within the block a signal waits for `stop_here`."""
        self.deferring = True
        try:
            yield
        finally:
            self.deferring = False

    def stop_here(self):
        """Raises KeyboardInterrupt where one is wanted: all is saved."""
        if self.requested:
            raise KeyboardInterrupt


INTERRUPTS = Interrupts()
