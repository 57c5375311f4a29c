"""A second look at the records whose media could not be read when the index was built.

A file that was missing may have come, a share that was away may be mounted again. Done by who looks at the
data before training, never by a rank: a stage that runs or resumes keeps the generation it can see.
"""

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from internvl_core.data.encoding import Encoding
from internvl_core.data.index import DatasetIndex, Problem
from internvl_core.data.index_build import COLUMNS, SAMPLE
from internvl_core.data.index_files import PROBLEMS_FILE, get_generation, write_columns, writing
from internvl_core.data.measure import Measure, measure_lines
from internvl_core.errors import DataError, Reason

MEDIA_REASONS = frozenset({Reason.MISSING, Reason.MEDIA, Reason.MEDIA_SIZE})
"""What another state of the media can heal; anything else is written in the annotation."""

_READERS = 16


def mend_index(index: DatasetIndex, encoding: Encoding) -> Path:
    """Measure again the records that failed by their media; publish a new generation if any is sound now.

    Args:
        encoding: the data set's own.

    Returns:
        The folder of the newest generation.
    """

    def measure(problem: Problem) -> Measure | DataError:
        line = index.read_line(problem.line - 1)
        return measure_lines([line], first_line=problem.line, meta=index.meta, encoding=encoding)[0]

    problems = list(index.iter_problems())
    failed = [problem for problem in problems if problem.reason in MEDIA_REASONS]
    if not failed:
        return index.directory
    with ThreadPoolExecutor(_READERS) as pool:
        measures = list(pool.map(measure, failed))
    healed = {
        problem.line: measure for problem, measure in zip(failed, measures, strict=True) if isinstance(measure, Measure)
    }
    return _publish(index, problems, healed) if healed else index.directory


def _publish(index: DatasetIndex, problems: list[Problem], healed: dict[int, Measure]) -> Path:
    columns: dict[str, Any] = {name: np.array(getattr(index, name)) for name in COLUMNS}
    reasons = Counter({reason.value: count for reason, count in index.problem_counts.items()})
    kinds = Counter(index.kind_counts)
    for line, measure in healed.items():
        columns["tokens"][line - 1] = measure.num_tokens
        columns["tiles"][line - 1] = measure.num_tiles
        columns["supervised"][line - 1] = measure.num_supervised
        columns["status"][line - 1] = SAMPLE
        kinds[measure.kind] += 1
    reasons.subtract(problem.reason.value for problem in problems if problem.line in healed)
    key = index.directory.stem
    directory = index.directory.with_name(f"{key}.{get_generation(index.directory) + 1}")
    with writing(directory) as building:
        with (building / PROBLEMS_FILE).open("w", encoding="utf-8") as file:
            for problem in problems:
                if problem.line not in healed:
                    content = {"line": problem.line, "reason": problem.reason.value, "message": problem.message}
                    file.write(json.dumps(content) + "\n")
        write_columns(building, columns, +reasons, kinds, index.settings)
    return directory
