"""A torchrun that starts in no time: two ranks, each in a session of its own, and exit code 1 for any failure."""

import os
import subprocess
import sys
from pathlib import Path

WORLD_SIZE = 2


def main() -> int:
    ranks = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("rank.py")), *sys.argv[1:]],
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": str(WORLD_SIZE)},
            start_new_session=True,
        )
        for rank in range(WORLD_SIZE)
    ]
    exit_codes = [rank.wait() for rank in ranks]
    return 1 if any(exit_codes) else 0


if __name__ == "__main__":
    sys.exit(main())
