"""The Kafka client and the turns of its thread, which polls and never stops polling.

It takes what is there in batches, admits it, and hands whole batches to the event loop. Every
decision is the intake's (on the loop) or a pure function's.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import threading
from collections import deque
from collections.abc import Iterable, Mapping, Sequence

import structlog
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from penstock_broker.clock import Clock
from penstock_broker.config import Settings
from penstock_broker.errors import FatalError
from penstock_broker.ingest.admission import Admission
from penstock_broker.ingest.cluster import ASK_SECONDS_MAX, Cluster
from penstock_broker.ingest.event_loop import EventLoop
from penstock_broker.ingest.intake import Begun, Found, Intake, Position, Tail
from penstock_broker.ingest.kafka import RESTART, Connections, consumer_config
from penstock_broker.ingest.ownership import decode
from penstock_broker.ingest.tails import Tails
from penstock_broker.ingest.taking import ReadMessage, Tracks

log = structlog.get_logger("ingest")

BATCH_MESSAGES_MAX = 1024
POLL_SECONDS = 0.2
# While a commit is due: nothing else wakes the thread up for it.
POLL_BUSY_SECONDS = 0.002
# A store without room is waited for this long before the partitions are paused.
PAUSE_AFTER_SECONDS = 0.2
# While it waits for room in memory, commits and their answers wait at most this long.
PACE_SECONDS = 0.01
# The group waits as well while this thread does.
LOOKUP_SECONDS_MAX = 3.0
# An assignment waits so long for the ledger, less than puts in doubt what is not covered: if it cannot be
# written, its partitions begin when it can.
BEGIN_SECONDS_MAX = 0.5
CHORES_EVERY_MS = 1000
LOOK_WHICH_EVERY_MS = 5000
LOOK_FOR_UNREAD_EVERY_MS = 10_000
COMMIT_LAST_MS_MAX = 3000
# Rows of partitions that were never assigned to us since the start are looked into after this.
SETTLE_MS_MAX = 20_000
# Fenced after Kafka was away, it has mixed up what it knew of this broker before; fenced twice within this
# while it was there, there is another broker of the same id.
FENCED_AGAIN_MS = 60_000


class _GivenUp(Exception):
    """This client cannot go on; another one can."""


class _Fenced(_GivenUp):
    """The group knows another member by this broker's id."""


class _Lost(_GivenUp):
    """The client knows no server of Kafka any more."""


class Poller:
    """Everything in here runs on the consumer's thread, except ``hand_commit``."""

    def __init__(self, settings: Settings, clock: Clock, intake: Intake, admission: Admission) -> None:
        self._settings = settings
        self._clock = clock
        self._intake = intake
        self._admission = admission
        self.topic = settings.kafka_topic
        # For status and metrics: written here, read by anybody.
        self.connected = False
        self.paused = False
        self.consumed = 0
        self.lags: dict[int, int] = {}
        self.tracks = Tracks(self.topic)
        self.tails = Tails(settings, clock, self._remember)
        # Assigned, and not read yet because Kafka or the store could not say from where, or because what
        # others have taken is looked through first.
        self._unbegun: set[int] = set()
        # Of these, those that begin as soon as the ledger has it.
        self._beginning: dict[int, concurrent.futures.Future[list[Begun]]] = {}
        # Outside the log: where to go on is to be looked up.
        self._outside: set[int] = set()
        # Of a topic that was made anew: not read until they have begun again.
        self._anew: set[int] = set()
        # When their leaders were last asked in vain, monotonic ms.
        self._in_vain: dict[int, int] = {}
        # Written by the event loop, taken here.
        self._to_commit: Sequence[Position] | None = None
        # A commit is on its way.
        self._unanswered = False
        # Kafka was, since this broker was fenced last.
        self._was_away = False
        # The client can only be closed: what it says of partitions is of no interest any more.
        self._given_up = False
        self._connections = Connections()
        self._assigned_once = False
        self._chores_at = 0
        self._cluster = Cluster(settings)
        self._topic_id = ""
        self._look_which_at = 0
        self._look_for_unread_at = 0
        self._settle_at = clock.mono_ms() + SETTLE_MS_MAX
        self._chores_in_turn = deque(
            (
                self._look_at_topic,
                self._begin_waiting,
                self._begin_outside,
                self._resolve,
                self._look_for_unread,
            )
        )

    def hand_commit(self, positions: Sequence[Position]) -> None:
        """On the event loop: have these committed. A client serves one thread, and this one polls."""
        self._to_commit = positions

    def run(self, loop: EventLoop, stopping: threading.Event) -> None:
        """Consume until ``stopping``. Raises FatalError, KafkaException, StoreStopped."""
        self._loop, self._stopping = loop, stopping
        fenced_at: int | None = None
        while not stopping.is_set():
            try:
                self._consume()
            except _Fenced as fenced:
                now = self._clock.mono_ms()
                again = fenced_at is not None and now - fenced_at < FENCED_AGAIN_MS
                if again and not self._was_away:
                    raise self._second_broker() from None
                fenced_at, self._was_away = now, False
                log.warning(
                    "Kafka takes this broker for another member of its group; it joins again",
                    topic=self.topic,
                    error=str(fenced),
                )
            except _Lost:
                log.warning(
                    "the Kafka client knows no server of the cluster any more; a new client joins the group",
                    topic=self.topic,
                    cluster=self._settings.kafka_cluster,
                )

    def _consume(self) -> None:
        """With one client, until stopping or given up."""
        self._given_up = False
        self._connections = Connections()
        consumer = Consumer(
            consumer_config(self._settings, self._on_error, self._on_commit, self._on_statistics)
        )
        self._subscribe(consumer)
        try:
            while not self._stopping.is_set():
                self._turn(consumer)
            self._commit_last(consumer)
        except _GivenUp:
            self._given_up = True
            lost = sorted({*self.tracks, *self._unbegun, *self._anew})
            self._forget(lost)
            self._loop.tell(self._lose, lost)
            raise
        finally:
            if not self._given_up:
                self._stopping.set()
            self.tails.close()
            # One that has lost Kafka would wait for the answers to its commits for ever; it is let go of.
            if not self._connections.lost:
                consumer.close()
            if self._unanswered:
                self._unanswered = False
                self._loop.tell(self._intake.commit_done, [])

    def _subscribe(self, consumer: Consumer) -> None:
        consumer.subscribe(
            [self.topic], on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost
        )

    def _turn(self, consumer: Consumer) -> None:
        self._intake.membership.turned()
        if self.tails and self.tails.turn():
            self._chores_at = 0
        if self._beginning and (begun := self._have_begun()):
            self._read_anew(consumer, begun)
        allowance = self._intake.gate.allowance()
        if allowance <= 0 and not self.paused:
            if self._intake.gate.wait(PAUSE_AFTER_SECONDS):
                return
            self._pause(consumer, True)
        elif allowance > 0 and self.paused:
            self._pause(consumer, False)
        self._commit(consumer)
        wanted = self._intake.gate.pace(min(allowance, BATCH_MESSAGES_MAX), self._clock.mono_ms())
        waits = allowance > 0 and wanted == 0
        if waits:
            self._intake.gate.wait_for_lead(PACE_SECONDS)
        if not waits or self._unanswered:
            self._receive(consumer, wanted)
        if self._clock.mono_ms() >= self._chores_at:
            self._chores(consumer)
            self._chores_at = self._clock.mono_ms() + CHORES_EVERY_MS

    def _receive(self, consumer: Consumer, wanted: int) -> None:
        # poll returns with the first message at once; consume alone would wait for a full batch. The answer
        # to a commit comes before any message.
        first = consumer.poll(POLL_BUSY_SECONDS if self._intake.busy or self.tails else POLL_SECONDS)
        if first is not None:
            messages: list[ReadMessage] = [first]
            if wanted > 1:
                messages += consumer.consume(wanted - 1, 0)
            self._take(messages)

    def _commit(self, consumer: Consumer) -> None:
        """Start the commit that the intake has asked for, of what has not been taken away since."""
        asked = self._to_commit
        if asked is None:
            return
        self._to_commit = None
        positions = [p for p in asked if p.partition in self.tracks]
        if not positions:
            self._loop.tell(self._intake.commit_done, [])
            return
        self._intake.membership.sending()
        try:
            consumer.commit(offsets=self._topic_partitions(positions), asynchronous=True)
            self._unanswered = True
        except KafkaException as error:
            answers = [(p.partition, p.offset, str(error)) for p in positions]
            self._loop.tell(self._intake.commit_done, answers)

    def _topic_partitions(self, positions: Iterable[Position]) -> list[TopicPartition]:
        return [TopicPartition(self.topic, p.partition, p.offset, p.metadata) for p in positions]

    def _take(self, messages: Sequence[ReadMessage]) -> None:
        batch = self.tracks.take(messages, self._admission, self._clock.wall_ms())
        if batch.rows or batch.taken:
            self.consumed += len(batch.rows)
            self._intake.gate.take(len(batch.rows), batch.size)
            self._loop.tell(self._intake.deliver, batch.rows, batch.size, batch.taken)
            self._set_connected(True)
        for message in batch.errors:
            self._on_message_error(message)

    def _pause(self, consumer: Consumer, pause: bool) -> None:
        partitions = [p for p in consumer.assignment() if p.partition not in self._unbegun]
        (consumer.pause if pause else consumer.resume)(partitions)
        self.paused = pause
        # At a limit the store says so; without one it is only slower than Kafka.
        log.debug("paused" if pause else "resumed", topic=self.topic)

    def _chores(self, consumer: Consumer) -> None:
        """What could not be done when it came up, because Kafka was away."""
        for _ in range(len(self._chores_in_turn)):
            if self._stopping.is_set():
                return
            # One that fails ends the round, for Kafka may be away; the next round begins after it.
            self._chores_in_turn.rotate(-1)
            try:
                self._chores_in_turn[-1](consumer)
            except (KafkaException, TimeoutError) as error:
                log.debug("partitions cannot be looked up yet", error=str(error))
                return

    def _look_at_topic(self, consumer: Consumer) -> None:
        if self._clock.mono_ms() >= self._look_which_at:
            self._look_which(consumer)
        self._begin_anew(consumer)

    def _begin_waiting(self, consumer: Consumer) -> None:
        unbegun = self._unbegun - self._anew - self._beginning.keys()
        if waiting := self._in_turn(p for p in unbegun if p not in self.tails):
            self._begin_later(consumer, waiting)

    def _begin_outside(self, consumer: Consumer) -> None:
        if outside := self._in_turn(self._outside - self._anew):
            self._begin_inside(consumer, outside)

    def _in_turn(self, partitions: Iterable[int]) -> list[int]:
        """A leader that is away is waited for, so only one such is asked in a round: it comes last then."""
        return sorted(partitions, key=lambda p: (self._in_vain.get(p, -1), p))

    def _resolve(self, consumer: Consumer) -> None:
        settled = self._assigned_once or self._clock.mono_ms() >= self._settle_at
        if settled and self._intake.unresolved and not self._intake.committing:
            found = self._look_up(consumer, sorted(self._intake.unresolved))
            self._loop.ask(self._intake.resolve(found))

    def _look_which(self, consumer: Consumer, seconds: float = 0) -> bool:
        """Ask which topic of its name is read; when it is another one, read it anew. Whether it was."""
        id = self._cluster.topic_id(seconds)
        if id is None:
            return False
        self._look_which_at = self._clock.mono_ms() + LOOK_WHICH_EVERY_MS
        if id == self._topic_id or not self._loop.ask(self._intake.topic_is(id)):
            self._topic_id = id
            return False
        self._topic_id = id
        # What still comes from where they were read, and a commit of that, are of no use.
        self._anew = {*self.tracks, *self._unbegun}
        self._beginning.clear()
        for partition in self._anew:
            self.tracks.remove(partition)
            self._outside.discard(partition)
        self._begin_anew(consumer)
        return True

    def _begin_anew(self, consumer: Consumer) -> None:
        for partition in sorted(self._anew):
            try:
                found = Found(partition, None, (), *self._watermarks(consumer, partition))
                self._read_anew(consumer, self._loop.ask(self._intake.begin_anew([found])))
            except (KafkaException, TimeoutError) as error:
                # It has no leader yet, or is not there any more and will be taken away.
                log.debug("a partition cannot begin again yet", partition=partition, error=str(error))

    def _look_for_unread(self, consumer: Consumer) -> None:
        answers = self.connected and not self._connections.silent
        if not answers or self._clock.mono_ms() < self._look_for_unread_at:
            return
        self._look_for_unread_at = self._clock.mono_ms() + LOOK_FOR_UNREAD_EVERY_MS
        if unread := self._cluster.unread(LOOKUP_SECONDS_MAX):
            log.warning(
                "partitions are read by no broker of the group; this one joins it again, for Kafka to give"
                " them to one",
                topic=self.topic,
                group=self._settings.kafka_consumer_group,
                partitions=unread,
            )
            # To subscribe once more alone would change nothing for Kafka.
            consumer.unsubscribe()
            self._subscribe(consumer)

    # -- rebalances: called by the client within poll and consume

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._assigned_once = True
        self._set_connected(True)
        if self._given_up or self._stopping.is_set():
            return
        numbers = sorted(p.partition for p in partitions)
        if not numbers:
            return
        try:
            found = self._look_up(consumer, numbers)
            tails = self._tails(found)
            log.info("partitions assigned", topic=self.topic, partitions=numbers)
            if tails:
                self._chores_at = 0
            self._begin(consumer, [one for one in found if one.partition not in tails])
        except (KafkaException, TimeoutError) as error:
            waiting = [n for n in numbers if n not in self._beginning]
            log.warning("an assignment cannot be started yet", partitions=waiting, error=str(error))
        beginning = [self._beginning[n] for n in numbers if n in self._beginning]
        concurrent.futures.wait(beginning, BEGIN_SECONDS_MAX)
        begun = [b for b in self._have_begun() if b.partition in numbers]
        at_once = {b.partition for b in begun}
        if later := [p for p in partitions if p.partition not in at_once]:
            self._unbegun.update(p.partition for p in later)
            consumer.incremental_assign(later)
            consumer.pause(later)
        if begun:
            self._read(consumer, begun)

    def _tails(self, found: Sequence[Found]) -> dict[int, Tail]:
        """Of which of these something is to be looked through before they begin: what."""
        tails = self._loop.ask(self._intake.tails(found))
        return {tail.partition: tail for tail in tails if not self.tails.is_done(tail)}

    def _begin(self, consumer: Consumer, found: Sequence[Found], tails: Mapping[int, Tail] = {}) -> None:
        """Have these begin, but for those with a tail that is to be looked through from now on.

        Raises KafkaException when a leader that has to be asked is away. No other one is asked after it; all
        others of these have begun then.
        """
        ready: list[Found] = []
        failure: KafkaException | None = None
        for one in found:
            tail = tails.get(one.partition)
            if tail is None and one.committed is not None:
                ready.append(one)
            elif failure is None:
                try:
                    if tail is None:
                        low, high = self._watermarks(consumer, one.partition)
                        ready.append(one._replace(low=low, high=high))
                    else:
                        self.tails.add(tail)
                        if self.tails.is_done(tail):
                            ready.append(one)
                except KafkaException as error:
                    self._in_vain[one.partition] = self._clock.mono_ms()
                    failure = error
        if ready:
            beginning = self._loop.start(self._intake.begin(ready))
            self._beginning.update((one.partition, beginning) for one in ready)
        if failure is not None:
            raise failure

    def _have_begun(self) -> list[Begun]:
        """Those of ``_beginning`` that may be read now."""
        ended = dict.fromkeys(beginning for beginning in self._beginning.values() if beginning.done())
        # One that went meanwhile, and maybe came back, is not meant.
        return [b for e in ended for b in e.result() if self._beginning.get(b.partition) is e]

    def _begin_later(self, consumer: Consumer, partitions: list[int]) -> None:
        """These were assigned, and have not begun."""
        found = self._look_up(consumer, partitions)
        tails = self._tails(found)
        # Nothing of a topic that was made anew has been taken by anybody.
        if not (tails and self._look_which(consumer, ASK_SECONDS_MAX)):
            self._begin(consumer, found, tails)

    def _remember(self, source: int, ids: Mapping[int, int], forwards: Mapping[int, int]) -> None:
        self._loop.tell(self._intake.store.remember, source, ids, forwards)

    def _read(self, consumer: Consumer, begun: Sequence[Begun]) -> None:
        if self._to_commit is not None:
            # Of these it is from when they were here before: nothing is asked for until they are read.
            again = {b.partition for b in begun}
            self._to_commit = [p for p in self._to_commit if p.partition not in again]
        for partition, source, offset in begun:
            self._wait_no_more(partition)
            self.tracks.add(partition, source, offset)
        assigned = [TopicPartition(self.topic, b.partition, b.offset) for b in begun]
        consumer.incremental_assign(assigned)
        # A partition that was paused once stays so wherever it has been meanwhile.
        (consumer.pause if self.paused else consumer.resume)(assigned)
        self._loop.tell(self._intake.begun, [b.partition for b in begun])

    def _read_anew(self, consumer: Consumer, begun: Sequence[Begun]) -> None:
        """These are assigned already, but not from there."""
        consumer.incremental_unassign([TopicPartition(self.topic, b.partition) for b in begun])
        self._read(consumer, begun)

    def _look_up(self, consumer: Consumer, partitions: list[int]) -> list[Found]:
        """Committed offsets and owners, in the order of ``partitions``."""
        asked = [TopicPartition(self.topic, p) for p in partitions]
        found = []
        for answer in consumer.committed(asked, timeout=LOOKUP_SECONDS_MAX):
            if answer.error is not None:
                raise KafkaException(answer.error)
            committed = answer.offset if answer.offset >= 0 else None
            found.append(Found(answer.partition, committed, decode(answer.metadata)))
        return found

    def _watermarks(self, consumer: Consumer, partition: int) -> tuple[int, int]:
        asked = TopicPartition(self.topic, partition)
        low, high = consumer.get_watermark_offsets(asked, timeout=LOOKUP_SECONDS_MAX)
        return low, high

    def _on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        numbers = [p.partition for p in partitions]
        # Also at the end: what is gone is not committed any more.
        self._forget(numbers)
        if self._given_up or self._stopping.is_set():
            return
        log.info("partitions revoked", topic=self.topic, partitions=numbers)
        try:
            positions = self._loop.ask(self._intake.leave(numbers))
            self._loop.ask(self._intake.left(positions, self._commit_now(consumer, positions)))
        except TimeoutError:
            # It stands still; when it goes on, it learns that these are gone.
            self._loop.tell(self._lose, numbers)

    def _lose(self, partitions: list[int]) -> None:
        self._losing = asyncio.ensure_future(self._intake.lost(partitions))

    def _commit_now(self, consumer: Consumer, positions: list[Position]) -> str | None:
        """Commit and wait for the answer: the error, or None."""
        if not positions:
            return None
        try:
            answers = consumer.commit(offsets=self._topic_partitions(positions), asynchronous=False)
        except KafkaException as error:
            return str(error)
        return next((str(a.error) for a in answers or () if a.error is not None), None)

    def _on_lost(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        numbers = [p.partition for p in partitions]
        self._forget(numbers)
        if not (self._given_up or self._stopping.is_set()):
            # Kafka has not heard of this broker for a session, nor this broker of it.
            self._was_away = True
            log.warning("partitions lost: another broker may read them", topic=self.topic, partitions=numbers)
            self._loop.tell(self._lose, numbers)

    def _forget(self, partitions: Iterable[int]) -> None:
        for partition in partitions:
            self.tracks.remove(partition)
            self._wait_no_more(partition)
            self.lags.pop(partition, None)

    def _wait_no_more(self, partition: int) -> None:
        """It has begun, or is gone."""
        self.tails.remove(partition)
        self._beginning.pop(partition, None)
        self._in_vain.pop(partition, None)
        for waiting in (self._unbegun, self._outside, self._anew):
            waiting.discard(partition)

    # -- other events of the client

    def _on_message_error(self, message: ReadMessage) -> None:
        error, partition = message.error(), message.partition()
        assert error is not None
        if error.code() == KafkaError._AUTO_OFFSET_RESET and partition is not None:
            # One that has gone meanwhile is somebody else's to read.
            if partition in self.tracks:
                self._outside.add(partition)
                self._chores_at = 0
        elif _is_fatal(error):
            self._on_error(error)
        else:
            log.warning("Kafka reports an error", topic=self.topic, partition=partition, error=error.str())

    def _begin_inside(self, consumer: Consumer, partitions: list[int]) -> None:
        """These were to be read from an offset that their log does not have (any more)."""
        if self._look_which(consumer, ASK_SECONDS_MAX):
            return
        for partition in partitions:
            try:
                low, high = self._watermarks(consumer, partition)
            except KafkaException:
                self._in_vain[partition] = self._clock.mono_ms()
                raise
            (known,) = self._look_up(consumer, [partition])
            inside = self._intake.begin_inside([known._replace(low=low, high=high)])
            self._read_anew(consumer, self._loop.ask(inside))

    def _on_error(self, error: KafkaError) -> None:
        if self._given_up:
            return
        if _is_fatal(error):
            if error.code() == KafkaError.FENCED_INSTANCE_ID or "fenced" in error.str().lower():
                raise _Fenced(error.str())
            raise FatalError(f"the Kafka client cannot go on: {error.str()}", RESTART)
        if error.code() == KafkaError._ALL_BROKERS_DOWN:
            self._set_connected(False)

    def _second_broker(self) -> FatalError:
        return FatalError(
            f"another broker with the id {self._settings.broker_id!r} has joined the consumer group"
            f" {self._settings.kafka_consumer_group!r}",
            "each broker needs its own broker_id (TASKBROKER_BROKER_ID) and its own database",
        )

    def _on_commit(self, error: KafkaError | None, partitions: list[TopicPartition]) -> None:
        self._unanswered = False
        self._loop.tell(
            self._intake.commit_done,
            [
                (p.partition, p.offset, str(e) if (e := error or p.error) is not None else None)
                for p in partitions
            ],
        )

    def _on_statistics(self, text: str) -> None:
        if self._given_up or self._stopping.is_set():
            return
        statistics = json.loads(text)
        self._connections.look(statistics)
        self._set_connected(self._connections.up)
        if self._connections.silent:
            self._was_away = True
        if self._connections.lost:
            raise _Lost
        partitions = statistics.get("topics", {}).get(self.topic, {}).get("partitions", {})
        lags = {}
        for partition in self.tracks:
            high = partitions.get(str(partition), {}).get("hi_offset", -1)
            if high >= 0:
                lags[partition] = max(0, high - self.tracks.next(partition))
        self.lags = lags

    def _set_connected(self, connected: bool) -> None:
        self._was_away = self._was_away or not connected
        if connected == self.connected:
            return
        self.connected = connected
        if connected:
            log.info("connected to Kafka", cluster=self._settings.kafka_cluster)
        else:
            log.warning(
                "Kafka is away; what is stored is served; trying again until it answers",
                cluster=self._settings.kafka_cluster,
            )

    # -- the end

    def _commit_last(self, consumer: Consumer) -> None:
        """Commit what is durable and wait for the answer, within what remains of the time."""
        until = self._clock.mono_ms() + COMMIT_LAST_MS_MAX
        self._loop.ask(self._intake.finish())
        self._await_commit(consumer, until)
        self._loop.ask(self._intake.commit_rest())
        self._await_commit(consumer, until)

    def _await_commit(self, consumer: Consumer, until: int) -> None:
        while self._intake.committing and self._clock.mono_ms() < until:
            self._commit(consumer)
            consumer.poll(POLL_BUSY_SECONDS)


def _is_fatal(error: KafkaError) -> bool:
    """Whether the client cannot go on. One that is read as a message says so by its code only."""
    return bool(error.fatal()) or error.code() in (KafkaError._FATAL, KafkaError.FENCED_INSTANCE_ID)
