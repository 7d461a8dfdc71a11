"""Programs of benchmarks that are written in Go: built once in a session, where there is Go."""

from __future__ import annotations

import subprocess
from pathlib import Path

from benchmarks.harness import Bench, say
from benchmarks.processes import find

FOLDER = Path(__file__).parent


def program(bench: Bench, name: str) -> Path | None:
    """What the sources in the folder ``name`` become; None without Go, or without their modules."""
    found = bench.keep(f"go {name}", lambda: _build(bench, name))
    assert found is None or isinstance(found, Path)
    return found


def _build(bench: Bench, name: str) -> Path | None:
    go, built = _go(), bench.folder / name
    if go is None:
        return None
    say(f"  building {name} ...")
    command = [str(go), "build", "-buildvcs=false", "-o", str(built), "."]
    return None if subprocess.run(command, cwd=FOLDER / name, check=False).returncode else built


def said(name: str, *arguments: str) -> str:
    """What the command go says in the folder ``name``."""
    command = [str(_go()), *arguments]
    done = subprocess.run(command, cwd=FOLDER / name, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _go() -> Path | None:
    return find("go", "/usr/local/go/bin")
