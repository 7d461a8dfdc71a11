"""What was executed: every child process appends the start and the end of each task to a file of its own."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path


@dataclass(slots=True)
class Run:
    """One execution. Times are epoch seconds; ``ended`` is None when it did not return."""

    id: str
    attempt: int
    pid: int
    began: float
    taskname: str
    ended: float | None = None


class Ledger:
    """Reads what was appended since it last looked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs: defaultdict[str, list[Run]] = defaultdict(list)
        self.ended: set[str] = set()
        self._read: dict[Path, int] = {}

    def refresh(self) -> Ledger:
        for page in self.folder.iterdir():
            with page.open("rb") as file:
                file.seek(self._read.get(page, 0))
                # Lines are written whole.
                lines = file.read().splitlines()
                self._read[page] = file.tell()
            for line in lines:
                self._enter(*line.decode().split(" "))
        return self

    def _enter(self, what: str, id: str, attempt: str, pid: str, at: str, taskname: str) -> None:
        if what == "began":
            self.runs[id].append(Run(id, int(attempt), int(pid), float(at), taskname))
            return
        for run in reversed(self.runs[id]):
            if run.pid == int(pid) and run.ended is None:
                run.ended = float(at)
        self.ended.add(id)

    def repeated(self) -> dict[str, list[Run]]:
        """Executions of one attempt that was started more than once, by id."""
        repeated = {}
        for id, runs in self.runs.items():
            attempts = [run.attempt for run in runs]
            if len(attempts) != len(set(attempts)):
                repeated[id] = runs
        return repeated
