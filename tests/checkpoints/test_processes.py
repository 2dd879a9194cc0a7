# SPDX-License-Identifier: Apache-2.0
"""Two processes, two devices each: both read half, one writes, neither waits for ever."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
from safetensors.numpy import load_file

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"localhost:{sys.argv[2]}", 2, int(sys.argv[1]))
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxlm import checkpoints
from jaxlm.checkpoints.safetensors_folder import SafetensorsFolder

source, target = sys.argv[3:]
mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
last = lambda leaf: PartitionSpec(*[None] * (leaf.ndim - 1), "x" if leaf.ndim > 1 and leaf.shape[-1] % 4 == 0 else None)
amount, read = [0], SafetensorsFolder.read

def counted(self, name, index):
    piece = read(self, name, index)
    amount[0] += piece.size
    return piece

SafetensorsFolder.read = counted
model, params = checkpoints.load(source, shardings=lambda s: jax.tree.map(lambda x: NamedSharding(mesh, last(x)), s))
checkpoints.save(target, model, params, max_shard_bytes=20_000)
try:
    checkpoints.save(target, model, params)
    refusal = ""
except ValueError as error:
    refusal = str(error)
print(json.dumps({"read": amount[0], "all": model.num_parameters(params), "refusal": refusal}))
"""


def test_each_process_reads_its_slices_and_all_join_the_save(golden, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    arguments = [str(port), str(golden["gpt2"]), str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(i), *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=180) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (out, err) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, err
        said = json.loads(out.splitlines()[-1])
        assert said["read"] < 0.6 * said["all"]
        assert "not an empty folder" in said["refusal"]
    before, after = load_file(golden["gpt2"] / "model.safetensors"), {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        after |= load_file(file)
    assert before.keys() == after.keys()
    for name, values in before.items():
        np.testing.assert_array_equal(values.astype(np.float32), after[name])
