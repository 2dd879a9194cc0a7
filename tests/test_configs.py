# SPDX-License-Identifier: Apache-2.0
"""Every file of `configs/` loads, is a lab note, and runs two tiny steps to the end."""

import ast
import dataclasses
import math
from pathlib import Path

import pytest

from jaxlm.config import load_config, read_config
from jaxlm.evaluation import evaluate_run
from jaxlm.run import run
from jaxlm.shrink import shrink
from jaxlm.train.reporter import read_metrics

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_a_lab_note(name):
    note = ast.get_docstring(ast.parse((ROOT / "configs" / f"{name}.py").read_text()))
    assert note and f"python scripts/train.py configs/{name}.py" in note, "its docstring shows the command"


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_takes_two_steps(name, tmp_path):
    config = shrink(load_config(ROOT / "configs" / f"{name}.py"))
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, directory=str(tmp_path / name)))
    result = run(config)
    lines = read_metrics(tmp_path / name)
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)
    assert result.before.keys() == result.after.keys() != set()
    assert read_config(tmp_path / name) == config
    assert (tmp_path / name / "report.html").stat().st_size > 10_000
    if name == "quickstart":
        again = evaluate_run(tmp_path / name, config)
        assert again == pytest.approx(dict(result.after), rel=1e-5), "the exported model is the trained one"
