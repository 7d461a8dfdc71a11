"""Plant each bug in a copy of its package, and demand that the tests named for it fail, and without it pass.

python -m tests.planted [--jobs N] [WORD ...]     only the bugs with one of these words in their name

Exit code 1 when a bug survived, or a test failed for another reason than the bug.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, STDOUT

from tests.planted.bug import ROOT, Bug, StaleBug, source_of
from tests.planted.bugs import BUGS

TEST_SECONDS_MAX = 20
RUN_SECONDS_MAX = 300
# Of tests that wait in vain: what they have started may wait with them.
HANG_SECONDS_MAX = 120
# A broken promise shows as one of these; the last two are invariants that the product watches itself,
# and anything else is broken code.
BROKEN_PROMISE = ("AssertionError", "IllegalTransition", "Malformed")


@dataclass(frozen=True)
class Verdict:
    """``caught``: the test that noticed; empty when none did, and then ``problem`` says what happened."""

    what: str
    seconds: float
    caught: str = ""
    problem: str = ""


def run_tests(
    tests: Iterable[str], package: str, source: Path, seconds_max: float = RUN_SECONDS_MAX
) -> dict[str, list[list[str]] | str | None]:
    """What tests/planted/verdict.py tells of a run of ``tests`` with ``source`` before the package's own."""
    with tempfile.NamedTemporaryFile(suffix=".json") as told:
        environment = os.environ | {
            "PYTHONPATH": str(source),
            "PLANTED_PACKAGE": package,
            "PLANTED_VERDICT": told.name,
        }
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "tests.planted.verdict",
            "-p",
            "no:cacheprovider",
        ]
        command += ["--hypothesis-profile=planted", f"--timeout={TEST_SECONDS_MAX}", *tests]
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=PIPE, stderr=STDOUT, text=True, start_new_session=True
        ) as run:
            try:
                output, _ = run.communicate(timeout=seconds_max)
            finally:
                # What the tests have started goes with them.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(run.pid, signal.SIGKILL)
        try:
            return dict(json.load(told))
        except ValueError:
            return {"failures": [["", "no verdict", output[-500:]]], "passed": []}


def plant(bug: Bug) -> Verdict:
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="planted-", ignore_cleanup_errors=True) as scratch:
        source = Path(scratch) / "src"
        try:
            shutil.copytree(source_of(bug.package), source, ignore=shutil.ignore_patterns("__pycache__"))
            (source / bug.module).write_text(bug.planted())
            limit = HANG_SECONDS_MAX if bug.hangs else RUN_SECONDS_MAX
            told = run_tests(bug.tests, bug.package, source, limit)
        except subprocess.TimeoutExpired:
            if bug.hangs:
                waited = f"{bug.tests[0].rpartition('/')[2]} (waits in vain)"
                return Verdict(bug.name, time.monotonic() - begun, caught=waited)
            return Verdict(bug.name, time.monotonic() - begun, problem="the run took too long")
        except StaleBug as stale:
            return Verdict(bug.name, 0.0, problem=str(stale))
        seconds = time.monotonic() - begun
        # None: only what the tests started has imported it, with the same path.
        imported = told.get("imported")
        if imported is not None and not str(imported).startswith(scratch):
            problem = f"the tests ran without the changed package: {told}"
            return Verdict(bug.name, seconds, problem=problem)
        return judge(bug, seconds, told["failures"])  # type: ignore[arg-type]


def judge(bug: Bug, seconds: float, failures: Sequence[Sequence[str]]) -> Verdict:
    for test, kind, text in failures:
        promised = kind in BROKEN_PROMISE or (kind == "Failed" and text.startswith("DID NOT RAISE"))
        if promised or (bug.hangs and kind == "Failed" and text.startswith("Timeout")):
            return Verdict(bug.name, seconds, caught=test.rpartition("/")[2])
    if failures:
        test, kind, text = failures[0]
        return Verdict(bug.name, seconds, problem=f"failed for another reason: {test}: {kind}: {text}")
    return Verdict(bug.name, seconds, problem="SURVIVED")


def without(file: str, tests: Sequence[str]) -> Verdict:
    """The tests pass when nothing is planted."""
    begun = time.monotonic()
    package = file.split("/")[1] if file.startswith("packages/") else "broker"
    told = run_tests(tests, package, source_of(package))
    failures = told["failures"]
    problem = "" if told["passed"] and not failures else f"fails without any bug: {failures}"
    return Verdict(f"no bug, {Path(file).name}", time.monotonic() - begun, caught="passes", problem=problem)


def main() -> int:
    parser = argparse.ArgumentParser(prog="planted", description=__doc__.partition("\n")[0])
    parser.add_argument("words", nargs="*", help="only bugs with one of these words in their name")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="bugs at a time")
    chosen = parser.parse_args()
    bugs = [b for b in BUGS if not chosen.words or any(word in b.name for word in chosen.words)]
    if not bugs:
        print("no bug has such a name")
        return 1
    by_file: dict[str, set[str]] = {}
    for bug in bugs:
        for test in bug.tests:
            by_file.setdefault(test.partition("::")[0], set()).add(test)

    verdicts: dict[str, Verdict] = {}
    clean: list[Verdict] = []
    begun = time.monotonic()
    with ThreadPoolExecutor(chosen.jobs) as pool:
        baseline = {pool.submit(without, file, sorted(tests)) for file, tests in by_file.items()}
        runs = baseline | {pool.submit(plant, bug) for bug in bugs}
        for n, future in enumerate(as_completed(runs), 1):
            verdict = future.result()
            if future in baseline:
                clean.append(verdict)
            else:
                verdicts[verdict.what] = verdict
            result = verdict.problem or verdict.caught
            print(f"[{n}/{len(runs)}] {verdict.seconds:5.1f} s  {verdict.what}: {result}", flush=True)

    print_table(bugs, verdicts)
    survived = [v for v in verdicts.values() if not v.caught]
    broken = [v for v in clean if v.problem]
    print(
        f"\n{len(bugs) - len(survived)} of {len(bugs)} bugs caught, in {time.monotonic() - begun:.0f} s"
        f" with {chosen.jobs} at a time"
    )
    for verdict in (*broken, *survived):
        print(f"NOT SHOWN: {verdict.what}: {verdict.problem}")
    return 1 if survived or broken else 0


def print_table(bugs: Sequence[Bug], verdicts: dict[str, Verdict]) -> None:
    print(f"\n| {'bug':60} | promise it breaks | caught by | s |\n|---|---|---|---|")
    for bug in bugs:
        verdict = verdicts[bug.name]
        print(
            f"| {bug.name:60} | {bug.promise} | {verdict.caught or verdict.problem} | {verdict.seconds:.1f} |"
        )


if __name__ == "__main__":
    sys.exit(main())
