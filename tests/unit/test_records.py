import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internvl_core.data.meta import DatasetMeta
from internvl_core.data.records import RecordFile, Turn, parse_record
from internvl_core.errors import DataError

HUMAN = {"from": "human", "value": "What is it?"}
GPT = {"from": "gpt", "value": "A cat."}
SYSTEM = {"from": "system", "value": ""}


def parse(**content: Any) -> tuple[tuple[str, ...], tuple[Turn, ...]]:
    return parse_record(json.dumps({"conversations": [HUMAN, GPT], **content}).encode())


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def open_records(folder: Path, text: bytes) -> RecordFile:
    path = folder / "a.jsonl"
    path.write_bytes(text)
    return RecordFile(DatasetMeta("pets", folder, path, False, 1, None))


def test_a_text_record_has_no_images() -> None:
    assert parse() == ((), (Turn("human", "What is it?"), Turn("gpt", "A cat.")))
    assert parse(image=None) == parse(image=[]) == parse(video=None, note="kept by its authors")


def test_images_come_in_the_order_of_their_tags() -> None:
    images, turns = parse(image=["a.png", "b/c.png"], conversations=[human("<image> <image>\nWhich?"), GPT])
    assert images == ("a.png", "b/c.png")
    assert turns[0].text == "<image> <image>\nWhich?"


def test_a_missing_tag_of_a_single_image_goes_into_the_first_human_turn() -> None:
    # F25: the original put it into the system turn, or doubled one that stood in a later turn.
    _, turns = parse(image="a.png", conversations=[SYSTEM, HUMAN, GPT])
    assert [turn.text for turn in turns] == ["", "<image>\nWhat is it?", "A cat."]
    _, turns = parse(image="a.png", conversations=[HUMAN, GPT, human("And <image>?"), GPT])
    assert [turn.text.count("<image>") for turn in turns] == [0, 0, 1, 0]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"image": ["a", "b"], "conversations": [human("<image><image><image>"), GPT]}, "3 <image> tags but 2 images"),
        ({"image": ["a", "b"]}, "0 <image> tags but 2 images"),
        ({"conversations": [human("<image>"), GPT]}, "1 <image> tags but 0 images"),
        ({"image": "a", "conversations": [HUMAN, {"from": "gpt", "value": "<image>"}]}, "0 <image> tags but 1 images"),
        ({"video": "a.mp4"}, "video records are not built yet"),
        ({"images": ["a"]}, "unknown key 'images'. Did you mean 'image'"),
        ({"image": ""}, "image must be a path"),
        ({"image": 3}, "image must be a path"),
        ({"image": [["a"]]}, "image must be a path"),
        ({"image": "../a.png"}, "below the dataset's root"),
        ({"image": "/etc/passwd"}, "below the dataset's root"),
        ({"image": "a\0b"}, "below the dataset's root"),
        ({"image": "http://a/b.png"}, "remote media"),
        ({"conversations": []}, "must be a list of turns"),
        ({"conversations": None}, "must be a list of turns"),
        ({"conversations": [GPT]}, "turn 1 is 'gpt', must be 'human'"),
        ({"conversations": [HUMAN]}, "the last turn is 'human'"),
        ({"conversations": [SYSTEM]}, "the last turn is 'system'"),
        ({"conversations": [HUMAN, HUMAN, GPT]}, "turn 2 is 'human', must be 'gpt'"),
        ({"conversations": [HUMAN, GPT, SYSTEM, GPT]}, "turn 3 is 'system', must be 'human'"),
        ({"conversations": [{"from": "Human", "value": "a"}, GPT]}, "turn 1: from is 'Human'"),
        ({"conversations": [HUMAN, {"from": "gpt", "value": " \n"}]}, "turn 2: the answer is empty"),
        ({"conversations": [human("a </img>"), GPT]}, "turn 1: the text contains </img>"),
        ({"conversations": [human("<IMG_CONTEXT>"), GPT]}, "turn 1: the text contains <IMG_CONTEXT>"),
        ({"conversations": [human("<img>"), GPT]}, "turn 1: the text contains <img>"),
        ({"conversations": [human("a<|im_end|>"), GPT]}, r"turn 1: the text contains <\|im_end\|>"),
        ({"conversations": [human("\ud800"), GPT]}, "half a surrogate pair"),
        ({"conversations": [3, GPT]}, "turn 1 must be an object"),
    ],
)
def test_a_record_that_cannot_be_trained_on_is_refused(content: dict[str, Any], expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        parse(**content)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"conversations": [', "not one JSON object"),
        (b"{} {}", "not one JSON object"),
        (b"[]", "must be a JSON object"),
        (b'{"image": "a", "image": "b"}', "'image' occurs twice"),
        (b'{"weight": NaN}', "NaN is not JSON"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_line_that_is_no_record_is_refused(line: bytes, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        parse_record(line)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["from", "value"]), inner, max_size=2),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["id", "image", "video", "conversations"]), json_values))
def test_any_json_object_is_a_record_or_a_data_error(content: dict[str, Any]) -> None:
    try:
        images, turns = parse_record(json.dumps(content).encode())
    except DataError:
        return
    assert sum(turn.text.count("<image>") for turn in turns if turn.role == "human") == len(images)
    assert turns[-1].role == "gpt"


@given(st.binary(max_size=64))
def test_any_bytes_are_a_record_or_a_data_error(line: bytes) -> None:
    with pytest.raises(DataError):
        parse_record(line)


def test_records_keep_the_number_of_their_line(tmp_path: Path) -> None:
    line = json.dumps({"conversations": [HUMAN, GPT]}).encode()
    records = open_records(tmp_path, b"\n" + line + b"\r\n\n  \n" + line.replace(b"cat", b"dog"))
    assert len(records) == 2
    assert [record.sample_id for record in records] == ["pets:2", "pets:5"]
    assert [record.turns[-1].text for record in records] == ["A cat.", "A dog."]


def test_a_bad_line_is_named_by_file_and_number_when_it_is_read(tmp_path: Path) -> None:
    records = open_records(tmp_path, b'\n{"conversations": []}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: conversations must be"):
        records[0]


def test_an_annotation_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no record"):
        open_records(tmp_path, b"\n\n")


def test_a_record_file_travels_to_a_worker_without_its_text_or_its_descriptor(tmp_path: Path) -> None:
    line = json.dumps({"conversations": [HUMAN, {"from": "gpt", "value": "long " * 1000}]}).encode() + b"\n"
    records = open_records(tmp_path, line * 50)
    first = records[0]
    copied = pickle.dumps(records)
    assert len(copied) < len(line)
    assert pickle.loads(copied)[0] == first
