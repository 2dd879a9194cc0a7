# SPDX-License-Identifier: Apache-2.0
"""Measures: `step`, one training step, ours beside others; `compile`, the seconds to compile it, by depth;
`isolation`, what isolation adds to a step; `attention`, HoPE beside RoPE by length; `decode`, the sampler beside
others.

  python scripts/benchmark.py step --shape cpu-s --arms ours,plain,torch
  python scripts/benchmark.py step --shape cpu-m --arms ours,plain,torch,tunix --tunix-python PATH/bin/python
  python scripts/benchmark.py step --shape 1b --arms ours      (on an accelerator: reports MFU)
  python scripts/benchmark.py compile --shape cpu-s
  python scripts/benchmark.py isolation --shape cpu-m --steps 12
  python scripts/benchmark.py attention --lengths 1024,4096,16384 --steps 5
  python scripts/benchmark.py decode --shape cpu-m --arms ours,torch,tunix --tunix-python PATH/bin/python --steps 5
  python scripts/benchmark.py decode --shape 1b --arms ours    (on an accelerator: tokens/s beside the bandwidth)

The arms of `step` have the same weights and batches, their logits are matched first, and their runs take turns. Each
is a process of its own, so that peak memory is its own; an arm whose packages are missing is told as absent.
"""

import json
import pathlib
from typing import Any

from arms import shapes, table
from arms.measure import Arms, measure

from jaxlm.command import Parser, call


def main() -> int:
    """Reads the arguments, measures, prints a Markdown table."""
    parser = Parser(description=__doc__)
    parser.add_argument("what", choices=["step", "compile", "isolation", "attention", "decode"], help="what to measure")
    parser.add_argument("--shape", choices=list(shapes.SHAPES), default="cpu-s")
    parser.add_argument("--arms", default="ours,plain,torch,tunix", help="in this order; the first is what ratios mean")
    parser.add_argument("--steps", type=int, default=10, help="timed runs of each arm, after two that are not")
    parser.add_argument("--lengths", default="1024,4096,16384", help="tokens of a row, for attention")
    parser.add_argument("--tunix-python", metavar="PATH", help="python of an environment that has google-tunix")
    parser.add_argument("--json", metavar="PATH", help="write the raw numbers there too")
    arguments = parser.parse_args()
    shape = shapes.SHAPES[arguments.shape]
    if arguments.what == "compile":
        from arms import compile_time  # late, because it imports jax, and --help must not

        print(compile_time.table(arguments.shape, shape))
        return 0
    if arguments.what == "isolation":
        from arms import isolation

        print(isolation.table(arguments.shape, shape, steps=arguments.steps))
        return 0
    if arguments.what == "attention":
        from arms import attention

        print(attention.table(lengths=tuple(map(int, arguments.lengths.split(","))), steps=arguments.steps))
        return 0
    if arguments.what == "decode":
        return _decode(arguments)
    with Arms(arguments.arms.split(","), arguments.shape, tunix_python=arguments.tunix_python) as arms:
        results = measure(arms, num_steps=arguments.steps, tolerance=shape.tolerance)
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(results, indent=1))
    print(table.markdown(arguments.shape, results))
    return 0


def _decode(arguments: Any) -> int:
    """The sampler beside others; for the 1B shape alone, beside the bandwidth of the memory."""
    from arms import decode

    if arguments.shape == "1b":
        rows = decode.roof_line(arguments.shape, steps=arguments.steps)
        text, numbers = decode.roof_table(arguments.shape, rows), {"roof": rows}
    else:
        names = [name for name in arguments.arms.split(",") if name != "plain"]  # which only trains
        text, numbers = decode.table(arguments.shape, names, steps=arguments.steps, tunix_python=arguments.tunix_python)
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(numbers, indent=1))
    print(text)
    return 0


if __name__ == "__main__":
    call(main)
