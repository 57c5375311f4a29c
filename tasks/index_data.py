"""Index the data of all stages and look through it, before anything is trained."""

import logging
import math
from collections.abc import Iterator
from pathlib import Path

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from internvl_core.errors import DataError
from internvl_core.inspection.lint_report import DatasetReport, Finding, LintJob, LintReport, MetaReport
from tasks.data_jobs import list_meta_jobs
from tasks.data_table import iter_problem_lines, list_distinct, write_data_markdown
from tasks.data_tool import run_data_tool
from tasks.show_stages import write_key
from tasks.stage import Stage
from tasks.stage_plan import get_cache_dir

logger = logging.getLogger(__name__)

_NUM_MEDIA = 8
# A data set at the very limit is refused by its pick once in a hundred times.
_SIGNIFICANCE = 0.01


@task(name="index data", cache_policy=NO_CACHE)
def index_data(recipe: str, stages: list[Stage], *, workspace: Path, start_from: str | None) -> list[MetaReport]:
    """Build the indexes that the stages will look for, in the workspace's cache, and refuse bad data.

    Uses: one process with a worker a core; the roots of the media (headers where records give no sizes, and a few
    media of each data set).

    Returns:
        What each meta file is like; files that stages share, once.

    Raises:
        DataError: a data set cannot be used, has more bad records than `max_bad_fraction`, or is held out and has any.
    """
    jobs = list_meta_jobs(stages, start_from=start_from)
    job = LintJob(str(get_cache_dir(workspace)), jobs, num_media=_NUM_MEDIA)
    log = get_run_logger()
    report = LintReport.from_json(run_data_tool("lint", job.to_json(), log=log.info))
    metas = list_distinct(report)
    for meta in metas:
        log.info("%s: %s", meta.title, "; ".join(map(_summarize, meta.datasets)))
        for line in iter_problem_lines(meta):
            log.warning("%s: %s", meta.title, line)
    _show(recipe, metas)
    problems = [problem for meta in metas for problem in iter_refusals(meta)]
    if problems:
        raise DataError("\n".join(problems))
    return metas


def iter_refusals(meta: MetaReport) -> Iterator[str]:
    """Yield why the data sets of a meta file are not to be trained on, or scored on, as they are."""
    for dataset in meta.datasets:
        reason = _find_refusal(meta, dataset)
        if reason is not None:
            yield f"{meta.title}: dataset {dataset.name!r}: {reason}"


def _find_refusal(meta: MetaReport, dataset: DatasetReport) -> str | None:
    if dataset.error is not None:
        return dataset.error
    if meta.is_held_out:
        findings = dataset.all_findings
        return f"held out, and {_tell_first(dataset, findings)}. All must be good." if findings else None
    if not dataset.num_usable:
        first = f" {_tell_first(dataset, dataset.findings)}." if dataset.findings else ""
        too_long = f" {dataset.num_too_long} are longer than max_seq_length." if dataset.num_too_long else ""
        too_many = (
            f" {dataset.num_too_many_tiles} have more tiles than num_images_expected."
            if dataset.num_too_many_tiles
            else ""
        )
        return f"nothing of {dataset.annotation} can be trained on.{too_long}{too_many}{first}"
    if dataset.num_bad > meta.max_bad_fraction * dataset.num_records:
        return (
            f"{dataset.num_bad} of {dataset.num_records} records are bad, max_bad_fraction is "
            f"{meta.max_bad_fraction:g}; {_tell_first(dataset, dataset.findings)}. See internvl data check."
        )
    media = dataset.media
    if media and _is_beyond(media.num_failed, media.num_decoded, media.num_with_media, meta.max_bad_fraction):
        return (
            f"{media.num_failed} of {media.num_decoded} media that were tried are bad, max_bad_fraction is "
            f"{meta.max_bad_fraction:g}; {_tell_first(dataset, media.findings)}. See internvl data check --full."
        )
    return None


def _is_beyond(num_failed: int, num_decoded: int, num_all: int, max_fraction: float) -> bool:
    """Tell whether a pick says that more than a share of all is bad; a small pick may be unlucky."""
    if num_decoded == num_all or num_failed == num_decoded:
        return num_failed > max_fraction * num_decoded
    chance = sum(
        math.comb(num_decoded, count) * max_fraction**count * (1 - max_fraction) ** (num_decoded - count)
        for count in range(num_failed, num_decoded + 1)
    )
    return chance < _SIGNIFICANCE


def _tell_first(dataset: DatasetReport, findings: list[Finding]) -> str:
    first = findings[0]
    return f"{dataset.annotation}:{first.lines[0]}: {first.example.rstrip('.')}"


def _summarize(dataset: DatasetReport) -> str:
    if dataset.error is not None:
        return f"{dataset.name} cannot be used"
    return f"{dataset.name} {dataset.num_usable:,} of {dataset.num_records:,} records"


def _show(recipe: str, metas: list[MetaReport]) -> None:
    try:
        create_markdown_artifact(
            key=write_key("data", recipe), markdown=write_data_markdown(metas), description=f"Data of {recipe}"
        )
    except Exception as error:  # noqa: BLE001  whatever Prefect throws: the data are indexed
        logger.warning("The table of data sets is not in the Prefect UI: %s: %s", type(error).__name__, error)
