"""The signature of a call, as taskbroker v1 defines it."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

# Metadata key that carries it.
HEADER = "sentry-signature"


def sign(secret: str, method_path: str, body: bytes) -> str:
    """Hex HMAC-SHA256 over ``method_path + ":" + body``; the path is ``/package.Service/Method``."""
    return hmac.new(secret.encode(), method_path.encode() + b":" + body, hashlib.sha256).hexdigest()


def verify(secrets: Sequence[str], method_path: str, body: bytes, signature: str) -> bool:
    """Whether any of ``secrets`` made ``signature``. Takes the same time wherever they differ."""
    given = signature.encode("utf-8", "surrogatepass")
    expected = [sign(secret, method_path, body).encode() for secret in secrets]
    # All are compared, so that the time does not tell which one it was.
    return sum(hmac.compare_digest(e, given) for e in expected) > 0
