"""A whole pool out of one seed: brokers, Kafka, workers, producers and what goes wrong."""

from __future__ import annotations

import asyncio
import gc
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from store_helpers import check_store

from penstock_broker.errors import FatalError, OldDatabase, Replaced
from penstock_protocol.v1.raw_pb2 import RawSendTasksRequest
from tests.sim.broker import BrokerMachine
from tests.sim.faults import Faults
from tests.sim.hub import EPOCH_MS, Hub, Process
from tests.sim.kafka import Cluster
from tests.sim.network import CallFailed, Network
from tests.sim.operator import ADOPTION_BEGUN, Operator
from tests.sim.oracle import Oracle, Violated
from tests.sim.tasks import Task, make_task
from tests.sim.threads import replaced
from tests.sim.worker import V1Worker, Worker

TOPIC = "tasks"
GROUP = f"penstock-{TOPIC}"
# Within that long after the last fault everything is done; what was delayed by a clock that was ahead, and
# is not any more, waits longest.
DRAIN_SECONDS_MAX = 2000.0
SEND = "/penstock.v1.ProducerService/SendTasks"


@dataclass
class Result:
    """One history."""

    seed: int
    digest: str
    seconds: float
    steps: int
    tasks: int
    faults: Counter[str]
    counts: Counter[str]
    violation: str = ""
    lines: list[str] = field(default_factory=list)


class Pool:
    """Made of a seed, lives once."""

    def __init__(self, hub: Hub, directory: Path, kinds: Sequence[str] = ()) -> None:
        self.hub = hub
        # Faults to have, if it is not the seed that says.
        self.kinds = kinds
        rng = self.rng = hub.random
        # No more faults: from here on everything has to end well.
        self.calm = False
        # Without any from the start.
        self.quiet = rng.random() < 0.1 and not kinds
        self.topic = TOPIC
        self.dead_letters = f"{TOPIC}-dlq"
        self.check_store: Callable[..., None] = check_store
        self.faults: Counter[str] = Counter()
        self.network = Network(hub)
        self.kafka = Cluster(hub, self.network)
        self.kafka.add_topic(TOPIC, rng.randint(1, 5))
        self.kafka.add_topic(self.dead_letters, 1)
        if rng.random() < 0.8:
            self.kafka.add_topic("penstock-ledger", 1)
        self.kafka.add_topic(f"{TOPIC}-overflow", rng.randint(1, 2))
        self.lease_ms = rng.choice((2000, 5000))
        self.oracle = Oracle(self)
        self.kafka.on_commit = self.oracle.on_commit
        self.kafka.on_foreign_commit = self.oracle.on_foreign_commit
        self.kafka.on_append = self.oracle.on_append
        self.kafka.on_opened = self.oracle.lag.look
        settings = self._settings()
        self.retries_leave = settings["kafka_retry_topic"] is not None
        self.brokers = {
            f"broker{n}": BrokerMachine(
                hub, self.network, f"broker{n}", directory, settings | {"broker_id": f"broker{n}"}
            )
            for n in range(1, rng.randint(1, 3) + 1)
        }
        for machine in self.brokers.values():
            machine.on_made = self.oracle.watch
            machine.on_end = self._on_end
            machine.on_down = self.oracle.lag.down
        self.workers: list[Worker | V1Worker] = []
        self._worker_number = 0
        self.application = Process(hub, "app")
        # Tasks that are on their way over gRPC -> to which broker.
        self.sending: dict[str, str] = {}
        self.operator = Operator(self)
        self.load_seconds = rng.choice((10.0, 30.0, 60.0))
        self.planned = rng.choice((20, 60, 150))

    def _settings(self) -> dict[str, object]:
        rng = self.rng
        return {
            "kafka_topic": TOPIC,
            "kafka_session_timeout_seconds": 6,
            "lease_seconds": self.lease_ms / 1000,
            "deadline_grace_seconds": 2,
            "window_rows_max": rng.choice((4, 32, 1000)),
            "batch_rows_max": rng.choice((2, 16, 1000)),
            "max_pending_count": rng.choice((15, 100_000)),
            "max_deliveries": rng.choice((2, 5, 20)),
            # Retries go through the topic that they came from, back to whoever reads it.
            "kafka_retry_topic": TOPIC if rng.random() < 0.2 else None,
        }

    @property
    def faultless(self) -> bool:
        return self.calm or self.quiet

    def recorded_at(self, machine: BrokerMachine) -> float | None:
        """When the last record of a broker in the ledger was made."""
        return self.kafka.recorded_at.get(self.ledger_id(machine))

    @staticmethod
    def ledger_id(machine: BrokerMachine) -> str:
        """Under which it writes to the ledger."""
        return f"penstock-ledger/{GROUP}/{machine.name}"

    # -- brokers

    def start(self, machine: BrokerMachine) -> None:
        if not (machine.alive or machine.gone):
            machine.disk.reset()
            machine.start()

    def _on_end(self, machine: BrokerMachine, error: BaseException | None) -> None:
        seconds = machine.back_in
        if error is not None:
            if not self._may_end(machine, error):
                self.oracle.fail("a broker does not fail by itself", f"{machine.name}: {error!r}")
            # Whoever watches over it starts it again.
            seconds = self.hub.between(0.5, 3.0)
            if isinstance(error, Replaced):
                # Its database is set aside; if it is an old copy, the right one is not there any more.
                was_old = machine.old_copy
                machine.renew()
                if was_old:
                    self.oracle.on_disk_lost(machine)
            elif isinstance(error, OldDatabase):
                # Its operator says how it goes on.
                machine.refused = True
                return
        self.hub.later(0.1 if self.calm else seconds, lambda: self.start(machine))

    def _may_end(self, machine: BrokerMachine, error: BaseException) -> bool:
        """Whether a broker is right to stop."""
        if not isinstance(error, FatalError):
            return False
        if isinstance(error, Replaced):
            # An old copy learns it where a new database has taken over, and has not recorded anything yet.
            return machine.fenced or machine.old_copy
        if isinstance(error, OldDatabase):
            return machine.old_copy
        if ADOPTION_BEGUN in str(error) and machine.adopted:
            # It comes back while another one adopts what it had.
            return True
        disk = machine.disk
        # It cannot go on after a sync that failed, nor begin on a disk that it cannot read or write.
        return "sync" in disk.failed or (not machine.opened and bool(disk.failed or disk.filled))

    # -- workers

    def add_worker(self) -> None:
        self._worker_number += 1
        name = f"worker{self._worker_number}"
        worker: Worker | V1Worker
        if not self.quiet and not self.calm and self.rng.random() < 0.15:
            worker = V1Worker(self, name)
        else:
            worker = Worker(self, name)
        self.workers.append(worker)
        worker.start()

    def replace(self, worker: Worker | V1Worker) -> None:
        worker.process.kill()
        self.workers.remove(worker)
        self.hub.later(0 if self.calm else self.hub.between(0, 5.0), self.add_worker)

    # -- the load

    def _load(self) -> None:
        for number in range(self.planned):
            self.hub.at(self.hub.between(0, self.load_seconds), partial(self._new_task, number))

    def _new_task(self, number: int) -> None:
        now_ms = EPOCH_MS + int(self.hub.now * 1000)
        task = make_task(self.rng, number, now_ms, quiet=self.quiet)
        self.oracle.add(task)
        if self.rng.random() < 0.15 and not task.poison:
            self.application.enter(lambda: self.application.loop.run_main(self._send(task)))
        else:
            partition = self.rng.randrange(len(self.kafka.topics[TOPIC]))
            # What may be sent twice has a key, its id.
            key = task.id if self.rng.random() < 0.1 and not self.quiet else None
            self._produce(task, partition, key)
            if key is not None:
                again = self.hub.between(0, self.rng.choice((1.0, 10.0, 60.0)))
                self.hub.later(again, lambda: self._produce(task, partition, key))

    def _produce(self, task: Task, partition: int, key: str | None) -> None:
        if not self.kafka.up:
            self.hub.later(0.5, lambda: self._produce(task, partition, key))
            return
        offset = self.kafka.append(TOPIC, partition, key, task.body, [])
        task.positions.append((partition, offset))
        task.promised = True
        self.hub.tell("app", f"produces {task.id} to {partition} at {offset}")

    async def _send(self, task: Task) -> None:
        """Over gRPC, to one broker until it answers."""
        broker = task.sent_to = self.rng.choice(sorted(self.brokers))
        self.sending[task.id] = broker
        request = RawSendTasksRequest(activations=[task.body]).SerializeToString()
        while True:
            try:
                await self.network.call(self.application, broker, SEND, request, 5.0)
            except CallFailed:
                await asyncio.sleep(self.hub.between(0.1, 1.0))
            else:
                del self.sending[task.id]
                return

    # -- a history

    def run(self) -> None:
        """Raises Violated."""
        hub = self.hub
        hub.after = self.oracle.check
        for machine in self.brokers.values():
            hub.at(self.hub.between(0, 2.0), partial(self.start, machine))
        for _ in range(self.rng.randint(1, 4)):
            self.add_worker()
        self._load()
        self.oracle.lag.start()
        if not self.quiet:
            Faults(self).start()
        hub.run(until=self.load_seconds + 20.0)
        self._calm_down()
        hub.run(until=hub.now + DRAIN_SECONDS_MAX, done=self.oracle.drained)
        if not self.oracle.drained():
            self.oracle.fail("everything ends", self.oracle.what_is_left())
        self.kafka.when_given_up.clear()
        # What was on its way arrives.
        hub.run(until=hub.now + 5.0)
        self.oracle.settle()
        self.oracle.check()

    def _calm_down(self) -> None:
        self.hub.tell("pool", "no more faults")
        self.calm = True
        self.network.heal_all()
        self.kafka.up, self.kafka.slow = True, 1.0
        self.kafka.refuses.clear()
        self.kafka.forgets.clear()
        for machine in self.brokers.values():
            machine.disk.recover()
            machine.clock.jump(0)
            self.start(machine)
        for worker in list(self.workers):
            if isinstance(worker, V1Worker) or worker.process.stopped_until > self.hub.now:
                self.replace(worker)
        self.add_worker()


def run_seed(seed: int, *, always_tell: bool = False, kinds: Sequence[str] = ()) -> Result:
    """One history, whatever comes of it. Its last lines when a promise was not kept, or always. ``kinds``:
    of its faults; else the seed says which."""
    directory = Path(tempfile.mkdtemp(prefix="penstock-sim-", dir=_shared_memory()))
    hub = Hub(seed, directory)
    collecting = gc.isenabled()
    gc.disable()
    violation = ""
    try:
        pool = Pool(hub, directory, kinds)
        with replaced(hub, pool.kafka):
            try:
                pool.run()
            except Violated as violated:
                violation = str(violated)
            finally:
                hub.finish()
        counts = pool.oracle.counts
        return Result(
            seed,
            hub.digest(),
            hub.now,
            hub.steps,
            len(pool.oracle.tasks),
            pool.faults,
            counts,
            violation,
            list(hub.lines) if violation or always_tell else [],
        )
    finally:
        if collecting:
            gc.enable()
        shutil.rmtree(directory, ignore_errors=True)


def _shared_memory() -> str | None:
    """Where a sync costs nothing."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None
