"""Steps whose loss or gradient is not finite: never applied, counted, and after too many in a row the end.

A loss that is not finite makes its gradient so, and gradients are summed over the ranks: all of
them see it in the norm. DeepSpeed then applies nothing by itself; elsewhere the gradients are dropped,
and what has none an optimizer leaves as it is, with its moments.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from internvl_core.errors import NonFinite
from internvl_core.train.update import Update

logger = logging.getLogger(__name__)

MAX_SAMPLE_IDS = 256
"""Of a step, in failure.json; a step of packs may have thousands."""

_MAX_LOGGED_IDS = 20


class FiniteSteps(TrainerCallback, ExportableState):
    """Leave out steps that are not finite, on all ranks alike.

    Place it behind the ranks' consensus, which adds what all of them found. Its counts are kept in
    Trainer's own state, so that they are in every checkpoint.
    """

    def __init__(self, update: Update, *, max_in_a_row: int) -> None:
        self._update = update
        self._max_in_a_row = max_in_a_row
        self._norm: Tensor | float | None = None
        self._is_applied = False
        self._num_bad_losses = self._num_bad_norms = 0
        self._row: list[tuple[int, str]] = []
        self._suspects: list[str] = []
        self.skipped_steps = 0
        """Steps that were not applied because their loss or gradient was not finite."""
        self.scaler_skips = 0
        """Steps that fp16's scaler left out to find its scale."""
        self.is_skipped = False
        """Whether the newest step was not applied."""

    def watch_loss(self, loss: Tensor) -> Tensor:
        """Return the loss of a forward; where it is not finite, its gradient is not either.

        It need not be so by itself: that of an infinite cross entropy is.
        """
        is_finite = loss.detach().isfinite()
        self._update.forwards[-1].is_loss_finite = is_finite
        # 0, or NaN; and times 1 changes no bit. Without a question to the device.
        rest = loss.detach() - loss.detach()
        return loss * (1 + rest)

    def watch_norm(self, norm: Tensor | float | None, *, is_applied: bool) -> None:
        """Note the norm of the gradient of an update, over all ranks.

        Args:
            norm: None where DeepSpeed was told not to take it.
            is_applied: the optimizer has taken the step already, as DeepSpeed does behind a norm that is finite.
        """
        self._norm = norm
        self._is_applied = is_applied

    def take(self, device: torch.device) -> Tensor:
        """Take what this rank found: whether a loss was not finite, whether the gradient was not; int64 [2]."""
        losses = [forward.is_loss_finite for forward in self._update.forwards if forward.is_loss_finite is not None]
        is_loss_bad = ~torch.stack(losses).all() if losses else torch.zeros((), dtype=torch.bool, device=device)
        norm = torch.as_tensor(0.0 if self._norm is None else self._norm, device=device)
        return torch.stack([is_loss_bad, ~norm.isfinite()]).to(torch.int64)

    def add(self, sums: Sequence[int]) -> None:
        """Add what all ranks took together."""
        self._num_bad_losses, self._num_bad_norms = sums

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Trainer wants an entry to exist when it saves, which a checkpoint of an older version lacks.
        kept = state.stateful_callbacks.setdefault(type(self).__name__, self.state())["attributes"]
        self.skipped_steps = kept["skipped_steps"]
        self.scaler_skips = kept["scaler_skips"]
        self._row = [(step, cause) for step, cause in kept["row"]]

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **kwargs: Any,
    ) -> None:
        step = state.global_step + 1
        is_routine = bool(args.fp16) and not self._num_bad_losses
        self.is_skipped = bool(self._num_bad_losses or self._num_bad_norms) and not is_routine
        if not self.is_skipped:
            self.scaler_skips += bool(self._num_bad_norms)
            self._row.clear()
            self._suspects.clear()
            return
        self.skipped_steps += 1
        cause = "loss" if self._num_bad_losses else "gradient"
        self._row.append((step, cause))
        suspects = self._gather_suspects()
        self._suspects = _bound([*self._suspects, *suspects])
        if self._is_applied:
            raise self._describe(
                f"step {step}: the {cause} is not finite, and DeepSpeed has applied it: its configuration does not let "
                "it look. Take ZeRO stage 1, 2 or 3, and leave bf16.check_grad_overflow at true. Nothing after the "
                "last committed checkpoint is kept."
            )
        self._tell(step, cause, suspects)
        if len(self._row) >= self._max_in_a_row:
            raise self._describe(self._tell_row())
        self._drop(args, optimizer, lr_scheduler)

    def take_skipped(self) -> bool:
        """Say once whether the newest step was not applied."""
        is_skipped, self.is_skipped = self.is_skipped, False
        return is_skipped

    def state(self) -> dict[str, Any]:
        """Give what a checkpoint keeps."""
        attributes = {"skipped_steps": self.skipped_steps, "scaler_skips": self.scaler_skips, "row": self._row}
        return {"args": {}, "attributes": attributes}

    @property
    def counters(self) -> Mapping[str, int]:
        """`skipped_steps`, and, where fp16's scaler left out any, `scaler_skips`."""
        return {
            "skipped_steps": self.skipped_steps,
            **({"scaler_skips": self.scaler_skips} if self.scaler_skips else {}),
        }

    def _drop(self, args: TrainingArguments, optimizer: Any, lr_scheduler: Any) -> None:
        """Make the optimizer's step one without an effect, and let the schedule go on."""
        # DeepSpeed has cleared them; its wrapper does nothing here.
        optimizer.zero_grad(set_to_none=True)
        if args.deepspeed or args.fp16:
            # Neither DeepSpeed's engine nor Trainer moves it with a step that the optimizer left out by itself.
            getattr(lr_scheduler, "scheduler", lr_scheduler).step()

    def _gather_suspects(self) -> list[str]:
        """Gather the ids of the forwards whose loss is not finite, or, if all are, those of the whole step."""
        forwards = self._update.forwards
        own = [list(f.sample_ids) for f in forwards if not self._num_bad_losses or not _is_loss_finite(f)]
        ids = _bound([sample_id for forward in own for sample_id in forward])
        if not dist.is_initialized():
            return ids
        gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, ids)
        return _bound(sample_id for rank in gathered for sample_id in rank)

    def _tell(self, step: int, cause: str, suspects: Sequence[str]) -> None:
        if dist.is_initialized() and dist.get_rank() != 0:
            return
        shown = ", ".join(suspects[:_MAX_LOGGED_IDS])
        more = f" and {len(suspects) - _MAX_LOGGED_IDS} more" if len(suspects) > _MAX_LOGGED_IDS else ""
        logger.warning(
            "Step %d is left out: its %s is not finite%s. %d of at most %d in a row. Its samples: %s%s",
            step,
            cause,
            f" on {self._num_bad_losses} ranks" if self._num_bad_losses > 1 else "",
            len(self._row),
            self._max_in_a_row,
            shown,
            more,
        )

    def _tell_row(self) -> str:
        steps = ", ".join(f"{step} ({cause})" for step, cause in self._row)
        names = Counter(sample_id.rpartition(":")[0] for sample_id in self._suspects)
        datasets = ", ".join(f"{name} ({count})" for name, count in names.most_common(5)) or "none"
        num_steps = "1 step" if len(self._row) == 1 else f"{len(self._row)} steps in a row"
        return (
            f"the loss or the gradient was not finite in {num_steps}, as many as "
            f"max_non_finite_steps allows: {steps}. None of them was applied. Their samples are in failure.json, of "
            f"the data sets {datasets}: look at them, lower learning_rate, or raise max_non_finite_steps."
        )

    def _describe(self, message: str) -> NonFinite:
        return NonFinite(message, step=self._row[-1][0], sample_ids=self._suspects)


def _is_loss_finite(forward: Any) -> bool:
    return forward.is_loss_finite is None or bool(forward.is_loss_finite)


def _bound(ids: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(ids))[:MAX_SAMPLE_IDS]
