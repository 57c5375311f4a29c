"""No bad input hangs, kills a worker, looks outside the root, or is trained on as something else."""

import ctypes
import multiprocessing
import os
import re
import sys
import sysconfig
import time
from collections import Counter
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from bad_cases import ANNOTATION, MEDIA, META, SECRET, BadFiles, BadRecord, write_sound
from bad_chain import Found, open_data, train_on, write_files, write_record, write_records
from bad_inputs import FILES, RECORDS
from torch.utils.data import DataLoader

from internvl_core.data.dataset import Sample
from internvl_core.data.quarantine import BadSample
from internvl_core.errors import DataError, Reason

LIMIT_S = 10
IN_ACCESS_OR_OPEN = 0x1 | 0x20


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    """The good record as it is where nothing bad is near."""
    folder = tmp_path_factory.mktemp("sound")
    write_sound(folder)
    sample = train_on(folder).samples[1]
    assert not isinstance(sample, BadSample)
    return sample


class Watch:
    """The kernel's record of what is opened or read in a folder, by Python and by C libraries alike."""

    def __init__(self, folder: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        assert libc.inotify_add_watch(self._descriptor, os.fsencode(folder), IN_ACCESS_OR_OPEN) > 0

    def is_quiet(self) -> bool:
        try:
            return not os.read(self._descriptor, 4096)
        except BlockingIOError:
            return True

    def close(self) -> None:
        os.close(self._descriptor)


def run(folder: Path) -> Found:
    """Train on a data set; nothing may look into the folder of secrets meanwhile, nor take long."""
    watch, started = Watch(folder / SECRET), time.monotonic()
    try:
        return train_on(folder)
    finally:
        is_quiet = watch.is_quiet()
        watch.close()
        assert is_quiet, "something looked outside the root"
        assert time.monotonic() - started < LIMIT_S


def check_message(message: str, pattern: str) -> None:
    assert len(message.splitlines()) == 1
    assert len(message) < 600
    assert "Traceback" not in message
    assert re.search(pattern, message), message


def is_equal(sample: Sample | BadSample, other: Sample | BadSample) -> bool:
    if isinstance(sample, BadSample) or isinstance(other, BadSample):
        return sample == other
    return (
        sample["input_ids"].equal(other["input_ids"])
        and sample["labels"].equal(other["labels"])
        and sample["tiles"].equal(other["tiles"])
    )


def check_found(case: BadRecord | BadFiles, line: int, found: Found, folder: Path) -> None:
    outcome, sample = case.outcome, found.samples.get(line)
    if outcome.kind == "good":
        assert sample is not None
        assert not isinstance(sample, BadSample), sample.message
    elif outcome.kind == "bad_sample":
        assert isinstance(sample, BadSample)
        assert (sample.sample_id, sample.reason) == (f"pets:{line}", outcome.reason), sample.message
        check_message(sample.message, f"^{re.escape(str(folder / ANNOTATION))}:{line}: .*({outcome.text})")
    else:
        assert sample is None
        if outcome.reason is Reason.TOO_LONG:
            assert line not in found.problems
            return
        problem = found.problems[line]
        assert problem.reason == outcome.reason, problem.message
        check_message(problem.message, outcome.text)


def test_no_known_evil_is_missing_from_the_corpus() -> None:
    names = [case.name for case in RECORDS] + [case.name for case in FILES]
    assert len(set(names)) == len(names) > 200
    assert {int(name.split()[0]) for name in names if re.match(r"\d+ ", name)} == set(range(1, 83))


@pytest.mark.parametrize("case", RECORDS, ids=lambda case: case.name)
def test_a_bad_record_is_told_in_a_line_and_its_neighbours_are_trained_on(
    case: BadRecord, tmp_path: Path, good: Sample
) -> None:
    write_record(case, tmp_path)
    found = run(tmp_path)
    check_found(case, 2, found, tmp_path)
    assert found.samples.keys() | found.problems.keys() | {2} == {1, 2, 3}
    assert found.num_too_long == (case.outcome.reason is Reason.TOO_LONG)
    assert is_equal(found.samples[1], good)
    assert is_equal(found.samples[3], good)


@pytest.mark.parametrize("case", FILES, ids=lambda case: case.name)
def test_bad_files_are_refused_in_a_line_or_read_as_they_are_meant(
    case: BadFiles, tmp_path: Path, good: Sample
) -> None:
    write_files(case, tmp_path)
    if case.outcome.kind == "meta_error":
        with pytest.raises(DataError) as refused:
            run(tmp_path)
        check_message(str(refused.value), case.outcome.text)
        assert re.search(f"{META}|{ANNOTATION}|dataset 'pets'", str(refused.value))
        return
    found = run(tmp_path)
    if case.line is not None:
        check_found(case, case.line, found, tmp_path)
    assert found.samples.keys() == {1, 2}
    assert all(is_equal(sample, good) for sample in found.samples.values())


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One data set with all bad records."""
    folder = tmp_path_factory.mktemp("everything") / "data"
    write_records(RECORDS, folder)
    return folder


def number_lines(kind: str | None = None) -> dict[int, BadRecord]:
    return {2 * number + 2: case for number, case in enumerate(RECORDS) if kind in (None, case.outcome.kind)}


def test_all_bad_records_together_are_told_by_reason_and_line(everything: Path, good: Sample) -> None:
    dataset = open_data(everything)
    (source,) = dataset.mixture.sources
    cases = number_lines("left_out")
    too_long = {line for line, case in cases.items() if case.outcome.reason is Reason.TOO_LONG}
    expected = Counter(case.outcome.reason for line, case in cases.items() if line not in too_long)
    assert source.index.problem_counts == expected
    assert len(expected) >= 10
    assert {problem.line for problem in source.index.iter_problems()} == cases.keys() - too_long
    assert source.num_too_long == len(too_long)
    assert source.index.num_records == 2 * len(RECORDS) + 1
    found = train_on(everything)
    for line, case in number_lines().items():
        check_found(case, line, found, everything)
    assert all(is_equal(found.samples[2 * number + 1], good) for number in range(len(RECORDS) + 1))


def test_no_worker_dies_of_bad_samples_and_good_ones_come_out_as_in_the_main_process(everything: Path) -> None:
    dataset = open_data(everything)
    alone = [dataset[number] for number in range(len(dataset))]
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
    loaded = list(loader)
    assert len(loaded) == len(alone)
    assert all(is_equal(one, other) for one, other in zip(loaded, alone, strict=True))
    bad = [sample for sample in loaded if isinstance(sample, BadSample)]
    assert {sample.line for sample in bad} == number_lines("bad_sample").keys()
    assert {sample.reason for sample in bad} == {
        Reason.MEDIA,
        Reason.MEDIA_SIZE,
        Reason.MISSING,
        Reason.PATH,
        Reason.SIZE_MISMATCH,
    }


OPENING = ("open", "os.scandir", "os.listdir")
REACHING_OUT = ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.system")


def train_audited(folders: list[Path], pipe: Connection) -> None:
    """Train on data sets, and tell what the interpreter opened for it."""
    events: set[tuple[str, str]] = set()

    def listen(event: str, arguments: tuple[Any, ...]) -> None:
        if event in REACHING_OUT or (event in OPENING and isinstance(arguments[0], str | bytes | os.PathLike)):
            events.add((event, str(arguments[0]) if event in REACHING_OUT else os.fsdecode(arguments[0])))

    sys.addaudithook(listen)
    for folder in folders:
        with suppress(DataError):
            train_on(folder, cache_name="audited")
    pipe.send(events)


def test_nothing_outside_of_the_data_set_is_opened(everything: Path, tmp_path: Path) -> None:
    folders = [everything]
    for number, case in enumerate(FILES):
        folders.append(tmp_path / str(number))
        write_files(case, folders[-1])
    # In a process of its own, because a hook stays for ever.
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=train_audited, args=(folders, sender))
    process.start()
    sender.close()
    events = receiver.recv()
    process.join()
    assert {event for event, _ in events} <= set(OPENING)
    paths = {Path(path).resolve() for _, path in events}
    assert everything / MEDIA / "good.png" in paths
    allowed = [*folders, *map(Path, sysconfig.get_paths().values()), Path(__file__).parents[2]]
    inside = {path for path in paths if any(path.is_relative_to(place) for place in allowed)}
    assert paths - inside == set()
    assert [path for path in inside if SECRET in path.parts] == []
