# SPDX-License-Identifier: Apache-2.0
"""Every file of `configs/` loads, is a lab note, and runs two tiny steps to the end."""

import ast
import dataclasses
import math
from pathlib import Path

import pytest

from jaxlm.comparison import compare
from jaxlm.comparison_lengths import compare_lengths
from jaxlm.comparison_lengths_page import write_length_comparison
from jaxlm.comparison_lengths_report import length_findings, length_table
from jaxlm.comparison_page import write_comparison
from jaxlm.comparison_plans import compare_plans
from jaxlm.comparison_plans_report import plan_findings, plan_table
from jaxlm.comparison_report import findings, table
from jaxlm.config import Comparison, LengthComparison, PlanComparison, load_comparison, load_config, read_config
from jaxlm.evaluation import evaluate_run
from jaxlm.run import run, total_steps
from jaxlm.shrink import shrink, shrink_comparison, shrink_length_comparison, shrink_plan_comparison
from jaxlm.train.reporter import read_metrics

ROOT = Path(__file__).resolve().parents[1]
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
COMPARISONS = [name for name in NAMES if name.startswith("compare_")]
CONFIGS = [name for name in NAMES if name not in COMPARISONS]


@pytest.mark.parametrize("name", NAMES)
def test_a_config_is_a_lab_note(name):
    note = ast.get_docstring(ast.parse((ROOT / "configs" / f"{name}.py").read_text()))
    script = "compare" if name in COMPARISONS else "train"
    assert note and f"python scripts/{script}.py configs/{name}.py" in note, "its docstring shows the command"


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_takes_two_steps(name, tmp_path):
    config = shrink(load_config(ROOT / "configs" / f"{name}.py"))
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, directory=str(tmp_path / name)))
    result = run(config)
    lines = read_metrics(tmp_path / name)
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    num_tasks = sum(task.train is not None for task in config.data.tasks)
    assert len(losses) == total_steps(config.method, config.run.steps, num_tasks)
    assert all(math.isfinite(loss) for loss in losses)
    assert result.before.keys() == result.after.keys() != set()
    assert read_config(tmp_path / name) == config
    assert (tmp_path / name / "report.html").stat().st_size > 10_000
    if name == "quickstart":
        again = evaluate_run(tmp_path / name, config)
        assert again == pytest.approx(dict(result.after), rel=1e-5), "the exported model is the trained one"


LOADED = {name: load_comparison(ROOT / "configs" / f"{name}.py") for name in COMPARISONS}


@pytest.mark.parametrize("name", [name for name in COMPARISONS if isinstance(LOADED[name], Comparison)])
def test_every_comparison_trains_its_arms_and_reports(name, tmp_path, quick_compiles):
    """Two updates a task, two seeds; what is finished is not trained again."""
    comparison = shrink_comparison(LOADED[name], tmp_path / name)
    compare(comparison)
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / name).rglob("result.json")}
    compare(comparison)
    assert done == {path: path.stat().st_mtime_ns for path in (tmp_path / name).rglob("result.json")}
    longer = dataclasses.replace(comparison.run.run, steps=2 * comparison.run.run.steps)
    with pytest.raises(ValueError, match=r"was trained with run\.steps"):
        compare(dataclasses.replace(comparison, run=dataclasses.replace(comparison.run, run=longer)))
    arms = findings(comparison, resamples=50)
    told = table(comparison, arms)
    assert all(f"| {arm} |" in told for arm in comparison.arms)
    page = write_comparison(comparison, arms).read_text()
    assert all(arm in page for arm in comparison.arms) and "nan" not in page


@pytest.mark.parametrize("name", [name for name in COMPARISONS if isinstance(LOADED[name], LengthComparison)])
def test_every_comparison_over_lengths_trains_tests_and_reports(name, tmp_path, quick_compiles):
    """Two updates, two seeds, two lengths; what is finished is neither trained nor tested again."""
    comparison = shrink_length_comparison(LOADED[name], tmp_path / name)
    compare_lengths(comparison)
    kept = [path for pattern in ("result.json", "[0-9].npz") for path in (tmp_path / name).rglob(pattern)]
    done = {path: path.stat().st_mtime_ns for path in kept}
    compare_lengths(comparison)
    assert len(done) == 2 * (len(comparison.arms) + len(comparison.tested)), "a run and a test for each seed"
    assert done == {path: path.stat().st_mtime_ns for path in kept}
    arms = length_findings(comparison, resamples=50)
    told = length_table(comparison, arms)
    assert all(f"| {arm} |" in told for arm in comparison.tested) and "Not finished" not in told
    page = write_length_comparison(comparison, arms).read_text()
    assert all(arm in page for arm in comparison.tested) and "nan" not in page


@pytest.mark.parametrize("name", [name for name in COMPARISONS if isinstance(LOADED[name], PlanComparison)])
def test_every_comparison_of_plans_trains_judges_and_reports(name, tmp_path, quick_compiles):
    """Two updates, two seeds, three arms; what is finished is not trained again."""
    comparison = shrink_plan_comparison(LOADED[name], tmp_path / name)
    compare_plans(comparison)
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / name).rglob("result.json")}
    compare_plans(comparison)
    assert len(done) == 2 * 3 and done == {path: path.stat().st_mtime_ns for path in done}
    arms = plan_findings(comparison, resamples=50)
    told = plan_table(comparison, arms)
    assert all(f"| {arm} |" in told for arm in comparison.arms) and "nan" not in told and "Not finished" not in told
    plain, capsule, spelled = (arm.numbers for arm in arms)
    split = next(iter(comparison.tests))
    assert capsule[f"tokens/{split}"] - capsule[f"visible/{split}"] == LOADED[name].arms["capsule"].num_capsules
    assert f"plan_nll/{split}" in capsule and f"plan_nll/{split}" not in spelled
    for control in ("shuffled", "mean"):
        assert f"{control}/{split}" in capsule and f"{control}/{split}" not in plain
    learnt = {path.parent.parent.name: read_config(path.parent).data.tasks[0].train.options for path in done}
    assert "spelled" not in learnt["capsule"] and learnt["CoT-SFT, spelled out"]["spelled"] is True
    for path in done:
        if path.parent.parent.name == "capsule" and path.parent.name.endswith(f"-{comparison.seeds[1]}"):
            path.unlink()
    assert "Not finished: capsule (1 of 2 seeds)." in plan_table(comparison, plan_findings(comparison, resamples=50))
