"""What the data tools have to look at for the stages of a recipe: every meta file, and each stage's tokenizer."""

from collections.abc import Sequence
from dataclasses import replace

from internvl_core.inspection.lint_report import MetaJob, TokenizerSource
from tasks.stage import PREVIOUS, Stage
from tasks.stage_plan import resolve_stage


def list_meta_jobs(stages: Sequence[Stage], *, start_from: str | None) -> list[MetaJob]:
    """List the meta files of all stages, with the arguments and the tokenizer that each is read with.

    Args:
        stages: in the order of training; a stage without a tokenizer of its own has that of the one before.
        start_from: checkpoint that the first stage starts from.
    """
    jobs: list[MetaJob] = []
    source = TokenizerSource(start_from) if start_from else None
    for stage in stages:
        source = _find_source(stage) or source
        values = resolve_stage(stage, has_parent=not stage.brings_own_weights)
        job = MetaJob(stage.name, values["meta_path"], values, source, entry=stage.entry)
        jobs.append(job)
        if values["eval_meta_path"]:
            jobs.append(replace(job, meta_path=values["eval_meta_path"], is_held_out=True))
    return jobs


def _find_source(stage: Stage) -> TokenizerSource | None:
    arguments = stage.arguments
    if arguments.get("model_name_or_path"):
        return TokenizerSource(arguments["model_name_or_path"])
    if arguments.get("llm_path"):
        return TokenizerSource(arguments["llm_path"], arguments.get("vision_path"))
    return TokenizerSource(stage.start_from) if stage.start_from not in (None, PREVIOUS) else None
