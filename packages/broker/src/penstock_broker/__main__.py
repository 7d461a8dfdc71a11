"""``python -m penstock_broker``: the same as ``penstock-broker``."""

from penstock_broker.cli import main

main()
