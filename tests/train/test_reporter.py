# SPDX-License-Identifier: Apache-2.0
"""Laws of what a run says: every line is JSON, nothing is lost, nothing after a rewind remains."""

import io
import json
import math

import numpy as np
import pytest

from jaxlm.train.reporter import SILENT, RunReporter, read_metrics
from jaxlm.train.throughput import PEAK_TFLOPS, Peak, memory_gib, peak, utilisation


@pytest.fixture
def screen():
    return io.StringIO()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def raw(directory):
    return [
        json.loads(line, parse_constant=pytest.fail) for line in (directory / "metrics.jsonl").read_text().splitlines()
    ]


def test_every_line_is_strict_json_and_reads_back(tmp_path, screen):
    reporter = RunReporter(tmp_path, 10, stream=screen)
    reporter.train(1, {"loss": math.nan, "loss/a": np.float32(2), "update_norm": math.inf, "tokens": np.int64(7)})
    reporter.evaluation(1, {"loss": -math.inf})
    reporter.event("saved", path=tmp_path, step=1, took={"seconds": 0.5})
    reporter.close()
    train, evaluation, event = raw(tmp_path)
    assert (train["kind"], train["step"], train["loss"], train["update_norm"]) == ("train", 1, "nan", "inf")
    assert (train["loss/a"], train["tokens"]) == (2.0, 7)
    assert evaluation["loss"] == "-inf" and event["name"] == "saved" and event["took"] == {"seconds": 0.5}
    again = read_metrics(tmp_path)
    assert math.isnan(again[0]["loss"]) and again[1]["loss"] == -math.inf


def test_a_line_is_on_disk_before_the_next_step(tmp_path, screen):
    reporter = RunReporter(tmp_path, 10, stream=screen)
    reporter.train(1, {"loss": 1.0})
    assert len(raw(tmp_path)) == 1
    reporter.close()


def test_rewinding_cuts_what_came_after_and_a_line_broken_by_a_kill(tmp_path, screen):
    reporter = RunReporter(tmp_path, 10, stream=screen)
    for step in range(1, 6):
        reporter.train(step, {"loss": float(step)})
    reporter.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    reporter = RunReporter(tmp_path, 10, stream=screen)
    reporter.rewind(3)
    reporter.train(4, {"loss": 40.0})
    reporter.close()
    assert [line["loss"] for line in raw(tmp_path)] == [1.0, 2.0, 3.0, 40.0]
    assert len(list((tmp_path / "tensorboard").iterdir())) >= 2, "TensorBoard got a file with a purge mark"


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nbroken\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2 is not a line of JSON: 'broken"):
        read_metrics(tmp_path)
    with pytest.raises(ValueError, match="is no run directory"):
        read_metrics(tmp_path / "nowhere")


def test_without_a_terminal_each_report_is_one_plain_line(tmp_path, screen):
    reporter = RunReporter("", 20, flops_per_token=1e6, peak=Peak(1e10, "1 x cpu"), stream=screen)
    reporter.train(10, {"loss": 2.5, "tokens_per_second": 1234.0})
    reporter.train(15, {"loss": 2.0})
    for _ in range(2):
        reporter.evaluation(15, {"loss": 2.0, "loss/sort": 2.0, "exact_match/sort": 0.25})
    reporter.evaluation(20, {"loss": 2.0, "loss/sort": 2.0, "exact_match/sort": 0.25, "accuracy/sort": 0.5})
    reporter.close()
    first, second, evaluation, answered = screen.getvalue().splitlines()
    assert first == "step 10/20: loss 2.5, 1234 tokens/s, MFU 12.3 % of 1 x cpu"
    assert second.startswith("step 15/20: loss 2, ") and second.endswith(" left")
    assert evaluation == "held out at step 15: loss 2, sort 2 (25 % exact)"
    assert answered == "held out at step 20: loss 2, sort 2 (25 % exact, 50 % of answers right)"


def test_a_terminal_gets_a_bar_that_a_resumed_run_starts_in_the_middle():
    terminal = Terminal()
    reporter = RunReporter(None, 20, stream=terminal)
    reporter.rewind(10)
    reporter.train(15, {"loss": 2.5})
    reporter.close()
    reporter.close()
    assert "15/20" in terminal.getvalue() and "loss 2.5" in terminal.getvalue()


def test_an_impossible_mfu_is_reported_and_does_not_end_the_run(tmp_path, screen):
    reporter = RunReporter(tmp_path, 5, flops_per_token=1e9, peak=Peak(1e9, "1 x toy"), stream=screen)
    reporter.train(1, {"tokens_per_second": 1.5})
    reporter.close()
    start, event, train = raw(tmp_path)
    assert start["name"] == "start" and start["peak"] == "1 x toy" and "causal" in start["flops"]
    assert event["name"] == "error" and "MFU of 150 % is impossible" in event["message"]
    assert train["mfu"] == "nan" and train["memory_gib"] > 0
    with pytest.raises(ValueError, match=r"set run\.peak_tflops"):
        utilisation(2.0, Peak(1.0, "1 x toy"))


def test_the_silent_reporter_takes_everything():
    SILENT.train(1, {})
    SILENT.evaluation(1, {})
    SILENT.event("x", y=1)
    SILENT.rewind(0)
    SILENT.close()


class Device:
    process_index = 0
    platform = "tpu"

    def __init__(self, device_kind):
        self.device_kind = device_kind


@pytest.mark.parametrize(
    ("kind", "tflops"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
    ],
)
def test_known_devices_have_their_dense_peak(kind, tflops):
    found = peak([Device(kind)] * 4)
    assert found.flops == 4 * tflops * 1e12 and found.name.startswith(f"4 x {kind}, dense bf16")
    assert any(tflops == known for _, known in PEAK_TFLOPS)


def test_an_unknown_device_is_measured_and_says_so():
    import jax

    found = peak(jax.devices())
    assert 1e8 < found.flops < 1e14 and "measured float32 matmul" in found.name and found.name.startswith("1 x cpu")
    assert peak(jax.devices(), tflops=2.0).flops == 2e12 * jax.device_count()
    with pytest.raises(ValueError, match=r"run\.peak_tflops must be above 0, got 0"):
        peak(jax.devices(), tflops=0)
    assert 0.01 < memory_gib() < 1000
