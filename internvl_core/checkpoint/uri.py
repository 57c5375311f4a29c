"""Which addresses a store or a checkpoint may have, and their one normal form.

URIs are `str` everywhere: `pathlib` would fold the double slash. Nothing here repeats what an
address carries before an `@` or after a `?`: those are secrets more often than not.
"""

import importlib
import posixpath
import re

import fsspec
from fsspec.registry import known_implementations

from internvl_core.errors import ArgumentError

FILE_PREFIX = "file://"
SFTP_PREFIX = "sftp://"
S3_PREFIXES = ("s3://", "s3a://")

_WITH_PROTOCOL = re.compile(r"(?P<protocol>[A-Za-z][A-Za-z0-9+.-]*)(?P<separator>://|::)(?P<rest>.*)", re.DOTALL)
# Of a store: every protocol whose exclusive creation is known to be one, of those that fsspec brings. Never http, by
# which a URI could reach whatever this machine can, nor one that only wraps another.
STORE_PROTOCOLS = {"file", "memory", "s3", "s3a", "gs", "gcs", "az", "abfs", "sftp"}
# No server or emulator that keeps this promise could be run against our tests.
UNVERIFIED_PROTOCOLS = {"gs", "gcs"}
_BUCKETS = {"s3", "s3a", "gs", "gcs"}
"""Protocols whose address begins with a plain name, not with a host and port."""

# The extra of our distribution that installs a protocol's fsspec package.
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "az": "az", "abfs": "az", "sftp": "sftp"}


def is_checkpoint_uri(text: str) -> bool:
    """Tell an address with a protocol from a local folder or the id of a model on the hub."""
    return _WITH_PROTOCOL.match(text) is not None


def normalize_uri(text: str) -> str:
    """Check an address and give it its normal form: with a protocol, without a slash at the end.

    Raises:
        ArgumentError: a relative path, an unknown protocol or one whose package is not installed, a chain of
            protocols, credentials or a query.
    """
    if "::" in text:
        raise ArgumentError("A store URI with '::' chains protocols, which is not supported. Give one plain URI.")
    match = _WITH_PROTOCOL.match(text)
    protocol, rest = (match["protocol"].lower(), match["rest"]) if match else ("file", text)
    if protocol in {"file", "local"}:
        if not rest.startswith("/"):
            raise ArgumentError(
                f"{text!r} is a relative path. Give an absolute path or a URI such as s3://bucket/runs."
            )
        return FILE_PREFIX + "/" + posixpath.normpath(rest).lstrip("/")
    rest = rest.rstrip("/")
    authority = rest.partition("/")[0]
    if "@" in authority:
        raise ArgumentError(
            f"{protocol}://...@{authority.rpartition('@')[2]} carries credentials. Take them out of the URI: "
            "the environment or the configuration files of the store's SDK are the place for them."
        )
    if ":" in authority and protocol in _BUCKETS:
        # Of a password with a slash in it, which the check above does not see.
        raise ArgumentError(f"{protocol}://{authority.partition(':')[0]}:... has a colon. Give the name of a bucket.")
    if "?" in rest or "#" in rest:
        raise ArgumentError(f"{protocol}://{authority} carries a query or a fragment. Give the plain address.")
    if any(part in {".", ".."} for part in rest.split("/")):
        raise ArgumentError(f"{text} contains '.' or '..' as a folder. Write the address out.")
    _check_protocol(protocol)
    return f"{protocol}://{rest}"


def normalize_store_uri(text: str) -> str:
    """Check the address of a store, which more is asked of than of a folder to read from; else as `normalize_uri`."""
    # Before its package is looked for: what cannot be a store need not be installed.
    protocol = text.partition("://")[0].lower() if "://" in text and "::" not in text else "file"
    if protocol != "local" and protocol not in STORE_PROTOCOLS and protocol in known_implementations:
        known = ", ".join(sorted(STORE_PROTOCOLS))
        raise ArgumentError(f"{protocol}:// cannot be a checkpoint store. Choose another store: {known} can.")
    return normalize_uri(text)


def _check_protocol(protocol: str) -> None:
    try:
        fsspec.get_filesystem_class(protocol)
        if protocol == "sftp":
            # fsspec would be content with paramiko, whose creation is not exclusive.
            importlib.import_module("sshfs")
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        remedy = f"pip install 'internvl-pipeline[{extra}]'" if extra else str(error)
        raise ArgumentError(f"{protocol}:// needs a package that is not installed: {remedy}") from error
    except ValueError as error:
        raise ArgumentError(
            f"Unknown protocol {protocol}://. Known: file, s3, gs, az, memory, ... (fsspec)."
        ) from error
