# SPDX-License-Identifier: Apache-2.0
"""Multiple choice: the option a text names, in the many ways in which one is named."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.data.records import BadRecord
from jaxlm.rewards import MultipleChoice

CITIES = {"choices": ["Rome", "Paris", "New York", "New York City"], "answer": "B"}

FORMS = [
    "{}",
    "({})",
    "[{}]",
    "{}.",
    "{})",
    "{}:",
    "**{}**",
    "**{}.**",
    " {}\n",
    r"\boxed{{{}}}",
    r"\boxed{{\text{{{}}}}}",
]
FORMS += [
    r"$\boxed{{\textbf{{({})}}}}$",
    "<answer>{}</answer>",
    "#### {}",
    "Answer: {}",
    "**Answer:** {}",
    "answer: ({})",
]
FORMS += ["The answer is {}.", "The correct answer is **{}**.", "the correct option is {}", "So the answer is ({})."]
FORMS += [
    "I think so.\nThus option {}.",
    "Let us see.\nI choose {} because it fits.",
    "It must be ({}), I think.",
    "{}) is it",
]
FORMS += ["Answer:\n\n{}\n", "The answer to this question is {}. It fits.", "The answer is: '{}'", "Option {} is right"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("label", "ABCD")
def test_a_label_is_found_in_every_form(form, label):
    assert MultipleChoice().answer(form.format(label), CITIES) == label


@pytest.mark.parametrize(
    "form", ["{}", "{}.", "Answer: {}", "The answer is {}.", r"\boxed{{{}}}", "B: {}", "(B) {}", "It is {}."]
)
def test_the_words_of_an_option_name_it(form):
    assert MultipleChoice()(form.format("Paris"), CITIES) == 1.0


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("", None),
        ("A or B", None),
        ("The answer is A or B.", None),
        ("(A) and (B)", None),
        (r"\boxed{A, B}", None),
        ("A/B", None),
        ("Rome and Paris", None),
        ("It is neither.", None),
        ("A dog barks", None),
        ("Because I say so", None),
        ("E", None),
        ("It is (B), because (A) is wrong", "B"),
        ("(A) is wrong, (C) too.\nThe answer is (B).", "B"),
        ("I considered New York City.", "D"),
        ("New York", "C"),
        ("b", "B"),
        ("Paris, of course, is bigger than Bern", "B"),
        ("The answer is obvious.\nParis", "B"),
        ("A is too small. C is too new.\nSo option B.", "B"),
    ],
)
def test_the_option_meant_is_found_and_several_are_none(text, label):
    assert MultipleChoice().answer(text, CITIES) == label


@pytest.mark.parametrize("answer", ["B", "b", "(B)", "B.", "Paris", " paris ", 1])
def test_the_record_names_its_answer_by_label_text_or_index(answer):
    assert MultipleChoice()("B", {**CITIES, "answer": answer}) == 1.0
    assert MultipleChoice()("A", {**CITIES, "answer": answer}) == 0.0


def test_labels_of_the_record_count_before_the_alphabet():
    record = {"choices": {"text": ["one", "two"], "label": ["1", "2"]}, "answer": "2"}
    assert [MultipleChoice()(text, record) for text in ("2", "(2)", "two", "1", "B")] == [1.0, 1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({**CITIES, "answer": "E"}, "'E' is neither a label"),
        ({**CITIES, "answer": 4}, "an index into 4 choices"),
        ({**CITIES, "answer": -1}, "an index into 4 choices"),
        ({"choices": "Rome", "answer": "A"}, "'choices' must be a list of texts"),
        ({"choices": {"text": ["x"], "label": []}, "answer": "A"}, "1 choices need as many labels"),
        ({"choices": ["x", "x"], "answer": "x"}, "neither a label"),
    ],
)
def test_a_record_that_names_no_option_is_refused(record, message):
    with pytest.raises(BadRecord, match=message):
        MultipleChoice()("A", record)


@given(st.text(max_size=30), st.lists(st.text(max_size=8), min_size=1, max_size=5))
def test_whatever_the_options_say_a_text_names_one_of_them_or_none(text, choices):
    label = MultipleChoice().answer(text, {"choices": choices, "answer": 0})
    assert label is None or label in "ABCDE"[: len(choices)]
