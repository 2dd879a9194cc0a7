# SPDX-License-Identifier: Apache-2.0
"""One arm of `decode` in a process of its own: answers the commands of `decode.py`, a line of JSON for each.

python -m arms.decode_worker NAME SHAPE FOLDER
"""

import importlib
import json
import os
import sys
import time

import numpy as np

from arms import shapes
from arms.answering import answers, peak_gib, versions

FILES = {"ours": "decode_ours", "torch": "decode_torch", "tunix": "decode_tunix"}
FIRST = 3  # smallest token id of a prompt: those below may have a meaning


def main() -> None:
    """Builds the arm, then serves until told to stop."""
    name, shape_name, folder = sys.argv[1:]
    answer = answers()
    shape = shapes.SHAPES[shape_name]
    slots = int(os.environ["DECODE_SLOTS"])
    try:
        arm = importlib.import_module(f"arms.{FILES[name]}")
        generate = arm.build(shape, slots)
    except ImportError as error:
        return answer(absent=str(error))
    answer(ready=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["what"] == "stop":
            return answer(peak_gib=peak_gib(), versions=versions())
        rng = np.random.default_rng(asked["seed"])
        prompts = rng.integers(FIRST, shape.V, (asked["rows"], asked["length"]))
        more = (asked["samples"],) if asked["samples"] > 1 else ()
        compiled = getattr(arm, "COMPILED", [])
        compiled.clear()
        before, start = time.process_time(), time.perf_counter()
        tokens = generate(prompts, asked["new"], *more)
        seconds, cpu = time.perf_counter() - start, time.process_time() - before
        path = os.path.join(folder, f"{name}.npy")
        np.save(path, tokens)
        answer(seconds=seconds, cpu_seconds=cpu, tokens=path, compiled=len(compiled))


if __name__ == "__main__":
    main()
