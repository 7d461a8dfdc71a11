from __future__ import annotations

import pytest

from penstock_worker.settings import Settings, SettingsError, parse_brokers, secret_from, split_app_path


def test_brokers_in_order_each_once() -> None:
    assert parse_brokers("b:50051, a:1,b:50051,[::1]:9") == ("b:50051", "a:1", "[::1]:9")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "is empty"),
        (" , ", "is empty"),
        ("broker", "'broker' has no port"),
        ("::1:50051", "'::1:50051' has no port"),
        (":50051", "':50051' has no port"),
        ("a:1,b:x", "'b:x' has the port 'x'"),
        ("a:0", "'a:0' has the port '0'"),
        ("a:70000", "'a:70000' has the port '70000'"),
        ("http://a:1", "'http://a:1' has a scheme or a path"),
    ],
)
def test_what_is_no_address_is_named(text: str, part: str) -> None:
    with pytest.raises(SettingsError, match="--rpc-host-list") as raised:
        parse_brokers(text)
    assert part in str(raised.value)


@pytest.mark.parametrize(
    ("environment", "secret"),
    [
        ({}, None),
        ({"TASKBROKER_GRPC_SHARED_SECRET": ""}, None),
        ({"TASKBROKER_GRPC_SHARED_SECRET": "a"}, "a"),
        ({"PENSTOCK_GRPC_SHARED_SECRET": "b"}, "b"),
        ({"TASKBROKER_GRPC_SHARED_SECRET": '["new", "old"]', "PENSTOCK_GRPC_SHARED_SECRET": "b"}, "new"),
        ({"TASKBROKER_GRPC_SHARED_SECRET": "[]"}, None),
        # As brokers read the same variable.
        ({"TASKBROKER_GRPC_SHARED_SECRET": "new, old"}, "new"),
    ],
)
def test_secret(environment: dict[str, str], secret: str | None) -> None:
    assert secret_from(environment) == secret


@pytest.mark.parametrize("text", ["[x", "[1]", '[""]', "\udcff", '["\\ud800"]'])
def test_a_broken_list_of_secrets_is_refused_without_showing_it(text: str) -> None:
    with pytest.raises(SettingsError, match="TASKBROKER_GRPC_SHARED_SECRET") as raised:
        secret_from({"TASKBROKER_GRPC_SHARED_SECRET": text})
    assert text not in str(raised.value)


@pytest.mark.parametrize(
    "path", ["shop", "shop:", ":app", "shop/tasks.py:app", "shop:a.b", "a..b:app", "shop app"]
)
def test_the_form_is_explained(path: str) -> None:
    with pytest.raises(SettingsError, match="write MODULE:APP"):
        split_app_path(path)


def test_the_secret_is_not_shown() -> None:
    settings = Settings("shop:app", ("127.0.0.1:1",), 1, secret="canary-3f9a")
    assert "canary" not in f"{settings!r} {settings}"
