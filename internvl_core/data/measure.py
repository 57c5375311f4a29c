"""How long the samples of some lines are, and which lines are no samples: the work of the index.

Nothing is decoded: widths and heights come from the record or from the header of the file.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from internvl_core.data.conversation import ConversationLength, render_frames
from internvl_core.data.encoding import Encoding
from internvl_core.data.media import read_image_size
from internvl_core.data.media_root import MediaRoot, open_root
from internvl_core.data.meta import DatasetMeta
from internvl_core.data.records import ParsedRecord, Turn, parse_record
from internvl_core.data.video import count_frames, probe_video
from internvl_core.errors import DataError, Reason

_HEADER_READERS = 16
# A remote file's beginning; the size stands in the first 64 KiB of nearly every image.
_HEADER_BYTES = 64 << 10


@dataclass(frozen=True)
class Measure:
    """One record that is sound, as far as can be told without its pixels."""

    kind: str
    num_tokens: int
    num_tiles: int
    num_supervised: int


def measure_lines(
    lines: Sequence[bytes], *, first_line: int, meta: DatasetMeta, encoding: Encoding
) -> list[Measure | DataError]:
    """Measure consecutive lines of an annotation file.

    Args:
        first_line: number of the first of them, from 1.
        encoding: the data set's own.

    Returns:
        For each line its measure, or what is wrong with it.
    """
    results: list[Measure | DataError | None] = [None] * len(lines)
    records: dict[int, ParsedRecord] = {}
    for position, line in enumerate(lines):
        try:
            records[position] = parse_record(line, ignore_keys=meta.ignore_keys)
        except DataError as error:
            results[position] = _hint_at_a_cut(line, error)
    shapes = _measure_media(records, first_line, meta, encoding)
    positions, conversations = [], []
    for position in records:
        shape = shapes[position]
        if isinstance(shape, DataError):
            results[position] = shape
            continue
        positions.append(position)
        conversations.append(shape.turns)
    for position, length in zip(positions, encoding.count_tokens(conversations), strict=True):
        results[position] = _join(records[position], shapes[position], length, encoding)
    return [result for result in results if result is not None]


def _hint_at_a_cut(line: bytes, error: DataError) -> DataError:
    if error.reason is not Reason.NOT_JSON or line.endswith(b"\n"):
        return error
    return DataError(
        f"{error} It is the last line and has no line end: the file may have been cut off.", reason=error.reason
    )


@dataclass(frozen=True)
class _Shape:
    """What the media of a record come to: its tiles, and its turns with one image tag each."""

    turns: Sequence[Turn]
    num_tiles: int


def _measure_media(
    records: dict[int, ParsedRecord], first_line: int, meta: DatasetMeta, encoding: Encoding
) -> dict[int, _Shape | DataError]:
    root = open_root(meta.root)

    def measure(position: int) -> _Shape | DataError:
        try:
            sample_id = f"{meta.name}:{first_line + position}"
            return _measure_record(records[position], sample_id, root, encoding)
        except DataError as error:
            return error

    headers = [position for position, record in records.items() if _needs_header(record)]
    if not headers:
        return {position: measure(position) for position in records}
    with ThreadPoolExecutor(_HEADER_READERS) as pool:
        found = dict(zip(headers, pool.map(measure, headers), strict=True))
    return {position: found.get(position) or measure(position) for position in records}


def _needs_header(record: ParsedRecord) -> bool:
    return record.video is not None or bool(record.images and record.sizes is None)


def _measure_record(record: ParsedRecord, sample_id: str, root: MediaRoot, encoding: Encoding) -> _Shape:
    if record.video is not None:
        info = probe_video(root, record.video, record.clip)
        num_frames = count_frames(info, encoding.frames, key=sample_id)
        return _Shape(render_frames(record.turns, num_frames), num_frames)
    if not record.images:
        return _Shape(record.turns, 0)
    sizes = record.sizes or _read_sizes(record.images, root)
    tiling = encoding.tiling.for_images(len(sizes))
    return _Shape(record.turns, sum(tiling.count_tiles(*size) for size in sizes))


def _read_sizes(names: Sequence[str], root: MediaRoot) -> list[tuple[int, int]]:
    sizes = []
    for name in names:
        with root.open(name, block_bytes=_HEADER_BYTES) as file:
            sizes.append(read_image_size(file, name))
    return sizes


def _join(
    record: ParsedRecord, shape: _Shape | DataError, length: ConversationLength | DataError, encoding: Encoding
) -> Measure | DataError:
    if isinstance(length, DataError):
        return length
    assert isinstance(shape, _Shape)
    if not length.num_supervised:
        return DataError("no token of the conversation is learnt.", reason=Reason.NO_TARGET)
    num_tokens = length.num_text_tokens + shape.num_tiles * encoding.tokens_per_tile
    return Measure(record.kind, num_tokens, shape.num_tiles, length.num_supervised)
