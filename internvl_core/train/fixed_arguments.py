"""Arguments that the trainer decides itself, whatever was given."""

import math

from internvl_core.arguments import Arguments

_TIMEOUT_MARGIN_S = 60


def fix_arguments(arguments: Arguments, *, save_budget_s: float) -> None:
    """Set what transformers' Trainer would decide otherwise, and how long collectives wait.

    Args:
        arguments: changed in place, before `prepare_for_launch`.
        save_budget_s: of the stage; 0 for a run by hand.
    """
    training = arguments.training
    training.remove_unused_columns = False
    training.label_names = ["labels"]
    # Trainer would remove checkpoints by number and time, sent or not, whole or not; what stays is ours to say.
    training.save_total_limit = None
    if training.disable_tqdm is None:
        # The log is a file, and metrics.jsonl is what progress is shown from.
        training.disable_tqdm = True
    # A step that is not finite is left out, seen and counted, not replaced in the running mean (F7).
    training.logging_nan_inf_filter = False
    # Counted by the step meter, which tells all ranks in one all-reduce a step.
    training.include_num_input_tokens_seen = "no"
    # The step sampler begins where the checkpoint stands.
    training.ignore_data_skip = True
    # Trainer would switch it on a second time, in the reentrant kind.
    arguments.model.grad_checkpoint |= bool(training.activation_checkpointing)
    training.activation_checkpointing = False
    if training.ddp_find_unused_parameters is None:
        training.ddp_find_unused_parameters = False
    # As long as the supervisor waits: rank 0 may be fetching, saving or waiting for the store.
    extension = arguments.extension
    longest_s = max(extension.setup_limit_s, extension.stall_limit_s, save_budget_s)
    training.ddp_timeout = max(training.ddp_timeout, math.ceil(longest_s) + _TIMEOUT_MARGIN_S)
