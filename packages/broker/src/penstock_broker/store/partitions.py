"""Topic partitions this broker took from, and which of their rows another broker could still run.

A row is *covered* once an acknowledged offset commit of this broker has passed it. Until then
whoever takes the partition over reads it again, so no outcome of it may be acknowledged. It stays
covered where the group's offset is set back: what comes again is absorbed.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from penstock_broker.domain.activation import NO_SOURCE, Activation, Route

# Ids of dropped rows that are remembered, so that late reports on them are refused.
DROPPED_IDS_MAX = 100_000


class Exit(NamedTuple):
    """A row that leaves."""

    seq: int
    size: int
    route: Route


@dataclass(slots=True)
class Source:
    """One topic partition this broker has taken from."""

    id: int
    topic: str
    partition: int
    # Everything in [start, next) is stored, finished or skipped. -1: nothing taken yet.
    start: int = -1
    next: int = -1
    # Every offset below was passed by an acknowledged commit of this broker.
    covered: int = 0
    # Which topic of its name it is of; "" while Kafka has not said.
    topic_id: str = ""
    # (offset, seq, id hash) of stored rows at or above ``covered``, in the order of the log.
    uncovered: deque[tuple[int, int, int]] = field(default_factory=deque)
    # Rows numbered below were taken before the range began further back; those of them that were not
    # covered then.
    set_back_seq: int = 0
    set_back_uncovered: frozenset[int] = frozenset()
    # Another broker may read the uncovered rows again, or have done so: they do not start until it is
    # known whose they are.
    disputed: bool = False
    # Pending rows that may not start yet: disputed ones, and at-most-once rows until they are covered.
    held_starts: list[Activation] = field(default_factory=list)
    # (offset, row) of those that must leave and may not before they are covered.
    held_exits: list[tuple[int, Exit]] = field(default_factory=list)
    # (offset, tie breaker, future of whether it was covered) of those who wait.
    waiting: list[tuple[int, int, asyncio.Future[bool]]] = field(default_factory=list)

    def is_covered(self, offset: int, seq: int) -> bool:
        """Whether a row is."""
        return offset < self.covered or (seq < self.set_back_seq and seq not in self.set_back_uncovered)

    def set_back(self, start: int, next_seq: int) -> None:
        """It is read again from further back: what comes new of it is not covered."""
        self.covered = start
        self.set_back_seq = next_seq
        self.set_back_uncovered = frozenset(seq for _, seq, _ in self.uncovered)

    def record(self) -> tuple[str, int, int, int, int, str]:
        """As it is stored."""
        return self.topic, self.partition, self.start, self.next, self.covered, self.topic_id


class Partitions:
    """All sources, and the reports and starts that wait for their cover."""

    def __init__(self) -> None:
        self._sources: dict[int, Source] = {}
        self._ids: dict[tuple[str, int], int] = {}
        # Reported on, but not covered: answers to such reports, repeated ones too, wait.
        self._held: dict[int, tuple[Source, int]] = {}
        # Id hashes of rows that are another broker's now, oldest first: what was done of them here
        # is not acknowledged any more.
        self._dropped: dict[int, None] = {}
        self._tie = 0
        # The ledger cannot be written: no at-most-once row starts, for nobody would know if the disk is lost.
        self.unrecorded = False
        # The ledger has not said yet that this database is no old copy: what starts at most once may have.
        self.maybe_old = False
        # Rows without a position that wait for that.
        self.held_direct: list[Activation] = []

    def __getitem__(self, id: int) -> Source:
        return self._sources[id]

    def get(self, id: int) -> Source | None:
        return self._sources.get(id)

    def all(self) -> Iterable[Source]:
        return self._sources.values()

    def find(self, topic: str, partition: int) -> Source | None:
        id = self._ids.get((topic, partition))
        return None if id is None else self._sources[id]

    def add(self, source: Source) -> None:
        self._sources[source.id] = source
        self._ids[source.topic, source.partition] = source.id

    def rename(self, source: Source, topic: str) -> None:
        """Its topic has another name from now on."""
        del self._ids[source.topic, source.partition]
        source.topic = topic
        self._ids[topic, source.partition] = source.id

    def took(self, row: Activation) -> None:
        """A row from the log was accepted; it is uncovered until a commit passes it."""
        if self._dropped:
            self._dropped.pop(row.id_hash, None)
        source = self._sources[row.source]
        # One that is restored was covered before.
        if row.offset >= source.covered:
            source.uncovered.append((row.offset, row.seq, row.id_hash))

    def hold(self, row: Activation) -> bool:
        """A row was reported on: until it is covered, answers wait. Whether they do."""
        if row.source == NO_SOURCE or row.offset < (source := self._sources[row.source]).covered:
            return False
        if row.seq < source.set_back_seq and source.is_covered(row.offset, row.seq):
            return False
        if row.id_hash in self._dropped:
            # While the tick with the report was written.
            return False
        self._held[row.id_hash] = source, row.offset
        return True

    def restore(self, source: Source, offset: int, seq: int, id_hash: int) -> None:
        """At the start: a row that was not covered. Whether it was reported on, and what the log knows of
        it, will show; until then it is held."""
        source.uncovered.append((offset, seq, id_hash))
        source.disputed = True
        self._held[id_hash] = source, offset

    def is_held(self, id_hash: int) -> bool:
        """Whether answers on it wait, or it is another broker's."""
        return id_hash in self._held or id_hash in self._dropped

    def all_held(self, ids: Sequence[int]) -> list[int]:
        """Which of these id hashes, by their place, are held."""
        held, dropped = self._held, self._dropped
        return [at for at, id_hash in enumerate(ids) if id_hash in held or id_hash in dropped]

    async def covered(self, ids: Sequence[int]) -> list[bool]:
        """Of each of these id hashes, wait until no other broker could run again what was reported on.
        False: one does.

        All wait from now on: a row that is dropped and read again, while another one is waited for, would
        look like one that was never dropped.
        """
        waits = [self._wait(id_hash) for id_hash in ids]
        return [await wait for wait in waits]

    def _wait(self, id_hash: int) -> asyncio.Future[bool]:
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        held = self._held.get(id_hash)
        if held is None:
            future.set_result(id_hash not in self._dropped)
        else:
            source, offset = held
            self._tie += 1
            heapq.heappush(source.waiting, (offset, self._tie, future))
        return future

    def may_start(self, row: Activation) -> bool:
        """Whether nobody else runs a row, as far as it must be known."""
        if row.source == NO_SOURCE:
            return not (row.at_most_once and self.maybe_old)
        if row.at_most_once and self.unrecorded:
            return False
        source = self._sources[row.source]
        if row.offset < source.covered:
            return True
        # Of what is read again, another broker may start it, too: at most once is not before that is covered.
        return not row.at_most_once and (not source.disputed or source.is_covered(row.offset, row.seq))

    def hold_start(self, row: Activation) -> None:
        """A row waits, outside the order, until it may start."""
        held = self.held_direct if row.source == NO_SOURCE else self._sources[row.source].held_starts
        held.append(row)

    def known_new(self) -> list[Activation]:
        """This database is no old copy. Rows without a position that waited for that."""
        self.maybe_old = False
        starts, self.held_direct = self.held_direct, []
        return starts

    def released(self, source: Source) -> list[Activation]:
        """Rows that waited and may start now."""
        if not source.held_starts:
            return []
        starts = [row for row in source.held_starts if self.may_start(row)]
        source.held_starts = [row for row in source.held_starts if not self.may_start(row)]
        return starts

    def cover(self, source: Source, offset: int) -> list[Activation]:
        """An acknowledged commit passed everything below ``offset``. Rows that may start now."""
        source.covered = max(source.covered, offset)
        uncovered, held = source.uncovered, self._held
        while uncovered and uncovered[0][0] < offset:
            _, _, id_hash = uncovered.popleft()
            if held:
                held.pop(id_hash, None)
        while source.waiting and source.waiting[0][0] < offset:
            _resolve(heapq.heappop(source.waiting)[2], covered=True)
        return self.released(source)

    def drop(self, source: Source, boundary: int) -> list[tuple[int, int]]:
        """Uncovered rows at or above ``boundary`` are someone else's now.

        Their (seq, id hash), those included that have left.
        """
        dropped = [(seq, id_hash) for offset, seq, id_hash in source.uncovered if offset >= boundary]
        for _, id_hash in dropped:
            self._held.pop(id_hash, None)
            self._dropped[id_hash] = None
        while len(self._dropped) > DROPPED_IDS_MAX:
            del self._dropped[next(iter(self._dropped))]
        source.uncovered = deque(entry for entry in source.uncovered if entry[0] < boundary)
        seqs = {seq for seq, _ in dropped}
        source.held_starts = [row for row in source.held_starts if row.seq not in seqs]
        source.held_exits = [entry for entry in source.held_exits if entry[1].seq not in seqs]
        source.next = min(source.next, boundary)
        waiting, source.waiting = source.waiting, []
        for wait in waiting:
            if wait[0] < boundary:
                heapq.heappush(source.waiting, wait)
            else:
                _resolve(wait[2], covered=False)
        return dropped


def _resolve(future: asyncio.Future[bool], *, covered: bool) -> None:
    if not future.done():
        future.set_result(covered)
