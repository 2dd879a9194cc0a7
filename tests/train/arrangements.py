# SPDX-License-Identifier: Apache-2.0
"""Five methods on real streams, and what is left of their states, whatever the processes and devices."""

import hashlib
import pathlib

import jax
import numpy as np

import jaxlm.run
import jaxlm.train.job
from jaxlm.config import RunConfig
from jaxlm.data.config import DataConfig, Procedural, ProceduralPlans, Task
from jaxlm.methods import Epi, RCapsule, Sft
from jaxlm.nn.config import Lora, ModelConfig
from jaxlm.nn.position_kinds import Hope
from jaxlm.train.agreement import gather
from jaxlm.train.options import AdamW, MeshOptions, RunOptions
from jaxlm.weights.names import named_leaves

# An epsilon well above rounding: where a gradient is next to nothing, Adam would make a whole step of its last digit.
ADAM = AdamW(learning_rate=1e-2, schedule="constant", warmup=0.0, epsilon=1e-4)
SORT = {"generator": "sorting", "options": {"count": 3}}
ROTATE = {"generator": "rotation"}
RECIPE = {"generator": "recipe", "options": {"least": 2, "most": 3, "keys": 4, "modulus": 10}}


def task(kind, generator, options=None):
    """A task with 7 held-out records, which fill no batch."""
    sources = [
        kind(generator=generator, size=size, seed=seed, options=options or {}) for size, seed in ((60, 0), (7, 1))
    ]
    return Task(name=generator, train=sources[0], test=sources[1])


def config(name, folder, steps, mesh):
    """A run of a tiny model by the method of that name."""
    positions = {"positions": Hope()} if name == "hope" else {}
    sft = Sft(optimizer=ADAM, lora=Lora(rank=4) if name == "lora" else None)
    method = sft
    if name == "epi":
        method = Epi(sft=sft, fraction=0.2, refresh_every=2, warmup=2, decay=0.5)
    if name == "capsule":
        method = RCapsule(sft=sft, capsule_width=4, decoder_layers=1, decoder_width=8, decoder_heads=2, bucket=8)
    tasks = (
        (task(ProceduralPlans, **RECIPE),)
        if name == "capsule"
        else (task(Procedural, **SORT), task(Procedural, **ROTATE))
    )
    return RunConfig(
        model=ModelConfig(
            vocab_size=264, width=16, num_layers=2, num_heads=4, num_kv_heads=2, mlp_width=32, max_length=96,
            **positions,
        ),
        tokenizer="bytes",
        data=DataConfig(tasks=tasks, length=64, packing="none" if name == "capsule" else "first_fit"),
        method=method,
        mesh=MeshOptions(**mesh),
        run=RunOptions(
            steps=steps, batch_size=8, micro_batches=2, save_every=2, directory=str(folder), step_timeout=60.0,
            bad_checkpoint="previous",
        ),
    )  # fmt: skip


def fingerprints(tree):
    """What this process holds of every part of every leaf, as a digest: two copies of one part must be equal."""
    return {
        f"{name} {shard.index}": hashlib.sha256(np.asarray(shard.data).tobytes()).hexdigest()[:8]
        for name, leaf in named_leaves(tree).items()
        for shard in leaf.addressable_shards
    }


def whole(tree):
    """Every leaf on the host."""
    mesh = tree.step.sharding.mesh
    everywhere = jax.jit(lambda x: x, out_shardings=jax.sharding.NamedSharding(mesh, jax.P()))(tree)
    return {name: np.asarray(leaf.addressable_data(0)) for name, leaf in named_leaves(everywhere).items()}


def run_methods(folder, names, steps, mesh, into):
    """Runs each method, or goes on with it, to `steps` updates; process 0 writes `<into>/<name>.npz`."""
    jaxlm.run.write_page = lambda *_: None  # seconds of drawing, which tests/test_run.py looks at
    train, ended = jaxlm.train.job.train, []
    jaxlm.train.job.train = lambda *args, **options: ended.append(train(*args, **options)) or ended[-1]
    for name in names:
        jaxlm.run.run(config(name, pathlib.Path(folder) / name, steps, mesh))
        state = jax.jit(lambda state: state._replace(rng=jax.random.key_data(state.rng)))(ended[-1])
        held = gather(fingerprints(state))
        for part in sorted(set().union(*held)):
            digests = {one[part] for one in held if part in one}
            assert len(digests) == 1, f"{name}: copies of {part} differ between processes"
        arrays = whole(state)
        if jax.process_index() == 0:
            pathlib.Path(into).mkdir(parents=True, exist_ok=True)
            np.savez(pathlib.Path(into) / f"{name}.npz", **arrays)
    return 0
