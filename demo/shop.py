"""The application whose tasks `make demo` runs. One of your own looks much the same."""

from __future__ import annotations

import time

import starts

from penstock_client import App, Fixed, Retry, TaskContext

# The broker's address is in PENSTOCK_BROKER; App("shop", kafka="host:9092") would send through Kafka.
app = App("shop", strict_kwargs="off")

orders = app.namespace("orders", retry=None)
payments = app.namespace("payments", retry=Retry(max_attempts=5, backoff=Fixed(0.3)))
papers = app.namespace("papers", retry=Retry(max_attempts=3, backoff=Fixed(0.2)))


class BankUnreachable(Exception):
    """The kind of failure that goes away."""


@orders.task(name="orders.confirm", bind=True)
def confirm(ctx: TaskContext, order: int, stage: str) -> None:
    """Quick, as most tasks are."""
    starts.note(ctx, stage)


@orders.task(name="orders.thank", bind=True)
def thank(ctx: TaskContext, order: int) -> None:
    """Sent with a countdown."""
    starts.note(ctx, "delayed")


@payments.task(name="payments.charge", bind=True)
def charge(ctx: TaskContext, order: int) -> None:
    """Fails twice, then succeeds."""
    starts.note(ctx, "payments")
    if ctx.attempt < 3:
        raise BankUnreachable(f"order {order}: no answer from the bank")


@papers.task(name="papers.scan", bind=True)
def scan(ctx: TaskContext, page: int) -> None:
    """Takes a while."""
    starts.note(ctx, "slow")
    time.sleep(0.2)


@papers.task(name="papers.invoice", bind=True)
def invoice(ctx: TaskContext, customer: int) -> None:
    """Can never succeed."""
    starts.note(ctx, "hopeless")
    raise ValueError(f"customer {customer} has no address")


@papers.task(name="papers.forecast", bind=True, retry=None, deadline=1)
def forecast(ctx: TaskContext) -> None:
    """Never comes back: its process is killed at the deadline, and replaced."""
    starts.note(ctx, "stuck")
    time.sleep(3600)
