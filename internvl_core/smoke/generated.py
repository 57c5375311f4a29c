"""A generated folder: appears whole or not at all, and once.

Its `settings.json` says what it was generated from; equal settings mean that there is nothing to do.
"""

import argparse
import json
import logging
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from internvl_core.errors import ArgumentError, InternVLError

SETTINGS_FILE = "settings.json"

logger = logging.getLogger(__name__)


def generate_once(out_dir: Path, settings: Mapping[str, Any], write: Callable[[Path], None]) -> bool:
    """Let `write` fill a folder beside `out_dir`, then rename it into place.

    Returns:
        False if the folder was there already, generated from the same settings.

    Raises:
        ArgumentError: `out_dir` holds something else; it is left alone.
    """
    if _is_generated(out_dir, settings):
        logger.info("%s: already generated with these settings", out_dir)
        return False
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=out_dir.parent, prefix=f".{out_dir.name}-"))
    try:
        write(unfinished)
        (unfinished / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n")
        unfinished.chmod(0o755)  # mkdtemp keeps others out, an ordinary folder does not.
        unfinished.rename(out_dir)
    except OSError:
        if not _is_generated(out_dir, settings):  # Unless another process was faster.
            raise
        return False
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    logger.info("%s: generated", out_dir)
    return True


def run_command(command: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser) -> None:
    """Run a generator from the command line: a known error is one line and its exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        command(parser.parse_args())
    except InternVLError as error:
        logger.error("%s", error)
        sys.exit(error.exit_code)


def _is_generated(out_dir: Path, settings: Mapping[str, Any]) -> bool:
    if not out_dir.exists() or not any(out_dir.iterdir()):
        return False
    try:
        found = json.loads((out_dir / SETTINGS_FILE).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        found = None
    if found != settings:
        raise ArgumentError(f"{out_dir}: holds other settings or other files. Remove it or choose another folder.")
    return True
