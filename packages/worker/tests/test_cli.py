"""The command as users meet it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
from memory_broker import MemoryBroker
from worker_runs import TESTS, appears, start

from penstock_protocol.v1 import consumer_pb2 as pb
from penstock_worker.settings import Settings


async def outcome_of(*arguments: str) -> tuple[int | None, str]:
    process = await start(*arguments)
    _, errors = await process.communicate()
    return process.returncode, errors.decode()


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["run", "nowhere:app"], 1, "There is no module 'nowhere'"),
        (["run", "worker_tasks"], 2, "write MODULE:APP"),
        (["run", "worker_tasks:Path"], 1, "not a penstock_client.App"),
        (["run", "worker_tasks:app", "--rpc-host-list", "broker"], 2, "'broker' has no port"),
        (["run", "worker_tasks:app", "--concurrency", "0"], 2, "concurrency"),
    ],
)
async def test_mistakes_are_explained_without_a_traceback(arguments: list[str], code: int, part: str) -> None:
    returned, errors = await outcome_of(*arguments)
    assert returned == code, errors
    assert part in errors
    assert "Traceback" not in errors


async def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        returned, errors = await outcome_of("run", "worker_tasks:app", "--metrics-port", port)
    assert returned == 2
    assert f"127.0.0.1:{port}" in errors
    assert "Traceback" not in errors


async def log_line(process: asyncio.subprocess.Process, event: str) -> dict[str, object]:
    assert process.stderr is not None
    while True:
        line = json.loads(await process.stderr.readline())
        if line["event"] == event:
            return dict(line)


async def test_it_says_what_it_serves_and_warns_when_no_broker_answers(free_port: int) -> None:
    process = await start(
        "run", "worker_tasks:app", "--rpc-host-list", f"127.0.0.1:{free_port}", "--log-format", "json"
    )
    loaded = await log_line(process, "application loaded")
    assert "tests: noop" in str(loaded["tasks"])
    warning = await log_line(process, "broker does not answer")
    assert warning["broker"] == f"127.0.0.1:{free_port}"
    process.send_signal(signal.SIGINT)
    assert await process.wait() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
async def test_a_worker_keeps_nothing_of_its_command_line_and_shows_no_secret(free_port: int) -> None:
    process = await start(
        "run", "worker_tasks:app", "--rpc-host-list", f"127.0.0.1:{free_port}", "--log-format", "json",
        TASKBROKER_GRPC_SHARED_SECRET="hidden",
    )  # fmt: skip
    await log_line(process, "application loaded")
    about = Path(f"/proc/{process.pid}")
    assert "pydantic" not in (about / "maps").read_text()
    assert b"hidden" not in (about / "cmdline").read_bytes()
    process.terminate()
    await process.communicate()


async def test_what_an_operator_waits_for_in_vain_is_said(free_port: int) -> None:
    process = await start(
        "run", "worker_tasks:app", "--rpc-host-list", f"127.0.0.1:{free_port}", "--log-format", "json",
        "--namespace", "tests", "--namespace", "typo",
    )  # fmt: skip
    assert (await log_line(process, "no task is in a namespace that was asked for"))["namespaces"] == ["typo"]
    process.terminate()
    await process.communicate()


async def test_an_application_that_takes_long_to_load_is_named(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import time; time.sleep(60)")
    process = await start("run", "slow:app", "--log-format", "json", PYTHONPATH=str(tmp_path))
    line = await log_line(process, "still waiting for a child to load the application")
    assert line["application"] == "slow:app"
    process.terminate()
    await process.communicate()
    assert process.returncode == 0


async def test_sigterm_finishes_and_exits_with_0(broker: MemoryBroker, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    id = broker.put("block", str(gate))
    process = await start("run", "worker_tasks:app", "--rpc-host-list", broker.address, "--concurrency", "2")
    await appears(tmp_path / "gate.started")
    process.send_signal(signal.SIGTERM)
    gate.touch()
    assert await process.wait() == 0
    assert id in dict(broker.outcomes)


async def test_it_ends_though_a_child_cannot_be_killed(broker: MemoryBroker, tmp_path: Path) -> None:
    """Like one that hangs in the kernel, or has become another user's."""
    program = """
import os, sys, penstock_worker.children, penstock_worker.running
def not_permitted(group, number):
    raise PermissionError
os.killpg = not_permitted
penstock_worker.children.EXIT_SECONDS_MAX = 0.2
penstock_worker.running.run(sys.argv[1])
"""
    broker.put("block", str(tmp_path / "gate"))
    settings = Settings("worker_tasks:app", (broker.address,), slots=1, grace_seconds=0)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program, settings.handed_over()),
        cwd=TESTS,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        pid = await appears(tmp_path / "gate.started")
        process.terminate()
        _, errors = await process.communicate()
        assert process.returncode == 0, errors
        assert f"pids=[{pid}]" in errors.decode()
    finally:
        if process.returncode is None:
            process.kill()


async def test_children_do_not_outlive_a_killed_parent(broker: MemoryBroker, tmp_path: Path) -> None:
    broker.put("stuck_in_c", str(tmp_path / "stuck"))
    process = await start("run", "worker_tasks:app", "--rpc-host-list", broker.address, "--concurrency", "2")
    stuck = int(await appears(tmp_path / "stuck"))
    children = psutil.Process(process.pid).children()
    assert stuck in {child.pid for child in children}
    process.kill()
    await process.wait()
    _, alive = await asyncio.to_thread(psutil.wait_procs, children, 30)
    assert not alive


async def test_a_log_that_nobody_reads_any_more_stops_nothing(broker: MemoryBroker) -> None:
    reader, writer = os.pipe()
    process = await start(
        "run", "worker_tasks:app", "--rpc-host-list", broker.address, "--concurrency", "1", stderr=writer
    )
    os.close(writer)
    try:
        broker.put("noop")
        await broker.settled(1)
        os.close(reader)
        failing = {broker.put("raise", "fail") for _ in range(3)}
        last = broker.put("noop")
        outcomes = await broker.settled(5)
        assert all(outcomes[id].status == pb.TASK_OUTCOME_STATUS_FAILURE for id in failing)
        assert outcomes[last].status == pb.TASK_OUTCOME_STATUS_COMPLETE
        process.terminate()
        assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()


async def test_metrics(broker: MemoryBroker, free_port: int) -> None:
    for _ in range(10):
        broker.put("noop")
    broker.put("raise", "fail")
    process = await start(
        "run", "worker_tasks:app", "--rpc-host-list", broker.address, "--metrics-port", str(free_port)
    )
    await broker.settled(11)
    url = f"http://127.0.0.1:{free_port}/metrics"

    def sample(name: str) -> float:
        with urllib.request.urlopen(url) as response:
            lines = response.read().decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    def await_reports() -> None:
        # The broker has answered before the worker has counted.
        while sample('penstock_worker_reports_total{answer="applied"}') < 11:
            time.sleep(0.01)

    await asyncio.to_thread(await_reports)
    assert await asyncio.to_thread(sample, 'penstock_worker_outcomes_total{outcome="complete"}') == 10
    assert await asyncio.to_thread(sample, 'penstock_worker_outcomes_total{outcome="failure"}') == 1
    assert await asyncio.to_thread(sample, 'penstock_worker_run_seconds_count{namespace="tests"}') == 11
    process.send_signal(signal.SIGTERM)
    assert await process.wait() == 0


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def test_the_command_is_quick_to_help_without_grpc() -> None:
    probe = "import sys, penstock_worker.cli; sys.exit('grpc' in sys.modules)"
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", probe]) == 0


def test_children_know_no_network_and_no_command_line() -> None:
    probe = (
        "import sys, penstock_worker.child, penstock_worker.execution, penstock_worker.loading;"
        "sys.exit(bool({'grpc', 'typer', 'structlog', 'prometheus_client'} & set(sys.modules)))"
    )
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", probe]) == 0
