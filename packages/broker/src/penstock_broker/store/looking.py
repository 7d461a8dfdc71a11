"""Looking into the database: one statement that only reads, bounded in time, rows, bytes and memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import apsw

from penstock_broker.errors import FatalError
from penstock_broker.store.database import VFS

QUERY_MS_MAX = 1000
ROWS_MAX = 1000
ANSWER_BYTES_MAX = 1024 * 1024
# Of a value that a query touches, and of all that SQLite may take for it: zeroblob, printf and ORDER BY
# would take gigabytes within the second.
VALUE_BYTES_MAX = 1024 * 1024
HEAP_BYTES_MAX = 64 * 1024 * 1024
SQL_BYTES_MAX = 64 * 1024
# Steps of SQLite's machine between two looks at the clock: some 50 us.
STEPS = 2_000

_READING = {apsw.SQLITE_SELECT, apsw.SQLITE_READ, apsw.SQLITE_FUNCTION, apsw.SQLITE_RECURSIVE}
_PRAGMAS = {"page_count", "page_size", "freelist_count", "user_version", "journal_mode", "table_list"}
# With the name of what they tell of.
_PRAGMAS_OF = {"table_info", "table_xinfo", "index_list", "index_info", "index_xinfo"}
_LIMITS = {
    apsw.SQLITE_LIMIT_LENGTH: VALUE_BYTES_MAX,
    # A pattern is compared with a value in one step of the machine, which nothing interrupts.
    apsw.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 500,
}

Value = int | float | str | bytes | None


class CannotQuery(Exception):
    """It says why, for whoever asked."""


class Answer(NamedTuple):
    columns: list[str]
    rows: list[tuple[Value, ...]]
    # Whether there is more than fits.
    more: bool


@contextmanager
def opened(path: Path) -> Iterator[apsw.Connection]:
    """The database of a broker that is stopped, for reading. Raises FatalError.

    Nothing of it changes, neither the file nor the WAL that a broker which was killed has left.
    """
    log = path.with_name(path.name + "-wal")
    try:
        left = log.exists() and log.stat().st_size > 0
        connection = apsw.Connection(str(path), vfs=VFS, flags=apsw.SQLITE_OPEN_READWRITE)
    except (apsw.Error, OSError) as error:
        raise FatalError(f"cannot open the database {path}: {error}") from None
    # Else the last one that closes it copies the WAL back.
    connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, int(left))
    try:
        connection.pragma("locking_mode", "exclusive")
        connection.pragma("query_only", 1)
        connection.pragma("trusted_schema", 0)
        connection.pragma("temp_store", "MEMORY")
        connection.execute("SELECT count(*) FROM sqlite_schema").fetchall()
    except apsw.BusyError:
        connection.close(True)
        raise FatalError(
            f"the database {path} is locked by another process", "close whatever has it open"
        ) from None
    except apsw.Error as error:
        connection.close(True)
        raise FatalError(f"the database {path} cannot be read: {error}") from None
    try:
        yield connection
    finally:
        connection.close(True)


def query(connection: apsw.Connection, sql: str, limit: int, mono_ms: Callable[[], int]) -> Answer:
    """What ``sql`` says, at most ``limit`` rows. Between ticks, outside of any transaction.

    Raises CannotQuery.
    """
    if len(sql.encode(errors="replace")) > SQL_BYTES_MAX:
        raise CannotQuery(f"the statement has more than {SQL_BYTES_MAX // 1024} KiB")
    refused: list[str] = []
    cursor = connection.cursor()
    until = mono_ms() + QUERY_MS_MAX
    limits = {id: connection.limit(id, value) for id, value in _LIMITS.items()}
    heap = apsw.hard_heap_limit(apsw.memory_used() + HEAP_BYTES_MAX)
    try:
        connection.authorizer = _only_reading(refused)
        connection.set_progress_handler(lambda: mono_ms() > until, STEPS)
        return _ask(cursor, sql, limit)
    except apsw.InterruptError:
        raise CannotQuery(f"interrupted after {QUERY_MS_MAX // 1000} s: narrow it, e.g. with LIMIT") from None
    except apsw.TooBigError:
        raise CannotQuery(f"a value has more than {_mib(VALUE_BYTES_MAX)}: ask for its length()") from None
    except (apsw.NoMemError, MemoryError):
        raise CannotQuery(f"it takes more than {_mib(HEAP_BYTES_MAX)} of memory: narrow it") from None
    except UnicodeDecodeError:
        raise CannotQuery("a text is no UTF-8: select it as CAST(... AS BLOB)") from None
    except (apsw.Error, ValueError) as error:
        if refused:
            raise CannotQuery(f"queries only read: {refused[0]} is refused") from None
        raise CannotQuery(str(error)[:1000] or type(error).__name__) from None
    finally:
        # A statement that is left open would keep the WAL from being reused.
        cursor.close(True)
        connection.authorizer = None
        connection.set_progress_handler(None)
        apsw.hard_heap_limit(heap)
        for id, value in limits.items():
            connection.limit(id, value)


def _mib(size: int) -> str:
    return f"{size // 1024**2} MiB"


def _only_reading(refused: list[str]) -> Callable[..., int]:
    def allow(action: int, one: str | None, two: str | None, *where: str | None) -> int:
        if action in _READING and not (action == apsw.SQLITE_FUNCTION and two == "load_extension"):
            return apsw.SQLITE_OK
        if action == apsw.SQLITE_PRAGMA and str(one).lower() in (_PRAGMAS if two is None else _PRAGMAS_OF):
            return apsw.SQLITE_OK
        name = str(apsw.mapping_authorizer_function[action]).removeprefix("SQLITE_")
        refused.append(" ".join(str(part) for part in (name, one, two) if part))
        return apsw.SQLITE_DENY

    return allow


def _ask(cursor: apsw.Cursor, sql: str, limit: int) -> Answer:
    columns: list[str] = []

    def begins(cursor: apsw.Cursor, statement: str, bindings: object) -> bool:
        """Before each statement: the first one has to read, and a comment may follow."""
        names = [str(name) for name, _ in cursor.get_description()]
        if columns and names:
            raise CannotQuery("one statement at a time")
        if not cursor.is_readonly:
            raise CannotQuery("queries only read")
        columns.extend(names)
        return True

    cursor.exec_trace = begins
    rows: list[tuple[Value, ...]] = []
    size = 0
    # Not from the cache: what a tick has prepared nobody has authorized.
    for row in cursor.execute(sql, can_cache=False):
        size += sum(len(value) if isinstance(value, str | bytes) else 8 for value in row)
        if size > ANSWER_BYTES_MAX and not rows:
            raise CannotQuery(f"a row has more than {_mib(ANSWER_BYTES_MAX)}: select less of it")
        if size > ANSWER_BYTES_MAX or len(rows) == limit:
            return Answer(columns, rows, True)
        rows.append(row)
    if not columns:
        raise CannotQuery("that is no statement that answers")
    return Answer(columns, rows, False)
