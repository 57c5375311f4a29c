"""Every test of this folder says which fault it is about, and the page for people says the same."""

import ast
from pathlib import Path

import pytest
from fault_table import FOLDER, NUM_IN_MATRIX, PAGE, build_table, list_fault_tests


@pytest.mark.parametrize("path", sorted(FOLDER.glob("test_*.py")), ids=lambda path: path.name)
def test_every_test_of_a_fault_is_marked_with_it(path: Path) -> None:
    unmarked = [
        node.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and path != Path(__file__)
        if not any("pytest.mark.fault(" in ast.unparse(decorator) for decorator in node.decorator_list)
    ]
    assert unmarked == []


def test_every_number_is_one_of_the_matrix() -> None:
    assert {test.number for test in list_fault_tests()} <= set(range(1, NUM_IN_MATRIX + 1))


def test_the_table_of_the_page_is_that_of_the_markers() -> None:
    assert build_table() in PAGE.read_text(), "run python tests/faults/fault_table.py"
