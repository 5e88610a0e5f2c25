"""Duties of the whole fleet, done by one process at a time, so that their cost does not grow with the number of processes."""

from __future__ import annotations

from abc import abstractmethod

from .service import JITTER, Service

TURN_S = 0.8  # how long no other process begins a turn: less than TRY_S, so that a process that is alone gets one at each try
TRY_S = 1.0


class Turns(Service):
    """Tries every ``every_s`` seconds to get a turn, and then does its duties once.

    A turn is a key at the broker. It expires after a little less than ``every_s`` and is never given back. The next turn goes to
    the process that tries first, so a process that is killed or hangs in its turn delays the duties only until another one
    tries. A process may work for longer than its key lives. Then two processes do the same duties at once, which is harmless: each
    step of a duty is one script that checks the present state.
    """

    def __init__(self, name: str, every_s: float = TRY_S) -> None:
        super().__init__(name, every_s, JITTER)

    @abstractmethod
    def take_turn(self) -> bool:
        """Whether this process has the turn now."""

    @abstractmethod
    def do_turn(self) -> None:
        """Do the duties once."""

    def run_once(self) -> None:
        if self.take_turn():
            self.do_turn()
