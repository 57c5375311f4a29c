"""JSON without the leniency of `json.loads`: what it would let pass or lose is refused."""

import json
from collections import Counter
from typing import Any

from internvl_core.errors import DataError, Reason


def shorten(value: object) -> str:
    """Quote a value of a file for a message: in one line, and no longer than a person reads."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _refuse_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise DataError(f"the key {shorten(twice)} occurs twice in one object. Rename or remove one.")
    return content


def _refuse_constant(literal: str) -> float:
    raise DataError(f"{literal} is not JSON. Write a number.", reason=Reason.NOT_JSON)


STRICT_JSON = json.JSONDecoder(object_pairs_hook=_refuse_duplicate_keys, parse_constant=_refuse_constant)
"""Raises DataError for a key that occurs twice, of which the last would win, and for NaN and Infinity."""
