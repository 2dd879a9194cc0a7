# SPDX-License-Identifier: Apache-2.0
"""Which number of a text counts, how it is read, and when two are equal."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.data.records import BadRecord
from jaxlm.rewards import NumericMatch
from jaxlm.rewards.numeric import found_number, numbers


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5 km", "5"),
        ("1,234,567.5", "1234567.5"),
        ("1'000 or 2_000", "2000"),
        ("12\u202f000", "12000"),
        (r"1{,}234", "1234"),
        (r"12\,345", "12345"),
        ("-3", "-3"),
        ("\u22127", "-7"),
        ("-$5", "-5"),
        (r"\$-5", "-5"),
        ("x = - 5", "-5"),
        ("(-4)", "-4"),
        ("5-3", "3"),
        ("2024-05-06", "6"),
        (".5", "1/2"),
        ("0.5.", "1/2"),
        ("3/4", "3/4"),
        ("3 1/2", "7/2"),
        ("-3 1/2", "-7/2"),
        ("3 4/2", "2"),
        (r"\frac{1}{2}", "1/2"),
        (r"-\dfrac{ 1 }{ 2 }", "-1/2"),
        (r"\frac12", "1/2"),
        (r"3\frac{1}{4}", "13/4"),
        ("1.5e3", "1500"),
        ("2E-3", "1/500"),
        ("2 x 10^3", "2000"),
        (r"2 \times 10^{-3}", "1/500"),
        ("2*10**3", "2000"),
        ("10\u00b3", "1000"),
        ("2^{10}", "1024"),
        ("2^-2", "1/4"),
        ("3 million", "3000000"),
        ("5 m^2", "5"),
        ("x_1", None),
        ("no number", None),
        ("1/0", None),
        ("0^{-1}", None),
        ("1e401", None),
        ("9" * 1001, None),
        ("9^400", str(9**400)),
        ("99999^400", None),
        (r"2\sqrt{2}", None),
        (r"\boxed{\sqrt{2}}", None),
        ("\u221a2", None),
        (r"3\pi", None),
        ("10^{2^n}", None),
        ("2^n", None),
        (r"\boxed{\frac{\sqrt{6}}{4}}", None),
        (r"\boxed{2\sqrt{2}-2}", None),
        (r"\boxed{4+\sqrt{6}}", None),
        (r"45^\circ", "45"),
        (r"45^{\circ}", "45"),
    ],
)
def test_numbers_are_read_in_the_forms_people_write(text, number):
    found = found_number(text)
    assert (found and found.number) == (None if number is None else Fraction(number))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Janet has 3 + 4 = 7.\n#### 7 eggs", 7),
        ("#### 1,000", 1000),
        (r"\boxed{5\text{ m}^2} for 3 days", 5),
        (r"\boxed{x = 5}", 5),
        (r"first \boxed{4}, no: \boxed{\boxed{5}}", 5),
        (r"\boxed{none} 5", None),
        ("<answer> 12 </answer> 13", 12),
        ("The answer is 5 + 3 = 8. I used 2 numbers", 8),
        ("Answer: 18 (since 9*2 = 18 and 3 = 3)", 18),
        ("**Answer:** $72$ of 100", 72),
        ("The final answer is:\n\n$$\n6\n$$\n", 6),
        ("The answer to question 3 is 4", 4),
        ("The answer is simple: add. We get 9", 9),
        ("we add 2 and 3, so 5", 5),
        ("The answer is " + "9" * 5000 + ". Or 3", None),
    ],
)
def test_a_marked_number_counts_before_the_last_one(text, number):
    found = found_number(text)
    assert (found and found.number) == number


def test_only_a_box_counts_where_a_box_is_asked_for():
    verifier = NumericMatch(where="boxed")
    assert verifier(r"\boxed{5}. Or 4", {"answer": "5"}) == 1.0
    assert verifier("The answer is 5", {"answer": "5"}) == 0.0
    assert NumericMatch(where="last")(r"\boxed{5}. Or 4", {"answer": "4"}) == 1.0


def test_the_tolerance_is_the_one_stated():
    assert NumericMatch(relative=0.01)("101", {"answer": "100"}) == 1.0
    assert NumericMatch(relative=0.01)("101.1", {"answer": "100"}) == 0.0
    assert NumericMatch(relative=0.0, absolute=0.25)("100.25", {"answer": "100"}) == 1.0
    assert NumericMatch(relative=0.01, absolute=1.0)("101.5", {"answer": "100"}) == 0.0, "the larger one, not both"
    assert NumericMatch(relative=0.0)("100.0000000001", {"answer": "100"}) == 0.0
    assert NumericMatch()("0.0000001", {"answer": "0"}) == 0.0, "nothing is near 0 but by an absolute tolerance"
    assert NumericMatch(relative=0.0)("0.1 + 0.2 = 0.30", {"answer": "3/10"}) == 1.0, "fractions are exact"


@pytest.mark.parametrize(
    ("percent", "equal"), [("either", {"45%", "45", "0.45"}), ("value", {"45%", "0.45"}), ("unit", {"45%", "45"})]
)
def test_a_percent_sign_means_what_the_option_says(percent, equal):
    verifier = NumericMatch(percent=percent)
    for text in ("45%", "45", "0.45"):
        assert verifier(text, {"answer": "45%"}) == float(text in equal)
        assert verifier("45 percent", {"answer": text}) == float(text in equal)


@pytest.mark.parametrize(
    "reference",
    [r"2\sqrt{2}", "$[-1, 0)$", "(1, 2)", r"$8\sqrt{5} - 16$", r"\frac{\sqrt{6}}{4}", r"\boxed{\{1, 2\}}", "10^{2^n}"],
)
def test_a_reference_that_is_no_single_number_is_refused(reference):
    with pytest.raises(BadRecord, match="MathMatch compares expressions"):
        NumericMatch()("2", {"answer": reference})
    assert NumericMatch()("1200", {"answer": "(1,200)"}) == 1.0


def test_any_of_several_references_will_do_and_one_without_a_number_is_refused():
    assert NumericMatch()("6", {"answer": ["5", "6"]}) == 1.0
    with pytest.raises(BadRecord, match="'five' holds no number"):
        NumericMatch()("5", {"answer": "five"})


@given(st.fractions(max_denominator=10**6), st.sampled_from(["{}", "so {}.", r"\boxed{{{}}} 3", "#### {}\n"]))
def test_every_fraction_is_read_as_it_was_written(number, form):
    assert found_number(form.format(number)).number == number
    assert NumericMatch(relative=0.0)(form.format(number), {"answer": str(number)}) == 1.0


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**12), max_value=10**12, places=4))
def test_thousands_separators_change_no_number(number):
    assert [value.number for value in numbers(f"{number:,}")] == [Fraction(number)]


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_equals_its_own_print(number):
    assert NumericMatch(relative=0.0)(repr(number), {"answer": number}) == 1.0


@given(st.integers(0, 10**6), st.sampled_from(["{}", "{}.0", "{}/1", "{}e0"]))
def test_equal_numbers_vote_together(number, form):
    verifier = NumericMatch()
    assert verifier.answer(form.format(number), {}) == str(number)
