"""How much the poll thread may take: what the store has room for, and what it has not stored yet."""

from __future__ import annotations

import threading

IN_FLIGHT_ROWS_MAX = 8192
IN_FLIGHT_BYTES_MAX = 32 * 1024 * 1024
# Less room in memory than this part of what fits is worth a wait: small batches cost more.
LEAD_PART = 4
LEAD_MS_MAX = 200


class Gate:
    """Shared by the poll thread, which takes, and the event loop, which stores.

    ``memory_rows``, ``memory_bytes``: what memory holds of one namespace at most.
    """

    def __init__(self, memory_rows: int, memory_bytes: int) -> None:
        self._memory_max = memory_rows, memory_bytes
        # What more it has room for.
        self._memory = memory_rows, memory_bytes
        # Bytes of a row, lately.
        self._row_bytes = 1
        # Monotonic ms until which to wait for room in memory; None: there is some.
        self._wait_until: int | None = None
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

    def pace(self, wanted: int, mono: int) -> int:
        """How many of ``wanted`` messages to take at ``mono`` (monotonic ms); 0: in a moment more.

        A row that memory has no room for is read from the disk again when its turn comes, which costs as
        much as to store it. So the intake keeps pace with the workers while they keep up: it waits for room
        in memory. But what nobody claims holds up nobody: LEAD_MS_MAX for each batch at most, and not at all
        where so many rows are on the disk already that they are the rule.
        """
        with self._changed:
            if self._has_lead():
                self._wait_until = None
                return min(wanted, max(1, self._lead()))
            if -self._lead() > self._memory_max[0]:
                return wanted
            if self._wait_until is None:
                self._wait_until = mono + LEAD_MS_MAX
            if mono < self._wait_until:
                return 0
            self._wait_until = mono + LEAD_MS_MAX
            return wanted

    def _has_lead(self) -> bool:
        rows, size = self._memory_max
        return self._lead() * LEAD_PART >= min(rows, size // self._row_bytes)

    def _lead(self) -> int:
        rows, size = self._memory
        return min(rows - self._rows, (size - self._bytes) // self._row_bytes) if rows > 0 else rows

    def wait_for_lead(self, seconds: float) -> None:
        """Wait until there is room in memory, or for so long."""
        with self._changed:
            self._changed.wait_for(self._has_lead, seconds)

    def lead(self, rows: int, size: int) -> None:
        """Memory has room for ``rows`` more, of ``size`` bytes together; less than 0: they wait on the disk."""
        with self._changed:
            self._memory = rows, size
            if self._has_lead():
                self._changed.notify_all()

    def take(self, rows: int, size: int) -> None:
        """``rows`` with ``size`` bytes are on their way to the store."""
        with self._changed:
            if rows:
                self._row_bytes = max(1, size // rows)
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
