"""River on PostgreSQL: a backlog of no-op jobs, worked by one client in process (benchmarks/river/)."""

from __future__ import annotations

import contextlib
import os
import pwd
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks import golang
from benchmarks.harness import Bench, Figures
from benchmarks.processes import Program, find, process, wait_until

NEEDS = "Go 1.26 with River's modules, and PostgreSQL"
WARM_UP_JOBS = 100_000


@dataclass(frozen=True)
class River:
    """What it takes: our program with it, PostgreSQL's programs, a database, and all their versions."""

    program: Path
    postgres: Path
    database: Path
    versions: str


def river(bench: Bench) -> River | None:
    """None where something is missing."""
    found = bench.keep("river", lambda: _build(bench))
    assert found is None or isinstance(found, River)
    return found


def notes(bench: Bench) -> Sequence[str]:
    found = river(bench)
    return [found.versions if found else f"River was not measured here: it needs {NEEDS}."]


def drain(bench: Bench, body: int, tasks: int) -> Figures:
    """A backlog in an empty table; then the client starts, until the database says that all is completed."""
    found = river(bench)
    assert found is not None
    return _drain(found, body, tasks)


def _drain(found: River, body: int, tasks: int) -> Figures:
    with _postgres(found.postgres, found.database) as (url, server):
        arguments = ["-database", url, "-jobs", str(tasks), "-body", str(body)]
        client = Program("River", [str(found.program), *arguments], {})
        try:
            client.ready()
            before = _cpu(server)
            result = client.go().line()
            postgres = _cpu(server) - before
            used = _memory(server) + psutil.Process(client.pid).memory_info().rss
        finally:
            client.stop()
    seconds = result["last"] - result["first"]
    return {
        "tasks_per_second": tasks / seconds,
        "mb_per_second": tasks / seconds * body / 1e6,
        "postgres_cpu_us": postgres / tasks * 1e6,
        "river_cpu_us": result["cpu"] / tasks * 1e6,
        "all_cpu_us": (postgres + result["cpu"]) / tasks * 1e6,
        "river_mb": used / 1e6,
    }


def _cpu(server: psutil.Process) -> float:
    """Seconds of a server and its children: those that live, and those that have ended."""
    live = sum(_of_children(server, lambda child: sum(child.cpu_times()[:2])))
    return live + float(sum(server.cpu_times()[:4]))


def _memory(server: psutil.Process) -> float:
    """Bytes of a server and its children; what they share counts once."""
    return sum(_of_children(server, _share)) + _share(server)


def _share(process: psutil.Process) -> float:
    return float(process.memory_full_info().pss)


def _of_children(server: psutil.Process, look: Callable[[psutil.Process], float]) -> Iterator[float]:
    for child in server.children():
        with contextlib.suppress(psutil.NoSuchProcess):
            yield look(child)


def _build(bench: Bench) -> River | None:
    postgres = find("postgres", "/usr/lib/postgresql/*/bin")
    program = golang.program(bench, "river") if postgres is not None else None
    if postgres is None or program is None:
        return None
    version = subprocess.run([str(postgres), "--version"], capture_output=True, text=True, check=True)
    versions = [
        golang.said("river", "list", "-m", "-f", "River {{.Version}}", "github.com/riverqueue/river"),
        golang.said("river", "env", "GOVERSION").replace("go", "Go "),
        version.stdout.strip().replace("postgres (PostgreSQL)", "PostgreSQL"),
    ]
    database = _new_database(bench, postgres.parent)
    found = River(program, postgres.parent, database, f"Beside {', '.join(versions)}.")
    # Once, so that the files of PostgreSQL's log are there, to be used again.
    _drain(found, 300, WARM_UP_JOBS)
    return found


def _user() -> dict[str, Any]:
    """PostgreSQL refuses to run as root."""
    if os.geteuid():
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def _new_database(bench: Bench, programs: Path) -> Path:
    """The folder of a database, for the session."""
    folder = Path(bench.closing.enter_context(tempfile.TemporaryDirectory(prefix="penstock-bench-")))
    if user := _user():
        os.chown(folder, user["user"], user["group"])
    command = [str(programs / "initdb"), "--pgdata", str(folder / "data"), "--auth", "trust", "--no-sync"]
    command += ["--username", "postgres", "--encoding", "UTF8", "--locale", "C"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=folder, **_user())
    return folder


@contextlib.contextmanager
def _postgres(programs: Path, folder: Path) -> Iterator[tuple[str, psutil.Popen]]:
    """A server with its default settings: every commit is on disk before it is answered."""
    serve = [str(programs / "postgres"), "-D", str(folder / "data"), "-k", str(folder), "-h", ""]
    ask = [str(programs / "pg_isready"), "--quiet", "--host", str(folder), "--username", "postgres"]
    with process(serve, log=folder / "log", cwd=folder, **_user()) as server:
        wait_until("PostgreSQL answers", lambda: subprocess.run(ask, check=False).returncode == 0)
        yield f"postgres:///postgres?host={folder}&user=postgres", server
