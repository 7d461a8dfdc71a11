"""Whose row is it: as a table, and as several brokers that take, commit, lose and take a partition again."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from penstock_broker.ingest.ownership import (
    METADATA_BYTES_MAX,
    Me,
    Owner,
    Start,
    boundary,
    choose_start,
    decode,
    encode,
    record_owner,
    unknown_from,
)

A, B, C = (Me(f"broker-{name}", "0" * 8) for name in "abc")
# The same broker after it lost its disk.
A2 = Me("broker-a", "1" * 8)


def owners(*entries: tuple[int, Me]) -> tuple[Owner, ...]:
    return tuple(Owner(start, me, 1) for start, me in entries)


@pytest.mark.parametrize(
    ("listed", "committed", "assigned", "expected"),
    [
        pytest.param(owners((0, A)), 50, True, None, id="newest and assigned: all mine"),
        pytest.param(owners((0, A)), 50, False, 50, id="newest, gone: the next one starts at the commit"),
        pytest.param(owners((70, B), (0, A)), 90, True, 70, id="one came after me"),
        pytest.param(owners((70, B), (0, A)), 90, False, 70, id="one came after me, whoever has it now"),
        pytest.param(owners((90, C), (70, B), (0, A)), 95, False, 70, id="two came after me: the older"),
        pytest.param(owners((20, C), (70, B), (0, A)), 95, False, 20, id="the newer one was set back"),
        pytest.param(owners((90, A), (70, B)), 95, True, None, id="I came back"),
        pytest.param(owners((70, B)), 90, True, 70, id="I never committed"),
        pytest.param(owners((70, A2)), 90, False, 70, id="my name with another disk is not me"),
        pytest.param((), None, True, None, id="nobody has committed, and it is mine"),
        pytest.param((), None, False, 0, id="nobody has committed, and it is another's"),
        pytest.param((), 40, True, 40, id="set by hand"),
        pytest.param((), 40, False, 40, id="set by hand, and it is another's"),
    ],
)
def test_boundary(
    listed: tuple[Owner, ...], committed: int | None, assigned: bool, expected: int | None
) -> None:
    assert boundary(listed, committed, A, assigned) == expected


@pytest.mark.parametrize(
    ("listed", "committed", "taken", "expected"),
    [
        pytest.param((), None, (-1, -1), Start(None, None, False), id="nothing known: the reset policy"),
        pytest.param((), None, (5, 30), Start(30, 5, True), id="the group has no offset, the store has"),
        pytest.param(owners((0, A)), 20, (5, 30), Start(30, 30, True), id="mine: go on where I was"),
        pytest.param(owners((0, A)), 30, (5, 30), Start(30, 30, True), id="mine, and all of it committed"),
        pytest.param(
            owners((0, A)), 30, (5, 20), Start(30, 30, False, 10), id="mine, and moved ahead: an alarm"
        ),
        pytest.param(owners((0, A)), 30, (-1, -1), Start(30, 30, False), id="mine, and nothing was taken"),
        pytest.param(owners((0, B)), 30, (5, 20), Start(30, 30, False), id="another's: from its commit"),
        pytest.param(owners((0, B)), 20, (5, 20), Start(20, 20, True), id="another's, which took nothing"),
        pytest.param((), 20, (5, 30), Start(20, 20, False), id="set back by hand"),
    ],
)
def test_where_reading_starts(
    listed: tuple[Owner, ...], committed: int | None, taken: tuple[int, int], expected: Start
) -> None:
    assert choose_start(listed, committed, taken, A) == expected


def test_what_was_adopted_and_never_read_here_is_owned_from_its_end() -> None:
    me = Me("b", "1")
    start = choose_start((), None, (-1, 500), me)
    assert start.since is not None
    owners = record_owner((), start.since, me, 1)
    assert decode(encode(owners)) == owners == (Owner(500, me, 1),)


@pytest.mark.parametrize(
    ("listed", "committed", "known_to", "expected"),
    [
        pytest.param(owners((0, B)), 50, -1, 0, id="a stranger comes: all of it"),
        pytest.param(owners((70, B), (20, C)), 90, -1, 20, id="from where the first of them began"),
        pytest.param(owners((70, B), (0, A)), 90, 70, 70, id="one came after me"),
        pytest.param(owners((0, B), (40, A)), 90, 60, 60, id="my older part has passed to one before"),
        pytest.param(
            owners((70, B), (0, A2)), 90, 70, 0, id="my disk was lost: what was restored is not all"
        ),
        pytest.param(owners((0, A)), 50, 50, None, id="a restart"),
        pytest.param(owners((0, A)), 50, 20, None, id="my offset was moved ahead: nobody has read that"),
        pytest.param(owners((0, A), (0, B)), 50, 50, None, id="a restart, after others"),
        pytest.param(
            owners(), 50, -1, None, id="a person has set the offset: nobody has read what is before"
        ),
        pytest.param(owners(), 50, 20, None, id="a person has moved it"),
        pytest.param(owners(), None, -1, None, id="nothing is known"),
        pytest.param(owners((50, B)), 50, -1, None, id="the other has read nothing"),
        pytest.param(owners((50, B), (0, A)), 50, 50, None, id="the other has read nothing more"),
    ],
)
def test_what_others_took_is_unknown(
    listed: tuple[Owner, ...], committed: int | None, known_to: int, expected: int | None
) -> None:
    assert unknown_from(listed, committed, known_to, A) == expected


def test_an_owner_is_recorded_once_and_the_boundary_of_the_others_stays() -> None:
    history = owners((100, B), (60, A), (10, C))
    again = record_owner(history, 150, A, 7)
    assert again == (Owner(150, A, 7), Owner(60, B, 1), Owner(10, C, 1))
    assert boundary(again, 150, C, False) == boundary(history, 150, C, False) == 60
    assert boundary(again, 150, B, False) == 150


def test_the_newest_owner_goes_on_under_its_new_epoch() -> None:
    assert record_owner(owners((10, A), (0, B)), 30, A, 9) == (Owner(10, A, 9), Owner(0, B, 1))


def test_metadata_comes_back() -> None:
    history = owners((100, B), (60, A), (10, C))
    assert decode(encode(history)) == history
    assert decode(encode(())) == ()


def test_metadata_stays_within_its_limit_and_keeps_the_newest() -> None:
    history = owners(*((1000 - i, Me(f"{i}-" + "x" * 190, "0" * 8)) for i in range(50)))
    text = encode(history)
    assert len(text.encode()) <= METADATA_BYTES_MAX
    kept = decode(text)
    assert kept == history[: len(kept)]
    assert len(kept) > 10


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "{",
        "null",
        "[]",
        "17",
        '"penstock"',
        '{"penstock":2,"owners":[]}',
        '{"penstock":1}',
        '{"penstock":1,"owners":[[1,"a","b"]]}',
        '{"penstock":1,"owners":[[-1,"a","b",1]]}',
        '{"penstock":1,"owners":[["1","a","b",1]]}',
        '{"penstock":1,"owners":[[1,null,"b",1]]}',
        '{"penstock":1,"owners":7}',
        "[" * 3000,
    ],
)
def test_metadata_of_others_is_no_owner(text: str | None) -> None:
    assert decode(text) == ()


@dataclass
class Broker:
    """What the store keeps of the partition; it survives a crash of the process."""

    me: Me
    begun: int = -1
    taken: int = -1
    covered: int = 0
    # Uncovered rows; they may run, but nothing of them is acknowledged.
    uncovered: set[int] = field(default_factory=set)
    # Covered: mine for good, and their outcomes acknowledged at some time.
    mine: set[int] = field(default_factory=set)
    # Offsets whose ids it would recognise.
    known: set[int] = field(default_factory=set)
    # What it believes; only Kafka knows.
    reading: tuple[Owner, ...] | None = None
    epoch: int = 1

    def cover(self, offset: int) -> None:
        passed = {o for o in self.uncovered if o < offset}
        self.uncovered -= passed
        self.mine |= passed
        self.covered = max(self.covered, offset)


class Partition(RuleBasedStateMachine):
    """One partition in Kafka, and brokers with it; their decisions are those of the product."""

    LOG = 200
    brokers_max = 3

    def __init__(self) -> None:
        super().__init__()
        self.brokers = [Broker(Me(f"broker-{n}", "0" * 8)) for n in range(self.brokers_max)]
        self.committed: int | None = None
        self.metadata = ""
        # Whom Kafka lets commit.
        self.member: Broker | None = None

    def commit(self, broker: Broker) -> bool:
        """What Kafka does with a commit: a fenced member's is refused."""
        if broker is not self.member or broker.reading is None:
            return False
        self.committed, self.metadata = broker.taken, encode(broker.reading)
        return True

    def resolve(self, broker: Broker, assigned: bool) -> tuple[Owner, ...]:
        known = decode(self.metadata)
        bound = boundary(known, self.committed, broker.me, assigned)
        if bound is None:
            broker.cover(self.committed or 0)
            return known
        bound = max(bound, broker.covered)
        broker.known -= {o for o in broker.uncovered if o >= bound}
        broker.uncovered = {o for o in broker.uncovered if o < bound}
        broker.taken = min(broker.taken, bound) if broker.taken >= 0 else -1
        broker.cover(bound)
        return known

    def begin(self, broker: Broker) -> None:
        known = self.resolve(broker, assigned=True)
        unknown = unknown_from(known, self.committed, broker.taken, broker.me)
        if unknown is not None:
            broker.known |= set(range(unknown, self.committed or 0))
        start = choose_start(known, self.committed, (broker.begun, broker.taken), broker.me)
        assert not start.skipped
        offset, since = (start.offset or 0, start.since or 0)
        if not start.continues:
            broker.begun = broker.taken = offset
        broker.reading = record_owner(known, since, broker.me, broker.epoch)

    brokers_ = st.integers(0, brokers_max - 1)

    @rule(who=brokers_, graceful=st.booleans())
    def assign(self, who: int, graceful: bool) -> None:
        """The partition goes to ``who``; its reader before commits first, or does not know yet."""
        broker, before = self.brokers[who], self.member
        if before is broker:
            return
        if before is not None and graceful and before.reading is not None:
            if self.commit(before):
                before.cover(before.taken)
            before.reading = None
            self.resolve(before, assigned=False)
        self.member = broker
        self.begin(broker)

    @rule(who=brokers_, messages=st.integers(1, 20))
    def take(self, who: int, messages: int) -> None:
        """Also by one that was fenced and does not know it."""
        broker = self.brokers[who]
        if broker.reading is not None:
            upto = min(broker.taken + messages, self.LOG)
            broker.uncovered |= set(range(broker.taken, upto))
            broker.known |= set(range(broker.taken, upto))
            broker.taken = max(broker.taken, upto)

    @rule(who=brokers_, answered=st.booleans())
    def commit_offset(self, who: int, answered: bool) -> None:
        """The answer may be lost on its way back."""
        broker = self.brokers[who]
        if broker.reading is not None and self.commit(broker) and answered:
            broker.cover(broker.taken)

    @rule(who=brokers_)
    def notice_the_loss(self, who: int) -> None:
        broker = self.brokers[who]
        if broker.reading is not None and broker is not self.member:
            broker.reading = None
            self.resolve(broker, assigned=False)

    @rule(who=brokers_)
    def crash(self, who: int) -> None:
        """And it is back, with what its store has; Kafka may have given the partition away by now."""
        broker = self.brokers[who]
        broker.reading = None
        broker.epoch += 1
        if self.member is broker:
            self.member = None

    @rule(who=brokers_)
    def resolve_unassigned(self, who: int) -> None:
        broker = self.brokers[who]
        if broker.reading is None:
            self.resolve(broker, assigned=False)

    @invariant()
    def nothing_is_covered_twice(self) -> None:
        seen: set[int] = set()
        for broker in self.brokers:
            assert not seen & broker.mine
            seen |= broker.mine

    @invariant()
    def nothing_behind_the_commit_is_nobodys(self) -> None:
        held = set().union(*(b.mine | b.uncovered for b in self.brokers))
        assert set(range(self.committed or 0)) <= held

    @invariant()
    def whoever_reads_knows_all_ids_before(self) -> None:
        if self.member is not None and self.member.reading is not None:
            assert set(range(self.committed or 0)) <= self.member.known

    def teardown(self) -> None:
        """Once everybody knows: each offset behind the commit is exactly one broker's, for good."""
        for broker in self.brokers:
            if broker is self.member and broker.reading is not None:
                self.commit(broker)
                broker.cover(broker.taken)
        for broker in self.brokers:
            if broker is not self.member or broker.reading is None:
                broker.reading = None
                self.resolve(broker, assigned=False)
        self.nothing_is_covered_twice()
        kept = [o for broker in self.brokers for o in broker.mine | broker.uncovered]
        assert sorted(kept) == list(range(self.committed or 0))


TestPartition = Partition.TestCase
TestPartition.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
