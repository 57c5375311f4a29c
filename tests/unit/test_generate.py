import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chat_tokenizers import load_golden_with_chat_tokens
from data_sets import TOKENIZER, build_encoding
from PIL import Image
from tiny_internvl import TILE_SIZE, TOKENS_PER_TILE, build_tiny_model

from internvl_core.arguments import Arguments, parse_arguments
from internvl_core.data.conversation import IMAGE_CONTEXT
from internvl_core.data.pixels import PixelRules
from internvl_core.data.questions import Question, QuestionEncoder, load_questions
from internvl_core.data.text_encoder import TextEncoder
from internvl_core.data.tiling import Tiling
from internvl_core.errors import ArgumentError
from internvl_core.evaluate.generate import evaluate_held_out, iter_answers
from internvl_core.model.internvl import InternVLForTraining

TILING = Tiling(TILE_SIZE, 1, 4, True, True)
ENCODER = QuestionEncoder(
    replace(build_encoding(tiling=TILING), tokens_per_tile=TOKENS_PER_TILE), PixelRules("imagenet")
)


@pytest.fixture(scope="module")
def model() -> InternVLForTraining:
    context = TOKENIZER.convert_tokens_to_ids(IMAGE_CONTEXT)
    return build_tiny_model(vocab_size=len(TOKENIZER), image_token=context, seed=3).eval()


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> list[Question]:
    """Eight questions of different lengths, in turn with one image, none and two."""
    folder = tmp_path_factory.mktemp("held_out")
    records = []
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32 * (1 + number % 3), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        images = [f"{number}.png"] * (1, 0, 2)[number % 3]
        text = "<image>\n" * len(images) + "What is it? " * (1 + number // 3)
        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "A cat."}]
        records.append({"image": images or None, "conversations": turns})
    return load_questions(write_meta(folder, records), folder / "cache")


def write_meta(folder: Path, records: list[dict[str, Any]]) -> Path:
    (folder / "pets.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "meta.json").write_text(json.dumps({"pets": {"root": ".", "annotation": "pets.jsonl"}}))
    return folder / "meta.json"


def build_arguments(*, batch_size: int = 1, **values: Any) -> Arguments:
    given = {"conv_style": "internvl2_5", "per_device_eval_batch_size": batch_size, "eval_max_new_tokens": 6}
    return parse_arguments({**given, **values})


def answer(model: InternVLForTraining, questions: list[Question], *, batch_size: int) -> list[str]:
    return list(iter_answers(model, TOKENIZER, ENCODER, questions, build_arguments(batch_size=batch_size)))


@pytest.mark.parametrize("batch_size", [3, 8])
def test_answers_in_batches_are_those_given_one_by_one(
    model: InternVLForTraining, questions: list[Question], batch_size: int
) -> None:
    alone = answer(model, questions, batch_size=1)
    assert len(set(alone)) > 4
    assert answer(model, questions, batch_size=batch_size) == alone


def test_an_answer_depends_on_the_image(model: InternVLForTraining, questions: list[Question]) -> None:
    question = questions[0]
    content = replace(question.record.content, images=("3.png",))
    other = replace(question, record=replace(question.record, content=content))
    assert answer(model, [question], batch_size=1) != answer(model, [other], batch_size=1)


def test_the_models_own_way_of_generating_does_not_colour_the_answers(
    model: InternVLForTraining, questions: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answer(model, questions, batch_size=8)
    for name, value in {"repetition_penalty": 9.0, "num_beams": 3, "max_length": 5}.items():
        monkeypatch.setattr(model.generation_config, name, value)
    assert answer(model, questions, batch_size=8) == expected


def test_the_held_out_set_is_scored_by_exact_match(
    model: InternVLForTraining, questions: list[Question], tmp_path: Path
) -> None:
    text = "Say it."
    (plain,) = load_questions(write_meta(tmp_path, [ask(text, "?")]), tmp_path)
    (said,) = answer(model, [plain], batch_size=1)
    path = write_meta(tmp_path, [ask(text, said), ask(text, said + " and more"), ask(text, said)])
    evaluation = evaluate_held_out(
        model, TOKENIZER, ENCODER, build_arguments(batch_size=2, eval_meta_path=str(path), cache_dir=str(tmp_path))
    )
    assert evaluation.scores == {"accuracy": pytest.approx(2 / 3), "accuracy/pets": pytest.approx(2 / 3)}
    assert [(each.sample_id, each.expected, each.is_right) for each in evaluation.examples] == [
        ("pets:1", said, True),
        ("pets:2", said + " and more", False),
        ("pets:3", said, True),
    ]


def ask(text: str, expected: str) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": expected}]}


def test_without_a_held_out_set_there_is_no_score(model: InternVLForTraining) -> None:
    assert evaluate_held_out(model, TOKENIZER, ENCODER, build_arguments()).scores == {}


def test_an_answer_ends_where_the_chat_format_of_its_data_set_ends_it(tmp_path: Path) -> None:
    tokenizer = load_golden_with_chat_tokens()
    model = build_tiny_model(vocab_size=len(tokenizer), image_token=tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT))
    script = tokenizer.convert_tokens_to_ids(["A", "<|end|>", "B", "<|im_end|>", "C", "</s>", "D"])
    model.register_forward_hook(partial(say_next, script), with_kwargs=True)
    styles = {"own": {}, "phi": {"conv_style": "phi3-chat"}, "zh": {"conv_style": "internvl_zh"}}
    entry = {"root": ".", "annotation": "pets.jsonl"}
    path = write_meta(tmp_path, [ask("Say it.", "?")] * 2)
    path.write_text(json.dumps({name: {**entry, **style} for name, style in styles.items()}))
    encoding = replace(build_encoding(conv_style="Hermes-2"), encoder=TextEncoder.from_tokenizer(tokenizer))
    encoder = QuestionEncoder(encoding, PixelRules("imagenet"))
    for batch_size in (1, 8):
        arguments = build_arguments(batch_size=batch_size, eval_max_new_tokens=7)
        answers = iter_answers(model, tokenizer, encoder, load_questions(path, tmp_path), arguments)
        assert list(answers) == ["AB", "AB", "A", "A", "ABC", "ABC"]


def test_a_tokenizer_without_the_end_of_a_chat_format_is_refused(
    model: InternVLForTraining, questions: list[Question]
) -> None:
    encoder = QuestionEncoder(build_encoding(conv_style="phi3-chat"), PixelRules("imagenet"))
    with pytest.raises(ArgumentError, match=r"lacks .*<\|end\|>.*conv_style"):
        next(iter_answers(model, TOKENIZER, encoder, questions, build_arguments()))


def say_next(script: list[int], _model: Any, _args: Any, given: dict[str, Any], output: Any) -> None:
    """Make a model say a script token by token: what follows the last one in it, or its first."""
    for row, last in enumerate(given["input_ids"][:, -1].tolist()):
        said = script.index(last) + 1 if last in script[:-1] else 0
        output.logits[row, -1] = torch.nn.functional.one_hot(torch.tensor(script[said]), output.logits.shape[-1])
