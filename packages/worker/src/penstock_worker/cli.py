"""The command `penstock-worker`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from enum import StrEnum
from typing import Annotated, NoReturn, TextIO, cast

import structlog
import typer

from penstock_worker import __version__
from penstock_worker.settings import (
    DEFAULT_BROKERS,
    DEFAULT_GRACE_SECONDS,
    SLOTS_MAX,
    Settings,
    SettingsError,
    parse_brokers,
    secret_from,
    split_app_path,
)

EXIT_APPLICATION = 1
EXIT_USAGE = 2

commands = typer.Typer(
    help="Runs the tasks of an application.", no_args_is_help=True, pretty_exceptions_enable=False
)


class LogFormat(StrEnum):
    CONSOLE = "console"
    JSON = "json"


class LogLevel(StrEnum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"penstock-worker {__version__}")
        raise typer.Exit


@commands.callback()
def penstock_worker(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Runs the tasks of an application."""


@commands.command()
def run(  # noqa: PLR0913 - options of a command line, named by whoever calls it
    app: Annotated[str, typer.Argument(metavar="MODULE:APP", help="Where the App is: shop.tasks:app.")],
    rpc_host_list: Annotated[
        str, typer.Option(help="Brokers: HOST:PORT,HOST:PORT.", envvar="PENSTOCK_RPC_HOST_LIST")
    ] = DEFAULT_BROKERS,
    concurrency: Annotated[
        int,
        typer.Option(min=1, max=SLOTS_MAX, help="Tasks at a time, each in a process of its own."),
    ] = os.cpu_count() or 1,
    namespace: Annotated[
        list[str] | None, typer.Option(help="Serve only this namespace; may be repeated. Default: all.")
    ] = None,
    grace_seconds: Annotated[
        float, typer.Option(min=0, help="How long running tasks may go on after SIGTERM.")
    ] = DEFAULT_GRACE_SECONDS,
    metrics_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Serve Prometheus metrics here.")
    ] = None,
    metrics_addr: Annotated[str, typer.Option(help="Address the metrics are served on.")] = "127.0.0.1",
    log_level: Annotated[LogLevel, typer.Option(help="The least severe lines shown.")] = LogLevel.INFO,
    log_format: Annotated[LogFormat, typer.Option(help="For people or for machines.")] = LogFormat.CONSOLE,
) -> None:
    """Fetch tasks from brokers and execute them, until SIGTERM or Ctrl-C.

    Example: penstock-worker run shop.tasks:app --rpc-host-list broker-0:50051,broker-1:50051 --concurrency 4

    The secret that calls are signed with is read from TASKBROKER_GRPC_SHARED_SECRET.
    """
    try:
        split_app_path(app)
        settings = Settings(
            app_path=app,
            brokers=parse_brokers(rpc_host_list),
            slots=concurrency,
            namespaces=tuple(namespace or ()),
            grace_seconds=grace_seconds,
            secret=secret_from(os.environ),
            metrics_addr=metrics_addr,
            metrics_port=metrics_port,
        )
    except SettingsError as error:
        _leave(str(error), EXIT_USAGE)
    configure_logs(log_level, log_format)
    _run(settings)


def _run(settings: Settings) -> None:
    # Nothing is held yet: until the worker listens to signals itself, one of them just ends it.
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(0))
    # Here, so that `--help` does not wait for gRPC.
    from penstock_worker.children import ApplicationError
    from penstock_worker.worker import Worker

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


def configure_logs(level: LogLevel, log_format: LogFormat) -> None:
    """structlog to stderr, for people or as JSON lines."""
    renderer: structlog.typing.Processor = structlog.processors.JSONRenderer()
    if log_format is LogFormat.CONSOLE:
        renderer = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
        logger_factory=structlog.PrintLoggerFactory(cast("TextIO", _Stream(sys.stderr))),
        cache_logger_on_first_use=True,
    )


class _Stream:
    """A text stream whose failures are nobody's trouble: its reader may be gone, its disk full."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


def _leave(message: str, code: int) -> NoReturn:
    typer.echo(f"penstock-worker: {message}", err=True)
    raise typer.Exit(code)


def main() -> None:
    commands()
