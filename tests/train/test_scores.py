# SPDX-License-Identifier: Apache-2.0
"""Laws of the scores over time: they outlive their process, are about the same records, and begin before training."""

import numpy as np
import pytest

from jaxlm.train.held_out import Items
from jaxlm.train.scores import Scores


def items(correct, *, nll=None, records=(4, 7, 9, 1, 3), tasks=(0, 0, 0, 2, 2), tokens=(2, 2, 4, 1, 1)):
    """Three records of task 0 and two of task 2."""
    nll = np.arange(1.0, 6.0) if nll is None else nll
    numbers = (np.asarray(x, np.float64) for x in (nll, tokens, correct))
    return Items(np.array(tasks), np.array(records), *numbers)


BEFORE, AFTER = items([1, 0, 2, 0, 1]), items([2, 1, 4, 0, 1], nll=[0.5, 1, 1, 4, 5])


def filled(directory):
    scores = Scores(directory, ("copy", "idle", "sort"))
    scores.record("before", BEFORE)
    scores.record("one", AFTER, learned=[0])
    return scores


def test_a_matrix_has_a_row_a_task_with_records_and_a_column_an_evaluation():
    matrix = filled(None).matrix("accuracy")
    assert matrix.tasks == ("copy", "sort") and matrix.columns == ("before", "one")
    assert matrix.learned_at == (1, None)
    np.testing.assert_array_equal(matrix.values[0], [[0.5, 0, 0.5], [1, 0.5, 1]])
    np.testing.assert_array_equal(matrix.values[1], [[0, 1], [0, 1]])
    np.testing.assert_array_equal(filled(None).matrix("exact").values[0], [[0, 0, 0], [1, 0, 1]])
    losses = filled(None).matrix("nll")
    assert not losses.higher_is_better
    np.testing.assert_array_equal(losses.values[0], [[-0.5, -1, -0.75], [-0.25, -0.5, -0.25]])


def test_even_and_odd_items_of_each_task_are_two_halves_that_are_not_compared():
    scores = filled(None)
    even, odd = (scores.matrix(items=half) for half in ("even", "odd"))
    np.testing.assert_array_equal(even.values[0], [[0.5, 0.5], [1, 1]])
    np.testing.assert_array_equal(odd.values[0], [[0], [0.5]])
    assert [x.shape[1] for x in (*even.values, *odd.values)] == [2, 1, 1, 1]
    assert len({even.items_hash, odd.items_hash, scores.matrix().items_hash, scores.matrix("nll").items_hash}) == 4
    alone = Scores(None)
    alone.record("before", items([1], nll=[1], records=[0], tasks=[0], tokens=[1]))
    with pytest.raises(ValueError, match="odd records of task 0: there are none"):
        alone.matrix(items="odd")


def test_what_was_recorded_is_there_in_the_next_process(tmp_path):
    filled(tmp_path / "run").record("two", BEFORE, learned=(2,))
    again = Scores(tmp_path / "run")
    assert again.columns == ("before", "one", "two") and again.has("one") and not again.has("three")
    assert again.matrix().learned_at == (1, 2) and again.matrix().tasks == ("copy", "sort")
    assert again.matrix().items_hash == filled(None).matrix().items_hash
    np.testing.assert_array_equal(again.matrix("nll").means[:, :2], filled(None).matrix("nll").means)
    assert not list((tmp_path / "run").glob("*.part"))
    again.record("three", AFTER)
    assert Scores.read(tmp_path / "run").columns[-1] == "three"
    with pytest.raises(ValueError, match=r"has no scores\.npz"):
        Scores.read(tmp_path)


def test_a_column_recorded_again_is_replaced_where_it_stands(tmp_path):
    scores = filled(tmp_path)
    scores.record("two", BEFORE, learned=[2])
    scores.record("one", BEFORE, learned=[0, 2])
    again = Scores.read(tmp_path)
    assert again.columns == ("before", "one", "two") and again.matrix().learned_at == (1, 1)
    np.testing.assert_array_equal(again.matrix().values[0], [[0.5, 0, 0.5]] * 3)


def test_pieces_of_a_record_are_one_item():
    scores = Scores(None)
    scores.record("before", items([2, 2, 3, 1, 1], records=(4, 4, 9, 1, 1)))
    exact, losses = scores.matrix("exact").values, scores.matrix("nll").values
    assert [x.tolist() for x in exact] == [[[1, 0]], [[1]]]
    assert [(-x).tolist() for x in losses] == [[[3 / 4, 3 / 4]], [[9 / 2]]]


def test_other_records_and_records_without_names_are_refused():
    scores = filled(None)
    for other in ({"records": (4, 7, 8, 1, 3)}, {"tokens": (2, 2, 4, 1, 2)}, {"tasks": (0, 0, 1, 2, 2)}):
        with pytest.raises(ValueError, match=r"column 'two' scores 5 records of hash .*every column scores the same"):
            scores.record("two", items([0] * 5, **other))
    assert scores.columns == ("before", "one"), "what is refused leaves nothing behind"
    with pytest.raises(ValueError, match="carry no record_ids"):
        scores.record("two", items([0] * 5, records=[-1] * 5))


def test_a_table_that_begins_after_training_is_refused(tmp_path):
    scores = Scores(tmp_path)
    with pytest.raises(ValueError, match="no column is recorded yet"):
        scores.matrix()
    scores.record("one", BEFORE, learned=[0])
    with pytest.raises(
        ValueError, match=r"first column, .one., comes after.*: forgetting of base abilities needs column 0"
    ):
        scores.matrix()
    with pytest.raises(ValueError, match='scores are "accuracy", "nll" or "exact", got \'loss\''):
        scores.matrix("loss")
    with pytest.raises(ValueError, match='items are "even", "odd" or None'):
        scores.matrix(items="first")
    (tmp_path / "scores.npz").write_bytes(b"half a file")
    with pytest.raises(ValueError, match="does not hold scores"):
        Scores(tmp_path)
