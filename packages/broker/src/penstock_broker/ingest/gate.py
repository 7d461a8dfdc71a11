"""How much the poll thread may take: what the store has room for, and what it has not stored yet."""

from __future__ import annotations

import threading

IN_FLIGHT_ROWS_MAX = 2048
IN_FLIGHT_BYTES_MAX = 32 * 1024 * 1024
# Less room in memory than this part of what fits is worth a wait: small batches cost more.
LEAD_PART = 4
LEAD_MS_MAX = 200


class Gate:
    """Shared by the poll thread, which takes, and the event loop, which stores.

    Neither waits for the other to look: each number is written by one of them only.
    ``memory_rows``, ``memory_bytes``: what memory holds of one namespace at most.
    """

    def __init__(self, memory_rows: int, memory_bytes: int) -> None:
        self._memory_max = memory_rows, memory_bytes
        # Set by the event loop when something may be taken, and when memory has room for it.
        self._opened, self._led = threading.Event(), threading.Event()
        # -- written by the poll thread
        self._taken = self._taken_bytes = 0
        # Bytes of a row, lately.
        self._row_bytes = 1
        # Monotonic ms until which to wait for room in memory; None: there is some.
        self._wait_until: int | None = None
        # -- written by the event loop
        self._room = 0
        self._stored = self._stored_bytes = 0
        # What more memory has room for.
        self._memory = memory_rows, memory_bytes

    @property
    def in_flight(self) -> bool:
        """Whether something was taken and is not stored yet."""
        return self._taken > self._stored

    # -- on the poll thread

    def allowance(self) -> int:
        """Messages that may be taken now."""
        if self._taken_bytes - self._stored_bytes >= IN_FLIGHT_BYTES_MAX:
            return 0
        return max(0, min(self._room, IN_FLIGHT_ROWS_MAX) - (self._taken - self._stored))

    def pace(self, wanted: int, mono: int) -> int:
        """How many of ``wanted`` messages to take at ``mono`` (monotonic ms); 0: in a moment more.

        A row that memory has no room for is read from the disk again when its turn comes, which costs as
        much as to store it. So the intake keeps pace with the workers while they keep up: it waits for room
        in memory. But what nobody claims holds up nobody: LEAD_MS_MAX for each batch at most, and not at all
        where so many rows are on the disk already that they are the rule.
        """
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
        if rows <= 0:
            return rows
        in_flight = self._taken_bytes - self._stored_bytes
        return min(rows - (self._taken - self._stored), (size - in_flight) // self._row_bytes)

    def take(self, rows: int, size: int) -> None:
        """``rows`` with ``size`` bytes are on their way to the store."""
        if rows:
            self._row_bytes = max(1, size // rows)
        self._taken_bytes += size
        self._taken += rows

    def wait(self, seconds: float) -> bool:
        """Wait until something may be taken; False when nothing may after ``seconds``."""
        self._opened.clear()
        return self.allowance() > 0 or self._opened.wait(seconds)

    def wait_for_lead(self, seconds: float) -> None:
        """Wait until there is room in memory, or for so long."""
        self._led.clear()
        if not self._has_lead():
            self._led.wait(seconds)

    # -- on the event loop

    def stored(self, rows: int, size: int, room: int) -> None:
        """They are durable, and the store has room for ``room`` more."""
        self._stored_bytes += size
        self._stored += rows
        self.open(room)

    def open(self, room: int) -> None:
        """The store has room for ``room`` rows."""
        self._room = room
        if self.allowance() > 0 and not self._opened.is_set():
            self._opened.set()

    def lead(self, rows: int, size: int) -> None:
        """Memory has room for ``rows`` more, of ``size`` bytes together; less than 0: so many are on the disk
        only."""
        self._memory = rows, size
        if self._has_lead() and not self._led.is_set():
            self._led.set()
