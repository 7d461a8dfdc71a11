"""What a worker's process does once its command line is read."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import NoReturn

from penstock_worker import logs
from penstock_worker.children import ApplicationError
from penstock_worker.settings import EXIT_USAGE, Settings, take_over
from penstock_worker.worker import Worker

EXIT_APPLICATION = 1


def run(handed: str) -> None:
    """Run a worker until SIGTERM or Ctrl-C. ``handed``: `Settings.handed_over`."""
    # Nothing is held yet: until the worker listens to signals itself, one of them just ends it.
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(0))
    settings = take_over(handed, os.environ)
    logs.configure(logs.LogLevel(settings.log_level), logs.LogFormat(settings.log_format))
    _work(settings)


def _work(settings: Settings) -> None:
    async def work() -> None:
        await Worker(settings).run()

    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(work())
    except ApplicationError as error:
        _leave(str(error), EXIT_APPLICATION)
    except OSError as error:
        if settings.metrics_port is None:
            raise
        _leave(
            f"Cannot serve metrics on {settings.metrics_addr}:{settings.metrics_port}: {error}. Choose"
            " another --metrics-port.",
            EXIT_USAGE,
        )


def _loop_factory() -> type[asyncio.AbstractEventLoop] | None:
    if sys.platform == "win32":
        return None
    import uvloop

    return uvloop.Loop


def _leave(message: str, code: int) -> NoReturn:
    sys.stderr.write(f"penstock-worker: {message}\n")
    sys.exit(code)
