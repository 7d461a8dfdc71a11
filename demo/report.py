"""What the demo found out, for a person to read."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import apsw
import starts
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from starts import Start

# The database has all of it.
ERROR_CHARACTERS_MAX = 110


class DeadLetter(NamedTuple):
    """One row of the broker's table of dead letters."""

    taskname: str
    reason: str
    attempts: int
    error: str


class Stored(NamedTuple):
    """What the broker's database says after its end."""

    accepted: int
    done: int
    dead_letters: list[DeadLetter]


def stored(database: Path) -> Stored:
    """Read the broker's database. The module sqlite3 may be too old for its tables."""
    connection = apsw.Connection(str(database), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        books = {str(term): int(count) for term, count in connection.execute(
            "SELECT term, sum(count) FROM books GROUP BY term"
        )}  # fmt: skip
        letters = [
            _dead_letter(str(taskname), str(reason), str(story))
            for taskname, reason, story in connection.execute(
                "SELECT taskname, reason, story FROM dead_letter ORDER BY seq"
            )
        ]
    finally:
        connection.close()
    return Stored(books.get("accepted", 0), books.get("done", 0), letters)


def _dead_letter(taskname: str, reason: str, text: str) -> DeadLetter:
    story = json.loads(text)
    error = story["error"] or {}
    kind = str(error.get("type", "")).removeprefix("builtins.")
    message = (str(error.get("message", "")).splitlines() or [""])[0]
    return DeadLetter(taskname, reason, int(story["attempts"]), f"{kind}: {message}")


def percentile(values: Sequence[float], percent: int) -> float:
    """Of sorted values: the least that ``percent`` % of them do not exceed."""
    return values[max(0, -(-len(values) * percent // 100) - 1)]


def show(console: Console, place: Path, *, send_seconds: float, day_rate: int) -> None:
    """Print the summary."""
    noted = starts.read(place / "starts")
    kept = stored(place / "broker.sqlite")
    console.print("\n[bold]What happened[/]\n")
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    for name, text in (
        ("  throughput", _throughput(noted, send_seconds)),
        ("  latency", _latency(noted, day_rate)),
        ("  retries", _retries(noted)),
        ("  delayed", _delayed(noted)),
        ("  books", _books(kept)),
    ):
        table.add_row(name, text)
    console.print(table)
    _show_dead_letters(console, kept.dead_letters)
    _show_next(console)


def _throughput(noted: Sequence[Start], send_seconds: float) -> str:
    burst = [start for start in noted if start.stage == "burst"]
    seconds = max(s.started_at for s in burst) - min(s.sent_at for s in burst)
    return (
        f"[bold]{len(burst) / seconds:,.0f} tasks/s[/]: {len(burst):,} in {seconds:.2f} s, from the first"
        f" delay() to the last start, on {os.cpu_count()} cores; all on disk after {send_seconds:.2f} s"
    )


def _latency(noted: Sequence[Start], day_rate: int) -> str:
    values = sorted(1000 * start.latency_seconds for start in noted if start.stage == "day")
    p50, p95, p99 = (percentile(values, percent) for percent in (50, 95, 99))
    return (
        f"[bold]p50 {p50:.1f} ms, p95 {p95:.1f} ms, p99 {p99:.1f} ms[/], worst {values[-1]:.1f} ms:"
        f" from delay() to the start of the task, at {day_rate} tasks/s"
    )


def _retries(noted: Sequence[Start]) -> str:
    again = sum(start.attempt > 1 for start in noted)
    payments = sum(start.stage == "payments" and start.attempt == 3 for start in noted)
    return f"{again} starts again: {payments} payments failed twice and then succeeded; one invoice never did"


def _delayed(noted: Sequence[Start]) -> str:
    late = [start for start in noted if start.stage == "delayed"]
    return f"asked to wait 3 s, started {late[0].latency_seconds:.2f} s after delay()"


def _books(kept: Stored) -> str:
    lost = kept.accepted - kept.done - len(kept.dead_letters)
    balance = "nothing lost" if lost == 0 else f"[red]{lost} unaccounted for[/]"
    return (
        f"{kept.accepted:,} accepted = {kept.done:,} done + {len(kept.dead_letters)} dead letters; {balance}"
    )


def _show_dead_letters(console: Console, letters: Sequence[DeadLetter]) -> None:
    console.print("\n[bold]Dead letters[/], kept by the broker with the task and the reason\n")
    table = Table.grid(padding=(0, 2))
    for letter in letters:
        attempts = f"{letter.attempts} attempt" + "s" * (letter.attempts != 1)
        error = textwrap.shorten(letter.error, ERROR_CHARACTERS_MAX, placeholder=" ...")
        table.add_row(f"  [red]{escape(letter.taskname)}[/]", escape(f"{letter.reason} after {attempts}"))
        table.add_row("", escape(error))
    console.print(table)


def _show_next(console: Console) -> None:
    console.print("\n[bold]Where to look[/], and what to type next\n")
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column()
    for what, why in (
        (".demo/broker.sqlite", "the broker's database; .demo/broker.log is what it said"),
        ("less .demo/worker.log", "each failed attempt, with its traceback"),
        ("less demo/shop.py", "the tasks that ran"),
        ("less README.md", "a task of your own in ten lines, and the same through Kafka"),
        ("make test", "the proof: a real Kafka, brokers killed under load (20 minutes)"),
    ):
        table.add_row(f"  {what}", why)
    console.print(table)
