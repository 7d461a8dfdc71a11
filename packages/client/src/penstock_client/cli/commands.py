"""The command line."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

import penstock_client
from penstock_client.cli import dlq, namespaces, status, tasks, workers
from penstock_client.cli.failures import EXIT_CODES, Failure
from penstock_client.cli.output import say
from penstock_client.errors import AppError

app = typer.Typer(
    name="penstock",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=EXIT_CODES,
)
app.add_typer(tasks.commands, name="tasks")
app.add_typer(namespaces.commands, name="namespaces")
app.add_typer(dlq.commands, name="dlq")
app.add_typer(workers.commands, name="workers")
app.command(name="status")(status.status)
app.command(name="explain")(tasks.explain)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"penstock {penstock_client.__version__}")
        raise typer.Exit


@app.callback()
def penstock(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """See and steer what the brokers of a pool hold.

    The brokers are named with --rpc-host-list or PENSTOCK_RPC_HOST_LIST; calls are signed with
    TASKBROKER_GRPC_SHARED_SECRET.
    """


def main() -> None:
    # gRPC's own lines on stderr say in other words what the errors below say.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        app()
    except Failure as failure:
        _tell(failure.text, failure.hint)
        sys.exit(failure.code)
    except AppError as error:
        _tell(str(error), "")
        sys.exit(2)
    except BrokenPipeError:
        # Whoever read the output has enough.
        sys.stderr.close()
        sys.exit(0)


def _tell(text: str, hint: str) -> None:
    say(f"penstock: {text}", error=True)
    if hint:
        say(f"  {hint}", error=True)
