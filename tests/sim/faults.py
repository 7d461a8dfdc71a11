"""What goes wrong: each fault starts, lasts and ends; which kinds a history has, its seed says."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from confluent_kafka import KafkaError

from tests.sim.broker import BrokerMachine
from tests.sim.kafka import NAME as KAFKA

if TYPE_CHECKING:
    from tests.sim.pool import Pool

# A clock that jumps by more corrects what producers say, and then what is early is nobody's to say.
CLOCK_AHEAD_MS = 50_000
# Kinds of I/O calls that fail together.
FAILING_CALLS = (
    ("read",),
    ("write",),
    ("write", "truncate", "size"),
    ("open", "read", "write", "truncate", "size", "delete"),
)


class Faults:
    """Draws and carries out."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.hub = pool.hub
        self.rng = pool.hub.random
        self.kinds: dict[str, Callable[[], None]] = {
            "broker crash": self.broker_crash,
            "broker crash in a rebalance": self.broker_crash_in_a_rebalance,
            "power cut": self.power_cut,
            "power cut in a write": self.power_cut_in_a_write,
            "disk lost": self.disk_lost,
            "broker restart": self.broker_restart,
            "broker drained": self.broker_drained,
            "broker adopted": self.broker_adopted,
            "old copy put back": self.old_copy_put_back,
            "broker stopped": self.broker_stopped,
            "broker put out of its group": self.put_out,
            "event loop blocked": self.loop_blocked,
            "broker cut off Kafka": self.cut_kafka,
            "worker cut off broker": self.cut_worker,
            "messages lost": self.messages_lost,
            "network slow": self.network_slow,
            "Kafka down": self.kafka_down,
            "Kafka slow": self.kafka_slow,
            "Kafka client lost": self.kafka_client_lost,
            "dead letters refused": self.letters_refused,
            "disk slow": self.disk_slow,
            "disk fails": self.disk_fails,
            "disk sync fails": self.disk_sync_fails,
            "disk full": self.disk_full,
            "clock jump": self.clock_jump,
            "worker crash": self.worker_crash,
            "worker stopped": self.worker_stopped,
        }
        self.enabled = [kind for kind in self.kinds if self.rng.random() < 0.5]
        self.mean_seconds = self.rng.choice((1.0, 3.0, 8.0))
        if pool.kinds:
            self.enabled = [kind for kind in self.kinds if kind in pool.kinds]

    def start(self) -> None:
        if self.enabled:
            self.hub.later(self.rng.expovariate(1 / self.mean_seconds), self._next)

    def _next(self) -> None:
        if self.pool.calm:
            return
        kind = self.rng.choice(self.enabled)
        self.kinds[kind]()
        self.pool.oracle.lag.look()
        self.start()

    def _tell(self, kind: str, what: str) -> None:
        self.pool.faults[kind] += 1
        self.hub.tell("FAULT", f"{kind}: {what}")

    def _broker(self) -> BrokerMachine | None:
        alive = [machine for machine in self.pool.brokers.values() if machine.alive]
        return self.rng.choice(alive) if alive else None

    def _seconds(self, most: float) -> float:
        """Mostly short, sometimes beyond every timeout."""
        return self.rng.choice((0.01, 0.1, 0.5, 1.0)) * most * self.rng.random()

    def broker_crash(self) -> None:
        if machine := self._broker():
            seconds = self._seconds(20)
            self._tell("broker crash", f"{machine.name}, back in {seconds:.2f} s")
            machine.crash()
            self.hub.later(seconds, lambda: self.pool.start(machine))

    def broker_crash_in_a_rebalance(self) -> None:
        """Another one is out of the group and comes back: what is given up for it then, is not told."""
        alive = [machine for machine in self.pool.brokers.values() if machine.alive]
        waiting = self.pool.kafka.when_given_up
        if len(alive) < 2 or waiting:
            return
        machine, other = self.rng.sample(alive, 2)
        away, seconds = self.rng.uniform(7, 12), self._seconds(20)
        self._tell(
            "broker crash in a rebalance",
            f"{machine.name}, back in {seconds:.2f} s, after {other.name} stood still for {away:.2f} s",
        )

        def crash() -> None:
            if machine.alive:
                self.hub.tell("FAULT", f"{machine.name} crashes")
                machine.crash()
                self.hub.later(seconds, lambda: self.pool.start(machine))

        waiting[machine.name] = crash
        other.pause(away)

    def power_cut(self) -> None:
        if machine := self._broker():
            seconds = self._seconds(20)
            self._tell("power cut", f"{machine.name}, back in {seconds:.2f} s")
            machine.power_cut()
            self.hub.later(seconds, lambda: self.pool.start(machine))

    def power_cut_in_a_write(self) -> None:
        if machine := self._broker():
            seconds, calls = self._seconds(20), self.rng.randint(1, 20)
            self._tell("power cut in a write", f"{machine.name} after {calls} calls, back in {seconds:.2f} s")
            machine.power_cut_within(calls, lambda: self.hub.later(seconds, lambda: self.pool.start(machine)))

    def disk_lost(self) -> None:
        """Of a broker that keeps a ledger."""
        if (machine := self._broker()) and self.pool.recorded_at(machine) is not None:
            seconds = self._seconds(20)
            self._tell("disk lost", f"{machine.name}, back in {seconds:.2f} s")
            machine.lose_disk()
            self.pool.oracle.on_disk_lost(machine)
            self.hub.later(seconds, lambda: self.pool.start(machine))

    def broker_restart(self) -> None:
        if machine := self._broker():
            self._tell("broker restart", machine.name)
            machine.back_in = self._seconds(20)
            machine.stop()

    def _expendable(self) -> BrokerMachine | None:
        """One that is up and that nothing is done to, if there is another one to go on with its tasks."""
        free = self.pool.operator.free()
        alive = [machine for machine in free if machine.alive]
        return self.rng.choice(alive) if alive and len(free) > 1 else None

    def broker_drained(self) -> None:
        """And gone, for good or for a while, with its disk."""
        if machine := self._expendable():
            grace, seconds = self.rng.choice((0.0, 1.0, 10.0)), self._seconds(20)
            back_in = self.rng.choice((None, seconds, seconds, seconds))
            self._tell("broker drained", f"{machine.name}, grace {grace:.0f} s")
            self.pool.operator.start(machine, self.pool.operator.drain(machine, grace, back_in))

    def broker_adopted(self) -> None:
        """Of those that keep a ledger: one that vanished, or that comes back, or has only stood still."""
        machine = self._expendable()
        if machine is None or self.pool.recorded_at(machine) is None:
            return
        how = self.rng.choice(("gone", "back with an empty disk", "back with its disk", "standing still"))
        seconds, force = self._seconds(40), how != "gone" or self.rng.random() < 0.7
        self._tell("broker adopted", f"{machine.name}, {how}, for {seconds:.2f} s")
        if how == "standing still":
            machine.pause(seconds)
        elif how == "back with its disk":
            machine.crash()
        else:
            machine.lose_disk()
            self.pool.oracle.on_disk_lost(machine)
        if how == "gone":
            machine.gone = True
        else:
            self.hub.later(seconds, lambda: self.pool.start(machine))
        self.pool.operator.start(machine, self.pool.operator.adopt(machine, force))

    def old_copy_put_back(self) -> None:
        """Some time after it was made, in place of the database of a broker that keeps a ledger."""
        operator, machine = self.pool.operator, self._expendable()
        if machine is None or self.pool.recorded_at(machine) is None:
            return
        seconds, reconcile = self._seconds(30), self.rng.random() < 0.5

        def tell() -> None:
            self._tell("old copy put back", f"{machine.name}, {seconds:.2f} s old")

        copy = operator.copy(machine)
        operator.start(machine, operator.put_back(machine, copy, seconds, reconcile, tell))

    def broker_stopped(self) -> None:
        if machine := self._broker():
            seconds = self._seconds(20)
            self._tell("broker stopped", f"{machine.name} for {seconds:.2f} s")
            machine.pause(seconds)

    def put_out(self) -> None:
        """Of a broker that is well, and joins again: what it gives up may be its own again at once. It is
        told at once: Kafka forgets nobody who is heard of, and as long as one does not know, there are two
        who have a partition."""
        members = [c for c in self.pool.kafka.consumers if c.in_group and c.reachable]
        if members:
            consumer, times = self.rng.choice(members), self.rng.randint(1, 5)
            name = f"{consumer.process.name} of {consumer.config['group.id']}"
            self._tell("broker put out of its group", f"{name}, when it commits, {times} times")
            self.pool.kafka.forgets[consumer] = times

    def loop_blocked(self) -> None:
        if machine := self._broker():
            seconds = self._seconds(15)
            self._tell("event loop blocked", f"{machine.name} for {seconds:.2f} s")
            machine.block(seconds)

    def cut_kafka(self) -> None:
        name = self.rng.choice(sorted(self.pool.brokers))
        self._cut("broker cut off Kafka", name, KAFKA, self._seconds(25))

    def cut_worker(self) -> None:
        if not self.pool.workers:
            return
        broker, worker = self.rng.choice(sorted(self.pool.brokers)), self.rng.choice(self.pool.workers).name
        self._cut("worker cut off broker", worker, broker, self._seconds(20))

    def _cut(self, kind: str, one: str, other: str, seconds: float) -> None:
        self._tell(kind, f"{one} from {other} for {seconds:.2f} s")
        self.pool.network.cut(one, other)
        self.hub.later(seconds, lambda: self.pool.network.heal(one, other))

    def messages_lost(self) -> None:
        network = self.pool.network
        network.loss = self.rng.choice((0.01, 0.1, 0.3))
        self._tell("messages lost", f"{network.loss}")
        self.hub.later(self._seconds(20), lambda: setattr(network, "loss", 0.0))

    def network_slow(self) -> None:
        network = self.pool.network
        network.slow = self.rng.choice((10.0, 100.0, 1000.0))
        self._tell("network slow", f"{network.slow} times")
        self.hub.later(self._seconds(20), lambda: setattr(network, "slow", 1.0))

    def kafka_down(self) -> None:
        kafka, seconds = self.pool.kafka, self._seconds(30)
        self._tell("Kafka down", f"for {seconds:.2f} s")
        kafka.up = False
        self.hub.later(seconds, lambda: setattr(kafka, "up", True))

    def kafka_slow(self) -> None:
        kafka = self.pool.kafka
        kafka.slow = self.rng.choice((10.0, 100.0))
        self._tell("Kafka slow", f"{kafka.slow} times")
        self.hub.later(self._seconds(20), lambda: setattr(kafka, "slow", 1.0))

    def kafka_client_lost(self) -> None:
        """It will not find Kafka again; another one would."""
        kafka = self.pool.kafka
        if clients := [client for client in (*kafka.consumers, *kafka.producers) if not client.lost]:
            client = self.rng.choice(clients)
            whose = client.config.get("group.id", "which publishes")
            self._tell("Kafka client lost", f"{client.process.name}'s, {whose}")
            client.lost = True

    def letters_refused(self) -> None:
        refuses, topic = self.pool.kafka.refuses, self.pool.dead_letters
        code = self.rng.choice((KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.POLICY_VIOLATION))
        self._tell("dead letters refused", str(code))
        refuses[topic] = KafkaError(code, "refused")
        self.hub.later(self._seconds(20), lambda: refuses.pop(topic, None))

    def disk_slow(self) -> None:
        name, machine = self.rng.choice(sorted(self.pool.brokers.items()))
        disk = machine.disk
        disk.slow = self.rng.choice((20.0, 200.0, 1000.0))
        self._tell("disk slow", f"{name} {disk.slow} times")
        self.hub.later(self._seconds(20), lambda: setattr(disk, "slow", 1.0))

    def disk_fails(self) -> None:
        """For a while: what was asked for is refused or waits."""
        name, machine = self.rng.choice(sorted(self.pool.brokers.items()))
        disk, seconds = machine.disk, self._seconds(20)
        disk.failing = frozenset(self.rng.choice(FAILING_CALLS))
        disk.failing_share = self.rng.choice((0.05, 0.5, 1.0))
        self._tell("disk fails", f"{name} {sorted(disk.failing)} {disk.failing_share} for {seconds:.2f} s")
        self.hub.later(seconds, lambda: setattr(disk, "failing", frozenset()))

    def disk_sync_fails(self) -> None:
        """Once: what it should have written is lost, and the broker cannot go on."""
        if machine := self._broker():
            self._tell("disk sync fails", machine.name)
            machine.disk.sync_fails = True

    def disk_full(self) -> None:
        """Others fill it; some of them also what the broker had reserved."""
        name, machine = self.rng.choice(sorted(self.pool.brokers.items()))
        disk, seconds = machine.disk, self._seconds(20)
        leave, again = self.rng.choice((0, 5_000, 50_000, 10_000_000)), self.rng.random() < 0.5
        self._tell("disk full", f"{name} {leave} bytes are left{', again' if again else ''}, {seconds:.2f} s")
        disk.fill(leave)
        if again:
            self.hub.later(seconds * self.rng.random(), lambda: disk.fill(leave))
        self.hub.later(seconds, lambda: setattr(disk, "filled", 0))

    def clock_jump(self) -> None:
        machine = self.rng.choice(sorted(self.pool.brokers.items()))[1]
        ahead = self.rng.randint(-CLOCK_AHEAD_MS, CLOCK_AHEAD_MS)
        if self.rng.random() < 0.2:
            ahead *= 15
            machine.clock_doubtful = True
        self._tell("clock jump", f"{machine.name} is {ahead} ms ahead")
        machine.clock.jump(ahead)

    def worker_crash(self) -> None:
        if self.pool.workers:
            worker = self.rng.choice(self.pool.workers)
            self._tell("worker crash", worker.name)
            self.pool.replace(worker)

    def worker_stopped(self) -> None:
        if self.pool.workers:
            worker, seconds = self.rng.choice(self.pool.workers), self._seconds(20)
            self._tell("worker stopped", f"{worker.name} for {seconds:.2f} s")
            worker.process.stopped_until = max(worker.process.stopped_until, self.hub.now + seconds)
