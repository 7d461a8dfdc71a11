"""All SQL. One connection, used by one thread at a time; a tick is one transaction."""

from __future__ import annotations

import os
import secrets
import struct
import sys
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, cast

import apsw
import structlog

from penstock_broker.domain.activation import NO_SOURCE, Activation, OnExceeded, Status, hash_id
from penstock_broker.domain.lifecycle import IllegalTransition, Limits, decide
from penstock_broker.errors import FatalError
from penstock_broker.store.batch import (
    Answer,
    Batch,
    Damaged,
    Move,
    PageRequest,
    Report,
    Written,
    keep_said,
    move,
    repeated,
    wake_at,
)
from penstock_broker.store.copying import CannotCopy, Copy, forget_backups, require_room, size_of
from penstock_broker.store.finished import is_report, last_of, position
from penstock_broker.store.lock import lock_of, take
from penstock_broker.store.schema import INLINE_BODY_BYTES_MAX, MIGRATIONS, SCHEMA, SCHEMA_VERSION
from penstock_broker.store.soundness import (
    LARGE_SIZE,
    Malformed,
    check_schema,
    make_sound,
    quarantine,
    schema_digest,
)
from penstock_broker.store.space import Space, reserve_of

log = structlog.get_logger("store")

# The WAL is copied back to the database once it is this long. docs/adr/0002 has the measurement.
CHECKPOINT_BYTES = 16 * 1024 * 1024
# On a disk that is nearly full, at this length.
LOW_CHECKPOINT_BYTES = 1024 * 1024
# At this length it must be before anything else is written, and one more tick fits in below the maximum.
WAL_BYTES_LATE = 24 * 1024 * 1024
WAL_BYTES_MAX = 64 * 1024 * 1024
PAGE_BYTES = 4096
# No other process can open the file: a foreign reader would keep the WAL from being reused.
VFS = "unix-excl"
# The epoch of the last start, if all claims since had tokens: their workers send heartbeats.
HEARTBEATS_OF = "heartbeats_of"
DUE_ROWS_MAX = 2000

SPILL_ROWS_MAX = 10_000
# SQLite's VFS takes no more in one call.
REWRITE_BYTES = 64 * 1024
_OPEN_DATABASE = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_MAIN_DB
_OPEN_LOG = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_WAL
_FAILED_SYNCS = (apsw.SQLITE_IOERR_FSYNC, apsw.SQLITE_IOERR_DIR_FSYNC)

_INSERT_COLUMNS = (
    "seq, status, pair, ready_at, wake_at, spilled, attempts, lost, given_back_at, reason, error, source,"
    " log_offset,"
    " received_at, expires_at, deadline_ms, max_attempts, on_exceeded, at_most_once, retry_delay_ms, id,"
    " taskname, content, checksum, size, body"
)
_INSERT_WIDTH = _INSERT_COLUMNS.count(",") + 1
_MOVE_WIDTH = len(Move._fields)
# Statements with many rows of values come in few sizes, so that their preparation is cached.
# And their text stays below what apsw caches, 16,384 characters.
_CHUNKS = (256, 64, 8, 1)

_LETTER_COLUMNS = "seq, at, pair, id, taskname, reason, story, length(body)"
_FIXED = struct.Struct(">10q")
_FROM = " FROM activation a JOIN pair p ON p.pair = a.pair"


def _select(body: str) -> str:
    """As an Activation has its fields, from the first to the size; then the checksum."""
    return (
        f"SELECT a.id, p.application, p.namespace, a.taskname, {body}, a.received_at, a.ready_at,"
        " a.expires_at, a.deadline_ms, a.max_attempts, a.on_exceeded, a.at_most_once, a.retry_delay_ms,"
        " a.source, a.log_offset, a.status, a.claim, a.claim_epoch, a.attempts, a.lost, a.last_outcome,"
        f" a.given_back_at, a.reason, a.error, a.content, a.seq, a.pair, 0, a.size, a.checksum{_FROM}"
    )


_WITH_BODY = _select("coalesce(a.body, (SELECT body FROM payload WHERE payload.seq = a.seq))")
_WITHOUT_BODY = _select("NULL")
# To look one up in its class costs ten times as much.
_STATUSES = {int(status): status for status in Status}
_ON_EXCEEDED = {int(kind): kind for kind in OnExceeded}


class RestingLetter(NamedTuple):
    """A dead letter in the store's own table. ``story``: JSON, as Outbox writes it."""

    seq: int
    at: int
    pair: int
    id: str
    taskname: str
    reason: str
    story: str
    size: int
    # None: not asked for.
    body: bytes | None


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
        row.content,
    )
    return zlib.crc32(numbers, zlib.crc32(names, zlib.crc32(row.body or b"")))


def suspect_of(path: Path) -> Path:
    """A file with a byte for each time that the database was found damaged while a broker ran, since one
    stopped in order."""
    return path.with_name(path.name + ".suspect")


class DiskFailing(Exception):
    """A tick has not happened because the disk failed or is full; it may succeed later."""

    def __init__(self, cause: apsw.Error) -> None:
        super().__init__(str(cause) or type(cause).__name__)
        self.full = isinstance(cause, apsw.FullError)


class Database:
    """The file: opened so that no other process can, carrying out ticks.

    Raises FatalError when the file is held by another broker, is no database of ours, or was
    written by a newer version.
    """

    def __init__(self, path: Path | str, limits: Limits, epoch_started_at: int) -> None:
        self.path = Path(path)
        self.limits = limits
        # A file that is no database is taken for a damaged one only where a broker has been before.
        self._was_ours = lock_of(self.path).exists()
        self._lock = take(self.path)
        self.checkpoint_bytes = CHECKPOINT_BYTES
        # Watched after each tick; None: not watched.
        self.space: Space | None = None
        self._wal_bytes = 0
        # Set by SQLite once a transaction is in the WAL.
        self._committed = False
        # Whether what is in the WAL can be believed.
        self._broken = False
        # Rows found damaged in the tick under way.
        self._damaged: list[Damaged] = []
        # Being made, in steps between ticks.
        self._copy: Copy | None = None
        self._file: apsw.VFSFile | None = None
        try:
            self._take_file()
            # A broker that was killed has left them, and starting may need the space.
            reserve_of(self.path).unlink(missing_ok=True)
            forget_backups(self.path)
            self._rewrite_log()
            self.connection = apsw.Connection(str(self.path), vfs=VFS, statementcachesize=200)
            try:
                self._open(epoch_started_at)
            except BaseException:
                self._broken = True
                self._close_connection()
                raise
        except BaseException as error:
            self.release_lock()
            self._explain(error)
            raise

    # -- opening and closing

    def _take_file(self) -> None:
        """Take SQLite's own lock before anything beside the database is touched: somebody may have removed
        the lock file of a broker that runs. With this VFS the process has it until the file is closed."""
        try:
            self._file = apsw.VFSFile(VFS, str(self.path), [_OPEN_DATABASE, 0])
        except (apsw.CantOpenError, apsw.IOError):
            return  # there is none, or opening the database tells
        self._file.xLock(apsw.SQLITE_LOCK_SHARED)
        self._file.xUnlock(apsw.SQLITE_LOCK_NONE)

    def _rewrite_log(self) -> None:
        """Write what is left of a WAL once more, and sync it.

        After a sync that failed, the kernel goes on showing what it could not write, and takes it for
        written: SQLite would build on ticks that a power cut makes disappear, with all that follows.
        """
        try:
            log_file = apsw.VFSFile(VFS, f"{self.path}-wal", [_OPEN_LOG, 0])
        except (apsw.CantOpenError, apsw.IOError):
            return  # there is none, or opening the database tells
        try:
            size = log_file.xFileSize()
            for at in range(0, size, REWRITE_BYTES):
                log_file.xWrite(log_file.xRead(min(REWRITE_BYTES, size - at), at), at)
            log_file.xSync(apsw.SQLITE_SYNC_FULL)
        finally:
            log_file.xClose()

    def _open(self, started_at: int) -> None:
        connection = self.connection
        connection.pragma("locking_mode", "exclusive")
        # Of a new database. A large payload is freed by what its pages are known to be, without reading them.
        connection.pragma("auto_vacuum", "incremental")
        if connection.pragma("journal_mode", "wal") != "wal":
            raise apsw.CantOpenError("the file system does not support a write-ahead log")
        for name, value in (
            ("synchronous", "FULL"),
            ("wal_autocheckpoint", 0),
            ("journal_size_limit", WAL_BYTES_MAX),
            ("cache_size", -8192),
            ("temp_store", "MEMORY"),
            ("mmap_size", 0),
            ("trusted_schema", 0),
            ("foreign_keys", 0),
        ):
            connection.pragma(name, value)
        # After wal_autocheckpoint, which is a hook itself.
        connection.set_wal_hook(self._on_wal)
        version = connection.pragma("user_version")
        if 0 < version <= SCHEMA_VERSION:
            check_schema(connection, self.path, version)
        if version == 0:
            self._create(connection)
        elif version > SCHEMA_VERSION:
            raise FatalError(
                f"the database {self.path} has schema version {version};"
                f" this broker knows up to {SCHEMA_VERSION}",
                "it was written by a newer penstock-broker: run that version, or set another db_path",
            )
        else:
            self._migrate(connection, version)
            self._make_sound(started_at)
        self.store_id, self.epoch, self.nonces = self._boot(started_at)
        self.nonce: int = self.nonces[self.epoch]
        self._meta: dict[str, object] = dict(connection.execute("SELECT key, value FROM meta"))

    def _explain(self, error: BaseException) -> None:
        """Raise what an error at the start means for the operator; return if it is none of these."""
        if isinstance(error, apsw.BusyError):
            raise FatalError(
                f"the database {self.path} is locked by another process",
                "close whatever has it open: a broker is the only one that may",
            ) from None
        damaged = (apsw.CorruptError, apsw.SQLError, apsw.ConstraintError, ValueError)
        if isinstance(error, damaged) or (isinstance(error, apsw.NotADBError) and self._was_ours):
            raise Malformed(self.path, str(error)) from None
        if isinstance(error, apsw.FullError):
            raise FatalError(
                f"cannot open the database {self.path}: the disk is full",
                "free some space there; then start again",
            ) from None
        if isinstance(error, (apsw.CantOpenError, apsw.NotADBError, apsw.ReadOnlyError, apsw.IOError)):
            raise FatalError(
                f"cannot open the database {self.path}: {error}",
                "set db_path (TASKBROKER_DB_PATH) to a broker's database or to a file that is not there yet",
            ) from None

    def _make_sound(self, now: int) -> None:
        path = suspect_of(self.path)
        strikes = path.stat().st_size if path.exists() else 0
        if strikes > 1:
            raise Malformed(self.path, "it was found damaged again, though it looked sound at the start")
        make_sound(self.connection, self.path, now, suspect=strikes > 0)

    def suspect(self, why: str) -> Malformed:
        """The error with which to stop; the next start looks at all of the database."""
        self._broken = True
        with suppress(OSError), suspect_of(self.path).open("ab") as file:
            file.write(b"!")
        return Malformed(self.path, why)

    @staticmethod
    def _create(connection: apsw.Connection) -> None:
        if connection.execute("SELECT count(*) FROM sqlite_schema").get:
            raise apsw.NotADBError("it is a database of another program")
        with connection:
            connection.execute(SCHEMA)
            connection.execute("INSERT INTO meta VALUES ('store_id', ?)", (secrets.token_hex(4),))
            Database._remember_schema(connection, SCHEMA_VERSION)

    @staticmethod
    def _migrate(connection: apsw.Connection, version: int) -> None:
        """One version at a time, each whole or not at all: what is interrupted goes on from there."""
        for next_version in range(version + 1, SCHEMA_VERSION + 1):
            with connection:
                connection.execute(MIGRATIONS[next_version])
                Database._remember_schema(connection, next_version)
            log.info("the database has a new schema", version=next_version)

    @staticmethod
    def _remember_schema(connection: apsw.Connection, version: int) -> None:
        connection.execute(
            "INSERT OR REPLACE INTO meta VALUES ('schema_crc', ?)", (schema_digest(connection, version),)
        )
        connection.pragma("user_version", version)

    def _boot(self, started_at: int) -> tuple[str, int, dict[int, int]]:
        c = self.connection
        with c:
            epoch = (c.execute("SELECT max(epoch) FROM boot").get or 0) + 1
            c.execute("INSERT INTO boot VALUES (?, ?, ?)", (epoch, secrets.randbits(32), started_at))
            c.execute("DELETE FROM boot WHERE epoch < ?", (epoch - 1000,))
            self.heartbeats_of = c.execute("SELECT value FROM meta WHERE key = ?", (HEARTBEATS_OF,)).get
            c.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (HEARTBEATS_OF, epoch))
        self._spill_all()
        store_id = c.execute("SELECT value FROM meta WHERE key = 'store_id'").get
        return store_id, epoch, dict(c.execute("SELECT epoch, nonce FROM boot"))

    def _spill_all(self) -> None:
        """The index in memory starts empty: every pending row is paged in, in order. In parts, so that the
        WAL stays short."""
        last = -1
        while True:
            spilled = self.connection.execute(
                "UPDATE activation SET spilled = 1 WHERE seq IN (SELECT seq FROM activation"
                " WHERE seq > ? AND status = 1 AND spilled = 0 ORDER BY seq LIMIT ?) RETURNING seq",
                (last, SPILL_ROWS_MAX),
            ).fetchall()
            if not spilled:
                return
            last = max(int(seq or 0) for (seq,) in spilled)
            if self._wal_bytes > self.checkpoint_bytes:
                self._checkpoint()

    def watch_space(self, space: Space) -> None:
        """Before the first tick: watch the free space from now on, and lay out the log if there is enough; on
        a small disk, a sixth of the reserve."""
        self.space = space
        if not space.watch():
            self.lay_out_log(min(self.checkpoint_bytes, space.reserve_bytes // 6))

    def lay_out_log(self, length: int) -> None:
        """Give the WAL so many bytes, in zeros, which SQLite takes for no part of it: a sync that lengthens a
        file has the file system write a transaction of its own (docs/adr/0002)."""
        try:
            log_file = apsw.VFSFile(VFS, f"{self.path}-wal", [_OPEN_LOG, 0])
            try:
                _lengthen(log_file, length)
            finally:
                log_file.xClose()
        except (apsw.CantOpenError, apsw.FullError, apsw.IOError) as error:
            # No promise depends on it; what does tells whether the disk can be used.
            log.warning("the write-ahead log is not laid out: it grows with each tick", error=str(error))

    def close(self) -> None:
        """Copy the WAL back and let go of the file."""
        self.drop_copy()
        try:
            if not self._broken:
                self._checkpoint(apsw.SQLITE_CHECKPOINT_TRUNCATE)
                suspect_of(self.path).unlink(missing_ok=True)
        except (DiskFailing, FatalError) as error:
            log.warning("the write-ahead log is kept until the next start", error=str(error))
        finally:
            self._close_connection()
            if self.space is not None:
                self.space.close()
            self.release_lock()

    def _close_connection(self) -> None:
        if self._broken:
            # What it cannot be sure of must not be copied into the database.
            self.connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        # On a disk that fails still: what could not be copied back is in the WAL.
        with suppress(apsw.Error):
            self.connection.close(True)

    def release_lock(self) -> None:
        """Let another broker have the file."""
        if self._file is not None:
            self._file.xClose()
        os.close(self._lock)

    def _on_wal(self, connection: apsw.Connection, name: str, frames: int) -> int:
        self._committed = True
        self._wal_bytes = frames * PAGE_BYTES
        return apsw.SQLITE_OK

    # -- a tick

    def write(self, batch: Batch) -> Written:
        """Carry out ``batch`` in one durable transaction.

        Raises DiskFailing when the disk failed and nothing of it has happened: it can be written again.
        After any other error the store must stop: FatalError when its cause is known.
        """
        try:
            written = self._attempt(batch)
        except DiskFailing as failing:
            if not (failing.full and self.space is not None and self.space.give_up()):
                raise
            written = self._attempt(batch)
        low = self.space is not None and self.space.low
        if self._wal_bytes > (LOW_CHECKPOINT_BYTES if low else self.checkpoint_bytes):
            try:
                self._checkpoint()
            except DiskFailing as failing:
                log.warning("the write-ahead log could not be copied back; it grows", error=str(failing))
                if failing.full and self.space is not None:
                    self.space.give_up()
        written.disk_low = self.space is not None and self.space.watch()
        return written

    def _attempt(self, batch: Batch) -> Written:
        if self._wal_bytes > WAL_BYTES_LATE:
            # It could not be copied back until now: no tick before it is.
            self._checkpoint()
        written = Written()
        finished, books = len(batch.finished), dict(batch.books)
        self._committed = False
        try:
            self.connection.execute("BEGIN IMMEDIATE")
            self._write(batch, written)
            self.connection.execute("COMMIT")
        except BaseException as error:
            # SQLite may report what went wrong after the commit; the hook knows.
            if not self._committed:
                if self.connection.in_transaction:
                    self.connection.execute("ROLLBACK")
                del batch.finished[finished:]
                batch.books = books
                self._judge(error)
                raise
        return written

    def _checkpoint(self, mode: int = apsw.SQLITE_CHECKPOINT_PASSIVE) -> None:
        """Copy the WAL back, so that the next tick begins it anew."""
        try:
            frames, copied = self.connection.wal_checkpoint(mode=mode)
        except apsw.Error as error:
            self._judge(error)
            raise
        if frames == copied:
            self._wal_bytes = 0

    def _judge(self, error: BaseException) -> None:
        """Raise what an error of SQLite means for the broker; return if it is none of these."""
        if isinstance(error, (apsw.CorruptError, apsw.NotADBError)):
            raise self.suspect(str(error)) from error
        if isinstance(error, (apsw.ConstraintError, ValueError)):
            raise self.suspect(f"a row is impossible ({error})") from error
        if getattr(error, "extendedresult", 0) in _FAILED_SYNCS:
            self._broken = True
            raise FatalError(
                f"the disk could not make {self.path} durable (fsync failed); nothing after that was"
                " acknowledged",
                "check the disk; what was acknowledged before is in the database, so start again on it"
                " once the disk can be trusted",
            ) from error
        if isinstance(error, (apsw.IOError, apsw.FullError)):
            raise DiskFailing(error) from error

    def _write(self, batch: Batch, written: Written) -> None:
        c = self.connection
        self._damaged, self._now = [], batch.now
        if batch.new_pairs:
            c.executemany("INSERT INTO pair (pair, application, namespace) VALUES (?, ?, ?)", batch.new_pairs)
        if batch.sources:
            c.executemany(
                "INSERT INTO source (source, topic, partition, start, next, covered, topic_id)"
                " VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7) ON CONFLICT (source)"
                " DO UPDATE SET topic = ?2, start = ?4, next = ?5, covered = ?6, topic_id = ?7",
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
            c.execute("INSERT INTO finished VALUES (?, ?)", (batch.now, array("q", batch.finished)))
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
            written.pages[page.pair] = self._page(page)
        written.damaged = self._damaged

    def _claim(self, batch: Batch) -> None:
        if batch.claims:
            self.connection.execute(
                "UPDATE activation SET status = 3, wake_at = NULL, spilled = 0, claim_epoch = ?"
                " WHERE status = 1 AND seq IN carray(?)",
                (self.epoch, apsw.carray(array("q", batch.claims))),
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
                row.seq, row.status, row.pair, row.ready_at,
                wake_at(row.status, row.ready_at, row.expires_at), row.spilled, row.attempts, row.lost,
                row.given_back_at,
                row.reason, row.error, row.source, row.offset, row.received_at, row.expires_at,
                row.deadline_ms, row.max_attempts, row.on_exceeded, row.at_most_once,
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

    def delete(self, gone: Sequence[int], payloads: Sequence[int]) -> None:
        for table, seqs in (("activation", gone), ("payload", payloads)):
            if seqs:
                sql = f"DELETE FROM {table} WHERE seq IN carray(?)"
                self.connection.execute(sql, (apsw.carray(array("q", seqs)),))

    def _settle_cold(self, report: Report, batch: Batch) -> None:
        """Apply an event to a row that memory does not hold, by the same law as to one that it does."""
        row = self.get(report.seq)
        outcome = report.outcome
        if row is None:
            # It may have left in this very tick.
            claim = (report.epoch, report.seq, report.claim or 0, outcome)
            if report.claim is not None and any(is_report(last, *claim) for last in batch.finished[1::2]):
                report.answer = Answer.DUPLICATE
            return
        if report.claim is not None and report.claim != row.claim:
            report.answer = repeated(row, report.claim, report.epoch, outcome)
            return
        if not report.may_meet(row):
            return
        if report.claim is None:
            keep_said(row, report.max_attempts, report.retry_delay_ms)
        else:
            row.claim_epoch = report.epoch
        try:
            change = decide(row, report.event, report.now, self.limits, report.retry_delay_ms)
        except IllegalTransition:
            return
        report.row, report.change, report.answer = row, change, Answer.APPLIED
        if change.status is Status.GONE:
            self.delete([row.seq], [row.seq])
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

    # -- a copy, in steps between ticks

    def begin_copy(self, path: Path) -> None:
        """Begin one at ``path``, in place of any before it. Raises CannotCopy."""
        forget_backups(self.path)
        reserve = self.space.reserve_bytes if self.space is not None else 0
        require_room(path.parent, size_of(self.connection) + reserve)
        self._copy = Copy(self.connection, path)

    def copy_on(self) -> tuple[int, int]:
        """A step of it: (pages that are copied, pages of all), equal at its end. Raises CannotCopy."""
        assert self._copy is not None
        if self.space is not None and self.space.watch():
            raise CannotCopy("the backup is given up: the disk is nearly full")
        copied, pages = self._copy.step()
        if copied == pages:
            self._copy.close()
            self._copy = None
        return copied, pages

    def drop_copy(self) -> None:
        """Give up the one that is being made, if there is one."""
        if self._copy is not None:
            self._copy.drop()
            self._copy = None

    # -- reading

    def _page(self, page: PageRequest) -> list[Activation]:
        return self.load_sound(
            "a.status = 1 AND a.spilled = 1 AND a.pair = ?1 AND (a.ready_at, a.seq) > (?2, ?3)"
            " ORDER BY a.ready_at, a.seq LIMIT ?4",
            (page.pair, page.after_ready_at, page.after_seq, page.rows),
            page.bytes,
        )

    def ready(self, seqs: Sequence[int]) -> list[Activation]:
        """Those of these rows that are pending; in a tick only."""
        return self.load_sound("a.status = 1 AND a.seq IN carray(?1)", (apsw.carray(array("q", seqs)),))

    def load_sound(
        self, where: str, values: tuple[object, ...], bytes_max: int = sys.maxsize
    ) -> list[Activation]:
        """Rows with their bodies, which may be handed out or forwarded; in a tick only.

        What does not fit its checksum, or cannot be read, is set aside.
        """
        rows: list[Activation] = []
        damaged: list[int] = []
        size = 0
        try:
            for record in self.connection.execute(f"{_WITH_BODY} WHERE {where}", values):
                row = _load(record)
                if checksum(row) == record[-1]:
                    rows.append(row)
                else:
                    damaged.append(row.seq)
                size += row.size
                if size >= bytes_max:
                    break
        except ValueError:  # text that is none, or a number out of its range
            seqs = [s for (s,) in self.connection.execute(f"SELECT a.seq{_FROM} WHERE {where}", values)]
            return self._load_each(seqs, bytes_max)
        for seq in damaged:
            self._set_aside(seq, "its checksum does not fit")
        return rows

    def _load_each(self, seqs: Sequence[int], bytes_max: int) -> list[Activation]:
        rows: list[Activation] = []
        size = 0
        for seq in seqs:
            if size >= bytes_max:
                break
            try:
                row = self.get(seq)
            except ValueError:
                self._set_aside(seq, "it cannot be read")
                continue
            if row is None:
                continue
            if checksum(row) == self._checksum_of(seq):
                rows.append(row)
                size += row.size
            else:
                self._set_aside(seq, "its checksum does not fit")
        return rows

    def _checksum_of(self, seq: int) -> int:
        return int(self.connection.execute("SELECT checksum FROM activation WHERE seq = ?", (seq,)).get)

    def _set_aside(self, seq: int, why: str) -> None:
        ((pair, status, size),) = cast(
            "list[tuple[int, int, int]]",
            self.connection.execute(
                f"SELECT pair, status, coalesce(length(body), {LARGE_SIZE}, size) FROM activation"
                " WHERE seq = ?",
                (seq,),
            ).fetchall(),
        )
        quarantine(self.connection, [seq], why, self._now)
        self._damaged.append(Damaged(seq, pair, status, size))

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

    def load_forwarded(self, seqs: Sequence[int]) -> list[Activation]:
        """Rows that are to leave, with their bodies, in the order of ``seqs``; in a tick only."""
        if not seqs:
            return []
        rows = {r.seq: r for r in self.load_sound("a.seq IN carray(?)", (apsw.carray(array("q", seqs)),))}
        return [rows[seq] for seq in seqs if seq in rows]

    def load_claimed(self, seqs: Sequence[int]) -> list[Activation]:
        """Rows that are handed out once more, with their bodies; not those that are damaged."""
        sql = f"{_WITH_BODY} WHERE a.seq IN carray(?)"
        records = self.connection.execute(sql, (apsw.carray(array("q", seqs)),)) if seqs else ()
        return [row for record in records if checksum(row := _load(record)) == record[-1]]

    def quarantined(self) -> int:
        return int(self.connection.execute("SELECT count(*) FROM quarantine").get)

    def load(self, seqs: Sequence[int], *, bodies: bool = True) -> list[Activation]:
        """Rows in the order of ``seq``."""
        if not seqs:
            return []
        sql = f"{_WITH_BODY if bodies else _WITHOUT_BODY} WHERE a.seq IN carray(?) ORDER BY a.seq"
        return [_load(r) for r in self.connection.execute(sql, (apsw.carray(array("q", seqs)),))]

    def processing(self) -> Iterator[Activation]:
        """Claimed rows, without their bodies."""
        sql = f"{_WITHOUT_BODY} WHERE a.status = 3"
        return (_load(r) for r in self.connection.execute(sql))

    def pairs(self) -> list[tuple[int, str, str, int | None]]:
        """(pair, application, namespace, since when it is paused)."""
        return list(self.connection.execute("SELECT pair, application, namespace, paused_at FROM pair"))

    def pause(self, pair: int, at: int | None) -> None:
        """Note since when a pair is paused; None: it is not."""
        self.connection.execute("UPDATE pair SET paused_at = ?2 WHERE pair = ?1", (pair, at))

    def sources(self) -> list[tuple[int, str, int, int, int, int, str]]:
        sql = "SELECT source, topic, partition, start, next, covered, topic_id FROM source"
        return list(self.connection.execute(sql))

    def counts(self) -> list[tuple[int, int, int, int]]:
        """(pair, status, rows, bytes)."""
        return list(
            self.connection.execute(
                "SELECT pair, status, count(*), sum(size) FROM activation GROUP BY pair, status"
            )
        )

    def positions(self) -> Iterator[tuple[int, int, str, int, int, int, int, str | None]]:
        """(seq, status, id, content, source, offset, size, reason) of every row, in the order of ``seq``."""
        return iter(
            self.connection.execute(
                "SELECT seq, status, id, content, source, log_offset, size, reason FROM activation"
                " ORDER BY seq"
            )
        )

    def with_state(self) -> Iterator[Activation]:
        """Rows from the log that differ from their messages, without bodies."""
        sql = (
            f"{_WITHOUT_BODY} WHERE a.source != 0 AND (a.status IN (2, 4)"
            " OR a.attempts > 0 OR a.lost > 0 OR a.given_back_at IS NOT NULL"
            " OR a.status = 3 AND a.at_most_once = 1)"
        )
        return (_load(r) for r in self.connection.execute(sql))

    def meta(self, key: str) -> object:
        """A value of the store as a whole; None when it was never set. May be called on any thread."""
        return self._meta.get(key)

    def forget_meta(self, keys: Sequence[str]) -> None:
        self.connection.executemany("DELETE FROM meta WHERE key = ?", [(key,) for key in keys])
        for key in keys:
            self._meta.pop(key, None)

    def set_meta(self, key: str, value: str | int) -> None:
        self.connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))
        self._meta[key] = value

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
        """(time, packed entries), in the order in which they were stored: of one id the last counts."""
        return iter(self.connection.execute("SELECT at, entries FROM finished ORDER BY rowid"))

    def forget_finished(self, before: int) -> None:
        self.connection.execute("DELETE FROM finished WHERE at < ?", (before,))

    def books(self) -> dict[tuple[int, str], int]:
        return {(p, t): n for p, t, n in self.connection.execute("SELECT pair, term, count FROM books")}

    def held(
        self,
        after: int,
        scan: int,
        pairs: Sequence[int] | None,
        status: int,
        taskname: str | None,
        limit: int,
    ) -> tuple[list[Activation], int | None]:
        """Rows after ``after`` without their bodies, of the next ``scan`` rows the first ``limit`` that
        match; and after which to go on, None at the end. None, and status 0, match all."""
        c = self.connection
        last, scanned = next(
            c.execute(
                "SELECT max(seq), count(*) FROM"
                " (SELECT seq FROM activation WHERE seq > ? ORDER BY seq LIMIT ?)",
                (after, scan),
            )
        )
        if not scanned:
            return [], None
        records = c.execute(
            f"{_WITHOUT_BODY} WHERE a.seq > ?1 AND a.seq <= ?2"
            " AND (?3 = 0 OR a.status = ?3) AND (?4 IS NULL OR a.taskname = ?4)"
            " AND (?5 OR a.pair IN carray(?6)) ORDER BY a.seq LIMIT ?7",
            (after, last, status, taskname, pairs is None, apsw.carray(array("q", pairs or (0,))), limit),
        )
        rows = [_load(record) for record in records]
        if len(rows) == limit:
            return rows, rows[-1].seq
        return rows, last if scanned == scan else None

    def count_spilled_between(self, tail: tuple[int, int], row: Activation, at_most: int) -> int:
        """Pending rows of the pair after the order key ``tail`` and before ``row``, up to a bound."""
        return int(
            self.connection.execute(
                "SELECT count(*) FROM (SELECT 1 FROM activation WHERE status = 1 AND spilled = 1"
                " AND pair = ?1 AND (ready_at, seq) > (?2, ?3) AND (ready_at, seq) < (?4, ?5) LIMIT ?6)",
                (row.pair, *tail, row.ready_at, row.seq, at_most),
            ).get
        )

    # -- dead letters that rest here

    def rest_dead_letters(self, letters: Iterable[tuple[object, ...]]) -> None:
        self.connection.executemany("INSERT INTO dead_letter VALUES (?, ?, ?, ?, ?, ?, ?, ?)", letters)

    def dead_letter_count(self) -> int:
        return int(self.connection.execute("SELECT count(*) FROM dead_letter").get)

    def dead_letters(
        self, after: int, pairs: Sequence[int] | None, taskname: str | None, reason: str | None, limit: int
    ) -> list[RestingLetter]:
        """Those that match after ``after``, oldest first. None matches all."""
        return [
            RestingLetter(*record)
            for record in self.connection.execute(
                f"SELECT {_LETTER_COLUMNS}, NULL FROM dead_letter WHERE seq > ?1"
                " AND (?2 OR pair IN carray(?3)) AND (?4 IS NULL OR taskname = ?4)"
                " AND (?5 IS NULL OR reason = ?5) ORDER BY seq LIMIT ?6",
                (after, pairs is None, apsw.carray(array("q", pairs or (0,))), taskname, reason, limit),
            )
        ]

    def dead_letter_of(self, id: str) -> RestingLetter | None:
        """The latest dead letter of a task, with its body."""
        sql = (
            f"SELECT {_LETTER_COLUMNS}, body FROM dead_letter WHERE id = ? ORDER BY at DESC, seq DESC LIMIT 1"
        )
        for record in self.connection.execute(sql, (id,)):
            return RestingLetter(*record)
        return None

    def load_dead_letters(self, seqs: Sequence[int]) -> list[RestingLetter]:
        """Those that are there, with their bodies."""
        if not seqs:
            return []
        sql = f"SELECT {_LETTER_COLUMNS}, body FROM dead_letter WHERE seq IN carray(?)"
        return [RestingLetter(*r) for r in self.connection.execute(sql, (apsw.carray(array("q", seqs)),))]

    def drop_dead_letters(self, seqs: Sequence[int]) -> int:
        """How many there were."""
        if not seqs:
            return 0
        c = self.connection
        c.execute("DELETE FROM dead_letter WHERE seq IN carray(?)", (apsw.carray(array("q", seqs)),))
        return int(c.changes())


def _lengthen(file: apsw.VFSFile, length: int) -> None:
    """By zeros; not at all where that fails, so that what is to be written has the space."""
    size = file.xFileSize()
    try:
        for at in range(size, length, REWRITE_BYTES):
            file.xWrite(bytes(min(REWRITE_BYTES, length - at)), at)
        file.xSync(apsw.SQLITE_SYNC_FULL)
    except apsw.Error:
        file.xTruncate(size)
        raise


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
    """The row that ``_select`` has read. Raises ValueError for a number that means nothing."""
    # By the order of the fields: by name, half as much time again goes into it (docs/adr/0001).
    row = Activation(*record[:-1])
    if row.body is not None:
        row.size = len(row.body)
    try:
        row.status, row.on_exceeded = _STATUSES[row.status], _ON_EXCEEDED[row.on_exceeded]
    except KeyError as unknown:
        raise ValueError(f"{unknown} is no status and no policy of task {row.id}") from None
    row.at_most_once = bool(row.at_most_once)
    return row
