"""The command `penstock-broker`, also as `python -m penstock_broker`."""

from __future__ import annotations

import sys


def main() -> None:
    # structlog imports rich where it finds it, and typer brings it: 6 MB and a tenth of a second in each
    # process, for tracebacks that are never shown here.
    sys.modules["rich"] = None  # type: ignore[assignment]
    import structlog  # noqa: F401

    del sys.modules["rich"]
    if sys.argv[1:] == ["serve"]:
        from penstock_broker.serving import main
    else:
        from penstock_broker.cli import main

    main()


if __name__ == "__main__":
    main()
