"""The application under test. Each start and end of a task is a line in a file of its process."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

from penstock_client import App, Exponential, Fixed, Namespace, Retry, TaskContext

RECORDS = "PENSTOCK_E2E_RECORDS"
_files: dict[int, int] = {}


def record(what: str, ctx: TaskContext) -> None:
    """One O_APPEND write: whole, whatever kills us next."""
    pid = os.getpid()
    if pid not in _files:
        path = Path(os.environ[RECORDS]) / f"{pid}.log"
        _files[pid] = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    # The true time, also where a test shifts what time.time() says.
    at = time.clock_gettime(time.CLOCK_REALTIME)
    line = f"{what} {ctx.id} {ctx.attempt} {ctx.namespace} {at:.6f}\n"
    os.write(_files[pid], line.encode())


def make_app(**how: Any) -> App:
    """The application, sending through Kafka (``kafka=``, ``topic=``) or to a broker (``broker=``)."""
    app = App("e2e", strict_kwargs="off", queues=("main", "raw", "flood", "quiet", "other"), **how)
    for name in ("main", "raw", "flood", "quiet", "other"):
        _declare(app, name)
    return app


def _declare(app: App, name: str) -> None:
    namespace = app.namespace(name, retry=None)
    prefix = "" if name == "main" else f"{name}."

    @namespace.task(name=f"{prefix}noop", bind=True)
    def noop(ctx: TaskContext, /, n: int = 0) -> None:
        record("start", ctx)
        record("end", ctx)

    @namespace.task(name=f"{prefix}sleep", bind=True)
    def sleep(ctx: TaskContext, /, seconds: float) -> None:
        record("start", ctx)
        time.sleep(seconds)
        record("end", ctx)

    if name == "main":
        _declare_main(namespace)


def _declare_main(namespace: Namespace) -> None:
    @namespace.task(name="wait_for", bind=True, deadline=120)
    def wait_for(ctx: TaskContext, /, path: str) -> None:
        """Blocks until a file is there."""
        record("start", ctx)
        while not Path(path).exists():
            time.sleep(0.02)
        record("end", ctx)

    @namespace.task(name="needs", bind=True)
    def needs(ctx: TaskContext, /, path: str) -> None:
        """Fails until a file is there."""
        record("start", ctx)
        if not Path(path).exists():
            raise RuntimeError(f"{path} is missing")
        record("end", ctx)

    @namespace.task(name="flaky", bind=True, retry=Retry(max_attempts=4, backoff=Fixed(0.3)))
    def flaky(ctx: TaskContext, /, failures: int) -> None:
        record("start", ctx)
        if ctx.attempt <= failures:
            raise RuntimeError(f"failure {ctx.attempt} of {failures}")
        record("end", ctx)

    @namespace.task(name="patient", bind=True, retry=Retry(max_attempts=3, backoff=Fixed(15)))
    def patient(ctx: TaskContext, /) -> None:
        """Fails once."""
        record("start", ctx)
        if ctx.attempt == 1:
            raise RuntimeError("not yet")
        record("end", ctx)

    @namespace.task(
        name="hopeless", bind=True, retry=Retry(max_attempts=3, backoff=Exponential(0.05, jitter=0))
    )
    def hopeless(ctx: TaskContext, /) -> None:
        record("start", ctx)
        raise ValueError("it never works")

    @namespace.task(
        name="unimportant", bind=True, retry=Retry(max_attempts=2, backoff=Fixed(0.05), on_exceeded="discard")
    )
    def unimportant(ctx: TaskContext, /) -> None:
        record("start", ctx)
        raise ValueError("nobody minds")

    @namespace.task(name="stuck", bind=True, deadline=1)
    def stuck(ctx: TaskContext, /) -> None:
        record("start", ctx)
        time.sleep(3600)

    _declare_fatal(namespace)


def _declare_fatal(namespace: Namespace) -> None:
    """Tasks that take their process with them."""

    @namespace.task(name="exit", bind=True)
    def exit_(ctx: TaskContext, /) -> None:
        record("start", ctx)
        os._exit(3)

    @namespace.task(name="crash", bind=True)
    def crash(ctx: TaskContext, /) -> None:
        record("start", ctx)
        ctypes.string_at(0)

    @namespace.task(name="recurse", bind=True)
    def recurse(ctx: TaskContext, /) -> None:
        """Through C, where the interpreter does not count: it runs out of stack."""
        record("start", ctx)
        call: Any = ctypes.CFUNCTYPE(None)(lambda: call())
        sys.setrecursionlimit(1 << 30)
        call()

    @namespace.task(name="bomb", bind=True)
    def bomb(ctx: TaskContext, /) -> None:
        """All memory there is, of a limited amount; then what the kernel does to such a process."""
        record("start", ctx)
        resource.setrlimit(resource.RLIMIT_AS, (1 << 29, resource.RLIM_INFINITY))
        held = []
        try:
            while True:
                held.append(bytearray(16 << 20))
        except MemoryError:
            os.kill(os.getpid(), signal.SIGKILL)

    @namespace.task(name="stuck_in_c", bind=True, deadline=1)
    def stuck_in_c(ctx: TaskContext, /) -> None:
        """Holding the interpreter's lock: no Python code of this process runs any more, no signal handler."""
        record("start", ctx)
        ctypes.PyDLL(None).sleep(3600)


if RECORDS in os.environ:  # a worker imports it
    app = make_app()
