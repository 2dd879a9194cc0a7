# SPDX-License-Identifier: Apache-2.0
"""One page of pictures about a comparison over lengths: perplexity by length, and where attention lies."""

import html
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from jaxlm.comparison_lengths_report import LengthArm, reach
from jaxlm.config import LengthComparison
from jaxlm.resampling import Interval
from jaxlm.train.charts import MARKERS, Row, dots
from jaxlm.train.page_style import STYLE, TEMPLATE
from jaxlm.train.pictures import COLOURS, DASHES, drawing

LEAST = 1e-4  # scores below are drawn there: the axis is logarithmic


def write_length_comparison(comparison: LengthComparison, arms: Sequence[LengthArm]) -> Path:
    """Writes `report.html` into the comparison's directory and returns where it is."""
    first, looked_at = comparison.lengths[0], comparison.looked_at
    edges = distance_bins(looked_at)
    nearest = [str(low) if high == low + 1 else f"{low}-{high - 1}" for low, high in edges]
    even = max(0.0, 1 - first / looked_at)
    sections = [
        (
            "Perplexity by length",
            f"The same {comparison.tokens:,} tokens at every length, mean over seeds. Flat is what one hopes for: more "
            "context should not hurt. The first point is the training length.",
            _perplexities("perplexity", arms, lambda arm: arm.perplexity),
        ),
        (
            f"The last {comparison.tail} predictions of each window",
            "They have the whole window before them. Each length scores other text, so compare arms, not lengths.",
            _perplexities("tail", arms, lambda arm: arm.tail),
        ),
        (
            "Every arm",
            f"Left: perplexity at {reach(comparison):,} tokens over that at {first}. Middle: perplexity at {first} "
            f"over that of {comparison.plain}. Lines: 95 % intervals over windows. Right: share of the attention of "
            f"the last {comparison.tail} queries of {looked_at:,} that lies further back than {first} tokens. "
            f"Ticks are seeds. Even attention would give {100 * even:.0f} %.",
            _dots(comparison, arms),
        ),
        (
            "Attention by distance",
            f"Share of the weight in each range of distances, windows of {looked_at:,} tokens, mean over layers, heads "
            f"and the last {comparison.tail} queries. Where scores go to 0 every far token keeps the same weight, and "
            "there are many: far attention turns even. A slope or a sink takes it back.",
            curves(
                "weight",
                {arm.name: [float(arm.weight[low:high].sum()) for low, high in edges] for arm in arms},
                "share of attention",
                "distance, tokens",
                ticks=nearest,
            ),
        ),
        (
            "Scores by distance",
            f"Mean size of the scaled product of query and key, before slopes; below {LEAST:g} is drawn there.",
            curves(
                "score",
                {arm.name: [max(LEAST, float(arm.score[low:high].mean())) for low, high in edges] for arm in arms},
                "score",
                "distance, tokens",
                ticks=nearest,
                logarithmic=True,
            ),
        ),
    ]
    body = "".join(
        f'<section><h2>{html.escape(title)}</h2><p class="note">{html.escape(note)}</p>{drawn}</section>\n'
        for title, note, drawn in sections
    )
    rates = ", ".join(f"{rate:g}" for rate in comparison.learning_rates)
    counts = sorted({len(arm.seeds) for arm in arms})
    facts = (
        f"<li>{len(arms)} arms, seeds: {' or '.join(map(str, counts))}, rates {rates}, {comparison.run.run.steps} "
        f"updates of {comparison.run.run.batch_size} rows of {first} tokens</li>"
    )
    page = TEMPLATE.format(title=html.escape(comparison.directory.name), style=STYLE, legend="", facts=facts, body=body)
    out = comparison.directory / "report.html"
    part = out.with_name("report.html.part")
    part.write_text(page)
    return part.replace(out)


def distance_bins(length: int) -> list[tuple[int, int]]:
    """Ranges [low, high) of distances that double: 0, 1, 2-3, 4-7, ...

    >>> distance_bins(8)
    [(0, 1), (1, 2), (2, 4), (4, 8)]
    """
    edges = [0, *(2**k for k in range(length.bit_length()) if 2**k < length), length]
    return list(itertools.pairwise(edges))


def curves(
    name: str,
    lines: Mapping[str, Mapping[int, float] | Sequence[float]],
    unit: str,
    x_label: str,
    *,
    ticks: Sequence[str] = (),
    logarithmic: bool = False,
) -> str:
    """One line an arm, over lengths (a mapping, drawn by their logarithms) or over named ranges; a legend beside it."""

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        places, labels = [float(place) for place in range(len(ticks))], list(ticks)
        for index, (arm, points) in enumerate(lines.items()):
            if isinstance(points, Mapping):
                places, labels = [math.log2(length) for length in points], [f"{length:,}" for length in points]
                points = list(points.values())
            axis.plot(
                places,
                points,
                label=arm,
                color=COLOURS[index % len(COLOURS)],
                linestyle=DASHES[index // len(COLOURS) % len(DASHES)],
                marker=MARKERS[index // len(COLOURS) % len(MARKERS)],
                markersize=4,
                linewidth=1.5,
            )
        axis.set_xticks(places, labels)
        if len(labels) > 8:
            axis.tick_params(axis="x", labelrotation=40)
        axis.set(xlabel=x_label, ylabel=unit, yscale="log" if logarithmic else "linear")
        low, high = axis.get_ylim()
        if logarithmic and high < 100 * low:  # few decades: numbers, not powers of ten
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("{x:g}")
        axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8)

    return drawing(name, draw, height=4.6)


def _perplexities(name: str, arms: Sequence[LengthArm], found: Callable[[LengthArm], Mapping[int, Interval]]) -> str:
    """Lines over the lengths, on a logarithmic axis where an arm leaves the others far behind."""
    lines = {arm.name: {length: x.mean for length, x in found(arm).items()} for arm in arms}
    every = [x for points in lines.values() for x in points.values()]
    return curves(name, lines, "perplexity", "tokens of a window", logarithmic=max(every) > 5 * min(every))


def _dots(comparison: LengthComparison, arms: Sequence[LengthArm]) -> str:
    times = reach(comparison) // comparison.lengths[0]
    far = reach(comparison)
    panels: dict[str, list[Row]] = {f"{times}x over 1x": [], f"against {comparison.plain}": [], "far attention": []}
    for arm in arms:
        grown = [b / a for a, b in zip(arm.by_seed[comparison.lengths[0]], arm.by_seed[far], strict=True)]
        rows = [
            Row(arm.name, *arm.growth, grown),
            Row(arm.name, *arm.against),
            Row(arm.name, float(np.mean(arm.far)), seeds=arm.far),
        ]
        for panel, row in zip(panels.values(), rows, strict=True):
            panel.append(row)
    return dots("arms", panels)
