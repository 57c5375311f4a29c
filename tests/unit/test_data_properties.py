"""What holds on the way from records to samples, whatever the records, the pictures and the names."""

import json
import re
import tempfile
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest
from chat_tokenizers import load_golden_with_chat_tokens, train_sentence_piece
from data_sets import FRAMES, TOKENS_PER_TILE
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import encode, noise
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas
from video_files import make_video

from internvl_core.data.dataset import build_dataset
from internvl_core.data.encoding import Encoding
from internvl_core.data.media import load_image, read_image_size
from internvl_core.data.media_root import MediaRoot, check_name, open_root
from internvl_core.data.meta import DatasetMeta
from internvl_core.data.pixels import PixelRules
from internvl_core.data.quarantine import BadSample
from internvl_core.data.templates import CONV_STYLES
from internvl_core.data.text_encoder import TextEncoder
from internvl_core.data.tiles import cut_tiles
from internvl_core.data.tiling import Tiling, choose_grid
from internvl_core.data.video import FrameSampling, count_frames, iter_frames, probe_video
from internvl_core.errors import DataError, MediaError, Reason

sizes = st.tuples(st.integers(8, 150), st.integers(8, 150))
# Hypothesis takes texts out of our own code too: tags and control tokens, which are refused.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30).filter(
    lambda text: not re.search("<.*>", text, re.DOTALL)
)


@st.composite
def tilings(draw: st.DrawFn) -> Tiling:
    min_tiles = draw(st.integers(1, 4))
    max_tiles = draw(st.integers(min_tiles, 12))
    return Tiling(14, min_tiles, max_tiles, use_thumbnail=draw(st.booleans()), is_dynamic=draw(st.booleans()))


# --- lengths


@lru_cache(maxsize=2)
def load_encoder(kind: str) -> TextEncoder:
    tokenizer = load_golden_with_chat_tokens() if kind == "qwen" else train_sentence_piece()
    return TextEncoder.from_tokenizer(tokenizer)


@st.composite
def records(draw: st.DrawFn) -> dict[str, Any]:
    """A text, an image or several; a fitting number of tags anywhere in the questions."""
    images = draw(st.lists(sizes, max_size=3))
    questions = draw(st.lists(texts, min_size=1, max_size=3))
    for _ in images:
        number = draw(st.integers(0, len(questions) - 1))
        questions[number] += draw(st.sampled_from(["<image>", "<image>\n", " <image>"]))
    turns = [{"from": "system", "value": draw(texts)}] if draw(st.booleans()) else []
    for question in questions:
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": f"{draw(texts)}."}]
    content: dict[str, Any] = {"conversations": turns}
    if images:
        content["image"] = [f"{width}x{height}.png" for width, height in images]
        if draw(st.booleans()):
            content |= {"width": [width for width, _ in images], "height": [height for _, height in images]}
    return content


def write_pictures(folder: Path, content: dict[str, Any]) -> None:
    for name in content.get("image", ()):
        width, height = map(int, name.removesuffix(".png").split("x"))
        Image.new("RGB", (width, height)).save(folder / name)


@given(
    contents=st.lists(records(), min_size=1, max_size=4),
    tiling=tilings(),
    conv_style=st.sampled_from(CONV_STYLES),
    tokenizer=st.sampled_from(["qwen", "llama"]),
    prompts=st.tuples(st.none() | texts, st.none() | texts),
    max_dynamic_patch=st.none() | st.integers(1, 16),
    epoch=st.integers(0, 10**9),
)
@settings(max_examples=60)
def test_the_index_counts_what_is_encoded_and_cut(
    contents: list[dict[str, Any]],
    tiling: Tiling,
    conv_style: str,
    tokenizer: str,
    prompts: tuple[str | None, str | None],
    max_dynamic_patch: int | None,
    epoch: int,
) -> None:
    encoding = Encoding(load_encoder(tokenizer), tiling, FRAMES, conv_style, TOKENS_PER_TILE, prompts[0])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for content in contents:
            write_pictures(folder, content)
        (folder / "a.jsonl").write_text("".join(f"{json.dumps(content)}\n" for content in contents))
        own = {"max_dynamic_patch": max_dynamic_patch, "system_prompt": prompts[1]}
        meta = DatasetMeta("a", name, str(folder / "a.jsonl"), **own)  # type: ignore[arg-type]
        dataset = build_dataset(
            [meta], encoding, PixelRules("imagenet"), cache_dir=folder / "cache", max_seq_length=1 << 20, seed=0
        )
        index = dataset.mixture.sources[0].index
        assert index.problem_counts == {}
        for row in range(len(contents)):
            sample = dataset[epoch * len(dataset) + row]
            assert not isinstance(sample, BadSample), sample.message
            assert index.tokens[row] == len(sample["input_ids"])
            assert index.tiles[row] == len(sample["tiles"])
            assert index.supervised[row] == (sample["labels"] != -100).sum()


# --- tiles


def choose_by_the_rule(width: int, height: int, tiling: Tiling) -> tuple[int, int]:
    """Write the rule of the original anew: the nearest ratio; on a tie the last grid that the image fills half of."""
    area = tiling.tile_size**2
    grids = [(i, j) for i in range(1, tiling.max_tiles + 1) for j in range(1, tiling.max_tiles + 1)]
    grids = [grid for grid in grids if tiling.min_tiles <= grid[0] * grid[1] <= tiling.max_tiles]
    grids.sort(key=lambda grid: grid[0] * grid[1])
    nearest = min(abs(width / height - i / j) for i, j in grids)
    first, *others = [(i, j) for i, j in grids if abs(width / height - i / j) == nearest]
    return next((grid for grid in reversed(others) if width * height > 0.5 * area * grid[0] * grid[1]), first)


@given(st.integers(1, 3000), st.integers(1, 3000), tilings(), st.sampled_from([14, 448]))
@settings(max_examples=500)
def test_the_grid_is_that_of_the_rule_and_that_of_transformers(
    width: int, height: int, tiling: Tiling, tile_size: int
) -> None:
    tiling = Tiling(tile_size, tiling.min_tiles, tiling.max_tiles, tiling.use_thumbnail, is_dynamic=True)
    chosen = choose_grid(width, height, min_tiles=tiling.min_tiles, max_tiles=tiling.max_tiles, tile_size=tile_size)
    assert tiling.min_tiles <= chosen[0] * chosen[1] <= tiling.max_tiles
    assert chosen == choose_by_the_rule(width, height, tiling)
    assert chosen == get_optimal_tiled_canvas(
        (height, width), (tile_size, tile_size), tiling.min_tiles, tiling.max_tiles
    )


@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 12))
def test_ties_are_broken_as_transformers_does(unit: int, columns: int, rows: int) -> None:
    tiling = Tiling(14, 1, 12, use_thumbnail=True, is_dynamic=True)
    size = (columns * unit, rows * unit)
    assert tiling.choose_grid(*size) == choose_by_the_rule(*size, tiling)
    assert tiling.choose_grid(*size) == get_optimal_tiled_canvas(size[::-1], (14, 14), 1, 12)


@given(sizes, tilings(), st.integers(0, 20), st.booleans())
@settings(max_examples=100)
def test_as_many_tiles_are_cut_as_were_counted(
    size: tuple[int, int], tiling: Tiling, num_images: int, is_fast: bool
) -> None:
    own = tiling.for_images(num_images)
    assert len(cut_tiles(Image.new("RGB", size), own, is_fast=is_fast)) == own.count_tiles(*size)


# --- damage

EXIF = Image.Exif()
EXIF[0x0112] = 6
PICTURES = {
    "JPEG": encode(noise(40, 24), "JPEG", exif=EXIF),
    "progressive": encode(noise(40, 24), "JPEG", progressive=True),
    "PNG": encode(noise(40, 24), "PNG", exif=EXIF),
    "GIF": encode(noise(40, 24), "GIF"),
    "WEBP": encode(noise(40, 24), "WEBP", exif=EXIF),
    "TIFF": encode(noise(40, 24), "TIFF", exif=EXIF),
    "LZW": encode(noise(40, 24), "TIFF", compression="tiff_lzw"),
    "BMP": encode(noise(40, 24), "BMP"),
    "PPM": encode(noise(40, 24), "PPM"),
}
FILMS = {
    "mp4": make_video(times=range(12)),
    "matroska": make_video("matroska", times=range(12)),
    "gif": make_video("gif", "gif", times=range(12)),
}


@st.composite
def damages(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """A few bytes changed, most often in the beginning; perhaps cut, perhaps longer."""
    places = st.floats(0, 1).map(lambda share: share**3)
    changes = draw(st.lists(st.tuples(places, st.integers(0, 255)), max_size=6))
    cut, tail = draw(st.none() | places), draw(st.binary(max_size=4))

    def damage(content: bytes) -> bytes:
        body = bytearray(content)
        for place, value in changes:
            body[int(place * (len(body) - 1))] = value
        return bytes(body[: len(body) if cut is None else int(cut * len(body))] + tail)

    return damage


@pytest.mark.parametrize("kind", PICTURES)
@given(damage=damages())
@settings(max_examples=150)
def test_a_damaged_picture_is_a_picture_or_an_error_of_ours(kind: str, damage: Callable[[bytes], bytes]) -> None:
    content = damage(PICTURES[kind])
    try:
        image = load_image(content, "a.jpg")
    except MediaError as error:
        check_error(error, "a.jpg")
        return
    assert image.mode == "RGB"
    # What the workers can read, the index lets in, with the same size.
    assert read_image_size(content, "a.jpg") == image.size


@pytest.mark.parametrize("kind", PICTURES)
@given(damage=damages())
@settings(max_examples=150)
def test_a_damaged_header_is_a_size_or_an_error_of_ours(kind: str, damage: Callable[[bytes], bytes]) -> None:
    try:
        width, height = read_image_size(damage(PICTURES[kind]), "a.jpg")
    except MediaError as error:
        check_error(error, "a.jpg")
    else:
        assert min(width, height) >= 8


@pytest.mark.parametrize("kind", FILMS)
@given(damage=damages())
@settings(max_examples=60)
def test_a_damaged_video_is_some_pictures_or_an_error_of_ours(kind: str, damage: Callable[[bytes], bytes]) -> None:
    sampling = FrameSampling.parse("uniform", 2, 4)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.mp4").write_bytes(damage(FILMS[kind]))
        root = open_root(folder)
        try:
            info = probe_video(root, "a.mp4")
            count = count_frames(info, sampling, key="a")
            frames = list(iter_frames(root, "a.mp4", info, sampling, count=count, key="b"))
        except MediaError as error:
            check_error(error, "a.mp4")
        else:
            assert 1 <= len(frames) == count <= 4
            assert {frame.mode for frame in frames} == {"RGB"}


def check_error(error: MediaError, name: str) -> None:
    assert str(error).startswith(f"{name}: ")
    assert len(str(error).splitlines()) == 1
    assert len(str(error)) < 500
    assert error.reason in (Reason.MEDIA, Reason.MEDIA_SIZE, Reason.SIZE_MISMATCH)


# --- names

PARTS = ["..", ".", "", "a", "b.png", "out", "in", "up", "loop", "file", "%2e%2e", "..\\", "~", "\0", "é", " "]
names = st.lists(st.sampled_from(PARTS), min_size=1, max_size=6).map("/".join) | st.text(max_size=12)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders and links, some of which lead out of the root, which is `root`."""
    folder = tmp_path_factory.mktemp("tree").resolve()
    (folder / "root" / "a" / "a").mkdir(parents=True)
    (folder / "secret").mkdir()
    for place in ("secret/b.png", "root/b.png", "root/a/b.png", "root/a/a/b.png", "b.png"):
        (folder / place).write_bytes(b"b")
    links = {"out": "../secret", "in": "a", "up": "..", "loop": "loop", "file": "../b.png", "a/out": "../../secret"}
    for link, target in links.items():
        (folder / "root" / link).symlink_to(target)
    (folder / "root" / "a" / "up").symlink_to("..")
    return folder / "root"


@given(name=names)
@settings(max_examples=600)
def test_whatever_a_name_is_nothing_outside_the_root_is_reached(tree: Path, name: str) -> None:
    root = open_root(str(tree))
    refusal = catch(partial(check_name, name))
    if refusal is not None:
        assert refusal.reason is Reason.PATH
        for reach in (partial(root.read, name), partial(root.list_files, name), partial(probe_video, root, name)):
            assert catch(reach) is not None
        return
    for found in [name, *list_files(root, name)]:
        opened: list[Path] = []
        if catch(partial(open_and_find, root, found, opened)) is None:
            assert opened[0].is_relative_to(tree)
            assert opened[0].read_bytes() == root.read(found) == b"b"


def catch(reach: Callable[[], object]) -> DataError | None:
    try:
        reach()
    except DataError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017
        return error
    return None


def open_and_find(root: MediaRoot, name: str, opened: list[Path]) -> None:
    with root.open(name) as file:
        opened.append(Path(f"/dev/fd/{file.fileno()}").readlink())


def list_files(root: MediaRoot, name: str) -> list[str]:
    try:
        return root.list_files(name)
    except DataError:
        return []


def test_the_names_do_reach_files_and_links(tree: Path) -> None:
    root = open_root(str(tree))
    assert root.read("in/a/b.png") == b"b"
    assert root.read("a/up/in/b.png") == b"b"
    for name in ("out/b.png", "up/b.png", "file", "a/up/a/out/b.png", "loop"):
        with pytest.raises(MediaError):
            root.read(name)
