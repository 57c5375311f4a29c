"""The test of the tests: faults seeded into the protocol's code, each of which the checks must catch.

A mutant is a copy of the package with one place changed. All run under the marker `slow`, otherwise a sample.
"""

import os
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import internvl_core

PACKAGE = Path(internvl_core.__file__).parent
HERE = Path(__file__).parent
LIMIT_S = 300.0

MODEL = ("protocol_checks.py", "150", "1")
"""The model checker, a part of every suite."""


def contract(*files: str) -> tuple[str, ...]:
    """The contract suites in memory."""
    return (
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-k",
        "Memory",
        *(f"test_{file}.py" for file in files),
    )


@dataclass(frozen=True)
class Mutant:
    what: str
    module: str
    old: str
    new: str
    check: tuple[str, ...] = MODEL


MUTANTS = [
    Mutant(
        "the commit record comes before the data",
        "publication",
        "    manifest = replace(manifest, files=_upload(backend, directory, paths, folder))\n",
        "    manifest = replace(manifest, files=_upload(backend, directory, paths, folder))\n"
        "    backend.remove_all(folder)\n"
        "    early = CommitName(manifest.step, manifest.fence, manifest.kind)\n"
        "    create_once(backend, early.path, pack_commit(early, save, manifest.digest, None))\n"
        "    _upload(backend, directory, paths, folder)\n",
    ),
    Mutant(
        "a creation whose answer was lost is not read back",
        "backend",
        "return find_object(backend, name) == body",
        "return False",
    ),
    Mutant(
        "a reader does not hash",
        "verify",
        "    check_entries(found, manifest.files, where=checkpoint.uri)\n",
        "",
    ),
    Mutant(
        "a reader believes sizes and contents",
        "verify",
        "    for entry in manifest.files:\n        if entry.path not in sizes_bytes:",
        "    return manifest\n    for entry in manifest.files:\n        if entry.path not in sizes_bytes:",
        contract("garbage"),
    ),
    Mutant("everything that is committed is live", "lineage", "return all(base and", "return True or all(base and"),
    Mutant(
        "commits that do not verify count",
        "garbage",
        "            continue\n        verified.add",
        "        verified.add",
    ),
    Mutant(
        "of commits that count only sizes are looked at",
        "garbage",
        "                verify(backend, commit.checkpoint)",
        "                verify_sizes(backend, commit.checkpoint)",
    ),
    Mutant(
        "data of later leases is swept",
        "garbage",
        "save_fence is None or save_fence > fence or",
        "save_fence is None or",
        contract("garbage"),
    ),
    Mutant(
        "data goes before its commit record",
        "garbage",
        "        backend.remove(name.path)\n",
        "        for save in backend.list_names(DATA_FOLDER):\n"
        "            if save.startswith(f'{name.step:012d}.{name.fence:06d}.'):\n"
        "                backend.remove_all(f'{DATA_FOLDER}/{save}')\n"
        "        backend.remove(name.path)\n",
    ),
    Mutant(
        "tries of a save share a folder",
        "publication",
        '    folder = f"{DATA_FOLDER}/{save}"\n',
        '    save = save[:20] + "00"\n    folder = f"{DATA_FOLDER}/{save}"\n',
    ),
    Mutant(
        "a damaged newest commit hides the older ones",
        "lineage",
        '                    logger.warning("Passed over %s: %s", name, error)\n',
        "                    return\n",
    ),
    Mutant(
        "who loses the race for a lease holds it too",
        "acquisition",
        "if is_unchanged and _create_lease(backend, fence, owner, base):",
        "if is_unchanged and [_create_lease(backend, fence, owner, base)]:",
    ),
    Mutant(
        "a taker does not look again",
        "acquisition",
        "is_unchanged = _look(backend, sees_beat=not takes_over) == sight",
        "is_unchanged = True",
        contract("leases"),
    ),
    Mutant(
        "a taker does not pin its base",
        "acquisition",
        "pinned = pin_base(backend, fence, base.checkpoint) if base else None",
        "pinned = None",
        contract("fencing"),
    ),
    Mutant(
        "a torn lease fences as if it started afresh",
        "lineage",
        "        if record:\n            origins[fence]",
        "        origins[fence] = Origin(None, None)\n        if record:\n            origins[fence]",
    ),
    Mutant(
        "a lease that rots frees what it fenced",
        "lineage",
        "        if name.fence not in origins and",
        "        if False and name.fence not in origins and",
    ),
    Mutant(
        "only steps are compared, not kinds",
        "lineage",
        "base.age >= name.age",
        "base.age[0] >= name.age[0]",
        contract("fencing"),
    ),
    Mutant(
        "a handover of a zombie counts",
        "lineage",
        "return all(finished and",
        "return True or all(finished and",
        contract("fencing"),
    ),
    Mutant(
        "a handover counts though its checkpoint is history",
        "handover",
        "        if lineage.is_live(CommitName(manifest.step, manifest.fence, manifest.kind)):\n",
        "        if manifest:\n",
        contract("handover"),
    ),
    Mutant(
        "a save that is tried again after all answers were lost is taken for a rival's",
        "publication",
        "    if origin is None or",
        "    if manifest or",
    ),
    Mutant(
        "a lost first beat loses the lease",
        "acquisition",
        "    except StoreUnavailable as error:\n        # The lease is ours",
        "    except BlockingIOError as error:\n        # The lease is ours",
    ),
    Mutant(
        "pins are ignored",
        "garbage",
        "return bases | list_handed_over(backend) | list_pinned(backend)",
        "return bases | list_handed_over(backend)",
        contract("garbage"),
    ),
    Mutant(
        "handovers are ignored",
        "garbage",
        "return bases | list_handed_over(backend) | list_pinned(backend)",
        "return bases | list_pinned(backend)",
        contract("garbage"),
    ),
    Mutant(
        "bases that somebody is about to go on with are ignored",
        "garbage",
        "return bases | list_handed_over(backend) | list_pinned(backend)",
        "return list_handed_over(backend) | list_pinned(backend)",
        contract("garbage"),
    ),
    Mutant(
        "final weights are removed",
        "garbage",
        "        elif name.kind is CheckpointKind.FINAL:\n",
        "        elif not name:\n",
        contract("garbage"),
    ),
    Mutant(
        "a collector does not look whether it is fenced before it removes",
        "garbage",
        "    check_fence(backend, fence)\n    for name",
        "    for name",
        contract("garbage"),
    ),
    Mutant(
        "a save in progress is swept",
        "garbage",
        "save_fence > fence or save in in_progress:",
        "save_fence > fence:",
        contract("garbage"),
    ),
    Mutant(
        "data that a damaged record may name is swept",
        "garbage",
        "            continue  # Perhaps a record names it",
        "            commit = None  # Perhaps a record names it",
        contract("garbage"),
    ),
    Mutant(
        "a publisher does not look whether it is fenced",
        "publication",
        "    check_fence(backend, manifest.fence)\n    name =",
        "    name =",
        contract("fencing"),
    ),
    Mutant(
        "a holder is judged by the clock on the wall",
        "acquisition",
        "    if is_alive is None:\n",
        "    if record and time.time() - record.taken_at > BEAT_TTL_S:\n        return\n    if is_alive is None:\n",
        contract("leases"),
    ),
    Mutant(
        "a beat that moves is not seen",
        "acquisition",
        "        if find_object(backend, beat_path(sight.fence)) != sight.beat:\n            return True\n",
        "",
        contract("leases"),
    ),
    Mutant(
        "a release is not seen",
        "acquisition",
        "    if beat and beat.is_released:\n        return\n",
        "",
        contract("leases"),
    ),
    Mutant(
        "a process with a dead holder's pid holds its lease",
        "lease",
        "start_ticks == self.start_ticks",
        "True",
        contract("leases"),
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.what)
def test_a_mutant_changes_one_place_that_exists(mutant: Mutant) -> None:
    assert (PACKAGE / "checkpoint" / f"{mutant.module}.py").read_text().count(mutant.old) == 1


def run_check(mutant: Mutant, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the mutant's check with a copy of the package that has its fault."""
    shutil.copytree(PACKAGE, folder / "internvl_core", ignore=shutil.ignore_patterns("__pycache__"))
    module = folder / "internvl_core" / "checkpoint" / f"{mutant.module}.py"
    module.write_text(module.read_text().replace(mutant.old, mutant.new))
    return subprocess.run(
        [sys.executable, *mutant.check],
        cwd=HERE,
        # What conftests import besides comes from here.
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (folder, HERE, PACKAGE.parent)))},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


@pytest.mark.parametrize("check", [MODEL, contract("leases", "fencing", "garbage", "verify", "handover")])
def test_the_code_as_it_is_passes_the_checks(check: tuple[str, ...], tmp_path: Path) -> None:
    found = run_check(Mutant("nothing is changed", "verify", "\n", "\n", check), tmp_path)
    assert found.returncode == 0, found.stdout + found.stderr


def check_is_caught(mutant: Mutant, folder: Path) -> None:
    found = run_check(mutant, folder)
    # 1 is a violation, or a failed test: not that the check itself broke.
    assert found.returncode == 1, f"{mutant.what}: {found.stdout[-2000:]}{found.stderr[-2000:]}"


def test_a_sample_of_mutants_is_caught(tmp_path: Path, sample_seed: int) -> None:
    for number, mutant in enumerate(random.Random(sample_seed).sample(MUTANTS, 3)):
        check_is_caught(mutant, tmp_path / str(number))


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.what)
def test_every_mutant_is_caught(mutant: Mutant, tmp_path: Path) -> None:
    check_is_caught(mutant, tmp_path)
