"""The data a stage trains on, as one rank sees them; every rank must see the same."""

import math
import resource
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from internvl_core.arguments import Arguments
from internvl_core.data.collate import PackCollator, SampleCollator
from internvl_core.data.dataset import SupervisedDataset, build_dataset
from internvl_core.data.encoding import Encoding
from internvl_core.data.meta import load_meta
from internvl_core.data.mixture import Mixture
from internvl_core.data.packing import PackSampler
from internvl_core.data.pixels import PixelRules
from internvl_core.data.sizes import PackLimits, SampleCost
from internvl_core.errors import DataError
from internvl_core.model.flops import ModelShape, build_sample_cost, find_learning_parts
from internvl_core.model.internvl import InternVLForTraining
from internvl_core.train.pack_log import PackLog
from internvl_core.train.sampler import Share, StepSampler, read_num_steps
from internvl_core.train.steps import PackedPlan, PaddedPlan

_Answer = TypeVar("_Answer")


def build_training_data(
    arguments: Arguments, encoding: Encoding, cache_dir: Path, *, is_packed: bool
) -> SupervisedDataset:
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
            max_tiles=arguments.data.num_images_expected if is_packed else None,
            is_endless=is_packed and arguments.data.replacement,
            seed=training.seed if training.data_seed is None else training.data_seed,
            by_root_of_size=arguments.data.use_data_resampling,
        )
    _check_same_on_all_ranks(dataset.mixture.digest)
    return dataset


def get_pack_limits(arguments: Arguments) -> PackLimits:
    """Get what a pack of the stage may hold."""
    return PackLimits(arguments.data.max_packed_tokens, arguments.data.num_images_expected)


def build_collator(arguments: Arguments, pad_token_id: int, *, is_packed: bool) -> SampleCollator | PackCollator:
    """Build what makes a batch of samples."""
    reduction: Any = arguments.data.loss_reduction
    if not is_packed:
        return SampleCollator(pad_token_id, reduction)
    padded_to = get_pack_limits(arguments) if arguments.data.strict_mode else None
    batch_size = arguments.training.per_device_train_batch_size
    return PackCollator(pad_token_id, reduction, padded_to, packs_per_batch=batch_size)


def build_step_sampler(
    arguments: Arguments, mixture: Mixture, model: InternVLForTraining, *, is_packed: bool, resume_from: Path | None
) -> StepSampler:
    """Plan the stage's steps, and give this rank its share; sets `max_steps` where only epochs are given.

    Args:
        model: with its parameters frozen and unfrozen; decides what samples cost.
        resume_from: a training checkpoint of this stage.
    """
    training = arguments.training
    share = Share(
        training.process_index,
        training.world_size,
        training.gradient_accumulation_steps,
        training.per_device_train_batch_size,
    )
    plan: PaddedPlan | PackedPlan
    if is_packed:
        plan = _plan_packs(arguments, mixture, _build_cost(model), share)
    else:
        plan = PaddedPlan(
            mixture,
            batch_size=share.items_per_step,
            # The index knows the lengths; Trainer would decode every image to learn them.
            is_grouped=training.train_sampling_strategy == "group_by_length",
            drops_last=training.dataloader_drop_last,
        )
    if resume_from is not None:
        if training.max_steps <= 0:
            training.max_steps = read_num_steps(resume_from)
        sampler = StepSampler(plan, share, num_steps=training.max_steps, mixture=mixture.digest)
        sampler.load(resume_from)
        return sampler
    start = _ask_rank_zero(plan.begin)
    if training.max_steps <= 0:
        training.max_steps = plan.count_steps(training.num_train_epochs, start)
    return StepSampler(plan, share, num_steps=training.max_steps, mixture=mixture.digest, start=start)


def _plan_packs(arguments: Arguments, mixture: Mixture, cost: SampleCost, share: Share) -> PackedPlan:
    training = arguments.training
    build_sampler = partial(
        PackSampler,
        mixture,
        get_pack_limits(arguments),
        cost,
        totals=mixture.totals,
        seed=mixture.seed,
        packs_per_step=share.items_per_step,
        packer=arguments.extension.packer,
        max_buffer_size=arguments.data.max_buffer_size,
        num_epochs=math.ceil(training.num_train_epochs) if training.max_steps <= 0 else None,
    )
    log = PackLog(mixture, get_pack_limits(arguments), every=arguments.data.log_freq) if share.rank == 0 else None
    return PackedPlan(build_sampler, draws_per_epoch=len(mixture), drops_last=training.dataloader_drop_last, log=log)


def _build_cost(model: InternVLForTraining) -> SampleCost:
    learning = find_learning_parts((name, parameter.requires_grad) for name, parameter in model.named_parameters())
    return build_sample_cost(
        ModelShape.from_config(model.config),
        **learning,
        # Whatever the arguments say: a stage that is short of memory must be able to switch it on, and keep its packs.
        is_checkpointed=True,
    )


def _ask_rank_zero(decide: Callable[[], _Answer]) -> _Answer:
    """Decide once for all: sums of floats differ in the last bit between kinds of processor, and so would packs."""
    if not dist.is_initialized():
        return decide()
    answers: list[Any] = [decide() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(answers)
    answer: _Answer = answers[0]
    return answer


def list_data_values(arguments: Arguments) -> Mapping[str, Any]:
    """List the arguments that say how records become tokens and tiles, by name."""
    return {**vars(arguments.data), **vars(arguments.extension)}


def _allow_open_files() -> None:
    """Raise the limit on open files as far as allowed: each data set holds five in each process."""
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
