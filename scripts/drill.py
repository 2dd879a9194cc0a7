# SPDX-License-Identifier: Apache-2.0
"""A fault drill on this machine: processes are killed, stopped, starved of disk; the run must end as if nothing was.

  python scripts/drill.py
  python scripts/drill.py --faults kill --kills 20
  python scripts/drill.py configs/epi.py --processes 4 --devices 2 method.method.fraction=0.2

Each process is scripts/train.py with virtual CPU devices. Exits with 1 if a fault does not pass. docs/pods.md has the
table of a drill.
"""

import pathlib
import sys
import tempfile

from jaxlm.command import Parser, call

SCRIPTS = pathlib.Path(__file__).resolve().parent


def main() -> int:
    """Reads the arguments, drills, prints the table."""
    parser = Parser(description=__doc__)
    parser.add_argument("config", nargs="?", default=str(SCRIPTS.parent / "configs" / "quickstart.py"))
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="such as run.batch_size=16")
    parser.add_argument("--faults", nargs="+", help="some of kill sigterm sigstop disk corrupt processes; all without")
    parser.add_argument("--kills", type=int, default=1, help="of one run, one after the other, at random updates")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=2, help="virtual ones of each process")
    parser.add_argument("--steps", type=int, default=24, help="updates of a run; kills make it longer")
    parser.add_argument("--seed", type=int, default=0, help="of when and whom")
    parser.add_argument("--folder", help="kept; without it the runs are deleted")
    arguments = parser.parse_intermixed_args()
    from jaxlm.drill import FAULTS, HEADER, Drill, row, run_drill, starter  # late: --help must not wait

    with tempfile.TemporaryDirectory() as unkept:
        drill = Drill(
            start=starter(SCRIPTS / "train.py"),
            config=arguments.config,
            fields=tuple(arguments.overrides),
            folder=pathlib.Path(arguments.folder or unkept),
            processes=arguments.processes,
            devices=arguments.devices,
            steps=arguments.steps,
            kills=arguments.kills,
            seed=arguments.seed,
        )
        print(HEADER + "\n" + "|---" * 7 + "|", flush=True)
        outcomes = run_drill(drill, arguments.faults or FAULTS, lambda outcome: print(row(outcome), flush=True))
    failed = [outcome.fault for outcome in outcomes if outcome.failure]
    if failed:
        print(f"did not pass: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    call(main)
