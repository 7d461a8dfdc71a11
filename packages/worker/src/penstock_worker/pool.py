"""Which child executes what: handing out, taking back, deadlines."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from math import ceil
from time import monotonic

import structlog

from penstock_protocol.v1 import consumer_pb2 as pb
from penstock_worker.children import Children
from penstock_worker.claim import Claim
from penstock_worker.credit import BLOCKED_SECONDS, PREFETCH_BYTES_MAX, ServiceTime, room
from penstock_worker.frames import (
    Assign,
    Error,
    Finished,
    FromChild,
    Outcome,
    Progress,
    Withdraw,
    Withdrawn,
)
from penstock_worker.metrics import Metrics
from penstock_worker.process import Child, Death, KillReason, State

TICK_SECONDS = 0.1

log = structlog.get_logger("penstock_worker")


class Pool:
    """The claims a worker holds, and the children that execute them, one at a time each.

    `settle(claim, outcome)` is called once for every claim handed in, unless it was revoked;
    `wanted()` whenever there may be room for more.
    """

    def __init__(
        self,
        app_path: str,
        slots: int,
        settle: Callable[[Claim, Outcome], None],
        wanted: Callable[[], None],
        metrics: Metrics,
    ) -> None:
        self.slots = slots
        self.children = Children(app_path, self._on_message, self._on_ready, self._on_death, metrics)
        self._settle, self._wanted, self._metrics = settle, wanted, metrics
        self._backlog: deque[Claim] = deque()
        self._held = 0
        self._held_bytes = 0
        self._service_time = ServiceTime()
        self._stopping = False
        self._idle = asyncio.Event()

    # What is held, and how much more is wanted.

    def room(self, asked_for: int) -> int:
        """How many tasks to ask brokers for; `asked_for` have been asked for already."""
        if self._stopping:
            return 0
        return room(*self._capacity(), self._held, asked_for)

    @property
    def prefetch(self) -> int:
        """Tasks that wait behind the running one, per slot."""
        return 0 if self._held_bytes > PREFETCH_BYTES_MAX else self._service_time.prefetch()

    def _capacity(self) -> tuple[int, int]:
        now, prefetch = monotonic(), self.prefetch
        ready = self.children.ready()
        # A slot busy with a long task takes nothing behind it.
        open_slots = sum(child.busy_seconds(now) < BLOCKED_SECONDS for child in ready)
        return len(ready) + prefetch * open_slots, len(ready)

    def add(self, claims: list[Claim]) -> None:
        """Take what a broker gave; what is too much goes back at once."""
        for claim in claims:
            claim.link.claims[claim.number] = claim
            self._held += 1
            self._held_bytes += claim.size_bytes
        self._backlog.extend(claims)
        if self._stopping:
            self._release_backlog(0, pb.RELEASE_REASON_SHUTDOWN)
            return
        self._feed()
        self._release_surplus()

    def _release_surplus(self) -> None:
        capacity, _ = self._capacity()
        if not self.children.cannot_load():
            # A slot whose child is being replaced has it back in a moment.
            capacity = max(capacity, self.slots)
        surplus = self._held - capacity
        if surplus > 0:
            self._release_backlog(max(0, len(self._backlog) - surplus), pb.RELEASE_REASON_SURPLUS)

    def _release_backlog(self, keep: int, reason: pb.ReleaseReason) -> None:
        while len(self._backlog) > keep:
            self._end(self._backlog.pop(), Outcome(0, release_reason=reason))

    def _end(self, claim: Claim, outcome: Outcome | None) -> None:
        """The claim leaves the pool; None: it was revoked, nobody waits for an outcome."""
        claim.ended = True
        self._held -= 1
        self._held_bytes -= claim.size_bytes
        if outcome is None:
            claim.link.claims.pop(claim.number, None)
        else:
            self._metrics.settled(outcome)
            self._settle(claim, outcome)

    # Handing out.

    def _feed(self) -> None:
        if not self._backlog:
            return
        prefetch, now = self.prefetch, monotonic()
        free = [
            child
            for child in self.children.ready()
            if not child.withdrawing
            and (not child.assigned or child.busy_seconds(now) < BLOCKED_SECONDS)
            # In few large batches, not one by one.
            and len(child.assigned) <= prefetch // 2
        ]
        free.sort(key=lambda child: len(child.assigned))
        for index, child in enumerate(free):
            share = ceil(len(self._backlog) / (len(free) - index))
            count = min(share, 1 + prefetch - len(child.assigned), len(self._backlog))
            if count > 0:
                self._assign(child, [self._backlog.popleft() for _ in range(count)])

    def _assign(self, child: Child, claims: list[Claim]) -> None:
        for claim in claims:
            child.assigned[claim.number] = claim
        child.send(Assign([claim.assignment for claim in claims]))

    # What children say.

    def _on_message(self, child: Child, message: FromChild) -> None:
        match message:
            case Progress():
                self._progress(child, message)
            case Withdrawn():
                child.withdrawing = False
                self._take_back(child.assigned.pop(number) for number in message.numbers)

    def _progress(self, child: Child, message: Progress) -> None:
        if message.finished is not None:
            self._finished(child, message.finished)
        child.running = None
        if message.started is not None:
            claim = child.running = child.assigned[message.started]
            claim.started_at = message.started_at
            if claim.revoked:
                child.kill_running(claim, KillReason.REVOKED)
        self._feed()
        self._wanted()
        self._look_idle()

    def _finished(self, child: Child, finished: Finished) -> None:
        claim = child.assigned.pop(finished.number)
        self._service_time.add(finished.run_seconds)
        self._metrics.ended(finished)
        self._end(claim, None if claim.revoked else finished.outcome)

    def _take_back(self, claims: Iterable[Claim]) -> None:
        for claim in reversed(list(claims)):
            if claim.revoked:
                self._end(claim, None)
            else:
                self._backlog.appendleft(claim)
        if self._stopping:
            self._release_backlog(0, pb.RELEASE_REASON_SHUTDOWN)
        self._feed()
        self._look_idle()

    def _on_ready(self) -> None:
        self._feed()
        self._wanted()

    # Time: deadlines, and work stuck behind a long task.

    async def watch(self) -> None:
        """Enforce deadlines and keep work moving, for ever."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            now = monotonic()
            for child in self.children:
                self._check(child, now)
            self._release_surplus()
            self._wanted()
            self._count_slots()

    def _check(self, child: Child, now: float) -> None:
        claim, busy_seconds = child.running, child.busy_seconds(now)
        if claim is None:
            return
        if claim.deadline_seconds and busy_seconds >= claim.deadline_seconds:
            child.kill_running(claim, KillReason.DEADLINE)
        elif busy_seconds >= BLOCKED_SECONDS and len(child.assigned) > 1 and not child.withdrawing:
            child.withdrawing = True
            child.send(Withdraw(None))

    def _count_slots(self) -> None:
        states = {"starting": 0, "idle": 0, "busy": 0}
        for child in self.children:
            if child.state is State.READY:
                states["busy" if child.assigned else "idle"] += 1
            elif child.state is State.STARTING:
                states["starting"] += 1
        for state, count in states.items():
            self._metrics.slots.labels(state).set(count)
        running = sum(child.running is not None for child in self.children)
        self._metrics.waiting.set(self._held - running)

    def revoke(self, claim: Claim, reason: str) -> None:
        """The broker took a claim back: drop it, or kill it if it was cancelled or is someone else's now."""
        if claim.ended or claim.revoked:
            return
        child = next((child for child in self.children if claim.number in child.assigned), None)
        running = child is not None and child.running is claim
        if running and reason == "unknown":
            # It ends as it may, and is reported: nobody else runs it.
            return
        claim.revoked = reason
        self._metrics.revoked(reason)
        log.warning("claim taken back by the broker", reason=reason, task=claim.title, running=running)
        if child is None:
            self._backlog.remove(claim)
            self._end(claim, None)
        elif running:
            child.kill_running(claim, KillReason.REVOKED)
        else:
            child.send(Withdraw([claim.number]))

    # A child's death.

    def _on_death(self, child: Child, death: Death) -> None:
        running, child.running = child.running, None
        if running is not None:
            del child.assigned[running.number]
            self._end(running, None if running.revoked else _killed(child, death, running))
        self._take_back(child.assigned.values())
        child.assigned = {}

    # Stopping.

    def stop_starting(self) -> None:
        """Start nothing more: what waits goes back to its broker."""
        self._stopping = True
        self.children.replacing = False
        self._release_backlog(0, pb.RELEASE_REASON_SHUTDOWN)
        for child in self.children:
            child.resume_reading()
            if child.assigned:
                child.withdrawing = True
                child.send(Withdraw(None))
        self._look_idle()

    def _look_idle(self) -> None:
        if self._stopping and not self._held:
            self._idle.set()

    @property
    def running(self) -> int:
        return sum(child.running is not None for child in self.children)

    async def wait_idle(self) -> None:
        """Return when no claim is left in the pool; only after `stop_starting`."""
        await self._idle.wait()


def _killed(child: Child, death: Death, claim: Claim) -> Outcome:
    """What the death of a child means for the task it was running."""
    started_at = claim.started_at or monotonic()
    evidence = f"The child process {child.pid} {death}; the task had been running for"
    evidence += f" {monotonic() - started_at:.3f} s."
    status, kind = pb.TASK_OUTCOME_STATUS_WORKER_DIED, "penstock.WorkerDied"
    if child.kill_reason is KillReason.DEADLINE:
        status, kind = pb.TASK_OUTCOME_STATUS_DEADLINE_EXCEEDED, "penstock.DeadlineExceeded"
        evidence = f"Killed at its deadline of {claim.deadline_seconds:g} s. {evidence}"
    elif child.kill_reason is KillReason.GRACE_OVER:
        evidence = f"The worker was stopped and did not wait for it any longer. {evidence}"
    return Outcome(status, error=Error(kind, evidence, death.stack))
