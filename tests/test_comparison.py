# SPDX-License-Identifier: Apache-2.0
"""Laws of comparisons: who is trained at which rate, which numbers are reported, what is refused.

That whole comparisons run, resume and report is in test_configs.py.
"""

import dataclasses
import json

import numpy as np
import pytest

from jaxlm.comparison import at_rate, best_rate, read_trained, run_directory
from jaxlm.comparison_page import write_comparison
from jaxlm.comparison_report import findings, table
from jaxlm.config import Comparison, RunConfig, load_comparison
from jaxlm.data import DataConfig, Procedural, Task
from jaxlm.methods import CpiFt, Dpi, Epi, MultiStage, Sft
from jaxlm.nn import ModelConfig
from jaxlm.train import AdamW, Items, MeshOptions, RunOptions, Scores


def task(name, trained=True):
    source = Procedural(generator=name, size=40)
    return Task(name=name, train=source if trained else None, test=source)


def comparison(directory, **changes):
    run = RunConfig(
        model=ModelConfig(vocab_size=272, width=16, num_layers=1, num_heads=2),
        tokenizer="bytes",
        data=DataConfig(tasks=(task("copying", trained=False), task("rotation"), task("increment")), length=48),
        method=Sft(),
        run=RunOptions(steps=4, directory=str(directory)),
    )
    whole = {
        "run": run,
        "arms": {"plain": MultiStage(), "held": MultiStage(method=Epi()), "drawn": MultiStage(method=Epi())},
        "learning_rates": (0.1, 0.2, 0.3),
        "seeds": (0, 1),
        "plain": "plain",
        "controls": {"held": "drawn"},
    }
    return Comparison(**(whole | changes))


def finish(this, arm, rate, seed, scores, *, tokens=100):
    """Writes a finished run: `scores` [columns][tasks] even and odd accuracies, after rotation and after increment."""
    directory = run_directory(this, arm, rate, seed)
    directory.mkdir(parents=True)
    (directory / "metrics.jsonl").touch()
    kept = Scores(directory, this.run.data.task_names)
    task_ids, record_ids = np.repeat(np.arange(3), 20), np.tile(np.arange(20), 3)
    for column, learned in (("before", ()), ("stage-1", (1,)), ("after", (2,))):
        means = scores[("before", "stage-1", "after").index(column)]
        right = np.array([means[t][r % 2] > (r // 2) / 10 for t, r in zip(task_ids, record_ids, strict=True)])
        kept.record(column, Items(task_ids, record_ids, np.ones(60), np.ones(60), right * 1.0), learned=learned)
    (directory / "result.json").write_text(json.dumps({"trained_tokens": tokens, "tokens": tokens, "seconds": 1.0}))


def column(old, first, second):
    """Accuracies of three tasks, the same on both halves."""
    return [(x, x) if isinstance(x, float) else x for x in (old, first, second)]


BEFORE = column(0.8, 0.0, 0.0)


def test_a_rate_reaches_every_optimizer_however_deep():
    for method in (Sft(), Epi(), MultiStage(method=Epi()), Dpi(), CpiFt()):
        text = repr(at_rate(method, 0.125))
        assert text.count("learning_rate=0.125") == text.count("learning_rate=") > 0
    with pytest.raises(ValueError, match="MeshOptions has no AdamW"):
        at_rate(MeshOptions(), 0.1)
    assert at_rate(Sft(optimizer=AdamW(b2=0.5)), 0.1).optimizer.b2 == 0.5


def test_the_rate_is_chosen_on_the_even_records_and_reported_on_the_odd_ones(tmp_path):
    this = comparison(tmp_path)
    for rate, even in ((0.1, 0.4), (0.2, 0.9), (0.3, 0.6)):
        for arm in ("plain", "held", "drawn", "alone/rotation", "alone/increment"):
            for seed in (0, 1) if rate == 0.2 else (0,):
                last = column(0.5, (even, 0.3), (even, 0.3))
                finish(this, arm, rate, seed, [BEFORE, column(0.7, 1.0, 0.0), last])
    assert best_rate(this, "held") == 0.2
    found = {arm.name: arm for arm in findings(this, resamples=20)}
    assert found["held"].rate == 0.2
    assert found["held"].metrics["final"].mean == pytest.approx(0.3)
    assert found["held"].metrics["base_drop"].mean == pytest.approx(0.3)
    assert found["held"].metrics["backward_transfer"].mean == pytest.approx(-0.7)
    assert found["held"].metrics["plasticity"].mean == pytest.approx((1.0 - 0.3 + 0.0) / 2)


def test_bold_is_what_counts_against_the_plain_arm_and_the_control(tmp_path):
    this = comparison(tmp_path)
    ends = {"plain": 0.3, "held": 0.9, "drawn": 0.3}
    for arm in (*ends, "alone/rotation", "alone/increment"):
        for rate, seed in ((0.1, 0), (0.1, 1), (0.2, 0), (0.3, 0)):
            end = ends.get(arm, 1.0) * (1.0 if rate == 0.1 else 0.5)
            finish(this, arm, rate, seed, [BEFORE, column(0.7, 0.9, 0.0), column(0.5, end, 0.9)])
    text = table(this, findings(this, resamples=200))
    rows = {tuple(line.split("|")[1:3]): line for line in text.splitlines() if line.startswith("|")}
    assert "**+30.0" in rows[" held ", " plain "] and "**+30.0" in rows[" held ", " drawn "]
    assert "**" not in rows[" drawn ", " plain "]


def test_a_report_in_between_shows_what_is_there_and_names_what_is_missing(tmp_path):
    this = comparison(tmp_path)
    with pytest.raises(ValueError, match="arm 'plain' has not been trained at all of its rates"):
        findings(this, resamples=20)
    for arm, tried in {
        "plain": ((0.1, 0), (0.1, 1), (0.2, 0), (0.3, 0)),
        "held": ((0.1, 0), (0.2, 0), (0.3, 0)),
    }.items():
        for rate, seed in tried:
            finish(this, arm, rate, seed, [BEFORE, column(0.7, 0.9, 0.0), column(0.5, 0.2 / rate, 0.1 / rate)])
    finish(this, "drawn", 0.1, 0, [BEFORE, column(0.7, 0.9, 0.0), column(0.5, 0.9, 0.9)])
    found = findings(this, resamples=20)
    assert [(arm.name, len(arm.runs)) for arm in found] == [("plain", 2), ("held", 1)]
    assert not any(arm.versus for arm in found)  # one seed of an arm proves nothing
    text = table(this, found)
    assert text.endswith("Not finished: drawn; held (1 of 2 seeds); the specialists.")
    assert "plasticity" not in found[0].metrics
    assert write_comparison(this, found).is_file()
    finish(this, "held", 0.1, 1, [BEFORE, column(0.7, 0.9, 0.0), column(0.5, 0.9, 0.9)])
    assert set(findings(this, resamples=20)[1].versus) == {"plain"}


def test_a_missing_run_is_named(tmp_path):
    this = comparison(tmp_path)
    assert read_trained(this, "plain", 0.1, 0) is None
    with pytest.raises(ValueError, match=r"arm 'plain' has not been trained at 0.1 yet"):
        best_rate(this, "plain")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rates": (0.1, 0.2)}, "at least three learning rates"),
        ({"seeds": (0,)}, "at least two seeds"),
        ({"plain": "sft"}, r"no arm \['sft'\]; there are plain, held, drawn"),
        ({"controls": {"held": "nobody"}}, r"no arm \['nobody'\]"),
    ],
)
def test_comparisons_that_prove_nothing_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        comparison(tmp_path, **changes)
    with pytest.raises(ValueError, match="needs a directory"):
        this = comparison(tmp_path)
        comparison(tmp_path, run=dataclasses.replace(this.run, run=dataclasses.replace(this.run.run, directory="")))


def test_a_config_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "run.py"
    path.write_text("def get_config():\n    return None\n")
    with pytest.raises(ValueError, match=r"has no function get_comparison\(\) -> Comparison"):
        load_comparison(path)
