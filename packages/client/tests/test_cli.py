"""The command ``penstock`` against a real broker that takes tasks over gRPC."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from confluent_kafka import Producer

from penstock_client import App, Fixed, Retry
from penstock_client.cli import commands, output
from penstock_client.cli.failures import NOT_CONFIRMED, NOT_FOUND, UNREACHABLE, USAGE, WRONG
from penstock_client.cli.letters import Letter, TopicLetters
from penstock_protocol import signature
from penstock_protocol.v1 import consumer_pb2 as pb
from penstock_protocol.v1.activation_pb2 import TaskActivation

grpc = pytest.importorskip("grpc")

SECRET = "cli-secret"


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Penstock:
    """The command in this process, told of one broker; and what a worker would do."""

    def __init__(self, address: str, capture: Callable[[], tuple[str, str]]) -> None:
        self.address = address
        self._capture = capture

    def __call__(self, *arguments: str) -> Ran:
        self._capture()
        was, sys.argv = sys.argv, ["penstock", *arguments]
        try:
            commands.main()
            code: Any = 0
        except SystemExit as left:
            code = left.code or 0
        finally:
            sys.argv = was
        out, err = self._capture()
        assert "Traceback" not in err
        return Ran(code, out, err)

    def json(self, *arguments: str) -> Any:
        ran = self(*arguments, "-o", "json")
        assert ran.code == 0, ran.err
        return ran.json

    def fetch(self, n: int = 1, worker: str = "w1", namespace: str = "main") -> list[pb.ClaimedTask]:
        identity = pb.WorkerIdentity(worker_id=worker, hostname="here", pid=7, version="1", slots=2)
        request = pb.GetTasksRequest(
            application="shop", namespaces=[namespace], max_tasks=n, wait_ms=10_000, worker=identity
        )
        return list(self._call("GetTasks", request, pb.GetTasksResponse).tasks)

    def report(self, task: pb.ClaimedTask, status: Any, message: str = "it broke") -> None:
        error = pb.ErrorSummary(type="builtins.ValueError", message=message, traceback="the\ntraceback")
        outcome = pb.TaskOutcome(claim_token=task.claim_token, status=status, error=error)
        request = pb.SetTaskStatusesRequest(outcomes=[outcome])
        answer = self._call("SetTaskStatuses", request, pb.SetTaskStatusesResponse)
        assert list(answer.answers) == [pb.OUTCOME_ANSWER_APPLIED]

    def extend(self, task: pb.ClaimedTask, worker: str = "w1") -> int:
        held = pb.HeldClaim(claim_token=task.claim_token, started=True)
        request = pb.ExtendClaimsRequest(claims=[held], worker_id=worker)
        return int(self._call("ExtendClaims", request, pb.ExtendClaimsResponse).answers[0])

    def _call(self, method: str, request: Any, answer: Any) -> Any:
        path, body = f"/penstock.v1.ConsumerService/{method}", request.SerializeToString()
        with grpc.insecure_channel(self.address) as channel:
            metadata = ((signature.HEADER, signature.sign(SECRET, path, body)),)
            return answer.FromString(channel.unary_unary(path)(body, timeout=20, metadata=metadata))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A broker's address."""
    folder, port = tmp_path_factory.mktemp("broker"), free_port()
    log = folder / "log"
    arguments = ["--ingest", "grpc", "--grpc-port", str(port), "--db-path", str(folder / "b.sqlite")]
    environment = {**os.environ, "TASKBROKER_METRICS_PORT": "0", "TASKBROKER_GRPC_SHARED_SECRET": SECRET}
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "penstock_broker", "serve", *arguments],
            env=environment, cwd=folder, stdout=file, stderr=file,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 40
        while "serving" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def penstock(broker: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Penstock:
    monkeypatch.setenv("PENSTOCK_RPC_HOST_LIST", broker)
    monkeypatch.setenv("TASKBROKER_GRPC_SHARED_SECRET", SECRET)
    monkeypatch.setenv("COLUMNS", "200")
    return Penstock(broker, lambda: tuple(capsys.readouterr()))  # type: ignore[arg-type, return-value]


@pytest.fixture
def shop(broker: str) -> Iterator[App]:
    app = App("shop", broker=broker, grpc_shared_secret=SECRET, strict_kwargs="off")
    for name in ("main", "other", "alone"):
        namespace = app.namespace(name, retry=Retry(max_attempts=2, backoff=Fixed(60)))

        @namespace.task(name=f"{name}.work")
        def work(n: int = 0) -> None: ...

        @namespace.task(name=f"{name}.once", retry=None)
        def once(n: int = 0) -> None: ...

    yield app
    app.close()


def send(app: App, name: str, **options: Any) -> str:
    reference = app.tasks[name].options(**options).delay(7)
    assert app.flush() == 0
    return reference.id


def die(penstock: Penstock, app: App, n: int = 1) -> list[str]:
    """Tasks that become dead letters in the broker's store."""
    ids = [send(app, "alone.once") for _ in range(n)]
    while len([letter for letter in penstock.json("dlq", "ls") if letter["id"] in ids]) < n:
        for task in penstock.fetch(n, namespace="alone"):
            penstock.report(task, pb.TASK_OUTCOME_STATUS_FAILURE)
    return ids


def test_status_in_words_and_as_json(penstock: Penstock, shop: App) -> None:
    id = send(shop, "main.work")
    shown = penstock("status", "--sample", "0.2")
    assert shown.code == 0
    assert "healthy" in shown.out
    assert "they balance" in shown.out
    (status,) = penstock.json("status", "--sample", "0")
    assert status["healthy"] is True
    assert status["states"]["pending"] >= 1
    assert status["books_difference"] == 0
    assert status["kafka"] is None
    penstock("tasks", "cancel", id)


def test_tasks_are_listed_shown_explained_and_cancelled(penstock: Penstock, shop: App) -> None:
    id = send(shop, "other.work", headers={"who": "me"})
    (listed,) = penstock.json("tasks", "ls", "--namespace", "other")
    assert (listed["id"], listed["state"], listed["taskname"]) == (id, "pending", "other.work")
    table = penstock("tasks", "ls", "-n", "other").out.splitlines()
    assert table[0].split()[:4] == ["ID", "NAMESPACE", "TASK", "STATE"]
    assert table[1].split()[:4] == [id, "shop/other", "other.work", "pending"]
    shown = penstock("tasks", "show", id)
    assert re.search(r"taskname +other.work", shown.out)
    assert "args" not in shown.out, "arguments only when asked for"
    assert penstock.json("tasks", "show", id, "--arguments")["arguments"]["args"] == "[7]"
    explained = penstock("explain", id)
    assert explained.code == 0
    assert "it is the next of its namespace" in explained.out
    cancelled = penstock("tasks", "cancel", id)
    assert (cancelled.code, "1 cancelled" in cancelled.out) == (0, True)
    again = penstock("tasks", "cancel", id)
    assert again.code == NOT_FOUND
    assert "finished" in again.err
    assert penstock.json("tasks", "ls", "--namespace", "other") == []


def test_many_are_cancelled_by_a_filter_once_that_is_confirmed(penstock: Penstock, shop: App) -> None:
    ids = [send(shop, "other.work", countdown=3600) for _ in range(30)]
    refused = penstock("tasks", "cancel", "--namespace", "other", "--state", "delayed")
    assert refused.code == NOT_CONFIRMED
    assert "cancel 30 tasks?" in refused.err
    assert len(penstock.json("tasks", "ls", "-n", "other", "--limit", "100")) == 30
    done = penstock("tasks", "cancel", "--namespace", "other", "--state", "delayed", "--yes")
    assert (done.code, "30 cancelled" in done.out) == (0, True)
    assert set(ids).isdisjoint(task["id"] for task in penstock.json("tasks", "ls", "--limit", "1000"))
    nothing = penstock("tasks", "cancel")
    assert nothing.code == USAGE
    both = penstock("tasks", "cancel", ids[0], "--namespace", "other")
    assert both.code == USAGE


def test_a_worker_is_told_to_kill_what_was_cancelled(penstock: Penstock, shop: App) -> None:
    id = send(shop, "main.work")
    (task,) = penstock.fetch(worker="w-cancel")
    assert penstock.extend(task, "w-cancel") == pb.CLAIM_ANSWER_EXTENDED
    assert "runs on worker w-cancel" in penstock("explain", id).out
    (worker,) = [w for w in penstock.json("workers", "ls") if w["worker_id"] == "w-cancel"]
    assert (worker["holds"], worker["started"], worker["slots"]) == (1, 1, 2)
    assert "shop/main" in penstock("workers", "ls").out
    assert "1 killed" in penstock("tasks", "cancel", id).out
    assert penstock.extend(task, "w-cancel") == pb.CLAIM_ANSWER_CANCELLED
    assert "cancelled by an operator" in penstock("explain", id).out


def test_retry_skips_a_back_off(penstock: Penstock, shop: App) -> None:
    id = send(shop, "main.work")
    (task,) = penstock.fetch()
    penstock.report(task, pb.TASK_OUTCOME_STATUS_RETRY)
    explained = penstock("explain", id).out
    assert "start 2 of at most 2" in explained
    assert "ValueError: it broke" in explained
    assert penstock.json("tasks", "retry", id) == [{"id": id, "result": "pending_now"}]
    assert penstock.json("tasks", "retry", id) == [{"id": id, "result": "not_delayed"}]
    (task,) = penstock.fetch()
    assert (task.activation.id, task.attempt) == (id, 2)
    penstock.report(task, pb.TASK_OUTCOME_STATUS_COMPLETE)


def test_retry_of_a_dead_letter_replays_it(penstock: Penstock, shop: App) -> None:
    (id,) = die(penstock, shop)
    assert penstock.json("tasks", "retry", id) == [{"id": id, "result": "replayed"}]
    (task,) = penstock.fetch(namespace="alone")
    assert task.activation.headers["penstock-root-id"] == id
    penstock.report(task, pb.TASK_OUTCOME_STATUS_COMPLETE)


def test_a_namespace_is_paused_and_resumed(penstock: Penstock, shop: App) -> None:
    id = send(shop, "other.work")
    paused = penstock("namespaces", "pause", "shop/other")
    assert (paused.code, "is paused" in paused.out) == (0, True)
    assert "already paused" in penstock("namespaces", "pause", "other").out
    (other,) = [n for n in penstock.json("namespaces", "ls") if n["namespace"] == "other"]
    assert (other["paused_at"] > 0, other["pending"], other["books_difference"]) == (True, 1, 0)
    assert "paused since" in penstock("namespaces", "ls").out
    assert "its namespace is paused" in penstock("explain", id).out
    assert penstock.json("status", "--sample", "0")[0]["paused_namespaces"] == 1
    assert penstock.json("namespaces", "resume", "other", "-a", "shop")[0]["changed"] is True
    (task,) = penstock.fetch(namespace="other")
    assert task.activation.id == id
    penstock.report(task, pb.TASK_OUTCOME_STATUS_COMPLETE)


def test_an_unknown_namespace_names_the_nearest(penstock: Penstock, shop: App) -> None:
    penstock("tasks", "cancel", send(shop, "other.work"))
    for name in ("othr", "shop/othr"):
        unknown = penstock("namespaces", "pause", name)
        assert unknown.code == NOT_FOUND
        assert "did you mean 'shop/other'" in unknown.err


def test_dead_letters_are_listed_shown_replayed_and_discarded(penstock: Penstock, shop: App) -> None:
    ids = die(penstock, shop, 12)
    listed = penstock.json("dlq", "ls", "--taskname", "alone.once")
    assert {letter["id"] for letter in listed} == set(ids)
    assert penstock.json("dlq", "ls", "--reason", "expired") == []
    assert penstock.json("dlq", "ls", "--until", "1h") == []
    assert len(penstock.json("dlq", "ls", "--since", "1h")) == 12
    shown = penstock("dlq", "show", ids[0], "--arguments")
    assert "ValueError: it broke" in shown.out
    assert "the\n" in shown.out, "with its traceback"
    assert "[7]" in shown.out
    asked = penstock("dlq", "replay", "--reason", "failed")
    assert asked.code == NOT_CONFIRMED
    assert "12  alone.once: failed" in asked.err
    assert "replay 12 dead letters?" in asked.err
    begun = time.monotonic()
    replayed = penstock(
        "dlq", "replay", "--reason", "failed", "--yes", "--limit", "5", "--rate", "10", "-o", "json"
    )
    assert time.monotonic() - begun >= 0.4, "five at ten a second"
    assert (replayed.code, replayed.json["done"], len(replayed.json["ids"])) == (0, 5, 5)
    assert len(penstock.json("dlq", "ls")) == 7
    sent = penstock.fetch(20, namespace="alone")
    while len(sent) < 5:
        sent += penstock.fetch(20, namespace="alone")
    assert {task.activation.id for task in sent} == set(replayed.json["ids"].values())
    for task in sent:
        penstock.report(task, pb.TASK_OUTCOME_STATUS_COMPLETE)
    discarded = penstock("dlq", "discard", "--yes")
    assert (discarded.code, "7 discarded" in discarded.out) == (0, True)
    assert penstock.json("dlq", "ls") == []
    gone = penstock("dlq", "replay", ids[-1], "--yes")
    assert gone.code == NOT_FOUND
    assert penstock("dlq", "show", ids[-1]).code == NOT_FOUND
    assert penstock("dlq", "replay", "--yes").out == "0 dead letters match, 0 replayed\n"
    (alone,) = [n for n in penstock.json("namespaces", "ls") if n["namespace"] == "alone"]
    assert alone["books_difference"] == 0


def test_a_dead_letter_of_a_topic_that_was_made_anew_is_replayed_to_the_new_one() -> None:
    cluster = Producer({"bootstrap.servers": "unused", "test.mock.num.brokers": 1})
    node = next(iter(cluster.list_topics(timeout=10).brokers.values()))
    address = f"{node.host}:{node.port}"
    for topic in ("tasks", "tasks-dlq", "tasks-dlq-handled"):
        cluster.produce(topic, b"")
    assert cluster.flush(10) == 0
    letters = TopicLetters(address, "tasks-dlq", "tasks", must=True)
    value = TaskActivation(id="a", taskname="t", application="shop", namespace="pay").SerializeToString()
    story = {"origin-topic": "tasks@0TgTgTgTgTgTgTgTgTgTgg"}
    letters.replay(Letter("", "a", "shop", "pay", "t", "failed", 0, 0, story, name="f", value=value))
    assert letters.finish().done == 1
    (sent,) = [m.value() or b"" for m in letters._messages("tasks", [0, 1, 2, 3]) if m.value()]
    assert TaskActivation.FromString(sent).taskname == "t"


# -- mistakes


def test_no_broker_there(penstock: Penstock) -> None:
    nobody = f"127.0.0.1:{free_port()}"
    for arguments in (["status"], ["tasks", "ls"], ["explain", "x"], ["dlq", "ls"], ["namespaces", "ls"]):
        ran = penstock(*arguments, "--rpc-host-list", nobody)
        assert ran.code == UNREACHABLE
        assert f"no broker answers at {nobody}" in ran.err
        assert "--rpc-host-list" in ran.err
    # The others are shown, and it is said that this is not all.
    ran = penstock("status", "--sample", "0", "--rpc-host-list", f"{penstock.address},{nobody}")
    assert ran.code == UNREACHABLE
    assert "healthy" in ran.out
    assert "1 of 2 brokers did not answer" in ran.err


def test_those_that_answer_are_asked_however_many_do_not(penstock: Penstock) -> None:
    nobody = f"127.0.0.1:{free_port()},127.0.0.1:{free_port()}"
    ran = penstock("status", "--sample", "0", "--rpc-host-list", f"{nobody},{penstock.address}")
    assert ran.code == UNREACHABLE
    assert "healthy" in ran.out
    assert "2 of 3 brokers did not answer" in ran.err
    for arguments in (["explain", "x"], ["tasks", "ls"], ["namespaces", "pause", "main"]):
        ran = penstock(*arguments, "--rpc-host-list", nobody)
        assert (ran.code, ran.out) == (UNREACHABLE, "")
        assert ran.err.count("no broker answers at") == 2


def test_a_broker_that_cannot_do_it_now_says_why(penstock: Penstock) -> None:
    why = "the broker's disk does not take what is written (full): repeat the call"

    def refuse(_: bytes, context: Any) -> bytes:
        context.abort(grpc.StatusCode.UNAVAILABLE, why)
        return b""

    class Failing(grpc.GenericRpcHandler):  # type: ignore[misc, name-defined]
        def service(self, details: Any) -> Any:
            return grpc.unary_unary_rpc_method_handler(refuse)

    server = grpc.server(ThreadPoolExecutor(1), handlers=[Failing()])
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        ran = penstock("tasks", "ls", "--rpc-host-list", address)
    finally:
        server.stop(None)
    assert ran.code == WRONG
    assert ran.err == f"penstock: the broker at {address}: {why}\n"


def test_a_wrong_secret(penstock: Penstock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKBROKER_GRPC_SHARED_SECRET", "wrong-secret")
    ran = penstock("status")
    assert ran.code == UNREACHABLE
    assert "set TASKBROKER_GRPC_SHARED_SECRET" in ran.err
    assert "wrong-secret" not in ran.err + ran.out
    monkeypatch.setenv("TASKBROKER_GRPC_SHARED_SECRET", f'["{SECRET}", "older"]')
    assert penstock("status", "--sample", "0").code == 0
    monkeypatch.setenv("TASKBROKER_GRPC_SHARED_SECRET", "[not json")
    ran = penstock("status")
    assert (ran.code, "not json" in ran.err) == (USAGE, False)


def test_unknown_ids(penstock: Penstock) -> None:
    for arguments in (
        ["explain"],
        ["tasks", "show"],
        ["tasks", "cancel"],
        ["tasks", "retry"],
        ["dlq", "show"],
    ):
        ran = penstock(*arguments, "nobody")
        assert ran.code == NOT_FOUND, arguments
        assert "nobody" in ran.err


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["tasks", "ls", "--state", "asleep"], "states are pending"),
        (["tasks", "ls", "--rpc-host-list", "broker"], "no address"),
        (["tasks", "ls", "--rpc-host-list", ","], "empty"),
        (["dlq", "ls", "--since", "yesterday"], "neither a duration"),
        (["dlq", "replay", "--rate", "inf"], "Invalid value for '--rate'"),
        (["dlq", "replay", "--rate", "1e7"], "Invalid value for '--rate'"),
        (["tasks", "retry"], "give ids, or a filter"),
        (["namespaces", "ls", "--app", "shop"], "write MODULE:APP"),
        (["namespaces", "ls", "--app", "no_such_module:app"], "no_such_module"),
        (["namespaces", "ls", "--app", "json:dumps"], "no penstock_client.App"),
        (["tasks", "lss"], "No such command"),
    ],
)
def test_mistakes_are_explained(penstock: Penstock, arguments: list[str], part: str) -> None:
    ran = penstock(*arguments)
    assert ran.code == USAGE
    assert part in ran.err


def test_help_has_the_exit_codes_and_an_example_each(penstock: Penstock) -> None:
    assert "Exit codes: 0 done" in penstock("--help").out
    for command in (
        ["status"], ["explain"], ["workers", "ls"], ["namespaces", "ls"], ["namespaces", "pause"],
        ["namespaces", "resume"], ["tasks", "ls"], ["tasks", "show"], ["tasks", "retry"], ["tasks", "cancel"],
        ["dlq", "ls"], ["dlq", "show"], ["dlq", "replay"], ["dlq", "discard"],
    ):  # fmt: skip
        assert "Example" in penstock(*command, "--help").out, command


def test_without_the_extra_the_pip_line_is_said() -> None:
    code = "import sys; sys.modules['typer'] = None; import penstock_client.cli as c; c.main()"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == USAGE
    assert "pip install 'penstock-client[cli]'" in ran.stderr
    assert "Traceback" not in ran.stderr


# -- routes, without a broker


def test_routes_of_an_application(
    penstock: Penstock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "routed.py").write_text(
        "from penstock_client import App\n"
        "app = App('shop', kafka='127.0.0.1:1', strict_kwargs='off')\n"
        "pay = app.namespace('payments', retry=None)\n"
        "@pay.task(name='payments.charge')\n"
        "def charge(): ...\n"
        "app.namespace('reports', retry=None)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PENSTOCK_ROUTE_OVERRIDES", '{"reports": "slow"}')
    monkeypatch.setenv("PENSTOCK_RPC_HOST_LIST", "127.0.0.1:1")
    payments, reports = penstock.json("namespaces", "ls", "--app", "routed:app")
    assert payments == {
        "namespace": "payments", "topic": "taskworker", "origin": "default", "tasks": ["payments.charge"],
    }  # fmt: skip
    assert reports == {
        "namespace": "reports", "topic": "slow", "origin": "PENSTOCK_ROUTE_OVERRIDES", "tasks": [],
    }  # fmt: skip
    assert "PENSTOCK_ROUTE_OVERRIDES" in penstock("namespaces", "ls", "--app", "routed:app").out


# -- output


def test_a_table_is_one_line_a_row_whatever_it_holds(capsys: pytest.CaptureFixture[str]) -> None:
    output.show_table(("A", "N"), [("on\ne\x1b[31m", 1), ("", 12_345)])
    shown = "A                   N\non\\ne\\x1b[31m       1\n-              12,345\n"
    assert capsys.readouterr().out == shown
    output.show_table(("A", "B"), [("x" * 10**6, "b")])
    assert len(capsys.readouterr().out) < 1_000


def test_nothing_that_a_task_is_called_or_says_reaches_the_terminal_as_it_is(
    penstock: Penstock, shop: App
) -> None:
    namespace = shop.namespace("hostile")

    @namespace.task(name="\x1b[2J\nforged", retry=Retry(max_attempts=2, backoff=Fixed(60)))
    def hostile(n: int = 0) -> None: ...

    id = send(shop, "\x1b[2J\nforged")
    (task,) = penstock.fetch(namespace="hostile")
    penstock.report(task, pb.TASK_OUTCOME_STATUS_RETRY, message="\x1b[31mred\x9b")
    for arguments in (["explain", id], ["tasks", "ls", "-n", "hostile"], ["tasks", "cancel", id]):
        ran = penstock(*arguments)
        assert ran.code == 0, ran.err
        assert ran.out.replace("\n", "").isprintable()
        assert not any(line.startswith("forged") for line in ran.out.splitlines())


def test_json_has_every_field_with_numbers_as_numbers() -> None:
    task = pb.ClaimedTask(deadline_ms=2**40, claim_token=b"\x01")
    values = output.plain(task)
    assert values["deadline_ms"] == 2**40
    assert values["claim_token"] == "01"
    assert values["expires_in_ms"] is None
    assert values["activation"] is None
    assert output.plain(pb.SetTaskStatusesResponse(answers=[pb.OUTCOME_ANSWER_STALE]))["answers"] == ["stale"]
