"""What must hold at every step: the promises of the guarantees, checked against what the world has seen.

The world sees what leaves a broker (answers, offsets, dead letters) and what its disk holds; nothing here
asks the broker's memory, except whether it equals the rows.
"""

from __future__ import annotations

import contextlib
import json
import traceback
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from google.protobuf.message import DecodeError

from penstock_broker.domain.token import decode_token
from penstock_broker.ingest.admission import position_id
from penstock_broker.store.batch import Batch
from penstock_protocol.v1 import activation_pb2, consumer_pb2, producer_pb2
from tests.sim.broker import BrokerMachine
from tests.sim.lag import Lag
from tests.sim.tasks import Claim, Task

if TYPE_CHECKING:
    from penstock_broker.server import Broker
    from tests.sim.hub import Process
    from tests.sim.kafka import Record
    from tests.sim.pool import Pool

LEASE_SLACK_MS = 500
CHECK_STORE_EVERY = 20
# Between the moment that a record speaks of and the beginning of its transaction.
LEDGER_SLACK_SECONDS = 0.005

_RETRIES = (
    consumer_pb2.TASK_OUTCOME_STATUS_RETRY,
    consumer_pb2.TASK_OUTCOME_STATUS_DEADLINE_EXCEEDED,
)
_NAMES = {
    v.number: v.name.removeprefix("TASK_OUTCOME_STATUS_")
    for v in consumer_pb2.TaskOutcomeStatus.DESCRIPTOR.values
}

_ANSWERS = {
    v.number: v.name.removeprefix("OUTCOME_ANSWER_") for v in consumer_pb2.OutcomeAnswer.DESCRIPTOR.values
}


class Violated(Exception):
    """A promise was not kept."""

    def __init__(self, promise: str, text: str) -> None:
        super().__init__(f"{promise}: {text}")
        self.promise = promise


def _rests(broker: Broker) -> bool:
    """Whether nothing is in the hands of those who send it on."""
    return all(forwarder._idle.is_set() for forwarder in broker.ingest.forwarders)


def _seq_of(token: bytes | None) -> int | None:
    """The row that a claim is of; None: a client without tokens has it."""
    claim = decode_token(token or b"")
    return claim and claim.seq


class Oracle:
    """Watches one pool."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.hub = pool.hub
        self.tasks: dict[str, Task] = {}
        self.by_body: dict[bytes, Task] = {}
        # Where a task is in the log.
        self.positions: dict[tuple[str, int, int], Task] = {}
        self.claims: dict[bytes, Claim] = {}
        self.violation: Violated | None = None
        self.counts: Counter[str] = Counter()
        # broker -> seq -> task, of what its ticks have written.
        self.rows: dict[str, dict[int, Task]] = {}
        self.disks_lost = 0
        self.lag = Lag(pool)
        # broker -> store and sequence of its last record in the ledger.
        self.heads: dict[str, tuple[str, int]] = {}
        # Adoptions that are not done: broker -> who has begun.
        self.adopting: dict[str, str] = {}

    def fail(self, promise: str, text: str) -> None:
        """The first is told; what follows from it would only confuse."""
        if self.violation is None:
            self.violation = Violated(promise, text)
            self.hub.tell("oracle", f"VIOLATED {promise}: {text}")

    def check(self) -> None:
        """After each event."""
        if self.violation is not None:
            raise self.violation
        for machine in self.pool.brokers.values():
            if machine.dirty and machine.alive:
                self._check_store(machine)

    def add(self, task: Task) -> None:
        self.tasks[task.id] = task
        self.by_body[task.body] = task

    # -- watching a broker

    def watch(self, machine: BrokerMachine, broker: Broker) -> None:
        server: Any = broker.server
        rows = self._found(machine, broker)
        server.on_request = lambda path, client, request: self._on_request(machine, path, request)
        server.on_answer = lambda path, client, request, response: self._on_answer(
            machine, path, request, response
        )

        def written(func: Callable[..., Any], args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Batch):
                self._on_written(machine, rows, args[0])
                machine.dirty += 1

        machine.disk.on_done = written

    def _found(self, machine: BrokerMachine, broker: Broker) -> dict[int, Task]:
        """The rows of a disk that a broker starts on. Its last tick may have been durable untold."""
        before, rows = self.rows.get(machine.name, {}), {}
        sql = "SELECT seq, coalesce(body, (SELECT body FROM payload p WHERE p.seq = a.seq)) FROM activation a"
        with machine.disk.looked_at():
            found = list(broker.database.connection.execute(sql))
        for seq, body in found:
            if (task := self.task_in(body)) is None:
                self.fail("stored as it came", f"{machine.name} finds a row with bytes that nobody sent")
            else:
                rows[seq] = task
        for seq, task in before.items():
            # Any other row may have become another broker's; were it lost, the end would show it.
            if seq not in rows and self._may_leave(machine, task):
                task.left += 1
        self.rows[machine.name] = rows
        return rows

    def _on_written(self, machine: BrokerMachine, rows: dict[int, Task], batch: Batch) -> None:
        """A tick is durable."""
        for row in batch.rows:
            task = self.task_in(row.body)
            if task is None:
                self.fail("stored as it came", f"{machine.name} stored {row.id} with bytes that nobody sent")
                return
            rows[row.seq] = task
        gone = list(batch.gone)
        gone += [r.row.seq for r in batch.reports if r.row and r.change and not r.change.status]
        for seq in gone:
            self._left(machine, rows.pop(seq))

    def _left(self, machine: BrokerMachine, task: Task) -> None:
        """A row is gone: there must be a reason that the world knows."""
        task.left += 1
        if not self._may_leave(machine, task):
            self.fail(
                "at least once",
                f"{task.id} left {machine.name} without an outcome, a dead letter or an expiry",
            )

    def _may_leave(self, machine: BrokerMachine, task: Task) -> bool:
        gone = task.ended or task.letters or task.passed_on
        return bool(gone or self._has_expired(task, machine.clock.latest_ms()))

    def _has_expired(self, task: Task, wall: int) -> bool:
        if task.expires_ms is None or not task.discard:
            return False
        doubtful = any(machine.clock_doubtful for machine in self.pool.brokers.values())
        return doubtful or wall >= task.received_ms + task.expires_ms

    def _has_expired_by_now(self, task: Task) -> bool:
        """By the clock of anybody who may have taken it: then it had no row."""
        return any(self._has_expired(task, m.clock.latest_ms()) for m in self.pool.brokers.values())

    def _check_store(self, machine: BrokerMachine) -> None:
        broker = machine.broker
        if broker is None or machine.dirty < CHECK_STORE_EVERY:
            return
        writer = broker.store.writer
        if writer.work_waits() or writer._writing is not None or writer.stopping:
            return
        machine.dirty = 0
        self._compare(machine, broker)

    def _compare(self, machine: BrokerMachine, broker: Broker) -> None:
        try:
            with machine.clock.at_latest(), machine.disk.looked_at():
                if broker.store.writer.work_waits() or not _rests(broker):
                    return
                self.counts["store checked"] += 1
                self.pool.check_store(broker.store)
        except AssertionError as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            self.fail(
                "memory equals the rows", f"{machine.name}: {str(error) or frame.line} (line {frame.lineno})"
            )

    # -- what reaches a broker

    def _on_request(self, machine: BrokerMachine, path: str, request: bytes) -> None:
        method = path.rpartition("/")[2]
        if method == "SetTaskStatuses":
            for outcome in consumer_pb2.SetTaskStatusesRequest.FromString(request).outcomes:
                self._on_report(machine, self.claims[outcome.claim_token], outcome)
        elif method == "ReleaseTasks":
            for released in consumer_pb2.ReleaseTasksRequest.FromString(request).tasks:
                claim = self.claims[released.claim_token]
                claim.task.unreleased -= not claim.ended
                claim.ended = True
        elif method == "SendTasks":
            for activation in producer_pb2.SendTasksRequest.FromString(request).activations:
                self.tasks[activation.id].sends += 1
        elif method == "SetTaskStatus":
            report = consumer_pb2.SetTaskStatusRequest.FromString(request)
            self.tasks[report.id].ended = True
            for other in self.tasks[report.id].claims.values():
                other.ended = True

    def _on_report(self, machine: BrokerMachine, claim: Claim, outcome: consumer_pb2.TaskOutcome) -> None:
        task = claim.task
        claim.ended = True
        claim.reported.add(outcome.status)
        if outcome.status in _RETRIES:
            if claim.attempt >= task.max_attempts or task.at_most_once:
                task.ended = True
            delay = outcome.retry_delay_ms if outcome.HasField("retry_delay_ms") else task.retry_delay_ms
            due = machine.clock.wall_ms() + delay
            before = task.retry_at.get(claim.token)
            # A token of a lost disk is UNKNOWN, and one that an old copy has not made may be STALE: nothing
            # is retried because of it.
            if not (claim.forgotten or machine.astray) and (before is None or due < before[2]):
                task.retry_at[claim.token] = (machine.name, claim.attempt + 1, due)
        elif outcome.status != consumer_pb2.TASK_OUTCOME_STATUS_WORKER_DIED:
            task.ended = True

    # -- what leaves a broker

    def _on_answer(self, machine: BrokerMachine, path: str, request: bytes, response: bytes) -> None:
        method = path.rpartition("/")[2]
        if method == "GetTasks":
            asked = consumer_pb2.GetTasksRequest.FromString(request)
            for handed in consumer_pb2.GetTasksResponse.FromString(response).tasks:
                self._on_handed_out(machine, asked.request_id, handed)
        elif method == "SetTaskStatuses":
            outcomes = consumer_pb2.SetTaskStatusesRequest.FromString(request).outcomes
            answers = consumer_pb2.SetTaskStatusesResponse.FromString(response).answers
            for outcome, answer in zip(outcomes, answers, strict=True):
                self._on_answered(machine, self.claims[outcome.claim_token], outcome.status, answer)
        elif method == "ReleaseTasks":
            for answer in consumer_pb2.ReleaseTasksResponse.FromString(response).answers:
                self.counts[f"release {answer}"] += 1
        elif method == "ExtendClaims":
            self._on_extended(machine, request, response)
        elif method == "SendTasks":
            self._on_sent(machine, request, response)
        elif method == "GetTask":
            self._on_handed_out_v1(machine, consumer_pb2.GetTaskResponse.FromString(response).task)
        elif method == "SetTaskStatus":
            answer_v1 = consumer_pb2.SetTaskStatusResponse.FromString(response)
            if answer_v1.HasField("task"):
                self._on_handed_out_v1(machine, answer_v1.task)

    def task_of(self, activation: activation_pb2.TaskActivation) -> Task | None:
        return self.tasks.get(activation.id)

    def _on_handed_out(
        self, machine: BrokerMachine, request_id: str, handed: consumer_pb2.ClaimedTask
    ) -> None:
        task = self._handed(machine, handed.activation, handed.attempt)
        if task is None:
            return
        claim = self.claims.get(handed.claim_token)
        if claim is not None:
            if claim.request != request_id:
                self.fail("one holder", f"{task.id}: the claim of {claim.request} went to {request_id}")
            return
        self._check_at_most_once(machine, task)
        self._check_exclusive(machine, task, handed.claim_token)
        self._check_due(machine, task, handed)
        if not self._is_astray(machine, task):
            self._check_final(machine, task, handed.attempt)
        task.unreleased += 1
        self.counts["handed out"] += 1
        self.hub.tell("oracle", f"{machine.name} hands out {task.id} attempt {handed.attempt}")
        claim = Claim(
            token=handed.claim_token,
            task=task,
            broker=machine.name,
            boot=machine.boots,
            attempt=handed.attempt,
            request=request_id,
            touched_ms=machine.clock.mono_ms(),
            rebalances=self.pool.kafka.rebalances(),
            generations=self.pool.kafka.generations(),
            forgotten=machine.astray,
        )
        self.claims[claim.token] = task.claims[claim.token] = claim

    def _handed(
        self, machine: BrokerMachine, activation: activation_pb2.TaskActivation, attempt: int
    ) -> Task | None:
        task = self.tasks.get(activation.id)
        if task is None or task.poison or activation.namespace != task.namespace:
            self.fail("stored as it came", f"{machine.name} handed out {activation.id!r}, which nobody sent")
            return None
        if attempt > task.max_attempts:
            self.fail("starts are bounded", f"{task.id}: attempt {attempt} of {task.max_attempts}")
        return task

    def _is_astray(self, machine: BrokerMachine, task: Task) -> bool:
        """One that does not know yet that it was adopted, or is an old copy: what it hands out may run, or
        have run, elsewhere. It starts nothing again that must not, but what was sent to it over gRPC."""
        if machine.astray:
            self.counts["handed out by one astray"] += 1
            task.elsewhere |= bool(task.sent_to)
        return machine.astray

    def _check_at_most_once(self, machine: BrokerMachine, task: Task) -> None:
        if task.at_most_once and task.unreleased and not (task.elsewhere or self._is_copy(task)):
            self.fail("at most once", f"{task.id} was handed out by {machine.name} once more")

    def _is_copy(self, task: Task) -> bool:
        """There is a second message with the same id, of a producer or of a broker that has sent it on: a
        disk that is lost may have known of it, and its ledger not yet."""
        copies = max(len(task.positions) + task.passed_on, task.sends)
        return copies > 1 and self.disks_lost > 0

    def _check_final(self, machine: BrokerMachine, task: Task, attempt: int) -> None:
        if task.final:
            self._runs_again(machine, task, f"it ended as {task.final}")
        elif attempt in task.acknowledged or any(a >= attempt for a in task.acknowledged):
            self._runs_again(machine, task, f"attempt {attempt} was acknowledged")

    def _runs_again(self, machine: BrokerMachine, task: Task, why: str) -> None:
        if task.doubled or self._is_copy(task):
            self.counts["copies run twice"] += 1
            return
        self.fail(
            "one accepted outcome per attempt",
            f"{task.id} was handed out by {machine.name} although {why};"
            f" it is at {task.positions or task.sent_to}",
        )

    def _check_due(self, machine: BrokerMachine, task: Task, handed: consumer_pb2.ClaimedTask) -> None:
        wall = machine.clock.wall_ms()
        # Whoever sends a task on, or leaves it to another one, says when it is due by its own clock.
        handled = bool(task.hops or self.disks_lost)
        clocks = [m for m in self.pool.brokers.values() if m is machine or handled]
        if any(m.clock_doubtful for m in clocks):
            return
        latest = machine.clock.latest_ms()
        early = task.received_ms + task.delay_ms - max(m.clock.latest_ms() for m in clocks)
        if task.delay_ms and early > 0:
            self.fail("never early", f"{task.id} started {early} ms before its delay was over")
        for broker, attempt, due in task.retry_at.values():
            if (
                broker == machine.name
                and attempt == handed.attempt
                and latest < due
                and not (self._is_copy(task) or task.v1)
            ):
                if any(t[1] == attempt and t[2] <= latest for t in task.retry_at.values()):
                    continue
                self.fail("never early", f"{task.id} was retried {due - latest} ms early by {machine.name}")
        if task.expires_ms is not None and wall >= task.received_ms + task.expires_ms:
            late = wall - task.received_ms - task.expires_ms
            if handed.expires_in_ms:
                self.fail("never after expiry", f"{task.id} was handed out {late} ms after its expiry")

    def _check_exclusive(self, machine: BrokerMachine, task: Task, token: bytes | None = None) -> None:
        if self._is_copy(task):
            return
        mono = machine.clock.mono_ms()
        for claim in task.claims.values():
            if claim.ended or claim.broker != machine.name or claim.boot != machine.boots:
                continue
            moved = claim.generations != self.pool.kafka.generations()
            if moved and _seq_of(token) != _seq_of(claim.token):
                # Its partition has left, its row was dropped, and the message was read again.
                self.counts["read again"] += 1
                continue
            left = claim.touched_ms + self.pool.lease_ms - LEASE_SLACK_MS - mono
            if left > 0:
                self.fail(
                    "one holder",
                    f"{task.id} was handed out by {machine.name} {left} ms before the lease of a claim ends",
                )

    def _on_handed_out_v1(self, machine: BrokerMachine, activation: activation_pb2.TaskActivation) -> None:
        task = self._handed(machine, activation, 0)
        if task is None:
            return
        self._check_at_most_once(machine, task)
        self._check_exclusive(machine, task)
        if task.final and not self._is_astray(machine, task):
            self._check_final(machine, task, 0)
        task.unreleased += 1
        task.v1 = True
        self.counts["handed out to v1"] += 1
        self.hub.tell("oracle", f"{machine.name} hands out {task.id} to v1")

    def started(self, claim: Claim, worker: str) -> None:
        self._started(claim.task, worker)

    def started_v1(self, task: Task, worker: str) -> None:
        self._started(task, worker)

    def _started(self, task: Task, worker: str) -> None:
        task.starts += 1
        self.counts["started"] += 1
        if task.at_most_once and task.starts > 1 and not (task.elsewhere or self._is_copy(task)):
            self.fail("at most once", f"{task.id} was started again, by {worker}")

    def _on_answered(self, machine: BrokerMachine, claim: Claim, status: int, answer: int) -> None:
        task, name = claim.task, _NAMES[status]
        said = _ANSWERS[answer]
        self.counts[said] += 1
        self.hub.tell(
            "oracle", f"{machine.name} answers {said} to {name} of {task.id} attempt {claim.attempt}"
        )
        if claim.forgotten or machine.astray:
            return
        if said == "UNKNOWN":
            self.fail("answers are right", f"{machine.name} does not know a token of its own, of {task.id}")
        elif said == "STALE":
            self._check_stale(machine, claim, status)
        elif said == "APPLIED" and claim.applied:
            self.fail("answers are right", f"{task.id}: {name} was APPLIED, and now again")
        elif said == "DUPLICATE" and claim.applied not in (0, status):
            self.fail("answers are right", f"{task.id}: {name} is no DUPLICATE of {_NAMES[claim.applied]}")
        else:
            claim.applied, claim.applied_at = status, self.hub.now
            self._acknowledged(machine, claim, status)

    def _acknowledged(self, machine: BrokerMachine, claim: Claim, status: int) -> None:
        task = claim.task
        if status == consumer_pb2.TASK_OUTCOME_STATUS_WORKER_DIED:
            return
        other = task.acknowledged.get(claim.attempt)
        copied = task.doubled or self._is_copy(task)
        if other is not None and other != claim.token and not copied and not task.v1:
            self.fail(
                "one accepted outcome per attempt",
                f"{task.id}: two outcomes of attempt {claim.attempt} were accepted, now by {machine.name}",
            )
        task.acknowledged[claim.attempt] = claim.token
        retried = status in _RETRIES and claim.attempt < task.max_attempts and not task.at_most_once
        if not retried:
            task.final = _NAMES[status]

    def _check_stale(self, machine: BrokerMachine, claim: Claim, status: int) -> None:
        """Only when the claim is not held any more, or another broker may run the task. That a report was
        applied is known until the next claim."""
        held = (
            not any(other.attempt > claim.attempt for other in claim.task.claims.values())
            and claim.boot == machine.boots
            and claim.reported == {status}
            and machine.clock.mono_ms() < claim.touched_ms + self.pool.lease_ms
            and claim.rebalances == self.pool.kafka.rebalances()
            and not claim.task.v1
            and claim.task.sent_to == machine.name
            and machine.name not in self.pool.operator.busy
        )
        if held:
            self.fail("answers are right", f"{machine.name} says STALE to the holder of {claim.task.id}")

    def _on_extended(self, machine: BrokerMachine, request: bytes, response: bytes) -> None:
        held = consumer_pb2.ExtendClaimsRequest.FromString(request).claims
        answers = consumer_pb2.ExtendClaimsResponse.FromString(response).answers
        for claimed, answer in zip(held, answers, strict=True):
            claim, mono = self.claims[claimed.claim_token], machine.clock.mono_ms()
            if answer != consumer_pb2.CLAIM_ANSWER_EXTENDED:
                self.counts["heartbeats refused"] += 1
                continue
            if claimed.started and claim.started_ms is None:
                claim.started_ms = mono
            if claim.started_ms is None or mono <= claim.started_ms + claim.task.deadline_ms:
                claim.touched_ms = mono

    def _on_sent(self, machine: BrokerMachine, request: bytes, response: bytes) -> None:
        answers = producer_pb2.SendTasksResponse.FromString(response).answers
        sent = producer_pb2.SendTasksRequest.FromString(request).activations
        ids = machine.ids()
        for activation, answer in zip(sent, answers, strict=True):
            task = self.tasks[activation.id]
            task.promised = not machine.astray
            if answer.result == producer_pb2.SEND_RESULT_REJECTED:
                self.fail("at least once", f"{task.id} was rejected: {answer.reason}")
            if task.id not in ids and not task.left and not self._has_expired_by_now(task):
                self.fail("at least once", f"{machine.name} accepted {task.id}, and it is not durable")

    # -- a disk is gone

    def on_disk_lost(self, machine: BrokerMachine) -> None:
        """What came from Kafka is restored; outcomes newer than the last record may run again."""
        self.disks_lost += 1
        self.rows.pop(machine.name, None)
        self._forget_all(machine, machine.recorded_before)

    def on_put_back(self, machine: BrokerMachine) -> dict[int, Task]:
        """Another database of a broker is there in place of the one with these rows."""
        return self.rows.pop(machine.name, {})

    def on_drained(self, machine: BrokerMachine) -> None:
        """All that it had is elsewhere, as it stood: nothing is lost or runs again when its disk is gone."""
        if left := machine.ids():
            self.fail("a drained broker is empty", f"{machine.name} has {sorted(left)}")
        # The ids that it knew go with it.
        self.disks_lost += 1
        self.rows.pop(machine.name, None)
        for claim in self.claims.values():
            if claim.broker == machine.name:
                claim.forgotten = claim.ended = True

    def _on_ledger(self, record: Record, by: Process | None) -> None:
        """Somebody has recorded who a broker is, or who has taken over from it."""
        kind, _, name, *_ = json.loads(record.key)  # type: ignore[arg-type]
        if kind != "broker" or record.value is None:
            return
        head, machine = json.loads(record.value), self.pool.brokers[name]
        successor = head["successor"]
        self.heads[name] = (head["store_id"], head["sequence"])
        # What was on its way when the right one ended arrives all the same.
        if successor is None and machine.old_copy and by is not None and by.alive:
            self.fail("an old copy is refused", f"{name} goes on with one")
        self.adopting.pop(name, None)
        if successor is None or successor[0] == name:
            machine.fenced = machine.adopted = False
        elif not head["handed"]:
            self.adopting[name] = successor[0]
            self._on_adopted(machine)

    def _on_adopted(self, machine: BrokerMachine) -> None:
        """Another broker runs what it had from now on; should it live, it learns that soon."""
        self.disks_lost += 1
        self.hub.tell("oracle", f"{machine.name} is being adopted")
        machine.fenced, machine.adopted = not machine.is_new, True
        up = machine.alive
        machine.lost |= machine.ids()
        self._forget_all(machine, self.lag.recorded_before(machine) if up else machine.recorded_before)

    def _forget_all(self, machine: BrokerMachine, recorded_before: float) -> None:
        """Claims of a broker whose store is gone; of their outcomes, those it acknowledged too late may run
        again."""
        recorded_at = (self.pool.recorded_at(machine) or 0.0) - LEDGER_SLACK_SECONDS
        # What it had not adopted to the end is adopted again, and nobody knows what it has finished of it:
        # docs/faults.md, below A6.
        begun = [self.pool.brokers[name] for name, by in self.adopting.items() if by == machine.name]
        for task in self.tasks.values():
            task.doubled |= any(task.id in other.lost for other in begun)
            # An outcome that was not answered any more may have taken it off the disk before that was lost.
            reported = any(c.broker == machine.name and c.reported for c in task.claims.values())
            if task.sent_to == machine.name and not task.passed_on and (reported or task.id in machine.lost):
                task.promised = False
                self.counts["lost with a disk: sent over gRPC"] += 1
            task.retry_at = {token: due for token, due in task.retry_at.items() if due[0] != machine.name}
            newer_than = max(recorded_at, recorded_before)
            if any(broker == machine.name and at >= newer_than for broker, at in task.hops.values()):
                # It is restored, too.
                task.doubled = True
            for claim in task.claims.values():
                if claim.broker == machine.name and not claim.forgotten:
                    self._forget(claim, newer_than)

    def _forget(self, claim: Claim, newer_than: float) -> None:
        claim.forgotten = claim.ended = True
        if claim.applied and claim.applied_at >= newer_than:
            self.counts["outcomes newer than the ledger"] += 1
            claim.task.final = ""
            for attempt in [a for a in claim.task.acknowledged if a >= claim.attempt]:
                del claim.task.acknowledged[attempt]

    # -- Kafka

    def on_append(self, topic: str, partition: int, offset: int, record: Record, by: Process | None) -> None:
        """Something is in the log: of the application, or of a broker that passes it on."""
        if topic.endswith("-ledger"):
            self._on_ledger(record, by)
            return
        task = self.task_in(record.value)
        if topic == self.pool.dead_letters:
            self._on_letter(task, record)
        elif task is None:
            self.fail("what is passed on is what came", f"a record in {topic} has bytes that nobody sent")
        else:
            self.positions[topic, partition, offset] = task
            if record.value != task.body:
                self._on_passed_on(task, topic, partition, record)

    def _on_passed_on(self, task: Task, topic: str, partition: int, record: Record) -> None:
        task.passed_on += 1
        assert record.value is not None
        message = activation_pb2.TaskActivation.FromString(record.value)
        hop = message.sent_on
        how = "overflowed"
        if topic == self.pool.topic:
            retried = self.pool.retries_leave and message.retry_state.attempts
            how = "retried through the topic" if retried else "handed over"
        self.counts[how] += 1
        self.hub.tell("oracle", f"{hop.broker} passes {task.id} on to {topic} {partition}")
        task.hops[hop.forward_id] = (hop.broker, self.hub.now)
        if self.pool.brokers[hop.broker].astray:
            task.doubled = True

    def task_in(self, value: bytes | None) -> Task | None:
        """The task of these bytes: its own, and what brokers appended."""
        task = self.by_body.get(value or b"")
        if task is None and value:
            with contextlib.suppress(DecodeError):
                task = self.tasks.get(activation_pb2.TaskActivation.FromString(value).id)
        return task if task is not None and (value or b"").startswith(task.body) else None

    def on_commit(self, process: Process, topic: str, partition: int, before: int, offset: int) -> None:
        """What the group has passed is read by nobody else."""
        if offset < before:
            self.fail("offsets", f"{process.name} moved partition {partition} back: {before} -> {offset}")
        brokers = self.pool.brokers.values()
        held: set[str] = set().union(*(m.ids() | m.lost for m in brokers))
        left_untold: set[str] = set().union(*(self._left_untold(m) for m in brokers))
        for at in range(before, offset):
            task = self.positions[topic, partition, at]
            id = task.id if not task.poison else position_id(topic, partition, at)
            has_left = task.left or task.id in left_untold
            if id not in held and not has_left and not self._has_expired_by_now(task):
                self.fail(
                    "no offset above what is durable",
                    f"{process.name} committed {offset} of partition {partition};"
                    f" {task.id} at {at} is in no store",
                )

    def _left_untold(self, machine: BrokerMachine) -> set[str]:
        """The tasks whose rows are off the disk of a broker that is down: it was told of their end, and the
        tick is on the disk although its sync failed. It learns that when it starts."""
        if machine.broker is not None:
            return set()
        tasks = self.rows.get(machine.name, {}).values()
        return {t.id for t in tasks if t.id not in machine.left and self._may_leave(machine, t)}

    def on_foreign_commit(self, process: Process, partition: int, offset: int) -> None:
        self.fail(
            "offsets", f"{process.name} committed {offset} of partition {partition}, which is not its own"
        )

    def _on_letter(self, task: Task | None, record: Record) -> None:
        reason = dict(record.headers)["penstock-reason"].decode()
        if task is None:
            self.fail("dead letters carry the original bytes", f"a letter ({reason}) has other bytes")
            return
        task.letters += 1
        self.counts[f"dead: {reason}"] += 1
        self.hub.tell("oracle", f"dead letter {task.id}: {reason}")
        twice = task.doubled or self._is_copy(task)
        astray = any(machine.astray for machine in self.pool.brokers.values())
        if task.final in ("COMPLETE", "IGNORED") and not (twice or astray):
            self.fail(
                "each ends in one way", f"{task.id} was acknowledged as {task.final}, and is a dead letter"
            )
        if task.discard and not task.poison and reason in ("attempts_exhausted", "failed", "expired"):
            self.fail("each ends in one way", f"{task.id} was to be discarded, not dead-lettered as {reason}")

    # -- the end

    def drained(self) -> bool:
        """Whether nothing is left to do."""
        if self.pool.topic not in {group.topic for group in self.pool.kafka.groups.values()}:
            return False  # nobody reads yet
        committed = all(
            group.committed.get(partition, (0, ""))[0] == len(log)
            for group in self.pool.kafka.groups.values()
            for partition, log in enumerate(self.pool.kafka.topics[group.topic])
        )
        present = [machine for machine in self.pool.brokers.values() if not machine.gone]
        finished = committed and all(self._has_finished(machine) for machine in present)
        # Who sends to a broker that is gone for good does so for ever.
        sending = any(not self.pool.brokers[name].gone for name in self.pool.sending.values())
        return finished and not sending and not self.pool.operator.busy

    def _has_finished(self, machine: BrokerMachine) -> bool:
        broker = machine.broker
        if not machine.alive or machine.astray or broker is None:
            return False
        if broker.store.memory.rows or broker.ingest.ledger is None:
            return False
        # A new disk holds nothing before it is restored.
        return broker.ingest.ledger._opened.is_set()

    def what_is_left(self) -> str:
        """For a pool that does not drain."""
        parts = []
        for name, machine in self.pool.brokers.items():
            store = machine.broker.store if machine.broker else None
            counts = {p: c for p, c in store.memory.counts.items() if any(c)} if store else "down"
            astray = "fenced" if machine.fenced else "an old copy" if machine.old_copy else ""
            parts.append(f"{name}: {sorted(machine.ids())} {counts} {astray}")
        parts.append(f"operator: {sorted(self.pool.operator.busy)}")
        for group in self.pool.kafka.groups.values():
            committed = {p: c[0] for p, c in sorted(group.committed.items())}
            ends = [len(log) for log in self.pool.kafka.topics[group.topic]]
            parts.append(f"{group.topic}: committed {committed} of {ends}")
        return "; ".join(parts)

    def settle(self) -> None:
        """When all is drained: nothing was lost, and the books balance."""
        for task in self.tasks.values():
            if task.promised and not task.left and not self._has_expired_by_now(task):
                self.fail("at least once", f"{task.id} was never taken, at {task.positions or task.sent_to}")
        for machine in self.pool.brokers.values():
            if machine.gone:
                continue
            assert machine.broker is not None
            if difference := machine.broker.store.imbalance():
                self.fail("the books balance", f"{machine.name}: {difference}")
            self._compare(machine, machine.broker)
        if self.pool.quiet:
            self._settle_quiet()

    def _settle_quiet(self) -> None:
        """Without faults nothing is done twice, and nothing is refused."""
        for what in ("STALE", "DUPLICATE", "UNKNOWN", "heartbeats refused"):
            if self.counts[what]:
                self.fail("quiet", f"{self.counts[what]} x {what} although nothing went wrong")
        for task in self.tasks.values():
            if task.starts > task.max_attempts:
                self.fail(
                    "quiet", f"{task.id} was started {task.starts} times for {task.max_attempts} attempts"
                )
