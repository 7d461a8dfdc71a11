"""P6: how late delayed tasks and retries start, with 100,000 of them waiting; and that none is early."""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from pathlib import Path

from benchmarks.harness import Bench, Case, Claim, Figure, Figures, Target, in_a_quiet_hour, percentile
from benchmarks.marks import milliseconds
from benchmarks.systems import penstock

RETRIES_PER_SECOND = 50
# The last are sent well before the first are due.
FIRST_SECONDS = 20


def late(bench: Bench, waiting: int, due: int, seconds: int) -> Figures:
    """``due`` of the ``waiting`` rows come due within ``seconds``; the others in an hour."""
    with penstock(bench) as system:
        failures = Path(system.marks.parent) / "failures"
        retries = RETRIES_PER_SECOND * seconds
        system.producer(due + retries, waiting - due, seconds, failures, module="benchmarks.p6").go().result()
        system.wait_for_marks(FIRST_SECONDS + seconds + 60)
        lateness = [ms for ms in milliseconds(system.marks) if ms]
        return {
            "early": sum(ms < 0 for ms in lateness),
            "p50_ms": percentile(lateness, 0.5),
            "p99_ms": percentile(lateness, 0.99),
            "max_ms": max(lateness),
            "tasks": len(lateness),
        }


def send() -> None:
    """``python -m benchmarks.p6 TASKS WAITING SECONDS FAILURES``: the producer."""
    from benchmarks.tasks import again, app, due, noop

    tasks, waiting, seconds, failures = (
        int(sys.argv[1]),
        int(sys.argv[2]),
        int(sys.argv[3]),
        Path(sys.argv[4]),
    )
    retries = RETRIES_PER_SECOND * seconds
    count = tasks - retries
    noop.delay(0).wait(60)
    failures.write_bytes(bytes(8 * retries))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    hour = due.options(countdown=3600)
    for _ in range(waiting):
        hour.delay(0.0)
    begun = time.time()
    countdowns = [due.options(countdown=FIRST_SECONDS + n) for n in range(seconds)]
    for n in range(count):
        # Whole seconds after the call: sent over a second, they come due all over the seconds.
        time.sleep(max(0.0, begun + n / count - time.time()))
        countdown = FIRST_SECONDS + n % seconds
        countdowns[n % seconds].delay(time.time() + countdown)
    time.sleep(max(0.0, begun + FIRST_SECONDS - time.time()))
    for n in range(retries):
        time.sleep(max(0.0, begun + FIRST_SECONDS + n / RETRIES_PER_SECOND - time.time()))
        again.delay(str(failures), n)
    app.flush(60)
    sys.stdout.write(json.dumps({}) + "\n")


def cases(bench: Bench) -> list[Case]:
    if bench.short:
        return [Case("Penstock", "", partial(late, waiting=100_000, due=10_000, seconds=10))]
    return [Case("Penstock", "", partial(late, waiting=100_000, due=100_000, seconds=100))]


CLAIM = Claim(
    name="P6",
    title="Delays and retries: never early, hardly late",
    how="100,000 delayed tasks wait and come due at 1,000 a second, the times spread over the seconds;"
    " beside them 50"
    " tasks a second fail once and are retried after 2 s. Measured is the first line of the function against"
    " the time it was due.",
    figures=(
        Figure("early", "started early", plotted=False, digits=0),
        Figure("p50_ms", "p50 late, ms"),
        Figure("p99_ms", "p99 late, ms", plotted=True),
        Figure("max_ms", "latest, ms"),
        Figure("tasks", "tasks measured", digits=0),
    ),
    cases=cases,
    targets=(
        Target("started early", "Penstock", "early", at_most=0),
        Target("p99 late, in ms", "Penstock", "p99_ms", at_most=20, why=in_a_quiet_hour("9.9 ms")),
    ),
    pitfalls=(
        (
            "A retry is due its back-off after the exception was raised; the way of the report to the"
            " broker is"
            " in the figure."
        ),
        "In the short form 10,000 of the 100,000 come due, over 10 s.",
    ),
    seconds=(100, 900),
    warm_up=False,
)

if __name__ == "__main__":
    send()
