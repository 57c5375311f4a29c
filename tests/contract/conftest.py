"""Real servers on this machine that only the tests of stores need."""

import asyncio
import os
import shutil
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import asyncssh
import fsspec
import pytest

SSHD = Path("/usr/sbin/sshd")
# Not a secret: every Azurite has it.
AZURITE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


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
    port = _find_free_port()
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
    _trust(ssh_home, port, host_key)
    with _running([str(SSHD), "-D", "-e", "-f", str(ssh_home / "sshd_config")], port, ssh_home / "sshd.log"):
        yield port


@pytest.fixture(scope="session")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run Azurite, Microsoft's emulator; return the connection string."""
    program = shutil.which("azurite-blob")
    if program is None:
        pytest.skip("azurite-blob is not on the PATH: npm install --global azurite")
    port, folder = _find_free_port(), tmp_path_factory.mktemp("azurite")
    command = [program, "--blobPort", str(port), "--location", str(folder), "--skipApiVersionCheck", "--silent"]
    with _running(command, port, folder / "azurite.log"):
        yield (
            f"DefaultEndpointsProtocol=http;AccountName=devstoreaccount1;AccountKey={AZURITE_KEY};"
            f"BlobEndpoint=http://127.0.0.1:{port}/devstoreaccount1;"
        )


@pytest.fixture
def az_uri(azurite: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", azurite)
    container = f"runs-{uuid.uuid4().hex}"
    fsspec.filesystem("az", connection_string=azurite).mkdir(container)
    return f"az://{container}/runs"


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


def _find_free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])


@contextmanager
def _running(command: list[str], port: int, log: Path) -> Iterator[None]:
    """Run a server while the block lasts, which begins when it listens."""
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 60
        while not _listens(port):
            if server.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"{command[0]} does not listen: {log.read_text()}")
            time.sleep(0.05)
        yield
    finally:
        # Azurite takes its time over a SIGTERM; nothing of these servers is kept.
        server.kill()
        server.wait(30)


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
