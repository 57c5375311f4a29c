"""All bad records at once, from outside: what `internvl data check` says of them, and what the system sees opened."""

import json
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
CHAIN = [sys.executable, str(ROOT / "tests" / "unit" / "bad_chain.py")]
SETTINGS = {
    "conv_style": "internvl2_5",
    "force_image_size": 28,
    "max_dynamic_patch": 6,
    "dynamic_image_size": True,
    "use_thumbnail": True,
    "min_num_frame": 2,
    "max_num_frame": 4,
    "max_seq_length": 512,
}

Lines = dict[tuple[str, str], list[int]]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": "/nowhere", "COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Lines]:
    """A data set with every bad record, and where each kind and reason must be found."""
    folder = tmp_path_factory.mktemp("bad") / "data"
    written = run(*CHAIN, "write", str(folder))
    assert written.returncode == 0, written.stderr
    lines: Lines = defaultdict(list)
    for line, (kind, reason) in json.loads(written.stdout).items():
        lines[kind, reason].append(int(line))
    return folder, lines


def test_check_tells_every_reason_with_its_lines_and_exits_with_65(data: tuple[Path, Lines]) -> None:
    folder, lines = data
    settings = [item for name, value in SETTINGS.items() for item in ("--set", f"{name}={json.dumps(value)}")]
    options = ["--tokenizer", str(ROOT / "tests" / "data" / "tokenizer"), "--cache-dir", str(folder / "checked")]
    command = [sys.executable, "-m", "flows.cli", "data", "check", str(folder / "meta.json"), *options, *settings]
    checked = run(*command, "--samples", "1000", "--json")
    assert checked.returncode == 65, checked.stderr
    (dataset,) = json.loads(checked.stdout)["metas"][0]["datasets"]
    assert dataset["num_too_long"] == len(lines.pop(("left_out", "too_long")))
    for kind, findings in (("left_out", dataset["findings"]), ("bad_sample", dataset["media"]["findings"])):
        expected = {reason: (len(found), sorted(found)[:5]) for (of, reason), found in lines.items() if of == kind}
        assert {finding["reason"]: (finding["count"], finding["lines"]) for finding in findings} == expected
        assert len(expected) >= 5
    told = run(*command, "--samples", "1000")
    assert told.returncode == 65
    assert "Traceback" not in told.stdout + told.stderr
    problems = re.findall(r"^  pets: (\d+) × (.*) \(lines? (\d+).*?\): .+$", told.stdout, re.MULTILINE)
    # One more line is of the samples that are too long.
    assert len(problems) == len(dataset["findings"]) + len(dataset["media"]["findings"]) + 1


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_the_system_sees_no_file_outside_the_root_opened(data: tuple[Path, Lines], tmp_path: Path) -> None:
    folder, lines = data
    calls = "trace=open,openat,openat2,execve,connect"
    trained = run(
        "strace", "-f", "--seccomp-bpf", "-y", "-e", calls, "-o", str(tmp_path / "calls"), *CHAIN, "train", str(folder)
    )
    assert trained.returncode == 0, trained.stderr
    num_left_out = sum(len(found) for (kind, _), found in lines.items() if kind == "left_out")
    assert int(trained.stdout) > num_left_out
    log = (tmp_path / "calls").read_text()
    assert f'"{folder}/media/good.png"' in log
    assert f"{folder}/secret" not in log
    assert "/etc/hostname" not in log
    assert "169.254" not in log
