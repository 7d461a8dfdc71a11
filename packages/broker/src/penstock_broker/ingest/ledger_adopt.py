"""Taking over, on a living broker, what another one that never returns has left unfinished."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import structlog
from confluent_kafka import KafkaException

from penstock_broker.errors import FatalError
from penstock_broker.ingest.intake import Intake
from penstock_broker.ingest.ledger import LOOK_SECONDS, Ledger
from penstock_broker.ingest.ledger_log import Fenced
from penstock_broker.ingest.ledger_records import (
    Account,
    Head,
    Record,
    Taken,
    head_record,
    range_record,
    segment_record,
)
from penstock_broker.ingest.ledger_restore import Left, find_left, restore
from penstock_broker.ingest.ownership import Me
from penstock_broker.store.ledger import Segment

log = structlog.get_logger("ledger")

SILENT_MS_MIN = 60_000
# A broker that lives and was fenced notices when it writes next, and leaves the group.
GONE_SECONDS_MAX = 60.0


class AdoptError(Exception):
    """A broker cannot be adopted, or not now; the text says why and what to do."""


class AdoptedHere(AdoptError):
    """This very store has adopted it, all of it."""


@dataclass(frozen=True, slots=True)
class AdoptReport:
    """What became of an adoption. ``lost``: unfinished tasks that Kafka no longer held."""

    broker_id: str
    partitions: int
    adopted: int
    lost: int


async def adopt(ledger: Ledger, intakes: Sequence[Intake], broker_id: str, force: bool) -> AdoptReport:
    """Take over what the broker ``broker_id`` of this pool has left. ``intakes``: this broker's.

    It is fenced first: should it live, it stops. What is adopted is in this store and in this broker's
    ledger before the other's forgets it, so that an adoption that fails, or whose broker dies, can be
    repeated: on the same broker, for nobody else knows what it holds of it already. ``force``: also when it
    has written within the last minute. Raises AdoptError.
    """
    try:
        await _may_adopt(ledger, broker_id, force)
        theirs = ledger.log_of(broker_id)
        await ledger.call(theirs.fence)
        # Another one may have begun before it was fenced by this.
        account = await _may_adopt(ledger, broker_id, force)
        again = _on_a_new_disk(ledger, account)
        if not again:
            await ledger.succeed(theirs, account.head, broker_id)
        log.warning("adopting a broker", broker=broker_id)
        if not await ledger.is_gone(broker_id, GONE_SECONDS_MAX):
            raise AdoptError(
                f"broker {broker_id!r} is still in the consumer group"
                f" {ledger.settings.kafka_consumer_group!r}: stop it, and repeat the adoption"
            )
        account = await ledger.read(broker_id)
        lost, adopted = ledger.unrestorable, 0
        lefts = await find_left(ledger, account, broker_id)
        for left in lefts:
            # Nothing says what the store that has begun has started of it.
            left = left._replace(unrecorded=left.unrecorded or again)
            if not left.gone:
                _check_topic(ledger, left)
                await _settle_own(ledger, intakes, left)
            adopted += await restore(ledger, left, "adopted", progress=_progress(broker_id, account, left))
            await ledger.record_with(_handed(ledger, broker_id, account, left))
        await ledger.record_with([_handed_head(ledger, broker_id, account)])
        await ledger.store.forget_meta([_progress(broker_id, account, left) for left in lefts])
    except FatalError as error:
        raise AdoptError(str(error)) from None
    except KafkaException as error:
        raise AdoptError(
            f"Kafka did not answer while {broker_id!r} was adopted ({error.args[0].str()}):"
            " repeat the adoption"
        ) from None
    except Fenced:
        raise AdoptError(
            f"broker {broker_id!r} lives: it wrote to the ledger while it was being adopted; stop it first"
        ) from None
    report = AdoptReport(broker_id, len(lefts), adopted, ledger.unrestorable - lost)
    log.warning("adopted a broker", broker=broker_id, tasks=adopted, lost=report.lost)
    return report


async def _may_adopt(ledger: Ledger, broker_id: str, force: bool) -> Account:
    if broker_id == ledger.me.broker_id:
        raise AdoptError(f"this is broker {broker_id!r}: a broker is adopted by another one")
    if not ledger.is_open:
        raise AdoptError("this broker's ledger cannot be written now: see its log, and repeat the adoption")
    account = await ledger.read(broker_id)
    head = account.head
    if head is None:
        raise AdoptError(
            f"the ledger knows no broker {broker_id!r} in the group"
            f" {ledger.settings.kafka_consumer_group!r}: names are those of broker_id"
        )
    successor = head.successor
    if successor is not None and head.handed:
        error = AdoptedHere if successor == ledger.me else AdoptError
        raise error(f"broker {broker_id!r} was adopted by {successor.broker_id!r} already")
    mine = successor is not None and successor.broker_id == ledger.me.broker_id
    if successor is not None and not mine and await _goes_on(ledger, successor, broker_id):
        raise AdoptError(
            f"broker {successor.broker_id!r} has begun to adopt {broker_id!r}: repeat the adoption there;"
            f" should {successor.broker_id!r} never return either, adopt that one first"
        )
    silent_ms = ledger.store.clock.wall_ms() - head.written_at
    # Its own new disk that restores writes as long as it does; what was begun here was allowed then.
    if silent_ms < SILENT_MS_MIN and not force and not mine:
        raise AdoptError(
            f"broker {broker_id!r} wrote to the ledger {max(0, silent_ms) // 1000} s ago: it seems to live."
            f" Stop it and wait for {SILENT_MS_MIN // 1000} s, or force the adoption"
        )
    return account


def _on_a_new_disk(ledger: Ledger, account: Account) -> bool:
    """Whether this broker had begun the adoption on a disk that it has lost since. As long as it is not
    done, the ledger names that store."""
    successor = account.head.successor if account.head is not None else None
    return (
        successor is not None
        and successor.broker_id == ledger.me.broker_id
        and successor.store_id != ledger.me.store_id
    )


async def _goes_on(ledger: Ledger, successor: Me, broker_id: str) -> bool:
    """Whether the broker that took over from another one still counts: it may hold rows of it that the
    other's records name, too; on a new disk those that it had recorded itself."""
    if successor.broker_id == broker_id:
        # Its own new disk: it is adopted with it.
        return False
    head = (await ledger.read(successor.broker_id)).head
    return head is None or not head.handed


def _check_topic(ledger: Ledger, left: Left) -> None:
    """What this broker has of a topic that was made anew must have its other name first."""
    source = ledger.store.source(left.topic, left.partition)
    if left.topic_id and source.topic_id not in ("", left.topic_id):
        raise AdoptError(
            f"the topic {left.topic} was made anew, and this broker has not noticed yet: repeat the adoption"
        )


async def _settle_own(ledger: Ledger, intakes: Sequence[Intake], left: Left) -> None:
    """Rows of this broker in the same part of the log are settled first: whose they are, and covered."""
    resolving = [i for i in intakes if i.topic == left.topic and left.partition not in i.readings]
    source = ledger.store.source(left.topic, left.partition)
    until = ledger.store.clock.mono_ms() + GONE_SECONDS_MAX * 1000
    while source.uncovered and source.uncovered[0][0] < left.end:
        found = await ledger.call(ledger.log.look_up, left.topic, [left.partition]) if resolving else []
        if found:
            await resolving[0].resolve(found)
        elif ledger.store.clock.mono_ms() > until:
            raise AdoptError(
                f"this broker's own offsets of {left.topic}/{left.partition} are not committed:"
                " repeat the adoption"
            )
        else:
            await asyncio.sleep(LOOK_SECONDS)


def _progress(broker_id: str, account: Account, left: Left) -> str:
    """Where the store keeps how far the adoption of a partition is: when it is repeated, what it has adopted
    may have ended so long ago that nothing is known of it."""
    store_id = account.head.store_id if account.head is not None else ""
    progress = f"adopt/{broker_id}/{store_id}/{left.topic}/{left.partition}"
    return f"{progress}/gone" if left.gone else progress


def _handed(ledger: Ledger, broker_id: str, account: Account, left: Left) -> list[Record]:
    """The other's records of one partition, now that this broker's say all of it."""
    group = ledger.settings.kafka_consumer_group
    taken = Taken(left.start, left.end, left.end)
    where = (left.topic, left.partition)
    # Of a log that is no more nothing is kept.
    records = [range_record(group, broker_id, *where, None if left.gone else taken, left.topic_id)]
    records += [
        segment_record(group, broker_id, where, Segment(None, {}))
        for where in account.segments
        if where[:2] == (left.topic, left.partition)
    ]
    return records


def _handed_head(ledger: Ledger, broker_id: str, account: Account) -> Record:
    head = account.head or Head("", 0, 0, 0)
    done = head._replace(successor=ledger.me, handed=True, written_at=ledger.store.clock.wall_ms())
    return head_record(ledger.settings.kafka_consumer_group, broker_id, done)
