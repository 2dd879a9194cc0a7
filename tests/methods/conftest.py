# SPDX-License-Identifier: Apache-2.0
"""Tasks that are springs: what a method does to them is known, and a run of many stages takes a second.

Task i pulls every entry j to a target x_ij with a stiffness a_ij >= 0: loss_i = sum_j a_ij (theta_j - x_ij)^2 / 2.
"""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm.run
import jaxlm.train.job
from jaxlm.config import RunConfig
from jaxlm.data.config import DataConfig, Procedural, Task
from jaxlm.losses.term import Term
from jaxlm.nn.config import ModelConfig
from jaxlm.run import score_after, total_steps
from jaxlm.train.held_out import Items
from jaxlm.train.job import Job
from jaxlm.train.mesh import make_mesh
from jaxlm.train.optimizer import make_optimizer
from jaxlm.train.options import AdamW, MeshOptions, RunOptions
from jaxlm.train.phase import Phase
from jaxlm.train.reporter import SILENT
from jaxlm.train.scores import Scores

SHAPES = {"embed": {"table": (4, 8)}, "blocks": {"mlp": {"up": {"kernel": (2, 4, 8)}}}}
SIZE = 32 + 64
ROWS = 4
RATE = AdamW(learning_rate=0.05, schedule="linear", final=0.0, warmup=0.0, clip_norm=None)


def tree_of(flat, dtype=np.float32):
    """[SIZE] numbers as a tree of parameters."""
    flat = np.asarray(flat, dtype)
    return {
        "embed": {"table": jnp.asarray(flat[:32].reshape(4, 8))},
        "blocks": {"mlp": {"up": {"kernel": jnp.asarray(flat[32:].reshape(2, 4, 8))}}},
    }


def flat_of(tree):
    """The entries of a tree of parameters as [SIZE]."""
    return np.concatenate([np.asarray(tree["embed"]["table"]).ravel(), np.ravel(tree["blocks"]["mlp"]["up"]["kernel"])])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Springs:
    """A method that stands where `Sft` does; a law of how the tasks' entries move, without a model to compute."""

    optimizer: AdamW = RATE
    lora: None = None

    def model(self, model):
        return model

    def tx(self, steps, *, num_tasks=0):
        return make_optimizer(self.optimizer, steps)

    def phase(self, model, *, num_tasks, steps):
        return Phase(model.loss_fn, self.tx(steps))

    def run(self, job):
        phase = self.phase(job.model, num_tasks=len(job.task_names), steps=job.options.steps)
        return job.train(phase, model=job.model).params


@dataclasses.dataclass(frozen=True)
class NoConfig:
    """Nothing that a checkpoint must agree with."""


class World:
    """Tasks, where a model stands. Rows differ by `noise`, so that it matters which batches were seen."""

    config = NoConfig()

    def __init__(self, stiffness, targets, noise=0.1):
        self.stiffness, self.targets, self.noise = np.float32(stiffness), np.float32(targets), noise

    def loss_fn(self, params, batch, rng):
        theta = jnp.concatenate([params["embed"]["table"].ravel(), params["blocks"]["mlp"]["up"]["kernel"].ravel()])
        task = batch["task_ids"][:, 0]
        gap = theta[None] - jnp.asarray(self.targets)[task] - batch["noise"]
        return {"loss": Term(0.5 * jnp.sum(jnp.asarray(self.stiffness)[task] * gap**2), jnp.float32(len(task)))}

    def losses(self, params):
        """[number of tasks], without noise."""
        return 0.5 * np.sum(self.stiffness * (flat_of(params)[None] - self.targets) ** 2, axis=1, dtype=np.float64)


@functools.cache
def springs(seed=0, num_tasks=3, noise=0.1):
    """Tasks "a" and "b" pull at 40 entries of which they share 36, "c" at 40 others: it shares none with them."""
    draw = np.random.default_rng(seed)
    stiffness = np.zeros((num_tasks, SIZE))
    for task, first in zip(range(num_tasks), (0, 4, 50), strict=False):
        stiffness[task, first : first + 40] = 1.0
    return World(stiffness, 2 * draw.normal(size=(num_tasks, SIZE)), noise)


class Batches:
    """An endless stream of the given tasks, drawn by weight; it knows where it stands."""

    def __init__(self, job_tasks, tasks, weights, noise, seed):
        self.step, self.noise, self.seed = 0, noise, seed
        self.ids = [list(job_tasks).index(task) for task in tasks]
        share = np.array([1.0 if weights is None else weights[task] for task in tasks])
        self.share, self.tasks = share / share.sum(), list(tasks)

    def __iter__(self):
        return self

    def __next__(self):
        self.step += 1
        draw = np.random.default_rng([self.seed, self.step, *self.ids])
        ids = draw.choice(self.ids, size=(ROWS, 1), p=self.share).astype(np.int32)
        noise = (self.noise * draw.normal(size=(ROWS, SIZE))).astype(np.float32)
        return {"task_ids": ids, "noise": noise, "loss_weights": np.ones((ROWS, 1), np.float32)}

    def get_state(self):
        return {"step": self.step}

    def set_state(self, state):
        self.step = state["step"]


class Killed(Exception):
    """What ends a run in the middle."""


class Heard:
    """A reporter that keeps all lines, as `metrics.jsonl` does, and dies where it is told to."""

    def __init__(self):
        self.lines, self.deaths = [], []

    def say(self, kind, step, fields):
        if (kind, step) in self.deaths:
            self.deaths.remove((kind, step))
            raise Killed(f"{kind} {step}")
        self.lines.append({"kind": kind, "step": step} | fields)

    def train(self, step, metrics):
        self.say("train", step, dict(metrics))

    def evaluation(self, step, metrics):
        self.say("eval", step, dict(metrics))

    def event(self, name, **fields):
        self.say("event", fields.pop("step", 0), {"name": name} | fields)

    def rewind(self, step):
        self.lines = [line for line in self.lines if line["step"] <= step]

    def close(self): ...

    def steps(self, kind):
        """Of the lines of a kind, in the order in which they were said."""
        return [line["step"] for line in self.lines if line["kind"] == kind]

    def updates(self):
        """The metrics of every update."""
        return [line for line in self.lines if line["kind"] == "train"]

    def compiles(self):
        return sum(line.get("name") == "compile" for line in self.lines)

    def told(self):
        """What an observer of the run may rely on, times left out."""
        return [(line["kind"], line["step"], line.get("objective", line.get("loss"))) for line in self.lines
                if line["kind"] != "event"]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Watched(Job):
    """A job that remembers the state after every stage and where it lay, and what each was given to learn from."""

    ended: dict = dataclasses.field(default_factory=dict)
    placed: dict = dataclasses.field(default_factory=dict)
    seen: dict = dataclasses.field(default_factory=dict)

    def train(self, phase, **options):
        state = super().train(phase, **options)
        name = options.get("stage", "train")
        self.ended[name] = jax.device_get((state.params, state.opt_state, int(state.step)))
        self.placed[name] = jax.tree.map(lambda x: x.sharding, state)
        self.seen[name] = getattr(options.get("records"), "tasks", None)
        return state


def make_job(
    world, *, steps=12, tasks=("a", "b", "c"), rows=None, reporter=None, directory="", axes=(1, 1, 1), **options
):
    """A job over springs, on one device unless told; the parameters start at 0.1."""
    mesh = make_mesh(MeshOptions(data=axes[0], fsdp=axes[1], tensor=axes[2]), devices=jax.devices()[: np.prod(axes)])
    return Watched(
        model=world,
        params=tree_of(np.full(SIZE, 0.1)),
        task_names=tuple(tasks),
        options=RunOptions(steps=steps, batch_size=ROWS, log_every=1, directory=str(directory), **options),
        mesh=mesh,
        batches=lambda tasks=None, weights=None, every=tuple(tasks): Batches(
            every, every if tasks is None else tasks, weights, world.noise, options.get("seed", 0)
        ),
        held_out=lambda: (),
        reporter=Heard() if reporter is None else reporter,
        describe=lambda task, record: "",
        rows=dict.fromkeys(tasks, 100) if rows is None else rows,
        scores=Scores(directory or None, tuple(tasks)),
    )  # fmt: skip


def decoder_job(method, *, train, length, packing="none", devices=1, reporter=SILENT, **options):
    """A job over a tiny decoder of bytes and one task, as a run makes it, on the first devices."""
    test = Procedural(generator="copying", size=8, seed=1, options={"length": 2})
    options = {"steps": 4, "batch_size": 16, "log_every": 1} | options
    config = RunConfig(
        model=ModelConfig(vocab_size=272, width=16, num_layers=2, num_heads=2, mlp_width=32, max_length=128),
        tokenizer="bytes",
        data=DataConfig(tasks=(Task(name="copy", train=train, test=test),), length=length, packing=packing),
        method=method,
        run=RunOptions(**options),
    )
    mesh = make_mesh(MeshOptions(), devices=jax.devices()[:devices])
    rows = jaxlm.run.open_data(config, jaxlm.run.load_tokenizer(config))
    model, params = jaxlm.run.load_model(config, mesh, vocabulary=rows[0].vocab_size)
    return jaxlm.run.make_job(config, mesh, model, params, *rows, reporter, Scores(None, ("copy",)))


def finish(method, world, **options):
    """Runs a method to its end, with the columns that `jaxlm.run` adds; returns (parameters, job)."""
    job = make_job(world, **options)
    if not job.scores.has("before"):
        job.score("before", job.model, job.params, step=0)
    params = method.run(job)
    score_after(job, params, steps=total_steps(method, job.options.steps, len(job.rows)))
    return jax.device_get(params), job


def score_items(model, params, batches, mesh=None):
    """One record a task, whose loss is the task's."""
    losses = model.losses(params)
    ids, ones = np.arange(len(losses)), np.ones(len(losses))
    return Items(ids, np.zeros(len(losses), np.int64), losses, ones, 0 * ones)


def bits(tree):
    """Every leaf as bytes."""
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Springs are scored without batches; and no time goes into machine code that runs for milliseconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxlm.train.job, "score_items", score_items)
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def spring():
    """The pieces above, for tests; modules here do not import each other."""
    return types.SimpleNamespace(
        bits=bits, decoder_job=decoder_job, finish=finish, flat=flat_of, Heard=Heard, job=make_job, Killed=Killed,
        method=Springs(), rate=RATE, size=SIZE, Springs=Springs, tree=tree_of, world=springs, World=World,
    )  # fmt: skip
