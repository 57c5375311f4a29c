"""How records become tokens and tiles: what index, training and evaluation of a stage share.

Imports neither torch nor transformers, so that an index is built by processes that start at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from internvl_core.data.conversation import (
    ConversationLength,
    EncodedConversation,
    check_conv_style,
    encode_conversation,
    encode_prompt,
    measure_conversations,
)
from internvl_core.data.meta import DatasetMeta
from internvl_core.data.records import Turn
from internvl_core.data.text_encoder import TextEncoder
from internvl_core.data.tiling import Tiling
from internvl_core.data.video import FrameSampling
from internvl_core.errors import ArgumentError, DataError


@dataclass(frozen=True)
class Encoding:
    """The rules that decide the length of a sample, and its tokens."""

    encoder: TextEncoder | None
    """None where only the records' form is looked at, and no token is counted."""
    tiling: Tiling
    frames: FrameSampling
    conv_style: str
    tokens_per_tile: int
    system_prompt: str | None = None
    """Of records without a system turn; None for the template's own."""

    def __post_init__(self) -> None:
        check_conv_style(self.conv_style)

    @classmethod
    def from_arguments(cls, values: Mapping[str, Any], *, encoder: TextEncoder | None, tokens_per_tile: int) -> Self:
        """Read the rules from a stage's arguments, by name.

        Raises:
            ArgumentError: a value is wrong.
        """
        return cls(
            encoder=encoder,
            tiling=Tiling(
                tile_size=values["force_image_size"],
                min_tiles=values["min_dynamic_patch"],
                max_tiles=values["max_dynamic_patch"],
                use_thumbnail=values["use_thumbnail"],
                is_dynamic=values["dynamic_image_size"],
            ),
            frames=FrameSampling.parse(values["video_sampling"], values["min_num_frame"], values["max_num_frame"]),
            conv_style=values["conv_style"],
            tokens_per_tile=tokens_per_tile,
            system_prompt=values["system_prompt"],
        )

    def for_dataset(self, meta: DatasetMeta) -> Self:
        """Apply what a data set says for itself."""
        return replace(
            self,
            tiling=self.tiling
            if meta.max_dynamic_patch is None
            else self.tiling.with_max_tiles(meta.max_dynamic_patch),
            conv_style=meta.conv_style or self.conv_style,
            system_prompt=self.system_prompt if meta.system_prompt is None else meta.system_prompt,
        )

    def count_tokens(self, conversations: Sequence[Sequence[Turn]]) -> list[ConversationLength | DataError]:
        """Count the tokens of many conversations, image tokens left out; a bad one gives its error."""
        if self.encoder is None:
            return [ConversationLength(0, 1) for _ in conversations]
        return measure_conversations(
            conversations, self.encoder, conv_style=self.conv_style, system_prompt=self.system_prompt
        )

    def encode(self, turns: Sequence[Turn], tile_counts: Sequence[int], *, max_seq_length: int) -> EncodedConversation:
        """Encode a conversation whose images were cut into that many tiles each."""
        return encode_conversation(
            turns,
            self.get_encoder(),
            conv_style=self.conv_style,
            image_token_counts=[count * self.tokens_per_tile for count in tile_counts],
            max_seq_length=max_seq_length,
            system_prompt=self.system_prompt,
        )

    def encode_prompt(self, turns: Sequence[Turn], tile_counts: Sequence[int]) -> list[int]:
        """Encode turns that end with a human one, up to where the answer begins."""
        return encode_prompt(
            turns,
            self.get_encoder(),
            conv_style=self.conv_style,
            image_token_counts=[count * self.tokens_per_tile for count in tile_counts],
            system_prompt=self.system_prompt,
        )

    def get_encoder(self) -> TextEncoder:
        if self.encoder is None:
            raise ArgumentError("tokenizer: missing. Name the folder of one.")
        return self.encoder

    def to_json(self) -> dict[str, Any]:
        """Everything that a sample's length depends on, the tokenizer by its digest."""
        return {
            "encoder": self.encoder.digest if self.encoder else None,
            "tiling": asdict(self.tiling),
            "frames": asdict(self.frames),
            "conv_style": self.conv_style,
            "tokens_per_tile": self.tokens_per_tile,
            "system_prompt": self.system_prompt,
        }
