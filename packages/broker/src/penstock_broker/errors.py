"""What ends the broker, said so that an operator knows what to do."""

from __future__ import annotations


class FatalError(Exception):
    """The broker cannot start or go on.

    ``message`` says what is wrong and which thing it concerns, ``hint`` what to do about it (empty
    when there is nothing to add). The command line prints both, without a traceback, and exits with
    ``exit_code``.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "", *, exit_code: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if exit_code is not None:
            self.exit_code = exit_code

    def __str__(self) -> str:
        return f"{self.message}: {self.hint}" if self.hint else self.message


class OldDatabase(FatalError):
    """The database is not the one that the ledger knows: an old copy, or another broker's."""


class Replaced(FatalError):
    """The broker's tasks were taken over, by an adoption or a new disk: it must not go on with its own."""


class ConfigError(FatalError):
    """The settings are wrong; ``problems`` has one text for each thing to correct."""

    exit_code = 2

    def __init__(self, problems: list[str], hint: str = "") -> None:
        super().__init__("\n".join(problems), hint)
        self.problems = problems
