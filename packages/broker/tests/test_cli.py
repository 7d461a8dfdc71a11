"""The command line, as real processes where exit codes and streams matter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
import yaml

from penstock_broker import __main__, cli, server
from penstock_broker.config import Settings
from penstock_broker.errors import FatalError


def penstock_broker(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith("TASKBROKER_")}
    return subprocess.run(
        [sys.executable, "-m", "penstock_broker", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=kept | {"COLUMNS": "200"} | environment,
        check=False,
    )


def test_show_is_yaml_with_every_setting_its_origin_and_the_loop(tmp_path: Path) -> None:
    file = tmp_path / "broker.yaml"
    file.write_text("kafka_topic: ingest\n")
    shown = penstock_broker(
        *("config", "show", "--origin", "-c", str(file), "--grpc-port", "7000"),
        TASKBROKER_GRPC_SHARED_SECRET="hunter2,hunter3",
        TASKBROKER_MAX_DELIVERIES="9",
    )
    assert shown.returncode == 0, shown.stderr
    values = yaml.safe_load(shown.stdout)
    assert values.keys() == Settings.model_fields.keys()
    assert values["kafka_consumer_group"] == "penstock-ingest"
    assert values["grpc_shared_secret"] == ["***", "***"]
    assert "hunter" not in shown.stdout + shown.stderr
    origins = dict(re.findall(r"^(\w+): .*# (.*)$", shown.stdout, re.M))
    assert origins["kafka_topic"] == f"{file}:1"
    assert origins["max_deliveries"] == "TASKBROKER_MAX_DELIVERIES"
    assert origins["grpc_port"] == "--grpc-port"
    assert origins["insecure"] == "default"
    assert re.search(r"event loop: (uvloop|asyncio)", shown.stdout)


def test_what_show_prints_is_a_configuration(tmp_path: Path) -> None:
    file = tmp_path / "broker.yaml"
    shown = penstock_broker("config", "show", "--kafka-topic", "x", "--v1-service", "off").stdout
    # Both forms of the Kafka settings are shown; the maps were not used.
    file.write_text(re.sub(r"^kafka_(clusters|topics): \{\}\n", "", shown, flags=re.M))
    again = penstock_broker("config", "show", "-c", str(file))
    assert again.returncode == 0, again.stderr
    assert "kafka_topic: x" in again.stdout
    assert "v1_service: 'off'" in again.stdout


def test_check_says_what_is_wrong_without_a_traceback() -> None:
    checked = penstock_broker(
        "config", "check", "--grpc-port", "x", TASKBROKER_LEASE_SECONDS="0", TASKBROKER_XYZ="1"
    )
    assert checked.returncode == 2
    assert checked.stdout == ""
    assert "grpc_port is 'x' (--grpc-port)" in checked.stderr
    assert "lease_seconds is '0' (TASKBROKER_LEASE_SECONDS)" in checked.stderr
    assert "TASKBROKER_XYZ" in checked.stderr
    assert "Traceback" not in checked.stderr


def test_check_warns_and_succeeds() -> None:
    checked = penstock_broker("config", "check", TASKBROKER_STATSD_ADDR="127.0.0.1:8125")
    assert checked.returncode == 0
    assert "warning: TASKBROKER_STATSD_ADDR" in checked.stderr
    assert "valid" in checked.stdout


def test_serve_refuses_to_listen_in_the_open() -> None:
    refused = penstock_broker("serve", "--grpc-addr", "0.0.0.0")
    assert refused.returncode == 2
    assert "TASKBROKER_GRPC_SHARED_SECRET" in refused.stderr
    assert "--insecure" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_version_and_help() -> None:
    assert re.fullmatch(r"penstock-broker \d+\.\d+\.\d+\n", penstock_broker("--version").stdout)
    helped = penstock_broker("serve", "--help").stdout
    assert "Examples:" in helped
    assert "--kafka-topic" in helped


def test_every_setting_but_secrets_and_maps_is_an_option() -> None:
    serve = typer.main.get_command(cli.app).commands["serve"]  # type: ignore[attr-defined]
    names = {parameter.name for parameter in serve.params}
    assert Settings.model_fields.keys() - names == {"grpc_shared_secret", "kafka_clusters", "kafka_topics"}


def test_where_there_is_no_option_nothing_is_imported_to_read_one(tmp_path: Path) -> None:
    program = """
import sys
from penstock_broker import __main__, serving
serving.serve = lambda loaded, *_: print(loaded.settings.db_path, "typer" in sys.modules) or 0
sys.argv = ["penstock-broker", "serve"]
__main__.main()
"""
    environment = os.environ | {"TASKBROKER_DB_PATH": str(tmp_path / "x")}
    served = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
    )
    assert served.stdout == f"{tmp_path / 'x'} False\n"


@pytest.fixture(params=["by its options", "by the environment"])
def command(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A command line that starts a broker."""
    options = ["--db-path", str(tmp_path / "x"), "--insecure"]
    if request.param == "by the environment":
        monkeypatch.setenv("TASKBROKER_DB_PATH", str(tmp_path / "x"))
        monkeypatch.setenv("TASKBROKER_INSECURE", "true")
        options = []
    monkeypatch.setattr(sys, "argv", ["penstock-broker", "serve", *options])


@pytest.mark.usefixtures("command")
def test_serve_gets_the_settings_and_gives_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Settings] = []

    def serve(settings: Settings, reconcile: bool) -> int:
        served.append(settings)
        return 7

    monkeypatch.setattr(server, "serve", serve)
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    assert ended.value.code == 7
    assert served[0].insecure


@pytest.mark.usefixtures("command")
def test_a_fatal_error_is_a_message_a_hint_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def serve(settings: Settings, reconcile: bool) -> int:
        raise FatalError("the database\x1b[31m is locked", "stop the other broker", exit_code=4)

    monkeypatch.setattr(server, "serve", serve)
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    assert ended.value.code == 4
    assert capsys.readouterr().err == (
        "penstock-broker: the database\\x1b[31m is locked\n  stop the other broker\n"
    )
