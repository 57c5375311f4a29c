"""Samples for training, read and encoded when asked for.

Stateless: the same id gives the same sample on every rank and worker, at any time. A sample that
cannot be made comes out as a `BadSample`; it is never replaced by another.
Shapes: `T` tokens, `K` tiles, `S` side of a tile in px.
"""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset

from internvl_core.data.annotation import AnnotationChanged
from internvl_core.data.encoding import Encoding
from internvl_core.data.index import open_index
from internvl_core.data.meta import DatasetMeta
from internvl_core.data.mixture import Draw, Mixture
from internvl_core.data.pixels import PixelRules, PixelSource
from internvl_core.data.quarantine import BadSample
from internvl_core.data.records import Record, parse_record
from internvl_core.errors import DataError, OutOfMemory, Reason
from internvl_core.exhaustion import is_out_of_memory

logger = logging.getLogger(__name__)

_NO_MEMORY = re.compile(r"no memory left for the sample (.+:\d+)\. ")


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


class SupervisedDataset(Dataset["Sample | BadSample"]):
    """The draws of a mixture, by id."""

    def __init__(self, mixture: Mixture, encoding: Encoding, pixel_rules: PixelRules, *, max_seq_length: int) -> None:
        self.mixture = mixture
        self._max_seq_length = max_seq_length
        metas = [source.index.meta for source in mixture.sources]
        self._encodings = [encoding.for_dataset(meta) for meta in metas]
        self._pixels = [PixelSource(meta, own, pixel_rules) for meta, own in zip(metas, self._encodings, strict=True)]

    def __len__(self) -> int:
        """Count the draws of an epoch; ids go on beyond it, epoch after epoch."""
        return len(self.mixture)

    def __getitem__(self, id: int) -> Sample | BadSample:
        """Read, decode and encode one draw.

        Raises:
            IndexError: the id is negative.
            AnnotationChanged: the file was edited since it was indexed.
            OutOfMemory: names the sample.
        """
        draw = self.mixture.locate(id)
        index = self.mixture.sources[draw.dataset].index
        where = f"{index.meta.annotation}:{draw.row + 1}"
        try:
            return self._load(draw)
        except AnnotationChanged:
            raise
        except DataError as error:
            return BadSample(index.meta.name, draw.row + 1, error.reason, f"{where}: {error}")
        except (MemoryError, OutOfMemory, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            sample_id = f"{index.meta.name}:{draw.row + 1}"
            raise OutOfMemory(
                f"{where}: no memory left for the sample {sample_id}. Lower dataloader_num_workers, max_dynamic_patch "
                "or max_num_frame, or give the run more memory.",
                sample_ids=[sample_id],
            ) from error

    @property
    def dataset_names(self) -> list[str]:
        return [source.index.meta.name for source in self.mixture.sources]

    def _load(self, draw: Draw) -> Sample:
        index = self.mixture.sources[draw.dataset].index
        meta = index.meta
        content = parse_record(index.read_line(draw.row), ignore_keys=meta.ignore_keys)
        record = Record(meta.name, meta.annotation, draw.row + 1, content)
        # A pass of a data set that is repeated within an epoch is an epoch of its own to the augmentation.
        key = f"{self.mixture.seed}/{draw.epoch}.{draw.repeat}/{record.sample_id}"
        media = self._pixels[draw.dataset].load(record, key=key)
        encoded = self._encodings[draw.dataset].encode(
            media.turns, media.tile_counts, max_seq_length=self._max_seq_length
        )
        expected = int(index.tokens[draw.row])
        if encoded.full_length != expected:
            raise DataError(
                f"{encoded.full_length} tokens with {sum(media.tile_counts)} tiles, but {expected} by the index: width "
                "and height of the record are not those of the picture. Correct them, or, if the picture was replaced "
                f"since, remove {index.directory}.",
                reason=Reason.SIZE_MISMATCH,
            )
        return {
            "input_ids": torch.tensor(encoded.input_ids),
            "labels": torch.tensor(encoded.labels),
            "tiles": media.tiles,
            "sample_id": record.sample_id,
        }


def find_sample_ids(message: str) -> list[str]:
    """Find the sample in the message of a loader's worker; of an exception nothing but its text leaves a process."""
    return _NO_MEMORY.findall(message)


def build_dataset(
    metas: Sequence[DatasetMeta],
    encoding: Encoding,
    pixel_rules: PixelRules,
    *,
    cache_dir: Path,
    max_seq_length: int,
    seed: int,
    max_tiles: int | None = None,
    by_root_of_size: bool = False,
    is_endless: bool = False,
) -> SupervisedDataset:
    """Open the indexes of a mixture, build those that are missing, and say what they leave out.

    Args:
        max_tiles: most tiles of a pack; None where samples are not packed.
        is_endless: a data set that is used up starts again at once, in another order.

    Raises:
        DataError: an annotation cannot be read, or nothing of a data set can be trained on.
    """
    indexes = [open_index(meta, encoding, cache_dir) for meta in metas]
    mixture = Mixture(
        indexes,
        seed=seed,
        max_tokens=max_seq_length,
        max_tiles=max_tiles,
        by_root_of_size=by_root_of_size,
        is_endless=is_endless,
    )
    for source in mixture.sources:
        left_out = {reason.value: count for reason, count in source.index.problem_counts.items()}
        if source.num_too_long:
            left_out[Reason.TOO_LONG.value] = source.num_too_long
        if source.num_too_many_tiles:
            left_out[Reason.TOO_MANY_TILES.value] = source.num_too_many_tiles
        if left_out:
            logger.warning(
                "%s: %d of %d records are left out: %s. See internvl data check.",
                source.index.meta.name,
                sum(left_out.values()),
                source.index.num_records,
                ", ".join(f"{count} {reason}" for reason, count in left_out.items()),
            )
    return SupervisedDataset(mixture, encoding, pixel_rules, max_seq_length=max_seq_length)
