"""The command line: ``penstock-broker serve | drain | adopt | db stats|query|backup | config check|show``."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import json
import platform
import sys
from collections.abc import Callable
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from penstock_broker import __version__, logs, serving
from penstock_broker.config import SECTIONS, Loaded, Settings, load
from penstock_broker.config.expected import default_text, placeholder
from penstock_broker.config.load import SECRET
from penstock_broker.errors import FatalError

# On the command line every user of the machine would see a secret; maps belong in a file.
NOT_OPTIONS = SECRET | {"kafka_clusters", "kafka_topics"}

app = typer.Typer(
    name="penstock-broker",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
config = typer.Typer(no_args_is_help=True, help="Check and show the configuration.")
app.add_typer(config, name="config")
database = typer.Typer(
    no_args_is_help=True,
    help="Look into the database, which only its broker can open: the broker is asked, or the file is opened"
    " if it is stopped.",
)
app.add_typer(database, name="db")


class Output(StrEnum):
    TABLE = "table"
    JSON = "json"


OutputOption = Annotated[Output, typer.Option("--output", "-o", help="How to print it.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"penstock-broker {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Takes tasks from Kafka or gRPC and hands them to workers.

    Every setting can be given in a YAML file (-c), as TASKBROKER_<NAME>, or as an option; each
    overrides the one before.
    """


def _help(name: str) -> str:
    text = (Settings.model_fields[name].description or "").replace("`", "")
    default = default_text(name)
    return f"{text} Default: {default}." if default else text


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Gives ``command(loaded, ...)`` an option for each setting; it is called with what they make."""

    def run(config_file: Path | None, **given: Any) -> None:
        own = {name: given.pop(name) for name in list(given) if name not in Settings.model_fields}
        command(load(config_file, {name: value for name, value in given.items() if value is not None}), **own)

    parameter = partial(inspect.Parameter, kind=inspect.Parameter.KEYWORD_ONLY)
    file = typer.Option("--config", "-c", metavar="FILE", help="A YAML file of settings.")
    parameters = [parameter("config_file", default=None, annotation=Annotated[Path | None, file])]
    parameters += list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    section = ""
    for name, field in Settings.model_fields.items():
        section = SECTIONS.get(name, section)
        if name not in NOT_OPTIONS:
            switch = field.annotation is bool
            option = typer.Option(
                help=_help(name), rich_help_panel=section, metavar=None if switch else placeholder(name)
            )
            kind = bool if switch else str
            parameters.append(parameter(name, default=None, annotation=Annotated[kind | None, option]))
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


@app.command()
@with_settings
def serve(
    loaded: Loaded,
    *,
    reconcile: Annotated[
        bool,
        typer.Option(
            "--reconcile",
            help="If the database is an old copy, set it aside and restore what the ledger has.",
        ),
    ] = False,
) -> None:
    """Run a broker until SIGTERM.

    Examples:

    penstock-broker serve --ingest grpc --db-path tasks.sqlite

    penstock-broker serve --kafka-cluster kafka:9092 --kafka-topic taskworker-ingest

    TASKBROKER_GRPC_SHARED_SECRET=... penstock-broker serve -c broker.yaml --grpc-addr 0.0.0.0
    """
    raise typer.Exit(serving.serve(loaded, reconcile))


@app.command()
@with_settings
def drain(
    loaded: Loaded,
    *,
    grace_seconds: Annotated[
        float,
        typer.Option(
            min=0, max=86_400, help="How long tasks may finish here before the rest is handed over."
        ),
    ] = 30.0,
) -> None:
    """Let a running broker take nothing more, finish what it can, and hand over the rest to its topic.

    Afterwards it can be stopped for good: another broker of the pool runs what it handed over. Exits with 1
    when something could not leave, which is said; the same command goes on. The broker is the one that the
    settings are of, on this machine.

    Examples:

    penstock-broker drain -c broker.yaml --grace-seconds 60

    TASKBROKER_GRPC_SHARED_SECRET=... penstock-broker drain --grpc-port 50051
    """
    from penstock_broker import remote  # late, as in ``serve``
    from penstock_protocol.v1 import admin_pb2

    request = admin_pb2.DrainRequest(grace_seconds=grace_seconds, by=remote.me())
    said = ""
    while True:
        told = remote.call(loaded.settings, "Drain", request, admin_pb2.DrainResponse)
        left = ", ".join(f"{count.tasks:,} {count.state}" for count in told.left) or "none"
        line = f"{told.phase}: {told.ended:,} ended here, {told.handed_over:,} handed over; left: {left}"
        if line != said:
            print(line, flush=True)
            said = line
        if told.finished:
            break
    if told.left or told.reasons:
        raise FatalError("the drain is not complete", "\n".join(told.reasons))


@app.command()
@with_settings
def adopt(
    loaded: Loaded,
    *,
    gone: Annotated[str, typer.Argument(metavar="BROKER_ID", help="The broker_id of the one that is gone.")],
    force: Annotated[
        bool,
        typer.Option("--force", help="Also when it wrote within the last minute. Should it live, it stops."),
    ] = False,
) -> None:
    """Let a running broker take over what another one of the pool, which never returns, has left.

    What was unfinished there is found in the ledger and in Kafka. The broker that adopts is the one that the
    settings are of, on this machine.

    Example:

    penstock-broker adopt broker-2 -c broker.yaml
    """
    from penstock_broker import remote  # late, as in ``serve``
    from penstock_protocol.v1 import admin_pb2

    request = admin_pb2.AdoptRequest(broker_id=gone, force=force, by=remote.me())
    print(f"adopting {gone} ...", file=sys.stderr, flush=True)
    while not (told := remote.call(loaded.settings, "Adopt", request, admin_pb2.AdoptResponse)).finished:
        pass
    print(f"adopted {told.adopted:,} unfinished tasks of {gone} from {told.partitions} partitions")
    if told.lost:
        raise FatalError(
            f"{told.lost:,} unfinished tasks of {gone} are lost: Kafka no longer holds them",
            "they are older than the topic's retention",
        )


@database.command("stats")
@with_settings
def db_stats(loaded: Loaded, *, output: OutputOption = Output.TABLE) -> None:
    """What the database holds, and how large it is.

    The broker is the one that the settings are of, on this machine. While the file of a stopped one is open,
    no broker can start on it. While a broker runs, tasks come and go between two counts.

    Examples:

    penstock-broker db stats -c broker.yaml

    penstock-broker db stats --db-path tasks.sqlite -o json
    """
    from penstock_broker import db  # late, as in ``serve``

    with db.reached(loaded.settings) as reached:
        said = db.stats(reached)
    if output is Output.JSON:
        print(json.dumps(said, indent=2))
        return
    for name, value in said.items():
        counted = ", ".join(f"{k}: {v:,}" for k, v in value.items()) if isinstance(value, dict) else value
        text = f"{counted:,}" if isinstance(counted, int) else str(counted)
        print(f"{name:<22}{logs.escaped(text)}")


@database.command("query")
@with_settings
def db_query(
    loaded: Loaded,
    *,
    sql: Annotated[str, typer.Argument(metavar="SQL", help="One statement that only reads.")],
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Rows at most.")] = 1000,
    output: OutputOption = Output.TABLE,
) -> None:
    """Ask the database with SQL.

    It only reads, for at most a second, and the answer has at most 1,000 rows and 1 MiB. While the broker
    runs, its writer waits meanwhile. Blobs are hexadecimal. The tables are described by "SELECT sql FROM
    sqlite_schema".

    Examples:

    penstock-broker db query "SELECT taskname, count(*) FROM activation GROUP BY 1" -c broker.yaml

    penstock-broker db query "SELECT * FROM quarantine" --limit 10 -o json --db-path tasks.sqlite
    """
    from penstock_broker import db  # late, as in ``serve``

    with db.reached(loaded.settings) as reached:
        found = reached.query(sql, limit)
    for line in db.as_json(found) if output is Output.JSON else db.as_table(found):
        print(line)
    if found.more:
        print("... and more: these are as many rows as --limit or 1 MiB allow", file=sys.stderr)


@database.command("backup")
@with_settings
def db_backup(
    loaded: Loaded,
    *,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where the copy goes; nothing may be there.")],
) -> None:
    """Copy the database to FILE, also while its broker runs.

    The copy is for looking into, and to be put back for a broker without a ledger (ingest: grpc). Put back,
    it is an old copy: what ended since then would run again, and what came since is missing. A broker with
    a ledger notices, refuses it, and goes on with "serve --reconcile" and what the ledger has; one without
    cannot notice.

    Example:

    penstock-broker db backup /backups/tasks-monday.sqlite -c broker.yaml
    """
    from penstock_broker import db  # late, as in ``serve``

    with db.reached(loaded.settings) as reached:
        for copied, pages in reached.back_up(file):
            print(f"copied {copied:,} of {pages:,} pages", file=sys.stderr, flush=True)
    print(f"{loaded.settings.db_path} is copied to {file}: {file.stat().st_size:,} bytes")


@config.command()
@with_settings
def check(loaded: Loaded) -> None:
    """Check the configuration without starting anything; exit code 2 if there is something to correct.

    Example:

    penstock-broker config check -c broker.yaml
    """
    _warn(loaded)
    print("The configuration is valid.")


@config.command()
@with_settings
def show(
    loaded: Loaded,
    *,
    origin: Annotated[bool, typer.Option("--origin", help="Say where each value comes from.")] = False,
) -> None:
    """Show every setting as it would be used. Secrets are masked.

    Example:

    penstock-broker config show --origin -c broker.yaml
    """
    _warn(loaded)
    print(f"# penstock-broker {__version__}, Python {platform.python_version()}, event loop: {loop_name()}")
    values = loaded.settings.model_dump(mode="json")
    for name, value in values.items():
        line = f"{name}: {_as_yaml(['***'] * len(value) if name in SECRET else value)}"
        print(f"{line:<50}  # {loaded.origins[name]}" if origin else line)


def loop_name() -> str:
    """The event loop that ``serve`` runs on."""
    if importlib.util.find_spec("uvloop") is None:
        return "asyncio"
    return f"uvloop {importlib.metadata.version('uvloop')}"


def _as_yaml(value: object) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def _warn(loaded: Loaded) -> None:
    for warning in loaded.warnings:
        print(f"warning: {logs.escaped(warning)}", file=sys.stderr)


def main() -> None:
    """Runs the command line; what an operator can correct ends in a message and an exit code."""
    with serving.messages():
        app()
