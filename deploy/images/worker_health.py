"""Exits 0 while the worker whose metrics are at the given port has children that execute or are ready to."""

import sys
from urllib.error import URLError
from urllib.request import urlopen

SLOTS = "penstock_worker_slots{"
READY = ('state="idle"', 'state="busy"')

address = f"http://127.0.0.1:{sys.argv[1]}/metrics"
try:
    with urlopen(address, timeout=2) as answer:
        lines = answer.read().decode().splitlines()
except URLError as error:
    sys.exit(f"{address}: {error.reason}")
slots = [line for line in lines if line.startswith(SLOTS)]
if not any(state in line and float(line.rpartition(" ")[2]) > 0 for line in slots for state in READY):
    sys.exit("no child process is ready: " + ("; ".join(slots) or "none has been started"))
