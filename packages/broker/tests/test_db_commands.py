"""``penstock-broker db``, on a broker that runs, on one that is stopped, and on one that was killed."""

from __future__ import annotations

import errno
import json
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from process_helpers import command, running, settings_in

from penstock_broker import cli, db
from penstock_broker.config import Settings
from penstock_broker.domain.lifecycle import Limits
from penstock_broker.errors import FatalError
from penstock_broker.store.database import Database
from penstock_broker.store.looking import Answer
from penstock_broker.store.schema import SCHEMA_VERSION
from penstock_protocol import signature
from penstock_protocol.v1 import producer_pb2
from penstock_protocol.v1.activation_pb2 import TaskActivation

SECRET = "looking"


def send(environment: dict[str, str], count: int) -> None:
    sent = [
        TaskActivation(id=f"t{n}", application="shop", namespace="pay", taskname="t") for n in range(count)
    ]
    path, body = (
        "/penstock.v1.ProducerService/SendTasks",
        producer_pb2.SendTasksRequest(activations=sent).SerializeToString(),
    )
    metadata = ((signature.HEADER, signature.sign(SECRET, path, body)),)
    with grpc.insecure_channel(f"127.0.0.1:{environment['TASKBROKER_GRPC_PORT']}") as channel:
        unary: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(path)
        unary(body, timeout=20, metadata=metadata)


@pytest.fixture(scope="module", params=["runs", "killed"])
def environment(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """The settings of a broker with five tasks."""
    folder = tmp_path_factory.mktemp("broker")
    settings = settings_in(folder, SECRET) | {"STATE": request.param}
    with running(settings, folder / "log", kill=request.param == "killed"):
        send(settings, 5)
        if request.param == "runs":
            yield settings
    if request.param == "killed":
        before = files_of(settings)
        assert len(before["b.sqlite-wal"]) > 4096
        yield settings
        assert files_of(settings) == before, "looking into it has changed it"


def files_of(environment: dict[str, str]) -> dict[str, bytes]:
    path = Path(environment["TASKBROKER_DB_PATH"])
    return {name: path.with_name(name).read_bytes() for name in ("b.sqlite", "b.sqlite-wal")}


@pytest.fixture
def here(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[str, str]]:
    """The command in this process, which is quicker: what it says on stdout and stderr."""
    for name in environment:
        if name.startswith("TASKBROKER_"):
            monkeypatch.setenv(name, environment[name])

    def run(*arguments: str) -> tuple[str, str]:
        cli.app(list(arguments), standalone_mode=False)
        return tuple(capsys.readouterr())  # type: ignore[return-value]

    return run


def test_stats(environment: dict[str, str], here: Callable[..., tuple[str, str]]) -> None:
    ran = command(environment, "db", "stats", "-o", "json")
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout)
    assert said["pending"]["tasks"] == 5
    assert said["pending"]["bytes"] > 50
    assert (said["namespaces"], said["boot_epoch"], said["schema_version"]) == (1, 1, SCHEMA_VERSION)
    assert said["wal_bytes"] > 0
    assert said["pages"] > 10
    assert ("running" in said["read_from"]) == (environment["STATE"] == "runs")
    table, _ = here("db", "stats")
    assert "pending               tasks: 5, bytes: " in table


def test_query(environment: dict[str, str], here: Callable[..., tuple[str, str]]) -> None:
    sql = "SELECT id, body, char(27) || '[31m' AS red, NULL AS nil FROM activation ORDER BY seq"
    said, more = here("db", "query", sql, "--limit", "2")
    head, first, _ = said.splitlines()
    assert head.split() == ["id", "body", "red", "nil"]
    assert first.startswith("t0  x'")
    assert first.endswith("\\x1b[31m  NULL")
    assert "... and more" in more
    said, _ = here("db", "query", sql, "-o", "json")
    assert [row["id"] for row in json.loads(said)] == [f"t{n}" for n in range(5)]
    with pytest.raises(FatalError, match="no such table: x"):
        here("db", "query", "SELECT * FROM x")
    ran = command(environment, "db", "query", "DELETE FROM pair")
    assert (ran.returncode, ran.stdout) == (1, "")
    assert "queries only read" in ran.stderr


def test_backup(
    environment: dict[str, str],
    here: Callable[..., tuple[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "copy.sqlite"
    ran = command(environment, "db", "backup", str(file))
    assert ran.returncode == 0, ran.stderr
    assert f"is copied to {file}: {file.stat().st_size:,} bytes" in ran.stdout
    assert "pages" in ran.stderr
    beside = sorted(path.name for path in Path(environment["TASKBROKER_DB_PATH"]).parent.iterdir())
    assert not [name for name in beside if "backup" in name]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy.sqlite"]
    with sqlite3.connect(file) as copy:
        assert copy.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert copy.execute("SELECT count(*) FROM activation").fetchone() == (5,)
    copy.close()
    before = file.read_bytes()
    why = ""
    try:
        here("db", "backup", str(file))
    except FatalError as error:
        why = str(error)
    assert "overwrites nothing" in why
    assert file.read_bytes() == before
    # It can be looked into, and nothing is left beside it.
    monkeypatch.setenv("TASKBROKER_DB_PATH", str(file))
    said, _ = here("db", "query", "SELECT count(*) FROM pair")
    assert said.split() == ["count(*)", "1"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy.sqlite"]


def settings_of(path: Path) -> Settings:
    return Settings(ingest="grpc", db_path=path)


def refused(path: Path, file: Path) -> str:
    with pytest.raises(FatalError) as error, db.reached(settings_of(path)) as database:
        list(database.back_up(file))
    return str(error.value)


def test_where_a_backup_cannot_go(tmp_path: Path) -> None:
    path = tmp_path / "b.sqlite"
    assert f"there is no database at {path}" in refused(path, tmp_path / "copy")
    Database(path, Limits(), 0).close()
    assert f"there is no directory {tmp_path / 'no'}" in refused(path, tmp_path / "no" / "copy")
    assert "a name of the broker's own files" in refused(path, tmp_path / "b.sqlite.backup-1")
    assert "exists" in refused(path, path)
    (tmp_path / "theirs.sqlite").write_bytes(b"")
    theirs = settings_of(tmp_path / "theirs.sqlite")
    with db.reached(theirs) as database, pytest.raises(FatalError, match="is not a broker's"):
        db.stats(database)
    assert not (tmp_path / "theirs.sqlite.lock").exists()


def test_what_comes_to_be_there_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    path, file, why = tmp_path / "b.sqlite", tmp_path / "copy", ""
    Database(path, Limits(), 0).close()
    try:
        with db.reached(settings_of(path)) as database:
            for _ in database.back_up(file):
                file.write_bytes(b"mine")
    except FatalError as error:
        why = str(error)
    assert file.read_bytes() == b"mine"
    assert "File exists" in why
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.sqlite", "b.sqlite.lock", "copy"]


def test_a_copy_goes_to_another_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, file, rename = tmp_path / "made", tmp_path / "there" / "copy", Path.rename
    made.write_bytes(b"all of it")
    file.parent.mkdir()

    def across(path: Path, target: Path) -> Path:
        if path.parent != target.parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", across)
    db._move(made, file)
    assert file.read_bytes() == b"all of it"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["copy", "there"]


def test_how_values_are_shown() -> None:
    found = Answer(["a", "a", "b"], [(1.5, None, bytes(40)), (float("inf"), "x\ny", b"\x01")], more=False)
    assert list(db.as_table(found)) == [
        "a    a     b",
        f"1.5  NULL  x'{'00' * 32}'... (40 bytes)",
        "inf  x\\ny  x'01'",
    ]
    assert json.loads("".join(db.as_json(found))) == [
        {"a": 1.5, "a:2": None, "b": "00" * 40},
        {"a": "inf", "a:2": "x\ny", "b": "01"},
    ]
