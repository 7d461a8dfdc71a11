"""Runs tasks: fetches them from brokers, executes them in child processes, reports the outcome."""

__version__ = "0.1.0"
