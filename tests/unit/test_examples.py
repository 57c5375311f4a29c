"""Which held-out answers are kept for people to look at."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from internvl_core.contract import EXAMPLES_FILE
from internvl_core.data.questions import Question, load_questions
from internvl_core.evaluate.examples import (
    MAX_EXAMPLES,
    NUM_RIGHT,
    NUM_WRONG,
    Example,
    choose_examples,
    merge_examples,
    write_examples,
)


@pytest.fixture
def questions(tmp_path: Path) -> list[Question]:
    """Twenty questions of two data sets; those of the first show a wide image."""
    Image.new("RGB", (640, 320), "red").save(tmp_path / "red.png")
    meta = {}
    for name, image in (("red", "red.png"), ("text", None)):
        records = [make_record(f"{name} {number}?", image) for number in range(10)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        meta[name] = {"root": ".", "annotation": f"{name}.jsonl"}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    return load_questions(tmp_path / "meta.json", tmp_path / "cache")


def make_record(text: str, image: str | None) -> dict[str, Any]:
    asked = f"<image>\n{text}" if image else text
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": "yes"}]
    return {"conversations": turns, **({"image": image} if image else {})}


def make_example(number: int, *, dataset: str = "red", is_right: bool = False) -> Example:
    return Example(f"{dataset}:{number}", "?", "yes", "no", is_right)


def test_the_first_right_and_the_first_wrong_of_each_data_set_are_kept(questions: list[Question]) -> None:
    answers = ["yes" if number % 2 else "no" for number in range(len(questions))]
    chosen = choose_examples(questions, answers)
    assert [each.sample_id for each in chosen if each.is_right] == ["red:2", "red:4", "text:2", "text:4"]
    assert len([each for each in chosen if not each.is_right]) == 2 * NUM_WRONG
    assert chosen[0] == Example("red:1", "<image>\nred 0?", "yes", "no", False, chosen[0].picture)


def test_a_picture_is_small_and_a_question_without_one_has_none(questions: list[Question]) -> None:
    chosen = choose_examples(questions, ["yes"] * len(questions))
    pictures = [each.picture for each in chosen]
    assert pictures[NUM_RIGHT:] == [None] * NUM_RIGHT
    head, _, body = str(pictures[0]).partition(",")
    assert head == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(body))).size == (160, 80)


def test_an_image_that_is_gone_costs_its_picture_only(questions: list[Question]) -> None:
    (Path(questions[0].meta.root) / "red.png").unlink()
    assert choose_examples(questions[:1], ["yes"]) == [Example("red:1", "<image>\nred 0?", "yes", "yes", True)]


def test_ranks_together_keep_what_one_would_have_kept() -> None:
    # Each rank has every third question, and chose among those.
    shares = [[make_example(rank + 1 + 3 * place) for place in range(NUM_WRONG)] for rank in range(3)]
    assert [each.sample_id for each in merge_examples(shares)] == [f"red:{1 + place}" for place in range(NUM_WRONG)]


def test_many_data_sets_do_not_make_a_long_list() -> None:
    share = [make_example(number, dataset=f"set{number:03}") for number in range(200)]
    assert len(merge_examples([share])) == MAX_EXAMPLES


def test_they_are_written_beside_the_result_and_none_makes_no_file(tmp_path: Path) -> None:
    write_examples(tmp_path, [])
    assert not (tmp_path / EXAMPLES_FILE).exists()
    write_examples(tmp_path, [make_example(1)])
    assert json.loads((tmp_path / EXAMPLES_FILE).read_text())["examples"][0]["sample_id"] == "red:1"
    write_examples(tmp_path / "gone", [make_example(1)])
