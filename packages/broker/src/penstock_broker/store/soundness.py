"""Whether a database can be believed: looked at when it is opened, before anything is made of it."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import apsw
import structlog

from penstock_broker.errors import FatalError

log = structlog.get_logger("store")

# Checking costs about 2.5 us a row. A larger file is checked without its large bodies, unless there is a
# reason to suspect it: each is checked when it is read anyway.
THOROUGH_BYTES_MAX = 1024**3
EPOCH_MAX = 1 << 26
_TABLES = ("meta", "boot", "pair", "source", "activation", "finished", "books")

_INTEGERS = (
    "status", "pair", "ready_at", "spilled", "claim", "claim_epoch", "attempts", "lost", "last_outcome",
    "source", "log_offset", "received_at", "deadline_ms", "max_attempts", "retry_delay_ms", "on_exceeded",
    "at_most_once", "checksum", "size",
)  # fmt: skip
_SOUND = (
    "status BETWEEN 1 AND 4 AND ready_at >= 0 AND claim >= 0 AND attempts >= 0 AND lost >= 0 AND size >= 0"
    " AND on_exceeded BETWEEN 0 AND 2 AND at_most_once BETWEEN 0 AND 1 AND deadline_ms >= 0"
    " AND pair IN (SELECT pair FROM pair) AND (source = 0 OR source IN (SELECT source FROM source))"
)
# Of a body that is not in the row itself.
LARGE_SIZE = "(SELECT length(body) FROM payload WHERE payload.seq = activation.seq)"
_TYPED = " AND ".join(
    [
        *(f"typeof({name}) = 'integer'" for name in _INTEGERS),
        *(f"typeof({name}) IN ('integer', 'null')" for name in ("wake_at", "expires_at", "given_back_at")),
        *(f"typeof({name}) = 'text'" for name in ("id", "taskname")),
        *(f"typeof({name}) IN ('text', 'null')" for name in ("reason", "error")),
    ]
)


class Malformed(FatalError):
    """The database is damaged beyond single rows."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(
            f"the database {path} is malformed: {why}",
            "check the disk. Move the file and the -wal beside it away to begin a new store, and keep them:"
            " what was sent over gRPC is nowhere else",
        )


def schema_digest(connection: apsw.Connection, version: int) -> int:
    """Of the version and the text of the schema, so that a changed bit in them is found."""
    texts = connection.execute("SELECT sql FROM sqlite_schema ORDER BY name").fetchall()
    return zlib.crc32(repr((version, texts)).encode())


def check_schema(connection: apsw.Connection, path: Path, version: int) -> None:
    """Raises Malformed when the database does not have the schema, or the version, that it was given."""
    try:
        given = connection.execute("SELECT value FROM meta WHERE key = 'schema_crc'").get
    except apsw.SQLError as error:
        raise Malformed(path, str(error)) from error
    if given is not None and given != schema_digest(connection, version):
        raise Malformed(path, "its schema, or the number of its version, was changed")


def make_sound(connection: apsw.Connection, path: Path, now: int, *, suspect: bool) -> None:
    """Check everything, mend what can be (indexes), and set rows aside that cannot be right.

    ``suspect``: it was found damaged while a broker ran. Raises Malformed.
    """
    try:
        _make_sound(connection, path, now, suspect)
    except (apsw.CorruptError, apsw.NotADBError, apsw.SQLError, UnicodeDecodeError) as error:
        raise Malformed(path, str(error)) from error


def _make_sound(connection: apsw.Connection, path: Path, now: int, suspect: bool) -> None:
    size = connection.pragma("page_count") * connection.pragma("page_size")
    thorough = suspect or size <= THOROUGH_BYTES_MAX
    if (connection.execute("SELECT max(epoch) FROM boot").get or 0) >= EPOCH_MAX:
        raise Malformed(path, "the number of its starts is impossible")
    problems = _problems(connection, thorough)
    if beyond := [text for text in problems if not _can_be_mended(text)]:
        raise Malformed(path, beyond[0])
    sound = f"{_SOUND} AND size = coalesce(length(body), {LARGE_SIZE if thorough else 'size'})"
    if problems:
        sound += f" AND {_TYPED}"
    wrong = [s for (s,) in connection.execute(f"SELECT seq FROM activation WHERE ({sound}) IS NOT TRUE")]
    wrong += [seq for seq in _not_text(connection, suspect) if seq not in wrong]
    with connection:
        quarantine(connection, wrong, "a column is impossible", now)
        if wrong or problems:
            connection.execute("REINDEX")
    if not problems:
        return
    log.error("the database is damaged", database=str(path), problems=problems[:10], count=len(problems))
    if left := _problems(connection, thorough):
        raise Malformed(path, left[0])
    log.warning("its indexes were made anew, and it is sound again", database=str(path))


def _can_be_mended(problem: str) -> bool:
    """An index is made anew from its table, and a row of a task set aside. Where the names of a namespace
    or a topic differ from their index, nothing says which of the two is right."""
    return " in activation" in problem or (" index " in problem and "sqlite_autoindex" not in problem)


def _not_text(connection: apsw.Connection, suspect: bool) -> list[int]:
    """Rows with a text that is not UTF-8, among the texts that are read of many rows at once."""
    for names in ("SELECT application, namespace FROM pair", "SELECT topic, topic_id, owners FROM source"):
        connection.execute(names).fetchall()
    try:
        for _ in connection.execute("SELECT id, reason FROM activation"):
            pass
        others = f"SELECT taskname, error FROM activation WHERE status = 3 OR {suspect:d}"
        for _ in connection.execute(others):
            pass
    except UnicodeDecodeError:
        as_bytes = ", ".join(f"CAST({name} AS BLOB)" for name in ("id", "reason", "taskname", "error"))
        rows = connection.execute(f"SELECT seq, {as_bytes} FROM activation")
        return [seq for seq, *texts in rows if not all(map(_is_text, texts))]
    return []


def _is_text(value: bytes | None) -> bool:
    try:
        (value or b"").decode()
    except UnicodeDecodeError:
        return False
    return True


def _problems(connection: apsw.Connection, thorough: bool) -> list[str]:
    found: list[str] = []
    for argument in ("1000",) if thorough else _TABLES:
        found += [text for (text,) in connection.execute(f"PRAGMA integrity_check({argument})")]
    return [text for text in found if text != "ok"]


def quarantine(connection: apsw.Connection, seqs: Sequence[int], why: str, now: int) -> None:
    """Keep rows aside, as far as they can be read; they are never handed out. One line of log for each."""
    for seq in seqs:
        values = (seq, now, why)
        try:
            connection.execute(
                "INSERT OR REPLACE INTO quarantine SELECT ?1, ?2, ?3, status, pair, CAST(id AS BLOB),"
                " CAST(taskname AS BLOB), source, log_offset, received_at, checksum,"
                " coalesce(body, (SELECT body FROM payload WHERE payload.seq = ?1))"
                " FROM activation WHERE seq = ?1",
                values,
            )
        except apsw.CorruptError:
            # Its body cannot be read.
            connection.execute("INSERT OR REPLACE INTO quarantine (seq, at, why) VALUES (?, ?, ?)", values)
        connection.execute(
            "INSERT INTO books SELECT coalesce((SELECT pair FROM pair WHERE pair = a.pair),"
            " (SELECT min(pair) FROM pair)), 'quarantined', 1 FROM activation a WHERE seq = ?"
            " ON CONFLICT DO UPDATE SET count = count + 1",
            (seq,),
        )
        connection.execute("DELETE FROM activation WHERE seq = ?", (seq,))
        connection.execute("DELETE FROM payload WHERE seq = ?", (seq,))
        found = connection.execute("SELECT id, taskname FROM quarantine WHERE seq = ?", (seq,)).fetchall()
        kept = found[0] if found else (b"", b"")
        id, taskname = (str(value or b"", "utf-8", "replace") for value in kept)  # type: ignore[arg-type]
        log.error(
            "a task is damaged on disk: it is kept aside (table quarantine), and will not run",
            id=id,
            taskname=taskname,
            seq=seq,
            why=why,
        )
