# SPDX-License-Identifier: Apache-2.0
"""What a page says about learning and forgetting: scores over the stages, the numbers they come to, held sets."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm.train.charts import Point, heat_map, scatter
from jaxlm.train.continual import continual_metrics, metric_of
from jaxlm.train.pictures import Panel, Series
from jaxlm.train.score_matrix import Baseline, ScoreMatrix
from jaxlm.train.scores import Kind, Scores

KINDS: dict[Kind, str] = {
    "accuracy": "answer tokens right, %",
    "exact": "records all right, %",
    "nll": "loss, nats / token",
}
NUMBERS = {
    "final": "final",
    "final_worst": "worst task",
    "plasticity": "plasticity",
    "backward_transfer": "backward transfer",
    "forgetting": "forgetting",
    "base_drop": "base drop",
}
_HELD = "isolation/held/"


def scores_section(scores: Mapping[str, Scores]) -> tuple[str, str, str]:
    """Title, note and body: a heat map of every run and kind of score, task by column."""
    parts = []
    for index, (run, found) in enumerate(scores.items()):
        title = f"<h3>{html.escape(run)}</h3>" if len(scores) > 1 else ""
        try:
            maps = [_map(f"scores{index}-{kind}", found.matrix(kind), label) for kind, label in KINDS.items()]
        except ValueError as error:
            maps = [f"<p>{html.escape(str(error))}</p>"]
        if len(scores) > 1:
            others = f"<details><summary>records all right; loss</summary>{''.join(maps[1:])}</details>"
            maps = [maps[0], others if maps[1:] else ""]
        parts.append(f'{title}<div class="wide">{"".join(maps)}</div>')
    note = "Held-out records under teacher forcing, by stage; framed: the stage that first trained on the task."
    return "Scores over the stages", note, "".join(parts)


def numbers_section(
    scores: Mapping[str, Scores], specialists: Sequence[Scores], names: Sequence[str]
) -> tuple[str, str, str]:
    """Title, note and body: the continual metrics of every run, and how it learns against how it keeps."""
    head, *body = continual_rows(scores, specialists)
    table = ""
    if body:
        heads = "".join(f"<th>{html.escape(text)}</th>" for text in head)
        lines = [
            f'<tr><th scope="row">{html.escape(run)}</th>' + "".join(f"<td>{text}</td>" for text in cells) + "</tr>"
            for run, *cells in body
        ]
        table = f'<table class="numbers"><thead><tr>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
        table = f'<div class="wide">{table}</div>'
    points = {name: [Point(*xy, label=name)] for name in names if (xy := _plane(scores.get(name), specialists))}
    picture = ""
    if sum(math.isfinite(point.y) for (point,) in points.values()) > 1:
        x = "plasticity" if specialists else "score when learned"
        drawn = {name: points.get(name, []) for name in names}
        x_label, y_label = f"{x}, points", "backward transfer, points"
        picture = scatter("plane", drawn, x_label=x_label, y_label=y_label, legend=False, span=4.0)
    note = (
        "Points of 100, of answer tokens right; docs/continual_metrics.md defines them. Up and to the right is better."
    )
    return "Learning and keeping", note, table + picture


def continual_rows(scores: Mapping[str, Scores], specialists: Sequence[Scores] = ()) -> list[list[str]]:
    """A table as text: a heading, then the continual metrics of each run whose scores begin before training."""
    rows = []
    for run, found in scores.items():
        if (matrix := _matrix(found)) is not None:
            numbers = continual_metrics(matrix, specialist=specialists_of(matrix, specialists))
            rows.append([run, *(_points(numbers.get(name, math.nan)) for name in NUMBERS)])
    shown = [0, *(i for i in range(1, len(NUMBERS) + 1) if any(row[i] for row in rows))]
    return [[row[i] for i in shown] for row in [["run", *NUMBERS.values()], *rows]]


def continual_table(scores: Mapping[str, Scores], specialists: Sequence[Scores] = ()) -> str:
    """The same as lines of text; empty where no run has scores."""
    rows = continual_rows(scores, specialists)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([run.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))])
        for run, *cells in rows
    ]
    return "\n".join(line.rstrip() for line in lines) if len(rows) > 1 else ""


def specialists_of(matrix: ScoreMatrix, specialists: Sequence[Scores]) -> Baseline | None:
    """Each task's last scores in the run that trained on it alone; None without any.

    Raises: ValueError for specialists scored on other records.
    """
    if not specialists:
        return None
    found: dict[str, Any] = {}
    for scores in specialists:
        alone = scores.matrix("accuracy")
        if alone.items_hash != matrix.items_hash:
            raise ValueError(
                f"the specialist of {', '.join(alone.tasks[i] for i in alone.trained)} was scored on other records "
                f"({alone.items_hash}) than the run ({matrix.items_hash}): give all runs the same data"
            )
        found |= {alone.tasks[i]: alone.values[i][-1] for i in alone.trained}
    return [found.get(task) for task in matrix.tasks]


def isolation_panels(train: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> list[Panel]:
    """Pictures of held sets over the updates, for the runs that report any."""

    def series(metric: str) -> dict[str, list[Series]]:
        at = {run: sorted(step for step in lines if metric in lines[step]) for run, lines in train.items()}
        return {run: [Series(steps, [train[run][s][metric] for s in steps])] for run, steps in at.items() if steps}

    names = {name for lines in train.values() for line in lines.values() for name in line}
    chance = [one for found in series("isolation/chance").values() for one in found]
    panels = []
    told = {
        "overlap_first": ("Overlap with the first set", "Jaccard index"),
        "overlap_previous": ("Overlap with the previous set", "Jaccard index"),
        "entered": ("Entered", "share of the held set"),
        "left": ("Left", "share of the held set"),
        "stay": ("Mean stay", "choices"),
        "held": ("Held", "share of entries"),
    }
    for metric, (title, unit) in told.items():
        if f"isolation/{metric}" in names:
            beside = chance if metric.startswith("overlap") else ()
            drawn = series(f"isolation/{metric}")
            panels.append(Panel(title, unit, drawn, from_zero=True, smooth=False, chance=beside))
    for name in sorted(name for name in names if name.startswith(_HELD)):
        kind = name.removeprefix(_HELD)
        panels.append(Panel(f"Held: {kind}", "share of the held set", series(name), from_zero=True, smooth=False))
    return panels


def _map(name: str, matrix: ScoreMatrix, label: str) -> str:
    means = matrix.means
    marked = [(i, at) for i, at in enumerate(matrix.learned_at) if at is not None]
    if matrix.higher_is_better:
        return heat_map(name, means, matrix.tasks, matrix.columns, marked=marked, title=label)
    worst, best = means.min(axis=1, keepdims=True), means.max(axis=1, keepdims=True)
    shades = (means - worst) / np.maximum(best - worst, 1e-12)
    write = "{:.2f}".format
    return heat_map(name, -means, matrix.tasks, matrix.columns, shades=shades, marked=marked, write=write, title=label)


def _matrix(scores: Scores | None) -> ScoreMatrix | None:
    """The table the numbers are of, if the scores make one with something learned in it."""
    if scores is None or not scores.columns or scores.learned[scores.columns[0]]:
        return None
    matrix = scores.matrix("accuracy")
    return matrix if matrix.trained else None


def _plane(scores: Scores | None, specialists: Sequence[Scores]) -> tuple[float, float] | None:
    """How well a run learns and how well it keeps, in points."""
    matrix = _matrix(scores)
    if matrix is None:
        return None
    specialist = specialists_of(matrix, specialists) or [0.0] * len(matrix.tasks)
    learned = metric_of(matrix, "plasticity", specialist)
    return 100 * float(learned), 100 * float(metric_of(matrix, "backward_transfer"))


def _points(share: float) -> str:
    return f"{100 * share:.1f}" if math.isfinite(share) else ""
