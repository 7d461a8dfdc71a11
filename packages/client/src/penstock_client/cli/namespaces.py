"""``penstock namespaces``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import typer

from penstock_client.cli.apps import routes
from penstock_client.cli.brokers import Broker, Brokers, me
from penstock_client.cli.failures import NOT_FOUND, USAGE, Failure
from penstock_client.cli.options import (
    DEFAULT_BROKERS,
    ApplicationOption,
    BrokersOption,
    OutputOption,
)
from penstock_client.cli.output import Output, plain, say, show_json, show_table, span, when
from penstock_client.errors import nearest
from penstock_protocol.v1 import admin_pb2 as pb

commands = typer.Typer(no_args_is_help=True, help="Namespaces: what waits in them, and pausing them.")

# Longer than any poll waits: who has not asked for this long is not there.
UNASKED_SECONDS = 120

NamespaceArgument = Annotated[str, typer.Argument(metavar="[APPLICATION/]NAMESPACE")]


@commands.command("ls")
def ls(
    rpc_host_list: BrokersOption = DEFAULT_BROKERS,
    output: OutputOption = Output.TABLE,
    app: Annotated[
        str | None,
        typer.Option(metavar="MODULE:APP", help="Show where this App sends its namespaces; asks no broker."),
    ] = None,
) -> None:
    """List the namespaces of the brokers: what waits, who is paused or not asked for, and the books.

    A difference of the books other than 0 means that tasks are unaccounted for.

    Examples: penstock namespaces ls; penstock namespaces ls --app shop.tasks:app
    """
    if app is not None:
        _show_routes(app, output)
        return
    with Brokers(rpc_host_list) as brokers:
        found = list(_namespaces(brokers))
        if output is Output.JSON:
            show_json(
                [
                    {
                        "broker": broker.address,
                        **plain(namespace),
                        "books": {term.term: term.tasks for term in namespace.books},
                    }
                    for broker, namespace in found
                ]
            )
        else:
            heads = ("NAMESPACE", "PENDING", "DELAYED", "RUNNING", "LEAVING", "OLDEST", "DONE", "DEAD")
            show_table((*heads, "STATE", "BOOKS", "BROKER"), [_row(*entry) for entry in found])
        brokers.complete()


def _row(broker: Broker, namespace: pb.NamespaceStatus) -> tuple[object, ...]:
    books = {term.term: term.tasks for term in namespace.books}
    dead = sum(tasks for term, tasks in books.items() if term.startswith("dead:"))
    return (
        f"{namespace.application}/{namespace.namespace}",
        namespace.pending,
        namespace.delayed,
        namespace.processing,
        namespace.forwarding,
        span(namespace.oldest_pending_seconds) if namespace.pending else None,
        books.get("done", 0) + books.get("done:ignored", 0),
        dead,
        _state(namespace),
        "balance" if not namespace.books_difference else f"WRONG BY {namespace.books_difference}",
        broker.address,
    )


def _state(namespace: pb.NamespaceStatus) -> str:
    if namespace.HasField("paused_at"):
        return f"paused since {when(namespace.paused_at)}"
    if namespace.pending and namespace.unasked_seconds >= UNASKED_SECONDS:
        return f"no worker asks, for {span(namespace.unasked_seconds)}"
    return "open"


def _namespaces(brokers: Brokers) -> Iterator[tuple[Broker, pb.NamespaceStatus]]:
    # What was refused at admission belongs to no namespace.
    for broker, first in brokers.each(
        "ListNamespaces", pb.ListNamespacesRequest(), pb.ListNamespacesResponse
    ):
        page = first
        while True:
            yield from ((broker, namespace) for namespace in page.namespaces)
            if not page.HasField("next_after"):
                break
            request = pb.ListNamespacesRequest(after=page.next_after)
            page = broker.call("ListNamespaces", request, pb.ListNamespacesResponse)


@commands.command()
def pause(
    namespace: NamespaceArgument,
    rpc_host_list: BrokersOption = DEFAULT_BROKERS,
    output: OutputOption = Output.TABLE,
    application: ApplicationOption = None,
) -> None:
    """Hand out no task of a namespace, on all brokers given, over restarts too, until it is resumed.

    Tasks are accepted and kept meanwhile; those that run, run on.

    Example: penstock namespaces pause shop/payments
    """
    _switch("PauseNamespace", namespace, application, rpc_host_list, output)


@commands.command()
def resume(
    namespace: NamespaceArgument,
    rpc_host_list: BrokersOption = DEFAULT_BROKERS,
    output: OutputOption = Output.TABLE,
    application: ApplicationOption = None,
) -> None:
    """Hand out the tasks of a namespace again.

    Example: penstock namespaces resume shop/payments
    """
    _switch("ResumeNamespace", namespace, application, rpc_host_list, output)


def _switch(method: str, name: str, application: str | None, rpc_host_list: str, output: Output) -> None:
    pausing = method == "PauseNamespace"
    with Brokers(rpc_host_list) as brokers:
        application, namespace = _find(name, application, brokers)
        request: pb.PauseNamespaceRequest | pb.ResumeNamespaceRequest
        answer: type[pb.PauseNamespaceResponse] | type[pb.ResumeNamespaceResponse]
        if pausing:
            request, answer = pb.PauseNamespaceRequest(), pb.PauseNamespaceResponse
        else:
            request, answer = pb.ResumeNamespaceRequest(), pb.ResumeNamespaceResponse
        request.application, request.namespace, request.by = application, namespace, me()
        done = []
        for broker, told in brokers.each(method, request, answer):
            entry = {
                "broker": broker.address,
                "application": application,
                "namespace": namespace,
                "paused": pausing,
                "changed": told.changed,
                "pending": told.pending,
            }
            done.append(entry)
            if output is Output.TABLE:
                before = "" if told.changed else " already"
                what = "paused" if pausing else "open"
                say(f"{application}/{namespace} is{before} {what} on {broker.address}; {told.pending} wait")
        if output is Output.JSON:
            show_json(done)
        brokers.complete()


def _find(name: str, application: str | None, brokers: Brokers) -> tuple[str, str]:
    """(application, namespace) of what a person named. Raises Failure naming the nearest."""
    known = sorted({(n.application, n.namespace) for _, n in _namespaces(brokers)})
    fitting = [
        pair
        for pair in known
        if name in (pair[1], "/".join(pair)) and (application is None or pair[0] == application)
    ]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        several = ", ".join("/".join(pair) for pair in fitting)
        raise Failure(f"{name!r} may be any of {several}", "name the application, too", USAGE)
    names = ["/".join(pair) for pair in known]
    near = nearest(name, names) or nearest(name, [pair[1] for pair in known])
    raise Failure(
        f"no broker has a namespace {name!r}" + (f"; did you mean {near!r}?" if near else ""),
        "a broker knows a namespace from its first task on; next: penstock namespaces ls",
        NOT_FOUND,
    )


def _show_routes(app: str, output: Output) -> None:
    found = routes(app)
    if output is Output.JSON:
        show_json(found)
        return
    show_table(
        ("NAMESPACE", "TOPIC", "ROUTE FROM", "TASKS"),
        [(route["namespace"], route["topic"], route["origin"], ", ".join(route["tasks"])) for route in found],
    )
