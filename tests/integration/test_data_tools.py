"""The data tools as processes: what `internvl data` prints, the task before stage 1, and no process left over."""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from processes import list_processes, wait_until

from flows import cli
from internvl_core.errors import ArgumentError, DataError, InternVLError
from tasks import index_data as index_task
from tasks.data_tool import early_data_tool, run_data_tool, start_data_tool
from tasks.stage import Stage
from tasks.stage_plan import get_cache_dir

pytestmark = pytest.mark.integration

TOKENIZER = Path(__file__).parents[1] / "data" / "tokenizer"
DEADLINE_S = 30
# Starts the tool for a job that never comes.
OWNER = """
import time
from tasks.data_tool import start_data_tool
start_data_tool("lint")
time.sleep(600)
"""

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run `internvl data` in this process; return its exit code, its output and its errors."""

    def run_main(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["internvl", "data", *arguments])
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("COLUMNS", "160")
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        return caught.value.code or 0, captured.out, captured.err  # type: ignore[return-value]

    return run_main


def write_meta(folder: Path, *lines: Any, **entry: Any) -> Path:
    """Write a data set of 40 x 20 px pictures `0.png` and `1.png`, the second of them cut off."""
    Image.effect_noise((40, 20), 64).convert("RGB").save(folder / "0.png")
    (folder / "1.png").write_bytes((folder / "0.png").read_bytes()[:300])
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "pets.jsonl").write_text("".join(f"{text}\n" for text in texts))
    (folder / "meta.json").write_text(json.dumps({"pets": {"root": ".", "annotation": "pets.jsonl", **entry}}))
    return folder / "meta.json"


def record(image: str | None = None, **content: Any) -> dict[str, Any]:
    question = "<image>\nWhat?" if image else "What?"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "A cat."}]
    return {"conversations": turns, **({"image": image} if image else {}), **content}


def list_options(folder: Path) -> list[str]:
    settings = ["--set", "conv_style=internvl2_5", "--set", "force_image_size=28"]
    return ["--tokenizer", str(TOKENIZER), "--cache-dir", str(folder / "cache"), *settings]


# --- the commands


def test_check_is_content_with_sound_data(run: Run, tmp_path: Path) -> None:
    meta = write_meta(tmp_path, record("0.png"), record())
    code, output, errors = run("check", str(meta), *list_options(tmp_path))
    assert (code, output.splitlines()[-1]) == (0, "Nothing is wrong.")
    assert errors.startswith(f"Indexed {tmp_path}/pets.jsonl: 2 lines in ")


def test_check_tells_what_is_wrong_and_exits_with_65(run: Run, tmp_path: Path) -> None:
    sizes = {"width": 40, "height": 20}
    meta = write_meta(tmp_path, record("0.png"), "{", record("1.png", **sizes), record("2.png", **sizes))
    code, output, _ = run("check", str(meta), *list_options(tmp_path))
    assert code == 65
    assert "  pets: 1 × not json (line 2): not one JSON object" in output
    assert "  pets: 1 × media (line 3): 1.png: cannot be decoded" in output
    assert f"  pets: 1 × missing (line 4): {tmp_path}/2.png: no such file" in output
    assert output.splitlines()[-1].startswith("Wrong: pets.")


def test_check_prints_its_report_as_json(run: Run, tmp_path: Path) -> None:
    meta = write_meta(tmp_path, *[record("0.png", id=number % 3) for number in range(9)], "{")
    code, output, _ = run("check", str(meta), "--json", "--samples", "4", "--cache-dir", str(tmp_path / "cache"))
    (dataset,) = json.loads(output)["metas"][0]["datasets"]
    assert code == 65
    assert (dataset["num_records"], dataset["num_tokens"], dataset["num_repeated_ids"]) == (10, None, 6)
    assert (dataset["media"]["num_with_media"], dataset["media"]["num_decoded"]) == (9, 4)


def test_a_full_check_finds_the_one_broken_picture_of_many(run: Run, tmp_path: Path) -> None:
    records = [record("0.png", width=40, height=20) for _ in range(100)]
    records[70] = record("1.png", width=40, height=20)
    meta = write_meta(tmp_path, *records)
    assert run("check", str(meta), "--samples", "1", *list_options(tmp_path))[0] == 0
    code, output, _ = run("check", str(meta), "--full", *list_options(tmp_path))
    assert code == 65
    assert "99 of 100" in output
    assert "  pets: 1 × media (line 71): 1.png: " in output


def test_index_builds_once_and_says_how_fast_and_where(run: Run, tmp_path: Path) -> None:
    meta = write_meta(tmp_path, record("0.png"), record())
    code, output, _ = run("index", str(meta), *list_options(tmp_path))
    (folder,) = (tmp_path / "cache/index").iterdir()
    first, second = output.splitlines()
    assert (code, second) == (0, f"  {folder}")
    assert "pets: 2 records, 0 bad, " in first
    assert " records/s, " in first
    assert run("index", str(meta), *list_options(tmp_path))[1].splitlines()[0].endswith(" tokens, found")


def test_index_says_why_a_data_set_cannot_be(run: Run, tmp_path: Path) -> None:
    meta = write_meta(tmp_path, record(), length=2)
    code, _, errors = run("index", str(meta), *list_options(tmp_path))
    assert code == 65
    assert errors.splitlines()[-1].startswith("DataError: dataset 'pets': length is 2, but ")


def test_index_goes_on_after_a_data_set_that_cannot_be(run: Run, tmp_path: Path) -> None:
    meta = write_meta(tmp_path, record())
    entry = {"root": ".", "annotation": "pets.jsonl"}
    meta.write_text(json.dumps({"a": {**entry, "length": 2}, "b": entry, "c": {**entry, "length": 3}}))
    code, output, errors = run("index", str(meta), *list_options(tmp_path))
    assert (code, output.splitlines()[0].partition(",")[0]) == (65, "b: 1 records")
    first, second = errors.splitlines()[-2:]
    assert first.startswith("DataError: dataset 'a': length is 2, but ")
    assert second.startswith("dataset 'c': length is 3, but ")


def test_show_writes_a_page_named_after_the_sample(run: Run, tmp_path: Path) -> None:
    meta = write_meta(tmp_path, record("0.png"), "{")
    code, output, _ = run("show", str(meta), *list_options(tmp_path))
    assert (code, output) == (0, f"{tmp_path}/pets-1.html\n")
    assert "data:image/png;base64," in (tmp_path / "pets-1.html").read_text()
    code, output, _ = run("show", str(meta), "--line", "2", "--out", "bad.html")
    assert (code, output.splitlines()[0]) == (0, f"{tmp_path}/bad.html")
    assert output.splitlines()[1].startswith("Not trained on: not one JSON object")


def test_a_wrong_line_is_one_line_and_exit_code_64(run: Run, tmp_path: Path) -> None:
    code, output, errors = run("show", str(write_meta(tmp_path, record())), "--line", "9")
    assert (code, output) == (64, "")
    assert errors == (f"ArgumentError: {tmp_path}/pets.jsonl: has 1 lines, so no line 9. Choose one from 1 to 1.\n")


def test_a_recipe_gives_arguments_tokenizers_and_the_cache(run: Run, tmp_path: Path) -> None:
    meta = write_meta(tmp_path, record("0.png"), record())
    recipe = {
        "name": "pets",
        "workspace": str(tmp_path / "runs"),
        "arguments": {"conv_style": "internvl2_5", "force_image_size": 28, "meta_path": str(meta)},
        "stages": [
            {"name": "stage1", "entry": "pretrain", "arguments": {"model_name_or_path": str(TOKENIZER)}},
            {"name": "stage2", "entry": "pretrain", "arguments": {"max_seq_length": 4}},
        ],
    }
    (tmp_path / "pets.yaml").write_text(json.dumps(recipe))
    code, output, _ = run("check", "--recipe", "pets.yaml")
    assert code == 65  # nothing is short enough for stage2
    assert "pets: nothing of it can be trained on" in output
    assert len(list((tmp_path / "runs/cache/index").iterdir())) == 1
    assert run("check", "--recipe", "pets.yaml", "--stage", "stage1")[0] == 0
    assert run("check", "--recipe", "pets.yaml", "--set", "stages.stage2.arguments.max_seq_length=4096")[0] == 0
    code, _, errors = run("show", "--recipe", "pets.yaml")
    assert (code, errors) == (64, "ArgumentError: --stage: missing. The recipe has stage1, stage2: name one.\n")
    assert run("show", "--recipe", "pets.yaml", "--stage", "stage2")[0] == 0


# --- the task


@pytest.fixture
def artifacts(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Run the task without a server: what it would show there is kept here."""
    shown: list[dict[str, Any]] = []
    monkeypatch.setattr(index_task, "create_markdown_artifact", lambda **content: shown.append(content))
    monkeypatch.setattr(index_task, "get_run_logger", lambda: logging.getLogger("run"))
    return shown


def index(folder: Path, meta: Path, **arguments: Any) -> None:
    given = {"conv_style": "internvl2_5", "force_image_size": 28, "meta_path": str(meta), **arguments}
    start = {"model_name_or_path": str(TOKENIZER)}
    stages = [
        Stage(name="stage1", entry="pretrain", arguments={**given, **start}),
        Stage(name="stage2", entry="pretrain", arguments=given),
    ]
    index_task.index_data.fn("pets", stages, workspace=folder, start_from=None)


def test_the_task_indexes_for_all_stages_and_shows_a_table(
    tmp_path: Path, artifacts: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    meta = write_meta(tmp_path, *[record("0.png")] * 9, record(), record("1.png", width=40, height=20))
    with caplog.at_level("INFO"):
        index(tmp_path, meta)
    assert len(list((get_cache_dir(tmp_path) / "index").iterdir())) == 1
    (artifact,) = artifacts
    assert artifact["key"] == "data-pets"
    assert "**stage1, stage2**" in artifact["markdown"]
    assert "stage1, stage2: pets 11 of 11 records" in caplog.messages


def test_the_task_refuses_bad_data_with_the_place_of_the_first(tmp_path: Path, artifacts: list[dict[str, Any]]) -> None:
    meta = write_meta(tmp_path, record(), "{")
    with pytest.raises(DataError, match=r"^stage1, stage2: dataset 'pets': 1 of 2 records are bad.*pets\.jsonl:2: not"):
        index(tmp_path, meta)
    assert len(artifacts) == 1
    index(tmp_path, meta, max_bad_fraction=0.5)


def test_the_task_refuses_a_held_out_set_with_anything_bad(tmp_path: Path, artifacts: list[dict[str, Any]]) -> None:
    (tmp_path / "held").mkdir()
    held_out = write_meta(tmp_path / "held", *[record()] * 200, "{")
    with pytest.raises(DataError, match=r"held out: dataset 'pets': held out, and .*pets\.jsonl:201: not one JSON"):
        index(tmp_path, write_meta(tmp_path, record()), eval_meta_path=str(held_out))


# --- the process


def test_an_error_of_the_tool_keeps_its_class_and_its_message(tmp_path: Path) -> None:
    job: dict[str, Any] = {"cache_dir": str(tmp_path), "metas": [], "num_media": 0, "counts_ids": False}
    assert run_data_tool("lint", job, log=print) == {"metas": []}
    values = {"force_image_size": 450, "down_sample_ratio": 0.5}
    meta = {"title": "", "meta_path": "m.json", "values": values, "source": None, "is_held_out": False}
    with pytest.raises(ArgumentError, match=r"^force_image_size: 450 px is not a whole number"):
        run_data_tool("lint", {**job, "metas": [meta]}, log=print)


def test_a_fault_of_the_tool_is_told_by_its_last_line() -> None:
    with pytest.raises(InternVLError, match=r"^internvl_core\.inspection lint: ended with code 1: KeyError: 'metas'$"):
        run_data_tool("lint", {}, log=print)


def test_a_tool_that_was_started_early_does_the_next_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    start_data_tool("lint")
    wait_until(lambda: any(map(has_torch, find_tools(tmp_path))), "the tool imported nothing")
    job = {"cache_dir": str(tmp_path), "metas": [], "num_media": 0, "counts_ids": False}
    assert run_data_tool("lint", job, log=print) == {"metas": []}
    assert not find_tools(tmp_path)
    assert run_data_tool("lint", job, log=print) == {"metas": []}
    assert not list(tmp_path.iterdir())


def test_a_tool_that_died_before_its_job_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    start_data_tool("lint")
    wait_until(lambda: find_tools(tmp_path), "the tool did not start")
    os.kill(*find_tools(tmp_path), signal.SIGKILL)
    wait_until(lambda: not find_tools(tmp_path), "it was not killed")
    job = {"cache_dir": str(tmp_path), "metas": [], "num_media": 0, "counts_ids": False}
    assert run_data_tool("lint", job, log=print) == {"metas": []}
    assert not list(tmp_path.iterdir())


def test_a_tool_that_was_started_for_nothing_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with early_data_tool("lint"):
        wait_until(lambda: find_tools(tmp_path), "the tool did not start")
    assert not find_tools(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_the_tool_ends_with_its_owner(tmp_path: Path, end: signal.Signals) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    owner = subprocess.Popen([sys.executable, "-c", OWNER], env=environment, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: any(map(is_waiting, find_tools(tmp_path))), "the tool did not start")
        owner.send_signal(end)
        owner.wait(DEADLINE_S)
        wait_until(lambda: not find_tools(tmp_path), "the tool outlived its owner")
    finally:
        owner.kill()
        owner.wait()


def find_tools(folder: Path) -> list[int]:
    """Find the tools that were started with this folder for their files."""
    return list(list_processes(folder, "internvl_core.inspection lint"))


def has_torch(process: int) -> bool:
    return b"libtorch" in Path(f"/proc/{process}/maps").read_bytes()


def is_waiting(process: int) -> bool:
    """Tell whether the tool waits for its job: two threads, one of them watching its owner."""
    return len(list(Path(f"/proc/{process}/task").iterdir())) > 1
