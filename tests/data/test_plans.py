# SPDX-License-Identifier: Apache-2.0
"""Exercises with plans: right by other means than the generators', and plans that tell no answer."""

import itertools
import json
import re

import pytest

from jaxlm.data import DataConfig, JsonLines, ProceduralPlans, Task, byte_tokenizer, leaks_answer, prepare
from jaxlm.data.plans import PLANNED, PlannedExercises
from jaxlm.data.records import Completion, Planned, parse, parts_of, question


def items(name, size=300, **options):
    exercises = PlannedExercises(ProceduralPlans(generator=name, size=size, options=options))
    return [parse(exercises[i]) for i in range(size)]


def test_a_recipe_is_its_operations_by_key_and_their_values():
    for item in items("recipe"):
        start, listed = re.fullmatch(r"(\d+): (.*)=", item.question).groups()
        value, values, plan = int(start), [], []
        for entry in sorted(listed.split()):  # keys are single letters, each once
            sign, number = entry[1], int(entry[2:])
            value = (value + number if sign == "+" else value - number if sign == "-" else value * number) % 97
            values.append(str(value))
            plan.append(entry[1:])
        assert item.plan.split() == plan and item.steps.split() == values and item.answer == values[-1]
        assert 3 <= len(plan) <= 6
    found = items("recipe", modulus=10)
    assert any(leaks_answer(item.plan, item.answer) for item in found), "what the question holds too is no leak"


def test_spelled_steps_are_plan_and_values_of_the_same_questions():
    for short, item in zip(items("recipe", modulus=10), items("recipe", modulus=10, spelled=True), strict=True):
        pairs = [step.split("=") for step in item.steps.split()]
        assert [a for a, _ in pairs] == short.plan.split() and [b for _, b in pairs] == short.steps.split()
        assert item._replace(steps="") == short._replace(steps="")


def test_an_implication_is_found_by_following_the_rules():
    answers = set()
    for item in items("implication"):
        rules, asked = item.question.split(", ")
        follows, (first, last) = dict(rule.split(">") for rule in rules.split()), re.findall(r"\b[a-z]\b", asked)
        way = [first]
        while way[-1] in follows:
            way.append(follows[way[-1]])
        assert item.plan.split() == way and item.answer == ("yes" if last in way else "no")
        assert item.steps.split() == [f"{a}>{b}" for a, b in itertools.pairwise(way)]
        answers.add(item.answer)
    assert answers == {"yes", "no"}


@pytest.mark.parametrize("name", PLANNED)
def test_an_item_depends_on_seed_and_index_alone_and_its_plan_tells_no_answer(name):
    short, long = (PlannedExercises(ProceduralPlans(generator=name, size=n, seed=3)) for n in (5, 300))
    assert [long[i] for i in (4, 2, 0)] == [short[i] for i in (4, 2, 0)]
    assert not any(
        leaks_answer(r["plan"], r["answer"], question=r["question"]) for r in map(long.__getitem__, range(300))
    )
    assert len({long[i]["question"] for i in range(300)}) > 290
    assert long[0] != PlannedExercises(ProceduralPlans(generator=name, size=5, seed=4))[0]


@pytest.mark.parametrize(
    "plan, answer, asked, leaks",
    [
        ("add, then say 1,024", "1024", "", True),
        ("it is 7.0", "7", "", True),
        ("it is 17", "7", "", False),
        ("add 3", "3", "what is 0 + 3?", False),
        ("then New  York", "new york", "", True),
        ("then new", "new york", "", False),
        ("minus 4", "-4", "", False),
        ("", "4", "", False),
        ("say Yes", "yes", "", True),
    ],
)
def test_a_plan_leaks_an_answer_that_stands_in_it_as_words_and_not_in_the_question(plan, answer, asked, leaks):
    assert leaks_answer(plan, answer, question=asked) is leaks


GOOD = {"question": "2+2=", "plan": "add", "steps": "2 4", "answer": "4"}


def test_as_text_steps_and_answer_follow_the_question_a_line_each():
    assert parse(GOOD) == Planned("2+2=", "add", "2 4", "4") and question(parse(GOOD)) == "2+2="
    assert parts_of(parse(GOOD)) == [Completion("2+2=", "\n2 4\n4")]
    assert parts_of(parse(GOOD | {"steps": ""})) == [Completion("2+2=", "\n4")]
    assert parse({name: GOOD[name] for name in ("question", "steps", "answer")}).plan == ""


def test_broken_and_leaking_records_are_named_by_line_or_counted(tmp_path):
    path = tmp_path / "plans.jsonl"
    lines = [
        GOOD,
        GOOD | {"plan": "the answer is 4", "question": "two and two="},
        {"question": "3=", "answer": "3"},
        GOOD | {"answer": " "},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = DataConfig(tasks=(Task(name="sums", train=JsonLines(path=str(path))),), length=64)
    with pytest.raises(ValueError, match=r"plans\.jsonl:2: plan 'the answer is 4' holds the answer '4'"):
        prepare(data, byte_tokenizer(), split="train", directory=tmp_path / "data")
    skipping = DataConfig(tasks=data.tasks, length=64, on_bad="skip")
    skipped = prepare(skipping, byte_tokenizer(), split="train", directory=tmp_path / "data").counts["sums"]
    assert {reason: entry["count"] for reason, entry in skipped["skipped"].items()} == {
        "plan leaks the answer": 1, "missing field": 1, "empty completion": 1,
    }  # fmt: skip
    assert skipped["records"] == 1


@pytest.mark.parametrize(
    "source, message",
    [
        (ProceduralPlans(generator="pie", size=1), "no generator 'pie'; there are implication, recipe"),
        (ProceduralPlans(generator="recipe", size=1, options={"moduls": 7}), "has no option 'moduls'"),
        (ProceduralPlans(generator="recipe", size=0), "size of generator 'recipe' must be at least 1"),
    ],
)
def test_unknown_generators_and_options_are_named(source, message):
    with pytest.raises(ValueError, match=message):
        PlannedExercises(source)


def test_difficulty_out_of_range_is_refused():
    for name, options in [("recipe", {"least": 4, "most": 3}), ("recipe", {"keys": 5}), ("implication", {"most": 13})]:
        with pytest.raises(ValueError, match="need least <= most"):
            items(name, size=1, **options)
