# SPDX-License-Identifier: Apache-2.0
"""Laws of the bootstrap and of the claims made from it: exact where it must be, honest about noise, one draw."""

import numpy as np
import pytest

from jaxlm.resampling import resampled_means
from jaxlm.train.bootstrap import difference, holm, paired_bootstrap
from jaxlm.train.continual import metric_of
from jaxlm.train.score_matrix import ScoreMatrix


def arm(rng, *, shift=0.0, seeds=3, sizes=(80, 50), columns=4, **options):
    """Matrices of one arm: two tasks learned one after the other, scores in the middle of [0, 1]."""
    learned_at = range(1, len(sizes) + 1)
    return [
        ScoreMatrix([0.3 + 0.3 * rng.random((columns, n)) + shift for n in sizes], learned_at, **options)
        for _ in range(seeds)
    ]


def shifted(matrices, by):
    """The same arm, every score after the first column larger."""
    more = np.array([0.0] + [by] * (len(matrices[0].columns) - 1))[:, None]
    return [ScoreMatrix([x + more for x in m.values], m.learned_at) for m in matrices]


@pytest.mark.parametrize("metric", ["final", "final_worst", "backward_transfer", "forgetting", "seesaw", "normalized"])
def test_an_arm_does_not_differ_from_itself(metric):
    a = arm(np.random.default_rng(0))
    specialist = [np.full(80, 0.6), np.full(50, 0.7)]
    assert paired_bootstrap(a, a, metric=metric, specialist=specialist, resamples=200) == (0, 0, 0)
    claim = difference(a, a, metric=metric, specialist=specialist, resamples=200)
    assert not claim.counts and claim.p == 1 and claim.by_seed == (0, 0, 0)


def test_arms_that_differ_by_a_constant_differ_by_it_for_certain():
    a = arm(np.random.default_rng(0))
    interval = paired_bootstrap(shifted(a, 0.2), a, resamples=200)
    assert interval == pytest.approx((0.2, 0.2, 0.2), abs=1e-12)
    claim = difference(shifted(a, 0.2), a, resamples=200)
    assert claim.counts and claim.p < 0.02 and claim.by_seed == pytest.approx((0.2,) * 3)


def test_the_interval_is_that_of_items_drawn_one_by_one():
    """Against a loop that draws indices and knows nothing of counts, for a metric with a maximum inside."""
    rng = np.random.default_rng(0)
    a, b = arm(rng, columns=5), arm(rng, columns=5)
    draws = np.random.default_rng(1)
    slow = []
    for _ in range(2_000):
        drawn = [draws.integers(0, x.shape[1], x.shape[1]) for x in a[0].values]
        pair = [np.mean([metric_of(_take(m, drawn), "forgetting") for m in matrices]) for matrices in (a, b)]
        slow.append(pair[0] - pair[1])
    fast = paired_bootstrap(a, b, metric="forgetting", resamples=20_000)
    np.testing.assert_allclose(fast[1:], np.percentile(slow, [2.5, 97.5]), atol=0.15 * np.std(slow))
    assert fast.mean == pytest.approx(
        np.mean([metric_of(m, "forgetting") for m in a]) - np.mean([metric_of(m, "forgetting") for m in b])
    )


def _take(matrix, drawn):
    return ScoreMatrix([x[:, q] for x, q in zip(matrix.values, drawn, strict=True)], matrix.learned_at)


def test_an_interval_covers_the_truth_as_often_as_it_says():
    """1,000 pairs of arms whose true difference is 0, 500 items each, all on one set of draws."""
    rng = np.random.default_rng(0)
    skill = rng.random((500, 1000))
    differences = (rng.random(skill.shape) < skill) * 1.0 - (rng.random(skill.shape) < skill)
    (drawn,) = resampled_means([differences], resamples=2_000, seed=0)
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    assert 0.93 <= np.mean((low <= 0) & (high >= 0)) <= 0.97


def test_one_draw_serves_all_columns_and_a_seed_repeats_it():
    values = [np.random.default_rng(0).random((n, 3)) for n in (30, 7)]
    first, again, other = (resampled_means(values, resamples=50, seed=seed) for seed in (0, 0, 1))
    for x, y, z in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(x, y)
        assert (x != z).any()
    alone = resampled_means([values[0][:, :1], values[1]], resamples=50, seed=0)
    np.testing.assert_allclose(alone[0][:, 0], first[0][:, 0], rtol=1e-12)
    assert np.corrcoef(first[0][:, 0], resampled_means([values[0]] * 2, resamples=50, seed=0)[1][:, 0])[0, 1] < 0.9
    with pytest.raises(ValueError, match="resamples must be at least 1, got 0"):
        resampled_means(values, resamples=0, seed=0)


def test_many_items_are_drawn_in_pieces_that_are_all_used():
    (drawn,) = resampled_means([np.arange(30_000.0)[:, None]], resamples=150, seed=0)
    assert drawn.shape == (150, 1)
    assert np.abs(drawn - 15_000).max() < 5 * 30_000 / np.sqrt(12 * 30_000)


def test_baselines_are_drawn_along():
    """Where the arm is its specialist, shortfall has no noise, however items are drawn."""
    a = arm(np.random.default_rng(0), seeds=1, columns=3)
    specialist = [x[at] for x, at in zip(a[0].values, (1, 2), strict=True)]
    assert paired_bootstrap(a, metric="plasticity", specialist=specialist, resamples=300) == pytest.approx((0, 0, 0))
    low, high = paired_bootstrap(a, metric="final", resamples=300)[1:]
    assert low < metric_of(a[0], "final") < high


def test_a_difference_counts_only_if_interval_seeds_and_orders_agree():
    a = arm(np.random.default_rng(0), seeds=2)
    better = shifted(a, 0.1)
    assert difference(better, a, resamples=200).counts
    unlike = [*shifted(a[:1], 0.3), *shifted(a[1:], -0.05)]
    one_seed_disagrees = difference(unlike, a, resamples=200)
    assert one_seed_disagrees.low > 0 and not one_seed_disagrees.counts
    noise = np.random.default_rng(1)
    jittered = [
        ScoreMatrix([np.clip(x + noise.normal(0.01, 0.5, x.shape), 0, 1) for x in m.values], m.learned_at) for m in a
    ]
    assert not difference(jittered, a, resamples=200).counts, "the interval holds 0"
    assert difference(better, a, orders=[(better, a)], resamples=200).counts
    assert not difference(better, a, orders=[(better, a), (a, better)], resamples=200).counts
    worse = difference(a, better, resamples=200)
    assert worse.counts and worse.high < 0


def test_what_cannot_be_compared_is_refused():
    a, b = arm(np.random.default_rng(0)), arm(np.random.default_rng(0), items_hash="other")
    with pytest.raises(ValueError, match="one seed: intervals cover items only"):
        difference(a[:1], a[:1])
    with pytest.raises(ValueError, match=r"scores of different items are not compared: .* of hash '' .* 'other'"):
        paired_bootstrap(a, b)
    with pytest.raises(ValueError, match="arms of 3 and 2 seeds"):
        paired_bootstrap(a, a[:2])
    with pytest.raises(ValueError, match="losses and scores are not compared"):
        paired_bootstrap(a, arm(np.random.default_rng(0), higher_is_better=False))
    with pytest.raises(ValueError, match="an arm without a score matrix"):
        paired_bootstrap([], a)


def test_undefined_numbers_have_undefined_intervals():
    a = arm(np.random.default_rng(0), columns=3, sizes=(40,))
    one = [ScoreMatrix([x[:2] for x in m.values], [1]) for m in a]
    assert np.isnan(paired_bootstrap(one, one, metric="backward_transfer", resamples=10)).all()
    assert not difference(one, one, metric="backward_transfer", resamples=10).counts


def test_holm_adjusts_a_family_and_keeps_its_order():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.9}) == pytest.approx(
        {"a": 0.04, "b": 0.09, "c": 0.09, "d": 0.9}
    )
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1, "b": 1}
    assert holm({"a": 0.02}) == {"a": 0.02} and holm({}) == {}
    with pytest.raises(ValueError, match=r"a p-value lies in \[0, 1\], got {'a': 1.2}"):
        holm({"a": 1.2})
