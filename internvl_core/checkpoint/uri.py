"""Which addresses a store or a checkpoint may have, and their one normal form.

URIs are `str` everywhere: `pathlib` would fold the double slash. Nothing here repeats what an
address carries before an `@` or after a `?`: those are secrets more often than not.
"""

import posixpath
import re

import fsspec

from internvl_core.errors import ArgumentError

FILE_PREFIX = "file://"

_WITH_PROTOCOL = re.compile(r"(?P<protocol>[A-Za-z][A-Za-z0-9+.-]*)(?P<separator>://|::)(?P<rest>.*)", re.DOTALL)
# The extra of our distribution that installs a protocol's fsspec package.
_EXTRAS = {"s3": "s3", "s3a": "s3"}


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
    if "?" in rest or "#" in rest:
        raise ArgumentError(f"{protocol}://{authority} carries a query or a fragment. Give the plain address.")
    if any(part in {".", ".."} for part in rest.split("/")):
        raise ArgumentError(f"{text} contains '.' or '..' as a folder. Write the address out.")
    _check_protocol(protocol)
    return f"{protocol}://{rest}"


def _check_protocol(protocol: str) -> None:
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        remedy = f"pip install 'internvl-pipeline[{extra}]'" if extra else str(error)
        raise ArgumentError(f"{protocol}:// needs a package that is not installed: {remedy}") from error
    except ValueError as error:
        raise ArgumentError(
            f"Unknown protocol {protocol}://. Known: file, s3, gs, az, memory, ... (fsspec)."
        ) from error
