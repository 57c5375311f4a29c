"""Modules of the trainer that run in a process of their own."""

from pathlib import Path

import pytest

from internvl_core.errors import ArgumentError, InternVLError
from tasks.run_module import run_module


def test_a_module_that_refuses_keeps_its_class_and_last_line(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"internvl_core\.smoke\.digits failed with exit code 64: smoke data: 1 \+"):
        run_module("internvl_core.smoke.digits", str(tmp_path / "data"), "--train", "1")


def test_a_module_that_breaks_is_an_internal_error() -> None:
    with pytest.raises(InternVLError, match=r"failed with exit code 1: .*No module named internvl_core\.nowhere"):
        run_module("internvl_core.nowhere")


def test_what_a_module_prints_comes_back() -> None:
    assert "usage" in run_module("internvl_core.smoke.digits", "--help")
