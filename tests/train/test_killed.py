# SPDX-License-Identifier: Apache-2.0
"""Killed at any moment and started again, a run ends in the same bits.

JAXLM_KILLS sets how often (default 3; 10 is the long form).
"""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

KILLS = int(os.environ.get("JAXLM_KILLS", "3"))


class Starter:
    """Starts runs one after the other, in children of one process that has imported everything."""

    def __init__(self):
        script = pathlib.Path(__file__).with_name("killed.py")
        root = str(script.parents[2])
        self.process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu"},
        )  # fmt: skip

    def start(self, folder):
        """The process id of a new run."""
        self.process.stdin.write(f"{folder}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def status(self):
        """How that run ended: an exit code, or minus a signal."""
        return int(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(60)


@pytest.fixture(scope="module")
def starter():
    starter = Starter()
    yield starter
    starter.close()


@pytest.fixture(scope="module")
def unbroken(starter, tmp_path_factory):
    """Digest of a run that nobody touched."""
    folder = tmp_path_factory.mktemp("unbroken")
    starter.start(folder)
    assert starter.status() == 0
    return (folder / "digest").read_text()


def newest(folder):
    steps = [int(p.name) for p in folder.glob("checkpoints/train/*") if p.name.isdecimal()]
    return max(steps, default=0)


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.001)
    raise AssertionError("the run did not get there in time")


def test_a_run_killed_again_and_again_ends_in_the_same_bits(starter, unbroken, tmp_path):
    """Every second kill falls into a save: while its unfinished folder is there."""
    draw = random.Random(0)
    during_a_save = 0
    for kill in range(KILLS):
        child = starter.start(tmp_path)
        target = newest(tmp_path) + draw.randint(1, max(1, 20 // KILLS))
        wait_until(lambda target=target: newest(tmp_path) >= target)
        if kill % 2 == 0:
            wait_until(lambda: any(tmp_path.glob("checkpoints/train/tmp-*")))
        else:
            time.sleep(draw.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        assert starter.status() == -signal.SIGKILL, "the run ended before it could be killed"
        during_a_save += any(tmp_path.glob("checkpoints/train/tmp-*"))
    assert during_a_save
    starter.start(tmp_path)
    assert starter.status() == 0
    assert (tmp_path / "digest").read_text() == unbroken
    assert not any(tmp_path.glob("checkpoints/train/tmp-*"))


def test_a_run_told_to_stop_saves_and_exits_with_a_code_of_its_own(starter, unbroken, tmp_path):
    child = starter.start(tmp_path)
    wait_until(lambda: newest(tmp_path) >= 3)
    os.kill(child, signal.SIGTERM)
    assert starter.status() == 75
    starter.start(tmp_path)
    assert starter.status() == 0
    assert (tmp_path / "digest").read_text() == unbroken
