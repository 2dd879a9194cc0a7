# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML page about a run, or several side by side: pictures, tables, config. Loads nothing."""

import datetime
import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.train.continual_page import continual_table, isolation_panels, numbers_section, scores_section
from jaxlm.train.goodput import Goodput, add_lives
from jaxlm.train.goodput_page import goodput_table
from jaxlm.train.page_style import STYLE, TEMPLATE
from jaxlm.train.pictures import COLOURS, Panel, Series, picture
from jaxlm.train.reporter import SPENT, read_metrics
from jaxlm.train.scores import FILE, Scores

_SHOWN_EVENTS = 60


class Run(NamedTuple):
    """What a run directory says.

    Attributes:
      name: of the directory, or its path where two directories have one name.
      config: "run.steps" -> value; empty where the directory has no config.json.
      train, held_out: lines of metrics by step, the last one said for each step.
      events: lines in order, but for those that `goodput` is made of.
      scores: of every held-out record over its stages, if it has kept them.
      goodput: where its wall time went, if it has said so.
    """

    name: str
    config: Mapping[str, Any]
    train: Mapping[int, Mapping[str, Any]]
    held_out: Mapping[int, Mapping[str, Any]]
    events: Sequence[Mapping[str, Any]]
    scores: Scores | None = None
    goodput: Goodput | None = None


def write_page(directories: Iterable[str | Path], out: str | Path, *, specialists: Iterable[str | Path] = ()) -> Path:
    """Writes the page about these run directories and returns where it is.

    Args:
      specialists: directories of runs that trained on one task alone, to compare the learning of tasks with.
    Raises: ValueError if a directory holds no metrics, or a specialist no scores.
    """
    runs = read_runs([Path(directory) for directory in directories])
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + ".part")
    part.write_text(render(runs, [Scores.read(directory) for directory in specialists]))
    return part.replace(out)


def compare_runs(directories: Iterable[str | Path], *, specialists: Iterable[str | Path] = ()) -> str:
    """The continual metrics of these runs as lines of text, a run a line; empty where none has kept its scores."""
    runs = read_runs([Path(directory) for directory in directories])
    scores = {run.name: run.scores for run in runs if run.scores is not None}
    return continual_table(scores, [Scores.read(directory) for directory in specialists])


def read_runs(directories: Sequence[Path]) -> list[Run]:
    """The runs, each under a name of its own."""
    names = [directory.resolve().name for directory in directories]
    runs = []
    for directory, name in zip(directories, names, strict=True):
        lines = read_metrics(directory)
        by_kind: dict[str, list] = {"train": [], "eval": [], "event": []}
        for line in lines:
            by_kind[line["kind"]].append(line)
        config = directory / "config.json"
        runs.append(
            Run(
                name if names.count(name) == 1 else str(directory),
                _flat(json.loads(config.read_text())) if config.is_file() else {},
                {line["step"]: line for line in by_kind["train"]},
                {line["step"]: line for line in by_kind["eval"]},
                [event for event in by_kind["event"] if event["name"] != SPENT],
                Scores.read(directory) if (directory / FILE).is_file() else None,
                add_lives(by_kind["event"]),
            )
        )
    return runs


def render(runs: Sequence[Run], specialists: Sequence[Scores] = ()) -> str:
    """The page as text."""
    names = [run.name for run in runs]
    metrics = sorted({name for run in runs for line in _all(run) for name in line})
    tasks = [name.removeprefix("loss/") for name in metrics if name.startswith("loss/")]
    losses = [_panel("All tasks", "nats / token", "loss", runs)]
    losses += [_panel(task, "nats / token", f"loss/{task}", runs) for task in tasks]
    asked = [name.removeprefix("accuracy/") for name in metrics if name.startswith("accuracy/")]
    answers = [_panel(task, "share right", f"accuracy/{task}", runs, from_zero=True) for task in asked]
    how = [
        _panel("Learning rate", "", "learning_rate", runs, from_zero=True, smooth=False),
        _panel("Update norm", "", "update_norm", runs, from_zero=True),
        _panel("Throughput", "tokens / s", "tokens_per_second", runs, from_zero=True),
        _panel("MFU", "share of the peak", "mfu", runs, from_zero=True),
        _panel("Memory, most so far", "GiB", "memory_gib", runs, from_zero=True, smooth=False),
    ]
    scores = {run.name: run.scores for run in runs if run.scores is not None}
    isolation = isolation_panels({run.name: run.train for run in runs})
    sections = [
        _section(*numbers_section(scores, specialists, names)),
        _section(*scores_section(scores)),
        _section(
            "Before and after",
            "Held-out records; accuracy is of the model's own answers.",
            _before_and_after(runs, tasks),
        ),
        _section("Loss", "Thin lines: training. Dots: held-out records.", picture("loss", losses, names)),
        _section("Generated answers", "", picture("answers", answers, names) if answers else ""),
        _section(
            "What is held",
            "Overlap: Jaccard index of held sets; grey: what two random sets of that size share.",
            picture("held", isolation, names) if isolation else "",
        ),
        _section("How it ran", _peaks(runs), picture("how", how, names)),
        _section("Where the time went", *goodput_table({run.name: run.goodput for run in runs if run.goodput})),
        _section("Seconds by event", "Outside the updates themselves.", _times(runs)),
        _section("Config", "", _configs(runs)),
        _section("Events", "", _events(runs)),
    ]
    title, body = html.escape(", ".join(names)), "".join(sections)
    return TEMPLATE.format(title=title, style=STYLE, legend=legend(names), facts=_facts(runs), body=body)


def legend(names: Sequence[str]) -> str:
    """Items of a list: which colour and dash the pictures give each name, in this order."""
    return "".join(
        f'<li><svg width="34" height="10"><line x1="0" y1="5" x2="34" y2="5" stroke="var(--run{i % len(COLOURS)})" '
        f'stroke-width="3" stroke-dasharray="{_dash(i)}"/></svg> {html.escape(name)}</li>'
        for i, name in enumerate(names)
    )


def _dash(index: int) -> str:
    return ("", "8 4", "8 3 2 3", "2 3", "10 2 2 2 2 2", "2 2")[index % 6]


def _section(title: str, note: str, body: str) -> str:
    note = f'<p class="note">{html.escape(note)}</p>' if note else ""
    return f"<section><h2>{html.escape(title)}</h2>{note}{body}</section>\n" if body else ""


def _all(run: Run) -> list[Mapping[str, Any]]:
    return [*run.train.values(), *run.held_out.values()]


def _panel(title: str, unit: str, metric: str, runs: Sequence[Run], **options: Any) -> Panel:
    """One metric of all runs, as trained and as held out."""
    series = {}
    for run in runs:
        kinds = [(run.train, False), (run.held_out, True)]
        points = [(sorted(s for s in lines if metric in lines[s]), lines, held_out) for lines, held_out in kinds]
        series[run.name] = [Series(at, [lines[s][metric] for s in at], held) for at, lines, held in points if at]
    return Panel(title, unit, series, **options)


def _facts(runs: Sequence[Run]) -> str:
    """One line a run: how far, how long, how fast."""
    rows = []
    for run in runs:
        last = max(run.train, default=0)
        times = [line["time"] for line in [*_all(run), *run.events]]
        began = datetime.datetime.fromtimestamp(min(times), datetime.UTC) if times else None
        rates = sorted(line["tokens_per_second"] for line in run.train.values() if "tokens_per_second" in line)
        facts = [
            f"{last} of {run.config.get('run.steps', '?')} updates",
            f"{run.train[last]['tokens']:,} tokens" if last and "tokens" in run.train[last] else "",
            f"{_number(rates[len(rates) // 2])} tokens/s in the middle" if rates else "",
            f"goodput {100 * run.goodput.share:.0f} %" if run.goodput else "",
            f"{_duration(max(times) - min(times))} from first to last report" if times else "",
            f"began {began:%Y-%m-%d %H:%M} UTC" if began else "",
        ]
        rows.append(f"<li><b>{html.escape(run.name)}</b>: {html.escape(', '.join(f for f in facts if f))}</li>")
    return "".join(rows)


def _before_and_after(runs: Sequence[Run], tasks: Sequence[str]) -> str:
    """First and last held-out metrics of each task, the runs beside each other."""
    kinds = {
        "loss": "loss, nats / token",
        "perplexity": "perplexity",
        "exact_match": "exact match",
        "accuracy": "accuracy",
    }
    body = []
    for task in tasks:
        rows = {}
        for kind, label in kinds.items():
            cells = [_change(run, f"{kind}/{task}", kind in ("exact_match", "accuracy")) for run in runs]
            if any(cells):
                rows[label] = "".join(cell or "<td colspan=3></td>" for cell in cells)
        for index, (label, shown) in enumerate(rows.items()):
            head = f'<th scope="rowgroup" rowspan="{len(rows)}">{html.escape(task)}</th>' if index == 0 else ""
            body.append(f"<tr>{head}<td>{label}</td>{shown}</tr>")
    if not body:
        return ""
    names = "".join(f'<th colspan="3">{html.escape(run.name)}</th>' for run in runs)
    heads = "<th>before</th><th>after</th><th>change</th>" * len(runs)
    return (
        '<div class="wide"><table class="numbers"><thead><tr><th rowspan="2">task</th><th rowspan="2">metric</th>'
        f"{names}</tr><tr>{heads}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _change(run: Run, metric: str, more_is_better: bool) -> str:
    said = [run.held_out[step][metric] for step in sorted(run.held_out) if metric in run.held_out[step]]
    if not said:
        return ""
    before, after = said[0], said[-1]
    better = after > before if more_is_better else after < before
    mark = "" if before == after else "&#9650; better" if better else "&#9660; worse"
    shown = [f"{100 * x:.1f} %" if more_is_better else _number(x) for x in (before, after)]
    look = "better" if better else "worse" if mark else ""
    return f'<td>{shown[0]}</td><td><b>{shown[1]}</b></td><td class="{look}">{mark}</td>'


def _peaks(runs: Sequence[Run]) -> str:
    """What MFU means here, as each run said when it began."""
    said = {e["peak"]: e.get("flops", "") for run in runs for e in run.events if "peak" in e}
    return "; ".join(f"MFU is a share of {peak}" + (f" ({flops})" if flops else "") for peak, flops in said.items())


def _times(runs: Sequence[Run]) -> str:
    """Seconds by kind of event, which are what the loop leaves out of its rates."""
    kinds = sorted({e["name"] for run in runs for e in run.events if isinstance(e.get("seconds"), int | float)})
    if not kinds:
        return ""
    head = "".join(f"<th>{html.escape(run.name)}</th>" for run in runs)
    body = []
    for kind in kinds:
        cells = []
        for run in runs:
            seconds = [e["seconds"] for e in run.events if e["name"] == kind and "seconds" in e]
            cells.append(f"<td>{sum(seconds):.1f} s in {len(seconds)}</td>" if seconds else "<td></td>")
        body.append(f'<tr><th scope="row">{html.escape(kind)}</th>{"".join(cells)}</tr>')
    return f'<table class="numbers"><thead><tr><th>event</th>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>'


def _configs(runs: Sequence[Run]) -> str:
    """The fields in which the runs differ, and behind a click all of them."""
    names = list(dict.fromkeys(name for run in runs for name in run.config))
    missing = object()
    differ = [name for name in names if len({repr(run.config.get(name, missing)) for run in runs}) > 1]
    differ = [name for name in differ if name != "run.directory"]
    shown = ""
    if len(runs) > 1:
        shown = _fields(differ, runs) if differ else "<p>The runs have one config.</p>"
    if not names:
        return shown
    return f"{shown}<details><summary>All {len(names)} fields</summary>{_fields(names, runs)}</details>"


def _fields(names: Sequence[str], runs: Sequence[Run]) -> str:
    head = "".join(f"<th>{html.escape(run.name)}</th>" for run in runs)
    rows = []
    for name in names:
        cells = "".join(
            f"<td>{html.escape(_text(run.config[name])) if name in run.config else ''}</td>" for run in runs
        )
        rows.append(f'<tr><th scope="row"><code>{html.escape(name)}</code></th>{cells}</tr>')
    table = f"<table><thead><tr><th>field</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="wide">{table}</div>'


def _events(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs:
        rows = []
        for event in run.events[-_SHOWN_EVENTS:]:
            when = datetime.datetime.fromtimestamp(event["time"], datetime.UTC)
            known = ("kind", "step", "time", "name")
            said = ", ".join(f"{key} {_text(value)}" for key, value in event.items() if key not in known)
            rows.append(
                f"<tr><td>{when:%H:%M:%S}</td><td>{event['step']}</td><td>{html.escape(event['name'])}</td>"
                f"<td>{html.escape(said)}</td></tr>"
            )
        if rows:
            left_out = len(run.events) - len(rows)
            more = f", the last {len(rows)} of {len(run.events)} events" if left_out else f", {len(rows)} events"
            head = "<tr><th>UTC</th><th>update</th><th>event</th><th></th></tr>"
            parts.append(
                f"<details><summary>{html.escape(run.name)}{more}</summary><table><thead>{head}</thead>"
                f"<tbody>{''.join(rows)}</tbody></table></details>"
            )
    return "".join(parts)


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """A stored config as "run.steps" -> value."""
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, inner in items for k, v in _flat(inner, f"{path}.{key}" if path else str(key)).items()}
    return {path: str(value).rpartition(".")[2] if path.rpartition(".")[2] == "class" else value}


def _text(value: Any) -> str:
    text = _number(value) if isinstance(value, float) else str(value)
    return text if len(text) <= 200 else text[:200] + " ..."


def _number(value: float) -> str:
    """Four digits, with thousands apart."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
