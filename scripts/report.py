# SPDX-License-Identifier: Apache-2.0
"""Writes one HTML page with pictures about a run, or several side by side.

python scripts/report.py runs/quickstart
python scripts/report.py runs/a runs/b runs/c --out compared.html
python scripts/report.py runs/a runs/b --specialist runs/only_sort --specialist runs/only_copy

Runs that have kept their scores also get a table of what they learned and forgot.
"""

import pathlib

from jaxlm.command import Parser, call


def main() -> int:
    """Reads the arguments, writes the page, prints where it is and the numbers of its runs."""
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run directory")
    parser.add_argument("--out", help="the page; default: report.html in the first run directory")
    parser.add_argument(
        "--specialist", action="append", default=[], metavar="RUN", help="a run on one task alone, for plasticity"
    )
    arguments = parser.parse_intermixed_args()
    # Late, because it imports jax and matplotlib, and --help must not.
    from jaxlm.train.page import compare_runs, write_page

    out = pathlib.Path(arguments.out or pathlib.Path(arguments.runs[0]) / "report.html")
    print(write_page(arguments.runs, out, specialists=arguments.specialist))
    if table := compare_runs(arguments.runs, specialists=arguments.specialist):
        print(table)
    return 0


if __name__ == "__main__":
    call(main)
