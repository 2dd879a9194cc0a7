# SPDX-License-Identifier: Apache-2.0
"""Tokenises and packs the data of a config once, so that training needs neither the sources nor their packages.

  python scripts/prepare.py configs/sft_smollm2.py --to prepared/sft
  python scripts/train.py configs/sft_smollm2.py prepared=prepared/sft

What is there already for the same data, tokenizer and packing is left as it is. Prints what was read and skipped.
"""

from pathlib import Path

from jaxlm.command import Parser, call
from jaxlm.config import load_config


def main() -> None:
    """Reads the arguments and prepares both splits."""
    parser = Parser(description=__doc__)
    parser.add_argument("config", help="a config file, or a run directory")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="such as data.length=1024")
    parser.add_argument(
        "--to", metavar="DIR", help="where to write; default: the config's `prepared`, or DIR/data of its run"
    )
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.config, arguments.overrides)
    # Late, because they import transformers and jax, and --help must not.
    from jaxlm.data import prepare
    from jaxlm.run import load_tokenizer

    folder = Path(arguments.to or config.prepared or Path(config.run.directory or ".") / "data")
    tokenizer = load_tokenizer(config)
    for split in ("train", "test"):
        if any(getattr(task, split) for task in config.data.tasks):
            print(prepare(config.data, tokenizer, split=split, directory=folder).summary(), flush=True)
    stale = [split for split in ("train", "test") if len(list(folder.glob(f"{split}-*/manifest.json"))) > 1]
    if stale:
        raise ValueError(
            f"{folder} holds {' and '.join(stale)} data of an earlier config too: delete what is not needed"
        )


if __name__ == "__main__":
    call(main)
