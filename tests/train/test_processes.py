# SPDX-License-Identifier: Apache-2.0
"""Two processes are one run: they stop at one update, save together, and end where one process ends."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np


def begin(port, process, folder, *arguments):
    script = pathlib.Path(__file__).with_name("pod.py")
    return subprocess.Popen(
        [sys.executable, str(script), str(port), str(process), str(folder), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(script.parents[2]), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(*processes):
    try:
        said = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(said)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_pod_that_one_process_is_told_to_stop_resumes_and_equals_one_process(tmp_path):
    (tmp_path / "pod").mkdir()
    (tmp_path / "one").mkdir()
    alone = begin(0, 0, tmp_path / "one", 20)
    port = free_port()
    finish(*(begin(port, process, tmp_path / "pod", 20, 3) for process in (0, 1)), alone)
    told = {(tmp_path / "pod" / f"told-{process}").read_text() for process in (0, 1)}
    assert len(told) == 1, f"the processes did not stop at one update: {told}"
    assert told.pop().startswith("75 told to stop (SIGTERM) after step")
    port = free_port()
    finish(*(begin(port, process, tmp_path / "pod", 20) for process in (0, 1)))
    pod, one = (np.load(tmp_path / name / "params-20.npz") for name in ("pod", "one"))
    for name in one:
        np.testing.assert_allclose(pod[name], one[name], rtol=1e-6, atol=1e-7)
