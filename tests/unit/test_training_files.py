from pathlib import Path

import pytest
from training_checkpoints import write_training_files

from internvl_core.checkpoint.training_files import (
    LATEST_FILE,
    POSITION_FILE,
    TRAINER_FILE,
    TrainingLayout,
    check_training_files,
)
from internvl_core.errors import CheckpointCorrupt

LAYOUTS = {
    "one rank": TrainingLayout(1),
    "ddp": TrainingLayout(2),
    "fp16": TrainingLayout(2, has_scaler=True),
    "deepspeed without zero": TrainingLayout(2, 0),
    "zero1": TrainingLayout(2, 1, has_scheduler_file=False),
    "zero2": TrainingLayout(2, 2),
    "zero3": TrainingLayout(3, 3, has_scheduler_file=False),
}
CASES = [
    pytest.param(layout, patterns[0].replace("*", ""), id=f"{name}-{what}")
    for name, layout in LAYOUTS.items()
    for what, patterns in layout.iter_files(7)
]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_checkpoint_with_all_its_files_is_complete(layout: TrainingLayout, tmp_path: Path) -> None:
    check_training_files(write_training_files(tmp_path, 7, layout), layout, step=7)


def test_each_layout_needs_files_of_its_own() -> None:
    assert len({str(list(layout.iter_files(7))) for layout in LAYOUTS.values()}) == len(LAYOUTS)
    assert len(CASES) > 60


@pytest.mark.parametrize(("layout", "path"), CASES)
def test_a_checkpoint_without_a_file_of_its_state_is_refused_by_the_files_name(
    layout: TrainingLayout, path: str, tmp_path: Path
) -> None:
    (write_training_files(tmp_path, 7, layout) / path).unlink()
    with pytest.raises(CheckpointCorrupt, match="missing") as caught:
        check_training_files(tmp_path, layout, step=7)
    assert path.rpartition("/")[2] in str(caught.value).replace("*", "")
    assert "\n" not in str(caught.value)


def test_shards_in_bf16_are_named_with_it(tmp_path: Path) -> None:
    layout = LAYOUTS["zero1"]
    write_training_files(tmp_path, 7, layout)
    for path in (tmp_path / "global_step7").glob("zero_*"):
        path.rename(path.with_name(f"bf16_{path.name}"))
    check_training_files(tmp_path, layout, step=7)


@pytest.mark.parametrize("name", [TRAINER_FILE, POSITION_FILE, LATEST_FILE])
def test_a_file_of_another_step_is_refused(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS["zero1"]
    write_training_files(tmp_path / "of 6", 6, layout)
    write_training_files(tmp_path / "of 7", 7, layout)
    (tmp_path / "of 6" / name).replace(tmp_path / "of 7" / name)
    with pytest.raises(CheckpointCorrupt, match=rf"{name}: of step 6, in a checkpoint of step 7"):
        check_training_files(tmp_path / "of 7", layout, step=7)
