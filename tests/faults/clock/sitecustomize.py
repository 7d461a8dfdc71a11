"""On the path of a process under test: its wall clock is off by what PENSTOCK_TEST_CLOCK says at the moment.

Python's own only: what libraries in C read, and every monotonic clock, stays true, as it does when
somebody sets the clock of a machine. So it does for gRPC: of this clock it makes deadlines, and leaves
it to its C core to compare them with the true one.
"""

import os
import sys
import time
from pathlib import Path

_file = Path(os.environ["PENSTOCK_TEST_CLOCK"])
_true_ns = time.time_ns


def _time_ns() -> int:
    return _true_ns() + int(_file.read_text()) * 1_000_000_000


def _time() -> float:
    caller = sys._getframe(1).f_globals.get("__name__", "")
    return (_true_ns() if caller.startswith("grpc.") else _time_ns()) / 1e9


time.time_ns = _time_ns
time.time = _time
