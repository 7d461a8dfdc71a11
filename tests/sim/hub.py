"""Virtual time: one queue of events for all machines, and processes whose event loops and threads run in it.

Nothing here waits: the hub jumps to the next event. Every choice is drawn from one seeded generator, so a
seed is a history.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import random
import threading
from asyncio import events
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from greenlet import GreenletExit, getcurrent, greenlet

EPOCH_MS = 1_700_000_000_000
LAST_LINES = 60


class Event:
    """Something that happens at a time, unless it is cancelled before."""

    __slots__ = ("run", "when")

    def __init__(self, when: float, run: Callable[[], object] | None) -> None:
        self.when = when
        self.run = run

    def cancel(self) -> None:
        self.run = None


class Hub:
    """Time in seconds from 0, the queue, the generator and the history."""

    def __init__(self, seed: int, directory: Path) -> None:
        """``directory``: where the files are. It is another one each time, and no part of the history."""
        self.seed = seed
        self._directory = str(directory)
        self.random = random.Random(seed)
        self.now = 0.0
        self.steps = 0
        # Whose code runs.
        self.process: Process | None = None
        self.thread: Thread | None = None
        self._heap: list[tuple[float, float, int, Event]] = []
        self._pushed = 0
        self._greenlet = getcurrent()
        # Called after each event.
        self.after: Callable[[], None] = lambda: None
        self.lines: deque[str] = deque(maxlen=LAST_LINES)
        self._hash = blake2b(digest_size=16)
        self._finished = False
        self.processes: list[Process] = []
        # A defect of the simulation itself, or of what ran in it.
        self.error: BaseException | None = None

    def at(self, when: float, run: Callable[[], object]) -> Event:
        """Of events at the same time, the seed says which is first."""
        event = Event(max(when, self.now), run)
        self._pushed += 1
        heapq.heappush(self._heap, (event.when, self.random.random(), self._pushed, event))
        return event

    def later(self, seconds: float, run: Callable[[], object]) -> Event:
        return self.at(self.now + seconds, run)

    def run(self, until: float, done: Callable[[], bool] = lambda: False) -> None:
        """Until that time, or until ``done``."""
        heap = self._heap
        while heap and heap[0][0] <= until and not done():
            when, _, _, event = heapq.heappop(heap)
            if event.run is None:
                continue
            self.now = when
            self.steps += 1
            event.run()
            if self.error is not None:
                raise self.error
            self.after()
        if not done():
            self.now = max(self.now, until)

    def switch(self) -> None:
        """On a thread: let others run."""
        self._greenlet.switch()

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.random.random()

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    # -- the history

    def tell(self, who: str, what: str) -> None:
        if self._finished:
            return
        line = f"{self.now:12.6f} {who:<10} {what}".replace(self._directory, "")
        self.lines.append(line)
        self._hash.update(line.encode())

    def finish(self) -> None:
        """The history is over; what is torn down now is no part of it."""
        self._finished = True
        for process in self.processes:
            process.kill()

    def digest(self) -> str:
        """Equal for equal histories."""
        return self._hash.hexdigest()


class Process:
    """A process on a machine of its own: an event loop and threads, which stop together."""

    def __init__(self, hub: Hub, name: str) -> None:
        self.hub = hub
        self.name = name
        self.alive = True
        # Nothing of it runs until then; and nothing on its event loop until then.
        self.stopped_until = 0.0
        self.blocked_until = 0.0
        self.loop = Loop(self)
        self.threads: list[Thread] = []
        self.on_death: list[Callable[[], None]] = []
        hub.processes.append(self)

    def later(self, seconds: float, run: Callable[[], object]) -> Event:
        """Have ``run`` called then as code of this process."""
        return self.hub.later(seconds, lambda: self.enter(run))

    def enter(self, run: Callable[[], object], earliest: float = 0.0) -> None:
        if not self.alive:
            return
        hub = self.hub
        not_before = max(self.stopped_until, earliest)
        if not_before > hub.now:
            hub.at(not_before, lambda: self.enter(run))
            return
        hub.process = self
        try:
            run()
        finally:
            hub.process = None

    def kill(self) -> None:
        """It vanishes: nothing of it runs any more."""
        if not self.alive:
            return
        self.alive = False
        for callback in self.on_death:
            callback()
        for task in asyncio.all_tasks(self.loop):
            task._log_destroy_pending = False  # type: ignore[attr-defined]
        for thread in self.threads:
            thread.kill()


class Loop(asyncio.BaseEventLoop):
    """The event loop of a process, stepped by the hub."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        self._selector = _NoFiles()
        self.process = process
        self._next: Event | None = None
        self._stepping = False
        self.set_exception_handler(self._on_exception)
        self.failures: list[str] = []

    def time(self) -> float:
        return self.process.hub.now

    def _on_exception(self, loop: object, context: dict[str, Any]) -> None:
        text = f"{context.get('message')}: {context.get('exception')!r}"
        if self.process.alive:
            self.failures.append(text)
            self.process.hub.tell(self.process.name, f"unhandled: {text}")

    # BaseEventLoop's, all that is put into the loop comes through these two.

    def _call_soon(self, callback: Any, args: Any, context: Any) -> Any:
        handle = super()._call_soon(callback, args, context)  # type: ignore[misc]
        self._wake(self.process.hub.now)
        return handle

    def call_at(  # type: ignore[override]
        self, when: float, callback: Any, *args: Any, context: Any = None
    ) -> Any:
        timer = super().call_at(when, callback, *args, context=context)
        self._wake(when)
        return timer

    def _wake(self, when: float) -> None:
        if self._stepping or not self.process.alive:
            return
        if self._next is not None:
            if self._next.when <= when:
                return
            self._next.cancel()
        self._next = self.process.hub.at(when, self._enter)

    def _enter(self) -> None:
        self._next = None
        process = self.process
        if process.blocked_until > process.hub.now:
            self._wake(process.blocked_until)
        else:
            process.enter(self._step)

    def _step(self) -> None:
        self._stepping = True
        self._thread_id = threading.get_ident()
        events._set_running_loop(self)
        try:
            self._run_once()  # type: ignore[attr-defined]
        finally:
            events._set_running_loop(None)
            self._thread_id = None  # type: ignore[assignment]
            self._stepping = False
        hub = self.process.hub
        if self._ready:  # type: ignore[attr-defined]
            # What was done took a moment, in which others go on.
            self._wake(hub.now + hub.between(0, 0.00005))
        elif self._scheduled:  # type: ignore[attr-defined]
            self._wake(self._scheduled[0]._when)  # type: ignore[attr-defined]

    def _check_closed(self) -> None:
        """What the dead leave behind is torn down without complaint."""

    def _process_events(self, event_list: Sequence[object]) -> None:
        pass

    def _write_to_self(self) -> None:
        pass

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:  # type: ignore[override]
        """On a thread of the process."""
        future = self.create_future()

        def work() -> None:
            try:
                result = func(*args)
            except Exception as error:  # noqa: BLE001 - whoever waits is told
                self.call_soon_threadsafe(settle, future, None, error)
            else:
                self.call_soon_threadsafe(settle, future, result, None)

        Thread(self.process, work, name="executor").start()
        return future

    def run_main(self, main: Any) -> asyncio.Task[Any]:
        """Start a coroutine; it runs as time passes."""
        task = self.create_task(main)
        task.add_done_callback(self._on_done)
        return task

    def _on_done(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and task.exception() is not None:
            self.process.hub.error = task.exception()


def settle(future: asyncio.Future[Any], result: object, error: BaseException | None) -> None:
    """Unless it is."""
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)


class _NoFiles:
    def select(self, timeout: float | None) -> list[object]:
        return []

    def close(self) -> None:
        pass


class Thread:
    """A thread of a process: it runs until it waits."""

    def __init__(self, process: Process, target: Callable[[], object], name: str = "") -> None:
        self.process = process
        self.name = name
        self.finished = False
        self._target = target
        self._greenlet = greenlet(self._run)
        self._wakeup: Event | None = None
        self._waiting = True
        self.joiners: list[Thread] = []
        process.threads.append(self)

    def start(self) -> None:
        self._wakeup = self.process.later(self.process.hub.between(0, 0.0001), self._resume)

    def _run(self) -> None:
        try:
            self._target()
        except GreenletExit:
            pass
        finally:
            self.finished = True
            self.process.threads.remove(self)
            for thread in self.joiners:
                thread.wake()

    def _resume(self) -> None:
        if self.finished:
            return
        self._wakeup = None
        self._waiting = False
        hub = self.process.hub
        hub.thread = self
        try:
            self._greenlet.switch()
        finally:
            hub.thread = None

    def wait(self, seconds: float | None) -> None:
        """On this thread: until woken, or for that long."""
        hub = self.process.hub
        assert hub.thread is self, "only the thread itself can wait"
        if not self.process.alive:
            raise GreenletExit
        self._waiting = True
        if seconds is not None:
            self._wakeup = self.process.later(max(seconds, 0), self._resume)
        hub.switch()

    def wake(self) -> None:
        if not self._waiting or self.finished or not self.process.alive:
            return
        self._waiting = False
        if self._wakeup is not None:
            self._wakeup.cancel()
        self._wakeup = self.process.later(self.process.hub.between(0, 0.00005), self._resume)

    def kill(self) -> None:
        hub = self.process.hub
        hub.thread = self
        try:
            self._greenlet.throw(GreenletExit)
        finally:
            hub.thread = None


class SimClock:
    """The clocks of a machine; they may jump, and run apart from those of others."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self.ahead_ms = 0
        # What is due once stays so when the clock is set back.
        self._latest_ms = 0
        self._mono_start = hub.random.randrange(1_000, 1_000_000_000)

    def wall_ms(self) -> int:
        return EPOCH_MS + int(self._hub.now * 1000) + self.ahead_ms

    @contextlib.contextmanager
    def at_latest(self) -> Iterator[None]:
        """For what asks whether something has become due."""
        ahead, self.ahead_ms = self.ahead_ms, self.ahead_ms + self.latest_ms() - self.wall_ms()
        try:
            yield
        finally:
            self.ahead_ms = ahead

    def jump(self, ahead_ms: int) -> None:
        self._latest_ms = self.latest_ms()
        self.ahead_ms = ahead_ms

    def latest_ms(self) -> int:
        """The latest wall clock that it has ever shown."""
        return max(self._latest_ms, self.wall_ms())

    def mono_ms(self) -> int:
        return self._mono_start + int(self._hub.now * 1000)
