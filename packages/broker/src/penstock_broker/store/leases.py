"""Claims by the time their lease ends, in buckets of a quarter second."""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterable, Iterator, Mapping

from penstock_broker.domain.activation import Activation, Status

BUCKET_MS = 250


class Leases:
    """A lease that is extended stays in its bucket and is looked at again when that is due.

    Buckets name rows and do not hold them: most are long gone when their bucket is due. ``resident``:
    the rows that memory holds, by seq.
    """

    def __init__(self, resident: Mapping[int, Activation]) -> None:
        self._resident = resident
        self._buckets: dict[int, array[int]] = {}
        self._order: list[int] = []

    def add(self, claims: Iterable[Activation]) -> None:
        """Claims, with their leases; mostly all end at once."""
        last, bucket = -1, array("q")
        for row in claims:
            key = row.lease_until // BUCKET_MS + 1
            if key != last:
                last, bucket = key, self._bucket(key)
            bucket.append(row.seq)

    def _bucket(self, key: int) -> array[int]:
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = array("q")
            heapq.heappush(self._order, key)
        return bucket

    def held(self) -> Iterator[Activation]:
        """Every claim."""
        return (row for row in self._resident.values() if row.status is Status.PROCESSING)

    def next_due(self) -> int | None:
        """Monotonic ms at which a bucket must be looked at."""
        return self._order[0] * BUCKET_MS if self._order else None

    def lapsed(self, now: int) -> Iterator[Activation]:
        """Claims whose lease has ended at ``now`` (monotonic ms)."""
        while self._order and self._order[0] * BUCKET_MS <= now:
            for seq in self._buckets.pop(heapq.heappop(self._order)):
                row = self._resident.get(seq)
                if row is not None and row.status is Status.PROCESSING:
                    if row.lease_until <= now:
                        yield row
                    else:
                        self.add((row,))
