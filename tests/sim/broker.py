"""A broker's machine: its disk, its clock, and the real broker, started again and again."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apsw
from crash_disk import HOWS, Call, CrashDisk, abandon

from penstock_broker.config import Settings
from penstock_broker.errors import FatalError
from penstock_broker.server import Broker
from tests.sim.hub import Hub, Process, SimClock
from tests.sim.network import Network


class Disk:
    """Where the database is: what is not synced may be lost, in part or torn. Writing takes time."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.files = CrashDisk()
        self.slow = 1.0
        # Told of what was carried out.
        self.on_done: Callable[[Callable[..., Any], tuple[Any, ...]], None] = lambda func, args: None
        # The machine is to crash in the middle of a write, after so many I/O calls more.
        self._calls_left = 0
        self._crash: Callable[[], None] = lambda: None
        # It has: whoever still runs there is gone too.
        self.is_dark = False

    def carry_out(self, func: Callable[..., Any], *args: Any) -> Any:
        """On a thread: what the disk is needed for."""
        thread = self.hub.thread
        assert thread is not None
        thread.wait(self.hub.between(0.0001, 0.002) * self.slow)
        try:
            result = func(*args)
        except Exception:
            if not self.is_dark:
                raise
        if self.is_dark:
            self.go_down()
            thread.wait(None)
        self.on_done(func, args)
        thread.wait(self.hub.between(0.0, 0.001) * self.slow)
        return result

    def go_down(self) -> None:
        """Bring the machine down with it."""
        self.reset()
        self.hub.later(0, self._crash)

    def reset(self) -> None:
        self.is_dark = False
        self.files.before = lambda call: None

    def crash_within(self, calls: int, crash: Callable[[], None]) -> None:
        """Lose power in the middle of a write; ``crash`` is to bring the machine down with it."""
        self._calls_left, self._crash = calls, crash
        self.files.before = self._count

    def spare(self) -> None:
        """It does not lose power after all, if it has not yet."""
        self.files.before = lambda call: None

    def _count(self, call: Call) -> None:
        if call.kind in ("write", "sync", "truncate"):
            self._calls_left -= 1
            if self._calls_left == 0:
                self.is_dark = True
                self.power_cut()

    def power_cut(self) -> None:
        self.files.power_cut(self.hub.random, self.hub.random.choice(HOWS))

    def ids(self, path: Path) -> set[str]:
        """Of the rows on the disk of a broker that is down: of a copy, as a broker would find them."""
        copy = CrashDisk(self.files.contents.files())
        with contextlib.closing(apsw.Connection(str(path), vfs=copy.name)) as connection:
            connection.pragma("locking_mode", "exclusive")
            if not connection.execute("SELECT count(*) FROM sqlite_schema").get:
                return set()
            return {id for (id,) in connection.execute("SELECT id FROM activation")}


class BrokerMachine:
    """``start``, then ``crash`` or ``stop``, as often as one likes."""

    def __init__(
        self, hub: Hub, network: Network, name: str, directory: Path, settings: dict[str, object]
    ) -> None:
        self.hub = hub
        self.network = network
        self.name = name
        self.disk = Disk(hub)
        self.path = directory / f"{name}.sqlite"
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
        # Ids on the disk of a broker that is down; and those of disks that it has lost.
        self.left: set[str] = set()
        self.lost: set[str] = set()
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
            values: dict[str, Any] = self.settings | {"db_path": self.path}
            with self.disk.files.mounted():
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
        if process.alive and self.disk.is_dark:
            self.disk.go_down()
        elif process.alive:
            self.broker = None
            self.left = self.disk.ids(self.path)
            self.hub.tell(self.name, f"has ended: {error!r}" if error else "has ended")
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
        self.lost |= self.left
        self.left = set()
        self.disk.files = CrashDisk()

    def _down(self, how: str) -> None:
        assert self.process is not None
        self.hub.tell(self.name, how)
        self._graves += (self.process, self.broker)
        self.process.kill()
        if self.broker is not None:
            abandon(self.broker.database)
        self.broker = None
        self.left = self.disk.ids(self.path)

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
