# SPDX-License-Identifier: Apache-2.0
"""Packing: every record in one row, no row overfull, none opened too early."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.data.packing import PACKINGS, first_fit, one_a_row

lengths = st.lists(st.integers(1, 16), max_size=60)


@settings(deadline=None)
@given(lengths=lengths)
def test_first_fit_equals_trying_the_rows_one_by_one(lengths):
    room = []
    expected = []
    for length in lengths:
        row = next((row for row, left in enumerate(room) if left >= length), len(room))
        if row == len(room):
            room.append(16)
        room[row] -= length
        expected.append(row)
    assert first_fit(lengths, 16).tolist() == expected


def test_rows_of_many_short_records_are_nearly_full():
    lengths = np.random.default_rng(0).integers(5, 60, size=2000)
    rows = first_fit(lengths.tolist(), 256)
    assert lengths.sum() / (256 * (rows.max() + 1)) > 0.98


def test_without_packing_each_record_has_a_row():
    assert one_a_row([3, 16, 1], 16).tolist() == [0, 1, 2]


@pytest.mark.parametrize("pack", PACKINGS.values())
@pytest.mark.parametrize("length", [0, 17])
def test_a_record_that_fits_no_row_is_refused(pack, length):
    with pytest.raises(ValueError, match=f"{length} tokens does not fit rows of 16"):
        pack([4, length], 16)
