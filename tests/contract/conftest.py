"""Real servers on this machine that only the tests of stores need."""

import asyncio
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import asyncssh
import pytest

SSHD = Path("/usr/sbin/sshd")


@pytest.fixture(scope="session")
def ssh_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a key, and a .ssh/known_hosts that the servers of these tests are written into."""
    home = tmp_path_factory.mktemp("home")
    (home / ".ssh").mkdir(mode=0o700)
    key = asyncssh.generate_private_key("ssh-ed25519")
    key.write_private_key(home / ".ssh/id_ed25519")
    key.write_public_key(home / ".ssh/authorized_keys")
    return home


@pytest.fixture(scope="session")
def asyncssh_port(ssh_home: Path) -> Iterator[int]:
    """Run asyncssh's SFTP server in a thread, for whoever has the key of `ssh_home`."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="ssh-server", daemon=True)
    thread.start()
    connections: list[asyncssh.SSHServerConnection] = []

    async def listen() -> asyncssh.SSHAcceptor:
        return await asyncssh.listen(
            "127.0.0.1",
            0,
            server_host_keys=[host_key],
            authorized_client_keys=str(ssh_home / ".ssh/authorized_keys"),
            sftp_factory=True,
            acceptor=connections.append,
        )

    async def stop() -> None:
        server.close()
        for connection in connections:
            connection.abort()
            await connection.wait_closed()
        await server.wait_closed()

    host_key = asyncssh.generate_private_key("ssh-ed25519")
    server = asyncio.run_coroutine_threadsafe(listen(), loop).result(30)
    _trust(ssh_home, server.get_port(), host_key)
    try:
        yield server.get_port()
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
        loop.close()


@pytest.fixture(scope="session")
def openssh_port(ssh_home: Path) -> Iterator[int]:
    """Run OpenSSH's server, for whoever has the key of `ssh_home`."""
    if not SSHD.is_file():
        pytest.skip(f"{SSHD} is missing: apt-get install openssh-server")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    host_key = asyncssh.generate_private_key("ssh-ed25519")
    host_key.write_private_key(ssh_home / "host_key")
    (ssh_home / "host_key").chmod(0o600)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = int(unused.getsockname()[1])
    settings = {
        "ListenAddress": f"127.0.0.1:{port}",
        "HostKey": ssh_home / "host_key",
        "AuthorizedKeysFile": ssh_home / ".ssh/authorized_keys",
        "PidFile": "none",
        "StrictModes": "no",
        "UsePAM": "no",
        "PermitRootLogin": "prohibit-password",
        "Subsystem": "sftp internal-sftp",
    }
    (ssh_home / "sshd_config").write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
    with (ssh_home / "sshd.log").open("wb") as log:
        server = subprocess.Popen([SSHD, "-D", "-e", "-f", ssh_home / "sshd_config"], stderr=log)
    _trust(ssh_home, port, host_key)
    try:
        _wait_for(port, server, ssh_home / "sshd.log")
        yield port
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture
def sftp_uri(asyncssh_port: int, ssh_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HOME", str(ssh_home))
    return f"sftp://127.0.0.1:{asyncssh_port}{tmp_path}/runs"


@pytest.fixture
def openssh_uri(openssh_port: int, ssh_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HOME", str(ssh_home))
    return f"sftp://127.0.0.1:{openssh_port}{tmp_path}/runs"


def _trust(home: Path, port: int, host_key: asyncssh.SSHKey) -> None:
    with (home / ".ssh/known_hosts").open("a") as known_hosts:
        known_hosts.write(f"[127.0.0.1]:{port} {host_key.export_public_key().decode()}")


def _wait_for(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if server.poll() is not None:
            pytest.fail(f"sshd ended: {log.read_text()}")
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    pytest.fail(f"sshd does not listen: {log.read_text()}")
