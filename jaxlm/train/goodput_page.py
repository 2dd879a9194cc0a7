# SPDX-License-Identifier: Apache-2.0
"""Where the wall time of runs went, as a bar a run and a table, to stand on the report page."""

import html
from collections.abc import Mapping

from jaxlm.train.goodput import PARTS, Goodput

NOTE = (
    "Every second of every start of the run in one part; goodput is the share in updates that count. Not seen: the "
    "time between a start and the next, what a killed one did after its last report, and drawing this page."
)
# What it is, for people, and the page's colour with its opacity.
SHOWN = {
    "step": ("updates that count", "var(--run2)", 1.0),
    "repeated": ("updates done again after a kill", "var(--run1)", 1.0),
    "init": ("imports, data, model, until the first batch", "var(--faint)", 0.8),
    "compile": ("compiling the train step", "var(--run3)", 1.0),
    "data": ("waiting for the next batch", "var(--run4)", 1.0),
    "evaluate": ("held-out records", "var(--run5)", 1.0),
    "save": ("held up by saves", "var(--run0)", 1.0),
    "restore": ("reading a checkpoint", "var(--run0)", 0.5),
    "other": ("reports, traces, between stages, export", "var(--faint)", 0.35),
}
WIDTH, HEIGHT = 1080, 18


def goodput_table(runs: Mapping[str, Goodput]) -> tuple[str, str]:
    """A note and the HTML; both empty without runs.

    Args:
      runs: by name, in the order of the page.
    """
    if not runs:
        return "", ""
    bars = "".join(_bar(name, run, several=len(runs) > 1) for name, run in runs.items())
    heads = "".join(f'<th colspan="2">{html.escape(name)}</th>' for name in runs)
    rows = []
    for part in PARTS:
        if any(run.seconds[part] >= 0.05 for run in runs.values()) or part == "step":
            cells = "".join(
                f"<td>{run.seconds[part]:,.1f} s</td><td>{_percent(run, part)}</td>" for run in runs.values()
            )
            rows.append(f'<tr><th scope="row">{_swatch(part)} {part}</th><td>{SHOWN[part][0]}</td>{cells}</tr>')
    cells = "".join(f"<td>{run.wall:,.1f} s</td><td>{_starts(run)}</td>" for run in runs.values())
    rows.append(f'<tr><th scope="row">wall</th><td>their sum</td>{cells}</tr>')
    table = (
        f'<div class="wide"><table class="numbers"><thead><tr><th>part</th><th></th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
    return NOTE, bars + table


def _bar(name: str, run: Goodput, *, several: bool) -> str:
    """The parts in a row, each as wide as its share."""
    begin, shown = 0.0, []
    for part in PARTS:
        width = WIDTH * run.seconds[part] / run.wall if run.wall > 0 else 0.0
        if width > 0:
            look = f'fill="{SHOWN[part][1]}" fill-opacity="{SHOWN[part][2]}"'
            told = f"<title>{part}: {run.seconds[part]:,.1f} s, {_percent(run, part)}</title>"
            shown.append(f'<rect x="{begin:.2f}" y="0" width="{width:.2f}" height="{HEIGHT}" {look}>{told}</rect>')
        begin += width
    said = html.escape(f"{name + ': ' if several else ''}goodput {100 * run.share:.1f} %")
    return (
        f'<p><b>{said}</b></p><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{said}">{"".join(shown)}</svg>'
    )


def _swatch(part: str) -> str:
    look = f'fill="{SHOWN[part][1]}" fill-opacity="{SHOWN[part][2]}"'
    return f'<svg width="12" height="12"><rect width="12" height="12" {look}/></svg>'


def _percent(run: Goodput, part: str) -> str:
    return f"{100 * run.seconds[part] / run.wall:.1f} %" if run.wall > 0 else ""


def _starts(run: Goodput) -> str:
    """How often it was started, if more than once, and what was lost."""
    starts = f"{run.lives} starts" if run.lives > 1 else ""
    return starts + (f", {run.repeated} updates done again" if run.repeated else "")
