"""How often a stage is tried again, and what its tries came to.

A retry helps as long as each one commits a newer checkpoint than those before; some in a row that
do not, three at the most, end the stage. The count is that of one run: it lives through Prefect's
retries, and a person or a schedule that runs the recipe again begins anew.
"""

from dataclasses import dataclass

from internvl_core.errors import InternVLError, NoProgress

MAX_RETRIES_WITHOUT_COMMIT = 3


@dataclass(frozen=True)
class FailedTry:
    """One try that ended in a way that a retry can help."""

    error: InternVLError
    reached: int | None
    """The last step that a rank told; None before the first."""
    committed: int | None
    """The newest committed step at its end."""

    @property
    def lost_steps(self) -> int:
        """How many of its steps had to be trained again."""
        return max(0, (self.reached or 0) - (self.committed or 0))

    def describe(self) -> str:
        """Say how it failed and what that cost, in a few words."""
        lost = f", {self.lost_steps} steps lost" if self.lost_steps else ""
        return f"{type(self.error).__name__}{_tell_step(self.reached)}{lost}"

    def __str__(self) -> str:
        # Where the log is stands in the error itself, for the last try.
        cause = str(self.error).partition(" Log: ")[0].rstrip(".")
        return f"{type(self.error).__name__}{_tell_step(self.reached)}: {cause}"


class StageTries:
    """The tries of one stage in one run; not a dataclass, so that Prefect hands on this very object."""

    def __init__(self, stage: str, num_retries: int) -> None:
        """Begin with no try.

        Args:
            stage: its name.
            num_retries: how many in a row may fail without a newer commit.
        """
        self._stage = stage
        self._num_retries = min(num_retries, MAX_RETRIES_WITHOUT_COMMIT)
        self._failed: list[FailedTry] = []
        self._all_failed: list[FailedTry] = []

    @property
    def failed(self) -> tuple[FailedTry, ...]:
        """All that failed, those before a newer commit too."""
        return tuple(self._all_failed)

    def note(self, error: InternVLError, *, reached: int | None, committed: int | None) -> InternVLError:
        """Note how a try failed, once, and return what is to be raised: the error, or that there is no progress.

        Args:
            error: what a retry may help.
            reached: the last step of the try; None if there was none.
            committed: the newest committed step; None if there is none, or if the store cannot say.
        """
        if self._failed and self._failed[-1].error is error:
            return error
        before = self._failed[-1].committed if self._failed else None
        if self._failed and (committed or -1) > (-1 if before is None else before):
            self._failed.clear()
        failed = FailedTry(error, reached, before if committed is None else committed)
        self._failed.append(failed)
        self._all_failed.append(failed)
        if len(self._failed) <= self._num_retries or self._num_retries == 0:
            return error
        tries = " ".join(f"Try {number}: {each}." for number, each in enumerate(self._failed, 1))
        return NoProgress(
            f"{self._stage}: retried {self._num_retries} times without a newer commit; {self._tell_newest()}. {tries} "
            "Remove the cause and run the recipe again: it resumes there."
        )

    def describe_retry(self, committed: int | None) -> str | None:
        """Say what the next try comes after and goes on from; None before the first."""
        if not self._failed:
            return None
        last = self._failed[-1]
        # The store may not have said.
        committed = last.committed if committed is None else committed
        lost = (last.reached or 0) - (committed or 0)
        start = "from the start" if committed is None else f"resuming from step {committed}"
        steps = f"; {lost} steps lost" if lost > 0 else ""
        return (
            f"{self._stage}: try {len(self._failed) + 1} of {self._num_retries + 1} after {type(last.error).__name__}"
            f"{_tell_step(last.reached)}, {start}{steps}"
        )

    def _tell_newest(self) -> str:
        committed = self._failed[-1].committed
        return "nothing is committed" if committed is None else f"the newest is step {committed}"


def _tell_step(step: int | None) -> str:
    return "" if step is None else f" at step {step}"
