"""Which addresses are accepted, and that none is repeated with its secrets."""

import pytest
from fsspec.registry import known_implementations

from internvl_core.checkpoint.store import StageStore, check_store, is_checkpoint_uri
from internvl_core.checkpoint.uri import normalize_uri
from internvl_core.errors import ArgumentError

SECRETS = [
    "s3://AKIAEXAMPLE:hunter2@bucket/runs",
    "sftp://user:hunter2@host/runs",
    "s3://hunter2@bucket/runs",
    "s3://bucket/runs?signature=hunter2",
    "s3://bucket/runs#hunter2",
    "simplecache::s3://AKIAEXAMPLE:hunter2@bucket/runs",
]


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("/data/runs", "file:///data/runs"),
        ("/data//runs/../runs/", "file:///data/runs"),
        ("file:///data/runs/", "file:///data/runs"),
        ("local:///data/runs", "file:///data/runs"),
        ("memory://runs/", "memory://runs"),
        ("s3://bucket/runs//", "s3://bucket/runs"),
        ("S3://bucket", "s3://bucket"),
    ],
)
def test_every_address_has_one_normal_form(text: str, normal: str) -> None:
    assert normalize_uri(text) == normal
    assert normalize_uri(normal) == normal


@pytest.mark.parametrize("text", SECRETS)
def test_a_uri_that_may_carry_a_secret_is_refused_without_repeating_it(text: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        check_store(text)
    assert "hunter2" not in str(caught.value)
    assert "AKIA" not in str(caught.value)


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(ArgumentError, match="Unknown protocol s4://"):
        check_store("s4://bucket/runs")


@pytest.mark.parametrize("text", ["http://169.254.169.254/latest/meta-data", "https://host/runs", "hf://owner/model"])
def test_what_can_be_read_from_but_holds_no_lock_is_no_store(text: str) -> None:
    with pytest.raises(ArgumentError, match=r"cannot be a checkpoint store\. Choose another store: abfs, az, file, "):
        check_store(text)
    with pytest.raises(ArgumentError, match="cannot be a checkpoint store"):
        StageStore(text, "stage2", "ab" * 32)


def test_a_protocol_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    # s3a: the class of s3 may be loaded already.
    missing = {"class": "no_such_package.S3", "err": "Install it"}
    monkeypatch.setitem(known_implementations, "s3a", missing)
    with pytest.raises(ArgumentError, match=r"pip install 'internvl-pipeline\[s3\]'"):
        check_store("s3a://bucket/runs")


@pytest.mark.parametrize("text", ["runs", "./runs", "file://runs", "", "~/runs"])
def test_a_relative_path_is_refused(text: str) -> None:
    with pytest.raises(ArgumentError, match="relative path"):
        check_store(text)


@pytest.mark.parametrize("text", ["s3://bucket/../other", "memory://a/./b"])
def test_dots_as_folders_are_refused(text: str) -> None:
    with pytest.raises(ArgumentError, match="as a folder"):
        check_store(text)


def test_a_protocol_that_cannot_write_is_refused() -> None:
    with pytest.raises(ArgumentError, match="Choose another store"):
        check_store("data://text/plain,hello")


@pytest.mark.parametrize("stage", ["", "../other", "a/b", ".hidden", "a b"])
def test_a_stage_name_that_is_no_folder_name_is_refused(stage: str) -> None:
    with pytest.raises(ArgumentError, match="cannot name a folder"):
        StageStore("memory://runs", stage, "ab" * 32)


@pytest.mark.parametrize("text", ["s3://b/x", "file:///x", "memory://x", "gs://b", "simplecache::s3://b"])
def test_a_protocol_makes_a_checkpoint_uri(text: str) -> None:
    assert is_checkpoint_uri(text)


@pytest.mark.parametrize("text", ["OpenGVLab/InternVL2_5-1B", "/models/x", "./x", "name", "C:/models"])
def test_folders_and_hub_ids_are_no_checkpoint_uris(text: str) -> None:
    assert not is_checkpoint_uri(text)


@pytest.mark.parametrize("uri", ["s3://key:pa/55@bucket/runs", "gs://key:pa55/x"])
def test_a_password_with_a_slash_is_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(ArgumentError, match="has a colon") as caught:
        normalize_uri(uri)
    assert "55" not in str(caught.value)
