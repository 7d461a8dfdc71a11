"""A store on a real file, ticks run inline, time in the test's hands."""

from __future__ import annotations

import asyncio
import contextlib
import selectors
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any, TypeVar
from zlib import crc32

from google.protobuf.message import DecodeError

from penstock_broker.clock import Clock
from penstock_broker.domain.activation import (
    CONTENT_BITS,
    CONTENT_MASK,
    NO_SOURCE,
    Activation,
    OnExceeded,
    Status,
    hash_id,
)
from penstock_broker.domain.token import ClaimToken
from penstock_broker.store.batch import Batch, Written
from penstock_broker.store.database import Database
from penstock_broker.store.finished import place
from penstock_broker.store.inflight import Inflight
from penstock_broker.store.ledger import State, state_of
from penstock_broker.store.limits import StoreLimits
from penstock_protocol.v1.activation_pb2 import TaskActivation

T = TypeVar("T")


class ManualClock:
    def __init__(self, wall: int = 1_000_000_000_000) -> None:
        self.wall = wall
        self.mono = 5_000

    def wall_ms(self) -> int:
        return self.wall

    def mono_ms(self) -> int:
        return self.mono

    def advance(self, ms: int) -> None:
        self.wall += ms
        self.mono += ms


class LoopClock:
    """The event loop's time."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop

    def wall_ms(self) -> int:
        return 1_000_000_000_000 + self.mono_ms()

    def mono_ms(self) -> int:
        return 5_000 + round(self.loop.time() * 1000)


class _NoWaiting(selectors.SelectSelector):
    """Nothing comes from outside: where a loop would wait, time has passed."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "everybody waits for somebody else"
        self.now += max(0.0, timeout)
        return []


def run_virtually(main: Coroutine[Any, Any, T]) -> T:
    """Run it on a loop whose time is virtual."""
    selector = _NoWaiting()
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.now  # type: ignore[method-assign]
    try:
        return loop.run_until_complete(main)
    finally:
        loop.close()


async def inline(write: Callable[[Batch], Written], batch: Batch) -> Written:
    return write(batch)


def open_store(path: Path, clock: Clock, limits: StoreLimits | None = None) -> Inflight:
    limits = limits or StoreLimits()
    return Inflight(Database(path, limits.lifecycle, clock.wall_ms()), clock, limits, inline)


def activation(  # noqa: PLR0913 - one for each field that a test may want
    id: str,
    clock: ManualClock,
    *,
    application: str = "shop",
    namespace: str = "pay",
    body: bytes | None = None,
    delay_ms: int = 0,
    expires_ms: int | None = None,
    max_attempts: int = 1,
    on_exceeded: OnExceeded = OnExceeded.DEADLETTER,
    at_most_once: bool = False,
    content: bytes = b"",
    source: int = 0,
    offset: int = -1,
) -> Activation:
    body = body if body is not None else b"body of " + id.encode()
    now = clock.wall_ms()
    return Activation(
        id=id,
        application=application,
        namespace=namespace,
        taskname="charge",
        body=body,
        received_at=now,
        ready_at=now + delay_ms,
        expires_at=None if expires_ms is None else now + expires_ms,
        deadline_ms=10_000,
        max_attempts=max_attempts,
        on_exceeded=on_exceeded,
        at_most_once=at_most_once,
        source=source,
        offset=offset,
        status=Status.DELAYED if delay_ms else Status.PENDING,
        content=crc32(content) % CONTENT_MASK + 1,
        size=len(body),
    )


def token_of(store: Inflight, row: Activation) -> ClaimToken:
    return ClaimToken(row.claim_epoch, row.seq, row.id_hash, store.database.nonce, row.claim)


async def settle_down(store: Inflight) -> None:
    """Tick until nothing waits."""
    while store.writer.work_waits():
        await store.writer.tick()


def check_store(store: Inflight) -> None:
    """Memory equals the rows: the index is a prefix of them, everything else agrees to the row."""
    assert not store.writer.work_waits()
    rows = {row.seq: row for row in store.database.load([key[0] for key in store.database.positions()])}
    held_starts = [row for source in store.sources() for row in source.held_starts]
    held_starts += store.memory.partitions.held_direct
    held = {row.seq for row in held_starts if row.status is Status.PENDING}
    in_memory = set()
    for queue in store.memory.index.pairs.values():
        order = sorted(
            (r.ready_at, r.seq) for r in rows.values() if r.pair == queue.pair and r.status is Status.PENDING
        )
        ready = [(r.ready_at, r.seq) for r in queue.ready if r.status is Status.PENDING]
        waiting = [(r.ready_at, r.seq) for r in rows.values() if r.seq in held and r.pair == queue.pair]
        memory = sorted(ready + waiting)
        assert memory == order[: len(memory)], "the index is no prefix of the rows"
        assert queue.spilled == len(order) - len(memory), "the spilled rows are miscounted"
        assert memory or not order, "a pair with work has nothing in memory"
        # A row that was held back enters the order when it may start, which is after its neighbours.
        never_held = [r for r in queue.ready if not (r.source or r.at_most_once)]
        in_line = [(r.ready_at, r.seq) for r in never_held if r.status is Status.PENDING]
        assert in_line == sorted(in_line), "the index is out of order"
        in_memory |= {seq for _, seq in memory}
        held_here = [row for row in held_starts if row.pair == queue.pair]
        reserved = [row for row in [*queue.ready, *held_here] if row.reserved]
        assert queue.bytes == sum(row.size for row in reserved), "room in memory is miscounted"
        assert queue.rows == len(reserved)
        in_turn = queue in store.memory.index._applications[queue.application].ring
        assert queue.in_ring == in_turn
        if queue.paused_at is not None:
            assert not in_turn, "a paused pair has turns"
        elif any(row.reserved for row in queue.ready):
            assert in_turn, "a pair with work has no turns"
    claimed = {seq for seq, row in rows.items() if row.status is Status.PROCESSING}
    assert store.memory.index.bytes == sum(queue.bytes for queue in store.memory.index.pairs.values())
    assert set(store.memory.resident) == in_memory | claimed
    for seq, row in store.memory.resident.items():
        for name in (
            "status",
            "claim",
            "claim_epoch",
            "attempts",
            "lost",
            "id",
            "expires_at",
            "source",
            "offset",
        ):
            if name == "claim_epoch" and row.status is not Status.PROCESSING:
                continue
            assert getattr(row, name) == getattr(rows[seq], name), name
    leaving = {seq for seq, row in rows.items() if row.status is Status.FORWARDING}
    live = {entry >> CONTENT_BITS: entry & CONTENT_MASK for entry in store.memory.live.values()}
    assert all(rows[seq].content == content for seq, content in live.items())
    assert store.memory.forwarding == leaving
    assert live.keys() - leaving == rows.keys() - leaving
    # A row that leaves may have come back from the log before it was gone; that one may be gone by now.
    unknown = {row.id for row in rows.values()} - {rows[seq].id for seq in live}
    assert all(store.memory.finished.get(hash_id(id)) is not None for id in unknown)
    held_exits = {way_out.seq for source in store.sources() for _, way_out in source.held_exits}
    queued = {way_out.seq for route in store.memory.outbox.values() for way_out in route}
    assert held_exits | queued == leaving, "a row that must leave is in no queue"
    uncovered = {seq for source in store.sources() for _, seq, _ in source.uncovered}
    assert held_exits == leaving & uncovered, "what another broker may read must stay, and only that"
    assert store.memory.rows == len(rows)
    assert store.memory.bytes == sum(row.size for row in rows.values())
    for pair, counts in store.memory.counts.items():
        staying = (r for r in rows.values() if r.pair == pair and r.status is not Status.FORWARDING)
        assert store.memory.held_bytes[pair] == sum(r.size for r in staying)
        for status in list(Status)[1:]:
            assert counts[status] == sum(r.pair == pair and r.status is status for r in rows.values())
    balances = store.control.balances().values()
    # The pair of a damaged row may be what was damaged of it.
    balanced = not sum(balances) if store.memory.quarantined else not any(balances)
    assert balanced, "the books of a pair do not balance"
    assert {
        (queue.pair, queue.application, queue.namespace, queue.paused_at)
        for queue in store.memory.index.pairs.values()
    } == set(store.database.pairs())
    assert store.memory.books == store.database.books()
    check_ledger(store, rows.values())


def check_ledger(store: Inflight, rows: Iterable[Activation]) -> None:
    """What the ledger would be told is what the rows say."""
    stored = {place(row.source, row.offset): row for row in rows if row.source != NO_SOURCE}
    unfinished = store.memory.unfinished
    known = unfinished.places()
    assert known.keys() >= stored.keys(), "a row is not among the unfinished offsets"
    # What was damaged here can still be restored from the log.
    damaged = store.memory.quarantined
    assert len(known) <= len(stored) + damaged, "the unfinished offsets are not those of the rows"
    for at, row in stored.items():
        # A state that follows from the message need not be kept, and a back-off that is over is none.
        marked = row.at_most_once and row.status is Status.PROCESSING
        follows = row.claim == 0 and not marked and (row.attempts, row.lost) == _as_sent(row)
        assert _not_due(known[at], store) == _not_due(state_of(row), store) or (follows and not known[at])
    sources = {record[0]: record[1:] for record in store.database.sources()}
    assert unfinished.ranges == sources, "the ranges are not those of the rows"


def _as_sent(row: Activation) -> tuple[int, int]:
    """Attempts and lost deliveries of what another broker sent on, as its message says them."""
    with contextlib.suppress(DecodeError):
        message = TaskActivation.FromString(row.body or b"")
        return message.retry_state.attempts, message.sent_on.deliveries_lost
    return 0, 0


def _not_due(state: State | None, store: Inflight) -> State | None:
    if state is not None and 0 < state.due_at <= store.clock.wall_ms():
        state = state._replace(due_at=0)
    return state if state is not None and any(state[:6]) else None
