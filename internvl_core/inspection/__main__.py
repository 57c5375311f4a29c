"""`python -m internvl_core.inspection lint|show FOLDER`: what tasks and the `internvl data` commands start."""

import sys
from pathlib import Path

from internvl_core.inspection.job import run_job


def _main() -> int:
    name, folder = sys.argv[1:]
    if name == "lint":
        from internvl_core.inspection.lint import run_lint

        return run_job(run_lint, Path(folder))
    from internvl_core.inspection.show import run_show

    return run_job(run_show, Path(folder))


if __name__ == "__main__":
    sys.exit(_main())
