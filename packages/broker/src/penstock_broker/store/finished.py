"""What has left, remembered for the de-duplication window: by id, with its last claim and outcome; and what
another broker has taken of the partitions that are read here now."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable

from penstock_broker.domain.activation import CONTENT_BITS, FORWARDING, Activation, Route, route_of

BUCKETS = 8
# A look-up goes through all of them: however short the window, there are few.
BUCKET_MS_MIN = 1000

OFFSET_BITS = 40
_OUTCOME_BITS = 4
_CLAIM_MASK = (1 << 11) - 1
# The highest bit beside the claim: it has ended, and was not sent on.
_ENDED_BIT = 1 << 11 + _OUTCOME_BITS + CONTENT_BITS
_MADE_MASK = (1 << 20) - 1


def pack(epoch: int, seq: int, claim: int, outcome: int, content: int) -> int:
    """What is remembered of an activation, in one integer that is not negative: a claim, by its epoch, row
    and number, the number of its outcome, and the activation's content.

    Epoch and row belong to it: a claim that a restart forgot, and the one that was made anew, have the same
    number, and so have the first claims of a row that left and of the one that came back from the log.
    """
    made = epoch * 40_503 + seq & _MADE_MASK
    report = (made << 12 | claim & _CLAIM_MASK) << _OUTCOME_BITS | outcome
    return report << CONTENT_BITS | content


def outcome_of(value: int) -> int:
    """The number of the outcome in a packed value; 0 when there was none."""
    return value >> CONTENT_BITS & (1 << _OUTCOME_BITS) - 1


# In the place of the outcome: it never was here, another broker has taken it.
_ELSEWHERE = (1 << _OUTCOME_BITS) - 1


def taken_elsewhere(content: int) -> int:
    """What is remembered of an activation that another broker has taken."""
    return pack(0, 0, 0, _ELSEWHERE, content)


def is_elsewhere(value: int) -> bool:
    """Whether a packed value is of an activation that another broker has taken."""
    return outcome_of(value) == _ELSEWHERE


def is_report(value: int, epoch: int, seq: int, claim: int, outcome: int) -> bool:
    """Whether a packed value remembers this outcome of the claim."""
    report = pack(epoch, seq, claim, outcome, 0)
    return (value & ~_ENDED_BIT) >> CONTENT_BITS == report >> CONTENT_BITS


def has_ended(value: int | None) -> bool:
    """Whether a packed value is of an activation that went no further: nothing of its id is to run again."""
    return value is not None and bool(value & _ENDED_BIT)


def place(source: int, offset: int) -> int:
    """A place in a log, as an integer that is not negative. Beside the hash of a forward id: where what
    was sent on under it was read. Read there again it is the same message; read elsewhere, a copy."""
    return source << OFFSET_BITS | offset


# Beside an id hash: what is remembered of it is void. Less than every position.
VOID = -(1 << 63)


def position(source: int, offset: int) -> int:
    """A place in a log, as a negative integer: beside an id hash, that it left before it was covered."""
    return -1 - place(source, offset)


def unpack_position(value: int) -> tuple[int, int]:
    """(source id, offset)."""
    value = -1 - value
    return value >> OFFSET_BITS, value & (1 << OFFSET_BITS) - 1


def last_of(row: Activation, outcome: int) -> int:
    """What is remembered of a row that leaves: its last reported claim and outcome, packed, and whether it
    has ended.

    Without an outcome (time, or the log, made it leave) those of the claim before.
    """
    goes_on = row.status is FORWARDING and route_of(row.reason) is not Route.DEAD_LETTER
    claim = row.claim if outcome else max(0, row.claim - 1)
    value = pack(row.claim_epoch, row.seq, claim, outcome or row.last_outcome, row.content)
    return value if goes_on else value | _ENDED_BIT


class Finished:
    """Id hashes of what left, in time buckets that are dropped whole.

    Bounded by ``window_ms`` and by ``ids_max``, whichever is less.
    """

    def __init__(self, window_ms: int, ids_max: int) -> None:
        self.window_ms = window_ms
        self._bucket_ids_max = max(1, ids_max // BUCKETS)
        self._bucket_ms = max(BUCKET_MS_MIN, window_ms // BUCKETS)
        # (wall clock of the first entry, id hash -> packed claim and outcome), newest first
        self._buckets: deque[tuple[int, dict[int, int]]] = deque()
        # A bucket was dropped since ``forget`` told so.
        self._dropped = False

    def __len__(self) -> int:
        return sum(len(entries) for _, entries in self._buckets)

    def get(self, id_hash: int) -> int | None:
        for _, entries in self._buckets:
            if (value := entries.get(id_hash)) is not None:
                return value
        return None

    def left(self, id_hash: int) -> int | None:
        """As ``get``, but only of what left this broker, not of what another one has taken."""
        value = self.get(id_hash)
        return None if value is None or is_elsewhere(value) else value

    def add(self, now: int, id_hash: int, value: int) -> None:
        self._bucket(now)[id_hash] = value

    def discard(self, id_hash: int) -> None:
        """It did not leave after all: the log brings it back."""
        for _, entries in self._buckets:
            entries.pop(id_hash, None)

    def load(self, now: int, entries: Iterable[tuple[int, bytes]]) -> list[tuple[int, int]]:
        """Fill from stored (time, packed pairs), in the order in which they were stored.

        Returns the (id hash, position) among them.
        """
        positions: list[tuple[int, int]] = []
        for at, packed in entries:
            if at > now - self.window_ms:
                flat = array("q", packed)
                pairs = list(zip(flat[::2], flat[1::2], strict=True))
                voids = [n for n, (_, value) in enumerate(pairs) if value == VOID]
                begin = 0
                for end in [*voids, len(pairs)]:
                    part = pairs[begin:end]
                    positions += [pair for pair in part if pair[1] < 0]
                    self._bucket(at).update(pair for pair in part if pair[1] >= 0)
                    if end < len(pairs):
                        void, _ = pairs[end]
                        self.discard(void)
                        positions = [pair for pair in positions if pair[0] != void]
                    begin = end + 1
        return positions

    def _bucket(self, now: int) -> dict[int, int]:
        if self._buckets:
            since, entries = self._buckets[0]
            # The clock may have been set back, too.
            if abs(now - since) < self._bucket_ms and len(entries) < self._bucket_ids_max:
                return entries
        self._buckets.appendleft((now, {}))
        if len(self._buckets) > BUCKETS + 1:
            self._drop()
        return self._buckets[0][1]

    def _drop(self) -> None:
        self._buckets.pop()
        self._dropped = True

    def forget(self, now: int) -> int | None:
        """Drop what is outside the window. The wall clock before which the rows can go, or None."""
        while self._buckets and self._buckets[-1][0] < now - self.window_ms - self._bucket_ms:
            self._drop()
        if not self._dropped:
            return None
        self._dropped = False
        return min((since for since, _ in self._buckets), default=now)
