"""Tables for people, JSON for programs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, MutableSequence, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

# How often progress is shown.
TERMINAL_SECONDS = 0.2
LOG_SECONDS = 10.0
# No name is longer but a forged one; a column is as wide as its widest cell.
CELL_CHARS_MAX = 256


class Output(StrEnum):
    TABLE = "table"
    JSON = "json"


def plain(message: Message) -> dict[str, Any]:
    """A message as JSON has it: every field, numbers as numbers, enums as words, None for what is absent."""
    values: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if isinstance(value, MutableSequence):
            values[field.name] = [_plain(field, item) for item in value]
        elif field.has_presence and not message.HasField(field.name):
            values[field.name] = None
        else:
            values[field.name] = _plain(field, value)
    return values


def _plain(field: Any, value: Any) -> Any:
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        return plain(value)
    if field.type == FieldDescriptor.TYPE_ENUM:
        return word(field, value)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return value.hex()
    return value


def word(field: Any, number: int) -> str:
    """The name of an enum's value without its prefix: ``pending``."""
    enum = field.enum_type
    value = enum.values_by_number.get(number)
    if value is None:
        return str(number)
    # TaskState -> TASK_STATE_
    prefix = "".join(f"_{c}" if c.isupper() else c.upper() for c in enum.name).lstrip("_") + "_"
    return str(value.name).removeprefix(prefix).lower()


def show_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def show_table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Columns as wide as what is in them; numbers to the right."""
    lines = [list(heads), *([cut(escaped(_cell(value))) for value in row] for row in rows)]
    right = [
        len(lines) > 1 and all(_is_number(line[column]) for line in lines[1:]) for column in range(len(heads))
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    for line in lines:
        cells = (
            text.rjust(width) if to_right else text.ljust(width)
            for text, width, to_right in zip(line, widths, right, strict=True)
        )
        print("  ".join(cells).rstrip())


def show_facts(facts: Iterable[tuple[str, object]]) -> None:
    """One line each: what, and its value."""
    shown = [(name, escaped(_cell(value), newlines=True)) for name, value in facts]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        first, *more = value.split("\n")
        print(f"{name.ljust(width)}  {first}")
        for line in more:
            print(f"{'':<{width}}  {line}")


def _cell(value: object) -> str:
    """A value as people read it."""
    if value is None or value == "":
        return "-"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def cut(text: str) -> str:
    return text if len(text) <= CELL_CHARS_MAX else text[:CELL_CHARS_MAX] + "…"


def escaped(text: str, newlines: bool = False) -> str:
    """Without what a terminal would obey; line feeds stay if ``newlines``."""
    kept = "\n" if newlines else ""
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


def say(text: str, error: bool = False) -> None:
    """One line, whatever names and messages it holds; ``error``: on stderr."""
    print(escaped(text), file=sys.stderr if error else sys.stdout)


class Progress:
    """How far long work is, on stderr: for people as it goes, in a log now and then."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total = what, total
        self._done = 0
        self._terminal = sys.stderr.isatty()
        self._said_at = time.monotonic()

    def add(self, done: int = 1) -> None:
        self._done += done
        now = time.monotonic()
        if now - self._said_at >= (TERMINAL_SECONDS if self._terminal else LOG_SECONDS):
            self._said_at = now
            self._say()

    def _say(self) -> None:
        line = f"{self._what}: {self._done:,} of {self._total:,}"
        print(f"\r{line} " if self._terminal else line, end="" if self._terminal else "\n", file=sys.stderr)
        sys.stderr.flush()

    def end(self) -> None:
        if self._terminal:
            self._say()
            print(file=sys.stderr)


def _is_number(text: str) -> bool:
    return text.replace(",", "").replace(".", "").lstrip("-").split(" ")[0].isdecimal() or text == "-"


def span(seconds: float) -> str:
    """A duration as a person says it."""
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def size(count: float) -> str:
    """Bytes as a person says them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def when(at: int | None) -> str:
    """Epoch ms as a person reads it, in UTC."""
    return datetime.fromtimestamp(at / 1000, UTC).strftime("%Y-%m-%d %H:%M:%SZ") if at else "-"
