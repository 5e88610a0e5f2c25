"""No child outlives its parent, also when the parent dies hard."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable

PR_SET_PDEATHSIG = 1
# Loaded here, because between fork and exec only what is already there is safe to call.
_LIBC = ctypes.CDLL(None, use_errno=True)


def die_with_parent() -> Callable[[], None]:
    """For ``preexec_fn`` of a child of this process: the kernel sends it SIGTERM when its parent has died (Linux).

    The signal follows the thread that starts the child, which therefore has to be the main thread or one that lives as long.
    """
    parent = os.getpid()

    def ask_for_it() -> None:
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)

    return ask_for_it
