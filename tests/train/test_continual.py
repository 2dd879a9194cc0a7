# SPDX-License-Identifier: Apache-2.0
"""Laws of the continual metrics: the page's toy, what no permutation or scale changes, what is undefined or refused."""

import numpy as np
import pytest

from jaxlm.train.continual import continual_metrics, flips, metric_of, task_metrics
from jaxlm.train.score_matrix import ScoreMatrix

TOY = ([0.1, 0.8, 0.6, 0.5], [0.2, 0.2, 0.7, 0.6], [0, 0.1, 0.1, 0.9])
SPECIALISTS = (0.8, 0.8, 0.9)


def toy(**options):
    return ScoreMatrix(TOY, (1, 2, 3), **options)


def random_matrix(rng, *, tasks=5, columns=6, general=1, **options):
    """Tasks of unequal numbers of items, the last ones never trained on."""
    learned_at = [*rng.integers(1, columns, tasks - general), *[None] * general]
    sizes = rng.integers(20, 60, tasks)
    return ScoreMatrix([rng.random((columns, size)) for size in sizes], learned_at, **options)


def test_the_numbers_of_the_toy_are_those_reckoned_by_hand():
    numbers = continual_metrics(toy(), specialist=SPECIALISTS)
    expected = {
        "final": 2 / 3,
        "final_worst": 0.5,
        "plasticity": -0.1 / 3,
        "backward_transfer": -0.2,
        "backward_transfer/skipped": 1,
        "forgetting": 0.2,
        "forgetting/skipped": 1,
        "forgetting_rate": (0.3 / 0.7 + 0.1 / 0.5) / 2,
        "forgetting_rate/skipped": 1,
        "forward_transfer": 0.05,
        "forward_transfer/skipped": 1,
        "base_drop": np.nan,
        "base_drop_trained": -1.7 / 3,
        "normalized": (0.4 / 0.7 + 0.4 / 0.6 + 1) / 3,
        "normalized_worst": 0.4 / 0.7,
        "seesaw": 0.12472191,
        "seesaw_normalized": np.std([0.4 / 0.7, 0.4 / 0.6, 1]),
    }
    assert numbers == pytest.approx(expected, abs=1e-8, nan_ok=True)
    by_task = task_metrics(toy(), specialist=SPECIALISTS)
    np.testing.assert_allclose(by_task["normalized"], [0.571429, 0.666667, 1], atol=1e-6)
    np.testing.assert_allclose(by_task["forward_transfer"], [np.nan, 0, 0.1], atol=1e-12)
    np.testing.assert_allclose(by_task["forgetting_rate"], [0.3 / 0.7, 0.1 / 0.5, np.nan])


def test_base_drop_is_of_tasks_that_no_stage_trains_on():
    matrix = ScoreMatrix([*TOY, [0.7, 0.6, 0.6, 0.4]], (1, 2, 3, None))
    assert continual_metrics(matrix)["base_drop"] == pytest.approx(0.3)
    assert continual_metrics(matrix)["final"] == pytest.approx(2 / 3), "general tasks are not among the learned ones"


def test_the_order_of_tasks_changes_no_number():
    rng = np.random.default_rng(0)
    matrix = random_matrix(rng)
    specialist = [x[-1] * 0.9 for x in matrix.values]
    numbers = continual_metrics(matrix, specialist=specialist, joint=specialist)
    order = rng.permutation(5)
    scores, at = [matrix.values[i] for i in order], [matrix.learned_at[i] for i in order]
    shuffled = [specialist[i] for i in order]
    again = continual_metrics(ScoreMatrix(scores, at), specialist=shuffled, joint=shuffled)
    assert again == pytest.approx(numbers, rel=1e-12, nan_ok=True)


def test_the_scale_of_a_task_does_not_change_what_is_normalized():
    scaled = [TOY[0], (0.1 + 0.5 * np.array(TOY[1])).tolist(), TOY[2]]
    specialist = [0.8, 0.1 + 0.5 * 0.8, 0.9]
    for name in ("normalized", "normalized_worst", "seesaw_normalized"):
        expected = continual_metrics(toy(), specialist=SPECIALISTS)[name]
        assert continual_metrics(ScoreMatrix(scaled, (1, 2, 3)), specialist=specialist)[name] == pytest.approx(expected)


def test_losses_are_turned_around_exactly_once():
    losses = ScoreMatrix([[3.0, 1.0, 1.5]], [1], higher_is_better=False)
    numbers = continual_metrics(losses, specialist=[0.5], joint=[0.5])
    assert numbers["final"] == -1.5 and numbers["backward_transfer"] == -0.5
    assert numbers["plasticity"] == -0.5 and numbers["base_drop_trained"] == -1.5, "the task improved"
    assert numbers["normalized"] == pytest.approx(1.5 / 2.5) and numbers["losers"] == 1
    with pytest.raises(ValueError, match=r"a loss is negative: task 'task 0', column 'before', item 0: -3\.0"):
        ScoreMatrix([[-3.0, -1.0, -1.5]], [1], higher_is_better=False)


def test_backward_transfer_is_the_negative_of_forgetting_where_a_task_was_best_when_learned():
    best = ScoreMatrix([[0.1, 0.8, 0.6, 0.5], [0.2, 0.2, 0.7, 0.9]], (1, 2))
    numbers = task_metrics(best)
    np.testing.assert_allclose(numbers["backward_transfer"], -numbers["forgetting"])
    late = task_metrics(ScoreMatrix([[0.1, 0.6, 0.8, 0.5]], [1]))
    assert late["forgetting"][0] == pytest.approx(0.3) and late["backward_transfer"][0] == pytest.approx(-0.1)


def test_where_nothing_changes_every_number_of_change_is_zero():
    constant = [np.repeat(row, 4, axis=0) for row in np.random.default_rng(0).random((3, 1, 30))]
    constant = [*constant, constant[0]]
    numbers = continual_metrics(ScoreMatrix(constant, (1, 2, 3, None)))
    for name in ("backward_transfer", "forgetting", "forward_transfer", "base_drop", "base_drop_trained"):
        assert numbers[name] == 0, name
    assert np.isnan(numbers["forgetting_rate"]) and numbers["forgetting_rate/skipped"] == 3, "of nothing gained"


def test_one_stage_leaves_forgetting_undefined():
    numbers = continual_metrics(ScoreMatrix([[0.1, 0.8], [0.2, 0.9]], (1, 1)))
    for name in ("backward_transfer", "forgetting", "forgetting_rate", "forward_transfer"):
        assert np.isnan(numbers[name]) and numbers[f"{name}/skipped"] == 2, name
    assert numbers["final"] == pytest.approx(0.85)


def test_a_share_of_a_gain_that_may_be_noise_is_undefined():
    rng = np.random.default_rng(0)
    few, many = (rng.random((3, n)) < [[0.50], [0.56], [0.53]] for n in (50, 20_000))
    assert np.isnan(task_metrics(ScoreMatrix([few], [1]))["forgetting_rate"][0])
    assert np.isfinite(task_metrics(ScoreMatrix([many], [1]))["forgetting_rate"][0])
    assert np.isnan(task_metrics(ScoreMatrix([many], [1]), min_gain=0.1)["forgetting_rate"][0])
    by_task = task_metrics(ScoreMatrix([few], [1]), specialist=[few[1] * 1.0])
    assert np.isnan(by_task["normalized"][0]) and np.isfinite(by_task["plasticity"][0])


def test_losers_are_tasks_that_lie_below_joint_training_beyond_the_noise_of_items():
    rng = np.random.default_rng(0)
    final = (rng.random((3, 500)) < 0.5) * 1.0
    joint = [np.maximum(final[0], rng.random(500) < 0.3), final[1].copy(), (rng.random(500) < 0.52) * 1.0]
    matrix = ScoreMatrix([np.stack([np.zeros(500), x]) for x in final], (1, 1, 1))
    assert continual_metrics(matrix, joint=joint)["losers"] == 1
    assert "losers" not in continual_metrics(matrix)


def test_numbers_that_need_specialists_are_left_out_without_them_and_refused_by_name():
    assert not {"plasticity", "normalized", "seesaw"} & continual_metrics(toy()).keys()
    with pytest.raises(ValueError, match="plasticity compares with specialists: pass specialist="):
        metric_of(toy(), "plasticity")
    with pytest.raises(ValueError, match="no metric 'forgeting': did you mean 'forgetting'"):
        metric_of(toy(), "forgeting")
    without = continual_metrics(toy(), specialist=(0.8, None, 0.9))
    assert without["plasticity/skipped"] == 1 and without["plasticity"] == pytest.approx(0)
    with pytest.raises(ValueError, match="a baseline of 2 tasks for 3"):
        continual_metrics(toy(), specialist=(0.8, 0.9))
    with pytest.raises(ValueError, match=r"the baseline of task 'task 0' has the shape \(2,\), its items \(1,\)"):
        continual_metrics(toy(), specialist=([0.8, 0.1], 0.9, 0.9))


def test_a_baseline_may_be_the_last_column_of_another_matrix_of_the_same_items():
    joint = ScoreMatrix([[0.1, 0.8], [0.2, 0.8], [0, 0.9]], (1, 1, 1))
    expected = continual_metrics(toy(), specialist=SPECIALISTS)
    assert continual_metrics(toy(), specialist=joint) == pytest.approx(expected, nan_ok=True)
    with pytest.raises(ValueError, match="scores of different items are not compared"):
        continual_metrics(toy(items_hash="a"), joint=joint)


def test_what_is_no_score_matrix_is_refused_by_place():
    with pytest.raises(
        ValueError, match=r"outside of \[0, 1\]: task 'sum', column 'column 1', item 0: 1\.5; pass higher"
    ):
        ScoreMatrix([[0, 1], [0, 1.5]], (1, 1), tasks=("copy", "sum"))
    with pytest.raises(ValueError, match="a score is not finite: task 'task 0', column 'before', item 1: nan"):
        ScoreMatrix([[[0, np.nan], [0, 0]]], [1])
    with pytest.raises(ValueError, match="evaluate before training: forgetting of base abilities needs column 0"):
        ScoreMatrix([[0, 1]], [0])
    with pytest.raises(ValueError, match="is learned at column 2, but the last column is 1"):
        ScoreMatrix([[0, 1]], [2])
    with pytest.raises(ValueError, match=r"task 'task 1' has scores of shape \(3, 1\), wanted .* with 2 columns"):
        ScoreMatrix([[0, 1], [0, 1, 1]], (1, 1))
    with pytest.raises(ValueError, match="2 tasks and 2 columns of scores, but 1 entries in learned_at"):
        ScoreMatrix([[0, 1], [0, 1]], [1])
    with pytest.raises(ValueError, match="needs at least one task"):
        ScoreMatrix([], [])


def test_flips_without_luck_are_what_was_truly_lost_and_gained():
    """60 % known before, 85 % of it kept, 20 % of the rest gained, four options: the shares are those expected."""
    counts = {(1, 0): 1275, (0, 1): 1200, (0, 0): 1800, (1, 1): 5725}
    before, after = (np.repeat([key[i] for key in counts], list(counts.values())) for i in (0, 1))
    found = flips(before, after, num_options=4)
    assert found == pytest.approx((0.1275, 0.12, 0.18, 0.09, 0.08))
    assert flips(before, after)[:3] == found[:3] and flips(before, after).known_to_unknown is None
    with pytest.raises(ValueError, match="each 0 or 1, before and after"):
        flips([0.5, 1], [0, 1])
    with pytest.raises(ValueError, match="num_options must be at least 2, got 1"):
        flips([0, 1], [0, 1], num_options=1)
