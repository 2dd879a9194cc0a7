# SPDX-License-Identifier: Apache-2.0
"""EleutherAI's lm-evaluation-harness, whose command line this is, with one more kind of model: jaxlm.

  python scripts/harness.py run --model jaxlm --model_args pretrained=runs/quickstart --batch_size 16 \\
    --tasks sorting --include_path tasks/
  python scripts/harness.py run --help
  python scripts/harness.py ls tasks

Everything after the command is as for `lm-eval`. --model_args: pretrained (a Hugging Face folder, .gguf file or run
directory), max_length, dtype. Needs the extra harness.
"""

import argparse
import sys

from jaxlm.command import Parser, call


def main() -> int:
    """Adds the model to the harness and hands the command line over."""
    parser = Parser(description=__doc__)
    parser.add_argument("command", choices=["run", "ls", "validate"], help="of lm-eval; each has its own --help")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    parser.parse_args(sys.argv[1:2])  # the rest is the harness's to read
    # Late, because it imports jax, and --help must not.
    from jaxlm.generate.harness import harness_class

    harness_class()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
    return 0


if __name__ == "__main__":
    call(main)
