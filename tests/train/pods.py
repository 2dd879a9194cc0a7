# SPDX-License-Identifier: Apache-2.0
"""Pods of processes, forked from one that has imported everything: a start costs no imports.

Each line of stdin is {"job": ..., "process": ..., "out": ..., "env": ..., ...}; the answers are "started PID" and later
"ended PID CODE". Jobs: "methods" runs those of arrangements.py; "script" runs scripts/train.py with `argv` in
`folder`; "train" runs the loop below, where one process misbehaves.
"""

import collections
import importlib
import json
import os
import pathlib
import resource
import runpy
import signal
import sys
import threading
import time
import traceback
import warnings

os.environ.setdefault("NPROC", "16")

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.command import call
from jaxlm.losses.term import Term
from jaxlm.train.agreement import gather
from jaxlm.train.feeding import own_rows, to_devices
from jaxlm.train.launch import connect, keep_programs
from jaxlm.train.loop import train
from jaxlm.train.mesh import across_and_inside, make_mesh, reach
from jaxlm.train.optimizer import make_optimizer
from jaxlm.train.options import AdamW, MeshOptions, RunOptions
from jaxlm.train.phase import Phase
from jaxlm.train.stop import Preempted

ROOT = pathlib.Path(__file__).resolve().parents[2]


class Rows:
    """Batch i, drawn from i: this process's rows. In batch `at` the process `who` (-1: all) does what it is told."""

    def __init__(self, deed, who, at):
        self.deed, self.who, self.at, self.step = deed, who, at, 0

    def __iter__(self):
        return self

    def __next__(self):
        self.step += 1
        x = np.random.default_rng(self.step).normal(size=(8, 16)).astype(np.float32)
        if self.deed and self.step == self.at:
            if self.deed == "nan":
                x[0, 0] = np.nan  # of the first process, whose loss all share
            elif jax.process_index() == self.who or self.who < 0:
                {"kill": kill, "stop": stop, "hang": hang, "raise": fail, "fill": fill}[self.deed]()
        batch = {"x": x, "record_ids": 100 * self.step + np.arange(8, dtype=np.int32)}
        return {name: np.split(value, jax.process_count())[jax.process_index()] for name, value in batch.items()}

    def get_state(self):
        return {"step": self.step}

    def set_state(self, state):
        self.step = state["step"]


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def stop():
    os.kill(os.getpid(), signal.SIGSTOP)


def hang():
    time.sleep(600)


def fill():
    """No file may grow beyond this, as on a full disk; what a process says must fit."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))


def fail():
    raise ValueError("this record is no record")


def loss_fn(params, batch, rng):
    error = jnp.sum(jnp.square(jnp.tanh(batch["x"] @ params["first"]) @ params["second"] - batch["x"]))
    return {"loss": Term(error, jnp.float32(len(batch["x"])))}


def run_loop(folder, timeout, deed="", who=1, at=4, steps=8, width=32, retries=3):
    """Connects as scripts do, trains a small model; digits of its parameters are printed at the end."""
    connect(watched=True)
    draw = np.random.default_rng(0)
    params = {"first": draw.normal(size=(16, width)), "second": draw.normal(size=(width, 16))}
    params = jax.tree.map(lambda x: x.astype(np.float32) / 4, params)
    axes = {"first": (None, "embed"), "second": ("embed", None)}
    options = RunOptions(
        steps=steps, batch_size=8, directory=folder, save_every=2, step_timeout=timeout, save_retries=retries
    )
    mesh = make_mesh(MeshOptions(data=-1, fsdp=2))
    phase = Phase(loss_fn, make_optimizer(AdamW(learning_rate=1e-2), steps))
    try:
        state = train(phase, params, Rows(deed, who, at), options=options, mesh=mesh, axes=lambda _: axes)
    except Preempted as stopped:
        return stopped.exit_code
    whole = jax.jit(lambda x: x, out_shardings=jax.sharding.NamedSharding(mesh, jax.P()))(state.params)
    print("sum", float(jnp.sum(jnp.abs(whole["first"]))), flush=True)
    return 0


def lay_out(folder):
    """How meshes of several sizes lie on the processes: the process of each device; which rows this process feeds."""
    connect()
    told = {}
    for fsdp, tensor in ((1, 1), (2, 1), (1, 2), (4, 1), (8, 1), (2, 2), (1, 8)):
        mesh = make_mesh(MeshOptions(data=-1, fsdp=fsdp, tensor=tensor))
        places = [[device.process_index for device in line] for line in mesh.devices.reshape(mesh.shape["data"], -1)]
        sliced = across_and_inside(mesh.devices.shape, jax.devices(), by_process=True)
        fed = own_rows(mesh, 16)
        batch = to_devices(mesh, np.repeat(fed[:, None], 3, axis=1).astype(np.int32))
        for shard in batch.addressable_shards:  # row i of the batch lies where row i belongs, on whichever process
            np.testing.assert_array_equal(np.asarray(shard.data)[:, 0], np.arange(16)[shard.index[0]])
        rows = gather({"rows": fed.tolist()})
        told[f"{fsdp},{tensor}"] = [
            places, reach(mesh), bool(np.all(sliced == mesh.devices)), [one["rows"] for one in rows]
        ]  # fmt: skip
    if jax.process_index() == 0:
        (pathlib.Path(folder) / "layout.json").write_text(json.dumps(told))
    return 0


def compile_something(folder):
    """Says how many programs came from the folder and how many were compiled."""
    heard = collections.Counter()
    jax.monitoring.register_event_listener(lambda event, **_: heard.update([event]))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    keep_programs(folder)
    jax.block_until_ready(jax.jit(lambda x: jnp.tanh(x) @ x.T)(np.ones((4, 4), np.float32)))
    print(*(heard[f"/jax/compilation_cache/cache_{what}"] for what in ("hits", "misses")))
    return 0


def do(job, devices=2, argv=(), folder=".", **told):
    """In the child."""
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_disable_most_optimizations", True)
    if job == "train":
        call(lambda: run_loop(folder, **told))
    elif job == "layout":
        call(lambda: lay_out(folder))
    elif job == "methods":
        connect()
        call(lambda: importlib.import_module("arrangements").run_methods(folder, **told))
    elif job == "compile":
        call(lambda: compile_something(folder))
    elif job == "script":
        os.chdir(folder)
        sys.argv = ["train.py", *argv]
        runpy.run_path(str(ROOT / "scripts" / "train.py"), run_name="__main__")


def child(out, env, process, **told):
    """Ends as a process of its own would: with exit handlers, and code 1 after a traceback."""
    file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(env)
    try:
        do(**told)
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
    sys.exit(0)


def main():
    def report(pid):
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.write(1, f"ended {pid} {code}\n".encode())

    for line in sys.stdin:
        told = json.loads(line)
        if told["job"] in ("script", "methods"):  # what they import, once and not in each child
            importlib.import_module("jaxlm.evaluation")
            importlib.import_module("jaxlm.methods")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # jax warns of forks; nothing of it runs yet in this process
            pid = os.fork()
        if pid == 0:
            child(**told)
        os.write(1, f"started {pid}\n".encode())
        threading.Thread(target=report, args=(pid,)).start()


if __name__ == "__main__":
    main()
