"""Opening the file: one owner, a known schema, and errors that say what to do."""

from __future__ import annotations

import multiprocessing
import sqlite3
import subprocess
import sys
from array import array
from pathlib import Path

import apsw
import pytest

from penstock_broker.domain.activation import OnExceeded, Status
from penstock_broker.domain.lifecycle import Limits
from penstock_broker.errors import FatalError
from penstock_broker.store.database import Database
from penstock_broker.store.schema import SCHEMA_VERSION
from penstock_broker.store.space import reserve_of


def open_database(path: Path) -> Database:
    return Database(path, Limits(), 0)


def test_the_epoch_rises_with_every_start_and_the_store_keeps_its_id(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    first = open_database(path)
    first.close()
    second = open_database(path)
    assert (first.epoch, second.epoch) == (1, 2)
    assert first.store_id == second.store_id
    assert second.nonces[1] == first.nonce
    second.close()


def test_the_settings_that_durability_needs_are_in_force(tmp_path: Path) -> None:
    database = open_database(tmp_path / "store.sqlite")
    pragma = database.connection.pragma
    assert pragma("journal_mode") == "wal"
    assert pragma("synchronous") == 2
    assert pragma("wal_autocheckpoint") == 0
    database.close()


def test_a_large_payload_is_freed_without_being_read(tmp_path: Path) -> None:
    database = open_database(tmp_path / "broker.sqlite")
    with database.connection as connection:
        connection.execute("INSERT INTO payload VALUES (1, zeroblob(1_000_000))")
    database.close()
    again = open_database(tmp_path / "broker.sqlite")
    again.connection.release_memory()  # what the start has read
    again.connection.status(apsw.SQLITE_DBSTATUS_CACHE_MISS, True)
    again.delete(array("q"), array("q", [1]))
    read, _ = again.connection.status(apsw.SQLITE_DBSTATUS_CACHE_MISS)
    assert read < 20, "of 245 pages"
    again.close()


def test_a_row_is_read_as_its_columns_say(tmp_path: Path) -> None:
    """Each has a value that no other has."""
    columns = {
        "seq": 101, "status": 4, "pair": 102, "ready_at": 103, "claim": 104, "claim_epoch": 105,
        "attempts": 106, "lost": 107, "last_outcome": 108, "given_back_at": 109, "reason": "r", "error": "e",
        "source": 110, "log_offset": 111, "received_at": 112, "expires_at": 113, "deadline_ms": 114,
        "max_attempts": 115, "retry_delay_ms": 116, "on_exceeded": 2, "at_most_once": 1, "id": "i",
        "taskname": "t", "content": 117, "checksum": 118, "size": 3, "body": b"bod",
    }  # fmt: skip
    database = open_database(tmp_path / "store.sqlite")
    database.connection.execute("INSERT INTO pair VALUES (102, 'a', 'n', NULL)")
    names, places = ", ".join(columns), ", ".join("?" * len(columns))
    values = tuple(columns.values())
    database.connection.execute(f"INSERT INTO activation ({names}) VALUES ({places})", values)
    row = database.get(101)
    assert row is not None
    expected = {**columns, "offset": columns["log_offset"], "application": "a", "namespace": "n"}
    del expected["log_offset"], expected["checksum"]
    assert {name: getattr(row, name) for name in expected} == expected
    assert row.at_most_once is True
    assert row.status is Status.FORWARDING
    assert row.on_exceeded is OnExceeded.DEADLETTER
    database.close()


def _open_elsewhere(path: Path, said: multiprocessing.Queue[str]) -> None:
    try:
        open_database(path)
    except FatalError as error:
        said.put(str(error))
    else:
        said.put("opened")


def test_a_second_broker_is_refused_with_the_holder_named(tmp_path: Path) -> None:
    database = open_database(tmp_path / "store.sqlite")
    context = multiprocessing.get_context("spawn")
    said = context.Queue()
    other = context.Process(target=_open_elsewhere, args=(tmp_path / "store.sqlite", said))
    other.start()
    message = said.get(timeout=30)
    other.join()
    assert "in use by another broker (process" in message
    assert "db_path" in message
    database.close()


def test_a_second_broker_touches_nothing_also_without_the_lock_file(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    database = open_database(path)
    log_file, reserve = path.with_name("store.sqlite-wal"), reserve_of(path)
    reserve.write_bytes(b"held")
    path.with_name("store.sqlite.lock").unlink()
    written_at = log_file.stat().st_mtime_ns
    context = multiprocessing.get_context("spawn")
    said = context.Queue()
    other = context.Process(target=_open_elsewhere, args=(path, said))
    other.start()
    assert "is locked by another process" in said.get(timeout=30)
    other.join()
    assert log_file.stat().st_mtime_ns == written_at
    assert reserve.read_bytes() == b"held"
    database.close()


def test_a_foreign_reader_cannot_open_the_file_while_a_broker_has_it(tmp_path: Path) -> None:
    """A reader would keep the WAL from being reused, and it would grow without bound."""
    path = tmp_path / "store.sqlite"
    database = open_database(path)
    read = "import sqlite3, sys; sqlite3.connect(sys.argv[1], timeout=0).execute('SELECT * FROM activation')"
    foreign = subprocess.run([sys.executable, "-c", read, path], capture_output=True, text=True, check=False)
    assert foreign.returncode != 0
    assert "database is locked" in foreign.stderr
    database.close()


def test_a_newer_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    open_database(path).close()
    connection = apsw.Connection(str(path))
    connection.pragma("user_version", SCHEMA_VERSION + 1)
    connection.close()
    before = path.read_bytes()
    with pytest.raises(FatalError, match=rf"schema version {SCHEMA_VERSION + 1}.*newer penstock-broker"):
        open_database(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"this is no database, but long enough to look like one" * 100])
def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "store.sqlite"
    path.write_bytes(content)
    with pytest.raises(FatalError, match=r"cannot open the database .*db_path"):
        open_database(path)
    assert path.read_bytes() == content


def test_a_database_of_another_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    with sqlite3.connect(path) as foreign:
        foreign.execute("CREATE TABLE theirs (x)")
    foreign.close()
    with pytest.raises(FatalError, match="another program"):
        open_database(path)


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FatalError, match=r"cannot open the database.*TASKBROKER_DB_PATH"):
        open_database(tmp_path / "file" / "store.sqlite")


def test_of_one_id_the_latest_dead_letter_is_told(tmp_path: Path) -> None:
    database = open_database(tmp_path / "store.sqlite")
    died = {1: 10, 2: 30, 3: 30, 4: 20}
    database.rest_dead_letters(
        [(seq, at, 1, "a", "charge", "failed", "{}", b"body") for seq, at in died.items()]
    )
    latest = database.dead_letter_of("a")
    assert latest is not None
    assert (latest.seq, latest.at) == (3, 30)
    database.close()
