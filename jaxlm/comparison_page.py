# SPDX-License-Identifier: Apache-2.0
"""One page of pictures about a comparison: numbers with intervals, learning against keeping, drift, matrices."""

import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxlm.comparison import read_trained, run_directory
from jaxlm.comparison_report import COLUMNS, Arm
from jaxlm.config import Comparison
from jaxlm.train.charts import Point, Row, dots, heat_map, scatter
from jaxlm.train.continual import continual_metrics
from jaxlm.train.continual_page import isolation_panels
from jaxlm.train.page import legend, read_runs
from jaxlm.train.page_style import STYLE, TEMPLATE
from jaxlm.train.pictures import picture
from jaxlm.train.score_matrix import ScoreMatrix


def write_comparison(comparison: Comparison, arms: Sequence[Arm]) -> Path:
    """Writes `report.html` into the comparison's directory and returns where it is."""
    sections = [
        (
            "Every arm",
            f"Points of 100, with 95 % intervals; ticks are seeds. Plain arm: {comparison.plain}.",
            _dots(arms),
        ),
        (
            "Learning and keeping",
            "Plasticity: a new task's score when learnt, less that of a specialist. Right and up is better. The line "
            f"is {comparison.plain} at every learning rate, with the first seed: an arm must lie above it.",
            _plane(comparison, arms),
        ),
        (
            "How the held set moves",
            "First seed. Grey: the overlap of two random sets of that size.",
            _drift(comparison, arms),
        ),
        (
            "Tasks over time",
            "Means over seeds; rows are tasks, columns stages; marked: where a task was learnt.",
            _maps(arms),
        ),
    ]
    body = "".join(
        f'<section><h2>{html.escape(title)}</h2><p class="note">{html.escape(note)}</p>{drawn}</section>\n'
        for title, note, drawn in sections
        if drawn
    )
    rates = ", ".join(f"{rate:g}" for rate in comparison.learning_rates)
    facts = (
        f"<li>{len(arms)} arms, {len(comparison.seeds)} seeds, rates {rates}, "
        f"{comparison.run.run.steps} updates of {comparison.run.run.batch_size} rows of {comparison.run.data.length} "
        "tokens</li>"
    )
    page = TEMPLATE.format(title=html.escape(comparison.directory.name), style=STYLE, legend="", facts=facts, body=body)
    out = comparison.directory / "report.html"
    part = out.with_name("report.html.part")
    part.write_text(page)
    return part.replace(out)


def _dots(arms: Sequence[Arm]) -> str:
    panels = {}
    for metric in ("final", "backward_transfer", "base_drop"):
        rows = []
        for arm in arms:
            found = arm.metrics[metric]
            seeds = [100 * continual_metrics(matrix)[metric] for matrix in arm.matrices]
            rows.append(Row(arm.name, 100 * found.mean, 100 * found.low, 100 * found.high, seeds))
        panels[COLUMNS[metric]] = rows
    return dots("arms", panels, zero=[COLUMNS["backward_transfer"], COLUMNS["base_drop"]], unit="points")


def _plane(comparison: Comparison, arms: Sequence[Arm]) -> str:
    groups = {}
    plain = next(arm for arm in arms if arm.name == comparison.plain)
    if "plasticity" not in plain.metrics:
        return ""  # no specialists yet
    # Specialists shift every arm's plasticity by one number: the plain arm tells it.
    learnt = np.mean([_when_learnt(matrix) for matrix in plain.matrices])
    shift = plain.metrics["plasticity"].mean - float(learnt)
    line = []
    for rate in comparison.rates(comparison.plain):
        found = read_trained(comparison, comparison.plain, rate, comparison.seeds[0])
        if found is not None:
            matrix = found.scores.matrix("accuracy", items="odd")
            lost = continual_metrics(matrix)["backward_transfer"]
            line.append(Point(100 * (_when_learnt(matrix) + shift), 100 * lost, f"{rate:g}"))
    groups[f"{comparison.plain} by rate"] = line
    for arm in arms:
        x, y = arm.metrics["plasticity"], arm.metrics["backward_transfer"]
        if np.isfinite(y.mean):
            errors = [(100 * (m.mean - m.low), 100 * (m.high - m.mean)) for m in (x, y)]
            groups[arm.name] = [Point(100 * x.mean, 100 * y.mean, arm.name, *errors)]
    return scatter(
        "plane", groups, x_label="plasticity, points", y_label="backward transfer, points", joined=True, legend=False
    )


def _when_learnt(matrix: ScoreMatrix) -> float:
    return float(np.mean([matrix.means[i, matrix.learned_at[i]] for i in matrix.trained]))


def _drift(comparison: Comparison, arms: Sequence[Arm]) -> str:
    directories = [run_directory(comparison, arm.name, arm.rate, comparison.seeds[0]) for arm in arms]
    runs = {arm.name: run.train for arm, run in zip(arms, read_runs(directories), strict=True)}
    runs = {name: lines for name, lines in runs.items() if any("isolation/held" in line for line in lines.values())}
    panels = isolation_panels(runs)
    drawn = picture("drift", panels, list(runs)) if panels else ""
    return f'<ul class="plain legend">{legend(list(runs))}</ul>{drawn}' if panels else ""


def _maps(arms: Sequence[Arm]) -> str:
    drawn = []
    for index, arm in enumerate(arms):
        first = arm.matrices[0]
        means = np.mean([matrix.means for matrix in arm.matrices], axis=0)
        marked = [(i, at) for i, at in enumerate(first.learned_at) if at is not None]
        drawing = heat_map(f"map{index}", means, first.tasks, first.columns, marked=marked, title=arm.name)
        wide = 120 + 64 * len(first.columns)  # cells of one size in all maps
        drawn.append(f'<div style="flex: 0 1 {wide}px">{drawing}</div>')
    return f'<div style="display: flex; flex-wrap: wrap; gap: 12px 28px">{"".join(drawn)}</div>'
