"""The application under test. Each start and end of a task is a line in a file of its process."""

from __future__ import annotations

import os
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
    line = f"{what} {ctx.id} {ctx.attempt} {ctx.namespace} {time.time():.6f}\n"
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

    @namespace.task(name="flaky", bind=True, retry=Retry(max_attempts=4, backoff=Fixed(0.3)))
    def flaky(ctx: TaskContext, /, failures: int) -> None:
        record("start", ctx)
        if ctx.attempt <= failures:
            raise RuntimeError(f"failure {ctx.attempt} of {failures}")
        record("end", ctx)

    @namespace.task(name="patient", bind=True, retry=Retry(max_attempts=3, backoff=Fixed(8)))
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


if RECORDS in os.environ:  # a worker imports it
    app = make_app()
