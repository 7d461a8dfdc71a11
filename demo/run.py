"""`make demo`: a broker, a pool of workers and a producer, at work before your eyes. Needs no Kafka."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import report
import starts
from processes import Counts, DemoFailed, Part, counts, free_ports, how_it_ended
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

ROOT = Path(__file__).parent.parent
PLACE = ROOT / ".demo"
BIN = Path(sys.executable).parent

CHILDREN = 4
BURST_TASKS = 20_000
DAY_TASKS, DAY_TASKS_PER_SECOND = 1_500, 300
PAYMENTS, SLOW, DELAYED, HOPELESS, STUCK = 60, 24, 1, 1, 1
COUNTDOWN_SECONDS = 3

LOOK_SECONDS = 0.1
READY_SECONDS_MAX = 60.0
# Nothing finished for this long: something is wrong. More than the broker needs to notice a dead worker.
STALL_SECONDS_MAX = 30.0
STARTS_IN_USE_MAX = 5


class Screen:
    """Progress bars on a terminal, lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextlib.contextmanager
    def stage(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """A piece of work; yields how to say how much of it is done."""
        if not self.console.is_interactive:
            self.console.print(f"  {title} ...")
            begun = time.monotonic()
            yield lambda done: None
            self.console.print(f"  {title}: all done after {time.monotonic() - begun:.1f} s")
            return
        columns = TextColumn("  {task.description:<32}"), BarColumn(bar_width=24), MofNCompleteColumn()
        with Progress(*columns, TimeElapsedColumn(), console=self.console) as bars:
            bar = bars.add_task(title, total=total)
            yield lambda done: bars.update(bar, completed=done)


class Demo:
    """Everything that runs, and what it is asked to do."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._parts: list[Part] = []
        self._metrics_port = 0
        self._sent = 0

    # -- the processes

    def start(self) -> str:
        """A broker, and then workers; the broker's address."""
        port = self._start_broker()
        address = f"127.0.0.1:{port}"
        marks = PLACE / "starts"
        marks.mkdir()
        command = [str(BIN / "penstock-worker"), "run", "shop:app", "--rpc-host-list", address]
        command += ["--concurrency", str(CHILDREN), "--grace-seconds", "2"]
        environment = {**os.environ, starts.DIRECTORY: str(marks)}
        self._parts.append(
            Part(
                "worker", command, directory=ROOT / "demo", environment=environment, log=PLACE / "worker.log"
            )
        )
        self._until(lambda: len(list(marks.iterdir())) >= CHILDREN, "the worker's processes are not ready")
        return address

    def _start_broker(self) -> int:
        log = PLACE / "broker.log"
        for last in (*[False] * (STARTS_IN_USE_MAX - 1), True):
            port, self._metrics_port = free_ports(2)
            command = [str(BIN / "penstock-broker"), "serve", "--ingest", "grpc"]
            command += ["--grpc-port", str(port), "--metrics-port", str(self._metrics_port)]
            command += ["--db-path", str(PLACE / "broker.sqlite")]
            broker = Part("broker", command, directory=PLACE, environment=os.environ, log=log)
            self._parts = [broker]
            try:
                self._until(lambda: counts(self._metrics_port).serving, "the broker is not ready")
                return port
            except DemoFailed:
                broker.stop()
                # Somebody was quicker: that port was free a moment ago.
                if last or "in use" not in log.read_text(errors="replace"):
                    raise
        raise AssertionError("the last try returns or raises")

    def _until(self, ready: Callable[[], bool], otherwise: str) -> None:
        give_up_at = time.monotonic() + READY_SECONDS_MAX
        while not ready():
            self._check()
            if time.monotonic() > give_up_at:
                raise DemoFailed(f"{otherwise} after {READY_SECONDS_MAX:.0f} s", self._parts[-1].log)
            time.sleep(LOOK_SECONDS)

    def stop(self) -> None:
        """Workers first, then the broker. Raises DemoFailed if one did not stop as it should."""
        failure = None
        while self._parts:
            part = self._parts.pop()
            code = part.stop()
            if code:
                failure = DemoFailed(
                    f"the {part.name} did not stop as it should: {how_it_ended(code)}", part.log
                )
        if failure is not None:
            raise failure

    # -- the work

    def burst(self) -> float:
        """As many as can be sent at once; the seconds it took to send them."""
        import shop

        with self._screen.stage(f"{BURST_TASKS:,} orders at once", BURST_TASKS) as show:
            begun = time.monotonic()
            for order in range(BURST_TASKS):
                shop.confirm.delay(order, "burst")
                if order % 2000 == 0:
                    show(counts(self._metrics_port).done)
            self._flush()
            seconds = time.monotonic() - begun
            self._finish(BURST_TASKS, show)
        return seconds

    def day(self) -> None:
        """Orders at a steady rate, so that latency is not the length of a queue."""
        import shop

        for order in range(DELAYED):
            shop.thank.options(countdown=COUNTDOWN_SECONDS).delay(order)
        title = f"{DAY_TASKS:,} orders, {DAY_TASKS_PER_SECOND} a second"
        with self._screen.stage(title, DAY_TASKS) as show:
            begun = time.monotonic()
            for order in range(DAY_TASKS):
                time.sleep(max(0.0, begun + order / DAY_TASKS_PER_SECOND - time.monotonic()))
                shop.confirm.delay(order, "day")
                if order % 30 == 0:
                    show(order)
            self._flush()
            self._finish(DAY_TASKS, show, others=DELAYED)

    def trouble(self) -> None:
        """What goes wrong in real life."""
        import shop

        tasks = PAYMENTS + SLOW + HOPELESS + STUCK
        with self._screen.stage("slow, failing, hanging, hopeless", tasks) as show:
            shop.forecast.delay()
            shop.invoice.delay(4711)
            for order in range(PAYMENTS):
                shop.charge.delay(order)
            for page in range(SLOW):
                shop.scan.delay(page)
            self._flush()
            self._finish(tasks, show)

    def _flush(self) -> None:
        """Until the broker has acknowledged everything."""
        import shop

        give_up_at = time.monotonic() + STALL_SECONDS_MAX
        while left := shop.app.flush(LOOK_SECONDS):
            self._check()
            if time.monotonic() > give_up_at:
                raise DemoFailed(f"the broker has not acknowledged {left} tasks", PLACE / "broker.log")

    def _check(self) -> None:
        for part in self._parts:
            part.check()

    def _finish(self, tasks: int, show: Callable[[int], None], others: int = 0) -> None:
        """Until the broker has counted all of them as done or dead."""
        before, self._sent = self._sent, self._sent + tasks + others
        finished, changed_at = -1, time.monotonic()
        while finished < self._sent:
            self._check()
            now: Counts = counts(self._metrics_port)
            if now.done + now.dead != finished:
                finished, changed_at = now.done + now.dead, time.monotonic()
            show(max(0, min(tasks, finished - before)))
            if time.monotonic() - changed_at > STALL_SECONDS_MAX:
                raise DemoFailed(
                    f"{self._sent - finished} of {self._sent} tasks are not finished, and none was for"
                    f" {STALL_SECONDS_MAX:.0f} s",
                    PLACE / "worker.log",
                )
            if finished < self._sent:
                time.sleep(LOOK_SECONDS)


def prepare() -> None:
    """An empty place for this run, held by a lock; nothing of the caller's settings."""
    try:
        empty_place()
    except OSError as error:
        raise DemoFailed(f"cannot prepare {PLACE}: {error.strerror}") from None
    # What the producer's side has to say.
    logging.basicConfig(filename=PLACE / "producer.log")
    # Settings of the caller's shell are for other brokers; and none of this goes through a proxy.
    for name in [name for name in os.environ if name.startswith(("TASKBROKER_", "PENSTOCK_"))]:
        del os.environ[name]
    os.environ["no_proxy"] = "127.0.0.1"


def empty_place() -> None:
    PLACE.mkdir(exist_ok=True)
    # Held until this process ends.
    lock = os.open(PLACE / "lock", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DemoFailed("another demo is running in this directory; wait for its end, or stop it") from None
    for path in PLACE.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


def run(console: Console) -> None:
    """The demo from beginning to end. Raises DemoFailed."""
    prepare()
    console.print("[bold]Penstock[/]: a broker, a pool of workers and a producer, without Kafka\n")
    screen = Screen(console)
    demo = Demo(screen)
    try:
        with console.status("starting") if console.is_interactive else contextlib.nullcontext():
            address = demo.start()
        console.print(f"  broker   on {address}, stores in {shown(PLACE / 'broker.sqlite')}")
        console.print(f"  workers  {CHILDREN} processes, running demo/shop.py\n")
        # The application reads it when it is imported.
        os.environ["PENSTOCK_BROKER"] = address
        send_seconds = demo.burst()
        demo.day()
        demo.trouble()
    except BaseException:
        with contextlib.suppress(DemoFailed):
            uninterrupted(demo.stop)
        raise
    uninterrupted(demo.stop)
    report.show(console, PLACE, send_seconds=send_seconds, day_rate=DAY_TASKS_PER_SECOND)


def uninterrupted(work: Callable[[], None]) -> None:
    """Stopping takes seconds at most, and must not be left half done."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    work()


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    console = Console(highlight=False)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    try:
        run(console)
    except KeyboardInterrupt:
        console.print("\nStopped before its end; the broker and the workers are stopped too.")
        return 130
    except DemoFailed as failure:
        console.print(f"\n[red]The demo has failed[/]: {escape(str(failure))}.", soft_wrap=True)
        for line in failure.last_lines():
            console.print(f"    {escape(line)}", soft_wrap=True)
        if failure.log is not None:
            console.print(
                f"Next: read {shown(failure.log)}, correct the cause, and type: make demo", soft_wrap=True
            )
        return 1
    return 0


if __name__ == "__main__":
    exit_code = main()
    sys.stdout.flush()
    if exit_code:
        # The client would wait at the exit for a broker that is gone.
        os._exit(exit_code)
