"""Measure, and make docs/performance.md anew: ``python -m benchmarks [--short] [P1 P3 ...]``."""

from __future__ import annotations

import argparse
import os
import time

from benchmarks import page
from benchmarks.harness import measure, save, say, session, summary


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("claims", nargs="*", metavar="P1", help="all if none is named")
    parser.add_argument("--full", action="store_true", help="in full, although none is named")
    parser.add_argument("--short", action="store_true", help="short, although some are named")
    parser.add_argument("--repeat", type=int, help="runs of each case")
    options = parser.parse_args()
    # As it is where they are used: nothing that was imported before is parsed again.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    wanted = [name.upper() for name in options.claims] or list(page.NAMES)
    if unknown := [name for name in wanted if name not in page.NAMES]:
        parser.error(f"{', '.join(unknown)}: there are {page.NAMES[0]} to {page.NAMES[-1]}")
    short = options.short or not (options.claims or options.full)
    claims = [page.claim_of(name) for name in wanted]
    left = [claim.seconds[0 if short else 1] for claim in claims]
    started = time.monotonic()
    with session(short, options.repeat) as bench:
        for number, claim in enumerate(claims):
            gone, to_go = clock(time.monotonic() - started), clock(sum(left[number:]))
            say(
                f"{claim.name}: {claim.title}   [{number + 1} of {len(claims)}; {gone} gone, about {to_go}"
                f" to go]"
            )
            result = measure(claim, bench)
            say(summary(claim, result))
            say(f"    {result['seconds']} s; {save(claim.name, result['form'], result)}\n")
    say(f"written: {page.write()}")


if __name__ == "__main__":
    main()
