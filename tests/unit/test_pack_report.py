"""What `internvl data pack-report` prints, and what it refuses."""

import io
import json
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from size_streams import COST, DATA_DIR, STANDARD, draw_mixture

from flows import cli
from internvl_core.data.sizes import PackLimits
from internvl_core.errors import ArgumentError, DataError
from internvl_core.inspection.pack_report import Lengths, load_lengths, report_packs

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process; return its exit code, its output and its errors."""

    def run_main(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["internvl", "data", "pack-report", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        return caught.value.code or 0, captured.out, captured.err  # type: ignore[return-value]

    return run_main


def write_lengths(path: Path, **arrays: Any) -> Path:
    np.savez(path, **{name: np.array(values) for name, values in arrays.items()})
    return path


def test_stdout_is_one_json_object_and_the_table_is_on_stderr(run: Run) -> None:
    code, out, err = run(DATA_DIR / "lengths_mix.npz", "--ranks", "8, 64,4096")
    report = json.loads(out)
    assert code == 0
    with np.load(DATA_DIR / "lengths_mix.npz") as file:
        arrays = dict(file)
    lower_bound = max(arrays["tokens"].sum() / 16384, arrays["tiles"].sum() / 48)
    assert report["efficiency"] == pytest.approx(lower_bound / report["packs"], abs=1e-4)
    assert report["token_fill"] == pytest.approx(arrays["tokens"].sum() / 16384 / report["packs"], abs=1e-4)
    assert report["tile_fill"] == pytest.approx(arrays["tiles"].sum() / 48 / report["packs"], abs=1e-4)
    assert report["efficiency"] >= 0.96
    assert list(report["balance"]) == ["8", "64", "4096"]
    assert min(report["balance"]["8"], report["balance"]["64"]) >= 0.99
    # There are fewer packs than ranks.
    assert report["balance"]["4096"] is None
    assert report["samples"] == 12000
    assert report["max_delay"] > 0
    assert report["us_per_sample"] > 0
    assert "efficiency" in err
    assert "4,096" in err


def test_the_legacy_packer_is_less_even(run: Run) -> None:
    reports = {}
    for packer in ("balanced", "legacy"):
        reports[packer] = json.loads(run(DATA_DIR / "lengths_mix.npz", "--packer", packer)[1])
    assert reports["legacy"]["balance"]["64"] < 0.9 < 0.99 < reports["balanced"]["balance"]["64"]
    assert reports["legacy"]["packer"] == "legacy"


def test_the_order_is_by_the_seed(run: Run) -> None:
    packs = []
    for seed in (0, 0, 1):
        report = json.loads(run(DATA_DIR / "lengths_sft.npz", "--seed", seed, "--model", "26b")[1])
        packs.append({key: value for key, value in report.items() if key not in ("us_per_sample", "trial_s")})
    assert packs[0] == packs[1] != packs[2]


def test_samples_that_fit_into_no_pack_are_left_out_and_counted(run: Run, tmp_path: Path) -> None:
    path = write_lengths(tmp_path / "a.npz", tokens=[10, 200, 30, 40], tiles=[0, 0, 9, 1])
    code, out, _ = run(path, "--max-tokens", 100, "--max-tiles", 8, "--ranks", 1)
    report = json.loads(out)
    assert (code, report["samples"], report["left_out"], report["packs"]) == (0, 2, 2, 1)
    assert report["balance"] == {"1": 1.0}


def test_balance_is_the_mean_over_the_highest_of_complete_steps() -> None:
    # Every sample is a pack of its own, in an order that the report shuffles: three steps of two, one pack left.
    lengths = Lengths(np.array([60, 100, 60, 100, 60, 100, 60]), np.zeros(7, np.int64), 0)
    report = report_packs(lengths, PackLimits(100, 8), COST, ranks=[2, 7], packer="legacy")
    assert (report.packs, report.by_ranks[2].steps, report.by_ranks[2].packs_left) == (7, 3, 1)
    costs = COST.count(lengths.tokens, lengths.tiles)
    assert report.by_ranks[7].balance == pytest.approx(costs.mean() / costs.max(), rel=1e-4)
    assert report.by_ranks[7].balance == pytest.approx(report.cost_over_highest)


def test_where_packs_cannot_be_even_the_report_groups_steps_as_training_does() -> None:
    limits = PackLimits(8192, 32)
    stream = draw_mixture(12000, videos=0.2, limits=limits)
    report = report_packs(Lengths(stream.tokens, stream.tiles, 0), limits, COST, ranks=[8, 64])
    for job in report.by_ranks.values():
        assert job.block_steps > 1
        assert job.balance is not None
        assert job.balance >= 0.99
        assert job.max_delay > report.max_delay


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"tokens": [1, 2]}, "no array tiles. It should hold the arrays tokens and tiles."),
        ({"lengths": [1]}, "no array tokens."),
        ({"tokens": [1, 2], "tiles": [1]}, "2 tokens but 1 tiles."),
        ({"tokens": [1, -2], "tiles": [1, 1]}, "tokens of row 1 are -2; they should be at least 0."),
        ({"tokens": [1], "tiles": [-1]}, "tiles of row 0 are -1"),
        ({"tokens": [1.5], "tiles": [1]}, "tokens are float64; they should be whole numbers."),
        ({"tokens": np.zeros(1, "m8[s]"), "tiles": [1]}, "tokens are timedelta64[s]; they should be whole numbers."),
        ({"tokens": [True], "tiles": [1]}, "tokens are bool; they should be whole numbers."),
        ({"tokens": ["a"], "tiles": [1]}, "tokens are <U1; they should be whole numbers."),
        ({"tokens": [[1]], "tiles": [1]}, "tokens has 2 dimensions; it should have one"),
        ({"tokens": np.zeros(0, int), "tiles": np.zeros(0, int)}, "tokens and tiles are empty."),
        ({"tokens": [20000], "tiles": [1]}, "none of 1 samples fits into 16384 tokens and 48 tiles."),
        ({"tokens": [2**64 - 1], "tiles": np.array([1], np.uint64)}, "none of 1 samples fits into"),
        ({"tokens": [0, 0], "tiles": [1, 1]}, "no sample has any tokens."),
    ],
)
def test_wrong_arrays_are_named(run: Run, tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    path = write_lengths(tmp_path / "a.npz", **arrays)
    code, out, err = run(path)
    assert (code, out) == (DataError.exit_code, "")
    assert f"DataError: {path}: {message}" in err
    assert "Traceback" not in err


def write_array(array: np.ndarray[Any, Any], *, allow_pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=allow_pickle)
    return buffer.getvalue()


def write_zip(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("tokens.npy", content)
        archive.writestr("tiles.npy", content)
    return buffer.getvalue()


WHOLE = write_zip(write_array(np.arange(1, 1000)))


class Trap:
    """Fails the test if it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("the pickle was run",))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not an array at all",
        pickle.dumps({"tokens": [1], "tiles": [1]}),
        write_array(np.arange(3)),
        write_zip(write_array(np.array([Trap()], dtype=object), allow_pickle=True)),
        write_zip(b"\x93NUMPY\x01\x00\x10\x00not a header   "),
        write_zip(b"text, and no array"),
        write_zip(write_array(np.arange(1000))[:200]),
        WHOLE[:1000],
        WHOLE.replace(write_array(np.arange(1, 1000))[-64:], bytes(64)),
    ],
    ids=["empty", "text", "pickle", "npy", "objects", "header", "member", "short", "truncated", "damaged"],
)
def test_a_file_that_is_no_npz_is_refused(run: Run, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    code, out, err = run(path)
    assert (code, out) == (DataError.exit_code, "")
    assert err.startswith(f"DataError: {path}: ")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model 9b", "--model: 9b is none of 1b, 2b, 4b, 8b, 26b, 38b, 78b."),
        ("--ranks eight", "--ranks: eight: eight is no number of ranks, such as 8,64,512."),
        ("--ranks 8,,64", "--ranks: 8,,64: nothing is no number of ranks"),
        ("--ranks 0", "--ranks: 0: 0 is no number of ranks"),
        ("--ranks -8", "--ranks: -8: -8 is no number of ranks"),
        ("--ranks 99999999999", "--ranks: 99999999999: 99999999999 is no number of ranks"),
        ("--ranks ٨", "--ranks: ٨: ٨ is no number of ranks"),
        ("--max-tokens 0", "--max-tokens: 0 must be from 1 to 16777216."),
        ("--max-tokens 4294967296", "--max-tokens: 4294967296 must be from 1 to 16777216."),
        ("--max-tiles -1", "--max-tiles: -1 must be from 1 to 65536."),
        ("--seed -1", "--seed: -1 must be from 0 to 4294967295."),
        ("--packer fast", "'fast' is not one of 'balanced', 'legacy'"),
        ("--max-tokens many", "should be a valid integer"),
    ],
)
def test_wrong_arguments_are_named(run: Run, arguments: str, message: str) -> None:
    code, out, err = run(DATA_DIR / "lengths_mix.npz", *arguments.split())
    assert (code, out) == (ArgumentError.exit_code, "")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize("name", ["nowhere.npz", "."])
def test_a_file_that_cannot_be_opened_is_a_wrong_argument(run: Run, tmp_path: Path, name: str) -> None:
    code, out, err = run(tmp_path / name)
    assert (code, out) == (ArgumentError.exit_code, "")
    assert "cannot be opened" in err


def test_lengths_keep_their_order(tmp_path: Path) -> None:
    lengths = load_lengths(write_lengths(tmp_path / "a.npz", tokens=[5, 4, 3], tiles=[1, 2, 3]), STANDARD)
    assert (lengths.tokens.tolist(), lengths.tiles.tolist()) == ([5, 4, 3], [1, 2, 3])
