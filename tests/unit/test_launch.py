"""The argv of a stage, and reading what a trainer appends."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from internvl_core.contract import StageFile
from internvl_core.errors import ArgumentError
from tasks.launch import launch_stage
from tasks.line_tail import LineTail
from tasks.stage import Launcher
from tasks.torchrun_command import build_command

ATTEMPT_DIR = Path("/runs/one two/attempt-1")
STAGE = StageFile(
    run_id="run",
    stage="stage1",
    attempt=1,
    fingerprint="0" * 64,
    entry="pretrain",
    arguments={},
    launcher={"kind": "local", "nnodes": 1, "nproc_per_node": 2},
    store_uri="file:///store",
    start_from=None,
    resume=False,
    save_budget_s=600.0,
)
# What an argv item can hold: NUL ends it, and a lone surrogate has no bytes. Plain argparse of Python 3.11
# loses the value "--"; the trainer's own parser does not.
ARGV_TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])).filter(lambda text: text != "--")
TRICKY = ["", " ", "a b", "'", '"', "$(id)", "`id`", "; rm -rf /", "-- ", "-x", "--push_to_hub=True", "a=b", "\n", "*"]


def build_entry_arguments(arguments: dict[str, Any]) -> list[str]:
    """Build the part of the command that the trainer's own parser sees."""
    command = build_command(dataclasses.replace(STAGE, arguments=arguments), ATTEMPT_DIR)
    return command[command.index("internvl_core.pretrain") + 1 :]


def parse_text(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--attempt_dir")
    parser.add_argument("--text")
    parser.add_argument("--push_to_hub", default="unset")
    return parser.parse_args(arguments)


def test_torchrun_starts_the_entry_of_the_stage_with_the_ranks_of_its_launcher():
    command = build_command(STAGE, ATTEMPT_DIR)

    assert command[:5] == [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=2"]
    assert command[-3:] == ["-m", "internvl_core.pretrain", "--attempt_dir=/runs/one two/attempt-1"]


@given(text=ARGV_TEXT | st.sampled_from(TRICKY))
def test_any_text_is_one_item_and_reads_back_literally(text):
    items = build_entry_arguments({"text": text})

    parsed = parse_text(items)

    assert len(items) == 2
    assert parsed.text == text
    assert parsed.push_to_hub == "unset"


def test_two_dashes_are_a_value_like_any_other():
    assert build_entry_arguments({"text": "--"})[1:] == ["--text=--"]


@given(value=st.dictionaries(st.text(), st.integers() | st.text()) | st.lists(st.none() | st.booleans() | st.text()))
def test_lists_and_objects_read_back_from_json(value):
    assert json.loads(parse_text(build_entry_arguments({"text": value})).text) == value


@given(value=st.floats(allow_nan=False) | st.integers())
def test_numbers_keep_every_digit(value):
    assert type(value)(parse_text(build_entry_arguments({"text": value})).text) == value


def test_switches_are_words_and_none_is_left_out():
    assert build_entry_arguments({"bf16": True, "freeze_llm": False, "vision_path": None})[1:] == [
        "--bf16=True",
        "--freeze_llm=False",
    ]


@pytest.mark.parametrize("value", ["a\0b", "\ud800"])
def test_text_that_no_process_can_be_given_is_refused_with_its_name(value):
    with pytest.raises(ArgumentError, match=r"arguments: text: .* cannot be passed on"):
        build_entry_arguments({"text": value})


@pytest.mark.parametrize(
    ("launcher", "complaint"),
    [
        ({"kind": "slurm"}, r"launcher\.kind: 'slurm' is not built yet"),
        ({"kind": "local", "nnodes": 2}, r"launcher\.rdzv_endpoint: 2 nodes need one"),
        ({"kind": "local", "nnodes": 0}, r"launcher\.nnodes: 0 "),
        ({"kind": "local", "nproc_per_node": 0}, r"launcher\.nproc_per_node: 0 "),
        ({"kind": "local", "nproc_per_node": "2"}, r"launcher\.nproc_per_node: '2' "),
        ({"kind": "local", "nproc_per_node": True}, r"launcher\.nproc_per_node: True "),
    ],
)
def test_a_launcher_that_is_not_built_yet_is_refused_before_anything_is_written(tmp_path, launcher, complaint):
    with pytest.raises(ArgumentError, match=complaint):
        launch_stage(dataclasses.replace(STAGE, launcher=launcher), tmp_path / "attempt")
    assert not (tmp_path / "attempt").exists()


def test_nodes_meet_at_one_place_in_the_order_that_they_are_given():
    launcher = {"nnodes": 2, "nproc_per_node": 4, "rdzv_endpoint": "node-a:29400"}
    stage = dataclasses.replace(STAGE, launcher=launcher)
    commands = [build_command(stage, ATTEMPT_DIR, node_rank=rank) for rank in (0, 1)]

    assert commands[0][3:9] == [
        "--nnodes=2",
        "--nproc-per-node=4",
        "--rdzv-backend=static",
        "--rdzv-endpoint=node-a:29400",
        "--node-rank=0",
        "--rdzv-id=run-stage1-1",
    ]
    assert [item for item in commands[1] if item not in commands[0]] == ["--node-rank=1"]


@pytest.mark.parametrize("node_rank", [-1, 2])
def test_a_node_that_the_launcher_does_not_have_is_refused(node_rank):
    launcher = {"nnodes": 2, "rdzv_endpoint": "node-a:29400"}
    with pytest.raises(ArgumentError, match=rf"node rank: {node_rank} should be from 0 to 1"):
        build_command(dataclasses.replace(STAGE, launcher=launcher), ATTEMPT_DIR, node_rank=node_rank)


@pytest.mark.parametrize("endpoint", ["node-a:29400", "10.0.0.1:29400", "[fd00::1]:29400", "node-a.cluster.local:1"])
def test_a_place_to_meet_is_a_host_and_a_port(endpoint):
    assert Launcher(nnodes=2, rdzv_endpoint=endpoint).rdzv_endpoint == endpoint


@pytest.mark.parametrize("endpoint", ["node-a", "node-a:", ":29400", "http://node-a:29400", "node a:1", "a:1 --x"])
def test_what_is_no_host_and_port_is_refused(endpoint):
    with pytest.raises(ValidationError, match="rdzv_endpoint"):
        Launcher(nnodes=2, rdzv_endpoint=endpoint)


def test_a_launcher_defaults_to_one_local_process():
    assert "--nproc-per-node=1" in build_command(dataclasses.replace(STAGE, launcher={}), ATTEMPT_DIR)


def test_a_file_that_is_not_there_yet_has_no_lines(tmp_path):
    assert list(LineTail(tmp_path / "metrics.jsonl").read()) == []


@given(chunks=st.lists(st.text(st.sampled_from("ab\né"), max_size=6).map(str.encode)))
def test_only_whole_lines_are_read_each_once_and_in_order(tmp_path_factory, chunks):
    path = tmp_path_factory.mktemp("tail") / "metrics.jsonl"
    tail = LineTail(path)
    seen = []
    for chunk in chunks:
        with path.open("ab") as file:
            file.write(chunk)
        seen += tail.read()

    *whole, unfinished = b"".join(chunks).decode().split("\n")
    assert seen == whole
    assert list(tail.read(take_unfinished=True)) == ([unfinished] if unfinished else [])


def test_a_character_cut_in_two_waits_for_its_other_half(tmp_path):
    path = tmp_path / "trainer.log"
    tail = LineTail(path)
    path.write_bytes("é".encode()[:1])
    assert list(tail.read()) == []
    path.write_bytes("é\n".encode())
    assert list(tail.read()) == ["é"]
