"""``python -m penstock_broker``: the same as ``penstock-broker``."""

from penstock_broker.cli import main

if __name__ == "__main__":
    main()
