"""The signature of a call, as taskbroker v1 defines it."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Sequence

# Metadata key that carries it.
HEADER = "sentry-signature"


def secrets_in(text: str) -> list[str]:
    """The secrets in a setting: one, several with commas between, or a JSON list. The first signs.

    Raises ValueError, which does not show them.
    """
    text = text.strip()
    if text.startswith("["):
        try:
            secrets = json.loads(text)
        except ValueError:
            secrets = [None]
        if not all(isinstance(secret, str) and secret for secret in secrets):
            raise ValueError('it is neither a secret nor a JSON list of secrets like ["a", "b"]')
    else:
        secrets = [part.strip() for part in text.split(",") if part.strip()]
    try:
        "".join(secrets).encode()
    except UnicodeEncodeError:
        raise ValueError("it is not UTF-8") from None
    return list(secrets)


def sign(secret: str, method_path: str, body: bytes) -> str:
    """Hex HMAC-SHA256 over ``method_path + ":" + body``; the path is ``/package.Service/Method``."""
    return hmac.new(secret.encode(), method_path.encode() + b":" + body, hashlib.sha256).hexdigest()


def verify(secrets: Sequence[str], method_path: str, body: bytes, signature: str) -> bool:
    """Whether any of ``secrets`` made ``signature``. Takes the same time wherever they differ."""
    given = signature.encode("utf-8", "surrogatepass")
    expected = [sign(secret, method_path, body).encode() for secret in secrets]
    # All are compared, so that the time does not tell which one it was.
    return sum(hmac.compare_digest(e, given) for e in expected) > 0
