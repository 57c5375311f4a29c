"""Manifests and self-checking records: what goes in comes out, and nothing else is believed."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internvl_core.checkpoint.manifest import (
    CheckpointKind,
    FileEntry,
    Manifest,
    check_files,
    describe_file,
    list_files,
)
from internvl_core.checkpoint.record import pack_record
from internvl_core.contract import CheckpointRef
from internvl_core.errors import CheckpointCorrupt, CheckpointError

JSON_VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=10,
)
DIGESTS = st.binary(min_size=32, max_size=32).map(bytes.hex)
PARTS = st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=8).filter(lambda part: part not in "..")
FILE_ENTRIES = st.builds(
    FileEntry,
    path=st.lists(PARTS, min_size=1, max_size=3).map("/".join),
    size_bytes=st.integers(min_value=0, max_value=2**63 - 1),
    sha256=DIGESTS,
)


def is_tree(entries: list[FileEntry]) -> bool:
    """Tell whether no file is another one's folder."""
    return not any(other.path.startswith(f"{entry.path}/") for entry in entries for other in entries)


MANIFESTS = st.builds(
    Manifest,
    stage=st.text(),
    fingerprint=DIGESTS,
    step=st.integers(min_value=0),
    fence=st.integers(min_value=1),
    kind=st.sampled_from(CheckpointKind),
    parent=st.none() | st.builds(CheckpointRef, uri=st.text(), digest=DIGESTS),
    info=st.dictionaries(st.text(), JSON_VALUES, max_size=3),
    files=st.lists(FILE_ENTRIES, max_size=3, unique_by=lambda entry: entry.path.casefold()).filter(is_tree).map(tuple),
)
MANIFEST = Manifest(
    stage="stage2",
    fingerprint="ab" * 32,
    step=20,
    fence=1,
    kind=CheckpointKind.FINAL,
    parent=CheckpointRef("s3://bucket/stage1", "cd" * 32),
    info={"world_size": 2},
    files=(FileEntry("model.safetensors", 3, hashlib.sha256(b"abc").hexdigest()),),
)


def describe_files(directory: Path) -> tuple[FileEntry, ...]:
    return tuple(describe_file(directory, path) for path in list_files(directory))


@given(MANIFESTS)
def test_a_manifest_survives_its_bytes(manifest: Manifest) -> None:
    read = Manifest.from_bytes(manifest.to_bytes(), where="here")
    assert read == manifest
    assert read.digest == manifest.digest == hashlib.sha256(manifest.to_bytes()).hexdigest()


@given(MANIFESTS, st.data())
def test_any_flipped_bit_of_a_manifest_is_refused(manifest: Manifest, data: st.DataObject) -> None:
    record = bytearray(manifest.to_bytes())
    at = data.draw(st.integers(0, len(record) - 1))
    record[at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(CheckpointCorrupt, match="here"):
        Manifest.from_bytes(bytes(record), where="here")


def test_every_truncation_of_a_manifest_is_refused() -> None:
    record = MANIFEST.to_bytes()
    for size in range(len(record)):
        with pytest.raises(CheckpointCorrupt, match="damaged record"):
            Manifest.from_bytes(record[:size], where="here")


def test_a_record_is_a_digest_line_and_a_json_object() -> None:
    first_line, body = MANIFEST.to_bytes().split(b"\n", 1)
    assert first_line.decode() == hashlib.sha256(body).hexdigest()
    assert json.loads(body)["step"] == 20


@pytest.mark.parametrize(
    "path", ["../outside", "/etc/passwd", "a/../../outside", "", ".", "a//b", "a/", "./a", "..", "a\0b"]
)
def test_a_name_that_could_leave_the_directory_is_refused(path: str, tmp_path: Path) -> None:
    entry = replace(MANIFEST.files[0], path=path)
    with pytest.raises(CheckpointCorrupt, match="not a plain path"):
        Manifest.from_bytes(replace(MANIFEST, files=(entry,)).to_bytes(), where="here")
    with pytest.raises(CheckpointCorrupt, match="not a plain path"):
        check_files(tmp_path, [entry])


@pytest.mark.parametrize(
    "change", [{"version": 2}, {"kind": "best"}, {"files": [{"path": "x"}]}, {"parent": {"url": "x"}}, {"extra": 1}]
)
def test_a_whole_record_that_is_no_manifest_of_ours_is_refused(change: dict[str, Any]) -> None:
    content = json.loads(MANIFEST.to_bytes().split(b"\n", 1)[1])
    with pytest.raises(CheckpointCorrupt, match="here"):
        Manifest.from_bytes(pack_record({**content, **change}), where="here")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([{"path": "a", "size_bytes": 2**63}], "a has 9223372036854775808 bytes, which no file has"),
        ([{"path": "a", "size_bytes": -1}], "a has -1 bytes"),
        ([{"path": "a", "size_bytes": True}], "a has True bytes"),
        ([{"path": "a", "size_bytes": 1.5}], "a has 1.5 bytes"),
        ([{"path": "a", "size_bytes": "3"}], "a has '3' bytes"),
        ([{"path": "a", "sha256": "AB" * 32}], "which is none"),
        ([{"path": "a", "sha256": None}], "which is none"),
        ([{"path": "Model.bin"}, {"path": "model.BIN"}], r"names model\.bin twice"),
        ([{"path": "a"}, {"path": "a"}], "names a twice"),
        ([{"path": "a"}, {"path": "a/b"}], "names a as a file"),
        ([{"path": "MANIFEST"}], "names MANIFEST as a file"),
        ([{"path": 7}], "not a manifest"),
        ([7], "not a manifest"),
        (7, "not a manifest"),
    ],
)
def test_a_manifest_of_files_that_cannot_be_is_refused(files: Any, message: str) -> None:
    content = json.loads(MANIFEST.to_bytes().split(b"\n", 1)[1])
    whole = {"size_bytes": 3, "sha256": "ab" * 32}
    if isinstance(files, list):
        files = [{**whole, **entry} if isinstance(entry, dict) else entry for entry in files]
    with pytest.raises(CheckpointCorrupt, match=message):
        Manifest.from_bytes(pack_record({**content, "files": files}), where="here")


def test_a_directory_that_not_every_file_system_can_hold_is_not_published(tmp_path: Path) -> None:
    for name in ("model.bin", "Model.bin"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model\.bin is there twice but for case"):
        list_files(tmp_path)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    root = tmp_path / "checkpoint"
    (root / "optimizer").mkdir(parents=True)
    (root / "model.safetensors").write_bytes(b"abc" * 1000)
    (root / "optimizer" / "rank-0.bin").write_bytes(b"moments")
    (root / "empty.txt").touch()
    return root


def test_files_are_described_in_order_with_size_and_hash(directory: Path) -> None:
    described = describe_files(directory)
    assert [entry.path for entry in described] == ["empty.txt", "model.safetensors", "optimizer/rank-0.bin"]
    assert described[1] == FileEntry("model.safetensors", 3000, hashlib.sha256(b"abc" * 1000).hexdigest())
    check_files(directory, described)


def test_a_changed_byte_is_told_with_both_hashes(directory: Path) -> None:
    described = describe_files(directory)
    (directory / "optimizer" / "rank-0.bin").write_bytes(b"Moments")
    expected, found = described[2].sha256, hashlib.sha256(b"Moments").hexdigest()
    with pytest.raises(CheckpointCorrupt, match=rf"rank-0\.bin: sha256 is {found}, the manifest says {expected}"):
        check_files(directory, described)


def test_another_size_is_told_with_both_sizes(directory: Path) -> None:
    described = describe_files(directory)
    (directory / "model.safetensors").write_bytes(b"abc")
    with pytest.raises(CheckpointCorrupt, match=r"model\.safetensors: 3 bytes, the manifest says 3000"):
        check_files(directory, described)


def test_a_missing_file_is_told(directory: Path) -> None:
    described = describe_files(directory)
    (directory / "empty.txt").unlink()
    with pytest.raises(CheckpointCorrupt, match=r"empty\.txt: missing"):
        check_files(directory, described)


def test_a_file_that_the_manifest_does_not_name_is_told(directory: Path) -> None:
    described = describe_files(directory)
    (directory / "scheduler.pt").write_bytes(b"planted")
    with pytest.raises(CheckpointCorrupt, match=r"scheduler\.pt: not named"):
        check_files(directory, described)


def test_the_manifest_beside_the_files_is_no_file_of_the_checkpoint(directory: Path) -> None:
    described = describe_files(directory)
    (directory / "MANIFEST").write_bytes(MANIFEST.to_bytes())
    check_files(directory, described)
    with pytest.raises(CheckpointError, match="a name that the store needs"):
        describe_files(directory)


def test_a_link_to_a_file_of_the_directory_counts_as_that_file(directory: Path) -> None:
    (directory / "latest.bin").symlink_to("optimizer/rank-0.bin")
    described = {entry.path: entry.sha256 for entry in describe_files(directory)}
    assert described["latest.bin"] == described["optimizer/rank-0.bin"]


@pytest.mark.parametrize("target", ["../outside.txt", "/etc/hostname", "optimizer", "nowhere"])
def test_a_link_that_is_no_file_of_the_directory_is_refused(directory: Path, tmp_path: Path, target: str) -> None:
    (tmp_path / "outside.txt").write_text("private")
    described = describe_files(directory)
    (directory / "link").symlink_to(target)
    with pytest.raises(CheckpointError, match="links to"):
        describe_files(directory)
    with pytest.raises(CheckpointCorrupt, match="links to"):
        check_files(directory, described)
