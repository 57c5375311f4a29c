import io
import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internvl_core.data import records
from internvl_core.data.records import MAX_LINE_BYTES, ParsedRecord, Turn, parse_record
from internvl_core.errors import DataError, Reason

HUMAN: Turn = {"from": "human", "value": "What is it?"}
GPT: Turn = {"from": "gpt", "value": "A cat."}
SYSTEM: Turn = {"from": "system", "value": ""}


def parse(*, ignore_keys: tuple[str, ...] = (), **content: Any) -> ParsedRecord:
    return parse_record(json.dumps({"conversations": [HUMAN, GPT], **content}).encode(), ignore_keys=ignore_keys)


def human(text: str) -> Turn:
    return {"from": "human", "value": text}


def refuse(line: bytes, *, ignore_keys: tuple[str, ...] = ()) -> DataError:
    with pytest.raises(DataError) as refused:
        parse_record(line, ignore_keys=ignore_keys)
    assert "\n" not in str(refused.value)
    return refused.value


def test_a_text_record_has_no_images() -> None:
    assert parse() == parse(image=None) == parse(image=[]) == parse(video=None, id=7) == ParsedRecord((HUMAN, GPT))
    assert parse().kind == "text"


def test_images_come_in_the_order_of_their_tags() -> None:
    record = parse(image=["a.png", "b/c.png"], conversations=[human("<image> <image>\nWhich?"), GPT])
    assert (record.images, record.kind) == (("a.png", "b/c.png"), "multi_image")
    assert record.turns[0]["value"] == "<image> <image>\nWhich?"
    assert parse(image="a.png").kind == "image"


def test_a_missing_tag_of_a_single_medium_goes_into_the_first_human_turn() -> None:
    # F25: the original put it into the system turn, or doubled one that stood in a later turn.
    record = parse(image="a.png", conversations=[SYSTEM, HUMAN, GPT])
    assert [turn["value"] for turn in record.turns] == ["", "<image>\nWhat is it?", "A cat."]
    record = parse(image="a.png", conversations=[HUMAN, GPT, human("And <image>?"), GPT])
    assert [turn["value"].count("<image>") for turn in record.turns] == [0, 0, 1, 0]
    record = parse(video="a.mp4", conversations=[SYSTEM, HUMAN, GPT])
    assert [turn["value"] for turn in record.turns] == ["", "<video>\nWhat is it?", "A cat."]


def test_a_video_may_be_clipped() -> None:
    record = parse(video="a.mp4", clip=[1, 2.5])
    assert (record.video, record.clip, record.kind) == ("a.mp4", (1.0, 2.5), "video")
    assert parse(video="a.gif").clip is None
    assert parse(video="a/frames/").clip is None


@pytest.mark.parametrize(
    "sides",
    [
        {"width": 640, "height": 480},
        {"width": [640], "height": [480]},
        {"width_list": [640], "height_list": [480]},
        {"width": None, "width_list": [640], "height": 480},
    ],
)
def test_sizes_may_be_numbers_or_lists(sides: dict[str, Any]) -> None:
    assert parse(image="a.png", **sides).sizes == ((640, 480),)


def test_sizes_belong_to_their_images() -> None:
    conversations = [human("<image><image>"), GPT]
    record = parse(image=["a", "b"], width_list=[1, 2], height_list=[3, 4], conversations=conversations)
    assert record.sizes == ((1, 3), (2, 4))
    assert parse(image="a.png").sizes is None
    assert parse(width=4, height=4).sizes is None


def test_notes_of_the_authors_are_borne_where_the_data_set_says_so() -> None:
    assert parse(ignore_keys=("model", "score"), model="x", score=3) == parse()
    assert parse(ignore_keys=("*",), anything="x") == parse()
    # A misspelt key is no note: it would train blind.
    assert "Did you mean 'image'" in str(refuse(b'{"images": ["a"]}', ignore_keys=("*",)))
    marked: dict[str, Any] = {**HUMAN, "markers": []}
    assert parse(ignore_keys=("markers",), conversations=[marked, GPT]) == parse()


@pytest.mark.parametrize(
    ("content", "reason", "expected"),
    [
        ({"image": ["a", "b"], "conversations": [human("<image>" * 3), GPT]}, "tags", "3 <image> tags but 2 images"),
        ({"image": ["a", "b"]}, "tags", "0 <image> tags but 2 images"),
        ({"conversations": [human("<image>"), GPT]}, "tags", "1 <image> tags but 0 images"),
        (
            {"image": "a", "conversations": [HUMAN, {"from": "gpt", "value": "<image>"}]},
            "tags",
            r"0 <image> tags \(1 more in other turns\) but 1 images",
        ),
        ({"conversations": [human("<video>"), GPT]}, "tags", "1 <video> tags but 0 videos"),
        ({"video": "a.mp4", "conversations": [human("<video><video>"), GPT]}, "tags", "2 <video> tags but 1 videos"),
        ({"video": "a.mp4", "conversations": [human("<image>"), GPT]}, "tags", "1 <image> tags but 0 images"),
        ({"video": "a.mp4", "image": "a.png"}, "record", "image and video in one record"),
        ({"video": ["a.mp4"]}, "record", "video must be one path"),
        ({"video": ""}, "record", "video must be one path"),
        ({"video": "../a.mp4"}, "path", r"\.\./a\.mp4"),
        ({"clip": [0, 1]}, "record", "clip without a video"),
        ({"video": "a/frames/", "clip": [0, 1]}, "record", "clip of 'a/frames/': a folder of frames has no times"),
        ({"video": "a.mp4", "clip": [2, 1]}, "record", "0 <= from < to"),
        ({"video": "a.mp4", "clip": [-1, 1]}, "record", "0 <= from < to"),
        ({"video": "a.mp4", "clip": [1]}, "record", r"clip must be \[from, to\]"),
        ({"video": "a.mp4", "clip": [True, 3]}, "record", r"clip must be \[from, to\]"),
        ({"video": "a.mp4", "clip": [0, 10**400]}, "record", r"clip must be \[from, to\]"),
        ({"video": "a.mp4", "clip": ["0", "1"]}, "record", r"clip must be \[from, to\]"),
        ({"images": ["a"]}, "record", "unknown key 'images'. Did you mean 'image'"),
        ({"model": "gpt"}, "record", "unknown key 'model', nearest known: .*ignore_keys"),
        ({"image": ""}, "record", "image must be a path"),
        ({"image": 3}, "record", "image must be a path"),
        ({"image": {"path": "a"}}, "record", "image must be a path"),
        ({"image": [["a"]]}, "record", "image must be a path"),
        ({"image": "../a.png"}, "path", r"\.\./a\.png"),
        ({"image": "/etc/passwd"}, "path", "/etc/passwd"),
        ({"image": "a\0b"}, "path", "a"),
        ({"image": "http://a/b.png"}, "path", "http://a/b"),
        ({"image": "a\ud800.png"}, "encoding", "half a surrogate pair"),
        ({"image": "a", "width": 3}, "record", "height is missing"),
        ({"width": -1}, "record", "width must be a whole number"),
        ({"width": 3, "height": [4, "x"]}, "record", "height must be a whole number"),
        ({"video": "a.mp4", "width_list": {"a": 1}}, "record", "width_list must be a whole number"),
        ({"image": "a", "width": 3, "width_list": [0], "height": 4}, "record", "width_list must be a whole number"),
        ({"image": "a", "width": "x", "width_list": [3], "height": 4}, "record", "width must be a whole number"),
        ({"image": "a", "width": 3, "height": 0}, "record", "height must be a whole number"),
        ({"image": "a", "width": 3, "height": -2}, "record", "height must be a whole number"),
        ({"image": "a", "width": 3, "height": "4"}, "record", "height must be a whole number"),
        ({"image": "a", "width": 3.5, "height": 4}, "record", "width must be a whole number"),
        ({"image": "a", "width": [3, 3], "height": [4, 4]}, "record", "2 widths and 2 heights for 1 images"),
        ({"conversations": []}, "turns", "must be a list of turns"),
        ({"conversations": None}, "turns", "must be a list of turns"),
        ({"conversations": [GPT]}, "turns", "turn 1 is 'gpt', must be 'human'"),
        ({"conversations": [HUMAN]}, "no_target", "the last turn is 'human'"),
        ({"conversations": [SYSTEM]}, "no_target", "the last turn is 'system'"),
        ({"conversations": [HUMAN, HUMAN, GPT]}, "turns", "turn 2 is 'human', must be 'gpt'"),
        ({"conversations": [HUMAN, GPT, SYSTEM, GPT]}, "turns", "turn 3 is 'system', must be 'human'"),
        ({"conversations": [{"from": "Human", "value": "a"}, GPT]}, "turns", "turn 1: from is 'Human'"),
        ({"conversations": [HUMAN, {"from": "assistant ", "value": "a"}]}, "turns", "turn 2: from is 'assistant '"),
        ({"conversations": [HUMAN, {"from": "gpt", "value": " \n"}]}, "no_target", "turn 2: the answer is empty"),
        ({"conversations": [HUMAN, {"from": "gpt", "value": None}]}, "turns", "turn 2: value must be text"),
        ({"conversations": [human("\ud800"), GPT]}, "encoding", "half a surrogate pair"),
        ({"conversations": [3, GPT]}, "turns", "turn 1 must be an object"),
        ({"conversations": [{**HUMAN, "form": "x"}, GPT]}, "record", "unknown key 'form', nearest known: 'from'"),
    ],
)
def test_a_record_that_cannot_be_trained_on_is_refused(content: dict[str, Any], reason: str, expected: str) -> None:
    with pytest.raises(DataError, match=expected) as refused:
        parse(**content)
    assert refused.value.reason is Reason(reason)


@pytest.mark.parametrize(
    ("line", "reason", "expected"),
    [
        (b'{"conversations": [', "not_json", "not one JSON object"),
        (b"{} {}", "not_json", "not one JSON object"),
        (b"[]", "not_json", "must be a JSON object"),
        (b"", "not_json", "not one JSON object"),
        (b'{"image": "a", "image": "b"}', "record", "'image' occurs twice"),
        (b'{"length": NaN}', "not_json", "NaN is not JSON"),
        (b'{"length": -Infinity}', "not_json", "-Infinity is not JSON"),
        (b'{"length": ' + b"1" * 5000 + b"}", "not_json", "thousands of digits"),
        ('{"a": 1}'.encode("utf-16"), "encoding", "not UTF-8"),
        ('{"a": 1}'.encode("utf-16-le"), "encoding", "as UTF-16 does"),
        (b'{"id": "caf\xe9"}', "encoding", "not UTF-8"),
        (b"[" * 100_000, "not_json", "nested too deeply"),
        (b" " * (MAX_LINE_BYTES + 1), "line_too_long", "in one line"),
    ],
    ids=lambda value: value[:20] if isinstance(value, bytes) else None,
)
def test_a_line_that_is_no_record_is_refused(line: bytes, reason: str, expected: str) -> None:
    error = refuse(line)
    assert expected in str(error)
    assert error.reason is Reason(reason)


@pytest.mark.parametrize("line", [b"\xef\xbb\xbf%s\n", b"%s\r\n", b"  %s  \n"])
def test_a_byte_order_mark_and_other_line_ends_are_read(line: bytes) -> None:
    assert parse_record(line % json.dumps({"conversations": [HUMAN, GPT]}).encode()) == parse()


def test_keys_by_the_thousand_and_keys_of_megabytes_are_refused_at_once() -> None:
    # Counting each key anew took 4.5 s for 20,000; difflib 0.6 s and 100 MB for two million letters.
    keys = ",".join(f'"{number}":0' for number in range(200_000))
    started = time.monotonic()
    assert "the key 'z' occurs twice" in str(refuse(f'{{{keys},"z":1,"z":2}}'.encode()))
    assert "nearest known" in str(refuse(f'{{"{"ab" * 5_000_000}":1}}'.encode()))
    assert len(str(refuse(f'{{"{"a" * 1000}":1,"{"a" * 1000}":2}}'.encode()))) < 200
    assert time.monotonic() - started < 5


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["from", "value"]), inner, max_size=2),
    max_leaves=8,
)
KEYS = ("id", "image", "video", "clip", "width", "height", "width_list", "conversations", "length")


@given(st.dictionaries(st.sampled_from(KEYS), json_values))
def test_any_json_object_is_a_record_or_a_data_error(content: dict[str, Any]) -> None:
    try:
        record = parse_record(json.dumps(content).encode())
    except DataError:
        return
    assert sum(turn["value"].count("<image>") for turn in record.turns if turn["from"] == "human") == len(record.images)
    assert record.turns[-1]["from"] == "gpt"


turns = st.lists(st.tuples(st.text(max_size=20), st.text(min_size=1, max_size=20)), min_size=1, max_size=4)


@given(turns, st.integers(0, 3), st.booleans())
def test_a_sound_record_comes_out_as_it_was_written(
    pairs: list[tuple[str, str]], num_images: int, has_sizes: bool
) -> None:
    conversations = []
    for number, (question, answer) in enumerate(pairs):
        tags = "<image>" * num_images if number == 0 else ""
        conversations += [human(f"{tags}{question}".replace("<video>", "")), {"from": "gpt", "value": f"{answer}."}]
    names = [f"{number}.png" for number in range(num_images)]
    sizes = {"width_list": [7] * num_images, "height_list": [9] * num_images} if has_sizes and num_images else {}
    record = parse_record(json.dumps({"image": names, "conversations": conversations, **sizes}).encode())
    assert record.turns == tuple(conversations)
    assert record.images == tuple(names)
    assert record.sizes == (((7, 9),) * num_images if sizes else None)


@given(st.binary(max_size=64))
def test_any_bytes_are_a_record_or_a_data_error(line: bytes) -> None:
    with pytest.raises(DataError):
        parse_record(line)


def test_a_line_that_is_too_long_is_one_line_and_not_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 4)
    lines = list(records.iter_lines(io.BytesIO(b"abc\n\nabcd\n" + b"x" * 99 + b"\nabcde")))
    assert lines == [b"abc\n", b"\n", b"abcd\n", b"xxxxx", b"abcde"]
