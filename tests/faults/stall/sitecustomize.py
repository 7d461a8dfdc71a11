"""On the path of a process under test: SIGUSR2 blocks its main thread, and so its event loop, for a time."""

import os
import signal
import time

signal.signal(signal.SIGUSR2, lambda _number, _frame: time.sleep(float(os.environ["PENSTOCK_TEST_STALL"])))
