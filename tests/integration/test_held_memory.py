"""What `internvl plan` says a rank holds, against what ranks of our trainer held; and the plans of what ships."""

import json
import os
import subprocess
import sys
from collections.abc import Container, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from stage_runs import Inputs

from flows.recipe import list_recipes
from internvl_core.argument_rules import resolve_arguments
from internvl_core.inspection.plan import plan
from internvl_core.inspection.plan_report import PlanJob, StageJob
from internvl_core.smoke.components import ComponentsSettings, generate_components
from internvl_core.smoke.digits import DigitsSettings, generate_digits

pytestmark = [
    pytest.mark.integration,
    # PEFT 0.21 asks transformers 5.23 by an old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

SCRIPT = Path(__file__).parent / "fakes" / "held_memory.py"
ROOT = Path(__file__).parents[2]
DEADLINE_S = 240
# Ten seconds where nothing else runs.
PLAN_DEADLINE_S = 120
NUM_RANKS = 2
KINDS = ("weights", "gradients", "optimizer")

FROZEN = {"freeze_llm": True, "freeze_backbone": True, "freeze_mlp": True}
# No parameter of a model this small would be shared out with the built-in threshold.
ZERO3_SHARED = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 200, "reduce_bucket_size": 1_000_000},
    "bf16": {"enabled": "auto"},
    "gradient_clipping": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True}},
}
WAYS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ddp, projector alone": FROZEN | {"freeze_mlp": False},
    "zero1": {"deepspeed": "zero1"},
    "zero1, bf16, accumulation": {"deepspeed": "zero1", "bf16": True, "gradient_accumulation_steps": 2},
    "zero1, bf16, adapters": {"deepspeed": "zero1", "bf16": True, "use_llm_lora": 8, **FROZEN},
    "zero2, bf16": {"deepspeed": "zero2", "bf16": True},
    "zero3, bf16": {"deepspeed": "zero3", "bf16": True},
    "zero3, bf16, all shared": {"deepspeed": ZERO3_SHARED, "bf16": True},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """A model of 0.8 million parameters, so that nothing but them counts."""
    folder = tmp_path_factory.mktemp("inputs")
    generate_digits(folder / "data", DigitsSettings(40, 20))
    generate_components(folder / "components", folder / "data" / "annotations", ComponentsSettings(hidden_size=128))
    return Inputs(folder)


def measure(folder: Path, arguments: dict[str, Any]) -> dict[str, int]:
    """Train three updates on two ranks; return what the rank that held most has held of each kind."""
    items = [
        f"--{name}={json.dumps(value) if isinstance(value, dict) else value}"
        for name, value in arguments.items()
        if value is not None
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={NUM_RANKS}"]
    done = subprocess.run(
        [*command, str(SCRIPT), str(folder), *items],
        timeout=DEADLINE_S,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(NUM_RANKS)]
    return {kind: max(rank[kind] for rank in ranks) for kind in KINDS}


SLOW_WAYS = [way for way in WAYS if way != "zero3, bf16, all shared"]
RECIPES = [name for name in list_recipes() if name != "smoke"]
QUICK_RECIPES = ("internvl2_5-1b",)


def mark_slow(names: Iterable[str], slow: Container[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow if name in slow else ()) for name in names]


@pytest.mark.parametrize("way", mark_slow(WAYS, SLOW_WAYS))
def test_the_static_part_is_within_2_percent_of_what_ranks_hold(way: str, inputs: Inputs, tmp_path: Path) -> None:
    arguments = {
        **inputs.arguments,
        "eval_meta_path": None,
        "max_steps": 3,
        "output_dir": str(tmp_path / "output"),
        "cache_dir": str(tmp_path / "cache"),
        **WAYS[way],
    }
    stage = StageJob("stage", "finetune", resolve_arguments(arguments), NUM_RANKS, None)
    (report,) = plan(PlanJob([stage], None)).stages
    planned = {kind: asdict(report.memory)[kind] for kind in KINDS}
    held = measure(tmp_path, arguments)
    print(f"{way}: held {held}, planned {planned}")
    for kind in KINDS:
        assert planned[kind] == pytest.approx(held[kind], rel=0.02), kind
    assert sum(planned.values()) == pytest.approx(sum(held.values()), rel=0.02)


@pytest.mark.parametrize("name", mark_slow(RECIPES, [name for name in RECIPES if name not in QUICK_RECIPES]))
def test_every_shipped_recipe_is_planned_in_seconds_without_weights_or_network(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "plan", name, "--json", "--gpu-gb", "80"],
        capture_output=True,
        text=True,
        check=False,
        timeout=PLAN_DEADLINE_S,
        # A hub that cannot be reached would be waited for.
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    stages = json.loads(done.stdout)["stages"]
    assert stages
    for stage in stages:
        assert sum(part["trainable"] for part in stage["parts"].values()) > 0
        assert stage["memory"]["total"] > stage["memory"]["weights"] > 0
        assert stage["flops"]["computed"] >= stage["flops"]["useful"] > 0
