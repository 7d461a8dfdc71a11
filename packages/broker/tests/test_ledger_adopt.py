"""Who may adopt: one broker at a time. The rest needs a fence, and is tested on a real Kafka."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from penstock_broker.clock import SystemClock
from penstock_broker.config import Settings
from penstock_broker.departures import Departures
from penstock_broker.dispatch.service import Refused
from penstock_broker.ingest import ledger_log
from penstock_broker.ingest.drain import DrainReport
from penstock_broker.ingest.ledger_adopt import AdoptedHere, AdoptError, AdoptReport, adopt
from penstock_broker.ingest.ledger_log import LedgerLog
from penstock_broker.ingest.ledger_records import Account, Head
from penstock_broker.ingest.ownership import Me
from penstock_protocol.v1 import admin_pb2 as pb

GONE, ONE, TWO = Me("gone", "0"), Me("one", "1"), Me("two", "2")


class _Begins(Exception):
    """An adoption has come as far as to say that it takes over."""


def head_of(store: Me, **fields: Any) -> Head:
    return Head(store.store_id, 1, 1, 0, **fields)


class Books:
    """What the ledger says of each broker, and who asks."""

    def __init__(self, me: Me, **heads: Head) -> None:
        self.me = me
        self.heads = {one.broker_id: head_of(one) for one in (GONE, ONE, TWO)} | heads
        self.is_open = True
        self.settings = SimpleNamespace(kafka_consumer_group="group")
        self.store = SimpleNamespace(clock=SimpleNamespace(wall_ms=lambda: 1_000_000))
        # Told when a broker is fenced.
        self.on_fenced: Callable[[], None] = lambda: None

    async def read(self, broker_id: str) -> Account:
        return Account(self.heads[broker_id])

    def log_of(self, broker_id: str) -> Any:
        return SimpleNamespace(fence=lambda: self.on_fenced())

    async def call(self, what: Callable[[], None]) -> None:
        what()

    async def succeed(self, into: object, head: Head, broker_id: str) -> None:
        raise _Begins

    async def adopt(self, force: bool = True) -> str:
        try:
            await adopt(self, [], "gone", force)  # type: ignore[arg-type]
        except _Begins:
            return "begins"
        return "ends"


async def test_only_one_broker_at_a_time_adopts_another() -> None:
    begun = head_of(GONE, successor=ONE)
    with pytest.raises(AdoptError, match="'one' has begun to adopt 'gone': repeat the adoption there"):
        await Books(TWO, gone=begun).adopt()
    # An adoption that was interrupted is repeated.
    assert await Books(ONE, gone=begun).adopt() == "begins"
    # By another one when that broker was adopted; not before, nor when it has a new disk: what it had
    # recorded of it was restored there.
    with pytest.raises(AdoptError, match="has begun"):
        await Books(TWO, gone=begun, one=head_of(Me("one", "new"))).adopt()
    assert await Books(TWO, gone=begun, one=head_of(ONE, successor=TWO, handed=True)).adopt() == "begins"
    with pytest.raises(AdoptError, match="has begun"):
        await Books(TWO, gone=begun, one=head_of(ONE, successor=TWO)).adopt()
    # Its own new disk is no other broker.
    assert await Books(TWO, gone=head_of(GONE, successor=Me("gone", "new"))).adopt() == "begins"


async def test_of_two_that_begin_at_once_one_adopts() -> None:
    books = Books(TWO)

    def other_was_faster() -> None:
        books.heads["gone"] = head_of(GONE, successor=ONE)

    books.on_fenced = other_was_faster
    with pytest.raises(AdoptError, match="has begun"):
        await books.adopt()


async def test_who_has_adopted_it_all_says_so() -> None:
    adopted = head_of(GONE, successor=ONE, handed=True)
    with pytest.raises(AdoptedHere, match="already"):
        await Books(ONE, gone=adopted).adopt()
    with pytest.raises(AdoptError, match="already") as raised:
        await Books(TWO, gone=adopted).adopt()
    assert not isinstance(raised.value, AdoptedHere)


async def test_who_wrote_within_the_last_minute_is_not_adopted_unless_forced() -> None:
    now = Books(ONE).store.clock.wall_ms()
    silent, alive = (head_of(GONE)._replace(written_at=now - ms) for ms in (60_000, 59_999))
    assert await Books(ONE, gone=silent).adopt(force=False) == "begins"
    assert await Books(ONE, gone=alive).adopt(force=True) == "begins"
    with pytest.raises(AdoptError, match="it seems to live"):
        await Books(ONE, gone=alive).adopt(force=False)
    # It restores its new disk.
    restores = alive._replace(successor=Me("gone", "new"))
    with pytest.raises(AdoptError, match="it seems to live"):
        await Books(ONE, gone=restores).adopt(force=False)
    assert await Books(ONE, gone=silent._replace(successor=Me("gone", "new"))).adopt(force=False) == "begins"
    # What this one has begun was allowed then.
    assert await Books(ONE, gone=alive._replace(successor=ONE)).adopt(force=False) == "begins"


class Adopts:
    """In place of ingest: adoptions, each with its end; a drain that has nothing to do."""

    def __init__(self, *ends: AdoptReport | AdoptError) -> None:
        self.ends = list(ends)
        self.goes_on = asyncio.Event()
        self.drains = False

    async def adopt(self, broker_id: str, force: bool) -> AdoptReport:
        await self.goes_on.wait()
        end = self.ends.pop(0)
        if isinstance(end, AdoptError):
            raise end
        return end

    async def drain(self, grace_seconds: float) -> DrainReport:
        self.drains = True
        await self.goes_on.wait()
        return DrainReport(True, "", {}, 0, 0)

    def restores(self) -> bool:
        return False

    def drain_report(self) -> DrainReport | None:
        return DrainReport(False, "", {}, 0, 0) if self.drains else None


async def asked(departures: Departures, broker_id: str = "gone") -> pb.AdoptResponse:
    request = pb.AdoptRequest(broker_id=broker_id).SerializeToString()
    return pb.AdoptResponse.FromString(await departures.adopt(request))


async def ended_unasked(monkeypatch: pytest.MonkeyPatch, *ends: AdoptReport | AdoptError) -> Departures:
    """A broker whose adoption of "gone" has ended after its last caller had gone."""
    adopts = Adopts(*ends)
    departures = Departures(adopts)  # type: ignore[arg-type]
    with monkeypatch.context() as patch:
        patch.setattr("penstock_broker.departures.ANSWER_SECONDS", 0.01)
        assert not (await asked(departures)).finished
    adopts.goes_on.set()
    await asyncio.sleep(0.01)
    return departures


async def test_an_adoption_that_ended_unasked_is_not_the_answer_to_the_next_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The broker has come back meanwhile, and was lost once more."""
    ends = (AdoptReport("gone", 1, 5, 0), AdoptReport("gone", 1, 7, 0))
    departures = await ended_unasked(monkeypatch, *ends, AdoptedHere("already"))
    assert (await asked(departures)).adopted == 7
    with pytest.raises(Refused, match="already"):
        await asked(departures)
    departures = await ended_unasked(monkeypatch, *ends)
    assert (await asked(departures, "another")).adopted == 7


async def test_an_adoption_that_ended_between_two_questions_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = (AdoptReport("gone", 1, 5, 0), AdoptedHere("already"), AdoptedHere("already"))
    departures = await ended_unasked(monkeypatch, *ends)
    assert (await asked(departures)).adopted == 5
    with pytest.raises(Refused, match="already"):
        await asked(departures)
    # But not of another broker, nor when somebody else has adopted it since.
    departures = await ended_unasked(monkeypatch, *ends)
    with pytest.raises(Refused, match="already"):
        await asked(departures, "another")
    departures = await ended_unasked(monkeypatch, ends[0], AdoptError("by another one already"))
    with pytest.raises(Refused, match="already"):
        await asked(departures)


async def test_two_who_ask_at_once_are_both_told() -> None:
    adopts = Adopts(AdoptReport("gone", 1, 5, 0))
    adopts.goes_on.set()
    departures = Departures(adopts)  # type: ignore[arg-type]
    told = await asyncio.gather(asked(departures), asked(departures))
    assert [one.adopted for one in told] == [5, 5]
    drain = pb.DrainRequest().SerializeToString()
    answers = await asyncio.gather(departures.drain(drain), departures.drain(drain))
    assert all(pb.DrainResponse.FromString(answer).finished for answer in answers)


async def test_a_broker_does_not_adopt_and_leave_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock_broker.departures.ANSWER_SECONDS", 0.01)
    adopts, drain = Adopts(AdoptReport("gone", 1, 5, 0)), pb.DrainRequest().SerializeToString()
    departures = Departures(adopts)  # type: ignore[arg-type]
    assert not (await asked(departures)).finished
    with pytest.raises(Refused, match="adopting 'gone' now"):
        await departures.drain(drain)
    adopts.goes_on.set()
    assert (await asked(departures)).adopted == 5
    assert pb.DrainResponse.FromString(await departures.drain(drain)).finished
    with pytest.raises(Refused, match="drained"):
        await asked(departures)


@pytest.mark.parametrize("group", ["penstock-tasks", "penstock-tasks-overflow"])
def test_who_still_reads_any_topic_of_the_pool_is_not_gone(
    monkeypatch: pytest.MonkeyPatch, group: str
) -> None:
    settings = Settings(kafka_topic="tasks")
    members = {group: SimpleNamespace(members=[SimpleNamespace(client_id="gone")])}
    monkeypatch.setattr(ledger_log, "AdminClient", lambda config: None)
    monkeypatch.setattr(ledger_log, "describe_group", lambda admin, group, seconds: members.get(group))
    ledger = LedgerLog(settings, SystemClock(), "broker-1")
    assert ledger.is_member("gone")
    assert not ledger.is_member("another")
