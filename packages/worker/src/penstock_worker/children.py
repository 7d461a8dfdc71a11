"""Keeping as many children alive as there are slots."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import structlog

from penstock_worker.frames import FromChild, LoadFailed, Ready, Stop
from penstock_worker.metrics import Metrics
from penstock_worker.process import Child, Death, KillReason, State

# Children that cannot load the application any more are started again this slowly.
RELOAD_SECONDS_FIRST, RELOAD_SECONDS_MAX = 1.0, 30.0
# For what the interpreter does at its exit, like sending what tasks have produced.
EXIT_SECONDS_MAX = 5.0

log = structlog.get_logger("penstock_worker")


class ApplicationError(Exception):
    """The user's application cannot be loaded; the message is for people."""


class Children:
    """The processes of a pool. One that dies is replaced at once; if it died before it had loaded
    the application, more and more slowly."""

    def __init__(
        self,
        app_path: str,
        on_message: Callable[[Child, FromChild], None],
        on_ready: Callable[[], None],
        on_death: Callable[[Child, Death], None],
        metrics: Metrics,
    ) -> None:
        # Set by the first that has the application, or by its failure.
        self.loaded: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self._app_path, self._metrics = app_path, metrics
        self._said, self._readied, self._died = on_message, on_ready, on_death
        self._children: list[Child] = []
        self._starts: set[asyncio.Task[None]] = set()
        self._reload_failures = 0
        # Whether one that dies is followed by another.
        self.replacing = True

    def __iter__(self) -> Iterator[Child]:
        return iter(self._children)

    def ready(self) -> list[Child]:
        """Those that can be given tasks."""
        return [child for child in self._children if child.state is State.READY and not child.kill_reason]

    def cannot_load(self) -> bool:
        """Whether the last that was started has failed to load the application."""
        return self._reload_failures > 0

    def start(self, slots: int) -> None:
        """Start this many; `loaded` tells when the first has the application."""
        for _ in range(slots):
            self._spawn()

    def _spawn(self) -> None:
        if not self.replacing:
            return
        child = Child(self._on_message, self._on_death)
        self._children.append(child)
        start = asyncio.get_running_loop().create_task(self._start(child))
        self._starts.add(start)
        start.add_done_callback(self._starts.discard)

    async def _start(self, child: Child) -> None:
        try:
            await child.start(self._app_path)
        except OSError as error:
            log.error("a child process cannot be started", cause=str(error))
            self._children.remove(child)
            self._spawn_later()

    def _spawn_later(self) -> None:
        delay = min(RELOAD_SECONDS_MAX, RELOAD_SECONDS_FIRST * 2 ** min(self._reload_failures, 10))
        self._reload_failures += 1
        asyncio.get_running_loop().call_later(delay, self._spawn)

    def _on_message(self, child: Child, message: FromChild) -> None:
        match message:
            case Ready():
                self._ready(child, message)
            case LoadFailed():
                self._load_failed(message)
            case _:
                self._said(child, message)

    def _ready(self, child: Child, message: Ready) -> None:
        if not self.replacing:
            # Too late: the worker is stopping.
            return
        child.state = State.READY
        self._reload_failures = 0
        if not self.loaded.done():
            self.loaded.set_result(message)
        self._readied()

    def _load_failed(self, message: LoadFailed) -> None:
        if self.loaded.done():
            log.error("a new child cannot load the application", cause=message.message)
        else:
            self.loaded.set_exception(ApplicationError(message.message))

    def _on_death(self, child: Child, death: Death) -> None:
        self._children.remove(child)
        was, child.state = child.state, State.DEAD
        if was is State.STARTING:
            if not self.loaded.done():
                self.loaded.set_exception(
                    ApplicationError(f"A child process {death} while it was loading the application.")
                )
            self._spawn_later()
        elif was is State.READY:
            self._metrics.child_restarted(child.kill_reason.value if child.kill_reason else "died")
            log.warning("child process gone, starting another", pid=child.pid, how=str(death))
            self._spawn()
        self._died(child, death)

    def kill_all(self) -> None:
        """The grace time is over."""
        for child in list(self._children):
            child.kill(KillReason.GRACE_OVER)

    async def close(self) -> None:
        """Let all exit; kill those that do not, and leave behind those that cannot be killed."""
        self.replacing = False
        await asyncio.gather(*self._starts)
        children = list(self._children)
        for child in children:
            if child.state is not State.READY:
                child.kill(KillReason.GRACE_OVER)
            child.state = State.STOPPING
            child.send(Stop())
        if await _all_dead(children):
            return
        log.warning("child processes did not exit and are killed", seconds=EXIT_SECONDS_MAX)
        for child in children:
            child.kill(KillReason.GRACE_OVER)
        if not await _all_dead(children):
            pids = [child.pid for child in children if child.state is not State.DEAD]
            log.error(
                "child processes cannot be killed and are left behind",
                pids=pids,
                hint="do they hang in the kernel, or belong to another user?",
            )


async def _all_dead(children: list[Child]) -> bool:
    """Whether all died within `EXIT_SECONDS_MAX`."""
    try:
        async with asyncio.timeout(EXIT_SECONDS_MAX):
            await asyncio.gather(*(child.wait_dead() for child in children))
    except TimeoutError:
        return False
    return True
