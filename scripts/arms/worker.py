# SPDX-License-Identifier: Apache-2.0
"""One arm in a process of its own: answers the commands of `measure.py`, a line of JSON for each.

python -m arms.worker NAME SHAPE FOLDER
"""

import importlib
import os
import sys
import time

import numpy as np

from arms import shapes
from arms.answering import answers, peak_gib, versions

FILES = {"ours": "ours", "plain": "plain", "torch": "torch_eager", "tunix": "tunix_trainer"}
PROBE = 64  # tokens of one row whose logits are compared


def main() -> None:
    """Builds the arm, then serves until told to stop."""
    name, shape_name, folder = sys.argv[1:]
    answer = answers()
    shape = shapes.SHAPES[shape_name]
    try:
        logits, step = importlib.import_module(f"arms.{FILES[name]}").build(shape)
    except ImportError as error:
        return answer(absent=str(error))
    batches = shapes.batches(shape)
    answer(ready=True)
    for line in sys.stdin:
        if line.strip() == "logits":
            path = os.path.join(folder, f"{name}.npy")
            np.save(path, np.asarray(logits(next(shapes.batches(shape))[:1, :PROBE]), np.float32))
            answer(logits=path)
        elif line.strip() == "step":
            tokens = next(batches)
            before, start = time.process_time(), time.perf_counter()
            loss = step(tokens)
            answer(seconds=time.perf_counter() - start, cpu_seconds=time.process_time() - before, loss=loss)
        elif line.strip() == "stop":
            return answer(peak_gib=peak_gib(), **about(name, shape))


def about(name: str, shape: shapes.Shape) -> dict:
    """Versions; for our arm the FLOPs of a step and the peak they are to be compared with."""
    found = versions()
    if name != "ours":
        return {"versions": found}
    import jax

    from arms.ours import model_config
    from jaxlm.nn.flops import model_flops
    from jaxlm.train.throughput import memory_gib, peak

    most = peak(jax.devices()[:1])
    flops = 3 * model_flops(model_config(shape), tokens=shape.B * shape.T, length=shape.T, causal=True)
    more = {} if jax.default_backend() == "cpu" else {"device_gib": memory_gib()}
    return {"versions": found, "flops": flops, "peak_flops": most.flops, "peak_name": most.name} | more


if __name__ == "__main__":
    main()
