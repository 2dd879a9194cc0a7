# SPDX-License-Identifier: Apache-2.0
"""Where records come from: each source as numbered records, with the identity of its content and the place of each."""

import dataclasses
import glob
import gzip
import hashlib
import importlib.metadata
import json
import os
import pathlib
import pydoc_data.topics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow.parquet

from jaxlm.data import plans, procedural
from jaxlm.data.config import (
    Hub,
    JsonLines,
    LongText,
    Parquet,
    Procedural,
    ProceduralPairs,
    ProceduralPlans,
    ReasoningGym,
    Rows,
    Source,
)
from jaxlm.data.records import BadRecord, Place

Numbered = Iterator[tuple[int, Any]]  # (index in the source, record); a BadRecord stands for one that cannot be read


@dataclasses.dataclass
class Reader:
    """A source, ready to be read in order."""

    identity: dict[str, Any]  # all that decides what the records are; json-able
    records: Callable[[], Numbered]
    places: list[Place]  # grows while several files are read


def open_source(source: Source) -> Reader:
    """The reader of any source of `data/config.py`.

    Raises: ValueError or ImportError, naming the file, generator or package that is missing.
    """
    return _READERS[type(source)](source)


class Records:
    """Records as their sources have them, by `(task id, record id)` of a batch; a source is read when first asked for.

    >>> from jaxlm.data.config import Rows
    >>> Records([Rows(records=({"prompt": "1+1=", "completion": "2", "level": 3},))])(0, 0)["level"]
    3
    """

    def __init__(self, sources: Sequence[Source | None]):
        self._sources = sources
        self._read: dict[int, dict[int, Any]] = {}

    def __call__(self, task_id: int, record_id: int) -> Any:
        if task_id not in self._read:
            source = self._sources[task_id]
            if source is None:
                raise ValueError(f"task {task_id} has no source to read record {record_id} from")
            self._read[task_id] = dict(open_source(source).records())
        return self._read[task_id][record_id]

    def everything(self) -> Iterator[tuple[int, int, Any]]:
        """(task id, record id, record) of all that can be read, whether or not it was good enough to be prepared."""
        for task_id, source in enumerate(self._sources):
            for record_id, record in open_source(source).records() if source is not None else ():
                if not isinstance(record, BadRecord):
                    yield task_id, record_id, record


_BLANK = object()  # a place without a record: it counts, so that places stay line numbers


def _by_file(source: JsonLines | Parquet, unit: str, read: Callable[[str], Iterator[Any]]) -> Reader:
    """The records of all files, one file after the other; `unit` names a place in a file."""
    paths = _files(source.path)
    places: list[Place] = []

    def records() -> Numbered:
        places.clear()
        index = 0
        for path in paths:
            places.append(Place(index, path, unit))
            for record in read(path):
                if record is not _BLANK:
                    yield index, _renamed(record, source.fields)
                index += 1

    return Reader({**_definition(source), "files": [_sha256(path) for path in paths]}, records, places)


def _json_lines(source: JsonLines) -> Reader:
    def read(path: str) -> Iterator[Any]:
        with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as lines:
            for line in lines:
                yield _parsed(line) if line.strip() else _BLANK

    return _by_file(source, "line", read)


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both
        return BadRecord("broken line", f"not a JSON object: {error}")


def _parquet(source: Parquet) -> Reader:
    def read(path: str) -> Iterator[Any]:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()

    return _by_file(source, "row", read)


def _hub(source: Hub) -> Reader:
    import datasets  # takes a second and more, and few runs need it

    if os.path.exists(os.path.join(source.name, "state.json")):  # a folder written by Dataset.save_to_disk
        rows = datasets.load_from_disk(source.name)
    else:
        rows = datasets.load_dataset(source.name, source.config, split=source.split, revision=source.revision)

    def records() -> Numbered:
        for index, record in enumerate(rows):
            yield index, _renamed(record, source.fields)

    identity = {**_definition(source), "fingerprint": rows._fingerprint}
    return Reader(identity, records, [Place(0, f"{source.name}[{source.split}]", "row")])


_EXERCISES: Mapping[type, Any] = {
    Procedural: procedural.Exercises,
    ProceduralPairs: procedural.Pairs,
    ProceduralPlans: plans.PlannedExercises,
}


def _procedural(source: Procedural | ProceduralPairs | ProceduralPlans) -> Reader:
    exercises = _EXERCISES[type(source)](source)
    version = plans.VERSION if isinstance(source, ProceduralPlans) else procedural.VERSION
    identity = {**_definition(source), "version": version}
    return Reader(
        identity,
        lambda: ((i, exercises[i]) for i in range(len(exercises))),
        [Place(0, f"{source.generator} of seed {source.seed}", "item")],
    )


# Where a generator leaves `answer` empty because many are right, one of them may stand in its metadata.
_ANSWER_IN_METADATA = {
    "graph_color": "possible_answer",
    "propositional_logic": "example_answer",
    "rubiks_cube": "example_correct_answer",
}
_NO_ANSWER = ("boxnet", "rush_hour")


def _reasoning_gym(source: ReasoningGym) -> Reader:
    if source.generator in _NO_ANSWER:
        raise ValueError(f"generator {source.generator!r} stores no answer to learn from; choose another")
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError(
            f"generator {source.generator!r} needs the package reasoning-gym: pip install 'jaxlm[tasks]'"
        ) from error
    items = reasoning_gym.create_dataset(source.generator, size=source.size, seed=source.seed, **source.options)

    def records() -> Numbered:
        for index in range(source.size):
            item = items[index]
            answer = item["answer"]
            if answer is None:
                answer = item["metadata"].get(_ANSWER_IN_METADATA.get(source.generator))
            if answer is None:
                yield index, BadRecord("missing field", f"generator {source.generator!r} stores no answer")
                continue
            text = answer if isinstance(answer, str) else json.dumps(answer)
            yield index, {"prompt": item["question"].rstrip() + "\n", "completion": text.strip()}

    identity = {**_definition(source), "version": importlib.metadata.version("reasoning-gym")}
    return Reader(identity, records, [Place(0, f"{source.generator} of seed {source.seed}", "item")])


def _rows(source: Rows) -> Reader:
    content = hashlib.sha256(json.dumps(source.records, sort_keys=True).encode()).hexdigest()
    return Reader(
        {"kind": "Rows", "content": content}, lambda: enumerate(source.records), [Place(0, "given", "record")]
    )


def _long_text(source: LongText) -> Reader:
    whole, name = _whole_text(source.path), source.path or "Python's documentation"
    part = whole[round(source.begin * len(whole)) : round(source.end * len(whole))]
    content = hashlib.sha256(part.encode()).hexdigest()
    return Reader(
        {"kind": "LongText", "content": content},
        lambda: iter([(0, {"text": part})]),
        [Place(0, f"{name}, {source.begin:g} to {source.end:g}", "part")],
    )


def _whole_text(path: str) -> str:
    """The text of a file, or of the topics that `help()` knows, which differ a little from one Python to the next."""
    if not path:
        return "\n\n".join(pydoc_data.topics.topics.values())
    if not path.endswith((".json", ".jsonl")):
        return "\n\n".join(pathlib.Path(file).read_text(encoding="utf-8") for file in _files(path))
    found = [record for _, record in _json_lines(JsonLines(path=path)).records()]
    for record in found:
        if not (isinstance(record, Mapping) and isinstance(record.get("text"), str)):
            raise ValueError(f"{path}: every line must be an object with a text under 'text', got {str(record)[:80]!r}")
    return "\n\n".join(record["text"] for record in found)


_READERS: Mapping[type, Callable[[Any], Reader]] = {
    JsonLines: _json_lines,
    Parquet: _parquet,
    Hub: _hub,
    Procedural: _procedural,
    ProceduralPairs: _procedural,
    ProceduralPlans: _procedural,
    ReasoningGym: _reasoning_gym,
    Rows: _rows,
    LongText: _long_text,
}


def _renamed(record: Any, fields: Mapping[str, str]) -> Any:
    if not fields or not isinstance(record, Mapping):
        return record
    for theirs in fields.values():
        if theirs not in record:
            return BadRecord("missing field", f"field {theirs!r} is missing; the record has {sorted(record)}")
    return {ours: record[theirs] for ours, theirs in fields.items()}


def _definition(source: Source) -> dict[str, Any]:
    return {"kind": type(source).__name__, **dataclasses.asdict(source)}


def _files(path: str) -> list[str]:
    """The file, or the sorted files of a glob pattern."""
    found = [path] if os.path.isfile(path) else sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
    if not found:
        raise ValueError(f"no file matches {path!r} (looked from {os.getcwd()})")
    return found


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
