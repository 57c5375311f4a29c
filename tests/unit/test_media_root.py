import errno
import gc
import os
import pickle
import socket
import threading
import unicodedata
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from torch.utils.data import DataLoader, Dataset

from internvl_core.data.media_root import MAX_FILE_BYTES, MediaRoot, check_name, open_root
from internvl_core.errors import ArgumentError, DataError, MediaError, Reason, StoreUnavailable

FILES = {"a.jpg": b"jpeg", "pets/cat 1.png": b"png", "pets/empty.png": b"", "blob": bytes(range(256)) * 8192}
FRAMES = ["frame_10.jpg", "frame_2.jpg", "frame_1.jpg", "frame_02.jpg", ".DS_Store", "deeper/frame_0.jpg"]


@pytest.fixture(params=["local", "file URI", "memory", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> MediaRoot:
    """A root of each kind, with the same files."""
    if request.param == "s3":
        uri = f"{request.getfixturevalue('s3_bucket_uri')}/media"
    else:
        uri = f"memory://{uuid.uuid4().hex}/media" if request.param == "memory" else f"{tmp_path}/media"
    for name, body in {**FILES, **{f"clip/{frame}": b"frame" for frame in FRAMES}}.items():
        with fsspec.open(f"{uri}/{name}", "wb", auto_mkdir=True) as file:
            file.write(body)
    return open_root(f"file://{uri}" if request.param == "file URI" else uri)


@pytest.fixture
def local(tmp_path: Path) -> MediaRoot:
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "a.jpg").write_bytes(b"jpeg")
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    return open_root(str(tmp_path / "media"))


REFUSED_NAMES = {
    "upward": "../../etc/passwd",
    "upward in the middle": "pets/../../secret.jpg",
    "upward at the end": "pets/..",
    "absolute": "/etc/passwd",
    "file address": "file:///etc/shadow",
    "web address": "http://169.254.169.254/latest/meta-data",
    "another bucket": "s3://other-bucket/a.jpg",
    "a chain": "simplecache::http://example.com/a.jpg",
    "an archive in a bucket": "zip://a.jpg::s3://bucket/all.zip",
    "NUL": "a\0b.jpg",
    "line break": "a\nb.jpg",
    "delete": "a\x7f.jpg",
    "a control character above ASCII": "a\x85.jpg",
    "backslashes": "pets\\..\\secret.jpg",
    "half a surrogate pair": "a\ud800.jpg",
    "300 bytes": "a" * 300,
    "300 bytes of a hundred letters": "象" * 100,
    "5000 bytes": "ab/" * 1700,
    "nothing": "",
    "a dot": ".",
    "slashes": ".//",
}


@pytest.mark.parametrize("kind", REFUSED_NAMES)
def test_a_name_that_could_lead_elsewhere_is_refused_by_its_text(kind: str) -> None:
    with pytest.raises(DataError, match=r"^path ") as caught:
        check_name(REFUSED_NAMES[kind])
    assert caught.value.reason == Reason.PATH
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("kind", REFUSED_NAMES)
def test_no_method_takes_such_a_name(kind: str, local: MediaRoot) -> None:
    for method in (local.read, local.open, local.list_files):
        with pytest.raises(DataError) as caught:
            method(REFUSED_NAMES[kind])
        assert caught.value.reason == Reason.PATH


@pytest.mark.parametrize(
    "name", ["a.jpg", "a/b/c.jpg", "..a/b..jpg", "a%2e%2e/b", " a ", "象.jpg", "a:b", "-rf", "clip/"]
)
def test_other_names_are_taken_as_they_are(name: str) -> None:
    check_name(name)


def test_every_kind_of_root_reads_what_is_there(root: MediaRoot) -> None:
    assert root.exists()
    for name, body in FILES.items():
        assert root.read(name) == body
        with root.open(name) as file:
            assert file.read() == body


def test_every_kind_of_root_seeks(root: MediaRoot) -> None:
    with root.open("blob", block_bytes=1000) as file:
        assert file.seek(-3, os.SEEK_END) == len(FILES["blob"]) - 3
        assert file.read() == b"\xfd\xfe\xff"
        file.seek(256 * 5000)
        assert file.read(2) == b"\0\x01"
        assert file.tell() == 256 * 5000 + 2


def test_two_readers_of_one_file_do_not_move_each_other(root: MediaRoot) -> None:
    with root.open("blob") as first, root.open("blob") as second:
        first.seek(100)
        assert second.read(2) == b"\0\x01"
        assert first.read(2) == bytes([100, 101])


def test_a_name_has_one_meaning_on_every_kind_of_root(root: MediaRoot) -> None:
    assert root.read("./pets//cat 1.png") == b"png"
    for name in ("pets/cat%201.png", "pets/cat 1.png ", "A.jpg"):
        with pytest.raises(MediaError):
            root.read(name)


@pytest.mark.parametrize("name", ["no.jpg", "no/such/folder.jpg", "a.jpg/b.jpg"])
def test_a_missing_file_is_told_with_its_path(root: MediaRoot, name: str) -> None:
    for method in (root.read, root.open, root.list_files):
        with pytest.raises(MediaError) as caught:
            method(name)
        assert caught.value.reason == Reason.MISSING
        assert f"{root.uri}/{name}: " in str(caught.value)


def test_a_folder_is_not_read_as_a_file_nor_a_file_listed(root: MediaRoot) -> None:
    for method in (root.read, root.open):
        with pytest.raises(MediaError):
            method("pets")
    with pytest.raises(MediaError):
        root.list_files("a.jpg")


def test_more_bytes_than_allowed_are_not_read(root: MediaRoot) -> None:
    assert root.read("a.jpg", max_bytes=4) == b"jpeg"
    with pytest.raises(MediaError, match="in one file") as caught:
        root.read("blob", max_bytes=1 << 20)
    assert caught.value.reason == Reason.MEDIA_SIZE


def test_a_huge_file_is_refused_without_reading_it(tmp_path: Path) -> None:
    with (tmp_path / "huge.tiff").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(MediaError, match="more than 256 MiB"):
        open_root(str(tmp_path)).read("huge.tiff")


@pytest.mark.parametrize("name", ["clip", "clip/", "./clip"])
def test_frames_are_listed_in_natural_order_without_hidden_files_and_folders(root: MediaRoot, name: str) -> None:
    frames = root.list_files(name)
    assert frames == [f"clip/frame_{number}.jpg" for number in ("1", "02", "2", "10")]
    assert [root.read(frame) for frame in frames] == [b"frame"] * 4


def test_a_root_travels_to_another_process(root: MediaRoot) -> None:
    assert root.read("a.jpg") == b"jpeg"
    assert pickle.loads(pickle.dumps(root)).read("a.jpg") == b"jpeg"


class Bytes(Dataset[int]):
    def __init__(self, root: MediaRoot, names: Sequence[str]) -> None:
        self._root = root
        self._names = names

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> int:
        return len(self._root.read(self._names[index]))


# Python 3.12 and up warn of any fork beside threads, and a remote filesystem has one.
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_root_that_the_parent_has_used_works_in_forked_workers(root: MediaRoot) -> None:
    names = ["blob", "a.jpg", "pets/cat 1.png"] * 4
    expected = [len(root.read(name)) for name in names]
    loader = DataLoader(Bytes(root, names), batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert torch.cat(list(loader)).tolist() == expected


def test_threads_share_a_root(root: MediaRoot) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(root.read, ["blob"] * 32)) == {FILES["blob"]}


def test_a_root_that_is_not_there_is_told_apart(tmp_path: Path, s3_bucket_uri: str) -> None:
    assert open_root(s3_bucket_uri.rpartition("/")[0] + "/no-such-bucket").exists() is False
    assert open_root(f"{s3_bucket_uri}/nothing").exists() is False
    assert open_root(f"memory://{uuid.uuid4().hex}").exists() is False
    assert open_root(str(tmp_path / "nothing")).exists() is False


@pytest.mark.parametrize(
    "target", ["../secret.jpg", "/etc/hostname", "../media2/a.jpg"], ids=["upward", "absolute", "a sibling"]
)
def test_a_link_that_leads_out_of_the_root_is_refused(local: MediaRoot, tmp_path: Path, target: str) -> None:
    (tmp_path / "media2").mkdir()
    (tmp_path / "media2" / "a.jpg").write_bytes(b"secret")
    link = tmp_path / "media" / "link.jpg"
    link.symlink_to(target)
    (tmp_path / "media" / "folder").symlink_to(tmp_path)
    for name in ("link.jpg", "folder/secret.jpg"):
        for method in (local.read, local.open):
            with pytest.raises(MediaError, match="outside the root") as caught:
                method(name)
            assert caught.value.reason == Reason.PATH
    with pytest.raises(MediaError, match="outside the root"):
        local.list_files("folder")


def test_links_within_the_root_and_a_root_that_is_a_link_are_followed(local: MediaRoot, tmp_path: Path) -> None:
    (tmp_path / "media" / "link.jpg").symlink_to("a.jpg")
    (tmp_path / "root").symlink_to(tmp_path / "media")
    assert local.read("link.jpg") == b"jpeg"
    assert open_root(str(tmp_path / "root")).read("link.jpg") == b"jpeg"


def test_links_in_a_circle_are_a_missing_file(local: MediaRoot, tmp_path: Path) -> None:
    (tmp_path / "media" / "b.jpg").symlink_to("c.jpg")
    (tmp_path / "media" / "c.jpg").symlink_to("b.jpg")
    with pytest.raises(MediaError) as caught:
        local.read("b.jpg")
    assert caught.value.reason == Reason.MISSING


def test_what_is_no_regular_file_is_never_opened(local: MediaRoot, tmp_path: Path) -> None:
    folder = tmp_path / "media"
    os.mkfifo(folder / "fifo.jpg")
    (folder / "folder.jpg").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        try:  # The path of a socket may have 108 bytes at most.
            os.chdir(folder)
            server.bind("socket.jpg")
        finally:
            os.chdir(here)
        for name in ("fifo.jpg", "folder.jpg", "socket.jpg"):
            for method in (local.read, local.open):
                with pytest.raises(MediaError, match=f"{name}: not a regular file") as caught:
                    method(name)
                assert caught.value.reason == Reason.MEDIA


def test_a_device_is_never_opened() -> None:
    with pytest.raises(MediaError, match="not a regular file"):
        open_root("/dev").read("zero")


def test_a_refused_file_leaves_no_descriptor_open(local: MediaRoot, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "media" / "fifo.jpg")
    gc.collect()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(10):
        with pytest.raises(MediaError):
            local.open("fifo.jpg")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_missing(local: MediaRoot, tmp_path: Path) -> None:
    (tmp_path / "media" / "a.jpg").chmod(0)
    with pytest.raises(MediaError, match="Permission denied"):
        local.read("a.jpg")


def test_two_spellings_of_one_letter_are_two_files(local: MediaRoot, tmp_path: Path) -> None:
    composed, split = (unicodedata.normalize(form, "é.jpg") for form in ("NFC", "NFD"))
    (tmp_path / "media" / composed).write_bytes(b"composed")
    assert local.read(composed) == b"composed"
    with pytest.raises(MediaError):
        local.read(split)


def test_a_store_that_does_not_answer_is_not_the_records_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        try:
            with pytest.raises(StoreUnavailable, match=r"s3://bucket/media/a\.jpg"):
                open_root("s3://bucket/media").read("a.jpg")
        finally:
            fsspec.get_filesystem_class("s3").clear_instance_cache()


class _Refusal(BaseHTTPRequestHandler):
    code = "AccessDenied"

    def do_GET(self) -> None:
        body = f"<Error><Code>{self.code}</Code><Message>no</Message></Error>".encode()
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""


@pytest.mark.parametrize("code", ["AccessDenied", "ExpiredToken"])
def test_a_store_that_lets_nobody_in_is_not_the_records_fault(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Refusal, "code", code)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Refusal)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    try:
        root = open_root("s3://bucket/media")
        for method in (root.read, root.open, root.list_files):
            with pytest.raises(StoreUnavailable, match=r"clip/a\.jpg: s3://bucket/media refuses access: .*credentials"):
                method("clip/a.jpg")
    finally:
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_name_that_a_store_cannot_ask_for_is_the_records_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> bytes:
        raise ValueError("not a key:\n'a.jpg'")

    root = open_root(f"memory://{uuid.uuid4().hex}/media")
    for method in ("cat_file", "ls"):
        monkeypatch.setattr(MemoryFileSystem, method, refuse)
    for ask in (root.read, root.open, root.list_files):
        with pytest.raises(MediaError, match=r"/media/a\.jpg: cannot be read: not a key: 'a\.jpg'\.$"):
            ask("a.jpg")


def test_an_outage_while_an_open_remote_file_is_read_is_no_broken_file(
    s3_bucket_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fsspec.open(f"{s3_bucket_uri}/media/a.jpg", "wb") as file:
        file.write(b"jpeg")
    errors = [PermissionError(errno.EACCES, "The token has expired"), FileNotFoundError(errno.ENOENT, "gone")]

    def fail(*args: object) -> bytes:
        raise errors[0]

    monkeypatch.setattr("s3fs.core.S3File._fetch_range", fail)
    with open_root(f"{s3_bucket_uri}/media").open("a.jpg") as opened:
        while errors:
            with pytest.raises(StoreUnavailable, match=r"/media/a\.jpg failed"):
                opened.read()
            errors.pop(0)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("http://example.com/images", "cannot be checked"),
        ("github://org:repo@main/", "credentials"),
        ("s3://KEY:SECRET@bucket/images", "credentials"),
        ("simplecache::s3://bucket", "chain"),
        ("s3://bucket/images?versionId=1", "query"),
        ("s3://bucket/../other", "'..'"),
        ("nonsense://bucket", "Unknown protocol"),
    ],
)
def test_a_root_that_is_no_folder_and_no_object_store_is_refused(uri: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as caught:
        open_root(uri)
    assert "SECRET" not in str(caught.value)
