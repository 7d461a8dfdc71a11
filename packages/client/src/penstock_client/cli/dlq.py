"""``penstock dlq``."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import islice
from typing import Annotated, Any

import typer

from penstock_client.cli.brokers import Brokers
from penstock_client.cli.failures import NOT_FOUND, USAGE, WRONG, Failure
from penstock_client.cli.letters import Done, Letter, StoreLetters, TopicLetters, Wanted, sources
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
    cut,
    say,
    show_facts,
    show_json,
    show_table,
    size,
    when,
)
from penstock_client.cli.tasks import activation_facts, error_text
from penstock_client.durations import seconds

commands = typer.Typer(
    no_args_is_help=True,
    help="""Dead letters: on Kafka in their topic, without Kafka (and what Kafka refused) with the brokers.

    A topic cannot lose single records: what was replayed or discarded is recorded in the compacted topic
    <dead-letter topic>-handled, and left out from then on.""",
)

ReasonOption = Annotated[str | None, typer.Option("--reason", "-r", help="Only those that died of this.")]
SinceOption = Annotated[
    str | None, typer.Option(help="Only those that died since: 2h, 3d, or 2026-01-31T08:00 (UTC).")
]
UntilOption = Annotated[str | None, typer.Option(help="Only those that died before: as --since.")]
KafkaOption = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT,…",
        help="Kafka as seen from here, instead of what the brokers say; with --topic no broker is asked.",
        envvar="PENSTOCK_KAFKA",
    ),
]
TopicOption = Annotated[str | None, typer.Option(help="The dead-letter topic.")]
IdsArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[ID]...", help="Ids of the tasks that died.")
]


@commands.command("ls")
def ls(
    rpc_host_list: BrokersOption = DEFAULT_BROKERS,
    output: OutputOption = Output.TABLE,
    application: ApplicationOption = None,
    namespace: NamespaceOption = None,
    taskname: TasknameOption = None,
    reason: ReasonOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    all_: Annotated[bool, typer.Option("--all", help="Also those that were replayed or discarded.")] = False,
    limit: LimitOption = 50,
    kafka: KafkaOption = None,
    topic: TopicOption = None,
) -> None:
    """List dead letters that nobody has handled: of each broker and partition in turn, oldest first.

    Examples: penstock dlq ls --reason attempts_exhausted --since 2h; penstock dlq ls -o json --limit 1000
    """
    wanted = Wanted(
        application,
        namespace,
        taskname,
        reason,
        _time("--since", since),
        _time("--until", until),
        handled=all_,
    )
    with _places(rpc_host_list, kafka, topic) as (places, brokers):
        found = list(islice((letter for place in places for letter in place.read(wanted)), limit + 1))
        shown = found[:limit]
        if output is Output.JSON:
            show_json([letter.as_json() for letter in shown])
        else:
            heads = ("ID", "NAMESPACE", "TASK", "REASON", "ATTEMPTS", "DIED", "ERROR", "HANDLED", "WHERE")
            show_table(heads, [_row(letter) for letter in shown])
            if len(found) > limit:
                typer.echo(f"... and more: --limit {limit * 10}, or a filter", err=True)
        if brokers is not None:
            brokers.complete()


def _row(letter: Letter) -> tuple[object, ...]:
    error = error_text(_error(letter.story)).split("\n")[0]
    return (
        letter.id,
        f"{letter.application}/{letter.namespace}" if letter.taskname else None,
        letter.taskname,
        letter.reason,
        letter.story.get("attempts"),
        when(letter.dead_at),
        error[:60] + ("…" if len(error) > 60 else ""),
        letter.handled["action"] if letter.handled else None,
        letter.where,
    )


def _error(story: dict[str, Any]) -> dict[str, Any]:
    """As the store has it, or as the headers of a message have."""
    stored = story.get("error")
    if isinstance(stored, dict):
        return stored
    return {"type": story.get("error-type", ""), "message": story.get("error-message", "")}


@commands.command()
def show(
    id: Annotated[str, typer.Argument(metavar="ID")],
    rpc_host_list: BrokersOption = DEFAULT_BROKERS,
    output: OutputOption = Output.TABLE,
    arguments: Annotated[
        bool, typer.Option("--arguments", help="Also its arguments, which may be confidential.")
    ] = False,
    kafka: KafkaOption = None,
    topic: TopicOption = None,
) -> None:
    """Show the dead letters of a task with their story.

    Example: penstock dlq show 0197e0a2-... --arguments
    """
    with _places(rpc_host_list, kafka, topic) as (places, brokers):
        found = []
        for place in places:
            if isinstance(place, StoreLetters):
                found += [letter] if (letter := place.find(id)) else []
            else:
                found += place.read(Wanted(ids=(id,), handled=True))
        shown = [{**letter.as_json(), **activation_facts(letter.value, arguments)} for letter in found]
        if output is Output.JSON:
            show_json(shown)
        else:
            for number, values in enumerate(shown):
                if number:
                    print()
                story = values.pop("story")
                facts = values | {"dead_at": when(values["dead_at"]), "size": size(values["size"])}
                facts |= {name: value for name, value in story.items() if not name.startswith("error")}
                # In a store it is a number.
                if isinstance(received := facts.get("received_at"), int):
                    facts["received_at"] = when(received)
                facts["error"] = error_text(_error(story))
                show_facts((name, value) for name, value in facts.items() if value not in (None, "", {}))
        if not found:
            if brokers is not None:
                brokers.complete()
            raise Failure(
                f"there is no dead letter of a task {id!r}", f"next: penstock explain {id}", NOT_FOUND
            )


@commands.command()
def replay(
    ids: IdsArgument = None,
    rpc_host_list: BrokersOption = DEFAULT_BROKERS,
    output: OutputOption = Output.TABLE,
    application: ApplicationOption = None,
    namespace: NamespaceOption = None,
    taskname: TasknameOption = None,
    reason: ReasonOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Replay at most so many.")] = None,
    rate: Annotated[
        float | None,
        typer.Option(min=0.01, max=1_000_000, help="Replay at most so many a second."),
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Also those replayed or discarded before; they run once more.")
    ] = False,
    yes: YesOption = False,
    kafka: KafkaOption = None,
    topic: TopicOption = None,
) -> None:
    """Send dead letters anew, as new tasks with no attempt made; they are counted first.

    A new task has an id of its own, made of its dead letter, and the first id of its line in the header
    penstock-root-id; its delay and expiry count from now. Interrupted, the same command goes on where it
    was; what was sent twice runs once, within the de-duplication window.

    Examples: penstock dlq replay --reason attempts_exhausted --since 2h --rate 50;
    penstock dlq replay 0197e0a2-... --yes
    """
    wanted = _chosen(ids, application, namespace, taskname, reason, since, until, again)
    with _places(rpc_host_list, kafka, topic) as (places, brokers):
        _handle(places, wanted, "replay", limit, rate, yes, output)
        if brokers is not None:
            brokers.complete()


@commands.command()
def discard(
    ids: IdsArgument = None,
    rpc_host_list: BrokersOption = DEFAULT_BROKERS,
    output: OutputOption = Output.TABLE,
    application: ApplicationOption = None,
    namespace: NamespaceOption = None,
    taskname: TasknameOption = None,
    reason: ReasonOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Discard at most so many.")] = None,
    yes: YesOption = False,
    kafka: KafkaOption = None,
    topic: TopicOption = None,
) -> None:
    """Give dead letters up for good; they are counted first.

    Those that rest with a broker are deleted. On Kafka a record cannot be deleted: the topic's retention
    does that. There, discarded means recorded as such in <dead-letter topic>-handled: `dlq ls` and
    `dlq replay` leave it out from then on (`--all` and `--again` do not).

    Example: penstock dlq discard --reason expired --until 30d
    """
    wanted = _chosen(ids, application, namespace, taskname, reason, since, until, again=False)
    with _places(rpc_host_list, kafka, topic) as (places, brokers):
        _handle(places, wanted, "discard", limit, None, yes, output)
        if brokers is not None:
            brokers.complete()


def _chosen(
    ids: list[str] | None,
    application: str | None,
    namespace: str | None,
    taskname: str | None,
    reason: str | None,
    since: str | None,
    until: str | None,
    again: bool,
) -> Wanted:
    filters = (application, namespace, taskname, reason)
    return Wanted(*filters, _time("--since", since), _time("--until", until), tuple(ids or ()), again)


def _handle(
    places: list[StoreLetters | TopicLetters],
    wanted: Wanted,
    verb: str,
    limit: int | None,
    rate: float | None,
    yes: bool,
    output: Output,
) -> None:
    """Count, ask, do, and say what was done."""
    found: Counter[tuple[str, str]] = Counter()
    for letter in islice((letter for place in places for letter in place.read(wanted)), limit):
        found[letter.taskname or "(no task)", letter.reason] += 1
    if not found and wanted.ids:
        raise Failure(
            "there is no such dead letter, or it was handled before", "see penstock dlq show", NOT_FOUND
        )
    for (taskname, reason), count in found.most_common(20):
        say(f"{count:>8,}  {cut(taskname)}: {reason}", error=True)
    if found:
        confirm(f"{verb} {found.total():,} dead letters?", yes)
    done = _do(places, wanted, verb, found.total(), rate)
    if output is Output.JSON:
        counts = {"done": done.done, "left": done.left, "failed": done.failed}
        show_json({"matched": found.total(), **counts, "ids": done.ids})
    else:
        print(f"{found.total():,} dead letters match, {done.done:,} {verb}ed")
        if len(done.ids) <= 20:
            for old, new in done.ids.items():
                say(f"  {old} -> {new}")
    if done.left or done.failed:
        why = f"; Kafka: {done.error}" if done.error else ""
        raise Failure(
            f"{done.left:,} cannot be {verb}ed (no activations, or gone), {done.failed:,} failed{why}",
            "the same command goes on with what failed" if done.failed else "see them with penstock dlq ls",
            WRONG,
        )


def _do(
    places: list[StoreLetters | TopicLetters], wanted: Wanted, verb: str, total: int, rate: float | None
) -> Done:
    """Handle the first ``total`` that match, at most ``rate`` of them a second."""
    all_, handled, begun = Done(), 0, time.monotonic()
    progress = Progress(verb, total)
    for place in places:
        if rate is not None and isinstance(place, StoreLetters):
            # What is sent at once is no more than a second's.
            place.chunk = max(1, min(place.chunk, int(rate)))
        for letter in islice(place.read(wanted), total - handled):
            if rate is not None:
                time.sleep(max(0.0, begun + handled / rate - time.monotonic()))
            if verb == "replay":
                place.replay(letter)
            else:
                place.discard(letter)
            handled += 1
            progress.add()
        all_.add(place.finish())
    progress.end()
    return all_


@contextmanager
def _places(
    rpc_host_list: str, kafka: str | None, topic: str | None
) -> Iterator[tuple[list[StoreLetters | TopicLetters], Brokers | None]]:
    if kafka and topic:
        yield sources(None, kafka, topic), None
        return
    with Brokers(rpc_host_list) as brokers:
        yield sources(brokers, kafka, topic), brokers


def _time(option: str, text: str | None) -> int | None:
    """Epoch ms of a time, or of a duration before now."""
    if text is None:
        return None
    try:
        at = datetime.fromisoformat(text)
        return int((at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() * 1000)
    except ValueError:
        pass
    try:
        return int((time.time() - seconds(option, text)) * 1000)
    except (TypeError, ValueError):
        raise Failure(
            f"{option}: {text!r} is neither a duration (2h) nor a time (2026-01-31T08:00)", code=USAGE
        ) from None
