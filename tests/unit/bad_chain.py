"""Bad inputs on their whole way: meta file, index, mixture, samples."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from bad_cases import GOOD_LINE, MEDIA, META, BadFiles, BadRecord, to_bytes, write_lines, write_sound
from data_sets import build_encoding

from internvl_core.data.dataset import Sample, SupervisedDataset, build_dataset
from internvl_core.data.index import Problem
from internvl_core.data.meta import load_meta
from internvl_core.data.pixels import PixelRules
from internvl_core.data.quarantine import BadSample

MAX_TOKENS = 512


@dataclass(frozen=True)
class Found:
    """What became of the lines of a data set, by their numbers."""

    problems: dict[int, Problem]
    samples: dict[int, Sample | BadSample]
    num_too_long: int


def write_record(case: BadRecord, folder: Path) -> None:
    """Write a data set in which a bad record stands between two good ones, on line 2."""
    write_sound(folder)
    write_lines(folder, [GOOD_LINE, to_bytes(case.write(folder / MEDIA, "case")), GOOD_LINE])


def write_records(cases: list[BadRecord], folder: Path) -> None:
    """Write a data set in which case `i` stands on line `2 * i + 2`, good records before and behind each."""
    write_sound(folder)
    lines = [GOOD_LINE]
    for number, case in enumerate(cases):
        lines += [to_bytes(case.write(folder / MEDIA, f"{number:03}")), GOOD_LINE]
    write_lines(folder, lines)


def write_files(case: BadFiles, folder: Path) -> None:
    write_sound(folder)
    case.change(folder)


def open_data(folder: Path, *, cache_name: str = "cache") -> SupervisedDataset:
    return build_dataset(
        load_meta(folder / META),
        build_encoding(),
        PixelRules("imagenet"),
        cache_dir=folder / cache_name,
        max_seq_length=MAX_TOKENS,
        seed=0,
    )


def train_on(folder: Path, *, cache_name: str = "cache") -> Found:
    """Load every sample of a data set as a worker does.

    Raises:
        DataError: the data set as a whole is refused.
    """
    dataset = open_data(folder, cache_name=cache_name)
    (source,) = dataset.mixture.sources
    problems = {problem.line: problem for problem in source.index.iter_problems()}
    samples = {dataset.mixture.locate(number).row + 1: dataset[number] for number in range(len(dataset))}
    return Found(problems, samples, source.num_too_long)


def list_outcomes(cases: list[BadRecord]) -> dict[int, tuple[str, str | None]]:
    """Say what must become of each line that `write_records` writes for a case: kind and reason."""
    return {2 * number + 2: (case.outcome.kind, case.outcome.reason) for number, case in enumerate(cases)}


if __name__ == "__main__":
    # `bad_chain.py write FOLDER` tells the outcomes, `bad_chain.py train FOLDER` how many samples it loaded.
    from bad_inputs import RECORDS

    if sys.argv[1] == "write":
        write_records(RECORDS, Path(sys.argv[2]))
        print(json.dumps(list_outcomes(RECORDS)))
    else:
        print(len(train_on(Path(sys.argv[2])).samples))
