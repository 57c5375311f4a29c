"""Ranks with and without images in one step: all of them must walk the vision tower."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_internvl import build_tiny_model
from torch import Tensor

pytestmark = pytest.mark.integration

SCRIPT = Path(__file__).parent / "fakes" / "uneven_images.py"
DEADLINE_S = 240


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(SCRIPT)]
    done = subprocess.run([*command, str(folder)], timeout=DEADLINE_S, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    """One process that sees the batches of both ranks in every step."""
    from fakes.uneven_images import LEARNING_RATE, NUM_STEPS, build_inputs

    model = build_tiny_model().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for step in range(NUM_STEPS):
        loss = sum(model(**build_inputs(step, rank)).loss for rank in (0, 1)) / 2
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.named_parameters())


@pytest.mark.parametrize("way", ["ddp", "zero1", "zero2", "zero3"])
def test_ten_updates_with_tiles_on_one_rank_only_give_the_weights_of_one_process(
    way: str, trained: Path, expected: dict[str, Tensor]
) -> None:
    found = torch.load(trained / f"{way}.pt")
    assert found.keys() == expected.keys()
    start = build_tiny_model().model.vision_tower.embeddings.cls_token
    assert not torch.equal(expected["model.vision_tower.embeddings.cls_token"], start)
    for name, parameter in expected.items():
        torch.testing.assert_close(found[name], parameter.detach(), atol=1e-5, rtol=1e-4, msg=name)
