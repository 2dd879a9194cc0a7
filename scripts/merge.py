# SPDX-License-Identifier: Apache-2.0
"""Merges Hugging Face folders (safetensors) into a new one, tensor by tensor; docs/methods/merge.md tells which method.

  python scripts/merge.py linear one/ two/ --weights 0.7,0.3 --to merged/
  python scripts/merge.py slerp one/ two/ --weight 0.5 --to merged/
  python scripts/merge.py ties one/ two/ --base base/ --density 0.2 --to merged/
  python scripts/merge.py dare_ties one/ two/ --base base/ --density 0.5 --seed 1 --to merged/
  python scripts/merge.py transplant one/ two/ --base fused/ --cores 1.safetensors,2.safetensors --overlap mean --to m/

Methods: linear, soup, slerp, task_arithmetic, ties, dare_linear, dare_ties, transplant.
"""

import difflib

from jaxlm.command import Parser, call


def main() -> int:
    """Parses the command line, merges, prints one line."""
    parser = Parser(description=__doc__)
    parser.add_argument("method", help="how to merge")
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folders with the same tensors")
    parser.add_argument("--to", required=True, metavar="FOLDER", help="to write; it must not exist or be empty")
    parser.add_argument("--base", metavar="FOLDER", help="the common base, for methods on task vectors")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: what holds all that is read)")
    parser.add_argument("--max-shard-bytes", type=float, default=5e9, help="size of one file (default 5e9)")
    numbers = parser.add_argument_group("numbers of the methods")
    numbers.add_argument("--weights", type=_numbers, metavar="W,W,...", help="one a model, or one for all")
    numbers.add_argument("--weight", type=float, help="slerp: share of the second model, [0, 1]")
    numbers.add_argument("--eps", type=float, help="slerp: half-width of the linear zones in the cosine")
    numbers.add_argument("--scale", type=float, help="factor of the sum of task vectors")
    numbers.add_argument("--normalize", type=_yes_or_no, metavar="yes|no", help="divide by the sum of the weights")
    numbers.add_argument("--density", type=float, help="ties, dare: share that is kept, (0, 1]")
    numbers.add_argument("--seed", type=int, help="dare: of what is dropped")
    numbers.add_argument("--rescale", help="dare: share (1 / density), norm (as mergekit) or none")
    numbers.add_argument("--cores", type=lambda text: text.split(","), metavar="FILE,...", help="transplant: bools")
    numbers.add_argument("--overlap", help="transplant: largest, mean or last")
    numbers.add_argument("--origin", metavar="FOLDER", help="transplant: the weights before tuning")
    options = vars(parser.parse_args())
    # Late, because they import jax, and --help must not.
    from jaxlm.checkpoints.merge_folders import merge_folders
    from jaxlm.checkpoints.merge_recipes import METHODS, fields_of

    method = options.pop("method")
    if method not in METHODS:
        near = difflib.get_close_matches(method, METHODS, 1)
        raise ValueError(
            f"no method {method!r}; " + (f"did you mean {near[0]}?" if near else f"try {', '.join(METHODS)}")
        )
    names = ("models", "to", "base", "dtype", "max_shard_bytes")
    models, target, base, dtype, max_shard_bytes = (options.pop(name) for name in names)
    given = {name: value for name, value in options.items() if value is not None}
    make, fixed = METHODS[method]
    for name in given:
        if name not in fields_of(method):
            raise ValueError(f"{method} has no --{name}; it reads {', '.join(fields_of(method)) or 'no numbers'}")
    for name in fields_of(method, needed=True):
        if name not in given:
            raise ValueError(f"{method} needs --{name}")
    print(
        merge_folders(make(**given, **fixed), models, target, base=base, dtype=dtype, max_shard_bytes=max_shard_bytes)
    )
    return 0


def _numbers(text: str) -> float | list[float]:
    values = [float(word) for word in text.split(",")]
    return values if len(values) > 1 else values[0]


def _yes_or_no(text: str) -> bool:
    if text not in ("yes", "no"):
        raise ValueError(text)
    return text == "yes"


if __name__ == "__main__":
    call(main)
