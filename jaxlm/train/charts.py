# SPDX-License-Identifier: Apache-2.0
"""Pictures of finished numbers as SVG text: a table as a heat map, arms as points in a plane or rows with intervals.

They stand inside a page as those of `pictures` do, with its colours; `name` makes ids inside an SVG unique on its page.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from jaxlm.train.pictures import COLOURS, TEXT, WIDTH, drawing

MARKERS = ("o", "s", "^", "D", "v", "P")


class Point(NamedTuple):
    """One arm in a plane; errors are how far its interval reaches down and up, None: unknown."""

    x: float
    y: float
    label: str = ""
    x_error: tuple[float, float] | None = None
    y_error: tuple[float, float] | None = None


class Row(NamedTuple):
    """One arm on a line: its number, its 95 % interval (None: unknown), single seeds, and which group it belongs to."""

    label: str
    mean: float
    low: float | None = None
    high: float | None = None
    seeds: Sequence[float] = ()
    group: int = 0


def heat_map(
    name: str,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    shades: np.ndarray | None = None,
    marked: Sequence[tuple[int, int]] = (),
    write: Callable[[float], str] = lambda value: f"{100 * value:.0f}",
    title: str = "",
) -> str:
    """A table with a number in every cell, shaded; the first column, before training, stands apart.

    Args:
      values: [rows, columns]; NaN is an empty cell.
      shades: [rows, columns] in [0, 1]; None: the values.
      marked: (row, column) of cells with a frame.
      write: the text of a cell.
    """
    shades = np.clip(np.nan_to_num(np.asarray(values if shades is None else shades, np.float64)), 0, 1)
    left = [c + 0.25 * (c > 0) for c in range(len(columns))]

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        axis.grid(False)
        for side in axis.spines.values():
            side.set_visible(False)
        for r in range(len(rows)):
            for c in range(len(columns)):
                cell = (left[c] + 0.02, r + 0.03)
                colour: dict[str, Any] = {"facecolor": COLOURS[0], "alpha": 0.06 + 0.54 * shades[r, c], "linewidth": 0}
                axis.add_patch(Rectangle(cell, 0.96, 0.94, **colour))
                if (r, c) in marked:
                    frame: dict[str, Any] = {"fill": False, "edgecolor": COLOURS[1], "linewidth": 1.8}
                    axis.add_patch(Rectangle((left[c] + 0.05, r + 0.06), 0.9, 0.88, **frame))
                if np.isfinite(values[r][c]):
                    axis.text(left[c] + 0.5, r + 0.5, write(values[r][c]), ha="center", va="center", fontsize=size)
        axis.set(xlim=(0, left[-1] + 1), ylim=(len(rows), 0), title=title)
        axis.set_xticks([x + 0.5 for x in left], [_short(c, 11) for c in columns])
        axis.set_yticks([r + 0.5 for r in range(len(rows))], [_short(r, 18) for r in rows])
        axis.tick_params(length=0)
        if max(map(len, columns)) > 8:
            axis.tick_params(axis="x", labelrotation=40)

    size = max(5.0, min(9.0, 130 / len(columns)))
    return drawing(name, draw, height=0.8 + 0.32 * len(rows), width=min(WIDTH, 1.7 + 0.62 * len(columns)))


def scatter(
    name: str,
    groups: Mapping[str, Sequence[Point]],
    *,
    x_label: str,
    y_label: str,
    title: str = "",
    joined: bool = False,
    legend: bool = True,
    span: float = 0.0,
) -> str:
    """Points in a plane with labels and error bars, a colour and a marker a group; what is not finite is left out.

    Args:
      groups: name -> points, in the order of the colours.
      joined: a line through each group's points, as over learning rates.
      span: what an axis shows at least, so that small differences look small.
    """

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        drawn, handles = 0, []
        for index, (group, points) in enumerate(groups.items()):
            points = [p for p in points if math.isfinite(p.x) and math.isfinite(p.y)]
            drawn += len(points)
            look: dict[str, Any] = {
                "color": COLOURS[index % len(COLOURS)],
                "marker": MARKERS[index % len(MARKERS)],
                "markersize": 6,
            }
            errors: dict[str, Any] = {
                "elinewidth": 1.0,
                "capsize": 2,
                "linestyle": "-" if joined else "none",
                "linewidth": 0.9,
            }
            if points:
                x, y = [p.x for p in points], [p.y for p in points]
                bars: dict[str, Any] = {
                    "xerr": _bars([p.x_error for p in points]),
                    "yerr": _bars([p.y_error for p in points]),
                }
                axis.errorbar(x, y, **bars, **look, **errors)
            handles.append(Line2D([], [], linestyle="-" if joined else "none", label=group, **look))
            for p in points:
                axis.annotate(p.label, (p.x, p.y), xytext=(6, 5), textcoords="offset points", fontsize=8)
        axis.set(xlabel=x_label, ylabel=y_label, title=title)
        axis.margins(0.12)
        axis.set_xlim(_widened(axis.get_xlim(), span))
        axis.set_ylim(_widened(axis.get_ylim(), span))
        if not drawn:
            _nothing(axis)
        elif legend:
            axis.legend(handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8)

    return drawing(name, draw, height=4.4)


def dots(name: str, panels: Mapping[str, Sequence[Row]], *, zero: Collection[str] = (), unit: str = "") -> str:
    """One row an arm: its mean as a dot, its 95 % interval as a line, its seeds as small ticks; a panel a metric.

    Args:
      panels: title -> rows, the first on top; every panel names the same arms in the same order.
      zero: titles of the panels that show where 0 is.
      unit: of the numbers.
    """
    labels = [row.label for row in next(iter(panels.values()))]
    for title, rows in panels.items():
        if [row.label for row in rows] != labels:
            raise ValueError(f"panel {title!r} has the rows {[row.label for row in rows]}, the first one has {labels}")

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, (title, rows) in zip(axes, panels.items(), strict=True):
            for place, row in enumerate(rows):
                look: dict[str, Any] = {"color": COLOURS[row.group % len(COLOURS)]}
                if row.low is not None and row.high is not None and math.isfinite(row.low + row.high):
                    axis.plot([row.low, row.high], [place, place], linewidth=2.2, solid_capstyle="round", **look)
                axis.plot(row.seeds, [place + 0.22] * len(row.seeds), "|", markersize=5, alpha=0.8, **look)
                if math.isfinite(row.mean):
                    axis.plot([row.mean], [place], MARKERS[row.group % len(MARKERS)], markersize=6, **look)
            if title in zero:
                axis.axvline(0, color=TEXT, linewidth=0.8, alpha=0.5)
            axis.set(title=title, xlabel=unit, ylim=(len(rows) - 0.4, -0.6))
            axis.set_yticks(range(len(rows)), labels)
            axis.tick_params(axis="y", length=0)

    return drawing(name, draw, height=0.9 + 0.3 * len(labels))


def _bars(errors: Sequence[tuple[float, float] | None]) -> np.ndarray | None:
    """[2, points], or None where no point has any."""
    if all(error is None for error in errors):
        return None
    return np.maximum(np.array([(0.0, 0.0) if e is None else e for e in errors]).T, 0.0)


def _widened(limits: tuple[float, float], span: float) -> tuple[float, float]:
    missing = max(0.0, span - (limits[1] - limits[0])) / 2
    return limits[0] - missing, limits[1] + missing


def _nothing(axis) -> None:
    axis.text(0.5, 0.5, "nothing reported", ha="center", va="center", transform=axis.transAxes, alpha=0.6)


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 2] + ".."
