"""How far the ledger may lag behind what a broker acknowledges."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.sim.kafka import NAME as KAFKA

if TYPE_CHECKING:
    from tests.sim.broker import BrokerMachine
    from tests.sim.pool import Pool

LAG_SECONDS = 0.5
LOOK_SECONDS = 0.1
# After what kept it from being written is over: a broker that starts writes at once; requests that were lost
# time out, and are repeated.
START_SECONDS = 0.5
RECOVERY_SECONDS = 20.0


class Lag:
    """Since when each broker may have been unable to write to the ledger."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        # broker -> the beginning and the end of the last time, recovery included.
        self._since: dict[str, float] = {}
        self._until: dict[str, float] = {}

    def start(self) -> None:
        """Look again and again: what hinders ends unseen."""
        self.look()
        self._pool.hub.later(LOOK_SECONDS, self.start)

    def look(self) -> None:
        """What hinders a broker has begun, or may have ended."""
        now = self._pool.hub.now
        for name, machine in self._pool.brokers.items():
            if not machine.gone and (recovery := self._recovery_seconds(machine)):
                if now > self._until.get(name, -1.0):
                    self._since[name] = now
                self._until[name] = max(self._until.get(name, 0.0), now + recovery)

    def _recovery_seconds(self, machine: BrokerMachine) -> float:
        """How long it takes a broker from now on, if nothing hinders it any more; 0: nothing does."""
        kafka, network, process = self._pool.kafka, self._pool.network, machine.process
        if not kafka.up or kafka.slow > 1.0 or network.loss or not network.reaches(machine.name, KAFKA):
            return RECOVERY_SECONDS
        if kafka.openers.get(self._pool.ledger_id(machine)) not in (None, machine.name):
            return RECOVERY_SECONDS  # fenced
        if process is None or not process.alive:
            return START_SECONDS
        stands = max(process.stopped_until, process.blocked_until) > self._pool.hub.now
        if stands or not machine.disk.is_sound:
            return RECOVERY_SECONDS
        ledger = machine.broker.ingest.ledger if machine.broker is not None else None
        return START_SECONDS if ledger is None or not ledger._opened.is_set() else 0.0

    def down(self, machine: BrokerMachine) -> None:
        """It ends, now."""
        machine.recorded_before = self.recorded_before(machine)
        self.look()

    def recorded_before(self, machine: BrokerMachine) -> float:
        """All that it has acknowledged before is to be in the ledger, if it is up."""
        now = self._pool.hub.now
        if now > self._until.get(machine.name, now):
            return now - LAG_SECONDS
        return self._since.get(machine.name, now) - LAG_SECONDS
