# SPDX-License-Identifier: Apache-2.0
"""The scores of every held-out record before training and after each stage of a run, kept in its directory."""

import hashlib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jaxlm.train.held_out import Items
from jaxlm.train.score_matrix import ScoreMatrix

FILE = "scores.npz"
Kind = Literal["accuracy", "nll", "exact"]


class _Column(NamedTuple):
    """One evaluation: the tasks that the stage before it trained on, and [Q] numbers of every record."""

    learned: tuple[int, ...]
    nll: np.ndarray
    correct: np.ndarray


class Scores:
    """A growing table of scores; column 0 is the first that is recorded, and comes before any training.

    Args:
      directory: of the run, where `scores.npz` is; what it holds already is read. None: kept in memory.
      task_names: index = task id; for people.

    >>> scores = Scores(None, ("copy", "sum"))
    >>> def items(right):
    ...     return Items(np.array([0, 1]), np.array([0, 0]), np.array([2.0, 4.0]), np.array([2.0, 4.0]), right)
    >>> scores.record("before", items(np.array([1.0, 1.0])))
    >>> scores.record("copy", items(np.array([2.0, 1.0])), learned=[0])
    >>> scores.matrix("accuracy").means.tolist()
    [[0.5, 1.0], [0.25, 0.25]]
    """

    def __init__(self, directory: str | Path | None, task_names: Sequence[str] = ()):
        self._path = None if directory is None else Path(directory) / FILE
        self._task_names = tuple(task_names)
        self._who = np.zeros((3, 0), np.int64)  # task, record, and tokens as they were counted at first
        self._tokens = np.zeros(0)
        self._columns: dict[str, _Column] = {}
        if self._path is not None and self._path.is_file():
            self._load(self._path)

    @classmethod
    def read(cls, directory: str | Path) -> "Scores":
        """The scores that a run has kept.

        Raises: ValueError if it has none.
        """
        if not (Path(directory) / FILE).is_file():
            raise ValueError(f"{directory} has no {FILE}: its run has scored no records, before training or later")
        return cls(directory)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names in the order in which they were first recorded."""
        return tuple(self._columns)

    @property
    def task_names(self) -> tuple[str, ...]:
        """Index = task id."""
        return self._task_names

    @property
    def learned(self) -> dict[str, tuple[int, ...]]:
        """Column -> ids of the tasks that the stage ending there taught."""
        return {name: column.learned for name, column in self._columns.items()}

    def has(self, column: str) -> bool:
        """Whether a column of that name is there."""
        return column in self._columns

    def record(self, column: str, items: Items, *, learned: Sequence[int] = ()) -> None:
        """Adds a column, or replaces the one of that name, and saves all on process 0, in one piece or not at all.

        Args:
          column: the name of a stage; "before" for the first, say.
          items: from `score_items`, the same records every time. Pieces of one record are added up.
          learned: ids of the tasks that the stage ending here trained on.
        Raises: ValueError for other records than in the first column, or records without names.
        """
        who, tokens, found = _merged(items, tuple(learned))
        if not self._columns or self.columns == (column,):
            self._who, self._tokens = who, tokens
        elif who.shape != self._who.shape or (who != self._who).any():
            raise ValueError(
                f"column {column!r} scores {who.shape[1]} records of hash {_hash(who)}, column {self.columns[0]!r} "
                f"{self._who.shape[1]} of hash {_hash(self._who)}: every column scores the same held-out records, "
                "encoded the same way; start a new run directory for other data"
            )
        self._columns[column] = found
        if self._path is not None and jax.process_index() == 0:
            self._save(self._path)

    def matrix(
        self,
        kind: Kind = "accuracy",
        *,
        items: Literal["even", "odd"] | None = None,
    ) -> ScoreMatrix:
        """The table that the metrics are computed from; tasks without a record are left out.

        Args:
          kind: of a record: "accuracy": share of its answer tokens that are the argmax, given the right tokens before;
            "exact": 1 if all are, else 0; "nll": nats an answer token, a loss.
          items: "even" or "odd": every second record of each task, in their order: one half to choose on, the other
            to report. None: all.
        Raises: ValueError where the first column is not one before training, or there is none.
        """
        if kind not in ("accuracy", "nll", "exact"):
            raise ValueError(f'scores are "accuracy", "nll" or "exact", got {kind!r}')
        if items not in (None, "even", "odd"):
            raise ValueError(f'items are "even", "odd" or None for all, got {items!r}')
        if not self._columns:
            raise ValueError("no column is recorded yet")
        if next(iter(self._columns.values())).learned:
            raise ValueError(
                f"the first column, {self.columns[0]!r}, comes after training: evaluate before training: forgetting "
                "of base abilities needs column 0"
            )
        rows = np.stack([self._values(kind, column) for column in self._columns.values()])
        tasks = np.unique(self._who[0])
        chosen = [np.flatnonzero(self._who[0] == task) for task in tasks]
        if items is not None:
            chosen = [places[("even", "odd").index(items) :: 2] for places in chosen]
        if short := [self._name(task) for task, places in zip(tasks, chosen, strict=True) if not len(places)]:
            raise ValueError(f"{items} records of {', '.join(short)}: there are none, give it at least two records")
        return ScoreMatrix(
            [rows[:, places] for places in chosen],
            [self._learned_at(task) for task in tasks],
            higher_is_better=kind != "nll",
            items_hash=f"{kind} of {_hash(self._who[:, np.concatenate(chosen)])}",
            tasks=[self._name(task) for task in tasks],
            columns=self.columns,
        )

    def _values(self, kind: str, column: _Column) -> np.ndarray:
        if kind == "nll":
            return np.maximum(column.nll, 0.0) / self._tokens
        return column.correct / self._tokens if kind == "accuracy" else (column.correct == self._tokens) * 1.0

    def _learned_at(self, task: int) -> int | None:
        return next((c for c, column in enumerate(self._columns.values()) if task in column.learned), None)

    def _name(self, task: int) -> str:
        return self._task_names[task] if task < len(self._task_names) else f"task {task}"

    def _save(self, path: Path) -> None:
        arrays: dict[str, Any] = {"task_names": np.array(self._task_names, np.str_), "columns": np.array(self.columns)}
        arrays |= {"who": self._who, "tokens": self._tokens}
        for number, column in enumerate(self._columns.values()):
            arrays[f"{number}.learned"] = np.array(column.learned, np.int64)
            arrays |= {f"{number}.nll": column.nll, f"{number}.correct": column.correct}
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        with part.open("wb") as stream:
            np.savez_compressed(stream, **arrays)
        part.replace(path)

    def _load(self, path: Path) -> None:
        try:
            with np.load(path) as stored:
                self._who, self._tokens = stored["who"], stored["tokens"]
                self._task_names = self._task_names or tuple(str(name) for name in stored["task_names"])
                for number, name in enumerate(stored["columns"]):
                    learned = tuple(int(task) for task in stored[f"{number}.learned"])
                    self._columns[str(name)] = _Column(learned, stored[f"{number}.nll"], stored[f"{number}.correct"])
        except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} does not hold scores ({error}): remove it to score anew") from error


def _merged(items: Items, learned: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, _Column]:
    """Who the records are, [3, Q]; their tokens; and the numbers of each, its pieces added up."""
    if (items.record_ids < 0).any():
        raise ValueError(
            "the held-out batches carry no record_ids: scores over time need to know which record is which"
        )
    who, places = np.unique(np.stack([items.task_ids, items.record_ids]), axis=1, return_inverse=True)

    def add(values: np.ndarray) -> np.ndarray:
        return np.bincount(places.ravel(), weights=values, minlength=who.shape[1])

    tokens = add(items.tokens)
    return (
        np.concatenate([who, tokens[None].round().astype(np.int64)]),
        tokens,
        _Column(learned, add(items.nll), add(items.correct)),
    )


def _hash(who: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(who, np.int64).tobytes(), digest_size=8).hexdigest()
