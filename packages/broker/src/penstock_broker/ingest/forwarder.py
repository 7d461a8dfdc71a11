"""Takes what must leave through the log out of the store, and lets it go once it is acknowledged."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import structlog
from confluent_kafka import KafkaError

from penstock_broker.domain.activation import NO_SOURCE, Activation, Route
from penstock_broker.ingest.dead_letters import Letter
from penstock_broker.ingest.publisher import Publisher
from penstock_broker.store.inflight import Inflight

log = structlog.get_logger("forward")

BATCH_ROWS_MAX = 512
BATCH_BYTES_MAX = 8 * 1024 * 1024
BACK_OFF_SECONDS_MIN = 1.0
BACK_OFF_SECONDS_MAX = 60.0
STOP_SECONDS_MAX = 1.0
RECORD_SECONDS_MAX = 5.0
TELL_EVERY_SECONDS = 10.0

_TOO_LARGE = (KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.RECORD_LIST_TOO_LARGE)


class Failed(NamedTuple):
    """A row that Kafka did not take."""

    row: Activation
    topic: str
    error: str


# A row, and whether without what can be missed, as a message.
Compose = Callable[[Activation, bool], Letter]


class Forwarder:
    """One route, one batch at a time; a row that is not acknowledged stays in the store and is tried again.

    Without a ``publisher`` there is no log to go to: dead letters rest in the store, all else stays what
    it was. ``on_failures`` is told the topic, and how many rows of a batch it did not take.
    """

    def __init__(
        self,
        store: Inflight,
        route: Route,
        publisher: Publisher | None,
        compose: Compose,
        on_failures: Callable[[str, int], None],
    ) -> None:
        self._store = store
        self.route = route
        self._publisher = publisher
        self._compose = compose
        self._on_failures = on_failures
        self._waiting = asyncio.Event()
        self._idle = asyncio.Event()
        self._back_off = 0.0
        self._full = False
        # Rows that left.
        self.forwarded = 0
        self.alarm = ""
        self._lines = Lines()

    def start(self) -> None:
        self._store.writer.on_committed.append(self._look)
        self._look()
        self._task = asyncio.create_task(self.run(), name=f"forwarder of {self.route}")

    def _look(self) -> None:
        if self._store.outbox.waits(self.route):
            self._waiting.set()

    async def run(self) -> None:
        """Until cancelled. Raises StoreStopped when the store has."""
        while True:
            self._idle.set()
            await self._waiting.wait()
            self._waiting.clear()
            self._idle.clear()
            while self._store.outbox.waits(self.route):
                rows = await self._store.outbox.take(self.route, BATCH_ROWS_MAX, BATCH_BYTES_MAX)
                if self._publisher is None:
                    await self._rest(rows)
                elif self.route is Route.DEAD_LETTER:
                    await self._forward(rows, self._publisher)
                else:
                    await self._send_on(rows, self._publisher)
                if self._back_off:
                    self._idle.set()
                    await asyncio.sleep(self._back_off)
                    self._idle.clear()

    async def _send_on(self, rows: list[Activation], publisher: Publisher) -> None:
        """What must not start twice leaves for where it is run when the ledger says that it does: restored
        from an older record, it would start here, too."""
        rows = await self._store.outbox.may_leave(rows)
        once = [row for row in rows if _waits_for_ledger(row)]
        if others := [row for row in rows if not _waits_for_ledger(row)]:
            await self._forward(others, publisher)
        if not once:
            return
        try:
            async with asyncio.timeout(RECORD_SECONDS_MAX):
                await self._store.recorded()
        except TimeoutError:
            self._store.outbox.give_back(self.route, once)
            self._raise_alarm("the ledger cannot be written", "the ledger")
        else:
            await self._forward(once, publisher)

    async def _forward(self, rows: list[Activation], publisher: Publisher) -> None:
        failed: list[Failed] = []
        too_large: list[Failed] = []
        for trimmed in (False, True):
            safe, too_large, errors = await self._publish(rows, publisher, trimmed)
            failed += errors
            self.forwarded += len(safe)
            await self._store.outbox.forwarded([row for row, _ in safe])
            self._tell(safe)
            rows = [failure.row for failure in too_large]
            if not rows:
                break
        if too_large:
            log.warning(
                f"Kafka refuses {self.route} as too large; they stay in the store",
                topic=too_large[0].topic,
                count=len(too_large),
            )
            await self._rest(rows)
        # What no place takes waits behind all others: when nothing waits, it has left.
        self._full = self._full and self._store.outbox.waits(self.route)
        if failed:
            self._store.outbox.give_back(self.route, [failure.row for failure in failed])
            for topic, count in Counter(failure.topic for failure in failed).items():
                self._on_failures(topic, count)
            self._raise_alarm(failed[0].error, failed[0].topic)
        elif not self._full:
            self._clear_alarm()
        elif not too_large:
            # Those that no place takes wait behind these.
            self._back_off = 0.0

    async def _publish(
        self, rows: Sequence[Activation], publisher: Publisher, trimmed: bool
    ) -> tuple[list[tuple[Activation, Letter]], list[Failed], list[Failed]]:
        """Which are safe, which are too large, and which failed."""
        letters = [self._compose(row, trimmed) for row in rows]
        safe: list[tuple[Activation, Letter]] = []
        too_large: list[Failed] = []
        failed: list[Failed] = []
        for row, letter, error in zip(rows, letters, await publisher.publish(letters), strict=True):
            if error is None:
                safe.append((row, letter))
            else:
                which = too_large if error.code() in _TOO_LARGE else failed
                which.append(Failed(row, letter.topic, error.str()))
        return safe, too_large, failed

    async def _rest(self, rows: Sequence[Activation]) -> None:
        """These cannot leave."""
        outbox = self._store.outbox
        if self.route is not Route.DEAD_LETTER:
            await outbox.refuse(rows)
            return
        self._full = outbox.resting + len(rows) > self._store.limits.dead_letters_rest_max
        await outbox.rest(rows)
        self._lines.add(rows, "the store")
        if self._full:
            self._raise_alarm("the store's own dead letters are full (dead_letters_rest_max)", "the store")
        elif self._publisher is None:
            self._clear_alarm()

    def _tell(self, safe: Sequence[tuple[Activation, Letter]]) -> None:
        if safe and self.route is Route.DEAD_LETTER:
            self._lines.add([row for row, _ in safe], safe[0][1].topic)
        elif safe:
            log.debug("forwarded", what=self.route, count=len(safe), to=safe[0][1].topic)

    def _raise_alarm(self, error: str, to: str) -> None:
        self._back_off = min(max(2 * self._back_off, BACK_OFF_SECONDS_MIN), BACK_OFF_SECONDS_MAX)
        if not self.alarm:
            log.error(
                f"{self.route} cannot be forwarded; they are kept and tried again",
                to=to,
                error=error,
                waiting=self._store.outbox.size(),
            )
        self.alarm = f"{to}: {error}"

    def _clear_alarm(self) -> None:
        self._back_off = 0.0
        if self.alarm:
            log.info(f"{self.route} are forwarded again")
        self.alarm = ""

    async def stop(self) -> None:
        """Let a batch under way finish for a moment; what has no answer is sent again, under the same id."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_SECONDS_MAX):
                await self._idle.wait()
        self._task.cancel()
        # If it has failed, ``failed`` has told.
        await asyncio.gather(self._task, return_exceptions=True)
        self._lines.stop()

    async def failed(self) -> None:
        """Ends, with the cause, when forwarding ends by itself."""
        await asyncio.shield(self._task)


def _waits_for_ledger(row: Activation) -> bool:
    return row.at_most_once and row.source != NO_SOURCE


class Lines:
    """Dead letters in the log: the first at once, and what comes within TELL_EVERY_SECONDS in one line."""

    def __init__(self) -> None:
        self._reasons: Counter[str | None] = Counter()
        self._first = self._to = ""
        self._next: asyncio.TimerHandle | None = None

    def add(self, rows: Sequence[Activation], to: str) -> None:
        if not rows:
            return
        if not self._reasons:
            self._first = f"{rows[0].taskname} {rows[0].id}"
        self._reasons.update(row.reason for row in rows)
        self._to = to
        if self._next is None:
            self._say()

    def _say(self) -> None:
        self._next = None
        if self._reasons:
            self._tell()
            self._next = asyncio.get_running_loop().call_later(TELL_EVERY_SECONDS, self._say)

    def _tell(self) -> None:
        count, reasons = self._reasons.total(), dict(self._reasons)
        log.warning("dead letters", count=count, to=self._to, reasons=reasons, first=self._first)
        self._reasons.clear()

    def stop(self) -> None:
        """Tell of what is left."""
        if self._next is not None:
            self._next.cancel()
        if self._reasons:
            self._tell()
