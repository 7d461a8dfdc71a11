"""The signature of a call."""

from __future__ import annotations

import hashlib
import hmac

from hypothesis import given
from hypothesis import strategies as st

from penstock_protocol.signature import sign, verify

METHOD = "/sentry_protos.taskbroker.v1.ConsumerService/GetTask"


def test_it_is_the_definition_of_taskbroker_v1() -> None:
    expected = hmac.new(b"secret", METHOD.encode() + b":" + b"body", hashlib.sha256).hexdigest()
    assert sign("secret", METHOD, b"body") == expected


@given(st.text(), st.binary())
def test_any_of_the_secrets_may_have_signed(secret: str, body: bytes) -> None:
    signature = sign(secret, METHOD, body)
    assert verify(["older" + secret, secret], METHOD, body, signature)
    assert not verify(["other" + secret], METHOD, body, signature)
    assert not verify([secret], METHOD + "s", body, signature)
    assert not verify([secret], METHOD, body + b"x", signature)
    assert not verify([secret], METHOD, body, signature[:-1])
    assert not verify([secret], METHOD, body, "")
    assert not verify([], METHOD, body, signature)


def test_a_signature_of_strange_characters_is_only_wrong() -> None:
    assert not verify(["secret"], METHOD, b"", "ü\ud800")
