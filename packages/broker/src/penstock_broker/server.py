"""The composition root: builds the broker, starts its parts in order, stops them in reverse."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine
from typing import TypeVar

import grpc
import structlog
import uvloop

from penstock_broker import __version__
from penstock_broker.clock import Clock, SystemClock
from penstock_broker.config import Settings
from penstock_broker.departures import Departures
from penstock_broker.dispatch import rpc
from penstock_broker.dispatch.admin import Admin
from penstock_broker.dispatch.looking import Looking
from penstock_broker.dispatch.service import Consumers, Refused
from penstock_broker.dispatch.waiting import Waiting
from penstock_broker.domain.lifecycle import Limits
from penstock_broker.errors import FatalError, OldDatabase, Replaced
from penstock_broker.ingest.direct import Draining, IntakePaused, InvalidRequest
from penstock_broker.ingest.parts import Ingest, build_ingest
from penstock_broker.metrics import Exposition, Metrics, expose
from penstock_broker.observe import Observer, disk_usage
from penstock_broker.store.batch import Batch
from penstock_broker.store.database import Database, suspect_of
from penstock_broker.store.inflight import Inflight
from penstock_broker.store.limits import StoreLimits
from penstock_broker.store.quarantine import set_aside
from penstock_broker.store.soundness import Malformed
from penstock_broker.store.space import Space
from penstock_broker.store.writer import Handoff
from penstock_broker.upkeep.chores import Upkeep
from penstock_broker.writer_thread import WriterThread
from penstock_protocol.v1 import admin_pb2

log = structlog.get_logger("server")

A = TypeVar("A")
T = TypeVar("T")

# The writer's C calls give up the GIL; with the default of 5 ms each would wait that long to go on
# while the event loop is busy. docs/adr/0003 has the measurement.
SWITCH_INTERVAL_SECONDS = 0.0005
# Of a response, so that it stays below what gRPC clients accept by default (4 MiB).
RESPONSE_BYTES_MAX = 3 * 1024 * 1024
DRAIN_CALLS_SECONDS = 3.0


def serve(settings: Settings, reconcile: bool = False) -> int:  # noqa: RET503 - execv does not return
    """Run a broker until SIGTERM or SIGINT. The exit code.

    ``reconcile``: go on without a database that is not the one the ledger knows. Raises FatalError when
    it cannot start or must not go on.
    """
    sys.setswitchinterval(SWITCH_INTERVAL_SECONDS)
    clock = SystemClock()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            return runner.run(_serve(settings))
        except Replaced as error:
            set_aside(settings.db_path, error.message, clock, "adopted")
            raise
        except OldDatabase as error:
            if not reconcile:
                raise
            set_aside(settings.db_path, error.message, clock, "old")
    # In a process of its own making: nothing of the broker that stopped is left, its port least of all.
    sys.stderr.flush()
    os.execv(sys.executable, sys.orig_argv)


async def _serve(settings: Settings) -> int:
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    broker = Broker(settings, SystemClock())
    try:
        await broker.start()
        rarely_collect()
        await broker.run_until(stopping)
    finally:
        await broker.stop()
    return 0


def rarely_collect() -> None:
    """A task makes no cycles, and there may be a million of them: walking through them all again and again
    was a tenth of the CPU, and stopped the event loop. docs/adr/0003 has the measurement."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 1000)


def store_limits(settings: Settings) -> StoreLimits:
    return StoreLimits(
        rows_max=settings.max_pending_count,
        bytes_max=settings.pending_bytes_max,
        namespace_share_max=settings.namespace_share_max,
        window_rows_max=settings.window_rows_max,
        window_bytes_max=settings.window_bytes_max,
        batch_rows_max=settings.batch_rows_max,
        dedup_window_ms=int(settings.dedup_window_seconds * 1000),
        dedup_ids_max=settings.dedup_ids_max,
        dead_letters_rest_max=settings.dead_letters_rest_max,
        lease_ms=int(settings.lease_seconds * 1000),
        grace_ms=int(settings.deadline_grace_seconds * 1000),
        unclaimable_ms=int(settings.unclaimable_seconds * 1000),
        lifecycle=Limits(
            max_deliveries=settings.max_deliveries,
            unknown_task_ms=int(settings.unknown_task_seconds * 1000),
            retry_topic=settings.ingest == "kafka" and settings.kafka_retry_topic is not None,
        ),
    )


def open_store(settings: Settings, clock: Clock, limits: StoreLimits, handoff: Handoff) -> Inflight:
    """The store of this broker; a new one in place of a malformed one whose tasks Kafka has, too.

    Raises FatalError.
    """
    try:
        return _open_store(settings, clock, limits, handoff)
    except Malformed as malformed:
        if settings.ingest != "kafka":
            raise
        set_aside(settings.db_path, malformed.message, clock)
        suspect_of(settings.db_path).unlink(missing_ok=True)
    return _open_store(settings, clock, limits, handoff)


def _open_store(settings: Settings, clock: Clock, limits: StoreLimits, handoff: Handoff) -> Inflight:
    database = Database(settings.db_path, limits.lifecycle, clock.wall_ms())
    try:
        return Inflight(database, clock, limits, handoff)
    except (LookupError, ValueError, OverflowError, TypeError) as error:
        malformed = database.suspect(f"what it says does not fit together: {error!r}")
        database.close()
        raise malformed from error


class Broker:
    """One broker process. ``start``, ``run_until``, ``stop``, once each."""

    def __init__(self, settings: Settings, clock: Clock) -> None:
        self.settings = settings
        limits = store_limits(settings)
        self._writer_thread = WriterThread()
        self.store = open_store(settings, clock, limits, self._handoff)
        self.database = self.store.database
        self.database.watch_space(Space(self.database.path))
        self.waiting = Waiting(self.store, RESPONSE_BYTES_MAX)
        self.metrics = Metrics()
        self.observer = Observer(self.metrics, self.store, self.waiting)
        self.ingest: Ingest = build_ingest(settings, self.store, self.metrics)
        self.departures = Departures(self.ingest)
        self.looking = Looking(self.store)
        self.upkeep = Upkeep(self.store)
        self.server = rpc.build(
            self._services(),
            secrets=[secret.get_secret_value() for secret in settings.grpc_shared_secret],
            healthy=self.healthy,
            message_bytes_max=settings.message_bytes_max,
            observe=self.observer.called,
        )
        self.port = 0
        self._tasks: dict[str, asyncio.Task[object]] = {}
        self._serving = False
        self._began = clock.mono_ms()
        self._exposition: Exposition | None = None

    def _services(self) -> dict[str, dict[str, rpc.Method]]:
        consumers = Consumers(self.store, self.waiting)
        admin = Admin(
            self.store,
            self.waiting,
            consumers.roster,
            describe=self._describe,
            admit=self.ingest.direct.admission.admit,
            lag=self.ingest.lag,
        )
        services: dict[str, dict[str, rpc.Method]] = {
            rpc.CONSUMER: rpc.consumer_methods(consumers),
            rpc.PRODUCER: {"SendTasks": self._send_tasks},
            rpc.ADMIN: rpc.admin_methods(admin) | self.departures.methods() | self.looking.methods(),
        }
        if self.settings.v1_service == "on":
            services[rpc.TASKBROKER_V1] = rpc.taskbroker_methods(consumers)
        return services

    async def _send_tasks(self, request: bytes) -> bytes:
        try:
            return await self.ingest.direct.send(request)
        except IntakePaused as paused:
            raise Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, str(paused)) from None
        except Draining as draining:
            raise Refused(grpc.StatusCode.UNAVAILABLE, str(draining)) from None
        except InvalidRequest as invalid:
            raise Refused(grpc.StatusCode.INVALID_ARGUMENT, str(invalid)) from None

    def _describe(self, status: admin_pb2.GetStatusResponse) -> None:
        """What an operator is told beside what the store knows."""
        status.broker_id = self.settings.broker_id
        status.version = __version__
        status.uptime_seconds = (self.store.clock.mono_ms() - self._began) / 1000
        status.healthy = self.healthy()
        disk = disk_usage(self.database.path)
        status.database_bytes, status.wal_bytes, status.disk_free_bytes = disk
        self.ingest.describe(status)

    async def _handoff(self, work: Callable[[A], T], of: A) -> T:
        begun = time.perf_counter()
        done = await self._writer_thread.run(work, of)
        if isinstance(of, Batch):
            self.observer.written(of, time.perf_counter() - begun)
        return done

    def healthy(self) -> bool:
        """The writer commits, the chores run, the database is open. Kafka is no part of it."""
        alive = all(not task.done() for task in self._tasks.values())
        writer = self.store.writer
        return self._serving and alive and writer.trouble is None and not writer.hangs()

    # -- in this order

    async def start(self) -> None:
        settings = self.settings
        # What can be claimed is in memory before anybody asks.
        await self.store.writer.catch_up()
        self._run("writer", self.store.writer.run())
        self._run("upkeep", self.upkeep.run())
        try:
            self.port = self.server.add_insecure_port(settings.grpc_address)
        except RuntimeError:
            raise FatalError(
                f"cannot listen on {settings.grpc_address}: the port is in use,"
                " or the address is not this machine's",
                "stop what listens there, or set grpc_port (TASKBROKER_GRPC_PORT)",
            ) from None
        self._exposition = expose(
            self.metrics,
            settings.metrics_addr,
            settings.metrics_port,
            must=not settings.metrics_port_is_default,
        )
        await self.ingest.start()
        await self.server.start()
        self._serving = True
        log.info(
            "serving",
            grpc=f"{settings.grpc_addr}:{self.port}",
            database=str(settings.db_path),
            ingest=settings.ingest,
            rows=self.store.memory.rows,
            epoch=self.store.epoch,
            loop=type(asyncio.get_running_loop()).__module__,
        )

    def _run(self, name: str, work: Coroutine[None, None, None]) -> None:
        self._tasks[name] = asyncio.create_task(work, name=name)

    async def run_until(self, stopping: asyncio.Event) -> None:
        """Until told to stop. Raises FatalError when a part that everything depends on has ended."""
        stop: asyncio.Task[object] = asyncio.create_task(stopping.wait())
        failed: asyncio.Task[object] = asyncio.create_task(self.ingest.failed(), name="ingest")
        parts: list[asyncio.Task[object]] = [stop, failed, *self._tasks.values()]
        done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
        for task in (stop, failed):
            task.cancel()
        for task in done - {stop}:
            error = task.exception()
            if isinstance(error, FatalError):
                raise error
            log.error("a part of the broker has failed", part=task.get_name(), exc_info=error)
            raise FatalError(
                f"{task.get_name()} has failed: {error!r}; nothing was acknowledged that is not durable",
                "the log has the details; start the broker again once the cause is gone",
            )
        log.info("stopping", seconds_max=self.settings.shutdown_seconds)

    # -- in the reverse order

    async def stop(self) -> None:
        """Answer open polls empty, take no more, write what has gathered, commit offsets, let go."""
        self._serving = False
        await self.departures.stop()
        self.waiting.close()
        await self.ingest.stop_intake()
        await self.server.stop(DRAIN_CALLS_SECONDS)
        await self.looking.stop()
        await self.ingest.stop()
        if (upkeep := self._tasks.get("upkeep")) is not None:
            upkeep.cancel()
        self.store.writer.stop()
        if (writer := self._tasks.get("writer")) is not None:
            with contextlib.suppress(Exception):  # told by run_until
                await writer
        if self._exposition is not None:
            self._exposition.close()
        self._writer_thread.stop()
        self.database.close()
        if self.port:
            log.info("stopped", rows=self.store.memory.rows)
