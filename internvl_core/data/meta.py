"""The meta file: which data sets a stage trains on, and how much of each.

One JSON object, a key per data set. Strict: a key or a value that is not understood is an error,
because a misspelt `repeat_time` trains on the wrong mixture without a word. Relative paths are
resolved against the meta file's own folder. Standard library, pydantic and fsspec only, so that
flows can check and fingerprint data without torch.
"""

import difflib
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from internvl_core.contract import digest_json
from internvl_core.data.annotation import digest_annotation, exists, fetch_annotation
from internvl_core.data.media_root import NO_LETTER, open_root
from internvl_core.data.strict_json import STRICT_JSON, shorten
from internvl_core.data.templates import get_template
from internvl_core.errors import ArgumentError, DataError

_MAX_META_BYTES = 16 << 20
_MAX_NAME_LETTERS = 200
# More than anybody reads at once; the others show when these are mended.
_MAX_PROBLEMS = 20


class DatasetEntry(BaseModel):
    """One data set as the meta file writes it: the original's keys, then ours."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    root: Annotated[str, Field(max_length=4096)]
    annotation: Annotated[str, Field(max_length=4096)]
    data_augment: bool = False
    # Above 1,000 passes it is a slip of the keyboard.
    repeat_time: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] = 1.0
    max_dynamic_patch: Annotated[int, Field(ge=1, le=1024)] | None = None
    length: Annotated[int, Field(ge=1)] | None = None

    conv_style: str | None = None
    system_prompt: str | None = None
    weight: Annotated[float, Field(ge=0.001, le=1000, allow_inf_nan=False)] = 1.0
    ignore_keys: tuple[str, ...] = Field(default=(), strict=False)


@dataclass(frozen=True)
class DatasetMeta:
    """One data set, its paths resolved and known to exist."""

    name: str
    root: str
    """Folder of the media: an absolute path or an fsspec URI."""
    annotation: str
    """The jsonl file: an absolute path or an fsspec URI."""
    data_augment: bool = False
    repeat_time: float = 1.0
    """Passes over the data set; a fractional part is a subset of that share, drawn by the seed."""
    max_dynamic_patch: int | None = None
    """Most tiles per sample in this data set; None means the stage's own bound."""
    length: int | None = None
    """Records the file must have; None leaves them uncounted."""
    conv_style: str | None = None
    """None means the stage's own, here and in `system_prompt`."""
    system_prompt: str | None = None
    weight: float = 1.0
    """Draws relative to the data set's size: at 2 it is used up twice as early in the epoch."""
    ignore_keys: tuple[str, ...] = ()
    """Keys of its records that are notes, `*` for any."""

    def count_samples(self, num_records: int) -> tuple[int, int]:
        """Split `repeat_time` into whole passes and the size of the extra subset.

        A share too small for one record still gives one: no data set of a mixture vanishes.
        """
        fraction, passes = math.modf(self.repeat_time)
        extra = round(fraction * num_records)
        return int(passes), max(extra, 1) if passes == 0 and num_records else extra


def load_meta(path: str | Path) -> list[DatasetMeta]:
    """Read a meta file and check it as a whole, the existence of roots and annotation files included.

    Raises:
        DataError: names the file and every data set that is wrong, all problems in one message.
    """
    path = _find_file(path)
    datasets: list[DatasetMeta] = []
    problems: list[str] = []
    for name, entry in _read_entries(path).items():
        try:
            datasets.append(_resolve_entry(path.parent.absolute(), name, entry))
        except (DataError, ArgumentError) as error:
            problems.append(f"{path}: dataset {name!r}: {error}")
    if problems:
        raise DataError("\n".join(problems))
    return datasets


def digest_meta(path: str | Path, cache_dir: Path) -> str:
    """Sha256 (hex) over the meta file's content and every byte of its annotation files.

    Paths count as written, so a folder that moves as a whole keeps its digest. Media are not read:
    whoever replaces an image under its old name must say so by changing the annotation.
    """
    path = _find_file(path)
    entries = _read_entries(path)
    return digest_json(
        [
            {
                "name": meta.name,
                "entry": entries[meta.name].model_dump(exclude_defaults=True),
                "annotation": digest_annotation(fetch_annotation(meta.annotation, cache_dir), cache_dir)[0],
            }
            for meta in load_meta(path)
        ]
    )


def _find_file(path: str | Path) -> Path:
    protocol, separator, _ = str(path).partition("://")
    if separator:
        # Not repeated: it may carry a password.
        raise DataError(f"{protocol}://...: a meta file is a local .json file. Annotations and media may have a URI.")
    return Path(path)


def _read_entries(path: Path) -> dict[str, DatasetEntry]:
    if path.suffix != ".json":
        raise DataError(f"{path}: a meta file is a .json file that lists data sets; this is something else.")
    try:
        # A pipe would never end, a device even less.
        if path.exists() and not path.is_file():
            raise DataError("is not a regular file.")
        if path.stat().st_size > _MAX_META_BYTES:
            raise DataError(f"larger than {_MAX_META_BYTES >> 20} MiB; a meta file lists data sets, not records.")
        text = path.read_text(encoding="utf-8-sig")
        content = STRICT_JSON.decode(text)
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
    except ValueError:
        raise DataError(f"{path}: holds a number of thousands of digits.") from None
    if not isinstance(content, dict) or not content:
        raise DataError(f"{path}: must be an object with one key per data set and at least one data set.")
    found = (f"{path}: {problem}" for name, entry in content.items() for problem in _iter_problems(name, entry))
    problems = list(itertools.islice(found, _MAX_PROBLEMS))
    if problems:
        raise DataError("\n".join(problems))
    return {name: DatasetEntry.model_validate(entry) for name, entry in content.items()}


def _iter_problems(name: str, entry: object) -> Iterator[str]:
    where = f"dataset {shorten(name)}"
    if not name or not name.isprintable() or name != name.strip() or len(name) > _MAX_NAME_LETTERS:
        yield f"{where}: a name must be printable, of at most {_MAX_NAME_LETTERS} letters, with no space at its ends."
        return
    if not isinstance(entry, dict):
        yield f"{where}: must be an object with the keys {_known_keys()}."
        return
    for key in entry.keys() - DatasetEntry.model_fields.keys():
        nearest = difflib.get_close_matches(key[:_MAX_NAME_LETTERS], DatasetEntry.model_fields, n=1, cutoff=0)
        yield f"{where}: unknown key {shorten(key)}. Did you mean {nearest[0]!r}? Known: {_known_keys()}."
    try:
        DatasetEntry.model_validate({key: value for key, value in entry.items() if key in DatasetEntry.model_fields})
    except ValidationError as error:
        for detail in error.errors():
            got = "" if detail["type"] == "missing" else f" Got {shorten(detail['input'])}."
            yield f"{where}: {detail['loc'][0]}: {detail['msg']}.{got}"
    for key in ("root", "annotation"):
        value = entry.get(key)
        if isinstance(value, str) and NO_LETTER.search(value):
            yield f"{where}: {key}: {shorten(value)} holds a control character or half a surrogate pair. Rename it."


def _known_keys() -> str:
    return ", ".join(DatasetEntry.model_fields)


def _resolve_entry(folder: Path, name: str, entry: DatasetEntry) -> DatasetMeta:
    if entry.conv_style is not None:
        get_template(entry.conv_style)
    values: dict[str, Any] = entry.model_dump()
    values["root"] = _resolve_path(folder, entry.root)
    values["annotation"] = _resolve_path(folder, entry.annotation)
    hint = "" if "://" in entry.root else f" Relative paths start at the meta file's folder, {folder}."
    if not values["annotation"].endswith(".jsonl"):
        raise DataError(f"annotation {values['annotation']} is not a .jsonl file.{hint}")
    if not open_root(values["root"]).exists():
        raise DataError(f"root {values['root']} is not a directory.{hint}")
    if not exists(values["annotation"]):
        raise DataError(f"annotation {values['annotation']} is not a file.{hint}")
    return DatasetMeta(name=name, **values)


def _resolve_path(folder: Path, value: str) -> str:
    return value if "://" in value or "::" in value else str(folder / value)
