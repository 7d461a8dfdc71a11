"""The Kafka consumer: the event loop's handle on the thread that polls."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Mapping, Sequence

import structlog
from confluent_kafka import KafkaException

from penstock_broker.config import Settings
from penstock_broker.errors import FatalError
from penstock_broker.ingest.admission import Admission, AdmissionLimits
from penstock_broker.ingest.event_loop import EventLoop
from penstock_broker.ingest.intake import Intake
from penstock_broker.ingest.kafka import RESTART
from penstock_broker.ingest.ledger import Ledger
from penstock_broker.ingest.poller import Poller
from penstock_broker.ingest.topics import NoTopic, ensure_topics
from penstock_broker.store.inflight import Inflight
from penstock_broker.store.writer import StoreStopped

log = structlog.get_logger("ingest")

START_SECONDS_MAX = 3.0
STOP_SECONDS_MAX = 5.0
RETRY_SECONDS = 1.0
POLL_SECONDS = 0.2
# A topic that is not there is looked for this often.
TOPIC_RETRY_SECONDS = 5.0
# That Kafka is waited for is said again this often.
WARN_AGAIN_SECONDS = 60.0


class KafkaConsumer:
    """Takes a topic's activations into the store. Made, started and stopped on the event loop."""

    def __init__(
        self,
        store: Inflight,
        settings: Settings,
        ledger: Ledger | None = None,
        room: Callable[[], int] | None = None,
        topics_ready: Callable[[Settings, float], bool] = ensure_topics,
    ) -> None:
        self._topics_ready = topics_ready
        self._settings = settings
        self._ledger = ledger
        self._clock = store.clock
        self.topic = settings.kafka_topic
        self.admission = Admission(AdmissionLimits.of(settings))
        self.intake = Intake(
            store,
            self.topic,
            settings.broker_id,
            int(settings.kafka_session_timeout_seconds * 1000),
            settings.kafka_auto_offset_reset,
            room,
        )
        self._poller = Poller(settings, store.clock, self.intake, self.admission)
        self.intake.commit = self._poller.hand_commit
        self._stopping = threading.Event()
        # An answer without the topic is then a node's that is coming up, or the topic will be made anew.
        self._read_before = any(source.topic == self.topic for source in store.sources())

    # -- status: may be read from any thread

    @property
    def connected(self) -> bool:
        """Whether Kafka answers, as far as is known."""
        return self._poller.connected

    @property
    def paused(self) -> bool:
        """Whether nothing is taken because the store has no room."""
        return self._poller.paused

    @property
    def consumed(self) -> int:
        """Messages taken since the start."""
        return self._poller.consumed

    @property
    def replayed(self) -> int:
        """Messages that were read before and were skipped by their position."""
        return self._poller.tracks.replayed

    @property
    def unseen(self) -> int:
        """Offsets that others took, in which there was no time to look for ids that come again."""
        return self._poller.tails.unseen

    @property
    def lags(self) -> Mapping[int, int]:
        """Messages not read yet, by partition; a few seconds old."""
        return self._poller.lags

    @property
    def assignment(self) -> Sequence[int]:
        """Partitions assigned to this broker; none once it has been told to leave."""
        return () if self._stopping.is_set() else sorted(self.intake.readings)

    def last_commit_age_seconds(self) -> float:
        """Since the last acknowledged offset commit, or since the start."""
        return (self._clock.mono_ms() - self.intake.committed_at_ms) / 1000

    # -- on the event loop

    async def start(self, seconds: float = START_SECONDS_MAX) -> None:
        """Start consuming. Kafka may be away: it is waited for ``seconds``, and tried until it is there.

        Raises FatalError when the topic does not exist, was never read here and may not be created.
        """
        loop = asyncio.get_running_loop()
        self._finished: asyncio.Future[None] = loop.create_future()
        self._checked: asyncio.Future[None] = loop.create_future()
        threading.Thread(target=self._main, args=(EventLoop(),), name="kafka-consumer", daemon=True).start()
        await asyncio.wait(
            (self._checked, self._finished),
            timeout=seconds,
            return_when=asyncio.FIRST_COMPLETED,
        )
        if self._finished.done():
            self._finished.result()

    async def run(self) -> None:
        """Until stopped. Raises FatalError when consuming cannot go on."""
        await asyncio.shield(self._finished)

    async def stop(self) -> None:
        """Stop taking, commit what is durable, leave. Bounded in time, whatever Kafka does."""
        self._stopping.set()
        done, _ = await asyncio.wait((self._finished,), timeout=STOP_SECONDS_MAX)
        if not done:
            log.warning("the Kafka consumer did not end in time; its last offsets may be read again")

    def _set_checked(self) -> None:
        if not self._checked.done():
            self._checked.set_result(None)

    def _finish(self, error: Exception | None) -> None:
        if error is None:
            self._finished.set_result(None)
        else:
            self._finished.set_exception(error)

    # -- on the thread

    def _main(self, loop: EventLoop) -> None:
        error: Exception | None = None
        try:
            if self._await_topics(loop) and self._await_ledger(loop):
                self._poller.run(loop, self._stopping)
        except StoreStopped:
            log.debug("the store has stopped, and with it the intake")
        except KafkaException as caught:
            error = FatalError(f"the Kafka client cannot go on: {caught.args[0].str()}", RESTART)
        except Exception as caught:  # noqa: BLE001 - the event loop raises it
            error = caught
        loop.tell(self._finish, error)

    def _await_topics(self, loop: EventLoop) -> bool:
        """Wait until Kafka is there and has the topics; False when stopped before."""
        warn_at_ms = 0
        while not self._stopping.is_set():
            try:
                ready = self._topics_ready(self._settings, START_SECONDS_MAX - 0.5)
            except (KafkaException, NoTopic) as error:
                if isinstance(error, NoTopic) and not self._read_before:
                    raise
                now = self._clock.mono_ms()
                if now >= warn_at_ms:
                    warn_at_ms = now + int(WARN_AGAIN_SECONDS * 1000)
                    log.warning(
                        "Kafka cannot be reached, or does not have or create a topic; what is stored is"
                        " served; trying again until it does",
                        cluster=self._settings.kafka_cluster,
                        error=error.message if isinstance(error, NoTopic) else error.args[0].str(),
                    )
                loop.tell(self._set_checked)
                self._stopping.wait(RETRY_SECONDS)
            else:
                if ready:
                    return True
                self._stopping.wait(TOPIC_RETRY_SECONDS)
        return False

    def _await_ledger(self, loop: EventLoop) -> bool:
        """Wait until it is known what was left by a disk that is lost; False when stopped before."""
        if self._ledger is None:
            loop.tell(self._set_checked)
            return True
        opening = loop.start(self._ledger.open(self._set_checked))
        while not self._stopping.is_set():
            done, _ = concurrent.futures.wait((opening,), POLL_SECONDS)
            if done:
                opening.result()
                return True
        opening.cancel()
        return False
