"""This process's client of S3, set up as AWS's own tools are: by the AWS_* variables and the files in ~/.aws."""

import functools
import os
import threading
from pathlib import Path
from typing import Any

from botocore.config import Config
from botocore.session import Session

from internvl_core.checkpoint.remote_backend import S3_CONFIG

_MAX_CONNECTIONS = 32
# Not for correctness: a dozen threads that build one client each take a second and 150 MB.
_LOCK = threading.Lock()
_FILES = {"AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials", "AWS_CONFIG_FILE": "~/.aws/config"}


def open_client() -> Any:
    """Get the client for the settings of this moment; credentials renewed in a file or a variable make a new one."""
    variables = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
    files = tuple(_tell_version(os.environ.get(name, default)) for name, default in _FILES.items())
    # A forked child does not share its parent's sockets.
    with _LOCK:
        return _build_client(os.getpid(), variables, files)


@functools.lru_cache(maxsize=4)
def _build_client(_process: int, _variables: tuple[tuple[str, str], ...], _files: tuple[int, ...]) -> Any:
    config = Config(
        max_pool_connections=_MAX_CONNECTIONS,
        # What arrives is judged by our own digests: to botocore a rotten object is an error like an outage, for which
        # nobody would go back to an older checkpoint.
        response_checksum_validation="when_required",
        **S3_CONFIG,
    )
    return Session().create_client("s3", config=config)


def _tell_version(path: str) -> int:
    try:
        return Path(path).expanduser().stat().st_mtime_ns
    except OSError:
        return 0
