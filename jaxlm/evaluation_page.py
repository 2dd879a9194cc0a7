# SPDX-License-Identifier: Apache-2.0
"""One page about generated answers: accuracy by task with intervals, a reliability diagram, answers right and wrong."""

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from transformers import PreTrainedTokenizerFast

from jaxlm.evaluation_metrics import CONFIDENCE, Measured
from jaxlm.evaluation_samples import Answered
from jaxlm.resampling import Interval
from jaxlm.train.charts import Row, dots
from jaxlm.train.page_style import STYLE, TEMPLATE
from jaxlm.train.pictures import COLOURS, TEXT, WIDTH, drawing

_EXAMPLES = 3  # of each kind and task
_SHOWN = 1200  # characters of a text


def write_answers_page(
    out: Path,
    title: str,
    facts: Mapping[str, str],
    measured: Sequence[Measured],
    answered: Sequence[Answered],
    tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """Writes the page and returns where it is.

    Args:
      facts: label -> text, said under the title.
    """
    kinds = dict.fromkeys(m.confidence for m in measured if m.calibration is not None)
    means = "; ".join(f"Confidence is {CONFIDENCE[kind]}" for kind in kinds)
    sections = [
        ("Accuracy", "Per cent, with 95 % intervals over records.", _accuracy(measured)),
        ("Calibration", f"{means}. On the line, a claim of 80 % is right in 80 % of cases.", _reliability(measured)),
        ("Numbers", "Per cent where nothing else is said; in brackets 95 % intervals.", _numbers(measured)),
        ("Right and wrong", "The first samples of each kind.", _examples(answered, tokenizer)),
    ]
    body = "".join(
        f'<section><h2>{html.escape(name)}</h2><p class="note">{html.escape(note)}</p>{drawn}</section>\n'
        for name, note, drawn in sections
        if drawn
    )
    said = "".join(f"<li><b>{html.escape(label)}</b>: {html.escape(text)}</li>" for label, text in facts.items())
    part = out.with_name(out.name + ".part")
    part.write_text(TEMPLATE.format(title=html.escape(title), style=STYLE, legend="", facts=said, body=body))
    return part.replace(out)


def _accuracy(measured: Sequence[Measured]) -> str:
    def rows(found: Sequence[Interval | None]) -> list[Row]:
        pairs = zip(measured, found, strict=True)
        return [
            Row(m.task, math.nan) if e is None else Row(m.task, 100 * e.mean, 100 * e.low, 100 * e.high)
            for m, e in pairs
        ]

    panels = {"accuracy": rows([m.accuracy for m in measured])}
    if ks := measured[0].pass_at:
        panels[f"pass@{max(ks)}"] = rows([m.pass_at[max(ks)] for m in measured])
        panels[f"majority@{max(ks)}"] = rows([m.majority_at.get(max(ks)) for m in measured])
    return dots("accuracy", panels, zero=list(panels), unit="per cent")


def _reliability(measured: Sequence[Measured]) -> str:
    known = [m for m in measured if m.calibration is not None]
    if not known:
        return ""
    columns = min(3, len(known))
    rows = math.ceil(len(known) / columns)

    def draw(figure: Figure) -> None:
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for axis in axes[len(known) :]:
            axis.set_axis_off()
        for axis, m in zip(axes, known, strict=False):
            assert m.calibration is not None
            bins = [b for b in m.calibration.bins if b.answers]
            most = max(b.answers for b in bins)
            axis.plot([0, 1], [0, 1], color=TEXT, linewidth=0.8, alpha=0.5)
            for b in bins:
                height = 0.22 * b.answers / most  # how many answers, at the foot
                axis.bar(b.low, height, b.high - b.low, align="edge", color=TEXT, alpha=0.15, linewidth=0)
                axis.plot([b.confidence] * 2, [b.right.low, b.right.high], color=COLOURS[0], linewidth=1.6)
            axis.plot([b.confidence for b in bins], [b.right.mean for b in bins], "o-", color=COLOURS[0], markersize=5)
            axis.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="confidence", ylabel="right", title=m.task)
            axis.set_aspect("equal")
            error = m.calibration.error.mean
            axis.text(0.03, 0.93, f"error {error:.3f}", transform=axis.transAxes, fontsize=8)

    return drawing("reliability", draw, height=3.4 * rows, width=WIDTH * columns / 3)


def _numbers(measured: Sequence[Measured]) -> str:
    """A column a task."""
    rows: dict[str, list[str]] = {"accuracy": [_estimate(m.accuracy) for m in measured]}
    for k in measured[0].pass_at:
        rows[f"pass@{k}"] = [_estimate(m.pass_at[k]) for m in measured]
    for k in measured[0].pass_at:
        rows[f"majority@{k}"] = [_estimate(m.majority_at.get(k)) for m in measured]
    known = [m.calibration for m in measured]
    rows["mean score"] = [_estimate(m.score, 1, 3) for m in measured]
    rows["calibration error"] = [_estimate(c and c.error, 1, 3) for c in known]
    rows["Brier score"] = [_estimate(c and c.brier, 1, 3) for c in known]
    rows["cut off by the length limit"] = [f"{100 * m.cut_off:.1f} %" for m in measured]
    rows["tokens of an answer"] = [f"{m.tokens:.1f}" for m in measured]
    rows["records, samples of each"] = [f"{m.questions}, {m.samples}" for m in measured]
    rows["verifier"] = [m.verifier for m in measured]
    head = "".join(f"<th>{html.escape(m.task)}</th>" for m in measured)
    body = ""
    for name, cells in rows.items():
        said = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        body += f'<tr><th scope="row">{html.escape(name)}</th>{said}</tr>'
    return (
        f'<div class="wide"><table class="numbers"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _estimate(found: Interval | None, scale: float = 100, digits: int = 1) -> str:
    if found is None:
        return "-"
    mean, low, high = (f"{scale * x:.{digits}f}" for x in found)
    return f"{mean} [{low}, {high}]"


def _examples(answered: Sequence[Answered], tokenizer: PreTrainedTokenizerFast) -> str:
    parts = []
    for asked, completions, scores, answers in answered:
        for kind, wanted in {"right": scores == 1, "wrong": scores != 1}.items():
            first = [(q, int(w.argmax())) for q, w in enumerate(wanted) if w.any()][:_EXAMPLES]
            rows = ""
            for q, n in first:
                prompt = str(tokenizer.decode(asked.prompts[q].tokens, clean_up_tokenization_spaces=False))
                right = str(tokenizer.decode(asked.prompts[q].answer, skip_special_tokens=True))
                completion = completions[q][n]
                end = "" if completion.finish_reason == "stop" else " (cut off)"
                cells = [prompt, completion.text + end, answers[q][n] or "-", right, f"{scores[q, n]:.2f}"]
                said = "".join(f"<td>{_text(cell)}</td>" for cell in cells)
                rows += f'<tr><th scope="row">{html.escape(asked.places[q])}</th>{said}</tr>'
            if rows:
                head = "<th>record</th><th>prompt</th><th>said</th><th>read</th><th>the record says</th><th>score</th>"
                total = int(wanted.sum())
                parts.append(
                    f"<details open><summary>{html.escape(asked.task)}: {kind}, {len(first)} of {total} samples"
                    f"</summary><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></details>"
                )
    return "".join(parts)


def _text(text: str) -> str:
    """Escaped, its lines kept, its middle left out where it is long."""
    if len(text) > _SHOWN:
        text = text[: _SHOWN // 2] + " [...] " + text[-_SHOWN // 2 :]
    return html.escape(text).replace("\n", "<br>")
