"""Read command-line items into plain values with transformers' parser, without deciding anything yet."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import HfArgumentParser

from internvl_core.argument_renames import RENAMED
from internvl_core.argument_values import list_types

# An argv item cannot hold NUL, so it can mark the text after `--name=`: argparse of Python 3.11
# would drop the value `--`.
_MARK = "\0"


class TextParser(HfArgumentParser):  # type: ignore[misc]  # transformers is Any to mypy
    """Hugging Face's parser with the types left out: it finds the flags, the schema reads their values.

    So all problems of a command line are found, not only the first.
    """

    def __init__(self, dataclass_types: Sequence[type]) -> None:
        super().__init__(dataclass_types, add_help=False, allow_abbrev=False, exit_on_error=False)
        fields = {field.name for dataclass_type in dataclass_types for field in dataclasses.fields(dataclass_type)}
        for name in RENAMED:
            if name not in fields:
                self.add_argument(*dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]))

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        kept: dict[str, Any] = {key: settings[key] for key in ("action", "dest") if key in settings}
        if "action" not in kept:
            kept |= {"nargs": "*", "type": lambda text: text.removeprefix(_MARK)}
        action: argparse.Action = super().add_argument(*names, default=argparse.SUPPRESS, **kept)
        return action


def read_command_line(
    items: Sequence[str], dataclass_types: Sequence[type], properties: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Read `--name value`, `--name=value`, `--name` and `--no_name` as HfArgumentParser takes them.

    Returns:
        What was given, by name and unread (text, a list of texts, or a bool), unknown names
        included; and a line for each item that belongs to no name.
    """
    try:
        known, rest = TextParser(dataclass_types).parse_known_args([_mark(item) for item in items])
    except argparse.ArgumentError as error:
        return {}, [str(error).replace(_MARK, "")]
    given: dict[str, Any] = {}
    problems: list[str] = []
    for name, value in vars(known).items():
        if value == []:
            if not _takes_bare_flag(name, properties):
                problems.append(f"{name}: no value. Write --{name}=VALUE.")
                continue
            value = True
        given[name] = value[0] if isinstance(value, list) and len(value) == 1 else value
    unknown, strays = _split_rest([item.replace(_MARK, "") for item in rest])
    return given | unknown, problems + strays


def _mark(item: str) -> str:
    name, equals, value = item.partition("=")
    return f"{name}={_MARK}{value}" if name.startswith("--") and equals else item


def _takes_bare_flag(name: str, properties: Mapping[str, Any]) -> bool:
    renamed = RENAMED.get(name)
    if renamed is not None and renamed.schema is not None:
        return "boolean" in list_types(renamed.schema)
    if name in properties:
        return "boolean" in list_types(properties[name])
    return True


def _split_rest(rest: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Split what the parser left into unknown names and items without a name."""
    unknown: dict[str, Any] = {}
    problems: list[str] = []
    can_be_value = False
    for item in rest:
        if item.startswith("--"):
            name, equals, value = item[2:].partition("=")
            unknown[name.replace("-", "_")] = value
            can_be_value = not equals
        elif not can_be_value:
            problems.append(f"{item!r}: belongs to no argument. Write --name=value.")
    return unknown, problems
