"""The data a stage trains on, as one rank sees them; every rank must see the same."""

import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from internvl_core.arguments import Arguments
from internvl_core.data.dataset import SupervisedDataset, build_dataset
from internvl_core.data.encoding import Encoding
from internvl_core.data.meta import load_meta
from internvl_core.data.pixels import PixelRules
from internvl_core.errors import DataError


def build_training_data(arguments: Arguments, encoding: Encoding, cache_dir: Path) -> SupervisedDataset:
    """Open the data of a stage; a stage of a pipeline finds its indexes ready, else one rank of each node builds them.

    Raises:
        DataError: the data cannot be used, or ranks see different data.
    """
    training = arguments.training
    _allow_open_files()
    with training.main_process_first(desc="indexing the data"):
        dataset = build_dataset(
            load_meta(arguments.data.meta_path),
            encoding,
            PixelRules.from_arguments(list_data_values(arguments)),
            cache_dir=cache_dir,
            max_seq_length=arguments.data.max_seq_length,
            seed=training.seed if training.data_seed is None else training.data_seed,
            by_root_of_size=arguments.data.use_data_resampling,
        )
    _check_same_on_all_ranks(dataset.mixture.digest)
    return dataset


def list_data_values(arguments: Arguments) -> Mapping[str, Any]:
    """List the arguments that say how records become tokens and tiles, by name."""
    return {**vars(arguments.data), **vars(arguments.extension)}


def _allow_open_files() -> None:
    """Raise the limit on open files as far as allowed: each data set holds four in each process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _check_same_on_all_ranks(digest: str) -> None:
    if not dist.is_initialized():
        return
    digests = [""] * dist.get_world_size()
    dist.all_gather_object(digests, digest)
    differing = [rank for rank, other in enumerate(digests) if other != digests[0]]
    if differing:
        raise DataError(
            f"ranks {', '.join(map(str, differing))} see other data than rank 0: other records are sound, or of other "
            "lengths. Mount the media on every node alike, and remove the index folders of those nodes' caches."
        )
