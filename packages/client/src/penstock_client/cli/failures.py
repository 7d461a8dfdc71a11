"""What ends a command, and the exit codes."""

from __future__ import annotations

WRONG = 1
USAGE = 2
UNREACHABLE = 3
NOT_FOUND = 4
NOT_CONFIRMED = 5

EXIT_CODES = """Exit codes: 0 done; 1 something is wrong, or not all could be done; 2 the command is wrong;
3 a broker or Kafka cannot be reached, or refuses the call; 4 no such task, namespace or dead letter;
5 not confirmed."""


class Failure(Exception):
    """The text says what happened, ``hint`` what to do next; the command exits with ``code``."""

    def __init__(self, text: str, hint: str = "", code: int = WRONG) -> None:
        super().__init__(text)
        self.text = text
        self.hint = hint
        self.code = code
