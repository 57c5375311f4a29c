"""Find out whether there is anything new to train on."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from internvl_core.contract import CheckpointRef, digest_json
from tasks.model_registry import Judged
from tasks.stage import Stage
from tasks.stage_plan import get_cache_dir, plan_stage

_PREVIOUS = CheckpointRef("", "the stage before")


@dataclass(frozen=True)
class News:
    """What the next candidate would be trained with."""

    inputs: str
    """Digest of data, arguments and start of all stages."""
    reason_to_skip: str | None
    """None: there is something new."""


def find_news(
    stages: Sequence[Stage],
    last: Judged | None,
    *,
    start_from: CheckpointRef | None,
    follows_champion: bool,
    workspace: Path,
) -> News:
    """Compare what would be trained with what was judged last.

    A start that is the champion does not count: it changes with each night that is better, and the
    same data would be trained on for ever.

    Args:
        stages: of the recipe.
        last: what was judged last.
        start_from: checkpoint that the first stage starts from; None: what it names itself.
        follows_champion: the first stage starts from the champion as soon as there is one.
        workspace: local directory whose cache has the digests of files.
    """
    first, *rest = stages
    begun = _list_inputs(first, first.find_start(start_from), workspace)
    if follows_champion:
        begun = {name: value for name, value in begun.items() if name not in ("start_from", "components")}
    following = [_list_inputs(stage, stage.find_start(_PREVIOUS), workspace) for stage in rest]
    inputs = digest_json([begun, *following])
    if last is None or last.inputs != inputs:
        return News(inputs, None)
    when = datetime.fromtimestamp(last.time_s, UTC)
    told = f"Nothing new: data and arguments are those of version {last.version}, judged {when:%Y-%m-%d %H:%M} UTC."
    return News(inputs, told)


def _list_inputs(stage: Stage, start: CheckpointRef | None, workspace: Path) -> dict[str, Any]:
    return plan_stage(stage, start, cache_dir=get_cache_dir(workspace)).inputs
