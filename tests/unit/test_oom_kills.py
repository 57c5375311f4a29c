"""The kernel's counts of processes that it killed for want of memory."""

import os

import pytest

from internvl_core.supervision import oom_kills
from internvl_core.supervision.oom_kills import OomKills


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("memory.events", "low 0\nhigh 0\nmax 7\noom 1\noom_kill {count}\noom_group_kill 0\n"),
        ("memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill {count}\n"),
    ],
)
def test_a_kill_since_the_beginning_is_found_with_its_cgroup(tmp_path, monkeypatch, name, content):
    counter = tmp_path / name
    monkeypatch.setattr(oom_kills, "_list_counters", lambda pid: [tmp_path / "none" / name, counter])
    counter.write_text(content.format(count=4))
    kills = OomKills()
    kills.watch(os.getpid())
    assert kills.find_risen() is None
    counter.write_text(content.format(count=5))
    kills.watch(os.getpid())
    assert kills.find_risen() == str(tmp_path)
    counter.unlink()
    assert kills.find_risen() is None


def test_this_process_has_a_cgroup_or_none_is_known():
    for path in oom_kills._list_counters(os.getpid()):
        assert path.name in ("memory.events", "memory.oom_control")
