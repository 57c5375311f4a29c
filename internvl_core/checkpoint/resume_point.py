"""Which checkpoint a person means by `resume_from_checkpoint`, and whether a stage may go on from it.

Going on with other arguments or other data would be neither the old training nor a new one, so it
is refused with what differs. What a stage depends on are its inputs: a mapping with the keys `entry`,
`trainer`, `arguments`, `data`, `components` and `start_from`, whose digest is its fingerprint.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from internvl_core.checkpoint.backend import open_backend
from internvl_core.checkpoint.commits import is_save_uri, read_manifest
from internvl_core.checkpoint.lineage import iter_verified, resolve_checkpoint
from internvl_core.checkpoint.manifest import CheckpointKind, Manifest
from internvl_core.contract import CheckpointRef
from internvl_core.errors import ArgumentError, CheckpointNotFound

INPUTS_KEY = "inputs"
"""In a manifest's info: what the fingerprint is the digest of."""

_DIGITS_SHOWN = 12
_MISSING = "(not given)"


def find_resume_point(uri: str) -> tuple[CheckpointRef, Manifest]:
    """Find the committed training checkpoint of a URI: a save's own, or the newest of a stage's directory.

    Raises:
        ArgumentError: it is one of final weights, which have no state to resume from.
        CheckpointNotFound: nothing is committed there.
        CheckpointCorrupt: it does not verify.
    """
    if is_save_uri(uri):
        checkpoint = resolve_checkpoint(uri)
    else:
        newest = next(iter_verified(open_backend(uri), CheckpointKind.TRAINING), None)
        if newest is None:
            raise CheckpointNotFound(
                f"{uri}: no checkpoint to resume from is committed there. Give the URI of one, as the log of its stage "
                "tells it, or that of its stage's directory."
            )
        checkpoint = newest.checkpoint
    manifest = read_manifest(checkpoint)
    if manifest.kind is not CheckpointKind.TRAINING:
        raise ArgumentError(
            f"{uri}: the final weights of step {manifest.step}, without optimizer and position in the data. Give a "
            "training checkpoint to resume from, or start another stage from these weights."
        )
    return checkpoint, manifest


def check_inputs_equal(
    checkpoint: CheckpointRef, manifest: Manifest, inputs: Mapping[str, Any], *, advice: str
) -> None:
    """Check that a checkpoint is of a training with these inputs; of a part of them where only a part is known.

    Args:
        inputs: of the stage that is to go on; keys that only one side has are not compared.
        advice: what to do where they differ.

    Raises:
        ArgumentError: every difference, a line each.
    """
    written = manifest.info.get(INPUTS_KEY)
    if written is None:
        raise ArgumentError(
            f"{checkpoint.uri}: does not say with what it was trained; it is of an older version. {advice}"
        )
    lines = list(_iter_differences(written, inputs))
    if lines:
        head = f"{checkpoint.uri} is of another training. {advice}"
        raise ArgumentError("\n".join([head, *lines]))


def _iter_differences(written: Mapping[str, Any], present: Mapping[str, Any]) -> Iterator[str]:
    for key in written.keys() & present.keys():
        then, now = written[key], present[key]
        if not (isinstance(then, Mapping) and isinstance(now, Mapping)):
            then, now = {key: then}, {key: now}
        # Digests say only that something changed.
        kind = {"data": "other data, ", "components": "another model, ", "start_from": "another parent, "}.get(key, "")
        for name in sorted(then.keys() | now.keys()):
            values = [_show(side.get(name, _MISSING), is_digest=bool(kind)) for side in (then, now)]
            if then.get(name, _MISSING) != now.get(name, _MISSING):
                yield f"{name}: {kind}{values[0]} in the checkpoint, {values[1]} now"


def _show(value: Any, *, is_digest: bool) -> str:
    return str(value)[:_DIGITS_SHOWN] if is_digest or (isinstance(value, str) and value == _MISSING) else repr(value)
