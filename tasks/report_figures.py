"""The loss curves of the report, as SVG that lives inside an HTML page.

Text stays text. Colours are CSS variables of the page, so one drawing serves light, dark and
paper; panels carry names, so nothing is told by colour alone. matplotlib's pyplot is not used.
"""

import base64
import html
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from itertools import accumulate
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import LogLocator, NullLocator

NUM_STAGE_COLOURS = 6
SMOOTHED_SHARE = 1 / 15
"""Share of a curve that each smoothed point averages."""
MAX_POINTS = 800
TITLE_CHARACTERS = 18
LOGARITHMIC_FROM = 30.0
"""Ratio of the largest to the smallest loss from which the axis is logarithmic."""

# Colours that nothing else uses stand for the page's variables until the drawing is finished.
_TEXT, _GRID = "#010101", "#010102"
_COLOURS = tuple(f"#0101{number + 16:02x}" for number in range(NUM_STAGE_COLOURS))
_VARIABLES = {_TEXT: "--text", _GRID: "--line"} | {
    colour: f"--stage-{number + 1}" for number, colour in enumerate(_COLOURS)
}
_SETTINGS = {
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": _GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _TEXT,
    "ytick.labelcolor": _TEXT,
}


@dataclass(frozen=True)
class LossCurve:
    """The loss of one stage at its logged steps, at least one; finite."""

    stage: str
    steps: tuple[int, ...]
    losses: tuple[float, ...]


# A run's end asks twice for the same, for the page and for the table in the Prefect UI.
@lru_cache(maxsize=2)
def draw_losses(curves: tuple[LossCurve, ...], *, is_narrow: bool) -> str:
    """Draw a panel a stage, side by side in the order of training, with one loss axis for all."""
    num_columns = min(len(curves), 2 if is_narrow else 4)
    num_rows = math.ceil(len(curves) / num_columns)
    size = (4.0 if is_narrow else 9.6, 2.1 * num_rows + 0.2 if is_narrow else 2.9 * num_rows)
    with matplotlib.rc_context(_SETTINGS | {"svg.hashsalt": "losses"}):
        figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(h_pad=0.06, hspace=0.06))
        panels = figure.subplots(num_rows, num_columns, sharey=True, squeeze=False).flat
        values = [loss for curve in curves for loss in curve.losses]
        is_logarithmic = min(values) > 0 and max(values) / min(values) >= LOGARITHMIC_FROM
        for number, panel in enumerate(panels):
            if number >= len(curves):
                panel.set_visible(False)
                continue
            _draw_loss_panel(panel, curves[number], _COLOURS[number % NUM_STAGE_COLOURS])
            if is_logarithmic:
                panel.set_yscale("log")
                panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                panel.yaxis.set_major_formatter("{x:g}")
                panel.yaxis.set_minor_locator(NullLocator())
        if not is_logarithmic:
            # Only now: a limit set by hand ends the scaling to the data of panels still to come.
            figure.axes[0].set_ylim(bottom=min(0, *values))
        figure.supylabel("loss (log scale)" if is_logarithmic else "loss", fontsize=9)
        figure.supxlabel("optimizer step of the stage", fontsize=9)
        names = ", ".join(curve.stage for curve in curves)
        return _write_svg(
            figure, prefix=f"losses-{is_narrow:d}-", label=f"Training loss by step, a panel a stage: {names}"
        )


def write_picture(svg: str) -> str:
    """Make a drawing a picture that needs no page, with colours of its own, on white; returns a `data:` URI."""
    # Those of the page in light, which it says first.
    light, _, _ = resources.files("tasks").joinpath("report.html").read_text().partition("}")
    style = ";".join(f"{name}:{colour}" for name, colour in re.findall(r"(--[\w-]+): (#\w+)", light))
    picture = svg.replace("<svg", f'<svg style="background:#ffffff;{style}"', 1)
    return f"data:image/svg+xml;base64,{base64.b64encode(picture.encode()).decode()}"


def _draw_loss_panel(panel: Any, curve: LossCurve, colour: str) -> None:
    panel.set_title(_shorten(curve.stage))
    panel.grid(axis="y")
    panel.tick_params(length=0)
    panel.locator_params(axis="x", nbins=4, integer=True)
    stride = max(1, len(curve.steps) // MAX_POINTS)
    smooth = _smooth(curve.losses)
    panel.plot(curve.steps[::stride], curve.losses[::stride], color=colour, linewidth=0.8, alpha=0.4)
    panel.plot(curve.steps[::stride], smooth[::stride], color=colour, linewidth=1.9, solid_capstyle="round")
    panel.plot(curve.steps[-1], curve.losses[-1], marker="o", markersize=4.5, color=colour, clip_on=False)
    # Above whatever the line does in the panel's last third, so that the number never lies on it.
    highest = max(curve.losses[-max(1, len(curve.losses) // 3) :])
    place = {"xytext": (0, 6), "textcoords": "offset points", "ha": "right", "va": "bottom"}
    panel.annotate(f"{curve.losses[-1]:.3f}", (curve.steps[-1], highest), fontweight="bold", **place)


def _smooth(values: Sequence[float]) -> list[float]:
    """Average each value with its neighbours; fewer of them towards the ends, so that the ends are not bent."""
    reach = int(len(values) * SMOOTHED_SHARE / 2)
    # Not a sum for each window: their widths grow with the curve.
    sums = [0.0, *accumulate(values)]
    smooth = []
    for place in range(len(values)):
        near = min(reach, place, len(values) - 1 - place)
        smooth.append((sums[place + near + 1] - sums[place - near]) / (2 * near + 1))
    return smooth


def _shorten(name: str) -> str:
    return name if len(name) <= TITLE_CHARACTERS else name[: TITLE_CHARACTERS - 1] + "…"


def _write_svg(figure: Figure, *, prefix: str, label: str) -> str:
    """Write the drawing for a page that holds several: ids of its own, a label, the page's colours."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1)
