"""The meta file: which datasets a stage trains on, and how much of each.

One JSON object, a key per dataset. Strict: a key or a value that is not understood is an error,
because a misspelt `repeat_time` trains on the wrong mixture without a word. Relative paths are
resolved against the meta file's own folder. Standard library and pydantic only, so that flows can
check and fingerprint data without torch.
"""

import difflib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from internvl_core.checkpoint.manifest import hash_file
from internvl_core.contract import digest_json
from internvl_core.errors import DataError


class DatasetEntry(BaseModel):
    """One dataset as the meta file writes it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    root: str
    annotation: str
    data_augment: bool = False
    # Above 1,000 passes it is a slip of the keyboard, and the list of samples would not fit into memory.
    repeat_time: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] = 1.0
    max_dynamic_patch: Annotated[int, Field(ge=1)] | None = None
    length: Annotated[int, Field(ge=1)] | None = None


@dataclass(frozen=True)
class DatasetMeta:
    """One dataset, its paths resolved and known to exist."""

    name: str
    root: Path
    annotation: Path
    data_augment: bool
    repeat_time: float
    """Passes over the dataset; a fractional part is a subset of that share, drawn by the seed."""
    max_dynamic_patch: int | None
    """Most tiles per sample in this dataset; None means the stage's own bound."""

    def count_samples(self, num_records: int) -> tuple[int, int]:
        """Split `repeat_time` into whole passes and the size of the extra subset.

        A share too small for one record still gives one: no dataset of a mixture vanishes.
        """
        fraction, passes = math.modf(self.repeat_time)
        extra = round(fraction * num_records)
        return int(passes), max(extra, 1) if passes == 0 else extra


def load_meta(path: str | Path) -> list[DatasetMeta]:
    """Read a meta file and check it as a whole, its annotation files' existence and `length` included.

    Raises:
        DataError: names the file and every dataset that is wrong, all problems in one message.
    """
    path = Path(path)
    datasets: list[DatasetMeta] = []
    problems: list[str] = []
    for name, entry in _read_entries(path).items():
        try:
            datasets.append(_resolve_entry(path.parent, name, entry))
        except DataError as error:
            problems.append(f"{path}: dataset {name!r}: {error}")
    if problems:
        raise DataError("\n".join(problems))
    return datasets


def digest_meta(path: str | Path) -> str:
    """Sha256 (hex) over the meta file's content and every byte of its annotation files.

    Paths count as written, so a folder that moves as a whole keeps its digest. Media are not read:
    whoever replaces an image under its old name must say so by changing the annotation.
    """
    path = Path(path)
    entries = _read_entries(path)
    return digest_json(
        [
            {"name": meta.name, "entry": entries[meta.name].model_dump(), "annotation": hash_file(meta.annotation)}
            for meta in load_meta(path)
        ]
    )


def iter_record_lines(annotation: Path) -> Iterator[tuple[int, int, int]]:
    """Find the records of a jsonl file: line number (from 1), byte offset and size of each line that is not blank."""
    offset = 0
    with annotation.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, offset, len(line)
            offset += len(line)


def refuse_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object for `json.loads`, which by itself keeps the last of two equal keys silently.

    Raises:
        DataError: names the key.
    """
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise DataError(f"the key {twice!r} occurs twice in one object. Rename or remove one.")
    return content


def refuse_constant(literal: str) -> float:
    """Refuse what `json.loads` accepts beyond JSON: NaN, Infinity, -Infinity."""
    raise DataError(f"{literal} is not JSON. Write a number.")


def _read_entries(path: Path) -> dict[str, DatasetEntry]:
    if path.suffix != ".json":
        raise DataError(f"{path}: a meta file is a .json file that lists datasets; this is something else.")
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text, object_pairs_hook=refuse_duplicate_keys, parse_constant=refuse_constant)
    except FileNotFoundError:
        raise DataError(f"{path}: no such meta file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {error}.") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}:{error.colno}: not JSON: {error.msg}.") from None
    except RecursionError:
        raise DataError(f"{path}: nested too deeply; a meta file is one object of flat objects.") from None
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    if not isinstance(content, dict) or not content:
        raise DataError(f"{path}: must be an object with one key per dataset and at least one dataset.")
    problems = [problem for name, entry in content.items() for problem in _find_problems(name, entry)]
    if problems:
        raise DataError("\n".join(f"{path}: {problem}" for problem in problems))
    return {name: DatasetEntry.model_validate(entry) for name, entry in content.items()}


def _find_problems(name: str, entry: object) -> list[str]:
    where = f"dataset {name!r}"
    if not name or not name.isprintable() or name != name.strip():
        return [f"{where}: a name must be printable and must not begin or end with a space."]
    if not isinstance(entry, dict):
        return [f"{where}: must be an object with the keys {_known_keys()}."]
    problems = []
    for key in entry.keys() - DatasetEntry.model_fields.keys():
        nearest = difflib.get_close_matches(key, DatasetEntry.model_fields, n=1, cutoff=0)
        problems.append(f"{where}: unknown key {key!r}. Did you mean {nearest[0]!r}? Known: {_known_keys()}.")
    try:
        DatasetEntry.model_validate({key: value for key, value in entry.items() if key in DatasetEntry.model_fields})
    except ValidationError as error:
        for detail in error.errors():
            got = "" if detail["type"] == "missing" else f" Got {detail['input']!r}."
            problems.append(f"{where}: {detail['loc'][0]}: {detail['msg']}.{got}")
    return problems


def _known_keys() -> str:
    return ", ".join(DatasetEntry.model_fields)


def _resolve_entry(folder: Path, name: str, entry: DatasetEntry) -> DatasetMeta:
    for field in ("root", "annotation"):
        if "://" in getattr(entry, field):
            raise DataError(
                f"{field} {getattr(entry, field)!r}: remote data is not built yet. Copy it to a local disk."
            )
    root, annotation = folder / entry.root, folder / entry.annotation
    hint = f"Relative paths start at the meta file's folder, {folder.resolve()}."
    if not root.is_dir():
        raise DataError(f"root {root} is not a directory. {hint}")
    if annotation.suffix != ".jsonl" or not annotation.is_file():
        raise DataError(f"annotation {annotation} is not a .jsonl file. {hint}")
    if entry.length is not None:
        num_records = sum(1 for _ in iter_record_lines(annotation))
        if num_records != entry.length:
            raise DataError(
                f"length is {entry.length}, but {annotation} has {num_records} records. Correct one of them."
            )
    return DatasetMeta(
        name=name,
        root=root,
        annotation=annotation,
        data_augment=entry.data_augment,
        repeat_time=entry.repeat_time,
        max_dynamic_patch=entry.max_dynamic_patch,
    )
