"""Small records that check themselves: one line with the sha256 of the body, then the body, JSON.

Commit records, handovers and manifests have this form, so a torn or rotten one is seen
without asking anything else.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from internvl_core.errors import CheckpointCorrupt


def pack_record(content: Mapping[str, Any]) -> bytes:
    """Serialise a record; equal content gives equal bytes, whatever the order of its keys."""
    body = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def unpack_record(record: bytes, *, where: str) -> dict[str, Any]:
    """Read a record back.

    Args:
        record: what the store holds.
        where: its URI, for the message.

    Raises:
        CheckpointCorrupt: a byte differs from what was written.
    """
    expected, newline, body = record.partition(b"\n")
    found = hashlib.sha256(body).hexdigest()
    if not newline or expected != found.encode():
        raise CheckpointCorrupt(
            f"{where}: damaged record of {len(record)} bytes: its body has sha256 {found[:16]}..., "
            f"its first line says {expected[:16].decode(errors='replace')!r}."
        )
    try:
        content = json.loads(body)
    except ValueError as error:
        raise CheckpointCorrupt(f"{where}: the record is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointCorrupt(f"{where}: the record is a {type(content).__name__}, not an object.")
    return content
