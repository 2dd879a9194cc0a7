# SPDX-License-Identifier: Apache-2.0
"""Says what a run would take of every device, before anyone pays for one; allocates nothing and needs no accelerator.

  python scripts/plan.py configs/quickstart.py --devices 8 --chip v5e mesh.fsdp=8 mesh.data=1
  python scripts/plan.py configs/quickstart.py --devices 64 --chip v5p --shape llama-8b mesh.data=1 mesh.fsdp=16 \\
      mesh.tensor=4 model.dtype=bfloat16 model.remat=full data.length=4096 run.batch_size=64 --compile

The memory is an estimate: the state to the byte, the rest by a model of the step that docs/benchmarks/plan.md holds
against XLA's figures. --compile compiles the real step for as many virtual CPU devices and adds those figures, the
bytes of its collectives and bounds on MFU. Exit code 1: it does not fit the chip.
"""

import json
import os
import pathlib

from jaxlm.command import Parser, call
from jaxlm.config import load_config
from jaxlm.train.chips import CHIPS, find_chip


def main() -> int:
    """Reads the arguments, plans, prints; 1 where the run does not fit."""
    parser = Parser(description=__doc__)
    parser.add_argument("config", help="a config file, or a run directory")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="such as mesh.fsdp=8")
    parser.add_argument("--devices", type=int, required=True, help="chips of the whole run")
    parser.add_argument("--chip", default="", help=f"one of {', '.join(CHIPS)}; default: a verdict for each")
    parser.add_argument("--shape", default="", help="llama-8b or llama-70b in place of the config's model")
    parser.add_argument("--compile", action="store_true", help="compile the step too: minutes for a large model")
    parser.add_argument("--dump", metavar="FOLDER", help="write plan.json there, with --compile also step.hlo.txt")
    arguments = parser.parse_intermixed_args()
    if arguments.devices < 1:
        raise ValueError(f"--devices must be at least 1, got {arguments.devices}")
    chips = {arguments.chip: find_chip(arguments.chip)} if arguments.chip else CHIPS
    config = load_config(arguments.config, arguments.overrides)
    # Before jax is imported, which is late, because --help must not wait for it.
    os.environ["JAX_PLATFORMS"] = "cpu"
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={arguments.devices}"
    from jaxlm.plan.compiled import compile_step
    from jaxlm.plan.memory import estimate
    from jaxlm.plan.outline import make_outline
    from jaxlm.plan.table import compiled_text, fits, memory_table, remedy, verdict

    outline = make_outline(config, num_devices=arguments.devices, shape=arguments.shape)
    memory = estimate(outline)
    print(memory_table(outline, memory) + "\n")
    for name, chip in chips.items():
        print(verdict(memory, name, chip))
        if not fits(memory, chip):
            print("  " + remedy(config, chip, num_devices=arguments.devices, shape=arguments.shape))
    compiled = compile_step(outline) if arguments.compile else None
    if compiled is not None:
        print("\n" + compiled_text(outline, compiled, chips))
    if arguments.dump:
        folder = pathlib.Path(arguments.dump)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "plan.json").write_text(json.dumps(memory._asdict(), indent=1) + "\n")
        if compiled is not None:
            (folder / "step.hlo.txt").write_text(compiled.text)
    return 0 if any(fits(memory, chip) for chip in chips.values()) else 1


if __name__ == "__main__":
    call(main)
