# SPDX-License-Identifier: Apache-2.0
"""Laws of every verifier, by table: a score for any text, in time, always the same; a bad record is refused."""

import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxlm.data.config import Procedural, Rows
from jaxlm.data.procedural import GENERATORS, Exercises
from jaxlm.data.records import BadRecord
from jaxlm.rewards import (
    ExactMatch,
    MultipleChoice,
    NormalisedMatch,
    NumericMatch,
    ProceduralMatch,
    own_verifier,
    references,
    verify,
)

# What a sampled model, or one that learnt to game its reward, may write.
HOSTILE = {
    "nothing": "",
    "blank": " \t\n\r\x0b\x0c\u2028\u00a0",
    "control characters": "".join(map(chr, range(32))) + "\x7f\x85\u200b\u202e\ufeff",
    "a lone surrogate": "\ud800 5 \udfff",
    "a very long number": "9" * 1_000_000,
    "a long number after a marker": "The answer is " + "9" * 5_000,
    "a huge exponent": "1e999999999999",
    "a huge power": r"\boxed{10^{1000000000}}",
    "nested braces": r"\boxed{" * 5_000 + "5" + "}" * 5_000,
    "braces that never close": r"\boxed{" * 20_000,
    "braces that never open": "}" * 100_000,
    "nested fractions": r"\frac{" * 5_000,
    "nested brackets": "(" * 50_000 + "1" + ")" * 50_000,
    "many numbers": "1," * 50_000,
    "many fractions": "1/" * 50_000,
    "many signs": "-" * 100_000 + "5",
    "many dollars": "$" * 100_000 + "5",
    "many spaces": r"\boxed" + " " * 100_000,
    "many markers": "answer is " * 10_000,
    "markers that go on": "answer to " * 10_000,
    "many tags": "<answer>" * 12_000,
    "many options": "A or " * 20_000,
    "many wrappers": r"\text{" * 16_000,
    "many superscripts": "\u00b2" * 100_000,
    "many articles": "a the an " * 10_000,
    "code": "__import__('os').system('touch pwned')",
    "a ligature that grows": "\ufdfa" * 5_000,
    "digits of other scripts": "\u0665\u0666 \u096b \u00b2\u2075",
    "a letter that grows in lower case": "\u0130<answer>5</answer>" * 100,
}

_PIECES = [
    r"\boxed{",
    r"\frac{",
    "}",
    "{",
    "(",
    ")",
    "[",
    "]",
    "$",
    "$$",
    r"\(",
    r"\)",
    "####",
    "<answer>",
    "</answer>",
]
_PIECES += [
    "the",
    "answer",
    "is",
    ":",
    "=",
    "-",
    "+",
    ".",
    ",",
    "/",
    "%",
    r"\%",
    "e",
    "E",
    "^",
    "_",
    "**",
    "x",
    "10",
    "5",
]
_PIECES += ["0", "12", "1,000", "1/2", "A", "B", "(B)", "option", "or", "and", "million", "\u2212", "\u00b2", "\u00d7"]
texts = st.one_of(
    st.text(max_size=60),
    st.lists(st.sampled_from([*_PIECES, r"\\", r"\,", r"\text{", "Paris", " ", "\n"]), max_size=14).map("".join),
    st.sampled_from(sorted(HOSTILE.values(), key=len)[:8]),
)


CAPITAL = {"choices": ["Rome", "Paris", "Bern"], "answer": "Paris"}
VERIFIERS = {  # verifier, a record for it, a right text
    "exact": (ExactMatch(), {"prompt": "?", "completion": " 12 "}, "12"),
    "squad": (NormalisedMatch(), {"answers": {"text": ["The Tower"]}}, "tower!"),
    "plain": (NormalisedMatch(style="plain", where="marked"), {"answer": "New York"}, "The answer is new  york."),
    "f1": (NormalisedMatch(measure="f1", where="last_line"), {"answer": ["x y", "new york"]}, "?\nYork, new"),
    "numeric": (NumericMatch(), {"answer": 12}, "I get 12."),
    "boxed number": (NumericMatch(where="boxed"), {"answer": "12"}, r"\boxed{12}"),
    "last number": (NumericMatch(where="last", absolute=0.5), {"answer": "so 12"}, "1 2 12.4"),
    "choice": (MultipleChoice(), CAPITAL, "(B)"),
    "letters alone": (MultipleChoice(), {"answer": "C"}, "C."),
    "procedural": (ProceduralMatch(), {"prompt": "12+34=", "completion": " 46"}, "46\n"),
}
by_table = pytest.mark.parametrize("name", sorted(VERIFIERS))


@by_table
def test_a_right_text_scores_one_and_a_wrong_one_zero(name):
    verifier, record, right = VERIFIERS[name]
    assert verifier(right, record) == 1.0
    assert verifier("certainly 77 Z wrong", record) == 0.0


@by_table
@settings(max_examples=150, deadline=None)
@given(text=texts)
@example(text="-")
def test_any_text_has_one_score_between_zero_and_one(name, text):
    verifier, record, _ = VERIFIERS[name]
    score = verifier(text, record)
    assert 0 <= score <= 1 and verifier(text, record) == score
    answer = verifier.answer(text, record)
    assert answer is None or answer


@by_table
@pytest.mark.parametrize("kind", sorted(HOSTILE))
def test_hostile_texts_take_little_time(name, kind):
    verifier, record, _ = VERIFIERS[name]
    began = time.process_time()
    assert 0 <= verifier(HOSTILE[kind], record) <= 1
    assert time.process_time() - began < 3.0, "some pattern is not linear in the length of the text"


@by_table
@pytest.mark.parametrize(
    "record", [{"prompt": "?"}, {"answer": ""}, {"answer": []}, {"answer": None}, {"answer": True}, {"answer": [{}]}, 7]
)
def test_a_record_without_a_reference_is_refused_with_a_sentence(name, record):
    verifier, _, right = VERIFIERS[name]
    with pytest.raises(BadRecord, match=r"\w+ \w+ \w+"):
        verifier(right, record)


@by_table
def test_many_answers_score_as_one_at_a_time_does(name):
    verifier, record, right = VERIFIERS[name]
    given = [right, "wrong", "", right + "\n", r"\boxed{12}"]
    together = verify(verifier, given, [record] * 5)
    assert together.tolist() == [verifier(text, record) for text in given]
    assert together.dtype == np.float64 and together[0] == 1.0
    with pytest.raises(BadRecord, match="record 1: "):
        verify(verifier, given[:2], [record, {"prompt": "?"}])


def test_a_function_serves_as_a_verifier_and_is_held_to_its_range():
    assert verify(lambda text, record: "a" in text, ["ab", "b"], [{}, {}]).tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match=r"text 1 was scored 2\.0: a verifier's score lies in \[0, 1\]"):
        verify(lambda text, record: len(text), ["a", "ab"], [{}, {}])
    with pytest.raises(ValueError, match="nan"):
        verify(lambda text, record: float("nan"), ["a"], [{}])
    with pytest.raises(ValueError, match="2 texts and 1 records"):
        verify(ExactMatch(), ["a", "b"], [{"answer": "a"}])


@pytest.mark.parametrize(
    ("record", "found"),
    [
        ({"answer": "4", "completion": "so 4"}, ["4"]),
        ({"answer": 0.5}, ["0.5"]),
        ({"answers": {"text": ["a", "b"], "answer_start": [1, 2]}}, ["a", "b"]),
        ({"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}]}, ["yes"]),
    ],
)
def test_references_are_found_where_records_keep_them(record, found):
    assert references(record) == found


def test_a_named_field_is_the_only_one_that_counts():
    assert references({"answer": "4", "solution": "5"}, "solution") == ["5"]
    with pytest.raises(BadRecord, match="no 'solution'"):
        references({"answer": "4"}, "solution")


@pytest.mark.parametrize("generator", sorted(GENERATORS))
def test_every_exercise_of_ours_is_scored_by_its_own_scorer(generator):
    source = Procedural(generator=generator, size=20, seed=4)
    verifier = own_verifier(source)
    for record in (Exercises(source)[index] for index in range(20)):
        assert verifier(record["completion"], record) == 1.0
        assert verifier(record["completion"] + "0", record) == 0.0


def test_a_source_without_a_scorer_asks_for_a_choice():
    with pytest.raises(ValueError, match=r"Rows .*choose a verifier"):
        own_verifier(Rows(records=()))


def test_squad_normalisation_is_that_of_the_official_script():
    record = {"answer": "the U.S.A."}
    assert NormalisedMatch()("An USA", record) == 1.0
    assert NormalisedMatch(style="plain")("USA", record) == 0.0
    assert NormalisedMatch(measure="f1")("USA today now", record) == 0.5
    assert NormalisedMatch()("the", {"answer": "The"}) == 0.0, "an answer of articles says nothing"


def test_plain_normalisation_keeps_what_stands_inside():
    record = {"answer": "3.5"}
    assert NormalisedMatch(style="plain")(" 3.5. ", record) == 1.0
    assert NormalisedMatch(style="plain")("35", record) == 0.0
    assert NormalisedMatch(style="plain")("\uff13.\uff15", record) == 1.0


@given(st.text(max_size=40), st.text(max_size=40))
def test_f1_is_symmetric_and_one_for_equal_words(a, b):
    verifier = NormalisedMatch(measure="f1")
    if (normal := verifier.answer(a, {})) and (other := verifier.answer(b, {})):
        assert verifier(a, {"answer": b}) == pytest.approx(verifier(b, {"answer": a}))
        assert (verifier(a, {"answer": b}) == 1) == (sorted(normal.split()) == sorted(other.split()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NormalisedMatch(style="fancy"), "style must be 'squad' or 'plain', got 'fancy'"),
        (lambda: NormalisedMatch(measure="bleu"), "measure must be"),
        (lambda: NumericMatch(relative=-1.0), "relative must be a finite number >= 0, got -1.0"),
        (lambda: NumericMatch(absolute=float("nan")), "absolute must be a finite number >= 0, got nan"),
        (lambda: NumericMatch(percent="both"), "percent must be"),
        (lambda: NumericMatch(where="first"), "where must be"),
        (lambda: ExactMatch(where="first")("a", {"answer": "a"}), "where must be"),
    ],
)
def test_options_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
