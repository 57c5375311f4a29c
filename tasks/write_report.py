"""Write what a run did as one HTML file that needs nothing else: no network, no script, no other file."""

import html
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import resources
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from string import Template
from urllib.parse import urlsplit

from internvl_core.inspection.lint_report import MetaReport
from tasks.loss_curves import find_curves
from tasks.report_details import class_of, write_answers, write_arguments, write_data
from tasks.report_figures import draw_losses
from tasks.report_scores import Scores, write_scores
from tasks.stage_table import COLUMNS, MISSING, format_count, format_duration, stage_rows
from tasks.trained_stage import TrainedStage

ACCURACY = "accuracy"
LIBRARIES = ("torch", "transformers", "deepspeed", "peft", "prefect", "mlflow")


def write_report(
    path: Path,
    *,
    title: str,
    stages: Sequence[TrainedStage],
    gates: Mapping[str, tuple[str, float]],
    links: Mapping[str, str],
    data: Sequence[MetaReport] = (),
) -> Path:
    """Write the report; a reader of the old one at that path sees either the old or the new.

    Args:
        path: the HTML file; its directory is made.
        stages: in the order of training; those that were reached.
        gates: by stage, the metric (`accuracy` or `accuracy/<dataset>`) and the least value it must have.
        links: by name, web addresses, URIs and commands; only http(s) addresses become links.
        data: what the data sets of all stages are like.
    """
    page = Template(resources.files("tasks").joinpath("report.html").read_text()).substitute(
        title=html.escape(title),
        provenance=html.escape(_describe_provenance()),
        tiles="\n".join(_write_tiles(stages, gates)),
        table=_write_table(stages),
        figures="\n".join(_write_figures(stages, gates)),
        details="\n".join([write_answers(stages), write_data(data), write_arguments(stages)]),
        links=_write_links(links),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)
    return path


def _describe_provenance() -> str:
    written = datetime.now(UTC).strftime("%-d %B %Y, %H:%M UTC")
    machine = f"{platform.node()} ({platform.system()} {platform.machine()}, {os.cpu_count()} CPUs)"
    return " · ".join([written, machine, f"Python {platform.python_version()}", *_iter_library_versions()])


def _iter_library_versions() -> Iterable[str]:
    for library in LIBRARIES:
        try:
            yield f"{library} {version(library)}"
        except PackageNotFoundError:
            continue


def _write_tiles(stages: Sequence[TrainedStage], gates: Mapping[str, tuple[str, float]]) -> Iterable[str]:
    num_skipped = sum(stage.is_skipped for stage in stages)
    yield _write_tile("Stages", str(len(stages)), f"{len(stages) - num_skipped} trained, {num_skipped} skipped")
    scored = [stage for stage in stages if ACCURACY in stage.result.metrics]
    if scored:
        yield _write_tile("Held-out accuracy", f"{scored[-1].result.metrics[ACCURACY]:.3f}", f"after {scored[-1].name}")
    if gates:
        num_passed = sum(_is_passed(stages, stage, *gate) is True for stage, gate in gates.items())
        yield _write_tile("Gates passed", f"{num_passed} of {len(gates)}", "of the recipe")
    trained = [stage.result for stage in stages if not stage.is_skipped]
    seconds = sum(result.total_s for result in trained)
    yield _write_tile("Time in stages", format_duration(seconds) if trained else MISSING, "set up, train, evaluate")
    num_tokens = sum(result.counters.get("tokens", 0) for result in trained)
    num_samples = sum(result.counters.get("samples", 0) for result in trained)
    if num_tokens:
        yield _write_tile("Tokens trained on", format_count(num_tokens), f"in {format_count(num_samples)} samples")


def _write_tile(name: str, value: str, note: str) -> str:
    name, value, note = html.escape(name), html.escape(value), html.escape(note)
    return f'<div class="tile"><dt>{name}</dt><dd class="value">{value}</dd><dd class="soft">{note}</dd></div>'


def _write_table(stages: Sequence[TrainedStage]) -> str:
    if not stages:
        return '<p class="soft">No stage was finished.</p>'
    shown = [column for column in COLUMNS if not column.is_wide]
    heads = "".join(f"<th{class_of(column.is_number)}>{html.escape(column.title)}</th>" for column in shown)
    lines = [f'<table class="stages"><thead><tr>{heads}</tr></thead><tbody>']
    for row in stage_rows(stages):
        cells, below = "", ""
        for column, text in zip(COLUMNS, row, strict=True):
            escaped = html.escape(text)
            if column.is_wide:
                below += f'<tr class="below"><td colspan="{len(shown)}"><code>{escaped}</code></td></tr>'
            elif column.title == "result":
                kind = "idle" if text == "skipped" else "good"
                cells += f'<td class="result"><span class="badge {kind}">{escaped}</span></td>'
            else:
                data = html.escape(column.title)
                cells += f'<td{class_of(column.is_number)} data-title="{data}">{escaped}</td>'
        lines.append(f"<tr>{cells}</tr>{below}")
    return "\n".join([*lines, "</tbody></table>"])


def _write_figures(stages: Sequence[TrainedStage], gates: Mapping[str, tuple[str, float]]) -> Iterable[str]:
    curves = find_curves(stages)
    if curves:
        missing = [stage.name for stage in stages if stage.name not in {curve.stage for curve in curves}]
        note = f" No log of {', '.join(missing)} is on this machine." if missing else ""
        about = f"The thin line is what was logged, the thick one its running mean; the number is the last loss.{note}"
        wide, narrow = draw_losses(curves, is_narrow=False), draw_losses(curves, is_narrow=True)
        drawing = f'<figure><div class="wide">{wide}</div><div class="narrow">{narrow}</div></figure>'
        yield _write_section("Training loss", about, drawing)
    scores = _collect_scores(stages, gates)
    if scores:
        about = "Share of the answers that are exactly right, by stage."
        about += " The upright mark is the gate of the recipe." if gates else ""
        yield _write_section("Held-out accuracy", about, write_scores(scores), _write_gates(stages, gates))
    elif gates:
        yield f"<section><h2>Held-out accuracy</h2>{_write_gates(stages, gates)}</section>"


def _write_section(title: str, about: str, *content: str) -> str:
    return f'<section><h2>{html.escape(title)}</h2><p class="soft">{html.escape(about)}</p>{"".join(content)}</section>'


def _collect_scores(stages: Sequence[TrainedStage], gates: Mapping[str, tuple[str, float]]) -> list[Scores]:
    metrics = {ACCURACY: None, **{name: None for stage in stages for name in stage.result.metrics}}
    return [
        Scores(
            dataset=metric.removeprefix(f"{ACCURACY}/") if metric != ACCURACY else "all held-out questions",
            by_stage={stage.name: stage.result.metrics.get(metric) for stage in stages},
            gates={stage: least for stage, (gated, least) in gates.items() if gated == metric},
        )
        for metric in metrics
        if re.match(rf"{ACCURACY}(/|$)", metric) and any(metric in stage.result.metrics for stage in stages)
    ]


def _write_gates(stages: Sequence[TrainedStage], gates: Mapping[str, tuple[str, float]]) -> str:
    if not gates:
        return ""
    head = '<th>stage</th><th>metric</th><th class="number">at least</th><th class="number">reached</th><th>gate</th>'
    lines = [f'<h3>Gates</h3><table class="plain"><thead><tr>{head}</tr></thead><tbody>']
    by_name = {stage.name: stage for stage in stages}
    for name, (metric, least) in gates.items():
        reached = by_name[name].result.metrics.get(metric) if name in by_name else None
        kind, word = {True: ("good", "passed"), False: ("bad", "not passed"), None: ("idle", "not reached")}[
            _is_passed(stages, name, metric, least)
        ]
        lines.append(
            f'<tr><td>{html.escape(name)}</td><td>{html.escape(metric)}</td><td class="number">{least:.3f}</td>'
            f'<td class="number">{MISSING if reached is None else format(reached, ".3f")}</td>'
            f'<td><span class="badge {kind}">{word}</span></td></tr>'
        )
    return "\n".join([*lines, "</tbody></table>"])


def _is_passed(stages: Sequence[TrainedStage], name: str, metric: str, least: float) -> bool | None:
    """Tell whether a gate is passed; None where its stage was not reached."""
    stage = next((stage for stage in stages if stage.name == name), None)
    if stage is None:
        return None
    return stage.result.metrics.get(metric, float("-inf")) >= least


def _write_links(links: Mapping[str, str]) -> str:
    if not links:
        return ""
    items = "".join(f"<dt>{html.escape(name)}</dt><dd>{_write_link(target)}</dd>" for name, target in links.items())
    return f'<section><h2>Look further</h2><dl class="links">{items}</dl></section>'


def _write_link(target: str) -> str:
    text = html.escape(target)
    is_address = urlsplit(target).scheme in ("http", "https") and not re.search(r"\s", target)
    return f'<a href="{text}">{text}</a>' if is_address else f"<code>{text}</code>"
