"""The five ways of writing a conversation down, and the tokens that they are made of.

| style | a turn | between turns |
|---|---|---|
| internvl2_5 | `<|im_start|>user`, newline, text, `<|im_end|>` | newline |
| Hermes-2, internlm2-chat | the same; internlm2-chat strips every text | nothing |
| phi3-chat | `<|user|>`, newline, text, `<|end|>` | nothing |
| internvl_zh | `<human>: ` text and a space, `<bot>: ` text `</s>` | nothing |

A system turn in the record is said in every style. The original says it in internvl2_5 only and drops it in
the four others without a word. Standard library only.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from internvl_core.errors import ArgumentError

if TYPE_CHECKING:
    from internvl_core.data.records import Role

IMAGE_START, IMAGE_CONTEXT, IMAGE_END = "<img>", "<IMG_CONTEXT>", "</img>"

GROUNDING_TAGS = ("<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
"""Tokens that a turn's text may spell: they mark phrases and places in an image."""

SPECIAL_TOKENS = (IMAGE_START, IMAGE_END, IMAGE_CONTEXT, *GROUNDING_TAGS)
"""What InternVL adds to a language model's vocabulary, in this order."""

_FIRST_SYSTEM_MESSAGE = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
)
_SECOND_SYSTEM_MESSAGE = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)


@dataclass(frozen=True)
class ConvTemplate:
    """What stands before and after the text of each side."""

    headers: "Mapping[Role, str]"
    endings: "Mapping[Role, str]"
    tokens: frozenset[str]
    """Tokens in headers and endings. Written out by a tokenizer that has them not, they would be text."""
    default_system_message: str
    """What is said where neither the record nor the data set has a system prompt; the released models were
    trained with it."""
    strips_text: bool = False
    is_one_text: bool = False
    """A human turn does not end with a token, so words may run on over its end: the conversation can only be
    tokenized as a whole. Elsewhere each turn is tokenized by itself, which is faster and gives the same ids."""

    def render(self, role: "Role", text: str) -> str:
        return f"{self.headers[role]}{text}{self.endings[role]}"

    @property
    def prompt_header(self) -> str:
        """Header of the answer that the model is to give.

        Without its closing space, which is the first word's own in every tokenizer of words with their space.
        """
        return self.headers["gpt"].rstrip(" ")


def get_template(conv_style: str) -> ConvTemplate:
    """Get the template of a style.

    Raises:
        ArgumentError: there is none of that name.
    """
    if conv_style not in _TEMPLATES:
        raise ArgumentError(f"conv_style: {conv_style!r} is unknown. Available: {', '.join(_TEMPLATES)}.")
    return _TEMPLATES[conv_style]


def _build_chat_ml(default_system_message: str, *, separator: str = "", strips_text: bool = False) -> ConvTemplate:
    names: dict[Role, str] = {"system": "system", "human": "user", "gpt": "assistant"}
    return ConvTemplate(
        headers={role: f"<|im_start|>{name}\n" for role, name in names.items()},
        endings=dict.fromkeys(names, f"<|im_end|>{separator}"),
        tokens=frozenset({"<|im_start|>", "<|im_end|>"}),
        default_system_message=default_system_message,
        strips_text=strips_text,
    )


_TEMPLATES: Mapping[str, ConvTemplate] = MappingProxyType(
    {
        "internvl2_5": _build_chat_ml(_SECOND_SYSTEM_MESSAGE, separator="\n"),
        "Hermes-2": _build_chat_ml(_FIRST_SYSTEM_MESSAGE),
        "internlm2-chat": _build_chat_ml(_FIRST_SYSTEM_MESSAGE, strips_text=True),
        "phi3-chat": ConvTemplate(
            headers={"system": "<|system|>\n", "human": "<|user|>\n", "gpt": "<|assistant|>\n"},
            endings={"system": "<|end|>", "human": "<|end|>", "gpt": "<|end|>"},
            tokens=frozenset({"<|system|>", "<|user|>", "<|assistant|>", "<|end|>"}),
            default_system_message=_FIRST_SYSTEM_MESSAGE,
        ),
        "internvl_zh": ConvTemplate(
            headers={"system": "", "human": "<human>: ", "gpt": "<bot>: "},
            endings={"system": " ", "human": " ", "gpt": "</s>"},
            tokens=frozenset({"</s>"}),
            default_system_message="",
            is_one_text=True,
        ),
    }
)

CONV_STYLES = tuple(_TEMPLATES)

CHAT_TOKENS = frozenset[str]().union(*(template.tokens for template in _TEMPLATES.values()))
"""Tokens of all templates: no text may spell one, even where a tokenizer does not call it special."""
