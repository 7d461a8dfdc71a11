"""A seeded workload of the store's verbs, and what it was promised by the moment of a crash.

``Workload`` marks on the disk's journal what it is about to ask (``Asked``) and what was acknowledged
(``Told``). ``Promises`` is filled from those marks, and checks a store that was opened after the crash.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from crash_disk import CrashDisk
from store_helpers import ManualClock, activation, check_store, settle_down, token_of

from penstock_broker.domain.activation import Activation, OnExceeded, Route, Status
from penstock_broker.domain.lifecycle import Event, Limits
from penstock_broker.domain.token import ClaimToken
from penstock_broker.store.batch import Answer, Report
from penstock_broker.store.inflight import Inflight
from penstock_broker.store.limits import StoreLimits

LIMITS = StoreLimits(
    window_rows_max=8,
    window_bytes_max=20_000,
    batch_rows_max=6,
    lifecycle=Limits(max_deliveries=3, unknown_task_ms=20_000),
)
# Small, so that the WAL is copied back and begun anew many times.
CHECKPOINT_BYTES = 48 * 1024
TOPIC = "tasks"
FINAL = (Event.COMPLETE, Event.IGNORE)
GIVEN_BACK = (Event.RELEASE, Event.UNKNOWN_TASK)
OUTCOMES = (
    *(Event.COMPLETE,) * 5,
    Event.IGNORE,
    Event.FAIL,
    Event.RETRY,
    Event.RETRY,
    Event.DEADLINE_EXCEEDED,
    Event.WORKER_DIED,
    Event.RELEASE,
    Event.UNKNOWN_TASK,
)


class Asked(NamedTuple):
    """From now on ``what`` may have happened to ``subject``: insert (rows), settle ((token, event)),
    leave (id), time (wall clock), lapse."""

    what: str
    subject: object


class Told(NamedTuple):
    """Acknowledged: inserted (ids), taken (offset), settled ((token, event)), claimed (at-most-once token),
    rested (id), gone (id), covered (offset), epoch (n)."""

    what: str
    subject: object


class Workload:
    """Operations drawn from a seed. ``told`` what its callers would have been."""

    def __init__(self, store: Inflight, clock: ManualClock, disk: CrashDisk, rng: random.Random) -> None:
        self.store, self.clock, self.disk, self.rng = store, clock, disk, rng
        self.tokens: list[ClaimToken] = []
        self.ids = 0
        self.offset = 0
        self.source = store.source(TOPIC, 0)
        self._told(Told("epoch", store.epoch))

    def _told(self, told: Told) -> None:
        self.disk.mark(told)

    def _asked(self, what: str, subject: object) -> None:
        self.disk.mark(Asked(what, subject))

    async def run(self, steps: int) -> None:
        """Raises what the store raises."""
        verbs = (
            *(self.insert,) * 4,
            *(self.claim,) * 5,
            *(self.settle,) * 5,
            self.time_passes,
            self.cover,
            self.forward,
            self.forget,
        )
        for _ in range(steps):
            await self.rng.choice(verbs)()

    async def insert(self) -> None:
        rng, rows = self.rng, []
        from_log = rng.random() < 0.6
        for _ in range(rng.randint(1, 5)):
            self.ids += 1
            row = activation(
                f"task-{self.ids}",
                self.clock,
                namespace=rng.choice(("pay", "mail")),
                body=rng.randbytes(rng.choice((10, 200, 1024, 1025, 3000))),
                delay_ms=rng.choice((0, 0, 0, 400)),
                expires_ms=rng.choice((None, None, None, 3000)),
                max_attempts=rng.randint(1, 3),
                on_exceeded=rng.choice((OnExceeded.DISCARD, OnExceeded.DEADLETTER)),
                at_most_once=rng.random() < 0.15,
            )
            if from_log:
                row.source, row.offset = self.source.id, self.offset
                self.offset += 1
            rows.append(row)
        self._asked("insert", [Sent(r.id, r.body or b"", r.offset, r.expires_at is not None) for r in rows])
        stored = self.store.insert(rows, {self.source.id: self.offset} if from_log else {})
        await settle_down(self.store)
        await stored
        self._told(Told("inserted", [row.id for row in rows]))
        if from_log:
            self._told(Told("taken", self.offset))

    async def claim(self) -> None:
        rows = self.store.claim(None, (), self.rng.randint(1, 4), 1 << 20)
        for row in rows:
            token = token_of(self.store, row)
            self._asked("claim", (token, row.id))
            self.tokens.append(token)
        if any(row.at_most_once for row in rows):
            await settle_down(self.store)
            for row in rows:
                if row.at_most_once:
                    self._told(Told("claimed", (token_of(self.store, row), row.id)))

    async def settle(self) -> None:
        if not self.tokens:
            return
        some = [
            self.tokens.pop(self.rng.randrange(len(self.tokens))) for _ in range(min(3, len(self.tokens)))
        ]
        answers = []
        for token in some:
            event = self.rng.choice(OUTCOMES)
            self._asked("settle", (token, event))
            delay = self.rng.choice((None, 0, 300))
            answers.append((token, event, self.store.settle(token, event, self.clock.wall, delay)))
        await settle_down(self.store)
        for token, event, answer in answers:
            if (answer.answer if isinstance(answer, Report) else answer) is Answer.APPLIED:
                self._told(Told("settled", (token, event)))

    async def time_passes(self) -> None:
        self.clock.advance(self.rng.choice((100, 500, 4000, 16_000)))
        self._asked("time", self.clock.wall)
        self._asked("lapse", None)
        self.store.lapse(self.clock.mono)
        await settle_down(self.store)

    async def cover(self) -> None:
        offset = max(0, self.source.next - self.rng.randint(0, 2))
        self.store.cover(self.source, offset)
        await settle_down(self.store)
        self._told(Told("covered", offset))

    async def forward(self) -> None:
        outbox = self.store.outbox
        taking = outbox.take(Route.DEAD_LETTER, 3, 1 << 20)
        rows = await self._with_ticks(taking)
        for row in rows:
            self._asked("leave", row.id)
        match self.rng.randrange(3):
            case 0:
                outbox.give_back(Route.DEAD_LETTER, rows)
            case 1:
                await self._with_ticks(outbox.forwarded(rows))
                for row in rows:
                    self._told(Told("gone", row.id))
            case _:
                await self._with_ticks(outbox.rest(rows))
                for row in rows:
                    self._told(Told("rested", row.id))

    async def _with_ticks(self, awaitable):
        waiting = asyncio.ensure_future(awaitable)
        await asyncio.sleep(0)
        await settle_down(self.store)
        return await waiting

    async def forget(self) -> None:
        self.store.forget_finished()
        await settle_down(self.store)


class Sent(NamedTuple):
    id: str
    body: bytes
    offset: int
    expires: bool


@dataclass
class Promises:
    """What was asked and told until some moment."""

    sent: dict[str, Sent] = field(default_factory=dict)
    inserted: set[str] = field(default_factory=set)
    claims: dict[ClaimToken, str] = field(default_factory=dict)
    # Tokens whose outcome was asked for, and those whose claim may have been taken back.
    asked: set[ClaimToken] = field(default_factory=set)
    may_have_lapsed: set[ClaimToken] = field(default_factory=set)
    settled: dict[ClaimToken, Event] = field(default_factory=dict)
    claimed_once: dict[ClaimToken, str] = field(default_factory=dict)
    may_leave: set[str] = field(default_factory=set)
    gone: set[str] = field(default_factory=set)
    rested: set[str] = field(default_factory=set)
    taken: int = -1
    covered: int = 0
    epoch: int = 0
    wall: int = 0

    def learn(self, marks: Iterable[object]) -> None:
        for mark in marks:
            if isinstance(mark, Asked):
                self._asked(mark.what, mark.subject)
            elif isinstance(mark, Told):
                self._told(mark.what, mark.subject)

    def _asked(self, what, subject) -> None:
        match what:
            case "insert":
                self.sent.update((sent.id, sent) for sent in subject)
                self.may_leave.update(sent.id for sent in subject if sent.expires)
            case "claim":
                self.claims[subject[0]] = subject[1]
            case "settle":
                token, event = subject
                self.asked.add(token)
                self.may_leave.add(self.claims[token])
                if event in GIVEN_BACK:
                    # It was not started, so another worker may start it.
                    self.claimed_once.pop(token, None)
            case "leave":
                self.may_leave.add(subject)
            case "lapse":
                self.may_have_lapsed.update(self.claims)
            case "time":
                self.wall = subject

    def _told(self, what, subject) -> None:
        match what:
            case "inserted":
                self.inserted.update(subject)
            case "settled":
                self.settled[subject[0]] = subject[1]
                if subject[1] in FINAL:
                    self.gone.add(self.claims[subject[0]])
            case "claimed":
                self.claimed_once[subject[0]] = subject[1]
            case "gone":
                self.gone.add(subject)
            case "rested":
                self.gone.add(subject)
                self.rested.add(subject)
            case "taken" | "covered" | "epoch":
                setattr(self, what, max(getattr(self, what), subject))

    # -- after the crash

    async def check(self, store: Inflight, clock: ManualClock, drain: bool = True) -> None:
        """Whatever the store has lost, it was not promised; whatever it hands out, it may."""
        connection = store.database.connection
        assert connection.pragma("integrity_check") == "ok"
        assert store.epoch > self.epoch, "the epoch did not rise"
        await settle_down(store)
        check_store(store)
        rows = {row.id: row for row in store.database.load([k[0] for k in store.database.positions()])}
        self._check_rows(rows)
        self._check_source(store, rows)
        rested = {id for (id,) in connection.execute("SELECT id FROM dead_letter")}
        assert self.rested <= rested, "a dead letter that rested here is not there"
        if drain:
            await self._check_answers(store, clock, rows)
            await self._drain(store, clock)
            check_store(store)

    def _check_rows(self, rows: dict[str, Activation]) -> None:
        lost = self.inserted - self.may_leave - set(rows)
        assert not lost, f"acknowledged and lost: {sorted(lost)}"
        back = self.gone & set(rows)
        assert not back, f"acknowledged as finished and there again: {sorted(back)}"
        for id, row in rows.items():
            assert id in self.sent, f"{id} was never sent"
            assert row.body == self.sent[id].body, f"{id} has another body"
        for token in self.settled:
            held = rows.get(self.claims[token])
            assert held is None or held.claim > token.claim, "an acknowledged outcome is not there"
        for token, id in self.claimed_once.items():
            held = rows.get(id)
            if held is not None and held.claim == token.claim:
                assert held.status is Status.PROCESSING, "an at-most-once claim is forgotten"
                assert held.claim_epoch == token.epoch

    def _check_source(self, store: Inflight, rows: dict[str, Activation]) -> None:
        sources = list(store.sources())
        next_ = sources[0].next if sources else -1
        assert next_ >= self.taken, "the next offset is behind what was acknowledged"
        if sources:
            assert sources[0].covered >= self.covered
        for sent in self.sent.values():
            if sent.offset < 0:
                continue
            if sent.offset < next_:
                there = sent.id in rows or sent.id in self.may_leave
                assert there, f"offset {sent.offset} counts as taken, and its row is not there"
            else:
                assert sent.id not in rows, "a row is there whose offset will be read again"

    async def _check_answers(self, store: Inflight, clock: ManualClock, rows: dict[str, Activation]) -> None:
        """Every outcome is accepted once, whatever the crash left of the claim."""
        for token, event in self.settled.items():
            again = await self._settle(store, clock, token, event)
            assert again in (Answer.DUPLICATE, Answer.STALE), f"{event} was acknowledged and applied again"
            if event in FINAL:
                assert again is Answer.DUPLICATE
        for token, id in self.claims.items():
            if token in self.settled:
                continue
            first = await self._settle(store, clock, token, Event.COMPLETE)
            certain = token not in self.asked | self.may_have_lapsed and id in rows
            if certain:
                assert first is Answer.APPLIED, "a claim that was handed out is not accepted"
            if first is Answer.APPLIED:
                self.gone.add(id)
            assert await self._settle(store, clock, token, Event.COMPLETE) is not Answer.APPLIED

    async def _settle(self, store: Inflight, clock: ManualClock, token: ClaimToken, event: Event) -> Answer:
        answer = store.settle(token, event, clock.wall)
        await settle_down(store)
        return answer.answer if isinstance(answer, Report) else answer

    async def _drain(self, store: Inflight, clock: ManualClock) -> None:
        """All that is left can be done; nothing that was done, and nothing twice."""
        for source in store.sources():
            store.cover(source, source.next)
            store.settle_dispute(source)
        for _ in range(200):
            clock.advance(20_000)
            store.lapse(clock.mono)
            await settle_down(store)
            rows = store.claim(None, (), 1000, 1 << 30)
            for row in rows:
                assert row.id not in self.gone, f"{row.id} was finished and is handed out again"
                assert row.id not in self.claimed_once.values(), f"{row.id} is started a second time"
                assert row.body == self.sent[row.id].body
                store.settle(token_of(store, row), Event.COMPLETE, clock.wall)
                self.gone.add(row.id)
            await settle_down(store)
            counts = store.memory.counts.values()
            if not any(c[Status.PENDING] or c[Status.DELAYED] or c[Status.PROCESSING] for c in counts):
                return
        raise AssertionError("the backlog does not drain")
