import json
import os
import pickle
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from data_sets import build_encoding, record, write_meta, write_records

from internvl_core.data import annotation, index_build
from internvl_core.data.annotation import AnnotationChanged
from internvl_core.data.index import DatasetIndex, open_index
from internvl_core.data.index_build import BLANK, STATUS
from internvl_core.data.index_mend import mend_index
from internvl_core.data.meta import load_meta
from internvl_core.data.mixture import Mixture
from internvl_core.data.tiling import Tiling
from internvl_core.errors import DataError, InternVLError, Reason


def open_one(path: Path, *, num_processes: int | None = 1, **changes: Any) -> DatasetIndex:
    (meta,) = load_meta(path)
    return open_index(meta, build_encoding(**changes), path.parent / "cache", num_processes=num_processes)


def list_built(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "cache" / "index").iterdir())


def test_a_row_says_where_a_line_is_and_how_long_its_sample(tmp_path: Path) -> None:
    records = [record("1.png", width=48, height=32), "", record(answer="long " * 30), "no record"]
    index = open_one(write_meta(tmp_path, {"pets": records}))
    assert index.status.tolist() == [0, BLANK, 0, STATUS[Reason.NOT_JSON]]
    assert index.tiles.tolist() == [7, 0, 0, 0]
    assert (index.num_lines, index.num_records, index.num_samples) == (4, 3, 2)
    assert index.kind_counts == {"image": 1, "text": 1}
    assert index.problem_counts == {Reason.NOT_JSON: 1}
    assert [json.loads(index.read_line(row))["image"] for row in (0, 2)] == ["1.png", None]
    (problem,) = index.iter_problems()
    assert (problem.line, problem.reason) == (4, Reason.NOT_JSON)
    assert 0 < index.supervised[0] < index.tokens[0]


def test_tiles_from_headers_are_those_from_the_record(tmp_path: Path) -> None:
    said, read = tmp_path / "said", tmp_path / "read"
    for folder in (said, read):
        folder.mkdir()
    images = ["0.png", "1.png", "2.png"]
    sizes = {"width_list": [16, 48, 20], "height_list": [16, 32, 90]}
    by_record = open_one(write_meta(said, {"pets": [record("2.png", width=20, height=90), record(images, **sizes)]}))
    by_header = open_one(write_meta(read, {"pets": [record("2.png"), record(images)]}))
    assert by_record.tiles.tolist() == by_header.tiles.tolist()
    assert by_record.tokens.tolist() == by_header.tokens.tolist()


def test_an_index_is_built_once_for_a_content_and_an_encoding(tmp_path: Path) -> None:
    path = write_meta(tmp_path, {"pets": [record()] * 3})
    first = open_one(path).directory
    written = (first / "index.json").stat().st_mtime_ns
    assert open_one(path).directory == first
    assert (first / "index.json").stat().st_mtime_ns == written
    assert open_one(path, conv_style="Hermes-2").directory != first
    assert open_one(path, tiling=Tiling(16, 1, 4, use_thumbnail=True, is_dynamic=True)).directory != first
    assert len(list_built(tmp_path)) == 3


def test_an_edited_annotation_is_indexed_anew(tmp_path: Path) -> None:
    path = write_meta(tmp_path, {"pets": [record(answer="cat")]})
    before = open_one(path)
    edited = tmp_path / "pets.jsonl"
    status = edited.stat()
    # The same size and the same time of modification: only the time of change tells.
    edited.write_text(edited.read_text().replace("cat", "dog"))
    os.utime(edited, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert open_one(path).directory != before.directory


def test_an_annotation_edited_under_a_running_stage_is_noticed(tmp_path: Path) -> None:
    path = write_meta(tmp_path, {"pets": [record(answer="cat")] * 2})
    index = open_one(path)
    line = index.read_line(1)
    edited = tmp_path / "pets.jsonl"
    # A touch is no edit.
    edited.touch()
    assert index.read_line(1) == line
    edited.write_text(edited.read_text().replace("cat", "dog"))
    with pytest.raises(AnnotationChanged, match=r"pets\.jsonl: was edited after it was indexed"):
        index.read_line(1)


def test_an_annotation_that_is_replaced_is_read_to_the_end_as_it_was(tmp_path: Path) -> None:
    index = open_one(write_meta(tmp_path, {"pets": [record(answer="cat")] * 2}))
    line = index.read_line(0)
    write_records(tmp_path / "new.jsonl", [record(answer="dog")])
    (tmp_path / "new.jsonl").replace(tmp_path / "pets.jsonl")
    assert index.read_line(0) == line


def test_builders_at_the_same_time_leave_one_whole_index(tmp_path: Path) -> None:
    path = write_meta(tmp_path, {"pets": [record("1.png"), record()] * 200})
    together = threading.Barrier(4)

    def build(_: int) -> tuple[Path, list[int]]:
        together.wait()
        index = open_one(path)
        return index.directory, index.tokens.tolist()

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(build, range(4)))
    assert all(result == results[0] for result in results)
    assert list_built(tmp_path) == [results[0][0].name]


def test_several_processes_build_what_one_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_build, "_MIN_PARALLEL_BYTES", 0)
    monkeypatch.setattr(index_build, "_PART_BYTES", 3000)
    records: list[Any] = [record(answer="word " * (1 + number % 17)) for number in range(400)]
    records[100:102] = ["", "broken"]
    path = write_meta(tmp_path, {"pets": records})
    parallel = open_one(path, num_processes=2)
    columns = {name: getattr(parallel, name).tolist() for name in index_build.COLUMNS}
    parallel.directory.rename(tmp_path / "parallel")
    alone = open_one(path, num_processes=1)
    assert {name: getattr(alone, name).tolist() for name in index_build.COLUMNS} == columns
    assert [problem.line for problem in alone.iter_problems()] == [102]


def test_what_a_killed_builder_left_is_neither_used_nor_in_the_way(tmp_path: Path) -> None:
    path = write_meta(tmp_path, {"pets": [record()]})
    directory = open_one(path).directory
    (directory / "index.json").unlink()
    left = directory.parent / ".building-dead"
    left.mkdir()
    directory.rename(left / "half")
    os.utime(left, (0, 0))
    assert open_one(path).num_samples == 1
    assert not left.exists()


@pytest.mark.parametrize("name", ["tokens.npy", "status.npy", "index.json"])
def test_an_index_that_was_cut_is_refused_by_name(tmp_path: Path, name: str) -> None:
    path = write_meta(tmp_path, {"pets": [record()] * 500})
    file = open_one(path).directory / name
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(InternVLError, match=r"\.0: is damaged: .*Remove the folder"):
        open_one(path)


def test_a_column_of_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    path = write_meta(tmp_path, {"pets": [record()]})
    np.save(open_one(path).directory / "tokens.npy", np.zeros(7, np.int32))
    with pytest.raises(InternVLError, match="tokens has another shape"):
        _ = open_one(path).tokens


def test_an_open_index_costs_few_file_descriptors(tmp_path: Path) -> None:
    path = write_meta(tmp_path, {f"pets{number}": [record()] * 2 for number in range(20)})
    before = len(list(Path("/dev/fd").iterdir()))
    indexes = [open_index(meta, build_encoding(), tmp_path / "cache") for meta in load_meta(path)]
    Mixture(indexes, seed=0, max_tokens=500)
    for index in indexes:
        index.read_line(0)
    # status, tokens, offsets and the annotation itself.
    assert len(list(Path("/dev/fd").iterdir())) - before <= 4 * len(indexes)


def test_a_medium_that_has_come_since_is_seen_by_a_second_look(tmp_path: Path) -> None:
    path = write_meta(tmp_path, {"pets": [record(), record("new.png"), record("never.png"), "broken"]})
    before = open_one(path)
    assert before.problem_counts == {Reason.MISSING: 2, Reason.NOT_JSON: 1}
    assert mend_index(before, build_encoding()) == before.directory
    shutil.copy(tmp_path / "1.png", tmp_path / "new.png")
    mended = mend_index(before, build_encoding())
    index = open_one(path)
    assert index.directory == mended != before.directory
    assert index.problem_counts == {Reason.MISSING: 1, Reason.NOT_JSON: 1}
    assert [problem.line for problem in index.iter_problems()] == [3, 4]
    assert index.tiles.tolist() == [0, 7, 0, 0]
    assert index.kind_counts == {"image": 1, "text": 1}
    # A stage that runs keeps what it has.
    assert before.tiles.tolist() == [0, 0, 0, 0]
    tokens = index.tokens.tolist()
    shutil.rmtree(tmp_path / "cache")
    assert open_one(path).tokens.tolist() == tokens


def test_an_annotation_that_is_being_written_is_not_indexed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_meta(tmp_path, {"pets": [record()] * 3})

    def hash_slowly(file: Path) -> str:
        with file.open("a") as more:
            more.write(json.dumps(record()) + "\n")
        return "digest"

    monkeypatch.setattr(annotation, "hash_file", hash_slowly)
    with pytest.raises(DataError, match=r"pets\.jsonl: is being written to\. Run again"):
        open_one(path)
    assert not (tmp_path / "cache" / "index").exists()


def die(part: object) -> None:
    os._exit(1)


def test_a_process_that_dies_is_told_with_its_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_build, "_MIN_PARALLEL_BYTES", 0)
    monkeypatch.setattr(index_build, "_build_in_worker", die)
    path = write_meta(tmp_path, {"pets": [record()] * 3})
    with pytest.raises(DataError, match=r"pets\.jsonl:1: a process that measured the lines from here on died"):
        open_one(path, num_processes=2)
    assert list_built(tmp_path) == []


def test_an_index_travels_to_a_worker_without_its_columns(tmp_path: Path) -> None:
    index = open_one(write_meta(tmp_path, {"pets": [record()] * 5000}))
    assert index.tokens[0] > 0
    copied = pickle.dumps(index)
    assert len(copied) < 5000
    assert pickle.loads(copied).read_line(4999) == index.read_line(4999)


@pytest.mark.parametrize(
    ("records", "entry", "expected"),
    [
        ([], {}, "holds no record"),
        (["", "  "], {}, "holds no record"),
        ([record()], {"length": 2}, r"'pets': length is 2, but .*pets\.jsonl has 1 records"),
    ],
)
def test_an_annotation_that_does_not_fit_its_meta_is_refused(
    tmp_path: Path, records: list[Any], entry: dict[str, Any], expected: str
) -> None:
    with pytest.raises(DataError, match=expected):
        open_one(write_meta(tmp_path, {"pets": records}, **entry))


@pytest.mark.parametrize(
    ("prompt", "expected"), [("a<|im_end|>", r"spells '<\|im_end\|>'"), ("\ud800", "half a surrogate pair")]
)
def test_a_system_prompt_that_is_no_text_is_refused_with_its_data_set(
    tmp_path: Path, prompt: str, expected: str
) -> None:
    with pytest.raises(DataError, match=f"dataset 'pets': system_prompt: {expected}"):
        open_one(write_meta(tmp_path, {"pets": [record()]}, system_prompt=prompt))


def test_a_line_of_hundreds_of_megabytes_is_left_out_unread(tmp_path: Path) -> None:
    path = write_meta(tmp_path, {"pets": [record()]})
    with (tmp_path / "pets.jsonl").open("r+b") as file:
        file.seek(400 << 20)
        file.write(b"\n" + json.dumps(record()).encode() + b"\n")
    index = open_one(path)
    assert index.status.tolist()[-1] == 0
    assert index.problem_counts == {Reason.LINE_TOO_LONG: 1}


def test_a_last_line_that_breaks_off_is_said_to_be_cut(tmp_path: Path) -> None:
    path = write_meta(tmp_path, {"pets": [record(), "{}"]})
    edited = tmp_path / "pets.jsonl"
    edited.write_bytes(edited.read_bytes()[:-2])
    (problem,) = open_one(path).iter_problems()
    assert "the file may have been cut off" in problem.message


def test_annotation_and_images_may_lie_on_s3(tmp_path: Path, s3_bucket_uri: str) -> None:
    path = write_meta(tmp_path, {"pets": [record("1.png"), record()]})
    local = open_one(path)
    filesystem = fsspec.filesystem("s3")
    for name in ("pets.jsonl", "1.png"):
        filesystem.put_file(str(tmp_path / name), f"{s3_bucket_uri}/{name}")
    entry = {"root": s3_bucket_uri, "annotation": f"{s3_bucket_uri}/pets.jsonl"}
    path.write_text(json.dumps({"pets": entry}))
    remote = open_one(path)
    assert remote.tokens.tolist() == local.tokens.tolist()
    assert remote.read_line(0) == local.read_line(0)
    # A new version is a new file.
    filesystem.pipe_file(f"{s3_bucket_uri}/pets.jsonl", json.dumps(record(answer="Two dogs.")).encode())
    assert open_one(path).num_records == 1
