# SPDX-License-Identifier: Apache-2.0
"""Held-out metrics of a model on disk: a finished run's, or any checkpoint under a config's tasks."""

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path

import jax

from jaxlm.config import Pretrained, RunConfig
from jaxlm.data.stream import finite_batches
from jaxlm.run import load_model, load_tokenizer, open_data
from jaxlm.train.held_out import evaluate
from jaxlm.train.mesh import check_rows, make_mesh


def evaluate_run(directory: str | Path, config: RunConfig) -> dict[str, float]:
    """Metrics of the model that a finished run left, on the held-out records of `config`.

    Args:
      directory: of the run.
      config: the run's own, or one that differs in data, batch size or mesh.
    Raises: ValueError if the run has left no model yet.
    """
    model = Path(directory) / "model"
    if not (model / "config.json").is_file():
        raise ValueError(f"{directory} has no model/ yet: finish the run, scripts/train.py {directory} goes on with it")
    return _evaluate(dataclasses.replace(config, model=_at(model, config)), directory)


def evaluate_checkpoint(path: str | Path, config: RunConfig) -> dict[str, float]:
    """Metrics of a Hugging Face folder or .gguf file on the held-out records of `config`, with the config's tokenizer.

    Rows are prepared in a folder that is gone afterwards; `config.prepared` spares that.
    """
    with tempfile.TemporaryDirectory() as folder:
        return _evaluate(dataclasses.replace(config, model=_at(Path(path), config)), folder)


def table(metrics: Mapping[str, float]) -> str:
    """Metrics as text, a row a task.

    >>> print(table({"loss": 0.5, "loss/sort": 0.5, "perplexity/sort": 1.65, "exact_match/sort": 0.25}))
    task    loss  perplexity  exact match
    sort  0.5000       1.650       25.0 %
    all   0.5000
    """
    tasks = [name.removeprefix("loss/") for name in metrics if name.startswith("loss/")]
    rows = [("task", "loss", "perplexity", "exact match")]
    for task in tasks:
        perplexity, exact = metrics[f"perplexity/{task}"], metrics[f"exact_match/{task}"]
        rows.append((task, f"{metrics[f'loss/{task}']:.4f}", f"{perplexity:.4g}".ljust(5, "0"), f"{100 * exact:.1f} %"))
    rows.append(("all", f"{metrics['loss']:.4f}", "", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _at(path: Path, config: RunConfig) -> Pretrained:
    """The checkpoint, computed as the config computes its model."""
    how = config.model
    return Pretrained(path=str(path), dtype=how.dtype, remat=how.remat, attention=how.attention)


def _evaluate(config: RunConfig, directory: str | Path) -> dict[str, float]:
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, directory=str(directory)))
    mesh = make_mesh(config.mesh)
    check_rows(mesh, config.run.batch_size)
    tokenizer = load_tokenizer(config)
    _, rows = open_data(config, tokenizer)
    model, params = load_model(config, mesh, vocabulary=rows.vocab_size)
    batches = finite_batches(
        rows,
        batch_size=config.run.batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return evaluate(model, params, batches, config.data.task_names, mesh)
