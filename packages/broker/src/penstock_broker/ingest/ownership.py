"""Whose row is it: the owners of a partition, kept in the metadata of its offset commits.

A commit stores, atomically with the offset, who has read the partition, newest first. From that and
the committed offset alone, a broker that lost a partition, or starts again, knows which of its rows
another broker reads again. Covered rows (below an acknowledged commit of ours) are never in question.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

# Kafka's default limit (offset.metadata.max.bytes) is 4,096.
METADATA_BYTES_MAX = 4000
_FORMAT = 1


class Me(NamedTuple):
    """A broker with its store. Without its rows a broker of the same name is someone else."""

    broker_id: str
    store_id: str


class Owner(NamedTuple):
    """``me`` reads, or read, the partition from ``start`` on; ``epoch`` is its boot epoch at the time.

    What an older owner holds at or above ``start``, uncovered, is read again by this one.
    """

    start: int
    me: Me
    epoch: int


def encode(owners: Sequence[Owner]) -> str:
    """The metadata of a commit: ``owners``, newest first; the oldest are left out when there are too many."""
    entries = [[o.start, o.me.broker_id, o.me.store_id, o.epoch] for o in owners]
    while True:
        text = json.dumps({"penstock": _FORMAT, "owners": entries}, separators=(",", ":"))
        if len(text) <= METADATA_BYTES_MAX or not entries:
            return text
        entries.pop()


def decode(metadata: str | None) -> tuple[Owner, ...]:
    """The owners in a commit's metadata; none when it is not ours or not whole."""
    if not metadata:
        return ()
    try:
        data = json.loads(metadata)
        if data["penstock"] != _FORMAT:
            return ()
        return tuple(_owner(*entry) for entry in data["owners"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return ()


def _owner(start: object, broker_id: object, store_id: object, epoch: object) -> Owner:
    if not (isinstance(start, int) and start >= 0 and isinstance(epoch, int)):
        raise ValueError("numbers expected")
    if not (isinstance(broker_id, str) and isinstance(store_id, str)):
        raise ValueError("names expected")
    return Owner(start, Me(broker_id, store_id), epoch)


def record_owner(owners: Sequence[Owner], start: int, me: Me, epoch: int) -> tuple[Owner, ...]:
    """``owners`` with me as the newest, reading from ``start`` on.

    Each owner is kept once. Where an older entry of mine goes, its start passes to the next newer
    entry, so that for everybody before it the boundary stays where it was.
    """
    if owners and owners[0].me == me:
        return (Owner(min(start, owners[0].start), me, epoch), *owners[1:])
    result = [Owner(start, me, epoch)]
    for owner in owners:
        if owner.me == me:
            newer = result[-1]
            result[-1] = newer._replace(start=min(newer.start, owner.start))
        else:
            result.append(owner)
    return tuple(result)


def boundary(owners: Sequence[Owner], committed: int | None, me: Me, assigned: bool) -> int | None:
    """The offset at and above which my uncovered rows are someone else's; None: they are all mine.

    ``committed``: the group's offset, None when it has none. ``assigned``: the partition is mine now.
    """
    newer = []
    for owner in owners:
        if owner.me == me:
            break
        newer.append(owner.start)
    # Also when I am not among them: then no commit of mine ever passed, and all of them read what I
    # read; or so many came after me that my entry is gone, and below the oldest left nobody reads again.
    if newer:
        return min(newer)
    if owners:
        return None if assigned else committed
    # No owners: nobody has committed yet, or somebody else set the offset by hand.
    if committed is not None:
        return committed
    return None if assigned else 0


def unknown_from(owners: Sequence[Owner], committed: int | None, known_to: int, me: Me) -> int | None:
    """Where that begins, below ``committed``, which others have taken since this broker last knew the ids
    of the partition; None: there is no such thing.

    ``known_to``: the end of what this broker took last, and -1 without. All before it is known, for it was
    looked through then; a broker that is no owner has not looked (its rows may have been restored).
    """
    if committed is None or not owners or owners[0].me == me:
        return None
    first = min(owner.start for owner in owners)
    if any(owner.me == me for owner in owners):
        first = max(first, known_to)
    return first if first < committed else None


class Start(NamedTuple):
    """Where to read. ``offset`` None: nothing is known, the reset policy decides.

    ``continues``: the range taken so far goes on; else a new one begins. ``since``: from there on all
    is, or will be, read here; less than ``offset`` where what was taken before has never been recorded.
    ``skipped``: offsets that nobody here has read and that are jumped over, because the group's offset
    was moved ahead.
    """

    offset: int | None
    since: int | None
    continues: bool
    skipped: int = 0


def choose_start(owners: Sequence[Owner], committed: int | None, taken: tuple[int, int], me: Me) -> Start:
    """Where to read a partition that was just assigned.

    ``taken``: the range that this broker took of it and, after ``boundary``, still has: its start and
    its end; (-1, -1): nothing.
    """
    first, end = taken
    if committed is None:
        since = end if first < 0 else min(first, end)
        return Start(end, since, continues=True) if end >= 0 else Start(None, None, continues=False)
    mine = bool(owners) and owners[0].me == me
    if not mine:
        return Start(committed, committed, continues=committed == end)
    if committed <= end:
        return Start(end, end, continues=True)
    return Start(committed, committed, continues=False, skipped=committed - end if end >= 0 else 0)
