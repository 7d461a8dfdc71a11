"""docs/performance.md and its plots, from the newest result of each claim: ``python -m benchmarks.page``."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

from benchmarks.harness import OURS, RESULTS, ROOT, Claim, Figure

mpl.use("svg")
# The same figures make the same bytes, and text stays text.
mpl.rcParams["svg.hashsalt"] = "penstock"
mpl.rcParams["svg.fonttype"] = "none"

from matplotlib import pyplot as plt  # noqa: E402 - after the backend is chosen

NAMES = tuple(f"P{n}" for n in range(1, 13))
PAGE = ROOT / "docs" / "performance.md"
PLOTS = ROOT / "docs" / "performance"
ELSEWHERE = " (elsewhere)"
# What is shown beside the systems to say where the time goes: "gRPC alone".
NO_SYSTEM = " alone"

Result = Mapping[str, Any]

HEAD = """\
# Performance

Made by `python -m benchmarks.page` from the dated files in `benchmarks/results/`; do not edit.
Every figure is the median of several runs with the smallest and the largest in brackets. In each round all
cases run in turn, so that they see the same machine; the round before the first is not counted. CPU is of
user and system together, read from the operating system for each process apart.
"""

COMMANDS = """\
## Repeat it

| | |
|---|---|
| `nox -s bench` | all, in a short form: about 15 minutes, with progress |
| `nox -s bench -- P3 P12` | these in full; `--full` without names: all in full, two hours |
| `nox -s bench -- --repeat 3 P1` | with three runs |
| `.nox/bench/bin/python -m benchmarks.page` | this page anew, from the result files |

It needs Java 17 and Maven (Kafka is downloaded once), and for P3 and P12 `redis-server`: Debian's package,
`apt-get install redis-server`; elsewhere Redis 7 with `/etc/redis/redis.conf` in its place. The other systems
come from the locked files `requirements/celery.txt`, `dramatiq.txt` and `taskiq.txt`, each into an
environment of its own.
P2's workers and River in P1 need Go 1.26, which fetches the modules that the `go.sum` files of
`benchmarks/unary/` and `benchmarks/river/` name; without Go, P2's workers are in Python. River needs
PostgreSQL as well, from `apt-get install postgresql` or on the path, and starts a server of its own. Without
them P1 leaves River out and says so.
No figure decides whether a test passes.
"""

SHORT = """\
*Short*: in the short form, with fewer tasks, and where a million rows are named with a quarter of them, as
each section says."""

PITFALLS = """\
## Pitfalls of all of them

- Everything shares the two cores of one machine: Kafka, broker, workers, producers and load generators. A
  figure in tasks/s says what they do together; the CPU a task of each process says whose it is.
- Kafka has one node, no replicas, and the page cache of this machine: a cluster costs a round trip more.
- A virtual machine has neighbours, and at times half its speed, within an hour. Compare within a run; a
  figure of another day is another machine. What a fixed piece of Python took meanwhile is said below each
  table.
- What was "measured elsewhere" was measured by others, or on another day, or with other load generators. It
  is shown for orientation and is in no ratio.
"""


def newest(name: str) -> Result | None:
    """The newest full result of a claim, else the newest short one."""
    full = sorted(RESULTS.glob(f"*-{name.lower()}.json"))
    short = sorted(RESULTS.glob(f"*-{name.lower()}-short.json"))
    found = (full or short)[-1:]
    return json.loads(found[0].read_text()) if found else None


def claim_of(name: str) -> Claim:
    claim = importlib.import_module(f"benchmarks.{name.lower()}").CLAIM
    assert isinstance(claim, Claim)
    return claim


def text(values: Mapping[str, float], digits: int) -> str:
    spread = f" ({values['min']:,.{digits}f} to {values['max']:,.{digits}f})" if values["n"] > 1 else ""
    return f"{values['median']:,.{digits}f}{spread}"


def slower(claim: Claim, result: Result) -> Iterator[str]:
    """Where another system of the same run does better than Penstock."""
    cases = result["cases"].values()
    for case in cases:
        if not case["series"].startswith(OURS):
            continue
        for figure in claim.figures:
            ours = case["figures"].get(figure.name)
            better = [
                (other["figures"][figure.name]["median"], other["series"])
                for other in cases
                if other["group"] == case["group"]
                and not other["series"].startswith(OURS)
                and not other["series"].endswith(NO_SYSTEM)
                and figure.name in other["figures"]
                and ours is not None
                and _is_better(figure, other["figures"][figure.name]["median"], ours["median"])
            ]
            if better and figure.compared:
                others = ", ".join(f"{name} {value:,.{figure.digits}f}" for value, name in sorted(better))
                where = f", {case['group']}" if case["group"] else ""
                # Without what it is measured with: "Penstock + Kafka".
                name = case["series"].partition(" + ")[0]
                yield (
                    f"{claim.name}{where}: {figure.title}: {name} {ours['median']:,.{figure.digits}f};"
                    f" {others}"
                )


def _is_better(figure: Figure, one: float, other: float) -> bool:
    return one > other if figure.more_is_better else one < other


def targets(claim: Claim, result: Result) -> Iterator[str]:
    for target in claim.targets:
        value = target.value(result["cases"])
        if value is None:
            continue
        wanted = f"≥ {target.at_least:,g}" if target.at_least is not None else f"≤ {target.at_most:,g}"
        yield (
            f"| {claim.name}{', short' if result['form'] == 'short' else ''} | {target.text} | {wanted} |"
            f" {_short(value)} |"
            f" {'met' if target.is_met(value) else '**missed**'} |"
        )


def reasons(claim: Claim, result: Result) -> Iterator[str]:
    """Why targets are missed, as far as it was measured."""
    missed: dict[str, list[str]] = {}
    for target in claim.targets:
        value = target.value(result["cases"])
        if value is not None and target.why and not target.is_met(value):
            missed.setdefault(target.why, []).append(target.text)
    for why, texts in missed.items():
        yield f"{claim.name}, {'; '.join(texts)}: {why}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:,.2f}"


def section(claim: Claim, result: Result) -> list[str]:
    figures = [
        figure
        for figure in claim.figures
        if any(figure.name in case["figures"] for case in result["cases"].values())
    ]
    lines = [f"## {claim.name}. {claim.title}", "", claim.how, ""]
    lines += [
        "| | " + " | ".join(figure.title for figure in figures) + " |",
        "|---" * (len(figures) + 1) + "|",
    ]
    for name, case in result["cases"].items():
        values = [
            text(case["figures"][figure.name], figure.digits) if figure.name in case["figures"] else ""
            for figure in figures
        ]
        lines.append(f"| {name} | " + " | ".join(values) + " |")
    for other in claim.elsewhere:
        values = [f"{other.value:,.0f}" if figure.name == other.figure else "" for figure in figures]
        where = f", {other.group}" if other.group else ""
        lines.append(f"| *{other.series}{where} (measured elsewhere)* | " + " | ".join(values) + " |")
    lines += ["", f"![{claim.title}](performance/{claim.name.lower()}.svg)", ""]
    lines += [f"- {line}" for line in (*result.get("notes", ()), *claim.pitfalls)]
    machine, seconds = result["machine"], claim.seconds
    lines += [
        "",
        (
            f"`nox -s bench -- {claim.name}`; about {seconds[0]} s in the short form, {seconds[1]} s in full."
            f" Taken {result['taken']}, {result['form']} form, commit {machine['commit']},"
            f" load average before {machine['load_average']}{_speed(result)}."
        ),
        "",
    ]
    return lines


def _speed(result: Result) -> str:
    speed = result.get("fixed_work_ms")
    return f"; a fixed piece of Python took {text(speed, 1)} ms meanwhile" if speed else ""


def plot(claim: Claim, result: Result) -> None:
    """Bars of the medians, side by side in their groups; the whiskers reach from the least to the most. What
    was measured elsewhere is hatched."""
    shown = [
        figure
        for figure in claim.figures
        if figure.plotted and any(figure.name in case["figures"] for case in result["cases"].values())
    ]
    canvas, axes = plt.subplots(
        1, len(shown), figsize=(5.5 * len(shown), 3.6), squeeze=False, layout="constrained"
    )
    for axis, figure in zip(axes[0], shown, strict=True):
        _bars(axis, claim, result, figure)
    handles, names = axes[0][0].get_legend_handles_labels()
    if len(names) > 1:
        canvas.legend(handles, names, loc="outside lower center", ncols=4, fontsize=7)
    canvas.suptitle(f"{claim.name}. {claim.title}", fontsize=11)
    canvas.savefig(PLOTS / f"{claim.name.lower()}.svg", metadata={"Date": None})
    plt.close(canvas)


def _bars(axis: Any, claim: Claim, result: Result, figure: Figure) -> None:
    cases = [case for case in result["cases"].values() if figure.name in case["figures"]]
    cases += [
        {
            "series": f"{other.series}{ELSEWHERE}",
            "group": other.group,
            "figures": {figure.name: dict.fromkeys(("median", "min", "max"), other.value)},
        }
        for other in claim.elsewhere
        if other.figure == figure.name
    ]
    groups = list(dict.fromkeys(case["group"] for case in cases))
    series = list(dict.fromkeys(case["series"] for case in cases))
    if len(groups) == 1:
        # One bar each, named below it.
        groups, series = series, groups
        places = {(case["group"], case["series"]): case for case in cases}
    else:
        places = {(case["series"], case["group"]): case for case in cases}
    width = 0.8 / len(series)
    for index, one in enumerate(series):
        here = [(x, group) for x, group in enumerate(groups) if (one, group) in places]
        values = [places[one, group]["figures"][figure.name] for _, group in here]
        medians = [value["median"] for value in values]
        below = [value["median"] - value["min"] for value in values]
        above = [value["max"] - value["median"] for value in values]
        at = [x + (index - (len(series) - 1) / 2) * width for x, _ in here]
        bars = axis.bar(at, medians, width * 0.92, yerr=[below, above], capsize=3, label=one or None)
        for bar, (_, group) in zip(bars, here, strict=True):
            if ELSEWHERE in one + group:
                bar.set(facecolor="none", edgecolor="grey", hatch="//")
    slanted = {"rotation": 15, "ha": "right", "rotation_mode": "anchor"} if len(groups) > 3 else {}
    axis.set_xticks(range(len(groups)), groups, fontsize=7, **slanted)
    axis.set_title(figure.title, fontsize=9)
    axis.tick_params(axis="y", labelsize=8)
    if claim.logarithmic:
        axis.set_yscale("log")


def write() -> Path:
    """The page and its plots."""
    found = [(claim_of(name), result) for name in NAMES if (result := newest(name)) is not None]
    if not found:
        raise SystemExit("no results yet: nox -s bench")
    PLOTS.mkdir(exist_ok=True)
    lines = [HEAD, "## Where Penstock is slower or larger than another system", ""]
    lines += [f"- {line}" for claim, result in found for line in slower(claim, result)] or ["- Nowhere."]
    lines += ["", "## Targets", "", SHORT, "", "| | what | target | measured | |", "|---|---|---|---|---|"]
    lines += [line for claim, result in found for line in targets(claim, result)]
    missed = [line for claim, result in found for line in reasons(claim, result)]
    if missed:
        lines += ["", "## Why some are missed", "", *(f"- {line}" for line in missed)]
    lines += ["", COMMANDS, PITFALLS]
    for claim, result in found:
        plot(claim, result)
        lines += section(claim, result)
    lines += ["## The machine", "", "| | |", "|---|---|"]
    machine = found[-1][1]["machine"]
    lines += [f"| {name.replace('_', ' ')} | {value} |" for name, value in machine.items()
              if name not in ("commit", "load_average")]  # fmt: skip
    PAGE.write_text("\n".join(lines) + "\n")
    return PAGE


if __name__ == "__main__":
    print(write())
