"""A broker's machine: its disk, its clock, and the real broker, started again and again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crash_disk import CrashDisk, abandon

from penstock_broker.config import Settings
from penstock_broker.errors import FatalError
from penstock_broker.server import Broker
from tests.sim.disk import Disk
from tests.sim.hub import Hub, Process, SimClock
from tests.sim.network import Network


class BrokerMachine:
    """``start``, then ``crash`` or ``stop``, as often as one likes."""

    def __init__(
        self, hub: Hub, network: Network, name: str, directory: Path, settings: dict[str, object]
    ) -> None:
        self.hub = hub
        self.network = network
        self.name = name
        self.path = directory / f"{name}.sqlite"
        self.disk = Disk(hub, self.path)
        self.clock = SimClock(hub)
        self.settings = settings
        self.boots = 0
        # After it was told to stop.
        self.back_in = 0.0
        # Its clock jumped so far that what is early cannot be said.
        self.clock_doubtful = False
        # Its database could be opened.
        self.opened = False
        # It was drained or adopted, and does not come back.
        self.gone = False
        # Its disk has never been used.
        self.is_new = True
        # The ledger says that another broker takes over from it, and from what it has. What it has is an old
        # copy, which was refused.
        self.adopted = self.fenced = False
        self.old_copy = False
        self.refused = False
        # Outcomes that it acknowledged before need not be missed when its disk is lost, since it was last up.
        self.recorded_before = 0.0
        # Ticks since the store was last compared with the rows.
        self.dirty = 0
        self.process: Process | None = None
        self.broker: Broker | None = None
        # Told of a broker that is made, before it starts.
        self.on_made: Callable[[BrokerMachine, Broker], None] = lambda machine, broker: None
        self.on_end: Callable[[BrokerMachine, BaseException | None], None] = lambda machine, error: None
        # Told of one that goes down, however it does.
        self.on_down: Callable[[BrokerMachine], None] = lambda machine: None
        self._stopping: asyncio.Event | None = None
        # Ids on the disk of a broker that is down; and those of disks that it has lost.
        self.left: set[str] = set()
        self.lost: set[str] = set()
        # Processes that crashed: nothing of them may be collected while others run.
        self._graves: list[object] = []

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.alive

    @property
    def astray(self) -> bool:
        """Whether what it has is not what counts: another broker has it, or it is an old copy."""
        return self.fenced or self.old_copy

    def is_up(self, boot: int) -> bool:
        """Whether it has been since that start."""
        return self.alive and self.boots == boot

    def ids(self) -> set[str]:
        """Of the rows that are durable."""
        if self.broker is None:
            return self.left
        with self.disk.looked_at():
            return {id for (id,) in self.broker.database.connection.execute("SELECT id FROM activation")}

    def _ids_left(self) -> set[str]:
        return {id for (id,) in self.disk.query("SELECT id FROM activation")}

    def start(self) -> None:
        assert not self.alive
        self.boots += 1
        self.is_new = self.refused = False
        process = self.process = Process(self.hub, self.name)
        process.disk = self.disk  # type: ignore[attr-defined]
        self.hub.tell(self.name, f"starts, boot {self.boots}")
        process.enter(lambda: process.loop.run_main(self._main(process)))

    async def _main(self, process: Process) -> None:
        """As ``penstock_broker.server`` runs it, without the signals."""
        self._stopping = asyncio.Event()
        self.opened = False
        error: BaseException | None = None
        try:
            values: dict[str, Any] = self.settings | {"db_path": self.path}
            with self.disk.files.mounted():
                broker = self.broker = Broker(Settings(**values), self.clock)
            self.opened = True
            self.network.servers[self.name] = broker.server  # type: ignore[assignment]
            self.on_made(self, broker)
            try:
                await broker.start()
                await broker.run_until(self._stopping)
            finally:
                if process.alive:
                    await broker.stop()
                    self.broker, self.left = None, self._ids_left()
        except FatalError as fatal:
            error = fatal
        except Exception as failure:  # noqa: BLE001 - told below
            error = failure
        if process.alive and self.disk.is_dark:
            self.disk.go_down()
        elif process.alive:
            self.broker = None
            self.left = self._ids_left()
            self.hub.tell(self.name, f"has ended: {error!r}" if error else "has ended")
            self.on_down(self)
            self.hub.later(0, process.kill)
            self.on_end(self, error)

    def crash(self) -> None:
        """The process vanishes; what it wrote stays."""
        self.disk.files.kill()
        self._down("CRASHES")

    def power_cut(self) -> None:
        """The machine vanishes, at once."""
        self.disk.power_cut()
        self._down("LOSES POWER")

    def power_cut_within(self, calls: int, then: Callable[[], object]) -> None:
        """The machine vanishes in the middle of one of its next writes."""
        process = self.process

        def down() -> None:
            if process is self.process and self.alive:
                self._down("LOSES POWER in a write")
                then()

        self.disk.crash_within(calls, down)

    def lose_disk(self) -> None:
        """The machine vanishes, and comes back with an empty disk."""
        self.disk.files.kill()
        self._down("LOSES ITS DISK")
        self.renew()

    def renew(self) -> CrashDisk:
        """Of a broker that is down: its disk is empty. What was on it."""
        self.is_new = True
        return self.use(CrashDisk())

    def use(self, files: CrashDisk) -> CrashDisk:
        """Of a broker that is down: these are on its disk. What was on it."""
        before = self.disk.files
        self.lost |= self.left
        self.disk.use(files)
        self.left = self._ids_left()
        self.fenced = self.old_copy = self.refused = False
        return before

    def _down(self, how: str) -> None:
        assert self.process is not None
        self.on_down(self)
        self.hub.tell(self.name, how)
        self._graves += (self.process, self.broker)
        self.process.kill()
        if self.broker is not None:
            abandon(self.broker.database)
        self.broker = None
        self.left = self._ids_left()

    def stop(self) -> None:
        """SIGTERM."""
        assert self.process is not None
        self.hub.tell(self.name, "is told to stop")
        if self._stopping is not None:
            self.process.enter(self._stopping.set)

    def pause(self, seconds: float) -> None:
        """SIGSTOP, and SIGCONT later."""
        assert self.process is not None
        self.process.stopped_until = max(self.process.stopped_until, self.hub.now + seconds)

    def block(self, seconds: float) -> None:
        """The event loop does something for that long; threads go on."""
        assert self.process is not None
        self.process.blocked_until = max(self.process.blocked_until, self.hub.now + seconds)
