"""Annotation files: one JSON object a line, read by byte offset and checked when read.

Text of an annotation is never held in memory: a `RecordFile` knows where each line lies and reads
it when asked. A record that comes out of here is sound: roles alternate, every image has exactly
one `<image>` tag, no text forges an image or a turn. What is not understood is refused.
"""

import difflib
import json
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from internvl_core.data.meta import DatasetMeta, iter_record_lines, refuse_constant, refuse_duplicate_keys
from internvl_core.errors import DataError

IMAGE_TAG = "<image>"
"""Text placeholder of an image in a human turn; never a token."""

Role = Literal["system", "human", "gpt"]

_RESERVED = ("<img>", "</img>", "<IMG_CONTEXT>", "<|im_start|>", "<|im_end|>")
_MEDIA_KEYS = ("image", "video", "conversations")
_MAX_LINE_BYTES = 64 << 20


@dataclass(frozen=True)
class Turn:
    """What one side says."""

    role: Role
    text: str


@dataclass(frozen=True)
class Record:
    """One checked line of an annotation file."""

    dataset: str
    annotation: Path
    line: int
    """Number of the line in the file, from 1."""
    images: tuple[str, ...]
    """Paths below the dataset's root, in the order of their tags."""
    turns: tuple[Turn, ...]

    @property
    def sample_id(self) -> str:
        """Name the record within its meta file; the `id` of a record need not be unique, this is."""
        return f"{self.dataset}:{self.line}"

    @property
    def where(self) -> str:
        return f"{self.annotation}:{self.line}"


class RecordFile:
    """The records of one dataset, indexed by their position in the annotation file."""

    def __init__(self, meta: DatasetMeta) -> None:
        self.meta = meta
        self._numbers, self._offsets, self._sizes = array("q"), array("q"), array("q")
        for number, offset, size in iter_record_lines(meta.annotation):
            self._numbers.append(number)
            self._offsets.append(offset)
            self._sizes.append(size)
        if not self._numbers:
            raise DataError(f"{meta.annotation}: holds no record. Remove dataset {meta.name!r} or fill the file.")
        self._descriptor: int | None = None

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[Record]:
        return (self[position] for position in range(len(self)))

    def __getitem__(self, position: int) -> Record:
        """Read, parse and check one record.

        Raises:
            DataError: names file and line.
        """
        where = f"{self.meta.annotation}:{self._numbers[position]}"
        if self._sizes[position] > _MAX_LINE_BYTES:
            raise DataError(f"{where}: {self._sizes[position]} bytes in one line; at most {_MAX_LINE_BYTES} are read.")
        if self._descriptor is None:
            self._descriptor = os.open(self.meta.annotation, os.O_RDONLY | os.O_CLOEXEC)
        # pread has no file position, so workers forked with this descriptor cannot disturb each other.
        line = os.pread(self._descriptor, self._sizes[position], self._offsets[position])
        try:
            images, turns = parse_record(line)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        return Record(self.meta.name, self.meta.annotation, self._numbers[position], images, turns)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None}

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)  # type: ignore[arg-type]


def parse_record(line: bytes) -> tuple[tuple[str, ...], tuple[Turn, ...]]:
    """Parse one line into its image paths and turns, and check them against each other.

    A single image without a tag anywhere gets one at the head of the first human turn.

    Raises:
        DataError: says what is wrong; the caller knows the file and the line.
    """
    content = _parse_json(line)
    for key in content.keys() - set(_MEDIA_KEYS):
        # Unknown keys are notes of the dataset's authors, unless one is a misspelt medium: that would train blind.
        if nearest := difflib.get_close_matches(key.lower(), _MEDIA_KEYS, n=1, cutoff=0.85):
            raise DataError(f"unknown key {key!r}. Did you mean {nearest[0]!r}?")
    if content.get("video"):
        raise DataError("video records are not built yet. Remove the record or sample its frames as images.")
    images = _parse_images(content.get("image"))
    turns = _parse_turns(content.get("conversations"))
    return images, _place_tags(turns, len(images))


def _parse_json(line: bytes) -> dict[str, Any]:
    try:
        content = json.loads(
            line.decode("utf-8-sig"), object_pairs_hook=refuse_duplicate_keys, parse_constant=refuse_constant
        )
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8: {error}. Convert the file.") from None
    except json.JSONDecodeError as error:
        raise DataError(f"not one JSON object: {error.msg} at column {error.colno}.") from None
    except RecursionError:
        raise DataError("nested too deeply; a record is an object with a list of turns.") from None
    if not isinstance(content, dict):
        raise DataError(f"must be a JSON object, got {type(content).__name__}.")
    return content


def _parse_images(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    names = value if isinstance(value, list) else [value]
    for name in names:
        if not isinstance(name, str) or not name:
            raise DataError(f"image must be a path or a list of paths, got {name!r}.")
        if "://" in name:
            raise DataError(f"image {name!r}: remote media are not built yet. Copy them below the dataset's root.")
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\0" in name:
            raise DataError(f"image {name!r} must be a path below the dataset's root.")
    return tuple(names)


def _parse_turns(value: object) -> tuple[Turn, ...]:
    if not isinstance(value, list) or not value:
        raise DataError("conversations must be a list of turns, at least one human and one gpt.")
    turns = tuple(_parse_turn(number, turn) for number, turn in enumerate(value, start=1))
    first = 1 if turns[0].role == "system" else 0
    for number, turn in enumerate(turns[first:]):
        due = "human" if number % 2 == 0 else "gpt"
        if turn.role != due:
            raise DataError(f"turn {first + number + 1} is {turn.role!r}, must be {due!r}: human and gpt alternate.")
    if turns[-1].role != "gpt":
        raise DataError(f"the last turn is {turns[-1].role!r}, must be 'gpt': there is nothing to learn after it.")
    return turns


def _parse_turn(number: int, turn: object) -> Turn:
    if not isinstance(turn, dict):
        raise DataError(f"turn {number} must be an object with from and value, got {turn!r}.")
    role, text = turn.get("from"), turn.get("value")
    if role not in ("system", "human", "gpt"):
        raise DataError(f"turn {number}: from is {role!r}, must be system (first turn only), human or gpt.")
    if not isinstance(text, str):
        raise DataError(f"turn {number}: value must be text, got {text!r}.")
    if role == "gpt" and not text.strip():
        raise DataError(f"turn {number}: the answer is empty.")
    for token in _RESERVED:
        if token in text:
            raise DataError(f"turn {number}: the text contains {token}, which the model reads as a control token.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"turn {number}: half a surrogate pair is not text. Repair the record's escapes.") from None
    return Turn(role, text)


def _place_tags(turns: tuple[Turn, ...], num_images: int) -> tuple[Turn, ...]:
    num_tags = sum(turn.text.count(IMAGE_TAG) for turn in turns if turn.role == "human")
    if num_tags == num_images:
        return turns
    if num_images == 1 and not any(IMAGE_TAG in turn.text for turn in turns):
        first = next(position for position, turn in enumerate(turns) if turn.role == "human")
        tagged = Turn("human", f"{IMAGE_TAG}\n{turns[first].text}")
        return (*turns[:first], tagged, *turns[first + 1 :])
    raise DataError(f"{num_tags} {IMAGE_TAG} tags but {num_images} images. Write one tag per image, in human turns.")
