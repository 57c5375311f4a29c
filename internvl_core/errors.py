"""Every way the pipeline can fail, with its exit code and whether a retry can help.

    InternVLError                        70  a fault of our own (also any exception without a class here)
    |- ArgumentError                     64  the recipe or the arguments are wrong
    |- DataError                         65  a record is wrong (file:line)
    |  `- MediaError                     65  an image or a video cannot be read (path)
    |- CheckpointError
    |  |- CheckpointNotFound             80
    |  |- CheckpointCorrupt              80
    |  |- StoreUnavailable               69  retried
    |  |- LeaseHeld                      73
    |  |- DiskFull                       74
    |  `- Fenced                         76
    |- GateNotPassed                     65  a stage trained, but its held-out score is below the recipe's gate
    `- StageError                            read from a stage's failure.json
       |- OutOfMemory                    71
       |- Preempted                      75  retried: stopped on request; the message says what is committed
       |- Stalled                        77  retried
       |- NonFinite                      78
       |- WorkerLost                     79  retried: a process died without a word
       `- NoProgress                     93

A message says where, what is, what should be and what to do. Standard library only: the
supervisor and the control plane read these classes without torch.
"""

import enum
from collections.abc import Sequence


class InternVLError(Exception):
    """Base of all; raised itself only for a fault in this code."""

    exit_code = 70
    is_retryable = False
    step: int | None = None
    sample_ids: Sequence[str] = ()
    """`<data set>:<line>` of the samples it is about."""


class ArgumentError(InternVLError):
    """The recipe or the arguments are wrong; nothing was started."""

    exit_code = 64


class Reason(enum.StrEnum):
    """Why a record is not trained on; what an index, a quarantine file and the table of a check say."""

    RECORD = "record"
    """Keys or values of the record are not what the schema says."""
    NOT_JSON = "not_json"
    ENCODING = "encoding"
    LINE_TOO_LONG = "line_too_long"
    TURNS = "turns"
    """Roles are unknown, do not alternate, or begin or end with the wrong side."""
    NO_TARGET = "no_target"
    """There is nothing to learn: no answer, or none before the end of the sequence."""
    TAGS = "tags"
    """The placeholders in the text are not as many as the media."""
    CONTROL_TOKEN = "control_token"  # noqa: S105
    """The text spells a token that is not text."""
    PATH = "path"
    """A medium's path leads out of the data set's root, or is no path at all."""
    MISSING = "missing"
    MEDIA = "media"
    """A medium cannot be decoded, or is of a kind that is not read."""
    MEDIA_SIZE = "media_size"
    """A medium is absurdly small, large, long or thin."""
    SIZE_MISMATCH = "size_mismatch"
    """The medium makes another number of tiles than the record's width and height say."""
    TOO_LONG = "too_long"
    """More tokens than max_seq_length; left out by policy, not a fault of the record."""
    TOO_MANY_TILES = "too_many_tiles"
    """More tiles than num_images_expected, which is what a pack holds; left out by policy as well."""


class DataError(InternVLError):
    """A meta file, an annotation or a medium is wrong; names file and line."""

    exit_code = 65

    def __init__(self, message: str, *, reason: Reason = Reason.RECORD) -> None:
        super().__init__(message)
        self.reason = reason


class MediaError(DataError):
    """An image or a video is missing, broken, too large or of a kind that is not read; names its path."""

    def __init__(self, message: str, *, reason: Reason = Reason.MEDIA) -> None:
        super().__init__(message, reason=reason)


class CheckpointError(InternVLError):
    """A checkpoint could not be written, found or trusted."""


class CheckpointNotFound(CheckpointError):
    """No commit record: the checkpoint does not exist."""

    exit_code = 80


class CheckpointCorrupt(CheckpointError):
    """The bytes differ from the manifest, or the manifest from its commit record."""

    exit_code = 80


class StoreUnavailable(CheckpointError):
    """The store does not answer, refuses, or cannot create a file exclusively."""

    exit_code = 69
    is_retryable = True


class LeaseHeld(CheckpointError):
    """Another living run owns this stage."""

    exit_code = 73


class DiskFull(CheckpointError):
    """No room for the checkpoint."""

    exit_code = 74


class Fenced(CheckpointError):
    """A newer owner took over; this process may not write any more."""

    exit_code = 76


class GateNotPassed(InternVLError):
    """The stage is trained and committed, but scores below the gate of its recipe."""

    exit_code = 65


class StageError(InternVLError):
    """A stage's subprocess failed; read from its failure.json."""

    def __init__(self, message: str, *, step: int | None = None, sample_ids: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.step = step
        self.sample_ids = sample_ids


class OutOfMemory(StageError):
    """GPU or host memory ran out."""

    exit_code = 71


class Preempted(StageError):
    """Stopped on request: with a new checkpoint, or before there was anything to save, or not waited for."""

    exit_code = 75
    is_retryable = True


class Stalled(StageError):
    """No progress within the watchdog's limit."""

    exit_code = 77
    is_retryable = True


class NonFinite(StageError):
    """Loss or gradient norm is NaN or infinite."""

    exit_code = 78


class WorkerLost(StageError):
    """A process died by a signal and left no failure.json."""

    exit_code = 79
    is_retryable = True


class NoProgress(StageError):
    """Retried, three times at the most, without a newer commit; names the reason of each try."""

    exit_code = 93


def find_tree_class(kind: type[BaseException]) -> type[InternVLError]:
    """Find the class of this tree that an exception counts as: who reads its name does not know other modules' own."""
    return next(
        (base for base in kind.__mro__ if issubclass(base, InternVLError) and base.__module__ == __name__),
        InternVLError,
    )


def find_error_class(name: str) -> type[InternVLError]:
    """Find the class that failure.json names; `InternVLError` for a name that is not in the tree."""
    todo: list[type[InternVLError]] = [InternVLError]
    while todo:
        candidate = todo.pop()
        if candidate.__name__ == name:
            return candidate
        todo.extend(candidate.__subclasses__())
    return InternVLError


def find_error_class_of_code(exit_code: int) -> type[InternVLError] | None:
    """Find the class whose exit code it is, the first in the tree; None where it is nobody's, or every fault's."""
    todo = InternVLError.__subclasses__()
    while todo:
        candidate = todo.pop(0)
        if candidate.exit_code == exit_code != InternVLError.exit_code:
            return candidate
        todo.extend(candidate.__subclasses__())
    return None
