"""One sample taken apart for people: its pictures and tiles, its tokens, and what is wrong with it.

Made by the code of training, not beside it: what is shown is what the model would get.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from PIL import Image

from internvl_core.data.encoding import Encoding
from internvl_core.data.measure import Measure, measure_lines
from internvl_core.data.media import load_image
from internvl_core.data.media_root import open_root
from internvl_core.data.meta import DatasetMeta
from internvl_core.data.pixels import LoadedMedia, PixelRules, PixelSource
from internvl_core.data.records import ParsedRecord, Record, Turn, parse_record
from internvl_core.data.script import IGNORE_INDEX
from internvl_core.data.text_encoder import TextEncoder
from internvl_core.errors import DataError, Reason
from internvl_core.inspection.lint_media import check_tiles

_NO_LIMIT = 1 << 40
_MAX_SHOWN_SIDE_PX = 1200
_REPLACEMENT = "�"
# How the two families of tokenizers write a space at the head of a word.
_SPACES = ("Ġ", "▁")


@dataclass(frozen=True)
class Picture:
    """An image or a frame, and the tiles that became of it."""

    title: str
    columns: int
    rows: int
    tiles: list[Image.Image]
    """Row by row, the thumbnail last if there is one."""
    num_tokens: int
    size: tuple[int, int] | None = None
    """Width and height in px as it lies in the root; None for a frame."""
    whole: Image.Image | None = None
    """The picture itself, made smaller if it is large; None for a frame, which is its own tile."""

    @property
    def has_thumbnail(self) -> bool:
        return len(self.tiles) > self.columns * self.rows


@dataclass(frozen=True)
class Token:
    """A token, or a run of equal ones."""

    position: int
    """Of the first, from 0."""
    token_id: int
    name: str
    """As the vocabulary writes it."""
    text: str
    """As it reads; empty where a character goes on that an earlier token began."""
    is_learnt: bool
    is_control: bool
    count: int = 1


@dataclass(frozen=True)
class SampleView:
    """Everything that is known of one line."""

    meta: DatasetMeta
    line: int
    raw: bytes
    max_seq_length: int
    max_tiles: int | None
    """What a pack holds; None where the stage does not pack."""
    content: ParsedRecord | None = None
    """None where the line is no record."""
    turns: Sequence[Turn] = ()
    """With a line for each frame of a video."""
    pictures: list[Picture] = field(default_factory=list)
    tokens: list[Token] | None = None
    """None where there is no tokenizer, or nothing to tokenize."""
    problems: list[DataError] = field(default_factory=list)
    """Why the record is not trained on; none if it is."""

    @property
    def num_tokens(self) -> int:
        return sum(token.count for token in self.tokens or [])

    @property
    def num_learnt(self) -> int:
        return sum(token.count for token in self.tokens or [] if token.is_learnt)

    @property
    def num_image_tokens(self) -> int:
        return sum(picture.num_tokens for picture in self.pictures)

    @property
    def num_tiles(self) -> int:
        return sum(len(picture.tiles) for picture in self.pictures)


def view_sample(
    meta: DatasetMeta,
    line: int,
    raw: bytes,
    *,
    encoding: Encoding,
    rules: PixelRules,
    seed: int,
    max_seq_length: int,
    max_tiles: int | None = None,
) -> SampleView:
    """Take one line apart, as far as it goes; what is wrong is told and not raised.

    Args:
        encoding: the data set's own.
        seed: draws the frames of a video, here those of the first epoch.
        max_tiles: what a pack holds; None where the stage does not pack.
    """
    view = SampleView(meta, line, raw, max_seq_length, max_tiles)
    try:
        content = parse_record(raw, ignore_keys=meta.ignore_keys)
    except DataError as error:
        return replace(view, problems=[error])
    problems: list[DataError] = []
    (measure,) = measure_lines([raw], first_line=line, meta=meta, encoding=encoding)
    if isinstance(measure, DataError):
        problems.append(measure)
    view = replace(view, content=content, turns=content.turns)
    try:
        record = Record(meta.name, meta.annotation, line, content)
        media = PixelSource(meta, encoding, rules).load(record, key=f"{seed}/0.0/{record.sample_id}", is_training=False)
        view = replace(view, turns=media.turns, pictures=_list_pictures(meta, content, media, encoding))
        if encoding.encoder is not None:
            view = replace(view, tokens=_list_tokens(media, encoding, encoding.encoder))
        if isinstance(measure, Measure):
            check_tiles(view.num_tiles, measure.num_tiles)
        _check_size(view)
    except DataError as error:
        problems.append(error)
    # What index and decoder say alike is said once.
    return replace(view, problems=list({str(problem): problem for problem in problems}.values()))


def _check_size(view: SampleView) -> None:
    if view.num_tokens > view.max_seq_length:
        raise DataError(
            f"{view.num_tokens} tokens, but max_seq_length is {view.max_seq_length}. Lower max_dynamic_patch, split "
            "the record, or raise max_seq_length.",
            reason=Reason.TOO_LONG,
        )
    if view.max_tiles is not None and view.num_tiles > view.max_tiles:
        raise DataError(
            f"{view.num_tiles} tiles, but a pack holds num_images_expected, {view.max_tiles}. Lower max_dynamic_patch "
            "or max_num_frame, split the record, or raise num_images_expected.",
            reason=Reason.TOO_MANY_TILES,
        )


def _list_pictures(meta: DatasetMeta, content: ParsedRecord, media: LoadedMedia, encoding: Encoding) -> list[Picture]:
    tiles = [Image.fromarray(tile.permute(1, 2, 0).numpy()) for tile in media.tiles]
    starts = [sum(media.tile_counts[:number]) for number in range(len(media.tile_counts))]
    shares = [tiles[start : start + count] for start, count in zip(starts, media.tile_counts, strict=True)]
    if content.video is not None:
        return [
            Picture(f"Frame {number}", 1, 1, share, len(share) * encoding.tokens_per_tile)
            for number, share in enumerate(shares, start=1)
        ]
    root = open_root(meta.root)
    tiling = encoding.tiling.for_images(len(content.images))
    pictures = []
    for name, share in zip(content.images, shares, strict=True):
        with root.open(name) as file:
            whole = load_image(file, name)
        size = whole.size
        columns, rows = tiling.choose_grid(*size)
        whole.thumbnail((_MAX_SHOWN_SIDE_PX, _MAX_SHOWN_SIDE_PX))
        pictures.append(Picture(name, columns, rows, share, len(share) * encoding.tokens_per_tile, size, whole))
    return pictures


def _list_tokens(media: LoadedMedia, encoding: Encoding, encoder: TextEncoder) -> list[Token]:
    encoded = encoding.encode(media.turns, media.tile_counts, max_seq_length=_NO_LIMIT)
    ids, labels = encoded.input_ids, encoded.labels
    tokens: list[Token] = []
    position = 0
    while position < len(ids):
        name = encoder.get_token(ids[position])
        is_control = encoder.find_control_token(name) == name
        count = _count_run(ids, position) if is_control else 1
        texts = [name] if is_control else _read_character(ids, position, name, encoder)
        for place, text in enumerate(texts, start=position):
            is_learnt = labels[place] != IGNORE_INDEX
            tokens.append(Token(place, ids[place], encoder.get_token(ids[place]), text, is_learnt, is_control, count))
        position += max(count, len(texts))
    return tokens


def _count_run(ids: Sequence[int], start: int) -> int:
    end = start
    while end < len(ids) and ids[end] == ids[start]:
        end += 1
    return end - start


def _read_character(ids: Sequence[int], start: int, name: str, encoder: TextEncoder) -> list[str]:
    """Read a token, with those after it where it is only the beginning of a character."""
    for end in range(start + 1, min(start + 9, len(ids) + 1)):
        text = encoder.decode(ids[start:end])
        if _REPLACEMENT not in text:
            if name.startswith(_SPACES) and not text.startswith(" "):
                text = f" {text}"
            return [text, *[""] * (end - start - 1)]
    return [encoder.decode(ids[start : start + 1])]
