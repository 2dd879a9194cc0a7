# SPDX-License-Identifier: Apache-2.0
"""Laws of the charts: every number is drawn where it belongs, and what is missing is left out and not drawn as 0."""

import re

import numpy as np
import pytest

from jaxlm.train.charts import Point, Row, dots, heat_map, scatter


def texts(svg):
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def test_a_heat_map_writes_every_cell_but_the_missing_ones_and_frames_the_marked():
    values = np.array([[0.1, 0.9], [np.nan, 0.5]])
    svg = heat_map("h", values, ("copy", "sum"), ("before", "after"), marked=[(0, 1)])
    assert texts(svg)[:2] == ["before", "after"] and [t for t in texts(svg) if t.isdigit()] == ["10", "90", "50"]
    assert "nan" not in texts(svg)
    assert svg.count("stroke: var(--run1)") == 1
    opacities = [float(x) for x in re.findall(r"fill: var\(--run0\); (?:fill-)?opacity: ([\d.]+)", svg)]
    assert opacities == pytest.approx([0.114, 0.546, 0.06, 0.33], abs=1e-3)
    assert "#123456" not in svg


def test_points_have_labels_error_bars_and_one_marker_a_group():
    groups = {"plain": [Point(0, 1, "slow"), Point(2, 3, "fast", (0.1, 0.2), (1, 1))], "epi": [Point(1, 4, "epi")]}
    svg = scatter("s", groups, x_label="plasticity", y_label="keeping", joined=True)
    assert {"slow", "fast", "epi", "plain", "plasticity", "keeping"} <= set(texts(svg))
    assert "var(--run0)" in svg and "var(--run1)" in svg
    lost = scatter("s", {"plain": [Point(0, float("nan"), "lost")]}, x_label="x", y_label="y")
    assert "nothing reported" in texts(lost) and "lost" not in texts(lost)


def test_an_axis_shows_at_least_its_span():
    def reach(span):
        svg = scatter("s", {"a": [Point(0, 0), Point(0.1, 0.1)]}, x_label="x", y_label="y", span=span)
        return max(float(t) for t in texts(svg) if re.fullmatch(r"\d+\.\d+", t))

    assert reach(0) <= 0.15 and 1 <= reach(4.0) <= 2.1


def test_rows_with_intervals_leave_out_what_is_unknown():
    rows = [Row("sft", 1.0, 0.5, 1.5, (0.9, 1.1)), Row("epi", float("nan"), group=1), Row("ewc", 2.0, group=2)]
    svg = dots("d", {"final": rows, "kept": rows}, zero=["kept"], unit="points")
    assert {"sft", "epi", "ewc", "final", "kept"} <= set(texts(svg))
    assert "var(--run1)" not in svg, "a row that has no number has no mark"
    with pytest.raises(ValueError, match="panel 'kept' has the rows"):
        dots("d", {"final": rows, "kept": rows[:1]})
