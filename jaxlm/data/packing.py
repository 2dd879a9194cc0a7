# SPDX-License-Identifier: Apache-2.0
"""Records into rows of one length."""

from collections.abc import Sequence

import numpy as np


def one_a_row(lengths: Sequence[int], capacity: int) -> np.ndarray:
    """No packing: record i is alone in row i. [records] int64."""
    _check(lengths, capacity)
    return np.arange(len(lengths))


def first_fit(lengths: Sequence[int], capacity: int) -> np.ndarray:
    """The row of each record, when each goes to the first row that still has room for it.

    A tree of maxima over the room left in the rows finds that row in O(log rows).

    Args:
      lengths: tokens of each record, in [1, capacity].
      capacity: tokens of a row.
    Returns: [records] int64; rows are numbered in the order of their first records.

    >>> first_fit([3, 4, 2, 1], capacity=5).tolist()
    [0, 1, 0, 1]
    """
    _check(lengths, capacity)
    leaves = 1
    while leaves < len(lengths):
        leaves *= 2
    room = [capacity] * (2 * leaves)  # node n has the children 2n and 2n + 1; the leaves are the rows
    rows = np.empty(len(lengths), np.int64)
    for index, length in enumerate(lengths):
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < length:
                node += 1
        rows[index] = node - leaves
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return rows


def _check(lengths: Sequence[int], capacity: int) -> None:
    for length in lengths:
        if not 1 <= length <= capacity:
            raise ValueError(f"a record of {length} tokens does not fit rows of {capacity}")


PACKINGS = {"first_fit": first_fit, "none": one_a_row}
