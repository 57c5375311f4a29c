"""`internvl ckpt` on S3 over HTTP, as a person would use it after a run."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flows import cli
from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.checkpoint.s3_client import open_client
from internvl_core.checkpoint.store import StageStore

pytestmark = pytest.mark.integration

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def run_main(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["internvl", "ckpt", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        return caught.value.code or 0, captured.out, captured.err  # type: ignore[return-value]

    return run_main


def test_checkpoints_on_s3_are_listed_verified_fetched_and_removed(
    run: Run, s3_bucket_uri: str, tmp_path: Path
) -> None:
    store = StageStore(f"{s3_bucket_uri}/runs", "stage2", "0123456789abcdef" * 4)
    (tmp_path / "local").mkdir()
    (tmp_path / "local/model.safetensors").write_bytes(bytes(range(256)) * 100_000)
    checkpoints = [
        store.publish(tmp_path / "local", step=step, fence=1, kind=CheckpointKind.TRAINING, parent=None, info={})
        for step in (10, 20, 30)
    ]
    _, output, _ = run("list", f"{s3_bucket_uri}/runs", "--json")
    assert [row["step"] for row in json.loads(output)[0]["checkpoints"]] == [30, 20, 10]
    assert run("verify", store.uri, "--all")[0] == 0
    assert run("fetch", checkpoints[0].uri, str(tmp_path / "fetched"))[0] == 0
    assert (tmp_path / "fetched/model.safetensors").read_bytes() == bytes(range(256)) * 100_000

    # The last byte of the newest, changed behind the store's back.
    bucket, _, key = f"{checkpoints[2].uri}/model.safetensors".removeprefix("s3://").partition("/")
    open_client().put_object(Bucket=bucket, Key=key, Body=bytes(range(256)) * 99_999 + bytes(256))
    code, _, errors = run("verify", store.uri)
    assert (code, "model.safetensors: sha256 is" in errors) == (80, True)
    code, _, errors = run("fetch", store.uri, str(tmp_path / "damaged"))
    assert (code, (tmp_path / "damaged").exists()) == (80, False)

    assert run("gc", store.uri, "--keep", "2")[0] == 0
    # The damaged one does not count, and does not push out a whole one.
    assert [commit.step for commit in store.list_committed()] == [20, 10]
