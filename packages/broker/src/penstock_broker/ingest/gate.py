"""How much the poll thread may take: what the store has room for, and what it has not stored yet."""

from __future__ import annotations

import threading

IN_FLIGHT_ROWS_MAX = 8192
IN_FLIGHT_BYTES_MAX = 32 * 1024 * 1024


class Gate:
    """Shared by the poll thread, which takes, and the event loop, which stores."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._room = 0
        self._rows = 0
        self._bytes = 0

    @property
    def in_flight(self) -> bool:
        """Whether something was taken and is not stored yet."""
        return self._rows > 0

    def allowance(self) -> int:
        """Messages that may be taken now."""
        with self._changed:
            return self._allowance()

    def _allowance(self) -> int:
        if self._bytes >= IN_FLIGHT_BYTES_MAX:
            return 0
        return max(0, min(self._room, IN_FLIGHT_ROWS_MAX) - self._rows)

    def take(self, rows: int, size: int) -> None:
        """``rows`` with ``size`` bytes are on their way to the store."""
        with self._changed:
            self._rows += rows
            self._bytes += size

    def stored(self, rows: int, size: int, room: int) -> None:
        """They are durable, and the store has room for ``room`` more."""
        with self._changed:
            self._rows -= rows
            self._bytes -= size
            self._room = room
            self._changed.notify_all()

    def open(self, room: int) -> None:
        """The store has room for ``room`` rows."""
        with self._changed:
            self._room = room
            self._changed.notify_all()

    def wait(self, seconds: float) -> bool:
        """Wait until something may be taken; False when nothing may after ``seconds``."""
        with self._changed:
            return self._changed.wait_for(lambda: self._allowance() > 0, seconds)
