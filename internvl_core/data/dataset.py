"""Samples for training and questions for evaluation, read and encoded when asked for.

`SupervisedDataset` is stateless apart from its epoch: the same index gives the same sample on
every rank and worker. A bad record raises; it is never replaced by another.
Shapes: `T` tokens, `K` tiles, `S` side of a tile in px.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset

from internvl_core.data.conversation import (
    SPECIAL_TOKENS,
    EncodedConversation,
    check_conv_style,
    encode_conversation,
    encode_prompt,
)
from internvl_core.data.media import cut_tiles, draw_jpeg_quality, find_image, load_image, read_image_size
from internvl_core.data.meta import DatasetMeta, load_meta
from internvl_core.data.records import Record, RecordFile, Turn
from internvl_core.data.tiling import Tiling
from internvl_core.errors import ArgumentError, DataError, MediaError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Prompt(TypedDict):
    """A question as the model reads it."""

    input_ids: Tensor
    """[T], int64."""
    tiles: Tensor
    """[K, 3, S, S], uint8; K is 0 for text."""
    sample_id: str


class Sample(Prompt):
    """A conversation as the trainer reads it."""

    labels: Tensor
    """[T], int64; -100 where nothing is learnt."""


@dataclass(frozen=True)
class Encoding:
    """How records become tokens and tiles; the same for training and evaluation of a stage."""

    tokenizer: "PreTrainedTokenizerBase"
    tiling: Tiling
    conv_style: str
    tokens_per_tile: int

    def __post_init__(self) -> None:
        check_conv_style(self.conv_style)
        missing = set(SPECIAL_TOKENS) - self.tokenizer.get_vocab().keys()
        if missing:
            raise ArgumentError(f"tokenizer: lacks {', '.join(sorted(missing))}. Add InternVL's special tokens to it.")

    def choose_tiling(self, meta: DatasetMeta, num_images: int) -> Tiling:
        """Apply a dataset's own bound, then divide it among the images of a sample."""
        own = self.tiling if meta.max_dynamic_patch is None else self.tiling.with_max_tiles(meta.max_dynamic_patch)
        return own.for_images(num_images)

    def stack_tiles(self, tiles: Sequence[Tensor]) -> Tensor:
        """Join the tiles of a sample's images; [0, 3, S, S] if it has none."""
        size = self.tiling.tile_size
        return torch.cat([torch.empty((0, 3, size, size), dtype=torch.uint8), *tiles])


class SupervisedDataset(Dataset[Sample]):
    """All datasets of a meta file, one after the other, repeated as `repeat_time` says."""

    def __init__(self, datasets: Sequence[DatasetMeta], encoding: Encoding, *, max_seq_length: int, seed: int) -> None:
        self._encoding = encoding
        self._max_seq_length = max_seq_length
        self._seed = seed
        # Shared, because workers that outlive an epoch hold a copy of the dataset.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._files = [RecordFile(meta) for meta in datasets]
        self._positions = [
            (number, position)
            for number, file in enumerate(self._files)
            for position in select_positions(file.meta, len(file), seed=seed)
        ]

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int) -> Sample:
        """Read, decode and encode one sample.

        Raises:
            DataError: names file and line; also where a sample is longer than `max_seq_length`.
        """
        number, position = self._positions[index]
        file = self._files[number]
        record = file[position]
        tiling = self._encoding.choose_tiling(file.meta, len(record.images))
        tiles = []
        for image_index, name in enumerate(record.images):
            quality = None
            if file.meta.data_augment:
                quality = draw_jpeg_quality(
                    seed=self._seed, epoch=int(self._epoch), sample_id=record.sample_id, image_index=image_index
                )
            tiles.append(_load_tiles(file.meta.root, name, tiling, record.where, jpeg_quality=quality))
        encoded = self._encode(record, [len(image_tiles) for image_tiles in tiles])
        return {
            "input_ids": torch.tensor(encoded.input_ids),
            "labels": torch.tensor(encoded.labels),
            "tiles": self._encoding.stack_tiles(tiles),
            "sample_id": record.sample_id,
        }

    @property
    def dataset_names(self) -> list[str]:
        return [file.meta.name for file in self._files]

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each sample, exact, image headers read but no image decoded. For `group_by_length`."""
        measured = {key: self._measure(*key) for key in dict.fromkeys(self._positions)}
        return [measured[key] for key in self._positions]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the augmentation is drawn for."""
        self._epoch.fill_(epoch)

    def _measure(self, number: int, position: int) -> int:
        file = self._files[number]
        record = file[position]
        tiling = self._encoding.choose_tiling(file.meta, len(record.images))
        sizes = [read_image_size(find_image(file.meta.root, name)) for name in record.images]
        return len(self._encode(record, [tiling.count_tiles(*size) for size in sizes]).input_ids)

    def _encode(self, record: Record, tile_counts: Sequence[int]) -> EncodedConversation:
        encoded = encode_conversation(
            record.turns,
            self._encoding.tokenizer,
            conv_style=self._encoding.conv_style,
            image_token_counts=[count * self._encoding.tokens_per_tile for count in tile_counts],
            max_seq_length=self._max_seq_length,
        )
        if encoded.full_length > self._max_seq_length:
            raise DataError(
                f"{record.where}: {encoded.full_length} tokens ({sum(tile_counts)} tiles), but max_seq_length is "
                f"{self._max_seq_length}. Raise it, lower max_dynamic_patch or shorten the record."
            )
        return encoded


def select_positions(meta: DatasetMeta, num_records: int, *, seed: int) -> list[int]:
    """Records that `repeat_time` selects: the whole passes, then the subset, the same in every epoch."""
    passes, extra = meta.count_samples(num_records)
    # A str seeds through sha512: the draw does not depend on the process's hash seed.
    subset = random.Random(f"{seed}/{meta.name}").sample(range(num_records), extra)  # noqa: S311
    return list(range(num_records)) * passes + sorted(subset)


@dataclass(frozen=True)
class Question:
    """A held-out record whose last answer the model must give by itself."""

    meta: DatasetMeta
    sample_id: str
    where: str
    turns: tuple[Turn, ...]
    """The conversation up to the last human turn."""
    answer: str
    images: tuple[str, ...]


def load_questions(meta_path: str | Path, *, seed: int = 0) -> list[Question]:
    """Load the questions of a held-out meta file, dataset by dataset.

    Raises:
        DataError: the meta file or a record is wrong.
    """
    questions = []
    for meta in load_meta(meta_path):
        file = RecordFile(meta)
        for position in select_positions(meta, len(file), seed=seed):
            record = file[position]
            *context, answer = record.turns
            questions.append(Question(meta, record.sample_id, record.where, tuple(context), answer.text, record.images))
    return questions


def encode_question(question: Question, encoding: Encoding) -> Prompt:
    """Encode a question with the code that encodes training samples, never augmented."""
    tiling = encoding.choose_tiling(question.meta, len(question.images))
    tiles = [_load_tiles(question.meta.root, name, tiling, question.where) for name in question.images]
    input_ids = encode_prompt(
        question.turns,
        encoding.tokenizer,
        conv_style=encoding.conv_style,
        image_token_counts=[len(image_tiles) * encoding.tokens_per_tile for image_tiles in tiles],
    )
    return {
        "input_ids": torch.tensor(input_ids),
        "tiles": encoding.stack_tiles(tiles),
        "sample_id": question.sample_id,
    }


def _load_tiles(root: Path, name: str, tiling: Tiling, where: str, *, jpeg_quality: int | None = None) -> Tensor:
    try:
        return cut_tiles(load_image(find_image(root, name)), tiling, jpeg_quality=jpeg_quality)
    except MediaError as error:
        raise MediaError(f"{where}: {error}") from None
