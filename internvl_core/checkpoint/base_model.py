"""What an adapter was trained over, and the file in its folder that says so. No weights here."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from internvl_core.contract import write_json_atomically
from internvl_core.errors import ArgumentError

BASE_FILE = "base_checkpoint.json"

Kind = Literal["checkpoint", "folder", "hub"]

_KEYS: dict[Kind, tuple[str, str]] = {
    "checkpoint": ("uri", "digest"),
    "folder": ("folder", "digest"),
    "hub": ("hub_id", "revision"),
}


@dataclass(frozen=True)
class BaseModel:
    """A model that does not change: a committed checkpoint, a folder with a known content, a revision on the hub."""

    kind: Kind
    name: str
    """URI of the checkpoint; absolute path or URI of the folder; hub id."""
    digest: str
    """Of the manifest; of all files; the hub's commit."""


def write_base(folder: Path, base: BaseModel) -> None:
    """Note in an adapter's folder what it belongs to."""
    name, digest = _KEYS[base.kind]
    write_json_atomically(folder / BASE_FILE, {name: base.name, digest: base.digest})


def get_base(folder: Path) -> BaseModel:
    """Get what an adapter was trained over.

    Raises:
        ArgumentError: the folder does not say.
    """
    try:
        return read_base((folder / BASE_FILE).read_bytes(), where=str(folder / BASE_FILE))
    except FileNotFoundError:
        raise ArgumentError(
            f"{folder} holds an adapter without {BASE_FILE}, so nobody knows what it was trained over. Give the folder "
            "that the stage committed, or merge it with PEFT into the model you know it belongs to."
        ) from None


def read_base(content: bytes, *, where: str) -> BaseModel:
    """Read the content of a `BASE_FILE`.

    Raises:
        ArgumentError: it is none.
    """
    try:
        given = json.loads(content)
        kind, (name, digest) = next(row for row in _KEYS.items() if row[1][0] in given)
        return BaseModel(kind, str(given[name]), str(given[digest]))
    except (ValueError, KeyError, TypeError, StopIteration) as error:
        raise ArgumentError(
            f"{where}: does not say what the adapter was trained over. Fetch the adapter again."
        ) from error
