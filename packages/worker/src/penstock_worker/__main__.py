"""The command `penstock-worker`, also as `python -m penstock_worker`."""

from __future__ import annotations

import sys

from penstock_worker.settings import HANDED_OVER


def main() -> None:
    # structlog imports rich where it finds it, and typer brings it: 6 MB and a tenth of a second in each
    # process, for tracebacks that are never shown here.
    sys.modules["rich"] = None  # type: ignore[assignment]
    import structlog  # noqa: F401

    del sys.modules["rich"]
    if sys.argv[1:2] == [HANDED_OVER]:
        from penstock_worker.running import run

        run(sys.argv[2])
    else:
        from penstock_worker.cli import main

        main()


if __name__ == "__main__":
    main()
