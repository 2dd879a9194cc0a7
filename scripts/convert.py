# SPDX-License-Identifier: Apache-2.0
"""Reads a checkpoint (Hugging Face folder or .gguf file) and writes it as a folder that transformers loads.

python scripts/convert.py SmolLM2-135M-Instruct.Q4_1.gguf smollm2/
"""

from jaxlm.command import Parser, call


def main() -> int:
    """Parses the command line, converts, prints one line."""
    parser = Parser(description=__doc__)
    parser.add_argument("source", help="folder of a Hugging Face checkpoint (safetensors), or a .gguf file")
    parser.add_argument("target", help="folder to write; it must not exist or be empty")
    parser.add_argument("--max-shard-bytes", type=float, default=5e9, help="size of one file (default 5e9)")
    options = parser.parse_args()
    # Late, because it imports jax, and --help must not.
    from jaxlm.checkpoints.convert import convert

    print(convert(options.source, options.target, max_shard_bytes=options.max_shard_bytes))
    return 0


if __name__ == "__main__":
    call(main)
