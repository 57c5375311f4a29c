"""From turns to token ids and labels, to the last token as the original trainer renders them.

Supervised are the text of every answer and the token that ends it; everything else has the label -100. Text
cannot make a token that is not text: whatever spells one is refused, apart from the tags of grounding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from internvl_core.data.records import IMAGE_TAG, VIDEO_TAG
from internvl_core.data.script import IGNORE_INDEX, ConversationLength, Script, ScriptTurns
from internvl_core.data.templates import (
    CONV_STYLES,
    IMAGE_CONTEXT,
    IMAGE_END,
    IMAGE_START,
    SPECIAL_TOKENS,
    get_template,
)
from internvl_core.data.text_encoder import TextEncoder
from internvl_core.errors import DataError, Reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from internvl_core.data.records import Role, Turn

__all__ = [
    "CONV_STYLES",
    "IGNORE_INDEX",
    "IMAGE_CONTEXT",
    "IMAGE_END",
    "IMAGE_START",
    "SPECIAL_TOKENS",
    "ConversationLength",
    "EncodedConversation",
    "check_conv_style",
    "encode_conversation",
    "encode_prompt",
    "measure_conversations",
    "render_frames",
]

_TURNS_AFTER: "Mapping[Role | None, tuple[Role, ...]]" = {
    None: ("system", "human"),
    "system": ("human",),
    "human": ("gpt",),
    "gpt": ("human",),
}


@dataclass(frozen=True)
class EncodedConversation:
    """Token ids and labels of one conversation, at most `max_seq_length` of them."""

    input_ids: list[int]
    labels: list[int]
    full_length: int
    """Tokens before the cut; more than `len(input_ids)` says that something was lost."""


def encode_conversation(
    conversation: Sequence[Mapping[str, object]],
    tokenizer: "PreTrainedTokenizerBase | TextEncoder",
    *,
    conv_style: str,
    image_token_counts: Sequence[int],
    max_seq_length: int,
    system_prompt: str | None = None,
) -> EncodedConversation:
    """Encode a conversation for training.

    Args:
        conversation: turns with `from` (an optional system, then human and gpt in turn) and `value`.
        tokenizer: a fast one.
        image_token_counts: `<IMG_CONTEXT>` tokens of each image, in the order of the tags.
        max_seq_length: longer conversations lose their end, as in the original; the caller decides
            what to do with one of which `full_length` says that it was cut.
        system_prompt: said where the conversation has no system turn; None for the template's own.

    Raises:
        ArgumentError: unknown `conv_style`, or the tokenizer lacks a token of it.
        DataError: the turns are out of order, spell a control token, or have more or fewer tags than images.
    """
    encoder = TextEncoder.from_tokenizer(tokenizer)
    script = Script.build(encoder, conv_style, system_prompt)
    turns = script.render(_read_turns(conversation, last="gpt"))
    _check_counts(turns, image_token_counts)
    input_ids, labels = script.encode(turns)
    input_ids, labels = _expand_images(input_ids, labels, image_token_counts, encoder.get_id(IMAGE_CONTEXT))
    return EncodedConversation(input_ids[:max_seq_length], labels[:max_seq_length], len(input_ids))


def encode_prompt(
    conversation: Sequence[Mapping[str, object]],
    tokenizer: "PreTrainedTokenizerBase | TextEncoder",
    *,
    conv_style: str,
    image_token_counts: Sequence[int],
    system_prompt: str | None = None,
) -> list[int]:
    """Encode turns that end with a human one, up to the place where the model's answer begins.

    Equal to the beginning of what `encode_conversation` gives with an answer appended, unless the answer begins
    with a line break that the tokenizer joins to the header's.
    """
    encoder = TextEncoder.from_tokenizer(tokenizer)
    script = Script.build(encoder, conv_style, system_prompt)
    turns = script.render(_read_turns(conversation, last="human"))
    _check_counts(turns, image_token_counts)
    input_ids = script.encode_question(turns)
    return _expand_images(input_ids, input_ids, image_token_counts, encoder.get_id(IMAGE_CONTEXT))[0]


def measure_conversations(
    conversations: Sequence[Sequence[Mapping[str, object]]],
    encoder: TextEncoder,
    *,
    conv_style: str,
    system_prompt: str | None = None,
) -> list[ConversationLength | DataError]:
    """Count what `encode_conversation` would give for each, without building it.

    Returns:
        For each conversation its length, or why it cannot be encoded.
    """
    script = Script.build(encoder, conv_style, system_prompt)
    results: list[ScriptTurns | DataError] = []
    for conversation in conversations:
        try:
            results.append(script.render(_read_turns(conversation, last="gpt")))
        except DataError as error:
            results.append(error)
    lengths = script.iter_lengths([result for result in results if isinstance(result, ScriptTurns)])
    return [result if isinstance(result, DataError) else next(lengths) for result in results]


def render_frames(conversation: "Sequence[Turn]", num_frames: int) -> "list[Turn]":
    """Put a line with an image tag for each frame where the conversation has its `<video>` tag.

    Raises:
        DataError: the human turns have not exactly one such tag.
    """
    num_tags = sum(turn["value"].count(VIDEO_TAG) for turn in conversation if turn["from"] == "human")
    if num_tags != 1:
        raise DataError(f"{num_tags} {VIDEO_TAG} tags, must be 1 in the human turns.", reason=Reason.TAGS)
    lines = "".join(f"Frame-{number}: {IMAGE_TAG}\n" for number in range(1, num_frames + 1))
    return [
        {"from": "human", "value": turn["value"].replace(f"{VIDEO_TAG}\n", lines).replace(VIDEO_TAG, lines)}
        if turn["from"] == "human"
        else turn
        for turn in conversation
    ]


def check_conv_style(conv_style: str) -> None:
    """Refuse a style that there is no template for."""
    get_template(conv_style)


def _read_turns(conversation: Sequence[Mapping[str, object]], *, last: "Role") -> "list[tuple[Role, str]]":
    turns: list[tuple[Role, str]] = []
    before: Role | None = None
    for number, turn in enumerate(conversation, start=1):
        role, text = turn.get("from"), turn.get("value")
        if role not in _TURNS_AFTER[before]:
            due = " or ".join(repr(name) for name in _TURNS_AFTER[before])
            raise DataError(f"turn {number} is from {role!r}, must be from {due}.", reason=Reason.TURNS)
        if not isinstance(text, str):
            raise DataError(f"turn {number}: value must be text, got {text!r}.", reason=Reason.TURNS)
        before = role
        turns.append((role, text))
    if not turns:
        raise DataError("a conversation without turns. Write at least a question and an answer.", reason=Reason.TURNS)
    if before != last:
        reason = Reason.NO_TARGET if last == "gpt" else Reason.TURNS
        raise DataError(f"the last turn is from {before!r}, must be from {last!r}.", reason=reason)
    return turns


def _check_counts(turns: ScriptTurns, image_token_counts: Sequence[int]) -> None:
    if turns.num_images != len(image_token_counts):
        raise DataError(
            f"{turns.num_images} {IMAGE_TAG} tags but {len(image_token_counts)} images. Write one tag per image.",
            reason=Reason.TAGS,
        )


def _expand_images(
    input_ids: list[int], labels: list[int], image_token_counts: Sequence[int], context_id: int
) -> tuple[list[int], list[int]]:
    """Repeat the one context token of each image as often as its tiles need."""
    expanded_ids: list[int] = []
    expanded_labels: list[int] = []
    start = 0
    for count in image_token_counts:
        position = input_ids.index(context_id, start)
        expanded_ids += input_ids[start:position] + [context_id] * count
        expanded_labels += labels[start:position] + [IGNORE_INDEX] * count
        start = position + 1
    return expanded_ids + input_ids[start:], expanded_labels + labels[start:]
