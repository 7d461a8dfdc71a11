"""Draws the table of transitions: ``python -m penstock_broker.domain.document > docs/lifecycle.md``."""

from __future__ import annotations

import sys

from penstock_broker.domain.activation import Status
from penstock_broker.domain.lifecycle import TRANSITIONS

_HEAD = """\
# The life of an activation

Drawn from the table in `penstock_broker/domain/lifecycle.py` by `python -m penstock_broker.domain.document`;
a test checks that the two agree. *Gone* means that the row has left the store; its id is remembered for the
de-duplication window.

| status | meaning |
|---|---|
| pending | may be claimed now |
| delayed | waits for its delay, or for the back-off of a retry |
| processing | claimed: has a claim token, a lease and a deadline |
| forwarding | must leave through Kafka: dead letter, retry with a topic, overflow, handed over |
| gone | done, discarded, cancelled, or forwarded |
"""


def draw() -> str:
    """The document, as Markdown."""
    arrows: dict[tuple[Status, Status], list[str]] = {}
    lines = []
    for (status, event), transition in TRANSITIONS.items():
        targets = sorted(transition.to)
        for target in targets:
            arrows.setdefault((status, target), []).append(event.value)
        to = " or ".join(_name(target) for target in targets)
        lines.append(f"| {_name(status)} | {event.value} | {to} | {transition.why} |")
    diagram = [
        f"    {_name(status)} --> {_end(target)}: {', '.join(events)}"
        for (status, target), events in sorted(arrows.items())
    ]
    return "\n".join(
        [
            _HEAD,
            "```mermaid",
            "stateDiagram-v2",
            "    [*] --> pending: stored",
            "    [*] --> delayed: stored with a delay",
            "    [*] --> forwarding: poison, expired on arrival, or overflow",
            *diagram,
            "```",
            "",
            "| from | event | to | why |",
            "|---|---|---|---|",
            *lines,
            "",
        ]
    )


def _name(status: Status) -> str:
    return status.name.lower()


def _end(status: Status) -> str:
    return "[*]" if status is Status.GONE else _name(status)


if __name__ == "__main__":
    sys.stdout.write(draw())
