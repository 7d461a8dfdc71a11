"""The application of the end-to-end tests. What a task did is in the ledger (ledger.py)."""

from __future__ import annotations

import ctypes
import functools
import os
import time
from collections.abc import Callable
from pathlib import Path

from penstock_client import App, Fixed, Retry, TaskContext

LEDGER = "E2E_LEDGER"
BACKOFF_SECONDS = 1


@functools.cache
def _page() -> int:
    """This process's file in the ledger."""
    name = f"{os.getpid()}-{time.time_ns()}"
    return os.open(Path(os.environ[LEDGER]) / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


def _enter(what: str, ctx: TaskContext) -> None:
    """One line, in one write, so that it is there whole or not at all, whatever kills the process."""
    line = f"{what} {ctx.id} {ctx.attempt} {os.getpid()} {time.time():.6f} {ctx.taskname}\n"
    os.write(_page(), line.encode())


def recorded(fn: Callable[..., None]) -> Callable[..., None]:
    """Enter the start of each execution in the ledger, and its end if it returns."""

    @functools.wraps(fn)
    def run(ctx: TaskContext, /, *args: object, **kwargs: object) -> None:
        _enter("began", ctx)
        fn(ctx, *args, **kwargs)
        _enter("ended", ctx)

    return run


def work(ctx: TaskContext, number: int = 0, *, seconds: float = 0.0, **kwargs: object) -> None:
    if seconds:
        time.sleep(seconds)


def hold(ctx: TaskContext, path: str, **kwargs: object) -> None:
    """Runs until the file exists."""
    while not Path(path).exists():
        time.sleep(0.01)


def stuck(ctx: TaskContext, **kwargs: object) -> None:
    while True:
        time.sleep(1)


def stuck_in_c(ctx: TaskContext, **kwargs: object) -> None:
    # Holds the interpreter's lock: nothing in the process can stop it.
    ctypes.PyDLL(None).sleep(600)


def flaky(ctx: TaskContext, failures: int, **kwargs: object) -> None:
    if ctx.attempt <= failures:
        raise ConnectionError(f"failure {ctx.attempt} of {failures}")


def fails(ctx: TaskContext, how: str, **kwargs: object) -> None:
    raise {"retry": ConnectionError, "fail": ValueError, "ignore": KeyError}[how](f"told to: {how}")


class Tasks:
    """The tasks, registered with an app: the workers' own, or one a test sends with."""

    def __init__(self, app: App) -> None:
        self.app = app
        plain = app.namespace("plain", retry=None, deadline=60)
        self.work = plain.task(name="e2e.work", bind=True)(recorded(work))
        self.hold = plain.task(name="e2e.hold", bind=True)(recorded(hold))
        self.stuck = plain.task(name="e2e.stuck", bind=True, deadline=1)(recorded(stuck))
        self.stuck_in_c = plain.task(name="e2e.stuck_in_c", bind=True, deadline=1)(recorded(stuck_in_c))
        # The same work, in namespaces that a test gives a topic of their own.
        self.flood = app.namespace("flood", retry=None).task(name="e2e.flood", bind=True)(recorded(work))
        self.moving = app.namespace("moving", retry=None).task(name="e2e.moving", bind=True)(recorded(work))

        policy = functools.partial(
            Retry,
            max_attempts=3,
            backoff=Fixed(BACKOFF_SECONDS),
            on=(ConnectionError,),
            exclude=(ValueError,),
            ignore=(KeyError,),
        )
        retries = app.namespace("retries", retry=policy())
        self.flaky = retries.task(name="e2e.flaky", bind=True)(recorded(flaky))
        self.fails = retries.task(name="e2e.fails", bind=True)(recorded(fails))
        discarding = policy(on_exceeded="discard", backoff=Fixed(0))
        self.discarded = retries.task(name="e2e.discarded", bind=True, retry=discarding)(recorded(fails))


APPLICATION = "e2e"
app = Tasks(App(APPLICATION, strict_kwargs="off")).app
