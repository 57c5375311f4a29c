"""What the commit protocol asks of a store's few operations, proven by one suite that each protocol inherits."""

import hashlib
import os
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from internvl_core.checkpoint.backend import Backend, open_backend
from internvl_core.checkpoint.manifest import FileEntry

CONTENT = {
    "model.safetensors": bytes(range(256)) * 100,
    "optimizer/rank-0/moments.bin": b"moments of rank 0",
    "empty.txt": b"",
}
ENTRIES = [FileEntry(path, len(body), hashlib.sha256(body).hexdigest()) for path, body in CONTENT.items()]
NUM_WRITERS = 8
NUM_RACES = 20


def write_files(directory: Path, content: dict[str, bytes]) -> Path:
    for path, body in content.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(body)
    return directory


class BackendContract:
    """Subclasses provide the fixture `store_uri`: an empty store."""

    @pytest.fixture
    def backend(self, store_uri: str) -> Backend:
        return open_backend(store_uri)

    @pytest.fixture
    def uploaded(self, backend: Backend, tmp_path: Path) -> Backend:
        backend.upload(write_files(tmp_path / "local", CONTENT), list(CONTENT), "data/save")
        return backend

    def test_a_name_is_created_once(self, backend: Backend) -> None:
        backend.create("commits/1.json", b"first")
        with pytest.raises(FileExistsError):
            backend.create("commits/1.json", b"second")
        assert backend.read("commits/1.json") == b"first"
        assert backend.list_names("commits") == ["1.json"]

    def test_an_empty_object_is_created_once_too(self, backend: Backend) -> None:
        backend.create("lock", b"")
        with pytest.raises(FileExistsError):
            backend.create("lock", b"late")
        assert backend.read("lock") == b""

    def test_what_is_put_replaces_what_was_there(self, backend: Backend) -> None:
        for body in (b"1" * 1000, b"2", b""):
            backend.put("lease/1.beat", body)
            assert backend.read("lease/1.beat") == body
        assert backend.list_names("lease") == ["1.beat"]

    def test_what_is_not_there_is_not_found(self, backend: Backend, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            backend.read("commits/1.json")
        with pytest.raises(FileNotFoundError):
            backend.download("data/save", ["model.safetensors"], tmp_path)
        with pytest.raises(FileNotFoundError):
            backend.describe("data/save", ["model.safetensors"])
        assert backend.list_names("commits") == []
        assert backend.get_sizes_bytes("data") == {}

    def test_what_was_sent_is_what_is_there_and_what_arrives(self, backend: Backend, tmp_path: Path) -> None:
        local = write_files(tmp_path / "local", CONTENT)
        assert backend.upload(local, list(CONTENT), "data/save") == ENTRIES
        assert backend.describe("data/save", list(CONTENT)) == ENTRIES
        assert backend.download("data/save", list(CONTENT), tmp_path / "fetched") == ENTRIES
        assert {path: (tmp_path / "fetched" / path).read_bytes() for path in CONTENT} == CONTENT

    def test_a_link_to_a_file_is_uploaded_as_that_file(self, backend: Backend, tmp_path: Path) -> None:
        local = write_files(tmp_path / "local", CONTENT)
        (local / "latest").symlink_to("model.safetensors")
        [entry] = backend.upload(local, ["latest"], "data/save")
        assert (entry.size_bytes, entry.sha256) == (ENTRIES[0].size_bytes, ENTRIES[0].sha256)
        assert backend.describe("data/save", ["latest"]) == [entry]

    def test_the_files_of_a_folder_are_listed_with_their_sizes(self, uploaded: Backend) -> None:
        assert uploaded.get_sizes_bytes("data/save") == {path: len(body) for path, body in CONTENT.items()}
        assert sorted(uploaded.list_names("data/save")) == ["empty.txt", "model.safetensors", "optimizer"]
        assert uploaded.list_names("data") == ["save"]

    def test_a_folder_is_removed_and_its_neighbours_stay(self, uploaded: Backend, tmp_path: Path) -> None:
        uploaded.upload(tmp_path / "local", list(CONTENT), "data/save-2")
        uploaded.remove_all("data/save")
        uploaded.remove_all("data/save")
        assert uploaded.list_names("data") == ["save-2"]
        assert uploaded.describe("data/save-2", list(CONTENT)) == ENTRIES

    def test_an_object_is_removed_and_may_be_gone_already(self, uploaded: Backend) -> None:
        uploaded.remove("data/save/model.safetensors")
        uploaded.remove("data/save/model.safetensors")
        assert sorted(uploaded.list_names("data/save")) == ["empty.txt", "optimizer"]

    def test_many_objects_are_listed_and_removed(self, backend: Backend, tmp_path: Path) -> None:
        paths = [f"shard-{number:03d}" for number in range(120)]
        backend.upload(write_files(tmp_path / "local", dict.fromkeys(paths, b"x")), paths, "data/save")
        assert sorted(backend.list_names("data/save")) == paths
        backend.remove_all("data/save")
        assert backend.get_sizes_bytes("data") == {}


class SharedBackendContract(BackendContract):
    """A store that several processes use at once; in memory there is but one, and fsspec's is not made for threads."""

    def test_of_racing_creations_exactly_one_wins(self, backend: Backend) -> None:
        start = threading.Barrier(NUM_WRITERS)

        def race(name: str, body: bytes) -> bool:
            start.wait()
            try:
                backend.create(name, body)
            except FileExistsError:
                return False
            return True

        with ThreadPoolExecutor(NUM_WRITERS) as pool:
            for number in range(NUM_RACES):
                name, bodies = f"race-{number}", [bytes([writer]) * 100 for writer in range(NUM_WRITERS)]
                has_won = list(pool.map(race, [name] * NUM_WRITERS, bodies))
                assert sum(has_won) == 1
                assert backend.read(name) == bodies[has_won.index(True)]

    def test_a_reader_never_sees_half_of_what_is_put(self, backend: Backend) -> None:
        bodies = [bytes([number]) * 50_000 for number in range(4)]
        backend.put("lease/1.beat", bodies[0])
        with ThreadPoolExecutor(len(bodies)) as pool:
            writing = [pool.submit(backend.put, "lease/1.beat", body) for body in bodies * 5]
            while not all(future.done() for future in writing):
                assert backend.read("lease/1.beat") in bodies

    def test_a_file_larger_than_a_part_arrives_whole(self, backend: Backend, tmp_path: Path) -> None:
        body = os.urandom(1 << 20) * 40 + b"end"
        local = write_files(tmp_path / "local", {"model.safetensors": body})
        expected = [FileEntry("model.safetensors", len(body), hashlib.sha256(body).hexdigest())]
        assert backend.upload(local, ["model.safetensors"], "data/save") == expected
        assert backend.describe("data/save", ["model.safetensors"]) == expected
        assert backend.download("data/save", ["model.safetensors"], tmp_path / "fetched") == expected
        assert (tmp_path / "fetched" / "model.safetensors").read_bytes() == body


class TestFileBackend(SharedBackendContract):
    @pytest.fixture
    def store_uri(self, tmp_path: Path) -> str:
        return f"file://{tmp_path}/runs"

    def test_a_link_that_was_planted_in_a_save_is_not_followed_when_it_is_removed(
        self, uploaded: Backend, tmp_path: Path
    ) -> None:
        outside = write_files(tmp_path / "outside", {"precious": b"kept"})
        (tmp_path / "runs/data/save/link").symlink_to(outside)
        uploaded.remove_all("data/save")
        assert (outside / "precious").read_bytes() == b"kept"


class TestMemoryBackend(BackendContract):
    @pytest.fixture
    def store_uri(self) -> str:
        return f"memory://{uuid.uuid4().hex}/runs"


@pytest.mark.integration
class TestS3Backend(SharedBackendContract):
    @pytest.fixture
    def store_uri(self, s3_bucket_uri: str) -> str:
        return f"{s3_bucket_uri}/runs"


@pytest.mark.integration
class TestSftpBackend(SharedBackendContract):
    @pytest.fixture
    def store_uri(self, sftp_uri: str) -> str:
        return sftp_uri


@pytest.mark.integration
class TestOpenSshBackend(SharedBackendContract):
    @pytest.fixture
    def store_uri(self, openssh_uri: str) -> str:
        return openssh_uri


@pytest.mark.integration
# Azure's SDK hands aiohttp parts of several MB as bytes.
@pytest.mark.filterwarnings("ignore:Sending a large body directly:ResourceWarning")
class TestAzureBackend(SharedBackendContract):
    """The emulator of Google's storage on PyPI ignores preconditions, so for `gs://` there is no such class."""

    @pytest.fixture
    def store_uri(self, az_uri: str) -> str:
        return az_uri
