"""Transports against real counterparts: a mock cluster, a port where nobody listens, a gRPC server."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import grpc
import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition

from penstock_client import App, BufferFull, ConfigError, SendError, Task, TaskRef
from penstock_client.settings import ClientSettings, load_settings
from penstock_client.transports import Outgoing, Transport, connect
from penstock_protocol import signature
from penstock_protocol.v1 import activation_pb2, producer_pb2

METHOD = "/penstock.v1.ProducerService/SendTasks"


def task_of(app: App) -> Task[[int], None]:
    @app.namespace("main").task(name="t", retry=None)
    def task(n: int) -> None: ...

    return task


def send_many(task: Task[[int], None], count: int) -> None:
    for n in range(count):
        task.delay(n)


def unused_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def mock_cluster(rtt_ms: int = 0) -> Iterator[str]:
    settings = {"bootstrap.servers": "unused", "test.mock.num.brokers": 1, "test.mock.broker.rtt": rtt_ms}
    cluster = Producer(settings)
    broker = next(iter(cluster.list_topics(timeout=10).brokers.values()))
    yield f"{broker.host}:{broker.port}"
    del cluster  # it lives as long as the producer


@pytest.fixture
def mock_kafka() -> Iterator[str]:
    with mock_cluster() as address:
        yield address


@pytest.fixture
def slow_kafka() -> Iterator[str]:
    with mock_cluster(rtt_ms=400) as address:
        yield address


NOWHERE: dict[str, object] = {"bootstrap.servers": "127.0.0.1:1"}


def producers(
    patch: pytest.MonkeyPatch,
    *firsts: dict[str, object] | KafkaException,
    kind: type[Producer] = Producer,
) -> list[Any]:
    """What each producer is made with. ``firsts``: of the first ones what else they are made with, or why
    they cannot be made."""
    configs: list[Any] = []

    def made(config: dict[str, object]) -> Producer:
        first = firsts[len(configs)] if len(configs) < len(firsts) else {}
        configs.append(config)
        if isinstance(first, KafkaException):
            raise first
        return kind(config | first)

    patch.setattr("penstock_client.transports.kafka.Producer", made)
    return configs


def test_what_kafka_acknowledges_is_on_all_replicas(mock_kafka: str, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = producers(monkeypatch)
    app = App("a", kafka=mock_kafka, strict_kwargs="off")
    task_of(app).delay(1).wait(20)
    assert [(config["acks"], config["enable.idempotence"]) for config in configs] == [("all", True)]


def test_through_kafka(mock_kafka: str) -> None:
    app = App("a", kafka=mock_kafka, strict_kwargs="off")
    task = task_of(app)
    refs = [task.delay(n) for n in range(500)]
    keyed = task.options(task_id="mine", headers={"traceparent": "00-a-b-01"}).delay(1)
    assert keyed.wait(20) is keyed
    assert app.flush(20) == 0
    assert all(ref.future.done() for ref in refs)
    consumer = Consumer({"bootstrap.servers": mock_kafka, "group.id": "g", "auto.offset.reset": "earliest"})
    consumer.subscribe(["taskworker"])
    messages: list[Message] = []
    deadline = time.monotonic() + 30
    while len(messages) < 501 and time.monotonic() < deadline:
        messages += [message for message in consumer.consume(500, 0.2) if message.error() is None]
    consumer.close()
    ids = [activation_pb2.TaskActivation.FromString(message.value() or b"").id for message in messages]
    assert sorted(ids) == sorted([keyed.id, *(ref.id for ref in refs)])
    (with_key,) = [message for message in messages if message.key()]
    assert (with_key.key(), with_key.headers()) == (b"mine", [("traceparent", b"00-a-b-01")])
    app.close()


def test_who_sends_much_does_not_wait_for_callbacks_that_wait_for_it(slow_kafka: str) -> None:
    app = App(
        "a", kafka=slow_kafka, strict_kwargs="off", buffer_messages_max=2000, send_timeout_seconds=0.2,
        delivery_timeout_seconds=5,
    )  # fmt: skip
    task = task_of(app)
    task.delay(0).wait(20)
    held = threading.Lock()

    def acknowledged(_: Future[None]) -> None:
        with held:
            pass

    def send_until_full() -> None:
        with held, contextlib.suppress(BufferFull):
            while True:
                task.delay(1)
                time.sleep(0.0002)

    app.answered = acknowledged
    sender = threading.Thread(target=send_until_full, daemon=True)
    sender.start()
    sender.join(6)
    if hangs := sender.is_alive():
        held.release()
    assert not hangs
    assert app.flush(20) == 0
    app.close()


def test_without_kafka_sending_is_bounded_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    address = f"127.0.0.1:{unused_port()}"
    app = App(
        "a", kafka=address, strict_kwargs="off", send_timeout_seconds=0.3, delivery_timeout_seconds=1,
        buffer_messages_max=10,
    )  # fmt: skip
    task = task_of(app)
    first = task.delay(0)
    with pytest.raises(SendError, match="not acknowledged within"):
        task.options(wait=True).delay(1)
    # What has failed counts until it is told.
    with pytest.raises(BufferFull, match=r"1\d tasks wait for Kafka at .*buffer_messages_max"):
        send_many(task, 50)
    with pytest.raises(SendError, match=rf"task t \({first.id}\) was not sent to topic 'taskworker'"):
        first.wait(20)
    assert first.id in caplog.text
    app.close()


def test_what_kafka_does_not_acknowledge_in_time_has_failed_though_it_is_connected() -> None:
    # Whoever listens and never answers.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        app = App("a", kafka=address, strict_kwargs="off", delivery_timeout_seconds=0.5)
        failure = task_of(app).delay(1).future.exception(15)
        assert isinstance(failure, SendError)
        assert "Kafka did not acknowledge it within 0.5 s" in str(failure)
        app.close()


def test_what_is_sent_alone_does_not_linger(mock_kafka: str) -> None:
    app = App("a", kafka=mock_kafka, linger_ms=25_000, strict_kwargs="off")
    task = task_of(app)

    def left_at_once(n: int) -> bool:
        left = wait([task.delay(n).future], timeout=2).done
        assert app.flush(10) == 0
        return bool(left)

    # The first waits until it is connected, and any may where others keep librdkafka's thread from running.
    assert any(left_at_once(n) for n in range(6))
    app.close()


def test_what_was_sent_is_flushed_when_its_app_is_closed(slow_kafka: str) -> None:
    app = App("a", kafka=slow_kafka, linger_ms=25_000, strict_kwargs="off")
    task = task_of(app)
    task.delay(1)
    assert app.flush(10) == 0
    on_its_way = task.delay(2)
    time.sleep(0.1)
    lingers = task.delay(3)
    assert not on_its_way.future.done()
    app.close()
    assert [ref.future.exception(0) for ref in (on_its_way, lingers)] == [None, None]


# As librdkafka 2.16 tells of a client that knows no server of Kafka any more.
NO_SERVERS = json.dumps({"brokers": {}})
TRIES_ONE = json.dumps({"brokers": {"k/1": {"source": "learned", "nodeid": 1, "state": "CONNECT"}}})
WAS_NEVER_THERE = json.dumps({"brokers": {"k": {"source": "configured", "nodeid": -1, "state": "INIT"}}})


@pytest.mark.parametrize(
    ("told", "replaced"),
    [
        ([NO_SERVERS] * 3, True),
        ([NO_SERVERS, NO_SERVERS, TRIES_ONE, NO_SERVERS], False),
        ([WAS_NEVER_THERE] * 5, False),
        ([KafkaError(KafkaError._FATAL, "out of order", fatal=True)], True),
        ([KafkaError(KafkaError._ALL_BROKERS_DOWN)], False),
    ],
)
def test_a_producer_that_cannot_go_on_is_followed_by_another(
    mock_kafka: str,
    monkeypatch: pytest.MonkeyPatch,
    told: Sequence[str | KafkaError],
    replaced: bool,
) -> None:
    """Which sends what waits, though nobody asks, and before its time is over."""
    configs = producers(monkeypatch, NOWHERE)
    seconds = 10 if replaced else 4
    app = App("a", kafka=mock_kafka, strict_kwargs="off", delivery_timeout_seconds=seconds)
    task = task_of(app)
    refs = [task.delay(n) for n in range(10)]
    for one in told:
        if isinstance(one, KafkaError):
            configs[0]["error_cb"](one)
        else:
            configs[0]["stats_cb"](one)
    if replaced:
        done, _ = wait([ref.future for ref in refs], timeout=8)
        assert [future.exception() for future in done] == [None] * 10
        assert app.flush(5) == 0
    else:
        assert app.flush(0.3) == 10
    assert len(configs) == 1 + replaced
    app.close()


def test_a_flush_counts_what_moves_to_another_producer(monkeypatch: pytest.MonkeyPatch) -> None:
    """At each step of it: who is told that nothing is left takes all for sent."""
    left: list[int] = []

    class Watched(Producer):
        def purge(self, *what: Any) -> None:
            left.append(transport.flush(0))
            super().purge(*what)
            left.append(transport.flush(0))

        def poll(self, *seconds: Any) -> int:
            served = super().poll(*seconds)
            if left:
                left.append(transport.flush(0))
            return served

    configs = producers(monkeypatch, kind=Watched)
    transport = connect(load_settings({"kafka": f"127.0.0.1:{unused_port()}"}))
    for n in range(10):
        transport.send(Outgoing(f"{n}", "task", "n", "topic", b"x"), Future())
    configs[0]["error_cb"](KafkaError(KafkaError._FATAL, "out of order", fatal=True))
    deadline = time.monotonic() + 10
    while len(left) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    # It may count what else a producer has to say.
    assert len(left) >= 5
    assert min(left) >= 10, left
    transport.close()


def test_what_is_sent_again_goes_where_it_was(slow_kafka: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be there already: of what has no key brokers know an id again within its partition only."""
    configs = producers(monkeypatch)
    app = App("a", kafka=slow_kafka, strict_kwargs="off", linger_ms=1)
    task = task_of(app)
    task.delay(0).wait(20)
    refs = []
    for n in range(20):
        refs.append(task.delay(n))
        time.sleep(0.015)  # another partition is chosen
    configs[0]["error_cb"](KafkaError(KafkaError._FATAL, "out of order", fatal=True))
    done, _ = wait([ref.future for ref in refs], timeout=20)
    assert [future.exception() for future in done] == [None] * 20
    consumer = Consumer({"bootstrap.servers": slow_kafka, "group.id": "g"})
    consumer.assign([TopicPartition("taskworker", partition, 0) for partition in range(4)])
    found: dict[str, list[int | None]] = {}
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and (len(found) < 21 or max(map(len, found.values())) < 2):
        for message in consumer.consume(100, 0.5):
            id = activation_pb2.TaskActivation.FromString(message.value() or b"").id
            found.setdefault(id, []).append(message.partition())
    consumer.close()
    assert any(len(partitions) == 2 for partitions in found.values()), "none was on its way"
    assert all(len(set(partitions)) == 1 for partitions in found.values())
    app.close()


def test_what_another_producer_refuses_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(Producer):
        def produce(self, *message: Any, **more: Any) -> None:
            if len(configs) > 1:
                raise KafkaException(KafkaError(KafkaError._UNKNOWN_PARTITION, "no such partition"))
            super().produce(*message, **more)

    configs = producers(monkeypatch, kind=Refusing)
    app = App("a", kafka=f"127.0.0.1:{unused_port()}", strict_kwargs="off")
    task = task_of(app)
    futures = [task.delay(n).future for n in range(3)]
    configs[0]["error_cb"](KafkaError(KafkaError._FATAL, "out of order", fatal=True))
    done, _ = wait(futures, timeout=8)
    assert len(done) == 3
    assert all("was refused: no such partition" in str(future.exception()) for future in futures)
    assert app.flush(1) == 0
    app.close()


def test_while_no_other_producer_can_be_made_sends_end_in_time(
    mock_kafka: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_thread = KafkaException(KafkaError(KafkaError._CRIT_SYS_RESOURCE, "no thread"))
    configs = producers(monkeypatch, NOWHERE, no_thread)
    app = App("a", kafka=mock_kafka, strict_kwargs="off", delivery_timeout_seconds=0.5)
    task = task_of(app)
    task.delay(0)
    configs[0]["error_cb"](KafkaError(KafkaError._FATAL, "out of order", fatal=True))
    refused = task.delay(1).future
    assert wait([refused], timeout=5).done
    assert isinstance(refused.exception(), SendError)
    time.sleep(1)  # it is tried again
    assert task.delay(2).future.exception(10) is None
    app.close()


def test_a_handler_of_a_signal_may_send_while_something_is_sent(
    mock_kafka: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    handlers: list[Callable[[], object]] = []

    class Interrupted(Producer):
        def produce(self, *message: Any, **more: Any) -> None:
            if handlers:
                handlers.pop()()
            super().produce(*message, **more)

    monkeypatch.setattr("penstock_client.transports.kafka.Producer", Interrupted)
    app = App("a", kafka=mock_kafka, strict_kwargs="off")
    task = task_of(app)
    by_handler: list[TaskRef] = []
    handlers.append(lambda: by_handler.append(task.delay(2)))
    task.delay(1).wait(20)
    by_handler[0].wait(20)
    app.close()


def test_a_handler_of_a_signal_that_sends_while_the_first_task_is_sent_is_told_so(
    mock_kafka: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = App("a", kafka=mock_kafka, strict_kwargs="off")
    task = task_of(app)
    told: list[str] = []

    def handler(*_: object) -> None:
        try:
            task.delay(2)
        except SendError as error:
            told.append(str(error))

    def interrupted(settings: ClientSettings) -> Transport:
        signal.raise_signal(signal.SIGUSR1)
        return connect(settings)

    monkeypatch.setattr("penstock_client.app.connect", interrupted)
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        task.delay(1).wait(20)
        assert len(told) == 1
        assert "app.transport" in told[0]
        signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(told) == 1
    assert app.flush(20) == 0
    app.close()


def test_nothing_says_where_tasks_go() -> None:
    with pytest.raises(ConfigError, match=r"PENSTOCK_KAFKA for Kafka,.* or PENSTOCK_BROKER"):
        task_of(App("a", strict_kwargs="off")).delay(1)


@pytest.mark.parametrize("settings", [{"linger_ms": 1e9}, {"delivery_timeout_seconds": 1e9}])
def test_settings_that_the_producer_refuses_are_named(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"refuses these settings: .*outside allowed range"):
        connect(load_settings({"kafka": "127.0.0.1:1", **settings}))


def test_a_delivery_timeout_is_never_without_bound() -> None:
    settings = load_settings({"kafka": "127.0.0.1:1", "delivery_timeout_seconds": 0.0005, "linger_ms": 0})
    transport, future = connect(settings), Future[None]()
    transport.send(Outgoing("id", "task", "n", "topic", b"x"), future)
    assert isinstance(future.exception(10), SendError)
    transport.close()


def test_what_was_sent_is_flushed_at_the_exit(mock_kafka: str) -> None:
    code = (
        "import sys; from penstock_client import App\n"
        f"app = App('a', kafka='{mock_kafka}', linger_ms=300, strict_kwargs='off')\n"
        "task = app.namespace('n').task(name='t', retry=None)(lambda: None)\n"
        "task.delay().future.add_done_callback(lambda f: sys.stderr.write(f'told {f.exception()}'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    # On a slow machine it says first that it waits.
    waiting = r"(waiting up to 30 s for 1 tasks of a to be acknowledged\n)?"
    assert re.fullmatch(waiting + "told None", done.stderr)


def test_a_forked_child_connects_anew(mock_kafka: str) -> None:
    code = (
        "import os, sys; from penstock_client import App\n"
        f"app = App('a', kafka='{mock_kafka}', strict_kwargs='off')\n"
        "task = app.namespace('n').task(name='t', retry=None)(lambda: None)\n"
        "task.delay().wait(20)\n"
        "child = os.fork()\n"
        "task.delay().wait(20)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) if child else 7)\n"
    )
    # The child leaves as any program does, with all its clean-up: 7 is what it has to say.
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], timeout=50, check=False)
    assert done.returncode == 7


def test_a_child_that_is_forked_while_another_thread_connects_sends(mock_kafka: str) -> None:
    code = (
        "import os, signal, sys, threading, time, penstock_client.app; from penstock_client import App\n"
        f"app = App('a', kafka='{mock_kafka}', strict_kwargs='off')\n"
        "task = app.namespace('n').task(name='t', retry=None)(lambda: None)\n"
        "connect, connects = penstock_client.app.connect, threading.Event()\n"
        "def slowly(settings):\n"
        "    connects.set()\n"
        "    time.sleep(0.5)\n"
        "    return connect(settings)\n"
        "penstock_client.app.connect = slowly\n"
        "first = threading.Thread(target=task.delay)\n"
        "first.start()\n"
        "connects.wait()\n"
        "child = os.fork()\n"
        "child or signal.alarm(12)\n"
        "task.delay().wait(20)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) if child else 7)\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], timeout=50, check=False)
    assert done.returncode == 7


class BrokerDouble(grpc.GenericRpcHandler):
    """The other side of SendTasks: fails as told, then answers."""

    def __init__(self) -> None:
        self.failures: list[grpc.StatusCode] = []
        self.room = 1_000_000
        self.too_large: set[str] = set()
        self.requests: list[producer_pb2.SendTasksRequest] = []
        self.signatures: list[bool] = []
        self.answer: bytes | None = None

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        return grpc.unary_unary_rpc_method_handler(self._send) if details.method == METHOD else None

    def _send(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        if self.failures:
            context.abort(self.failures.pop(0), "as told")
        given = dict(context.invocation_metadata()).get(signature.HEADER, "")
        self.signatures.append(signature.verify(["secret"], METHOD, request, str(given)))
        parsed = producer_pb2.SendTasksRequest.FromString(request)
        ids = {activation.id for activation in parsed.activations}
        if len(ids) > self.room or ids & self.too_large:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "no room")
        self.requests.append(parsed)
        self.room -= len(ids)
        if self.answer is not None:
            return self.answer
        answers = []
        for activation in parsed.activations:
            rejected = activation.headers.get("bad") == "yes"
            result = producer_pb2.SEND_RESULT_REJECTED if rejected else producer_pb2.SEND_RESULT_ACCEPTED
            answers.append(producer_pb2.SendAnswer(result=result, reason="it is bad" if rejected else ""))
        return producer_pb2.SendTasksResponse(answers=answers).SerializeToString()


@pytest.fixture
def broker() -> Iterator[tuple[BrokerDouble, str]]:
    double, server = BrokerDouble(), grpc.server(ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((double,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield double, f"127.0.0.1:{port}"
    server.stop(None).wait()


def test_straight_to_a_broker(broker: tuple[BrokerDouble, str]) -> None:
    double, address = broker
    app = App("a", broker=address, grpc_shared_secret="secret", strict_kwargs="off")
    task = task_of(app)
    task.delay(0).wait(10)
    refs = [task.delay(n) for n in range(300)]
    refused = task.options(headers={"bad": "yes"}).delay(1)
    assert app.flush(10) == 0
    assert all(ref.future.exception() is None for ref in refs)
    with pytest.raises(SendError, match="the broker refused it: it is bad"):
        refused.wait(1)
    assert all(double.signatures)
    # Many tasks share a call.
    assert len(double.requests) < 100
    app.close()


def test_a_broker_that_restarts_is_tried_again_under_the_same_id(broker: tuple[BrokerDouble, str]) -> None:
    double, address = broker
    double.failures = [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED]
    app = App("a", broker=address, strict_kwargs="off")
    ref = task_of(app).delay(1).wait(10)
    assert [a.id for request in double.requests for a in request.activations] == [ref.id]
    double.failures = [grpc.StatusCode.UNAUTHENTICATED]
    with pytest.raises(SendError, match="unauthenticated: as told"):
        task_of(app).delay(1).wait(10)
    app.close()


def test_of_a_batch_that_is_too_large_is_sent_what_fits(broker: tuple[BrokerDouble, str]) -> None:
    """Also beside one that does not fit alone; and when there is room again, all."""
    double, address = broker
    double.room = 0
    app = App("a", broker=address, strict_kwargs="off", delivery_timeout_seconds=10)
    task = task_of(app)
    refs = [task.delay(n) for n in range(300)]
    double.too_large = {refs[0].id}
    double.room = 200
    deadline = time.monotonic() + 8
    while double.room and time.monotonic() < deadline:
        time.sleep(0.01)
    assert double.room == 0
    assert sum(len(request.activations) for request in double.requests) == 200
    double.room, double.too_large = 1_000_000, set()
    assert app.flush(8) == 0
    assert all(ref.future.exception() is None for ref in refs)
    # Batches grow again.
    assert max(len(request.activations) for request in double.requests[-4:]) > 8
    app.close()


def test_a_broker_that_is_not_there_fails_the_future_in_time() -> None:
    address = f"127.0.0.1:{unused_port()}"
    app = App("a", broker=address, strict_kwargs="off", delivery_timeout_seconds=0.5)
    with pytest.raises(SendError, match=rf"was not sent to the broker at {address}: unavailable"):
        task_of(app).delay(1).wait(20)
    app.close()


def test_what_waits_for_a_broker_is_bounded() -> None:
    address = f"127.0.0.1:{unused_port()}"
    app = App("a", broker=address, strict_kwargs="off", send_timeout_seconds=0.1, buffer_messages_max=10)
    task = task_of(app)
    refs = [task.delay(n) for n in range(10)]
    with pytest.raises(BufferFull, match=rf"10 tasks wait for the broker at {address}; buffer_messages_max"):
        task.delay(10)
    assert app.flush(0) == 10
    app.transport.close()
    assert all(ref.future.exception(10) for ref in refs)


def test_a_handler_of_a_signal_may_send_at_any_moment(broker: tuple[BrokerDouble, str]) -> None:
    app = App("a", broker=broker[1], strict_kwargs="off")
    task = task_of(app)
    task.delay(0).wait(10)
    by_handler: list[TaskRef] = []

    def interrupt(frame: object, event: str, what: object) -> None:
        """Where Python would call the handler: as a function begins, or is left."""
        if event in ("call", "return"):
            by_handler.append(task.delay(2))

    sys.setprofile(interrupt)
    try:
        sent = task.delay(1)
    finally:
        sys.setprofile(None)
    for ref in (sent, *by_handler):
        ref.wait(10)
    app.close()


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"\xff", "what answered there is no broker"),
        (b"", "the broker's answer does not mention it"),
        (producer_pb2.SendTasksResponse(answers=[{}]).SerializeToString(), "the broker refused it"),
    ],
    ids=["garbage", "too short", "unspecified"],
)
def test_an_answer_that_makes_no_sense_is_no_acknowledgement(
    broker: tuple[BrokerDouble, str], answer: bytes, why: str
) -> None:
    double, address = broker
    double.answer = answer
    app = App("a", broker=address, strict_kwargs="off")
    task = task_of(app)
    with pytest.raises(SendError, match=why):
        task.delay(1).wait(10)
    double.answer = None
    task.delay(2).wait(10)
    app.close()


def test_a_task_that_is_there_already_counts_as_sent(broker: tuple[BrokerDouble, str]) -> None:
    double, address = broker
    double.answer = producer_pb2.SendTasksResponse(
        answers=[producer_pb2.SendAnswer(result=producer_pb2.SEND_RESULT_DUPLICATE)]
    ).SerializeToString()
    app = App("a", broker=address, strict_kwargs="off")
    task_of(app).options(task_id="mine").delay(1).wait(10)
    app.close()


@pytest.mark.parametrize("way", ["kafka", "broker"])
def test_a_future_on_its_way_cannot_be_cancelled(
    mock_kafka: str, broker: tuple[BrokerDouble, str], way: str
) -> None:
    address = mock_kafka if way == "kafka" else broker[1]
    app = App("a", strict_kwargs="off", **{way: address})  # type: ignore[arg-type]
    task = task_of(app)
    first = task.delay(1)
    assert not first.future.cancel()
    first.wait(20)
    task.delay(2).wait(20)
    app.close()
    with pytest.raises(SendError, match="the client was closed"):
        task.delay(3)
