"""GPUs that the ranks of a run that is gone have not left are waited for."""

import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from internvl_core.errors import LeaseHeld
from tasks.hold_gpus import find_gpus
from tasks.hold_gpus import hold_gpus as hold_gpus_of_run


def hold_gpus(directory: Path, *gpus: str, patience_s: float = 60.0) -> AbstractContextManager[list[int]]:
    return hold_gpus_of_run(gpus, "pretrain-1", patience_s=patience_s, directory=directory)


def leave_gpus(directory: Path, *gpus: str, save_s: float, patience_s: float = 60.0) -> None:
    """Have a run on the GPUs die while its supervisor, a process of its own, goes on for so long."""
    program = (
        "import os, signal, subprocess, sys; from pathlib import Path; from tasks.hold_gpus import hold_gpus\n"
        f"with hold_gpus({list(gpus)}, 'other', patience_s={patience_s}, directory=Path(sys.argv[1])) as locks:\n"
        f"    subprocess.Popen(['sleep', '{save_s}'], pass_fds=locks, stdout=subprocess.DEVNULL)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(directory)], check=False).returncode == -9


def test_gpus_on_which_a_run_that_is_gone_still_saves_are_waited_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    leave_gpus(tmp_path, "0", "1", save_s=2)
    with hold_gpus(tmp_path, "1", "2") as locks:
        assert len(locks) == 1
        assert caplog.messages[0].startswith("GPU 1: run other (process ")
        # Its own, and not the other's any more.
        assert len(list(tmp_path.iterdir())) == 1


def test_other_gpus_are_not_waited_for(tmp_path: Path) -> None:
    leave_gpus(tmp_path, "0", "1", save_s=10)
    began = time.monotonic()
    with hold_gpus(tmp_path, "2", "3"):
        assert time.monotonic() - began < 5


def test_runs_that_are_alive_share_a_gpu_as_they_like(tmp_path: Path) -> None:
    with hold_gpus(tmp_path, "0"), hold_gpus(tmp_path, "0"):
        assert len(list(tmp_path.iterdir())) == 2


def test_gpus_that_are_not_left_in_time_are_refused_with_who_holds_them(tmp_path: Path) -> None:
    leave_gpus(tmp_path, "0", save_s=30, patience_s=0.5)
    with (
        pytest.raises(LeaseHeld, match=r"GPU 0: the ranks of run other \(process \d+ on .* have not left"),
        hold_gpus(tmp_path, "0"),
    ):
        pytest.fail("two runs hold one GPU")


def test_without_gpus_nothing_is_held(tmp_path: Path) -> None:
    with hold_gpus(tmp_path / "locks") as locks:
        assert locks == []
        assert not (tmp_path / "locks").exists()


def test_the_gpus_of_a_stage_are_those_that_its_ranks_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nvidia0", "nvidia1", "nvidia10", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert find_gpus(8, devices_dir=tmp_path) == ["0", "1", "10"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 6,7")
    assert find_gpus(2, devices_dir=tmp_path) == ["4", "6"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert find_gpus(2, devices_dir=tmp_path) == []


def test_a_machine_without_gpus_has_none_whatever_the_variable_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert find_gpus(1, devices_dir=tmp_path) == []


def test_a_folder_that_others_can_write_into_is_not_trusted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = tmp_path / "locks"
    directory.mkdir(mode=0o700)
    directory.chmod(0o777)
    with hold_gpus(directory, "0") as locks:
        assert locks == []
    assert "is not this user's own folder" in caplog.text


def test_a_cancel_is_heard_while_gpus_are_waited_for(tmp_path: Path) -> None:
    class Cancelled(Exception):
        pass

    def check() -> None:
        raise Cancelled

    leave_gpus(tmp_path, "0", save_s=10)
    with (
        pytest.raises(Cancelled),
        hold_gpus_of_run(["0"], "pretrain-1", patience_s=60, directory=tmp_path, check=check),
    ):
        pytest.fail("it did not wait")
