"""Faults of the ranks themselves: they raise, die, hang, or are told to stop."""

from pathlib import Path

import pytest
from rank_faults import Fault
from stage_runs import Inputs, make_inputs, run


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.integration
@pytest.mark.fault(
    12, "one rank raises", how="exception on rank 1", then="all ranks end, the exception is in failure.json"
)
def test_an_exception_on_one_rank_ends_all(inputs: Inputs, tmp_path: Path) -> None:
    fault = Fault("raise", "on_step_end", step=1, rank=1, message="only here")
    attempt = run(tmp_path / "attempt", inputs.arguments, faults=[fault])
    assert attempt.exit_code == 70
    assert fault.has_happened(attempt.directory, 1)
    assert not fault.has_happened(attempt.directory, 0)
    assert (attempt.failure.error, attempt.failure.message) == ("InternVLError", "RuntimeError: only here")
    assert attempt.failure.rank == 1
    assert attempt.commits == []
