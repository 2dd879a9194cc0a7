# SPDX-License-Identifier: Apache-2.0
"""The script that generates, as a user calls it."""

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def generate(monkeypatch, capsys):
    """Runs scripts/generate.py in this process: exit code, standard output, standard error."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(ROOT / "scripts" / "generate.py"), run_name="__main__")
        captured = capsys.readouterr()
        return stopped.value.code, captured.out, captured.err

    return call
