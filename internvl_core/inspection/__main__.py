"""`python -m internvl_core.inspection TOOL FOLDER`: what tasks and the `internvl` command start for work with torch."""

import atexit
import gc
import sys
from importlib import import_module
from pathlib import Path

from internvl_core.inspection.job import run_job

# Imported late: each tool pays for its own imports only.
TOOLS = {
    "lint": ("internvl_core.inspection.lint", "run_lint"),
    "show": ("internvl_core.inspection.show", "run_show"),
    "plan": ("internvl_core.inspection.plan", "run_plan"),
    "convert": ("internvl_core.inspection.convert_job", "run_convert"),
}


def _main() -> int:
    # Nobody needs the cycles of a process that ends; looking for them takes 0.2 s once torch is imported.
    atexit.register(gc.freeze)
    name, folder = sys.argv[1:]
    module, function = TOOLS[name]
    tool = import_module(module)
    return run_job(getattr(tool, function), Path(folder), preload=getattr(tool, "preload", None))


if __name__ == "__main__":
    sys.exit(_main())
