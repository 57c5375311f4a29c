"""Checksums on the way to S3: as botocore is set up to send them, and none where a store cannot have them."""

from pathlib import Path
from typing import Any

import pytest

from internvl_core.checkpoint.part_pool import PART_BYTES
from internvl_core.checkpoint.s3_backend import S3Backend
from internvl_core.checkpoint.s3_client import open_client


@pytest.mark.parametrize(("setting", "is_sent"), [("when_supported", True), ("when_required", False)])
def test_an_upload_in_parts_declares_the_checksums_that_it_sends(
    setting: str, is_sent: bool, s3_bucket_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", setting)
    sent: dict[str, list[str]] = {}

    def note(request: Any, operation_name: str, **_: Any) -> None:
        names = [name.lower() for name in request.headers if "checksum" in name.lower()]
        sent.setdefault(operation_name, []).extend(names)

    open_client().meta.events.register("before-sign.s3", note)
    content = bytes(range(256)) * (PART_BYTES // 256) + b"and a part more"
    (tmp_path / "large").write_bytes(content)
    store = S3Backend(f"{s3_bucket_uri}/store")
    store.upload(tmp_path, ["large"], "data")
    assert store.read("data/large") == content
    expected = {"x-amz-checksum-crc32", "x-amz-sdk-checksum-algorithm"} if is_sent else set()
    assert set(sent["UploadPart"]) == expected
    assert set(sent["CreateMultipartUpload"]) == ({"x-amz-checksum-algorithm"} if is_sent else set())
