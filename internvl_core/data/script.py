"""A template in one tokenizer's tokens: renders turns, encodes them, and knows the borders of what is learnt.

The borders follow from how the tokens were made and are not looked for afterwards, so they cannot be missed. The
original compares token counts of pieces, and where they disagree it drops all labels of the sample.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from internvl_core.data.records import IMAGE_TAG
from internvl_core.data.templates import (
    IMAGE_CONTEXT,
    IMAGE_END,
    IMAGE_START,
    SPECIAL_TOKENS,
    ConvTemplate,
    get_template,
)
from internvl_core.data.text_encoder import TextEncoder
from internvl_core.errors import ArgumentError, DataError, Reason

if TYPE_CHECKING:
    from internvl_core.data.records import Role

IGNORE_INDEX = -100
"""Label of a position that is not learnt; what torch's cross entropy leaves out."""

# One context token for each image: those of its tiles are all alike, and are repeated after tokenizing.
_IMAGE = f"{IMAGE_START}{IMAGE_CONTEXT}{IMAGE_END}"


@dataclass(frozen=True, slots=True)
class ConversationLength:
    """How many tokens a conversation comes to, its images apart."""

    num_text_tokens: int
    """All but the `<IMG_CONTEXT>` tokens; the `<img>` and `</img>` around them are counted."""
    num_supervised: int


@dataclass(frozen=True, slots=True)
class ScriptTurns:
    """Turns as the template writes them, without the system prompt that they have in common with others."""

    roles: "list[Role]"
    texts: list[str]
    num_images: int


@dataclass(frozen=True)
class Script:
    """A template in one tokenizer's tokens."""

    encoder: TextEncoder
    template: ConvTemplate
    system_text: str
    """The system turn of a conversation that has none."""

    @classmethod
    def build(cls, encoder: TextEncoder, conv_style: str, system_prompt: str | None) -> "Script":
        template = get_template(conv_style)
        encoder.check_tokens(template.tokens.union(SPECIAL_TOKENS))
        if system_prompt is None:
            system_prompt = template.default_system_message
        if not _is_encodable(system_prompt):
            raise ArgumentError("system_prompt: half a surrogate pair is not text. Repair the escapes.")
        spelt = encoder.find_control_token(system_prompt)
        if spelt:
            raise ArgumentError(f"system_prompt: spells {spelt!r}, which the tokenizer would take for a control token.")
        text = system_prompt.strip() if template.strips_text else system_prompt
        return cls(encoder, template, template.render("system", text))

    def render(self, turns: "Sequence[tuple[Role, str]]") -> ScriptTurns:
        roles, texts, num_images = [], [], 0
        for number, (role, text) in enumerate(turns, start=1):
            if self.template.strips_text:
                text = text.strip()
            # Elsewhere a tag is text, as in the original; records refuse it there.
            pieces = text.split(IMAGE_TAG) if role == "human" else [text]
            for piece in pieces:
                self._check_text(piece, number)
            roles.append(role)
            texts.append(self.template.render(role, _IMAGE.join(pieces)))
            num_images += len(pieces) - 1
        return ScriptTurns(roles, texts, num_images)

    def encode(self, turns: ScriptTurns) -> tuple[list[int], list[int]]:
        """Encode with one context token for each image."""
        if self.template.is_one_text:
            return self._encode_as_one(turns)
        input_ids = self._encode_opening(turns)
        labels = [IGNORE_INDEX] * len(input_ids)
        num_header, num_closing = self._count_frame()
        for role, chunk in zip(turns.roles, self.encoder.encode(turns.texts), strict=True):
            input_ids += chunk
            if role == "gpt":
                end = len(chunk) - num_closing
                labels += [IGNORE_INDEX] * num_header + chunk[num_header:end] + [IGNORE_INDEX] * num_closing
            else:
                labels += [IGNORE_INDEX] * len(chunk)
        return input_ids, labels

    def encode_question(self, turns: ScriptTurns) -> list[int]:
        """Encode with one context token for each image, and with the header of the answer to come."""
        header = self.template.prompt_header
        if self.template.is_one_text:
            return [*self._bos_ids(), *self.encoder.encode([self._join(turns) + header])[0]]
        chunks = self.encoder.encode(turns.texts)
        ids = [token for chunk in chunks for token in chunk]
        return [*self._encode_opening(turns), *ids, *self.encoder.encode_fixed(header)]

    def iter_lengths(self, conversations: Sequence[ScriptTurns]) -> Iterator[ConversationLength]:
        """Count the tokens of each; all texts are tokenized together."""
        if self.template.is_one_text:
            yield from map(self._measure_as_one, conversations)
            return
        counts = iter(self.encoder.count_tokens([text for turns in conversations for text in turns.texts]))
        num_unsupervised = sum(self._count_frame())
        for turns in conversations:
            num_tokens = len(self._encode_opening(turns)) - turns.num_images
            num_supervised = 0
            for role in turns.roles:
                count = next(counts)
                num_tokens += count
                if role == "gpt":
                    num_supervised += count - num_unsupervised
            yield ConversationLength(num_tokens, num_supervised)

    def _encode_as_one(self, turns: ScriptTurns) -> tuple[list[int], list[int]]:
        text = self._join(turns)
        ids, starts = self.encoder.encode_with_starts(text)
        labels = [IGNORE_INDEX] * len(ids)
        position = 0
        end = len(text) - sum(map(len, turns.texts))
        for role, turn_text in zip(turns.roles, turns.texts, strict=True):
            begin, end = end, end + len(turn_text)
            if role != "gpt":
                continue
            begin += len(self.template.prompt_header)
            while position < len(ids) and starts[position] < begin:
                position += 1
            while position < len(ids) and starts[position] < end:
                labels[position] = ids[position]
                position += 1
        bos_ids = self._bos_ids()
        return bos_ids + ids, [IGNORE_INDEX] * len(bos_ids) + labels

    def _measure_as_one(self, turns: ScriptTurns) -> ConversationLength:
        input_ids, labels = self._encode_as_one(turns)
        return ConversationLength(len(input_ids) - turns.num_images, len(labels) - labels.count(IGNORE_INDEX))

    def _join(self, turns: ScriptTurns) -> str:
        return "".join(turns.texts if turns.roles[0] == "system" else [self.system_text, *turns.texts])

    def _encode_opening(self, turns: ScriptTurns) -> list[int]:
        # InternLM's tokenizers open every text with a BOS; a conversation gets one, at its very beginning.
        opening = self._bos_ids()
        if turns.roles[0] != "system":
            opening += self.encoder.encode_fixed(self.system_text)
        return opening

    def _bos_ids(self) -> list[int]:
        return [] if self.encoder.bos_token_id is None else [self.encoder.bos_token_id]

    def _count_frame(self) -> tuple[int, int]:
        """Count the tokens before an answer and those after the token that ends it."""
        num_header = len(self.encoder.encode_fixed(self.template.headers["gpt"]))
        return num_header, len(self.encoder.encode_fixed(self.template.endings["gpt"])) - 1

    def _check_text(self, text: str, number: int) -> None:
        if not _is_encodable(text):
            raise DataError(f"turn {number}: half a surrogate pair is not text.", reason=Reason.ENCODING)
        spelt = self.encoder.find_control_token(text)
        if spelt:
            raise DataError(
                f"turn {number} spells {spelt!r}, a control token of the tokenizer. Write it in another way.",
                reason=Reason.CONTROL_TOKEN,
            )


def _is_encodable(text: str) -> bool:
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError:
        return False
    return True
