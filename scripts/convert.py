# SPDX-License-Identifier: Apache-2.0
"""Reads a checkpoint (Hugging Face folder or .gguf file) and writes it as a folder that transformers loads.

python scripts/convert.py SmolLM2-135M-Instruct.Q4_1.gguf smollm2/
"""

import argparse


def main() -> None:
    """Parses the command line, converts, prints one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder of a Hugging Face checkpoint (safetensors), or a .gguf file")
    parser.add_argument("target", help="folder to write; it must not exist or be empty")
    parser.add_argument("--max-shard-bytes", type=float, default=5e9, help="size of one file (default 5e9)")
    options = parser.parse_args()

    from jaxlm.checkpoints.convert import convert  # here, so that --help does not wait for jax

    try:
        print(convert(options.source, options.target, max_shard_bytes=options.max_shard_bytes))
    except (ValueError, ImportError, OSError) as error:
        raise SystemExit(f"convert: {error}") from None


if __name__ == "__main__":
    main()
