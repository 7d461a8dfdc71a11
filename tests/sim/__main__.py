"""The command: many seeds, as long as one likes, on all cores; or one again.

nox -s sim                          the share of CI
nox -s sim -- --seeds 10000         so many
nox -s sim -- --hours 8             as many as fit
nox -s sim -- --seed 4711           one history once more, in full
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator

from tests.sim import hub
from tests.sim.pool import Result, run_seed

CI_SEEDS = 400
PROGRESS_SECONDS = 10.0


def main() -> int:
    """The exit code: 1 when a promise was not kept."""
    options = _options()
    if options.seed is not None:
        return _replay(options.seed, options.lines)
    return _run(options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="nox -s sim --", description="Simulates whole pools.")
    parser.add_argument("--seeds", type=int, default=CI_SEEDS, help="how many histories")
    parser.add_argument("--hours", type=float, help="as many histories as fit into so many hours")
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    parser.add_argument("--seed", type=int, help="run one history again, and print it")
    parser.add_argument("--lines", type=int, default=1_000_000, help="how much of it: its last lines")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    return parser.parse_args()


def _replay(seed: int, lines: int) -> int:
    hub.LAST_LINES = lines
    result = run_seed(seed, always_tell=True)
    print("\n".join(result.lines))
    print(f"seed {seed}: {result.seconds:.0f} simulated seconds, history {result.digest}")
    print(f"VIOLATED {result.violation}" if result.violation else "every promise was kept")
    return 1 if result.violation else 0


def _seeds(options: argparse.Namespace) -> Iterator[int]:
    until = time.monotonic() + options.hours * 3600 if options.hours else None
    seed = options.first
    while time.monotonic() < until if until else seed < options.first + options.seeds:
        yield seed
        seed += 1


def _run(options: argparse.Namespace) -> int:
    begun = told = time.monotonic()
    total = _Total()
    # The disks of a history are in memory, and some of them outlive it.
    with multiprocessing.Pool(options.jobs, maxtasksperchild=20) as pool:
        # Bounded by hand: the pool takes all that an iterator gives.
        for result in pool.imap_unordered(_run_seed, _paced(_seeds(options), total, 8 * options.jobs)):
            total.add(result)
            if result.violation:
                _tell(result)
            if time.monotonic() - told > PROGRESS_SECONDS:
                told = time.monotonic()
                print(f"{told - begun:6.0f} s: {total.line()}", flush=True)
    print(total.summary(time.monotonic() - begun))
    return 1 if total.failed else 0


def _run_seed(seed: int) -> Result:
    """One history; a defect of the simulation itself is told as one, and the others go on."""
    try:
        return run_seed(seed)
    except Exception:  # noqa: BLE001 - told with its seed
        return Result(seed, "", 0.0, 0, 0, Counter(), Counter(), violation=traceback.format_exc())


def _paced(seeds: Iterator[int], total: _Total, ahead: int) -> Iterator[int]:
    for given, seed in enumerate(seeds):
        while given - total.seeds > ahead:
            time.sleep(0.01)
        yield seed


def _tell(result: Result) -> None:
    print(f"\nseed {result.seed}, {result.seconds:.3f} s into its history. Its last events:")
    print("\n".join(result.lines))
    print(f"VIOLATED {result.violation}")
    print(f"replay: nox -s sim -- --seed {result.seed}\n", flush=True)


class _Total:
    """What many histories had in them."""

    def __init__(self) -> None:
        self.seeds = 0
        self.seconds = 0.0
        self.tasks = 0
        self.steps = 0
        self.faults: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.failed: list[int] = []

    def add(self, result: Result) -> None:
        self.seeds += 1
        self.seconds += result.seconds
        self.tasks += result.tasks
        self.steps += result.steps
        self.faults += result.faults
        self.counts += result.counts
        if result.violation:
            self.failed.append(result.seed)

    def line(self) -> str:
        return (
            f"{self.seeds} seeds, {self.seconds / 3600:.1f} simulated hours, {self.tasks} tasks,"
            f" {self.faults.total()} faults, {len(self.failed)} failed"
        )

    def summary(self, seconds: float) -> str:
        lines = [f"\n{self.line()} in {seconds:.0f} s ({self.seconds / seconds:.0f} times as fast as time)"]
        lines += ["faults:"] + [f"  {kind:<24}{n:>8}" for kind, n in sorted(self.faults.items())]
        lines += ["seen:"] + [f"  {what:<24}{n:>8}" for what, n in sorted(self.counts.items())]
        if self.failed:
            lines += ["failed:"] + [f"  nox -s sim -- --seed {seed}" for seed in sorted(self.failed)]
        else:
            lines.append("every promise was kept")
        return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
