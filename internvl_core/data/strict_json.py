"""JSON without the leniency of `json.loads`: what it would let pass or lose is refused."""

import json
from typing import Any

from internvl_core.errors import DataError, Reason


def _refuse_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise DataError(f"the key {twice!r} occurs twice in one object. Rename or remove one.")
    return content


def _refuse_constant(literal: str) -> float:
    raise DataError(f"{literal} is not JSON. Write a number.", reason=Reason.NOT_JSON)


STRICT_JSON = json.JSONDecoder(object_pairs_hook=_refuse_duplicate_keys, parse_constant=_refuse_constant)
"""Raises DataError for a key that occurs twice, of which the last would win, and for NaN and Infinity."""
