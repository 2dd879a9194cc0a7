# SPDX-License-Identifier: Apache-2.0
"""pass@k and votes against every subset, one by one; calibration against its definition; intervals that cover."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.rewards import calibration, interval_of_mean, majority_at_k, pass_at_k


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_answer(n):
    for right, k in itertools.product(range(n + 1), range(1, n + 1)):
        samples = [True] * right + [False] * (n - right)
        share = np.mean([any(subset) for subset in itertools.combinations(samples, k)])
        np.testing.assert_allclose(pass_at_k(np.array([right]), n, k=k), [share], atol=1e-12)


def test_pass_at_k_is_unbiased_where_the_naive_estimate_is_not():
    q, n, k = 0.1, 10, 5
    counts = np.random.default_rng(0).binomial(n, q, 200_000)
    assert pass_at_k(counts, n, k=k).mean() == pytest.approx(1 - (1 - q) ** k, abs=2e-3)
    assert (1 - (1 - counts / n) ** k).mean() < 1 - (1 - q) ** k - 0.02


def test_pass_at_k_counts_each_question_by_its_own_samples_and_survives_many():
    assert pass_at_k(np.array([1, 1]), np.array([1, 2]), k=1).tolist() == [1.0, 0.5]
    tiny = pass_at_k(np.array([1]), 100_000, k=10)[0]
    assert tiny == pytest.approx(1e-4, rel=1e-9)


@pytest.mark.parametrize(
    ("right", "n", "k", "message"),
    [
        ([1], 4, 5, "k must be between 1 and the 4 samples"),
        ([1], 4, 0, "k must be between 1 and the 4 samples"),
        ([1, 5], 4, 2, "question 1 has 5 right answers of 4 samples"),
        ([0.5], 4, 2, "right answers and samples are counted"),
    ],
)
def test_pass_at_k_refuses_what_cannot_be_counted(right, n, k, message):
    with pytest.raises(ValueError, match=message):
        pass_at_k(np.array(right), n, k=k)


def brute(answers, right, k):
    scores = {a: np.mean([r for b, r in zip(answers, right, strict=True) if b == a]) for a in set(answers)}
    total = 0.0
    for subset in itertools.combinations(answers, k):
        votes = Counter(answer for answer in subset if answer is not None)
        if votes:
            best = [answer for answer, count in votes.items() if count == max(votes.values())]
            total += np.mean([scores[answer] for answer in best])
    return total / math.comb(len(answers), k)


@settings(max_examples=120, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "b", "c", "d", None]), st.sampled_from([0, 0.5, 1])), min_size=1, max_size=9
    )
)
def test_a_vote_is_exact_over_all_subsets(samples):
    answers, right = zip(*samples, strict=True)
    for k in range(1, len(answers) + 1):
        assert majority_at_k(answers, right, k=k) == pytest.approx(brute(answers, right, k), abs=1e-12)


def test_a_vote_of_one_is_the_mean_and_ties_are_split():
    answers, right = ["4", "5", "6", None], [1, 0, 0, 0]
    assert majority_at_k(answers, right, k=1) == pytest.approx(0.25)
    assert majority_at_k(["4", "5"], [1, 0], k=2) == 0.5
    assert majority_at_k([None, None], [0, 0], k=2) == 0.0
    assert majority_at_k(["4", None, None], [1, 0, 0], k=3) == 1.0, "silence does not outvote an answer"


def test_voting_lifts_a_majority_and_sinks_a_minority():
    answers, right = ["4"] * 60 + ["5"] * 40, [1] * 60 + [0] * 40
    lifted = [majority_at_k(answers, right, k=k) for k in (1, 5, 25, 75)]
    assert lifted == sorted(lifted) and lifted[0] == pytest.approx(0.6) and lifted[-1] > 0.99
    sunk = [majority_at_k(answers, [1 - r for r in right], k=k) for k in (1, 5, 25, 75)]
    np.testing.assert_allclose(np.add(lifted, sunk), 1.0)


def test_a_vote_of_many_different_answers_stays_quick_and_in_range():
    answers = [str(i % 90) for i in range(256)]
    right = [float(i % 90 == 7) for i in range(256)]
    assert 0 <= majority_at_k(answers, right, k=64) <= 1
    assert majority_at_k(["4"] * 1000, [1] * 1000, k=500) == 1.0


@pytest.mark.parametrize(
    ("answers", "right", "k", "message"),
    [
        (["a"], [1, 1], 1, "1 answers and 2 scores"),
        (["a"], [1], 2, "k must be between 1 and the 1 samples"),
        (["a"] * 1001, [1] * 1001, 2, "at most 1000"),
        (["a"], [2], 1, r"scores lie in \[0, 1\], got 2"),
    ],
)
def test_a_vote_refuses_what_cannot_be_counted(answers, right, k, message):
    with pytest.raises(ValueError, match=message):
        majority_at_k(answers, right, k=k)


def test_calibration_is_its_definition():
    rng = np.random.default_rng(1)
    confidence = rng.random(500)
    right = (rng.random(500) < confidence**2).astype(float)
    found = calibration(confidence, right, num_bins=7, resamples=50)
    error = 0.0
    for b in range(7):
        inside = (confidence >= b / 7) & (confidence < (b + 1) / 7)
        error += inside.sum() / 500 * abs(confidence[inside].mean() - right[inside].mean())
        assert found.bins[b].answers == inside.sum()
        assert found.bins[b].right.mean == pytest.approx(right[inside].mean())
        assert found.bins[b].confidence == pytest.approx(confidence[inside].mean())
    assert found.error.mean == pytest.approx(error)
    assert found.brier.mean == pytest.approx(np.mean((confidence - right) ** 2))


def test_a_calibrated_model_has_a_smaller_error_than_a_boastful_one():
    rng = np.random.default_rng(2)
    claimed = rng.random(4000)
    honest = calibration(claimed, (rng.random(4000) < claimed).astype(float), resamples=200)
    boastful = calibration(claimed, (rng.random(4000) < claimed / 2).astype(float), resamples=200)
    assert honest.error.high < boastful.error.low and honest.brier.high < boastful.brier.low
    assert honest.error.low <= honest.error.mean <= honest.error.high + 0.01


def test_too_sure_and_too_shy_do_not_cancel():
    found = calibration(np.array([0.9, 0.9, 0.1, 0.1]), np.array([0.0, 1.0, 0.0, 1.0]), resamples=20)
    assert found.error.mean == pytest.approx(0.4)


def test_the_ends_of_the_scale_have_a_bin_and_an_empty_bin_says_so():
    found = calibration(np.array([0.0, 1.0]), np.array([0.0, 1.0]), num_bins=4, resamples=20)
    assert [one.answers for one in found.bins] == [1, 0, 0, 1]
    assert math.isnan(found.bins[1].confidence) and math.isnan(found.bins[1].right.mean)
    assert found.error.mean == 0 and found.brier.mean == 0


def test_answers_to_one_question_are_drawn_together():
    rng = np.random.default_rng(3)
    of_question = rng.integers(0, 2, 40).astype(float)
    right, confidence = np.repeat(of_question, 25), np.full(1000, 0.5)
    alone = calibration(confidence, right, resamples=400).bins[5].right
    together = calibration(confidence, right, np.repeat(np.arange(40), 25), resamples=400).bins[5].right
    assert together.mean == alone.mean
    assert (together.high - together.low) > 3 * (alone.high - alone.low), "25 copies of an answer are one answer"


@pytest.mark.parametrize(
    ("confidence", "right", "message"),
    [
        ([1.5], [1], "confidence of answer 0 is 1.5"),
        ([0.5, 0.5], [1, np.nan], "right of answer 1 is nan"),
        ([0.5], [1, 1], r"must be \[N\]"),
        ([], [], "N >= 1"),
    ],
)
def test_calibration_refuses_numbers_outside_their_range(confidence, right, message):
    with pytest.raises(ValueError, match=message):
        calibration(np.array(confidence), np.array(right))
    with pytest.raises(ValueError, match="num_bins must be at least 1"):
        calibration(np.array([0.5]), np.array([1.0]), num_bins=0)


def test_the_interval_of_a_mean_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(4)
    inside = 0
    for trial in range(300):
        found = interval_of_mean(rng.random(60) < 0.4, resamples=400, seed=trial)
        inside += found.low <= 0.4 <= found.high
    assert 0.90 <= inside / 300 <= 0.98


def test_the_same_seed_gives_the_same_interval_and_the_mean_is_exact():
    values = np.random.default_rng(5).random(33)
    assert interval_of_mean(values, resamples=200) == interval_of_mean(values, resamples=200)
    assert interval_of_mean(values, resamples=200, seed=1) != interval_of_mean(values, resamples=200)
    assert interval_of_mean(values, resamples=200).mean == pytest.approx(values.mean())
    assert interval_of_mean(np.ones(5), resamples=20) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("values", "resamples", "message"),
    [
        ([], 10, "with a value for each question"),
        ([1.0, np.nan], 10, "value 1 is not finite"),
        ([1.0], 0, "at least 1"),
    ],
)
def test_an_interval_of_nothing_is_refused(values, resamples, message):
    with pytest.raises(ValueError, match=message):
        interval_of_mean(np.array(values), resamples=resamples)
