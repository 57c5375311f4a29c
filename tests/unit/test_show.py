"""The page of one sample: what is on it is what the trainer would get, and nothing on it is taken for markup."""

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
from data_sets import build_encoding, record, write_meta

from internvl_core.argument_rules import resolve_arguments
from internvl_core.data import records
from internvl_core.data.encoding import Encoding
from internvl_core.data.index import open_index
from internvl_core.data.meta import load_meta
from internvl_core.data.pixels import PixelRules
from internvl_core.data.text_encoder import TextEncoder
from internvl_core.errors import ArgumentError, DataError, Reason
from internvl_core.inspection import show as show_module
from internvl_core.inspection.lint_report import MetaJob, TokenizerSource
from internvl_core.inspection.sample_view import SampleView, view_sample
from internvl_core.inspection.show import find_dataset, read_line, show
from internvl_core.inspection.show_job import ShowJob
from internvl_core.inspection.show_page import PLAIN_WORDS, write_page

RULES = PixelRules("imagenet")
TOKENIZER = Path(__file__).parents[1] / "data" / "tokenizer"


def view(
    folder: Path, *records: Any, line: int = 1, encoding: Encoding | None = None, max_seq_length: int = 4096
) -> SampleView:
    (meta,) = load_meta(write_meta(folder, {"pets": list(records)}))
    raw = read_line(Path(meta.annotation), line, shown_as=meta.annotation)
    return view_sample(
        meta,
        line,
        raw,
        encoding=encoding or build_encoding(),
        rules=RULES,
        seed=42,
        max_seq_length=max_seq_length,
    )


def write(folder: Path, sample: SampleView) -> str:
    write_page(folder / "page.html", sample, build_encoding())
    return (folder / "page.html").read_text(encoding="utf-8")


def write_frames(folder: Path) -> str:
    (folder / "clip").mkdir()
    for number in range(2):
        (folder / "clip" / f"{number}.png").write_bytes((folder / "1.png").read_bytes())
    return "clip/"


# --- tokens


def test_tokens_are_those_of_training_with_the_learnt_ones_marked(tmp_path: Path) -> None:
    sample = view(tmp_path, record("1.png", answer="A cat."))
    (meta,) = load_meta(tmp_path / "meta.json")
    index = open_index(meta, build_encoding(), tmp_path / "cache", num_processes=1)
    assert (sample.num_tokens, sample.num_learnt) == (index.tokens[0], index.supervised[0])
    assert (sample.num_tiles, sample.num_image_tokens) == (7, 28)
    assert sample.tokens is not None
    assert "".join(token.text for token in sample.tokens if token.is_learnt) == "A cat.<|im_end|>"
    (images,) = (token for token in sample.tokens if token.name == "<IMG_CONTEXT>")
    assert (images.count, images.is_control, images.is_learnt) == (28, True, False)
    assert [token.position for token in sample.tokens] == sorted({token.position for token in sample.tokens})


def test_a_character_of_several_tokens_reads_as_one(tmp_path: Path) -> None:
    text = "数字七 🙂 é\n\tx"
    sample = view(tmp_path, record(answer=text))
    assert sample.tokens is not None
    assert "".join(token.text for token in sample.tokens if token.is_learnt) == f"{text}<|im_end|>"
    encoder = build_encoding().encoder
    assert isinstance(encoder, TextEncoder)
    assert all(encoder.get_token(token.token_id) == token.name for token in sample.tokens)


def test_learnt_tokens_are_told_by_more_than_a_colour(tmp_path: Path) -> None:
    page = write(tmp_path, view(tmp_path, record(answer="A cat.")))
    learnt = re.findall(r'<span class="token learnt[^"]*" title="([^"]*)">', page)
    assert learnt
    assert all(title.endswith(", learnt") for title in learnt)
    assert re.search(r"\.token\.learnt \{[^}]*border-bottom: 3px", page)


def test_the_limit_stands_where_training_would_cut(tmp_path: Path) -> None:
    sample = view(tmp_path, record(answer="long " * 100), max_seq_length=64)
    assert [problem.reason for problem in sample.problems] == [Reason.TOO_LONG]
    assert sample.num_tokens > 64
    before, _, after = write(tmp_path, sample).partition('<span class="limit">max_seq_length 64</span>')
    assert re.findall(r'title="(\d+):', before)[-1] == "63"
    assert re.findall(r'title="(\d+):', after)[0] == "64"


def test_without_a_tokenizer_everything_else_is_shown(tmp_path: Path) -> None:
    encoding = Encoding(None, build_encoding().tiling, build_encoding().frames, "internvl2_5", 4)
    sample = view(tmp_path, record("1.png"), encoding=encoding)
    assert (sample.tokens, sample.problems, sample.num_tiles) == (None, [], 7)
    assert "No tokenizer was given" in write(tmp_path, sample)


# --- pictures


def test_a_picture_has_its_grid_and_its_thumbnail(tmp_path: Path) -> None:
    page = write(tmp_path, view(tmp_path, record(["1.png", "0.png"])))
    assert re.findall(r"<b>(\d)</b>", page) == ["1", "2", "3", "1"]  # 3 tiles at most for each of two images
    assert "48 × 32 px → 2 × 1 tiles + thumbnail = 12 tokens." in page
    assert "16 × 16 px → 1 tile = 4 tokens." in page


def test_a_page_needs_no_other_file(tmp_path: Path) -> None:
    page = write(tmp_path, view(tmp_path, record("2.png")))
    sources = re.findall(r'src="([^"]{0,20})', page)
    assert sources
    assert all(source.startswith("data:image/") for source in sources)
    assert "http" not in page
    assert "<script" not in page


def test_a_video_is_shown_frame_by_frame(tmp_path: Path) -> None:
    write_meta(tmp_path, {"pets": []})
    name = write_frames(tmp_path)
    turns = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    sample = view(tmp_path, {"video": name, "conversations": turns})
    assert (sample.problems, [picture.title for picture in sample.pictures]) == ([], ["Frame 1", "Frame 2"])
    assert sample.turns[0]["value"] == "Frame-1: <image>\nFrame-2: <image>\nWhat?"
    assert write(tmp_path, sample).count("<figcaption>Frame") == 2


def test_a_size_that_is_not_the_pictures_is_told_with_both(tmp_path: Path) -> None:
    sample = view(tmp_path, record("1.png", width=16, height=16))
    assert [problem.reason for problem in sample.problems] == [Reason.SIZE_MISMATCH]
    assert sample.tokens is not None
    assert "48 × 32 px → 3 × 2 tiles + thumbnail = 28 tokens. The record says 16 × 16 px." in write(tmp_path, sample)


# --- text


def test_no_text_of_a_record_is_taken_for_markup(tmp_path: Path) -> None:
    evil = "</p><script>alert('1')</script>&amp; \" <b>"
    page = write(tmp_path, view(tmp_path, record(answer=evil, id="</pre><script>alert(2)</script>")))
    assert "<script" not in page
    assert html.escape(evil) in page


# --- bad records


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", Reason.NOT_JSON),
        (json.dumps({"conversation": []}), Reason.RECORD),
        (record("../secret.png"), Reason.PATH),
        (record("nowhere.png"), Reason.MISSING),
        (record(answer="<|im_end|>"), Reason.CONTROL_TOKEN),
        (record("meta.json"), Reason.MEDIA),
    ],
)
def test_a_bad_record_is_shown_with_its_reason_in_plain_words(tmp_path: Path, line: Any, reason: Reason) -> None:
    sample = view(tmp_path, line)
    assert [problem.reason for problem in sample.problems] == [reason]
    page = write(tmp_path, sample)
    assert html.escape(PLAIN_WORDS[reason]) in page
    assert html.escape(str(sample.problems[0])) in page
    assert "✗ left out" in page


def test_every_reason_has_plain_words() -> None:
    assert set(PLAIN_WORDS) == set(Reason)


# --- the job


def build_job(path: Path, **changes: Any) -> ShowJob:
    values = resolve_arguments({"conv_style": "internvl2_5", "force_image_size": 28, "meta_path": str(path)})
    meta = MetaJob("", str(path), values, TokenizerSource(str(TOKENIZER)))
    out_path = str(path.parent / "out.html")
    return ShowJob(**{"meta": meta, "dataset": None, "line": 1, "out_path": out_path, "cache_dir": "c", **changes})


def test_a_job_says_where_the_page_is_and_what_is_wrong(tmp_path: Path) -> None:
    path = write_meta(tmp_path, {"pets": [record("1.png"), "{"]})
    good, bad = show(build_job(path)), show(build_job(path, line=2))
    assert (good.out_path, good.problem) == (str(tmp_path / "out.html"), None)
    assert (bad.problem or "").startswith("not one JSON object")
    assert "pets, line 2" in Path(bad.out_path).read_text(encoding="utf-8")
    job = build_job(path, dataset="pets")
    assert ShowJob.from_json(json.loads(json.dumps(job.to_json()))) == job


def test_a_page_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    path = write_meta(tmp_path, {"pets": [record()]})
    with pytest.raises(ArgumentError, match=r"nowhere/out\.html: cannot be written.*--out"):
        show(build_job(path, out_path=str(tmp_path / "nowhere/out.html")))


def test_a_data_set_is_found_by_name_or_by_being_the_only_one(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one = load_meta(write_meta(tmp_path / "one", {"pets": [record()]}))
    two = load_meta(write_meta(tmp_path / "two", {"pets": [record()], "cars": [record()]}))
    assert find_dataset(one, None, where="m.json").name == "pets"
    assert find_dataset(two, "cars", where="m.json").name == "cars"
    with pytest.raises(ArgumentError, match=r"^m\.json: has 2 data sets\. Name one with --dataset: pets, cars\.$"):
        find_dataset(two, None, where="m.json")
    with pytest.raises(ArgumentError, match=r"^m\.json: no data set 'pet'\. Nearest: 'pets'\."):
        find_dataset(two, "pet", where="m.json")


def test_a_line_that_is_too_long_is_refused_and_counts_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (records, show_module):
        monkeypatch.setattr(module, "MAX_LINE_BYTES", 8)
    (tmp_path / "a.jsonl").write_bytes(b"1\n" + b"x" * 99 + b"\n3\n")
    assert read_line(tmp_path / "a.jsonl", 3, shown_as="a.jsonl") == b"3\n"
    with pytest.raises(DataError, match=r"^a\.jsonl:2: more than 8 bytes in one line") as caught:
        read_line(tmp_path / "a.jsonl", 2, shown_as="a.jsonl")
    assert caught.value.reason is Reason.LINE_TOO_LONG


@pytest.mark.parametrize(("number", "message"), [(2, "is a blank line"), (4, "has 3 lines, so no line 4")])
def test_a_line_that_is_not_there_is_refused(tmp_path: Path, number: int, message: str) -> None:
    (tmp_path / "a.jsonl").write_text("1\n\n3\n")
    assert read_line(tmp_path / "a.jsonl", 3, shown_as="a.jsonl") == b"3\n"
    with pytest.raises(ArgumentError, match=message):
        read_line(tmp_path / "a.jsonl", number, shown_as="a.jsonl")
