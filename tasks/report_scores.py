"""The bars of held-out accuracy in the report: HTML, which fits every width and reads as text."""

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tasks.report_figures import NUM_STAGE_COLOURS


@dataclass(frozen=True)
class Scores:
    """Accuracy of each stage on one held-out set, from 0 to 1; None where the stage was not asked. Gates by stage."""

    dataset: str
    by_stage: Mapping[str, float | None]
    gates: Mapping[str, float]


def write_scores(scores: Sequence[Scores]) -> str:
    """Write a panel a held-out set with a bar a stage, and a mark where the stage's gate is."""
    panels = "".join(f"<div><h3>{html.escape(each.dataset)}</h3><dl>{_write_bars(each)}</dl></div>" for each in scores)
    return f'<div class="scores">{panels}</div>'


def _write_bars(scores: Scores) -> str:
    bars = []
    for row, (stage, score) in enumerate(scores.by_stage.items()):
        marks = "".join(_iter_marks(row, score, scores.gates.get(stage)))
        number = '<dd class="soft">not asked</dd>' if score is None else f"<dd>{score:.2f}</dd>"
        bars.append(f"<dt>{html.escape(stage)}</dt><dd>{marks}</dd>{number}")
    return "".join(bars)


def _iter_marks(row: int, score: float | None, gate: float | None) -> Iterator[str]:
    if score is not None:
        colour = f"var(--stage-{row % NUM_STAGE_COLOURS + 1})"
        yield f'<span style="width:{score:.2%};background:{colour}"></span>'
    if gate is not None:
        yield f'<i style="left:{gate:.2%}" title="gate: {gate:g}"></i>'
