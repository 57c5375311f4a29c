"""A lock file that says who holds it. The kernel lets go when nobody has it open any more."""

import fcntl
import json
import time
from dataclasses import asdict
from datetime import UTC, datetime
from io import TextIOWrapper
from typing import Any

from internvl_core.checkpoint.lease import Owner


def take(file: TextIOWrapper) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def write_holder(file: TextIOWrapper, run_id: str, **content: Any) -> None:
    file.truncate(0)
    file.write(json.dumps({"owner": asdict(Owner.of_this_process(run_id)), "since": time.time(), **content}))
    file.flush()


def read_holder(file: TextIOWrapper) -> dict[str, Any] | None:
    """Read who holds a lock; None of one that just starts and has not written it yet."""
    file.seek(0)
    try:
        content: dict[str, Any] = json.loads(file.read())
    except ValueError:
        return None
    return content


def describe_holder(content: dict[str, Any] | None) -> tuple[str, bool]:
    """Describe who holds a lock, and tell whether that process is gone."""
    if content is None:
        return "a run that is just starting", False
    owner = Owner(**content["owner"])
    since = datetime.fromtimestamp(content["since"], UTC)
    return f"{owner} since {since:%Y-%m-%d %H:%M:%S} UTC", owner.is_alive() is False
