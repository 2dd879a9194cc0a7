# SPDX-License-Identifier: Apache-2.0
"""What a run says: one JSON line a measurement, TensorBoard, and a progress bar, all behind one small protocol.

`metrics.jsonl` holds {"kind": "train" | "eval" | "event", "step": ..., "time": unix seconds, ...}; numbers that are not
finite stand as the strings "nan", "inf", "-inf", so that every line is valid JSON.
"""

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

import tensorboardX
from tqdm import tqdm

from jaxlm.train.throughput import Peak, memory_gib, utilisation

SPENT = "goodput"  # the event that a rewind leaves: the time of updates that are forgotten was spent all the same
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Reporter(Protocol):
    """What the loop tells; steps count updates."""

    def train(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def event(self, name: str, **fields: Any) -> None: ...
    def rewind(self, step: int) -> None: ...
    def close(self) -> None: ...


class _Silent:
    """Says nothing."""

    def train(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def event(self, name: str, **fields: Any) -> None: ...
    def rewind(self, step: int) -> None: ...
    def close(self) -> None: ...


SILENT: Reporter = _Silent()


class RunReporter:
    """Writes a run's metrics into its directory and shows them on a terminal. Make it on process 0 only.

    Args:
      directory: of the run; None or "" writes nothing and only shows.
      total_steps: updates of the whole run.
      flops_per_token: of training, forward and backward; with `peak` it turns tokens/s into `mfu`.
      peak: what all devices together could do.
      stream: where progress goes; a bar on a terminal, else one plain line a report.
    """

    def __init__(
        self,
        directory: str | Path | None,
        total_steps: int,
        *,
        flops_per_token: float | None = None,
        peak: Peak | None = None,
        stream: TextIO | None = None,
    ):
        self._directory = Path(directory) if directory else None
        self._total_steps = total_steps
        self._flops_per_token = flops_per_token
        self._peak = peak
        self._stream = sys.stderr if stream is None else stream
        self._step = 0
        self._started: tuple[int, float] | None = None  # step and clock that the time left is reckoned from
        self._evaluated: tuple[int, dict[str, float]] | None = None
        self._file: TextIO | None = None
        self._board: tensorboardX.SummaryWriter | None = None
        self._bar = None
        if self._stream.isatty():
            self._bar = tqdm(total=total_steps, unit="step", file=self._stream, dynamic_ncols=True)
        self._purge_step: int | None = None
        self._said_peak = peak is None

    def train(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of the updates since the last report, the last of them being `step`."""
        metrics = dict(metrics) | self._utilisation(metrics.get("tokens_per_second"))
        metrics.setdefault("memory_gib", memory_gib())
        self._write("train", step, metrics)
        self._show(step, metrics)

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of held-out records after `step` updates; the same said twice is told once."""
        if self._evaluated == (step, dict(metrics)):
            return
        self._evaluated = (step, dict(metrics))
        self._write("eval", step, metrics)
        tasks = [name.partition("/")[2] for name in metrics if name.startswith("loss/")]
        each = [f"{task} {_short(metrics[f'loss/{task}'])}{_exact(metrics, task)}" for task in tasks]
        self._say(f"held out at step {step}: " + ", ".join([f"loss {_short(metrics.get('loss', math.nan))}", *each]))

    def event(self, name: str, **fields: Any) -> None:
        """Something that happened: a start, a save, a refusal. `step` may be among the fields."""
        self._write("event", fields.pop("step", self._step), {"name": name} | fields)

    def rewind(self, step: int) -> None:
        """Forgets what was reported after `step`: the run goes on from there. -1 forgets everything.

        What the run has spent stays: events named "goodput".
        """
        if self._directory is not None:
            self._close_files()
            _cut(self._directory / "metrics.jsonl", step)
            self._purge_step = step + 1
        self._step = max(step, 0)
        self._started = None
        if self._bar is not None:
            self._bar.initial = self._bar.n = self._step
            self._bar.refresh()

    def close(self) -> None:
        """Flushes and ends; to call it twice does no harm."""
        self._close_files()
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _open(self, directory: Path) -> tuple[TextIO, tensorboardX.SummaryWriter]:
        """The files, opened when there is something to write."""
        if self._file is None or self._board is None:
            directory.mkdir(parents=True, exist_ok=True)
            self._file = (directory / "metrics.jsonl").open("a")
            # TensorBoard's files only grow; the purge mark tells it what to forget. Names must differ within a second.
            self._board = tensorboardX.SummaryWriter(
                str(directory / "tensorboard"), purge_step=self._purge_step, filename_suffix=f".{time.time_ns()}"
            )
        return self._file, self._board

    def _close_files(self) -> None:
        if self._file is not None and self._board is not None:
            self._file.close()
            self._board.close()
        self._file = self._board = None

    def _utilisation(self, tokens_per_second: float | None) -> dict[str, float]:
        """MFU, where it can be reckoned. A share above the peak is reported as an event: it must not end the run."""
        if self._flops_per_token is None or self._peak is None or tokens_per_second is None:
            return {}
        try:
            return {"mfu": utilisation(self._flops_per_token * tokens_per_second, self._peak)}
        except ValueError as error:
            self.event("error", message=str(error))
            self._say(str(error))
            return {"mfu": math.nan}

    def _write(self, kind: str, step: int, fields: Mapping[str, Any]) -> None:
        self._step = int(step)
        if self._directory is None:
            return
        if not self._said_peak and self._peak is not None:
            self._said_peak = True
            self.event(
                "start",
                step=0,
                peak=self._peak.name,
                flops="forward and backward of the model, attention counted causal",
            )
            self._step = int(step)
        file, board = self._open(self._directory)
        line = {"kind": kind, "step": self._step, "time": round(time.time(), 3)}
        file.write(json.dumps(line | {key: _plain(value) for key, value in fields.items()}) + "\n")
        file.flush()
        if kind != "event":
            for name, value in fields.items():
                if math.isfinite(value):
                    board.add_scalar(f"{kind}/{name}", float(value), self._step)

    def _show(self, step: int, metrics: Mapping[str, float]) -> None:
        parts = [f"loss {_short(metrics['loss'])}"] if "loss" in metrics else []
        if "tokens_per_second" in metrics:
            parts.append(f"{_short(metrics['tokens_per_second'])} tokens/s")
        if "mfu" in metrics and self._peak is not None:
            parts.append(f"MFU {100 * metrics['mfu']:.1f} % of {self._peak.name}")
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(parts), refresh=False)
            self._bar.update(step - self._bar.n)
            return
        if self._started is None:
            self._started = (step, time.monotonic())  # only now: the first update waited for its compilation
        elif step > self._started[0]:
            first, since = self._started
            seconds = (time.monotonic() - since) / (step - first) * max(self._total_steps - step, 0)
            parts.append(f"{tqdm.format_interval(seconds)} left")
        self._say(f"step {step}/{self._total_steps}: " + ", ".join(parts))

    def _say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)


def read_metrics(directory: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`, with numbers for "nan" and "inf"; a last line cut short is left out.

    Raises: ValueError if there is no such file, or a line before the last is broken.
    """
    path = Path(directory) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{directory} is no run directory: it has no metrics.jsonl")
    return [{key: _NOT_FINITE.get(v, v) if isinstance(v, str) else v for key, v in x.items()} for x in _lines(path)]


def _lines(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines(keepends=True)
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path}:{number} is not a line of JSON: {line[:80]!r}") from error
    return found


def _cut(path: Path, step: int) -> None:
    """Removes the lines after `step` but those of time that was spent, in one piece or not at all."""
    if not path.is_file():
        return
    part = path.with_suffix(".part")
    kept = [line for line in _lines(path) if line["step"] <= step or (step >= 0 and line.get("name") == SPENT)]
    part.write_text("".join(json.dumps(line) + "\n" for line in kept))
    part.replace(path)


def _plain(value: Any) -> Any:
    """A JSON value; arrays of one number become numbers."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(inner) for inner in value]
    if isinstance(value, Path):
        return str(value)
    number = value.item() if hasattr(value, "item") else float(value)
    return number if not isinstance(number, float) or math.isfinite(number) else str(number)


def _short(value: float) -> str:
    """A number for people: four digits, thousands as k.

    >>> _short(12345.6), _short(0.123456)
    ('12.35k', '0.1235')
    """
    return f"{value / 1000:.4g}k" if abs(value) >= 10_000 else f"{value:.4g}"


def _exact(metrics: Mapping[str, float], task: str) -> str:
    """Shares of exact rows and of right answers, where there are any."""
    named = {"exact": metrics.get(f"exact_match/{task}"), "of answers right": metrics.get(f"accuracy/{task}")}
    told = ", ".join(f"{100 * value:.0f} % {name}" for name, value in named.items() if value is not None)
    return f" ({told})" if told else ""
