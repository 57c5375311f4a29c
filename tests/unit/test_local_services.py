"""Services are started, started again and ended with all that they started; real processes, which serve nothing."""

import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import wait_until

from flows import local_services
from flows.local_services import (
    HOST,
    LocalServices,
    Service,
    build_environment,
    check_ports,
    count_signals,
    hold_directory,
)
from internvl_core.errors import ArgumentError, InternVLError

UNUSED_URL = "http://127.0.0.1:1/"
LEAVES_A_CHILD = "sleep 1000 & echo $! > {pid_file}; {then}"


def is_alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def read_pid(path: Path) -> int:
    wait_until(lambda: path.exists() and path.read_text().endswith("\n"), f"{path} was not written")
    return int(path.read_text())


def describe_shell(command: str, *, url: str | None = None) -> Service:
    return Service("shell", ("/bin/sh", "-c", command), url=url)


@pytest.fixture
def services(tmp_path: Path) -> Iterator[LocalServices]:
    services = LocalServices(tmp_path / "services")
    yield services
    services.stop()


def test_a_service_that_ends_during_its_start_shows_its_last_lines(services: LocalServices) -> None:
    service = describe_shell("echo the port is taken >&2; exit 3", url=UNUSED_URL)
    services.start(service)
    with pytest.raises(InternVLError, match=r"shell ended with 3. Log: .*shell.log\n  the port is taken"):
        services.wait_for(service)


def test_what_the_check_raises_ends_the_wait_for_a_service(services: LocalServices) -> None:
    def check() -> None:
        raise KeyboardInterrupt

    service = describe_shell("exec sleep 1", url=UNUSED_URL)
    services.start(service)
    with pytest.raises(KeyboardInterrupt):
        services.wait_for(service, check=check)


def test_a_service_that_ended_is_started_again_without_what_it_left(services: LocalServices, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    services.start(describe_shell(LEAVES_A_CHILD.format(pid_file=pid_file, then="kill -9 $$")))
    left = read_pid(pid_file)
    pid_file.unlink()
    told: list[str] = []
    wait_until(lambda: told.extend(services.revive()) or told, "it was not started again")
    assert told[0].startswith("shell ended with -9 and is started again.")
    # It holds the port.
    wait_until(lambda: not is_alive(left), "its child was left")
    assert read_pid(pid_file) != left


def test_a_service_that_ends_again_and_again_is_given_up(services: LocalServices) -> None:
    services.start(describe_shell("echo no disk; exit 4"))
    told: list[str] = []
    with pytest.raises(InternVLError, match=r"(?s)shell ended with 4.*no disk"):
        wait_until(lambda: told.extend(services.revive()), "it was never given up")
    assert len(told) == local_services._MAX_REVIVALS


def test_a_stop_ends_the_children_too(services: LocalServices, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    # The shell obeys SIGTERM; its child has been told not to.
    script = f"trap '' TERM; sleep 1000 & echo $! > {pid_file}; trap 'exit 0' TERM; wait"
    services.start(describe_shell(script))
    child = read_pid(pid_file)
    services.stop()
    wait_until(lambda: not is_alive(child), "a child was left")


def test_a_stop_lets_a_service_finish_its_start(services: LocalServices, tmp_path: Path) -> None:
    with socket.create_server((HOST, 0)) as free:
        port = free.getsockname()[1]
    script = (
        "import http.server, pathlib, time\n"
        "pathlib.Path('begun').touch(); time.sleep(0.5); pathlib.Path('made').touch()\n"
        f"http.server.HTTPServer(('{HOST}', {port}), http.server.SimpleHTTPRequestHandler).serve_forever()"
    )
    command = f'cd {tmp_path}; exec {sys.executable} -c "{script}"'
    services.start(describe_shell(command, url=f"http://{HOST}:{port}/"))
    wait_until((tmp_path / "begun").exists, "it did not start")
    services.stop()
    assert (tmp_path / "made").exists(), "it was ended while it made its database"


def test_a_service_inherits_no_setting_that_is_about_other_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://elsewhere/api")
    monkeypatch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", "postgresql+asyncpg://elsewhere/")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "for the MLflow of a recipe")
    monkeypatch.setenv("AWS_REGION", "eu-1")
    environment = build_environment({"PREFECT_HOME": "here"})
    others = {name: value for name, value in environment.items() if name.startswith(("PREFECT_", "MLFLOW_"))}
    assert others == {"PREFECT_HOME": "here", "MLFLOW_TRACKING_PASSWORD": "for the MLflow of a recipe"}
    assert environment["AWS_REGION"] == "eu-1"


@pytest.mark.parametrize("port", [-1, 0, 65536, 70000])
def test_a_port_that_does_not_exist_is_refused(port: int) -> None:
    with pytest.raises(ArgumentError, match=rf"--a: {port} is no port. Give one from 1 to 65535."):
        check_ports({"--a": port})


def test_the_same_port_twice_is_refused() -> None:
    with pytest.raises(ArgumentError, match="--b: port 4321 is that of --a too"):
        check_ports({"--a": 4321, "--b": 4321})


def test_a_port_that_somebody_listens_on_is_refused() -> None:
    with socket.create_server((HOST, 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ArgumentError, match=f"--a: port {port} of {HOST}: Address already in use"):
            check_ports({"--a": port})
    check_ports({"--a": port})


def test_signals_are_counted_in_place_of_what_they_do() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with count_signals((signal.SIGTERM, signal.SIGHUP)) as count:
        assert count() == 0
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGHUP)
        wait_until(lambda: count() == 2, f"{count()} were counted")
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_closed_terminal_does_not_end_what_nohup_started() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with count_signals((signal.SIGHUP,)) as count:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert count() == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_service_dies_with_its_owner(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    script = (
        "import os, signal; from pathlib import Path; from flows.local_services import LocalServices, Service\n"
        f"service = Service('shell', ('/bin/sh', '-c', 'echo $$ > {pid_file}; exec sleep 1000'))\n"
        f"LocalServices(Path({str(tmp_path)!r})).start(service)\n"
        f"while not os.path.exists({str(pid_file)!r}): pass\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert os.spawnl(os.P_WAIT, sys.executable, sys.executable, "-c", script) == -signal.SIGKILL
    service = read_pid(pid_file)
    wait_until(lambda: not is_alive(service), "it outlived its owner")


def test_a_directory_is_for_one_up_at_a_time(tmp_path: Path) -> None:
    with (
        hold_directory(tmp_path),
        pytest.raises(ArgumentError, match=rf"--directory: .* is that of run internvl up \(process {os.getpid()} on"),
        hold_directory(tmp_path),
    ):
        pytest.fail("two of them share a directory")
    with hold_directory(tmp_path):
        pass
