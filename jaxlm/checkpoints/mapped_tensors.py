# SPDX-License-Identifier: Apache-2.0
"""Tensors of safetensors files as memory maps, and files written tensor by tensor: no tensor need be in memory."""

import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, NamedTuple

import ml_dtypes
import numpy as np

from jaxlm.checkpoints.safetensors_folder import INDEX, SafetensorsFolder

TYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in TYPES.items()}


class Entry(NamedTuple):
    """One tensor to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Its bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


class MappedTensors:
    """The tensors of a checkpoint folder, or of one safetensors file, as read-only maps.

    Attributes:
      called: the path, for messages.
      entries: name -> Entry, sorted by name.

    Raises: ValueError that names the file, as `SafetensorsFolder`; for a type that is none of TYPES.
    """

    def __init__(self, path: str | os.PathLike[str]):
        path = pathlib.Path(path)
        self.called = str(path)
        if path.is_file():
            files = [path]
        else:
            files = sorted(path / file for file in SafetensorsFolder(path).files)
        self._flat: dict[str, np.ndarray] = {}
        entries = {}
        for file in files:
            for entry, flat in _map(file):
                entries[entry.name] = entry
                self._flat[entry.name] = flat
        self.entries = dict(sorted(entries.items()))

    def flat(self, name: str) -> np.ndarray:
        """One tensor as a flat map of its file; pages are read when touched."""
        return self._flat[name]


def _map(file: pathlib.Path) -> Iterable[tuple[Entry, np.ndarray]]:
    whole = np.memmap(file, np.uint8, mode="r")
    length = int.from_bytes(whole[:8].tobytes(), "little")
    if length > whole.size - 8:
        raise ValueError(f"{file} is not a whole safetensors file: fetch it again")
    header = json.loads(whole[8 : 8 + length].tobytes())
    for name, about in header.items():
        if name == "__metadata__":
            continue
        if about["dtype"] not in TYPES:
            raise ValueError(f"{name} in {file} is {about['dtype']}, not {', '.join(TYPES)}: save it dequantised")
        entry = Entry(name, TYPES[about["dtype"]], tuple(about["shape"]))
        start, stop = (8 + length + offset for offset in about["data_offsets"])
        if stop > whole.size or stop - start != entry.num_bytes:
            raise ValueError(f"{file} is not a whole safetensors file, {name} does not fit: fetch it again")
        yield entry, whole[start:stop].view(entry.dtype)


def shards(entries: Sequence[Entry], limit: float) -> dict[str, list[Entry]]:
    """File name -> its tensors, filled in order; one file alone is model.safetensors."""
    files: list[list[Entry]] = [[]]
    for entry in entries:
        if files[-1] and sum(held.num_bytes for held in files[-1]) + entry.num_bytes > limit:
            files.append([])
        files[-1].append(entry)
    if len(files) == 1:
        return {"model.safetensors": files[0]}
    return {f"model-{i:05d}-of-{len(files):05d}.safetensors": held for i, held in enumerate(files, 1)}


def write_header(stream: IO[bytes], entries: Sequence[Entry]) -> None:
    """The head of a safetensors file; the tensors' bytes follow in this order."""
    about: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        span = [offset, offset + entry.num_bytes]
        about[entry.name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(about, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)


def write_index(folder: pathlib.Path, files: Mapping[str, Sequence[Entry]]) -> None:
    """The index of several files."""
    where = {entry.name: file for file, entries in files.items() for entry in entries}
    total = sum(entry.num_bytes for entries in files.values() for entry in entries)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
