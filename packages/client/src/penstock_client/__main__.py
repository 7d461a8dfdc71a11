"""``python -m penstock_client``: the command ``penstock``."""

from penstock_client.cli import main

main()
