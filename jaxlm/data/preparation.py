# SPDX-License-Identifier: Apache-2.0
"""Records to prepared data: encoded once, packed a task at a time, written whole or not at all."""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from jaxlm.data.config import DataConfig, Source
from jaxlm.data.encode import Encoded, Encoder
from jaxlm.data.packing import PACKINGS
from jaxlm.data.prepared import ARRAYS, FORMAT, Prepared, open_prepared, sha256
from jaxlm.data.records import BadRecord, Text, describe, parse, parts_of, question
from jaxlm.data.sources import Reader, open_source

log = logging.getLogger("jaxlm.data")


def prepare(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, *, split: Literal["train", "test"], directory: str | Path
) -> Prepared:
    """The rows of one split of all tasks; made where `directory` does not hold them yet.

    The folder is named by a key over everything that decides the rows: tokenizer with its template, length, packing,
    the policies, the content of the sources, the version of this code. Mixture weights are not among them.

    Raises: ValueError, naming file, line and record, for what cannot be trained on, unless the config skips it; also
      where a task is left with no record.
    """
    encoder = Encoder(tokenizer, prompts=config.prompts)
    readers = [_open(getattr(task, split)) for task in config.tasks]
    if not any(readers):
        raise ValueError(f"no task has a {split} source: {', '.join(config.task_names)}")
    others: list[Reader | None] = [None] * len(readers)
    if split == "test" and config.test_overlap == "drop":
        others = [_open(task.train) if task.test else None for task in config.tasks]
    recipe = {
        "format": FORMAT,
        "split": split,
        "tokenizer": encoder.digest,
        "length": config.length,
        "packing": config.packing,
        "prompts": config.prompts,
        "on_bad": config.on_bad,
        "on_long": config.on_long,
        "tasks": [
            {"name": name, "source": reader and reader.identity, "without": other and other.identity}
            for name, reader, other in zip(config.task_names, readers, others, strict=True)
        ],
    }
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    directory = Path(directory)
    folder = directory / f"{split}-{key}"
    if (folder / "manifest.json").exists():
        log.info("%s data %s: found in %s", split, key, folder)
        return open_prepared(folder)
    directory.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".unfinished-{split}-{key}-", dir=directory))
    try:
        tasks = [
            _write_task(unfinished, index, config, encoder, reader, other)
            for index, (reader, other) in enumerate(zip(readers, others, strict=True))
        ]
        manifest = {
            "format": FORMAT,
            "key": key,
            "split": split,
            "length": config.length,
            "vocab_size": max(tokenizer.get_vocab().values()) + 1,
            "tasks": tasks,
            "recipe": recipe,
        }
        (unfinished / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        _publish(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    log.info("%s data %s: written to %s", split, key, folder)
    return open_prepared(folder)


def _open(source: Source | None) -> Reader | None:
    return None if source is None else open_source(source)


def _publish(unfinished: Path, folder: Path) -> None:
    """Gives the finished folder its name; another process may have been first, with the same content."""
    unfinished.chmod(0o755)
    try:
        os.rename(unfinished, folder)
    except OSError:
        if not (folder / "manifest.json").exists():
            raise


class _Item(NamedTuple):
    """A usable record; `number` is its place in the source. A preference has two parts, chosen and rejected."""

    number: int
    parts: list[Encoded]


def _write_task(
    folder: Path, number: int, config: DataConfig, encoder: Encoder, reader: Reader | None, other: Reader | None
) -> dict[str, Any]:
    """Writes the arrays of one task and returns its part of the manifest."""
    name = config.task_names[number]
    skipped: dict[str, dict[str, Any]] = {}
    lengths, offsets, records = [], [], []
    units: list[int] = []  # of each segment; those of one number share a row, in this order
    counts: Counter[str] = Counter()
    sample = ""
    paths = {array: folder / f"{number}.{array}.npy" for array in ARRAYS}
    with _Column(paths["tokens"], np.int32) as tokens, _Column(paths["trained"], np.bool_) as trained:
        for item in _items(name, config, encoder, reader, other, skipped) if reader else ():
            sample = sample or " and ".join(_sample(encoder, part) for part in item.parts)
            counts["records"] += 1
            first = len(units)
            for part in item.parts:
                counts["trained_tokens"] += int(part.trained.sum())
                for start, length in _pieces(len(part.tokens), config.length):
                    units.append(first if len(item.parts) > 1 else len(units))
                    lengths.append(length)
                    offsets.append(tokens.length + start)
                    records.append(item.number)
                tokens.append(part.tokens)
                trained.append(part.trained)
    for reason, entry in skipped.items():
        log.warning("task %s: %d records skipped (%s), first: %s", name, entry["count"], reason, entry["first"])
    if reader and not records:
        reasons = "; ".join(f"{entry['count']} {reason}, first: {entry['first']}" for reason, entry in skipped.items())
        raise ValueError(f"task {name!r} has no usable record: {reasons or 'its source is empty'}")
    _, which = np.unique(np.array(units, np.int64), return_inverse=True)
    together = np.bincount(which, lengths).astype(int).tolist()
    rows = PACKINGS[config.packing](together, config.length)[which]
    order = np.argsort(rows, kind="stable")
    segments = np.array([offsets, lengths, records], np.int64).reshape(3, -1).T[order]
    num_rows = int(rows.max(initial=-1)) + 1
    np.save(paths["segments"], segments)
    np.save(paths["row_starts"], np.searchsorted(rows[order], np.arange(num_rows + 1)))
    used = int(sum(lengths))
    return {
        "name": name,
        "files": {
            array: {"path": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}
            for array, path in paths.items()
        },
        "counts": {
            "records": counts["records"],
            "tokens": used,
            "trained_tokens": counts["trained_tokens"],
            "segments": len(lengths),
            "rows": num_rows,
            "fill": round(used / (num_rows * config.length), 4) if num_rows else 0.0,
            "skipped": skipped,
        },
        "places": [list(place) for place in reader.places] if reader else [],
        "sample": sample,
    }


def _items(
    name: str, config: DataConfig, encoder: Encoder, reader: Reader, other: Reader | None, skipped: dict[str, Any]
) -> Iterator[_Item]:
    """The usable records of a task; the others raise, or are entered in `skipped`."""
    asked = _questions(other) if other else frozenset()

    def skip(reason: str, message: str) -> None:
        entry = skipped.setdefault(reason, {"count": 0, "first": message})
        entry["count"] += 1

    for index, record in reader.records():
        place = describe(reader.places, index)
        try:
            if isinstance(record, BadRecord):
                raise record
            parsed = parse(record)
            if asked and _digest(question(parsed)) in asked:
                skip("seen in training", place)
                continue
            parts = [encoder.encode(part) for part in parts_of(parsed)]
        except BadRecord as error:
            message = f"{place}: {error} (task {name!r})"
            if config.on_bad == "error":
                raise ValueError(f"{message}; on_bad='skip' counts and skips such records") from error
            skip(error.reason, message)
            continue
        divisible = config.on_long == "split" and isinstance(parsed, Text)
        count = sum(len(part.tokens) for part in parts)
        if count > config.length and not divisible:
            message = f"{place}: {count} tokens are longer than the window of {config.length} (task {name!r})"
            if config.on_long != "skip":
                remedy = "on_long='skip' counts and skips such records, 'split' divides texts"
                raise ValueError(f"{message}; {remedy}")
            skip("too long", message)
            continue
        yield _Item(index, parts)


def _questions(reader: Reader) -> frozenset[bytes]:
    """Digests of all that is asked in a source; what cannot be read asks nothing."""
    found = set()
    for _, record in reader.records():
        try:
            found.add(_digest(question(parse(record))))
        except BadRecord:
            continue
    return frozenset(found)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _pieces(total: int, length: int) -> Iterator[tuple[int, int]]:
    """(start, length) of the windows over a record; each starts with the last token of the one before.

    A window's first token is no target, so every token but the record's first is one exactly once.
    """
    start = 0
    while True:
        yield start, min(length, total - start)
        if start + length >= total:
            return
        start += length - 1


def _sample(encoder: Encoder, encoded: Encoded) -> str:
    """The record decoded, [[ and ]] around each trained part."""
    edges = np.flatnonzero(np.diff(encoded.trained)) + 1
    parts = []
    for tokens, trained in zip(np.split(encoded.tokens, edges), np.split(encoded.trained, edges), strict=True):
        text = str(encoder.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        parts.append(f"[[{text}]]" if trained[0] else text)
    return "".join(parts)


class _Column:
    """A one-dimensional .npy file that grows: raw at first, given its header when closed."""

    def __init__(self, path: Path, dtype: Any):
        self.length = 0
        self._path, self._raw, self._dtype = path, path.with_suffix(".raw"), np.dtype(dtype)

    def __enter__(self):
        self._file = self._raw.open("wb")
        return self

    def append(self, values: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(values, self._dtype).tobytes())
        self.length += len(values)

    def __exit__(self, *error):
        self._file.close()
        whole = np.memmap(self._raw, self._dtype, mode="r") if self.length else np.zeros(0, self._dtype)
        np.save(self._path, whole)
        self._raw.unlink()
