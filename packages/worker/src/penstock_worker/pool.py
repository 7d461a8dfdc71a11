"""The child processes, and which of them executes what."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from math import ceil
from time import monotonic

import structlog

from penstock_protocol.v1 import consumer_pb2 as pb
from penstock_worker.claim import Claim
from penstock_worker.credit import PREFETCH_BYTES_MAX, PREFETCH_SECONDS, ServiceTime, room
from penstock_worker.frames import (
    Assign,
    Error,
    Finished,
    FromChild,
    LoadFailed,
    Outcome,
    Progress,
    Ready,
    Stop,
    Withdraw,
    Withdrawn,
)
from penstock_worker.metrics import Metrics
from penstock_worker.process import Child, Death, KillReason, State

TICK_SECONDS = 0.1
# Children that cannot load the application any more are started again this slowly.
RELOAD_SECONDS_FIRST, RELOAD_SECONDS_MAX = 1.0, 30.0
# For what the interpreter does at its exit, like sending what tasks have produced.
EXIT_SECONDS_MAX = 5.0

log = structlog.get_logger("penstock_worker")


class Pool:
    """`slots` children, each executing one task at a time, and the claims waiting for them.

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
        self.loaded: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self._app_path, self._settle, self._wanted, self._metrics = app_path, settle, wanted, metrics
        self._children: list[Child] = []
        self._backlog: deque[Claim] = deque()
        self._held = 0
        self._held_bytes = 0
        self._service_time = ServiceTime()
        self._stopping = False
        self._idle = asyncio.Event()
        self._reload_failures = 0
        self._starts: set[asyncio.Task[None]] = set()

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
        ready = [child for child in self._children if child.state is State.READY]
        # A slot busy with a long task takes nothing behind it.
        open_slots = sum(child.busy_seconds(now) < PREFETCH_SECONDS for child in ready)
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
        surplus = self._held - max(capacity, self.slots)
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
            for child in self._children
            if child.state is State.READY
            and child.kill_reason is None
            and not child.withdrawing
            and (not child.assigned or child.busy_seconds(now) < PREFETCH_SECONDS)
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
            case Ready():
                self._ready(child, message)
            case LoadFailed():
                self._load_failed(child, message)

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
        claim.title = f"{finished.taskname} {finished.id}"
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

    def _ready(self, child: Child, message: Ready) -> None:
        if self._stopping:
            return
        child.state = State.READY
        self._reload_failures = 0
        if not self.loaded.done():
            self.loaded.set_result(message)
        self._feed()
        self._wanted()

    def _load_failed(self, child: Child, message: LoadFailed) -> None:
        if self.loaded.done():
            log.error("a new child cannot load the application", cause=message.message)
        else:
            self.loaded.set_exception(ApplicationError(message.message))

    # Time: deadlines, and work stuck behind a long task.

    async def watch(self) -> None:
        """Enforce deadlines and keep work moving, for ever."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            now = monotonic()
            for child in self._children:
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
        elif busy_seconds >= PREFETCH_SECONDS and len(child.assigned) > 1 and not child.withdrawing:
            child.withdrawing = True
            child.send(Withdraw(None))

    def _count_slots(self) -> None:
        states = {"starting": 0, "idle": 0, "busy": 0}
        for child in self._children:
            if child.state is State.READY:
                states["busy" if child.assigned else "idle"] += 1
            elif child.state is State.STARTING:
                states["starting"] += 1
        for state, count in states.items():
            self._metrics.slots.labels(state).set(count)
        running = sum(child.running is not None for child in self._children)
        self._metrics.waiting.set(self._held - running)

    def revoke(self, claim: Claim, reason: str) -> None:
        """The broker took a claim back: drop it, or kill it if it was cancelled or is someone else's now."""
        if claim.ended or claim.revoked:
            return
        self._metrics.revoked(reason)
        log.warning("claim taken back by the broker", reason=reason, task=claim.title)
        child = next((child for child in self._children if claim.number in child.assigned), None)
        if child is None:
            claim.revoked = reason
            self._backlog.remove(claim)
            self._end(claim, None)
        elif child.running is not claim:
            claim.revoked = reason
            child.send(Withdraw([claim.number]))
        elif reason != "unknown":
            # An unknown one ends as it may: nobody else runs it.
            claim.revoked = reason
            child.kill_running(claim, KillReason.REVOKED)

    # Life and death of children.

    def start(self) -> None:
        """Start all children; `loaded` tells when the first has the application."""
        for _ in range(self.slots):
            self._spawn()

    def _spawn(self) -> None:
        if not self._stopping:
            child = Child(self._on_message, self._on_death)
            self._children.append(child)
            start = asyncio.get_running_loop().create_task(self._start(child))
            self._starts.add(start)
            start.add_done_callback(self._starts.discard)

    async def _start(self, child: Child) -> None:
        try:
            await child.start(self._app_path)
        except OSError as error:
            log.error("a child process cannot be started", cause=str(error))
            self._children.remove(child)
            self._spawn_later()

    def _spawn_later(self) -> None:
        delay = min(RELOAD_SECONDS_MAX, RELOAD_SECONDS_FIRST * 2 ** min(self._reload_failures, 10))
        self._reload_failures += 1
        asyncio.get_running_loop().call_later(delay, self._spawn)

    def _on_death(self, child: Child, death: Death) -> None:
        self._children.remove(child)
        was, child.state = child.state, State.DEAD
        running, child.running = child.running, None
        if was is State.STOPPING:
            return
        if running is not None:
            del child.assigned[running.number]
            self._end(running, None if running.revoked else self._died(child, death, running))
        self._take_back(child.assigned.values())
        child.assigned = {}
        if was is State.STARTING:
            if not self.loaded.done():
                self.loaded.set_exception(
                    ApplicationError(f"A child process {death} while it was loading the application.")
                )
            self._spawn_later()
        else:
            self._metrics.child_restarted(child.kill_reason.value if child.kill_reason else "died")
            self._spawn()
        self._look_idle()

    def _died(self, child: Child, death: Death, claim: Claim) -> Outcome:
        started_at = claim.started_at or monotonic()
        evidence = f"The child process {child.pid} {death}; the task had been running for"
        evidence += f" {monotonic() - started_at:.3f} s."
        status, kind = pb.TASK_OUTCOME_STATUS_WORKER_DIED, "penstock.WorkerDied"
        if child.kill_reason is KillReason.DEADLINE:
            status, kind = pb.TASK_OUTCOME_STATUS_DEADLINE_EXCEEDED, "penstock.DeadlineExceeded"
            evidence = f"Killed at its deadline of {claim.deadline_seconds:g} s. {evidence}"
        elif child.kill_reason is KillReason.GRACE_OVER:
            evidence = f"The worker was stopped and did not wait for it any longer. {evidence}"
        return Outcome(status, error=Error(kind, evidence, ""))

    # Stopping.

    def stop_starting(self) -> None:
        """Start nothing more: what waits goes back to its broker."""
        self._stopping = True
        self._release_backlog(0, pb.RELEASE_REASON_SHUTDOWN)
        for child in self._children:
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
        return sum(child.running is not None for child in self._children)

    async def wait_idle(self) -> None:
        """Return when no claim is left in the pool; only after `stop_starting`."""
        await self._idle.wait()

    def kill_all(self) -> None:
        """The grace time is over."""
        for child in list(self._children):
            child.kill(KillReason.GRACE_OVER)

    async def close(self) -> None:
        """Let the idle children exit; kill those that do not."""
        self._stopping = True
        await asyncio.gather(*self._starts)
        children = list(self._children)
        for child in children:
            if child.state is not State.READY:
                child.kill(KillReason.GRACE_OVER)
            child.state = State.STOPPING
            child.send(Stop())
        try:
            async with asyncio.timeout(EXIT_SECONDS_MAX):
                await asyncio.gather(*(child.wait_dead() for child in children))
        except TimeoutError:
            log.warning("child processes did not exit and are killed", seconds=EXIT_SECONDS_MAX)
            for child in children:
                child.kill(KillReason.GRACE_OVER)
            await asyncio.gather(*(child.wait_dead() for child in children))


class ApplicationError(Exception):
    """The user's application cannot be loaded; the message is for people."""
