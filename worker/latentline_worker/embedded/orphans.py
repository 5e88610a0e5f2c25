"""Lets the kernel end a child process when its parent dies, also if the parent is killed."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable

PR_SET_PDEATHSIG = 1
# Loaded on import: between fork and exec it is not safe to load anything.
_LIBC = ctypes.CDLL(None, use_errno=True)


def die_with_parent() -> Callable[[], None]:
    """A ``preexec_fn`` for a child of this process: the kernel sends it SIGTERM when its parent dies (Linux only).

    The signal is sent when the thread that starts the child ends, so that must be the main thread or one that lives as long.
    """
    parent = os.getpid()

    def request_signal() -> None:
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # the parent died before the line above
            os._exit(1)

    return request_signal
