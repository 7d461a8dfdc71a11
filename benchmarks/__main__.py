"""``python -m benchmarks [--short] [P1 P3 ...]``: measure, write the results down, make docs/performance.md anew."""

from __future__ import annotations

import argparse
import importlib
import time

from benchmarks.harness import Claim, measure, save, say, session, summary

NAMES = tuple(f"P{n}" for n in range(1, 13))


def load_claim(name: str) -> Claim:
    claim = importlib.import_module(f"benchmarks.{name.lower()}").CLAIM
    assert isinstance(claim, Claim)
    return claim


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("claims", nargs="*", metavar="P1", help="all if none is named")
    parser.add_argument("--short", action="store_true", help="small and quick: minutes instead of hours")
    options = parser.parse_args()
    wanted = [name.upper() for name in options.claims] or list(NAMES)
    if unknown := [name for name in wanted if name not in NAMES]:
        parser.error(f"{', '.join(unknown)}: there are {NAMES[0]} to {NAMES[-1]}")
    claims = [load_claim(name) for name in wanted]
    left = [claim.seconds[0 if options.short else 1] for claim in claims]
    started = time.monotonic()
    with session(options.short) as bench:
        for number, claim in enumerate(claims):
            say(
                f"{claim.name}: {claim.title}   [{number + 1} of {len(claims)}; {clock(time.monotonic() - started)}"
                f" gone, about {clock(sum(left[number:]))} to go]"
            )
            result = measure(claim, bench)
            say(summary(claim, result))
            say(f"    {result['seconds']} s; {save(claim.name, result['form'], result)}\n")


if __name__ == "__main__":
    main()
