"""Workers: fetch, execute, report until answered, heartbeat, give back; and those without tokens."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from penstock_protocol.v1 import activation_pb2, consumer_pb2
from tests.sim.hub import Process
from tests.sim.network import CallFailed
from tests.sim.tasks import APPLICATIONS, Claim, Task

if TYPE_CHECKING:
    from tests.sim.pool import Pool

SERVICE = "/penstock.v1.ConsumerService/"
V1 = "/sentry_protos.taskbroker.v1.ConsumerService/"
CALL_SECONDS = 12.0

Reported = tuple[str, consumer_pb2.TaskOutcome | consumer_pb2.ReleasedTask]


class Worker:
    """One worker process with ``slots`` tasks at a time, over all brokers."""

    def __init__(self, pool: Pool, name: str) -> None:
        self.pool = pool
        self.hub = pool.hub
        self.rng = pool.hub.random
        self.name = name
        self.process = Process(pool.hub, name)
        self.slots = self.rng.randint(1, 8)
        self.lease_ms = 3000
        # Claims held, and whether each was started.
        self.held: dict[bytes, tuple[Claim, bool]] = {}
        self.reports: dict[str, asyncio.Queue[Reported]] = {}
        self.requests = 0
        self.draining = False

    def start(self) -> None:
        self.process.enter(self._start)

    def _start(self) -> None:
        run = self.process.loop.run_main
        for broker in self.pool.brokers:
            self.reports[broker] = asyncio.Queue()
            run(self._fetch(broker))
            run(self._report(broker))
            run(self._heartbeat(broker))

    async def _call(self, broker: str, method: str, request: bytes, seconds: float = CALL_SECONDS) -> bytes:
        return await self.pool.network.call(self.process, broker, SERVICE + method, request, seconds)

    # -- fetching

    async def _fetch(self, broker: str) -> None:
        while True:
            free = self.slots - len(self.held)
            if free <= 0:
                await asyncio.sleep(self.hub.between(0.01, 0.1))
                continue
            try:
                await self._fetch_once(broker, free)
            except CallFailed:
                await asyncio.sleep(self.hub.between(0.1, 1.0))

    async def _fetch_once(self, broker: str, free: int) -> None:
        self.requests += 1
        wait_ms = self.rng.choice((0, 200, 2000, 5000))
        request = consumer_pb2.GetTasksRequest(
            request_id=f"{self.name}/{broker}/{self.requests}",
            max_tasks=self.rng.randint(1, free),
            wait_ms=wait_ms,
        )
        if self.rng.random() < 0.4:
            request.application = self.rng.choice(sorted(APPLICATIONS))
            if self.rng.random() < 0.5:
                request.namespaces.append(self.rng.choice(APPLICATIONS[request.application]))
        encoded = request.SerializeToString()
        for repeated in range(3):
            try:
                answer = await self._call(broker, "GetTasks", encoded, wait_ms / 1000 + 1.0)
                break
            except CallFailed:
                if repeated == 2:
                    raise
                await asyncio.sleep(self.hub.between(0.05, 0.5))
        response = consumer_pb2.GetTasksResponse.FromString(answer)
        self.lease_ms = response.lease_ms
        for task in response.tasks:
            claim = self.pool.oracle.claims[task.claim_token]
            if task.claim_token not in self.held:
                self.held[task.claim_token] = (claim, False)
                expires = task.expires_in_ms if task.HasField("expires_in_ms") else None
                self.process.loop.run_main(self._execute(claim, expires))
        if not response.tasks:
            await asyncio.sleep(self.hub.between(0.001, 0.3))

    # -- executing

    async def _execute(self, claim: Claim, expires_in_ms: int | None) -> None:
        task = claim.task
        if self.rng.random() < 0.3:
            # It waits for a slot.
            waited = self.hub.between(0, 2.0)
            await asyncio.sleep(waited)
            if expires_in_ms is not None:
                expires_in_ms -= int(waited * 1000)
        if claim.token not in self.held:
            return
        if expires_in_ms is not None and expires_in_ms <= 0:
            self._outcome(claim, consumer_pb2.TASK_OUTCOME_STATUS_EXPIRED)
            return
        if not self.pool.calm and self.rng.random() < 0.06:
            reason = self.rng.choice((1, 2, 3, 4))
            released = consumer_pb2.ReleasedTask(claim_token=claim.token, reason=reason, detail="x")  # type: ignore[arg-type]
            self.reports[claim.broker].put_nowait(("release", released))
            del self.held[claim.token]
            return
        self.held[claim.token] = (claim, True)
        self.pool.oracle.started(claim, self.name)
        deadline = claim.task.deadline_ms / 1000
        await asyncio.sleep(min(task.seconds, deadline))
        if task.seconds > deadline:
            self._outcome(claim, consumer_pb2.TASK_OUTCOME_STATUS_DEADLINE_EXCEEDED)
        elif not self.pool.faultless and self.rng.random() < 0.02:
            self._outcome(claim, consumer_pb2.TASK_OUTCOME_STATUS_WORKER_DIED)
        else:
            self._outcome(claim, task.outcome(claim.attempt))

    def _outcome(self, claim: Claim, status: int) -> None:
        outcome = consumer_pb2.TaskOutcome(claim_token=claim.token, status=status)  # type: ignore[arg-type]
        if status == consumer_pb2.TASK_OUTCOME_STATUS_RETRY and self.rng.random() < 0.5:
            outcome.retry_delay_ms = self.rng.randint(0, 5000)
        self.held.pop(claim.token, None)
        self.reports[claim.broker].put_nowait(("outcome", outcome))

    # -- reporting

    async def _report(self, broker: str) -> None:
        queue = self.reports[broker]
        while True:
            batch = [await queue.get()]
            await asyncio.sleep(self.hub.between(0, 0.02))
            batch += [queue.get_nowait() for _ in range(min(queue.qsize(), self.rng.randint(0, 15)))]
            outcomes = [what for kind, what in batch if kind == "outcome"]
            released = [what for kind, what in batch if kind == "release"]
            if outcomes:
                request = consumer_pb2.SetTaskStatusesRequest(outcomes=outcomes, worker_id=self.name)  # type: ignore[arg-type]
                await self._until_answered(broker, "SetTaskStatuses", request.SerializeToString())
            if released:
                release = consumer_pb2.ReleaseTasksRequest(tasks=released, worker_id=self.name)  # type: ignore[arg-type]
                await self._until_answered(broker, "ReleaseTasks", release.SerializeToString())

    async def _until_answered(self, broker: str, method: str, request: bytes) -> None:
        while True:
            try:
                await self._call(broker, method, request)
            except CallFailed:
                await asyncio.sleep(self.hub.between(0.05, 1.0))
                continue
            # A repeat that crosses its answer.
            if self.pool.faultless or self.rng.random() > 0.05:
                return

    # -- heartbeats

    async def _heartbeat(self, broker: str) -> None:
        while True:
            await asyncio.sleep(self.lease_ms / 3000 * self.hub.between(0.8, 1.0))
            held = [(c.token, s) for c, s in self.held.values() if c.broker == broker]
            if not held:
                continue
            request = consumer_pb2.ExtendClaimsRequest(
                claims=[consumer_pb2.HeldClaim(claim_token=t, started=s) for t, s in held],
                worker_id=self.name,
            )
            try:
                answer = await self._call(broker, "ExtendClaims", request.SerializeToString(), 2.0)
            except CallFailed:
                continue
            answers = consumer_pb2.ExtendClaimsResponse.FromString(answer).answers
            for (token, started), said in zip(held, answers, strict=True):
                # One that has started goes on, as a zombie, and reports.
                if said != consumer_pb2.CLAIM_ANSWER_EXTENDED and not started:
                    self.held.pop(token, None)


class V1Worker:
    """A client of taskbroker v1: one task at a time, no token, no heartbeat."""

    def __init__(self, pool: Pool, name: str) -> None:
        self.pool = pool
        self.hub = pool.hub
        self.name = name
        self.process = Process(pool.hub, name)

    def start(self) -> None:
        self.process.enter(lambda: self.process.loop.run_main(self._run()))

    async def _run(self) -> None:
        rng, network, oracle = self.hub.random, self.pool.network, self.pool.oracle
        while True:
            broker = rng.choice(sorted(self.pool.brokers))
            asked = consumer_pb2.GetTaskRequest().SerializeToString()
            try:
                answer = await network.call(self.process, broker, V1 + "GetTask", asked, 3.0)
                task = oracle.task_of(consumer_pb2.GetTaskResponse.FromString(answer).task)
                while task is not None:
                    task = await self._execute(task, broker)
            except CallFailed:
                await asyncio.sleep(self.hub.between(0.1, 1.0))

    async def _execute(self, task: Task, broker: str) -> Task | None:
        rng, network, oracle = self.hub.random, self.pool.network, self.pool.oracle
        oracle.started_v1(task, self.name)
        await asyncio.sleep(min(task.seconds, 2.0))
        outcome = task.outcome(rng.randint(1, 4))
        reported: dict[int, activation_pb2.TaskActivationStatus] = {
            consumer_pb2.TASK_OUTCOME_STATUS_RETRY: activation_pb2.TASK_ACTIVATION_STATUS_RETRY,
            consumer_pb2.TASK_OUTCOME_STATUS_FAILURE: activation_pb2.TASK_ACTIVATION_STATUS_FAILURE,
        }
        status = reported.get(outcome, activation_pb2.TASK_ACTIVATION_STATUS_COMPLETE)
        request = consumer_pb2.SetTaskStatusRequest(id=task.id, status=status)
        if rng.random() < 0.5:
            request.fetch_next_task.SetInParent()
        for _ in range(4):
            try:
                answer = await network.call(
                    self.process, broker, V1 + "SetTaskStatus", request.SerializeToString(), CALL_SECONDS
                )
            except CallFailed:
                await asyncio.sleep(self.hub.between(0.1, 1.0))
                continue
            if not self.pool.faultless and rng.random() < 0.05:
                continue  # a repeat that crosses its answer
            response = consumer_pb2.SetTaskStatusResponse.FromString(answer)
            return oracle.task_of(response.task) if response.HasField("task") else None
        return None
