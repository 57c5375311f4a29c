"""A store behind SSH: the whole contract, and what happens to connections, keys and hosts."""

from pathlib import Path

import asyncssh
import pytest
from test_store import CONTENT, RemoteStoreContract, SharedStoreContract, write_files

from internvl_core.checkpoint.backend import create_once, open_backend
from internvl_core.checkpoint.folder import fetch_folder
from internvl_core.checkpoint.sftp_backend import SftpBackend
from internvl_core.checkpoint.store import check_store
from internvl_core.errors import StoreUnavailable

pytestmark = pytest.mark.integration


class TestSftpStore(RemoteStoreContract, SharedStoreContract):
    @pytest.fixture
    def store_uri(self, sftp_uri: str) -> str:
        return sftp_uri


def test_a_lost_connection_is_made_again(sftp_uri: str) -> None:
    backend = open_backend(sftp_uri)
    assert isinstance(backend, SftpBackend)
    backend.put("before", b"1")
    connected = backend._session._connected
    assert connected is not None
    connected[0].abort()
    assert backend.read("before") == b"1"
    backend._session._connected[0].abort()  # type: ignore[index]
    assert create_once(backend, "after", b"2")
    assert backend.list_names("") == ["before", "after"] or backend.list_names("") == ["after", "before"]


def test_a_key_that_the_server_does_not_know_is_told_as_credentials(
    sftp_uri: str, tmp_path: Path, ssh_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = tmp_path / "stranger/.ssh"
    stranger.mkdir(parents=True, mode=0o700)
    asyncssh.generate_private_key("ssh-ed25519").write_private_key(stranger / "id_ed25519")
    (stranger / "known_hosts").write_bytes((ssh_home / ".ssh/known_hosts").read_bytes())
    monkeypatch.setenv("HOME", str(stranger.parent))
    # By another name of the host, for which no session is open.
    with pytest.raises(StoreUnavailable, match=r"cannot be used.*credentials.*Permission denied"):
        check_store(sftp_uri.replace("127.0.0.1", "localhost"))


def test_a_host_that_is_not_known_is_not_believed(
    sftp_uri: str, tmp_path: Path, ssh_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trusting = tmp_path / "trusting/.ssh"
    trusting.mkdir(parents=True, mode=0o700)
    (trusting / "id_ed25519").write_bytes((ssh_home / ".ssh/id_ed25519").read_bytes())
    monkeypatch.setenv("HOME", str(trusting.parent))
    with pytest.raises(StoreUnavailable, match="Host key is not trusted"):
        check_store(sftp_uri.replace("127.0.0.1", "localhost"))


def test_a_folder_that_takes_no_files_is_told(sftp_uri: str) -> None:
    host = sftp_uri.removeprefix("sftp://").partition("/")[0]
    with pytest.raises(StoreUnavailable, match=r"cannot be used as a checkpoint store.*Creating sftp://.*/proc/runs"):
        check_store(f"sftp://{host}/proc/runs")


def test_a_model_in_a_plain_folder_is_read(sftp_uri: str, tmp_path: Path) -> None:
    write_files(tmp_path / "runs/model", {"config.json": b"{}", "model.safetensors": CONTENT["model.safetensors"]})
    fetched = fetch_folder(f"{sftp_uri}/model", tmp_path / "cache")
    assert (fetched / "model.safetensors").read_bytes() == CONTENT["model.safetensors"]
