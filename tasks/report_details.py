"""The sections of a run's report that people unfold: data, answers, arguments."""

import html
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from internvl_core.argument_rules import resolve_arguments
from internvl_core.contract import EXAMPLES_FILE, RESULT_FILE, STAGE_FILE
from internvl_core.inspection.lint_report import MetaReport
from tasks.address import hide_password
from tasks.data_table import COLUMNS, data_rows, iter_problem_lines
from tasks.stage_plan import SET_BY_PIPELINE
from tasks.trained_stage import TrainedStage

_PICTURE = re.compile(r"data:image/jpeg;base64,[A-Za-z0-9+/=]+")


def write_data(metas: Sequence[MetaReport]) -> str:
    """Write a table for each meta file, and what is wrong in it; nothing where nothing was looked at."""
    if not metas:
        return ""
    return f"<section><h2>Data</h2>{''.join(map(_write_meta, metas))}</section>"


def write_answers(stages: Sequence[TrainedStage]) -> str:
    """Write the held-out answers that were kept, right ones and wrong ones; those of the last stage are open."""
    shown = [(stage.name, examples) for stage in stages if (examples := _find_examples(stage))]
    if not shown:
        return ""
    about = (
        "Some answers to held-out questions: the first that are right and the first that are wrong of each data set."
    )
    lines = [f'<section><h2>Answers</h2><p class="soft">{about}</p>']
    for number, (name, examples) in enumerate(shown, start=1):
        num_wrong = sum(not example["is_right"] for example in examples)
        lines += [
            f"<details{' open' if number == len(shown) else ''}><summary>{html.escape(name)}: "
            f"{len(examples) - num_wrong} right and {num_wrong} wrong ones shown</summary>",
            f'<div class="answers">{"".join(map(_write_example, examples))}</div></details>',
        ]
    return "\n".join([*lines, "</section>"])


def write_arguments(stages: Sequence[TrainedStage]) -> str:
    """Write the arguments of each stage that differ from their defaults, as far as they are on this machine."""
    shown = [(stage.name, arguments) for stage in stages if (arguments := _find_arguments(stage))]
    if not shown:
        return ""
    lines = ['<section><h2>Arguments</h2><p class="soft">Those that differ from their defaults.</p>']
    for name, arguments in shown:
        rows = "".join(
            f"<tr><td><code>{html.escape(key)}</code></td><td><code>{html.escape(_write_value(value))}</code></td></tr>"
            for key, value in sorted(arguments.items())
        )
        lines.append(
            f"<details><summary>{html.escape(name)}: {len(arguments)}</summary>"
            f'<table class="plain arguments"><tbody>{rows}</tbody></table></details>'
        )
    return "\n".join([*lines, "</section>"])


def class_of(is_number: bool) -> str:
    """Write the attribute of a cell that holds a number; nothing for another."""
    return ' class="number"' if is_number else ""


def _write_meta(meta: MetaReport) -> str:
    heads = "".join(f"<th{class_of(column.is_number)}>{html.escape(column.title)}</th>" for column in COLUMNS)
    rows = "".join(f"<tr>{''.join(_iter_cells(row))}</tr>" for row in data_rows(meta))
    problems = "".join(f"<li>{html.escape(line)}</li>" for line in iter_problem_lines(meta))
    return (
        f"<h3>{html.escape(meta.title)}</h3><p><code>{html.escape(hide_password(meta.meta_path))}</code></p>"
        f'<div class="scroll"><table class="plain"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
        + (f'<ul class="soft">{problems}</ul>' if problems else "")
    )


def _iter_cells(row: Sequence[str]) -> Iterator[str]:
    for column, text in zip(COLUMNS, row, strict=True):
        yield f"<td{class_of(column.is_number)}>{html.escape(text)}</td>"


def _find_examples(stage: TrainedStage) -> list[dict[str, Any]]:
    content = _read_json(stage, EXAMPLES_FILE)
    examples: list[dict[str, Any]] = content.get("examples", [])
    return examples


def _write_example(example: Mapping[str, Any]) -> str:
    kind, word = ("good", "right") if example["is_right"] else ("bad", "wrong")
    picture = example.get("picture") or ""
    # Nothing but a picture of our own making gets into a page that people open.
    image = f'<img alt="" src="{picture}">' if _PICTURE.fullmatch(picture) else ""
    expected = "" if example["is_right"] else f"<dt>expected</dt><dd>{html.escape(example['expected'])}</dd>"
    return (
        f'<article>{image}<div><span class="badge {kind}">{word}</span> '
        f'<span class="soft">{html.escape(example["sample_id"])}</span><p>{html.escape(example["question"])}</p>'
        f"<dl><dt>answer</dt><dd>{html.escape(example['answer']) or '(nothing)'}</dd>{expected}</dl></div></article>"
    )


def _find_arguments(stage: TrainedStage) -> dict[str, Any]:
    given = _read_json(stage, STAGE_FILE).get("arguments", {})
    defaults = resolve_arguments({})
    return {
        name: value
        for name, value in given.items()
        if name not in SET_BY_PIPELINE and not (name in defaults and defaults[name] == value)
    }


def _read_json(stage: TrainedStage, name: str) -> dict[str, Any]:
    """Read a file of the attempt that trained the stage; nothing where that was on another machine."""
    folder = stage.metrics_path.parent
    if stage.is_skipped:
        # Its curve lies above the attempts, of which the last with a result trained it.
        attempts = sorted((int(path.parent.name), path.parent) for path in folder.glob(f"[0-9]*/{RESULT_FILE}"))
        folder = attempts[-1][1] if attempts else folder
    try:
        content: dict[str, Any] = json.loads((folder / name).read_text())
    except (OSError, ValueError):
        return {}
    return content


def _write_value(value: object) -> str:
    return hide_password(value if isinstance(value, str) else json.dumps(value))
