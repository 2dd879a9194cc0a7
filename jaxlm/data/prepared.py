# SPDX-License-Identifier: Apache-2.0
"""Prepared data: memory-mapped tokens and the table of which lie in which row. Needs numpy, no source and no tokenizer.

A folder holds `manifest.json` and three arrays a task: `tokens` and `trained` of all records one after the other, and
`segments` [segments, 3]: offset into them, length, index of the record; row r is made of the segments
`row_starts[r]` to `row_starts[r + 1]`. Padding, positions and segment ids are made when a row is read.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxlm.data.records import describe

FORMAT = 1  # raise it when encoding, packing or the files change: caches are made anew
ARRAYS = ("tokens", "trained", "segments", "row_starts")


class Prepared:
    """Rows of every task, by index. `manifest` is described where it is written, in `preparation.py`."""

    def __init__(self, folder: Path, manifest: dict[str, Any], arrays: list[dict[str, np.ndarray]]):
        self.folder = folder
        self.manifest = manifest
        self._arrays = arrays

    @property
    def key(self) -> str:
        """Names all that went into the rows: equal keys, equal rows."""
        return self.manifest["key"]

    @property
    def length(self) -> int:
        """T, tokens of a row."""
        return self.manifest["length"]

    @property
    def vocab_size(self) -> int:
        """One more than the tokenizer's largest id: the least vocabulary that a model needs."""
        return self.manifest["vocab_size"]

    @property
    def task_names(self) -> tuple[str, ...]:
        """All tasks of the config, those without records in this split too: `task_ids` index them."""
        return tuple(task["name"] for task in self.manifest["tasks"])

    @property
    def counts(self) -> dict[str, dict[str, Any]]:
        """Task -> records, tokens, trained_tokens, segments, rows, fill, and skipped by reason."""
        return {task["name"]: task["counts"] for task in self.manifest["tasks"]}

    @property
    def sample(self) -> str:
        """The first record of the first task, decoded, its trained part between [[ and ]]."""
        return next(task["sample"] for task in self.manifest["tasks"] if task["sample"])

    def num_rows(self, task: str) -> int:
        """Rows of a task; 0 where it has no records in this split."""
        return len(self._arrays[self.task_id(task)]["row_starts"]) - 1

    def task_id(self, task: str) -> int:
        """Index of a task's name.

        Raises: ValueError for a name that is not there.
        """
        if task not in self.task_names:
            raise ValueError(f"no task {task!r} in {self.folder}; there are {', '.join(self.task_names)}")
        return self.task_names.index(task)

    def describe(self, task_id: int, record_id: int) -> str:
        """Where a record of a batch came from: "file:line", "file row n", or the generator and its item."""
        return describe(self.manifest["tasks"][task_id]["places"], record_id)

    def row(self, task_id: int, index: int) -> dict[str, np.ndarray]:
        """One row as six arrays [T]: the fields of a batch."""
        arrays = self._arrays[task_id]
        begin, end = arrays["row_starts"][index : index + 2]
        offsets, lengths, records = arrays["segments"][begin:end].T
        filled = int(lengths.sum())
        positions = np.arange(filled) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        row = empty_row(self.length)
        where = np.repeat(offsets, lengths) + positions
        row["tokens"][:filled] = arrays["tokens"][where]
        row["loss_weights"][:filled] = arrays["trained"][where] & (positions > 0)
        row["positions"][:filled] = positions
        row["segment_ids"][:filled] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        row["record_ids"][:filled] = np.repeat(records, lengths)
        row["task_ids"][:] = task_id
        return row

    def summary(self) -> str:
        """A table for people: records, tokens, rows and skips of each task, then the sample."""
        lines = [f"{self.manifest['split']} data {self.key} in {self.folder}"]
        lines.append(f"{'task':<16}{'records':>9}{'tokens':>11}{'trained':>11}{'rows':>8}{'fill':>6}  skipped")
        for name, count in self.counts.items():
            skipped = ", ".join(f"{reason} {entry['count']}" for reason, entry in count["skipped"].items()) or "-"
            lines.append(
                f"{name:<16}{count['records']:>9}{count['tokens']:>11}{count['trained_tokens']:>11}{count['rows']:>8}"
                f"{count['fill']:>6.2f}  {skipped}"
            )
        return "\n".join([*lines, f"sample, [[trained]]: {self.sample}"])


def empty_row(length: int) -> dict[str, np.ndarray]:
    """A row of nothing but padding: weight 0, segment 0, record -1."""
    row = {name: np.zeros(length, np.int32) for name in ("tokens", "positions", "segment_ids", "task_ids")}
    return row | {"loss_weights": np.zeros(length, np.float32), "record_ids": np.full(length, -1, np.int32)}


def open_prepared(folder: str | Path, *, check: Literal["size", "digest"] = "size") -> Prepared:
    """Prepared data as it lies in a folder.

    Args:
      check: what each file must agree in with the manifest: its size, or its whole content.
    Raises: ValueError, naming the file that is missing, foreign or damaged.
    """
    folder = Path(folder)
    path = folder / "manifest.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no manifest.json: it is not prepared data; run scripts/prepare.py")
    try:
        manifest = json.loads(path.read_bytes())
        if manifest["format"] != FORMAT:
            raise ValueError(f"{path} has format {manifest['format']}, this version reads {FORMAT}: prepare again")
        arrays = [
            {name: _open(folder / entry["path"], entry, check) for name, entry in task["files"].items()}
            for task in manifest["tasks"]
        ]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): delete {folder} and prepare again") from error
    return Prepared(folder, manifest, arrays)


def sha256(path: Path) -> str:
    """Digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open(path: Path, entry: dict[str, Any], check: str) -> np.ndarray:
    remedy = f"delete {path.parent} and prepare again"
    if not path.is_file():
        raise ValueError(f"{path} is missing: {remedy}")
    if (size := path.stat().st_size) != entry["bytes"]:
        raise ValueError(f"{path} has {size} bytes, its manifest says {entry['bytes']}: {remedy}")
    if check == "digest" and sha256(path) != entry["sha256"]:
        raise ValueError(f"the content of {path} is not what its manifest says: {remedy}")
    try:
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): {remedy}") from error
