"""Running commands in environments other than that of the tests."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command: str | Path, cwd: Path = ROOT, env: dict[str, str] | None = None) -> str:
    """Run to the end and return what it printed; a failure shows everything."""
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=240
    )
    if done.returncode:
        pytest.fail(f"{command} exited {done.returncode}\n{done.stdout}\n{done.stderr}", pytrace=False)
    return done.stdout


def distributions(python: Path) -> set[str]:
    """What is installed for this interpreter, by normalized name."""
    listing = "import importlib.metadata as m; print(*{d.name.lower() for d in m.distributions()}, sep='\\n')"
    return {name.replace("_", "-") for name in run(python, "-I", "-c", listing).split()}
