# SPDX-License-Identifier: Apache-2.0
"""Laws of the report page: whole in itself, every task and run on it, sound for odd runs."""

import html.parser
import io
import json
import re

import pytest

from jaxlm.train.page import write_page
from jaxlm.train.reporter import RunReporter

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
