# SPDX-License-Identifier: Apache-2.0
"""From a config to a finished run: data, model, method, checkpoint folder, report."""

import json
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from jaxlm import checkpoints
from jaxlm.config import Pretrained, RunConfig, claim_directory
from jaxlm.config import flat as flat_config
from jaxlm.data.preparation import prepare
from jaxlm.data.prepared import Prepared, open_prepared
from jaxlm.data.sources import Records
from jaxlm.data.stream import BatchStream, batches, finite_batches
from jaxlm.data.tokenizers import byte_tokenizer, digest
from jaxlm.evaluation_metrics import flat, measure
from jaxlm.evaluation_samples import Answered, answer, end_tokens, read_questions
from jaxlm.generate.from_disk import stop_tokens
from jaxlm.generate.sampler import Sampler
from jaxlm.nn.axes import logical_axes
from jaxlm.nn.decoder import Model
from jaxlm.nn.flops import model_flops
from jaxlm.train.agreement import agree, facts, summary_page, together
from jaxlm.train.feeding import own_rows
from jaxlm.train.goodput import Goodput, add_lives
from jaxlm.train.job import Job
from jaxlm.train.launch import keep_programs
from jaxlm.train.mesh import check_length, check_rows, constrainer, loss_groups, make_mesh, shardings
from jaxlm.train.page import write_page
from jaxlm.train.phase import Params
from jaxlm.train.pieces import make_pieces
from jaxlm.train.profiling import read_window
from jaxlm.train.reporter import SILENT, Reporter, RunReporter, read_metrics
from jaxlm.train.scores import Scores
from jaxlm.train.throughput import peak
from jaxlm.train.watchdog import watching

_DECIDE_ROWS = ("length", "packing", "prompts", "on_bad", "on_long")  # fields of DataConfig; sources may be elsewhere


class Result(NamedTuple):
    """What a run leaves in memory; the directory holds the rest.

    Attributes:
      model: as configured; its activations may lie anywhere.
      params: after the method's last phase.
      before: held-out metrics of the parameters that came in, by name such as "loss/sort".
      after: the same of `params`.
      goodput: where the wall time went, in this life of the run and in those before that `metrics.jsonl` knows.
    """

    model: Model
    params: Params
    before: Mapping[str, float]
    after: Mapping[str, float]
    goodput: Goodput | None = None


def run(config: RunConfig, *, began: float | None = None) -> Result:
    """Runs a config from its data to its report; with the directory of an interrupted run it goes on with that run.

    The run directory then holds `config.json`, `metrics.jsonl`, TensorBoard files, `checkpoints/`, the prepared data,
    `summary.json` (held-out metrics before and after), `model/` (a Hugging Face folder) and `report.html`.

    Args:
      config: the run.
      began: `time.perf_counter()` when the script began, so that its imports are part of what the run spends.
    Raises: ValueError for anything in the config that cannot work, before anything is compiled;
      `jaxlm.train.Preempted` after a SIGTERM, with the state saved.
    """
    began = time.perf_counter() if began is None else began
    if config.run.compile_cache:
        keep_programs(config.run.compile_cache)
    hosts = agree(
        facts() | {f"config {path}": value for path, value in flat_config(config).items()},
        remedy="Install the same code everywhere, start every process with the same arguments, and use equal hosts",
    )
    read_window(config.run.profile, directory=config.run.directory, last=_total(config))
    directory = pathlib.Path(config.run.directory) if config.run.directory else None
    first = jax.process_index() == 0
    if directory is not None:
        together("claiming run.directory", lambda: claim_directory(config, write=first))
    mesh = make_mesh(config.mesh)
    check_rows(mesh, config.run.batch_size, config.run.micro_batches)
    check_length(mesh, config.data.length)
    reason = getattr(config.method, "whole_rows", "")
    if reason and mesh.shape["sequence"] > 1:
        raise ValueError(
            f"{type(config.method).__name__} cannot divide the tokens of rows, {reason}: set mesh.sequence=1"
        )
    if first and len(hosts) > 1:
        print(summary_page(mesh, config.run, hosts), flush=True)
    with watching(directory, config.run.step_timeout, began) as watch:
        return _run(config, mesh, directory, watch)


def _run(config: RunConfig, mesh: Mesh, directory: pathlib.Path | None, watch: Any) -> Result:
    """What `run` does once all processes are one."""
    first = jax.process_index() == 0
    watch.at("prepare")
    tokenizer = load_tokenizer(config)
    train_rows, test_rows = together("opening the data", lambda: open_data(config, tokenizer))
    agree(
        {"training data": train_rows.key, "held-out data": test_rows.key},
        remedy="Copy the same source files and the same tokenizer to every host, or prepare once and set prepared=",
    )
    model, params = load_model(config, mesh, vocabulary=train_rows.vocab_size)
    if first:
        print(train_rows.summary(), flush=True)
    total = _total(config)
    reporter = _reporter(config, model, total) if first else SILENT
    scores = Scores(directory, config.data.task_names)
    job = make_job(config, mesh, model, params, train_rows, test_rows, reporter, scores)
    try:
        summary = _read_summary(directory)
        watch.at("evaluate")
        if "before" not in summary:
            summary = {"before": job.score("before", model, params, step=0)}
            _write_summary(directory, summary, write=first)
        trained = config.method.run(job)
        watch.at("evaluate")
        if summary.get("steps") != config.run.steps:
            summary |= {"after": score_after(job, trained, steps=total), "steps": config.run.steps}
            _write_summary(directory, summary, write=first)
        watch.at("export")
        if directory is not None:
            _export(directory / "model", model, trained, tokenizer, config.method, write=first)
        spent = {"name": "goodput", "step": total} | watch.clock.record()
        reporter.event(**spent)
    finally:
        reporter.close()
    if directory is not None and first:
        write_page([directory], directory / "report.html")
    lives = read_metrics(directory) if directory is not None and first else [spent]
    return Result(Model(model.config), trained, summary["before"], summary["after"], add_lives(lives))


def make_job(
    config: RunConfig,
    mesh: Mesh,
    model: Model,
    params: Params,
    train_rows: Prepared,
    test_rows: Prepared,
    reporter: Reporter,
    scores: Scores,
) -> Job:
    """What the config's method is handed: its data as streams, its model, its means to train and to report."""

    def part(size: int) -> np.ndarray | None:
        return own_rows(mesh, size) if jax.process_count() > 1 else None

    def stream(
        tasks: Sequence[str] | None = None, weights: Mapping[str, float] | None = None, rows: int = 0, whole=False
    ) -> BatchStream:
        size = rows or config.run.batch_size
        return batches(
            train_rows,
            batch_size=size,
            seed=config.run.seed,
            tasks=tasks,
            weights=config.data.weights if weights is None else weights,
            part=None if whole else part(size),
        )

    return Job(
        model=model,
        params=params,
        task_names=config.data.task_names,
        options=config.run,
        mesh=mesh,
        batches=stream,
        held_out=lambda: finite_batches(test_rows, batch_size=config.run.batch_size, part=part(config.run.batch_size)),
        reporter=reporter,
        describe=train_rows.describe,
        rows={name: train_rows.num_rows(name) for name in config.data.task_names if train_rows.num_rows(name)},
        scores=scores,
        tokenizer=lambda: load_tokenizer(config),
        record=Records([task.train for task in config.data.tasks]),
        generated=_generated(config, model, test_rows),
    )


def answerer(config: RunConfig, model: Model, rows: Prepared) -> Callable[[Model, Params], list[Answered]]:
    """The held-out questions of `config.generation`, checked, waiting for parameters that answer them.

    Args:
      config: with a `generation`.
      model: decides how long a prompt may be.
      rows: the held-out split.
    Returns: `(model, params) -> answers` of each task. The parameters are used where they lie and stay as they are.
    Raises: ValueError, as `read_questions`; for several processes.
    """
    generation = config.generation
    assert generation is not None
    if jax.process_count() > 1:
        raise ValueError(
            "records are answered by one process: run it on the devices of one host, or set generation=none and "
            "call scripts/evaluate.py --generate afterwards"
        )
    questions = read_questions(rows, config.data.tasks, generation, size=model.config.max_length)
    tokenizer = load_tokenizer(config)
    stops = end_tokens(questions, tokenizer)
    if isinstance(config.model, Pretrained):
        stops += stop_tokens(pathlib.Path(config.model.path))

    def answers(model: Model, params: Params) -> list[Answered]:
        bare: Any = Model(model.config)  # activations lie where the parameters put them
        if hasattr(config.method, "speaker"):
            bare = config.method.speaker(bare, params, tokenizer)
        sampler = Sampler(bare, params, tokenizer, slots=generation.slots, stop_tokens=stops)
        return [answer(sampler, asked, generation) for asked in questions]

    return answers


def _generated(config: RunConfig, model: Model, rows: Prepared) -> Callable[[Model, Params], dict[str, float]] | None:
    """Metrics of answers, without intervals: what a run reports on its way."""
    if config.generation is None:
        return None
    answers, ks = answerer(config, model, rows), config.generation.counted
    return lambda model, params: flat([measure(a, ks, resamples=1) for a in answers(model, params)])


def load_tokenizer(config: RunConfig) -> PreTrainedTokenizerFast:
    """The tokenizer that a config names: "bytes", a folder or .gguf file, or the pretrained model's own."""
    if config.tokenizer == "bytes":
        return byte_tokenizer()
    path = config.tokenizer or (config.model.path if isinstance(config.model, Pretrained) else "")
    return checkpoints.load_tokenizer(path)


def open_data(config: RunConfig, tokenizer: PreTrainedTokenizerFast) -> tuple[Prepared, Prepared]:
    """Train and test rows: from `config.prepared`, or prepared from their sources under the run directory.

    Raises: ValueError where prepared data is of other tasks, another tokenizer or length, or no task has a test source.
    """
    if not config.prepared:
        with tempfile.TemporaryDirectory() as unkept:  # without a run directory; what is mapped outlives its name
            folder = pathlib.Path(config.run.directory or unkept) / "data"
            train = prepare(config.data, tokenizer, split="train", directory=folder)
            return train, prepare(config.data, tokenizer, split="test", directory=folder)
    return _find_prepared(config, tokenizer, "train"), _find_prepared(config, tokenizer, "test")


def load_model(config: RunConfig, mesh: Mesh, *, vocabulary: int) -> tuple[Model, Params]:
    """The model and its parameters, divided over the mesh from the start: random, or from a checkpoint.

    Args:
      vocabulary: what the data's tokens need; a model with fewer entries is refused.
    """

    def place(shapes: Params) -> Params:
        return shardings(mesh, logical_axes(shapes), shapes)

    if isinstance(config.model, Pretrained):
        model, params = checkpoints.load(config.model.path, shardings=place, **config.model.overrides())
    else:
        model, params = Model(config.model), None
    if model.config.vocab_size < vocabulary:
        raise ValueError(
            f"the tokenizer makes ids up to {vocabulary - 1}, but the model has vocab_size {model.config.vocab_size}: "
            f"set it to at least {vocabulary}, or use the tokenizer that the model was made with"
        )
    if params is None:
        key = jax.random.key(config.run.seed)
        params = jax.jit(model.init, out_shardings=place(jax.eval_shape(model.init, key)))(key)
    return Model(
        model.config, constrain=constrainer(mesh), row_groups=loss_groups(mesh), pieces=make_pieces(mesh)
    ), params


def _find_prepared(config: RunConfig, tokenizer: PreTrainedTokenizerFast, split: str) -> Prepared:
    found = sorted(pathlib.Path(config.prepared).glob(f"{split}-*/manifest.json"))
    if len(found) != 1:
        raise ValueError(
            f"{config.prepared} must hold one prepared {split} split, found {len(found)}: run scripts/prepare.py"
        )
    prepared = open_prepared(found[0].parent)
    wanted: dict[str, Any] = {name: getattr(config.data, name) for name in _DECIDE_ROWS}
    wanted |= {"tokenizer": digest(tokenizer), "tasks": list(config.data.task_names)}
    recipe = prepared.manifest["recipe"] | {"tasks": list(prepared.task_names)}
    for name, ours in wanted.items():
        if recipe[name] != ours:
            raise ValueError(
                f"{prepared.folder} was prepared with {name} {recipe[name]!r}, the config has {ours!r}: "
                "prepare it again"
            )
    return prepared


def _total(config: RunConfig) -> int:
    return total_steps(config.method, config.run.steps, sum(task.train is not None for task in config.data.tasks))


def total_steps(method: Any, steps: int, num_tasks: int) -> int:
    """Updates of a whole run: `run.steps`, unless the method makes more of them and says so in `total_steps`."""
    return method.total_steps(steps, num_tasks) if hasattr(method, "total_steps") else steps


def score_after(job: Job, params: Params, *, steps: int) -> dict[str, float]:
    """The last column of a run's scores: it is the one that the tasks no earlier column taught were learnt in."""
    columns = [tasks for column, tasks in job.scores.learned.items() if column != "after"]
    earlier = {job.task_names[task] for tasks in columns for task in tasks}
    return job.score("after", job.model, params, step=steps, learned=[t for t in job.rows if t not in earlier])


def _reporter(config: RunConfig, model: Model, steps: int) -> Reporter:
    length = config.data.length
    return RunReporter(
        config.run.directory,
        steps,
        flops_per_token=3 * model_flops(model.config, tokens=length, length=length) / length,
        peak=peak(jax.devices(), tflops=config.run.peak_tflops),
    )


def _read_summary(directory: pathlib.Path | None) -> dict[str, Any]:
    path = directory / "summary.json" if directory is not None else None
    return json.loads(path.read_text()) if path is not None and path.is_file() else {}


def _write_summary(directory: pathlib.Path | None, summary: Mapping[str, Any], *, write: bool) -> None:
    if directory is not None and write:
        part = directory / "summary.json.part"
        part.write_text(json.dumps(summary, indent=1) + "\n")
        part.replace(directory / "summary.json")


def _export(folder: pathlib.Path, model: Model, params: Params, tokenizer: Any, method: Any, *, write: bool) -> None:
    """Saves beside an older model and then takes its place; the same command mends what a kill leaves in between."""
    fresh = folder.with_name("model.new")
    if write:
        shutil.rmtree(fresh, ignore_errors=True)
    if hasattr(method, "exported"):
        model, params, capsules = method.exported(model, params, tokenizer)
        checkpoints.save(fresh, model, params, tokenizer=tokenizer)
        if write and capsules is not None:
            checkpoints.save_capsules(fresh, capsules)
    else:
        checkpoints.save(fresh, model, params, tokenizer=tokenizer)
    if write:
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)
