"""The error tree: exit codes and the classes that they stand for."""

import pytest

from internvl_core.errors import (
    CheckpointCorrupt,
    CheckpointNotFound,
    InternVLError,
    Stalled,
    WorkerLost,
    find_error_class,
    find_error_class_of_code,
)


def list_classes(root: type[InternVLError]) -> list[type[InternVLError]]:
    return [root, *(found for child in root.__subclasses__() for found in list_classes(child))]


@pytest.mark.parametrize("kind", list_classes(InternVLError))
def test_a_class_is_found_by_its_name_and_one_of_its_behaviour_by_its_code(kind: type[InternVLError]) -> None:
    assert find_error_class(kind.__name__) is kind
    found = find_error_class_of_code(kind.exit_code)
    if kind.exit_code == InternVLError.exit_code:
        assert found is None
    else:
        assert found is not None
        assert (found.exit_code, found.is_retryable) == (kind.exit_code, kind.is_retryable)


def test_a_code_that_two_classes_share_stands_for_one_of_them() -> None:
    assert find_error_class_of_code(80) in (CheckpointNotFound, CheckpointCorrupt)
    assert (find_error_class_of_code(79), find_error_class_of_code(77)) == (WorkerLost, Stalled)


@pytest.mark.parametrize("code", [0, 1, 2, 70, 130, 255])
def test_a_code_of_nobody_stands_for_no_class(code: int) -> None:
    assert find_error_class_of_code(code) is None
