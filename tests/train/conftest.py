# SPDX-License-Identifier: Apache-2.0
"""A tiny decoder, a stream of packed rows of unequal lengths, a count of compilations, and pods of processes."""

import contextlib
import json
import os
import pathlib
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.losses.next_token import next_token_terms
from jaxlm.losses.term import Term
from jaxlm.nn.axes import logical_axes
from jaxlm.nn.config import ModelConfig
from jaxlm.nn.decoder import Model
from jaxlm.train.mesh import constrainer, make_mesh, shardings
from jaxlm.train.options import MeshOptions
from jaxlm.train.phase import Phase
from jaxlm.train.state import State, make_state, state_shardings

CONFIG = ModelConfig(
    vocab_size=64, width=16, num_layers=2, num_heads=4, num_kv_heads=2, mlp_width=32, max_length=32, tied=False
)
COMPILED: list[str] = []  # one entry a compilation, whatever is compiled


def _heard(event: str, seconds: float, **kwargs) -> None:
    if event.endswith("backend_compile_duration"):
        COMPILED.append(event)


jax.monitoring.register_event_duration_secs_listener(_heard)


class Rows:
    """A stream of batches that knows where it stands; batch i depends on i alone."""

    task_names = ("short", "long")

    def __init__(self, rows=16, length=32, vary=lambda step, batch: batch):
        self.rows, self.length, self.vary, self.step = rows, length, vary, 0

    def __iter__(self):
        return self

    def __next__(self):
        self.step += 1
        return self.vary(self.step, make_batch(self.step, self.rows, self.length))

    def get_state(self):
        return {"step": self.step}

    def set_state(self, state):
        self.step = state["step"]


def make_batch(seed, rows=16, length=32):
    """Two segments and padding in each row, with completions of 1 to 12 tokens."""
    draw = np.random.default_rng(seed)
    batch = {
        "tokens": draw.integers(0, 64, (rows, length)).astype(np.int32),
        "loss_weights": np.zeros((rows, length), np.float32),
        "positions": np.zeros((rows, length), np.int32),
        "segment_ids": np.zeros((rows, length), np.int32),
        "task_ids": np.repeat(draw.integers(0, 2, (rows, 1)).astype(np.int32), length, axis=1),
        "record_ids": np.full((rows, length), -1, np.int32),
    }
    for row in range(rows):
        begin = 0
        for segment in (1, 2):
            prompt, completion = draw.integers(1, 4), draw.integers(1, 12)
            end = begin + prompt + completion
            batch["segment_ids"][row, begin:end] = segment
            batch["positions"][row, begin:end] = np.arange(end - begin)
            batch["loss_weights"][row, end - completion : end] = 1
            batch["record_ids"][row, begin:end] = 100 * seed + 2 * row + segment - 1
            begin = end
    return batch


def keep_gradient():
    """Parameters never move; the state is the gradient, to the last bit."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda updates, state, params=None: (jax.tree.map(jnp.zeros_like, updates), updates),
    )


MODEL = Model(CONFIG)


def make_phase(tx, model=MODEL, *, auxiliary=0.0, noise=0.0):
    """Next-token loss; `auxiliary` adds a term with that coefficient and a weight of its own, `noise` uses the key."""

    def loss_fn(params, batch, rng):
        hidden = model.apply(params, batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"])
        if noise:
            hidden += noise * jax.random.normal(rng, hidden.shape)
        terms = next_token_terms(hidden, model.head(params), batch, num_tasks=2)
        if auxiliary:
            real = (batch["segment_ids"] > 0).astype(jnp.float32)
            sizes = jnp.mean(jnp.square(hidden - 1), axis=-1)
            terms["size"] = Term(jnp.sum(real * sizes), jnp.sum(real), auxiliary)
        return terms

    return Phase(loss_fn, tx)


def start(tx, mesh, params):
    """A state on a mesh, and its shardings."""
    _, places = shapes(tx, mesh, params)
    make = jax.jit(lambda p: make_state(jax.tree.map(jnp.copy, p), tx, jax.random.key(0)), out_shardings=places)
    return make(jax.device_put(params, places.params)), places


def shapes(tx, mesh, params):
    """What `start` would make, without making it."""
    places = state_shardings(tx, params, shardings(mesh, logical_axes(params), params), mesh)
    return jax.eval_shape(lambda p: make_state(p, tx, jax.random.key(0)), params), places


def mesh_of(data=1, fsdp=1, tensor=1):
    """A mesh over the first devices."""
    devices = jax.devices()[: data * fsdp * tensor]
    return make_mesh(MeshOptions(data=data, fsdp=fsdp, tensor=tensor), devices=devices)


def on_device(batch):
    """What a step reads."""
    return {name: value for name, value in batch.items() if name != "record_ids"}


def bits(tree):
    """Every leaf as bytes."""
    raw = jax.tree.map(lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x, tree)
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(raw)]


@contextlib.contextmanager
def count_compiles():
    """A list that grows by one with every compilation inside."""
    before = len(COMPILED)
    seen: list[str] = []
    try:
        yield seen
    finally:
        seen.extend(COMPILED[before:])


@pytest.fixture(scope="module", autouse=True)
def compiles(quick_compiles):
    """All tests of the loop compile quickly."""


@pytest.fixture(scope="session")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0))


@pytest.fixture(scope="session")
def tiny():
    """The pieces above, for tests; modules here do not import each other."""
    return types.SimpleNamespace(
        bits=bits, config=CONFIG, constrainer=constrainer, count_compiles=count_compiles, keep_gradient=keep_gradient,
        compiled=COMPILED, make_batch=make_batch, mesh=mesh_of, on_device=on_device, phase=make_phase, Rows=Rows,
        shapes=shapes, start=start, State=State,
    )  # fmt: skip


class Pods:
    """Starts the processes of pods, children of one that has imported everything (pods.py); hears how they end."""

    def __init__(self):
        script = pathlib.Path(__file__).with_name("pods.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": str(script.parents[2]), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        )  # fmt: skip
        self.started: queue.Queue[int] = queue.Queue()
        self.codes: dict[int, int] = {}
        self.ended = threading.Condition()
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self):
        for line in self.process.stdout:
            word, pid, *code = line.split()
            if word == "started":
                self.started.put(int(pid))
                continue
            with self.ended:
                self.codes[int(pid)] = int(code[0])
                self.ended.notify_all()

    def start(self, folder, job, *, count=2, each=(), variables=True, **told):
        """Process ids and files of what they say; `each` has what only some are told, by process."""
        port = free_port()
        pod = []
        for process in range(count):
            names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
            env = dict(zip(names, (f"127.0.0.1:{port}", str(count), str(process)), strict=True)) if variables else {}
            out = pathlib.Path(folder) / f"said-{process}"
            line = {"job": job, "process": process, "out": str(out), "folder": str(folder), "env": env} | told
            pod.append((self.fork(line | dict(each).get(process, {})), out))
        return pod

    def fork(self, line):
        """Starts one process; its id."""
        self.process.stdin.write(json.dumps(line) + "\n")
        self.process.stdin.flush()
        return self.started.get(timeout=300)

    def wait(self, pod, seconds=120):
        """Exit codes, minus the signal of those killed; and what each said."""
        end = time.monotonic() + seconds
        with self.ended:
            for pid, _ in pod:
                self.ended.wait_for(lambda pid=pid: pid in self.codes, max(0.0, end - time.monotonic()))
        for pid, _ in pod:
            if pid not in self.codes:
                os.kill(pid, signal.SIGKILL)
        return [self.codes.get(pid) for pid, _ in pod], [out.read_text() for _, out in pod]

    def close(self):
        self.process.stdin.close()
        self.process.wait(60)
        self.reader.join()
        self.process.stdout.close()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def pods():
    pods = Pods()
    yield pods
    pods.close()
