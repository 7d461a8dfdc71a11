"""The images' build stages carried out in an empty directory, and what they made put to work."""

import queue
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.install.environment import ROOT, distributions, run

SENDER = Path(__file__).with_name("sender.py")
IMAGES = ROOT / "deploy" / "images"
OURS = {
    "broker": {"penstock-protocol", "penstock-broker"},
    "worker": {"penstock-protocol", "penstock-client", "penstock-worker"},
}
START_SECONDS = 60


@pytest.fixture(scope="module")
def broker(clean_environ: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("broker", clean_environ, tmp_path_factory)


@pytest.fixture(scope="module")
def worker(clean_environ: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("worker", clean_environ, tmp_path_factory)


def build(package: str, environ: dict[str, str], directories: pytest.TempPathFactory) -> Path:
    target = directories.mktemp("image") / "opt" / "penstock"
    run(IMAGES / "install.sh", target, package, cwd=Path("/"), env=environ)
    return target / "bin"


def locked(package: str) -> set[str]:
    lines = (ROOT / "requirements" / f"{package}.txt").read_text().splitlines()
    wanted = [Requirement(line.rstrip(" \\")) for line in lines if line and not line.startswith((" ", "#"))]
    return {one.name for one in wanted if one.marker is None or one.marker.evaluate()}


@pytest.mark.parametrize("package", ["broker", "worker"])
def test_an_image_holds_its_lock_and_nothing_else(package: str, request: pytest.FixtureRequest) -> None:
    home: Path = request.getfixturevalue(package)
    assert distributions(home / "python") == locked(package) | OURS[package]


def test_the_commands_start(broker: Path, worker: Path, clean_environ: dict[str, str]) -> None:
    assert run(broker / "penstock-broker", "--version", env=clean_environ).startswith("penstock-broker ")
    assert "MODULE:APP" in run(worker / "penstock-worker", "run", "--help", env=clean_environ)


def test_a_task_goes_through_both_images(
    broker: Path, worker: Path, clean_environ: dict[str, str], tmp_path: Path
) -> None:
    port, metrics = free_port(), free_port()
    settings = {
        "TASKBROKER_INGEST": "grpc",
        "TASKBROKER_GRPC_PORT": str(port),
        "TASKBROKER_METRICS_PORT": "0",
        "TASKBROKER_DB_PATH": str(tmp_path / "inflight.sqlite"),
        "PENSTOCK_RPC_HOST_LIST": f"127.0.0.1:{port}",
    }
    environ = clean_environ | settings
    broker_health = [str(broker / "python"), str(IMAGES / "broker_health.py")]
    worker_health = [str(worker / "python"), str(IMAGES / "worker_health.py"), str(metrics)]
    serve = [str(broker / "penstock-broker"), "serve"]
    work = [str(worker / "penstock-worker"), "run", "tasks:app", "--concurrency=1"]
    work.append(f"--metrics-port={metrics}")

    with process(serve, tmp_path, environ) as (serving, _):
        become_healthy(broker_health, environ, serving)
        with process(work, ROOT / "deploy" / "app", environ) as (working, printed):
            become_healthy(worker_health, environ, working)
            run(worker / "python", "-I", SENDER, f"127.0.0.1:{port}", env=environ)
            while printed.get(timeout=START_SECONDS) != "Hello, image!":
                pass
            assert stop(working) == 0
        assert stop(serving) == 0
    assert subprocess.run(broker_health, env=environ, capture_output=True).returncode == 1
    assert subprocess.run(worker_health, env=environ, capture_output=True).returncode == 1


@contextmanager
def process(
    command: list[str], cwd: Path, environ: dict[str, str]
) -> Iterator[tuple[subprocess.Popen[str], "queue.Queue[str]"]]:
    """A process and the lines it prints; killed if the test leaves it behind."""
    started = subprocess.Popen(
        command, cwd=cwd, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
    )
    printed: queue.Queue[str] = queue.Queue()
    reader = threading.Thread(target=forward, args=(started, printed))
    reader.start()
    try:
        yield started, printed
    finally:
        started.kill()
        started.wait()
        reader.join()


def forward(started: subprocess.Popen[str], printed: "queue.Queue[str]") -> None:
    assert started.stdout is not None
    for line in started.stdout:
        print(line, end="")
        printed.put(line.rstrip("\n"))


def become_healthy(check: list[str], environ: dict[str, str], checked: subprocess.Popen[str]) -> None:
    """Ask the image's own health check until it agrees, as a container engine does."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        answer = subprocess.run(check, env=environ, capture_output=True, text=True)
        if answer.returncode == 0:
            return
        assert checked.poll() is None, f"{checked.args!r} exited {checked.returncode}"
        assert time.monotonic() < deadline, answer.stderr


def stop(running: subprocess.Popen[str]) -> int:
    running.send_signal(signal.SIGTERM)
    return running.wait(timeout=30)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
