"""A planted bug: a small change to the product that breaks a promise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
BROKER = "packages/broker/tests/"
CLIENT = "packages/client/tests/"
WORKER = "packages/worker/tests/"
PROTOCOL = "packages/protocol/tests/"


class StaleBug(Exception):
    """The text that a bug replaces is not in its file exactly once."""


@dataclass(frozen=True)
class Bug:
    """``file``: package/path of a module, as in "broker/store/writer.py". ``tests``: what is to fail.

    ``hangs``: what it breaks is that something happens at all; a test that waits in vain has caught it.
    """

    name: str
    promise: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    hangs: bool = False

    @property
    def package(self) -> str:
        return self.file.partition("/")[0]

    @property
    def module(self) -> Path:
        """The file to change, below the package's ``src``."""
        package, _, rest = self.file.partition("/")
        return Path(f"penstock_{package}") / rest

    def planted(self) -> str:
        """The module's text with the bug in it. Raises StaleBug when the product has moved on."""
        text = (source_of(self.package) / self.module).read_text()
        if (found := text.count(self.old)) != 1:
            raise StaleBug(
                f"{self.name}: its old text is {found} times in {self.file}, not once:\n{self.old}"
            )
        return text.replace(self.old, self.new)


def source_of(package: str) -> Path:
    return ROOT / "packages" / package / "src"
