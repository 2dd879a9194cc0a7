# SPDX-License-Identifier: Apache-2.0
"""Held-out records as questions, an engine's samples as answers, a verifier's scores; a JSON line each.

Q questions of a task, n samples of each.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from jaxlm.data.config import Procedural, ProceduralPlans, ReasoningGym, Source, Task
from jaxlm.data.prepared import Prepared
from jaxlm.data.prompts import Prompt, prompts_of
from jaxlm.data.records import BadRecord, Text, parse
from jaxlm.data.sources import Records
from jaxlm.data.stream import named_seed
from jaxlm.evaluation_options import Generation
from jaxlm.generate.engine import Completion, Engine
from jaxlm.rewards.exercises import own_verifier
from jaxlm.rewards.matching import NormalisedMatch
from jaxlm.rewards.planned import PlannedAnswer
from jaxlm.rewards.verifier import Check, verify


class Asked(NamedTuple):
    """The questions of one task.

    Attributes:
      task: its name.
      prompts: of each question.
      records: as the source has them.
      places: where they stand in it, for people.
      verifier: who judges.
    """

    task: str
    prompts: Sequence[Prompt]
    records: Sequence[Mapping[str, Any]]
    places: Sequence[str]
    verifier: Check


class Answered(NamedTuple):
    """A task's questions and what came of them.

    Attributes:
      asked: the questions.
      completions: [Q][n].
      scores: [Q, n] float64 in [0, 1], 1 is right.
      answers: [Q][n] what the verifier read, equal where answers are; None: no answer, or a verifier that reads none.
    """

    asked: Asked
    completions: Sequence[Sequence[Completion]]
    scores: np.ndarray
    answers: Sequence[Sequence[str | None]]


def read_questions(rows: Prepared, tasks: Sequence[Task], generation: Generation, *, size: int) -> list[Asked]:
    """The questions of all tasks that are asked, checked: what cannot work is told before anything is sampled.

    Args:
      rows: the held-out split.
      tasks: of the config.
      generation: which tasks and records, and who judges.
      size: tokens of prompt and completion that the model can hold.
    Raises: ValueError for an unknown task, one without held-out records, a text, which asks nothing, a prompt that
      leaves no room for `max_tokens`; BadRecord for a record that the verifier cannot judge.
    """
    generation.check_tasks([task.name for task in tasks])
    names = generation.tasks or [task.name for task in tasks if rows.num_rows(task.name)]
    of_name = {task.name: task for task in tasks}
    record = Records([task.test for task in tasks])
    found = []
    for name in names:
        if not rows.num_rows(name):
            raise ValueError(f"task {name!r} has no held-out records to ask: give it a test source, or leave it out")
        prompts = _prompts(rows, name, generation.records)
        records = [record(prompt.task_id, prompt.record_id) for prompt in prompts]
        places = [rows.describe(prompt.task_id, prompt.record_id) for prompt in prompts]
        test = of_name[name].test
        asked = Asked(name, prompts, records, places, generation.verifiers.get(name) or usual_verifier(test))
        _check(asked, generation, size)
        found.append(asked)
    return found


def usual_verifier(source: Source | None) -> Check:
    """A generator's own scorer; for other records equality, spacing, case and punctuation at the ends aside."""
    if isinstance(source, Procedural | ReasoningGym):
        return own_verifier(source)
    if isinstance(source, ProceduralPlans):
        return PlannedAnswer()
    return NormalisedMatch(style="plain")


def end_tokens(questions: Iterable[Asked], tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The special tokens that the answers of these records end with: a template's end of turn, where it is not eos."""
    last = {int(prompt.answer[-1]) for asked in questions for prompt in asked.prompts}
    return sorted(last & {token for token, added in tokenizer.added_tokens_decoder.items() if added.special})


def answer(engine: Engine, asked: Asked, generation: Generation) -> Answered:
    """Samples and judges one task.

    A record's samples depend on the seed, the task's name and the record's place in the task, on nothing else: not on
    the number of slots, other tasks or how many records follow.
    """
    sampling = dataclasses.replace(generation.sampling, seed=named_seed(generation.sampling.seed, asked.task))
    completions = engine.sample([prompt.tokens.tolist() for prompt in asked.prompts], sampling)
    texts = [completion.text for group in completions for completion in group]
    records = [record for record in asked.records for _ in range(sampling.num_samples)]
    scores = verify(asked.verifier, texts, records).reshape(len(completions), -1)
    read = getattr(asked.verifier, "answer", None)
    answers = [None if read is None else read(*pair) for pair in zip(texts, records, strict=True)]
    groups = [answers[i : i + sampling.num_samples] for i in range(0, len(answers), sampling.num_samples)]
    return Answered(asked, completions, scores, groups)


def write_samples(path: Path, answered: Sequence[Answered], tokenizer: PreTrainedTokenizerFast) -> None:
    """A JSON line a sample: what was asked and said, and what was made of it; in one piece or not at all."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as out:
        for line in _lines(answered, tokenizer):
            out.write(json.dumps(line) + "\n")
    part.replace(path)


def _lines(answered: Sequence[Answered], tokenizer: PreTrainedTokenizerFast) -> Iterable[dict[str, Any]]:
    for asked, completions, scores, answers in answered:
        for q, prompt in enumerate(asked.prompts):
            text = str(tokenizer.decode(prompt.tokens, clean_up_tokenization_spaces=False))
            for n, completion in enumerate(completions[q]):
                log_prob = float(completion.raw_log_probs.sum(dtype=np.float64))
                yield {
                    "task": asked.task,
                    "record": prompt.record_id,
                    "place": asked.places[q],
                    "sample": n,
                    "prompt": text,
                    "completion": completion.text,
                    "score": float(scores[q, n]),
                    "answer": answers[q][n],
                    "finish_reason": completion.finish_reason,
                    "tokens": completion.tokens.tolist(),
                    "log_prob": log_prob if math.isfinite(log_prob) else None,  # of a server that tells none
                }


def _prompts(rows: Prepared, task: str, limit: int | None) -> list[Prompt]:
    """The first prompts of a task in the order of its records, which rows do not keep; each record once."""
    found: dict[int, Prompt] = {}
    for index in range(rows.num_rows(task)):
        for prompt in prompts_of(rows.row(rows.task_id(task), index)):
            found.setdefault(prompt.record_id, prompt)
    return [found[record] for record in sorted(found)[:limit]]


def _check(asked: Asked, generation: Generation, size: int) -> None:
    most = generation.sampling.max_tokens
    for prompt, record, place in zip(asked.prompts, asked.records, asked.places, strict=True):
        if isinstance(parse(record), Text):
            raise ValueError(f"{place}: a text asks nothing; name the tasks that do in generation.tasks")
        if len(prompt.tokens) + most > size + 1:
            raise ValueError(
                f"{place}: a prompt of {len(prompt.tokens)} tokens and max_tokens {most} exceed the {size} tokens of "
                "the model: ask for fewer max_tokens, or leave the record out"
            )
    try:
        verify(asked.verifier, [""] * len(asked.records), asked.records)
    except BadRecord as error:  # it counts from the first record that is asked, people count in the source
        for record, place in zip(asked.records, asked.places, strict=True):
            _judged(asked.verifier, record, place)
        raise error


def _judged(verifier: Check, record: Mapping[str, Any], place: str) -> None:
    try:
        verifier("", record)
    except BadRecord as error:
        raise BadRecord(error.reason, f"{place}: {error}") from error
