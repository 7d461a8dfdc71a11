"""Print what became of each nox session, and one closing line. Exits 1 unless all passed."""

import json
import sys
from pathlib import Path
from typing import Any


def full_name(session: dict[str, Any]) -> str:
    """The name with the Python it runs on, as `nox -s` takes it."""
    return str(session["signatures"][0] if session["signatures"] else session["name"])


def main(report: Path) -> int:
    """Read nox's JSON report; a report that is missing or empty counts as a failure."""
    if not report.exists():
        print("nox wrote no report: it stopped before the first session. Its message is above.")
        return 1
    sessions = json.loads(report.read_text())["sessions"]
    print()
    for session in sessions:
        print(f"  {session['result']:<8} {full_name(session):<10} {session.get('duration', 0):6.0f} s")
    results = [session["result"] for session in sessions]
    passed, skipped = results.count("success"), results.count("skipped")
    failed = len(results) - passed - skipped
    for session in sessions:
        name = full_name(session)
        if session["result"] == "skipped":
            print(f"\n*** {name} DID NOT RUN: no such Python was found. Next: install it, make test ***")
        elif session["result"] != "success":
            print(f"\n{name} failed. Again, alone: .nox/tools/bin/nox -s {name}")
    print(f"\nsessions: {passed} passed, {failed} failed, {skipped} skipped")
    return 0 if passed and not failed else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
