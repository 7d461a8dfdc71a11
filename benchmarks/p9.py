"""P9: memory of a broker that holds much, of a worker's parent; and what importing the client costs."""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from functools import partial

from benchmarks.harness import ROOT, Bench, Case, Claim, Figure, Figures, Target
from benchmarks.stored import make
from benchmarks.systems import environment_python, penstock

_IMPORT = """
import time
wall, cpu = time.perf_counter(), time.process_time()
import penstock_client
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
import os
pages = int(open("/proc/self/statm").read().split()[1])
print(wall * 1000, cpu * 1000, pages * os.sysconf("SC_PAGE_SIZE") / 1e6)
"""


def holding(bench: Bench, rows: int, body: int) -> Figures:
    store = make(bench, bench.folder / f"p9-{uuid.uuid4().hex[:8]}", rows, body, "bench")
    shutil.rmtree(store.folder)
    return {"rss_mb": store.rss_mb, "rows_per_second": store.rows_per_second}


def parent(bench: Bench, tasks: int) -> Figures:
    """After it has worked: that is when a worker is large."""
    with penstock(bench) as system:
        system.producer(tasks).go().result()
        system.finish()
        rss = system.meter().rss_mb()
        return {"rss_mb": rss["worker_rss_mb"], "children_rss_mb": rss["children_rss_mb"] / 2}


def importing(bench: Bench) -> Figures:
    """In an environment that has what a producer installs, and nothing else."""
    sources = os.pathsep.join(f"{ROOT}/packages/{name}/src" for name in ("client", "protocol"))
    environment = os.environ | {"PYTHONPATH": sources}
    command = [environment_python("client"), "-c", _IMPORT]
    for _ in range(2):  # the first one may have to write the bytecode
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    wall_ms, cpu_ms, rss_mb = map(float, done.stdout.split())
    return {"import_ms": wall_ms, "import_cpu_ms": cpu_ms, "rss_mb": rss_mb}


BROKER, LARGE, PARENT, IMPORT = (
    "broker, 100,000 pending of 1 KB",
    "broker, a million pending of 1 KB",
    "worker's parent",
    "import penstock_client",
)

IDLE = (
    "interpreter and libraries (gRPC and protobuf, Kafka's client, OpenSSL) are 71 MB of a broker that "
    "does nothing."
)

KNOWN = (
    "of a row on the disk memory keeps two integers and their place in a dictionary, by which its task is "
    "known when it comes again: 144 bytes. `max_pending_count`, a million, bounds it."
)

CLAIM = Claim(
    name="P9",
    title="Memory, and the client's import",
    how="Resident memory: of a broker right after it has stored the rows; of a worker with two children"
    " after it has"
    " run tasks; of a fresh interpreter that has imported the client, in an environment with the client"
    " alone, and how long the import took.",
    figures=(
        Figure("rss_mb", "memory, MB", plotted=True),
        Figure("children_rss_mb", "each child, MB"),
        Figure("import_ms", "import, ms"),
        Figure("import_cpu_ms", "import, ms of CPU"),
        Figure("rows_per_second", "stored, rows/s", more_is_better=True, digits=0),
    ),
    cases=lambda bench: [
        Case(BROKER, "", partial(holding, rows=100_000, body=1_000)),
        Case(LARGE, "", partial(holding, rows=bench.size(250_000, 1_000_000), body=1_000)),
        Case(PARENT, "", partial(parent, tasks=bench.size(10_000, 50_000))),
        Case(IMPORT, "", importing),
    ],
    targets=(
        Target("MB at 100,000 pending of 1 KB", BROKER, "rss_mb", at_most=120, why=IDLE),
        Target("times as much at a million", LARGE, "rss_mb", at_most=2.0, of=BROKER, why=KNOWN),
        Target("MB of a worker's parent", PARENT, "rss_mb", at_most=60),
        Target("ms to import the client", IMPORT, "import_ms", at_most=100),
    ),
    pitfalls=(
        "Resident memory counts shared libraries in full in each process.",
        "The broker's settings are in its environment, as in its image; with options it takes 4 MB more.",
        "In the short form the million is 250,000.",
    ),
    seconds=(60, 480),
    repeat=(1, 5),
    warm_up=False,
)
