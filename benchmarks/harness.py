"""What every benchmark has in common: cases measured in turn, medians with their spread, dated result files.

A script of benchmarks/ holds one ``Claim``: its cases, its targets, and what must be said beside its figures.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.kafka_server import JavaKafka, kafka_server

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
VERSIONS = ("apsw", "confluent-kafka", "grpcio", "protobuf", "uvloop")

Figures = Mapping[str, float]


# What the names of our cases begin with.
OURS = "Penstock"


class NotWithinError(SystemExit):
    """What was waited for has not come."""


@dataclass
class Bench:
    """What a session of benchmarks shares: one Kafka, a folder, what is kept from one claim to the next."""

    short: bool
    folder: Path
    kafka: str
    kafka_pid: int | None
    # Runs of each case; None: as many as the claim has.
    repeat: int | None = None
    kept: dict[str, Any] = field(default_factory=dict)
    closing: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def size(self, short: int, full: int) -> int:
        return short if self.short else full

    def keep(self, name: str, make: Callable[[], Any]) -> Any:
        """What is made once in a session; ``closing`` ends it."""
        if name not in self.kept:
            self.kept[name] = make()
        return self.kept[name]


@dataclass(frozen=True)
class Case:
    """One bar of the plot. Cases of the same ``group`` stand side by side."""

    series: str
    group: str
    run: Callable[[Bench], Figures]

    @property
    def name(self) -> str:
        return f"{self.series}, {self.group}" if self.group else self.series


@dataclass(frozen=True)
class Figure:
    """A figure of a case: its unit as the page shows it, and whether more is better.

    ``compared``: worth saying when another system does better.
    """

    name: str
    title: str
    more_is_better: bool = False
    plotted: bool = False
    compared: bool = False
    digits: int = 1


@dataclass(frozen=True)
class Target:
    """What a figure should be. With ``of`` it is a ratio to the same figure of that case, in the same run.

    ``why``: what was measured of why it is missed, shown while it is.
    """

    text: str
    case: str
    figure: str
    at_least: float | None = None
    at_most: float | None = None
    of: str | None = None
    why: str = ""

    def value(self, cases: Mapping[str, Any]) -> float | None:
        """None when a case was not measured."""
        try:
            value = float(cases[self.case]["figures"][self.figure]["median"])
            if self.of is not None:
                value /= cases[self.of]["figures"][self.figure]["median"]
        except KeyError:
            return None
        return value

    def is_met(self, value: float) -> bool:
        return (self.at_least is None or value >= self.at_least) and (
            self.at_most is None or value <= self.at_most
        )


def in_a_quiet_hour(figures: str) -> str:
    """Why a target is missed that was met when the same machine was free: its neighbours take half of it at
    times, for hours."""
    return (
        f"the speed of the machine, of which the fixed piece of Python below the table tells: {figures} when"
        " its neighbours were quiet (November 23, 2026)."
    )


@dataclass(frozen=True)
class Elsewhere:
    """A figure that was measured by others or on another day: shown, labelled so, and never in a ratio."""

    series: str
    group: str
    figure: str
    value: float


@dataclass(frozen=True)
class Claim:
    """One benchmark. ``seconds``: how long its short and its full form take on two cores."""

    name: str
    title: str
    how: str
    figures: Sequence[Figure]
    cases: Callable[[Bench], Sequence[Case]]
    targets: Sequence[Target] = ()
    elsewhere: Sequence[Elsewhere] = ()
    pitfalls: Sequence[str] = ()
    # What must be said of this run, such as the version of another system, or why it was left out.
    notes: Callable[[Bench], Sequence[str]] = lambda bench: ()
    seconds: tuple[int, int] = (30, 300)
    repeat: tuple[int, int] = (2, 5)
    warm_up: bool = True
    logarithmic: bool = False


def measure(claim: Claim, bench: Bench) -> dict[str, Any]:
    """All cases in turn, so that all see the same machine, several times; the first time does not count."""
    cases = claim.cases(bench)
    repeat = bench.repeat or (claim.repeat[0] if bench.short else claim.repeat[1])
    runs: dict[str, list[Figures]] = {case.name: [] for case in cases}
    stuck: list[str] = []
    speeds: list[float] = []
    started = time.monotonic()
    rounds = range(0 if claim.warm_up and not bench.short else 1, repeat + 1)
    for number in rounds:
        for case in cases:
            say(f"  {claim.name} {_round(number, repeat)}: {case.name} ...", end=" ")
            # Else a broker's syncs wait for what the case before has written: 50 to 70 ms in idle latency.
            os.sync()
            speeds.append(_fixed_work_ms())
            try:
                figures = case.run(bench)
            except NotWithinError as error:
                if case.series.startswith(OURS):
                    raise
                say(str(error))
                stuck.append(f"A run of {case.name} did not end, and does not count: {error}.")
                continue
            say("  ".join(f"{name} {value:,.1f}" for name, value in figures.items()))
            if number:
                runs[case.name].append(figures)
    return {
        "claim": claim.name,
        "form": "short" if bench.short else "full",
        "taken": datetime.datetime.now(tz=datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - started),
        "machine": machine(),
        "fixed_work_ms": spread(speeds),
        "notes": [*claim.notes(bench), *stuck],
        "cases": {case.name: _case(case, runs[case.name]) for case in cases if runs[case.name]},
    }


def _fixed_work_ms() -> float:
    """How fast the machine is at the moment: what the same piece of Python takes, in ms."""
    started = time.perf_counter()
    sum(n * n % 7 for n in range(300_000))
    return (time.perf_counter() - started) * 1000


def _round(number: int, repeat: int) -> str:
    return f"run {number} of {repeat}" if number else "warm-up"


def _case(case: Case, runs: Sequence[Figures]) -> dict[str, Any]:
    names = list(runs[0])
    return {
        "series": case.series,
        "group": case.group,
        "figures": {name: spread([run[name] for run in runs]) for name in names},
        "runs": [dict(run) for run in runs],
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def percentile(values: Sequence[float], part: float) -> float:
    """The smallest value that ``part`` of all do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))]


def machine() -> dict[str, str]:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return {
        "cores": str(os.cpu_count()),
        "processor": _processor(),
        "memory_gib": str(round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)),
        "system": platform.platform(),
        "load_average": f"{os.getloadavg()[0]:.1f}",
        "python": f"{platform.python_version()} ({Path(sys.executable).resolve()})",
        "commit": git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else ""),
        **{name: version(name) for name in VERSIONS},
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def save(name: str, form: str, figures: Mapping[str, object]) -> Path:
    """Write a dated result file."""
    RESULTS.mkdir(exist_ok=True)
    day = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    path = RESULTS / f"{day}-{name.lower()}{'-short' if form == 'short' else ''}.json"
    path.write_text(json.dumps(figures, indent=1) + "\n")
    return path


def summary(claim: Claim, result: Mapping[str, Any]) -> str:
    """The figures of one claim, for a terminal."""
    lines = []
    for name, case in result["cases"].items():
        for figure in claim.figures:
            if figure.name in case["figures"]:
                s = case["figures"][figure.name]
                lines.append(
                    f"    {name:44.44} {figure.title:34.34} {s['median']:12,.{figure.digits}f}"
                    f"   ({s['min']:,.{figure.digits}f} to {s['max']:,.{figure.digits}f})"
                )
    for target in claim.targets:
        value = target.value(result["cases"])
        if value is not None:
            word = "met" if target.is_met(value) else "MISSED"
            lines.append(f"    {word:6} {target.text}: {value:,.2f}")
    return "\n".join(lines)


def say(text: str, end: str = "\n") -> None:
    sys.stdout.write(text + end)
    sys.stdout.flush()


@contextlib.contextmanager
def session(short: bool, repeat: int | None = None) -> Iterator[Bench]:
    """One Kafka and one folder for all claims of a run."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="penstock-bench-")))
        kafka = stack.enter_context(kafka_server())
        if not kafka.real:
            raise SystemExit("benchmarks need a real Kafka: apt-get install openjdk-17-jre-headless maven")
        pid = kafka.pid if isinstance(kafka, JavaKafka) else None
        bench = Bench(short, folder, kafka.address, pid, repeat)
        stack.enter_context(bench.closing)
        yield bench
