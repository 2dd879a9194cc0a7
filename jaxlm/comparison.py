# SPDX-License-Identifier: Apache-2.0
"""Methods beside each other: same model, records and updates, each at its own best learning rate, over several seeds.

A comparison lives in a directory and goes on where it was stopped:

base/                             the run whose model all arms start from
runs/<arm>/<rate>-<seed>/         metrics.jsonl and scores.npz of one training run; result.json when it is finished
"""

import dataclasses
import io
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.config import (
    ALONE,
    AnyComparison,
    Comparison,
    LengthComparison,
    Pretrained,
    RunConfig,
    diff,
    read_config,
    write_config,
)
from jaxlm.run import load_model, load_tokenizer, make_job, open_data, run, score_after, total_steps
from jaxlm.train.continual import continual_metrics
from jaxlm.train.held_out import Items, score_items
from jaxlm.train.mesh import check_rows, make_mesh
from jaxlm.train.options import AdamW
from jaxlm.train.reporter import RunReporter, read_metrics
from jaxlm.train.scores import Scores


class Trained(NamedTuple):
    """One finished training run: its scores, and what it cost in all and in updates."""

    arm: str
    rate: float
    seed: int
    scores: Scores
    trained_tokens: int
    tokens: int
    seconds: float


class Trial(NamedTuple):
    """One training run of a comparison; `chosen`: at the arm's best rate, so that it is one of those reported."""

    arm: str
    rate: float
    seed: int
    chosen: bool


def compare(comparison: Comparison, *, part: tuple[int, int] = (0, 1)) -> None:
    """Trains whatever is not finished yet.

    Args:
      part: (i, n): only every n-th arm from the i-th, so that n processes share the work; run once more to report.
    """
    shared = _Shared(comparison)
    arms = list(comparison.methods())[part[0] :: part[1]]
    for trial in trials(comparison, arms, best=lambda arm: best_rate(comparison, arm)):
        shared.train(trial.arm, trial.rate, trial.seed)


def trials(
    comparison: Comparison | LengthComparison, arms: Sequence[str], *, best: Callable[[str], float]
) -> Iterator[Trial]:
    """What to train, in this order; some come twice: at first to choose a rate, then as chosen.

    Every arm at each of its rates with the first seed, and the best of them again; then seed after seed every arm at
    its best, so that what is there early compares all arms.

    Args:
      best: the rate to keep of an arm whose rates have been trained; called when they have.
    """
    for arm in arms:
        for rate in comparison.rates(arm):
            yield Trial(arm, rate, comparison.seeds[0], chosen=False)
        yield Trial(arm, best(arm), comparison.seeds[0], chosen=True)
    for seed in comparison.seeds[1:]:
        for arm in arms:
            yield Trial(arm, best(arm), seed, chosen=True)


def best_rate(comparison: Comparison, arm: str) -> float:
    """The learning rate of an arm with the best final accuracy on the even records of the tasks it is trained on.

    Raises: ValueError if a rate has not been tried yet.
    """
    finals = {}
    for rate in comparison.rates(arm):
        found = read_trained(comparison, arm, rate, comparison.seeds[0])
        if found is None:
            raise ValueError(f"arm {arm!r} has not been trained at {rate:g} yet: run the comparison to its end")
        finals[rate] = continual_metrics(found.scores.matrix("accuracy", items="even"))["final"]
    return max(finals, key=lambda rate: (finals[rate], -rate))


def read_trained(comparison: Comparison, arm: str, rate: float, seed: int) -> Trained | None:
    """A finished run, or None."""
    directory = run_directory(comparison, arm, rate, seed)
    if not (directory / "result.json").is_file():
        return None
    result = json.loads((directory / "result.json").read_text())
    return Trained(arm, rate, seed, Scores.read(directory), **result)


def run_directory(comparison: AnyComparison, arm: str, rate: float, seed: int) -> Path:
    """Where one training run is."""
    return comparison.directory / "runs" / arm / f"{rate:.3g}-{seed}"


def unfinished(arms: Iterable[str], seeds: Mapping[str, int], every: int) -> list[str]:
    """What a table must name as missing: `seeds` has the number of finished seeds of each arm that it shows.

    >>> unfinished(["plain", "held", "drawn"], {"plain": 3, "held": 1}, every=3)
    ['drawn', 'held (1 of 3 seeds)']
    """
    missing = [name for name in arms if name not in seeds]
    return missing + [f"{name} ({count} of {every} seeds)" for name, count in seeds.items() if count < every]


class _Shared:
    """What all runs use: devices, rows, the model they start from, the scores before training."""

    def __init__(self, comparison: Comparison):
        self.comparison = comparison
        config = comparison.run
        if comparison.base is not None:
            model = comparison.directory / "base" / "model"
            if not (model / "config.json").is_file():
                options = dataclasses.replace(comparison.base.run, directory=str(comparison.directory / "base"))
                run(dataclasses.replace(comparison.base, run=options))
            config = dataclasses.replace(config, model=Pretrained(path=str(model)))
        self.config = config
        self.mesh = make_mesh(config.mesh)
        check_rows(self.mesh, config.run.batch_size, config.run.micro_batches)
        self.train_rows, self.test_rows = open_data(config, load_tokenizer(config))
        self.model, self.params = load_model(config, self.mesh, vocabulary=self.train_rows.vocab_size)
        self.before: Items | None = None

    def train(self, arm: str, rate: float, seed: int) -> None:
        """One run, if it is not there yet."""
        directory = run_directory(self.comparison, arm, rate, seed)
        options = self.config.run
        method = at_rate(self.comparison.methods()[arm], rate)
        steps = options.steps // len(self.comparison.trained) if arm.startswith(ALONE) else options.steps
        options = dataclasses.replace(
            options, seed=seed, steps=steps, directory=str(directory) if options.save_every else ""
        )
        config = dataclasses.replace(self.config, method=method, run=options)
        if not begin(directory, config):
            return
        total = total_steps(method, steps, len(self.comparison.trained))
        said = io.StringIO()  # a line for each run is enough
        reporter = RunReporter(directory, total, stream=said)
        scores = Scores(directory, config.data.task_names)
        job = make_job(config, self.mesh, self.model, self.params, self.train_rows, self.test_rows, reporter, scores)
        if arm.startswith(ALONE):
            task = arm.partition("/")[2]
            everything = job.batches
            job = dataclasses.replace(job, rows={task: job.rows[task]}, batches=lambda: everything(tasks=[task]))
        if self.before is None:
            self.before = score_items(self.model, self.params, job.held_out(), mesh=self.mesh)
        scores.record("before", self.before)
        trained = method.run(job)
        score_after(job, trained, steps=total)
        reporter.close()
        result = finish(directory)
        numbers = continual_metrics(scores.matrix("accuracy"))
        told = ", ".join(f"{name} {numbers[name]:.3f}" for name in ("final", "backward_transfer", "base_drop"))
        print(f"{arm} at {rate:g}, seed {seed}: {told}; {result['seconds']:.0f} s", flush=True)


def begin(directory: Path, config: RunConfig) -> bool:
    """Makes the directory of a training run ready; False if it holds the finished run already.

    Raises: ValueError if the directory holds a run of another config: arms of one table share everything else.
    """
    if (directory / "config.json").is_file():
        changed = diff(read_config(directory), config)
        if changed:
            name, (before, now) = next(iter(changed.items()))
            raise ValueError(
                f"{directory} was trained with {name} {before!r}, the comparison now says {now!r}: set "
                "run.run.directory to another one, or remove those runs"
            )
    if (directory / "result.json").is_file():
        return False
    if not config.run.save_every:  # runs so short that a killed one begins anew
        shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True, exist_ok=True)
    write_config(directory, config)
    return True


def finish(directory: Path, **found: float) -> dict[str, float]:
    """Writes what a run cost, and what it found, to `result.json`, which marks it as finished."""
    lines = read_metrics(directory)
    stages = [line for line in lines if line.get("name") == "stage"]
    result = {
        "trained_tokens": sum(stage["trained_tokens"] for stage in stages),
        "tokens": sum(stage["tokens"] for stage in stages),
        "seconds": lines[-1]["time"] - lines[0]["time"],
        **found,
    }
    shutil.rmtree(directory / "checkpoints", ignore_errors=True)
    shutil.rmtree(directory / "kept", ignore_errors=True)
    part = directory / "result.json.part"
    part.write_text(json.dumps(result) + "\n")
    part.replace(directory / "result.json")
    return result


def at_rate(method: Any, rate: float) -> Any:
    """A method whose optimizer has that peak learning rate, however deep it lies.

    Raises: ValueError for a method without an AdamW in it.
    """
    changed, found = _at_rate(method, rate)
    if not found:
        raise ValueError(f"{type(method).__name__} has no AdamW whose learning rate could be chosen")
    return changed


def _at_rate(value: Any, rate: float) -> tuple[Any, bool]:
    if isinstance(value, AdamW):
        return dataclasses.replace(value, learning_rate=rate), True
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value, False
    changed = {f.name: _at_rate(getattr(value, f.name), rate) for f in dataclasses.fields(value) if f.init}
    found = {name: new for name, (new, inside) in changed.items() if inside}
    return dataclasses.replace(value, **found), bool(found)
