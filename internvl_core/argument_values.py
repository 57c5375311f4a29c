"""One value of one argument: read text and YAML's guesses into the type that the schema names.

Standard library only; the trainer and the control plane read the same texts the same way.
"""

import json
import math
import sys
from collections.abc import Mapping
from typing import Any

TRUE_TEXTS = frozenset({"yes", "true", "t", "y", "1"})
FALSE_TEXTS = frozenset({"no", "false", "f", "n", "0"})

LATEST = "latest"
"""Of resume_from_checkpoint: the newest checkpoint of the run itself; original command lines say True."""

_WORDS = {
    "boolean": "True or False",
    "integer": "a whole number",
    "number": "a finite number",
    "string": "text (in quotes, if it looks like a number)",
    "array": "a list",
    "object": "a JSON object",
    "null": "null",
}


class UnreadableValueError(ValueError):
    """The value does not fit its schema; says what it is and what it should be."""


def list_types(fragment: Mapping[str, Any]) -> list[str]:
    """List the JSON types that a schema fragment allows."""
    types = fragment["type"]
    return [types] if isinstance(types, str) else list(types)


def read_value(value: Any, fragment: Mapping[str, Any]) -> Any:
    """Read a value as its schema fragment wants it: "1e-3" is a number where a number is due.

    Raises:
        UnreadableValueError: another type, not one of the choices, or out of bounds.
    """
    types = list_types(fragment)
    if value is None and "null" in types:
        return None
    if "enum" in fragment:
        return _read_choice(value, [choice for choice in fragment["enum"] if choice is not None])
    if isinstance(value, str):
        read = _read_text(value, types)
    elif isinstance(value, bool):
        read = value if "boolean" in types else _reject(value, types)
    elif isinstance(value, int | float):
        read = _read_number(value, types)
    elif isinstance(value, list | tuple) and "array" in types:
        read = [read_value(item, fragment.get("items", {"type": "string"})) for item in value]
    elif isinstance(value, Mapping) and "object" in types:
        read = dict(value)
    else:
        read = _reject(value, types)
    _check_bounds(read, fragment)
    return read


def read_resume(value: Any) -> Any:
    """Read `resume_from_checkpoint`, where True and False stand for the newest checkpoint and for none."""
    text = str(value).strip().lower()
    if text in ("true", LATEST):
        return LATEST
    return None if text in ("false", "none", "") else value


def _read_choice(value: Any, choices: list[Any]) -> Any:
    # YAML 1.1 reads a bare `no` (save_strategy: no) as False.
    if value is False and "no" in choices:
        return "no"
    if value in choices:
        return value
    raise UnreadableValueError(f"{value!r} is not one of {', '.join(map(str, choices))}.")


def _read_text(text: str, types: list[str]) -> Any:
    for kind, opening in (("array", "["), ("object", "{")):
        if kind in types and text.startswith(opening):
            return _read_json(text, types)
    lowered = text.strip().lower()
    if "boolean" in types:
        # A field that also takes any text claims only the plain spellings.
        is_union = "string" in types
        if lowered == "true" or (not is_union and lowered in TRUE_TEXTS):
            return True
        if lowered == "false" or (not is_union and lowered in FALSE_TEXTS):
            return False
    if "integer" in types or "number" in types:
        try:
            return _read_number(float(text) if "number" in types else int(text), types)
        except ValueError:
            return _reject(text, types)
    if "string" in types:
        return text
    return [text] if "array" in types else _reject(text, types)


def _read_json(text: str, types: list[str]) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if "string" in types:
            return text
        raise UnreadableValueError(f"{text!r} is not JSON ({error}).") from None


def _read_number(value: float, types: list[str]) -> Any:
    if "integer" in types and value == value // 1:
        return int(value)
    if "number" in types and abs(value) <= sys.float_info.max:
        return float(value)
    return _reject(value, types)


def _check_bounds(value: Any, fragment: Mapping[str, Any]) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    bounds = {
        "minimum": ("at least", value >= fragment.get("minimum", value)),
        "exclusiveMinimum": ("more than", value > fragment.get("exclusiveMinimum", -math.inf)),
        "maximum": ("at most", value <= fragment.get("maximum", value)),
        "exclusiveMaximum": ("less than", value < fragment.get("exclusiveMaximum", math.inf)),
    }
    broken = [f"{words} {fragment[name]}" for name, (words, is_met) in bounds.items() if not is_met]
    excluded = fragment.get("not", {}).get("const")
    if excluded is not None and value == excluded:
        broken.append(f"anything but {excluded}")
    if broken:
        raise UnreadableValueError(f"{value!r} is out of range; it should be {' and '.join(broken)}.")


def _reject(value: Any, types: list[str]) -> Any:
    raise UnreadableValueError(f"{value!r} should be {' or '.join(_WORDS[kind] for kind in types)}.")
