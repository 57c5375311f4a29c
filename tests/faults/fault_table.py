"""The table of docs/reliability.md, from the markers of the tests: `python tests/faults/fault_table.py` writes it."""

import ast
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
TESTS = FOLDER.parent
PAGE = TESTS.parent / "docs" / "reliability.md"
BEGIN, END = "<!-- faults: begin -->\n", "<!-- faults: end -->\n"
NUM_IN_MATRIX = 72


@dataclass(frozen=True)
class FaultTest:
    """One test and what its marker says."""

    number: int
    fault: str
    how: str
    then: str
    name: str


def list_fault_tests() -> list[FaultTest]:
    """List all of them, by number; a test with several markers is several rows."""
    found = []
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                for decorator in node.decorator_list:
                    if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.fault":
                        found.append(_read_marker(decorator, f"{path.parent.name}/{path.stem}.py::{node.name}"))
    return sorted(found, key=lambda test: (test.number, test.name))


def build_table() -> str:
    """Build the table, with a line above it that counts."""
    tests = list_fault_tests()
    rows = [
        f"{len({test.number for test in tests})} of the {NUM_IN_MATRIX} faults, {len(tests)} tests.\n\n",
        "| # | fault | injected by | what happens | test |\n|---|---|---|---|---|\n",
    ]
    for number, group in itertools.groupby(tests, key=lambda test: test.number):
        for test in group:
            cells = (str(number), test.fault, test.how, test.then, f"`{test.name}`")
            rows.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |\n")
    return "".join(rows)


def _read_marker(decorator: ast.Call, name: str) -> FaultTest:
    positional: list[Any] = [ast.literal_eval(argument) for argument in decorator.args]
    named = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in decorator.keywords}
    return FaultTest(*positional, **named, name=name)


if __name__ == "__main__":
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    PAGE.write_text(before + BEGIN + build_table() + END + rest.partition(END)[2])
