# SPDX-License-Identifier: Apache-2.0
"""One of two processes of a pod: `pod.py PORT PROCESS FOLDER STEPS [STOP]` trains, and process 0 writes what came out.

PORT 0 is one process with the devices of both. With STOP, process 1 sends itself SIGTERM while it takes that batch.
"""

import os
import pathlib
import signal
import sys
import time

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


class Rows:
    """This process's rows of batch i, which is drawn from i."""

    def __init__(self, stop):
        self.step, self.stop = 0, stop

    def __iter__(self):
        return self

    def __next__(self):
        self.step += 1
        if self.stop:
            time.sleep(0.1)  # the notice takes its time to reach the other process
        if self.step == self.stop and jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        x = np.random.default_rng(self.step).normal(size=(8, 16)).astype(np.float32)
        return {"x": np.split(x, jax.process_count())[jax.process_index()]}

    def get_state(self):
        return {"step": self.step}

    def set_state(self, state):
        self.step = state["step"]


def loss_fn(params, batch, rng):
    error = jnp.sum(jnp.square(jnp.tanh(batch["x"] @ params["first"]) @ params["second"] - batch["x"]))
    return {"loss": Term(error, jnp.float32(len(batch["x"])))}


def main(port, process, folder, steps, stop="0"):
    jax.config.update("jax_num_cpu_devices", 2 if int(port) else 4)
    jax.config.update("jax_disable_most_optimizations", True)
    if int(port):
        jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(process))
    params = jax.tree.map(
        lambda shape: np.random.default_rng(0).normal(size=shape).astype(np.float32) / 4,
        {"first": (16, 32), "second": (32, 16)},
        is_leaf=lambda x: isinstance(x, tuple),
    )
    axes = {"first": (None, "embed"), "second": ("embed", None)}
    options = RunOptions(steps=int(steps), batch_size=8, micro_batches=2, directory=folder, save_every=2)
    phase = Phase(loss_fn, make_optimizer(AdamW(learning_rate=1e-2), int(steps)))
    mesh = make_mesh(MeshOptions(data=2, fsdp=2))
    told = pathlib.Path(folder) / f"told-{process}"
    try:
        state = train(phase, params, Rows(int(stop)), options=options, mesh=mesh, axes=lambda _: axes)
    except Preempted as stopped:
        told.write_text(f"{stopped.exit_code} {stopped}")
        return
    whole = jax.jit(lambda x: x, out_shardings=jax.sharding.NamedSharding(mesh, jax.P()))(state.params)
    if jax.process_index() == 0:
        np.savez(pathlib.Path(folder) / f"params-{steps}.npz", **jax.device_get(whole))
    told.write_text("0")


if __name__ == "__main__":
    main(*sys.argv[1:])
