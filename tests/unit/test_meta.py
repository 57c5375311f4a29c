import json
import os
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest

from internvl_core.data.meta import digest_meta, load_meta
from internvl_core.errors import DataError

LINE = '{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}\n'


def write_meta(folder: Path, content: Any = None, **entry: Any) -> Path:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "a.jsonl").write_text(LINE * 3)
    content = content or {"pets": {"root": "images", "annotation": "a.jsonl", **entry}}
    path = folder / "meta.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_relative_paths_start_at_the_meta_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    (meta,) = load_meta(write_meta(tmp_path, repeat_time=2, max_dynamic_patch=6, length=3, data_augment=True))
    assert (meta.root, meta.annotation) == (str(tmp_path / "images"), str(tmp_path / "a.jsonl"))
    assert (meta.name, meta.repeat_time, meta.max_dynamic_patch, meta.data_augment) == ("pets", 2, 6, True)


def test_an_unknown_key_is_refused_with_the_nearest_known_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"meta\.json: dataset 'pets': unknown key 'repat_time'.*'repeat_time'"):
        load_meta(write_meta(tmp_path, repat_time=2))


def test_all_problems_come_in_one_message(tmp_path: Path) -> None:
    path = write_meta(tmp_path, {"a": {"root": "images"}, "b": {"root": 1, "annotation": "a.jsonl", "repeat_time": 0}})
    with pytest.raises(DataError) as error:
        load_meta(path)
    message = str(error.value)
    assert "'a': annotation" in message
    assert "'b': root" in message
    assert "'b': repeat_time" in message


def test_two_datasets_of_one_name_are_refused(tmp_path: Path) -> None:
    entry = '{"root": "images", "annotation": "a.jsonl"}'
    with pytest.raises(DataError, match="'pets' occurs twice"):
        load_meta(write_meta(tmp_path, f'{{"pets": {entry}, "pets": {entry}}}'))


@pytest.mark.parametrize("weight", [0, 1e-6, -1, 1e9, "2"])
def test_a_weight_that_would_stretch_an_epoch_without_end_is_refused(tmp_path: Path, weight: object) -> None:
    with pytest.raises(DataError, match="weight"):
        load_meta(write_meta(tmp_path, weight=weight))


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_a_meta_file_that_is_no_file_is_not_opened(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "meta.json"
    {"pipe": os.mkfifo, "device": lambda link: link.symlink_to("/dev/zero"), "folder": Path.mkdir}[kind](path)
    with pytest.raises(DataError, match=r"meta\.json: is not a regular file"):
        load_meta(path)


def test_a_message_stays_short_whatever_the_file(tmp_path: Path) -> None:
    for content in ({str(number): {f"x{number}": 1} for number in range(50_000)}, {"a" * 100_000: {"b" * 100_000: []}}):
        with pytest.raises(DataError) as refused:
            load_meta(write_meta(tmp_path, content))
        assert len(str(refused.value)) < 10_000


@pytest.mark.parametrize("repeat_time", [0, -1, "2", True, 1e9, None])
def test_a_repeat_time_that_is_no_number_of_passes_is_refused(tmp_path: Path, repeat_time: object) -> None:
    with pytest.raises(DataError, match="repeat_time"):
        load_meta(write_meta(tmp_path, repeat_time=repeat_time))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", r"meta\.json:1:1: not JSON"),
        ('{"a": 1,}', r"meta\.json:1:\d+: not JSON"),
        ('{"a": {"root": ".", "annotation": "a.jsonl", "repeat_time": NaN}}', "NaN"),
        ("[]", "one key per data set"),
        ("{}", "one key per data set"),
        ('{"a": 3}', "'a': must be an object"),
        ('{"a\\u0000": {}}', "printable"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_broken_meta_file_is_named_with_the_place(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "meta.json"
    path.write_text(text)
    with pytest.raises(DataError, match=expected):
        load_meta(path)


def test_a_byte_order_mark_is_read_over(tmp_path: Path) -> None:
    path = write_meta(tmp_path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(load_meta(path)) == 1


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"root": "nowhere"}, "nowhere is not a directory"),
        ({"annotation": "b.jsonl"}, r"b\.jsonl is not a file"),
        ({"annotation": "images"}, r"images is not a \.jsonl file"),
        ({"annotation": "a.json"}, r"a\.json is not a \.jsonl file"),
        ({"root": "nosuch://bucket/images"}, "Unknown protocol nosuch"),
        ({"root": "simplecache::s3://bucket/images"}, "chains protocols"),
        ({"annotation": "s3://key:secret@bucket/a.jsonl"}, "carries credentials"),
        ({"annotation": "file://a.jsonl"}, "is a relative path"),
        ({"annotation": f"{'a' * 300}.jsonl"}, "is not a file"),
        ({"annotation": f"{'a/' * 3000}.jsonl"}, "at most 4096 characters"),
        ({"annotation": "a\nb.jsonl"}, r"annotation: 'a\\nb.jsonl' holds a control character"),
        ({"root": "\ud800"}, r"root: '\\ud800' holds .* half a surrogate pair"),
    ],
)
def test_a_dataset_that_does_not_fit_its_files_is_refused(tmp_path: Path, entry: dict[str, Any], expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        load_meta(write_meta(tmp_path, **entry))


def test_no_secret_of_an_address_is_repeated(tmp_path: Path) -> None:
    with pytest.raises(DataError) as refused:
        load_meta(write_meta(tmp_path, annotation="s3://key:hunter2@bucket/a.jsonl"))
    assert "hunter2" not in str(refused.value)


def test_a_data_set_may_have_a_chat_format_a_weight_and_a_system_prompt_of_its_own(tmp_path: Path) -> None:
    own = {"conv_style": "Hermes-2", "weight": 2, "system_prompt": "", "ignore_keys": ["model"]}
    (meta,) = load_meta(write_meta(tmp_path, **own))
    assert (meta.conv_style, meta.weight, meta.system_prompt, meta.ignore_keys) == ("Hermes-2", 2, "", ("model",))


def test_an_unknown_chat_format_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'pets': conv_style: 'internvl3'.*internvl2_5"):
        load_meta(write_meta(tmp_path, conv_style="internvl3"))


def test_a_meta_file_of_megabytes_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "meta.json"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(DataError, match="larger than 16 MiB"):
        load_meta(path)


def test_roots_and_annotations_may_lie_on_s3(tmp_path: Path, s3_bucket_uri: str) -> None:
    filesystem = fsspec.filesystem("s3")
    filesystem.pipe_file(f"{s3_bucket_uri}/a.jsonl", (LINE * 3).encode())
    filesystem.pipe_file(f"{s3_bucket_uri}/images/1.png", b"...")
    path = write_meta(tmp_path, root=f"{s3_bucket_uri}/images", annotation=f"{s3_bucket_uri}/a.jsonl")
    (meta,) = load_meta(path)
    assert (meta.root, meta.annotation) == (f"{s3_bucket_uri}/images", f"{s3_bucket_uri}/a.jsonl")
    with pytest.raises(DataError, match=r"b\.jsonl is not a file"):
        load_meta(write_meta(tmp_path, annotation=f"{s3_bucket_uri}/b.jsonl"))
    local = digest_meta(write_meta(tmp_path), tmp_path / "cache")
    assert digest_meta(write_meta(tmp_path, annotation=f"{s3_bucket_uri}/a.jsonl"), tmp_path / "cache") != local


def test_a_missing_meta_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such meta file"):
        load_meta(tmp_path / "meta.json")


@pytest.mark.parametrize(
    ("repeat_time", "num_records", "expected"),
    [(1, 10, (1, 0)), (2.7, 10, (2, 7)), (0.25, 8, (0, 2)), (0.01, 10, (0, 1)), (3, 1, (3, 0))],
)
def test_repeat_time_is_passes_and_a_share(
    tmp_path: Path, repeat_time: float, num_records: int, expected: tuple[int, int]
) -> None:
    (meta,) = load_meta(write_meta(tmp_path, repeat_time=repeat_time))
    assert meta.count_samples(num_records) == expected


def test_the_digest_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    path = write_meta(tmp_path / "here")
    before = digest_meta(path, tmp_path / "cache")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    assert digest_meta(tmp_path / "there" / "meta.json", tmp_path / "cache") == before
    (tmp_path / "here" / "a.jsonl").write_text(LINE * 2 + LINE.replace("b", "c"))
    assert digest_meta(path, tmp_path / "cache") != before


def test_the_digest_takes_a_default_and_its_spelling_out_for_the_same(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    implicit = digest_meta(write_meta(tmp_path), cache)
    assert digest_meta(write_meta(tmp_path, repeat_time=1, data_augment=False), cache) == implicit
    assert digest_meta(write_meta(tmp_path, repeat_time=2), cache) != implicit
