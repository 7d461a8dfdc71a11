"""``penstock-broker db``: asks the broker that runs, or opens the file of one that is stopped."""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import apsw

from penstock_broker import remote
from penstock_broker.clock import SystemClock
from penstock_broker.config import Settings
from penstock_broker.domain.activation import Status
from penstock_broker.errors import FatalError
from penstock_broker.logs import escaped
from penstock_broker.store import lock
from penstock_broker.store.copying import CannotCopy, Copy, backup_of, is_own, require_room, size_of
from penstock_broker.store.looking import ROWS_MAX, Answer, CannotQuery, Value, opened, query
from penstock_protocol.v1 import admin_pb2 as pb

# Rows that one query of ``stats`` counts: far less than a second's, and the broker's ticks go on in between.
COUNT_ROWS = 20_000
# Steps between two lines about a copy that is made here: 64 MiB.
STEPS_A_LINE = 64
BLOB_BYTES_SHOWN = 32
# An id hash and what is known of it.
ENTRY_BYTES = 16


class Running:
    """The database of a broker that runs."""

    said = "the running broker"

    def __init__(self, settings: Settings) -> None:
        self.path = settings.db_path
        self._settings = settings

    def query(self, sql: str, limit: int = ROWS_MAX) -> Answer:
        """Raises FatalError."""
        request = pb.QueryDatabaseRequest(sql=_checked(sql), limit=limit)
        told = remote.call(self._settings, "QueryDatabase", request, pb.QueryDatabaseResponse)
        return Answer(list(told.columns), [tuple(map(_value, row.values)) for row in told.rows], told.more)

    def back_up(self, file: Path) -> Iterator[tuple[int, int]]:
        """Yields (pages that are copied, pages of all). Raises FatalError."""
        _require_new(self.path, file)
        if file.parent.stat().st_dev != self.path.parent.stat().st_dev:
            _require_room(file.parent, self.path.stat().st_size)
        request = pb.BackUpDatabaseRequest(id=secrets.token_hex(8), by=remote.me())
        while True:
            told = remote.call(self._settings, "BackUpDatabase", request, pb.BackUpDatabaseResponse)
            yield told.pages_copied, told.pages
            if told.finished:
                break
        made = backup_of(self.path, told.number)
        try:
            _move(made, file)
        except OSError as error:
            raise FatalError(
                f"the copy cannot be moved to {file}: {error.strerror}",
                f"it is {made}: move it away before the broker starts again or makes another one",
            ) from None


class Stopped:
    """The database of a broker that is stopped."""

    said = "the file: no broker has it"

    def __init__(self, path: Path, connection: apsw.Connection) -> None:
        self.path = path
        self._connection = connection

    def query(self, sql: str, limit: int = ROWS_MAX) -> Answer:
        """Raises FatalError."""
        try:
            return query(self._connection, _checked(sql), limit, SystemClock().mono_ms)
        except CannotQuery as error:
            raise FatalError(str(error)) from None

    def back_up(self, file: Path) -> Iterator[tuple[int, int]]:
        """Yields (pages that are copied, pages of all). Raises FatalError."""
        _require_new(self.path, file)
        _require_room(file.parent, size_of(self._connection))
        partial = _partial(file)
        try:
            copy = Copy(self._connection, partial)
            try:
                copied, pages, steps = 0, 1, 0
                while copied < pages:
                    copied, pages = copy.step()
                    steps += 1
                    if copied == pages or steps % STEPS_A_LINE == 0:
                        yield copied, pages
                _rename(partial, file)
            except BaseException:
                copy.drop()
                raise
            copy.close()
        except CannotCopy as error:
            raise FatalError(str(error)) from None
        except OSError as error:
            raise FatalError(f"the copy cannot be named {file}: {error.strerror}") from None


@contextmanager
def reached(settings: Settings) -> Iterator[Running | Stopped]:
    """The database of the broker that these settings are of. Raises FatalError."""
    path = settings.db_path
    if not path.is_file():
        raise FatalError(
            f"there is no database at {path}",
            "give the broker's own settings: its file with -c, or db_path (TASKBROKER_DB_PATH)",
        )
    database: Running | Stopped
    with ExitStack() as stack:
        try:
            # A broker makes this file and keeps it: a copy that is looked into needs none.
            if lock.lock_of(path).exists():
                stack.callback(os.close, lock.take(path, lock.LOOKING))
        except lock.InUse as in_use:
            if in_use.looking:
                raise
            database = Running(settings)
        else:
            database = Stopped(path, stack.enter_context(opened(path)))
        yield database


def _checked(sql: str) -> str:
    try:
        sql.encode()
    except UnicodeEncodeError:
        raise FatalError("the statement is no UTF-8") from None
    return sql


def _value(value: pb.SqlValue) -> Value:
    kind = value.WhichOneof("value")
    found: Value = None if kind is None else getattr(value, kind)
    return found


# -- what is in it


def stats(database: Running | Stopped) -> dict[str, object]:
    """What it holds, name by name. Raises FatalError."""
    tables = {name for (name,) in database.query("SELECT name FROM sqlite_schema WHERE type = 'table'").rows}
    if not {"meta", "activation"} <= tables:
        raise FatalError(f"the database {database.path} is not a broker's")

    def one(sql: str) -> Value:
        rows = database.query(sql).rows
        return rows[0][0] if rows else None

    log = database.path.with_name(database.path.name + "-wal")
    states = _count(database, "activation", "status", "size")
    return {
        "database": str(database.path),
        "read_from": database.said,
        "store_id": one("SELECT value FROM meta WHERE key = 'store_id'"),
        "schema_version": one("PRAGMA user_version"),
        "boot_epoch": one("SELECT max(epoch) FROM boot"),
        "database_bytes": database.path.stat().st_size,
        "wal_bytes": log.stat().st_size if log.exists() else 0,
        "pages": one("PRAGMA page_count"),
        "free_pages": one("PRAGMA freelist_count"),
        "namespaces": one("SELECT count(*) FROM pair"),
        **{
            status.name.lower(): {"tasks": states[status, "rows"], "bytes": states[status, "bytes"]}
            for status in list(Status)[1:]
        },
        "remembered_ids": _count(database, "finished", "0", "length(entries)")[0, "bytes"] // ENTRY_BYTES,
        "dead_letters_resting": _count(database, "dead_letter", "0", "0")[0, "rows"],
        # A database of an older schema has no such table.
        "set_aside": _count(database, "quarantine", "0", "0")[0, "rows"] if "quarantine" in tables else 0,
    }


def _count(database: Running | Stopped, table: str, kind: str, size: str) -> Counter[tuple[int, str]]:
    """(kind, "rows") and (kind, "bytes") of a table, counted a part after the other."""
    found: Counter[tuple[int, str]] = Counter()
    after = -1
    while True:
        part: list[Any] = database.query(
            f"SELECT kind, count(*), sum(size), max(at) FROM (SELECT {kind} AS kind, {size} AS size,"
            f" rowid AS at FROM {table} WHERE rowid > {after} ORDER BY rowid LIMIT {COUNT_ROWS})"
            " GROUP BY kind"
        ).rows
        if not part:
            return found
        for of, rows, size_of_them, last in part:
            found[of, "rows"] += rows
            found[of, "bytes"] += size_of_them
            after = max(after, last)


# -- how it is shown


def as_table(found: Answer) -> Iterator[str]:
    """Lines for a terminal."""
    lines = [[escaped(name) for name in found.columns], *([_shown(v) for v in row] for row in found.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        yield "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()


def _shown(value: Value) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, bytes):
        more = f"... ({len(value):,} bytes)" if len(value) > BLOB_BYTES_SHOWN else ""
        return f"x'{value[:BLOB_BYTES_SHOWN].hex()}'{more}"
    return escaped(str(value))


def as_json(found: Answer) -> Iterator[str]:
    """A list of objects; blobs in hexadecimal. Of columns with one name, later ones are numbered."""
    names: list[str] = []
    for column in found.columns:
        name, n = column, 1
        while name in names:
            n += 1
            name = f"{column}:{n}"
        names.append(name)
    rows = [dict(zip(names, map(_plain, row), strict=True)) for row in found.rows]
    yield json.dumps(rows, indent=2)


def _plain(value: Value) -> Value:
    if isinstance(value, bytes):
        return value.hex()
    # JSON has no infinity.
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


# -- where a copy goes


def _require_new(database: Path, file: Path) -> None:
    if file.exists() or file.is_symlink():
        raise FatalError(f"{file} exists", "a backup overwrites nothing: give another FILE")
    if not file.parent.is_dir():
        raise FatalError(f"there is no directory {file.parent}", "make it first, or give another FILE")
    if not os.access(file.parent, os.W_OK):
        raise FatalError(f"this user cannot write to {file.parent}", "give another FILE")
    if is_own(database, file):
        raise FatalError(f"{file} is a name of the broker's own files", "give another FILE")


def _require_room(folder: Path, needed: int) -> None:
    try:
        require_room(folder, needed)
    except CannotCopy as error:
        raise FatalError(str(error)) from None


def _partial(file: Path) -> Path:
    """Where it is until it is whole; what an earlier command has left is deleted."""
    partial = file.with_name(file.name + ".partial")
    partial.unlink(missing_ok=True)
    return partial


def _move(made: Path, file: Path) -> None:
    """To another file system, too; durable. Raises OSError."""
    try:
        _rename(made, file)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        partial = _partial(file)
        try:
            shutil.copyfile(made, partial)
            with partial.open("rb") as copied:
                os.fsync(copied.fileno())
            _rename(partial, file)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        with suppress(OSError):
            made.unlink()


def _rename(made: Path, file: Path) -> None:
    if file.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
    made.rename(file)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
