"""The HTML report and the terminal's table."""

import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from internvl_core.contract import CheckpointRef, StageResult
from tasks.report_figures import LossCurve, draw_losses
from tasks.stage_table import COLUMNS, format_count, format_duration, render_table, stage_rows
from tasks.trained_stage import TrainedStage
from tasks.write_report import write_report

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """A page taken apart: tags with attributes, and the text between; refuses tags that do not close."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert self._open == [], "tags left open"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(data.strip())

    def values_of(self, attribute: str) -> list[str]:
        return [value for _, attributes in self.tags if (value := attributes.get(attribute)) is not None]


def make_stage(tmp_path: Path, name: str, losses: Sequence[float] = (3.0, 2.0, 1.0), **changes: Any) -> TrainedStage:
    metrics_path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
    rows = [{"step": step, "time": 1.0 * step, "loss": loss} for step, loss in enumerate(losses, start=1)]
    metrics_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result: dict[str, Any] = {
        "step": 1234,
        "checkpoint": CheckpointRef(f"s3://bucket/run/{name}-0123456789abcdef/data/save-000007-9e2d4c", "d" * 64),
        "metrics": {
            "first_loss": 3.0,
            "last_loss": 1.0,
            "accuracy": 0.75,
            "accuracy/digit": 0.95,
            "tokens_per_s": 4321,
        },
        "counters": {"trainable_parameters": 12_480, "total_parameters": 312_480, "samples": 640, "tokens": 19_840},
        "seconds": {"setup": 1.5, "train": 10.0, "evaluate": 2.5},
    }
    is_skipped = changes.pop("is_skipped", False)
    return TrainedStage(name, StageResult(**(result | changes)), is_skipped=is_skipped, metrics_path=metrics_path)


def write_page(tmp_path: Path, stages: Sequence[TrainedStage], **changes: Any) -> Page:
    arguments: dict[str, Any] = {"title": "smoke", "gates": {}, "links": {}}
    path = tmp_path / "out" / "report.html"
    return Page(write_report(path, stages=stages, **(arguments | changes)).read_text())


@pytest.fixture(scope="module")
def full_page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    tmp_path = tmp_path_factory.mktemp("report")
    stages = [
        make_stage(tmp_path, "stage1", is_skipped=True),
        make_stage(tmp_path, "stage<2>", losses=[50.0, 1.0, 0.01]),
        make_stage(tmp_path, "finetune", metrics={"accuracy": 0.5, 'accuracy/larger "a&b"': 0.5}),
    ]
    links = {
        "MLflow": "http://127.0.0.1:5000/#/experiments/1",
        "Command": "mlflow ui --backend-store-uri sqlite:///x.db && <b>",
        "Trap": "javascript:alert(1)",
    }
    gates = {"stage<2>": ("accuracy/digit", 0.9), "finetune": ("accuracy", 0.9), "mpo": ("accuracy", 0.1)}
    return write_page(tmp_path, stages, title="<script>alert(1)</script> & Co", gates=gates, links=links)


def test_the_page_needs_no_other_file_and_no_script(full_page: Page) -> None:
    assert {"script", "link", "img", "iframe", "object"}.isdisjoint(tag for tag, _ in full_page.tags)
    assert full_page.values_of("src") == []
    assert [target for target in full_page.values_of("href") if not target.startswith("#")] == [
        "http://127.0.0.1:5000/#/experiments/1"
    ]
    assert re.findall(r"url\((?!#)|@import|@font-face", full_page.source) == []


def test_ids_are_unique_and_every_reference_inside_the_page_has_its_target(full_page: Page) -> None:
    ids = full_page.values_of("id")
    assert len(ids) == len(set(ids))
    references = [target.removeprefix("#") for target in full_page.values_of("xlink:href")]
    references += re.findall(r"url\(#([^)]+)\)", full_page.source)
    assert references
    assert set(references) <= set(ids)


def test_names_and_commands_are_shown_as_they_are_and_never_as_html(full_page: Page) -> None:
    assert "<script>alert(1)</script> & Co" in full_page.texts
    assert "stage<2>" in full_page.texts
    assert "mlflow ui --backend-store-uri sqlite:///x.db && <b>" in full_page.texts
    assert 'larger "a&b"' in full_page.texts
    assert "b" not in {tag for tag, _ in full_page.tags}


def test_each_stage_has_its_row_with_every_column(full_page: Page, tmp_path: Path) -> None:
    assert {column.title for column in COLUMNS if not column.is_wide} <= set(full_page.texts)
    [row] = stage_rows([make_stage(tmp_path, "stage<2>")])
    assert row == [
        "stage<2>", "trained", "1,234", "12.5k of 312k", "3.000", "1.000", "0.750", "4,321", "14.0",
        "s3://bucket/run/stage<2>-0123456789abcdef/data/save-000007-9e2d4c",
    ]  # fmt: skip
    assert set(row) <= set(full_page.texts)
    assert full_page.texts.count("skipped") == 1


def test_every_gate_says_whether_it_was_passed(full_page: Page) -> None:
    words = [text for text in full_page.texts if text in ("passed", "not passed", "not reached")]
    assert words == ["passed", "not passed", "not reached"]
    assert "1 of 3" in full_page.texts


def test_the_figure_is_there_for_wide_and_narrow_pages_and_names_what_it_shows(full_page: Page) -> None:
    losses = "Training loss by step, a panel a stage: stage1, stage<2>, finetune"
    assert full_page.values_of("aria-label") == [losses, losses]
    assert "loss (log scale)" in full_page.texts


def test_every_score_is_a_bar_of_its_length_with_the_gate_at_its_place(full_page: Page) -> None:
    panels = re.findall(r"<div><h3>(.*?)</h3><dl>(.*?)</dl></div>", full_page.source)
    assert [name for name, _ in panels] == ["all held-out questions", "digit", "larger &quot;a&amp;b&quot;"]
    for (_, bars), widths, gates in zip(
        panels,
        (["75.00%", "75.00%", "50.00%"], ["95.00%", "95.00%"], ["50.00%"]),
        (["90.00%"], ["90.00%"], []),
        strict=True,
    ):
        assert re.findall(r"width:([^;]*)", bars) == widths
        assert re.findall(r"left:([^\"]*)", bars) == gates
        assert bars.count("not asked") == 3 - len(widths)


def test_the_drawings_take_every_colour_from_the_page(full_page: Page) -> None:
    figures = full_page.source[full_page.source.index("<figure>") :]
    assert re.findall(r"#[0-9a-f]{6}", figures) == []
    used = set(re.findall(r"var\((--[a-z0-9-]+)\)", full_page.source))
    assert {"--text", "--line", "--stage-1", "--stage-2", "--stage-3"} <= used
    assert used <= set(re.findall(r"(--[a-z0-9-]+):", full_page.source))


def test_a_stage_that_reported_little_gets_dashes(tmp_path: Path) -> None:
    stage = make_stage(tmp_path, "stage1", metrics={}, counters={}, seconds={})
    assert stage_rows([stage])[0][3:9] == ["–"] * 6
    assert "–" in write_page(tmp_path, [stage], gates={"stage1": ("accuracy", 0.9)}).texts


def test_a_stage_whose_metrics_file_is_gone_is_named_under_the_figure(tmp_path: Path) -> None:
    stages = [make_stage(tmp_path, "stage1"), make_stage(tmp_path, "stage2")]
    stages[0].metrics_path.unlink()
    page = write_page(tmp_path, stages)
    assert any("No log of stage1 is on this machine." in text for text in page.texts)


def test_a_run_without_any_finished_stage_still_has_a_report(tmp_path: Path) -> None:
    page = write_page(tmp_path, [], gates={"stage1": ("accuracy", 0.9)})
    assert "No stage was finished." in page.texts
    assert "not reached" in page.texts


def test_of_a_step_that_a_resumed_stage_logged_again_the_later_loss_is_drawn(tmp_path: Path) -> None:
    stage = make_stage(tmp_path, "stage1", losses=[3.0, 2.5, 2.25])
    with stage.metrics_path.open("a") as file:
        file.write('{"step": 3, "time": 9.0, "loss": 1.125}\n{"step": 2, "time": 9.5, "loss": NaN}\n{"step": 4, "lo')
    assert write_page(tmp_path, [stage]).texts.count("1.125") == 2  # once in each width


def test_all_panels_show_losses_above_those_of_the_first(tmp_path: Path) -> None:
    svg = draw_losses((LossCurve("a", (1, 2), (1.0, 0.5)), LossCurve("b", (1, 2), (5.0, 4.0))), is_narrow=False)
    heights = [float(y) for y in re.findall(r'<use [^>]*\by="([-0-9.]+)"', svg)]
    assert heights
    assert min(heights) >= 0


def test_a_second_report_replaces_the_first_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    for title in ("first", "second"):
        page = write_page(tmp_path, [make_stage(tmp_path, "stage1")], title=title)
    assert "second" in page.texts
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.html"]


def test_the_terminals_table_fits_eighty_columns_uncut(tmp_path: Path) -> None:
    stages = [make_stage(tmp_path, name) for name in ("stage1", "stage1.5", "stage2", "finetune")]
    console = Console(width=80, force_terminal=False, record=True, file=(tmp_path / "out.txt").open("w"))
    console.print(render_table(stages))
    console.file.close()
    lines = console.export_text().splitlines()
    assert [line.split()[0] for line in lines[-4:]] == ["stage1", "stage1.5", "stage2", "finetune"]
    cells = [cell for cell, column in zip(stage_rows(stages)[1], COLUMNS, strict=True) if not column.is_wide]
    assert " ".join(lines[-3].split()) == " ".join(cells)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (9_999, "9,999"), (12_480, "12.5k"), (999_600, "1M"), (8.1e9, "8.1G"), (2.5e12, "2.5T")],
)
def test_counts_are_short_and_keep_three_digits(count: float, text: str) -> None:
    assert format_count(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(12.34, "12.3 s"), (59.97, "1 min 0 s"), (92, "1 min 32 s"), (7260, "2 h 1 min")]
)
def test_durations_have_two_units_at_most(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
