"""Whether the kernel killed a process of a run because memory ran out: its count, per cgroup, before and after.

Without a readable count (no cgroup file system, no permission) nothing is known. Standard library only.
"""

import re
from contextlib import suppress
from pathlib import Path

_V1_MEMORY = Path("/sys/fs/cgroup/memory")
_V2_ROOTS = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))
_COUNT = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)


class OomKills:
    """The counts of the cgroups that a run's processes are in."""

    def __init__(self) -> None:
        self._before: dict[Path, int] = {}

    def watch(self, pid: int) -> None:
        """Note the count of the process's cgroup as it is now, unless it is known already."""
        for path in _list_counters(pid):
            count = _read_count(path)
            if count is not None:
                self._before.setdefault(path, count)

    def find_risen(self) -> str | None:
        """Find a cgroup in which something was killed since it is watched."""
        for path, before in self._before.items():
            if (_read_count(path) or 0) > before:
                return str(path.parent)
        return None


def _list_counters(pid: int) -> list[Path]:
    found = []
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            _, controllers, place = line.split(":", 2)
            relative = place.lstrip("/")
            if "memory" in controllers.split(","):
                # The file system may be mounted from our own cgroup on, whose path then leads nowhere.
                found += [_V1_MEMORY / relative / "memory.oom_control", _V1_MEMORY / "memory.oom_control"]
            elif not controllers:
                found += [root / relative / "memory.events" for root in _V2_ROOTS]
    return found


def _read_count(path: Path) -> int | None:
    try:
        match = _COUNT.search(path.read_text())
    except OSError:
        return None
    return int(match[1]) if match else None
