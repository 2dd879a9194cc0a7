# SPDX-License-Identifier: Apache-2.0
"""The benchmark runs, matches its arms, and tells of an arm that is not installed instead of failing."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments, what="step"):
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "NPROC")}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "scripts/benchmark.py", what, "--shape", "tiny", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_arms_are_matched_timed_and_absent_ones_told():
    done = run("--arms", "ours,plain,tunix", "--steps", "2")
    assert done.returncode == 0, done.stderr
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines(done)}
    assert float(rows["ours"][0]) > 0 and float(rows["plain"][5]) > 0
    # Four updates of AdamW in both: one wrong moment, decay or rate would show.
    assert float(rows["ours"][6]) == pytest.approx(float(rows["plain"][6]), abs=2e-5)
    if importlib.util.find_spec("tunix") is None:
        assert rows["tunix"][0].startswith("absent: No module named")
    assert "MFU of ours" in done.stdout and "causal attention counted" in done.stdout


def lines(done):
    return [line for line in done.stdout.splitlines() if line.startswith("|")]


def test_isolation_is_compared_with_adamw_and_costs_the_bytes_it_says():
    done = run("--steps", "3", what="isolation")
    assert done.returncode == 0, done.stderr
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines(done)}
    extra = {arm: float(cells[3]) for arm, cells in rows.items() if arm.startswith(("AdamW", "isolate", "evolving"))}
    # One byte a parameter for the mask, the average, and a few counters that weigh something at this size.
    assert [round(x, 1) for x in extra.values()] == [0.0, 1.0, 5.0, 3.0, 1.0]


def test_decoding_is_timed_beside_others_and_draws_the_same_tokens():
    done = run(
        "--arms", "ours,torch,tunix" if importlib.util.find_spec("torch") else "ours", "--steps", "1", what="decode"
    )
    assert done.returncode == 0, done.stderr
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines(done)}
    assert float(rows["ours"][0]) > 0 and rows["ours"][7] == "0"  # compiled in timed calls
    if "torch" in rows:
        assert float(rows["torch"][6]) == 1.0 and float(rows["torch"][4]) > 0
    assert float(rows["4"][2]) > 0  # 8 samples of one prompt beside 8 prompts


def test_the_roof_line_of_decoding_is_told():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from arms import decode
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    rows = decode.roof_line("tiny", steps=1, new=8, batches=(1, 2))
    told = decode.roof_table("tiny", rows)
    assert [row["batch"] for row in rows] == [1, 2] and "unknown for" in told
    # 2 layers of queries, keys, values, output, a gated MLP, and the head; keys and values of 68 tokens
    weights = 4 * (2 * (16 * 8 * (2 * 2 + 2 * 1) + 3 * 16 * 24) + 16 * 64)
    assert rows[0]["bytes"] == weights + 4 * 2 * 2 * 8 * 68
    assert decode.bytes_per_second("NVIDIA H100 80GB HBM3") == 3.35e12


def test_an_unknown_arm_is_refused():
    done = run("--arms", "ours,torhc")
    assert done.returncode == 2 and "there are no arms ['torhc']" in done.stderr and "Traceback" not in done.stderr
