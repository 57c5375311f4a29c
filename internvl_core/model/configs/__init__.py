"""The configurations of InternVL 2.5 and 3 that ship as data, in transformers' native form; no torch, no transformers.

The vocabulary is the published one: with the nine tokens of InternVL, not padded (reference 2.5, 2.6).
"""

import json
from importlib import resources
from typing import Any

SIZES_2_5 = ("1b", "2b", "4b", "8b", "26b", "38b", "78b")
SIZES_3 = ("1b", "2b", "8b", "9b", "14b", "38b", "78b")


def read_shipped(name: str) -> dict[str, Any]:
    """Read the configuration of a whole model, such as internvl2_5-8b."""
    content: dict[str, Any] = json.loads((resources.files(__name__) / f"{name}.json").read_text(encoding="utf-8"))
    return content
