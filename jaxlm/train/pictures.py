# SPDX-License-Identifier: Apache-2.0
"""Pictures of runs as SVG text, to stand inside a page: colours and text follow the page, in light and in dark.

A series is a run's name and its points; all runs of a page keep one colour and one dash in every picture.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind people; dashes tell them apart in print. The page may restyle
# each through its variable, so that they stay readable on a dark ground.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
WIDTH = 10.8  # inches, of the page
TEXT = "#123456"  # stands for the page's own text colour
_STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": TEXT,
    "axes.grid": True,
    "axes.labelcolor": TEXT,
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": TEXT,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "font.size": 9,
    "grid.alpha": 0.18,
    "grid.color": TEXT,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "text.color": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
}


class Series(NamedTuple):
    """Points of one run: updates and values; `held_out` points are few and get markers."""

    steps: Sequence[float]
    values: Sequence[float]
    held_out: bool = False


class Panel(NamedTuple):
    """One small picture: series by run name; `smooth` draws the running mean of noisy points over them.

    `chance` are series to compare with, drawn thin and grey.
    """

    title: str
    unit: str
    series: Mapping[str, Sequence[Series]]
    from_zero: bool = False
    smooth: bool = True
    chance: Sequence[Series] = ()


def picture(name: str, panels: Sequence[Panel], runs: Sequence[str], *, columns: int = 3) -> str:
    """A grid of panels as SVG text.

    Args:
      name: makes ids inside the SVG unique on its page.
      panels: what to draw; those without a finite point say so.
      runs: all run names of the page, in the order of their colours.
      columns: panels side by side.
    """
    columns = 2 if len(panels) == 4 else min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)

    def draw(figure: Figure) -> None:
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for axis, panel in zip(axes, panels, strict=False):
            _draw(axis, panel, runs)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()

    return drawing(name, draw, height=2.6 * rows)


def drawing(name: str, draw: Callable[[Figure], None], *, height: float, width: float = WIDTH) -> str:
    """What `draw` puts on a figure, as SVG text in the page's style; sizes in inches."""
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _restyle(out.getvalue(), name)


def _draw(axis, panel: Panel, runs: Sequence[str]) -> None:
    axis.set_title(panel.title)
    axis.set_ylabel(panel.unit)
    axis.set_xlabel("updates")
    drawn = 0
    for index, run in enumerate(runs):
        look = {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index % len(DASHES)]}
        for series in panel.series.get(run, ()):
            points = [(x, y) for x, y in zip(series.steps, series.values, strict=True) if math.isfinite(y)]
            drawn += len(points)
            if points:
                _line(axis, [x for x, _ in points], [y for _, y in points], series.held_out, look, panel.smooth)
    for series in panel.chance if drawn else ():
        axis.plot(series.steps, series.values, color=TEXT, linewidth=0.9, alpha=0.5)
    if not drawn:
        axis.text(0.5, 0.5, "nothing reported", ha="center", va="center", transform=axis.transAxes, alpha=0.6)
        axis.set_yticks([])
    if panel.from_zero and drawn:
        axis.set_ylim(0, 1.1 * axis.dataLim.y1 or 1)


def _line(axis, steps: Sequence[float], values: Sequence[float], held_out: bool, look: dict, smooth: bool) -> None:
    """Held-out points with markers; training points as a line, under their running mean where there are many."""
    if held_out:
        axis.plot(steps, values, marker="o", markersize=5, linewidth=1.8, **look)
    elif len(values) < 40 or not smooth:
        axis.plot(steps, values, linewidth=1.2, alpha=0.9, **look)
    else:
        axis.plot(steps, values, linewidth=0.6, alpha=0.35, color=look["color"])
        axis.plot(steps, _running_mean(values, len(values) // 20), linewidth=1.2, alpha=0.9, **look)


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    """Each value's mean with its neighbours, `width` to either side where they exist."""
    windows = (values[max(0, i - width) : i + width + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _restyle(svg: str, name: str) -> str:
    """The drawing alone, scalable, with the page's colours instead of fixed ones and ids of its own."""
    svg = svg[svg.index("<svg") :].replace(TEXT, "currentColor")
    for index, colour in enumerate(COLOURS):
        svg = svg.replace(colour, f"var(--run{index})")
    for kind in (
        "figure_",
        "axes_",
        "patch_",
        "line2d_",
        "LineCollection_",
        "PathCollection_",
        "PolyCollection_",
        "text_",
        "matplotlib.axis_",
        "xtick_",
        "ytick_",
    ):
        svg = svg.replace(f'id="{kind}', f'id="{name}-{kind}')
    return svg
