"""A broker's machine: its disk, its clock, and the real broker, started again and again."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

from penstock_broker.config import Settings
from penstock_broker.errors import FatalError
from penstock_broker.server import Broker
from tests.sim.hub import Hub, Process, SimClock
from tests.sim.network import Network


class Disk:
    """Where the database is. A write and its sync take time; a crash in between keeps one or the other."""

    def __init__(self, hub: Hub, directory: Path) -> None:
        self.hub = hub
        self.directory = directory
        self.slow = 1.0
        # Told of what was carried out.
        self.on_done: Callable[[Callable[..., Any], tuple[Any, ...]], None] = lambda func, args: None

    def carry_out(self, func: Callable[..., Any], *args: Any) -> Any:
        """On a thread: what the disk is needed for."""
        thread = self.hub.thread
        assert thread is not None
        thread.wait(self.hub.between(0.0001, 0.002) * self.slow)
        result = func(*args)
        self.on_done(func, args)
        thread.wait(self.hub.between(0.0, 0.001) * self.slow)
        return result

    def crashed(self) -> None:
        """What is on it goes on in another directory: the open files are those of the dead."""
        number = int(self.directory.name) + 1
        left = self.directory
        self.directory = left.parent / str(number)
        self.directory.mkdir(parents=True)
        for name in ("broker.sqlite", "broker.sqlite-wal"):
            if (left / name).exists():
                shutil.copyfile(left / name, self.directory / name)


def _ids_in(path: Path) -> set[str]:
    """Of the rows in a database that was closed."""
    with contextlib.closing(sqlite3.connect(f"file:{path}?immutable=1", uri=True)) as connection:
        return {id for (id,) in connection.execute("SELECT id FROM activation")}


class BrokerMachine:
    """``start``, then ``crash`` or ``stop``, as often as one likes."""

    def __init__(
        self, hub: Hub, network: Network, name: str, directory: Path, settings: dict[str, object]
    ) -> None:
        self.hub = hub
        self.network = network
        self.name = name
        self.disk = Disk(hub, directory / name / "1")
        self.disk.directory.mkdir(parents=True)
        self.clock = SimClock(hub)
        self.settings = settings
        self.boots = 0
        # After it was told to stop.
        self.back_in = 0.0
        # Its clock jumped so far that what is early cannot be said.
        self.clock_doubtful = False
        # Ticks since the store was last compared with the rows.
        self.dirty = 0
        self.process: Process | None = None
        self.broker: Broker | None = None
        # Told of a broker that is made, before it starts.
        self.on_made: Callable[[BrokerMachine, Broker], None] = lambda machine, broker: None
        self.on_end: Callable[[BrokerMachine, BaseException | None], None] = lambda machine, error: None
        self._stopping: asyncio.Event | None = None
        # Ids on the disk of a broker that is down.
        self.left: set[str] = set()
        # Processes that crashed: nothing of them may be collected while others run.
        self._graves: list[object] = []

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.alive

    def ids(self) -> set[str]:
        """Of the rows that are durable."""
        if self.broker is None:
            return self.left
        return {id for (id,) in self.broker.database.connection.execute("SELECT id FROM activation")}

    def start(self) -> None:
        assert not self.alive
        self.boots += 1
        process = self.process = Process(self.hub, self.name)
        process.disk = self.disk  # type: ignore[attr-defined]
        self.hub.tell(self.name, f"starts, boot {self.boots}")
        process.enter(lambda: process.loop.run_main(self._main(process)))

    async def _main(self, process: Process) -> None:
        """As ``penstock_broker.server`` runs it, without the signals."""
        self._stopping = asyncio.Event()
        error: BaseException | None = None
        try:
            values: dict[str, Any] = self.settings | {"db_path": self.disk.directory / "broker.sqlite"}
            broker = self.broker = Broker(Settings(**values), self.clock)
            self.network.servers[self.name] = broker.server  # type: ignore[assignment]
            self.on_made(self, broker)
            try:
                await broker.start()
                await broker.run_until(self._stopping)
            finally:
                if process.alive:
                    await broker.stop()
        except FatalError as fatal:
            error = fatal
        except Exception as failure:  # noqa: BLE001 - told below
            error = failure
        if process.alive:
            self.broker = None
            self.left = _ids_in(self.disk.directory / "broker.sqlite")
            self.hub.tell(self.name, f"has ended: {error!r}" if error else "has ended")
            self.hub.later(0, process.kill)
            self.on_end(self, error)

    def crash(self) -> None:
        """It vanishes; what is on the disk stays."""
        assert self.process is not None
        self.hub.tell(self.name, "CRASHES")
        self._graves += (self.process, self.broker)
        self.left = self.ids()
        self.process.kill()
        self.broker = None
        self.disk.crashed()

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
