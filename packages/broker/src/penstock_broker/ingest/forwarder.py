"""Takes what must leave through the log out of the store, and lets it go once it is acknowledged."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Sequence

import structlog
from confluent_kafka import KafkaError

from penstock_broker.domain.activation import Activation
from penstock_broker.ingest.dead_letters import letter
from penstock_broker.ingest.publisher import Publisher
from penstock_broker.store.inflight import Inflight

log = structlog.get_logger("forward")

BATCH_ROWS_MAX = 512
BATCH_BYTES_MAX = 8 * 1024 * 1024
BACK_OFF_SECONDS_MIN = 1.0
BACK_OFF_SECONDS_MAX = 60.0
STOP_SECONDS_MAX = 1.0

_TOO_LARGE = (KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.RECORD_LIST_TOO_LARGE)


class Forwarder:
    """One batch at a time; a row that is not acknowledged stays in the store and is tried again.

    Without a ``publisher`` there is no log to go to: dead letters rest in the store. ``on_failures``
    is told how many rows a batch failed to forward.
    """

    def __init__(
        self, store: Inflight, publisher: Publisher | None, on_failures: Callable[[int], None]
    ) -> None:
        self._store = store
        self._publisher = publisher
        self._on_failures = on_failures
        self._waiting = asyncio.Event()
        self._idle = asyncio.Event()
        self._rows_max = 32
        self._back_off = 0.0
        self._full = False
        self.alarm = ""

    def start(self) -> None:
        self._store.writer.on_committed.append(self._look)
        self._look()
        self._task = asyncio.create_task(self.run(), name="forwarder")

    def _look(self) -> None:
        if self._store.outbox.waits():
            self._waiting.set()

    async def run(self) -> None:
        """Until cancelled. Raises StoreStopped when the store has."""
        while True:
            self._idle.set()
            await self._waiting.wait()
            self._waiting.clear()
            self._idle.clear()
            while self._store.outbox.waits():
                rows = await self._store.outbox.take(self._rows_max)
                self._fit(rows)
                if self._publisher is None:
                    await self._rest(rows)
                else:
                    await self._forward(rows, self._publisher)
                if self._back_off:
                    self._idle.set()
                    await asyncio.sleep(self._back_off)
                    self._idle.clear()

    def _fit(self, rows: Sequence[Activation]) -> None:
        """Take more or fewer next time, so that a batch's bytes stay bounded."""
        size = sum(row.size for row in rows)
        if size > BATCH_BYTES_MAX:
            self._rows_max = max(1, len(rows) * BATCH_BYTES_MAX // size)
        elif size < BATCH_BYTES_MAX // 4:
            self._rows_max = min(2 * self._rows_max, BATCH_ROWS_MAX)

    async def _forward(self, rows: list[Activation], publisher: Publisher) -> None:
        failed: list[tuple[Activation, KafkaError]] = []
        too_large: list[Activation] = []
        for trimmed in (False, True):
            safe, too_large, errors = await self._publish(rows, publisher, trimmed)
            failed += errors
            await self._store.outbox.forwarded(safe)
            _tell(safe, publisher.topic)
            rows = too_large
            if not rows:
                break
        if too_large:
            log.warning(
                "Kafka refuses dead letters as too large; they rest in the store",
                topic=publisher.topic,
                count=len(too_large),
            )
            await self._rest(too_large)
        if failed:
            self._store.outbox.give_back([row for row, _ in failed])
            self._on_failures(len(failed))
            self._raise_alarm(failed[0][1].str(), publisher.topic)
        elif not self._full:
            self._clear_alarm(publisher.topic)

    async def _publish(
        self, rows: Sequence[Activation], publisher: Publisher, trimmed: bool
    ) -> tuple[list[Activation], list[Activation], list[tuple[Activation, KafkaError]]]:
        """Which are safe, which are too large, and which failed."""
        sources = {source.id: source for source in self._store.sources()}
        letters = [letter(row, sources.get(row.source), trimmed) for row in rows]
        safe, too_large, failed = [], [], []
        for row, error in zip(rows, await publisher.publish(letters), strict=True):
            if error is None:
                safe.append(row)
            elif error.code() in _TOO_LARGE:
                too_large.append(row)
            else:
                failed.append((row, error))
        return safe, too_large, failed

    async def _rest(self, rows: Sequence[Activation]) -> None:
        outbox = self._store.outbox
        self._full = outbox.resting + len(rows) > self._store.limits.dead_letters_rest_max
        await outbox.rest(rows)
        _tell(rows, "the store")
        if self._full:
            self._raise_alarm("the store's own dead letters are full (dead_letters_rest_max)", "the store")
        elif self._publisher is None:
            self._clear_alarm("the store")

    def _raise_alarm(self, error: str, to: str) -> None:
        self._back_off = min(max(2 * self._back_off, BACK_OFF_SECONDS_MIN), BACK_OFF_SECONDS_MAX)
        if not self.alarm:
            log.error(
                "dead letters cannot be forwarded; they are kept and tried again",
                to=to,
                error=error,
                waiting=self._store.outbox.size(),
            )
        self.alarm = error

    def _clear_alarm(self, to: str) -> None:
        self._back_off = 0.0
        if self.alarm:
            log.info("dead letters are forwarded again", to=to)
        self.alarm = ""

    async def stop(self) -> None:
        """Let a batch under way finish for a moment; what has no answer is sent again, under the same id."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), STOP_SECONDS_MAX)
        self._task.cancel()
        # If it has failed, ``failed`` has told.
        await asyncio.gather(self._task, return_exceptions=True)
        if self._publisher is not None:
            await self._publisher.stop()

    async def failed(self) -> None:
        """Ends, with the cause, when forwarding ends by itself."""
        await asyncio.shield(self._task)


def _tell(rows: Sequence[Activation], to: str) -> None:
    """One line for a batch of dead letters, with the first of them."""
    if rows:
        reasons = dict(Counter(row.reason for row in rows))
        log.warning(
            "dead letters", count=len(rows), to=to, reasons=reasons, first=f"{rows[0].taskname} {rows[0].id}"
        )
