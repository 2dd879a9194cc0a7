# SPDX-License-Identifier: Apache-2.0
"""The answer of a record with question, plan, steps and answer: behind `<ans>`, or on the last line."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxlm.rewards.matching import NormalisedMatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedAnswer:
    """1.0 where what stands behind the last `<ans>` of a text, or on its last line if there is none, is the answer.

    Case, spacing and punctuation at the ends aside.

    >>> PlannedAnswer()("19 15 45<ans>45", {"answer": "45"}), PlannedAnswer()("19 15", {"answer": "45"})
    (1.0, 0.0)
    """

    mark: str = "<ans>"
    field: str = "answer"

    def __call__(self, text: str, record: Mapping[str, Any]) -> float:
        return self._match(self._behind(text), record)

    def answer(self, text: str, record: Mapping[str, Any]) -> str | None:
        return self._match.answer(self._behind(text), record)

    @property
    def _match(self) -> NormalisedMatch:
        return NormalisedMatch(style="plain", field=self.field)

    def _behind(self, text: str) -> str:
        _, found, behind = text.rpartition(self.mark)
        return behind if found else text.strip().rpartition("\n")[2]
