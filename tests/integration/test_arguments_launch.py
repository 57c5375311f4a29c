"""Arguments in processes of their own: what they import, and a Trainer that runs with them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.integration

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}

LIST_MODULES = "import json, sys; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"

TRAIN = """
import json, os, sys
from pathlib import Path

import torch
from torch import nn
from transformers import Trainer

from internvl_core.arguments import parse_arguments


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, labels):
        return {"loss": ((self.linear(x) - labels) ** 2).mean()}


training = parse_arguments(sys.argv[1:]).training
training.prepare_for_launch()
data = [{"x": torch.ones(4), "labels": torch.zeros(4)}] * 8
trainer = Trainer(model=Model(), args=training, train_dataset=data)
trainer.train()
optimizer = trainer.model_wrapped.optimizer if training.deepspeed else trainer.optimizer
torch.save(training, Path(training.output_dir) / f"arguments-{training.process_index}.bin")
(Path(training.output_dir) / f"report-{training.process_index}.json").write_text(json.dumps({
    "step": trainer.state.global_step,
    "world_size": training.world_size,
    "wrapped": type(trainer.model_wrapped).__name__,
    "decay": [group["weight_decay"] for group in optimizer.param_groups],
    "checkpoints": sorted(path.name for path in Path(training.output_dir).glob("checkpoint-*")),
}))
# As the trainer's own entry does: libraries' threads now and then abort the interpreter on its way out.
sys.stdout.flush()
os._exit(0)
"""


def run_python(code: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_rules_import_neither_torch_nor_transformers() -> None:
    modules = run_python(
        "from internvl_core.argument_rules import check_arguments, fingerprint_arguments, resolve_arguments\n"
        "values = resolve_arguments({'model_name_or_path': 'm', 'meta_path': 'd', 'conv_style': 'internvl2_5',"
        " 'deepspeed': 'zero1'})\n"
        "check_arguments(values, entry='finetune')\n"
        "fingerprint_arguments(values, world_size=2)\n" + LIST_MODULES
    )
    assert "internvl_core" in modules
    assert not modules & {"torch", "transformers", "deepspeed", "accelerate", "peft", "numpy"}


def test_parsing_does_not_import_deepspeed() -> None:
    modules = run_python(
        "from internvl_core.arguments import parse_arguments\n"
        "parse_arguments(['--bf16', 'True', '--deepspeed', 'zero_stage1_config.json'])\n" + LIST_MODULES
    )
    assert "transformers" in modules
    assert "deepspeed" not in modules


@pytest.mark.parametrize(
    ("items", "num_ranks", "wrapped", "num_groups"),
    [
        (["--deepspeed=zero1"], 1, "DeepSpeedEngine", 1),
        pytest.param(["--deepspeed=zero1", "--decay_all=False"], 1, "DeepSpeedEngine", 2, marks=pytest.mark.slow),
        pytest.param(["--deepspeed=zero2"], 2, "DeepSpeedEngine", 1, marks=pytest.mark.slow),
        pytest.param(["--use_cpu=True"], 2, "DistributedDataParallel", 2, marks=pytest.mark.slow),
    ],
)
def test_a_trainer_runs_with_prepared_arguments(
    tmp_path: Path, items: list[str], num_ranks: int, wrapped: str, num_groups: int
) -> None:
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    common = f"--output_dir={tmp_path} --max_steps=2 --weight_decay=0.1 --per_device_train_batch_size=1 --save_steps=2"
    done = subprocess.run(
        [*launch, str(script), *common.split(), "--disable_tqdm=True", *items],
        capture_output=True,
        text=True,
        # The first run on a machine compiles DeepSpeed's CPU communication op, a minute or two.
        timeout=600,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr
    for rank in range(num_ranks):
        report: dict[str, Any] = json.loads((tmp_path / f"report-{rank}.json").read_text())
        assert (report["step"], report["world_size"], report["wrapped"]) == (2, num_ranks, wrapped)
        assert sorted(report["decay"]) == [0.0, 0.1][2 - num_groups :]
        assert report["checkpoints"] == ["checkpoint-2"]
        assert (tmp_path / f"arguments-{rank}.bin").stat().st_size > 0
