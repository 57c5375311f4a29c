"""docker/ without an engine: what its files say is what the project has, and nothing in them is open or secret."""

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command
from typer.testing import CliRunner

from flows.cli import app

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def test_every_port_is_open_to_this_machine_only() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(ports) == 2
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_no_service_of_ours_runs_as_root_or_may_become_it() -> None:
    for name, service in SERVICES.items():
        assert service["security_opt"] == ["no-new-privileges:true"], name
        if "build" in service:
            assert service["user"] == "10001:10001", name
            assert service["cap_drop"] == ["ALL"], name
    assert "useradd --uid 10001 " in (ROOT / "docker/Dockerfile").read_text()


def test_every_image_has_a_version() -> None:
    lines = (ROOT / "docker/Dockerfile").read_text().splitlines()
    bases = [line.split()[1] for line in lines if line.startswith("FROM ")]
    foreign = [service["image"] for service in SERVICES.values() if "build" not in service]
    for image in [base for base in bases if base != "control"] + foreign:
        assert re.search(r":\d+\.\d+", image), image


def test_images_install_exactly_what_the_tests_ran_with() -> None:
    lines = (ROOT / "docker/Dockerfile").read_text().splitlines()
    installs = [line for line in lines if "pip install" in line]
    assert len(installs) == 2
    assert all(re.search(r"--constraint (/app/)?constraints\.txt", line) for line in installs)


def test_the_control_image_has_no_torch() -> None:
    text = (ROOT / "docker/Dockerfile").read_text()
    (extras,) = re.findall(r"'\.\[(.*?)\]'", text)
    assert set(extras.split(",")) == {"s3", "auth"}


def test_no_secret_is_written_down() -> None:
    for name, service in SERVICES.items():
        for variable, value in service.get("environment", {}).items():
            if re.search("PASSWORD|SECRET|AUTH_STRING|CONNECTION_URL", variable):
                assert re.search(r"\$\{\w+(:\?[^}]*)?\}", value), f"{name}: {variable}"


def test_what_a_service_waits_for_is_there_and_can_become_so() -> None:
    for name, service in SERVICES.items():
        for other, wanted in service.get("depends_on", {}).items():
            healthy = wanted["condition"] == "service_healthy"
            assert ("healthcheck" in SERVICES[other]) == healthy, f"{name} waits for {other}"


def test_mlflow_lets_in_the_name_that_the_worker_calls_it_by() -> None:
    (allowed,) = (item for item in SERVICES["mlflow"]["entrypoint"] if item.startswith("--allowed-hosts="))
    address = SERVICES["worker"]["environment"]["MLFLOW_TRACKING_URI"]
    assert address.removeprefix("http://") in allowed.removeprefix("--allowed-hosts=").split(",")


def test_the_deploy_service_gives_a_command_that_exists() -> None:
    program, command, *options = SERVICES["deploy"]["entrypoint"]
    assert program == "internvl"
    names = {name for parameter in get_command(app).commands[command].params for name in parameter.opts}  # type: ignore[attr-defined]
    assert {option for option in options if option.startswith("--")} <= names
    assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    folder = tmp_path / "docker"
    folder.mkdir()
    shutil.copy(ROOT / "docker/make-secrets.sh", folder)
    subprocess.run([folder / "make-secrets.sh"], check=True, capture_output=True)
    return folder


def test_secrets_are_drawn_for_all_that_compose_asks_for(drawn: Path) -> None:
    written = dict(line.split("=", 1) for line in (drawn / ".env").read_text().splitlines())
    text = (ROOT / "docker/compose.yaml").read_text()
    # Those with `:-` have a default.
    asked = set(re.findall(r"\$\{(\w+)(?:\}|:\?)", text))
    assert asked == written.keys()
    assert len(set(written.values())) == len(written)
    assert all(len(value) == 48 for value in written.values())
    assert stat.S_IMODE(os.stat(drawn / ".env").st_mode) == 0o600
    assert f"admin_password = {written['MLFLOW_PASSWORD']}" in (drawn / "secrets/mlflow-auth.ini").read_text()


def test_secrets_that_are_there_are_not_drawn_again(drawn: Path) -> None:
    before = (drawn / ".env").read_text()
    again = subprocess.run([drawn / "make-secrets.sh"], capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert "remove it" in again.stderr
    assert (drawn / ".env").read_text() == before


def test_secrets_are_ignored_by_git_and_by_the_build() -> None:
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert {"/docker/.env", "/docker/secrets/"} <= set(ignored)
    assert {"docker/.env", "docker/secrets"} <= set((ROOT / ".dockerignore").read_text().splitlines())
