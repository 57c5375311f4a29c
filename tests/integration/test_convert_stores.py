"""`internvl convert` as people run it: the command, its process, S3 over HTTP."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from flows import cli
from internvl_core.checkpoint.folder import fetch_folder
from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.checkpoint.store import StageStore

pytestmark = pytest.mark.integration

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
ARGUMENT_ERROR = 64
DEADLINE_S = 120
POLL_S = 0.02

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run `internvl convert` in this process; return its exit code, its output and its errors."""

    def run_main(*arguments: str | Path) -> tuple[int, str, str]:
        options = ["--cache-dir", str(tmp_path / "cache")]
        monkeypatch.setattr(sys, "argv", ["internvl", "convert", *map(str, arguments), *options])
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        return caught.value.code or 0, captured.out, captured.err  # type: ignore[return-value]

    return run_main


def list_files(uri: str, endpoint: str) -> dict[str, int]:
    filesystem = fsspec.filesystem("s3", endpoint_url=endpoint, use_listings_cache=False)
    found = filesystem.find(uri.removeprefix("s3://"), detail=True)
    return {path.rpartition("/")[2]: entry["size"] for path, entry in found.items()}


def test_a_model_goes_to_s3_and_comes_back_as_it_was(
    run: Run, tmp_path: Path, s3_bucket_uri: str, s3_endpoint: str
) -> None:
    native = f"{s3_bucket_uri}/models/native"
    code, output, _ = run(GOLDEN / "internlm2", native, "--to", "native")
    assert code == 0
    report = dict(line.split(maxsplit=1) for line in output.splitlines())
    assert report["Target"] == f"{native} (native)"
    assert report["Written"].startswith("85 tensors, 157,200 parameters")
    # Nothing waits on this machine any more.
    assert not list((tmp_path / "cache").iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= list_files(native, s3_endpoint).keys()
    assert type(AutoModelForImageTextToText.from_pretrained(fetch_folder(native, tmp_path / "cache")))

    assert run(native, "back", "--to", "chat")[0] == 0
    back, original = (load_file(folder / "model.safetensors") for folder in (tmp_path / "back", GOLDEN / "internlm2"))
    assert back.keys() == original.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in original.items())


def test_a_committed_checkpoint_is_converted_from_its_stage(run: Run, tmp_path: Path, s3_bucket_uri: str) -> None:
    assert run(GOLDEN / "qwen2", tmp_path / "native", "--to", "native")[0] == 0
    store = StageStore(s3_bucket_uri, "stage2", "0" * 16)
    store.publish(tmp_path / "native", step=7, fence=1, kind=CheckpointKind.FINAL, parent=None, info={})
    assert run(store.uri, tmp_path / "chat", "--to", "chat")[0] == 0
    chat, original = (load_file(folder / "model.safetensors") for folder in (tmp_path / "chat", GOLDEN / "qwen2"))
    assert all(torch.equal(chat[name], tensor) for name, tensor in original.items())


@pytest.mark.parametrize(
    ("source", "target", "options", "message"),
    [
        ("magic://bucket/model", "out", [], "Unknown protocol magic://"),
        pytest.param("no/such/folder", "out", [], "no such folder", marks=pytest.mark.slow),
        ("{bucket}/nothing", "out", [], "there is no such folder"),
        pytest.param("{golden}", "magic://bucket/out", [], "Unknown protocol magic://", marks=pytest.mark.slow),
        pytest.param("{golden}", "{golden}", [], "is not empty", marks=pytest.mark.slow),
        pytest.param("{golden}", "{bucket}", [], "is a whole bucket", marks=pytest.mark.slow),
        pytest.param("{golden}", "out", ["--merge"], "has no adapters", marks=pytest.mark.slow),
        pytest.param("{golden}", "out", ["--to", "chat"], "in the chat format already", marks=pytest.mark.slow),
        pytest.param("{tmp}/text", "out", [], "is no model", marks=pytest.mark.slow),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_64(
    run: Run, tmp_path: Path, s3_bucket_uri: str, source: str, target: str, options: list[str], message: str
) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "notes.txt").write_text("no model")
    places = {"bucket": s3_bucket_uri, "golden": GOLDEN / "qwen2", "tmp": tmp_path}
    arguments = [text.format(**places) for text in (source, target)]
    code, output, errors = run(*arguments, *(options if "--to" in options else [*options, "--to", "native"]))
    assert (code, output) == (ARGUMENT_ERROR, "")
    lines = errors.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "out").exists()


def test_a_killed_conversion_leaves_no_model(tmp_path: Path, s3_bucket_uri: str, s3_endpoint: str) -> None:
    # Large enough that its second file is on its way for a while.
    source = tmp_path / "source"
    source.mkdir()
    for path in (GOLDEN / "qwen2").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    config = json.loads((source / "config.json").read_text())
    config["llm_config"]["vocab_size"] = num_rows = 1 << 20
    (source / "config.json").write_text(json.dumps(config))
    state = load_file(source / "model.safetensors")
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        state[name] = torch.zeros(num_rows, state[name].shape[1])
    save_file(state, source / "model.safetensors")

    target = f"{s3_bucket_uri}/model"
    command = [sys.executable, "-m", "flows.cli", "convert", str(source), target, "--to", "native"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--cache-dir", str(tmp_path / "cache")], stdout=log, stderr=log, start_new_session=True
        )
    deadline = time.monotonic() + DEADLINE_S
    while not list_files(target, s3_endpoint):
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(POLL_S)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert "config.json" not in list_files(target, s3_endpoint)
