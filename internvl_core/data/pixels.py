"""From a record to its tiles: images and videos read, augmented and cut as the data set says.

Training, evaluation and `internvl data show` see the same pixels through here.
Shapes: `K` tiles, `S` side of a tile in px.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor

from internvl_core.data.conversation import render_frames
from internvl_core.data.encoding import Encoding
from internvl_core.data.media import load_image, pad_to_square
from internvl_core.data.media_root import open_root
from internvl_core.data.meta import DatasetMeta
from internvl_core.data.records import Record, Turn
from internvl_core.data.tiles import cut_tiles, draw_jpeg_quality
from internvl_core.data.tiling import Tiling
from internvl_core.data.video import count_frames, iter_frames, probe_video


@dataclass(frozen=True)
class PixelRules:
    """How pixels are made, beyond the tiling."""

    normalize_type: str
    pad2square: bool = False
    is_fast: bool = False
    """Resize in uint8 with torch: within 2/255 of Pillow's result."""
    can_draft: bool = False
    """Let the JPEG decoder shrink by powers of two on the way; changes pixels."""
    augment_per_tile: bool = False
    """Draw a JPEG quality for each tile, as the original does, instead of one for an image."""

    @classmethod
    def from_arguments(cls, values: Mapping[str, Any]) -> Self:
        """Read the rules from a stage's arguments, by name."""
        return cls(
            normalize_type=values["normalize_type"],
            pad2square=values["pad2square"],
            is_fast=values["fast_resize"],
            can_draft=values["jpeg_draft"],
            augment_per_tile=values["augment_per_tile"],
        )


@dataclass(frozen=True)
class LoadedMedia:
    """Tiles of a record, and its turns with one image tag for each picture."""

    turns: Sequence[Turn]
    tiles: Tensor
    """[K, 3, S, S], uint8; K is 0 for text."""
    tile_counts: list[int]
    """Of each picture, in the order of the tags."""


class PixelSource:
    """The media of one data set."""

    def __init__(self, meta: DatasetMeta, encoding: Encoding, rules: PixelRules) -> None:
        """Describe where media come from and what becomes of them.

        Args:
            encoding: the data set's own.
        """
        self._root = open_root(meta.root)
        self._is_augmented = meta.data_augment
        self._encoding = encoding
        self._rules = rules

    def load(self, record: Record, *, key: str, is_training: bool = True) -> LoadedMedia:
        """Load what a record shows.

        Args:
            key: what frames and augmentation are drawn by: seed, epoch and sample.
            is_training: False leaves the augmentation out.

        Raises:
            DataError: a medium is missing, broken or outside the root.
        """
        content = record.content
        if content.video is not None:
            turns, pictures = self._open_video(record, key)
            # A frame is one tile, whatever its shape.
            tiling = replace(self._encoding.tiling, is_dynamic=False)
        else:
            turns = content.turns
            tiling = self._encoding.tiling.for_images(len(content.images))
            pictures = (self._load_image(name, tiling) for name in content.images)
        is_augmented = is_training and self._is_augmented
        tiles = [
            self._cut(picture, tiling, f"{key}/{number}" if is_augmented else None)
            for number, picture in enumerate(pictures)
        ]
        size = tiling.tile_size
        stacked = torch.cat(tiles) if tiles else torch.empty((0, 3, size, size), dtype=torch.uint8)
        return LoadedMedia(turns, stacked, [len(picture_tiles) for picture_tiles in tiles])

    def _open_video(self, record: Record, key: str) -> tuple[Sequence[Turn], Iterator[Image.Image]]:
        name, clip = record.content.video, record.content.clip
        assert name is not None
        sampling = self._encoding.frames
        info = probe_video(self._root, name, clip)
        count = count_frames(info, sampling, key=record.sample_id)
        frames = iter_frames(self._root, name, info, sampling, count=count, key=key, clip=clip)
        return render_frames(record.content.turns, count), frames

    def _load_image(self, name: str, tiling: Tiling) -> Image.Image:
        with self._root.open(name) as file:
            return load_image(file, name, draft_for=tiling if self._rules.can_draft else None)

    def _cut(self, image: Image.Image, tiling: Tiling, augmentation_key: str | None) -> Tensor:
        rules = self._rules
        # Tiles of a grid are square already; only a picture that becomes one tile whole is padded, as in the original.
        if rules.pad2square and not tiling.is_dynamic:
            image = pad_to_square(image, rules.normalize_type)
        quality: int | list[int] | None = None
        if augmentation_key is not None and rules.augment_per_tile:
            num_tiles = tiling.count_tiles(*image.size)
            quality = [draw_jpeg_quality(augmentation_key, tile=tile) for tile in range(num_tiles)]
        elif augmentation_key is not None:
            quality = draw_jpeg_quality(augmentation_key)
        return cut_tiles(image, tiling, jpeg_quality=quality, is_fast=rules.is_fast)
