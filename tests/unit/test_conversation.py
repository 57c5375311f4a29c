import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from internvl_core.data.conversation import (
    DEFAULT_SYSTEM_MESSAGE,
    IGNORE_INDEX,
    IMAGE_CONTEXT,
    encode_conversation,
    encode_prompt,
)
from internvl_core.data.records import Turn
from internvl_core.errors import ArgumentError, DataError

DATA = Path(__file__).parents[1] / "data"
GOLDEN = json.loads((DATA / "chat.json").read_text())
TOKENIZER = AutoTokenizer.from_pretrained(DATA / "tokenizer")

QUESTION = [Turn("human", "<image>\nWhat is it?")]
ANSWERED = [*QUESTION, Turn("gpt", "A cat.")]


def encode(turns: list[Turn], tokenizer: PreTrainedTokenizerBase = TOKENIZER, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "conv_style": "internvl2_5",
        "image_token_counts": [4],
        "max_seq_length": 2048,
        **changes,
    }
    return encode_conversation(turns, tokenizer, **settings)


@pytest.mark.parametrize("case", GOLDEN, ids=range(len(GOLDEN)))
def test_ids_and_labels_are_those_of_the_original(case: dict[str, Any]) -> None:
    encoded = encode_conversation(
        [Turn(turn["from"], turn["value"]) for turn in case["conversations"]],
        TOKENIZER,
        conv_style=case["conv_style"],
        image_token_counts=[tiles * case["tokens_per_tile"] for tiles in case["tiles"]],
        max_seq_length=case["max_seq_length"],
    )
    assert encoded.input_ids == case["input_ids"]
    assert encoded.labels == case["labels"]


def test_a_cut_conversation_says_how_long_it_was() -> None:
    full = encode(ANSWERED)
    cut = encode(ANSWERED, max_seq_length=20)
    assert cut.input_ids == full.input_ids[:20]
    assert cut.full_length == full.full_length == len(full.input_ids)


def test_only_the_answer_and_its_end_are_learnt() -> None:
    encoded = encode(ANSWERED)
    assert TOKENIZER.decode([label for label in encoded.labels if label != IGNORE_INDEX]) == "A cat.<|im_end|>"


def test_without_a_system_turn_the_templates_own_message_is_said() -> None:
    said = TOKENIZER.decode(encode(ANSWERED).input_ids)
    assert said.startswith(f"<|im_start|>system\n{DEFAULT_SYSTEM_MESSAGE}<|im_end|>\n")
    silent = TOKENIZER.decode(encode([Turn("system", ""), *ANSWERED]).input_ids)
    assert silent.startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user\n")


@given(answer=st.text(max_size=20), counts=st.lists(st.integers(1, 8), max_size=3))
def test_a_prompt_is_how_the_conversation_begins(answer: str, counts: list[int]) -> None:
    turns = [Turn("human", "<image>" * len(counts) + "Why?")]
    prompt = encode_prompt(turns, TOKENIZER, conv_style="internvl2_5", image_token_counts=counts)
    encoded = encode([*turns, Turn("gpt", answer)], image_token_counts=counts)
    assert encoded.input_ids[: len(prompt)] == prompt
    assert prompt.count(TOKENIZER.convert_tokens_to_ids(IMAGE_CONTEXT)) == sum(counts)
    assert set(encoded.labels[: len(prompt)]) == {IGNORE_INDEX}


def test_a_tokenizer_with_a_bos_says_it_once_at_the_beginning() -> None:
    with_bos = AutoTokenizer.from_pretrained(DATA / "tokenizer", bos_token="<|endoftext|>")
    with_bos.add_bos_token = True
    plain, opened = encode(ANSWERED), encode(ANSWERED, with_bos)
    assert opened.input_ids == [with_bos.bos_token_id, *plain.input_ids]
    assert opened.labels == [IGNORE_INDEX, *plain.labels]


def test_tags_without_images_are_refused() -> None:
    with pytest.raises(DataError, match="1 <image> tags but 2 images"):
        encode(ANSWERED, image_token_counts=[4, 4])


def test_a_template_that_is_not_built_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"'phi3-chat' is not built yet\. Available: internvl2_5"):
        encode(ANSWERED, conv_style="phi3-chat")
