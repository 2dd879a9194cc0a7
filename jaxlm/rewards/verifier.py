# SPDX-License-Identifier: Apache-2.0
"""What a verifier is, how many answers are verified at once, and where a record keeps what is right."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxlm.data.records import BadRecord

Check = Callable[[str, Mapping[str, Any]], float]


class Verifier(Protocol):
    """How right a completion is, told from its text and the record that asked for it.

    Total in the text: whatever it holds, a verifier answers, in bounded time, and always the same. A record without
    what it needs to know is refused. All verifiers here are frozen dataclasses of their options; a function of
    (text, record) serves as well wherever a `Check` is asked for.
    """

    def __call__(self, text: str, record: Mapping[str, Any]) -> float:
        """In [0, 1]; 1 is right.  Raises: BadRecord (a ValueError), saying what the record lacks."""
        ...

    def answer(self, text: str, record: Mapping[str, Any]) -> str | None:
        """The answer that was found in the text, written so that equal answers are equal strings; None: no answer.

        `majority_at_k` votes with it.
        """
        ...


@runtime_checkable
class InBatches(Protocol):
    """A verifier that is faster with many answers: it works on several cores."""

    def many(self, texts: Sequence[str], records: Sequence[Mapping[str, Any]]) -> Sequence[float]: ...


def verify(check: Check, texts: Sequence[str], records: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """The scores of many answers, float64 [n] in [0, 1], the same as one at a time.

    Args:
      check: a verifier, or any function of (text, record) to a number or bool.
      texts: completions.
      records: the record of each; repeat a record whose answers are several.
    Raises: BadRecord, with the record's place; ValueError for unequal lengths, or a score outside [0, 1].

    >>> from jaxlm.rewards import NumericMatch
    >>> verify(NumericMatch(), ["I get 4.", "5"], [{"answer": "4"}] * 2).tolist()
    [1.0, 0.0]
    """
    if len(texts) != len(records):
        raise ValueError(
            f"{len(texts)} texts and {len(records)} records: every text needs the record that asked for it"
        )
    if isinstance(check, InBatches):
        scores = list(check.many(texts, records))
    else:
        scores = []
        for index, (text, record) in enumerate(zip(texts, records, strict=True)):
            with told_of(index):
                scores.append(float(check(text, record)))
    for index, score in enumerate(scores):
        if not 0 <= score <= 1:
            raise ValueError(f"text {index} was scored {score}: a verifier's score lies in [0, 1]")
    return np.array(scores, np.float64)


@contextlib.contextmanager
def told_of(index: int) -> Iterator[None]:
    """Puts a record's place in front of what a `BadRecord` says."""
    try:
        yield
    except BadRecord as error:
        raise BadRecord(error.reason, f"record {index}: {error}") from error


_FIELDS = ("answer", "answers", "completion", "messages")


def references(record: Mapping[str, Any], field: str | None = None) -> list[str]:
    """The right answers of a record, at least one; any of them is as good.

    Args:
      record: as `jaxlm.data` has them, or with an "answer".
      field: where it stands: text, a number, a list of these, or a mapping with such a list under "text" (SQuAD).
        None: the first there is of "answer", "answers", "completion", and the assistant's last message.
    Raises: BadRecord for a record without, or with an empty one.

    >>> references({"prompt": "1+1=", "completion": " 2"})
    [' 2']
    """
    if not isinstance(record, Mapping):
        raise BadRecord("not an object", f"a record must be an object with named fields, got {type(record).__name__}")
    names = _FIELDS if field is None else (field,)
    name = next((name for name in names if record.get(name) is not None), None)
    if name is None:
        there = sorted(map(str, record))
        raise BadRecord(
            "missing field",
            f"the record has no {' or '.join(map(repr, names))}, so that nothing says which answer is right; it has "
            f"{there}. Give it one, or name the field in the verifier's `field`",
        )
    value = record[name]
    if field is None and name == "messages":
        value = _last_answer(value)
    if isinstance(value, Mapping):
        value = value.get("text")
    found = list(value) if isinstance(value, list | tuple) else [value]
    for one in found:
        if isinstance(one, bool) or not isinstance(one, str | int | float):
            raise BadRecord("wrong type", f"{name!r} must be text, a number or a list of these, got {one!r:.80}")
    texts = [one if isinstance(one, str) else repr(one) for one in found]
    if not texts or not all(text.strip() for text in texts):
        raise BadRecord("empty answer", f"{name!r} is empty: any empty text would be right")
    return texts


def _last_answer(messages: Any) -> Any:
    said = [m for m in messages if isinstance(m, Mapping) and m.get("role") == "assistant"]
    if not said:
        raise BadRecord("missing field", "the record's messages hold none of the assistant: nothing says what is right")
    return said[-1].get("content")
