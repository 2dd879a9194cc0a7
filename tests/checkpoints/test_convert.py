# SPDX-License-Identifier: Apache-2.0
"""scripts/convert.py as a person calls it."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def convert(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "scripts/convert.py", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )


def test_help_answers_without_jax(tmp_path):
    (tmp_path / "jax.py").write_text("raise SystemExit('jax was imported')")
    done = convert("--help", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.returncode == 0 and "--max-shard-bytes" in done.stdout, done.stderr


def test_it_writes_a_folder_and_says_so_in_one_line_and_refuses_in_one(golden, tmp_path):
    done = convert(golden["mistral"], tmp_path / "out")
    assert done.returncode == 0 and done.stdout.count("\n") == 1 and "mistral" in done.stdout, done.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "pickled" / "config.json").write_bytes((golden["mistral"] / "config.json").read_bytes())
    refused = convert(tmp_path / "pickled", tmp_path / "two")
    assert refused.returncode == 2 and "pickle" in refused.stderr and "Traceback" not in refused.stderr
