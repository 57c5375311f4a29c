import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from internvl_core.errors import DiskFull
from internvl_core.train.room import DiskRoom, estimate_checkpoint_bytes


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A disk on which `mib` are free."""
    disk = SimpleNamespace(mib=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=disk.mib << 20))
    return disk


def test_a_checkpoint_that_would_not_fit_is_refused_with_both_sizes(tmp_path: Path, free: SimpleNamespace) -> None:
    room = DiskRoom(tmp_path, size_bytes=800 << 20)
    room.check(step=7)
    free.mib = 850
    assert not room.is_enough()
    with pytest.raises(DiskFull, match=r"step 7 needs about 0\.88 GiB, free are 0\.83 GiB\. Nothing was written"):
        room.check(step=7)


def test_the_last_checkpoint_is_the_measure_of_the_next(tmp_path: Path, free: SimpleNamespace) -> None:
    room = DiskRoom(tmp_path, size_bytes=10 << 30)
    assert not room.is_enough()
    checkpoint = tmp_path / "checkpoint-1"
    (checkpoint / "optimizer").mkdir(parents=True)
    (checkpoint / "model").write_bytes(bytes(3 << 20))
    (checkpoint / "optimizer" / "rank-0").write_bytes(bytes(1 << 20))
    room.measure(checkpoint)
    free.mib = 69
    assert room.is_enough()
    free.mib = 68
    assert not room.is_enough()


@pytest.mark.parametrize(
    ("has_adapters", "has_masters", "expected"),
    [(False, False, 12 * 2 + 8 * 8), (False, True, 12 * 2 + 8 * 12), (True, False, 8 * 2 + 8 * 8)],
)
def test_the_first_checkpoint_is_estimated_from_what_is_saved_and_what_learns(
    has_adapters: bool, has_masters: bool, expected: int
) -> None:
    frozen, learning = nn.Linear(4, 1, bias=False), nn.Linear(8, 1, bias=False)
    frozen.requires_grad_(False)
    model = nn.ModuleList([frozen, learning]).to(torch.bfloat16)
    assert estimate_checkpoint_bytes(model, has_adapters=has_adapters, has_masters=has_masters) == expected
