# SPDX-License-Identifier: Apache-2.0
"""Trains every arm of a comparison, or goes on with what is not finished, and writes its table and its page.

  python scripts/compare.py configs/compare_isolation.py
  python scripts/compare.py configs/compare_isolation.py --part 1/2     (beside another process with --part 2/2)
  python scripts/compare.py configs/compare_positions.py --report       (what is there so far)

A part trains its share of the arms and reports nothing; the command without one finishes and reports.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxlm.command import Parser, call
from jaxlm.config import Comparison, LengthComparison, PlanComparison, load_comparison


def main() -> int:
    """Reads the arguments, compares, prints the table."""
    parser = Parser(description=__doc__)
    parser.add_argument("config", help="a config file with a function get_comparison()")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="such as run.run.steps=100")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="only every N-th arm from the I-th")
    parser.add_argument("--report", action="store_true", help="train nothing, report what is there")
    arguments = parser.parse_intermixed_args()
    comparison = load_comparison(arguments.config, arguments.overrides)
    number, _, total = arguments.part.partition("/")
    if not (number.isdecimal() and total.isdecimal() and 1 <= int(number) <= int(total)):
        raise ValueError(f"--part is I/N with 1 <= I <= N, got {arguments.part!r}")
    train, report = _parts_of(comparison)
    if not arguments.report:
        train(comparison, part=(int(number) - 1, int(total)))
    if int(total) > 1:
        return 0
    text, page = report(comparison)
    (comparison.directory / "table.md").write_text(text + "\n")
    print(text)
    if page is not None:
        print(f"pictures: {page}", file=sys.stderr)
    return 0


def _parts_of(comparison: Any) -> tuple[Callable[..., None], Callable[[Any], tuple[str, Path | None]]]:
    """What trains a comparison of its kind, and what makes its table and its page."""
    # Late, because they import jax, and --help must not.
    from jaxlm.train.launch import alone

    alone("a comparison is one process, or several with a --part each")
    if isinstance(comparison, LengthComparison):
        from jaxlm.comparison_lengths import compare_lengths
        from jaxlm.comparison_lengths_page import write_length_comparison
        from jaxlm.comparison_lengths_report import length_findings, length_table

        def report_lengths(comparison: LengthComparison) -> tuple[str, Path]:
            found = length_findings(comparison)
            return length_table(comparison, found), write_length_comparison(comparison, found)

        return compare_lengths, report_lengths
    if isinstance(comparison, PlanComparison):
        from jaxlm.comparison_plans import compare_plans
        from jaxlm.comparison_plans_report import plan_findings, plan_table

        def report_plans(comparison: PlanComparison) -> tuple[str, None]:
            return plan_table(comparison, plan_findings(comparison)), None

        return compare_plans, report_plans
    from jaxlm.comparison import compare
    from jaxlm.comparison_page import write_comparison
    from jaxlm.comparison_report import findings, table

    def report(comparison: Comparison) -> tuple[str, Path]:
        arms = findings(comparison)
        return table(comparison, arms), write_comparison(comparison, arms)

    return compare, report


if __name__ == "__main__":
    call(main)
