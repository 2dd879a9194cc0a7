# SPDX-License-Identifier: Apache-2.0
"""Trains what a config file says, or goes on with the run in its directory.

  python scripts/train.py configs/quickstart.py
  python scripts/train.py configs/quickstart.py run.steps=100 data.tasks.0.weight=2

The same command again resumes the run where it stopped. A run stopped by SIGTERM saves first and exits with code 75.
Started once a host by a scheduler, or with JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID set, the
processes are one run: docs/training.md, "Many hosts".
"""

import json
import pathlib
import sys
import time

from jaxlm.command import TRY_AGAIN, Parser, call
from jaxlm.config import load_config, to_json


def main() -> int:
    """Reads the arguments, runs, returns the exit code."""
    began = time.perf_counter()  # before jax is imported: that is part of what a run spends
    parser = Parser(description=__doc__)
    parser.add_argument("config", help="a config file, or a run directory to go on with")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="such as run.steps=100")
    parser.add_argument("--show", action="store_true", help="print the resolved config as JSON and stop")
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.config, arguments.overrides)
    if arguments.show:
        print(json.dumps(to_json(config), indent=1))
        return 0
    # Late, because they import jax, and --help must not.
    import jax

    from jaxlm.train.launch import NotConnected, connect
    from jaxlm.train.stop import Preempted

    try:
        connect(watched=config.run.step_timeout > 0)

        from jaxlm.evaluation import comparison  # once connected: no import may touch a device before
        from jaxlm.run import run

        result = run(config, began=began)
    except (Preempted, NotConnected) as stopped:
        print(f"stopped: {stopped}; the same command goes on", file=sys.stderr)
        return TRY_AGAIN
    if jax.process_index() == 0:
        print("\n" + comparison(result.before, result.after))
        print(f"\n{result.goodput}")
        if config.run.directory:
            print(f"\nreport: {pathlib.Path(config.run.directory) / 'report.html'}")
    return 0


if __name__ == "__main__":
    call(main)
