"""What each setting of the write-ahead log costs or saves: the store's own ticks, nothing around them.

``python -m benchmarks.store_settings [--ticks N] [--repeat N]``. Each tick inserts, claims and completes
256 rows of 300 bytes, over a backlog of 20,000. The settings run in turn, so that all see the same machine.
Then ticks of one row, as of a broker that is idle: into a log that is laid out, and into one that grows.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
import uuid
from collections import deque
from pathlib import Path

import apsw

from benchmarks.harness import machine, save, spread
from penstock_broker.domain.activation import Activation, hash_id
from penstock_broker.domain.lifecycle import Limits
from penstock_broker.store import database as store
from penstock_broker.store.batch import Batch

ROWS = 256
BACKLOG = 20_000
SMALL_TICKS = 500

# name -> pragmas over those that are shipped, and when to check-point ("tick", or bytes of WAL)
VARIANTS: dict[str, tuple[dict[str, object], int | str]] = {
    "as shipped": ({}, store.CHECKPOINT_BYTES),
    "synchronous=NORMAL (not durable)": ({"synchronous": "NORMAL"}, store.CHECKPOINT_BYTES),
    "synchronous=NORMAL, check-point each tick": ({"synchronous": "NORMAL"}, "tick"),
    "check-point each tick": ({}, "tick"),
    "check-point at 1 MiB": ({}, 1 << 20),
    "check-point at 4 MiB (about SQLite's own)": ({}, 4 << 20),
    "check-point at 64 MiB": ({}, 64 << 20),
    "cache_size=2 MiB (SQLite's own)": ({"cache_size": -2000}, store.CHECKPOINT_BYTES),
    "mmap_size=256 MiB": ({"mmap_size": 256 << 20}, store.CHECKPOINT_BYTES),
    "temp_store=FILE": ({"temp_store": "FILE"}, store.CHECKPOINT_BYTES),
    "journal_mode=DELETE (no WAL)": ({"journal_mode": "DELETE"}, store.CHECKPOINT_BYTES),
}


def rows(first: int, pair: int, count: int = ROWS) -> list[Activation]:
    made = []
    for seq in range(first, first + count):
        id = uuid.uuid4().hex
        row = Activation(id, "bench", "bench", "noop", bytes(300), 1, 1, None, 30_000, size=300)
        row.seq, row.pair, row.id_hash = seq, pair, hash_id(id)
        made.append(row)
    return made


def run(pragmas: dict[str, object], checkpoint: int | str, ticks: int) -> tuple[float, float]:
    """Rows a second, and the largest WAL in MiB."""
    folder = Path(tempfile.mkdtemp(prefix="penstock-bench-"))
    try:
        database = store.Database(folder / "store.sqlite", Limits(), 0)
        connection = database.connection
        for name, value in pragmas.items():
            connection.pragma(name, value)
        database.checkpoint_bytes = 0 if checkpoint == "tick" else int(checkpoint)
        first = Batch(new_pairs=[(1, "bench", "bench")])
        database.write(first)
        waiting: deque[int] = deque()
        seq, begun = 1, 0.0
        for tick in range(-(BACKLOG // ROWS), ticks):
            batch = Batch(rows=rows(seq, 1), stamp=1)
            waiting.extend(range(seq, seq + ROWS))
            seq += ROWS
            if tick >= 0:
                begun = begun or time.perf_counter()
                batch.gone = [waiting.popleft() for _ in range(ROWS)]
                batch.claims = list(waiting)[:ROWS]
                batch.finished = [n for s in batch.gone for n in (s, 1)]
            database.write(batch)
        seconds = time.perf_counter() - begun
        path = folder / "store.sqlite-wal"
        size = path.stat().st_size / 2**20 if path.exists() else 0.0
        database.close()
        return ticks * ROWS / seconds, size
    finally:
        shutil.rmtree(folder)


def small(laid_out: bool) -> tuple[float, float]:
    """Of a tick of one row, the µs that it takes and the µs of CPU."""
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as folder:
        database = store.Database(Path(folder) / "store.sqlite", Limits(), 0)
        if laid_out:
            database.lay_out_log(store.CHECKPOINT_BYTES)
        database.write(Batch(new_pairs=[(1, "bench", "bench")]))
        batches = [Batch(rows=[row], stamp=1) for row in rows(1, 1, SMALL_TICKS)]
        begun, cpu = time.perf_counter(), time.process_time()
        for batch in batches:
            database.write(batch)
        took = time.perf_counter() - begun, time.process_time() - cpu
        database.close()
    return took[0] / SMALL_TICKS * 1e6, took[1] / SMALL_TICKS * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ticks", type=int, default=300)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    figures: dict[str, list[float]] = {name: [] for name in VARIANTS}
    sizes: dict[str, float] = {}
    for _ in range(options.repeat):
        for name, (pragmas, checkpoint) in VARIANTS.items():
            rate, sizes[name] = run(pragmas, checkpoint, options.ticks)
            figures[name].append(rate)
    one_row: dict[str, list[tuple[float, float]]] = {"log laid out": [], "log that grows": []}
    for _ in range(options.repeat):
        for name, measured in one_row.items():
            measured.append(small(laid_out=name == "log laid out"))
    shipped = spread(figures["as shipped"])["median"]
    print(f"SQLite {apsw.sqlite_lib_version()}, {ROWS} rows a tick")
    for name, rates in figures.items():
        s = spread(rates)
        print(
            f"{name:44} {s['median']:10,.0f} rows/s ({s['min']:,.0f} to {s['max']:,.0f})"
            f"  {s['median'] / shipped:5.2f} x  WAL file {sizes[name]:5.1f} MiB"
        )
    for name, measured in one_row.items():
        took, cpu = (spread(values) for values in zip(*measured, strict=True))
        print(
            f"one row a tick, {name:25}{took['median']:8,.0f} µs ({took['min']:,.0f} to {took['max']:,.0f})"
            f", CPU {cpu['median']:,.0f} µs ({cpu['min']:,.0f} to {cpu['max']:,.0f})"
        )
    save(
        "store-settings",
        "full",
        {
            "machine": machine(),
            "rows_per_second": {name: spread(r) for name, r in figures.items()},
            "wal_mib": sizes,
            "one_row_us": {n: [spread(v) for v in zip(*m, strict=True)] for n, m in one_row.items()},
        },
    )


if __name__ == "__main__":
    main()
