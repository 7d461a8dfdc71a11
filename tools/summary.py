"""Print what became of each nox session, and one closing line. Exits 1 unless all passed."""

import json
import sys
from pathlib import Path


def main(report: Path) -> int:
    """Read nox's JSON report; a report that is missing or empty counts as a failure."""
    if not report.exists():
        print("nox wrote no report: it stopped before the first session. Its message is above.")
        return 1
    sessions = json.loads(report.read_text())["sessions"]
    print()
    for session in sessions:
        print(f"  {session['result']:<8} {session['name']:<10} {session.get('duration', 0):6.0f} s")
    results = [session["result"] for session in sessions]
    passed, skipped = results.count("success"), results.count("skipped")
    failed = len(results) - passed - skipped
    for session in sessions:
        if session["result"] == "skipped":
            print(f"\n*** {session['name']} DID NOT RUN: its Python is not on this machine. CI requires it. ***")
        elif session["result"] != "success":
            print(f"\n{session['name']} failed. Again, alone: .nox/tools/bin/nox -s {session['name']}")
    print(f"\nsessions: {passed} passed, {failed} failed, {skipped} skipped")
    return 0 if passed and not failed else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
