"""How processes are told apart, and whether they live."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from internvl_core.checkpoint import lease
from internvl_core.checkpoint.lease import Owner


def test_this_process_lives() -> None:
    owner = Owner.of_this_process("mine")
    assert owner.is_alive() is True
    assert owner == Owner.of_this_process("mine")


def test_a_process_that_nobody_collected_is_dead() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert replace(Owner.of_this_process("theirs"), pid=process.pid, start_ticks=1).is_alive() is False


@pytest.mark.parametrize("change", [{"boot_id": "another"}, {"pid_namespace": "pid:[1]"}, {"boot_id": ""}])
def test_of_a_process_behind_another_kernel_or_namespace_nothing_is_known(change: dict[str, str]) -> None:
    assert replace(Owner.of_this_process("theirs"), pid=2**22 + 1, **change).is_alive() is None


def test_a_process_of_another_user_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int, signal: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    assert Owner.of_this_process("mine").is_alive() is True


def test_of_a_process_that_is_hidden_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    owner = Owner.of_this_process("mine")

    def refuse(path: Path) -> bytes:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert owner.is_alive() is None


def test_without_proc_nothing_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(lease, "_BOOT_ID", tmp_path / "missing")
    owner = Owner.of_this_process("mine")
    assert owner.boot_id == ""
    assert owner.is_alive() is None


def test_without_namespaces_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> Path:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "readlink", refuse)
    assert Owner.of_this_process("mine").is_alive() is None
