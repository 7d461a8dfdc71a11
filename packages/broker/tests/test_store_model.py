"""After any sequence of operations, restarts included, memory equals the rows and nothing is lost."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, rule
from store_helpers import (
    ManualClock,
    activation,
    check_ledger,
    check_store,
    open_store,
    settle_down,
    token_of,
)

from penstock_broker.domain.activation import OnExceeded, Route, Status, hash_id, route_of
from penstock_broker.domain.lifecycle import Event, Limits
from penstock_broker.store.batch import Answer, Report
from penstock_broker.store.limits import StoreLimits

# Many short histories: on a busy machine they take their time.
pytestmark = pytest.mark.timeout(300)

LIMITS = StoreLimits(
    window_rows_max=4,
    window_bytes_max=6_000,
    batch_rows_max=3,
    unclaimable_ms=130_000,
    # A namespace's share is half of these.
    rows_max=24,
    bytes_max=60_000,
    lifecycle=Limits(max_deliveries=3, unknown_task_ms=20_000),
)
OUTCOMES = (
    Event.COMPLETE,
    Event.IGNORE,
    Event.FAIL,
    Event.RETRY,
    Event.DEADLINE_EXCEEDED,
    Event.WORKER_DIED,
    Event.EXPIRED_AT_START,
    Event.RELEASE,
    Event.UNKNOWN_TASK,
    Event.ARGUMENTS_MISMATCH,
)


class StoreMachine(RuleBasedStateMachine):
    """The store against a model that knows only what it was told: which ids ended, and which tokens."""

    tokens = Bundle("tokens")

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.folder = Path(tempfile.mkdtemp())
        self.clock = ManualClock()
        self.retry_topic = False
        self.store = self.call(self.open())
        self.ids = 0
        self.offset = 0
        # What was sent on, as the log has it: (id, hash of the forward id), copies included.
        self.log: list[tuple[str, int]] = []
        self.read_to = 0
        # Ids whose insertion was acknowledged and that have not ended in any way we were told.
        self.unfinished: set[str] = set()
        # Tokens whose outcome was answered APPLIED, and when durable.
        self.ended: set[str] = set()
        self.paused: set[tuple[str, str]] = set()

    def call(self, coroutine):
        return self.loop.run_until_complete(coroutine)

    async def open(self):
        lifecycle = replace(LIMITS.lifecycle, retry_topic=self.retry_topic)
        return open_store(self.folder / "store.sqlite", self.clock, replace(LIMITS, lifecycle=lifecycle))

    def teardown(self) -> None:
        self.store.database.close()
        self.loop.close()
        shutil.rmtree(self.folder)

    @initialize(
        target=tokens, counts=st.lists(st.integers(1, 6), min_size=2, max_size=4), claimed=st.integers(0, 6)
    )
    def begin(self, counts, claimed):
        """Without it most histories have nothing to claim: rules are drawn from some of them at a time."""
        for n, count in enumerate(counts):
            namespace, application = ("pay", "mail", "flood")[n % 3], ("shop", "crm")[n // 3]
            self.insert_rows(
                count, 10, n % 2 == 1, OnExceeded.DEADLETTER, namespace=namespace, application=application,
                max_attempts=3, delay_ms=500 * (n == 2),
            )  # fmt: skip

        async def go():
            await settle_down(self.store)
            return [token_of(self.store, row) for row in self.store.claim(None, (), claimed, 1 << 20)]

        return self.call(go())

    @rule(
        count=st.integers(1, 6),
        namespace=st.sampled_from(["pay", "mail", "flood"]),
        application=st.sampled_from(["shop", "crm"]),
        size=st.sampled_from([10, 1024, 1025, 3000]),
        delay_ms=st.sampled_from([0, 0, 0, 500, 5000]),
        expires_ms=st.sampled_from([None, None, 1000, 8000]),
        max_attempts=st.integers(0, 3),
        policy=st.sampled_from(list(OnExceeded)),
        at_most_once=st.booleans(),
        from_log=st.booleans(),
    )
    def insert(self, count, size, from_log, policy, **how):
        self.insert_rows(count, size, from_log, policy, **how)

    def insert_rows(self, count, size, from_log, policy, **how):
        async def go():
            rows, taken = [], {}
            for _ in range(count):
                self.ids += 1
                row = activation(f"task-{self.ids}", self.clock, body=bytes(size), on_exceeded=policy, **how)
                if from_log:
                    source = self.store.source("tasks", 0)
                    row.source, row.offset = source.id, self.offset
                    self.offset += 1
                    taken = {source.id: self.offset}
                rows.append(row)
            self.store.insert(rows, taken)

        self.call(go())

    @rule(n=st.integers(1, 4))
    def insert_again(self, n):
        async def go():
            known = [f"task-{i}" for i in range(max(1, self.ids - n), self.ids + 1)]
            known = [id for id in known if self.store.content_of(id) is not None]
            before = self.store.memory.rows
            self.store.insert([activation(id, self.clock) for id in known])
            assert self.store.memory.rows == before

        self.call(go())

    @rule(n=st.integers(1, 3))
    def take_an_id_for_something_else(self, n):
        async def go():
            known = [f"task-{i}" for i in range(max(1, self.ids - n), self.ids + 1)]
            known = [id for id in known if self.store.content_of(id) is not None]
            rows = [activation(id, self.clock, content=id.encode()) for id in known]
            self.store.insert(rows)
            for row, id in zip(rows, known, strict=True):
                assert row.id != id
                assert row.status is Status.FORWARDING
                self.unfinished.add(row.id)

        self.call(go())

    @rule(
        target=tokens,
        rows=st.integers(1, 5),
        application=st.sampled_from([None, "shop", "crm"]),
        namespaces=st.sampled_from([(), ("pay",), ("mail", "flood")]),
        worker=st.sampled_from(["one", "two"]),
        tokenless=st.booleans(),
        settled=st.sampled_from([True, True, False]),
    )
    def claim(self, rows, application, namespaces, worker, tokenless, settled):
        async def go():
            if settled:
                await settle_down(self.store)
            claimed = self.store.claim(application, namespaces, rows, 1 << 20, worker, tokenless)
            for row in claimed:
                assert not self.store.refusals.by(row.seq, worker, self.clock.mono)
                assert row.body is not None
                assert row.expires_at is None or row.expires_at > self.clock.wall
                assert row.received_at <= self.clock.wall
                assert (row.application, row.namespace) not in self.paused
                row.body = None
            return [token_of(self.store, row) for row in claimed]

        return self.call(go())

    @rule(
        rows=st.integers(1, 4),
        worker=st.sampled_from(["one", "two"]),
        begun=st.booleans(),
        stored=st.booleans(),
        kept=st.integers(0, 1),
    )
    def claim_for_nobody(self, rows, worker, begun, stored, kept):
        """The claims are undone before anybody is told of them, some of them a tick later."""

        async def go():
            await settle_down(self.store)
            claimed = self.store.claim(None, (), rows, 1 << 20, worker)
            if stored:
                await settle_down(self.store)
            self.store.release(claimed[kept:])
            writing = asyncio.ensure_future(self.store.writer.tick()) if begun else None
            await asyncio.sleep(0)
            self.store.release(claimed)
            if writing is not None:
                await writing

        self.call(go())

    @rule(tokens=tokens, event=st.sampled_from(OUTCOMES), delay=st.sampled_from([None, 0, 700]))
    def settle(self, tokens, event, delay):
        async def go():
            for token in tokens:
                answer = self.store.settle(token, event, self.clock.wall, delay, '{"type":"x"}')
                await settle_down(self.store)
                first = answer.answer if isinstance(answer, Report) else answer
                if first is Answer.APPLIED and event in (Event.UNKNOWN_TASK, Event.ARGUMENTS_MISMATCH):
                    self.store.refusals.add(token.seq, "one", self.clock.mono)
                again = self.store.settle(token, event, self.clock.wall, delay)
                await settle_down(self.store)
                second = again.answer if isinstance(again, Report) else again
                assert second is not Answer.APPLIED, "one outcome per claim"
                if first is Answer.APPLIED:
                    assert second is Answer.DUPLICATE
            check_ledger(
                self.store, self.store.database.load([r[0] for r in self.store.database.positions()])
            )

        self.call(go())

    @rule(tokens=tokens, event=st.sampled_from([Event.COMPLETE, Event.FAIL, Event.RETRY]))
    def settle_by_id(self, tokens, event):
        async def go():
            for token in tokens:
                self.store.settle_by_id(token.id_hash, event, self.clock.wall, retry_delay_ms=300)

        self.call(go())

    @rule(tokens=tokens, started=st.booleans())
    def extend(self, tokens, started):
        async def go():
            for token in tokens:
                self.store.extend(token, started)

        self.call(go())

    @rule(n=st.integers(0, 12))
    def cancel(self, n):
        async def go():
            id_hash = hash_id(f"task-{self.ids - n}")
            live = id_hash in self.store.memory.live
            answer = self.store.control.cancel(id_hash)
            assert (answer is Answer.UNKNOWN) == (not live)
            await settle_down(self.store)
            if isinstance(answer, Report):
                answer = answer.answer
            if answer is Answer.APPLIED:
                assert id_hash not in self.store.memory.live
                assert self.store.control.cancel(id_hash) is Answer.UNKNOWN

        self.call(go())

    @rule(tokens=tokens)
    def cancel_claimed(self, tokens):
        async def go():
            for token in tokens:
                row = self.store.memory.resident.get(token.seq)
                held = row is not None and row.status is Status.PROCESSING and row.claim == token.claim
                held = held and row.claim_epoch == token.epoch
                answer = self.store.control.cancel(token.id_hash)
                if held:
                    assert answer is Answer.APPLIED
                    assert self.store.control.was_cancelled(token)
                    assert self.store.extend(token, True) is Answer.STALE
                    late = self.store.settle(token, Event.COMPLETE, self.clock.wall)
                    assert late is Answer.STALE, "a cancelled task is not done"

        self.call(go())

    @rule(n=st.integers(0, 12))
    def run_now(self, n):
        async def go():
            id_hash = hash_id(f"task-{self.ids - n}")
            await settle_down(self.store)
            delayed = [
                row
                for row in self.store.database.load([key[0] for key in self.store.database.positions()])
                if row.status is Status.DELAYED and hash_id(row.id) == id_hash
            ]
            answer = self.store.control.run_now(id_hash)
            await settle_down(self.store)
            if isinstance(answer, Report):
                answer = answer.answer
            assert (answer is Answer.APPLIED) == bool(delayed)
            for row in delayed:
                now = self.store.database.get(row.seq)
                assert now is None or now.status is Status.PENDING

        self.call(go())

    @rule(pair=st.sampled_from([("shop", "pay"), ("shop", "mail"), ("crm", "pay")]), durable=st.booleans())
    def pause(self, pair, durable):
        async def go():
            queue = self.store.memory.index.pair(*pair)
            if queue is not None:
                assert self.store.control.pause(queue) == (pair not in self.paused)
                self.paused.add(pair)
                if durable:
                    await settle_down(self.store)

        self.call(go())

    @rule(pair=st.sampled_from([("shop", "pay"), ("shop", "mail"), ("crm", "pay")]))
    def resume(self, pair):
        async def go():
            queue = self.store.memory.index.pair(*pair)
            if queue is not None:
                assert self.store.control.resume(queue) == (pair in self.paused)
                self.paused.discard(pair)

        self.call(go())

    @rule(ms=st.sampled_from([1, 300, 1000, 6000, 16_000, 140_000]))
    def time_passes(self, ms):
        async def go():
            self.clock.advance(ms)
            self.store.lapse(self.clock.mono)

        self.call(go())

    @rule(behind=st.integers(0, 3))
    def cover(self, behind):
        async def go():
            source = self.store.source("tasks", 0)
            await settle_down(self.store)
            self.store.cover(source, max(0, source.next - behind))
            self.store.settle_dispute(source)
            came_back = self.store.source("sent on", 0)
            self.store.cover(came_back, max(0, came_back.next - behind))
            self.store.settle_dispute(came_back)

        self.call(go())

    @rule(behind=st.integers(0, 4))
    def partition_lost(self, behind):
        async def go():
            source = self.store.source("tasks", 0)
            boundary = max(source.covered, self.offset - behind)
            dropped = self.store.drop_uncovered(source, boundary)
            await settle_down(self.store)
            assert dropped.done()
            keys = list(self.store.database.positions())
            assert not any(s == source.id and offset >= boundary for _, _, _, _, s, offset, *_ in keys)
            # Whoever takes it back reads again from there.
            self.offset = max(self.offset, boundary)
            self.store.begin_range(source, self.offset)

        self.call(go())

    @rule()
    def partition_disputed(self):
        async def go():
            self.store.dispute(self.store.source("tasks", 0))

        self.call(go())

    @rule()
    def age_out(self):
        async def go():
            self.store.unclaimable.look(self.clock.mono)
            await settle_down(self.store)

        self.call(go())

    @rule(
        hand_over=st.integers(0, 4),
        running=st.booleans(),
        limit=st.integers(1, 5),
        size=st.sampled_from([1, 2000, 60_000]),
        answer=st.sampled_from(
            ["acknowledged", "acknowledged", "sent, and no answer", "not sent", "too large"]
        ),
        read=st.integers(0, 6),
    )
    def forward(self, hand_over, running, limit, size, answer, read):
        """What leaves comes back, from the log, once; sent without an answer, it is sent again."""

        async def go():
            if hand_over:
                await self._with_ticks(self.store.hand_over(hand_over, running))
            for route in Route:
                rows = await self._with_ticks(self.store.outbox.take(route, limit, size))
                assert len(rows) <= 1 or sum(row.size for row in rows) <= size
                self._send(route, rows, answer)
            self._read_back(read)

        self.call(go())

    async def _with_ticks(self, coroutine):
        waiting = asyncio.ensure_future(coroutine)
        while not waiting.done():
            await asyncio.sleep(0)
            await settle_down(self.store)
        return waiting.result()

    def _send(self, route, rows, answer):
        for row in rows:
            assert row.status is Status.FORWARDING
            assert row.body is not None
            assert route_of(row.reason) is route
            source = self.store.memory.partitions.get(row.source)
            assert source is None or source.is_covered(row.offset, row.seq), "another broker may send it, too"
        was_sent = {id for id, _ in self.log}
        if answer in ("acknowledged", "sent, and no answer") and route is not Route.DEAD_LETTER:
            self.log += [(row.id, hash_id(f"{row.seq}/{row.attempts}/{row.reason}")) for row in rows]
        if answer == "acknowledged":
            self.store.outbox.forwarded(rows)
        elif answer == "too large" and route is not Route.DEAD_LETTER and not was_sent & {r.id for r in rows}:
            self.store.outbox.refuse(rows)
        else:
            self.store.outbox.give_back(route, rows)

    def _read_back(self, count):
        source = self.store.source("sent on", 0)
        for offset in range(self.read_to, min(self.read_to + count, len(self.log))):
            id, forward_id = self.log[offset]
            row = activation(id, self.clock, max_attempts=3)
            row.source, row.offset, row.sent_on = source.id, offset, forward_id
            self.store.insert([row], {source.id: offset + 1})
            first = self.log.index((id, forward_id)) == offset
            assert (row.seq != 0 and self.store.memory.is_live(hash_id(id), row.seq)) == first
            self.read_to = offset + 1

    @rule()
    def tick(self):
        async def go():
            if self.store.writer.work_waits():
                await self.store.writer.tick()

        self.call(go())

    @rule(settled=st.booleans(), retry_topic=st.booleans())
    def restart(self, settled, retry_topic):
        """With everything written, or losing what the next tick would have written."""

        async def go():
            if settled:
                await settle_down(self.store)
            rows = [key[2] for key in self.store.database.positions()]
            self.store.database.close()
            self.retry_topic = retry_topic
            self.store = await self.open()
            assert sorted(key[2] for key in self.store.database.positions()) == sorted(rows)
            self.offset = max(self.offset, self.store.source("tasks", 0).next)
            self.read_to = max(0, self.store.source("sent on", 0).next)
            pairs = self.store.memory.index.pairs.values()
            kept = {(q.application, q.namespace) for q in pairs if q.paused_at is not None}
            assert kept == self.paused or not settled
            self.paused = kept

        self.call(go())

    @rule()
    def settled_store_is_consistent(self):
        async def go():
            await settle_down(self.store)
            check_store(self.store)

        self.call(go())


StoreMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestStoreModel = StoreMachine.TestCase
