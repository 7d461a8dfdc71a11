"""Who may call: the signature of taskbroker v1."""

from __future__ import annotations

import hashlib
import hmac

import pytest

from penstock_broker.auth import authorize

METHOD = "/sentry_protos.taskbroker.v1.ConsumerService/GetTask"
BODY = b"\x0a\x03abc"


def signed(secret: str, method: str = METHOD, body: bytes = BODY) -> list[tuple[str, str | bytes]]:
    """What a v1 client sends, made here from its definition."""
    digest = hmac.new(secret.encode(), method.encode() + b":" + body, hashlib.sha256).hexdigest()
    return [("user-agent", "x"), ("sentry-signature", digest)]


def test_without_a_secret_everyone_may_call() -> None:
    assert authorize([], METHOD, BODY, None)


def test_a_call_signed_with_any_of_the_secrets_goes_on() -> None:
    assert authorize(["new", "old"], METHOD, BODY, signed("new"))
    assert authorize(["new", "old"], METHOD, BODY, signed("old"))
    assert authorize(["new"], METHOD, b"", signed("new", body=b""))
    assert authorize(["schlüssel"], METHOD, BODY, signed("schlüssel"))


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        [],
        [("authorization", "secret")],
        signed("other"),
        signed("secret", method=METHOD.replace("GetTask", "SetTaskStatus")),
        signed("secret", body=BODY + b"x"),
        [("sentry-signature", "")],
        [("sentry-signature", "zz")],
        [("sentry-signature", "ü" * 64)],
        [("sentry-signature", b"\xff" * 32)],
    ],
)
def test_any_other_call_is_refused(metadata: list[tuple[str, str | bytes]] | None) -> None:
    assert not authorize(["secret"], METHOD, BODY, metadata)


def test_health_is_exempt_and_nothing_that_looks_like_it() -> None:
    assert authorize(["secret"], "/grpc.health.v1.Health/Check", b"", None)
    assert authorize(["secret"], "/grpc.health.v1.Health/Watch", b"", None)
    assert not authorize(["secret"], "/grpc.health.v1.HealthX/Check", b"", None)
    assert not authorize(["secret"], "/penstock.v1.ConsumerService/grpc.health.v1.Health/", b"", None)
