"""A broker that is to go: what it holds is finished here, or handed over to its topic for another one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import structlog

from penstock_broker.domain.activation import CONTENT_BITS, Route, Status
from penstock_broker.ingest.forwarder import Forwarder
from penstock_broker.store.inflight import Inflight

log = structlog.get_logger("drain")

# Rows that leave at a time; the others stay what they are, so that a drain that fails has moved little.
HAND_OVER_ROWS_MAX = 4096
LOOK_SECONDS = 1.0
RECORD_SECONDS_MAX = 5.0


@dataclass(frozen=True, slots=True)
class DrainReport:
    """How far a drain is. ``left``: rows by state; none when all have left. ``reasons``: why not, when it
    has finished."""

    finished: bool
    phase: str
    left: Mapping[str, int]
    ended: int
    handed_over: int
    reasons: tuple[str, ...] = ()


class Drain:
    """``run`` may be called again, to go on with what could not leave."""

    def __init__(self, store: Inflight, forwarders: Sequence[Forwarder], can_hand_over: bool) -> None:
        self._store = store
        self._forwarders = forwarders
        self._can_hand_over = can_hand_over
        self._committed = asyncio.Event()
        store.writer.on_committed.append(self._committed.set)
        self._rows = store.memory.rows
        self._handed_over = self._forwarded()
        self._phase = ""
        self._finished = False
        self._is_recorded = True

    def report(self) -> DrainReport:
        handed_over = self._forwarded() - self._handed_over
        return DrainReport(
            self._finished,
            self._phase,
            self._left(),
            max(0, self._rows - self._store.memory.rows - handed_over),
            handed_over,
            self._reasons() if self._finished else (),
        )

    async def run(self, grace_seconds: float) -> DrainReport:
        """Finish what is held, for ``grace_seconds``; then hand over the rest.

        For half of that time claims go on; for the other half, those that were made may end. The intake
        must have stopped. Raises StoreStopped.
        """
        until = asyncio.get_running_loop().time() + grace_seconds
        self._finished = False
        self._enter("finishing tasks")
        if not self._can_hand_over:
            await self._wait(self._is_empty, until)
        else:
            await self._wait(self._is_empty, until - grace_seconds / 2)
            self._store.claiming = False
            self._enter("handing over")
            while not self._is_empty() and await self._hand_over(until):
                pass
        while True:
            was_empty = self._is_empty()
            await self._record()
            if was_empty or not self._is_empty():
                break  # and not: the last one has ended since
        self._finished = True
        self._enter("drained" if self._is_empty() else "ended, with tasks left")
        return self.report()

    async def _record(self) -> None:
        """What has left must not be restored from the ledger, should the disk go with the broker."""
        await self._store.committed()
        try:
            async with asyncio.timeout(RECORD_SECONDS_MAX):
                await self._store.recorded()
            self._is_recorded = True
        except TimeoutError:
            self._is_recorded = False

    def _enter(self, phase: str) -> None:
        self._phase = phase
        log.info(f"drain: {phase}", **self._left(), reasons=self._reasons() if self._finished else ())

    async def _hand_over(self, until: float) -> bool:
        """One step; False when nothing more can leave."""
        late = asyncio.get_running_loop().time() >= until
        moved = 0
        if self._store.outbox.size() < HAND_OVER_ROWS_MAX:
            moved = await self._store.hand_over(HAND_OVER_ROWS_MAX, running=late)
        if not moved:
            if late and self._is_stuck():
                return False
            next_look = asyncio.get_running_loop().time() + LOOK_SECONDS
            await self._wait(lambda: False, next_look if late else min(until, next_look), once=True)
        return True

    def _is_empty(self) -> bool:
        return self._store.memory.rows == 0

    def _is_stuck(self) -> bool:
        waiting = self._store.outbox.size()
        return waiting == self._uncovered() or any(forwarder.alarm for forwarder in self._forwarders)

    async def _wait(self, over: Callable[[], bool], until: float, once: bool = False) -> None:
        """Look after each commit, or after the next only."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(until):
                while not over():
                    self._committed.clear()
                    await self._committed.wait()
                    if once:
                        return

    # -- what is to be told

    def _forwarded(self) -> int:
        return sum(f.forwarded for f in self._forwarders if f.route is Route.HAND_OVER)

    def _uncovered(self) -> int:
        return sum(len(source.held_exits) for source in self._store.sources())

    def _refused(self) -> set[int]:
        live = {entry >> CONTENT_BITS for entry in self._store.memory.live.values()}
        return self._store.outbox.refused & live

    def _left(self) -> dict[str, int]:
        counts = self._store.memory.counts.values()
        left = {status.name.lower(): sum(of[status] for of in counts) for status in list(Status)[1:]}
        return {name: rows for name, rows in left.items() if rows}

    def _reasons(self) -> tuple[str, ...]:
        left, reasons = self._left(), []
        if not self._can_hand_over and left:
            reasons.append(
                "without Kafka (ingest: grpc) there is no topic to hand tasks over to:"
                " let workers finish them, and drain again"
            )
        elif running := left.get("processing", 0):
            reasons.append(
                f"{running} tasks are running that must not start twice (at_most_once):"
                " drain again when they have ended"
            )
        if uncovered := self._uncovered():
            reasons.append(
                f"Kafka has not acknowledged the offsets of {uncovered} tasks:"
                " whoever consumes their partition reads them again"
            )
        if refused := len(self._refused()):
            reasons.append(f"{refused} tasks are too large for Kafka with what must go with them")
        if not self._is_recorded:
            reasons.append(
                "the ledger cannot be written: keep the disk, or what was done since may be restored and run"
                " again"
            )
        reasons += [f"{f.route} cannot be forwarded: {f.alarm}" for f in self._forwarders if f.alarm]
        return tuple(reasons)
