"""Bad meta files, and annotations that are bad as a whole."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bad_cases import ANNOTATION, GOOD, GOOD_LINE, MEDIA, META, BadFiles, join, left_out, meta_error

from internvl_core.errors import Reason

ENTRY = {"root": MEDIA, "annotation": ANNOTATION}
Change = Callable[[Path], object]


def write_entry(**changes: Any) -> Change:
    return lambda folder: (folder / META).write_text(json.dumps({"pets": {**ENTRY, **changes}}))


def write_text(text: str | bytes) -> Change:
    return lambda folder: (folder / META).write_bytes(text if isinstance(text, bytes) else text.encode())


def replace_meta(make: Change) -> Change:
    def change(folder: Path) -> None:
        (folder / META).unlink()
        make(folder / META)

    return change


def write_huge_meta(folder: Path) -> None:
    with (folder / META).open("r+b") as file:
        file.truncate(40_000_000)


def make_folder_of_annotation(folder: Path) -> None:
    (folder / "folder.jsonl").mkdir()
    write_entry(annotation="folder.jsonl")(folder)


def name_annotation_from_the_root(folder: Path) -> None:
    write_entry(annotation=str(folder / ANNOTATION))(folder)


PETS = json.dumps(ENTRY)
METAS = [
    BadFiles("1 empty meta", write_text(""), meta_error(r"meta\.json:1:1: not JSON")),
    BadFiles("2 meta with a byte order mark", write_text(f'\ufeff{{"pets": {PETS}}}'), GOOD),
    BadFiles("3 trailing comma", write_text(f'{{"pets": {PETS},\n}}'), meta_error(r"meta\.json:[12]:\d+: not JSON")),
    BadFiles("4 one name twice", write_text(f'{{"pets": {PETS}, "pets": {PETS}}}'), meta_error("'pets' occurs twice")),
    *(
        BadFiles(f"5 repeat_time {value!r:.12}", write_entry(repeat_time=value), meta_error("repeat_time|not JSON"))
        for value in (-1, 0, float("nan"), "2", 1e9, 10**400)
    ),
    BadFiles("6 no such root", write_entry(root="nowhere"), meta_error("nowhere is not a directory")),
    BadFiles("7 the annotation is a folder", make_folder_of_annotation, meta_error(r"folder\.jsonl is not a file")),
    # Whoever writes a meta file may read what it names; records may not.
    BadFiles("8 annotation by its full path", name_annotation_from_the_root, GOOD),
    BadFiles("9 unknown key", write_entry(repat_time=2), meta_error("'repat_time'. Did you mean 'repeat_time'")),
    BadFiles("10 other length", write_entry(length=3), meta_error("length is 3, but .* has 2 records")),
    BadFiles("11 NUL in a name", write_text(json.dumps({"pe\0ts": ENTRY})), meta_error("must be printable")),
    BadFiles("11 NUL in a root", write_entry(root="a\0b"), meta_error("control character")),
    BadFiles("11 line break in a path", write_entry(annotation="a\n.jsonl"), meta_error("control character")),
    BadFiles("12 40 MB", write_huge_meta, meta_error("larger than 16 MiB")),
    BadFiles("12 100,000 deep", write_text("[" * 100_000), meta_error("nested too deeply")),
    BadFiles("meta in UTF-16", write_text(json.dumps({"pets": ENTRY}).encode("utf-16")), meta_error("UTF-8")),
    BadFiles("meta is a pipe", replace_meta(os.mkfifo), meta_error("not a regular file")),
    BadFiles(
        "meta is a device", replace_meta(lambda path: path.symlink_to("/dev/zero")), meta_error("not a regular file")
    ),
    BadFiles("weight near zero", write_entry(weight=1e-9), meta_error("weight")),
    BadFiles("forged prompt", write_entry(system_prompt="<|im_end|>"), meta_error("'pets': system_prompt: spells")),
    BadFiles("prompt no text", write_entry(system_prompt="\ud800"), meta_error("'pets': system_prompt: half")),
    BadFiles("annotation of 5000 letters", write_entry(annotation="a/" * 2500 + ".jsonl"), meta_error("4096")),
]


# --- annotations as a whole


def write_annotation(content: bytes) -> Change:
    return lambda folder: (folder / ANNOTATION).write_bytes(content)


def write_huge_line(folder: Path) -> None:
    with (folder / ANNOTATION).open("r+b") as file:
        file.seek(100 << 20)
        file.write(b"\n")


ANNOTATIONS = [
    BadFiles("13 empty", write_annotation(b""), meta_error(r"pets\.jsonl: holds no record")),
    BadFiles("14 blank lines", write_annotation(b"\n \n\t\n"), meta_error(r"pets\.jsonl: holds no record")),
    BadFiles("15 CRLF", write_annotation(join([GOOD_LINE + b"\r"] * 2)), GOOD),
    BadFiles("15 byte order mark", write_annotation(b"\xef\xbb\xbf" + join([GOOD_LINE] * 2)), GOOD),
    BadFiles("no line end at the end", write_annotation(join([GOOD_LINE] * 2)[:-1]), GOOD),
    BadFiles(
        "16 UTF-16 as a whole",
        write_annotation(join([GOOD_LINE] * 2).decode().encode("utf-16")),
        meta_error("none of 3 records can be trained on"),
    ),
    BadFiles(
        "18 cut in the last line",
        write_annotation(join([GOOD_LINE] * 3)[:-9]),
        left_out(Reason.NOT_JSON, "the file may have been cut off"),
        line=3,
    ),
    BadFiles("21 100 MB in one line", write_huge_line, left_out(Reason.LINE_TOO_LONG, "at most"), line=3),
    BadFiles("CR alone", write_annotation((GOOD_LINE + b"\r") * 2), meta_error("none of 1 records can be trained on")),
]
