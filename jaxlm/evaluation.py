# SPDX-License-Identifier: Apache-2.0
"""Held-out metrics of a model on disk: a finished run's, or any checkpoint under a config's tasks."""

import contextlib
import dataclasses
import difflib
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlm.config import Pretrained, RunConfig, to_json
from jaxlm.data.stream import finite_batches
from jaxlm.data.windows import text_tokens, windows_of
from jaxlm.evaluation_metrics import Measured, as_json, measure, overall
from jaxlm.evaluation_page import write_answers_page
from jaxlm.evaluation_samples import write_samples
from jaxlm.nn.decoder import Model, Params
from jaxlm.resampling import Interval
from jaxlm.rewards.choices import MultipleChoice
from jaxlm.rewards.matching import ExactMatch, NormalisedMatch
from jaxlm.rewards.mathematics import MathMatch
from jaxlm.rewards.numeric import NumericMatch
from jaxlm.run import answerer, load_model, load_tokenizer, open_data
from jaxlm.train.feeding import own_rows
from jaxlm.train.held_out import evaluate, score_windows, suited
from jaxlm.train.mesh import check_length, check_rows, make_mesh

TAIL = 128  # predictions at the end of a window, which have the most context
VERIFIERS: Mapping[str, Callable[[], Any]] = {
    "ExactMatch": ExactMatch,
    "MathMatch": MathMatch,
    "MultipleChoice": MultipleChoice,
    "NormalisedMatch": NormalisedMatch,
    "NumericMatch": NumericMatch,
}


def evaluate_run(directory: str | Path, config: RunConfig, *, lengths: Sequence[int] = ()) -> dict[str, float]:
    """Metrics of the model that a finished run left, on the held-out records of `config`.

    Args:
      directory: of the run.
      config: the run's own, or one that differs in data, batch size or mesh.
      lengths: of windows over each task's held-out records, one after the other: adds "perplexity/<task>@<length>" and
        "tail_perplexity/<task>@<length>", of all predictions and of the last `TAIL` of each window. The same tokens are
        predicted at every length.
    Raises: ValueError if the run has left no model yet.
    """
    return _evaluate(_of_run(directory, config), lengths)


def evaluate_checkpoint(path: str | Path, config: RunConfig, *, lengths: Sequence[int] = ()) -> dict[str, float]:
    """Metrics of a Hugging Face folder or .gguf file on the held-out records of `config`, with the config's tokenizer.

    Rows are prepared in a folder that is gone afterwards; `config.prepared` spares that. `lengths`: see `evaluate_run`.
    """
    with _of_checkpoint(path, config) as config:
        return _evaluate(config, lengths)


class Generated(NamedTuple):
    """What a model's own answers come to.

    Attributes:
      tasks: the numbers of each.
      accuracy: over the records of all tasks.
      value: all of it as JSON, with how it was made.
    """

    tasks: Sequence[Measured]
    accuracy: Interval
    value: dict[str, Any]


def judged_by(config: RunConfig, verifiers: Sequence[str]) -> RunConfig:
    """The config with these verifiers, each with its default options.

    Args:
      config: with a `generation`.
      verifiers: "NumericMatch" for all tasks, "task=NumericMatch" for one; later ones win.
    Raises: ValueError for an unknown task or verifier.
    """
    generation = config.generation
    if generation is None:
        raise ValueError("the config does not say how records are answered: set generation=Generation")
    chosen: dict[str, Any] = dict(generation.verifiers)
    for text in verifiers:
        task, _, name = text.rpartition("=")
        if name not in VERIFIERS:
            near = difflib.get_close_matches(name, VERIFIERS, 1) or [", ".join(VERIFIERS)]
            raise ValueError(f"no verifier {name!r}; did you mean {near[0]}? One with options stands in a config")
        chosen |= dict.fromkeys([task] if task else generation.tasks or config.data.task_names, VERIFIERS[name]())
    return dataclasses.replace(config, generation=dataclasses.replace(generation, verifiers=chosen))


def generate_run(directory: str | Path, config: RunConfig, *, out: str | Path | None = None) -> Generated:
    """The model that a finished run left answers the held-out records of `config`, and is judged.

    Args:
      directory: of the run.
      config: the run's own, or one that differs in data, mesh or `generation`, which says how.
      out: a folder for `samples.jsonl` (a line a sample), `evaluation.json` and `report.html`; None writes nothing.
    Raises: ValueError if the run has left no model yet, for a config without `generation`, and as `read_questions`.
    """
    return _generate(_of_run(directory, config), out)


def generate_checkpoint(path: str | Path, config: RunConfig, *, out: str | Path | None = None) -> Generated:
    """The same of a Hugging Face folder or .gguf file: see `generate_run` and `evaluate_checkpoint`."""
    with _of_checkpoint(path, config) as config:
        return _generate(config, out)


def table(metrics: Mapping[str, float]) -> str:
    """Metrics as text, a row a task.

    >>> print(table({"loss": 0.5, "loss/sort": 0.5, "perplexity/sort": 1.65, "exact_match/sort": 0.25}))
    task    loss  perplexity  exact match
    sort  0.5000        1.65       25.0 %
    all   0.5000
    """
    rows: list[Sequence[str]] = [("task", "loss", "perplexity", "exact match")]
    for task in _tasks(metrics):
        exact = _percent(metrics[f"exact_match/{task}"])
        rows.append((task, f"{metrics[f'loss/{task}']:.4f}", f"{metrics[f'perplexity/{task}']:.4g}", exact))
    return _aligned([*rows, ("all", f"{metrics['loss']:.4f}", "", "")])


def length_table(metrics: Mapping[str, float]) -> str:
    """Perplexity by length as text, a row a task and length; empty where nothing was measured.

    >>> print(length_table({"perplexity/text@256": 4.0, "tail_perplexity/text@256": 4.5}))
    task  tokens  perplexity  tail
    text     256           4   4.5
    """
    rows: list[Sequence[str]] = [("task", "tokens", "perplexity", "tail")]
    for name, value in metrics.items():
        task, at, length = name.removeprefix("perplexity/").rpartition("@")
        if at and name.startswith("perplexity/"):
            rows.append((task, length, f"{value:.4g}", f"{metrics[f'tail_{name}']:.4g}"))
    return _aligned(rows) if len(rows) > 1 else ""


def comparison(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """What a run changed, as text, a row a task; where the model answered by itself, also how often it was right.

    >>> before = {"loss": 2.0, "loss/sort": 2.0, "exact_match/sort": 0.0}
    >>> print(comparison(before, {"loss": 0.5, "loss/sort": 0.5, "exact_match/sort": 0.25}))
    task  loss before   after  exact before   after
    sort       2.0000  0.5000         0.0 %  25.0 %
    all        2.0000  0.5000
    >>> print(comparison(before | {"accuracy/sort": 0.0}, before | {"accuracy/sort": 0.75}))
    task  loss before   after  exact before  after  answers right before   after
    sort       2.0000  2.0000         0.0 %  0.0 %                 0.0 %  75.0 %
    all        2.0000  2.0000
    """
    rows: list[Sequence[str]] = [("task", "loss before", "after", "exact before", "after")]
    shares = ["exact_match"]
    if any(name.startswith("accuracy/") for name in after):
        shares.append("accuracy")
        rows = [(*rows[0], "answers right before", "after")]
    for task in _tasks(after):
        losses = [f"{metrics[f'loss/{task}']:.4f}" for metrics in (before, after)]
        found = [(metrics, f"{name}/{task}") for name in shares for metrics in (before, after)]
        rows.append((task, *losses, *(_percent(m[name]) if name in m else "" for m, name in found)))
    return _aligned([*rows, ("all", f"{before['loss']:.4f}", f"{after['loss']:.4f}", *[""] * (2 * len(shares)))])


def answers_table(found: Generated) -> str:
    """Generated answers as text, a row a task; shares in per cent, after accuracy its 95 % interval."""
    ks = list(found.tasks[0].pass_at)
    names = ["task", "records", "accuracy", "95 %", *(f"pass@{k}" for k in ks), *(f"majority@{k}" for k in ks)]
    rows: list[Sequence[str]] = [[*names, "score", "cut off", "tokens", "cal. error", "Brier"]]
    for m in found.tasks:
        counted = [_share(e) for e in m.pass_at.values()] + [_share(m.majority_at.get(k)) for k in ks]
        row = [m.task, str(m.questions), _share(m.accuracy), _between(m.accuracy), *counted, f"{m.score.mean:.3f}"]
        row += [f"{100 * m.cut_off:.1f}", f"{m.tokens:.1f}"]
        known = m.calibration
        rows.append([*row, *(["-", "-"] if known is None else [f"{x.mean:.3f}" for x in (known.error, known.brier)])])
    all_ = ["all", str(sum(m.questions for m in found.tasks)), _share(found.accuracy), _between(found.accuracy)]
    return _aligned([*rows, all_ + [""] * (len(rows[0]) - len(all_))])


def _share(found: Interval | None) -> str:
    return "-" if found is None else f"{100 * found.mean:.1f}"


def _between(found: Interval) -> str:
    return f"{100 * found.low:.1f} to {100 * found.high:.1f}"


def _tasks(metrics: Mapping[str, float]) -> list[str]:
    return [name.removeprefix("loss/") for name in metrics if name.startswith("loss/")]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns of one width; names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *numbers in rows:
        cells = [text.rjust(width) for text, width in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def _at(path: Path, config: RunConfig) -> Pretrained:
    """The checkpoint, computed as the config computes its model."""
    how = config.model
    return Pretrained(path=str(path), dtype=how.dtype, remat=how.remat, attention=how.attention)


def _of_run(directory: str | Path, config: RunConfig) -> RunConfig:
    """The config whose model is the one that the run left."""
    model = Path(directory) / "model"
    if not (model / "config.json").is_file():
        raise ValueError(f"{directory} has no model/ yet: finish the run, scripts/train.py {directory} goes on with it")
    return _placed(dataclasses.replace(config, model=_at(model, config)), directory)


@contextlib.contextmanager
def _of_checkpoint(path: str | Path, config: RunConfig) -> Iterator[RunConfig]:
    """The config whose model is this one, and whose directory is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        yield _placed(dataclasses.replace(config, model=_at(Path(path), config)), folder)


def _placed(config: RunConfig, directory: str | Path) -> RunConfig:
    return dataclasses.replace(config, run=dataclasses.replace(config.run, directory=str(directory)))


def _generate(config: RunConfig, out: str | Path | None) -> Generated:
    generation = config.generation
    if generation is None:
        raise ValueError("the config does not say how records are answered: set generation=Generation")
    mesh = make_mesh(config.mesh)
    tokenizer = load_tokenizer(config)
    _, rows = open_data(config, tokenizer)
    model, params = load_model(config, mesh, vocabulary=rows.vocab_size)
    answered = answerer(config, model, rows)(model, params)
    measured = [measure(task, generation.counted) for task in answered]
    path = config.model.path if isinstance(config.model, Pretrained) else ""
    value = {"model": path, "generation": to_json(generation), "accuracy": overall(answered)._asdict()}
    found = Generated(measured, overall(answered), value | {"tasks": {m.task: as_json(m) for m in measured}})
    if out is not None:
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        write_samples(folder / "samples.jsonl", answered, tokenizer)
        part = folder / "evaluation.json.part"
        part.write_text(json.dumps(found.value, indent=1) + "\n")
        part.replace(folder / "evaluation.json")
        facts = {"model": path, "sampling": str(generation.sampling).removeprefix("Sampling")[1:-1]}
        write_answers_page(folder / "report.html", f"Answers of {path}", facts, measured, answered, tokenizer)
    return found


def _evaluate(config: RunConfig, lengths: Sequence[int]) -> dict[str, float]:
    mesh = make_mesh(config.mesh)
    check_rows(mesh, config.run.batch_size)
    check_length(mesh, config.data.length)
    tokenizer = load_tokenizer(config)
    _, rows = open_data(config, tokenizer)
    model, params = load_model(config, mesh, vocabulary=rows.vocab_size)
    batches = finite_batches(
        rows,
        batch_size=config.run.batch_size,
        part=own_rows(mesh, config.run.batch_size),
    )
    metrics = evaluate(model, params, batches, config.data.task_names, mesh)
    for task in config.data.tasks if lengths else ():
        if task.test is not None:
            found = _by_length(model, params, text_tokens(task.test, tokenizer), lengths, mesh)
            metrics |= {f"{kind}/{task.name}@{length}": value for (kind, length), value in found.items()}
    return metrics


def _by_length(
    model: Model, params: Params, tokens: np.ndarray, lengths: Sequence[int], mesh: jax.sharding.Mesh
) -> dict[tuple[str, int], float]:
    """Perplexity of all predictions and of the last of each window, the same tokens at every length."""
    step = math.lcm(*lengths)
    count = (len(tokens) - 1) // step * step
    if not count:
        raise ValueError(
            f"windows of {', '.join(map(str, lengths))} need {step + 1} held-out tokens to predict the same ones, "
            f"there are {len(tokens)}: give shorter ones, each a multiple of the next"
        )
    found = {}
    for length in lengths:
        suiting = dataclasses.replace(model, config=suited(model.config, length))
        nll = score_windows(suiting, params, *windows_of(tokens, length, count), mesh)
        found["perplexity", length] = float(np.exp(nll.mean(dtype=np.float64)))
        found["tail_perplexity", length] = float(np.exp(nll[:, -TAIL:].mean(dtype=np.float64)))
    return found
