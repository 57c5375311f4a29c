"""What a store on S3, or the network before it, does to a publication, a download and a look."""

import hashlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from http_proxy import Fault, HttpProxy

from internvl_core.checkpoint import probe
from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.checkpoint.s3_client import open_client
from internvl_core.checkpoint.store import StageStore, check_store, fetch
from internvl_core.contract import CheckpointRef
from internvl_core.errors import CheckpointCorrupt, StoreUnavailable

pytestmark = pytest.mark.integration

FINGERPRINT = "0123456789abcdef" * 4
SECRET = "canary-of-a-secret"
LARGE_BYTES = (20 << 20) + 1  # three parts


@pytest.fixture
def proxy(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpProxy]:
    with HttpProxy(s3_endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        monkeypatch.setenv("AWS_SESSION_TOKEN", SECRET)
        yield proxy


@pytest.fixture
def store(s3_bucket_uri: str) -> StageStore:
    return StageStore(f"{s3_bucket_uri}/runs", "stage2", FINGERPRINT)


def publish(store: StageStore, tmp_path: Path, step: int, *, num_bytes: int = 100_000) -> CheckpointRef:
    directory = tmp_path / f"local-{step}-{num_bytes}"
    if not directory.is_dir():
        directory.mkdir()
        (directory / "model.safetensors").write_bytes(os.urandom(num_bytes))
    return store.publish(directory, step=step, fence=1, kind=CheckpointKind.TRAINING, parent=None, info={})


def list_sizes(store: StageStore) -> set[int]:
    """List the sizes of all files of weights, committed or not."""
    sizes = store._backend.get_sizes_bytes("data")
    return {size for path, size in sizes.items() if path.endswith("model.safetensors")}


@pytest.mark.fault(43, "a storm of 503, 429 or 500 that ends", how="a proxy answers", then="asked again; one commit")
@pytest.mark.parametrize(("status", "code"), [(503, "SlowDown"), (429, "SlowDown"), (500, "InternalError")])
def test_a_storm_that_ends_is_sat_out(
    proxy: HttpProxy, store: StageStore, tmp_path: Path, status: int, code: str
) -> None:
    storm = proxy.strike(Fault("PUT", num_times=2, status=status, code=code))
    checkpoint = publish(store, tmp_path, 10)
    assert storm.num_struck == 2
    store.verify(checkpoint)
    assert [commit.step for commit in store.list_committed()] == [10]


@pytest.mark.fault(
    43, "a storm that does not end", how="a proxy answers 503", then="69 within a minute; nothing is committed"
)
def test_a_storm_that_does_not_end_is_an_outage(proxy: HttpProxy, store: StageStore, tmp_path: Path) -> None:
    older = publish(store, tmp_path, 10)
    proxy.strike(Fault("PUT", status=503, code="SlowDown"))
    started = time.monotonic()
    with pytest.raises(StoreUnavailable, match="SlowDown") as caught:
        publish(store, tmp_path, 20)
    assert time.monotonic() - started < 60
    assert "\n" not in str(caught.value)
    assert "credentials" not in str(caught.value)
    proxy.faults.clear()
    assert store.find_newest() == older
    assert publish(store, tmp_path, 20) == store.find_newest()


@pytest.mark.fault(
    44,
    "the connection breaks in an upload",
    how="a proxy resets it",
    then="sent again; an object is whole or not there",
)
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("num_bytes", [100_000, LARGE_BYTES], ids=["one part", "parts"])
def test_an_upload_that_breaks_once_is_sent_again(
    proxy: HttpProxy, store: StageStore, tmp_path: Path, num_bytes: int, share: float
) -> None:
    cut = proxy.strike(Fault("PUT", "model.safetensors", num_times=1, cut_request_at=share))
    checkpoint = publish(store, tmp_path, 10, num_bytes=num_bytes)
    assert cut.num_struck == 1
    store.verify(checkpoint)
    assert list_sizes(store) == {num_bytes}


@pytest.mark.fault(
    44, "every connection breaks in an upload", how="a proxy resets them", then="69; an object is whole or not there"
)
@pytest.mark.parametrize("num_bytes", [100_000, LARGE_BYTES], ids=["one part", "parts"])
def test_an_upload_that_always_breaks_leaves_nothing_short(
    proxy: HttpProxy, store: StageStore, tmp_path: Path, num_bytes: int
) -> None:
    proxy.strike(Fault("PUT", "model.safetensors", cut_request_at=0.5))
    with pytest.raises(StoreUnavailable, match=r"Uploading .*model\.safetensors"):
        publish(store, tmp_path, 10, num_bytes=num_bytes)
    proxy.faults.clear()
    assert list_sizes(store) == set()
    assert store.list_committed() == []
    # Nor are parts left that nobody sees and somebody pays for.
    bucket = store.uri.removeprefix("s3://").partition("/")[0]
    assert open_client().list_multipart_uploads(Bucket=bucket).get("Uploads", []) == []


@pytest.mark.fault(
    42, "the answer to the commit is lost", how="a proxy resets the connection after passing it on", then="one commit"
)
def test_a_commit_whose_answer_is_lost_is_no_failure(proxy: HttpProxy, store: StageStore, tmp_path: Path) -> None:
    lost = proxy.strike(Fault("PUT", "/commits/", num_times=1, cut_answer_at=0))
    checkpoint = publish(store, tmp_path, 10)
    assert lost.num_struck == 1
    assert [commit.checkpoint for commit in store.list_committed()] == [checkpoint]


@pytest.mark.fault(45, "the store keeps less than it was sent", how="a proxy cuts the body", then="not committed, 69")
def test_an_object_that_is_short_is_not_committed(proxy: HttpProxy, store: StageStore, tmp_path: Path) -> None:
    proxy.strike(Fault("PUT", "model.safetensors", change_request=lambda body: body[: len(body) // 2]))
    with pytest.raises(StoreUnavailable, match=r"model\.safetensors: 50000 bytes arrived, 100000 were sent"):
        publish(store, tmp_path, 10)
    proxy.faults.clear()
    assert store.list_committed() == []


@pytest.mark.fault(
    45, "the store keeps zeros", how="a proxy replaces the body", then="reading it back names the file, 80"
)
def test_an_object_of_zeros_is_found_by_reading_it_back(proxy: HttpProxy, store: StageStore, tmp_path: Path) -> None:
    proxy.strike(Fault("PUT", "model.safetensors", change_request=lambda body: bytes(len(body))))
    checkpoint = publish(store, tmp_path, 10)
    zeros = hashlib.sha256(bytes(100_000)).hexdigest()
    with pytest.raises(CheckpointCorrupt, match=rf"model\.safetensors: sha256 is {zeros}"):
        store.verify(checkpoint)


@pytest.mark.fault(
    46,
    "credentials expire",
    how="a proxy answers 403",
    then="69, credentials are named, no secret; renewed, it goes on",
)
@pytest.mark.parametrize("code", ["ExpiredToken", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"])
def test_credentials_that_expire_are_named_and_not_shown(
    proxy: HttpProxy, store: StageStore, tmp_path: Path, code: str
) -> None:
    older = publish(store, tmp_path, 10)
    for method in ("PUT", "POST", "GET"):
        proxy.strike(Fault(method, status=403, code=code))
    for ask in (lambda: publish(store, tmp_path, 20), store.find_newest, lambda: store.verify(older)):
        with pytest.raises(StoreUnavailable, match=rf"refuses the credentials.*{code}") as caught:
            ask()
        assert SECRET not in str(caught.value)
        assert "\n" not in str(caught.value)
    proxy.faults.clear()
    assert publish(store, tmp_path, 20) == store.find_newest()


@pytest.mark.fault(
    49, "a byte changes in a download", how="a proxy changes it once", then="the file is fetched again, whole"
)
@pytest.mark.parametrize("num_bytes", [100_000, LARGE_BYTES], ids=["one part", "parts"])
def test_a_byte_that_the_network_changed_costs_another_download(
    proxy: HttpProxy, store: StageStore, tmp_path: Path, num_bytes: int
) -> None:
    checkpoint = publish(store, tmp_path, 10, num_bytes=num_bytes)
    flip = Fault("GET", "model.safetensors", 1, change_answer=lambda body: body[:-1] + bytes([body[-1] ^ 1]))
    proxy.strike(flip)
    fetched = fetch(checkpoint, tmp_path / "cache")
    assert flip.num_struck == 1
    sent = tmp_path / f"local-10-{num_bytes}/model.safetensors"
    assert (fetched / "model.safetensors").read_bytes() == sent.read_bytes()


@pytest.mark.fault(
    49,
    "bytes change in every download",
    how="a proxy changes or cuts them",
    then="80 with the file; an older one is used",
)
@pytest.mark.parametrize("damage", [lambda body: bytes([body[0] ^ 1]) + body[1:], lambda body: body[:-1]])
def test_a_download_that_is_always_wrong_is_never_used(
    proxy: HttpProxy, store: StageStore, tmp_path: Path, damage: object
) -> None:
    older, newest = publish(store, tmp_path, 10), publish(store, tmp_path, 20)
    proxy.strike(Fault("GET", f"{newest.uri.rpartition('/')[2]}/model.safetensors", change_answer=damage))  # type: ignore[arg-type]
    with pytest.raises(CheckpointCorrupt, match=r"model\.safetensors: (sha256 is|\d+ bytes)"):
        fetch(newest, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    assert fetch(older, tmp_path / "cache").is_dir()


@pytest.mark.fault(
    49,
    "the connection breaks in a download",
    how="a proxy resets it in the middle",
    then="that part is asked for again",
)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_download_that_breaks_goes_on(proxy: HttpProxy, store: StageStore, tmp_path: Path, share: float) -> None:
    checkpoint = publish(store, tmp_path, 10, num_bytes=LARGE_BYTES)
    cut = proxy.strike(Fault("GET", "model.safetensors", num_times=2, cut_answer_at=share))
    fetched = fetch(checkpoint, tmp_path / "cache")
    assert cut.num_struck == 2
    assert (fetched / "model.safetensors").stat().st_size == LARGE_BYTES


@pytest.mark.fault(
    50, "the store accepts connections and never answers", how="a socket", then="69 within the probe's limit"
)
def test_a_store_that_never_answers_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "PROBE_LIMIT_S", 2.0)
    with socket.create_server(("127.0.0.1", 0), backlog=16) as mute:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{mute.getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        started = time.monotonic()
        with pytest.raises(StoreUnavailable, match="No answer within 2 s") as caught:
            check_store("s3://bucket/runs")
    assert time.monotonic() - started < 10
    assert SECRET not in str(caught.value)
