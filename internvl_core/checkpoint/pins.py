"""What keeps commits from being collected as garbage.

    pins/<name>.json        created exclusively: a person keeps this checkpoint
    lease/<fence>.<nonce>.base      whoever takes a lease keeps its base until it has it

Handovers keep what they name as well.
"""

import logging
import re
import secrets

from internvl_core.checkpoint.backend import Backend, create_once, find_object
from internvl_core.checkpoint.commits import DATA_FOLDER, find_commit, get_save, read_manifest_in
from internvl_core.checkpoint.lease import LEASE_FOLDER
from internvl_core.checkpoint.record import pack_record, unpack_record
from internvl_core.contract import CheckpointRef
from internvl_core.errors import ArgumentError, CheckpointCorrupt, CheckpointNotFound

logger = logging.getLogger(__name__)

PINS_FOLDER = "pins"

_PIN_NAME = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)\.json")
_BASE_NAME = re.compile(r"(?P<fence>\d{6})\.[0-9a-f]+\.base")


def pin(backend: Backend, name: str, checkpoint: CheckpointRef) -> None:
    """Keep a checkpoint until it is unpinned; the same pin again does nothing.

    Raises:
        ArgumentError: the name cannot be one, or is taken by another checkpoint.
        CheckpointNotFound, CheckpointCorrupt: the checkpoint is not a committed one of this stage.
    """
    path = _pin_path(name)
    read_manifest_in(backend, checkpoint)
    if not create_once(backend, path, _pack_pin(backend, checkpoint)):
        raise ArgumentError(f"{backend.uri}/{path} pins another checkpoint. Choose another name, or unpin that.")
    if find_commit(backend, get_save(backend, checkpoint)) is None:
        backend.remove(path)
        raise CheckpointNotFound(f"{checkpoint.uri} was collected as garbage while it was being pinned.")


def unpin(backend: Backend, name: str) -> None:
    """Remove a pin.

    Raises:
        CheckpointNotFound: there is none of this name; lists those there are.
    """
    path = _pin_path(name)
    if find_object(backend, path) is None:
        names = ", ".join(_list_pin_names(backend)) or "none"
        raise CheckpointNotFound(f"{backend.uri}/{path} does not exist. Pins: {names}.")
    backend.remove(path)


def list_pins(backend: Backend) -> dict[str, CheckpointRef]:
    """List what people pinned, by name; a damaged pin is logged and left out."""
    pins = {}
    for name in _list_pin_names(backend):
        try:
            checkpoint = _read_pin(backend, _pin_path(name))
        except CheckpointCorrupt as error:
            logger.warning("Left out of the list: %s", error)
            continue
        if checkpoint:
            pins[name] = checkpoint
    return pins


def list_pinned(backend: Backend) -> dict[str, str]:
    """List the URIs of all checkpoints that pins keep, with the reason.

    Raises:
        CheckpointCorrupt: a pin is damaged, so nobody knows what it keeps.
    """
    pinned = {}
    for name in _list_pin_names(backend):
        if checkpoint := _read_pin(backend, _pin_path(name)):
            pinned[checkpoint.uri] = f"pinned as {name}"
    return pinned


def pin_base(backend: Backend, fence: int, checkpoint: CheckpointRef) -> str:
    """Keep the base of a lease that is about to be taken.

    Returns:
        The path of the pin, to be removed by whoever does not get the lease.
    """
    path = f"{LEASE_FOLDER}/{fence:06d}.{secrets.token_hex(4)}.base"
    create_once(backend, path, _pack_pin(backend, checkpoint))
    return path


def list_pinned_bases(backend: Backend) -> dict[str, tuple[int, str | None]]:
    """List the pins of bases by path: the fence of the lease, and the URI of what is kept (None: damaged)."""
    bases: dict[str, tuple[int, str | None]] = {}
    for name in backend.list_names(LEASE_FOLDER):
        if match := _BASE_NAME.fullmatch(name):
            path = f"{LEASE_FOLDER}/{name}"
            try:
                checkpoint = _read_pin(backend, path)
            except CheckpointCorrupt:
                checkpoint = None
            bases[path] = int(match["fence"]), checkpoint.uri if checkpoint else None
    return bases


def _list_pin_names(backend: Backend) -> list[str]:
    matches = [_PIN_NAME.fullmatch(name) for name in backend.list_names(PINS_FOLDER)]
    return sorted(match["name"] for match in matches if match)


def _pin_path(name: str) -> str:
    path = f"{name}.json"
    if not _PIN_NAME.fullmatch(path):
        raise ArgumentError(f"{name!r} cannot name a pin. Use letters, digits, '.', '_', '-'.")
    return f"{PINS_FOLDER}/{path}"


def _pack_pin(backend: Backend, checkpoint: CheckpointRef) -> bytes:
    return pack_record({"data": f"{DATA_FOLDER}/{get_save(backend, checkpoint)}", "digest": checkpoint.digest})


def _read_pin(backend: Backend, path: str) -> CheckpointRef | None:
    where = f"{backend.uri}/{path}"
    body = find_object(backend, path)
    if body is None:
        return None
    content = unpack_record(body, where=where)
    try:
        return CheckpointRef(f"{backend.uri}/{content['data']}", str(content["digest"]))
    except KeyError as error:
        raise CheckpointCorrupt(f"{where}: not a pin: {error} is missing. Remove it and pin again.") from error
