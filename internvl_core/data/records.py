"""Records: what one line of an annotation file says, parsed and checked on its own.

A record that comes out of here is sound: roles alternate, every image has exactly one `<image>`
tag and a video one `<video>` tag, names are paths below the data set's root. What is not
understood is refused. Tokens, files and pixels are looked at elsewhere.
"""

import difflib
import json
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO, Literal, TypedDict

from internvl_core.data.media_root import check_name
from internvl_core.data.strict_json import STRICT_JSON, shorten
from internvl_core.errors import DataError, Reason

IMAGE_TAG = "<image>"
VIDEO_TAG = "<video>"
"""Placeholders of media in a human turn; never tokens."""

Role = Literal["system", "human", "gpt"]
Turn = TypedDict("Turn", {"from": Role, "value": str})
"""What one side says."""

MAX_LINE_BYTES = 64 << 20
ANY_KEY = "*"
"""In a data set's `ignore_keys`: any key that is not known."""

RECORD_KEYS = frozenset(
    {
        *("id", "conversations", "image", "video", "clip"),
        *("width", "height", "width_list", "height_list", "length"),
    }
)
_TURN_KEYS = frozenset({"from", "value"})
_MAX_KEY_LETTERS = 40


@dataclass(frozen=True)
class ParsedRecord:
    """One checked record."""

    turns: tuple[Turn, ...]
    images: tuple[str, ...] = ()
    """Names below the data set's root, in the order of their tags."""
    sizes: tuple[tuple[int, int], ...] | None = None
    """Width and height of each image in px, upright; None where the record does not say."""
    video: str | None = None
    """Name below the data set's root; a folder of frames ends with a slash."""
    clip: tuple[float, float] | None = None
    """Part of the video that is shown, from and to, in seconds; None for all of it."""

    @property
    def kind(self) -> Literal["text", "image", "multi_image", "video"]:
        if self.video is not None:
            return "video"
        return ("text", "image", "multi_image")[min(len(self.images), 2)]


@dataclass(frozen=True)
class Record:
    """A record and where it stands."""

    dataset: str
    annotation: str
    line: int
    """Number of the line in the file, from 1."""
    content: ParsedRecord

    @property
    def sample_id(self) -> str:
        """Name the record within its meta file; the `id` of a record need not be unique, this is."""
        return f"{self.dataset}:{self.line}"

    @property
    def where(self) -> str:
        return f"{self.annotation}:{self.line}"


def iter_lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of an annotation file; of one that is too long as much as `parse_record` needs to refuse it."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        yield line
        while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE_BYTES + 1)


def parse_record(line: bytes, *, ignore_keys: Collection[str] = ()) -> ParsedRecord:
    """Parse one line and check its parts against each other.

    A medium without a tag anywhere gets one at the head of the first human turn, as in the original;
    never in a system turn, and never a second one (F25).

    Args:
        ignore_keys: keys of records and turns that are notes of the data set's authors; `*` for all.

    Raises:
        DataError: says what is wrong and its reason; the caller knows the file and the line.
    """
    if len(line) > MAX_LINE_BYTES:
        raise DataError(
            f"{len(line)} bytes in one line; at most {MAX_LINE_BYTES} are read.", reason=Reason.LINE_TOO_LONG
        )
    content = _parse_json(line)
    _check_keys(content, RECORD_KEYS, ignore_keys)
    images = _parse_images(content.get("image"))
    video, clip = _parse_video(content)
    if images and video is not None:
        raise DataError("image and video in one record. Make two records of it.")
    turns = _parse_turns(content.get("conversations"), ignore_keys)
    return ParsedRecord(
        turns=_place_tags(turns, len(images), has_video=video is not None),
        images=images,
        sizes=_parse_sizes(content, len(images)),
        video=video,
        clip=clip,
    )


def _parse_json(line: bytes) -> dict[str, Any]:
    if b"\0" in line:
        raise DataError("not UTF-8: holds zero bytes, as UTF-16 does. Convert the file.", reason=Reason.ENCODING)
    try:
        content = STRICT_JSON.decode(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8: {error}. Convert the file.", reason=Reason.ENCODING) from None
    except json.JSONDecodeError as error:
        raise DataError(f"not one JSON object: {error.msg} at column {error.colno}.", reason=Reason.NOT_JSON) from None
    except RecursionError:
        raise DataError(
            "nested too deeply; a record is an object with a list of turns.", reason=Reason.NOT_JSON
        ) from None
    except ValueError:  # Python's limit on the digits of a number
        raise DataError("holds a number of thousands of digits.", reason=Reason.NOT_JSON) from None
    if not isinstance(content, dict):
        raise DataError(f"must be a JSON object, got {type(content).__name__}.", reason=Reason.NOT_JSON)
    return content


def _check_keys(content: dict[str, Any], known: frozenset[str], ignored: Collection[str]) -> None:
    if known.issuperset(content):
        return
    for key in content:
        if key in known or key in ignored:
            continue
        # Difflib takes memory and time for every letter, and a key may have millions.
        misspelt = _find_nearest(key[:_MAX_KEY_LETTERS].lower(), known, 0.8)
        if misspelt:
            raise DataError(f"unknown key {shorten(key)}. Did you mean {misspelt!r}?")
        if ANY_KEY not in ignored:
            nearest = _find_nearest(key[:_MAX_KEY_LETTERS], known, 0)
            raise DataError(
                f"unknown key {shorten(key)}, nearest known: {nearest!r}. If it is a note that training does not "
                "need, list it in the data set's ignore_keys."
            )


# The notes of a data set have the same keys in each of its records.
@lru_cache(maxsize=1024)
def _find_nearest(key: str, known: frozenset[str], cutoff: float) -> str | None:
    return next(iter(difflib.get_close_matches(key, sorted(known), n=1, cutoff=cutoff)), None)


def _parse_images(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    names = value if isinstance(value, list) else [value]
    for name in names:
        if not isinstance(name, str) or not name:
            raise DataError(f"image must be a path or a list of paths, got {shorten(name)}.")
        _check_text(name, "image")
        check_name(name)
    return tuple(names)


def _parse_video(content: dict[str, Any]) -> tuple[str | None, tuple[float, float] | None]:
    name, clip = content.get("video"), content.get("clip")
    if name is None:
        if clip is not None:
            raise DataError("clip without a video.")
        return None, None
    if not isinstance(name, str) or not name:
        raise DataError(f"video must be one path, got {shorten(name)}.")
    _check_text(name, "video")
    check_name(name)
    if clip is None:
        return name, None
    if not (isinstance(clip, list) and len(clip) == 2 and all(_is_number(bound) for bound in clip)):
        raise DataError(f"clip must be [from, to] in seconds, got {shorten(clip)}.")
    start, end = float(clip[0]), float(clip[1])
    if not 0 <= start < end:
        raise DataError(f"clip [{start:g}, {end:g}] must be 0 <= from < to, in seconds.")
    if name.endswith("/"):
        raise DataError(f"clip of {shorten(name)}: a folder of frames has no times. Name a file, or leave clip out.")
    return name, (start, end)


def _is_number(value: object) -> bool:
    # Compared, not converted: a whole number of JSON may be too large for a float. NaN is not below anything.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _parse_sizes(content: dict[str, Any], num_images: int) -> tuple[tuple[int, int], ...] | None:
    # Of a text or a video as well, where they are of no use: a wrong one is a mistake of whoever wrote the record.
    widths, heights = _parse_sides(content, "width"), _parse_sides(content, "height")
    if not num_images or (widths is None and heights is None):
        return None
    if widths is None or heights is None:
        missing = "width" if widths is None else "height"
        raise DataError(f"{missing} is missing. Give both sides or none; without them the header of the image is read.")
    if not len(widths) == len(heights) == num_images:
        raise DataError(
            f"{len(widths)} widths and {len(heights)} heights for {num_images} images. Give one of each per image."
        )
    return tuple(zip(widths, heights, strict=True))


def _parse_sides(content: dict[str, Any], name: str) -> list[int] | None:
    found = None
    for key in (name, f"{name}_list"):
        value = content.get(key)
        if value is None:
            continue
        found = value if isinstance(value, list) else [value]
        for side in found:
            if isinstance(side, bool) or not isinstance(side, int) or not 0 < side < 1 << 20:
                raise DataError(f"{key} must be a whole number of pixels above 0, got {shorten(side)}.")
    return found


def _parse_turns(value: object, ignore_keys: Collection[str]) -> tuple[Turn, ...]:
    if not isinstance(value, list) or not value:
        raise DataError("conversations must be a list of turns, at least one human and one gpt.", reason=Reason.TURNS)
    turns = tuple(_parse_turn(number, turn, ignore_keys) for number, turn in enumerate(value, start=1))
    first = 1 if turns[0]["from"] == "system" else 0
    for number, turn in enumerate(turns[first:]):
        due = "human" if number % 2 == 0 else "gpt"
        if turn["from"] != due:
            raise DataError(
                f"turn {first + number + 1} is {turn['from']!r}, must be {due!r}: human and gpt alternate.",
                reason=Reason.TURNS,
            )
    if turns[-1]["from"] != "gpt":
        raise DataError(
            f"the last turn is {turns[-1]['from']!r}, must be 'gpt': there is nothing to learn after it.",
            reason=Reason.NO_TARGET,
        )
    return turns


def _parse_turn(number: int, turn: object, ignore_keys: Collection[str]) -> Turn:
    if not isinstance(turn, dict):
        raise DataError(
            f"turn {number} must be an object with from and value, got {shorten(turn)}.", reason=Reason.TURNS
        )
    _check_keys(turn, _TURN_KEYS, ignore_keys)
    role, text = turn.get("from"), turn.get("value")
    if role not in ("system", "human", "gpt"):
        raise DataError(
            f"turn {number}: from is {shorten(role)}, must be system (first turn only), human or gpt.",
            reason=Reason.TURNS,
        )
    if not isinstance(text, str):
        raise DataError(f"turn {number}: value must be text, got {shorten(text)}.", reason=Reason.TURNS)
    if role == "gpt" and not text.strip():
        raise DataError(f"turn {number}: the answer is empty.", reason=Reason.NO_TARGET)
    _check_text(text, f"turn {number}")
    return {"from": role, "value": text}


def _check_text(text: str, where: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{where}: half a surrogate pair is not text. Repair the record's escapes.", reason=Reason.ENCODING
        ) from None


def _place_tags(turns: tuple[Turn, ...], num_images: int, *, has_video: bool) -> tuple[Turn, ...]:
    turns = _place_tag(turns, VIDEO_TAG, int(has_video), "videos")
    return _place_tag(turns, IMAGE_TAG, num_images, "images")


def _place_tag(turns: tuple[Turn, ...], tag: str, num_media: int, media: str) -> tuple[Turn, ...]:
    num_tags = sum(turn["value"].count(tag) for turn in turns if turn["from"] == "human")
    num_elsewhere = sum(turn["value"].count(tag) for turn in turns if turn["from"] != "human")
    if num_tags == num_media and not num_elsewhere:
        return turns
    if num_media == 1 and not num_tags and not num_elsewhere:
        first = next(position for position, turn in enumerate(turns) if turn["from"] == "human")
        tagged: Turn = {"from": "human", "value": f"{tag}\n{turns[first]['value']}"}
        return (*turns[:first], tagged, *turns[first + 1 :])
    elsewhere = f" ({num_elsewhere} more in other turns)" if num_elsewhere else ""
    raise DataError(
        f"{num_tags} {tag} tags{elsewhere} but {num_media} {media}. Write one tag for each, in human turns.",
        reason=Reason.TAGS,
    )
