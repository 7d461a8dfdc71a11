"""The command `penstock-worker`."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from penstock_worker import __version__
from penstock_worker.logs import LogFormat, LogLevel
from penstock_worker.settings import (
    DEFAULT_BROKERS,
    DEFAULT_GRACE_SECONDS,
    EXIT_USAGE,
    HANDED_OVER,
    SLOTS_MAX,
    Settings,
    SettingsError,
    parse_brokers,
    secret_from,
    split_app_path,
)

commands = typer.Typer(
    help="Runs the tasks of an application.", no_args_is_help=True, pretty_exceptions_enable=False
)


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
            log_level=log_level,
            log_format=log_format,
        )
    except SettingsError as error:
        typer.echo(f"penstock-worker: {error}", err=True)
        raise typer.Exit(EXIT_USAGE) from None
    _become_a_worker(settings.handed_over())


def _become_a_worker(handed: str) -> None:
    """In a process that has imported nothing yet: to read a command line typer imports pydantic, which would
    stay as long as the worker runs, 11 MB of 62."""
    if sys.platform == "win32":
        # Nothing there becomes another program.
        from penstock_worker.running import run

        run(handed)
    else:
        os.execv(sys.executable, [sys.executable, "-P", "-m", "penstock_worker", HANDED_OVER, handed])


def main() -> None:
    commands()
