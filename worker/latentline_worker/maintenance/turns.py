"""Duties of the whole fleet, done by one process at a time, so that their cost does not grow with the number of processes."""

from __future__ import annotations

from abc import abstractmethod

from .service import Service

TURN_S = 0.8  # how long no other process begins a turn: less than TRY_S, so that a process that is alone gets one at each try
TRY_S = 1.0
JITTER = 0.1  # of the wait, either way: processes that start together do not go on trying together


class Turns(Service):
    """Tries every ``every_s`` seconds to get a turn, and then does its duties once.

    A turn is a key at the broker that expires after a little less than that and is never given back. So nobody leads: the next turn
    goes to whichever process tries first, and a process that is killed or hangs in its turn delays the duties by one try of
    another. A turn may outlast its key. Then two processes do the same duties at once, which is harmless: each step of a duty is
    one script that checks what it finds.
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
