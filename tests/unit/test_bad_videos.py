import contextlib
import io
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from video_files import (
    every,
    load_numbers,
    make_audio,
    make_empty_video,
    make_growing_video,
    make_noise,
    make_video,
    patch,
    patch_box,
    patch_duration,
)

from internvl_core.data import video_source
from internvl_core.data.media_root import MediaRoot, open_root
from internvl_core.data.video import iter_frames, probe_video
from internvl_core.data.video_reader import VideoReader
from internvl_core.data.video_source import open_video
from internvl_core.errors import MediaError, OutOfMemory, Reason, StoreUnavailable


@pytest.fixture
def root(tmp_path: Path) -> MediaRoot:
    return open_root(str(tmp_path))


GIF_SIZE = slice(6, 10)
INDEX_IN_FRONT = {"moov_size": "4000"}
NO_VIDEO = "cannot be read as a video"

# How the file is made, and what is said of it.
BAD_FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty file": (lambda: b"", NO_VIDEO),
    "web page": (lambda: b"<!DOCTYPE html><html>404 Not Found</html>" * 50, NO_VIDEO),
    "zeros": (lambda: bytes(100_000), NO_VIDEO),
    "moov missing": (lambda: make_video()[:2000], f"{NO_VIDEO}|holds no video"),
    "mp4 cut short": (lambda: make_video(container_options=INDEX_IN_FRONT)[:-500], "its index points beyond"),
    "mkv cut short": (lambda: make_video("matroska")[:2000], "It was cut short"),
    "avi cut short": (lambda: make_video("avi", "mjpeg")[:9000], "is damaged"),
    "gif cut short": (lambda: make_video("gif", "gif")[:9000], "has no end mark"),
    "no frames": (make_empty_video, "no picture|no video|cannot be read"),
    "audio only": (make_audio, "holds no video"),
    "audio with a cover": (lambda: make_audio(has_cover=True), "holds no video"),
    "no time between frames": (lambda: patch_box(make_video(), b"stts", 12, bytes(4)), "should last 4.00 s"),
    "a million frames a second": (
        lambda: patch_box(make_video(), b"mdhd", 12, (20_000_000).to_bytes(4)),
        "at most 1000 a second",
    ),
    "a million seconds by the header": (lambda: patch_duration(1e6), r"lasts 1e\+06 s"),
    "a thousand seconds by the header": (lambda: patch_duration(1e3), "should last 1000.00 s"),
    "no pixels": (lambda: patch(make_video("gif", "gif"), GIF_SIZE, bytes(4)), NO_VIDEO),
    "4 gigapixels": (lambda: patch(make_video("gif", "gif"), GIF_SIZE, b"\xff" * 4), "px"),
    "playlist": (lambda: b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nv.mp4\n#EXT-X-ENDLIST\n", NO_VIDEO),
    "list of files": (lambda: b"ffconcat version 1.0\nfile v.mp4\n", NO_VIDEO),
    "picture": (lambda: b"\x89PNG\r\n\x1a\n" + bytes(100), NO_VIDEO),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_one_error_with_its_name(
    case: str, tmp_path: Path, root: MediaRoot, capfd: pytest.CaptureFixture[str]
) -> None:
    make, message = BAD_FILES[case]
    (tmp_path / "v.mp4").write_bytes(make())
    with pytest.raises(MediaError, match=rf"^v\.mp4: .*({message})") as caught:
        load_numbers(root, "v.mp4", every(8))
    too_large = {"a million seconds by the header", "4 gigapixels"}
    assert caught.value.reason == (Reason.MEDIA_SIZE if case in too_large else Reason.MEDIA)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_what_is_not_there_or_no_file_is_told_from_what_is_broken(tmp_path: Path, root: MediaRoot) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(MediaError) as caught:
        probe_video(root, "nowhere.mp4")
    assert caught.value.reason == Reason.MISSING
    with pytest.raises(MediaError, match="not a regular file"):
        probe_video(root, "folder")


@pytest.mark.parametrize(
    ("container", "codec"),
    [("mp4", "libx264"), ("matroska", "libx264"), ("mpegts", "libx264"), ("avi", "mpeg4")],
)
def test_damage_within_the_pictures_is_no_picture(container: str, codec: str, tmp_path: Path, root: MediaRoot) -> None:
    body = make_noise(container, codec, num_frames=20)
    middle = len(body) // 2
    (tmp_path / "v").write_bytes(patch(body, slice(middle, middle + 3000), bytes(3000)))
    with pytest.raises(MediaError, match=r"^v: "):
        load_numbers(root, "v", every(20))


def test_most_damage_to_jpegs_is_seen_though_nothing_checks_them(tmp_path: Path, root: MediaRoot) -> None:
    body, draw, num_refused = make_noise("matroska", "mjpeg", num_frames=20), random.Random(0), 0
    for _ in range(30):
        place = draw.randrange(len(body) // 4, len(body) * 3 // 4)
        (tmp_path / "v").write_bytes(patch(body, slice(place, place + 40), draw.randbytes(40)))
        with contextlib.suppress(MediaError):
            load_numbers(root, "v", every(20))
            continue
        num_refused += 1
    assert num_refused > 10


def test_a_size_that_changes_in_the_middle_is_an_error(tmp_path: Path, root: MediaRoot) -> None:
    (tmp_path / "v").write_bytes(make_growing_video())
    with pytest.raises(MediaError, match=r"change from \(32, 32\) to \(64, 48\)"):
        load_numbers(root, "v", every(20))


def test_a_huge_file_is_not_read(tmp_path: Path, root: MediaRoot) -> None:
    with (tmp_path / "v").open("wb") as file:
        file.truncate(video_source.MAX_FILE_BYTES + 1)
    with pytest.raises(MediaError, match="bytes; at most") as caught:
        probe_video(root, "v")
    assert caught.value.reason == Reason.MEDIA_SIZE


def test_large_pictures_are_refused_before_they_are_decoded(
    tmp_path: Path, root: MediaRoot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video_source, "MAX_FRAME_PIXELS", 32 * 32 - 1)
    (tmp_path / "v").write_bytes(make_video())
    with pytest.raises(MediaError, match="32 x 32 px; at most 1023") as caught:
        probe_video(root, "v")
    assert caught.value.reason == Reason.MEDIA_SIZE


def test_a_video_that_takes_too_long_is_tried_again(
    tmp_path: Path, root: MediaRoot, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "v").write_bytes(make_video())
    info = probe_video(root, "v")
    monkeypatch.setattr(video_source, "TIME_LIMIT_S", -1.0)
    with pytest.raises(StoreUnavailable, match=r"^v: not read within"):
        list(iter_frames(root, "v", info, every(40), count=40, key=""))
    with pytest.raises(StoreUnavailable, match=r"^v: not read within"):
        probe_video(root, "v")


def test_reading_stops_between_two_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []

    def read() -> None:
        with open_video(io.BytesIO(make_video()), "v") as source:
            for image in VideoReader(source).iter_all():
                shown.append(image)
                monkeypatch.setattr(source._file, "_deadline", 0.0)

    with pytest.raises(StoreUnavailable, match="not read within"):
        read()
    assert len(shown) == 1


def test_a_video_that_was_read_when_the_time_ran_out_is_good(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_video(io.BytesIO(make_video()), "v") as source:
        num_pictures = len(list(VideoReader(source).iter_all()))
        monkeypatch.setattr(source._file, "_deadline", 0.0)
    assert num_pictures == 40


@pytest.mark.parametrize(
    ("limit", "most", "message"),
    [
        ("MAX_DECODED_FRAMES", 39, "40 pictures of 32 x 32 px were decoded"),
        ("MAX_DECODED_PIXELS", 39 * 32 * 32, "40 pictures of 32 x 32 px were decoded"),
    ],
)
def test_what_is_decoded_for_a_video_is_limited(
    limit: str, most: int, message: str, tmp_path: Path, root: MediaRoot, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "v").write_bytes(make_video())
    assert len(load_numbers(root, "v", every(40))) == 40
    monkeypatch.setattr(video_source, limit, most + (1 if limit.endswith("FRAMES") else 32 * 32))
    assert len(load_numbers(root, "v", every(40))) == 40
    monkeypatch.setattr(video_source, limit, most)
    with pytest.raises(MediaError, match=rf"^v: {message}") as caught:
        load_numbers(root, "v", every(40))
    assert caught.value.reason == Reason.MEDIA_SIZE


def test_what_is_read_of_a_video_is_limited(tmp_path: Path, root: MediaRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "v").write_bytes(make_noise("matroska", "libx264", num_frames=40))
    monkeypatch.setattr(video_source, "MAX_EXTRA_BYTES", 0)
    monkeypatch.setattr(video_source, "MAX_READS", 4)
    assert len(load_numbers(root, "v", every(4))) == 4
    monkeypatch.setattr(video_source, "MAX_READS", 0.5)
    with pytest.raises(MediaError, match=r"^v: .* bytes were read of a file of ") as caught:
        load_numbers(root, "v", every(4))
    assert caught.value.reason == Reason.MEDIA_SIZE


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), MemoryError("none left")])
def test_a_disk_that_fails_is_not_a_broken_video(error: Exception) -> None:
    class FailingFile(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise error

    expected, cause = (
        (OutOfMemory, "no memory left") if isinstance(error, MemoryError) else (StoreUnavailable, error.args[-1])
    )
    with pytest.raises(expected, match=rf"^Reading v: .*{cause}"), open_video(FailingFile(b"x"), "v"):
        pass


@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts", "avi", "gif"])
def test_no_damage_leads_to_anything_but_pictures_or_one_error(
    container: str, tmp_path: Path, root: MediaRoot, capfd: pytest.CaptureFixture[str]
) -> None:
    codec = {"avi": "mpeg4", "gif": "gif"}.get(container, "libx264")
    good, draw = make_video(container, codec, times=range(20)), random.Random(container)
    outcomes, messages = set(), []
    for _ in range(60):
        body = bytearray(good)
        for _ in range(draw.randrange(1, 9)):
            body[draw.randrange(len(body))] = draw.randrange(256)
        (tmp_path / "v").write_bytes(body[: draw.randrange(len(body))] if draw.random() < 0.2 else body)
        try:
            outcomes.add(0 < len(load_numbers(root, "v", every(4))) <= 4)
        except MediaError as error:
            messages.append(str(error))
            outcomes.add(False)
    assert outcomes == {True, False}
    assert all(message.startswith("v: ") for message in messages)
    assert capfd.readouterr() == ("", "")
