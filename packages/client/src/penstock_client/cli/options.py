"""Options that commands share."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from penstock_client.cli.failures import NOT_CONFIRMED, Failure
from penstock_client.cli.output import Output

DEFAULT_BROKERS = "127.0.0.1:50051"

BrokersOption = Annotated[
    str,
    typer.Option(
        "--rpc-host-list",
        metavar="HOST:PORT,…",
        help="The brokers of the pool.",
        envvar=["PENSTOCK_RPC_HOST_LIST", "PENSTOCK_BROKER"],
    ),
]
OutputOption = Annotated[Output, typer.Option("--output", "-o", help="For people or for programs.")]
ApplicationOption = Annotated[str | None, typer.Option("--application", "-a", help="Only this application.")]
NamespaceOption = Annotated[str | None, typer.Option("--namespace", "-n", help="Only this namespace.")]
TasknameOption = Annotated[str | None, typer.Option("--taskname", "-t", help="Only tasks of this name.")]
LimitOption = Annotated[int, typer.Option("--limit", min=1, max=1_000_000, help="Show at most so many.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def confirm(question: str, yes: bool) -> None:
    """Ask, unless told not to. Without a terminal the answer is no. Raises Failure."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise Failure(f"{question} Nothing was done", "say --yes to do it without being asked", NOT_CONFIRMED)
    if not typer.confirm(question, err=True):
        raise Failure("nothing was done", code=NOT_CONFIRMED)
