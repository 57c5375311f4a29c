"""Every test of this folder says which fault it is about."""

import ast
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


@pytest.mark.parametrize("path", sorted(FOLDER.glob("test_*.py")), ids=lambda path: path.name)
def test_every_test_of_a_fault_is_marked_with_it(path: Path) -> None:
    unmarked = [
        node.name
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and path != Path(__file__)
        if not any("pytest.mark.fault(" in ast.unparse(decorator) for decorator in node.decorator_list)
    ]
    assert unmarked == []
