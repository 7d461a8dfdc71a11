"""Bits that changed on the disk: nothing that changed is handed out, and no start fails for ever."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import apsw
import pytest
import structlog
from crash_disk import CrashDisk, Failing, abandon
from crash_workload import LIMITS
from store_helpers import (
    ManualClock,
    activation,
    check_store,
    inline,
    open_store,
    settle_down,
    token_of,
)

from penstock_broker.config import Settings
from penstock_broker.domain.activation import OnExceeded, Route, Status, hash_id
from penstock_broker.domain.lifecycle import Event
from penstock_broker.errors import FatalError
from penstock_broker.server import open_store as open_store_of
from penstock_broker.store.database import checksum
from penstock_broker.store.inflight import Inflight
from penstock_broker.store.quarantine import set_aside
from penstock_broker.store.soundness import Malformed

SEEDS = int(os.environ.get("PENSTOCK_CRASH_SEEDS", "0"))
FLIPS = 3000 if SEEDS else 150
BYTES = 1 << 30


async def insert(store: Inflight, rows) -> None:
    stored = store.insert(rows)
    await settle_down(store)
    await stored


async def stopped_store(path: Path, clock: ManualClock) -> dict[str, tuple[bytes, str, str]]:
    """A file with rows in every state. id -> what must be handed out: body, namespace, task name."""
    store = open_store(path, clock, LIMITS)
    rng = random.Random(1)
    source = store.source("tasks", 0)
    rows = []
    for i in range(120):
        row = activation(
            f"task-{i}",
            clock,
            namespace=rng.choice(("pay", "mail")),
            body=rng.randbytes(rng.choice((40, 400, 1024, 1025, 6000))),
            delay_ms=rng.choice((0, 0, 0, 400)),
            max_attempts=3,
        )
        if i % 2:
            row.source, row.offset = source.id, i
        rows.append(row)
    sent = {row.id: (row.body or b"", row.namespace, row.taskname) for row in rows}
    await insert(store, rows)
    store.cover(source, 120)
    for event in (Event.COMPLETE, Event.FAIL, Event.RETRY, None):
        for row in store.claim(None, (), 6, BYTES):
            if event is not None:
                store.settle(token_of(store, row), event, clock.wall, 300)
        await settle_down(store)
    store.database.close()
    return sent


def change_byte(path: Path, at: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        value = file.read(1)[0]
        file.seek(at)
        file.write(bytes([value ^ 1 << bit]))


async def handed_out(store: Inflight, clock: ManualClock) -> list[Any]:
    """Everything that the store hands out or forwards from now on."""
    out = []
    for source in store.sources():
        store.settle_dispute(source)
    for _ in range(30):
        clock.advance(20_000)
        store.lapse(clock.mono)
        await settle_down(store)
        for row in store.claim(None, (), 1000, BYTES):
            out.append((row.id, row.body, row.namespace, row.taskname))
            store.settle(token_of(store, row), Event.COMPLETE, clock.wall)
        taking = asyncio.ensure_future(store.outbox.take(Route.DEAD_LETTER, 100, 1 << 22))
        await asyncio.sleep(0)
        await settle_down(store)
        letters = await taking
        out += [(row.id, row.body, row.namespace, row.taskname) for row in letters]
        store.outbox.forwarded(letters)
        await settle_down(store)
    return out


def outside(whole: bytes, bodies: list[bytes]) -> list[int]:
    """Positions in no body, nor in the empty part of a page."""
    inside = bytearray(len(whole))
    for body in bodies:
        for start in (0, max(0, len(body) - 200)):
            at = whole.find(body[start : start + 40])
            if at >= 0:
                inside[at : at + len(body)] = b"x" * len(body)
    near = (i for i in range(8, len(whole) - 8) if any(whole[i - 8 : i + 8]))
    return [i for i in near if not inside[i]]


async def test_no_changed_bit_is_ever_handed_out(tmp_path: Path) -> None:
    path, clock = tmp_path / "store.sqlite", ManualClock()
    sent = await stopped_store(path, clock)
    whole = path.read_bytes()
    rng = random.Random(SEEDS)
    beside = outside(whole, [body for body, _, _ in sent.values()])
    ends = {"right": 0, "quarantined": 0, "malformed": 0}
    for _ in range(FLIPS):
        path.write_bytes(whole)
        # Most of the file are bodies; what is between them is more interesting.
        at = rng.choice(beside) if rng.random() < 0.7 else rng.randrange(len(whole))
        bit = rng.randrange(8)
        change_byte(path, at, bit)
        try:
            ends[await live_until_sound(path, sent)] += 1
        except BaseException as error:
            error.add_note(f"byte {at}, bit {bit} was changed")
            raise
    assert all(ends.values()), ends


async def live_until_sound(path: Path, sent) -> str:
    """Start as often as a supervisor would; how it ended."""
    clock = ManualClock()
    clock.advance(1_000_000)
    for _ in range(4):
        try:
            store = open_store(path, clock, LIMITS)
        except Malformed:
            suspect = path.with_name(path.name + ".suspect")
            suspect.unlink(missing_ok=True)
            return "malformed"
        try:
            rows = store.memory.rows + store.memory.quarantined
            out = await handed_out(store, clock)
            check_store(store)
        except FatalError:
            store.database.close()
            continue
        for id, *rest in out:
            assert tuple(rest) == sent.get(id), f"{id} was handed out changed"
        set_aside = store.memory.quarantined
        assert len({id for id, *_ in out}) + store.memory.rows + set_aside == rows, "a row is gone"
        store.database.close()
        return "quarantined" if set_aside else "right"
    raise AssertionError("a crash loop")


async def test_a_damaged_row_is_set_aside_and_counted_and_the_others_go_on(tmp_path: Path) -> None:
    path, clock = tmp_path / "store.sqlite", ManualClock()
    store = open_store(path, clock)
    bodies = [os.urandom(300), os.urandom(300), os.urandom(3000)]
    await insert(store, [activation(f"t{i}", clock, body=body) for i, body in enumerate(bodies)])
    store.database.close()
    for body in (bodies[0], bodies[2]):
        change_byte(path, path.read_bytes().index(body) + 100, 3)
    store = open_store(path, clock)
    await settle_down(store)
    assert [row.id for row in store.claim(None, (), 10, BYTES)] == ["t1"]
    await settle_down(store)
    check_store(store)
    assert store.memory.quarantined == 2
    assert sum(n for (_, term), n in store.memory.books.items() if term == "quarantined") == 2
    kept = store.database.connection.execute("SELECT id, why, length(body) FROM quarantine").fetchall()
    assert [(bytes(cast("bytes", id)), why, n) for id, why, n in kept] == [
        (b"t0", "its checksum does not fit", 300),
        (b"t2", "its checksum does not fit", 3000),
    ]
    store.database.close()


async def test_many_damaged_rows_are_looked_for_once_among_all(tmp_path: Path) -> None:
    """A million others may be there, and nothing goes on meanwhile."""
    looks = []

    class Live(dict[int, int]):
        def items(self) -> Any:
            looks.append(len(self))
            return super().items()

    clock = ManualClock()
    store = open_store(tmp_path / "store.sqlite", clock)
    await insert(store, [activation(f"t{i}", clock) for i in range(9)])
    store.database.close()
    store = open_store(tmp_path / "store.sqlite", clock)
    store.memory.live = Live(store.memory.live)
    store.database.connection.execute("UPDATE activation SET body = zeroblob(length(body)) WHERE id < 't6'")
    await settle_down(store)
    assert store.memory.quarantined == 6
    assert looks == [9]
    assert len(await handed_out(store, clock)) == 3
    assert looks == [9], "and only where there are any"
    check_store(store)
    store.database.close()


async def test_a_claim_is_not_handed_out_once_more_when_its_row_was_damaged(tmp_path: Path) -> None:
    clock = ManualClock()
    store = open_store(tmp_path / "store.sqlite", clock)
    await insert(store, [activation(id, clock) for id in ("sound", "damaged")])
    claims = [(row.seq, row.claim) for row in store.claim(None, (), 2, BYTES)]
    await settle_down(store)
    change = "UPDATE activation SET body = ? WHERE id = 'damaged'"
    store.database.connection.execute(change, (b"another body",))
    asked = asyncio.ensure_future(store.claimed_again(claims))
    await asyncio.sleep(0)
    await settle_down(store)
    assert [row.id for row in await asked] == ["sound"]
    store.database.close()


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("status", 9),
        ("pair", 77),
        ("source", 5),
        ("attempts", -1),
        ("id", b"\xff\xfe"),
        ("ready_at", -1),
        ("size", 1 << 36),
        ("size", 1),
    ],
)
async def test_a_row_with_an_impossible_column_does_not_stop_the_start(
    tmp_path: Path, column: str, value: object
) -> None:
    path, clock = tmp_path / "store.sqlite", ManualClock()
    store = open_store(path, clock)
    await insert(store, [activation(f"t{i}", clock) for i in range(3)])
    c = store.database.connection
    c.pragma("ignore_check_constraints", 1)
    how = "CAST(? AS TEXT)" if column == "id" else "?"
    c.execute(f"UPDATE activation SET {column} = {how} WHERE id = 't1'", (value,))
    store.database.close()
    store = open_store(path, clock)
    await settle_down(store)
    assert [row.id for row in store.claim(None, (), 10, BYTES)] == ["t0", "t2"]
    await settle_down(store)
    check_store(store)
    assert store.memory.quarantined == 1
    assert store.memory.counts[1][Status.PENDING] == 0
    store.database.close()


@pytest.mark.parametrize("size", [300, 3000])
@pytest.mark.parametrize("wrong", ["size", "size = 1 << 36, taskname"])
async def test_what_a_row_says_of_its_size_while_a_broker_runs_is_not_believed(
    tmp_path: Path, size: int, wrong: str
) -> None:
    """The limit in bytes would never be reached again, or always."""
    clock = ManualClock()
    store = open_store(tmp_path / "store.sqlite", clock, dataclasses.replace(LIMITS, window_rows_max=1))
    await insert(store, [activation(f"t{i}", clock, body=os.urandom(size)) for i in range(4)])
    store.database.connection.execute(f"UPDATE activation SET {wrong} = 1 << 36 WHERE id IN ('t2', 't3')")
    store.control.cancel(hash_id("t3"))
    await settle_down(store)
    while rows := store.claim(None, (), 9, BYTES):
        for row in rows:
            store.settle(token_of(store, row), Event.COMPLETE, clock.wall)
        await settle_down(store)
    assert (store.memory.rows, store.memory.bytes) == (0, 0)
    check_store(store)
    store.database.close()


@pytest.mark.parametrize("wrong", ["taskname = CAST(x'ff' AS TEXT)", "on_exceeded = 7"])
async def test_a_page_is_bounded_in_bytes_also_where_a_row_is_damaged(tmp_path: Path, wrong: str) -> None:
    clock, limits = ManualClock(), dataclasses.replace(LIMITS, window_bytes_max=40_000)
    store = open_store(tmp_path / "store.sqlite", clock, limits)
    await insert(store, [activation(f"t{i}", clock, body=os.urandom(10_000)) for i in range(20)])
    store.database.close()
    store = open_store(tmp_path / "store.sqlite", clock, limits)
    store.database.connection.execute(f"UPDATE activation SET {wrong} WHERE id = 't0'")
    await settle_down(store)
    assert store.memory.quarantined == 1
    assert store.memory.index.bytes <= 40_000
    assert len(await handed_out(store, clock)) == 19
    store.database.close()


async def test_behind_a_page_of_which_nothing_is_sound_the_next_one_comes(tmp_path: Path) -> None:
    clock, limits = ManualClock(), dataclasses.replace(LIMITS, window_rows_max=2)
    store = open_store(tmp_path / "store.sqlite", clock, limits)
    await insert(store, [activation(f"t{i}", clock) for i in range(6)])
    store.database.close()
    store = open_store(tmp_path / "store.sqlite", clock, limits)
    store.database.connection.execute("UPDATE activation SET body = x'00' WHERE id IN ('t0', 't1')")
    await settle_down(store)
    assert store.memory.quarantined == 2
    assert [id for id, *_ in await handed_out(store, clock)] == [f"t{i}" for i in range(2, 6)]
    store.database.close()


def settings_for(path: Path, ingest: Literal["kafka", "grpc"]) -> Settings:
    return Settings(db_path=path, ingest=ingest)


async def test_a_malformed_database_is_set_aside_and_a_new_store_begins(tmp_path: Path) -> None:
    """What was in it is in Kafka, too: the broker says so, and goes on."""
    path, clock = tmp_path / "store.sqlite", ManualClock()
    await stopped_store(path, clock)
    damaged = make_malformed(path)
    with structlog.testing.capture_logs() as logs:
        store = open_store_of(settings_for(path, "kafka"), clock, LIMITS, inline)
    (kept,) = set_aside_in(tmp_path)
    assert kept.read_bytes() == damaged
    (said,) = [line for line in logs if line["event"] == "the database was set aside"]
    assert said["log_level"] == "error"
    assert "malformed" in said["why"]
    assert store.epoch == 1
    assert store.memory.rows == 0
    store.database.close()


async def test_without_a_log_to_restore_from_a_malformed_database_is_refused_and_left_alone(
    tmp_path: Path,
) -> None:
    path, clock = tmp_path / "store.sqlite", ManualClock()
    await stopped_store(path, clock)
    damaged = make_malformed(path)
    for _ in range(3):
        with pytest.raises(Malformed, match=r"malformed.*Move the file.*sent over gRPC is nowhere else"):
            open_store_of(settings_for(path, "grpc"), clock, LIMITS, inline)
        assert path.read_bytes() == damaged
    assert not set_aside_in(tmp_path)


async def killed_store(path: Path, clock: ManualClock) -> None:
    """What a broker leaves that was killed: of its five rows, three are only in its log."""
    running = path.with_name("running.sqlite")
    for rows in ([f"t{i}" for i in range(2)], [f"t{i}" for i in range(2, 5)]):
        store = open_store(running, clock)
        await insert(store, [activation(id, clock) for id in rows])
        for suffix in ("", "-wal"):
            shutil.copy(f"{running}{suffix}", f"{path}{suffix}")
        store.database.close()


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
@pytest.mark.parametrize("killed_at", range(7))
async def test_a_broker_that_is_killed_while_it_sets_a_database_aside_loses_no_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int, links: bool
) -> None:
    """A database without its log looks whole, and is older; and another's log is nobody's."""
    path, clock = tmp_path / "store.sqlite", ManualClock()
    await killed_store(path, clock)
    done: list[str] = []

    def killing(name: str, step: Callable[..., None]) -> Callable[..., None]:
        def instead(*args: Path) -> None:
            if name == "link" and not links:
                raise PermissionError(f"no {name} here")
            if len(done) == killed_at:
                raise KeyboardInterrupt
            step(*args)
            done.append(name)

        return instead

    with monkeypatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
        for name in ("link", "rename", "unlink", "fsync"):
            patched.setattr(os, name, killing(name, getattr(os, name)))
        set_aside(path, "a test", clock)
    if path.exists():
        store = open_store(path, clock)
        assert store.memory.rows == 5, "it is begun again with"
        store.database.close()
        set_aside(path, "a test", clock)
    else:
        store = open_store(path, clock)
        assert store.memory.rows == 0, "it is a new one"
        store.database.close()
    assert len(set_aside_in(tmp_path)) == 1
    if killed_at == 6:
        # And a power cut leaves nothing else.
        first = "link" if links else "fsync"
        assert done == [first, "fsync", "rename", "fsync", "unlink", "fsync"]
    kept = open_store(set_aside_in(tmp_path)[0], clock)
    assert kept.memory.rows == 5
    kept.database.close()


def set_aside_in(folder: Path) -> list[Path]:
    return list(folder.glob("store.sqlite.quarantined-*[0-9]"))


def make_malformed(path: Path) -> bytes:
    content = bytearray(path.read_bytes())
    for page in range(2, len(content) // 4096):
        content[page * 4096 : page * 4096 + 12] = b"no b-tree..."
    path.write_bytes(content)
    return bytes(content)


async def test_a_header_that_is_none_is_malformed_where_a_broker_has_been(tmp_path: Path) -> None:
    path, clock = tmp_path / "store.sqlite", ManualClock()
    await stopped_store(path, clock)
    change_byte(path, 3, 2)
    with pytest.raises(Malformed, match="not a database"):
        open_store(path, clock)


async def test_damage_found_while_running_stops_the_broker_and_the_next_start_looks_at_it(
    tmp_path: Path,
) -> None:
    path, clock = tmp_path / "store.sqlite", ManualClock()
    disk = CrashDisk()
    with disk.mounted():
        store = open_store(path, clock, LIMITS)
    await insert(store, [activation(f"t{i}", clock) for i in range(20)])
    for _ in range(2):
        disk.kill()
        abandon(store.database)
        with disk.mounted():
            store = open_store(path, clock, LIMITS)
        store.database.connection.pragma("shrink_memory")
        stored = store.insert([activation(f"late-{store.epoch}", clock)])
        disk.before = Failing(("read", "write"), 0, lambda call: apsw.exception_for(apsw.SQLITE_CORRUPT))
        with pytest.raises(Malformed, match="malformed"):
            await store.writer.tick()
        with pytest.raises(Exception, match="the store has stopped"):
            await stored
        disk.before = lambda call: None
    disk.kill()
    store.database.close()
    # It looks sound, and was found damaged twice: no third life.
    with disk.mounted(), pytest.raises(Malformed, match="found damaged again"):
        open_store(path, clock, LIMITS)


async def test_a_damage_that_a_sound_stop_has_followed_is_not_held_against_the_database(
    tmp_path: Path,
) -> None:
    path, clock = tmp_path / "store.sqlite", ManualClock()
    for _ in range(3):
        database = open_store(path, clock).database
        database.suspect("a page that is none")
        database.close()
        open_store(path, clock).database.close()


@pytest.mark.parametrize("bit", [0, 1])
async def test_a_changed_version_number_is_no_other_version(tmp_path: Path, bit: int) -> None:
    path, clock = tmp_path / "store.sqlite", ManualClock()
    await stopped_store(path, clock)
    change_byte(path, 63, bit)
    with pytest.raises(Malformed, match="malformed"):
        open_store(path, clock)


async def test_a_namespace_whose_name_changed_is_not_served_under_another(tmp_path: Path) -> None:
    path, clock = tmp_path / "store.sqlite", ManualClock()
    store = open_store(path, clock)
    await insert(store, [activation("t", clock, namespace="some-namespace", body=b"body")])
    store.database.close()
    content = path.read_bytes()
    first = content.index(b"some-namespace")
    for at in (first, content.index(b"some-namespace", first + 1)):
        path.write_bytes(content)
        change_byte(path, at, 5)
        with pytest.raises(Malformed, match="sqlite_autoindex_pair"):
            open_store(path, clock)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("id", "another"),
        ("taskname", "refund"),
        ("body", b"another body"),
        ("seq", 8),
        ("pair", 3),
        ("source", 2),
        ("offset", 6),
        ("received_at", 12),
        ("expires_at", None),
        ("deadline_ms", 10),
        ("on_exceeded", OnExceeded.DISCARD),
        ("at_most_once", True),
        ("content", 5),
    ],
)
def test_whatever_never_changes_of_a_row_is_in_its_checksum(field: str, value: object) -> None:
    row = activation("t", ManualClock(), expires_ms=500, source=1, offset=5)
    row.seq, row.pair = 7, 2
    before = checksum(row)
    assert getattr(row, field) != value
    setattr(row, field, value)
    assert checksum(row) != before
