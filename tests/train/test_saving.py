# SPDX-License-Identifier: Apache-2.0
"""Storage that fails: a save is tried again, with pauses, until it is written or the run says what to mend."""

import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.losses.term import Term
from jaxlm.train import loop
from jaxlm.train.mesh import make_mesh
from jaxlm.train.optimizer import make_optimizer
from jaxlm.train.options import AdamW, MeshOptions, RunOptions
from jaxlm.train.phase import Phase

# Orbax's own thread raises too, besides the error that reaches us.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


def loss_fn(params, batch, rng):
    return {"loss": Term(jnp.sum(jnp.square(batch["x"] @ params["w"])), jnp.float32(len(batch["x"])))}


class Rows:
    """One batch again and again."""

    def __iter__(self):
        return self

    def __next__(self):
        return {"x": np.ones((2, 64), np.float32)}

    def get_state(self):
        return {}

    def set_state(self, state):
        pass


class Disk:
    """Full, as a limit on the size of a file, until so many saves have failed; a reporter hears of them."""

    def __init__(self, failures):
        self.failures, self.events = failures, []

    def __enter__(self):
        self.limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, self.limits[1]))
        return self

    def __exit__(self, *raised):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)

    def event(self, name, **fields):
        self.events.append((name, fields.get("step")))
        if [name for name, _ in self.events].count("save_failed") == self.failures:
            self.__exit__()

    def train(self, step, metrics): ...
    def evaluation(self, step, metrics): ...
    def rewind(self, step): ...
    def close(self): ...


def run(folder, disk, monkeypatch, **options):
    monkeypatch.setattr(loop, "PAUSE", 0.01)
    phase = Phase(loss_fn, make_optimizer(AdamW(), 4))
    options = RunOptions(batch_size=2, directory=str(folder), **options)
    params = {"w": jax.random.normal(jax.random.key(0), (64, 256))}
    mesh = make_mesh(MeshOptions(), devices=jax.devices()[:1])
    loop.train(phase, params, Rows(), options=options, mesh=mesh, axes=lambda _: {"w": (None, None)}, reporter=disk)


def test_a_save_that_fails_is_tried_again_until_there_is_room(tmp_path, monkeypatch):
    with Disk(failures=2) as disk:
        run(tmp_path, disk, monkeypatch, steps=1)
    saves = [event for event in disk.events if event[0].startswith("save")]
    assert saves == [("save_failed", 1), ("save_failed", 1), ("save", 1)]
    assert (tmp_path / "checkpoints/train/1/checkpoint.json").is_file()


def test_the_save_after_one_that_failed_in_the_background_takes_its_place(tmp_path, monkeypatch):
    with Disk(failures=1) as disk:
        run(tmp_path, disk, monkeypatch, steps=4, save_every=2)
    saves = [event for event in disk.events if event[0].startswith("save")]
    assert saves == [("save", 2), ("save_failed", 4), ("save", 4)]
    assert [path.name for path in (tmp_path / "checkpoints/train").iterdir()] == ["4"]


def test_a_disk_that_stays_full_ends_the_run_with_path_and_remedy(tmp_path, monkeypatch):
    message = (
        r"step 1 could not be written to .*checkpoints/train: .*free space on the disk .*tried 2 times, see run.save"
    )
    with Disk(failures=9) as disk, pytest.raises(OSError, match=message):
        run(tmp_path, disk, monkeypatch, steps=1, save_retries=1)
    assert disk.events.count(("save_failed", 1)) == 1
