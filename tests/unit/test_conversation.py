import json
from pathlib import Path
from typing import Any

import pytest
from chat_tokenizers import load_golden, load_golden_with_chat_tokens, train_sentence_piece
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from internvl_core.data.conversation import (
    CONV_STYLES,
    IGNORE_INDEX,
    IMAGE_CONTEXT,
    ConversationLength,
    EncodedConversation,
    check_conv_style,
    encode_conversation,
    encode_prompt,
    measure_conversations,
    render_frames,
)
from internvl_core.data.records import Turn
from internvl_core.data.templates import GROUNDING_TAGS, get_template
from internvl_core.data.text_encoder import TextEncoder
from internvl_core.errors import ArgumentError, DataError, Reason

DATA = Path(__file__).parents[1] / "data"
GOLDEN = json.loads((DATA / "chat.json").read_text())
TOKENIZERS = {
    "bytes": load_golden_with_chat_tokens(),
    "sentence_piece": train_sentence_piece(),
}
ENCODERS = {name: TextEncoder.from_tokenizer(tokenizer) for name, tokenizer in TOKENIZERS.items()}

FIRST_MESSAGE = get_template("Hermes-2").default_system_message
SECOND_MESSAGE = get_template("internvl2_5").default_system_message

Conversation = list[Turn]


def ask(question: str, answer: str, *, system: str | None = None) -> Conversation:
    opening: Conversation = [] if system is None else [{"from": "system", "value": system}]
    return [*opening, {"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def encode(conversation: Any, **changes: Any) -> EncodedConversation:
    settings: dict[str, Any] = {
        "tokenizer": ENCODERS["bytes"],
        "conv_style": "internvl2_5",
        "image_token_counts": [],
        "max_seq_length": 2048,
        **changes,
    }
    return encode_conversation(conversation, **settings)


def list_learnt(encoded: EncodedConversation) -> list[int]:
    return [label for label in encoded.labels if label != IGNORE_INDEX]


def encode_as_the_original_means_to(
    text: str, answers: list[str], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Tokenize a whole prompt at once; learn what begins inside an answer and its end, found by their text."""
    encoded = tokenizer(text, return_offsets_mapping=True)
    labels = [IGNORE_INDEX] * len(encoded["input_ids"])
    begin = 0
    for answer in answers:
        begin = text.index(answer, begin)
        for position, (start, end) in enumerate(encoded["offset_mapping"]):
            if begin <= start < begin + len(answer) and start < end:
                labels[position] = encoded["input_ids"][position]
        begin += len(answer)
    return encoded["input_ids"], labels


# Told apart from everything around them, so that an answer's text occurs once.
WORDS = st.lists(
    st.sampled_from(["the", "red", "Circle", "square.", "圆", "é", "7", "<box>[[1]]</box>", "\n"]), max_size=6
)


@st.composite
def conversations(draw: st.DrawFn) -> tuple[Conversation, list[int]]:
    """Draw a conversation and the image tokens of each of its tags."""
    turns: Conversation = []
    if draw(st.booleans()):
        turns.append({"from": "system", "value": " ".join(draw(WORDS))})
    counts: list[int] = []
    for _ in range(draw(st.integers(1, 3))):
        images = draw(st.lists(st.integers(1, 6), max_size=2))
        question = draw(st.permutations([*draw(WORDS), *["<image>"] * len(images)]))
        counts += images
        turns.append({"from": "human", "value": draw(st.sampled_from(["", " "])).join(question)})
        turns.append({"from": "gpt", "value": " ".join(draw(WORDS))})
    return turns, counts


@pytest.mark.parametrize("case", GOLDEN, ids=range(len(GOLDEN)))
def test_ids_and_labels_are_those_of_the_original(case: dict[str, Any]) -> None:
    encoded = encode_conversation(
        case["conversations"],
        AutoTokenizer.from_pretrained(DATA / "tokenizer"),
        conv_style=case["conv_style"],
        image_token_counts=[tiles * case["tokens_per_tile"] for tiles in case["tiles"]],
        max_seq_length=case["max_seq_length"],
    )
    assert encoded.input_ids == case["input_ids"]
    assert encoded.labels == case["labels"]


PROMPTS = {
    "Hermes-2": (
        f"<|im_start|>system\n{FIRST_MESSAGE}<|im_end|><|im_start|>user\n <img><IMG_CONTEXT></img>\nWhy? <|im_end|>"
        "<|im_start|>assistant\nRed. <|im_end|><|im_start|>user\nAnd\n<|im_end|><|im_start|>assistant\n Blue<|im_end|>",
        ["Red. <|im_end|>", " Blue<|im_end|>"],
    ),
    "internlm2-chat": (
        f"<|im_start|>system\n{FIRST_MESSAGE}<|im_end|><|im_start|>user\n<img><IMG_CONTEXT></img>\nWhy?<|im_end|>"
        "<|im_start|>assistant\nRed.<|im_end|><|im_start|>user\nAnd<|im_end|><|im_start|>assistant\nBlue<|im_end|>",
        ["Red.<|im_end|>", "Blue<|im_end|>"],
    ),
    "phi3-chat": (
        f"<|system|>\n{FIRST_MESSAGE}<|end|><|user|>\n <img><IMG_CONTEXT></img>\nWhy? <|end|>"
        "<|assistant|>\nRed. <|end|><|user|>\nAnd\n<|end|><|assistant|>\n Blue<|end|>",
        ["Red. <|end|>", " Blue<|end|>"],
    ),
    "internvl_zh": (
        " <human>:  <img><IMG_CONTEXT></img>\nWhy?  <bot>: Red. </s><human>: And\n <bot>:  Blue</s>",
        # The space before the first word is the word's own.
        [" Red. </s>", "  Blue</s>"],
    ),
}


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("style", PROMPTS)
def test_the_older_styles_give_the_ids_of_the_whole_prompt(style: str, tokenizer: str) -> None:
    text, answers = PROMPTS[style]
    turns = [*ask(" <image>\nWhy? ", "Red. "), *ask("And\n", " Blue")]
    encoded = encode(turns, conv_style=style, tokenizer=TOKENIZERS[tokenizer], image_token_counts=[1])
    input_ids, labels = encode_as_the_original_means_to(text, answers, TOKENIZERS[tokenizer])
    assert encoded.input_ids == input_ids
    assert encoded.labels == labels


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("style", PROMPTS)
@given(drawn=conversations())
def test_turns_tokenized_one_by_one_are_the_prompt_tokenized_at_once(
    style: str, tokenizer: str, drawn: tuple[Conversation, list[int]]
) -> None:
    turns, counts = drawn
    template = get_template(style)
    if turns[0]["from"] != "system":
        turns = [{"from": "system", "value": template.default_system_message}, *turns]
    texts = [turn["value"].strip() if style == "internlm2-chat" else turn["value"] for turn in turns]
    rendered = [template.render(turn["from"], text) for turn, text in zip(turns, texts, strict=True)]
    prompt = "".join(rendered).replace("<image>", "<img><IMG_CONTEXT></img>")
    encoded = encode(turns, conv_style=style, tokenizer=TOKENIZERS[tokenizer], image_token_counts=[1] * len(counts))
    assert encoded.input_ids == TOKENIZERS[tokenizer](prompt)["input_ids"]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("style", CONV_STYLES)
@given(drawn=conversations())
def test_what_is_measured_is_what_is_encoded(style: str, tokenizer: str, drawn: tuple[Conversation, list[int]]) -> None:
    turns, counts = drawn
    encoder = ENCODERS[tokenizer]
    encoded = encode(turns, conv_style=style, tokenizer=encoder, image_token_counts=counts)
    context = encoder.get_id(IMAGE_CONTEXT)
    assert encoded.input_ids.count(context) == sum(counts)
    assert len(encoded.labels) == len(encoded.input_ids) == encoded.full_length
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(encoded.input_ids, encoded.labels, strict=True))
    num_answers = sum(turn["from"] == "gpt" for turn in turns)
    ends = {encoder.get_id(end) for end in ("<|im_end|>", "<|end|>", "</s>")}
    assert sum(label in ends for label in encoded.labels) == num_answers
    assert measure_conversations([turns], encoder, conv_style=style) == [
        ConversationLength(encoded.full_length - sum(counts), len(list_learnt(encoded)))
    ]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("style", CONV_STYLES)
@given(drawn=conversations())
def test_a_prompt_is_how_the_conversation_begins(
    style: str, tokenizer: str, drawn: tuple[Conversation, list[int]]
) -> None:
    turns, counts = drawn
    # White space may run together with the header's.
    assume(not turns[-1]["value"][:1].isspace())
    settings: Any = {"conv_style": style, "image_token_counts": counts}
    prompt = encode_prompt(turns[:-1], ENCODERS[tokenizer], **settings)
    encoded = encode(turns, tokenizer=ENCODERS[tokenizer], **settings)
    assert encoded.input_ids[: len(prompt)] == prompt
    rest = encoded.labels[len(prompt) :]
    assert IGNORE_INDEX not in rest[: -1 if style == "internvl2_5" else None]


@given(
    text=st.text(max_size=40) | st.lists(st.sampled_from(["<", "|", ">", "im", "_end", "/", "img", "s"])).map("".join)
)
@pytest.mark.parametrize("style", CONV_STYLES)
def test_text_never_makes_a_token_that_is_not_text(style: str, text: str) -> None:
    assume("<image>" not in text)
    encoder = ENCODERS["bytes"]
    spelt = encoder.find_control_token(text)
    if spelt is not None:
        with pytest.raises(DataError, match="a control token"):
            encode(ask(text, text), conv_style=style)
        return
    added = TOKENIZERS["bytes"].backend_tokenizer.get_added_tokens_decoder().keys()
    reserved = added - {encoder.get_id(tag) for tag in GROUNDING_TAGS}
    plain, drawn = (encode(ask(value, value), conv_style=style).input_ids for value in ("x", text))
    assert [token for token in drawn if token in reserved] == [token for token in plain if token in reserved]


def test_a_cut_conversation_says_how_long_it_was() -> None:
    turns = ask("<image>\nWhat is it?", "A cat.")
    full = encode(turns, image_token_counts=[4])
    cut = encode(turns, image_token_counts=[4], max_seq_length=20)
    assert (cut.input_ids, cut.labels) == (full.input_ids[:20], full.labels[:20])
    assert cut.full_length == full.full_length == len(full.input_ids)


@pytest.mark.parametrize(
    ("style", "learnt"),
    [
        ("internvl2_5", " A cat. <|im_end|>"),
        ("Hermes-2", " A cat. <|im_end|>"),
        ("internlm2-chat", "A cat.<|im_end|>"),
        ("phi3-chat", " A cat. <|end|>"),
        ("internvl_zh", "  A cat. </s>"),
    ],
)
def test_only_the_answer_and_its_end_are_learnt(style: str, learnt: str) -> None:
    encoded = encode(ask("What?", " A cat. "), conv_style=style)
    assert TOKENIZERS["bytes"].decode(list_learnt(encoded)) == learnt


@pytest.mark.parametrize(
    ("style", "said"),
    [
        ("internvl2_5", "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n"),
        ("Hermes-2", "<|im_start|>system\n{}<|im_end|><|im_start|>user\n"),
        ("internlm2-chat", "<|im_start|>system\n{}<|im_end|><|im_start|>user\n"),
        ("phi3-chat", "<|system|>\n{}<|end|><|user|>\n"),
        ("internvl_zh", "{} <human>: "),
    ],
)
def test_the_system_turn_is_the_records_own_or_the_stages_or_the_templates(style: str, said: str) -> None:
    def begin(turns: Conversation, **changes: Any) -> str:
        return str(TOKENIZERS["bytes"].decode(encode(turns, conv_style=style, **changes).input_ids))

    default = {"internvl2_5": SECOND_MESSAGE, "internvl_zh": ""}.get(style, FIRST_MESSAGE)
    assert begin(ask("What?", "A cat.")).startswith(said.format(default) + "What?")
    assert begin(ask("What?", "A cat."), system_prompt="Be brief.").startswith(said.format("Be brief.") + "What?")
    assert begin(ask("What?", "A cat."), system_prompt="").startswith(said.format("") + "What?")
    own = ask("What?", "A cat.", system="Rhyme.")
    assert begin(own, system_prompt="Be brief.").startswith(said.format("Rhyme.") + "What?")


def test_internlm2_strips_the_system_prompt_too() -> None:
    turns = ask("What?", "A cat.")
    stripped, spaced = (encode(turns, conv_style="internlm2-chat", system_prompt=text) for text in ("Hi.", " Hi.\n"))
    assert stripped == spaced


def test_a_tokenizer_with_a_bos_says_it_once_at_the_beginning() -> None:
    with_bos = load_golden(bos_token="<|endoftext|>")
    with_bos.add_bos_token = True
    turns = ask("What?", "A cat.")
    plain, opened = encode(turns), encode(turns, tokenizer=with_bos)
    assert opened.input_ids == [with_bos.bos_token_id, *plain.input_ids]
    assert opened.labels == [IGNORE_INDEX, *plain.labels]


@pytest.mark.parametrize("style", CONV_STYLES)
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_thousands_of_image_tokens_are_those_of_the_text_that_spells_them(style: str, tokenizer: str) -> None:
    turns = ask("A: <image>\nB: <image>", "Both.")
    spelt = encode(turns, conv_style=style, tokenizer=TOKENIZERS[tokenizer], image_token_counts=[1, 1])
    many = encode(turns, conv_style=style, tokenizer=TOKENIZERS[tokenizer], image_token_counts=[3328, 256])
    assert len(many.input_ids) == 2048
    assert many.full_length == spelt.full_length + 3327 + 255


@pytest.mark.parametrize("style", CONV_STYLES)
def test_a_bad_conversation_does_not_spoil_the_measure_of_the_others(style: str) -> None:
    good = ask("What?", "A cat.")
    first, bad, last = measure_conversations([good, ask("What?", "<img>"), good], ENCODERS["bytes"], conv_style=style)
    assert first == last == measure_conversations([good], ENCODERS["bytes"], conv_style=style)[0]
    assert isinstance(bad, DataError)
    assert bad.reason == Reason.CONTROL_TOKEN


@pytest.mark.parametrize("role", ["system", "human", "gpt"])
@pytest.mark.parametrize("token", ["<img>", "</img>", "<IMG_CONTEXT>", "<|im_end|>", "<|endoftext|>", "<|user|>"])
def test_a_control_token_in_a_text_is_refused_with_turn_and_token(role: str, token: str) -> None:
    turns = ask("What?", "A cat.", system="Be brief.")
    number = ["system", "human", "gpt"].index(role)
    turns[number] = {**turns[number], "value": f"a {token}"}
    with pytest.raises(DataError) as caught:
        encode(turns)
    assert caught.value.reason == Reason.CONTROL_TOKEN
    assert f"turn {number + 1} spells {token!r}" in str(caught.value)


def test_a_control_token_in_the_system_prompt_is_the_arguments_fault() -> None:
    with pytest.raises(ArgumentError, match=r"system_prompt: spells '<\|im_end\|>'"):
        encode(ask("What?", "A cat."), system_prompt="<|im_end|>")


def test_tags_of_grounding_stay() -> None:
    encoded = encode(ask("Where?", "<ref>cat</ref><box>[[0, 0, 9, 9]]</box>"))
    learnt = TOKENIZERS["bytes"].convert_ids_to_tokens(list_learnt(encoded))
    assert [token for token in learnt if token[0] == "<"] == ["<ref>", "</ref>", "<box>", "</box>", "<|im_end|>"]


@pytest.mark.parametrize(
    ("turns", "reason", "message"),
    [
        ([], Reason.TURNS, "without turns"),
        (ask("a", "b")[:1], Reason.NO_TARGET, "the last turn is from 'human', must be from 'gpt'"),
        (ask("a", "b", system="c")[:1], Reason.NO_TARGET, "the last turn is from 'system'"),
        (ask("a", "b")[1:], Reason.TURNS, "turn 1 is from 'gpt', must be from 'system' or 'human'"),
        ([*ask("a", "b")[:1], *ask("a", "b")], Reason.TURNS, "turn 2 is from 'human', must be from 'gpt'"),
        ([*ask("a", "b"), *ask("a", "b", system="c")], Reason.TURNS, "turn 3 is from 'system', must be from 'human'"),
        ([{"from": "user", "value": "a"}], Reason.TURNS, "turn 1 is from 'user'"),
        ([{"value": "a"}], Reason.TURNS, "turn 1 is from None"),
        ([{"from": "human", "value": None}], Reason.TURNS, "turn 1: value must be text, got None"),
        (ask("a", "\ud800"), Reason.ENCODING, "turn 2: half a surrogate pair"),
        (ask("<image><image>", "a"), Reason.TAGS, "2 <image> tags but 0 images"),
    ],
)
@pytest.mark.parametrize("style", CONV_STYLES)
def test_a_conversation_that_cannot_be_written_down_is_refused(
    style: str, turns: Any, reason: Reason, message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        encode(turns, conv_style=style)
    assert caught.value.reason == reason


def test_images_without_tags_are_refused() -> None:
    with pytest.raises(DataError, match="1 <image> tags but 2 images"):
        encode(ask("<image>", "A cat."), image_token_counts=[4, 4])


def test_a_tag_outside_human_turns_is_text_as_in_the_original() -> None:
    encoded = encode(ask("What?", "<image>"))
    assert TOKENIZERS["bytes"].decode(list_learnt(encoded)) == "<image><|im_end|>"


def test_a_prompt_ends_with_a_human_turn() -> None:
    with pytest.raises(DataError, match="the last turn is from 'gpt', must be from 'human'"):
        encode_prompt(ask("a", "b"), ENCODERS["bytes"], conv_style="internvl2_5", image_token_counts=[])


def test_an_unknown_style_is_refused_with_those_there_are() -> None:
    with pytest.raises(ArgumentError, match=r"conv_style: 'vicuna' is unknown\. Available: internvl2_5, Hermes-2, "):
        check_conv_style("vicuna")
    assert CONV_STYLES == ("internvl2_5", "Hermes-2", "internlm2-chat", "phi3-chat", "internvl_zh")


@pytest.mark.parametrize(("style", "missing"), [("phi3-chat", r"<\|assistant\|>, <\|end\|>"), ("internvl_zh", "</s>")])
def test_a_tokenizer_without_the_tokens_of_a_style_is_refused(style: str, missing: str) -> None:
    with pytest.raises(ArgumentError, match=f"tokenizer: lacks {missing}"):
        encode(ask("a", "b"), conv_style=style, tokenizer=load_golden())


@pytest.mark.parametrize(
    ("text", "rendered"),
    [
        ("<video>\nWhat?", "Frame-1: <image>\nFrame-2: <image>\nWhat?"),
        ("What? <video>", "What? Frame-1: <image>\nFrame-2: <image>\n"),
    ],
)
def test_each_frame_of_a_video_gets_a_line(text: str, rendered: str) -> None:
    turns = ask(text, "A film.", system="<video>")
    assert render_frames(turns, 2) == ask(rendered, "A film.", system="<video>")


@pytest.mark.parametrize("text", ["What?", "<video><video>"])
def test_a_video_has_exactly_one_tag(text: str) -> None:
    with pytest.raises(DataError, match="<video> tags, must be 1") as caught:
        render_frames(ask(text, "A film."), 2)
    assert caught.value.reason == Reason.TAGS
