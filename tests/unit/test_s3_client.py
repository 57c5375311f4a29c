"""The client of S3 is that of the settings of the moment."""

import os
from pathlib import Path

import pytest

from internvl_core.checkpoint.s3_client import open_client


@pytest.fixture
def credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    path = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return path


def write(path: Path, key: str) -> None:
    path.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = secret\n")


def get_key() -> str:
    return str(open_client()._request_signer._credentials.access_key)


def test_credentials_that_are_renewed_in_their_file_are_used(credentials: Path) -> None:
    write(credentials, "first")
    assert get_key() == "first"
    assert open_client() is open_client()
    write(credentials, "second")
    assert get_key() == "second"


def test_credentials_that_are_renewed_in_the_environment_are_used(
    credentials: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("first", "second"):
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        assert get_key() == key
