# SPDX-License-Identifier: Apache-2.0
"""A run to be killed: reads folders from standard input, one a line, and trains each in a child of its own.

Everything is imported once, here, and a child begins by touching the devices, so that a start takes a second. Prints
the child's process id, and when it has ended its exit status.
"""

import hashlib
import os
import pathlib
import sys
import traceback
import warnings

os.environ.setdefault("NPROC", "16")

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.losses.term import Term
from jaxlm.train.loop import train
from jaxlm.train.mesh import make_mesh
from jaxlm.train.optimizer import make_optimizer
from jaxlm.train.options import AdamW, MeshOptions, RunOptions
from jaxlm.train.phase import Phase
from jaxlm.train.stop import Preempted

STEPS = 24


class Rows:
    """Batch i is drawn from i."""

    step = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.step += 1
        return {"x": np.random.default_rng(self.step).normal(size=(4, 64)).astype(np.float32)}

    def get_state(self):
        return {"step": self.step}

    def set_state(self, state):
        self.step = state["step"]


def loss_fn(params, batch, rng):
    hidden = jnp.tanh(batch["x"] @ params["first"])
    hidden += 0.1 * jax.random.normal(rng, hidden.shape)
    error = jnp.sum(jnp.square(hidden @ params["second"] - batch["x"]))
    return {"loss": Term(error, jnp.float32(len(hidden)))}


def run(folder):
    """Trains to the end and leaves a digest of the state."""
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_disable_most_optimizations", True)  # compiles in half the time
    draw = np.random.default_rng(0)
    params = {
        "first": draw.normal(size=(64, 512)).astype(np.float32) / 8,
        "second": draw.normal(size=(512, 64)).astype(np.float32) / 32,
    }
    options = RunOptions(steps=STEPS, batch_size=4, micro_batches=2, directory=folder, save_every=1)
    phase = Phase(loss_fn, make_optimizer(AdamW(learning_rate=1e-2, weight_decay=0.1, decayed=(".*",)), STEPS))
    axes = {"first": (None, "embed"), "second": ("embed", None)}
    mesh = make_mesh(MeshOptions(data=1, fsdp=2))
    state = train(phase, params, Rows(), options=options, mesh=mesh, axes=lambda _: axes)
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves((state.step, state.params, state.opt_state, jax.random.key_data(state.rng))):
        digest.update(np.asarray(leaf).tobytes())
    part = pathlib.Path(folder) / "digest.part"
    part.write_text(digest.hexdigest())
    part.rename(pathlib.Path(folder) / "digest")


def main():
    for line in sys.stdin:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # jax warns of forks; nothing of it runs yet in this process
            child = os.fork()
        if child == 0:
            code = 1
            try:
                run(line.strip())
                code = 0
            except Preempted as stop:
                code = stop.exit_code
            except Exception:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
