"""A worker: builds the parts, starts them in order, stops them in order."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from time import monotonic
from typing import Any, cast
from uuid import uuid4

import structlog

from penstock_protocol.v1 import consumer_pb2 as pb
from penstock_worker import __version__
from penstock_worker.children import EXIT_SECONDS_MAX
from penstock_worker.claim import Claim
from penstock_worker.fetcher import Fetcher, Wish
from penstock_worker.frames import Outcome, Ready
from penstock_worker.heartbeat import keep_alive
from penstock_worker.link import BrokerLink
from penstock_worker.metrics import Metrics
from penstock_worker.pool import Pool
from penstock_worker.reporter import WAITING_REPORTS_MAX, Reporter
from penstock_worker.settings import Settings

# An application that is not there after this long is said to be waited for.
LOADING_SECONDS = 10.0
# For the last reports, beyond the grace time.
FLUSH_SECONDS_MAX = 5.0

log = structlog.get_logger("penstock_worker")


class Worker:
    """Runs tasks until a signal says stop; the second signal kills what runs."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._id = f"{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:8]}"
        self._metrics = Metrics()
        self._stop = asyncio.Event()
        self._kill = asyncio.Event()
        self._failure: BaseException | None = None
        self._fetcher: Fetcher | None = None
        self._links = [BrokerLink(address, settings.secret) for address in settings.brokers]
        self._reporters = {link: Reporter(link, self._id, self._metrics) for link in self._links}
        self._pool = Pool(settings.app_path, settings.slots, self._settle, self._wanted, self._metrics)

    async def run(self) -> None:
        """Work until SIGTERM or SIGINT.

        Raises: ApplicationError when the application cannot be loaded; OSError when the metrics
        port is taken.
        """
        settings = self._settings
        if settings.metrics_port is not None:
            self._metrics.serve(settings.metrics_addr, settings.metrics_port)
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._failed)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        self._pool.children.start(settings.slots)
        try:
            ready = await self._loaded()
            if ready is not None:
                await self._work(ready)
        finally:
            await self._close()
        if self._failure is not None:
            raise self._failure

    async def _loaded(self) -> Ready | None:
        """The application once a child has it; None: told to stop before."""
        stop = asyncio.create_task(self._stop.wait())
        first: set[asyncio.Future[Any]] = {self._pool.children.loaded, stop}
        while not (await asyncio.wait(first, timeout=LOADING_SECONDS, return_when=asyncio.FIRST_COMPLETED))[
            0
        ]:
            log.warning(
                "still waiting for a child to load the application",
                application=self._settings.app_path,
                hint="what do its modules do when they are imported?",
            )
        stop.cancel()
        return self._pool.children.loaded.result() if self._pool.children.loaded.done() else None

    async def _work(self, ready: Ready) -> None:
        settings = self._settings
        log.info(
            "application loaded",
            application=ready.application,
            tasks=[f"{namespace}: {name}" for namespace, name in ready.tasks],
            slots=settings.slots,
            brokers=list(settings.brokers),
            worker_id=self._id,
        )
        if not ready.tasks:
            log.warning("no task is registered", hint="name their modules: App(..., imports=['shop.tasks'])")
        unknown = sorted(set(settings.namespaces) - {namespace for namespace, _ in ready.tasks})
        if unknown:
            log.warning("no task is in a namespace that was asked for", namespaces=unknown)
        self._fetcher = self._build_fetcher(ready.application)
        fetching = asyncio.create_task(self._fetcher.run())
        background = [
            asyncio.create_task(keep_alive(link, self._id, self._pool.revoke)) for link in self._links
        ]
        background.append(asyncio.create_task(self._pool.watch()))
        stop = asyncio.create_task(self._stop.wait())
        done, _ = await asyncio.wait({stop, fetching, *background}, return_when=asyncio.FIRST_COMPLETED)
        try:
            await self._drain(self._fetcher)
        finally:
            for task in (stop, fetching, *background):
                task.cancel()
        for task in done:
            # None of them ends by itself: an error in one is an error of the worker.
            task.result()

    def _build_fetcher(self, application: str) -> Fetcher:
        identity = pb.WorkerIdentity(
            worker_id=self._id,
            hostname=socket.gethostname(),
            pid=os.getpid(),
            version=__version__,
            slots=self._settings.slots,
        )
        return Fetcher(
            self._links,
            Wish(application, self._settings.namespaces, identity),
            self._pool.room,
            self._pool.add,
            lambda link: self._reporters[link].waiting() < WAITING_REPORTS_MAX,
            self._metrics,
        )

    async def _drain(self, fetcher: Fetcher) -> None:
        """Nothing new, what waits goes back, what runs may finish, everything is reported."""
        grace_seconds = self._settings.grace_seconds
        log.info(
            "stopping", running=self._pool.running, grace_seconds=grace_seconds, hint="a second signal kills"
        )
        stopped_at = monotonic()
        self._pool.stop_starting()
        last_polls = asyncio.create_task(fetcher.stop())
        if not await self._idle_within(grace_seconds):
            log.warning("grace time is over, killing what still runs", running=self._pool.running)
            self._pool.children.kill_all()
            # Not for ever: what hangs in the kernel cannot be killed.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._pool.wait_idle(), EXIT_SECONDS_MAX)
        await last_polls
        left_seconds = max(FLUSH_SECONDS_MAX, grace_seconds - (monotonic() - stopped_at))
        if self._kill.is_set():
            left_seconds = FLUSH_SECONDS_MAX
        left = await asyncio.gather(*(reporter.flush(left_seconds) for reporter in self._reporters.values()))
        log.info("stopped", unanswered_reports=sum(left))

    async def _idle_within(self, seconds: float) -> bool:
        """Whether all running tasks ended in this time, and before a second signal."""
        idle = asyncio.create_task(self._pool.wait_idle())
        kill = asyncio.create_task(self._kill.wait())
        await asyncio.wait({idle, kill}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        kill.cancel()
        idle.cancel()
        return idle.done()

    async def _close(self) -> None:
        await self._pool.children.close()
        for reporter in self._reporters.values():
            reporter.close()
        for link in self._links:
            await link.close()

    def _failed(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """A mistake of ours, in no matter which part: stop in order rather than go on with a part missing."""
        error = context.get("exception")
        if error is None:
            loop.default_exception_handler(context)
            return
        self._failure = self._failure or error
        self._stop.set()
        log.error("internal error, stopping", error=repr(error), what=context["message"])

    def stop(self) -> None:
        """Finish what runs within the grace time, then return from `run`; called again: kill it."""
        if self._stop.is_set():
            self._kill.set()
        self._stop.set()

    def _settle(self, claim: Claim, outcome: Outcome) -> None:
        reporter = self._reporters[claim.link]
        # Short tasks come in numbers: their reports wait a moment for company.
        reporter.lingering = self._pool.prefetch > 1
        reporter.settle(claim, outcome)
        if outcome.error is not None:
            _log_error(claim, outcome)

    def _wanted(self) -> None:
        if self._fetcher is not None:
            self._fetcher.wake()


def _log_error(claim: Claim, outcome: Outcome) -> None:
    if outcome.error is None:
        return
    if outcome.release_reason:
        log.warning("task given back", task=claim.title, reason=outcome.error.message)
        return
    status = pb.TaskOutcomeStatus.Name(cast("pb.TaskOutcomeStatus", outcome.status))
    log.warning(
        "task did not succeed",
        task=claim.title,
        attempt=claim.assignment.attempt,
        outcome=status.removeprefix("TASK_OUTCOME_STATUS_").lower(),
        error=f"{outcome.error.type}: {outcome.error.message}",
        traceback=outcome.error.traceback,
        retry_delay_ms=outcome.retry_delay_ms,
    )
