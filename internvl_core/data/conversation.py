"""From turns to token ids and labels, to the last token as the original trainer renders them.

A turn is rendered and tokenized by itself, because merges across a turn's border would move the
border of what is learnt. Supervised are the text and the closing `<|im_end|>` of every answer;
everything else has the label -100.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from internvl_core.data.records import IMAGE_TAG, Role, Turn
from internvl_core.errors import ArgumentError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100
"""Label of a position that is not learnt; what torch's cross entropy leaves out."""

IMAGE_START, IMAGE_CONTEXT, IMAGE_END = "<img>", "<IMG_CONTEXT>", "</img>"

SPECIAL_TOKENS = (IMAGE_START, IMAGE_END, IMAGE_CONTEXT, "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
"""What InternVL adds to a language model's vocabulary, in this order."""

DEFAULT_SYSTEM_MESSAGE = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)
"""What internvl2_5 says where a record has no system turn: the released models were trained with it."""

CONV_STYLES = ("internvl2_5",)

_HEADERS: dict[Role, str] = {"system": "system", "human": "user", "gpt": "assistant"}
_END = "<|im_end|>\n"


@dataclass(frozen=True)
class EncodedConversation:
    """Token ids and labels of one conversation, at most `max_seq_length` of them."""

    input_ids: list[int]
    labels: list[int]
    full_length: int
    """Tokens before the cut; more than `len(input_ids)` says that something was lost."""


def encode_conversation(
    turns: Sequence[Turn],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    conv_style: str,
    image_token_counts: Sequence[int],
    max_seq_length: int,
) -> EncodedConversation:
    """Encode a conversation for training.

    Args:
        image_token_counts: `<IMG_CONTEXT>` tokens of each image, in the order of the tags.
        max_seq_length: longer conversations lose their end, as in the original; the caller decides
            what to do with one of which `full_length` says that it was cut.

    Raises:
        ArgumentError: unknown `conv_style`.
        DataError: the number of `<image>` tags is not the number of images.
    """
    check_conv_style(conv_style)
    turns = _with_system_turn(turns)
    *chunks, header = _tokenize([*_render(turns, image_token_counts), _render_header("gpt")], tokenizer)
    input_ids: list[int] = _bos_ids(tokenizer)
    labels = [IGNORE_INDEX] * len(input_ids)
    for turn, chunk in zip(turns, chunks, strict=True):
        input_ids += chunk
        if turn.role == "gpt":
            # The last id is the newline after <|im_end|>: one token in every tokenizer of this family.
            labels += [IGNORE_INDEX] * len(header) + chunk[len(header) : -1] + [IGNORE_INDEX]
        else:
            labels += [IGNORE_INDEX] * len(chunk)
    return EncodedConversation(input_ids[:max_seq_length], labels[:max_seq_length], len(input_ids))


def encode_prompt(
    turns: Sequence[Turn],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    conv_style: str,
    image_token_counts: Sequence[int],
) -> list[int]:
    """Encode turns that end with a human one, up to the place where the model's answer begins.

    Equal to the beginning of what `encode_conversation` gives with any answer appended.
    """
    check_conv_style(conv_style)
    texts = [*_render(_with_system_turn(turns), image_token_counts), _render_header("gpt")]
    return [*_bos_ids(tokenizer), *(token for chunk in _tokenize(texts, tokenizer) for token in chunk)]


def check_conv_style(conv_style: str) -> None:
    """Refuse a template that is not built yet."""
    if conv_style not in CONV_STYLES:
        raise ArgumentError(f"conv_style: {conv_style!r} is not built yet. Available: {', '.join(CONV_STYLES)}.")


def _with_system_turn(turns: Sequence[Turn]) -> list[Turn]:
    if turns and turns[0].role == "system":
        return list(turns)
    return [Turn("system", DEFAULT_SYSTEM_MESSAGE), *turns]


def _render(turns: Sequence[Turn], image_token_counts: Sequence[int]) -> list[str]:
    num_tags = sum(turn.text.count(IMAGE_TAG) for turn in turns if turn.role == "human")
    if num_tags != len(image_token_counts):
        raise DataError(f"{num_tags} {IMAGE_TAG} tags but {len(image_token_counts)} images. Write one tag per image.")
    counts = iter(image_token_counts)
    texts = []
    for turn in turns:
        text = turn.text
        if turn.role == "human":
            head, *tails = text.split(IMAGE_TAG)
            text = head + "".join(_render_image(next(counts)) + tail for tail in tails)
        texts.append(f"{_render_header(turn.role)}{text}{_END}")
    return texts


def _render_header(role: Role) -> str:
    return f"<|im_start|>{_HEADERS[role]}\n"


def _render_image(num_tokens: int) -> str:
    return f"{IMAGE_START}{IMAGE_CONTEXT * num_tokens}{IMAGE_END}"


def _tokenize(texts: list[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    encoded: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return encoded


def _bos_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    # InternLM's tokenizers open every text with a BOS; a conversation gets one, at its very beginning.
    if getattr(tokenizer, "add_bos_token", False) and tokenizer.bos_token_id is not None:
        return [tokenizer.bos_token_id]
    return []
