"""``penstock workers ls``."""

from __future__ import annotations

import typer

from penstock_client.cli.brokers import Brokers
from penstock_client.cli.options import DEFAULT_BROKERS, BrokersOption, OutputOption
from penstock_client.cli.output import Output, plain, show_json, show_table, span
from penstock_protocol.v1 import admin_pb2 as pb

commands = typer.Typer(no_args_is_help=True, help="The workers that brokers have seen lately.")


@commands.callback()
def _workers() -> None:
    """The workers that brokers have seen lately."""


@commands.command("ls")
def ls(rpc_host_list: BrokersOption = DEFAULT_BROKERS, output: OutputOption = Output.TABLE) -> None:
    """List the workers each broker has seen within ten minutes, what they serve and what they hold.

    Example: penstock workers ls -o json
    """
    with Brokers(rpc_host_list) as brokers:
        answers = brokers.each("ListWorkers", pb.ListWorkersRequest(), pb.ListWorkersResponse)
        found = [(broker, worker) for broker, answer in answers for worker in answer.workers]
        if output is Output.JSON:
            show_json([{"broker": broker.address, **plain(worker)} for broker, worker in found])
        else:
            show_table(
                ("WORKER", "HOST", "PID", "VERSION", "SERVES", "SLOTS", "HOLDS", "STARTED", "SEEN", "BROKER"),
                [
                    (
                        worker.worker_id,
                        worker.hostname,
                        str(worker.pid),
                        worker.version,
                        serves(worker),
                        worker.slots,
                        worker.holds,
                        worker.started,
                        f"{span(worker.seen_seconds_ago)} ago",
                        broker.address,
                    )
                    for broker, worker in found
                ],
            )
        brokers.complete()


def serves(worker: pb.WorkerStatus) -> str:
    """What it asks for."""
    if not worker.HasField("application"):
        return "everything"
    return f"{worker.application}/{','.join(worker.namespaces) or '*'}"
