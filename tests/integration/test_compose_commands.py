"""The commands of docker/compose.yaml run outside a container, with the file's own arguments and environment.

Only what containers bring is put in place of itself: hosts, ports, folders, and the start of Postgres.
"""

import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from processes import find_free_port, list_processes, wait_until
from servers_up import describe_long_run, is_committed, wait_for_training

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]
ADDRESSES = {"postgres": "5432", "prefect": "4200", "mlflow": "5000"}
MLFLOW_SEARCH = "/api/2.0/mlflow/experiments/search?max_results=1"


@dataclass
class Stack:
    """The services of compose.yaml at work."""

    directory: Path
    secrets: dict[str, str]
    ports: dict[str, str] = field(default_factory=lambda: {port: str(find_free_port()) for port in ADDRESSES.values()})
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    programs: str = ""
    """Where Postgres's are."""

    def place(self, text: str, *, is_address: bool = True) -> str:
        """Put this machine's hosts, ports and folders, and then the secrets, into a text of the file.

        Args:
            is_address: of a service to call; else a container's name stays one.
        """
        if is_address:
            for name, port in ADDRESSES.items():
                text = re.sub(rf"\b{name}:{port}\b", f"127.0.0.1:{port}", text)
        for port, other in self.ports.items():
            text = re.sub(rf"\b{port}\b", other, text)
        text = text.replace("0.0.0.0", "127.0.0.1")
        text = re.sub(r"(?<![\w.])/home/internvl", str(self.directory), text)
        text = re.sub(r"(?<![\w.])/app(?=/)", str(ROOT), text)
        return re.sub(r"\$\{(\w+)[^}]*\}", lambda found: self.secrets[found[1]], text)

    def get_environment(self, name: str) -> dict[str, str]:
        path = os.pathsep.join([str(Path(sys.executable).parent), self.programs, os.environ["PATH"]])
        given = {key: self.place(value) for key, value in SERVICES[name]["environment"].items()}
        return {"PATH": path, "HOME": str(self.directory), "PGPORT": self.ports["5432"], **given}

    def get_command(self, name: str) -> list[str]:
        return [self.place(item, is_address=False) for item in SERVICES[name]["entrypoint"]]

    def start(self, name: str, command: list[str] | None = None) -> None:
        folder = Path(self.place(SERVICES[name].get("working_dir", "/home/internvl")))
        folder.mkdir(exist_ok=True)
        with self.get_log(name).open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command or self.get_command(name),
                cwd=folder,
                env=self.get_environment(name),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def check_health(self, name: str) -> int:
        """Run the service's health check; return its exit code."""
        kind, *command = SERVICES[name]["healthcheck"]["test"]
        assert kind == "CMD"
        placed = [self.place(item, is_address=False) for item in command]
        return subprocess.run(placed, env=self.get_environment(name), capture_output=True, check=False).returncode

    def wait_for_health(self, name: str) -> None:
        def is_healthy() -> bool:
            assert self.processes[name].poll() is None, self.get_log(name).read_text()
            return self.check_health(name) == 0

        wait_until(is_healthy, f"{name} did not become healthy", deadline_s=120)

    def get_log(self, name: str) -> Path:
        return self.directory / f"{name}.log"

    def get_url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.ports[ADDRESSES[name]]}"

    def get_login(self, name: str) -> tuple[str, str]:
        return "admin", self.secrets[f"{name.upper()}_PASSWORD"]

    def post(self, path: str, **content: Any) -> Any:
        """Ask Prefect."""
        url = f"{self.get_url('prefect')}/api/{path}"
        return httpx.post(url, json=content, auth=self.get_login("prefect"), timeout=30).raise_for_status().json()

    def stop(self) -> None:
        for process in reversed(self.processes.values()):
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
            # The leader's children too: MLflow's do not always end with it.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def draw_secrets(folder: Path) -> dict[str, str]:
    """Run make-secrets.sh in a copy of its folder, and read what it wrote."""
    shutil.copy(ROOT / "docker/make-secrets.sh", folder)
    subprocess.run([folder / "make-secrets.sh"], check=True, capture_output=True)
    return dict(line.split("=", 1) for line in (folder / ".env").read_text().splitlines())


def find_postgres() -> str:
    """Find the folder of Postgres's programs."""
    # Debian keeps the server's programs out of the path.
    for folder in [*os.environ["PATH"].split(os.pathsep), *map(str, Path("/usr/lib/postgresql").glob("*/bin"))]:
        if all((Path(folder) / name).exists() for name in ("initdb", "postgres", "createdb", "pg_isready")):
            return folder
    pytest.skip("PostgreSQL's server is not installed")


def start_postgres(stack: Stack, folder: Path) -> None:
    """Do what the image does: make the server's data, start it, make the database."""
    become = []
    if os.geteuid() == 0:
        # It refuses to run as root.
        try:
            owner = pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("root, and no user postgres to run PostgreSQL as")
        os.chown(folder, owner.pw_uid, owner.pw_gid)
        become = ["setpriv", f"--reuid={owner.pw_uid}", f"--regid={owner.pw_gid}", "--clear-groups"]
    environment = stack.get_environment("postgres")
    user, password = environment["POSTGRES_USER"], environment["POSTGRES_PASSWORD"]
    # As in the image: a password for all who come over TCP.
    initdb = ["initdb", f"--pgdata={folder}/data", f"--username={user}", "--auth=scram-sha-256", "--no-sync"]
    with tempfile.NamedTemporaryFile("w") as file:
        print(password, file=file, flush=True)
        Path(file.name).chmod(0o644 if become else 0o600)
        subprocess.run(
            [*become, *initdb, f"--pwfile={file.name}"], env=environment, cwd=folder, check=True, capture_output=True
        )
    settings = ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "fsync=off"]
    stack.start("postgres", [*become, "postgres", "-D", f"{folder}/data", *settings])
    stack.wait_for_health("postgres")
    createdb = ["createdb", "--host=127.0.0.1", f"--username={user}", environment["POSTGRES_DB"]]
    subprocess.run(createdb, env={**environment, "PGPASSWORD": password}, check=True, capture_output=True)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    directory = tmp_path_factory.mktemp("compose")
    stack = Stack(directory, draw_secrets(tmp_path_factory.mktemp("docker")), programs=find_postgres())
    # Not below pytest's own folder, which nobody else may enter.
    with tempfile.TemporaryDirectory(prefix="internvl-postgres-") as folder:
        try:
            start_postgres(stack, Path(folder))
            for name in ("prefect", "mlflow"):
                stack.start(name)
            stack.wait_for_health("prefect")
            stack.start("deploy")
            assert stack.processes["deploy"].wait(120) == 0, stack.get_log("deploy").read_text()
            stack.start("worker")
            stack.wait_for_health("mlflow")
            yield stack
        finally:
            stack.stop()


def test_prefect_wants_the_password(stack: Stack) -> None:
    address = f"{stack.get_url('prefect')}/api/flows/filter"
    for login, status in ((None, 401), (("admin", "x"), 401), (stack.get_login("prefect"), 200)):
        assert httpx.post(address, json={}, auth=login, timeout=30).status_code == status


def test_prefects_ui_asks_for_the_password_and_calls_its_own_server(stack: Stack) -> None:
    settings = httpx.get(f"{stack.get_url('prefect')}/ui-settings", timeout=30).json()
    assert settings["api_url"] == "/api"
    assert settings["auth"] == "BASIC"
    page = httpx.get(f"{stack.get_url('prefect')}/v2", timeout=30, follow_redirects=True)
    assert page.status_code == 200
    assert "text/html" in page.headers["content-type"]


def test_prefect_keeps_its_data_in_postgres(stack: Stack) -> None:
    assert not list(stack.directory.rglob("prefect.db"))
    environment = {**stack.get_environment("postgres"), "PGPASSWORD": stack.secrets["POSTGRES_PASSWORD"]}
    psql = ["psql", "--host=127.0.0.1", "--username=prefect", "--tuples-only", "--no-align", "prefect"]
    asked = [*psql, "--command=select name from deployment"]
    told = subprocess.run(asked, env=environment, check=True, capture_output=True, text=True).stdout
    assert "pretrain" in told.split()


def test_mlflow_wants_the_password(stack: Stack) -> None:
    address = stack.get_url("mlflow") + MLFLOW_SEARCH
    for login, status in ((None, 401), (("admin", "x"), 401), (stack.get_login("mlflow"), 200)):
        assert httpx.get(address, auth=login, timeout=30).status_code == status


def test_mlflow_keeps_runs_and_users_in_its_volume(stack: Stack) -> None:
    volume = Path(stack.place("/home/internvl/mlflow"))
    assert {"mlflow.db", "basic_auth.db"} <= {path.name for path in volume.iterdir()}


def test_mlflow_lets_in_who_calls_it_by_its_containers_name(stack: Stack) -> None:
    port = stack.ports["5000"]
    for host, status in ((f"mlflow:{port}", 200), (f"localhost:{port}", 200), (f"evil.example:{port}", 403)):
        address = stack.get_url("mlflow") + MLFLOW_SEARCH
        answer = httpx.get(address, auth=stack.get_login("mlflow"), headers={"Host": host}, timeout=30)
        assert answer.status_code == status, host


@pytest.mark.parametrize("name", [name for name, service in SERVICES.items() if "healthcheck" in service])
def test_a_health_check_tells_a_service_that_is_up_from_one_that_is_not(
    stack: Stack, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stack.check_health(name) == 0
    monkeypatch.setitem(stack.ports, ADDRESSES[name], str(find_free_port()))
    assert stack.check_health(name) != 0


def test_the_deployments_are_registered_with_their_pool(stack: Stack) -> None:
    wanted = yaml.safe_load((ROOT / "deployments/prefect.yaml").read_text())["deployments"]
    found = stack.post("deployments/filter")
    assert {each["name"] for each in found} == {each["name"] for each in wanted}
    assert {each["work_pool_name"] for each in found} == {"internvl"}
    # A relative workspace starts here, where the worker has a volume at runs/.
    (folder,) = {str(step["directory"]) for each in found for pull in each["pull_steps"] for step in pull.values()}
    assert folder == stack.place("/app/").rstrip("/")
    assert "runs:/app/runs" in SERVICES["worker"]["volumes"]


@pytest.mark.fault(
    59,
    "a worker is told to end while a stage trains",
    how="SIGTERM, as docker stop",
    then="its run saves and commits first",
)
def test_a_stop_of_the_worker_lets_its_training_save_and_commit(stack: Stack) -> None:
    def get_status() -> set[str]:
        return {worker["status"] for worker in stack.post("work_pools/internvl/workers/filter")}

    wait_until(lambda: get_status() == {"ONLINE"}, "the worker is not seen", deadline_s=30)
    workspace = stack.directory / "runs"
    (pretrain,) = (each for each in stack.post("deployments/filter") if each["name"] == "pretrain")
    stack.post(f"deployments/{pretrain['id']}/create_flow_run", parameters=describe_long_run(workspace))
    wait_for_training(workspace)
    worker = stack.processes["worker"]
    worker.terminate()
    worker.wait(60)
    assert not list_processes(workspace, "--attempt_dir=")
    assert is_committed(workspace), stack.get_log("worker").read_text()
    assert "staying for 1 saves" in stack.get_log("worker").read_text()


def test_what_services_write_shows_no_password(stack: Stack) -> None:
    assert all(stack.get_log(name).stat().st_size for name in SERVICES), "a log is empty"
    written = {path: path.read_bytes() for path in stack.directory.rglob("*") if path.is_file()}
    for name, secret in stack.secrets.items():
        assert [str(path) for path, content in written.items() if secret.encode() in content] == [], name
        assert [log["message"] for log in stack.post("logs/filter") if secret in log["message"]] == [], name
