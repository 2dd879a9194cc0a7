# SPDX-License-Identifier: Apache-2.0
"""Laws of the report page: whole in itself, every task and run on it, sound for odd runs."""

import html.parser
import io
import json
import re

import numpy as np
import pytest

from jaxlm.train.continual import continual_metrics
from jaxlm.train.held_out import Items
from jaxlm.train.page import compare_runs, write_page
from jaxlm.train.reporter import RunReporter
from jaxlm.train.scores import Scores

VOID = {"meta", "line", "br", "link", "img", "path", "use", "rect"}


class Balanced(html.parser.HTMLParser):
    """Fails where tags do not match, and collects ids and links."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.loads = [], [], []

    def handle_starttag(self, tag, attributes):
        said = dict(attributes)
        self.ids += [said["id"]] if "id" in said else []
        self.loads += [said[key] for key in ("src", "href", "xlink:href") if key in said]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


def make_run(directory, *, steps=50, tasks=("copy", "sum"), seed=0, better=True):
    reporter = RunReporter(directory, steps, stream=io.StringIO())
    loss = {0: 3.0, steps: 1.0 if better else 4.0}
    for step in (0, *range(1, steps + 1)):
        if step:
            reporter.train(step, {"loss": 3 - step / steps, "tokens_per_second": 10.0, "learning_rate": 1e-3})
        if step in loss:
            reporter.evaluation(
                step, {f"loss/{t}": loss[step] for t in tasks} | {f"exact_match/{t}": 0.5 for t in tasks}
            )
    reporter.event("save", step=steps, seconds=1.25)
    reporter.close()
    config = {"class": "jaxlm.config.RunConfig", "run": {"class": "jaxlm.train.options.RunOptions", "seed": seed}}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def add_scores(directory, *, right=((1, 1, 2), (8, 2, 1), (5, 9, 0)), learned=((0,), (1,)), records=(0, 1)):
    """Two records of ten tokens of each of three tasks; the stages learn the first two tasks."""
    scores = Scores(directory, ("copy", "a<b", "general"))
    for name, correct, tasks in zip(("before", *("one", "two")[: len(learned)]), right, ((), *learned), strict=False):
        correct = np.repeat(correct, 2).astype(float)
        ids = np.repeat([0, 1, 2], 2), np.tile(records, 3)
        scores.record(name, Items(*ids, 20 - correct, np.full(6, 10.0), correct), learned=tasks)
    return scores


def parse(path):
    text = path.read_text()
    page = Balanced()
    page.feed(text)
    page.close()
    assert not page.open
    return text, page


def test_the_page_is_whole_and_loads_nothing(tmp_path):
    text, page = parse(write_page([make_run(tmp_path / "one")], tmp_path / "deep" / "report.html"))
    assert text.startswith("<!doctype html>") and "<script" not in text
    assert all(link.startswith("#") for link in page.loads), "everything it shows is inside it"
    assert len(page.ids) == len(set(page.ids)), "ids of the pictures do not clash"
    assert "run.seed" in text and "1.2 s in 1" in text


def test_every_task_has_a_picture_and_a_before_and_after(tmp_path):
    text, _ = parse(write_page([make_run(tmp_path / "one", tasks=("copy", "a<b"))], tmp_path / "r.html"))
    assert re.search(r"copy</th><td>loss, nats / token</td><td>3</td><td><b>1</b></td><td class=\"better\">", text)
    assert "a&lt;b" in text and "a<b" not in text
    worse, _ = parse(write_page([make_run(tmp_path / "two", better=False)], tmp_path / "r.html"))
    assert 'class="worse"' in worse


def test_runs_stand_side_by_side_with_what_differs(tmp_path):
    runs = [make_run(tmp_path / name, seed=seed) for name, seed in [("a", 1), ("b", 2)]]
    text, _ = parse(write_page(runs, tmp_path / "r.html"))
    differences = text.partition("<h2>Config</h2>")[2].partition("<details>")[0]
    assert "run.seed" in differences and "run.class" not in differences
    assert "var(--run0)" in text and "var(--run1)" in text and "#123456" not in text
    same, _ = parse(write_page([runs[0], make_run(tmp_path / "c", seed=1)], tmp_path / "r.html"))
    assert "The runs have one config." in same


def test_a_run_that_has_just_begun_and_one_that_went_wrong_still_get_a_page(tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "metrics.jsonl").write_text("")
    reporter = RunReporter(tmp_path / "wrong", 5, stream=io.StringIO())
    reporter.train(1, {"loss": float("nan"), "update_norm": float("inf")})
    reporter.close()
    text, _ = parse(write_page([tmp_path / "new", tmp_path / "wrong"], tmp_path / "r.html"))
    assert "nothing reported" in text
    with pytest.raises(ValueError, match=r"is no run directory: it has no metrics\.jsonl"):
        write_page([tmp_path / "nowhere"], tmp_path / "r.html")


def test_scores_over_the_stages_are_a_heat_map_with_a_number_in_every_cell(tmp_path):
    add_scores(make_run(tmp_path / "one"))
    text, page = parse(write_page([tmp_path / "one"], tmp_path / "r.html"))
    part = text.partition("<h2>Scores over the stages</h2>")[2].partition("</section>")[0]
    accuracy = part.partition("</svg>")[0]
    written = [int(x) for x in re.findall(r">(\d+)</text>", accuracy)]
    assert written == [10, 80, 50, 10, 20, 90, 20, 10, 0]
    assert "before" in accuracy and "a&lt;b" in accuracy
    assert re.findall(r">(\d\.\d\d)</text>", part)[:3] == ["1.90", "1.20", "1.50"], "losses as they are measured"
    assert len(page.ids) == len(set(page.ids))


def test_numbers_of_runs_are_those_of_the_metrics_in_page_and_text(tmp_path):
    for name, right in (("a", ((1, 1, 2), (8, 2, 1), (5, 9, 0))), ("b", ((1, 1, 2), (8, 2, 2), (7, 8, 2)))):
        scores = add_scores(make_run(tmp_path / name), right=right)
    only = [add_scores(tmp_path / f"only{i}", right=((1, 1, 2), (9, 9, 0)), learned=((i,),)) for i in (0, 1)]
    assert only[0].matrix().trained == [0]
    runs, alone = [tmp_path / "a", tmp_path / "b"], [tmp_path / "only0", tmp_path / "only1"]
    numbers = continual_metrics(scores.matrix(), specialist=(0.9, 0.9, None))
    shown = ["final", "final_worst", "plasticity", "backward_transfer", "forgetting", "base_drop"]
    expected = ["b", *(f"{100 * numbers[name]:.1f}" for name in shown)]
    table = compare_runs(runs, specialists=alone)
    assert table.splitlines()[2].split() == expected == ["b", "75.0", "70.0", "-10.0", "-10.0", "10.0", "0.0"]
    text, _ = parse(write_page(runs, tmp_path / "r.html", specialists=alone))
    assert "".join(f"<td>{number}</td>" for number in expected[1:]) in text
    assert "plasticity, points" in text and "backward transfer, points" in text
    without = compare_runs(runs)
    assert "plasticity" not in without and len(without.splitlines()) == 3
    add_scores(make_run(tmp_path / "c"), records=(5, 6))
    with pytest.raises(ValueError, match="the specialist of copy was scored on other records"):
        compare_runs([tmp_path / "c"], specialists=alone)


def test_runs_without_scores_or_without_a_column_before_training_say_so_quietly(tmp_path):
    plain = make_run(tmp_path / "plain")
    assert compare_runs([plain]) == ""
    text, _ = parse(write_page([plain], tmp_path / "r.html"))
    assert "Scores over the stages" not in text and "Learning and keeping" not in text and "What is held" not in text
    late = Scores(make_run(tmp_path / "late"))
    late.record("one", Items(*np.zeros((2, 1), int), *np.ones((3, 1))), learned=[0])
    text, _ = parse(write_page([tmp_path / "late"], tmp_path / "r.html"))
    assert "evaluate before training" in text and compare_runs([tmp_path / "late"]) == ""


def test_held_sets_are_curves_beside_their_chance_level(tmp_path):
    reporter = RunReporter(tmp_path / "held", 20, stream=io.StringIO())
    for step in range(1, 21):
        said = {"overlap_first": 0.8 - step / 50, "overlap_previous": 0.9, "chance": 0.05, "entered": 0.1, "left": 0.1}
        said |= {"held/attention": 0.4, "held/mlp": 0.6}
        reporter.train(step, {"loss": 1.0} | {f"isolation/{name}": value for name, value in said.items()})
    reporter.close()
    text, _ = parse(write_page([make_run(tmp_path / "other"), tmp_path / "held"], tmp_path / "r.html"))
    part = text.partition("<h2>What is held</h2>")[2].partition("</section>")[0]
    titles = ["Overlap with the first set", "Overlap with the previous set", "Entered", "Left"]
    for title in (*titles, "Held: attention", "Held: mlp"):
        assert f">{title}</text>" in part, title
    assert part.count("stroke-opacity: 0.5") == 2, "the chance level stands in the two pictures of overlap"
