"""Exits 0 while the worker on this machine has child processes that execute or are ready to."""

import sys
from urllib.request import urlopen

SLOTS = "penstock_worker_slots{"
READY = ('state="idle"', 'state="busy"')

with urlopen("http://127.0.0.1:51052/metrics", timeout=2) as answer:
    lines = answer.read().decode().splitlines()
slots = [line for line in lines if line.startswith(SLOTS)]
if not any(state in line and float(line.rpartition(" ")[2]) > 0 for line in slots for state in READY):
    sys.exit("no child process is ready: " + ("; ".join(slots) or "none has been started"))
