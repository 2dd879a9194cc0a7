# SPDX-License-Identifier: Apache-2.0
"""The fault drill in its short form; `python3 scripts/drill.py --faults kill --kills 20` is the long one."""

import dataclasses
import json
import os

import pytest

from jaxlm.drill import FAULTS, Drill, compared, row, run_drill

CONFIG = """
from jaxlm.config import RunConfig
from jaxlm.data import DataConfig, Procedural, Task
from jaxlm.methods import Epi, Sft
from jaxlm.nn import ModelConfig
from jaxlm.train import AdamW, MeshOptions, RunOptions

def get_config():
    train, test = (Procedural(generator="sorting", size=size, seed=seed) for size, seed in ((50, 0), (7, 1)))
    method = Epi(sft=Sft(optimizer=AdamW(learning_rate=1e-2)), fraction=0.2, refresh_every=2, warmup=2)
    return RunConfig(
        model=ModelConfig(vocab_size=264, width=96, num_layers=2, num_heads=2, num_kv_heads=1, mlp_width=384),
        tokenizer="bytes",
        data=DataConfig(tasks=(Task(name="sort", train=train, test=test),), length=48),
        method=method,
        mesh=MeshOptions(fsdp=2),
        run=RunOptions(steps=2, batch_size=8, directory="run"),
    )
"""


@dataclasses.dataclass
class Forked:
    """A process of the fixture, as the drill wants it."""

    pods: object
    pid: int

    def poll(self):
        return self.pods.codes.get(self.pid)


@pytest.fixture
def drill(pods, tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)

    def start(arguments, environ, said, devices):
        line = {"job": "script", "process": 0, "out": str(said), "env": dict(environ), "argv": list(arguments)}
        return Forked(pods, pods.fork(line | {"devices": devices, "folder": str(tmp_path)}))

    seconds = float(os.environ.get("JAXLM_STEP_TIMEOUT", "25"))
    return Drill(
        start=start, config=str(tmp_path / "config.py"), folder=tmp_path, steps=9, save_every=3, seconds=seconds
    )


def test_a_run_that_is_disturbed_ends_as_if_it_had_not_been(drill):
    """SIGTERM to one process comes with the fault "processes", which goes on with another number of them."""
    faults = [fault for fault in FAULTS if fault != "sigterm"]
    outcomes = run_drill(dataclasses.replace(drill, seed=1), faults, tell=lambda outcome: print(row(outcome)))
    assert [outcome.fault for outcome in outcomes] == faults
    assert not any(outcome.failure for outcome in outcomes), "\n".join(map(row, outcomes))
    assert all(outcome.difference == 0 for outcome in outcomes if outcome.fault != "processes")


def test_a_drill_sees_other_samples_lost_updates_and_other_parameters(tmp_path):
    def write(name, objectives):
        (tmp_path / name / "run").mkdir(parents=True)
        lines = [json.dumps({"kind": "train", "step": step, "objective": x}) for step, x in objectives]
        (tmp_path / name / "run" / "metrics.jsonl").write_text("\n".join(lines))
        return tmp_path / name

    whole = write("whole", [(1, 0.5), (2, 0.25)])
    for name, objectives, message in (
        ("lost", [(2, 0.25)], r"updates are missing or out of order: \[2\]"),
        ("other", [(1, 0.5), (2, 0.26)], "update 2 has the objective 0.26, undisturbed 0.25: other samples"),
        ("twice", [(1, 0.5), (2, 0.25), (2, 0.25)], "update 2 has the objective nan"),
    ):
        assert compared(whole, write(name, objectives), 2, exact=True)[1].startswith(message.replace("\\", ""))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"processes": 1}, "at least 2 processes"), ({"steps": 4}, "steps 4 must be at least three times save_every 3")],
)
def test_a_drill_that_shows_nothing_is_refused(drill, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(drill, **change)


def test_an_unknown_fault_is_refused_before_anything_starts(drill):
    with pytest.raises(ValueError, match="unknown fault 'fire': there are kill, sigterm"):
        run_drill(drill, ["fire"])
