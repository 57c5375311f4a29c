"""What operating systems and cloud SDKs raise, said in the words of the error tree."""

import errno
import os
import re
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
    ("asyncssh", "Error"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("azure.core.exceptions", "AzureError"),
)
# What says that the credentials are at fault, and not the store: classes of errors, and codes in a store's answer.
_CREDENTIAL_ERRORS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "TokenRetrievalError",
    "UnauthorizedSSOTokenError",
    "SSOTokenLoadError",
    "LoginRefreshRequired",
    "ClientAuthenticationError",
    "DefaultCredentialsError",
    "RefreshError",
    "PermissionDenied",
    "HostKeyNotVerifiable",
}
_CREDENTIAL_CODES = {
    "AccessDenied",
    "AllAccessDisabled",
    "AuthenticationFailed",
    "AuthorizationFailure",
    "ExpiredToken",
    "ExpiredTokenException",
    "Forbidden",
    "InvalidAccessKeyId",
    "InvalidToken",
    "RequestExpired",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
    "UnrecognizedClientException",
    "401",
    "403",
}
_FULL_ERRORS = {"SFTPNoSpaceOnFilesystem", "SFTPQuotaExceeded"}
# User and password of an endpoint, and what signs a link.
_SECRETS = re.compile(
    r"(?<=://)[^/@\s]+(?=@)|(?<=[?&])[\w-]*(?:sig|signature|token|key|credential)[\w-]*=[^&\s'\"]+", re.IGNORECASE
)


class SyncFailed(OSError):
    """The disk did not keep what was written. To ask again is no use: the kernel has forgotten what was lost."""


def sync_file(descriptor: int) -> None:
    """Wait until a file or a folder is on the disk.

    Raises:
        SyncFailed: it is not.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise SyncFailed(error.errno, error.strerror) from error


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
            raise _full(action, error) from error
        raise _unavailable(action, error) from error
    except _loaded_sdk_errors() as error:
        if type(error).__name__ in _FULL_ERRORS or "No space left on device" in str(error):
            raise _full(action, error) from error
        raise _unavailable(action, error) from error


def _full(action: str, error: Exception) -> DiskFull:
    return DiskFull(f"{action} failed: {_tell_cause(error)}. Make room and run again.")


def _unavailable(action: str, error: Exception) -> StoreUnavailable:
    # s3fs makes a PermissionError of what S3 said.
    if _is_about_credentials(error) or _is_about_credentials(error.__cause__):
        return StoreUnavailable(
            f"{action} failed: the store refuses the credentials, or there are none: {_tell_cause(error)}. Renew them, "
            "check that they may read, list and write there, and run again."
        )
    return StoreUnavailable(f"{action} failed: {_tell_cause(error)}.")


def _is_about_credentials(error: BaseException | None) -> bool:
    answer = getattr(error, "response", None)
    codes = {
        # botocore keeps the whole answer, Azure and Google single fields.
        str(answer.get("Error", {}).get("Code") if isinstance(answer, dict) else None),
        str(getattr(error, "error_code", None)),
        str(getattr(error, "status_code", None)),
        str(getattr(error, "code", None)) if type(error).__name__ == "HttpError" else "",
    }
    return type(error).__name__ in _CREDENTIAL_ERRORS or not codes.isdisjoint(_CREDENTIAL_CODES)


def _tell_cause(error: BaseException) -> str:
    """Put an exception on one line without a full stop, its class first where the text alone says little."""
    text = _SECRETS.sub("***", " ".join(str(error).split())).rstrip(".")
    return text if isinstance(error, OSError) and text else f"{type(error).__name__}: {text}".rstrip(": ")


def _loaded_sdk_errors() -> tuple[type[Exception], ...]:
    return tuple(getattr(sys.modules[module], name) for module, name in _SDK_ERRORS if module in sys.modules)
