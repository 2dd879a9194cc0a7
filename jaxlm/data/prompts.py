# SPDX-License-Identifier: Apache-2.0
"""What a row asks: the tokens before the last answer of each of its records.  T tokens."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class Prompt(NamedTuple):
    """One record's question.

    Attributes:
      tokens: int32 [n], everything before the last answer.
      answer: int32 [m], that answer as it is trained, its end marker included.
      task_id, record_id: who it is, as in a batch.
    """

    tokens: np.ndarray
    answer: np.ndarray
    task_id: int
    record_id: int


def prompts_of(row: Mapping[str, np.ndarray]) -> list[Prompt]:
    """The prompts of one row, a record each; padding and records without a trained token have none.

    The last answer is the last run of trained tokens. A text, which is trained as a whole, leaves its first token: that
    is no question, and callers refuse it.

    Args:
      row: the six columns [T] of a batch, as `Prepared.row` has them.

    >>> row = {"tokens": [5, 6, 7, 8], "loss_weights": [0, 0, 1, 1], "segment_ids": [1, 1, 1, 1], "task_ids": [0] * 4}
    >>> [prompt] = prompts_of({name: np.array(x) for name, x in (row | {"record_ids": [9] * 4}).items()})
    >>> prompt.tokens.tolist(), prompt.answer.tolist(), prompt.record_id
    ([5, 6], [7, 8], 9)
    """
    found = []
    for segment in range(1, int(row["segment_ids"].max()) + 1):
        (places,) = np.nonzero(row["segment_ids"] == segment)
        tokens, (trained,) = row["tokens"][places], np.nonzero(row["loss_weights"][places] > 0)
        if len(trained):
            begin = int(trained[np.flatnonzero(np.diff(trained, prepend=-2) > 1)[-1]])
            who = (int(row[name][places[0]]) for name in ("task_ids", "record_ids"))
            found.append(Prompt(tokens[:begin], tokens[begin : trained[-1] + 1], *who))
    return found
