"""docker/ without an engine: what its files say is what the project has, and nothing in them is open or secret."""

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command
from typer.testing import CliRunner

from flows.cli import app
from tasks.stage import Stage

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DEADLINE_S = 30.0

# Detached, with a supervisor's command line; ends when told to save, or when its save is done.
SUPERVISOR = """
import os, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[2])
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: (folder / "saved").touch())
(folder / "started").touch()
while not (folder / "saved").exists():
    time.sleep(0.02)
(folder / "parent").write_text(str(os.getppid()))
"""
# Leaves a supervisor and a short-lived orphan, and ends when asked; `code` 0: at once.
WORKER = """
import os, signal, subprocess, sys, time
from pathlib import Path
parent = os.getppid()
folder, supervisor, code = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
asked = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, _: asked.append(number))
module = "internvl_core.supervision.supervisor"
subprocess.Popen([sys.executable, "-c", supervisor, module, str(folder)], start_new_session=True)
subprocess.run(["/bin/sh", "-c", 'sleep 0 & echo $! >"$0/orphan"', str(folder)])
while not (folder / "started").exists():
    time.sleep(0.02)
(folder / "ready").touch()
while code and not asked and os.getppid() == parent:
    time.sleep(0.02)
(folder / "told").touch()
time.sleep(0.5)  # Room for a signal too many.
(folder / "asked").write_text(" ".join(number.name for number in map(signal.Signals, asked)))
sys.exit(code)
"""


def list_installs() -> list[str]:
    return [line for line in (ROOT / "docker/Dockerfile").read_text().splitlines() if "pip install" in line]


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
    installs = list_installs()
    assert len(installs) == 2
    assert all(re.search(r"--constraint (/app/)?constraints\.txt", line) for line in installs)


def test_the_control_image_has_no_torch() -> None:
    text = (ROOT / "docker/Dockerfile").read_text()
    (extras,) = re.findall(r"'\.\[(.*?)\]'", text)
    assert set(extras.split(",")) == {"s3", "auth"}


def test_what_images_install_is_declared() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extras in re.findall(r"'[./\w]+\[(.*?)\]'", (ROOT / "docker/Dockerfile").read_text()):
        assert set(extras.split(",")) <= declared.keys()


def test_what_a_run_imports_is_where_the_images_compile() -> None:
    # A run works in /app, and Python looks there first.
    assert all(re.search(r"--editable '(\.|/app)\[", line) for line in list_installs())


def test_a_volume_belongs_to_the_user_who_writes_there() -> None:
    text = (ROOT / "docker/Dockerfile").read_text().replace("\\\n", " ")
    (made,) = re.findall(r"install --directory --owner=internvl (.*)", text)
    mounted = [volume.rsplit(":", 1) for service in SERVICES.values() for volume in service.get("volumes", [])]
    ours = {path for name, path in mounted if name in COMPOSE["volumes"].keys() - {"postgres"}}
    assert ours == set(made.split())


def test_a_relative_workspace_of_a_shipped_recipe_lies_in_a_volume() -> None:
    workspaces = [yaml.safe_load(path.read_text())["workspace"] for path in (ROOT / "flows/recipes").glob("*.yaml")]
    assert workspaces
    assert all(workspace.startswith("runs/") for workspace in workspaces)
    assert "runs:/app/runs" in SERVICES["worker"]["volumes"]


def test_a_stop_waits_longer_than_a_save_may_take() -> None:
    minutes = int(SERVICES["worker"]["stop_grace_period"].removesuffix("m"))
    assert minutes * 60 > Stage.model_fields["save_budget_s"].default
    assert SERVICES["worker"]["entrypoint"][:2] == ["python", "/app/docker/entrypoint.py"]


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
    assert [path.name for path in drawn.iterdir() if path.name != "make-secrets.sh"] == [".env"]


def test_secrets_that_are_there_are_not_drawn_again(drawn: Path) -> None:
    before = (drawn / ".env").read_text()
    again = subprocess.run([drawn / "make-secrets.sh"], capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert "remove it" in again.stderr
    assert (drawn / ".env").read_text() == before


def test_secrets_are_ignored_by_git_and_by_the_build() -> None:
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert "/docker/.env" in ignored
    assert "docker/.env" in (ROOT / ".dockerignore").read_text().splitlines()


class FirstProcess:
    """The first process of the train image over a command; by default a worker that leaves a supervisor."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *command: str, code: int = 7) -> subprocess.Popen[bytes]:
        worker = [sys.executable, "-c", WORKER, str(self.folder), SUPERVISOR, str(code)]
        entrypoint = [sys.executable, str(ROOT / "docker/entrypoint.py")]
        with (self.folder / "log").open("wb") as log:
            self.process = subprocess.Popen([*entrypoint, *(command or worker)], stderr=log)
        if not command:
            self.wait_for(lambda: (self.folder / "ready").exists())
        return self.process

    def wait_for(self, condition: Callable[[], Any]) -> None:
        end = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < end, self.read_log()
            time.sleep(0.02)

    def read_log(self) -> str:
        return (self.folder / "log").read_text()


@pytest.fixture
def first(tmp_path: Path) -> Iterator[FirstProcess]:
    first = FirstProcess(tmp_path)
    yield first
    # Ends a supervisor that is left.
    (tmp_path / "saved").touch()
    if first.process is not None:
        first.process.kill()
        first.process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_container_lives_until_the_save_has_ended(first: FirstProcess, number: signal.Signals) -> None:
    process = first.start()
    process.send_signal(number)
    first.wait_for(lambda: (first.folder / "told").exists())
    process.send_signal(number)
    assert process.wait(DEADLINE_S) == 7
    assert (first.folder / "asked").read_text() == number.name
    assert "ended with 7; staying for 1 saves" in first.read_log()
    # Written last, by a supervisor that this process had adopted.
    assert (first.folder / "parent").read_text() == str(process.pid)


def test_a_worker_that_ends_by_itself_leaves_its_training_alone_until_a_stop(first: FirstProcess) -> None:
    process = first.start(code=0)
    first.wait_for(lambda: "ended with 0; staying for 1 saves" in first.read_log())
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    assert not (first.folder / "parent").exists()
    process.terminate()
    assert process.wait(DEADLINE_S) == 0
    assert (first.folder / "parent").exists()


def test_orphans_in_a_container_are_buried(first: FirstProcess) -> None:
    first.start()
    orphan = int((first.folder / "orphan").read_text())
    first.wait_for(lambda: not Path(f"/proc/{orphan}").exists())


def test_a_container_ends_with_the_exit_code_of_its_command(first: FirstProcess) -> None:
    assert first.start("/bin/sh", "-c", "exit 3").wait(DEADLINE_S) == 3
    assert first.start("/bin/sh", "-c", "kill -KILL $$").wait(DEADLINE_S) == 128 + signal.SIGKILL
