# SPDX-License-Identifier: Apache-2.0
"""Writes one HTML page with pictures about a run, or several side by side.

python scripts/report.py runs/quickstart
python scripts/report.py runs/a runs/b runs/c --out compared.html
"""

import pathlib

from jaxlm.command import Parser, call


def main() -> int:
    """Reads the arguments, writes the page, prints where it is."""
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run directory")
    parser.add_argument("--out", help="the page; default: report.html in the first run directory")
    arguments = parser.parse_intermixed_args()
    # Late, because it imports jax and matplotlib, and --help must not.
    from jaxlm.train.page import write_page

    out = pathlib.Path(arguments.out or pathlib.Path(arguments.runs[0]) / "report.html")
    print(write_page(arguments.runs, out))
    return 0


if __name__ == "__main__":
    call(main)
