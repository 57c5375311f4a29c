"""Whether a candidate takes the champion's place."""

from dataclasses import replace

import pytest

from tasks.promote_checkpoint import judge
from tasks.stage import Gate

GATE = Gate(metric="accuracy", at_least=0.5, better_by=0.01)


@pytest.mark.parametrize(
    ("champion", "is_promoted", "told"),
    [
        (None, True, "promoted: accuracy 0.8000, the first champion"),
        (0.75, True, "promoted: accuracy 0.8000 against the champion's 0.7500: +0.0500"),
        (0.8, False, "not promoted: accuracy 0.8000 against the champion's 0.8000: +0.0000, and more than +0.0100 is"),
        (0.795, False, "not promoted: accuracy 0.8000 against the champion's 0.7950: +0.0050, and more than"),
        (0.9, False, "not promoted: accuracy 0.8000 against the champion's 0.9000: -0.1000, and more than"),
    ],
)
def test_only_more_than_the_margin_above_the_champion_is_promoted(
    champion: float | None, is_promoted: bool, told: str
) -> None:
    verdict = judge(GATE, {"accuracy": 0.8}, None if champion is None else {"accuracy": champion})
    assert verdict.is_promoted is is_promoted
    assert str(verdict).startswith(told)


@pytest.mark.parametrize("hundredths", range(50, 99))
def test_a_difference_of_exactly_the_margin_is_not_more(hundredths: int) -> None:
    # In binary most of these differences are a little more or less than 0.01.
    assert not judge(GATE, {"accuracy": (hundredths + 1) / 100}, {"accuracy": hundredths / 100}).is_promoted


def test_without_a_margin_an_equal_score_is_not_better() -> None:
    gate = Gate(metric="accuracy", at_least=0.0)
    assert not judge(gate, {"accuracy": 0.8}, {"accuracy": 0.8}).is_promoted
    assert judge(gate, {"accuracy": 0.8001}, {"accuracy": 0.8}).is_promoted


@pytest.mark.parametrize(("score", "told"), [(0.4, "0.4000"), (float("nan"), "nan")])
def test_a_candidate_below_the_gate_is_not_promoted_even_without_a_champion(score: float, told: str) -> None:
    verdict = judge(GATE, {"accuracy": score}, None)
    assert not verdict.is_promoted
    assert str(verdict) == f"below the gate: accuracy {told}, and 0.5 is asked for"


def test_a_candidate_that_was_overtaken_is_not_promoted() -> None:
    verdict = replace(judge(GATE, {"accuracy": 0.8}, {"accuracy": 0.6}), overtaken_by=7)
    assert not verdict.is_promoted
    assert str(verdict).startswith("not promoted: version 7 became the champion meanwhile")
