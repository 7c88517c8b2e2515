"""What every child process does first: leave the signals to its parent, and not outlive it."""

from __future__ import annotations

import ctypes
import signal
import sys

_PR_SET_PDEATHSIG = 1


def leave_signals_to_parent() -> None:
    """Ignore SIGINT and SIGTERM: the terminal's Ctrl-C reaches the whole group, and the parent decides how to end.

    Call it before the imports that take long.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def end_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies; elsewhere the end of the socket tells."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
