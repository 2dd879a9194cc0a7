# SPDX-License-Identifier: Apache-2.0
"""What to learn from: named tasks, where their records come from, how they become rows. Standard library only.

A record is {"messages": [{"role", "content"}, ...]}, {"prompt", "chosen", "rejected"}, {"prompt", "completion"},
{"question", "plan", "steps", "answer"} or {"text"}; the first of the five that a record has is used.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class JsonLines:
    """One JSON object a line; `.gz` is unpacked. Blank lines are passed over."""

    path: str  # a file, or a glob pattern whose files are read in sorted order
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)  # our name -> theirs: {"prompt": "question"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parquet:
    """One record a row of a Parquet file."""

    path: str  # a file, or a glob pattern whose files are read in sorted order
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)  # our name -> theirs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hub:
    """A data set of the `datasets` library, by hub name or local folder; never runs remote code."""

    name: str
    split: str
    config: str | None = None  # the data set's own configuration, "main" of GSM8K
    revision: str | None = None  # pin it: a branch moves
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)  # our name -> theirs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Procedural:
    """A built-in seeded generator of small verifiable exercises; needs nothing. Names: `data/procedural.py`."""

    generator: str
    size: int
    seed: int = 0  # any two seeds are independent
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # the generator's difficulty


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProceduralPairs:
    """Preference pairs of a built-in generator: its answer, and the same with one digit or letter wrong."""

    generator: str
    size: int
    seed: int = 0
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # the generator's difficulty


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProceduralPlans:
    """A built-in generator of exercises that knows the plan too: names in `data/plans.py`."""

    generator: str
    size: int
    seed: int = 0
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # the generator's difficulty


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReasoningGym:
    """A generator of the `reasoning-gym` package (extra `tasks`).

    Item i depends on seed + i alone in most of its generators, so seeds must lie further apart than the sizes.
    """

    generator: str
    size: int
    seed: int = 0
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # the generator's own config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """Records given as they are."""

    records: tuple[Mapping[str, Any], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongText:
    """A part of one long text as a single record; `DataConfig.on_long="split"` cuts it into rows."""

    path: str = ""  # UTF-8 text, or .json and .jsonl with a field "text"; "": the documentation in every Python
    begin: float = 0.0  # share of the characters before the part, [0, 1)
    end: float = 1.0  # share up to its end, (begin, 1]

    def __post_init__(self):
        if not 0 <= self.begin < self.end <= 1:
            raise ValueError(f"a part of a text lies in 0 <= begin < end <= 1, got {self.begin} to {self.end}")


Source = JsonLines | Parquet | Hub | Procedural | ProceduralPairs | ProceduralPlans | ReasoningGym | Rows | LongText


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One named task of a mixture; losses and metrics are reported by its name."""

    name: str  # no "/": names end up in metrics as loss/<name>
    train: Source | None  # None: held out only, to see what training on the other tasks does to it
    test: Source | None = None
    weight: float = 1.0  # > 0, share of the rows drawn, relative to the other tasks

    def __post_init__(self):
        if not self.name or "/" in self.name:
            raise ValueError(f"task name must be non-empty and without '/', got {self.name!r}")
        if not self.weight > 0:
            raise ValueError(f"weight of task {self.name!r} must be positive, got {self.weight}; leave the task out")
        train, test = self.train, self.test
        if train is None and test is None:
            raise ValueError(f"task {self.name!r} has neither a train nor a test source")
        if not (isinstance(train, ReasoningGym) and isinstance(test, ReasoningGym)):
            return
        meet = train.seed < test.seed + test.size and test.seed < train.seed + train.size
        if train.generator == test.generator and meet:
            raise ValueError(
                f"task {self.name!r}: item i of {train.generator!r} depends on seed + i alone, so train seed "
                f"{train.seed} (size {train.size}) and test seed {test.seed} (size {test.size}) share items; "
                f"set the test seed to 10**7"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How the records of all tasks become rows of one length."""

    tasks: tuple[Task, ...]
    length: int = 512  # T, tokens of a row
    packing: Literal["first_fit", "none"] = "first_fit"  # none: one record a row
    prompts: Literal["raw", "chat"] = "raw"  # prompt/completion records: joined as they are, or by the chat template
    on_bad: Literal["error", "skip"] = "error"  # a broken record; skips are counted by reason
    on_long: Literal["error", "skip", "split"] = "error"  # longer than `length`; split: text records only
    test_overlap: Literal["drop", "keep"] = "drop"  # of test records whose prompt the train source has; counted

    def __post_init__(self):
        if not self.tasks:
            raise ValueError("tasks is empty: name at least one Task")
        names = [task.name for task in self.tasks]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"task names must differ, got {twice} twice")
        if self.length < 2:
            raise ValueError(f"length must be at least 2 tokens, got {self.length}")

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names in order; `task_ids` of a batch index them."""
        return tuple(task.name for task in self.tasks)

    @property
    def weights(self) -> dict[str, float]:
        """Name -> weight, as `batches` takes it."""
        return {task.name: task.weight for task in self.tasks}
