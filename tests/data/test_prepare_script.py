# SPDX-License-Identifier: Apache-2.0
"""scripts/prepare.py: what it writes is what training opens."""

import runpy
import sys
from pathlib import Path

import pytest

from jaxlm.config import load_config
from jaxlm.data import byte_tokenizer
from jaxlm.run import open_data

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "quickstart.py")
SMALL = [f"data.tasks.{i}.{split}.size={n}" for i in range(3) for split, n in (("train", 20), ("test", 5))]


@pytest.fixture
def script(monkeypatch, capsys):
    """Runs the script in this process: exit code, standard output, standard error."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["prepare.py", *arguments])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(ROOT / "scripts" / "prepare.py"), run_name="__main__")
        captured = capsys.readouterr()
        return stopped.value.code, captured.out, captured.err

    return call


def test_training_opens_what_the_script_wrote_and_a_second_write_is_told(tmp_path, script):
    code, printed, errors = script(CONFIG, "--to", str(tmp_path), *SMALL)
    assert code == 0, errors
    train, test = open_data(load_config(CONFIG, [f"prepared={tmp_path}"]), byte_tokenizer())
    assert train.summary() in printed and test.summary() in printed
    code, _, errors = script(CONFIG, "--to", str(tmp_path), *SMALL, "data.length=64")
    assert code == 2 and "holds train and test data of an earlier config too" in errors
