import bisect
import gc
import io
import multiprocessing
from collections.abc import Sequence
from pathlib import Path

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from video_files import SHADE, every, load_numbers, make_gif, make_noise, make_video, read_number

from internvl_core.data.media_root import MediaRoot, open_root
from internvl_core.data.video import FrameSampling, VideoInfo, choose_frames, count_frames, iter_frames, probe_video
from internvl_core.data.video_reader import VideoReader
from internvl_core.data.video_source import open_video
from internvl_core.data.video_timeline import measure_timeline
from internvl_core.errors import ArgumentError, DataError, MediaError, Reason

# Container, codec, options of the encoder.
CONTAINERS: list[tuple[str, str, dict[str, str]]] = [
    ("mp4", "libx264", {}),
    ("mp4", "mpeg4", {}),
    ("mp4", "libx264", {"x264-params": "open-gop=1:bframes=3:keyint=8:min-keyint=8"}),
    ("mov", "libx264", {}),
    ("matroska", "libx264", {}),
    ("webm", "libvpx-vp9", {}),
    ("avi", "mpeg4", {"bf": "2"}),
    ("avi", "mjpeg", {}),
    ("mpegts", "libx264", {}),
    ("mpeg", "mpeg2video", {"bf": "2"}),
    ("flv", "flv", {}),
    ("asf", "wmv2", {}),
    ("apng", "apng", {}),
]


@pytest.fixture
def root(tmp_path: Path) -> MediaRoot:
    return open_root(str(tmp_path))


# Which frames


@pytest.mark.parametrize(("text", "fps"), [("uniform", None), ("middle", None), ("fps1", 1.0), ("fps0.25", 0.25)])
def test_a_way_of_sampling_is_read_from_its_name(text: str, fps: float | None) -> None:
    sampling = FrameSampling.parse(text, 2, 4)
    assert (sampling.method, sampling.fps) == (text if fps is None else "fps", fps)
    assert (sampling.min_frames, sampling.max_frames) == (2, 4)


@pytest.mark.parametrize("text", ["", "rand", "fps", "fps0", "fps-1", "fpsinf", "fps1e3", "Uniform", "fps" + "9" * 400])
def test_an_unknown_way_of_sampling_is_refused(text: str) -> None:
    with pytest.raises(ArgumentError, match="uniform, middle or fpsX"):
        FrameSampling.parse(text, 2, 4)


@pytest.mark.parametrize(("least", "most"), [(0, 4), (5, 4)])
def test_bounds_that_no_number_is_between_are_refused(least: int, most: int) -> None:
    with pytest.raises(ArgumentError, match="1 <= min <= max"):
        FrameSampling.parse("uniform", least, most)


@given(
    num_frames=st.integers(1, 500),
    fps=st.floats(0.1, 240),
    method=st.one_of(st.sampled_from(["uniform", "middle"]), st.floats(0.01, 300).map(lambda rate: f"fps{rate:f}")),
    bounds=st.tuples(st.integers(1, 40), st.integers(1, 40)).map(sorted),
    key=st.text(),
)
def test_a_record_takes_different_frames_in_order_as_many_as_counted(
    num_frames: int, fps: float, method: str, bounds: list[int], key: str
) -> None:
    least, most = bounds
    sampling = FrameSampling.parse(method, least, most)
    info = VideoInfo(num_frames, fps, 32, 32)
    count = count_frames(info, sampling, key="record")
    assert min(least, num_frames) <= count <= min(most, num_frames)
    chosen = choose_frames(info, sampling, count=count, key=key)
    assert len(chosen) == count
    assert sorted(set(chosen)) == chosen
    assert 0 <= chosen[0] <= chosen[-1] < num_frames


def test_every_frame_can_be_chosen_the_last_of_an_interval_too() -> None:
    info = VideoInfo(10, 10.0, 32, 32)
    draws = [choose_frames(info, every(5, method="uniform"), count=5, key=str(key)) for key in range(100)]
    assert {number for draw in draws for number in draw} == set(range(10))
    assert all(number // 2 == interval for draw in draws for interval, number in enumerate(draw))


def test_the_middle_of_each_interval_is_chosen_whatever_the_key() -> None:
    info = VideoInfo(20, 10.0, 32, 32)
    for key in ("a", "b"):
        assert choose_frames(info, every(4), count=4, key=key) == [2, 7, 12, 17]


def test_the_number_of_frames_is_drawn_from_the_record_and_reaches_both_bounds() -> None:
    info = VideoInfo(100, 10.0, 32, 32)
    counts = [count_frames(info, every(2, 5, "uniform"), key=f"video:{line}") for line in range(100)]
    assert set(counts) == {2, 3, 4, 5}
    assert counts == [count_frames(info, every(2, 5, "uniform"), key=f"video:{line}") for line in range(100)]


@pytest.mark.parametrize(
    ("method", "least", "most", "expected"),
    [
        ("fps1", 1, 8, [5, 15, 25, 35]),
        ("fps2", 1, 8, [2, 7, 12, 17, 22, 27, 32, 37]),
        ("fps2", 1, 4, [4, 14, 24, 34]),
        ("fps0.01", 1, 4, [19]),
        ("fps0.01", 2, 4, [9, 29]),
        ("fps50", 1, 99, list(range(40))),
    ],
)
def test_a_rate_gives_a_frame_at_regular_times_spread_anew_beyond_the_bounds(
    method: str, least: int, most: int, expected: list[int]
) -> None:
    info, sampling = VideoInfo(40, 10.0, 32, 32), FrameSampling.parse(method, least, most)
    count = count_frames(info, sampling, key="")
    assert choose_frames(info, sampling, count=count, key="") == expected


def test_more_frames_than_there_are_is_an_error() -> None:
    with pytest.raises(MediaError, match="9 frames wanted of 8") as caught:
        choose_frames(VideoInfo(8, 10.0, 32, 32), every(9), count=9, key="")
    assert caught.value.reason == Reason.SIZE_MISMATCH


# How they are read


@pytest.mark.parametrize(("container", "codec", "options"), CONTAINERS)
def test_a_frame_that_is_jumped_to_is_the_one_of_a_full_decode(
    container: str, codec: str, options: dict[str, str], tmp_path: Path, root: MediaRoot
) -> None:
    (tmp_path / "v").write_bytes(make_video(container, codec, options=options))
    info = probe_video(root, "v")
    assert (info.num_frames, info.width, info.height) == (40, 32, 32)
    assert info.fps == pytest.approx(10)
    frames = list(iter_frames(root, "v", info, every(40), count=40, key=""))
    assert [read_number(frame) for frame in frames] == list(range(40))
    with (tmp_path / "v").open("rb") as file:
        for wanted in (*([number] for number in range(40)), [20, 21, 33], [0, 8, 17], [7, 39], list(range(40))):
            with open_video(file, "v") as source:
                times = [(number + 0.5) / 10 for number in wanted]
                shown = list(VideoReader(source).iter_shown(times, start_s=info.start_s, frame_s=0.1))
            assert [image.tobytes() for image in shown] == [frames[number].tobytes() for number in wanted]


OPEN_GROUPS = {"x264-params": "open-gop=1:bframes=5:keyint=12:min-keyint=12:b-pyramid=strict"}


@pytest.mark.parametrize(
    ("container", "codec", "options"),
    [("mp4", "libx264", OPEN_GROUPS), ("matroska", "libx264", OPEN_GROUPS), ("mpegts", "mpeg4", {})],
)
def test_a_jump_lands_where_decoding_can_begin(container: str, codec: str, options: dict[str, str]) -> None:
    body = make_noise(container, codec, num_frames=60, options=options)
    with open_video(io.BytesIO(body), "v") as source:
        start_s = measure_timeline(source).start_s
    with open_video(io.BytesIO(body), "v") as source:
        frames = [frame.tobytes() for frame in VideoReader(source).iter_all()]
    assert len(frames) == 60
    for number, frame in enumerate(frames):
        with open_video(io.BytesIO(body), "v") as source:
            (shown,) = VideoReader(source).iter_shown([(number + 0.5) / 10], start_s=start_s, frame_s=0.1)
        assert shown.tobytes() == frame


class CountingFile(io.BytesIO):
    num_read = 0

    def read(self, size: int | None = -1, /) -> bytes:
        body = super().read(size)
        self.num_read += len(body)
        return body


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_a_late_frame_does_not_cost_the_whole_file(container: str) -> None:
    body = make_noise(container, "libx264", num_frames=300)
    for wanted_s in (None, 29.05):
        file = CountingFile(body)
        with open_video(file, "v") as source:
            if wanted_s is None:
                assert measure_timeline(source).num_frames == 300
            else:
                assert len(list(VideoReader(source).iter_shown([wanted_s], start_s=0, frame_s=0.1))) == 1
        assert file.num_read < len(body) / 2


@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts"])
def test_a_variable_rate_is_read_by_its_time_stamps(container: str, tmp_path: Path, root: MediaRoot) -> None:
    times = [*range(20), 30, 50]
    (tmp_path / "v").write_bytes(make_video(container, times=times))
    clips = [(0.0, 0.3), (0.9, 1.2), (1.0, 5.0), (2.0, 2.8), (2.5, 4.5), (4.95, 5.1)]
    for clip in clips:
        info = probe_video(root, "v", clip)
        assert info.fps is not None
        shown_s = [clip[0] + (number + 0.5) / info.fps for number in range(info.num_frames)]
        expected = [bisect.bisect([time / 10 for time in times], shown) - 1 for shown in shown_s]
        assert load_numbers(root, "v", every(99), clip=clip) == expected


@pytest.mark.parametrize("container", ["mp4", "matroska", "gif"])
def test_a_short_video_gives_each_of_its_pictures_once(container: str, tmp_path: Path, root: MediaRoot) -> None:
    if container == "gif":
        make_gif(tmp_path / "v", [100, 100, 2800, 2000, 100])
    else:
        (tmp_path / "v").write_bytes(make_video(container, times=[0, 1, 2, 30, 50]))
    for method in ("uniform", "middle", "fps100"):
        assert load_numbers(root, "v", every(8, 32, method)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts", "gif"])
def test_a_video_may_have_one_picture(container: str, tmp_path: Path, root: MediaRoot) -> None:
    if container == "gif":
        make_gif(tmp_path / "v", [0])
    else:
        (tmp_path / "v").write_bytes(make_video(container, times=[0]))
    assert load_numbers(root, "v", every(8)) == [0]


def test_a_clip_is_all_that_is_looked_at(tmp_path: Path, root: MediaRoot) -> None:
    (tmp_path / "v").write_bytes(make_video())
    assert probe_video(root, "v", (1.0, 2.0)).num_frames == 10
    assert load_numbers(root, "v", every(10), clip=(1.0, 2.0)) == list(range(10, 20))
    assert load_numbers(root, "v", every(2), clip=(3.0, 4.0)) == [32, 37]
    assert load_numbers(root, "v", every(9), clip=(1.12, 1.14)) == [11]


def test_a_clip_may_end_a_frame_after_the_video(tmp_path: Path, root: MediaRoot) -> None:
    (tmp_path / "v").write_bytes(make_video())
    assert load_numbers(root, "v", every(8), clip=(3.8, 4.09)) == [38, 39]


@pytest.mark.parametrize("clip", [(4.0, 4.1), (3.0, 4.2), (100.0, 200.0)])
def test_a_clip_beyond_the_end_is_an_error(clip: tuple[float, float], tmp_path: Path, root: MediaRoot) -> None:
    (tmp_path / "v").write_bytes(make_video())
    with pytest.raises(MediaError, match=r"v: clip .* but it lasts 4\.00 s") as caught:
        probe_video(root, "v", clip)
    assert caught.value.reason == Reason.MEDIA


@pytest.mark.parametrize("clip", [(2.0, 2.0), (2.0, 1.0), (-1.0, 1.0), (float("nan"), 1.0)])
def test_a_clip_that_is_none_is_an_error_of_the_record(clip: tuple[float, float], root: MediaRoot) -> None:
    with pytest.raises(DataError, match="from < to"):
        probe_video(root, "v", clip)


def test_another_epoch_shows_other_frames_of_the_same_number(tmp_path: Path, root: MediaRoot) -> None:
    (tmp_path / "v").write_bytes(make_video())
    first = load_numbers(root, "v", every(6, method="uniform"), key="0/0/a:1")
    assert first == load_numbers(root, "v", every(6, method="uniform"), key="0/0/a:1")
    second = load_numbers(root, "v", every(6, method="uniform"), key="0/1/a:1")
    assert len(second) == len(first)
    assert second != first


def test_frames_come_upright(tmp_path: Path, root: MediaRoot) -> None:
    body = bytearray(make_video(times=range(4), size=(64, 32)))
    # The display matrix of the track, 16.16 fixed point: a quarter turn to the right.
    matrix = body.index(b"tkhd") + 4 + 40
    quarter = [0, 1 << 16, 0, -1 << 16, 0, 0, 32 << 16, 0, 1 << 30]
    body[matrix : matrix + 36] = b"".join(value.to_bytes(4, signed=True) for value in quarter)
    (tmp_path / "v").write_bytes(body)
    info = probe_video(root, "v")
    assert [frame.size for frame in list(iter_frames(root, "v", info, every(2), count=2, key=""))] == [(32, 64)] * 2


def test_transparency_is_laid_over_white(tmp_path: Path, root: MediaRoot) -> None:
    frames = [Image.new("RGBA", (32, 32), (0, 0, 0, alpha)) for alpha in (0, 255)]
    frames[0].save(tmp_path / "v", format="png", save_all=True, append_images=frames[1:], duration=100)
    info = probe_video(root, "v")
    images = list(iter_frames(root, "v", info, every(2), count=2, key=""))
    assert [image.getpixel((5, 5)) for image in images] == [(255, 255, 255), (0, 0, 0)]


def test_a_video_is_read_from_an_object_store(root: MediaRoot) -> None:
    fsspec.filesystem("memory").pipe_file("/videos/v.mp4", make_video())
    assert load_numbers(open_root("memory://videos"), "v.mp4", every(4)) == [4, 14, 24, 34]


# Folders of pictures


def test_a_process_forked_after_a_video_was_read_can_free_what_is_left_of_it(tmp_path: Path, root: MediaRoot) -> None:
    # Workers are forked from a rank that has read videos itself; scaling threads are not in the fork.
    (tmp_path / "v").write_bytes(make_video("mp4", "libx264"))
    info = probe_video(root, "v")
    with (tmp_path / "v").open("rb") as file, open_video(file, "v") as source:
        reader = VideoReader(source)
        next(reader.iter_shown([0.05], start_s=info.start_s, frame_s=0.1))
    left = [reader]
    left.append(left)  # type: ignore[arg-type]
    gc.disable()
    try:
        del left, reader
        child = multiprocessing.get_context("fork").Process(target=gc.collect)
        child.start()
    finally:
        gc.enable()
    child.join(30)
    is_stuck = child.is_alive()
    child.kill()
    assert not is_stuck
    assert child.exitcode == 0


def write_pictures(folder: Path, names: Sequence[str]) -> None:
    folder.mkdir()
    for number, name in enumerate(names):
        Image.new("RGB", (40, 32), (SHADE * number,) * 3).save(folder / name)


def test_a_folder_is_read_in_the_order_of_its_numbers(tmp_path: Path, root: MediaRoot) -> None:
    write_pictures(tmp_path / "v", ["b_1.png", "a_2.png", "a_9.jpg", "a_10.png", "a_0100.png"])
    (tmp_path / "v" / "notes_3.txt").write_text("no picture")
    assert probe_video(root, "v/") == VideoInfo(5, None, 40, 32)
    assert load_numbers(root, "v/", every(5)) == [0, 1, 2, 3, 4]
    assert load_numbers(root, "v/", every(9)) == [0, 1, 2, 3, 4]
    assert load_numbers(root, "v/", every(2)) == [0, 3]
    assert load_numbers(root, "v/", FrameSampling.parse("fps1", 1, 32)) == [0, 1, 2, 3, 4]


def test_a_folder_has_no_times_to_clip(tmp_path: Path, root: MediaRoot) -> None:
    write_pictures(tmp_path / "v", ["1.png"])
    with pytest.raises(DataError, match="has no times"):
        probe_video(root, "v/", (0.0, 1.0))


def test_a_folder_without_pictures_or_no_folder_is_missing(tmp_path: Path, root: MediaRoot) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty/", "nowhere/"):
        with pytest.raises(MediaError) as caught:
            probe_video(root, name)
        assert caught.value.reason == Reason.MISSING


def test_a_broken_picture_of_a_folder_is_named(tmp_path: Path, root: MediaRoot) -> None:
    write_pictures(tmp_path / "v", ["1.png", "2.png"])
    (tmp_path / "v" / "2.png").write_bytes(b"<html>")
    info = probe_video(root, "v/")
    with pytest.raises(MediaError, match=r"v/2\.png"):
        list(iter_frames(root, "v/", info, every(2), count=2, key=""))
