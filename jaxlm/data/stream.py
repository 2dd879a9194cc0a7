# SPDX-License-Identifier: Apache-2.0
"""Prepared rows to batches: an endless shuffled mixture for training, each row once for evaluation.

A batch is a dict of arrays [rows, T]; see `Prepared.row`. Step s holds the same rows in the same order however many
processes share it: each takes some of them, by their indices in the batch.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from jaxlm.data.prepared import Prepared, empty_row

Batch = dict[str, np.ndarray]
_END = 2**52  # rows; for ever is sys.maxsize to grain, which its batching rounds up to one too many


class _Rows:
    """The rows of one task, as grain reads them."""

    def __init__(self, prepared: Prepared, task: str):
        self._prepared, self._task_id, self._length = prepared, prepared.task_id(task), prepared.num_rows(task)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index) -> Batch:
        return self._prepared.row(self._task_id, int(index))

    def __repr__(self) -> str:
        return f"_Rows({self._prepared.task_names[self._task_id]!r}, {self._length})"


class _Part(grain.MapDataset):
    """Of each batch of rows, one after the other, those with the given indices."""

    def __init__(self, parent: grain.MapDataset, batch_size: int, part: Sequence[int]):
        super().__init__(parent)
        self._batch_size, self._part = batch_size, tuple(int(row) for row in part)

    def __len__(self) -> int:
        return min(len(self._parent), _END) // self._batch_size * len(self._part)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        batch, row = divmod(index, len(self._part))
        return self._parent[batch * self._batch_size + self._part[row]]


class BatchStream:
    """An endless iterator of batches whose place is one number: resuming reads nothing that was read before."""

    def __init__(self, dataset: grain.MapDataset, identity: dict[str, Any], *, threads: int, ahead: int):
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
        self._iterator = iter(dataset.to_iter_dataset(options))
        self._identity = identity
        self._step = 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = next(self._iterator)
        self._step += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """The next step, and what it counts in; json-able, the same on every process."""
        return {"step": self._step, **self._identity}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to the place of `get_state`.

        Raises: ValueError where the state counts other batches: other data, seed, batch size, tasks or weights.
        """
        if set(state) != {"step", *self._identity}:
            raise ValueError(f"not the state of a BatchStream: it has {sorted(state)}")
        for name, ours in self._identity.items():
            if state[name] != ours:
                raise ValueError(
                    f"the saved state has {name} {state[name]!r}, this stream {ours!r}: it is another order"
                )
        self._step = int(state["step"])
        self._iterator.set_state({"next_index": self._step})

    def close(self) -> None:
        """Ends the threads that read ahead."""
        self._iterator.close()


def batches(
    prepared: Prepared,
    *,
    batch_size: int,
    seed: int,
    tasks: Sequence[str] | None = None,
    weights: Mapping[str, float] | None = None,
    part: Sequence[int] | np.ndarray | None = None,
    threads: int = 2,
    ahead: int = 4,
) -> BatchStream:
    """Shuffled rows for ever, tasks interleaved in proportion to their weights.

    Each task is shuffled anew every epoch of its own. Shares are exact to one part in a hundred of the smallest weight.

    Args:
      batch_size: rows of a step over all processes.
      tasks: those to draw from; None: all that have rows.
      weights: task -> weight, more names than `tasks` are fine; None: equal.
      part: indices in a batch of the rows that are wanted here (`jaxlm.train.own_rows`); None: all.
      threads: that read rows; `ahead` batches are kept ready.
    Raises: ValueError for an empty or unknown task, a weight that is missing or not positive, a part of another batch.
    """
    chosen = _checked(part, batch_size)
    tasks = [name for name in prepared.task_names if prepared.num_rows(name)] if tasks is None else list(tasks)
    if not tasks:
        raise ValueError("no task to draw from")
    for name in tasks:
        if not prepared.num_rows(name):
            raise ValueError(f"task {name!r} has no rows in {prepared.folder}")
        if weights is not None and not weights.get(name, 0.0) > 0:
            raise ValueError(f"task {name!r} needs a positive weight, got {weights.get(name)}")
    shares = [1.0 if weights is None else float(weights[name]) for name in tasks]
    shuffled = [
        grain.MapDataset.source(_Rows(prepared, name)).shuffle(seed=named_seed(seed, name)).repeat(None)
        for name in tasks
    ]
    mixed = _Part(grain.MapDataset.mix(shuffled, shares), batch_size, chosen)
    identity = {"data": prepared.key, "seed": seed, "batch_size": batch_size, "tasks": tasks, "weights": shares}
    return BatchStream(mixed.batch(len(chosen)), identity, threads=threads, ahead=ahead)


class FiniteBatches:
    """Every row once, in order; iterate as often as needed. The last batch is filled with rows of weight 0."""

    def __init__(self, prepared: Prepared, rows: list[tuple[int, int]], batch_size: int, part: list[int]):
        self._prepared, self._rows, self._batch_size, self._part = prepared, rows, batch_size, part

    def __len__(self) -> int:
        return -(-len(self._rows) // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self._rows), self._batch_size):
            rows = [self._prepared.row(*row) for row in self._rows[start : start + self._batch_size]]
            rows += [empty_row(self._prepared.length)] * (self._batch_size - len(rows))
            mine = [rows[index] for index in self._part]
            yield {name: np.stack([row[name] for row in mine]) for name in mine[0]}


def finite_batches(
    prepared: Prepared,
    *,
    batch_size: int,
    tasks: Sequence[str] | None = None,
    part: Sequence[int] | np.ndarray | None = None,
) -> FiniteBatches:
    """Each row of the tasks (None: all) once; as many batches on every process, all of one shape.

    Args:
      batch_size: rows of a batch over all processes.
      tasks: those to read; None: all.
      part: indices in a batch of the rows that are wanted here (`jaxlm.train.own_rows`); None: all.
    Raises: ValueError for an unknown task, no rows, or a part of another batch.
    """
    chosen = _checked(part, batch_size)
    names = prepared.task_names if tasks is None else tasks
    rows = [(prepared.task_id(name), index) for name in names for index in range(prepared.num_rows(name))]
    if not rows:
        raise ValueError(f"no rows in {prepared.folder} for tasks {', '.join(names)}")
    return FiniteBatches(prepared, rows, batch_size, chosen)


def _checked(part: Sequence[int] | np.ndarray | None, batch_size: int) -> list[int]:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    chosen = list(range(batch_size)) if part is None else [int(row) for row in part]
    if not chosen or len(set(chosen)) < len(chosen) or not 0 <= min(chosen) <= max(chosen) < batch_size:
        raise ValueError(f"part must be indices in [0, {batch_size}), each once, at least one; got {chosen}")
    return chosen


def named_seed(seed: int, name: str) -> int:
    """A seed in [0, 2**31) of its own for whatever is named, such as a task: adding one leaves the others as they were.

    >>> named_seed(0, "sorting") == named_seed(0, "sorting") != named_seed(0, "reversal")
    True
    """
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=4).digest(), "little") >> 1
