"""Time and threads are ports: nothing in the broker reads a clock or starts a thread but what is named here.

What only the simulation would notice otherwise: a clock read elsewhere goes its own way.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import penstock_broker

SOURCE = Path(str(penstock_broker.__file__)).parent
MODULES = sorted(SOURCE.rglob("*.py"))

CLOCKS = {
    "time": {
        *("time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns", "sleep"),
        *(
            "process_time",
            "process_time_ns",
            "thread_time",
            "thread_time_ns",
            "clock_gettime",
            "clock_gettime_ns",
        ),
        *("gmtime", "localtime", "ctime", "strftime"),
    },
    "datetime": {"now", "utcnow", "today"},
    "date": {"today"},
    "uuid": {"uuid1"},
}
# The loop's own clock. `asyncio.timeout` and `call_later` take durations, which the loop measures.
LOOP_CLOCKS = {"time", "call_at", "timeout_at"}
THREADS = {
    "Thread",
    "Timer",
    "ThreadPoolExecutor",
    "ProcessPoolExecutor",
    "start_new_thread",
    "to_thread",
    "Process",
    "run_in_executor",
    "start_http_server",
}

# How long something took, for a metric: nothing is decided by it.
MEASURES = {("server.py", "perf_counter"), ("dispatch/rpc.py", "perf_counter")}
# How long to wait yet: the loop's own time, which runs as its timers do.
PAUSES = {
    ("ingest/ledger.py", "loop.time"),
    ("ingest/drain.py", "get_running_loop.time"),
    ("ingest/drain.py", "asyncio.timeout_at"),
}
STARTS = {
    ("ingest/ledger.py", "ThreadPoolExecutor"),  # the ledger's
    ("ingest/ledger.py", "run_in_executor"),
    ("writer_thread.py", "Thread"),
    ("ingest/consumer.py", "Thread"),  # the consumer's
    ("ingest/publisher.py", "Thread"),  # the producer's
    ("ingest/publisher.py", "to_thread"),
    ("metrics.py", "start_http_server"),  # the metrics server's
}


def names_used(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(what it is taken from, name) of every attribute and of every import by name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner = node.value
            if isinstance(owner, ast.Call):
                owner = owner.func
            yield owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", ""), node.attr
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.module or "", alias.name


def clocks_read(tree: ast.AST) -> set[str]:
    found = set()
    for owner, name in names_used(tree):
        if name in CLOCKS.get(owner, ()):
            found.add(name)
        if name in LOOP_CLOCKS and ("loop" in owner or owner == "asyncio"):
            found.add(f"{owner}.{name}")
    return found


def threads_started(tree: ast.AST) -> set[str]:
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    names = {func.attr if isinstance(func, ast.Attribute) else getattr(func, "id", "") for func in calls}
    return names & THREADS


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_clock_is_read_outside_the_port(module: Path) -> None:
    where = str(module.relative_to(SOURCE))
    if where == "clock.py":
        return
    found = {
        name for name in clocks_read(ast.parse(module.read_text())) if (where, name) not in MEASURES | PAUSES
    }
    assert not found, f"{where} reads {found}: ask the Clock it is given"


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_thread_is_started_elsewhere(module: Path) -> None:
    where = str(module.relative_to(SOURCE))
    found = {name for name in threads_started(ast.parse(module.read_text())) if (where, name) not in STARTS}
    assert not found, f"{where} starts {found}"


@pytest.mark.parametrize(
    "text",
    [
        "import time\nnow = time.time()",
        "from time import monotonic\nmonotonic()",
        "import datetime\ndatetime.datetime.now()",
        "from datetime import datetime\ndatetime.utcnow()",
        "import asyncio\nasyncio.get_running_loop().time()",
        "loop.call_at(3, f)",
        "self._loop.time()",
        "import uuid\nuuid.uuid1()",
    ],
)
def test_a_clock_is_seen(text: str) -> None:
    assert clocks_read(ast.parse(text))


@pytest.mark.parametrize(
    "text",
    [
        "import threading\nthreading.Thread(target=f).start()",
        "from concurrent.futures import ThreadPoolExecutor\nThreadPoolExecutor(2)",
        "import asyncio\nawait_ = asyncio.to_thread(f)",
        "loop.run_in_executor(None, f)",
    ],
)
def test_a_thread_is_seen(text: str) -> None:
    assert threads_started(ast.parse(text))
