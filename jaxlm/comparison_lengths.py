# SPDX-License-Identifier: Apache-2.0
"""Models beside each other that are trained at one length and tested at longer ones, on the same tokens at each.

runs/<arm>/<rate>-<seed>/     one training run: metrics.jsonl, params.npz, and result.json when it is finished
tests/<arm>/<seed>.npz        what it said to every token at every length, and where its attention lay
"""

import dataclasses
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlm.comparison import at_rate, begin, finish, run_directory, trials
from jaxlm.config import LengthComparison, from_json, to_json
from jaxlm.data.windows import text_tokens, windows_of
from jaxlm.nn.attention_probe import look
from jaxlm.nn.axes import logical_axes
from jaxlm.nn.config import ModelConfig
from jaxlm.nn.decoder import Model, Params
from jaxlm.nn.position_kinds import Rope, YarnScaling
from jaxlm.run import load_model, load_tokenizer, make_job, open_data
from jaxlm.train.held_out import score_windows, suited
from jaxlm.train.mesh import check_rows, constrainer, make_mesh, row_devices, shardings
from jaxlm.train.reporter import RunReporter
from jaxlm.train.scores import Scores
from jaxlm.weights.names import named_leaves, path_of

LOOKED_AT = 4  # windows whose attention is looked at


class Tested(NamedTuple):
    """One trained model on the test text.

    Attributes:
      nll: length -> [windows, length] float32, nats, of the same tokens in the same order at every length.
      weight, score: [layers, heads, looked_at] float32, of `jaxlm.nn.attention_probe.look`.
    """

    nll: Mapping[int, np.ndarray]
    weight: np.ndarray
    score: np.ndarray


def compare_lengths(comparison: LengthComparison, *, part: tuple[int, int] = (0, 1)) -> None:
    """Trains and tests whatever is not finished yet.

    Args:
      part: (i, n): only every n-th arm from the i-th, so that n processes share the work; run once more to report.
    """
    shared = _Shared(comparison)
    arms = list(comparison.arms)[part[0] :: part[1]]
    for trial in trials(comparison, arms, best=lambda arm: best_rate(comparison, arm)):
        shared.train(trial.arm, trial.rate, trial.seed)
        for name in [trial.arm, *(n for n, base in comparison.yarn.items() if base == trial.arm)]:
            if trial.chosen:
                shared.test(name, trial.rate, trial.seed)


def best_rate(comparison: LengthComparison, arm: str) -> float:
    """The learning rate of an arm with the lowest held-out loss at the training length; its text is not the tested one.

    Raises: ValueError if a rate has not been tried yet.
    """
    losses = {}
    for rate in comparison.rates(arm):
        path = run_directory(comparison, arm, rate, comparison.seeds[0]) / "result.json"
        if not path.is_file():
            raise ValueError(f"arm {arm!r} has not been trained at {rate:g} yet: run the comparison to its end")
        losses[rate] = json.loads(path.read_text())["loss"]
    return min(losses, key=lambda rate: (losses[rate], rate))


def read_tested(comparison: LengthComparison, name: str, seed: int) -> Tested | None:
    """What an arm said in its test, or None where it has not been tested as the comparison now says."""
    path = path_of_test(comparison, name, seed)
    if not path.is_file():
        return None
    with np.load(path) as arrays:
        if from_json(json.loads(str(arrays["settings"]))) != settings_of(comparison, name):
            return None
        nll = {length: arrays[f"nll/{length}"] for length in comparison.lengths}
        return Tested(nll, arrays["weight"], arrays["score"])


def model_at(comparison: LengthComparison, name: str, length: int) -> ModelConfig:
    """The model that an arm is tested with at a length."""
    config = comparison.arms[comparison.yarn.get(name, name)]
    trained = comparison.lengths[0]
    if name in comparison.yarn and isinstance(config.positions, Rope) and length > trained:
        scaling = YarnScaling(factor=length / trained, original_length=trained)
        config = dataclasses.replace(config, positions=dataclasses.replace(config.positions, scaling=scaling))
    return suited(config, length)


def path_of_test(comparison: LengthComparison, name: str, seed: int) -> Path:
    """Where a test is."""
    return comparison.directory / "tests" / name / f"{seed}.npz"


def settings_of(comparison: LengthComparison, name: str) -> dict[str, Any]:
    """What decides a test, beside the training."""
    return {
        "text": comparison.text,
        "tokens": comparison.tokens,
        "lengths": list(comparison.lengths),
        "tail": comparison.tail,
        "looked_at": comparison.looked_at,
        "models": [model_at(comparison, name, length) for length in comparison.lengths],
        "rate": best_rate(comparison, comparison.yarn.get(name, name)),
    }


class _Shared:
    """What all runs use: devices, rows, the tokens to test on."""

    def __init__(self, comparison: LengthComparison):
        self.comparison = comparison
        config = comparison.run
        self.mesh = make_mesh(config.mesh)
        self.constrain = constrainer(self.mesh)  # one function: runs of equal models share their compiled steps
        check_rows(self.mesh, config.run.batch_size, config.run.micro_batches)
        tokenizer = load_tokenizer(config)
        self.train_rows, self.test_rows = open_data(config, tokenizer)
        self.tokens = text_tokens(comparison.text, tokenizer)
        windows_of(self.tokens, comparison.lengths[0], comparison.tokens)  # refuses a text that is too short, now

    def train(self, arm: str, rate: float, seed: int) -> None:
        """One training run, if it is not there yet."""
        directory = run_directory(self.comparison, arm, rate, seed)
        options = self.comparison.run.run
        options = dataclasses.replace(options, seed=seed, directory=str(directory) if options.save_every else "")
        config = dataclasses.replace(
            self.comparison.run,
            model=self.comparison.arms[arm],
            method=at_rate(self.comparison.run.method, rate),
            run=options,
        )
        if not begin(directory, config):
            return
        reporter = RunReporter(directory, options.steps, stream=io.StringIO())  # a line for each run is enough
        model, params = load_model(config, self.mesh, vocabulary=self.train_rows.vocab_size)
        model = dataclasses.replace(model, constrain=self.constrain)
        scores = Scores(None, config.data.task_names)
        job = make_job(config, self.mesh, model, params, self.train_rows, self.test_rows, reporter, scores)
        trained = config.method.run(job)
        metrics = job.evaluate(model, trained)
        reporter.evaluation(options.steps, metrics)
        reporter.close()
        arrays: dict[str, Any] = {name: np.asarray(x) for name, x in named_leaves(trained).items()}
        np.savez(directory / "params.npz", **arrays)
        result = finish(directory, loss=metrics["loss"])
        told = f"loss {metrics['loss']:.4f} at {config.data.length} tokens; {result['seconds']:.0f} s"
        print(f"{arm} at {rate:g}, seed {seed}: {told}", flush=True)

    def test(self, name: str, rate: float, seed: int) -> None:
        """One trained model at every length, if that is not there yet."""
        comparison = self.comparison
        if read_tested(comparison, name, seed) is not None:
            return
        arm = comparison.yarn.get(name, name)
        params = self._params(comparison.arms[arm], run_directory(comparison, arm, rate, seed))
        nll = {}
        for length in comparison.lengths:
            model = Model(model_at(comparison, name, length), self.constrain, row_devices(self.mesh))
            pair = windows_of(self.tokens, length, comparison.tokens)
            nll[length] = score_windows(model, params, *pair, self.mesh)
        inputs, _ = windows_of(self.tokens, comparison.looked_at, comparison.tokens)
        plain = Model(model_at(comparison, name, comparison.looked_at))
        seen = look(plain, params, inputs[:LOOKED_AT], queries=comparison.tail)
        arrays: dict[str, Any] = {f"nll/{length}": found for length, found in nll.items()}
        arrays |= {"weight": np.asarray(seen.weight), "score": np.asarray(seen.score)}
        path = path_of_test(comparison, name, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part.npz")
        np.savez(part, settings=np.array(json.dumps(to_json(settings_of(comparison, name)))), **arrays)
        part.replace(path)
        told = ", ".join(f"{length}: {np.exp(np.mean(found, dtype=np.float64)):.3f}" for length, found in nll.items())
        print(f"{name}, seed {seed}: perplexity at {told}", flush=True)

    def _params(self, config: ModelConfig, directory: Path) -> Params:
        """The trained parameters of a run, divided over the mesh."""
        shapes = jax.eval_shape(Model(config).init, jax.random.key(0))
        with np.load(directory / "params.npz") as arrays:
            whole = jax.tree.map_with_path(lambda path, _: arrays[path_of(path)], shapes)
        return jax.device_put(whole, shardings(self.mesh, logical_axes(shapes), shapes))
