"""What operators do to whole brokers: drain one before it goes, adopt one that never returns, put back a
database."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING

from crash_disk import CrashDisk

from penstock_protocol.v1 import admin_pb2
from tests.sim.broker import BrokerMachine
from tests.sim.disk import query
from tests.sim.hub import Process
from tests.sim.network import CallFailed

if TYPE_CHECKING:
    from tests.sim.pool import Pool

ADMIN = "/penstock.v1.AdminService/"
CALL_SECONDS = 5.0
# One that is not drained by then is started anew, and stays.
DRAIN_SECONDS_MAX = 60.0
ADOPTED_ALREADY = "already"
# By another one than the one that is asked.
ADOPTION_BEGUN = "has begun to adopt"


class Operator:
    """One job for each broker at a time."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.hub = pool.hub
        self.rng = pool.hub.random
        self.process = Process(pool.hub, "operator")
        # Brokers that something is done to.
        self.busy: set[str] = set()

    def free(self) -> list[BrokerMachine]:
        """Brokers that nothing is done to."""
        return [m for name, m in self.pool.brokers.items() if name not in self.busy and not m.gone]

    def start(self, machine: BrokerMachine, job: Coroutine[object, object, None]) -> None:
        """Have a job done on a broker."""
        self.busy.add(machine.name)

        async def do() -> None:
            await job
            self.busy.discard(machine.name)

        self.process.enter(lambda: self.process.loop.run_main(do()))

    async def _call(self, broker: str, method: str, request: bytes) -> bytes:
        return await self.pool.network.call(self.process, broker, ADMIN + method, request, CALL_SECONDS)

    async def _until(self, holds: Callable[[], bool]) -> None:
        while not holds():  # noqa: ASYNC110 - time is virtual
            await asyncio.sleep(0.1)

    # -- draining

    async def drain(self, machine: BrokerMachine, grace_seconds: float, back_in: float | None) -> None:
        """Until nothing is left on it, then it goes with its disk: for good, or for so long."""
        request = admin_pb2.DrainRequest(grace_seconds=grace_seconds, by="operator").SerializeToString()
        until = self.hub.now + DRAIN_SECONDS_MAX
        while self.hub.now < until:
            boot = machine.boots
            try:
                told = admin_pb2.DrainResponse.FromString(await self._call(machine.name, "Drain", request))
            except CallFailed:
                await asyncio.sleep(self.hub.between(0.1, 1.0))
                continue
            if told.finished and not (told.left or told.reasons) and machine.is_up(boot):
                await self._remove(machine, back_in)
                return
            await asyncio.sleep(self.hub.between(0.05, 1.0))
        self.hub.tell("operator", f"gives up draining {machine.name}")
        # It takes nothing in any more.
        if machine.alive:
            machine.back_in = 1.0
            machine.stop()

    async def _remove(self, machine: BrokerMachine, back_in: float | None) -> None:
        """A drained broker goes, and takes its disk along."""
        self.hub.tell("operator", f"{machine.name} is drained and goes")
        self.pool.oracle.on_drained(machine)
        machine.gone = True
        if self.rng.random() < 0.3:
            machine.stop()
        else:
            machine.crash()
        await self._until(lambda: not machine.alive)
        machine.renew()
        if back_in is not None:
            await asyncio.sleep(back_in)
            machine.gone = False
            self.pool.start(machine)

    # -- adopting

    async def adopt(self, machine: BrokerMachine, force: bool) -> None:
        """By another broker, whichever is there, until one of them says that it is done."""
        request = admin_pb2.AdoptRequest(broker_id=machine.name, force=force, by="operator")
        helper = None
        while True:
            if helper is None or self.rng.random() < 0.1:
                helper = self.rng.choice([m.name for m in self.free()])
            try:
                answer = await self._call(helper, "Adopt", request.SerializeToString())
            except CallFailed as failed:
                if ADOPTED_ALREADY in failed.message:
                    break
                helper = await self._named(failed.message)
                await asyncio.sleep(self.hub.between(0.2, 3.0))
                continue
            told = admin_pb2.AdoptResponse.FromString(answer)
            if told.finished:
                if told.lost:
                    self.pool.oracle.fail(
                        "losing a disk loses nothing", f"{told.lost} tasks of {machine.name} are lost"
                    )
                break
        self.hub.tell("operator", f"{machine.name} is adopted")

    async def _named(self, message: str) -> str | None:
        """Who has begun to adopt, and must end it; one that has gone is adopted first."""
        if ADOPTION_BEGUN not in message:
            return None
        name = message.split("'")[1]
        if self.pool.brokers[name].gone and name not in self.busy:
            self.busy.add(name)
            await self.adopt(self.pool.brokers[name], force=True)
            self.busy.discard(name)
            return None
        return name

    # -- an old copy of a database

    def copy(self, machine: BrokerMachine) -> CrashDisk:
        """Of the files as they are now, while the broker runs."""
        return CrashDisk(machine.disk.files.contents.files())

    def is_old(self, machine: BrokerMachine, copy: CrashDisk) -> bool:
        """Whether the ledger has more of a store than a copy of it."""
        meta = dict(query(copy, machine.path, "SELECT key, value FROM meta"))
        recorded = self.pool.oracle.heads.get(machine.name)
        if recorded is None or recorded[0] != meta.get("store_id") or meta.get("restore") != "done":
            return False
        return int(meta.get("ledger_sequence", 0)) < recorded[1]

    async def put_back(
        self,
        machine: BrokerMachine,
        copy: CrashDisk,
        seconds: float,
        reconcile: bool,
        tell: Callable[[], None],
    ) -> None:
        """An old copy, some time after it was made; it is refused, and then gives way to the right database,
        or to what the ledger has."""
        await asyncio.sleep(seconds)
        if not self.is_old(machine, copy):
            return
        tell()
        if machine.alive:
            machine.crash()
        right = machine.use(copy)
        machine.old_copy = True
        rows = self.pool.oracle.on_put_back(machine)
        self.hub.later(self.hub.between(0, 5.0), lambda: self.pool.start(machine))
        await self._until(lambda: machine.refused or not machine.old_copy)
        if not machine.old_copy:
            return  # its disk is lost
        if machine.alive:
            machine.crash()
        if reconcile:
            self.hub.tell("operator", f"{machine.name} is reconciled")
            machine.renew()
            self.pool.oracle.on_disk_lost(machine)
        else:
            self.hub.tell("operator", f"{machine.name} gets its database back")
            machine.use(right)
            self.pool.oracle.rows[machine.name] = rows
        self.pool.start(machine)
