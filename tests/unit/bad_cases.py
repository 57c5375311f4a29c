"""What a case of bad input is: how it is made, and what must become of it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_sets import record
from image_files import encode, noise
from video_files import make_video

from internvl_core.errors import Reason

Line = bytes | dict[str, Any]
"""A line of an annotation without its end, or the record that it says."""

Write = Callable[[Path, str], Line]
"""Writes what a line needs, in the folder of the media, under names that begin with the stem; returns the line."""

META, ANNOTATION, MEDIA, SECRET = "meta.json", "pets.jsonl", "media", "secret"
"""Names in the folder of a data set; `SECRET` is the folder that nothing may look into."""


@dataclass(frozen=True)
class Outcome:
    """What becomes of an input."""

    kind: Literal["meta_error", "left_out", "bad_sample", "good"]
    text: str = ""
    """Pattern that the message matches."""
    reason: Reason | None = None


GOOD = Outcome("good")
"""Trained on, odd as it may be."""


def meta_error(text: str) -> Outcome:
    """The whole data set is refused before anything is read of it."""
    return Outcome("meta_error", text)


def left_out(reason: Reason, text: str = "") -> Outcome:
    """Seen by the index."""
    return Outcome("left_out", text, reason)


def bad_sample(reason: Reason, text: str = "") -> Outcome:
    """Seen by the worker that loads it."""
    return Outcome("bad_sample", text, reason)


@dataclass(frozen=True)
class BadRecord:
    """One line among others, with the media that it names."""

    name: str
    """Begins with the number of the case in the list of known evils, where it has one."""
    write: Write
    outcome: Outcome


@dataclass(frozen=True)
class BadFiles:
    """A data set that is changed as a whole."""

    name: str
    change: Callable[[Path], object]
    """Gets the folder of a sound data set of two records."""
    outcome: Outcome
    line: int | None = None
    """Which line is at fault; None for all, or none."""


GOOD_LINE = json.dumps(record("good.png")).encode()


def write_sound(folder: Path) -> None:
    """Write a data set of two good records, and beside it a folder with secrets."""
    for name in (MEDIA, SECRET):
        (folder / name).mkdir(parents=True)
    (folder / MEDIA / "good.png").write_bytes(encode(noise(48, 32)))
    (folder / SECRET / "secret.png").write_bytes(encode(noise(48, 32)))
    (folder / SECRET / "secret.mp4").write_bytes(make_video(times=range(8)))
    (folder / SECRET / "secret.txt").write_text("secret")
    write_lines(folder, [GOOD_LINE] * 2)
    (folder / META).write_text(json.dumps({"pets": {"root": MEDIA, "annotation": ANNOTATION}}))


def to_bytes(line: Line) -> bytes:
    return line if isinstance(line, bytes) else json.dumps(line).encode()


def write_lines(folder: Path, lines: list[bytes]) -> None:
    (folder / ANNOTATION).write_bytes(join(lines))


def join(lines: list[bytes]) -> bytes:
    return b"".join(line + b"\n" for line in lines)


def show_image(name: str, **content: Any) -> dict[str, Any]:
    return record(name, **content)


def show_video(name: str, **content: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<video>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
    return {"video": name, "conversations": turns, **content}
