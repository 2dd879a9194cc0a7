# SPDX-License-Identifier: Apache-2.0
"""Starts the arms, checks that they compute the same, and times their steps turn by turn."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

NAMES = ("ours", "plain", "torch", "tunix")
WARM_UP = 2  # steps that are not counted: they compile, and touch memory for the first time
SCRIPTS = pathlib.Path(__file__).resolve().parents[1]


class Arms:
    """The processes, by name; a context manager that stops them.

    Args:
      names: of arms.
      shape: one of `shapes.SHAPES`.
      tunix_python: of the environment that has google-tunix.
      worker: the module that a process runs.
    Attributes:
      processes: those that run.
      absent: name -> why it could not start.
    """

    def __init__(self, names: list[str], shape: str, *, tunix_python: str | None = None, worker: str = "arms.worker"):
        if unknown := [name for name in names if name not in NAMES]:
            raise ValueError(f"there are no arms {unknown}; there are {list(NAMES)}")
        self.folder = tempfile.TemporaryDirectory()
        self.processes: dict[str, subprocess.Popen] = {}
        self.absent: dict[str, str] = {}
        path = os.pathsep.join([str(SCRIPTS), str(SCRIPTS.parent), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"PYTHONPATH": path, "TQDM_DISABLE": "1"}
        for name in names:
            python = tunix_python if name == "tunix" and tunix_python else sys.executable
            command = [python, "-m", worker, name, shape, self.folder.name]
            self.processes[name] = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            first = self._answer(name)
            if "absent" in first:
                self.absent[name] = first["absent"]
                self.processes.pop(name).wait()

    def ask(self, name: str, command: str) -> dict[str, Any]:
        """Sends one command and waits for its answer."""
        process = self.processes[name]
        assert process.stdin is not None
        print(command, file=process.stdin, flush=True)
        return self._answer(name)

    def _answer(self, name: str) -> dict[str, Any]:
        stdout = self.processes[name].stdout
        assert stdout is not None
        line = stdout.readline()
        if not line:
            raise ValueError(f"arm {name} died with exit code {self.processes[name].wait()}: see its message above")
        return json.loads(line)

    def __enter__(self) -> "Arms":
        return self

    def __exit__(self, *_: Any) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()
        self.folder.cleanup()


def measure(arms: Arms, *, num_steps: int, tolerance: float) -> dict[str, dict[str, Any]]:
    """Times `num_steps` updates of each arm, in turns, so that all see the same machine.

    Args:
      arms: started.
      num_steps: timed updates.
      tolerance: largest difference of a logit, and of the first loss, between the first arm and any other.
    Returns: name -> seconds, cpu_seconds (all threads), loss (lists, one a step), peak_gib and more; or absent.
    Raises: ValueError if two arms do not compute the same.
    """
    import numpy as np  # here, so that --help needs no numpy

    results: dict[str, dict[str, Any]] = {name: {"absent": why} for name, why in arms.absent.items()}
    logits = {name: np.load(arms.ask(name, "logits")["logits"]) for name in arms.processes}
    first = next(iter(logits), "")
    for name, values in logits.items():
        if (gap := float(np.max(np.abs(values - logits[first])))) > tolerance:
            raise ValueError(f"logits of {name} and {first} differ by {gap:.2g}: times would compare different models")
        results[name] = {"logit_gap": gap, "seconds": [], "cpu_seconds": [], "loss": []}
    for turn in range(WARM_UP + num_steps):
        for name in arms.processes:
            answer = arms.ask(name, "step")
            results[name]["loss"].append(answer["loss"])
            if turn >= WARM_UP:
                results[name]["seconds"].append(answer["seconds"])
                results[name]["cpu_seconds"].append(answer["cpu_seconds"])
    for name in arms.processes:
        if (gap := abs(results[name]["loss"][0] - results[first]["loss"][0])) > tolerance:
            raise ValueError(f"first losses of {name} and {first} differ by {gap:.2g}")
        results[name] |= arms.ask(name, "stop")
    return results
