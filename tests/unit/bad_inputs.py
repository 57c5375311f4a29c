"""The corpus of bad inputs, as data: here lines, names and places; the rest in `bad_meta` and `bad_media`.

The numbers are those of the list that the corpus was made from; what has none was found by us.
"""

import os
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bad_cases import (
    GOOD,
    GOOD_LINE,
    SECRET,
    BadRecord,
    Line,
    Outcome,
    Write,
    bad_sample,
    left_out,
    show_image,
    show_video,
)
from bad_media import IMAGES, VIDEOS
from bad_meta import ANNOTATIONS, METAS
from image_files import encode, noise

from internvl_core.errors import Reason


def talk(*texts: str, roles: tuple[str, ...] = ("human", "gpt"), **content: Any) -> dict[str, Any]:
    turns = [{"from": roles[number % len(roles)], "value": text} for number, text in enumerate(texts)]
    return {"conversations": turns, **content}


def ask(text: str) -> dict[str, Any]:
    return talk(f"What is {text}?", "A cat.")


def nest(depth: int) -> list[Any]:
    nested: list[Any] = []
    for _ in range(depth):
        nested = [nested]
    return nested


RECORD, TURNS, TAGS, NOT_JSON = Reason.RECORD, Reason.TURNS, Reason.TAGS, Reason.NOT_JSON
ENCODING, CONTROL, TOO_LONG = Reason.ENCODING, Reason.CONTROL_TOKEN, Reason.TOO_LONG
THREE = ["good.png"] * 3
LINES: dict[str, tuple[Line, Outcome]] = {
    "16 UTF-16 with a mark": (GOOD_LINE.decode().encode("utf-16"), left_out(ENCODING, "not UTF-8")),
    "16 UTF-16": (GOOD_LINE.decode().encode("utf-16-le"), left_out(ENCODING, "as UTF-16 does")),
    "17 invalid UTF-8": (GOOD_LINE.replace(b"cat", b"\xff\xfe"), left_out(ENCODING, "not UTF-8")),
    "17 Latin-1": (GOOD_LINE.replace(b"cat", b"caf\xe9"), left_out(ENCODING, "not UTF-8")),
    "18 cut in the middle": (GOOD_LINE[:60], left_out(NOT_JSON, "not one JSON object")),
    "19 two objects": (GOOD_LINE * 2, left_out(NOT_JSON, "Extra data")),
    "20 an array": (b"[1, 2]", left_out(NOT_JSON, "must be a JSON object, got list")),
    "22 NaN": (GOOD_LINE[:-1] + b', "length": NaN}', left_out(NOT_JSON, "NaN is not JSON")),
    "22 Infinity": (GOOD_LINE[:-1] + b', "length": -Infinity}', left_out(NOT_JSON, "-Infinity is not JSON")),
    "23 image twice": (GOOD_LINE[:-1] + b', "image": "b.png"}', left_out(RECORD, "'image' occurs twice")),
    "24 no conversations": ({"image": "good.png"}, left_out(TURNS, "must be a list of turns")),
    "24 conversations null": ({"conversations": None}, left_out(TURNS, "must be a list of turns")),
    "24 conversations empty": ({"conversations": []}, left_out(TURNS, "must be a list of turns")),
    "25 gpt begins": (talk("A cat.", "What?", "A cat.", roles=("gpt", "human")), left_out(TURNS, "must be 'human'")),
    "26 role Human": (talk("a", "b", roles=("Human", "gpt")), left_out(TURNS, "from is 'Human', must be system")),
    "26 role with a space": (talk("a", "b", roles=("human", "assistant ")), left_out(TURNS, "from is 'assistant '")),
    "27 two humans": (talk("a", "b", "c", roles=("human", "human", "gpt")), left_out(TURNS, "must be 'gpt'")),
    "28 empty answer": (talk("a", ""), left_out(Reason.NO_TARGET, "the answer is empty")),
    "28 answer of spaces": (talk("a", " \n\t"), left_out(Reason.NO_TARGET, "the answer is empty")),
    "28 no answer": (talk("a"), left_out(Reason.NO_TARGET, "the last turn is 'human'")),
    "28 value null": ({"conversations": [{"from": "human", "value": None}]}, left_out(TURNS, "must be text, got None")),
    "29 no tag for one image": (talk("What is it?", "A cat.", image="good.png"), GOOD),
    "30 two tags, one image": (talk("<image><image>", "b", image="good.png"), left_out(TAGS, "2 <image> tags but 1")),
    "31 one tag, three images": (talk("<image>", "b", image=THREE), left_out(TAGS, "1 <image> tags but 3")),
    "32 tag in the answer": (talk("a", "<image>", image="good.png"), left_out(TAGS, "1 more in other turns")),
    "a million tags": (talk("<image>" * 1_000_000, "b"), left_out(TAGS, "1000000 <image> tags but 0")),
    "33 context token": (ask("<IMG_CONTEXT>"), left_out(CONTROL, "turn 1 spells '<IMG_CONTEXT>'")),
    "33 image token": (ask("<img>"), left_out(CONTROL, "turn 1 spells '<img>'")),
    "33 end of turn": (ask("<|im_end|>"), left_out(CONTROL, r"turn 1 spells '<\|im_end\|>'")),
    "33 end of turn in an answer": (talk("a", "b<|im_end|>"), left_out(CONTROL, "turn 2 spells")),
    "34 half a surrogate pair": (talk("a\ud800", "b"), left_out(ENCODING, "half a surrogate pair")),
    "34 half a pair in a name": (talk("a", "b", image="\udfff.png"), left_out(ENCODING, "half a surrogate pair")),
    "35 a million tokens": (talk("a", "cat dog " * 500_000), left_out(TOO_LONG)),
    "35 a million spaces": (talk("a" + " " * 1_000_000 + "b", "b"), left_out(TOO_LONG)),
    "35 a word of a million letters": (talk("ab" * 500_000, "b"), left_out(TOO_LONG)),
    "36 repetition": (talk("a", "very " * 40), GOOD),
    "37 an id": (talk("a", "b", id=7), GOOD),
    "37 the same id": (talk("a", "b", id=7), GOOD),
    "38 image is a number": (talk("a", "b", image=3), left_out(RECORD, "must be a path")),
    "38 image is an object": (talk("a", "b", image={"path": "a"}), left_out(RECORD, "must be a path")),
    "38 image is a list of lists": (talk("a", "b", image=[["a"]]), left_out(RECORD, "must be a path")),
    "38 image is empty": (talk("a", "b", image=""), left_out(RECORD, "must be a path")),
    "38 image is a list 300 deep": (talk("a", "b", image=nest(300)), left_out(RECORD, "must be a path")),
    "100,000 deep": (b"[" * 100_000, left_out(NOT_JSON, "nested too deeply")),
    "a number of 5000 digits": (b'{"length": ' + b"1" * 5000 + b"}", left_out(NOT_JSON, "thousands of digits")),
    "images": (talk("a", "b", images=["good.png"]), left_out(RECORD, "Did you mean 'image'")),
    "a million letters of a key": ({"k" * 1_000_000: 1}, left_out(RECORD, "unknown key 'k")),
    "a side of 10^400 px": (show_image("good.png", width=10**400, height=1), left_out(RECORD, "width must be")),
    "a side of a fraction": (show_image("good.png", width=1.5, height=1), left_out(RECORD, "width must be")),
    "a clip of 10^400 s": (talk("a", "b", video="a.mp4", clip=[0, 10**400]), left_out(RECORD, "clip must be")),
    "text with NUL and line separators": (talk("a\0b\u2028c\u2029d\x85e", "f\0g"), GOOD),
    "text from right to left": (talk("\u202eabc\u200f", "\U0001f600\u0301"), GOOD),
}

# Refused by its letters, so that nothing is looked up; $OUTSIDE is the folder with secrets.
NAMES = {
    "39 upward": "../secret/secret.png",
    "39 upward in the middle": "a/../../secret/secret.png",
    "40 absolute": "$OUTSIDE/secret.png",
    "42 file address": "file://$OUTSIDE/secret.png",
    "43 web address": "http://169.254.169.254/latest/meta-data",
    "44 chain": "simplecache::http://example.com/a.png",
    "44 archive in a bucket": "zip://a.png::s3://bucket/all.zip",
    "45 another bucket": "s3://other-bucket/a.png",
    "46 NUL": "a\0b.png",
    "46 line break": "a\nb.png",
    "46 line separator": "a\u2028b.png",
    "46 backslash": "..\\secret\\secret.png",
    "47 300 bytes": "a" * 296 + ".png",
    "47 5000 bytes": "a/" * 2500 + "a.png",
    "the root": ".",
}


def link_image(target: str, below: str = "") -> Write:
    """Link to a place; show the link itself, or what is below it."""

    def write(folder: Path, stem: str) -> Line:
        (folder / f"{stem}-link").symlink_to(target)
        return show_image(f"{stem}-link{below}")

    return write


def link_video(target: str, suffix: str) -> Write:
    def write(folder: Path, stem: str) -> Line:
        (folder / f"{stem}-link").symlink_to(target)
        return show_video(f"{stem}-link{suffix}")

    return write


def link_frames(folder: Path, stem: str) -> Line:
    (folder / stem).mkdir()
    for number in range(3):
        (folder / stem / f"{number}.png").symlink_to("../../secret/secret.png")
    return show_video(f"{stem}/")


def make_pipe(folder: Path, stem: str) -> Line:
    os.mkfifo(folder / f"{stem}.mp4")
    return show_video(f"{stem}.mp4")


def make_special(make: Callable[[Path], object]) -> Write:
    def write(folder: Path, stem: str) -> Line:
        make(folder / f"{stem}-special.png")
        return show_image(f"{stem}-special.png")

    return write


def name_otherwise(name: str, shown: str) -> Write:
    """Write a picture under a name, and show it under another."""

    def write(folder: Path, stem: str) -> Line:
        (folder / f"{stem}{name}").write_bytes(encode(noise(48, 32)))
        return show_image(f"{stem}{shown}")

    return write


OUTSIDE = left_out(Reason.PATH, "a link leads to .* outside the root")
MISSING = left_out(Reason.MISSING, "no such file")
IRREGULAR = left_out(Reason.MEDIA, "not a regular file")
COMPOSED, SPLIT = (unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD"))
PLACES: dict[str, tuple[Write, Outcome]] = {
    "41 link outside": (link_image("../secret/secret.png"), OUTSIDE),
    "41 link to a folder outside": (link_image("../secret", "/secret.png"), OUTSIDE),
    "41 link to the root of all": (link_image("/", "/etc/hostname"), OUTSIDE),
    "41 link within": (link_image("good.png"), GOOD),
    "41 link to a folder": (link_image("."), IRREGULAR),
    "46 percent": (name_otherwise("%2e%2e.png", "%2e%2e.png"), GOOD),
    "46 percent is not decoded": (name_otherwise("a b.png", "a%20b.png"), MISSING),
    "46 upward by percent": (lambda *_: show_image("%2e%2e/secret/secret.png"), MISSING),
    "46 space at the end": (name_otherwise("a.png", "a.png "), MISSING),
    "46 the other spelling of a letter": (name_otherwise(COMPOSED, SPLIT), MISSING),
    "46 other case": (name_otherwise("a.png", "A.PNG"), MISSING),
    "48 pipe": (make_special(os.mkfifo), IRREGULAR),
    "48 folder": (make_special(Path.mkdir), IRREGULAR),
    "48 device by a link": (make_special(lambda path: path.symlink_to("/dev/zero")), OUTSIDE),
    "below a file": (lambda *_: show_image("good.png/a.png"), left_out(Reason.MISSING, "Not a directory")),
    "home": (lambda *_: show_image("~/a.png"), MISSING),
    "a variable": (lambda *_: show_image("$HOME/a.png"), MISSING),
}
VIDEO_PLACES: dict[str, tuple[Write, Outcome]] = {
    "41 video by a link outside": (link_video("../secret/secret.mp4", ""), OUTSIDE),
    "41 frames by a link outside": (link_video("../secret", "/"), OUTSIDE),
    "41 frames that are links outside": (link_frames, OUTSIDE),
    "48 video is a pipe": (make_pipe, IRREGULAR),
}


def _iter_records() -> Iterator[BadRecord]:
    for name, (line, outcome) in LINES.items():
        yield BadRecord(name, _as_is(line), outcome)
    for name, shown in NAMES.items():
        yield BadRecord(name, _show(shown), left_out(Reason.PATH, r"path .*"))
    for cases in (PLACES, IMAGES, VIDEO_PLACES, VIDEOS):
        yield from (BadRecord(name, write, outcome) for name, (write, outcome) in cases.items())
    yield from _iter_sized({**PLACES, **IMAGES})


def _iter_sized(cases: Mapping[str, tuple[Write, Outcome]]) -> Iterator[BadRecord]:
    """Let the record say width and height: no file is looked at by the index, and the worker is the first to see it."""
    for name, (write, outcome) in cases.items():
        if outcome.kind == "left_out":
            assert outcome.reason is not None
            yield BadRecord(f"{name}, size given", _with_size(write), bad_sample(outcome.reason, outcome.text))


def _as_is(line: Line) -> Write:
    return lambda folder, stem: line


def _show(name: str) -> Write:
    return lambda folder, stem: show_image(name.replace("$OUTSIDE", str(folder.parent / SECRET)))


def _with_size(write: Write) -> Write:
    def write_sized(folder: Path, stem: str) -> Line:
        line = write(folder, stem)
        assert isinstance(line, dict)
        return {**line, "width": 48, "height": 32}

    return write_sized


RECORDS = list(_iter_records())
FILES = [*METAS, *ANNOTATIONS]
