"""Declaring and sending: the rules one by one."""

from __future__ import annotations

import asyncio
import decimal
import logging
import queue
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import penstock_client
from penstock_client import (
    App,
    AppError,
    ArgumentsMismatch,
    Call,
    Exponential,
    Fixed,
    MemoryTransport,
    PayloadError,
    Retry,
    SendError,
    TaskContext,
    Verdict,
    current_task,
    instrumented_task,
    retry,
)
from penstock_client.transports import Outgoing
from penstock_protocol.payload import decode_parameters
from penstock_protocol.v1 import activation_pb2 as pb


@pytest.fixture
def sent() -> MemoryTransport:
    return MemoryTransport()


@pytest.fixture
def app(sent: MemoryTransport) -> App:
    return App("shop", transport=sent, strict_kwargs="off", queues=("mail",))


def last(sent: MemoryTransport) -> pb.TaskActivation:
    return sent.activations()[-1]


PUBLIC = """
    App AppError ArgumentsMismatch Backoff BufferFull Call ConfigError Exponential Fixed MemoryTransport
    Namespace PayloadError Retry RetryRequested SendError Task TaskContext TaskRef Verdict current_task
    instrumented_task retry
"""


def test_public_names() -> None:
    assert penstock_client.__all__ == PUBLIC.split(), "others depend on these: a change is a release note"
    assert {name for name in penstock_client.__all__ if not hasattr(penstock_client, name)} == set()


def test_importing_costs_no_transport() -> None:
    heavy = "{'asyncio', 'confluent_kafka', 'grpc', 'typer', 'pydantic', 'yaml', 'zstandard'}"
    code = f"import sys, penstock_client; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_an_activation_says_all_that_a_broker_must_know(app: App, sent: MemoryTransport) -> None:
    pay = app.namespace(
        "payments", retry=Retry(max_attempts=5, backoff=Exponential(2, jitter=0)), expires="1h"
    )

    @pay.task(name="payments.charge", deadline=45)
    def charge(order_id: int, *, coupon: str | None = None) -> None: ...

    ref = charge.delay(7, coupon="X")
    ref.wait(1)
    activation = last(sent)
    assert activation.id == ref.id == sent.messages[0].id
    assert (activation.application, activation.namespace) == ("shop", "payments")
    assert activation.taskname == "payments.charge"
    assert activation.processing_deadline_duration == 45
    assert activation.expires == 3600
    assert not activation.HasField("delay")
    state = activation.retry_state
    assert (state.attempts, state.max_attempts, state.delay_on_retry) == (0, 5, 2)
    assert state.on_attempts_exceeded == pb.ON_ATTEMPTS_EXCEEDED_DEADLETTER
    assert decode_parameters(activation) == ([7], {"coupon": "X"})
    age = datetime.now(UTC) - activation.received_at.ToDatetime(tzinfo=UTC)
    assert timedelta(0) <= age < timedelta(seconds=5)
    # Sent once under an id of its own: no key, so that partitions fill evenly.
    assert sent.messages[0].key is None


@pytest.mark.parametrize("passed", [0.0, 0.25, 1.5, 3.0])
def test_a_moment_given_once_holds_for_each_call(
    app: App, sent: MemoryTransport, monkeypatch: pytest.MonkeyPatch, passed: float
) -> None:
    """Whenever it is: brokers count in whole seconds from when it is sent."""

    @app.namespace("main").task(name="t", retry=None)
    def task() -> None: ...

    began = time.time_ns()
    moment = datetime.fromtimestamp(began // 1_000_000 / 1000, UTC) + timedelta(seconds=2.1)
    later, until = task.options(eta=moment), task.options(expires=moment)
    monkeypatch.setattr(time, "time_ns", lambda: began + int(passed * 1e9))
    later.delay()
    until.delay()
    early, late = sent.activations()
    received_at = early.received_at.ToDatetime(UTC)
    second = timedelta(seconds=1)
    if received_at < moment:
        assert moment <= received_at + early.delay * second < moment + second, "never early"
        assert moment - second < received_at + late.expires * second <= moment, "never after expiry"
    else:
        assert not early.HasField("delay")
        assert (late.expires, late.HasField("expires")) == (0, True), "over at once, not never"


def test_an_expiry_is_rounded_down_to_what_brokers_count_in(app: App, sent: MemoryTransport) -> None:
    namespace = app.namespace("main", retry=None)
    declared = namespace.task(name="declared", expires="1500ms")(lambda: None)
    declared.delay()
    assert last(sent).expires == 1
    declared.options(expires=2.9).delay()
    assert last(sent).expires == 2
    # That would be over at once.
    with pytest.raises(ValueError, match="whole seconds"):
        declared.options(expires=0.5)
    with pytest.raises(ValueError, match="whole seconds"):
        namespace.task(name="never", expires="500ms")(lambda: None)


def test_options_of_a_call(app: App, sent: MemoryTransport) -> None:
    @app.namespace("main").task(name="t", retry=None)
    def task(n: int = 0) -> None: ...

    task.options(countdown=60, headers={"traceparent": "00-a-b-01"}, task_id="mine").delay(1)
    activation, message = last(sent), sent.messages[-1]
    assert (activation.delay, activation.headers["traceparent"]) == (60, "00-a-b-01")
    # An id of the caller's may come twice, and its copies must meet in one partition.
    assert (activation.id, message.key, message.traceparent) == ("mine", "mine", "00-a-b-01")
    task.apply_async((1,), {}, eta=datetime.now(UTC) + timedelta(seconds=30), expires=timedelta(minutes=2))
    assert last(sent).delay in (30, 31)
    assert last(sent).expires == 120
    task.options(expires=0).delay()
    assert last(sent).HasField("expires"), "over at once, not never"
    task.apply_async(kwargs={"n": 3}, countdown=0.2)
    assert last(sent).delay == 1, "rounded up: never early"
    assert decode_parameters(last(sent)) == ([], {"n": 3})
    for wrong, why in (
        ({"countdown": -1}, "negative"),
        ({"countdown": "soon"}, "duration"),
        ({"eta": datetime(2030, 1, 1)}, "time zone"),  # noqa: DTZ001 - that is the mistake
        ({"task_id": ""}, "task_id"),
    ):
        with pytest.raises(ValueError, match=why):
            task.options(**wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="give one"):
        task.options(countdown=1, eta=datetime.now(UTC))
    with pytest.raises(TypeError, match="headers are texts"):
        task.options(headers={"a": 1})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    "word", ["link", "chord", "priority", "rate_limit", "queue", "serializer", "nonsense"]
)
def test_what_cannot_be_honoured_is_refused_and_not_ignored(app: App, word: str) -> None:
    @app.namespace("main").task(name="t", retry=None)
    def task() -> None: ...

    with pytest.raises(TypeError, match=word):
        task.apply_async((), None, **{word: 1})


def test_calling_runs_it_here(app: App, sent: MemoryTransport) -> None:
    @app.namespace("main").task(name="plain", retry=None)
    def plain(a: int, b: int = 2) -> int:
        """Adds."""
        return a + b

    @app.namespace("main").task(name="bound", bind=True, retry=None)
    def bound(ctx: TaskContext, /, a: int) -> tuple[str, int]:
        assert current_task() is ctx
        return ctx.taskname, a

    assert plain(1) == 3
    assert bound(5) == ("bound", 5)
    assert current_task() is None
    assert sent.messages == []
    assert plain.__doc__ == "Adds."
    assert plain.call(1, b=2) == Call("plain", (1,), {"b": 2})


def test_a_task_needs_a_name_and_only_one_may_have_it(app: App) -> None:
    namespace = app.namespace("main")

    def refund() -> None: ...

    with pytest.raises(TypeError, match=r"name='test_tasks\.refund'"):
        namespace.task(retry=None)(refund)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="stable name"):
        namespace.task(refund)  # type: ignore[call-overload]
    namespace.task(name="taken", retry=None)(refund)

    def other() -> None: ...

    with pytest.raises(AppError, match=r"'taken'.*test_tasks\.py:\d+ and .*test_tasks\.py:\d+"):
        namespace.task(name="taken", retry=None)(other)


def test_arguments_are_refused_by_name_and_size(app: App, sent: MemoryTransport) -> None:
    @app.namespace("main").task(name="t", retry=None)
    def task(data: Any) -> None: ...

    with pytest.raises(PayloadError, match=r"task t: argument 0 is of type decimal\.Decimal"):
        task.delay(decimal.Decimal("1.5"))
    with pytest.raises(PayloadError, match=r"payload_bytes_max.*argument 'data' \(2000020 bytes\)"):
        task.delay(data="x" * 2_000_000)
    assert sent.messages == []
    with pytest.warns(UserWarning, match="payload_warn_bytes"):
        task.delay("x" * 100_000)
    activation = last(sent)
    assert activation.headers["compression-type"] == "zstd"
    assert len(activation.parameters_bytes) < 1_000
    assert decode_parameters(activation) == (["x" * 100_000], {})


def test_the_headers_of_a_large_task_may_be_passed_on(app: App, sent: MemoryTransport) -> None:
    @app.namespace("main").task(name="t", retry=None)
    def task(data: Any) -> None: ...

    task.options(headers={"traceparent": "00-a-b-01"}).delay("x" * 50_000)
    assert "compression-type" in last(sent).headers
    task.options(headers=last(sent).headers).delay(1)
    assert last(sent).headers == {"traceparent": "00-a-b-01"}
    assert decode_parameters(last(sent)) == ([1], {})


def test_a_task_without_kwargs_is_warned_of_or_refused() -> None:
    def task(n: int) -> None: ...

    with pytest.warns(UserWarning, match=r"'t'.*no \*\*kwargs"):
        App("a", transport=MemoryTransport()).namespace("n").task(name="t", retry=None)(task)
    strict = App("a", transport=MemoryTransport(), strict_kwargs="error").namespace("n")
    with pytest.raises(TypeError, match=r"Add \*\*kwargs"):
        strict.task(name="t", retry=None)(task)

    def tolerant(n: int, **kwargs: object) -> None: ...

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        strict.task(name="t", retry=None)(tolerant)


def test_arguments_that_do_not_fit_are_found_before_the_call(app: App) -> None:
    @app.namespace("main").task(name="t", bind=True, retry=None)
    def task(ctx: TaskContext, /, a: int, *, b: int = 0) -> None: ...

    task.bind_arguments([1], {"b": 2})
    for args, kwargs in (([], {}), ([1, 2], {}), ([1], {"c": 3})):
        with pytest.raises(ArgumentsMismatch, match=r"do not fit t\(a: "):
            task.bind_arguments(args, kwargs)


def test_a_task_without_a_policy_says_so_once(app: App, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    namespace = app.namespace("main")

    @namespace.task(name="silent", retry=None)
    def silent() -> None: ...

    assert caplog.text == ""

    @namespace.task(name="unsaid")
    def unsaid() -> None: ...

    assert caplog.text.count("unsaid has no retry policy") == 1


def test_queues_and_topics_are_closed_lists(sent: MemoryTransport) -> None:
    app = App("a", transport=sent, strict_kwargs="off", queues=("mail",), topics=("taskworker", "slow"))
    namespace = app.namespace("main")

    @namespace.task(name="t", queue="mail", retry=None)
    def task() -> None: ...

    assert task.namespace == "mail"
    with pytest.raises(AppError, match="'mial' is unknown; did you mean 'mail'"):
        namespace.task(name="u", queue="mial", retry=None)(lambda: None)
    with pytest.raises(AppError, match="did you mean 'slow'"):
        App("a", transport=sent, topics=("taskworker", "slow"), route_overrides={"main": "slwo"})
    with pytest.raises(AppError, match="declared twice"):
        app.namespace("main", deadline=5)
    assert app.namespace("main") is namespace


def test_routes(sent: MemoryTransport) -> None:
    app = App("a", transport=sent, strict_kwargs="off", route_overrides={"reports": "slow"})
    for name in ("reports", "other"):
        app.namespace(name).task(name=name, retry=None)(lambda: None).delay()
    assert [message.topic for message in sent.messages] == ["slow", "taskworker"]


def test_sending_by_name(app: App, sent: MemoryTransport) -> None:
    app.send_task("far.away", args=(7,), queue="mail", countdown=5, retry=Retry(max_attempts=2))
    activation = last(sent)
    assert (activation.taskname, activation.namespace, activation.delay) == ("far.away", "mail", 5)
    assert activation.retry_state.max_attempts == 2
    assert decode_parameters(activation) == ([7], {})
    with pytest.raises(AppError, match="'mial' is unknown"):
        app.send_task("far.away", queue="mial")

    @app.namespace("main").task(name="near", retry=Retry(max_attempts=3))
    def near(n: int) -> None: ...

    app.namespace("second")
    app.send_task("near", args=(1,))
    assert (last(sent).namespace, last(sent).retry_state.max_attempts) == ("main", 3)
    with pytest.raises(AppError, match="say which with queue="):
        app.send_task("unknown")


def test_imports_are_loaded_and_failures_name_module_and_cause(tmp_path: Path, sent: MemoryTransport) -> None:
    with pytest.raises(AppError, match=r"'no_such_module' of App\(imports=.*No module named"):
        App("a", transport=sent, imports=["no_such_module"]).load()
    App("a", transport=sent, imports=["json"]).load()
    with pytest.raises(AppError, match="did you mean 'linger_ms'"):
        App("a", transport=sent, linger=3)
    with pytest.raises(AppError, match="needs a name"):
        App("", transport=sent)


# -- retries


class Transient(Exception): ...


class Permanent(Transient): ...


def test_words_of_a_policy_have_their_order() -> None:
    policy = Retry(3, on=(Transient,), exclude=(Permanent,), ignore=(KeyError,))
    assert policy.classify(Transient()) is Verdict.RETRY
    assert policy.classify(Permanent()) is Verdict.FAIL
    assert policy.classify(KeyError()) is Verdict.IGNORE
    assert policy.classify(ValueError()) is Verdict.FAIL
    assert Retry(3, on=Transient, ignore=Transient).classify(Permanent()) is Verdict.IGNORE  # type: ignore[arg-type]
    assert Retry(3).classify(ValueError()) is Verdict.RETRY
    assert Retry(3).classify(SystemExit()) is Verdict.FAIL


def test_backoffs() -> None:
    assert [Fixed(3).seconds(n) for n in (1, 2, 9)] == [3, 3, 3]
    growing = Exponential(2, cap=15, jitter=0)
    assert [growing.seconds(n) for n in (1, 2, 3, 4, 10**9)] == [2, 4, 8, 15, 15]
    spread = {Exponential(10, jitter=0.5).seconds(1) for _ in range(100)}
    assert len(spread) > 50
    assert all(5 <= wait <= 10 for wait in spread)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Retry(0),
        lambda: Retry(True),
        lambda: Retry(2, on_exceeded="explode"),  # type: ignore[arg-type]
        lambda: Retry(2, on=("ValueError",)),  # type: ignore[arg-type]
        lambda: Retry(2**40),
        lambda: Retry(2, backoff=5),  # type: ignore[arg-type]
        lambda: Fixed(-1),
        lambda: Fixed(float("inf")),
        lambda: Exponential(cap=1e30),
        lambda: Exponential(factor=0.5),
        lambda: Exponential(jitter=2),
    ],
)
def test_policies_that_make_no_sense_are_refused(wrong: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        wrong()


def test_words_of_celery(app: App, sent: MemoryTransport) -> None:
    namespace = app.namespace("main", retry=Retry(max_attempts=9))

    @namespace.task(name="a", max_retries=4, default_retry_delay=30)
    def a() -> None: ...

    assert a.retry == Retry(max_attempts=5, backoff=Fixed(30))

    @namespace.task(name="b", autoretry_for=(OSError,), retry_backoff=True)
    def b() -> None: ...

    assert b.retry is not None
    assert (b.retry.max_attempts, b.retry.on) == (4, (OSError,))
    assert isinstance(b.retry.backoff, Exponential)
    with pytest.raises(TypeError, match="give one"):
        namespace.task(name="c", retry=None, max_retries=3)(lambda: None)
    a.delay()
    assert (last(sent).retry_state.max_attempts, last(sent).retry_state.delay_on_retry) == (5, 30)


def test_declarations_as_sentry_writes_them(app: App) -> None:
    namespace = app.namespace("main")

    @instrumented_task("mail.send", namespace, max_retries=2, default_retry_delay=5)
    @retry(on=(OSError,), exclude=(ConnectionError,), ignore=(KeyError,))
    def send(to: str) -> None: ...

    assert send.retry == Retry(3, Fixed(5), on=(OSError,), exclude=(ConnectionError,), ignore=(KeyError,))

    @instrumented_task("mail.bare", app=app, queue="mail", processing_deadline_duration=90)
    @retry
    def bare(to: str) -> None: ...

    assert bare.retry is not None
    assert bare.retry.on == (Exception,)
    assert bare.retry.max_attempts > 1
    assert (bare.namespace, bare.deadline_seconds) == ("mail", 90)
    with pytest.raises(TypeError, match="stands below"):
        retry(send)
    with pytest.raises(TypeError, match="needs namespace="):
        instrumented_task("x")


def test_at_most_once_and_retries_exclude_each_other(app: App, sent: MemoryTransport) -> None:
    namespace = app.namespace("main")
    once = namespace.task(name="once", at_most_once=True)(lambda: None)
    once.delay()
    assert last(sent).retry_state.at_most_once
    with pytest.raises(AppError, match="at_most_once"):
        namespace.task(name="twice", at_most_once=True, retry=Retry(2))(lambda: None)


def test_a_discarding_policy_is_told_to_the_broker(app: App, sent: MemoryTransport) -> None:
    app.namespace("main").task(name="t", retry=Retry(2, on_exceeded="discard"))(lambda: None).delay()
    assert last(sent).retry_state.on_attempts_exceeded == pb.ON_ATTEMPTS_EXCEEDED_DISCARD


@pytest.mark.parametrize(("wait", "told"), [(0.2, 1), (1.5, 2), (3, 3)])
def test_a_wait_that_a_broker_adds_is_rounded_up(
    app: App, sent: MemoryTransport, wait: float, told: int
) -> None:
    """It adds it where no worker says how long: after a child was lost."""
    app.namespace("main").task(name="t", retry=Retry(2, backoff=Fixed(wait)))(lambda: None).delay()
    assert last(sent).retry_state.delay_on_retry == told


# -- what becomes of it


class Slow:
    """A transport that never answers, and takes tasks only while it is open."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.futures: queue.Queue[Future[None]] = queue.Queue()

    def send(self, message: Outgoing, future: Future[None]) -> None:
        assert self.open.wait(10)
        self.futures.put(future)

    def flush(self, seconds: float) -> int:
        return 1

    def close(self) -> None: ...


async def test_waiting_is_bounded_and_failures_reach_the_caller() -> None:
    transport = Slow()
    app = App("a", transport=transport, strict_kwargs="off", send_timeout_seconds=0.05)
    task = app.namespace("main").task(name="t", retry=None)(lambda: None)
    with pytest.raises(SendError, match=r"was not acknowledged within 0\.05 s; it is still being tried"):
        task.options(wait=True).delay()
    transport.futures.get_nowait()
    sending = asyncio.ensure_future(task.delay_async())
    (await asyncio.to_thread(transport.futures.get, timeout=10)).set_exception(SendError("refused"))
    with pytest.raises(SendError, match="refused"):
        await sending
    assert app.flush() == 1


async def test_a_transport_that_blocks_does_not_block_the_event_loop() -> None:
    transport = Slow()
    transport.open.clear()
    app = App("a", transport=transport, strict_kwargs="off")
    sending = asyncio.ensure_future(
        app.namespace("main").task(name="t", retry=None)(lambda: None).delay_async()
    )
    await asyncio.sleep(0)
    transport.open.set()
    (await asyncio.to_thread(transport.futures.get, timeout=10)).set_result(None)
    assert (await sending).taskname == "t"


async def test_who_stops_waiting_does_not_disturb_the_transport() -> None:
    transport = Slow()
    task = (
        App("a", transport=transport, strict_kwargs="off")
        .namespace("main")
        .task(name="t", retry=None)(lambda: None)
    )
    sending = asyncio.ensure_future(task.delay_async())
    future = await asyncio.to_thread(transport.futures.get, timeout=10)
    await asyncio.sleep(0)
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    # A cancelled future would raise here, in the thread that collects acknowledgements.
    future.set_result(None)


def test_the_limit_of_arguments_holds_without_a_warning(sent: MemoryTransport) -> None:
    app = App("a", transport=sent, strict_kwargs="off", payload_warn_bytes=10**9, payload_bytes_max=100)
    task = app.namespace("main").task(name="t", retry=None)(lambda text: None)
    with pytest.raises(PayloadError, match=r"payload_bytes_max \(100\)"):
        task.delay("x" * 200)
    assert not sent.messages


def test_a_task_sent_by_name_has_what_its_namespace_says(sent: MemoryTransport) -> None:
    app = App("a", transport=sent, strict_kwargs="off")
    pay = app.namespace("pay", retry=Retry(max_attempts=5), deadline="90s", expires="1h")
    pay.task(name="pay.here", retry=None)(lambda: None)
    app.namespace("other")
    app.send_task("pay.there", queue="pay")
    activation = last(sent)
    assert activation.retry_state.max_attempts == 5
    assert (activation.processing_deadline_duration, activation.expires) == (90, 3600)
    app.send_task("pay.there", queue="pay", retry=None, deadline=0.5)
    assert (last(sent).retry_state.max_attempts, last(sent).processing_deadline_duration) == (1, 1)
    app.send_task("pay.here", queue="pay")
    for options in ({"queue": "other"}, {"deadline": 5}, {"retry": Retry(max_attempts=2)}):
        with pytest.raises(TypeError, match="its declaration fixes"):
            app.send_task("pay.here", **options)


def test_a_task_sent_by_name_runs_at_most_once_where_its_namespace_says_so(sent: MemoryTransport) -> None:
    app = App("a", transport=sent, strict_kwargs="off")
    app.namespace("pay", at_most_once=True)
    app.namespace("mail")
    app.send_task("pay.there", queue="pay")
    assert last(sent).retry_state.at_most_once
    app.send_task("mail.there", queue="mail")
    assert not last(sent).retry_state.at_most_once


def test_a_topic_that_is_not_listed_is_found_when_its_namespace_is_declared(sent: MemoryTransport) -> None:
    app = App("a", transport=sent, topics=["taskwork"], strict_kwargs="off")
    with pytest.raises(AppError, match=r"'taskworker' is unknown; did you mean 'taskwork'"):
        app.namespace("main")


def test_types_reach_the_call_site(tmp_path: Path) -> None:
    """mypy sees through the decorators."""
    source = tmp_path / "typed.py"
    source.write_text(
        "from penstock_client import App, TaskContext, instrumented_task, retry\n"
        "ns = App('x').namespace('a')\n"
        "@ns.task(name='a.b')\n"
        "def plain(x: int, *, coupon: str | None = None) -> str: return ''\n"
        "@ns.task(name='a.c', bind=True)\n"
        "def bound(ctx: TaskContext, /, x: int, **kwargs: object) -> None: ...\n"
        "@ns.task(name='a.d', bind=True)\n"
        "def loose(ctx: TaskContext, x: int, **kwargs: object) -> None: ...\n"
        "@instrumented_task('a.e', ns)\n"
        "@retry(on=(ValueError,))\n"
        "def stacked(x: int) -> None: ...\n"
        "plain.delay(1, coupon='X'); bound.delay(1); loose.delay(1); stacked.delay(1)\n"
        "plain.delay('1')  # wrong\n"
        "plain.delay(1, coupon=2)  # wrong\n"
        "bound.delay('1')  # wrong\n"
        "stacked.delay('1')  # wrong\n"
        "plain.options(countdown=3).delay('1')  # wrong\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), str(source)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    wrong = [n for n, line in enumerate(source.read_text().splitlines(), 1) if line.endswith("# wrong")]
    assert [int(line.split(":")[1]) for line in done.stdout.splitlines() if ": error:" in line] == wrong, (
        done.stdout
    )


def _generator() -> Iterator[int]:
    yield 1


async def _asynchronous_generator() -> AsyncIterator[int]:
    yield 1


@pytest.mark.parametrize(
    ("fn", "options", "part"),
    [
        (_generator, {}, "is a generator"),
        (_asynchronous_generator, {}, "is a generator"),
        (lambda: None, {"bind": True}, "no place for the context"),
        (lambda **kwargs: None, {"bind": True}, "no place for the context"),
        (lambda: None, {"retry": 3}, "takes Retry"),
    ],
)
def test_declarations_that_cannot_work_are_refused(
    app: App, fn: Callable[..., Any], options: dict[str, Any], part: str
) -> None:
    with pytest.raises(TypeError, match=part):
        app.namespace("refused").task(name="refused", **options)(fn)
    assert "refused" not in app.tasks


def test_arguments_that_are_no_list_or_have_no_name_are_refused(app: App, sent: MemoryTransport) -> None:
    task = app.namespace("n").task(name="anything", retry=None)(lambda *args, **kwargs: None)
    with pytest.raises(TypeError, match="takes a list or a tuple"):
        task.apply_async("abc")
    with pytest.raises(PayloadError, match="names must be str"):
        task.apply_async((), {1: 2})  # type: ignore[dict-item]
