import logging
from pathlib import Path

import pytest
from data_sets import build_mixture

from internvl_core.data.packing import Pack
from internvl_core.data.sizes import PackLimits
from internvl_core.train.pack_log import PackLog


def pack(*ids: int) -> Pack:
    return Pack(ids=ids, tokens=80, tiles=1, cost=1.0, epoch=0)


def test_a_line_comes_with_the_step_that_has_the_next_so_many_samples(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="internvl_core.train.pack_log")
    mixture = build_mixture(tmp_path, {"a": 6, "b": 4}, seed=0)
    log = PackLog(mixture, PackLimits(100, 4), every=5)
    log.record([pack(0, 1, 2), pack(9)], block_steps=1)
    assert [record.message for record in caplog.records] == ["Steps take packs as they come, not grouped by cost"]
    # Ids of the next epoch: 10 is the first of `a` again.
    log.record([pack(10, 11, 6), pack(12)], block_steps=1)
    assert caplog.records[-1].message == (
        "Packed 8 samples into 4 packs: 80.0 % of their tokens and 25.0 % of their tiles used; a 75.0%, b 25.0%"
    )
    log.record([pack(13)], block_steps=1)
    assert len(caplog.records) == 2


def test_grouping_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="internvl_core.train.pack_log")
    log = PackLog(build_mixture(tmp_path, {"a": 6}, seed=0), PackLimits(100, 4), every=1000)
    log.record([pack(1)], block_steps=16)
    log.record([pack(2)], block_steps=16)
    (record,) = caplog.records
    assert record.message.endswith("grouped by it, 16 at a time")
