"""Who may call: the signature of a call against the shared secrets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from penstock_protocol import signature

HEALTH_PREFIX = "/grpc.health.v1.Health/"

Metadata = Iterable[tuple[str, str | bytes]]


def authorize(secrets: Sequence[str], method_path: str, body: bytes, metadata: Metadata | None) -> bool:
    """Whether a call may go on.

    ``secrets`` are those configured, any of which may have signed; without one everyone may call, and
    the settings have seen to it that only this machine can. ``method_path`` is the full one, as in
    ``/package.Service/Method``; ``body`` is the request as it came, before any parsing. Health is
    never signed: orchestrators ask for it.
    """
    if not secrets or method_path.startswith(HEALTH_PREFIX):
        return True
    given = next((value for key, value in metadata or () if key == signature.HEADER), None)
    return isinstance(given, str) and signature.verify(secrets, method_path, body, given)
