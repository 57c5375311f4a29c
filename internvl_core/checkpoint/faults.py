"""What operating systems and cloud SDKs raise, said in the words of the error tree."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from internvl_core.errors import ArgumentError, DiskFull, StoreUnavailable

# Module and class of the SDKs' errors that are no OSError. Looked up among the loaded modules: an SDK
# that was never imported cannot have raised.
_SDK_ERRORS = (
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("aiohttp", "ClientError"),
)


@contextmanager
def translated(action: str, *, answers: tuple[type[OSError], ...] = ()) -> Iterator[None]:
    """Turn whatever a store raises into one of our errors.

    Args:
        action: the beginning of the message: "Writing s3://bucket/x".
        answers: errors that pass because the caller knows what they mean.
    """
    try:
        yield
    except answers:
        raise
    except (NotImplementedError, ValueError) as error:
        # A read-only protocol, an endpoint that is no URL: no retry makes these work.
        raise ArgumentError(f"{action} is not possible: {_tell_cause(error)}. Choose another store.") from error
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise DiskFull(f"{action} failed: {_tell_cause(error)}. Make room and run again.") from error
        raise StoreUnavailable(f"{action} failed: {_tell_cause(error)}.") from error
    except _loaded_sdk_errors() as error:
        raise StoreUnavailable(f"{action} failed: {_tell_cause(error)}.") from error


def _tell_cause(error: BaseException) -> str:
    """Put an exception on one line without a full stop, its class first where the text alone says little."""
    text = " ".join(str(error).split()).rstrip(".")
    return text if isinstance(error, OSError) and text else f"{type(error).__name__}: {text}".rstrip(": ")


def _loaded_sdk_errors() -> tuple[type[Exception], ...]:
    return tuple(getattr(sys.modules[module], name) for module, name in _SDK_ERRORS if module in sys.modules)
