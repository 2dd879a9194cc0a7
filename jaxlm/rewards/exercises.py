# SPDX-License-Identifier: Apache-2.0
"""Verifiers of generated exercises: jaxlm's own and those of reasoning-gym, each by the scorer of its generator."""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jaxlm.data.config import Procedural, ReasoningGym, Source
from jaxlm.data.procedural import score
from jaxlm.data.records import BadRecord, parse, question
from jaxlm.rewards.answers import Where, answer_text, tail
from jaxlm.rewards.verifier import Verifier, references, told_of
from jaxlm.rewards.workers import Workers, shared_workers

# Scorers that run the answer as code, by `eval` or sympy's parser: a model's text must never reach them.
_RUN_THE_ANSWER = frozenset(
    {
        "binary_matrix",
        "countdown",
        "intermediate_integration",
        "n_queens",
        "polynomial_multiplication",
        "puzzle24",
        "simple_integration",
        "spiral_matrix",
        "string_insertion",
    }
)
_WRONG = frozenset({"game_of_life_halting"})  # gives full marks to any text


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProceduralMatch:
    """Right is what `jaxlm.data.procedural.score` says: the completion, outer white space aside.

    Attributes:
      where: which part of the text is scored, as in `answer_text`.

    >>> ProceduralMatch()(" 46", {"prompt": "12+34=", "completion": " 46"})
    1.0
    """

    where: Where = "whole"

    def __call__(self, text: str, record: Mapping[str, Any]) -> float:
        completion = references(record, "completion")[0]
        found = self.answer(text, record)
        return 0.0 if found is None else score(found, {"completion": completion})

    def answer(self, text: str, record: Mapping[str, Any]) -> str | None:
        found = answer_text(text, self.where)
        return None if found is None else found.strip() or None


@dataclasses.dataclass(frozen=True, kw_only=True)
class GymMatch:
    """Right is what the generator's own scorer in reasoning-gym says, which knows of other right answers.

    Needs the extra `tasks`. The exercise is found by its prompt and made anew in a worker process (`workers.py`),
    where its scorer reads the text. Nine generators whose scorers run the answer as code are refused, and one whose
    scorer calls everything right.

    Attributes:
      source: that the records come from.
      marks: "full", 1 for full marks and else 0: most scorers give some part to rubbish, and part marks to an answer
        inside a sentence; "part", their mark as it is.
      where: which part of the text is scored; full marks need the bare answer, so "marked" suits models that explain.
      cpu_seconds, workers: as in `MathMatch`.

    Source: github.com/open-thought/reasoning-gym, `ProceduralDataset.score_answer`.
    """

    source: ReasoningGym
    marks: Literal["full", "part"] = "full"
    where: Where = "marked"
    cpu_seconds: float = 5.0
    workers: int = 2

    def __post_init__(self):
        name = self.source.generator
        if name in _RUN_THE_ANSWER:
            raise ValueError(
                f"the scorer of generator {name!r} runs the answer as code, and a model's answer is nobody's code: "
                "compare with the stored answer instead, by NormalisedMatch(style='plain')"
            )
        if name in _WRONG:
            raise ValueError(
                f"the scorer of generator {name!r} calls any text right: use NormalisedMatch(style='plain')"
            )
        if self.marks not in ("full", "part"):
            raise ValueError(f"marks must be 'full' or 'part', got {self.marks!r}")
        if not 0 < self.cpu_seconds < float("inf"):
            raise ValueError(f"cpu_seconds must be positive and finite, got {self.cpu_seconds}")
        if self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}")

    def __call__(self, text: str, record: Mapping[str, Any]) -> float:
        return self.many([text], [record])[0]

    def many(self, texts: Sequence[str], records: Sequence[Mapping[str, Any]]) -> list[float]:
        exercises = _exercises(
            self.source.generator, self.source.size, self.source.seed, json.dumps(dict(self.source.options))
        )
        scores = [0.0] * len(texts)
        asked, requests = [], []
        for index, (text, record) in enumerate(zip(texts, records, strict=True)):
            with told_of(index):
                asks = question(parse(record))
            if asks not in exercises:
                raise BadRecord(
                    "unknown exercise",
                    f"record {index} asks {asks!r:.80}, which is none of the {self.source.size} exercises "
                    f"of {self.source.generator!r} with seed {self.source.seed}: give the source of the records",
                )
            if (found := self.answer(text, record)) is None:
                continue
            place, asked_for = exercises[asks]
            asked.append(index)
            request = {"source": dataclasses.asdict(self.source), "index": place, "question": asked_for, "text": found}
            requests.append(request)
        if requests:
            for index, mark in zip(asked, self.processes().ask(requests), strict=True):
                scores[index] = mark if self.marks == "part" else float(mark == 1.0)
        return scores

    def answer(self, text: str, record: Mapping[str, Any]) -> str | None:
        found = answer_text(text, self.where)
        return None if found is None else tail(found).strip() or None

    def processes(self) -> Workers:
        """Those that score; they count what was cut off (`killed`) and what raised (`raised`)."""
        return shared_workers("gym", size=self.workers, cpu_seconds=self.cpu_seconds)


def own_verifier(source: Source) -> Verifier:
    """The verifier of a source of generated exercises.

    Raises: ValueError for a source without a scorer of its own, or with one that cannot be used.

    >>> own_verifier(Procedural(generator="addition", size=10))
    ProceduralMatch(where='whole')
    """
    if isinstance(source, Procedural):
        return ProceduralMatch()
    if isinstance(source, ReasoningGym):
        return GymMatch(source=source)
    raise ValueError(
        f"a source {type(source).__name__} says nothing about how its answers are checked: choose a verifier, "
        "such as NormalisedMatch, NumericMatch, MathMatch or MultipleChoice"
    )


@functools.lru_cache(maxsize=8)
def _exercises(generator: str, size: int, seed: int, options: str) -> dict[str, tuple[int, str]]:
    """Question as `question` gives it -> (index, question as the generator made it); of equal ones the first."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError(
            f"generator {generator!r} needs the package reasoning-gym: pip install 'jaxlm[tasks]'"
        ) from error
    items = reasoning_gym.create_dataset(generator, size=size, seed=seed, **json.loads(options))
    found: dict[str, tuple[int, str]] = {}
    for index in range(size):
        asks = items[index]["question"]
        found.setdefault(asks.strip(), (index, asks))
    return found
