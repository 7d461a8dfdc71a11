"""Which offsets of the log are unfinished here: kept as durable as the rows, for the ledger.

Everything in here changes when a tick is committed, and only then, so whatever is read of it between
two ticks is true of the rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from penstock_broker.domain.activation import NO_SOURCE, Activation, Status
from penstock_broker.domain.lifecycle import Change
from penstock_broker.store.finished import OFFSET_BITS, place

# Offsets of one record. Fewer cost more records, more make each larger: with a retry state for every
# offset one is still below what Kafka takes.
SEGMENT_BITS = 14
SEGMENT_OFFSETS = 1 << SEGMENT_BITS
_IN_SEGMENT = SEGMENT_OFFSETS - 1
# A segment with no more unfinished offsets than this is a dict, which is smaller.
SPARSE_MAX = 128

# (topic, partition, start, next, covered, topic id), as the store keeps it of a source.
Range = tuple[str, int, int, int, int, str]


class State(NamedTuple):
    """What an unfinished row has become since its message was admitted."""

    attempts: int
    lost: int
    # Epoch ms at which a retry is due, here or where it is to go, or at which it died; 0: now.
    due_at: int
    # Why it is to leave; None: it is to run.
    reason: str | None
    # At most once, and handed out.
    claimed: bool
    given_back_at: int | None
    max_attempts: int
    retry_delay_ms: int


def state_of(row: Activation) -> State | None:
    """What is to be kept of ``row``; None when its message says it all."""
    return state_after(row, row, claimed=row.at_most_once and row.status is Status.PROCESSING)


def state_after(row: Activation, change: Activation | Change, claimed: bool = False) -> State | None:
    """What is to be kept of ``row`` after ``change``."""
    state = State(
        change.attempts,
        change.lost,
        change.ready_at if change.status in (Status.DELAYED, Status.FORWARDING) else 0,
        change.reason if change.status is Status.FORWARDING else None,
        claimed,
        change.given_back_at,
        row.max_attempts,
        row.retry_delay_ms,
    )
    return state if any(state[:6]) else None


class Segment(NamedTuple):
    """What one record says: the unfinished offsets of a segment, counted from its first."""

    # One byte for each offset: 1 is unfinished. None: all are finished.
    offsets: bytes | None
    states: Mapping[int, State]


class Unfinished:
    """All segments of all sources. A segment's key is its first place, shifted by SEGMENT_BITS."""

    def __init__(self) -> None:
        self._segments: dict[int, bytearray | dict[int, int]] = {}
        self._states: dict[int, dict[int, State]] = {}
        # source id -> its range
        self.ranges: dict[int, Range] = {}
        # What has changed since it was last taken.
        self.dirty: set[int] = set()
        self.dirty_ranges: set[int] = set()

    # -- when a tick is committed

    def took(self, rows: Iterable[Activation]) -> None:
        """These were stored."""
        segments, last, segment = self._segments, -1, None
        for row in rows:
            if row.source:
                at = row.source << OFFSET_BITS | row.offset
                key = at >> SEGMENT_BITS
                if key != last:
                    last, segment = key, segments.get(key)
                    if segment is None:
                        segment = segments[key] = bytearray(SEGMENT_OFFSETS)
                    self.dirty.add(key)
                segment[at & _IN_SEGMENT] = 1  # type: ignore[index]

    def add(self, source: int, offset: int) -> None:
        """A row that is found in the store at the start."""
        if source == NO_SOURCE:
            return
        key = place(source, offset) >> SEGMENT_BITS
        segment = self._segments.get(key)
        if segment is None:
            segment = self._segments[key] = bytearray(SEGMENT_OFFSETS)
        segment[offset & _IN_SEGMENT] = 1

    def left(self, places: Iterable[int]) -> None:
        """The rows of these are gone, or another broker's."""
        segments, states, last, segment = self._segments, self._states, -1, None
        for at in places:
            key = at >> SEGMENT_BITS
            if key != last:
                last, segment = key, segments.get(key)
                self.dirty.add(key)
            if segment is not None:
                segment[at & _IN_SEGMENT] = 0
            if key in states:
                self._keep(at, None)

    def kept(self, changes: Iterable[tuple[int, State | None]]) -> None:
        """The rows of these places have another state."""
        for at, state in changes:
            self._keep(at, state)

    def _keep(self, at: int, state: State | None) -> None:
        key = at >> SEGMENT_BITS
        states = self._states.get(key)
        if state is not None:
            if states is None:
                states = self._states[key] = {}
            states[at & _IN_SEGMENT] = state
        elif states is None or states.pop(at & _IN_SEGMENT, None) is None:
            return
        elif not states:
            del self._states[key]
        self.dirty.add(key)

    def ranged(self, ranges: Mapping[int, Range]) -> None:
        """These are the stored ranges of their sources now."""
        self.ranges.update(ranges)
        self.dirty_ranges.update(ranges)

    def rename(self, source: int, heir: int) -> None:
        """A source has another name: under the old one, which is its heir's, no more is recorded of it."""
        for key in self.keys():
            id, number = segment_of(key)
            if id == source:
                self.dirty |= {key, segment_key(heir, number)}

    # -- reading

    def keys(self) -> list[int]:
        return list(self._segments)

    def segment(self, key: int) -> Segment:
        """A copy of a segment. It is kept in the smaller form from now on."""
        segment = self._segments.get(key)
        if segment is None:
            return Segment(None, {})
        offsets = [n for n, one in segment.items() if one] if isinstance(segment, dict) else None
        count = segment.count(1) if isinstance(segment, bytearray) else len(offsets or ())
        if not count:
            del self._segments[key]
            return Segment(None, {})
        if isinstance(segment, bytearray):
            copy = bytes(segment)
            if count <= SPARSE_MAX:
                self._segments[key] = dict.fromkeys(_ones(copy), 1)
        else:
            dense = bytearray(SEGMENT_OFFSETS)
            for n in offsets or ():
                dense[n] = 1
            copy = bytes(dense)
            self._segments[key] = dense if count > SPARSE_MAX else dict.fromkeys(offsets or (), 1)
        return Segment(copy, dict(self._states.get(key, {})))

    def tidy(self) -> None:
        """Nobody writes what has changed, and who begins to writes all: keep only what is unfinished."""
        for key in self.dirty:
            self.segment(key)
        self.dirty.clear()

    def places(self) -> dict[int, State | None]:
        """Every unfinished place with its state."""
        found: dict[int, State | None] = {}
        for key in self.keys():
            offsets, states = self.segment(key)
            for n in _ones(offsets or b""):
                found[key << SEGMENT_BITS | n] = states.get(n)
        return found


def _ones(offsets: bytes) -> Iterator[int]:
    at = offsets.find(1)
    while at >= 0:
        yield at
        at = offsets.find(1, at + 1)


def offsets_of(first: int, segment: Segment) -> list[int]:
    """The unfinished offsets of a segment that begins at offset ``first``."""
    return [first + n for n in _ones(segment.offsets or b"")]


def segment_key(source: int, number: int) -> int:
    """The key of the segment with that number (its first offset / SEGMENT_OFFSETS) of a source."""
    return place(source, number << SEGMENT_BITS) >> SEGMENT_BITS


def segment_of(key: int) -> tuple[int, int]:
    """(source id, number of the segment)."""
    shift = OFFSET_BITS - SEGMENT_BITS
    return key >> shift, key & (1 << shift) - 1


def runs(offsets: Sequence[int], gap: int) -> Iterator[Sequence[int]]:
    """``offsets``, ascending, in parts with no more than ``gap`` between two of a part."""
    begin = 0
    for n in range(1, len(offsets) + 1):
        if n == len(offsets) or offsets[n] - offsets[n - 1] > gap:
            if n > begin:
                yield offsets[begin:n]
            begin = n
