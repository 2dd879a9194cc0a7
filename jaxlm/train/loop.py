# SPDX-License-Identifier: Apache-2.0
"""The loop: from parameters and records to a trained state, resumable at every save. It knows no method."""

import collections
import functools
import math
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.checkpoints.runs import RunCheckpoints, leaves_of
from jaxlm.nn.axes import logical_axes
from jaxlm.train.agreement import gather, together
from jaxlm.train.feeding import own_rows, to_devices
from jaxlm.train.interval import Interval, check_update, is_busy, records_of
from jaxlm.train.mesh import check_rows, shardings
from jaxlm.train.optimizer import rescheduled
from jaxlm.train.options import RunOptions
from jaxlm.train.phase import Params, Phase
from jaxlm.train.profiling import Trace, read_window
from jaxlm.train.program import program
from jaxlm.train.reporter import SILENT, Reporter
from jaxlm.train.state import State, make_state, state_shardings
from jaxlm.train.stop import Notice, Preempted
from jaxlm.train.watchdog import watching

HOST_ONLY = ("record_ids",)  # what stays off the devices
SHORT_SAVE, LONG_SAVE = 10, 1200  # seconds after which a save counts as failed
PAUSE, MAX_PAUSE = 1.0, 60.0  # seconds after a save that failed: the first, doubled each time, and the longest


def train(
    phase: Phase,
    start: Params | State,
    records: Any,
    *,
    options: RunOptions,
    mesh: jax.sharding.Mesh,
    steps: int | None = None,
    stage: str = "train",
    first_step: int = 0,
    evaluate: Callable[[Params], Mapping[str, float]] | None = None,
    reporter: Reporter = SILENT,
    describe: Callable[[int, int], str] | None = None,
    task_names: Sequence[str] = (),
    axes: Callable[[Params], Any] = logical_axes,
    config: Mapping[str, Any] | None = None,
) -> State:
    """Runs one phase to its end; with a directory, goes on from where an earlier call of the same stage was stopped.

    Args:
      phase: what to learn and how. Its `finish` is left to the caller, who may want to look at both sides of it.
      start: parameters, which `phase.prepare` changes, or the state of an earlier stage, moments and all. What is
        handed in is copied once and stays valid.
      records: for `phase.batches`; with `get_state` and `set_state` if the run has a directory.
      options: batch size, seed, intervals, directory.
      mesh: of all processes.
      steps: updates of this stage; None: `options.steps`.
      first_step: number of updates before this stage, for parameters; a state knows its own. Reports and keys of all
        stages then follow each other.
      stage: its checkpoints lie in `<directory>/checkpoints/<stage>`; unique in a run. A stage found finished there
        is restored and returned at once.
      evaluate: held-out metrics of parameters, every `options.evaluate_every` updates. Before and after are the
        caller's: it knows what `prepare` and `finish` make of the parameters.
      reporter: hears metrics and events.
      describe: `(task_id, record_id) -> place`, for errors.
      task_names: for metrics by task.
      axes: from parameters to logical axes; a method with parameters of its own brings theirs.
      config: what a checkpoint must agree with, besides names and shapes.
    Raises: ValueError for sizes that do not fit, a checkpoint that does not, an update that is not finite or has
      nothing to learn from; OSError if a checkpoint cannot be written; Preempted after SIGTERM, once it is saved.
    """
    check_rows(mesh, options.batch_size, options.micro_batches)
    if options.keep_best and not (options.evaluate_every and evaluate):
        raise ValueError(f"keep_best {options.keep_best!r} needs held-out metrics: set run.evaluate_every")
    first = int(start.step) if isinstance(start, State) else first_step
    likes, make = plan(phase, start, mesh=mesh, seed=options.seed, stage=stage, axes=axes, first_step=first)
    last = first + (options.steps if steps is None else steps)
    window = read_window(options.profile, directory=options.directory, last=last if steps is None else None)
    saves = None
    if options.directory:
        saves = RunCheckpoints(
            Path(options.directory) / "checkpoints" / stage,
            keep_last=options.keep_last,
            keep_best=options.keep_best,
            config=config,
            bad_checkpoint=options.bad_checkpoint,
            timeout=save_timeout(options.step_timeout),
        )
    with watching(options.directory, options.step_timeout) as watch:
        watch.at("restore", first)
        begin = time.perf_counter()
        restored = saves.restore(likes) if saves else None
        if restored is None:
            watch.clock.was("init")
        state = restored.state if restored else make()
        at = restored.step if restored else first
        if at > last:
            raise ValueError(f"stage {stage!r} stands at step {at}, beyond the {last} asked for: use another directory")
        if at == last:  # what later stages have reported stays
            if saves:
                saves.close()
            return state
        reporter.rewind(at)
        if restored:
            reporter.event("restore", step=at, stage=stage, seconds=time.perf_counter() - begin)
            state = state._replace(opt_state=rescheduled(state.opt_state, phase.tx, state.params))
        run = _Run(phase, stage, state, at, last, options, mesh, likes, saves, reporter, describe)
        so_far = {name: restored.data_state[name] for name in ("tokens", "trained_tokens")} if restored else {}
        run.watch = watch
        run.interval = Interval(task_names, **so_far)
        run.open(records, restored.data_state["stream"] if restored else None)
        run.account()
        trace = Trace(window, options.directory, at, drain=run.drain, tell=run.profiled)
        try:
            with Notice() as notice, trace:
                while run.step < last:
                    with trace.update(run.step + 1):
                        run.update()
                    run.after(evaluate, notice)
        finally:
            watch.at("close")  # a save in the background may still be on its way
            if saves:
                saves.close()
            run.account()
        return run.state


def save_timeout(step_timeout: float) -> int:
    """Seconds that a save may take: twice `run.step_timeout`, in [10, 1200]; without a watchdog 1200."""
    return int(min(max(2 * step_timeout, SHORT_SAVE), LONG_SAVE)) if step_timeout else LONG_SAVE


def plan(
    phase: Phase,
    start: Params | State,
    *,
    mesh: jax.sharding.Mesh,
    seed: int,
    stage: str,
    axes: Callable,
    first_step: int,
) -> tuple[State, Callable[[], State]]:
    """Shapes and shardings of the state, and a function that makes it."""
    if isinstance(start, State):
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), start)
        wanted = leaves_of(jax.eval_shape(phase.tx.init, shapes.params))
        if leaves_of(shapes.opt_state) != wanted:
            raise ValueError(
                "the state handed on was made by another optimizer: its leaves are not those of phase.tx. Pass "
                "state.params to begin with fresh moments"
            )
        places = state_shardings(phase.tx, shapes.params, shardings(mesh, axes(shapes.params), shapes.params), mesh)

        def go_on() -> State:
            return jax.jit(copied, out_shardings=places)(jax.device_put(start, places))

        return with_shardings(shapes, places), go_on

    def init(params: Params) -> State:
        # Stages draw from keys of their own. Made in here, because a key cannot be put across processes.
        key = jax.random.fold_in(jax.random.key(seed), np.uint32(zlib.crc32(stage.encode())))
        key, prepare_key = jax.random.split(key)
        state = make_state(copied(phase.prepare(params, prepare_key)), phase.tx, key)
        return state._replace(step=jnp.int32(first_step))

    shapes = jax.eval_shape(init, start)
    places = state_shardings(phase.tx, shapes.params, shardings(mesh, axes(shapes.params), shapes.params), mesh)

    def make() -> State:
        given = jax.device_put(start, shardings(mesh, axes(start), start))
        return jax.jit(init, out_shardings=places)(given)

    return with_shardings(shapes, places), make


def copied(tree: Any) -> Any:
    """New buffers, inside a compiled function: an update deletes its own, never the caller's."""
    return jax.tree.map(jnp.copy, tree)


def with_shardings(shapes: State, places: State) -> State:
    """Shapes that say where they lie, for a restore."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places)


class _Run:
    """What one call of `train` carries around."""

    interval: Interval
    watch: Any
    batches: Iterator
    stream: Any

    def __init__(self, phase, stage, state, step, last, options, mesh, likes, saves, reporter, describe):
        self.phase, self.stage, self.state, self.step, self.last = phase, stage, state, step, last
        self.options, self.mesh, self.saves = options, mesh, saves
        self.reporter, self.describe = reporter, describe
        places = jax.tree.map(lambda x: x.sharding, likes)
        self.program = program(phase, mesh=mesh, shardings=places, num_parts=options.micro_batches)
        self.local = len(own_rows(mesh, options.batch_size))
        # Where steps are not awaited, XLA's CPU collectives may deadlock; accelerators run one step ahead.
        self.ahead = 0 if mesh.devices.flat[0].platform == "cpu" else 1
        self.best = saves.best() if saves else math.inf
        self.unread = collections.deque()  # (step, metrics, batch on the host)

    def open(self, records: Any, stream_state: Any) -> None:
        """Begins the stream of batches, where `stream_state` says."""
        self.batches = iter(self.phase.batches(records, lambda: self.state.params))
        # Batches that keep a state of their own (a rollout half used) keep that of the records in it.
        self.stream = self.batches if hasattr(self.batches, "get_state") else records
        if stream_state is not None:
            self.stream.set_state(stream_state)
        if self.saves and not hasattr(self.stream, "get_state"):
            raise ValueError(
                "the records have no get_state and set_state, so a run with a directory could not be resumed: pass "
                "a stream of jaxlm.data.batches, or run.directory= for a run that saves nothing"
            )

    def update(self) -> None:
        """Takes a batch, starts an update, reads the metrics of those that are done."""
        self.watch.at("batch", self.step + 1)
        try:
            batch = next(self.batches)
        except StopIteration as error:
            raise ValueError(f"the batches ended after step {self.step}, {self.last} were asked for") from error
        for name, value in batch.items():
            wanted = self.options.batch_size if isinstance(value, jax.Array) else self.local
            if value.shape[0] != wanted:
                raise ValueError(f"batch[{name!r}] has {value.shape[0]} rows, expected {wanted} on this process")
        arrays = {name: to_devices(self.mesh, value) for name, value in batch.items() if name not in HOST_ONLY}
        if self.unread and is_busy(self.unread[-1][1]):
            self.watch.clock.was("step")
        step = self.step + 1
        self.watch.at("compile" if self.program.is_new(arrays) else "update", step)
        self.state, metrics = self.program(self.state, arrays, self.compiled)
        self.watch.at("update")
        self.step = step
        self.unread.append((step, metrics, batch))
        self.read(self.ahead)

    def compiled(self, seconds: float) -> None:
        """A new shape was compiled."""
        self.reporter.event("compile", step=self.step + 1, seconds=seconds)
        self.interval.leave_out(seconds)
        self.watch.clock.at("step")

    def drain(self) -> None:
        """Until the devices have nothing left to do."""
        self.read(0)
        jax.block_until_ready(self.state)
        self.watch.at("profile")

    def profiled(self, seconds: float, **fields: Any) -> None:
        """A trace was written."""
        self.interval.leave_out(seconds)
        self.reporter.event("profile", seconds=seconds, **fields)

    def account(self) -> None:
        """Where the time has gone so far: now and then, for a life that is killed says nothing more."""
        self.reporter.event("goodput", step=self.step, **self.watch.clock.record())

    def read(self, ahead: int) -> None:
        """Waits for all but the newest `ahead` updates and looks at how they went."""
        while len(self.unread) > ahead:
            step, metrics, batch = self.unread.popleft()
            if not self.ahead:
                jax.block_until_ready(self.state)
            metrics = jax.device_get(metrics)
            check_update(step, metrics, functools.partial(self.records, batch))
            self.interval.add(metrics)

    def records(self, batch: Mapping[str, Any]) -> str:
        """The records of an update that went wrong, those of all processes: what is wrong with it, all of them see."""
        told = gather({"records": records_of(batch, self.describe)})
        return ", ".join(dict.fromkeys(one["records"] for one in told))

    def after(self, evaluate: Callable | None, notice: Notice) -> None:
        """Whatever is due after an update: report, evaluation, save, stop. In this order, so that what was reported
        up to a saved step is complete."""
        options, done = self.options, self.step == self.last

        def due(every: int) -> bool:
            return done or (every > 0 and self.step % every == 0)

        if due(options.log_every):
            self.read(0)
            self.watch.clock.at("other")
            if self.interval.updates:
                self.reporter.train(self.step, self.interval.report())
        metrics: Mapping[str, float] = {}
        if evaluate and options.evaluate_every and self.step % options.evaluate_every == 0:
            metrics = self.evaluate(evaluate)
        if done:
            tokens, trained = self.interval.total_tokens, round(self.interval.trained_tokens)
            self.reporter.event("stage", step=self.step, stage=self.stage, tokens=tokens, trained_tokens=trained)
        told = notice.reached(self.step)
        # Remembered, not read from the disk: all processes must decide alike, and a save may be on its way.
        best = metrics.get(options.keep_best, math.inf) < self.best
        self.best = min(self.best, metrics.get(options.keep_best, math.inf))
        if self.saves and (due(options.save_every) or best or told):
            self.save(metrics, background=not (done or told))
            self.account()
        elif due(options.log_every):
            self.account()
        if told and not done:
            self.read(0)
            where = f"saved in {options.directory}" if self.saves else "nothing saved, the run has no directory"
            self.reporter.event("preempted", step=self.step)
            raise Preempted(f"told to stop (SIGTERM) after step {self.step} of {self.last}: {where}")

    def evaluate(self, evaluate: Callable[[Params], Mapping[str, float]]) -> Mapping[str, float]:
        """Held-out metrics of the parameters as they are."""
        self.read(0)
        self.watch.at("evaluate")
        begin = time.perf_counter()
        metrics = evaluate(self.state.params)
        if self.options.keep_best and self.options.keep_best not in metrics:
            raise ValueError(f"keep_best {self.options.keep_best!r} is none of the held-out metrics {sorted(metrics)}")
        self.reporter.evaluation(self.step, metrics)
        self.interval.leave_out(time.perf_counter() - begin)
        return metrics

    def save(self, metrics: Mapping[str, float], *, background: bool) -> None:
        """Saves the state, known to be finite."""
        self.read(0)
        self.watch.at("save")
        stream = self.stream.get_state()
        tokens, trained = self.interval.total_tokens, self.interval.trained_tokens
        data_state = {"stream": stream, "tokens": tokens, "trained_tokens": trained}
        begin = time.perf_counter()
        try:
            together("writing the save before", self.saves.wait)
        except OSError as error:  # its arrays are gone: this save takes its place
            self.reporter.event("save_failed", step=self.step, error=str(error))
            background = False
        self.try_to_save(data_state, metrics, background=background)
        seconds = time.perf_counter() - begin
        self.interval.leave_out(seconds)
        self.reporter.event("save", step=self.step, seconds=seconds)

    def try_to_save(self, data_state: Any, metrics: Mapping[str, float], *, background: bool) -> None:
        """Saves, again and again with longer pauses where it fails; all processes alike, whichever of them failed."""
        for tries in range(1, self.options.save_retries + 2):
            self.watch.at("save")
            save = functools.partial(
                self.saves.save, self.step, self.state, data_state=data_state, metrics=metrics, background=background
            )
            try:
                together("saving", save)
            except OSError as error:
                if tries > self.options.save_retries:
                    raise OSError(f"{error} (tried {tries} times, see run.save_retries)") from error
                self.reporter.event("save_failed", step=self.step, error=str(error))
                time.sleep(min(PAUSE * 2 ** (tries - 1), MAX_PAUSE))
                background = False
            else:
                return
