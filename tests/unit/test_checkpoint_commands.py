"""`internvl ckpt`: what it shows is what is there, and what it changes is only what was asked for."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flows import cli
from internvl_core.checkpoint.lease import Owner
from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.checkpoint.store import Lease, StageStore
from internvl_core.contract import CheckpointRef

FINGERPRINT = "0123456789abcdef" * 4
HEAVY = ("torch", "transformers", "prefect", "mlflow", "fsspec", "botocore", "rich.console")

Run = Callable[..., tuple[int, str, str]]
Publish = Callable[..., CheckpointRef]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def run_main(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["internvl", "ckpt", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        return caught.value.code or 0, captured.out, captured.err  # type: ignore[return-value]

    return run_main


@pytest.fixture
def store(tmp_path: Path) -> StageStore:
    return StageStore(f"file://{tmp_path}/runs", "stage2", FINGERPRINT)


@pytest.fixture
def publish(store: StageStore, tmp_path: Path) -> Publish:
    def publish(step: int, fence: int = 1, kind: CheckpointKind = CheckpointKind.TRAINING) -> CheckpointRef:
        directory = tmp_path / f"local-{step}-{fence}-{kind}"
        (directory / "optimizer").mkdir(parents=True)
        (directory / "model.safetensors").write_bytes(b"weights" * 1000)
        (directory / "optimizer/rank-0.bin").write_bytes(str(step).encode())
        info = {"arguments": {"learning_rate": 4e-5, "names": ["a"] * 200}, "world_size": 2, "time": 0.0}
        parent = CheckpointRef("s3://elsewhere/stage1", "ab" * 32)
        return store.publish(directory, step=step, fence=fence, kind=kind, parent=parent, info=info)

    return publish


def take_lease(store: StageStore, run_id: str = "run-1") -> Lease:
    return store.acquire(Owner.of_this_process(run_id), choose_base=lambda found: next(iter(found), None))


def damage(checkpoint: CheckpointRef, path: str = "model.safetensors") -> None:
    file = Path(checkpoint.uri.removeprefix("file://"), path)
    body = file.read_bytes()
    # Not in place: the local directory has the same inode.
    file.unlink()
    file.write_bytes(body[:-1] + bytes([body[-1] ^ 1]))


def test_help_imports_nothing_heavy() -> None:
    code = f"""
import sys
sys.argv = ["internvl", "ckpt", "--help"]
from flows import cli
try:
    cli.main()
except SystemExit:
    pass
print("heavy:", [name for name in {HEAVY!r} if name in sys.modules and name != "rich.console"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "heavy: []" in done.stdout
    assert "take-over" in done.stdout


def test_a_stage_is_listed_with_all_that_is_known_of_its_checkpoints(
    run: Run, store: StageStore, publish: Publish
) -> None:
    take_lease(store)
    publish(10)
    pinned = publish(20)
    publish(30)
    damage(publish(40), "MANIFEST")
    final = publish(30, kind=CheckpointKind.FINAL)
    store.pin("best", pinned)
    store.hand_over(final, {})
    code, output, _ = run("list", store.uri)
    rows = [line.split() for line in output.splitlines()[3:8]]
    assert code == 0
    assert output.splitlines()[0] == store.uri
    assert "lease 1 is held by run run-1 (process" in output.splitlines()[1]
    assert [(row[0], row[1]) for row in rows] == [
        ("40", "training"),
        ("30", "final"),
        ("30", "training"),
        ("20", "training"),
        ("10", "training"),
    ]
    assert "damaged" in rows[0]
    assert "MANIFEST: sha256 is" in output
    assert rows[1][3:-1] == ["1970-01-01", "00:00:00Z", "2", "7", "kB", "live", "handover"]
    assert rows[3][-4:-1] == ["live", "pin", "best"]
    assert rows[4][-2] == "live"


def test_what_a_fresh_run_left_behind_is_listed_as_superseded(run: Run, store: StageStore, publish: Publish) -> None:
    publish(10)
    store.acquire(Owner.of_this_process("fresh"), choose_base=lambda found: None)
    _, output, _ = run("list", store.uri, "--json")
    [stage] = json.loads(output)
    assert stage["lease"]["fence"] == 2
    assert [(row["step"], row["is_live"]) for row in stage["checkpoints"]] == [(10, False)]


def test_a_whole_store_is_listed_stage_by_stage(run: Run, store: StageStore, publish: Publish, tmp_path: Path) -> None:
    publish(10)
    other = StageStore(f"file://{tmp_path}/runs", "stage1", FINGERPRINT)
    take_lease(other)
    (tmp_path / "runs/notes").mkdir()
    code, output, _ = run("list", str(tmp_path / "runs"))
    assert code == 0
    assert [line for line in output.splitlines() if line.startswith("file://")] == [other.uri, store.uri]
    assert "nothing is committed" in output
    assert "nobody has taken a lease yet" in output


def test_a_checkpoint_is_shown_with_its_lineage(run: Run, store: StageStore, publish: Publish) -> None:
    checkpoint = publish(10)
    code, output, _ = run("show", checkpoint.uri)
    assert code == 0
    for line in (
        f"Checkpoint  {checkpoint.uri}",
        f"Digest      {checkpoint.digest}",
        "Step        10 (training, fence 1)",
        "Committed   1970-01-01 00:00:00Z",
        f"Parent      s3://elsewhere/stage1 ({'ab' * 8})",
        "world_size: 2",
        "  learning_rate: 4e-05",
        "2 files, 7 kB",
    ):
        assert line in output.splitlines()
    assert max(map(len, output.splitlines())) < 250
    _, as_json, _ = run("show", store.uri, "--json")
    shown = json.loads(as_json)
    assert (shown["uri"], shown["step"], shown["info"]["world_size"]) == (checkpoint.uri, 10, 2)
    assert len(shown["info"]["arguments"]["names"]) == 200


def test_a_whole_checkpoint_verifies_with_the_speed(run: Run, store: StageStore, publish: Publish) -> None:
    checkpoint = publish(10)
    code, output, _ = run("verify", store.uri)
    assert code == 0
    assert output.startswith(f"whole    {checkpoint.uri}  (0.0 MB in 0.0 s, ")
    assert output.endswith(" MB/s)\n")


def test_a_damaged_checkpoint_ends_with_80_and_names_the_file(run: Run, publish: Publish) -> None:
    checkpoint = publish(10)
    damage(checkpoint)
    code, _, errors = run("verify", checkpoint.uri)
    assert code == 80
    assert f"CheckpointCorrupt: {checkpoint.uri}/model.safetensors: sha256 is " in errors


def test_all_checkpoints_are_verified_although_some_are_damaged(run: Run, store: StageStore, publish: Publish) -> None:
    whole = publish(10)
    damage(publish(20))
    damage(publish(30), "MANIFEST")
    publish(40)
    Path(f"{store.uri.removeprefix('file://')}/commits/{40:012d}.{1:06d}.training.json").write_bytes(b"torn")
    code, output, errors = run("verify", store.uri, "--all")
    assert code == 80
    assert "3 of 4 checkpoints are damaged" in errors
    assert [line.split()[0] for line in output.splitlines()] == ["damaged"] * 3 + ["whole"]
    assert "model.safetensors: sha256 is" in output
    assert whole.uri in output


def test_a_checkpoint_is_fetched_into_a_new_folder(run: Run, publish: Publish, tmp_path: Path) -> None:
    checkpoint = publish(10)
    code, output, _ = run("fetch", checkpoint.uri, str(tmp_path / "new/folder"))
    assert code == 0
    assert "MB/s" in output
    assert (tmp_path / "new/folder/optimizer/rank-0.bin").read_bytes() == b"10"
    assert not (tmp_path / "new/folder/MANIFEST").exists()
    # A copy of one's own: what is written into it does not reach the store.
    assert (tmp_path / "new/folder/model.safetensors").stat().st_nlink == 1


def test_nothing_half_is_left_where_a_fetch_fails(run: Run, publish: Publish, tmp_path: Path) -> None:
    checkpoint = publish(10)
    damage(checkpoint)
    (tmp_path / "empty").mkdir()
    code, _, errors = run("fetch", checkpoint.uri, str(tmp_path / "empty"))
    assert code == 80
    assert "model.safetensors: sha256 is" in errors
    assert list((tmp_path / "empty").iterdir()) == []
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".fetching")] == []


def test_a_folder_with_something_in_it_is_not_fetched_into(run: Run, publish: Publish, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_bytes(b"")
    code, _, errors = run("fetch", publish(10).uri, str(tmp_path / "full"))
    assert (code, "is not empty" in errors) == (64, True)


def test_garbage_is_collected_and_what_stays_is_told_with_the_reason(
    run: Run, store: StageStore, publish: Publish
) -> None:
    pinned = publish(10)
    for step in (20, 30, 40):
        publish(step)
    store.pin("first", pinned)
    code, rehearsal, _ = run("gc", store.uri, "--keep", "2", "--dry-run")
    assert code == 0
    assert "would be removed: step 20 (training, fence 1)" in rehearsal
    assert "would be removed: data/000000000020.000001." in rehearsal
    assert [commit.step for commit in store.list_committed()] == [40, 30, 20, 10]
    code, output, _ = run("gc", store.uri, "--keep", "2")
    assert code == 0
    assert output == rehearsal.replace("would be removed", "removed")
    assert "kept: step 10 (training, fence 1), pinned as first" in output
    assert "kept: step 40 (training, fence 1), one of the newest that verify" in output
    assert [commit.step for commit in store.list_committed()] == [40, 30, 10]
    # The lease is given back: the next run need not wait.
    assert take_lease(store).fence == 3


def test_garbage_of_a_living_run_is_left_alone(run: Run, store: StageStore, publish: Publish) -> None:
    publish(10)
    alive = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    try:
        from dataclasses import replace

        from internvl_core.checkpoint.lease import _find_start_ticks

        owner = replace(Owner.of_this_process("other"), pid=alive.pid, start_ticks=_find_start_ticks(alive.pid) or 0)
        store.acquire(owner, choose_base=lambda found: next(iter(found), None))
        code, _, errors = run("gc", store.uri, "--keep", "2")
        assert code == 73
        assert f"lease 2 is held by run other (process {alive.pid}" in errors
    finally:
        alive.communicate()


def test_a_stage_where_nothing_verifies_is_not_made_history(run: Run, store: StageStore, publish: Publish) -> None:
    damage(publish(10))
    for command in (["gc", store.uri, "--keep", "2"], ["take-over", store.uri]):
        take_lease(store).beat(step=1, phase="training") if command[0] == "take-over" else None
        code, _, errors = run(*command)
        assert code == 80
        assert "none of its checkpoints verifies, so nothing was changed" in errors
    assert [commit.step for commit in store.list_committed()] == [10]


def test_a_pin_is_set_told_and_taken_away(run: Run, store: StageStore, publish: Publish) -> None:
    checkpoint = publish(10)
    assert run("pin", checkpoint.uri, "best")[0] == 0
    assert store.list_pins() == {"best": checkpoint}
    assert run("pin", store.uri, "best")[0] == 0
    assert run("unpin", store.uri, "best")[0] == 0
    assert store.list_pins() == {}
    code, _, errors = run("unpin", store.uri, "best")
    assert code == 80
    assert "does not exist. Pins: none." in errors


def test_whoever_cannot_be_reached_is_fenced(run: Run, store: StageStore, publish: Publish) -> None:
    publish(10)
    lease = take_lease(store, "lost")
    lease.beat(step=17, phase="training")
    code, output, _ = run("take-over", store.uri)
    assert code == 0
    assert output.startswith("Fenced: run lost (process ")
    assert "It was at step 17 (training)." in output
    assert "goes on with step 10 (training, fence 1)" in output
    with pytest.raises(Exception, match="nothing more may be committed"):
        lease.check()
    assert take_lease(store, "next").fence == lease.fence + 2
    assert run("take-over", store.uri)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("list {tmp}/nothing", 80, "holds no checkpoints. Give the URI of a store"),
        ("list http://169.254.169.254/latest", 64, "cannot be a checkpoint store"),
        ("list s3://KEY:hunter2@bucket/runs", 64, "carries credentials"),
        ("list memory://runs", 64, "is the memory of another process"),
        ("show {tmp}/nothing", 80, "was never committed. Committed: nothing."),
        ("verify {tmp}/runs", 80, "is a store with the stages stage1-0123456789abcdef, stage2-0123456789abcdef"),
        ("verify {tmp}/runs/stage1-0123456789abcdef --all", 80, "nothing is committed there"),
        ("gc {tmp}/runs/stage2-0123456789abcdef --keep 1", 64, "--keep 1: too few"),
        ("gc {tmp}/runs/stage2-0123456789abcdef", 64, "Missing option '--keep'"),
        ("pin {tmp}/runs/stage2-0123456789abcdef a/b", 64, "cannot name a pin"),
        ("take-over {tmp}/runs/stage2-0123456789abcdef", 80, "nobody ever took a lease there"),
        ("list", 64, "Missing argument"),
        ("", 64, "Missing command"),
    ],
)
def test_what_is_wrong_is_one_line_and_the_right_code(
    run: Run, publish: Publish, tmp_path: Path, arguments: str, code: int, message: str
) -> None:
    publish(10)
    take_lease(StageStore(f"file://{tmp_path}/runs", "stage1", FINGERPRINT))
    found, _, errors = run(*arguments.format(tmp=tmp_path).split())
    assert found == code
    assert message in errors
    assert len(errors.splitlines()) == 1
    assert "hunter2" not in errors


def test_a_relative_path_is_a_store_too(
    run: Run, store: StageStore, publish: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(10)
    monkeypatch.chdir(tmp_path)
    code, output, _ = run("list", f"runs{os.sep}")
    assert code == 0
    assert store.uri in output
