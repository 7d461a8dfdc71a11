"""``penstock tasks`` and ``penstock explain``."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from itertools import islice
from typing import Annotated, Any

import typer

from penstock_client.cli import letters
from penstock_client.cli.brokers import Broker, Brokers, me
from penstock_client.cli.failures import NOT_FOUND, USAGE, WRONG, Failure
from penstock_client.cli.options import (
    DEFAULT_BROKERS,
    ApplicationOption,
    BrokersOption,
    LimitOption,
    NamespaceOption,
    OutputOption,
    TasknameOption,
    YesOption,
    confirm,
)
from penstock_client.cli.output import (
    Output,
    Progress,
    plain,
    say,
    show_facts,
    show_json,
    show_table,
    size,
    span,
    when,
    word,
)
from penstock_protocol.payload import decode_parameters
from penstock_protocol.v1 import admin_pb2 as pb
from penstock_protocol.v1.activation_pb2 import TaskActivation

commands = typer.Typer(no_args_is_help=True, help="Tasks that brokers hold.")

STATES = ("pending", "delayed", "processing", "forwarding")
PAGE = 500
CALL_IDS = 500
# Between two looks at how many tasks are before one.
LOOK_SECONDS = 1.0

StateOption = Annotated[
    str | None, typer.Option("--state", "-s", help=f"Only tasks in this state: {', '.join(STATES)}.")
]
IdsArgument = Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="Ids of tasks.")]


def task_filter(
    application: str | None, namespace: str | None, taskname: str | None, state: str | None
) -> pb.TaskFilter:
    """Raises Failure for a state that is none."""
    if state is not None and state not in STATES:
        raise Failure(f"{state!r} is no state", f"states are {', '.join(STATES)}", USAGE)
    number = STATES.index(state) + 1 if state else 0
    return pb.TaskFilter(
        application=application, namespace=namespace, taskname=taskname, state=pb.TaskState.Name(number)
    )


def held_tasks(brokers: Brokers, wanted: pb.TaskFilter) -> Iterator[tuple[Broker, pb.HeldTask]]:
    """All that match, oldest first on each broker."""
    first = pb.ListTasksRequest(filter=wanted, limit=PAGE)
    for broker, answer in brokers.each("ListTasks", first, pb.ListTasksResponse):
        page = answer
        while True:
            yield from ((broker, task) for task in page.tasks)
            if not page.HasField("next_after_seq"):
                break
            request = pb.ListTasksRequest(filter=wanted, limit=PAGE, after_seq=page.next_after_seq)
            page = broker.call("ListTasks", request, pb.ListTasksResponse)


@commands.command("ls")
def ls(
    rpc_host_list: BrokersOption = DEFAULT_BROKERS,
    output: OutputOption = Output.TABLE,
    application: ApplicationOption = None,
    namespace: NamespaceOption = None,
    taskname: TasknameOption = None,
    state: StateOption = None,
    limit: LimitOption = 50,
) -> None:
    """List tasks, oldest first.

    Example: penstock tasks ls --namespace payments --state delayed
    """
    wanted = task_filter(application, namespace, taskname, state)
    with Brokers(rpc_host_list) as brokers:
        found = list(islice(held_tasks(brokers, wanted), limit + 1))
        shown = found[:limit]
        if output is Output.JSON:
            show_json([{"broker": broker.address, **_task_json(task)} for broker, task in shown])
        else:
            show_table(
                (
                    "ID",
                    "NAMESPACE",
                    "TASK",
                    "STATE",
                    "ATTEMPTS",
                    "LOST",
                    "RECEIVED",
                    "READY",
                    "WORKER",
                    "BROKER",
                ),
                [
                    (
                        task.id,
                        f"{task.application}/{task.namespace}",
                        task.taskname,
                        _state(task),
                        f"{task.attempts}/{max(1, task.max_attempts)}",
                        task.deliveries_lost,
                        when(task.received_at),
                        when(task.ready_at),
                        task.worker_id,
                        broker.address,
                    )
                    for broker, task in shown
                ],
            )
            if len(found) > limit:
                typer.echo(f"... and more: --limit {limit * 10}, or a filter", err=True)
        brokers.complete()


def _state(task: pb.HeldTask) -> str:
    return word(task.DESCRIPTOR.fields_by_name["state"], task.state)


def _task_json(task: pb.HeldTask) -> dict[str, Any]:
    return {**plain(task), "error": json.loads(task.error) if task.error else None}


@commands.command()
def show(
    id: Annotated[str, typer.Argument(metavar="ID")],
    rpc_host_list: BrokersOption = DEFAULT_BROKERS,
    output: OutputOption = Output.TABLE,
    arguments: Annotated[
        bool, typer.Option("--arguments", help="Also its arguments, which may be confidential.")
    ] = False,
) -> None:
    """Show all that a broker knows of a task it holds.

    Example: penstock tasks show 0197e0a2-... --arguments
    """
    with Brokers(rpc_host_list) as brokers:
        request = pb.AdminServiceGetTaskRequest(id=id)
        for broker, answer in brokers.each("GetTask", request, pb.AdminServiceGetTaskResponse):
            if answer.HasField("task"):
                _show_task(broker, answer, output, arguments)
                return
        brokers.complete()
        raise not_held(id)


def not_held(id: str) -> Failure:
    return Failure(
        f"no broker holds a task {id!r}",
        f"what became of it, as far as it is known: penstock explain {id}; penstock dlq show {id}",
        NOT_FOUND,
    )


def _show_task(
    broker: Broker, answer: pb.AdminServiceGetTaskResponse, output: Output, arguments: bool
) -> None:
    task = answer.task
    values = {"broker": broker.address, **_task_json(task)}
    values |= activation_facts(answer.activation, arguments)
    if output is Output.JSON:
        show_json(values)
        return
    for name in ("received_at", "ready_at", "expires_at", "started_at"):
        values[name] = when(values[name])
    values["bytes"] = size(task.bytes)
    values["error"] = error_text(values["error"])
    show_facts(
        (name.replace("_", " "), json.dumps(value) if isinstance(value, dict | list) else value)
        for name, value in values.items()
        if value not in (None, "", {}, "-", False)
    )


def activation_facts(value: bytes, arguments: bool) -> dict[str, Any]:
    """Headers, and the arguments if they are wanted."""
    try:
        activation = TaskActivation.FromString(value)
    except ValueError:  # DecodeError is one
        return {}
    facts: dict[str, Any] = {"headers": dict(activation.headers)}
    if arguments:
        try:
            args, kwargs = decode_parameters(activation)
            facts["arguments"] = {"args": repr(args), "kwargs": repr(kwargs)}
        except ValueError as error:
            facts["arguments"] = {"unreadable": str(error)}
    return facts


def error_text(error: dict[str, Any] | None) -> str:
    """Type and message, and below them the traceback."""
    if not error:
        return ""
    head = f"{error.get('type', '')}: {error.get('message', '')}".strip(": ")
    return head + (f"\n{error['traceback']}" if error.get("traceback") else "")


@commands.command()
def cancel(
    ids: IdsArgument = None,
    rpc_host_list: BrokersOption = DEFAULT_BROKERS,
    output: OutputOption = Output.TABLE,
    application: ApplicationOption = None,
    namespace: NamespaceOption = None,
    taskname: TasknameOption = None,
    state: StateOption = None,
    yes: YesOption = False,
) -> None:
    """Cancel tasks by their ids, or all that match a filter, which are counted first.

    One that runs is killed: its worker learns so from its next heartbeat, within seconds.

    Examples: penstock tasks cancel 0197e0a2-...; penstock tasks cancel -n reports -s delayed --yes
    """
    with Brokers(rpc_host_list) as brokers:
        chosen = _chosen(brokers, ids, task_filter(application, namespace, taskname, state), "cancel", yes)
        words = pb.CancelTasksResponse.DESCRIPTOR.fields_by_name["results"]
        results: dict[str, str] = {}
        progress = Progress("cancel", len(chosen))
        for chunk in _chunks(chosen):
            request = pb.CancelTasksRequest(ids=chunk, by=me())
            for _, answer in brokers.each("CancelTasks", request, pb.CancelTasksResponse):
                _merge(results, chunk, [word(words, result) for result in answer.results])
            progress.add(len(chunk))
        progress.end()
        _report(results, ("cancelled", "killed"), output)
        brokers.complete()


@commands.command()
def retry(
    ids: IdsArgument = None,
    rpc_host_list: BrokersOption = DEFAULT_BROKERS,
    output: OutputOption = Output.TABLE,
    application: ApplicationOption = None,
    namespace: NamespaceOption = None,
    taskname: TasknameOption = None,
    yes: YesOption = False,
) -> None:
    """Start now what waits for its delay or back-off; what is a dead letter by now is replayed.

    Without ids all delayed tasks that match the filter, which are counted first.

    Examples: penstock tasks retry 0197e0a2-...; penstock tasks retry --namespace payments
    """
    with Brokers(rpc_host_list) as brokers:
        wanted = task_filter(application, namespace, taskname, "delayed")
        chosen = _chosen(brokers, ids, wanted, "retry", yes)
        words = pb.RetryTasksResponse.DESCRIPTOR.fields_by_name["results"]
        results: dict[str, str] = {}
        for chunk in _chunks(chosen):
            request = pb.RetryTasksRequest(ids=chunk, by=me())
            for _, answer in brokers.each("RetryTasks", request, pb.RetryTasksResponse):
                _merge(results, chunk, [word(words, result) for result in answer.results])
        gone = {id for id, result in results.items() if result in ("dead_letter", "finished", "unknown")}
        if ids and gone:
            results |= dict.fromkeys(letters.replay_ids(brokers, gone), "replayed")
        _report(results, ("pending_now", "not_delayed", "replayed"), output)
        brokers.complete()


def _chosen(
    brokers: Brokers, ids: list[str] | None, wanted: pb.TaskFilter, verb: str, yes: bool
) -> list[str]:
    """The ids to handle: those given, or what matches, once it is counted and confirmed."""
    filtered = any(wanted.HasField(name) for name in ("application", "namespace", "taskname"))
    if ids:
        if filtered:
            raise Failure("ids and a filter were given", "give one of the two", USAGE)
        return list(dict.fromkeys(ids))
    if not filtered and not (verb == "cancel" and wanted.state):
        raise Failure(f"nothing says what to {verb}", "give ids, or a filter: --namespace, --taskname", USAGE)
    chosen = [task.id for _, task in held_tasks(brokers, wanted)]
    brokers.complete()
    if chosen:
        confirm(f"{verb} {len(chosen):,} tasks?", yes)
    return chosen


def _chunks(ids: list[str]) -> list[list[str]]:
    return [ids[at : at + CALL_IDS] for at in range(0, len(ids), CALL_IDS)]


def _merge(results: dict[str, str], ids: list[str], told: list[str]) -> None:
    """Of several brokers' answers on an id, that of the one which knows it."""
    weak = ("unknown", "finished")
    for id, result in zip(ids, told, strict=True):
        if id not in results or (results[id] in weak and result != "unknown"):
            results[id] = result


def _report(results: dict[str, str], good: tuple[str, ...], output: Output) -> None:
    """What became of each. Raises Failure unless all is well."""
    if output is Output.JSON:
        show_json([{"id": id, "result": result} for id, result in results.items()])
    else:
        for id, result in results.items():
            if len(results) <= 20 or result not in good:
                say(f"{id}  {result.replace('_', ' ')}")
        counts = {result: list(results.values()).count(result) for result in sorted(set(results.values()))}
        print(", ".join(f"{n:,} {result.replace('_', ' ')}" for result, n in counts.items()) or "none match")
    bad = [id for id, result in results.items() if result not in good]
    if bad:
        absent = all(results[id] in ("unknown", "finished") for id in bad)
        why = results[bad[0]].replace("_", " ")
        raise Failure(
            f"{len(bad)} of {len(results)} could not be handled, first {bad[0]}: {why}",
            f"next: penstock explain {bad[0]}",
            NOT_FOUND if absent else WRONG,
        )


def explain(
    id: Annotated[str, typer.Argument(metavar="ID")],
    rpc_host_list: BrokersOption = DEFAULT_BROKERS,
    output: OutputOption = Output.TABLE,
) -> None:
    """Say why a task is not running, and when it will.

    Example: penstock explain 0197e0a2-...
    """
    with Brokers(rpc_host_list) as brokers:
        request = pb.ExplainTaskRequest(id=id)
        answers = list(brokers.each("ExplainTask", request, pb.ExplainTaskResponse))
        # One that holds it knows more than one that had it.
        answers.sort(key=lambda told: (told[1].HasField("task"), told[1].known), reverse=True)
        broker, answer = answers[0]
        starts_in = _starts_in(broker, request, answer)
        if output is Output.JSON:
            values = plain(answer)
            if answer.HasField("task"):
                values["task"] = _task_json(answer.task)
            show_json({"broker": broker.address, **values, "starts_in_seconds": starts_in})
        else:
            task = answer.task
            what = (
                f"{task.taskname} of {task.application}/{task.namespace}, " if answer.HasField("task") else ""
            )
            say(f"{id}: {what}{answer.state}" + (f" at {broker.address}" if answer.known else ""))
            for finding in answer.findings:
                say(f"  - {finding.text}")
            if starts_in is not None:
                print(f"  - at the rate of this moment it starts in about {span(starts_in)}")
        brokers.complete()
        if not answer.known:
            raise not_held(id)


def _starts_in(broker: Broker, request: pb.ExplainTaskRequest, first: pb.ExplainTaskResponse) -> float | None:
    """Seconds until its turn, by how fast those before it become fewer; None: they do not, or it is known."""
    if not first.ahead or first.ahead >= first.ahead_max:
        return None
    begun = time.monotonic()
    time.sleep(LOOK_SECONDS)
    second = broker.call("ExplainTask", request, pb.ExplainTaskResponse)
    passed = first.ahead - second.ahead
    return second.ahead * (time.monotonic() - begun) / passed if passed > 0 else None
