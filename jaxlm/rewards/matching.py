# SPDX-License-Identifier: Apache-2.0
"""Verifiers that compare texts: as they are, or after what does not matter has been taken away."""

import dataclasses
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

from jaxlm.rewards.answers import Where, answer_text
from jaxlm.rewards.verifier import references

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExactMatch:
    """Right is the reference itself, white space around it aside.

    Attributes:
      where: which part of the text is compared, as in `answer_text`.
      field: of the record, where the reference stands, as in `references`.

    >>> ExactMatch()("Paris\\n", {"prompt": "Capital of France?", "completion": " Paris"})
    1.0
    """

    where: Where = "whole"
    field: str | None = None

    def __call__(self, text: str, record: Mapping[str, Any]) -> float:
        right = {reference.strip() for reference in references(record, self.field)}
        return float(self.answer(text, record) in right)

    def answer(self, text: str, record: Mapping[str, Any]) -> str | None:
        found = answer_text(text, self.where)
        return None if found is None else found.strip() or None


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormalisedMatch:
    """Right is what equals the reference when case, spacing and punctuation are taken away.

    Attributes:
      style: "squad": lower case; no ASCII punctuation, no English articles; white space collapsed.
        "plain": Unicode compatibility form (NFKC) and case folded; white space collapsed; punctuation at the ends
        dropped, inside kept: 3.5 stays 3.5, where "squad" makes it 35.
      measure: "equal", or "f1": the overlap of words, part marks. The best of several references counts.
      where, field: as in `ExactMatch`.

    Source: the official script of SQuAD 1.1, Rajpurkar et al. 2016, arXiv:1606.05250.
    Departs: the script gives 1 to an empty answer for a reference of articles only; here an answer of nothing is wrong.

    >>> NormalisedMatch()("The  Eiffel tower!", {"answers": {"text": ["Eiffel Tower"]}})
    1.0
    """

    style: Literal["squad", "plain"] = "squad"
    measure: Literal["equal", "f1"] = "equal"
    where: Where = "whole"
    field: str | None = None

    def __post_init__(self):
        if self.style not in ("squad", "plain"):
            raise ValueError(f"style must be 'squad' or 'plain', got {self.style!r}")
        if self.measure not in ("equal", "f1"):
            raise ValueError(f"measure must be 'equal' or 'f1', got {self.measure!r}")

    def __call__(self, text: str, record: Mapping[str, Any]) -> float:
        right = [self._normal(reference) for reference in references(record, self.field)]
        found = self.answer(text, record)
        if found is None:
            return 0.0
        if self.measure == "equal":
            return float(found in right)
        return max(overlap(found, reference) for reference in right)

    def answer(self, text: str, record: Mapping[str, Any]) -> str | None:
        found = answer_text(text, self.where)
        return None if found is None else self._normal(found) or None

    def _normal(self, text: str) -> str:
        return squad_normal(text) if self.style == "squad" else plain_normal(text)


def squad_normal(text: str) -> str:
    """As SQuAD's script does it.

    >>> squad_normal("The U.S.A.,  a country")
    'usa country'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def plain_normal(text: str) -> str:
    """Case and spacing aside, and punctuation at the ends.

    >>> plain_normal('  "New  York." ')
    'new york'
    """
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return folded.strip(string.whitespace + ".,;:!?\"'`*_")


def overlap(answer: str, reference: str) -> float:
    """F1 of the words of two texts, counted with their repeats, in [0, 1].

    >>> overlap("in paris france", "paris")
    0.5
    """
    words, right = answer.split(), reference.split()
    shared = sum((Counter(words) & Counter(right)).values())
    return 2 * shared / (len(words) + len(right)) if shared else 0.0
