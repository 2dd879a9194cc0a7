# SPDX-License-Identifier: Apache-2.0
"""Laws of comparisons over lengths: what is trained when, on what it is judged, what is refused.

That a whole one runs, resumes and reports is in test_configs.py.
"""

import dataclasses
import json

import numpy as np
import pytest

from jaxlm.comparison import run_directory, trials
from jaxlm.comparison_lengths import best_rate, model_at, path_of_test, read_tested, settings_of
from jaxlm.comparison_lengths_page import write_length_comparison
from jaxlm.comparison_lengths_report import length_findings, length_table
from jaxlm.config import LengthComparison, RunConfig, to_json
from jaxlm.data import DataConfig, LongText, Task
from jaxlm.methods import Sft
from jaxlm.nn import Alibi, ModelConfig, Nope, Rope
from jaxlm.train import RunOptions

LENGTHS, TOKENS, TAIL = (4, 8, 64), 128, 2


def model(positions):
    return ModelConfig(vocab_size=272, width=16, num_layers=2, num_heads=2, positions=positions)


def comparison(directory, **changes):
    whole = {
        "run": RunConfig(
            model=model(Rope()),
            tokenizer="bytes",
            data=DataConfig(tasks=(Task(name="text", train=LongText(end=0.5)),), length=4, on_long="split"),
            method=Sft(),
            run=RunOptions(steps=2, directory=str(directory)),
        ),
        "arms": {"rope": model(Rope()), "nope": model(Nope()), "alibi": model(Alibi())},
        "yarn": {"yarn": "rope"},
        "learning_rates": (0.1, 0.2, 0.3),
        "seeds": (0, 1),
        "plain": "rope",
        "text": LongText(begin=0.5),
        "lengths": LENGTHS,
        "tokens": TOKENS,
        "tail": TAIL,
        "looked_at": 64,
    }
    return LengthComparison(**(whole | changes))


def trained(this, arm, rate, seed, loss):
    directory = run_directory(this, arm, rate, seed)
    directory.mkdir(parents=True)
    (directory / "result.json").write_text(json.dumps({"loss": loss, "seconds": 1.0}))


def rated(this, arm, best=0.2):
    for rate in this.learning_rates:
        trained(this, arm, rate, 0, 1.0 if rate == best else 2.0)


def write_test(this, name, seed, nll):
    """Writes a test: nll [length index][window][place], and attention that is even over the last quarter."""
    weight = np.zeros((2, 2, 64))
    weight[..., 48:] = 1 / 16
    path = path_of_test(this, name, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {f"nll/{length}": np.reshape(x, (-1, length)) for length, x in zip(LENGTHS, nll, strict=True)}
    np.savez(
        path, settings=np.array(json.dumps(to_json(settings_of(this, name)))), weight=weight, score=weight, **arrays
    )


def even(*losses):
    """The same loss for every token of a length."""
    return [np.full(TOKENS, x) for x in losses]


def test_rates_come_first_then_seed_after_seed_every_arm_at_its_best(tmp_path):
    this = comparison(tmp_path)
    asked = []

    def best(arm):
        asked.append(arm)
        return {"rope": 0.3, "nope": 0.1}[arm]

    told = list(trials(this, ["rope", "nope"], best=best))
    first = [("rope", rate, 0) for rate in (0.1, 0.2, 0.3)] + [("rope", 0.3, 0)]
    second = [("nope", rate, 0) for rate in (0.1, 0.2, 0.3)] + [("nope", 0.1, 0)]
    assert [tuple(trial[:3]) for trial in told] == [*first, *second, ("rope", 0.3, 1), ("nope", 0.1, 1)]
    assert [trial.chosen for trial in told] == [*[False] * 3, True] * 2 + [True] * 2
    assert next(trials(this, ["rope"], best=lambda arm: 1 / 0)).rate == 0.1, "asked when the rates are trained only"


def test_the_rate_is_the_one_of_the_lowest_held_out_loss(tmp_path):
    this = comparison(tmp_path)
    for rate, loss in ((0.1, 1.5), (0.2, 1.4)):
        trained(this, "rope", rate, 0, loss)
    with pytest.raises(ValueError, match=r"arm 'rope' has not been trained at 0.3 yet"):
        best_rate(this, "rope")
    trained(this, "rope", 0.3, 0, 1.6)
    assert best_rate(this, "rope") == 0.2


@pytest.mark.parametrize(("best", "cell"), [(0.1, "0.1*"), (0.2, "0.2"), (0.3, "0.3*")])
def test_a_rate_at_the_edge_of_those_tried_is_marked(tmp_path, best, cell):
    this = comparison(tmp_path)
    rated(this, "rope", best)
    write_test(this, "rope", 0, even(1.0, 1.0, 1.0))
    text = length_table(this, length_findings(this, resamples=10))
    assert f"| rope | {cell} | 1 |" in text and ("a better one may lie beyond" in text) == ("*" in cell)


def test_perplexity_is_exp_of_the_mean_loss_and_the_tail_that_of_the_last_predictions(tmp_path):
    this = comparison(tmp_path)
    rated(this, "rope")
    rng = np.random.default_rng(0)
    losses = [[rng.random(TOKENS) for _ in LENGTHS] for _ in this.seeds]
    for seed, nll in zip(this.seeds, losses, strict=True):
        write_test(this, "rope", seed, nll)
    (arm,) = length_findings(this, resamples=200)
    for index, length in enumerate(LENGTHS):
        each = [np.exp(nll[index].sum() / TOKENS) for nll in losses]
        assert arm.by_seed[length] == pytest.approx(each)
        found = arm.perplexity[length]
        assert found.mean == pytest.approx(np.mean(each)) and found.low <= found.mean <= found.high
        tails = [nll[index].reshape(-1, length)[:, -TAIL:] for nll in losses]
        assert arm.tail[length].mean == pytest.approx(np.mean([np.exp(x.mean()) for x in tails]))


def test_an_arm_is_summed_up_by_its_growth_and_by_the_plain_arm(tmp_path):
    this = comparison(tmp_path)
    for arm in ("rope", "nope"):
        rated(this, arm)
    for seed in this.seeds:
        write_test(this, "rope", seed, even(1.0, 1.5, 3.0))
        write_test(this, "nope", seed, even(1.25, 1.25, 1.25))
    rope, nope = length_findings(this, resamples=50)
    assert rope.growth == pytest.approx([np.exp(2.0)] * 3) and nope.growth == pytest.approx([1.0] * 3)
    assert rope.against == pytest.approx([1.0] * 3) and nope.against == pytest.approx([np.exp(0.25)] * 3)
    assert rope.far == pytest.approx([1.0, 1.0])
    text = length_table(this, [rope, nope])
    assert "| nope | 0.2 | 2 | 3.49 (3.49 to 3.49) | 1.28" in text
    assert text.endswith("Not finished: yarn; alibi.")
    page = write_length_comparison(this, [rope, nope]).read_text()
    assert "Even attention would give 94 %" in page


def test_an_unfinished_comparison_tells_which_seeds_are_missing(tmp_path):
    this = comparison(tmp_path)
    with pytest.raises(ValueError, match=r"arm 'rope' has not been tested yet"):
        length_findings(this)
    rated(this, "rope")
    write_test(this, "rope", 0, even(1.0, 1.0, 1.0))
    arms = length_findings(this, resamples=10)
    assert arms[0].seeds == (0,)
    assert "rope (1 of 2 seeds)" in length_table(this, arms)


def test_a_test_under_other_settings_is_made_again(tmp_path):
    this = comparison(tmp_path)
    rated(this, "rope")
    write_test(this, "rope", 0, even(1.0, 1.0, 1.0))
    assert read_tested(this, "rope", 0) is not None
    for changes in ({"text": LongText(begin=0.6)}, {"tail": 3}, {"tokens": 256}, {"looked_at": 8}):
        assert read_tested(dataclasses.replace(this, **changes), "rope", 0) is None
    trained(this, "rope", 0.1, 1, 0.5)
    best = run_directory(this, "rope", 0.1, 0) / "result.json"
    best.write_text(json.dumps({"loss": 0.1}))
    assert read_tested(this, "rope", 0) is None, "of another rate"


def test_yarn_scales_to_the_length_it_is_tested_at(tmp_path):
    this = comparison(tmp_path, lengths=(4, 8, 8192), tokens=8192, looked_at=8)
    assert model_at(this, "yarn", 4) == this.arms["rope"], "at the training length nothing changes"
    scaling = model_at(this, "yarn", 8).positions.scaling
    assert (scaling.factor, scaling.original_length) == (2.0, 4)
    assert model_at(this, "rope", 8) == this.arms["rope"]
    assert model_at(this, "rope", 8192).attention == "tiled", "memory stays linear in the length"
    assert this.tested == ("rope", "yarn", "nope", "alibi")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rates": (0.1, 0.2)}, "at least three learning rates"),
        ({"seeds": (0,)}, "at least two seeds"),
        ({"plain": "sft"}, r"no arm \['sft'\]"),
        ({"yarn": {"yarn": "alibi"}}, r"'yarn' scales the rotation of Rope, arm 'alibi' has Alibi\(\)"),
        ({"lengths": (8, 64)}, r"grow from the training length 4, got \(8, 64\)"),
        ({"lengths": (4, 64, 8)}, "grow from the training length"),
        ({"tokens": 100}, r"tokens 100 must be a multiple of every length, not so of \[8, 64, 64\]"),
        ({"tail": 5}, r"tail must be in \[1, 4\]"),
    ],
)
def test_comparisons_that_compare_nothing_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        comparison(tmp_path, **changes)
