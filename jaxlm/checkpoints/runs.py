# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: one folder a step, committed by one rename, checked before a byte of it is believed.

<directory>/<step>/state/            the arrays, written by Orbax
<directory>/<step>/checkpoint.json   step, leaves with shapes and dtypes, config, data state, metrics, files
<directory>/tmp-<step>/              a save that is not finished; removed by the next run
<directory>/bad-<step>/              a folder that could not be read and was passed over
"""

import json
import math
import os
import shutil
import sys
import time
import zlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from jaxlm.weights.names import named_leaves

RECORD = "checkpoint.json"


class Restored(NamedTuple):
    """What was saved.

    Attributes:
      step: updates done.
      state: a tree like the one asked for, with its dtypes and shardings.
      data_state: where the stream of batches stood.
      metrics: held-out metrics of that step, or {}.
    """

    step: int
    state: Any
    data_state: Any
    metrics: dict[str, float]


class RunCheckpoints:
    """The checkpoints of one stage of a run.

    Args:
      directory: made when first written to; shared by all processes.
      keep_last: >= 1, how many of the newest stay.
      keep_best: a metric, lower is better, whose best checkpoint stays too; "" for none.
      config: JSON values that a checkpoint must agree with, such as the model's config; None: shapes alone decide.
      timeout: seconds that a save may take; so long a process waits for one that could not write.
      bad_checkpoint: the newest cannot be read: "refuse" says so, "previous" passes it over with a printed warning.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep_last: int = 2,
        keep_best: str = "",
        config: Mapping[str, Any] | None = None,
        bad_checkpoint: Literal["refuse", "previous"] = "refuse",
        timeout: int = 1200,
    ):
        if keep_last < 1:
            raise ValueError(f"keep_last must be at least 1, got {keep_last}: a run could not be resumed")
        self._directory = Path(directory).absolute()
        self._keep_last = keep_last
        self._keep_best = keep_best
        self._config = None if config is None else json.loads(json.dumps(config))
        self._bad_checkpoint, self._timeout = bad_checkpoint, timeout
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple[int, Future] | None = None
        self._first = jax.process_index() == 0
        if self._first and self._directory.is_dir():
            for part in self._directory.glob("tmp-*"):
                shutil.rmtree(part)

    def steps(self) -> list[int]:
        """The steps on disk, oldest first."""
        if not self._directory.is_dir():
            return []
        return sorted(int(p.name) for p in self._directory.iterdir() if p.name.isdecimal())

    def latest(self) -> int | None:
        """The newest step on disk, readable or not."""
        return max(self.steps(), default=None)

    def best(self) -> float:
        """The least finite `keep_best` metric on disk; infinity if there is none."""
        return min((self._score(step) for step in self.steps()), default=math.inf)

    def save(
        self,
        step: int,
        state: Any,
        *,
        data_state: Any = None,
        metrics: Mapping[str, float] | None = None,
        background: bool = True,
    ) -> float:
        """Saves one step; the caller may donate `state` as soon as this returns.

        Args:
          step: updates done; a folder of that step is replaced.
          state: any tree of arrays, typed keys included.
          data_state: JSON values.
          metrics: finite or not, of held-out data; `keep_best` looks at them.
          background: True returns once the arrays are copied to the host; `wait` tells how it went.
        Returns: the seconds that the caller was held up.
        Raises: OSError if this save, or the one in the background before it, could not be written.
        """
        begin = time.perf_counter()
        self.wait()
        part = self._directory / f"tmp-{step}"
        record = {
            "step": step,
            "leaves": leaves_of(state),
            "config": self._config,
            "data_state": data_state,
            "metrics": {name: float(value) for name, value in (metrics or {}).items()},
        }
        try:
            if self._first:
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir(parents=True)
            # Orbax's processes wait for each other's signals, which one that could not write never gives.
            context = ocp.Context()
            context.asynchronous.timeout_secs = self._timeout
            with context:
                response = ocp.save_async(part / "state", state)
        except (OSError, ValueError, RuntimeError) as error:
            raise self._not_written(step, part, error) from error
        self._pending = (step, self._thread.submit(self._commit, part, record, response))
        if not background:
            self.wait()
        return time.perf_counter() - begin

    def wait(self) -> None:
        """Returns when the save in the background has been committed. Raises: OSError if it could not be."""
        if self._pending is None:
            return
        step, future = self._pending
        self._pending = None
        try:
            future.result()
        except (OSError, ValueError, RuntimeError) as error:
            raise self._not_written(step, self._directory / f"tmp-{step}", error) from error

    def close(self) -> None:
        """Waits and ends the background thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def restore(self, like: Any) -> Restored | None:
        """The newest checkpoint, or None when there is none.

        Args:
          like: a tree of `ShapeDtypeStruct`s with shardings: any mesh, floats of any width.
        Raises: ValueError naming what is wrong with the newest, if it cannot be read and `bad_checkpoint` is "refuse"
          or no earlier one can.
        """
        self.wait()
        step, record = self._readable(like)
        if step is None:
            return None
        state = ocp.load(self._directory / str(step) / "state", like)
        # Orbax gives a key the sharding of its data, which has a dimension more.
        state = jax.tree.map(
            lambda x, asked: x if x.sharding == asked.sharding else jax.jit(_same, out_shardings=asked.sharding)(x),
            state,
            like,
        )
        return Restored(step, state, record["data_state"], record["metrics"])

    def _readable(self, like: Any) -> tuple[int | None, dict]:
        """The newest step that passes the checks, and its record. Process 0 looks, all follow."""
        step, record, refused = -1, {}, None
        steps = self.steps()[::-1] if self._first else []
        for position, candidate in enumerate(steps):
            try:
                record = check(self._directory / str(candidate), like, self._config)
            except ValueError as error:
                refused = refused or error
                if self._bad_checkpoint == "refuse":
                    break
                print(f"warning: passing over a checkpoint: {error}", file=sys.stderr)
                continue
            step, refused = candidate, None
            for bad in steps[:position]:
                shutil.rmtree(self._directory / f"bad-{bad}", ignore_errors=True)
                (self._directory / str(bad)).rename(self._directory / f"bad-{bad}")
            break
        if jax.process_count() > 1:
            step = int(multihost_utils.broadcast_one_to_all(np.int32(-2 if refused else step)))
            if step == -2 and refused is None:
                raise ValueError(f"process 0 refused the checkpoint in {self._directory}; its message says why")
            if step >= 0:
                record = read_record(self._directory / str(step))
        if refused is not None:
            hint = "; bad_checkpoint=previous would go on from the one before" * (len(steps) > 1)
            if self._bad_checkpoint == "previous":
                hint = "; no earlier checkpoint can be read either"
            raise ValueError(f"{refused}{hint}") from refused
        return (None if step < 0 else step), record

    def _commit(self, part: Path, record: dict, response: Any) -> None:
        """Waits for the arrays, lists every file, renames. In the background thread."""
        response.result()
        if not self._first:
            return
        record["files"] = {
            str(file.relative_to(part)): [file.stat().st_size, checksum(file)]
            for file in sorted(part.rglob("*"))
            if file.is_file()
        }
        with (part / RECORD).open("w") as stream:
            json.dump(record, stream)
            stream.flush()
            os.fsync(stream.fileno())
        final = self._directory / str(record["step"])
        old = self._directory / f"tmp-{record['step']}-old"
        if final.exists():
            final.rename(old)
        part.rename(final)
        shutil.rmtree(old, ignore_errors=True)
        self._prune()

    def _prune(self) -> None:
        steps = self.steps()
        keep = set(steps[-self._keep_last :])
        if self._keep_best and (scores := {step: self._score(step) for step in steps}):
            best = min(scores, key=lambda step: scores[step])
            if math.isfinite(scores[best]):
                keep.add(best)
        for step in steps:
            if step not in keep:
                # Renamed first, so that a kill in between leaves no half of a checkpoint under its name.
                gone = self._directory / f"tmp-{step}"
                (self._directory / str(step)).rename(gone)
                shutil.rmtree(gone)

    def _score(self, step: int) -> float:
        try:
            score = read_record(self._directory / str(step))["metrics"].get(self._keep_best, math.inf)
        except ValueError:
            return math.inf
        return score if math.isfinite(score) else math.inf

    def _not_written(self, step: int, part: Path, error: Exception) -> OSError:
        if self._first:
            shutil.rmtree(part, ignore_errors=True)
        steps = self.steps()
        intact = f"the checkpoint of step {steps[-1]} is intact" if steps else "there is no earlier checkpoint"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return OSError(
            f"the checkpoint of step {step} could not be written to {self._directory}: {reason}. {intact}; free space "
            "on the disk (or lower run.keep_last) and start the same command again to go on from there"
        )


def _same(x: jax.Array) -> jax.Array:
    return x


def leaves_of(tree: Any) -> dict[str, list]:
    """The fingerprint of a tree: path -> [shape, dtype]."""
    return {path: [list(leaf.shape), str(leaf.dtype)] for path, leaf in named_leaves(tree).items()}


def checksum(file: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def read_record(folder: Path) -> dict[str, Any]:
    """The `checkpoint.json` of a checkpoint. Raises: ValueError if it is no record."""
    try:
        record = json.loads((folder / RECORD).read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{folder} is no checkpoint of a run: it has no {RECORD}") from error
    except ValueError as error:
        raise ValueError(f"{folder / RECORD} is broken: {error}") from error
    if missing := {"step", "leaves", "config", "data_state", "metrics", "files"} - set(record):
        raise ValueError(f"{folder / RECORD} is no record of a checkpoint: it lacks {sorted(missing)}")
    return record


def check(folder: Path, like: Any, config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The record of a checkpoint that fits `like` and `config` and whose files are whole.

    Raises: ValueError naming the first leaf, option or file that is wrong.
    """
    record = read_record(folder)
    saved, wanted = record["leaves"], leaves_of(like)
    if config is not None and record["config"] is not None and record["config"] != config:
        theirs = record["config"]
        keys = [key for key in {**theirs, **config} if theirs.get(key) != config.get(key)]
        told = ", ".join(f"{key}: {theirs.get(key)!r} there, {config.get(key)!r} here" for key in keys)
        raise ValueError(
            f"{folder} is of another model ({told}): use another directory, or the config it was made with"
        )
    for path in wanted:
        if path not in saved:
            raise ValueError(
                f"{folder} lacks {path!r}, which this run has: it is of another model, method or optimizer"
            )
    for path, (shape, dtype) in saved.items():
        if path not in wanted:
            raise ValueError(
                f"{folder} has {path!r}, which this run lacks: it is of another model, method or optimizer"
            )
        if shape != wanted[path][0]:
            raise ValueError(f"{folder}: {path!r} has shape {tuple(shape)}, this run needs {tuple(wanted[path][0])}")
        if dtype != wanted[path][1] and not ("float" in dtype and "float" in wanted[path][1]):
            raise ValueError(f"{folder}: {path!r} is {dtype}, this run needs {wanted[path][1]}")
    for name, (size, crc) in record["files"].items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{folder} is damaged: its file {name} is missing")
        if file.stat().st_size != size:
            raise ValueError(f"{folder} is damaged: {name} has {file.stat().st_size} bytes, {size} were written")
        if checksum(file) != crc:
            raise ValueError(f"{folder} is damaged: the bytes of {name} are not those that were written")
    return record
