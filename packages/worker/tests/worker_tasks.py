"""The application the tests' workers run. What a task did is seen in files."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from penstock_client import App, Fixed, Retry, TaskContext

if "WORKER_TASKS_BROKEN" in os.environ and Path(os.environ["WORKER_TASKS_BROKEN"]).exists():
    raise RuntimeError("broken for now")

app = App("worker-tests", broker="127.0.0.1:1", strict_kwargs="off")
tests = app.namespace(
    "tests",
    retry=Retry(
        max_attempts=3,
        backoff=Fixed(2.5),
        on=(ConnectionError,),
        exclude=(ConnectionResetError,),
        ignore=(KeyError,),
    ),
)


@tests.task(name="noop")
def noop(**kwargs: object) -> None:
    pass


@tests.task(name="write")
def write(path: str, text: str, **kwargs: object) -> None:
    with Path(path).open("a") as file:
        file.write(f"{text} {os.getpid()}\n")


@tests.task(name="bound", bind=True)
def bound(ctx: TaskContext, /, path: str, **kwargs: object) -> None:
    token = ctx.claim_token.decode()
    Path(path).write_text(f"{ctx.id} {ctx.taskname} {ctx.namespace} {ctx.attempt} {token}")


@tests.task(name="coroutine")
async def coroutine(path: str, **kwargs: object) -> None:
    await asyncio.sleep(0)
    Path(path).write_text(str(id(asyncio.get_running_loop())))  # noqa: ASYNC240


@tests.task(name="block")
def block(path: str, **kwargs: object) -> None:
    """Runs until the file appears."""
    Path(path + ".started").write_text(str(os.getpid()))
    while not Path(path).exists():
        time.sleep(0.005)


@tests.task(name="stuck_in_c")
def stuck_in_c(path: str, **kwargs: object) -> None:
    Path(path).write_text(str(os.getpid()))
    # Holds the GIL.
    ctypes.PyDLL(None).sleep(600)


@tests.task(name="raise")
def raise_(kind: str, **kwargs: object) -> None:
    kinds = {
        "retry": ConnectionError("try again"),
        "exclude": ConnectionResetError("never again"),
        "ignore": KeyError("whatever"),
        "fail": ValueError("broken \ud800"),
        "exit": SystemExit(3),
        "interrupt": KeyboardInterrupt(),
    }
    raise kinds[kind]


@tests.task(name="retry_later", bind=True)
def retry_later(ctx: TaskContext, /, **kwargs: object) -> None:
    raise ctx.retry(countdown=7)


@tests.task(name="die")
def die(how: str, **kwargs: object) -> None:
    if how == "exit":
        os._exit(17)
    os.kill(os.getpid(), getattr(signal, how))


@tests.task(name="leave_behind")
def leave_behind(path: str, **kwargs: object) -> None:
    """Starts a process that would go on for long, and dies."""
    null = subprocess.DEVNULL
    left = subprocess.Popen(["sleep", "600"], stdin=null, stdout=null, stderr=null)
    Path(path).write_text(str(left.pid))
    os._exit(17)


@tests.task(name="fork")
def fork(how: str, path: str, **kwargs: object) -> None:
    """Ends in both processes, each in its way; the file says how the forked one ended."""
    pid = os.fork()
    if pid:
        Path(path).write_text(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
    elif how == "exit":
        sys.exit(3)
    elif how == "raise":
        raise ValueError("in the forked process")


@tests.task(name="two_arguments")
def two_arguments(first: int, second: int) -> None:
    pass
