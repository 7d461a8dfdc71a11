"""All SQL. One connection, used by one thread at a time; a tick is one transaction."""

from __future__ import annotations

import fcntl
import os
import secrets
import struct
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import apsw

from penstock_broker.domain.activation import NO_SOURCE, Activation, OnExceeded, Status, hash_id
from penstock_broker.domain.lifecycle import IllegalTransition, Limits, decide
from penstock_broker.errors import FatalError
from penstock_broker.store.batch import (
    Answer,
    Batch,
    Move,
    PageRequest,
    Report,
    Written,
    move,
    repeated,
    wake_at,
)
from penstock_broker.store.finished import last_of, position
from penstock_broker.store.schema import INLINE_BODY_BYTES_MAX, SCHEMA, SCHEMA_VERSION

# The WAL is copied back to the database once it is this long. docs/adr/0002 has the measurement.
CHECKPOINT_BYTES = 16 * 1024 * 1024
PAGE_BYTES = 4096
# No other process can open the file: a foreign reader would keep the WAL from being reused.
VFS = "unix-excl"
DUE_ROWS_MAX = 2000

_INSERT_COLUMNS = (
    "seq, status, pair, ready_at, wake_at, spilled, attempts, lost, reason, error, source, log_offset,"
    " received_at, expires_at, deadline_ms, max_attempts, on_exceeded, at_most_once, retry_delay_ms, id,"
    " taskname, content, checksum, size, body"
)
_INSERT_WIDTH = _INSERT_COLUMNS.count(",") + 1
_MOVE_WIDTH = len(Move._fields)
# Statements with many rows of values come in few sizes, so that their preparation is cached.
_CHUNKS = (512, 64, 8, 1)

_LOAD_COLUMNS = (
    "a.seq, a.status, a.pair, p.application, p.namespace, a.ready_at, a.claim, a.claim_epoch, a.attempts,"
    " a.lost, a.last_outcome, a.given_back_at, a.reason, a.error, a.source, a.log_offset, a.received_at,"
    " a.expires_at, a.deadline_ms, a.max_attempts, a.on_exceeded, a.at_most_once, a.retry_delay_ms, a.id,"
    " a.taskname, a.content, a.size, a.checksum"
)
_FIXED = struct.Struct(">9q")
_BODY = ", coalesce(a.body, (SELECT body FROM payload WHERE payload.seq = a.seq))"
_FROM = " FROM activation a JOIN pair p ON p.pair = a.pair"


def checksum(row: Activation) -> int:
    """CRC-32 over the columns that never change and the body."""
    names = f"{row.id}\0{row.taskname}".encode("utf-8", "surrogatepass")
    numbers = _FIXED.pack(
        row.seq,
        row.pair,
        row.source,
        row.offset,
        row.received_at,
        -1 if row.expires_at is None else row.expires_at,
        row.deadline_ms,
        row.on_exceeded,
        row.at_most_once,
    )
    return zlib.crc32(numbers, zlib.crc32(names, zlib.crc32(row.body or b"")))


class Database:
    """The file: opened so that no other process can, carrying out ticks.

    Raises FatalError when the file is held by another broker, is no database of ours, or was
    written by a newer version.
    """

    def __init__(self, path: Path | str, limits: Limits, epoch_started_at: int) -> None:
        self.path = Path(path)
        self.limits = limits
        self._lock = self._lock_file()
        try:
            self.connection = self._open()
            self.store_id, self.epoch, self.nonces = self._boot(epoch_started_at)
        except BaseException:
            os.close(self._lock)
            raise
        self.nonce: int = self.nonces[self.epoch]
        self.checkpoint_bytes = CHECKPOINT_BYTES
        self._wal_bytes = 0
        self.connection.set_wal_hook(self._on_wal)

    # -- opening and closing

    def _lock_file(self) -> int:
        path = self.path.with_name(self.path.name + ".lock")
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise FatalError(
                f"cannot open the database {self.path}: {error.strerror}",
                "set db_path (TASKBROKER_DB_PATH) to a file in a directory this user can write to",
            ) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(lock, 100, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(lock)
            raise FatalError(
                f"the database {self.path} is in use by another broker (process {holder})",
                "each broker needs a database of its own: stop the other one, or set another db_path"
                " (TASKBROKER_DB_PATH)",
            ) from None
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        return lock

    def _open(self) -> apsw.Connection:
        try:
            connection = apsw.Connection(str(self.path), vfs=VFS, statementcachesize=200)
            connection.pragma("locking_mode", "exclusive")
            if connection.pragma("journal_mode", "wal") != "wal":
                raise apsw.CantOpenError("the file system does not support a write-ahead log")
            for name, value in (
                ("synchronous", "FULL"),
                ("wal_autocheckpoint", 0),
                ("journal_size_limit", 4 * CHECKPOINT_BYTES),
                ("cache_size", -65536),
                ("temp_store", "MEMORY"),
                ("mmap_size", 0),
                ("trusted_schema", 0),
                ("foreign_keys", 0),
            ):
                connection.pragma(name, value)
            version = connection.pragma("user_version")
            if version == 0:
                self._create(connection)
            elif version > SCHEMA_VERSION:
                connection.close()
                raise FatalError(
                    f"the database {self.path} has schema version {version};"
                    f" this broker knows up to {SCHEMA_VERSION}",
                    "it was written by a newer penstock-broker: run that version, or set another db_path",
                )
        except apsw.BusyError:
            raise FatalError(
                f"the database {self.path} is locked by another process",
                "close whatever has it open: a broker is the only one that may",
            ) from None
        except (
            apsw.CantOpenError,
            apsw.NotADBError,
            apsw.CorruptError,
            apsw.ReadOnlyError,
            apsw.IOError,
        ) as error:
            raise FatalError(
                f"cannot open the database {self.path}: {error}",
                "set db_path (TASKBROKER_DB_PATH) to a broker's database or to a file that is not there yet",
            ) from None
        return connection

    @staticmethod
    def _create(connection: apsw.Connection) -> None:
        if connection.execute("SELECT count(*) FROM sqlite_schema").get:
            raise apsw.NotADBError("it is a database of another program")
        with connection:
            connection.execute(SCHEMA)
            connection.execute("INSERT INTO meta VALUES ('store_id', ?)", (secrets.token_hex(4),))
            connection.pragma("user_version", SCHEMA_VERSION)

    def _boot(self, started_at: int) -> tuple[str, int, dict[int, int]]:
        c = self.connection
        with c:
            epoch = (c.execute("SELECT max(epoch) FROM boot").get or 0) + 1
            c.execute("INSERT INTO boot VALUES (?, ?, ?)", (epoch, secrets.randbits(32), started_at))
            c.execute("DELETE FROM boot WHERE epoch < ?", (epoch - 1000,))
            # The index in memory starts empty: every pending row is paged in, in order.
            c.execute("UPDATE activation SET spilled = 1 WHERE status = 1 AND spilled = 0")
        store_id = c.execute("SELECT value FROM meta WHERE key = 'store_id'").get
        return store_id, epoch, dict(c.execute("SELECT epoch, nonce FROM boot"))

    def close(self) -> None:
        """Copy the WAL back and let go of the file."""
        try:
            self.connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        finally:
            self.connection.close()
            self.release_lock()

    def release_lock(self) -> None:
        """Let another broker have the file."""
        os.close(self._lock)

    def _on_wal(self, connection: apsw.Connection, name: str, frames: int) -> int:
        self._wal_bytes = frames * PAGE_BYTES
        return apsw.SQLITE_OK

    # -- a tick

    def write(self, batch: Batch) -> Written:
        """Carry out ``batch`` in one durable transaction. On an error nothing of it has happened."""
        written = Written()
        c = self.connection
        c.execute("BEGIN IMMEDIATE")
        try:
            self._write(batch, written)
        except BaseException:
            if c.in_transaction:
                c.execute("ROLLBACK")
            raise
        c.execute("COMMIT")
        if self._wal_bytes > self.checkpoint_bytes:
            c.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
            self._wal_bytes = 0
        return written

    def _write(self, batch: Batch, written: Written) -> None:
        c = self.connection
        if batch.new_pairs:
            c.executemany("INSERT INTO pair VALUES (?, ?, ?)", batch.new_pairs)
        if batch.sources:
            c.executemany(
                "INSERT INTO source (source, topic, partition, start, next, covered)"
                " VALUES (?1, ?2, ?3, ?4, ?5, ?6)"
                " ON CONFLICT (source) DO UPDATE SET start = ?4, next = ?5, covered = ?6",
                [(source, *values) for source, values in batch.sources.items()],
            )
        self._claim(batch)
        if batch.moves:
            self._move(batch.moves)
        self.delete(batch.gone, batch.gone_payloads)
        for report in batch.reports:
            self._settle_cold(report, batch)
        if batch.rows:
            self._insert(batch.rows)
        if batch.finished:
            c.execute("INSERT INTO finished VALUES (?, ?)", (batch.stamp, batch.finished.tobytes()))
        for call in batch.calls:
            call(self)
        if batch.books:
            c.executemany(
                "INSERT INTO books VALUES (?1, ?2, ?3) ON CONFLICT DO UPDATE SET count = count + ?3",
                [(pair, term, n) for (pair, term), n in batch.books.items()],
            )
        if batch.due_at is not None:
            self._wake(batch.due_at, batch.stamp + 1, written)
        for page in batch.pages:
            written.pages[page.pair] = list(self._page(page))

    def _claim(self, batch: Batch) -> None:
        if batch.claims:
            self.connection.execute(
                "UPDATE activation SET status = 3, wake_at = NULL, spilled = 0, claim_epoch = ?"
                " WHERE status = 1 AND seq IN carray(?)",
                (self.epoch, apsw.carray(batch.claims)),
            )
        if batch.reclaims:
            self.connection.executemany(
                "UPDATE activation SET status = 3, wake_at = NULL, spilled = 0, claim_epoch = ?2"
                " WHERE status = 1 AND seq = ?1",
                batch.reclaims,
            )

    def _insert(self, rows: Sequence[Activation]) -> None:
        values: list[object] = []
        payloads: list[tuple[int, bytes | None]] = []
        for row in rows:
            body = row.body
            if row.size > INLINE_BODY_BYTES_MAX:
                payloads.append((row.seq, body))
                body = None
            values += (
                row.seq, int(row.status), row.pair, row.ready_at,
                wake_at(row.status, row.ready_at, row.expires_at), row.spilled, row.attempts, row.lost,
                row.reason, row.error, row.source, row.offset, row.received_at, row.expires_at,
                row.deadline_ms, row.max_attempts, int(row.on_exceeded), int(row.at_most_once),
                row.retry_delay_ms, row.id, row.taskname, row.content, checksum(row), row.size, body,
            )  # fmt: skip
        self._in_chunks(values, _INSERT_WIDTH, _INSERT_SQL)
        if payloads:
            self.connection.executemany("INSERT INTO payload VALUES (?, ?)", payloads)

    def _move(self, moves: Sequence[Move]) -> None:
        self._in_chunks(list(chain.from_iterable(moves)), _MOVE_WIDTH, _MOVE_SQL)

    def _in_chunks(self, values: list[object], width: int, sql: dict[int, str]) -> None:
        """Run ``sql[n]`` for n rows of ``values`` at a time: one statement steps through many rows."""
        at, rows = 0, len(values) // width
        for chunk in _CHUNKS:
            while rows >= chunk:
                self.connection.execute(sql[chunk], values[at : at + chunk * width])
                at += chunk * width
                rows -= chunk

    def delete(self, gone: array[int], payloads: array[int]) -> None:
        if gone:
            self.connection.execute("DELETE FROM activation WHERE seq IN carray(?)", (apsw.carray(gone),))
        if payloads:
            self.connection.execute("DELETE FROM payload WHERE seq IN carray(?)", (apsw.carray(payloads),))

    def _settle_cold(self, report: Report, batch: Batch) -> None:
        """Apply an event to a row that memory does not hold, by the same law as to one that it does."""
        row = self.get(report.seq)
        if row is None:
            return
        outcome = report.outcome
        if report.claim is not None and report.claim != row.claim:
            report.answer = repeated(row, report.claim, report.epoch, outcome)
            return
        if row.status not in report.only:
            return
        if report.max_attempts is not None:
            row.max_attempts = report.max_attempts
        if report.claim is not None:
            row.claim_epoch = report.epoch
        try:
            change = decide(row, report.event, report.now, self.limits, report.retry_delay_ms)
        except IllegalTransition:
            return
        report.row, report.change, report.answer = row, change, Answer.APPLIED
        if change.status is Status.GONE:
            gone = array("q", (row.seq,))
            self.delete(gone, gone)
            batch.finished.extend((hash_id(row.id), last_of(row, outcome)))
            if row.source != NO_SOURCE:  # whether it is covered, memory knows
                batch.finished.extend((hash_id(row.id), position(row.source, row.offset)))
            batch.count(row.pair, change.term)
        else:
            ready_at = batch.stamp + 1 if change.status is Status.PENDING else change.ready_at
            self._move([move(row, change, outcome, ready_at, report.error)])

    def _wake(self, now: int, ready_at: int, written: Written) -> None:
        """Delayed rows that are due become pending; expired ones are told to the caller."""
        c = self.connection
        due: list[Any] = c.execute(
            "UPDATE activation SET status = 1, spilled = 1, ready_at = ?2, wake_at = expires_at WHERE seq IN"
            " (SELECT seq FROM activation WHERE wake_at <= ?1 AND status = 2"
            "  AND (expires_at IS NULL OR expires_at > ?1) ORDER BY wake_at LIMIT ?3) RETURNING pair",
            (now, ready_at, DUE_ROWS_MAX),
        ).fetchall()
        for (pair,) in due:
            written.due[pair] = written.due.get(pair, 0) + 1
        written.expired = [
            seq
            for (seq,) in c.execute(
                "SELECT seq FROM activation WHERE wake_at <= ?1 AND expires_at <= ?1 LIMIT ?2",
                (now, DUE_ROWS_MAX),
            )
        ]
        more = len(due) >= DUE_ROWS_MAX or len(written.expired) >= DUE_ROWS_MAX
        written.next_wake_at = now if more else self.next_wake_at(now)

    def next_wake_at(self, after: int) -> int | None:
        """The first wall clock time after ``after`` at which a delay or an expiry is due."""
        value = self.connection.execute("SELECT min(wake_at) FROM activation WHERE wake_at > ?", (after,)).get
        return None if value is None else int(value)

    # -- reading

    def _page(self, page: PageRequest) -> Iterator[Activation]:
        taken = 0
        for record in self.connection.execute(
            f"SELECT {_LOAD_COLUMNS}{_BODY}{_FROM} WHERE a.status = 1 AND a.spilled = 1 AND a.pair = ?1"
            " AND (a.ready_at, a.seq) > (?2, ?3) ORDER BY a.ready_at, a.seq LIMIT ?4",
            (page.pair, page.after_ready_at, page.after_seq, page.rows),
        ):
            row = _load(record)
            yield row
            taken += row.size
            if taken >= page.bytes:
                return

    def spilled_before(self, pair: int, ready_at: int, limit: int) -> list[int]:
        """Spilled pending rows of a pair that became ready no later, the first ones."""
        return [
            seq
            for (seq,) in self.connection.execute(
                "SELECT seq FROM activation WHERE status = 1 AND spilled = 1 AND pair = ? AND ready_at <= ?"
                " ORDER BY ready_at, seq LIMIT ?",
                (pair, ready_at, limit),
            )
        ]

    def get(self, seq: int) -> Activation | None:
        """One row, with its body."""
        for row in self.load([seq]):
            return row
        return None

    def load(self, seqs: Sequence[int]) -> list[Activation]:
        """Rows with their bodies, in the order of ``seq``."""
        if not seqs:
            return []
        sql = f"SELECT {_LOAD_COLUMNS}{_BODY}{_FROM} WHERE a.seq IN carray(?) ORDER BY a.seq"
        return [_load(r) for r in self.connection.execute(sql, (apsw.carray(array("q", seqs)),))]

    def processing(self) -> Iterator[Activation]:
        """Claimed rows, without their bodies."""
        sql = f"SELECT {_LOAD_COLUMNS}, NULL{_FROM} WHERE a.status = 3"
        return (_load(r) for r in self.connection.execute(sql))

    def pairs(self) -> list[tuple[int, str, str]]:
        return list(self.connection.execute("SELECT pair, application, namespace FROM pair"))

    def sources(self) -> list[tuple[int, str, int, int, int, int]]:
        return list(
            self.connection.execute("SELECT source, topic, partition, start, next, covered FROM source")
        )

    def counts(self) -> list[tuple[int, int, int, int]]:
        """(pair, status, rows, bytes)."""
        return list(
            self.connection.execute(
                "SELECT pair, status, count(*), sum(size) FROM activation GROUP BY pair, status"
            )
        )

    def positions(self) -> Iterator[tuple[int, int, str, int, int, int, int, str | None]]:
        """(seq, status, id, content, source, offset, size, reason) of every row."""
        return iter(
            self.connection.execute(
                "SELECT seq, status, id, content, source, log_offset, size, reason FROM activation"
            )
        )

    def with_state(self) -> Iterator[Activation]:
        """Rows from the log that differ from their messages, without bodies."""
        sql = (
            f"SELECT {_LOAD_COLUMNS}, NULL{_FROM} WHERE a.source != 0 AND (a.status IN (2, 4)"
            " OR a.attempts > 0 OR a.lost > 0 OR a.given_back_at IS NOT NULL"
            " OR a.status = 3 AND a.at_most_once = 1)"
        )
        return (_load(r) for r in self.connection.execute(sql))

    def meta(self, key: str) -> object:
        """A value of the store as a whole; None when it was never set."""
        return self.connection.execute("SELECT value FROM meta WHERE key = ?", (key,)).get

    def set_meta(self, key: str, value: str | int) -> None:
        self.connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def may_leave(self, running: bool, limit: int) -> list[int]:
        """The seqs of some rows that another broker can go on with; ``running``: of claimed ones, too."""
        sql = (
            "SELECT seq FROM activation WHERE status IN (1, 2) OR (status = 3 AND ?1 AND NOT at_most_once)"
            " LIMIT ?2"
        )
        return [seq for (seq,) in self.connection.execute(sql, (running, limit))]

    def last_ready_at(self) -> int:
        """The latest place in the order of hand-out that any pending row has."""
        return self.connection.execute("SELECT max(ready_at) FROM activation WHERE status = 1").get or 0

    def finished(self) -> Iterator[tuple[int, bytes]]:
        """(time, packed entries), oldest first."""
        return iter(self.connection.execute("SELECT at, entries FROM finished ORDER BY at"))

    def forget_finished(self, before: int) -> None:
        self.connection.execute("DELETE FROM finished WHERE at < ?", (before,))

    def books(self) -> dict[tuple[int, str], int]:
        return {(p, t): n for p, t, n in self.connection.execute("SELECT pair, term, count FROM books")}

    # -- dead letters that rest here

    def rest_dead_letters(self, letters: Iterable[tuple[object, ...]]) -> None:
        self.connection.executemany("INSERT INTO dead_letter VALUES (?, ?, ?, ?, ?, ?, ?, ?)", letters)

    def dead_letter_count(self) -> int:
        return int(self.connection.execute("SELECT count(*) FROM dead_letter").get)

    def dead_letters(self, limit: int) -> list[tuple[int, int, str, str, str, str]]:
        """(seq, time, id, taskname, reason, story), newest first."""
        return list(
            self.connection.execute(
                "SELECT seq, at, id, taskname, reason, story FROM dead_letter ORDER BY seq DESC LIMIT ?",
                (limit,),
            )
        )


def _rows_of(n: int, width: int) -> str:
    return ",".join(["(" + ",".join("?" * width) + ")"] * n)


_INSERT_SQL = {
    n: f"INSERT INTO activation ({_INSERT_COLUMNS}) VALUES {_rows_of(n, _INSERT_WIDTH)}" for n in _CHUNKS
}
_MOVE_SQL = {
    n: f"WITH v ({', '.join(Move._fields)}) AS (VALUES {_rows_of(n, _MOVE_WIDTH)}) UPDATE activation SET "
    + ", ".join(f"{f} = v.{f}" for f in Move._fields[3:])
    + " FROM v WHERE activation.seq = v.seq AND activation.status = v.from_status"
    " AND activation.claim = v.from_claim"
    for n in _CHUNKS
}


def _load(record: Sequence[Any]) -> Activation:
    (
        seq, status, pair, application, namespace, ready_at, claim, claim_epoch, attempts, lost,
        last_outcome, given_back_at, reason, error, source, offset, received_at, expires_at, deadline_ms,
        max_attempts, on_exceeded, at_most_once, retry_delay_ms, id, taskname, content, size, _checksum, body,
    ) = record  # fmt: skip
    return Activation(
        id=id, application=application, namespace=namespace, taskname=taskname, body=body,
        received_at=received_at, ready_at=ready_at, expires_at=expires_at, deadline_ms=deadline_ms,
        max_attempts=max_attempts, on_exceeded=OnExceeded(on_exceeded), at_most_once=bool(at_most_once),
        retry_delay_ms=retry_delay_ms, source=source, offset=offset, status=Status(status), claim=claim,
        claim_epoch=claim_epoch, attempts=attempts, lost=lost, last_outcome=last_outcome,
        given_back_at=given_back_at, reason=reason, error=error, content=content, seq=seq, pair=pair,
        size=size,
    )  # fmt: skip
