"""The command ``penstock``; needs the extra ``cli``."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line; what a person can correct ends in a message and an exit code."""
    try:
        from penstock_client.cli import commands
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "grpc", "click"):
            raise
        print(
            f"penstock: the command needs {error.name}: pip install 'penstock-client[cli]'", file=sys.stderr
        )
        sys.exit(2)
    commands.main()
