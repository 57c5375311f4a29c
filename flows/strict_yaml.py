"""YAML without its surprises: no key twice, no tags of Python, no document that grows when it is read.

PyYAML keeps the last of two equal keys without a word, which trains with the other value. Every
problem is one line that says where it is.
"""

import math
from typing import Any

import yaml

from internvl_core.errors import ArgumentError

MAX_VALUES = 100_000
"""Values in a document with its aliases written out: thousands of times a long recipe."""


def parse_yaml(text: str, *, where: str) -> Any:
    """Read one YAML document; what an alias names twice is there twice, so that changing one leaves the other.

    Raises:
        ArgumentError: one line, with `where` and the place in the text.
    """
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _count_values(node, {}, where=where) > MAX_VALUES:
            raise ArgumentError(f"{where}: more than {MAX_VALUES} values once its aliases are written out.")
        return _unshare(loader.construct_document(node))
    except yaml.MarkedYAMLError as error:
        place = _tell_place(error.problem_mark)
        raise ArgumentError(f"{where}{place}: not plain YAML: {error.problem or error.context}.") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ArgumentError(f"{where}: not plain YAML: {' '.join(str(error).split())}.") from None
    except RecursionError:
        raise ArgumentError(f"{where}: nested too deeply.") from None


def _count_values(node: yaml.Node, counted: dict[int, float], *, where: str) -> float:
    """Count the values below a node as if every alias were written out; infinite if one holds itself."""
    if id(node) in counted:
        return counted[id(node)]
    counted[id(node)] = math.inf
    children: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        children = node.value
    elif isinstance(node, yaml.MappingNode):
        _check_keys(node, where=where)
        children = [child for pair in node.value for child in pair]
    counted[id(node)] = 1 + sum(_count_values(child, counted, where=where) for child in children)
    return counted[id(node)]


def _check_keys(node: yaml.MappingNode, *, where: str) -> None:
    seen: dict[str, yaml.Node] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        if key.value in seen:
            first = seen[key.value].start_mark.line + 1
            raise ArgumentError(
                f"{where}{_tell_place(key.start_mark)}: the key {key.value} is there twice, first in line {first}. "
                "Remove one."
            )
        seen[key.value] = key


def _tell_place(mark: yaml.Mark | None) -> str:
    return f":{mark.line + 1}:{mark.column + 1}" if mark else ""


def _unshare(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unshare(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_unshare(item) for item in value]
    return value
