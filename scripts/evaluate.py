# SPDX-License-Identifier: Apache-2.0
"""Held-out loss, perplexity and exact match of every task, under teacher forcing.

python scripts/evaluate.py runs/quickstart
python scripts/evaluate.py runs/quickstart --json run.batch_size=64
python scripts/evaluate.py runs/books --lengths 512,4096,16384
python scripts/evaluate.py assets/model.gguf --config configs/sft_smollm2.py
"""

import json
import pathlib

from jaxlm.command import Parser, call
from jaxlm.config import load_config


def main() -> int:
    """Reads the arguments, evaluates, prints a table or JSON."""
    parser = Parser(description=__doc__)
    parser.add_argument("model", help="a run directory; with --config a Hugging Face folder or .gguf file")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="such as run.batch_size=64")
    parser.add_argument("--config", help="whose tasks and tokenizer to use; default: the run's own")
    parser.add_argument("--lengths", default="", metavar="L,L", help="also perplexity in windows of so many tokens")
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else, on stdout")
    arguments = parser.parse_intermixed_args()
    is_run = (pathlib.Path(arguments.model) / "metrics.jsonl").is_file()
    if not is_run and not arguments.config:
        raise ValueError(f"{arguments.model} is no run directory: say with --config which tasks to evaluate it on")
    config = load_config(arguments.config or arguments.model, arguments.overrides)
    # Late, because it imports jax, and --help must not.
    from jaxlm.evaluation import evaluate_checkpoint, evaluate_run, length_table, table

    lengths = [_length(text) for text in arguments.lengths.split(",") if text]
    metrics = (evaluate_run if is_run else evaluate_checkpoint)(arguments.model, config, lengths=lengths)
    tables = [text for text in (table(metrics), length_table(metrics)) if text]
    print(json.dumps(metrics, indent=1) if arguments.json else "\n\n".join(tables))
    return 0


def _length(text: str) -> int:
    if not text.strip().isdecimal() or not int(text):
        raise ValueError(f"--lengths are numbers of tokens such as 256,1024, got {text!r}")
    return int(text)


if __name__ == "__main__":
    call(main)
