# SPDX-License-Identifier: Apache-2.0
"""Any config as two tiny steps that need no download: how the tests run every file of `configs/`."""

import dataclasses
from pathlib import Path
from typing import Any

from jaxlm.config import Comparison, LengthComparison, PlanComparison, Pretrained, RunConfig
from jaxlm.data.config import DataConfig, LongText, Procedural, ProceduralPairs, ProceduralPlans, Rows, Source, Task
from jaxlm.evaluation_options import Generation
from jaxlm.nn.config import ModelConfig
from jaxlm.train.options import MeshOptions

VOCABULARY = 320  # room for the byte tokenizer
DEVICES = 8  # rows an update are a multiple of this, so that the tests' virtual devices divide them


def shrink(config: RunConfig) -> RunConfig:
    """The same run with a tiny model, a few records a task and two updates.

    Choices stay (norms, tied heads, adapters, mixtures); numbers that cost time become small. A pretrained model
    becomes a random one, its tokenizer the byte tokenizer, and every source but the built-in generators a few rows
    made up here, so nothing is read from outside. A method says how its own numbers shrink in a method `shrunk()`; one
    with stages gets two updates a task.
    """
    staged = hasattr(config.method, "total_steps")
    num_tasks = sum(task.train is not None for task in config.data.tasks)
    micro_batches = min(config.run.micro_batches, 2)
    return dataclasses.replace(
        config,
        model=_model(config.model),
        tokenizer="bytes",
        data=_data(config.data),
        method=config.method.shrunk() if hasattr(config.method, "shrunk") else config.method,
        run=dataclasses.replace(
            config.run,
            steps=2 * num_tasks if staged else 2,
            batch_size=DEVICES * micro_batches,
            micro_batches=micro_batches,
            log_every=1,
            evaluate_every=0,
            save_every=0,
            profile="",
        ),
        mesh=MeshOptions(),
        generation=None if config.generation is None else _generation(config.generation),
    )


def shrink_comparison(comparison: Comparison, directory: str | Path) -> Comparison:
    """One arm of each kind on a tiny model: one rate three times over, two seeds, two updates a task."""
    base = None if comparison.base is None else shrink(comparison.base)
    run = shrink(dataclasses.replace(comparison.run, method=next(iter(comparison.arms.values()))))
    run = dataclasses.replace(run, run=dataclasses.replace(run.run, directory=str(directory)))
    num_tasks = sum(task.train is not None for task in run.data.tasks)
    kinds: dict[Any, str] = {}
    for name, method in comparison.arms.items():
        kinds.setdefault((type(method), type(getattr(method, "method", None))), name)
    kept = {comparison.plain, *kinds.values()}
    kept |= {comparison.controls[name] for name in kept if name in comparison.controls}
    arms = {name: m.shrunk() if hasattr(m, "shrunk") else m for name, m in comparison.arms.items() if name in kept}
    return dataclasses.replace(
        comparison,
        base=base,
        run=dataclasses.replace(
            run, method=comparison.run.method, run=dataclasses.replace(run.run, steps=2 * num_tasks)
        ),
        arms=arms,
        scale={name: scale for name, scale in comparison.scale.items() if name in arms},
        controls={name: other for name, other in comparison.controls.items() if name in arms},
        learning_rates=comparison.learning_rates[:1] * 3,
        seeds=comparison.seeds[:2],
    )


def shrink_length_comparison(comparison: LengthComparison, directory: str | Path) -> LengthComparison:
    """The plain arm and one of other positions on a tiny model, 16 and 32 tokens: one rate three times over, two seeds.

    Other kinds would show nothing more, and each arm compiles a handful of programs.
    """
    run = shrink(comparison.run)
    run = dataclasses.replace(
        run,
        data=dataclasses.replace(run.data, length=16, on_long="split"),
        run=dataclasses.replace(run.run, directory=str(directory)),
    )
    plain = type(comparison.arms[comparison.plain].positions)
    others = [name for name, model in comparison.arms.items() if not isinstance(model.positions, plain)]
    kept = {comparison.plain, *others[:1], *comparison.yarn.values()}
    return dataclasses.replace(
        comparison,
        run=run,
        arms={name: _model(model) for name, model in comparison.arms.items() if name in kept},
        learning_rates=comparison.learning_rates[:1] * 3,
        seeds=comparison.seeds[:2],
        text=_source(comparison.text, first=2000, count=8),
        lengths=(16, 32),
        tokens=128,
        tail=8,
        looked_at=32,
    )


def shrink_plan_comparison(comparison: PlanComparison, directory: str | Path) -> PlanComparison:
    """The plain arm, the first one with a capsule and one with its own records, if any, on a tiny model: two seeds."""
    run = shrink(comparison.run)
    run = dataclasses.replace(run, run=dataclasses.replace(run.run, directory=str(directory)))
    first = next(name for name, method in comparison.arms.items() if method.num_capsules)
    own = list(comparison.learns_from)[:1]
    kept = {name: comparison.arms[name].shrunk() for name in (comparison.plain, first, *own)}
    return dataclasses.replace(
        comparison,
        run=run,
        arms=kept,
        follows={},
        learns_from={name: _source(comparison.learns_from[name], first=0, count=24) for name in own},
        learning_rates=comparison.learning_rates[:1] * 3,
        seeds=comparison.seeds[:2],
        chosen_on=_source(comparison.chosen_on, first=0, count=4),
        tests={name: _source(source, first=0, count=4) for name, source in list(comparison.tests.items())[:1]},
        sampling=dataclasses.replace(comparison.sampling, max_tokens=4),
        slots=4,
    )


def _model(model: ModelConfig | Pretrained) -> ModelConfig:
    if isinstance(model, Pretrained):
        return ModelConfig(vocab_size=VOCABULARY, width=16, num_layers=2, num_heads=2, mlp_width=32)
    return dataclasses.replace(
        model,
        vocab_size=max(VOCABULARY, min(model.vocab_size, 2 * VOCABULARY)),
        width=16,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1 if model.kv_heads < model.num_heads else None,
        head_width=None,
        mlp_width=32,
        dtype="float32",
        attention="auto",
    )


def _data(data: DataConfig) -> DataConfig:
    return dataclasses.replace(
        data,
        tasks=tuple(_task(task) for task in data.tasks),
        length=min(data.length, 256),
        on_long="split" if data.on_long == "split" else "skip",
    )


def _task(task: Task) -> Task:
    test = None if task.test is None else _source(task.test, first=1000, count=8)
    train = None if task.train is None else _source(task.train, first=0, count=24)
    return dataclasses.replace(task, train=train, test=test)


def _generation(generation: Generation) -> Generation:
    """Two records of each task and four tokens; the made-up records have no verifier of their own."""
    return dataclasses.replace(
        generation, sampling=dataclasses.replace(generation.sampling, max_tokens=4), records=2, verifiers={}, slots=4
    )


def _source(source: Source, *, first: int, count: int) -> Source:
    """A few records: of the same generator where it is built in, else sums."""
    if isinstance(source, Procedural | ProceduralPairs | ProceduralPlans):
        return dataclasses.replace(source, size=min(source.size, count))
    if isinstance(source, LongText):  # the documentation in every Python, a few hundred characters of it
        return LongText(begin=source.begin, end=source.begin + 0.001)
    numbers = range(first, first + count)
    return Rows(records=tuple({"prompt": f"{n} + 1 = ", "completion": str(n + 1)} for n in numbers))
